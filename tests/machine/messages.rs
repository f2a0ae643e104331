//! Bad input and faults: what the program says, word by word, and its exit code.

use crate::driver::{Run, Temp, command, kernel, kvm, limited, line, run};
use hyaline_fetch::Kernel;
use std::path::Path;
use std::process::{Command, Stdio};

/// Refused with exit code 1, nothing on standard output and exactly this message.
#[track_caller]
fn refused<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>, want: &str) {
    let end = run(args);
    assert_eq!(end.err, format!("hyaline: {want}\n"));
    assert_eq!((end.code(), end.out.as_str()), (1, ""));
}

#[track_caller]
fn refused_line(args: &str, want: &str) {
    refused(args.split_whitespace(), want);
}

/// A guest to boot where what is wrong is something else.
fn guest(dir: &Temp) -> String {
    dir.file("guest.elf", hyaline_guests::COUNT);
    dir.text("guest.elf")
}

#[test]
fn options() {
    refused_line("-kernal x", "unknown option -kernal; did you mean -kernel?");
    refused_line("--apend x", "unknown option -apend; did you mean -append?");
    refused_line(
        "-drive file=x,format=raw",
        "-drive of QEMU is not here: there is no disk controller yet; boot with -kernel and -initrd, or with -bios",
    );
    refused_line("-qwertyuiop", "unknown option -qwertyuiop; see -help");
    refused_line("-kernel", "-kernel wants an argument: -kernel file");
    refused_line(
        "disk.img",
        "`disk.img`: a disk image given by itself; this machine has no disk controller yet. Boot with -kernel and -initrd, or with -bios",
    );
    refused_line("-smp 9", "-smp 9: 9 processors; this machine has 1 to 8");
    refused_line("-smp 0", "-smp 0: 0 processors; this machine has 1 to 8");
    refused_line("-smp two", "-smp cpus=two: no number");
    refused_line("-m x", "-m `x` is no size; write for example 512M or 2G");
    refused_line("-m 12Q", "-m `12Q`: unknown size suffix `q`; there are B, K, M, G and T");
    refused_line("-m 0", "-m `0` is out of range: 1 byte to 64 TiB");
    refused_line("-m 100T", "-m `100T` is out of range: 1 byte to 64 TiB");
    refused_line(
        "-accel kvmm",
        "-accel: unknown accelerator `kvmm`; did you mean `kvm`? (there are kvm, jit and interp)",
    );
    refused_line(
        "-M q35",
        "-M: unsupported machine type `q35` (q35 and microvm are not built yet); there is `pc`",
    );
    refused_line(
        "-M pc,hpte=off",
        "-machine: unknown property `hpte`; did you mean `hpet`? (there are accel, kernel-irqchip, hpet, usb, vmport, smm, graphics)",
    );
    refused_line("-M pc,hpet=maybe", "hpet=maybe: only on and off are possible");
    refused_line("-M pc,kernel-irqchip=half", "kernel-irqchip=half: only on, off and split are possible");
    refused_line(
        "-serial tcp:1",
        "-serial `tcp:1`: unknown character back end; there are stdio, mon:stdio, null, file:PATH, unix:PATH[,server=on][,wait=off] and pty",
    );
    refused_line(
        "-serial stdio -serial stdio",
        "-serial: only one serial port can have standard input and output",
    );
    refused_line("-d access,intt", "-d: unknown log item `intt`; did you mean `int`? (`-d help` lists them)");
    refused_line(
        "-rtc base=yesterday",
        "-rtc base=yesterday: write utc, localtime, 2026-01-31 or 2026-01-31T12:00:00",
    );
    refused_line(
        "-global isa-debugcn.iobase=1",
        "-global isa-debugcn.iobase=1: no driver `isa-debugcn`; did you mean `isa-debugcon`?",
    );
    refused_line(
        "-global isa-debugcon.base=1",
        "-global isa-debugcon: unknown property `base`; did you mean `iobase`? (there are iobase, readback)",
    );
    refused_line("-vga std", "-vga std: only -vga none is supported in this version");
    refused_line(
        "-initrd x",
        "-initrd without -kernel: there is nothing that could use it; add -kernel FILE",
    );
    refused_line(
        "-accel kvm,deterministic=on",
        "deterministic=on and -icount work on the software CPU only: KVM can't count instructions exactly. Use -accel jit or -accel interp",
    );
    refused_line(
        "-accel jit,tier=2",
        "-accel jit,tier=2: there is no second tier of translation yet; tier=1 is what there is",
    );
    let dir = Temp::new();
    refused(
        ["-kernel", &guest(&dir), "-accel", "tcg,cache=1M", "-smp", "2"],
        "-accel jit,cache=: a code cache of 524288 bytes for one processor is out of range: choose 1 MiB to 1 GiB for each",
    );
    refused_line("-accel interp,cache=64M", "-accel interp,cache=: only for jit, which translates");
    refused_line(
        "-accel kvm,thread=single",
        "-accel kvm,thread=single: KVM's processors have a thread each; only the software CPU's can take turns",
    );
    refused_line(
        "-icount shift=auto",
        "-icount shift=auto follows the host's speed, so that no run repeats: give the nanoseconds of an instruction, shift=N for 2^N (0 to 10)",
    );
    refused_line(
        "-icount 11",
        "-icount shift=11: 0 to 10 are possible, for instructions of 1 to 1024 nanoseconds",
    );
    refused_line(
        "-icount 3,align=on",
        "-icount align=on is not supported: counted time is never held back to the host's clock while the guest executes; leave it out",
    );
    refused_line(
        "-icount 3,rr=record",
        "-icount rr=: there is no recording of input yet; runs without input from outside repeat without it",
    );
    refused_line(
        "-icount sleep=off",
        "-icount: shift=N is missing: an instruction takes 2^N nanoseconds (0 to 10)",
    );
    refused_line(
        "demo minix",
        "demo: unknown demonstration `minix`; there is `linux`, and none is the built-in one",
    );
}

#[test]
fn processors_and_devices() {
    let dir = Temp::new();
    let kernel = guest(&dir);
    let with = |option: &str, value: &str, want: &str| refused(["-kernel", &kernel, option, value], want);
    with(
        "-cpu",
        "quemu64",
        "-cpu: There is no processor model called `quemu64`. The nearest is `qemu64`; `-cpu help` lists all.",
    );
    with(
        "-cpu",
        "max,+avx22",
        "-cpu: The processor has no feature or property called `avx22`. The nearest is `avx2`; `-cpu help` lists all.",
    );
    with("-device", "pcnat", "-device: no device `pcnat`; did you mean `pcnet`? (`-device help` lists them)");
    with(
        "-device",
        "pcnet,adr=4",
        "-device pcnet: unknown property `adr`; did you mean `addr`? (there are id, addr, mac)",
    );
    with("-device", "pcnet,addr=99", "-device pcnet: addr=99: device numbers are 0 to 1f");
    with(
        "-device",
        "pcnet,mac=1:2",
        "-device pcnet: mac=1:2: write six bytes with colons, for example 52:54:00:12:34:56",
    );
    with(
        "-device",
        "isa-debug-exit,iobase=0x10000",
        "-device isa-debug-exit: iobase=0x10000: it is 0xffff (65535) at most",
    );
    with(
        "-device",
        "isa-debug-exit,iobase=here",
        "-device isa-debug-exit: iobase=here: no number; write for example 0xf4",
    );
    with("-device", "isa-debug-exit,iosize=3", "-device isa-debug-exit: iosize=3: it is 1, 2 or 4");
    refused(
        ["-kernel", &kernel, "-device", "pcnet,id=a", "-device", "pci-testdev,id=a"],
        "-device pci-testdev: the id `a` is taken",
    );
    // Help goes to standard output.
    for (args, part) in [
        ("-device help", "name \"pcnet\", bus PCI"),
        ("-device ?", "name \"pcnet\", bus PCI"),
        (
            "-device isa-debug-exit,help",
            "isa-debug-exit options:\n  id=<a name for it>\n  iobase=<first port> (default: 0x501)\n",
        ),
        ("-cpu help", "qemu64"),
        ("-M help", "pc       PC (i440FX + PIIX, 1996) (default)\n"),
        ("-accel help", "jit      the software CPU, translating what runs often (default;"),
        ("-d help", "guest_errors"),
        ("-version", "Hyaline machine emulator version "),
        ("-help", "usage: hyaline [options]"),
        ("--help", "\n-kernel file "),
        ("demo --help", "usage: hyaline demo"),
        ("demo linux --help", "usage: hyaline demo"),
    ] {
        let text = line(args).success();
        assert!(text.contains(part), "{args}: {text}");
    }
}

#[test]
fn two_devices_on_one_port() {
    let dir = Temp::new();
    let kernel = guest(&dir);
    let end = run(["-kernel", &kernel, "-serial", "null", "-device", "isa-debug-exit,iobase=0x3f8"]);
    assert_eq!((end.code(), end.out.as_str()), (1, ""));
    for part in ["hyaline: ", "isa-debug-exit", "serial0", "0x3f8..=0x3f9", "overlap"] {
        assert!(end.err.contains(part), "`{part}`: {}", end.err);
    }
    let end = run(["-kernel", &kernel, "-device", "pcnet,addr=5", "-device", "pci-testdev,addr=5"]);
    assert_eq!((end.code(), end.out.as_str()), (1, ""));
    assert!(
        end.err.contains("addr=5") || end.err.contains("device 5") || end.err.contains("05"),
        "{}",
        end.err
    );
}

#[test]
fn kernels() {
    let dir = Temp::new();
    let file = |name: &str, content: &[u8]| {
        dir.file(name, content);
        dir.text(name)
    };
    let missing = dir.text("missing");
    refused(
        ["-kernel", &missing],
        &format!("-kernel {missing}: No such file or directory (os error 2); check the path"),
    );
    let folder = dir.text("");
    refused(["-kernel", &folder], &format!("-kernel {folder}: Is a directory (os error 21); check the path"));
    let empty = file("empty", b"");
    refused(["-kernel", &empty], &format!("-kernel {empty}: the file is empty"));
    const NO_KERNEL: &str = "this is no kernel that can be started directly. It has neither a Linux boot header (at 0x202), nor a multiboot 1 \
        header in its first 8192 bytes, nor is it an ELF file with a PVH note";
    let text = file("text", &[b'x'; 10_000]);
    refused(["-kernel", &text], &format!("-kernel {text}: {NO_KERNEL}"));
    let short = file("short", &[0; 100]);
    refused(
        ["-kernel", &short],
        &format!("-kernel {short}: {NO_KERNEL}; it is also too short for any of them: a truncated copy?"),
    );
    // An ELF program, but no kernel.
    let me = std::env::current_exe().unwrap();
    refused(
        ["-kernel", me.to_str().unwrap()],
        &format!(
            "-kernel {}: this ELF file has no PVH note (owner `Xen`, type 18: PHYS32_ENTRY) and no multiboot header, so its entry is unknown. \
             A Linux vmlinux has it when built with CONFIG_PVH=y; else start the bzImage",
            me.display()
        ),
    );
    // Every truncation of a multiboot ELF guest is refused or, if only symbols are missing, starts: never a panic.
    for len in (0..hyaline_guests::DEMO.len()).step_by(hyaline_guests::DEMO.len() / 12) {
        let cut = file("cut.elf", &hyaline_guests::DEMO[..len]);
        let end = run(["-kernel", &cut, "-nographic"]);
        let refusal = end.code() == 1 && end.err.starts_with(&format!("hyaline: -kernel {cut}: "));
        let ran = end.code() == 0 && end.out.ends_with("Powering off.\n");
        assert!(refusal || ran, "{len}: {end:?}");
    }
    let guest = guest(&dir);
    let module = dir.text("module");
    refused(
        ["-kernel", &guest, "-initrd", &module],
        &format!("-initrd {module}: No such file or directory (os error 2); check the path"),
    );
    let big = file("big", &vec![1; 20 << 20]);
    let end = run(["-kernel", &guest, "-m", "16", "-initrd", &big]);
    assert_eq!((end.code(), end.out.as_str()), (1, ""));
    let (start, rest) = end.err.split_once(" at 0x").expect(&end.err);
    assert_eq!(start, format!("hyaline: -initrd {big}: its 20971520 bytes"));
    assert!(
        rest.ends_with(
            " do not fit into the machine's memory below the PCI hole (15 MiB); give more with -m\n"
        ),
        "{rest}"
    );
}

#[test]
fn linux_images() {
    let Some(image) = kernel("linux_images", Kernel::Cloud) else { return };
    let dir = Temp::new();
    let good = std::fs::read(&image).unwrap();
    let setup = (usize::from(good[0x1f1]) + 1) * 512;
    let promised = u32::from_le_bytes(good[0x1f4..0x1f8].try_into().unwrap()) as usize * 16;
    let cut = |len: usize| {
        dir.file("cut", &good[..len]);
        dir.text("cut")
    };
    let name = cut(1000);
    refused(
        ["-kernel", &name],
        &format!(
            "-kernel {name}: the file ends in its setup code, at 1000 of at least {setup} bytes; a truncated copy?"
        ),
    );
    cut(2_000_000);
    refused(
        ["-kernel", &name],
        &format!(
            "-kernel {name}: the file is truncated: its header promises {promised} bytes of kernel after the setup code, {} are there",
            2_000_000 - setup
        ),
    );
    let image = image.to_str().unwrap();
    let huge = dir.path("huge");
    std::fs::File::create(&huge).unwrap().set_len(200_000_000).unwrap();
    let huge = huge.to_str().unwrap();
    let end = run(["-kernel", image, "-initrd", huge]);
    assert_eq!(end.code(), 1);
    assert!(
        end.err.starts_with(&format!(
            "hyaline: -initrd {huge}: its 200000000 bytes do not fit between the kernel's end at 0x"
        )),
        "{}",
        end.err
    );
    assert!(end.err.ends_with("; give the machine more memory with -m (it has 127 MiB below the PCI hole) or use a smaller initrd\n"), "{}", end.err);
    let end = run(["-kernel", image, "-m", "8"]);
    assert_eq!(end.code(), 1);
    assert!(
        end.err.ends_with(
            " do not fit into the machine's memory below the PCI hole (7 MiB); give more with -m\n"
        ),
        "{}",
        end.err
    );
    let long = "x".repeat(5000);
    let end = run(["-kernel", image, "-append", &long]);
    assert_eq!(
        (end.code(), end.err.as_str()),
        (1, "hyaline: -append: the command line has 5000 bytes; this kernel takes at most 2047\n")
    );
}

#[test]
fn firmware_images() {
    let dir = Temp::new();
    let odd = dir.file("odd", &[0; 100_001]);
    refused(
        ["-bios", odd.to_str().unwrap()],
        "-bios: the image has 100001 bytes; a firmware image is a whole number of 64 KiB (65536), up to 16 MiB",
    );
    let empty = dir.file("empty", &[]);
    refused(["-bios", empty.to_str().unwrap()], &format!("-bios {}: the file is empty", empty.display()));
    refused(
        ["-bios", "nowhere.bin"],
        "-bios nowhere.bin: No such file or directory (os error 2); check the path",
    );
    let big = dir.file("big", &vec![0; 17 << 20]);
    refused(
        ["-bios", big.to_str().unwrap()],
        "-bios: the image has 17825792 bytes; a firmware image is a whole number of 64 KiB (65536), up to 16 MiB",
    );
    // Firmware and a kernel: what is done is said.
    let bios = dir.file("bios", &vec![0; 65536]);
    let mut run = Run::start(["-bios", bios.to_str().unwrap(), "-kernel", &guest(&dir), "-nographic"]);
    run.wait_for("ready\n");
    run.send("q");
    let end = run.end();
    let want = format!(
        "hyaline: -bios {} with -kernel: the kernel is started directly, without firmware; leave -kernel out to start the firmware\n",
        bios.display()
    );
    assert_eq!((end.code(), end.err), (0, want));
}

#[test]
fn memory_that_the_host_cannot_give() {
    let dir = Temp::new();
    let kernel = guest(&dir);
    let end = run(["-kernel", &kernel, "-m", "64T"]);
    assert_eq!(end.code(), 1);
    assert!(
        end.err.starts_with("hyaline: -m: 67108864 MiB of guest memory are more than this host has ("),
        "{}",
        end.err
    );
    // A limit of the process, as `ulimit -v` sets it (in KiB).
    let line = "ulimit -v 1000000; exec \"$1\" -kernel \"$2\" -m 1500";
    let mut c = Command::new("sh");
    c.args(["-c", line, "sh", env!("CARGO_BIN_EXE_hyaline"), &kernel]).stdin(Stdio::null());
    let end = Run::with(c).end();
    assert_eq!(end.code(), 1);
    assert!(end.err.contains("1500 MiB") || end.err.contains("1572864000"), "{}", end.err);
    assert!(end.err.starts_with("hyaline: ") && end.err.contains("-m"), "{}", end.err);
}

/// A copy of the program that any user can start.
fn for_everybody(dir: &Temp) -> String {
    let copy = dir.path("hyaline");
    std::fs::copy(env!("CARGO_BIN_EXE_hyaline"), &copy).unwrap();
    copy.to_str().unwrap().to_string()
}

#[test]
fn no_permission_for_kvm() {
    let test = "no_permission_for_kvm";
    let dir = Temp::new();
    let (program, kernel) = (for_everybody(&dir), guest(&dir));
    let options = ["-kernel", &kernel, "-accel", "kvm"];
    // The user nobody, with none of our groups: only root can become that.
    let mut c = Command::new("setpriv");
    c.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", &program])
        .args(options)
        .stdin(Stdio::null());
    if !rustix::process::geteuid().is_root() {
        return limited(test, &"only root can start a program as another user");
    }
    let mode = std::fs::metadata("/dev/kvm").map(|m| std::os::unix::fs::MetadataExt::mode(&m)).unwrap_or(0);
    if !kvm(test) || mode & 6 != 0 {
        return limited(test, &"everybody may use /dev/kvm on this host");
    }
    let end = Run::with(c).end();
    assert_eq!(end.code(), 1);
    for part in ["hyaline: -accel kvm: ", "no permission to open /dev/kvm", "-accel interp"] {
        assert!(end.err.contains(part), "`{part}`: {}", end.err);
    }
}

#[test]
fn no_kvm_at_all() {
    let test = "no_kvm_at_all";
    let dir = Temp::new();
    let kernel = guest(&dir);
    // A mount namespace of its own with an empty /dev.
    let inside = "mount -t tmpfs none /dev 2>/dev/null || exit 99; exec \"$@\"";
    let start = |accels: &[&str]| {
        let mut c = Command::new("unshare");
        c.args([
            "--mount",
            "sh",
            "-c",
            inside,
            "sh",
            env!("CARGO_BIN_EXE_hyaline"),
            "-kernel",
            &kernel,
            "-nographic",
        ]);
        c.args(accels).stdin(Stdio::piped()).stdout(Stdio::piped());
        Run::with(c)
    };
    let end = start(&["-accel", "kvm"]).end();
    if end.code() == 99 || end.err.starts_with("unshare:") {
        return limited(test, &"this process may not make a mount namespace");
    }
    assert_eq!((end.code(), end.out.as_str()), (1, ""));
    for part in ["hyaline: -accel kvm: ", "/dev/kvm", "-accel interp"] {
        assert!(end.err.contains(part), "`{part}`: {}", end.err);
    }
    // With a second choice it goes on, and says so.
    let mut run = start(&["-accel", "kvm", "-accel", "interp"]);
    run.wait_for("ready\n");
    run.send("q");
    let end = run.end();
    assert_eq!(end.code(), 0);
    assert!(
        end.err.contains("/dev/kvm") && end.err.ends_with("; going on with the software CPU\n"),
        "{}",
        end.err
    );
}

#[test]
fn a_full_disk() {
    let dir = Temp::new();
    let kernel = guest(&dir);
    const FULL: &str = "No space left on device (os error 28)";
    let typed = |more: &[&str], serial: &[&str]| {
        let mut args = vec!["-kernel", &kernel];
        args.extend(serial);
        args.extend(more);
        let mut run = Run::start(args);
        run.out.wait_for("ready\n", 0);
        run.send("aq");
        run.end()
    };
    // The log: said once, the guest goes on.
    let end = typed(&["-d", "in_asm,int", "-D", "/dev/full"], &["-nographic"]);
    assert_eq!((end.code(), end.out.as_str()), (0, "ready\n01 a\n"));
    assert_eq!(end.err, format!("hyaline: the log can't be written any more: {FULL}\n"));
    let end = typed(&["-d", "access", "-D", "/dev/full"], &["-nographic"]);
    assert_eq!((end.code(), end.out.as_str()), (0, "ready\n01 a\n"));
    let want = format!("it can't be written any more ({FULL}); the guest goes on");
    assert!(end.err.contains(&want) && end.err.lines().count() == 1, "{}", end.err);
    // A serial port's file: the same.
    let end = typed(&["-serial", "stdio", "-serial", "file:/dev/full", "-debugcon", "file:/dev/full"], &[]);
    assert_eq!((end.code(), end.out.as_str(), end.err.as_str()), (0, "ready\n01 a\n", ""));
    let demo = dir.file("demo.elf", hyaline_guests::DEMO);
    let end = run(["-kernel", demo.to_str().unwrap(), "-serial", "file:/dev/full"]);
    assert_eq!(end.code(), 0, "{}", end.err);
    assert_eq!(end.err, format!("hyaline: file:/dev/full: {FULL}; nothing more is written there\n"));
    // A saved state: the exit code says that there is none. /dev/full itself stays what it is.
    let end = typed(&["-save-at-exit", "/dev/full"], &["-nographic"]);
    assert_eq!((end.code(), end.out.as_str()), (1, "ready\n01 a\n"));
    assert_eq!(
        end.err,
        format!("hyaline: /dev/full: the state can't be saved: {FULL}; is there room on the disk?\n")
    );
    assert!(std::os::unix::fs::FileTypeExt::is_char_device(
        &std::fs::metadata("/dev/full").unwrap().file_type()
    ));
    assert!(!Path::new("/dev/full.part").exists());
}

#[test]
fn files_that_cannot_be_made() {
    let dir = Temp::new();
    let kernel = guest(&dir);
    let there = dir.text("no/such/folder");
    let none = "No such file or directory (os error 2)";
    let with = |option: &str, value: &str, want: &str| refused(["-kernel", &kernel, option, value], want);
    with("-D", &there, &format!("-D {there}: {none}"));
    with("-pidfile", &there, &format!("-pidfile {there}: {none}"));
    with(
        "-serial",
        &format!("file:{there}"),
        &format!("file:{there}: {none}; check that the folder exists and can be written"),
    );
    with(
        "-serial",
        &format!("unix:{there}"),
        &format!("unix:{there}: {none}; is a server listening there? Add server=on to listen"),
    );
    with("-restore", &there, &format!("{there}: the saved state can't be read: {none}"));
    // Before the guest has run for hours.
    with("-save-at-exit", &there, &format!("{there}: the state can't be saved there: {none}"));
}

/// The report of a triple fault, with registers that are known.
fn triple_fault_report(text: &str, rip: &str) {
    for part in [
        "hyaline: the guest's processor 0 shut down after a triple fault: an exception could not be delivered, nor the double fault that followed\n",
        "CPU#0 in 32-bit protected mode, ",
        &format!("\nRIP={rip} "),
        "\nCS =0010 0000000000000000 ffffffff c09b code32 DPL=0\n",
        "\nIDT= 0000000000000000 00000000\n",
        "\nCR0=00000011 ",
    ] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}

#[test]
fn a_triple_fault_is_reported_and_resets_or_ends() {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::TRIPLE_FAULT);
    let kernel = file.to_str().unwrap();
    let mut accels = vec!["interp"];
    if kvm("a_triple_fault_is_reported_and_resets_or_ends") {
        accels.push("kvm");
    }
    for accel in accels {
        let args = ["-kernel", kernel, "-nographic", "-accel", accel];
        let end = run(args.iter().chain(&["-no-reboot"]));
        assert_eq!(
            (end.code(), end.out.as_str()),
            (0, "dividing by zero without a handler\n"),
            "{accel}: {}",
            end.err
        );
        assert_eq!(end.err.matches("CPU#0 in").count(), 1, "{}", end.err);
        triple_fault_report(&end.err, "00000000001000b3");
        // Without -no-reboot it starts again and again.
        let mut run = Run::start(args);
        for _ in 0..5 {
            run.wait_for("dividing by zero without a handler\n");
        }
        run.send("\x01x");
        assert_eq!(run.end().code(), 0, "{accel}");
    }
}

#[test]
fn a_guest_that_jumps_into_nothing() {
    let dir = Temp::new();
    let file = dir.file("guest.elf", hyaline_guests::NOWHERE);
    let args = ["-kernel", file.to_str().unwrap(), "-nographic", "-no-reboot"];
    let end = run(args);
    assert_eq!((end.code(), end.out.as_str()), (0, "jumping to 0xd0000000\n"), "{}", end.err);
    triple_fault_report(&end.err, "00000000d0000000");
    if kvm("a_guest_that_jumps_into_nothing") {
        // Kernels differ here: some emulate and give up, others deliver the undefined opcode.
        let end = run(args.iter().chain(&["-accel", "kvm"]));
        assert_eq!(end.out, "jumping to 0xd0000000\n");
        match end.code() {
            0 => triple_fault_report(&end.err, "00000000d0000000"),
            1 => {
                assert!(
                    end.err.contains("processor 0: KVM internal error 1: emulation failure"),
                    "{}",
                    end.err
                );
                assert!(end.err.contains("at 0xd0000000"), "{}", end.err);
            }
            other => panic!("exit code {other}: {}", end.err),
        }
    }
}

#[test]
fn without_a_cache_or_a_network_the_demonstration_says_what_to_do() {
    let dir = Temp::new();
    let in_the_way = dir.file("file", b"");
    let mut c = command(["demo", "linux"]);
    c.env("HYALINE_CACHE", in_the_way.join("cache")).stdin(Stdio::null());
    let end = Run::with(c).end();
    assert_eq!(end.code(), 1);
    assert_eq!(
        end.err,
        format!(
            "hyaline: the cache {}/cache can't be made: Not a directory (os error 20); set HYALINE_CACHE to a folder that can be written\n",
            in_the_way.display()
        )
    );
    // No apt-get on the PATH.
    let mut c = command(["demo", "linux"]);
    c.env("HYALINE_CACHE", dir.path("cache")).env("PATH", dir.path("")).stdin(Stdio::null());
    let end = Run::with(c).end();
    assert_eq!(end.code(), 1);
    assert_eq!(
        end.err,
        "hyaline: what `linux-image-cloud-amd64` stands for is not in the cache and there is no apt on this system; name files of your own \
         with -kernel. Or name files: --kernel FILE --busybox FILE\n"
    );
}
