//! The `hyaline` program: the command line and nothing else.

mod control;
mod ctl;
mod demo;
mod demo_builtin;
mod desk;
mod map;
mod profile;
mod run;
mod symbols;
mod top;

use hyaline_host::signals;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    signals::block();
    hyaline_device::contain_panics();
    let mut args = std::env::args_os().skip(1).peekable();
    let first = args.peek().and_then(|a| a.to_str()).unwrap_or("").to_string();
    let code = match first.as_str() {
        "" if args.peek().is_none() => demo_builtin::run_all(),
        "demo" => {
            args.next();
            demo::command(args.collect())
        }
        "map" => {
            args.next();
            map::command(args.collect())
        }
        "top" => {
            args.next();
            top::command(args.collect())
        }
        "ctl" => {
            args.next();
            ctl::command(args.collect())
        }
        "symbols" => {
            args.next();
            symbols::command(args.collect())
        }
        "profile" => {
            args.next();
            profile::command(args.collect())
        }
        "explain" => {
            args.next();
            explain::cli::run(args)
        }
        _ => machine(args.collect()),
    };
    ExitCode::from(code as u8)
}

/// Runs the machine that the options describe.
fn machine(args: Vec<OsString>) -> i32 {
    match hyaline_options::parse(args) {
        Ok(hyaline_options::Ask::Print(text)) => {
            print(&text);
            0
        }
        Ok(hyaline_options::Ask::Run(ask)) => run::run(*ask),
        Err(e) => complain(&e),
    }
}

/// Prints to standard output; a closed pipe is no error.
pub(crate) fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// Prints an error and gives the exit code for it.
pub(crate) fn complain(text: &dyn std::fmt::Display) -> i32 {
    let _ = writeln!(std::io::stderr().lock(), "hyaline: {text}");
    1
}
