//! All accesses of a run, and the first difference between two runs.

use crate::record::{AccessRecord, Site};
use crate::recorder::Sink;
use crate::text::verb;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// One access with its site.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The access.
    pub record: AccessRecord,
    /// Where it arrived.
    pub site: Arc<Site>,
}

impl fmt::Display for Entry {
    /// `OUT 2 bytes 0x0058 io:0xc012 net0.io+12 RAP at rip 0x7c10`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.record, &self.site);
        let size = crate::text::bytes(r.size);
        write!(f, "{} {size} {} {}:{:#x} ({})", verb(r), r.value_text(s), s.space_label(), r.addr, r.addr)?;
        write!(f, " {}+{:02x} {} at rip {:#x}, {}", s.label(), r.offset, s.register_name(), r.rip, r.outcome)
    }
}

/// Keeps every access, up to a limit.
#[derive(Debug)]
pub struct AccessLog {
    entries: Mutex<Vec<Entry>>,
    limit: usize,
}

impl AccessLog {
    /// A log of at most `limit` accesses; later ones are not kept.
    pub fn new(limit: usize) -> Arc<AccessLog> {
        Arc::new(AccessLog { entries: Mutex::default(), limit })
    }
    /// Takes what was logged.
    pub fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }
    /// What was logged.
    pub fn entries(&self) -> Vec<Entry> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Sink for AccessLog {
    fn record(&self, record: &AccessRecord, site: &Arc<Site>) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() < self.limit {
            entries.push(Entry { record: *record, site: site.clone() });
        }
    }
}

/// How two logs are compared. Who, how, where, which register, what value and what came of it always are; times never.
#[derive(Clone, Debug)]
pub struct Compare<'a> {
    /// What the first log is called.
    pub first: &'a str,
    /// What the second log is called.
    pub second: &'a str,
    /// Compare the guest's instruction pointers too.
    pub rip: bool,
}

/// The first difference between two logs.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Number of accesses that are the same before it.
    pub same: usize,
    /// What differs: `value`, `address` …; `length` when one log ends.
    pub what: Vec<&'static str>,
    /// The access of the first log.
    pub first: Option<Entry>,
    /// The access of the second log.
    pub second: Option<Entry>,
    text: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The first difference between two logs; None when they are the same.
pub fn compare(a: &[Entry], b: &[Entry], how: &Compare<'_>) -> Option<Difference> {
    let longest = a.len().max(b.len());
    (0..longest).find_map(|i| match (a.get(i), b.get(i)) {
        (Some(x), Some(y)) => {
            let what = differing(x, y, how.rip);
            (!what.is_empty()).then(|| different(i, what, x, y, how))
        }
        (Some(x), None) => Some(ended(i, Some(x), None, how)),
        (None, Some(y)) => Some(ended(i, None, Some(y), how)),
        (None, None) => None,
    })
}

fn differing(x: &Entry, y: &Entry, rip: bool) -> Vec<&'static str> {
    let (p, q) = (&x.record, &y.record);
    let register = |e: &Entry| e.site.register.map(|r| (r.name, r.offset));
    let checks = [
        ("actor", p.actor == q.actor),
        ("exit kind", p.exit == q.exit),
        ("address space", x.site.space == y.site.space),
        ("address", p.addr == q.addr),
        ("size", p.size == q.size),
        ("direction", p.is_write == q.is_write),
        ("region", x.site.path == y.site.path && p.offset == q.offset),
        ("register", register(x) == register(y)),
        ("outcome", p.outcome == q.outcome),
        ("value", p.value == q.value),
        ("string element", p.count == q.count),
        ("instruction pointer", !rip || p.rip == q.rip),
    ];
    checks.iter().filter(|(_, same)| !same).map(|(name, _)| *name).collect()
}

fn same(n: usize) -> String {
    match n {
        0 => "They differ from the first access on".to_string(),
        1 => "The first access is the same, the second differs".to_string(),
        n => format!("The first {n} accesses are the same, number {} differs", n + 1),
    }
}

fn different(i: usize, what: Vec<&'static str>, x: &Entry, y: &Entry, how: &Compare<'_>) -> Difference {
    let width = how.first.len().max(how.second.len());
    let mut text = format!("{} in its {}:\n", same(i), what.join(", "));
    for (name, entry) in [(how.first, x), (how.second, y)] {
        text += &format!("  {name:width$}  {entry}\n");
    }
    text.pop();
    Difference { same: i, what, first: Some(x.clone()), second: Some(y.clone()), text }
}

fn ended(i: usize, x: Option<&Entry>, y: Option<&Entry>, how: &Compare<'_>) -> Difference {
    let (short, long) = if x.is_none() { (how.first, how.second) } else { (how.second, how.first) };
    let next = x.or(y).map(ToString::to_string).unwrap_or_default();
    let text = format!("{i} accesses are the same, then {short} ends; {long} goes on with:\n  {next}");
    Difference { same: i, what: vec!["length"], first: x.cloned(), second: y.cloned(), text }
}
