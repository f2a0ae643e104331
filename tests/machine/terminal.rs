//! Terminals, pipes and signals.

use crate::driver::{Collected, Run, Temp, command};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// A terminal: our side of it, and a handle on the other.
pub(crate) struct Terminal {
    master: File,
    slave: File,
}

impl Terminal {
    pub(crate) fn new() -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        // setsid makes it the controlling terminal of the program under test only.
        use std::os::unix::fs::OpenOptionsExt;
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NOCTTY.bits() as i32)
            .open(name.to_str().unwrap())
            .unwrap();
        Terminal { master: master.into(), slave }
    }

    /// Starts the program in a session of its own on this terminal.
    pub(crate) fn start(&self, args: &[&str]) -> Run {
        let mut c = Command::new("setsid");
        c.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_hyaline")]).args(args);
        c.current_dir(env!("CARGO_TARGET_TMPDIR"));
        c.stdin(self.slave.try_clone().unwrap()).stdout(self.slave.try_clone().unwrap());
        Run::with(c)
    }

    /// Columns and rows.
    pub(crate) fn size(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    pub(crate) fn settings(&self) -> Termios {
        tcgetattr(&self.slave).unwrap()
    }

    pub(crate) fn output(&self) -> Arc<Collected> {
        Collected::of(self.master.try_clone().unwrap())
    }

    pub(crate) fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }
}

pub(crate) fn same(a: &Termios, b: &Termios) -> bool {
    (a.input_modes, a.output_modes, a.control_modes, a.local_modes)
        == (b.input_modes, b.output_modes, b.control_modes, b.local_modes)
}

fn guest(dir: &Temp) -> String {
    dir.file("guest.elf", hyaline_guests::COUNT);
    dir.text("guest.elf")
}

#[test]
fn ctrl_c_ends_with_130_and_the_terminal_as_before() {
    let dir = Temp::new();
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let output = terminal.output();
    let run = terminal.start(&["-kernel", &guest(&dir), "-serial", "stdio"]);
    output.wait_for("ready\r\n", 0);
    let during = terminal.settings();
    assert!(
        !during.local_modes.contains(LocalModes::ICANON) && !during.local_modes.contains(LocalModes::ECHO)
    );
    assert!(during.local_modes.contains(LocalModes::ISIG));
    terminal.type_in("\x03");
    let end = run.end();
    assert_eq!((end.code(), end.err.as_str()), (130, ""));
    assert!(same(&terminal.settings(), &before));
}

#[test]
fn with_nographic_ctrl_c_goes_to_the_guest_and_ctrl_a_commands() {
    let dir = Temp::new();
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let output = terminal.output();
    let run = terminal.start(&["-kernel", &guest(&dir), "-nographic"]);
    let at = output.wait_for("ready\r\n", 0);
    terminal.type_in("\x03");
    let at = output.wait_for("01 \x03\r\n", at);
    // Ctrl-A twice sends one.
    terminal.type_in("\x01\x01");
    output.wait_for("02 \x01\r\n", at);
    terminal.type_in("\x01h");
    run.err.wait_for("Ctrl-A x    end the program", 0);
    terminal.type_in("\x01x");
    let end = run.end();
    assert_eq!(end.code(), 0);
    assert!(same(&terminal.settings(), &before));
}

#[test]
fn a_guest_that_ends_leaves_the_terminal_as_before() {
    for option in ["-nographic", "-no-reboot"] {
        let dir = Temp::new();
        let terminal = Terminal::new();
        let before = terminal.settings();
        let output = terminal.output();
        let triple = dir.file("guest.elf", hyaline_guests::TRIPLE_FAULT);
        let run =
            terminal.start(&["-kernel", triple.to_str().unwrap(), "-serial", "stdio", "-no-reboot", option]);
        output.wait_for("dividing by zero without a handler\r\n", 0);
        assert_eq!(run.end().code(), 0);
        assert!(same(&terminal.settings(), &before));
    }
}

#[test]
fn a_terminal_that_hangs_up_ends_the_program() {
    let dir = Temp::new();
    let state = dir.text("state");
    let mut terminal = Terminal::new();
    let run = terminal.start(&["-kernel", &guest(&dir), "-nographic", "-save-at-exit", &state]);
    let mut buf = [0; 256];
    let mut all = Vec::new();
    while !all.ends_with(b"ready\r\n") {
        let n = terminal.master.read(&mut buf).unwrap();
        all.extend(&buf[..n]);
    }
    drop(terminal);
    // 128 and SIGHUP; what was asked for at the end is still done.
    assert_eq!(run.end().code(), 129);
    assert!(dir.path("state").is_file());
}

#[test]
fn a_closed_pipe_ends_the_program_quietly() {
    let dir = Temp::new();
    let mut c = command(["-kernel", &guest(&dir), "-nographic"]);
    c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    out.read_exact(&mut ready).unwrap();
    drop(out);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"x").unwrap();
    // 128 and SIGPIPE.
    let end = child.wait_with_output().unwrap();
    assert_eq!((end.status.code(), end.stderr.as_slice()), (Some(141), &b""[..]));
}

#[test]
fn text_into_a_closed_pipe_is_no_error() {
    let sh = |line: &str| {
        let mut c = Command::new("sh");
        c.args(["-c", line, "sh", env!("CARGO_BIN_EXE_hyaline")]).stdin(Stdio::null());
        let out = c.output().unwrap();
        (String::from_utf8_lossy(&out.stdout).into_owned(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    for option in ["-help", "-device help", "-cpu help", "-d help", "demo --help"] {
        // `true` reads nothing: every byte meets a closed pipe.
        let (out, err) = sh(&format!("{{ sleep 0.1; \"$1\" {option}; echo $? >&2; }} | true"));
        assert_eq!((out.as_str(), err.as_str()), ("", "0\n"), "{option}");
    }
    let (out, _) = sh("\"$1\" -help | head -1");
    assert_eq!(out, format!("Hyaline machine emulator version {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_closed_standard_error_does_not_stop_the_guest() {
    let dir = Temp::new();
    let demo = dir.file("demo.elf", hyaline_guests::DEMO);
    // The log goes to a pipe that nobody reads.
    let line = "{ sleep 0.1; \"$1\" -kernel \"$2\" -nographic -d access,int 2>&3 >\"$3\"; echo $? >\"$4\"; } 3>&1 | true; cat \"$4\"";
    let mut c = Command::new("sh");
    let (out, code) = (dir.path("out"), dir.path("code"));
    c.args(["-c", line, "sh", env!("CARGO_BIN_EXE_hyaline")]).arg(demo).arg(&out).arg(&code);
    let end = c.stdin(Stdio::null()).output().unwrap();
    // `cat` may be faster than the program: the file is what counts.
    drop(end);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(100);
    while std::fs::read_to_string(&code).unwrap_or_default().is_empty() {
        assert!(std::time::Instant::now() < until, "hyaline did not end");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(std::fs::read_to_string(&code).unwrap(), "0\n");
    assert!(std::fs::read_to_string(&out).unwrap().ends_with("Powering off.\n"));
}

#[test]
fn signals_end_the_program_with_their_codes() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let dir = Temp::new();
        let pid = dir.text("pid");
        let mut run = Run::start(["-kernel", &guest(&dir), "-nographic", "-pidfile", &pid]);
        run.wait_for("ready\n");
        assert!(std::fs::read_to_string(&pid).unwrap().trim().parse::<u32>().is_ok());
        run.signal(signal);
        assert_eq!(run.end().code(), code);
    }
    // A stopped machine and one whose processors sleep end as well.
    let dir = Temp::new();
    let run = Run::start(["-kernel", &guest(&dir), "-S"]);
    run.err.wait_for("the machine is stopped", 0);
    run.signal(Signal::INT);
    assert_eq!(run.end().code(), 130);
}

#[test]
fn end_of_input_does_not_end_the_guest() {
    let dir = Temp::new();
    let mut c = command(["-kernel", &guest(&dir), "-nographic"]);
    c.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut run = Run::with(c);
    run.wait_for("ready\n");
    run.send("ab");
    run.close_input();
    run.wait_for("02 b\n");
    std::thread::sleep(std::time::Duration::from_millis(300));
    run.signal(Signal::TERM);
    let end = run.end();
    assert_eq!((end.code(), end.out.as_str()), (143, "ready\n01 a\n02 b\n"));
}

#[test]
fn a_serial_port_on_a_pseudo_terminal_and_on_a_socket() {
    let dir = Temp::new();
    let run = Run::start(["-kernel", &guest(&dir), "-serial", "pty"]);
    let end = run.err.wait_for("\n", 0);
    let text = run.err.wait_for("char device redirected to ", 0);
    assert!(end > text);
    let line = {
        // All of the line has come.
        let mut name = String::new();
        for n in 0..1000 {
            let candidate = format!("/dev/pts/{n}\n");
            if run.err.holds(&candidate) {
                name = candidate.trim().to_string();
            }
        }
        name
    };
    let mut pty = OpenOptions::new().read(true).write(true).open(&line).unwrap();
    // What is typed before the guest has set up its port is lost, as on a real one.
    let output = Collected::of(pty.try_clone().unwrap());
    output.wait_for("ready\n", 0);
    pty.write_all(b"a").unwrap();
    output.wait_for("01 a\n", 0);
    pty.write_all(b"q").unwrap();
    assert_eq!(run.end().code(), 0);

    let path = dir.text("socket");
    let spec = format!("unix:{path},server=on");
    let run = Run::start(["-kernel", &guest(&dir), "-serial", &spec]);
    run.err.wait_for("waiting for a connection to ", 0);
    let mut socket = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let output = Collected::of(socket.try_clone().unwrap());
    output.wait_for("ready\n", 0);
    socket.write_all(b"a").unwrap();
    output.wait_for("01 a\n", 0);
    socket.write_all(b"q").unwrap();
    assert_eq!(run.end().code(), 0);
}
