//! The software TLB: windows per address space and privilege, and the map from physical pages to host memory.
//!
//! A *window* is what one way of looking at linear memory has cached: an address space (PCID) seen as user, as supervisor with SMAP
//! in force, or as supervisor without. So a change of privilege or of CR3 with PCIDs is a change of window, and no entry has to
//! carry permissions: what may not be accessed is not there. Read, write and execute have tables of their own; memory-mapped
//! registers, watched pages and pages with code (for writes) are never entered.

use crate::native::mem::{CodeTable, ENTRIES, PAGE, Table, window_tables};
use hyaline_ram::RamBlock;
use hyaline_space::AddressSpace;
use std::sync::Arc;

/// How a window's owner looks at memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum View {
    /// CPL 3.
    User = 0,
    /// Supervisor, user pages forbidden by SMAP.
    KernelSmap = 1,
    /// Supervisor without SMAP.
    Kernel = 2,
}

const EXEC_ENTRIES: usize = 1024;
const EXEC_SEEN: usize = 8192;

#[derive(Clone, Copy)]
struct ExecEntry {
    tag: u64,
    physical: u64,
    global: bool,
}

const fn void_exec(i: usize) -> ExecEntry {
    ExecEntry { tag: !((i as u64) << 12), physical: 0, global: false }
}

/// The cached translations of one view of one address space.
pub(crate) struct Window {
    pub read: Table,
    pub write: Table,
    /// What generated code knows of code pages.
    pub code: CodeTable,
    exec: Box<[ExecEntry]>,
    exec_used: bool,
    /// Bits by page number: code may have been fetched from there since the generation began.
    exec_seen: Box<[u64; EXEC_SEEN / 64]>,
    /// Bits by slot: the entry is of a global page.
    global: [Box<[u64; ENTRIES / 64]>; 2],
    /// Unique number of the present contents: what was derived from them (a linear address's block) is void when it changes.
    pub generation: u64,
}

impl Window {
    fn new(generation: u64) -> Box<Window> {
        let (read, write, code) = window_tables();
        Box::new(Window {
            read,
            write,
            code,
            exec: (0..EXEC_ENTRIES).map(void_exec).collect(),
            exec_used: false,
            exec_seen: Box::new([0; EXEC_SEEN / 64]),
            global: [Box::new([0; ENTRIES / 64]), Box::new([0; ENTRIES / 64])],
            generation,
        })
    }

    /// The physical page that code at `linear` comes from.
    #[inline]
    pub(crate) fn exec(&self, linear: u64) -> Option<u64> {
        let e = self.exec.get((linear >> 12) as usize & (EXEC_ENTRIES - 1))?;
        (e.tag == linear & !(PAGE - 1)).then_some(e.physical)
    }

    pub(crate) fn fill_exec(&mut self, linear: u64, physical: u64, global: bool) {
        self.exec_used = true;
        self.see(linear);
        if let Some(e) = self.exec.get_mut((linear >> 12) as usize & (EXEC_ENTRIES - 1)) {
            *e = ExecEntry { tag: linear & !(PAGE - 1), physical: physical & !(PAGE - 1), global };
        }
    }

    fn seen_bit(linear: u64) -> (usize, u64) {
        let page = (linear >> 12) as usize & (EXEC_SEEN - 1);
        (page / 64, 1 << (page % 64))
    }
    fn see(&mut self, linear: u64) {
        let (word, bit) = Self::seen_bit(linear);
        if let Some(w) = self.exec_seen.get_mut(word) {
            *w |= bit;
        }
    }
    /// Whether anything of the present generation may be derived from the page of `linear`.
    fn seen(&self, linear: u64) -> bool {
        let (word, bit) = Self::seen_bit(linear);
        self.exec_seen.get(word).is_some_and(|w| w & bit != 0)
    }

    fn set_global(&mut self, table: usize, linear: u64, global: bool) {
        let slot = (linear >> 12) as usize & (ENTRIES - 1);
        if let Some(word) = self.global.get_mut(table).and_then(|g| g.get_mut(slot / 64)) {
            let bit = 1 << (slot % 64);
            if global { *word |= bit } else { *word &= !bit }
        }
    }

    pub(crate) fn fill_read(&mut self, linear: u64, block: &Arc<RamBlock>, offset: u64, global: bool) {
        self.read.fill(linear, block, offset);
        self.set_global(0, linear, global);
    }

    pub(crate) fn fill_write(&mut self, linear: u64, block: &Arc<RamBlock>, offset: u64, global: bool) {
        self.write.fill(linear, block, offset);
        self.set_global(1, linear, global);
    }

    fn clear(&mut self, keep_global: bool, generation: u64) {
        self.generation = generation;
        self.code.clear();
        if keep_global {
            let [read, write] = &self.global;
            let kept = |bits: &[u64; ENTRIES / 64], tag: u64| {
                let slot = (tag >> 12) as usize & (ENTRIES - 1);
                bits.get(slot / 64).is_some_and(|w| w >> (slot % 64) & 1 != 0)
            };
            self.read.retain(|tag| kept(read, tag));
            self.write.retain(|tag| kept(write, tag));
        } else {
            self.read.clear();
            self.write.clear();
        }
        if self.exec_used {
            self.exec_used = keep_global;
            self.exec_seen.fill(0);
            for i in 0..EXEC_ENTRIES {
                let Some(e) = self.exec.get_mut(i) else { break };
                if keep_global && e.global {
                    let linear = e.tag;
                    self.see(linear);
                } else {
                    *e = void_exec(i);
                }
            }
        }
    }

    fn drop_page(&mut self, linear: u64, generation: u64) {
        if self.seen(linear) {
            self.generation = generation;
        }
        self.read.drop_page(linear);
        self.write.drop_page(linear);
        self.code.drop_page(linear);
        let i = (linear >> 12) as usize & (EXEC_ENTRIES - 1);
        if let Some(e) = self.exec.get_mut(i).filter(|e| e.tag == linear & !(PAGE - 1)) {
            *e = void_exec(i);
        }
    }

    fn drop_range(&mut self, from: u64, to: u64, generation: u64) {
        self.generation = generation;
        self.code.clear();
        let outside = |tag: u64| tag < from || tag > to;
        self.read.retain(outside);
        self.write.retain(outside);
        for (i, e) in self.exec.iter_mut().enumerate() {
            if !outside(e.tag) {
                *e = void_exec(i);
            }
        }
    }
}

/// Where a physical page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// RAM or ROM: index into [`Physical::blocks`] and the page's offset there.
    Memory { block: u16, offset: u64, readonly: bool },
    /// Anything else: every access goes through the address space.
    Device,
}

/// Cache of physical pages.
pub(crate) struct Physical {
    entries: Box<[(u64, Backing)]>,
    pub blocks: Vec<Arc<RamBlock>>,
}

const PHYSICAL_ENTRIES: usize = 4096;

impl Physical {
    fn new() -> Physical {
        Physical { entries: vec![(u64::MAX, Backing::Device); PHYSICAL_ENTRIES].into(), blocks: Vec::new() }
    }

    /// Where the page of a physical address is.
    #[inline]
    pub(crate) fn find(&mut self, physical: u64, memory: &AddressSpace) -> Backing {
        let page = physical >> 12;
        match self.entries.get(page as usize & (PHYSICAL_ENTRIES - 1)) {
            Some((p, backing)) if *p == page => *backing,
            _ => self.look_up(page, memory),
        }
    }

    #[cold]
    fn look_up(&mut self, page: u64, memory: &AddressSpace) -> Backing {
        let backing = self.resolve(page << 12, memory).unwrap_or(Backing::Device);
        if let Some(e) = self.entries.get_mut(page as usize & (PHYSICAL_ENTRIES - 1)) {
            *e = (page, backing);
        }
        backing
    }

    fn resolve(&mut self, physical: u64, memory: &AddressSpace) -> Option<Backing> {
        let section = memory.lookup(physical)?;
        let last = physical | (PAGE - 1);
        // Sections smaller than a page, or not page aligned on the host, take the way of every other access.
        if section.range.start > physical || section.range.last < last {
            return None;
        }
        let host = section.host?;
        let offset = host.offset.checked_add(physical - section.range.start)?;
        if offset % PAGE != 0 || offset.checked_add(PAGE)? > host.block.len() {
            return None;
        }
        let block = match self.blocks.iter().position(|b| Arc::ptr_eq(b, &host.block)) {
            Some(i) => i,
            None => {
                self.blocks.push(host.block);
                self.blocks.len() - 1
            }
        };
        Some(Backing::Memory { block: u16::try_from(block).ok()?, offset, readonly: section.readonly })
    }

    pub(crate) fn block(&self, i: u16) -> Option<&Arc<RamBlock>> {
        self.blocks.get(usize::from(i))
    }

    fn clear(&mut self) {
        self.entries.fill((u64::MAX, Backing::Device));
        self.blocks.clear();
    }
}

/// Address spaces (PCIDs) with windows of their own.
const SPACES: usize = 8;

#[derive(Default)]
struct Space {
    pcid: Option<u16>,
    used: u64,
    windows: [Option<Box<Window>>; 3],
}

/// All of a processor's cached translations.
pub(crate) struct Mmu {
    /// The window in force.
    pub window: Box<Window>,
    /// Physical pages.
    pub physical: Physical,
    spaces: [Space; SPACES],
    space: usize,
    view: View,
    counter: u64,
    uses: u64,
    /// Linear ranges of large pages that were entered: INVLPG within one drops the whole range.
    large: Vec<(u64, u64)>,
}

impl Mmu {
    pub(crate) fn new() -> Mmu {
        let mut spaces: [Space; SPACES] = Default::default();
        spaces[0].pcid = Some(0);
        Mmu {
            window: Window::new(1),
            physical: Physical::new(),
            spaces,
            space: 0,
            view: View::Kernel,
            counter: 1,
            uses: 0,
            large: Vec::new(),
        }
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// Makes the window of a PCID and a view the one in force.
    pub(crate) fn select(&mut self, pcid: u16, view: View) {
        let same = self.spaces[self.space % SPACES].pcid == Some(pcid);
        if same && self.view == view {
            return;
        }
        let space = if same {
            self.space
        } else {
            let known = self.spaces.iter().position(|s| s.pcid == Some(pcid));
            known.unwrap_or_else(|| self.take_space(pcid))
        };
        self.uses += 1;
        let uses = self.uses;
        let generation = self.next();
        let new = self.spaces.get_mut(space).and_then(|s| {
            s.used = uses;
            s.windows.get_mut(view as usize)?.take()
        });
        // When it is already in force (the space in force was given another PCID) there is nothing to put away.
        if space == self.space && view == self.view {
            return;
        }
        let new = new.unwrap_or_else(|| Window::new(generation));
        let old = std::mem::replace(&mut self.window, new);
        if let Some(place) =
            self.spaces.get_mut(self.space).and_then(|s| s.windows.get_mut(self.view as usize))
        {
            *place = Some(old);
        }
        (self.space, self.view) = (space, view);
    }

    fn take_space(&mut self, pcid: u16) -> usize {
        let oldest = (0..SPACES).min_by_key(|i| self.spaces.get(*i).map(|s| (s.pcid.is_some(), s.used)));
        let i = oldest.unwrap_or(0);
        self.flush_space(i, false);
        if let Some(s) = self.spaces.get_mut(i) {
            s.pcid = Some(pcid);
        }
        i
    }

    pub(crate) fn each(&mut self, mut f: impl FnMut(&mut Window, u64)) {
        let mut counter = self.counter;
        let stored = self.spaces.iter_mut().flat_map(|s| s.windows.iter_mut().flatten());
        for w in stored.chain(std::iter::once(&mut self.window)) {
            counter += 1;
            f(w, counter);
        }
        self.counter = counter;
    }

    fn flush_space(&mut self, i: usize, keep_global: bool) {
        let mut counter = self.counter;
        if let Some(s) = self.spaces.get_mut(i) {
            for w in s.windows.iter_mut().flatten() {
                counter += 1;
                w.clear(keep_global, counter);
            }
        }
        if i == self.space {
            counter += 1;
            self.window.clear(keep_global, counter);
        }
        self.counter = counter;
    }

    /// Voids all translations, or all but those of global pages.
    pub(crate) fn flush(&mut self, keep_global: bool) {
        self.each(|w, n| w.clear(keep_global, n));
        if !keep_global {
            self.large.clear();
        }
    }

    /// Voids the translations of one PCID, except of global pages.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        if let Some(i) = self.spaces.iter().position(|s| s.pcid == Some(pcid)) {
            self.flush_space(i, true);
        }
    }

    /// Voids the translation of one linear address in all address spaces (more than INVLPG has to).
    pub(crate) fn drop_page(&mut self, linear: u64) {
        let hits: Vec<(u64, u64)> =
            self.large.iter().copied().filter(|(from, to)| (*from..=*to).contains(&linear)).collect();
        self.large.retain(|r| !hits.contains(r));
        for (from, to) in hits {
            self.each(|w, n| w.drop_range(from, to, n));
        }
        self.each(|w, n| w.drop_page(linear, n));
    }

    /// Notes that a part of a large page was entered.
    pub(crate) fn note_large(&mut self, linear: u64, size: u64) {
        let range = (linear & !(size - 1), linear | (size - 1));
        if self.large.last() == Some(&range) || self.large.contains(&range) {
            return;
        }
        if self.large.len() >= 256 {
            self.flush(false);
        }
        self.large.push(range);
    }

    /// Makes everything derived from linear addresses be looked up again.
    pub(crate) fn renew(&mut self) {
        self.each(|w, n| w.generation = n);
    }

    /// Takes the page at `offset` of `block` out of all write tables: it holds code now.
    pub(crate) fn forbid_writes(&mut self, block: &RamBlock, offset: u64) {
        self.each(|w, _| w.write.drop_host_page(block, offset));
    }

    /// The memory map changed.
    pub(crate) fn invalidate_map(&mut self) {
        self.flush(false);
        self.physical.clear();
    }
}
