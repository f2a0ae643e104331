//! Runs both machines from checkpoint to checkpoint, and bisects the first interval that ends differently.

use crate::protocol::{Answer, Ask, Status};
use crate::report;
use crate::side::Pair;
use crate::{Run, report::Found};
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How a bisection gets back to the last equal checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By the kept state: fast, but translations made meanwhile stay.
    Kept,
    /// By a run of new processes from power-on with the same checkpoints.
    Anew,
}

/// Compares; true when there was no difference.
pub(crate) fn run(run: &Run) -> Result<bool> {
    let mut pair = Pair::start(run)?;
    let (start, mut said) = (Instant::now(), Instant::now());
    let mut checkpoints = 0_u64;
    let (mut at, mut last) = (0_u64, None);
    loop {
        let to = at.saturating_add(run.every).min(run.instructions);
        let both = pair.both(&Ask::Run { to, keep: true })?;
        checkpoints += 1;
        if both[0] != both[1] {
            return differs(run, pair, at, &both).map(|()| false);
        }
        let [now, _] = both;
        let ended = now.ended.clone();
        at = now.count;
        if said.elapsed() > Duration::from_secs(10) {
            said = Instant::now();
            eprintln!("{at} instructions, {checkpoints} checkpoints, {:.0?}: equal", start.elapsed());
        }
        last = Some(now).or(last);
        if ended.is_some() || at >= run.instructions {
            break;
        }
    }
    if run.console {
        for side in &mut pair.0 {
            if let Answer::Bytes(text) = side.ask(&Ask::Console)? {
                println!("{}'s console:\n{}", side.name, String::from_utf8_lossy(&text));
            }
        }
    }
    let Some(last) = last else { bail!("nothing was run") };
    println!(
        "equal: {} and {}, {at} instructions, {checkpoints} checkpoints every {} instructions, {:.1?}; the end: {}; state {:016x}, memory {:016x}",
        pair.0[0].name,
        pair.0[1].name,
        run.every,
        start.elapsed(),
        last.ended.as_deref().unwrap_or("as many instructions as asked for"),
        last.state,
        last.memory
    );
    Ok(true)
}

/// Both machines at `base + distance`, from the last equal checkpoint at `base`.
fn attempt(run: &Run, pair: &mut Pair, way: Way, base: u64, distance: u64) -> Result<[Status; 2]> {
    match way {
        Way::Kept => {
            pair.both(&Ask::Back)?;
        }
        Way::Anew => {
            *pair = Pair::start(run)?;
            let mut at = 0;
            while at < base {
                at = at.saturating_add(run.every).min(base);
                pair.both(&Ask::Run { to: at, keep: true })?;
            }
            // A checkpoint, as it was then.
            pair.both(&Ask::Run { to: base, keep: true })?;
        }
    }
    pair.both(&Ask::Run { to: base + distance, keep: false })
}

/// Finds and prints the first difference after the equal checkpoint at `base`.
fn differs(run: &Run, mut pair: Pair, base: u64, seen: &[Status; 2]) -> Result<()> {
    let names = [pair.0[0].name.clone(), pair.0[1].name.clone()];
    println!("{} and {} differ after {base} and before {} instructions", names[0], names[1], seen[0].count);
    let last = seen.iter().map(|s| s.count).max().unwrap_or(base).max(base + 1);
    let mut way = Way::Kept;
    let mut again = attempt(run, &mut pair, way, base, last - base)?;
    if again != *seen {
        for i in 0..2 {
            if again[i] != seen[i] {
                println!(
                    "{}, run again from the checkpoint at {base}, comes to another state: what differs depends on what a saved state does not hold",
                    names[i]
                );
            }
        }
        println!("running both anew from power-on for each step of the bisection: that takes long");
        way = Way::Anew;
        again = attempt(run, &mut pair, way, base, last - base)?;
        if again[0] == again[1] {
            println!(
                "the difference did not come again: not deterministic; see --twice. Before:\n{seen:#?}\nnow:\n{again:#?}"
            );
            return Ok(());
        }
    }
    // Equal after `low` instructions, different after `high`.
    let (mut low, mut high) = (0, last - base);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let both = attempt(run, &mut pair, way, base, middle)?;
        if both[0] == both[1] {
            low = middle;
        } else {
            high = middle;
        }
    }
    let found = Found { run, way, base, count: base + high, names };
    let mut go = |pair: &mut Pair, distance: u64| attempt(run, pair, way, base, distance).map(|_| ());
    report::print(&found, &mut pair, &mut go)
}
