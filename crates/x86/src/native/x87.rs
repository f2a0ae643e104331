//! x87 instructions (SDM vol. 1 chapter 8): arithmetic on the host's FPU, control and environment instructions in Rust.

use super::plan::{Memory, Plan};
use super::{call_entry, general_load, operand};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{Seg, X87, cr0, flag, gpr};
use iced_x86::Code;

/// FSW: exception flags (IE DE ZE OE UE PE).
const FLAGS: u16 = 0x3f;
/// FSW: error summary.
const ES: u16 = 0x80;
/// FSW: busy, a copy of ES.
const BUSY: u16 = 0x8000;

/// What an x87 thunk works on: an FNSAVE image in 32-bit protected format, then the guest's RFLAGS.
#[repr(C, align(64))]
pub(super) struct Run {
    image: [u8; 108],
    flags: u32,
}

/// Offset of `Run::flags`, for the thunk.
pub(super) const FLAGS_OFFSET: usize = std::mem::offset_of!(Run, flags);

/// TOP of the register stack.
pub(super) fn top(x87: &X87) -> usize {
    usize::from(x87.fsw >> 11 & 7)
}

/// Recomputes the error summary after the control or status word was loaded (SDM vol. 1 §8.1.3.3).
pub(super) fn summarize(x87: &mut X87) {
    let pending = x87.fsw & !x87.fcw & FLAGS != 0;
    x87.fsw = x87.fsw & !(ES | BUSY) | if pending { ES | BUSY } else { 0 };
}

/// FCW as the register holds it: bit 6 reads as one, bits 7 and 13-15 as zero.
pub(super) fn control_word(value: u16) -> u16 {
    value & 0x1f3f | 0x40
}

/// The full tag of a register (SDM vol. 1 §8.1.7): 0 valid, 1 zero, 2 special, 3 empty.
fn full_tag(x87: &X87, i: usize) -> u16 {
    if x87.ftw >> i & 1 == 0 {
        return 3;
    }
    let (significand, exponent) = (x87.significand[i & 7], x87.exponent[i & 7] & 0x7fff);
    match (exponent, significand) {
        (0, 0) => 1,
        (0x7fff, _) | (0, _) => 2,
        (_, s) if s >> 63 == 0 => 2,
        _ => 0,
    }
}

/// The full tag word.
pub(super) fn full_tags(x87: &X87) -> u16 {
    (0..8).fold(0, |word, i| word | full_tag(x87, i) << (2 * i))
}

/// The abridged tag word of a full one.
fn abridge(full: u16) -> u8 {
    (0..8).fold(0, |word, i| word | u8::from(full >> (2 * i) & 3 != 3) << i)
}

fn put16(image: &mut [u8], at: usize, value: u16) {
    if let Some(bytes) = image.get_mut(at..at + 2) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}
fn put32(image: &mut [u8], at: usize, value: u32) {
    if let Some(bytes) = image.get_mut(at..at + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}
fn get16(image: &[u8], at: usize) -> u16 {
    image.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}
fn get32(image: &[u8], at: usize) -> u32 {
    image.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// The eight registers in stack order, ten bytes each, at `at`.
fn put_registers(x87: &X87, image: &mut [u8], at: usize, stride: usize) {
    for i in 0..8 {
        let r = (top(x87) + i) & 7;
        let at = at + i * stride;
        if let Some(bytes) = image.get_mut(at..at + 8) {
            bytes.copy_from_slice(&x87.significand[r].to_le_bytes());
        }
        put16(image, at + 8, x87.exponent[r]);
    }
}

fn get_registers(x87: &mut X87, image: &[u8], at: usize, stride: usize) {
    for i in 0..8 {
        let r = (top(x87) + i) & 7;
        let at = at + i * stride;
        let low = image.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
        x87.significand[r] = low;
        x87.exponent[r] = get16(image, at + 8);
    }
}

/// The x87 half of an FXSAVE image (SDM vol. 1 §10.5.1), bytes 0-23 and 32-159.
pub(super) fn put_fxsave(x87: &X87, image: &mut [u8], wide: bool) {
    put16(image, 0, x87.fcw);
    put16(image, 2, x87.fsw);
    put16(image, 4, u16::from(x87.ftw));
    put16(image, 6, x87.fop & 0x7ff);
    for (at, pointer, selector) in [(8, x87.fip, x87.fcs), (16, x87.fdp, x87.fds)] {
        put32(image, at, pointer as u32);
        put32(image, at + 4, if wide { (pointer >> 32) as u32 } else { u32::from(selector) });
    }
    for i in 0..8 {
        if let Some(bytes) = image.get_mut(42 + i * 16..48 + i * 16) {
            bytes.fill(0);
        }
    }
    put_registers(x87, image, 32, 16);
}

/// Loads the x87 half of an FXSAVE image.
pub(super) fn get_fxsave(x87: &mut X87, image: &[u8], wide: bool) {
    x87.fcw = control_word(get16(image, 0));
    x87.fsw = get16(image, 2);
    x87.ftw = get16(image, 4) as u8;
    x87.fop = get16(image, 6) & 0x7ff;
    for (at, pointer, selector) in [(8, &mut x87.fip, &mut x87.fcs), (16, &mut x87.fdp, &mut x87.fds)] {
        let high = get32(image, at + 4);
        *pointer = u64::from(get32(image, at)) | if wide { u64::from(high) << 32 } else { 0 };
        *selector = if wide { 0 } else { high as u16 };
    }
    get_registers(x87, image, 32, 16);
    summarize(x87);
}

/// #NM by CR0.EM or CR0.TS, for every x87 instruction but FWAIT.
fn available(cpu: &Cpu) -> Exec {
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 { Err(Fault::nm()) } else { Ok(()) }
}

/// Raises a pending unmasked exception before a waiting instruction (SDM vol. 1 §8.7): #MF with CR0.NE set. Without NE the
/// processor asserts FERR#, which the machine learns through [`crate::Env::fpu_error`]; this model goes on with the
/// instruction, as a processor whose IGNNE# pin is asserted does, so that a machine without the legacy interrupt 13
/// wiring doesn't hang.
pub(super) fn check_pending(cpu: &mut Cpu) -> Exec {
    if cpu.state.x87.fsw & ES == 0 {
        return Ok(());
    }
    if cpu.state.cr0 & cr0::NE != 0 {
        return Err(Fault::mf());
    }
    cpu.env.fpu_error();
    Ok(())
}

/// Executes an arithmetic, load, store or stack instruction with a thunk.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn, plan: &Plan) -> Exec {
    available(cpu)?;
    if let Some(entry) = plan.live
        && (cpu.x87_live || enter(cpu))
    {
        return execute_live(cpu, insn, plan, entry);
    }
    cpu.settle_x87();
    check_pending(cpu)?;
    let mut buffer = super::Buffer::default();
    let address = operand(cpu, insn, plan.memory != Memory::None);
    let size = usize::from(plan.size);
    if plan.memory == Memory::Load {
        general_load(cpu, address, &mut buffer, size)?;
    }
    if plan.memory == Memory::Store {
        // Before the operation: the page must be there even if an unmasked exception keeps the store from happening.
        cpu.probe_write(address.0, address.1, size as u64)?;
    }
    if plan.flags {
        cpu.materialize_flags();
    }
    // Without CR0.NE an instruction may run with an exception pending. The host must not see that one, or it would raise it: its flags
    // are kept here meanwhile.
    let kept = if cpu.state.x87.fsw & ES != 0 { cpu.state.x87.fsw & FLAGS } else { 0 };
    let mut run = Run { image: [0; 108], flags: cpu.state.rflags as u32 };
    fill(&cpu.state.x87, kept, &mut run.image);
    run_thunk(plan, &mut run, &mut buffer);
    let fsw = get16(&run.image, 4);
    if plan.memory == Memory::Store {
        let mut written = true;
        if fsw & ES != 0 {
            // An unmasked exception may have kept the store from happening: run again over other bytes and compare.
            let mut second = super::Buffer([0x5a; super::plan::BUFFER]);
            let mut again = Run { image: [0; 108], flags: run.flags };
            fill(&cpu.state.x87, kept, &mut again.image);
            run_thunk(plan, &mut again, &mut second);
            written = second.bytes(size) == buffer.bytes(size);
        }
        if written {
            cpu.store_bytes(address.0, address.1, buffer.bytes(size))?;
        }
    }
    let x87 = &mut cpu.state.x87;
    x87.fcw = get16(&run.image, 0);
    x87.fsw = fsw | kept;
    if kept != 0 {
        summarize(x87);
    }
    x87.ftw = abridge(get16(&run.image, 8));
    get_registers(x87, &run.image, 28, 10);
    if plan.flags {
        // FCMOVcc only reads them; then these are the ones that it was given.
        cpu.state.rflags = cpu.state.rflags & !flag::ARITH | u64::from(run.flags) & flag::ARITH;
        cpu.adopt_flags();
    }
    note_pointers(cpu, insn, address, plan.memory != Memory::None);
    Ok(())
}

/// Loads the guest's x87 state into the host's registers, where it stays from instruction to instruction until [`Cpu::settle`]: no compiled
/// code on x86-64 uses them. False: the guest has unmasked exceptions, which must not become the host's.
#[cold]
#[inline(never)]
pub(crate) fn enter(cpu: &mut Cpu) -> bool {
    let x87 = &cpu.state.x87;
    if x87.fcw & FLAGS != FLAGS || x87.fsw & ES != 0 {
        return false;
    }
    let mut image = [0; 108];
    fill(x87, 0, &mut image);
    // SAFETY: 108 bytes in the 32-bit protected format, without an unmasked exception. What it leaves in the registers is taken out again
    // before this thread does anything but execute guest instructions.
    unsafe {
        std::arch::asm!("frstor [{}]", in(reg) image.as_ptr(), options(nostack, preserves_flags, readonly))
    };
    cpu.x87_live = true;
    true
}

/// Takes the guest's x87 state back from the host's registers, which are left as after FNINIT.
#[cold]
#[inline(never)]
pub(crate) fn leave(cpu: &mut Cpu) {
    let mut image = [0_u8; 108];
    // SAFETY: stores 108 bytes to a local.
    unsafe { std::arch::asm!("fnsave [{}]", in(reg) image.as_mut_ptr(), options(nostack, preserves_flags)) };
    let x87 = &mut cpu.state.x87;
    x87.fcw = get16(&image, 0);
    x87.fsw = get16(&image, 4);
    x87.ftw = abridge(get16(&image, 8));
    get_registers(x87, &image, 28, 10);
    cpu.x87_live = false;
}

/// Executes an instruction on the host's registers, which hold the guest's. No exception is unmasked.
#[inline(always)]
fn execute_live(cpu: &mut Cpu, insn: &Insn, plan: &Plan, entry: super::plan::Entry) -> Exec {
    let address = operand(cpu, insn, plan.memory != Memory::None);
    let size = usize::from(plan.size);
    let mut flags = 0_u32;
    if plan.flags {
        cpu.materialize_flags();
        flags = cpu.state.rflags as u32;
    }
    let direct = match plan.memory {
        Memory::None => Some((&raw mut flags).cast()),
        Memory::Load => super::host_read(cpu, address, size as u64),
        Memory::Store => super::host_write(cpu, address, size as u64),
    };
    if let Some(p) = direct {
        // SAFETY: a live thunk takes the flags' address, and its memory operand is `size` bytes at `p`, which the TLB maps for this kind
        // of access; without one it doesn't use the pointer. All exceptions are masked.
        unsafe { entry((&raw mut flags).cast(), p) };
    } else {
        let mut buffer = super::Buffer::default();
        match plan.memory {
            Memory::Load => general_load(cpu, address, &mut buffer, size)?,
            _ => cpu.probe_write(address.0, address.1, size as u64)?,
        }
        // SAFETY: as above; the buffer holds the largest operand.
        unsafe { entry((&raw mut flags).cast(), buffer.0.as_mut_ptr()) };
        if plan.memory == Memory::Store {
            cpu.store_bytes(address.0, address.1, buffer.bytes(size))?;
        }
    }
    if plan.flags {
        cpu.state.rflags = cpu.state.rflags & !flag::ARITH | u64::from(flags) & flag::ARITH;
        cpu.adopt_flags();
    }
    note_pointers(cpu, insn, address, plan.memory != Memory::None);
    Ok(())
}

/// The status word, wherever it is.
fn status(cpu: &Cpu) -> u16 {
    if !cpu.x87_live {
        return cpu.state.x87.fsw;
    }
    let mut fsw = 0_u16;
    // SAFETY: stores two bytes to a local.
    unsafe { std::arch::asm!("fnstsw [{}]", in(reg) &raw mut fsw, options(nostack, preserves_flags)) };
    fsw
}

/// Keeps what FNSTENV and FXSAVE show of the last instruction (SDM vol. 1 §8.1.8).
fn note_pointers(cpu: &mut Cpu, insn: &Insn, address: (Seg, u64), memory: bool) {
    let mut opcode = [insn.bytes[0], insn.bytes[1]];
    if opcode[0] & 0xf8 != 0xd8 {
        let found = insn.bytes().windows(2).find(|pair| matches!(pair, [0xd8..=0xdf, _]));
        opcode = found.and_then(|pair| pair.try_into().ok()).unwrap_or_default();
    }
    let fop = u16::from(opcode[0] & 7) << 8 | u16::from(opcode[1]);
    let fcs = cpu.state.seg[Seg::Cs as usize].selector;
    let fds = cpu.state.seg[address.0 as usize].selector;
    let rip = cpu.state.rip;
    let x87 = &mut cpu.state.x87;
    (x87.fop, x87.fip, x87.fcs) = (fop, rip, fcs);
    if memory {
        (x87.fdp, x87.fds) = (address.1, fds);
    }
}

/// The state as FRSTOR takes it, without the exceptions in `without`.
fn fill(x87: &X87, without: u16, image: &mut [u8; 108]) {
    put16(image, 0, x87.fcw);
    put16(image, 4, if without == 0 { x87.fsw } else { x87.fsw & !(without | ES | BUSY) });
    put16(image, 8, full_tags(x87));
    put_registers(x87, image, 28, 10);
}

fn run_thunk(plan: &Plan, run: &mut Run, buffer: &mut super::Buffer) {
    let run: *mut Run = run;
    // SAFETY: the thunk takes a `Run` in place of the state (plan.class is X87). It loads the image (FRSTOR), in which no
    // unmasked exception is pending, executes one instruction and saves (FNSAVE), which neither waits for nor raises
    // exceptions and leaves the FPU as after FNINIT: the state that the ABI wants.
    unsafe { call_entry(plan, run.cast(), buffer) };
}

/// FWAIT.
pub(super) fn wait(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if cpu.state.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(Fault::nm());
    }
    check_pending(cpu)
}

/// The handler of a control instruction; None for those that thunks execute.
pub(super) fn control(code: Code) -> Option<crate::decode::Handler> {
    Some(match code {
        Code::Wait => wait,
        Code::Fninit => fninit,
        Code::Fnclex => fnclex,
        // Interrupt enable flags and protected-mode switches of the 8087 and 80287: no operation since.
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => old_control,
        Code::Fnstcw_m2byte => fnstcw,
        Code::Fldcw_m2byte => fldcw,
        Code::Fnstsw_m2byte => fnstsw,
        Code::Fnstsw_AX => fnstsw_ax,
        Code::Fnstenv_m14byte | Code::Fnstenv_m28byte => fnstenv,
        Code::Fldenv_m14byte | Code::Fldenv_m28byte => fldenv,
        Code::Fnsave_m94byte | Code::Fnsave_m108byte => fnsave,
        Code::Frstor_m94byte | Code::Frstor_m108byte => frstor,
        _ => return None,
    })
}

fn old_control(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    available(cpu)
}

fn fninit(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    available(cpu)?;
    cpu.settle_x87();
    reset(&mut cpu.state.x87);
    Ok(())
}

/// FNINIT leaves the registers' contents.
fn reset(x87: &mut X87) {
    let old = *x87;
    *x87 = X87 { significand: old.significand, exponent: old.exponent, ..X87::default() };
}

fn fnclex(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    available(cpu)?;
    cpu.settle_x87();
    // SF (bit 6) goes too.
    cpu.state.x87.fsw &= !(FLAGS | 0x40 | ES | BUSY);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu)?;
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.store::<u16>(seg, offset, cpu.state.x87.fcw)
}

fn fldcw(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu)?;
    check_pending(cpu)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = control_word(cpu.load::<u16>(seg, offset)?);
    if cpu.x87_live && value & FLAGS == FLAGS {
        // SAFETY: loads two bytes from a local; all exceptions are masked.
        unsafe { std::arch::asm!("fldcw [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
        cpu.state.x87.fcw = value;
        return Ok(());
    }
    cpu.settle_x87();
    cpu.state.x87.fcw = value;
    summarize(&mut cpu.state.x87);
    Ok(())
}

fn fnstsw(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let fsw = status(cpu);
    cpu.store::<u16>(seg, offset, fsw)
}

fn fnstsw_ax(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    available(cpu)?;
    let fsw = status(cpu);
    let rax = &mut cpu.state.gpr[gpr::RAX];
    *rax = *rax & !0xffff | u64::from(fsw);
    Ok(())
}

/// The four formats of the environment (SDM vol. 1 figures 8-9 to 8-12).
#[derive(Clone, Copy)]
struct Format {
    wide: bool,
    protected: bool,
}

impl Format {
    fn of(cpu: &Cpu, insn: &Insn) -> Format {
        let wide = matches!(
            insn.code,
            Code::Fnstenv_m28byte | Code::Fldenv_m28byte | Code::Fnsave_m108byte | Code::Frstor_m108byte
        );
        Format { wide, protected: cpu.protected() && !cpu.v86() }
    }
    fn size(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
    fn put(self, x87: &X87, image: &mut [u8]) {
        let step = if self.wide { 4 } else { 2 };
        for (n, word) in [x87.fcw, x87.fsw, full_tags(x87)].into_iter().enumerate() {
            if self.wide {
                // The upper halves are reserved and stored as ones.
                put32(image, n * step, 0xffff_0000 | u32::from(word));
            } else {
                put16(image, n * step, word);
            }
        }
        let fop = x87.fop & 0x7ff;
        // Real-address formats hold linear addresses: selector times 16 plus offset.
        let linear = |pointer: u64, selector: u16| (pointer as u32).wrapping_add(u32::from(selector) << 4);
        match (self.wide, self.protected) {
            (true, true) => {
                put32(image, 12, x87.fip as u32);
                put32(image, 16, u32::from(fop) << 16 | u32::from(x87.fcs));
                put32(image, 20, x87.fdp as u32);
                put32(image, 24, 0xffff_0000 | u32::from(x87.fds));
            }
            (true, false) => {
                let (ip, dp) = (linear(x87.fip, x87.fcs), linear(x87.fdp, x87.fds));
                put32(image, 12, 0xffff_0000 | ip & 0xffff);
                put32(image, 16, ip >> 16 << 12 | u32::from(fop));
                put32(image, 20, 0xffff_0000 | dp & 0xffff);
                put32(image, 24, dp >> 16 << 12);
            }
            (false, true) => {
                put16(image, 6, x87.fip as u16);
                put16(image, 8, x87.fcs);
                put16(image, 10, x87.fdp as u16);
                put16(image, 12, x87.fds);
            }
            (false, false) => {
                let (ip, dp) = (linear(x87.fip, x87.fcs), linear(x87.fdp, x87.fds));
                put16(image, 6, ip as u16);
                put16(image, 8, (ip >> 16 << 12) as u16 | fop);
                put16(image, 10, dp as u16);
                put16(image, 12, (dp >> 16 << 12) as u16);
            }
        }
    }
    fn get(self, x87: &mut X87, image: &[u8]) {
        let step = if self.wide { 4 } else { 2 };
        x87.fcw = control_word(get16(image, 0));
        x87.fsw = get16(image, step);
        x87.ftw = abridge(get16(image, 2 * step));
        match (self.wide, self.protected) {
            (true, true) => {
                x87.fip = u64::from(get32(image, 12));
                x87.fcs = get16(image, 16);
                x87.fop = get16(image, 18) & 0x7ff;
                x87.fdp = u64::from(get32(image, 20));
                x87.fds = get16(image, 24);
            }
            (true, false) => {
                let (ip, dp) = (get32(image, 16), get32(image, 24));
                x87.fip = u64::from(u32::from(get16(image, 12)) | ip >> 12 << 16);
                x87.fop = ip as u16 & 0x7ff;
                x87.fdp = u64::from(u32::from(get16(image, 20)) | dp >> 12 << 16);
                (x87.fcs, x87.fds) = (0, 0);
            }
            (false, true) => {
                x87.fip = u64::from(get16(image, 6));
                x87.fcs = get16(image, 8);
                x87.fdp = u64::from(get16(image, 10));
                x87.fds = get16(image, 12);
                x87.fop = 0;
            }
            (false, false) => {
                let (ip, dp) = (get16(image, 8), get16(image, 12));
                x87.fip = u64::from(get16(image, 6)) | u64::from(ip >> 12) << 16;
                x87.fop = ip & 0x7ff;
                x87.fdp = u64::from(get16(image, 10)) | u64::from(dp >> 12) << 16;
                (x87.fcs, x87.fds) = (0, 0);
            }
        }
        summarize(x87);
    }
}

fn fnstenv(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu)?;
    cpu.settle_x87();
    let format = Format::of(cpu, insn);
    let mut image = [0; 28];
    format.put(&cpu.state.x87, &mut image);
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.store_bytes(seg, offset, &image[..format.size()])?;
    // All exceptions are masked after the store (SDM vol. 2, FSTENV).
    cpu.state.x87.fcw |= FLAGS;
    summarize(&mut cpu.state.x87);
    Ok(())
}

fn fldenv(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu)?;
    cpu.settle_x87();
    check_pending(cpu)?;
    let format = Format::of(cpu, insn);
    let mut image = [0; 28];
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.load_bytes(seg, offset, &mut image[..format.size()])?;
    format.get(&mut cpu.state.x87, &image);
    Ok(())
}

fn fnsave(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu)?;
    cpu.settle_x87();
    let format = Format::of(cpu, insn);
    let mut image = [0; 108];
    format.put(&cpu.state.x87, &mut image);
    put_registers(&cpu.state.x87, &mut image, format.size(), 10);
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.store_bytes(seg, offset, &image[..format.size() + 80])?;
    reset(&mut cpu.state.x87);
    Ok(())
}

fn frstor(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu)?;
    cpu.settle_x87();
    check_pending(cpu)?;
    let format = Format::of(cpu, insn);
    let mut image = [0; 108];
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.load_bytes(seg, offset, &mut image[..format.size() + 80])?;
    format.get(&mut cpu.state.x87, &image);
    get_registers(&mut cpu.state.x87, &image, format.size(), 10);
    Ok(())
}
