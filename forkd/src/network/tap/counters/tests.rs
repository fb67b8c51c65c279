//! nft's JSON.

use super::parse;

/// As nft 1.0.6 lists two chains, less what is not looked at.
const LISTED: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"chain": {"name": "s3"}},
 {"rule": {"chain": "s3", "comment": "sent", "expr": [{"match": {"op": "=="}}, {"counter": {"packets": 5, "bytes": 700}}, {"accept": null}]}},
 {"rule": {"chain": "s3", "comment": "sent", "expr": [{"counter": {"packets": 1, "bytes": 40}}]}},
 {"rule": {"chain": "s3", "comment": "refused", "expr": [{"counter": {"packets": 2, "bytes": 80}}, {"drop": null}]}}]}
{"nftables": [{"rule": {"chain": "a3", "comment": "opened", "expr": [{"counter": {"packets": 4, "bytes": 9}}]}},
 {"rule": {"chain": "d3", "comment": "denied", "expr": [{"counter": {"packets": 7, "bytes": 9}}]}},
 {"rule": {"chain": "d3", "expr": [{"goto": {"target": "deny"}}]}}]}"#;

#[test]
fn counters_are_added_up_by_their_comments() {
    let counters = parse(LISTED, 3).unwrap();
    assert_eq!((counters.frames_from_guest, counters.bytes_from_guest), (6, 740));
    assert_eq!((counters.frames_refused, counters.flows_opened, counters.denied), (2, 4, 7));
    assert_eq!((counters.flows, counters.frames_to_guest), (3, 0));
}

#[test]
fn what_is_no_json_is_an_error() {
    assert!(parse("{\"nftables\": [", 0).is_err());
}
