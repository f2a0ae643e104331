//! PCI: configuration space, the host bridge, the ISA bridge.

pub mod config;
pub mod i440fx;
pub mod piix3;
