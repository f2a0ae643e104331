//! Linux' own symbol tables, found in guest memory.
//!
//! The layout is what `scripts/kallsyms.c` and `kernel/kallsyms.c` of the kernel define: names are sequences of tokens, tokens are
//! strings in a table of 256, every 256th name has a marker. Two orders of the parts occur: up to 6.3 the offsets come first
//! (`offsets, relative_base, num_syms, names, markers, [seqs], token_table, token_index`), later they come last
//! (`num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs`). Nothing but the tables is relied on, so the search
//! works without paging information; what is found is checked against itself.

use super::{LINKED, Sure, Symbols};
use std::ops::Range;

/// Guest RAM as the search reads it.
pub trait Memory {
    /// Ranges that hold anything, ascending.
    fn populated(&self) -> Vec<Range<u64>>;
    /// Copies bytes out; false outside.
    fn read(&self, at: u64, buf: &mut [u8]) -> bool;
}

/// Digits are always tokens of their own, and stand in a row.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
const CHUNK: u64 = 4 << 20;
/// Fewer symbols has no kernel; more has none yet.
const COUNT: Range<u32> = 5_000..2_000_000;

/// Names that are stepped over in one search: memory that looks like names everywhere must not hold it up.
const STEPS: u64 = 20_000_000;

struct Tables {
    tokens: Vec<Vec<u8>>,
    /// Where the table of tokens starts and the index ends.
    start: u64,
    end: u64,
}

fn bytes(memory: &dyn Memory, at: u64, len: usize) -> Option<Vec<u8>> {
    let mut buf = vec![0; len];
    memory.read(at, &mut buf).then_some(buf)
}
fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(b.get(at..at.checked_add(4)?)?.try_into().ok()?))
}
fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(b.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
fn align(n: u64, to: u64) -> u64 {
    n.next_multiple_of(to)
}

/// Searches guest RAM. `hint` is an address of the running kernel's code, if one is known: it tells the kernel that runs from copies that
/// its decompressor left.
pub fn find(memory: &dyn Memory, hint: Option<u64>) -> Option<Symbols> {
    let mut best: Option<Symbols> = None;
    for at in digits(memory) {
        let Some(found) = tables(memory, at).and_then(|t| symbols(memory, &t, hint)) else { continue };
        let better = |b: &Symbols| (found.sure, found.offset != 0) > (b.sure, b.offset != 0);
        if best.as_ref().is_none_or(better) {
            best = Some(found);
        }
    }
    best
}

/// Places of the digits' tokens.
fn digits(memory: &dyn Memory) -> Vec<u64> {
    let finder = memchr::memmem::Finder::new(DIGITS);
    let mut found = Vec::new();
    let mut buf = vec![0; (CHUNK as usize) + DIGITS.len()];
    for range in memory.populated() {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(CHUNK + DIGITS.len() as u64) as usize;
            let Some(chunk) = buf.get_mut(..len) else { break };
            if memory.read(at, chunk) {
                found.extend(finder.find_iter(chunk).map(|i| at + i as u64));
            }
            // A guest could fill its memory with such strings: a bounded number is looked at.
            if found.len() > 64 {
                return found;
            }
            at += CHUNK;
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The tables of tokens around the digits, if their index agrees.
fn tables(memory: &dyn Memory, digits: u64) -> Option<Tables> {
    const BACK: u64 = 2048;
    let from = digits.checked_sub(BACK)?;
    let window = bytes(memory, from, 16 << 10)?;
    // Tokens 1 to 0x2f lie before: each ends with a zero byte.
    let mut first = BACK as usize;
    for _ in 1..usize::from(b'0') {
        // From the zero that ends the token before, back to the one that ends its predecessor.
        let ends = first.checked_sub(1)?;
        first = window.get(..ends)?.iter().rposition(|b| *b == 0)? + 1;
    }
    // What stands before token 0 may be anything; the table is aligned, and the index tells which start is right.
    (1..128)
        .filter_map(|back| first.checked_sub(back))
        .filter(|s| (from + *s as u64).is_multiple_of(4))
        .find_map(|start| {
            let mut tokens = Vec::with_capacity(256);
            let mut offsets = Vec::with_capacity(256);
            let mut at = start;
            for _ in 0..256 {
                let len = window.get(at..)?.iter().position(|b| *b == 0)?;
                offsets.push(u16::try_from(at - start).ok()?);
                tokens.push(window.get(at..at + len)?.to_vec());
                at += len + 1;
            }
            [8, 4].into_iter().find_map(|to| {
                let index = (align(from + at as u64, to) - from) as usize;
                let same = |(i, want): (usize, &u16)| {
                    window.get(index + 2 * i..index + 2 * i + 2).is_some_and(|b| b == want.to_le_bytes())
                };
                let fits = offsets.iter().enumerate().all(same);
                fits.then(|| Tables {
                    tokens: tokens.clone(),
                    start: from + start as u64,
                    end: from + index as u64 + 512,
                })
            })
        })
}

/// Length of a name entry and where its tokens are: one byte, or two from 128 tokens on (kernel 6.1 and later).
fn entry(names: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*names.get(at)?);
    if first < 0x80 {
        return (first > 0).then_some((at + 1, first));
    }
    let len = first & 0x7f | usize::from(*names.get(at + 1)?) << 7;
    (len > 0).then_some((at + 2, len))
}

/// Where the names are, and how many.
struct Names {
    bytes: Vec<u8>,
    count: u32,
    /// Address of the number of symbols.
    count_at: u64,
}

fn names(memory: &dyn Memory, t: &Tables) -> Option<Names> {
    // Markers rise; they end at the token table, or before the 3-byte sequence numbers of the names that 6.2 and 6.3 have between.
    let span = t.start.min(24 << 20);
    let base = t.start - span;
    let area = bytes(memory, base, span as usize)?;
    // The number of symbols stands before the names. All places that could be it are tried, nearest first; the markers decide.
    let mut at = (area.len() / 4).saturating_sub(1) * 4;
    let mut budget = STEPS;
    while at >= 4 && budget > 0 {
        at -= 4;
        let Some(count) = u32_at(&area, at).filter(|c| COUNT.contains(c)) else { continue };
        for skip in [8, 4] {
            if !(base + at as u64).is_multiple_of(skip as u64)
                || (skip == 8 && u32_at(&area, at + 4) != Some(0))
            {
                continue;
            }
            if let Some(end) = walk(&area, at + skip, count, &mut budget) {
                let names = area.get(at + skip..end)?.to_vec();
                return Some(Names { bytes: names, count, count_at: base + at as u64 });
            }
        }
    }
    None
}

/// Follows `count` names from `at`, then checks them against the markers that must follow. The end of the names, if all fits.
fn walk(area: &[u8], at: usize, count: u32, budget: &mut u64) -> Option<usize> {
    let mut pos = at;
    let mut marks = Vec::with_capacity(count as usize / 256 + 1);
    for i in 0..count {
        *budget = budget.checked_sub(1)?;
        if i % 256 == 0 {
            marks.push((pos - at) as u32);
        }
        let (tokens, len) = entry(area, pos)?;
        pos = tokens + len;
        if len > 512 || pos > area.len() {
            return None;
        }
    }
    [8, 4].into_iter().find_map(|to| {
        let first = pos.next_multiple_of(to);
        let fits = marks.iter().enumerate().all(|(i, m)| u32_at(area, first + 4 * i) == Some(*m));
        fits.then_some(pos)
    })
}

/// Addresses: offsets from a base. The base was relocated with the kernel, so no KASLR offset is left to undo.
fn addresses(memory: &dyn Memory, t: &Tables, n: &Names) -> Option<(Vec<u64>, u64)> {
    let size = u64::from(n.count) * 4;
    let kernel = |base: u64| base >= 0xffff_ffff_8000_0000 && base.is_multiple_of(0x1000);
    // Up to 6.3: before the count. Later: behind the index.
    let before = [8u64, 16, 4].into_iter().find_map(|back| {
        let at = n.count_at.checked_sub(back)?;
        let base = u64_at(&bytes(memory, at, 8)?, 0).filter(|b| kernel(*b))?;
        Some((base, at.checked_sub(align(size, 8))?))
    });
    let after = || {
        let offsets = align(t.end, 8);
        let at = align(offsets + size, 8);
        let base = u64_at(&bytes(memory, at, 8)?, 0).filter(|b| kernel(*b))?;
        Some((base, offsets))
    };
    let (base, at) = before.or_else(after)?;
    let raw = bytes(memory, at, size as usize)?;
    let offsets: Vec<i32> =
        raw.chunks_exact(4).filter_map(|c| Some(i32::from_le_bytes(c.try_into().ok()?))).collect();
    // With CONFIG_KALLSYMS_ABSOLUTE_PERCPU (x86-64 SMP up to 6.14) negative offsets count from the base, and others are absolute.
    let negative = offsets.iter().filter(|o| **o < 0).count();
    let percpu = negative > offsets.len() / 2;
    let address = |o: &i32| match (percpu, *o) {
        (true, o) if o < 0 => base.wrapping_sub(1).wrapping_sub(i64::from(o) as u64),
        (true, o) => o as u64,
        (false, o) => base.wrapping_add(u64::from(o as u32)),
    };
    Some((offsets.iter().map(address).collect(), base))
}

fn symbols(memory: &dyn Memory, t: &Tables, hint: Option<u64>) -> Option<Symbols> {
    let n = names(memory, t)?;
    let (addresses, base) = addresses(memory, t, &n)?;
    let mut pos = 0;
    let mut all = Vec::with_capacity(addresses.len());
    for addr in &addresses {
        let (tokens, len) = entry(&n.bytes, pos)?;
        let mut name = Vec::with_capacity(32);
        for token in n.bytes.get(tokens..tokens + len)? {
            name.extend_from_slice(t.tokens.get(usize::from(*token))?);
        }
        pos = tokens + len;
        let text = String::from_utf8_lossy(&name);
        let mut chars = text.chars();
        let kind = chars.next()?;
        all.push((*addr, kind, chars.as_str().to_string()));
    }
    let mut symbols = Symbols::new(all, "the kernel's own tables in guest memory");
    let (first, last) = symbols.code()?;
    symbols.offset = first.wrapping_sub(LINKED);
    symbols.because = format!("{} names fit their markers; base {base:#x}", n.count);
    symbols.sure = Sure::Strong;
    match hint {
        Some(h) if !(first..last.saturating_add(64 << 20)).contains(&h) => symbols.sure = Sure::Guess,
        _ => {}
    }
    Some(symbols)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Flat(Vec<u8>);
    impl Memory for Flat {
        fn populated(&self) -> Vec<Range<u64>> {
            let all = 0..self.0.len() as u64;
            vec![all]
        }
        fn read(&self, at: u64, buf: &mut [u8]) -> bool {
            let Some(b) = self.0.get(at as usize..).and_then(|b| b.get(..buf.len())) else { return false };
            buf.copy_from_slice(b);
            true
        }
    }

    /// Tables as the kernel's build makes them, at `base`, in one of the two orders.
    fn image(new_order: bool, base: u64, count: usize) -> Vec<u8> {
        let mut tokens: Vec<Vec<u8>> = (0..256).map(|_| Vec::new()).collect();
        for c in (b'0'..=b'9').chain(b'a'..=b'z').chain(*b"TtdD_") {
            tokens[usize::from(c)] = vec![c];
        }
        tokens[1] = b"Tfunc_".to_vec();
        let mut table = Vec::new();
        let mut index = Vec::new();
        for t in &tokens {
            index.extend((table.len() as u16).to_le_bytes());
            table.extend(t);
            table.push(0);
        }
        let (mut names, mut markers, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..count {
            if i % 256 == 0 {
                markers.extend((names.len() as u32).to_le_bytes());
            }
            let mut name = vec![1];
            name.extend(i.to_string().bytes());
            if i == 7 {
                name.extend([b'a'; 200]);
            }
            match name.len() {
                n if n < 0x80 => names.push(n as u8),
                n => names.extend([(n & 0x7f | 0x80) as u8, (n >> 7) as u8]),
            }
            names.extend(name);
            let o = i as i32 * 16;
            offsets.extend((if new_order { o } else { -1 - o }).to_le_bytes());
        }
        let mut out = vec![0x55; 4096];
        let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(8), 0);
        let part = |out: &mut Vec<u8>, b: &[u8]| {
            out.extend(b);
            pad(out);
        };
        if !new_order {
            part(&mut out, &offsets);
            part(&mut out, &base.to_le_bytes());
        }
        part(&mut out, &(count as u32).to_le_bytes());
        part(&mut out, &names);
        part(&mut out, &markers);
        if !new_order {
            part(&mut out, &vec![3; count * 3]);
        }
        part(&mut out, &table);
        part(&mut out, &index);
        if new_order {
            part(&mut out, &offsets);
            part(&mut out, &base.to_le_bytes());
        }
        out.resize(out.len() + (64 << 10), 0x77);
        out
    }

    #[test]
    fn both_orders_are_found() {
        for order in [false, true] {
            let base = 0xffff_ffff_9a00_0000;
            let s = find(&Flat(image(order, base, 6000)), Some(base + 0x100)).expect("found");
            assert_eq!(s.at(base + 0x14).as_deref(), Some("func_1+0x4"), "order {order}");
            assert_eq!((s.len(), s.sure, s.offset), (6000, Sure::Strong, 0x1900_0000));
            assert!(s.address(&format!("func_7{}", "a".repeat(200))).is_some());
            let s = find(&Flat(image(order, base, 6000)), Some(0xffff_ffff_ff00_0000)).expect("found");
            assert_eq!(s.sure, Sure::Guess, "an address of the guest contradicts");
        }
    }

    #[test]
    fn damaged_tables_are_none() {
        let whole = image(false, 0xffff_ffff_8100_0000, 6000);
        for cut in [0, 100, 4000, 5000, 40_000, whole.len() - (66 << 10)] {
            assert!(find(&Flat(whole[..cut].to_vec()), None).is_none(), "{cut}");
        }
        let mut wrong = whole.clone();
        let names = 4096 + 24_000 + 8 + 8;
        wrong[names] = 0x7f;
        assert!(find(&Flat(wrong), None).is_none());
        // Digits alone, many times over.
        assert!(find(&Flat(DIGITS.repeat(20_000)), None).is_none());
    }
}
