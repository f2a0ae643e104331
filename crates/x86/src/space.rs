//! The address space, as far as the processor uses it, until `hyaline-space` has its own: the names and meanings are the same.

use hyaline_ram::RamBlock;
use std::ops::Range;
use std::sync::{Arc, RwLock};

/// Who makes an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A virtual processor.
    Vcpu(u8),
}
/// The way an access left the guest.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    PioIn,
    PioOut,
    MmioRead,
    MmioWrite,
}
/// Where an access comes from.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    pub actor: Actor,
    pub exit: ExitKind,
    pub rip: u64,
    pub count: u32,
    pub seq: u64,
}
/// What came of an access.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Unassigned,
}
/// A place in a RAM block.
#[allow(missing_docs)]
#[derive(Clone, Debug)]
pub struct HostRange {
    pub block: Arc<RamBlock>,
    pub offset: u64,
}
/// A section of the flat view.
#[allow(missing_docs)]
#[derive(Clone, Debug)]
pub struct Section {
    pub range: Range<u64>,
    pub readonly: bool,
    pub host: Option<HostRange>,
}
/// Physical memory or ports.
#[derive(Clone, Debug, Default)]
pub struct AddressSpace(Arc<RwLock<Vec<(u64, Arc<RamBlock>, bool)>>>);

impl AddressSpace {
    /// Adds RAM (or ROM).
    pub fn add_ram(&self, base: u64, block: Arc<RamBlock>, readonly: bool) {
        if let Ok(mut list) = self.0.write() {
            list.push((base, block, readonly));
        }
    }
    /// The section at an address. `host.offset` is that of the section's start.
    pub fn lookup(&self, addr: u64) -> Option<Section> {
        let list = self.0.read().ok()?;
        let (base, block, readonly) =
            list.iter().find(|(base, block, _)| addr.checked_sub(*base).is_some_and(|o| o < block.len()))?;
        Some(Section {
            range: *base..base + block.len(),
            readonly: *readonly,
            host: Some(HostRange { block: block.clone(), offset: 0 }),
        })
    }
    /// One read.
    pub fn load(&self, addr: u64, size: u8, _who: &Origin) -> (u64, Outcome) {
        let found = self.lookup(addr).and_then(|s| s.host?.block.load(addr - s.range.start, size));
        found.map_or((u64::MAX >> (64 - 8 * u32::from(size)), Outcome::Unassigned), |v| (v, Outcome::Ok))
    }
    /// One write.
    pub fn store(&self, addr: u64, size: u8, value: u64, _who: &Origin) -> Outcome {
        let Some(s) = self.lookup(addr).filter(|s| !s.readonly) else { return Outcome::Unassigned };
        let data = value.to_le_bytes();
        let done = s.host.map(|h| h.block.write(addr - s.range.start, &data[..usize::from(size)]));
        if matches!(done, Some(Ok(()))) { Outcome::Ok } else { Outcome::Unassigned }
    }
}
