//! Serial ports and the debug console.

pub mod debugcon;
pub mod ns16550;

pub use debugcon::DebugCon;
pub use ns16550::Ns16550;
