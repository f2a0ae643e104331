//! What a test case is, and what came of one.

/// Linear address of the code page; the page after it is not mapped.
pub const CODE: u64 = 0x1000_0000;
/// Linear address of two pages of data; the pages before and after are not mapped.
pub const DATA: u64 = 0x1001_0000;
/// Linear address of a page that can only be read; its neighbours are not mapped.
pub const READ_ONLY: u64 = 0x1001_3000;
/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of the data pages and the read-only page, as they lie in `template`.
pub const TEMPLATE: usize = 3 * PAGE;

/// General, vector and x87 registers, laid out the same for both sides.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct Registers {
    /// ZMM0-31.
    pub vec: [[u64; 8]; 32],
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Opmask registers.
    pub opmask: [u64; 8],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// x87 significands in physical order.
    pub significand: [u64; 8],
    /// x87 signs and exponents in physical order.
    pub exponent: [u16; 8],
    /// SSE control and status.
    pub mxcsr: u32,
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged x87 tags.
    pub ftw: u8,
}

/// One test case.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Case {
    /// State before.
    pub before: Registers,
    /// The instruction, padded with the bytes that follow it.
    pub bytes: [u8; 16],
    /// How many of them are placed: fewer when the instruction runs into the unmapped page.
    pub placed: u8,
    /// The instruction repeats: single steps that stay on it are not its end.
    pub repeats: bool,
    /// Seed that made it.
    pub seed: u64,
}

/// What came of a case on one side.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Outcome {
    /// State after.
    pub after: Registers,
    /// Exception vector, or None when the instruction completed.
    pub vector: Option<u8>,
    /// Error code of the exception, 0 if it has none.
    pub error: u32,
    /// Page-fault address, 0 for other exceptions.
    pub cr2: u64,
    /// The data pages differ from the template.
    pub changed: bool,
    /// The data pages, valid when `changed`.
    pub data: [u8; 2 * PAGE],
}
