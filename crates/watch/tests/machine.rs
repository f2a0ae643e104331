//! A small machine: two spaces, three devices, one recorder.

use hyaline_device::{Chassis, Device, Dma, DmaError, Effect, Slot, Source};
use hyaline_devices::net::Pcnet;
use hyaline_devices::serial::Ns16550;
use hyaline_space::{AddressSpace, ExitKind, Io, IoError, Origin, Outcome, Region};
use hyaline_watch::{
    AccessLog, Clock, Compare, HEADER, Line, Recorder, Runner, Sink, Teller, compare, json, summary,
};
use std::sync::Arc;

struct Quiet;

impl Source for Quiet {
    fn now(&self) -> u64 {
        0
    }
    fn wall_clock(&self) -> u64 {
        0
    }
    fn random(&self) -> u64 {
        4
    }
}
impl Dma for Quiet {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError { address, len: data.len(), is_write: false })
    }
    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        Err(DmaError { address, len: data.len(), is_write: true })
    }
}
impl Chassis for Quiet {
    fn dma(&self) -> &dyn Dma {
        self
    }
    fn effect(&self, _slot: &Arc<Slot>, _effect: Effect) {}
    fn crashed(&self, _slot: &Arc<Slot>, _crash: hyaline_device::Crash) {}
}

/// A clock that stands still, for texts that are the same each time.
struct Still;
impl Clock for Still {
    fn host(&self) -> u64 {
        0
    }
    fn now(&self, _host: u64) -> u64 {
        412_318_220
    }
}

/// Not a device: no register can be told.
struct Plain;
impl Io for Plain {
    fn read(&self, _: u64, _: u8, _: &Origin) -> Result<u64, IoError> {
        Ok(0)
    }
    fn write(&self, _: u64, _: u8, _: u64, _: &Origin) -> Result<(), IoError> {
        Err(IoError::ReadOnly)
    }
}

fn machine(recorder: &Arc<Recorder>) -> AddressSpace {
    let chassis: Arc<dyn Chassis> = Arc::new(Quiet);
    let io = Region::container("io", 0x1_0000);
    let device = |id, name: &str, device: Box<dyn Device>| Slot::new(id, name, device, chassis.clone());
    let serial = device(1, "serial0", Box::new(Ns16550::new()));
    io.add(0x3f8, &Region::io("ports", 8, serial.bank(0)).with_owner("serial0"), 0).unwrap();
    let pci = Region::container("pci-io", 0x1_0000);
    let net = device(2, "net0", Box::new(Pcnet::new([2, 0, 0, 0, 0, 1])));
    pci.add(0xc000, &Region::io("io", 32, net.bank(1)).with_owner("net0"), 1).unwrap();
    pci.add(0xc000, &Region::io("background", 0x100, Arc::new(Plain)), 0).unwrap();
    io.add(0, &pci, -1).unwrap();
    let space = AddressSpace::new_ports("I/O", &io);
    space.set_observer(Some(recorder.clone()));
    space
}

fn out(space: &AddressSpace, port: u64, size: u8, value: u64) -> Outcome {
    space.store(port, size, value, &Origin::vcpu(0, ExitKind::PioOut, 0x7c10))
}
fn inp(space: &AddressSpace, port: u64, size: u8) -> u64 {
    space.load(port, size, &Origin::vcpu(0, ExitKind::PioIn, 0x7c20)).0
}

#[test]
fn records_name_what_was_reached() {
    let recorder = Recorder::new(1, Box::new(Still));
    let space = machine(&recorder);
    let _ = out(&space, 0xc012, 2, 0x58);
    inp(&space, 0x3fd, 1);
    inp(&space, 0x3f8, 2);
    inp(&space, 0x9999, 4);
    let _ = out(&space, 0xc050, 1, 1);
    let all = recorder.last(100);
    let names: Vec<String> = all
        .iter()
        .map(|r| {
            let s = recorder.site(r.site).unwrap();
            format!("{}+{:x} {} {} {}", s.label(), r.offset, s.register_name(), r.parts, r.outcome)
        })
        .collect();
    assert_eq!(
        names,
        [
            "net0.io+12 RAP 1 ok",
            "serial0.ports+5 LSR 1 ok",
            "serial0.ports+0 RBR 2 ok",
            "io+9999 - 0 unassigned",
            "background+50 - 1 read-only",
        ]
    );
    assert_eq!(recorder.by_vcpu(), [5, 0]);
    assert_eq!(recorder.last_of(0, 2).len(), 2);
    let counts = recorder.counts();
    assert_eq!(counts.iter().map(|c| c.reads + c.writes).sum::<u64>(), 5);
    assert_eq!(counts.iter().map(|c| c.failed).sum::<u64>(), 2);
}

#[test]
fn lines_and_json() {
    let recorder = Recorder::new(1, Box::new(Still));
    let space = machine(&recorder);
    let _ = out(&space, 0x3fc, 1, 0x0b);
    let _ = out(&space, 0x3f9, 2, 0x0107);
    inp(&space, 0x9999, 4);
    let text: Vec<String> = recorder
        .last(3)
        .iter()
        .map(|r| Line { record: r, site: &recorder.site(r.site).unwrap(), guest: None }.to_string())
        .collect();
    assert_eq!(
        text[0].split_whitespace().collect::<Vec<_>>().join(" "),
        "1 0.412 318 220 0 pio.out io:0x3fc/1 serial0.ports+04 MCR 0x0b OUT2|RTS|DTR 0ns 0x7c10"
    );
    let column = |text: &str, what: &str| text.find(what).unwrap();
    assert_eq!(column(HEADER, "exit"), column(&text[0], "pio.out"));
    assert_eq!(column(HEADER, "register"), column(&text[0], "MCR"));
    assert_eq!(column(HEADER, "guest"), column(&text[0], "0x7c10"));
    assert!(text[1].contains("IER!w1") && text[1].contains("! split: 2 bytes in 2 calls"), "{}", text[1]);
    assert!(text[2].ends_with("! nobody is at this address: the read gave all ones"), "{}", text[2]);
    let first = recorder.last(3)[0];
    let j = json(&first, &recorder.site(first.site).unwrap());
    assert_eq!((j["register"].as_str(), j["addr"].as_u64()), (Some("MCR"), Some(0x3fc)));
    assert_eq!(j["fields"], serde_json::json!(["OUT2", "RTS", "DTR"]));
}

#[test]
fn two_runs_are_compared_to_the_first_difference() {
    let run = |last: u64| {
        let recorder = Recorder::new(1, Box::new(Still));
        let log = AccessLog::new(1000);
        let sink: Arc<dyn Sink> = log.clone();
        recorder.attach(sink.clone());
        let space = machine(&recorder);
        let _ = out(&space, 0xc012, 2, 0x58);
        inp(&space, 0xc010, 2);
        let _ = out(&space, 0x3ff, 1, last);
        inp(&space, 0x3ff, 1);
        recorder.detach(&sink);
        inp(&space, 0x3ff, 1);
        log.entries()
    };
    let how = Compare { first: "software", second: "kvm", rip: true };
    let (a, b) = (run(5), run(6));
    assert_eq!(a.len(), 4, "detached before the fifth");
    assert!(compare(&a, &run(5), &how).is_none());
    let d = compare(&a, &b, &how).unwrap();
    assert_eq!((d.same, d.what.as_slice()), (2, ["value"].as_slice()));
    assert_eq!(
        d.to_string(),
        "The first 2 accesses are the same, number 3 differs in its value:\n  \
         software  OUT 1 byte 0x05 io:0x3ff (1023) serial0.ports+07 SCR at rip 0x7c10, ok\n  \
         kvm       OUT 1 byte 0x06 io:0x3ff (1023) serial0.ports+07 SCR at rip 0x7c10, ok"
    );
    let d = compare(&a, &a[..2], &how).unwrap();
    assert!(
        d.to_string().starts_with("2 accesses are the same, then kvm ends; software goes on with:"),
        "{d}"
    );
}

#[test]
fn the_thread_is_the_one_that_runs_the_processor() {
    let recorder = Recorder::new(1, Box::new(Still));
    let space = machine(&recorder);
    let _ = out(&space, 0xc012, 2, 0x58);
    let record = recorder.last(1)[0];
    let site = recorder.site(record.site).unwrap();
    for (runner, thread, frame) in [
        (Runner::Jit, "host thread vcpu0/jit ", "mttcg_cpu_thread_fn"),
        (Runner::Interp, "host thread vcpu0/interp ", "mttcg_cpu_thread_fn"),
        (Runner::InTurns, "host thread main, where processors take turns ", "rr_cpu_thread_fn"),
    ] {
        let text = Teller { runner }.tell(&space.resolve(0xc012, 2, true), &record, &site);
        let line = text.lines().nth(1).unwrap_or("");
        assert!(line.contains(thread) && line.ends_with(frame), "{line}");
    }
}

#[test]
fn the_way_is_told_layer_by_layer() {
    let recorder = Recorder::new(1, Box::new(Still));
    let space = machine(&recorder);
    let _ = out(&space, 0xc012, 2, 0x58);
    let record = recorder.last(1)[0];
    let site = recorder.site(record.site).unwrap();
    let teller = Teller { runner: Runner::Kvm };
    let text = teller.tell(&space.resolve(0xc012, 2, true), &record, &site);
    let expected = "\
PATH OF THE ACCESS
  vCPU 0, host thread vcpu0/kvm | qemu_thread_start, kvm_vcpu_thread_fn
  └ KVM runs the guest until an exit; instruction at 0x7c10 | kvm_cpu_exec
    └ OUT of 2 bytes, port 0xc012 (49170) | kvm_handle_io
      └ address space \"I/O\", write 2 bytes at 0xc012 (49170) | address_space_rw, address_space_write
        └ flat view: 0xc000 to 0xc01f is /io/pci-io/io (i/o); base 0xc000, offset 0x12 | flatview_write, flatview_write_continue
          by way of io > pci-io at 0x0 priority -1 > io at 0xc000 priority 1
          hidden here: /io/pci-io/background (i/o): /io/pci-io/background has a lower priority, /io/pci-io/io is seen
          └ valid for the region: size and alignment | memory_region_dispatch_write
            └ size: 2 -> 2, one call, no split | access_with_adjusted_size
              └ net0.io +0x12, register RAP: Register address port (DWIO = 0) | memory_region_write_accessor
                └ value written: 0x0058 INDEX=0x58
                  outcome: done, after 0ns
";
    let squeezed: Vec<String> = text
        .lines()
        .enumerate()
        .map(|(i, l)| match l.trim_start().find("   ") {
            Some(_) if i == 0 => "PATH OF THE ACCESS".to_string(),
            Some(at) => {
                let at = at + l.len() - l.trim_start().len();
                format!("{} | {}", &l[..at], l[at..].trim_start())
            }
            None => l.to_string(),
        })
        .collect();
    assert_eq!(squeezed, expected.lines().collect::<Vec<_>>(), "\n{text}");
}

#[test]
fn the_summary_groups_by_device() {
    let recorder = Recorder::new(1, Box::new(Still));
    let space = machine(&recorder);
    (0..3).for_each(|_| {
        inp(&space, 0x3fd, 1);
    });
    let _ = out(&space, 0x3ff, 1, 1);
    let _ = out(&space, 0x3fc, 1, 1);
    inp(&space, 0x9999, 1);
    let _ = out(&space, 0xc012, 2, 1);
    let text = summary(&recorder.counts(), 2);
    let lines: Vec<String> =
        text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        lines,
        [
            "accesses reads writes not done device, register",
            "5 3 2 0 serial0",
            "3 3 0 0 LSR",
            "1 0 1 0 SCR",
            "1 0 1 0 1 more registers",
            "1 1 0 1 (nobody)",
            "1 0 1 0 net0",
            "1 0 1 0 RAP",
        ]
    );
}
