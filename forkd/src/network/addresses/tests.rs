use super::*;

fn addresses(range: &str) -> Arc<Addresses> {
    Addresses::new(range.parse().unwrap())
}

#[test]
fn each_is_given_once_until_it_is_free_and_late_again() {
    let addresses = addresses("100.64.0.0/29");
    let mut all: Vec<_> = (0..6).map(|_| addresses.any().unwrap()).collect();
    let distinct: HashSet<_> = all.iter().map(|address| address.network().ipv4).collect();
    assert_eq!(distinct.len(), 6);
    assert!(distinct.iter().all(|address| (1..=6).contains(&address.octets()[3])));
    assert_eq!(addresses.any().unwrap_err(), Error::Exhausted("100.64.0.0/29".parse().unwrap()));
    let freed = all.remove(2).network().ipv4;
    assert_eq!(addresses.any().unwrap().network().ipv4, freed);
    drop(all);
    let (first, second) = (addresses.any().unwrap().network().ipv4, addresses.any().unwrap().network().ipv4);
    assert_ne!(first, second, "the one just freed is not given at once");
}

#[test]
fn a_chosen_one_must_be_inside_and_free() {
    let addresses = addresses("100.64.0.0/24");
    let mine = Ipv4Addr::new(100, 64, 0, 7);
    let held = addresses.claim(mine).unwrap();
    assert_eq!(addresses.claim(mine).unwrap_err(), Error::InUse(mine));
    assert_eq!(addresses.check(mine), Err(Error::InUse(mine)));
    drop(held);
    assert_eq!(addresses.check(mine), Ok(()));
    for outside in ["100.64.0.0", "100.64.0.255", "100.64.1.1", "8.8.8.8"] {
        assert!(matches!(addresses.claim(outside.parse().unwrap()), Err(Error::Outside { .. })), "{outside}");
    }
}
