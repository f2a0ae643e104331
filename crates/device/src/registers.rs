//! Register declarations: written once by a device's author, read by everybody else.
//!
//! From one `registers!` table come the constants a chip decodes with, its write masks and reset values, the text of
//! traces and explanations, the monitor's register view, the pages under `docs/devices/` and the dictionary of the
//! device laws.

use std::fmt;

/// What software may do with a register or field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read and written as stored.
    Rw,
    /// Writes are ignored.
    Ro,
    /// Reads give no stored value.
    Wo,
    /// Writing a one clears the bit.
    W1c,
    /// Reading clears it.
    Rc,
}

impl Kind {
    /// Short form used in tables: `rw`, `ro`, `wo`, `w1c`, `rc`.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Rw => "rw",
            Kind::Ro => "ro",
            Kind::Wo => "wo",
            Kind::W1c => "w1c",
            Kind::Rc => "rc",
        }
    }
    /// Does a read reach this register?
    pub fn readable(self) -> bool {
        self != Kind::Wo
    }
    /// Does a write reach this register?
    pub fn writable(self) -> bool {
        !matches!(self, Kind::Ro | Kind::Rc)
    }
}

/// A named group of bits of a register.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// The manual's name.
    pub name: &'static str,
    /// Lowest bit.
    pub lsb: u8,
    /// Number of bits, 1..=64.
    pub width: u8,
    /// What software may do with it.
    pub kind: Kind,
    /// Names of values, where the manual names them.
    pub values: &'static [(u64, &'static str)],
}

impl Field {
    /// The field's bits in the register.
    pub const fn mask(&self) -> u64 {
        (if self.width >= 64 { u64::MAX } else { (1 << self.width) - 1 }) << self.lsb
    }
    /// The field's value, taken out of a register's.
    pub const fn get(&self, value: u64) -> u64 {
        (value & self.mask()) >> self.lsb
    }
}

/// One register.
#[derive(Clone, Copy, Debug)]
pub struct Register {
    /// The manual's name.
    pub name: &'static str,
    /// Byte offset in its bank.
    pub offset: u64,
    /// Bytes.
    pub width: u8,
    /// What software may do with it.
    pub kind: Kind,
    /// Value after reset.
    pub reset: u64,
    /// Manual section that defines it.
    pub section: &'static str,
    /// One line on what it is for.
    pub doc: &'static str,
    /// Reading it changes something: an inspector must not.
    pub effect: bool,
    /// When it is the one at its offset, if that depends on other state, in words: `DLAB = 1`.
    pub when: &'static str,
    /// Fields, from the lowest.
    pub fields: &'static [Field],
}

impl Register {
    /// All bits of the register.
    pub const fn full_mask(&self) -> u64 {
        if self.width >= 8 { u64::MAX } else { (1 << (self.width as u32 * 8)) - 1 }
    }

    /// Bits that a write stores (`rw`, `wo`). Without fields the register's kind goes for all bits.
    pub const fn write_mask(&self) -> u64 {
        self.mask_of(Kind::Rw) | self.mask_of(Kind::Wo)
    }

    /// Bits that have this kind.
    pub const fn mask_of(&self, kind: Kind) -> u64 {
        if self.fields.is_empty() {
            return if self.kind as u8 == kind as u8 { self.full_mask() } else { 0 };
        }
        let (mut mask, mut i) = (0, 0);
        while i < self.fields.len() {
            if self.fields[i].kind as u8 == kind as u8 {
                mask |= self.fields[i].mask();
            }
            i += 1;
        }
        mask
    }

    /// The stored value after `value` is written over `old`: `rw` and `wo` bits are taken, `w1c` bits cleared where
    /// `value` has ones, all others kept.
    pub const fn write(&self, old: u64, value: u64) -> u64 {
        let w = self.write_mask();
        (old & !w | value & w) & !(value & self.mask_of(Kind::W1c))
    }

    /// The field of this name.
    pub fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|f| f.name == name)
    }

    /// A value in words, for traces: `0x83 DLAB|WLS=8 bits`. Single bits are named when set, wider fields when they are
    /// not zero or their value has a name.
    pub fn decode(&self, value: u64) -> Decoded<'_> {
        Decoded { register: self, value }
    }

    /// True when any of `size` bytes at `offset` belong to this register.
    pub const fn covers(&self, offset: u64, size: u8) -> bool {
        offset < self.offset + self.width as u64 && self.offset < offset + size as u64
    }
}

/// See [`Register::decode`].
pub struct Decoded<'a> {
    register: &'a Register,
    value: u64,
}

impl Decoded<'_> {
    /// The words alone, without the number.
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        for field in self.register.fields.iter().rev() {
            let v = field.get(self.value);
            match field.values.iter().find(|(n, _)| *n == v) {
                Some((_, name)) if field.width == 1 && v == 1 => words.push((*name).to_string()),
                Some((_, name)) if field.width > 1 => words.push(format!("{}={name}", field.name)),
                None if v != 0 && field.width == 1 => words.push(field.name.to_string()),
                None if v != 0 => words.push(format!("{}={v:#x}", field.name)),
                _ => {}
            }
        }
        words
    }
}

impl fmt::Display for Decoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#0width$x}", self.value, width = 2 + 2 * self.register.width as usize)?;
        let words = self.words();
        if words.is_empty() { Ok(()) } else { write!(f, " {}", words.join("|")) }
    }
}

/// Which kind of address reaches a bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// I/O ports.
    Port,
    /// Guest-physical memory.
    Memory,
    /// PCI configuration space.
    Config,
    /// Behind an index register of another bank (CMOS, PCnet CSRs): not dispatched by address.
    Indexed,
}

/// Registers that sit together behind one base address.
#[derive(Clone, Copy, Debug)]
pub struct Bank {
    /// Name within the chip: `ports`, `bar0`, `config`, `csr`.
    pub name: &'static str,
    /// How it is reached.
    pub place: Place,
    /// Bytes of address space it decodes (index values for [`Place::Indexed`]).
    pub size: u64,
    /// Its registers, in the order of declaration.
    pub registers: &'static [Register],
}

impl Bank {
    /// The register an access reaches when nothing but offset and direction decides: an exact start first, then any that
    /// covers the offset.
    pub fn at(&self, offset: u64, is_write: bool) -> Option<&'static Register> {
        let fits = |r: &&'static Register| {
            if is_write { r.kind != Kind::Ro && r.kind != Kind::Rc } else { r.kind.readable() }
        };
        let here = || self.registers.iter().filter(move |r| r.covers(offset, 1));
        here()
            .filter(|r| r.offset == offset)
            .find(fits)
            .or_else(|| here().find(fits))
            .or_else(|| here().next())
    }
    /// The register of this name.
    pub fn named(&self, name: &str) -> Option<&'static Register> {
        self.registers.iter().find(|r| r.name.eq_ignore_ascii_case(name))
    }
}

/// A chip's head: what it is, what its author read, what is and what isn't modelled.
#[derive(Clone, Copy, Debug)]
pub struct Chip {
    /// Short name used in paths and on the command line: `i8254`.
    pub name: &'static str,
    /// Full name: `Intel 8254 programmable interval timer`.
    pub title: &'static str,
    /// Manual and revision.
    pub manual: &'static str,
    /// What the model does, in a sentence or two.
    pub modelled: &'static str,
    /// What it leaves out, and what a guest sees then.
    pub not_modelled: &'static str,
    /// Deliberate deviations from the manual, with the reason; empty if none.
    pub deviations: &'static str,
    /// Banks, in the order of the device's bank numbers.
    pub banks: &'static [&'static Bank],
    /// Names of output lines, by pin.
    pub outputs: &'static [&'static str],
    /// Names of input lines, by pin.
    pub inputs: &'static [&'static str],
}

impl Chip {
    /// The chip's page for `docs/devices/`.
    pub fn markdown(&self) -> String {
        use fmt::Write;
        let mut s = format!("# {}\n\nName: `{}`. Manual: {}.\n\n", self.title, self.name, self.manual);
        let _ = writeln!(s, "Modelled: {}\n\nNot modelled: {}", self.modelled, or_nothing(self.not_modelled));
        if !self.deviations.is_empty() {
            let _ = writeln!(s, "\nDeviations: {}", self.deviations);
        }
        for (title, names) in [("Output lines", self.outputs), ("Input lines", self.inputs)] {
            if !names.is_empty() {
                let _ = writeln!(
                    s,
                    "\n{title}: {}.",
                    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
                );
            }
        }
        for bank in self.banks {
            let (place, unit) = match bank.place {
                Place::Port => ("I/O ports", "bytes"),
                Place::Memory => ("memory", "bytes"),
                Place::Config => ("PCI configuration space", "bytes"),
                Place::Indexed => ("behind an index register", "indices"),
            };
            let _ = writeln!(s, "\n## Bank `{}`: {place}, {} {unit}\n", bank.name, bank.size);
            s.push_str("| offset | name | bytes | access | reset | section | what |\n|---|---|---|---|---|---|---|\n");
            for r in bank.registers {
                let when = if r.when.is_empty() { String::new() } else { format!(" ({})", r.when) };
                let effect = if r.effect { " Reading it has a side effect." } else { "" };
                let _ = writeln!(
                    s,
                    "| 0x{:02x}{when} | {} | {} | {} | {:#x} | {} | {}.{effect} |",
                    r.offset,
                    r.name,
                    r.width,
                    r.kind.as_str(),
                    r.reset,
                    r.section,
                    r.doc.trim_end_matches('.')
                );
            }
            for r in bank.registers.iter().filter(|r| !r.fields.is_empty()) {
                let _ = writeln!(s, "\n`{}` bits:", r.name);
                for f in r.fields.iter().rev() {
                    let bits = if f.width == 1 {
                        f.lsb.to_string()
                    } else {
                        format!("{}-{}", f.lsb + f.width - 1, f.lsb)
                    };
                    let values =
                        f.values.iter().map(|(v, n)| format!("{v:#x} {n}")).collect::<Vec<_>>().join(", ");
                    let values = if values.is_empty() { values } else { format!(": {values}") };
                    let _ = writeln!(s, "- {bits} {} ({}){values}", f.name, f.kind.as_str());
                }
            }
        }
        s
    }
}

fn or_nothing(s: &str) -> &str {
    if s.is_empty() { "nothing known." } else { s }
}

/// Declares one bank of registers.
///
/// ```
/// hyaline_device::registers! {
///     /// The ports of a small timer.
///     pub bank PORTS "ports" Port 4 {
///         DATA  0x0 1 rw = 0x00, "§2.1", "Counter value" !effect;
///         CTRL  0x1 1 rw = 0x01, "§2.2", "Control" { EN 0; MODE 1..=2 {0 "one shot", 1 "periodic"}; BUSY 7 ro };
///         DIV   0x0 1 rw = 0x00, "§2.3", "Divisor" when "LATCH = 1";
///     }
/// }
/// # use hyaline_device::*;
/// assert_eq!(PORTS.registers[1].decode(0x03).to_string(), "0x03 MODE=periodic|EN");
/// assert_eq!(CTRL.write(0x80, 0xff), 0x87);
/// ```
///
/// Each register becomes a `pub const NAME: Register` of the module, the bank a `pub static`. Wrap a table in a module of
/// its own when two banks share names. Kinds: `rw ro wo w1c rc`; a field without a kind has its register's.
#[macro_export]
macro_rules! registers {
    ($(#[$meta:meta])* $vis:vis bank $bank:ident $name:literal $place:ident $size:literal {
        $($reg:ident $offset:literal $width:literal $kind:ident = $reset:expr, $section:literal, $doc:literal
            $(! $effect:ident)? $(when $when:literal)?
            $({ $($field:ident $lo:literal $(..= $hi:literal)? $($fkind:ident)? $({ $($v:literal $vn:literal),* $(,)? })?);* $(;)? })? ;)*
    }) => {
        $(
            #[doc = concat!($doc, " (", $section, ").")]
            $vis const $reg: $crate::Register = $crate::Register {
                name: stringify!($reg),
                offset: $offset,
                width: $width,
                kind: $crate::registers!(@kind $kind),
                reset: $reset,
                section: $section,
                doc: $doc,
                effect: $crate::registers!(@effect $($effect)?),
                when: concat!("", $($when)?),
                fields: &[$($( $crate::Field {
                    name: stringify!($field),
                    lsb: $lo,
                    width: $crate::registers!(@width $lo $($hi)?),
                    kind: $crate::registers!(@kind $($fkind)? $kind),
                    values: &[$($(($v, $vn)),*)?],
                } ),*)?],
            };
        )*
        $(#[$meta])*
        $vis static $bank: $crate::Bank = $crate::Bank {
            name: $name,
            place: $crate::Place::$place,
            size: $size,
            registers: &[$($reg),*],
        };
    };
    (@kind rw $($rest:ident)?) => { $crate::Kind::Rw };
    (@kind ro $($rest:ident)?) => { $crate::Kind::Ro };
    (@kind wo $($rest:ident)?) => { $crate::Kind::Wo };
    (@kind w1c $($rest:ident)?) => { $crate::Kind::W1c };
    (@kind rc $($rest:ident)?) => { $crate::Kind::Rc };
    (@effect) => { false };
    (@effect effect) => { true };
    (@width $lo:literal) => { 1 };
    (@width $lo:literal $hi:literal) => { $hi - $lo + 1 };
}
