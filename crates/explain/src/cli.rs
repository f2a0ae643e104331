//! The command line of `hyaline explain`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use serde_json::json;

use crate::access::{Space, parse_number};
use crate::explanation::{self, both, bytes};
use crate::rules::{self, Kind, Sure};
use crate::text::{self, Detail};
use crate::{devices, mtree};

const HELP: &str = "\
Explains a backtrace of QEMU, of another VMM, or a crash report of Hyaline.

Usage: explain [options] FILE|-
       explain --port PORT [--size N] [--write|--read] [--base ADDRESS] [--json]
       explain --addr ADDRESS [--size N] [--write|--read] [--base ADDRESS] [--json]

  FILE            the backtrace: gdb bt, bt full, thread apply all bt, sanitizer report, systemd-coredump,
                  glibc backtrace, lldb, Valgrind, a crash report, or sentences; - is standard input
  --json          print JSON (schema 1) instead of text
  --brief         a few lines
  --teach         also what each layer does and how one sees it
  --mtree FILE    text of `info mtree -f`: turns guesses about addresses into facts
  --strict        only what is certain or strong; no hints
  --replay-test   of a crash report of Hyaline: print a Rust test that makes the device's last accesses anew
  --rules         print all rules with their evidence
  --port, --addr  what is at this I/O port or address of a PC
  --help          this text

Exit status: 0 explained, 1 partly, 2 not a trace of a VMM or bad usage.
";

#[derive(Default)]
struct Options {
    file: Option<OsString>,
    json: bool,
    brief: bool,
    teach: bool,
    strict: bool,
    rules: bool,
    replay_test: bool,
    mtree: Option<OsString>,
    port: Option<u64>,
    addr: Option<u64>,
    size: Option<u64>,
    base: Option<u64>,
    write: Option<bool>,
    help: bool,
}

/// Why the command could not do its work.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}. Try: explain --help")]
    Usage(String),
    #[error("cannot read {file}: {source}. Check the path, or pass - to read standard input")]
    Read { file: String, source: io::Error },
}

fn parse(args: impl Iterator<Item = OsString>) -> Result<Options, Failure> {
    use lexopt::prelude::*;
    let mut o = Options::default();
    let mut p = lexopt::Parser::from_args(args);
    let bad = |e: lexopt::Error| Failure::Usage(capital(&e.to_string()));
    let number = |what: &str, v: OsString| -> Result<u64, Failure> {
        let t = v.to_string_lossy();
        parse_number(&t).ok_or_else(|| {
            Failure::Usage(format!("{what} needs a number such as 0xc012 or 49170, not '{t}'"))
        })
    };
    while let Some(arg) = p.next().map_err(bad)? {
        match arg {
            Long("json") => o.json = true,
            Long("brief") => o.brief = true,
            Long("teach") => o.teach = true,
            Long("strict") => o.strict = true,
            Long("rules") => o.rules = true,
            Long("replay-test") => o.replay_test = true,
            Long("write") => o.write = Some(true),
            Long("read") => o.write = Some(false),
            Long("mtree") => o.mtree = Some(p.value().map_err(bad)?),
            Long("port") => o.port = Some(number("--port", p.value().map_err(bad)?)?),
            Long("addr") => o.addr = Some(number("--addr", p.value().map_err(bad)?)?),
            Long("size") => o.size = Some(number("--size", p.value().map_err(bad)?)?),
            Long("base") => o.base = Some(number("--base", p.value().map_err(bad)?)?),
            Short('h') | Long("help") => o.help = true,
            Value(v) if o.file.is_none() => o.file = Some(v),
            other => return Err(bad(other.unexpected())),
        }
    }
    if o.port.is_some_and(|v| v > 0xffff) {
        let v = o.port.unwrap_or(0);
        return Err(Failure::Usage(format!(
            "{} is not an I/O port: ports have 16 bits. For a memory address use --addr",
            both(v)
        )));
    }
    if o.port.is_some() && o.addr.is_some() {
        return Err(Failure::Usage("Give either --port or --addr".into()));
    }
    if o.size.is_some_and(|s| !matches!(s, 1 | 2 | 4 | 8)) {
        return Err(Failure::Usage("--size must be 1, 2, 4 or 8 bytes".into()));
    }
    Ok(o)
}

fn capital(s: &str) -> String {
    let mut c = s.chars();
    c.next().map(|f| f.to_uppercase().collect::<String>() + c.as_str()).unwrap_or_default()
}

/// Runs the command; the result is the exit status. Never panics on input or on a closed output.
pub fn run(args: impl Iterator<Item = OsString>) -> i32 {
    let stdout = io::stdout();
    let mut out = stdout.lock();
    match work(args, &mut out) {
        Ok(code) => code,
        Err(e) => {
            let _ = writeln!(io::stderr(), "explain: {e}");
            2
        }
    }
}

/// Writes the answer; a reader that went away is not an error.
fn put(out: &mut impl Write, text: &str) {
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn work(args: impl Iterator<Item = OsString>, out: &mut impl Write) -> Result<i32, Failure> {
    let o = parse(args)?;
    if o.help {
        put(out, HELP);
        return Ok(0);
    }
    if o.rules {
        put(out, &rules_text(o.json));
        return Ok(0);
    }
    let ranges = match &o.mtree {
        Some(f) => {
            let name = f.to_string_lossy().into_owned();
            let file = File::open(f).map_err(|source| Failure::Read { file: name.clone(), source })?;
            mtree::parse(BufReader::new(file)).map_err(|source| Failure::Read { file: name, source })?
        }
        None => Vec::new(),
    };
    if let Some((space, at)) = o.port.map(|p| (Space::Pio, p)).or(o.addr.map(|a| (Space::Mmio, a))) {
        return Ok(query(&o, space, at, &ranges, out));
    }
    let Some(file) = &o.file else {
        return Err(Failure::Usage("Name a file with a backtrace, or - for standard input".into()));
    };
    let name = file.to_string_lossy().into_owned();
    let input: Box<dyn Read> = if file == "-" {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(file).map_err(|source| Failure::Read { file: name.clone(), source })?)
    };
    if o.replay_test {
        let mut text = Vec::new();
        let limited = &mut input.take(crate::replay::MOST);
        limited.read_to_end(&mut text).map_err(|source| Failure::Read { file: name.clone(), source })?;
        let test = crate::replay::test(&String::from_utf8_lossy(&text))
            .map_err(|e| Failure::Usage(format!("{name}: {e}")))?;
        put(out, &test);
        return Ok(0);
    }
    let report = crate::reader::read(input).map_err(|source| Failure::Read { file: name, source })?;
    let mut e = explanation::explain(&report, &ranges);
    if o.strict {
        e.findings.retain(|f| f.confidence > Sure::Hint);
        e.scenarios.clear();
        e.relatives.clear();
        for a in &mut e.accesses {
            a.candidates.clear();
        }
    }
    let detail = if o.brief {
        Detail::Brief
    } else if o.teach {
        Detail::Teach
    } else {
        Detail::Normal
    };
    let mut t = if o.json { e.to_json() } else { text::render(&e, detail) };
    if !t.ends_with('\n') {
        t.push('\n');
    }
    put(out, &t);
    Ok(e.exit_code())
}

fn rules_text(as_json: bool) -> String {
    if as_json {
        let list: Vec<_> = rules::table()
            .iter()
            .map(|r| json!({"rule": r.id, "kind": r.kind, "class": r.class, "confidence": r.sure, "rank": r.rank, "title": r.title, "when": r.when_text, "evidence": r.evidence, "says": r.says, "next": r.next, "positive": rules::expand(r.yes), "negative": rules::expand(r.no)}))
            .collect();
        return serde_json::to_string_pretty(&list).unwrap_or_default() + "\n";
    }
    let mut out = String::new();
    for r in rules::table() {
        let kind = match r.kind {
            Kind::Context => "context",
            Kind::Path => "path",
            Kind::Anomaly => "anomaly",
            Kind::Cause => "cause",
        };
        out.push_str(&format!(
            "{}  {} ({kind}, {}, class {})\n    when      {}\n    evidence  {}\n    says      {}\n",
            r.id,
            r.title,
            r.sure.word(),
            r.class,
            r.when_text,
            r.evidence,
            r.says
        ));
        if !r.next.is_empty() {
            out.push_str(&format!("    next      {}\n", r.next));
        }
    }
    out
}

fn query(o: &Options, space: Space, at: u64, ranges: &[mtree::Range], out: &mut impl Write) -> i32 {
    let known = mtree::find(ranges, space == Space::Pio, at);
    let base = o.base.or(known.map(|r| r.start.wrapping_sub(r.offset)));
    let list = devices::candidates(space, at, o.size, o.write, base);
    let list: Vec<_> = list.iter().take(8).filter_map(explanation::candidate_out).collect();
    let what = if space == Space::Pio { "port" } else { "address" };
    if o.json {
        let v = json!({"schema": 1, "space": space.word(), "addr": at, "size": o.size, "write": o.write, "region": known.map(|r| &r.name), "candidates": list});
        put(out, &(serde_json::to_string_pretty(&v).unwrap_or_default() + "\n"));
    } else {
        let how = match (o.size, o.write) {
            (Some(n), Some(w)) => format!(", {} of {}", if w { "write" } else { "read" }, bytes(n)),
            (Some(n), None) => format!(", {}", bytes(n)),
            (None, Some(w)) => format!(", {}", if w { "write" } else { "read" }),
            (None, None) => String::new(),
        };
        let mut t = format!("{} {}{how}, on a PC:\n", capital(what), both(at));
        if let Some(r) = known {
            t.push_str(&format!("  The map says: region '{}', from {:#x}.\n", r.name, r.start));
        }
        for (i, c) in list.iter().enumerate() {
            let width = if c.width > 0 { format!(", width {}", bytes(c.width)) } else { String::new() };
            t.push_str(&format!(
                "  {}) {}: {} ({}, {:#x}+{:#x}{width})\n       {}\n",
                i + 1,
                c.device_title,
                c.register_title,
                c.register,
                c.region_base,
                at.wrapping_sub(c.region_base),
                c.because.join("; ")
            ));
        }
        if list.is_empty() {
            t.push_str(
                "  Nothing of a usual PC is there. `info mtree -f` tells; pass its text with --mtree.\n",
            );
        } else if known.is_none()
            && o.base.is_none()
            && !list.iter().any(|c| c.because.iter().any(|b| b.starts_with("fixed")))
        {
            t.push_str("  One line of `info mtree -f` decides: pass its text with --mtree, or the region's start with --base.\n");
        }
        put(out, &t);
    }
    i32::from(list.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn go(args: &[&str]) -> (i32, String) {
        let mut out = Vec::new();
        let code = work(args.iter().map(OsString::from), &mut out).unwrap_or(2);
        (code, String::from_utf8_lossy(&out).into_owned())
    }

    #[test]
    fn questions_without_a_trace() {
        let (code, t) = go(&["--port", "0xc012", "--size", "2", "--write"]);
        assert_eq!(code, 0);
        assert!(t.starts_with("Port 0xc012 (49170), write of 2 bytes"), "{t}");
        assert!(t.contains("1) legacy virtio device: Device Status"), "{t}");
        assert!(t.contains("PORTSC2") && t.contains("RAP"), "{t}");
        let (code, t) = go(&["--addr", "0xfed000f0", "--read", "--size", "4"]);
        assert_eq!(code, 0);
        assert!(t.contains("MAIN_CNT"), "{t}");
        let (code, t) = go(&["--port", "0xc012", "--json"]);
        assert_eq!(code, 0);
        assert!(serde_json::from_str::<serde_json::Value>(&t).is_ok());
    }

    #[test]
    fn bad_usage() {
        for args in [
            &["--port", "0x12fbe"][..],
            &["--bogus"],
            &[],
            &["a", "b"],
            &["--size", "3", "--port", "1"],
            &["--port", "x"],
            &["/no/such/file"],
        ] {
            assert_eq!(go(args).0, 2, "{args:?}");
        }
        assert_eq!(go(&["--help"]).0, 0);
    }

    #[test]
    fn rules_are_printed() {
        let (code, t) = go(&["--rules"]);
        assert_eq!(code, 0);
        assert!(t.contains("R23") && t.contains("evidence"));
    }
}
