//! The software x86-64 CPU.
//!
//! `state` is the architectural state of one logical processor, neutral to the accelerator: the software CPU
//! computes on it, the KVM crate loads and fetches it, the machine saves it. `env` is what a processor needs
//! from the machine around it.

pub mod env;
pub mod state;
