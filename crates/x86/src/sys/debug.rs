//! Debug registers, single step. The run loop calls these only when [`armed`] is true.

use crate::cpu::Cpu;
use crate::fault::Exec;

/// Whether instructions have to be executed one by one: TF set, or an instruction or I/O breakpoint enabled.
pub(crate) fn armed(cpu: &Cpu) -> bool {
    cpu.state.rflags & crate::state::flag::TF != 0
}
/// Before an instruction at `linear`: instruction breakpoints (#DB as a fault, unless RF).
pub(crate) fn before_instruction(_cpu: &mut Cpu, _linear: u64) -> Exec {
    Ok(())
}
/// After an instruction that completed: single-step and data breakpoint traps. `single` is TF as it was before the instruction.
pub(crate) fn after_instruction(_cpu: &mut Cpu, _single: bool) -> Exec {
    Ok(())
}
/// Whether the page at linear address `page` holds an enabled data breakpoint: such pages never enter the TLB.
pub(crate) fn page_watched(_cpu: &Cpu, _page: u64) -> bool {
    false
}
/// A data access to a watched page took place (or is about to): note what matches, for `after_instruction`.
pub(crate) fn data_access(_cpu: &mut Cpu, _linear: u64, _len: u64, _write: bool) {}
