//! Unwinding a Linux kernel's stack by the tables that it carries for itself (ORC), read from the guest's memory.
//!
//! The format is the kernel's own (Documentation/arch/x86/orc-unwinder.rst and `struct orc_entry`): an array of 32-bit distances, each from
//! itself to an instruction, sorted; and beside it an array of 6-byte entries that hold from that instruction on: an offset for the stack
//! pointer of the caller (s16), one for its frame pointer (s16), then bits 0-3 the register that the first is counted from, 4-7 the second's,
//! and from bit 8 on the type. Kernels up to 6.3 have type 0 for a call, 1 for a `pt_regs`, 2 for an IRET frame; later ones 2, 3 and 4.

use crate::guest_stack::{Linear, follows_call};
use hyaline_watch::symbols::Symbols;
use hyaline_x86::state::{CpuState, gpr};

/// Size of an entry.
const ENTRY: u64 = 6;
/// Entries looked at to tell old kernels from new ones.
const PROBES: u64 = 64;
/// More entries than any kernel has: then these are no tables.
const MOST: u64 = 8 << 20;
/// A kernel's stacks are smaller than this; the caller's frame lies above the callee's.
const STACK: u64 = 64 << 10;

/// Registers that offsets are counted from.
mod reg {
    pub(super) const UNDEFINED: u16 = 0;
    pub(super) const PREVIOUS_SP: u16 = 1;
    pub(super) const DX: u16 = 2;
    pub(super) const DI: u16 = 3;
    pub(super) const BP: u16 = 4;
    pub(super) const SP: u16 = 5;
    pub(super) const R10: u16 = 6;
    pub(super) const R13: u16 = 7;
    pub(super) const BP_INDIRECT: u16 = 8;
    pub(super) const SP_INDIRECT: u16 = 9;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Call,
    Registers,
    Iret,
}

/// The tables in the guest's memory.
pub(crate) struct Orc {
    ips: u64,
    entries: u64,
    count: u64,
    /// Type of a call: 0 up to Linux 6.3, 2 later.
    call: u16,
}

struct Entry {
    sp_offset: u64,
    bp_offset: u64,
    sp: u16,
    bp: u16,
    kind: Kind,
}

impl Orc {
    /// The tables, if the kernel has them and they are readable.
    pub(crate) fn find(m: &Linear<'_>, symbols: &Symbols) -> Option<Orc> {
        let at = |name| symbols.address(name);
        let (ips, end) = (at("__start_orc_unwind_ip")?, at("__stop_orc_unwind_ip")?);
        let (entries, last) = (at("__start_orc_unwind")?, at("__stop_orc_unwind")?);
        let count = end.checked_sub(ips)? / 4;
        if count == 0 || count > MOST || last.checked_sub(entries)? != count * ENTRY {
            return None;
        }
        let mut orc = Orc { ips, entries, count, call: 0 };
        let of = |kind: u16| {
            let bits = |i| Some(m.load(orc.entries + (i * count / PROBES) * ENTRY + 4, 2)? as u16 >> 8 & 7);
            (0..PROBES).filter(|i| bits(*i) == Some(kind)).count()
        };
        let (old, new) = (of(0), of(2));
        if old + new < PROBES as usize / 2 {
            return None;
        }
        orc.call = if old >= new { 0 } else { 2 };
        Some(orc)
    }

    /// The instruction that entry number `i` begins to hold at.
    fn ip(&self, m: &Linear<'_>, i: u64) -> Option<u64> {
        let at = self.ips + 4 * i;
        Some(at.wrapping_add_signed(i64::from(m.load(at, 4)? as u32 as i32)))
    }

    fn entry(&self, m: &Linear<'_>, rip: u64) -> Option<Entry> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.ip(m, middle)? <= rip { low = middle + 1 } else { high = middle }
        }
        let at = self.entries + low.checked_sub(1)? * ENTRY;
        let raw = m.load(at, 6)?;
        let signed = |n: u64| i64::from(n as u16 as i16) as u64;
        let bits = (raw >> 32) as u16;
        let kind = if self.call == 0 { bits >> 8 & 3 } else { (bits >> 8 & 7).checked_sub(2)? };
        Some(Entry {
            sp_offset: signed(raw),
            bp_offset: signed(raw >> 16),
            sp: bits & 15,
            bp: bits >> 4 & 15,
            kind: match kind {
                0 => Kind::Call,
                1 => Kind::Registers,
                2 => Kind::Iret,
                _ => return None,
            },
        })
    }

    /// The return addresses, innermost first, without the present instruction; up to where the tables end, the guest's user mode begins, or
    /// something does not fit.
    pub(crate) fn unwind(&self, m: &Linear<'_>, s: &CpuState, symbols: &Symbols) -> Vec<u64> {
        let mut found = Vec::new();
        let (mut rip, mut sp, mut bp) = (s.rip, s.gpr[gpr::RSP], s.gpr[gpr::RBP]);
        // A return address may lie behind its function's end; a place that was interrupted is exact.
        let mut exact = true;
        while found.len() < 64 {
            let Some(e) = self.entry(m, if exact { rip } else { rip.wrapping_sub(1) }) else { break };
            let first = found.is_empty();
            let from = match e.sp {
                reg::SP => Some(sp.wrapping_add(e.sp_offset)),
                reg::BP => Some(bp.wrapping_add(e.sp_offset)),
                reg::BP_INDIRECT => m.load(bp.wrapping_add(e.sp_offset), 8),
                reg::SP_INDIRECT => m.load(sp, 8).map(|v| v.wrapping_add(e.sp_offset)),
                // Only the innermost frame's registers are known.
                reg::DX if first => Some(s.gpr[gpr::RDX].wrapping_add(e.sp_offset)),
                reg::DI if first => Some(s.gpr[gpr::RDI].wrapping_add(e.sp_offset)),
                reg::R10 if first => Some(s.gpr[10].wrapping_add(e.sp_offset)),
                reg::R13 if first => Some(s.gpr[13].wrapping_add(e.sp_offset)),
                _ => None,
            };
            let Some(previous) = from else { break };
            let switched = matches!(e.sp, reg::BP_INDIRECT | reg::SP_INDIRECT);
            if !switched && (previous <= sp || previous - sp > STACK) && e.kind == Kind::Call {
                break;
            }
            let next = match e.kind {
                Kind::Call => {
                    let old_bp = match e.bp {
                        reg::UNDEFINED => Some(bp),
                        reg::PREVIOUS_SP => m.load(previous.wrapping_add(e.bp_offset), 8),
                        reg::BP => m.load(bp.wrapping_add(e.bp_offset), 8),
                        _ => None,
                    };
                    m.load(previous.wrapping_sub(8), 8).zip(old_bp).map(|(r, b)| (r, previous, b, false))
                }
                // `struct pt_regs`: BP is its fifth word, the IRET frame its words 16 to 20.
                Kind::Registers => (|| {
                    let word = |n: u64| m.load(previous.wrapping_add(8 * n), 8);
                    Some((word(16)?, word(19)?, word(4)?, true))
                })(),
                Kind::Iret => (|| {
                    let word = |n: u64| m.load(previous.wrapping_add(8 * n), 8);
                    Some((word(0)?, word(3)?, bp, true))
                })(),
            };
            let Some((r, next_sp, next_bp, interrupted)) = next else { break };
            // The end, user mode, or nothing that was ever called.
            if symbols.lookup(r).is_none() || (!interrupted && !follows_call(m, r)) {
                break;
            }
            (rip, sp, bp, exact) = (r, next_sp, next_bp, interrupted);
            found.push(rip);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_ram::RamBlock;
    use hyaline_space::{AddressSpace, Origin, Region};
    use hyaline_x86::state::{Seg, efer};

    const BASE: u64 = 0xffff_ffff_8000_0000;

    /// 1 MiB that is seen at `BASE`, by one 2 MiB page.
    fn guest() -> (AddressSpace, CpuState) {
        let root = Region::container("system", 1 << 64);
        let ram = RamBlock::new("ram", 2 << 20).unwrap();
        root.add(0, &Region::ram("ram", ram, 0, 2 << 20), 0).unwrap();
        let memory = AddressSpace::new("memory", &root);
        let put = |at: u64, v: u64| assert!(memory.store(at, 8, v, &Origin::LOADER).is_ok());
        put(0x1000 + 511 * 8, 0x2003);
        put(0x2000 + 510 * 8, 0x3003);
        put(0x3000, 0x83);
        let mut s = CpuState::at_reset(true);
        s.cr0 |= 1 | 1 << 31;
        s.cr4 |= 1 << 5;
        s.efer |= efer::LMA;
        s.seg[Seg::Cs as usize].attr = 0x209b;
        s.cr3 = 0x1000;
        (memory, s)
    }

    fn frames(calls: u16) -> Vec<String> {
        let (memory, mut s) = guest();
        let put = |at: u64, size: u8, v: u64| assert!(memory.store(at, size, v, &Origin::LOADER).is_ok());
        // inner at +0x10000 keeps 16 bytes, outer at +0x11000 has BP as its base, entry at +0x12000 made a `pt_regs` of what it interrupted, which
        // is `busy` at +0x13000, called from `start` at +0x14000, of which the tables say nothing.
        let kind = |n: u16| u64::from(if calls == 0 { n } else { n + 2 });
        let table: [(u64, i16, i16, u64); 5] = [
            (0x1_0000, 24, 0, 5 | kind(0) << 8),
            (0x1_1000, 16, -16, 4 | 1 << 4 | kind(0) << 8),
            (0x1_2000, 0, 0, 5 | kind(1) << 8),
            (0x1_3000, 8, 0, 5 | kind(0) << 8),
            (0x1_4000, 0, 0, kind(0) << 8),
        ];
        let (ips, entries) = (0x2_0000, 0x3_0000);
        for (i, (ip, sp, bp, bits)) in table.iter().enumerate() {
            let i = i as u64;
            put(ips + 4 * i, 4, ip.wrapping_sub(ips + 4 * i) & 0xffff_ffff);
            put(entries + 6 * i, 2, *sp as u16 as u64);
            put(entries + 6 * i + 2, 2, *bp as u16 as u64);
            put(entries + 6 * i + 4, 2, *bits);
        }
        let sp = 0x8_0000;
        let call = |at: u64| put(at - 5, 1, 0xe8);
        // inner: 16 bytes of its own, then the return address into outer.
        put(sp + 16, 8, BASE + 0x1_1020);
        call(0x1_1020);
        s.gpr[gpr::RSP] = BASE + sp;
        s.gpr[gpr::RBP] = BASE + sp + 0x40;
        // outer: BP + 16 is the caller's SP; BP saved at -16 of that.
        put(sp + 0x40, 8, BASE + 0x77);
        put(sp + 0x48, 8, BASE + 0x1_2008);
        call(0x1_2008);
        // A left-over return address that a scan would tell.
        put(sp + 0x30, 8, BASE + 0x1_1020);
        // entry: its pt_regs.
        let regs = sp + 0x50;
        put(regs + 8 * 4, 8, BASE + 0x99);
        put(regs + 8 * 16, 8, BASE + 0x1_3000);
        put(regs + 8 * 19, 8, BASE + sp + 0x200);
        put(sp + 0x200, 8, BASE + 0x1_4010);
        call(0x1_4010);
        put(sp + 0x208, 8, BASE + 0x1_1020);
        s.rip = BASE + 0x1_0004;
        let place = |at: u64, kind: char, name: &str| (BASE + at, kind, name.to_string());
        let symbols = Symbols::new(
            [
                place(0x1_0000, 't', "inner"),
                place(0x1_1000, 't', "outer"),
                place(0x1_2000, 't', "entry"),
                place(0x1_3000, 't', "busy"),
                place(0x1_4000, 't', "start"),
                place(ips, 'd', "__start_orc_unwind_ip"),
                place(ips + 20, 'd', "__stop_orc_unwind_ip"),
                place(entries, 'd', "__start_orc_unwind"),
                place(entries + 30, 'd', "__stop_orc_unwind"),
            ],
            "test",
        );
        let told = crate::guest_stack::stack(&s, &memory, &symbols);
        assert!(told.iter().all(|f| f.sure()), "{told:?}");
        told.into_iter().map(|f| f.name).collect()
    }

    #[test]
    fn tables_of_old_and_new_kernels() {
        let want = ["inner+0x4", "outer+0x20", "entry+0x8", "busy", "start+0x10"];
        assert_eq!(frames(0), want);
        assert_eq!(frames(2), want);
    }
}
