//! Stacks that gates and interrupts push on before they become the current one.

use super::seg::{code_of, in_limit};
use super::{set_stack_pointer, stack_mask, stack_mask_of};
use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::state::{Seg, Segment, gpr};
use crate::tlb::View;

/// A stack that is pushed on while the registers keep their old values, so that a fault leaves them as they were.
pub(crate) struct NewStack {
    ss: Segment,
    pointer: u64,
    mask: u64,
    cpl: u8,
    flat: bool,
    /// The present SS: its accesses obey the present privilege.
    current: bool,
}

impl NewStack {
    /// The present stack.
    pub(crate) fn current(cpu: &Cpu) -> NewStack {
        NewStack {
            ss: cpu.state.seg[Seg::Ss as usize],
            pointer: cpu.state.gpr[gpr::RSP],
            mask: stack_mask(cpu),
            cpl: cpu.cpl(),
            flat: false,
            current: true,
        }
    }
    /// A stack in `ss` (32- or 16-bit by its B bit) for privilege level `cpl`.
    pub(crate) fn on(ss: Segment, pointer: u64, cpl: u8) -> NewStack {
        let mask = stack_mask_of(&ss, false);
        NewStack { ss, pointer, mask, cpl, flat: false, current: false }
    }
    /// A flat 64-bit stack for privilege level `cpl`.
    pub(crate) fn flat(pointer: u64, cpl: u8) -> NewStack {
        NewStack { ss: Segment::default(), pointer, mask: u64::MAX, cpl, flat: true, current: false }
    }
    /// The stack pointer after the pushes so far.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }
    /// Checks that `len` bytes fit; else #SS with `error`.
    pub(crate) fn room(&self, len: u64, error: u32) -> Exec {
        if self.flat || self.mask == u64::MAX {
            return Ok(());
        }
        let low = self.pointer.wrapping_sub(len) & self.mask;
        let high = self.pointer.wrapping_sub(1) & self.mask;
        // A frame may wrap around the end of the stack segment only when the whole segment is usable.
        let fits = if low <= high {
            in_limit(&self.ss, low, len)
        } else {
            in_limit(&self.ss, low, self.mask - low + 1) && in_limit(&self.ss, 0, high + 1)
        };
        if fits { Ok(()) } else { Err(Fault::ss(error)) }
    }
    /// Pushes `size` bytes of `value`; outside the segment it is #SS with `error`.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, size: u8, value: u64, error: u32) -> Exec {
        let next = self.pointer.wrapping_sub(u64::from(size)) & self.mask;
        if self.current {
            // The ordinary path: limit, type, canonical form and user/supervisor rights as of now.
            match size {
                2 => cpu.store::<u16>(Seg::Ss, next, value as u16)?,
                4 => cpu.store::<u32>(Seg::Ss, next, value as u32)?,
                _ => cpu.store::<u64>(Seg::Ss, next, value)?,
            }
        } else {
            let linear = if self.flat {
                next
            } else {
                if !in_limit(&self.ss, next, u64::from(size)) {
                    return Err(Fault::ss(error));
                }
                self.ss.base.wrapping_add(next) & 0xffff_ffff
            };
            match (size, self.cpl) {
                (2, 3) => cpu.store_linear::<u16>(linear, value as u16, View::User)?,
                (4, 3) => cpu.store_linear::<u32>(linear, value as u32, View::User)?,
                (_, 3) => cpu.store_linear::<u64>(linear, value, View::User)?,
                (2, _) => cpu.sys_store::<u16>(linear, value as u16)?,
                (4, _) => cpu.sys_store::<u32>(linear, value as u32)?,
                _ => cpu.sys_store::<u64>(linear, value)?,
            }
        }
        self.pointer = self.pointer & !self.mask | next;
        Ok(())
    }
    /// Makes the pointer current, SS staying as it is.
    pub(crate) fn commit_pointer(&self, cpu: &mut Cpu) {
        set_stack_pointer(cpu, self.pointer, self.mask);
    }
    /// Makes this stack the current one.
    pub(crate) fn commit(&self, cpu: &mut Cpu) {
        cpu.state.seg[Seg::Ss as usize] = self.ss;
        set_stack_pointer(cpu, self.pointer, 0xffff_ffff);
    }
}

/// SS and ESP for privilege level `cpl` from the 16- or 32-bit TSS (SDM vol. 3A §7.2).
pub(crate) fn tss_stack(cpu: &mut Cpu, cpl: u8, ext: u32) -> Exec<(u16, u32)> {
    let tr = cpu.state.tr;
    let wide = tr.kind() & 8 != 0;
    let (offset, len) = if wide { (4 + 8 * u64::from(cpl), 6) } else { (2 + 4 * u64::from(cpl), 4) };
    if tr.unusable || offset + len - 1 > u64::from(tr.limit) {
        return Err(Fault::ts(code_of(tr.selector) | ext));
    }
    let at = tr.base.wrapping_add(offset) & 0xffff_ffff;
    if wide {
        let esp: u32 = cpu.sys_load(at)?;
        let ss: u16 = cpu.sys_load(at.wrapping_add(4) & 0xffff_ffff)?;
        Ok((ss, esp))
    } else {
        let sp: u16 = cpu.sys_load(at)?;
        let ss: u16 = cpu.sys_load(at.wrapping_add(2) & 0xffff_ffff)?;
        Ok((ss, u32::from(sp)))
    }
}
