//! The debug console: one port that firmware writes its log to.
//!
//! Bochs began it at port E9h; QEMU's `isa-debugcon` can sit anywhere (`iobase`), and SeaBIOS and OVMF log to 402h.
//! A read gives E9h, by which firmware finds out that someone listens.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Reset, registers};
use serde::{Deserialize, Serialize};

registers! {
    /// The one port.
    pub bank PORTS "ports" Port 1 {
        DATA 0x0 1 rw = 0xe9, "Bochs, port E9 hack", "Write: a character of the log. Read: E9h says that the port is there" { CHAR 0..=7 wo };
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "debugcon",
    title: "Debug console (isa-debugcon)",
    manual: "Bochs user manual, \"port e9 hack\"; QEMU documentation of isa-debugcon",
    modelled: "Characters go out on channel 0; reads give the read-back value.",
    not_modelled: "",
    deviations: "",
    banks: &[&PORTS],
    outputs: &[],
    inputs: &[],
};

/// Where the port is unless the board says otherwise.
pub const IOBASE: u16 = 0xe9;
/// What a read gives unless the board says otherwise.
pub const READBACK: u8 = 0xe9;

/// The console's state: nothing but what the board gave it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    readback: u8,
}

/// The debug console. The board maps its one-port bank at the `iobase` of its choice.
#[derive(Debug)]
pub struct DebugCon {
    s: State,
}

impl DebugCon {
    /// A console whose port reads as `readback` ([`READBACK`] as a rule).
    pub fn new(readback: u8) -> DebugCon {
        DebugCon { s: State { readback } }
    }
}

impl Device for DebugCon {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        Limits::sizes(1, 1)
    }
    fn peek(&self, _bank: usize, _register: &Register) -> Option<u64> {
        Some(u64::from(self.s.readback))
    }
    fn read(&mut self, _bank: usize, _offset: u64, _size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        Ok(u64::from(self.s.readback))
    }
    fn write(
        &mut self,
        _bank: usize,
        _offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        cx.send(0, &[value as u8]);
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, _cx: &mut Cx<'_>) {}
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        ensure(s.readback == self.s.readback, || {
            format!("the saved console reads as {:#04x}, this one as {:#04x}", s.readback, self.s.readback)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws};

    device_laws!(DebugCon::new(READBACK));

    #[test]
    fn logs_and_says_that_it_is_there() {
        let mut b = Bench::new(DebugCon::new(READBACK));
        assert_eq!(b.in8(0), 0xe9);
        b"SeaBIOS\n".iter().for_each(|c| b.out8(0, *c));
        assert_eq!(b.sent(0), b"SeaBIOS\n");
    }

    #[test]
    fn state_of_another_console_is_refused() {
        let mut b = Bench::new(DebugCon::new(READBACK));
        let other = DebugCon::new(0).save().unwrap();
        assert!(b.call(|d, cx| d.load(&other, cx)).is_err());
    }
}
