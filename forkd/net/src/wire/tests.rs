use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn v4(a: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, a])
}

fn sample() -> Vec<u8> {
    udp(MAC, (v4(1), 7), (v4(2), 9), b"hello").unwrap()[PAYLOAD..].to_vec()
}

fn refix(bytes: &mut [u8]) {
    bytes[10..12].fill(0);
    let check = !fold(sum(&bytes[..20], 0));
    bytes[10..12].copy_from_slice(&check.to_be_bytes());
}

#[test]
fn what_is_made_is_read_back() {
    let bytes = sample();
    let ip = ipv4(&bytes).unwrap();
    assert_eq!((ip.source, ip.destination, ip.protocol, ip.start, ip.end), (v4(1), v4(2), UDP, 20, 33));
    assert!(checksum_is_right(&ip, &bytes));
    let six = |n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n]);
    let bytes = udp(MAC, (six(1), 7), (six(2), 9), b"hello").unwrap();
    let ip = ipv6(&bytes[PAYLOAD..]).unwrap();
    assert_eq!((ip.source, ip.destination, ip.protocol, ip.end), (six(1), six(2), UDP, 53));
    assert!(checksum_is_right(&ip, &bytes[PAYLOAD..]));
}

#[test]
fn no_prefix_and_no_flipped_bit_is_a_panic() {
    let bytes = sample();
    for end in 0..bytes.len() {
        assert!(ipv4(&bytes[..end]).is_err());
        let _ = ipv6(&bytes[..end]);
    }
    for bit in 0..20 * 8 {
        let mut bytes = sample();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(ipv4(&bytes).is_err(), "the header's checksum covers bit {bit}");
        refix(&mut bytes);
        let _ = ipv4(&bytes);
        let _ = ipv6(&bytes);
    }
}

#[test]
fn fragments_options_and_wrong_lengths_are_refused() {
    for (at, value, expected) in [
        (6, 0x20, Bad::Fragment),
        (7, 1, Bad::Fragment),
        (0, 0x46, Bad::Malformed),
        (0, 0x44, Bad::Malformed),
        (3, 19, Bad::Malformed),
        (3, 24, Bad::Malformed),
        (2, 1, Bad::Malformed),
        (25, 7, Bad::Malformed),
        (25, 200, Bad::Malformed),
        (9, TCP, Bad::Malformed),
    ] {
        let mut bytes = sample();
        bytes[at] = value;
        refix(&mut bytes);
        assert_eq!(ipv4(&bytes), Err(expected), "byte {at}");
    }
}

#[test]
fn headers_for_other_guests_are_checked() {
    let mut packet = vec![0; 100];
    assert!(header_is_sane(&packet));
    packet[0] = NEEDS_CSUM;
    assert!(!header_is_sane(&packet), "a checksum in the Ethernet header");
    (packet[6], packet[8]) = (34, 16);
    assert!(header_is_sane(&packet));
    packet[7] = 1;
    assert!(!header_is_sane(&packet));
    packet[7] = 0;
    packet[1] = 3;
    assert!(!header_is_sane(&packet));
    packet[1] = 1;
    assert!(!header_is_sane(&packet), "segments of nothing");
    packet[5] = 4;
    assert!(header_is_sane(&packet));
    packet[0] |= 0x80;
    assert!(!header_is_sane(&packet));
}

#[test]
fn a_syn_is_reset_with_an_acknowledgement_and_a_reset_is_not() {
    let mut segment = [0; 20];
    segment[7] = 41;
    (segment[12], segment[13]) = (0x50, 2);
    let bytes = packet(MAC, v4(1), v4(2), TCP, 16, &segment).unwrap();
    let answer = reset(MAC, &ipv4(&bytes[PAYLOAD..]).unwrap(), &bytes[PAYLOAD..]).unwrap();
    let ip = ipv4(&answer[PAYLOAD..]).unwrap();
    assert_eq!((ip.source, ip.destination), (v4(2), v4(1)));
    assert_eq!((answer[PAYLOAD + 20 + 11], answer[PAYLOAD + 20 + 13]), (42, 0x14));
    assert!(checksum_is_right(&ip, &answer[PAYLOAD..]));
    assert_eq!(reset(MAC, &ip, &answer[PAYLOAD..]), None);
}
