//! Every chip of the machine, one file each.
//!
//! A file reads from top to bottom: the head (a [`Chip`](hyaline_device::Chip): manual, what is and isn't modelled, deviations), the
//! registers, the state that is saved, the logic, the glue to the [context](hyaline_device::Cx), the tests.

pub mod firmware;
pub mod input;
pub mod intc;
pub mod net;
pub mod pci;
pub mod power;
pub mod serial;
pub mod test;
pub mod timer;
