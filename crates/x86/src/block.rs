//! Predecoded blocks, keyed by guest physical address and mode.
//!
//! A block is a run of instructions up to a branch, the end of its page or [`MAX_INSNS`]. It stays good whatever the page tables say,
//! for as long as the bytes that it was made from are not written to ([`hyaline_ram::code`]). An instruction that crosses
//! a page's end is a block of its own, good for one pair of physical pages.

use crate::decode::Insn;
use hyaline_ram::RamBlock;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

/// Most instructions in a block.
pub const MAX_INSNS: usize = 64;
/// All blocks are dropped when there are this many instructions (48 bytes each).
const ARENA: usize = 512 * 1024;
/// Entries of the cache from linear addresses to blocks.
const JUMPS: usize = 4096;
/// Entries of the cache before the map.
const NEAR: usize = 16384;
/// No key: physical addresses have at most 52 bits.
const VOID: (u64, u32) = (u64::MAX, 0);

/// A piece of memory that a block was made from.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub ram: Arc<RamBlock>,
    /// Offset of the page in `ram`.
    pub offset: u64,
    /// Version of the page when its bytes were read.
    pub version: u32,
}

impl Source {
    fn fresh(&self) -> bool {
        self.ram.code().version(self.offset) == self.version
    }
}

/// Where a block was left to, last time and the time before.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    pub linear: u64,
    pub key: u64,
    pub block: u32,
}

/// A predecoded block.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// First instruction in the arena.
    pub start: u32,
    /// Instructions.
    pub len: u16,
    /// Bytes.
    pub bytes: u16,
    /// Instructions that fit in its place in the arena.
    pub room: u16,
    /// How often it was begun while a translator waited for it to get hot, at most [`Block::limit`].
    pub heat: u8,
    /// How often the block of this address was made anew, because its bytes had been written to.
    pub renewed: u8,
    /// The last instruction may change the mode or the flow in ways other than a branch: look around afterwards.
    pub system: bool,
    pub links: [Link; 2],
    /// The memory it was made from; None for blocks that aren't kept.
    pub source: Option<Source>,
    /// The epoch at which the sources were last found fresh.
    pub checked: u64,
    /// The second page's, for an instruction across a page's end: its physical address too.
    pub second: Option<(u64, Source)>,
}

impl Block {
    /// The heat at which it is worth a translation: what is rewritten has to be used the more.
    #[inline]
    pub(crate) fn limit(&self, threshold: u8) -> u8 {
        threshold.saturating_mul(1 << self.renewed.min(4))
    }
}

#[derive(Clone, Copy, Default)]
struct Jump {
    linear: u64,
    key: u64,
    block: u32,
}

/// Multiplies, which is enough for addresses.
#[derive(Default)]
pub(crate) struct AddressHasher(u64);
impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(v.into());
    }
    fn write_usize(&mut self, v: usize) {
        self.write_u64(v as u64);
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

/// All blocks of a processor.
pub(crate) struct BlockCache {
    pub insns: Vec<Insn>,
    pub blocks: Vec<Block>,
    /// Where a block's instructions are gathered.
    pub scratch: Vec<Insn>,
    map: HashMap<u64, u32, BuildHasherDefault<AddressHasher>>,
    /// The map's entries that were asked for lately, direct mapped: key and block.
    near: Box<[(u64, u32)]>,
    jumps: Box<[Jump]>,
}

/// The key of a block: physical address and mode.
fn key(physical: u64, mode: u64) -> u64 {
    physical << 2 | mode & 3
}

impl BlockCache {
    pub(crate) fn new() -> BlockCache {
        BlockCache {
            insns: Vec::new(),
            blocks: Vec::new(),
            scratch: Vec::new(),
            map: HashMap::default(),
            near: vec![VOID; NEAR].into(),
            jumps: vec![Jump::default(); JUMPS].into(),
        }
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.insns.clear();
        self.blocks.clear();
        self.map.clear();
        self.near.fill(VOID);
        self.jumps.fill(Jump::default());
    }

    /// Whether the next block might not fit.
    pub(crate) fn is_full(&self) -> bool {
        self.insns.len() + MAX_INSNS > ARENA
    }

    fn jump_slot(linear: u64) -> usize {
        (linear ^ linear >> 12) as usize & (JUMPS - 1)
    }

    /// The block at a linear address under a window generation and mode, when it was there lately.
    #[inline(always)]
    pub(crate) fn jump(&self, linear: u64, context: u64) -> Option<u32> {
        let j = self.jumps.get(Self::jump_slot(linear))?;
        (j.linear == linear && j.key == context).then_some(j.block)
    }

    pub(crate) fn set_jump(&mut self, linear: u64, context: u64, block: u32) {
        if let Some(j) = self.jumps.get_mut(Self::jump_slot(linear)) {
            *j = Jump { linear, key: context, block };
        }
    }

    fn near(key: u64) -> usize {
        (key ^ key >> 14) as usize & (NEAR - 1)
    }

    /// The block made from a physical address, when it is still good. `second` translates the linear page after. While the `epoch` that
    /// the processor dealt with stays the same, no code was written to, and sources found fresh once need no second look.
    pub(crate) fn find(
        &mut self,
        physical: u64,
        mode: u64,
        epoch: u64,
        second: impl FnOnce() -> Option<u64>,
    ) -> Option<u32> {
        let key = key(physical, mode);
        let near = self.near.get_mut(Self::near(key))?;
        if near.0 != key {
            *near = (key, *self.map.get(&key)?);
        }
        let i = near.1;
        let block = self.blocks.get_mut(i as usize)?;
        if block.checked != epoch {
            let fresh = block.source.as_ref()?.fresh();
            if !fresh || block.second.as_ref().is_some_and(|(_, source)| !source.fresh()) {
                return None;
            }
            block.checked = epoch;
        }
        if let Some((page, _)) = &block.second
            && second() != Some(*page)
        {
            return None;
        }
        Some(i)
    }

    /// Adds a block of `insns`; in the place of the one that was made from the same address before, when it fits there.
    pub(crate) fn add(&mut self, physical: u64, mode: u64, insns: &[Insn], mut block: Block) -> u32 {
        block.len = insns.len() as u16;
        if block.source.is_some()
            && let Some(i) = self.map.get(&key(physical, mode)).copied()
            && let Some(old) = self.blocks.get_mut(i as usize)
        {
            let (start, room) = (old.start as usize, usize::from(old.room));
            let before = self.insns.get(start..start + usize::from(old.len)).unwrap_or(&[]);
            let same = before.len() == insns.len()
                && before.iter().zip(insns).all(|(a, b)| (a.len, a.bytes) == (b.len, b.bytes));
            // What changed was something else in the page.
            (block.heat, block.renewed) =
                if same { (old.heat, old.renewed) } else { (0, old.renewed.saturating_add(1)) };
            // Instructions across a page's end are good for one pair of pages: other windows may still know another.
            let alone = old.second.is_none() && block.second.is_none();
            if alone
                && insns.len() <= room
                && let Some(place) = self.insns.get_mut(start..start + insns.len())
            {
                place.copy_from_slice(insns);
                (block.start, block.room) = (old.start, old.room);
                *old = block;
                return i;
            }
        }
        (block.start, block.room) = (self.insns.len() as u32, block.len);
        self.insns.extend_from_slice(insns);
        let i = self.blocks.len() as u32;
        let keep = block.source.is_some();
        self.blocks.push(block);
        if keep {
            let key = key(physical, mode);
            self.map.insert(key, i);
            if let Some(near) = self.near.get_mut(Self::near(key)) {
                *near = (key, i);
            }
        }
        i
    }
}
