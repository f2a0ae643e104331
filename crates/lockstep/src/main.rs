//! Runs two deterministic machines side by side, compares their whole state at intervals of instructions, and finds the first instruction
//! after which they differ: `hyaline-lockstep [options] -- MACHINE OPTIONS`.

mod compare;
mod guest;
mod protocol;
mod report;
mod side;

use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::process::ExitCode;

const HELP: &str = "\
usage: hyaline-lockstep [options] -- MACHINE OPTIONS

Runs two deterministic machines with the same guest and compares a hash of their whole state (processors, memory, devices, clock) every so
many instructions. At the first difference goes back to the last equal state, halves the distance down to one instruction, and prints what
differs. Ends with 0 when the machines were equal to the end, 1 when not, 2 when it could not be done. MACHINE OPTIONS are those of
`hyaline`, without -accel; the guest gets no input, its serial ports are not connected.

  --every N         instructions between comparisons (default 100000)
  --instructions N  stop after so many (default: at the guest's power-off)
  --left ACCEL      the one side, as -accel has it (default interp)
  --right ACCEL     the other side (default jit); jit,threshold=0 translates at once
  --twice           the right side two times: is it deterministic?
  --save FILE       at a difference: save the last equal state of the left side there
  --console         print the guest's console at the end
  --plant N,REG     test of the comparison itself: on the right side flip a bit of general register REG (0-15) of processor 0 after N
                    instructions
";

/// What is asked for.
struct Run {
    every: u64,
    instructions: u64,
    left: String,
    right: String,
    save: Option<String>,
    console: bool,
    plant: Option<guest::Plant>,
    machine: Vec<OsString>,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("hyaline-lockstep: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn number(text: &OsString, what: &str) -> Result<u64> {
    let text = text.to_string_lossy().replace('_', "");
    let (digits, scale) = match text.strip_suffix(['k', 'M', 'G']) {
        Some(digits) if text.ends_with('k') => (digits, 1000),
        Some(digits) if text.ends_with('M') => (digits, 1_000_000),
        Some(digits) => (digits, 1_000_000_000),
        None => (text.as_str(), 1),
    };
    let n: u64 = digits.parse().with_context(|| format!("{what} {text}: no number"))?;
    n.checked_mul(scale).filter(|n| *n > 0).with_context(|| format!("{what} {text}: out of range"))
}

fn plant(text: &str) -> Result<guest::Plant> {
    let (count, register) = text.split_once(',').context("--plant: write COUNT,REGISTER")?;
    let register = register.parse().ok().filter(|r| *r < 16).context("--plant: registers are 0 to 15")?;
    Ok(guest::Plant { count: count.parse().context("--plant: the count is no number")?, register })
}

/// Splits a machine's options off the arguments: what follows `--`.
fn run() -> Result<bool> {
    use lexopt::prelude::*;
    let mut args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let machine = match args.iter().position(|a| a == "--") {
        Some(i) => args.split_off(i).into_iter().skip(1).collect(),
        None => Vec::new(),
    };
    let mut run = Run {
        every: 100_000,
        instructions: u64::MAX,
        left: "interp".into(),
        right: "jit".into(),
        save: None,
        console: false,
        plant: None,
        machine,
    };
    let (mut twice, mut serve) = (false, None);
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("every") => run.every = number(&parser.value()?, "--every")?,
            Long("instructions") => run.instructions = number(&parser.value()?, "--instructions")?,
            Long("left") => run.left = parser.value()?.string()?,
            Long("right") => run.right = parser.value()?.string()?,
            Long("twice") => twice = true,
            Long("save") => run.save = Some(parser.value()?.string()?),
            Long("console") => run.console = true,
            Long("plant") => run.plant = Some(plant(&parser.value()?.string()?)?),
            Long("serve") => serve = Some(parser.value()?.string()?),
            Long("help") | Short('h') => {
                print!("{HELP}");
                return Ok(true);
            }
            other => return Err(other.unexpected()).context("see --help; machine options come after --"),
        }
    }
    if let Some(accel) = serve {
        return serve_machine(&accel, run.machine, run.plant).map(|()| true);
    }
    if run.machine.is_empty() {
        bail!("no machine: write its options after `--`, for example `-- -kernel FILE -initrd FILE -m 256`");
    }
    if twice {
        run.left = run.right.clone();
    }
    compare::run(&run)
}

/// The process of one machine.
fn serve_machine(accel: &str, mut args: Vec<OsString>, plant: Option<guest::Plant>) -> Result<()> {
    hyaline_device::contain_panics();
    args.splice(0..0, ["-accel".into(), format!("{accel},deterministic=on").into()]);
    match hyaline_options::parse(args).map_err(anyhow::Error::msg)? {
        hyaline_options::Ask::Print(text) => bail!("{text}"),
        hyaline_options::Ask::Run(ask) => {
            if ask.config.accels.len() != 1 {
                bail!(
                    "MACHINE OPTIONS must not name an accelerator: that is what --left and --right are for"
                );
            }
            guest::serve(ask.config, plant)
        }
    }
}
