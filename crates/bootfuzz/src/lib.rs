//! Boots random bytes: as firmware, as a multiboot kernel, as damaged kernels and saved states. Whatever they do, the machine may reset,
//! power off, run on or refuse them; it must not panic, crash a device, or stop counting instructions.

mod image;

pub use image::Shape;
pub use x86_difftest::random::Random;

use anyhow::{Context, Result};
use hyaline_host::chardev::Spec;
use hyaline_machine::Machine;
use hyaline_machine::chassis::Event;
use hyaline_machine::config::{Accel, Config, DeviceSpec};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long.
    pub time: Duration,
    /// At most so many cases.
    pub cases: u64,
    /// The first seed; they count up.
    pub seed: u64,
    /// Instructions of each case.
    pub instructions: u64,
    /// Only images of this shape.
    pub shape: Option<Shape>,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Cases that ran.
    pub cases: u64,
    /// Instructions executed.
    pub instructions: u64,
    /// How cases ended, by words.
    pub ends: BTreeMap<String, u64>,
    /// Seeds that brought something down, with what happened.
    pub failures: Vec<(u64, String)>,
    /// The longest case.
    pub longest: (u64, Duration),
    /// The whole run.
    pub time: Duration,
}

/// A case is told to stop after this time: one repeated string instruction may have four thousand million elements.
const ENOUGH: Duration = Duration::from_secs(1);
/// A machine that is told to stop must do so: this long after it, it does not react any more.
const TOO_LONG: Duration = Duration::from_secs(60);

/// Runs cases until the time or their number is over.
///
/// # Errors
/// Images can't be written into a temporary folder.
pub fn run(options: &Options) -> Result<Report> {
    let dir = std::env::temp_dir().join(format!("bootfuzz-{}-{}", std::process::id(), options.seed));
    std::fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
    let mut report = Report::default();
    let start = Instant::now();
    while report.cases < options.cases && start.elapsed() < options.time {
        let seed = options.seed.wrapping_add(report.cases);
        let began = Instant::now();
        let end = case(seed, options, &dir)?;
        let took = began.elapsed();
        if took > report.longest.1 {
            report.longest = (seed, took);
        }
        report.cases += 1;
        report.instructions += end.instructions;
        *report.ends.entry(end.how).or_default() += 1;
        if let Some(text) = end.failure {
            report.failures.push((seed, text));
        }
    }
    report.time = start.elapsed();
    let _ = std::fs::remove_dir_all(&dir);
    Ok(report)
}

struct End {
    how: String,
    instructions: u64,
    failure: Option<String>,
}

/// Every device there is, so that random accesses reach them all.
fn config(rng: &mut Random, image: &image::Image, file: PathBuf, dir: &Path) -> Result<Config> {
    let device = |name: &str| DeviceSpec { name: name.into(), props: Vec::new() };
    let mut c = Config {
        accels: vec![Accel::Interp],
        deterministic: true,
        cpus: if rng.percent(20) { 2 } else { 1 },
        memory: 16 << 20,
        serials: vec![Some(Spec::Null); 4],
        debugcon: Some(Spec::Null),
        // Its usual port is one of pc-testdev's.
        globals: vec![("isa-debugcon".into(), "iobase".into(), "0x402".into())],
        devices: ["pcnet", "pci-testdev", "pc-testdev", "isa-debug-exit", "pvpanic"].map(device).to_vec(),
        ..Config::default()
    };
    match image.shape {
        Shape::Firmware => c.bios = Some(file),
        Shape::Kernel | Shape::Damaged => c.images.kernel = Some(file),
        Shape::State => {
            let kernel = dir.join("kernel");
            std::fs::write(&kernel, hyaline_guests::COUNT)?;
            c.images.kernel = Some(kernel);
            c.restore = Some(file);
            c.cpus = 1;
        }
    }
    Ok(c)
}

fn case(seed: u64, options: &Options, dir: &Path) -> Result<End> {
    let mut rng = Random::new(seed);
    let image = image::Image::random(&mut rng, options.shape, &mut || saved_state(dir))?;
    let file = dir.join("image");
    std::fs::write(&file, &image.data).with_context(|| format!("{}", file.display()))?;
    let config = config(&mut rng, &image, file, dir)?;
    let work = || {
        let mut machine = match Machine::new(config) {
            Ok(machine) => machine,
            Err(e) => {
                // Only damage is refused.
                let wrong =
                    matches!(image.shape, Shape::Firmware | Shape::Kernel) || e.to_string().is_empty();
                return (format!("{}: refused", image.shape), 0, wrong.then(|| e.to_string()));
            }
        };
        // Instructions alone are no bound.
        let (done, waiting) = mpsc::channel::<()>();
        let core = machine.core.clone();
        let watchdog = std::thread::spawn(move || {
            let runs = |time| waiting.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout);
            if runs(ENOUGH) {
                core.event(Event::Stop);
                if runs(TOO_LONG) {
                    eprintln!("bootfuzz: seed {seed}: the machine does not stop when told to");
                    std::process::exit(1);
                }
            }
        });
        let event = machine.run_for(options.instructions);
        drop(done);
        let _ = watchdog.join();
        let (how, failure) = match event {
            Ok(Event::Reset(_)) => ("reset", None),
            Ok(Event::PowerOff) => ("power-off", None),
            Ok(Event::Exit(_)) => ("exit", None),
            Ok(Event::TripleFault(cpu)) => {
                // The report must hold for every state.
                let report = machine.triple_fault_report(cpu);
                ("triple fault", (report.len() < 100).then_some(report))
            }
            Ok(Event::Stop | Event::Report) => ("ran on", None),
            Ok(Event::Debug(stop)) => ("debug stop", Some(format!("nobody debugs: {stop:?}"))),
            Ok(Event::GuestPanicked) => ("pvpanic", None),
            Ok(Event::Failed(text)) => ("failed", Some(text)),
            Ok(Event::DeviceCrashed(text)) => ("device crashed", Some(text)),
            Err(e) => ("error", Some(e.to_string())),
        };
        (format!("{}: {how}", image.shape), machine.instructions().unwrap_or(0), failure)
    };
    // The machine is given up after a panic, so that no broken state is seen.
    Ok(match catch_unwind(AssertUnwindSafe(work)) {
        Ok((how, instructions, failure)) => End { how, instructions, failure },
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_string()));
            let text = format!("panic: {}", text.unwrap_or_default());
            End { how: format!("{}: panic", image.shape), instructions: 0, failure: Some(text) }
        }
    })
}

/// A state of a small guest, for damaging.
fn saved_state(dir: &Path) -> Result<Vec<u8>> {
    let path = dir.join("good-state");
    if !path.exists() {
        let kernel = dir.join("state-kernel");
        std::fs::write(&kernel, hyaline_guests::COUNT)?;
        let image = image::Image { shape: Shape::Kernel, data: Vec::new() };
        let mut config = config(&mut Random::new(0), &image, kernel, dir)?;
        config.cpus = 1;
        let mut machine = Machine::new(config)?;
        machine.run_for(100_000)?;
        machine.save(&path)?;
    }
    Ok(std::fs::read(&path)?)
}
