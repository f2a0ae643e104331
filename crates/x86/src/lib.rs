//! The software x86-64 CPU.
//!
//! `state` is the architectural state of one logical processor, neutral to the accelerator: the software CPU
//! computes on it, the KVM crate loads and fetches it, the machine saves it. `env` is what a processor needs
//! from the machine around it. [`cpu::Cpu`] is the processor itself: an exact interpreter ("tier 0") of predecoded
//! blocks (`decode`, `block`) with a software TLB (`mmu`, `tlb`).

pub mod block;
pub mod cpu;
pub mod decode;
pub mod env;
mod exec;
pub mod fault;
pub mod jit;
mod mmu;
pub mod native;
pub mod state;
mod stops;
mod sys;
mod template;
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;
mod tlb;

pub use cpu::Cpu;
pub use decode::{Handler, Insn};
pub use env::{CpuLog, Env, Signals};
pub use fault::{DebugStop, Exec, Exit, Fault};
pub use jit::{JitError, JitOptions, JitStats, Tier};
pub use state::{CpuState, Seg};
pub use stops::Watch;
pub use sys::cpuid::{self, CpuModel};
