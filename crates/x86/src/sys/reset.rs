//! RESET, INIT and start-up IPI.

use crate::cpu::Cpu;

/// INIT was received.
pub(crate) fn init(_cpu: &mut Cpu) {}
/// A start-up IPI was received while the processor waited for one.
pub(crate) fn sipi(_cpu: &mut Cpu, _vector: u8) {}
