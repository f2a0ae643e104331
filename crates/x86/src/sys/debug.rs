//! Debug registers, single step, MOV DRn.
//!
//! Source: SDM vol. 3B chapter 17 (debug, branch profile). The run loop calls these only when [`armed`] is true, so that
//! they cost nothing otherwise.

use super::{privileged, read_gpr, write_gpr};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{Shadow, cr4, flag};
use iced_x86::Code;

/// DR6.BD: access to a debug register while DR7.GD was set.
pub(crate) const DR6_BD: u64 = 1 << 13;
/// DR6.BS: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;
/// DR6.BT: task switch to a TSS with the T bit.
pub(crate) const DR6_BT: u64 = 1 << 15;
/// Bits of DR6 that read as one.
const DR6_ONES: u64 = 0xffff_0ff0;
/// Bits of DR6 that can be written.
const DR6_WRITABLE: u64 = 0xe00f;
/// DR7: bit 10 reads as one; bits 11, 12, 14 and 15 as zero.
const DR7_ONES: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_GD: u64 = 1 << 13;
/// IA32_DEBUGCTL.BTF: single step on branches.
const DEBUGCTL_BTF: u64 = 2;

/// What has to be remembered from one part of an instruction to its end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DebugState {
    /// Breakpoints (DR6 bits 0-3) hit by data or port accesses and not reported yet.
    hits: u64,
    /// The instruction turned single step off in a way that takes no trap (INT n, SYSCALL).
    no_step: bool,
    /// The instruction before this one was MOV SS or POP SS: no instruction breakpoint here.
    pub(crate) after_mov_ss: bool,
}

/// The breakpoint conditions of DR7's R/W fields.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    Execute,
    Write,
    Port,
    Access,
}

/// The enabled breakpoints as (number, condition, address, length).
fn enabled(cpu: &Cpu) -> impl Iterator<Item = (usize, Condition, u64, u64)> + use<> {
    let dr = cpu.state.dr;
    let dr7 = dr[7];
    let ports = cpu.state.cr4 & cr4::DE != 0;
    (0..4usize).filter_map(move |i| {
        if dr7 >> (2 * i) & 3 == 0 {
            return None;
        }
        let field = dr7 >> (16 + 4 * i) & 0xf;
        let len = [1, 2, 8, 4][(field >> 2) as usize];
        let condition = match field & 3 {
            0 => Condition::Execute,
            1 => Condition::Write,
            2 if ports => Condition::Port,
            2 => return None,
            _ => Condition::Access,
        };
        // The address is aligned to the length (SDM vol. 3B §17.2.5).
        let address = if condition == Condition::Execute { dr[i] } else { dr[i] & !(len - 1) };
        Some((i, condition, address, len))
    })
}

/// Whether instructions have to be executed one by one: TF or RF set, or a breakpoint enabled.
pub(crate) fn armed(cpu: &Cpu) -> bool {
    cpu.state.rflags & (flag::TF | flag::RF) != 0 || cpu.state.dr[7] & 0xff != 0 || cpu.debug.hits != 0
}

/// Whether data breakpoints may be enabled: accesses are looked at, and watched pages stay out of the TLB.
pub(crate) fn watching(cpu: &Cpu) -> bool {
    cpu.state.dr[7] & 0xff != 0 || cpu.stops.watching()
}

/// Before an instruction at `linear`: instruction breakpoints (#DB as a fault, unless RF). RF lasts for one instruction;
/// it is dropped here, because faults put it into the flags that they push anyway.
pub(crate) fn before_instruction(cpu: &mut Cpu, linear: u64) -> Exec {
    cpu.debug.no_step = false;
    if cpu.state.rflags & flag::RF != 0 {
        cpu.state.rflags &= !flag::RF;
        return Ok(());
    }
    if cpu.state.dr[7] & 0xff == 0 || cpu.debug.after_mov_ss {
        return Ok(());
    }
    let mut hits = 0;
    for (i, condition, address, _) in enabled(cpu) {
        if condition == Condition::Execute && address == linear {
            hits |= 1 << i;
        }
    }
    if hits == 0 {
        return Ok(());
    }
    cpu.state.dr[6] = cpu.state.dr[6] & !0xf | hits;
    Err(Fault::db())
}

/// After an instruction that completed: single-step and data breakpoint traps. `single` is TF as it was before the
/// instruction. After MOV SS and POP SS the traps wait for the next instruction's end.
/// `branched` says that the instruction went elsewhere than to the next one: what IA32_DEBUGCTL.BTF waits for.
pub(crate) fn after_instruction(cpu: &mut Cpu, single: bool, branched: bool) -> Exec {
    if cpu.state.shadow == Shadow::MovSs {
        return Ok(());
    }
    let btf = cpu.state.msr.debugctl & DEBUGCTL_BTF != 0;
    let step = single && !cpu.debug.no_step && (branched || !btf);
    let hits = std::mem::take(&mut cpu.debug.hits);
    cpu.debug.no_step = false;
    if !step && hits == 0 {
        return Ok(());
    }
    cpu.state.dr[6] = cpu.state.dr[6] & !0xf | hits;
    if step {
        cpu.state.dr[6] |= DR6_BS;
    }
    Err(Fault::db())
}

/// The instruction under way takes no single-step trap: INT n and SYSCALL, which clear TF for their target.
pub(crate) fn skip_step(cpu: &mut Cpu) {
    cpu.debug.no_step = true;
}

/// Whether the page at linear address `page` holds an enabled data breakpoint: such pages never enter the TLB.
pub(crate) fn page_watched(cpu: &Cpu, page: u64) -> bool {
    let own = cpu.state.dr[7] & 0xff != 0
        && enabled(cpu).any(|(_, condition, address, _)| {
            matches!(condition, Condition::Write | Condition::Access) && address >> 12 == page >> 12
        });
    own || cpu.stops.page_watched(page)
}

/// A data access to a watched page: notes what matches, for [`after_instruction`].
pub(crate) fn data_access(cpu: &mut Cpu, linear: u64, len: u64, write: bool) {
    if cpu.stops.watching() {
        cpu.note_watched(linear, len, write);
    }
    for (i, condition, address, size) in enabled(cpu) {
        let kind = condition == Condition::Access || condition == Condition::Write && write;
        if kind && linear < address.saturating_add(size) && address < linear.saturating_add(len) {
            cpu.debug.hits |= 1 << i;
        }
    }
}

/// An access to ports: notes I/O breakpoints (CR4.DE) that match.
pub(crate) fn port_access(cpu: &mut Cpu, port: u16, size: u8) {
    if cpu.state.dr[7] & 0xff == 0 {
        return;
    }
    let (port, size) = (u64::from(port), u64::from(size));
    for (i, condition, address, len) in enabled(cpu) {
        if condition == Condition::Port && port < address + len && address < port + size {
            cpu.debug.hits |= 1 << i;
        }
    }
}

/// A debug exception is about to be delivered: DR7.GD and DEBUGCTL.BTF are cleared (SDM vol. 3B §17.2.4, §17.4.1).
pub(crate) fn before_delivery(cpu: &mut Cpu) {
    cpu.state.dr[7] &= !DR7_GD;
    cpu.state.msr.debugctl &= !DEBUGCTL_BTF;
}

/// DR0-3 or DR7 changed: pages that hold data breakpoints must leave the TLB, others may enter.
pub(crate) fn rearm(cpu: &mut Cpu) {
    cpu.flush_tlb(true);
    cpu.mode_changed();
}

/// Forgets what waits to be reported (INIT).
pub(crate) fn reset(cpu: &mut Cpu) {
    cpu.debug = DebugState::default();
}

/// Checks common to both directions and gives the register meant: DR4 and DR5 are DR6 and DR7 unless CR4.DE.
fn access(cpu: &mut Cpu, number: u8) -> Exec<usize> {
    let number = match number {
        4 | 5 if cpu.state.cr4 & cr4::DE != 0 => return Err(Fault::ud()),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return Err(Fault::ud()),
    };
    privileged(cpu)?;
    if cpu.state.dr[7] & DR7_GD != 0 {
        cpu.state.dr[6] |= DR6_BD;
        return Err(Fault::db());
    }
    Ok(usize::from(number))
}

/// MOV r, DRn.
pub(crate) fn mov_from_dr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let number = access(cpu, insn.r1)?;
    let size = if insn.code == Code::Mov_r64_dr { 8 } else { 4 };
    let value = cpu.state.dr[number];
    write_gpr(cpu, insn.r0, size, value);
    Ok(())
}

/// MOV DRn, r.
pub(crate) fn mov_to_dr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let number = access(cpu, insn.r0)?;
    let mut value = read_gpr(cpu, insn.r1);
    if insn.code != Code::Mov_dr_r64 {
        value &= 0xffff_ffff;
    }
    match number {
        6 | 7 if value >> 32 != 0 => return Err(Fault::gp(0)),
        6 => cpu.state.dr[6] = value & DR6_WRITABLE | DR6_ONES,
        7 => {
            let old = cpu.state.dr[7];
            cpu.state.dr[7] = value & DR7_WRITABLE | DR7_ONES;
            if (old | value) & 0xff != 0 {
                rearm(cpu);
            }
        }
        n => {
            cpu.state.dr[n] = value;
            if cpu.state.dr[7] & 0xff != 0 {
                rearm(cpu);
            }
        }
    }
    Ok(())
}
