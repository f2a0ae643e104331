//! RESET, INIT and start-up IPI.
//!
//! Source: SDM vol. 3A §8.4 (multiprocessor initialization) and table 9-1 (states after RESET and INIT).

use crate::cpu::Cpu;
use crate::state::{Activity, CpuState, Seg, Segment, cr0};

impl Cpu {
    /// RESET: the state of SDM vol. 3A table 9-1, with the processor's signature in EDX. The instruction count goes on.
    pub fn reset(&mut self, bootstrap: bool) {
        let icount = self.state.icount;
        self.state = CpuState { icount, ..CpuState::at_reset(bootstrap) };
        self.state.gpr[crate::state::gpr::RDX] = u64::from(self.model.signature());
        super::debug::reset(self);
        self.env.set_smm(false);
        self.invalidate_map();
        self.flush_tlb(true);
        self.mode_changed();
    }
}

/// INIT was received. The bootstrap processor starts at the reset vector, the others wait for a start-up IPI. FPU and
/// vector state, MSRs other than EFER, the TSC and the cache bits of CR0 are kept.
pub(crate) fn init(cpu: &mut Cpu) {
    let bootstrap = cpu.state.msr.apic_base & 0x100 != 0;
    let fresh = CpuState::at_reset(bootstrap);
    let s = &mut cpu.state;
    s.gpr = fresh.gpr;
    s.gpr[crate::state::gpr::RDX] = u64::from(cpu.model.signature());
    s.rip = fresh.rip;
    s.rflags = fresh.rflags;
    s.seg = fresh.seg;
    s.ldtr = fresh.ldtr;
    s.tr = fresh.tr;
    s.gdtr = fresh.gdtr;
    s.idtr = fresh.idtr;
    s.cr0 = s.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
    s.cr2 = 0;
    s.cr3 = 0;
    s.cr4 = 0;
    s.efer = 0;
    s.dr = fresh.dr;
    s.pdpte = fresh.pdpte;
    s.activity = fresh.activity;
    s.shadow = fresh.shadow;
    s.nmi_blocked = false;
    s.nmi_pending = false;
    s.smm = false;
    s.injected = None;
    super::debug::reset(cpu);
    cpu.flush_tlb(true);
    cpu.mode_changed();
}

/// A start-up IPI was received while the processor waited for one: it starts in real mode at `vector` * 4 KiB.
pub(crate) fn sipi(cpu: &mut Cpu, vector: u8) {
    let selector = u16::from(vector) << 8;
    cpu.state.seg[Seg::Cs as usize] = Segment {
        base: u64::from(selector) << 4,
        selector,
        ..CpuState::at_reset(false).seg[Seg::Cs as usize]
    };
    cpu.state.seg[Seg::Cs as usize].limit = 0xffff;
    cpu.state.rip = 0;
    cpu.state.activity = Activity::Running;
    cpu.mode_changed();
}
