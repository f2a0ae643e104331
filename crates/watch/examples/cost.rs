//! What the recorder costs: `cargo run --release -p hyaline-watch --example cost`.

use hyaline_space::{AddressSpace, ExitKind, Io, IoError, Origin, Region};
use hyaline_watch::{Clock, HostClock, Recorder};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

struct Nothing;
impl Io for Nothing {
    fn read(&self, offset: u64, _: u8, _: &Origin) -> Result<u64, IoError> {
        Ok(offset)
    }
    fn write(&self, _: u64, _: u8, _: u64, _: &Origin) -> Result<(), IoError> {
        Ok(())
    }
}

struct NoClock;
impl Clock for NoClock {
    fn host(&self) -> u64 {
        0
    }
    fn now(&self, _: u64) -> u64 {
        0
    }
}

fn measure(name: &str, space: &AddressSpace) {
    const N: u64 = 2_000_000;
    let who = Origin::vcpu(0, ExitKind::PioIn, 0x1000);
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = Instant::now();
        for i in 0..N {
            black_box(space.load(black_box(0x40 + (i & 7) * 4), 4, &who));
        }
        best = best.min(start.elapsed().as_nanos() as f64 / N as f64);
    }
    println!("{best:8.1} ns per access  {name}");
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let io = Region::container("io", 0x1_0000);
    io.add(0x40, &Region::io("ports", 32, Arc::new(Nothing)), 0)?;
    let space = AddressSpace::new_ports("I/O", &io);
    measure("no recorder", &space);
    space.set_observer(Some(Recorder::new(1, Box::new(NoClock))));
    measure("recorder without a clock", &space);
    space.set_observer(Some(Recorder::new(1, Box::new(HostClock::default()))));
    measure("recorder with the host's clock", &space);
    Ok(())
}
