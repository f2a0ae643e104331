//! Encoded instructions taken apart and put together with other registers (SDM vol. 2, chapter 2).

use super::asm::{Asm, M};
use iced_x86::{Instruction, OpCodeOperandKind as K};

/// Encoding forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Legacy prefixes, REX (0x40 when absent), number of escape bytes and the second one.
    Legacy { rex: u8, escapes: u8, escape: u8 },
    /// VEX payload of the three-byte form.
    Vex([u8; 2]),
    /// EVEX payload.
    Evex([u8; 3]),
}

/// The parts of an instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    pub lock: bool,
    p66: bool,
    repeat: u8,
    pub form: Form,
    opcode: u8,
    modrm: Option<u8>,
    immediate: [u8; 8],
    immediate_len: u8,
}

/// Where an operand is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Reg,
    Rm,
    Vvvv,
    Opcode,
    /// A register that the opcode implies, an immediate, or a vector register: stays as it is.
    Fixed,
}

/// What an operand is, by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Gpr(Place),
    /// ModRM.rm, a general register or memory.
    GprOrMemory,
    /// ModRM.rm, a vector or opmask register or memory.
    VectorOrMemory,
    Memory,
    Vector,
    Fixed,
    Other,
}

pub(super) fn what(k: K) -> What {
    match k {
        K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem => What::GprOrMemory,
        K::mm_or_mem | K::xmm_or_mem | K::ymm_or_mem | K::zmm_or_mem | K::k_or_mem => What::VectorOrMemory,
        K::mem => What::Memory,
        K::r8_reg | K::r16_reg | K::r32_reg | K::r64_reg => What::Gpr(Place::Reg),
        K::r16_rm | K::r32_rm | K::r64_rm => What::Gpr(Place::Rm),
        K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => What::Gpr(Place::Opcode),
        K::r32_vvvv | K::r64_vvvv => What::Gpr(Place::Vvvv),
        K::k_reg
        | K::kp1_reg
        | K::k_rm
        | K::k_vvvv
        | K::mm_reg
        | K::mm_rm
        | K::xmm_reg
        | K::xmm_rm
        | K::xmm_vvvv
        | K::xmm_is4
        | K::ymm_reg
        | K::ymm_rm
        | K::ymm_vvvv
        | K::ymm_is4
        | K::zmm_reg
        | K::zmm_rm
        | K::zmm_vvvv => What::Vector,
        K::al
        | K::cl
        | K::ax
        | K::dx
        | K::eax
        | K::rax
        | K::imm8
        | K::imm8_const_1
        | K::imm8sex16
        | K::imm8sex32
        | K::imm8sex64
        | K::imm16
        | K::imm32
        | K::imm32sex64
        | K::imm64 => What::Fixed,
        _ => What::Other,
    }
}

/// Takes an instruction apart that was decoded successfully. None: a form that isn't translated.
pub(super) fn split(bytes: &[u8], bits: u32, i: &Instruction, immediate_size: usize) -> Option<Parts> {
    let mut at = 0;
    let mut p = Parts {
        lock: false,
        p66: false,
        repeat: 0,
        form: Form::Legacy { rex: 0x40, escapes: 0, escape: 0 },
        opcode: 0,
        modrm: None,
        immediate: [0; 8],
        immediate_len: 0,
    };
    let mut asize = false;
    let byte = |at: usize| bytes.get(at).copied();
    loop {
        match byte(at)? {
            0x66 => p.p66 = true,
            b @ (0xf2 | 0xf3) => p.repeat = b,
            0xf0 => p.lock = true,
            0x67 => asize = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
            _ => break,
        }
        at += 1;
    }
    let mut rex = 0x40;
    let mut rex_at = 0;
    if bits == 64 && byte(at)? & 0xf0 == 0x40 {
        rex_at = 1;
        rex = byte(at)?;
        at += 1;
    }
    match byte(at)? {
        0xc4 if bits == 64 || byte(at + 1)? >= 0xc0 => {
            p.form = Form::Vex([byte(at + 1)?, byte(at + 2)?]);
            at += 3;
        }
        0xc5 if bits == 64 || byte(at + 1)? >= 0xc0 => {
            let b = byte(at + 1)?;
            p.form = Form::Vex([b & 0x80 | 0x61, b & 0x7f]);
            at += 2;
        }
        0x62 if bits == 64 || byte(at + 1)? >= 0xc0 => {
            p.form = Form::Evex([byte(at + 1)?, byte(at + 2)?, byte(at + 3)?]);
            at += 4;
        }
        0x0f => {
            let e = byte(at + 1)?;
            if matches!(e, 0x38 | 0x3a) {
                p.form = Form::Legacy { rex, escapes: 2, escape: e };
                at += 2;
            } else {
                p.form = Form::Legacy { rex, escapes: 1, escape: 0 };
                at += 1;
            }
        }
        // More than one REX, or prefixes after one, which void it: left to the interpreter.
        0x40..=0x4f if rex_at > 0 => return None,
        0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 => return None,
        _ => p.form = Form::Legacy { rex, escapes: 0, escape: 0 },
    }
    p.opcode = byte(at)?;
    if p.opcode == 0x82 && matches!(p.form, Form::Legacy { escapes: 0, .. }) {
        // The old alias of 80.
        p.opcode = 0x80;
    }
    at += 1;
    let len = i.len();
    let immediate_at = if len > at + immediate_size {
        let modrm = byte(at)?;
        p.modrm = Some(modrm);
        at += 1;
        let (mode, rm) = (modrm >> 6, modrm & 7);
        if mode != 3 {
            if bits == 32 && asize {
                return None;
            }
            let sib = rm == 4;
            let base = if sib { byte(at)? & 7 } else { rm };
            at += usize::from(sib)
                + match (mode, base) {
                    (0, 5) | (2, _) => 4,
                    (0, _) => 0,
                    _ => 1,
                };
        }
        at
    } else {
        at
    };
    let tail = bytes.get(immediate_at..len)?;
    p.immediate.get_mut(..tail.len())?.copy_from_slice(tail);
    if bits == 32 {
        eight_registers(&mut p, i);
    }
    p.immediate_len = tail.len() as u8;
    Some(p)
}

/// Outside of 64-bit mode there are eight registers: the bits that would choose others are ignored in VEX and EVEX prefixes and in
/// immediates that name a register (SDM vol. 2 §2.3.5, §2.7.11). Here they are cleared (the prefixes hold them inverted).
fn eight_registers(p: &mut Parts, i: &Instruction) {
    match &mut p.form {
        Form::Legacy { .. } => {}
        Form::Vex([b1, b2]) => {
            *b1 |= 0xe0;
            *b2 |= 0x40;
        }
        Form::Evex([b1, b2, b3]) => {
            *b1 |= 0xf0;
            *b2 |= 0x40;
            *b3 |= 0x08;
        }
    }
    let named = |k: &K| matches!(k, K::xmm_is4 | K::ymm_is4);
    if i.code().op_code().op_kinds().iter().any(named) {
        p.immediate[0] &= 0x7f;
    }
}

/// What ModRM.rm becomes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rm {
    /// What it was: a vector register, or no ModRM.
    Keep,
    /// A general register.
    Reg(u8),
    /// Memory.
    Memory(M),
}

/// New registers for an instruction; None keeps what stands there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patch {
    pub reg: Option<u8>,
    pub rm: Rm,
    pub vvvv: Option<u8>,
    pub opcode: Option<u8>,
    /// A REX prefix must be there, for SPL and its like.
    pub rex: bool,
    /// W doesn't count (general registers outside of 64-bit mode).
    pub clear_w: bool,
}

impl Patch {
    pub(super) const KEEP: Patch =
        Patch { reg: None, rm: Rm::Keep, vvvv: None, opcode: None, rex: false, clear_w: false };
}

/// Puts the instruction together again.
pub(super) fn emit(a: &mut Asm, p: &Parts, patch: Patch) {
    let tail = usize::from(p.immediate_len);
    let memory = match patch.rm {
        Rm::Memory(m) => Some(m),
        _ => None,
    };
    let xb = match patch.rm {
        Rm::Keep => None,
        Rm::Reg(n) => Some(n >> 3),
        Rm::Memory(m) => Some(Asm::rex_of(m)),
    };
    match p.form {
        Form::Legacy { rex, escapes, escape } => {
            if p.lock {
                a.b(&[0xf0]);
            }
            if p.p66 {
                a.b(&[0x66]);
            }
            if p.repeat != 0 {
                a.b(&[p.repeat]);
            }
            let mut rex = rex;
            if let Some(reg) = patch.reg {
                rex = rex & !4 | reg >> 3 << 2;
            }
            if let Some(xb) = xb {
                rex = rex & !3 | xb;
            }
            if let Some(n) = patch.opcode {
                rex = rex & !1 | n >> 3;
            }
            if rex != 0x40 || patch.rex {
                a.b(&[rex]);
            }
            match escapes {
                0 => {}
                1 => a.b(&[0x0f]),
                _ => a.b(&[0x0f, escape]),
            }
        }
        Form::Vex([mut b1, mut b2]) => {
            if let Some(reg) = patch.reg {
                b1 = b1 & 0x7f | (!reg >> 3 & 1) << 7;
            }
            if let Some(xb) = xb {
                b1 = b1 & 0x9f | (!xb & 3) << 5;
            }
            if let Some(v) = patch.vvvv {
                b2 = b2 & 0x87 | (!v & 15) << 3;
            }
            if patch.clear_w {
                b2 &= 0x7f;
            }
            a.b(&[0xc4, b1, b2]);
        }
        Form::Evex([mut b1, b2, mut b3]) => {
            if let Some(reg) = patch.reg {
                b1 = b1 & 0x6f | (!reg >> 3 & 1) << 7 | 0x10;
            }
            if let Some(xb) = xb {
                b1 = b1 & 0x9f | (!xb & 3) << 5;
                let _ = &mut b3;
            }
            a.b(&[0x62, b1, b2, b3]);
        }
    }
    let opcode = patch.opcode.map_or(p.opcode, |n| p.opcode & !7 | n & 7);
    a.b(&[opcode]);
    if let Some(modrm) = p.modrm {
        let reg = patch.reg.map_or(modrm >> 3 & 7, |r| r & 7);
        match (patch.rm, memory) {
            (_, Some(m)) => a.modrm_mem(reg, m, tail),
            (Rm::Reg(n), _) => a.b(&[0xc0 | reg << 3 | n & 7]),
            _ => a.b(&[modrm & 0xc7 | reg << 3]),
        }
    }
    a.b(p.immediate.get(..tail).unwrap_or(&[]));
}
