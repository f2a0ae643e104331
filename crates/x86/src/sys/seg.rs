//! Loading of segment registers.

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::state::Seg;

/// Loads DS, ES, FS, GS or SS as MOV and POP do (not CS), with all checks, in the present mode.
pub(crate) fn load(_cpu: &mut Cpu, _seg: Seg, _selector: u16) -> Exec {
    Err(Fault::ud())
}
