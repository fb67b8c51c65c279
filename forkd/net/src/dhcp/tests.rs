use super::*;

const MAC: [u8; 6] = [2, 0x66, 10, 0, 0, 5];

fn request(kind: u8) -> Vec<u8> {
    let mut bytes = vec![0; OPTIONS];
    bytes[0] = 1;
    bytes[28..34].copy_from_slice(&MAC);
    bytes[236..].copy_from_slice(&COOKIE);
    bytes.extend_from_slice(&[0, 12, 1, b'x', 53, 1, kind, 255]);
    bytes
}

#[test]
fn a_guest_is_told_its_own_address() {
    let guest = Ipv4Addr::new(10, 0, 0, 5);
    for (asked, answered) in [(DISCOVER, OFFER), (REQUEST, ACK)] {
        let packet = answer(MAC, guest, &request(asked)).unwrap();
        let reply = &packet[wire::PAYLOAD + 28..];
        assert_eq!(reply[16..20], guest.octets());
        assert_eq!(option(&reply[OPTIONS..], 53), Some(&[answered][..]));
        assert_eq!(option(&reply[OPTIONS..], 26), Some(&MTU.to_be_bytes()[..]));
        assert_eq!(option(&reply[OPTIONS..], 6), Some(&GATEWAY.octets()[..]));
    }
}

#[test]
fn nothing_else_is_answered() {
    let guest = Ipv4Addr::new(10, 0, 0, 5);
    for end in 0..request(1).len() - 1 {
        assert_eq!(answer(MAC, guest, &request(1)[..end]), None, "cut at {end}");
    }
    assert_eq!(answer(MAC, guest, &request(7)), None);
    assert_eq!(answer([2, 0, 0, 0, 0, 1], guest, &request(1)), None, "for another");
}
