//! What an access costs: `cargo run --release -p hyaline-space --example bench`.
//!
//! Prints nanoseconds per access, the best of several rounds, on a graph about as large as a PC's.

use hyaline_ram::RamBlock;
use hyaline_space::{Access, AddressSpace, Cursor, ExitKind, Io, IoError, Limits, Observer, Origin, Region};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

struct Register(AtomicU64, Limits);

impl Io for Register {
    fn limits(&self) -> &Limits {
        &self.1
    }
    fn read(&self, offset: u64, _: u8, _: &Origin) -> Result<u64, IoError> {
        Ok(self.0.load(Ordering::Relaxed) + offset)
    }
    fn write(&self, _: u64, _: u8, value: u64, _: &Origin) -> Result<(), IoError> {
        self.0.store(value, Ordering::Relaxed);
        Ok(())
    }
}

fn register(limits: Limits) -> Arc<Register> {
    Arc::new(Register(AtomicU64::new(0), limits))
}

struct Count(AtomicU64);

impl Observer for Count {
    fn access(&self, access: &Access<'_>) {
        self.0.store(access.value, Ordering::Relaxed);
    }
}

fn measure(name: &str, mut one: impl FnMut(u64) -> u64) {
    const N: u64 = 2_000_000;
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = Instant::now();
        for i in 0..N {
            black_box(one(black_box(i)));
        }
        best = best.min(start.elapsed().as_nanos() as f64 / N as f64);
    }
    println!("{best:8.1} ns  {name}");
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let who = Origin::vcpu(0, ExitKind::MmioRead, 0x1000);
    let ram = RamBlock::new("pc.ram", 64 << 20)?;
    let system = Region::container("system", 1 << 64);
    system.add(0, &Region::ram("ram", ram, 0, 64 << 20), 0)?;
    // As a PC has them: some sixty ranges.
    for i in 0..60 {
        let bar = Region::io(&format!("bar{i}"), 0x1000, register(Limits::sizes(1, 4)));
        system.add(0xe000_0000 + i * 0x1_0000, &bar, 1)?;
    }
    system.add(
        0xfed0_0000,
        &Region::io("bytes", 0x400, register(Limits::sizes(1, 4).implemented(1, 1))),
        1,
    )?;
    let memory = AddressSpace::new("memory", &system);
    let io = Region::container("io", 0x1_0000);
    for i in 0..100 {
        io.add(i * 0x80, &Region::io(&format!("port{i}"), 8, register(Limits::sizes(1, 4))), 0)?;
    }
    let ports = AddressSpace::new_ports("io", &io);
    println!(
        "{} ranges in memory, {} in ports",
        memory.view().sections().len(),
        ports.view().sections().len()
    );

    let bar = |i: u64| 0xe000_0000 + (i * 7 % 60) * 0x1_0000 + 4;
    measure("MMIO load, 4 bytes, one of 60 ranges", |i| memory.load(bar(i), 4, &who).0);
    let mut cursor = Cursor::new();
    measure("the same with a cursor, which misses", |i| memory.load_with(&mut cursor, bar(i), 4, &who).0);
    measure("MMIO load with a cursor, same range", |i| {
        memory.load_with(&mut cursor, 0xe003_0000 + (i & 0xfc), 4, &who).0
    });
    measure("MMIO store with a cursor, same range", |i| {
        u64::from(memory.store_with(&mut cursor, 0xe003_0000 + (i & 0xfc), 4, i, &who).is_ok())
    });
    measure("MMIO load of 4 bytes, split into 4 calls", |i| {
        memory.load_with(&mut cursor, 0xfed0_0000 + (i & 0xfc), 4, &who).0
    });
    measure("port load, one of 100 ranges", |i| ports.load(i % 100 * 0x80, 1, &who).0);
    let mut port_cursor = Cursor::new();
    measure("port load with a cursor, one of 100 ranges", |i| {
        ports.load_with(&mut port_cursor, i % 100 * 0x80, 1, &who).0
    });
    measure("port load of nothing", |i| ports.load(0x8000 + (i & 0xff), 1, &who).0);
    measure("RAM load, 8 bytes", |i| memory.load((i * 8) & 0x3f_ffff, 8, &who).0);
    let mut ram_cursor = Cursor::new();
    measure("RAM load, 8 bytes, with a cursor", |i| {
        memory.load_with(&mut ram_cursor, (i * 8) & 0x3f_ffff, 8, &who).0
    });
    measure("RAM store, 8 bytes, with a cursor", |i| {
        u64::from(memory.store_with(&mut ram_cursor, (i * 8) & 0x3f_ffff, 8, i, &who).is_ok())
    });
    let mut page = [0; 4096];
    measure("RAM copy out, 4096 bytes", |i| {
        let _ = memory.read((i & 0xff) << 12, &mut page, &who);
        u64::from(page[0])
    });
    memory.set_observer(Some(Arc::new(Count(AtomicU64::new(0)))));
    measure("MMIO load with a cursor and an observer", |i| {
        memory.load_with(&mut cursor, 0xe003_0000 + (i & 0xfc), 4, &who).0
    });
    memory.set_observer(None);

    let moving = Region::io("moving", 0x1000, register(Limits::DEFAULT));
    system.add(0xf000_0000, &moving, 2)?;
    let start = Instant::now();
    const MOVES: u32 = 2000;
    for i in 0..MOVES {
        moving.set_offset(0xf000_0000 + u64::from(i % 16) * 0x1000);
    }
    println!(
        "{:8.1} us  new view of memory when a region moves",
        start.elapsed().as_secs_f64() * 1e6 / f64::from(MOVES)
    );
    Ok(())
}
