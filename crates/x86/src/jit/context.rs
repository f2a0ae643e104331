//! What generated code keeps in memory, addressed relative to its own instruction pointer.

use crate::Cpu;
use crate::state::CpuState;

/// Registers and words of generated code. Guest registers are here between runs; during a run only r9, r10, r11 and r15 are (and the
/// arithmetic flags, where the code says so).
#[derive(Debug)]
#[repr(C)]
pub(super) struct Context {
    /// Guest general registers.
    pub gpr: [u64; 16],
    /// Instructions that may still be executed, less those of the unit entered.
    pub left: i64,
    /// Arithmetic flags: bit 0 OF, bits 8-15 as LAHF has them.
    pub flags: u64,
    /// The Rust stack while generated code runs.
    pub rust_rsp: u64,
    /// The stack of generated code while Rust runs.
    pub jit_rsp: u64,
    /// The stack pointer of the empty stack of generated code.
    pub stack_base: u64,
    /// The lowest stack pointer that a call may be made at.
    pub stack_limit: u64,
    /// Where generated code continues.
    pub resume: u64,
    /// The processor.
    pub cpu: *mut Cpu,
    /// Its translator.
    pub jit: *mut super::Jit,
    /// The processor's state.
    pub state: *mut CpuState,
    /// Its request word.
    pub signals: *mut u32,
    /// Guest MXCSR while vectors are not live.
    pub mxcsr: u32,
    /// MXCSR of Rust code.
    pub host_mxcsr: u32,
    /// 1: the guest's vector registers and MXCSR are in the host's.
    pub vec_live: u32,
    /// What `vec_live` was before a helper was called.
    pub vec_was: u32,
    /// Linear bases of ES, CS, SS, DS, FS, GS.
    pub base: [u64; 6],
    /// Scratch.
    pub tmp: u64,
    /// Why generated code was left, an [`exit`] number.
    pub exit: u64,
    /// Number that belongs to it.
    pub argument: u64,
    /// A linear address that belongs to it.
    pub address: u64,
    /// Distances from guest to host addresses of a unit's groups of memory operands.
    pub spans: [u64; SPANS],
    /// A copy of what is in two pages.
    pub bounce: [u64; 40],
    /// What an indirect call's return address was written over; scratch of string instructions.
    pub below: u64,
    /// Number of the last x87 instruction's note plus one; 0: the state has it.
    pub fpu_note: u64,
    /// Offset of the last x87 memory operand.
    pub fpu_data: u64,
    /// Its segment; [`NO_SEGMENT`]: the state has the selector.
    pub fpu_segment: u32,
}

/// Entries of [`Context::spans`].
pub(super) const SPANS: usize = 8;
/// See [`Context::fpu_segment`].
pub(super) const NO_SEGMENT: u32 = u32::MAX;

/// Reasons to leave generated code, [`Context::exit`].
pub(super) mod exit {
    /// A link that leads nowhere yet; argument: its number.
    pub(in super::super) const LINK: u64 = 0;
    /// An indirect branch to `address`; argument: the site.
    pub(in super::super) const LOOKUP: u64 = 1;
    /// Too few instructions left for the unit; argument: the unit.
    pub(in super::super) const COUNT: u64 = 2;
    /// A helper has brought the state up to date.
    pub(in super::super) const DONE: u64 = 3;
    /// A helper has met a fault, kept in the translator.
    pub(in super::super) const FAULT: u64 = 4;
    /// A helper has brought the state up to date; the next `argument` instructions are to be interpreted.
    pub(in super::super) const CAREFUL: u64 = 5;
    /// A helper has brought the state up to date; a careful unit is wanted here.
    pub(in super::super) const SPAN: u64 = 6;
}

impl Default for Context {
    fn default() -> Context {
        Context {
            gpr: [0; 16],
            left: 0,
            flags: 0,
            rust_rsp: 0,
            jit_rsp: 0,
            stack_base: 0,
            stack_limit: 0,
            resume: 0,
            cpu: std::ptr::null_mut(),
            jit: std::ptr::null_mut(),
            state: std::ptr::null_mut(),
            signals: std::ptr::null_mut(),
            mxcsr: 0x1f80,
            host_mxcsr: 0x1f80,
            vec_live: 0,
            vec_was: 0,
            base: [0; 6],
            tmp: 0,
            exit: 0,
            argument: 0,
            address: 0,
            spans: [0; SPANS],
            bounce: [0; 40],
            below: 0,
            fpu_note: 0,
            fpu_data: 0,
            fpu_segment: NO_SEGMENT,
        }
    }
}

/// The arithmetic flags of RFLAGS in the form of [`Context::flags`].
pub(super) fn pack_flags(rflags: u64) -> u64 {
    (rflags & 0xd5) << 8 | rflags >> 11 & 1 | 0x200
}
/// The arithmetic flags of RFLAGS out of [`Context::flags`].
pub(super) fn unpack_flags(flags: u64) -> u64 {
    flags >> 8 & 0xd5 | (flags & 1) << 11
}
