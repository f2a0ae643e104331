//! What the flight recorder costs: `cargo run --release -p hyaline-machine --example overhead -- KERNEL INITRD [ROUNDS] [interp|jit]`.
//!
//! Boots the same guest on a deterministic machine (so that each run executes the same instructions and makes the same accesses) with
//! no recorder, with the flight recorder, which is always on in the program, with the recorder and durations, and with a trace of everything to a
//! file; in turns. Compared is the CPU time of the process: the median of the ratios of each round. `benches/watching` runs it.

use hyaline_host::chardev::Spec;
use hyaline_machine::Machine;
use hyaline_machine::chassis::Event;
use hyaline_machine::config::{Accel, Config};
use hyaline_machine::load::Images;

const MODES: [&str; 4] = [
    "no recorder",
    "flight recorder (always on)",
    "flight recorder with durations",
    "trace of all to a file",
];

fn cpu_seconds() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: overhead KERNEL INITRD [ROUNDS] [interp|jit]";
    let kernel = args.next().ok_or(usage)?;
    let initrd = args.next().ok_or(usage)?;
    let rounds: usize = args.next().map_or(Ok(5), |r| r.parse())?;
    let accel = match args.next().as_deref() {
        Some("jit") => Accel::Jit { stats: false, threshold: None },
        Some("interp") | None => Accel::Interp,
        Some(_) => return Err(usage.into()),
    };
    let mut times: [Vec<f64>; 4] = Default::default();
    let mut ratios: [Vec<f64>; 4] = Default::default();
    let (mut accesses, mut instructions) = (0, 0);
    for round in 0..rounds {
        let mut used = [0.0; 4];
        // Each round begins with another mode, so that none always follows the same.
        for at in 0..MODES.len() {
            let mode = (at + round) % MODES.len();
            let config = Config {
                accels: vec![accel.clone()],
                deterministic: true,
                memory: 256 << 20,
                images: Images {
                    kernel: Some(kernel.clone().into()),
                    initrd: Some(initrd.clone()),
                    append: "console=ttyS0 nokaslr".into(),
                    ..Images::default()
                },
                serials: vec![Some(Spec::Null)],
                no_reboot: true,
                ..Config::default()
            };
            let mut machine = Machine::new(config)?;
            let file = std::env::temp_dir().join(format!("hyaline-overhead-{}.txt", std::process::id()));
            match mode {
                0 => {
                    for space in [&machine.pc.memory, &machine.pc.ports, &machine.pc.config_space] {
                        space.set_observer(None);
                    }
                }
                2 => machine.record_durations(true),
                3 => machine.trace(&[hyaline_watch::Spec {
                    file: Some(file.clone()),
                    ..hyaline_watch::Spec::all()
                }])?,
                _ => {}
            }
            let start = cpu_seconds();
            let event = machine.run()?;
            used[mode] = cpu_seconds() - start;
            if !matches!(event, Event::PowerOff | Event::Reset(_)) {
                return Err(format!("the guest ended with {event:?}").into());
            }
            accesses = accesses.max(machine.recorder.accesses());
            instructions = machine.instructions().unwrap_or(0);
            let _ = std::fs::remove_file(file);
        }
        for (mode, used_by) in used.iter().enumerate() {
            times[mode].push(*used_by);
            ratios[mode].push(used_by / used[0]);
        }
    }
    println!("{instructions} instructions, {accesses} accesses to devices, {rounds} rounds:");
    println!("median CPU time, median ratio of the rounds, ratio of the least times");
    let least = |t: &[f64]| t.iter().copied().fold(f64::INFINITY, f64::min);
    let base = least(&times[0]);
    for ((mode, time), ratio) in MODES.iter().zip(times).zip(ratios) {
        let best = least(&time) / base;
        println!("{:7.2} s  {:6.3} x  {best:6.3} x  {mode}", median(time), median(ratio));
    }
    Ok(())
}
