//! The access trace: lines for the accesses that filters want, to standard error or a file.

use crate::filter::{Filter, Format, Spec};
use crate::guest::Guest;
use crate::record::{AccessRecord, Site};
use crate::recorder::Sink;
use crate::text::{HEADER, Line, json_with};
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Nanoseconds of virtual time after which a file is brought up to date.
const FLUSH: u64 = 200_000_000;

struct Out {
    to: Option<Box<dyn Write + Send>>,
    flushed: u64,
    headed: bool,
    lines: u64,
}

/// One output of the access trace. Several `-trace` with the same output share it, so that an access is written once.
pub struct Trace {
    filters: Vec<Filter>,
    format: Format,
    name: String,
    end: &'static str,
    buffered: bool,
    guest: Option<Arc<Guest>>,
    out: Mutex<Out>,
    said: Box<dyn Fn(&str) + Send + Sync>,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trace({})", self.name)
    }
}

impl Trace {
    /// Opens the outputs of some specifications. `said` gets a line if one can't be written any more.
    ///
    /// # Errors
    /// A file can't be made.
    pub fn open(
        specs: &[Spec],
        guest: Option<&Arc<Guest>>,
        said: &Arc<dyn Fn(&str) + Send + Sync>,
    ) -> Result<Vec<Arc<Trace>>, String> {
        let mut groups: Vec<(&Spec, Vec<Filter>)> = Vec::new();
        for spec in specs {
            match groups.iter_mut().find(|(s, _)| s.file == spec.file && s.format == spec.format) {
                Some((_, filters)) => filters.extend(spec.filters.iter().cloned()),
                None => groups.push((spec, spec.filters.clone())),
            }
        }
        let open = |(spec, filters): (&Spec, Vec<Filter>)| {
            let (to, name): (Box<dyn Write + Send>, String) = match &spec.file {
                Some(path) => (create(path)?, path.display().to_string()),
                None => (Box::new(std::io::stderr()), "standard error".into()),
            };
            let raw = spec.file.is_none() && std::io::stderr().is_terminal();
            let said = said.clone();
            let mut trace = Trace::to(filters, spec.format, to, &name, Box::new(move |t: &str| said(t)));
            trace.end = if raw { "\r\n" } else { "\n" };
            trace.buffered = spec.file.is_some();
            trace.guest = guest.cloned();
            Ok(Arc::new(trace))
        };
        groups.into_iter().map(open).collect()
    }

    /// A trace to any writer.
    pub fn to(
        filters: Vec<Filter>,
        format: Format,
        to: Box<dyn Write + Send>,
        name: &str,
        said: Box<dyn Fn(&str) + Send + Sync>,
    ) -> Trace {
        Trace {
            filters,
            format,
            name: name.to_string(),
            end: "\n",
            buffered: true,
            guest: None,
            out: Mutex::new(Out { to: Some(to), flushed: 0, headed: false, lines: 0 }),
            said,
        }
    }

    /// With the guest's symbols.
    #[must_use]
    pub fn with_guest(mut self, guest: Arc<Guest>) -> Trace {
        self.guest = Some(guest);
        self
    }

    /// Does it want bus masters' accesses to memory?
    pub fn wants_dma(&self) -> bool {
        self.filters.iter().any(|f| f.wants_dma() || *f == Filter::default())
    }

    /// Lines written so far.
    pub fn lines(&self) -> u64 {
        self.out.lock().unwrap_or_else(PoisonError::into_inner).lines
    }

    /// Brings the file up to date.
    pub fn flush(&self) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(e)) = out.to.as_mut().map(|to| to.flush()) {
            self.broken(&mut out, &e);
        }
    }

    fn broken(&self, out: &mut Out, error: &std::io::Error) {
        out.to = None;
        (self.said)(&format!(
            "the access trace to {} ends here after {} accesses: it can't be written any more ({error}); the guest goes on",
            self.name, out.lines
        ));
    }

    fn text(&self, record: &AccessRecord, site: &Site, guest: Option<&str>, headed: bool) -> String {
        match self.format {
            Format::Jsonl => format!("{}{}", json_with(record, site, guest), self.end),
            Format::Text => {
                let head = if headed { String::new() } else { format!("{HEADER}{}", self.end) };
                let line = Line { record, site, guest }.to_string();
                let line = if self.end == "\n" { line } else { line.replace('\n', self.end) };
                format!("{head}{line}{}", self.end)
            }
        }
    }
}

fn create(path: &Path) -> Result<Box<dyn Write + Send>, String> {
    // Appending, so that a log in the same file is not overwritten.
    let file = File::create(path)
        .and_then(|_| File::options().append(true).open(path))
        .map_err(|e| format!("-trace file={}: it can't be made ({e})", path.display()))?;
    Ok(Box::new(BufWriter::with_capacity(64 << 10, file)))
}

impl Sink for Trace {
    fn record(&self, record: &AccessRecord, site: &Arc<Site>) {
        let name = || self.guest.as_ref().and_then(|g| g.name(record.rip));
        if !self.filters.iter().any(|f| f.matches(record, site, &name)) {
            return;
        }
        let guest = name();
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if out.to.is_none() {
            return;
        }
        let text = self.text(record, site, guest.as_deref(), out.headed);
        out.headed = true;
        let due = self.buffered && record.time.saturating_sub(out.flushed) > FLUSH;
        if due {
            out.flushed = record.time;
        }
        let written = out.to.as_mut().map(|to| {
            to.write_all(text.as_bytes())?;
            if due { to.flush() } else { Ok(()) }
        });
        match written {
            Some(Err(e)) => self.broken(&mut out, &e),
            _ => out.lines += 1,
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_space::{Actor, ExitKind, Outcome};

    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::Error::from_raw_os_error(28));
            }
            self.0 -= 1;
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_told_once() {
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let to = said.clone();
        let trace = Trace::to(
            vec![Filter::default()],
            Format::Jsonl,
            Box::new(Full(2)),
            "x.jsonl",
            Box::new(move |t: &str| to.lock().unwrap().push(t.to_string())),
        );
        let site = Arc::new(Site {
            id: 0,
            space: "io".into(),
            region: 1,
            path: "/io".into(),
            name: "io".into(),
            owner: String::new(),
            register: None,
        });
        let record = AccessRecord {
            seq: 1,
            time: 0,
            rip: 0,
            addr: 0x80,
            value: 1,
            offset: 0,
            took: 0,
            site: 0,
            count: 0,
            actor: Actor::Vcpu(0),
            exit: ExitKind::PioOut,
            size: 1,
            is_write: true,
            parts: 0,
            outcome: Outcome::Unassigned,
        };
        (0..5).for_each(|_| trace.record(&record, &site));
        let said = said.lock().unwrap();
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("x.jsonl") && said[0].contains("after 2 accesses"), "{said:?}");
        assert_eq!(trace.lines(), 2);
    }
}
