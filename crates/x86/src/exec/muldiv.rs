//! Multiplication and division.
//!
//! SF, ZF, AF and PF are undefined after multiplications; AMD processors leave them alone, and so does this.

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::mmu::Width;
use crate::state::flag;

/// One-operand MUL: the product to (R)DX:(R)AX or AX.
pub(super) fn mul<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.rm0::<T>(i)?;
    let product = u128::from(cpu.reg::<T>(0).u64()) * u128::from(b.u64());
    let (low, high) = (product as u64, (product >> T::BITS) as u64);
    store_product::<T>(cpu, low, high);
    let over = high != 0;
    cpu.set_cf_of(over, over);
    Ok(())
}

#[inline(always)]
fn store_product<T: Width>(cpu: &mut Cpu, low: u64, high: u64) {
    if T::BITS == 8 {
        cpu.set_reg::<u16>(0, (low & 0xff | high << 8) as u16);
    } else {
        cpu.set_reg(0, T::from_u64(low));
        cpu.set_reg(2, T::from_u64(high));
    }
}

/// One-operand IMUL.
pub(super) fn imul1<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.rm0::<T>(i)?;
    let product = i128::from(cpu.reg::<T>(0).sext() as i64) * i128::from(b.sext() as i64);
    let (low, high) = (T::from_u64(product as u64), (product >> T::BITS) as u64);
    store_product::<T>(cpu, low.u64(), high);
    let over = i128::from(low.sext() as i64) != product;
    cpu.set_cf_of(over, over);
    Ok(())
}

#[inline(always)]
fn imul<T: Width>(cpu: &mut Cpu, to: u8, a: T, b: T) -> Exec {
    let product = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
    let r = T::from_u64(product as u64);
    let over = i128::from(r.sext() as i64) != product;
    cpu.set_reg(to, r);
    cpu.set_cf_of(over, over);
    Ok(())
}
/// IMUL r, r/m.
pub(super) fn imul2<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.rm1::<T>(i)?;
    let a = cpu.reg(i.r0);
    imul(cpu, i.r0, a, b)
}
/// IMUL r, r/m, imm.
pub(super) fn imul3<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?;
    imul(cpu, i.r0, a, T::from_u64(i.imm))
}

/// DIV: #DE when the divisor is 0 or the quotient too large. The flags are undefined: as on AMD processors.
pub(super) fn div<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = u128::from(cpu.rm0::<T>(i)?.u64());
    let a = if T::BITS == 8 {
        u128::from(cpu.reg::<u16>(0))
    } else {
        u128::from(cpu.reg::<T>(2).u64()) << T::BITS | u128::from(cpu.reg::<T>(0).u64())
    };
    if b == 0 {
        return Err(Fault::de());
    }
    let (q, r) = match (u64::try_from(a), u64::try_from(b)) {
        (Ok(a), Ok(b)) => (u128::from(a / b), u128::from(a % b)),
        _ => (a / b, a % b),
    };
    if q >> T::BITS != 0 {
        return Err(Fault::de());
    }
    store_quotient::<T>(cpu, q as u64, r as u64);
    cpu.set_flags(flag::AF);
    Ok(())
}

#[inline(always)]
fn store_quotient<T: Width>(cpu: &mut Cpu, q: u64, r: u64) {
    if T::BITS == 8 {
        cpu.set_reg::<u16>(0, (q & 0xff | (r & 0xff) << 8) as u16);
    } else {
        cpu.set_reg(0, T::from_u64(q));
        cpu.set_reg(2, T::from_u64(r));
    }
}

/// IDIV.
pub(super) fn idiv<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = i128::from(cpu.rm0::<T>(i)?.sext() as i64);
    let a = if T::BITS == 8 {
        i128::from(cpu.reg::<u16>(0) as i16)
    } else {
        i128::from(cpu.reg::<T>(2).sext() as i64) << T::BITS | i128::from(cpu.reg::<T>(0).u64())
    };
    if b == 0 {
        return Err(Fault::de());
    }
    let (q, r) = match (i64::try_from(a), i64::try_from(b)) {
        // i64::MIN / -1 doesn't fit.
        (Ok(a), Ok(b)) if a != i64::MIN => (i128::from(a / b), i128::from(a % b)),
        _ => (a.wrapping_div(b), a.wrapping_rem(b)),
    };
    let fits = q >= -(1_i128 << (T::BITS - 1)) && q < 1_i128 << (T::BITS - 1);
    // The one quotient that 128 bits don't hold: -2^127 / -1.
    if !fits || (a == i128::MIN && b == -1) {
        return Err(Fault::de());
    }
    store_quotient::<T>(cpu, q as u64, r as u64);
    cpu.set_flags(flag::AF);
    Ok(())
}
