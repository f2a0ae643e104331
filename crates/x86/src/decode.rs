//! Decoding: guest bytes to [`Insn`], through iced-x86.

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::state::Seg;
use crate::sys::cpuid::CpuModel;
use crate::{exec, native, sys};
use iced_x86::{
    Code, CodeSize, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, OpKind, Register,
};
use std::sync::OnceLock;

/// Executes one instruction. `state.rip` is the instruction's own address while it runs; a handler that doesn't continue at the
/// next instruction sets `cpu.next_rip`. On Err the state is as before the instruction.
pub type Handler = fn(&mut Cpu, &Insn) -> Exec;

/// Prefixes and other facts, bits of [`Insn::flags`].
pub mod insn_flag {
    /// LOCK.
    pub const LOCK: u8 = 1;
    /// REP / REPE (0xf3) on a string instruction.
    pub const REP: u8 = 2;
    /// REPNE (0xf2) on a string instruction.
    pub const REPNE: u8 = 4;
    /// Has a memory operand (ModRM memory form or moffs).
    pub const MEM: u8 = 8;
    /// Ends its block: branches, and whatever may change the mode, the map or the flow.
    pub const END: u8 = 16;
    /// Decoded in 64-bit mode.
    pub const LONG: u8 = 32;
    /// Ends its block, but changes nothing else than registers, memory and RIP: near branches, repeated string instructions.
    pub const PLAIN: u8 = 64;
}

/// How the effective address is computed, [`Insn::ea`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ea {
    /// base + disp, 64-bit.
    Base64,
    /// base + index * scale + disp, 64-bit.
    BaseIndex64,
    /// index * scale + disp, 64-bit.
    Index64,
    /// next instruction + disp, 64-bit.
    Rip64,
    /// base + disp, truncated to 32 bits.
    Base32,
    /// base + index * scale + disp, truncated to 32 bits.
    BaseIndex32,
    /// index * scale + disp, truncated to 32 bits.
    Index32,
    /// next instruction + disp, truncated to 32 bits.
    Rip32,
    /// base + index + disp, truncated to 16 bits.
    BaseIndex16,
    /// base + disp, truncated to 16 bits.
    Base16,
    /// disp, sign-extended, then truncated to the address size.
    Absolute,
    /// `imm`: the whole address stands in the instruction (moffs).
    Moffs,
    /// No memory operand.
    None,
}

/// One predecoded instruction.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Insn {
    /// What executes it.
    pub handler: Handler,
    /// Immediate, sign-extended as the instruction wants it; near branch displacements; `seg:off` of far pointers (offset in
    /// bits 0-31, selector in bits 32-47); ENTER's (imm16 in bits 0-15, imm8 in bits 16-23); moffs with [`Ea::Moffs`].
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: i32,
    /// iced's code of the instruction.
    pub code: Code,
    /// Length in bytes.
    pub len: u8,
    /// Operand size in bytes: 1, 2, 4, 8 of general instructions; the size of the memory operand of others, at most 255 (0: unknown).
    pub size: u8,
    /// [`insn_flag`] bits.
    pub flags: u8,
    /// Address size in bytes: 2, 4, 8.
    pub asize: u8,
    /// Effective operand size of the encoding (0x66, REX.W, mode): 2, 4, 8.
    pub osize: u8,
    /// Register of operand 0 (see `reg`); for 8-bit registers 16-19 mean AH, CH, DH, BH.
    pub r0: u8,
    /// Register of operand 1.
    pub r1: u8,
    /// Register of operand 2.
    pub r2: u8,
    /// Segment of the memory operand (also of string sources), with overrides applied.
    pub seg: Seg,
    /// Base register of the memory operand.
    pub base: u8,
    /// Index register of the memory operand.
    pub index: u8,
    /// log2 of the index's scale.
    pub scale: u8,
    /// How to compute the effective address.
    pub ea: Ea,
    /// The raw bytes; `len` of them count.
    pub bytes: [u8; 15],
    /// How the host executes it, for instructions of `native`.
    pub plan: Option<&'static native::Plan>,
}

impl Insn {
    /// An instruction that raises #UD.
    pub(crate) fn undefined() -> Insn {
        Insn {
            handler: undefined,
            imm: 0,
            disp: 0,
            code: Code::INVALID,
            len: 1,
            size: 0,
            flags: insn_flag::END,
            asize: 8,
            osize: 4,
            r0: 0,
            r1: 0,
            r2: 0,
            seg: Seg::Ds,
            base: 0,
            index: 0,
            scale: 0,
            ea: Ea::None,
            bytes: [0; 15],
            plan: None,
        }
    }
    /// The raw bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or(&self.bytes)
    }
    /// Whether the instruction has any of these [`insn_flag`]s.
    #[inline(always)]
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
    /// Whether there is a memory operand.
    #[inline(always)]
    pub fn is_mem(&self) -> bool {
        self.flags & insn_flag::MEM != 0
    }
    /// Whether it raises #UD, perhaps because the model doesn't have it.
    pub(crate) fn is_undefined(&self) -> bool {
        std::ptr::fn_addr_eq(self.handler, undefined as Handler)
    }
    /// iced's form of the instruction, as if it stood at `rip`: for cold paths.
    pub fn iced(&self, bits: u32, rip: u64) -> Instruction {
        Decoder::with_ip(bits, self.bytes(), rip, DecoderOptions::NONE).decode()
    }
}

/// Number of a register as the handlers use it: 0-15 general registers (any width), 16-19 AH CH DH BH, segment registers in
/// encoding order, other kinds their number.
pub fn register_number(r: Register) -> u8 {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => 16 + (r as u8 - Register::AH as u8),
        Register::None => 0,
        // Low bytes: iced counts SPL and the following behind BH.
        _ if r.is_gpr() => r.full_register().number() as u8,
        _ => r.number() as u8,
    }
}

/// What a block is decoded under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// 16, 32 or 64.
    pub bits: u32,
    /// Decode as AMD processors do.
    pub amd: bool,
}

/// The segment of the memory operand. In 64-bit mode only FS and GS override the default (SDM vol. 1 §3.4.2.1).
fn segment_of(i: &Instruction) -> Seg {
    if i.code_size() == CodeSize::Code64 && !matches!(i.segment_prefix(), Register::FS | Register::GS) {
        let stack = matches!(i.memory_base(), Register::RSP | Register::ESP | Register::RBP | Register::EBP);
        return if stack { Seg::Ss } else { Seg::Ds };
    }
    match i.memory_segment() {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

fn undefined(_cpu: &mut Cpu, _insn: &Insn) -> Exec {
    Err(Fault::ud())
}
fn too_long(_cpu: &mut Cpu, _insn: &Insn) -> Exec {
    Err(Fault::gp(0))
}

/// Handlers of instructions that are not in `exec`, by code: exec's own are chosen by form.
fn foreign_handler(code: Code) -> Option<Handler> {
    static TABLE: OnceLock<Vec<Option<Handler>>> = OnceLock::new();
    let table = TABLE.get_or_init(|| Code::values().map(|code| sys::handler(code)).collect());
    table.get(code as usize).copied().flatten()
}

/// Runs a handler of `sys` that reads or writes the arithmetic flags in `state.rflags`.
fn with_exact_flags(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let Some(handler) = foreign_handler(insn.code) else { return Err(Fault::ud()) };
    cpu.materialize_flags();
    cpu.settle();
    let result = handler(cpu, insn);
    cpu.adopt_flags();
    result
}

/// Decodes the instruction at the start of `bytes` (at most 15 are looked at; fewer when the page ends). None: more bytes are needed.
pub(crate) fn decode(bytes: &[u8], mode: Mode, model: &CpuModel) -> Option<Insn> {
    let bytes = bytes.get(..15).unwrap_or(bytes);
    let options = if mode.amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
    let mut decoder = Decoder::with_ip(mode.bits, bytes, 0, options);
    let i = decoder.decode();
    let mut insn = Insn {
        handler: undefined,
        imm: 0,
        disp: 0,
        code: i.code(),
        len: i.len() as u8,
        size: 0,
        flags: insn_flag::END,
        asize: (mode.bits / 8) as u8,
        osize: if mode.bits == 16 { 2 } else { 4 },
        r0: 0,
        r1: 0,
        r2: 0,
        seg: Seg::Ds,
        base: 0,
        index: 0,
        scale: 0,
        ea: Ea::None,
        bytes: [0; 15],
        plan: None,
    };
    if i.is_invalid() {
        if decoder.last_error() == DecoderError::NoMoreBytes {
            if bytes.len() < 15 && !(mode.amd && is_bare_ud(bytes, mode)) {
                return None;
            }
            if bytes.len() == 15 {
                insn.handler = too_long;
                insn.len = 15;
            }
        }
        insn.len = insn.len.max(1);
        copy_bytes(&mut insn, bytes);
        return Some(insn);
    }
    copy_bytes(&mut insn, bytes);
    fill_operands(&mut insn, &i, mode);
    if let Some(handler) = exec::whatever_the_model(&i, &mut insn, model) {
        insn.handler = handler;
        insn.flags &= !insn_flag::END;
        return Some(insn);
    }
    let features = i.code().cpuid_features();
    if !features.iter().all(|f| model.has(*f)) {
        return Some(insn);
    }
    if let Some((handler, end)) = exec::handler(&i, &insn, mode.amd) {
        insn.handler = handler;
        match end {
            exec::End::No => insn.flags &= !insn_flag::END,
            exec::End::Plain => insn.flags |= insn_flag::PLAIN,
            exec::End::System => {}
        }
    } else if let Some((handler, plan)) = native::prepare(&i, insn.bytes(), mode.bits) {
        insn.handler = handler;
        insn.plan = plan;
        if i.flow_control() == FlowControl::Next {
            insn.flags &= !insn_flag::END;
        }
    } else if foreign_handler(i.code()).is_some() {
        insn.handler = with_exact_flags;
    }
    Some(insn)
}

/// Whether the bytes begin with UD0 or UD1, which AMD processors raise #UD for without looking for a ModRM byte.
fn is_bare_ud(bytes: &[u8], mode: Mode) -> bool {
    let prefix = |b: &u8| {
        matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            || (mode.bits == 64 && b & 0xf0 == 0x40)
    };
    let n = bytes.iter().take_while(|b| prefix(b)).count();
    matches!(bytes.get(n..), Some([0x0f, 0xb9 | 0xff, ..]))
}

fn copy_bytes(insn: &mut Insn, bytes: &[u8]) {
    let n = usize::from(insn.len).min(bytes.len()).min(15);
    if let (Some(to), Some(from)) = (insn.bytes.get_mut(..n), bytes.get(..n)) {
        to.copy_from_slice(from);
    }
}

/// Looks for the prefixes that iced only shows through their effect.
pub(crate) fn prefix_bytes(insn: &Insn, mode: Mode) -> (bool, bool, bool) {
    let (mut o, mut a, mut w) = (false, false, false);
    for &b in insn.bytes() {
        match b {
            0x66 => (o, w) = (true, false),
            0x67 => (a, w) = (true, false),
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf0 | 0xf2 | 0xf3 => w = false,
            0x40..=0x4f if mode.bits == 64 => w = b & 8 != 0,
            _ => break,
        }
    }
    (o, a, w)
}

fn fill_operands(insn: &mut Insn, i: &Instruction, mode: Mode) {
    let (o, a, w) = prefix_bytes(insn, mode);
    insn.osize = match (mode.bits, o, w) {
        (64, _, true) => 8,
        (16, false, _) => 2,
        (16, true, _) | (_, false, _) => 4,
        (_, true, _) => 2,
    };
    insn.asize = match (mode.bits, a) {
        (64, false) => 8,
        (16, false) | (32, true) => 2,
        _ => 4,
    };
    if mode.bits == 64 {
        insn.flags |= insn_flag::LONG;
    }
    if i.has_lock_prefix() {
        insn.flags |= insn_flag::LOCK;
    }
    if i.has_rep_prefix() {
        insn.flags |= insn_flag::REP;
    }
    if i.has_repne_prefix() {
        insn.flags |= insn_flag::REPNE;
    }
    let mut registers = [0_u8; 3];
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                if let Some(r) = registers.get_mut(n as usize) {
                    *r = register_number(i.op_register(n));
                }
                if n == 0 {
                    insn.size = i.op_register(0).size().min(255) as u8;
                }
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                // Relative to the next instruction: the block may be mapped anywhere.
                let target = i.near_branch_target().wrapping_sub(i.len() as u64);
                insn.imm = match i.op_kind(n) {
                    OpKind::NearBranch16 => target as i16 as u64,
                    OpKind::NearBranch32 => target as i32 as u64,
                    _ => target,
                };
            }
            OpKind::FarBranch16 => {
                insn.imm = u64::from(i.far_branch16()) | u64::from(i.far_branch_selector()) << 32;
            }
            OpKind::FarBranch32 => {
                insn.imm = u64::from(i.far_branch32()) | u64::from(i.far_branch_selector()) << 32;
            }
            OpKind::Immediate8_2nd => insn.imm |= u64::from(i.immediate8_2nd()) << 16,
            OpKind::Memory => fill_memory(insn, i),
            OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI => {
                insn.seg = segment_of(i);
                if n == 0 || insn.size == 0 {
                    insn.size = i.memory_size().size().min(255) as u8;
                }
            }
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => {
                if n == 0 {
                    insn.size = i.memory_size().size().min(255) as u8;
                }
            }
            _ => insn.imm |= i.try_immediate(n).unwrap_or(0),
        }
    }
    [insn.r0, insn.r1, insn.r2] = registers;
    if insn.size == 0 {
        insn.size = i.memory_size().size().min(255) as u8;
    }
}

fn fill_memory(insn: &mut Insn, i: &Instruction) {
    insn.flags |= insn_flag::MEM;
    insn.seg = segment_of(i);
    insn.disp = i.memory_displacement64() as i32;
    insn.scale = i.memory_index_scale().trailing_zeros() as u8;
    let (base, index) = (i.memory_base(), i.memory_index());
    if matches!(
        i.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    ) {
        insn.ea = Ea::Moffs;
        insn.imm = i.memory_displacement64();
        return;
    }
    if base == Register::RIP || base == Register::EIP {
        // iced gives the target; the instruction was decoded at address 0.
        insn.disp = (i.memory_displacement64() as u32).wrapping_sub(i.len() as u32) as i32;
        insn.ea = if base == Register::RIP { Ea::Rip64 } else { Ea::Rip32 };
        return;
    }
    insn.base = register_number(base);
    // Vector indices (gathers) keep their own number; their handlers compute the addresses.
    insn.index = register_number(index);
    insn.ea = match (base != Register::None, index != Register::None, insn.asize) {
        (true, false, 8) => Ea::Base64,
        (true, true, 8) => Ea::BaseIndex64,
        (false, true, 8) => Ea::Index64,
        (true, false, 4) => Ea::Base32,
        (true, true, 4) => Ea::BaseIndex32,
        (false, true, 4) => Ea::Index32,
        (true, false, _) => Ea::Base16,
        (true, true, _) => Ea::BaseIndex16,
        (false, false, _) => Ea::Absolute,
        (false, true, _) => Ea::BaseIndex16,
    };
}
