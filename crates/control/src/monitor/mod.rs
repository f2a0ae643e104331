//! Monitor commands: questions about a machine that stands still, answered in words, without side effects on any device.

mod access;
mod irq;
mod names;

use access::{Condition, Stopper};
use hyaline_device::Place;
use hyaline_machine::Machine;
use hyaline_machine::config::nearest;
use hyaline_watch::Sink;
use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use std::fmt::Write;
use std::sync::Arc;

pub use names::parse_number;

const HELP: &str = "\
help                            this text
info registers                  the processors' registers, with hidden parts of segments
info mtree [-f]                 the tree of regions; with -f what is seen at each address
info pic|ioapic|lapic           the interrupt controllers, register by register
info irq                        all interrupt lines on their way through PIC and I/O APIC
info devices                    the devices, with their chips and PCI addresses
reg NAME                        a device's registers, or one: reg serial0, reg com1.lsr, reg pic.master.imr
last reg NAME                   the last access to that register
explain [NUMBER]                the way of the last access (or of the one of that number), layer by layer
last [N]                        the last N accesses (16)
rbreak reg NAME [read|write] [when value=V | when value&MASK]
                                stop after an access to that register; `rbreak` lists, `rbreak delete N|all` deletes
why-no-irq N                    follows interrupt N from its line to the processor and says where it stops
map why io:ADDRESS|mem:ADDRESS  why that address goes where it goes, and what it hides
code [N]                        the next N instructions of each processor's present mode (8)
phys on|off                     gdb's memory commands mean guest-physical (or linear again) addresses
phys ADDRESS [N]                N bytes (64) at a guest-physical address
phys write ADDRESS BYTE…        writes bytes there
translate ADDRESS               the guest-physical address of a linear one
trace on [SPEC]|off             one line for each access that fits SPEC (as for -trace): trace on reg:serial0.LCR,file=/tmp/t
symbol NAME|ADDRESS             the guest kernel's symbol, by the table found in its memory
symbols FILE                    writes that table as a file for gdb's `symbol-file FILE`
quit                            ends the machine and the program
";

/// What the commands remember from one to the next.
pub struct Monitor {
    /// Memory commands of a debugger mean guest-physical addresses.
    pub physical: bool,
    /// The program is to end.
    pub quit: bool,
    /// The access that stopped the machine.
    pub stopped_by: Option<String>,
    breaks: Vec<(u32, Arc<Stopper>)>,
    next: u32,
    recorder: Arc<hyaline_watch::Recorder>,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.clear();
    }
}

fn processor(machine: &Machine) -> usize {
    usize::from(machine.config.cpus)
}

impl Monitor {
    /// For a machine.
    pub fn new(machine: &Machine) -> Monitor {
        Monitor {
            physical: false,
            quit: false,
            stopped_by: None,
            breaks: Vec::new(),
            next: 1,
            recorder: machine.recorder.clone(),
        }
    }

    /// Forgets all breaks on registers and the rest.
    pub fn clear(&mut self) {
        for (_, stopper) in self.breaks.drain(..) {
            let sink: Arc<dyn Sink> = stopper;
            self.recorder.detach(&sink);
        }
        self.physical = false;
        self.stopped_by = None;
    }

    /// Carries out one command and gives its answer, also when that says why it can't be done.
    pub fn command(&mut self, machine: &mut Machine, line: &str) -> String {
        self.try_command(machine, line).unwrap_or_else(|e| e)
    }

    /// Carries out one command.
    ///
    /// # Errors
    /// Why it can't be done, in words.
    pub fn try_command(&mut self, machine: &mut Machine, line: &str) -> Result<String, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] | ["help" | "?", ..] => Ok(HELP.to_string()),
            ["info", rest @ ..] => self.info(machine, rest),
            ["reg", name] => names::show(machine, name),
            ["reg"] => Err("reg: name a device or a register, for example reg com1.lsr; `info devices` lists the devices".into()),
            ["last", "reg", name] => access::last_of(machine, name),
            ["last"] => Ok(access::last(machine, 16)),
            ["last", n] => parse_number(n).map(|n| access::last(machine, n as usize)),
            ["explain"] => access::explain(machine, None).map(|text| match &self.stopped_by {
                Some(by) => format!("stopped by {by}\n{text}"),
                None => text,
            }),
            ["explain", n] => parse_number(n).and_then(|n| access::explain(machine, Some(n))),
            ["rbreak"] => Ok(self.list()),
            ["rbreak", "delete", which] => self.delete(which),
            ["rbreak", "reg", name, rest @ ..] => self.rbreak(machine, name, rest),
            ["rbreak", ..] => Err("rbreak: write rbreak reg NAME [read|write] [when value=V | when value&MASK]".into()),
            ["why-no-irq", n] => parse_number(n).and_then(|n| irq::why_not(machine, n)),
            ["why-no-irq"] => Err("why-no-irq: name an interrupt, 0 to 23".into()),
            ["map", "why", place] => crate::map::why(&machine.pc, place),
            ["code"] => Ok(code(machine, 8)),
            ["code", n] => parse_number(n).map(|n| code(machine, n.min(1000) as usize)),
            ["phys", rest @ ..] => self.phys(machine, rest),
            ["translate", address] => parse_number(address).map(|a| translate(machine, a)),
            ["trace", "off"] => Ok(format!("{} traces ended\n", machine.end_traces())),
            ["trace", "on"] => trace(machine, ""),
            ["trace", "on", spec] => trace(machine, spec),
            ["trace", ..] => Err("trace: write trace on SPEC (as for -trace, without blanks) or trace off".into()),
            ["symbol", what] => symbol(machine, what),
            ["symbols", file] => symbols(machine, file),
            ["quit" | "q"] => {
                self.quit = true;
                Ok(String::new())
            }
            [other, ..] => {
                let known = HELP.lines().filter_map(|l| l.split_whitespace().next());
                let near = nearest(other, known).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
                Err(format!("unknown command `{other}`{near} (`monitor help` lists the commands)"))
            }
        }
    }

    fn info(&mut self, machine: &mut Machine, what: &[&str]) -> Result<String, String> {
        match what {
            ["registers"] => (0..processor(machine))
                .map(|n| {
                    let state = machine.cpu_state(n).map_err(|e| e.to_string())?;
                    Ok(hyaline_machine::cpu_dump::text(n as u8, &state).trim_end().to_string()
                        + &format!("\nCR8={:x}\n", machine.cr8(n)))
                })
                .collect(),
            ["mtree"] => Ok(crate::map::tree(&machine.pc)),
            ["mtree", "-f"] => Ok(crate::map::flat(&machine.pc)),
            ["pic"] => irq::pic(machine),
            ["ioapic"] => irq::ioapic(machine),
            ["lapic"] => Ok((0..processor(machine)).map(|n| irq::lapic(machine, n)).collect()),
            ["irq"] => irq::all(machine),
            ["devices"] => Ok(devices(machine)),
            _ => {
                Err("info: there are registers, mtree, mtree -f, pic, ioapic, lapic, irq and devices".into())
            }
        }
    }

    fn rbreak(&mut self, machine: &mut Machine, name: &str, rest: &[&str]) -> Result<String, String> {
        let found = names::find(machine, name)?;
        let (direction, rest) = match rest {
            ["read", rest @ ..] => (Some(false), rest),
            ["write", rest @ ..] => (Some(true), rest),
            rest => (None, rest),
        };
        let condition = match rest {
            [] => Condition::Any,
            ["when", text @ ..] => Condition::parse(&text.concat())?,
            _ => {
                return Err(
                    "rbreak: after the name come read or write, then when value=V or when value&MASK".into(),
                );
            }
        };
        let number = self.next;
        self.next += 1;
        let stopper = Arc::new(Stopper::new(machine.core.clone(), &found, direction, condition));
        let text = format!("Break {number}: {}\n", stopper.text());
        machine.recorder.attach(stopper.clone());
        self.breaks.push((number, stopper));
        Ok(text)
    }

    fn list(&self) -> String {
        if self.breaks.is_empty() {
            return "no breaks on registers\n".into();
        }
        self.breaks.iter().map(|(n, s)| format!("{n}: {}, hit {} times\n", s.text(), s.hits())).collect()
    }

    fn delete(&mut self, which: &str) -> Result<String, String> {
        let all = which == "all";
        let number = if all { 0 } else { parse_number(which)? };
        let before = self.breaks.len();
        let recorder = self.recorder.clone();
        self.breaks.retain(|(n, stopper)| {
            let goes = all || u64::from(*n) == number;
            if goes {
                let sink: Arc<dyn Sink> = stopper.clone();
                recorder.detach(&sink);
            }
            !goes
        });
        if before == self.breaks.len() && !all {
            return Err(format!("rbreak delete: there is no break {which}; `rbreak` lists them"));
        }
        Ok(String::new())
    }

    fn phys(&mut self, machine: &mut Machine, rest: &[&str]) -> Result<String, String> {
        match rest {
            ["on"] => {
                self.physical = true;
                Ok("memory commands mean guest-physical addresses now; gdb may still show what it read before\n".into())
            }
            ["off"] => {
                self.physical = false;
                Ok("memory commands mean linear addresses again\n".into())
            }
            ["write", address, bytes @ ..] if !bytes.is_empty() => {
                let address = parse_number(address)?;
                let byte = |b: &&str| {
                    let n = parse_number(b)?;
                    u8::try_from(n).map_err(|_| format!("phys write: {b} is no byte: 0 to 0xff"))
                };
                let data = bytes.iter().map(byte).collect::<Result<Vec<u8>, String>>()?;
                machine.write_physical(address, &data).map_err(|e| e.to_string())?;
                Ok(String::new())
            }
            [address] => dump(machine, parse_number(address)?, 64),
            [address, n] => dump(machine, parse_number(address)?, parse_number(n)?.min(0x1_0000) as usize),
            _ => Err("phys: write phys on, phys off, phys ADDRESS [N] or phys write ADDRESS BYTE…".into()),
        }
    }
}

fn dump(machine: &Machine, address: u64, len: usize) -> Result<String, String> {
    let mut data = vec![0; len];
    let n = machine.read_physical(address, &mut data);
    let mut text = String::new();
    for (i, row) in data.get(..n).unwrap_or(&[]).chunks(16).enumerate() {
        let hex: Vec<String> = row.iter().map(|b| format!("{b:02x}")).collect();
        let plain: String =
            row.iter().map(|b| if (0x20..0x7f).contains(b) { char::from(*b) } else { '.' }).collect();
        let _ =
            writeln!(text, "{:016x}  {:<47}  {plain}", address.wrapping_add(16 * i as u64), hex.join(" "));
    }
    if n < len {
        let at = address.wrapping_add(n as u64);
        let why = crate::map::short(&machine.pc.memory, at);
        let _ = writeln!(
            text,
            "{at:#x} ({at}) is neither RAM nor ROM: {why}; a device's registers are shown by `reg`"
        );
    }
    Ok(text)
}

fn translate(machine: &mut Machine, linear: u64) -> String {
    (0..processor(machine))
        .map(|n| match machine.translate(n, linear) {
            Some(p) => format!(
                "processor {n}: {linear:#x} is guest-physical {p:#x}, {}\n",
                crate::map::short(&machine.pc.memory, p)
            ),
            None => format!("processor {n}: {linear:#x} is not mapped\n"),
        })
        .collect()
}

/// The next instructions, decoded in the mode that each processor is in.
fn code(machine: &mut Machine, count: usize) -> String {
    let mut text = String::new();
    for n in 0..processor(machine) {
        let state = match machine.cpu_state(n) {
            Ok(s) => s,
            Err(e) => {
                let _ = writeln!(text, "processor {n}: {e}");
                continue;
            }
        };
        let cs = state.seg[1];
        let long = state.efer & hyaline_x86::state::efer::LMA != 0;
        let bits = match (long && cs.long(), cs.big()) {
            (true, _) => 64,
            (_, true) => 32,
            _ => 16,
        };
        let base = if bits == 64 { 0 } else { cs.base };
        let mut data = vec![0; count.saturating_mul(15)];
        let got = machine.read_linear(n, base.wrapping_add(state.rip), &mut data);
        let _ = writeln!(text, "processor {n}, {}:", hyaline_machine::cpu_dump::mode(&state));
        let bytes = data.get(..got).unwrap_or(&[]);
        let mut decoder = Decoder::with_ip(bits, bytes, state.rip, DecoderOptions::NONE);
        let mut formatter = GasFormatter::new();
        for _ in 0..count {
            if !decoder.can_decode() {
                break;
            }
            let insn = decoder.decode();
            let mut line = String::new();
            formatter.format(&insn, &mut line);
            let _ = writeln!(text, "  {:04x}:{:016x}  {line}", cs.selector, insn.ip());
        }
        if got == 0 {
            let _ = writeln!(text, "  {:#x} can't be read", base.wrapping_add(state.rip));
        }
    }
    text
}

fn trace(machine: &mut Machine, spec: &str) -> Result<String, String> {
    let spec =
        if spec.is_empty() { Ok(hyaline_watch::Spec::all()) } else { hyaline_watch::Spec::parse(spec) };
    let spec = spec.map_err(|e| format!("trace on: {e}"))?;
    let to =
        spec.file.as_ref().map_or("the program's standard error".to_string(), |f| f.display().to_string());
    machine.trace(&[spec]).map_err(|e| e.to_string())?;
    Ok(format!("tracing to {to}; `trace off` ends it\n"))
}

fn table(machine: &mut Machine) -> Result<Arc<hyaline_watch::symbols::Symbols>, String> {
    let state = machine.cpu_state(0).map_err(|e| e.to_string())?;
    let symbols = machine.guest.search(Some(state.rip), Some(state.msr.lstar));
    symbols.ok_or_else(|| {
        "symbol: no table of symbols was found in the guest's memory; it is there once a Linux kernel has unpacked itself, or name a System.map or \
         vmlinux with -symbols"
            .to_string()
    })
}

fn symbols(machine: &mut Machine, file: &str) -> Result<String, String> {
    let symbols = table(machine)?;
    std::fs::write(file, symbols.to_elf()).map_err(|e| format!("symbols: {file}: {e}"))?;
    Ok(format!("{file}: {}; in gdb: symbol-file {file}\n", symbols.describe()))
}

fn symbol(machine: &mut Machine, what: &str) -> Result<String, String> {
    let symbols = table(machine)?;
    let address = match symbols.address(what) {
        Some(a) => a,
        None => parse_number(what)
            .map_err(|_| format!("symbol: there is no `{what}` in {}", symbols.describe()))?,
    };
    let name = symbols.at(address).unwrap_or_else(|| what.to_string());
    Ok(format!("{address:#x} is {name} ({})\n", symbols.describe()))
}

fn devices(machine: &Machine) -> String {
    let mut text = format!("{:<12} {:<12} {:<8} {}\n", "device", "chip", "PCI", "what");
    for placed in &machine.pc.devices {
        let chip = placed.slot.chip();
        let pci = placed.pci.map_or(String::new(), |n| format!("00:{n:02x}"));
        let fenced = if placed.slot.fenced() { " [crashed, fenced off]" } else { "" };
        let _ =
            writeln!(text, "{:<12} {:<12} {pci:<8} {}{fenced}", placed.slot.name(), chip.name, chip.title);
        for bank in chip.banks.iter().filter(|b| b.place != Place::Indexed) {
            let at = crate::map::where_is(&machine.pc, placed.slot.name(), bank.name);
            if !at.is_empty() {
                let _ = writeln!(text, "{:<12}   {}: {}", "", bank.name, at.join(", "));
            }
        }
    }
    if let Some(chips) = machine.chips_in_kernel() {
        let _ = writeln!(text, "in the kernel: {chips}");
    }
    text
}
