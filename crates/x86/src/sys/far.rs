//! Far JMP, CALL and RET with call gates, SYSCALL/SYSRET, SYSENTER/SYSEXIT.
//!
//! Sources: SDM vol. 2 (the instructions' pages), vol. 3A §5.8; APM vol. 2 §4.9 and vol. 3.

use super::event::real_code;
use super::seg::{self, Descriptor, code_of, kind, null};
use super::stack::{NewStack, tss_stack};
use super::{canonical, check_target, far_pointer, jump, long_mode, next_rip, operand_size, task};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{Seg, Segment, efer, flag, gpr};

/// Far JMP.
pub(crate) fn jmp(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let (selector, offset) = far_pointer(cpu, insn)?;
    transfer(cpu, insn, selector, offset, false)
}

/// Far CALL.
pub(crate) fn call(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let (selector, offset) = far_pointer(cpu, insn)?;
    transfer(cpu, insn, selector, offset, true)
}

fn transfer(cpu: &mut Cpu, insn: &Insn, selector: u16, offset: u64, call: bool) -> Exec {
    let size = operand_size(insn);
    if !cpu.protected() || cpu.v86() {
        let cs = cpu.state.seg[Seg::Cs as usize];
        if offset > u64::from(cs.limit) {
            return Err(Fault::gp(0));
        }
        if call {
            push_return(cpu, insn, size)?;
        }
        let new = if cpu.v86() { seg::v86_segment(selector) } else { real_code(&cs, selector) };
        cpu.state.seg[Seg::Cs as usize] = new;
        cpu.mode_changed();
        jump(cpu, offset);
        return Ok(());
    }
    if null(selector) {
        return Err(Fault::gp(0));
    }
    let error = code_of(selector);
    let Some(d) = seg::read(cpu, selector)? else { return Err(Fault::gp(error)) };
    let (cpl, rpl) = (cpu.cpl(), (selector & 3) as u8);
    if d.is_code() {
        let bad = if d.conforming() { d.dpl() > cpl } else { rpl > cpl || d.dpl() != cpl };
        if bad {
            return Err(Fault::gp(error));
        }
        if !d.present() {
            return Err(Fault::np(error));
        }
        let to_64 = long_mode(cpu) && d.long();
        if to_64 && d.big() {
            return Err(Fault::gp(error));
        }
        let rip = check_target(cpu, offset, &d, to_64, 0)?;
        if call {
            push_return(cpu, insn, size)?;
        }
        seg::mark_accessed(cpu, &d)?;
        cpu.state.seg[Seg::Cs as usize] = d.segment(selector & !3 | u16::from(cpl));
        cpu.mode_changed();
        jump(cpu, rip);
        return Ok(());
    }
    if !d.is_system() {
        return Err(Fault::gp(error));
    }
    let long = long_mode(cpu);
    match d.kind() {
        kind::CALL_GATE => gate(cpu, insn, selector, &d, call),
        kind::CALL_GATE16 if !long => gate(cpu, insn, selector, &d, call),
        kind::TASK_GATE if !long => {
            if d.dpl() < cpl || d.dpl() < rpl {
                return Err(Fault::gp(error));
            }
            if !d.present() {
                return Err(Fault::np(error));
            }
            task::from_instruction(cpu, insn, d.gate_selector(), call)
        }
        kind::TSS_AVAILABLE | kind::TSS16_AVAILABLE if !long => {
            if d.dpl() < cpl || d.dpl() < rpl {
                return Err(Fault::gp(error));
            }
            task::from_instruction(cpu, insn, selector, call)
        }
        _ => Err(Fault::gp(error)),
    }
}

/// Pushes CS and the address of the next instruction on the present stack.
fn push_return(cpu: &mut Cpu, insn: &Insn, size: u8) -> Exec {
    let rip = next_rip(cpu, insn);
    let cs = u64::from(cpu.state.seg[Seg::Cs as usize].selector);
    let mut stack = NewStack::current(cpu);
    stack.push(cpu, size, cs, 0)?;
    stack.push(cpu, size, rip, 0)?;
    stack.commit_pointer(cpu);
    Ok(())
}

/// A transfer through the call gate `g` that `selector` names (SDM vol. 3A §5.8.3-5.8.5).
fn gate(cpu: &mut Cpu, insn: &Insn, selector: u16, g: &Descriptor, call: bool) -> Exec {
    let gate_error = code_of(selector);
    let (cpl, rpl) = (cpu.cpl(), (selector & 3) as u8);
    if g.dpl() < cpl || g.dpl() < rpl {
        return Err(Fault::gp(gate_error));
    }
    if !g.present() {
        return Err(Fault::np(gate_error));
    }
    let long = long_mode(cpu);
    let mut offset = u64::from(g.gate_offset());
    if long {
        let Some(upper) = seg::read_upper(cpu, selector)? else { return Err(Fault::gp(gate_error)) };
        if upper >> 32 & 0x1f00 != 0 {
            return Err(Fault::gp(gate_error));
        }
        offset |= upper << 32;
    } else if g.kind() == kind::CALL_GATE16 {
        offset &= 0xffff;
    }
    let target = g.gate_selector();
    if null(target) {
        return Err(Fault::gp(0));
    }
    let error = code_of(target);
    let Some(d) = seg::read(cpu, target)? else { return Err(Fault::gp(error)) };
    if !d.is_code() || d.dpl() > cpl || !call && !d.conforming() && d.dpl() != cpl {
        return Err(Fault::gp(error));
    }
    if long && (!d.long() || d.big()) {
        return Err(Fault::gp(error));
    }
    if !d.present() {
        return Err(Fault::np(error));
    }
    let size = if long {
        8
    } else if g.kind() == kind::CALL_GATE {
        4
    } else {
        2
    };
    let rip = check_target(cpu, offset, &d, long, 0)?;
    let inner = call && !d.conforming() && d.dpl() < cpl;
    let new_cpl = if inner { d.dpl() } else { cpl };
    let return_rip = next_rip(cpu, insn);
    let old_cs = u64::from(cpu.state.seg[Seg::Cs as usize].selector);
    let old_ss = u64::from(cpu.state.seg[Seg::Ss as usize].selector);
    let old_sp = cpu.state.gpr[gpr::RSP];
    if inner && long {
        let rsp = super::event::tss_pointer(cpu, 4 + 8 * u64::from(new_cpl), 0)?;
        if !canonical(cpu, rsp) {
            return Err(Fault::ss(0));
        }
        let mut stack = NewStack::flat(rsp, new_cpl);
        for value in [old_ss, old_sp, old_cs, return_rip] {
            stack.push(cpu, 8, value, 0)?;
        }
        seg::mark_accessed(cpu, &d)?;
        cpu.state.gpr[gpr::RSP] = stack.pointer();
        cpu.state.seg[Seg::Ss as usize] = seg::null_stack(u16::from(new_cpl));
    } else if inner {
        let count = g.high & 0x1f;
        let (ss_selector, esp) = tss_stack(cpu, new_cpl, 0)?;
        let ss = seg::check_stack(cpu, ss_selector, new_cpl, Fault::ts, 0)?;
        let ss_error = code_of(ss_selector);
        let mut stack = NewStack::on(ss, u64::from(esp), new_cpl);
        stack.room(u64::from(size) * (4 + u64::from(count)), ss_error)?;
        // Parameters are read with the caller's rights.
        let mask = super::stack_mask(cpu);
        let mut parameters = [0u64; 31];
        for (i, p) in parameters.iter_mut().enumerate().take(count as usize) {
            let at = old_sp.wrapping_add(u64::from(size) * i as u64) & mask;
            *p = if size == 4 {
                u64::from(cpu.load::<u32>(Seg::Ss, at)?)
            } else {
                u64::from(cpu.load::<u16>(Seg::Ss, at)?)
            };
        }
        stack.push(cpu, size, old_ss, ss_error)?;
        stack.push(cpu, size, old_sp, ss_error)?;
        for p in parameters.iter().take(count as usize).rev() {
            stack.push(cpu, size, *p, ss_error)?;
        }
        stack.push(cpu, size, old_cs, ss_error)?;
        stack.push(cpu, size, return_rip, ss_error)?;
        seg::mark_accessed(cpu, &d)?;
        stack.commit(cpu);
    } else {
        if call {
            let mut stack = NewStack::current(cpu);
            stack.push(cpu, size, old_cs, 0)?;
            stack.push(cpu, size, return_rip, 0)?;
            stack.commit_pointer(cpu);
        }
        seg::mark_accessed(cpu, &d)?;
    }
    cpu.state.seg[Seg::Cs as usize] = d.segment(target & !3 | u16::from(new_cpl));
    cpu.mode_changed();
    jump(cpu, rip);
    Ok(())
}

/// Far RET, with or without an immediate (SDM vol. 2, RET).
pub(crate) fn ret(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let size = operand_size(insn);
    let release = super::ret_immediate(insn);
    let mut pops = super::event::Pops::new(cpu, size);
    let offset = pops.pop(cpu)?;
    let selector = pops.pop(cpu)? as u16;
    if !cpu.protected() || cpu.v86() {
        let cs = cpu.state.seg[Seg::Cs as usize];
        if offset > u64::from(cs.limit) {
            return Err(Fault::gp(0));
        }
        pops.skip(release);
        pops.commit(cpu);
        let new = if cpu.v86() { seg::v86_segment(selector) } else { real_code(&cs, selector) };
        cpu.state.seg[Seg::Cs as usize] = new;
        cpu.mode_changed();
        jump(cpu, offset);
        return Ok(());
    }
    if null(selector) {
        return Err(Fault::gp(0));
    }
    let error = code_of(selector);
    let Some(d) = seg::read(cpu, selector)? else { return Err(Fault::gp(error)) };
    let (cpl, rpl) = (cpu.cpl(), (selector & 3) as u8);
    if !d.is_code() || rpl < cpl {
        return Err(Fault::gp(error));
    }
    if d.conforming() && d.dpl() > rpl || !d.conforming() && d.dpl() != rpl {
        return Err(Fault::gp(error));
    }
    if !d.present() {
        return Err(Fault::np(error));
    }
    let to_64 = long_mode(cpu) && d.long();
    if to_64 && d.big() {
        return Err(Fault::gp(error));
    }
    pops.skip(release);
    if rpl == cpl {
        let rip = check_target(cpu, offset, &d, to_64, 0)?;
        seg::mark_accessed(cpu, &d)?;
        pops.commit(cpu);
        cpu.state.seg[Seg::Cs as usize] = d.segment(selector);
        cpu.mode_changed();
        jump(cpu, rip);
        return Ok(());
    }
    let new_rsp = pops.pop(cpu)?;
    let ss_selector = pops.pop(cpu)? as u16;
    let ss = if null(ss_selector) && to_64 && rpl != 3 && (ss_selector & 3) as u8 == rpl {
        seg::null_stack(ss_selector)
    } else {
        seg::check_stack(cpu, ss_selector, rpl, Fault::gp, 0)?
    };
    let rip = check_target(cpu, offset, &d, to_64, 0)?;
    seg::mark_accessed(cpu, &d)?;
    let mask = super::stack_mask_of(&ss, to_64);
    cpu.state.seg[Seg::Ss as usize] = ss;
    cpu.state.seg[Seg::Cs as usize] = d.segment(selector);
    let write = if size == 2 { mask & 0xffff } else { mask };
    super::set_stack_pointer(cpu, new_rsp, write);
    let sp = cpu.state.gpr[gpr::RSP].wrapping_add(u64::from(release));
    super::set_stack_pointer(cpu, sp, mask);
    seg::drop_privileged(cpu, rpl);
    cpu.mode_changed();
    jump(cpu, rip);
    Ok(())
}

/// A flat segment as SYSCALL and its kin load it without reading a descriptor.
fn flat(selector: u16, attr: u16) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, attr, selector, unusable: false }
}

/// Attributes of flat segments, for privilege level 0; or in 0x60 for level 3.
const CODE64: u16 = 0xa09b;
const CODE32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const USER: u16 = 0x60;

fn load_flat(cpu: &mut Cpu, cs: u16, code: u16, ss: u16, level: u16) {
    cpu.state.seg[Seg::Cs as usize] = flat(cs, code | level);
    cpu.state.seg[Seg::Ss as usize] = flat(ss, DATA | level);
    cpu.mode_changed();
}

/// The segments that SYSCALL loads in long mode.
pub(crate) fn enter_system(cpu: &mut Cpu) {
    let cs = (cpu.state.msr.star >> 32) as u16 & 0xfffc;
    load_flat(cpu, cs, CODE64, cs.wrapping_add(8), 0);
}

/// The segments that SYSRET to 64-bit mode loads.
pub(crate) fn leave_system(cpu: &mut Cpu) {
    let base = (cpu.state.msr.star >> 48) as u16;
    load_flat(cpu, base.wrapping_add(16) | 3, CODE64, base.wrapping_add(8) | 3, USER);
}

/// SYSCALL (SDM vol. 2; APM vol. 3: outside 64-bit mode on AMD only).
pub(crate) fn syscall(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let amd = cpu.model.is_amd();
    if cpu.state.efer & efer::SCE == 0 || !cpu.protected() || !amd && !cpu.in_64bit() {
        return Err(Fault::ud());
    }
    let rip = next_rip(cpu, insn);
    let star = cpu.state.msr.star;
    let cs = (star >> 32) as u16 & 0xfffc;
    if long_mode(cpu) {
        let target = if cpu.in_64bit() { cpu.state.msr.lstar } else { cpu.state.msr.cstar };
        cpu.state.gpr[gpr::RCX] = rip;
        cpu.state.gpr[11] = cpu.state.rflags & !flag::RF;
        let clear = cpu.state.msr.sfmask | flag::RF | flag::VM;
        cpu.state.rflags = cpu.state.rflags & !clear | flag::ONE;
        if clear & flag::TF != 0 {
            super::debug::skip_step(cpu);
        }
        enter_system(cpu);
        jump(cpu, target);
    } else {
        cpu.state.gpr[gpr::RCX] = rip & 0xffff_ffff;
        cpu.state.rflags &= !(flag::IF | flag::RF | flag::VM);
        load_flat(cpu, cs, CODE32, cs.wrapping_add(8), 0);
        jump(cpu, star & 0xffff_ffff);
    }
    Ok(())
}

/// SYSRET. SS gets full attributes as on Intel (AMD leaves base, limit and attributes alone, APM vol. 3; a superset of
/// what software may rely on).
pub(crate) fn sysret(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let amd = cpu.model.is_amd();
    if cpu.state.efer & efer::SCE == 0 || !cpu.protected() || !amd && !cpu.in_64bit() {
        return Err(Fault::ud());
    }
    if cpu.cpl() != 0 {
        return Err(Fault::gp(0));
    }
    let base = (cpu.state.msr.star >> 48) as u16;
    let ss = base.wrapping_add(8) | 3;
    let long = long_mode(cpu);
    let wide = cpu.in_64bit() && operand_size(insn) == 8;
    let rip = if wide { cpu.state.gpr[gpr::RCX] } else { cpu.state.gpr[gpr::RCX] & 0xffff_ffff };
    if wide && !amd && !canonical(cpu, rip) {
        return Err(Fault::gp(0));
    }
    if long {
        // RF and VM are not restored (SDM vol. 2, SYSRET: mask 0x3c7fd7).
        cpu.state.rflags = cpu.state.gpr[11] & 0x3c_7fd7 | flag::ONE;
    } else {
        cpu.state.rflags |= flag::IF;
    }
    if wide {
        leave_system(cpu);
    } else {
        load_flat(cpu, base | 3, CODE32, ss, USER);
    }
    jump(cpu, rip);
    Ok(())
}

/// SYSENTER (on AMD not in long mode, APM vol. 3).
pub(crate) fn sysenter(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if cpu.model.is_amd() && long_mode(cpu) {
        return Err(Fault::ud());
    }
    let cs = cpu.state.msr.sysenter_cs as u16 & 0xfffc;
    if !cpu.protected() || cs == 0 {
        return Err(Fault::gp(0));
    }
    cpu.state.rflags &= !(flag::VM | flag::IF | flag::RF);
    let (esp, eip) = (cpu.state.msr.sysenter_esp, cpu.state.msr.sysenter_eip);
    let long = long_mode(cpu);
    load_flat(cpu, cs, if long { CODE64 } else { CODE32 }, cs.wrapping_add(8), 0);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.state.gpr[gpr::RSP] = esp & mask;
    jump(cpu, eip & mask);
    Ok(())
}

/// SYSEXIT.
pub(crate) fn sysexit(cpu: &mut Cpu, insn: &Insn) -> Exec {
    if cpu.model.is_amd() && long_mode(cpu) {
        return Err(Fault::ud());
    }
    let cs = cpu.state.msr.sysenter_cs as u16 & 0xfffc;
    if !cpu.protected() || cs == 0 || cpu.cpl() != 0 {
        return Err(Fault::gp(0));
    }
    let (rsp, rip) = (cpu.state.gpr[gpr::RCX], cpu.state.gpr[gpr::RDX]);
    if operand_size(insn) == 8 {
        if !canonical(cpu, rsp) || !canonical(cpu, rip) {
            return Err(Fault::gp(0));
        }
        load_flat(cpu, cs.wrapping_add(32) | 3, CODE64, cs.wrapping_add(40) | 3, USER);
        cpu.state.gpr[gpr::RSP] = rsp;
        jump(cpu, rip);
    } else {
        load_flat(cpu, cs.wrapping_add(16) | 3, CODE32, cs.wrapping_add(24) | 3, USER);
        cpu.state.gpr[gpr::RSP] = rsp & 0xffff_ffff;
        jump(cpu, rip & 0xffff_ffff);
    }
    Ok(())
}
