//! The processor: its fast copies of state, and the loop that runs blocks.

use crate::block::{Block, BlockCache, MAX_INSNS, Source};
use crate::decode::{Ea, Insn, Mode, insn_flag};
use crate::env::{CpuLog, Env, Peers, Signals};
use crate::fault::{DebugStop, Exec, Exit, Fault};
use crate::jit::{Jit, JitError, JitStats, Tier};
use crate::native::mem::PAGE;
use crate::state::{Activity, CpuState, EventKind, Seg, Shadow, cr0, cr4, efer, flag};
use crate::stops::Stops;
use crate::sys::cpuid::CpuModel;
use crate::sys::{debug, event, reset, smm};
use crate::template::Templates;
use crate::tlb::{Backing, Mmu, View};
use hyaline_ram::RamBlock;
use hyaline_space::ExitKind;
use std::sync::{Arc, PoisonError};

/// What the fast path of a memory access needs of a segment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FastSegment {
    /// Linear base (0 where 64-bit mode ignores it).
    pub base: u64,
    /// `offset + size` up to this may be read without further checks; 0 sends every access the slow way.
    pub readable: u64,
    /// The same for writes.
    pub writable: u64,
}

/// Things to look at before the next instruction, bits of [`Cpu::attention`].
mod attention {
    /// TF or breakpoints: instruction by instruction.
    pub(super) const STEP: u32 = 1;
    /// An interrupt shadow lies on the next instruction.
    pub(super) const SHADOW: u32 = 2;
    /// Not running, or an event to inject, or an NMI waits.
    pub(super) const STATE: u32 = 4;
    /// Memory that a debugger watches was accessed.
    pub(super) const HIT: u32 = 8;
}

/// One logical processor.
pub struct Cpu {
    /// The architectural state. The arithmetic flags in `rflags` are exact outside of [`Cpu::run`]. Whoever changes control registers,
    /// segments, EFER or RFLAGS.VM/AC from outside sees it taken up by the next run.
    pub state: CpuState,
    /// The machine around it.
    pub env: Box<dyn Env>,
    /// What CPUID says.
    pub model: Arc<CpuModel>,
    /// Who is told of events and decoded code.
    pub log: Option<Arc<dyn CpuLog>>,
    /// Where execution goes after a block's last instruction; branches set it.
    pub(crate) next_rip: u64,
    /// The block in execution stops before the instruction of this number.
    pub(crate) stop_at: u32,
    /// Number of the instruction in execution within its block.
    pub(crate) index: u32,
    /// Lazy arithmetic flags: the last result, sign-extended; see `exec::flags`.
    pub(crate) lazy_result: u64,
    /// Lazy arithmetic flags: carries and deviations.
    pub(crate) lazy_aux: u64,
    pub(crate) segc: [FastSegment; 8],
    /// The host's MXCSR holds the guest's, which has default controls; exceptions gather there. See [`Cpu::settle`].
    pub(crate) mxcsr_live: bool,
    /// The host's x87 registers hold the guest's, of which all exceptions are masked. See [`Cpu::settle`].
    pub(crate) x87_live: bool,
    pub(crate) mmu: Mmu,
    pub(crate) view: View,
    pub(crate) debug_armed: bool,
    /// Debug conditions met and not reported yet.
    pub(crate) debug: debug::DebugState,
    /// What a debugger outside wants to stop at.
    pub(crate) stops: Stops,
    pub(crate) alignment_checked: bool,
    in_64bit: bool,
    cpl: u8,
    code_bits: u8,
    stack_bytes: u8,
    pub(crate) amd: bool,
    /// Width of physical addresses.
    pub(crate) physical_bits: u32,
    /// Whether 1 GiB pages exist.
    pub(crate) gigabyte_pages: bool,
    /// RFLAGS bits that select views and modes, as they were at the last `mode_changed`.
    mode_flags: u64,
    pub(crate) attention: u32,
    code_limit: u64,
    /// The last limit of a code segment that had one.
    limit_seen: u64,
    /// The code epoch that was dealt with.
    pub(crate) epoch: u64,
    pub(crate) signals: Arc<Signals>,
    /// The other processors; None where there is but one.
    pub(crate) peers: Option<Arc<Peers>>,
    /// This processor's bit among those that write to a page directly.
    pub(crate) writer: u32,
    blocks: Option<Box<BlockCache>>,
    templates: Templates,
    /// The loop that runs blocks stops before one that was begun so often, and sets `hot`.
    pub(crate) heat_limit: Option<u8>,
    /// It did.
    pub(crate) hot: bool,
    pub(crate) jit: Option<Box<Jit>>,
}

/// RFLAGS bits that `mode_changed` depends on.
const MODE_FLAGS: u64 = flag::VM | flag::AC;
/// Bytes of a line of code marks.
const LINE: u64 = 64;
/// Exceptions in a row without one retired instruction after which the machine gets its thread back for a moment.
const FAULTS_IN_A_ROW: u32 = 10_000;

impl Cpu {
    /// A processor in the given state.
    pub fn new(state: CpuState, env: Box<dyn Env>, model: Arc<CpuModel>) -> Cpu {
        let signals = env.signals().clone();
        let peers = env.peers().filter(|p| p.several()).cloned();
        let writer = hyaline_ram::code::writer(env.index());
        let mut cpu = Cpu {
            state,
            env,
            log: None,
            next_rip: 0,
            stop_at: 0,
            index: 0,
            lazy_result: 0,
            lazy_aux: 0,
            segc: [FastSegment::default(); 8],
            mxcsr_live: false,
            x87_live: false,
            mmu: Mmu::new(),
            view: View::Kernel,
            debug_armed: false,
            debug: debug::DebugState::default(),
            stops: Stops::default(),
            alignment_checked: false,
            in_64bit: false,
            cpl: 0,
            code_bits: 16,
            stack_bytes: 2,
            amd: model.is_amd(),
            physical_bits: model.physical_bits().clamp(32, 52),
            gigabyte_pages: model.has_gigabyte_pages(),
            model,
            mode_flags: 0,
            attention: 0,
            code_limit: 0,
            limit_seen: 0,
            epoch: hyaline_ram::code::epoch(),
            signals,
            peers,
            writer,
            blocks: Some(Box::new(BlockCache::new())),
            templates: Templates::new(),
            heat_limit: None,
            hot: false,
            jit: None,
        };
        cpu.mode_changed();
        cpu.adopt_flags();
        cpu
    }

    /// Runs at most `budget` instructions: exactly `budget` unless something ends the run earlier. A string instruction with a
    /// repeat prefix counts as one.
    pub fn run(&mut self, budget: u64) -> Exit {
        // The cache is out of the processor while it runs, so that its instructions can be borrowed beside the processor.
        let mut cache = self.blocks.take().unwrap_or_else(|| Box::new(BlockCache::new()));
        // The state may have been changed from outside.
        self.adopt_flags();
        self.mode_changed();
        let end = self.state.icount.saturating_add(budget);
        self.come_in();
        let exit = match self.jit.take() {
            Some(mut jit) if !self.stops.armed() => {
                let exit = jit.run(self, &mut cache, end);
                self.jit = Some(jit);
                exit
            }
            // Translated code knows nothing of a debugger's stops.
            jit => {
                let exit = self.run_loop(&mut cache, end);
                self.jit = jit;
                exit
            }
        };
        self.materialize_flags();
        self.settle();
        self.signals.leave();
        self.blocks = Some(cache);
        exit
    }

    /// From here on this processor may execute instructions without looking at its requests first.
    fn come_in(&mut self) {
        loop {
            self.signals.enter();
            let pending = self.signals.pending();
            if pending & Signals::CODE != 0 {
                self.give_up_pages();
            }
            let Some(peers) = self.peers.as_ref().filter(|_| pending & Signals::EXCLUSIVE != 0) else {
                return;
            };
            self.signals.leave();
            drop(peers.exclusive.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Does something to memory while no other processor executes instructions.
    pub(crate) fn exclusively<R>(&mut self, f: impl FnOnce(&mut Cpu) -> R) -> R {
        let Some(peers) = self.peers.clone() else { return f(self) };
        // Outside while it waits: another one may be waiting for this one.
        self.signals.leave();
        let alone = peers.exclusive.lock().unwrap_or_else(PoisonError::into_inner);
        let own = self.env.index();
        peers.others(own).for_each(|o| o.raise(Signals::EXCLUSIVE));
        for other in peers.others(own) {
            let mut looks = 0_u32;
            while other.is_inside() {
                looks += 1;
                if looks < 200 { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
        let r = f(self);
        peers.others(own).for_each(|o| o.clear(Signals::EXCLUSIVE));
        drop(alone);
        self.come_in();
        r
    }

    /// Pages that have become code leave the write tables.
    #[cold]
    fn give_up_pages(&mut self) {
        self.signals.clear(Signals::CODE);
        for (ram, offset) in self.signals.take_pages() {
            self.mmu.forbid_writes(&ram, offset);
            ram.code().disown(offset, self.writer);
        }
    }

    /// Chooses how instructions are executed from now on.
    ///
    /// # Errors
    /// When the host can't run translated code; the tier stays as it was.
    pub fn set_tier(&mut self, tier: Tier) -> Result<(), JitError> {
        self.jit = match tier {
            Tier::Interp => None,
            Tier::Jit(options) => Some(Jit::new(self, options)?),
        };
        Ok(())
    }

    /// What the translator did so far; None when the processor interprets.
    pub fn jit_stats(&self) -> Option<&JitStats> {
        self.jit.as_ref().map(|jit| jit.stats())
    }

    /// Brings the parts of the state that instructions leave in the host's registers (MXCSR, x87) back to [`Cpu::state`]. Called before anything
    /// but instructions of `exec` and `native` can look at them, or compute with floats.
    #[inline(always)]
    pub(crate) fn settle(&mut self) {
        self.settle_mxcsr();
        self.settle_x87();
    }

    /// [`Cpu::settle`] for MXCSR alone.
    #[inline(always)]
    pub(crate) fn settle_mxcsr(&mut self) {
        if self.mxcsr_live {
            crate::native::leave_mxcsr(self);
        }
    }

    /// [`Cpu::settle`] for the x87 state alone.
    #[inline(always)]
    pub(crate) fn settle_x87(&mut self) {
        if self.x87_live {
            crate::native::leave_x87(self);
        }
    }

    /// Executes one instruction.
    pub fn step(&mut self) -> Exit {
        self.run(1)
    }

    /// After the map of physical memory changed.
    pub fn invalidate_map(&mut self) {
        self.mmu.invalidate_map();
        self.stop_at = 0;
    }

    /// Instructions retired before the one in execution.
    pub fn icount(&self) -> u64 {
        self.state.icount.wrapping_add(u64::from(self.index))
    }

    /// Current privilege level.
    #[inline(always)]
    pub fn cpl(&self) -> u8 {
        self.cpl
    }
    /// IA-32e mode is active (EFER.LMA): 64-bit or compatibility mode.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.state.efer & efer::LMA != 0
    }
    /// 64-bit mode.
    #[inline(always)]
    pub fn in_64bit(&self) -> bool {
        self.in_64bit
    }
    /// CR0.PE.
    #[inline(always)]
    pub fn protected(&self) -> bool {
        self.state.cr0 & cr0::PE != 0
    }
    /// Virtual-8086 mode.
    #[inline(always)]
    pub fn v86(&self) -> bool {
        self.state.rflags & flag::VM != 0
    }
    /// Default operand size of code: 16, 32 or 64.
    #[inline(always)]
    pub fn code_bits(&self) -> u32 {
        u32::from(self.code_bits)
    }
    /// The highest valid instruction pointer.
    #[inline(always)]
    pub(crate) fn code_limit(&self) -> u64 {
        self.code_limit
    }
    /// Recomputes what is derived from control registers, EFER, segments and RFLAGS.VM/AC. To be called after any change of those.
    /// The privilege level is SS.DPL, as VMX has it: a null SS keeps the level in its DPL.
    pub(crate) fn mode_changed(&mut self) {
        let was_flat = self.in_64bit && !self.alignment_checked;
        let s = &self.state;
        let protected = s.cr0 & cr0::PE != 0;
        let v86 = s.rflags & flag::VM != 0;
        let cs = &s.seg[Seg::Cs as usize];
        self.in_64bit = s.efer & efer::LMA != 0 && cs.long();
        self.cpl = match (protected, v86) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => s.seg[Seg::Ss as usize].dpl(),
        };
        self.code_bits = match (self.in_64bit, cs.big() && !v86) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        };
        self.stack_bytes = match (self.in_64bit, s.seg[Seg::Ss as usize].big() && !v86) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        };
        self.code_limit = u64::MAX;
        if !self.in_64bit {
            self.code_limit = u64::from(cs.limit);
            if self.code_limit != self.limit_seen {
                // Blocks are checked against the limit when they are looked up the long way.
                self.limit_seen = self.code_limit;
                self.mmu.renew();
            }
        }
        self.alignment_checked = s.rflags & flag::AC != 0 && self.cpl == 3 && s.cr0 & cr0::AM != 0;
        self.access_changed();
        if was_flat && self.in_64bit && !self.alignment_checked {
            // Only these have bases here, and the rest is what it was.
            for seg in [Seg::Fs, Seg::Gs] {
                self.segc[seg as usize & 7].base = self.state.seg[seg as usize].base;
            }
            return;
        }
        for seg in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
            self.seg_changed(seg);
        }
    }

    /// Chooses the window for the privilege level, CR4.SMAP, RFLAGS.AC and the PCID. Enough after a change of AC at privilege level 0.
    pub(crate) fn access_changed(&mut self) {
        let s = &self.state;
        let ac = s.rflags & flag::AC != 0;
        self.view = match (self.cpl, s.cr4 & cr4::SMAP != 0 && !ac) {
            (3, _) => View::User,
            (_, true) => View::KernelSmap,
            (_, false) => View::Kernel,
        };
        self.mode_flags = s.rflags & MODE_FLAGS;
        let pcid = self.pcid();
        self.mmu.select(pcid, self.view);
    }

    /// The address space identifier in force: 0 without CR4.PCIDE.
    #[inline]
    pub(crate) fn pcid(&self) -> u16 {
        if self.state.cr4 & cr4::PCIDE != 0 { (self.state.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Recomputes what is derived from one segment register. To be called after any change of its base, limit or attributes
    /// (for CS and SS: [`Cpu::mode_changed`]).
    pub(crate) fn seg_changed(&mut self, seg: Seg) {
        let s = &self.state.seg[seg as usize];
        let fast = if self.in_64bit {
            let base = if matches!(seg, Seg::Fs | Seg::Gs) { s.base } else { 0 };
            FastSegment { base, readable: u64::MAX, writable: u64::MAX }
        } else {
            let kind = s.kind();
            let typed = self.protected() && !self.v86();
            let end = u64::from(s.limit) + 1;
            let expand_down = s.is_code_or_data() && kind & 0b1100 == 0b0100;
            if s.unusable || expand_down || s.base.saturating_add(end) > 1 << 32 {
                FastSegment { base: s.base, readable: 0, writable: 0 }
            } else {
                let readable = !typed || kind & 0b1010 != 0b1000;
                let writable = !typed || kind & 0b1010 == 0b0010;
                FastSegment {
                    base: s.base,
                    readable: if readable { end } else { 0 },
                    writable: if writable { end } else { 0 },
                }
            }
        };
        let slow = self.alignment_checked;
        self.segc[seg as usize & 7] =
            if slow { FastSegment { readable: 0, writable: 0, ..fast } } else { fast };
    }

    /// Voids TLB entries: all, or all but those of global pages.
    pub(crate) fn flush_tlb(&mut self, globals_too: bool) {
        self.mmu.flush(!globals_too);
    }
    /// Voids the TLB entries of one PCID, except global ones.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.mmu.flush_pcid(pcid);
    }
    /// Voids the TLB entries for one linear address.
    pub(crate) fn invlpg(&mut self, linear: u64) {
        self.mmu.drop_page(linear);
    }

    /// Code that blocks were made from has been written to by this processor.
    #[cold]
    pub(crate) fn code_changed(&mut self) {
        self.catch_up();
        self.stop_at = 0;
    }

    /// The memory operand's segment and offset.
    #[inline(always)]
    pub(crate) fn mem_addr(&self, insn: &Insn) -> (Seg, u64) {
        (insn.seg, self.effective_address(insn))
    }

    /// The memory operand's effective address.
    #[inline(always)]
    pub(crate) fn effective_address(&self, insn: &Insn) -> u64 {
        let g = &self.state.gpr;
        let disp = insn.disp as i64 as u64;
        if insn.ea == Ea::Base64 {
            return g[insn.base as usize & 15].wrapping_add(disp);
        }
        let base = g[insn.base as usize & 15];
        let index = g[insn.index as usize & 15] << (insn.scale & 3);
        match insn.ea {
            Ea::Base64 => base.wrapping_add(disp),
            Ea::BaseIndex64 => base.wrapping_add(index).wrapping_add(disp),
            Ea::Index64 => index.wrapping_add(disp),
            Ea::Rip64 => self.state.rip.wrapping_add(u64::from(insn.len)).wrapping_add(disp),
            Ea::Base32 => base.wrapping_add(disp) & 0xffff_ffff,
            Ea::BaseIndex32 => base.wrapping_add(index).wrapping_add(disp) & 0xffff_ffff,
            Ea::Index32 => index.wrapping_add(disp) & 0xffff_ffff,
            Ea::Rip32 => self.state.rip.wrapping_add(u64::from(insn.len)).wrapping_add(disp) & 0xffff_ffff,
            Ea::BaseIndex16 => base.wrapping_add(index).wrapping_add(disp) & 0xffff,
            Ea::Base16 => base.wrapping_add(disp) & 0xffff,
            Ea::Absolute => match insn.asize {
                8 => disp,
                4 => disp & 0xffff_ffff,
                _ => disp & 0xffff,
            },
            Ea::Moffs => insn.imm,
            Ea::None => 0,
        }
    }

    /// The stack pointer as the stack segment's size has it.
    #[inline(always)]
    pub(crate) fn sp(&self) -> u64 {
        let rsp = self.state.gpr[4];
        match self.stack_bytes {
            8 => rsp,
            4 => rsp & 0xffff_ffff,
            _ => rsp & 0xffff,
        }
    }
    /// Wraps a stack offset to the stack's size.
    #[inline(always)]
    pub(crate) fn sp_wrap(&self, v: u64) -> u64 {
        match self.stack_bytes {
            8 => v,
            4 => v & 0xffff_ffff,
            _ => v & 0xffff,
        }
    }
    /// Sets as much of RSP as the stack's size has.
    #[inline(always)]
    pub(crate) fn set_sp(&mut self, v: u64) {
        let rsp = &mut self.state.gpr[4];
        *rsp = match self.stack_bytes {
            8 => v,
            4 => v & 0xffff_ffff,
            _ => *rsp & !0xffff | v & 0xffff,
        };
    }

    /// The linear address of an instruction pointer.
    #[inline(always)]
    pub(crate) fn code_linear(&self, rip: u64) -> u64 {
        let linear = self.segc[Seg::Cs as usize].base.wrapping_add(rip);
        if self.in_64bit { linear } else { linear & 0xffff_ffff }
    }

    /// What blocks and links are valid under: the window's contents and the code size.
    #[inline(always)]
    pub(crate) fn context(&self) -> u64 {
        self.mmu.window.generation << 8 | u64::from(self.code_bits)
    }

    /// Recomputes `attention` and whatever a system instruction may have changed.
    pub(crate) fn look_around(&mut self) {
        if self.peers.is_some() {
            // After an instruction that may be a serializing one: the stores before it are seen by all others (SDM vol. 3A §8.3).
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        }
        if (self.state.rflags ^ self.mode_flags) & MODE_FLAGS != 0 {
            self.mode_changed();
        }
        let armed = debug::armed(self);
        let watching = debug::watching(self);
        if watching != self.debug_armed {
            self.debug_armed = watching;
            // Watched pages must not be in the tables, nor stay out of them.
            self.mmu.flush(false);
        }
        let s = &self.state;
        let mut a = 0;
        if armed {
            a |= attention::STEP;
        }
        if s.shadow != Shadow::None {
            a |= attention::SHADOW;
        }
        if s.activity != Activity::Running || s.injected.is_some() || s.nmi_pending {
            a |= attention::STATE;
        }
        if self.stops.hit.is_some() {
            a |= attention::HIT;
        }
        self.attention = a;
    }

    pub(crate) fn run_loop(&mut self, cache: &mut BlockCache, end: u64) -> Exit {
        let mut faults = 0;
        self.look_around();
        'blocks: loop {
            if self.state.icount >= end {
                return Exit::Budget;
            }
            let mut most = u64::MAX;
            if self.signals.pending() | self.attention != 0 {
                match self.attend() {
                    Ok(n) => most = n,
                    Err(exit) => return exit,
                }
            }
            if self.epoch != hyaline_ram::code::epoch() {
                self.catch_up();
            }
            let linear = self.code_linear(self.state.rip);
            let mut block = match cache.jump(linear, self.context()) {
                Some(block) => block,
                None => match self.find_block(cache, linear) {
                    Ok(block) => {
                        if self.stops.breaks() {
                            match self.until_breakpoint(cache, block, linear) {
                                Ok(n) => most = most.min(n),
                                Err(exit) => return exit,
                            }
                        }
                        block
                    }
                    Err(fault) => match self.deliver(fault, &mut faults) {
                        Ok(()) => continue 'blocks,
                        Err(exit) => return exit,
                    },
                },
            };
            // Chained blocks: nothing but branches lies between them.
            loop {
                let Some(b) = cache.blocks.get_mut(block as usize) else { continue 'blocks };
                if let Some(limit) = self.heat_limit {
                    if b.heat >= b.limit(limit) {
                        self.hot = true;
                        return Exit::Budget;
                    }
                    b.heat += 1;
                }
                let left = (end - self.state.icount).min(most);
                let Some(insns) = cache.insns.get(b.start as usize..b.start as usize + usize::from(b.len))
                else {
                    cache.clear();
                    continue 'blocks;
                };
                let mask = if self.code_bits == 64 { u64::MAX } else { 0xffff_ffff };
                let mut rip = self.state.rip;
                self.next_rip = rip.wrapping_add(u64::from(b.bytes)) & mask;
                self.stop_at = left.min(insns.len() as u64) as u32;
                let mut i = 0;
                let single = self.attention & attention::STEP != 0;
                let was_single = single && self.state.rflags & flag::TF != 0;
                if single && let Err(fault) = debug::before_instruction(self, self.code_linear(rip)) {
                    match self.deliver(fault, &mut faults) {
                        Ok(()) => continue 'blocks,
                        Err(exit) => return exit,
                    }
                }
                while i < self.stop_at {
                    let Some(insn) = insns.get(i as usize) else { break };
                    self.state.rip = rip;
                    self.index = i;
                    if let Err(fault) = (insn.handler)(self, insn) {
                        self.state.icount += u64::from(i);
                        self.index = 0;
                        if i > 0 {
                            faults = 0;
                        }
                        match self.deliver(fault, &mut faults) {
                            Ok(()) => continue 'blocks,
                            Err(exit) => return exit,
                        }
                    }
                    rip = rip.wrapping_add(u64::from(insn.len));
                    i += 1;
                }
                self.state.icount += u64::from(i);
                self.index = 0;
                faults = 0;
                let whole = i as usize == insns.len();
                self.state.rip = if whole { self.next_rip } else { rip & mask };
                if b.system || single || !whole {
                    if single
                        && let Err(fault) =
                            debug::after_instruction(self, was_single, self.state.rip != rip & mask)
                        && let Err(exit) = self.deliver(fault, &mut faults)
                    {
                        return exit;
                    }
                    self.look_around();
                    continue 'blocks;
                }
                if self.signals.pending() | self.attention != 0
                    || self.state.icount >= end
                    || self.epoch != hyaline_ram::code::epoch()
                {
                    continue 'blocks;
                }
                // The next block: by this one's links, by the linear address, or the long way.
                let linear = self.code_linear(self.state.rip);
                let context = self.context();
                let [first, second] = &b.links;
                block = if first.linear == linear && first.key == context {
                    first.block
                } else if second.linear == linear && second.key == context {
                    second.block
                } else {
                    let Some(next) = cache.jump(linear, context) else { continue 'blocks };
                    if let Some(b) = cache.blocks.get_mut(block as usize) {
                        b.links = [crate::block::Link { linear, key: context, block: next }, b.links[0]];
                    }
                    next
                };
            }
        }
    }

    /// Between instructions: requests, events, interrupts, in the order of SDM vol. 3A table 6-2. Gives how many instructions may be
    /// executed before looking again.
    #[cold]
    fn attend(&mut self) -> Result<u64, Exit> {
        self.settle();
        if let Some(hit) = self.stops.hit.take() {
            return Err(Exit::Debug(hit));
        }
        let pending = self.signals.pending();
        if pending & (Signals::CODE | Signals::EXCLUSIVE) != 0 {
            self.signals.leave();
            self.come_in();
        }
        if pending & Signals::REMAP != 0 {
            self.signals.clear(Signals::REMAP);
            self.invalidate_map();
        }
        if pending & Signals::INIT != 0 {
            self.signals.clear(Signals::INIT);
            self.materialize_flags();
            reset::init(self);
            self.refresh();
        }
        if pending & Signals::NMI != 0 {
            self.signals.clear(Signals::NMI);
            self.state.nmi_pending = true;
        }
        if pending & Signals::KICK != 0 {
            self.signals.clear(Signals::KICK);
            return Err(Exit::Kicked);
        }
        match self.state.activity {
            Activity::Running => {}
            Activity::WaitForSipi => {
                let Some(vector) = self.signals.take_sipi() else { return Err(Exit::WaitForSipi) };
                self.state.activity = Activity::Running;
                reset::sipi(self, vector);
                self.refresh();
            }
            Activity::Shutdown => return Err(Exit::Shutdown),
            Activity::Halted => {
                let interrupt = pending & Signals::INTERRUPT != 0 && self.state.rflags & flag::IF != 0;
                let nmi = self.state.nmi_pending && !self.state.nmi_blocked;
                if !interrupt && !nmi && pending & Signals::SMI == 0 && self.state.injected.is_none() {
                    return Err(Exit::Halted);
                }
                self.state.activity = Activity::Running;
            }
        }
        if pending & Signals::SIPI != 0 && self.state.activity == Activity::Running {
            // Not waiting for it: ignored (SDM vol. 3A §8.4.1).
            let _ = self.signals.take_sipi();
        }
        let shadow = self.state.shadow;
        // A debugger's step does not go into interrupt handlers.
        let held = self.stops.stepping;
        if let Some(event) = self.state.injected.take() {
            self.materialize_flags();
            let done = event::reinject(self, event);
            self.refresh();
            done?;
        } else if pending & Signals::SMI != 0 && !self.state.smm && shadow == Shadow::None && !held {
            self.signals.clear(Signals::SMI);
            self.materialize_flags();
            let done = smm::enter(self);
            self.refresh();
            done?;
        } else if self.state.nmi_pending && !self.state.nmi_blocked && shadow != Shadow::MovSs && !held {
            self.state.nmi_pending = false;
            self.state.nmi_blocked = true;
            self.interrupt(crate::fault::vector::NMI, EventKind::Nmi)?;
        } else if pending & Signals::INTERRUPT != 0
            && shadow == Shadow::None
            && self.state.rflags & flag::IF != 0
            && !held
        {
            let icount = self.icount();
            self.env.at(icount);
            if let Some(vector) = self.env.acknowledge() {
                self.interrupt(vector, EventKind::External)?;
            }
        }
        self.look_around();
        self.debug.after_mov_ss = self.state.shadow == Shadow::MovSs;
        if self.attention & (attention::STEP | attention::SHADOW) != 0 {
            // The shadow ends with the next instruction, unless that casts another one.
            self.state.shadow = Shadow::None;
            return Ok(1);
        }
        Ok(u64::MAX)
    }

    fn interrupt(&mut self, vector: u8, kind: EventKind) -> Result<(), Exit> {
        self.materialize_flags();
        let done = event::interrupt(self, vector, kind);
        self.refresh();
        done
    }

    /// After the state was changed as a whole.
    fn refresh(&mut self) {
        self.adopt_flags();
        self.mode_changed();
        self.look_around();
    }

    /// Delivers a fault of the instruction at `state.rip`.
    #[cold]
    pub(crate) fn deliver(&mut self, fault: Fault, faults: &mut u32) -> Result<(), Exit> {
        self.materialize_flags();
        self.settle();
        match fault {
            Fault::Again => {
                self.look_around();
                Ok(())
            }
            Fault::Stop(exit) => {
                self.refresh();
                Err(exit)
            }
            Fault::Exception { vector, error } => {
                // The access is made anew, if at all.
                self.stops.hit = None;
                let done = event::exception(self, vector, error.map(u32::from));
                self.refresh();
                done?;
                if self.stops.stepping {
                    return Err(Exit::Debug(DebugStop::Step));
                }
                *faults += 1;
                if *faults >= FAULTS_IN_A_ROW {
                    // Faults without end, not one instruction done: bounded work for the machine's sake.
                    *faults = 0;
                    return Err(Exit::Kicked);
                }
                Ok(())
            }
        }
    }

    /// Somebody wrote to code. Links and jumps are keyed by the windows' generations: all are looked up again, where versions are compared.
    #[cold]
    pub(crate) fn catch_up(&mut self) {
        self.epoch = hyaline_ram::code::epoch();
        self.mmu.renew();
    }

    fn mode_number(&self) -> u64 {
        match self.code_bits {
            16 => 0,
            32 => 1,
            _ => 2,
        }
    }

    /// The block at a linear address (that of `state.rip`): looked up, or decoded.
    #[cold]
    pub(crate) fn find_block(&mut self, cache: &mut BlockCache, linear: u64) -> Exec<u32> {
        let rip = self.state.rip;
        if self.in_64bit {
            if !self.canonical(linear) {
                return Err(Fault::gp(0));
            }
        } else if rip > self.code_limit {
            return Err(Fault::gp(0));
        }
        let physical = self.translate_fetch(linear)?;
        let mode = self.mode_number();
        let room = (self.code_limit - rip).saturating_add(1);
        let epoch = self.epoch;
        let found = cache.find(physical, mode, epoch, || {
            let next = (linear | (PAGE - 1)).wrapping_add(1);
            self.translate_fetch(next).ok().map(|p| p & !(PAGE - 1))
        });
        if let Some(i) = found
            && cache.blocks.get(i as usize).is_some_and(|b| u64::from(b.bytes) <= room)
        {
            self.remember(cache, linear, i);
            return Ok(i);
        }
        if cache.is_full() {
            cache.clear();
        }
        let i = self.decode_block(cache, linear, physical, room)?;
        if cache.blocks.get(i as usize).is_some_and(|b| b.source.is_some() && u64::from(b.bytes) <= room) {
            self.remember(cache, linear, i);
        }
        Ok(i)
    }

    /// Lets a block be found by its linear address, unless a breakpoint is in it.
    fn remember(&self, cache: &mut BlockCache, linear: u64, block: u32) {
        let bytes = cache.blocks.get(block as usize).map_or(0, |b| u64::from(b.bytes));
        if !self.stops.breaks() || self.stops.first_in(linear, bytes).is_none() {
            cache.set_jump(linear, self.context(), block);
        }
    }

    /// How many instructions of the block at `linear` come before a breakpoint; the stop, if none.
    #[cold]
    fn until_breakpoint(&mut self, cache: &BlockCache, block: u32, linear: u64) -> Result<u64, Exit> {
        let Some(b) = cache.blocks.get(block as usize) else { return Ok(u64::MAX) };
        let insns = cache.insns.iter().skip(b.start as usize).take(usize::from(b.len));
        let mut at = linear;
        for (n, insn) in insns.enumerate() {
            if self.stops.first_in(at, 1).is_some() {
                return if n > 0 { Ok(n as u64) } else { Err(Exit::Debug(DebugStop::Breakpoint)) };
            }
            at = at.wrapping_add(u64::from(insn.len));
        }
        Ok(u64::MAX)
    }

    /// An access to a page with watched memory: if a debugger wants to stop at it, then after this instruction.
    #[cold]
    pub(crate) fn note_watched(&mut self, linear: u64, len: u64, is_write: bool) {
        if self.stops.hit.is_none()
            && let Some(stop) = self.stops.watched(linear, len, is_write)
        {
            self.stops.hit = Some(stop);
            self.stop_at = 0;
            self.attention |= attention::HIT;
        }
    }

    /// The memory that holds the code at a physical address: marked before it is read. None: what is made from it can't be kept, because it
    /// isn't memory, or because another processor may still write to it unseen.
    pub(crate) fn code_source(&mut self, physical: u64, len: u64) -> Option<Source> {
        self.code_lines(physical, hyaline_ram::code::line_mask(physical, len))
    }

    /// The same of a page and the lines of it that hold code.
    pub(crate) fn code_lines(&mut self, physical: u64, lines: u64) -> Option<Source> {
        let Backing::Memory { block, offset, .. } = self.mmu.physical.find(physical, self.env.memory())
        else {
            return None;
        };
        let ram = self.mmu.physical.block(block)?;
        let version = ram.code().mark(offset, lines);
        let writers = ram.code().may_write(offset);
        let ram = ram.clone();
        if writers != 0 && !self.claim(&ram, offset, writers) {
            return None;
        }
        Some(Source { ram, offset, version })
    }

    /// Sees to it that nobody writes directly to a page that has just been marked. True when that is so already: this processor gives it up at
    /// once, the others before they execute their next instruction; those that are executing some now are only asked.
    #[cold]
    fn claim(&mut self, ram: &Arc<RamBlock>, offset: u64, writers: u32) -> bool {
        if writers & self.writer != 0 {
            self.mmu.forbid_writes(ram, offset);
            ram.code().disown(offset, self.writer);
        }
        let Some(peers) = &self.peers else { return true };
        let mut quiet = true;
        for n in (0..32_u8).filter(|n| writers & !self.writer & hyaline_ram::code::writer(*n) != 0) {
            if let Some(other) = peers.get(n) {
                other.ask_for_page(ram, offset);
                quiet &= !other.is_inside();
            }
        }
        quiet
    }

    /// Decodes the instruction at the start of `bytes`, see [`decode::decode`].
    pub(crate) fn decode(&mut self, bytes: &[u8], mode: Mode) -> Option<Insn> {
        self.templates.decode(bytes, mode, &self.model)
    }

    /// Reads code bytes of one page.
    pub(crate) fn fetch(&mut self, physical: u64, buf: &mut [u8]) {
        if let Backing::Memory { block, offset, .. } = self.mmu.physical.find(physical, self.env.memory())
            && let Some(ram) = self.mmu.physical.block(block)
            && ram.read(offset | physical & (PAGE - 1), buf).is_ok()
        {
            return;
        }
        let origin = self.origin(ExitKind::MmioRead);
        for (i, byte) in buf.iter_mut().enumerate() {
            *byte = self.env.memory().load(physical + i as u64, 1, &origin).0 as u8;
        }
    }

    fn decode_block(&mut self, cache: &mut BlockCache, linear: u64, physical: u64, room: u64) -> Exec<u32> {
        let mode = Mode { bits: u32::from(self.code_bits), amd: self.amd };
        let in_page = PAGE - (physical & (PAGE - 1));
        let mut at = 0_u64;
        let mut block = Block {
            start: 0,
            len: 0,
            bytes: 0,
            room: 0,
            heat: 0,
            renewed: 0,
            system: false,
            links: Default::default(),
            source: None,
            second: None,
            checked: 0,
        };
        let memory = matches!(self.mmu.physical.find(physical, self.env.memory()), Backing::Memory { .. });
        // The first line is marked before anything is read, the others as the block grows.
        block.source = self.code_source(physical, 1);
        let version = block.source.as_ref().map(|s| s.version);
        // The bytes up to the end of the last line that is marked. What isn't memory is read as it is needed.
        let mut bytes = [0_u8; LINE as usize * 2];
        let mut from = physical;
        let mut until = if memory { (physical | (LINE - 1)) + 1 } else { physical };
        if memory && let Some(buf) = bytes.get_mut(..(until - from) as usize) {
            self.fetch(from, buf);
        }
        let mut insns = std::mem::take(&mut cache.scratch);
        insns.clear();
        while insns.len() < MAX_INSNS {
            let len = (in_page - at).min(15).min(room - at);
            if len == 0 {
                break;
            }
            if physical + at + len > until {
                if memory && self.code_source(until, 1).map(|s| s.version) != version {
                    // Written to meanwhile by another processor: what was read before is void with its version. Or one that may write to it:
                    // what was read before may be kept.
                    break;
                }
                let keep = (physical + at - from) as usize;
                let kept = (until - (physical + at)) as usize;
                bytes.copy_within(keep..keep + kept, 0);
                from = physical + at;
                let more = if memory { LINE } else { from + len - until };
                if let Some(buf) = bytes.get_mut(kept..kept + more as usize) {
                    self.fetch(until, buf);
                }
                until += more;
            }
            let skip = (physical + at - from) as usize;
            let buf = bytes.get(skip..skip + len as usize).unwrap_or(&[]);
            let Some(insn) = self.templates.decode(buf, mode, &self.model) else {
                if at > 0 {
                    break;
                }
                cache.scratch = insns;
                if room < 15 && room <= in_page {
                    // The instruction goes on beyond the segment's limit.
                    return Err(Fault::gp(0));
                }
                return self.decode_across(cache, linear, physical, in_page, room, block);
            };
            at += u64::from(insn.len);
            block.bytes = at as u16;
            let ends = insn.has(insn_flag::END);
            block.system |= ends && !insn.has(insn_flag::PLAIN);
            insns.push(insn);
            // What doesn't come from memory may change at any time.
            if ends || !memory {
                break;
            }
        }
        if let Some(log) = self.log.clone() {
            let mut bytes = vec![0; usize::from(block.bytes)];
            self.fetch(physical, &mut bytes);
            log.code(self.env.index(), linear, u32::from(self.code_bits), &bytes);
        }
        let i = cache.add(physical, self.mode_number(), &insns, block);
        cache.scratch = insns;
        Ok(i)
    }

    /// Decodes one instruction that goes on in the next page.
    fn decode_across(
        &mut self,
        cache: &mut BlockCache,
        linear: u64,
        physical: u64,
        in_page: u64,
        room: u64,
        mut block: Block,
    ) -> Exec<u32> {
        let next = linear.wrapping_add(in_page);
        let next = if self.in_64bit { next } else { next & 0xffff_ffff };
        if self.in_64bit && !self.canonical(next) {
            return Err(Fault::gp(0));
        }
        let second = self.translate_fetch(next)?;
        let len = room.min(15);
        let source = self.code_source(second, len.saturating_sub(in_page).max(1));
        let mut buf = [0_u8; 15];
        let (head, tail) = buf.split_at_mut((in_page as usize).min(15));
        self.fetch(physical, head);
        let more = (len as usize).saturating_sub(head.len()).min(tail.len());
        if let Some(tail) = tail.get_mut(..more) {
            self.fetch(second, tail);
        }
        let mode = Mode { bits: u32::from(self.code_bits), amd: self.amd };
        let Some(insn) = self.decode(buf.get(..len as usize).unwrap_or(&buf), mode) else {
            return Err(Fault::gp(0));
        };
        block.bytes = u16::from(insn.len);
        block.system = insn.has(insn_flag::END) && !insn.has(insn_flag::PLAIN);
        match source {
            Some(source) => block.second = Some((second & !(PAGE - 1), source)),
            None => block.source = None,
        }
        Ok(cache.add(physical, self.mode_number(), &[insn], block))
    }
}
