//! The guest's linear memory and its call stack, as far as they can be told from outside.

use crate::orc::Orc;
use hyaline_space::{AddressSpace, HostRange, Origin};
use hyaline_watch::symbols::Symbols;
use hyaline_x86::state::{CpuState, Seg, cr0, cr4, efer, gpr};
use std::cell::RefCell;
use std::collections::HashMap;

/// The physical address of a linear one by the guest's own page tables (SDM vol. 3A §4.3 to §4.5), whatever the permissions and without
/// any effect on them.
pub fn translate(s: &CpuState, memory: &AddressSpace, linear: u64) -> Option<u64> {
    if s.cr0 & cr0::PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    let load = |at: u64, size: u8| {
        let (value, outcome) = memory.load(at, size, &Origin::DEBUGGER);
        outcome.is_ok().then_some(value)
    };
    if s.cr4 & cr4::PAE == 0 {
        let entry = load((s.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4, 4)?;
        if entry & 1 == 0 {
            return None;
        }
        if entry & 0x80 != 0 && s.cr4 & cr4::PSE != 0 {
            return Some((entry & 0xffc0_0000) | (entry >> 13 & 0xff) << 32 | linear & 0x3f_ffff);
        }
        let entry = load((entry & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4, 4)?;
        return (entry & 1 != 0).then_some((entry & 0xffff_f000) | linear & 0xfff);
    }
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    let (mut table, mut level) = if s.efer & efer::LMA != 0 {
        (s.cr3 & FRAME, if s.cr4 & cr4::LA57 != 0 { 5 } else { 4 })
    } else {
        let entry = load((s.cr3 & 0xffff_ffe0) + (linear >> 30 & 3) * 8, 8)?;
        if entry & 1 == 0 {
            return None;
        }
        (entry & FRAME, 2)
    };
    while level > 0 {
        let shift = 12 + 9 * (level - 1);
        let entry = load(table + (linear >> shift & 0x1ff) * 8, 8)?;
        if entry & 1 == 0 {
            return None;
        }
        let within = (1 << shift) - 1;
        if level == 1 || (level <= 3 && entry & 0x80 != 0) {
            return Some(entry & FRAME & !within | linear & within);
        }
        table = entry & FRAME;
        level -= 1;
    }
    None
}

/// The guest's linear memory as one processor sees it, RAM and ROM only. Pages are looked up once.
pub(crate) struct Linear<'a> {
    state: &'a CpuState,
    memory: &'a AddressSpace,
    pages: RefCell<HashMap<u64, Option<HostRange>>>,
}

impl<'a> Linear<'a> {
    pub(crate) fn new(state: &'a CpuState, memory: &'a AddressSpace) -> Linear<'a> {
        Linear { state, memory, pages: RefCell::default() }
    }

    fn page(&self, page: u64) -> Option<HostRange> {
        let find = || self.memory.lookup(translate(self.state, self.memory, page)?)?.host;
        self.pages.borrow_mut().entry(page).or_insert_with(find).clone()
    }

    /// Up to 8 bytes, little endian.
    pub(crate) fn load(&self, at: u64, size: u8) -> Option<u64> {
        let mut bytes = [0; 8];
        let (first, last) = (at & !0xfff, at.checked_add(u64::from(size) - 1)? & !0xfff);
        if first == last {
            let host = self.page(first)?;
            host.block.read(host.offset + (at & 0xfff), bytes.get_mut(..usize::from(size))?).ok()?;
        } else {
            for (i, byte) in bytes.iter_mut().take(usize::from(size)).enumerate() {
                *byte = self.load(at + i as u64, 1)? as u8;
            }
        }
        Some(u64::from_le_bytes(bytes))
    }
}

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It is where the processor is.
    Here,
    /// By the kernel's own unwinding tables (ORC).
    Orc,
    /// By the chain of frame pointers.
    FramePointer,
    /// A word of the stack that looks like a return address; it may be left over from an earlier call.
    Scan,
}

impl How {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            How::Here => "here",
            How::Orc => "the kernel's unwinding tables",
            How::FramePointer => "frame pointers",
            How::Scan => "words of the stack that look like return addresses",
        }
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where execution goes on in it.
    pub rip: u64,
    /// `function+0x12`.
    pub name: String,
    /// How it was found.
    pub how: How,
}

impl Frame {
    /// Is it more than a word that looks like a return address?
    pub fn sure(&self) -> bool {
        self.how != How::Scan
    }
    /// The name, with a `?` before it when it is not sure.
    pub fn marked(&self) -> String {
        if self.sure() { self.name.clone() } else { format!("? {}", self.name) }
    }
}

/// Frames told at most.
const FRAMES: usize = 48;
/// Words of the stack looked at when there is nothing better.
const WORDS: u64 = 512;

/// Is there a call before a return address? (E8 rel32, or FF /2 with a register or memory operand; SDM vol. 2A, CALL.)
pub(crate) fn follows_call(m: &Linear<'_>, at: u64) -> bool {
    let byte = |back: u64| m.load(at.wrapping_sub(back), 1).unwrap_or(0) as u8;
    byte(5) == 0xe8 || (2..=7).any(|back| byte(back) == 0xff && byte(back - 1) >> 3 & 7 == 2)
}

/// The guest's stack in 64-bit mode: by the kernel's unwinding tables when it has them, else by frame pointers where the code keeps them; what a
/// kernel without either leaves is every word of the stack that points behind a call, as Linux itself marks with `?`.
pub fn stack(s: &CpuState, memory: &AddressSpace, symbols: &Symbols) -> Vec<Frame> {
    let mut frames = Vec::new();
    let Some(name) = symbols.at(s.rip) else { return frames };
    if s.efer & efer::LMA == 0 || !s.seg[Seg::Cs as usize].long() {
        return frames;
    }
    frames.push(Frame { rip: s.rip, name, how: How::Here });
    let m = Linear::new(s, memory);
    if let Some(orc) = Orc::find(&m, symbols) {
        for rip in orc.unwind(&m, s, symbols).into_iter().take(FRAMES) {
            frames.push(Frame { rip, name: symbols.at(rip).unwrap_or_default(), how: How::Orc });
        }
        if frames.len() > 1 {
            return frames;
        }
    }
    let mut bp = s.gpr[gpr::RBP];
    let sp = s.gpr[gpr::RSP];
    while frames.len() < FRAMES && bp >= sp && bp - sp < 0x8000 && bp.is_multiple_of(8) {
        let (Some(next), Some(rip)) = (m.load(bp, 8), m.load(bp.wrapping_add(8), 8)) else {
            break;
        };
        let Some(name) = symbols.at(rip) else { break };
        frames.push(Frame { rip, name, how: How::FramePointer });
        if next <= bp {
            break;
        }
        bp = next;
    }
    if frames.len() > 2 {
        return frames;
    }
    frames.truncate(1);
    for i in 0..WORDS {
        let Some(word) = m.load(sp.wrapping_add(8 * i), 8) else { break };
        match symbols.lookup(word) {
            Some((_, off)) if off > 0 && follows_call(&m, word) => {
                let name = symbols.at(word).unwrap_or_default();
                frames.push(Frame { rip: word, name, how: How::Scan });
            }
            _ => {}
        }
        if frames.len() >= FRAMES / 2 {
            break;
        }
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_ram::RamBlock;
    use hyaline_space::Region;

    fn memory() -> AddressSpace {
        let root = Region::container("system", 1 << 64);
        let ram = RamBlock::new("ram", 1 << 20).unwrap();
        root.add(0, &Region::ram("ram", ram, 0, 1 << 20), 0).unwrap();
        AddressSpace::new("memory", &root)
    }
    fn long() -> CpuState {
        let mut s = CpuState::at_reset(true);
        s.cr0 |= cr0::PG | 1;
        s.cr4 |= cr4::PAE;
        s.efer |= efer::LMA;
        s.seg[Seg::Cs as usize].attr = 0x209b;
        s.cr3 = 0x1000;
        s
    }

    #[test]
    fn four_levels_and_large_pages() {
        let (m, s) = (memory(), long());
        let put = |at, v| assert!(m.store(at, 8, v, &Origin::LOADER).is_ok());
        // 0xffffffff80000000: entries 511, 510; a 2 MiB page at 0, and a 4 KiB page behind.
        put(0x1000 + 511 * 8, 0x2003);
        put(0x2000 + 510 * 8, 0x3003);
        put(0x3000, 0x83);
        put(0x3008, 0x4003);
        put(0x4000 + 8, 0x8000_0000_0005_0003);
        assert_eq!(translate(&s, &m, 0xffff_ffff_8001_2345), Some(0x12345));
        assert_eq!(translate(&s, &m, 0xffff_ffff_8020_1abc), Some(0x50abc));
        assert_eq!(translate(&s, &m, 0xffff_ffff_8040_0000), None);
        assert_eq!(translate(&s, &m, 0), None);
        // The stack: two return addresses, one behind a call.
        let mut s = s;
        s.rip = 0xffff_ffff_8001_0010;
        s.gpr[gpr::RSP] = 0xffff_ffff_8002_0000;
        put(0x2_0000, 0xffff_ffff_8001_0105);
        put(0x2_0008, 0xffff_ffff_8001_0208);
        assert!(m.store(0x1_0100, 1, 0xe8, &Origin::LOADER).is_ok());
        let names = |addr: u64, n: &str| (addr, 't', n.to_string());
        let sym = Symbols::new(
            [
                names(0xffff_ffff_8001_0000, "inner"),
                names(0xffff_ffff_8001_0100, "outer"),
                names(0xffff_ffff_8001_0200, "other"),
            ],
            "test",
        );
        let told: Vec<_> = stack(&s, &m, &sym).into_iter().map(|f| (f.name.clone(), f.sure())).collect();
        assert_eq!(told, [("inner+0x10".to_string(), true), ("outer+0x5".to_string(), false)]);
        // With frame pointers.
        s.gpr[gpr::RBP] = 0xffff_ffff_8002_0100;
        put(0x2_0100, 0xffff_ffff_8002_0200);
        put(0x2_0108, 0xffff_ffff_8001_0105);
        put(0x2_0200, 0);
        put(0x2_0208, 0xffff_ffff_8001_0205);
        let told: Vec<_> = stack(&s, &m, &sym).into_iter().map(|f| (f.name.clone(), f.sure())).collect();
        let want = [("inner+0x10", true), ("outer+0x5", true), ("other+0x5", true)];
        assert_eq!(told, want.map(|(n, s)| (n.to_string(), s)));
    }
}
