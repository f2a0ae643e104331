//! The integer instructions.

pub(crate) mod flags;

use crate::decode::{Handler, Insn, Mode};
use iced_x86::Instruction;

/// The handler of an instruction by its form, and whether it ends its block; None when it isn't one of these.
pub(crate) fn handler(_i: &Instruction, _insn: &Insn, _mode: Mode) -> Option<(Handler, bool)> {
    None
}
/// Near branches: they change RIP and the stack only.
pub(crate) fn is_near_branch(_insn: &Insn) -> bool {
    false
}
