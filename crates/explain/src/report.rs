//! Hyaline's own crash reports: JSON lines, the first of which has the member `hyaline_crash_report`.
//!
//! The reader takes what it knows and keeps the rest: lines may carry `type` (or `kind`, or `record`), members may be
//! missing, numbers may be numbers or `"0x..."` strings, and a report cut in the middle is read up to the cut.

use serde_json::{Map, Value};

use crate::frame;
use crate::model::{Format, Frame, Report, Stack, StackKind};

/// Records kept of one report.
const MAX_RECORDS: usize = 20_000;

/// Accesses of all devices that are kept of a report.
const MAX_LAST: usize = 16;

/// What a report says.
#[derive(Debug, Clone, Default)]
pub struct CrashReport {
    /// Format version, the value of `hyaline_crash_report`.
    pub version: u64,
    /// The program's version.
    pub program: String,
    /// What happened: `device-panic`, `triple-fault`, `kvm-internal-error`, `hang`, `request`, ...
    pub cause: String,
    /// The panic's message or another text.
    pub message: String,
    /// Source file and line of the panic.
    pub location: String,
    /// The device concerned.
    pub device: String,
    /// The access in hand.
    pub access: Option<ReportAccess>,
    /// The last accesses of the device, oldest first.
    pub recent: Vec<ReportAccess>,
    /// Names of the other records and how many of each.
    pub others: Vec<(String, usize)>,
    /// Guest functions, innermost first.
    pub guest: Vec<String>,
    /// The processors, one line each: number, mode, instruction pointer.
    pub vcpus: Vec<String>,
    /// The last lines of the guest's console.
    pub console: Vec<String>,
    /// The last accesses of all devices, oldest first; at most 16 are kept.
    pub last: std::collections::VecDeque<ReportAccess>,
    /// What was done about it.
    pub policy: String,
    /// Lines that are not JSON (the cut end of a report, for instance).
    pub broken: usize,
    /// Guest time, as written.
    pub time: String,
    /// The machine, in a line.
    pub machine: String,
    /// Who executed the guest.
    pub accelerator: String,
    /// Where the guest's symbols are from.
    pub symbols: String,
    /// The device's chip.
    pub chip: String,
    /// The way of the access in hand, layer by layer.
    pub path: Vec<String>,
    /// The device's registers, one line each.
    pub registers: Vec<String>,
    /// Guest stacks, one line each: processor, functions, how they were found.
    pub stacks: Vec<String>,
    /// Devices in a call at that moment.
    pub at_work: Vec<String>,
    /// The program's threads, one line each.
    pub threads: Vec<String>,
}

/// An access as a report gives it.
#[derive(Debug, Clone, Default)]
pub struct ReportAccess {
    /// `pio` or `mmio`.
    pub space: String,
    /// `write` or `read`.
    pub dir: String,
    /// Address.
    pub addr: Option<u64>,
    /// Bytes.
    pub size: Option<u64>,
    /// Device.
    pub device: String,
    /// Start of the region.
    pub base: Option<u64>,
    /// Offset.
    pub offset: Option<u64>,
    /// Register.
    pub register: String,
    /// Width of the register.
    pub width: Option<u64>,
    /// Value.
    pub value: Option<u64>,
    /// Names of its fields.
    pub decoded: Vec<String>,
    /// Time, as written.
    pub time: String,
    /// Virtual CPU.
    pub vcpu: Option<u64>,
    /// The guest's function that made it, or the instruction's address.
    pub guest: String,
}

fn text(m: &Map<String, Value>, names: &[&str]) -> String {
    for n in names {
        match m.get(*n) {
            Some(Value::String(s)) => return s.chars().take(400).collect(),
            Some(Value::Number(x)) => return x.to_string(),
            Some(Value::Object(o)) => {
                let inner = text(o, &["name", "id", "message", "text"]);
                if !inner.is_empty() {
                    return inner;
                }
            }
            _ => {}
        }
    }
    String::new()
}

fn num(m: &Map<String, Value>, names: &[&str]) -> Option<u64> {
    names.iter().find_map(|n| match m.get(*n) {
        Some(Value::Number(x)) => x.as_u64().or_else(|| x.as_i64().map(|v| v as u64)),
        Some(Value::String(s)) => frame::number(s),
        _ => None,
    })
}

fn access(m: &Map<String, Value>) -> ReportAccess {
    let mut a = ReportAccess {
        space: text(m, &["space"]),
        dir: text(m, &["dir", "direction"]),
        addr: num(m, &["addr", "address", "port", "gpa"]),
        size: num(m, &["size", "len", "length"]),
        device: text(m, &["device", "dev", "owner"]),
        base: num(m, &["region_base", "base"]),
        offset: num(m, &["offset", "off"]),
        register: text(m, &["register", "reg"]),
        width: m.get("register").and_then(Value::as_object).and_then(|r| num(r, &["width"])),
        value: num(m, &["value", "val", "data"]),
        decoded: Vec::new(),
        time: text(m, &["time", "t", "at"]),
        vcpu: num(m, &["vcpu", "cpu", "actor_id"]),
        guest: text(m, &["guest"]),
    };
    if a.guest.is_empty()
        && let Some(rip) = num(m, &["rip"]).filter(|r| *r != 0)
    {
        a.guest = format!("{rip:#x}");
    }
    if a.dir.is_empty()
        && let Some(Value::Bool(w)) = m.get("write").or_else(|| m.get("is_write"))
    {
        a.dir = if *w { "write" } else { "read" }.into();
    }
    match m.get("decoded").or_else(|| m.get("fields")) {
        Some(Value::Array(v)) => {
            a.decoded =
                v.iter().take(64).map(|x| x.as_str().map_or_else(|| x.to_string(), str::to_owned)).collect()
        }
        Some(Value::String(s)) => {
            a.decoded = s.split([' ', '|', ',']).filter(|s| !s.is_empty()).map(str::to_owned).collect()
        }
        _ => {}
    }
    a
}

/// Strings of an array, each cut at 300 characters.
fn strings(v: Option<&Value>, most: usize) -> Vec<String> {
    let list = v.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    list.iter().take(most).filter_map(Value::as_str).map(|s| s.chars().take(300).collect()).collect()
}

/// The machine's description in a line.
fn machine(m: &Map<String, Value>) -> String {
    let mut out = vec![format!("board {}", text(m, &["board"]))];
    let accelerator = text(m, &["accelerator"]);
    if !accelerator.is_empty() {
        out.push(format!("accelerator {accelerator}"));
    }
    let cpu = text(m, &["cpu"]);
    let kind = if cpu.is_empty() { String::new() } else { format!(" ({cpu})") };
    if let Some(n) = num(m, &["cpus"]) {
        out.push(format!("{n} processor{}{kind}", if n == 1 { "" } else { "s" }));
    }
    if let Some(n) = num(m, &["memory_bytes"]) {
        out.push(format!("{} MiB", n >> 20));
    }
    for (name, word) in
        [("kernel", "kernel"), ("append", "command line"), ("bios", "firmware"), ("restore", "restored from")]
    {
        let value = text(m, &[name]);
        if !value.is_empty() {
            out.push(format!("{word} `{value}`"));
        }
    }
    if let Some(Value::Array(devices)) = m.get("devices") {
        let names: Vec<String> =
            devices.iter().take(64).filter_map(Value::as_object).map(|d| text(d, &["name"])).collect();
        out.push(format!("devices {}", names.join(" ")));
    }
    out.join(", ")
}

/// A device's registers, a line each.
fn registers(m: &Map<String, Value>) -> Vec<String> {
    let Some(Value::Array(list)) = m.get("registers") else {
        let why = text(m, &["text"]);
        return if why.is_empty() { Vec::new() } else { vec![why] };
    };
    let one = |r: &Map<String, Value>| {
        let decoded = strings(r.get("decoded"), 16).join(" | ");
        let decoded = if decoded.is_empty() { decoded } else { format!(" {decoded}") };
        format!(
            "{}+{:02x} {} = {}{decoded}",
            text(r, &["bank"]),
            num(r, &["offset"]).unwrap_or(0),
            text(r, &["name"]),
            text(r, &["hex", "value"])
        )
    };
    list.iter().take(512).filter_map(Value::as_object).map(one).collect()
}

fn frames(v: &Value) -> Vec<Frame> {
    let Value::Array(list) = v else { return Vec::new() };
    list.iter()
        .take(2000)
        .enumerate()
        .map(|(i, f)| {
            let mut out = Frame { number: Some(i as u32), ..Frame::default() };
            match f {
                Value::String(s) => {
                    out.function = frame::normal_name(
                        s.split(" at ").next().unwrap_or(s).split('+').next().unwrap_or(s),
                    );
                }
                Value::Object(m) => {
                    out.function = frame::normal_name(&text(m, &["function", "symbol", "name"]));
                    out.file = text(m, &["file"]);
                    out.line = num(m, &["line"]).map(|l| l as u32);
                    out.pc = num(m, &["pc", "ip", "address"]);
                    out.module = text(m, &["module"]);
                    out.module_offset = num(m, &["offset", "module_offset"]);
                }
                _ => {}
            }
            out
        })
        .collect()
}

/// Collects the lines of a report.
pub struct Builder {
    report: CrashReport,
    stacks: Vec<Stack>,
    records: usize,
}

impl Builder {
    /// Starts when the first line is the head of a report.
    pub fn start(line: &str) -> Option<Self> {
        if !line.starts_with('{') || !line.contains("hyaline_crash_report") {
            return None;
        }
        let mut b = Self { report: CrashReport::default(), stacks: Vec::new(), records: 0 };
        match serde_json::from_str::<Value>(line) {
            Ok(Value::Object(m)) => {
                b.report.version = num(&m, &["hyaline_crash_report"]).unwrap_or(1);
                b.report.program = text(&m, &["program", "version", "hyaline"]);
                b.take(&m);
            }
            // The head itself is cut: still ours.
            _ => b.report.broken += 1,
        }
        Some(b)
    }

    /// Takes one more line.
    pub fn line(&mut self, line: &str) {
        let line = line.trim();
        if line.is_empty() || self.records >= MAX_RECORDS {
            return;
        }
        self.records += 1;
        match serde_json::from_str::<Value>(line) {
            Ok(Value::Object(m)) => self.take(&m),
            _ => self.report.broken += 1,
        }
    }

    fn take(&mut self, m: &Map<String, Value>) {
        let r = &mut self.report;
        let kind = text(m, &["type", "kind", "record"]);
        if m.contains_key("hyaline_crash_report") {
            r.time = text(m, &["time"]);
        }
        for (slot, names) in [
            (&mut r.cause, &["cause", "reason", "event"][..]),
            (&mut r.message, &["message", "panic", "error"]),
            (&mut r.location, &["location"]),
            (&mut r.policy, &["policy", "on_device_panic"]),
        ] {
            if slot.is_empty() {
                *slot = text(m, names);
            }
        }
        match kind.as_str() {
            "panic" | "device-panic" | "triple-fault" | "kvm-internal-error" | "hang"
                if r.cause.is_empty() =>
            {
                kind.clone_into(&mut r.cause)
            }
            _ => {}
        }
        let is_recent =
            matches!(kind.as_str(), "recent" | "last" | "ring" | "last-access" | "device-access" | "history");
        if matches!(kind.as_str(), "access" | "current-access" | "access-in-hand") {
            r.access = Some(access(m));
        } else if is_recent && (m.contains_key("addr") || m.contains_key("offset")) {
            r.recent.push(access(m));
        } else if kind == "recorder" {
            r.last.push_back(access(m));
            if r.last.len() > MAX_LAST {
                r.last.pop_front();
            }
        } else if kind == "vcpu" {
            let registers = m.get("registers").and_then(Value::as_object);
            let get = |name| registers.map_or(String::new(), |x| text(x, &[name]));
            if r.vcpus.len() < 256 {
                r.vcpus.push(format!(
                    "Processor {} was at rip {} in {}, CR3 {}, IDT at {}, {} instructions executed.",
                    num(m, &["vcpu"]).unwrap_or(r.vcpus.len() as u64),
                    get("rip"),
                    text(m, &["mode"]),
                    get("cr3"),
                    get("idt"),
                    num(m, &["instructions"]).unwrap_or(0)
                ));
            }
        } else if kind == "machine" {
            r.accelerator = text(m, &["accelerator"]);
            r.machine = machine(m);
        } else if kind == "symbols" {
            r.symbols = text(m, &["text"]);
        } else if kind == "chip" {
            r.chip = text(m, &["title", "name"]);
        } else if kind == "path" {
            r.path = strings(m.get("lines"), 40);
        } else if kind == "registers" {
            r.registers = registers(m);
        } else if kind == "at-work" && r.at_work.len() < 64 {
            let by = m.get("in_hand").and_then(Value::as_object).map(access);
            let what = by.map_or("the host's side, a timer or a line".to_string(), |a| {
                let who = a.vcpu.map_or("somebody".to_string(), |v| format!("vCPU {v}"));
                let value = a.value.map_or(String::new(), |v| format!(" = {v:#x}"));
                format!(
                    "{who}: {} of {}{value}",
                    a.dir,
                    if a.register.is_empty() { "no register" } else { &a.register }
                )
            });
            r.at_work.push(format!("{}: in a call, by {what}", text(m, &["of", "name"])));
        } else if kind == "thread" {
            if r.threads.len() < 256 {
                let field = |n: &str| text(m, &[n]);
                let waits = Some(field("waits_in")).filter(|w| !w.is_empty() && w != "0");
                r.threads.push(format!(
                    "{} {}: {}, {} ms of processor time{}",
                    field("tid"),
                    field("name"),
                    field("state"),
                    num(m, &["cpu_ms"]).unwrap_or(0),
                    waits.map_or(String::new(), |w| format!(", waits in {w}"))
                ));
            }
        } else if kind == "console" {
            let tail = text(m, &["text"]);
            let lines: Vec<&str> = tail.lines().collect();
            r.console = lines
                .iter()
                .skip(lines.len().saturating_sub(5))
                .map(|l| l.chars().take(200).collect())
                .collect();
        } else if !kind.is_empty() && kind != "end" {
            if let Some(o) = r.others.iter_mut().find(|o| o.0 == kind) {
                o.1 += 1;
            } else if r.others.len() < 100 {
                r.others.push((kind.clone(), 1));
            }
        }
        if let Some(Value::Object(a)) = m.get("access") {
            r.access = Some(access(a));
        }
        for n in ["recent", "last_accesses", "accesses", "device_accesses"] {
            if let Some(Value::Array(list)) = m.get(n) {
                r.recent.extend(list.iter().take(4096).filter_map(Value::as_object).map(access));
            }
        }
        if r.device.is_empty() {
            r.device = text(m, &["device"]);
        }
        if let Some(Value::Array(list)) = m.get("guest_stack") {
            r.guest.extend(list.iter().take(200).map(|x| {
                x.as_str().map_or_else(
                    || x.as_object().map(|o| text(o, &["function", "symbol", "name"])).unwrap_or_default(),
                    str::to_owned,
                )
            }));
        }
        if kind == "guest-stack" && r.stacks.len() < 64 {
            let names = strings(m.get("frames"), 200);
            let sure =
                |i: usize| m.get("sure").and_then(|v| v.get(i)).and_then(Value::as_bool).unwrap_or(true);
            let marked: Vec<String> = names
                .iter()
                .enumerate()
                .take(16)
                .map(|(i, n)| if sure(i) { n.clone() } else { format!("? {n}") })
                .collect();
            if !marked.is_empty() {
                let by = text(m, &["by"]);
                let by = if by.is_empty() || by == "here" { String::new() } else { format!(" (by {by})") };
                let of = num(m, &["vcpu"]).unwrap_or(0);
                r.stacks.push(format!("Processor {of}: {}{by}", marked.join(" <- ")));
            }
        }
        for n in ["frames", "stack", "backtrace"] {
            let Some(v) = m.get(n) else { continue };
            let frames = frames(v);
            if frames.is_empty() {
                continue;
            }
            if kind.contains("guest") {
                r.guest.extend(frames.into_iter().map(|f| f.function));
            } else if self.stacks.len() < 64 {
                self.stacks.push(Stack {
                    kind: StackKind::Thread,
                    thread: None,
                    name: text(m, &["thread", "name"]),
                    format: Format::HyalineReport,
                    frames,
                    dropped: 0,
                    messages: Vec::new(),
                    signalled: false,
                });
            }
        }
    }

    /// Puts the result into the input's report.
    pub fn finish(self, out: &mut Report) {
        out.frames += self.stacks.iter().map(|s| s.frames.len() as u64).sum::<u64>();
        out.stacks_found += self.stacks.len() as u64;
        out.stacks.extend(self.stacks);
        out.hyaline = Some(self.report);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_report_is_read_whole_or_cut() {
        let t = concat!(
            "{\"hyaline_crash_report\":1,\"version\":\"0.1.0\",\"cause\":\"device-panic\",\"device\":\"lsi0\"}\n",
            "{\"type\":\"panic\",\"message\":\"no current request\",\"location\":\"devices/lsi.rs:624\"}\n",
            "{\"type\":\"access\",\"space\":\"pio\",\"dir\":\"write\",\"addr\":\"0xc02f\",\"size\":1,\"device\":\"lsi0\",\"region_base\":49152,\"offset\":47,\"register\":{\"name\":\"DSP\",\"width\":4},\"value\":178}\n",
            "{\"type\":\"recent\",\"addr\":49172,\"dir\":\"write\",\"register\":\"ISTAT\",\"value\":32}\n",
            "{\"type\":\"stack\",\"frames\":[\"hyaline::lsi::go\",{\"function\":\"hyaline::run\",\"line\":3}]}\n",
            "{\"type\":\"regis",
        );
        let r = crate::reader::read(t.as_bytes()).expect("reads");
        let h = r.hyaline.expect("a report");
        assert_eq!((h.version, h.device.as_str(), h.message.as_str()), (1, "lsi0", "no current request"));
        let a = h.access.expect("access");
        assert_eq!((a.addr, a.register.as_str(), a.width), (Some(0xc02f), "DSP", Some(4)));
        assert_eq!((h.recent.len(), h.broken, r.stacks.len()), (1, 1, 1));
    }
}
