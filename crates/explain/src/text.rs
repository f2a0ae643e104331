//! The explanation as text.

use std::fmt::Write as _;

use crate::explanation::{AccessOut, Explanation, both, bytes};
use crate::rules::{Kind, Sure};

/// How much to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// A few lines.
    Brief,
    /// The usual.
    Normal,
    /// With what each layer does.
    Teach,
}

fn refs(numbers: &[u32]) -> String {
    if numbers.is_empty() {
        return String::new();
    }
    numbers.iter().take(6).map(|n| format!("#{n}")).collect::<Vec<_>>().join(",")
}

/// Breaks a paragraph at 100 columns with an indent.
fn wrap(out: &mut String, first: &str, rest: &str, text: &str) {
    let mut line = first.to_owned();
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > 100 {
            let _ = writeln!(out, "{}", line.trim_end());
            line = rest.to_owned();
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    let _ = writeln!(out, "{}", line.trim_end());
}

fn capital(s: &str) -> String {
    let mut c = s.chars();
    match c.next() {
        // "vCPU" keeps its v.
        Some('v') if c.as_str().starts_with("CPU") => s.to_owned(),
        Some(f) => f.to_uppercase().collect::<String>() + c.as_str(),
        None => String::new(),
    }
}

fn actor_words(e: &Explanation) -> String {
    let accel = match e.actor.accel.as_deref() {
        Some("kvm") => "KVM",
        Some("tcg") => "the software CPU (TCG)",
        Some("xen") => "Xen",
        Some("qtest") => "no CPU: a test harness",
        Some(a) => a,
        None => "",
    };
    let thread = match e.actor.thread.as_str() {
        "vcpu" => "vCPU thread",
        "main" => "main loop thread",
        "iothread" => "I/O thread",
        "worker" => "worker thread",
        "harness" => "test harness in the main thread",
        "debugger" => "gdb stub",
        "monitor" => "monitor command",
        "coroutine" => "coroutine",
        "migration" => "migration thread",
        "rcu" => "RCU thread",
        "display" => "display thread",
        _ => "thread of unknown kind",
    };
    if accel.is_empty() {
        thread.to_owned()
    } else if e.actor.accel_from_other_thread {
        format!("{thread} (the machine runs on {accel})")
    } else if e.actor.accel.as_deref() == Some("qtest") {
        format!("{thread} (no virtual CPU runs)")
    } else {
        format!("{thread} under {accel}")
    }
}

fn ended(e: &Explanation) -> String {
    let f = if e.end.function.is_empty() { String::new() } else { format!(" in {}", e.end.function) };
    match e.end.kind {
        "assert" => match &e.end.assertion {
            Some(a) => format!("ended in a failed assertion{f}: {a}"),
            None => format!("ended in a failed assertion{f}"),
        },
        "abort" => format!("ended in abort(){}", f.replace(" in ", " called from ")),
        "sanitizer" => format!(
            "stopped by a sanitizer ({}){f}",
            e.end.sanitizer.as_deref().unwrap_or("undefined behaviour")
        ),
        "leak" => format!("a leak; the memory was obtained{f}"),
        "libc-check" => format!("ended by a check of the C library{f}"),
        "hang" => format!("stands still{f}"),
        "unknown" | "stopped"
            if e.input.missing_first > 0
                && crate::names::role(&e.end.function) != crate::names::Role::Other =>
        {
            format!("how it ended is not told: the first {} frames are missing", e.input.missing_first)
        }
        "unknown" | "stopped" => format!(
            "how it ended is not told; the innermost function is{}",
            if f.is_empty() { " unnamed".into() } else { f.replace(" in", "") }
        ),
        "panic" => format!("ended in a panic{f}"),
        s => format!("ended by {s}{f}"),
    }
}

fn access_sentence(a: &AccessOut, e: &Explanation) -> String {
    let who = match a.initiator {
        "guest" => match (a.space, a.dir) {
            (Some("pio"), Some("write")) => "The guest executed OUT:",
            (Some("pio"), Some("read")) => "The guest executed IN:",
            (_, Some("write")) => "The guest wrote",
            (_, Some("read")) => "The guest read",
            _ => "The guest accessed",
        },
        "harness" => match a.dir {
            Some("write") => "A test harness wrote",
            Some("read") => "A test harness read",
            _ => "A test harness accessed",
        },
        "device" => match a.dir {
            Some("write") => "While handling this, a device wrote",
            Some("read") => "While handling this, a device read",
            _ => "While handling this, a device accessed",
        },
        "debugger" => "The debugger or monitor accessed",
        "rom" => "ROM loading at reset wrote",
        _ => match a.dir {
            Some("write") => "There was a write of",
            Some("read") => "There was a read of",
            _ => "There was an access to",
        },
    };
    let who = if a.depth == 0 && a.initiator == "device" {
        who.replace("While handling this, a", "A")
    } else {
        who.to_owned()
    };
    let mut s = format!("{who} {}", a.size.map_or("some bytes".into(), bytes));
    let prep = match a.dir {
        Some("read") => "from",
        Some("write") => "to",
        _ => "at",
    };
    match (a.addr, a.space) {
        (Some(v), Some("pio")) => {
            let _ = write!(s, " {prep} port {}", both(v));
        }
        (Some(v), _) => {
            let kind = if a.addr_kind == Some("gva") { "guest-virtual" } else { "guest-physical" };
            let _ = write!(s, " {prep} {kind} address {}", both(v));
        }
        (None, Some("pio")) => {
            let _ = write!(s, " {prep} an I/O port (the frames don't give its number)");
        }
        (None, _) => {
            let _ = write!(s, " {prep} an address that the frames don't give");
        }
    }
    match a.count {
        Some(1) => s.push_str(", once (not string I/O)"),
        Some(n) => {
            let _ = write!(s, ", {n} times (string I/O)");
        }
        None => {}
    }
    let _ = e;
    s.push('.');
    s
}

fn device_sentence(a: &AccessOut) -> Option<String> {
    let title = a.device_title.as_ref()?;
    let kind = a.device_kind.as_ref().map_or(String::new(), |k| format!(" ({k})"));
    let mut s = match &a.register {
        Some(r) => {
            let within = if r.within > 0 { format!(", {} into it,", bytes(r.within)) } else { String::new() };
            format!(
                "It reached register {:#x} \"{}\" ({}){within} of {} {title}{kind}",
                r.offset,
                r.title,
                r.name,
                article(title)
            )
        }
        None => match a.offset {
            Some(o) => format!("It reached offset {} of {} {title}{kind}", both(o), article(title)),
            None => {
                format!("It reached {} {title}{kind}; the frames don't give the register", article(title))
            }
        },
    };
    if let (Some(b), Some(addr), Some(o)) = (a.region_base, a.addr, a.offset) {
        let _ = write!(s, ", whose region starts at {b:#x} (computed: {addr} - {o})");
    }
    s.push('.');
    Some(s)
}

fn article(title: &str) -> &'static str {
    if title.starts_with(['A', 'E', 'I', 'O', 'a', 'e', 'i', 'o']) { "an" } else { "a" }
}

fn path(out: &mut String, e: &Explanation) {
    let mut depth = 0;
    let mut line = |out: &mut String, text: String, refs: String| {
        let lead = if depth == 0 { "  ".to_owned() } else { format!("  {}└ ", "  ".repeat(depth - 1)) };
        let left = format!("{lead}{text}");
        if refs.is_empty() {
            let _ = writeln!(out, "{left}");
        } else {
            let pad = 78usize.saturating_sub(left.chars().count()).max(2);
            let _ = writeln!(out, "{left}{}{refs}", " ".repeat(pad));
        }
        depth += 1;
    };
    line(out, actor_words(e), refs(&e.actor.evidence));
    for a in &e.accesses {
        let dir = a.dir.unwrap_or("access");
        let size = a.size.map_or("?".into(), |n| n.to_string());
        let how = match (e.actor.accel.as_deref(), a.space, a.initiator) {
            (_, _, "device") => format!("DMA by the device: {dir} size={size}"),
            (Some("kvm"), Some("pio"), _) => {
                format!("KVM exit: PIO {}", if dir == "write" { "out" } else { "in" })
            }
            (Some("kvm"), _, _) => format!("KVM exit: MMIO {dir}"),
            (Some("tcg"), Some("pio"), _) => {
                format!("port instruction: {}", if dir == "write" { "out" } else { "in" })
            }
            (Some("tcg"), _, _) => {
                format!("slow path of a {}", if dir == "write" { "store" } else { "load" })
            }
            _ => format!("{dir} by {}", a.initiator),
        };
        let mut how = how;
        if let Some(v) = a.addr {
            let _ = write!(
                how,
                " {}={v:#x}",
                if a.space == Some("pio") { "port" } else { a.addr_kind.unwrap_or("addr") }
            );
        }
        if a.initiator != "device" {
            let _ = write!(how, " size={size}");
        }
        if let Some(n) = a.count {
            let _ = write!(how, " n={n}");
        }
        line(out, how, refs(a.evidence_of.get("size").map_or(&[][..], |v| v)));
        let space = match a.space {
            Some("pio") => "address space \"I/O\"",
            Some(_) => "address space \"memory\"",
            None => "address space not told",
        };
        line(out, space.into(), refs(a.evidence_of.get("space").map_or(&[][..], |v| v)));
        match (a.region_base, a.offset) {
            (Some(b), Some(o)) => line(
                out,
                format!("flat view, region base {b:#x}, +{o:#x}  in bounds: yes"),
                refs(a.evidence_of.get("region_base").map_or(&[][..], |v| v)),
            ),
            (None, Some(o)) => line(out, format!("flat view, region base not told, +{o:#x}"), String::new()),
            _ => line(out, "flat view; base and offset not told".into(), String::new()),
        }
        if let Some(r) = &a.region {
            line(out, format!("region '{r}' by info mtree"), String::new());
        }
        match (a.size, a.handler_size, a.split) {
            (Some(s), Some(h), Some(true)) => {
                line(out, format!("size adjust: {s} -> {}x{h}", s.div_ceil(h)), String::new())
            }
            (Some(s), Some(h), _) if h > s => {
                line(out, format!("size adjust: {s} -> {h} (widened)"), String::new())
            }
            (Some(s), Some(h), _) => line(
                out,
                format!("size adjust: {s} -> {h}, no split"),
                refs(a.evidence_of.get("handler_size").map_or(&[][..], |v| v)),
            ),
            _ => {}
        }
        match (&a.handler, &a.device, &a.register) {
            (Some(h), Some(d), Some(r)) => line(
                out,
                format!("{h}: {d}, +{:#x} {}", r.offset, r.title),
                refs(a.evidence_of.get("device").map_or(&[][..], |v| v)),
            ),
            (Some(h), Some(d), None) => {
                line(out, format!("{h}: {d}"), refs(a.evidence_of.get("device").map_or(&[][..], |v| v)))
            }
            _ => line(out, "device: no frame".into(), String::new()),
        }
        if a.repeats > 1 {
            line(out, format!("... and the same again, {} times on this stack", a.repeats), String::new());
        }
    }
}

/// Renders.
pub fn render(e: &Explanation, detail: Detail) -> String {
    let mut out = String::new();
    if e.verdict == "not-a-trace" {
        out.push_str(
            "This is not a backtrace of QEMU, of another VMM or of Hyaline, as far as I can tell.\n",
        );
        for c in &e.cannot_tell {
            wrap(&mut out, "  ", "  ", c);
        }
        out.push_str("\nWhat I read: gdb `bt`, `bt full` and `thread apply all bt`, sanitizer reports, systemd-coredump,\nglibc backtraces, lldb, macOS and Valgrind stacks, Hyaline's crash reports, and sentences that name the\nfunctions. Include the lines before the backtrace: they say how it ended.\n");
        return out;
    }
    // Head.
    if !e.report.is_empty() {
        // In brief: the head and what happened.
        let sections = if detail == Detail::Brief { 2 } else { usize::MAX };
        let mut seen = 0;
        for r in &e.report {
            seen += usize::from(r.is_empty());
            if seen >= sections {
                break;
            }
            let _ = writeln!(out, "{r}");
        }
        return out;
    }
    let d = &e.input.dated;
    let age = match (&d.stated, &d.min, &d.max) {
        (Some(s), ..) => format!("QEMU {s} (by the text)"),
        (_, Some(a), Some(b)) if a == b => format!("QEMU {a}-era trace"),
        (_, Some(a), Some(b)) => format!("QEMU {a} to {b} trace"),
        (_, Some(a), None) => format!("QEMU {a}-era trace or later"),
        (_, None, Some(b)) => format!("QEMU trace, {b} or before"),
        _ => "trace of a VMM, version not told".into(),
    };
    let threads =
        if e.input.threads == 1 { "1 thread".into() } else { format!("{} stacks", e.input.threads) };
    wrap(
        &mut out,
        "",
        "",
        &format!("{age}, {} frames, {threads}. {}; {}.", e.input.frames, capital(&actor_words(e)), ended(e)),
    );
    if e.input.threads > 1 {
        let t =
            e.input.thread.map_or_else(|| format!("stack {}", e.input.chosen + 1), |t| format!("thread {t}"));
        wrap(&mut out, "", "", &format!("Explained: {t}, because: {}.", e.input.chosen_because));
    }
    for l in &e.input.limits {
        wrap(&mut out, "", "", &format!("Note: {l}."));
    }
    // What happened.
    out.push_str("\nWHAT HAPPENED\n");
    let mark = |names: &[&str], a: &AccessOut| {
        let sure = names.iter().all(|n| a.certain.contains(n));
        let mut numbers: Vec<u32> =
            names.iter().filter_map(|n| a.evidence_of.get(*n)).flatten().copied().collect();
        numbers.sort_unstable();
        numbers.dedup();
        let word = if sure { "certain" } else { "likely" };
        if numbers.is_empty() { format!(" [{word}]") } else { format!(" [{word}: {}]", refs(&numbers)) }
    };
    for a in &e.accesses {
        let mut need = vec![];
        if a.addr.is_some() {
            need.push(if a.addr_kind == Some("gva") { "virtual_addr" } else { "addr" });
        }
        if a.size.is_some() {
            need.push("size");
        }
        if a.space.is_some() {
            need.push("space");
        }
        wrap(&mut out, "  ", "  ", &(access_sentence(a, e) + &mark(&need, a)));
        if let Some(s) = device_sentence(a) {
            let mut need = vec!["device"];
            if a.register.is_some() {
                need.push("register");
            }
            if a.region_base.is_some() {
                need.push("region_base");
            }
            wrap(&mut out, "  ", "  ", &(s + &mark(&need, a)));
        } else if a.region_base.is_some() || a.offset.is_some() {
            let mut s = String::from("The device's frames are not there.");
            if let (Some(b), Some(o), Some(addr)) = (a.region_base, a.offset, a.addr) {
                let _ = write!(
                    s,
                    " The region starts at {b:#x} (computed: {addr} - {o}); the register is at +{o:#x} in it."
                );
            }
            wrap(&mut out, "  ", "  ", &(s + &mark(&["region_base"], a)));
        }
        if let Some(v) = a.value {
            let mut s = format!("Value {v} = {v:#x}");
            if let Some(r) = &a.register
                && r.width < 8
                && v >> (8 * r.width) != 0
            {
                let low = v & ((1 << (8 * r.width)) - 1);
                let _ = write!(
                    s,
                    "; the device takes the low {} {low:#x}",
                    if r.width == 1 { "byte".to_owned() } else { bytes(r.width) }
                );
            }
            if !a.decoded.is_empty() {
                let _ = write!(s, " = {}", a.decoded.join(" | "));
            }
            s.push('.');
            wrap(&mut out, "  ", "  ", &(s + &mark(&["value"], a)));
        }
        for c in &a.conflicts {
            wrap(
                &mut out,
                "  ! ",
                "    ",
                &format!(
                    "Frames contradict each other: {c}. Optimized code makes debuggers print stale values; I take what most frames say."
                ),
            );
        }
    }
    if e.accesses.is_empty() {
        wrap(
            &mut out,
            "  ",
            "  ",
            &format!("No access of the guest to a device is on this stack: {}.", actor_words(e)),
        );
    }
    for f in
        e.findings.iter().filter(|f| f.kind == Kind::Context && matches!(f.rule, "R8" | "R9" | "R10" | "R12"))
    {
        let at = if f.evidence.is_empty() { String::new() } else { format!(": {}", refs(&f.evidence)) };
        wrap(&mut out, "  ", "  ", &format!("{} [{}{at}]", f.text, f.confidence.word()));
    }
    if e.chain.len() > 1 {
        let chain = if e.chain.len() > 14 {
            [&e.chain[..8], &e.chain[e.chain.len() - 4..]].concat().join(" -> ")
        } else {
            e.chain.join(" -> ")
        };
        wrap(&mut out, "  ", "  ", &format!("Then: {chain}."));
    }
    let at = if e.end.evidence.is_empty() || ended(e).contains("are missing") {
        String::new()
    } else {
        format!(" [{}]", refs(&e.end.evidence))
    };
    wrap(&mut out, "  ", "  ", &format!("End: {}.{at}", ended(e)));
    if let Some(w) = &e.end.words {
        wrap(&mut out, "  ", "  ", &format!("Its last words: {w}"));
    }
    for d in &e.disagreements {
        wrap(&mut out, "  ! ", "    ", d);
    }
    if detail == Detail::Brief {
        for (i, f) in e.findings.iter().filter(|f| f.kind == Kind::Cause).take(3).enumerate() {
            wrap(
                &mut out,
                &format!("  {} {:9}", i + 1, f.confidence.word()),
                "             ",
                &format!("{}: {}", f.class, f.text),
            );
        }
        for c in &e.cannot_tell {
            wrap(&mut out, "  ? ", "    ", c);
        }
        return out;
    }
    if !e.accesses.is_empty() {
        out.push_str("\nPATH OF THE ACCESS\n");
        path(&mut out, e);
    }
    let unusual: Vec<_> = e.findings.iter().filter(|f| f.kind == Kind::Anomaly || f.rule == "R15").collect();
    if !unusual.is_empty() {
        out.push_str("\nUNUSUAL\n");
        for f in unusual {
            wrap(&mut out, "  ! ", "    ", &f.text);
        }
    }
    for a in e.accesses.iter().filter(|a| !a.candidates.is_empty()) {
        let what = match (a.space, a.addr) {
            (Some("pio"), Some(v)) => format!("port {v:#x}"),
            (_, Some(v)) => format!("address {v:#x}"),
            _ => "this access".into(),
        };
        let size = a.size.map_or(String::new(), |n| format!(", {}", bytes(n)));
        let _ = writeln!(out, "\nREGISTER  unknown; candidates for {what}{size}:");
        for (i, c) in a.candidates.iter().enumerate() {
            wrap(
                &mut out,
                &format!("  {}) ", i + 1),
                "     ",
                &format!(
                    "{} {} ({:#x}+{:#x}): {}",
                    c.device_title,
                    c.register_title,
                    c.region_base,
                    a.addr.unwrap_or(0).wrapping_sub(c.region_base),
                    c.because.join("; ")
                ),
            );
        }
        wrap(&mut out, "  ", "  ", "Run 'info mtree -f' and pass its text with --mtree: it decides.");
    }
    let causes: Vec<_> = e.findings.iter().filter(|f| f.kind == Kind::Cause).collect();
    if !causes.is_empty() {
        let _ = writeln!(out, "\nWHY (ranked)");
        for (i, f) in causes.iter().enumerate() {
            let at = if f.evidence.is_empty() {
                String::new()
            } else {
                format!(" [{} {}]", f.rule, refs(&f.evidence))
            };
            wrap(
                &mut out,
                &format!("  {} {:9}", i + 1, f.confidence.word()),
                "             ",
                &format!("{}: {}{at}", f.class, f.text),
            );
        }
    }
    for n in &e.not {
        let t = match *n {
            "out-of-bounds" => {
                "Not the cause: an access out of bounds of its region. Dispatch only delivers accesses that are inside."
            }
            "access-beyond-region" => {
                "Not the cause: an access beyond its region. Dispatch only delivers accesses that are inside; bounds that fail are inside the device."
            }
            "reentrancy-by-subpage" => "Not re-entrancy: subpage_* is one more hop of the same access.",
            _ => continue,
        };
        wrap(&mut out, "  ", "  ", t);
    }
    if !e.who.is_empty() {
        out.push_str("\nWHO CAN TRIGGER IT\n");
        wrap(&mut out, "  ", "  ", &e.who);
    }
    if !e.relatives.is_empty() {
        out.push_str("\nKNOWN RELATIVES\n");
        for r in &e.relatives {
            wrap(&mut out, "  ", "    ", r);
        }
    }
    if detail == Detail::Teach && !e.breakdown.is_empty() {
        out.push_str("\nKEY COMPONENTS (outermost first)\n");
        for l in &e.breakdown {
            wrap(&mut out, &format!("  #{:<3}{} ", l.frame, l.function), "        ", l.text);
        }
        let paths: Vec<_> =
            e.findings.iter().filter(|f| matches!(f.kind, Kind::Path | Kind::Context)).collect();
        if !paths.is_empty() {
            out.push_str("\nHOW ONE SEES THAT\n");
            for f in paths {
                let evidence =
                    crate::rules::table().iter().find(|r| r.id == f.rule).map_or("", |r| r.evidence);
                wrap(
                    &mut out,
                    &format!(
                        "  {} {} ",
                        f.rule,
                        if f.confidence == Sure::Certain { "certain:" } else { "likely:" }
                    ),
                    "      ",
                    &format!("{} {evidence}", f.text),
                );
            }
            for f in causes.iter().take(3) {
                let evidence =
                    crate::rules::table().iter().find(|r| r.id == f.rule).map_or("", |r| r.evidence);
                wrap(&mut out, &format!("  {} {}: ", f.rule, f.class), "      ", evidence);
            }
        }
    }
    if !e.scenarios.is_empty() {
        out.push_str("\nSCENARIOS\n");
        for s in &e.scenarios {
            wrap(&mut out, "  - ", "    ", s);
        }
    }
    if !e.cannot_tell.is_empty() {
        out.push_str("\nWHAT CAN'T BE TOLD\n");
        for c in &e.cannot_tell {
            wrap(&mut out, "  ", "  ", c);
        }
    }
    if !e.next.is_empty() {
        out.push_str("\nNEXT\n");
        for (i, n) in e.next.iter().enumerate() {
            wrap(&mut out, &format!("  {}. ", i + 1), "     ", n);
        }
    }
    out
}
