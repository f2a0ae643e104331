//! Devices for tests: a way for a guest to end the program, to tell of a panic, and to try out buses and lines.

pub mod isa_debug_exit;
pub mod pc_testdev;
pub mod pci_testdev;
pub mod pvpanic;

pub use isa_debug_exit::IsaDebugExit;
pub use pc_testdev::PcTestdev;
pub use pci_testdev::PciTestdev;
pub use pvpanic::PvPanic;
