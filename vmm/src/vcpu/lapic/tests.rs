use super::*;

fn with_timer(entry: u32) -> kvm_lapic_state {
    let mut lapic = kvm_lapic_state { regs: [0; 1024] };
    write(&mut lapic, TIMER, entry);
    lapic
}

#[test]
fn only_an_unmasked_deadline_timer_counts() {
    assert_eq!(deadline_timer_vector(&with_timer(MODE_TSC_DEADLINE | 0xEC)), Some(0xEC));
    assert_eq!(deadline_timer_vector(&with_timer(MODE_TSC_DEADLINE | MASKED | 0xEC)), None);
    assert_eq!(deadline_timer_vector(&with_timer(0xEC)), None);
}

#[test]
fn a_pending_vector_is_taken_once_and_no_other() {
    let mut lapic = with_timer(0);
    write(&mut lapic, REQUESTS + 7 * 16, (1 << 12) | (1 << 13));
    assert!(take_pending(&mut lapic, 0xEC));
    assert!(!take_pending(&mut lapic, 0xEC));
    assert!(take_pending(&mut lapic, 0xED));
}
