//! `isa-debug-exit`: a guest ends the program with an exit code of its choice.

use hyaline_device::state::{StateError, Value, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Request, Reset, registers};
use serde::{Deserialize, Serialize};

registers! {
    /// The port; wider accesses reach it as one value as far as `iosize` goes.
    pub bank PORTS "ports" Port 4 {
        EXIT 0x0 4 wo = 0x0, "QEMU isa-debug-exit", "Ends the program with the exit code value * 2 + 1. Reads as zero";
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "isa-debug-exit",
    title: "Debug exit port (isa-debug-exit)",
    manual: "QEMU, behaviour of -device isa-debug-exit as its users (kvm-unit-tests, Linux kselftests) rely on it",
    modelled: "A write of 1 to 4 bytes asks the machine to end with exit code (value << 1) | 1. A read gives zero.",
    not_modelled: "",
    deviations: "",
    banks: &[&PORTS],
    outputs: &[],
    inputs: &[],
};

/// Where the port is unless `iobase` says otherwise.
pub const IOBASE: u16 = 0x501;
/// Ports that it takes unless `iosize` says otherwise.
pub const IOSIZE: u8 = 0x02;

/// Nothing is kept.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {}

/// The exit port. The board maps the first `iosize` (1 to 4) ports of its bank at `iobase`.
#[derive(Debug, Default)]
pub struct IsaDebugExit {
    s: State,
}

impl IsaDebugExit {
    /// The port.
    pub fn new() -> IsaDebugExit {
        IsaDebugExit::default()
    }
}

impl Device for IsaDebugExit {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        // At an odd base such as 501h wide accesses are unaligned.
        let any = hyaline_space::Sizes::unaligned(1, 4);
        Limits { valid: any, impl_: any, ..Limits::DEFAULT }
    }
    fn peek(&self, _bank: usize, _register: &Register) -> Option<u64> {
        None
    }
    fn read(&mut self, _bank: usize, _offset: u64, _size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        Ok(0)
    }
    fn write(
        &mut self,
        _bank: usize,
        _offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        // The host keeps the low 8 bits; what is passed on is the whole number as C's int would hold it.
        cx.request(Request::Exit(((value as u32) << 1 | 1) as i32));
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, _cx: &mut Cx<'_>) {}
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        self.s = from_value(state)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws};

    device_laws!(IsaDebugExit::new());

    #[test]
    fn exit_codes_are_odd() {
        let mut b = Bench::new(IsaDebugExit::new());
        for (size, value, code) in [(1, 0x10, 0x21), (4, 0, 1), (2, 0x7fff, 0xffff), (4, 0xffff_ffff, -1)] {
            b.requests.clear();
            b.write(0, 0, size, value);
            assert_eq!(b.requests, [Request::Exit(code)]);
        }
        assert_eq!(b.in8(0), 0);
    }
}
