//! Assembles each guest with the GNU assembler and linker, which every Rust tool chain on Linux has beside it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Guests, and whether they have 64-bit code. All become 32-bit ELF files that a multiboot loader starts, at 1 MiB.
const GUESTS: &[(&str, bool)] = &[
    ("demo", false),
    ("interrupts", false),
    ("fpuerror", false),
    ("smp", false),
    ("longmode", true),
    ("triplefault", false),
    ("nowhere", false),
    ("modules", false),
    ("count", false),
    ("litmus", true),
    ("deadline", false),
];

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=asm");
    for (guest, wide) in GUESTS {
        let source = Path::new("asm").join(format!("{guest}.S"));
        let object = out.join(format!("{guest}.o"));
        run(Command::new("as")
            .args([if *wide { "--64" } else { "--32" }, "-I", "asm", "-o"])
            .arg(&object)
            .arg(&source));
        let linked = out.join(format!("{guest}.elf"));
        run(Command::new("ld")
            .args([
                "-m",
                if *wide { "elf_x86_64" } else { "elf_i386" },
                "-N",
                "-e",
                "start",
                "-Ttext=0x100000",
            ])
            .args(["--build-id=none", "--no-warn-rwx-segments", "-o"])
            .arg(&linked)
            .arg(&object));
        if *wide {
            run(Command::new("objcopy").args(["-O", "elf32-i386"]).arg(&linked));
        }
    }
}

fn run(command: &mut Command) {
    match command.status() {
        Ok(s) if s.success() => {}
        Ok(s) => panic!("{command:?} failed: {s}"),
        Err(e) => {
            panic!("{command:?}: {e}; the guests are assembled with GNU binutils (Debian package `binutils`)")
        }
    }
}
