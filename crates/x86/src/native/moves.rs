//! The commonest moves and logic instructions, done in Rust without a thunk.

use super::plan::Class;
use super::{Buffer, available, check_alignment};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::fault::Exec;
use iced_x86::{Code, Instruction, OpKind};
use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_set_epi64x, _mm_store_si128, _mm_xor_si128};

fn r(n: u8) -> usize {
    usize::from(n) & 31
}

/// The low 128 bits of a vector register. Always read and written as a whole: the processor forwards what was just stored only to
/// loads that lie within one store.
#[inline(always)]
fn get(cpu: &Cpu, n: u8) -> __m128i {
    // SAFETY: 16 readable, aligned bytes.
    unsafe { _mm_load_si128(cpu.state.vec[r(n)].0.as_ptr().cast()) }
}

#[inline(always)]
fn put(cpu: &mut Cpu, n: u8, value: __m128i) {
    // SAFETY: 16 writable, aligned bytes.
    unsafe { _mm_store_si128(cpu.state.vec[r(n)].0.as_mut_ptr().cast(), value) }
}

/// One quadword in the low half, zero in the high half.
#[inline(always)]
fn low(value: u64) -> __m128i {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_set_epi64x(0, value as i64) }
}

#[inline(always)]
fn load128(cpu: &mut Cpu, insn: &Insn, align: u16) -> Exec {
    available(cpu, Class::Sse)?;
    let at = cpu.mem_addr(insn);
    check_alignment(cpu, at, align)?;
    let value: __m128i;
    if let Some(p) = super::host_read(cpu, at, 16) {
        // SAFETY: the TLB maps 16 readable bytes at `p`; an opaque load, because others may write there.
        unsafe {
            std::arch::asm!("movups {}, [{}]", out(xmm_reg) value, in(reg) p, options(nostack, preserves_flags, readonly))
        };
    } else {
        value = load128_slow(cpu, at)?;
    }
    put(cpu, insn.r0, value);
    Ok(())
}

#[cold]
#[inline(never)]
fn load128_slow(cpu: &mut Cpu, at: (crate::state::Seg, u64)) -> Exec<__m128i> {
    let mut buffer = Buffer::default();
    super::general_load(cpu, at, &mut buffer, 16)?;
    // SAFETY: the buffer holds more than 16 bytes and is aligned to 64.
    Ok(unsafe { _mm_load_si128(buffer.0.as_ptr().cast()) })
}

#[inline(always)]
fn store128(cpu: &mut Cpu, insn: &Insn, align: u16) -> Exec {
    available(cpu, Class::Sse)?;
    let value = get(cpu, insn.r1);
    let at = cpu.mem_addr(insn);
    check_alignment(cpu, at, align)?;
    if let Some(p) = super::host_write(cpu, at, 16) {
        // SAFETY: the TLB maps 16 writable bytes at `p`.
        unsafe {
            std::arch::asm!("movups [{}], {}", in(reg) p, in(xmm_reg) value, options(nostack, preserves_flags))
        };
        return Ok(());
    }
    store128_slow(cpu, at, value)
}

#[cold]
#[inline(never)]
fn store128_slow(cpu: &mut Cpu, at: (crate::state::Seg, u64), value: __m128i) -> Exec {
    let mut buffer = Buffer::default();
    // SAFETY: as above.
    unsafe { _mm_store_si128(buffer.0.as_mut_ptr().cast(), value) };
    super::general_store(cpu, at, &mut buffer, 16)
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
    put(cpu, insn.r0, get(cpu, insn.r1));
    Ok(())
}

fn xor(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    // SAFETY: SSE2 is part of x86-64.
    let value = unsafe { _mm_xor_si128(get(cpu, insn.r0), get(cpu, insn.r1)) };
    put(cpu, insn.r0, value);
    Ok(())
}

/// MOVQ and MOVSD loads: the upper quadword becomes zero.
fn load64(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = cpu.load::<u64>(seg, offset)?;
    put(cpu, insn.r0, low(value));
    Ok(())
}

/// MOVD and MOVSS loads.
fn load32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = cpu.load::<u32>(seg, offset)?;
    put(cpu, insn.r0, low(value.into()));
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
    let value = cpu.state.gpr[usize::from(insn.r1) & 15];
    put(cpu, insn.r0, low(value));
    Ok(())
}

fn from_general32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let value = cpu.state.gpr[usize::from(insn.r1) & 15] as u32;
    put(cpu, insn.r0, low(value.into()));
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
