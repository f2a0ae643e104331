//! What watching costs: `cargo run --release -p hyaline-machine --example overhead -- KERNEL INITRD [ROUNDS]`.
//!
//! Boots the same guest on a deterministic machine (so that each run executes the same instructions and makes the same accesses) with
//! nothing attached, with the flight recorder alone, with a trace of everything to a file, and with the exit profile; in turns. Compared is
//! the CPU time of the process, the least of all rounds.

use hyaline_host::chardev::Spec;
use hyaline_machine::Machine;
use hyaline_machine::chassis::Event;
use hyaline_machine::config::{Accel, Config};
use hyaline_machine::load::Images;
use hyaline_watch::Profile;

const MODES: [&str; 4] = ["nothing", "flight recorder", "trace of all to a file", "exit profile"];

fn cpu_seconds() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("usage: overhead KERNEL INITRD [ROUNDS]")?;
    let initrd = args.next().ok_or("usage: overhead KERNEL INITRD [ROUNDS]")?;
    let rounds: usize = args.next().map_or(Ok(3), |r| r.parse())?;
    let mut best = [f64::INFINITY; 4];
    let (mut accesses, mut instructions) = (0, 0);
    for _ in 0..rounds {
        for (mode, best) in best.iter_mut().enumerate() {
            let config = Config {
                accels: vec![Accel::Interp],
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
                2 => machine.trace(&[hyaline_watch::Spec {
                    file: Some(file.clone()),
                    ..hyaline_watch::Spec::all()
                }])?,
                3 => {
                    machine.attach(Profile::new(1));
                    machine.record_durations(true);
                }
                _ => {}
            }
            let start = cpu_seconds();
            let event = machine.run()?;
            let used = cpu_seconds() - start;
            if !matches!(event, Event::PowerOff | Event::Reset(_)) {
                return Err(format!("the guest ended with {event:?}").into());
            }
            *best = best.min(used);
            accesses = accesses.max(machine.recorder.accesses());
            instructions = machine.instructions().unwrap_or(0);
            let _ = std::fs::remove_file(file);
        }
    }
    println!("{instructions} instructions, {accesses} accesses to devices, {rounds} rounds, least CPU time");
    for (mode, best_of) in MODES.iter().zip(best) {
        println!("{best_of:7.2} s  {:.4} x  {mode}", best_of / best[0]);
    }
    Ok(())
}
