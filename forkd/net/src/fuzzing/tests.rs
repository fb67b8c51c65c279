use std::path::Path;

/// Runs every input of a target's corpus: what a fuzzer has found once is not lost.
fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let inputs: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!inputs.is_empty());
    for input in inputs {
        run(&std::fs::read(input).unwrap());
    }
}

#[test]
fn the_corpus_of_frames_does_no_harm() {
    replay("frames", super::frames);
}

#[test]
fn the_corpus_of_names_does_no_harm() {
    replay("dns", super::dns);
}
