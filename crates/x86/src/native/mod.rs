//! What is executed on the host processor: guest memory accesses by host pointer (`mem`), and vector, MMX and x87
//! instructions.
//!
//! Tier 0 doesn't compute with vectors itself: each encoding gets a small function ("thunk", see `plan`) that loads the named
//! registers from the guest's state, runs the very instruction and stores them back. Results, rounding, flags and NaNs are
//! the host's, so they are exact, and a guest can be offered just what the host has ([`host_features`]). What has side effects
//! beyond registers (control words, FXSAVE and XSAVE, masked memory accesses) is written in Rust.
#![allow(unsafe_code)]

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "Hyaline's software x86 processor runs vector and floating-point instructions on the host processor, so this crate \
     builds only for x86-64 hosts; on other hosts a portable implementation of crates/x86/src/native is needed first."
);

mod arena;
mod encode;
mod features;
mod masked;
pub(crate) mod mem;
mod moves;
pub(crate) mod plan;
#[cfg(test)]
mod tests;
mod x87;
pub mod xsave;

pub use arena::ArenaError;
pub use features::{HostFeatures, host_features};
pub use plan::Plan;

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::fault::{Exec, Fault};
use crate::state::{CpuState, Seg, cr0, cr4};
use iced_x86::{Code, Instruction, Mnemonic};
use plan::{Class, Memory};

/// Where thunks find their memory operand.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Buffer([u8; plan::BUFFER]);

impl Default for Buffer {
    fn default() -> Self {
        Buffer([0; plan::BUFFER])
    }
}

impl Buffer {
    #[inline(always)]
    fn bytes(&mut self, size: usize) -> &mut [u8] {
        // Plans have no larger operands.
        &mut self.0[..size.min(plan::BUFFER)]
    }
    /// The eight bytes at `at`.
    #[inline(always)]
    fn word(&self, at: usize) -> u64 {
        self.0.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }
}

/// The handler of a vector, MMX or x87 instruction and its plan; None when the instruction isn't one or the host can't run it.
pub(crate) fn prepare(i: &Instruction, bytes: &[u8], bits: u32) -> Option<(Handler, Option<&'static Plan>)> {
    let code = i.code();
    if let Some(handler) = in_rust(i) {
        return Some((handler, None));
    }
    plan::class_of(code)?;
    if let Some(handler) = moves::handler(i) {
        return Some((handler, None));
    }
    match plan::find(i, bytes, bits) {
        plan::Found::Plan(plan) => Some((handler_of(plan), Some(plan))),
        plan::Found::Full => Some((execute_temporary, None)),
        plan::Found::Unsupported => None,
    }
}

fn handler_of(plan: &Plan) -> Handler {
    match (plan.class, plan.memory, plan.simd || plan.flags) {
        (Class::X87, ..) => |cpu, insn| x87::execute(cpu, insn, planned(insn)?),
        (_, Memory::Load | Memory::Store, _) if plan.mask.is_some() => {
            |cpu, insn| execute_masked(cpu, insn, planned(insn)?)
        }
        (Class::Mmx | Class::SseMmx, ..) => |cpu, insn| execute_mmx(cpu, insn, planned(insn)?),
        (_, Memory::None, false) => |cpu, insn| run::<NONE, false, false>(cpu, insn),
        (_, Memory::Load, false) => |cpu, insn| run::<LOAD, false, false>(cpu, insn),
        (_, Memory::Store, false) => |cpu, insn| run::<STORE, false, false>(cpu, insn),
        (_, Memory::None, true) if !plan.flags => |cpu, insn| run::<NONE, true, false>(cpu, insn),
        (_, Memory::Load, true) if !plan.flags => |cpu, insn| run::<LOAD, true, false>(cpu, insn),
        (_, Memory::None, true) if plan.simd => |cpu, insn| run::<NONE, true, true>(cpu, insn),
        (_, Memory::Load, true) if plan.simd => |cpu, insn| run::<LOAD, true, true>(cpu, insn),
        (_, Memory::None, true) => |cpu, insn| run::<NONE, false, true>(cpu, insn),
        (_, Memory::Load, true) => |cpu, insn| run::<LOAD, false, true>(cpu, insn),
        _ => |cpu, insn| execute(cpu, insn, planned(insn)?),
    }
}

/// The plan that `prepare` gave.
#[inline(always)]
fn planned(insn: &Insn) -> Exec<&'static Plan> {
    insn.plan.ok_or(Fault::ud())
}

/// There are too many plans already: makes one for this execution. Slow, and right.
fn execute_temporary(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let bits = cpu.code_bits();
    let i = insn.iced(bits, 0);
    let Some(plan) = plan::temporary(&i, insn.bytes(), bits) else { return Err(Fault::ud()) };
    match plan.class {
        Class::X87 => x87::execute(cpu, insn, &plan),
        _ if plan.mask.is_some() && plan.memory != Memory::None => execute_masked(cpu, insn, &plan),
        Class::Mmx | Class::SseMmx => execute_mmx(cpu, insn, &plan),
        _ => execute(cpu, insn, &plan),
    }
}

/// Instructions that are written in Rust.
fn in_rust(i: &Instruction) -> Option<Handler> {
    let code = i.code();
    let ours = || code.cpuid_features().iter().all(|&f| features::host_has(f) == Some(true));
    if let Some(handler) = x87::control(code).or_else(|| xsave::handler(code)) {
        return Some(handler);
    }
    Some(match code {
        Code::Maskmovq_rDI_mm_mm | Code::Maskmovdqu_rDI_xmm_xmm | Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => {
            masked::mask_move
        }
        Code::Lfence | Code::Mfence | Code::Sfence => |_, _| {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(())
        },
        Code::Prefetchnta_m8 | Code::Prefetcht0_m8 | Code::Prefetcht1_m8 | Code::Prefetcht2_m8 => {
            |_, _| Ok(())
        }
        Code::Movnti_m32_r32 => |cpu, insn| {
            let (seg, offset) = cpu.mem_addr(insn);
            cpu.store::<u32>(seg, offset, cpu.state.gpr[usize::from(insn.r1) & 15] as u32)
        },
        Code::Movnti_m64_r64 => |cpu, insn| {
            let (seg, offset) = cpu.mem_addr(insn);
            cpu.store::<u64>(seg, offset, cpu.state.gpr[usize::from(insn.r1) & 15])
        },
        Code::Emms => |cpu, _| {
            available(cpu, Class::Mmx)?;
            cpu.settle_x87();
            x87::check_pending(cpu)?;
            // The manuals differ on TOP; AMD's processors clear it, as every MMX instruction does.
            cpu.state.x87.fsw &= !0x3800;
            cpu.state.x87.ftw = 0;
            Ok(())
        },
        _ if !ours() => return None,
        Code::VEX_Vzeroupper => |cpu, _| {
            available(cpu, Class::Vex)?;
            zero_vectors(cpu, 2);
            Ok(())
        },
        Code::VEX_Vzeroall => |cpu, _| {
            available(cpu, Class::Vex)?;
            zero_vectors(cpu, 0);
            Ok(())
        },
        _ if masked::is_gather_or_scatter(code) => masked::gather_scatter,
        _ => match i.mnemonic() {
            Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq => {
                masked::mask_move_vex
            }
            _ => return None,
        },
    })
}

/// Clears ZMM0-15 (0-7 outside 64-bit mode) from quadword `from` up.
fn zero_vectors(cpu: &mut Cpu, from: usize) {
    let count = if cpu.in_64bit() { 16 } else { 8 };
    for register in &mut cpu.state.vec[..count] {
        register.0[from..].fill(0);
    }
}

/// #UD and #NM by the control registers (SDM vol. 2 §2.4 and §2.8, vol. 3A §2.5 and §14.1).
#[inline(always)]
fn available(cpu: &Cpu, class: Class) -> Exec {
    let s = &cpu.state;
    let fine = match class {
        Class::X87 => true,
        Class::Mmx => s.cr0 & cr0::EM == 0,
        Class::Sse | Class::SseMmx => s.cr0 & cr0::EM == 0 && s.cr4 & cr4::OSFXSR != 0,
        Class::Vex => s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & 6 == 6 && cpu.protected() && !cpu.v86(),
        Class::Evex => s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & 0xe6 == 0xe6 && cpu.protected() && !cpu.v86(),
    };
    if !fine {
        return Err(Fault::ud());
    }
    if s.cr0 & cr0::TS != 0 {
        return Err(Fault::nm());
    }
    Ok(())
}

/// The linear address of an offset, for alignment tests only.
fn linear_of(cpu: &Cpu, seg: Seg, offset: u64) -> u64 {
    if cpu.in_64bit() && !matches!(seg, Seg::Fs | Seg::Gs) {
        return offset;
    }
    cpu.state.seg[seg as usize].base.wrapping_add(offset)
}

/// The memory operand's address; something harmless when there is none.
#[inline(always)]
fn operand(cpu: &Cpu, insn: &Insn, memory: bool) -> (Seg, u64) {
    if memory { cpu.mem_addr(insn) } else { (Seg::Ds, 0) }
}

/// Loads `size` bytes to the start of the buffer. The common sizes go by whole words, the lower one first: an operand across a
/// page's end faults as one access would, with CR2 at the second page's start.
#[inline(always)]
fn general_load(cpu: &mut Cpu, at: (Seg, u64), buffer: &mut Buffer, size: usize) -> Exec {
    let (seg, offset) = at;
    match size {
        4 => buffer.0[..4].copy_from_slice(&cpu.load::<u32>(seg, offset)?.to_le_bytes()),
        8 => buffer.0[..8].copy_from_slice(&cpu.load::<u64>(seg, offset)?.to_le_bytes()),
        16 => {
            let low = cpu.load::<u64>(seg, offset)?;
            let high = cpu.load::<u64>(seg, next_offset(cpu, offset, 8))?;
            buffer.0[..8].copy_from_slice(&low.to_le_bytes());
            buffer.0[8..16].copy_from_slice(&high.to_le_bytes());
        }
        _ => cpu.load_bytes(seg, offset, buffer.bytes(size))?,
    }
    Ok(())
}

/// Stores `size` bytes from the start of the buffer, all or nothing.
#[inline(always)]
fn general_store(cpu: &mut Cpu, at: (Seg, u64), buffer: &mut Buffer, size: usize) -> Exec {
    match size {
        4 => cpu.store::<u32>(at.0, at.1, buffer.word(0) as u32),
        8 => cpu.store::<u64>(at.0, at.1, buffer.word(0)),
        16 if at.1 & 0xfff <= 0xff0 => {
            // In one page as far as the offset shows; the base of a segment might shift that, so the first half must not be
            // written unless the second can be.
            cpu.probe_write(at.0, at.1, 16)?;
            cpu.store::<u64>(at.0, at.1, buffer.word(0))?;
            cpu.store::<u64>(at.0, at.1.wrapping_add(8), buffer.word(8))
        }
        _ => cpu.store_bytes(at.0, at.1, buffer.bytes(size)),
    }
}

/// The offset of a later part of an operand.
#[inline(always)]
fn next_offset(cpu: &Cpu, offset: u64, by: u64) -> u64 {
    if cpu.in_64bit() { offset.wrapping_add(by) } else { offset.wrapping_add(by) & 0xffff_ffff }
}

/// #GP for operands that must be aligned and aren't.
#[inline(always)]
fn check_alignment(cpu: &Cpu, at: (Seg, u64), align: u16) -> Exec {
    if align > 1 && linear_of(cpu, at.0, at.1) & u64::from(align - 1) != 0 {
        // A segment violation comes first; that an address isn't canonical comes later.
        if !cpu.in_64bit() {
            cpu.linear(at.0, at.1, u64::from(align), crate::mmu::Access::Read)?;
        }
        return Err(Fault::gp(0));
    }
    Ok(())
}

/// Runs a thunk.
///
/// # Safety
/// `state` must be what the plan's class wants: the guest's state or an x87 image; MXCSR must have all exceptions masked.
#[inline(always)]
unsafe fn call_entry(plan: &Plan, state: *mut CpuState, buffer: &mut Buffer) {
    match plan.entry {
        // SAFETY: the caller vouches for `state`; the buffer holds the largest operand.
        Some(entry) => unsafe { entry(state, buffer.0.as_mut_ptr()) },
        // SAFETY: as above.
        None => unsafe { call_scratch(plan, state, buffer) },
    }
}

/// The arena is full: runs the thunk in the scratch slot.
#[cold]
unsafe fn call_scratch(plan: &Plan, state: *mut CpuState, buffer: &mut Buffer) {
    // Plans are only made once there is an arena or an error was reported; without executable memory nothing can run, and
    // `arena_error` told the machine so before the first instruction.
    if let Ok(mut arena) = arena::lock() {
        let at = arena.scratch(&plan.code);
        // SAFETY: the bytes are a whole thunk, the arena's lock is held until it returns; `state` as the caller vouches.
        unsafe { std::mem::transmute::<*const u8, plan::Entry>(at)(state, buffer.0.as_mut_ptr()) };
    }
}

/// Why thunks can't run on this system, if they can't: to be asked before a guest starts.
pub fn arena_error() -> Option<&'static ArenaError> {
    arena::lock().err()
}

/// Runs an instruction that neither uses MXCSR nor flags.
#[inline(always)]
fn call_plain(cpu: &mut Cpu, plan: &Plan, buffer: &mut Buffer) {
    // SAFETY: the plan's class isn't X87 (its handler is another), so it takes the state; without MXCSR use nothing can
    // raise a SIMD exception.
    unsafe { call_entry(plan, &raw mut cpu.state, buffer) };
}

/// Memory operands of [`run`].
const NONE: u8 = 0;
const LOAD: u8 = 1;
const STORE: u8 = 2;

/// The common case: the memory operand is where a TLB maps it, so that the thunk works on guest memory itself, as the instruction would,
/// and MXCSR has default controls. Everything else is [`execute`]'s.
#[inline(always)]
fn run<const MEMORY: u8, const SIMD: bool, const FLAGS: bool>(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let plan = planned(insn)?;
    available(cpu, plan.class)?;
    let size = u64::from(plan.size);
    let memory = if MEMORY == NONE {
        std::ptr::NonNull::<Buffer>::dangling().as_ptr().cast()
    } else {
        let at = cpu.mem_addr(insn);
        check_alignment(cpu, at, plan.align)?;
        match if MEMORY == LOAD { host_read(cpu, at, size) } else { host_write(cpu, at, size) } {
            Some(p) => p,
            None => return execute_slowly(cpu, insn),
        }
    };
    let Some(entry) = plan.entry else { return execute_slowly(cpu, insn) };
    if SIMD && !(cpu.mxcsr_live || enter_mxcsr(cpu)) {
        return execute_slowly(cpu, insn);
    }
    if FLAGS {
        cpu.materialize_flags();
    }
    // SAFETY: a thunk of any class but X87 takes the state. Its memory operand is `size` bytes at `memory`, which the TLB maps for
    // this kind of access; without one it doesn't use the pointer. All exceptions are masked.
    unsafe { entry(&raw mut cpu.state, memory) };
    if FLAGS {
        cpu.adopt_flags();
    }
    Ok(())
}

#[cold]
#[inline(never)]
fn execute_slowly(cpu: &mut Cpu, insn: &Insn) -> Exec {
    execute(cpu, insn, planned(insn)?)
}

/// Where the host has `size` bytes of guest memory that may be read without further checks.
#[inline(always)]
fn host_read(cpu: &Cpu, at: (Seg, u64), size: u64) -> Option<*mut u8> {
    let s = &cpu.segc[at.0 as usize & 7];
    if at.1.wrapping_add(size) > s.readable {
        return None;
    }
    cpu.mmu.window.read.host(s.base.wrapping_add(at.1), size)
}

/// The same for writing.
#[inline(always)]
fn host_write(cpu: &Cpu, at: (Seg, u64), size: u64) -> Option<*mut u8> {
    let s = &cpu.segc[at.0 as usize & 7];
    if at.1.wrapping_add(size) > s.writable {
        return None;
    }
    cpu.mmu.window.write.host(s.base.wrapping_add(at.1), size)
}

/// Any instruction without MMX registers or masked memory.
fn execute(cpu: &mut Cpu, insn: &Insn, plan: &Plan) -> Exec {
    available(cpu, plan.class)?;
    let at = operand(cpu, insn, plan.memory != Memory::None);
    check_alignment(cpu, at, plan.align)?;
    let mut buffer = Buffer::default();
    let size = usize::from(plan.size);
    match plan.memory {
        Memory::None => {}
        Memory::Load => general_load(cpu, at, &mut buffer, size)?,
        Memory::Store => cpu.probe_write(at.0, at.1, size as u64)?,
    }
    call(cpu, plan, &mut buffer)?;
    if plan.memory == Memory::Store {
        general_store(cpu, at, &mut buffer, size)?;
    }
    Ok(())
}

/// An EVEX instruction with a masked memory operand.
fn execute_masked(cpu: &mut Cpu, insn: &Insn, plan: &Plan) -> Exec {
    let Some(mask) = plan.mask else { return Err(Fault::ud()) };
    available(cpu, plan.class)?;
    let at = cpu.mem_addr(insn);
    check_alignment(cpu, at, plan.align)?;
    let mut buffer = Buffer::default();
    if plan.memory == Memory::Store {
        masked::probe_masked(cpu, plan, mask, at)?;
        call(cpu, plan, &mut buffer)?;
        masked::store_masked(cpu, plan, mask, at, &buffer)
    } else {
        masked::load_masked(cpu, plan, mask, at, &mut buffer)?;
        call(cpu, plan, &mut buffer)
    }
}

/// An instruction with MMX registers.
fn execute_mmx(cpu: &mut Cpu, insn: &Insn, plan: &Plan) -> Exec {
    available(cpu, plan.class)?;
    cpu.settle_x87();
    x87::check_pending(cpu)?;
    let at = operand(cpu, insn, plan.memory != Memory::None);
    check_alignment(cpu, at, plan.align)?;
    let mut buffer = Buffer::default();
    let size = usize::from(plan.size);
    match plan.memory {
        Memory::None => {}
        Memory::Load => general_load(cpu, at, &mut buffer, size)?,
        Memory::Store => cpu.probe_write(at.0, at.1, size as u64)?,
    }
    call(cpu, plan, &mut buffer)?;
    if plan.memory == Memory::Store {
        general_store(cpu, at, &mut buffer, size)?;
    }
    enter_mmx(cpu, plan.mmx_written);
    Ok(())
}

/// What an MMX instruction does to the x87 state (SDM vol. 1 §9.5.1): TOP is 0, all registers valid, written registers
/// have an exponent of all ones.
fn enter_mmx(cpu: &mut Cpu, written: u8) {
    let x87 = &mut cpu.state.x87;
    x87.fsw &= !0x3800;
    x87.ftw = 0xff;
    for (n, exponent) in x87.exponent.iter_mut().enumerate() {
        if written >> n & 1 != 0 {
            *exponent = 0xffff;
        }
    }
}

/// Runs an instruction that may use MXCSR, flags or both.
fn call(cpu: &mut Cpu, plan: &Plan, buffer: &mut Buffer) -> Exec {
    if plan.flags {
        cpu.materialize_flags();
    }
    if plan.simd {
        call_simd(cpu, plan, buffer)?;
    } else {
        call_plain(cpu, plan, buffer);
    }
    if plan.flags {
        cpu.adopt_flags();
    }
    Ok(())
}

/// MXCSR's exception masks.
const MASKS: u32 = 0x1f80;
/// MXCSR's exception flags.
const FLAGS: u32 = 0x3f;
/// Flags found before the operation: invalid, denormal, divide by zero (SDM vol. 1 §11.5.2).
const BEFORE: u32 = 7;
/// Underflow.
const UNDERFLOW: u32 = 0x10;
/// Flush to zero.
const FTZ: u32 = 0x8000;

fn read_mxcsr() -> u32 {
    let mut value = 0_u32;
    // SAFETY: stores four bytes to a local.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// # Safety
/// Exceptions must be masked, no reserved bit set, and the controls be back at their default before other Rust code computes
/// with floats.
unsafe fn write_mxcsr(value: u32) {
    // SAFETY: loads four bytes from a local; the caller vouches for the value.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}

/// Loads the guest's MXCSR into the host's, where it stays until [`Cpu::settle`]: its controls are Rust's too, only the sticky flags differ.
/// False: the guest has other controls.
#[cold]
#[inline(never)]
fn enter_mxcsr(cpu: &mut Cpu) -> bool {
    let guest = cpu.state.mxcsr;
    if guest & !FLAGS != MASKS {
        return false;
    }
    if read_mxcsr() != guest {
        // SAFETY: `guest` has default controls, all exceptions masked.
        unsafe { write_mxcsr(guest) };
    }
    cpu.mxcsr_live = true;
    true
}

/// Takes the guest's MXCSR back from the host's.
#[cold]
#[inline(never)]
pub(crate) fn leave_mxcsr(cpu: &mut Cpu) {
    cpu.state.mxcsr = read_mxcsr();
    cpu.mxcsr_live = false;
}

pub(crate) use x87::{enter as enter_x87, leave as leave_x87};

/// Runs an instruction under the guest's MXCSR.
#[inline]
fn call_simd(cpu: &mut Cpu, plan: &Plan, buffer: &mut Buffer) -> Exec {
    if !(cpu.mxcsr_live || enter_mxcsr(cpu)) {
        return call_simd_controlled(cpu, plan, buffer);
    }
    // SAFETY: as in `call_plain`; all exceptions are masked.
    unsafe { call_entry(plan, &raw mut cpu.state, buffer) };
    Ok(())
}

/// Runs the thunk with these controls, all exceptions masked, and gives the flags that it raised.
fn run_with(cpu: &mut Cpu, plan: &Plan, buffer: &mut Buffer, controls: u32) -> u32 {
    // SAFETY: masked, bits 16-31 clear (every way to set the guest's MXCSR checks them, and the mask here makes sure).
    unsafe { write_mxcsr(controls & 0xffc0 | MASKS) };
    // SAFETY: as in `call_plain`; all exceptions are masked.
    unsafe { call_entry(plan, &raw mut cpu.state, buffer) };
    let flags = read_mxcsr() & FLAGS;
    // SAFETY: the default.
    unsafe { write_mxcsr(MASKS) };
    flags
}

/// The guest changed rounding, flushing or masks.
#[cold]
fn call_simd_controlled(cpu: &mut Cpu, plan: &Plan, buffer: &mut Buffer) -> Exec {
    let guest = cpu.state.mxcsr;
    let unmasked = !(guest >> 7) & FLAGS;
    if unmasked == 0 || plan.suppresses {
        let raised = run_with(cpu, plan, buffer, guest);
        cpu.state.mxcsr |= raised;
        return Ok(());
    }
    // An unmasked exception leaves all destinations as they were.
    let (vec, gpr, opmask, significand, rflags, input) = (
        cpu.state.vec,
        cpu.state.gpr,
        cpu.state.opmask,
        cpu.state.x87.significand,
        cpu.state.rflags,
        *buffer,
    );
    let restore = |cpu: &mut Cpu| {
        (cpu.state.vec, cpu.state.gpr, cpu.state.opmask) = (vec, gpr, opmask);
        (cpu.state.x87.significand, cpu.state.rflags) = (significand, rflags);
    };
    let mut raised = run_with(cpu, plan, buffer, guest);
    if unmasked & UNDERFLOW != 0 {
        // Results are never flushed when underflow is unmasked (SDM vol. 1 §10.2.3.3).
        if guest & FTZ != 0 {
            restore(cpu);
            *buffer = input;
            let _ = run_with(cpu, plan, buffer, guest & !FTZ);
        }
        // Masked underflow is reported only for inexact results, unmasked underflow for every tiny one. With flush to zero
        // every tiny result is reported, without it inexactness is (SDM vol. 1 §4.9.1.5 and §10.2.3.3).
        let again = |cpu: &mut Cpu, controls| {
            let result =
                (cpu.state.vec, cpu.state.gpr, cpu.state.opmask, cpu.state.x87.significand, cpu.state.rflags);
            restore(cpu);
            let mut scratch = input;
            let flags = run_with(cpu, plan, &mut scratch, controls);
            (cpu.state.vec, cpu.state.gpr, cpu.state.opmask, cpu.state.x87.significand, cpu.state.rflags) =
                result;
            flags
        };
        let tiny = again(cpu, guest | FTZ) & UNDERFLOW;
        raised = again(cpu, guest & !FTZ) & !UNDERFLOW | tiny;
    }
    if raised & unmasked & BEFORE != 0 {
        // Nothing was computed: only what was found before the operation is reported.
        raised &= BEFORE;
    }
    cpu.state.mxcsr |= raised;
    if raised & unmasked == 0 {
        return Ok(());
    }
    restore(cpu);
    Err(if cpu.state.cr4 & cr4::OSXMMEXCPT != 0 { Fault::xm() } else { Fault::ud() })
}
