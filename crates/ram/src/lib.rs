//! Guest memory: mapping, volatile access, dirty tracking.
//!
//! A [`RamBlock`] is one anonymous memory file mapped once into this process. Guest processors (software or KVM),
//! devices and debuggers all touch the same bytes at the same time, so no Rust reference to the contents is ever
//! made: every access goes through atomic loads and stores of naturally aligned 1, 2, 4 or 8 bytes, and tearing is what
//! it would be on hardware. All offsets are bytes from the start of the block and are checked.

#![allow(unsafe_code)]

mod bitmap;
mod block;
pub mod code;
mod dirty;

pub use bitmap::Bitmap;
pub use block::{Populated, RamBlock, RamError};
pub use dirty::DirtyClient;

/// The page size of dirty tracking and zero-page tests, in bytes.
pub const PAGE_SIZE: u64 = 4096;
