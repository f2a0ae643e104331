//! Character back ends of serial ports: standard input and output, files, sockets, pseudo terminals.

use crate::terminal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Timespec;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A back end as `-serial` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// Nothing: output is dropped.
    Null,
    /// Standard input and output; with `mux` Ctrl-A commands.
    Stdio {
        /// Ctrl-A is a prefix for commands, and Ctrl-C goes to the guest.
        mux: bool,
    },
    /// Output into a file.
    File(PathBuf),
    /// A Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Listen (true) or connect.
        server: bool,
        /// As a server: wait for the first client before the guest starts.
        wait: bool,
    },
    /// A new pseudo terminal.
    Pty,
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(s: &str) -> Result<Spec, String> {
        let (kind, rest) = s.split_once(':').unwrap_or((s, ""));
        match kind {
            "null" | "none" => Ok(Spec::Null),
            "stdio" => Ok(Spec::Stdio { mux: false }),
            "mon" => match rest.parse()? {
                Spec::Stdio { .. } => Ok(Spec::Stdio { mux: true }),
                _ => Err(format!("`{s}`: a monitor can share stdio only (mon:stdio)")),
            },
            "pty" => Ok(Spec::Pty),
            "file" if !rest.is_empty() => Ok(Spec::File(rest.into())),
            "file" => Err(format!("`{s}`: a file name is missing; write file:PATH")),
            "unix" => {
                let mut parts = rest.split(',');
                let path = parts.next().unwrap_or("");
                if path.is_empty() {
                    return Err(format!("`{s}`: a path is missing; write unix:PATH,server=on,wait=off"));
                }
                let (mut server, mut wait) = (false, true);
                for option in parts {
                    match option {
                        "server" | "server=on" => server = true,
                        "server=off" => server = false,
                        "nowait" | "wait=off" => wait = false,
                        "wait" | "wait=on" => wait = true,
                        _ => {
                            return Err(format!(
                                "`{s}`: unknown socket option `{option}`; there are server=on|off and wait=on|off"
                            ));
                        }
                    }
                }
                Ok(Spec::Unix { path: path.into(), server, wait })
            }
            _ => Err(format!(
                "`{s}`: unknown character back end; there are stdio, mon:stdio, null, file:PATH, unix:PATH[,server=on][,wait=off] and pty"
            )),
        }
    }
}

/// What input is handed to.
pub trait Input: Send + Sync {
    /// Offers bytes; gives how many were taken. The rest is offered again after [`Chardev::ready`].
    fn offer(&self, data: &[u8]) -> usize;
    /// A Ctrl-A command of a multiplexed terminal.
    fn command(&self, command: Command);
    /// The back end went away (a closed pipe, a terminal that hung up): nothing more can be written or read.
    fn gone(&self, why: &str);
}

/// A Ctrl-A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `x`: end the program.
    Exit,
    /// `b`: send a break.
    Break,
    /// `h` or `?`: print help (was done).
    Help,
    /// `c`: to the monitor and back.
    Monitor,
}

enum Output {
    Null,
    Stdout,
    File(File),
    Socket(Arc<Mutex<Option<UnixStream>>>),
    Pty(OwnedFd),
}

/// An open back end.
pub struct Chardev {
    name: String,
    output: Mutex<Output>,
    gate: Arc<Gate>,
    gone: Arc<AtomicBool>,
    input: Mutex<Option<Arc<dyn Input>>>,
}

/// Lets a reader thread wait until the device can take more.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a back end can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}; {hint}")]
pub struct OpenError {
    what: String,
    source: io::Error,
    hint: &'static str,
}

/// Help of a multiplexed terminal.
pub const HELP: &str = "\
Ctrl-A h    print this help
Ctrl-A x    end the program
Ctrl-A b    send a break
Ctrl-A c    to the monitor (not there yet) and back
Ctrl-A Ctrl-A  send Ctrl-A
";

impl Chardev {
    /// Opens a back end. A pseudo terminal's name is printed to standard error.
    ///
    /// # Errors
    /// The file, socket or terminal can't be opened: which one and what to check.
    pub fn open(spec: &Spec) -> Result<Chardev, OpenError> {
        let error = |what: String, hint| move |source: io::Error| OpenError { what, source, hint };
        let (name, output) = match spec {
            Spec::Null => ("null".to_string(), Output::Null),
            Spec::Stdio { .. } => ("stdio".to_string(), Output::Stdout),
            Spec::File(path) => {
                let name = format!("file:{}", path.display());
                let file = File::create(path)
                    .map_err(error(name.clone(), "check that the folder exists and can be written"))?;
                (name, Output::File(file))
            }
            Spec::Unix { path, server: false, .. } => {
                let name = format!("unix:{}", path.display());
                let socket = UnixStream::connect(path)
                    .map_err(error(name.clone(), "is a server listening there? Add server=on to listen"))?;
                (name, Output::Socket(Arc::new(Mutex::new(Some(socket)))))
            }
            Spec::Unix { path, server: true, wait } => {
                let name = format!("unix:{}", path.display());
                // A socket file left by an earlier run is in the way; anything else is not ours to remove.
                if UnixStream::connect(path).is_err() && is_socket(path) {
                    let _ = std::fs::remove_file(path);
                }
                let listener = UnixListener::bind(path)
                    .map_err(error(name.clone(), "is another program listening there?"))?;
                let client = Arc::new(Mutex::new(None));
                if *wait {
                    let _ = writeln!(io::stderr(), "hyaline: waiting for a connection to {}", path.display());
                    let (socket, _) =
                        listener.accept().map_err(error(name.clone(), "the connection failed"))?;
                    *lock(&client) = Some(socket);
                }
                let slot = client.clone();
                let accept = move || {
                    for socket in listener.incoming().flatten() {
                        let mut slot = lock(&slot);
                        if slot.is_none() {
                            *slot = Some(socket);
                        }
                    }
                };
                std::thread::Builder::new()
                    .name("chardev-accept".into())
                    .spawn(accept)
                    .map_err(error(name.clone(), "no thread could be started"))?;
                (name, Output::Socket(client))
            }
            Spec::Pty => {
                let (fd, path) =
                    open_pty().map_err(error("pty".into(), "no pseudo terminal could be made"))?;
                let _ = writeln!(io::stderr(), "char device redirected to {path}");
                (format!("pty:{path}"), Output::Pty(fd))
            }
        };
        Ok(Chardev {
            name,
            output: Mutex::new(output),
            gate: Arc::default(),
            gone: Arc::default(),
            input: Mutex::new(None),
        })
    }

    /// Its name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes bytes from the guest. What can't be written is dropped; the first time, [`Input::gone`] is called.
    pub fn send(&self, data: &[u8]) {
        if self.gone.load(Ordering::Relaxed) {
            return;
        }
        let result = match &mut *lock(&self.output) {
            Output::Null => Ok(()),
            Output::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(data).and_then(|()| out.flush())
            }
            Output::File(f) => f.write_all(data),
            Output::Socket(socket) => {
                let mut socket = lock(socket);
                if socket.as_mut().is_some_and(|s| s.write_all(data).is_err()) {
                    // The client left; another may come.
                    *socket = None;
                }
                Ok(())
            }
            Output::Pty(fd) => {
                // Nobody may be reading: what the terminal's buffer can't take is dropped.
                let _ = rustix::io::write(fd, data);
                Ok(())
            }
        };
        if let Err(e) = result
            && !self.gone.swap(true, Ordering::Relaxed)
            && let Some(input) = &*lock(&self.input)
        {
            input.gone(&format!("{}: {e}", self.name));
        }
    }

    /// The device can take more input.
    pub fn ready(&self) {
        *lock(&self.gate.open) = true;
        self.gate.changed.notify_all();
    }

    /// Starts reading: each byte goes to `input`. `mux` turns on Ctrl-A commands.
    ///
    /// # Errors
    /// The reader thread can't be started.
    pub fn start(&self, mux: bool, input: Arc<dyn Input>) -> io::Result<()> {
        *lock(&self.input) = Some(input.clone());
        let gate = self.gate.clone();
        let mut escape = Escape::default();
        let mut deliver = move |data: &[u8], input: &Arc<dyn Input>| {
            let data = if mux { escape.filter(data, input) } else { data.to_vec() };
            let mut rest = &data[..];
            while !rest.is_empty() {
                *lock(&gate.open) = false;
                let taken = input.offer(rest).min(rest.len());
                rest = &rest[taken..];
                if !rest.is_empty() {
                    let open = lock(&gate.open);
                    // The time-out covers a device that frees room without saying so (a reset).
                    let wait = std::time::Duration::from_millis(50);
                    drop(gate.changed.wait_timeout_while(open, wait, |open| !*open));
                }
            }
        };
        let name = format!("chardev-{}", self.name.split(':').next().unwrap_or("in"));
        let spawn =
            |body: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name(name).spawn(body).map(|_| ());
        match &*lock(&self.output) {
            Output::Null | Output::File(_) => Ok(()),
            Output::Stdout => {
                terminal::raw(!mux);
                spawn(Box::new(move || {
                    let mut buf = [0; 256];
                    let mut stdin = io::stdin().lock();
                    loop {
                        match stdin.read(&mut buf) {
                            Ok(0) => return,
                            Ok(n) => deliver(&buf[..n], &input),
                            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                            Err(_) => return,
                        }
                    }
                }))
            }
            Output::Socket(socket) => {
                let socket = socket.clone();
                spawn(Box::new(move || {
                    let mut buf = [0; 256];
                    loop {
                        let Some(mut s) = lock(&socket).as_ref().and_then(|s| s.try_clone().ok()) else {
                            std::thread::sleep(std::time::Duration::from_millis(20));
                            continue;
                        };
                        match s.read(&mut buf) {
                            Ok(0) | Err(_) => *lock(&socket) = None,
                            Ok(n) => deliver(&buf[..n], &input),
                        }
                    }
                }))
            }
            Output::Pty(fd) => {
                let fd = fd.try_clone()?;
                spawn(Box::new(move || {
                    let mut buf = [0; 256];
                    loop {
                        // A pseudo terminal nobody has open reads as an error: look again later.
                        let wait = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                        let _ = poll(&mut [PollFd::new(&fd.as_fd(), PollFlags::IN)], Some(&wait));
                        match rustix::io::read(&fd, &mut buf) {
                            Ok(n) if n > 0 => deliver(&buf[..n], &input),
                            _ => std::thread::sleep(std::time::Duration::from_millis(50)),
                        }
                    }
                }))
            }
        }
    }
}

fn is_socket(path: &std::path::Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
}

fn open_pty() -> io::Result<(OwnedFd, String)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let fd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&fd)?;
    unlockpt(&fd)?;
    let name = ptsname(&fd, Vec::new())?.to_string_lossy().into_owned();
    let mut t = rustix::termios::tcgetattr(&fd)?;
    t.make_raw();
    rustix::termios::tcsetattr(&fd, rustix::termios::OptionalActions::Now, &t)?;
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok((fd, name))
}

/// The Ctrl-A prefix of a multiplexed terminal.
#[derive(Default)]
struct Escape {
    pending: bool,
}

const CTRL_A: u8 = 1;

impl Escape {
    fn filter(&mut self, data: &[u8], input: &Arc<dyn Input>) -> Vec<u8> {
        let mut out = Vec::with_capacity(data.len());
        for &b in data {
            if !std::mem::take(&mut self.pending) {
                if b == CTRL_A {
                    self.pending = true;
                } else {
                    out.push(b);
                }
                continue;
            }
            match b {
                CTRL_A => out.push(CTRL_A),
                b'x' => input.command(Command::Exit),
                b'b' => input.command(Command::Break),
                b'c' => input.command(Command::Monitor),
                b'h' | b'?' => {
                    let _ = io::stderr().lock().write_all(HELP.as_bytes());
                    input.command(Command::Help);
                }
                _ => {}
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Collect {
        bytes: Mutex<Vec<u8>>,
        commands: Mutex<Vec<Command>>,
        gone: Mutex<Vec<String>>,
    }

    impl Input for Collect {
        fn offer(&self, data: &[u8]) -> usize {
            // One byte at a time: the rest must be offered again.
            lock(&self.bytes).push(data[0]);
            1
        }
        fn command(&self, command: Command) {
            lock(&self.commands).push(command);
        }
        fn gone(&self, why: &str) {
            lock(&self.gone).push(why.to_string());
        }
    }

    #[test]
    fn specs_parse_and_bad_ones_say_what_there_is() {
        assert_eq!("mon:stdio".parse(), Ok(Spec::Stdio { mux: true }));
        assert_eq!(
            "unix:/tmp/s,server,nowait".parse(),
            Ok(Spec::Unix { path: "/tmp/s".into(), server: true, wait: false })
        );
        assert!("tcp:1".parse::<Spec>().unwrap_err().contains("unix:PATH"));
        assert!("file:".parse::<Spec>().unwrap_err().contains("file:PATH"));
        assert!("unix:/x,foo".parse::<Spec>().unwrap_err().contains("foo"));
    }

    #[test]
    fn ctrl_a_is_a_prefix() {
        let c = Arc::new(Collect::default());
        let input: Arc<dyn Input> = c.clone();
        let mut e = Escape::default();
        assert_eq!(e.filter(b"ab\x01", &input), b"ab");
        assert_eq!(e.filter(b"x\x01\x01c\x01bz", &input), b"\x01cz");
        assert_eq!(*lock(&c.commands), [Command::Exit, Command::Break]);
    }

    #[test]
    fn a_socket_carries_both_ways_and_outlives_its_client() {
        let dir = std::env::temp_dir().join(format!("hyaline-chardev-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        let dev = Chardev::open(&Spec::Unix { path: path.clone(), server: true, wait: false }).unwrap();
        let c = Arc::new(Collect::default());
        dev.start(false, c.clone()).unwrap();
        for round in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"hey").unwrap();
            let t = std::time::Instant::now();
            while lock(&c.bytes).len() < 3 * (round + 1) && t.elapsed().as_secs() < 10 {
                dev.ready();
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            dev.send(b"you");
            let mut got = [0; 3];
            client.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"you");
            drop(client);
            while lock_is_some(&dev) && t.elapsed().as_secs() < 10 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
        assert_eq!(*lock(&c.bytes), b"heyhey");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    fn lock_is_some(dev: &Chardev) -> bool {
        matches!(&*lock(&dev.output), Output::Socket(s) if lock(s).is_some())
    }

    #[test]
    fn a_full_or_closed_file_is_reported_once() {
        let dev = Chardev::open(&Spec::File("/dev/full".into())).unwrap();
        let c = Arc::new(Collect::default());
        dev.start(false, c.clone()).unwrap();
        dev.send(b"x");
        dev.send(b"y");
        assert_eq!(lock(&c.gone).len(), 1);
        assert!(
            Chardev::open(&Spec::File("/nowhere/x".into()))
                .is_err_and(|e| e.to_string().contains("/nowhere/x"))
        );
    }
}
