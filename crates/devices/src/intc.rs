//! Interrupt controllers.

pub mod i8259;
pub mod ioapic;
pub mod lapic;
