//! What generated code calls: TLB refills, and the interpreter for one instruction.

use super::context::{Context, exit};
use super::stubs::{self, Helper};
use super::{Jit, ModeKey, Site, from_context, quick, to_context};
use crate::cpu::Cpu;
use crate::decode::{Insn, insn_flag};
use crate::fault::Fault;
use crate::native::mem::PAGE;

/// In the order that the stubs want.
pub(super) const TABLE: [Helper; 5] = [miss_read, miss_write, interpret, load_x87, miss_span];

/// The processor and the translator behind a context.
///
/// # Safety
/// Called from generated code that was entered by [`Jit::enter`], which set the pointers and doesn't use what they point to until generated code
/// comes back.
unsafe fn parts<'a>(c: *mut Context) -> (&'a mut Context, &'a mut Cpu, &'a mut Jit) {
    // SAFETY: the caller's promise.
    unsafe { (&mut *c, &mut *(*c).cpu, &mut *(*c).jit) }
}

unsafe extern "sysv64" fn miss_read(c: *mut Context, site: u32, address: u64) -> u64 {
    // SAFETY: called by generated code.
    let (c, cpu, jit) = unsafe { parts(c) };
    miss(c, cpu, jit, site, address, false)
}

unsafe extern "sysv64" fn miss_write(c: *mut Context, site: u32, address: u64) -> u64 {
    // SAFETY: called by generated code.
    let (c, cpu, jit) = unsafe { parts(c) };
    miss(c, cpu, jit, site, address, true)
}

unsafe extern "sysv64" fn interpret(c: *mut Context, site: u32, _address: u64) -> u64 {
    // SAFETY: called by generated code.
    let (c, cpu, jit) = unsafe { parts(c) };
    execute(c, cpu, jit, site)
}

unsafe extern "sysv64" fn load_x87(c: *mut Context, site: u32, address: u64) -> u64 {
    // SAFETY: called by generated code.
    let (c, cpu, jit) = unsafe { parts(c) };
    if cpu.x87_live || crate::native::enter_x87(cpu) {
        return address;
    }
    // Exceptions are unmasked: the whole unit is interpreted.
    let Some(site) = jit.sites.get(site as usize).copied() else { return leave(c, exit::DONE) };
    at_site(c, cpu, jit, &site);
    c.argument = site.before.into();
    leave(c, exit::CAREFUL)
}

unsafe extern "sysv64" fn miss_span(c: *mut Context, site: u32, address: u64) -> u64 {
    // SAFETY: called by generated code.
    let (c, cpu, jit) = unsafe { parts(c) };
    let Some(s) = jit.sites.get(site as usize).copied() else { return leave(c, exit::DONE) };
    if cpu.refill(address, s.size.into(), s.write) {
        jit.stats.refills += 1;
        return jit.arena.exec(s.retry as usize);
    }
    if let Some(copy) = bounce(c, cpu, &s, address) {
        c.tmp = copy.wrapping_sub(address);
        c.address = jit.arena.exec(s.bounce as usize);
        return jit.stubs.resume_bounce;
    }
    jit.stats.careful += 1;
    at_site(c, cpu, jit, &s);
    // The instruction and what comes after it count once more.
    c.left += i64::from(s.before);
    match jit.careful_unit(&s, cpu.state.icount) {
        Some(unit) => {
            to_context(cpu, c);
            jit.arena.exec(unit.saved as usize)
        }
        None => leave(c, exit::SPAN),
    }
}

fn miss(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit, site: u32, address: u64, write: bool) -> u64 {
    let Some(s) = jit.sites.get(site as usize) else { return leave(c, exit::DONE) };
    if cpu.refill(address, s.size.into(), write) {
        jit.stats.refills += 1;
        // Units that need them look for the vector registers when they are entered.
        c.vec_was &= u32::from(s.vectors);
        return jit.arena.exec(s.retry as usize);
    }
    if !write && let Some(copy) = bounce(c, cpu, s, address) {
        c.tmp = copy;
        c.address = jit.arena.exec(s.bounce as usize);
        return jit.stubs.resume_bounce;
    }
    jit.stats.slow_accesses += 1;
    execute(c, cpu, jit, site)
}

/// Copies what is to be read from two pages of the TLB to one place; gives its address.
fn bounce(c: &mut Context, cpu: &mut Cpu, site: &Site, address: u64) -> Option<u64> {
    let (size, here) = (u64::from(site.size), PAGE - (address & (PAGE - 1)));
    if site.bounce == 0 || here >= size || !cpu.in_64bit() {
        return None;
    }
    let next = address.wrapping_add(here);
    for _ in 0..2 {
        let mut copy = [0; size_of::<[u64; 40]>()];
        let (low, high) = copy.get_mut(..size as usize)?.split_at_mut_checked(here as usize)?;
        let read = &cpu.mmu.window.read;
        if read.read_bytes(address, low) && read.read_bytes(next, high) {
            for (to, from) in c.bounce.iter_mut().zip(copy.chunks_exact(8)) {
                *to = from.try_into().map_or(0, u64::from_le_bytes);
            }
            return Some((&raw const c.bounce) as u64);
        }
        // The pages might only be missing in the TLB.
        let first = cpu.refill(address, here, false);
        if !(cpu.refill(next, 1, false) || first) {
            return None;
        }
    }
    None
}

pub(super) fn leave(c: &mut Context, reason: u64) -> u64 {
    c.exit = reason;
    0
}

fn decoded(jit: &mut Jit, cpu: &mut Cpu, number: u32, site: &Site) -> Insn {
    let slot = number as usize & (jit.decoded.len() - 1);
    if let Some(Some((n, insn))) = jit.decoded.get(slot)
        && *n == number
    {
        return *insn;
    }
    let insn = jit.decode_site(cpu, site);
    if let Some(place) = jit.decoded.get_mut(slot) {
        *place = Some((number, insn));
    }
    insn
}

/// Brings the state up to date, as it is before the instruction of a site.
fn at_site(c: &mut Context, cpu: &mut Cpu, jit: &Jit, site: &Site) {
    from_context(cpu, c, jit);
    cpu.state.rip = site.rip;
    cpu.state.icount = jit.slice_end.wrapping_sub((c.left + i64::from(site.before)) as u64);
    if let Some(producer) = jit.recipes.get(site.recipe as usize) {
        cook(cpu, producer);
    }
}

/// Interprets the instruction of a site; gives where generated code goes on, 0 when it doesn't.
fn execute(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit, number: u32) -> u64 {
    let Some(site) = jit.sites.get(number as usize).copied() else { return leave(c, exit::DONE) };
    let insn = decoded(jit, cpu, number, &site);
    if site.interpreted
        && let Some(count) = jit.stats.interpreted.get_mut(insn.code as usize)
    {
        *count += 1;
    }
    if let Some(at) = quick::execute(c, cpu, jit, &site, &insn) {
        return at;
    }
    at_site(c, cpu, jit, &site);
    let mask = if jit.mode.bits() == 64 { u64::MAX } else { 0xffff_ffff };
    let next = site.rip.wrapping_add(u64::from(site.len)) & mask;
    cpu.next_rip = next;
    cpu.stop_at = u32::MAX;
    cpu.index = 0;
    let done = (insn.handler)(cpu, &insn);
    // Generated code takes MXCSR from the state; it leaves the x87 registers alone.
    cpu.settle_mxcsr();
    if let Err(fault) = done {
        return faulted(c, cpu, jit, fault);
    }
    cpu.state.icount += 1;
    cpu.state.rip = cpu.next_rip;
    let plain = !insn.has(insn_flag::END) || insn.has(insn_flag::PLAIN);
    if !plain {
        cpu.look_around();
    }
    if (!plain || cpu.stop_at == 0) && !jit.calm(cpu) {
        return leave(c, exit::DONE);
    }
    // Groups of operands rely on the TLB as it was.
    if site.last
        || site.fragile
        || cpu.next_rip != next
        || ModeKey::of(cpu, jit.width) != Some(jit.mode)
        || cpu.mmu.window.code.base() != jit.base
        || cpu.mmu.window.code.page(next) != site.page
        || site.x87 && !cpu.x87_live && !crate::native::enter_x87(cpu)
    {
        return go_on(c, cpu, jit);
    }
    to_context(cpu, c);
    c.vec_was &= u32::from(site.vectors);
    let at = jit.arena.exec(site.next as usize);
    if site.flags_live {
        c.address = at;
        return jit.stubs.resume_flags;
    }
    at
}

/// Finds the flags again that an instruction has set, by executing it once more: its registers are as it left them.
fn cook(cpu: &mut Cpu, producer: &Insn) {
    use iced_x86::Mnemonic as M;
    let saved = cpu.state.gpr;
    let register = usize::from(producer.r0) & 15;
    let iced = producer.iced(64, 0);
    // CMP and TEST change nothing, AND and OR give the same again; of the others the first operand is put back.
    let other = match iced.op_kind(1) {
        iced_x86::OpKind::Register => cpu.state.gpr.get(usize::from(producer.r1) & 15).copied().unwrap_or(0),
        _ => producer.imm,
    };
    let result = saved.get(register).copied().unwrap_or(0);
    let before = match producer.code.mnemonic() {
        M::Add => result.wrapping_sub(other),
        M::Sub if iced.op_kind(1) == iced_x86::OpKind::Register && producer.r0 == producer.r1 => result,
        M::Sub => result.wrapping_add(other),
        M::Xor if iced.op_kind(1) == iced_x86::OpKind::Register && producer.r0 == producer.r1 => result,
        M::Xor => result ^ other,
        _ => result,
    };
    if let Some(r) = cpu.state.gpr.get_mut(register) {
        *r = if producer.size == 4 { before & 0xffff_ffff } else { before };
    }
    // Register operands only: it can't fail.
    let _ = (producer.handler)(cpu, producer);
    cpu.state.gpr = saved;
}

/// The interpreted instruction met a fault: delivers it and goes on at its handler, if nothing else has to be seen to.
fn faulted(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit, fault: Fault) -> u64 {
    if !matches!(fault, Fault::Exception { .. }) || jit.last_fault == cpu.state.icount {
        // Faults one after the other without an instruction between them are for the run loop to count.
        jit.fault = Some(fault);
        return leave(c, exit::FAULT);
    }
    jit.last_fault = cpu.state.icount;
    let mut faults = 0;
    if let Err(exit) = cpu.deliver(fault, &mut faults) {
        jit.fault = Some(Fault::Stop(exit));
        return leave(c, exit::FAULT);
    }
    if !jit.calm(cpu) {
        return leave(c, exit::DONE);
    }
    go_on(c, cpu, jit)
}

/// Goes on at the present instruction, when there is a unit for it; else leaves. All requests have been looked at.
fn go_on(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit) -> u64 {
    let Some(at) = way(c, cpu, jit) else { return leave(c, exit::DONE) };
    to_context(cpu, c);
    at
}

/// Where generated code goes on at the present instruction, with the window in force, if there is a unit. All but the registers in the context is
/// ready for it then.
pub(super) fn way(c: &mut Context, cpu: &mut Cpu, jit: &mut Jit) -> Option<u64> {
    let mode = ModeKey::of(cpu, jit.width)?;
    jit.mode = mode;
    let linear = cpu.state.rip;
    let slot = stubs::target_slot(linear);
    let code = &mut cpu.mmu.window.code;
    let known = if code.mode == mode.0 { code.target(slot, linear) } else { None };
    let at = match known {
        Some(host) => host,
        None => {
            let unit = jit.existing_unit(cpu)?;
            let host = jit.arena.exec(unit.guarded as usize);
            cpu.mmu.window.code.set_target(slot, linear, host);
            host
        }
    };
    c.left = jit.slice_end.wrapping_sub(cpu.state.icount) as i64;
    let base = cpu.mmu.window.code.base();
    if base != jit.base {
        jit.base = base;
        // SAFETY: generated code, which runs next, expects the window in force.
        unsafe { super::gs::set(base) };
    }
    // Units that need the vector registers look for them when they are entered.
    c.vec_was = 0;
    Some(at)
}
