//! Saved machines go on elsewhere; files that are no good are refused with a reason.

use crate::driver::{Run, Temp, initrd, kernel, kvm, run};
use hyaline_fetch::Kernel;

const MEMORY: &str = "16";

/// A machine with the guest that counts what is typed.
fn count(dir: &Temp, accel: &str, more: &[&str]) -> Run {
    let file = dir.text("guest.elf");
    std::fs::write(&file, hyaline_guests::COUNT).unwrap();
    let mut args = vec!["-kernel", &file, "-nographic", "-m", MEMORY, "-accel", accel];
    args.extend(more);
    Run::start(args)
}

/// Counts to three and saves into `state`.
fn save(dir: &Temp, accel: &str) -> String {
    let state = dir.text("state");
    let mut guest = count(dir, accel, &["-save-at-exit", &state]);
    guest.wait_for("ready\n");
    guest.send("abc");
    guest.wait_for("03 c\n");
    guest.send("\x01x");
    let end = guest.end();
    assert_eq!((end.code(), end.err.as_str()), (0, ""), "{accel}");
    state
}

#[test]
fn a_small_guest_goes_on_under_every_accelerator() {
    let mut accels = vec!["interp", "interp,deterministic=on"];
    if kvm("a_small_guest_goes_on_under_every_accelerator") {
        accels.push("kvm");
    }
    for from in &accels {
        let dir = Temp::new();
        let state = save(&dir, from);
        for to in &accels {
            let again = dir.text("again");
            let mut guest = count(&dir, to, &["-restore", &state, "-save-at-exit", &again]);
            guest.send("d");
            guest.wait_for("04 d\n");
            guest.send("\x01x");
            let end = guest.end();
            assert_eq!((end.code(), end.out.as_str()), (0, "04 d\n"), "{from} to {to}: {}", end.err);
            // And once more.
            let mut guest = count(&dir, from, &["-restore", &again]);
            guest.send("e");
            guest.wait_for("05 e\n");
            guest.send("q");
            guest.end().success();
        }
    }
}

#[test]
fn linux_goes_on_where_it_was() {
    let test = "linux_goes_on_where_it_was";
    let dir = Temp::new();
    let (Some(image), Some(initrd)) =
        (kernel(test, Kernel::Cloud), initrd(test, &dir, "setsid cttyhack sh\npoweroff -f"))
    else {
        return;
    };
    let state = dir.text("state");
    let mut args = vec!["-kernel", image.to_str().unwrap(), "-initrd", initrd.to_str().unwrap(), "-smp", "2"];
    args.extend(["-append", "console=ttyS0 quiet", "-m", "256", "-nographic", "-no-reboot"]);
    let mut guest = Run::start(args.iter().chain(&["-save-at-exit", &state]));
    guest.wait_for("~ # ");
    guest.send("x=4711; echo $x > /tmp/file; (sleep 1; echo slept > /tmp/slept) &\n");
    guest.wait_for("~ # ");
    guest.send("\x01x");
    assert_eq!(guest.end().code(), 0);

    let mut guest = Run::start(args.iter().chain(&["-restore", &state]));
    guest.send("echo still $x and $(cat /tmp/file)\n");
    guest.wait_for("still 4711 and 4711\r\n");
    // The timer that ran when it was saved, interrupts on both processors, and time that goes on.
    guest.send("wait; cat /tmp/slept; nproc; sleep 1 && echo a''wake\n");
    guest.wait_for("\nslept\r\n2\r\n");
    guest.wait_for("awake\r\n");
    guest.send("dmesg | grep -c -e 'BUG:' -e 'Call Trace' -e stall\n");
    guest.wait_for("\n0\r\n");
    guest.send("poweroff -f\n");
    guest.end().success();
}

#[test]
fn bad_state_files_are_refused_with_a_reason() {
    let dir = Temp::new();
    let state = save(&dir, "interp");
    let good = std::fs::read(&state).unwrap();
    let bad = dir.text("bad");
    let restore = |content: &[u8], more: &[&str]| {
        std::fs::write(&bad, content).unwrap();
        let mut args = vec!["-kernel", "", "-nographic", "-m", MEMORY, "-restore", &bad];
        let kernel = dir.text("guest.elf");
        args[1] = &kernel;
        args.extend(more);
        let end = run(args);
        assert_eq!((end.code(), end.out.as_str()), (1, ""), "{}", end.err);
        let text =
            end.err.strip_prefix(&format!("hyaline: {bad}: ")).unwrap_or_else(|| panic!("{}", end.err));
        assert_eq!(text.lines().count(), 1, "{text}");
        text.trim_end().to_string()
    };
    // Foreign.
    let foreign = "no saved state of Hyaline (its first line is wrong)";
    assert_eq!(restore(b"", &[]), foreign);
    assert_eq!(restore(b"\x7fELF and so on and so on", &[]), foreign);
    let version = restore(b"HYALINE STATE 9\nmore", &[]);
    assert_eq!(version, "a saved state of another version; this program reads version 1");
    // Cut.
    for len in [16, 17, 20, 30, 100, 1000, good.len() / 2, good.len() - 1] {
        let text = restore(&good[..len], &[]);
        assert!(text.contains(": a truncated copy?"), "{len}: {text}");
    }
    // A flipped bit anywhere.
    let step = good.len() / 40;
    for at in (16..good.len()).step_by(step) {
        let mut data = good.clone();
        data[at] ^= 1 << (at % 8);
        let text = restore(&data, &[]);
        assert!(text.contains("damaged") || text.contains("truncated"), "{at}: {text}");
    }
    // Another machine.
    assert_eq!(restore(&good, &["-m", "32"]), "saved from a machine with 16 MiB; start this one with -m 16");
    assert_eq!(
        restore(&good, &["-smp", "2"]),
        "saved from a machine with 1 processors; start this one with -smp 1"
    );
    let text = restore(&good, &["-device", "pcnet"]);
    assert_eq!(
        text,
        "this machine has a device `pcnet` that the saved one lacks; start with the same options as then"
    );
}

#[test]
fn an_old_state_survives_when_the_new_one_cannot_be_saved() {
    let dir = Temp::new();
    let state = save(&dir, "interp");
    let good = std::fs::read(&state).unwrap();
    // A folder where the new file would be written before it replaces the old one.
    std::fs::create_dir(dir.path("state.part")).unwrap();
    let mut guest = count(&dir, "interp", &["-save-at-exit", &state]);
    let _ = guest.try_send("q");
    let end = guest.end();
    assert_eq!(end.code(), 1);
    assert!(
        end.err.starts_with(&format!("hyaline: {state}: the state can't be saved there: ")),
        "{}",
        end.err
    );
    assert_eq!(std::fs::read(&state).unwrap(), good);
}
