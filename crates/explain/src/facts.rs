//! The facts of one trace: the chosen stack, its accesses and devices, the actor, the end; and the predicates of
//! the rules over them.

use crate::access::{self, Accesses, Initiator, Space};
use crate::devices::{self, Identified};
use crate::model::{Format, Frame, Message, Report, Stack, StackKind};
use crate::names::{self, matches};
use crate::thread::{self, End};

/// What ended, as far as frames and messages tell.
#[derive(Debug, Clone)]
pub struct EndInfo {
    /// Kind.
    pub kind: End,
    /// The function of interest: the innermost that is neither the C library nor a helper used everywhere.
    pub function: String,
    /// Its position.
    pub frame: Option<usize>,
    /// Assertion text.
    pub assertion: Option<String>,
    /// Sanitizer kind.
    pub sanitizer: Option<String>,
    /// Faulting address.
    pub fault: Option<u64>,
    /// Positions of the frames that show the end.
    pub frames: Vec<usize>,
    /// The program's own last words.
    pub words: Option<String>,
}

/// Who acts on the chosen stack.
#[derive(Debug, Clone)]
pub struct Actor {
    /// `vcpu`, `main`, `iothread`, `worker`, `harness`, ...
    pub thread: &'static str,
    /// Accelerator: `kvm`, `tcg`, `qtest`, `xen`, ...
    pub accel: Option<&'static str>,
    /// Frames.
    pub frames: Vec<usize>,
    /// The accelerator is read from another thread.
    pub elsewhere: bool,
}

/// All facts.
pub struct Facts<'a> {
    /// Input.
    pub report: &'a Report,
    /// Index of the chosen stack.
    pub chosen: usize,
    /// Why it was chosen.
    pub why: &'static str,
    /// The chosen stack.
    pub stack: &'a Stack,
    /// Accesses.
    pub accesses: Accesses,
    /// Devices, one per access.
    pub devices: Vec<Option<Identified>>,
    /// Actor.
    pub actor: Actor,
    /// End.
    pub end: EndInfo,
    /// Length of the repeating group of frames and where it starts.
    pub period: Option<(usize, usize)>,
    prose: String,
}

impl<'a> Facts<'a> {
    /// Derives the facts; none without a stack.
    pub fn new(report: &'a Report) -> Option<Self> {
        let (chosen, why) = thread::choose(report)?;
        let stack = &report.stacks[chosen];
        let accesses = access::extract(stack);
        let devices = accesses.list.iter().map(|a| devices::identify(stack, a)).collect();
        let end = end(report, stack);
        let actor = actor(report, stack);
        let mut prose = report.prose.join("\n").to_lowercase();
        prose.truncate(floor(&prose, 100_000));
        Some(Facts {
            period: period(stack),
            report,
            chosen,
            why,
            stack,
            accesses,
            devices,
            actor,
            end,
            prose,
        })
    }

    fn frames(&self) -> &[Frame] {
        &self.stack.frames
    }

    fn find(&self, p: &str) -> Vec<usize> {
        // A frame beyond the first thousands is a repetition.
        let f = self.frames();
        let tail = f.len().saturating_sub(2000).max(2000);
        f.iter()
            .enumerate()
            .filter(|(i, f)| (*i < 2000 || *i >= tail) && f.named() && matches(p, &f.function))
            .map(|x| x.0)
            .take(16)
            .collect()
    }

    fn near(&self, p: &str) -> Vec<usize> {
        self.frames()
            .iter()
            .enumerate()
            .filter(|(_, f)| f.named() && !names::is_runtime(&f.function))
            .take(12)
            .filter(|(_, f)| matches(p, &f.function))
            .map(|x| x.0)
            .collect()
    }

    /// Names of messages that belong to the chosen stack; all of them when it has none of its own.
    fn messages(&self) -> Vec<&Message> {
        messages(self.report, self.stack)
    }

    fn said(&self, words: &str) -> bool {
        words.split('|').any(|w| has_word(&self.prose, w.trim()))
    }

    fn some(v: Vec<usize>) -> Option<Vec<usize>> {
        (!v.is_empty()).then_some(v)
    }

    fn yes(b: bool) -> Option<Vec<usize>> {
        b.then(Vec::new)
    }

    /// Is there such a predicate?
    pub fn knows(name: &str) -> bool {
        const ALL: &[&str] = &[
            "fn",
            "anyfn",
            "near",
            "above",
            "directly",
            "argzero",
            "end",
            "san",
            "undef",
            "msg",
            "said",
            "asserttext",
            "anyend",
            "dispatched",
            "guestpath",
            "inhw",
            "dispatchtop",
            "deferred",
            "nested",
            "subpageonly",
            "recursion",
            "lockwait",
            "allwaiting",
            "allvcpusrunning",
            "nullfault",
            "badaccess",
            "crashlike",
            "notreached",
            "assertlock",
            "freednested",
            "dma",
            "split",
            "narrow",
            "statusbits",
            "readonlywrite",
            "stringio",
            "base",
            "nosymbols",
            "subpage",
        ];
        ALL.contains(&name)
    }

    /// Evaluates a predicate.
    pub fn word(&self, name: &str, args: &[&'static str]) -> Option<Vec<usize>> {
        let a0 = args.first().copied().unwrap_or("");
        let a1 = args.get(1).copied().unwrap_or("");
        let f = self.frames();
        match name {
            "fn" => Self::some(self.find(a0)),
            "anyfn" => {
                let hit = self
                    .report
                    .stacks
                    .iter()
                    .filter(|s| s.kind != StackKind::AllocatedBy)
                    .any(|s| s.frames.iter().take(2000).any(|f| f.named() && matches(a0, &f.function)));
                hit.then(|| self.find(a0))
            }
            "near" => Self::some(self.near(a0)),
            "above" => {
                let outer = f
                    .iter()
                    .enumerate()
                    .rev()
                    .find(|(i, f)| (*i < 4000) && f.named() && matches(a1, &f.function))?
                    .0;
                let inner = f[..outer].iter().position(|f| f.named() && matches(a0, &f.function))?;
                Some(vec![inner, outer])
            }
            "directly" => {
                let i = (1..f.len().min(4000)).find(|&i| {
                    f[i - 1].named()
                        && f[i].named()
                        && matches(a0, &f[i - 1].function)
                        && matches(a1, &f[i].function)
                })?;
                Some(vec![i - 1, i])
            }
            "argzero" => {
                let last = self.end.frame.map_or(4, |i| i + 3);
                let i = f.iter().take(last).position(|f| {
                    f.named()
                        && matches(a0, &f.function)
                        && a1.split('|').any(|n| {
                            f.arg(n).is_some_and(|a| a.value == Some(0) && a.text.starts_with("0x0"))
                        })
                })?;
                Some(vec![i])
            }
            "end" => {
                let k = match self.end.kind {
                    End::Assert => "assert",
                    End::Abort => "abort",
                    End::Segv | End::Bus => "segv",
                    End::Fpe => "fpe",
                    End::Ill => "ill",
                    End::Sanitizer => "sanitizer",
                    End::Leak => "leak",
                    End::Libc => "libc",
                    End::Trap | End::Unknown => "unknown",
                    End::Hang => "hang",
                    End::Panic => "panic",
                };
                a0.split('|').any(|w| w.trim() == k).then(|| self.end.frames.clone())
            }
            "san" => {
                let k = self.end.sanitizer.as_deref()?;
                matches(a0, k).then(|| self.end.frames.clone())
            }
            "undef" => {
                let hit = self
                    .messages()
                    .iter()
                    .any(|m| matches!(m, Message::Undefined(t) if a0.split('|').any(|w| t.contains(w))));
                hit.then(|| self.end.frames.clone())
            }
            "msg" => {
                let hit = self.report.messages.iter().any(|m| match m {
                    Message::Program(t) | Message::LibC(t) | Message::Fuzzer(t) => {
                        a0.split('|').any(|w| t.contains(w))
                    }
                    _ => false,
                });
                Self::yes(hit)
            }
            "said" => Self::yes(self.said(a0)),
            "asserttext" => {
                let t = self.end.assertion.as_deref()?;
                a0.split('|').any(|w| t.contains(w)).then(|| self.end.frames.clone())
            }
            "anyend" => {
                let hit = self.report.stacks.iter().any(|s| {
                    s.frames.iter().take(4).any(|f| matches("abort|raise", &f.function))
                        && s.frames.iter().take(6).any(|f| f.named() && matches(a0, &f.function))
                });
                hit.then(|| self.find(a0))
            }
            "dispatched" => Self::some(
                self.accesses
                    .list
                    .iter()
                    .filter(|a| a.dispatched)
                    .flat_map(|a| a.path.iter().take(1).copied())
                    .collect(),
            ),
            "guestpath" => {
                let hit: Vec<usize> = self
                    .accesses
                    .list
                    .iter()
                    .filter(|a| {
                        a.dispatched
                            || (matches!(a.initiator, Initiator::Guest)
                                && (a.addr.is_some() || a.virtual_addr.is_some()))
                    })
                    .filter_map(|a| a.path.last().copied())
                    .collect();
                Self::some(hit)
            }
            "inhw" => {
                let i = self.end.frame?;
                let hit = f
                    .iter()
                    .enumerate()
                    .skip(i)
                    .filter(|(_, f)| f.named())
                    .take(3)
                    .find(|(_, f)| f.file.contains("hw/"))?;
                Some(vec![hit.0])
            }
            "dispatchtop" => {
                Self::some(self.accesses.list.iter().filter_map(|a| a.device.first().copied()).collect())
            }
            "deferred" => {
                let frames = self.find("aio_bh_poll|aio_bh_call|timerlist_run_timers|qemu_clock_run_timers|coroutine_trampoline|qemu_bh_poll|qemu_run_timers");
                let guest = self.accesses.list.iter().any(|a| {
                    matches!(
                        a.initiator,
                        Initiator::Guest | Initiator::Harness | Initiator::Rom | Initiator::Debugger
                    )
                });
                if guest { None } else { Self::some(frames) }
            }
            "nested" => {
                let d: Vec<_> = self.accesses.list.iter().filter(|a| a.dispatched).collect();
                (d.len() >= 2).then(|| {
                    d[1..]
                        .iter()
                        .flat_map(|a| a.path.first().copied())
                        .chain(d[0].path.last().copied())
                        .collect()
                })
            }
            "subpageonly" => None,
            "subpage" => Self::some(self.accesses.list.iter().flat_map(|a| a.subpages.clone()).collect()),
            "recursion" => self.period.map(|(start, n)| (start..(start + n).min(f.len())).collect()),
            "lockwait" => {
                let first = f.iter().find(|f| f.named())?;
                let lock: Vec<usize> = f
                    .iter()
                    .enumerate()
                    .take(10)
                    .filter(|(_, f)| names::waits_for_lock(&f.function))
                    .map(|x| x.0)
                    .collect();
                names::is_waiting(&first.function).then_some(()).and(Self::some(lock))
            }
            "allwaiting" => {
                let first = f.iter().position(|f| f.named())?;
                names::is_waiting(&f[first].function).then(|| vec![first])
            }
            "allvcpusrunning" => {
                let mut any = false;
                for s in &self.report.stacks {
                    if s.frames.iter().take(40).any(|f| {
                        matches("kvm_cpu_exec|kvm_vcpu_thread_fn|qemu_kvm_cpu_thread_fn", &f.function)
                    }) {
                        any = true;
                        if !s.frames.iter().take(3).any(|f| f.function == "kvm_vcpu_ioctl") {
                            return None;
                        }
                    }
                }
                any.then(|| self.find("kvm_vcpu_ioctl"))
            }
            "nullfault" => {
                let near = |a: u64| a < 0x1_0000;
                let san = self.messages().iter().any(
                    |m| matches!(m, Message::Sanitizer { kind, addr: Some(a) } if kind == "SEGV" && near(*a)),
                ) || self
                    .messages()
                    .iter()
                    .any(|m| matches!(m, Message::Undefined(t) if t.contains("null pointer")));
                let told = self.report.messages.iter().any(|m| matches!(m, Message::Fault(a) if near(*a)));
                let jump = f.first().is_some_and(|f| f.pc == Some(0) && !f.named()) && f.len() > 1;
                let zero_arg = self.end.kind == End::Segv
                    && self.end.frame.is_some_and(|i| i < 3 && f[i].args.iter().any(|a| a.text == "0x0" && matches("s|d|dev|bus|blk|bs|opaque|req|obj|mr|ctx|co|vdev|vq|proxy|port|ep|p|nc|sd|pci_dev", &a.name)));
                (san || told || jump || zero_arg).then(|| vec![self.end.frame.unwrap_or(0)])
            }
            "badaccess" => Self::yes(self.messages().iter().any(|m| matches!(m, Message::BadAccess { .. }))),
            "crashlike" => {
                let first = f.iter().find(|f| f.named())?;
                let waits = names::is_waiting(&first.function);
                // A stack whose top is the memory path itself was cut: the end is not on it.
                let place = self.end.frame.is_some_and(|i| {
                    names::role(&f[i].function) == names::Role::Other
                        && !matches(
                            "*_cpu_thread_fn|kvm_*_exec|kvm_vcpu_thread_fn|cpu_exec|cpu_tb_exec|main*",
                            &f[i].function,
                        )
                });
                let ok = self.end.kind == End::Segv || (!waits && place && self.end.kind != End::Trap);
                ok.then(|| self.end.frame.into_iter().collect())
            }
            "notreached" => {
                Self::yes(self.report.messages.iter().any(|m| matches!(m, Message::NotReached(_))))
            }
            "assertlock" => {
                let t = self.end.assertion.as_deref()?.trim();
                matches!(
                    t,
                    "qemu_mutex_iothread_locked()"
                        | "bql_locked()"
                        | "qemu_mutex_iothread_locked"
                        | "bql_locked"
                )
                .then(|| self.end.frames.clone())
            }
            "freednested" => {
                let hit = self.report.stacks.iter().any(|s| {
                    s.kind == StackKind::FreedBy
                        && s.frames.iter().any(|f| names::role(&f.function) == names::Role::Dispatch)
                        && s.frames.iter().any(|f| names::role(&f.function) == names::Role::Dma)
                });
                Self::yes(hit)
            }
            "dma" => {
                let v: Vec<usize> = self.accesses.dma.iter().filter_map(|d| d.last().copied()).collect();
                if v.is_empty() {
                    Self::some(self.near("dma_memory_*|pci_dma_*|usb_packet_map|usb_packet_unmap|address_space_unmap|address_space_map|dma_buf_*|dma_blk_*"))
                } else {
                    Some(v)
                }
            }
            "split" => {
                let a = self
                    .accesses
                    .list
                    .iter()
                    .find(|a| a.split() == Some(true) && a.size.as_ref().is_some_and(|s| s.sure))?;
                Some(a.handler_size.iter().chain(a.size.iter()).flat_map(|r| r.frames.clone()).collect())
            }
            "base" => Self::some(
                self.accesses
                    .list
                    .iter()
                    .filter_map(|a| a.base.as_ref())
                    .filter(|b| b.sure)
                    .flat_map(|b| b.frames.clone())
                    .collect(),
            ),
            "narrow" => self.narrow().map(|x| x.1),
            "statusbits" => {
                let id = self.devices.iter().flatten().find(|d| {
                    d.hit.as_ref().is_some_and(|h| {
                        matches!(h.register.name, "device_status" | "status") && d.id.starts_with("virtio")
                    })
                })?;
                let (v, frame, _) = id.value?;
                (v & 4 != 0 && v & 0xc0 != 0).then(|| vec![frame])
            }
            "readonlywrite" => {
                let (a, d) = self.accesses.list.iter().zip(&self.devices).find(|(a, d)| {
                    a.write.as_ref().is_some_and(|w| w.value)
                        && d.as_ref()
                            .is_some_and(|d| d.hit.as_ref().is_some_and(|h| h.register.access == "ro"))
                })?;
                let mut v: Vec<usize> = d.as_ref().and_then(|d| d.frame).into_iter().collect();
                v.extend(a.offset.iter().flat_map(|o| o.frames.clone()));
                Some(v)
            }
            "stringio" => {
                let a = self.accesses.list.iter().find(|a| a.count.as_ref().is_some_and(|c| c.value > 1))?;
                Some(a.count.iter().flat_map(|c| c.frames.clone()).collect())
            }
            "nosymbols" => {
                let named = f.iter().filter(|f| f.named() && !names::is_runtime(&f.function)).count();
                Self::yes(!f.is_empty() && named * 4 < f.len())
            }
            _ => None,
        }
    }

    /// The access whose size differs from its register's width.
    pub fn narrow(&self) -> Option<(usize, Vec<usize>)> {
        for (i, (a, d)) in self.accesses.list.iter().zip(&self.devices).enumerate() {
            let (Some(d), Some(size)) = (d, &a.size) else { continue };
            let Some(h) = &d.hit else { continue };
            // Wider devices take narrow accesses byte by byte; narrower registers are the unusual case.
            if h.within == 0
                && size.value > h.register.width
                && size.value <= 8
                && a.split() != Some(true)
                && h.register.stride != 1
                && !h.register.name.contains("INDEX")
            {
                let mut v = size.frames.clone();
                v.extend(a.offset.iter().flat_map(|o| o.frames.clone()));
                return Some((i, v));
            }
        }
        None
    }
}

fn floor(s: &str, mut at: usize) -> usize {
    if at >= s.len() {
        return s.len();
    }
    while !s.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Is `w` in the text at the start of a word? ("hang" must not be found in "change".)
fn has_word(text: &str, w: &str) -> bool {
    text.match_indices(w).any(|(at, _)| !text[..at].chars().next_back().is_some_and(char::is_alphabetic))
}

fn messages<'a>(report: &'a Report, stack: &'a Stack) -> Vec<&'a Message> {
    if stack.messages.is_empty() {
        report.messages.iter().take(64).collect()
    } else {
        stack.messages.iter().filter_map(|&m| report.messages.get(m)).collect()
    }
}

/// A group of frames that repeats at least three times, over twelve frames or more.
fn period(stack: &Stack) -> Option<(usize, usize)> {
    let names: Vec<&str> = stack.frames.iter().take(400).map(|f| f.function.as_str()).collect();
    for start in 0..names.len().min(40) {
        for n in 1..=40usize {
            let need = (12usize.div_ceil(n)).max(3) * n;
            let Some(window) = names.get(start..start + need) else { break };
            if window.iter().all(|n| n.is_empty()) {
                continue;
            }
            if window.iter().enumerate().skip(n).all(|(i, x)| *x == window[i - n]) {
                return Some((start, n));
            }
        }
    }
    None
}

fn quoted(text: &str) -> Option<String> {
    let a = text.find('"')?;
    let rest = &text[a + 1..];
    Some(rest.split('"').next().unwrap_or(rest).to_owned())
}

fn end(report: &Report, stack: &Stack) -> EndInfo {
    let frames = &stack.frames;
    let own = messages(report, stack);
    let mut info = EndInfo {
        kind: End::Unknown,
        function: String::new(),
        frame: None,
        assertion: None,
        sanitizer: None,
        fault: None,
        frames: Vec::new(),
        words: None,
    };
    let top = |p: &str| -> Vec<usize> {
        frames
            .iter()
            .enumerate()
            .take(24)
            .filter(|(_, f)| f.named() && matches(p, &f.function))
            .map(|x| x.0)
            .collect()
    };
    let asserts =
        top("__assert_fail*|__assert_fail_base|__assert|__assert2|g_assertion_message*|__assert_rtn");
    let aborts =
        top("abort|raise|gsignal|__pthread_kill*|pthread_kill|__assert_perror_fail|g_assert_not_reached");
    // Texts in the frames.
    for &i in &asserts {
        for name in ["assertion", "expr", "assertion_message"] {
            if info.assertion.is_none() {
                info.assertion = frames[i].text(name).and_then(quoted);
            }
        }
    }
    for m in own.iter().copied().chain(report.messages.iter().take(64)) {
        match m {
            Message::Sanitizer { kind, addr }
                if own.contains(&m)
                    && (info.sanitizer.is_none() || info.sanitizer.as_deref() == Some("invalid-access")) =>
            {
                info.sanitizer = Some(kind.clone());
                info.fault = *addr;
            }
            Message::Assert { text, .. }
                if info.assertion.is_none() && (own.contains(&m) || !asserts.is_empty()) =>
            {
                info.assertion = Some(text.clone())
            }
            Message::Program(t) | Message::LibC(t) | Message::Fuzzer(t) if info.words.is_none() => {
                info.words = Some(t.trim_start_matches(['#', ' ']).to_owned())
            }
            _ => {}
        }
    }
    let has = |f: &dyn Fn(&Message) -> bool| own.iter().any(|m| f(m));
    let text = report.prose.join("\n").to_lowercase();
    let stands = ["hang", "hung", "freeze", "frozen", "stuck", "deadlock", "100% cpu", "high cpu"]
        .iter()
        .any(|w| has_word(&text, w));
    let signal = own.iter().find_map(|m| if let Message::Signal(s) = m { Some(s.as_str()) } else { None });
    let waiting = frames.iter().find(|f| f.named()).is_some_and(|f| names::is_waiting(&f.function));
    let panicked = has(&|m| matches!(m, Message::Program(t) if t.contains("' panicked at ")));
    info.kind = if panicked {
        End::Panic
    } else if has(&|m| matches!(m, Message::Leak(_))) {
        End::Leak
    } else if !asserts.is_empty()
        || (info.assertion.is_some() && (!aborts.is_empty() || has(&|m| matches!(m, Message::Assert { .. }))))
        || has(&|m| matches!(m, Message::NotReached(_)))
    {
        info.frames.extend(&asserts);
        End::Assert
    } else if info.sanitizer.is_some() {
        if info.sanitizer.as_deref() == Some("FPE") {
            End::Fpe
        } else if info.sanitizer.as_deref() == Some("ABRT") {
            End::Abort
        } else {
            End::Sanitizer
        }
    } else if has(&|m| matches!(m, Message::Undefined(_))) {
        End::Sanitizer
    } else if has(&|m| matches!(m, Message::LibC(_))) {
        End::Libc
    } else if !aborts.is_empty() {
        info.frames.extend(&aborts);
        End::Abort
    } else {
        match signal {
            Some("SIGSEGV") => End::Segv,
            Some("SIGBUS") => End::Bus,
            Some("SIGFPE") => End::Fpe,
            Some("SIGILL") => End::Ill,
            Some("SIGABRT" | "SIGIOT") => End::Abort,
            Some("SIGTRAP" | "SIGINT" | "SIGSTOP") if stands => End::Hang,
            Some("SIGTRAP" | "SIGINT" | "SIGSTOP") => End::Trap,
            _ if !top("<signal handler called>").is_empty() => End::Segv,
            _ if !top("__asan_report*|__asan_mem*").is_empty() => End::Sanitizer,
            _ if has(&|m| matches!(m, Message::Fuzzer(t) if t.starts_with("timeout"))) => End::Hang,
            _ if stands => End::Hang,
            _ if text.contains("segfault")
                || text.contains("sigsegv")
                || text.contains("segmentation fault") =>
            {
                End::Segv
            }
            _ if waiting => End::Hang,
            _ => End::Unknown,
        }
    };
    if frames.first().is_some_and(|f| f.pc == Some(0) && !f.named())
        && info.kind == End::Unknown
        && frames.len() > 1
    {
        info.kind = End::Segv;
    }
    if stack.format == Format::HyalineReport {
        info.kind = End::Panic;
    }
    // The function of interest.
    let pick = frames
        .iter()
        .enumerate()
        .find(|(_, f)| f.named() && !names::is_runtime(&f.function) && !names::is_helper(&f.function))
        .or_else(|| frames.iter().enumerate().find(|(_, f)| f.named() && !names::is_runtime(&f.function)))
        .or_else(|| frames.iter().enumerate().find(|(_, f)| f.named()));
    // What waits is shown as what it waits in.
    let pick = if info.kind == End::Hang && waiting {
        frames.iter().enumerate().find(|(_, f)| f.named()).or(pick)
    } else {
        pick
    };
    if let Some((i, f)) = pick {
        info.function.clone_from(&f.function);
        info.frame = Some(i);
        info.frames.push(i);
    }
    info.frames.sort_unstable();
    info.frames.dedup();
    info
}

const ACCELS: &[(&str, &str)] = &[
    (
        "kvm",
        "kvm_cpu_exec|kvm_vcpu_thread_fn|qemu_kvm_cpu_thread_fn|kvm_run|kvm_main_loop_cpu|ap_main_loop|kvm_vcpu_ioctl|kvm_handle_io",
    ),
    (
        "tcg",
        "cpu_tb_exec|cpu_loop_exec_tb|code_gen_buffer|tcg_cpus_exec|tcg_cpu_exec|mttcg_cpu_thread_fn|rr_cpu_thread_fn|qemu_tcg_cpu_thread_fn|qemu_tcg_rr_cpu_thread_fn|tcg_cpu_thread_fn|helper_*_mmu|io_writex|io_readx|helper_outb|helper_outw|helper_outl|helper_inb|helper_inw|helper_inl|do_st*_mmu|do_ld*_mmu|io_writel|io_writeb|io_writew|io_readl|io_readb|io_readw|cpu_x86_exec|tcg_exec_all",
    ),
    ("xen", "cpu_ioreq_pio|cpu_ioreq_move|handle_ioreq|cpu_handle_ioreq"),
    ("hvf", "hvf_vcpu_exec|hvf_cpu_thread_fn"),
    ("whpx", "whpx_vcpu_run|whpx_vcpu_exec|whpx_cpu_thread_fn"),
    ("nvmm", "nvmm_vcpu_loop|nvmm_vcpu_exec"),
    ("hax", "hax_vcpu_hax_exec|qemu_hax_cpu_thread_fn"),
    (
        "qtest",
        "qtest_process_command|qtest_process_inbuf|qtest_read|videzzo_*|LLVMFuzzerTestOneInput|generic_fuzz|qtest_server_inproc_recv|qemu_dummy_cpu_thread_fn|dispatch_mmio_*|dispatch_pio_*",
    ),
];

fn actor(report: &Report, stack: &Stack) -> Actor {
    let look = |s: &Stack| -> Option<(&'static str, usize)> {
        for (name, p) in ACCELS {
            if let Some(i) = s.frames.iter().take(4000).position(|f| f.named() && matches(p, &f.function)) {
                return Some((name, i));
            }
        }
        None
    };
    let find = |p: &str| stack.frames.iter().take(20_000).position(|f| f.named() && matches(p, &f.function));
    let here = look(stack);
    let mut frames: Vec<usize> = here.map(|x| x.1).into_iter().collect();
    let thread = if let Some(i) = find("cpu_memory_rw_debug|gdb_handle_packet|memory_dump|hmp_memory_dump") {
        frames.push(i);
        if find("gdb_handle_packet|gdb_read_byte").is_some() { "debugger" } else { "monitor" }
    } else if matches!(here, Some((a, _)) if a != "qtest" && a != "xen") {
        "vcpu"
    } else {
        let table: &[(&str, &str)] = &[
            ("harness", "qtest_process_command|qtest_process_inbuf|videzzo_*|LLVMFuzzerTestOneInput"),
            ("iothread", "iothread_run"),
            ("worker", "worker_thread|vnc_worker_thread*"),
            ("migration", "migration_thread|process_incoming_migration_*|bg_migration_thread"),
            ("rcu", "call_rcu_thread"),
            ("display", "red_worker_main|spice_*"),
            ("monitor", "monitor_qmp_dispatcher_*|handle_hmp_command*|qmp_marshal_*|hmp_*"),
            ("coroutine", "coroutine_trampoline"),
            (
                "main",
                "main_loop_wait|qemu_main_loop|main_loop|os_host_main_loop_wait|glib_pollfds_poll|qemu_init|main|qemu_default_main",
            ),
        ];
        let mut t = "unknown";
        for (name, p) in table {
            if let Some(i) = find(p) {
                t = name;
                frames.push(i);
                break;
            }
        }
        t
    };
    let elsewhere = here.is_none();
    let accel = match here {
        Some((a, _)) => Some(a),
        None => report.stacks.iter().find_map(|s| look(s).map(|x| x.0)).or_else(|| {
            stack
                .frames
                .iter()
                .any(|f| f.module.contains("qemu-fuzz") || f.module.contains("videzzo"))
                .then_some("qtest")
        }),
    };
    Actor { thread, accel, frames, elsewhere: elsewhere && accel.is_some() }
}

/// Words for a space.
pub fn space_words(s: Space) -> &'static str {
    match s {
        Space::Pio => "I/O port",
        Space::Mmio => "memory",
    }
}
