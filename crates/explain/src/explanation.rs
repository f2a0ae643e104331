//! The result: everything that is said, with evidence, ready for text or JSON.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::access::{Access, Initiator, Space};
use crate::dating::{self, Dated};
use crate::devices::{self, Candidate, Identified};
use crate::facts::Facts;
use crate::model::{Format, Frame, Report};
use crate::mtree::Range;
use crate::rules::{self, Kind, Sure};
use crate::{names, own, teach};

/// A statement of a rule.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// Rule.
    pub rule: &'static str,
    /// Kind of statement.
    pub kind: Kind,
    /// Class, in the words of the corpus.
    pub class: &'static str,
    /// How sure.
    pub confidence: Sure,
    /// Title.
    pub title: &'static str,
    /// What it says.
    pub text: String,
    /// Frame numbers.
    pub evidence: Vec<u32>,
    /// What to look at.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub next: String,
}

/// Who and how.
#[derive(Debug, Clone, Serialize)]
pub struct ActorOut {
    /// Kind of thread.
    pub thread: String,
    /// Accelerator.
    pub accel: Option<String>,
    /// The accelerator is read from another thread.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub accel_from_other_thread: bool,
    /// Frame numbers.
    pub evidence: Vec<u32>,
}

/// A register.
#[derive(Debug, Clone, Serialize)]
pub struct RegisterOut {
    /// Short name.
    pub name: String,
    /// Long name.
    pub title: String,
    /// Offset in its region (or port).
    pub offset: u64,
    /// Bytes.
    pub width: u64,
    /// Bytes into the register at which the handler was called.
    #[serde(skip_serializing_if = "is_zero")]
    pub within: u64,
    /// What is known of its use.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub note: &'static str,
    /// How sure.
    pub confidence: Sure,
}

/// A candidate for an unknown register.
#[derive(Debug, Clone, Serialize)]
pub struct CandidateOut {
    /// Device.
    pub device: String,
    /// Title of the device.
    pub device_title: String,
    /// Register.
    pub register: String,
    /// Title of the register.
    pub register_title: String,
    /// Width in bytes.
    pub width: u64,
    /// Start of the region.
    pub region_base: u64,
    /// Why.
    pub because: Vec<String>,
}

/// One access.
#[derive(Debug, Clone, Serialize, Default)]
pub struct AccessOut {
    /// Nesting, 0 is the vCPU's.
    pub depth: usize,
    /// `pio` or `mmio`.
    pub space: Option<&'static str>,
    /// `read` or `write`.
    pub dir: Option<&'static str>,
    /// Address.
    pub addr: Option<u64>,
    /// `port`, `gpa` or `gva`.
    pub addr_kind: Option<&'static str>,
    /// Guest-virtual address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_addr: Option<u64>,
    /// Bytes.
    pub size: Option<u64>,
    /// Bytes of the whole transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// Repetitions.
    pub count: Option<u64>,
    /// Start of the region.
    pub region_base: Option<u64>,
    /// Offset in the region.
    pub offset: Option<u64>,
    /// Bytes per call of the handler.
    pub handler_size: Option<u64>,
    /// The handler is called more than once.
    pub split: Option<bool>,
    /// Name of the region, from `--mtree`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Device.
    pub device: Option<String>,
    /// What it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_title: Option<String>,
    /// Kind of virtio device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_kind: Option<String>,
    /// Register.
    pub register: Option<RegisterOut>,
    /// Value written.
    pub value: Option<u64>,
    /// Names of the fields.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub decoded: Vec<String>,
    /// Candidates when the register is unknown.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<CandidateOut>,
    /// Who made it.
    pub initiator: &'static str,
    /// Recursion: how often it repeats.
    #[serde(skip_serializing_if = "is_one")]
    pub repeats: usize,
    /// Handler function.
    pub handler: Option<String>,
    /// Frame numbers.
    pub evidence: Vec<u32>,
    /// Frame numbers by member.
    pub evidence_of: std::collections::BTreeMap<&'static str, Vec<u32>>,
    /// Confidence of all that is given.
    pub confidence: Option<Sure>,
    /// The members that are certain.
    pub certain: Vec<&'static str>,
    /// Frames that contradict each other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_one(n: &usize) -> bool {
    *n <= 1
}

/// How it ended.
#[derive(Debug, Clone, Serialize)]
pub struct EndOut {
    /// Kind.
    pub kind: &'static str,
    /// Function of interest.
    pub function: String,
    /// Assertion.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assertion: Option<String>,
    /// Sanitizer's kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sanitizer: Option<String>,
    /// Faulting address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<u64>,
    /// The program's last words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
    /// Frame numbers.
    pub evidence: Vec<u32>,
}

/// What the input is.
#[derive(Debug, Clone, Serialize)]
pub struct InputOut {
    /// Format of the chosen stack.
    pub format: Option<Format>,
    /// Frames of the chosen stack.
    pub frames: u64,
    /// Frames in all.
    pub frames_total: u64,
    /// Stacks.
    pub threads: u64,
    /// Number of the chosen stack, from 0.
    pub chosen: usize,
    /// Its thread number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread: Option<u32>,
    /// Why it was chosen.
    pub chosen_because: &'static str,
    /// Frames that are missing before the first one, by its number.
    #[serde(skip_serializing_if = "is_zero")]
    pub missing_first: u64,
    /// Frames with a name.
    pub named: u64,
    /// Versions.
    pub dated: Dated,
    /// What was left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
}

/// One layer of the path.
#[derive(Debug, Clone, Serialize)]
pub struct Layer {
    /// Frame number.
    pub frame: u32,
    /// Function.
    pub function: String,
    /// What this layer does.
    pub text: &'static str,
}

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    /// Version of the schema.
    pub schema: u32,
    /// `explained`, `partly`, `not-a-trace`.
    pub verdict: &'static str,
    /// Input.
    pub input: InputOut,
    /// Actor.
    pub actor: ActorOut,
    /// Accesses from the vCPU inwards.
    pub accesses: Vec<AccessOut>,
    /// End.
    pub end: EndOut,
    /// Causes in order, then anomalies, then context.
    pub findings: Vec<Finding>,
    /// What it is not.
    pub not: Vec<&'static str>,
    /// Who can set it off.
    pub who: String,
    /// Known relatives.
    pub relatives: Vec<String>,
    /// Layers of the path.
    pub breakdown: Vec<Layer>,
    /// How one gets here.
    pub scenarios: Vec<String>,
    /// What can't be told, and how to get it.
    pub cannot_tell: Vec<String>,
    /// Numbers that contradict each other.
    pub disagreements: Vec<String>,
    /// What to do next.
    pub next: Vec<String>,
    /// The device's own calls, outermost first.
    pub chain: Vec<String>,
    /// Lines of our own crash report, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub report: Vec<String>,
}

/// Both forms of a number.
pub fn both(v: u64) -> String {
    if v < 10 { v.to_string() } else { format!("{v:#x} ({v})") }
}

/// Bytes in words.
pub fn bytes(n: u64) -> String {
    if n == 1 { "1 byte".into() } else { format!("{n} bytes") }
}

fn frame_numbers(frames: &[Frame], idx: &[usize]) -> Vec<u32> {
    let mut v: Vec<u32> =
        idx.iter().filter_map(|&i| frames.get(i).map(|f| f.number.unwrap_or(i as u32))).collect();
    v.sort_unstable();
    v.dedup();
    v.truncate(16);
    v
}

/// Makes the explanation of a report. `mtree` holds the ranges of `info mtree -f` when they are known.
pub fn explain(report: &Report, mtree: &[Range]) -> Explanation {
    let Some(facts) = Facts::new(report) else { return empty(report) };
    let frames = &facts.stack.frames;
    let mut findings = findings(&facts);
    let accesses: Vec<AccessOut> = facts
        .accesses
        .list
        .iter()
        .zip(&facts.devices)
        .map(|(a, d)| access_out(a, d.as_ref(), frames, facts.stack.format, mtree))
        .collect();
    let named = frames.iter().filter(|f| f.named()).count() as u64;
    let qemu_names = frames
        .iter()
        .filter(|f| f.named() && !names::is_runtime(&f.function) && f.function != "main")
        .count();
    let nosymbols = findings.iter().any(|f| f.rule == "R60");
    let not_vmm = !looks_like_vmm(report);
    if not_vmm {
        let mut e = empty(report);
        e.input.frames = frames.len() as u64;
        e.cannot_tell
            .push("There are frames, but none of them belongs to QEMU, to another VMM or to Hyaline.".into());
        return e;
    }
    if nosymbols {
        // Without names only what the C library's message fixes may be said.
        findings.retain(|f| {
            f.kind != Kind::Cause
                || matches!(
                    f.class,
                    "fd-set-overflow" | "late-detection" | "lock-or-hang" | "leak" | "coroutine"
                )
                || qemu_names > 3
        });
    }
    let memory_fault = matches!(
        facts.end.kind,
        crate::thread::End::Segv
            | crate::thread::End::Sanitizer
            | crate::thread::End::Bus
            | crate::thread::End::Unknown
    );
    let mut not = Vec::new();
    if facts.accesses.list.iter().any(|a| a.dispatched) {
        not.push(if memory_fault { "access-beyond-region" } else { "out-of-bounds" });
    }
    if findings.iter().any(|f| f.rule == "R18")
        || (facts.word("subpage", &[]).is_some() && facts.word("nested", &[]).is_none())
    {
        not.push("reentrancy-by-subpage");
    }
    let causes: Vec<&Finding> = findings.iter().filter(|f| f.kind == Kind::Cause).collect();
    let classes: Vec<&'static str> = causes.iter().take(3).map(|f| f.class).collect();
    let relatives = classes.iter().take(2).filter_map(|c| teach::relatives(c)).map(str::to_owned).collect();
    let who = who(&facts);
    let breakdown = breakdown(frames);
    let chain = chain(&facts);
    let scenarios = scenarios(&facts, &accesses, &causes);
    let mut cannot_tell = Vec::new();
    if nosymbols {
        cannot_tell.push(format!(
            "{} of {} frames have no names. Device, register and cause can't be told from module and offset alone.",
            frames.len() as u64 - named,
            frames.len()
        ));
        cannot_tell.push(names_howto(frames));
    }
    if let Some(a) = accesses.first() {
        if a.device.is_none() && !a.candidates.is_empty() {
            cannot_tell.push("No frame of a device is on the stack: which device and register this is can only be ranked. One line of `info mtree -f` decides: pass its text with --mtree.".into());
        }
        if a.device.is_none() && a.initiator == "guest" && causes.is_empty() {
            cannot_tell.push("The frames above the dispatch are missing, so the cause can't be told: they are where the answer is.".into());
        }
    }
    if causes.is_empty() && !nosymbols && facts.end.kind == crate::thread::End::Unknown {
        cannot_tell.push("Neither a signal nor an assertion nor a sanitizer's line is in the text: how it ended can't be told. Add the lines before the backtrace.".into());
    }
    let explained = !causes.is_empty()
        && !nosymbols
        && facts.stack.format != Format::Prose
        && !frames.iter().all(|f| !f.named());
    let next = next_steps(&facts, &accesses, &causes);
    let prose = facts.stack.format == Format::Prose;
    let mut e = Explanation {
        schema: 1,
        verdict: if explained { "explained" } else { "partly" },
        input: InputOut {
            format: Some(facts.stack.format),
            frames: frames.len() as u64 + facts.stack.dropped,
            frames_total: report.frames,
            threads: report.stacks_found,
            chosen: facts.chosen,
            thread: facts.stack.thread,
            chosen_because: facts.why,
            missing_first: frames.first().and_then(|f| f.number).map_or(0, u64::from),
            named,
            dated: dating::date(report),
            limits: report.limits.clone(),
        },
        actor: ActorOut {
            thread: facts.actor.thread.into(),
            accel: facts.actor.accel.map(str::to_owned),
            accel_from_other_thread: facts.actor.elsewhere,
            evidence: frame_numbers(frames, &facts.actor.frames),
        },
        accesses,
        end: EndOut {
            kind: facts.end.kind.word(),
            function: facts.end.function.clone(),
            assertion: facts.end.assertion.clone(),
            sanitizer: facts.end.sanitizer.clone(),
            fault: facts.end.fault,
            words: facts.end.words.clone(),
            evidence: frame_numbers(frames, &facts.end.frames),
        },
        findings,
        not,
        who,
        relatives,
        breakdown,
        scenarios,
        cannot_tell,
        disagreements: report.disagreements.clone(),
        next,
        chain,
        report: Vec::new(),
    };
    if let Some(h) = &report.hyaline {
        own::fill(&mut e, h);
    }
    if report.prose.iter().any(|p| p.contains("corrupt stack")) {
        // The debugger itself doubts the frames.
        for a in &mut e.accesses {
            a.certain.clear();
            a.confidence = a.confidence.map(|c| c.min(Sure::Strong));
            if let Some(r) = &mut a.register {
                r.confidence = r.confidence.min(Sure::Strong);
            }
        }
        for f in &mut e.findings {
            f.confidence = f.confidence.min(Sure::Strong);
        }
        e.cannot_tell.push("The debugger says that the stack may be corrupt, so nothing here is certain. A core file or a build without optimization gives better frames.".into());
    }
    if prose {
        // A story has no frame numbers to point at.
        e.actor.evidence.clear();
        e.end.evidence.clear();
        for a in &mut e.accesses {
            a.evidence.clear();
            a.evidence_of.clear();
        }
        for f in &mut e.findings {
            f.evidence.clear();
        }
    }
    e
}

/// Nothing to explain, or only our own report without a stack.
fn empty(report: &Report) -> Explanation {
    let mut e = Explanation {
        schema: 1,
        verdict: "not-a-trace",
        input: InputOut {
            format: None,
            frames: 0,
            frames_total: report.frames,
            threads: report.stacks_found,
            chosen: 0,
            thread: None,
            chosen_because: "",
            missing_first: 0,
            named: 0,
            dated: dating::date(report),
            limits: report.limits.clone(),
        },
        actor: ActorOut {
            thread: "unknown".into(),
            accel: None,
            accel_from_other_thread: false,
            evidence: Vec::new(),
        },
        accesses: Vec::new(),
        end: EndOut {
            kind: "unknown",
            function: String::new(),
            assertion: None,
            sanitizer: None,
            fault: None,
            words: None,
            evidence: Vec::new(),
        },
        findings: Vec::new(),
        not: Vec::new(),
        who: String::new(),
        relatives: Vec::new(),
        breakdown: Vec::new(),
        scenarios: Vec::new(),
        cannot_tell: Vec::new(),
        disagreements: report.disagreements.clone(),
        next: Vec::new(),
        chain: Vec::new(),
        report: Vec::new(),
    };
    if let Some(h) = &report.hyaline {
        e.input.format = Some(Format::HyalineReport);
        own::fill(&mut e, h);
    }
    e
}

/// Does anything in the text belong to a VMM?
fn looks_like_vmm(report: &Report) -> bool {
    if report.hyaline.is_some() {
        return true;
    }
    let words = [
        "qemu",
        "hyaline",
        "kvm",
        "crosvm",
        "firecracker",
        "cloud-hypervisor",
        "cloud_hypervisor",
        "openvmm",
        "xen-hvm",
    ];
    let says = |s: &str| {
        let l = s.to_ascii_lowercase();
        words.iter().any(|w| l.contains(w))
    };
    report.stacks.iter().any(|s| {
        s.frames.iter().take(400).any(|f| {
            names::role(&f.function) != names::Role::Other && f.function.contains('_')
                || names::matches("kvm_*|qemu_*|bdrv_*|blk_*|aio_*|virtio_*|vhost_*|pci_*|tcg_*|cpu_tb_exec|code_gen_buffer|main_loop_wait|qdev_*|qmp_*|hmp_*|memory_region_*|bql_*|usb_*|scsi_*|vnc_*|hyaline*|coroutine_trampoline|qio_*|qobject_*|net_*_packet*", &f.function)
                || says(&f.module)
                || names::matches("vmm::*|vm_memory::*|vm_device::*|virtio_devices::*|devices::*", &f.function)
                || (f.function.contains("::") && says(&f.function))
                || f.file.contains("hw/") && f.file.ends_with(".c")
                || says(&f.file)
        })
    }) || report.prose.iter().any(|p| says(p)) && report.stacks.iter().any(|s| s.frames.iter().any(|f| f.function.starts_with("main") || !f.named()))
}

fn names_howto(frames: &[Frame]) -> String {
    let module = frames
        .iter()
        .find(|f| f.module_offset.is_some() && f.module.contains("qemu"))
        .or_else(|| frames.iter().find(|f| f.module_offset.is_some()));
    let mut s = String::from(
        "To get names: install the debug symbols of exactly this build (Debian: qemu-system-x86-dbgsym; Fedora: dnf debuginfo-install qemu-system-x86-core; or DEBUGINFOD_URLS), then `coredumpctl gdb` or `gdb -p PID` and `thread apply all bt full`.",
    );
    if let Some(f) = module
        && let Some(o) = f.module_offset
    {
        s.push_str(&format!(" For one frame: addr2line -Cfe {} {o:#x}.", f.module));
    }
    s
}

fn access_out(
    a: &Access,
    d: Option<&Identified>,
    frames: &[Frame],
    format: Format,
    mtree: &[Range],
) -> AccessOut {
    let mut certain = Vec::new();
    let mut evidence: Vec<usize> = Vec::new();
    let mut of: std::collections::BTreeMap<&'static str, Vec<u32>> = std::collections::BTreeMap::new();
    macro_rules! field {
        ($read:expr, $name:literal) => {{
            if let Some(r) = &$read {
                evidence.extend(r.frames.iter().take(4));
                of.insert($name, frame_numbers(frames, &r.frames));
                if r.sure {
                    certain.push($name);
                }
            }
            $read.as_ref().map(|r| r.value)
        }};
    }
    let space = field!(a.space, "space");
    let write = field!(a.write, "dir");
    let mut addr = field!(a.addr, "addr");
    let size = field!(a.size, "size");
    let count = field!(a.count, "count");
    let base = field!(a.base, "region_base");
    let offset = field!(a.offset, "offset");
    let handler_size = field!(a.handler_size, "handler_size");
    let vaddr = a.virtual_addr.as_ref();
    let mut addr_kind = match space {
        Some(Space::Pio) => Some("port"),
        Some(Space::Mmio) => Some("gpa"),
        None => None,
    };
    if addr.is_none() {
        if let Some(v) = vaddr {
            addr = Some(v.value);
            addr_kind = Some("gva");
            evidence.extend(&v.frames);
            of.insert("virtual_addr", frame_numbers(frames, &v.frames));
        } else {
            addr_kind = None;
        }
    }
    if vaddr.is_some_and(|v| v.sure) {
        certain.push("virtual_addr");
    }
    let mut out = AccessOut {
        depth: a.depth,
        space: space.map(Space::word),
        dir: write.map(|w| if w { "write" } else { "read" }),
        addr,
        addr_kind,
        virtual_addr: vaddr.map(|v| v.value),
        size,
        length: a.length.as_ref().map(|l| l.value),
        count,
        region_base: base,
        offset,
        handler_size,
        split: a.split(),
        initiator: a.initiator.word(),
        repeats: a.repeats,
        conflicts: a.conflicts.clone(),
        ..AccessOut::default()
    };
    if let Some(d) = d {
        out.device = Some(d.id.clone());
        out.device_title = Some(d.title.clone());
        out.device_kind.clone_from(&d.flavour);
        out.handler = d.frame.map(|i| frames[i].function.clone());
        if d.sure {
            certain.push("device");
        }
        evidence.extend(d.frame);
        of.insert("device", frame_numbers(frames, &d.frame.into_iter().collect::<Vec<_>>()));
        if let Some(h) = &d.hit {
            if d.register_sure {
                certain.push("register");
            }
            out.register = Some(RegisterOut {
                name: h.name(),
                title: h.register.title.to_owned(),
                offset: h.offset(),
                width: h.register.width,
                within: h.within,
                note: h.register.note,
                confidence: if d.register_sure { Sure::Certain } else { Sure::Strong },
            });
            if out.offset.is_none()
                && d.offset.is_some()
                && d.block.is_some_and(|b| b.from == devices::OffsetFrom::Region)
            {
                out.offset = d.offset;
            }
        }
        if let Some((v, frame, sure)) = d.value {
            out.value = Some(v);
            evidence.push(frame);
            of.insert("value", frame_numbers(frames, &[frame]));
            if sure {
                certain.push("value");
            }
            if let Some(h) = &d.hit {
                out.decoded = h.decode(v);
            }
        }
    } else {
        out.value = a.value.as_ref().filter(|v| v.value < 1 << 40).map(|v| v.value);
    }
    // What `info mtree -f` says about the address.
    if let (Some(v), Some(s)) = (addr.filter(|_| addr_kind != Some("gva")), space)
        && let Some(r) = crate::mtree::find(mtree, s == Space::Pio, v)
    {
        out.region = Some(r.name.clone());
        let start = r.start.wrapping_sub(r.offset);
        if out.region_base.is_none() {
            out.region_base = Some(start);
            out.offset = Some(v.wrapping_sub(start));
        }
    }
    if out.device.is_none()
        && let (Some(v), Some(s)) = (addr.filter(|_| addr_kind != Some("gva")), space)
    {
        let list = devices::candidates(s, v, size, write, out.region_base);
        out.candidates = list.iter().take(5).filter_map(candidate_out).collect();
    }
    evidence.sort_unstable();
    evidence.dedup();
    out.evidence = frame_numbers(frames, &evidence);
    out.evidence_of = of;
    // The whole is certain only if who, where and what are all given and certain.
    let whole = ["space", "dir", "addr", "size", "device"].iter().all(|n| certain.contains(n))
        && (out.region_base.is_none() || certain.contains(&"region_base"));
    let any = out.space.is_some() || out.dir.is_some() || out.addr.is_some();
    out.confidence = any.then_some(if whole && !a.gap && format != Format::Prose {
        Sure::Certain
    } else if certain.is_empty() {
        Sure::Hint
    } else {
        Sure::Strong
    });
    out.certain = certain;
    out
}

/// Shapes a candidate for output.
pub fn candidate_out(c: &Candidate) -> Option<CandidateOut> {
    let (register, title, width) = match &c.hit {
        Some(h) => (h.name(), h.register.title.to_owned(), h.register.width),
        None => (c.block.id.to_owned(), c.block.title.to_owned(), 0),
    };
    Some(CandidateOut {
        device: c.device.id.to_owned(),
        device_title: c.device.title.to_owned(),
        register,
        register_title: title,
        width,
        region_base: c.base,
        because: c.because.clone(),
    })
}

fn fill(template: &str, facts: &Facts<'_>) -> String {
    if !template.contains('{') {
        return template.to_owned();
    }
    let a = facts.accesses.list.last();
    let d = facts.devices.iter().rev().flatten().next();
    let mut out = template.to_owned();
    let narrow = facts.narrow();
    let (reg, width, size) = match &narrow {
        Some((i, _)) => {
            let h = facts.devices[*i].as_ref().and_then(|d| d.hit.as_ref());
            (
                h.map(|h| format!("{} ({})", h.register.title, h.name())),
                h.map(|h| bytes(h.register.width)),
                facts.accesses.list[*i].size.as_ref().map(|s| bytes(s.value)),
            )
        }
        None => (
            d.and_then(|d| d.hit.as_ref()).map(|h| format!("register {}", h.name())),
            None,
            a.and_then(|a| a.size.as_ref()).map(|s| s.value.to_string()),
        ),
    };
    let split = facts.accesses.list.iter().find(|a| a.split() == Some(true));
    let pairs: [(&str, String); 11] = [
        (
            "{assert}",
            facts
                .end
                .assertion
                .as_ref()
                .map_or("(its text is not in the frames)".into(), |t| format!("\"{t}\"")),
        ),
        ("{device}", d.map_or("a device".into(), |d| d.title.clone())),
        ("{register}", reg.unwrap_or_else(|| "the register".into())),
        ("{width}", width.unwrap_or_else(|| "narrower".into())),
        (
            "{size}",
            split
                .and_then(|a| a.size.as_ref())
                .map(|s| s.value.to_string())
                .or(size)
                .unwrap_or_else(|| "more".into()),
        ),
        (
            "{handler_size}",
            split.and_then(|a| a.handler_size.as_ref()).map_or("fewer".into(), |s| s.value.to_string()),
        ),
        ("{value}", d.and_then(|d| d.value).map_or(String::new(), |v| format!("value {}", both(v.0)))),
        (
            "{fn}",
            if facts.end.function.is_empty() {
                "a function without a name".into()
            } else {
                facts.end.function.clone()
            },
        ),
        (
            "{base}",
            facts.accesses.list.iter().find_map(|a| a.base.as_ref()).map_or(String::new(), |b| both(b.value)),
        ),
        (
            "{count}",
            facts
                .accesses
                .list
                .iter()
                .find_map(|a| a.count.as_ref())
                .map_or(String::new(), |c| c.value.to_string()),
        ),
        ("{accel}", facts.actor.accel.unwrap_or("another accelerator").to_owned()),
    ];
    for (k, v) in pairs {
        out = out.replace(k, &v);
    }
    let period = facts.period.map_or(String::new(), |(_, n)| format!(" ({n} frames per turn)"));
    out = out.replace("{period}", &period);
    while out.contains("  ") {
        out = out.replace("  ", " ");
    }
    out.replace(" .", ".")
}

fn findings(facts: &Facts<'_>) -> Vec<Finding> {
    let frames = &facts.stack.frames;
    let mut hits: Vec<(&rules::Rule, Vec<usize>)> =
        rules::table().iter().filter_map(|r| r.when.eval(facts).map(|e| (r, e))).collect();
    let order = |k: Kind| match k {
        Kind::Cause => 0,
        Kind::Anomaly => 1,
        Kind::Path => 2,
        Kind::Context => 3,
    };
    hits.sort_by(|a, b| order(a.0.kind).cmp(&order(b.0.kind)).then(b.0.rank.cmp(&a.0.rank)));
    let mut out: Vec<Finding> = Vec::new();
    for (r, e) in hits {
        // One finding per class of cause: the strongest.
        if r.kind == Kind::Cause && out.iter().any(|f| f.kind == Kind::Cause && f.class == r.class) {
            continue;
        }
        if r.kind == Kind::Cause && out.iter().filter(|f| f.kind == Kind::Cause).count() >= 5 {
            continue;
        }
        let mut confidence = r.sure;
        if facts.stack.format == Format::Prose && confidence > Sure::Hint {
            confidence = if r.kind == Kind::Context { Sure::Strong } else { Sure::Hint };
        }
        out.push(Finding {
            rule: r.id,
            kind: r.kind,
            class: r.class,
            confidence,
            title: r.title,
            text: fill(r.says, facts),
            evidence: frame_numbers(frames, &e),
            next: r.next.to_owned(),
        });
    }
    out
}

fn who(facts: &Facts<'_>) -> String {
    let outer = facts.accesses.list.first();
    let by = outer.map(|a| a.initiator);
    match (facts.actor.thread, by) {
        ("debugger" | "monitor", _) if outer.is_none() => {
            "Whoever may use the monitor or the debugger (management); a guest does not reach this path by itself.".into()
        }
        ("debugger" | "monitor", _) => "The debugger or the monitor made this access; a guest does not reach this path by itself, though it may read the same register.".into(),
        (_, Some(Initiator::Harness)) => "A test harness injected it. Assume that guest root (or whoever may touch this device in the guest) can do the same, until shown otherwise.".into(),
        (_, Some(Initiator::Rom)) => "Whoever chooses the blobs that are loaded at reset (command line); not the guest.".into(),
        ("vcpu", _) if outer.is_some() => {
            let port = outer.and_then(|a| a.space.as_ref()).is_some_and(|s| s.value == Space::Pio);
            if port {
                "Guest root, or anyone in the guest with I/O port permission. Treat an end of the VMM as denial of service.".into()
            } else {
                "The guest's kernel, or anyone in the guest who can map the device. Treat an end of the VMM as denial of service.".into()
            }
        }
        _ if facts.word("deferred", &[]).is_some() => "Deferred work: the guest can trigger it if the request came from it; the frames don't show who asked.".into(),
        ("main", _) if facts.word("fn", &["device_set_realized|qdev_device_add*"]).is_some() => "Whoever configures the machine: command line, hotplug, management.".into(),
        _ => "No guest access is on this stack.".into(),
    }
}

fn breakdown(frames: &[Frame]) -> Vec<Layer> {
    let mut out: Vec<Layer> = Vec::new();
    for (i, f) in frames.iter().enumerate().rev() {
        if out.len() >= 48 {
            break;
        }
        if let Some(text) = teach::layer(&f.function)
            && out.last().is_none_or(|l| l.text != text)
        {
            out.push(Layer { frame: f.number.unwrap_or(i as u32), function: f.function.clone(), text });
        }
    }
    out
}

/// The device's own calls of the innermost access, handler first.
fn chain(facts: &Facts<'_>) -> Vec<String> {
    let frames = &facts.stack.frames;
    let mut out: Vec<String> = Vec::new();
    let list: Vec<usize> = match facts.accesses.list.iter().rev().find(|a| !a.device.is_empty()) {
        Some(a) => a.device.clone(),
        None => (0..frames.len().min(14)).rev().collect(),
    };
    for i in list {
        let f = &frames[i];
        if f.named()
            && (matches!(f.function.as_str(), "abort" | "free" | "memcpy") || !names::is_runtime(&f.function))
            && out.last() != Some(&f.function)
        {
            out.push(f.function.clone());
        }
        if out.len() >= 16 {
            break;
        }
    }
    out
}

fn scenarios(facts: &Facts<'_>, accesses: &[AccessOut], causes: &[&Finding]) -> Vec<String> {
    let mut out = Vec::new();
    for a in accesses.iter().take(2) {
        if let Some(r) = &a.register
            && !r.note.is_empty()
        {
            out.push(format!("{}: {}", r.name, r.note));
        }
    }
    if let Some(c) = causes.first() {
        out.extend(teach::scenarios(c.class).iter().map(|s| (*s).to_owned()));
    }
    if facts.actor.accel == Some("qtest") {
        out.push(
            "A fuzzer wrote random values in an order no driver uses; look at the sequence that it printed."
                .into(),
        );
    }
    out
}

fn next_steps(facts: &Facts<'_>, accesses: &[AccessOut], causes: &[&Finding]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for c in causes.iter().take(2) {
        if !c.next.is_empty() {
            out.push(c.next.clone());
        }
    }
    if let Some(i) = facts.end.frame {
        let n = facts.stack.frames[i].number.unwrap_or(i as u32);
        let p = if facts.stack.frames[i].args.iter().any(|a| a.name == "s" || a.name == "opaque") {
            "p *s"
        } else {
            "info locals"
        };
        let place = names::role(&facts.stack.frames[i].function) == names::Role::Other;
        if facts.stack.format == Format::GdbBt && place {
            out.push(format!("In gdb: frame {n}, info args, {p}"));
        }
    }
    let a = accesses.iter().find(|a| a.addr.is_some());
    if let Some(a) = a
        && let (Some(space), Some(addr)) = (a.space, a.addr)
        && a.addr_kind != Some("gva")
    {
        out.push(format!(
            "In the monitor: info mtree -f, and look for {addr:#x}{}",
            if space == "pio" { " in the view of I/O" } else { "" }
        ));
        let (lo, hi) = match (a.region_base, a.register.as_ref()) {
            (Some(b), Some(r)) if r.offset < 0x10_0000 => (b, b.saturating_add(r.offset | 0x1f)),
            _ => (addr & !0x1f, addr | 0x1f),
        };
        out.push(format!("In QEMU, log every access: -trace 'memory_region_ops_*' -D accesses.log, then look for addresses from {lo:#x} to {hi:#x}"));
        out.push(format!("In Hyaline, watch the same registers: hyaline [the same machine options] -trace {}:{lo:#x}-{hi:#x}", if space == "pio" { "io" } else { "mem" }));
    }
    if let Some(d) = facts.devices.iter().flatten().find_map(|d| d.device) {
        out.push(format!("Read: {}", d.cite));
    }
    if facts.accesses.list.iter().any(|a| a.dispatched) {
        out.push("Read: QEMU documentation, \"The memory API\" (docs/devel/memory), sections on access sizes and on overlapping regions".into());
    } else if causes.first().is_some_and(|c| c.class == "lock-or-hang") {
        out.push(
            "Read: QEMU documentation, \"Using multiple IOThreads\" (docs/devel/multiple-iothreads)".into(),
        );
    }
    out
}

impl Explanation {
    /// JSON, pretty printed.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self)
            .unwrap_or_else(|e| json!({"schema": 1, "error": e.to_string()}).to_string())
    }

    /// Everything that is claimed as certain, one statement each, in a form that does not depend on frame
    /// positions. Used by the tests: leaving frames out of a trace never adds to this list.
    pub fn certain_claims(&self) -> Vec<String> {
        let mut out = Vec::new();
        for a in &self.accesses {
            let v = serde_json::to_value(a).unwrap_or(Value::Null);
            let empty = Map::new();
            let m = v.as_object().unwrap_or(&empty);
            for name in &a.certain {
                let shown = match m.get(*name) {
                    Some(Value::Object(o)) => o.get("name").cloned().unwrap_or(Value::Null),
                    Some(x) => x.clone(),
                    None => Value::Null,
                };
                out.push(format!("{name}={shown}"));
            }
            if a.confidence == Some(Sure::Certain) {
                out.push(format!(
                    "access {:?} {:?} {:?} {:?} {:?}",
                    a.space, a.dir, a.addr, a.size, a.device
                ));
            }
        }
        for f in &self.findings {
            if f.confidence == Sure::Certain {
                out.push(format!("{} {}", f.rule, f.class));
            }
        }
        out.sort();
        out.dedup();
        out
    }

    /// Exit status of the command: 0 explained, 1 partly, 2 not a VMM's trace.
    pub fn exit_code(&self) -> i32 {
        match self.verdict {
            "explained" => 0,
            "partly" => 1,
            _ => 2,
        }
    }
}
