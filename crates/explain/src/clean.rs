//! Takes the packaging off a line: colour codes, HTML, quoting, time stamps, prompts.

use std::borrow::Cow;

/// Longest line kept; the rest of a longer line is dropped.
pub(crate) const MAX_LINE: usize = 16 * 1024;

/// Removes escape sequences, control characters and HTML, leaving the text of the line.
pub(crate) fn plain(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let text: Cow<'_, str> =
        if text.chars().any(|c| (c.is_control() && c != '\t') || c == '\u{a0}' || c == '\u{200b}') {
            Cow::Owned(strip_control(&text))
        } else {
            text
        };
    if text.contains('&') || (text.contains('<') && text.contains('>')) {
        strip_html(&text)
    } else {
        text.into_owned()
    }
}

fn strip_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // Control sequence: parameters up to a letter.
                Some('[') => {
                    for d in chars.by_ref() {
                        if ('@'..='~').contains(&d) {
                            break;
                        }
                    }
                }
                // Operating system command: up to BEL or ESC \.
                Some(']') => {
                    let mut esc = false;
                    for d in chars.by_ref() {
                        if d == '\u{7}' || (esc && d == '\\') {
                            break;
                        }
                        esc = d == '\u{1b}';
                    }
                }
                _ => {}
            },
            '\t' => out.push('\t'),
            '\u{a0}' => out.push(' '),
            '\u{200b}' | '\u{feff}' => {}
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// HTML elements that mail archives and web pages leave in; anything else in angle brackets is the
/// debugger's (`<optimized out>`, `<address_space_io>`).
const TAGS: &[&str] = &[
    "a",
    "b",
    "br",
    "code",
    "dd",
    "div",
    "dl",
    "dt",
    "em",
    "font",
    "hr",
    "i",
    "li",
    "ol",
    "p",
    "pre",
    "samp",
    "small",
    "span",
    "strong",
    "td",
    "th",
    "tr",
    "tt",
    "u",
    "ul",
    "blockquote",
    "body",
    "html",
    "table",
    "tbody",
];

fn strip_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['&', '<']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(len) = tag_len(rest) {
            rest = &rest[len..];
        } else if let Some((len, c)) = entity(rest) {
            out.push(c);
            rest = &rest[len..];
        } else {
            let n = rest.chars().next().map_or(1, char::len_utf8);
            out.push_str(&rest[..n]);
            rest = &rest[n..];
        }
    }
    out.push_str(rest);
    out
}

fn tag_len(s: &str) -> Option<usize> {
    let body = s.strip_prefix('<')?;
    // Tags longer than this are not looked for, which keeps the search linear.
    let window = &body.as_bytes()[..body.len().min(300)];
    let end = window.iter().position(|&b| b == b'>')?;
    let inner = body.get(..end)?;
    let name: String = inner
        .trim_start_matches('/')
        .chars()
        .take_while(|c| c.is_ascii_alphanumeric())
        .collect::<String>()
        .to_lowercase();
    let after = inner.trim_start_matches('/').get(name.len()..).unwrap_or("");
    let shaped = after.is_empty()
        || after.starts_with('/')
        || (after.starts_with(' ') && after.contains('='))
        || after == " /";
    (shaped && TAGS.contains(&name.as_str())).then_some(end + 2)
}

fn entity(s: &str) -> Option<(usize, char)> {
    let body = s.strip_prefix('&')?;
    let end = body.bytes().take(9).position(|b| b == b';')?;
    let name = body.get(..end)?;
    let c = match name {
        "lt" => '<',
        "gt" => '>',
        "amp" => '&',
        "quot" => '"',
        "apos" => '\'',
        "nbsp" => ' ',
        _ => {
            let n = name.strip_prefix('#')?;
            let v = match n.strip_prefix(['x', 'X']) {
                Some(h) => u32::from_str_radix(h, 16).ok()?,
                None => n.parse().ok()?,
            };
            let c = char::from_u32(v)?;
            if c.is_control() { ' ' } else { c }
        }
    };
    Some((end + 2, c))
}

/// True when the text starts with a frame number, `#12 ` or `#12:`.
pub(crate) fn starts_frame(s: &str) -> bool {
    let Some(rest) = s.strip_prefix('#') else { return false };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    (1..=6).contains(&digits) && rest.as_bytes().get(digits).is_none_or(|b| matches!(b, b' ' | b'\t' | b':'))
}

/// Takes quoting, list marks, time stamps, log prefixes and prompts from the front of a line.
pub(crate) fn unwrap_prefix(line: &str) -> &str {
    let mut s = line.trim();
    // A trailing backslash is left by texts that were pasted into a shell or Markdown.
    s = s.strip_suffix('\\').map_or(s, str::trim_end);
    for _ in 0..12 {
        if starts_frame(s) {
            return s;
        }
        let Some(next) = one_prefix(s) else { break };
        s = next.trim_start();
    }
    if let Some(at) = inner_frame(s) {
        return &s[at..];
    }
    s
}

fn one_prefix(s: &str) -> Option<&str> {
    let b = s.as_bytes();
    match b.first()? {
        b'>' | b'|' => return Some(&s[1..]),
        b'(' => {
            for p in ["(gdb)", "(lldb)", "(rr)", "(udb)"] {
                if let Some(r) = s.strip_prefix(p) {
                    return Some(r);
                }
            }
        }
        b'[' => {
            // [   4.820927] and [2021-03-04 10:00:00] and [T1], but not [Switching to Thread ...].
            let end = b.iter().take(40).position(|&c| c == b']')?;
            let inner = s.get(1..end)?;
            if inner.bytes().any(|c| c.is_ascii_digit())
                && inner.bytes().all(|c| {
                    c.is_ascii_digit() || matches!(c, b' ' | b'.' | b':' | b'-' | b'T' | b'Z' | b'+' | b',')
                })
            {
                return s.get(end + 1..);
            }
        }
        b'*' | b'-' if b.get(1) == Some(&b' ') && starts_frame(s[2..].trim_start()) => return Some(&s[2..]),
        b'0'..=b'9' => {
            let n = b
                .iter()
                .take_while(|c| {
                    c.is_ascii_digit() || matches!(c, b':' | b'.' | b'-' | b'T' | b'Z' | b'+' | b',')
                })
                .count();
            let stamp = &s[..n];
            let colons = stamp.bytes().filter(|&c| c == b':').count();
            let dashes = stamp.bytes().filter(|&c| c == b'-').count();
            if b.get(n) == Some(&b' ') && (colons >= 2 || (dashes >= 2 && n >= 10)) {
                return Some(&s[n..]);
            }
            // A line number of a paste site before a frame.
            if b.get(n).is_some_and(|c| matches!(c, b' ' | b'\t' | b'|'))
                && starts_frame(s[n + 1..].trim_start())
            {
                return Some(&s[n + 1..]);
            }
            // libvirt: "1615.123: 4711: info :"
            if n > 3
                && colons == 1
                && stamp.ends_with(':')
                && stamp.contains('.')
                && stamp.contains(|c: char| c.is_ascii_digit())
                && starts_frame(s[n..].trim_start())
            {
                return Some(&s[n..]);
            }
        }
        b'A'..=b'Z' => {
            // Syslog: "Mar 04 10:11:12 host program[pid]: ".
            const MONTHS: [&str; 12] =
                ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
            if MONTHS.iter().any(|m| s.starts_with(m)) && b.get(3) == Some(&b' ') {
                let mut it = s.splitn(6, ' ').filter(|p| !p.is_empty());
                let (_, day, time) = (it.next()?, it.next()?, it.next()?);
                if day.parse::<u8>().is_ok() && time.bytes().filter(|&c| c == b':').count() == 2 {
                    let end = s.find("]: ").map(|p| p + 3).or_else(|| s.find(": ").map(|p| p + 2))?;
                    return s.get(end..);
                }
            }
            // "Foo Bar wrote" quoting marks such as "AB> ".
            if let Some(p) = s.bytes().take(4).position(|c| c == b'>')
                && p > 0
                && s.as_bytes()[..p].iter().all(u8::is_ascii_uppercase)
            {
                return s.get(p + 1..);
            }
        }
        _ => {}
    }
    None
}

/// Finds `#N  0x...` or `#N name (` behind a short prefix that is not one of the known ones.
fn inner_frame(s: &str) -> Option<usize> {
    let window = s.as_bytes().get(..s.len().min(120))?;
    let at = window.windows(2).position(|w| w[0] == b'#' && w[1].is_ascii_digit())?;
    let before = s.get(..at)?.trim_end();
    let rest = s.get(at..)?;
    if at == 0 || !starts_frame(rest) || !(before.ends_with([':', ']', '>', '|', ')'])) {
        return None;
    }
    let after = rest[1..].trim_start_matches(|c: char| c.is_ascii_digit());
    let after = after.trim_start();
    (after.starts_with("0x") || after.contains(" in ") || after.contains('(')).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packaging_comes_off() {
        for (from, to) in [
            ("> > #3  0x12 in f () at a.c:1", "#3  0x12 in f () at a.c:1"),
            ("(gdb) #0  f ()", "#0  f ()"),
            ("[    4.820927] #1 0x1 in g a.c:2", "#1 0x1 in g a.c:2"),
            ("2021-03-04T10:11:12.123Z #1 0x1 in g", "#1 0x1 in g"),
            ("2021-03-04 10:11:12,123 #1 0x1 in g", "#1 0x1 in g"),
            ("Mar 04 10:11:12 host systemd-coredump[77]: #4  0x00 f (m + 0x1)", "#4  0x00 f (m + 0x1)"),
            ("   #4  0x00 f (m + 0x1) \\", "#4  0x00 f (m + 0x1)"),
            ("qemu[12]: #4  0x00 in f ()", "#4  0x00 in f ()"),
            ("  12 #3 0x1 in f ()", "#3 0x1 in f ()"),
            ("[Switching to Thread 0x7f]", "[Switching to Thread 0x7f]"),
        ] {
            assert_eq!(unwrap_prefix(from), to);
        }
    }

    #[test]
    fn html_and_colours_go_but_debugger_brackets_stay() {
        assert_eq!(plain(b"\x1b[33mfoo\x1b[0m (a=&lt;optimized out&gt;)<br>"), "foo (a=<optimized out>)");
        assert_eq!(
            plain(b"<b>x</b> as=0x1 <address_space_io> <a href=\"u\">l</a>"),
            "x as=0x1 <address_space_io> l"
        );
        assert_eq!(plain(b"a &#35;1 &bogus; & <"), "a #1 &bogus; & <");
        assert_eq!(plain(b"\xff\xfe#0 f"), "\u{fffd}\u{fffd}#0 f");
    }
}
