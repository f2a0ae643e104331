//! Descriptor table registers and selector checks: LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR, LAR, LSL, VERR, VERW,
//! ARPL.
//!
//! Source: SDM vol. 2 (the instructions' pages).

use super::seg::{self, Descriptor, kind, null};
use super::{
    address_add, canonical_base, long_mode, privileged, read_gpr, read_rm16, set_zf, umip, write_gpr,
};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::Table;

/// Reads the pseudo-descriptor operand of LGDT and LIDT.
fn load_table(cpu: &mut Cpu, insn: &Insn) -> Exec<Table> {
    privileged(cpu)?;
    let (s, at) = cpu.mem_addr(insn);
    let limit: u16 = cpu.load(s, at)?;
    let at = address_add(insn, at, 2);
    let base = if cpu.in_64bit() {
        let base: u64 = cpu.load(s, at)?;
        if !canonical_base(cpu, base) {
            return Err(Fault::gp(0));
        }
        base
    } else {
        let base: u32 = cpu.load(s, at)?;
        u64::from(if insn.osize == 2 { base & 0xff_ffff } else { base })
    };
    Ok(Table { base, limit })
}

/// LGDT.
pub(crate) fn lgdt(cpu: &mut Cpu, insn: &Insn) -> Exec {
    cpu.state.gdtr = load_table(cpu, insn)?;
    Ok(())
}

/// LIDT.
pub(crate) fn lidt(cpu: &mut Cpu, insn: &Insn) -> Exec {
    cpu.state.idtr = load_table(cpu, insn)?;
    Ok(())
}

fn store_table(cpu: &mut Cpu, insn: &Insn, table: Table) -> Exec {
    umip(cpu)?;
    let (s, at) = cpu.mem_addr(insn);
    let mut bytes = [0; 10];
    let [low, high] = table.limit.to_le_bytes();
    bytes[0] = low;
    bytes[1] = high;
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let len = if cpu.in_64bit() { 10 } else { 6 };
    cpu.store_bytes(s, at, &bytes[..len])
}

/// SGDT.
pub(crate) fn sgdt(cpu: &mut Cpu, insn: &Insn) -> Exec {
    store_table(cpu, insn, cpu.state.gdtr)
}

/// SIDT.
pub(crate) fn sidt(cpu: &mut Cpu, insn: &Insn) -> Exec {
    store_table(cpu, insn, cpu.state.idtr)
}

/// #UD in real and virtual-8086 mode.
fn protected_only(cpu: &Cpu) -> Exec {
    if cpu.protected() && !cpu.v86() { Ok(()) } else { Err(Fault::ud()) }
}

/// LLDT.
pub(crate) fn lldt(cpu: &mut Cpu, insn: &Insn) -> Exec {
    protected_only(cpu)?;
    privileged(cpu)?;
    let selector = read_rm16(cpu, insn, insn.r0)?;
    seg::load_ldtr(cpu, selector, Fault::gp)
}

/// LTR.
pub(crate) fn ltr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    protected_only(cpu)?;
    privileged(cpu)?;
    let selector = read_rm16(cpu, insn, insn.r0)?;
    seg::load_tr(cpu, selector)
}

fn store_selector(cpu: &mut Cpu, insn: &Insn, selector: u16) -> Exec {
    protected_only(cpu)?;
    umip(cpu)?;
    if insn.is_mem() {
        let (s, at) = cpu.mem_addr(insn);
        cpu.store::<u16>(s, at, selector)
    } else {
        write_gpr(cpu, insn.r0, insn.osize, u64::from(selector));
        Ok(())
    }
}

/// SLDT.
pub(crate) fn sldt(cpu: &mut Cpu, insn: &Insn) -> Exec {
    store_selector(cpu, insn, cpu.state.ldtr.selector)
}

/// STR.
pub(crate) fn str(cpu: &mut Cpu, insn: &Insn) -> Exec {
    store_selector(cpu, insn, cpu.state.tr.selector)
}

/// The descriptor of `selector` if LAR, LSL, VERR and VERW may look at it at this privilege.
fn visible(cpu: &mut Cpu, selector: u16) -> Exec<Option<Descriptor>> {
    if null(selector) {
        return Ok(None);
    }
    let Some(d) = seg::read(cpu, selector)? else { return Ok(None) };
    if d.is_code() && d.conforming() {
        return Ok(Some(d));
    }
    let rpl = (selector & 3) as u8;
    Ok((cpu.cpl() <= d.dpl() && rpl <= d.dpl()).then_some(d))
}

/// Whether the type of a system descriptor is one that LAR (with gates) or LSL (without) knows.
fn known_system(d: &Descriptor, long: bool, gates: bool) -> bool {
    match d.kind() {
        kind::LDT | kind::TSS_AVAILABLE | kind::TSS_BUSY => true,
        kind::TSS16_AVAILABLE | kind::TSS16_BUSY => !long,
        kind::CALL_GATE => gates,
        kind::CALL_GATE16 | kind::TASK_GATE => gates && !long,
        _ => false,
    }
}

/// LAR.
pub(crate) fn lar(cpu: &mut Cpu, insn: &Insn) -> Exec {
    protected_only(cpu)?;
    let selector = read_rm16(cpu, insn, insn.r1)?;
    let long = long_mode(cpu);
    let d = visible(cpu, selector)?.filter(|d| !d.is_system() || known_system(d, long, true));
    if let Some(d) = d {
        write_gpr(cpu, insn.r0, insn.osize, u64::from(d.high & 0x00f0_ff00));
    }
    set_zf(cpu, d.is_some());
    Ok(())
}

/// LSL.
pub(crate) fn lsl(cpu: &mut Cpu, insn: &Insn) -> Exec {
    protected_only(cpu)?;
    let selector = read_rm16(cpu, insn, insn.r1)?;
    let long = long_mode(cpu);
    let d = visible(cpu, selector)?.filter(|d| !d.is_system() || known_system(d, long, false));
    if let Some(d) = d {
        write_gpr(cpu, insn.r0, insn.osize, u64::from(d.limit()));
    }
    set_zf(cpu, d.is_some());
    Ok(())
}

/// VERR.
pub(crate) fn verr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    protected_only(cpu)?;
    let selector = read_rm16(cpu, insn, insn.r0)?;
    let good = visible(cpu, selector)?.is_some_and(|d| d.readable());
    set_zf(cpu, good);
    Ok(())
}

/// VERW.
pub(crate) fn verw(cpu: &mut Cpu, insn: &Insn) -> Exec {
    protected_only(cpu)?;
    let selector = read_rm16(cpu, insn, insn.r0)?;
    let good = visible(cpu, selector)?.is_some_and(|d| d.writable_data());
    set_zf(cpu, good);
    Ok(())
}

/// ARPL.
pub(crate) fn arpl(cpu: &mut Cpu, insn: &Insn) -> Exec {
    protected_only(cpu)?;
    let source = read_gpr(cpu, insn.r1) as u16 & 3;
    if insn.is_mem() {
        let (s, at) = cpu.mem_addr(insn);
        cpu.probe_write(s, at, 2)?;
        let old: u16 = cpu.load(s, at)?;
        if old & 3 < source {
            cpu.store::<u16>(s, at, old & !3 | source)?;
        }
        set_zf(cpu, old & 3 < source);
    } else {
        let old = read_gpr(cpu, insn.r0) as u16;
        if old & 3 < source {
            write_gpr(cpu, insn.r0, 2, u64::from(old & !3 | source));
        }
        set_zf(cpu, old & 3 < source);
    }
    Ok(())
}
