//! The built-in demonstration: one guest, its accesses, and the way that one of them took.

use crate::{complain, print};
use hyaline_guests::DEMO;
use hyaline_host::chardev::Spec;
use hyaline_machine::Machine;
use hyaline_machine::chassis::{Channel, Event};
use hyaline_machine::config::{Accel, Config, DeviceSpec};
use hyaline_machine::load::Images;
use hyaline_watch::{AccessLog, Compare, Entry, Line, Teller, compare, summary};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The port that the guest writes 2 bytes to: the register address port of its network card.
const PORT: u64 = 0xc012;

/// Prints the guest's serial output as it comes, each line marked as the guest's.
struct Console(Mutex<Vec<u8>>);

impl Channel for Console {
    fn send(&self, data: &[u8]) {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for &b in data {
            if b == b'\n' {
                print(&format!("  guest | {}\n", String::from_utf8_lossy(&line)));
                line.clear();
            } else {
                line.push(b);
            }
        }
    }
}

/// What one run left.
struct Run {
    log: Vec<Entry>,
    text: String,
    instructions: Option<u64>,
    accesses: u64,
    path: Option<String>,
    seconds: f64,
}

fn run(accel: Accel) -> Result<Run, String> {
    let config = Config {
        accels: vec![accel.clone()],
        memory: 32 << 20,
        images: Images { builtin: Some(DEMO), ..Images::default() },
        serials: vec![Some(Spec::Null)],
        devices: vec![DeviceSpec { name: "pcnet".into(), props: vec![("id".into(), "net0".into())] }],
        no_reboot: true,
        ..Config::default()
    };
    let mut machine = Machine::new(config).map_err(|e| e.to_string())?;
    machine.connect_serial(0, Arc::new(Console(Mutex::default())));
    let log = AccessLog::new(100_000);
    machine.recorder.attach(log.clone());
    machine.record_durations(true);
    let started = Instant::now();
    // The guest needs a fraction of a second; something else than its end is a defect that must be seen.
    match machine.run().map_err(|e| e.to_string())? {
        Event::PowerOff => {}
        Event::TripleFault(cpu) => return Err(machine.triple_fault_report(cpu)),
        other => return Err(format!("the guest ended with {other:?}")),
    }
    let seconds = started.elapsed().as_secs_f64();
    let log = log.take();
    let path = log
        .iter()
        .find(|e| e.record.addr == PORT && e.record.is_write && e.site.space == "io")
        .map(|e| tell(&machine, e));
    Ok(Run {
        text: summary(&machine.recorder.counts(), 3),
        instructions: machine.instructions(),
        accesses: machine.recorder.accesses(),
        log,
        path,
        seconds,
    })
}

/// The way of one access, layer by layer.
fn tell(machine: &Machine, entry: &Entry) -> String {
    let runner = machine.accel().runner(&machine.config);
    let path = machine.pc.ports.resolve(entry.record.addr, entry.record.size, entry.record.is_write);
    let line = Line { record: &entry.record, site: &entry.site, guest: None };
    format!("{line}\n\n{}", Teller { runner }.tell(&path, &entry.record, &entry.site))
}

/// Runs it; the exit code is 0 when the guest did what it should.
pub(crate) fn run_all() -> i32 {
    print("Hyaline boots a tiny guest (guests/asm/demo.S) on its own software CPU:\n\n");
    let software = match run(Accel::Interp) {
        Ok(r) => r,
        Err(e) => return complain(&e),
    };
    let Some(path) = &software.path else {
        return complain(&format!("the guest made no 2-byte write to port {PORT:#x} ({PORT})"));
    };
    print(&format!(
        "\nThe guest wrote 2 bytes to port {PORT:#x} ({PORT}). The way that this access took, with QEMU's names for the same steps:\n\n\
         {}\n{path}\n",
        hyaline_watch::HEADER
    ));
    print(&format!(
        "In all: {} instructions and {} accesses to devices in {:.1} ms. By device:\n\n{}\n",
        software.instructions.unwrap_or(0),
        software.accesses,
        software.seconds * 1e3,
        software.text
    ));
    let code = match run_kvm(&software) {
        Ok(text) => {
            print(&text);
            0
        }
        Err(e) => complain(&e),
    };
    print(
        "\nWhat to try next:\n  \
         hyaline demo linux                      Debian's kernel, to a shell (fetched by package name the first time)\n  \
         hyaline -kernel FILE -append TEXT -nographic    your kernel; QEMU's options work: hyaline -help\n  \
         hyaline explain BACKTRACE.txt           what happened in a backtrace of QEMU\n  \
         hyaline map why io:0xc012 -device pcnet why an address goes where it goes\n",
    );
    code
}

/// The same guest on KVM, and both access logs compared.
fn run_kvm(software: &Run) -> Result<String, String> {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => {}
        Err(e) => {
            return Ok(format!(
                "On KVM the same guest would run too, and both access logs be compared; /dev/kvm does not open here: {e}.\n"
            ));
        }
    }
    print("The same guest on KVM, through the same devices:\n\n");
    let kvm = match run(Accel::Kvm) {
        Ok(r) => r,
        Err(e) => return Ok(format!("KVM is here but can't run it: {e}\n")),
    };
    let how = Compare { first: "software CPU", second: "KVM", rip: true };
    let (a, b) = (software.log.len(), kvm.log.len());
    match compare(&software.log, &kvm.log, &how) {
        None => Ok(format!(
            "\nBoth access logs compared: {a} accesses on the software CPU, {b} on KVM, and all are the same: who, how, from which\n\
             instruction, where, which register, which value, what came of it.\n"
        )),
        Some(difference) => {
            Err(format!("the access logs of the software CPU ({a}) and of KVM ({b}) differ: {difference}"))
        }
    }
}
