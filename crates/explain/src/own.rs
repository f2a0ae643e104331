//! Explains Hyaline's own crash reports. What such a report states was recorded by the machine itself and is certain; what led there is not.

use crate::explanation::{AccessOut, EndOut, Explanation, Finding, RegisterOut, both, bytes};
use crate::report::{CrashReport, ReportAccess};
use crate::rules::{Kind, Sure};

/// Accesses of a list that are printed.
const SHOWN: usize = 16;
/// Registers that are printed.
const REGISTERS: usize = 40;

/// What a kind of report means.
struct Meaning {
    /// In a few words, for the head.
    head: &'static str,
    kind: &'static str,
    class: &'static str,
    title: &'static str,
    /// What follows from it.
    text: &'static str,
}

fn meaning(cause: &str) -> Option<Meaning> {
    Some(match cause {
        "device-panic" => Meaning {
            head: "a device model panicked",
            kind: "panic",
            class: "guest-reachable-assert",
            title: "A device model panicked",
            text: "The panic was contained: the device is fenced off and reads as absent. If a guest's access was in hand, the guest can set it off again: \
                   it is a bug of the device model, whatever the guest did.",
        },
        "hang" => Meaning {
            head: "a register handler does not come back",
            kind: "hang",
            class: "lock-or-hang",
            title: "A register handler does not come back",
            text: "The device's code loops, sleeps, or waits for a lock or for the host. A thread in state R computes, one in D or S waits. Processors that \
                   touch the same device wait behind it; the others run on.",
        },
        "triple-fault" => Meaning {
            head: "a processor of the guest shut down after a triple fault",
            kind: "triple-fault",
            class: "guest-triple-fault",
            title: "Triple fault",
            text: "A triple fault is an exception whose handler could not be reached, nor that of the double fault that followed: most often a bad IDT, a \
                   stack or handler that is not mapped, or a jump into nothing. Some kernels do it on purpose to reset the machine.",
        },
        "kvm-internal-error" => Meaning {
            head: "KVM can't go on",
            kind: "kvm-internal-error",
            class: "accelerator-error",
            title: "KVM can't go on",
            text: "The host's kernel gave up on the guest's instruction or state (an emulation failure, or state that it does not take). The same guest on the \
                   software CPU tells whether the guest is at fault.",
        },
        "request" => Meaning {
            head: "asked for; nothing went wrong",
            kind: "request",
            class: "request",
            title: "A report on demand",
            text: "Somebody asked for the report (SIGQUIT, or the control socket); the guest went on.",
        },
        _ => return None,
    })
}

fn space(a: &ReportAccess) -> Option<&'static str> {
    match a.space.as_str() {
        "pio" | "io" => Some("pio"),
        "mmio" | "memory" => Some("mmio"),
        _ => None,
    }
}

fn sentence(a: &ReportAccess) -> String {
    let mut s = format!(
        "{} {}{}",
        if a.dir.is_empty() { "access" } else { &a.dir },
        a.size.map(|n| format!("{} ", bytes(n))).unwrap_or_default(),
        a.addr
            .map(|v| format!("at {} {}", if space(a) == Some("pio") { "port" } else { "address" }, both(v)))
            .unwrap_or_default()
    );
    if !a.device.is_empty() || a.offset.is_some() {
        s.push_str(&format!(" -> {}{}", a.device, a.offset.map(|o| format!("+{o:#x}")).unwrap_or_default()));
    }
    if !a.register.is_empty() {
        s.push_str(&format!(" \"{}\"", a.register));
    }
    if let Some(v) = a.value {
        s.push_str(&format!(" value {}", both(v)));
    }
    if !a.decoded.is_empty() {
        s.push_str(&format!(" {}", a.decoded.join(" | ")));
    }
    if let Some(w) = too_wide(a) {
        s.push_str(&format!("  ! {w}"));
    }
    s
}

fn capital(s: &str) -> String {
    let mut chars = s.chars();
    chars.next().map_or(String::new(), |c| c.to_uppercase().collect::<String>() + chars.as_str())
}

/// The access is wider than the register.
fn too_wide(a: &ReportAccess) -> Option<String> {
    let (w, n) = (a.width?, a.size?);
    (n > w).then(|| format!("the register is {} wide, the access {}", bytes(w), bytes(n)))
}

fn access_out(a: &ReportAccess) -> AccessOut {
    let mut certain = Vec::new();
    let mut fact = |known: bool, name| {
        if known {
            certain.push(name);
        }
    };
    fact(space(a).is_some(), "space");
    fact(!a.dir.is_empty(), "dir");
    fact(a.addr.is_some(), "addr");
    fact(a.size.is_some(), "size");
    fact(a.base.is_some(), "region_base");
    fact(a.offset.is_some(), "offset");
    fact(!a.device.is_empty(), "device");
    fact(!a.register.is_empty(), "register");
    fact(a.value.is_some(), "value");
    AccessOut {
        space: space(a),
        dir: match a.dir.as_str() {
            "read" => Some("read"),
            "write" => Some("write"),
            _ => None,
        },
        addr: a.addr,
        addr_kind: space(a).map(|s| if s == "pio" { "port" } else { "gpa" }),
        size: a.size,
        region_base: a.base,
        offset: a.offset,
        device: Some(a.device.clone()).filter(|d| !d.is_empty()),
        register: (!a.register.is_empty()).then(|| RegisterOut {
            name: a.register.clone(),
            title: a.register.clone(),
            offset: a.offset.unwrap_or(0),
            width: a.width.unwrap_or(0),
            within: 0,
            note: "",
            confidence: Sure::Certain,
        }),
        value: a.value,
        decoded: a.decoded.clone(),
        initiator: if a.vcpu.is_some() { "guest" } else { "unknown" },
        repeats: 1,
        confidence: Some(Sure::Certain),
        certain,
        ..AccessOut::default()
    }
}

fn finding(class: &'static str, kind: Kind, title: &'static str, text: String, next: String) -> Finding {
    Finding {
        rule: "own-report",
        kind,
        class,
        confidence: if kind == Kind::Cause { Sure::Strong } else { Sure::Certain },
        title,
        text,
        evidence: Vec::new(),
        next,
    }
}

/// Puts what the report states into the explanation, in place of what its host stack alone would give.
pub(crate) fn fill(e: &mut Explanation, h: &CrashReport) {
    let what = meaning(&h.cause);
    e.input.format = Some(crate::model::Format::HyalineReport);
    e.verdict = if h.access.is_some() || !h.message.is_empty() { "explained" } else { "partly" };
    e.accesses = h.access.iter().map(access_out).collect();
    let vcpu = h.access.as_ref().and_then(|a| a.vcpu);
    e.actor.thread = match (&h.access, h.cause.as_str()) {
        (Some(_), _) if vcpu.is_some() => "vcpu".into(),
        (_, "triple-fault" | "kvm-internal-error") => "vcpu".into(),
        _ => "unknown".into(),
    };
    e.actor.accel = match h.accelerator.as_str() {
        "" => None,
        "kvm" => Some("kvm".into()),
        // The class of QEMU's name for it: a software CPU.
        _ => Some("tcg".into()),
    };
    e.actor.evidence.clear();
    e.end = EndOut {
        kind: what.as_ref().map_or("unknown", |m| m.kind),
        function: e.chain.last().cloned().unwrap_or_default(),
        assertion: None,
        sanitizer: None,
        fault: None,
        words: Some(h.message.clone()).filter(|m| !m.is_empty()),
        evidence: Vec::new(),
    };
    e.findings.clear();
    e.next = next(h);
    if let Some(m) = &what {
        let first = e.next.first().cloned().unwrap_or_default();
        let kind = if h.cause == "request" { Kind::Context } else { Kind::Cause };
        e.findings.push(finding(m.class, kind, m.title, m.text.to_string(), first));
    }
    if let Some(text) = h.access.as_ref().and_then(too_wide) {
        e.findings.push(finding(
            "size-mismatch",
            Kind::Anomaly,
            "Wider than the register",
            text,
            String::new(),
        ));
    }
    e.who = match (&h.access, h.cause.as_str()) {
        (Some(a), _) if a.vcpu.is_some() && space(a) == Some("pio") => {
            "The guest's kernel, or anyone in the guest with I/O port permission.".into()
        }
        (Some(a), _) if a.vcpu.is_some() => {
            "The guest's kernel, or whoever has this memory mapped in the guest.".into()
        }
        (_, "triple-fault") => "The guest's kernel only.".into(),
        (_, "request") => "Whoever may send signals to the program, or write to its control socket.".into(),
        _ => "Not told by the report: no access of the guest was in hand.".into(),
    };
    e.not.clear();
    e.relatives.clear();
    e.cannot_tell.clear();
    if h.broken > 0 {
        e.cannot_tell.push(format!("{} lines could not be read: the report is cut or damaged.", h.broken));
    }
    if h.vcpus.is_empty() && h.cause == "hang" {
        e.cannot_tell
            .push("The processors' states: their threads did not come back while the handler hung.".into());
    }
    e.report = lines(e, h);
}

fn next(h: &CrashReport) -> Vec<String> {
    let mut out = Vec::new();
    let options = "[the same machine options]";
    if !h.device.is_empty() {
        out.push("Make the device's last accesses anew, on the device alone: hyaline explain --replay-test THIS-FILE > crates/devices/tests/replay.rs".into());
    }
    if let Some(a) = &h.access
        && !a.register.is_empty()
        && !h.device.is_empty()
    {
        out.push(format!(
            "Watch the device from the start: hyaline {options} -trace dev:{},file=accesses.txt",
            h.device
        ));
        out.push(format!(
            "Stop at the access: hyaline {options} -S -s, then in gdb: target remote :1234, monitor rbreak reg {}.{} {}, continue, monitor explain",
            h.device,
            a.register,
            if a.dir == "write" { "write" } else { "read" }
        ));
    }
    match h.cause.as_str() {
        "hang" => out.push(
            "Look at the host's side while it hangs: gdb -p PID, thread apply all bt; the thread that is in the device is the one to read.".into(),
        ),
        "triple-fault" => out.push(format!(
            "Run it again with -d int to see each exception as it is delivered, or stop there: hyaline {options} -S -s; gdb has the shut-down processor before \
             the reset."
        )),
        "kvm-internal-error" => {
            out.push(format!("The same on the software CPU: hyaline {options} -accel interp"));
            out.push("What the host's kernel says: dmesg | grep -i kvm".into());
        }
        _ => {}
    }
    out
}

/// The report in words.
fn lines(e: &Explanation, h: &CrashReport) -> Vec<String> {
    let mut out = Vec::new();
    let program = if h.program.is_empty() {
        String::new()
    } else {
        format!(" {}", h.program.trim_start_matches("hyaline "))
    };
    let head = meaning(&h.cause).map_or("cause not stated".to_string(), |m| m.head.to_string());
    let at = if h.time.is_empty() { String::new() } else { format!(" At {} of guest time.", h.time) };
    let on =
        if h.accelerator.is_empty() { String::new() } else { format!(" Accelerator: {}.", h.accelerator) };
    let cause = if h.cause.is_empty() { String::new() } else { format!(" ({})", h.cause) };
    out.push(format!("Crash report of Hyaline{program}, format {}: {head}{cause}.{at}{on}", h.version));

    out.push(String::new());
    out.push("WHAT HAPPENED".into());
    if let Some(a) = &h.access {
        let who = a.vcpu.map_or("Access in hand".into(), |v| format!("Access in hand (vCPU {v})"));
        let guest =
            if a.guest.is_empty() { String::new() } else { format!(", made by the guest at {}", a.guest) };
        out.push(format!("  {who}: {}{guest}. [certain]", sentence(a)));
        if let (Some(base), Some(addr), Some(offset)) = (a.base, a.addr, a.offset) {
            out.push(format!("  Its region starts at {} (computed: {addr} - {offset}).", both(base)));
        }
    }
    let chip = if h.chip.is_empty() { String::new() } else { format!(" ({})", h.chip) };
    let at = if h.location.is_empty() { String::new() } else { format!(" at {}", h.location) };
    let message = if h.message.is_empty() { "no message" } else { &h.message };
    match h.cause.as_str() {
        "device-panic" => {
            out.push(format!("  Device '{}'{chip} panicked: \"{message}\"{at}. [certain]", h.device))
        }
        "hang" => out.push(format!("  Device '{}'{chip}: {message}. [certain]", h.device)),
        _ if h.device.is_empty() => out.push(format!("  {}. [certain]", capital(message))),
        _ => out.push(format!("  Device '{}'{chip}: {message}{at}.", h.device)),
    }
    if !h.policy.is_empty() {
        out.push(format!("  What was done: {}.", h.policy));
    }
    let section = |out: &mut Vec<String>, title: &str, list: &[String]| {
        if !list.is_empty() {
            out.push(String::new());
            out.push(title.to_string());
            out.extend(list.iter().map(|l| format!("  {l}")));
        }
    };
    let path = if h.path.first().is_some_and(|l| l.starts_with("PATH")) { &h.path[1..] } else { &h.path[..] };
    let path: Vec<String> = path.iter().map(|l| l.strip_prefix("  ").unwrap_or(l).to_string()).collect();
    section(&mut out, "PATH OF THE ACCESS (with QEMU's names for the steps)", &path);
    let listed = |list: &mut dyn Iterator<Item = &ReportAccess>| -> Vec<String> {
        list.map(|a| format!("{} {}", a.time, sentence(a)).trim().to_string()).collect()
    };
    let n = h.recent.len();
    let recent = listed(&mut h.recent.iter().skip(n.saturating_sub(SHOWN)));
    section(
        &mut out,
        &format!("LAST {} ACCESSES OF {}, oldest first ({n} in the report)", recent.len(), h.device),
        &recent,
    );
    let mut registers: Vec<String> = h.registers.iter().take(REGISTERS).cloned().collect();
    if h.registers.len() > REGISTERS {
        registers.push(format!("… and {} more in the report", h.registers.len() - REGISTERS));
    }
    section(&mut out, &format!("REGISTERS OF {}", h.device), &registers);
    let mut cpus = h.vcpus.clone();
    cpus.extend(h.stacks.iter().cloned());
    section(&mut out, "PROCESSORS", &cpus);
    if n == 0 {
        let last = listed(&mut h.last.iter());
        section(&mut out, &format!("THE LAST {} ACCESSES TO DEVICES, oldest first", last.len()), &last);
    }
    if matches!(h.cause.as_str(), "hang" | "request") || h.access.is_none() {
        section(&mut out, "DEVICES AT WORK", &h.at_work);
        section(&mut out, "THREADS OF THE PROGRAM", &h.threads);
    }
    if e.chain.len() > 1 {
        let chain: Vec<&str> = e.chain.iter().rev().take(8).map(String::as_str).collect();
        section(&mut out, "THE PROGRAM'S OWN STACK, innermost first", &[chain.join(" <- ")]);
    }
    let console: Vec<String> = h.console.iter().map(|l| format!("| {l}")).collect();
    section(&mut out, "THE GUEST'S CONSOLE ENDED WITH", &console);
    let machine: Vec<String> =
        [&h.machine, &h.symbols].into_iter().filter(|l| !l.is_empty()).cloned().collect();
    section(&mut out, "MACHINE", &machine);
    let mut why: Vec<String> = e
        .findings
        .iter()
        .filter(|f| f.kind == Kind::Cause || h.cause == "request")
        .map(|f| f.text.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    why.push(format!("Who can set it off: {}", e.who));
    section(&mut out, "WHAT IT MEANS", &why);
    section(&mut out, "WHAT CAN'T BE TOLD", &e.cannot_tell);
    let next: Vec<String> = e.next.iter().enumerate().map(|(i, n)| format!("{}. {n}", i + 1)).collect();
    section(&mut out, "NEXT", &next);
    let others: Vec<String> = h
        .others
        .iter()
        .filter(|(k, _)| !matches!(k.as_str(), "guest-stack" | "stack"))
        .take(20)
        .map(|(k, n)| if *n == 1 { k.clone() } else { format!("{k} ({n})") })
        .collect();
    if !others.is_empty() {
        out.push(String::new());
        out.push(format!("Also in the report: {}.", others.join(", ")));
    }
    out
}
