//! System control port A (port 92h): the fast A20 gate and the fast reset of the IBM PS/2.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Request, Reset, registers};
use serde::{Deserialize, Serialize};

registers! {
    /// The one port.
    pub bank PORTS "ports" Port 1 {
        CONTROL_A 0x0 1 rw = 0x00, "System control port A", "Fast reset and A20; reset happens when FAST_RESET goes from 0 to 1" {
            FAST_RESET 0; A20 1; RESERVED_2 2 ro; LOCK 3 ro; WATCHDOG 4 ro; RESERVED_5 5 ro; ACTIVITY 6..=7 rw };
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "port92",
    title: "System control port A",
    manual: "IBM Personal System/2 Hardware Interface Technical Reference, \"System control port A\"",
    modelled: "A20 gate, fast reset on the rising edge of bit 0, the bits of the activity lamp.",
    not_modelled: "Watchdog and password lock: their bits read as zero.",
    deviations: "",
    banks: &[&PORTS],
    outputs: &[],
    inputs: &[],
};

/// Where the port is on a PC.
pub const IOBASE: u16 = 0x92;

/// The port's state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    value: u8,
}

/// The port.
#[derive(Debug, Default)]
pub struct Port92 {
    s: State,
}

impl Port92 {
    /// The port with all bits zero.
    pub fn new() -> Port92 {
        Port92::default()
    }
}

impl Device for Port92 {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        Limits::sizes(1, 1)
    }
    fn peek(&self, _bank: usize, _register: &Register) -> Option<u64> {
        Some(u64::from(self.s.value))
    }
    fn read(&mut self, _bank: usize, _offset: u64, _size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        Ok(u64::from(self.s.value))
    }
    fn write(
        &mut self,
        _bank: usize,
        _offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        let old = self.s.value;
        self.s.value = CONTROL_A.write(u64::from(old), value) as u8;
        if (old ^ self.s.value) & 2 != 0 {
            cx.request(Request::A20(self.s.value & 2 != 0));
        }
        if self.s.value & !old & 1 != 0 {
            cx.request(Request::Reset("port 92h, fast reset"));
        }
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, _cx: &mut Cx<'_>) {
        self.s = State::default();
    }
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        ensure(s.value & 0x3c == 0, || format!("reserved bits of port 92h are set: {:#04x}", s.value))?;
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws};

    device_laws!(Port92::new());

    #[test]
    fn a20_and_reset_on_an_edge() {
        let mut b = Bench::new(Port92::new());
        b.out8(0, 0x02);
        assert_eq!(b.requests, [Request::A20(true)]);
        assert_eq!(b.in8(0), 2);
        b.out8(0, 0x03);
        b.out8(0, 0xff);
        assert_eq!(b.in8(0), 0xc3);
        assert_eq!(b.requests.len(), 2, "one reset for one edge");
        b.out8(0, 0x00);
        assert_eq!(b.requests.last(), Some(&Request::A20(false)));
    }
}
