//! The machine's side of watching: the guest's symbols, access traces, bus masters.

use crate::config::{Config, nearest};
use crate::machine::{Machine, MachineError};
use crate::pc::Pc;
use crate::report::{Cause, Reporter};
use hyaline_ram::RamBlock;
use hyaline_space::DeviceId;
use hyaline_watch::symbols::{Memory, SymbolError};
use hyaline_watch::{Guest, Sink, Spec, SymbolChoice, Trace, Vocabulary};
use std::collections::HashMap;
use std::io::Write as _;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The board's RAM, for the search for symbols.
struct Ram(Arc<RamBlock>);

impl Memory for Ram {
    fn populated(&self) -> Vec<Range<u64>> {
        self.0.populated()
    }
    fn read(&self, at: u64, buf: &mut [u8]) -> bool {
        self.0.read(at, buf).is_ok()
    }
}

/// The guest's symbols as the user wants them.
pub(crate) fn guest(choice: &SymbolChoice, pc: &Pc) -> Result<Arc<Guest>, SymbolError> {
    let said = |text: &str| drop(writeln!(std::io::stderr(), "hyaline: {text}\r"));
    Ok(Arc::new(Guest::new(choice, Box::new(Ram(pc.ram.clone())), Box::new(said))?))
}

/// Prepares the faults that were asked for.
pub(crate) fn inject(config: &Config, pc: &Pc) -> Result<(), String> {
    for (device, fault) in &config.inject {
        let names = || pc.devices.iter().map(|p| p.slot.name());
        let slot = pc.devices.iter().map(|p| &p.slot).find(|s| s.name() == device).ok_or_else(|| {
            let near = nearest(device, names()).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
            let all: Vec<_> = names().collect();
            format!("-inject: there is no device `{device}`{near}; this machine has {}", all.join(", "))
        })?;
        let registers = || slot.chip().banks.iter().flat_map(|b| b.registers.iter().map(|r| r.name));
        if !registers().any(|r| r.eq_ignore_ascii_case(&fault.register)) {
            let all: Vec<_> = registers().collect();
            return Err(format!(
                "-inject: `{device}` has no register `{}`; it has {}",
                fault.register,
                all.join(", ")
            ));
        }
        slot.inject(fault.clone());
    }
    Ok(())
}

/// How long a register handler may run before it is reported.
const HANG: Duration = Duration::from_secs(1);

/// Looks for register handlers that do not come back. A thread of its own: the timers' thread may be the one that waits for the device.
pub(crate) struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub(crate) fn start(reporter: Arc<Reporter>) -> std::io::Result<Watchdog> {
        let (stop, stopped) = channel();
        let body = move || {
            // Of each device: the call that was seen at work, since when, and whether it was reported.
            let mut seen: Vec<Option<(u64, Instant, bool)>> = vec![None; reporter.slots().len()];
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(HANG / 5) {
                for (slot, seen) in reporter.slots().iter().zip(&mut seen) {
                    *seen = match (slot.busy(), *seen) {
                        (None, _) => None,
                        (Some((turn, access)), Some((before, since, told))) if turn == before => {
                            let hangs = since.elapsed() >= HANG;
                            if hangs && !told {
                                let ms = since.elapsed().as_millis() as u64;
                                let text = reporter.report(&Cause::Hang(slot.clone(), access, ms), &[]);
                                drop(writeln!(
                                    std::io::stderr(),
                                    "hyaline: {}\r",
                                    text.replace('\n', "\r\n")
                                ));
                            }
                            Some((turn, since, told || hangs))
                        }
                        (Some((turn, _)), _) => Some((turn, Instant::now(), false)),
                    };
                }
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(body)?;
        Ok(Watchdog { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Machine {
    /// What the machine has that a trace can name.
    pub fn vocabulary(&self) -> Vocabulary {
        Vocabulary::new(self.pc.devices.iter().map(|p| &p.slot))
    }

    /// Starts access traces. They end with the machine.
    ///
    /// # Errors
    /// A device or register that isn't there, or a file that can't be made.
    pub fn trace(&mut self, specs: &[Spec]) -> Result<(), MachineError> {
        let words = self.vocabulary();
        for spec in specs {
            spec.check(&words).map_err(|e| MachineError::Trace(format!("-trace {}: {e}", spec.text)))?;
        }
        let said: Arc<dyn Fn(&str) + Send + Sync> =
            Arc::new(|text: &str| drop(writeln!(std::io::stderr(), "hyaline: {text}\r")));
        let traces = Trace::open(specs, Some(&self.guest), &said).map_err(MachineError::Trace)?;
        if traces.iter().any(|t| t.wants_dma()) {
            self.watch_dma();
        }
        for trace in traces {
            self.recorder.attach(trace.clone());
            self.traces.push(trace);
        }
        if !specs.is_empty() {
            self.record_durations(true);
        }
        Ok(())
    }

    /// Ends all access traces; gives how many there were.
    pub fn end_traces(&mut self) -> usize {
        let ended = self.traces.len();
        for trace in self.traces.drain(..) {
            trace.flush();
            let sink: Arc<dyn Sink> = trace;
            self.recorder.detach(&sink);
        }
        self.core.set_dma_watch(None);
        ended
    }

    /// Has the recorder see bus masters' accesses to memory.
    pub fn watch_dma(&self) {
        let names: HashMap<u16, String> =
            self.pc.devices.iter().map(|p| (p.slot.id(), p.slot.name().to_string())).collect();
        let recorder = Arc::downgrade(&self.recorder);
        self.core.set_dma_watch(Some(Arc::new(move |slot, addr, data, is_write, ok| {
            if let Some(recorder) = recorder.upgrade() {
                let name = names.get(&slot).map_or("?", String::as_str);
                recorder.dma(DeviceId(slot), name, addr, data, is_write, ok);
            }
        })));
    }

    /// Brings the files of traces up to date and says how many lines they have, with their names.
    pub fn flush_traces(&self) {
        self.traces.iter().for_each(|t| t.flush());
    }

    /// Attaches a sink of access records.
    pub fn attach(&self, sink: Arc<dyn Sink>) {
        self.recorder.attach(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chassis::Event;
    use crate::config::{Accel, Config, DeviceSpec};
    use crate::load::Images;
    use hyaline_host::chardev::Spec as Char;
    use hyaline_space::{ExitKind, Origin};

    fn config(builtin: &'static [u8]) -> Config {
        Config {
            accels: vec![Accel::Interp],
            memory: 32 << 20,
            images: Images { builtin: Some(builtin), ..Images::default() },
            serials: vec![Some(Char::Null)],
            devices: vec![DeviceSpec { name: "pcnet".into(), props: vec![("id".into(), "net0".into())] }],
            no_reboot: true,
            ..Config::default()
        }
    }
    fn machine(builtin: &'static [u8]) -> Machine {
        Machine::new(config(builtin)).expect("a machine")
    }

    #[test]
    fn a_trace_of_one_register_has_only_that() {
        let file = std::env::temp_dir().join(format!("hyaline-trace-{}.jsonl", std::process::id()));
        let mut m = machine(hyaline_guests::DEMO);
        let spec = Spec::parse(&format!("reg:net0.RAP,file={},format=jsonl", file.display())).unwrap();
        m.trace(&[spec]).unwrap();
        assert_eq!(m.run().unwrap(), Event::PowerOff);
        m.flush_traces();
        let text = std::fs::read_to_string(&file).unwrap();
        let _ = std::fs::remove_file(&file);
        assert!(!text.is_empty());
        for line in text.lines() {
            assert!(line.contains("\"register\":\"RAP\"") && line.contains("\"owner\":\"net0\""), "{line}");
        }
        assert!(text.contains("\"addr\":49170"), "{text}");
    }

    #[test]
    fn a_device_that_panics_is_fenced_and_reported() {
        hyaline_device::contain_panics();
        let folder = std::env::temp_dir().join(format!("hyaline-crash-test-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut config = config(hyaline_guests::DEMO);
        config.crash_dir = Some(folder.clone());
        config.inject = vec![("net0".into(), hyaline_device::Fault { register: "RAP".into(), hang: None })];
        let mut m = Machine::new(config).unwrap();
        let mut seen = false;
        loop {
            match m.run().unwrap() {
                Event::DeviceCrashed(_) => {
                    let (slot, crash) = m.core.take_crash().unwrap();
                    assert!(crash.location.contains("slot.rs") && !crash.backtrace.is_empty(), "{crash:?}");
                    let text = m.report(&Cause::DevicePanic(slot, crash));
                    assert!(text.contains("device 'net0'") && text.contains("0xc012 (49170)"), "{text}");
                    assert!(text.contains("RAP") && text.contains("policy: device disabled"), "{text}");
                    seen = true;
                }
                Event::PowerOff => break,
                // The guest finds its card gone and says so in its own way; it must not hang.
                other => panic!("{other:?}"),
            }
        }
        assert!(seen);
        let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let text = std::fs::read_to_string(&file).unwrap();
        let _ = std::fs::remove_dir_all(&folder);
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines[0]["hyaline_crash_report"], 1);
        let of = |kind: &str| lines.iter().find(|l| l["type"] == kind).unwrap_or_else(|| panic!("no {kind}"));
        assert_eq!(of("access")["register"]["name"], "RAP");
        assert_eq!(
            (of("access")["addr"].as_u64(), of("access")["region_base"].as_u64()),
            (Some(0xc012), Some(0xc000))
        );
        assert!(of("path")["lines"].as_array().unwrap().len() > 5);
        assert!(of("registers")["registers"].as_array().unwrap().len() > 10);
        assert!(of("console")["text"].as_str().unwrap().len() > 10);
        assert_eq!(of("recent")["device"], "net0");
        assert!(of("vcpu")["registers"]["rip"].is_string());
        assert!(lines.iter().all(|l| l["type"] != "ram"), "no guest RAM unless asked");
    }

    /// Each register of each device that an access can reach: a panic there is contained, and the report names the register and the way to it.
    #[test]
    fn a_panic_at_any_register_names_it() {
        hyaline_device::contain_panics();
        let folder = std::env::temp_dir().join(format!("hyaline-registers-test-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let places: Vec<(String, usize, usize)> = {
            let m = machine(hyaline_guests::DEMO);
            let of = |p: &crate::pc::Placed| {
                let banks = p.slot.chip().banks.iter().enumerate();
                banks.flat_map(|(b, bank)| (0..bank.registers.len()).map(move |r| (b, r))).collect::<Vec<_>>()
            };
            m.pc.devices
                .iter()
                .flat_map(|p| of(p).into_iter().map(|(b, r)| (p.slot.name().to_string(), b, r)))
                .collect()
        };
        let (mut reached, mut told) = (0, std::collections::BTreeSet::new());
        for (device, bank, register) in &places {
            let mut config = config(hyaline_guests::DEMO);
            // A folder for each: one run writes a limited number of reports.
            let own = folder.join(reached.to_string());
            std::fs::create_dir_all(&own).unwrap();
            config.crash_dir = Some(own.clone());
            let m = Machine::new(config).unwrap();
            let slot = m.pc.devices.iter().find(|p| p.slot.name() == device).unwrap().slot.clone();
            let bank = &slot.chip().banks[*bank];
            let r = &bank.registers[*register];
            slot.inject(hyaline_device::Fault { register: r.name.into(), hang: None });
            'access: for (space, read, write) in [
                (&m.pc.ports, ExitKind::PioIn, ExitKind::PioOut),
                (&m.pc.memory, ExitKind::MmioRead, ExitKind::MmioWrite),
                (&m.pc.config_space, ExitKind::PioIn, ExitKind::PioOut),
            ] {
                for l in space.flat_lines() {
                    let at = r.offset.checked_sub(l.offset).map(|o| l.start + o).filter(|a| *a <= l.last);
                    let (true, Some(at)) = (crate::report::owns(&slot, &l.owner), at) else { continue };
                    let size = r.width.min(4);
                    let _ = space.load(at, size, &Origin::vcpu(0, read, 0x1234));
                    let _ = space.store(at, size, 0, &Origin::vcpu(0, write, 0x1234));
                    if m.core.has_event() {
                        break 'access;
                    }
                }
            }
            let Some((slot, crash)) = m.core.take_crash() else { continue };
            reached += 1;
            told.insert(device.clone());
            let text = m.reporter.report(&Cause::DevicePanic(slot.clone(), crash), &[]);
            assert!(
                text.contains(&format!("device '{device}'")) && text.contains(r.name),
                "{device} {}: {text}",
                r.name
            );
            assert!(
                text.contains("at port 0x") || text.contains("at address 0x"),
                "{device} {}: {text}",
                r.name
            );
        }
        let _ = std::fs::remove_dir_all(&folder);
        // Some are behind others (an index, DLAB) or only there when written; most are not.
        assert!(reached * 2 > places.len() && told.len() > 10, "{reached} of {}, {told:?}", places.len());
    }

    #[test]
    fn a_handler_that_hangs_is_reported_while_it_hangs() {
        let folder = std::env::temp_dir().join(format!("hyaline-hang-test-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut config = config(hyaline_guests::DEMO);
        config.crash_dir = Some(folder.clone());
        let fault = hyaline_device::Fault { register: "RAP".into(), hang: Some(Duration::from_millis(2500)) };
        config.inject = vec![("net0".into(), fault)];
        let mut m = Machine::new(config).unwrap();
        // The fault strikes at every access of RAP: the first one is enough.
        let watch = {
            let (core, folder) = (m.core.clone(), folder.clone());
            std::thread::spawn(move || {
                let until = Instant::now() + Duration::from_secs(20);
                while std::fs::read_dir(&folder).unwrap().count() == 0 && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(50));
                }
                core.event(Event::Exit(7));
            })
        };
        m.run().unwrap();
        watch.join().unwrap();
        let file = std::fs::read_dir(&folder).unwrap().next().expect("a report").unwrap().path();
        std::thread::sleep(Duration::from_millis(100));
        let text = std::fs::read_to_string(&file).unwrap();
        let _ = std::fs::remove_dir_all(&folder);
        assert!(text.contains("\"cause\":\"hang\"") && text.contains("\"name\":\"RAP\""), "{text}");
    }

    #[test]
    fn an_unknown_name_shows_what_there_is() {
        let mut m = machine(hyaline_guests::DEMO);
        let e = m.trace(&[Spec::parse("dev:serail0").unwrap()]).unwrap_err().to_string();
        assert!(e.contains("did you mean `serial0`") && e.contains("net0"), "{e}");
        let e = m.trace(&[Spec::parse("reg:net0.RAPP").unwrap()]).unwrap_err().to_string();
        assert!(e.contains("did you mean `RAP`"), "{e}");
    }
}
