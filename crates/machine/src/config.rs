//! What a machine is to be made of: the command line, parsed and checked, or what a program that embeds this crate wants.

use crate::load::Images;
use crate::report::PanicPolicy;
use hyaline_host::chardev::Spec;
use hyaline_watch::Runner;
use hyaline_watch::SymbolChoice;
use std::path::PathBuf;

/// Who executes the guest's instructions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The software CPU, tier 0.
    Interp,
    /// The software CPU, translating what runs often.
    Jit {
        /// Print what the translator did at the end.
        stats: bool,
        /// How often code is interpreted before it is translated, 0 to 254; None: as it is best.
        threshold: Option<u8>,
    },
    /// The host's processor, through /dev/kvm.
    Kvm,
}

impl Accel {
    /// The software CPU as fast as it goes here: translating, or interpreting on a host that has no executable memory for us.
    pub fn software() -> Vec<Accel> {
        vec![Accel::Jit { stats: false, threshold: None }, Accel::Interp]
    }
    /// The name on the command line.
    pub fn as_str(&self) -> &'static str {
        match self {
            Accel::Interp => "interp",
            Accel::Jit { .. } => "jit",
            Accel::Kvm => "kvm",
        }
    }
    /// What runs the processors of a machine that is made so, for those who name threads.
    pub fn runner(&self, config: &Config) -> Runner {
        match self {
            Accel::Kvm => Runner::Kvm,
            _ if config.in_turns() => Runner::InTurns,
            Accel::Jit { .. } => Runner::Jit,
            Accel::Interp => Runner::Interp,
        }
    }
}

/// Which interrupt controllers are the kernel's under KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelIrqchip {
    /// Local APICs in the kernel; 8259, 8254 and I/O APIC ours, where they can be watched.
    #[default]
    Split,
    /// All in the kernel.
    On,
    /// None in the kernel.
    Off,
}

/// `-rtc base=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RtcBase {
    /// The host's time, UTC.
    #[default]
    Utc,
    /// The host's time in its time zone: this many seconds are added to UTC.
    Offset(i64),
    /// A fixed start: seconds since the Unix epoch.
    Fixed(u64),
}

/// `-device NAME,prop=value,…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The device's name.
    pub name: String,
    /// Properties in the order given.
    pub props: Vec<(String, String)>,
}

impl DeviceSpec {
    /// A property's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.props.iter().rev().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// What is logged, as `-d` names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogItems {
    /// `int`: interrupts and exceptions.
    pub int: bool,
    /// `guest_errors`.
    pub guest_errors: bool,
    /// `unimp`.
    pub unimp: bool,
    /// `in_asm`: guest code as it is decoded.
    pub in_asm: bool,
    /// `out_asm`: guest and host code of each translation.
    pub out_asm: bool,
    /// `cpu_reset`: processor state at each reset.
    pub cpu_reset: bool,
    /// `note`: devices' notes.
    pub note: bool,
    /// `access`: every access to a device.
    pub access: bool,
}

/// A whole machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Accelerators in the order to try.
    pub accels: Vec<Accel>,
    /// Time from the instruction count, so that runs repeat exactly (software CPU only).
    pub deterministic: bool,
    /// Deterministic machines: nanoseconds that an instruction takes.
    pub instruction_ns: u64,
    /// Deterministic machines: when all processors wait, wait for the host's clock as long as the next timer is away; else it is then at once.
    pub sleep_when_idle: bool,
    /// The software CPU's processors take turns on one thread, deterministic or not.
    pub turns: bool,
    /// Bytes of memory for translated code, all processors' together; None: 64 MiB each.
    pub code_cache: Option<u64>,
    /// `kernel-irqchip`.
    pub irqchip: KernelIrqchip,
    /// `-cpu`.
    pub cpu: Option<String>,
    /// `-smp`: 1 to 8.
    pub cpus: u8,
    /// `-m`: bytes.
    pub memory: u64,
    /// What is loaded without firmware.
    pub images: Images,
    /// Firmware image. With a kernel too, the firmware is what starts.
    pub bios: Option<PathBuf>,
    /// Serial ports COM1 to COM4; None: not there.
    pub serials: Vec<Option<Spec>>,
    /// `-debugcon`.
    pub debugcon: Option<Spec>,
    /// `-device`.
    pub devices: Vec<DeviceSpec>,
    /// `-global driver.prop=value`.
    pub globals: Vec<(String, String, String)>,
    /// The HPET is there.
    pub hpet: bool,
    /// A reset ends the program.
    pub no_reboot: bool,
    /// A power-off stops the machine but not the program.
    pub no_shutdown: bool,
    /// Start stopped.
    pub paused: bool,
    /// `-name`.
    pub name: Option<String>,
    /// `-rtc base=`.
    pub rtc: RtcBase,
    /// `-symbols`.
    pub symbols: SymbolChoice,
    /// `-on-device-panic`.
    pub on_device_panic: PanicPolicy,
    /// `-crash-dir`: where reports go; the current folder without.
    pub crash_dir: Option<PathBuf>,
    /// `-crash-with-ram`: reports hold the guest's memory.
    pub crash_with_ram: bool,
    /// `-inject`: device, and the fault that its next access to a register makes.
    pub inject: Vec<(String, hyaline_device::Fault)>,
    /// `-d`.
    pub log: LogItems,
    /// Where the state is saved when the machine ends.
    pub save_at_exit: Option<PathBuf>,
    /// What the machine starts from instead of a reset.
    pub restore: Option<PathBuf>,
}

impl Default for Config {
    /// One processor, translated where the host can, 128 MiB, no serial port, no firmware.
    fn default() -> Self {
        Config {
            accels: Accel::software(),
            deterministic: false,
            instruction_ns: 10,
            sleep_when_idle: false,
            turns: false,
            code_cache: None,
            irqchip: KernelIrqchip::Split,
            cpu: None,
            cpus: 1,
            memory: 128 << 20,
            images: Images::default(),
            bios: None,
            serials: Vec::new(),
            debugcon: None,
            devices: Vec::new(),
            globals: Vec::new(),
            hpet: true,
            no_reboot: false,
            no_shutdown: false,
            paused: false,
            name: None,
            rtc: RtcBase::Utc,
            symbols: SymbolChoice::Auto,
            on_device_panic: PanicPolicy::Disable,
            crash_dir: None,
            crash_with_ram: false,
            inject: Vec::new(),
            log: LogItems::default(),
            save_at_exit: None,
            restore: None,
        }
    }
}

impl Config {
    /// The software CPU's processors take turns.
    pub fn in_turns(&self) -> bool {
        self.turns || self.deterministic
    }

    /// The value of `-global driver.prop`, the last one given.
    pub fn global(&self, driver: &str, prop: &str) -> Option<&str> {
        self.globals.iter().rev().find(|(d, p, _)| d == driver && p == prop).map(|(_, _, v)| v.as_str())
    }
}

/// The name in `names` nearest to `name` by edit distance, if one is near enough to be meant.
pub fn nearest<'a>(name: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (name.chars().count() / 2).max(2);
    names.into_iter().map(|n| (distance(name, n), n)).filter(|(d, _)| *d <= limit).min().map(|(_, n)| n)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

/// A size with a suffix: `128` (in `unit`), `512M`, `1.5G`, `64k`, `1T`, `4096B`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_size(text: &str, unit: u64) -> Result<u64, String> {
    let t = text.trim();
    let digits = t.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    if digits.is_empty() {
        return Err(format!("`{text}` is no size; write for example 512M or 2G"));
    }
    let scale = match t[digits.len()..].to_ascii_lowercase().as_str() {
        "" => unit,
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        s => return Err(format!("`{text}`: unknown size suffix `{s}`; there are B, K, M, G and T")),
    };
    let value: f64 =
        digits.parse().map_err(|_| format!("`{text}` is no size; write for example 512M or 2G"))?;
    let bytes = value * scale as f64;
    if !(1.0..=(1u64 << 46) as f64).contains(&bytes) {
        return Err(format!("`{text}` is out of range: 1 byte to 64 TiB"));
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("128", 1 << 20), Ok(128 << 20));
        assert_eq!(parse_size("1.5G", 1), Ok(3 << 29));
        assert_eq!(parse_size("64k", 1), Ok(64 << 10));
        assert!(
            parse_size("0", 1).is_err()
                && parse_size("x", 1).is_err()
                && parse_size("1Q", 1).unwrap_err().contains("suffix")
        );
        assert!(parse_size("nan", 1).is_err() && parse_size("-5", 1).is_err());
    }

    #[test]
    fn nearest_name() {
        assert_eq!(nearest("kernal", ["kernel", "initrd", "append"]), Some("kernel"));
        assert_eq!(nearest("zzzzzz", ["kernel", "initrd"]), None);
    }
}
