//! The last accesses of a crash report's device as a Rust test that makes them anew, on the device alone.

use serde_json::{Map, Value};
use std::fmt::Write;

/// Bytes of a report that are read; one with guest memory is larger, and has what is needed at its start.
pub const MOST: u64 = 64 << 20;
/// Accesses that a test has at most.
const ACCESSES: usize = 4096;

fn number(m: &Map<String, Value>, name: &str) -> Option<u64> {
    m.get(name).and_then(Value::as_u64)
}

/// A word that can stand in Rust source: what is no letter or digit becomes `_`.
fn word(text: &str) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    text.chars().take(60).map(clean).collect()
}

/// A line of comment: a report is no source of code.
fn comment(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// The path of a constructor as our own reports give it: anything else is not put into source.
fn constructor(text: &str) -> Option<&str> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_:()[], &".contains(c);
    (text.starts_with("hyaline_devices::") && text.len() < 200 && text.chars().all(fits)).then_some(text)
}

/// The call of the bench for an access.
fn call(m: &Map<String, Value>) -> Option<String> {
    let (bank, offset, size) = (number(m, "bank")?, number(m, "offset")?, number(m, "size")?);
    let register = match m.get("register") {
        Some(Value::String(s)) => s.as_str(),
        Some(Value::Object(o)) => o.get("name").and_then(Value::as_str).unwrap_or("-"),
        _ => "-",
    };
    let value = number(m, "value");
    Some(match (m.get("dir").and_then(Value::as_str) == Some("write"), value) {
        (true, v) => format!(
            "bench.write({bank}, {offset:#x}, {size}, {:#x}); // {}",
            v.unwrap_or(0),
            comment(register)
        ),
        (false, Some(v)) => {
            format!("let _ = bench.read({bank}, {offset:#x}, {size}); // {}, gave {v:#x}", comment(register))
        }
        (false, None) => format!("let _ = bench.read({bank}, {offset:#x}, {size}); // {}", comment(register)),
    })
}

/// The test's text.
///
/// # Errors
/// No crash report of Hyaline, or one that has no device.
pub fn test(report: &str) -> Result<String, String> {
    let records: Vec<Map<String, Value>> = report
        .lines()
        .filter_map(|l| match serde_json::from_str(l) {
            Ok(Value::Object(m)) => Some(m),
            _ => None,
        })
        .collect();
    let head = records.first().filter(|m| m.contains_key("hyaline_crash_report"));
    let head =
        head.ok_or("this is no crash report of Hyaline: the first line has no hyaline_crash_report")?;
    let text =
        |m: &Map<String, Value>, name: &str| m.get(name).and_then(Value::as_str).unwrap_or("").to_string();
    let of = |kind: &str| {
        records
            .iter()
            .filter(move |m| m.get("type").and_then(Value::as_str) == Some(kind))
            .collect::<Vec<_>>()
    };
    let device = text(head, "device");
    if device.is_empty() {
        return Err(format!(
            "the report ({}) is about no device: there is nothing to replay on one alone",
            text(head, "cause")
        ));
    }
    let chips = of("chip");
    let chip = chips.first().ok_or("the report does not say which chip the device is; was it cut?")?;
    let make = text(chip, "replay");
    let make = constructor(&make)
        .ok_or_else(|| format!("the chip `{}` can't be made on a bench by itself", text(chip, "name")))?;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "//! The last accesses of {} before: {}",
        comment(&device),
        comment(&text(head, "message"))
    );
    let _ = writeln!(
        out,
        "//! Made by `hyaline explain --replay-test` from a crash report. Put it into crates/devices/tests/.\n"
    );
    let _ = writeln!(out, "use hyaline_device::Bench;\n");
    let _ = writeln!(out, "#[test]\nfn replay_{}_{}() {{", word(&device), word(&text(head, "cause")));
    let _ = writeln!(out, "    let mut bench = Bench::new({make});");
    let (recent, mut last, mut left_out) = (of("recent"), None, 0);
    let first = recent.len().saturating_sub(ACCESSES);
    if recent.len() >= 256 {
        let _ = writeln!(
            out,
            "    // The report holds the last {} accesses; what the guest did before is not known.",
            recent.len()
        );
    }
    for m in recent.iter().skip(first) {
        let Some(call) = call(m) else {
            left_out += 1;
            continue;
        };
        let time = number(m, "time_ns");
        if let (Some(before), Some(now)) = (last, time)
            && now > before
        {
            let _ = writeln!(out, "    bench.run({});", now - before);
        }
        last = time.or(last);
        let _ = writeln!(out, "    {call}");
    }
    if left_out > 0 {
        let _ = writeln!(out, "    // {left_out} accesses by DMA or without a bank are left out.");
    }
    if let Some(call) = of("access").first().and_then(|m| call(m)) {
        let _ = writeln!(out, "    // The access in hand:\n    {call}");
    }
    out.push_str("}\n");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = concat!(
        "{\"hyaline_crash_report\":1,\"cause\":\"device-panic\",\"device\":\"serial0\",\"message\":\"index out of bounds\"}\n",
        "{\"type\":\"chip\",\"name\":\"ns16550\",\"replay\":\"hyaline_devices::serial::Ns16550::new()\"}\n",
        "{\"type\":\"recent\",\"dir\":\"write\",\"bank\":0,\"offset\":3,\"size\":1,\"value\":131,\"register\":\"LCR\",\"time_ns\":100}\n",
        "{\"type\":\"recent\",\"dir\":\"read\",\"bank\":0,\"offset\":5,\"size\":1,\"value\":96,\"register\":\"LSR\",\"time_ns\":350}\n",
        "{\"type\":\"access\",\"dir\":\"write\",\"bank\":0,\"offset\":7,\"size\":1,\"value\":1,\"register\":{\"name\":\"SCR\"}}\n",
        "{\"type\":\"reg",
    );

    #[test]
    fn the_accesses_become_calls() {
        let t = test(REPORT).unwrap();
        for want in [
            "fn replay_serial0_device_panic()",
            "Bench::new(hyaline_devices::serial::Ns16550::new())",
            "bench.write(0, 0x3, 1, 0x83); // LCR\n    bench.run(250);\n    let _ = bench.read(0, 0x5, 1); // LSR, gave 0x60",
            "// The access in hand:\n    bench.write(0, 0x7, 1, 0x1); // SCR",
        ] {
            assert!(t.contains(want), "{want}\n{t}");
        }
    }

    #[test]
    fn what_is_no_report_is_refused() {
        assert!(test("").is_err() && test("#0 abort ()\n").is_err());
        let none = REPORT.replace("serial0", "");
        assert!(test(&none).unwrap_err().contains("about no device"));
        let evil = REPORT.replace("hyaline_devices::serial::Ns16550::new()", "std::process::exit(1); //");
        assert!(test(&evil).is_err(), "only constructors of our chips become source");
        let evil = REPORT.replace("out of bounds", "x\\nfn main() {}");
        assert!(!test(&evil).unwrap().contains("\nfn main"));
    }
}
