//! The remote protocol as gdb speaks it, over a pair of sockets, on machines with a guest of a few instructions.

use hyaline_control::gdb::{Address, Server, drive};
use hyaline_machine::Machine;
use hyaline_machine::chassis::Event;
use hyaline_machine::config::{Accel, Config};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Real mode at f000:0000. Offsets are used by the tests.
const CODE: &[u8] = &[
    0x31, 0xc0, // 00 xor ax, ax
    0x8e, 0xd8, // 02 mov ds, ax
    0xff, 0x06, 0x00, 0x05, // 04 inc word [0x500]
    0xa1, 0x04, 0x05, // 08 mov ax, [0x504]
    0xba, 0xfb, 0x03, // 0b mov dx, 0x3fb
    0xb0, 0x83, // 0e mov al, 0x83
    0xee, // 10 out dx, al
    0xb0, 0x03, // 11 mov al, 3
    0xee, // 13 out dx, al
    0x8b, 0x1e, 0x00, 0x05, // 14 mov bx, [0x500]
    0xeb, 0xea, // 18 jmp 04
];
/// Linear address of the code.
const BASE: u64 = 0xf_0000;

/// A firmware image with the code, and a jump to it where a processor starts.
fn firmware(name: &str) -> std::path::PathBuf {
    let mut image = vec![0xf4; 0x1_0000];
    image[..CODE.len()].copy_from_slice(CODE);
    image[0xfff0..0xfff5].copy_from_slice(&[0xea, 0, 0, 0, 0xf0]);
    let path = std::env::temp_dir().join(format!("hyaline-gdb-{}-{name}.bin", std::process::id()));
    std::fs::write(&path, image).expect("a file can be written");
    path
}

/// Debian's gdb with these commands, on a machine with the small guest.
fn real_gdb(name: &str, cpus: u8, accel: Accel, commands: &[&str]) -> Option<String> {
    if std::process::Command::new("gdb").arg("--version").output().is_err() {
        println!("SKIPPED: {name}: gdb is not installed (apt-get install gdb)");
        return None;
    }
    let socket = std::env::temp_dir().join(format!("hyaline-gdb-{}-{name}.sock", std::process::id()));
    let running = start_at(name, cpus, accel, Some(Address::Unix(socket.clone())));
    let end = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(Instant::now() < end, "nobody listens");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut gdb = std::process::Command::new("timeout");
    gdb.args(["40", "gdb", "-batch", "-nx", "-ex", "set pagination off", "-ex", "set confirm off", "-ex"]);
    gdb.arg(format!("target remote {}", socket.display()));
    commands.iter().for_each(|c| {
        gdb.args(["-ex", c]);
    });
    let output = gdb.arg("-ex").arg("kill").output().expect("gdb runs");
    if output.status.code() == Some(124) {
        // gdb gave up: the machine must not stay.
        again(&running).send("k");
    }
    drop(running.server);
    assert_eq!(running.thread.join().expect("no panic"), 0);
    assert!(!socket.exists(), "the socket is removed at the end");
    Some(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn real_gdb_takes_our_registers_and_stops() {
    let said = real_gdb(
        "real",
        2,
        Accel::Interp,
        &[
            "break *0xf0004",
            "continue",
            "info registers rip cs cr0 efer fs_base",
            "stepi",
            "print/x $rip",
            "print $st0",
            "print $ymm0.v8_int32",
            "set var $rcx = 0x1234",
            "print/x $rcx",
            "print/x *(short *)0x500",
            "delete",
            "watch *(short *)0x500",
            "continue",
            "delete",
            "monitor rbreak reg com1.lcr write when value=3",
            "continue",
            "monitor reg com1.lcr",
            "info threads",
            "x/2xb 0xf0000",
        ],
    );
    let Some(said) = said else { return };
    for line in [
        "rip            0x4",
        "cs             0xf000",
        "cr0            0x60000010          [ ET NW CD ]",
        "$1 = 0x8",
        "$2 = 0",
        "$3 = {0, 0, 0, 0, 0, 0, 0, 0}",
        "$4 = 0x1234",
        "$5 = 0x1",
        "Old value = 1",
        "New value = 2",
        "LCR              0x03 WLS=8 bits",
        "CPU#1 waits for start-up",
        "0xf0000:\t0x31\t0xc0",
    ] {
        assert!(said.contains(line), "{line} is not in:\n{said}");
    }
}

struct Running {
    server: mpsc::Sender<UnixStream>,
    thread: JoinHandle<i32>,
    said: mpsc::Receiver<String>,
}

/// A machine that stands still until gdb continues it.
fn start(name: &str, cpus: u8, accel: Accel) -> Running {
    start_at(name, cpus, accel, None)
}

fn start_at(name: &str, cpus: u8, accel: Accel, address: Option<Address>) -> Running {
    let bios = firmware(name);
    let config = Config {
        accels: vec![accel],
        memory: 16 << 20,
        cpus,
        bios: Some(bios.clone()),
        serials: vec![Some("null".parse().expect("a back end"))],
        ..Config::default()
    };
    let (server, streams) = mpsc::channel::<UnixStream>();
    let (say, said) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut machine = Machine::new(config).expect("a machine");
        let _ = std::fs::remove_file(bios);
        let mut server = Server::new(&machine);
        address.iter().for_each(|a| server.listen(a).expect("a socket"));
        std::thread::scope(|scope| {
            let adopt = &server;
            scope.spawn(move || streams.iter().for_each(|s| adopt.adopt(s).expect("a thread")));
            drive(
                &mut machine,
                &server,
                true,
                &|text| {
                    let _ = say.send(text.to_string());
                },
                |_, event| match event {
                    Event::Exit(code) => Some(code),
                    Event::Stop | Event::Debug(_) => None,
                    other => panic!("{other:?}"),
                },
            )
        })
    });
    Running { server, thread, said }
}

impl Running {
    fn connect(&self) -> Gdb {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        ours.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
        self.server.send(theirs).expect("somebody listens");
        Gdb { stream: ours, buf: Vec::new() }
    }

    fn kill(self, mut gdb: Gdb) {
        gdb.send("k");
        drop(self.server);
        assert_eq!(self.thread.join().expect("no panic"), 0);
    }
}

/// gdb's side.
struct Gdb {
    stream: UnixStream,
    buf: Vec<u8>,
}

impl Gdb {
    fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the stub reads");
    }
    fn send(&mut self, text: &str) {
        let sum = text.bytes().fold(0u8, u8::wrapping_add);
        self.raw(format!("${text}#{sum:02x}").as_bytes());
    }
    /// The next packet from the stub, acknowledged and expanded; None at the end of the connection.
    fn packet(&mut self) -> Option<String> {
        loop {
            let start = self.buf.iter().position(|b| *b == b'$');
            let end = start.and_then(|s| self.buf[s..].iter().position(|b| *b == b'#').map(|n| s + n));
            if let (Some(s), Some(e)) = (start, end)
                && self.buf.len() >= e + 3
            {
                let body = self.buf[s + 1..e].to_vec();
                self.buf.drain(..e + 3);
                let _ = self.stream.write_all(b"+");
                let mut out: Vec<u8> = Vec::new();
                let mut bytes = body.into_iter();
                while let Some(b) = bytes.next() {
                    match b {
                        b'*' => {
                            let n = bytes.next().expect("a count") - 29;
                            let last = *out.last().expect("something to repeat");
                            out.extend(std::iter::repeat_n(last, usize::from(n)));
                        }
                        b => out.push(b),
                    }
                }
                return Some(String::from_utf8(out).expect("text"));
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(n) => self.buf.extend_from_slice(&chunk[..n]),
                Err(e) => panic!("the stub says nothing: {e}"),
            }
        }
    }
    fn ask(&mut self, text: &str) -> String {
        self.send(text);
        self.packet().expect("an answer")
    }
    fn ok(&mut self, text: &str) {
        assert_eq!(self.ask(text), "OK", "{text}");
    }
    fn monitor(&mut self, command: &str) -> String {
        let hex: String = command.bytes().map(|b| format!("{b:02x}")).collect();
        self.send(&format!("qRcmd,{hex}"));
        let mut text = Vec::new();
        loop {
            let packet = self.packet().expect("an answer");
            let Some(hex) = packet.strip_prefix('O').filter(|h| *h != "K") else {
                assert_eq!(packet, "OK");
                return String::from_utf8(text).expect("text");
            };
            text.extend(
                (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex")),
            );
        }
    }
    fn register(&mut self, number: usize) -> u64 {
        let hex = self.ask(&format!("p{number:x}"));
        (0..hex.len() / 2)
            .rev()
            .fold(0, |v, i| v << 8 | u64::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
    }
    fn rip(&mut self) -> u64 {
        self.register(16)
    }
    fn word(&mut self, address: u64) -> u16 {
        let hex = self.ask(&format!("m{address:x},2"));
        u16::from_str_radix(&hex, 16).expect("hex").swap_bytes()
    }
    /// Continues up to a breakpoint in the code, which is taken away again.
    fn run_to(&mut self, offset: u64) {
        self.ok(&format!("Z0,{:x},1", BASE + offset));
        let stop = self.ask("vCont;c");
        assert!(stop.starts_with("T05"), "{stop}");
        self.ok(&format!("z0,{:x},1", BASE + offset));
        assert_eq!(self.rip(), offset);
    }
}

fn kvm() -> bool {
    let bios = firmware("probe");
    let config =
        Config { accels: vec![Accel::Kvm], memory: 16 << 20, bios: Some(bios.clone()), ..Config::default() };
    let there = Machine::new(config).is_ok();
    let _ = std::fs::remove_file(bios);
    if !there {
        println!("SKIPPED: KVM can't be used here");
    }
    there
}

fn breakpoints_watchpoints_steps(name: &str, accel: Accel) {
    let on_kvm = accel == Accel::Kvm;
    let running = start(name, 1, accel);
    let mut gdb = running.connect();
    assert!(gdb.ask("qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+").contains("PacketSize"));
    assert!(gdb.ask("?").starts_with("T05"));
    assert!(gdb.ask("qXfer:features:read:target.xml:0,ffb").contains("i386:x86-64"));
    assert_eq!(gdb.rip(), 0xfff0);
    assert_eq!(gdb.ask("m500,2"), "0000");
    gdb.run_to(4);
    assert_eq!(gdb.register(18), 0xf000, "cs");
    // One instruction each.
    for rip in [8, 0xb, 0xe, 0x10] {
        let stop = gdb.ask("vCont;s:1");
        assert!(stop.starts_with("T05"), "{stop}");
        assert_eq!(gdb.rip(), rip);
    }
    assert_eq!(gdb.word(0x500), 1);
    assert_eq!(gdb.register(3), 0x3fb, "rdx");
    gdb.ok("M500,2:4100");
    gdb.ok("P1=0123456789abcdef");
    assert_eq!(gdb.register(1), 0xefcd_ab89_6745_2301);
    // A KVM without hardware support emulates real mode, and its emulator does not look at data breakpoints.
    let emulated = on_kvm && std::path::Path::new("/sys/module/kvm_pvm").exists();
    if emulated {
        println!(
            "SKIPPED: watchpoints on KVM: this host's KVM is the one without hardware support (kvm_pvm)"
        );
    } else {
        // A write watchpoint stops after the instruction.
        gdb.ok("Z2,500,2");
        let stop = gdb.ask("vCont;c");
        assert!(stop.contains("watch:0500"), "{stop}");
        assert_eq!((gdb.rip(), gdb.word(0x500)), (8, 0x42));
        gdb.ok("z2,500,2");
        // KVM's debug registers know no reads alone, so both are caught there.
        gdb.ok("Z3,504,2");
        let stop = gdb.ask("vCont;c");
        assert!(stop.contains("rwatch:"), "{stop}");
        assert_eq!(gdb.rip(), 0xb);
        gdb.ok("z3,504,2");
    }
    gdb.ok(&format!("Z1,{:x},1", BASE + 0x14));
    let stop = gdb.ask("vCont;c");
    // The address is linear, the instruction pointer is not: gdb would not know the breakpoint.
    assert!(stop.starts_with("T05") && !stop.contains("break"), "{stop}");
    assert_eq!(gdb.rip(), 0x14);
    gdb.ok(&format!("z1,{:x},1", BASE + 0x14));
    // An access to a device stops after its instruction.
    assert!(gdb.monitor("rbreak reg com1.lcr write when value&0x80").contains("Break 1"));
    let stop = gdb.ask("vCont;c");
    assert!(stop.starts_with("T05"), "{stop}");
    assert_eq!(gdb.rip(), 0x11);
    assert!(gdb.monitor("reg com1.lcr").contains("0x83"));
    assert!(gdb.monitor("explain").contains("stopped by access"));
    gdb.monitor("rbreak delete 1");
    // More than the hardware has.
    let mut refused = 0;
    for n in 0..6 {
        refused += u32::from(gdb.ask(&format!("Z1,{:x},1", 0x10_0000 + n)) != "OK");
    }
    assert_eq!(refused, if on_kvm { 2 } else { 0 });
    if on_kvm {
        let said = running.said.recv_timeout(Duration::from_secs(5)).expect("the reason");
        assert!(said.contains("debug registers"), "{said}");
    }
    for n in 0..6 {
        gdb.ask(&format!("z1,{:x},1", 0x10_0000 + n));
    }
    // Ctrl-C.
    gdb.send("vCont;c");
    std::thread::sleep(Duration::from_millis(50));
    gdb.raw(&[3]);
    let stop = gdb.packet().expect("an answer");
    assert!(stop.starts_with("T02"), "{stop}");
    let before = gdb.word(0x500);
    assert!(gdb.rip() <= 0x18);
    // Nothing runs while gdb has it.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(gdb.word(0x500), before);
    // Devices' registers are not memory, and nothing is beyond RAM.
    assert!(gdb.ask("mfec00000,4").starts_with('E'));
    assert!(gdb.ask("m2000000,4").starts_with('E'));
    running.kill(gdb);
}

#[test]
fn breakpoints_watchpoints_and_steps_on_the_software_cpu() {
    breakpoints_watchpoints_steps("tier0", Accel::Interp);
}

#[test]
fn breakpoints_watchpoints_and_steps_on_kvm() {
    if kvm() {
        breakpoints_watchpoints_steps("kvm", Accel::Kvm);
    }
}

#[test]
fn monitor_commands_tell_of_devices() {
    let running = start("monitor", 1, Accel::Interp);
    let mut gdb = running.connect();
    assert!(gdb.monitor("help").contains("why-no-irq"));
    assert!(gdb.monitor("hlep").contains("did you mean `help`"));
    assert!(
        gdb.monitor("rbreak reg com1.lcr write when value=0x83").contains("Break 1: writes to serial0.LCR")
    );
    let stop = gdb.ask("vCont;c");
    assert!(stop.starts_with("T05"), "{stop}");
    assert_eq!(gdb.rip(), 0x11, "after the OUT");
    assert!(gdb.monitor("reg serial0.LCR").contains("0x83"), "{}", gdb.monitor("reg serial0.LCR"));
    let explained = gdb.monitor("explain");
    assert!(
        explained.contains("stopped by access") && explained.contains("PATH OF THE ACCESS"),
        "{explained}"
    );
    assert!(explained.contains("0x3fb (1019)"), "{explained}");
    assert!(gdb.monitor("last reg com1.lcr").contains("LCR"));
    assert!(gdb.monitor("rbreak").contains("hit 1 times"));
    assert_eq!(gdb.monitor("rbreak delete all"), "");
    assert!(gdb.monitor("reg com1.lrc").contains("did you mean"));
    assert!(gdb.monitor("reg nothing").contains("there is no device"));
    for (command, holds) in [
        ("info registers", "real mode"),
        ("info mtree", "address-space: memory"),
        ("info mtree -f", "FlatView of io"),
        ("info pic", "IMR="),
        ("info ioapic", "pin  0"),
        ("info lapic", "LVT LINT0"),
        ("info irq", "I/O APIC"),
        ("info devices", "io:0x3f8-0x3ff"),
        ("code 2", "out"),
        ("code 1", "mov"),
        ("map why io:0x3fb", "LCR of serial0"),
        ("phys 0xf0000 16", "31 c0 8e d8"),
        ("phys 0xfee00000 4", "neither RAM nor ROM"),
        ("translate 0x500", "guest-physical 0x500"),
        ("trace on nonsense:1", "trace on: "),
        ("symbol start_kernel", "no table of symbols"),
    ] {
        let text = gdb.monitor(command);
        assert!(text.contains(holds), "{command}: {text}");
    }
    assert_eq!(gdb.monitor("phys write 0x600 1 0x22"), "");
    assert_eq!(gdb.ask("m600,2"), "0122");
    assert!(gdb.monitor("phys on").contains("guest-physical"));
    assert_eq!(gdb.ask("m600,2"), "0122");
    gdb.monitor("phys off");
    // The serial port's interrupt is masked by everybody after power-on, and nobody asks for it.
    let why = gdb.monitor("why-no-irq 4");
    assert!(why.contains("it stops at: ") && why.contains("masks pin 4"), "{why}");
    assert!(gdb.monitor("why-no-irq 99").contains("0 to 23"));
    gdb.send(&format!("qRcmd,{}", "71756974"));
    drop(running.server);
    assert_eq!(running.thread.join().expect("no panic"), 0, "monitor quit ends it");
}

#[test]
fn a_gdb_may_go_and_come_back() {
    let running = start("back", 1, Accel::Interp);
    let mut gdb = running.connect();
    gdb.run_to(4);
    // A second gdb gets a reason.
    let mut second = running.connect();
    second.send("qSupported:x");
    let refused = second.packet().expect("a reason");
    assert!(refused.starts_with("E.another gdb"), "{refused}");
    drop(second);
    assert_eq!(gdb.rip(), 4, "and the first does not notice");
    // Detached: the guest goes on, without breakpoints.
    gdb.ok(&format!("Z0,{:x},1", BASE + 4));
    gdb.ok("D");
    drop(gdb);
    let mut gdb = again(&running);
    let first = gdb.word(0x500);
    gdb.ok("D");
    drop(gdb);
    let mut gdb = again(&running);
    assert_ne!(gdb.word(0x500), first, "it went on in between");
    // Gone in the middle of a packet while the guest runs: it goes on.
    gdb.send("vCont;c");
    gdb.raw(b"$m500");
    drop(gdb);
    let mut gdb = again(&running);
    assert!(gdb.ask("?").starts_with("T05"));
    // Gone in the middle of a packet while it stands still: it stays so.
    let before = gdb.word(0x500);
    gdb.raw(b"$m500,2#");
    drop(gdb);
    let said = running.said.recv_timeout(Duration::from_secs(5)).expect("it is said");
    assert!(said.contains("stays stopped"), "{said}");
    std::thread::sleep(Duration::from_millis(30));
    let mut gdb = again(&running);
    assert_eq!(gdb.word(0x500), before);
    // Nonsense ends a session, not the machine.
    gdb.raw(&[b'$'; 40]);
    gdb.raw(&vec![b'x'; 0x1_0000]);
    drop(gdb);
    let gdb = again(&running);
    running.kill(gdb);
}

/// Connects as soon as the former connection's end was noticed.
fn again(running: &Running) -> Gdb {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let mut gdb = running.connect();
        let answer = gdb.ask("qSupported:x");
        if !answer.starts_with("E.") {
            return gdb;
        }
        assert!(Instant::now() < end, "{answer}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn processors_are_threads() {
    let running = start("smp", 2, Accel::Interp);
    let mut gdb = running.connect();
    assert_eq!(gdb.ask("qfThreadInfo"), "m01,02");
    let about = gdb.ask("qThreadExtraInfo,2");
    assert!(
        about.contains(&"waits for start-up".bytes().map(|b| format!("{b:02x}")).collect::<String>()),
        "{about}"
    );
    gdb.run_to(4);
    gdb.ok("Hg2");
    assert_eq!(gdb.rip(), 0xfff0, "the second has not been started");
    gdb.ok("Hg1");
    // From a breakpoint at the present instruction it goes on, and comes back.
    gdb.ok(&format!("Z0,{:x},1", BASE + 4));
    let first = gdb.word(0x500);
    gdb.ask("vCont;c");
    assert_eq!((gdb.rip(), gdb.word(0x500)), (4, first + 1));
    gdb.ok(&format!("z0,{:x},1", BASE + 4));
    let stop = gdb.ask("vCont;s:1;c");
    assert!(stop.contains("thread:01") || stop.contains("thread:1"), "{stop}");
    assert_eq!(gdb.rip(), 8);
    running.kill(gdb);
}
