//! Branches, calls and returns.

use super::{Guest, Translator, guard, pinned};
use crate::jit::asm::{M, r};
use crate::jit::stubs::{self, ColdKind, gpr};
use crate::native::mem::TARGET_TABLE;
use iced_x86::{Instruction, OpKind};

impl Translator<'_> {
    /// A near branch of the mode's size.
    pub(super) fn near(&self, i: &Instruction) -> bool {
        i.op_kind(0) == if self.mode.bits() == 64 { OpKind::NearBranch64 } else { OpKind::NearBranch32 }
    }

    /// T1 = the target of an indirect branch.
    pub(super) fn branch_operand(&mut self, g: &Guest, word: usize) -> bool {
        let wide = word == 8;
        if g.iced.op_kind(0) == OpKind::Memory {
            if !self.operand(g, word, 1, false) {
                return false;
            }
            self.a.load(wide, r::T1, M::Base(r::T1, 0));
            return true;
        }
        self.clobber();
        let n = g.iced.op_register(0).number() as u8;
        match pinned(n) {
            Some(host) => self.a.rr(wide, &[0x8b], r::T1, host),
            None => self.a.load(wide, r::T1, gpr(n.into())),
        }
        true
    }

    /// Goes to the linear address in T1.
    pub(super) fn indirect(&mut self, g: &Guest) {
        self.refund_all();
        let site = self.site(g, false, 0);
        self.known_target(site, false);
    }

    /// Looks in the window's table where the code for the linear address in T1 is, and jumps or calls there: a branch instruction of its own for
    /// each place, which is predicted better than one for all.
    fn known_target(&mut self, site: u32, call: bool) {
        stubs::target_index(&mut self.a);
        let slot = |at: i32| M::Gs(Some(r::T0), TARGET_TABLE as i32 + at);
        self.a.rm(true, &[0x3b], r::T1, slot(0)); // cmp r11, gs:[..]
        let from = self.a.jcc(5);
        self.a.rm(false, &[0xff], if call { 2 } else { 4 }, slot(8));
        let back = call.then(|| self.a.pos());
        self.cold(from, ColdKind::Target { site, back });
    }

    /// Gives back what comes after this instruction.
    pub(super) fn refund_all(&mut self) {
        let refund = self.count - (self.index + 1);
        if refund > 0 {
            self.a.lea(true, r::LEFT, M::Base(r::LEFT, refund.into()));
        }
    }

    pub(super) fn call(&mut self, g: &Guest, target: Option<u64>, word: usize) {
        let wide = word == 8;
        self.stack_write(g, word);
        if wide && target.is_none() {
            // Should the target turn out not to be canonical, nothing may have been pushed.
            self.a.load(true, r::T0, M::Base(r::T1, 0));
            self.a.store(true, ctx!(below), r::T0);
        }
        let back = if wide { g.next() } else { g.next() & 0xffff_ffff };
        self.a.mov_imm(r::T0, back);
        self.a.store(wide, M::Base(r::T1, 0), r::T0);
        self.a.lea(wide, r::SP, M::Base(r::SP, -(word as i32)));
        self.refund_all();
        // The pair for the return: guest address, then the host's by the call itself.
        self.a.rm(true, &[0x3b], r::RSP, ctx!(stack_limit));
        let full = self.a.jcc(2);
        let after = self.a.pos();
        self.cold(full, ColdKind::Stack { back: after });
        self.a.b(&[0x41, 0x52]); // push r10
        match target {
            Some(target) => {
                let link = self.link(target);
                let f = self.a.call();
                self.bind_link(f, link, 0);
            }
            None => {
                let site = self.site(g, false, 0);
                self.a.load(true, r::T1, ctx!(tmp));
                self.known_target(site, true);
            }
        }
        // The way back, with the flags saved.
        let failed = guard(&mut self.a, g.rip, self.page);
        let link = self.link(back);
        let f = self.a.jmp();
        self.bind_link(f, link, 0);
        self.cold(failed, ColdKind::Link { link, flags_live: false });
    }

    pub(super) fn ret(&mut self, g: &Guest, word: usize) {
        let wide = word == 8;
        self.clobber();
        let retry = self.a.pos();
        self.a.rr(wide, &[0x8b], r::T1, r::SP);
        self.check(g, retry, word, 1, false);
        self.a.load(wide, r::T1, M::Base(r::T1, 0));
        let by = word as i32 + (g.insn.imm & 0xffff) as i32;
        self.a.lea(wide, r::SP, M::Base(r::SP, by));
        self.refund_all();
        let site = self.site(g, false, 0);
        self.a.mov_imm(r::T0, site.into());
        self.a.rm(true, &[0x3b], r::T1, M::Base(r::RSP, 8));
        let missed = self.a.jcc(5);
        self.a.b(&[0xc2, 8, 0]); // ret 8
        self.a.here(missed);
        self.a.jmp_abs(self.stubs.return_miss);
    }

    /// JRCXZ and JECXZ, which reach only 127 bytes.
    pub(super) fn count_branch(&mut self, i: &Instruction, short: bool) {
        if short {
            self.a.b(&[0x67]);
        }
        self.a.b(&[0xe3, 2, 0xeb, 5]); // jrcxz +2; jmp +5
        let f = self.a.jmp();
        self.side_edge(f, i.near_branch_target());
    }
}
