//! Memory operands: their linear address, and the look at the TLB that makes a host address of it.

use super::{Guest, Translator, pinned};
use crate::decode::Ea;
use crate::jit::ModeKey;
use crate::jit::asm::{M, r};
use crate::jit::context::Context;
use crate::jit::stubs::{ColdKind, gpr};
use crate::native::mem::WRITE_TABLE;
use crate::state::Seg;
use std::mem::offset_of;

impl Translator<'_> {
    /// Whether the segment of a memory operand needs no limit checks.
    pub(super) fn flat(&self, seg: Seg) -> bool {
        match seg {
            _ if self.mode.bits() == 64 => true,
            Seg::Fs => self.mode.has(ModeKey::FS_FLAT),
            Seg::Gs => self.mode.has(ModeKey::GS_FLAT),
            // Code may not be writable as data.
            Seg::Cs => false,
            _ => true,
        }
    }

    /// T1 = offset of the memory operand in its segment. Changes T0 and no flags.
    pub(super) fn offset(&mut self, g: &Guest) -> bool {
        let i = &g.insn;
        let wide = i.asize == 8;
        let disp = i.disp;
        match i.ea {
            Ea::Rip64 => self.a.mov_imm(r::T1, g.next().wrapping_add(disp as i64 as u64)),
            Ea::Rip32 => self.a.mov_imm(r::T1, g.next().wrapping_add(disp as i64 as u64) & 0xffff_ffff),
            Ea::Absolute if wide => self.a.mov_imm(r::T1, disp as i64 as u64),
            Ea::Absolute if i.asize == 4 => self.a.mov_imm(r::T1, u64::from(disp as u32)),
            Ea::Moffs => self.a.mov_imm(r::T1, i.imm),
            Ea::Base64 | Ea::BaseIndex64 | Ea::Index64 | Ea::Base32 | Ea::BaseIndex32 | Ea::Index32 => {
                let m = self.address(g);
                self.a.lea(wide, r::T1, m);
            }
            _ => return false,
        }
        true
    }

    /// T1 = linear address of the memory operand. Changes T0; flags must not be in the host's when a segment has a base.
    pub(super) fn linear(&mut self, g: &Guest, size: usize) -> bool {
        let i = &g.insn;
        if !self.flat(i.seg) || !self.offset(g) {
            return false;
        }
        let based = matches!(i.seg, Seg::Fs | Seg::Gs);
        if based {
            if self.mode.bits() == 32 {
                // Beyond the segment's limit, which is the last of 4 GiB.
                self.a.alu_imm(false, 7, r::T1, -(size as i32));
                let from = self.a.jcc(7);
                let site = self.site(g, false, 0);
                self.cold(from, ColdKind::Interpret { site });
            }
            let at = M::Ctx(offset_of!(Context, base) + 8 * i.seg as usize);
            self.a.rm(self.mode.bits() == 64, &[0x03], r::T1, at);
        }
        true
    }

    /// The memory operand as one of the host's, with registers that live in memory loaded to T1 (base) and T0 (index).
    pub(super) fn address(&mut self, g: &Guest) -> M {
        let i = &g.insn;
        let base =
            matches!(i.ea, Ea::Base64 | Ea::BaseIndex64 | Ea::Base32 | Ea::BaseIndex32).then_some(i.base);
        let index =
            matches!(i.ea, Ea::BaseIndex64 | Ea::Index64 | Ea::BaseIndex32 | Ea::Index32).then_some(i.index);
        let base = base.map(|n| match pinned(n) {
            Some(host) => host,
            None => {
                self.a.load(true, r::T1, gpr(n.into()));
                r::T1
            }
        });
        let index = index.map(|n| match pinned(n) {
            Some(host) => host,
            None => {
                self.a.load(true, r::T0, gpr(n.into()));
                r::T0
            }
        });
        match (base, index) {
            (Some(base), None) => M::Base(base, i.disp),
            (base, index) => M::Sib(base, index.map(|n| (n, i.scale & 3)), i.disp),
        }
    }

    /// Begins to look the linear address in T1 up: T0 = the entry's displacement, T1 = the offset in the page if it is less than a page's size.
    /// Gives the table's displacement.
    pub(super) fn look_up(&mut self, write: bool) -> i32 {
        self.groups.let_go();
        if self.host.bmi2 {
            self.a.b(&[0xc4, 0x43, 0xfb, 0xf0, 0xd3, 0x08]); // rorx r10, r11, 8
        } else {
            self.a.mov(r::T0, r::T1);
            self.a.rr(true, &[0xc1], 5, r::T0);
            self.a.b(&[8]);
        }
        self.a.alu_imm(false, 4, r::T0, 0xfff0);
        let table = if write { WRITE_TABLE as i32 } else { 0 };
        self.a.rm(true, &[0x33], r::T1, M::Gs(Some(r::T0), table));
        table
    }

    /// Looks the linear address in T1 up: T1 = host address. The flags were saved. `align`: 16, 32, 64 or 1.
    pub(super) fn check(&mut self, g: &Guest, retry: usize, size: usize, align: usize, write: bool) {
        let table = self.look_up(write);
        let from = if align > 1 {
            // test r11, imm32: page offset and alignment in one.
            self.a.rr(true, &[0xf7], 0, r::T1);
            self.a.i32(!(0x1000 - align as i32));
            self.a.jcc(5)
        } else {
            self.a.alu_imm(true, 7, r::T1, 0x1000 - size as i32);
            self.a.jcc(7)
        };
        let site = self.site(g, false, retry);
        if let Some(s) = self.sites.last_mut() {
            s.size = size as u16;
        }
        self.cold(from, ColdKind::Miss { site, write });
        self.a.rm(true, &[0x03], r::T1, M::Gs(Some(r::T0), table + 8));
        let at = self.a.pos() as u32;
        if let Some(s) = self.sites.last_mut()
            && !write
            && align == 1
        {
            s.bounce = at;
        }
        self.flags.host = false;
    }

    /// Address and check of the memory operand: T1 = host address.
    pub(super) fn operand(&mut self, g: &Guest, size: usize, align: usize, write: bool) -> bool {
        if size == 0 || size > 64 {
            return false;
        }
        self.clobber();
        let retry = self.a.pos();
        if !self.linear(g, size) {
            return false;
        }
        self.check(g, retry, size, align, write);
        true
    }

    /// T1 = host address below the stack pointer, checked for a write.
    pub(super) fn stack_write(&mut self, g: &Guest, word: usize) {
        self.clobber();
        let retry = self.a.pos();
        self.a.lea(word == 8, r::T1, M::Base(r::SP, -(word as i32)));
        self.check(g, retry, word, 1, true);
    }
}
