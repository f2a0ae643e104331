//! The assembly guests, on each accelerator that can run them.

use crate::driver::{Run, Temp, kvm, limited, run};

const INTERP: &[&str] = &["-accel", "interp"];
const JIT: &[&str] = &["-accel", "jit"];
const DETERMINISTIC: &[&str] = &["-accel", "interp,deterministic=on"];
const KVM: &[&str] = &["-accel", "kvm"];

/// Runs a guest to its power-off and gives what it printed.
fn output(guest: &[u8], accel: &[&str], options: &[&str]) -> String {
    let dir = Temp::new();
    let file = dir.file("guest.elf", guest);
    let mut args = vec!["-kernel", file.to_str().unwrap(), "-nographic", "-no-reboot", "-m", "16"];
    args.extend(accel);
    args.extend(options);
    run(args).success()
}

const DEMO: &str = "\
Hello from the guest. Looking at PCI bus 0:
  device 00 is 8086:1237
  device 01 is 8086:7000
  device 04 is 1022:2000
Writing 2 bytes to port 0xc012.
The card says that it is 0x1003. Powering off.
";

#[test]
fn demo_finds_the_card_and_reads_its_identity() {
    for accel in [INTERP, DETERMINISTIC] {
        assert_eq!(output(hyaline_guests::DEMO, accel, &["-device", "pcnet,addr=4"]), DEMO);
    }
    if kvm("demo_finds_the_card_and_reads_its_identity") {
        for irqchip in ["split", "on", "off"] {
            let machine = format!("pc,kernel-irqchip={irqchip}");
            let options = ["-device", "pcnet,addr=4", "-M", &machine];
            assert_eq!(output(hyaline_guests::DEMO, KVM, &options), DEMO, "kernel-irqchip={irqchip}");
        }
    }
}

#[test]
fn demo_without_a_card_says_so() {
    let text = output(hyaline_guests::DEMO, INTERP, &[]);
    assert!(text.ends_with("No network card. Powering off.\n"), "{text}");
}

#[test]
fn all_processors_start() {
    for n in 1..=8u8 {
        let (smp, want) = (n.to_string(), format!("processors {n:02}\n"));
        let options = ["-smp", &smp, "-append", &smp];
        for accel in [INTERP, DETERMINISTIC] {
            assert_eq!(output(hyaline_guests::SMP, accel, &options), want);
        }
    }
    if kvm("all_processors_start") {
        for n in [1, 2, 4] {
            let (smp, want) = (n.to_string(), format!("processors {n:02}\n"));
            assert_eq!(output(hyaline_guests::SMP, KVM, &["-smp", &smp, "-append", &smp]), want);
        }
    }
}

/// Runs a guest on KVM with an instruction that some kernels' emulators lack, on hosts where KVM is software itself.
fn where_kvm_can(test: &str, guest: &[u8], want: &str) {
    if !kvm(test) {
        return;
    }
    let dir = Temp::new();
    let file = dir.file("guest.elf", guest);
    let end =
        run(["-kernel", file.to_str().unwrap(), "-nographic", "-no-reboot", "-m", "16", "-accel", "kvm"]);
    if end.err.contains("KVM internal error 1: emulation failure") {
        assert_eq!(end.code(), 1);
        assert!(end.err.contains("which begins with `"), "the instruction is named: {}", end.err);
        assert!(end.err.contains("Try without KVM: -accel interp"), "{}", end.err);
        let line = end.err.lines().find(|l| l.contains("which begins with")).unwrap_or("").trim();
        limited(test, &format_args!("this host's KVM can't emulate an instruction ({line})"));
        return;
    }
    assert_eq!(end.success(), want);
}

#[test]
fn timer_interrupts_come_through_both_controllers() {
    assert_eq!(output(hyaline_guests::INTERRUPTS, DETERMINISTIC, &[]), "pic 14 apic 14\n");
    // By the host's clock a late host gives a tick more before the guest looks; never fewer than it waits for.
    let text = output(hyaline_guests::INTERRUPTS, INTERP, &[]);
    let words: Vec<&str> = text.split_whitespace().collect();
    let ticks = |at: usize| words.get(at).and_then(|w| u32::from_str_radix(w, 16).ok()).unwrap_or(0);
    assert!(words.len() == 4 && ticks(1) >= 0x14 && ticks(3) >= 0x14, "{text}");
    where_kvm_can(
        "timer_interrupts_come_through_both_controllers",
        hyaline_guests::INTERRUPTS,
        "pic 14 apic 14\n",
    );
}

#[test]
fn an_x87_error_arrives_as_interrupt_13() {
    for accel in [INTERP, JIT, DETERMINISTIC] {
        assert_eq!(output(hyaline_guests::FPU_ERROR, accel, &[]), "interrupts 1 status 84\n", "{accel:?}");
    }
}

#[test]
fn a_timer_that_is_armed_while_a_processor_runs_fires_at_its_count() {
    for accel in ["interp,deterministic=on", "jit,deterministic=on"] {
        let text = output(hyaline_guests::DEADLINE, &["-accel", accel], &[]);
        let longest = text.trim().strip_prefix("longest ").and_then(|n| u64::from_str_radix(n, 16).ok());
        // 5000 ns, and the instructions before and behind the loop, 10 ns each.
        assert!(longest.is_some_and(|n| (5000..5200).contains(&n)), "{accel}: {text}");
    }
}

#[test]
fn translations_are_logged_with_guest_and_host_code() {
    let dir = Temp::new();
    let log = dir.text("log");
    let options = ["-accel", "jit,threshold=0", "-d", "out_asm", "-D", &log];
    assert!(output(hyaline_guests::INTERRUPTS, &options, &[]).starts_with("pic "));
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("cpu0: unit at 0x10") && text.contains(" instructions, "), "{text}");
    // An instruction of the guest, and some of the host's below.
    let unit = text.split("unit at").find(|unit| unit.contains("sti")).unwrap();
    assert!(unit.contains("\n  guest 0x") && unit.contains("\n  host  0x"), "{unit}");
}

#[test]
fn long_mode_with_vectors_and_a_page_fault() {
    let want = "long mode, sum 0x0000002a, fault at 0xdead0000\n";
    for accel in [INTERP, DETERMINISTIC] {
        assert_eq!(output(hyaline_guests::LONGMODE, accel, &[]), want);
    }
    where_kvm_can("long_mode_with_vectors_and_a_page_fault", hyaline_guests::LONGMODE, want);
}

#[test]
fn multiboot_modules_and_command_line() {
    let dir = Temp::new();
    let kernel = dir.file("kernel.elf", hyaline_guests::MODULES);
    let first = dir.file("first.txt", b"the first module\nand more");
    let second = dir.file("second", &[b'x'; 5000]);
    let (kernel, first, second) =
        (kernel.to_str().unwrap(), first.to_str().unwrap(), second.to_str().unwrap());
    let list = format!("{first} with arguments,{second}");
    let want = format!(
        "command line: {kernel} hello there\nmodule {first} with arguments: the first module\nmodule {second}: {}\n",
        "x".repeat(5000)
    );
    let mut accels = vec!["interp"];
    if kvm("multiboot_modules_and_command_line") {
        accels.push("kvm");
    }
    for accel in accels {
        let args =
            ["-kernel", kernel, "-initrd", &list, "-append", "hello there", "-nographic", "-accel", accel];
        assert_eq!(run(args).success(), want, "{accel}");
    }
}

#[test]
fn deterministic_runs_are_the_same_to_the_last_access() {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::INTERRUPTS);
    let log = |n: usize| -> Vec<Vec<String>> {
        let log = dir.path(&format!("log{n}"));
        let mut args =
            vec!["-kernel", file.to_str().unwrap(), "-nographic", "-accel", "interp,deterministic=on"];
        args.extend(["-d", "int,access,in_asm", "-D", log.to_str().unwrap()]);
        assert_eq!(run(args).success(), "pic 14 apic 14\n");
        // All but how long the host took for an access: the last column but one.
        let text = std::fs::read_to_string(log).unwrap();
        let timed = |w: &&str| {
            let number = ["ns", "us", "ms"].iter().find_map(|unit| w.strip_suffix(unit));
            number.is_some_and(|n| n.parse::<u64>().is_ok())
        };
        text.lines()
            .map(|l| l.split_whitespace().filter(|w| !timed(w)).map(str::to_string).collect())
            .collect()
    };
    let (first, second) = (log(0), log(1));
    assert!(first.len() > 500, "the logs are not empty: {} lines", first.len());
    let differ = first.iter().zip(&second).find(|(a, b)| a != b);
    assert!(differ.is_none() && first.len() == second.len(), "two deterministic runs differ: {differ:?}");
}

#[test]
fn what_is_typed_arrives() {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::COUNT);
    let mut accels = vec!["interp", "interp,deterministic=on"];
    if kvm("what_is_typed_arrives") {
        accels.push("kvm");
    }
    for accel in accels {
        let mut guest = Run::start(["-kernel", file.to_str().unwrap(), "-nographic", "-accel", accel]);
        guest.wait_for("ready\n");
        // More at once than the 16 bytes of the FIFO.
        let text = "abcdefghijklmnoprstuvwxyzABCDEFGHIJKLMNOP";
        guest.send(text);
        for (i, c) in text.chars().enumerate() {
            guest.wait_for(&format!("{:02x} {c}\n", i + 1));
        }
        guest.send("q");
        guest.end().success();
    }
}

#[test]
fn the_program_without_arguments_is_the_demonstration() {
    let with_kvm = kvm("the_program_without_arguments_is_the_demonstration");
    let end = run::<&str>([]);
    let text = end.success();
    let mut parts = vec![
        "guest | Writing 2 bytes to port 0xc012.",
        "PATH OF THE ACCESS",
        "OUT of 2 bytes, port 0xc012 (49170)",
        "register RAP: Register address port",
        "In all: ",
        "What to try next:",
        "hyaline demo linux",
    ];
    if with_kvm {
        // "The same small guest on the software CPU and on KVM gives the same access log."
        parts.extend([
            "The same guest on KVM, through the same devices:",
            "Both access logs compared: ",
            "all are the same",
        ]);
    }
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}
