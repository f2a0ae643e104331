//! Several processors: what they may see of each other (guests/asm/litmus.S), on threads and in turns.

use crate::driver::{End, Run, Temp, kvm, limited, run};

/// What the guest prints when nothing forbidden was seen.
fn wanted(cpus: u32) -> String {
    let all = [
        (2, "sb"),
        (2, "sb mfence"),
        (2, "sb lock"),
        (2, "sb cpuid"),
        (2, "lb"),
        (2, "mp"),
        (2, "mp page"),
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
fn started(accel: &str, cpus: u32, rounds: u32) -> End {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::LITMUS);
    let (smp, how) = (cpus.to_string(), format!("{rounds}{cpus}"));
    let mut args = vec!["-kernel", file.to_str().unwrap(), "-nographic", "-no-reboot", "-m", "16"];
    args.extend(["-accel", accel, "-smp", &smp, "-append", &how]);
    run(args)
}

fn litmus(accel: &str, cpus: u32, rounds: u32) {
    assert_eq!(started(accel, cpus, rounds).success(), wanted(cpus), "-accel {accel} -smp {cpus}");
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
    let test = "the_hosts_processors_keep_the_same_rules";
    if !kvm(test) {
        return;
    }
    let end = started("kvm", 2, 0);
    if end.err.contains("which begins with `lock cmpxchg16b") {
        // A KVM that is software itself; what comes before it works.
        assert!(end.out.ends_with("mp page ok\n"), "{}", end.out);
        limited(test, &"this host's KVM can't emulate lock cmpxchg16b");
        return;
    }
    assert_eq!(end.success(), wanted(2));
}

/// Names of the program's threads that run processors, sorted.
fn vcpu_threads(guest: &Run) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.id())).unwrap();
    let names = tasks.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok());
    let mut names: Vec<String> =
        names.map(|n| n.trim().to_string()).filter(|n| n.starts_with("vcpu")).collect();
    names.sort();
    names
}

#[test]
fn each_processor_has_a_thread_and_translates_by_default() {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::COUNT);
    let threads = |accel: &[&str], count: usize| {
        let mut args = vec!["-kernel", file.to_str().unwrap(), "-nographic", "-smp", "3"];
        args.extend(accel);
        let mut guest = Run::start(args);
        guest.wait_for("ready\n");
        // The first one may have printed before the last one was started.
        let mut threads = vcpu_threads(&guest);
        for _ in 0..3000 {
            if threads.len() < count {
                std::thread::sleep(std::time::Duration::from_millis(10));
                threads = vcpu_threads(&guest);
            }
        }
        guest.send("q");
        guest.end().success();
        threads
    };
    for accel in [&[][..], &["-accel", "jit"], &["-accel", "tcg,thread=multi,tb-size=32"]] {
        assert_eq!(threads(accel, 3), ["vcpu0/jit", "vcpu1/jit", "vcpu2/jit"], "{accel:?}");
    }
    assert_eq!(threads(&["-accel", "interp"], 3), ["vcpu0/interp", "vcpu1/interp", "vcpu2/interp"]);
    assert!(threads(&["-accel", "jit,deterministic=on"], 0).is_empty(), "in turns on the main thread");
    assert!(threads(&["-accel", "jit,thread=single,cache=8M,tier=1"], 0).is_empty());
}

#[test]
fn counted_runs_of_several_processors_end_in_the_same_state() {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::LITMUS);
    for how in [
        ["-accel", "jit,deterministic=on"],
        ["-accel", "interp,deterministic=on"],
        ["-icount", "3,sleep=off"],
    ] {
        let states: Vec<Vec<u8>> = (0..2)
            .map(|n| {
                let state = dir.path(&format!("state{n}"));
                let mut args =
                    vec!["-kernel", file.to_str().unwrap(), "-nographic", "-no-reboot", "-m", "16"];
                args.extend(["-smp", "2", "-append", "02", "-save-at-exit", state.to_str().unwrap()]);
                args.extend(how);
                assert_eq!(run(args).success(), wanted(2));
                std::fs::read(state).unwrap()
            })
            .collect();
        assert!(states[0].len() > 100_000, "{} bytes", states[0].len());
        assert!(states[0] == states[1], "{how:?}: two runs end in different states");
    }
}
