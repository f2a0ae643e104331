//! String moves and stores within a page on either side: the host's own instruction, with the host's addresses in its registers meanwhile.
//!
//! Whatever else they meet (page ends, pages not in the TLB, the direction flag) is the interpreter's, which goes by page spans.

use super::{Guest, Translator};
use crate::jit::asm::{M, r};
use crate::jit::stubs::ColdKind;
use crate::state::{CpuState, Seg};
use iced_x86::Mnemonic;
use std::mem::offset_of;

impl Translator<'_> {
    /// MOVS and STOS, with or without REP. False: another, or a form that is not translated.
    pub(super) fn string(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let copy = match i.mnemonic() {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => true,
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => false,
            _ => return false,
        };
        let wide = self.mode.bits() == 64;
        if !i.is_string_instruction()
            || usize::from(g.insn.asize) != self.mode.bits() as usize / 8
            || copy && (!self.flat(g.insn.seg) || matches!(g.insn.seg, Seg::Fs | Seg::Gs))
        {
            return false;
        }
        let size = i.memory_size().size() as i32;
        let shift = size.trailing_zeros() as u8;
        let repeated = i.has_rep_prefix() || i.has_repne_prefix();
        self.clobber();
        let site = self.site(g, true, 0);
        let interpret = |t: &mut Self, condition: u8| {
            let from = t.a.jcc(condition);
            t.cold(from, ColdKind::Interpret { site });
        };
        // DF
        self.a.load(true, r::T0, ctx!(state));
        self.a.rm_byte(&[0xf6], 0, M::Base(r::T0, offset_of!(CpuState, rflags) as i32 + 1), 4);
        interpret(self, 5);
        // At most a page, and the whole of it is looked at; an index that is not the address size's is as good as a large one.
        if repeated {
            self.a.alu_imm(wide, 7, r::RCX, 0x1000 >> shift);
            interpret(self, 7);
        }
        let span = |t: &mut Self, register: u8, write: bool| {
            t.a.rr(wide, &[0x8b], r::T1, register);
            let table = t.look_up(write);
            t.a.alu_imm(true, 7, r::T1, 0x1000 - size);
            interpret(t, 7);
            if repeated {
                // lea T0', [T1 + RCX * size]: the end, at most 0x1000. The index is needed again, so it goes by way of the context.
                t.a.store(true, ctx!(tmp), r::T0);
                t.a.lea(true, r::T0, M::Sib(Some(r::T1), Some((r::RCX, shift)), 0));
                t.a.alu_imm(true, 7, r::T0, 0x1000);
                interpret(t, 7);
                t.a.load(true, r::T0, ctx!(tmp));
            }
            t.a.rm(true, &[0x03], r::T1, M::Gs(Some(r::T0), table + 8));
            t.a.rr(true, &[0x2b], r::T1, register);
        };
        // The distances from the guest's addresses to the host's.
        if copy {
            span(self, r::RSI, false);
            self.a.store(true, ctx!(below), r::T1);
        }
        span(self, r::RDI, true);
        if repeated && !wide {
            self.a.rr(false, &[0x8b], r::RCX, r::RCX);
        }
        if copy {
            self.a.load(true, r::T0, ctx!(below));
            self.a.rr(true, &[0x03], r::RSI, r::T0);
        }
        self.a.rr(true, &[0x03], r::RDI, r::T1);
        if repeated {
            self.a.b(&[0xf3]);
        }
        if size == 2 {
            self.a.b(&[0x66]);
        } else if size == 8 {
            self.a.b(&[0x48]);
        }
        self.a.b(&[if copy { 0xa4 } else { 0xaa } | u8::from(size > 1)]);
        self.a.rr(true, &[0x2b], r::RDI, r::T1);
        if copy {
            self.a.rr(true, &[0x2b], r::RSI, r::T0);
        }
        if !wide {
            // Beyond 4 GiB they begin again.
            self.a.rr(false, &[0x8b], r::RDI, r::RDI);
            if copy {
                self.a.rr(false, &[0x8b], r::RSI, r::RSI);
            }
        }
        self.flags.host = false;
        true
    }
}
