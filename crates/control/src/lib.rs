//! What looks into a running machine from outside: the gdb stub, its monitor commands, and the map of addresses told in words.

pub mod gdb;
pub mod map;
pub mod monitor;
