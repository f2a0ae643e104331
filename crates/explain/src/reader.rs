//! The tolerant reader: from bytes to a [`Report`], line by line, in linear time and bounded memory.

use std::io::{BufRead, BufReader, Read};

use crate::clean::{self, MAX_LINE};
use crate::frame::{self, Balance};
use crate::model::{Format, Frame, Message, Report, Stack, StackKind};
use crate::{prose, report};

/// Frames stored of one stack; a recursion to the end of the stack has more, and repeats itself.
const MAX_FRAMES_PER_STACK: usize = 20_000;
/// Frames stored in all.
const MAX_FRAMES: usize = 60_000;
/// Stacks stored.
const MAX_STACKS: usize = 512;
/// Lines that one frame may be wrapped over.
const MAX_WRAP: usize = 64;
/// Lines of other text kept.
const MAX_PROSE: usize = 600;
/// Longest such line.
const MAX_PROSE_LINE: usize = 400;
/// Longest frame text.
const MAX_FRAME_TEXT: usize = 8 * 1024;

struct Open {
    text: String,
    balance: Balance,
    lines: usize,
    input_line: u64,
}

struct Reader {
    report: Report,
    open: Option<Open>,
    /// The stack being filled, if any.
    current: Option<Stack>,
    /// What the next stack is, as told by a heading.
    next_kind: StackKind,
    next_thread: Option<u32>,
    next_name: String,
    next_signalled: bool,
    pending: Vec<usize>,
    stored: usize,
    line: u64,
    /// The last stack ended with a heading or a blank line after it.
    heading: bool,
    signal_thread: Option<u32>,
    hyaline: Option<report::Builder>,
    first: bool,
}

/// Reads everything; never fails on the content.
///
/// # Errors
/// Only those of the underlying reader.
pub fn read(input: impl Read) -> std::io::Result<Report> {
    let mut r = Reader {
        report: Report::default(),
        open: None,
        current: None,
        next_kind: StackKind::Thread,
        next_thread: None,
        next_name: String::new(),
        next_signalled: false,
        pending: Vec::new(),
        stored: 0,
        line: 0,
        heading: false,
        signal_thread: None,
        hyaline: None,
        first: true,
    };
    let mut input = BufReader::with_capacity(64 * 1024, input);
    let mut buf = Vec::with_capacity(4096);
    loop {
        buf.clear();
        let n = read_line(&mut input, &mut buf)?;
        if n == 0 {
            break;
        }
        r.report.bytes += n as u64;
        r.line += 1;
        r.feed(&buf);
    }
    Ok(r.finish())
}

/// Reads one line of any length, keeping the first [`MAX_LINE`] bytes. A line that never ends (binary data)
/// is cut into pieces of 1 MiB, so that a carriage return or NUL-filled file is still read to its end.
fn read_line(input: &mut impl BufRead, buf: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut total = 0;
    loop {
        let chunk = match input.fill_buf() {
            Ok(c) => c,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if chunk.is_empty() {
            return Ok(total);
        }
        let (take, done) = match chunk.iter().position(|&b| b == b'\n') {
            Some(at) => (at + 1, true),
            None => (chunk.len(), false),
        };
        let room = MAX_LINE.saturating_sub(buf.len());
        buf.extend_from_slice(&chunk[..take.min(room)]);
        input.consume(take);
        total += take;
        if done || total >= 1 << 20 {
            return Ok(total);
        }
    }
}

impl Reader {
    fn feed(&mut self, raw: &[u8]) {
        if self.first {
            let t = String::from_utf8_lossy(raw);
            let t = t.trim();
            if !t.is_empty() {
                self.first = false;
                self.hyaline = report::Builder::start(t);
                if self.hyaline.is_some() {
                    return;
                }
            }
        }
        if let Some(b) = &mut self.hyaline {
            b.line(&String::from_utf8_lossy(raw));
            return;
        }
        let text = clean::plain(raw);
        let line = clean::unwrap_prefix(&text);
        if line.starts_with("--Type <") || line.starts_with("---Type <") {
            return;
        }
        if line.is_empty() {
            self.close_frame();
            return;
        }
        if clean::starts_frame(line) {
            self.close_frame();
            let mut balance = Balance::default();
            balance.feed(line);
            self.open = Some(Open { text: line.to_owned(), balance, lines: 1, input_line: self.line });
            return;
        }
        if let Some(open) = &mut self.open {
            let more = open.lines < MAX_WRAP
                && open.text.len() < MAX_FRAME_TEXT
                && (open.balance.open()
                    || open.text.ends_with(" at")
                    || open.text.ends_with(" from")
                    || line.starts_with("at ") && !line.starts_with("at 0x")
                    || line.starts_with("from ")
                    || (line.starts_with('(') && !open.balance.opened)
                    || (!open.balance.opened && open.text.ends_with(" in")));
            if more && !is_heading(line) {
                open.text.push(' ');
                open.text.push_str(line);
                open.balance.feed(line);
                open.lines += 1;
                return;
            }
            self.close_frame();
        }
        self.other(line);
    }

    fn close_frame(&mut self) {
        let Some(open) = self.open.take() else { return };
        let text: &str = &open.text;
        match frame::hash_frame(text) {
            Some((mut f, format)) => {
                f.input_line = open.input_line;
                self.push(f, format);
            }
            None => {
                let text = open.text;
                self.keep_prose(&text);
            }
        }
    }

    fn push(&mut self, f: Frame, format: Format) {
        self.report.frames += 1;
        let restart = match (&self.current, f.number) {
            (None, _) => true,
            (Some(_), _) if self.heading => true,
            (Some(s), Some(n)) => s.frames.last().and_then(|l| l.number).is_some_and(|last| n <= last),
            (Some(s), None) => s.frames.last().is_some_and(|l| l.number.is_some()) && format != s.format,
        };
        if restart {
            // The debugger shows frame 0 when the program stops, and again in the backtrace that follows.
            if let Some(s) = &mut self.current
                && let ([only], false) = (&s.frames[..], self.heading)
                && only.number == Some(0)
                && f.number == Some(0)
                && only.function == f.function
            {
                self.next_signalled |= std::mem::take(&mut s.signalled);
                self.next_thread = self.next_thread.or(s.thread);
                let mut earlier = s.messages.clone();
                earlier.append(&mut self.pending);
                self.pending = earlier;
            }
            self.close_stack();
            self.current = Some(Stack {
                kind: std::mem::replace(&mut self.next_kind, StackKind::Thread),
                thread: self.next_thread.take(),
                name: std::mem::take(&mut self.next_name),
                format,
                frames: Vec::new(),
                dropped: 0,
                messages: std::mem::take(&mut self.pending),
                signalled: std::mem::take(&mut self.next_signalled),
            });
            self.report.stacks_found += 1;
        }
        self.heading = false;
        if let Some(s) = &mut self.current {
            if s.format == Format::Names && format != Format::Names && s.frames.len() < 3 {
                s.format = format;
            }
            if s.frames.len() < MAX_FRAMES_PER_STACK && self.stored < MAX_FRAMES {
                s.frames.push(f);
                self.stored += 1;
            } else {
                s.dropped += 1;
            }
        }
    }

    fn close_stack(&mut self) {
        if let Some(s) = self.current.take()
            && self.report.stacks.len() < MAX_STACKS
        {
            self.report.stacks.push(s);
        }
    }

    fn message(&mut self, m: Message) {
        if self.report.messages.len() < MAX_PROSE {
            self.report.messages.push(m);
            self.pending.push(self.report.messages.len() - 1);
        }
    }

    fn keep_prose(&mut self, line: &str) {
        if self.report.prose.len() < MAX_PROSE && line.chars().filter(|c| c.is_alphanumeric()).count() >= 3 {
            self.report.prose.push(line.chars().take(MAX_PROSE_LINE).collect());
        }
    }

    /// A line that is neither a numbered frame nor its continuation.
    fn other(&mut self, line: &str) {
        // Sanitizers and Valgrind put ==pid== in front.
        let body = line
            .strip_prefix("==")
            .and_then(|r| r.find("==").map(|p| r[p + 2..].trim_start()))
            .unwrap_or(line);
        if self.fault(body) || self.thread_heading(body) || self.end_message(body) {
            self.keep_prose(line);
            return;
        }
        let bare = true;
        if let Some((mut f, format)) = frame::other_frame(body, bare) {
            f.input_line = self.line;
            // Valgrind starts a stack with "at".
            if format == Format::Valgrind && body.starts_with("at ") {
                self.heading = true;
            }
            self.push(f, format);
            return;
        }
        if let (Some(place), Some(s)) = (body.strip_prefix("at "), &mut self.current)
            && s.format == Format::Rust
        {
            if let Some(f) = s.frames.last_mut()
                && f.file.is_empty()
            {
                let mut it = place.trim().rsplitn(3, ':');
                let (_, line, path) = (it.next(), it.next(), it.next());
                f.file = path.unwrap_or("").to_owned();
                f.line = line.and_then(|l| l.parse().ok());
            }
            return;
        }
        self.keep_prose(line);
    }

    fn thread_heading(&mut self, s: &str) -> bool {
        let mut kind = StackKind::Thread;
        let mut thread = None;
        let mut name = String::new();
        let mut signalled = false;
        if let Some(r) = s
            .strip_prefix("Thread ")
            .or_else(|| s.strip_prefix("* thread #"))
            .or_else(|| s.strip_prefix("thread #"))
        {
            let digits = r.bytes().take_while(u8::is_ascii_digit).count();
            let after = r.get(digits..).unwrap_or("");
            if digits == 0 || digits > 9 {
                return false;
            }
            thread = r[..digits].parse().ok();
            let received = after.contains("received signal") || after.contains("hit ");
            if !(after.is_empty()
                || after.trim_start().starts_with(['(', '"', ',', ':'])
                || received
                || after.starts_with(" Crashed"))
            {
                return false;
            }
            if let Some(n) = after.split('"').nth(1) {
                n.clone_into(&mut name);
            }
            signalled =
                received || after.contains("Crashed") || after.contains("EXC_BAD") || s.starts_with('*');
            if received {
                if let Some(sig) = signal_in(after) {
                    self.message(Message::Signal(sig));
                }
                self.signal_thread = thread;
            }
        } else if let Some(r) = s.strip_prefix("Stack trace of thread ") {
            name = r.trim_end_matches([':', ' ', '\\']).to_owned();
        } else if s.starts_with("freed by thread")
            || s.starts_with("Freed by")
            || s.starts_with("is located") && s.contains("freed")
        {
            kind = StackKind::FreedBy;
        } else if s.starts_with("previously allocated by")
            || s.starts_with("allocated by thread")
            || s.starts_with("Block was alloc'd")
            || s.starts_with("Thread T") && s.contains(" created by ")
        {
            kind = StackKind::AllocatedBy;
        } else if s.starts_with("======= Backtrace") || s.starts_with("stack backtrace:") {
            // The C library's backtrace.
        } else if s == "======= Memory map: ========" {
            self.close_stack();
            self.heading = true;
            return true;
        } else {
            return false;
        }
        self.heading = true;
        self.next_kind = kind;
        self.next_thread = thread;
        self.next_name = name;
        self.next_signalled = signalled;
        true
    }

    /// Faulting addresses: gdb's `si_addr`, lldb's stop reason, the kernel's log. Never ends the search for more.
    fn fault(&mut self, s: &str) -> bool {
        let hex = |t: &str| {
            let t = t.trim_start().trim_start_matches("0x");
            let digits: String = t.chars().take_while(char::is_ascii_hexdigit).collect();
            u64::from_str_radix(&digits, 16).ok()
        };
        if let Some(at) = s.find(": segfault at ") {
            self.message(Message::Signal("SIGSEGV".into()));
            if let Some(a) = hex(&s[at + 14..]) {
                self.message(Message::Fault(a));
            }
            return true;
        }
        if let Some(at) = s.find("si_addr = 0x") {
            if let Some(a) = hex(&s[at + 10..]) {
                self.message(Message::Fault(a));
            }
        } else if s.contains("EXC_BAD_ACCESS") {
            self.message(Message::Signal("SIGSEGV".into()));
            if let Some(a) = s.find("address=0x").and_then(|at| hex(&s[at + 8..])) {
                self.message(Message::Fault(a));
            }
        }
        false
    }

    fn end_message(&mut self, s: &str) -> bool {
        if let Some(at) = s.find("Sanitizer: ") {
            let r = &s[at + "Sanitizer: ".len()..];
            if s.contains("ERROR:") || s.contains("WARNING:") || s.starts_with("SUMMARY") {
                if s.starts_with("SUMMARY") {
                    // The same fact once more; "N byte(s) leaked" is a total.
                    return true;
                }
                let kind = if r.starts_with("attempting double-free") {
                    "double-free"
                } else if r.starts_with("attempting free on address which was not malloc") {
                    "bad-free"
                } else if r.starts_with("data race") {
                    "data-race"
                } else if r.starts_with("detected memory leaks") {
                    "leak"
                } else {
                    r.split([' ', ':', '(']).next().unwrap_or("")
                };
                let addr = r.split("address ").nth(1).and_then(frame::number);
                if self.current.as_ref().is_some_and(|s| s.frames.len() < 3) {
                    // A stack that has hardly begun belongs to the report.
                } else {
                    self.heading = true;
                }
                if kind == "leak" {
                    self.message(Message::Leak(r.to_owned()));
                } else {
                    self.message(Message::Sanitizer { kind: kind.to_owned(), addr });
                }
                return true;
            }
        }
        // Valgrind: the kind first, the address after the stack.
        for (p, write) in [("Invalid read of size ", false), ("Invalid write of size ", true)] {
            if let Some(r) = s.strip_prefix(p) {
                self.heading = true;
                self.message(Message::Sanitizer { kind: "invalid-access".into(), addr: None });
                self.message(Message::BadAccess { write, size: frame::number(r) });
                return true;
            }
        }
        if let Some(r) = s.strip_prefix("Address 0x") {
            let digits: String = r.chars().take_while(char::is_ascii_hexdigit).collect();
            let addr = u64::from_str_radix(&digits, 16).ok();
            let kind = if r.contains("free'd") {
                Some("heap-use-after-free")
            } else if r.contains("bytes after a block") || r.contains("bytes before a block") {
                Some("heap-buffer-overflow")
            } else if r.contains("is not stack'd") {
                Some("SEGV")
            } else {
                None
            };
            if let (Some(kind), Some(s)) = (kind, &mut self.current)
                && self.report.messages.len() < MAX_PROSE
            {
                self.report.messages.push(Message::Sanitizer { kind: kind.into(), addr });
                s.messages.push(self.report.messages.len() - 1);
                self.heading = true;
                self.next_kind =
                    if kind == "heap-use-after-free" { StackKind::FreedBy } else { StackKind::AllocatedBy };
                return true;
            }
        }
        if let Some(at) = s.find("runtime error: ") {
            self.message(Message::Undefined(s[at + "runtime error: ".len()..].chars().take(200).collect()));
            return true;
        }
        for (p, write) in [("READ of size ", false), ("WRITE of size ", true)] {
            if let Some(r) = s.strip_prefix(p) {
                self.message(Message::BadAccess { write, size: frame::number(r) });
                return true;
            }
        }
        if let Some(r) = s.strip_prefix("The signal is caused by a ") {
            self.message(Message::BadAccess { write: r.starts_with("WRITE"), size: None });
            return true;
        }
        if s.starts_with("Direct leak of") || s.starts_with("Indirect leak of") {
            self.heading = true;
            self.message(Message::Leak(s.chars().take(120).collect()));
            return true;
        }
        if let Some(at) = s.find("libFuzzer: ") {
            self.message(Message::Fuzzer(s[at + 11..].chars().take(60).collect()));
            return true;
        }
        if s.contains("rogram terminated with")
            || s.contains("rogram received signal")
            || s.contains("hread received signal")
        {
            if let Some(sig) = signal_in(s) {
                self.message(Message::Signal(sig));
                self.next_signalled = true;
            }
            return true;
        }
        if (s.starts_with("Signal: ") || s.contains("stop reason = ") || s.starts_with("Exception Type:"))
            && let Some(sig) = signal_in(s)
        {
            self.message(Message::Signal(sig));
            return true;
        }
        // Assertion texts of glibc, BSD, glib.
        if let Some(at) = s.find("Assertion `") {
            let r = &s[at + "Assertion `".len()..];
            if let Some(end) = r.find("' failed") {
                let file = s[..at]
                    .split(':')
                    .find(|p| p.trim_end().ends_with(".c") || p.trim_end().ends_with(".h"))
                    .unwrap_or("");
                self.message(Message::Assert {
                    text: r[..end].chars().take(300).collect(),
                    file: file.trim().to_owned(),
                });
                return true;
            }
        }
        for mark in ["assertion failed: (", "assertion failed (", "Assertion failed: ("] {
            if let Some(at) = s.find(mark) {
                let r = &s[at + mark.len()..];
                let end = r.rfind(')').unwrap_or(r.len());
                let file = s[..at].split(':').find(|p| p.ends_with(".c") || p.ends_with(".h")).unwrap_or("");
                self.message(Message::Assert {
                    text: r[..end].chars().take(300).collect(),
                    file: file.trim().to_owned(),
                });
                return true;
            }
        }
        if let Some(r) =
            s.strip_prefix("assertion \"").or_else(|| s.find(": assertion \"").map(|p| &s[p + 13..]))
            && let Some(end) = r.find("\" failed")
        {
            self.message(Message::Assert { text: r[..end].chars().take(300).collect(), file: String::new() });
            return true;
        }
        if s.contains("code should not be reach") {
            self.message(Message::NotReached(s.chars().take(200).collect()));
            return true;
        }
        for mark in [
            "*** glibc detected ***",
            "*** Error in `",
            "*** buffer overflow detected",
            "*** stack smashing detected",
            "malloc(): ",
            "free(): ",
            "corrupted size vs. prev_size",
            "double free or corruption",
            "munmap_chunk(): ",
            "realloc(): ",
        ] {
            if s.starts_with(mark) {
                self.message(Message::LibC(s.trim_matches(['*', ' ']).chars().take(200).collect()));
                return true;
            }
        }
        for mark in [
            "error adding ioeventfd",
            "' panicked at ",
            "error deleting ioeventfd",
            "qemu: hardware error",
            "o-routine re-entered recursively",
            "o-routine was already scheduled",
            "Guest moved used index",
            "Virtqueue size exceeded",
            "qemu: fatal:",
            "Looped descriptor",
            "KVM internal error",
            "error: kvm run failed",
            "Bad ram offset",
            "Unexpected error in",
        ] {
            if s.contains(mark) {
                self.message(Message::Program(s.chars().take(200).collect()));
                return true;
            }
        }
        false
    }

    fn finish(mut self) -> Report {
        self.close_frame();
        self.close_stack();
        let mut r = self.report;
        r.lines = self.line;
        if let Some(b) = self.hyaline {
            b.finish(&mut r);
        }
        if let Some(t) = self.signal_thread {
            for s in &mut r.stacks {
                if s.thread == Some(t) {
                    s.signalled = true;
                }
            }
        }
        let dropped: u64 = r.stacks.iter().map(|s| s.dropped).sum();
        if dropped > 0 {
            r.limits.push(format!("{dropped} frames beyond the first {MAX_FRAMES_PER_STACK} of a stack or {MAX_FRAMES} in all were counted, not kept"));
        }
        if r.stacks_found as usize > r.stacks.len() {
            r.limits.push(format!(
                "{} stacks beyond the first {MAX_STACKS} were left out",
                r.stacks_found as usize - r.stacks.len()
            ));
        }
        if (r.stacks.iter().all(|s| s.frames.is_empty()) || r.frames < 2)
            && let Some(stack) = prose::stack(&r.prose)
        {
            r.frames += stack.frames.len() as u64;
            r.stacks_found += 1;
            r.stacks.push(stack);
        }
        r.disagreements = prose::disagreements(&r);
        r
    }
}

/// True when a line begins something new even while a frame is still open.
fn is_heading(s: &str) -> bool {
    s.starts_with("Thread ") && s.contains('(')
        || s.starts_with("==")
        || s.starts_with("Stack trace of thread ")
        || s.starts_with("freed by")
        || s.starts_with("previously allocated")
}

fn signal_in(s: &str) -> Option<String> {
    let at = s.find("SIG")?;
    let name: String = s[at..].chars().take_while(char::is_ascii_uppercase).collect();
    (name.len() > 4).then_some(name)
}
