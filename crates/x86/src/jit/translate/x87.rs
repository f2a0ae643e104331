//! x87 and MMX instructions, on the host's registers.
//!
//! The guest's x87 state stays in the host's registers from unit to unit, as it does between interpreted instructions (`native::x87`): units
//! with such instructions look whether it is there at their start, and have it loaded if not. It is never there with an exception unmasked,
//! so nothing here can raise one; guests that unmask some have these units interpreted. What FNSTENV shows of the last
//! instruction (SDM vol. 1 §8.1.8) is a *note*: its number is stored before anything that may leave generated code.

use super::flags::flag_use;
use super::{Guest, Translator};
use crate::decode::Insn;
use crate::jit::ModeKey;
use crate::jit::asm::{M, r};
use crate::jit::stubs::ColdKind;
use crate::native::plan::{self, Class};
use crate::state::{CpuState, X87};
use iced_x86::{Code, CpuidFeature as F, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use std::mem::offset_of;

/// What FNSTENV shows of an instruction, but for its data pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jit) struct Note {
    pub rip: u64,
    /// The lower bits of the first opcode byte, and the second one.
    pub opcode: u16,
}

/// A unit's notes.
#[derive(Debug)]
pub(super) struct Notes {
    pub(super) list: Vec<Note>,
    /// The number of the first.
    first: u32,
    /// To be stored before anything that may leave generated code.
    pending: Option<Note>,
}

impl Notes {
    pub(super) fn new(first: u32) -> Notes {
        Notes { list: Vec::new(), first, pending: None }
    }
}

/// Opcode bytes as FNSTENV has them.
fn opcode(insn: &Insn) -> Option<[u8; 2]> {
    insn.bytes().windows(2).find_map(|p| matches!(p, [0xd8..=0xdf, _]).then(|| [p[0], p[1]]))
}

/// Control instructions with sequences of their own.
fn control(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Wait
            | Code::Fnclex
            | Code::Fnstcw_m2byte
            | Code::Fldcw_m2byte
            | Code::Fnstsw_m2byte
            | Code::Fnstsw_AX
    )
}

/// An instruction of the x87 that the interpreter executes on the host's, too.
pub(super) fn arithmetic(i: &Instruction) -> bool {
    // The shorter question first.
    matches!(i.cpuid_features().first(), Some(F::FPU | F::FPU287 | F::FPU387))
        && plan::class_of(i.code()) == Some(Class::X87)
        && !control(i)
        && !matches!(
            i.mnemonic(),
            Mnemonic::Fninit
                | Mnemonic::Fneni
                | Mnemonic::Fndisi
                | Mnemonic::Fnsetpm
                | Mnemonic::Frstpm
                | Mnemonic::Fnstenv
                | Mnemonic::Fldenv
                | Mnemonic::Fnsave
                | Mnemonic::Frstor
        )
}

/// MMX registers are named, or it is EMMS.
pub(super) fn mmx(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Emms
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
}

impl Translator<'_> {
    /// Whether the instruction needs the guest's x87 state in the host's registers.
    pub(super) fn wants_x87(&self, g: &Guest) -> bool {
        let i = &g.iced;
        self.mode.has(ModeKey::X87)
            && !super::undefined_here(g)
            && (arithmetic(i)
                || control(i) && i.code() != Code::Wait
                || i.mnemonic() == Mnemonic::Emms
                || mmx(i) && self.class(g).is_some())
    }

    /// At a unit's start: the state must be in the host's registers.
    pub(super) fn test_x87(&mut self, g: &Guest) {
        let at = offset_of!(crate::Cpu, x87_live) as i32;
        self.a.load(true, r::T0, ctx!(cpu));
        self.a.cmp_mem_byte(M::Base(r::T0, at), 0);
        let from = self.a.jcc(4);
        let back = self.a.pos();
        let site = self.site(g, false, 0);
        self.cold(from, ColdKind::X87 { site, back });
    }

    /// An instruction of the x87. None: it isn't one of those translated.
    pub(super) fn x87(&mut self, g: &Guest) -> Option<bool> {
        let i = &g.iced;
        if !self.mode.has(ModeKey::X87) {
            return None;
        }
        match i.code() {
            // With all exceptions masked none is ever pending; but the state may be elsewhere, with some unmasked.
            Code::Wait => return self.x87_here.then_some(true),
            Code::Emms => {
                self.a.b(&[0x0f, 0x77]);
                return Some(true);
            }
            Code::Fnclex | Code::Fnstsw_AX => {
                self.a.b(&opcode(&g.insn)?);
                return Some(true);
            }
            Code::Fnstcw_m2byte | Code::Fnstsw_m2byte => {
                if !self.operand(g, 2, 1, true) {
                    return None;
                }
                let [first, second] = opcode(&g.insn)?;
                self.a.rm(false, &[first], second >> 3 & 7, M::Base(r::T1, 0));
                return Some(true);
            }
            Code::Fldcw_m2byte => return self.load_control(g).then_some(true),
            _ if arithmetic(i) => {}
            _ => return None,
        }
        let [first, second] = opcode(&g.insn)?;
        let (reads, modified) = flag_use(i);
        let memory = i.op_count() > 0 && (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory {
            let write = i.op_kind(0) == OpKind::Memory && stores(i);
            let m = self.operand_at(g, i.memory_size().size(), 1, write)?;
            let from = self.a.pos();
            self.a.rm(false, &[first], second >> 3 & 7, m);
            if !self.same(i, from) {
                self.a.buf.truncate(from);
                return None;
            }
            // The offset again, now that the access is done. It may need both scratch registers.
            self.groups.let_go();
            if !self.offset(g) {
                return None;
            }
            self.a.store(true, ctx!(fpu_data), r::T1);
            // Each time: when the instruction before was interpreted, only the state knows its segment.
            self.a.store_imm(false, ctx!(fpu_segment), g.insn.seg as i32);
        } else {
            if reads {
                self.restore();
            }
            let from = self.a.pos();
            self.a.b(&[first, second]);
            if !self.same(i, from) {
                self.a.buf.truncate(from);
                return None;
            }
            if modified != 0 {
                self.set_live();
            }
        }
        self.notes.pending = Some(Note { rip: g.rip, opcode: u16::from(first & 7) << 8 | u16::from(second) });
        Some(true)
    }

    /// Whether what was emitted from there on is the instruction.
    fn same(&self, i: &Instruction, from: usize) -> bool {
        let emitted = self.a.buf.get(from..).unwrap_or(&[]);
        let again = Decoder::new(64, emitted, DecoderOptions::NONE).decode();
        again.code() == i.code() && again.len() == emitted.len()
    }

    /// Stores the pending note, unless the instruction to come leaves generated code by no way and replaces it.
    pub(super) fn settle_note(&mut self, coming: Option<&Guest>) {
        let Some(note) = self.notes.pending else { return };
        if coming.is_some_and(|g| {
            arithmetic(&g.iced) && (0..g.iced.op_count()).all(|n| g.iced.op_kind(n) != OpKind::Memory)
        }) {
            return;
        }
        self.notes.pending = None;
        let n = self.notes.first + self.notes.list.len() as u32;
        self.notes.list.push(note);
        // 0 is none.
        self.a.store_imm(false, ctx!(fpu_note), (n + 1) as i32);
    }

    /// FLDCW: a control word that unmasks something is the interpreter's.
    fn load_control(&mut self, g: &Guest) -> bool {
        if !self.operand(g, 2, 1, false) {
            return false;
        }
        self.a.rm(false, &[0x0f, 0xb7], r::T0, M::Base(r::T1, 0)); // movzx r10d, word [r11]
        let site = self.site(g, true, 0);
        // The bits that the register has (`native::x87`).
        self.a.alu_imm(false, 4, r::T0, 0x1f3f);
        self.a.alu_imm(false, 1, r::T0, 0x40);
        self.a.store(true, ctx!(tmp), r::T0);
        self.a.rr(false, &[0xf7], 2, r::T0); // not r10d
        self.a.b(&[0x41, 0xf6, 0xc2, 0x3f]); // test r10b, 0x3f
        let from = self.a.jcc(5);
        self.cold(from, ColdKind::Interpret { site });
        self.a.rm(false, &[0xd9], 5, ctx!(tmp));
        // The interpreter's FNSTCW looks there.
        self.a.load(false, r::T0, ctx!(tmp));
        self.a.load(true, r::T1, ctx!(state));
        let fcw = offset_of!(CpuState, x87) + offset_of!(X87, fcw);
        self.a.b(&[0x66]);
        self.a.store(false, M::Base(r::T1, fcw as i32), r::T0);
        true
    }
}

/// A memory operand that is written.
pub(super) fn stores(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp)
}
