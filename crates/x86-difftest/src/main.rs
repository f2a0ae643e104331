//! `x86-difftest --seconds N --seed S [--only MNEMONIC] [--cases N] [--shown N]`: compares the interpreter with the host.

use anyhow::{Result, bail};
use iced_x86::Mnemonic;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use x86_difftest::{Options, run};

const HELP: &str = "\
Runs random unprivileged instructions on this processor and on Hyaline's interpreter and compares all registers, flags, memory and
exceptions. Prints each mismatch with a seed that makes it again.

  --seconds N      how long to run (default 10)
  --cases N        stop after so many cases
  --seed S         the first case's seed (default 1); cases count up from it
  --only MNEMONIC  only this instruction, by iced's name (for example Shld)
  --shown N        mismatches to print in full for each mnemonic (default 2)

Exit code 0: no mismatch; 1: mismatches; 2: could not run.";

fn main() -> ExitCode {
    match work() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("x86-difftest: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn work() -> Result<bool> {
    let mut options =
        Options { time: Duration::from_secs(10), cases: u64::MAX, seed: 1, only: None, shown: 2 };
    let mut parser = lexopt::Parser::from_env();
    use lexopt::prelude::*;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("seconds") => options.time = Duration::from_secs(parser.value()?.parse()?),
            Long("cases") => options.cases = parser.value()?.parse()?,
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("shown") => options.shown = parser.value()?.parse()?,
            Long("only") => {
                let name = parser.value()?.string()?;
                let found = Mnemonic::values().find(|m| format!("{m:?}").eq_ignore_ascii_case(&name));
                let Some(mnemonic) = found else {
                    bail!("no instruction is called {name}; use iced's names, such as Shld or Vaddps");
                };
                options.only = Some(mnemonic);
            }
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(true);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let report = run(&options, Arc::new(x86_difftest::host_model()?))?;
    for text in &report.texts {
        print!("{text}");
    }
    if !report.mismatches.is_empty() {
        println!("mismatches by instruction:");
        for (name, count) in &report.mismatches {
            println!("  {name}: {count}");
        }
    }
    let seconds = report.time.as_secs_f64();
    println!(
        "{} cases of {} mnemonics in {seconds:.1} s ({:.0} per second), {} of them exceptions; {} mismatches, {} lost with their process, {} repeating too long",
        report.cases,
        report.mnemonics,
        report.cases as f64 / seconds.max(0.001),
        report.faults,
        report.mismatched(),
        report.lost,
        report.unfinished
    );
    Ok(report.mismatches.is_empty())
}
