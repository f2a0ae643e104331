//! Port input and output: IN, OUT, INS, OUTS, with privilege from IOPL and the TSS's permission bitmap.
//!
//! Sources: SDM vol. 1 chapter 19 (input/output), vol. 2 (the instructions' pages).

use super::{debug, iopl};
use crate::cpu::Cpu;
use crate::decode::{Insn, insn_flag};
use crate::env::Signals;
use crate::fault::{Exec, Fault};
use crate::state::{Seg, flag, gpr};
use hyaline_space::{ExitKind, Origin};
use iced_x86::Code;

/// Checks that `size` bytes at `port` may be accessed at the present privilege (SDM vol. 1 §19.5).
fn permitted(cpu: &mut Cpu, port: u16, size: u8) -> Exec {
    if !cpu.protected() || !cpu.v86() && cpu.cpl() <= iopl(cpu) {
        return Ok(());
    }
    let tr = cpu.state.tr;
    let limit = u64::from(tr.limit);
    // Only 32-bit and 64-bit task state segments have a bitmap.
    if tr.unusable || tr.kind() & 8 == 0 || limit < 0x67 {
        return Err(Fault::gp(0));
    }
    let map: u16 = cpu.sys_load(tr.base.wrapping_add(0x66))?;
    let at = u64::from(map) + u64::from(port >> 3);
    // Two bytes are always read: the map ends with a byte of ones.
    if at + 1 > limit {
        return Err(Fault::gp(0));
    }
    let bits: u16 = cpu.sys_load(tr.base.wrapping_add(at))?;
    let mask = ((1u16 << size) - 1) << (port & 7);
    if bits & mask == 0 { Ok(()) } else { Err(Fault::gp(0)) }
}

/// Who makes the access: elements of a string instruction are numbered from 0.
fn origin(cpu: &mut Cpu, exit: ExitKind, element: u32) -> Origin {
    Origin { count: element, ..cpu.origin(exit) }
}

fn read_port(cpu: &mut Cpu, port: u16, size: u8, element: u32) -> u64 {
    let who = origin(cpu, ExitKind::PioIn, element);
    let (value, _) = cpu.env.ports().load(u64::from(port), size, &who);
    debug::port_access(cpu, port, size);
    value
}

fn write_port(cpu: &mut Cpu, port: u16, size: u8, value: u64, element: u32) {
    let who = origin(cpu, ExitKind::PioOut, element);
    cpu.env.ports().store(u64::from(port), size, value, &who);
    debug::port_access(cpu, port, size);
}

/// Port and size of an IN or OUT.
fn operands(cpu: &Cpu, insn: &Insn) -> (u16, u8) {
    let dx = cpu.state.gpr[gpr::RDX] as u16;
    let immediate = u16::from(insn.imm as u8);
    match insn.code {
        Code::In_AL_imm8 | Code::Out_imm8_AL => (immediate, 1),
        Code::In_AX_imm8 | Code::Out_imm8_AX => (immediate, 2),
        Code::In_EAX_imm8 | Code::Out_imm8_EAX => (immediate, 4),
        Code::In_AL_DX | Code::Out_DX_AL => (dx, 1),
        Code::In_AX_DX | Code::Out_DX_AX => (dx, 2),
        _ => (dx, 4),
    }
}

/// IN.
pub(crate) fn inp(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let (port, size) = operands(cpu, insn);
    permitted(cpu, port, size)?;
    let value = read_port(cpu, port, size, 0);
    super::write_gpr(cpu, gpr::RAX as u8, size, value);
    Ok(())
}

/// OUT.
pub(crate) fn out(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let (port, size) = operands(cpu, insn);
    permitted(cpu, port, size)?;
    let value = cpu.state.gpr[gpr::RAX] & (u64::MAX >> (64 - 8 * u32::from(size)));
    write_port(cpu, port, size, value, 0);
    Ok(())
}

/// Elements of a repeated INS or OUTS that are done before the run loop gets a look, so that a count of 2^64 can't
/// hold the processor.
const BURST: u32 = 4096;

fn string_size(insn: &Insn) -> u8 {
    match insn.code {
        Code::Insb_m8_DX | Code::Outsb_DX_m8 => 1,
        Code::Insw_m16_DX | Code::Outsw_DX_m16 => 2,
        _ => 4,
    }
}

fn address_mask(insn: &Insn) -> u64 {
    match insn.asize {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Writes a register of address size: 16 bits keep the rest, 32 bits clear the upper half.
fn write_address(cpu: &mut Cpu, register: usize, insn: &Insn, value: u64) {
    super::write_gpr(cpu, register as u8, insn.asize, value);
}

/// Moves `register` by one element, in the direction of DF.
fn advance(cpu: &mut Cpu, register: usize, insn: &Insn, size: u8) {
    let old = cpu.state.gpr[register];
    let step = u64::from(size);
    let new = if cpu.state.rflags & flag::DF != 0 { old.wrapping_sub(step) } else { old.wrapping_add(step) };
    write_address(cpu, register, insn, new);
}

/// Runs `element` once, or as REP says. A fault in a later element leaves the registers at that element. The loop is
/// left early, to be resumed, when somebody wants the processor.
fn repeat(cpu: &mut Cpu, insn: &Insn, element: fn(&mut Cpu, &Insn, u32) -> Exec) -> Exec {
    if !insn.has(insn_flag::REP | insn_flag::REPNE) {
        return element(cpu, insn, 0);
    }
    let mask = address_mask(insn);
    let mut done = 0;
    loop {
        let count = cpu.state.gpr[gpr::RCX] & mask;
        if count == 0 {
            return Ok(());
        }
        element(cpu, insn, done)?;
        done += 1;
        write_address(cpu, gpr::RCX, insn, count - 1);
        if count == 1 {
            return Ok(());
        }
        let wanted = cpu.env.signals().pending() & !Signals::INTERRUPT != 0
            || cpu.env.signals().pending() & Signals::INTERRUPT != 0 && cpu.state.rflags & flag::IF != 0;
        if debug::armed(cpu) {
            // Each element traps by itself.
            cpu.next_rip = cpu.state.rip;
            return Ok(());
        }
        if wanted || done == BURST {
            return Err(Fault::Again);
        }
    }
}

/// INS.
pub(crate) fn ins(cpu: &mut Cpu, insn: &Insn) -> Exec {
    repeat(cpu, insn, |cpu, insn, element| {
        let size = string_size(insn);
        let port = cpu.state.gpr[gpr::RDX] as u16;
        permitted(cpu, port, size)?;
        let at = cpu.state.gpr[gpr::RDI] & address_mask(insn);
        // The port must not be read when the store would fault.
        cpu.probe_write(Seg::Es, at, u64::from(size))?;
        let value = read_port(cpu, port, size, element);
        match size {
            1 => cpu.store::<u8>(Seg::Es, at, value as u8)?,
            2 => cpu.store::<u16>(Seg::Es, at, value as u16)?,
            _ => cpu.store::<u32>(Seg::Es, at, value as u32)?,
        }
        advance(cpu, gpr::RDI, insn, size);
        Ok(())
    })
}

/// OUTS.
pub(crate) fn outs(cpu: &mut Cpu, insn: &Insn) -> Exec {
    repeat(cpu, insn, |cpu, insn, element| {
        let size = string_size(insn);
        let port = cpu.state.gpr[gpr::RDX] as u16;
        permitted(cpu, port, size)?;
        let at = cpu.state.gpr[gpr::RSI] & address_mask(insn);
        let value = match size {
            1 => u64::from(cpu.load::<u8>(insn.seg, at)?),
            2 => u64::from(cpu.load::<u16>(insn.seg, at)?),
            _ => u64::from(cpu.load::<u32>(insn.seg, at)?),
        };
        write_port(cpu, port, size, value, element);
        advance(cpu, gpr::RSI, insn, size);
        Ok(())
    })
}
