//! Delivery of interrupts and exceptions in all modes, double and triple faults, INT n and IRET.
//!
//! Sources: SDM vol. 3A chapters 6 (interrupts and exceptions), 20 (real and virtual-8086 mode); SDM vol. 2, INT n and
//! IRET; APM vol. 2 chapter 8.

use super::seg::{self, Descriptor, code_of, kind, null};
use super::stack::{NewStack, tss_stack};
use super::{canonical, debug, jump, long_mode, next_rip, operand_size, task};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Exit, Fault};
use crate::state::{Activity, EventKind, Injected, Seg, Segment, Shadow, cr4, flag};
use crate::tlb::View;
use iced_x86::Code;

/// Vectors (SDM vol. 3A table 6-1).
mod vector {
    pub(super) const DB: u8 = 1;
    pub(super) const BP: u8 = 3;
    pub(super) const OF: u8 = 4;
    pub(super) const DF: u8 = 8;
}

/// An event to deliver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    /// Vector.
    pub vector: u8,
    /// Kind, which decides privilege checks and the EXT bit.
    pub kind: EventKind,
    /// Error code, pushed in protected and long mode.
    pub error: Option<u32>,
    /// INT1: a software event without privilege check, whose own faults carry EXT.
    pub int1: bool,
    /// RIP to push.
    pub rip: u64,
    /// RF in the pushed flags is set (faults, except instruction breakpoints).
    pub set_rf: bool,
}

impl Event {
    /// EXT bit for faults met during this event's delivery (SDM vol. 3A §6.13).
    fn ext(&self) -> u32 {
        u32::from(self.kind != EventKind::Software || self.int1)
    }
    /// Error code that names this event's gate in the IDT.
    fn gate_error(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }
    /// True when the gate's DPL is checked against CPL.
    fn checked(&self) -> bool {
        self.kind == EventKind::Software && !self.int1
    }
}

/// Classes of SDM vol. 3A table 6-4.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    Double,
}

fn class(vector: u8) -> Class {
    match vector {
        0 | 10..=13 | 21 => Class::Contributory,
        14 | 20 => Class::PageFault,
        8 => Class::Double,
        _ => Class::Benign,
    }
}

/// True for vectors whose exception is a trap or abort: RF in the pushed flags keeps its value (SDM vol. 3A §17.3.1.1).
fn is_fault(vector: u8) -> bool {
    !matches!(vector, 1 | 2 | 3 | 4 | 8 | 18)
}

/// Delivers an exception raised by the instruction at `state.rip`, or by its end for traps, through double fault to
/// shutdown (SDM vol. 3A §6.15). On Ok, CS:RIP is the handler's first instruction.
pub(crate) fn exception(cpu: &mut Cpu, vector: u8, error: Option<u32>) -> Result<(), Exit> {
    chain(cpu, Injected { vector, kind: EventKind::Exception, error })
}

/// Delivers an external interrupt or NMI before the instruction at `state.rip`. The caller looked at IF, the shadow and
/// NMI blocking; an NMI blocks further ones until IRET (SDM vol. 3A §6.7.1).
pub(crate) fn interrupt(cpu: &mut Cpu, vector: u8, kind: EventKind) -> Result<(), Exit> {
    if kind == EventKind::Nmi {
        cpu.state.nmi_pending = false;
        cpu.state.nmi_blocked = true;
    }
    chain(cpu, Injected { vector, kind, error: None })
}

/// Delivers the event that was under way when the state was saved ([`crate::state::CpuState::injected`]).
pub(crate) fn reinject(cpu: &mut Cpu, event: Injected) -> Result<(), Exit> {
    if event.kind == EventKind::Nmi {
        cpu.state.nmi_blocked = true;
    }
    chain(cpu, event)
}

/// Delivers `first`; a fault in its delivery is combined with it or delivered instead (SDM vol. 3A table 6-5).
fn chain(cpu: &mut Cpu, first: Injected) -> Result<(), Exit> {
    cpu.state.activity = Activity::Running;
    let mut event = first;
    let mut current = if first.kind == EventKind::Exception { class(first.vector) } else { Class::Benign };
    // Each round delivers, stops, or climbs benign -> contributory or page fault -> double -> shutdown. A page fault
    // after a contributory one and #DB from a task's T bit are the only steps sideways, so the rounds are few.
    for _ in 0..8 {
        let exception = event.kind == EventKind::Exception;
        let delivery = Event {
            vector: event.vector,
            kind: event.kind,
            error: event.error,
            int1: false,
            rip: cpu.state.rip,
            set_rf: exception && is_fault(event.vector),
        };
        if exception && event.vector == vector::DB {
            debug::before_delivery(cpu);
        }
        if let Some(log) = &cpu.log {
            log.event(cpu.env.index(), &cpu.state, &event);
        }
        let fault = match deliver(cpu, &delivery) {
            Ok(rip) => {
                cpu.state.rip = rip;
                cpu.state.shadow = Shadow::None;
                return Ok(());
            }
            Err(fault) => fault,
        };
        let (vector, error) = match fault {
            Fault::Stop(exit) => return Err(exit),
            Fault::Again => return Ok(()),
            Fault::Exception { vector, error } => (vector, error.map(u32::from)),
        };
        let second = class(vector);
        let double = match current {
            Class::Double if second == Class::Benign => false,
            Class::Double => break,
            Class::Benign => false,
            Class::Contributory => second == Class::Contributory,
            Class::PageFault => second != Class::Benign,
        };
        let (vector, error) = if double { (vector::DF, Some(0)) } else { (vector, error) };
        current = if double { Class::Double } else { second };
        event = Injected { vector, kind: EventKind::Exception, error };
    }
    // Shutdown (SDM vol. 3A §6.15, interrupt 8): the state stays as it was for whoever looks at it.
    cpu.state.activity = Activity::Shutdown;
    Err(Exit::Shutdown)
}

/// Delivers `event` once: pushes the frame, loads the new segments and gives the new RIP. On a fault nothing but memory
/// below the stack pointer has changed.
pub(crate) fn deliver(cpu: &mut Cpu, event: &Event) -> Exec<u64> {
    if !cpu.protected() {
        real(cpu, event)
    } else if long_mode(cpu) {
        long(cpu, event)
    } else {
        protected(cpu, event)
    }
}

/// The flags to push.
fn flags_image(cpu: &Cpu, event: &Event) -> u64 {
    let flags = cpu.state.rflags | flag::ONE;
    if event.set_rf { flags | flag::RF } else { flags }
}

/// Real-address mode (SDM vol. 3A §20.1.4). No error code is pushed.
fn real(cpu: &mut Cpu, event: &Event) -> Exec<u64> {
    let slot = u64::from(event.vector) * 4;
    if slot + 3 > u64::from(cpu.state.idtr.limit) {
        return Err(Fault::gp(event.gate_error()));
    }
    let target: u32 = cpu.sys_load(cpu.state.idtr.base.wrapping_add(slot) & 0xffff_ffff)?;
    let flags = cpu.state.rflags;
    let ip = event.rip;
    real_frame(cpu, flags, ip, target)?;
    cpu.state.rflags &= !(flag::IF | flag::TF | flag::AC | flag::RF);
    Ok(u64::from(target & 0xffff))
}

/// Pushes FLAGS, CS, IP as words and loads CS from the upper half of `target`; used in real mode and for redirected
/// interrupts in virtual-8086 mode.
fn real_frame(cpu: &mut Cpu, flags: u64, ip: u64, target: u32) -> Exec {
    let mut stack = NewStack::current(cpu);
    stack.push(cpu, 2, flags & 0xffff, 0)?;
    stack.push(cpu, 2, u64::from(cpu.state.seg[Seg::Cs as usize].selector), 0)?;
    stack.push(cpu, 2, ip & 0xffff, 0)?;
    stack.commit_pointer(cpu);
    let selector = (target >> 16) as u16;
    let cs = &cpu.state.seg[Seg::Cs as usize];
    let new = if cpu.v86() { seg::v86_segment(selector) } else { real_code(cs, selector) };
    cpu.state.seg[Seg::Cs as usize] = new;
    cpu.mode_changed();
    Ok(())
}

/// CS after a far transfer in real mode: as data segments, but always a code segment for whoever looks at the type.
pub(crate) fn real_code(old: &Segment, selector: u16) -> Segment {
    let mut new = seg::real_segment(old, selector);
    if new.attr & 0x18 != 0x18 {
        new.attr = new.attr & !0x1f | 0x1b;
    }
    new
}

/// Protected mode through a 32-bit IDT, from virtual-8086 mode too (SDM vol. 3A §6.11-6.12, §20.3).
fn protected(cpu: &mut Cpu, event: &Event) -> Exec<u64> {
    let ext = event.ext();
    let slot = u64::from(event.vector) * 8;
    if slot + 7 > u64::from(cpu.state.idtr.limit) {
        return Err(Fault::gp(event.gate_error()));
    }
    let address = cpu.state.idtr.base.wrapping_add(slot) & 0xffff_ffff;
    let raw: u64 = cpu.sys_load(address)?;
    let gate = Descriptor { low: raw as u32, high: (raw >> 32) as u32, address };
    let gate_kind = gate.kind();
    let known = matches!(
        gate_kind,
        kind::TASK_GATE | kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 | kind::INTERRUPT_GATE | kind::TRAP_GATE
    );
    if !gate.is_system() || !known || event.checked() && gate.dpl() < cpu.cpl() {
        return Err(Fault::gp(event.gate_error()));
    }
    if !gate.present() {
        return Err(Fault::np(event.gate_error()));
    }
    if gate_kind == kind::TASK_GATE {
        return task::through_interrupt_gate(
            cpu,
            gate.gate_selector(),
            event.rip,
            event.error,
            ext,
            event.set_rf,
        );
    }
    let size = if gate_kind >= 8 { 4 } else { 2 };
    let selector = gate.gate_selector();
    let offset = if size == 4 { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
    let target = Target::read(cpu, selector, ext)?;
    let d = target.descriptor;
    let flags = flags_image(cpu, event);
    let cpl = cpu.cpl();
    let v86 = cpu.v86();
    let inner = !d.conforming() && d.dpl() < cpl;
    let mut stack;
    let new_cpl;
    if inner {
        if v86 && d.dpl() != 0 {
            return Err(Fault::gp(target.error));
        }
        new_cpl = d.dpl();
        let (ss_selector, esp) = tss_stack(cpu, new_cpl, ext)?;
        let ss = seg::check_stack(cpu, ss_selector, new_cpl, Fault::ts, ext)?;
        stack = NewStack::on(ss, u64::from(esp), new_cpl);
        let ss_error = code_of(ss_selector) | ext;
        // The whole frame must fit before anything is pushed (SDM vol. 2, INT n: "room on stack").
        let words = if v86 { 9 } else { 5 } + u64::from(event.error.is_some());
        stack.room(words * u64::from(size), ss_error)?;
        if u64::from(offset) > u64::from(d.limit()) {
            return Err(Fault::gp(ext));
        }
        if v86 {
            for s in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                let value = u64::from(cpu.state.seg[s as usize].selector);
                stack.push(cpu, size, value, ss_error)?;
            }
        }
        let old_ss = u64::from(cpu.state.seg[Seg::Ss as usize].selector);
        let old_sp = cpu.state.gpr[crate::state::gpr::RSP];
        stack.push(cpu, size, old_ss, ss_error)?;
        stack.push(cpu, size, old_sp, ss_error)?;
        push_return(cpu, &mut stack, size, flags, event, ss_error)?;
    } else {
        if v86 || !(d.conforming() || d.dpl() == cpl) {
            return Err(Fault::gp(target.error));
        }
        new_cpl = cpl;
        stack = NewStack::current(cpu);
        stack.room((3 + u64::from(event.error.is_some())) * u64::from(size), ext)?;
        if u64::from(offset) > u64::from(d.limit()) {
            return Err(Fault::gp(ext));
        }
        push_return(cpu, &mut stack, size, flags, event, ext)?;
    }
    seg::mark_accessed(cpu, &d)?;
    if inner {
        if v86 {
            for s in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                cpu.state.seg[s as usize] = seg::null_segment(0);
            }
        }
        stack.commit(cpu);
    } else {
        stack.commit_pointer(cpu);
    }
    cpu.state.seg[Seg::Cs as usize] = d.segment(selector & !3 | u16::from(new_cpl));
    let mut clear = flag::TF | flag::NT | flag::RF | flag::VM;
    if gate_kind & 1 == 0 {
        clear |= flag::IF;
    }
    cpu.state.rflags &= !clear;
    cpu.mode_changed();
    Ok(u64::from(offset))
}

/// Pushes flags, CS, return pointer and the error code, if there is one.
fn push_return(cpu: &mut Cpu, stack: &mut NewStack, size: u8, flags: u64, event: &Event, error: u32) -> Exec {
    let cs = u64::from(cpu.state.seg[Seg::Cs as usize].selector);
    stack.push(cpu, size, flags, error)?;
    stack.push(cpu, size, cs, error)?;
    stack.push(cpu, size, event.rip, error)?;
    if let Some(code) = event.error {
        stack.push(cpu, size, u64::from(code), error)?;
    }
    Ok(())
}

/// The code segment an interrupt or trap gate names.
struct Target {
    descriptor: Descriptor,
    /// Error code for faults on it.
    error: u32,
}

impl Target {
    fn read(cpu: &mut Cpu, selector: u16, ext: u32) -> Exec<Target> {
        if null(selector) {
            return Err(Fault::gp(ext));
        }
        let error = code_of(selector) | ext;
        let Some(descriptor) = seg::read(cpu, selector)? else { return Err(Fault::gp(error)) };
        if !descriptor.is_code() || descriptor.dpl() > cpu.cpl() {
            return Err(Fault::gp(error));
        }
        if !descriptor.present() {
            return Err(Fault::np(error));
        }
        Ok(Target { descriptor, error })
    }
}

/// Long mode: 16-byte gates, IST, aligned frame (SDM vol. 3A §6.14).
fn long(cpu: &mut Cpu, event: &Event) -> Exec<u64> {
    let ext = event.ext();
    let slot = u64::from(event.vector) * 16;
    if slot + 15 > u64::from(cpu.state.idtr.limit) {
        return Err(Fault::gp(event.gate_error()));
    }
    let address = cpu.state.idtr.base.wrapping_add(slot);
    let raw: u64 = cpu.sys_load(address)?;
    let upper: u64 = cpu.sys_load(address.wrapping_add(8))?;
    let gate = Descriptor { low: raw as u32, high: (raw >> 32) as u32, address };
    let known = matches!(gate.kind(), kind::INTERRUPT_GATE | kind::TRAP_GATE);
    if !gate.is_system() || !known || event.checked() && gate.dpl() < cpu.cpl() {
        return Err(Fault::gp(event.gate_error()));
    }
    if !gate.present() {
        return Err(Fault::np(event.gate_error()));
    }
    let selector = gate.gate_selector();
    let rip = u64::from(gate.gate_offset()) | upper << 32;
    let target = Target::read(cpu, selector, ext)?;
    let d = target.descriptor;
    if !d.long() || d.big() {
        return Err(Fault::gp(target.error));
    }
    let cpl = cpu.cpl();
    let inner = !d.conforming() && d.dpl() < cpl;
    if !inner && !d.conforming() && d.dpl() != cpl {
        return Err(Fault::gp(target.error));
    }
    let new_cpl = if inner { d.dpl() } else { cpl };
    let ist = gate.high_ist();
    let rsp = if ist != 0 {
        tss_pointer(cpu, 0x1c + 8 * u64::from(ist), ext)?
    } else if inner {
        tss_pointer(cpu, 4 + 8 * u64::from(new_cpl), ext)?
    } else {
        cpu.state.gpr[crate::state::gpr::RSP]
    };
    if !canonical(cpu, rsp) {
        return Err(Fault::ss(ext));
    }
    if !canonical(cpu, rip) {
        return Err(Fault::gp(ext));
    }
    let flags = flags_image(cpu, event);
    let old_ss = cpu.state.seg[Seg::Ss as usize];
    let old_rsp = cpu.state.gpr[crate::state::gpr::RSP];
    let mut stack = NewStack::flat(rsp & !0xf, new_cpl);
    stack.push(cpu, 8, u64::from(old_ss.selector), ext)?;
    stack.push(cpu, 8, old_rsp, ext)?;
    push_return(cpu, &mut stack, 8, flags, event, ext)?;
    seg::mark_accessed(cpu, &d)?;
    cpu.state.gpr[crate::state::gpr::RSP] = stack.pointer();
    if inner {
        cpu.state.seg[Seg::Ss as usize] = seg::null_stack(u16::from(new_cpl));
    }
    cpu.state.seg[Seg::Cs as usize] = d.segment(selector & !3 | u16::from(new_cpl));
    let mut clear = flag::TF | flag::NT | flag::RF | flag::VM;
    if gate.kind() == kind::INTERRUPT_GATE {
        clear |= flag::IF;
    }
    cpu.state.rflags &= !clear;
    cpu.mode_changed();
    Ok(rip)
}

impl Descriptor {
    /// Interrupt stack table index of a long-mode gate.
    fn high_ist(&self) -> u8 {
        (self.high & 7) as u8
    }
}

/// Reads a stack pointer from the 64-bit TSS (SDM vol. 3A figure 7-11).
pub(crate) fn tss_pointer(cpu: &mut Cpu, offset: u64, ext: u32) -> Exec<u64> {
    let tr = cpu.state.tr;
    if offset + 7 > u64::from(tr.limit) {
        return Err(Fault::ts(code_of(tr.selector) | ext));
    }
    cpu.sys_load(tr.base.wrapping_add(offset))
}

/// INT n, INT3, INTO, INT1 (SDM vol. 2, INT n).
pub(crate) fn int(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let (vector, int1) = match insn.code {
        Code::Int3 => (vector::BP, false),
        Code::Into => {
            if cpu.state.rflags & flag::OF == 0 {
                return Ok(());
            }
            (vector::OF, false)
        }
        Code::Int1 => (vector::DB, true),
        _ => (insn.imm as u8, false),
    };
    let rip = next_rip(cpu, insn);
    if cpu.v86() && insn.code == Code::Int_imm8 {
        let iopl3 = cpu.state.rflags & flag::IOPL == flag::IOPL;
        if cpu.state.cr4 & cr4::VME != 0 && !redirected(cpu, vector)? {
            return v86_direct(cpu, vector, rip, iopl3);
        }
        if !iopl3 {
            return Err(Fault::gp(0));
        }
    }
    let event = Event { vector, kind: EventKind::Software, error: None, int1, rip, set_rf: false };
    let target = deliver(cpu, &event)?;
    debug::skip_step(cpu);
    jump(cpu, target);
    Ok(())
}

/// Software interrupt redirection bitmap of the TSS: true when `vector` goes through the IDT (SDM vol. 3A §20.3.3).
fn redirected(cpu: &mut Cpu, vector: u8) -> Exec<bool> {
    let tr = cpu.state.tr;
    if u64::from(tr.limit) < 0x67 {
        return Err(Fault::gp(0));
    }
    let map: u16 = cpu.sys_load(tr.base.wrapping_add(0x66))?;
    let Some(start) = u64::from(map).checked_sub(32) else { return Err(Fault::gp(0)) };
    let offset = start + u64::from(vector >> 3);
    if offset > u64::from(tr.limit) {
        return Err(Fault::gp(0));
    }
    let byte: u8 = cpu.sys_load(tr.base.wrapping_add(offset))?;
    Ok(byte >> (vector & 7) & 1 != 0)
}

/// An interrupt handled by the virtual-8086 program's own table (SDM vol. 3A §20.3.3.4 and .6, methods 5 and 6).
fn v86_direct(cpu: &mut Cpu, vector: u8, rip: u64, iopl3: bool) -> Exec {
    let target: u32 = cpu.load_linear(u64::from(vector) * 4, View::User)?;
    let mut flags = cpu.state.rflags;
    if !iopl3 {
        flags = flags & !flag::IF | flag::IOPL;
        if cpu.state.rflags & flag::VIF != 0 {
            flags |= flag::IF;
        }
    }
    real_frame(cpu, flags, rip, target)?;
    cpu.state.rflags &= !(flag::TF | if iopl3 { flag::IF } else { flag::VIF });
    debug::skip_step(cpu);
    jump(cpu, u64::from(target & 0xffff));
    Ok(())
}

/// What IRET popped.
struct Frame {
    rip: u64,
    cs: u16,
    flags: u64,
}

/// Reader of the present stack that moves no register.
pub(crate) struct Pops {
    pointer: u64,
    mask: u64,
    size: u8,
}

impl Pops {
    pub(crate) fn new(cpu: &Cpu, size: u8) -> Pops {
        Pops { pointer: cpu.state.gpr[crate::state::gpr::RSP], mask: super::stack_mask(cpu), size }
    }
    pub(crate) fn pop(&mut self, cpu: &mut Cpu) -> Exec<u64> {
        let at = self.pointer & self.mask;
        let value = match self.size {
            2 => u64::from(cpu.load::<u16>(Seg::Ss, at)?),
            4 => u64::from(cpu.load::<u32>(Seg::Ss, at)?),
            _ => cpu.load::<u64>(Seg::Ss, at)?,
        };
        self.pointer = self.pointer.wrapping_add(u64::from(self.size));
        Ok(value)
    }
    fn frame(&mut self, cpu: &mut Cpu) -> Exec<Frame> {
        let rip = self.pop(cpu)?;
        let cs = self.pop(cpu)? as u16;
        let flags = self.pop(cpu)?;
        Ok(Frame { rip, cs, flags })
    }
    /// Releases `bytes` more.
    pub(crate) fn skip(&mut self, bytes: u16) {
        self.pointer = self.pointer.wrapping_add(u64::from(bytes));
    }
    pub(crate) fn commit(&self, cpu: &mut Cpu) {
        super::set_stack_pointer(cpu, self.pointer, self.mask);
    }
}

/// Writes the flags that a return at `cpl` may write; `size` is the operand size in bytes.
fn restore_flags(cpu: &mut Cpu, image: u64, size: u8, cpl: u8) {
    let mut mask = flag::ARITH | flag::TF | flag::DF | flag::NT;
    if size > 2 {
        mask |= flag::RF | flag::AC | flag::ID;
    }
    if cpl <= super::iopl(cpu) {
        mask |= flag::IF;
    }
    if cpl == 0 {
        mask |= flag::IOPL;
        if size > 2 {
            mask |= flag::VIF | flag::VIP;
        }
    }
    cpu.state.rflags = cpu.state.rflags & !mask | image & mask | flag::ONE;
}

/// IRET, IRETD, IRETQ (SDM vol. 2, IRET).
pub(crate) fn iret(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let size = operand_size(insn);
    // NMIs are unblocked even when the instruction faults (SDM vol. 3A §6.7.1).
    cpu.state.nmi_blocked = false;
    if !cpu.protected() {
        return iret_real(cpu, size);
    }
    if cpu.v86() {
        return iret_v86(cpu, size);
    }
    let long = long_mode(cpu);
    if cpu.state.rflags & flag::NT != 0 {
        if long {
            return Err(Fault::gp(0));
        }
        return task::iret_nested(cpu, insn);
    }
    let mut pops = Pops::new(cpu, size);
    let frame = pops.frame(cpu)?;
    let cpl = cpu.cpl();
    if !long && size == 4 && frame.flags & flag::VM != 0 && cpl == 0 {
        return iret_to_v86(cpu, pops, &frame);
    }
    if null(frame.cs) {
        return Err(Fault::gp(0));
    }
    let error = code_of(frame.cs);
    let Some(d) = seg::read(cpu, frame.cs)? else { return Err(Fault::gp(error)) };
    let rpl = (frame.cs & 3) as u8;
    if !d.is_code() || rpl < cpl {
        return Err(Fault::gp(error));
    }
    if d.conforming() && d.dpl() > rpl || !d.conforming() && d.dpl() != rpl {
        return Err(Fault::gp(error));
    }
    if !d.present() {
        return Err(Fault::np(error));
    }
    let to_64 = long && d.long();
    if to_64 && d.big() {
        return Err(Fault::gp(error));
    }
    let with_stack = rpl > cpl || cpu.in_64bit();
    let mut new_ss = None;
    let mut new_rsp = 0;
    if with_stack {
        new_rsp = pops.pop(cpu)?;
        let ss = pops.pop(cpu)? as u16;
        new_ss = Some(if null(ss) && to_64 && rpl != 3 && (ss & 3) as u8 == rpl {
            seg::null_stack(ss)
        } else {
            seg::check_stack(cpu, ss, rpl, Fault::gp, 0)?
        });
    }
    let rip = super::check_target(cpu, frame.rip, &d, to_64, 0)?;
    seg::mark_accessed(cpu, &d)?;
    restore_flags(cpu, frame.flags, size, cpl);
    match new_ss {
        Some(ss) => {
            let mask = super::stack_mask_of(&ss, to_64);
            cpu.state.seg[Seg::Ss as usize] = ss;
            cpu.state.seg[Seg::Cs as usize] = d.segment(frame.cs);
            super::set_stack_pointer(cpu, new_rsp, if size == 2 { mask & 0xffff } else { mask });
            if rpl > cpl {
                seg::drop_privileged(cpu, rpl);
            }
        }
        None => {
            pops.commit(cpu);
            cpu.state.seg[Seg::Cs as usize] = d.segment(frame.cs);
        }
    }
    cpu.mode_changed();
    jump(cpu, rip);
    Ok(())
}

fn iret_real(cpu: &mut Cpu, size: u8) -> Exec {
    let mut pops = Pops::new(cpu, size);
    let frame = pops.frame(cpu)?;
    let cs = cpu.state.seg[Seg::Cs as usize];
    if frame.rip > u64::from(cs.limit) {
        return Err(Fault::gp(0));
    }
    pops.commit(cpu);
    cpu.state.seg[Seg::Cs as usize] = real_code(&cs, frame.cs);
    // In real mode the CPL is 0, but VIF and VIP are kept (SDM vol. 2, IRET: mask 0x1a0000).
    let keep = cpu.state.rflags & (flag::VIF | flag::VIP);
    restore_flags(cpu, frame.flags, size, 0);
    cpu.state.rflags = cpu.state.rflags & !(flag::VIF | flag::VIP) | keep;
    cpu.mode_changed();
    jump(cpu, frame.rip);
    Ok(())
}

fn iret_v86(cpu: &mut Cpu, size: u8) -> Exec {
    let iopl3 = cpu.state.rflags & flag::IOPL == flag::IOPL;
    let vme = cpu.state.cr4 & cr4::VME != 0;
    if !(iopl3 || vme && size == 2) {
        return Err(Fault::gp(0));
    }
    let mut pops = Pops::new(cpu, size);
    let frame = pops.frame(cpu)?;
    if frame.rip > 0xffff {
        return Err(Fault::gp(0));
    }
    let mut mask = flag::ARITH | flag::DF | flag::NT | flag::TF;
    let mut image = frame.flags;
    if iopl3 {
        mask |= flag::IF;
        if size > 2 {
            mask |= flag::RF | flag::AC | flag::ID;
        }
    } else {
        if cpu.state.rflags & flag::VIP != 0 && image & flag::IF != 0 || image & flag::TF != 0 {
            return Err(Fault::gp(0));
        }
        mask |= flag::VIF;
        image &= !flag::VIF;
        if image & flag::IF != 0 {
            image |= flag::VIF;
        }
    }
    pops.commit(cpu);
    cpu.state.seg[Seg::Cs as usize] = seg::v86_segment(frame.cs);
    cpu.state.rflags = cpu.state.rflags & !mask | image & mask | flag::ONE;
    cpu.mode_changed();
    jump(cpu, frame.rip);
    Ok(())
}

/// Return to virtual-8086 mode (SDM vol. 2, IRET: RETURN-TO-VIRTUAL-8086-MODE).
fn iret_to_v86(cpu: &mut Cpu, mut pops: Pops, frame: &Frame) -> Exec {
    let esp = pops.pop(cpu)?;
    let mut selectors = [0u16; 5];
    for s in &mut selectors {
        *s = pops.pop(cpu)? as u16;
    }
    if frame.rip > 0xffff {
        return Err(Fault::gp(0));
    }
    let mask = flag::ARITH
        | flag::TF
        | flag::IF
        | flag::DF
        | flag::IOPL
        | flag::NT
        | flag::RF
        | flag::VM
        | flag::AC
        | flag::VIF
        | flag::VIP
        | flag::ID;
    cpu.state.rflags = cpu.state.rflags & !mask | frame.flags & mask | flag::ONE;
    cpu.state.seg[Seg::Cs as usize] = seg::v86_segment(frame.cs);
    for (s, selector) in [Seg::Ss, Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs].into_iter().zip(selectors) {
        cpu.state.seg[s as usize] = seg::v86_segment(selector);
    }
    cpu.state.gpr[crate::state::gpr::RSP] = esp & 0xffff_ffff;
    cpu.mode_changed();
    jump(cpu, frame.rip & 0xffff);
    Ok(())
}
