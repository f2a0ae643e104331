//! The exit profile: how often and how long the guest was outside, by register and by function.

mod html;
mod out;

use crate::guest::Guest;
use crate::record::{AccessRecord, Site};
use crate::recorder::Sink;
use crate::text::json_with;
use hyaline_space::{Actor, ExitKind, Outcome};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Pairs of place and instruction that are kept apart; later ones count as "other".
const PAIRS: usize = 100_000;
/// Addresses kept for the map.
const ADDRESSES: usize = 20_000;
/// Accesses kept whole for each processor: the last, and the slowest.
const LAST: usize = 20_000;
const SLOWEST: usize = 50;
/// Columns of a time line.
const BINS: usize = 240;

/// Durations by size: four classes for each doubling of the nanoseconds.
#[derive(Clone)]
struct Histogram(Vec<u32>);

impl Histogram {
    fn class(ns: u32) -> usize {
        let bits = 31 - (ns | 1).leading_zeros();
        let below = if bits >= 2 { ns >> (bits - 2) & 3 } else { 0 };
        (bits * 4 + below) as usize
    }
    /// The smallest duration of a class.
    fn floor(class: usize) -> u64 {
        let (bits, below) = (class as u32 / 4, class as u64 % 4);
        if bits < 2 { 1 << bits } else { (4 + below) << (bits - 2) }
    }
    fn add(&mut self, ns: u32) {
        if let Some(n) = self.0.get_mut(Histogram::class(ns)) {
            *n = n.saturating_add(1);
        }
    }
    /// The duration that `part` of all stay below, to a fifth.
    fn quantile(&self, part: f64) -> u64 {
        let all: u64 = self.0.iter().map(|n| u64::from(*n)).sum();
        let wanted = ((all as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        for (class, n) in self.0.iter().enumerate() {
            seen += u64::from(*n);
            if seen >= wanted {
                return Histogram::floor(class);
            }
        }
        0
    }
    fn merge(&mut self, other: &Histogram) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a = a.saturating_add(*b));
    }
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram(vec![0; 132])
    }
}

/// Numbers over time: the columns get wider as time passes.
#[derive(Clone, Default)]
struct Bins {
    /// Nanoseconds of a column.
    width: u64,
    /// Count and nanoseconds.
    columns: Vec<(u32, u64)>,
}

impl Bins {
    fn widen(&mut self) {
        self.width *= 2;
        let merged = self.columns.chunks(2).map(|c| c.iter().fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)));
        self.columns = merged.collect();
    }
    fn add(&mut self, time: u64, took: u32) {
        if self.width == 0 {
            self.width = 1_000_000;
        }
        while time / self.width >= BINS as u64 {
            self.widen();
        }
        let at = (time / self.width) as usize;
        if self.columns.len() <= at {
            self.columns.resize(at + 1, (0, 0));
        }
        if let Some(c) = self.columns.get_mut(at) {
            c.0 = c.0.saturating_add(1);
            c.1 += u64::from(took);
        }
    }
    fn merge(&mut self, mut other: Bins) {
        if self.width == 0 {
            *self = other;
            return;
        }
        while other.width != 0 && other.width < self.width {
            other.widen();
        }
        while self.width < other.width {
            self.widen();
        }
        if self.columns.len() < other.columns.len() {
            self.columns.resize(other.columns.len(), (0, 0));
        }
        for (a, b) in self.columns.iter_mut().zip(&other.columns) {
            *a = (a.0 + b.0, a.1 + b.1);
        }
    }
}

#[derive(Clone)]
struct Stat {
    site: Arc<Site>,
    is_write: bool,
    size: u8,
    exit: ExitKind,
    count: u64,
    took: u64,
    max: u32,
    failed: u64,
    unassigned: u64,
    split: u64,
    histogram: Histogram,
    bins: Bins,
}

#[derive(Default)]
struct Shard {
    stats: HashMap<(u32, bool), Stat>,
    /// Site, direction, instruction: count and nanoseconds.
    pairs: HashMap<(u32, bool, u64), (u64, u64)>,
    /// Site and address: reads and writes.
    addresses: HashMap<(u32, u64), (u64, u64)>,
    bins: Bins,
    last: VecDeque<(AccessRecord, Arc<Site>)>,
    slowest: Vec<(AccessRecord, Arc<Site>)>,
}

/// What a processor was at, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It waited for an interrupt (HLT, MWAIT) or to be started.
    Waits,
    /// It executed the guest's code.
    Runs {
        /// Where: functions, innermost first. What can't be named is said in parentheses.
        stack: Vec<String>,
        /// How the callers were found, in words; None: they were not.
        by: Option<&'static str>,
    },
}

/// Moments that were looked at.
#[derive(Clone, Debug, Default)]
struct Moments {
    waits: u64,
    runs: u64,
    /// Stacks, outermost function first, with how often they were seen.
    stacks: BTreeMap<Vec<String>, u64>,
    /// How callers were found, how often.
    by: BTreeMap<&'static str, u64>,
}

/// Stacks that are kept apart.
const STACKS: usize = 20_000;

impl Moments {
    fn all(&self) -> u64 {
        self.waits + self.runs
    }
}

/// Collects; attach it to a recorder.
pub struct Profile {
    shards: Vec<Mutex<Shard>>,
    moments: Mutex<Moments>,
    started: Instant,
}

impl std::fmt::Debug for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Profile since {:?}", self.started.elapsed())
    }
}

/// Accesses that are part of another access' handling: PCI configuration registers behind their data port.
fn nested(site: &Site) -> bool {
    site.space == "pci-config"
}

impl Profile {
    /// For `vcpus` processors; everybody else shares one more place.
    pub fn new(vcpus: usize) -> Arc<Profile> {
        let shards = (0..=vcpus).map(|_| Mutex::default()).collect();
        Arc::new(Profile { shards, moments: Mutex::default(), started: Instant::now() })
    }

    /// Takes what one processor is at. To be asked for all processors at regular moments, while no handler is at work.
    pub fn moment(&self, moment: Moment) {
        let mut m = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        match moment {
            Moment::Waits => m.waits += 1,
            Moment::Runs { mut stack, by } => {
                m.runs += 1;
                stack.reverse();
                if by.is_none() && stack.len() == 1 {
                    stack.insert(0, "(callers not known)".into());
                }
                *m.by.entry(by.unwrap_or("not found")).or_default() += 1;
                if m.stacks.len() >= STACKS && !m.stacks.contains_key(&stack) {
                    stack = vec!["(other)".into()];
                }
                *m.stacks.entry(stack).or_default() += 1;
            }
        }
    }

    /// What was collected so far, with names.
    pub fn summary(&self, guest: Option<&Guest>) -> Summary {
        let mut stats: BTreeMap<(u32, bool), Stat> = BTreeMap::new();
        let mut pairs: HashMap<(u32, bool, u64), (u64, u64)> = HashMap::new();
        let mut addresses: BTreeMap<(u32, u64), (u64, u64)> = BTreeMap::new();
        let (mut vcpus, mut accesses) = (Vec::new(), Vec::new());
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (key, s) in &shard.stats {
                match stats.get_mut(key) {
                    None => {
                        stats.insert(*key, s.clone());
                    }
                    Some(t) => {
                        t.count += s.count;
                        t.took += s.took;
                        t.max = t.max.max(s.max);
                        t.failed += s.failed;
                        t.unassigned += s.unassigned;
                        t.split += s.split;
                        t.histogram.merge(&s.histogram);
                        t.bins.merge(s.bins.clone());
                    }
                }
            }
            for (key, n) in &shard.pairs {
                let p = pairs.entry(*key).or_default();
                *p = (p.0 + n.0, p.1 + n.1);
            }
            for (key, n) in &shard.addresses {
                let a = addresses.entry(*key).or_default();
                *a = (a.0 + n.0, a.1 + n.1);
            }
            vcpus.push(shard.bins.clone());
            accesses.extend(shard.last.iter().cloned());
            accesses.extend(shard.slowest.iter().cloned());
        }
        accesses.sort_by_key(|(r, _)| r.seq);
        accesses.dedup_by_key(|(r, _)| r.seq);
        let rip = pairs.keys().map(|k| k.2).max();
        let symbols = guest.and_then(|g| g.search(rip, None));
        let name = |rip: u64| match symbols.as_ref().and_then(|s| s.lookup(rip)) {
            Some((n, _)) => n.to_string(),
            None if rip == 0 => "-".into(),
            None => format!("{rip:#x}"),
        };
        // By site and direction: functions with their counts and times.
        type Callers = Vec<(String, u64, u64)>;
        let mut functions: HashMap<(u32, bool), Callers> = HashMap::new();
        for ((site, is_write, rip), (count, took)) in &pairs {
            let list = functions.entry((*site, *is_write)).or_default();
            let n = name(*rip);
            match list.iter_mut().find(|f| f.0 == n) {
                Some(f) => *f = (n, f.1 + count, f.2 + took),
                None => list.push((n, *count, *took)),
            }
        }
        let mut rows: Vec<Row> = stats
            .into_iter()
            .map(|(key, s)| {
                let mut list = functions.remove(&key).unwrap_or_default();
                list.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
                Row {
                    cells: addresses
                        .range((key.0, 0)..=(key.0, u64::MAX))
                        .map(|((_, addr), (r, w))| (*addr, *r, *w))
                        .collect(),
                    functions: list,
                    stat: s,
                }
            })
            .collect();
        rows.sort_by(|a, b| {
            (b.stat.took, b.stat.count, a.stat.site.id).cmp(&(a.stat.took, a.stat.count, b.stat.site.id))
        });
        let accesses = accesses
            .into_iter()
            .map(|(r, s)| Kept { guest: symbols.as_ref().and_then(|sy| sy.at(r.rip)), record: r, site: s })
            .collect();
        Summary {
            seconds: self.started.elapsed().as_secs_f64(),
            rows,
            vcpus,
            accesses,
            moments: self.moments.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            symbols: symbols.map(|s| s.describe()),
        }
    }
}

impl Sink for Profile {
    fn record(&self, r: &AccessRecord, site: &Arc<Site>) {
        let others = self.shards.len() - 1;
        let index = match r.actor {
            Actor::Vcpu(n) if usize::from(n) < others => usize::from(n),
            _ => others,
        };
        let Some(shard) = self.shards.get(index) else { return };
        let shard = &mut *shard.lock().unwrap_or_else(PoisonError::into_inner);
        let stat = shard.stats.entry((site.id, r.is_write)).or_insert_with(|| Stat {
            site: site.clone(),
            is_write: r.is_write,
            size: r.size,
            exit: r.exit,
            count: 0,
            took: 0,
            max: 0,
            failed: 0,
            unassigned: 0,
            split: 0,
            histogram: Histogram::default(),
            bins: Bins::default(),
        });
        stat.count += 1;
        stat.took += u64::from(r.took);
        stat.max = stat.max.max(r.took);
        stat.failed += u64::from(!r.outcome.is_ok());
        stat.unassigned += u64::from(r.outcome == Outcome::Unassigned);
        stat.split += u64::from(r.parts > 1);
        stat.size = stat.size.max(r.size);
        stat.histogram.add(r.took);
        stat.bins.add(r.time, r.took);
        let full = shard.pairs.len() >= PAIRS && !shard.pairs.contains_key(&(site.id, r.is_write, r.rip));
        let pair = shard.pairs.entry((site.id, r.is_write, if full { 0 } else { r.rip })).or_default();
        *pair = (pair.0 + 1, pair.1 + u64::from(r.took));
        if shard.addresses.len() < ADDRESSES || shard.addresses.contains_key(&(site.id, r.addr)) {
            let a = shard.addresses.entry((site.id, r.addr)).or_default();
            *(if r.is_write { &mut a.1 } else { &mut a.0 }) += 1;
        }
        if !nested(site) {
            shard.bins.add(r.time, r.took);
        }
        if shard.last.len() >= LAST {
            shard.last.pop_front();
        }
        shard.last.push_back((*r, site.clone()));
        let slow =
            shard.slowest.len() < SLOWEST || shard.slowest.first().is_some_and(|(s, _)| s.took < r.took);
        if slow {
            let at = shard.slowest.partition_point(|(s, _)| s.took < r.took);
            shard.slowest.insert(at, (*r, site.clone()));
            if shard.slowest.len() > SLOWEST {
                shard.slowest.remove(0);
            }
        }
    }
}

/// One register in one direction.
struct Row {
    stat: Stat,
    /// Guest functions, the busiest first: name, count, nanoseconds.
    functions: Vec<(String, u64, u64)>,
    /// Address, reads, writes.
    cells: Vec<(u64, u64, u64)>,
}

struct Kept {
    record: AccessRecord,
    site: Arc<Site>,
    guest: Option<String>,
}

/// A finished profile, ready to be printed.
pub struct Summary {
    seconds: f64,
    rows: Vec<Row>,
    vcpus: Vec<Bins>,
    accesses: Vec<Kept>,
    moments: Moments,
    symbols: Option<String>,
}

impl Row {
    fn nested(&self) -> bool {
        nested(&self.stat.site)
    }
    /// `serial0.LSR`, or the region where there is no register.
    fn name(&self) -> String {
        let s = &self.stat.site;
        match (s.register, s.owner.as_str()) {
            // The register is one of the function that the address latch selected, whichever it is.
            (Some(r), _) if s.name == "confdata" => format!("pci-config.{}", r.name),
            (Some(r), "") => format!("{}.{}", s.name, r.name),
            (Some(r), owner) => format!("{owner}.{}", r.name),
            (None, _) if self.stat.unassigned == self.stat.count => {
                format!("(nobody in {})", s.space_label())
            }
            (None, _) => s.label(),
        }
    }
    /// `pio.in/1`.
    fn access(&self) -> String {
        format!("{}/{}", self.stat.exit.as_str(), self.stat.size)
    }
}

impl Kept {
    fn json(&self) -> Value {
        json_with(&self.record, &self.site, self.guest.as_deref())
    }
}

#[cfg(test)]
mod tests;
