//! A small assembler for generated code.

#![allow(missing_docs)]

/// Host register numbers.
pub(super) mod r {
    pub(in super::super) const RAX: u8 = 0;
    pub(in super::super) const RCX: u8 = 1;
    pub(in super::super) const RDX: u8 = 2;
    pub(in super::super) const RBX: u8 = 3;
    pub(in super::super) const RSP: u8 = 4;
    pub(in super::super) const RBP: u8 = 5;
    pub(in super::super) const RSI: u8 = 6;
    pub(in super::super) const RDI: u8 = 7;
    pub(in super::super) const R8: u8 = 8;
    /// Guest RSP.
    pub(in super::super) const SP: u8 = 9;
    /// Scratch: index, second operand.
    pub(in super::super) const T0: u8 = 10;
    /// Scratch: addresses.
    pub(in super::super) const T1: u8 = 11;
    pub(in super::super) const R12: u8 = 12;
    pub(in super::super) const R13: u8 = 13;
    pub(in super::super) const R14: u8 = 14;
    /// Instructions left.
    pub(in super::super) const LEFT: u8 = 15;
}

/// A memory operand of our own making.
#[derive(Clone, Copy, Debug)]
pub(super) enum M {
    /// `[base + disp]`.
    Base(u8, i32),
    /// `[base + index * 1 << scale + disp]`.
    Sib(Option<u8>, Option<(u8, u8)>, i32),
    /// A word of the context, by its offset.
    Ctx(usize),
    /// `gs:[base + disp]`; with no base `gs:[disp]`.
    Gs(Option<u8>, i32),
}

/// Code under construction, to run at `base`.
pub(super) struct Asm {
    pub buf: Vec<u8>,
    /// Address at which the first byte will run.
    pub base: u64,
    /// Address of the context.
    pub ctx: u64,
}

/// A place in the code that is not known yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fixup(usize);

impl Asm {
    pub(super) fn new(base: u64, ctx: u64) -> Asm {
        Asm { buf: Vec::with_capacity(1024), base, ctx }
    }
    pub(super) fn pos(&self) -> usize {
        self.buf.len()
    }
    pub(super) fn b(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }
    pub(super) fn i32(&mut self, v: i32) {
        self.b(&v.to_le_bytes());
    }

    /// ModRM, SIB and displacement; `tail` bytes of immediate follow.
    pub(super) fn modrm_mem(&mut self, reg: u8, m: M, tail: usize) {
        let reg = (reg & 7) << 3;
        match m {
            M::Base(base, disp) => self.modrm_base(reg, base, disp),
            M::Gs(Some(base), disp) => {
                self.b(&[0x80 | reg | base & 7]);
                if base & 7 == 4 {
                    self.b(&[0x24]);
                }
                self.i32(disp);
            }
            M::Gs(None, disp) => {
                self.b(&[reg | 4, 0x25]);
                self.i32(disp);
            }
            M::Ctx(offset) => {
                self.b(&[reg | 5]);
                let next = self.base.wrapping_add((self.pos() + 4 + tail) as u64);
                self.i32(self.ctx.wrapping_add(offset as u64).wrapping_sub(next) as i32);
            }
            M::Sib(base, index, disp) => {
                let (i, s) = index.map_or((4, 0), |(i, s)| (i & 7, s));
                match base {
                    None => {
                        self.b(&[reg | 4, s << 6 | i << 3 | 5]);
                        self.i32(disp);
                    }
                    Some(base) => {
                        let short = i8::try_from(disp).ok();
                        let mode = match (disp, short) {
                            (0, _) if base & 7 != 5 => 0,
                            (_, Some(_)) => 0x40,
                            _ => 0x80,
                        };
                        self.b(&[mode | reg | 4, s << 6 | i << 3 | base & 7]);
                        match (mode, short) {
                            (0, _) => {}
                            (0x40, Some(d)) => self.b(&[d as u8]),
                            _ => self.i32(disp),
                        }
                    }
                }
            }
        }
    }

    fn modrm_base(&mut self, reg: u8, base: u8, disp: i32) {
        let short = i8::try_from(disp).ok();
        let mode = match (disp, short) {
            (0, _) if base & 7 != 5 => 0,
            (_, Some(_)) => 0x40,
            _ => 0x80,
        };
        self.b(&[mode | reg | base & 7]);
        if base & 7 == 4 {
            self.b(&[0x24]);
        }
        match (mode, short) {
            (0, _) => {}
            (0x40, Some(d)) => self.b(&[d as u8]),
            _ => self.i32(disp),
        }
    }

    /// REX bits X and B of a memory operand.
    pub(super) fn rex_of(m: M) -> u8 {
        match m {
            M::Base(b, _) | M::Gs(Some(b), _) => b >> 3,
            M::Sib(b, i, _) => b.map_or(0, |b| b >> 3) | i.map_or(0, |(i, _)| i >> 3 << 1),
            M::Ctx(_) | M::Gs(None, _) => 0,
        }
    }

    /// An instruction with a register and a memory operand. `w`: 64 bits.
    pub(super) fn rm(&mut self, w: bool, opcode: &[u8], reg: u8, m: M) {
        self.rm_tail(w, opcode, reg, m, 0);
    }
    fn rm_tail(&mut self, w: bool, opcode: &[u8], reg: u8, m: M, tail: usize) {
        if matches!(m, M::Gs(..)) {
            self.b(&[0x65]);
        }
        let rex = 0x40 | u8::from(w) << 3 | reg >> 3 << 2 | Asm::rex_of(m);
        if rex != 0x40 {
            self.b(&[rex]);
        }
        self.b(opcode);
        self.modrm_mem(reg, m, tail);
    }
    /// An instruction with two registers: ModRM.reg and ModRM.rm.
    pub(super) fn rr(&mut self, w: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = 0x40 | u8::from(w) << 3 | reg >> 3 << 2 | rm >> 3;
        if rex != 0x40 {
            self.b(&[rex]);
        }
        self.b(opcode);
        self.b(&[0xc0 | (reg & 7) << 3 | rm & 7]);
    }
    /// mov to, from (64 bits).
    pub(super) fn mov(&mut self, to: u8, from: u8) {
        self.rr(true, &[0x8b], to, from);
    }
    /// mov to, [m].
    pub(super) fn load(&mut self, w: bool, to: u8, m: M) {
        self.rm(w, &[0x8b], to, m);
    }
    /// mov [m], from.
    pub(super) fn store(&mut self, w: bool, m: M, from: u8) {
        self.rm(w, &[0x89], from, m);
    }
    /// lea to, m.
    pub(super) fn lea(&mut self, w: bool, to: u8, m: M) {
        self.rm(w, &[0x8d], to, m);
    }
    /// mov dword/qword [m], simm32.
    pub(super) fn store_imm(&mut self, w: bool, m: M, v: i32) {
        self.rm_tail(w, &[0xc7], 0, m, 4);
        self.i32(v);
    }
    /// cmp dword [m], imm32.
    pub(super) fn cmp_mem_imm(&mut self, m: M, v: i32) {
        self.rm_tail(false, &[0x81], 7, m, 4);
        self.i32(v);
    }
    /// cmp byte [m], imm8.
    pub(super) fn cmp_mem_byte(&mut self, m: M, v: u8) {
        self.rm_byte(&[0x80], 7, m, v);
    }
    /// An instruction with a memory operand and a byte of immediate.
    pub(super) fn rm_byte(&mut self, opcode: &[u8], reg: u8, m: M, v: u8) {
        self.rm_tail(false, opcode, reg, m, 1);
        self.b(&[v]);
    }
    /// Loads a constant in the shortest way.
    pub(super) fn mov_imm(&mut self, to: u8, v: u64) {
        if u32::try_from(v).is_ok() {
            if to >= 8 {
                self.b(&[0x41]);
            }
            self.b(&[0xb8 | to & 7]);
            self.b(&(v as u32).to_le_bytes());
        } else if v as i32 as i64 as u64 == v {
            self.rr(true, &[0xc7], 0, to);
            self.i32(v as i32);
        } else {
            self.b(&[0x48 | to >> 3, 0xb8 | to & 7]);
            self.b(&v.to_le_bytes());
        }
    }
    /// A group-1 operation (0 add, 4 and, 5 sub, 6 xor, 7 cmp) with an immediate.
    pub(super) fn alu_imm(&mut self, w: bool, op: u8, reg: u8, v: i32) {
        match i8::try_from(v) {
            Ok(v) => {
                self.rr(w, &[0x83], op, reg);
                self.b(&[v as u8]);
            }
            Err(_) => {
                self.rr(w, &[0x81], op, reg);
                self.i32(v);
            }
        }
    }

    /// jcc rel32 to a place not known yet. `condition` 0-15.
    pub(super) fn jcc(&mut self, condition: u8) -> Fixup {
        self.b(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Fixup(self.pos() - 4)
    }
    /// jmp rel32.
    pub(super) fn jmp(&mut self) -> Fixup {
        self.b(&[0xe9, 0, 0, 0, 0]);
        Fixup(self.pos() - 4)
    }
    /// call rel32.
    pub(super) fn call(&mut self) -> Fixup {
        self.b(&[0xe8, 0, 0, 0, 0]);
        Fixup(self.pos() - 4)
    }
    /// Lets a jump lead here.
    pub(super) fn here(&mut self, f: Fixup) {
        let to = self.pos();
        self.bind(f, to);
    }
    /// Lets a jump lead to a position in this buffer.
    pub(super) fn bind(&mut self, f: Fixup, to: usize) {
        let rel = (to as i64 - (f.0 as i64 + 4)) as i32;
        if let Some(place) = self.buf.get_mut(f.0..f.0 + 4) {
            place.copy_from_slice(&rel.to_le_bytes());
        }
    }
    /// Lets a jump lead to an absolute address near the arena.
    pub(super) fn bind_abs(&mut self, f: Fixup, to: u64) {
        let rel = to.wrapping_sub(self.base.wrapping_add(f.0 as u64 + 4)) as i32;
        if let Some(place) = self.buf.get_mut(f.0..f.0 + 4) {
            place.copy_from_slice(&rel.to_le_bytes());
        }
    }
    /// jmp to an absolute address near the arena.
    pub(super) fn jmp_abs(&mut self, to: u64) {
        let f = self.jmp();
        self.bind_abs(f, to);
    }
    /// The position of a jump's displacement.
    pub(super) fn place(f: Fixup) -> usize {
        f.0
    }

    /// Saves the arithmetic flags to the context. Changes T0 only.
    pub(super) fn save_flags(&mut self) {
        self.mov(r::T0, r::RAX);
        self.b(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.store(false, M::Ctx(std::mem::offset_of!(super::context::Context, flags)), r::RAX);
        self.mov(r::RAX, r::T0);
    }
    /// Restores the arithmetic flags from the context. Changes T0.
    pub(super) fn restore_flags(&mut self) {
        self.mov(r::T0, r::RAX);
        self.load(false, r::RAX, M::Ctx(std::mem::offset_of!(super::context::Context, flags)));
        self.b(&[0x04, 0x7f, 0x9e]); // add al, 0x7f; sahf
        self.mov(r::RAX, r::T0);
    }
}
