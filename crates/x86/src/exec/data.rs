//! Moves, exchanges, the stack, address computation.

use crate::cpu::Cpu;
use crate::decode::{Insn, insn_flag};
use crate::fault::{Exec, Fault};
use crate::mmu::Width;
use crate::state::{Seg, Shadow};
use crate::sys::seg as segments;

pub(super) fn mov_rr<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    cpu.set_reg::<T>(i.r0, cpu.reg(i.r1));
    Ok(())
}
pub(super) fn mov_ri<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    cpu.set_reg(i.r0, T::from_u64(i.imm));
    Ok(())
}
pub(super) fn mov_rm<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let v = cpu.load::<T>(seg, off)?;
    cpu.set_reg(i.r0, v);
    Ok(())
}
pub(super) fn mov_mr<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    cpu.store::<T>(seg, off, cpu.reg(i.r1))
}
pub(super) fn mov_mi<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    cpu.store(seg, off, T::from_u64(i.imm))
}

/// MOVZX.
pub(super) fn movzx_r<S: Width, D: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.reg::<S>(i.r1).u64();
    cpu.set_reg(i.r0, D::from_u64(v));
    Ok(())
}
pub(super) fn movzx_m<S: Width, D: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let v = cpu.load::<S>(seg, off)?.u64();
    cpu.set_reg(i.r0, D::from_u64(v));
    Ok(())
}
/// MOVSX, MOVSXD.
pub(super) fn movsx_r<S: Width, D: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.reg::<S>(i.r1).sext();
    cpu.set_reg(i.r0, D::from_u64(v));
    Ok(())
}
pub(super) fn movsx_m<S: Width, D: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let v = cpu.load::<S>(seg, off)?.sext();
    cpu.set_reg(i.r0, D::from_u64(v));
    Ok(())
}

pub(super) fn lea<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    cpu.set_reg(i.r0, T::from_u64(cpu.effective_address(i)));
    Ok(())
}

pub(super) fn xchg_rr<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (a, b) = (cpu.reg::<T>(i.r0), cpu.reg::<T>(i.r1));
    cpu.set_reg(i.r0, b);
    cpu.set_reg(i.r1, a);
    Ok(())
}
/// XCHG with memory is locked whether it says so or not.
pub(super) fn xchg_m<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    // iced gives the memory operand first.
    let new = cpu.reg::<T>(i.r1);
    let old = cpu.update::<T, _>(seg, off, true, |old| (new, old))?;
    cpu.set_reg(i.r1, old);
    Ok(())
}

impl Cpu {
    #[inline(always)]
    pub(super) fn push<T: Width>(&mut self, v: T) -> Exec {
        let sp = self.sp_wrap(self.sp().wrapping_sub(T::SIZE));
        self.store(Seg::Ss, sp, v)?;
        self.set_sp(sp);
        Ok(())
    }
    #[inline(always)]
    pub(super) fn pop<T: Width>(&mut self) -> Exec<T> {
        let sp = self.sp();
        let v = self.load(Seg::Ss, sp)?;
        self.set_sp(sp.wrapping_add(T::SIZE));
        Ok(v)
    }
}

pub(super) fn push_r<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.reg::<T>(i.r0);
    cpu.push(v)
}
pub(super) fn push_i<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    cpu.push(T::from_u64(i.imm))
}
pub(super) fn push_m<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let v = cpu.load::<T>(seg, off)?;
    cpu.push(v)
}
/// PUSH of a segment register: the selector, extended with zeros.
pub(super) fn push_seg<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.state.seg.get(usize::from(i.r0)).map_or(0, |s| s.selector);
    cpu.push(T::from_u64(v.into()))
}
pub(super) fn pop_r<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.pop::<T>()?;
    cpu.set_reg(i.r0, v);
    Ok(())
}
/// POP to memory: an address with (R)SP in it is computed after the increment (SDM vol. 2B "POP").
pub(super) fn pop_m<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let old = cpu.state.gpr[4];
    let v = cpu.pop::<T>()?;
    let (seg, off) = cpu.mem_addr(i);
    let stored = cpu.store(seg, off, v);
    if stored.is_err() {
        cpu.state.gpr[4] = old;
    }
    stored
}
fn seg_of(n: u8) -> Seg {
    match n {
        0 => Seg::Es,
        1 => Seg::Cs,
        2 => Seg::Ss,
        3 => Seg::Ds,
        4 => Seg::Fs,
        _ => Seg::Gs,
    }
}
/// Loads a segment register, with the shadow of SS and the processor's caches brought up to date.
fn load_segment(cpu: &mut Cpu, seg: Seg, selector: u16) -> Exec {
    segments::load(cpu, seg, selector)?;
    if seg == Seg::Ss {
        cpu.mode_changed();
    } else {
        cpu.seg_changed(seg);
    }
    Ok(())
}
/// POP of a segment register.
pub(super) fn pop_seg<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let sp = cpu.sp();
    let selector = cpu.load::<T>(Seg::Ss, sp)?.u64() as u16;
    let seg = seg_of(i.r0);
    // The stack pointer moves by the old stack's size.
    let old = cpu.state.gpr[4];
    cpu.set_sp(sp.wrapping_add(T::SIZE));
    if let Err(fault) = load_segment(cpu, seg, selector) {
        cpu.state.gpr[4] = old;
        return Err(fault);
    }
    if seg == Seg::Ss {
        cpu.state.shadow = Shadow::MovSs;
    }
    Ok(())
}
/// MOV Sreg, r/m16.
pub(super) fn mov_to_seg(cpu: &mut Cpu, i: &Insn) -> Exec {
    let seg = seg_of(i.r0);
    if seg == Seg::Cs {
        return Err(Fault::ud());
    }
    let selector = if i.is_mem() {
        let (s, off) = cpu.mem_addr(i);
        cpu.load::<u16>(s, off)?
    } else {
        cpu.reg::<u16>(i.r1)
    };
    load_segment(cpu, seg, selector)?;
    if seg == Seg::Ss {
        cpu.state.shadow = Shadow::MovSs;
    }
    Ok(())
}
/// MOV r/m, Sreg: memory gets 16 bits, a register as many as its size, extended with zeros.
pub(super) fn mov_from_seg(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.state.seg.get(usize::from(i.r1)).map_or(0, |s| s.selector);
    if i.is_mem() {
        let (seg, off) = cpu.mem_addr(i);
        return cpu.store(seg, off, v);
    }
    match i.size {
        2 => cpu.set_reg(i.r0, v),
        _ => cpu.set_reg(i.r0, u64::from(v)),
    }
    Ok(())
}
/// LDS, LES, LFS, LGS, LSS: offset, then selector.
pub(super) fn load_far_pointer(cpu: &mut Cpu, i: &Insn, seg: Seg) -> Exec {
    let (s, off) = cpu.mem_addr(i);
    let size = u64::from(i.osize);
    let wrapped = |o: u64| match i.asize {
        8 => o,
        4 => o & 0xffff_ffff,
        _ => o & 0xffff,
    };
    let offset = match size {
        2 => u64::from(cpu.load::<u16>(s, off)?),
        4 => u64::from(cpu.load::<u32>(s, off)?),
        _ => cpu.load::<u64>(s, off)?,
    };
    let selector = cpu.load::<u16>(s, wrapped(off.wrapping_add(size)))?;
    load_segment(cpu, seg, selector)?;
    match size {
        2 => cpu.set_reg(i.r0, offset as u16),
        4 => cpu.set_reg(i.r0, offset as u32),
        _ => cpu.set_reg(i.r0, offset),
    }
    Ok(())
}

/// PUSHA / PUSHAD: all or nothing.
pub(super) fn pusha<T: Width>(cpu: &mut Cpu, _i: &Insn) -> Exec {
    let sp = cpu.sp();
    let low = cpu.sp_wrap(sp.wrapping_sub(8 * T::SIZE));
    if low < sp {
        cpu.probe_write(Seg::Ss, low, 8 * T::SIZE)?;
    }
    for n in 0..8_u8 {
        let off = cpu.sp_wrap(sp.wrapping_sub((u64::from(n) + 1) * T::SIZE));
        let v = cpu.reg::<T>(n);
        cpu.store(Seg::Ss, off, v)?;
    }
    cpu.set_sp(low);
    Ok(())
}
/// POPA / POPAD: (E)SP's slot is skipped.
pub(super) fn popa<T: Width>(cpu: &mut Cpu, _i: &Insn) -> Exec {
    let sp = cpu.sp();
    let mut values = [T::from_u64(0); 8];
    for (n, v) in values.iter_mut().enumerate() {
        *v = cpu.load(Seg::Ss, cpu.sp_wrap(sp.wrapping_add(n as u64 * T::SIZE)))?;
    }
    for (n, v) in values.iter().enumerate() {
        let r = 7 - n as u8;
        if r != 4 {
            cpu.set_reg(r, *v);
        }
    }
    cpu.set_sp(sp.wrapping_add(8 * T::SIZE));
    Ok(())
}

/// ENTER imm16, imm8 (SDM vol. 2A "ENTER").
pub(super) fn enter<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (size, level) = (i.imm & 0xffff, i.imm >> 16 & 31);
    let bp_wrap = |cpu: &Cpu, v: u64| cpu.sp_wrap(v);
    let mut sp = cpu.sp_wrap(cpu.sp().wrapping_sub(T::SIZE));
    // A fault at any step leaves the registers alone; what was written below the stack is nobody's.
    cpu.store(Seg::Ss, sp, cpu.reg::<T>(5))?;
    let frame = sp;
    if level > 0 {
        let mut bp = bp_wrap(cpu, cpu.state.gpr[5]);
        for _ in 1..level {
            bp = bp_wrap(cpu, bp.wrapping_sub(T::SIZE));
            let v = cpu.load::<T>(Seg::Ss, bp)?;
            sp = cpu.sp_wrap(sp.wrapping_sub(T::SIZE));
            cpu.store(Seg::Ss, sp, v)?;
        }
        sp = cpu.sp_wrap(sp.wrapping_sub(T::SIZE));
        cpu.store(Seg::Ss, sp, T::from_u64(frame))?;
    }
    let new = cpu.sp_wrap(sp.wrapping_sub(size));
    // The new top of the stack must be writable.
    cpu.probe_write(Seg::Ss, new, 1)?;
    cpu.set_reg(5, T::from_u64(frame));
    cpu.set_sp(new);
    Ok(())
}
/// LEAVE.
pub(super) fn leave<T: Width>(cpu: &mut Cpu, _i: &Insn) -> Exec {
    let bp = cpu.sp_wrap(cpu.state.gpr[5]);
    let v = cpu.load::<T>(Seg::Ss, bp)?;
    cpu.set_sp(bp.wrapping_add(T::SIZE));
    cpu.set_reg(5, v);
    Ok(())
}

/// CMOVcc: memory is read whatever the condition, and a 32-bit destination is extended.
pub(super) fn cmov_r<const C: u8, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = if cpu.condition::<C>() { cpu.reg::<T>(i.r1) } else { cpu.reg(i.r0) };
    cpu.set_reg(i.r0, v);
    Ok(())
}
pub(super) fn cmov_m<const C: u8, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let m = cpu.load::<T>(seg, off)?;
    let v = if cpu.condition::<C>() { m } else { cpu.reg(i.r0) };
    cpu.set_reg(i.r0, v);
    Ok(())
}
/// SETcc.
pub(super) fn setcc<const C: u8>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = u8::from(cpu.condition::<C>());
    if i.is_mem() {
        let (seg, off) = cpu.mem_addr(i);
        return cpu.store(seg, off, v);
    }
    cpu.set_reg(i.r0, v);
    Ok(())
}

fn swap<T: Width>(v: T) -> T {
    T::from_u64(v.u64().swap_bytes() >> (64 - T::BITS))
}
/// MOVBE.
pub(super) fn movbe_load<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let v = swap::<T>(cpu.load(seg, off)?);
    cpu.set_reg(i.r0, v);
    Ok(())
}
pub(super) fn movbe_store<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    cpu.store(seg, off, swap::<T>(cpu.reg(i.r1)))
}
/// BSWAP; the 16-bit form is undefined and gives 0, as processors do.
pub(super) fn bswap<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = if T::BITS == 16 { 0 } else { cpu.reg::<T>(i.r0).u64().swap_bytes() >> (64 - T::BITS) };
    cpu.set_reg(i.r0, T::from_u64(v));
    Ok(())
}
/// XLAT.
pub(super) fn xlat(cpu: &mut Cpu, i: &Insn) -> Exec {
    let off = cpu.state.gpr[3].wrapping_add(cpu.state.gpr[0] & 0xff);
    let off = match i.asize {
        8 => off,
        4 => off & 0xffff_ffff,
        _ => off & 0xffff,
    };
    let v = cpu.load::<u8>(i.seg, off)?;
    cpu.set_reg(0, v);
    Ok(())
}
/// BOUND.
pub(super) fn bound<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let low = cpu.load::<T>(seg, off)?.sext() as i64;
    let next = off.wrapping_add(T::SIZE) & if i.asize == 2 { 0xffff } else { 0xffff_ffff };
    let high = cpu.load::<T>(seg, next)?.sext() as i64;
    let index = cpu.reg::<T>(i.r0).sext() as i64;
    if index < low || index > high { Err(Fault::br()) } else { Ok(()) }
}

/// CMPXCHG8B.
pub(super) fn cmpxchg8b(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let pair = |high: u64, low: u64| high << 32 | low & 0xffff_ffff;
    let g = &cpu.state.gpr;
    let (want, new) = (pair(g[2], g[0]), pair(g[1], g[3]));
    let old =
        cpu.update::<u64, _>(seg, off, i.has(insn_flag::LOCK), |a| (if a == want { new } else { a }, a))?;
    if old != want {
        cpu.set_reg(0, old as u32);
        cpu.set_reg(2, (old >> 32) as u32);
    }
    cpu.set_zf(old == want);
    Ok(())
}
/// CMPXCHG16B: 16-byte aligned, else #GP(0).
pub(super) fn cmpxchg16b(cpu: &mut Cpu, i: &Insn) -> Exec {
    let (seg, off) = cpu.mem_addr(i);
    let g = &cpu.state.gpr;
    let want = u128::from(g[2]) << 64 | u128::from(g[0]);
    let new = u128::from(g[1]) << 64 | u128::from(g[3]);
    let linear = cpu.linear(seg, off, 16, crate::mmu::Access::Write)?;
    if linear & 15 != 0 {
        return Err(Fault::gp(0));
    }
    let old = cpu.exchange16(seg, off, want, new)?;
    if old != want {
        cpu.state.gpr[0] = old as u64;
        cpu.state.gpr[2] = (old >> 64) as u64;
    }
    cpu.set_zf(old == want);
    Ok(())
}
