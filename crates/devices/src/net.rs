//! Network controllers.

pub mod pcnet;

pub use pcnet::Pcnet;
