//! Scores `explain` on a directory of traces with an `index.tsv`.
//!
//! `cargo run -p explain --bin score -- DIR [--verbose] [--json]`
//!
//! What is compared: (a) frames and thread: every `#N` line of the text that looks like a frame is found again, and
//! the function that the index names stands in the chosen stack; (b) each access column that the index fills in;
//! (c) the device function, the device that the file is named after and, where a device's handler is on the stack, a
//! device, and a register where its offset is known; (d) the class of the index among the first three causes, for rows whose truth is known; (e) certain
//! statements that the index contradicts.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use explain::explanation::Explanation;
use explain::model::Report;
use explain::rules::{Kind, Sure};

#[derive(Default)]
struct Tally {
    good: usize,
    of: usize,
    failures: Vec<String>,
}

impl Tally {
    fn mark(&mut self, ok: bool, why: impl FnOnce() -> String) {
        self.of += 1;
        if ok {
            self.good += 1;
        } else {
            self.failures.push(why());
        }
    }
}

fn number(s: &str) -> Option<u64> {
    match s.strip_prefix("0x") {
        Some(h) => u64::from_str_radix(h, 16).ok(),
        None => s.parse().ok(),
    }
}

/// Counts the lines that start a frame, by a rule of its own: `#N` followed by an address, or by a name and a bracket.
fn frame_lines(text: &str) -> usize {
    text.lines()
        .filter(|l| {
            let t = l.trim_start_matches(|c: char| !c.is_ascii_alphanumeric() && c != '#');
            let Some(r) = t.strip_prefix('#') else { return false };
            let digits = r.bytes().take_while(u8::is_ascii_digit).count();
            let rest = r[digits..].trim_start();
            let second = rest.split_whitespace().nth(1).unwrap_or("");
            digits > 0
                && r[digits..].starts_with(' ')
                && (rest.starts_with("0x")
                    || rest.starts_with("in ")
                    || rest.starts_with('<')
                    || second.starts_with('(')
                    || second == "("
                    || second.contains(".c:")
                    || second.contains(".h:")
                    || second.is_empty())
        })
        .count()
}

/// The index counts one column of accelerators, one of ends; words that say the same.
fn same_space(index: &str, ours: Option<&str>) -> bool {
    ours == Some(index)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let verbose = args.iter().any(|a| a == "--verbose");
    let json = args.iter().any(|a| a == "--json");
    let Some(dir) = args.iter().find(|a| !a.starts_with("--")) else {
        eprintln!("score: name the directory with the traces and their index.tsv");
        std::process::exit(2);
    };
    // The folder itself, or the one above that keeps the traces in `backtraces`.
    let below = Path::new(dir).join("backtraces");
    let dir = if below.join("index.tsv").exists() { below.as_path() } else { Path::new(dir) };
    let index = match fs::read_to_string(dir.join("index.tsv")) {
        Ok(t) => t,
        Err(e) => {
            eprintln!("score: cannot read {}: {e}", dir.join("index.tsv").display());
            std::process::exit(2);
        }
    };
    let mut lines = index.lines();
    let head: Vec<&str> = lines.next().unwrap_or("").split('\t').collect();
    let mut tallies: BTreeMap<&'static str, Tally> = BTreeMap::new();
    let mut rows = 0;
    for line in lines {
        let cells: Vec<&str> = line.split('\t').collect();
        let row: HashMap<&str, &str> =
            head.iter().copied().zip(cells.iter().map(|c| c.trim_matches('"'))).collect();
        let get = |k: &str| row.get(k).copied().unwrap_or("").to_owned();
        let file = &*get("file");
        let raw = match fs::read(dir.join(file)) {
            Ok(r) => r,
            Err(e) => {
                tallies.entry("a frames").or_default().mark(false, || format!("{file}: cannot read: {e}"));
                continue;
            }
        };
        rows += 1;
        let Ok(report) = explain::reader::read(&raw[..]) else { continue };
        let e = explain::explanation::explain(&report, &[]);
        score(&mut tallies, file, &String::from_utf8_lossy(&raw), &report, &e, &get);
    }
    let mut out = std::io::stdout().lock();
    if json {
        let v: BTreeMap<&str, serde_json::Value> = tallies
            .iter()
            .map(|(k, t)| (*k, serde_json::json!({"right": t.good, "of": t.of, "failures": t.failures})))
            .collect();
        let _ = writeln!(out, "{}", serde_json::to_string_pretty(&v).unwrap_or_default());
        return;
    }
    let _ = writeln!(out, "{rows} traces");
    for (name, t) in &tallies {
        let share = if t.of == 0 { 100.0 } else { 100.0 * t.good as f64 / t.of as f64 };
        let _ = writeln!(out, "  {name:28} {:4} of {:4}  {share:5.1} %", t.good, t.of);
        if verbose {
            for f in &t.failures {
                let _ = writeln!(out, "      {f}");
            }
        }
    }
    let sum = |p: &str| {
        tallies.iter().filter(|(k, _)| k.starts_with(p)).fold((0, 0), |a, (_, t)| (a.0 + t.good, a.1 + t.of))
    };
    for (p, name, goal) in [
        ("a", "frames and thread", 99.0),
        ("b", "access facts", 95.0),
        ("c", "device and register", 80.0),
        ("d", "cause class in first three", 60.0),
    ] {
        let (g, o) = sum(p);
        let share = if o == 0 { 100.0 } else { 100.0 * g as f64 / o as f64 };
        let _ = writeln!(
            out,
            "{name:28} {g:4} of {o:4}  {share:5.1} %  (goal {goal} %{})",
            if share < goal { ", missed" } else { "" }
        );
    }
    let (g, o) = sum("e");
    let _ = writeln!(out, "{:28} {:4} in {o} statements (goal 0)", "false certain statements", o - g);
}

fn score(
    tallies: &mut BTreeMap<&'static str, Tally>,
    file: &str,
    text: &str,
    report: &Report,
    e: &Explanation,
    get: &dyn Fn(&str) -> String,
) {
    let mut mark = |k: &'static str, ok: bool, why: String| {
        tallies.entry(k).or_default().mark(ok, || format!("{file}: {why}"))
    };
    // (a)
    let expected = frame_lines(text);
    let hash: usize = report.stacks.iter().flat_map(|s| &s.frames).filter(|f| f.number.is_some()).count();
    if expected > 0 {
        mark("a frames", hash == expected, format!("{hash} frames read, {expected} in the text"));
    } else {
        let want = get("frames").parse::<u64>().unwrap_or(0);
        mark("a frames", report.frames > 0 || want == 0, format!("no frames read, index says {want}"));
    }
    let top = &*get("device_function_top");
    let tops: Vec<&str> = top.split(" / ").filter(|t| !t.is_empty() && *t != "INITED").collect();
    let chosen = report.stacks.get(e.input.chosen);
    let in_text = |t: &str| text.contains(t);
    if let Some(t) = tops.iter().find(|t| in_text(t)) {
        let base = t.split('.').next().unwrap_or(t);
        let found = chosen.is_some_and(|s| s.frames.iter().any(|f| f.function == base));
        mark(
            "a thread",
            found,
            format!("{t} is not in the chosen stack {} ({})", e.input.chosen, e.input.chosen_because),
        );
    }
    // (b)
    let accel = &*get("accel");
    if !accel.is_empty() && accel != "-" {
        mark(
            "b accel",
            e.actor.accel.as_deref() == Some(accel),
            format!("accel {:?}, index {accel}", e.actor.accel),
        );
    }
    let dirs = &*get("direction_innermost_first");
    let ours: Vec<&str> = e.accesses.iter().filter_map(|a| a.dir).collect();
    if !dirs.is_empty() && dirs != "-" {
        let want: Vec<&str> = dirs.split("<-").collect();
        let outer = want.last() == ours.first().or(want.last()) && !ours.is_empty();
        mark(
            "b direction",
            outer && want.first() == ours.last(),
            format!("directions {ours:?}, index {dirs}"),
        );
        mark(
            "b nesting",
            (want.len() > 1) == (ours.len() > 1),
            format!("nesting {}, index {dirs}", ours.len()),
        );
    }
    let space = &*get("space");
    if !space.is_empty() && space != "-" {
        let s = e.accesses.first().and_then(|a| a.space);
        mark("b space", same_space(space, s), format!("space {s:?}, index {space}"));
    }
    if let Some(want) = number(&get("addr")) {
        let all: Vec<u64> = e.accesses.iter().flat_map(|a| [a.addr, a.virtual_addr]).flatten().collect();
        mark("b addr", all.contains(&want), format!("addresses {all:x?}, index {want:#x}"));
    }
    if let Some(want) = number(&get("size")) {
        let all: Vec<u64> = e.accesses.iter().flat_map(|a| [a.size, a.handler_size]).flatten().collect();
        mark("b size", all.contains(&want), format!("sizes {all:?}, index {want}"));
    }
    for a in &e.accesses {
        if let (Some(ad), Some(o), Some(b)) = (a.addr, a.offset, a.region_base) {
            mark(
                "b base",
                a.addr_kind != Some("gpa") && a.addr_kind != Some("port") || ad.wrapping_sub(o) == b,
                format!("base {b:#x} is not {ad:#x} - {o:#x}"),
            );
        }
    }
    // (c)
    if let Some(t) = tops.iter().find(|t| in_text(t)) {
        let base = t.split('.').next().unwrap_or(t);
        let ok = e.end.function == base || e.chain.iter().any(|c| c == base);
        mark("c device function", ok, format!("end in {}, index {top}", e.end.function));
    }
    // The name of the file starts with the device's: an answer must know it somewhere, if the text does.
    let word = file.split('-').nth(1).unwrap_or("").to_lowercase();
    let known = !matches!(
        word.as_str(),
        "" | "no" | "glibc" | "systemd" | "block" | "io" | "riscv" | "nt4" | "usb" | "host" | "qemu"
    );
    let lower = text
        .lines()
        .filter(|l| !l.starts_with('#') || l.contains("0x") || l.contains('('))
        .collect::<String>()
        .to_lowercase();
    if known && !e.accesses.is_empty() && lower.contains(&format!("{word}_")) {
        let mut ours = vec![e.end.function.clone()];
        for a in &e.accesses {
            ours.extend(
                [a.device.clone(), a.device_title.clone(), a.device_kind.clone(), a.handler.clone()]
                    .into_iter()
                    .flatten(),
            );
        }
        ours.extend(e.chain.iter().cloned());
        mark(
            "c device by file name",
            ours.iter().any(|o| o.to_lowercase().contains(&word)),
            format!("{word} is not in {ours:?}"),
        );
    }
    for a in &e.accesses {
        if a.handler.is_some() || a.register.is_some() {
            mark("c device", a.device.is_some(), format!("no device for handler {:?}", a.handler));
        }
        if a.offset.is_some() && a.device.is_some() {
            mark(
                "c register",
                a.register.is_some(),
                format!("no register at +{:#x} of {:?}", a.offset.unwrap_or(0), a.device),
            );
        }
    }
    // (d)
    let class = &*get("class");
    let basis = &*get("truth_basis");
    let causes: Vec<&str> =
        e.findings.iter().filter(|f| f.kind == Kind::Cause).take(3).map(|f| f.class).collect();
    if !class.is_empty() && matches!(basis, "thread" | "title" | "fix") {
        mark(
            "d class",
            causes.contains(&class),
            format!("{causes:?}, index {class} ({})", get("true_cause")),
        );
    } else if !class.is_empty() {
        // Not counted towards the goal: the index's own reading of the stack.
        mark(
            "z class, truth inferred",
            causes.contains(&class),
            format!("{causes:?}, index {class} ({})", get("true_cause")),
        );
    }
    // (e)
    for f in e.findings.iter().filter(|f| f.confidence == Sure::Certain) {
        mark(
            "e certain findings",
            f.kind != Kind::Cause || f.class == class,
            format!("certain {} against {class}", f.class),
        );
    }
    for a in e.accesses.iter().take(1) {
        for name in &a.certain {
            let ok = match *name {
                "space" => space.is_empty() || space == "-" || same_space(space, a.space),
                "dir" => dirs.is_empty() || dirs == "-" || dirs.split("<-").last() == a.dir,
                "addr" => number(&get("addr")).is_none_or(|w| a.addr == Some(w) || a.virtual_addr == Some(w)),
                "size" => number(&get("size")).is_none_or(|w| a.size == Some(w) || a.handler_size == Some(w)),
                _ => true,
            };
            mark("e certain facts", ok, format!("certain {name} against the index"));
        }
    }
    if e.not.contains(&"out-of-bounds") {
        mark("e what it is not", class != "oob", format!("says not out-of-bounds, index {class}"));
    }
}
