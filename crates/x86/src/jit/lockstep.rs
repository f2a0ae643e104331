//! Random code run by both tiers side by side.
//!
//! One processor interprets, the other translates everything at once; after every run of a random number of instructions all state and
//! all memory that can have changed must be the same. Operands lie at ends of pages, on pages that are read-only, not present,
//! or hold the code itself; faults are delivered to handlers that halt, so the frames on the stack are compared too.

use super::{JitOptions, Tier};
use crate::state::{Vector, cr4, efer, flag};
use crate::{Cpu, CpuState, Exit, testing};
use hyaline_ram::RamBlock;
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use std::sync::Arc;

/// Linear and physical address of the code.
const CODE: u64 = 0x1000;
/// Linear address of the data window.
const WINDOW: u64 = 0x4000_0000;
/// Physical address behind the data window.
const DATA: u64 = 0x20_0000;
/// Pages in the window.
const PAGES: u64 = 16;
/// Interrupt table, task state, interrupt stack, handlers.
const IDT: u64 = 0x18_0000;
const TSS: u64 = 0x18_2000;
const IST: u64 = 0x18_4000;
const HANDLERS: u64 = 0x18_8000;
/// Page directory of 32-bit processors.
const DIRECTORY: u64 = 0x18_a000;
/// Page table of the window.
const TABLE: u64 = 0x18_9000;

/// A generator of random numbers (xorshift64*).
pub struct Random(u64, u8);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, 3)
    }
    /// 64 random bits.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.word() >> 16) % n.max(1)
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Two processors in lockstep.
pub struct Lockstep {
    interp: (Cpu, Arc<RamBlock>),
    jit: (Cpu, Arc<RamBlock>),
    /// The seed of the case that runs.
    pub seed: u64,
    bits: u32,
    cases: u64,
    past: Vec<super::JitStats>,
}

fn set_up(bits: u32) -> (Cpu, Arc<RamBlock>) {
    let (mut cpu, ram) =
        if bits == 64 { testing::long_mode_cpu(4 << 20) } else { testing::protected_cpu(4 << 20) };
    let handlers = HANDLERS;
    for i in 0..32_u64 {
        let at = handlers + i * 16;
        ram.store_u8(at, 0xf4);
        if bits == 64 {
            // 64-bit interrupt gate, IST 1.
            ram.store_u64(
                IDT + i * 16,
                (at & 0xffff) | 8 << 16 | 1 << 32 | 0x8e << 40 | (at >> 16 & 0xffff) << 48,
            );
            ram.store_u64(IDT + i * 16 + 8, at >> 32);
        } else {
            ram.store_u64(IDT + i * 8, (at & 0xffff) | 8 << 16 | 0x8e << 40 | (at >> 16 & 0xffff) << 48);
        }
    }
    // GDT: null, code, data.
    let gdt = IDT + 0x1000;
    let code: u64 = if bits == 64 { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    ram.store_u64(gdt + 8, code);
    ram.store_u64(gdt + 16, 0x00cf_9300_0000_ffff);
    ram.store_u64(TSS + 0x24, IST + 0x1000);
    let s = &mut cpu.state;
    s.gdtr = crate::state::Table { base: gdt, limit: 0x1f };
    s.idtr = crate::state::Table { base: IDT, limit: 0x1ff };
    s.tr = crate::state::Segment { base: TSS, limit: 0x67, attr: 0x8b, selector: 0x18, unusable: false };
    // The window's page table in place of a large page; tables as testing::long_mode_cpu has them.
    let entries = (0..PAGES).map(|i| match i {
        2 | 9 | 15 => 0,
        3 | 11 => (DATA + i * 0x1000) | 5,
        5 => CODE | 7,
        6 => (CODE + 0x1000) | 7,
        _ => (DATA + i * 0x1000) | 7,
    });
    if bits == 64 {
        ram.store_u64(0x10_0000 + 0x2000 + 0x1000, TABLE | 7);
        entries.enumerate().for_each(|(i, e)| ram.store_u64(TABLE + i as u64 * 8, e).unwrap_or(()));
    } else {
        use crate::state::{cr0, cr4};
        // The first 4 MiB as one page, and the window.
        ram.store_u32(DIRECTORY, 0x87);
        ram.store_u32(DIRECTORY + (WINDOW >> 22) * 4, TABLE as u32 | 7);
        entries.enumerate().for_each(|(i, e)| ram.store_u32(TABLE + i as u64 * 4, e as u32).unwrap_or(()));
        cpu.state.cr3 = DIRECTORY;
        cpu.state.cr0 |= cr0::PG | cr0::WP | cr0::MP;
        cpu.state.cr4 |= cr4::PSE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.state.xcr0 = 7;
    }
    (cpu, ram)
}

/// One-byte opcodes.
const ONE: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x10, 0x11, 0x12, 0x13, 0x14,
    0x15, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x28, 0x29, 0x2a, 0x2b,
    0x2c, 0x2d, 0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x50, 0x51, 0x52,
    0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x5b, 0x5c, 0x5d, 0x5e, 0x5f, 0x63, 0x68, 0x69, 0x6a,
    0x6b, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8d, 0x8f, 0x90, 0x91, 0x92,
    0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9c, 0x9e, 0x9f, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa,
    0xab, 0xac, 0xad, 0xae, 0xaf, 0xb0, 0xb1, 0xb4, 0xb7, 0xb8, 0xb9, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf,
    0xc0, 0xc1, 0xc6, 0xc7, 0xc9, 0xd0, 0xd1, 0xd2, 0xd3, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf,
    0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfc, 0xfe, 0xff, 0xff, 0x40, 0x41, 0x44, 0x48, 0x4c, 0x4f,
];
/// Opcodes after 0f.
const TWO: &[u8] = &[
    0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x28, 0x29, 0x2a, 0x2b, 0x2c, 0x2d, 0x2e, 0x2f, 0x40,
    0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x4b, 0x4c, 0x4d, 0x4e, 0x4f, 0x50, 0x51,
    0x52, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x5b, 0x5c, 0x5d, 0x5e, 0x5f, 0x60, 0x61, 0x62,
    0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e, 0x6f, 0x70, 0x71, 0x72, 0x73,
    0x74, 0x75, 0x76, 0x77, 0x7c, 0x7d, 0x7e, 0x7f, 0x90, 0x91, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98,
    0x99, 0x9a, 0x9b, 0x9c, 0x9d, 0x9e, 0x9f, 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3,
    0xb6, 0xb7, 0xb8, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7,
    0xc8, 0xc9, 0xca, 0xcb, 0xcc, 0xcd, 0xce, 0xcf, 0xd0, 0xd1, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8,
    0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf, 0xe0, 0xe1, 0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9,
    0xea, 0xeb, 0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf8, 0xf9, 0xfa, 0xfb,
    0xfc, 0xfd, 0xfe, 0x0d, 0x18, 0x1e, 0x1f, 0xae,
];

/// A random instruction, at most 15 bytes; None when the attempt failed.
fn instruction(r: &mut Random, bits: u32) -> Option<Vec<u8>> {
    let mut b = Vec::with_capacity(24);
    let kind = r.below(100);
    if r.chance(3) {
        b.push(r.pick(&[0x64, 0x65, 0x2e, 0x36, 0x3e]));
    }
    if r.chance(2) {
        b.push(0x67);
    }
    let modrm = |r: &mut Random, b: &mut Vec<u8>| {
        let mut m = if r.chance(45) { 0xc0 | r.below(64) as u8 } else { r.below(192) as u8 };
        if m < 0xc0 && r.chance(40) {
            // The same base again and again: operands that share a look at the TLB.
            m = m & 0xf8 | r.1;
        }
        b.push(m);
        if m < 0xc0 {
            if m & 7 == 4 {
                b.push(r.word() as u8);
            }
            // A small displacement in whatever size it turns out to have.
            let d = r.below(0x100) as i32 - 0x80;
            if m >> 6 == 1 {
                b.push(d as u8);
            } else {
                let big = if r.chance(20) { r.below(0x4000) as i32 - 0x2000 } else { d };
                b.extend(big.to_le_bytes());
            }
        }
    };
    if r.chance(10) {
        // x87; sometimes FWAIT.
        b.push(if r.chance(3) { 0x9b } else { 0xd8 | r.below(8) as u8 });
        modrm(r, &mut b);
    } else if kind < 55 {
        if r.chance(15) {
            b.push(0x66);
        }
        if r.chance(4) {
            b.push(0xf0);
        }
        let opcode = r.pick(ONE);
        if (0xa4..=0xaf).contains(&opcode) && r.chance(40) {
            b.push(r.pick(&[0xf2, 0xf3]));
        }
        if bits == 64 && r.chance(70) {
            b.push(0x40 | r.below(16) as u8);
        }
        b.push(opcode);
        modrm(r, &mut b);
    } else if kind < 85 {
        if r.chance(35) {
            b.push(0x66);
        }
        if r.chance(3) {
            b.push(0xf0);
        }
        if r.chance(30) {
            b.push(r.pick(&[0xf2, 0xf3]));
        }
        if bits == 64 && r.chance(60) {
            b.push(0x40 | r.below(16) as u8);
        }
        b.push(0x0f);
        match r.below(10) {
            0 => b.extend([0x38, r.pick(&[0xf0, 0xf1, 0xf6, 0xf8, 0xf9, r.0 as u8 & 0x3f])]),
            1 => b.extend([0x3a, r.below(0x30) as u8]),
            _ => b.push(r.pick(TWO)),
        }
        modrm(r, &mut b);
    } else if kind < 95 {
        // VEX
        let map = r.pick(&[1, 1, 1, 2, 2, 3]);
        let b1 = (r.word() as u8 & 0xe0) | map;
        let b2 = r.word() as u8;
        b.extend([0xc4, if bits == 32 { b1 | 0xc0 } else { b1 }, b2]);
        b.push(match map {
            1 => r.pick(TWO),
            2 => r.pick(&[0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0xf2, 0xf3, 0xf7, r.0 as u8]),
            _ => r.pick(&[0xf0, r.0 as u8 & 0x4f]),
        });
        modrm(r, &mut b);
    } else {
        // EVEX
        let map = r.pick(&[1, 1, 2, 3]);
        let b1 = (r.word() as u8 & 0xf0) | map;
        let b2 = r.word() as u8 | 4;
        let b3 = if r.chance(60) { r.word() as u8 & 0x78 } else { r.word() as u8 };
        b.extend([0x62, if bits == 32 { b1 | 0xc0 } else { b1 }, b2, b3]);
        b.push(if map == 1 { r.pick(TWO) } else { r.word() as u8 });
        modrm(r, &mut b);
    }
    b.extend(r.word().to_le_bytes());
    b.truncate(15);
    let mut d = Decoder::with_ip(bits, &b, 0, DecoderOptions::AMD);
    let i = d.decode();
    if i.is_invalid() || !allowed(&i) {
        return None;
    }
    b.truncate(i.len());
    Some(b)
}

fn allowed(i: &Instruction) -> bool {
    use Mnemonic as M;
    i.flow_control() == FlowControl::Next
        && !i.is_privileged()
        && !matches!(
            i.mnemonic(),
            M::Popf | M::Popfd | M::Popfq | M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Syscall | M::Sysenter
                | M::Mov if matches!(i.code(), Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16)
        )
        && !matches!(
            i.mnemonic(),
            M::Wrfsbase | M::Wrgsbase | M::Ldmxcsr | M::Vldmxcsr | M::Fxrstor | M::Fxrstor64
        )
        && !matches!(
            i.mnemonic(),
            M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64 | M::Popfq | M::Incsspq
        )
        && !matches!(
            i.mnemonic(),
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64
        )
        && !matches!(
            i.mnemonic(),
            M::Xgetbv | M::Std | M::Sti | M::Cli | M::Rdpid | M::Rdfsbase | M::Rdgsbase
        )
}

/// A random x87 state, mostly with all exceptions masked.
fn x87(r: &mut Random) -> crate::state::X87 {
    let mut x = crate::state::X87::default();
    if r.chance(25) {
        return x;
    }
    x.ftw = if r.chance(50) { 0xff } else { r.word() as u8 };
    for (significand, exponent) in x.significand.iter_mut().zip(&mut x.exponent) {
        (*significand, *exponent) = match r.below(8) {
            0 => (0, r.pick(&[0, 0x8000])),
            1 => (1 << 63 | r.below(2) << 62, r.pick(&[0x7fff, 0xffff])),
            2 => (r.word() >> 1, 0),
            3 => (r.word(), r.word() as u16),
            // Numbers of about the size of one, and whole ones.
            4 => (1 << 63 | r.below(256) << 56, 0x3fff + r.below(12) as u16),
            _ => (r.word() | 1 << 63, 0x3ff0 + r.below(40) as u16),
        };
    }
    x.fcw = 0x7f | (r.below(4) << 10) as u16 | r.pick(&[0, 0x200, 0x300, 0x300]);
    x.fsw = (r.below(8) << 11) as u16 | r.word() as u16 & 0x473f;
    if r.chance(15) {
        x.fcw &= !(r.word() as u16 & 0x3f);
        if x.fsw & !x.fcw & 0x3f != 0 {
            x.fsw |= 0x8080;
        }
    }
    x
}

/// Writes guest and host code of every unit to standard error.
struct Listing;

impl crate::CpuLog for Listing {
    fn event(&self, _: u8, _: &CpuState, _: &crate::state::Injected) {}
    fn code(&self, _: u8, _: u64, _: u32, _: &[u8]) {}
    fn wants_translations(&self) -> bool {
        true
    }
    fn translation(&self, _: u8, text: &str) {
        eprintln!("{text}");
    }
}

impl Lockstep {
    /// Processors in 64-bit or flat 32-bit mode.
    ///
    /// # Errors
    /// When the host can't run translated code.
    pub fn new(bits: u32) -> Result<Lockstep, super::JitError> {
        let interp = set_up(bits);
        let mut jit = set_up(bits);
        jit.0.set_tier(Tier::Jit(JitOptions { cache_bytes: 4 << 20, threshold: 0, drop_locks: false }))?;
        if std::env::var_os("LOCKSTEP_LOG").is_some() {
            jit.0.log = Some(Arc::new(Listing));
        }
        Ok(Lockstep { interp, jit, seed: 0, bits, cases: 0, past: Vec::new() })
    }

    /// What the translating processor did so far.
    pub fn stats(&self) -> super::JitStats {
        let mut sum = self.jit.0.jit_stats().cloned().unwrap_or_default();
        for s in &self.past {
            sum.add(s);
        }
        sum
    }

    /// Runs one random case; gives the number of instructions.
    ///
    /// # Errors
    /// A description of the first difference.
    pub fn case(&mut self, seed: u64) -> Result<u64, String> {
        self.seed = seed;
        self.cases += 1;
        if self.cases.is_multiple_of(200)
            && let Ok(mut new) = Lockstep::new(self.bits)
        {
            // Code reaches the tables too, in time.
            if let Some(stats) = self.jit.0.jit_stats() {
                new.past.push(stats.clone());
            }
            new.past.append(&mut self.past);
            new.cases = self.cases;
            *self = new;
        }
        let mut r = Random::new(seed);
        let code = self.code(&mut r);
        let state = self.state(&mut r);
        // Memory: the same noise on both sides, in places that the code reaches.
        let noise = r.word();
        for (cpu, ram) in [&mut self.interp, &mut self.jit] {
            let mut n = Random::new(noise);
            for page in 0..PAGES {
                for edge in [0, 0xfc0] {
                    let at = DATA + page * 0x1000 + edge;
                    let bytes: Vec<u8> = (0..8).flat_map(|_| n.word().to_le_bytes()).collect();
                    let _ = ram.write(at, &bytes);
                }
            }
            let _ = ram.write(CODE, &vec![0xf4; 0x2000]);
            let _ = ram.write(CODE, &code);
            cpu.state = state.clone();
        }
        let mut done = 0;
        let mut history = Vec::new();
        let mut code = code;
        let mut length = code.len();
        // Now and then the same code runs again after it was written anew, as it was or with another byte.
        for round in 0..if r.chance(30) { 1 + r.below(5) } else { 1 } {
            if round > 0 {
                let starts: Vec<usize> = Decoder::with_ip(self.bits, &code, 0, DecoderOptions::AMD)
                    .iter()
                    .map(|i| i.ip() as usize)
                    .collect();
                let edit = r.pick(&starts);
                match r.below(4) {
                    0 => code = self.code(&mut r),
                    1 => code[edit] = 0xf4,
                    _ => {}
                }
                let whole = code.len() != length || r.chance(50);
                let (from, to) = if whole { (0, code.len()) } else { (edit, edit + 1) };
                length = code.len();
                // A budget of 0 stands for it.
                history.push(0);
                for (cpu, ram) in [&mut self.interp, &mut self.jit] {
                    let _ = ram.write(CODE + from as u64, code.get(from..to).unwrap_or(&[]));
                    let icount = cpu.state.icount;
                    cpu.state = CpuState { icount, ..state.clone() };
                }
            }
            let limit = done + 600;
            while done < limit {
                let budget = if r.chance(30) { 1 + r.below(5) } else { 1 + r.below(200) };
                history.push(budget);
                let before = self.interp.0.state.icount;
                let a = self.interp.0.run(budget);
                let b = self.jit.0.run(budget);
                done += self.interp.0.state.icount - before;
                if let Some(difference) = self.compare(a, b) {
                    let text = self.describe(&difference, &code, &state, &history);
                    // Both start afresh.
                    if let Ok(new) = Lockstep::new(self.bits) {
                        *self = new;
                    }
                    return Err(text);
                }
                if a != Exit::Budget {
                    break;
                }
            }
        }
        Ok(done)
    }

    fn code(&self, r: &mut Random) -> Vec<u8> {
        let count = 1 + r.below(14);
        r.1 = r.pick(&[0, 1, 2, 3, 5, 6, 7, 7]);
        let mut list: Vec<Vec<u8>> = Vec::new();
        while (list.len() as u64) < count {
            match r.below(20) {
                0 => list.push(vec![0x0f, 0x80 | r.below(16) as u8, 0, 0, 0, 0]),
                1 if r.chance(30) => list.push(vec![0xe8, 0, 0, 0, 0]),
                2 if r.chance(30) => list.push(vec![0xc3]),
                3 if r.chance(30) => list.push(vec![0xe9, 0, 0, 0, 0]),
                5 if self.bits == 64 && r.chance(30) => {
                    let system: &[&[u8]] = &[
                        &[0xfa],
                        &[0xfb],
                        &[0xfc],
                        &[0x9c],
                        &[0x0f, 0x01, 0xf8],
                        &[0x0f, 0x01, 0xca],
                        &[0x0f, 0x01, 0xcb],
                        &[0x0f, 0x05],
                        &[0x48, 0x0f, 0x07],
                        &[0x8c, 0xd8],
                        &[0x41, 0x8c, 0xd1],
                        &[0x8c, 0x0c, 0x24],
                        &[0x48, 0x0f, 0xc7, 0x4d, 0x00],
                        &[0x0f, 0x31],
                        // mov ecx, CODE, for SYSRET
                        &[0xb9, 0x00, 0x10, 0x00, 0x00],
                    ];
                    list.push(r.pick(system).to_vec());
                }
                7 if r.chance(30) => {
                    // mov r32, imm32; jmp or call r
                    let n = r.pick(&[0, 2, 3, 6]);
                    let branch = r.pick(&[0xe0, 0xd0]) | n;
                    list.push(vec![0xb8 | n, 0, 0, 0, 0, 0xff, branch]);
                }
                6 if r.chance(60) => {
                    // add or sub: that base and a small constant.
                    let add = vec![0x83, 0xc0 | r.pick(&[0, 0x28]) | r.1, r.below(80) as u8];
                    list.push(if self.bits == 64 { [vec![0x48], add].concat() } else { add });
                }
                4 if r.chance(20) => list.push(vec![r.pick(&[0xe0, 0xe1, 0xe2, 0xe3]), 0]),
                _ => {
                    for _ in 0..50 {
                        if let Some(mut b) = instruction(r, self.bits) {
                            let i = Decoder::with_ip(self.bits, &b, 0, DecoderOptions::AMD).decode();
                            if i.is_string_instruction() {
                                // mov ecx, imm32: repetitions are few.
                                let count = r.below(40) as u8;
                                b.splice(0..0, [0xb9, count, 0, 0, 0]);
                            }
                            list.push(b);
                            break;
                        }
                    }
                }
            }
        }
        let mut starts = Vec::new();
        let mut at = 0;
        for b in &list {
            starts.push(at);
            at += b.len();
        }
        starts.push(at);
        for i in 0..list.len() {
            let end = starts[i + 1];
            let b = &mut list[i];
            if b.len() == 7 && b[0] & 0xf8 == 0xb8 && b[5] == 0xff {
                let target = CODE as usize + starts[r.below(starts.len() as u64) as usize];
                b[1..5].copy_from_slice(&(target as u32).to_le_bytes());
                continue;
            }
            let jcc = b.len() == 6 && b[0] == 0x0f && b[1] & 0xf0 == 0x80;
            if jcc || (b.len() == 5 && matches!(b[0], 0xe8 | 0xe9) && b[1..] == [0; 4]) {
                let target = starts[r.below(starts.len() as u64) as usize];
                let rel = (target as i64 - end as i64) as i32;
                let n = b.len();
                b[n - 4..].copy_from_slice(&rel.to_le_bytes());
            } else if b.len() == 2 && matches!(b[0], 0xe0..=0xe3) && b[1] == 0 {
                let target = starts[r.below(starts.len() as u64) as usize];
                b[1] = i8::try_from(target as i64 - end as i64).unwrap_or(0) as u8;
            }
        }
        let mut code: Vec<u8> = list.concat();
        code.extend([0xf4; 4]);
        code
    }

    fn state(&self, r: &mut Random) -> CpuState {
        let mut s = self.interp.0.state.clone();
        let mask = if self.bits == 64 { u64::MAX } else { 0xffff_ffff };
        let window = WINDOW;
        for g in &mut s.gpr {
            *g = match r.below(10) {
                0..=5 => {
                    let near =
                        if r.chance(60) { r.below(0x80) as i64 - 0x40 } else { r.below(0x1000) as i64 };
                    (window + r.below(PAGES) * 0x1000).wrapping_add(near as u64)
                }
                6 | 7 => r.below(64),
                8 => r.word(),
                _ => u64::MAX << r.below(64),
            } & mask;
        }
        if r.chance(80) {
            s.gpr[4] = window + 0x800;
        }
        s.rip = CODE;
        s.rflags = flag::ONE | r.word() & flag::ARITH;
        if r.chance(5) {
            s.rflags |= flag::DF;
        }
        s.seg[4].base = window + r.below(0x100);
        s.seg[5].base = window + 0x4000;
        let registers = if self.bits == 64 { 32 } else { 8 };
        for v in &mut s.vec {
            *v = Vector::default();
        }
        for v in s.vec.iter_mut().take(16.min(registers)) {
            for q in v.0.iter_mut().take(4) {
                *q = match r.below(4) {
                    0 => (r.below(1000) as f64 - 500.0).to_bits(),
                    1 => u64::from((r.below(100) as f32).to_bits()) << 32 | u64::from(1.5_f32.to_bits()),
                    _ => r.word(),
                };
            }
        }
        if self.bits == 64 {
            s.efer |= efer::SCE;
            s.cr4 = s.cr4 & !cr4::SMAP | if r.chance(30) { cr4::SMAP } else { 0 };
            s.msr.star = 0x0013_0008_0000_0000;
            s.msr.lstar = if r.chance(90) { CODE + r.below(40) } else { WINDOW + 0x5000 };
            s.msr.sfmask = r.word() & 0x4_7700 & !flag::TF;
            s.msr.kernel_gs_base = window + 0x6000 + r.below(0x1000);
        }
        // AVX-512 in half of the cases, where this host has it.
        s.xcr0 = 7;
        s.opmask = Default::default();
        if self.interp.0.model.has(CpuidFeature::AVX512F) && r.chance(50) {
            s.xcr0 = 0xe7;
            s.opmask.iter_mut().for_each(|k| *k = r.word() >> r.below(64));
            for v in s.vec.iter_mut().take(registers) {
                v.0.iter_mut().skip(4).for_each(|q| *q = r.word());
            }
            if self.bits == 64 {
                s.vec.iter_mut().skip(16).for_each(|v| v.0.iter_mut().for_each(|q| *q = r.word()));
            }
        }
        s.mxcsr = 0x1f80;
        s.x87 = x87(r);
        s.activity = crate::state::Activity::Running;
        s.shadow = crate::state::Shadow::None;
        s.cr2 = 0;
        s.icount = 0;
        s
    }

    fn compare(&self, a: Exit, b: Exit) -> Option<String> {
        if a != b {
            let (x, y) = (&self.interp.0.state, &self.jit.0.state);
            return Some(format!(
                "exits: {a:?} interpreted, {b:?} translated; rip {:#x} {:#x}, icount {} {}",
                x.rip, y.rip, x.icount, y.icount
            ));
        }
        let (x, y) = (&self.interp.0.state, &self.jit.0.state);
        if x != y {
            let mut text = String::new();
            for i in 0..16 {
                if x.gpr[i] != y.gpr[i] {
                    text += &format!("gpr {i}: {:#x} interpreted, {:#x} translated; ", x.gpr[i], y.gpr[i]);
                }
            }
            if x.rip != y.rip || x.rflags != y.rflags || x.icount != y.icount {
                text += &format!(
                    "rip {:#x} {:#x}, rflags {:#x} {:#x}, icount {} {}; ",
                    x.rip, y.rip, x.rflags, y.rflags, x.icount, y.icount
                );
            }
            for i in 0..32 {
                if x.vec[i] != y.vec[i] {
                    text += &format!("zmm {i}: {:?} {:?}; ", x.vec[i], y.vec[i]);
                }
            }
            if x.x87 != y.x87 {
                text += &format!("x87: {:?} {:?}; ", x.x87, y.x87);
            }
            if x.mxcsr != y.mxcsr || x.cr2 != y.cr2 || x.opmask != y.opmask {
                text += &format!(
                    "mxcsr {:#x} {:#x} cr2 {:#x} {:#x} opmask {:x?} {:x?}",
                    x.mxcsr, y.mxcsr, x.cr2, y.cr2, x.opmask, y.opmask
                );
            }
            return Some(format!("state: {text}"));
        }
        for (from, len) in [(0, 0x1000), (CODE, 0x2000), (DATA, PAGES * 0x1000), (IST, 0x1000)] {
            let (mut p, mut q) = (vec![0; len as usize], vec![0; len as usize]);
            let _ = self.interp.1.read(from, &mut p);
            let _ = self.jit.1.read(from, &mut q);
            if let Some(i) = (0..p.len()).find(|i| p[*i] != q[*i]) {
                return Some(format!(
                    "memory at {:#x}: {:#x} interpreted, {:#x} translated",
                    from + i as u64,
                    p[i],
                    q[i]
                ));
            }
        }
        None
    }

    fn describe(&self, difference: &str, code: &[u8], state: &CpuState, history: &[u64]) -> String {
        let mut text =
            format!("seed {:#x}, {} bits: {difference}\nbudgets {history:?}\n", self.seed, self.bits);
        let mut d = Decoder::with_ip(self.bits, code, CODE, DecoderOptions::AMD);
        while d.can_decode() {
            let i = d.decode();
            let at = (i.ip() - CODE) as usize;
            text += &format!("{:#x}: {:02x?} {i}\n", i.ip(), &code[at..at + i.len()]);
        }
        text += &format!("gpr {:x?} rflags {:#x}\n", state.gpr, state.rflags);
        text
    }
}
