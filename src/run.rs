//! Runs one machine until it ends, with its terminal, its log and its signals.

use crate::complain;
use crate::desk::{Clerk, Desk};
use hyaline_control::gdb::{self, Server};
use hyaline_host::chardev::{Chardev, Command, Input, Spec};
use hyaline_host::{signals, terminal};
use hyaline_machine::Machine;
use hyaline_machine::chassis::{Channel, Core, Event, Log, LogKind};
use hyaline_machine::config::{Accel, LogItems};
use hyaline_machine::report::{Cause, PanicPolicy, Reporter};
use hyaline_options::Run;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Exit code of a program whose reader went away: 128 and SIGPIPE.
const BROKEN_PIPE: i32 = 128 + 13;

/// A character back end as a device's channel.
struct Host(Chardev);

impl Channel for Host {
    fn send(&self, data: &[u8]) {
        self.0.send(data);
    }
    fn ready(&self) {
        self.0.ready();
    }
}

/// Input of a back end on its way to a device.
struct ToDevice {
    core: Arc<Core>,
    slot: Arc<hyaline_device::Slot>,
    /// Standard input and output: the program ends when they go away.
    stdio: bool,
}

impl Input for ToDevice {
    fn offer(&self, data: &[u8]) -> usize {
        self.slot.receive(0, data)
    }
    fn command(&self, command: Command) {
        match command {
            Command::Exit => self.core.event(Event::Exit(0)),
            Command::Break => {
                self.slot.receive(1, &[1]);
            }
            Command::Monitor => {
                complain(&"there is no monitor yet; Ctrl-A h lists what there is\r");
            }
            Command::Help => {}
        }
    }
    fn gone(&self, why: &str) {
        if self.stdio {
            self.core.event(Event::Exit(BROKEN_PIPE));
        } else {
            // A full disk must not stop the guest.
            complain(&format!("{why}; nothing more is written there"));
        }
    }
}

/// Log lines to standard error or a file.
struct LogTo {
    items: LogItems,
    file: Mutex<Option<File>>,
    /// The file could not be written: that was said.
    lost: std::sync::atomic::AtomicBool,
}

impl Log for LogTo {
    fn line(&self, kind: LogKind, who: &str, text: &str) {
        let wanted = match kind {
            LogKind::GuestError => self.items.guest_errors,
            LogKind::Unimplemented => self.items.unimp,
            LogKind::Note => self.items.note,
            LogKind::Interrupt => self.items.int,
            LogKind::Code => self.items.in_asm,
            LogKind::Translation => self.items.out_asm,
        };
        if wanted {
            self.write(&format!("{who}: {text}"));
        }
    }
}

impl LogTo {
    fn write(&self, line: &str) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *file {
            Some(f) => {
                if let Err(e) = writeln!(f, "{line}") {
                    // A full disk must not stop the guest, nor send the log to the terminal; say it once.
                    if !self.lost.swap(true, std::sync::atomic::Ordering::Relaxed) {
                        complain(&format!("the log can't be written any more: {e}"));
                    }
                }
            }
            // Standard error may be closed: then the log is lost, not the guest.
            None => drop(writeln!(std::io::stderr().lock(), "{line}\r")),
        }
    }
}

/// Makes a log file. It is appended to, so that `-d access` can share it.
fn log_file(path: &Path) -> std::io::Result<File> {
    File::create(path)?;
    File::options().append(true).open(path)
}

/// Runs until the end; gives the exit code.
pub(crate) fn run(ask: Run) -> i32 {
    let code = go(ask);
    terminal::restore();
    code
}

fn go(ask: Run) -> i32 {
    for device in &ask.config.devices {
        if let Err(e) = hyaline_machine::device_check(device) {
            return complain(&e);
        }
    }
    if let Some(path) = &ask.pidfile
        && let Err(e) = std::fs::write(path, format!("{}\n", std::process::id()))
    {
        return complain(&format!("-pidfile {}: {e}", path.display()));
    }
    let file = match ask.log_file.as_deref().map(|p| (p, log_file(p))) {
        Some((p, Err(e))) => return complain(&format!("-D {}: {e}", p.display())),
        Some((_, Ok(f))) => Some(f),
        None => None,
    };
    if let Some(path) = &ask.config.save_at_exit
        && let Err(e) = hyaline_machine::state_file::check_place(path)
    {
        return complain(&e);
    }
    let log = Arc::new(LogTo { items: ask.config.log, file: Mutex::new(file), lost: Default::default() });
    for remark in &ask.remarks {
        complain(remark);
    }
    let mut machine = match Machine::new(ask.config) {
        Ok(m) => m,
        Err(e) => return complain(&e),
    };
    for remark in &machine.remarks {
        complain(remark);
    }
    if let Err(e) = machine.trace(&ask.trace) {
        return complain(&e);
    }
    let profile = (ask.profile_text || !ask.profile.is_empty()).then(|| {
        let profile = hyaline_watch::Profile::new(usize::from(machine.config.cpus));
        machine.attach(profile.clone());
        machine.watch_dma();
        machine.record_durations(true);
        profile
    });
    let (desk, mut clerk) = match Desk::new(&machine, profile.clone()) {
        Ok(both) => both,
        Err(e) => return complain(&format!("no thread for the profile could be started: {e}")),
    };
    let _control = match ask.control.as_deref().map(|spec| crate::control::listen(spec, &machine, &desk)) {
        Some(Err(e)) => return complain(&e),
        Some(Ok(control)) => Some(control),
        None => None,
    };
    if let Some(seconds) = ask.seconds {
        let core = machine.core.clone();
        let body = move || {
            std::thread::sleep(std::time::Duration::from_secs_f64(seconds));
            core.event(Event::Exit(0));
        };
        if let Err(e) = std::thread::Builder::new().name("end".into()).spawn(body) {
            return complain(&format!("no thread for the end of the profile could be started: {e}"));
        }
    }
    machine.core.set_log(Some(log.clone()));
    if let Err(code) = connect(&machine) {
        return code;
    }
    let (core, reporter) = (machine.core.clone(), machine.reporter.clone());
    let watched = signals::on_signal(move |s| match s {
        signals::Signal::Quit => on_demand(&core, &reporter),
        s => core.event(Event::Exit(s.exit_code())),
    });
    if let Err(e) = watched {
        return complain(&format!("no thread for signals could be started: {e}"));
    }
    let server = match ask.gdb.as_ref().map(|address| {
        let mut server = Server::new(&machine);
        server.listen(address).map(|()| server)
    }) {
        Some(Err(e)) => return complain(&e),
        Some(Ok(server)) => Some(server),
        None => None,
    };
    let code = match server {
        Some(server) => {
            let paused = machine.config.paused;
            gdb::drive(&mut machine, &server, paused, &|text| eprintln!("hyaline: {text}\r"), |m, e| {
                after(m, e, &log, &mut clerk)
            })
        }
        None if machine.config.paused => {
            complain(
                &"-S: the machine is stopped, and nobody can start it without -s or -gdb; Ctrl-C ends the program",
            );
            return wait_for_end(&mut machine, &mut clerk);
        }
        None => until_the_end(&mut machine, &log, &mut clerk),
    };
    // Who still asks hears that nobody answers.
    drop(clerk);
    machine.flush_traces();
    if let Some(profile) = profile {
        let summary = profile.summary(Some(&machine.guest));
        if let Err(e) = crate::profile::write(&summary, &ask.profile, ask.profile_text) {
            return complain(&e);
        }
    }
    if let Some(path) = machine.config.save_at_exit.clone()
        && let Err(e) = save(&mut machine, &path)
    {
        return complain(&e);
    }
    code
}

fn save(machine: &mut Machine, path: &Path) -> Result<(), hyaline_machine::MachineError> {
    machine.save(path)
}

/// SIGQUIT: the run loop writes a report, or, if it does not come back, this thread does what it can.
fn on_demand(core: &Arc<Core>, reporter: &Arc<Reporter>) {
    core.event(Event::Report);
    let (core, reporter) = (core.clone(), reporter.clone());
    let body = move || {
        std::thread::sleep(std::time::Duration::from_secs(2));
        if core.has_event() {
            say(&reporter.report(&Cause::Request, &[]));
        }
    };
    if let Err(e) = std::thread::Builder::new().name("report".into()).spawn(body) {
        complain(&format!("no thread for the report could be started: {e}"));
    }
}

/// Prints lines to a terminal that may be in raw mode.
fn say(text: &str) {
    drop(writeln!(std::io::stderr(), "hyaline: {}\r", text.replace('\n', "\r\n")));
}

/// Waits for the event that ends a stopped machine.
fn wait_for_end(machine: &mut Machine, clerk: &mut Clerk) -> i32 {
    loop {
        match machine.core.take_event() {
            Some(Event::Exit(code)) => return code,
            Some(Event::Report) => say(&machine.report(&Cause::Request)),
            Some(Event::Stop) => clerk.serve(machine),
            _ => std::thread::sleep(std::time::Duration::from_millis(20)),
        }
    }
}

/// Runs until something ends it.
fn until_the_end(machine: &mut Machine, log: &LogTo, clerk: &mut Clerk) -> i32 {
    loop {
        let event = match machine.run() {
            Ok(event) => event,
            Err(e) => return complain(&e),
        };
        if let Some(code) = after(machine, event, log, clerk) {
            return code;
        }
    }
}

/// Reports, resets, or gives the exit code.
fn after(machine: &mut Machine, event: Event, log: &LogTo, clerk: &mut Clerk) -> Option<i32> {
    match event {
        Event::Exit(code) => return Some(code),
        Event::PowerOff if machine.config.no_shutdown => {
            complain(&"the guest powered off; -no-shutdown keeps the program: Ctrl-C ends it");
            return Some(wait_for_end(machine, clerk));
        }
        Event::PowerOff => return Some(0),
        Event::GuestPanicked => {
            complain(&"the guest's kernel reported a panic (pvpanic)");
            return Some(0);
        }
        Event::DeviceCrashed(_) => {
            while let Some((slot, crash)) = machine.core.take_crash() {
                say(&machine.report(&Cause::DevicePanic(slot, crash)));
            }
            match machine.config.on_device_panic {
                PanicPolicy::Disable => return None,
                PanicPolicy::Stop => return Some(1),
                PanicPolicy::Abort => {
                    terminal::restore();
                    std::process::abort();
                }
            }
        }
        Event::Failed(why) => {
            if machine.accel() == Accel::Kvm {
                say(&machine.report(&Cause::KvmError(why)));
                return Some(1);
            }
            return Some(complain(&why));
        }
        Event::Report => {
            say(&machine.report(&Cause::Request));
            return None;
        }
        Event::Stop => {
            clerk.serve(machine);
            return None;
        }
        Event::Debug(_) => return None,
        Event::TripleFault(cpu) => {
            // The terminal stays as it is: after a reset the guest goes on.
            let text = machine.report(&Cause::TripleFault(cpu));
            drop(writeln!(std::io::stderr().lock(), "hyaline: {text}"));
            if machine.config.no_reboot {
                return Some(0);
            }
        }
        Event::Reset(_) if machine.config.no_reboot => return Some(0),
        Event::Reset(_) => {}
    }
    if machine.config.log.cpu_reset {
        log.write(&machine.cpu_states());
    }
    machine.reset(hyaline_device::Reset::System).err().map(|e| complain(&e))
}

/// Opens the character back ends and connects them to their devices.
fn connect(machine: &Machine) -> Result<(), i32> {
    let open = |spec: &Spec, slot: &Arc<hyaline_device::Slot>| -> Result<(), i32> {
        let host = Arc::new(Host(Chardev::open(spec).map_err(|e| complain(&e))?));
        machine.core.connect(slot, 0, host.clone());
        let stdio = matches!(spec, Spec::Stdio { .. });
        let input = Arc::new(ToDevice { core: machine.core.clone(), slot: slot.clone(), stdio });
        let mux = matches!(spec, Spec::Stdio { mux: true });
        host.0.start(mux, input).map_err(|e| complain(&format!("no thread for input could be started: {e}")))
    };
    for (spec, slot) in machine.config.serials.iter().zip(&machine.pc.serials) {
        if let (Some(spec), Some(slot)) = (spec, slot) {
            open(spec, slot)?;
        }
    }
    if let (Some(spec), Some(slot)) = (&machine.config.debugcon, &machine.pc.debugcon) {
        open(spec, slot)?;
    }
    Ok(())
}
