//! pvpanic: the guest's kernel tells that it panicked.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Request, Reset, registers};
use serde::{Deserialize, Serialize};

registers! {
    /// The one port.
    pub bank PORTS "ports" Port 1 {
        EVENT 0x0 1 rw = 0x03, "pvpanic: ISA device", "Read: the events that are understood. Write: an event happened" {
            PANICKED 0 wo; CRASH_LOADED 1 wo };
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "pvpanic",
    title: "Panic notifier (pvpanic)",
    manual: "QEMU specifications, \"PVPANIC DEVICE\"",
    modelled: "Both events of the ISA form.",
    not_modelled: "The event of an orderly shutdown (bit 2), which a read does not offer.",
    deviations: "",
    banks: &[&PORTS],
    outputs: &[],
    inputs: &[],
};

/// Where the port is unless `ioport` says otherwise. The guest learns it from the file `etc/pvpanic-port` of fw_cfg (2 bytes).
pub const IOBASE: u16 = 0x505;

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// The state: the events it offers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    events: u8,
}

/// The notifier.
#[derive(Debug)]
pub struct PvPanic {
    s: State,
}

impl Default for PvPanic {
    fn default() -> PvPanic {
        PvPanic { s: State { events: PANICKED | CRASH_LOADED } }
    }
}

impl PvPanic {
    /// A notifier of both events.
    pub fn new() -> PvPanic {
        PvPanic::default()
    }
}

impl Device for PvPanic {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        Limits::sizes(1, 1)
    }
    fn peek(&self, _bank: usize, _register: &Register) -> Option<u64> {
        Some(u64::from(self.s.events))
    }
    fn read(&mut self, _bank: usize, _offset: u64, _size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        Ok(u64::from(self.s.events))
    }
    fn write(
        &mut self,
        _bank: usize,
        _offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        let event = value as u8;
        if event & !self.s.events != 0 {
            cx.guest_error(format_args!("pvpanic event {event:#04x} has bits that were not offered"));
        }
        if event & PANICKED != 0 {
            cx.request(Request::GuestPanicked);
        } else if event & CRASH_LOADED != 0 {
            cx.request(Request::GuestCrashLoaded);
        }
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, _cx: &mut Cx<'_>) {}
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        ensure(s.events & !3 == 0, || format!("unknown pvpanic events {:#04x}", s.events))?;
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws};

    device_laws!(PvPanic::new());

    #[test]
    fn tells_of_panics() {
        let mut b = Bench::new(PvPanic::new());
        assert_eq!(b.in8(0), 3);
        b.out8(0, 1);
        b.out8(0, 2);
        b.out8(0, 4);
        assert_eq!(b.requests, [Request::GuestPanicked, Request::GuestCrashLoaded]);
        assert_eq!(b.complaints.len(), 1);
    }
}
