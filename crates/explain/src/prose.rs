//! Backtraces told in sentences, and numbers that contradict each other.

use crate::frame;
use crate::model::{Arg, Format, Frame, Report, Stack, StackKind};
use crate::names::{self, Role};

const ACTORS: &str = "kvm_cpu_exec|kvm_vcpu_thread_fn|qemu_kvm_cpu_thread_fn|qemu_thread_start|start_thread|clone|clone3|cpu_tb_exec|cpu_exec|mttcg_cpu_thread_fn|rr_cpu_thread_fn|tcg_cpus_exec|code_gen_buffer|main_loop_wait|qemu_main_loop|aio_poll|aio_bh_poll|handle_ioreq|cpu_ioreq_pio|main";

/// How far in a function stands: small is outside.
fn depth(name: &str) -> Option<u32> {
    Some(match name {
        "clone" | "clone3" | "start_thread" | "_start" => 0,
        "qemu_thread_start" | "main" => 1,
        _ if names::matches("*_cpu_thread_fn|kvm_vcpu_thread_fn|qemu_main_loop", name) => 2,
        _ if names::matches("kvm_cpu_exec|tcg_cpus_exec|cpu_exec|cpu_tb_exec|main_loop_wait", name) => 3,
        _ => match names::role(name) {
            Role::Entry => 4,
            Role::Space if name.starts_with("address_space_") => 5,
            Role::Space => 6,
            Role::Subpage => 7,
            Role::Dispatch if name.ends_with("_accessor") => 9,
            Role::Dispatch => 8,
            _ if matches!(name, "abort" | "raise" | "__assert_fail") => 20,
            _ => return None,
        },
    })
}

fn is_function(token: &str, called: bool) -> bool {
    if token.len() < 4
        || !token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        || token.bytes().next().is_some_and(|b| b.is_ascii_digit())
    {
        return false;
    }
    if names::role(token) != Role::Other || (token.contains('_') && names::matches(ACTORS, token)) {
        return token.contains('_');
    }
    if matches!(token, "abort" | "__assert_fail" | "raise") && called {
        return true;
    }
    let underscores = token.bytes().filter(|&b| b == b'_').count();
    underscores >= 1 && (called || underscores >= 2) && token.bytes().any(|b| b.is_ascii_lowercase())
}

struct Said {
    key: &'static str,
    value: u64,
    text: String,
}

/// Finds `address 0x12fbe`, `port=49170`, `size of 2`, `2 bytes`, `2-byte`.
fn numbers(sentence: &str) -> Vec<Said> {
    let mut out = Vec::new();
    let mut key: Option<(&'static str, usize)> = None;
    let words: Vec<&str> = sentence
        .split(|c: char| {
            c.is_whitespace()
                || matches!(c, '=' | ',' | ';' | '(' | ')' | '`' | '"' | ':' | '*' | '[' | ']' | '/')
        })
        .filter(|w| !w.is_empty())
        .collect();
    for (i, w) in words.iter().enumerate() {
        let lower = w.trim_end_matches(['.', '!', '?']).to_lowercase();
        let unit = words.get(i + 1).map(|n| n.to_lowercase()).unwrap_or_default();
        if let Some(n) = lower.strip_suffix("-byte").or_else(|| lower.strip_suffix("-bytes")) {
            let v = match n {
                "one" | "single" => Some(1),
                "two" => Some(2),
                "four" => Some(4),
                "eight" => Some(8),
                _ => frame::number(n),
            };
            if let Some(v) = v {
                out.push(Said { key: "said_size", value: v, text: lower.clone() });
            }
            continue;
        }
        key = match lower.as_str() {
            "port" | "ports" => Some(("said_port", i)),
            "address" | "addr" | "gpa" => Some(("said_addr", i)),
            "offset" | "register" => Some(("said_offset", i)),
            "size" | "len" | "length" => Some(("said_size", i)),
            "value" | "val" | "data" => Some(("said_value", i)),
            "count" => Some(("said_count", i)),
            "mask" | "shift" | "line" | "frame" | "frames" | "version" | "vector" | "queue" | "thread"
            | "step" => None,
            _ => key,
        };
        let hexish = lower.starts_with("0x");
        if !hexish && !lower.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Some(v) = frame::number(&lower) else { continue };
        if !hexish && unit.starts_with("byte") && v <= 64 {
            out.push(Said { key: "said_size", value: v, text: format!("{lower} bytes") });
            continue;
        }
        if let Some((k, at)) = key
            && i - at <= 4
        {
            out.push(Said { key: k, value: v, text: lower.clone() });
        }
    }
    out
}

/// A stack made of the functions that sentences name; none when they name too few.
pub(crate) fn stack(prose: &[String]) -> Option<Stack> {
    let mut frames: Vec<Frame> = Vec::new();
    let mut loose: Vec<Said> = Vec::new();
    for line in prose.iter().take(400) {
        for sentence in line.split(". ") {
            let mut here: Vec<usize> = Vec::new();
            let mut start = None;
            let bytes = sentence.as_bytes();
            for i in 0..=bytes.len() {
                let ident = bytes.get(i).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
                match (ident, start) {
                    (true, None) => start = Some(i),
                    (false, Some(s)) => {
                        start = None;
                        let Some(token) = sentence.get(s..i) else { continue };
                        let called = bytes.get(i) == Some(&b'(')
                            || bytes.get(i) == Some(&b'`')
                            || s > 0 && bytes[s - 1] == b'`';
                        if !is_function(token, called) || frames.len() > 500 {
                            continue;
                        }
                        if let Some(k) = frames.iter().position(|f| f.function == token) {
                            here.push(k);
                            continue;
                        }
                        // Arguments right behind the name: kvm_handle_io(port=49170, size=2).
                        let mut f = Frame { function: token.to_owned(), ..Frame::default() };
                        if bytes.get(i) == Some(&b'(')
                            && let Some(close) = sentence[i..].find(')')
                        {
                            f.args = frame::parse_args(&sentence[i + 1..i + close]);
                        }
                        here.push(frames.len());
                        frames.push(f);
                    }
                    _ => {}
                }
            }
            for said in numbers(sentence) {
                let target = here.iter().copied().find(|&k| {
                    matches!(names::role(&frames[k].function), Role::Entry | Role::Space | Role::Dispatch)
                });
                match target {
                    Some(k) => {
                        // Behind the dispatch an address is an offset in the region.
                        let inside = names::role(&frames[k].function) == Role::Dispatch;
                        let key = if inside && said.key == "said_addr" { "said_offset" } else { said.key };
                        add(&mut frames[k], &Said { key, ..said });
                    }
                    None => loose.push(said),
                }
            }
        }
    }
    let known = frames
        .iter()
        .filter(|f| names::role(&f.function) != Role::Other || names::matches(ACTORS, &f.function))
        .count();
    if frames.len() < 2 || known == 0 {
        return None;
    }
    // Which way the story is told.
    let ranks: Vec<u32> = frames.iter().filter_map(|f| depth(&f.function)).collect();
    let rising = ranks.windows(2).filter(|w| w[0] < w[1]).count();
    let falling = ranks.windows(2).filter(|w| w[0] > w[1]).count();
    if rising > falling {
        frames.reverse();
    }
    // Names told out of order are put in the order that the code gives them, as far as it does.
    let mut known: Vec<Frame> =
        frames.iter().filter(|f| depth(&f.function).is_some_and(|d| d < 20)).cloned().collect();
    known.sort_by_key(|f| std::cmp::Reverse(depth(&f.function).unwrap_or(0)));
    let mut rest: Vec<Frame> =
        frames.into_iter().filter(|f| depth(&f.function).is_none_or(|d| d >= 20)).collect();
    rest.sort_by_key(|f| std::cmp::Reverse(depth(&f.function).unwrap_or(0)));
    rest.extend(known);
    let mut frames = rest;
    if let Some(k) =
        frames.iter().rposition(|f| matches!(names::role(&f.function), Role::Entry | Role::Space))
    {
        for said in &loose {
            let key = if said.key == "said_port" { "said_addr" } else { said.key };
            if said.key != "said_offset" && frames[k].args.iter().all(|a| a.name != said.key && a.name != key)
            {
                add(&mut frames[k], said);
            }
        }
    }
    Some(Stack {
        kind: StackKind::Thread,
        thread: None,
        name: String::new(),
        format: Format::Prose,
        frames,
        dropped: 0,
        messages: Vec::new(),
        signalled: false,
    })
}

fn add(f: &mut Frame, said: &Said) {
    if f.args.len() < 16 {
        f.args.push(Arg {
            name: said.key.to_owned(),
            value: Some(said.value),
            entry: false,
            text: said.text.clone(),
        });
    }
}

/// Places where the text gives one thing as two different numbers.
pub(crate) fn disagreements(r: &Report) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut say = |s: String| {
        if out.len() < 8 && !out.contains(&s) {
            out.push(s);
        }
    };
    // "0x12fbe (49170)", "49170 (0x12fbe)", "0x12fbe = 49170".
    for line in &r.prose {
        let words: Vec<&str> = line
            .split(|c: char| c.is_whitespace() || matches!(c, '(' | ')' | ',' | ';' | '=' | '/'))
            .filter(|w| !w.is_empty())
            .collect();
        for w in words.windows(2) {
            let (a, b) = (w[0].trim_end_matches('.'), w[1].trim_end_matches('.'));
            let gap = line.find(w[0]).and_then(|p| line.get(p + w[0].len()..)).unwrap_or("");
            if !(gap.trim_start().starts_with(['(', '=', '/'])) {
                continue;
            }
            let (h, d) = if a.starts_with("0x") { (a, b) } else { (b, a) };
            if !h.starts_with("0x") || d.len() < 3 || !d.bytes().all(|c| c.is_ascii_digit()) {
                continue;
            }
            if let (Some(x), Some(y)) = (frame::number(h), frame::number(d))
                && x != y
            {
                say(format!(
                    "The text gives one number as {h} and as {d}, but {h} is {x} and {d} is {y:#x}."
                ));
            }
        }
    }
    // One address told in two ways.
    let mut addresses: Vec<Said> = Vec::new();
    for line in &r.prose {
        for sentence in line.split(". ") {
            addresses
                .extend(numbers(sentence).into_iter().filter(|s| matches!(s.key, "said_addr" | "said_port")));
        }
        if addresses.len() > 64 {
            break;
        }
    }
    let from_frames: Vec<(u64, String)> = r
        .stacks
        .iter()
        .filter(|s| s.format != Format::Prose)
        .flat_map(|s| s.frames.iter().take(200))
        .filter(|f| {
            names::matches(
                "kvm_handle_io|flatview_write|flatview_read|address_space_write|address_space_rw",
                &f.function,
            )
        })
        .filter_map(|f| f.num("port").or_else(|| f.num("addr")).map(|v| (v, f.function.clone())))
        .collect();
    let hex: Vec<&Said> = addresses.iter().filter(|s| s.text.starts_with("0x")).collect();
    let dec: Vec<u64> = addresses
        .iter()
        .filter(|s| !s.text.starts_with("0x") && s.value >= 0x100)
        .map(|s| s.value)
        .chain(from_frames.iter().map(|x| x.0))
        .collect();
    let port = r
        .stacks
        .iter()
        .any(|s| s.frames.iter().any(|f| f.function == "kvm_handle_io" || f.arg("said_port").is_some()));
    for h in hex {
        if let Some(&d) = dec.first() {
            let same_kind = h.value < 1 << 20 && d < 1 << 20;
            if same_kind && !dec.contains(&h.value) {
                let mut s = format!(
                    "The text gives the address as {:#x} ({}) and as {} ({:#x}): they differ.",
                    h.value, h.value, d, d
                );
                if port && h.value > 0xffff {
                    s.push_str(&format!(" {:#x} does not fit a 16-bit port at all.", h.value));
                }
                say(s);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORY: &str = "The backtrace shows a vCPU thread: kvm_vcpu_thread_fn calls kvm_cpu_exec, which handles the exit in kvm_handle_io with a size of 2 bytes. \
        From there address_space_rw and flatview_write perform a write to address 0x12FBE (49170), and memory_region_dispatch_write reaches the device.";

    #[test]
    fn a_story_becomes_a_stack() {
        let r = crate::reader::read(STORY.as_bytes()).expect("reads");
        let s = r.stacks.first().expect("a stack");
        assert_eq!(s.format, Format::Prose);
        let names: Vec<&str> = s.frames.iter().map(|f| f.function.as_str()).collect();
        assert_eq!(
            names,
            [
                "memory_region_dispatch_write",
                "flatview_write",
                "address_space_rw",
                "kvm_handle_io",
                "kvm_cpu_exec",
                "kvm_vcpu_thread_fn"
            ]
        );
    }

    #[test]
    fn numbers_that_contradict_each_other_are_named() {
        let r = crate::reader::read(STORY.as_bytes()).expect("reads");
        assert!(
            r.disagreements.iter().any(|d| d.contains("77758") && d.contains("0xc012")),
            "{:?}",
            r.disagreements
        );
        let fine = STORY.replace("0x12FBE", "0xC012");
        let r = crate::reader::read(fine.as_bytes()).expect("reads");
        assert_eq!(r.disagreements, Vec::<String>::new());
    }

    #[test]
    fn other_text_is_not_a_story() {
        for t in [
            "I like trains and the main_loop of life",
            "Dear list,\nplease find attached my patch for foo_bar_baz().\n",
            "",
        ] {
            assert!(crate::reader::read(t.as_bytes()).expect("reads").stacks.is_empty(), "{t}");
        }
    }
}
