//! `bootfuzz --seconds N --seed S [--cases N] [--instructions N] [--shape firmware|kernel|damaged|state]`.

use anyhow::{Result, bail};
use bootfuzz::{Options, Shape, run};
use std::process::ExitCode;
use std::time::Duration;

const HELP: &str = "\
Boots random bytes on the software CPU, with every device there is. A panic, a crashed device or a lost instruction count is a failure;
its seed makes it again (--seed S --cases 1).

  --seconds N       how long to run (default 10)
  --cases N         stop after so many cases
  --seed S          the first case's seed (default 1); cases count up from it
  --instructions N  instructions of each case (default 300000)
  --shape SHAPE     only firmware, kernel, damaged or state

Exit code 0: no failure; 1: failures; 2: could not run.";

fn main() -> ExitCode {
    match work() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("bootfuzz: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn work() -> Result<bool> {
    let mut options = Options {
        time: Duration::from_secs(10),
        cases: u64::MAX,
        seed: 1,
        instructions: 300_000,
        shape: None,
    };
    let mut parser = lexopt::Parser::from_env();
    use lexopt::prelude::*;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("seconds") => options.time = Duration::from_secs(parser.value()?.parse()?),
            Long("cases") => options.cases = parser.value()?.parse()?,
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("instructions") => options.instructions = parser.value()?.parse()?,
            Long("shape") => {
                options.shape = Some(match parser.value()?.string()?.as_str() {
                    "firmware" => Shape::Firmware,
                    "kernel" => Shape::Kernel,
                    "damaged" => Shape::Damaged,
                    "state" => Shape::State,
                    other => {
                        bail!("no shape is called {other}; there are firmware, kernel, damaged and state")
                    }
                });
            }
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(true);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let report = run(&options)?;
    for (seed, text) in &report.failures {
        println!("seed {seed}: {text}");
    }
    for (how, count) in &report.ends {
        println!("  {how}: {count}");
    }
    println!(
        "{} cases, {} instructions in {:.1} s; {} failures; the longest case took {:.2} s (seed {})",
        report.cases,
        report.instructions,
        report.time.as_secs_f64(),
        report.failures.len(),
        report.longest.1.as_secs_f64(),
        report.longest.0
    );
    Ok(report.failures.is_empty())
}
