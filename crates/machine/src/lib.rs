//! Boards, loaders, ACPI tables, vCPU threads, run loop, snapshots.

pub mod acpi;
pub mod chassis;
pub mod clock;
pub mod config;
pub mod cpu_dump;
pub mod cpu_env;
pub mod debug;
mod devices;
pub mod guest_stack;
mod interp;
mod kvm;
pub mod load;
mod machine;
mod orc;
pub mod pc;
pub mod report;
mod snapshot;
pub mod state_file;
mod threads;
mod watching;

pub use devices::{check as device_check, help as device_help};
pub use machine::{Machine, MachineError};
pub use snapshot::Sections;

/// Text of `-cpu help`.
pub fn cpu_help() -> String {
    hyaline_x86::CpuModel::help()
}
