//! `hyaline symbols`: a kernel's own symbol table as a file that gdb loads.

use crate::{complain, print};
use hyaline_host::chardev::Spec;
use hyaline_machine::Machine;
use hyaline_machine::chassis::Event;
use hyaline_machine::config::{Accel, Config};
use hyaline_machine::load::Images;
use std::ffi::OsString;
use std::path::PathBuf;

const HELP: &str = "\
usage: hyaline symbols KERNEL FILE

Starts a Linux kernel (bzImage or ELF) on the software CPU, without devices of yours and with `nokaslr`, only until it has unpacked itself, and
writes the symbol table that it carries for its own kallsyms as an ELF file: the addresses that it was linked for. In gdb:
  symbol-file FILE              the guest was started with nokaslr
  symbol-file FILE -o OFFSET    OFFSET as `monitor symbol start_kernel` says it
Of a running guest, `monitor symbols FILE` writes the same with the addresses that it has.
";

/// Instructions between two searches, and in all: Debian's kernels need some 200 million.
const STEP: u64 = 50_000_000;
const MOST: u64 = 6_000_000_000;

/// `hyaline symbols …`.
pub(crate) fn command(args: Vec<OsString>) -> i32 {
    let (kernel, file) = match args.as_slice() {
        [a, ..] if matches!(a.to_str(), Some("--help" | "-help" | "-h")) => {
            print(HELP);
            return 0;
        }
        [kernel, file] => (PathBuf::from(kernel), PathBuf::from(file)),
        _ => {
            print(HELP);
            return 1;
        }
    };
    match find(kernel).and_then(|symbols| {
        std::fs::write(&file, symbols.to_elf()).map_err(|e| format!("symbols: {}: {e}", file.display()))?;
        Ok(symbols.describe())
    }) {
        Ok(what) => {
            print(&format!("{}: {what}\n", file.display()));
            0
        }
        Err(e) => complain(&e),
    }
}

fn find(kernel: PathBuf) -> Result<std::sync::Arc<hyaline_watch::symbols::Symbols>, String> {
    let name = kernel.display().to_string();
    let config = Config {
        accels: vec![Accel::Interp],
        deterministic: true,
        memory: 512 << 20,
        images: Images { kernel: Some(kernel), append: "nokaslr".into(), ..Images::default() },
        serials: vec![Some(Spec::Null)],
        no_reboot: true,
        ..Config::default()
    };
    let mut machine = Machine::new(config).map_err(|e| e.to_string())?;
    let mut done = 0;
    while done < MOST {
        let event = machine.run_for(STEP).map_err(|e| e.to_string())?;
        done += STEP;
        let state = machine.cpu_state(0).map_err(|e| e.to_string())?;
        if let Some(found) = machine.guest.search(Some(state.rip), Some(state.msr.lstar)) {
            return Ok(found);
        }
        if event != Event::Stop {
            return Err(format!("symbols: {name} ended ({event:?}) before it had a symbol table"));
        }
    }
    Err(format!(
        "symbols: no symbol table was found in {name} after {done} instructions: is it a Linux kernel with CONFIG_KALLSYMS?"
    ))
}
