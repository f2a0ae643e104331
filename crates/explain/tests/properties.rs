//! Properties: leaving frames out never adds a certain statement; no input panics; the work is linear.
//!
//! With `EXPLAIN_CORPUS=DIR` the first property is also tried on every `.txt` file of the directory.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use explain::explanation::explain;
use explain::model::Report;
use explain::text::{Detail, render};
use proptest::prelude::*;

const TRACES: &[&str] = &[
    include_str!("traces/legacy-status.txt"),
    include_str!("traces/sdma-reentrancy.txt"),
    include_str!("traces/subpage-doorbell.txt"),
    include_str!("traces/no-symbols.txt"),
    include_str!("traces/string-io-split.txt"),
];

/// The certain statements, and the stack that they are about.
fn claims(r: &Report) -> (usize, BTreeSet<String>) {
    let e = explain(r, &[]);
    (e.input.chosen, e.certain_claims().into_iter().collect())
}

fn without(r: &Report, keep: &dyn Fn(usize, usize) -> bool) -> Report {
    let mut out = r.clone();
    for (k, s) in out.stacks.iter_mut().enumerate() {
        let mut i = 0;
        s.frames.retain(|_| {
            i += 1;
            keep(k, i - 1)
        });
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn leaving_frames_out_adds_nothing_certain(which in 0..TRACES.len(), seed in any::<u64>(), share in 1u64..99) {
        let full = explain::reader::read(TRACES[which].as_bytes()).expect("reads");
        let (chosen, all) = claims(&full);
        let less = without(&full, &|k, i| mix(seed, k as u64, i as u64) % 100 >= share);
        let (stack, some) = claims(&less);
        for c in some {
            prop_assert!(stack != chosen || all.contains(&c), "new certain statement: {c}\nof the whole trace: {all:#?}");
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        let e = explain::explain_text(&bytes);
        let _ = render(&e, Detail::Teach);
        let _ = e.to_json();
    }

    #[test]
    fn no_damaged_trace_panics(which in 0..TRACES.len(), at in 0usize..6000, with in any::<[u8; 3]>(), end in 0usize..8000) {
        let mut b = TRACES[which].as_bytes().to_vec();
        for (i, w) in with.iter().enumerate() {
            let n = b.len();
            b[(at + i * 37) % n] = *w;
        }
        b.truncate(end.max(1));
        let e = explain::explain_text(&b);
        let _ = render(&e, Detail::Teach);
    }

    #[test]
    fn no_shuffled_words_panic(words in proptest::collection::vec("(#[0-9]{1,7} |0x[0-9a-f]{1,17} |in |flatview_write |kvm_handle_io |\\(|\\)|addr=addr@entry=[0-9]{1,20}|, |size=|Thread |at |\n|==1==ERROR: |subpage_write |memory_region_write_accessor |\"|'|\\{)", 0..300)) {
        let e = explain::explain_text(words.concat().as_bytes());
        let _ = render(&e, Detail::Teach);
    }
}

fn mix(seed: u64, a: u64, b: u64) -> u64 {
    let mut x = seed ^ a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 31;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 29)
}

#[test]
fn the_corpus_keeps_the_property_too() {
    let Some(dir) = std::env::var_os("EXPLAIN_CORPUS") else { return };
    let mut bad = Vec::new();
    for f in std::fs::read_dir(dir).expect("the directory can be read").flatten() {
        if f.path().extension().is_none_or(|e| e != "txt") {
            continue;
        }
        let full = explain::reader::read(&std::fs::read(f.path()).expect("reads")[..]).expect("reads");
        let (chosen, all) = claims(&full);
        for seed in 0..60u64 {
            let less = without(&full, &|k, i| mix(seed, k as u64, i as u64) % 100 >= 5 + seed);
            let (stack, some) = claims(&less);
            // With many threads, a thinned stack may make another thread the one to explain.
            for c in some.into_iter().filter(|_| stack == chosen) {
                if !all.contains(&c) {
                    bad.push(format!("{}: {c}", f.path().display()));
                }
            }
        }
    }
    bad.sort();
    bad.dedup();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn long_input_takes_linear_time() {
    let unit = TRACES.concat();
    let time = |n: usize| {
        let text = unit.repeat(n);
        let t = Instant::now();
        let e = explain::explain_text(text.as_bytes());
        assert_ne!(e.verdict, "not-a-trace");
        t.elapsed().max(Duration::from_millis(1))
    };
    time(20);
    let (a, b) = (time(40), time(400));
    assert!(b < a * 60, "40 units {a:?}, 400 units {b:?}");
    // Long runs of one kind: brackets, quotes, digits, no line ends.
    for s in ["(", "\"", "#1", "> ", "0x1 ", "&lt;", "<a ", "[0x", "\u{1b}["] {
        let t = Instant::now();
        let _ = explain::explain_text(s.repeat(1 << 20).as_bytes());
        assert!(t.elapsed() < Duration::from_secs(10), "{s}");
    }
}
