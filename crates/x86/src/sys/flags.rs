//! Instructions on the system flags: CLI, STI, CLAC, STAC, PUSHF, POPF, with VME and PVI.
//!
//! Sources: SDM vol. 2 (the instructions' pages), vol. 3A §20.3 and §20.4.

use super::event::Pops;
use super::stack::NewStack;
use super::{iopl, operand_size};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{Shadow, cr4, flag};

/// Which flag CLI and STI change at this privilege.
enum Interrupts {
    Real,
    Virtual,
}

fn interrupts(cpu: &Cpu) -> Exec<Interrupts> {
    let cpl = cpu.cpl();
    if !cpu.protected() || cpl <= iopl(cpu) {
        return Ok(Interrupts::Real);
    }
    let bit = if cpu.v86() { cr4::VME } else { cr4::PVI };
    if cpl == 3 && cpu.state.cr4 & bit != 0 { Ok(Interrupts::Virtual) } else { Err(Fault::gp(0)) }
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    match interrupts(cpu)? {
        Interrupts::Real => cpu.state.rflags &= !flag::IF,
        Interrupts::Virtual => cpu.state.rflags &= !flag::VIF,
    }
    Ok(())
}

/// STI: when it opens interrupts, one more instruction runs before the first is taken.
pub(crate) fn sti(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    match interrupts(cpu)? {
        Interrupts::Real => {
            if cpu.state.rflags & flag::IF == 0 {
                cpu.state.rflags |= flag::IF;
                cpu.state.shadow = Shadow::Sti;
            }
        }
        Interrupts::Virtual => {
            if cpu.state.rflags & flag::VIP != 0 {
                return Err(Fault::gp(0));
            }
            cpu.state.rflags |= flag::VIF;
        }
    }
    Ok(())
}

/// CLAC.
pub(crate) fn clac(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    access_control(cpu, false)
}

/// STAC.
pub(crate) fn stac(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    access_control(cpu, true)
}

fn access_control(cpu: &mut Cpu, on: bool) -> Exec {
    if cpu.cpl() != 0 {
        return Err(Fault::ud());
    }
    if on {
        cpu.state.rflags |= flag::AC
    } else {
        cpu.state.rflags &= !flag::AC
    }
    cpu.access_changed();
    Ok(())
}

/// PUSHF, PUSHFD, PUSHFQ.
pub(crate) fn pushf(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let size = operand_size(insn);
    let mut image = (cpu.state.rflags | flag::ONE) & !(flag::VM | flag::RF);
    if cpu.v86() && iopl(cpu) < 3 {
        if cpu.state.cr4 & cr4::VME == 0 || size != 2 {
            return Err(Fault::gp(0));
        }
        image = image & !flag::IF | flag::IOPL;
        if cpu.state.rflags & flag::VIF != 0 {
            image |= flag::IF;
        }
    }
    let mut stack = NewStack::current(cpu);
    stack.push(cpu, size, image, 0)?;
    stack.commit_pointer(cpu);
    Ok(())
}

/// POPF, POPFD, POPFQ.
pub(crate) fn popf(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let size = operand_size(insn);
    let iopl = iopl(cpu);
    let v86_low = cpu.v86() && iopl < 3;
    if v86_low && (cpu.state.cr4 & cr4::VME == 0 || size != 2) {
        return Err(Fault::gp(0));
    }
    let mut pops = Pops::new(cpu, size);
    let mut image = pops.pop(cpu)?;
    let mut mask = flag::ARITH | flag::TF | flag::DF | flag::NT;
    if size > 2 {
        mask |= flag::AC | flag::ID;
        image &= !flag::RF;
        mask |= flag::RF;
    }
    if v86_low {
        let opens = image & flag::IF != 0;
        if image & flag::TF != 0 || opens && cpu.state.rflags & flag::VIP != 0 {
            return Err(Fault::gp(0));
        }
        mask |= flag::VIF;
        image = if opens { image | flag::VIF } else { image & !flag::VIF };
    } else {
        let cpl = if cpu.protected() { cpu.cpl() } else { 0 };
        if cpl <= iopl {
            mask |= flag::IF;
        }
        if cpl == 0 {
            mask |= flag::IOPL;
        }
    }
    pops.commit(cpu);
    cpu.state.rflags = cpu.state.rflags & !mask | image & mask | flag::ONE;
    cpu.mode_changed();
    Ok(())
}

/// Hints, and instructions of features that are off: nothing.
pub(crate) fn nop(_cpu: &mut Cpu, _insn: &Insn) -> Exec {
    Ok(())
}
