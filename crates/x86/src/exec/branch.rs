//! Near branches, calls, returns, loops.

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::mmu::Width;
use crate::state::Seg;

impl Cpu {
    /// The value of condition code `C` (SDM vol. 1 appendix B).
    #[inline(always)]
    pub(super) fn condition<const C: u8>(&self) -> bool {
        let v = match C >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.less(),
            _ => self.less() | self.zf(),
        };
        v != (C & 1 != 0)
    }

    /// The next instruction's address, cut to the operand size.
    #[inline(always)]
    fn after(&self, i: &Insn) -> u64 {
        self.state.rip.wrapping_add(u64::from(i.len))
    }

    /// Makes `target` the next instruction: #GP(0) when it is beyond the code segment's limit or not canonical.
    #[inline(always)]
    fn go(&mut self, target: u64) -> Exec {
        if target > self.code_limit() || (self.in_64bit() && !self.canonical(target)) {
            return Err(Fault::gp(0));
        }
        self.next_rip = target;
        Ok(())
    }
}

/// A branch target relative to the next instruction.
#[inline(always)]
fn relative<T: Width>(cpu: &Cpu, i: &Insn) -> u64 {
    T::from_u64(cpu.after(i).wrapping_add(i.imm)).u64()
}

pub(super) fn jcc<const C: u8, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    if cpu.condition::<C>() {
        return cpu.go(relative::<T>(cpu, i));
    }
    Ok(())
}
pub(super) fn jmp<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    cpu.go(relative::<T>(cpu, i))
}
pub(super) fn jmp_rm<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let target = cpu.rm0::<T>(i)?.u64();
    cpu.go(target)
}
#[inline(always)]
fn call_to<T: Width>(cpu: &mut Cpu, i: &Insn, target: u64) -> Exec {
    let sp = cpu.sp_wrap(cpu.sp().wrapping_sub(T::SIZE));
    let old = cpu.next_rip;
    if let Err(fault) = cpu.go(target) {
        // A stack that can't be written comes first.
        cpu.probe_write(Seg::Ss, sp, T::SIZE)?;
        return Err(fault);
    }
    let back = T::from_u64(cpu.after(i));
    if let Err(fault) = cpu.store(Seg::Ss, sp, back) {
        cpu.next_rip = old;
        return Err(fault);
    }
    cpu.set_sp(sp);
    Ok(())
}
pub(super) fn call<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    call_to::<T>(cpu, i, relative::<T>(cpu, i))
}
pub(super) fn call_rm<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let target = cpu.rm0::<T>(i)?.u64();
    call_to::<T>(cpu, i, target)
}
/// RET and RET imm16.
pub(super) fn ret<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let sp = cpu.sp();
    let target = cpu.load::<T>(Seg::Ss, sp)?.u64();
    cpu.go(target)?;
    cpu.set_sp(sp.wrapping_add(T::SIZE).wrapping_add(i.imm));
    Ok(())
}

/// The counter of LOOP and JCXZ by address size.
#[inline(always)]
fn counter(cpu: &Cpu, asize: u8) -> u64 {
    let c = cpu.state.gpr[1];
    match asize {
        8 => c,
        4 => c & 0xffff_ffff,
        _ => c & 0xffff,
    }
}
/// LOOP (`KIND` 0), LOOPE (1), LOOPNE (2).
pub(super) fn loops<const KIND: u8, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let c = counter(cpu, i.asize).wrapping_sub(1);
    let more = match i.asize {
        8 => c,
        4 => c & 0xffff_ffff,
        _ => c & 0xffff,
    } != 0;
    let taken = more
        && match KIND {
            0 => true,
            1 => cpu.zf(),
            _ => !cpu.zf(),
        };
    if taken {
        cpu.go(relative::<T>(cpu, i))?;
    }
    match i.asize {
        8 => cpu.state.gpr[1] = c,
        4 => cpu.set_reg(1, c as u32),
        _ => cpu.set_reg(1, c as u16),
    }
    Ok(())
}
/// JCXZ, JECXZ, JRCXZ.
pub(super) fn jcxz<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    if counter(cpu, i.asize) == 0 {
        return cpu.go(relative::<T>(cpu, i));
    }
    Ok(())
}
