//! `hyaline map`: what is at which address of a machine, without running it.

use crate::{complain, print};
use hyaline_control::map;
use hyaline_machine::Machine;
use hyaline_options::{self as options, Ask};
use std::ffi::OsString;

const HELP: &str = "\
usage: hyaline map [--json] [machine options]      the tree of regions and the flat views
       hyaline map why PLACE [machine options]     why that address goes where it goes, and what it hides

PLACE: io:0xc012, mem:0xfee00020 or config:0x800; with /2 for an access of 2 bytes, with ,w for a write.
The machine is as firmware finds it; with -kernel as a kernel finds it that is started without firmware. Of a running machine, `hyaline ctl
SOCKET map` and `hyaline ctl SOCKET map why PLACE` tell the present state, and gdb's `monitor info mtree` and `monitor map why PLACE`.
";

/// `hyaline map …`.
pub(crate) fn command(args: Vec<OsString>) -> i32 {
    let mut args = args.into_iter().peekable();
    let mut place = None;
    if args.peek().is_some_and(|a| a == "why") {
        args.next();
        match args.next() {
            Some(p) => place = Some(p.to_string_lossy().into_owned()),
            None => return complain(&"map why: name a place, for example io:0xc012 or mem:0xfee00020"),
        }
    }
    let (mut json, mut rest) = (false, Vec::new());
    for arg in args {
        match arg.to_str() {
            Some("--json") => json = true,
            Some("--help" | "-help" | "-h") => {
                print(HELP);
                return 0;
            }
            _ => rest.push(arg),
        }
    }
    let run = match options::parse(rest) {
        Ok(Ask::Run(run)) => run,
        Ok(Ask::Print(text)) => {
            print(&text);
            return 0;
        }
        Err(e) => return complain(&e),
    };
    for device in &run.config.devices {
        if let Err(e) = hyaline_machine::device_check(device) {
            return complain(&e);
        }
    }
    let pc = match Machine::board(&run.config) {
        Ok(pc) => pc,
        Err(e) => return complain(&e),
    };
    let text = match (place, json) {
        (Some(_), true) => return complain(&"map why: --json is for the whole map"),
        (Some(place), false) => match map::why(&pc, &place) {
            Ok(text) => text,
            Err(e) => return complain(&format!("map why {e}")),
        },
        (None, true) => format!("{:#}\n", map::as_json(&pc)),
        (None, false) => map::tree(&pc) + &map::flat(&pc),
    };
    print(&text);
    0
}
