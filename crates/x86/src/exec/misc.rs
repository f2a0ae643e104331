//! Decimal adjustment, flag instructions, conversions, time, randomness, cache control.

use super::flags::aux_of;
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{cr4, flag};

/// CBW, CWDE, CDQE.
pub(super) fn cbw(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_reg(0, cpu.reg::<u8>(0) as i8 as u16);
    Ok(())
}
pub(super) fn cwde(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_reg(0, cpu.reg::<u16>(0) as i16 as u32);
    Ok(())
}
pub(super) fn cdqe(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_reg(0, cpu.reg::<u32>(0) as i32 as u64);
    Ok(())
}
/// CWD, CDQ, CQO.
pub(super) fn cwd(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_reg(2, ((cpu.reg::<u16>(0) as i16) >> 15) as u16);
    Ok(())
}
pub(super) fn cdq(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_reg(2, ((cpu.reg::<u32>(0) as i32) >> 31) as u32);
    Ok(())
}
pub(super) fn cqo(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_reg(2, ((cpu.reg::<u64>(0) as i64) >> 63) as u64);
    Ok(())
}

pub(super) fn lahf(cpu: &mut Cpu, _i: &Insn) -> Exec {
    let flags = (cpu.arithmetic_flags() & 0xd5) as u8 | 2;
    cpu.set_reg(16, flags);
    Ok(())
}
pub(super) fn sahf(cpu: &mut Cpu, _i: &Insn) -> Exec {
    let new = u64::from(cpu.reg::<u8>(16)) & 0xd5;
    let of = cpu.arithmetic_flags() & flag::OF;
    cpu.set_flags(new | of);
    Ok(())
}
pub(super) fn clc(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_cf(false);
    Ok(())
}
pub(super) fn stc(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_cf(true);
    Ok(())
}
pub(super) fn cmc(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_cf(!cpu.cf());
    Ok(())
}
pub(super) fn cld(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.state.rflags &= !flag::DF;
    Ok(())
}
pub(super) fn std(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.state.rflags |= flag::DF;
    Ok(())
}
/// SALC: AL = CF ? 0xff : 0.
pub(super) fn salc(cpu: &mut Cpu, _i: &Insn) -> Exec {
    cpu.set_reg(0, if cpu.cf() { 0xff_u8 } else { 0 });
    Ok(())
}

/// DAA.
pub(super) fn daa(cpu: &mut Cpu, _i: &Insn) -> Exec {
    let (al, cf, af) = (cpu.reg::<u8>(0), cpu.cf(), cpu.af());
    let low = al & 15 > 9 || af;
    let high = al > 0x99 || cf;
    let r = al.wrapping_add(if low { 6 } else { 0 }).wrapping_add(if high { 0x60 } else { 0 });
    cpu.set_reg(0, r);
    cpu.set_lazy(r, aux_of(high, false, low));
    Ok(())
}
/// DAS.
pub(super) fn das(cpu: &mut Cpu, _i: &Insn) -> Exec {
    let (al, cf, af) = (cpu.reg::<u8>(0), cpu.cf(), cpu.af());
    let low = al & 15 > 9 || af;
    let high = al > 0x99 || cf;
    let r = al.wrapping_sub(if low { 6 } else { 0 }).wrapping_sub(if high { 0x60 } else { 0 });
    // The borrow of the first step counts too.
    let carry = high || (low && al < 6);
    cpu.set_reg(0, r);
    cpu.set_lazy(r, aux_of(carry, false, low));
    Ok(())
}
/// AAA and AAS.
pub(super) fn aaa(cpu: &mut Cpu, _i: &Insn) -> Exec {
    adjust(cpu, |ax| ax.wrapping_add(0x106))
}
pub(super) fn aas(cpu: &mut Cpu, _i: &Insn) -> Exec {
    adjust(cpu, |ax| ax.wrapping_sub(6).wrapping_sub(0x100))
}
fn adjust(cpu: &mut Cpu, f: impl Fn(u16) -> u16) -> Exec {
    let ax = cpu.reg::<u16>(0);
    let carry = ax & 15 > 9 || cpu.af();
    let r = if carry { f(ax) } else { ax } & 0xff0f;
    cpu.set_reg(0, r);
    cpu.set_lazy(r as u8, aux_of(carry, false, carry));
    Ok(())
}
/// AAM imm8: #DE for 0.
pub(super) fn aam(cpu: &mut Cpu, i: &Insn) -> Exec {
    let base = i.imm as u8;
    let al = cpu.reg::<u8>(0);
    let (Some(q), Some(r)) = (al.checked_div(base), al.checked_rem(base)) else { return Err(Fault::de()) };
    cpu.set_reg(0, u16::from(q) << 8 | u16::from(r));
    cpu.set_lazy(r, 0);
    Ok(())
}
/// AAD imm8.
pub(super) fn aad(cpu: &mut Cpu, i: &Insn) -> Exec {
    let ax = cpu.reg::<u16>(0);
    let r = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(i.imm as u8));
    cpu.set_reg(0, u16::from(r));
    cpu.set_lazy(r, 0);
    Ok(())
}

pub(super) fn nop(_cpu: &mut Cpu, _i: &Insn) -> Exec {
    Ok(())
}
pub(super) fn undefined(_cpu: &mut Cpu, _i: &Insn) -> Exec {
    Err(Fault::ud())
}
/// MFENCE and friends, SERIALIZE.
pub(super) fn fence(_cpu: &mut Cpu, _i: &Insn) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}
/// CLFLUSH, CLFLUSHOPT, CLWB: a byte's load as far as faults go; there is no cache to write back.
pub(super) fn flush_line(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    cpu.probe_read(seg, off, 1)
}

/// The TSC as this processor sees it.
fn tsc(cpu: &mut Cpu) -> u64 {
    let icount = cpu.icount();
    cpu.settle_mxcsr();
    cpu.env.tsc(icount).wrapping_add(cpu.state.tsc_offset)
}
fn tsc_allowed(cpu: &Cpu) -> Exec {
    if cpu.state.cr4 & cr4::TSD != 0 && cpu.cpl() != 0 { Err(Fault::gp(0)) } else { Ok(()) }
}
pub(super) fn rdtsc(cpu: &mut Cpu, _i: &Insn) -> Exec {
    tsc_allowed(cpu)?;
    let t = tsc(cpu);
    cpu.set_reg(0, t as u32);
    cpu.set_reg(2, (t >> 32) as u32);
    Ok(())
}
pub(super) fn rdtscp(cpu: &mut Cpu, i: &Insn) -> Exec {
    rdtsc(cpu, i)?;
    cpu.set_reg(1, cpu.state.msr.tsc_aux as u32);
    Ok(())
}
pub(super) fn rdpid(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.state.msr.tsc_aux & 0xffff_ffff;
    cpu.set_reg(i.r0, v);
    Ok(())
}
/// RDRAND and RDSEED: CF = 1 says that the number is good.
pub(super) fn random(cpu: &mut Cpu, i: &Insn) -> Exec {
    cpu.settle_mxcsr();
    let v = cpu.env.random();
    match i.size {
        2 => cpu.set_reg(i.r0, v as u16),
        4 => cpu.set_reg(i.r0, v as u32),
        _ => cpu.set_reg(i.r0, v),
    }
    cpu.set_flags(flag::CF);
    Ok(())
}
/// CLAC and STAC.
pub(super) fn set_ac<const ON: bool>(cpu: &mut Cpu, _i: &Insn) -> Exec {
    if cpu.cpl() != 0 || !cpu.protected() {
        return Err(Fault::ud());
    }
    cpu.state.rflags = cpu.state.rflags & !flag::AC | if ON { flag::AC } else { 0 };
    cpu.mode_changed();
    Ok(())
}
