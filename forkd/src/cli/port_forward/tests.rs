use super::*;

#[test]
fn pairs_of_ports() {
    assert_eq!(pair("80"), Ok(Pair { host: 80, guest: 80 }));
    assert_eq!(pair("8080:80"), Ok(Pair { host: 8080, guest: 80 }));
    assert_eq!(pair(":80"), Ok(Pair { host: 0, guest: 80 }));
    assert_eq!(pair("0:80"), Ok(Pair { host: 0, guest: 80 }));
    for bad in ["", ":", "0", "80:", "80:0", "65536", "a", "1:2:3", "-1", "80 "] {
        assert!(pair(bad).is_err(), "{bad}");
    }
}
