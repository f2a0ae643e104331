//! Keyboard, mouse and the controllers in front of them.

pub mod i8042;
pub mod port92;
pub mod ps2;

pub use i8042::I8042;
pub use port92::Port92;
