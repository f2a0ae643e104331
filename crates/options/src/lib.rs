//! The command line: QEMU's options where the meaning is the same.

mod absent;

use hyaline_control::gdb::Address;
use hyaline_host::chardev::Spec;
use hyaline_machine::config::{
    Accel, Config, DeviceSpec, KernelIrqchip, LogItems, RtcBase, nearest, parse_size,
};
use hyaline_machine::report::PanicPolicy;
use hyaline_watch::SymbolChoice;
use std::ffi::OsString;
use std::path::PathBuf;

/// What the command line asks for.
#[derive(Debug)]
pub enum Ask {
    /// Run a machine.
    Run(Box<Run>),
    /// Print this text and end with success.
    Print(String),
}

/// A machine and what concerns the program around it.
#[derive(Debug, Default)]
pub struct Run {
    /// The machine.
    pub config: Config,
    /// `-D`: log file.
    pub log_file: Option<PathBuf>,
    /// `-trace`.
    pub trace: Vec<hyaline_watch::Spec>,
    /// `-gdb`: where gdb can connect.
    pub gdb: Option<Address>,
    /// `-profile`: files for the exit profile.
    pub profile: Vec<PathBuf>,
    /// `hyaline profile`: print the profile at the end.
    pub profile_text: bool,
    /// `hyaline profile SECONDS`: end after them.
    pub seconds: Option<f64>,
    /// `-control`.
    pub control: Option<String>,
    /// `-pidfile`.
    pub pidfile: Option<PathBuf>,
    /// Remarks on options that were accepted and change nothing here.
    pub remarks: Vec<String>,
}

/// An option: name, argument (empty: none), what it does.
type Opt = (&'static str, &'static str, &'static str);

/// All options, in groups as `-help` prints them.
pub const OPTIONS: &[(&str, &[Opt])] = &[
    (
        "Standard options",
        &[
            (
                "machine",
                "[type=]name[,prop=value…]",
                "the board: pc; props: accel=kvm|jit|interp, kernel-irqchip=on|off|split, hpet=on|off",
            ),
            ("M", "name[,prop=value…]", "same as -machine"),
            (
                "accel",
                "name[,prop=value…]",
                "who executes: jit (default; tcg is the same), interp or kvm; `-accel help` has their props",
            ),
            (
                "icount",
                "[shift=]N[,sleep=on|off]",
                "count time by instructions of 2^N nanoseconds, so that runs repeat; sleep=off skips idle time",
            ),
            ("enable-kvm", "", "same as -accel kvm"),
            (
                "cpu",
                "model[,+feature][,-feature]",
                "the CPU model: max, qemu64, host or a name; `-cpu help` lists them",
            ),
            ("smp", "[cpus=]n", "number of processors, 1 to 8"),
            ("m", "[size=]megs", "guest memory, with suffix B, K, M, G or T (default 128M)"),
            ("name", "string", "the guest's name"),
            (
                "global",
                "driver.property=value",
                "a default of a device's property, e.g. isa-debugcon.iobase=0x402",
            ),
            ("rtc", "[base=utc|localtime|DATE]", "what the real-time clock starts from"),
            (
                "device",
                "name[,prop=value…]",
                "add a device; `-device help` lists them, `-device NAME,help` its properties",
            ),
            ("nodefaults", "", "none of the devices that are there by default"),
        ],
    ),
    (
        "What to boot",
        &[
            (
                "kernel",
                "file",
                "a Linux bzImage, a PVH ELF kernel or a multiboot kernel, started without firmware",
            ),
            ("initrd", "file", "initial RAM disk; for multiboot `file args,file args`"),
            ("append", "text", "the kernel's command line"),
            ("bios", "file", "firmware image (default without -kernel: SeaBIOS)"),
            ("restore", "file", "go on from a saved state"),
        ],
    ),
    (
        "Character devices and display",
        &[
            (
                "serial",
                "dev",
                "a serial port on stdio, mon:stdio, null, none, file:PATH, unix:PATH[,server=on][,wait=off] or pty",
            ),
            ("debugcon", "dev", "the debug console (port 0xe9) on a character back end"),
            ("nographic", "", "no display; first serial port on the terminal, Ctrl-A h for help"),
            ("display", "none", "there is no display yet: only none"),
            ("vga", "none", "there is no graphics card yet: only none"),
            ("vnc", "none", "only none"),
            ("monitor", "none", "there is no monitor yet: only none"),
            ("parallel", "none", "only none"),
            ("nic", "none", "only none; a network card without a network: -device pcnet"),
            ("net", "none", "same as -nic none"),
        ],
    ),
    (
        "Running and debugging",
        &[
            ("S", "", "do not start the processors before gdb says so"),
            ("s", "", "same as -gdb tcp::1234"),
            ("gdb", "dev", "let gdb connect at tcp::PORT, tcp:HOST:PORT or unix:PATH"),
            ("no-reboot", "", "a reset ends the program"),
            ("no-shutdown", "", "a power-off stops the machine, not the program"),
            ("save-at-exit", "file", "save the machine's whole state when it ends"),
            (
                "d",
                "item[,item…]",
                "log: int, guest_errors, unimp, in_asm, out_asm, cpu_reset, note, access; `-d help` explains",
            ),
            (
                "trace",
                "spec",
                "log accesses to devices: reg:serial0.LSR, io:0xc000-0xc01f, exit:mmio.write …; `-trace help` explains",
            ),
            (
                "symbols",
                "file|auto|none",
                "the guest kernel's symbols: a vmlinux, a System.map, or found in its memory (default)",
            ),
            (
                "profile",
                "file",
                "at the end write an exit profile: FILE.html, .svg (flame graph), .folded, .json (Chrome trace) or .txt",
            ),
            ("control", "unix:path", "a socket for `hyaline top` and other programs: one JSON object a line"),
            (
                "on-device-panic",
                "disable|stop|abort",
                "what a device's panic leads to, after its report: the device is fenced off (default), the machine ends, the program aborts",
            ),
            (
                "crash-dir",
                "folder",
                "where crash reports go (default: the current folder); SIGQUIT writes one on demand",
            ),
            ("crash-with-ram", "", "crash reports hold the guest's memory too"),
            (
                "inject",
                "panic:reg|hang:reg",
                "let a device fail at a register, e.g. panic:serial0.SCR, to see what becomes of it",
            ),
            ("D", "file", "where the log goes (default: standard error)"),
            ("pidfile", "file", "write the process number there"),
            ("no-user-config", "", "accepted: there is no user configuration"),
            ("help", "", "this text"),
            ("h", "", "this text"),
            ("version", "", "the version"),
        ],
    ),
];

const DRIVERS: &[(&str, &[&str])] = &[
    ("isa-debugcon", &["iobase", "readback"]),
    ("isa-debug-exit", &["iobase", "iosize"]),
    ("pvpanic", &["ioport"]),
    ("PIIX4_PM", &["disable_s3", "disable_s4", "s4_val"]),
    ("kvm-pit", &["lost_tick_policy"]),
    ("mc146818rtc", &["lost_tick_policy"]),
    ("ICH9-LPC", &["disable_s3"]),
];

fn no(text: impl Into<String>) -> String {
    text.into()
}

fn on_off(what: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("{what}={value}: only on and off are possible")),
    }
}

/// Splits `name,prop=value,prop` at commas; `,,` stands for a comma. A property without `=` is `on`.
fn split(text: &str) -> (String, Vec<(String, String)>) {
    let mut parts: Vec<String> = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                parts[last].push(',');
            }
            ',' => parts.push(String::new()),
            c => parts[last].push(c),
        }
    }
    let first = parts.remove(0);
    let props = parts.into_iter().filter(|p| !p.is_empty()).map(|p| match p.split_once('=') {
        Some((n, v)) => (n.to_string(), v.to_string()),
        None => (p, "on".to_string()),
    });
    (first, props.collect())
}

fn unknown_prop<T>(option: &str, prop: &str, known: &[&str]) -> Result<T, String> {
    let near =
        nearest(prop, known.iter().copied()).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
    Err(format!("{option}: unknown property `{prop}`{near} (there are {})", known.join(", ")))
}

/// Parses the command line (without the program's name).
///
/// # Errors
/// What is wrong, in words, with the nearest thing that is right.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Ask, String> {
    let mut run = Run::default();
    let c = &mut run.config;
    let mut serials: Vec<Spec> = Vec::new();
    let (mut serial_given, mut nographic, mut nodefaults) = (false, false, false);
    let mut accels: Vec<Accel> = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        let Some(name) = text.strip_prefix("--").or_else(|| text.strip_prefix('-')).filter(|n| !n.is_empty())
        else {
            return Err(format!(
                "`{text}`: a disk image given by itself; this machine has no disk controller yet. Boot with -kernel and -initrd, or with -bios"
            ));
        };
        let Some((name, argument, _)) = OPTIONS.iter().flat_map(|(_, o)| *o).find(|(n, _, _)| *n == name)
        else {
            if let Some(reason) = absent::reason(name) {
                return Err(format!("-{name} of QEMU is not here: {reason}"));
            }
            let near = nearest(name, OPTIONS.iter().flat_map(|(_, o)| *o).map(|(n, _, _)| *n));
            let hint = near.map_or("see -help".to_string(), |n| format!("did you mean -{n}?"));
            return Err(format!("unknown option -{name}; {hint}"));
        };
        let mut value = String::new();
        let mut raw = OsString::new();
        if !argument.is_empty() {
            raw = args.next().ok_or_else(|| format!("-{name} wants an argument: -{name} {argument}"))?;
            value = raw.to_string_lossy().into_owned();
        }
        let utf8 =
            || raw.to_str().map(str::to_string).ok_or_else(|| format!("-{name}: the text is not UTF-8"));
        match *name {
            "help" | "h" => return Ok(Ask::Print(help())),
            "version" => return Ok(Ask::Print(version())),
            "machine" | "M" => {
                let (first, mut props) = split(&value);
                let mut board = first.as_str();
                if let Some((n, v)) = first.split_once('=') {
                    if n == "type" {
                        board = v;
                    } else {
                        props.insert(0, (n.to_string(), v.to_string()));
                        board = "pc";
                    }
                }
                match board {
                    "pc" | "i440fx" => {}
                    "help" | "?" => {
                        return Ok(Ask::Print(
                            "Supported machines are:\npc       PC (i440FX + PIIX, 1996) (default)\n".into(),
                        ));
                    }
                    b if b.starts_with("pc-i440fx-") => run
                        .remarks
                        .push(format!("-{name} {b}: run as `pc`; board versions are not told apart")),
                    b => {
                        let near = if b.contains("q35") || b == "microvm" {
                            " (q35 and microvm are not built yet)"
                        } else {
                            ""
                        };
                        return Err(format!("-{name}: unsupported machine type `{b}`{near}; there is `pc`"));
                    }
                }
                for (prop, v) in props {
                    match prop.as_str() {
                        "accel" => {
                            for a in v.split(':') {
                                push_accel(&mut accels, a)?;
                            }
                        }
                        "kernel-irqchip" | "kernel_irqchip" => c.irqchip = irqchip(&v)?,
                        "hpet" => c.hpet = on_off("hpet", &v)?,
                        "usb" | "vmport" | "smm" | "graphics" | "dump-guest-core" | "mem-merge" => {
                            if on_off(&prop, &v)? && matches!(prop.as_str(), "usb" | "vmport" | "smm") {
                                return Err(format!(
                                    "-{name}: {prop}=on is not supported: this board has none; leave it out or write {prop}=off"
                                ));
                            }
                        }
                        p => {
                            return unknown_prop(
                                "-machine",
                                p,
                                &["accel", "kernel-irqchip", "hpet", "usb", "vmport", "smm", "graphics"],
                            );
                        }
                    }
                }
            }
            "accel" => {
                let (first, props) = split(&value);
                if first == "help" || first == "?" {
                    return Ok(Ask::Print(ACCELERATORS.into()));
                }
                push_accel(&mut accels, &first)?;
                let translates = matches!(first.as_str(), "jit" | "tcg");
                for (prop, v) in props {
                    if matches!(prop.as_str(), "tier" | "cache" | "tb-size" | "stats" | "threshold")
                        && !translates
                    {
                        return Err(format!("-accel {first},{prop}=: only for jit, which translates"));
                    }
                    match prop.as_str() {
                        "deterministic" => c.deterministic = on_off("deterministic", &v)?,
                        "kernel-irqchip" => c.irqchip = irqchip(&v)?,
                        "thread" => c.turns = turns(&first, &v)?,
                        "tier" => tier(&v)?,
                        "cache" => {
                            c.code_cache = Some(
                                parse_size(&v, 1 << 20).map_err(|e| format!("-accel {first},cache=: {e}"))?,
                            )
                        }
                        // QEMU's is a number of MiB, 0 for its own choice.
                        "tb-size" if v == "0" => c.code_cache = None,
                        "tb-size" => {
                            let size = v.parse::<u64>().ok().and_then(|m| m.checked_mul(1 << 20));
                            c.code_cache = Some(size.ok_or_else(|| {
                                format!("-accel {first},tb-size={v}: a number of MiB is wanted")
                            })?);
                        }
                        "stats" | "threshold" => {
                            let Some(Accel::Jit { stats, threshold }) =
                                accels.iter_mut().rev().find(|a| matches!(a, Accel::Jit { .. }))
                            else {
                                continue;
                            };
                            if prop == "stats" {
                                *stats = on_off(&prop, &v)?;
                            } else {
                                let n = v.parse().ok().filter(|n| *n <= 254);
                                *threshold = Some(n.ok_or_else(|| {
                                    format!(
                                        "-accel {first},threshold={v}: 0 to 254 times that code is interpreted before it is translated"
                                    )
                                })?);
                            }
                        }
                        p => {
                            return unknown_prop(
                                "-accel",
                                p,
                                &[
                                    "deterministic",
                                    "thread",
                                    "tier",
                                    "cache",
                                    "tb-size",
                                    "stats",
                                    "threshold",
                                    "kernel-irqchip",
                                ],
                            );
                        }
                    }
                }
            }
            "icount" => icount(&value, c)?,
            "enable-kvm" => accels.push(Accel::Kvm),
            "cpu" => {
                if value == "help" || value == "?" {
                    return Ok(Ask::Print(hyaline_machine::cpu_help()));
                }
                c.cpu = Some(utf8()?);
            }
            "smp" => {
                let (first, props) = split(&value);
                let mut total = None;
                let mut product = 1u64;
                let mut items = vec![match first.split_once('=') {
                    Some((n, v)) => (n.to_string(), v.to_string()),
                    None => ("cpus".to_string(), first.clone()),
                }];
                items.extend(props);
                for (prop, v) in items {
                    let n: u64 = v.parse().map_err(|_| format!("-smp {prop}={v}: no number"))?;
                    match prop.as_str() {
                        "cpus" => total = Some(n),
                        "sockets" | "cores" | "threads" | "dies" => product = product.saturating_mul(n),
                        "maxcpus" => {}
                        p => {
                            return unknown_prop(
                                "-smp",
                                p,
                                &["cpus", "maxcpus", "sockets", "cores", "threads", "dies"],
                            );
                        }
                    }
                }
                let n = total.unwrap_or(product);
                if !(1..=8).contains(&n) {
                    return Err(format!("-smp {value}: {n} processors; this machine has 1 to 8"));
                }
                c.cpus = n as u8;
            }
            "m" => {
                let (first, props) = split(&value);
                let size = first.strip_prefix("size=").unwrap_or(&first).to_string();
                c.memory = parse_size(&size, 1 << 20).map_err(|e| format!("-m {e}"))?;
                for (prop, _) in props {
                    if !matches!(prop.as_str(), "slots" | "maxmem") {
                        return unknown_prop("-m", &prop, &["size", "slots", "maxmem"]);
                    }
                    run.remarks.push(format!("-m {prop}=: memory can't be plugged in while running"));
                }
            }
            "name" => c.name = Some(split(&value).0.trim_start_matches("guest=").to_string()),
            "global" => {
                let wrong = || format!("-global {value}: write driver.property=value");
                let (path, v) = value.split_once('=').ok_or_else(wrong)?;
                let (driver, prop) = path.split_once('.').ok_or_else(wrong)?;
                let Some((_, known)) = DRIVERS.iter().find(|(d, _)| *d == driver) else {
                    let near = nearest(driver, DRIVERS.iter().map(|(d, _)| *d))
                        .map_or(String::new(), |n| format!("; did you mean `{n}`?"));
                    return Err(format!("-global {value}: no driver `{driver}`{near}"));
                };
                if !known.contains(&prop) {
                    return unknown_prop(&format!("-global {driver}"), prop, known);
                }
                c.globals.push((driver.to_string(), prop.to_string(), v.to_string()));
            }
            "rtc" => {
                let (first, mut props) = split(&value);
                match first.split_once('=') {
                    Some((n, v)) => props.insert(0, (n.to_string(), v.to_string())),
                    None => props.insert(0, ("base".to_string(), first)),
                }
                for (prop, v) in props {
                    match (prop.as_str(), v.as_str()) {
                        ("base", "utc") => c.rtc = RtcBase::Utc,
                        ("base", "localtime") => c.rtc = RtcBase::Offset(local_offset()),
                        ("base", date) => c.rtc = RtcBase::Fixed(parse_date(date).ok_or_else(|| {
                            format!(
                                "-rtc base={date}: write utc, localtime, 2026-01-31 or 2026-01-31T12:00:00"
                            )
                        })?),
                        ("clock", "host" | "rt" | "vm") | ("driftfix", "none" | "slew") => {}
                        (p, _) => return unknown_prop("-rtc", p, &["base", "clock", "driftfix"]),
                    }
                }
            }
            "device" => {
                let (device, props) = split(&value);
                if device == "help" || device == "?" {
                    return Ok(Ask::Print(hyaline_machine::device_help(None)?));
                }
                if props.iter().any(|(n, _)| n == "help" || n == "?") {
                    return Ok(Ask::Print(hyaline_machine::device_help(Some(&device))?));
                }
                c.devices.push(DeviceSpec { name: device, props });
            }
            "nodefaults" => nodefaults = true,
            "kernel" => c.images.kernel = Some(raw.into()),
            "initrd" => c.images.initrd = Some(utf8()?),
            "append" => c.images.append = utf8()?,
            "bios" => c.bios = Some(raw.into()),
            "restore" => c.restore = Some(raw.into()),
            "save-at-exit" => c.save_at_exit = Some(raw.into()),
            "serial" => {
                serial_given = true;
                if serials.len() == 4 {
                    return Err("-serial: this machine has four serial ports at most".into());
                }
                serials.push(value.parse().map_err(|e| format!("-serial {e}"))?);
            }
            "debugcon" => c.debugcon = Some(value.parse().map_err(|e| format!("-debugcon {e}"))?),
            "nographic" => nographic = true,
            "display" | "vga" | "vnc" | "monitor" | "parallel" | "nic" | "net" => {
                let ok = value == "none"
                    || *name == "display" && value == "curses,none"
                    || *name == "monitor" && value == "null";
                if !ok {
                    return Err(format!("-{name} {value}: only -{name} none is supported in this version"));
                }
            }
            "S" => c.paused = true,
            "s" => run.gdb = Some(Address::Tcp("127.0.0.1".into(), 1234)),
            "gdb" if value == "none" => run.gdb = None,
            "gdb" => run.gdb = Some(Address::parse(&value).map_err(|e| e.to_string())?),
            "no-reboot" => c.no_reboot = true,
            "no-shutdown" => c.no_shutdown = true,
            "d" => {
                for item in value.split(',') {
                    log_item(item, &mut c.log)
                        .map_err(|()| match item {
                            "help" | "?" => String::new(),
                            _ => {
                                let near = nearest(item, LOG_ITEMS.iter().map(|(n, _)| *n))
                                    .map_or(String::new(), |n| format!("; did you mean `{n}`?"));
                                format!("-d: unknown log item `{item}`{near} (`-d help` lists them)")
                            }
                        })
                        .or_else(|e| if e.is_empty() { Ok(()) } else { Err(e) })?;
                    if item == "help" || item == "?" {
                        let lines: Vec<String> =
                            LOG_ITEMS.iter().map(|(n, d)| format!("{n:<13} {d}\n")).collect();
                        return Ok(Ask::Print(format!("Log items (comma separated):\n{}", lines.concat())));
                    }
                }
            }
            "trace" => {
                if value == "help" || value == "?" {
                    return Ok(Ask::Print(hyaline_watch::Spec::help()));
                }
                run.trace
                    .push(hyaline_watch::Spec::parse(&value).map_err(|e| format!("-trace {value}: {e}"))?);
            }
            "control" => run.control = Some(utf8()?),
            "profile" => run.profile.push(raw.into()),
            "on-device-panic" => {
                c.on_device_panic = match value.as_str() {
                    "disable" => PanicPolicy::Disable,
                    "stop" => PanicPolicy::Stop,
                    "abort" => PanicPolicy::Abort,
                    _ => return Err(format!("-on-device-panic {value}: there are disable, stop and abort")),
                }
            }
            "crash-dir" => c.crash_dir = Some(raw.into()),
            "crash-with-ram" => c.crash_with_ram = true,
            "inject" => {
                let form = || format!("-inject {value}: write panic:DEVICE.REGISTER or hang:DEVICE.REGISTER");
                let (kind, place) = value.split_once(':').ok_or_else(form)?;
                let (device, register) = place.rsplit_once('.').ok_or_else(form)?;
                let hang = match kind {
                    "panic" => None,
                    "hang" => Some(std::time::Duration::from_secs(3)),
                    _ => return Err(form()),
                };
                let fault = hyaline_device::Fault { register: register.into(), hang };
                c.inject.push((device.into(), fault));
            }
            "symbols" => {
                c.symbols = match value.as_str() {
                    "auto" => SymbolChoice::Auto,
                    "none" | "off" => SymbolChoice::None,
                    _ => SymbolChoice::File(raw.into()),
                }
            }
            "D" => run.log_file = Some(raw.into()),
            "pidfile" => run.pidfile = Some(raw.into()),
            "no-user-config" => {}
            other => return Err(no(format!("-{other} is not implemented"))),
        }
    }
    if c.log.access {
        let file = run.log_file.clone();
        run.trace.push(hyaline_watch::Spec { file, ..hyaline_watch::Spec::all() });
    }
    c.accels = if accels.is_empty() { Accel::software() } else { accels };
    c.accels.dedup();
    if c.deterministic && c.accels.contains(&Accel::Kvm) {
        return Err("deterministic=on and -icount work on the software CPU only: KVM can't count instructions exactly. Use -accel jit or -accel interp".into());
    }
    // QEMU's defaults: -nographic puts the first serial port on the terminal with Ctrl-A commands; -nodefaults has none.
    c.serials = if serial_given {
        let stdio = serials.iter().filter(|s| matches!(s, Spec::Stdio { .. })).count();
        if stdio > 1 {
            return Err("-serial: only one serial port can have standard input and output".into());
        }
        serials
            .into_iter()
            .map(|s| {
                Some(if nographic && s == (Spec::Stdio { mux: false }) {
                    Spec::Stdio { mux: true }
                } else {
                    s
                })
            })
            .collect()
    } else if nodefaults {
        Vec::new()
    } else {
        vec![Some(if nographic { Spec::Stdio { mux: true } } else { Spec::Null })]
    };
    if matches!(c.debugcon, Some(Spec::Stdio { .. }))
        && c.serials.iter().flatten().any(|s| matches!(s, Spec::Stdio { .. }))
    {
        return Err(
            "-debugcon stdio: a serial port has standard input and output already; use -debugcon file:PATH"
                .into(),
        );
    }
    if c.images.kernel.is_none() {
        if c.images.initrd.is_some() {
            return Err(
                "-initrd without -kernel: there is nothing that could use it; add -kernel FILE".into()
            );
        }
        if !c.images.append.is_empty() {
            return Err(
                "-append without -kernel: there is nothing that could use it; add -kernel FILE".into()
            );
        }
    }
    Ok(Ask::Run(Box::new(run)))
}

const LOG_ITEMS: &[(&str, &str)] = &[
    ("int", "interrupts and exceptions as they are delivered (software CPU)"),
    ("guest_errors", "what the guest does against a manual, and accesses that reach nothing"),
    ("unimp", "what the guest uses and a device model lacks"),
    ("in_asm", "guest code, block by block, when it is first decoded (software CPU)"),
    ("out_asm", "guest and host code of each translation (jit)"),
    ("cpu_reset", "processor state before each reset"),
    ("note", "devices' own notes"),
    ("access", "every access to a device, with its register"),
];

fn log_item(item: &str, log: &mut LogItems) -> Result<(), ()> {
    *match item {
        "int" => &mut log.int,
        "guest_errors" => &mut log.guest_errors,
        "unimp" => &mut log.unimp,
        "in_asm" => &mut log.in_asm,
        "out_asm" => &mut log.out_asm,
        "cpu_reset" => &mut log.cpu_reset,
        "note" => &mut log.note,
        "access" => &mut log.access,
        _ => return Err(()),
    } = true;
    Ok(())
}

const ACCELERATORS: &str = "\
Accelerators:
jit      the software CPU, translating what runs often (default; also: tcg, which goes on with interp on a host without executable memory)
  deterministic=on|off   processors in turn by instruction count, time from that count: runs repeat exactly
  thread=multi|single    a host thread for each processor (default), or turns on one
  tier=1                 the only tier of translation there is
  cache=SIZE             memory for translated code, all processors' together (default 64M each); tb-size=MIB is the same
  stats                  print what the translator did at the end
  threshold=N            how often code is interpreted before it is translated, 0 to 254
interp   the software CPU, one instruction after the other
  deterministic=, thread=
kvm      the host's processor
  kernel-irqchip=on|off|split
";

/// Adds what a name stands for.
fn push_accel(accels: &mut Vec<Accel>, name: &str) -> Result<(), String> {
    match name {
        "kvm" => accels.push(Accel::Kvm),
        "interp" => accels.push(Accel::Interp),
        "jit" => accels.push(Accel::Jit { stats: false, threshold: None }),
        "tcg" => accels.extend(Accel::software()),
        "hvf" | "whpx" | "xen" | "qtest" | "nvmm" | "hax" => {
            return Err(format!("-accel {name} is not supported; there are kvm, jit and interp"));
        }
        _ => {
            let near = nearest(name, ["kvm", "jit", "interp", "tcg"])
                .map_or(String::new(), |n| format!("; did you mean `{n}`?"));
            return Err(format!(
                "-accel: unknown accelerator `{name}`{near} (there are kvm, jit and interp)"
            ));
        }
    }
    Ok(())
}

/// `thread=`: true for turns on one thread.
fn turns(accel: &str, value: &str) -> Result<bool, String> {
    match value {
        "multi" => Ok(false),
        "single" if accel == "kvm" => {
            Err("-accel kvm,thread=single: KVM's processors have a thread each; only the software CPU's can take turns".into())
        }
        "single" => Ok(true),
        _ => Err(format!("-accel {accel},thread={value}: only multi and single are possible")),
    }
}

fn tier(value: &str) -> Result<(), String> {
    match value {
        "1" => Ok(()),
        "0" => Err("-accel jit,tier=0: tier 0 is the interpreter, -accel interp".into()),
        "2" => {
            Err("-accel jit,tier=2: there is no second tier of translation yet; tier=1 is what there is"
                .into())
        }
        _ => Err(format!("-accel jit,tier={value}: only tier=1 is possible")),
    }
}

/// `-icount`, as QEMU has it, by means of `deterministic=on`.
fn icount(value: &str, c: &mut Config) -> Result<(), String> {
    let (first, mut props) = split(value);
    match first.split_once('=') {
        Some((n, v)) => props.insert(0, (n.into(), v.into())),
        None => props.insert(0, ("shift".into(), first)),
    }
    let mut shift = None;
    // As in QEMU, an idle machine waits for the host's clock unless it is told not to.
    let mut sleep = true;
    for (prop, v) in props {
        match prop.as_str() {
            "shift" if v == "auto" => {
                return Err("-icount shift=auto follows the host's speed, so that no run repeats: give the nanoseconds of an instruction, \
                            shift=N for 2^N (0 to 10)"
                    .into());
            }
            "shift" => {
                shift = Some(v.parse::<u32>().ok().filter(|n| *n <= 10).ok_or_else(|| {
                    format!(
                        "-icount shift={v}: 0 to 10 are possible, for instructions of 1 to 1024 nanoseconds"
                    )
                })?);
            }
            "sleep" => sleep = on_off("-icount sleep", &v)?,
            "align" if !on_off("-icount align", &v)? => {}
            "align" => {
                return Err("-icount align=on is not supported: counted time is never held back to the host's clock while the guest \
                            executes; leave it out"
                    .into());
            }
            "rr" | "rrfile" | "rrsnapshot" => {
                return Err(format!(
                    "-icount {prop}=: there is no recording of input yet; runs without input from outside repeat without it"
                ));
            }
            p => return unknown_prop("-icount", p, &["shift", "sleep", "align"]),
        }
    }
    let shift = shift.ok_or("-icount: shift=N is missing: an instruction takes 2^N nanoseconds (0 to 10)")?;
    c.deterministic = true;
    c.instruction_ns = 1 << shift;
    c.sleep_when_idle = sleep;
    Ok(())
}

fn irqchip(value: &str) -> Result<KernelIrqchip, String> {
    match value {
        "split" => Ok(KernelIrqchip::Split),
        "on" => Ok(KernelIrqchip::On),
        "off" => Ok(KernelIrqchip::Off),
        _ => Err(format!("kernel-irqchip={value}: only on, off and split are possible")),
    }
}

/// `2026-01-31` or `2026-01-31T12:00:00`, as seconds since the Unix epoch.
fn parse_date(text: &str) -> Option<u64> {
    let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00"));
    let mut d = date.split('-').map(|p| p.parse::<u64>().ok());
    let (y, m, day) = (d.next()??, d.next()??, d.next()??);
    let mut t = time.split(':').map(|p| p.parse::<u64>().ok());
    let (h, min, s) = (t.next()??, t.next()??, t.next()??);
    if !(1970..=2999).contains(&y)
        || !(1..=12).contains(&m)
        || !(1..=31).contains(&day)
        || h > 23
        || min > 59
        || s > 59
    {
        return None;
    }
    // Days since the epoch in the proleptic Gregorian calendar, with years that start in March.
    let (yy, mm) = if m > 2 { (y, m - 3) } else { (y - 1, m + 9) };
    let days = yy * 365 + yy / 4 - yy / 100 + yy / 400 + (mm * 153 + 2) / 5 + day - 1 - 719_468;
    Some(days * 86_400 + h * 3600 + min * 60 + s)
}

/// Seconds that local time is ahead of UTC, as the C library's time zone rules say.
fn local_offset() -> i64 {
    hyaline_host::local_time_offset()
}

fn version() -> String {
    format!("Hyaline machine emulator version {}\n", env!("CARGO_PKG_VERSION"))
}

fn help() -> String {
    let mut s = version();
    s.push_str(
        "usage: hyaline [options]            run a machine\n       \
                hyaline SUBCOMMAND [options]  see `hyaline SUBCOMMAND --help`\n       \
                hyaline                       the built-in demonstration\n\n\
         Subcommands:\n  demo        the built-in demonstration; `demo linux` boots Debian's kernel to a shell\n  \
         profile     run a machine and say where its exits go: profile [SECONDS] [--html FILE] -- OPTIONS\n  \
         top         watch a running machine: exits by register, processors, guest functions\n  \
         explain     say what happened in a backtrace of QEMU\n  \
         map         what is at which address; `map why io:0xc012` says why\n  \
         ctl         one command for a running machine: reg NAME, map why io:0x3f8, trace on SPEC, why-no-irq N\n  \
         symbols     a kernel's own symbol table as a file for gdb\n",
    );
    for (title, options) in OPTIONS {
        s.push_str(&format!("\n{title}:\n"));
        for (name, argument, what) in *options {
            let head = format!("-{name} {argument}");
            let head = head.trim_end();
            if head.len() < 30 {
                s.push_str(&format!("{head:<31} {what}\n"));
            } else {
                s.push_str(&format!("{head}\n{:<31} {what}\n", ""));
            }
        }
    }
    s
}
