//! The KVM accelerator.
//!
//! A [`KvmVm`] follows the machine's address spaces (memory slots, dirty logs, eventfds, collected writes) and holds its interrupt
//! routes; a [`KvmVcpu`] runs a processor. Accesses that leave the guest go through the same [`AddressSpace`](hyaline_space::AddressSpace)s as
//! those of the software CPU, with the exact instruction that made them, and the processor's state is the same
//! [`CpuState`](hyaline_x86::state::CpuState), so that a machine can be saved on one and continued on the other.
//!
//! Interface: Linux, `Documentation/virt/kvm/api.rst`. `unsafe` is needed for ioctls that take pointers, and for the pages that a
//! vCPU shares with the kernel.
#![allow(unsafe_code)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("hyaline-kvm needs Linux on x86-64");

pub mod cpuid;
mod debug;
mod error;
mod exit;
mod irq;
mod kick;
mod memory;
mod msr;
mod ring;
mod rip;
mod rules;
mod slots;
mod state;
mod sys;
mod system;
mod vcpu;
mod vm;
mod xsave;

pub use debug::{DebugControl, HardwareBreak, Watch};
pub use error::{KvmError, Skipped};
pub use exit::{DebugCause, DebugStop, Exit, Failure, InternalError, SystemEvent};
pub use irq::{Gsi, Msi};
pub use kick::KickHandle;
pub use state::LapicPage;
pub use system::{Capabilities, Kvm};
pub use vcpu::KvmVcpu;
pub use vm::{Irqchip, KvmVm, VmOptions};
