//! Interrupt controllers.

pub mod cerr;
pub mod i8259;
pub mod ioapic;
pub mod lapic;
