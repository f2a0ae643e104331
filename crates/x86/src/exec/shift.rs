//! Shifts and rotates.

use super::flags::aux_of;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, insn_flag};
use crate::fault::Exec;
use crate::mmu::Width;

/// What a shift leaves in the flags.
#[derive(Clone, Copy)]
pub(super) enum After {
    /// Count 0: nothing changes.
    Nothing,
    /// CF and OF alone (rotates).
    Carry(bool, bool),
    /// All, by the result, with this CF and OF (shifts).
    All(bool, bool),
}

pub(super) trait Shift {
    fn op<T: Width>(a: T, count: u32, cf: bool) -> (T, After);
}

#[inline(always)]
fn msb<T: Width>(v: u64) -> bool {
    v >> (T::BITS - 1) & 1 != 0
}
#[inline(always)]
fn msb2<T: Width>(v: u64) -> bool {
    v >> (T::BITS - 2) & 1 != 0
}

pub(super) struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn op<T: Width>(a: T, count: u32, _cf: bool) -> (T, After) {
        if count == 0 {
            return (a, After::Nothing);
        }
        // 8- and 16-bit counts may be more than the width: 128 bits hold any.
        let wide = u128::from(a.u64()) << count;
        let r = T::from_u64(wide as u64);
        let cf = wide >> T::BITS & 1 != 0;
        (r, After::All(cf, cf ^ msb::<T>(r.u64())))
    }
}
pub(super) struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn op<T: Width>(a: T, count: u32, _cf: bool) -> (T, After) {
        if count == 0 {
            return (a, After::Nothing);
        }
        let before = a.u64() >> (count - 1);
        let r = before >> 1;
        // The top two bits' difference: for a count of 1 this is the old top bit.
        (T::from_u64(r), After::All(before & 1 != 0, msb::<T>(r) ^ msb2::<T>(r)))
    }
}
pub(super) struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn op<T: Width>(a: T, count: u32, _cf: bool) -> (T, After) {
        if count == 0 {
            return (a, After::Nothing);
        }
        let before = a.sext() as i64 >> (count - 1);
        (T::from_u64((before >> 1) as u64), After::All(before & 1 != 0, false))
    }
}
#[inline(always)]
fn rotate_left<T: Width>(a: u64, n: u32) -> u64 {
    let n = n % T::BITS;
    if n == 0 { a } else { T::from_u64(a << n | a >> (T::BITS - n)).u64() }
}
pub(super) struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn op<T: Width>(a: T, count: u32, _cf: bool) -> (T, After) {
        if count == 0 {
            return (a, After::Nothing);
        }
        let r = rotate_left::<T>(a.u64(), count);
        let cf = r & 1 != 0;
        (T::from_u64(r), After::Carry(cf, cf ^ msb::<T>(r)))
    }
}
pub(super) struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn op<T: Width>(a: T, count: u32, _cf: bool) -> (T, After) {
        if count == 0 {
            return (a, After::Nothing);
        }
        let r = rotate_left::<T>(a.u64(), T::BITS - count % T::BITS);
        (T::from_u64(r), After::Carry(msb::<T>(r), msb::<T>(r) ^ msb2::<T>(r)))
    }
}
/// Rotates left through carry: width + 1 bits.
#[inline(always)]
fn through_carry<T: Width>(a: T, n: u32, cf: bool) -> (u64, bool) {
    let bits = T::BITS + 1;
    let n = n % bits;
    let v = u128::from(a.u64()) | u128::from(cf) << T::BITS;
    let r = if n == 0 { v } else { v << n | v >> (bits - n) };
    (T::from_u64(r as u64).u64(), r >> T::BITS & 1 != 0)
}
pub(super) struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn op<T: Width>(a: T, count: u32, cf: bool) -> (T, After) {
        if count == 0 {
            return (a, After::Nothing);
        }
        let (r, cf) = through_carry(a, count, cf);
        (T::from_u64(r), After::Carry(cf, cf ^ msb::<T>(r)))
    }
}
pub(super) struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn op<T: Width>(a: T, count: u32, cf: bool) -> (T, After) {
        if count == 0 {
            return (a, After::Nothing);
        }
        let (r, cf) = through_carry(a, T::BITS + 1 - count % (T::BITS + 1), cf);
        (T::from_u64(r), After::Carry(cf, msb::<T>(r) ^ msb2::<T>(r)))
    }
}

#[inline(always)]
fn settle<T: Width>(cpu: &mut Cpu, r: T, after: After) {
    match after {
        After::Nothing => {}
        After::Carry(cf, of) => cpu.set_cf_of(cf, of),
        // AF is undefined; AMD processors set it.
        After::All(cf, of) => cpu.set_lazy(r, aux_of(cf, of, true)),
    }
}

/// The count: CL or an immediate, masked (SDM vol. 2 "SAL/SAR/SHL/SHR").
#[inline(always)]
fn count<T: Width, const CL: bool>(cpu: &Cpu, i: &Insn) -> u32 {
    let n = if CL { cpu.state.gpr[1] } else { i.imm };
    n as u32 & if T::BITS == 64 { 63 } else { 31 }
}
fn shift_r<S: Shift, const CL: bool, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let n = count::<T, CL>(cpu, i);
    let (r, after) = S::op::<T>(cpu.reg(i.r0), n, cpu.cf());
    cpu.set_reg(i.r0, r);
    settle(cpu, r, after);
    Ok(())
}
fn shift_m<S: Shift, const CL: bool, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let n = count::<T, CL>(cpu, i);
    let (seg, off) = cpu.mem_addr(i);
    let cf = cpu.cf();
    let (r, after) = cpu.update::<T, _>(seg, off, i.has(insn_flag::LOCK), |a| {
        let (r, after) = S::op::<T>(a, n, cf);
        (r, (r, after))
    })?;
    settle(cpu, r, after);
    Ok(())
}
pub(super) fn pick<S: Shift>(memory: bool, cl: bool, size: u8) -> Handler {
    match (memory, cl) {
        (false, false) => super::sized!(size, shift_r[S, false]),
        (false, true) => super::sized!(size, shift_r[S, true]),
        (true, false) => super::sized!(size, shift_m[S, false]),
        (true, true) => super::sized!(size, shift_m[S, true]),
    }
}

/// SHLD (`LEFT`) and SHRD.
pub(super) fn double<const LEFT: bool, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    // The third operand is CL (register 1) or an immediate (then no register is noted: 0).
    let by_cl = i.r2 == 1;
    let n = if by_cl { cpu.state.gpr[1] } else { i.imm } as u32 & if T::BITS == 64 { 63 } else { 31 };
    let fill = cpu.reg::<T>(i.r1);
    let op = |a: T| -> (T, After) {
        if n == 0 {
            return (a, After::Nothing);
        }
        let (a, b, bits) = (u128::from(a.u64()), u128::from(fill.u64()), T::BITS);
        // Counts beyond 16 with 16-bit operands are undefined; AMD processors go on with the second operand's bits again.
        let (r, cf) = if LEFT {
            let v = a << bits | b;
            let v = if bits == 16 { v << 16 | b } else { v };
            let total = if bits == 16 { 48 } else { 2 * bits };
            ((v << n >> (total - bits)) as u64, v >> (total - n) & 1 != 0)
        } else {
            let v = if bits == 16 { b << 32 | b << 16 | a } else { b << bits | a };
            ((v >> n) as u64, v >> (n - 1) & 1 != 0)
        };
        let r = T::from_u64(r);
        let of = if LEFT { cf ^ msb::<T>(r.u64()) } else { msb::<T>(r.u64()) ^ msb2::<T>(r.u64()) };
        (r, After::All(cf, of))
    };
    let (r, after) = if i.is_mem() {
        let (seg, off) = cpu.mem_addr(i);
        cpu.update::<T, _>(seg, off, false, |a| {
            let (r, after) = op(a);
            (r, (r, after))
        })?
    } else {
        let (r, after) = op(cpu.reg(i.r0));
        cpu.set_reg(i.r0, r);
        (r, after)
    };
    settle(cpu, r, after);
    Ok(())
}
