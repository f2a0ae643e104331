//! The gdb stub: gdb's remote serial protocol, spoken by the `gdbstub` crate, on a machine.
//!
//! Source: Debugging with GDB, appendices E (remote protocol) and G (target descriptions).

mod regs;
mod server;
mod target;

pub use server::{Address, Server, ServerError, drive};
