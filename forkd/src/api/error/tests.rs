use std::collections::HashSet;

use super::*;

#[test]
fn every_code_is_complete_and_its_own() {
    let mut names = HashSet::new();
    for &code in Code::ALL {
        let body = Error::new(code, "x").body();
        assert!(names.insert(body.code.clone()), "{} twice", body.code);
        assert!(body.code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{}", body.code);
        assert!(body.remediation.len() >= 12, "{} has no remedy", body.code);
        assert!(!body.remediation.ends_with('.'), "{} ends with a full stop", body.code);
    }
}

#[test]
fn statuses_agree_with_kinds() {
    for &code in Code::ALL {
        let error = Error::new(code, "x");
        let (status, kind) = (error.status(), error.body().kind);
        assert!(status.is_client_error() || status.is_server_error());
        if kind == Kind::Request {
            assert!(status.is_client_error(), "{} is the caller's fault", code.name());
        }
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            assert_eq!(kind, Kind::Infra, "{}", code.name());
        }
    }
}

#[test]
fn refusals_for_load_say_when_to_come_back() {
    let response = Error::new(Code::TooManyForks, "x").into_response();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(response.headers().contains_key(header::RETRY_AFTER));
}
