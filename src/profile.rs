//! `hyaline profile`, and the files of `-profile`.

use crate::{complain, print, run};
use hyaline_options::{self as options, Ask};
use hyaline_watch::profile::Summary;
use std::ffi::OsString;
use std::path::PathBuf;

const HELP: &str = "\
usage: hyaline profile [SECONDS] [--html FILE] [--svg FILE] [--folded FILE] [--chrome FILE] [--] MACHINE OPTIONS

Runs a machine, to its end or for SECONDS, and prints where its exits went: how many and how long by device register, with the guest's
functions, and what is worth looking at. All files can be given at once:
  --html FILE     one page with all of it; needs no network
  --svg FILE      a flame graph
  --folded FILE   folded stacks for other tools
  --chrome FILE   the last accesses as a trace for Perfetto or chrome://tracing
Example: hyaline profile 10 --html boot.html -- -kernel vmlinuz -append console=ttyS0 -nographic
A running machine's profile at its end without this command: -profile FILE.html
";

/// `hyaline profile …`.
pub(crate) fn command(args: Vec<OsString>) -> i32 {
    let (mut seconds, mut files, mut rest) = (None, Vec::new(), Vec::new());
    let mut args = args.into_iter().peekable();
    let wants = |name: &str, ending: &[&str], value: Option<OsString>| -> Result<PathBuf, String> {
        let path = PathBuf::from(value.ok_or_else(|| format!("profile: {name} wants a file"))?);
        let end = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if ending.contains(&end) {
            Ok(path)
        } else {
            Err(format!(
                "profile: {name} {}: the file's name should end in .{}",
                path.display(),
                ending.join(" or .")
            ))
        }
    };
    while let Some(arg) = args.next() {
        let file = match arg.to_str() {
            Some("--help" | "-help" | "-h") => {
                print(HELP);
                return 0;
            }
            Some("--") => {
                rest.extend(args.by_ref());
                break;
            }
            Some("--html") => wants("--html", &["html", "htm"], args.next()),
            Some("--svg") => wants("--svg", &["svg"], args.next()),
            Some("--folded") => wants("--folded", &["folded"], args.next()),
            Some("--chrome") => wants("--chrome", &["json"], args.next()),
            Some(text) if !text.starts_with('-') && seconds.is_none() => match text.parse::<f64>() {
                Ok(s) if s > 0.0 && s < 1e6 => {
                    seconds = Some(s);
                    continue;
                }
                _ => Err(format!("profile: `{text}` is no number of seconds; see hyaline profile --help")),
            },
            _ => {
                rest.push(arg);
                rest.extend(args.by_ref());
                break;
            }
        };
        match file {
            Ok(f) => files.push(f),
            Err(e) => return complain(&e),
        }
    }
    if rest.first().is_some_and(|a| a == "demo") {
        let text = "profile: it takes a machine's options; for the demonstration: hyaline demo linux … -profile FILE";
        return complain(&text);
    }
    match options::parse(rest) {
        Ok(Ask::Run(mut ask)) => {
            ask.profile.extend(files);
            ask.profile_text = true;
            ask.seconds = seconds;
            run::run(*ask)
        }
        Ok(Ask::Print(text)) => {
            print(&text);
            0
        }
        Err(e) => complain(&e),
    }
}

/// Writes the files, and prints the text if that is wanted.
///
/// # Errors
/// A file that can't be written.
pub(crate) fn write(summary: &Summary, files: &[PathBuf], text: bool) -> Result<(), String> {
    if text {
        print(&format!("\n{}", summary.text()));
    }
    for file in files {
        std::fs::write(file, summary.for_file(file))
            .map_err(|e| format!("-profile {}: {e}", file.display()))?;
    }
    Ok(())
}
