//! The commonest moves and logic instructions, done in Rust without a thunk.

use super::plan::Class;
use super::{Buffer, available, check_alignment, copy16, direct, general_load, general_store};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::fault::Exec;
use iced_x86::{Code, Instruction, OpKind};
use std::arch::x86_64::{_mm_set_epi64x, _mm_storeu_si128};

fn r(n: u8) -> usize {
    usize::from(n) & 31
}

/// Sets the low half of a register by one store.
#[inline(always)]
fn set(cpu: &mut Cpu, register: u8, low: u64, high: u64) {
    let to: *mut [u64; 8] = &raw mut cpu.state.vec[r(register)].0;
    // SAFETY: 16 of the register's 64 bytes.
    unsafe { _mm_storeu_si128(to.cast(), _mm_set_epi64x(high as i64, low as i64)) };
}

fn load128(cpu: &mut Cpu, insn: &Insn, align: u16) -> Exec {
    available(cpu, Class::Sse)?;
    let at = cpu.mem_addr(insn);
    check_alignment(cpu, at, align)?;
    let to: *mut u8 = (&raw mut cpu.state.vec[r(insn.r0)]).cast();
    if let Some(from) = direct(cpu, at, 16, false) {
        // SAFETY: `direct` gives 16 bytes of guest RAM, `to` is a register of 64 bytes.
        unsafe { copy16(from, to) };
        return Ok(());
    }
    let mut buffer = Buffer::default();
    general_load(cpu, at, &mut buffer, 16)?;
    set(cpu, insn.r0, buffer.word(0), buffer.word(8));
    Ok(())
}

fn store128(cpu: &mut Cpu, insn: &Insn, align: u16) -> Exec {
    available(cpu, Class::Sse)?;
    let at = cpu.mem_addr(insn);
    check_alignment(cpu, at, align)?;
    let from: *const u8 = (&raw const cpu.state.vec[r(insn.r1)]).cast();
    if let Some(to) = direct(cpu, at, 16, true) {
        // SAFETY: as in `load128`.
        unsafe { copy16(from, to) };
        return Ok(());
    }
    let mut buffer = Buffer::default();
    // SAFETY: the buffer has 64 bytes, the register too.
    unsafe { copy16(from, buffer.0.as_mut_ptr()) };
    general_store(cpu, at, &mut buffer, 16)
}

fn load_aligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    load128(cpu, insn, 16)
}

fn load_unaligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    load128(cpu, insn, 1)
}

fn store_aligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    store128(cpu, insn, 16)
}

fn store_unaligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    store128(cpu, insn, 1)
}

fn copy(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let from: *const u8 = (&raw const cpu.state.vec[r(insn.r1)]).cast();
    let to: *mut u8 = (&raw mut cpu.state.vec[r(insn.r0)]).cast();
    // SAFETY: two registers of 64 bytes, perhaps the same.
    unsafe { copy16(from, to) };
    Ok(())
}

fn xor(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (a, b) = (cpu.state.vec[r(insn.r0)].0, cpu.state.vec[r(insn.r1)].0);
    set(cpu, insn.r0, a[0] ^ b[0], a[1] ^ b[1]);
    Ok(())
}

/// MOVQ and MOVSD loads: the upper quadword becomes zero.
fn load64(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = cpu.load::<u64>(seg, offset)?;
    set(cpu, insn.r0, value, 0);
    Ok(())
}

/// MOVD and MOVSS loads.
fn load32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = cpu.load::<u32>(seg, offset)?;
    set(cpu, insn.r0, u64::from(value), 0);
    Ok(())
}

fn store64(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.store::<u64>(seg, offset, cpu.state.vec[r(insn.r1)].0[0])
}

fn store32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.store::<u32>(seg, offset, cpu.state.vec[r(insn.r1)].0[0] as u32)
}

fn from_general64(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    set(cpu, insn.r0, cpu.state.gpr[usize::from(insn.r1) & 15], 0);
    Ok(())
}

fn from_general32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    set(cpu, insn.r0, u64::from(cpu.state.gpr[usize::from(insn.r1) & 15] as u32), 0);
    Ok(())
}

fn to_general64(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    cpu.state.gpr[usize::from(insn.r0) & 15] = cpu.state.vec[r(insn.r1)].0[0];
    Ok(())
}

fn to_general32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    cpu.state.gpr[usize::from(insn.r0) & 15] = u64::from(cpu.state.vec[r(insn.r1)].0[0] as u32);
    Ok(())
}

/// The handler of an instruction that is done here.
pub(super) fn handler(i: &Instruction) -> Option<Handler> {
    use Code as C;
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    Some(match (i.code(), memory) {
        (C::Movaps_xmm_xmmm128 | C::Movapd_xmm_xmmm128 | C::Movdqa_xmm_xmmm128, true) => load_aligned,
        (C::Movups_xmm_xmmm128 | C::Movupd_xmm_xmmm128 | C::Movdqu_xmm_xmmm128 | C::Lddqu_xmm_m128, true) => {
            load_unaligned
        }
        (
            C::Movaps_xmmm128_xmm
            | C::Movapd_xmmm128_xmm
            | C::Movdqa_xmmm128_xmm
            | C::Movntps_m128_xmm
            | C::Movntpd_m128_xmm
            | C::Movntdq_m128_xmm,
            true,
        ) => store_aligned,
        (C::Movups_xmmm128_xmm | C::Movupd_xmmm128_xmm | C::Movdqu_xmmm128_xmm, true) => store_unaligned,
        (
            C::Movaps_xmm_xmmm128
            | C::Movapd_xmm_xmmm128
            | C::Movdqa_xmm_xmmm128
            | C::Movups_xmm_xmmm128
            | C::Movupd_xmm_xmmm128
            | C::Movdqu_xmm_xmmm128
            | C::Movaps_xmmm128_xmm
            | C::Movapd_xmmm128_xmm
            | C::Movdqa_xmmm128_xmm
            | C::Movups_xmmm128_xmm
            | C::Movupd_xmmm128_xmm
            | C::Movdqu_xmmm128_xmm,
            false,
        ) => copy,
        (C::Pxor_xmm_xmmm128 | C::Xorps_xmm_xmmm128 | C::Xorpd_xmm_xmmm128, false) => xor,
        (C::Movq_xmm_xmmm64 | C::Movq_xmm_rm64 | C::Movsd_xmm_xmmm64, true) => load64,
        (C::Movd_xmm_rm32 | C::Movss_xmm_xmmm32, true) => load32,
        (
            C::Movq_xmmm64_xmm
            | C::Movq_rm64_xmm
            | C::Movsd_xmmm64_xmm
            | C::Movlps_m64_xmm
            | C::Movlpd_m64_xmm,
            true,
        ) => store64,
        (C::Movd_rm32_xmm | C::Movss_xmmm32_xmm, true) => store32,
        (C::Movq_xmm_rm64, false) => from_general64,
        (C::Movd_xmm_rm32, false) => from_general32,
        (C::Movq_rm64_xmm, false) => to_general64,
        (C::Movd_rm32_xmm, false) => to_general32,
        _ => return None,
    })
}
