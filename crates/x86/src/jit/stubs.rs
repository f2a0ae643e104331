//! The fixed pieces of generated code: ways in and out, and to Rust and back.

use super::arena::Arena;
use super::asm::{Asm, Fixup, M, r};
use super::context::{Context, exit};
use crate::native::mem::TARGET_TABLE;
use crate::state::CpuState;
use std::mem::offset_of;

/// Called by generated code: (context, site, address) to the address to continue at, 0 to leave.
pub(super) type Helper = unsafe extern "sysv64" fn(*mut Context, u32, u64) -> u64;

/// How wide the guest's vector registers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VectorWidth {
    Xmm,
    Ymm,
    Zmm,
}

/// Addresses of the fixed pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stubs {
    /// From Rust: `extern "sysv64" fn(target)`.
    pub enter: u64,
    /// T0 = link number, arithmetic flags in the host's.
    pub link_flags_live: u64,
    /// T0 = link number, arithmetic flags in the context.
    pub link: u64,
    /// T1 = linear address, T0 = site.
    pub lookup: u64,
    /// T1 = linear address, T0 = site: the stack of return pairs is dropped, the target looked for in the window.
    pub return_miss: u64,
    /// As `return_miss`, but the stack stays.
    pub indirect: u64,
    /// T0 = unit.
    pub count: u64,
    /// Loads the guest's vector registers, goes to T1.
    pub load_vectors: u64,
    /// T0 = site, T1 = linear address.
    pub miss_read: u64,
    /// T0 = site, T1 = linear address.
    pub miss_write: u64,
    /// T0 = site, T1 = linear address of the span.
    pub miss_span: u64,
    /// T0 = site.
    pub interpret: u64,
    /// Loads the guest's x87 registers and goes to T1; T0 = site.
    pub load_x87: u64,
    /// Loads T1 from `Context::tmp` and goes to `address`.
    pub resume_bounce: u64,
    /// Restores the arithmetic flags and goes to `Context::resume`'s copy in `address`.
    pub resume_flags: u64,
}

/// Guest registers that live in host registers: (host, guest).
pub(super) const PINNED: [(u8, usize); 12] = [
    (r::RAX, 0),
    (r::RCX, 1),
    (r::RDX, 2),
    (r::RBX, 3),
    (r::SP, 4),
    (r::RBP, 5),
    (r::RSI, 6),
    (r::RDI, 7),
    (r::R8, 8),
    (r::R12, 12),
    (r::R13, 13),
    (r::R14, 14),
];

macro_rules! ctx {
    ($field:ident) => {
        M::Ctx(offset_of!(Context, $field))
    };
}

pub(super) fn gpr(n: usize) -> M {
    M::Ctx(offset_of!(Context, gpr) + 8 * n)
}

fn store_all(a: &mut Asm) {
    for (host, guest) in PINNED {
        a.store(true, gpr(guest), host);
    }
    a.store(true, ctx!(left), r::LEFT);
}

const CALLEE_SAVED: [u8; 6] = [r::RBX, r::RBP, r::R12, r::R13, r::R14, r::LEFT];

fn push(a: &mut Asm, n: u8) {
    if n >= 8 {
        a.b(&[0x41]);
    }
    a.b(&[0x50 | n & 7]);
}
fn pop(a: &mut Asm, n: u8) {
    if n >= 8 {
        a.b(&[0x41]);
    }
    a.b(&[0x58 | n & 7]);
}

/// Moves the vector registers between the state (at T0) and the host.
fn vectors(a: &mut Asm, width: VectorWidth, load: bool) {
    let opcode = if load { 0x10 } else { 0x11 };
    let count = if width == VectorWidth::Zmm { 32 } else { 16_u8 };
    for n in 0..count {
        let low = n & 8 == 0;
        let disp = (offset_of!(CpuState, vec) + 64 * usize::from(n)) as i32;
        match width {
            VectorWidth::Xmm => {
                a.b(&[0x41 | if low { 0 } else { 4 }, 0x0f, opcode]);
            }
            VectorWidth::Ymm => a.b(&[0xc4, if low { 0xc1 } else { 0x41 }, 0x7c, opcode]),
            VectorWidth::Zmm => {
                let p0 = if low { 0x80 } else { 0 } | 0x40 | if n & 16 == 0 { 0x10 } else { 0 } | 1;
                a.b(&[0x62, p0, 0x7c, 0x48, opcode]);
            }
        }
        // [r10 + disp32], never a scaled 8-bit displacement.
        a.b(&[0x80 | (n & 7) << 3 | 2]);
        a.i32(disp);
    }
    if width == VectorWidth::Zmm {
        for n in 0..8_u8 {
            // kmovq
            a.b(&[0xc4, 0xc1, 0xf8, if load { 0x90 } else { 0x91 }, 0x80 | n << 3 | 2]);
            a.i32((offset_of!(CpuState, opmask) + 8 * usize::from(n)) as i32);
        }
    }
}

/// Emits the fixed pieces at the arena's start.
pub(super) fn emit(
    arena: &mut Arena,
    width: VectorWidth,
    [miss_read, miss_write, interpret, load_x87, miss_span]: [Helper; 5],
) -> Option<Stubs> {
    let mut a = Asm::new(arena.exec(arena.used), arena.context() as u64);
    let start = a.base;
    let mut s = Stubs::default();
    let here = |a: &Asm| start + a.pos() as u64;
    let align = |a: &mut Asm| {
        while !a.pos().is_multiple_of(16) {
            a.b(&[0xcc]);
        }
    };

    // Vector registers to the state; called on either stack. Changes T0 and flags.
    let save_vectors = a.pos();
    a.load(true, r::T0, ctx!(state));
    vectors(&mut a, width, false);
    let mxcsr = M::Base(r::T0, offset_of!(CpuState, mxcsr) as i32);
    a.rm(false, &[0x0f, 0xae], 3, mxcsr); // stmxcsr
    a.rm(false, &[0x0f, 0xae], 2, ctx!(host_mxcsr)); // ldmxcsr
    if width != VectorWidth::Xmm {
        a.b(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    a.store_imm(false, ctx!(vec_live), 0);
    a.b(&[0xc3]);
    align(&mut a);
    let load_vectors = a.pos();
    a.load(true, r::T0, ctx!(state));
    vectors(&mut a, width, true);
    a.rm(false, &[0x0f, 0xae], 2, mxcsr);
    a.store_imm(false, ctx!(vec_live), 1);
    a.b(&[0xc3]);
    align(&mut a);
    s.load_vectors = here(&a);
    let f = a.call();
    a.bind(f, load_vectors);
    a.b(&[0x41, 0xff, 0xe3]); // jmp r11
    align(&mut a);

    // The way in.
    s.enter = here(&a);
    for n in CALLEE_SAVED {
        push(&mut a, n);
    }
    a.alu_imm(true, 5, r::RSP, 8);
    a.store(true, ctx!(rust_rsp), r::RSP);
    a.store(true, ctx!(resume), r::RDI);
    let reload = a.pos();
    for (host, guest) in PINNED {
        a.load(true, host, gpr(guest));
    }
    a.load(true, r::LEFT, ctx!(left));
    a.load(true, r::RSP, ctx!(jit_rsp));
    a.rm(false, &[0xff], 4, ctx!(resume)); // jmp [resume]
    align(&mut a);

    // The way out, with the state stored: on the Rust stack.
    let leave = a.pos();
    a.alu_imm(true, 0, r::RSP, 8);
    for n in CALLEE_SAVED.into_iter().rev() {
        pop(&mut a, n);
    }
    a.b(&[0xc3]);
    align(&mut a);

    // The way out from code.
    let out = a.pos();
    store_all(&mut a);
    a.store(true, ctx!(jit_rsp), r::RSP);
    a.load(true, r::RSP, ctx!(rust_rsp));
    a.rm(false, &[0x83], 7, ctx!(vec_live)); // cmp dword [vec_live], imm8
    fix_tail(&mut a, 1);
    a.b(&[0]);
    let dead = a.jcc(4);
    let f = a.call();
    a.bind(f, save_vectors);
    a.here(dead);
    let f = a.jmp();
    a.bind(f, leave);
    align(&mut a);

    let leaving = |a: &mut Asm, reason: u64, address: bool, flags: bool| {
        a.store(true, ctx!(argument), r::T0);
        if address {
            a.store(true, ctx!(address), r::T1);
        }
        if flags {
            a.save_flags();
        }
        a.store_imm(true, ctx!(exit), reason as i32);
        let f = a.jmp();
        a.bind(f, out);
        align(a);
    };
    s.link_flags_live = here(&a);
    leaving(&mut a, exit::LINK, false, true);
    s.link = here(&a);
    leaving(&mut a, exit::LINK, false, false);
    s.count = here(&a);
    leaving(&mut a, exit::COUNT, false, false);
    let lookup = a.pos();
    s.lookup = here(&a);
    leaving(&mut a, exit::LOOKUP, true, false);

    // Indirect branches.
    s.return_miss = here(&a);
    a.load(true, r::RSP, ctx!(stack_base));
    s.indirect = here(&a);
    a.store(true, ctx!(argument), r::T0);
    target_index(&mut a);
    let slot = M::Gs(Some(r::T0), TARGET_TABLE as i32);
    a.rm(true, &[0x3b], r::T1, slot); // cmp r11, gs:[..]
    let unknown = a.jcc(5);
    a.rm(false, &[0xff], 4, M::Gs(Some(r::T0), TARGET_TABLE as i32 + 8));
    a.here(unknown);
    a.load(true, r::T0, ctx!(argument));
    let f = a.jmp();
    a.bind(f, lookup);
    align(&mut a);

    // What stands at the bottom of the stack of return pairs, for a guest that returns to the address that stands with it.
    let sentinel = here(&a);
    a.load(true, r::RSP, ctx!(stack_base));
    let f = a.jmp();
    a.bind(f, lookup);
    align(&mut a);

    s.resume_flags = here(&a);
    a.restore_flags();
    a.rm(false, &[0xff], 4, ctx!(address));
    align(&mut a);

    s.resume_bounce = here(&a);
    a.load(true, r::T1, ctx!(tmp));
    a.rm(false, &[0xff], 4, ctx!(address));
    align(&mut a);

    let helper = |a: &mut Asm, f: Helper| {
        store_all(a);
        a.store(true, ctx!(jit_rsp), r::RSP);
        a.load(true, r::RSP, ctx!(rust_rsp));
        a.rr(false, &[0x8b], r::RSI, r::T0); // mov esi, r10d
        a.mov(r::RDX, r::T1);
        a.load(false, r::RAX, ctx!(vec_live));
        a.store(false, ctx!(vec_was), r::RAX);
        a.rr(false, &[0x85], r::RAX, r::RAX);
        let dead = a.jcc(4);
        let c = a.call();
        a.bind(c, save_vectors);
        a.here(dead);
        a.lea(true, r::RDI, M::Ctx(0));
        a.mov_imm(r::RAX, f as usize as u64);
        a.b(&[0xff, 0xd0]); // call rax
        a.rr(true, &[0x85], r::RAX, r::RAX);
        let done = a.jcc(4);
        a.bind(done, leave);
        a.store(true, ctx!(resume), r::RAX);
        a.rm(false, &[0x83], 7, ctx!(vec_was));
        fix_tail(a, 1);
        a.b(&[0]);
        let dead = a.jcc(4);
        a.bind(dead, reload);
        let c = a.call();
        a.bind(c, load_vectors);
        let f = a.jmp();
        a.bind(f, reload);
        align(a);
    };
    s.miss_read = here(&a);
    helper(&mut a, miss_read);
    s.miss_write = here(&a);
    helper(&mut a, miss_write);
    s.interpret = here(&a);
    helper(&mut a, interpret);
    s.load_x87 = here(&a);
    helper(&mut a, load_x87);
    s.miss_span = here(&a);
    helper(&mut a, miss_span);
    let code = std::mem::take(&mut a.buf);
    arena.add(&code)?;
    arena.set_sentinel(sentinel);
    Some(s)
}

/// Corrects the displacement just emitted for `n` immediate bytes that follow it.
fn fix_tail(a: &mut Asm, n: i32) {
    let at = a.pos() - 4;
    if let Some(place) = a.buf.get_mut(at..at + 4) {
        let mut d = [0; 4];
        d.copy_from_slice(place);
        place.copy_from_slice(&(i32::from_le_bytes(d) - n).to_le_bytes());
    }
}

/// T0 = displacement of the slot of the linear address in T1. Changes flags.
pub(super) fn target_index(a: &mut Asm) {
    a.rr(false, &[0x69], r::T0, r::T1); // imul r10d, r11d, imm32
    a.i32(TARGET_HASH as i32);
    a.rr(false, &[0xc1], 5, r::T0); // shr r10d, 16
    a.b(&[16]);
    a.alu_imm(false, 4, r::T0, 0xfff0);
}
const TARGET_HASH: u32 = 0x9e37_79b1;
/// The slot's number.
pub(super) fn target_slot(linear: u64) -> usize {
    ((linear as u32).wrapping_mul(TARGET_HASH) >> 20) as usize
}

/// Compares a vector flag: `cmp dword [vec_live], 0`.
pub(super) fn test_vectors(a: &mut Asm) {
    a.rm(false, &[0x83], 7, ctx!(vec_live));
    fix_tail(a, 1);
    a.b(&[0]);
}

/// A jump out of line, bound when the cold code is emitted.
pub(super) struct Cold {
    pub from: Fixup,
    pub kind: ColdKind,
}

/// What stands out of line.
pub(super) enum ColdKind {
    /// TLB miss: site, write.
    Miss { site: u32, write: bool },
    /// The instruction is left to the interpreter.
    Interpret { site: u32 },
    /// Count too low.
    Count { unit: u32, count: u8 },
    /// Load the vector registers and go back.
    Vectors { back: usize },
    /// A group's span isn't in one page of the TLB.
    Span { site: u32, write: bool },
    /// An indirect branch whose target isn't in the window's table: a call comes back.
    Target { site: u32, back: Option<usize> },
    /// Load the x87 registers and go back.
    X87 { site: u32, back: usize },
    /// Leave by a branch: refund, link.
    Edge { refund: u8, link: u32 },
    /// A link's own exit.
    Link { link: u32, flags_live: bool },
    /// The stack of return pairs is full: empty it and go back.
    Stack { back: usize },
}
