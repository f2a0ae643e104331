//! Registers of devices by name.

use hyaline_device::{Bank, Chip, Device, Register, Slot};
use hyaline_machine::Machine;
use hyaline_machine::config::nearest;
use std::fmt::Write;
use std::sync::Arc;

/// A number in C's notation: 12, 0x1f, 017 is 17; with underscores.
///
/// # Errors
/// It is none, in words.
pub fn parse_number(text: &str) -> Result<u64, String> {
    let plain = text.replace('_', "");
    let n = match plain.strip_prefix("0x").or_else(|| plain.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => plain.parse(),
    };
    n.map_err(|_| format!("`{text}` is no number; write for example 49170 or 0xc012"))
}

/// Where a device is.
pub(super) enum Holder {
    /// In the machine.
    Slot(Arc<Slot>),
    /// A local APIC that the kernel has.
    KernelLapic(usize),
}

/// A register that was found.
pub(super) struct Found {
    pub(super) holder: Holder,
    pub(super) device: String,
    pub(super) bank: usize,
    pub(super) register: &'static Register,
}

/// `com1` is the first serial port, and so on.
fn alias(name: &str) -> String {
    let lower = name.to_ascii_lowercase();
    match lower.as_str() {
        "com1" => "serial0".into(),
        "com2" => "serial1".into(),
        "com3" => "serial2".into(),
        "com4" => "serial3".into(),
        "lapic" => "lapic0".into(),
        _ => lower,
    }
}

fn chip(machine: &mut Machine, holder: &Holder) -> Option<&'static Chip> {
    match holder {
        Holder::Slot(slot) => Some(slot.chip()),
        Holder::KernelLapic(n) => machine.with_lapic(*n, |d| d.chip()),
    }
}

/// Looks at a device.
pub(super) fn look<R>(machine: &mut Machine, holder: &Holder, f: impl FnOnce(&dyn Device) -> R) -> Option<R> {
    match holder {
        Holder::Slot(slot) => Some(slot.inspect(f)),
        Holder::KernelLapic(n) => machine.with_lapic(*n, f),
    }
}

/// The device of a name: its own, a usual other one, or its chip's if there is only one of that.
fn device(machine: &Machine, name: &str) -> Result<(Holder, String), String> {
    let wanted = alias(name);
    let slots = || machine.pc.devices.iter().map(|p| &p.slot);
    if let Some(slot) = slots().find(|s| s.name().eq_ignore_ascii_case(&wanted)) {
        return Ok((Holder::Slot(slot.clone()), slot.name().to_string()));
    }
    let mut same = slots().filter(|s| s.chip().name.eq_ignore_ascii_case(&wanted));
    if let (Some(slot), None) = (same.next(), same.next()) {
        return Ok((Holder::Slot(slot.clone()), slot.name().to_string()));
    }
    if machine.chips_in_kernel().is_some()
        && let Some(n) = wanted.strip_prefix("lapic").and_then(|n| n.parse().ok())
        && n < usize::from(machine.config.cpus)
    {
        return Ok((Holder::KernelLapic(n), wanted));
    }
    let names: Vec<&str> = slots().map(|s| s.name()).collect();
    let near =
        nearest(&wanted, names.iter().copied()).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
    let kernel = match machine.chips_in_kernel() {
        Some(chips) => format!(" The kernel has {chips}; with kernel-irqchip=off all are here."),
        None => String::new(),
    };
    Err(format!("there is no device `{name}`{near} (there are {}).{kernel}", names.join(", ")))
}

/// A bank's registers that have a name; `MMIO.ID` names the bank too.
fn in_banks(chip: &'static Chip, name: &str) -> Option<(usize, &'static Register)> {
    let (bank, name) = name.rsplit_once('.').map_or((None, name), |(b, n)| (Some(b), n));
    let fits = |b: &&Bank| bank.is_none_or(|n| b.name.eq_ignore_ascii_case(n));
    let mut banks = chip.banks.iter().enumerate().filter(|(_, b)| fits(b));
    banks.find_map(|(i, b)| Some((i, b.named(name)?)))
}

/// The register of a name like `com1.lsr` or `pic.master.imr`.
pub(super) fn find(machine: &mut Machine, name: &str) -> Result<Found, String> {
    let Some((first, rest)) = name.split_once('.') else {
        return Err(format!("`{name}` names no register: write DEVICE.REGISTER, for example com1.lsr"));
    };
    let (holder, device) = device(machine, first)?;
    let chip = chip(machine, &holder).ok_or_else(|| format!("{device}: its state can't be had"))?;
    match in_banks(chip, rest) {
        Some((bank, register)) => Ok(Found { holder, device, bank, register }),
        None => {
            let names: Vec<&str> = chip.banks.iter().flat_map(|b| b.registers).map(|r| r.name).collect();
            let upper = rest.to_ascii_uppercase();
            let near = nearest(&upper, names.iter().copied())
                .map_or(String::new(), |n| format!("; did you mean `{device}.{n}`?"));
            Err(format!("{device} ({}) has no register `{rest}`{near}; `reg {device}` shows all", chip.title))
        }
    }
}

fn line(register: &Register, value: Option<u64>) -> String {
    let when = if register.when.is_empty() { String::new() } else { format!(" [{}]", register.when) };
    let value = match value {
        Some(v) => register.decode(v & register.full_mask()).to_string(),
        None => "- (the model keeps no value)".to_string(),
    };
    format!("+{:02x} {:<16} {value}{when}", register.offset, register.name)
}

/// `reg NAME`.
pub(super) fn show(machine: &mut Machine, name: &str) -> Result<String, String> {
    if name.contains('.') {
        let found = find(machine, name)?;
        let value = look(machine, &found.holder, |d| d.peek(found.bank, found.register)).flatten();
        let r = found.register;
        return Ok(format!("{} {}\n    {} ({})\n", found.device, line(r, value), r.doc, r.section));
    }
    let (holder, device) = device(machine, name)?;
    let chip = chip(machine, &holder).ok_or_else(|| format!("{device}: its state can't be had"))?;
    let mut text = format!("{device}: {}\n", chip.title);
    for (n, bank) in chip.banks.iter().enumerate() {
        let _ = writeln!(text, "  {}:", bank.name);
        for register in bank.registers {
            let value = look(machine, &holder, |d| d.peek(n, register)).flatten();
            let _ = writeln!(text, "    {}", line(register, value));
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(parse_number("0xC0_12"), Ok(49170));
        assert_eq!(parse_number("17"), Ok(17));
        for wrong in ["", "0x", "12h", "-1", "99999999999999999999"] {
            assert!(parse_number(wrong).expect_err("wrong").contains("no number"));
        }
    }
}
