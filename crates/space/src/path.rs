//! The way that an access takes, told layer by layer without making it.

use crate::dispatch::{next_call, next_piece};
use crate::tree::Node;
use crate::view::{FlatRange, Target};
use crate::{AddrRange, AddressSpace, IoError, Kind};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;

/// One region that an access passes, from the root to the one that answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// The region's path.
    pub path: String,
    /// Its own name.
    pub name: String,
    /// Its owner; may be empty.
    pub owner: String,
    /// What it is.
    pub kind: Kind,
    /// Its offset in the layer above. For the target of an alias: the offset in it at which the alias starts.
    pub at: u64,
    /// Is this the target of the alias above?
    pub aliased: bool,
    /// Its priority among its siblings (which says nothing for the root and for the target of an alias).
    pub priority: i32,
    /// Its last offset.
    pub last: u64,
    /// The offset of the access in this region.
    pub offset: u64,
    /// Is it read-only by itself?
    pub readonly: bool,
}

/// Why a region that lies at the address isn't seen there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// A sibling has a higher priority.
    LowerPriority,
    /// A sibling of the same priority was added later.
    AddedEarlier,
    /// A region that it holds answers instead.
    BehindOwnChild,
    /// It is switched off.
    Disabled,
}

/// A region at the address that isn't seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hidden {
    /// The path of the region that would answer.
    pub path: String,
    /// Its owner; may be empty.
    pub owner: String,
    /// What it is.
    pub kind: Kind,
    /// The path of the region whose priority was compared, or which is switched off: it leads to the former, or is it.
    pub through: String,
    /// That region's priority.
    pub priority: i32,
    /// Why.
    pub why: Why,
    /// The path of the sibling or child that is seen instead; none when it is only switched off.
    pub by: Option<String>,
    /// That one's priority.
    pub by_priority: Option<i32>,
}

/// The range of the flat view at the address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PathRange {
    /// Its addresses.
    pub range: AddrRange,
    /// The path of the region that answers.
    pub region: String,
    /// What it is.
    pub kind: Kind,
    /// The offset in the region of the range's first address.
    pub offset: u64,
    /// Memory that can't be written, by whatever layer.
    pub readonly: bool,
}

/// What one step of an access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum StepKind {
    /// Memory is copied.
    Memory,
    /// The device's handler is called; the wanted bytes start `skip` bytes into the call.
    Call {
        /// The offset of the call in the region.
        offset: u64,
        /// The size of the call in bytes.
        width: u8,
        /// The bytes of the call before those wanted.
        skip: u8,
    },
    /// An ioeventfd may be woken instead of a call, if the value matches.
    EventFd,
    /// An IOMMU translates the address.
    Translate,
    /// The region does not take it.
    Refused {
        /// Why.
        #[serde(serialize_with = "as_name")]
        error: IoError,
    },
    /// Nobody is there: reads give all ones, writes are dropped.
    Nobody,
}

fn as_name<S: serde::Serializer>(error: &IoError, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(error.as_str())
}

/// One step of an access, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The address of its first byte.
    pub addr: u64,
    /// How many bytes of the access it makes.
    pub size: u8,
    /// The path of the region; none where nothing is mapped.
    pub region: Option<String>,
    /// What is done.
    #[serde(flatten)]
    pub kind: StepKind,
}

/// The way that an access would take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Path {
    /// The name of the space.
    pub space: String,
    /// The address.
    pub addr: u64,
    /// The size in bytes.
    pub size: u8,
    /// Is it a write?
    pub is_write: bool,
    /// The regions from the root to the one that answers at the first byte; empty when nothing is mapped there.
    pub layers: Vec<Layer>,
    /// The range of the flat view at the first byte.
    pub range: Option<PathRange>,
    /// The steps that the whole access is made of: cut at ends of ranges, then to sizes that the device takes and implements.
    pub steps: Vec<Step>,
    /// The regions at the first byte that aren't seen.
    pub hidden: Vec<Hidden>,
}

impl AddressSpace {
    /// The way that an access of `size` bytes at `addr` would take in the present view. Makes no access, and locks nothing.
    pub fn resolve(&self, addr: u64, size: u8, is_write: bool) -> Path {
        let view = self.view();
        let mut walk = Walk { layers: Vec::new(), hidden: Vec::new() };
        if view.tree.enabled && u128::from(addr) < view.tree.size && !(self.is_ports() && addr > 0xffff) {
            walk.descend(&view.tree, addr, 0, false);
        }
        let mut steps = Vec::new();
        let mut done = 0;
        while done < u64::from(size) {
            let left = u64::from(size) - done;
            let Some(at) = addr.checked_add(done) else {
                steps.push(Step { addr: u64::MAX, size: left as u8, region: None, kind: StepKind::Nobody });
                break;
            };
            let range = view.range_at(at);
            let end = match range {
                Some(range) => Some(range.last - at),
                None => view.hole_end(at).map(|start| start - at - 1),
            };
            let len = end.map_or(left, |more| left.min(more.saturating_add(1)));
            match range {
                Some(range) => range_steps(range, at, len as u8, is_write, &mut steps),
                None => steps.push(Step { addr: at, size: len as u8, region: None, kind: StepKind::Nobody }),
            }
            done += len;
        }
        let range = view.range_at(addr).map(|range| PathRange {
            range: AddrRange { start: range.start, last: range.last },
            region: range.region.path(),
            kind: range.kind,
            offset: range.offset,
            readonly: range.readonly,
        });
        let space = self.name().to_owned();
        Path { space, addr, size, is_write, layers: walk.layers, range, steps, hidden: walk.hidden }
    }
}

/// The steps of a part that is inside of one range.
fn range_steps(range: &FlatRange, addr: u64, len: u8, is_write: bool, steps: &mut Vec<Step>) {
    let region = Some(range.region.path());
    let mut push = |addr, size, kind| steps.push(Step { addr, size, region: region.clone(), kind });
    match (&range.target, is_write) {
        (Target::Ram { .. }, _) | (Target::Rom { .. } | Target::RomDevice { .. }, false) => {
            push(addr, len, StepKind::Memory);
        }
        (Target::Rom { .. }, true) => push(addr, len, StepKind::Refused { error: IoError::ReadOnly }),
        (Target::Iommu(_), _) => push(addr, len, StepKind::Translate),
        (Target::Nobody, _) => push(addr, len, StepKind::Nobody),
        (Target::Io(_) | Target::RomDevice { .. }, _) => {
            let mut done = 0;
            while done < len {
                let offset = range.offset + (addr - range.start) + u64::from(done);
                let (piece, valid) = next_piece(&range.limits, offset, usize::from(len - done));
                let at = addr + u64::from(done);
                if let Err(error) = valid {
                    push(at, piece, StepKind::Refused { error });
                    done += piece;
                    continue;
                }
                let wakes = |event: &crate::IoEventFd| {
                    event.addr == offset && (event.size == 0 || event.size == piece)
                };
                if is_write && range.eventfds.iter().any(wakes) {
                    push(at, piece, StepKind::EventFd);
                }
                let mut made = 0;
                while made < piece {
                    let call = next_call(&range.limits, offset + u64::from(made), usize::from(piece - made));
                    let kind = StepKind::Call { offset: call.offset, width: call.size, skip: call.skip };
                    push(at + u64::from(made), call.wanted, kind);
                    made += call.wanted;
                }
                done += piece;
            }
        }
    }
}

struct Walk {
    layers: Vec<Layer>,
    hidden: Vec<Hidden>,
}

/// Is `offset` of the parent inside of the child? Then: which offset of the child it is.
fn inside(child: &Node, offset: u64) -> Option<u64> {
    offset.checked_sub(child.offset).filter(|at| u128::from(*at) < child.size)
}

impl Walk {
    /// Goes down from an enabled node that has `offset`. True when something answers; then the layers to it have been added.
    fn descend(&mut self, node: &Arc<Node>, offset: u64, at: u64, aliased: bool) -> bool {
        let before = self.layers.len();
        self.layers.push(Layer {
            path: node.region.path(),
            name: node.region.name().to_owned(),
            owner: node.region.owner().to_owned(),
            kind: node.kind,
            at,
            aliased,
            priority: node.priority,
            // The access is inside, so the size isn't 0.
            last: (node.size.max(1) - 1) as u64,
            offset,
            readonly: node.readonly,
        });
        let answers = match &node.target {
            Some((target, start)) => match start.checked_add(offset) {
                Some(inner) if u128::from(inner) < target.size && target.enabled => {
                    self.descend(target, inner, *start, true)
                }
                Some(inner) if u128::from(inner) < target.size => {
                    self.hide(node, target, inner, Why::Disabled, None);
                    false
                }
                _ => false,
            },
            None => self.children(node, offset),
        };
        if !answers {
            self.layers.truncate(before);
        }
        answers
    }

    fn children(&mut self, node: &Arc<Node>, offset: u64) -> bool {
        let mut winner: Option<&Arc<Node>> = None;
        for child in &node.children {
            let Some(inner) = inside(child, offset) else { continue };
            match winner {
                _ if !child.enabled => self.hide(child, child, inner, Why::Disabled, None),
                None => {
                    if self.descend(child, inner, child.offset, false) {
                        winner = Some(child);
                    }
                }
                Some(by) if by.priority == child.priority => {
                    self.hide(child, child, inner, Why::AddedEarlier, Some(by));
                }
                Some(by) => self.hide(child, child, inner, Why::LowerPriority, Some(by)),
            }
        }
        match winner {
            Some(by) if node.claims() => self.hide(node, node, offset, Why::BehindOwnChild, Some(by)),
            _ => {}
        }
        winner.is_some() || node.claims()
    }

    /// Notes what would answer at `offset` of `node`, if anything would.
    fn hide(&mut self, through: &Node, node: &Arc<Node>, offset: u64, why: Why, by: Option<&Arc<Node>>) {
        let own = why == Why::BehindOwnChild;
        let Some(answers) = (if own { Some(node.clone()) } else { probe(node, offset) }) else { return };
        self.hidden.push(Hidden {
            path: answers.region.path(),
            owner: answers.region.owner().to_owned(),
            kind: answers.kind,
            through: through.region.path(),
            priority: through.priority,
            why,
            by: by.map(|by| by.region.path()),
            by_priority: by.map(|by| by.priority),
        });
    }
}

/// What would answer at `offset` of `node`, were the node itself switched on and not hidden.
fn probe(node: &Arc<Node>, offset: u64) -> Option<Arc<Node>> {
    if let Some((target, start)) = &node.target {
        let inner = start.checked_add(offset).filter(|inner| u128::from(*inner) < target.size)?;
        return if target.enabled { probe(target, inner) } else { None };
    }
    let mut children = node.children.iter().filter(|child| child.enabled);
    let found = children.find_map(|child| probe(child, inside(child, offset)?));
    found.or_else(|| node.claims().then(|| node.clone()))
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.is_write { "write" } else { "read" };
        writeln!(f, "{}-byte {verb} at {:#x} ({}) of {}", self.size, self.addr, self.addr, self.space)?;
        for (depth, layer) in self.layers.iter().enumerate() {
            write!(f, "  {:indent$}{} ({}", "", layer.name, layer.kind, indent = 2 * depth)?;
            match (depth, layer.aliased) {
                (0, _) => {}
                (_, true) => write!(f, ", shown from {:#x} on", layer.at)?,
                (_, false) => write!(f, ", at {:#x}, priority {}", layer.at, layer.priority)?,
            }
            if layer.readonly {
                f.write_str(", read-only")?;
            }
            if !layer.owner.is_empty() {
                write!(f, ", of {}", layer.owner)?;
            }
            writeln!(f, "): offset {:#x}", layer.offset)?;
        }
        match &self.range {
            Some(range) => {
                let readonly = if range.readonly { ", read-only" } else { "" };
                writeln!(f, "  flat range {} is {} ({}{readonly})", range.range, range.region, range.kind)?;
            }
            None => writeln!(f, "  nothing is mapped at this address")?,
        }
        for step in &self.steps {
            write!(f, "  {} byte(s) at {:#x}: ", step.size, step.addr)?;
            match step.kind {
                StepKind::Memory => f.write_str("memory")?,
                StepKind::Call { offset, width, skip } => {
                    write!(f, "the device is called with {width} byte(s) at offset {offset:#x}")?;
                    if skip != 0 || width != step.size {
                        write!(f, ", of which {} count from byte {skip} on", step.size)?;
                    }
                }
                StepKind::EventFd => f.write_str("an ioeventfd, if the value matches; else")?,
                StepKind::Translate => f.write_str("an IOMMU translates")?,
                StepKind::Refused { error } => write!(f, "refused: {error}")?,
                StepKind::Nobody => f.write_str("nobody answers")?,
            }
            writeln!(f)?;
        }
        for hidden in &self.hidden {
            write!(f, "  not seen: {} ({})", hidden.path, hidden.kind)?;
            if hidden.through != hidden.path {
                write!(f, " through {}", hidden.through)?;
            }
            let by = hidden.by.as_deref().unwrap_or_default();
            let by_priority = hidden.by_priority.unwrap_or_default();
            match hidden.why {
                Why::LowerPriority => {
                    writeln!(f, ": its priority {} is below {by_priority} of {by}", hidden.priority)?;
                }
                Why::AddedEarlier => {
                    writeln!(f, ": {by} has the same priority {by_priority} and was added later")?;
                }
                Why::BehindOwnChild => writeln!(f, ": its own child {by} is in front")?,
                Why::Disabled => writeln!(f, ": it is switched off")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Io, Limits, Origin, Region};
    use hyaline_ram::RamBlock;

    struct Words;

    impl Io for Words {
        fn limits(&self) -> &Limits {
            const LIMITS: Limits = Limits::sizes(1, 4).implemented(2, 2);
            &LIMITS
        }
        fn read(&self, _: u64, _: u8, _: &Origin) -> Result<u64, IoError> {
            Ok(0)
        }
        fn write(&self, _: u64, _: u8, _: u64, _: &Origin) -> Result<(), IoError> {
            Ok(())
        }
    }

    #[test]
    fn tells_the_way_and_what_it_hides() {
        let system = Region::container("system", 1 << 64);
        let pci = Region::container("pci", 1 << 64);
        let bar = Region::io("bar0", 0x40, std::sync::Arc::new(Words)).with_owner("edu");
        pci.add(0xc000, &bar, 0).expect("fits");
        let window = Region::alias("window", &pci, 0x8000, 0x8000);
        let block = RamBlock::new("ram", 0x10000).expect("memory");
        system.add(0, &Region::ram("ram", block, 0, 0x10000), -1).expect("fits");
        system.add(0x8000, &window, 1).expect("fits");
        let smram = Region::reservation("smram", 0x10000);
        smram.set_enabled(false);
        system.add(0, &smram, 5).expect("fits");
        let space = AddressSpace::new("memory", &system);
        let path = space.resolve(0xc03d, 4, true);
        assert_eq!(
            path.to_string(),
            "4-byte write at 0xc03d (49213) of memory\n\
             \x20 system (container): offset 0xc03d\n\
             \x20   window (alias, at 0x8000, priority 1): offset 0x403d\n\
             \x20     pci (container, shown from 0x8000 on): offset 0xc03d\n\
             \x20       bar0 (i/o, at 0xc000, priority 0, of edu): offset 0x3d\n\
             \x20 flat range 0xc000..=0xc03f is /pci/bar0 (i/o)\n\
             \x20 1 byte(s) at 0xc03d: the device is called with 2 byte(s) at offset 0x3c, of which 1 count from byte 1 on\n\
             \x20 2 byte(s) at 0xc03e: the device is called with 2 byte(s) at offset 0x3e\n\
             \x20 1 byte(s) at 0xc040: memory\n\
             \x20 not seen: /system/smram (reservation): it is switched off\n\
             \x20 not seen: /system/ram (ram): its priority -1 is below 1 of /system/window\n"
        );
        let json = serde_json::to_value(&path).expect("plain data");
        let step = serde_json::json!({
            "addr": 0xc03e, "size": 2, "region": "/pci/bar0", "do": "call", "offset": 0x3e, "width": 2, "skip": 0
        });
        assert_eq!(json["steps"][1], step);
        assert_eq!(json["layers"][0]["last"], u64::MAX);
        let nothing = space.resolve(0x2_0000, 1, false);
        assert_eq!((nothing.layers.len(), nothing.range, nothing.hidden.len()), (0, None, 0));
        assert_eq!(nothing.steps[0].kind, StepKind::Nobody);
        assert_eq!(space.resolve(u64::MAX, 8, false).steps.len(), 1);
    }

    #[test]
    fn tells_why_something_is_hidden() {
        let root = Region::container("root", 0x100);
        let outer = Region::io("outer", 0x100, std::sync::Arc::new(Words));
        outer.add(0, &Region::reservation("own", 0x10), -7).expect("fits");
        let holes = Region::container("holes", 0x100);
        holes.add(0, &Region::reservation("leaf", 0x10), 9).expect("fits");
        holes.add(0, &Region::reservation("behind", 0x20), 8).expect("fits");
        root.add(0, &holes, 0).expect("fits");
        root.add(0, &Region::container("empty", 0x100), 5).expect("fits");
        root.add(0, &outer, 0).expect("fits");
        let space = AddressSpace::new("memory", &root);
        let told: Vec<_> = space.resolve(4, 1, false).hidden;
        let told: Vec<_> = told.iter().map(|h| (h.path.as_str(), h.why, h.by.as_deref())).collect();
        assert_eq!(
            told,
            [
                ("/root/outer", Why::BehindOwnChild, Some("/root/outer/own")),
                ("/root/holes/leaf", Why::AddedEarlier, Some("/root/outer")),
            ],
            "empty containers hide nothing"
        );
        outer.set_enabled(false);
        let path = space.resolve(0x18, 1, false);
        assert_eq!(path.layers.last().map(|layer| layer.name.as_str()), Some("behind"));
        let off = ("/root/outer", Why::Disabled);
        assert_eq!(path.hidden.iter().map(|h| (h.path.as_str(), h.why)).collect::<Vec<_>>(), [off]);
    }
}
