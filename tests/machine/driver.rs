//! Runs the program under test: feeds its input, waits for its output, takes its exit code.

use hyaline_fetch::{Cache, Kernel, initramfs};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fmt::Display;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Guards against a hang only: no test waits this long when it passes, also on a busy host. `HYALINE_TEST_PATIENCE` has another number
/// of seconds for whoever is looking for the hang.
fn patience() -> Duration {
    let given = std::env::var("HYALINE_TEST_PATIENCE").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(given.unwrap_or(420))
}

/// Output that another thread collects.
#[derive(Default)]
pub(crate) struct Collected {
    state: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

impl Collected {
    /// Collects from `from` on a thread until its end (or an error, as a terminal gives whose other side closed).
    pub(crate) fn of(mut from: impl Read + Send + 'static) -> Arc<Collected> {
        let all = Arc::new(Collected::default());
        let to = all.clone();
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            loop {
                let n = match from.read(&mut buf) {
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    Ok(n) => n,
                    Err(_) => 0,
                };
                let mut state = to.state.lock().unwrap();
                state.0.extend(&buf[..n]);
                state.1 = n == 0;
                to.changed.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        all
    }

    fn wait(&self, mut done: impl FnMut(&[u8]) -> bool, what: &dyn Display) -> Vec<u8> {
        let until = Instant::now() + patience();
        let mut state = self.state.lock().unwrap();
        loop {
            if done(&state.0) {
                return state.0.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                let why = if state.1 { "the output ended" } else { "nothing more came" };
                let text = String::from_utf8_lossy(&state.0).into_owned();
                drop(state);
                panic!("{why} before {what}; there was:\n{text}");
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits until `text` comes after the first `from` bytes; gives where it ends.
    pub(crate) fn wait_for(&self, text: &str, from: usize) -> usize {
        let find = |all: &[u8]| {
            let rest = all.get(from..)?;
            rest.windows(text.len()).position(|w| w == text.as_bytes()).map(|i| from + i + text.len())
        };
        let all = self.wait(|all| find(all).is_some(), &format_args!("`{text}`"));
        find(&all).unwrap()
    }

    /// Has `text` come?
    pub(crate) fn holds(&self, text: &str) -> bool {
        self.state.lock().unwrap().0.windows(text.len()).any(|w| w == text.as_bytes())
    }

    /// All there is when the output has ended.
    pub(crate) fn all(&self) -> String {
        let until = Instant::now() + patience();
        let mut state = self.state.lock().unwrap();
        while !state.1 && Instant::now() < until {
            state = self.changed.wait_timeout(state, Duration::from_secs(1)).unwrap().0;
        }
        assert!(state.1, "the output did not end");
        String::from_utf8_lossy(&state.0).into_owned()
    }
}

/// The program, running.
pub(crate) struct Run {
    child: Child,
    stdin: Option<ChildStdin>,
    pub(crate) out: Arc<Collected>,
    pub(crate) err: Arc<Collected>,
    /// How much of the output has been waited for.
    seen: usize,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl End {
    /// Its exit code.
    pub(crate) fn code(&self) -> i32 {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => code,
            (None, signal) => panic!("killed by signal {signal:?}: {self:?}"),
        }
    }
    /// Ended with success; gives what it printed.
    pub(crate) fn success(self) -> String {
        assert_eq!(self.code(), 0, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self.out
    }
}

/// The program with arguments, not started yet.
pub(crate) fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_hyaline"));
    // Crash reports go to the current folder, which must not be the source tree.
    c.args(args).current_dir(env!("CARGO_TARGET_TMPDIR"));
    c
}

impl Run {
    /// Starts it with pipes for standard input, output and error.
    pub(crate) fn start<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
        let mut c = command(args);
        c.stdin(Stdio::piped()).stdout(Stdio::piped());
        Run::with(c)
    }

    /// Starts a command. Standard error is always collected; standard input and output if they are pipes.
    pub(crate) fn with(mut c: Command) -> Run {
        c.stderr(Stdio::piped());
        let mut child = c.spawn().expect("hyaline starts");
        let out = match child.stdout.take() {
            Some(out) => Collected::of(out),
            None => Collected::of(std::io::empty()),
        };
        let err = Collected::of(child.stderr.take().unwrap());
        Run { stdin: child.stdin.take(), child, out, err, seen: 0 }
    }

    /// Waits for text on standard output, after what was waited for before.
    pub(crate) fn wait_for(&mut self, text: &str) {
        self.seen = self.out.wait_for(text, self.seen);
    }

    /// Types.
    pub(crate) fn send(&mut self, text: &str) {
        self.try_send(text).expect("hyaline reads");
    }

    /// Types to a program that may have ended.
    pub(crate) fn try_send(&mut self, text: &str) -> std::io::Result<()> {
        let stdin = self.stdin.as_mut().expect("standard input is a pipe");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush())
    }

    /// Ends its input.
    pub(crate) fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Its process number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("hyaline runs");
    }

    /// Waits until it ends by itself, with its standard input still open.
    pub(crate) fn end(mut self) -> End {
        let until = Instant::now() + patience();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > until {
                let _ = self.child.kill();
                panic!("hyaline did not end:\n{}\n{}", self.out.all(), self.err.all());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        End { status, out: self.out.all(), err: self.err.all() }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs it to its end without input.
pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> End {
    let mut c = command(args);
    c.stdin(Stdio::null()).stdout(Stdio::piped());
    Run::with(c).end()
}

/// Runs it with arguments as in a shell line without quotes.
pub(crate) fn line(args: &str) -> End {
    run(args.split_whitespace())
}

/// Something the host lacks: says so on a line of its own; in continuous integration that is a failure.
pub(crate) fn skipped(test: &str, why: &dyn Display) {
    limited(test, why);
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{test}: {why}, and CI=true");
}

/// Something that this kind of host can't do, however it is set up: says so on a line of its own.
pub(crate) fn limited(test: &str, why: &dyn Display) {
    // Not by eprintln!, which the test harness keeps to itself.
    let _ = writeln!(std::io::stderr(), "\nSKIPPED: {test}: {why}");
}

/// Can KVM be had?
pub(crate) fn kvm(test: &str) -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(e) => {
            skipped(test, &format_args!("/dev/kvm: {e}"));
            false
        }
    }
}

fn cache() -> Result<&'static Cache, String> {
    static CACHE: OnceLock<Result<Cache, String>> = OnceLock::new();
    CACHE.get_or_init(|| Cache::open().map_err(|e| e.to_string())).as_ref().map_err(Clone::clone)
}

/// Only one test at a time asks the cache, which may have to download.
pub(crate) fn from_cache<T>(
    test: &str,
    get: impl FnOnce(&Cache) -> Result<T, hyaline_fetch::FetchError>,
) -> Option<T> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match cache().and_then(|c| get(c).map_err(|e| e.to_string())) {
        Ok(t) => Some(t),
        Err(e) => {
            skipped(test, &e);
            None
        }
    }
}

/// Debian's kernel.
pub(crate) fn kernel(test: &str, kind: Kernel) -> Option<PathBuf> {
    from_cache(test, |c| c.kernel(kind, &|_| {}))
}

/// A file of a Debian package: where it is installed, else from the cache.
pub(crate) fn file_of(test: &str, package: &str, path: &str) -> Option<PathBuf> {
    let installed = Path::new("/").join(path);
    if installed.is_file() {
        return Some(installed);
    }
    from_cache(test, |c| c.file(package, path, &|_| {}))
}

/// An initramfs whose init ends in `last`.
pub(crate) fn initrd(test: &str, dir: &Temp, last: &str) -> Option<PathBuf> {
    let busybox = from_cache(test, |c| c.busybox(&|_| {}))?;
    Some(dir.file("initrd.cpio", &initramfs(&busybox, last).expect("an initramfs")))
}

/// A folder that goes away.
pub(crate) struct Temp(PathBuf);

impl Temp {
    pub(crate) fn new() -> Temp {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("hyaline-test-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        Temp(dir)
    }
    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    /// A file in it.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).expect("a temporary file");
        path
    }
    /// A path as text.
    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain path").to_string()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
