//! System-management mode: SMI entry and RSM, with AMD64's save-state map (which every 64-bit firmware for virtual
//! machines knows).
//!
//! Source: APM vol. 2 chapter 10, table 10-1 (save-state area), §10.3 (SMM entry), §10.4 (RSM).

use super::jump;
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Exit, Fault};
use crate::state::{Activity, Seg, Segment, Shadow, cr0, flag};

/// SMM revision: 64-bit map with SMBASE relocation.
const REVISION: u32 = 0x2_0064;
/// Offset of the save-state area from SMBASE; table offsets are from SMBASE + 0x8000 + 0x7e00 with 0xfe00 as origin.
const MAP: u64 = 0x1_0000 - 0x200;

/// Offsets into the save-state area of the six segment registers, in the order of [`Seg`].
const SEGMENTS: [u64; 6] = [0x00, 0x10, 0x20, 0x30, 0x40, 0x50];
const GDTR: u64 = 0x60;
const LDTR: u64 = 0x70;
const IDTR: u64 = 0x80;
const TR: u64 = 0x90;
const AUTO_HALT: u64 = 0xc9;
const NMI_MASK: u64 = 0xca;
const EFER: u64 = 0xd0;
const REVISION_AT: u64 = 0xfc;
const SMBASE: u64 = 0x100;
const CR4: u64 = 0x148;
const CR3: u64 = 0x150;
const CR0: u64 = 0x158;
const DR7: u64 = 0x160;
const DR6: u64 = 0x168;
const RFLAGS: u64 = 0x170;
const RIP: u64 = 0x178;
/// R15 first, RAX last.
const R15: u64 = 0x180;

/// The save-state area as bytes, before it goes to memory or after it came from there.
struct Area([u8; 0x200]);

impl Area {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        if let Some(slot) = self.0.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    }
    fn u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }
    fn u32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_le_bytes());
    }
    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(slot) = self.0.get(at as usize..at as usize + N) {
            bytes.copy_from_slice(slot);
        }
        bytes
    }
    fn get64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.get(at))
    }
    fn get32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at))
    }
    fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }
    /// A segment register: selector, attributes, limit, base. The unusable state is bit 8 of the attributes.
    fn put_segment(&mut self, at: u64, s: &Segment) {
        self.put(at, &s.selector.to_le_bytes());
        let attr = s.attr & 0xff | s.attr >> 4 & 0xf00;
        let attr = if s.unusable { attr & !0x80 } else { attr };
        self.put(at + 2, &attr.to_le_bytes());
        self.u32(at + 4, s.limit);
        self.u64(at + 8, s.base);
    }
    fn get_segment(&self, at: u64) -> Segment {
        let packed = self.get16(at + 2);
        let attr = packed & 0xff | (packed & 0xf00) << 4;
        Segment {
            selector: self.get16(at),
            attr,
            limit: self.get32(at + 4),
            base: self.get64(at + 8),
            unusable: attr & 0x80 == 0,
        }
    }
}

/// Writes or reads the area in physical memory.
fn physical(cpu: &mut Cpu, area: &mut Area, write: bool) {
    let base = cpu.state.msr.smbase.wrapping_add(MAP);
    for i in (0..0x200).step_by(8) {
        let at = base.wrapping_add(i);
        if write {
            let value = area.get64(i);
            cpu.physical_store(at, 8, value);
        } else {
            let value = cpu.physical_load(at, 8);
            area.u64(i, value);
        }
    }
}

/// Enters system-management mode before the instruction at `state.rip`.
pub(crate) fn enter(cpu: &mut Cpu) -> Result<(), Exit> {
    cpu.env.set_smm(true);
    cpu.invalidate_map();
    let mut area = Area([0; 0x200]);
    let halted = cpu.state.activity == Activity::Halted;
    let s = &cpu.state;
    for (at, seg) in SEGMENTS.into_iter().zip(&s.seg) {
        area.put_segment(at, seg);
    }
    area.put_segment(LDTR, &s.ldtr);
    area.put_segment(TR, &s.tr);
    for (at, t) in [(GDTR, &s.gdtr), (IDTR, &s.idtr)] {
        area.u32(at + 4, u32::from(t.limit));
        area.u64(at + 8, t.base);
    }
    area.put(AUTO_HALT, &[u8::from(halted)]);
    area.put(NMI_MASK, &[u8::from(s.nmi_blocked)]);
    area.u64(EFER, s.efer);
    area.u32(REVISION_AT, REVISION);
    area.u32(SMBASE, s.msr.smbase as u32);
    area.u64(CR4, s.cr4);
    area.u64(CR3, s.cr3);
    area.u64(CR0, s.cr0);
    area.u64(DR7, s.dr[7]);
    area.u64(DR6, s.dr[6]);
    area.u64(RFLAGS, s.rflags);
    area.u64(RIP, s.rip);
    for (i, r) in s.gpr.iter().enumerate() {
        area.u64(R15 + 8 * (15 - i as u64), *r);
    }
    physical(cpu, &mut area, true);
    let s = &mut cpu.state;
    s.smm = true;
    s.nmi_blocked = true;
    s.activity = Activity::Running;
    s.shadow = Shadow::None;
    s.rflags = flag::ONE;
    s.rip = 0x8000;
    s.cr0 &= !(cr0::PE | cr0::EM | cr0::TS | cr0::PG);
    s.cr4 = 0;
    s.efer = 0;
    s.dr[7] = 0x400;
    let data = Segment { base: 0, limit: 0xffff_ffff, attr: 0x8093, selector: 0, unusable: false };
    s.seg = [data; 6];
    let smbase = s.msr.smbase;
    s.seg[Seg::Cs as usize] = Segment { base: smbase, selector: (smbase >> 4) as u16, attr: 0x809b, ..data };
    cpu.flush_tlb(true);
    cpu.mode_changed();
    Ok(())
}

/// RSM.
pub(crate) fn rsm(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if !cpu.state.smm {
        return Err(Fault::ud());
    }
    let mut area = Area([0; 0x200]);
    physical(cpu, &mut area, false);
    let (new_cr0, new_cr4) = (area.get64(CR0), area.get64(CR4));
    let bad = new_cr0 & cr0::PG != 0 && new_cr0 & cr0::PE == 0
        || new_cr0 & cr0::NW != 0 && new_cr0 & cr0::CD == 0
        || new_cr0 >> 32 != 0
        || new_cr4 & !super::control::cr4_bits(cpu) != 0;
    if bad {
        // A state that can't be restored shuts the processor down (APM vol. 2 §10.4).
        cpu.state.activity = Activity::Shutdown;
        return Err(Fault::Stop(Exit::Shutdown));
    }
    let s = &mut cpu.state;
    for (i, r) in s.gpr.iter_mut().enumerate() {
        *r = area.get64(R15 + 8 * (15 - i as u64));
    }
    for (at, seg) in SEGMENTS.into_iter().zip(&mut s.seg) {
        *seg = area.get_segment(at);
    }
    s.ldtr = area.get_segment(LDTR);
    s.tr = area.get_segment(TR);
    for (at, t) in [(GDTR, &mut s.gdtr), (IDTR, &mut s.idtr)] {
        t.limit = area.get16(at + 4);
        t.base = area.get64(at + 8);
    }
    s.efer = area.get64(EFER);
    s.cr0 = new_cr0 | cr0::ET;
    s.cr3 = area.get64(CR3);
    s.cr4 = new_cr4;
    s.dr[7] = area.get64(DR7);
    s.dr[6] = area.get64(DR6);
    s.rflags = area.get64(RFLAGS) | flag::ONE;
    if area.get32(REVISION_AT) & 0x2_0000 != 0 {
        s.msr.smbase = u64::from(area.get32(SMBASE));
    }
    s.nmi_blocked = area.get::<1>(NMI_MASK)[0] & 1 != 0;
    if area.get::<1>(AUTO_HALT)[0] & 1 != 0 {
        s.activity = Activity::Halted;
    }
    s.smm = false;
    cpu.env.set_smm(false);
    cpu.invalidate_map();
    let rip = area.get64(RIP);
    cpu.flush_tlb(true);
    cpu.mode_changed();
    jump(cpu, rip);
    Ok(())
}
