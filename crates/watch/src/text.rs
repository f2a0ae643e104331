//! Records in words: one line each, or one JSON object each.

use crate::record::{AccessRecord, Site};
use crate::recorder::Count;
use hyaline_space::{Actor, ExitKind, Outcome};
use serde_json::{Value, json as object};
use std::fmt;

/// Heads the columns of [`Line`].
pub const HEADER: &str = "#        time              vcpu exit       access               region+offset            register         value                          took     guest";

/// One access in one line, and a line for each thing about it that is unusual.
pub struct Line<'a> {
    /// The access.
    pub record: &'a AccessRecord,
    /// Where it arrived.
    pub site: &'a Site,
    /// The guest's function, if it is known.
    pub guest: Option<&'a str>,
}

/// Seconds, with milli-, micro- and nanoseconds apart: `0.412 318 220`.
fn time(ns: u64) -> String {
    format!("{}.{:03} {:03} {:03}", ns / 1_000_000_000, ns / 1_000_000 % 1000, ns / 1000 % 1000, ns % 1000)
}

/// A duration in the unit that fits.
pub(crate) fn duration(ns: u32) -> String {
    match ns {
        u32::MAX => ">4.2s".to_string(),
        0..10_000 => format!("{ns}ns"),
        10_000..10_000_000 => format!("{}us", ns / 1000),
        _ => format!("{}ms", ns / 1_000_000),
    }
}

impl AccessRecord {
    /// The value with the names of its fields, if the register was accessed in its own width or wider.
    pub fn value_text(&self, site: &Site) -> String {
        match site.register.filter(|r| r.width <= self.size && !r.fields.is_empty()) {
            Some(r) => {
                let words = r.decode(self.value & r.full_mask()).words().join("|");
                let plain = format!("{:#0w$x}", self.value, w = 2 + 2 * usize::from(self.size));
                if words.is_empty() { plain } else { format!("{plain} {words}") }
            }
            None => format!("{:#0w$x}", self.value, w = 2 + 2 * usize::from(self.size)),
        }
    }

    /// What is unusual about the access, in sentences.
    pub fn findings(&self, site: &Site) -> Vec<String> {
        let mut found = Vec::new();
        match self.outcome {
            Outcome::Ok => {}
            Outcome::Unassigned if self.is_write => {
                found.push("nobody is at this address: the write was dropped".to_string())
            }
            Outcome::Unassigned => {
                found.push("nobody is at this address: the read gave all ones".to_string())
            }
            Outcome::Failed(error) => {
                let then = if self.is_write { "the write was dropped" } else { "the read gave all ones" };
                found.push(format!("not done: {error}; {then}"));
            }
        }
        if let Some(r) = site.register.filter(|_| self.parts > 0) {
            if self.parts > 1 {
                found.push(format!(
                    "split: {} bytes in {} calls of the device; {} is the first register",
                    self.size, self.parts, r.name
                ));
            } else if self.size > r.width {
                found.push(format!(
                    "width: {} has {}, the access {}",
                    r.name,
                    bytes(r.width),
                    bytes(self.size)
                ));
            }
        }
        found
    }

    /// The processor's number, or `-`.
    fn vcpu(&self) -> String {
        match self.actor {
            Actor::Vcpu(n) => n.to_string(),
            _ => "-".to_string(),
        }
    }
}

/// A number of bytes in words.
pub(crate) fn bytes(n: u8) -> String {
    if n == 1 { "1 byte".to_string() } else { format!("{n} bytes") }
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (self.record, self.site);
        let access = format!("{}:{:#x}/{}", s.space_label(), r.addr, crate::filter::length(r));
        let string =
            if r.count > 0 && r.exit != ExitKind::Dma { format!("[{}]", r.count) } else { String::new() };
        let region = match r.outcome {
            Outcome::Unassigned => "-".to_string(),
            _ if r.exit == ExitKind::Dma => s.label(),
            _ => format!("{}+{:02x}", s.label(), r.offset),
        };
        let odd = s.register.is_some_and(|reg| reg.width != r.size && r.parts > 0);
        let register = match s.register.filter(|_| odd) {
            Some(reg) => format!("{}!w{}", reg.name, reg.width),
            None => s.register_name().to_string(),
        };
        let guest = match self.guest {
            Some(name) => name.to_string(),
            None if r.rip == 0 => "-".to_string(),
            None => format!("{:#x}", r.rip),
        };
        write!(
            f,
            "{:<8} {:<17} {:<4} {:<10} {:<20} {:<24} {:<16} {:<30} {:<8} {guest}",
            r.seq,
            time(r.time),
            r.vcpu(),
            r.exit.as_str(),
            access + &string,
            region,
            register,
            r.value_text(s),
            duration(r.took),
        )?;
        for finding in r.findings(s) {
            write!(f, "\n   ! {finding}")?;
        }
        Ok(())
    }
}

/// One access as a JSON object; the same words as in [`Line`], numbers as numbers.
pub fn json(record: &AccessRecord, site: &Site) -> Value {
    json_with(record, site, None)
}

/// The same with the guest's function.
pub(crate) fn json_with(record: &AccessRecord, site: &Site, guest: Option<&str>) -> Value {
    let r = record;
    let id = match r.actor {
        Actor::Vcpu(n) => Some(u32::from(n)),
        Actor::Dma(d) => Some(u32::from(d.0)),
        _ => None,
    };
    object!({
        "seq": r.seq, "time_ns": r.time, "took_ns": r.took, "actor": r.actor.as_str(), "actor_id": id, "exit": r.exit.as_str(), "rip": r.rip, "guest": guest,
        "space": site.space, "addr": r.addr, "size": crate::filter::length(r), "write": r.is_write, "value": r.value, "element": r.count,
        "region": site.path, "owner": r.device(site), "offset": r.offset, "register": site.register.map(|x| x.name),
        "fields": site.register.map(|x| x.decode(r.value & x.full_mask()).words()), "calls": r.parts, "outcome": r.outcome.as_str(),
    })
}

/// Accesses by device and register, the busiest device first, as a table. Of each device at most `registers` registers are named; the
/// rest is one line.
pub fn summary(counts: &[Count], registers: usize) -> String {
    use fmt::Write;
    let all = |c: &Count| c.reads + c.writes;
    let mut devices: Vec<(String, Vec<&Count>)> = Vec::new();
    for c in counts.iter().filter(|c| all(c) > 0) {
        let nobody = c.site.register.is_none() && c.failed == all(c);
        let name = match (nobody, c.site.owner.as_str()) {
            (true, _) => "(nobody)".to_string(),
            (false, "") => c.site.label(),
            (false, owner) => owner.to_string(),
        };
        match devices.iter_mut().find(|(n, _)| *n == name) {
            Some((_, list)) => list.push(c),
            None => devices.push((name, vec![c])),
        }
    }
    let total = |list: &[&Count], f: fn(&Count) -> u64| list.iter().map(|c| f(c)).sum::<u64>();
    devices.sort_by_key(|(_, list)| std::cmp::Reverse(total(list, |c| c.reads + c.writes)));
    let mut text =
        format!("{:>9} {:>9} {:>9} {:>9}  device, register\n", "accesses", "reads", "writes", "not done");
    let mut line = |list: &[&Count], name: &str| {
        let [reads, writes, failed] =
            [total(list, |c| c.reads), total(list, |c| c.writes), total(list, |c| c.failed)];
        let _ = writeln!(text, "{:>9} {reads:>9} {writes:>9} {failed:>9}  {name}", reads + writes);
    };
    for (name, list) in &devices {
        line(list, name);
        let named: Vec<&Count> = list.iter().copied().filter(|c| c.site.register.is_some()).collect();
        let (shown, rest) = named.split_at(named.len().min(registers));
        for c in shown {
            line(&[c], &format!("  {}", c.site.register_name()));
        }
        if !rest.is_empty() && registers > 0 {
            line(rest, &format!("  {} more registers", rest.len()));
        }
    }
    text
}

/// The direction in words.
pub(crate) fn verb(record: &AccessRecord) -> &'static str {
    match (record.exit, record.is_write) {
        (ExitKind::PioIn, _) => "IN",
        (ExitKind::PioOut, _) => "OUT",
        (_, true) => "write",
        (_, false) => "read",
    }
}
