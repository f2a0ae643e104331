//! Delivery of exceptions and interrupts.

use crate::cpu::Cpu;
use crate::fault::Exit;
use crate::state::EventKind;

/// Delivers an exception raised by the instruction at `state.rip`, or by its end for traps. Handles double and triple
/// faults: Err(Exit::Shutdown). On Ok, CS:RIP is the handler's first instruction.
pub(crate) fn exception(_cpu: &mut Cpu, _vector: u8, _error: Option<u32>) -> Result<(), Exit> {
    Err(Exit::Shutdown)
}
/// Delivers an external interrupt or NMI before the instruction at `state.rip` (which see: it is the return address).
pub(crate) fn interrupt(_cpu: &mut Cpu, _vector: u8, _kind: EventKind) -> Result<(), Exit> {
    Err(Exit::Shutdown)
}
/// Enters system-management mode.
pub(crate) fn smi(_cpu: &mut Cpu) -> Result<(), Exit> {
    Err(Exit::Shutdown)
}
