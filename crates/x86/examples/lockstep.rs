//! Runs random code in both tiers side by side until a difference is found: `cargo run --release -p hyaline-x86 --example lockstep -- [SECONDS
//! [SEED [BITS]]]`.

use hyaline_x86::jit::lockstep::Lockstep;
use std::time::{Duration, Instant};

fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |default| args.next().and_then(|a| a.parse::<u64>().ok()).unwrap_or(default);
    let (seconds, mut seed, bits) = (number(10), number(1), number(64));
    let mut l = match Lockstep::new(bits as u32) {
        Ok(l) => l,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    let start = Instant::now();
    let (mut cases, mut instructions, mut differences) = (0_u64, 0_u64, 0_u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        if std::env::var_os("LOCKSTEP_LOG").is_some() {
            eprintln!("seed {seed}");
        }
        match l.case(seed) {
            Ok(n) => instructions += n,
            Err(text) => {
                println!("{text}");
                differences += 1;
                if differences >= 5 {
                    break;
                }
            }
        }
        cases += 1;
        seed += 1;
    }
    println!(
        "{cases} cases, {instructions} instructions, {differences} differences in {:.1?}",
        start.elapsed()
    );
    {
        let stats = l.stats();
        println!(
            "{} interpreted cold; {} units, {} instructions in {} bytes; {} entries, {} refills, {} slow accesses, {} spans not in one page, {} pages voided",
            stats.cold_instructions,
            stats.units,
            stats.guest_instructions,
            stats.host_bytes,
            stats.entries,
            stats.refills,
            stats.slow_accesses,
            stats.careful,
            stats.pages_voided
        );
        println!("left to the interpreter: {:?}", stats.top_interpreted(40));
    }
    std::process::exit(i32::from(differences > 0));
}
