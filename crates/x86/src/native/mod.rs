//! What is executed on the host processor: guest memory accesses by host pointer (`mem`), and vector and x87 instructions.
#![allow(unsafe_code)]

pub(crate) mod mem;

use crate::decode::Handler;
use iced_x86::Code;

/// The handler of a vector, MMX or x87 instruction.
pub(crate) fn handler(_code: Code) -> Option<Handler> {
    None
}
