//! The control socket: `-control unix:PATH`. One JSON object a line, both ways.
//!
//! A client writes `{"ask":"hello"}`, `{"ask":"stats"}` (counts by register, processor and guest function since the machine or, for
//! functions, the connection started), `{"ask":"last","n":20}` (the last accesses), `{"ask":"monitor","line":"reg com1.lsr"}` (a monitor
//! command), `{"ask":"map"}`, `{"ask":"map","why":"io:0x3f8"}`, `{"ask":"report"}` (write a crash report) or `{"ask":"quit"}` (end the machine). Each gets one line back, `{"error":"…"}` for what is not understood. Nothing that a client does
//! stops the guest for longer than an answer takes; while one is connected, each access costs one more count.

use crate::desk::{self, Ask, Desk};
use hyaline_machine::Machine;
use hyaline_machine::chassis::{Core, Event};
use hyaline_space::Actor;
use hyaline_watch::{AccessRecord, Guest, Recorder, Sink, Site};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Clients at a time.
const CLIENTS: usize = 8;
/// Bytes of a request.
const LINE: u64 = 64 << 10;
/// Instructions that are counted apart for one client.
const RIPS: usize = 50_000;

/// Counts accesses by guest instruction, for one client.
#[derive(Default)]
struct Functions(Mutex<HashMap<u64, u64>>);

impl Sink for Functions {
    fn record(&self, r: &AccessRecord, _: &Arc<Site>) {
        if !matches!(r.actor, Actor::Vcpu(_)) {
            return;
        }
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if map.len() < RIPS || map.contains_key(&r.rip) {
            *map.entry(r.rip).or_default() += 1;
        }
    }
}

struct Shared {
    core: Arc<Core>,
    recorder: Arc<Recorder>,
    guest: Arc<Guest>,
    name: String,
    accel: &'static str,
    desk: Arc<Desk>,
    clients: AtomicUsize,
}

/// The listening socket; its file is gone when this is dropped.
pub(crate) struct Control(PathBuf);

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listens on `unix:PATH`.
///
/// # Errors
/// Another form of address, or a path that can't be listened on.
pub(crate) fn listen(spec: &str, machine: &Machine, desk: &Arc<Desk>) -> Result<Control, String> {
    let path = spec
        .strip_prefix("unix:")
        .map(|p| p.split(',').next().unwrap_or(p))
        .filter(|p| !p.is_empty())
        .ok_or_else(|| format!("-control {spec}: write -control unix:PATH"))?;
    let path = PathBuf::from(path);
    // A socket that nobody listens on is left over from a run that was killed.
    if path.exists()
        && UnixStream::connect(&path).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
    {
        let _ = std::fs::remove_file(&path);
    }
    let listener = UnixListener::bind(&path).map_err(|e| format!("-control unix:{}: {e}", path.display()))?;
    let shared = Arc::new(Shared {
        core: machine.core.clone(),
        recorder: machine.recorder.clone(),
        guest: machine.guest.clone(),
        name: machine.config.name.clone().unwrap_or_default(),
        accel: machine.accel().as_str(),
        desk: desk.clone(),
        clients: AtomicUsize::new(0),
    });
    let body = move || {
        for stream in listener.incoming().flatten() {
            if shared.clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS {
                shared.clients.fetch_sub(1, Ordering::Relaxed);
                let _ = writeln!(
                    &stream,
                    "{}",
                    json!({"error": format!("{CLIENTS} clients are connected already")})
                );
                continue;
            }
            let own = shared.clone();
            let started = std::thread::Builder::new().name("control".into()).spawn(move || {
                let functions: Arc<Functions> = Arc::default();
                let sink: Arc<dyn Sink> = functions.clone();
                own.recorder.attach(sink.clone());
                // A client that goes away in the middle of a line is gone, and nothing else.
                let _ = serve(&own, &functions, &stream);
                own.recorder.detach(&sink);
                own.clients.fetch_sub(1, Ordering::Relaxed);
            });
            if started.is_err() {
                shared.clients.fetch_sub(1, Ordering::Relaxed);
            }
        }
    };
    let thread = std::thread::Builder::new().name("control".into()).spawn(body);
    thread.map_err(|e| format!("-control: no thread could be started: {e}"))?;
    Ok(Control(path))
}

fn serve(shared: &Shared, functions: &Functions, stream: &UnixStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut out = stream;
    loop {
        let mut line = Vec::new();
        if reader.by_ref().take(LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if !line.ends_with(b"\n") && line.len() as u64 >= LINE {
            return writeln!(out, "{}", json!({"error": "a request has at most 65536 bytes"}));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let ask = serde_json::from_slice::<Value>(&line);
        let reply = match &ask {
            Ok(ask) => answer(shared, functions, ask),
            Err(e) => json!({"error": format!("this is no JSON object: {e}")}),
        };
        writeln!(out, "{reply}")?;
        if ask.is_ok_and(|ask| ask["ask"] == "quit") {
            // Answered first: the program may be gone a moment later.
            shared.core.event(Event::Exit(0));
        }
    }
}

fn answer(shared: &Shared, functions: &Functions, ask: &Value) -> Value {
    match ask["ask"].as_str() {
        Some("hello") => {
            json!({"hyaline": env!("CARGO_PKG_VERSION"), "protocol": 1, "name": shared.name, "accelerator": shared.accel})
        }
        Some("stats") => stats(shared, functions),
        Some("last") => {
            let n = ask["n"].as_u64().unwrap_or(20).min(4096) as usize;
            let symbols = shared.guest.symbols();
            let one = |r: &AccessRecord| {
                let mut v = hyaline_watch::json(r, &*shared.recorder.site(r.site)?);
                v["guest"] = symbols.as_ref().and_then(|s| s.at(r.rip)).into();
                Some(v)
            };
            json!({"last": shared.recorder.last(n).iter().filter_map(one).collect::<Vec<_>>()})
        }
        Some("monitor") => match ask["line"].as_str() {
            Some(line) => shared.desk.ask(Ask::Monitor(line.to_string()), desk::PATIENCE),
            None => json!({"error": "monitor wants a `line`"}),
        },
        Some("map") => {
            let ask = ask["why"].as_str().map_or(Ask::Map, |place| Ask::MapWhy(place.to_string()));
            shared.desk.ask(ask, desk::PATIENCE)
        }
        Some("report") => {
            shared.core.event(Event::Report);
            json!({"ok": "a report is being written"})
        }
        Some("quit") => json!({"ok": "the machine ends"}),
        other => json!({
            "error": format!("`{}` is not understood; ask for hello, stats, last, monitor, map, report or quit", other.unwrap_or("?"))
        }),
    }
}

fn stats(shared: &Shared, functions: &Functions) -> Value {
    let mut by_name: HashMap<String, u64> = HashMap::new();
    let counts = functions.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    // Found once, they stay; until then each question looks for them, in this thread.
    let kernel = counts.keys().copied().find(|r| *r >= 0xffff_ffff_8000_0000);
    let symbols =
        kernel.and_then(|rip| shared.guest.search(Some(rip), None)).or_else(|| shared.guest.symbols());
    for (rip, n) in counts {
        let name = symbols.as_ref().and_then(|s| Some(s.lookup(rip)?.0.to_string()));
        *by_name.entry(name.unwrap_or_else(|| format!("{rip:#x}"))).or_default() += n;
    }
    let mut hottest: Vec<(String, u64)> = by_name.into_iter().collect();
    hottest.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    hottest.truncate(200);
    let registers: Vec<Value> = shared
        .recorder
        .counts()
        .iter()
        .filter(|c| c.site.space != "pci-config")
        .map(|c| {
            json!({
                "region": c.site.label(), "register": c.site.register_name(), "space": c.site.space_label(), "reads": c.reads,
                "writes": c.writes, "failed": c.failed, "took_ns": c.took,
            })
        })
        .collect();
    let now = shared.core.clock.now();
    let cpus = shared.core.cpus();
    let at = shared.desk.ask(Ask::Processors, std::time::Duration::from_millis(300));
    let vcpus: Vec<Value> = shared
        .recorder
        .by_vcpu()
        .iter()
        .zip(&cpus)
        .enumerate()
        .map(|(n, (accesses, port))| {
            let last = shared.recorder.last_of(n, 1);
            let last = last.first();
            json!({
                "vcpu": n, "state": at["processors"][n]["state"], "at": at["processors"][n]["at"], "mode": at["processors"][n]["mode"],
                "accesses": accesses, "requests": port.signals.pending(),
                "last_access_ns_ago": last.map(|r| now.saturating_sub(r.time)), "last_rip": last.map(|r| r.rip),
                "last_function": last.and_then(|r| symbols.as_ref()?.at(r.rip)),
            })
        })
        .collect();
    let high: Vec<String> =
        shared.core.lines().iter().filter(|l| l.level()).map(|l| l.name().to_string()).collect();
    json!({
        "time_ns": now, "host_ns": shared.core.clock.host(), "accesses": shared.recorder.accesses(), "vcpus": vcpus, "registers": registers,
        "functions": hottest.iter().map(|(n, c)| json!({"name": n, "count": c})).collect::<Vec<_>>(), "lines_high": high,
    })
}
