use super::*;

#[test]
fn a_bucket_lets_its_rate_through_and_no_more() {
    let start = Instant::now();
    let mut bucket = Bucket::new(10, start);
    assert_eq!((0..20).filter(|_| bucket.one(start)).count(), 10);
    assert!(!bucket.open(start + Duration::from_millis(50)));
    assert!(bucket.open(start + Duration::from_millis(200)));
    let later = start + Duration::from_secs(100);
    assert_eq!((0..20).filter(|_| bucket.one(later)).count(), 10, "a burst is one second");
}

#[test]
fn a_debt_is_paid_before_anything_passes() {
    let start = Instant::now();
    let mut bucket = Bucket::new(1000, start);
    assert!(bucket.open(start));
    bucket.take(3000);
    assert!(bucket.wait() >= Duration::from_secs(2));
    assert!(!bucket.open(start + Duration::from_millis(1900)));
    assert!(bucket.open(start + Duration::from_millis(2100)));
}

#[test]
fn no_rate_is_no_limit() {
    let now = Instant::now();
    let mut bucket = Bucket::new(0, now);
    bucket.take(u64::MAX);
    assert!(bucket.open(now));
}
