//! Segment descriptors and loading of segment registers.
//!
//! Sources: SDM vol. 3A chapters 3 (formats) and 5 (protection checks); APM vol. 2 chapter 4.

use super::{canonical_base, long_mode};
use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::state::{Seg, Segment};

/// System descriptor types (SDM vol. 3A table 3-2).
pub(crate) mod kind {
    pub(crate) const TSS16_AVAILABLE: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL_GATE16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT_GATE16: u8 = 6;
    pub(crate) const TRAP_GATE16: u8 = 7;
    pub(crate) const TSS_AVAILABLE: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 11;
    pub(crate) const CALL_GATE: u8 = 12;
    pub(crate) const INTERRUPT_GATE: u8 = 14;
    pub(crate) const TRAP_GATE: u8 = 15;
}

/// An eight-byte descriptor as it stands in memory, with the linear address it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Bits 0-31.
    pub low: u32,
    /// Bits 32-63.
    pub high: u32,
    /// Linear address of its first byte.
    pub address: u64,
}

impl Descriptor {
    pub(crate) fn base(&self) -> u32 {
        self.low >> 16 | (self.high & 0xff) << 16 | self.high & 0xff00_0000
    }
    /// Limit in bytes, scaled by G.
    pub(crate) fn limit(&self) -> u32 {
        let raw = self.low & 0xffff | self.high & 0xf_0000;
        if self.high & 1 << 23 != 0 { raw << 12 | 0xfff } else { raw }
    }
    pub(crate) fn kind(&self) -> u8 {
        (self.high >> 8 & 0xf) as u8
    }
    pub(crate) fn is_system(&self) -> bool {
        self.high & 1 << 12 == 0
    }
    pub(crate) fn is_code(&self) -> bool {
        self.high & 0x1800 == 0x1800
    }
    /// Conforming code (only meaningful for code).
    pub(crate) fn conforming(&self) -> bool {
        self.high & 1 << 10 != 0
    }
    pub(crate) fn writable_data(&self) -> bool {
        self.high & 0x1a00 == 0x1200
    }
    /// Data, or code with the readable bit.
    pub(crate) fn readable(&self) -> bool {
        !self.is_system() && (self.high & 1 << 11 == 0 || self.high & 1 << 9 != 0)
    }
    pub(crate) fn dpl(&self) -> u8 {
        (self.high >> 13 & 3) as u8
    }
    pub(crate) fn present(&self) -> bool {
        self.high & 1 << 15 != 0
    }
    pub(crate) fn long(&self) -> bool {
        self.high & 1 << 21 != 0
    }
    pub(crate) fn big(&self) -> bool {
        self.high & 1 << 22 != 0
    }
    /// Attributes in the layout of [`Segment::attr`].
    pub(crate) fn attr(&self) -> u16 {
        (self.high >> 8) as u16 & 0xf0ff
    }
    /// The segment register contents that this descriptor gives under `selector`, as accessed.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        let accessed = if self.is_system() { 0 } else { 1 };
        Segment {
            base: u64::from(self.base()),
            limit: self.limit(),
            attr: self.attr() | accessed,
            selector,
            unusable: false,
        }
    }
    /// Selector field of a gate.
    pub(crate) fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
    /// Offset field of an eight-byte gate: 32 bits (the upper half is used by 32-bit gates only).
    pub(crate) fn gate_offset(&self) -> u32 {
        self.low & 0xffff | self.high & 0xffff_0000
    }
}

/// True for a selector that names no descriptor (index 0 of the GDT, any RPL).
pub(crate) fn null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Error code of a selector: its RPL bits are cleared.
pub(crate) fn code_of(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// The linear address of a descriptor of `size` bytes, or None when its table does not hold it.
fn descriptor_address(cpu: &Cpu, selector: u16, size: u64) -> Option<u64> {
    let offset = u64::from(selector & 0xfff8);
    let (base, limit) = if selector & 4 != 0 {
        let ldt = &cpu.state.ldtr;
        if ldt.unusable || null(ldt.selector) {
            return None;
        }
        (ldt.base, u64::from(ldt.limit))
    } else {
        (cpu.state.gdtr.base, u64::from(cpu.state.gdtr.limit))
    };
    let mask = if long_mode(cpu) { u64::MAX } else { 0xffff_ffff };
    (offset + size - 1 <= limit).then_some(base.wrapping_add(offset) & mask)
}

/// Reads the eight-byte descriptor of `selector`; None when it lies outside its table (the caller raises its own fault).
pub(crate) fn read(cpu: &mut Cpu, selector: u16) -> Exec<Option<Descriptor>> {
    let Some(address) = descriptor_address(cpu, selector, 8) else { return Ok(None) };
    let value: u64 = cpu.sys_load(address)?;
    Ok(Some(Descriptor { low: value as u32, high: (value >> 32) as u32, address }))
}

/// Reads the upper eight bytes of a 16-byte system descriptor; None when they lie outside the table.
pub(crate) fn read_upper(cpu: &mut Cpu, selector: u16) -> Exec<Option<u64>> {
    let Some(address) = descriptor_address(cpu, selector, 16) else { return Ok(None) };
    Ok(Some(cpu.sys_load(address.wrapping_add(8))?))
}

/// Sets the accessed bit in the descriptor's memory when it is clear (SDM vol. 3A §3.4.5.1).
pub(crate) fn mark_accessed(cpu: &mut Cpu, descriptor: &Descriptor) -> Exec {
    if descriptor.is_system() || descriptor.high & 1 << 8 != 0 {
        return Ok(());
    }
    let address = descriptor.address.wrapping_add(4);
    cpu.sys_store::<u32>(address, descriptor.high | 1 << 8)
}

/// The contents of a segment register after a null selector was loaded (Intel clears the base; so does AMD since Zen 2,
/// APM vol. 2 §4.5.3 with CPUID 8000_0021 EAX bit 6).
pub(crate) fn null_segment(selector: u16) -> Segment {
    Segment { base: 0, limit: 0, attr: 0, selector, unusable: true }
}

/// The contents of a segment register in real mode: only selector and base change, so that limits set up in protected
/// mode last ("unreal" mode).
pub(crate) fn real_segment(old: &Segment, selector: u16) -> Segment {
    let mut new = *old;
    new.selector = selector;
    new.base = u64::from(selector) << 4;
    if old.unusable || !old.present() {
        new.limit = 0xffff;
        new.attr = 0x93;
    }
    new.unusable = false;
    new
}

/// The contents of a segment register in virtual-8086 mode (SDM vol. 3A §20.2).
pub(crate) fn v86_segment(selector: u16) -> Segment {
    Segment { base: u64::from(selector) << 4, limit: 0xffff, attr: 0xf3, selector, unusable: false }
}

/// Checks `selector` for ES, DS, FS or GS and gives the register's new contents (SDM vol. 2, MOV).
pub(crate) fn check_data(cpu: &mut Cpu, selector: u16) -> Exec<Segment> {
    if null(selector) {
        return Ok(null_segment(selector));
    }
    let fault = code_of(selector);
    let Some(d) = read(cpu, selector)? else { return Err(Fault::gp(fault)) };
    if !d.readable() {
        return Err(Fault::gp(fault));
    }
    let rpl = (selector & 3) as u8;
    if !(d.is_code() && d.conforming()) && (rpl > d.dpl() || cpu.cpl() > d.dpl()) {
        return Err(Fault::gp(fault));
    }
    if !d.present() {
        return Err(Fault::np(fault));
    }
    mark_accessed(cpu, &d)?;
    Ok(d.segment(selector))
}

/// Checks `selector` for SS at privilege level `cpl` and gives the register's new contents. Faults on the selector are
/// made by `bad` (#GP or #TS, with `ext` ored in); a segment that is not present is #SS.
pub(crate) fn check_stack(
    cpu: &mut Cpu,
    selector: u16,
    cpl: u8,
    bad: fn(u32) -> Fault,
    ext: u32,
) -> Exec<Segment> {
    if null(selector) {
        return Err(bad(ext));
    }
    let fault = code_of(selector) | ext;
    let Some(d) = read(cpu, selector)? else { return Err(bad(fault)) };
    if (selector & 3) as u8 != cpl || !d.writable_data() || d.dpl() != cpl {
        return Err(bad(fault));
    }
    if !d.present() {
        return Err(Fault::ss(fault));
    }
    mark_accessed(cpu, &d)?;
    Ok(d.segment(selector))
}

/// Loads a data or stack segment register, in any mode: MOV Sreg, POP Sreg, LDS and its kin. CS is not loaded here.
pub(crate) fn load(cpu: &mut Cpu, seg: Seg, selector: u16) -> Exec {
    let new = if !cpu.protected() {
        real_segment(&cpu.state.seg[seg as usize], selector)
    } else if cpu.v86() {
        v86_segment(selector)
    } else if seg == Seg::Ss {
        let cpl = cpu.cpl();
        if null(selector) && cpu.in_64bit() && cpl != 3 && (selector & 3) as u8 == cpl {
            null_stack(selector)
        } else {
            check_stack(cpu, selector, cpl, Fault::gp, 0)?
        }
    } else {
        check_data(cpu, selector)?
    };
    cpu.state.seg[seg as usize] = new;
    if seg == Seg::Ss {
        cpu.mode_changed();
    } else {
        cpu.seg_changed(seg);
    }
    Ok(())
}

/// SS with a null selector in 64-bit mode: a flat stack whose DPL is the CPL (SDM vol. 3A §5.14).
pub(crate) fn null_stack(selector: u16) -> Segment {
    Segment { attr: (selector & 3) << 5, ..null_segment(selector) }
}

/// LLDT: loads LDTR (SDM vol. 2, LLDT). Privilege was checked by the caller.
pub(crate) fn load_ldtr(cpu: &mut Cpu, selector: u16, bad: fn(u32) -> Fault) -> Exec {
    if null(selector) {
        cpu.state.ldtr = null_segment(selector);
        return Ok(());
    }
    let fault = code_of(selector);
    if selector & 4 != 0 {
        return Err(bad(fault));
    }
    let Some(d) = read(cpu, selector)? else { return Err(bad(fault)) };
    if !d.is_system() || d.kind() != kind::LDT {
        return Err(bad(fault));
    }
    let mut new = d.segment(selector);
    if long_mode(cpu) {
        let Some(upper) = read_upper(cpu, selector)? else { return Err(bad(fault)) };
        new.base |= upper << 32;
        if !d.present() {
            return Err(not_present(bad, fault));
        }
        if !canonical_base(cpu, new.base) || upper >> 32 & 0x1f00 != 0 {
            return Err(bad(fault));
        }
    } else if !d.present() {
        return Err(not_present(bad, fault));
    }
    cpu.state.ldtr = new;
    Ok(())
}

/// An LDT that is not present is #NP for LLDT but #TS in a task switch (SDM vol. 3A table 7-1).
fn not_present(bad: fn(u32) -> Fault, error: u32) -> Fault {
    match bad(error) {
        Fault::Exception { vector: 10, .. } => Fault::ts(error),
        _ => Fault::np(error),
    }
}

/// LTR: loads the task register and marks the TSS busy (SDM vol. 2, LTR). Privilege was checked by the caller.
pub(crate) fn load_tr(cpu: &mut Cpu, selector: u16) -> Exec {
    if null(selector) {
        return Err(Fault::gp(0));
    }
    let fault = code_of(selector);
    if selector & 4 != 0 {
        return Err(Fault::gp(fault));
    }
    let Some(d) = read(cpu, selector)? else { return Err(Fault::gp(fault)) };
    let long = long_mode(cpu);
    let good = d.kind() == kind::TSS_AVAILABLE || d.kind() == kind::TSS16_AVAILABLE && !long;
    if !d.is_system() || !good {
        return Err(Fault::gp(fault));
    }
    if !d.present() {
        return Err(Fault::np(fault));
    }
    let mut new = d.segment(selector);
    if long {
        let Some(upper) = read_upper(cpu, selector)? else { return Err(Fault::gp(fault)) };
        new.base |= upper << 32;
        if !canonical_base(cpu, new.base) || upper >> 32 & 0x1f00 != 0 {
            return Err(Fault::gp(fault));
        }
    }
    set_busy(cpu, &d, true)?;
    new.attr |= 2;
    cpu.state.tr = new;
    Ok(())
}

/// Sets or clears the busy bit of a TSS descriptor in memory.
pub(crate) fn set_busy(cpu: &mut Cpu, d: &Descriptor, busy: bool) -> Exec {
    let address = d.address.wrapping_add(4);
    let high: u32 = cpu.sys_load(address)?;
    let new = if busy { high | 1 << 9 } else { high & !(1 << 9) };
    cpu.sys_store::<u32>(address, new)
}

/// Clears data segment registers that a less privileged level must not keep (SDM vol. 2, RET and IRET: return to an
/// outer privilege level).
pub(crate) fn drop_privileged(cpu: &mut Cpu, cpl: u8) {
    for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        let s = &cpu.state.seg[seg as usize];
        let conforming = s.kind() & 0xc == 0xc;
        if !s.unusable && s.dpl() < cpl && !conforming {
            cpu.state.seg[seg as usize] = null_segment(0);
        }
    }
}

/// True when the `len` bytes at `offset` lie inside `segment` (expand-down included): what pushes onto a stack that is
/// not loaded yet are checked against.
pub(crate) fn in_limit(segment: &Segment, offset: u64, len: u64) -> bool {
    let last = offset + (len - 1);
    let limit = u64::from(segment.limit);
    if segment.is_code_or_data() && segment.kind() & 0xc == 4 {
        let top = if segment.big() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}
