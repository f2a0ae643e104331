//! Power management.

pub mod piix4_pm;
