//! Tier 1: translation of x86-64 code to x86-64 code.
//!
//! Code that ran a few times is translated, a unit at a time (`translate`), into memory of the processor's own (`arena`). Whatever
//! isn't translated, and every access that the TLB doesn't answer, goes to the interpreter one instruction at a time, with the whole
//! state exact: there is one implementation of everything difficult. Units are keyed by what page they were made from: a number per
//! (physical page, linear page, mode), entered in the window's page table when a translation of that linear page was verified. Whatever
//! voids TLB entries voids those numbers; ways from page to page compare them.
#![allow(unsafe_code)]

mod arena;
mod asm;
mod context;
#[cfg(test)]
mod golden;
mod helpers;
#[doc(hidden)]
pub mod lockstep;
mod parts;
mod quick;
mod stubs;
#[cfg(test)]
mod tests;
mod translate;

use crate::block::{BlockCache, Source};
use crate::cpu::Cpu;
use crate::decode::{self, Mode};
use crate::env::Signals;
use crate::fault::{Exit, Fault};
use crate::native::mem::PAGE;
use crate::state::{Seg, Segment, cr0, cr4, flag};
use arena::Arena;
use asm::Asm;
use context::{Context, exit, pack_flags, unpack_flags};
use iced_x86::{Code, CpuidFeature, Instruction, InstructionInfoFactory};
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use stubs::{Stubs, VectorWidth};
use translate::{Guest, Host, MAX_UNIT, Numbers};

/// How a processor executes instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// By interpretation: tier 0.
    #[default]
    Interp,
    /// By translation of code that runs often, tier 1, and interpretation of the rest.
    Jit(JitOptions),
}

/// Options of the translator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JitOptions {
    /// Bytes of memory for translated code, per processor. When it is full, all translations are dropped.
    pub cache_bytes: usize,
    /// How often code is interpreted before it is translated, 0-254; more often where it was rewritten.
    pub threshold: u8,
    /// Leave LOCK out of instructions: only where the processor is the machine's only one and no device writes behind its back.
    pub drop_locks: bool,
}

impl Default for JitOptions {
    fn default() -> Self {
        JitOptions { cache_bytes: 64 << 20, threshold: 6, drop_locks: false }
    }
}

/// Why there is no translator.
#[derive(Debug, thiserror::Error)]
pub enum JitError {
    /// No executable memory.
    #[error(
        "the kernel gave no executable memory for translated code ({0}); allow memfd_create and executable shared mappings \
         for this process, or choose the interpreter"
    )]
    Memory(#[from] rustix::io::Errno),
    /// The cache is too small or too large.
    #[error("a code cache of {0} bytes for one processor is out of range: choose 1 MiB to 1 GiB for each")]
    CacheSize(usize),
}

/// What the translator did.
#[derive(Clone, Debug, Default)]
pub struct JitStats {
    /// Units translated.
    pub units: u64,
    /// Guest instructions in them.
    pub guest_instructions: u64,
    /// Bytes of host code in them.
    pub host_bytes: u64,
    /// Times that generated code was entered from Rust.
    pub entries: u64,
    /// Ways between units that were linked.
    pub links: u64,
    /// Ways between units that had to be linked again, because the page behind changed.
    pub relinks: u64,
    /// Indirect branches whose target wasn't in the window's table.
    pub lookups: u64,
    /// TLB misses that a page walk answered.
    pub refills: u64,
    /// Accesses left to the interpreter: devices, page ends, pages with code, faults.
    pub slow_accesses: u64,
    /// Groups of memory operands whose span wasn't in one page.
    pub careful: u64,
    /// Exits for lack of budget.
    pub slices: u64,
    /// Times that the cache was full.
    pub flushes: u64,
    /// Pages whose translations were voided by writes.
    pub pages_voided: u64,
    /// Units of such pages that were found unchanged.
    pub revived: u64,
    /// Instructions retired by the interpreter for want of a translation.
    pub cold_instructions: u64,
    /// Instructions left to the interpreter from within translated code, by iced's code number.
    pub interpreted: Vec<u64>,
}

impl std::fmt::Display for JitStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "  translated   {} units, {} instructions, {} bytes of host code; {} flushes, {} pages voided by writes, {} units of \
             them revived",
            self.units,
            self.guest_instructions,
            self.host_bytes,
            self.flushes,
            self.pages_voided,
            self.revived
        )?;
        writeln!(
            f,
            "  ways         {} entries, {} links, {} links renewed, {} indirect targets looked up, {} slices",
            self.entries, self.links, self.relinks, self.lookups, self.slices
        )?;
        writeln!(
            f,
            "  memory       {} TLB refills, {} slow accesses, {} spans not in one page",
            self.refills, self.slow_accesses, self.careful
        )?;
        writeln!(
            f,
            "  interpreted  {} instructions for want of a translation; in translated code:",
            self.cold_instructions
        )?;
        for (name, count) in self.top_interpreted(40) {
            writeln!(f, "    {count:>12}  {name}")?;
        }
        Ok(())
    }
}

impl JitStats {
    /// Adds another processor's.
    pub fn add(&mut self, o: &JitStats) {
        self.units += o.units;
        self.guest_instructions += o.guest_instructions;
        self.host_bytes += o.host_bytes;
        self.entries += o.entries;
        self.links += o.links;
        self.relinks += o.relinks;
        self.lookups += o.lookups;
        self.refills += o.refills;
        self.slow_accesses += o.slow_accesses;
        self.slices += o.slices;
        self.careful += o.careful;
        self.flushes += o.flushes;
        self.pages_voided += o.pages_voided;
        self.revived += o.revived;
        self.cold_instructions += o.cold_instructions;
        self.interpreted.resize(self.interpreted.len().max(o.interpreted.len()), 0);
        self.interpreted.iter_mut().zip(&o.interpreted).for_each(|(a, b)| *a += b);
    }

    /// The instructions most often left to the interpreter, with their counts.
    pub fn top_interpreted(&self, n: usize) -> Vec<(String, u64)> {
        let mut all: Vec<(usize, u64)> =
            self.interpreted.iter().copied().enumerate().filter(|(_, c)| *c > 0).collect();
        all.sort_by_key(|(_, c)| std::cmp::Reverse(*c));
        all.truncate(n);
        let name = |i: usize| Code::values().nth(i).map_or_else(|| i.to_string(), |c| format!("{c:?}"));
        all.into_iter().map(|(i, c)| (name(i), c)).collect()
    }
}

/// What a translation depends on besides the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct ModeKey(u32);

impl ModeKey {
    const LONG: u32 = 1;
    const SSE: u32 = 2;
    const AVX: u32 = 4;
    const AVX512: u32 = 8;
    const FS_FLAT: u32 = 16;
    const GS_FLAT: u32 = 32;
    const X87: u32 = 64;
    /// Privilege level 0 of 64-bit mode.
    const KERNEL: u32 = 128;

    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
    fn bits(self) -> u32 {
        if self.has(ModeKey::LONG) { 64 } else { 32 }
    }
    /// A near return of the mode's own size.
    fn near_ret(self, i: &Instruction) -> bool {
        match i.code() {
            Code::Retnq | Code::Retnq_imm16 => self.has(ModeKey::LONG),
            Code::Retnd | Code::Retnd_imm16 => !self.has(ModeKey::LONG),
            _ => false,
        }
    }

    /// The present mode; None when it is one that only the interpreter does.
    fn of(cpu: &Cpu, width: VectorWidth) -> Option<ModeKey> {
        if cpu.alignment_checked || cpu.debug_armed {
            return None;
        }
        let s = &cpu.state;
        let mut m = 0;
        let flat = |s: &Segment, write: bool| {
            let kind = s.kind();
            !s.unusable
                && s.limit == u32::MAX
                && s.present()
                && s.is_code_or_data()
                && if write { kind & 0b1110 == 0b0010 } else { kind & 0b1100 != 0b0100 }
        };
        let seg = |seg: Seg| &s.seg[seg as usize];
        if cpu.in_64bit() {
            m |= ModeKey::LONG | ModeKey::FS_FLAT | ModeKey::GS_FLAT;
            if cpu.cpl() == 0 {
                m |= ModeKey::KERNEL;
            }
        } else {
            let zero = |seg: &Segment| seg.base == 0;
            let data = |s: &Segment| zero(s) && flat(s, true);
            if cpu.code_bits() != 32
                || !cpu.protected()
                || cpu.v86()
                || !seg(Seg::Ss).big()
                || !(zero(seg(Seg::Cs)) && flat(seg(Seg::Cs), false))
                || !(data(seg(Seg::Ds)) && data(seg(Seg::Es)) && data(seg(Seg::Ss)))
            {
                return None;
            }
            if flat(seg(Seg::Fs), true) {
                m |= ModeKey::FS_FLAT;
            }
            if flat(seg(Seg::Gs), true) {
                m |= ModeKey::GS_FLAT;
            }
        }
        if s.cr0 & (cr0::EM | cr0::TS) == 0 {
            m |= ModeKey::X87;
        }
        if s.cr0 & (cr0::EM | cr0::TS) == 0 && s.cr4 & cr4::OSFXSR != 0 && s.mxcsr & 0x1f80 == 0x1f80 {
            m |= ModeKey::SSE;
            let xcr0 = if s.cr4 & cr4::OSXSAVE != 0 { s.xcr0 } else { 0 };
            if xcr0 & 6 == 6 && width != VectorWidth::Xmm {
                m |= ModeKey::AVX;
            }
            if xcr0 & 0xe6 == 0xe6 && width == VectorWidth::Zmm {
                m |= ModeKey::AVX512;
            }
        }
        Some(ModeKey(m))
    }
}

/// A translated unit. Offsets are the arena's.
#[derive(Clone, Copy, Debug)]
struct Unit {
    page: u32,
    rip: u64,
    /// Entry with the arithmetic flags in the host's.
    live: u32,
    /// Entry with the arithmetic flags in the context.
    saved: u32,
    /// As `saved`, from any page.
    guarded: u32,
    /// The page that the one instruction goes on in, and its identity.
    second: Option<(u64, u32)>,
    /// Where it leaves when the budget is too small, `js rel32`; a dead unit always does, `nop; jmp rel32`.
    switch: u32,
    /// On that way, once the budget is what it was, `mov r10d, unit`; of a dead unit perhaps a jump to the one in its place.
    redirect: u32,
    /// The guest's bytes are no longer what it was made from.
    dead: bool,
    /// Where those are in the translator's copy, and how many.
    bytes: u32,
    len: u16,
}

/// A way from a unit to a guest address.
#[derive(Clone, Copy, Debug)]
struct Link {
    /// Offset of the displacement to patch.
    at: u32,
    target: u64,
    /// The arithmetic flags are in the host's.
    flags_live: bool,
    /// Page of the unit that it leads from.
    page: u32,
    /// The unit that it leads to.
    to: Option<u32>,
}

/// A place in generated code that may call a helper.
#[derive(Clone, Copy, Debug)]
struct Site {
    rip: u64,
    unit: u32,
    /// Page of the unit.
    page: u32,
    /// Instructions of the unit.
    count: u8,
    /// Offset behind the instruction.
    next: u32,
    /// Offset of the access's beginning.
    retry: u32,
    /// Instructions of the unit from this one on.
    before: u8,
    /// Behind the instruction the arithmetic flags are wanted in the host's.
    flags_live: bool,
    /// How the flags before the instruction are found, when they are neither in the context nor in the host's.
    recipe: u32,
    /// Not an access: the instruction is to be interpreted.
    interpreted: bool,
    /// The unit has the guest's x87 state in the host's registers.
    x87: bool,
    /// The unit has vector instructions.
    vectors: bool,
    /// Nothing of the unit comes behind it.
    last: bool,
    /// Bytes accessed, or looked up.
    size: u16,
    /// Offset at which generated code goes on with the access to a copy of what is in two pages; 0: it can't.
    bounce: u32,
    /// They are written to (said of groups only).
    write: bool,
    /// Code behind it relies on what was looked up before it.
    fragile: bool,
    len: u8,
    bytes: [u8; 15],
}

/// A page that units were made from.
struct CodePage {
    linear: u64,
    physical: u64,
    source: Source,
    /// Marked code of the page was written to: no way leads here until the units were compared with their bytes.
    stale: bool,
    units: Vec<u32>,
}

type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<crate::block::AddressHasher>>;

/// Failures of a unit's groups in quick succession that are too many.
const ROUGH: u8 = 24;
/// Instructions between looks at the request word.
const SLICE: u64 = 16_384;

/// The translator of one processor.
pub(crate) struct Jit {
    options: JitOptions,
    arena: Arena,
    stubs: Stubs,
    width: VectorWidth,
    host: Host,
    info: InstructionInfoFactory,
    units: Vec<Unit>,
    links: Vec<Link>,
    sites: Vec<Site>,
    recipes: Vec<decode::Insn>,
    notes: Vec<translate::Note>,
    /// What units were made from.
    bytes: Vec<u8>,
    /// Dead units that lead to this one.
    redirected: FastMap<u32, Vec<u32>>,
    /// By identity; 0 is none.
    pages: Vec<CodePage>,
    page_ids: FastMap<(u64, u64, u32), u32>,
    /// Pages by the memory that they were made from: code map and page number.
    by_memory: FastMap<(usize, u64), Vec<u32>>,
    /// By page identity and offset.
    map: FastMap<u64, u32>,
    /// The same, of units without groups of memory operands.
    careful: FastMap<u64, u32>,
    /// Units whose groups fail too often, by the same key: how often they did lately. [`ROUGH`]: to be translated without groups.
    rough: FastMap<u64, (u8, u64)>,
    /// There is no translation to be had of the present instruction.
    refused: bool,
    stats: JitStats,
    /// The mode that the code in execution was made for.
    mode: ModeKey,
    fault: Option<Fault>,
    /// Instruction count at the last fault that was delivered without leaving generated code.
    last_fault: u64,
    /// Instruction count at which the present slice ends.
    slice_end: u64,
    /// The count of writes to code that was dealt with.
    hits: u64,
    /// GS base that the code in execution runs with.
    base: u64,
    /// Decoded instructions of sites, direct mapped.
    decoded: Vec<Option<(u32, decode::Insn)>>,
    /// Offset at which units begin, after the stubs.
    start: usize,
    /// The last link or target asked for, to be patched once its unit is known.
    pending: Pending,
    scratch: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    None,
    Link(u32),
    Redirect(u32),
    Target,
}

// SAFETY: the raw pointers are mappings that the translator owns; the context's pointers are set for each run by its caller.
unsafe impl Send for Jit {}

impl Jit {
    pub(crate) fn new(cpu: &Cpu, options: JitOptions) -> Result<Box<Jit>, JitError> {
        if !(1 << 20..=1 << 30).contains(&options.cache_bytes) {
            return Err(JitError::CacheSize(options.cache_bytes));
        }
        let mut arena = Arena::new(options.cache_bytes.next_multiple_of(4096))?;
        use std::arch::is_x86_feature_detected as has;
        let width = if has!("avx512bw") && has!("avx512f") && cpu.model.has(CpuidFeature::AVX512F) {
            VectorWidth::Zmm
        } else if has!("avx") {
            VectorWidth::Ymm
        } else {
            VectorWidth::Xmm
        };
        let host = Host {
            bmi2: has!("bmi2"),
            tzcnt: has!("bmi1") && cpu.model.has(CpuidFeature::BMI1),
            locks: !options.drop_locks,
            lzcnt: has!("lzcnt") && cpu.model.has(CpuidFeature::LZCNT),
        };
        let stubs = stubs::emit(&mut arena, width, helpers::TABLE).ok_or(rustix::io::Errno::NOMEM)?;
        let start = arena.used;
        let mut jit = Box::new(Jit {
            options,
            arena,
            stubs,
            width,
            host,
            info: InstructionInfoFactory::new(),
            units: Vec::new(),
            links: Vec::new(),
            sites: Vec::new(),
            recipes: Vec::new(),
            notes: Vec::new(),
            bytes: Vec::new(),
            redirected: FastMap::default(),
            pages: Vec::new(),
            page_ids: FastMap::default(),
            by_memory: FastMap::default(),
            map: FastMap::default(),
            careful: FastMap::default(),
            rough: FastMap::default(),
            refused: false,
            stats: JitStats { interpreted: vec![0; Code::values().len()], ..JitStats::default() },
            mode: ModeKey::default(),
            fault: None,
            last_fault: u64::MAX,
            slice_end: 0,
            hits: hyaline_ram::code::hits(),
            base: 0,
            decoded: vec![None; 2048],
            start,
            pending: Pending::None,
            scratch: Vec::new(),
        });
        jit.reset_stack();
        Ok(jit)
    }

    pub(crate) fn stats(&self) -> &JitStats {
        &self.stats
    }

    fn context(&mut self) -> &mut Context {
        // SAFETY: the context is in the arena's mapping, made valid there; `&mut self` says that no generated code runs, or that
        // it waits for a helper.
        unsafe { &mut *self.arena.context() }
    }

    fn reset_stack(&mut self) {
        let (base, limit) = self.arena.stack();
        let c = self.context();
        (c.stack_base, c.stack_limit, c.jit_rsp) = (base, limit, base);
    }

    /// Drops all translations.
    fn flush(&mut self, cpu: &mut Cpu) {
        self.stats.flushes += 1;
        self.forget_everything(cpu);
    }

    fn forget_everything(&mut self, cpu: &mut Cpu) {
        self.units.clear();
        self.links.clear();
        self.sites.clear();
        self.recipes.clear();
        self.notes.clear();
        self.bytes.clear();
        self.redirected.clear();
        self.pages.clear();
        self.page_ids.clear();
        self.map.clear();
        self.careful.clear();
        self.rough.clear();
        self.by_memory.clear();
        self.decoded.fill(None);
        self.arena.used = self.start;
        self.pending = Pending::None;
        self.reset_stack();
        cpu.mmu.each(|w, _| {
            w.code.clear();
            w.code.clear_targets();
        });
    }

    /// Lets no way lead to pages that were written to, until [`Jit::revive`].
    fn check_pages(&mut self, cpu: &mut Cpu) {
        let mut ids = std::mem::take(&mut self.scratch);
        ids.clear();
        let (now, known) = hyaline_ram::code::hits_since(self.hits, |map, page| {
            ids.extend(self.by_memory.get(&(map, page)).into_iter().flatten());
        });
        self.hits = now;
        if known.is_none() {
            ids.clear();
            ids.extend(1..=self.pages.len() as u32);
        }
        for id in &ids {
            let Some(page) = self.pages.get_mut(*id as usize - 1) else { continue };
            let source = &page.source;
            if page.stale || source.ram.code().version(source.offset) == source.version {
                continue;
            }
            page.stale = true;
            let linear = page.linear;
            self.stats.pages_voided += 1;
            cpu.mmu.each(|w, _| w.code.forget(linear, *id));
        }
        self.scratch = ids;
    }

    /// Marks the lines of a stale page anew, keeps the units whose bytes are what they were, and gives up the others. False: the page was written to
    /// meanwhile, or isn't memory any more.
    fn revive(&mut self, cpu: &mut Cpu, id: u32, linear: u64) -> bool {
        let Some(page) = self.pages.get_mut(id as usize - 1) else { return false };
        let physical = page.physical;
        let mut units = std::mem::take(&mut page.units);
        let mut lines = hyaline_ram::code::line_mask(linear, 1);
        for u in units.iter().filter_map(|u| self.units.get(*u as usize)) {
            lines |= hyaline_ram::code::line_mask(u.rip, u.len.into());
        }
        let source = cpu.code_lines(physical, lines);
        let mut now = [0; PAGE as usize];
        if source.is_some() {
            cpu.fetch(physical, &mut now);
        }
        let good = source.as_ref().is_some_and(|s| s.ram.code().version(s.offset) == s.version);
        if good {
            units.retain(|n| {
                let Some(u) = self.units.get(*n as usize).filter(|u| !u.dead) else { return false };
                let (at, len) = ((u.rip & (PAGE - 1)) as usize, usize::from(u.len));
                let then = self.bytes.get(u.bytes as usize..u.bytes as usize + len);
                // Those on two pages are few and small.
                let same = u.second.is_none() && then.is_some() && now.get(at..at + len) == then;
                if same {
                    self.stats.revived += 1;
                } else {
                    self.give_up(*n);
                }
                same
            });
        }
        if let Some(page) = self.pages.get_mut(id as usize - 1) {
            page.units = units;
            if good && let Some(source) = source {
                page.source = source;
                page.stale = false;
            }
        }
        good
    }

    /// Makes all ways into a unit lead out.
    fn give_up(&mut self, number: u32) {
        let Some(u) = self.units.get_mut(number as usize) else { return };
        if std::mem::replace(&mut u.dead, true) {
            return;
        }
        let (key, switch) = (map_key(u.page, u.rip), u.switch);
        self.arena.patch(switch as usize, &[0x90, 0xe9]);
        for map in [&mut self.map, &mut self.careful] {
            if map.get(&key) == Some(&number) {
                map.remove(&key);
            }
        }
        for dead in self.redirected.remove(&number).unwrap_or_default() {
            let Some(u) = self.units.get(dead as usize) else { continue };
            let [a, b, c, d] = dead.to_le_bytes();
            self.arena.patch(u.redirect as usize, &[0x41, 0xba, a, b, c, d]);
        }
    }

    /// Makes a dead unit, which somebody still goes to, lead to the one that is in its place.
    fn redirect(&mut self, dead: u32, to: u32) {
        let (Some(from), Some(unit)) = (self.units.get(dead as usize), self.units.get(to as usize)) else {
            return;
        };
        if !from.dead || unit.dead || from.rip != unit.rip || from.page != unit.page {
            return;
        }
        let at = from.redirect as usize;
        self.arena.patch(at, &[0xe9]);
        self.arena.patch_rel32(at + 1, unit.saved as usize);
        self.redirected.entry(to).or_default().push(dead);
    }

    /// The page identity of the linear page that holds `linear`, entered in the window.
    fn page_at(&mut self, cpu: &mut Cpu, linear: u64) -> Result<Option<u32>, Fault> {
        let base = linear & !(PAGE - 1);
        let code = &mut cpu.mmu.window.code;
        if code.mode != self.mode.0 {
            code.clear();
            code.mode = self.mode.0;
        }
        let id = code.page(linear);
        if id != 0 && self.pages.get(id as usize - 1).is_some_and(|p| p.linear == base) {
            return Ok(Some(id));
        }
        if cpu.in_64bit() && !cpu.canonical(linear) {
            return Err(Fault::gp(0));
        }
        let physical = cpu.translate_fetch(linear)? & !(PAGE - 1);
        let key = (physical, base, self.mode.0);
        let id = match self.page_ids.get(&key) {
            Some(id) => *id,
            None => {
                let Some(source) = cpu.code_source(physical | linear & (PAGE - 1), 1) else {
                    return Ok(None);
                };
                let memory = (source.ram.code().identity(), source.offset / PAGE);
                self.by_memory.entry(memory).or_default().push(self.pages.len() as u32 + 1);
                self.pages.push(CodePage { linear: base, physical, source, stale: false, units: Vec::new() });
                let id = self.pages.len() as u32;
                self.page_ids.insert(key, id);
                id
            }
        };
        let stale = self.pages.get(id as usize - 1).is_none_or(|p| p.stale);
        if stale && !self.revive(cpu, id, linear) {
            return Ok(None);
        }
        cpu.mmu.window.code.set_page(linear, id);
        Ok(Some(id))
    }

    /// The unit at a linear address, if there is one.
    fn find(&self, id: u32, linear: u64) -> Option<u32> {
        self.map.get(&map_key(id, linear)).copied()
    }

    /// Translates the unit at a linear address of a page. None: it can't be.
    /// `careful`: without groups of memory operands, for the map of such.
    fn translate(&mut self, cpu: &mut Cpu, id: u32, linear: u64, careful: bool) -> Option<u32> {
        let page = self.pages.get(id as usize - 1)?;
        let version = page.source.version;
        let physical = page.physical | linear & (PAGE - 1);
        let in_page = PAGE - (linear & (PAGE - 1));
        let bits = self.mode.bits();
        let mode = Mode { bits, amd: cpu.amd };
        let mut guest: Vec<Guest> = Vec::with_capacity(16);
        let mut at = 0;
        while guest.len() < MAX_UNIT && at < in_page {
            let len = (in_page - at).min(15);
            if cpu.code_source(physical + at, len)?.version != version {
                // Written to meanwhile by another processor.
                return None;
            }
            let mut buf = [0; 15];
            let buf = buf.get_mut(..len as usize)?;
            cpu.fetch(physical + at, buf);
            let Some(insn) = cpu.decode(buf, mode) else { break };
            let g = Guest::new(linear.wrapping_add(at), insn, bits);
            at += u64::from(insn.len);
            let ends = g.ends_unit() || g.is_backward();
            guest.push(g);
            if ends {
                break;
            }
        }
        let mut second = None;
        if guest.is_empty() {
            // The instruction goes on in the next page: a unit of its own, which looks at both pages.
            let next = linear.wrapping_add(in_page);
            let next = if bits == 64 { next } else { next & 0xffff_ffff };
            let id = self.second_page(cpu, next)?;
            let second_page = self.pages.get(id as usize - 1)?;
            let (beyond, version) = (second_page.physical, second_page.source.version);
            if cpu.code_source(beyond, 15 - in_page)?.version != version {
                return None;
            }
            let mut buf = [0; 15];
            let (head, tail) = buf.split_at_mut_checked(in_page as usize)?;
            cpu.fetch(physical, head);
            cpu.fetch(beyond, tail);
            let insn = cpu.decode(&buf, mode)?;
            guest.push(Guest::new(linear, insn, bits));
            second = Some((next, id));
        }
        let source: Vec<u8> = guest.iter().flat_map(|g| g.insn.bytes()).copied().collect();
        if second.is_none() {
            translate::unroll(&mut guest);
        }
        let number = self.units.len() as u32;
        let offset = self.arena.used.next_multiple_of(16);
        self.arena.used = offset.min(self.arena.size());
        let numbers = Numbers {
            unit: number,
            page: id,
            site: self.sites.len() as u32,
            link: self.links.len() as u32,
            recipe: self.recipes.len() as u32,
            note: self.notes.len() as u32,
            careful: careful || self.rough.get(&map_key(id, linear)).is_some_and(|(n, _)| *n >= ROUGH),
            exec: self.arena.exec(offset),
            offset: offset as u32,
            second,
            ctx: self.arena.context() as u64,
        };
        let out = translate::translate(&guest, numbers, self.mode, self.host, &self.stubs, &mut self.info);
        self.arena.add(&out.code)?;
        if let Some(log) = cpu.log.as_ref().filter(|log| log.wants_translations()) {
            log.translation(cpu.env.index(), &listing(&guest, bits, &out.code, numbers.exec));
        }
        self.stats.units += 1;
        self.stats.guest_instructions += guest.len() as u64;
        self.stats.host_bytes += out.code.len() as u64;
        let bytes = self.bytes.len() as u32;
        self.bytes.extend_from_slice(&source);
        self.units.push(Unit { bytes, len: source.len() as u16, ..out.unit });
        self.sites.extend(out.sites);
        self.links.extend(out.links);
        self.recipes.extend(out.recipes);
        self.notes.extend(out.notes);
        let map = if careful { &mut self.careful } else { &mut self.map };
        map.insert(map_key(id, linear), number);
        for id in [Some(id), second.map(|(_, id)| id)].into_iter().flatten() {
            if let Some(page) = self.pages.get_mut(id as usize - 1) {
                page.units.push(number);
            }
        }
        Some(number)
    }

    /// The careful unit at a site, for a group whose span isn't in one page. A unit to which that happens all the time is given up, to be translated
    /// without groups.
    fn careful_unit(&mut self, site: &Site, icount: u64) -> Option<Unit> {
        if let Some(key) = self.units.get(site.unit as usize).map(|u| map_key(u.page, u.rip)) {
            let (failures, last) = self.rough.entry(key).or_default();
            // Once in a few runs of the unit costs more than the groups save.
            let often = icount.wrapping_sub(*last) < 8 * u64::from(site.count);
            *last = icount;
            *failures = if often { failures.saturating_add(1) } else { failures.saturating_sub(1) };
            if *failures == ROUGH {
                *failures = u8::MAX;
                self.give_up(site.unit);
            }
        }
        let unit = self.units.get(*self.careful.get(&map_key(site.page, site.rip))? as usize).copied()?;
        (unit.page == site.page && unit.rip == site.rip && !unit.dead).then_some(unit)
    }

    /// Makes the careful unit at the present instruction.
    fn make_careful(&mut self, cpu: &mut Cpu) {
        let linear = cpu.state.rip;
        let Some(mode) = ModeKey::of(cpu, self.width) else { return };
        self.mode = mode;
        let Some(id) = self.second_page(cpu, linear) else { return };
        if !self.careful.contains_key(&map_key(id, linear)) && self.arena.room() >= 128 << 10 {
            self.translate(cpu, id, linear, true);
        }
    }

    /// The identity of the page that an instruction goes on in, entered in the window. None: it can't be had, the interpreter knows why.
    fn second_page(&mut self, cpu: &mut Cpu, linear: u64) -> Option<u32> {
        let cr2 = cpu.state.cr2;
        let id = self.page_at(cpu, linear).ok().flatten();
        cpu.state.cr2 = cr2;
        id
    }

    /// Makes a link lead to a unit.
    fn connect(&mut self, link: u32, to: u32) {
        let (Some(l), Some(unit)) =
            (self.links.get(link as usize).copied(), self.units.get(to as usize).copied())
        else {
            return;
        };
        if l.to == Some(to) || l.target != unit.rip {
            return;
        }
        if l.to.is_some() {
            self.stats.relinks += 1;
        }
        self.stats.links += 1;
        let entry = if l.page == unit.page {
            if l.flags_live { unit.live } else { unit.saved }
        } else {
            // From page to page: what the linear page is must be looked at each time.
            let offset = self.arena.used.next_multiple_of(16);
            if self.arena.room() < 256 {
                return;
            }
            self.arena.used = offset;
            let mut a = Asm::new(self.arena.exec(offset), self.arena.context() as u64);
            if l.flags_live {
                a.save_flags();
            }
            let failed = translate::guard(&mut a, unit.rip, unit.page);
            a.jmp_abs(self.arena.exec(unit.saved as usize));
            a.here(failed);
            a.mov_imm(asm::r::T0, link.into());
            a.jmp_abs(self.stubs.link);
            let Some(at) = self.arena.add(&a.buf) else { return };
            at as u32
        };
        self.arena.patch_rel32(l.at as usize, entry as usize);
        if let Some(l) = self.links.get_mut(link as usize) {
            l.to = Some(to);
        }
    }

    /// Runs until `end` or something else.
    pub(crate) fn run(&mut self, cpu: &mut Cpu, cache: &mut BlockCache, end: u64) -> Exit {
        let mut faults = 0;
        cpu.look_around();
        self.pending = Pending::None;
        loop {
            let now = cpu.state.icount;
            // Said of the present instruction, just now.
            let hot = std::mem::take(&mut cpu.hot);
            if now >= end {
                return Exit::Budget;
            }
            if cpu.epoch != hyaline_ram::code::epoch() {
                cpu.catch_up();
            }
            // The interpreter catches up too, so this has a count of its own.
            let hits = hyaline_ram::code::hits();
            if hits != self.hits {
                self.check_pages(cpu);
            }
            let pending = cpu.signals.pending();
            let waits = pending & Signals::INTERRUPT != 0 && cpu.state.rflags & flag::IF == 0;
            let pending = if waits { pending & !Signals::INTERRUPT } else { pending };
            if pending | cpu.attention != 0 {
                // One instruction at a time, with all that lies between them.
                self.pending = Pending::None;
                match cpu.run_loop(cache, now + 1) {
                    Exit::Budget => continue,
                    exit => return exit,
                }
            }
            let mode = ModeKey::of(cpu, self.width);
            let unit = match mode {
                None => None,
                Some(mode) => {
                    self.mode = mode;
                    match self.unit_at(cpu, hot) {
                        Ok(unit) => unit,
                        Err(fault) => match cpu.deliver(fault, &mut faults) {
                            Ok(()) => {
                                self.pending = Pending::None;
                                continue;
                            }
                            Err(exit) => return exit,
                        },
                    }
                }
            };
            let Some(unit) = unit else {
                self.pending = Pending::None;
                // Blocks are interpreted until one is hot; where there is no translation to be had for one that is, just that one.
                let refused = mode.is_none() || std::mem::take(&mut self.refused);
                cpu.heat_limit = (!refused).then_some(self.options.threshold);
                let count = if refused && mode.is_some() { self.cold_count(cpu, cache) } else { 4096 };
                let until = end.min(now + count);
                let exit = cpu.run_loop(cache, until);
                cpu.heat_limit = None;
                self.stats.cold_instructions += cpu.state.icount - now;
                match exit {
                    Exit::Budget => continue,
                    exit => return exit,
                }
            };
            match std::mem::replace(&mut self.pending, Pending::None) {
                Pending::Link(link) => self.connect(link, unit),
                Pending::Redirect(dead) => self.redirect(dead, unit),
                Pending::Target => {
                    if let Some(u) = self.units.get(unit as usize) {
                        let host = self.arena.exec(u.guarded as usize);
                        cpu.mmu.window.code.set_target(stubs::target_slot(u.rip), u.rip, host);
                    }
                }
                Pending::None => {}
            }
            let Some(u) = self.units.get(unit as usize).copied() else { continue };
            let before = cpu.state.icount;
            match self.enter(cpu, u, end) {
                exit::LINK => self.pending = Pending::Link(self.context().argument as u32),
                exit::LOOKUP => {
                    self.stats.lookups += 1;
                    if let Err(fault) = self.arrive(cpu) {
                        match cpu.deliver(fault, &mut faults) {
                            Ok(()) => continue,
                            Err(exit) => return exit,
                        }
                    }
                    self.pending = Pending::Target;
                }
                exit::COUNT => {
                    self.stats.slices += 1;
                    let number = self.context().argument as u32;
                    if self.units.get(number as usize).is_some_and(|u| u.dead) {
                        self.pending = Pending::Redirect(number);
                    } else if cpu.state.icount == before {
                        // The budget ends within this unit.
                        let exit = cpu.run_loop(cache, end);
                        self.stats.cold_instructions += cpu.state.icount - before;
                        match exit {
                            Exit::Budget => {}
                            exit => return exit,
                        }
                    }
                }
                exit::FAULT => {
                    if let Some(fault) = self.fault.take() {
                        if cpu.state.icount != before {
                            faults = 0;
                        }
                        match cpu.deliver(fault, &mut faults) {
                            Ok(()) => continue,
                            Err(exit) => return exit,
                        }
                    }
                }
                exit::SPAN => self.make_careful(cpu),
                exit::CAREFUL => {
                    let count = self.context().argument;
                    let until = end.min(cpu.state.icount.saturating_add(count));
                    match cpu.run_loop(cache, until) {
                        Exit::Budget => {}
                        exit => return exit,
                    }
                }
                _ => cpu.look_around(),
            }
            if cpu.state.icount != before {
                faults = 0;
            }
        }
    }

    /// Whether nothing waits to be looked at between instructions.
    fn calm(&self, cpu: &Cpu) -> bool {
        let pending = cpu.signals.pending();
        let waits = pending & Signals::INTERRUPT != 0 && cpu.state.rflags & flag::IF == 0;
        let pending = if waits { pending & !Signals::INTERRUPT } else { pending };
        pending | cpu.attention == 0
            && cpu.epoch == hyaline_ram::code::epoch()
            && self.hits == hyaline_ram::code::hits()
    }

    /// The unit at the present instruction, when there is one and the mode can be translated.
    fn existing_unit(&mut self, cpu: &mut Cpu) -> Option<Unit> {
        self.mode = ModeKey::of(cpu, self.width)?;
        let linear = cpu.state.rip;
        let id = self.second_page(cpu, linear)?;
        let unit = self.units.get(self.find(id, linear)? as usize).copied()?;
        unit.second.is_none().then_some(unit)
    }

    /// Instructions of the present block.
    fn cold_count(&mut self, cpu: &mut Cpu, cache: &mut BlockCache) -> u64 {
        let linear = cpu.code_linear(cpu.state.rip);
        let context = cpu.context();
        let block = match cache.jump(linear, context) {
            Some(block) => Some(block),
            // A fault comes again in the interpreter, which delivers it.
            None => {
                let cr2 = cpu.state.cr2;
                let found = cpu.find_block(cache, linear).ok();
                if found.is_none() {
                    cpu.state.cr2 = cr2;
                }
                found
            }
        };
        block.and_then(|b| cache.blocks.get(b as usize)).map_or(1, |b| u64::from(b.len).max(1))
    }

    /// The unit at the present instruction, translated when it is `hot`.
    fn unit_at(&mut self, cpu: &mut Cpu, hot: bool) -> Result<Option<u32>, Fault> {
        let linear = cpu.state.rip;
        self.refused = false;
        let Some(id) = self.page_at(cpu, linear)? else {
            self.refused = true;
            return Ok(None);
        };
        if let Some(unit) = self.find(id, linear) {
            match self.units.get(unit as usize).and_then(|u| u.second) {
                None => return Ok(Some(unit)),
                Some((next, second)) => match self.second_page(cpu, next) {
                    Some(now) if now == second => return Ok(Some(unit)),
                    Some(_) => {}
                    None => {
                        self.refused = true;
                        return Ok(None);
                    }
                },
            }
        }
        if !hot && self.options.threshold != 0 {
            return Ok(None);
        }
        let full = self.arena.room() < 128 << 10 || self.sites.len() > 1 << 22 || self.pages.len() > 1 << 20;
        let id = if full {
            self.flush(cpu);
            let Some(id) = self.page_at(cpu, linear)? else { return Ok(None) };
            id
        } else {
            id
        };
        let unit = self.translate(cpu, id, linear, false);
        self.refused = unit.is_none();
        Ok(unit)
    }

    /// Runs generated code from a unit on; gives why it was left.
    fn enter(&mut self, cpu: &mut Cpu, unit: Unit, end: u64) -> u64 {
        self.stats.entries += 1;
        let left = (end - cpu.state.icount).min(SLICE);
        self.slice_end = cpu.state.icount + left;
        let jit: *mut Jit = self;
        let base = cpu.mmu.window.code.base();
        self.base = base;
        let c = self.context();
        c.left = left as i64;
        c.cpu = cpu;
        c.jit = jit;
        c.state = &raw mut cpu.state;
        c.signals = cpu.signals.word().as_ptr();
        c.vec_live = 0;
        to_context(cpu, c);
        let enter = self.stubs.enter;
        let target = self.arena.exec(unit.saved as usize);
        // SAFETY: `enter` is a function of this type, and `target` a unit's entry for saved flags. What the code depends on is
        // in the context: the processor and the translator, which nothing else refers to until it comes back (the two
        // references here aren't used meanwhile). Its memory accesses are to the context, its stack, the window's tables (GS) and
        // guest memory that these tables vouch for.
        unsafe {
            gs::set(base);
            std::mem::transmute::<u64, extern "sysv64" fn(u64)>(enter)(target);
        }
        let c = self.context();
        let reason = c.exit;
        if matches!(reason, exit::DONE | exit::FAULT | exit::CAREFUL | exit::SPAN) {
            return reason;
        }
        let (argument, address, left) = (c.argument as usize, c.address, c.left);
        let c: *mut Context = c;
        // SAFETY: the context is memory of its own; no generated code runs.
        from_context(cpu, unsafe { &mut *c }, self);
        cpu.state.icount = self.slice_end.wrapping_sub(left as u64);
        match reason {
            exit::LINK => cpu.state.rip = self.links.get(argument).map_or(0, |l| l.target),
            exit::COUNT => cpu.state.rip = self.units.get(argument).map_or(0, |u| u.rip),
            _ => cpu.state.rip = address,
        }
        reason
    }

    /// After an indirect branch: a target that can't be is the branch's own fault.
    fn arrive(&mut self, cpu: &mut Cpu) -> Result<(), Fault> {
        let target = cpu.state.rip;
        if !cpu.in_64bit() || cpu.canonical(target) {
            return Ok(());
        }
        let (site, below) = (self.context().argument as usize, self.context().below);
        if let Some(site) = self.sites.get(site).copied() {
            // As if it hadn't been executed. Only the stack was changed, by returns and calls.
            let insn = self.decode_site(cpu, &site);
            cpu.state.rip = site.rip;
            cpu.state.icount = cpu.state.icount.wrapping_sub(1);
            let sp = cpu.state.gpr[4];
            use iced_x86::FlowControl as F;
            match insn.code.flow_control() {
                F::Return => cpu.state.gpr[4] = sp.wrapping_sub(8 + (insn.imm & 0xffff)),
                F::IndirectCall => {
                    // It was written to just now.
                    let _ = cpu.store::<u64>(Seg::Ss, sp, below);
                    cpu.state.gpr[4] = sp.wrapping_add(8);
                }
                _ => {}
            }
        }
        Err(Fault::gp(0))
    }

    fn decode_site(&self, cpu: &mut Cpu, site: &Site) -> decode::Insn {
        let mode = Mode { bits: self.mode.bits(), amd: cpu.amd };
        // The bytes were decoded before, with the same outcome.
        cpu.decode(&site.bytes, mode).unwrap_or_else(decode::Insn::undefined)
    }
}

fn map_key(id: u32, linear: u64) -> u64 {
    u64::from(id) << 12 | linear & (PAGE - 1)
}

/// The unit made from guest code at 0x1000, on a host with BMI2: its guest instructions and its host code. None when the processor
/// model of this host lacks an instruction.
#[cfg(test)]
fn emitted(bits: u32, code: &[u8]) -> Option<(Vec<Guest>, Vec<u8>)> {
    let model = crate::testing::cpu().model;
    let mode = Mode { bits, amd: true };
    let (mut guest, mut at) = (Vec::new(), 0);
    while let Some(rest) = code.get(at..).filter(|c| !c.is_empty()) {
        let insn = decode::decode(rest, mode, &model)?;
        guest.push(Guest::new(0x1000 + at as u64, insn, bits));
        at += usize::from(insn.len);
    }
    let long = if bits == 64 { ModeKey::LONG } else { 0 };
    let key =
        ModeKey(long | ModeKey::X87 | ModeKey::SSE | ModeKey::AVX | ModeKey::FS_FLAT | ModeKey::GS_FLAT);
    let numbers = Numbers {
        unit: 0,
        page: 1,
        site: 0,
        link: 0,
        recipe: 0,
        note: 0,
        careful: false,
        second: None,
        exec: 0x1000_0000,
        offset: 0,
        ctx: 0x1000_0000,
    };
    let host = Host { bmi2: true, locks: true, tzcnt: true, lzcnt: true };
    let mut info = InstructionInfoFactory::new();
    let out = translate::translate(&guest, numbers, key, host, &Stubs::default(), &mut info);
    Some((guest, out.code))
}

/// Guest and host code of a unit, in lines.
#[cold]
fn listing(guest: &[Guest], bits: u32, host: &[u8], exec: u64) -> String {
    use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
    use std::fmt::Write;
    let mut formatter = GasFormatter::new();
    let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
    let first = guest.first().map_or(0, |g| g.rip);
    let mut text = format!(
        "unit at {first:#x}, {bits}-bit code: {} instructions, {} bytes of host code",
        guest.len(),
        host.len()
    );
    for g in guest {
        let _ = write!(text, "\n  guest {:#018x}  {:<30}  ", g.rip, hex(g.insn.bytes()));
        formatter.format(&g.iced, &mut text);
    }
    for i in Decoder::with_ip(64, host, exec, DecoderOptions::NONE).iter() {
        let at = i.ip().wrapping_sub(exec) as usize;
        let bytes = host.get(at..at + i.len()).unwrap_or_default();
        let _ = write!(text, "\n  host  {:#018x}  {:<30}  ", i.ip(), hex(bytes));
        formatter.format(&i, &mut text);
    }
    text
}

/// The state to generated code's registers.
fn to_context(cpu: &mut Cpu, c: &mut Context) {
    cpu.settle_mxcsr();
    c.gpr = cpu.state.gpr;
    c.flags = pack_flags(cpu.arithmetic_flags());
    c.base = cpu.state.seg.each_ref().map(|s| s.base);
    (c.fpu_note, c.fpu_data, c.fpu_segment) = (0, cpu.state.x87.fdp, context::NO_SEGMENT);
}

/// Generated code's registers to the state.
fn from_context(cpu: &mut Cpu, c: &mut Context, jit: &Jit) {
    for (to, from) in cpu.state.gpr.iter_mut().zip(&c.gpr) {
        // One by one, as they were stored just before: a wider load would wait for the stores to reach the cache.
        // SAFETY: a reference is valid for reads.
        *to = unsafe { std::ptr::read_volatile(from) };
    }
    cpu.set_flags(unpack_flags(c.flags));
    // What the last x87 instruction leaves for FNSTENV (SDM vol. 1 §8.1.8).
    if c.fpu_note != 0 {
        let selector = |seg: usize| cpu.state.seg.get(seg).map_or(0, |s| s.selector);
        let (fcs, fds) = (selector(Seg::Cs as usize), selector(c.fpu_segment as usize));
        let x87 = &mut cpu.state.x87;
        if let Some(note) = jit.notes.get(c.fpu_note as usize - 1) {
            (x87.fip, x87.fop, x87.fcs) = (note.rip, note.opcode, fcs);
        }
        if c.fpu_segment != context::NO_SEGMENT {
            (x87.fdp, x87.fds) = (c.fpu_data, fds);
        }
        c.fpu_note = 0;
    }
}

/// The GS base, which nothing else in the process uses: it stays what it was set to last.
mod gs {
    use std::cell::Cell;
    use std::sync::OnceLock;

    thread_local! {
        /// What the thread's base was set to last; 0 is no window's.
        static NOW: Cell<u64> = const { Cell::new(0) };
    }

    /// Whether user code may use the instructions (AT_HWCAP2, bit 1).
    fn direct() -> bool {
        static DIRECT: OnceLock<bool> = OnceLock::new();
        // SAFETY: reads the auxiliary vector.
        *DIRECT.get_or_init(|| unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0)
    }
    /// Makes `v` the thread's base. It costs as much as dozens of instructions, so only when it isn't yet.
    ///
    /// # Safety
    /// Code that runs afterwards must expect this base.
    #[inline]
    pub(super) unsafe fn set(v: u64) {
        if NOW.replace(v) == v {
            return;
        }
        if direct() {
            // SAFETY: tested above.
            unsafe { std::arch::asm!("wrgsbase {}", in(reg) v, options(nostack, preserves_flags)) };
        } else {
            // SAFETY: ARCH_SET_GS takes the base.
            unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1001, v) };
        }
    }
}
