//! What a device is: registers, context, lines, timers, state, test bench.
//!
//! A chip's author writes one file: the head (a [`Chip`]), its [`registers!`], a plain state that serde saves, pure logic on that
//! state, and the glue, an implementation of [`Device`]. Time, lines, timers, DMA and randomness come only through [`Cx`].

mod bench;
mod device;
mod hand;
pub mod laws;
mod registers;
mod slot;
pub mod state;

pub use bench::Bench;
pub use device::*;
pub use hand::{Crash, Fault, Handled, contain_panics, current};
pub use hyaline_space::{IoError, Limits, Origin};
pub use registers::{Bank, Chip, Decoded, Field, Kind, Place, Register};
pub use slot::{Chassis, Line, Sink, Slot, forget_reached, reached};
