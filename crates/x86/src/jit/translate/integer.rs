//! Integer and stack instructions that need a sequence of their own.

use super::flags::SAVED;
use super::{Guest, Translator, pinned};
use crate::decode::{Ea, Insn};
use crate::jit::asm::{M, r};
use crate::jit::context::pack_flags;
use crate::jit::stubs::{ColdKind, gpr};
use iced_x86::{Instruction, Mnemonic, OpKind};

impl Translator<'_> {
    /// MOV between general registers of which one or both live in memory, or both are pinned and 32 or 64 bits wide.
    pub(super) fn move_register(&mut self, i: &Instruction) -> bool {
        let (to, from) = (i.op_register(0), i.op_register(1));
        if !to.is_gpr() || !from.is_gpr() || to.size() != from.size() || to.size() < 4 {
            return false;
        }
        let wide = to.size() == 8;
        let (to, from) = (to.number() as u8, from.number() as u8);
        match (pinned(to), pinned(from)) {
            (Some(a), Some(b)) => self.a.rr(wide, &[0x8b], a, b),
            (Some(a), None) => self.a.load(wide, a, gpr(from.into())),
            (None, Some(b)) if wide => self.a.store(true, gpr(to.into()), b),
            (None, b) => {
                match b {
                    Some(b) => self.a.rr(wide, &[0x8b], r::T0, b),
                    None => self.a.load(wide, r::T0, gpr(from.into())),
                }
                self.a.store(true, gpr(to.into()), r::T0);
            }
        }
        true
    }

    pub(super) fn moffs(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let load = i.op_kind(0) == OpKind::Register;
        let size = usize::from(g.insn.size);
        if !self.operand(g, size, 1, !load) {
            return false;
        }
        let m = M::Base(r::T1, 0);
        if size == 2 {
            self.a.b(&[0x66]);
        }
        let opcode = if load { 0x8a } else { 0x88 } | u8::from(size != 1);
        self.a.rm(size == 8, &[opcode], r::RAX, m);
        true
    }

    pub(super) fn lea(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let size = i.op_register(0).size();
        let n = i.op_register(0).number() as u8;
        let wide = size == 8;
        if size == 2 || g.insn.asize == 2 {
            return false;
        }
        let host = pinned(n);
        let to = host.unwrap_or(r::T0);
        let disp = g.insn.disp as i64 as u64;
        let constant = match g.insn.ea {
            Ea::Rip64 => Some(g.next().wrapping_add(disp)),
            Ea::Rip32 => Some(g.next().wrapping_add(disp) & 0xffff_ffff),
            Ea::Absolute if g.insn.asize == 8 => Some(disp),
            Ea::Absolute => Some(disp & 0xffff_ffff),
            _ => None,
        };
        match constant {
            Some(v) => self.a.mov_imm(to, if wide { v } else { v & 0xffff_ffff }),
            None => {
                let m = self.address(g);
                // A 32-bit address is cut, whatever the operand's size.
                self.a.lea(wide && g.insn.asize == 8, to, m);
            }
        }
        if host.is_none() {
            self.a.store(true, gpr(n.into()), to);
        }
        true
    }

    pub(super) fn push(&mut self, g: &Guest, word: usize) -> bool {
        let i = &g.iced;
        let wide = word == 8;
        if i.op_kind(0) == OpKind::Memory {
            if !self.operand(g, word, 1, false) {
                return false;
            }
            self.a.load(wide, r::T1, M::Base(r::T1, 0));
            self.a.store(true, ctx!(tmp), r::T1);
            self.stack_write(g, word);
            self.a.load(true, r::T0, ctx!(tmp));
            self.a.store(wide, M::Base(r::T1, 0), r::T0);
        } else {
            self.stack_write(g, word);
            let m = M::Base(r::T1, 0);
            if i.op_kind(0) == OpKind::Register {
                let n = i.op_register(0).number() as u8;
                let from = pinned(n).unwrap_or_else(|| {
                    self.a.load(true, r::T0, gpr(n.into()));
                    r::T0
                });
                self.a.store(wide, m, from);
            } else {
                self.a.store_imm(wide, m, g.insn.imm as i32);
            }
        }
        self.a.lea(wide, r::SP, M::Base(r::SP, -(word as i32)));
        true
    }

    pub(super) fn pop(&mut self, g: &Guest, word: usize) {
        let wide = word == 8;
        self.clobber();
        let retry = self.a.pos();
        self.a.rr(wide, &[0x8b], r::T1, r::SP);
        self.check(g, retry, word, 1, false);
        let n = g.iced.op_register(0).number() as u8;
        let m = M::Base(r::T1, 0);
        if n == 4 {
            self.a.load(wide, r::SP, m);
            return;
        }
        match pinned(n) {
            Some(host) => self.a.load(wide, host, m),
            None => {
                self.a.load(wide, r::T0, m);
                self.a.store(true, gpr(n.into()), r::T0);
            }
        }
        self.a.lea(wide, r::SP, M::Base(r::SP, word as i32));
    }

    /// DIV and IDIV of 32 and 64 bits, when a look at the operands says that they don't fault; else the interpreter does it.
    pub(super) fn divide(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let size = usize::from(g.insn.size);
        if size < 4 {
            return false;
        }
        let wide = size == 8;
        if i.op_kind(0) == OpKind::Memory {
            if !self.operand(g, size, 1, false) {
                return false;
            }
            self.a.load(wide, r::T1, M::Base(r::T1, 0));
        } else {
            self.clobber();
            let n = i.op_register(0).number() as u8;
            match pinned(n) {
                Some(host) => self.a.rr(wide, &[0x8b], r::T1, host),
                None => self.a.load(wide, r::T1, gpr(n.into())),
            }
        }
        let site = self.site(g, true, 0);
        let signed = i.mnemonic() == Mnemonic::Idiv;
        if signed {
            // The dividend is an extended lower half, and the divisor neither 0 nor -1.
            self.a.rr(wide, &[0x8b], r::T0, r::RAX);
            self.a.rr(wide, &[0xc1], 7, r::T0);
            self.a.b(&[if wide { 63 } else { 31 }]);
            self.a.rr(wide, &[0x3b], r::T0, r::RDX);
            let f = self.a.jcc(5);
            self.cold(f, ColdKind::Interpret { site });
            self.a.lea(wide, r::T0, M::Base(r::T1, 1));
            self.a.alu_imm(wide, 7, r::T0, 1);
            let f = self.a.jcc(6);
            self.cold(f, ColdKind::Interpret { site });
        } else {
            self.a.rr(wide, &[0x3b], r::RDX, r::T1);
            let f = self.a.jcc(3);
            self.cold(f, ColdKind::Interpret { site });
        }
        self.a.rr(wide, &[0xf7], if signed { 7 } else { 6 }, r::T1);
        // Undefined; the interpreter has AF alone set, as recent AMD processors do.
        self.a.store_imm(false, ctx!(flags), pack_flags(crate::state::flag::AF) as i32);
        self.flags = SAVED;
        true
    }
}

pub(super) trait PushForm {
    fn seg_like_push(&self, i: &Instruction, word: usize) -> bool;
}

impl PushForm for Insn {
    /// PUSH of a register, memory or immediate of the stack's own width.
    fn seg_like_push(&self, i: &Instruction, word: usize) -> bool {
        let register = i.op_kind(0) == OpKind::Register;
        (!register || i.op_register(0).is_gpr())
            && i.stack_pointer_increment().unsigned_abs() as usize == word
            && (i.op_kind(0) != OpKind::Memory || i.memory_size().size() == word)
    }
}
