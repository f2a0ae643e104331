//! What a kernel does all the time with the system's state: interrupt and direction flags, segment selectors, SWAPGS, PUSHF. At privilege level 0 of
//! 64-bit mode these can't fault but by their memory operands, so they are done in place (SDM vol. 2, their pages).

use super::super::asm::{M, r};
use super::super::stubs::{ColdKind, gpr};
use super::{Guest, ModeKey, SAVED, Translator, pinned};
use crate::cpu::{Cpu, FastSegment};
use crate::state::{CpuState, Msrs, Seg, Segment, flag};
use iced_x86::{Mnemonic, OpKind, Register};
use std::mem::offset_of;

/// A field of the processor's state, whose address is in a register.
fn state(base: u8, at: usize) -> M {
    M::Base(base, at as i32)
}
const RFLAGS: usize = offset_of!(CpuState, rflags);
const GS_BASE: usize =
    offset_of!(CpuState, seg) + Seg::Gs as usize * size_of::<Segment>() + offset_of!(Segment, base);
const KERNEL_GS: usize = offset_of!(CpuState, msr) + offset_of!(Msrs, kernel_gs_base);
const FAST_GS: usize =
    offset_of!(Cpu, segc) + Seg::Gs as usize * size_of::<FastSegment>() + offset_of!(FastSegment, base);

impl Translator<'_> {
    /// Translates a system instruction. None: not one that is done here.
    pub(super) fn system(&mut self, g: &Guest) -> Option<bool> {
        let i = &g.iced;
        match i.mnemonic() {
            Mnemonic::Mov if self.mode.bits() == 64 => return self.selector(g),
            Mnemonic::Cld => {
                self.clobber();
                self.and_rflags(!flag::DF);
                return Some(true);
            }
            _ => {}
        }
        if !self.mode.has(ModeKey::KERNEL) {
            return None;
        }
        match i.mnemonic() {
            Mnemonic::Cli => {
                self.clobber();
                self.and_rflags(!flag::IF);
            }
            Mnemonic::Sti => return self.sti(g),
            Mnemonic::Swapgs => self.swapgs(),
            Mnemonic::Pushfq => self.pushf(g),
            _ => return None,
        }
        Some(true)
    }

    /// Flags that can be cleared without anybody having to look.
    fn and_rflags(&mut self, mask: u64) {
        self.a.load(true, r::T0, ctx!(state));
        self.a.rm(false, &[0x81], 4, state(r::T0, RFLAGS)); // and dword [..], imm32
        self.a.i32(mask as i32);
    }

    /// STI: what waits is left to the interpreter. The shadow that it casts on the next instruction ends with that one, which
    /// is of this unit, before anybody looks.
    fn sti(&mut self, g: &Guest) -> Option<bool> {
        if self.index + 1 >= self.count {
            return None;
        }
        self.clobber();
        let site = self.site(g, true, 0);
        self.a.load(true, r::T0, ctx!(signals));
        self.a.cmp_mem_imm(M::Base(r::T0, 0), 0);
        let f = self.a.jcc(5);
        self.cold(f, ColdKind::Interpret { site });
        self.a.load(true, r::T0, ctx!(state));
        self.a.rm(false, &[0x81], 1, state(r::T0, RFLAGS)); // or dword [..], imm32
        self.a.i32(flag::IF as i32);
        Some(true)
    }

    /// SWAPGS, in the state, in the fast copy of the segment and in the context. No flags change.
    fn swapgs(&mut self) {
        self.a.load(true, r::T0, ctx!(state));
        self.a.load(true, r::T1, state(r::T0, KERNEL_GS));
        self.a.rm(false, &[0xff], 6, state(r::T0, GS_BASE)); // push qword
        self.a.store(true, state(r::T0, GS_BASE), r::T1);
        self.a.rm(false, &[0x8f], 0, state(r::T0, KERNEL_GS)); // pop qword
        let copy = M::Ctx(offset_of!(super::super::context::Context, base) + 8 * Seg::Gs as usize);
        self.a.store(true, copy, r::T1);
        self.a.load(true, r::T0, ctx!(cpu));
        self.a.store(true, state(r::T0, FAST_GS), r::T1);
    }

    /// PUSHFQ.
    fn pushf(&mut self, g: &Guest) {
        self.save();
        // The arithmetic flags are in the context: OF in bit 0, the others as in RFLAGS from bit 8 on.
        self.a.load(false, r::T0, ctx!(flags));
        self.a.mov(r::T1, r::T0);
        self.a.rr(false, &[0xc1], 5, r::T0); // shr r10d, 8
        self.a.b(&[8]);
        self.a.alu_imm(false, 4, r::T0, 0xd5);
        self.a.alu_imm(false, 4, r::T1, 1);
        self.a.rr(false, &[0xc1], 4, r::T1); // shl r11d, 11
        self.a.b(&[11]);
        self.a.rr(false, &[0x0b], r::T0, r::T1); // or r10d, r11d
        self.a.load(true, r::T1, ctx!(state));
        self.a.load(false, r::T1, state(r::T1, RFLAGS));
        self.a.alu_imm(false, 4, r::T1, !(flag::ARITH | flag::VM | flag::RF) as i32);
        self.a.alu_imm(false, 1, r::T1, flag::ONE as i32);
        self.a.rr(false, &[0x0b], r::T0, r::T1);
        self.a.store(true, ctx!(tmp), r::T0);
        self.flags = SAVED;
        self.stack_write(g, 8);
        self.a.load(true, r::T0, ctx!(tmp));
        self.a.store(true, M::Base(r::T1, 0), r::T0);
        self.a.lea(true, r::SP, M::Base(r::SP, -8));
    }

    /// MOV from a segment register.
    fn selector(&mut self, g: &Guest) -> Option<bool> {
        let i = &g.iced;
        if i.op_kind(1) != OpKind::Register || !i.op_register(1).is_segment_register() {
            return None;
        }
        let at = offset_of!(CpuState, seg)
            + usize::from(g.insn.r1) * size_of::<Segment>()
            + offset_of!(Segment, selector);
        if i.op_kind(0) == OpKind::Memory {
            if !self.operand(g, 2, 1, true) {
                return None;
            }
            self.a.load(true, r::T0, ctx!(state));
            self.a.rm(false, &[0x0f, 0xb7], r::T0, state(r::T0, at)); // movzx r10d, word
            self.a.b(&[0x66]);
            self.a.store(false, M::Base(r::T1, 0), r::T0);
            return Some(true);
        }
        let to = i.op_register(0);
        if to == Register::None || to.size() < 4 {
            return None;
        }
        self.a.load(true, r::T0, ctx!(state));
        let host = pinned(to.number() as u8).unwrap_or(r::T0);
        self.a.rm(false, &[0x0f, 0xb7], host, state(r::T0, at));
        if host == r::T0 {
            self.a.store(true, gpr(to.number()), r::T0);
        }
        Some(true)
    }
}
