//! The flat view: what is at each address.

use crate::flatten::{Claim, flatten};
use crate::listener::IoEventFd;
use crate::region::Body;
use crate::tree::Node;
use crate::{AddrRange, Io, Kind, Limits, Observer, Region, Translate};
use hyaline_ram::RamBlock;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many ports there are.
pub(crate) const PORTS: u64 = 0x1_0000;

/// What an access to a range reaches.
#[derive(Clone)]
pub(crate) enum Target {
    /// Memory; `base` is the offset in the block of the range's start.
    Ram { block: Arc<RamBlock>, base: u64 },
    /// Memory that can't be written.
    Rom { block: Arc<RamBlock>, base: u64 },
    /// A ROM device in ROM mode.
    RomDevice { block: Arc<RamBlock>, base: u64, io: Arc<dyn Io> },
    /// A device.
    Io(Arc<dyn Io>),
    /// A translation.
    Iommu(Arc<dyn Translate>),
    /// A reservation.
    Nobody,
}

/// One range of a view, with all that dispatching needs.
#[derive(Clone)]
pub(crate) struct FlatRange {
    pub(crate) start: u64,
    pub(crate) last: u64,
    /// The offset in the region of `start`.
    pub(crate) offset: u64,
    pub(crate) target: Target,
    /// Sizes of which an aligned access goes to the handler as it is.
    pub(crate) straight: u8,
    pub(crate) readonly: bool,
    pub(crate) romd: bool,
    pub(crate) log: u8,
    pub(crate) coalesced: bool,
    pub(crate) kind: Kind,
    pub(crate) limits: Limits,
    pub(crate) eventfds: Arc<[IoEventFd]>,
    pub(crate) region: Region,
}

impl FlatRange {
    fn new(claim: &Claim) -> FlatRange {
        let node = &claim.node;
        let base = |offset: &u64| offset + claim.offset;
        let target = match &node.region.0.body {
            Body::Ram { block, offset } if claim.readonly => {
                Target::Rom { block: block.clone(), base: base(offset) }
            }
            Body::Ram { block, offset } => Target::Ram { block: block.clone(), base: base(offset) },
            Body::RomDevice { block, offset, io } if node.romd => {
                Target::RomDevice { block: block.clone(), base: base(offset), io: io.clone() }
            }
            Body::RomDevice { io, .. } | Body::Io(io) => Target::Io(io.clone()),
            Body::Iommu(translate) => Target::Iommu(translate.clone()),
            Body::Container | Body::Alias { .. } | Body::Reservation => Target::Nobody,
        };
        let limits = match &target {
            Target::Io(io) | Target::RomDevice { io, .. } => io.limits().normal(),
            _ => Limits::DEFAULT,
        };
        FlatRange {
            start: claim.start,
            last: claim.last,
            offset: claim.offset,
            straight: limits.straight(),
            target,
            readonly: claim.readonly || node.kind == Kind::RomDevice,
            romd: node.romd,
            log: node.log,
            coalesced: node.coalesced,
            kind: node.kind,
            limits,
            eventfds: node.eventfds.clone(),
            region: node.region.clone(),
        }
    }

    #[inline]
    pub(crate) fn contains(&self, addr: u64) -> bool {
        self.start <= addr && addr <= self.last
    }

    /// Are both the same place of the same region in the same mode? What is behind them is then the same, too.
    pub(crate) fn same_place(&self, other: &FlatRange) -> bool {
        (self.start, self.last, self.offset, self.readonly, self.romd)
            == (other.start, other.last, other.offset, other.readonly, other.romd)
            && self.region == other.region
    }

    /// The section from `addr`, which is inside, to the range's end.
    pub(crate) fn section(&self, addr: u64) -> Section {
        let skip = addr - self.start;
        let host = match &self.target {
            Target::Ram { block, base }
            | Target::Rom { block, base }
            | Target::RomDevice { block, base, .. } => {
                Some(HostRange { block: block.clone(), offset: base + skip })
            }
            _ => None,
        };
        Section {
            region: self.region.clone(),
            region_offset: self.offset + skip,
            range: AddrRange { start: addr, last: self.last },
            kind: self.kind,
            readonly: self.readonly,
            romd: self.romd,
            log: self.log,
            host,
        }
    }
}

/// Memory of the host behind a section.
#[derive(Clone, Debug)]
pub struct HostRange {
    /// The block.
    pub block: Arc<RamBlock>,
    /// The offset in the block of the section's first byte.
    pub offset: u64,
}

impl PartialEq for HostRange {
    fn eq(&self, other: &HostRange) -> bool {
        Arc::ptr_eq(&self.block, &other.block) && self.offset == other.offset
    }
}

impl Eq for HostRange {}

/// A range of a view, or the part of one from some address on. All its offsets are those of its first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The region that is seen.
    pub region: Region,
    /// The offset in the region of the section's first byte.
    pub region_offset: u64,
    /// The addresses in the space.
    pub range: AddrRange,
    /// What the region is. A container or an alias never is at the end of the way.
    pub kind: Kind,
    /// Writes don't reach memory: ROM, RAM made read-only, ROM devices.
    pub readonly: bool,
    /// A ROM device in ROM mode (true for all else).
    pub romd: bool,
    /// The dirty clients that log writes, as bits.
    pub log: u8,
    /// The memory that reads come from: RAM, ROM, ROM devices in ROM mode.
    pub host: Option<HostRange>,
}

impl Section {
    /// Memory that can be read and written directly?
    pub fn is_ram(&self) -> bool {
        self.host.is_some() && !self.readonly
    }
}

/// What is at each address of a space, at one moment. It never changes; a change of the graph makes a new one.
#[derive(Clone)]
pub struct FlatView {
    pub(crate) ranges: Box<[FlatRange]>,
    /// The last address of each range, for the search.
    lasts: Box<[u64]>,
    /// For port spaces: the index of the range at each port, 0xffff for none. (With 65,536 ranges there is no "none".)
    ports: Option<Box<[u16; PORTS as usize]>>,
    pub(crate) tree: Arc<Node>,
    pub(crate) observer: Option<Arc<dyn Observer>>,
    pub(crate) generation: u64,
}

impl fmt::Debug for FlatView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges =
            self.ranges.iter().map(|r| (AddrRange { start: r.start, last: r.last }, &r.region, r.offset));
        f.debug_list().entries(ranges).finish()
    }
}

/// A number that no other view of this process has.
pub(crate) fn next_generation() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl FlatView {
    /// Makes the view of a root; inside of a transaction.
    pub(crate) fn build(root: &Region, ports: bool, observer: Option<Arc<dyn Observer>>) -> FlatView {
        let tree = Node::snapshot(root);
        let claims = flatten(&tree, if ports { PORTS.into() } else { 1 << 64 });
        let ranges: Box<[FlatRange]> = claims.iter().map(FlatRange::new).collect();
        FlatView {
            lasts: ranges.iter().map(|range| range.last).collect(),
            ports: ports.then(|| port_table(&ranges)),
            ranges,
            tree,
            observer,
            generation: next_generation(),
        }
    }

    /// The index of the range at `addr`.
    #[inline]
    pub(crate) fn find(&self, addr: u64) -> Option<usize> {
        match &self.ports {
            Some(table) => {
                let index = usize::from(table[usize::from(u16::try_from(addr).ok()?)]);
                (index < self.ranges.len()).then_some(index)
            }
            None => {
                let index = self.lasts.partition_point(|last| *last < addr);
                self.ranges.get(index).filter(|range| range.start <= addr).map(|_| index)
            }
        }
    }

    #[inline]
    pub(crate) fn range_at(&self, addr: u64) -> Option<&FlatRange> {
        self.ranges.get(self.find(addr)?)
    }

    /// The first address above `addr`, which is in a hole, that is not in a hole.
    pub(crate) fn hole_end(&self, addr: u64) -> Option<u64> {
        self.ranges.get(self.lasts.partition_point(|last| *last < addr)).map(|range| range.start)
    }

    /// Do accesses take the same way in both views?
    pub(crate) fn dispatches_as(&self, other: &FlatView) -> bool {
        let same = |a: &FlatRange, b: &FlatRange| {
            a.same_place(b) && a.log == b.log && a.coalesced == b.coalesced && a.eventfds == b.eventfds
        };
        let observers = match (&self.observer, &other.observer) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        observers
            && self.ranges.len() == other.ranges.len()
            && self.ranges.iter().zip(&other.ranges).all(|(a, b)| same(a, b))
    }

    /// A number that changes whenever anything about dispatching changes; never 0.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All ranges, ascending.
    pub fn sections(&self) -> impl ExactSizeIterator<Item = Section> + '_ {
        self.ranges.iter().map(|range| range.section(range.start))
    }

    /// What is at `addr`: the section from there to the end of its range.
    pub fn lookup(&self, addr: u64) -> Option<Section> {
        self.range_at(addr).map(|range| range.section(addr))
    }
}

fn port_table(ranges: &[FlatRange]) -> Box<[u16; PORTS as usize]> {
    let mut table = Box::new([u16::MAX; PORTS as usize]);
    for (index, range) in ranges.iter().enumerate() {
        // Views of port spaces end at the last port, and there are at most 65,536 disjoint ranges.
        table[range.start as usize..=range.last as usize].fill(index as u16);
    }
    table
}
