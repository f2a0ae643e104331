//! Task switches with 16-bit and 32-bit task state segments.
//!
//! Source: SDM vol. 3A chapter 7.

use super::seg::{self, Descriptor, code_of, kind, null};
use super::stack::NewStack;
use super::{jump, long_mode, next_rip};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{Seg, Segment, cr0, flag};

/// What started a task switch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Jmp,
    Call,
    Iret,
    Gate,
}

/// The part of a TSS that a switch loads (SDM vol. 3A figures 7-2 and 7-10).
#[derive(Default)]
struct Image {
    cr3: u32,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    /// ES CS SS DS FS GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Segment registers in the order of the TSS.
const ORDER: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

/// A far JMP or CALL that names a TSS, or a task gate that does.
pub(crate) fn from_instruction(cpu: &mut Cpu, insn: &Insn, selector: u16, call: bool) -> Exec {
    let source = if call { Source::Call } else { Source::Jmp };
    let d = available(cpu, selector, 0)?;
    let rip = next_rip(cpu, insn);
    let target = switch(cpu, selector, &d, source, rip, None, 0, false)?;
    jump(cpu, target);
    Ok(())
}

/// An interrupt or exception through a task gate. Gives the new EIP.
pub(crate) fn through_interrupt_gate(
    cpu: &mut Cpu,
    selector: u16,
    rip: u64,
    error: Option<u32>,
    ext: u32,
    set_rf: bool,
) -> Exec<u64> {
    let d = available(cpu, selector, ext)?;
    switch(cpu, selector, &d, Source::Gate, rip, error, ext, set_rf)
}

/// IRET with NT set: back to the task in the link field (SDM vol. 3A §7.4).
pub(crate) fn iret_nested(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let base = cpu.state.tr.base;
    let selector: u16 = cpu.sys_load(base)?;
    let error = code_of(selector);
    if selector & 4 != 0 {
        return Err(Fault::ts(error));
    }
    let Some(d) = seg::read(cpu, selector)? else { return Err(Fault::ts(error)) };
    if !d.is_system() || !matches!(d.kind(), kind::TSS_BUSY | kind::TSS16_BUSY) {
        return Err(Fault::ts(error));
    }
    if !d.present() {
        return Err(Fault::np(error));
    }
    let rip = next_rip(cpu, insn);
    let target = switch(cpu, selector, &d, Source::Iret, rip, None, 0, false)?;
    jump(cpu, target);
    Ok(())
}

/// Reads the descriptor of a TSS that must be available.
fn available(cpu: &mut Cpu, selector: u16, ext: u32) -> Exec<Descriptor> {
    let error = code_of(selector) | ext;
    if null(selector) || selector & 4 != 0 {
        return Err(Fault::gp(error));
    }
    let Some(d) = seg::read(cpu, selector)? else { return Err(Fault::gp(error)) };
    if !d.is_system() || !matches!(d.kind(), kind::TSS_AVAILABLE | kind::TSS16_AVAILABLE) {
        return Err(Fault::gp(error));
    }
    if !d.present() {
        return Err(Fault::np(error));
    }
    Ok(d)
}

fn at(base: u64, offset: u64) -> u64 {
    base.wrapping_add(offset) & 0xffff_ffff
}

fn read_image(cpu: &mut Cpu, base: u64, wide: bool) -> Exec<Image> {
    let mut image = Image::default();
    if wide {
        image.cr3 = cpu.sys_load(at(base, 0x1c))?;
        image.eip = cpu.sys_load(at(base, 0x20))?;
        image.eflags = cpu.sys_load(at(base, 0x24))?;
        for (i, r) in image.gpr.iter_mut().enumerate() {
            *r = cpu.sys_load(at(base, 0x28 + 4 * i as u64))?;
        }
        for (i, s) in image.selectors.iter_mut().enumerate() {
            *s = cpu.sys_load(at(base, 0x48 + 4 * i as u64))?;
        }
        image.ldt = cpu.sys_load(at(base, 0x60))?;
        image.trap = cpu.sys_load::<u16>(at(base, 0x64))? & 1 != 0;
    } else {
        image.eip = u32::from(cpu.sys_load::<u16>(at(base, 0x0e))?);
        image.eflags = u32::from(cpu.sys_load::<u16>(at(base, 0x10))?);
        for (i, r) in image.gpr.iter_mut().enumerate() {
            // The upper halves become all ones, as the processors do it.
            *r = 0xffff_0000 | u32::from(cpu.sys_load::<u16>(at(base, 0x12 + 2 * i as u64))?);
        }
        for (i, s) in image.selectors.iter_mut().take(4).enumerate() {
            *s = cpu.sys_load(at(base, 0x22 + 2 * i as u64))?;
        }
        image.ldt = cpu.sys_load(at(base, 0x2a))?;
    }
    Ok(image)
}

/// Saves the present task (SDM vol. 3A §7.3 step 7).
fn save(cpu: &mut Cpu, base: u64, wide: bool, rip: u64, flags: u64) -> Exec {
    if wide {
        cpu.sys_store::<u32>(at(base, 0x20), rip as u32)?;
        cpu.sys_store::<u32>(at(base, 0x24), flags as u32)?;
        for i in 0..8 {
            let value = cpu.state.gpr[i] as u32;
            cpu.sys_store::<u32>(at(base, 0x28 + 4 * i as u64), value)?;
        }
        for (i, s) in ORDER.into_iter().enumerate() {
            let value = cpu.state.seg[s as usize].selector;
            cpu.sys_store::<u16>(at(base, 0x48 + 4 * i as u64), value)?;
        }
    } else {
        cpu.sys_store::<u16>(at(base, 0x0e), rip as u16)?;
        cpu.sys_store::<u16>(at(base, 0x10), flags as u16)?;
        for i in 0..8 {
            let value = cpu.state.gpr[i] as u16;
            cpu.sys_store::<u16>(at(base, 0x12 + 2 * i as u64), value)?;
        }
        for (i, s) in ORDER.into_iter().take(4).enumerate() {
            let value = cpu.state.seg[s as usize].selector;
            cpu.sys_store::<u16>(at(base, 0x22 + 2 * i as u64), value)?;
        }
    }
    Ok(())
}

/// Switches to the task of `d` and gives its EIP. Faults before the commit point leave the old task; faults after it are
/// the new task's: `state.rip` is then already the new task's EIP.
#[allow(clippy::too_many_arguments)]
fn switch(
    cpu: &mut Cpu,
    selector: u16,
    d: &Descriptor,
    source: Source,
    rip: u64,
    error: Option<u32>,
    ext: u32,
    set_rf: bool,
) -> Exec<u64> {
    debug_assert!(!long_mode(cpu));
    let wide = d.kind() & 8 != 0;
    let tss_error = code_of(selector) | ext;
    if d.limit() < if wide { 0x67 } else { 0x2b } {
        return Err(Fault::ts(tss_error));
    }
    let new_base = u64::from(d.base());
    let old = cpu.state.tr;
    let old_wide = old.kind() & 8 != 0;
    let old_needed = if old_wide { 0x5f } else { 0x29 };
    if old.limit < old_needed {
        return Err(Fault::ts(code_of(old.selector) | ext));
    }
    let image = read_image(cpu, new_base, wide)?;
    let mut flags = cpu.state.rflags | flag::ONE;
    if source == Source::Iret {
        flags &= !flag::NT;
    }
    if set_rf {
        flags |= flag::RF;
    }
    save(cpu, old.base, old_wide, rip, flags)?;
    if matches!(source, Source::Call | Source::Gate) {
        cpu.sys_store::<u16>(new_base, old.selector)?;
    }
    if matches!(source, Source::Jmp | Source::Iret)
        && let Some(od) = seg::read(cpu, old.selector)?
    {
        seg::set_busy(cpu, &od, false)?;
    }
    if source != Source::Iret {
        seg::set_busy(cpu, d, true)?;
    }

    // The commit point (SDM vol. 3A §7.3 step 12): from here on faults belong to the new task.
    let mut tr = d.segment(selector);
    tr.attr |= 2;
    cpu.state.tr = tr;
    cpu.state.cr0 |= cr0::TS;
    cpu.state.dr[7] &= !0x155;
    cpu.state.rip = u64::from(image.eip);
    let mut new_flags = u64::from(image.eflags) & 0x3f_7fd5 | flag::ONE;
    if !wide {
        new_flags &= 0xffff;
    }
    if matches!(source, Source::Call | Source::Gate) {
        new_flags |= flag::NT;
    }
    cpu.state.rflags = new_flags;
    for (r, value) in cpu.state.gpr.iter_mut().zip(image.gpr) {
        *r = u64::from(value);
    }
    // Until its descriptor is checked, each register holds the selector alone.
    for (s, value) in ORDER.into_iter().zip(image.selectors) {
        let old = cpu.state.seg[s as usize];
        cpu.state.seg[s as usize] = match s {
            Seg::Cs | Seg::Ss => Segment { selector: value, ..old },
            _ => seg::null_segment(value),
        };
    }
    cpu.state.ldtr = seg::null_segment(image.ldt);
    cpu.mode_changed();
    if wide && cpu.state.cr0 & cr0::PG != 0 {
        // PDPTEs with reserved bits set would be #TS here on no documented processor; they are loaded as MOV CR3 does.
        super::control::load_cr3(cpu, u64::from(image.cr3)).map_err(|_| Fault::ts(tss_error))?;
    }
    if image.ldt & 4 != 0 {
        return Err(Fault::ts(code_of(image.ldt) | ext));
    }
    load_ldt(cpu, image.ldt, ext)?;
    if new_flags & flag::VM != 0 {
        for (s, value) in ORDER.into_iter().zip(image.selectors) {
            cpu.state.seg[s as usize] = seg::v86_segment(value);
        }
        cpu.mode_changed();
    } else {
        load_segments(cpu, &image.selectors, ext)?;
    }
    if u64::from(image.eip) > u64::from(cpu.state.seg[Seg::Cs as usize].limit) {
        return Err(Fault::gp(ext));
    }
    if let Some(code) = error {
        let size = if wide { 4 } else { 2 };
        let mut stack = NewStack::current(cpu);
        stack.push(cpu, size, u64::from(code), ext)?;
        stack.commit_pointer(cpu);
    }
    super::debug::rearm(cpu);
    if image.trap {
        cpu.state.dr[6] |= super::debug::DR6_BT;
        return Err(Fault::db());
    }
    Ok(u64::from(image.eip))
}

fn load_ldt(cpu: &mut Cpu, selector: u16, ext: u32) -> Exec {
    if null(selector) {
        return Ok(());
    }
    let error = code_of(selector) | ext;
    let Some(d) = seg::read(cpu, selector)? else { return Err(Fault::ts(error)) };
    if !d.is_system() || d.kind() != kind::LDT || !d.present() {
        return Err(Fault::ts(error));
    }
    cpu.state.ldtr = d.segment(selector);
    Ok(())
}

/// Loads CS, SS and the data segments of the new task (SDM vol. 3A table 7-1).
fn load_segments(cpu: &mut Cpu, selectors: &[u16; 6], ext: u32) -> Exec {
    let [es, cs, ss, ds, fs, gs] = *selectors;
    let cpl = (cs & 3) as u8;
    let error = code_of(cs) | ext;
    if null(cs) {
        return Err(Fault::ts(error));
    }
    let Some(d) = seg::read(cpu, cs)? else { return Err(Fault::ts(error)) };
    let dpl_bad = if d.conforming() { d.dpl() > cpl } else { d.dpl() != cpl };
    if !d.is_code() || dpl_bad {
        return Err(Fault::ts(error));
    }
    if !d.present() {
        return Err(Fault::np(error));
    }
    let stack = seg::check_stack(cpu, ss, cpl, Fault::ts, ext)?;
    seg::mark_accessed(cpu, &d)?;
    cpu.state.seg[Seg::Ss as usize] = stack;
    cpu.state.seg[Seg::Cs as usize] = d.segment(cs);
    cpu.mode_changed();
    for (s, selector) in [(Seg::Es, es), (Seg::Ds, ds), (Seg::Fs, fs), (Seg::Gs, gs)] {
        let new = seg::check_data(cpu, selector).map_err(|fault| match fault {
            Fault::Exception { vector: 13, error: Some(e) } => Fault::ts(u32::from(e) | ext),
            Fault::Exception { vector: 11, error: Some(e) } => Fault::np(u32::from(e) | ext),
            other => other,
        })?;
        cpu.state.seg[s as usize] = new;
    }
    cpu.mode_changed();
    Ok(())
}
