//! PCI: configuration space, the host bridge, the ISA bridge.

pub mod config;
