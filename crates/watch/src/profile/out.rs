//! A profile as text, folded stacks, an SVG flame graph, and a Chrome trace.

use super::{Bins, Row, Summary};
use crate::text::duration;
use hyaline_space::Actor;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Rows of the table in text.
const ROWS: usize = 24;

fn ns(n: u64) -> String {
    duration(u32::try_from(n).unwrap_or(u32::MAX - 1))
}

fn percent(part: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { part as f64 * 100.0 / all as f64 }
}

/// Text that stands in XML and HTML.
pub(super) fn escape(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '&' => "&amp;".to_string(),
            '<' => "&lt;".to_string(),
            '>' => "&gt;".to_string(),
            '"' => "&quot;".to_string(),
            '\'' => "&#39;".to_string(),
            c if c.is_control() => " ".to_string(),
            c => c.to_string(),
        })
        .collect()
}

/// A node of the flame graph.
#[derive(Default)]
pub(super) struct Flame {
    pub(super) count: u64,
    pub(super) took: u64,
    pub(super) children: BTreeMap<String, Flame>,
}

impl Flame {
    fn add(&mut self, path: &[&str], count: u64, took: u64) {
        self.count += count;
        self.took += took;
        if let Some((first, rest)) = path.split_first() {
            self.children.entry((*first).to_string()).or_default().add(rest, count, took);
        }
    }
    pub(super) fn json(&self, name: &str) -> Value {
        json!({"n": name, "c": self.count, "t": self.took,
            "k": self.children.iter().map(|(n, c)| c.json(n)).collect::<Vec<_>>()})
    }
    fn depth(&self) -> usize {
        1 + self.children.values().map(Flame::depth).max().unwrap_or(0)
    }
}

impl Summary {
    fn exits(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|r| !r.nested())
    }
    /// Accesses in all, without those that were part of others.
    pub fn count(&self) -> u64 {
        self.exits().map(|r| r.stat.count).sum()
    }
    /// Nanoseconds in their handlers.
    pub fn took(&self) -> u64 {
        self.exits().map(|r| r.stat.took).sum()
    }

    /// Of the processors' time, in percent: in guest code, in handlers, waiting. None: nobody looked.
    pub fn shares(&self) -> Option<(f64, f64, f64)> {
        let all = self.moments.all();
        if all == 0 {
            return None;
        }
        let processors = self.vcpus.len().saturating_sub(1).max(1) as f64;
        let handlers = percent(self.took(), (self.seconds * processors * 1e9) as u64).min(100.0);
        let rest = 100.0 - handlers;
        let waits = rest * self.moments.waits as f64 / all as f64;
        Some((rest - waits, handlers, waits))
    }

    /// Shares in a sentence, with how sure they are.
    pub(super) fn shares_text(&self) -> Option<String> {
        let (guest, handlers, waits) = self.shares()?;
        let n = self.moments.all() as f64;
        let part = self.moments.waits as f64 / n;
        // Two standard deviations of a share of n independent looks.
        let give_or_take = 200.0 * (part * (1.0 - part) / n).sqrt();
        Some(format!(
            "guest code {guest:.1} %, handlers {handlers:.1} % (measured), waiting {waits:.1} % of the processors' time (from {n} looks, give or take {:.1})",
            give_or_take.max(0.1)
        ))
    }

    /// How the callers in guest stacks were found, in a sentence.
    pub(super) fn stacks_text(&self) -> Option<String> {
        if self.moments.runs == 0 {
            return None;
        }
        let runs = self.moments.runs;
        let by: Vec<String> =
            self.moments.by.iter().map(|(n, c)| format!("{n} {:.0} %", percent(*c, runs))).collect();
        Some(format!("callers found by: {}", by.join(", ")))
    }

    /// Guest functions by how often they were seen at work: name, own, with what they call.
    pub(super) fn hottest(&self) -> Vec<(String, u64, u64)> {
        let mut all: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for (stack, n) in &self.moments.stacks {
            if let Some(own) = stack.last() {
                all.entry(own).or_default().0 += n;
            }
            let mut once: Vec<&str> = stack.iter().map(String::as_str).collect();
            once.sort_unstable();
            once.dedup();
            for name in once {
                all.entry(name).or_default().1 += n;
            }
        }
        let mut all: Vec<_> = all.into_iter().map(|(n, (own, with))| (n.to_string(), own, with)).collect();
        all.sort_by(|a, b| (b.1, b.2, &a.0).cmp(&(a.1, a.2, &b.0)));
        all
    }

    /// Nanoseconds of processor time that one look stands for.
    fn look_ns(&self) -> u64 {
        let processors = self.vcpus.len().saturating_sub(1).max(1) as f64;
        let rest = (self.seconds * processors * 1e9) - self.took() as f64;
        (rest.max(0.0) / self.moments.all().max(1) as f64) as u64
    }

    /// The guest's own time as a flame graph: functions by who called them, and waiting.
    pub(super) fn guest_flame(&self) -> Flame {
        let mut root = Flame::default();
        let each = self.look_ns();
        for (stack, n) in &self.moments.stacks {
            let path: Vec<&str> = stack.iter().map(String::as_str).collect();
            root.add(&path, *n, n * each);
        }
        if self.moments.waits > 0 {
            root.add(&["(waiting)"], self.moments.waits, self.moments.waits * each);
        }
        root
    }

    /// What is worth looking at, in sentences.
    pub fn findings(&self) -> Vec<String> {
        let (count, took) = (self.count(), self.took());
        let mut out = Vec::new();
        for row in self.exits() {
            let (s, name) = (&row.stat, row.name());
            let by = row.functions.first().map_or("-", |f| f.0.as_str());
            let share = percent(s.count, count);
            let uart = s.site.register.is_some_and(|r| r.name == "LSR");
            if uart && s.count >= 200 && share >= 5.0 {
                out.push(format!(
                    "{share:.0} % of all exits read {name}, mostly from {by}: the guest polls its serial port for each character. Less output \
                     (kernel argument `quiet`) or an interrupt-driven console avoids most of them."
                ));
            } else if !s.is_write && s.count >= 1000 && share >= 15.0 && s.unassigned < s.count {
                out.push(format!(
                    "{share:.0} % of all exits read {name}, mostly from {by}: it is polled, {:.0} times a second.",
                    s.count as f64 / self.seconds
                ));
            }
            if let Some((at, rate, usual)) = storm(&s.bins, s.count) {
                out.push(format!(
                    "{name} has a storm of {} at {at:.2} s: {rate:.0} accesses a second, {usual:.0} otherwise; mostly from {by}.",
                    if s.is_write { "writes" } else { "reads" }
                ));
            }
            if s.split > 0 {
                out.push(format!(
                    "{} accesses to {name} were split: the guest's accesses of {} bytes became several calls of the device. Harmless, and slow.",
                    s.split, s.size
                ));
            }
            if let Some(r) =
                s.site.register.filter(|r| s.split == 0 && s.size > r.width && !s.site.name.contains("conf"))
            {
                out.push(format!(
                    "{name} is {} wide and was accessed with {} bytes: drivers do not do that.",
                    if r.width == 1 { "1 byte".into() } else { format!("{} bytes", r.width) },
                    s.size
                ));
            }
            if s.max > 10_000_000 && s.max != u32::MAX {
                out.push(format!(
                    "One access to {name} took {}: the host was busy, or the device's work is long.",
                    ns(u64::from(s.max))
                ));
            }
        }
        let missing: u64 = self.exits().map(|r| r.stat.unassigned).sum();
        if missing >= 16 {
            let mut places: Vec<(u64, u64, &str)> = Vec::new();
            for row in self.exits().filter(|r| r.stat.unassigned > 0 && r.stat.site.register.is_none()) {
                places.extend(row.cells.iter().map(|c| (c.1 + c.2, c.0, row.stat.site.space_label())));
            }
            places.sort_unstable_by_key(|p| (std::cmp::Reverse(p.0), p.1));
            places.dedup();
            let text: Vec<_> =
                places.iter().take(4).map(|(n, a, s)| format!("{s}:{a:#x} ({n} times)")).collect();
            out.push(format!(
                "{missing} accesses ({:.1} %) went where nobody is: probing for devices. Most often {}.",
                percent(missing, count),
                text.join(", ")
            ));
        }
        let refused: u64 = self.exits().map(|r| r.stat.failed - r.stat.unassigned).sum();
        if refused > 0 {
            out.push(format!("{refused} accesses reached a device that did not take them (wrong size, read-only, or nothing at the offset)."));
        }
        let busiest = self.exits().max_by_key(|r| r.stat.took);
        if let Some(row) = busiest.filter(|r| took > 0 && percent(r.stat.took, took) >= 50.0) {
            out.push(format!(
                "{:.0} % of the time in handlers is spent at {}.",
                percent(row.stat.took, took),
                row.name()
            ));
        }
        if out.is_empty() {
            out.push("Nothing stands out.".into());
        }
        out
    }

    /// The profile for a terminal.
    pub fn text(&self) -> String {
        let (count, took) = (self.count(), self.took());
        let mut t = String::new();
        let _ = writeln!(
            t,
            "{:.2} s, {} processors, {count} exits ({:.0}/s); {:.1} % of the time of one processor was spent in handlers",
            self.seconds,
            self.vcpus.len().saturating_sub(1),
            count as f64 / self.seconds,
            percent(took, (self.seconds * 1e9) as u64)
        );
        if let Some(s) = self.shares_text() {
            let _ = writeln!(t, "{s}");
        }
        if let Some(s) = &self.symbols {
            let _ = writeln!(t, "guest symbols: {s}");
        }
        let _ = writeln!(
            t,
            "\n{:>9} {:>8} {:>6} {:>7} {:>7} {:>7}  {:<28} {:<13} top guest function",
            "exits", "/s", "time%", "p50", "p99", "max", "device.register", "access"
        );
        for row in self.exits().take(ROWS) {
            let s = &row.stat;
            let by = row
                .functions
                .first()
                .map_or("-".to_string(), |f| format!("{} {:.0} %", f.0, percent(f.1, s.count)));
            let _ = writeln!(
                t,
                "{:>9} {:>8.0} {:>6.1} {:>7} {:>7} {:>7}  {:<28} {:<13} {by}",
                s.count,
                s.count as f64 / self.seconds,
                percent(s.took, took),
                ns(s.histogram.quantile(0.5)),
                ns(s.histogram.quantile(0.99)),
                ns(u64::from(s.max)),
                row.name(),
                row.access(),
            );
        }
        let more = self.exits().count().saturating_sub(ROWS);
        if more > 0 {
            let _ = writeln!(t, "{:>9} more registers", more);
        }
        if let Some(how) = self.stacks_text() {
            let _ = writeln!(t, "\n{:>7} {:>7}  guest code ({how})", "own%", "with%");
            for (name, own, with) in self.hottest().iter().filter(|h| h.1 > 0).take(ROWS / 2) {
                let all = self.moments.runs;
                let _ = writeln!(t, "{:>7.1} {:>7.1}  {name}", percent(*own, all), percent(*with, all));
            }
        }
        t.push_str("\nFINDINGS\n");
        for f in self.findings() {
            let _ = writeln!(t, "  * {f}");
        }
        t
    }

    pub(super) fn flame(&self) -> Flame {
        let mut root = Flame::default();
        for row in self.exits() {
            let name = row.name();
            let (device, register) = name.split_once('.').unwrap_or((name.as_str(), "-"));
            for (function, count, took) in &row.functions {
                root.add(&[function, row.stat.exit.as_str(), device, register], *count, *took);
            }
        }
        root
    }

    /// Folded stacks for other tools: `function;exit;device;register nanoseconds`, and the guest's own time as `[guest];outer;inner nanoseconds`
    /// and `[waiting] nanoseconds`.
    pub fn folded(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        for row in self.exits() {
            let name = row.name();
            let (device, register) = name.split_once('.').unwrap_or((name.as_str(), "-"));
            for (function, _, took) in &row.functions {
                let clean = |t: &str| t.replace([';', ' '], "_");
                let kind = row.stat.exit.as_str();
                lines.push(format!(
                    "{};{kind};{};{} {}",
                    clean(function),
                    clean(device),
                    clean(register),
                    (*took).max(1)
                ));
            }
        }
        let each = self.look_ns();
        for (stack, n) in &self.moments.stacks {
            let path: Vec<String> = stack.iter().map(|f| f.replace([';', ' '], "_")).collect();
            lines.push(format!("[guest];{} {}", path.join(";"), (n * each).max(1)));
        }
        if self.moments.waits > 0 {
            lines.push(format!("[waiting] {}", (self.moments.waits * each).max(1)));
        }
        lines.sort();
        lines.join("\n") + "\n"
    }

    /// A flame graph by time: guest function, exit, device, register.
    pub fn svg(&self) -> String {
        const WIDTH: f64 = 1200.0;
        const ROW: usize = 20;
        let root = self.flame();
        let height = root.depth() * ROW + 40;
        let mut body = String::new();
        let weight = |f: &Flame| f.took.max(f.count);
        #[allow(
            clippy::too_many_arguments,
            reason = "a recursion over one picture: its place, its scale, its output"
        )]
        fn draw(
            f: &Flame,
            name: &str,
            x: f64,
            w: f64,
            level: usize,
            bottom: usize,
            body: &mut String,
            weight: &dyn Fn(&Flame) -> u64,
        ) {
            if w < 0.4 {
                return;
            }
            let y = bottom - (level + 1) * 20;
            let hue = name.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b))) % 50
                + level as u32 * 40;
            let chars = (w / 7.0) as usize;
            let label = if name.chars().count() <= chars {
                name.to_string()
            } else if chars > 3 {
                name.chars().take(chars - 1).collect::<String>() + "\u{2026}"
            } else {
                String::new()
            };
            let _ = writeln!(
                body,
                "<g><title>{}: {} accesses, {}</title><rect x=\"{x:.1}\" y=\"{y}\" width=\"{w:.1}\" height=\"19\" rx=\"2\" fill=\"hsl({},65%,66%)\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{}</text></g>",
                escape(name),
                f.count,
                ns(f.took),
                hue % 360,
                x + 3.0,
                y + 14,
                escape(&label)
            );
            let all = f.children.values().map(weight).sum::<u64>().max(1);
            let mut at = x;
            for (n, c) in &f.children {
                let width = w * weight(c) as f64 / all as f64;
                draw(c, n, at, width, level + 1, bottom, body, weight);
                at += width;
            }
        }
        draw(&root, "all exits", 0.0, WIDTH, 0, height - 10, &mut body, &weight);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
             font-family=\"monospace\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"6\" y=\"18\" font-size=\"14\">Exits by time: guest function, exit, device, register</text>\n{body}</svg>\n"
        )
    }

    /// The kept accesses as a trace that chrome://tracing and Perfetto read.
    pub fn chrome(&self) -> String {
        let mut events: Vec<Value> = Vec::new();
        let others = self.vcpus.len().saturating_sub(1);
        for n in 0..self.vcpus.len() {
            let name = if n == others { "others (DMA)".to_string() } else { format!("vcpu{n}") };
            events
                .push(json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": n, "args": {"name": name}}));
        }
        for k in &self.accesses {
            let r = &k.record;
            let tid = match r.actor {
                Actor::Vcpu(n) => usize::from(n),
                _ => others,
            };
            let dir = if r.is_write { "write" } else { "read" };
            let begin = r.time.saturating_sub(u64::from(r.took));
            events.push(json!({
                "ph": "X", "name": format!("{}.{} {dir}", k.site.label(), k.site.register_name()), "cat": r.exit.as_str(),
                "ts": begin as f64 / 1e3, "dur": f64::from(r.took) / 1e3, "pid": 1, "tid": tid, "args": k.json(),
            }));
        }
        for (n, bins) in self.vcpus.iter().enumerate() {
            for (i, (count, _)) in bins.columns.iter().enumerate() {
                let ts = (i as u64 * bins.width) as f64 / 1e3;
                events.push(json!({"ph": "C", "name": format!("exits {n}"), "pid": 1, "ts": ts, "args": {"exits": count}}));
            }
        }
        json!({"displayTimeUnit": "ns", "traceEvents": events}).to_string()
    }

    /// In the form that a file's name asks for: .html, .svg, .folded, .json (Chrome trace), else text.
    pub fn for_file(&self, path: &std::path::Path) -> String {
        match path.extension().and_then(|e| e.to_str()) {
            Some("html" | "htm") => self.html(),
            Some("svg") => self.svg(),
            Some("folded") => self.folded(),
            Some("json") => self.chrome(),
            _ => self.text(),
        }
    }
}

/// A column with far more accesses than usual: when (seconds), its rate, and the rate outside of it.
fn storm(bins: &Bins, count: u64) -> Option<(f64, f64, f64)> {
    if bins.columns.len() < 10 || bins.width == 0 {
        return None;
    }
    let (at, most) = bins.columns.iter().enumerate().max_by_key(|(_, c)| c.0)?;
    let (width, most) = (bins.width as f64 / 1e9, f64::from(most.0));
    let rest = (count as f64 - most) / ((bins.columns.len() - 1) as f64 * width);
    let rate = most / width;
    (rate > 10_000.0 && rate > rest * 8.0 && most >= 1000.0).then_some((at as f64 * width, rate, rest))
}
