//! Whole machines, started as a user starts them: the `hyaline` program with options, its terminal, its messages, its exit code.
//!
//! What a test needs from outside (a kernel of Debian's, /dev/kvm) and isn't there makes it print a line `SKIPPED: …`; with `CI=true` it
//! fails instead. `tools/test` gets everything.

mod driver;
mod firmware;
mod guests;
mod linux;
mod messages;
mod seeing;
mod smp;
mod state;
mod terminal;
