//! Runs cases on the interpreter: 64-bit user mode, the sandbox mapped where the host has it, and handlers for all exceptions in a
//! supervisor that does nothing but halt.

use crate::case::{CODE, Case, DATA, Outcome, PAGE, READ_ONLY, Registers, TEMPLATE};
use anyhow::{Context, Result};
use hyaline_ram::RamBlock;
use hyaline_x86::state::{Activity, Segment, Shadow, Table, Vector, X87, cr0, cr4, efer};
use hyaline_x86::testing::BareEnv;
use hyaline_x86::{Cpu, CpuModel, CpuState, Seg};
use std::sync::Arc;

/// Linear address of the supervisor's pages, at physical 0.
const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Supervisor pages: physical addresses, and offsets from KERNEL.
const HANDLERS: u64 = 0x1000;
const IDT: u64 = 0x2000;
const GDT: u64 = 0x3000;
const TSS: u64 = 0x4000;
const STACK_TOP: u64 = 0x6000;
const TABLES: u64 = 0x1_0000;
/// Physical addresses of the sandbox.
const CODE_AT: u64 = 0x8_0000;
const DATA_AT: u64 = 0x8_1000;
const READ_ONLY_AT: u64 = 0x8_3000;

/// The interpreter's side of the comparison.
pub struct Subject {
    cpu: Cpu,
    ram: Arc<RamBlock>,
    fresh: CpuState,
    template: Box<[u8; TEMPLATE]>,
}

/// Maps one page: `rights` are the low bits of all entries.
fn map(ram: &RamBlock, next: &mut u64, linear: u64, physical: u64, writable: bool, user: bool) -> Option<()> {
    let mut table = TABLES;
    for shift in [39, 30, 21] {
        let at = table + (linear >> shift & 0x1ff) * 8;
        let mut entry = ram.load_u64(at)?;
        if entry == 0 {
            *next += 0x1000;
            entry = *next | 7;
            ram.store_u64(at, entry)?;
        }
        table = entry & !0xfff;
    }
    let entry = physical | 0x61 | if writable { 2 } else { 0 } | if user { 4 } else { 0 };
    ram.store_u64(table + (linear >> 12 & 0x1ff) * 8, entry)
}

impl Subject {
    /// A processor of this model.
    pub fn new(model: Arc<CpuModel>) -> Result<Subject> {
        let (env, ram) = BareEnv::new(2 << 20);
        Self::prepare(&ram).context("the guest's memory is too small")?;
        let mut s = CpuState::at_reset(true);
        s.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP | cr0::MP | cr0::AM;
        s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::UMIP;
        s.cr3 = TABLES;
        s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        s.xcr0 = if crate::native::host_has_avx512() { 0xe7 } else { 7 };
        let data = Segment { base: 0, limit: 0xffff_ffff, attr: 0xc0f3, selector: 0x23, unusable: false };
        s.seg = [data; 6];
        s.seg[Seg::Cs as usize] = Segment { attr: 0xa0fb, selector: 0x2b, ..data };
        s.gdtr = Table { base: KERNEL + GDT, limit: 0x3f };
        s.idtr = Table { base: KERNEL + IDT, limit: 0xfff };
        s.tr = Segment { base: KERNEL + TSS, limit: 0x67, attr: 0x8b, selector: 0x30, unusable: false };
        let cpu = Cpu::new(s.clone(), Box::new(env), model);
        Ok(Subject { cpu, ram, fresh: s, template: Box::new([0; TEMPLATE]) })
    }

    fn prepare(ram: &RamBlock) -> Option<()> {
        let mut next = TABLES;
        for page in [HANDLERS, IDT, GDT, TSS, STACK_TOP - 0x1000] {
            map(ram, &mut next, KERNEL + page, page, true, false)?;
        }
        map(ram, &mut next, CODE, CODE_AT, false, true)?;
        map(ram, &mut next, DATA, DATA_AT, true, true)?;
        map(ram, &mut next, DATA + PAGE as u64, DATA_AT + PAGE as u64, true, true)?;
        map(ram, &mut next, READ_ONLY, READ_ONLY_AT, false, true)?;
        for n in 0..0x1000 {
            ram.store_u8(HANDLERS + n, 0xf4)?;
        }
        for vector in 0..256 {
            // Interrupt gate, DPL 3 so that INT3 and INTO pass as under Linux; the other vectors come from faults.
            let handler = KERNEL + HANDLERS + vector * 16;
            let low = handler & 0xffff | 8 << 16 | 0xee00 << 32 | (handler >> 16 & 0xffff) << 48;
            ram.store_u64(IDT + vector * 16, low)?;
            ram.store_u64(IDT + vector * 16 + 8, handler >> 32)?;
        }
        // Null, code 64 DPL 0, data DPL 0, unused, data DPL 3, code 64 DPL 3, TSS.
        let tss = KERNEL + TSS;
        let descriptors = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_8b00_0000_0067 | (tss & 0xff_ffff) << 16 | (tss >> 24 & 0xff) << 56,
            tss >> 32,
        ];
        for (n, d) in descriptors.into_iter().enumerate() {
            ram.store_u64(GDT + n as u64 * 8, d)?;
        }
        let stack = KERNEL + STACK_TOP;
        // RSP0 is at offset 4.
        ram.store_u32(TSS + 4, stack as u32)?;
        ram.store_u32(TSS + 8, (stack >> 32) as u32)
    }

    /// Sets the contents that data and read-only pages have before each case.
    pub fn set_template(&mut self, template: &[u8; TEMPLATE]) -> Result<()> {
        *self.template = *template;
        self.ram.write(DATA_AT, template)?;
        Ok(())
    }

    /// Runs one case.
    pub fn run(&mut self, case: &Case, outcome: &mut Outcome) -> Result<()> {
        let placed = &case.bytes[..usize::from(case.placed)];
        self.ram.write(CODE_AT + (case.before.rip - CODE), placed)?;
        self.load(&case.before);
        self.cpu.run(1);
        let s = &self.cpu.state;
        let supervisor = s.seg[Seg::Cs as usize].selector & 3 == 0;
        store(s, &mut outcome.after);
        outcome.vector = None;
        (outcome.error, outcome.cr2) = (0, 0);
        if supervisor {
            let vector = (s.rip.wrapping_sub(KERNEL + HANDLERS) / 16) as u8;
            let coded = matches!(vector, 8 | 10..=14 | 17 | 21);
            let frame = STACK_TOP - 40;
            let at = |n: i64| self.ram.load_u64(frame.wrapping_add_signed(n * 8)).unwrap_or(0);
            outcome.vector = Some(vector);
            outcome.error = if coded { at(-1) as u32 } else { 0 };
            outcome.cr2 = if vector == 14 { s.cr2 } else { 0 };
            outcome.after.rip = at(0);
            outcome.after.rflags = at(2);
            outcome.after.gpr[4] = at(3);
        }
        self.ram.read(DATA_AT, &mut outcome.data)?;
        outcome.changed = outcome.data[..] != self.template[..2 * PAGE];
        if outcome.changed {
            self.ram.write(DATA_AT, &self.template[..2 * PAGE])?;
        }
        Ok(())
    }

    fn load(&mut self, r: &Registers) {
        let s = &mut self.cpu.state;
        if s.seg != self.fresh.seg {
            s.seg = self.fresh.seg;
        }
        s.activity = Activity::Running;
        s.shadow = Shadow::None;
        s.gpr = r.gpr;
        s.rip = r.rip;
        s.rflags = r.rflags;
        for (to, from) in s.vec.iter_mut().zip(&r.vec) {
            *to = Vector(*from);
        }
        s.opmask = r.opmask;
        s.mxcsr = r.mxcsr;
        s.x87 = X87 {
            significand: r.significand,
            exponent: r.exponent,
            fcw: r.fcw,
            fsw: r.fsw,
            ftw: r.ftw,
            ..X87::default()
        };
    }
}

fn store(s: &CpuState, r: &mut Registers) {
    for (to, from) in r.vec.iter_mut().zip(&s.vec) {
        *to = from.0;
    }
    r.gpr = s.gpr;
    r.rip = s.rip;
    r.rflags = s.rflags;
    r.opmask = s.opmask;
    r.mxcsr = s.mxcsr;
    (r.significand, r.exponent) = (s.x87.significand, s.x87.exponent);
    (r.fcw, r.fsw, r.ftw) = (s.x87.fcw, s.x87.fsw, s.x87.ftw);
}
