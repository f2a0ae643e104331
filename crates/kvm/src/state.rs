//! The architectural state: into a vCPU and out of it.
//!
//! Calls: Linux, `Documentation/virt/kvm/api.rst`. Their order matters where noted.

use crate::cpuid;
use crate::error::KvmError;
use crate::msr;
use crate::sys;
use crate::vcpu::{KvmVcpu, borrow};
use crate::xsave::Layout;
use hyaline_x86::env::{Env, Signals};
use hyaline_x86::state::{Activity, CpuState, EventKind, Injected, Seg, Segment, Shadow, Table, cr0};
use kvm_bindings as kb;
use std::fmt::Write as _;

/// A local APIC's registers as its page has them: register `n` is the 32-bit little-endian word at `16 * n` (SDM vol. 3A
/// table 11-1). In x2APIC mode the kernel keeps the APIC ID in bits 31-24 of register 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapicPage(pub Box<[u8; 1024]>);

impl LapicPage {
    /// A register by its number (offset / 16), 0 to 63.
    pub fn register(&self, number: usize) -> Option<u32> {
        let bytes = self.0.get(number.checked_mul(16)?..)?.get(..4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Sets a register by its number.
    pub fn set_register(&mut self, number: usize, value: u32) {
        if let Some(bytes) = number.checked_mul(16).and_then(|at| self.0.get_mut(at..)?.get_mut(..4)) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn segment(from: &Segment) -> kb::kvm_segment {
    let bit = |n: u32| (from.attr >> n & 1) as u8;
    kb::kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.kind(),
        s: bit(4),
        dpl: from.dpl(),
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: from.unusable.into(),
        padding: 0,
    }
}

fn from_segment(from: &kb::kvm_segment) -> Segment {
    let at = |value: u8, n: u32| u16::from(value & 1) << n;
    Segment {
        base: from.base,
        limit: from.limit,
        attr: u16::from(from.type_ & 0xf)
            | at(from.s, 4)
            | u16::from(from.dpl & 3) << 5
            | at(from.present, 7)
            | at(from.avl, 12)
            | at(from.l, 13)
            | at(from.db, 14)
            | at(from.g, 15),
        selector: from.selector,
        unusable: from.unusable != 0,
    }
}

fn table(from: &Table) -> kb::kvm_dtable {
    kb::kvm_dtable { base: from.base, limit: from.limit, padding: [0; 3] }
}

fn from_table(from: &kb::kvm_dtable) -> Table {
    Table { base: from.base, limit: from.limit }
}

fn to_regs(state: &CpuState) -> kb::kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    kb::kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// Is PAE paging in use, whose page directory pointers are registers?
fn pae(state: &CpuState) -> bool {
    state.cr0 & cr0::PG != 0 && state.cr4 & 1 << 5 != 0 && state.efer & 1 << 10 == 0
}

impl KvmVcpu {
    /// Loads a state: with `lapic` the registers of the local APIC in the kernel, and with `machine_tsc`, the machine's TSC clock now,
    /// this vCPU's time-stamp counter too (without it the counter goes on as it is).
    ///
    /// What the kernel refuses and can be done without is told by [`KvmVcpu::take_skipped`].
    ///
    /// # Errors
    /// The kernel refuses something that can't be done without (control registers that contradict each other, say). The vCPU then
    /// holds parts of the state and must not run before another load.
    pub fn load(
        &mut self,
        state: &CpuState,
        lapic: Option<&LapicPage>,
        machine_tsc: Option<u64>,
    ) -> Result<(), KvmError> {
        self.complete()?;
        self.load_special(state)?;
        self.fd.set_regs(&to_regs(state)).map_err(|e| self.call("KVM_SET_REGS", e))?;
        self.load_xcr0(state)?;
        self.load_vectors(state)?;
        self.load_debug(state)?;
        if let Some(lapic) = lapic {
            self.set_lapic(lapic)?;
        }
        let tsc = machine_tsc.map(|clock| (msr::TSC, clock.wrapping_add(state.tsc_offset)));
        self.load_msrs(state, tsc)?;
        // After the registers, whose setting drops pending events.
        self.load_events(state)?;
        self.load_activity(state)?;
        self.icount = state.icount;
        self.ready = false;
        Ok(())
    }

    /// Fetches the state. `machine_tsc` is the machine's TSC clock now, from which the counter's offset is told.
    ///
    /// # Errors
    /// A call fails.
    pub fn fetch(&mut self, machine_tsc: u64) -> Result<CpuState, KvmError> {
        self.complete()?;
        let mut state = CpuState::at_reset(self.index() == 0);
        let regs = self.fd.get_regs().map_err(|e| self.call("KVM_GET_REGS", e))?;
        state.gpr = [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
            regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ];
        (state.rip, state.rflags) = (regs.rip, regs.rflags);
        self.fetch_special(&mut state)?;
        self.fetch_xcr0(&mut state)?;
        self.fetch_vectors(&mut state)?;
        self.fetch_debug(&mut state)?;
        self.fetch_msrs(&mut state, machine_tsc)?;
        self.fetch_events(&mut state)?;
        self.fetch_activity(&mut state)?;
        state.icount = self.icount;
        Ok(state)
    }

    fn has_sregs2(&self) -> bool {
        self.vm.kvm.caps.sregs2
    }

    fn load_special(&mut self, state: &CpuState) -> Result<(), KvmError> {
        let old = self.fd.get_sregs().map_err(|e| self.call("KVM_GET_SREGS", e))?;
        let seg = |s: Seg| segment(&state.seg[s as usize]);
        let sregs = kb::kvm_sregs2 {
            cs: seg(Seg::Cs),
            ds: seg(Seg::Ds),
            es: seg(Seg::Es),
            fs: seg(Seg::Fs),
            gs: seg(Seg::Gs),
            ss: seg(Seg::Ss),
            tr: segment(&state.tr),
            ldt: segment(&state.ldtr),
            gdt: table(&state.gdtr),
            idt: table(&state.idtr),
            cr0: state.cr0,
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4,
            // The task priority is the local APIC's.
            cr8: old.cr8,
            efer: state.efer,
            apic_base: state.msr.apic_base,
            flags: if pae(state) { u64::from(kb::KVM_SREGS2_FLAGS_PDPTRS_VALID) } else { 0 },
            pdptrs: state.pdpte,
        };
        self.apic_base = state.msr.apic_base;
        let what = format!(
            "vCPU {}: CR0 {:#x}, CR3 {:#x}, CR4 {:#x}, EFER {:#x}, APIC base {:#x}",
            self.index(),
            state.cr0,
            state.cr3,
            state.cr4,
            state.efer,
            state.msr.apic_base
        );
        if self.has_sregs2() {
            sys::ioctl_in(borrow(&self.fd), sys::SET_SREGS2, &sregs)
                .map(|_| ())
                .map_err(|e| KvmError::call("KVM_SET_SREGS2", what, e))
        } else {
            let kb::kvm_sregs2 {
                cs,
                ds,
                es,
                fs,
                gs,
                ss,
                tr,
                ldt,
                gdt,
                idt,
                cr0,
                cr2,
                cr3,
                cr4,
                cr8,
                efer,
                apic_base,
                ..
            } = sregs;
            let sregs = kb::kvm_sregs {
                cs,
                ds,
                es,
                fs,
                gs,
                ss,
                tr,
                ldt,
                gdt,
                idt,
                cr0,
                cr2,
                cr3,
                cr4,
                cr8,
                efer,
                apic_base,
                interrupt_bitmap: [0; 4],
            };
            self.fd.set_sregs(&sregs).map_err(|e| KvmError::ioctl("KVM_SET_SREGS", what, e))
        }
    }

    fn fetch_special(&mut self, state: &mut CpuState) -> Result<(), KvmError> {
        let sregs: kb::kvm_sregs2 = if self.has_sregs2() {
            sys::ioctl_out(borrow(&self.fd), sys::GET_SREGS2)
                .map_err(|e| self.io_call("KVM_GET_SREGS2", e))?
        } else {
            let s = self.fd.get_sregs().map_err(|e| self.call("KVM_GET_SREGS", e))?;
            kb::kvm_sregs2 {
                cs: s.cs,
                ds: s.ds,
                es: s.es,
                fs: s.fs,
                gs: s.gs,
                ss: s.ss,
                tr: s.tr,
                ldt: s.ldt,
                gdt: s.gdt,
                idt: s.idt,
                cr0: s.cr0,
                cr2: s.cr2,
                cr3: s.cr3,
                cr4: s.cr4,
                cr8: s.cr8,
                efer: s.efer,
                apic_base: s.apic_base,
                ..Default::default()
            }
        };
        for (seg, from) in [
            (Seg::Es, &sregs.es),
            (Seg::Cs, &sregs.cs),
            (Seg::Ss, &sregs.ss),
            (Seg::Ds, &sregs.ds),
            (Seg::Fs, &sregs.fs),
            (Seg::Gs, &sregs.gs),
        ] {
            state.seg[seg as usize] = from_segment(from);
        }
        (state.tr, state.ldtr) = (from_segment(&sregs.tr), from_segment(&sregs.ldt));
        (state.gdtr, state.idtr) = (from_table(&sregs.gdt), from_table(&sregs.idt));
        (state.cr0, state.cr2, state.cr3, state.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
        (state.efer, state.msr.apic_base) = (sregs.efer, sregs.apic_base);
        if sregs.flags & u64::from(kb::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 {
            state.pdpte = sregs.pdptrs;
        }
        Ok(())
    }

    fn load_xcr0(&mut self, state: &CpuState) -> Result<(), KvmError> {
        let allowed = cpuid::xsave_mask(&self.leaves);
        if !self.vm.kvm.caps.xcrs {
            return Ok(());
        }
        if state.xcr0 & !allowed != 0 {
            self.skip(format!(
                "XCR0: this vCPU's model can't have the bits {:#x}; the guest's vector registers of these kinds stay as they are",
                state.xcr0 & !allowed
            ));
        }
        let mut xcrs = kb::kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kb::kvm_xcr { xcr: 0, reserved: 0, value: state.xcr0 & allowed | 1 };
        match self.fd.set_xcrs(&xcrs) {
            Ok(()) => Ok(()),
            // Nothing but x87: what a vCPU has anyway.
            Err(_) if state.xcr0 == 1 => Ok(()),
            Err(error) => {
                self.skip(format!("XCR0: the kernel refused {:#x} ({error})", state.xcr0));
                Ok(())
            }
        }
    }

    fn fetch_xcr0(&mut self, state: &mut CpuState) -> Result<(), KvmError> {
        if self.vm.kvm.caps.xcrs {
            let xcrs = self.fd.get_xcrs().map_err(|e| self.call("KVM_GET_XCRS", e))?;
            let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
            if let Some(xcr0) = xcrs.xcrs[..count].iter().find(|x| x.xcr == 0) {
                state.xcr0 = xcr0.value;
            }
        }
        Ok(())
    }

    fn layout(&self) -> Layout {
        Layout::new(&self.vm.kvm.supported, cpuid::xsave_mask(&self.leaves))
    }

    /// A buffer that the kernel's XSAVE calls fit into.
    fn xsave_area(&self, layout: &Layout) -> Vec<u8> {
        vec![0; layout.size().max(self.vm.kvm.caps.xsave_size as usize)]
    }

    fn load_vectors(&mut self, state: &CpuState) -> Result<(), KvmError> {
        let layout = self.layout();
        let mut area = self.xsave_area(&layout);
        for lost in layout.encode(state, &mut area) {
            self.skip(format!("{lost}: this vCPU's model has none; what the state holds there is lost"));
        }
        if state.x87.fcs != 0 || state.x87.fds != 0 {
            self.skip(
                "the x87's last code and data selectors have no place in KVM's state; they are lost".into(),
            );
        }
        // SAFETY: the kernel reads 4096 bytes, or with KVM_CAP_XSAVE2 as many as that capability says; the area has both.
        unsafe { sys::ioctl_pointer(borrow(&self.fd), sys::SET_XSAVE, area.as_mut_ptr()) }
            .map(|_| ())
            .map_err(|e| self.io_call("KVM_SET_XSAVE", e))
    }

    fn fetch_vectors(&mut self, state: &mut CpuState) -> Result<(), KvmError> {
        let layout = self.layout();
        let mut area = self.xsave_area(&layout);
        let (call, name) = if self.vm.kvm.caps.xsave2 {
            (sys::GET_XSAVE2, "KVM_GET_XSAVE2")
        } else {
            (sys::GET_XSAVE, "KVM_GET_XSAVE")
        };
        // SAFETY: the kernel writes as many bytes as the capability says (4096 for the older call); the area has as many.
        unsafe { sys::ioctl_pointer(borrow(&self.fd), call, area.as_mut_ptr()) }
            .map_err(|e| self.io_call(name, e))?;
        let unknown = layout.decode(&area, state);
        if unknown != 0 {
            self.skip(format!("the XSAVE components {unknown:#x} have no place in the state; they are lost"));
        }
        Ok(())
    }

    fn load_debug(&mut self, state: &CpuState) -> Result<(), KvmError> {
        if !self.vm.kvm.caps.debug_registers {
            return Ok(());
        }
        let dr = &state.dr;
        let regs = kb::kvm_debugregs {
            db: [dr[0], dr[1], dr[2], dr[3]],
            dr6: dr[6] & 0xffff_ffff,
            dr7: dr[7] & 0xffff_ffff,
            ..Default::default()
        };
        self.fd.set_debug_regs(&regs).map_err(|e| self.call("KVM_SET_DEBUGREGS", e))
    }

    fn fetch_debug(&mut self, state: &mut CpuState) -> Result<(), KvmError> {
        if self.vm.kvm.caps.debug_registers {
            let regs = self.fd.get_debug_regs().map_err(|e| self.call("KVM_GET_DEBUGREGS", e))?;
            state.dr[..4].copy_from_slice(&regs.db);
            (state.dr[6], state.dr[7]) = (regs.dr6, regs.dr7);
        }
        Ok(())
    }

    /// How many machine-check banks the vCPU was made with.
    fn banks(&self) -> usize {
        let has =
            cpuid::find(&self.leaves, 1, 0).is_some_and(|l| l.edx & (1 << 7 | 1 << 14) == 1 << 7 | 1 << 14);
        if has { self.vm.kvm.caps.mce_banks.min(10) as usize } else { 0 }
    }

    fn load_msrs(&mut self, state: &CpuState, tsc: Option<(u32, u64)>) -> Result<(), KvmError> {
        let mut values = state.msr.clone();
        let mut reset = CpuState::at_reset(self.index() == 0).msr;
        reset.mc_banks = vec![[0; 4]; values.mc_banks.len()];
        let indices = msr::indices(values.mc_banks.len());
        let entries: Vec<_> = tsc
            .into_iter()
            .chain(indices.into_iter().filter_map(|index| Some((index, *msr::field(&mut values, index)?))))
            .map(|(index, data)| kb::kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        let mut rest = &entries[..];
        while !rest.is_empty() {
            let msrs =
                kb::Msrs::from_entries(rest).map_err(|_| KvmError::Unsuitable("too many MSRs".into()))?;
            let done = self.fd.set_msrs(&msrs).map_err(|e| self.call("KVM_SET_MSRS", e))?.min(rest.len());
            // The kernel stops at the first it refuses.
            if let Some(refused) = rest.get(done) {
                let initial = msr::field(&mut reset, refused.index).copied().unwrap_or(0);
                if refused.data != initial && refused.data != 0 {
                    self.skip(format!(
                        "MSR {:#x} ({}): the kernel refused the value {:#x}; it keeps its own",
                        refused.index,
                        msr::name(refused.index),
                        refused.data
                    ));
                }
            }
            rest = rest.get(done + 1..).unwrap_or(&[]);
        }
        if let Some((_, wanted)) = tsc
            && let Some(now) = self.read_msr(msr::TSC)
            // Far more than can have passed since: 2^36 ticks are over ten seconds.
            && now.wrapping_sub(wanted).wrapping_add(1 << 36) > 1 << 37
        {
            self.skip(format!(
                "the time-stamp counter: the kernel took the value {wanted:#x} and runs on from {now:#x}; the guest's clock jumps"
            ));
        }
        Ok(())
    }

    /// Reads one MSR; none when the kernel doesn't give it.
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        let mut msrs = kb::Msrs::from_entries(&[kb::kvm_msr_entry { index, ..Default::default() }]).ok()?;
        (self.fd.get_msrs(&mut msrs).ok()? == 1)
            .then(|| msrs.as_slice().first().map(|entry| entry.data))
            .flatten()
    }

    /// Writes one MSR; false when the kernel refuses it.
    pub fn write_msr(&mut self, index: u32, data: u64) -> bool {
        let entries = [kb::kvm_msr_entry { index, data, ..Default::default() }];
        kb::Msrs::from_entries(&entries).is_ok_and(|msrs| self.fd.set_msrs(&msrs).is_ok_and(|done| done == 1))
    }

    fn fetch_msrs(&mut self, state: &mut CpuState, machine_tsc: u64) -> Result<(), KvmError> {
        state.msr.mc_banks = vec![[0; 4]; self.banks()];
        let mut indices = vec![msr::TSC];
        indices.extend(msr::indices(self.banks()));
        let entries: Vec<_> =
            indices.iter().map(|&index| kb::kvm_msr_entry { index, ..Default::default() }).collect();
        let mut rest = &entries[..];
        while !rest.is_empty() {
            let mut msrs =
                kb::Msrs::from_entries(rest).map_err(|_| KvmError::Unsuitable("too many MSRs".into()))?;
            let done = self.fd.get_msrs(&mut msrs).map_err(|e| self.call("KVM_GET_MSRS", e))?.min(rest.len());
            for entry in &msrs.as_slice()[..done] {
                if entry.index == msr::TSC {
                    state.tsc_offset = entry.data.wrapping_sub(machine_tsc);
                } else if let Some(field) = msr::field(&mut state.msr, entry.index) {
                    *field = entry.data;
                }
            }
            // One that the kernel doesn't give although it lists it; those it doesn't list hold nothing.
            if let Some(refused) = rest.get(done)
                && self.vm.kvm.msrs.contains(&refused.index)
                && self.is_modelled(refused.index)
            {
                self.skip(format!(
                    "MSR {:#x} ({}): the kernel doesn't give its value; the state holds that after a reset",
                    refused.index,
                    msr::name(refused.index)
                ));
            }
            rest = rest.get(done + 1..).unwrap_or(&[]);
        }
        Ok(())
    }

    /// Does the CPUID model have the MSR at all? (Only those that hang on one feature bit.)
    fn is_modelled(&self, index: u32) -> bool {
        let bit = |leaf, subleaf, pick: fn(&cpuid::CpuidLeaf) -> u32, n: u32| {
            cpuid::find(&self.leaves, leaf, subleaf).is_some_and(|l| pick(l) >> n & 1 != 0)
        };
        match index {
            0x3b => bit(7, 0, |l| l.ebx, 1),
            0x48 => bit(7, 0, |l| l.edx, 26) || bit(0x8000_0008, 0, |l| l.ebx, 14),
            0xda0 => bit(0xd, 1, |l| l.eax, 3),
            0xc000_0103 => bit(0x8000_0001, 0, |l| l.edx, 27) || bit(7, 0, |l| l.ecx, 22),
            msr::TSC_DEADLINE => bit(1, 0, |l| l.ecx, 24),
            _ => true,
        }
    }

    fn load_events(&mut self, state: &CpuState) -> Result<(), KvmError> {
        if !self.vm.kvm.caps.vcpu_events {
            if state.injected.is_some() || state.nmi_pending || state.nmi_blocked {
                self.skip("events under delivery: this kernel's KVM can't take them; they are lost".into());
            }
            return Ok(());
        }
        let mut events =
            kb::kvm_vcpu_events { flags: kb::KVM_VCPUEVENT_VALID_NMI_PENDING, ..Default::default() };
        events.nmi.pending = state.nmi_pending.into();
        events.nmi.masked = state.nmi_blocked.into();
        if self.vm.kvm.caps.interrupt_shadow {
            events.flags |= kb::KVM_VCPUEVENT_VALID_SHADOW;
            events.interrupt.shadow = match state.shadow {
                Shadow::None => 0,
                Shadow::MovSs => kb::KVM_X86_SHADOW_INT_MOV_SS as u8,
                Shadow::Sti => kb::KVM_X86_SHADOW_INT_STI as u8,
            };
        } else if state.shadow != Shadow::None {
            self.skip("the interrupt shadow of STI or MOV SS: this kernel's KVM can't take it; an interrupt may come one instruction early".into());
        }
        if self.vm.kvm.caps.smm {
            events.flags |= kb::KVM_VCPUEVENT_VALID_SMM;
            events.smi.smm = state.smm.into();
        } else if state.smm {
            return Err(KvmError::Unsuitable(
                "the state is in system-management mode, which this kernel's KVM doesn't have; continue it on the software CPU (-accel interp)".into(),
            ));
        }
        match state.injected {
            None => {}
            Some(Injected { vector, kind: EventKind::External, .. }) => {
                (events.interrupt.injected, events.interrupt.nr) = (1, vector);
            }
            Some(Injected { kind: EventKind::Nmi, .. }) => events.nmi.injected = 1,
            Some(Injected { vector, kind: EventKind::Exception, error }) => {
                (events.exception.injected, events.exception.nr) = (1, vector);
                events.exception.has_error_code = error.is_some().into();
                events.exception.error_code = error.unwrap_or(0);
            }
            // The instruction pointer stands at the instruction, which will make the event again.
            Some(Injected { kind: EventKind::Software, .. }) => {}
        }
        self.fd.set_vcpu_events(&events).map_err(|e| self.call("KVM_SET_VCPU_EVENTS", e))
    }

    fn fetch_events(&mut self, state: &mut CpuState) -> Result<(), KvmError> {
        if !self.vm.kvm.caps.vcpu_events {
            return Ok(());
        }
        let events = self.fd.get_vcpu_events().map_err(|e| self.call("KVM_GET_VCPU_EVENTS", e))?;
        state.nmi_pending = events.nmi.pending != 0;
        state.nmi_blocked = events.nmi.masked != 0;
        state.smm = events.flags & kb::KVM_VCPUEVENT_VALID_SMM != 0 && events.smi.smm != 0;
        state.shadow = match u32::from(events.interrupt.shadow) {
            shadow if shadow & kb::KVM_X86_SHADOW_INT_MOV_SS != 0 => Shadow::MovSs,
            shadow if shadow & kb::KVM_X86_SHADOW_INT_STI != 0 => Shadow::Sti,
            _ => Shadow::None,
        };
        let exception = &events.exception;
        // INT n, INT3 and INTO are made again by the instruction at which the pointer stands.
        state.injected = if exception.injected != 0 && !matches!(exception.nr, 3 | 4) {
            let error = (exception.has_error_code != 0).then_some(exception.error_code);
            Some(Injected { vector: exception.nr, kind: EventKind::Exception, error })
        } else if events.nmi.injected != 0 {
            Some(Injected { vector: 2, kind: EventKind::Nmi, error: None })
        } else if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
            Some(Injected { vector: events.interrupt.nr, kind: EventKind::External, error: None })
        } else {
            None
        };
        Ok(())
    }

    fn load_activity(&mut self, state: &CpuState) -> Result<(), KvmError> {
        self.activity = state.activity;
        if !self.vm.lapic_in_kernel() {
            return Ok(());
        }
        let mp_state = match state.activity {
            Activity::Running | Activity::Shutdown => kb::KVM_MP_STATE_RUNNABLE,
            Activity::Halted => kb::KVM_MP_STATE_HALTED,
            Activity::WaitForSipi => kb::KVM_MP_STATE_UNINITIALIZED,
        };
        self.fd.set_mp_state(kb::kvm_mp_state { mp_state }).map_err(|e| self.call("KVM_SET_MP_STATE", e))
    }

    fn fetch_activity(&mut self, state: &mut CpuState) -> Result<(), KvmError> {
        state.activity = self.activity;
        if !self.vm.lapic_in_kernel() || self.activity == Activity::Shutdown {
            return Ok(());
        }
        let mp = self.fd.get_mp_state().map_err(|e| self.call("KVM_GET_MP_STATE", e))?;
        state.activity = match mp.mp_state {
            kb::KVM_MP_STATE_HALTED => Activity::Halted,
            kb::KVM_MP_STATE_UNINITIALIZED | kb::KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            kb::KVM_MP_STATE_SIPI_RECEIVED => {
                let events = self.fd.get_vcpu_events().map_err(|e| self.call("KVM_GET_VCPU_EVENTS", e))?;
                start_up(state, events.sipi_vector as u8);
                Activity::Running
            }
            _ => Activity::Running,
        };
        Ok(())
    }

    /// The registers of the local APIC in the kernel.
    ///
    /// # Errors
    /// The local APIC isn't in the kernel, or the call fails.
    pub fn lapic(&self) -> Result<LapicPage, KvmError> {
        let state = self.fd.get_lapic().map_err(|e| self.call("KVM_GET_LAPIC", e))?;
        let mut page = Box::new([0u8; 1024]);
        for (to, from) in page.iter_mut().zip(state.regs) {
            *to = from as u8;
        }
        Ok(LapicPage(page))
    }

    /// Sets the registers of the local APIC in the kernel.
    ///
    /// # Errors
    /// The local APIC isn't in the kernel, the APIC ID isn't the vCPU's, or the call fails.
    pub fn set_lapic(&mut self, page: &LapicPage) -> Result<(), KvmError> {
        let mut state = kb::kvm_lapic_state::default();
        for (to, from) in state.regs.iter_mut().zip(page.0.iter()) {
            *to = *from as std::os::raw::c_char;
        }
        self.fd.set_lapic(&state).map_err(|e| self.call("KVM_SET_LAPIC", e))
    }

    /// INIT and start-up requests that came through the machine's signals, not through the local APIC in the kernel.
    pub(crate) fn init_and_startup(&mut self, env: &mut dyn Env) -> Result<(), KvmError> {
        let signals = env.signals().clone();
        if signals.pending() & Signals::INIT != 0 {
            signals.clear(Signals::INIT);
            let old = self.fetch(0)?;
            let signature = cpuid::find(&self.leaves, 1, 0).map_or(0, |l| l.eax);
            self.load(&after_init(&old, signature), None, None)?;
        }
        if signals.pending() & Signals::SIPI != 0
            && let Some(vector) = signals.take_sipi()
        {
            let mut state = self.fetch(0)?;
            // Ignored by a processor that doesn't wait for it (SDM vol. 3A §9.4.3).
            if state.activity == Activity::WaitForSipi {
                start_up(&mut state, vector);
                self.load(&state, None, None)?;
            }
        }
        Ok(())
    }

    /// The registers as text, for errors.
    pub(crate) fn registers_text(&self) -> String {
        let mut text = String::new();
        let (Ok(r), Ok(s)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return "(the registers can't be read)".into();
        };
        let groups = [
            [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
            [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
            [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
            [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
            [("rip", r.rip), ("rfl", r.rflags), ("cr0", s.cr0), ("cr2", s.cr2)],
            [("cr3", s.cr3), ("cr4", s.cr4), ("efer", s.efer), ("apic", s.apic_base)],
        ];
        for group in groups {
            text.push(' ');
            for (name, value) in group {
                let _ = write!(text, " {name}={value:016x}");
            }
            text.push('\n');
        }
        for (name, seg) in [
            ("cs", s.cs),
            ("ss", s.ss),
            ("ds", s.ds),
            ("es", s.es),
            ("fs", s.fs),
            ("gs", s.gs),
            ("tr", s.tr),
            ("ldt", s.ldt),
        ] {
            let attr = from_segment(&seg).attr;
            let _ = writeln!(
                text,
                "  {name:<3} {:04x} base={:016x} limit={:08x} attributes={attr:04x}",
                seg.selector, seg.base, seg.limit
            );
        }
        let _ = write!(
            text,
            "  gdt base={:016x} limit={:04x}, idt base={:016x} limit={:04x}",
            s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
        );
        text
    }
}

/// The state after INIT (SDM vol. 3A table 10-1): as after RESET, but vector, x87 and model-specific registers and the cache bits
/// of CR0 stay. The bootstrap processor starts at the reset vector, others wait.
fn after_init(old: &CpuState, signature: u32) -> CpuState {
    let bootstrap = old.msr.apic_base & 0x100 != 0;
    let fresh = CpuState::at_reset(bootstrap);
    let mut state = CpuState {
        xcr0: old.xcr0,
        pkru: old.pkru,
        x87: old.x87,
        mxcsr: old.mxcsr,
        vec: old.vec,
        opmask: old.opmask,
        msr: old.msr.clone(),
        tsc_offset: old.tsc_offset,
        icount: old.icount,
        cr0: cr0::ET | old.cr0 & (cr0::CD | cr0::NW),
        ..fresh
    };
    state.gpr[2] = signature.into();
    state
}

/// Start-up IPI: real mode at `vector` * 4096 (SDM vol. 3A §9.4.3).
fn start_up(state: &mut CpuState, vector: u8) {
    let cs = &mut state.seg[Seg::Cs as usize];
    cs.selector = u16::from(vector) << 8;
    cs.base = u64::from(vector) << 12;
    state.rip = 0;
    state.activity = Activity::Running;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_there_and_back() {
        let code = Segment { base: 0x1000, limit: 0xffff_ffff, attr: 0xa09b, selector: 8, unusable: false };
        let kvm = segment(&code);
        assert_eq!((kvm.type_, kvm.s, kvm.present, kvm.l, kvm.db, kvm.g), (11, 1, 1, 1, 0, 1));
        assert_eq!(from_segment(&kvm), code);
        let null = Segment { attr: 0xf0ff & 0xf0e1, unusable: true, selector: 3, ..Segment::default() };
        assert_eq!(from_segment(&segment(&null)), null);
    }

    #[test]
    fn init_keeps_what_the_manual_keeps() {
        let mut old = CpuState::at_reset(false);
        old.cr0 = 0x8000_0011;
        old.rip = 5;
        old.vec[3].0[0] = 7;
        old.msr.pat = 9;
        let new = after_init(&old, 0x600);
        assert_eq!((new.rip, new.cr0, new.vec[3].0[0], new.msr.pat, new.gpr[2]), (0xfff0, 0x10, 7, 9, 0x600));
        assert_eq!(new.activity, Activity::WaitForSipi);
        let mut started = new;
        start_up(&mut started, 0x9f);
        assert_eq!((started.seg[1].base, started.seg[1].selector, started.rip), (0x9_f000, 0x9f00, 0));
    }

    #[test]
    fn a_lapic_page_is_words() {
        let mut page = LapicPage(Box::new([0; 1024]));
        page.set_register(0xf, 0x1ff);
        assert_eq!(page.register(0xf), Some(0x1ff));
        assert_eq!(page.0[0xf0..0xf2], [0xff, 0x01]);
        page.set_register(64, 1);
        assert_eq!(page.register(64), None);
    }
}
