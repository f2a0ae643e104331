//! Prints a difference: where, what, and how to see it again.

use crate::Run;
use crate::compare::Way;
use crate::protocol::{Answer, Ask};
use crate::side::{Pair, Side};
use anyhow::{Result, bail};
use ciborium::Value;
use hyaline_x86::CpuState;
use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use std::collections::BTreeMap;

/// Instructions shown before the one.
const TRAIL: u64 = 12;
/// Most lines of differing values, and of differing memory.
const LINES: usize = 60;

/// A difference that was found.
pub(crate) struct Found<'a> {
    pub run: &'a Run,
    pub way: Way,
    /// The last equal checkpoint.
    pub base: u64,
    /// After so many instructions the states differ, and not one earlier.
    pub count: u64,
    pub names: [String; 2],
}

type Sections = Vec<(String, Vec<u8>)>;

fn sections(side: &mut Side) -> Result<Sections> {
    match side.ask(&Ask::Sections)? {
        Answer::Sections(s) => Ok(s),
        other => bail!("{other:?}"),
    }
}

fn processors(sections: &Sections) -> Vec<CpuState> {
    let of = |(name, data): &(String, Vec<u8>)| {
        name.strip_prefix("cpu")?.parse::<usize>().ok()?;
        ciborium::from_reader::<CpuState, _>(&data[..]).ok()
    };
    sections.iter().filter_map(of).collect()
}

/// Prints it. `go` brings both machines to a distance from the checkpoint.
pub(crate) fn print(
    found: &Found,
    pair: &mut Pair,
    go: &mut dyn FnMut(&mut Pair, u64) -> Result<()>,
) -> Result<()> {
    let distance = found.count - found.base;
    // What differs.
    go(pair, distance)?;
    let after = [sections(&mut pair.0[0])?, sections(&mut pair.0[1])?];
    let memory = memory(pair)?;
    // The last instructions, one by one, on the left.
    let mut trail = String::new();
    let from = distance.saturating_sub(TRAIL);
    go(pair, from)?;
    for n in from..distance {
        let before = processors(&sections(&mut pair.0[0])?);
        let mut lines: Vec<String> = Vec::new();
        for (cpu, state) in before.iter().enumerate() {
            lines.push(instruction(&mut pair.0[0], cpu, state)?);
        }
        pair.0[0].ask(&Ask::Run { to: found.base + n + 1, keep: false })?;
        let now = processors(&sections(&mut pair.0[0])?);
        let ran = before.iter().zip(&now).position(|(a, b)| a.icount != b.icount);
        let line = match ran {
            Some(cpu) => lines.swap_remove(cpu),
            None => "no processor executed an instruction".into(),
        };
        trail += &format!("{:>14}  {line}\n", found.base + n + 1);
    }
    println!(
        "\nequal after {} instructions, different after {}: the last instruction below\n{trail}",
        found.count - 1,
        found.count
    );
    println!("(a translated unit shows its difference where it ends)");
    println!("{:<34} {:<26} {}", "value", found.names[0], found.names[1]);
    let mut lines = Vec::new();
    let right: BTreeMap<&str, &Vec<u8>> = after[1].iter().map(|(n, d)| (n.as_str(), d)).collect();
    for (name, data) in &after[0] {
        let other = right.get(name.as_str());
        if other.is_none_or(|o| *o != data) {
            let value = |d: &[u8]| ciborium::from_reader::<Value, _>(d).unwrap_or(Value::Null);
            differences(name, &value(data), &other.map_or(Value::Null, |d| value(&d[..])), &mut lines);
        }
    }
    lines.extend(memory);
    let more = lines.len().saturating_sub(LINES);
    for line in lines.iter().take(LINES) {
        println!("{line}");
    }
    if more > 0 {
        println!("… and {more} lines more");
    }
    let text = |run: &Run, machine: &str| {
        let mut options = format!("--left {} --right {}", run.left, run.right);
        if let Some(plant) = run.plant {
            options += &format!(" --plant {},{}", plant.count, plant.register);
        }
        format!("cargo run --release -p hyaline-lockstep -- {options}{machine}")
    };
    let machine: Vec<String> = found.run.machine.iter().map(|a| quote(&a.to_string_lossy())).collect();
    let machine = machine.join(" ");
    println!("\nto see it again:");
    let bounds = format!(" --every {} --instructions {} -- {machine}", found.run.every, found.count);
    println!("  {}", text(found.run, &bounds));
    if let Some(path) = &found.run.save {
        go(pair, distance - 1)?;
        pair.0[0].ask(&Ask::Save(path.clone()))?;
        let bounds =
            format!(" --every 1 --instructions {} -- {machine} -restore {}", found.count, quote(path));
        println!("or from the last equal state (code is interpreted first: try --right jit,threshold=0):");
        println!("  {}", text(found.run, &bounds));
    }
    if found.way == Way::Anew {
        println!("(the bisection had to start from power-on each time)");
    }
    Ok(())
}

fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// A processor's next instruction in a line.
fn instruction(side: &mut Side, cpu: usize, state: &CpuState) -> Result<String> {
    let Answer::Code(bits, bytes) = side.ask(&Ask::Code(cpu))? else { bail!("no code") };
    let mut decoder = Decoder::with_ip(bits, &bytes, state.rip, DecoderOptions::NONE);
    let i = decoder.decode();
    let mut text = String::new();
    GasFormatter::new().format(&i, &mut text);
    let shown = bytes.get(..i.len()).unwrap_or(&bytes);
    let hex = shown.iter().fold(String::new(), |t, b| t + &format!("{b:02x}"));
    let level = state.seg[2].attr >> 5 & 3;
    let place = format!("cpu{cpu} {:04x}:{:016x}", state.seg[1].selector, state.rip);
    Ok(format!("{place} {bits}-bit, level {level}  {hex:<22} {text}"))
}

/// Lines for memory that differs: 8 bytes each.
fn memory(pair: &mut Pair) -> Result<Vec<String>> {
    let mut pages: BTreeMap<(usize, u64), [Option<u64>; 2]> = BTreeMap::new();
    for (i, side) in pair.0.iter_mut().enumerate() {
        let Answer::Changed(changed) = side.ask(&Ask::Changed)? else { bail!("no pages") };
        for (block, page, hash) in changed {
            pages.entry((block, page)).or_default()[i] = Some(hash);
        }
    }
    let mut lines = Vec::new();
    for ((block, page), hashes) in pages {
        if hashes[0] == hashes[1] {
            continue;
        }
        let mut data = Vec::new();
        for side in &mut pair.0 {
            let Answer::Bytes(bytes) = side.ask(&Ask::Page(block, page))? else { bail!("no page") };
            data.push(bytes);
        }
        let name = if block == 0 { "memory" } else { "ROM" };
        for (i, (a, b)) in data[0].as_chunks::<8>().0.iter().zip(data[1].as_chunks::<8>().0).enumerate() {
            if a != b {
                let (a, b) = (u64::from_le_bytes(*a), u64::from_le_bytes(*b));
                let place = format!("{name} {:#x}", page * 4096 + i as u64 * 8);
                lines.push(format!("{place:<34} {:<26} {b:#018x}", format!("{a:#018x}")));
            }
        }
    }
    Ok(lines)
}

/// Lines for values that differ, by their names.
fn differences(path: &str, a: &Value, b: &Value, lines: &mut Vec<String>) {
    if a == b {
        return;
    }
    match (a, b) {
        (Value::Map(x), Value::Map(y)) if x.len() == y.len() => {
            for ((k, v), (_, w)) in x.iter().zip(y) {
                differences(&format!("{path}.{}", show(k).trim_matches('"')), v, w, lines);
            }
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            for (i, (v, w)) in x.iter().zip(y).enumerate() {
                differences(&format!("{path}[{i}]"), v, w, lines);
            }
        }
        _ => lines.push(format!("{path:<34} {:<26} {}", show(a), show(b))),
    }
}

fn show(v: &Value) -> String {
    match v {
        Value::Integer(i) => {
            let n = i128::from(*i);
            if n > 9 { format!("{n:#x}") } else { n.to_string() }
        }
        Value::Text(t) => t.clone(),
        Value::Null => "(none)".into(),
        other => format!("{other:?}"),
    }
}
