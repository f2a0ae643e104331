//! String instructions, with their repeat prefixes.
//!
//! A repeated instruction keeps its registers exact after every element, so that a fault or an interrupt finds them as the manual
//! says (SDM vol. 2B "REP"). Elements are moved a page at a time where both pages are in the TLB.

use super::alu::{Alu, Cmp};
use crate::cpu::Cpu;
use crate::decode::{Insn, insn_flag};
use crate::fault::{Exec, Fault};
use crate::mmu::{Access, Width};
use crate::native::mem::PAGE;
use crate::state::{Seg, flag};

/// Units of work (an element, or a page's span) after which a repeated instruction looks for interrupts.
const SPAN: u32 = 2048;

#[inline(always)]
fn index(cpu: &Cpu, r: usize, asize: u8) -> u64 {
    let v = cpu.state.gpr[r & 15];
    match asize {
        8 => v,
        4 => v & 0xffff_ffff,
        _ => v & 0xffff,
    }
}
#[inline(always)]
fn set_index(cpu: &mut Cpu, r: usize, asize: u8, v: u64) {
    match asize {
        8 => cpu.state.gpr[r & 15] = v,
        4 => cpu.state.gpr[r & 15] = v & 0xffff_ffff,
        _ => cpu.set_reg(r as u8, v as u16),
    }
}
#[inline(always)]
fn advance<T: Width>(cpu: &mut Cpu, r: usize, asize: u8, elements: u64) {
    let v = index(cpu, r, asize);
    let by = elements.wrapping_mul(T::SIZE);
    let v = if cpu.state.rflags & flag::DF == 0 { v.wrapping_add(by) } else { v.wrapping_sub(by) };
    set_index(cpu, r, asize, v);
}
const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

/// One go at a string instruction: elements done, and whether it ends now whatever the count says.
type Done = (u64, bool);

/// Repeats `f`, which does at most as many elements as it is told and updates the index registers, as the prefix says.
#[inline(always)]
fn repeat(cpu: &mut Cpu, i: &Insn, mut f: impl FnMut(&mut Cpu, u64) -> Exec<Done>) -> Exec {
    if !i.has(insn_flag::REP | insn_flag::REPNE) {
        return f(cpu, 1).map(|_| ());
    }
    let mut work = 0;
    loop {
        let count = index(cpu, RCX, i.asize);
        if count == 0 {
            return Ok(());
        }
        let (done, stop) = f(cpu, if cpu.debug_armed { 1 } else { count })?;
        let left = count.wrapping_sub(done);
        set_index(cpu, RCX, i.asize, left);
        if left == 0 || stop {
            return Ok(());
        }
        if cpu.debug_armed {
            // Single steps and breakpoints trap after every element.
            cpu.next_rip = cpu.state.rip;
            return Ok(());
        }
        work += 1;
        if work >= SPAN {
            return Err(Fault::Again);
        }
    }
}

/// How many of `count` elements upwards from `off` lie within the page and the address size: 0 when the way is barred for
/// spans. With the linear address.
#[inline(always)]
fn span<T: Width>(cpu: &Cpu, seg: Seg, off: u64, asize: u8, count: u64, access: Access) -> (u64, u64) {
    if cpu.state.rflags & flag::DF != 0 || cpu.alignment_checked {
        return (0, 0);
    }
    let s = &cpu.segc[seg as usize & 7];
    let linear = s.base.wrapping_add(off);
    let mut bytes = PAGE - (linear & (PAGE - 1));
    if asize == 2 {
        bytes = bytes.min(0x1_0000 - off);
    }
    let n = count.min(bytes / T::SIZE);
    let limit = if access == Access::Write { s.writable } else { s.readable };
    if n == 0 || off.wrapping_add(n * T::SIZE) > limit { (0, 0) } else { (n, linear) }
}

pub(super) fn movs<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, asize) = (i.seg, i.asize);
    repeat(cpu, i, |cpu, count| {
        let (si, di) = (index(cpu, RSI, asize), index(cpu, RDI, asize));
        let mut n = 0;
        if count > 1 {
            let (a, from) = span::<T>(cpu, seg, si, asize, count, Access::Read);
            let (b, to) = span::<T>(cpu, Seg::Es, di, asize, a, Access::Write);
            let window = &cpu.mmu.window;
            if b > 0 && window.write.copy_from(to, &window.read, from, b * T::SIZE, T::SIZE) {
                n = b;
            }
        }
        if n == 0 {
            let v = cpu.load::<T>(seg, si)?;
            cpu.store(Seg::Es, di, v)?;
            n = 1;
        }
        advance::<T>(cpu, RSI, asize, n);
        advance::<T>(cpu, RDI, asize, n);
        Ok((n, false))
    })
}

pub(super) fn stos<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let asize = i.asize;
    repeat(cpu, i, |cpu, count| {
        let di = index(cpu, RDI, asize);
        let v = cpu.reg::<T>(0);
        let mut n = 0;
        if count > 1 {
            let (a, to) = span::<T>(cpu, Seg::Es, di, asize, count, Access::Write);
            if a > 0 && cpu.mmu.window.write.fill_elements(to, v, a) {
                n = a;
            }
        }
        if n == 0 {
            cpu.store(Seg::Es, di, v)?;
            n = 1;
        }
        advance::<T>(cpu, RDI, asize, n);
        Ok((n, false))
    })
}

pub(super) fn lods<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, asize) = (i.seg, i.asize);
    repeat(cpu, i, |cpu, _| {
        let v = cpu.load::<T>(seg, index(cpu, RSI, asize))?;
        cpu.set_reg(0, v);
        advance::<T>(cpu, RSI, asize, 1);
        Ok((1, false))
    })
}

/// Whether REPE or REPNE ends after a comparison.
#[inline(always)]
fn ends(i: &Insn, equal: bool) -> bool {
    if i.has(insn_flag::REPNE) { equal } else { !equal }
}

pub(super) fn cmps<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, asize) = (i.seg, i.asize);
    repeat(cpu, i, |cpu, count| {
        if count > 1 {
            let (si, di) = (index(cpu, RSI, asize), index(cpu, RDI, asize));
            let (n, from) = span::<T>(cpu, seg, si, asize, count, Access::Read);
            let (n, to) = span::<T>(cpu, Seg::Es, di, asize, n, Access::Read);
            let equal = i.has(insn_flag::REPNE);
            if let Some((n, a, b)) = cpu.mmu.window.read.compare_elements::<T>(from, to, n, equal) {
                let (r, aux) = Cmp::op(a, b, false);
                cpu.set_lazy(r, aux);
                advance::<T>(cpu, RSI, asize, n);
                advance::<T>(cpu, RDI, asize, n);
                return Ok((n, ends(i, a == b)));
            }
        }
        let a = cpu.load::<T>(seg, index(cpu, RSI, asize))?;
        let b = cpu.load::<T>(Seg::Es, index(cpu, RDI, asize))?;
        let (r, aux) = Cmp::op(a, b, false);
        cpu.set_lazy(r, aux);
        advance::<T>(cpu, RSI, asize, 1);
        advance::<T>(cpu, RDI, asize, 1);
        Ok((1, ends(i, a == b)))
    })
}

pub(super) fn scas<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let asize = i.asize;
    repeat(cpu, i, |cpu, count| {
        let a = cpu.reg::<T>(0);
        if count > 1 {
            let di = index(cpu, RDI, asize);
            let (n, from) = span::<T>(cpu, Seg::Es, di, asize, count, Access::Read);
            let equal = i.has(insn_flag::REPNE);
            if let Some((n, b)) = cpu.mmu.window.read.scan_elements::<T>(from, n, a, equal) {
                let (r, aux) = Cmp::op(a, b, false);
                cpu.set_lazy(r, aux);
                advance::<T>(cpu, RDI, asize, n);
                return Ok((n, ends(i, a == b)));
            }
        }
        let b = cpu.load::<T>(Seg::Es, index(cpu, RDI, asize))?;
        let (r, aux) = Cmp::op(a, b, false);
        cpu.set_lazy(r, aux);
        advance::<T>(cpu, RDI, asize, 1);
        Ok((1, ends(i, a == b)))
    })
}
