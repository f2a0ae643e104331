//! `hyaline top`: a running machine's exits, live, on its control socket.

use crate::ctl::Client;
use crate::{complain, print};
use ratatui::crossterm::event::{self, Event, KeyCode};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Paragraph, Row, Table};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ffi::OsString;
use std::time::Duration;

const HELP: &str = "\
usage: hyaline top SOCKET [--once] [--interval SECONDS]

Shows a running machine: exits per second by register, processors, interrupt lines that are high, and the guest functions that make most
accesses. The machine was started with -control unix:SOCKET.
  --once        measure one interval, print it as text, and end
  --interval    seconds between two measurements (default 1)
Keys: q ends.
";

/// Rates between two measurements.
#[derive(Debug, Default, PartialEq)]
struct View {
    total: f64,
    time: f64,
    /// Name, accesses per second, writes in percent, mean nanoseconds (0: not measured).
    registers: Vec<(String, f64, f64, f64)>,
    functions: Vec<(String, f64)>,
    vcpus: Vec<String>,
    high: Vec<String>,
}

fn number(v: &Value, name: &str) -> f64 {
    v[name].as_u64().unwrap_or(0) as f64
}

fn view(before: &Value, now: &Value) -> View {
    let seconds = ((number(now, "host_ns") - number(before, "host_ns")) / 1e9).max(1e-3);
    let list = |v: &Value, name: &str| v[name].as_array().cloned().unwrap_or_default();
    let key = |r: &Value| {
        let (region, register) = (r["region"].as_str().unwrap_or("?"), r["register"].as_str().unwrap_or("-"));
        if register == "-" {
            format!("{region} ({})", r["space"].as_str().unwrap_or("?"))
        } else {
            format!("{region} {register}")
        }
    };
    let mut old: HashMap<String, (f64, f64, f64)> = HashMap::new();
    for r in list(before, "registers") {
        let o = old.entry(key(&r)).or_default();
        *o = (o.0 + number(&r, "reads"), o.1 + number(&r, "writes"), o.2 + number(&r, "took_ns"));
    }
    let mut new: HashMap<String, (f64, f64, f64)> = HashMap::new();
    for r in list(now, "registers") {
        let o = new.entry(key(&r)).or_default();
        *o = (o.0 + number(&r, "reads"), o.1 + number(&r, "writes"), o.2 + number(&r, "took_ns"));
    }
    let mut registers: Vec<_> = new
        .into_iter()
        .filter_map(|(name, n)| {
            let o = old.get(&name).copied().unwrap_or_default();
            let (reads, writes, took) = (n.0 - o.0, n.1 - o.1, n.2 - o.2);
            let all = reads + writes;
            (all > 0.0).then(|| (name, all / seconds, writes * 100.0 / all, took / all))
        })
        .collect();
    registers.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let was: HashMap<String, f64> = list(before, "functions")
        .iter()
        .map(|f| (f["name"].as_str().unwrap_or("?").to_string(), number(f, "count")))
        .collect();
    let mut functions: Vec<_> = list(now, "functions")
        .iter()
        .map(|f| {
            let name = f["name"].as_str().unwrap_or("?").to_string();
            let rate = (number(f, "count") - was.get(&name).copied().unwrap_or(0.0)) / seconds;
            (name, rate)
        })
        .filter(|(_, rate)| *rate > 0.0)
        .collect();
    functions.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let old_cpus = list(before, "vcpus");
    let vcpus = list(now, "vcpus")
        .iter()
        .enumerate()
        .map(|(i, c)| {
            let rate =
                (number(c, "accesses") - old_cpus.get(i).map_or(0.0, |o| number(o, "accesses"))) / seconds;
            let place = c["last_function"]
                .as_str()
                .map(str::to_string)
                .or_else(|| c["last_rip"].as_u64().map(|r| format!("{r:#x}")))
                .unwrap_or_else(|| "no access yet".into());
            let state = c["state"].as_str().unwrap_or("does not answer");
            let at = c["at"].as_str().map_or(String::new(), |a| format!(" at {a}"));
            format!(
                "processor {i}: {state}{at}; {rate:.0} exits/s, the last at {place}, {:.3} s ago",
                number(c, "last_access_ns_ago") / 1e9
            )
        })
        .collect();
    View {
        total: (number(now, "accesses") - number(before, "accesses")) / seconds,
        time: number(now, "time_ns") / 1e9,
        registers,
        functions,
        vcpus,
        high: list(now, "lines_high").iter().filter_map(|l| Some(l.as_str()?.to_string())).collect(),
    }
}

fn mean(ns: f64) -> String {
    if ns > 0.0 { format!("{ns:.0}ns") } else { "-".into() }
}

impl View {
    fn text(&self) -> String {
        let mut t = format!("{:.3} s of guest time, {:.0} exits/s\n", self.time, self.total);
        for v in &self.vcpus {
            t += &format!("{v}\n");
        }
        t += &format!(
            "interrupt lines that are high: {}\n",
            if self.high.is_empty() { "none".into() } else { self.high.join(" ") }
        );
        t += &format!("\n{:>10} {:>7} {:>8}  register\n", "exits/s", "writes", "mean");
        for (name, rate, writes, took) in self.registers.iter().take(30) {
            t += &format!("{rate:>10.0} {writes:>6.0}% {:>8}  {name}\n", mean(*took));
        }
        t += &format!("\n{:>10}  guest function\n", "exits/s");
        for (name, rate) in self.functions.iter().take(15) {
            t += &format!("{rate:>10.0}  {name}\n");
        }
        t
    }

    fn draw(&self, frame: &mut ratatui::Frame<'_>, title: &str) {
        let head = self.vcpus.len() as u16 + 3;
        let [top, body] =
            Layout::vertical([Constraint::Length(head), Constraint::Min(3)]).areas(frame.area());
        let [left, right] =
            Layout::horizontal([Constraint::Percentage(60), Constraint::Percentage(40)]).areas(body);
        let mut lines: Vec<Line<'_>> = self.vcpus.iter().map(|v| Line::from(v.as_str())).collect();
        lines.push(Line::from(format!(
            "lines high: {}",
            if self.high.is_empty() { "none".into() } else { self.high.join(" ") }
        )));
        let block = Block::bordered()
            .title(format!(" {title}  {:.1} s  {:.0} exits/s  (q ends) ", self.time, self.total));
        frame.render_widget(Paragraph::new(lines).block(block), top);
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let rows = self.registers.iter().map(|(name, rate, writes, took)| {
            Row::new([format!("{rate:.0}"), format!("{writes:.0} %"), mean(*took), name.clone()])
        });
        let widths =
            [Constraint::Length(9), Constraint::Length(7), Constraint::Length(9), Constraint::Min(10)];
        let table = Table::new(rows, widths)
            .header(Row::new(["exits/s", "writes", "mean", "register"]).style(bold))
            .block(Block::bordered().title(" registers "));
        frame.render_widget(table, left);
        let rows = self.functions.iter().map(|(name, rate)| Row::new([format!("{rate:.0}"), name.clone()]));
        let table = Table::new(rows, [Constraint::Length(9), Constraint::Min(10)])
            .header(Row::new(["exits/s", "guest function"]).style(bold))
            .block(Block::bordered().title(" guest "));
        frame.render_widget(table, right);
    }
}

/// `hyaline top …`.
pub(crate) fn command(args: Vec<OsString>) -> i32 {
    let (mut socket, mut once, mut interval) = (None, false, 1.0);
    let mut args = args.into_iter().map(|a| a.to_string_lossy().into_owned());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--help" | "-help" | "-h" => {
                print(HELP);
                return 0;
            }
            "--once" => once = true,
            "--interval" => {
                match args.next().and_then(|v| v.parse::<f64>().ok()).filter(|v| (0.05..=3600.0).contains(v))
                {
                    Some(v) => interval = v,
                    None => return complain(&"top: --interval wants a number of seconds, 0.05 to 3600"),
                }
            }
            a if !a.starts_with('-') && socket.is_none() => {
                socket = Some(a.strip_prefix("unix:").unwrap_or(a).to_string())
            }
            a => return complain(&format!("top: `{a}` is not understood; see hyaline top --help")),
        }
    }
    let Some(socket) = socket else {
        print(HELP);
        return 1;
    };
    match run(&socket, once, Duration::from_secs_f64(interval)) {
        Ok(()) => 0,
        Err(e) => complain(&e),
    }
}

fn run(socket: &str, once: bool, interval: Duration) -> Result<(), String> {
    let mut client = Client::connect("top", socket)?;
    let hello = client.ask(&json!({"ask": "hello"}))?;
    let title = format!(
        "hyaline top, {} {}",
        hello["accelerator"].as_str().unwrap_or("?"),
        hello["name"].as_str().unwrap_or("")
    );
    let mut before = client.ask(&json!({"ask": "stats"}))?;
    if once {
        std::thread::sleep(interval);
        print(&view(&before, &client.ask(&json!({"ask": "stats"}))?).text());
        return Ok(());
    }
    let failed = |e: std::io::Error| format!("top: the terminal can't be used: {e}; --once prints text");
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let result = loop {
        let now = match client.ask(&json!({"ask": "stats"})) {
            Ok(now) => now,
            Err(e) => break Err(e),
        };
        let shown = view(&before, &now);
        if let Err(e) = terminal.draw(|frame| shown.draw(frame, &title)) {
            break Err(failed(e));
        }
        before = now;
        match event::poll(interval) {
            Ok(true) => match event::read() {
                Ok(Event::Key(k)) if matches!(k.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc) => {
                    break Ok(());
                }
                Ok(_) => {}
                Err(e) => break Err(failed(e)),
            },
            Ok(false) => {}
            Err(e) => break Err(failed(e)),
        }
    };
    ratatui::restore();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(ns: u64, reads: u64, calls: u64) -> Value {
        json!({
            "time_ns": ns, "host_ns": ns, "accesses": reads, "lines_high": ["isa.irq4"],
            "vcpus": [{"accesses": reads, "state": "waits", "at": "native_safe_halt+0xb", "last_function": "io_serial_in+0x14", "last_access_ns_ago": 1_000_000}],
            "registers": [{"region": "serial0.ports", "register": "LSR", "space": "io", "reads": reads, "writes": 0, "took_ns": reads * 80}],
            "functions": [{"name": "io_serial_in", "count": calls}],
        })
    }

    #[test]
    fn rates_are_differences() {
        let v = view(&stats(1_000_000_000, 100, 10), &stats(3_000_000_000, 300, 30));
        assert_eq!(v.registers, [("serial0.ports LSR".to_string(), 100.0, 0.0, 80.0)]);
        assert_eq!(v.functions, [("io_serial_in".to_string(), 10.0)]);
        assert!(v.text().contains("serial0.ports LSR") && v.text().contains("isa.irq4"));
        assert!(v.text().contains(
            "processor 0: waits at native_safe_halt+0xb; 100 exits/s, the last at io_serial_in+0x14"
        ));
        assert_eq!(view(&json!(null), &json!("x")).registers, [], "answers of another kind do no harm");
    }

    #[test]
    fn it_is_drawn() {
        let v = view(&stats(1_000_000_000, 100, 10), &stats(3_000_000_000, 300, 30));
        let mut terminal = ratatui::Terminal::new(ratatui::backend::TestBackend::new(100, 20)).unwrap();
        terminal.draw(|f| v.draw(f, "test")).unwrap();
        let text = terminal.backend().to_string();
        for want in ["registers", "serial0.ports LSR", "io_serial_in", "100 exits/s", "isa.irq4"] {
            assert!(text.contains(want), "{want}\n{text}");
        }
    }
}
