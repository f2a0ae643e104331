//! A short, deterministic run. The program of this crate runs as long as one likes.

use std::sync::Arc;
use std::time::Duration;
use x86_difftest::{Options, host_model, run};

#[test]
fn interpreter_and_host_agree() {
    let options =
        Options { time: Duration::from_secs(60), cases: 50_000, seed: 20_000_000, only: None, shown: 3 };
    let report = run(&options, Arc::new(host_model().expect("the host's processor has a model")))
        .expect("a child process runs");
    assert!(report.cases > 10_000, "only {} cases in a minute", report.cases);
    assert!(report.faults > 1000, "faults are part of the test: {}", report.faults);
    assert_eq!(report.lost, 0, "cases that took the child with them");
    // What manuals leave undefined is listed for AMD's processors in `compare`; others were not tried yet.
    let amd = hyaline_x86::native::host_features().amd;
    let allowed = if amd { 0 } else { report.cases / 500 };
    assert!(
        report.mismatched() <= allowed,
        "{} of {} cases differ from the host:\n{}",
        report.mismatched(),
        report.cases,
        report.texts.concat()
    );
}

#[test]
fn a_wrong_result_is_noticed() {
    // The comparison must be able to fail: one flipped bit in a register, a flag, memory or the exception is reported.
    let generator = x86_difftest::generate::Generator::new(Some(iced_x86::Mnemonic::Paddb), |_| true);
    let (case, i) = generator.case(1);
    let outcome = || x86_difftest::case::Outcome {
        after: case.before,
        vector: None,
        error: 0,
        cr2: 0,
        changed: true,
        data: [0; 2 * x86_difftest::case::PAGE],
    };
    let differs = |change: &dyn Fn(&mut x86_difftest::case::Outcome)| {
        let mut ours = outcome();
        change(&mut ours);
        !x86_difftest::compare::differences(&case, &i, &outcome(), &mut ours).is_empty()
    };
    assert!(!differs(&|_| {}));
    assert!(differs(&|o| o.after.vec[3][1] ^= 4));
    assert!(differs(&|o| o.after.gpr[15] ^= 1));
    assert!(differs(&|o| o.after.rflags ^= 0x40));
    assert!(differs(&|o| o.after.significand[2] ^= 1));
    assert!(differs(&|o| o.data[4097] = 1));
    assert!(differs(&|o| o.vector = Some(13)));
}
