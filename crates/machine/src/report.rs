//! Crash reports: what led there, in a dozen lines on standard error and in a file of JSON lines that `hyaline explain` reads.
//!
//! The file holds no guest RAM unless that is asked for. Each line is one record with a `type`; the first has `hyaline_crash_report`.

use crate::chassis::Core;
use crate::config::{Accel, Config};
use crate::guest_stack;
use crate::pc::Pc;
use hyaline_device::{Crash, Handled, Place, Slot};
use hyaline_ram::RamBlock;
use hyaline_space::{Actor, AddressSpace, ExitKind};
use hyaline_watch::{AccessRecord, Guest, Recorder, Runner, Site, Teller, json};
use hyaline_x86::state::CpuState;
use serde_json::{Value, json as object};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Format of the file: value of the first line's `hyaline_crash_report`.
const VERSION: u32 = 1;
/// Accesses of the device concerned that are kept.
const RECENT: usize = 256;
/// Accesses of everybody that are kept.
const RECORDER: usize = 512;
/// Reports that one run writes at most: a guest that crashes devices on purpose must not fill the disk.
const MOST: u32 = 32;

/// What a report is about.
#[derive(Clone, Debug)]
pub enum Cause {
    /// A device panicked.
    DevicePanic(Arc<Slot>, Crash),
    /// A register handler has been running for this many milliseconds.
    Hang(Arc<Slot>, Option<Handled>, u64),
    /// A processor shut down.
    TripleFault(u8),
    /// KVM can't go on.
    KvmError(String),
    /// Somebody asked.
    Request,
}

impl Cause {
    fn name(&self) -> &'static str {
        match self {
            Cause::DevicePanic(..) => "device-panic",
            Cause::Hang(..) => "hang",
            Cause::TripleFault(_) => "triple-fault",
            Cause::KvmError(_) => "kvm-internal-error",
            Cause::Request => "request",
        }
    }
    fn slot(&self) -> Option<&Arc<Slot>> {
        match self {
            Cause::DevicePanic(slot, _) | Cause::Hang(slot, ..) => Some(slot),
            _ => None,
        }
    }
    fn access(&self) -> Option<&Handled> {
        match self {
            Cause::DevicePanic(_, crash) => crash.access.as_ref(),
            Cause::Hang(_, access, _) => access.as_ref(),
            _ => None,
        }
    }
}

/// What is done about a device that panicked: `-on-device-panic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PanicPolicy {
    /// The device is fenced off, the guest goes on.
    #[default]
    Disable,
    /// The machine ends.
    Stop,
    /// The program aborts, with a core file where the host makes them.
    Abort,
}

impl PanicPolicy {
    /// As on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            PanicPolicy::Disable => "disable",
            PanicPolicy::Stop => "stop",
            PanicPolicy::Abort => "abort",
        }
    }
    fn words(self) -> &'static str {
        match self {
            PanicPolicy::Disable => "device disabled (it reads as absent), the guest continues",
            PanicPolicy::Stop => "the machine stops",
            PanicPolicy::Abort => "the program aborts",
        }
    }
}

/// Writes reports. Shared by the run loop, the watchdog and the signal thread.
pub struct Reporter {
    core: Arc<Core>,
    recorder: Arc<Recorder>,
    guest: Arc<Guest>,
    slots: Vec<Arc<Slot>>,
    memory: AddressSpace,
    ports: AddressSpace,
    config_space: AddressSpace,
    ram: Arc<RamBlock>,
    machine: Value,
    runner: Runner,
    folder: PathBuf,
    with_ram: bool,
    policy: PanicPolicy,
    written: AtomicU32,
    triple_faults: AtomicU32,
    one: Mutex<()>,
}

/// Where an access in hand goes: space, address, region's start.
struct Target<'a> {
    space: &'a AddressSpace,
    addr: u64,
    base: u64,
    region: String,
}

fn seconds(ns: u64) -> String {
    format!("{}.{:06} s", ns / 1_000_000_000, ns / 1000 % 1_000_000)
}

/// Is the slot's device behind a region of this owner? The local APICs share a window.
pub(crate) fn owns(slot: &Slot, owner: &str) -> bool {
    slot.name() == owner || (owner == "lapic" && slot.chip().name == "lapic")
}

/// Both forms of a port or address.
fn both(n: u64) -> String {
    format!("{n:#x} ({n})")
}

fn bytes(n: u8) -> String {
    if n == 1 { "1 byte".into() } else { format!("{n} bytes") }
}

impl Reporter {
    pub(crate) fn new(
        config: &Config,
        pc: &Pc,
        recorder: &Arc<Recorder>,
        guest: &Arc<Guest>,
        accel: &Accel,
    ) -> Reporter {
        let path = |p: &Option<PathBuf>| p.as_ref().map(|p| p.display().to_string());
        let machine = object!({
            "type": "machine", "board": "pc", "accelerator": accel.as_str(), "cpu": config.cpu, "cpus": config.cpus,
            "memory_bytes": config.memory, "deterministic": config.deterministic, "name": config.name,
            "kernel": path(&config.images.kernel), "initrd": config.images.initrd, "append": config.images.append,
            "bios": path(&config.bios), "restore": path(&config.restore),
            "devices": pc.devices.iter().map(|p| object!({
                "name": p.slot.name(), "chip": p.slot.chip().name, "title": p.slot.chip().title, "pci_device": p.pci,
            })).collect::<Vec<_>>(),
            "program": env!("CARGO_PKG_VERSION"), "host": std::env::consts::ARCH,
        });
        Reporter {
            core: pc.core.clone(),
            recorder: recorder.clone(),
            guest: guest.clone(),
            slots: pc.devices.iter().map(|p| p.slot.clone()).collect(),
            memory: pc.memory.clone(),
            ports: pc.ports.clone(),
            config_space: pc.config_space.clone(),
            ram: pc.ram.clone(),
            machine,
            runner: accel.runner(config),
            folder: config.crash_dir.clone().unwrap_or_else(|| PathBuf::from(".")),
            with_ram: config.crash_with_ram,
            policy: config.on_device_panic,
            written: AtomicU32::new(0),
            triple_faults: AtomicU32::new(0),
            one: Mutex::new(()),
        }
    }

    /// The devices, for a watchdog.
    pub(crate) fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// Writes the report and gives the lines for people. `cpus` are the processors' states, where they can be had.
    pub fn report(&self, cause: &Cause, cpus: &[(u8, CpuState)]) -> String {
        let _one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        // A table that does not fit the processors' state is none; the search is only made when there is something to name.
        let lstar = cpus.iter().map(|(_, s)| s.msr.lstar).find(|l| *l != 0);
        let rip = cpus.first().map(|(_, s)| s.rip).or(cause.access().map(|a| a.origin.rip));
        self.guest.search(rip, lstar);
        let repeated =
            matches!(cause, Cause::TripleFault(_)) && self.triple_faults.fetch_add(1, Ordering::Relaxed) > 0;
        let file = if repeated {
            Err("the report of the first triple fault of this run stands".to_string())
        } else if self.written.load(Ordering::Relaxed) >= MOST {
            Err(format!("this run has written {MOST} reports, which is all it writes"))
        } else {
            self.written.fetch_add(1, Ordering::Relaxed);
            let path = self.path();
            self.write(&path, cause, cpus).map(|()| path.clone()).map_err(|e| {
                format!("{} can't be written: {e}; -crash-dir chooses another folder", path.display())
            })
        };
        self.lines(cause, cpus, &file)
    }

    /// A name that no file has yet.
    fn path(&self) -> PathBuf {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let name = |n: u32| {
            let more = if n == 0 { String::new() } else { format!("-{n}") };
            self.folder.join(format!("hyaline-crash-{now}-{}{more}.jsonl", std::process::id()))
        };
        (0..MOST).map(name).find(|p| !p.exists()).unwrap_or_else(|| name(MOST))
    }

    /// Where an access goes that was not recorded yet.
    fn target(&self, slot: &Slot, a: &Handled) -> Option<Target<'_>> {
        let bank = slot.chip().banks.get(a.bank)?;
        let space = match bank.place {
            Place::Port => &self.ports,
            Place::Memory => &self.memory,
            Place::Config => &self.config_space,
            Place::Indexed => return None,
        };
        space.flat_lines().into_iter().filter(|l| owns(slot, &l.owner)).find_map(|l| {
            // A bank in several places has regions named `bank+offset`.
            // The local APICs' common window is named after them, not after their bank.
            let name = if l.owner == slot.name() { l.region.rsplit('/').next()? } else { bank.name };
            let first = match name.strip_prefix(bank.name)? {
                "" => l.offset,
                rest => l.offset + rest.strip_prefix('+')?.parse::<u64>().ok()?,
            };
            let within = a.offset.checked_sub(first).filter(|w| *w <= l.last - l.start)?;
            Some(Target {
                space,
                addr: l.start + within,
                base: (l.start + within).wrapping_sub(a.offset),
                region: l.region.clone(),
            })
        })
    }

    fn symbol(&self, rip: u64) -> Option<String> {
        self.guest.symbols()?.at(rip)
    }

    fn access(&self, slot: &Slot, a: &Handled, time: u64) -> Value {
        let target = self.target(slot, a);
        let vcpu = match a.origin.actor {
            Actor::Vcpu(n) => Some(n),
            _ => None,
        };
        object!({
            "type": "access", "space": space_word(target.as_ref().map_or("", |t| t.space.name()), a.origin.exit),
            "dir": if a.is_write { "write" } else { "read" }, "exit": a.origin.exit.as_str(),
            "addr": target.as_ref().map(|t| t.addr), "size": a.size, "device": slot.name(),
            "region": target.as_ref().map(|t| &t.region), "region_base": target.as_ref().map(|t| t.base),
            "bank": a.bank, "offset": a.offset,
            "register": a.register.map(|r| object!({"name": r.name, "width": r.width, "doc": r.doc, "section": r.section})),
            "value": a.is_write.then_some(a.value),
            "decoded": a.register.filter(|_| a.is_write).map(|r| r.decode(a.value & r.full_mask()).words()),
            "vcpu": vcpu, "rip": a.origin.rip, "guest": self.symbol(a.origin.rip), "time": seconds(time), "time_ns": time,
        })
    }

    /// The last accesses of a device, oldest first.
    fn recent(&self, slot: &Slot) -> Vec<(AccessRecord, Arc<Site>)> {
        let all = self.recorder.last(usize::MAX);
        let sited = all.into_iter().filter_map(|r| Some((r, self.recorder.site(r.site)?)));
        let mut own: Vec<_> = sited.filter(|(r, s)| r.device(s) == slot.name()).collect();
        own.split_off(own.len().saturating_sub(RECENT))
    }

    fn record(&self, kind: &str, slot: Option<&Slot>, r: &AccessRecord, s: &Site) -> Value {
        let mut v = json(r, s);
        if let Some(o) = v.as_object_mut() {
            o.insert("type".into(), kind.into());
            o.insert("space".into(), space_word(&s.space, r.exit).into());
            o.insert("dir".into(), if r.is_write { "write" } else { "read" }.into());
            if kind == "recent" {
                o.insert("device".into(), r.device(s).into());
            }
            o.insert("guest".into(), self.symbol(r.rip).into());
            o.insert("time".into(), seconds(r.time).into());
            o.insert("region_base".into(), r.addr.wrapping_sub(r.offset).into());
            o.insert("bank".into(), slot.and_then(|slot| bank(slot, s)).into());
        }
        v
    }

    fn write(&self, path: &Path, cause: &Cause, cpus: &[(u8, CpuState)]) -> std::io::Result<()> {
        let mut out = BufWriter::new(File::options().write(true).create_new(true).open(path)?);
        let now = self.core.clock.now();
        let mut put = |v: Value| writeln!(out, "{v}");
        let (message, location) = match cause {
            Cause::DevicePanic(_, c) => (c.message.clone(), c.location.clone()),
            Cause::Hang(_, _, ms) => {
                (format!("a register handler has been running for {ms} ms"), String::new())
            }
            Cause::TripleFault(n) => (format!("processor {n} shut down after a triple fault"), String::new()),
            Cause::KvmError(text) => (text.clone(), String::new()),
            Cause::Request => ("a report was asked for".into(), String::new()),
        };
        put(object!({
            "hyaline_crash_report": VERSION, "program": env!("CARGO_PKG_VERSION"), "cause": cause.name(),
            "message": message, "location": location, "device": cause.slot().map_or("", |s| s.name()),
            "policy": if matches!(cause, Cause::DevicePanic(..)) { self.policy.words() } else { "" },
            "time": seconds(now), "time_ns": now, "pid": std::process::id(),
            "unix_time": SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            "holds_guest_ram": self.with_ram,
        }))?;
        put(self.machine.clone())?;
        if let Some(symbols) = self.guest.symbols() {
            put(object!({"type": "symbols", "text": symbols.describe()}))?;
        }
        if let (Some(slot), Some(a)) = (cause.slot(), cause.access()) {
            put(self.access(slot, a, now))?;
            if let Some(lines) = self.way(slot, a) {
                put(object!({"type": "path", "lines": lines}))?;
            }
        }
        if let Some(slot) = cause.slot() {
            put(
                object!({"type": "chip", "name": slot.chip().name, "title": slot.chip().title, "manual": slot.chip().manual,
                "replay": replay(slot)}),
            )?;
            let mut recent = self.recent(slot);
            // The access in hand was recorded too when it came back without an answer; it has a line of its own.
            let same = |r: &AccessRecord, a: &Handled| {
                (r.offset, r.is_write, r.rip) == (a.offset, a.is_write, a.origin.rip) && !r.outcome.is_ok()
            };
            if let (Some((r, _)), Some(a)) = (recent.last(), cause.access())
                && same(r, a)
            {
                recent.pop();
            }
            for (r, s) in recent {
                put(self.record("recent", Some(slot), &r, &s))?;
            }
            put(registers(slot))?;
        }
        for (n, state) in cpus {
            put(cpu(*n, state))?;
            if let Some(symbols) = self.guest.symbols() {
                let frames = guest_stack::stack(state, &self.memory, &symbols);
                let names: Vec<_> = frames.iter().map(|f| f.name.clone()).collect();
                let sure: Vec<_> = frames.iter().map(guest_stack::Frame::sure).collect();
                let by = frames.last().map(|f| f.how.words());
                put(
                    object!({"type": "guest-stack", "vcpu": n, "frames": names, "rips": frames.iter().map(|f| f.rip).collect::<Vec<_>>(),
                    "sure": sure, "by": by}),
                )?;
            }
        }
        if let Cause::DevicePanic(_, crash) = cause
            && !crash.backtrace.is_empty()
        {
            put(
                object!({"type": "stack", "thread": "the one that made the access", "frames": crash.backtrace}),
            )?;
        }
        for (r, s) in
            self.recorder.last(RECORDER).iter().filter_map(|r| Some((*r, self.recorder.site(r.site)?)))
        {
            put(self.record("recorder", None, &r, &s))?;
        }
        for slot in &self.slots {
            if let Some((turn, access)) = slot.busy() {
                let access = access.map(|a| self.access(slot, &a, now));
                put(object!({"type": "at-work", "of": slot.name(), "call": turn / 2, "in_hand": access}))?;
            }
        }
        for thread in threads() {
            put(thread)?;
        }
        let name = |id: u16| self.slots.iter().find(|s| s.id() == id).map(|s| s.name().to_string());
        put(object!({"type": "timers", "now_ns": now, "armed": self.core.timers.armed().into_iter()
            .map(|(slot, timer, at)| object!({"of": name(slot), "timer": timer, "at_ns": at})).collect::<Vec<_>>()}))?;
        put(
            object!({"type": "lines", "high": self.core.lines().iter().filter(|l| l.level()).map(|l| l.name().to_string())
            .collect::<Vec<_>>()}),
        )?;
        for space in [&self.memory, &self.ports] {
            let view: Vec<_> = space.flat_lines().iter().map(|l| object!({
                "start": l.start, "last": l.last, "region": l.region, "of": l.owner, "region_kind": l.kind.as_str(),
            })).collect();
            put(object!({"type": "map", "name": space.name(), "ranges": view}))?;
        }
        let console = self.core.console();
        if !console.is_empty() {
            put(object!({"type": "console", "text": String::from_utf8_lossy(&console)}))?;
        }
        if self.with_ram {
            self.ram_pages(&mut put)?;
        }
        put(object!({"type": "end"}))?;
        out.flush()
    }

    /// Guest RAM that holds anything, 64 KiB a line.
    fn ram_pages(&self, put: &mut impl FnMut(Value) -> std::io::Result<()>) -> std::io::Result<()> {
        const PIECE: u64 = 64 << 10;
        for range in self.ram.populated() {
            let mut at = range.start;
            while at < range.end {
                let mut piece = vec![0; (range.end - at).min(PIECE) as usize];
                if self.ram.read(at, &mut piece).is_ok() && piece.iter().any(|b| *b != 0) {
                    let hex: String = piece.iter().map(|b| format!("{b:02x}")).collect();
                    put(object!({"type": "ram", "block_offset": at, "hex": hex}))?;
                }
                at += PIECE;
            }
        }
        Ok(())
    }

    /// The way of the access in hand, layer by layer.
    fn way(&self, slot: &Slot, a: &Handled) -> Option<Vec<String>> {
        let t = self.target(slot, a)?;
        let path = t.space.resolve(t.addr, a.size, a.is_write);
        let site = Site {
            id: 0,
            space: t.space.name().to_string(),
            region: 0,
            path: t.region.clone(),
            name: t.region.rsplit('/').next().unwrap_or("").to_string(),
            owner: slot.name().to_string(),
            register: a.register,
        };
        let record = AccessRecord {
            seq: self.recorder.accesses() + 1,
            time: self.core.clock.now(),
            rip: a.origin.rip,
            addr: t.addr,
            value: a.value,
            offset: a.offset,
            took: 0,
            site: 0,
            count: a.origin.count,
            actor: a.origin.actor,
            exit: a.origin.exit,
            size: a.size,
            is_write: a.is_write,
            parts: 1,
            outcome: hyaline_space::Outcome::Ok,
        };
        let text = Teller { runner: self.runner }.tell(&path, &record, &site);
        // The last line says what came of it, which is not known here.
        let unknown = |l: &str| {
            let l = l.trim_start_matches([' ', '└']);
            l.starts_with("outcome:") || l.starts_with("value read:")
        };
        Some(text.lines().filter(|l| !unknown(l)).map(str::to_string).collect())
    }

    fn lines(&self, cause: &Cause, cpus: &[(u8, CpuState)], file: &Result<PathBuf, String>) -> String {
        let mut out: Vec<String> = Vec::new();
        out.push(match cause {
            Cause::DevicePanic(slot, c) => {
                let doing = match &c.access {
                    Some(a) if a.is_write => "while handling a guest's write",
                    Some(_) => "while handling a guest's read",
                    None => "outside of a guest's access (a timer, a line, or the host's side)",
                };
                format!("device '{}' ({}) panicked {doing}", slot.name(), slot.chip().title)
            }
            Cause::Hang(slot, _, ms) => {
                format!("device '{}' ({}) has been at work for {ms} ms without an end", slot.name(), slot.chip().title)
            }
            Cause::TripleFault(n) => format!(
                "the guest's processor {n} shut down after a triple fault: an exception could not be delivered, nor the double fault that followed"
            ),
            Cause::KvmError(text) => format!("KVM can't go on: {text}"),
            Cause::Request => "report on demand; the guest goes on".to_string(),
        });
        if let (Some(slot), Some(a)) = (cause.slot(), cause.access()) {
            out.push(format!("  {}", self.sentence(slot, a)));
        }
        if let Cause::DevicePanic(_, c) = cause {
            let place = if c.location.is_empty() { String::new() } else { format!(" at {}", c.location) };
            out.push(format!(
                "  panicked: \"{}\"{place}  (code of the device, not of the machine)",
                c.message
            ));
        }
        if let Cause::TripleFault(n) = cause
            && let (Some((_, state)), Ok(_)) = (cpus.iter().find(|(c, _)| c == n), file)
        {
            out.push(crate::cpu_dump::text(*n, state).trim_end().to_string());
        }
        match cpus {
            [] => {
                out.push("  the processors' states can't be had now: their threads do not come back".into())
            }
            _ => {
                for (n, s) in cpus {
                    let names: Vec<_> = match self.guest.symbols() {
                        Some(symbols) => guest_stack::stack(s, &self.memory, &symbols)
                            .into_iter()
                            .take(4)
                            .map(|f| f.marked())
                            .collect(),
                        None => Vec::new(),
                    };
                    let guest =
                        if names.is_empty() { format!("rip {:#x}", s.rip) } else { names.join(" <- ") };
                    out.push(format!("  processor {n} is at {guest}, in {}", crate::cpu_dump::mode(s)));
                }
            }
        }
        if let Some(slot) = cause.slot() {
            let recent = self.recent(slot);
            let last: Vec<_> = recent
                .iter()
                .rev()
                .take(3)
                .rev()
                .map(|(r, s)| {
                    let arrow = if r.is_write { '=' } else { '?' };
                    format!("+{:02x} {}{arrow}{}", r.offset, s.register_name(), r.value_text(s))
                })
                .collect();
            if !last.is_empty() {
                out.push(format!("  last {} accesses of {}: {}", last.len(), slot.name(), last.join("   ")));
            }
        }
        if matches!(cause, Cause::Hang(..)) {
            let running: Vec<String> = threads()
                .iter()
                .filter(|t| t["state"].as_str().is_some_and(|s| s.starts_with(['R', 'D'])))
                .map(|t| format!("{} ({})", t["name"].as_str().unwrap_or("?"), t["tid"]))
                .collect();
            let who = if running.is_empty() { "none".to_string() } else { running.join(", ") };
            out.push(format!("  threads that compute or wait for the kernel: {who}; all are in the report"));
        }
        if let Cause::TripleFault(n) = cause {
            for r in self.recorder.last_of(usize::from(*n), 3) {
                if let Some(s) = self.recorder.site(r.site) {
                    let dir = if r.is_write { "write" } else { "read" };
                    out.push(format!(
                        "  before: {dir} of {} at {}:{:#x}, {} {}",
                        bytes(r.size),
                        s.space_label(),
                        r.addr,
                        s.label(),
                        s.register_name()
                    ));
                }
            }
        }
        if matches!(cause, Cause::DevicePanic(..)) {
            out.push(format!(
                "  policy: {} (-on-device-panic {})",
                self.policy.words(),
                self.policy.as_str()
            ));
        }
        match file {
            Ok(path) => {
                let ram = if self.with_ram { "it contains guest RAM" } else { "it contains no guest RAM" };
                out.push(format!("  report: {} ({ram})", path.display()));
                out.push(format!("  next: hyaline explain {}", path.display()));
            }
            Err(why) => out.push(format!("  no report file: {why}")),
        }
        out.join("\n")
    }

    /// An access in hand, in a sentence.
    fn sentence(&self, slot: &Slot, a: &Handled) -> String {
        let verb = match (a.origin.exit, a.is_write) {
            (ExitKind::PioIn, _) => "IN",
            (ExitKind::PioOut, _) => "OUT",
            (_, true) => "write of",
            (_, false) => "read of",
        };
        let bank = slot.chip().banks.get(a.bank).map_or("?", |b| b.name);
        let place = match self.target(slot, a) {
            Some(t) if t.space.is_ports() => format!("port {}", both(t.addr)),
            Some(t) => format!("address {} of {}", both(t.addr), t.space.name()),
            None => "its place".into(),
        };
        let value = if a.is_write {
            format!(" {:#0w$x}", a.value, w = 2 + 2 * usize::from(a.size))
        } else {
            String::new()
        };
        let guest = self.symbol(a.origin.rip).unwrap_or_else(|| format!("{:#x}", a.origin.rip));
        format!(
            "guest {verb} {}{value} at {place} -> {}.{bank}+{:02x} {} ({}, instruction at {guest}, access {}, t={})",
            bytes(a.size),
            slot.name(),
            a.offset,
            a.register.map_or("no register", |r| r.name),
            a.origin.actor,
            self.recorder.accesses() + 1,
            seconds(self.core.clock.now())
        )
    }
}

/// `pio`, `mmio`, or the name of another space, as `hyaline explain` knows them.
fn space_word(space: &str, exit: ExitKind) -> String {
    match (space, exit) {
        ("io" | "I/O", _) => "pio".into(),
        ("memory", _) => "mmio".into(),
        ("", ExitKind::PioIn | ExitKind::PioOut) => "pio".into(),
        ("", _) => "mmio".into(),
        (other, _) => other.into(),
    }
}

/// The bank of a device that a site lies in.
fn bank(slot: &Slot, site: &Site) -> Option<usize> {
    let banks = slot.chip().banks;
    let by_register = site.register.and_then(|r| {
        banks.iter().position(|b| b.registers.iter().any(|x| std::ptr::eq(x, r)) && b.place != Place::Indexed)
    });
    by_register.or_else(|| {
        banks.iter().position(|b| {
            site.name == b.name || site.name.strip_prefix(b.name).is_some_and(|r| r.starts_with('+'))
        })
    })
}

/// The program's threads as the host has them: who computes, who waits where.
fn threads() -> Vec<Value> {
    let Ok(folder) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    // Clock ticks of /proc are hundredths of a second on every Linux (proc(5), sysconf(_SC_CLK_TCK)).
    const TICK_MS: u64 = 10;
    let one = |dir: PathBuf| {
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        let stat = read("stat");
        // The name, in parentheses, may hold blanks and parentheses itself.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?.to_string();
        let ticks: u64 = fields.skip(10).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        let words = match state.as_str() {
            "R" => "runs",
            "S" => "waits",
            "D" => "waits for the host's kernel",
            "T" | "t" => "is stopped",
            _ => "ends",
        };
        let tid = dir.file_name()?.to_str()?.parse::<u64>().ok()?;
        Some(
            object!({"type": "thread", "tid": tid, "name": read("comm").trim(), "state": format!("{state} ({words})"),
            "cpu_ms": ticks * TICK_MS, "waits_in": read("wchan").trim()}),
        )
    };
    let mut all: Vec<Value> = folder.flatten().take(256).filter_map(|d| one(d.path())).collect();
    all.sort_by_key(|t| t["tid"].as_u64());
    all
}

/// All registers of a device by name, as an inspector sees them: without side effects.
fn registers(slot: &Arc<Slot>) -> Value {
    let look = |d: &dyn hyaline_device::Device| {
        let mut list = Vec::new();
        for (n, bank) in d.chip().banks.iter().enumerate() {
            for r in bank.registers {
                if let Some(v) = d.peek(n, r) {
                    list.push(object!({"name": r.name, "bank": bank.name, "offset": r.offset, "value": v, "hex": format!("{v:#x}"),
                        "decoded": r.decode(v).words()}));
                }
            }
        }
        list
    };
    match slot.try_inspect(look) {
        Some(list) => object!({"type": "registers", "device": slot.name(), "registers": list}),
        None => {
            object!({"type": "registers", "device": slot.name(), "text": "the device is at work; its registers can't be read"})
        }
    }
}

fn cpu(n: u8, s: &CpuState) -> Value {
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"].map(String::from).into_iter();
    let names = names.chain((8..16).map(|i| format!("r{i}")));
    let mut registers: serde_json::Map<String, Value> =
        names.zip(s.gpr).map(|(n, v)| (n, format!("{v:#x}").into())).collect();
    for (name, v) in [
        ("rip", s.rip),
        ("rflags", s.rflags),
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("efer", s.efer),
        ("lstar", s.msr.lstar),
        ("gdt", s.gdtr.base),
        ("idt", s.idtr.base),
    ] {
        registers.insert(name.into(), format!("{v:#x}").into());
    }
    object!({"type": "vcpu", "vcpu": n, "mode": crate::cpu_dump::mode(s), "activity": format!("{:?}", s.activity),
        "instructions": s.icount, "registers": registers, "text": crate::cpu_dump::text(n, s)})
}

/// How a test makes this chip, for `hyaline explain --replay-test`.
fn replay(slot: &Slot) -> Option<&'static str> {
    Some(match slot.chip().name {
        "ns16550" => "hyaline_devices::serial::Ns16550::new()",
        "debugcon" => "hyaline_devices::serial::debugcon::DebugCon::new(0xe9)",
        "pcnet" => "hyaline_devices::net::Pcnet::new([2, 0, 0, 0, 0, 1])",
        "i8254" => "hyaline_devices::timer::i8254::I8254::new()",
        "i8259" => "hyaline_devices::intc::i8259::I8259::new()",
        "ioapic" => "hyaline_devices::intc::ioapic::IoApic::new()",
        "hpet" => "hyaline_devices::timer::hpet::Hpet::new(0x00f0_0000)",
        "i8042" => "hyaline_devices::input::i8042::I8042::new()",
        "cerr" => "hyaline_devices::intc::cerr::Cerr::new()",
        "mc146818" => {
            "hyaline_devices::timer::mc146818::Mc146818::new(&hyaline_devices::timer::mc146818::Contents::default())"
        }
        "lapic" => {
            "hyaline_devices::intc::lapic::Lapic::new(hyaline_devices::intc::lapic::Config::new(0, 1000000000))"
        }
        "port92" => "hyaline_devices::input::port92::Port92::new()",
        "i440fx" => "hyaline_devices::pci::i440fx::I440fx::new()",
        "piix3" => "hyaline_devices::pci::piix3::Piix3::new()",
        "piix4_pm" => "hyaline_devices::power::piix4_pm::Piix4Pm::new(false)",
        "fw_cfg" => "hyaline_devices::firmware::fw_cfg::FwCfg::new()",
        _ => return None,
    })
}
