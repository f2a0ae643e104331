//! Devices that `-device` adds, with their properties.

use crate::config::{Config, DeviceSpec, nearest};
use crate::pc::{BoardError, Pc};
use hyaline_devices::net::pcnet::Pcnet;
use hyaline_devices::test::isa_debug_exit::{self, IsaDebugExit};
use hyaline_devices::test::pc_testdev::{self, PcTestdev};
use hyaline_devices::test::pci_testdev::PciTestdev;
use hyaline_devices::test::pvpanic::{self, PvPanic};

/// A property: name, what it is, default.
type Prop = (&'static str, &'static str, &'static str);

/// One kind of device.
struct Kind {
    name: &'static str,
    bus: &'static str,
    what: &'static str,
    props: &'static [Prop],
    add: fn(&mut Pc, &Wish<'_>) -> Result<(), BoardError>,
}

const ADDR: Prop = ("addr", "PCI device number, hexadecimal, 2 to 1f", "the next free one");
const ID: Prop = ("id", "a name for it", "");

const KINDS: &[Kind] = &[
    Kind {
        name: "isa-debug-exit",
        bus: "ISA",
        what: "a write ends the program with exit code value * 2 + 1",
        props: &[ID, ("iobase", "first port", "0x501"), ("iosize", "ports: 1, 2 or 4", "2")],
        add: |pc, w| {
            let iosize = w.number("iosize", u64::from(isa_debug_exit::IOSIZE), 4)?;
            if !matches!(iosize, 1 | 2 | 4) {
                return w.wrong("iosize", "it is 1, 2 or 4");
            }
            let iobase = w.number("iobase", u64::from(isa_debug_exit::IOBASE), 0xffff)?;
            let slot = pc.slot(&w.id("isa-debug-exit"), Box::new(IsaDebugExit::new()));
            pc.map_ports_sized(&slot, 0, iobase as u16, u128::from(iosize))?;
            pc.place(&slot);
            Ok(())
        },
    },
    Kind {
        name: "pc-testdev",
        bus: "ISA",
        what: "the test device of kvm-unit-tests",
        props: &[ID],
        add: |pc, w| {
            let slot = pc.slot(&w.id("pc-testdev"), Box::new(PcTestdev::new()));
            for (bank, base) in pc_testdev::BASES.into_iter().enumerate() {
                match u16::try_from(base) {
                    Ok(port) => pc.map_ports(&slot, bank, port)?,
                    Err(_) => pc.map_memory(&slot, bank, base)?,
                };
            }
            for n in 0..24 {
                slot.bind_named(&format!("irq{n}"), &pc.core.line(&format!("isa.irq{n}")));
            }
            pc.place(&slot);
            Ok(())
        },
    },
    Kind {
        name: "pci-testdev",
        bus: "PCI",
        what: "counts accesses of chosen widths (QEMU: docs/specs/pci-testdev)",
        props: &[ID, ADDR],
        add: |pc, w| {
            let slot = pc.slot(&w.id("pci-testdev"), Box::new(PciTestdev::new()));
            pc.add_pci(&slot, w.address()?, 0, &[])?;
            Ok(())
        },
    },
    Kind {
        name: "pcnet",
        bus: "PCI",
        what: "AMD Am79C970A PCnet-PCI II network card; its network is empty for now",
        props: &[ID, ADDR, ("mac", "six bytes with colons", "52:54:00:12:34:56")],
        add: |pc, w| {
            let mac = w.mac("mac", [0x52, 0x54, 0, 0x12, 0x34, 0x56])?;
            let slot = pc.slot(&w.id("pcnet"), Box::new(Pcnet::new(mac)));
            let device = pc.add_pci(&slot, w.address()?, 0, &[])?;
            slot.bind(0, &pc.pci_line(device, 0));
            Ok(())
        },
    },
    Kind {
        name: "pvpanic",
        bus: "ISA",
        what: "the guest's kernel reports a panic",
        props: &[ID, ("ioport", "port", "0x505")],
        add: |pc, w| {
            let port = w.number("ioport", u64::from(pvpanic::IOBASE), 0xffff)?;
            let slot = pc.slot(&w.id("pvpanic"), Box::new(PvPanic::new()));
            pc.map_ports(&slot, 0, port as u16)?;
            pc.place(&slot);
            Ok(())
        },
    },
];

/// Other names for the same.
const ALIASES: &[(&str, &str)] = &[("am79c970a", "pcnet"), ("testdev", "pc-testdev")];

/// What is wished of a device: its specification with the defaults of `-global`.
struct Wish<'a> {
    spec: &'a DeviceSpec,
    config: &'a Config,
    kind: &'static Kind,
}

impl Wish<'_> {
    fn get(&self, prop: &str) -> Option<&str> {
        self.spec.get(prop).or_else(|| self.config.global(self.kind.name, prop))
    }
    fn id(&self, default: &str) -> String {
        self.get("id").unwrap_or(default).to_string()
    }
    fn wrong<T>(&self, prop: &str, why: &str) -> Result<T, BoardError> {
        Err(BoardError(format!("-device {}: {prop}={}: {why}", self.kind.name, self.get(prop).unwrap_or(""))))
    }
    fn number(&self, prop: &str, default: u64, max: u64) -> Result<u64, BoardError> {
        match self.get(prop).map(parse_number) {
            None => Ok(default),
            Some(Some(n)) if n <= max => Ok(n),
            Some(Some(_)) => self.wrong(prop, &format!("it is {max:#x} ({max}) at most")),
            Some(None) => self.wrong(prop, "no number; write for example 0xf4"),
        }
    }
    fn address(&self) -> Result<Option<u8>, BoardError> {
        let Some(text) = self.get("addr") else { return Ok(None) };
        let (device, function) = text.split_once('.').unwrap_or((text, "0"));
        let hex = |t: &str| u8::from_str_radix(t.trim_start_matches("0x"), 16).ok();
        match (hex(device), hex(function)) {
            (Some(n @ 0..=31), Some(0)) => Ok(Some(n)),
            (Some(_), Some(0)) => self.wrong("addr", "device numbers are 0 to 1f"),
            (_, Some(_)) => self.wrong("addr", "only function 0 is possible"),
            _ => self.wrong("addr", "write a device number, hexadecimal, for example 04"),
        }
    }
    fn mac(&self, prop: &str, default: [u8; 6]) -> Result<[u8; 6], BoardError> {
        let Some(text) = self.get(prop) else { return Ok(default) };
        let bytes: Option<Vec<u8>> = text.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect();
        match bytes.as_deref().map(<[u8; 6]>::try_from) {
            Some(Ok(mac)) if mac[0] & 1 == 0 => Ok(mac),
            Some(Ok(_)) => {
                self.wrong(prop, "a multicast address (its first byte is odd) can't be a card's own")
            }
            _ => self.wrong(prop, "write six bytes with colons, for example 52:54:00:12:34:56"),
        }
    }
}

/// `0x…` hexadecimal, else decimal.
pub(crate) fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn find(name: &str) -> Result<&'static Kind, String> {
    let name = ALIASES.iter().find(|(a, _)| *a == name).map_or(name, |(_, n)| n);
    KINDS.iter().find(|k| k.name == name).ok_or_else(|| {
        let near = nearest(name, KINDS.iter().map(|k| k.name))
            .map_or(String::new(), |n| format!("; did you mean `{n}`?"));
        format!("-device: no device `{name}`{near} (`-device help` lists them)")
    })
}

/// Text of `-device help`, or of `-device NAME,help`.
///
/// # Errors
/// No such device.
pub fn help(name: Option<&str>) -> Result<String, String> {
    use std::fmt::Write;
    let mut s = String::new();
    match name {
        None => {
            for k in KINDS {
                let _ = writeln!(s, "name \"{}\", bus {}, desc \"{}\"", k.name, k.bus, k.what);
            }
        }
        Some(name) => {
            let k = find(name)?;
            let _ = writeln!(s, "{} options:", k.name);
            for (n, what, default) in k.props {
                let default =
                    if default.is_empty() { String::new() } else { format!(" (default: {default})") };
                let _ = writeln!(s, "  {n}=<{what}>{default}");
            }
        }
    }
    Ok(s)
}

/// Checks a specification without a machine: its name and its properties' names.
///
/// # Errors
/// What is unknown, with the nearest that is known.
pub fn check(spec: &DeviceSpec) -> Result<(), String> {
    let kind = find(&spec.name)?;
    for (prop, _) in &spec.props {
        if !kind.props.iter().any(|(n, _, _)| n == prop) {
            let names: Vec<&str> = kind.props.iter().map(|p| p.0).collect();
            let near = nearest(prop, names.iter().copied())
                .map_or(String::new(), |n| format!("; did you mean `{n}`?"));
            return Err(format!(
                "-device {}: unknown property `{prop}`{near} (there are {})",
                kind.name,
                names.join(", ")
            ));
        }
    }
    Ok(())
}

/// Adds a device to a board.
///
/// # Errors
/// Unknown device or property, a bad value, a place that is taken: in words.
pub(crate) fn add(pc: &mut Pc, spec: &DeviceSpec, config: &Config) -> Result<(), BoardError> {
    check(spec).map_err(BoardError)?;
    let kind = find(&spec.name).map_err(BoardError)?;
    let wish = Wish { spec, config, kind };
    let id = wish.id(kind.name);
    if pc.devices.iter().any(|d| d.slot.name() == id) {
        // QEMU numbers what has no name; two with one name are a mistake.
        if wish.get("id").is_some() {
            return Err(BoardError(format!("-device {}: the id `{id}` is taken", kind.name)));
        }
        let n = (1..).find(|n| !pc.devices.iter().any(|d| d.slot.name() == format!("{id}.{n}"))).unwrap_or(1);
        let mut spec = spec.clone();
        spec.props.push(("id".into(), format!("{id}.{n}")));
        return (kind.add)(pc, &Wish { spec: &spec, config, kind });
    }
    (kind.add)(pc, &wish)
}
