//! The system half of the processor: segments, events, control registers, model-specific registers, CPUID, debug.

pub(crate) mod control;
pub mod cpuid;
pub(crate) mod debug;
pub(crate) mod event;
pub(crate) mod far;
mod features;
pub(crate) mod flags;
pub(crate) mod io;
mod models;
pub(crate) mod msr;
pub(crate) mod reset;
pub(crate) mod seg;
pub(crate) mod smm;
mod stack;
pub(crate) mod tables;
pub(crate) mod task;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::fault::{Exec, Fault};
use crate::state::{Seg, Segment, cr4, efer, flag, gpr};
use iced_x86::{Code, Mnemonic};
use seg::Descriptor;

/// The handler of a system instruction; None when it isn't one (or isn't implemented: #UD).
pub(crate) fn handler(code: Code) -> Option<Handler> {
    let handler: Handler = match code.mnemonic() {
        Mnemonic::Mov => match code {
            Code::Mov_r32_cr | Code::Mov_r64_cr => control::mov_from_cr,
            Code::Mov_cr_r32 | Code::Mov_cr_r64 => control::mov_to_cr,
            Code::Mov_r32_dr | Code::Mov_r64_dr => debug::mov_from_dr,
            Code::Mov_dr_r32 | Code::Mov_dr_r64 => debug::mov_to_dr,
            _ => return None,
        },
        Mnemonic::Jmp if is_far(code) => far::jmp,
        Mnemonic::Call if is_far(code) => far::call,
        Mnemonic::Retf => far::ret,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => event::iret,
        Mnemonic::Int | Mnemonic::Int3 | Mnemonic::Into | Mnemonic::Int1 => event::int,
        Mnemonic::Syscall => far::syscall,
        Mnemonic::Sysret | Mnemonic::Sysretq => far::sysret,
        Mnemonic::Sysenter => far::sysenter,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => far::sysexit,
        Mnemonic::Lmsw => control::lmsw,
        Mnemonic::Smsw => control::smsw,
        Mnemonic::Clts => control::clts,
        Mnemonic::Invlpg => control::invlpg,
        Mnemonic::Invpcid => control::invpcid,
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => control::wbinvd,
        Mnemonic::Hlt => control::hlt,
        Mnemonic::Monitor => control::monitor,
        Mnemonic::Mwait => control::mwait,
        Mnemonic::Xgetbv => control::xgetbv,
        Mnemonic::Xsetbv => control::xsetbv,
        Mnemonic::Cpuid => control::cpuid,
        Mnemonic::Rdpkru => control::rdpkru,
        Mnemonic::Wrpkru => control::wrpkru,
        Mnemonic::Swapgs => control::swapgs,
        Mnemonic::Rdfsbase => control::rdfsbase,
        Mnemonic::Rdgsbase => control::rdgsbase,
        Mnemonic::Wrfsbase => control::wrfsbase,
        Mnemonic::Wrgsbase => control::wrgsbase,
        Mnemonic::Rdtsc => msr::rdtsc,
        Mnemonic::Rdtscp => msr::rdtscp,
        Mnemonic::Rdpid => msr::rdpid,
        Mnemonic::Rdpmc => msr::rdpmc,
        Mnemonic::Rdmsr => msr::rdmsr,
        Mnemonic::Wrmsr => msr::wrmsr,
        Mnemonic::Lgdt => tables::lgdt,
        Mnemonic::Lidt => tables::lidt,
        Mnemonic::Sgdt => tables::sgdt,
        Mnemonic::Sidt => tables::sidt,
        Mnemonic::Lldt => tables::lldt,
        Mnemonic::Ltr => tables::ltr,
        Mnemonic::Sldt => tables::sldt,
        Mnemonic::Str => tables::str,
        Mnemonic::Lar => tables::lar,
        Mnemonic::Lsl => tables::lsl,
        Mnemonic::Verr => tables::verr,
        Mnemonic::Verw => tables::verw,
        Mnemonic::Arpl => tables::arpl,
        Mnemonic::Cli => flags::cli,
        Mnemonic::Sti => flags::sti,
        Mnemonic::Clac => flags::clac,
        Mnemonic::Stac => flags::stac,
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => flags::pushf,
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => flags::popf,
        Mnemonic::In => io::inp,
        Mnemonic::Out => io::out,
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => io::ins,
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => io::outs,
        Mnemonic::Rsm => smm::rsm,
        Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Bndmk
        | Mnemonic::Bndcl
        | Mnemonic::Bndcu
        | Mnemonic::Bndcn
        | Mnemonic::Bndmov
        | Mnemonic::Bndldx
        | Mnemonic::Bndstx
        | Mnemonic::Cldemote
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Prefetchwt1 => flags::nop,
        _ => return None,
    };
    Some(handler)
}

fn is_far(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}

/// Operand size in bytes of far transfers, returns, PUSHF and POPF: from the code, because vendors differ in what
/// REX.W does to them.
fn operand_size(insn: &Insn) -> u8 {
    match insn.code {
        Code::Jmp_m1664
        | Code::Call_m1664
        | Code::Retfq
        | Code::Retfq_imm16
        | Code::Iretq
        | Code::Sysretq
        | Code::Sysexitq
        | Code::Pushfq
        | Code::Popfq => 8,
        Code::Jmp_ptr1616
        | Code::Jmp_m1616
        | Code::Call_ptr1616
        | Code::Call_m1616
        | Code::Retfw
        | Code::Retfw_imm16
        | Code::Iretw
        | Code::Pushfw
        | Code::Popfw => 2,
        _ => 4,
    }
}

/// Bytes that a far RET releases.
fn ret_immediate(insn: &Insn) -> u16 {
    match insn.code {
        Code::Retfw_imm16 | Code::Retfd_imm16 | Code::Retfq_imm16 => insn.imm as u16,
        _ => 0,
    }
}

/// The selector and offset that a far JMP or CALL names.
fn far_pointer(cpu: &mut Cpu, insn: &Insn) -> Exec<(u16, u64)> {
    if !insn.is_mem() {
        return Ok(((insn.imm >> 32) as u16, insn.imm & 0xffff_ffff));
    }
    let (seg, at) = cpu.mem_addr(insn);
    let size = operand_size(insn);
    let offset = match size {
        2 => u64::from(cpu.load::<u16>(seg, at)?),
        4 => u64::from(cpu.load::<u32>(seg, at)?),
        _ => cpu.load::<u64>(seg, at)?,
    };
    let selector = cpu.load::<u16>(seg, address_add(insn, at, size))?;
    Ok((selector, offset))
}

/// `at` + `by` within the instruction's address size.
fn address_add(insn: &Insn, at: u64, by: u8) -> u64 {
    let sum = at.wrapping_add(u64::from(by));
    match insn.asize {
        2 => sum & 0xffff,
        4 => sum & 0xffff_ffff,
        _ => sum,
    }
}

/// EFER.LMA.
fn long_mode(cpu: &Cpu) -> bool {
    cpu.state.efer & efer::LMA != 0
}

/// Whether a linear address is canonical under the present paging mode (SDM vol. 1 §3.3.7.1).
fn canonical(cpu: &Cpu, address: u64) -> bool {
    let shift = if cpu.state.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
    ((address << shift) as i64 >> shift) as u64 == address
}

/// Whether a linear address may be loaded into a base register or an MSR: canonical at the greatest width that the
/// processor has, whatever the paging mode (SDM vol. 1 §3.3.7.1; 5-level paging white paper §2.2).
fn canonical_base(cpu: &Cpu, address: u64) -> bool {
    let shift = if cpu.model.offers(cpuid::Feature::La57) { 7 } else { 16 };
    ((address << shift) as i64 >> shift) as u64 == address
}

/// I/O privilege level.
fn iopl(cpu: &Cpu) -> u8 {
    (cpu.state.rflags >> 12 & 3) as u8
}

/// Address of the next instruction, within the code segment's size.
fn next_rip(cpu: &Cpu, insn: &Insn) -> u64 {
    let next = cpu.state.rip.wrapping_add(u64::from(insn.len));
    if cpu.in_64bit() {
        next
    } else if cpu.state.seg[Seg::Cs as usize].big() {
        next & 0xffff_ffff
    } else {
        next & 0xffff
    }
}

/// The next instruction is at `rip`.
fn jump(cpu: &mut Cpu, rip: u64) {
    cpu.next_rip = rip;
}

/// The bits of RSP that stack operations through `ss` use.
fn stack_mask_of(ss: &Segment, in_64bit: bool) -> u64 {
    if in_64bit {
        u64::MAX
    } else if ss.big() {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// The bits of RSP that stack operations use now.
fn stack_mask(cpu: &Cpu) -> u64 {
    stack_mask_of(&cpu.state.seg[Seg::Ss as usize], cpu.in_64bit())
}

/// Writes the stack pointer at the width that `mask` says: 16 bits keep the rest of ESP, 32 bits clear the upper half.
fn set_stack_pointer(cpu: &mut Cpu, value: u64, mask: u64) {
    let rsp = &mut cpu.state.gpr[gpr::RSP];
    *rsp = match mask {
        0xffff => *rsp & !0xffff | value & 0xffff,
        _ => value & mask,
    };
}

/// Checks a far target against the limit of its code segment, or for being canonical: #GP with `error`.
fn check_target(cpu: &Cpu, offset: u64, d: &Descriptor, to_64: bool, error: u32) -> Exec<u64> {
    let good = if to_64 { canonical(cpu, offset) } else { offset <= u64::from(d.limit()) };
    if good { Ok(offset) } else { Err(Fault::gp(error)) }
}

/// #GP(0) unless CPL is 0 (real mode counts as 0).
fn privileged(cpu: &Cpu) -> Exec {
    if cpu.cpl() == 0 { Ok(()) } else { Err(Fault::gp(0)) }
}

/// #GP(0) when UMIP forbids SGDT, SIDT, SLDT, STR and SMSW at this privilege (SDM vol. 3A §2.5).
fn umip(cpu: &Cpu) -> Exec {
    if cpu.state.cr4 & cr4::UMIP != 0 && cpu.cpl() != 0 { Err(Fault::gp(0)) } else { Ok(()) }
}

/// Writes a general register at width `size` (2, 4, 8) by the rules of the instruction set: 32 bits clear the rest.
fn write_gpr(cpu: &mut Cpu, number: u8, size: u8, value: u64) {
    let Some(r) = cpu.state.gpr.get_mut(usize::from(number)) else { return };
    *r = match size {
        1 => *r & !0xff | value & 0xff,
        2 => *r & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

/// Reads a general register.
fn read_gpr(cpu: &Cpu, number: u8) -> u64 {
    cpu.state.gpr.get(usize::from(number)).copied().unwrap_or(0)
}

/// Reads a 16-bit operand that is a register (`number`) or memory.
fn read_rm16(cpu: &mut Cpu, insn: &Insn, number: u8) -> Exec<u16> {
    if insn.is_mem() {
        let (seg, at) = cpu.mem_addr(insn);
        cpu.load::<u16>(seg, at)
    } else {
        Ok(read_gpr(cpu, number) as u16)
    }
}

/// Sets EDX:EAX, clearing the upper halves of RAX and RDX.
fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.state.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.state.gpr[gpr::RDX] = value >> 32;
}

/// EDX:EAX.
fn edx_eax(cpu: &Cpu) -> u64 {
    cpu.state.gpr[gpr::RAX] & 0xffff_ffff | cpu.state.gpr[gpr::RDX] << 32
}

/// Sets or clears ZF.
fn set_zf(cpu: &mut Cpu, on: bool) {
    if on { cpu.state.rflags |= flag::ZF } else { cpu.state.rflags &= !flag::ZF }
}
