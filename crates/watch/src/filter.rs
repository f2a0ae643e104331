//! Which accesses are wanted: the filters of `-trace`.

use crate::record::{AccessRecord, Site};
use hyaline_device::{Chip, Slot};
use hyaline_space::{Actor, ExitKind, Outcome};
use std::path::PathBuf;
use std::sync::Arc;

/// What a machine has that a filter can name: for messages and checks.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    devices: Vec<(String, &'static Chip)>,
}

impl Vocabulary {
    /// Of a machine's slots.
    pub fn new<'a>(slots: impl IntoIterator<Item = &'a Arc<Slot>>) -> Vocabulary {
        Vocabulary { devices: slots.into_iter().map(|s| (s.name().to_string(), s.chip())).collect() }
    }
    /// Names of the devices.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().map(|(n, _)| n.as_str())
    }
    fn registers(&self, device: &str) -> Vec<&'static str> {
        let here = self.devices.iter().filter(|(n, _)| glob(device, n));
        let mut names: Vec<_> =
            here.flat_map(|(_, c)| c.banks.iter().flat_map(|b| b.registers.iter().map(|r| r.name))).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// `*` stands for anything, `?` for one character; letter case does not matter.
pub fn glob(pattern: &str, text: &str) -> bool {
    let (p, t) = (pattern.as_bytes(), text.as_bytes());
    let (mut i, mut j, mut star) = (0, 0, None);
    while j < t.len() {
        match p.get(i) {
            Some(b'*') => {
                star = Some((i, j));
                i += 1;
            }
            Some(c) if *c == b'?' || c.eq_ignore_ascii_case(&t[j]) => {
                i += 1;
                j += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    i = at + 1;
                    j = from + 1;
                    star = Some((at, from + 1));
                }
                None => return false,
            },
        }
    }
    p[i..].iter().all(|c| *c == b'*')
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Space(String),
    Range(String, u64, u64),
    Device(String),
    /// Device and register, both with wildcards.
    Register(String, String),
    Exit(String),
    Size(u8),
    Value(u64),
    Vcpu(u8),
    Guest(String),
    Write(bool),
    Unassigned,
    Failed,
    Split,
    Dma,
}

impl Test {
    /// Conditions of the same kind are alternatives.
    fn kind(&self) -> u8 {
        match self {
            Test::Space(_) | Test::Range(..) => 0,
            Test::Device(_) | Test::Register(..) => 1,
            Test::Exit(_) | Test::Dma => 2,
            Test::Size(_) => 3,
            Test::Value(_) => 4,
            Test::Vcpu(_) => 5,
            Test::Guest(_) => 6,
            Test::Write(_) => 7,
            Test::Unassigned | Test::Failed => 8,
            Test::Split => 9,
        }
    }
    fn holds(&self, r: &AccessRecord, s: &Site, guest: &dyn Fn() -> Option<String>) -> bool {
        let last = r.addr.saturating_add(length(r).saturating_sub(1));
        match self {
            Test::Space(space) => s.space_label() == space,
            Test::Range(space, from, to) => s.space_label() == space && r.addr <= *to && last >= *from,
            Test::Device(name) => glob(name, &r.device(s)),
            Test::Register(device, register) => {
                s.register.is_some_and(|x| glob(register, x.name)) && glob(device, &r.device(s))
            }
            Test::Exit(kind) => {
                let name = r.exit.as_str();
                name == kind || name.strip_prefix(kind.as_str()).is_some_and(|rest| rest.starts_with('.'))
            }
            Test::Size(n) => r.size == *n,
            Test::Value(v) => r.value == *v,
            Test::Vcpu(n) => r.actor == Actor::Vcpu(*n),
            Test::Guest(name) => guest().is_some_and(|g| glob(name, g.split('+').next().unwrap_or(&g))),
            Test::Write(w) => r.is_write == *w,
            Test::Unassigned => r.outcome == Outcome::Unassigned,
            Test::Failed => !r.outcome.is_ok(),
            Test::Split => r.parts > 1,
            Test::Dma => r.exit == ExitKind::Dma,
        }
    }
}

/// Bytes of an access: DMA may have more than a processor's access has.
pub(crate) fn length(r: &AccessRecord) -> u64 {
    if r.exit == ExitKind::Dma { u64::from(r.count.max(u32::from(r.size))) } else { u64::from(r.size) }
}

/// Conditions that all must hold; those of one kind are alternatives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Condition, and whether it is negated.
    tests: Vec<(Test, bool)>,
}

impl Filter {
    /// Does the access match? `guest` gives the guest's function, and is asked only if the filter wants it.
    pub fn matches(&self, r: &AccessRecord, s: &Site, guest: &dyn Fn() -> Option<String>) -> bool {
        let mut seen = 0u32;
        let mut met = 0u32;
        for (test, negated) in &self.tests {
            let holds = test.holds(r, s, guest);
            if *negated {
                if holds {
                    return false;
                }
                continue;
            }
            let bit = 1 << test.kind();
            seen |= bit;
            if holds {
                met |= bit;
            }
        }
        seen == met
    }
    /// Does it look at the guest's functions?
    pub fn wants_symbols(&self) -> bool {
        self.tests.iter().any(|(t, _)| matches!(t, Test::Guest(_)))
    }
    /// Does it want bus masters' accesses to memory?
    pub fn wants_dma(&self) -> bool {
        let positive = |f: fn(&Test) -> bool| self.tests.iter().any(|(t, not)| !not && f(t));
        positive(|t| matches!(t, Test::Dma)) || positive(|t| matches!(t, Test::Exit(k) if k == "dma"))
    }

    /// Says what is wrong with the names in it, and what there is.
    ///
    /// # Errors
    /// A device or a register that the machine does not have.
    pub fn check(&self, v: &Vocabulary) -> Result<(), String> {
        for (test, _) in &self.tests {
            match test {
                Test::Device(d) | Test::Register(d, _) if !v.devices().any(|n| glob(d, n)) => {
                    let names: Vec<_> = v.devices().collect();
                    return Err(format!(
                        "there is no device `{d}`{}; this machine has {}",
                        did_you_mean(d, v.devices()),
                        names.join(", ")
                    ));
                }
                Test::Register(d, r) if !v.registers(d).iter().any(|n| glob(r, n)) => {
                    let names = v.registers(d);
                    let near = did_you_mean(r, names.iter().copied());
                    let what = if d == "*" { "any device".to_string() } else { format!("`{d}`") };
                    let list = if names.len() > 60 {
                        format!("{} and {} more", names[..60].join(", "), names.len() - 60)
                    } else {
                        names.join(", ")
                    };
                    return Err(format!("there is no register `{r}` of {what}{near}; there are {list}"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// How lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Columns, for people.
    #[default]
    Text,
    /// One JSON object a line.
    Jsonl,
}

/// One `-trace`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// What is wanted: any of these.
    pub filters: Vec<Filter>,
    /// Where it goes; standard error without.
    pub file: Option<PathBuf>,
    /// How.
    pub format: Format,
    /// The text, for messages.
    pub text: String,
}

/// Forms of a condition, for messages.
const FORMS: &str = "io:FROM-TO, mem:FROM-TO, config:FROM-TO, dev:NAME, reg:DEVICE.REGISTER, exit:pio.in|pio.out|mmio.read|mmio.write|dma, \
                     size=N, value=N, vcpu=N, guest=FUNCTION, read, write, unassigned, failed, split, dma, all; != negates; * and ? are wildcards";

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().flat_map(char::to_lowercase).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().flat_map(char::to_lowercase).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let next = (diagonal + usize::from(x != *y)).min(*cell + 1).min(left + 1);
            diagonal = *cell;
            *cell = next;
            left = next;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

fn did_you_mean<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> String {
    let word: String = word.chars().take(40).collect();
    let near = names.map(|n| (distance(&word, n), n)).min().filter(|(d, _)| *d <= (word.len() / 2).max(2));
    near.map_or(String::new(), |(_, n)| format!("; did you mean `{n}`?"))
}

fn number(text: &str) -> Result<u64, String> {
    let t = text.trim().replace('_', "");
    let parsed = match t.strip_prefix("0x").or_else(|| t.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => t.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no number; write 0x3f8 or 1016"))
}

/// `A`, `A-B` (both included) or `A+LENGTH`.
fn range(text: &str) -> Result<(u64, u64), String> {
    if let Some((a, n)) = text.split_once('+') {
        let (a, n) = (number(a)?, number(n)?);
        let last = a.checked_add(n.saturating_sub(1)).filter(|_| n > 0);
        return Ok((a, last.ok_or_else(|| format!("`{text}` is an empty range"))?));
    }
    let (a, b) = match text.split_once('-') {
        Some((a, b)) => (number(a)?, number(b)?),
        None => (number(text)?, number(text)?),
    };
    if a > b { Err(format!("the range {text} ends before it begins")) } else { Ok((a, b)) }
}

/// QEMU's trace events of an access' way, and what they stand for here.
const EVENTS: &[(&str, Event)] = &[
    ("memory_region_ops_read", Event::Read(None)),
    ("memory_region_ops_write", Event::Write(None)),
    ("memory_region_subpage_read", Event::Read(Some("mem"))),
    ("memory_region_subpage_write", Event::Write(Some("mem"))),
    ("memory_region_tb_read", Event::Read(Some("mem"))),
    ("memory_region_tb_write", Event::Write(Some("mem"))),
    ("memory_region_ram_device_read", Event::Nothing),
    ("memory_region_ram_device_write", Event::Nothing),
    ("cpu_in", Event::Read(Some("io"))),
    ("cpu_out", Event::Write(Some("io"))),
    ("ioport_read", Event::Read(Some("io"))),
    ("ioport_write", Event::Write(Some("io"))),
];

#[derive(Clone, Copy)]
enum Event {
    Read(Option<&'static str>),
    Write(Option<&'static str>),
    /// Known to QEMU, and can't happen here.
    Nothing,
}

/// The filters that QEMU's event names (a pattern with `*`) stand for.
fn events(pattern: &str) -> Result<Vec<Filter>, String> {
    let known: Vec<_> = EVENTS.iter().filter(|(n, _)| glob(pattern, n)).collect();
    if known.is_empty() {
        let names: Vec<_> = EVENTS.iter().map(|(n, _)| *n).collect();
        return Err(format!(
            "no trace event matches `{pattern}`{}; of QEMU's events there are those of the memory path: {}",
            did_you_mean(pattern, names.iter().copied()),
            names.join(", ")
        ));
    }
    let mut filters = Vec::new();
    for (_, event) in known {
        let (write, space) = match event {
            Event::Read(s) => (false, s),
            Event::Write(s) => (true, s),
            Event::Nothing => continue,
        };
        let mut tests = vec![(Test::Write(write), false)];
        tests.extend(space.map(|s| (Test::Space(s.to_string()), false)));
        let filter = Filter { tests };
        if !filters.contains(&filter) {
            filters.push(filter);
        }
    }
    Ok(filters)
}

fn is_event(word: &str) -> bool {
    let stem = ["memory_region_", "cpu_in", "cpu_out", "ioport_"];
    stem.iter().any(|s| word.starts_with(s))
        || word.contains('*') && EVENTS.iter().any(|(n, _)| glob(word, n))
}

fn test(word: &str) -> Result<(Test, bool), String> {
    let plain = match word {
        "unassigned" => Some(Test::Unassigned),
        "failed" => Some(Test::Failed),
        "split" => Some(Test::Split),
        "dma" => Some(Test::Dma),
        "read" => Some(Test::Write(false)),
        "write" => Some(Test::Write(true)),
        "io" | "mem" => Some(Test::Space(word.to_string())),
        "config" => Some(Test::Space("pci-config".into())),
        _ => None,
    };
    if let Some(test) = plain {
        return Ok((test, false));
    }
    let (key, value, negated) = match word.split_once("!=") {
        Some((k, v)) => (k, v, true),
        None => match word.split_once([':', '=']) {
            Some((k, v)) => (k, v, false),
            None => return Err(format!("`{word}` is no condition. There are {FORMS}")),
        },
    };
    if value.is_empty() {
        return Err(format!("`{word}`: something is missing behind `{key}`. There are {FORMS}"));
    }
    let small = |most: u64| {
        number(value).and_then(|n| {
            u8::try_from(n).ok().filter(|_| n <= most).ok_or_else(|| format!("`{word}`: at most {most}"))
        })
    };
    let test = match key {
        "io" | "pio" | "port" | "mem" | "mmio" | "config" => {
            let (from, to) = range(value)?;
            let space = match key {
                "mem" | "mmio" => "mem",
                "config" => "pci-config",
                _ => "io",
            };
            if space == "io" && from > 0xffff {
                return Err(format!(
                    "{from:#x} ({from}) is no port: ports end at 0xffff; for memory write mem:{value}"
                ));
            }
            Test::Range(space.to_string(), from, to)
        }
        "dev" | "device" => Test::Device(value.to_string()),
        "reg" | "register" => match value.rsplit_once('.') {
            Some((d, r)) => Test::Register(d.to_string(), r.to_string()),
            None => Test::Register("*".into(), value.to_string()),
        },
        "exit" => {
            let kinds = ["pio", "pio.in", "pio.out", "mmio", "mmio.read", "mmio.write", "dma"];
            let value = value.to_ascii_lowercase();
            if !kinds.contains(&value.as_str()) {
                let near = did_you_mean(&value, kinds.into_iter());
                return Err(format!("there is no exit kind `{value}`{near}; there are {}", kinds.join(", ")));
            }
            Test::Exit(value)
        }
        "size" => Test::Size(small(8)?),
        "value" => Test::Value(number(value)?),
        "vcpu" | "cpu" => Test::Vcpu(small(255)?),
        "guest" => Test::Guest(value.to_string()),
        _ => {
            let keys = ["io", "mem", "config", "dev", "reg", "exit", "size", "value", "vcpu", "guest"];
            let near = did_you_mean(key, keys.into_iter());
            return Err(format!("`{word}`: there is no condition `{key}`{near}. There are {FORMS}"));
        }
    };
    Ok((test, negated))
}

impl Spec {
    /// Text of `-trace help`.
    pub fn help() -> String {
        let events: Vec<_> = EVENTS.iter().map(|(n, _)| *n).collect();
        format!(
            "-trace CONDITION[,CONDITION...][,file=PATH][,format=text|jsonl]: one line for each access to a device that meets the conditions.\n\
             Conditions: {FORMS}.\n\
             Conditions of one kind are alternatives; those of different kinds must all be met. Several -trace each add accesses.\n\
             A RANGE is FROM-TO (both included), FROM+LENGTH or one address. Also QEMU's events of the memory path, by name or as\n\
             enable=PATTERN or events=FILE: {}.\n\
             Examples: -trace reg:serial0.LSR   -trace 'exit:mmio.write,size!=4'   -trace 'guest=ata_sff_*'\n\
             -trace file=all.jsonl,format=jsonl,all\n",
            events.join(", ")
        )
    }

    /// All accesses, as text.
    pub fn all() -> Spec {
        Spec { filters: vec![Filter::default()], text: "all".into(), ..Spec::default() }
    }

    /// Reads one `-trace` argument.
    ///
    /// # Errors
    /// What is not understood, and what there is.
    pub fn parse(text: &str) -> Result<Spec, String> {
        let mut spec = Spec { text: text.to_string(), ..Spec::default() };
        let mut filter = Filter::default();
        let (mut named, mut by_event) = (Vec::new(), false);
        for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            match word.split_once('=') {
                Some(("file", path)) => spec.file = Some(PathBuf::from(path)),
                Some(("format", "text" | "log")) => spec.format = Format::Text,
                Some(("format", "jsonl" | "json")) => spec.format = Format::Jsonl,
                Some(("format", other)) => {
                    return Err(format!("format={other}: there are text and jsonl"));
                }
                Some(("enable", pattern)) => {
                    by_event = true;
                    named.extend(events(pattern)?);
                }
                Some(("events", path)) => {
                    let list = std::fs::read_to_string(path)
                        .map_err(|e| format!("events={path}: the list of events can't be read: {e}"))?;
                    by_event = true;
                    for line in list.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
                        named.extend(events(line)?);
                    }
                }
                _ if word == "all" => {}
                _ if is_event(word) => {
                    by_event = true;
                    named.extend(events(word)?);
                }
                _ => filter.tests.push(test(word)?),
            }
        }
        spec.filters = if !by_event {
            vec![filter]
        } else {
            // Events choose, conditions narrow.
            let narrowed = |mut f: Filter| {
                f.tests.extend(filter.tests.iter().cloned());
                f
            };
            named.into_iter().map(narrowed).collect()
        };
        Ok(spec)
    }

    /// Checks the names against what the machine has.
    ///
    /// # Errors
    /// See [`Filter::check`].
    pub fn check(&self, v: &Vocabulary) -> Result<(), String> {
        self.filters.iter().try_for_each(|f| f.check(v))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> AccessRecord {
        AccessRecord {
            seq: 1,
            time: 5,
            rip: 0x10,
            addr: 0xc012,
            value: 0x58,
            offset: 0x12,
            took: 0,
            site: 0,
            count: 0,
            actor: Actor::Vcpu(1),
            exit: ExitKind::PioOut,
            size: 2,
            is_write: true,
            parts: 1,
            outcome: Outcome::Ok,
        }
    }
    fn site() -> Site {
        Site {
            id: 0,
            space: "io".into(),
            region: 1,
            path: "/io/io".into(),
            name: "io".into(),
            owner: "net0".into(),
            register: Some(&hyaline_devices::net::pcnet::CHIP.banks[1].registers[0]),
        }
    }
    fn hit(text: &str) -> bool {
        let guest = || Some("outw+0x4".to_string());
        let spec = Spec::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        spec.filters.iter().any(|f| f.matches(&record(), &site(), &guest))
    }

    #[test]
    fn conditions() {
        let name = site().register_name().to_string();
        for yes in [
            "",
            "all",
            "io",
            "io:0xc012",
            "io:0xc000-0xc01f",
            "io:0xc013",
            "io:0xc010+8",
            "dev:net0",
            "dev:NET*",
            "exit:pio",
            "exit:pio.out",
            "size=2",
            "size!=4",
            "value=0x58",
            "vcpu=1",
            "guest=out*",
            "write",
            "dev!=serial0",
            "dev:serial0,dev:net0",
            "io:0x3f8,io:0xc012",
            "memory_region_ops_write",
            "enable=memory_region_ops_*",
            "cpu_out,size=2",
            "memory_region_*",
            "cpu_*",
        ] {
            assert!(hit(yes), "{yes}");
        }
        assert!(hit(&format!("reg:net0.{name}")) && hit(&format!("reg:{}", name.to_lowercase())));
        for no in [
            "mem",
            "io:0xc014-0xc01f",
            "dev:serial0",
            "exit:mmio.write",
            "size=4",
            "size!=2",
            "vcpu=0",
            "guest=in*",
            "read",
            "dma",
            "unassigned",
            "split",
            "failed",
            "dev:net0,size=1",
            "memory_region_ops_read",
            "cpu_out,size=4",
            "memory_region_subpage_write",
            "memory_region_ram_device_read",
            "dev!=net0",
        ] {
            assert!(!hit(no), "{no}");
        }
    }

    #[test]
    fn each_processors_own_apic() {
        let (mut s, r) = (site(), record());
        s.owner = "lapic".into();
        let hit = |text: &str| Spec::parse(text).unwrap().filters.iter().any(|f| f.matches(&r, &s, &|| None));
        assert!(hit("dev:lapic1") && hit("dev:lapic*") && hit("dev!=lapic0") && !hit("dev:lapic0"));
    }

    #[test]
    fn what_is_not_understood_is_told() {
        for (text, want) in [
            ("io:0x10000", "mem:0x10000"),
            ("io:9-3", "ends before"),
            ("exit:mmoi.write", "did you mean `mmio.write`"),
            ("devic:serial0", "did you mean `dev`"),
            ("bogus", "reg:DEVICE.REGISTER"),
            ("size=9", "at most 8"),
            ("size=x", "no number"),
            ("format=xml", "jsonl"),
            ("enable=virtio_*", "memory_region_ops_read"),
            ("memory_region_opps_read", "did you mean `memory_region_ops_read`"),
            ("reg:", "missing"),
        ] {
            let e = Spec::parse(text).expect_err(text);
            assert!(e.contains(want), "{text}: {e}");
        }
        let spec = Spec::parse("file=/tmp/x.jsonl,format=jsonl,dev:serial0").unwrap();
        assert_eq!((spec.file, spec.format), (Some("/tmp/x.jsonl".into()), Format::Jsonl));
    }

    #[test]
    fn names_are_checked() {
        let v = Vocabulary {
            devices: vec![
                ("serial0".into(), &hyaline_devices::serial::ns16550::CHIP),
                ("net0".into(), &hyaline_devices::net::pcnet::CHIP),
            ],
        };
        let check = |t: &str| Spec::parse(t).unwrap().check(&v);
        assert_eq!(check("reg:serial0.LSR,dev:net*"), Ok(()));
        let e = check("dev:serail0").unwrap_err();
        assert!(e.contains("did you mean `serial0`") && e.contains("serial0, net0"), "{e}");
        let e = check("reg:serial0.LRS").unwrap_err();
        assert!(e.contains("did you mean") && e.contains("LSR") && e.contains("MCR"), "{e}");
    }

    #[test]
    fn patterns() {
        for (p, t, want) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abcb", false),
            ("ata_sff_*", "ata_sff_exec", true),
            ("?b", "ab", true),
            ("a**b*", "ab", true),
            ("a*a*a*a*b", "aaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(glob(p, t), want, "{p} {t}");
        }
    }
}
