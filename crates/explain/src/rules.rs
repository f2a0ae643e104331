//! The rules: read from `data/rules.txt`, evaluated over the facts of one trace.
//!
//! Predicates of the `w` lines, each giving the frames it rests on:
//! `fn(p)` a frame of the chosen stack; `anyfn(p)` of any stack; `near(p)` among the first 12 frames that are not
//! the C library's; `above(p;q)` p was called, directly or not, by q; `directly(p;q)` by q itself; `argzero(p;names)` a
//! frame with a null pointer argument; `end(kinds)`; `san(kinds)`; `undef(text)`; `msg(text)`; `said(words)` the text
//! around the frames; `asserttext(text)`; `anyend(p)` a stack that ends abnormally near p; and the words listed in
//! [`Facts::word`].

use std::sync::OnceLock;

use crate::facts::Facts;

/// How sure a rule makes us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sure {
    /// A possibility worth a look.
    Hint,
    /// Most likely.
    Strong,
    /// Follows from the frames.
    Certain,
}

impl Sure {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Sure::Hint => "possible",
            Sure::Strong => "strong",
            Sure::Certain => "certain",
        }
    }
}

/// What a rule's statement is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Who and how.
    Context,
    /// What the way of the access shows.
    Path,
    /// Unusual, not a cause by itself.
    Anomaly,
    /// May be why it ended so.
    Cause,
}

/// One rule.
#[derive(Debug)]
pub struct Rule {
    /// Stable name.
    pub id: &'static str,
    /// Kind of statement.
    pub kind: Kind,
    /// Class of the finding.
    pub class: &'static str,
    /// How sure.
    pub sure: Sure,
    /// Order among causes.
    pub rank: i64,
    /// Title.
    pub title: &'static str,
    /// The condition as written.
    pub when_text: &'static str,
    /// The condition.
    pub when: Expr,
    /// Why the frames show it.
    pub evidence: &'static str,
    /// What it says.
    pub says: &'static str,
    /// What to look at next.
    pub next: &'static str,
    /// A trace that fires it.
    pub yes: &'static str,
    /// A trace that does not.
    pub no: &'static str,
}

/// A condition.
#[derive(Debug)]
pub enum Expr {
    /// A predicate with its arguments.
    Call(&'static str, Vec<&'static str>),
    /// Both.
    And(Box<Expr>, Box<Expr>),
    /// Either.
    Or(Box<Expr>, Box<Expr>),
    /// Not.
    Not(Box<Expr>),
}

impl Expr {
    /// The frames that make it true, or `None` when it is false.
    pub fn eval(&self, f: &Facts<'_>) -> Option<Vec<usize>> {
        match self {
            Expr::Call(name, args) => f.word(name, args),
            Expr::And(a, b) => {
                let mut x = a.eval(f)?;
                x.extend(b.eval(f)?);
                Some(x)
            }
            Expr::Or(a, b) => match (a.eval(f), b.eval(f)) {
                (Some(mut x), Some(y)) => {
                    x.extend(y);
                    Some(x)
                }
                (x, y) => x.or(y),
            },
            Expr::Not(a) => a.eval(f).is_none().then(Vec::new),
        }
    }

    #[cfg(test)]
    fn names(&self, out: &mut Vec<&'static str>) {
        match self {
            Expr::Call(n, _) => out.push(n),
            Expr::And(a, b) | Expr::Or(a, b) => {
                a.names(out);
                b.names(out);
            }
            Expr::Not(a) => a.names(out),
        }
    }
}

struct Parser {
    text: &'static str,
    at: usize,
}

impl Parser {
    fn space(&mut self) {
        while self.text.as_bytes().get(self.at) == Some(&b' ') {
            self.at += 1;
        }
    }

    fn peek(&mut self) -> Option<u8> {
        self.space();
        self.text.as_bytes().get(self.at).copied()
    }

    fn or(&mut self) -> Option<Expr> {
        let mut left = self.and()?;
        while self.peek() == Some(b'|') {
            self.at += 1;
            left = Expr::Or(Box::new(left), Box::new(self.and()?));
        }
        Some(left)
    }

    fn and(&mut self) -> Option<Expr> {
        let mut left = self.not()?;
        while self.peek() == Some(b'&') {
            self.at += 1;
            left = Expr::And(Box::new(left), Box::new(self.not()?));
        }
        Some(left)
    }

    fn not(&mut self) -> Option<Expr> {
        match self.peek()? {
            b'!' => {
                self.at += 1;
                Some(Expr::Not(Box::new(self.not()?)))
            }
            b'(' => {
                self.at += 1;
                let e = self.or()?;
                (self.peek()? == b')').then_some(())?;
                self.at += 1;
                Some(e)
            }
            _ => {
                let rest = &self.text[self.at..];
                let n = rest.bytes().take_while(|b| b.is_ascii_lowercase() || b.is_ascii_digit()).count();
                let name = &rest[..n];
                self.at += n;
                (n > 0).then_some(())?;
                let mut args = Vec::new();
                if self.text.as_bytes().get(self.at) == Some(&b'(') {
                    // Arguments may hold brackets of their own, in pairs.
                    let mut depth = 0;
                    let len = self.text[self.at..].bytes().position(|b| {
                        match b {
                            b'(' => depth += 1,
                            b')' => depth -= 1,
                            _ => {}
                        }
                        depth == 0
                    })?;
                    args = self.text[self.at + 1..self.at + len].split(';').collect();
                    self.at += len + 1;
                }
                Some(Expr::Call(name, args))
            }
        }
    }
}

fn parse_expr(text: &'static str) -> Option<Expr> {
    let mut p = Parser { text, at: 0 };
    let e = p.or()?;
    p.space();
    (p.at == text.len()).then_some(e)
}

/// All rules, in the order of the file.
pub fn table() -> &'static [Rule] {
    static TABLE: OnceLock<Vec<Rule>> = OnceLock::new();
    TABLE.get_or_init(|| parse(include_str!("../data/rules.txt")).0)
}

fn parse(text: &'static str) -> (Vec<Rule>, Vec<String>) {
    let mut out = Vec::new();
    let mut bad = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let mut body: Vec<(&'static str, &'static str)> = Vec::new();
        while let Some(l) = lines.peek() {
            if l.is_empty() || l.starts_with("rule ") {
                break;
            }
            if let Some((k, v)) = l.split_once(' ') {
                body.push((k, v.trim()));
            }
            lines.next();
        }
        match rule(line, &body) {
            Some(r) => out.push(r),
            None => bad.push(line.to_owned()),
        }
    }
    (out, bad)
}

fn rule(head: &'static str, body: &[(&'static str, &'static str)]) -> Option<Rule> {
    let p: Vec<&'static str> = head.strip_prefix("rule ")?.split('|').map(str::trim).collect();
    let get = |k: &str| body.iter().find(|(n, _)| *n == k).map(|x| x.1);
    let when_text = get("w")?;
    Some(Rule {
        id: p.first()?,
        kind: match *p.get(1)? {
            "context" => Kind::Context,
            "path" => Kind::Path,
            "anomaly" => Kind::Anomaly,
            "cause" => Kind::Cause,
            _ => return None,
        },
        class: p.get(2)?,
        sure: match *p.get(3)? {
            "certain" => Sure::Certain,
            "strong" => Sure::Strong,
            "hint" => Sure::Hint,
            _ => return None,
        },
        rank: p.get(4)?.parse().ok()?,
        title: get("t")?,
        when_text,
        when: parse_expr(when_text)?,
        evidence: get("e")?,
        says: get("s")?,
        next: get("x").unwrap_or(""),
        yes: get("y")?,
        no: get("n")?,
    })
}

/// Writes out a compact trace of the rule file as a debugger would print it.
pub fn expand(compact: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let frames = match compact.split_once(";;") {
        Some((messages, frames)) => {
            for m in messages.split("msg:").map(str::trim).filter(|m| !m.is_empty()) {
                out.push_str(m);
                out.push('\n');
            }
            frames
        }
        None => compact,
    };
    for (n, spec) in frames.split(" < ").enumerate() {
        let spec = spec.trim();
        let (spec, file) = match spec.rsplit_once('@') {
            Some((s, f)) if f.ends_with(".c") => (s, f),
            _ => (spec, "src.c"),
        };
        let (name, args) = match spec.split_once('(') {
            Some((n, a)) => (n, a.strip_suffix(')').unwrap_or(a)),
            None => (spec, ""),
        };
        if name == "??" {
            let _ = writeln!(out, "#{n}  0x{:016x} in ?? ()", 0x5555_5555_0000u64 + n as u64 * 64);
        } else {
            let _ = writeln!(
                out,
                "#{n}  0x{:016x} in {name} ({args}) at {file}:{}",
                0x5555_5555_0000u64 + n as u64 * 64,
                10 + n
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fired(compact: &str) -> Vec<&'static str> {
        let report = crate::reader::read(expand(compact).as_bytes()).expect("memory does not fail");
        let Some(facts) = Facts::new(&report) else { return Vec::new() };
        table().iter().filter(|r| r.when.eval(&facts).is_some()).map(|r| r.id).collect()
    }

    #[test]
    fn the_file_is_well_formed() {
        let (rules, bad) = parse(include_str!("../data/rules.txt"));
        assert_eq!(bad, Vec::<String>::new());
        assert!(rules.len() >= 42, "{}", rules.len());
        let mut ids: Vec<_> = rules.iter().map(|r| r.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), rules.len(), "rule names are unique");
        for r in &rules {
            let mut names = Vec::new();
            r.when.names(&mut names);
            for n in names {
                assert!(Facts::knows(n), "{}: unknown predicate {n}", r.id);
            }
            assert!(r.kind != Kind::Cause || r.sure != Sure::Certain, "{}: a cause is never certain", r.id);
        }
    }

    #[test]
    fn every_rule_fires_on_its_positive_trace_and_not_on_its_negative_one() {
        let mut wrong = Vec::new();
        for r in table() {
            if !fired(r.yes).contains(&r.id) {
                wrong.push(format!("{} does not fire on: {}", r.id, r.yes));
            }
            if fired(r.no).contains(&r.id) {
                wrong.push(format!("{} fires on: {}", r.id, r.no));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
