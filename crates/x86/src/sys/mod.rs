//! The system half of the processor: segments, events, control registers, model-specific registers, CPUID, debug.

pub mod cpuid;
pub(crate) mod debug;
pub(crate) mod event;
pub(crate) mod reset;
pub(crate) mod seg;

use crate::decode::Handler;
use iced_x86::Code;

/// The handler of a system instruction; None when it isn't one (or isn't implemented: #UD).
pub(crate) fn handler(_code: Code) -> Option<Handler> {
    None
}
