//! Debian's kernels to a shell.

use crate::driver::{Run, Temp, initrd, kernel};
use hyaline_fetch::Kernel;

/// An interactive shell, then power-off.
const SHELL: &str = "setsid cttyhack sh\npoweroff -f";

/// Boots to a shell and types at it.
fn shell(test: &str, kind: Kernel, options: &[&str]) -> Option<(Run, Temp)> {
    let dir = Temp::new();
    let image = kernel(test, kind)?;
    let initrd = initrd(test, &dir, SHELL)?;
    let mut args = vec!["-kernel", image.to_str().unwrap(), "-initrd", initrd.to_str().unwrap()];
    args.extend(["-append", "console=ttyS0 panic=-1", "-m", "512", "-nographic", "-no-reboot"]);
    args.extend(options);
    let mut guest = Run::start(args);
    guest.wait_for("Linux version 6.");
    guest.wait_for("Run /init as init process");
    guest.wait_for("~ # ");
    Some((guest, dir))
}

/// What the shell is asked in every boot: arithmetic, processors, the system log.
fn converse(guest: &mut Run, cpus: u32) {
    guest.send("echo $((6 * 7))-$(nproc)\n");
    guest.wait_for(&format!("\n42-{cpus}\r\n"));
    guest.wait_for("~ # ");
    // Its own check sum by two ways through user mode: 2 MiB of busybox.
    guest.send("md5sum < /bin/busybox > /tmp/a; cat /bin/busybox | md5sum | cmp - /tmp/a && echo s''ame\n");
    guest.wait_for("\nsame\r\n");
    guest.wait_for("~ # ");
    guest.send("dmesg | grep -c -e 'BUG:' -e 'Call Trace' -e 'nobody cared' -e 'Unable to handle'\n");
    guest.wait_for("\n0\r\n");
    guest.wait_for("~ # ");
}

#[test]
fn cloud_kernel_to_a_shell() {
    let Some((mut guest, _dir)) = shell("cloud_kernel_to_a_shell", Kernel::Cloud, &[]) else { return };
    converse(&mut guest, 1);
    // Sleeping needs the timer interrupt and the clock.
    guest.send("a=$(date +%s); sleep 2; b=$(date +%s); echo slept $((b - a >= 2 && b - a < 60))\n");
    guest.wait_for("\nslept 1\r\n");
    guest.send("poweroff -f\n");
    guest.wait_for("reboot: Power down");
    guest.end().success();
}

#[test]
fn cloud_kernel_with_four_processors() {
    let test = "cloud_kernel_with_four_processors";
    let Some((mut guest, _dir)) = shell(test, Kernel::Cloud, &["-smp", "4"]) else { return };
    converse(&mut guest, 4);
    // Each processor runs something when told to.
    for cpu in 0..4 {
        guest.send(&format!(
            "taskset -p $((1 << {cpu})) $$ > /dev/null && cut -d' ' -f39 /proc/self/stat | sed 's/^/on-/'\n"
        ));
        guest.wait_for(&format!("\non-{cpu}\r\n"));
    }
    guest.send("poweroff -f\n");
    guest.wait_for("reboot: Power down");
    guest.end().success();
}

#[test]
fn full_kernel_to_a_shell() {
    let Some((mut guest, _dir)) = shell("full_kernel_to_a_shell", Kernel::Full, &["-smp", "4", "-m", "1G"])
    else {
        return;
    };
    converse(&mut guest, 4);
    guest.send("poweroff -f\n");
    guest.wait_for("reboot: Power down");
    guest.end().success();
}

#[test]
fn reboot_starts_again_and_no_reboot_ends() {
    let test = "reboot_starts_again_and_no_reboot_ends";
    let dir = Temp::new();
    let (Some(image), Some(initrd)) =
        (kernel(test, Kernel::Cloud), initrd(test, &dir, "echo this is a boot\nreboot -f"))
    else {
        return;
    };
    let mut args = vec!["-kernel", image.to_str().unwrap(), "-initrd", initrd.to_str().unwrap()];
    args.extend(["-append", "console=ttyS0 quiet", "-m", "512", "-nographic"]);
    let mut guest = Run::start(&args);
    guest.wait_for("this is a boot");
    guest.wait_for("this is a boot");
    drop(guest);
    args.push("-no-reboot");
    let text = crate::driver::run(args).success();
    assert_eq!(text.matches("this is a boot").count(), 1, "{text}");
}

/// The uncompressed kernel inside a bzImage, which Linux's boot protocol says where to find (payload_offset, payload_length).
fn vmlinux(image: &[u8]) -> Result<Vec<u8>, String> {
    let u32_at = |data: &[u8], at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap()) as usize;
    let setup = (image[0x1f1] as usize + 1) * 512;
    let start = setup + u32_at(image, 0x248);
    // The last four bytes are the unpacked size.
    let payload = &image[start..start + u32_at(image, 0x24c) - 4];
    if payload.starts_with(b"\x7fELF") {
        return Ok(payload.to_vec());
    }
    // LZ4's "legacy" frames: a magic, then blocks of 8 MiB unpacked, each after its packed length.
    let Some(mut rest) = payload.strip_prefix(&[0x02, 0x21, 0x4c, 0x18]) else {
        return Err(format!("this test can't unpack a kernel that begins with {:02x?}", &payload[..6]));
    };
    let mut all = Vec::new();
    while rest.len() > 4 {
        let (block, next) = rest[4..].split_at(u32_at(rest, 0));
        all.extend(lz4_flex::block::decompress(block, 8 << 20).map_err(|e| e.to_string())?);
        rest = next;
    }
    Ok(all)
}

#[test]
fn pvh_kernel_to_a_shell() {
    let test = "pvh_kernel_to_a_shell";
    let dir = Temp::new();
    let (Some(image), Some(initrd)) =
        (kernel(test, Kernel::Cloud), initrd(test, &dir, "echo pvh: $(uname -s) with $(nproc)\npoweroff -f"))
    else {
        return;
    };
    let elf = match vmlinux(&std::fs::read(image).unwrap()) {
        Ok(elf) => elf,
        Err(e) => return crate::driver::limited(test, &e),
    };
    let elf = dir.file("vmlinux", &elf);
    let mut args = vec!["-kernel", elf.to_str().unwrap(), "-initrd", initrd.to_str().unwrap(), "-smp", "2"];
    args.extend(["-append", "console=ttyS0", "-m", "512", "-nographic", "-no-reboot"]);
    let text = crate::driver::run(args).success();
    assert!(text.contains("pvh: Linux with 2\r\n"), "{text}");
}

#[test]
fn demo_linux_runs_a_command() {
    let test = "demo_linux_runs_a_command";
    let dir = Temp::new();
    if kernel(test, Kernel::Cloud).is_none() || initrd(test, &dir, "").is_none() {
        return;
    }
    let end = crate::driver::run(["demo", "linux", "--run", "echo $((20 + 3)) from $(uname -s)"]);
    assert!(end.success().contains("23 from Linux"));
}
