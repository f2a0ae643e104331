//! Measures the interpreter's speed: `cargo run --release -p hyaline-x86 --example mips [-jit] [FILE]`.
//!
//! Without FILE a built-in loop runs. FILE is a flat image of 64-bit code (`objcopy -O binary`), loaded and entered at 2 MiB in long mode with 64 MiB
//! of RAM and the stack below 32 MiB; it ends with UD2 (there is no interrupt table: the processor shuts down) and RAX is printed.

use hyaline_x86::{Exit, JitOptions, Tier, testing};
use std::time::Instant;

/// Load address of the image.
const BASE: u64 = 2 << 20;

/// Sums an array of 1,024 words a million times and mixes the sum.
const LOOP: &[u8] = &[
    0x48, 0x31, 0xc0, // xor rax, rax
    0xb9, 0x00, 0x00, 0x08, 0x00, // mov ecx, 0x80000
    // outer:
    0x31, 0xd2, // xor edx, edx
    // inner:
    0x48, 0x03, 0x04, 0xd5, 0x00, 0x00, 0x80, 0x00, // add rax, [rdx*8+0x800000]
    0x48, 0x89, 0xc3, // mov rbx, rax
    0x48, 0xc1, 0xe3, 0x07, // shl rbx, 7
    0x48, 0x31, 0xd8, // xor rax, rbx
    0x48, 0x89, 0x04, 0xd5, 0x00, 0x00, 0x80, 0x00, // mov [rdx*8+0x800000], rax
    0xff, 0xc2, // inc edx
    0x83, 0xfa, 0x40, // cmp edx, 64
    0x75, 0xdf, // jne inner
    0xff, 0xc9, // dec ecx
    0x75, 0xd9, // jne outer
    0x0f, 0x0b, // ud2
];

fn main() {
    let jit = std::env::args_os().nth(1).is_some_and(|a| a == "-jit");
    let code = match std::env::args_os().nth(if jit { 2 } else { 1 }) {
        None => LOOP.to_vec(),
        Some(path) => match std::fs::read(&path) {
            Ok(code) => code,
            Err(error) => {
                eprintln!("can't read {}: {error}", path.display());
                std::process::exit(1);
            }
        },
    };
    let (mut cpu, ram) = testing::long_mode_cpu(64 << 20);
    if let Err(error) = ram.write(BASE, &code) {
        eprintln!("the image doesn't fit: {error}");
        std::process::exit(1);
    }
    cpu.state.rip = BASE;
    cpu.state.gpr[4] = 32 << 20;
    if jit && let Err(error) = cpu.set_tier(Tier::Jit(JitOptions::default())) {
        eprintln!("{error}");
        std::process::exit(1);
    }
    let start = Instant::now();
    let exit = loop {
        match cpu.run(100_000_000) {
            Exit::Budget | Exit::Kicked => {}
            exit => break exit,
        }
    };
    let time = start.elapsed();
    let mips = cpu.state.icount as f64 / time.as_secs_f64() / 1e6;
    println!(
        "{exit:?} at {:#x}, rax {:#x}: {} instructions in {time:.3?}: {mips:.1} MIPS",
        cpu.state.rip, cpu.state.gpr[0], cpu.state.icount
    );
    if let Some(stats) = cpu.jit_stats() {
        println!("{stats:?}", stats = hyaline_x86::JitStats { interpreted: Vec::new(), ..stats.clone() });
        println!("left to the interpreter: {:?}", stats.top_interpreted(20));
    }
}
