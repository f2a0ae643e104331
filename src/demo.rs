//! `hyaline` without arguments, and `hyaline demo`.

use crate::{complain, demo_builtin, print, run};
use hyaline_fetch::{Cache, Kernel, initramfs};
use hyaline_options::{self as options, Ask};
use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;

const HELP: &str = "\
usage: hyaline demo                      the built-in demonstration
       hyaline demo linux [options]      Debian's cloud kernel, to a shell on this terminal

The kernel and busybox are fetched by package name (linux-image-cloud-amd64, busybox-static) into a cache the first time; later runs
need no network. The cache is HYALINE_CACHE, else hyaline in XDG_CACHE_HOME or ~/.cache.

Options of demo linux:
  --kernel FILE     this kernel in place of Debian's
  --full            Debian's full kernel (linux-image-amd64) in place of the cloud kernel
  --busybox FILE    this statically linked busybox
  --run COMMAND     run this in place of an interactive shell, then power off
  --prepare         only fetch and build, and print the command that boots it
All other options go to the machine, e.g. -smp 4 -m 1G -accel kvm.
In the guest: `poweroff -f` ends it; Ctrl-A x ends it from outside; Ctrl-A h for help.
";

/// `hyaline demo …`.
pub(crate) fn command(args: Vec<OsString>) -> i32 {
    let mut args = args.into_iter();
    match args.next().as_deref().and_then(|a| a.to_str()) {
        None => demo_builtin::run_all(),
        Some("linux") => linux(args.collect()),
        Some("--help" | "-help" | "-h" | "help") => {
            print(HELP);
            0
        }
        Some(other) => complain(&format!(
            "demo: unknown demonstration `{other}`; there is `linux`, and none is the built-in one"
        )),
    }
}

fn linux(args: Vec<OsString>) -> i32 {
    match prepare(args) {
        Ok(Plan::Text(text)) => {
            print(&text);
            0
        }
        Ok(Plan::Run(args)) => match options::parse(args) {
            Ok(Ask::Run(ask)) => run::run(*ask),
            Ok(Ask::Print(text)) => {
                print(&text);
                0
            }
            Err(e) => complain(&e),
        },
        Err(e) => complain(&e),
    }
}

enum Plan {
    Text(String),
    Run(Vec<OsString>),
}

/// Gets kernel and busybox, builds the initramfs, and makes the machine's command line.
fn prepare(args: Vec<OsString>) -> Result<Plan, String> {
    let (mut kernel, mut busybox, mut command, mut only, mut kind) = (None, None, None, false, Kernel::Cloud);
    let mut rest: Vec<OsString> = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value =
            |name: &str| args.next().ok_or_else(|| format!("demo linux: {name} wants an argument"));
        match arg.to_str() {
            Some("--kernel") => kernel = Some(PathBuf::from(value("--kernel")?)),
            Some("--busybox") => busybox = Some(PathBuf::from(value("--busybox")?)),
            Some("--run") => command = Some(value("--run")?.to_string_lossy().into_owned()),
            Some("--full") => kind = Kernel::Full,
            Some("--prepare") => only = true,
            Some("--help" | "-help" | "-h") => return Ok(Plan::Text(HELP.into())),
            _ => rest.push(arg),
        }
    }
    let say = |text: &str| drop(writeln!(std::io::stderr(), "hyaline: {text}"));
    let cache = Cache::open().map_err(|e| e.to_string())?;
    let kernel = match kernel {
        Some(k) => k,
        None => cache
            .kernel(kind, &say)
            .map_err(|e| format!("{e}. Or name files: --kernel FILE --busybox FILE"))?,
    };
    let busybox = match busybox {
        Some(b) => b,
        None => cache.busybox(&say).map_err(|e| format!("{e}. Or name a file: --busybox FILE"))?,
    };
    let last = match &command {
        Some(c) => format!("{c}\npoweroff -f"),
        None => "echo; echo 'This is Linux in Hyaline. poweroff -f ends it; Ctrl-A h tells more.'; echo\n\
                 setsid cttyhack sh\npoweroff -f"
            .to_string(),
    };
    let image = initramfs(&busybox, &last).map_err(|e| e.to_string())?;
    let name = format!("demo-{:016x}.cpio", fingerprint(&image));
    let initrd = cache.dir().join(name);
    if !initrd.exists() {
        std::fs::write(&initrd, image).map_err(|e| format!("{}: {e}", initrd.display()))?;
    }
    let mut line: Vec<OsString> = vec!["-kernel".into(), kernel.into(), "-initrd".into(), initrd.into()];
    line.extend(["-append", "console=ttyS0 quiet"].map(OsString::from));
    line.extend(["-m", "512", "-nographic", "-no-reboot", "-cpu", "max"].map(OsString::from));
    line.extend(rest);
    if only {
        let words: Vec<String> = line.iter().map(|w| quoted(&w.to_string_lossy())).collect();
        return Ok(Plan::Text(format!("hyaline {}\n", words.join(" "))));
    }
    Ok(Plan::Run(line))
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// FNV-1a: names the image by its content.
fn fingerprint(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3))
}
