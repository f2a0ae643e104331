//! Whole machines in lockstep: the tiers are equal, a planted defect is found at its instruction.

use hyaline_fetch::{Cache, Kernel, initramfs};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder that goes away.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Temp {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("hyaline-lockstep-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Temp(dir)
    }
    fn file(&self, name: &str, data: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, data).unwrap();
        path.to_str().unwrap().to_string()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the program: exit code and standard output.
fn lockstep(options: &[&str], machine: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hyaline-lockstep"));
    let out = command.args(options).arg("--").args(machine).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.code(), text + &String::from_utf8_lossy(&out.stderr))
}

fn equal(options: &[&str], machine: &[&str]) -> String {
    let (code, text) = lockstep(options, machine);
    assert!(code == Some(0) && text.contains("equal: "), "{options:?} {machine:?}: {text}");
    text
}

#[test]
fn small_guests_are_equal_to_their_power_off() {
    let dir = Temp::new();
    let guests: [(&str, &[u8], &[&str]); 5] = [
        ("interrupts", hyaline_guests::INTERRUPTS, &[]),
        ("deadline", hyaline_guests::DEADLINE, &[]),
        ("longmode", hyaline_guests::LONGMODE, &[]),
        ("smp", hyaline_guests::SMP, &["-smp", "4", "-append", "4"]),
        ("demo", hyaline_guests::DEMO, &["-device", "pcnet"]),
    ];
    for (name, guest, options) in guests {
        let file = dir.file(name, guest);
        let machine: Vec<&str> =
            ["-kernel", &file, "-m", "16", "-serial", "null"].iter().chain(options).copied().collect();
        for tiers in [
            ["--left", "interp", "--right", "jit,threshold=0"],
            ["--twice", "--right", "jit", "--console"].map(|s| s),
        ] {
            for every in ["1000", "777777"] {
                let mut options = tiers.to_vec();
                options.extend(["--every", every]);
                let text = equal(&options, &machine);
                assert!(text.contains("the end: power off"), "{name}: {text}");
            }
        }
    }
}

#[test]
fn a_planted_defect_is_found_at_its_instruction() {
    let dir = Temp::new();
    let file = dir.file("guest", hyaline_guests::DEADLINE);
    let machine = ["-kernel", &file, "-m", "16", "-serial", "null"];
    // Before, at and after checkpoints, in the loop that is interrupted; registers that the guest does not use there.
    for (count, register) in [(3_u64, 6), (999, 7), (1000, 6), (1001, 7), (20537, 6)] {
        let plant = format!("{count},{register}");
        for right in ["interp", "jit,threshold=0"] {
            let (code, text) = lockstep(&["--every", "1000", "--right", right, "--plant", &plant], &machine);
            let found = format!("equal after {} instructions, different after {count}:", count - 1);
            assert!(code == Some(1) && text.contains(&found), "{plant} {right}: {text}");
            assert!(text.contains(&format!("cpu0.gpr[{register}]")), "{plant} {right}: {text}");
            assert!(!text.contains("run again from the checkpoint"), "{plant} {right}: {text}");
            assert!(text.contains("to see it again:\n  cargo run"), "{text}");
        }
    }
}

#[test]
fn a_machine_goes_on_from_a_saved_state_as_if_nothing_had_happened() {
    let dir = Temp::new();
    let file = dir.file("guest", hyaline_guests::SMP);
    let state = dir.0.join("state").to_str().unwrap().to_string();
    let machine = ["-kernel", &file, "-m", "16", "-serial", "null", "-smp", "2", "-append", "2"];
    let (code, text) = lockstep(&["--every", "500", "--plant", "30111,5", "--save", &state], &machine);
    assert!(code == Some(1) && text.contains("equal after 30110 instructions"), "{text}");
    // Instructions in all, and the last state.
    let end = |text: &str| -> Option<(String, String)> {
        let count = text.split(" instructions, ").next()?.rsplit(' ').next()?;
        Some((count.to_string(), text.split("; state ").nth(1)?.to_string()))
    };
    let whole = end(&equal(&["--every", "500"], &machine));
    let mut restored = machine.to_vec();
    restored.extend(["-restore", &state]);
    let rest = end(&equal(&["--every", "777"], &restored));
    assert!(whole.is_some() && whole == rest, "{whole:?} {rest:?}");
}

#[test]
fn a_piece_of_linux_is_equal() {
    let name = "a_piece_of_linux_is_equal";
    let guest = Cache::open().and_then(|c| Ok((c.kernel(Kernel::Cloud, &|_| {})?, c.busybox(&|_| {})?)));
    let (kernel, busybox) = match guest {
        Ok(guest) => guest,
        Err(e) if std::env::var("CI").as_deref() == Ok("true") => panic!("{name}: {e}"),
        Err(e) => {
            println!("SKIPPED: {name}: {e}");
            return;
        }
    };
    let dir = Temp::new();
    let initrd = dir.file("initrd", &initramfs(Path::new(&busybox), "poweroff -f").unwrap());
    let kernel = kernel.to_str().unwrap();
    let machine = [
        "-kernel",
        kernel,
        "-initrd",
        &initrd,
        "-m",
        "128",
        "-serial",
        "null",
        "-smp",
        "2",
        "-append",
        "console=ttyS0 panic=-1",
    ];
    equal(&["--every", "300k", "--instructions", "250M"], &machine);
}
