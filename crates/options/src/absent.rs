//! Options of QEMU that this machine has nothing for yet: they are refused with the reason and what to do instead, not taken for misspellings.

const DISK: &str = "there is no disk controller yet; boot with -kernel and -initrd, or with -bios";
const NETWORK: &str = "there is no network yet; `-device pcnet` gives a card that is connected to nothing";
const GRAPHICS: &str =
    "there is no graphics card, keyboard or mouse window yet; use -nographic or a serial port";
const USB: &str = "there is no USB yet";
const SOUND: &str = "there is no sound";
const BACK_END: &str =
    "name the back end at the device: -serial file:PATH, -serial unix:PATH, -debugcon stdio";
const CONTROL: &str =
    "there is no QMP; `-control unix:PATH` and gdb's `monitor` commands look into a running machine";
const SNAPSHOT: &str = "states are saved with -save-at-exit FILE and taken up with -restore FILE";

/// Options by reason.
const ABSENT: &[(&str, &[&str])] = &[
    (
        DISK,
        &[
            "hda", "hdb", "hdc", "hdd", "cdrom", "drive", "blockdev", "fda", "fdb", "sd", "mtdblock",
            "pflash", "snapshot", "virtfs", "fsdev", "iscsi", "add-fd", "set",
        ],
    ),
    (
        "there are no disks or networks to choose from yet: firmware tries what it finds",
        &["boot", "option-rom"],
    ),
    (NETWORK, &["netdev"]),
    (GRAPHICS, &["sdl", "spice", "curses", "full-screen", "g", "k", "show-cursor", "win2k-hack", "echr"]),
    (USB, &["usb", "usbdevice"]),
    (SOUND, &["audio", "audiodev", "soundhw"]),
    (BACK_END, &["chardev"]),
    (CONTROL, &["qmp", "qmp-pretty", "mon", "readconfig", "writeconfig", "preconfig", "compat"]),
    (SNAPSHOT, &["loadvm", "incoming", "only-migratable"]),
    ("there are no secrets, back ends or random number devices to make yet", &["object", "tpmdev"]),
    ("memory is set with -m alone, on one node", &["numa", "mem-path", "mem-prealloc"]),
    (
        "tables for the guest are made by the machine itself",
        &["fw_cfg", "smbios", "acpitable", "uuid", "dtb", "prom-env"],
    ),
    ("ACPI and HPET are always there", &["no-acpi", "no-hpet"]),
    (
        "the program stays in the foreground: start it in the background (`hyaline … &`, systemd-run)",
        &["daemonize"],
    ),
    ("start the program as that user and in that folder", &["runas", "run-with", "chroot", "sandbox"]),
    ("actions are named one by one: -no-reboot, -no-shutdown", &["action", "watchdog-action", "watchdog"]),
    ("firmware and data files are named by their paths: -bios FILE", &["L"]),
    ("there is no record and replay yet", &["record", "replay"]),
];

/// Why there is no such option; None if QEMU has none of that name either.
pub(crate) fn reason(option: &str) -> Option<&'static str> {
    ABSENT.iter().find(|(_, names)| names.contains(&option)).map(|(reason, _)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_and_unknown() {
        assert_eq!(reason("drive"), Some(DISK));
        assert_eq!(reason("drvie"), None);
    }

    #[test]
    fn each_has_one_reason() {
        let mut all: Vec<_> = ABSENT.iter().flat_map(|(_, names)| *names).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
