//! The coprocessor error register of the ISA bridge (port F0h): the latch between the processor's FERR# and interrupt 13.

use hyaline_device::state::{StateError, Value, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Reset, registers};
use serde::{Deserialize, Serialize};

registers! {
    /// The one port.
    pub bank PORTS "ports" Port 1 {
        CERR 0x0 1 wo = 0x00, "PIIX3, CERR", "Coprocessor error: a write of any value takes interrupt 13 back" !effect;
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "cerr",
    title: "Coprocessor error register (port F0h)",
    manual: "Intel 82371SB data sheet (290550-002), CERR",
    modelled: "interrupt 13 when the processor asserts FERR#, until the port is written.",
    not_modelled: "IGNNE#: a processor with a pending x87 error and CR0.NE = 0 goes on with its instructions, and asserts FERR# again at the next \
        x87 instruction that waits for errors.",
    deviations: "",
    banks: &[&PORTS],
    outputs: &["irq13"],
    inputs: &[],
};

/// Where the port is on a PC.
pub const IOBASE: u16 = 0xf0;

/// What is saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Interrupt 13 is asked for.
    asserted: bool,
}

/// The latch.
#[derive(Debug, Default)]
pub struct Cerr {
    s: State,
}

impl Cerr {
    /// A latch without an error.
    pub fn new() -> Cerr {
        Cerr::default()
    }

    /// The processor asserted FERR# (SDM vol. 1 §8.7.2).
    pub fn fpu_error(&mut self, cx: &mut Cx<'_>) {
        self.set(true, cx);
    }

    fn set(&mut self, asserted: bool, cx: &mut Cx<'_>) {
        if self.s.asserted != asserted {
            self.s.asserted = asserted;
            cx.line(0).set(asserted);
        }
    }
}

impl Device for Cerr {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        Limits::sizes(1, 1)
    }
    fn peek(&self, _bank: usize, _register: &Register) -> Option<u64> {
        Some(u64::from(self.s.asserted))
    }
    fn read(&mut self, _bank: usize, _offset: u64, _size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        Ok(0xff)
    }
    fn write(
        &mut self,
        _bank: usize,
        _offset: u64,
        _size: u8,
        _value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        self.set(false, cx);
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        self.set(false, cx);
    }
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        self.s = from_value(state)?;
        Ok(())
    }
    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws};

    device_laws!(Cerr::new());

    #[test]
    fn an_error_stays_until_the_port_is_written() {
        let mut b = Bench::new(Cerr::new());
        b.call(|d, cx| d.fpu_error(cx));
        b.call(|d, cx| d.fpu_error(cx));
        assert!(b.level(0));
        b.out8(0, 0);
        assert!(!b.level(0));
        b.call(|d, cx| d.fpu_error(cx));
        assert!(b.level(0), "the next one is seen");
    }
}
