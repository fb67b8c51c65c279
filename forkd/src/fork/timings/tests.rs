use super::*;

fn sum(t: &Timings) -> f64 {
    t.queue + t.fork + t.vm + t.vcpus + t.restore + t.activate + t.enter + t.guest + t.reply
}

#[test]
fn phases_add_up() {
    let stamps = Stamps {
        requested: 2_000,
        forked: 3_000,
        vm: 5_000,
        vcpus: 6_000,
        restored: 9_000,
        activated: 9_500,
        entered: 10_000,
        acknowledged: 20_000,
    };
    let timings = split(1_000, &stamps, 21_000);
    assert_eq!((timings.queue, timings.guest, timings.reply, timings.total), (1.0, 10.0, 1.0, 20.0));
    assert!((sum(&timings) - timings.total).abs() < 1e-9);
}

#[test]
fn missing_and_early_instants_do_not_break_the_sum() {
    let stamps = Stamps { requested: 2_000, restored: 9_000, activated: 4_000, ..Stamps::default() };
    let timings = split(1_000, &stamps, 11_000);
    assert_eq!((timings.fork, timings.restore, timings.activate), (0.0, 7.0, 0.0));
    assert!((sum(&timings) - timings.total).abs() < 1e-9);
    // Clocks of the future are not believed.
    let timings = split(1_000, &Stamps { requested: u64::MAX, ..Stamps::default() }, 2_000);
    assert_eq!((timings.queue, timings.total), (1.0, 1.0));
}
