//! Accesses: the last ones, their way, and stops at them.

use super::names::{Found, find, parse_number};
use hyaline_device::Register;
use hyaline_machine::Machine;
use hyaline_machine::chassis::{Core, Event};
use hyaline_machine::debug::{Stopped, Why};
use hyaline_space::Actor;
use hyaline_watch::{AccessRecord, HEADER, Line, Sink, Site, Teller};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Is a record's site this register of this device?
fn is_at(record: &AccessRecord, site: &Site, device: &str, register: &Register) -> bool {
    // All local APICs are behind one window; who sees which is decided by who asks.
    let owner = record.device(site) == device;
    owner && site.register.is_some_and(|r| r.name == register.name && r.offset == register.offset)
}

fn line(machine: &Machine, record: &AccessRecord) -> Option<String> {
    let site = machine.recorder.site(record.site)?;
    let guest = (record.rip != 0).then(|| machine.guest.name(record.rip)).flatten();
    Some(format!("{}\n", Line { record, site: &site, guest: guest.as_deref() }))
}

/// The last accesses.
pub(super) fn last(machine: &Machine, n: usize) -> String {
    let records = machine.recorder.last(n.min(100_000));
    if records.is_empty() {
        return "there was no access to a device yet\n".into();
    }
    format!("{HEADER}\n") + &records.iter().filter_map(|r| line(machine, r)).collect::<String>()
}

/// The last access to a register.
pub(super) fn last_of(machine: &mut Machine, name: &str) -> Result<String, String> {
    let found = find(machine, name)?;
    let records = machine.recorder.last(usize::MAX);
    let hit = records
        .iter()
        .rev()
        .find(|r| machine.recorder.site(r.site).is_some_and(|s| is_at(r, &s, &found.device, found.register)));
    match hit.and_then(|r| line(machine, r)) {
        Some(text) => Ok(format!("{HEADER}\n{text}")),
        None => Err(format!(
            "{}.{} is not among the last {} accesses that are kept",
            found.device,
            found.register.name,
            records.len()
        )),
    }
}

/// The way of an access: the last, or the one of a number.
pub(super) fn explain(machine: &Machine, number: Option<u64>) -> Result<String, String> {
    let records = machine.recorder.last(usize::MAX);
    let record = match number {
        None => records.last(),
        Some(n) => records.iter().find(|r| r.seq == n),
    };
    let record = record.ok_or_else(|| match (number, records.first(), records.last()) {
        (Some(n), Some(a), Some(b)) => {
            format!(
                "explain: access {n} is not kept; there are some of {} to {} (`last` shows them)",
                a.seq, b.seq
            )
        }
        _ => "explain: there was no access to a device yet".to_string(),
    })?;
    let site = machine.recorder.site(record.site).ok_or("explain: the access's site is unknown")?;
    let pc = &machine.pc;
    let space = [&pc.memory, &pc.ports, &pc.config_space].into_iter().find(|s| s.name() == site.space);
    let space = space.ok_or_else(|| format!("explain: the address space `{}` is gone", site.space))?;
    let runner = machine.accel().runner(&machine.config);
    let path = space.resolve(record.addr, record.size, record.is_write);
    let told = Teller { runner }.tell(&path, record, &site);
    Ok(format!("access {} at {} ns\n{told}", record.seq, record.time))
}

/// On which values a stop is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    Any,
    Equal(u64),
    Mask(u64),
}

impl Condition {
    /// `value=0x83`, `value==0x83`, `value&0x80`.
    pub(super) fn parse(text: &str) -> Result<Condition, String> {
        let wrong = || {
            format!("`when {text}`: write when value=V or when value&MASK (stops if one of its bits is set)")
        };
        let rest = text.strip_prefix("value").ok_or_else(wrong)?.trim();
        if let Some(mask) = rest.strip_prefix('&') {
            return Ok(Condition::Mask(parse_number(mask.trim())?));
        }
        let value = rest.strip_prefix("==").or_else(|| rest.strip_prefix('=')).ok_or_else(wrong)?;
        Ok(Condition::Equal(parse_number(value.trim())?))
    }

    fn holds(self, value: u64) -> bool {
        match self {
            Condition::Any => true,
            Condition::Equal(v) => v == value,
            Condition::Mask(m) => value & m != 0,
        }
    }
}

/// Stops the machine after an access.
pub(super) struct Stopper {
    core: Arc<Core>,
    device: String,
    register: &'static Register,
    is_write: Option<bool>,
    condition: Condition,
    hits: AtomicU64,
}

impl Stopper {
    pub(super) fn new(
        core: Arc<Core>,
        found: &Found,
        is_write: Option<bool>,
        condition: Condition,
    ) -> Stopper {
        let device = found.device.clone();
        Stopper { core, device, register: found.register, is_write, condition, hits: AtomicU64::new(0) }
    }
    pub(super) fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }
    pub(super) fn text(&self) -> String {
        let how = match self.is_write {
            None => "accesses to",
            Some(false) => "reads of",
            Some(true) => "writes to",
        };
        let when = match self.condition {
            Condition::Any => String::new(),
            Condition::Equal(v) => format!(" when the value is {v:#x}"),
            Condition::Mask(m) => format!(" when the value has a bit of {m:#x}"),
        };
        format!("{how} {}.{}{when}", self.device, self.register.name)
    }
}

impl Sink for Stopper {
    fn record(&self, record: &AccessRecord, site: &Arc<Site>) {
        let wanted = self.is_write.is_none_or(|w| w == record.is_write)
            && is_at(record, site, &self.device, self.register)
            && self.condition.holds(record.value);
        if !wanted {
            return;
        }
        self.hits.fetch_add(1, Ordering::Relaxed);
        let cpu = match record.actor {
            Actor::Vcpu(n) => n,
            _ => 0,
        };
        let verb = if record.is_write { "write of" } else { "read of" };
        let text = format!(
            "access {}: {verb} {} to {}.{} by the instruction at {:#x}",
            record.seq,
            record.value_text(site),
            self.device,
            self.register.name,
            record.rip
        );
        let text = if record.is_write { text } else { text.replacen(" to ", " from ", 1) };
        self.core.event(Event::Debug(Stopped { cpu, why: Why::Access(text) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions() {
        assert_eq!(Condition::parse("value=0x83"), Ok(Condition::Equal(0x83)));
        assert_eq!(Condition::parse("value&128"), Ok(Condition::Mask(128)));
        assert!(Condition::Mask(6).holds(2) && !Condition::Mask(6).holds(8));
        for wrong in ["", "value", "value>3", "size=2"] {
            assert!(Condition::parse(wrong).expect_err("wrong").contains("write when value=V"));
        }
    }
}
