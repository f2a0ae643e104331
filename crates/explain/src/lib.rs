//! Reads backtraces of virtual machine monitors and says what happened.
//!
//! The way from text to answer: [`reader::read`] (any packaging, bounded memory) makes a [`model::Report`];
//! [`facts::Facts`] picks the stack, reads the accesses off it and finds device and register;
//! [`explanation::explain`] applies the rules and collects what is said, with the frames it rests on;
//! [`text::render`] and [`explanation::Explanation::to_json`] print it.
//!
//! Rules (`data/rules.txt`) and registers (`data/devices.txt`) are data. What is marked certain follows from the
//! frames alone: leaving frames out of a trace never adds a certain statement.

pub mod access;
mod clean;
pub mod cli;
pub mod dating;
pub mod devices;
pub mod explanation;
pub mod facts;
mod frame;
pub mod model;
pub mod mtree;
pub mod names;
mod own;
mod prose;
pub mod reader;
pub mod replay;
pub mod report;
pub mod rules;
pub mod teach;
pub mod text;
pub mod thread;

pub use cli::run;
pub use explanation::Explanation;

/// Explains a text in memory.
pub fn explain_text(text: &[u8]) -> Explanation {
    match reader::read(text) {
        Ok(r) => explanation::explain(&r, &[]),
        // Reading from memory does not fail; an empty report says so anyway.
        Err(_) => explanation::explain(&model::Report::default(), &[]),
    }
}
