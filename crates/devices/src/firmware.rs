//! What firmware asks: the configuration device.

pub mod fw_cfg;

pub use fw_cfg::FwCfg;
