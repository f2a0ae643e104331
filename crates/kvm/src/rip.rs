//! The exact instruction behind an exit.
//!
//! At an exit the instruction pointer stands at the instruction, or behind it: it depends on the kind of exit and on the kernel. KVM's
//! own emulator has already moved it for writes to memory and for OUTS without REP, and has not for reads, which it completes when it is
//! entered again. So both candidates are decoded and compared with what the exit says (port, size, address); where both fit,
//! [`Rules`] decides, which were measured on this kernel.

use crate::rules::{Class, Rules, Stand};
use hyaline_ram::RamBlock;
use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic,
    OpAccess, Register,
};
use kvm_bindings::{kvm_regs, kvm_sregs};
use std::sync::Arc;

/// What an exit says about its instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Ports (true) or memory.
    pub(crate) port: bool,
    pub(crate) is_write: bool,
    /// Port, or guest-physical address.
    pub(crate) addr: u64,
    /// Bytes of one element.
    pub(crate) size: u8,
}

/// An instruction, found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) rip: u64,
    /// A string instruction with REP.
    pub(crate) rep: bool,
}

/// Segment bases and mode, which finding needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) bits: u32,
    pub(crate) protected: bool,
    /// Bases of ES CS SS DS FS GS.
    pub(crate) bases: [u64; 6],
}

impl Mode {
    pub(crate) fn of(sregs: &kvm_sregs) -> Mode {
        let protected = sregs.cr0 & 1 != 0;
        let long = sregs.efer & 1 << 10 != 0 && sregs.cs.l != 0;
        let bits = if long {
            64
        } else if protected && sregs.cs.db != 0 {
            32
        } else {
            16
        };
        let flat = |base: u64| if long { 0 } else { base };
        Mode {
            bits,
            protected,
            bases: [
                flat(sregs.es.base),
                flat(sregs.cs.base),
                flat(sregs.ss.base),
                flat(sregs.ds.base),
                sregs.fs.base,
                sregs.gs.base,
            ],
        }
    }

    /// Linear address of an offset in the code segment.
    pub(crate) fn linear(&self, rip: u64) -> u64 {
        if self.bits == 64 { rip } else { self.bases[1].wrapping_add(rip) & 0xffff_ffff }
    }
}

/// Code around the instruction pointer: what could be read before and behind it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    /// Up to 15 bytes that end at the instruction pointer.
    pub(crate) before: Vec<u8>,
    /// Up to 15 bytes from there on.
    pub(crate) at: Vec<u8>,
}

/// Which general register, as kvm_regs has it, with the operand's width cut.
fn register(regs: &kvm_regs, register: Register) -> Option<u64> {
    let value = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RBX => regs.rbx,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        _ => return None,
    };
    match register.size() {
        8 => Some(value),
        4 => Some(value & 0xffff_ffff),
        2 => Some(value & 0xffff),
        _ => None,
    }
}

fn is_rep_string(instruction: &Instruction) -> bool {
    instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix() || instruction.has_repe_prefix())
}

/// The class whose rule tells where the instruction pointer stands.
fn class(instruction: &Instruction, access: &Access) -> Class {
    let rep = is_rep_string(instruction);
    let string = instruction.is_string_instruction();
    match (access.port, access.is_write) {
        (true, true) if rep => Class::RepOuts,
        (true, true) if string => Class::Outs,
        (true, true) => Class::Out,
        (true, false) if rep => Class::RepIns,
        (true, false) if string => Class::Ins,
        (true, false) => Class::In,
        (false, true) if rep => Class::RepWrite,
        (false, true) => Class::Write,
        (false, false) => Class::Read,
    }
}

/// How closely an instruction is compared with an exit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closeness {
    /// Direction and size only.
    Kind,
    /// The address too; the registers are those before the instruction.
    Before,
    /// The address too; the registers are those after it.
    After,
}

/// Could this instruction have made the access?
fn fits(instruction: &Instruction, access: &Access, regs: &kvm_regs, mode: &Mode, how: Closeness) -> bool {
    if access.port {
        return fits_port(instruction, access, (how != Closeness::Kind).then_some(regs));
    }
    let stepped = how == Closeness::After;
    let mut before = *regs;
    if stepped {
        // Undo what the instruction did to the registers that address its own operands.
        let sp = instruction.stack_pointer_increment();
        before.rsp = before.rsp.wrapping_sub(sp as i64 as u64);
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info_options(instruction, InstructionInfoOptions::NONE);
    info.used_memory().iter().any(|memory| {
        let direction = match memory.access() {
            OpAccess::Read | OpAccess::CondRead => !access.is_write,
            OpAccess::Write | OpAccess::CondWrite => access.is_write,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
            _ => false,
        };
        // Wide operands come in pieces.
        // (Of a REP instruction the crate gives no size, since it depends on the count: the element's it is.)
        let width = match memory.memory_size().size() {
            0 => instruction.memory_size().size().max(1) as u64,
            size => size as u64,
        };
        if !direction || width < u64::from(access.size) && width != 1 {
            return false;
        }
        if how == Closeness::Kind {
            return true;
        }
        let offset = memory.virtual_address(0, |reg, _, _| match reg {
            Register::ES => Some(mode.bases[0]),
            Register::CS => Some(mode.bases[1]),
            Register::SS => Some(mode.bases[2]),
            Register::DS => Some(mode.bases[3]),
            Register::FS => Some(mode.bases[4]),
            Register::GS => Some(mode.bases[5]),
            _ => register(&before, reg),
        });
        // Gathers and the like: the size has to do.
        let Some(linear) = offset else { return true };
        // Paging keeps the low 12 bits.
        let hit = |linear: u64| (access.addr.wrapping_sub(linear) & 0xfff) < width;
        if instruction.is_string_instruction() && (stepped || access.is_write) {
            // The index register has moved on by one element, one way or the other: with REP too, where the pointer stays.
            return hit(linear.wrapping_sub(width)) || hit(linear.wrapping_add(width));
        }
        hit(linear)
    })
}

fn fits_port(instruction: &Instruction, access: &Access, regs: Option<&kvm_regs>) -> bool {
    let (is_write, size, by_dx) = match instruction.code() {
        Code::Out_imm8_AL => (true, 1, false),
        Code::Out_imm8_AX => (true, 2, false),
        Code::Out_imm8_EAX => (true, 4, false),
        Code::Out_DX_AL => (true, 1, true),
        Code::Out_DX_AX => (true, 2, true),
        Code::Out_DX_EAX => (true, 4, true),
        Code::In_AL_imm8 => (false, 1, false),
        Code::In_AX_imm8 => (false, 2, false),
        Code::In_EAX_imm8 => (false, 4, false),
        Code::In_AL_DX => (false, 1, true),
        Code::In_AX_DX => (false, 2, true),
        Code::In_EAX_DX => (false, 4, true),
        _ => match instruction.mnemonic() {
            Mnemonic::Outsb => (true, 1, true),
            Mnemonic::Outsw => (true, 2, true),
            Mnemonic::Outsd => (true, 4, true),
            Mnemonic::Insb => (false, 1, true),
            Mnemonic::Insw => (false, 2, true),
            Mnemonic::Insd => (false, 4, true),
            _ => return false,
        },
    };
    let port = match (by_dx, regs) {
        (true, Some(regs)) => regs.rdx & 0xffff,
        (true, None) => access.addr,
        (false, _) => u64::from(instruction.immediate8()),
    };
    (is_write, size, port) == (access.is_write, access.size, access.addr)
}

fn decode(bytes: &[u8], bits: u32, ip: u64) -> Option<Instruction> {
    let instruction = Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// Finds the instruction, and tells whether only this one comes into question by direction and size, so that the answer holds for the
/// next such exit here. Gives the instruction pointer as it is when nothing fits (a call pushed to a device, say).
pub(crate) fn find(
    access: &Access,
    regs: &kvm_regs,
    mode: &Mode,
    window: &Window,
    rules: &Rules,
) -> (Found, bool) {
    let rip = regs.rip;
    let stand = |i: &Instruction| rules.stand(class(i, access), mode.protected);
    let behind = |how, by_rule: bool| {
        // The longest that fits wins: prefixes belong to the instruction.
        (1..=window.before.len()).rev().find_map(|length| {
            let bytes = &window.before[window.before.len() - length..];
            decode(bytes, mode.bits, rip.wrapping_sub(length as u64)).filter(|i| {
                i.len() == length
                    && !is_rep_string(i)
                    && !(by_rule && stand(i) == Stand::At)
                    && fits(i, access, regs, mode, how)
            })
        })
    };
    let decoded = decode(&window.at, mode.bits, rip);
    let here = |how, by_rule: bool| {
        decoded.filter(|i| !(by_rule && stand(i) == Stand::After) && fits(i, access, regs, mode, how))
    };
    let candidates = |by_rule| (here(Closeness::Before, by_rule), behind(Closeness::After, by_rule));
    // By what was measured; when nothing fits that way, whatever fits.
    let (at, before) = match candidates(true) {
        (None, None) => candidates(false),
        some => some,
    };
    let chosen = match (at, before) {
        // Both fit: a REP instruction at the pointer has made the access only if its index register has moved, which was compared.
        (Some(at), Some(before)) if is_rep_string(&at) || stand(&before) != Stand::After => Some((at, false)),
        (_, Some(before)) => Some((before, true)),
        (Some(at), None) => Some((at, false)),
        (None, None) => None,
    };
    let found = match chosen {
        Some((instruction, true)) => {
            let mask = if mode.bits == 64 { u64::MAX } else { 0xffff_ffff };
            Found { rip: rip.wrapping_sub(instruction.len() as u64) & mask, rep: false }
        }
        Some((instruction, false)) => Found { rip, rep: is_rep_string(&instruction) },
        None => Found { rip, rep: false },
    };
    let sure = here(Closeness::Kind, true).is_none() != behind(Closeness::Kind, true).is_none();
    (found, sure && chosen.is_some())
}

/// What was found lately, so that a loop of accesses costs little: an entry holds while the bytes around the instruction pointer are
/// what they were.
#[derive(Debug)]
pub(crate) struct Cache {
    entries: Vec<Option<Entry>>,
}

#[derive(Debug)]
struct Entry {
    rip: u64,
    access: Access,
    block: Arc<RamBlock>,
    offset: u64,
    bytes: Vec<u8>,
    found: Found,
}

const CACHE: usize = 64;

impl Cache {
    pub(crate) fn new() -> Cache {
        Cache { entries: (0..CACHE).map(|_| None).collect() }
    }

    fn slot(rip: u64) -> usize {
        ((rip ^ rip >> 6) % CACHE as u64) as usize
    }

    /// Where in a device the access goes doesn't matter.
    fn key(access: &Access) -> Access {
        Access { addr: if access.port { access.addr } else { 0 }, ..*access }
    }

    pub(crate) fn get(&self, rip: u64, access: &Access) -> Option<Found> {
        let entry = self.entries.get(Self::slot(rip))?.as_ref()?;
        if entry.rip != rip || entry.access != Self::key(access) {
            return None;
        }
        let mut now = [0u8; 30];
        let now = now.get_mut(..entry.bytes.len())?;
        entry.block.read(entry.offset, now).ok()?;
        (*now == entry.bytes[..]).then_some(entry.found)
    }

    /// `code`: where the window's first byte is in memory of ours, if the window is in one piece.
    pub(crate) fn put(
        &mut self,
        rip: u64,
        access: &Access,
        window: &Window,
        code: Option<(Arc<RamBlock>, u64)>,
        found: Found,
    ) {
        let Some((block, offset)) = code else { return };
        let bytes = [&window.before[..], &window.at[..]].concat();
        if let Some(entry) = self.entries.get_mut(Self::slot(rip)) {
            *entry = Some(Entry { rip, access: Self::key(access), block, offset, bytes, found });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn real() -> Mode {
        Mode { bits: 16, protected: false, bases: [0; 6] }
    }

    fn look(before: &[u8], at: &[u8], access: Access, regs: kvm_regs) -> (i64, bool) {
        let window = Window { before: before.to_vec(), at: at.to_vec() };
        let (found, _) = find(&access, &regs, &real(), &window, &Rules::default());
        (found.rip as i64 - regs.rip as i64, found.rep)
    }

    #[test]
    fn stores_are_found_behind_the_pointer() {
        let regs = kvm_regs { rip: 0x100, rdi: 0x8010, rax: 7, ..Default::default() };
        let store = Access { port: false, is_write: true, addr: 0xd_0010, size: 2 };
        // mov [di], ax behind; nop at the pointer.
        assert_eq!(look(&[0x90, 0x89, 0x05], &[0x90], store, regs), (-2, false));
        // The same store before and behind: what was measured (after) decides.
        assert_eq!(look(&[0x89, 0x05, 0x89, 0x05], &[0x89, 0x05], store, regs), (-2, false));
        // A size that only the prefixed form has.
        let wide = Access { size: 4, ..store };
        assert_eq!(look(&[0x90, 0x66, 0x89, 0x05], &[0x90], wide, regs), (-3, false));
        // stosw has moved DI.
        let regs = kvm_regs { rdi: 0x8012, ..regs };
        assert_eq!(look(&[0x90, 0xab], &[0x90], store, regs), (-1, false));
        // rep stosw stands still.
        assert_eq!(look(&[0x90, 0x90], &[0xf3, 0xab], store, regs), (0, true));
        // A push.
        let regs = kvm_regs { rsp: 0x8010, ..regs };
        assert_eq!(look(&[0x90, 0x50], &[0x90], store, regs), (-1, false));
    }

    #[test]
    fn ports() {
        let regs = kvm_regs { rip: 0x100, rdx: 0xc012, ..Default::default() };
        let out = Access { port: true, is_write: true, addr: 0xc012, size: 1 };
        assert_eq!(look(&[0x90], &[0xee, 0xee], out, regs), (0, false));
        assert_eq!(look(&[0xee], &[0xee], out, regs), (0, false));
        assert_eq!(look(&[0x90, 0x6e], &[0x90], out, regs), (-1, false));
        assert_eq!(look(&[0x6e], &[0xf3, 0x6e], out, regs), (0, true));
        let by_number = Access { addr: 0x80, ..out };
        assert_eq!(look(&[0x90], &[0xe6, 0x80], by_number, regs), (0, false));
        assert_eq!(look(&[0xe6, 0x80], &[0x90], by_number, regs), (-2, false));
        assert_eq!(look(&[0x90], &[0x90], by_number, regs), (0, false), "nothing fits");
    }
}
