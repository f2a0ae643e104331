//! Several processors: what they may see of each other (guests/asm/litmus.S), on threads and in turns.

use crate::driver::{Temp, kvm, run};

/// What the guest prints when nothing forbidden was seen.
fn wanted(cpus: u32) -> String {
    let all = [
        (2, "sb"),
        (2, "sb mfence"),
        (2, "sb lock"),
        (2, "sb cpuid"),
        (2, "lb"),
        (2, "mp"),
        (4, "iriw"),
        (1, "count"),
        (1, "across"),
        (2, "remap"),
        (2, "shoot"),
        (2, "code"),
        (1, "own code"),
    ];
    all.iter().filter(|(least, _)| cpus >= *least).map(|(_, name)| format!("{name} ok\n")).collect()
}

/// 2 to the power of `rounds` times on so many processors.
fn litmus(accel: &str, cpus: u32, rounds: u32) {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::LITMUS);
    let (smp, how) = (cpus.to_string(), format!("{rounds}{cpus}"));
    let end = run([
        "-kernel",
        file.to_str().unwrap(),
        "-nographic",
        "-no-reboot",
        "-m",
        "16",
        "-accel",
        accel,
        "-smp",
        &smp,
        "-append",
        &how,
    ]);
    assert_eq!(end.success(), wanted(cpus), "-accel {accel} -smp {cpus}");
}

#[test]
fn order_locks_page_tables_and_code_on_threads_translated() {
    for (cpus, rounds) in [(1, 1), (2, 3), (3, 1), (4, 1)] {
        litmus("jit", cpus, rounds);
    }
}

#[test]
fn order_locks_page_tables_and_code_on_threads_interpreted() {
    for (cpus, rounds) in [(1, 1), (2, 3), (3, 1), (4, 1)] {
        litmus("interp", cpus, rounds);
    }
}

#[test]
fn order_locks_page_tables_and_code_in_turns() {
    for accel in ["jit,deterministic=on", "interp,deterministic=on", "jit,thread=single"] {
        for cpus in [2, 4] {
            litmus(accel, cpus, 0);
        }
    }
}

#[test]
fn the_hosts_processors_keep_the_same_rules() {
    if kvm("the_hosts_processors_keep_the_same_rules") {
        litmus("kvm", 2, 0);
    }
}
