//! System instructions that kernels execute all the time, on generated code's registers where they are: what is not of the usual shape is left to
//! the interpreter.
//!
//! Sources: as `sys::far` and `sys::flags`, whose handlers these are short forms of.

use super::context::{Context, exit, pack_flags, unpack_flags};
use super::helpers::{leave, way};
use super::{Jit, ModeKey, Site};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::state::{efer, flag};
use iced_x86::Code;

/// Executes the instruction of a site, if it is one of these: where generated code goes on, 0 when it doesn't.
pub(super) fn execute(
    c: &mut Context,
    cpu: &mut Cpu,
    jit: &mut Jit,
    site: &Site,
    insn: &Insn,
) -> Option<u64> {
    // The flags are needed as they are: not where they would have to be found again.
    if jit.recipes.get(site.recipe as usize).is_some() {
        return None;
    }
    if !site.interpreted || insn.is_undefined() || c.fpu_note != 0 || !jit.mode.has(ModeKey::LONG) {
        return None;
    }
    match insn.code {
        Code::Stac | Code::Clac if jit.mode.has(ModeKey::KERNEL) => {
            access(c, cpu, jit, site, insn.code == Code::Stac)
        }
        Code::Rdtsc if jit.mode.has(ModeKey::KERNEL) => {
            cpu.state.icount = now(c, jit, site);
            cpu.index = 0;
            let value = crate::sys::msr::tsc(cpu);
            (c.gpr[0], c.gpr[2]) = (value & 0xffff_ffff, value >> 32);
            Some(next(c, jit, site))
        }
        Code::Syscall => syscall(c, cpu, jit, site),
        Code::Sysretq if jit.mode.has(ModeKey::KERNEL) => sysret(c, cpu, jit, site),
        _ => None,
    }
}

/// Instructions retired before the site's.
fn now(c: &Context, jit: &Jit, site: &Site) -> u64 {
    jit.slice_end.wrapping_sub((c.left + i64::from(site.before)) as u64)
}

/// Behind the site's instruction.
fn next(c: &mut Context, jit: &Jit, site: &Site) -> u64 {
    c.vec_was &= u32::from(site.vectors);
    jit.arena.exec(site.next as usize)
}

/// STAC and CLAC: another window, of which the code's page must be known.
fn access(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit, site: &Site, on: bool) -> Option<u64> {
    let before = cpu.state.rflags;
    let change = |cpu: &mut Cpu, rflags: u64| {
        cpu.state.rflags = rflags;
        cpu.access_changed();
    };
    change(cpu, if on { before | flag::AC } else { before & !flag::AC });
    let following = site.rip.wrapping_add(u64::from(site.len));
    let code = &mut cpu.mmu.window.code;
    if site.last || code.mode != jit.mode.0 || code.page(following) != site.page {
        change(cpu, before);
        return None;
    }
    let base = code.base();
    if base != jit.base {
        jit.base = base;
        // SAFETY: generated code, which runs next, expects the window in force.
        unsafe { super::gs::set(base) };
    }
    Some(next(c, jit, site))
}

/// The state is that of another place, of which the registers are still in the context.
fn arrive(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit) -> u64 {
    if jit.calm(cpu)
        && let Some(at) = way(c, cpu, jit)
    {
        c.base = cpu.state.seg.each_ref().map(|s| s.base);
        return at;
    }
    cpu.state.gpr = c.gpr;
    cpu.set_flags(unpack_flags(c.flags));
    leave(c, exit::DONE)
}

fn syscall(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit, site: &Site) -> Option<u64> {
    let clear = cpu.state.msr.sfmask | flag::RF | flag::VM;
    if cpu.state.efer & efer::SCE == 0 || clear & flag::TF != 0 && cpu.state.rflags & flag::TF != 0 {
        return None;
    }
    cpu.state.icount = now(c, jit, site) + 1;
    let rflags = cpu.state.rflags & !flag::ARITH | unpack_flags(c.flags) | flag::ONE;
    c.gpr[1] = site.rip.wrapping_add(u64::from(site.len));
    c.gpr[11] = rflags & !flag::RF;
    cpu.state.rflags = rflags & !clear | flag::ONE;
    c.flags = pack_flags(cpu.state.rflags);
    cpu.state.rip = cpu.state.msr.lstar;
    crate::sys::far::enter_system(cpu);
    Some(arrive(c, cpu, jit))
}

fn sysret(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit, site: &Site) -> Option<u64> {
    let (rip, rflags) = (c.gpr[1], c.gpr[11] & 0x3c_7fd7 | flag::ONE);
    if cpu.state.efer & efer::SCE == 0 || !cpu.canonical(rip) || rflags & (flag::TF | flag::AC) != 0 {
        return None;
    }
    cpu.state.icount = now(c, jit, site) + 1;
    cpu.state.rflags = rflags;
    c.flags = pack_flags(rflags);
    cpu.state.rip = rip;
    crate::sys::far::leave_system(cpu);
    Some(arrive(c, cpu, jit))
}
