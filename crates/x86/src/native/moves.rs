//! The commonest moves and logic instructions, done in Rust without a thunk.

use super::plan::Class;
use super::{Buffer, available, check_alignment};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::fault::Exec;
use iced_x86::{Code, Instruction, OpKind};

fn r(n: u8) -> usize {
    usize::from(n) & 31
}

fn load128(cpu: &mut Cpu, insn: &Insn, align: u16) -> Exec<[u64; 2]> {
    let at = cpu.mem_addr(insn);
    check_alignment(cpu, at, align)?;
    let low = cpu.load::<u64>(at.0, at.1)?;
    let high = cpu.load::<u64>(at.0, super::next_offset(cpu, at.1, 8))?;
    Ok([low, high])
}

fn store128(cpu: &mut Cpu, insn: &Insn, align: u16, value: &[u64; 8]) -> Exec {
    let at = cpu.mem_addr(insn);
    check_alignment(cpu, at, align)?;
    let mut buffer = Buffer::default();
    buffer.0[..8].copy_from_slice(&value[0].to_le_bytes());
    buffer.0[8..16].copy_from_slice(&value[1].to_le_bytes());
    super::general_store(cpu, at, &mut buffer, 16)
}

fn load_aligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let [low, high] = load128(cpu, insn, 16)?;
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    (to[0], to[1]) = (low, high);
    Ok(())
}

fn load_unaligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let [low, high] = load128(cpu, insn, 1)?;
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    (to[0], to[1]) = (low, high);
    Ok(())
}

fn store_aligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let value = cpu.state.vec[r(insn.r1)].0;
    store128(cpu, insn, 16, &value)
}

fn store_unaligned(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let value = cpu.state.vec[r(insn.r1)].0;
    store128(cpu, insn, 1, &value)
}

fn copy(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let from = cpu.state.vec[r(insn.r1)].0;
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    (to[0], to[1]) = (from[0], from[1]);
    Ok(())
}

fn xor(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let from = cpu.state.vec[r(insn.r1)].0;
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    to[0] ^= from[0];
    to[1] ^= from[1];
    Ok(())
}

/// MOVQ and MOVSD loads: the upper quadword becomes zero.
fn load64(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = cpu.load::<u64>(seg, offset)?;
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    (to[0], to[1]) = (value, 0);
    Ok(())
}

/// MOVD and MOVSS loads.
fn load32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = cpu.load::<u32>(seg, offset)?;
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    (to[0], to[1]) = (u64::from(value), 0);
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
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    (to[0], to[1]) = (value, 0);
    Ok(())
}

fn from_general32(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Sse)?;
    let value = cpu.state.gpr[usize::from(insn.r1) & 15] as u32;
    let to = &mut cpu.state.vec[r(insn.r0)].0;
    (to[0], to[1]) = (u64::from(value), 0);
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
