//! Which memory slots a memory map needs: pure computation.
//!
//! A slot is a range of guest-physical addresses with memory of this process behind it, page aligned on both sides (Linux,
//! `Documentation/virt/kvm/api.rst`, `KVM_SET_USER_MEMORY_REGION`).

use hyaline_ram::RamBlock;
use hyaline_space::Section;
use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: u64 = 4096;

/// A page-aligned piece of guest memory.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) block: Arc<RamBlock>,
    /// Offset in the block of the first byte.
    pub(crate) offset: u64,
    pub(crate) readonly: bool,
    /// Writes are logged.
    pub(crate) log: bool,
}

impl Piece {
    /// The part of a section that a slot can hold; none when it isn't memory or covers no whole page.
    pub(crate) fn of(section: &Section, log: bool) -> Option<Piece> {
        let host = section.host.as_ref()?;
        let start = section.range.start.checked_next_multiple_of(PAGE)?;
        // The end is exclusive; a section that reaches the last address of all loses its last page, where no memory is.
        let end = section.range.last.saturating_add(1) / PAGE * PAGE;
        let offset = host.offset.checked_add(start - section.range.start)?;
        let fits = start < end && offset % PAGE == 0 && offset.checked_add(end - start)? <= host.block.len();
        fits.then(|| Piece {
            gpa: start,
            size: end - start,
            block: host.block.clone(),
            offset,
            readonly: section.readonly,
            log,
        })
    }

    fn same_memory(&self, other: &Piece) -> bool {
        (self.gpa, self.size, self.offset, self.readonly)
            == (other.gpa, other.size, other.offset, other.readonly)
            && Arc::ptr_eq(&self.block, &other.block)
    }

    fn overlaps(&self, other: &Piece) -> bool {
        self.gpa < other.gpa.saturating_add(other.size) && other.gpa < self.gpa.saturating_add(self.size)
    }

    fn continued_by(&self, next: &Piece) -> bool {
        self.gpa.checked_add(self.size) == Some(next.gpa)
            && self.offset.checked_add(self.size) == Some(next.offset)
            && (self.readonly, self.log) == (next.readonly, next.log)
            && Arc::ptr_eq(&self.block, &next.block)
    }
}

/// Puts adjacent pieces together. `pieces` come in ascending order.
pub(crate) fn merge<'a>(pieces: impl IntoIterator<Item = &'a Piece>) -> Vec<Piece> {
    let mut merged: Vec<Piece> = Vec::new();
    for piece in pieces {
        match merged.last_mut() {
            Some(last) if last.continued_by(piece) => last.size += piece.size,
            _ => merged.push(piece.clone()),
        }
    }
    merged
}

/// A slot that the kernel has.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) id: u32,
    pub(crate) piece: Piece,
}

/// The steps from the slots there are to those that shall be, in this order: delete, flag, create.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) delete: Vec<Slot>,
    /// Slots that only change their logging: the flag's new value is in the piece.
    pub(crate) flag: Vec<Slot>,
    pub(crate) create: Vec<Piece>,
    /// Memory that is there before and after is missing in between: no vCPU may run meanwhile.
    pub(crate) disruptive: bool,
}

pub(crate) fn plan(have: &BTreeMap<u64, Slot>, want: &[Piece]) -> Plan {
    let mut plan = Plan::default();
    let mut keep = Vec::new();
    for slot in have.values() {
        let same = want.binary_search_by_key(&slot.piece.gpa, |p| p.gpa).ok().and_then(|i| want.get(i));
        match same.filter(|p| p.same_memory(&slot.piece)) {
            Some(piece) => {
                keep.push(piece.gpa);
                if piece.log != slot.piece.log {
                    plan.flag.push(Slot { id: slot.id, piece: piece.clone() });
                }
            }
            None => plan.delete.push(slot.clone()),
        }
    }
    plan.create = want.iter().filter(|p| keep.binary_search(&p.gpa).is_err()).cloned().collect();
    plan.disruptive = plan.delete.iter().any(|slot| plan.create.iter().any(|p| p.overlaps(&slot.piece)));
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_space::{AddressSpace, Region};

    fn pieces(space: &AddressSpace) -> Vec<Piece> {
        let pieces: Vec<_> = space.view().sections().filter_map(|s| Piece::of(&s, false)).collect();
        merge(&pieces)
    }

    fn brief(pieces: &[Piece]) -> Vec<(u64, u64, u64, bool)> {
        pieces.iter().map(|p| (p.gpa, p.size, p.offset, p.readonly)).collect()
    }

    #[test]
    fn adjacent_memory_is_one_slot_and_holes_split() {
        let block = RamBlock::new("ram", 0x10_0000).expect("memory");
        let root = Region::container("system", 1 << 64);
        let low = Region::ram("low", block.clone(), 0, 0x8_0000);
        let high = Region::ram("high", block.clone(), 0x8_0000, 0x8_0000);
        root.add(0, &low, 0).expect("add");
        root.add(0x8_0000, &high, 0).expect("add");
        let space = AddressSpace::new("memory", &root);
        assert_eq!(brief(&pieces(&space)), [(0, 0x10_0000, 0, false)]);
        // A read-only cover in the middle, not page aligned: its pages belong to nobody.
        let rom = Region::rom("rom", block.clone(), 0x100, 0x1f00);
        root.add(0x2100, &rom, 1).expect("add");
        let parts = pieces(&space);
        assert_eq!(
            brief(&parts),
            [(0, 0x2000, 0, false), (0x3000, 0x1000, 0x1000, true), (0x4000, 0xf_c000, 0x4000, false)]
        );
        root.remove(&rom).expect("remove");
        assert_eq!(brief(&pieces(&space)), [(0, 0x10_0000, 0, false)]);
    }

    #[test]
    fn memory_that_does_not_line_up_is_no_slot() {
        let block = RamBlock::new("ram", 0x4000).expect("memory");
        let root = Region::container("system", 1 << 64);
        root.add(0x800, &Region::ram("odd", block, 0, 0x4000), 0).expect("add");
        assert!(pieces(&AddressSpace::new("memory", &root)).is_empty());
    }

    #[test]
    fn only_what_changes_is_touched() {
        let block = RamBlock::new("ram", 0x10_0000).expect("memory");
        let piece = |gpa, size, offset, readonly, log| Piece {
            gpa,
            size,
            block: block.clone(),
            offset,
            readonly,
            log,
        };
        let have: BTreeMap<u64, Slot> = [
            Slot { id: 0, piece: piece(0, 0x4000, 0, false, false) },
            Slot { id: 1, piece: piece(0x8000, 0x4000, 0x8000, false, false) },
        ]
        .into_iter()
        .map(|s| (s.piece.gpa, s))
        .collect();
        let same = [piece(0, 0x4000, 0, false, true), piece(0x8000, 0x4000, 0x8000, false, false)];
        let steps = plan(&have, &same);
        assert_eq!((steps.delete.len(), steps.flag.len(), steps.create.len()), (0, 1, 0));
        assert!(!steps.disruptive);
        let cut = [piece(0, 0x4000, 0, false, false), piece(0x8000, 0x2000, 0x8000, false, false)];
        let steps = plan(&have, &cut);
        assert_eq!((steps.delete.len(), steps.flag.len(), steps.create.len()), (1, 0, 1));
        assert!(steps.disruptive);
        let gone = [piece(0, 0x4000, 0, false, false)];
        let steps = plan(&have, &gone);
        assert_eq!((steps.delete.len(), steps.create.len(), steps.disruptive), (1, 0, false));
    }
}
