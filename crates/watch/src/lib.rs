//! Access records, flight recorder, access logs, and the way of one access told layer by layer.
//!
//! A [`Recorder`] is the observer of the machine's address spaces. It keeps the last accesses of each processor in a ring of its own,
//! counts them by register, and hands them to [`Sink`]s, such as an [`AccessLog`] for the comparison of two runs. What a record means in words
//! is in its [`Site`]: the region, its owner, and the register with its fields, from the device's own declaration.

mod filter;
mod guest;
mod log;
mod path;
pub mod profile;
mod record;
mod recorder;
mod ring;
pub mod symbols;
mod text;
mod trace;

pub use filter::{Filter, Format, Spec, Vocabulary, glob};
pub use guest::{Guest, SymbolChoice};
pub use log::{AccessLog, Compare, Difference, Entry, compare};
pub use path::{Runner, Teller};
pub use profile::Profile;
pub use record::{AccessRecord, Site};
pub use recorder::{Clock, Count, DEPTH, HostClock, Recorder, Sink};
pub use text::{HEADER, Line, json, summary};
pub use trace::Trace;
