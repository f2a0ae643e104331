//! Arithmetic and logic: ADD … CMP, TEST, INC, DEC, NEG, NOT, in all operand forms.

use super::flags::{ADJUST, CARRY, aux_of, aux_of_carries};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, insn_flag};
use crate::fault::Exec;
use crate::mmu::Width;

/// Operand forms of two-operand instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// register, register
    Rr,
    /// register, immediate
    Ri,
    /// register, memory
    Rm,
    /// memory, register
    Mr,
    /// memory, immediate
    Mi,
}

/// A two-operand operation: result and lazy flags.
pub(super) trait Alu {
    /// Whether the result is written (not CMP, TEST).
    const WRITES: bool = true;
    fn op<T: Width>(a: T, b: T, cf: bool) -> (T, u64);
}

#[inline(always)]
fn add<T: Width>(a: T, b: T, c: u64) -> (T, u64) {
    let (a, b) = (a.u64(), b.u64());
    let r = T::from_u64(a.wrapping_add(b).wrapping_add(c));
    (r, aux_of_carries::<T>(a & b | (a | b) & !r.u64()))
}
#[inline(always)]
fn sub<T: Width>(a: T, b: T, c: u64) -> (T, u64) {
    let (a, b) = (a.u64(), b.u64());
    let r = T::from_u64(a.wrapping_sub(b).wrapping_sub(c));
    (r, aux_of_carries::<T>(!a & b | !(a ^ b) & r.u64()))
}

macro_rules! alu {
    ($($name:ident $writes:literal |$a:ident, $b:ident, $c:ident| $e:expr;)*) => { $(
        pub(super) struct $name;
        impl Alu for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn op<T: Width>($a: T, $b: T, $c: bool) -> (T, u64) { $e }
        }
    )* };
}
alu! {
    Add true |a, b, _c| add(a, b, 0);
    Adc true |a, b, c| add(a, b, u64::from(c));
    Sub true |a, b, _c| sub(a, b, 0);
    Sbb true |a, b, c| sub(a, b, u64::from(c));
    Cmp false |a, b, _c| sub(a, b, 0);
    And true |a, b, _c| (T::from_u64(a.u64() & b.u64()), 0);
    Or true |a, b, _c| (T::from_u64(a.u64() | b.u64()), 0);
    Xor true |a, b, _c| (T::from_u64(a.u64() ^ b.u64()), 0);
    Test false |a, b, _c| (T::from_u64(a.u64() & b.u64()), 0);
}

fn rr<O: Alu, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (r, aux) = O::op::<T>(cpu.reg(i.r0), cpu.reg(i.r1), cpu.cf());
    if O::WRITES {
        cpu.set_reg(i.r0, r);
    }
    cpu.set_lazy(r, aux);
    Ok(())
}
fn ri<O: Alu, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (r, aux) = O::op::<T>(cpu.reg(i.r0), T::from_u64(i.imm), cpu.cf());
    if O::WRITES {
        cpu.set_reg(i.r0, r);
    }
    cpu.set_lazy(r, aux);
    Ok(())
}
fn rm<O: Alu, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let m = cpu.load::<T>(seg, off)?;
    let (r, aux) = O::op::<T>(cpu.reg(i.r0), m, cpu.cf());
    if O::WRITES {
        cpu.set_reg(i.r0, r);
    }
    cpu.set_lazy(r, aux);
    Ok(())
}
#[inline(always)]
fn memory<O: Alu, T: Width>(cpu: &mut Cpu, i: &Insn, b: T) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let cf = cpu.cf();
    let (r, aux) = if O::WRITES {
        cpu.update::<T, _>(seg, off, i.has(insn_flag::LOCK), |a| {
            let (r, aux) = O::op::<T>(a, b, cf);
            (r, (r, aux))
        })?
    } else {
        O::op::<T>(cpu.load(seg, off)?, b, cf)
    };
    cpu.set_lazy(r, aux);
    Ok(())
}
fn mr<O: Alu, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.reg(i.r1);
    memory::<O, T>(cpu, i, b)
}
fn mi<O: Alu, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    memory::<O, T>(cpu, i, T::from_u64(i.imm))
}

/// XOR or SUB of a register with itself: zero.
fn clear<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    cpu.set_reg(i.r0, T::from_u64(0));
    cpu.set_lazy(T::from_u64(0), 0);
    Ok(())
}
pub(super) fn clear_register(size: u8) -> Handler {
    super::sized!(size, clear[])
}
/// TEST of a register with itself.
fn test_self<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let r = cpu.reg::<T>(i.r0);
    cpu.set_lazy(r, 0);
    Ok(())
}
pub(super) fn test_register(size: u8) -> Handler {
    super::sized!(size, test_self[])
}

pub(super) fn pick<O: Alu>(form: Form, size: u8) -> Handler {
    match form {
        Form::Rr => super::sized!(size, rr[O]),
        Form::Ri => super::sized!(size, ri[O]),
        Form::Rm => super::sized!(size, rm[O]),
        Form::Mr => super::sized!(size, mr[O]),
        Form::Mi => super::sized!(size, mi[O]),
    }
}

/// A one-operand operation: result and lazy flags (None: flags stay).
pub(super) trait Unary {
    fn op<T: Width>(a: T, old_aux: u64) -> (T, Option<u64>);
}
/// `aux` with another one's CF but its own OF.
#[inline(always)]
fn keep_cf(aux: u64, old: u64) -> u64 {
    let of = ((aux ^ aux << 1) as i64) < 0;
    aux_of(old & CARRY != 0, of, aux & ADJUST != 0)
}
pub(super) struct Inc;
impl Unary for Inc {
    #[inline(always)]
    fn op<T: Width>(a: T, old: u64) -> (T, Option<u64>) {
        let (r, aux) = add(a, T::from_u64(1), 0);
        (r, Some(keep_cf(aux, old)))
    }
}
pub(super) struct Dec;
impl Unary for Dec {
    #[inline(always)]
    fn op<T: Width>(a: T, old: u64) -> (T, Option<u64>) {
        let (r, aux) = sub(a, T::from_u64(1), 0);
        (r, Some(keep_cf(aux, old)))
    }
}
pub(super) struct Neg;
impl Unary for Neg {
    #[inline(always)]
    fn op<T: Width>(a: T, _old: u64) -> (T, Option<u64>) {
        let (r, aux) = sub(T::from_u64(0), a, 0);
        (r, Some(aux))
    }
}
pub(super) struct Not;
impl Unary for Not {
    #[inline(always)]
    fn op<T: Width>(a: T, _old: u64) -> (T, Option<u64>) {
        (T::from_u64(!a.u64()), None)
    }
}
fn unary_r<O: Unary, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (r, aux) = O::op::<T>(cpu.reg(i.r0), cpu.lazy_aux);
    cpu.set_reg(i.r0, r);
    if let Some(aux) = aux {
        cpu.set_lazy(r, aux);
    }
    Ok(())
}
fn unary_m<O: Unary, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let old = cpu.lazy_aux;
    let (r, aux) = cpu.update::<T, _>(seg, off, i.has(insn_flag::LOCK), |a| {
        let (r, aux) = O::op::<T>(a, old);
        (r, (r, aux))
    })?;
    if let Some(aux) = aux {
        cpu.set_lazy(r, aux);
    }
    Ok(())
}
pub(super) fn pick_unary<O: Unary>(memory: bool, size: u8) -> Handler {
    if memory { super::sized!(size, unary_m[O]) } else { super::sized!(size, unary_r[O]) }
}

/// ADCX and ADOX: only CF or only OF takes part.
pub(super) fn adcx<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.rm1::<T>(i)?;
    let (r, aux) = add(cpu.reg::<T>(i.r0), b, u64::from(cpu.cf()));
    cpu.set_reg(i.r0, r);
    cpu.set_cf(aux & CARRY != 0);
    Ok(())
}
pub(super) fn adox<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.rm1::<T>(i)?;
    let (r, aux) = add(cpu.reg::<T>(i.r0), b, u64::from(cpu.of()));
    cpu.set_reg(i.r0, r);
    cpu.set_cf_of(cpu.cf(), aux & CARRY != 0);
    Ok(())
}

/// XADD.
pub(super) fn xadd<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.reg::<T>(i.r1);
    let (old, r, aux) = if i.is_mem() {
        let (seg, off) = cpu.mem_addr(i);
        cpu.update::<T, _>(seg, off, i.has(insn_flag::LOCK), |a| {
            let (r, aux) = add(a, b, 0);
            (r, (a, r, aux))
        })?
    } else {
        let a = cpu.reg::<T>(i.r0);
        let (r, aux) = add(a, b, 0);
        (a, r, aux)
    };
    cpu.set_reg(i.r1, old);
    if !i.is_mem() {
        cpu.set_reg(i.r0, r);
    }
    cpu.set_lazy(r, aux);
    Ok(())
}

/// CMPXCHG: the destination is written in any case.
pub(super) fn cmpxchg<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let new = cpu.reg::<T>(i.r1);
    let want = cpu.reg::<T>(0);
    let old = if i.is_mem() {
        let (seg, off) = cpu.mem_addr(i);
        cpu.update::<T, _>(seg, off, i.has(insn_flag::LOCK), |a| (if a == want { new } else { a }, a))?
    } else {
        cpu.reg::<T>(i.r0)
    };
    let (r, aux) = sub(want, old, 0);
    if old == want {
        if !i.is_mem() {
            cpu.set_reg(i.r0, new);
        }
    } else {
        cpu.set_reg(0, old);
    }
    cpu.set_lazy(r, aux);
    Ok(())
}
