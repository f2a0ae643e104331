//! A slice of the fuzzing. The program of this crate runs as long as one likes.

use bootfuzz::{Options, Shape, run};
use std::time::Duration;

fn none_fails(seed: u64, shape: Option<Shape>, seconds: u64, at_least: u64) {
    let options =
        Options { time: Duration::from_secs(seconds), cases: 5000, seed, instructions: 100_000, shape };
    let report = run(&options).expect("a temporary folder");
    assert!(report.failures.is_empty(), "{:#?}", report.failures);
    assert!(report.cases >= at_least, "only {} cases in {seconds} s", report.cases);
    assert!(report.ends.len() > 1, "all ended the same way: {:?}", report.ends);
}

#[test]
fn random_bytes_bring_nothing_down() {
    none_fails(1_000_000, None, 20, 200);
}

#[test]
fn damaged_states_bring_nothing_down() {
    none_fails(2_000_000, Some(Shape::State), 5, 50);
}
