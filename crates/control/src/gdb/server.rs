//! Connections from gdb, and the loop that runs a machine while it may be debugged.
//!
//! A thread accepts connections and one more reads; what they get waits in an inbox, and [`Event::Stop`] gets the machine's thread out of the
//! guest to look there. So nothing is asked of the guest's speed as long as gdb says nothing.

use super::target::{Guest, tid};
use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::breakpoints::WatchKind;
use hyaline_machine::Machine;
use hyaline_machine::chassis::{Core, Event};
use hyaline_machine::debug::{Stopped, Why};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Where gdb connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`; without a host only this computer can connect.
    Tcp(String, u16),
    /// `unix:PATH`.
    Unix(PathBuf),
}

/// What is wrong with an address, or why nobody can connect there.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Not an address.
    #[error(
        "-gdb {0}: write tcp::PORT or tcp:HOST:PORT (for example tcp::1234, then in gdb: target remote :1234) or unix:PATH (then: target remote PATH)"
    )]
    Address(String),
    /// The host refuses it.
    #[error("-gdb {0}: nobody can connect there: {1}{2}")]
    Bind(String, io::Error, &'static str),
    /// No thread.
    #[error("-gdb: a thread can't be started: {0}")]
    Thread(io::Error),
}

impl Address {
    /// Parses `tcp::1234`, `tcp:127.0.0.1:1234`, `unix:/run/gdb`; `,server=on,wait=off` after it is taken and means nothing.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(text: &str) -> Result<Address, ServerError> {
        let wrong = || ServerError::Address(text.to_string());
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or("");
        if parts
            .any(|p| !matches!(p, "server" | "server=on" | "nowait" | "wait=off" | "nodelay" | "nodelay=on"))
        {
            return Err(wrong());
        }
        if let Some(path) = first.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong()) } else { Ok(Address::Unix(path.into())) };
        }
        let (host, port) = first.strip_prefix("tcp:").and_then(|a| a.rsplit_once(':')).ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        Ok(Address::Tcp(host.to_string(), port.parse().map_err(|_| wrong())?))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn try_clone(&self) -> io::Result<Stream> {
        Ok(match self {
            Stream::Tcp(s) => Stream::Tcp(s.try_clone()?),
            Stream::Unix(s) => Stream::Unix(s.try_clone()?),
        })
    }
    fn set_timeouts(&self, write: Duration) {
        let _ = match self {
            Stream::Tcp(s) => s.set_nodelay(true).and_then(|()| s.set_write_timeout(Some(write))),
            Stream::Unix(s) => s.set_write_timeout(Some(write)),
        };
    }
    fn close(&self) {
        let both = std::net::Shutdown::Both;
        let _ = match self {
            Stream::Tcp(s) => s.shutdown(both),
            Stream::Unix(s) => s.shutdown(both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(buf),
            Stream::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => Write::write(s, buf),
            Stream::Unix(s) => Write::write(s, buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// gdb's end as the stub writes to it: whole packets at a time.
struct Conn {
    stream: Stream,
    out: Vec<u8>,
}

impl Connection for Conn {
    type Error = io::Error;
    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.out.push(byte);
        Ok(())
    }
    fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.out.extend_from_slice(buf);
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        let result = self.stream.write_all(&self.out);
        self.out.clear();
        result
    }
}

enum Message {
    Connected(Stream),
    Bytes(Vec<u8>),
    Closed,
}

struct Shared {
    core: Arc<Core>,
    inbox: Mutex<VecDeque<Message>>,
    /// Somebody is connected.
    busy: AtomicBool,
}

impl Shared {
    fn put(&self, message: Message) {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner).push_back(message);
        self.core.event(Event::Stop);
    }
    fn take(&self) -> Option<Message> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// A new connection: the first one is gdb's, others are told so.
    fn adopt(self: &Arc<Self>, stream: Stream) -> io::Result<()> {
        if self.busy.swap(true, Ordering::SeqCst) {
            std::thread::Builder::new().name("gdb-refuse".into()).spawn(move || refuse(stream))?;
            return Ok(());
        }
        let accepted = stream.try_clone().and_then(|mut reader| {
            stream.set_timeouts(Duration::from_secs(10));
            self.put(Message::Connected(stream));
            let shared = self.clone();
            let body = move || {
                let mut buf = vec![0; 4096];
                loop {
                    match reader.read(&mut buf) {
                        Ok(0) => break,
                        Ok(n) => shared.put(Message::Bytes(buf.get(..n).unwrap_or(&[]).to_vec())),
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
                shared.put(Message::Closed);
            };
            std::thread::Builder::new().name("gdb-read".into()).spawn(body).map(|_| ())
        });
        if accepted.is_err() {
            self.busy.store(false, Ordering::SeqCst);
        }
        accepted
    }
}

/// Answers a second gdb with the reason why it gets nothing else. gdb prints the text of `E.` replies.
fn refuse(mut stream: Stream) {
    stream.set_timeouts(Duration::from_secs(2));
    let _ = match &stream {
        Stream::Tcp(s) => s.set_read_timeout(Some(Duration::from_secs(2))),
        Stream::Unix(s) => s.set_read_timeout(Some(Duration::from_secs(2))),
    };
    let text = "E.another gdb is connected to this machine; detach or close that one first";
    let sum = text.bytes().fold(0u8, u8::wrapping_add);
    let answer = format!("+${text}#{sum:02x}");
    let mut buf = [0; 512];
    // A few packets: gdb asks for features, then checks that unknown packets are refused, and gives up.
    for _ in 0..4 {
        match stream.read(&mut buf) {
            Ok(n) if n > 0 => {}
            _ => break,
        }
        if buf.contains(&b'$') && stream.write_all(answer.as_bytes()).is_err() {
            break;
        }
        buf.fill(0);
    }
    stream.close();
}

/// Where gdb can connect to a machine.
pub struct Server {
    shared: Arc<Shared>,
    unix: Option<PathBuf>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(path) = &self.unix {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Server {
    /// A server nobody can connect to but by [`Server::adopt`].
    pub fn new(machine: &Machine) -> Server {
        let shared =
            Shared { core: machine.core.clone(), inbox: Mutex::default(), busy: AtomicBool::new(false) };
        Server { shared: Arc::new(shared), unix: None }
    }

    /// Takes a connection that is there already.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub fn adopt(&self, stream: UnixStream) -> io::Result<()> {
        self.shared.adopt(Stream::Unix(stream))
    }

    /// Accepts connections from now on.
    ///
    /// # Errors
    /// The address is in use, or not to be had.
    pub fn listen(&mut self, address: &Address) -> Result<(), ServerError> {
        let failed = |e: io::Error| {
            let hint = match e.kind() {
                io::ErrorKind::AddrInUse => "; another program has it: take another port or path",
                io::ErrorKind::PermissionDenied => {
                    "; take a port of 1024 or above, or a folder that you may write to"
                }
                _ => "",
            };
            ServerError::Bind(address.to_string(), e, hint)
        };
        let mut accept: Box<dyn FnMut() -> io::Result<Stream> + Send> = match address {
            Address::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                Box::new(move || listener.accept().map(|(s, _)| Stream::Tcp(s)))
            }
            Address::Unix(path) => {
                // A socket that nobody listens at any more is in the way.
                if UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
                    let _ = std::fs::remove_file(path);
                }
                let listener = UnixListener::bind(path).map_err(failed)?;
                self.unix = Some(path.clone());
                Box::new(move || listener.accept().map(|(s, _)| Stream::Unix(s)))
            }
        };
        let shared = self.shared.clone();
        let body = move || {
            loop {
                match accept() {
                    Ok(stream) => {
                        let _ = shared.adopt(stream);
                    }
                    // Out of file descriptors, for one: not to be tried without a pause.
                    Err(_) => std::thread::sleep(Duration::from_millis(200)),
                }
            }
        };
        std::thread::Builder::new().name("gdb-accept".into()).spawn(body).map_err(ServerError::Thread)?;
        Ok(())
    }
}

type Session<'m> = GdbStubStateMachine<'static, Guest<'m>, Conn>;

/// A session and its way to end.
struct Talk<'m> {
    /// None only while a packet is handled.
    session: Option<Session<'m>>,
    /// For closing.
    stream: Stream,
}

/// What came of a session.
enum After {
    /// It goes on.
    On,
    /// gdb went away without a word, or talked nonsense: the reason.
    Lost(String),
    /// gdb detached.
    Detached,
    /// gdb wants the end.
    Kill,
}

/// How a signal goes to gdb.
fn stopped<U>(cpu: usize, signal: Signal) -> MultiThreadStopReason<U> {
    MultiThreadStopReason::SignalWithThread { tid: tid(cpu), signal }
}

/// Runs a machine that gdb may connect to until `on_event` gives an exit code or gdb ends it. `paused`: it does not run before gdb says so.
/// `on_event` deals with what is not gdb's. `say` tells the user something.
pub fn drive(
    machine: &mut Machine,
    server: &Server,
    paused: bool,
    say: &dyn Fn(&str),
    mut on_event: impl FnMut(&mut Machine, Event) -> Option<i32>,
) -> i32 {
    let core = machine.core.clone();
    let shared = server.shared.clone();
    let mut guest = Guest::new(machine);
    let mut talk: Option<Talk<'_>> = None;
    let mut halted = paused;
    // The processor that gdb was told about last.
    let mut current = 0;
    let mut later: VecDeque<Event> = VecDeque::new();
    loop {
        while let Some(message) = shared.take() {
            let after = match message {
                Message::Connected(stream) => match connect(stream, &mut guest) {
                    Ok(new) => {
                        talk = Some(new);
                        halted = true;
                        guest.describe();
                        After::On
                    }
                    Err(e) => After::Lost(e),
                },
                Message::Bytes(bytes) => match talk.as_mut() {
                    Some(t) => t.feed(&bytes, &mut guest, &mut halted, current),
                    None => After::On,
                },
                Message::Closed => {
                    shared.busy.store(false, Ordering::SeqCst);
                    if talk.is_some() { After::Lost("it closed the connection".into()) } else { After::On }
                }
            };
            if let Some(text) = guest.complaint.take() {
                say(&format!("gdb: {text}"));
            }
            let end = guest.monitor.quit;
            match after {
                After::On if !end => continue,
                After::On | After::Kill => {
                    close(&mut talk, &mut guest, Some(0));
                    return 0;
                }
                After::Detached => {
                    close(&mut talk, &mut guest, None);
                    halted = false;
                }
                After::Lost(why) => {
                    close(&mut talk, &mut guest, None);
                    if halted {
                        say(&format!(
                            "gdb is gone ({why}); the machine stays stopped, without breakpoints, until gdb connects again and continues"
                        ));
                    }
                }
            }
        }
        if halted {
            match core.take_event() {
                // Questions to a machine that stands still.
                Some(Event::Stop) => {
                    if let Some(code) = on_event(guest.machine, Event::Stop) {
                        close(&mut talk, &mut guest, Some(code));
                        return code;
                    }
                }
                Some(event) => keep(event, &mut later),
                None => core.wait_event(),
            }
            if let Some(at) = later.iter().position(|e| matches!(e, Event::Exit(_) | Event::Report))
                && let Some(event) = later.remove(at)
                && let Some(code) = on_event(guest.machine, event)
            {
                close(&mut talk, &mut guest, Some(code));
                return code;
            }
            continue;
        }
        let event = match later.pop_front().map_or_else(|| guest.machine.run(), Ok) {
            Ok(event) => event,
            Err(e) => Event::Failed(e.to_string()),
        };
        let (reason, cpu) = match &event {
            Event::Stop => {
                if let Some(code) = on_event(guest.machine, Event::Stop) {
                    close(&mut talk, &mut guest, Some(code));
                    return code;
                }
                continue;
            }
            Event::Debug(stop) => {
                if let Why::Access(text) = &stop.why {
                    guest.monitor.stopped_by = Some(text.clone());
                }
                (Some(reason(stop, &mut guest)), stop.cpu)
            }
            Event::TripleFault(cpu) => (Some(stopped(usize::from(*cpu), Signal::SIGSEGV)), *cpu),
            _ => (None, 0),
        };
        let running =
            talk.as_ref().is_some_and(|t| matches!(t.session, Some(GdbStubStateMachine::Running(_))));
        match reason {
            Some(reason) if running => {
                guest.describe();
                current = usize::from(cpu);
                halted = true;
                if matches!(event, Event::TripleFault(_)) {
                    say("the guest shut down after a triple fault; gdb has it before the machine is reset");
                    later.push_back(event);
                }
                if let Some(t) = talk.as_mut()
                    && let After::Lost(why) = t.report(&mut guest, reason)
                {
                    close(&mut talk, &mut guest, None);
                    say(&format!("gdb is gone ({why}); the machine stays stopped"));
                }
            }
            Some(_) if matches!(event, Event::Debug(_)) => {}
            _ => {
                if let Some(code) = on_event(guest.machine, event) {
                    close(&mut talk, &mut guest, Some(code));
                    return code;
                }
            }
        }
    }
}

/// While the machine stands still: events wait, except those that only woke us.
fn keep(event: Event, later: &mut VecDeque<Event>) {
    if !matches!(event, Event::Debug(_)) {
        later.push_back(event);
    }
}

fn reason(stop: &Stopped, guest: &mut Guest<'_>) -> MultiThreadStopReason<u64> {
    let tid = tid(usize::from(stop.cpu));
    let cpu = usize::from(stop.cpu);
    match &stop.why {
        // Outside of flat memory gdb takes the instruction pointer for the address, finds no breakpoint there, and would just go on.
        Why::Breakpoint { address } if guest.machine.cpu_state(cpu).is_ok_and(|s| s.rip != *address) => {
            stopped(cpu, Signal::SIGTRAP)
        }
        Why::Breakpoint { address } if guest.points.hardware.contains(address) => {
            MultiThreadStopReason::HwBreak(tid)
        }
        Why::Breakpoint { .. } => MultiThreadStopReason::SwBreak(tid),
        Why::Watch { address, .. } => {
            // gdb looks for the watchpoint of this kind at this address.
            let hit = guest.points.watches.iter().find(|w| address.wrapping_sub(w.address) < w.len);
            let kind = match hit {
                Some(w) if w.read && w.write => WatchKind::ReadWrite,
                Some(w) if w.read => WatchKind::Read,
                _ => WatchKind::Write,
            };
            MultiThreadStopReason::Watch { tid, kind, addr: *address }
        }
        Why::Step | Why::Access(_) => stopped(usize::from(stop.cpu), Signal::SIGTRAP),
    }
}

fn connect<'m>(stream: Stream, guest: &mut Guest<'m>) -> Result<Talk<'m>, String> {
    let copy = stream.try_clone().map_err(|e| e.to_string())?;
    let conn = Conn { stream, out: Vec::new() };
    let stub = GdbStub::builder(conn).packet_buffer_size(0x4000).build().map_err(|e| e.to_string())?;
    let session = stub.run_state_machine(guest).map_err(|e| e.to_string())?;
    Ok(Talk { session: Some(session), stream: copy })
}

/// Ends a session. The machine goes on, or stays, as it is; with a code gdb is told that it ended.
fn close<'m>(talk: &mut Option<Talk<'m>>, guest: &mut Guest<'m>, code: Option<i32>) {
    if let Some(mut t) = talk.take() {
        if let (Some(code), Some(GdbStubStateMachine::Running(_))) = (code, &t.session) {
            let _ = t.report(guest, MultiThreadStopReason::Exited(code as u8));
        }
        t.stream.close();
        // The reader says `Closed` then, which sets the way free for the next.
    }
    guest.clear();
}

impl<'m> Talk<'m> {
    /// Tells gdb why the machine stopped.
    fn report(&mut self, guest: &mut Guest<'m>, reason: MultiThreadStopReason<u64>) -> After {
        match self.session.take() {
            Some(GdbStubStateMachine::Running(inner)) => match inner.report_stop(guest, reason) {
                Ok(next) => {
                    self.session = Some(next);
                    After::On
                }
                Err(e) => After::Lost(e.to_string()),
            },
            other => {
                self.session = other;
                After::On
            }
        }
    }

    /// Handles bytes from gdb.
    fn feed(&mut self, bytes: &[u8], guest: &mut Guest<'m>, halted: &mut bool, current: usize) -> After {
        for byte in bytes {
            let next = match self.session.take() {
                Some(GdbStubStateMachine::Idle(inner)) => inner.incoming_data(guest, *byte),
                Some(GdbStubStateMachine::Running(inner)) => inner.incoming_data(guest, *byte),
                Some(other) => Ok(other),
                None => return After::On,
            };
            let next = match next {
                Ok(GdbStubStateMachine::CtrlCInterrupt(inner)) => {
                    *halted = true;
                    guest.describe();
                    inner.interrupt_handled(guest, Some(stopped(current, Signal::SIGINT)))
                }
                other => other,
            };
            match next {
                Ok(GdbStubStateMachine::Disconnected(inner)) => {
                    return match inner.get_reason() {
                        DisconnectReason::Kill => After::Kill,
                        _ => After::Detached,
                    };
                }
                Ok(next) => {
                    if *halted && matches!(next, GdbStubStateMachine::Running(_)) {
                        *halted = false;
                        guest.monitor.stopped_by = None;
                        let resume = guest.resume.clone();
                        if let Err(e) = guest.machine.set_resume(&resume) {
                            guest.complaint = Some(e.to_string());
                        }
                    }
                    self.session = Some(next);
                }
                Err(e) => return After::Lost(e.to_string()),
            }
        }
        After::On
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let tcp = |h: &str, p| Address::Tcp(h.to_string(), p);
        assert_eq!(Address::parse("tcp::1234").expect("right"), tcp("127.0.0.1", 1234));
        assert_eq!(Address::parse("tcp:0.0.0.0:5,server=on,wait=off").expect("right"), tcp("0.0.0.0", 5));
        assert_eq!(Address::parse("tcp:[::1]:1234").expect("right"), tcp("::1", 1234));
        assert_eq!(Address::parse("unix:/a/b").expect("right"), Address::Unix("/a/b".into()));
        for wrong in ["", "1234", "tcp:", "tcp::", "tcp::99999", "unix:", "stdio", "tcp::1,wait=on"] {
            let e = Address::parse(wrong).expect_err("wrong").to_string();
            assert!(e.contains("tcp::1234"), "{e}");
        }
    }
}
