//! One frame: from text to [`Frame`].

use crate::model::{Arg, Format, Frame};

/// Longest argument text kept.
const MAX_ARG_TEXT: usize = 100;
/// Most arguments kept of one frame.
const MAX_ARGS: usize = 32;

/// Follows brackets and strings over the lines of a frame, so that each character is looked at once.
#[derive(Debug, Default, Clone)]
pub(crate) struct Balance {
    depth: u32,
    quote: Option<char>,
    escaped: bool,
    /// A `(` was seen.
    pub(crate) opened: bool,
}

impl Balance {
    pub(crate) fn feed(&mut self, text: &str) {
        let mut previous = ' ';
        for c in text.chars() {
            if let Some(q) = self.quote {
                if self.escaped {
                    self.escaped = false;
                } else if c == '\\' {
                    self.escaped = true;
                } else if c == q {
                    self.quote = None;
                }
            } else {
                match c {
                    '"' => self.quote = Some('"'),
                    // A character constant follows a number: val=8 '\b'.
                    '\'' if previous == ' ' => self.quote = Some('\''),
                    '(' | '{' => {
                        self.depth += 1;
                        self.opened |= c == '(';
                    }
                    ')' | '}' => self.depth = self.depth.saturating_sub(1),
                    _ => {}
                }
            }
            previous = c;
        }
        // A character constant never spans lines.
        if self.quote == Some('\'') {
            self.quote = None;
        }
    }

    pub(crate) fn open(&self) -> bool {
        self.depth > 0 || self.quote.is_some()
    }
}

/// Removes what compilers and linkers add to a name.
pub(crate) fn normal_name(name: &str) -> String {
    let mut n = name.trim().trim_end_matches("()");
    if matches!(n, "??" | "n/a" | "???" | "<unknown>" | "in" | "<null>") {
        return String::new();
    }
    if let Some(at) = n.find('@') {
        // name@@GLIBC_2.3.2, name@plt
        if at > 0 {
            n = &n[..at];
        }
    }
    for mark in [".constprop", ".isra", ".part", ".cold", ".lto_priv", ".llvm", ".localalias", ".clone"] {
        if let Some(at) = n.find(mark) {
            n = &n[..at];
        }
    }
    // A C++ or Rust signature: keep the path.
    if !n.starts_with('<')
        && let Some(at) = n.find('(')
        && at > 0
    {
        n = &n[..at];
    }
    // name+0x12
    if let Some(at) = n.find("+0x") {
        n = &n[..at];
    }
    n.strip_prefix("__GI_").unwrap_or(n).to_owned()
}

fn hex(s: &str) -> Option<u64> {
    u64::from_str_radix(s.strip_prefix("0x").or_else(|| s.strip_prefix("0X"))?, 16).ok()
}

/// Reads a number in any of the forms debuggers print.
pub(crate) fn number(s: &str) -> Option<u64> {
    let s = s.trim();
    let token = s.split([' ', ',', ')', '<']).next().unwrap_or("");
    match token {
        "true" | "TRUE" => return Some(1),
        "false" | "FALSE" => return Some(0),
        "" => return None,
        _ => {}
    }
    if let Some(v) = hex(token) {
        return Some(v);
    }
    if let Some(n) = token.strip_prefix('-') {
        return n.parse::<u64>().ok().map(u64::wrapping_neg);
    }
    token.parse().ok()
}

/// Byte index of the bracket that closes the one at the start of `s`.
fn closing(s: &str) -> Option<usize> {
    let mut b = Balance::default();
    let mut start = 0;
    for (i, c) in s.char_indices() {
        // Feeding single characters keeps one definition of quoting.
        if c == ')' || i == 0 {
            b.feed(s.get(start..i + c.len_utf8())?);
            start = i + c.len_utf8();
            if i > 0 && !b.open() {
                return Some(i);
            }
        }
    }
    None
}

fn split_args(s: &str) -> Vec<&str> {
    let (mut out, mut depth, mut quote, mut escaped, mut start, mut prev) =
        (Vec::new(), 0i32, None, false, 0, ' ');
    for (i, c) in s.char_indices() {
        if let Some(q) = quote {
            if escaped {
                escaped = false;
            } else if c == '\\' {
                escaped = true;
            } else if c == q {
                quote = None;
            }
        } else {
            match c {
                '"' => quote = Some('"'),
                '\'' if prev == ' ' => quote = Some('\''),
                '(' | '{' | '[' => depth += 1,
                ')' | '}' | ']' => depth -= 1,
                ',' if depth <= 0 => {
                    out.push(&s[start..i]);
                    start = i + 1;
                }
                _ => {}
            }
        }
        prev = c;
    }
    out.push(&s[start..]);
    out
}

fn shorten(s: &str) -> String {
    s.chars().take(MAX_ARG_TEXT).collect()
}

/// Reads `a=1, b=b@entry=2, ...`.
pub(crate) fn parse_args(s: &str) -> Vec<Arg> {
    let mut out = Vec::new();
    for part in split_args(s) {
        let part = part.trim();
        let Some((name, value)) = part.split_once('=') else { continue };
        let mut name = name.trim().rsplit(' ').next().unwrap_or("").trim_start_matches('*');
        let mut value = value.trim();
        let mut entry = false;
        if let Some(base) = name.strip_suffix("@entry") {
            name = base;
            entry = true;
        }
        // List archives hide what looks like an address: x@entry=1 becomes address@hidden=1.
        for hidden in ["address@hidden=", "[email protected]="] {
            if let Some(rest) = value.strip_prefix(hidden) {
                value = rest.trim();
                entry = true;
            }
        }
        // x=x@entry=1
        if let Some(rest) = value.strip_prefix(name).and_then(|r| r.strip_prefix("@entry=")) {
            value = rest.trim();
            entry = true;
        }
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            continue;
        }
        out.push(Arg { name: name.to_owned(), value: number(value), entry, text: shorten(value) });
        if out.len() >= MAX_ARGS {
            break;
        }
    }
    out
}

/// Is the text in brackets a module (`lib.so + 0x12`, `/lib/x.so+0x12`) rather than arguments?
fn module_of(inner: &str) -> Option<(String, Option<u64>)> {
    let t = inner.trim();
    if t.contains('=') || t.is_empty() {
        return None;
    }
    if let Some((m, off)) = t.rsplit_once('+') {
        let off = off.trim();
        if hex(off).is_some() || off.is_empty() {
            return Some((m.trim().to_owned(), hex(off)));
        }
    }
    (t.starts_with('/') || t == "<unknown module>").then(|| (t.to_owned(), None))
}

fn set_place(f: &mut Frame, place: &str) {
    let p = place.trim().trim_end_matches(['.', ',']);
    if p.is_empty() {
        return;
    }
    if let Some(inner) = p.strip_prefix('(') {
        let inner = inner.split(')').next().unwrap_or("");
        if let Some((m, off)) = module_of(inner) {
            f.module = m;
            f.module_offset = off;
        }
        return;
    }
    // file.c:12 or file.c:12:3; Windows paths have a colon of their own.
    let p = p.split(" (").next().unwrap_or(p);
    let mut parts = p.rsplitn(3, ':');
    let last = parts.next().unwrap_or("");
    let mid = parts.next();
    let first = parts.next();
    match (first, mid, last.parse::<u32>().ok()) {
        (Some(path), Some(m), Some(_)) if m.parse::<u32>().is_ok() => {
            f.file = path.to_owned();
            f.line = m.parse().ok();
        }
        (_, Some(_), Some(line)) => {
            f.file = p[..p.len() - last.len() - 1].to_owned();
            f.line = Some(line);
        }
        _ => {
            if let Some((m, off)) =
                p.rsplit_once('+').and_then(|(m, o)| hex(o.trim_end_matches(')')).map(|o| (m, o)))
            {
                f.module = m.to_owned();
                f.module_offset = Some(off);
            } else {
                f.file = p.to_owned();
            }
        }
    }
}

/// The rest of a frame after number and address: name, arguments, place.
fn name_and_place(f: &mut Frame, rest: &str) -> Format {
    let mut format = Format::GdbBt;
    let rest = rest.trim();
    if rest.starts_with('<')
        && let Some(end) = rest.find('>')
        && rest[..end].contains("signal handler")
    {
        f.function = "<signal handler called>".into();
        return format;
    }
    // The name: up to a space outside of brackets.
    let mut depth = 0i32;
    let mut end = rest.len();
    let mut prev = ' ';
    for (i, c) in rest.char_indices() {
        match c {
            '(' if prev == ' ' && depth == 0 => {
                end = i;
                break;
            }
            '(' | '<' => depth += 1,
            ')' | '>' => depth -= 1,
            ' ' if depth <= 0 => {
                let so_far = &rest[..i];
                if !matches!(so_far, "operator" | "non-virtual" | "virtual") {
                    end = i;
                    break;
                }
            }
            _ => {}
        }
        prev = c;
    }
    let raw = rest[..end].trim();
    let mut after = rest[end..].trim();
    // A lone place instead of a name: "#3 0x7f843cedf8dc  (<unknown module>)".
    f.function = normal_name(raw);
    if raw.contains('/') && !raw.contains("::") {
        f.function.clear();
        set_place(f, raw);
        return Format::Sanitizer;
    }
    if after.starts_with('(') {
        if let Some(close) = closing(after) {
            let inner = &after[1..close];
            if let Some((m, off)) = module_of(inner) {
                f.module = m;
                f.module_offset = off;
                format = if inner.contains(" + ") { Format::SystemdCoredump } else { Format::Sanitizer };
            } else {
                f.args = parse_args(inner);
            }
            after = after[close + 1..].trim();
        } else {
            // Cut in the middle of the arguments.
            f.args = parse_args(&after[1..]);
            return format;
        }
    }
    if let Some(p) = after.strip_prefix("at ") {
        set_place(f, p);
    } else if let Some(p) = after.strip_prefix("from ") {
        f.module = p.trim().to_owned();
    } else if !after.is_empty() && !after.starts_with('(') {
        let token = after.split_whitespace().next().unwrap_or("");
        if token.contains(['/', '.', ':', '+']) {
            set_place(f, token);
            format = Format::Sanitizer;
        }
    } else if f.args.is_empty() && f.module.is_empty() && !rest.contains('(') {
        format = Format::Names;
    }
    format
}

/// Reads a frame whose text starts with `#N`.
pub(crate) fn hash_frame(text: &str) -> Option<(Frame, Format)> {
    let rest = text.strip_prefix('#')?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let mut f = Frame { number: rest.get(..digits)?.parse().ok(), ..Frame::default() };
    let mut rest = rest[digits..].trim_start_matches([':', ' ', '\t']);
    let mut addressed = false;
    if rest.starts_with("0x") {
        let n = rest.find([' ', '\t']).unwrap_or(rest.len());
        if let Some(pc) = hex(&rest[..n]) {
            f.pc = Some(pc);
            rest = rest[n..].trim_start();
            addressed = true;
        }
    }
    let mut has_in = false;
    if let Some(r) = rest.strip_prefix("in ") {
        rest = r;
        has_in = true;
    }
    // Not a frame: "#2      INITED cov: 3 ft: 4 corp: 1/1b", "#1 reason", "#5 the device hangs".
    if !addressed && !has_in {
        let mut words = rest.split_whitespace();
        let first = words.next().unwrap_or("");
        let second = words.next().unwrap_or("");
        let ident = !first.is_empty()
            && first.bytes().all(|b| {
                b.is_ascii_alphanumeric()
                    || matches!(
                        b,
                        b'_' | b':' | b'.' | b'@' | b'~' | b'<' | b'>' | b'?' | b'(' | b')' | b'*' | b','
                    )
            });
        let placed = second.is_empty()
            || second.starts_with('(')
            || second.contains(['/', ':']) && !second.ends_with(':')
            || second == "at"
            || second == "from"
            || second == "handler";
        // Rust and C++ names may hold spaces: Vec<T, A>::push<T, A> (self=0x1).
        let path = first.contains("::") && rest.contains(" (") && rest.contains(')');
        if !(path || first.starts_with("<signal") || first.contains('(') || (ident && placed))
            || first.chars().all(|c| c.is_ascii_digit())
        {
            return None;
        }
    }
    let format = name_and_place(&mut f, rest);
    // "#0  0x12 in  () at lib": the brackets are empty and the place is a library.
    if f.line.is_none()
        && f.module.is_empty()
        && (f.file.contains(".so") || f.file.ends_with(".dll") || f.file.ends_with(".dylib"))
    {
        f.module = std::mem::take(&mut f.file);
    }
    Some((f, format))
}

/// Reads one of the forms that do not start with `#`. `bare` allows names without an address.
pub(crate) fn other_frame(s: &str, bare: bool) -> Option<(Frame, Format)> {
    let b = s.as_bytes();
    // glibc: /lib/libc.so.6(abort+0x17)[0x7f..], qemu[0x494283], ./prog() [0x400a]
    if b.last() == Some(&b']')
        && let Some(at) = s.rfind("[0x")
    {
        let head = s[..at].trim_end();
        if let Some(pc) = hex(&s[at + 1..s.len() - 1])
            && !head.is_empty()
            && !head.contains(' ')
            && !head.starts_with('[')
        {
            let mut f = Frame { pc: Some(pc), ..Frame::default() };
            if let Some((module, sym)) = head.split_once('(') {
                module.clone_into(&mut f.module);
                let sym = sym.trim_end_matches(')');
                let (name, off) = sym.split_once('+').unwrap_or((sym, ""));
                f.function = normal_name(name);
                if f.function.is_empty() {
                    f.module_offset = hex(off);
                }
            } else {
                head.clone_into(&mut f.module);
            }
            return Some((f, Format::GlibcBacktrace));
        }
    }
    // lldb: frame #3: 0x1 module`name(a=1) at file.c:3:4
    if let Some(r) = s.trim_start_matches("* ").strip_prefix("frame #") {
        let digits = r.bytes().take_while(u8::is_ascii_digit).count();
        let mut f = Frame { number: r.get(..digits)?.parse().ok(), ..Frame::default() };
        let r = r[digits..].trim_start_matches([':', ' ']);
        let n = r.find(' ')?;
        f.pc = hex(&r[..n]);
        let r = r[n..].trim_start();
        let (module, sym) = r.split_once('`').unwrap_or((r, ""));
        module.trim().clone_into(&mut f.module);
        let (sym, place) = sym.rsplit_once(" at ").unwrap_or((sym, ""));
        let (name, args) = sym.split_once('(').unwrap_or((sym, ""));
        f.function = normal_name(name.split(" + ").next().unwrap_or(name));
        f.args = parse_args(args.trim_end_matches(')'));
        set_place(&mut f, place);
        return Some((f, Format::Lldb));
    }
    // Valgrind: "at 0x4C2: name (file.c:12)" and "by 0x...".
    for p in ["at 0x", "by 0x"] {
        if let Some(r) = s.strip_prefix(p) {
            let (pc, sym) = r.split_once(": ")?;
            let mut f = Frame { pc: u64::from_str_radix(pc, 16).ok(), ..Frame::default() };
            f.pc?;
            let (name, place) = sym.split_once(" (").unwrap_or((sym, ""));
            f.function = normal_name(name);
            set_place(&mut f, place.trim_end_matches(')').trim_start_matches("in "));
            return Some((f, Format::Valgrind));
        }
    }
    let digits = b.iter().take_while(|c| c.is_ascii_digit()).count();
    if (1..=5).contains(&digits) {
        let number: Option<u32> = s[..digits].parse().ok();
        let r = &s[digits..];
        // Rust: "  12: name" or "  12: 0x5581 - name"
        if let Some(r) = r.strip_prefix(": ") {
            let r = r.trim_start();
            let mut f = Frame { number, ..Frame::default() };
            let name = match r.split_once(" - ") {
                Some((pc, name)) if pc.trim_start().starts_with("0x") => {
                    f.pc = hex(pc.trim());
                    name
                }
                _ => r,
            };
            if !name.is_empty()
                && !name.contains(' ')
                && (f.pc.is_some() || name.contains("::") || name.contains('_'))
            {
                f.function = normal_name(name);
                return Some((f, Format::Rust));
            }
            return None;
        }
        // macOS: "3   qemu-system-x86_64   0x000000010  name + 12"
        let mut it = r.split_whitespace();
        if let (Some(module), Some(pc), Some(name)) = (it.next(), it.next(), it.next())
            && let (Some(pc), true) = (hex(pc), r.starts_with([' ', '\t']))
        {
            let f = Frame {
                number,
                pc: Some(pc),
                function: normal_name(name),
                module: module.to_owned(),
                ..Frame::default()
            };
            let f = if name.starts_with("0x") { Frame { function: String::new(), ..f } } else { f };
            return Some((f, Format::MacosCrash));
        }
    }
    // A frame that lost its number: "name (a=1) at file.c:12".
    let name_end = s.find(" (")?;
    let name = s.get(..name_end)?;
    let ident = !name.is_empty() && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'.');
    if bare && ident && (s.contains(") at ") || s.contains(") from ")) {
        let mut f = Frame::default();
        let format = name_and_place(&mut f, s);
        if f.line.is_some() || !f.module.is_empty() {
            return Some((f, if format == Format::GdbBt { Format::Names } else { format }));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(s: &str) -> (Frame, Format) {
        hash_frame(s).expect("a frame")
    }

    #[test]
    fn gdb_forms() {
        let (f, k) = one(
            "#13 0x0000555555a1 in some_write (opaque=0x5555, addr=addr@entry=18, val=<optimized out>, s=0x1 \"a, (b\", c=8 '\\b') at ../hw/x/y.c:617",
        );
        assert_eq!(k, Format::GdbBt);
        assert_eq!((f.number, f.pc), (Some(13), Some(0x5555_55a1)));
        assert_eq!(f.function, "some_write");
        assert_eq!(f.num("addr"), Some(18));
        assert!(f.arg("addr").is_some_and(|a| a.entry));
        assert_eq!(f.num("val"), None);
        assert_eq!(f.num("c"), Some(8));
        assert_eq!((f.file.as_str(), f.line), ("../hw/x/y.c", Some(617)));
        let (f, _) = one("#26 0x00007f3cd384e51a in  () at /usr/lib64/libc.so.6");
        assert!(!f.named());
        assert_eq!(f.module, "/usr/lib64/libc.so.6");
        let (f, _) = one("#1  0x00007f4b in abort@@GLIBC_2.2.5 () from /lib64/libc.so.6");
        assert_eq!((f.function.as_str(), f.module.as_str()), ("abort", "/lib64/libc.so.6"));
        let (f, _) = one("#5  <signal handler called>");
        assert_eq!(f.function, "<signal handler called>");
        let (f, _) = one(
            "#3  foo (a=1, b=(unknown: 0), mr=0x1 <io_mem_unassigned>, attrs=..., attrs@entry=...) at /a b/c.c:7",
        );
        assert_eq!((f.num("a"), f.num("mr"), f.line), (Some(1), Some(1), Some(7)));
        let (f, _) = one("#3  foo (a=-1, b=1, cut in the mid");
        assert_eq!((f.num("a"), f.num("b")), (Some(u64::MAX), Some(1)));
    }

    #[test]
    fn sanitizer_forms() {
        let (f, k) = one("#1 0x55b in do_it.part.0 /x/../hw/a.c:12:3");
        assert_eq!(
            (f.function.as_str(), f.file.as_str(), f.line, k),
            ("do_it", "/x/../hw/a.c", Some(12), Format::Sanitizer)
        );
        let (f, _) = one("#2 0x55b in fuzzer::Fuzzer::Run(unsigned char*, int (*)(char)) /x/F.cpp:5:1");
        assert_eq!((f.function.as_str(), f.line), ("fuzzer::Fuzzer::Run", Some(5)));
        let (f, _) = one("#3 0x7f8  (/lib/libc.so.6+0x1234) (BuildId: 55)");
        assert!(!f.named());
        assert_eq!((f.module.as_str(), f.module_offset), ("/lib/libc.so.6", Some(0x1234)));
        let (f, _) = one("#0 raise");
        assert_eq!(f.function, "raise");
        let (f, _) = one("#4 0x1 in operator new(unsigned long)");
        assert_eq!(f.function, "operator new");
        assert!(hash_frame("#2      INITED cov: 3 ft: 4").is_none());
        assert!(hash_frame("#1 the device stops").is_none());
    }

    #[test]
    fn other_forms() {
        let (f, k) = one("#5  0x0000000000ba80be get_it (qemu-system-i386 + 0x6d00be)");
        assert_eq!(
            (f.function.as_str(), f.module.as_str(), f.module_offset, k),
            ("get_it", "qemu-system-i386", Some(0x6d_00be), Format::SystemdCoredump)
        );
        let (f, k) = other_frame("/usr/lib/libc.so.6(__fortify_fail+0x37)[0x7f05]", false).expect("frame");
        assert_eq!((f.function.as_str(), k), ("__fortify_fail", Format::GlibcBacktrace));
        assert!(other_frame("qemu[0x494283]", false).is_some());
        let (f, k) = other_frame(
            "frame #2: 0x01 qemu-system-x86_64`cpu_outb(addr=49216, val='\\b') at ioport.c:60:5",
            false,
        )
        .expect("frame");
        assert_eq!(
            (f.function.as_str(), f.num("addr"), f.line, k),
            ("cpu_outb", Some(49216), Some(60), Format::Lldb)
        );
        let (f, _) = other_frame("by 0x4C2A: pick (some.c:12)", false).expect("frame");
        assert_eq!((f.function.as_str(), f.line), ("pick", Some(12)));
        let (f, _) = other_frame("12: hyaline::run", false).expect("frame");
        assert_eq!(f.function, "hyaline::run");
        let (f, _) = other_frame("3   qemu-system-x86_64   0x000000010a  abort + 12", false).expect("frame");
        assert_eq!(f.function, "abort");
        assert!(other_frame("name (a=1) at file.c:12", true).is_some());
        assert!(other_frame("I saw it (yes) at noon", true).is_none());
    }
}
