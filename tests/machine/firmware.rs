//! Firmware, and what starts without an operating system.

use crate::driver::{Run, Temp, file_of, from_cache, initrd, kernel, kvm};
use hyaline_fetch::Kernel;

fn seabios(test: &str, accel: &str) {
    let Some(bios) = file_of(test, "seabios", "usr/share/seabios/bios-256k.bin") else { return };
    let dir = Temp::new();
    let log = dir.path("debugcon.log");
    let console = format!("file:{}", log.display());
    let mut args = vec!["-bios", bios.to_str().unwrap(), "-nographic", "-m", "64", "-accel", accel];
    args.extend(["-debugcon", &console, "-global", "isa-debugcon.iobase=0x402"]);
    let mut guest = Run::start(args);
    // On the serial console, which Debian's SeaBIOS has when fw_cfg says that there is no display.
    guest.wait_for("SeaBIOS (version ");
    guest.wait_for("No bootable device.");
    let log = std::fs::read_to_string(log).unwrap();
    for part in ["SeaBIOS (version ", "Found 1 cpu(s)", "PCI: ", "Using pmtimer", "No bootable device."] {
        assert!(log.contains(part), "`{part}` is not in SeaBIOS's log:\n{log}");
    }
    // Ctrl-A x.
    guest.send("\x01x");
    assert_eq!(guest.end().code(), 0);
}

#[test]
fn seabios_to_no_bootable_device() {
    seabios("seabios_to_no_bootable_device", "interp");
}

#[test]
fn seabios_to_no_bootable_device_on_kvm() {
    if kvm("seabios_to_no_bootable_device_on_kvm") {
        seabios("seabios_to_no_bootable_device_on_kvm", "kvm");
    }
}

#[test]
fn memtest_tests_memory() {
    let Some(image) = file_of("memtest_tests_memory", "memtest86+", "boot/memtest86+x64.bin") else { return };
    let mut guest = Run::start([
        "-kernel",
        image.to_str().unwrap(),
        "-append",
        "console=ttyS0,115200",
        "-m",
        "16",
        "-nographic",
    ]);
    guest.wait_for("Memtest86+");
    guest.wait_for("Memory  :   16MB");
    // Past its first screen: tests run, on all of the memory, and find nothing.
    guest.wait_for("Status: Testing");
    guest.wait_for("#0  [Address test, walking ones, no cache]");
    // Every two seconds it shows which test runs. A fast processor does most of them between two looks; the last one takes minutes by the clock.
    guest.wait_for("#10 [Bit fade test, 2 patterns]");
    guest.wait_for("Errors: 0 ");
    guest.send("\x01x");
    assert_eq!(guest.end().code(), 0);
}

#[test]
fn uefi_to_its_shell() {
    let Some(bios) = file_of("uefi_to_its_shell", "ovmf", "usr/share/ovmf/OVMF.fd") else { return };
    let mut guest = Run::start([
        "-accel",
        "jit",
        "-bios",
        bios.to_str().unwrap(),
        "-nographic",
        "-m",
        "256",
        "-no-reboot",
    ]);
    guest.wait_for("UEFI Interactive Shell v2");
    // Any key stops the countdown.
    guest.send("\r");
    guest.wait_for("Shell> ");
    guest.send("memmap\r");
    guest.wait_for("Total Memory:");
    guest.send("reset -s\r");
    assert_eq!(guest.end().code(), 0);
}

#[test]
fn xen_starts_linux() {
    let test = "xen_starts_linux";
    let dir = Temp::new();
    let Some(xen) = from_cache(test, |c| c.xen(&|_| {})) else { return };
    let Some(linux) = kernel(test, Kernel::Cloud) else { return };
    let Some(initrd) =
        initrd(test, &dir, "echo it is $(cat /sys/hypervisor/type) $((6 * 7)) > /dev/kmsg; poweroff -f")
    else {
        return;
    };
    // Debian's cloud kernel has no driver for the console that Xen gives; its log goes there early.
    let modules = format!("{} earlyprintk=xen keep_bootcon,{}", linux.display(), initrd.display());
    let mut guest = Run::start([
        "-accel",
        "jit",
        "-kernel",
        xen.to_str().unwrap(),
        "-append",
        "console=com1 com1=115200 dom0_mem=400M noreboot",
        "-initrd",
        &modules,
        "-nographic",
        "-m",
        "1024",
    ]);
    guest.wait_for("about to get started");
    guest.wait_for("it is xen 42");
    guest.wait_for("Hardware Dom0 halted");
    guest.send("\x01x");
    assert_eq!(guest.end().code(), 0);
}
