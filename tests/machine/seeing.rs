//! Reports, traces, profiles and questions to a running machine, as a user gets them.

use crate::driver::{End, Run, Temp, initrd, kernel, kvm, run};
use crate::terminal::Terminal;
use hyaline_fetch::Kernel;
use rustix::process::Signal;
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A guest that uses the network card and ends by itself.
fn demo(dir: &Temp, more: &[&str]) -> End {
    let kernel = dir.text("demo.elf");
    std::fs::write(&kernel, hyaline_guests::DEMO).unwrap();
    let mut args = vec!["-kernel", &kernel, "-nographic", "-accel", "interp", "-device", "pcnet,id=net0"];
    let folder = dir.text("");
    args.extend(["-crash-dir", &folder]);
    args.extend(more);
    run(args)
}

/// The guest that counts what is typed, with reports in `dir`.
fn count(dir: &Temp, more: &[&str]) -> Run {
    let kernel = dir.text("count.elf");
    std::fs::write(&kernel, hyaline_guests::COUNT).unwrap();
    let folder = dir.text("");
    let mut args = vec!["-kernel", &kernel, "-nographic", "-crash-dir", &folder];
    args.extend(more);
    Run::start(args)
}

fn reports(dir: &Temp) -> Vec<PathBuf> {
    let all = std::fs::read_dir(dir.path("")).unwrap().flatten().map(|f| f.path());
    let mut all: Vec<_> = all.filter(|p| p.to_string_lossy().contains("hyaline-crash-")).collect();
    all.sort();
    all
}

fn records(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// What `hyaline explain` says of a report, as text and as data.
fn explained(file: &Path) -> (String, Value) {
    let file = file.to_str().unwrap();
    let json = serde_json::from_str(&run(["explain", "--json", file]).success()).unwrap();
    (run(["explain", file]).success(), json)
}

#[track_caller]
fn holds(text: &str, wanted: &[&str]) {
    for want in wanted {
        assert!(text.contains(want), "`{want}` is not in:\n{text}");
    }
}

#[test]
fn a_device_panic_is_contained_or_ends_the_machine_or_aborts() {
    for (policy, ram) in [("disable", false), ("stop", true), ("abort", false)] {
        let dir = Temp::new();
        let mut args = vec!["-inject", "panic:net0.RAP", "-on-device-panic", policy];
        if ram {
            args.push("-crash-with-ram");
        }
        let end = demo(&dir, &args);
        match policy {
            "disable" => assert_eq!(end.code(), 0, "{}", end.err),
            "stop" => assert_eq!(end.code(), 1, "{}", end.err),
            _ => assert_eq!(end.status.signal(), Some(Signal::ABORT.as_raw()), "{}", end.err),
        }
        holds(
            &end.err,
            &[
                "device 'net0' (AMD Am79C970A PCnet-PCI II Ethernet controller) panicked while handling a guest's write\r\n",
                "guest OUT 2 bytes 0x0058 at port 0xc012 (49170) -> net0.io+12 RAP",
                &format!("(-on-device-panic {policy})"),
                if ram { "(it contains guest RAM)" } else { "(it contains no guest RAM)" },
            ],
        );
        assert!(end.err.lines().count() <= 12, "a dozen lines:\n{}", end.err);
        let files = reports(&dir);
        assert_eq!(files.len(), 1, "{policy}");
        let all = records(&files[0]);
        assert_eq!(all.iter().any(|r| r["type"] == "ram"), ram);
        assert_eq!(all.last().unwrap()["type"], "end");
        let (text, json) = explained(&files[0]);
        holds(
            &text,
            &[
                "a device model panicked (device-panic)",
                "write 2 bytes at port 0xc012 (49170) -> net0+0x12 \"RAP\" value 0x58 (88)",
                "Its region starts at 0xc000 (49152) (computed: 49170 - 18)",
                "REGISTERS OF net0",
                "explain --replay-test",
            ],
        );
        let a = &json["accesses"][0];
        assert_eq!(
            (a["space"].as_str(), a["dir"].as_str(), a["addr"].as_u64(), a["size"].as_u64()),
            (Some("pio"), Some("write"), Some(0xc012), Some(2))
        );
        assert_eq!((a["region_base"].as_u64(), a["register"]["name"].as_str()), (Some(0xc000), Some("RAP")));
        assert_eq!(
            (json["verdict"].as_str(), json["actor"]["thread"].as_str()),
            (Some("explained"), Some("vcpu"))
        );
        assert_eq!(json["end"]["kind"], "panic");
        assert_eq!(json["findings"][0]["class"], "guest-reachable-assert");
    }
}

#[test]
fn a_handler_that_hangs_is_reported_with_the_threads() {
    let dir = Temp::new();
    let end = demo(&dir, &["-inject", "hang:net0.RAP"]);
    assert_eq!(end.code(), 0, "the handler came back after 3 seconds: {}", end.err);
    holds(&end.err, &["'net0' (AMD Am79C970A", "without an end", "-> net0.io+12 RAP"]);
    let (text, json) = explained(&reports(&dir)[0]);
    holds(
        &text,
        &[
            "a register handler does not come back (hang)",
            "DEVICES AT WORK\n  net0: in a call, by vCPU 0: write of RAP",
            "THREADS OF THE PROGRAM",
            "watchdog: R (runs)",
            "WHAT CAN'T BE TOLD\n  The processors' states",
        ],
    );
    assert_eq!(
        (json["end"]["kind"].as_str(), json["findings"][0]["class"].as_str()),
        (Some("hang"), Some("lock-or-hang"))
    );
    assert_eq!(json["accesses"][0]["register"]["name"], "RAP");
}

#[test]
fn a_triple_fault_is_told_once_and_explained() {
    let dir = Temp::new();
    let kernel = dir.file("guest.elf", hyaline_guests::TRIPLE_FAULT);
    let folder = dir.text("");
    let mut accels = vec!["interp", "jit"];
    if kvm("a_triple_fault_is_told_once_and_explained") {
        accels.push("kvm");
    }
    for (n, accel) in accels.iter().enumerate() {
        let end = run([
            "-kernel",
            kernel.to_str().unwrap(),
            "-nographic",
            "-no-reboot",
            "-accel",
            accel,
            "-crash-dir",
            &folder,
        ]);
        assert_eq!(end.err.matches("shut down after a triple fault").count(), 1, "{accel}: {}", end.err);
        assert_eq!(end.err.matches("RIP=").count(), 1, "{accel}: {}", end.err);
        let files = reports(&dir);
        assert_eq!(files.len(), n + 1, "{accel}");
        let newest = files.iter().max_by_key(|f| std::fs::metadata(f).unwrap().modified().unwrap()).unwrap();
        let (text, json) = explained(newest);
        holds(
            &text,
            &[
                "(triple-fault)",
                "in 32-bit protected mode",
                "with -d int",
                "THE GUEST'S CONSOLE ENDED WITH\n  | dividing by zero",
            ],
        );
        assert!(text.contains(&format!("Accelerator: {accel}.")), "{text}");
        assert_eq!(
            (json["end"]["kind"].as_str(), json["who"].as_str()),
            (Some("triple-fault"), Some("The guest's kernel only."))
        );
    }
}

#[test]
fn a_report_on_demand_and_the_guest_goes_on() {
    let dir = Temp::new();
    let mut guest = count(&dir, &["-accel", "interp"]);
    guest.wait_for("ready\n");
    guest.signal(Signal::QUIT);
    guest.err.wait_for("next: hyaline explain ", 0);
    guest.send("aq");
    let end = guest.end();
    assert_eq!((end.code(), end.out.as_str()), (0, "ready\n01 a\n"));
    let (text, json) = explained(&reports(&dir)[0]);
    holds(
        &text,
        &[
            "nothing went wrong (request)",
            "ACCESSES TO DEVICES",
            "\"LSR\"",
            "THREADS OF THE PROGRAM",
            "  | ready",
        ],
    );
    assert_eq!(
        (json["end"]["kind"].as_str(), json["accesses"].as_array().map(Vec::len)),
        (Some("request"), Some(0))
    );
}

/// What KVM reports when it can't go on depends on the host's kernel; the report is made by the same code here.
#[test]
fn a_kvm_error_is_reported_and_explained() {
    let dir = Temp::new();
    let config = hyaline_machine::config::Config {
        accels: vec![hyaline_machine::config::Accel::Interp],
        memory: 16 << 20,
        images: hyaline_machine::load::Images { builtin: Some(hyaline_guests::COUNT), ..Default::default() },
        serials: vec![Some("null".parse().unwrap())],
        crash_dir: Some(dir.path("")),
        ..Default::default()
    };
    let mut machine = hyaline_machine::Machine::new(config).unwrap();
    let why = "processor 0: KVM internal error 1: emulation failure at 0xd0000000, instruction bytes 0f 0b";
    let said = machine.report(&hyaline_machine::report::Cause::KvmError(why.into()));
    holds(&said, &["KVM can't go on", "emulation failure at 0xd0000000", "processor 0 is at"]);
    let (text, json) = explained(&reports(&dir)[0]);
    holds(&text, &["(kvm-internal-error)", "instruction bytes 0f 0b", "-accel interp", "dmesg"]);
    assert_eq!(json["end"]["kind"], "kvm-internal-error");
}

/// The test that `explain --replay-test` makes of this report is in the repository, is compiled, and runs with the devices' tests.
#[test]
fn the_last_accesses_become_the_test_that_is_kept() {
    let dir = Temp::new();
    let mut guest = count(
        &dir,
        &["-accel", "interp,deterministic=on", "-inject", "panic:serial0.SCR", "-on-device-panic", "stop"],
    );
    guest.close_input();
    assert_eq!(guest.end().code(), 1);
    let report = reports(&dir).remove(0);
    let made = run(["explain", "--replay-test", report.to_str().unwrap()]).success();
    let kept = include_str!("../../crates/devices/tests/replay_report.rs");
    assert_eq!(
        made.trim(),
        kept.trim(),
        "write the new text into crates/devices/tests/replay_report.rs if the guest or the report changed"
    );
}

#[test]
fn a_trace_as_json_lines_and_on_a_full_disk() {
    let dir = Temp::new();
    let file = dir.text("trace.jsonl");
    let end = demo(&dir, &["-trace", &format!("all,file={file},format=jsonl")]);
    assert_eq!(end.code(), 0, "{}", end.err);
    let lines = records(&PathBuf::from(&file));
    assert!(lines.len() > 400, "{}", lines.len());
    let mut before = 0;
    for l in &lines {
        let seq = l["seq"].as_u64().unwrap();
        assert!(
            seq > before
                && l["addr"].is_u64()
                && l["size"].is_u64()
                && l["exit"].is_string()
                && l["outcome"].is_string(),
            "{l}"
        );
        before = seq;
    }
    assert!(lines.iter().any(|l| l["owner"] == "net0"
        && l["register"] == "RAP"
        && l["addr"] == 0xc012
        && l["write"] == true));
    // QEMU's names give the same lines.
    let other = dir.text("qemu.jsonl");
    let end = demo(&dir, &["-trace", &format!("memory_region_ops_write,file={other},format=jsonl,dev:net0")]);
    assert_eq!(end.code(), 0, "{}", end.err);
    let theirs = records(&PathBuf::from(&other));
    let ours = lines
        .iter()
        .filter(|l| l["owner"] == "net0" && l["write"] == true && l["space"] != "pci-config")
        .count();
    assert_eq!(theirs.iter().filter(|l| l["space"] != "pci-config").count(), ours);
    // A full disk: said once, the guest goes on.
    let end = demo(&dir, &["-trace", "all,file=/dev/full"]);
    assert_eq!((end.code(), end.err.matches("No space left on device").count()), (0, 1), "{}", end.err);
    assert!(end.err.contains("the guest goes on"), "{}", end.err);
}

/// Questions of the control socket, while the guest runs and while gdb's user keeps it stopped.
#[test]
fn a_running_machine_answers() {
    let dir = Temp::new();
    let (socket, trace) = (dir.text("s"), dir.text("trace"));
    let at = format!("unix:{socket}");
    for stopped in [false, true] {
        let mut options = vec!["-accel", "interp", "-control", &at];
        if stopped {
            options.extend(["-S", "-gdb", "tcp::0"]);
        }
        let mut guest = count(&dir, &options);
        if stopped {
            let until = Instant::now() + Duration::from_secs(60);
            while !dir.path("s").exists() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
        } else {
            guest.wait_for("ready\n");
        }
        let ctl = |words: &str| run(["ctl", &socket].into_iter().chain(words.split(' ')));
        holds(&ctl("reg com1.lsr").success(), &["serial0 +05 LSR", "THRE"]);
        holds(
            &ctl("map why io:0x3f9").success(),
            &["flat range 0x3f8..=0x3ff is /io/ports", "register IER of serial0"],
        );
        holds(&ctl("map").success(), &["address-space: memory", "owner:serial0", "FlatView of io"]);
        let map: Value = serde_json::from_str(&ctl("map --json").success()).unwrap();
        assert_eq!((map["schema"].as_u64(), map["spaces"].as_array().map(Vec::len)), (Some(1), Some(3)));
        holds(&ctl("why-no-irq 4").success(), &["it stops at:"]);
        let wrong = ctl("reg com1.lsrr");
        assert_eq!((wrong.code(), wrong.err.contains("LSR")), (1, true), "{}", wrong.err);
        assert!(ctl("rbreak reg com1.lsr").err.contains("gdb"));
        if !stopped {
            holds(&ctl(&format!("trace on reg:serial0.SCR,file={trace}")).success(), &["tracing to"]);
            guest.send("ab");
            guest.wait_for("02 b\n");
            holds(&ctl("trace off").success(), &["1 traces ended"]);
            let lines = std::fs::read_to_string(&trace).unwrap();
            assert_eq!(
                lines.matches(" SCR ").count(),
                4,
                "two characters, a read and a write each:\n{lines}"
            );
            holds(&ctl("last reg serial0.LSR").success(), &["pio.in", "LSR"]);
            let once = run(["top", &socket, "--once", "--interval", "0.3"]).success();
            holds(&once, &["processor 0: runs at", "serial0.ports LSR", "interrupt lines that are high"]);
        }
        holds(&ctl("report").success(), &["a report is being written"]);
        guest.err.wait_for("next: hyaline explain ", 0);
        ctl("quit").success();
        assert_eq!(guest.end().code(), 0, "stopped: {stopped}");
    }
    assert_eq!(run(["ctl", &socket, "reg", "com1.lsr"]).code(), 1, "the machine is gone");
}

/// `hyaline top` on a terminal: it draws, `q` ends it, the terminal is as before.
#[test]
fn top_on_a_terminal() {
    let dir = Temp::new();
    let socket = dir.text("s");
    let at = format!("unix:{socket}");
    let mut guest = count(&dir, &["-accel", "interp", "-control", &at]);
    guest.wait_for("ready\n");
    let mut terminal = Terminal::new();
    terminal.size(100, 30);
    let before = terminal.settings();
    let output = terminal.output();
    let top = terminal.start(&["top", &socket, "--interval", "0.2"]);
    // Words, because it moves the cursor between them.
    for want in ["interp", "registers", "serial0.ports", "LSR", "processor"] {
        output.wait_for(want, 0);
    }
    assert!(!crate::terminal::same(&terminal.settings(), &before), "raw while it runs");
    terminal.type_in("q");
    assert_eq!(top.end().code(), 0);
    assert!(crate::terminal::same(&terminal.settings(), &before));
    // The machine ends while it is watched.
    let top = terminal.start(&["top", &socket, "--interval", "0.2"]);
    std::thread::sleep(Duration::from_millis(500));
    guest.send("q");
    let end = top.end();
    assert_eq!((end.code(), end.err.contains("the machine")), (1, true), "{}", end.err);
    guest.end().success();
}

/// A Linux boot's profile: shares, functions with their callers by the kernel's own tables, and all forms of file.
#[test]
fn a_profile_of_a_boot() {
    let test = "a_profile_of_a_boot";
    let dir = Temp::new();
    let (Some(image), Some(initrd)) = (
        kernel(test, Kernel::Cloud),
        initrd(test, &dir, "for i in 1 2 3; do md5sum /bin/busybox; done; sleep 1\npoweroff -f"),
    ) else {
        return;
    };
    let files = ["p.html", "p.svg", "p.folded", "p.json"].map(|f| dir.text(f));
    let mut args = vec![
        "profile", "--html", &files[0], "--svg", &files[1], "--folded", &files[2], "--chrome", &files[3],
        "--",
    ];
    args.extend(["-kernel", image.to_str().unwrap(), "-initrd", initrd.to_str().unwrap(), "-accel", "jit"]);
    args.extend(["-append", "console=ttyS0", "-m", "512", "-nographic", "-no-reboot"]);
    let text = run(args).success();
    holds(
        &text,
        &[
            "% (measured), waiting ",
            "serial0.THR ",
            "io_serial_out 100 %",
            "the kernel's unwinding tables",
            "polls its serial port",
        ],
    );
    let folded = std::fs::read_to_string(&files[2]).unwrap();
    let deep = folded.lines().any(|l| l.starts_with("[guest];start_kernel;") && l.matches(';').count() >= 4);
    assert!(
        deep && folded.contains("[waiting] ") && folded.contains("io_serial_out;pio.out;serial0;THR "),
        "{folded}"
    );
    let chrome: Value = serde_json::from_str(&std::fs::read_to_string(&files[3]).unwrap()).unwrap();
    assert!(chrome["traceEvents"].as_array().unwrap().len() > 10_000);
    assert!(std::fs::read_to_string(&files[1]).unwrap().starts_with("<svg"));
    assert!(std::fs::read_to_string(&files[0]).unwrap().contains("kthread"));
}

/// Debian's gdb drives a boot by the kernel's names, which the kernel itself gave.
#[test]
fn gdb_drives_a_boot_by_name() {
    let test = "gdb_drives_a_boot_by_name";
    let dir = Temp::new();
    let (Some(image), Some(initrd)) =
        (kernel(test, Kernel::Cloud), initrd(test, &dir, "echo up $((40 + 2))\npoweroff -f"))
    else {
        return;
    };
    let image = image.to_str().unwrap();
    let symbols = dir.text("vmlinux.sym");
    let said = run(["symbols", image, &symbols]).success();
    holds(&said, &["symbols from the kernel's own tables", "KASLR offset 0x0"]);
    for accel in ["interp", "jit"] {
        let socket = dir.text(accel);
        let address = format!("unix:{socket}");
        let lcr = dir.text("lcr");
        let mut args = vec![
            "-kernel",
            image,
            "-initrd",
            initrd.to_str().unwrap(),
            "-accel",
            accel,
            "-S",
            "-gdb",
            &address,
        ];
        args.extend(["-append", "console=ttyS0 quiet nokaslr", "-m", "512", "-nographic", "-no-reboot"]);
        let guest = Run::start(args);
        let until = Instant::now() + Duration::from_secs(60);
        while !dir.path(accel).exists() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let commands = [
            "set pagination off".to_string(),
            "set confirm off".into(),
            format!("symbol-file {symbols}"),
            format!("target remote {socket}"),
            "break *start_kernel".into(),
            "continue".into(),
            "info symbol $pc".into(),
            "stepi".into(),
            "stepi".into(),
            "watch *(long *)&jiffies".into(),
            "continue".into(),
            "continue".into(),
            "info symbol $pc".into(),
            "delete".into(),
            "monitor rbreak reg com1.ier write when value&2".into(),
            "continue".into(),
            "monitor explain".into(),
            "monitor reg com1.lsr".into(),
            "monitor last reg com1.ier".into(),
            "monitor why-no-irq 4".into(),
            "monitor info mtree -f".into(),
            "monitor rbreak delete all".into(),
            format!("monitor trace on reg:serial0.LCR,file={lcr}"),
            "monitor trace off".into(),
            "monitor phys 0xf0000 16".into(),
            "monitor symbol start_kernel".into(),
            "hbreak *__x64_sys_reboot".into(),
            "continue".into(),
            "info symbol $pc".into(),
            "delete".into(),
            "detach".into(),
        ];
        let mut gdb = std::process::Command::new("timeout");
        gdb.args(["300", "gdb", "-batch", "-nx"]);
        commands.iter().for_each(|c| {
            gdb.args(["-ex", c]);
        });
        let out = match gdb.output() {
            Ok(out) => {
                String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
            }
            Err(e) => return crate::driver::skipped(test, &format_args!("gdb: {e}")),
        };
        for want in [
            "Breakpoint 1, 0x",
            "in start_kernel ()",
            "start_kernel in section .init.text",
            "New value = 4294892297",
            "New value = 4294892298",
            "do_timer + ",
            "Break 1: writes to serial0.IER when the value has a bit of 0x2",
            "register IER: Interrupt enable",
            "serial0 +05 LSR",
            "it stops at:",
            "FlatView of io",
            "1 traces ended",
            "is start_kernel (",
            "__x64_sys_reboot in section .text",
            "[Inferior 1 (process 1) detached]",
        ] {
            assert!(out.contains(want), "{accel}: `{want}` is not in:\n{out}");
        }
        // Steps stay out of interrupt handlers: the second is in what the first called.
        let at = out.find("start_kernel in section").unwrap();
        assert!(out[at..].contains("__fentry__") || out[at..].contains("start_kernel+"), "{accel}: {out}");
        let end = guest.end();
        assert_eq!(end.code(), 0, "{accel}: {}", end.err);
        assert!(end.out.contains("up 42"), "{accel}: {}", end.out);
    }
}
