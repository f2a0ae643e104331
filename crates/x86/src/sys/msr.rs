//! Model-specific registers, RDMSR and WRMSR, and the time-stamp and performance counters.
//!
//! Sources: SDM vol. 4 (registers), vol. 3A §11.11 (MTRRs), §11.12 (PAT), §10.4.4 and §10.12 (APIC base, x2APIC),
//! vol. 3B chapter 15 (machine check), §17.17 (TSC); APM vol. 2 appendix A.

use super::cpuid::Feature;
use super::{canonical_base, edx_eax, privileged, set_edx_eax, write_gpr};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{Seg, cr0, cr4, efer, gpr};

/// Machine-check banks that are there (and never report anything).
const BANKS: usize = 10;

/// IA32_APIC_BASE bits.
mod base {
    pub(super) const BSP: u64 = 1 << 8;
    pub(super) const EXTD: u64 = 1 << 10;
    pub(super) const ENABLE: u64 = 1 << 11;
}

/// IA32_ARCH_CAPABILITIES: an interpreter forwards no data past a failed check, so it has none of these leaks:
/// RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO,
/// BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// The fixed-range MTRRs in the order of `Msrs::mtrr_fixed`.
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// AMD registers that only keep what is written to them (APM vol. 2 appendix A; BIOS and kernel developer's guides).
fn amd_plain(number: u32) -> bool {
    matches!(
        number,
        0xc001_0010        // SYSCFG
            | 0xc001_0015  // HWCR
            | 0xc001_0016..=0xc001_001a // IORRs, TOP_MEM
            | 0xc001_001d  // TOP_MEM2
            | 0xc001_001f  // NB_CFG
            | 0xc001_0055  // interrupt pending message
            | 0xc001_0058  // MMIO configuration base
            | 0xc001_0112  // SMM TSEG base
            | 0xc001_0113  // SMM TSEG mask
            | 0xc001_1020..=0xc001_1023 // LS_CFG, IC_CFG, DC_CFG, BU_CFG
            | 0xc001_1029  // DE_CFG
            | 0xc001_102a // BU_CFG2
    )
}

/// TSC frequency in units of 100 MHz, as the ratio fields have it.
fn ratio(cpu: &Cpu) -> u64 {
    (cpu.model.tsc_hz() / 100_000_000) & 0xff
}

fn refuse<T>() -> Exec<T> {
    Err(Fault::gp(0))
}

/// An MSR that isn't there: #GP, and the machine is told.
fn unknown<T>(cpu: &mut Cpu, number: u32, write: Option<u64>) -> Exec<T> {
    let rip = cpu.state.rip;
    match write {
        None => cpu.env.guest_error(rip, &format_args!("read of the unknown MSR {number:#x}")),
        Some(value) => {
            cpu.env.guest_error(rip, &format_args!("write of {value:#x} to the unknown MSR {number:#x}"));
        }
    }
    refuse()
}

/// The time-stamp counter now.
pub(crate) fn tsc(cpu: &mut Cpu) -> u64 {
    let icount = cpu.icount();
    cpu.env.tsc(icount).wrapping_add(cpu.state.tsc_offset)
}

fn bank(number: u32) -> Option<(usize, usize)> {
    let i = number.checked_sub(0x400)? as usize;
    (i < 4 * BANKS).then_some((i / 4, i % 4))
}

/// Reads an MSR.
pub(crate) fn read(cpu: &mut Cpu, number: u32) -> Exec<u64> {
    let intel = !cpu.model.is_amd();
    let has = |cpu: &Cpu, f| cpu.model.offers(f);
    let m = &cpu.state.msr;
    let value = match number {
        // P5 machine check: nothing logged.
        0 | 1 if has(cpu, Feature::Mce) => 0,
        0x10 => tsc(cpu),
        0x17 if intel => 0,
        0x1b if has(cpu, Feature::Apic) => m.apic_base,
        // Count of system-management interrupts: none that the guest should see.
        0x34 if intel => 0,
        // Locked, with VMX and SGX off.
        0x3a if intel => m.feature_control | 1,
        0x3b if has(cpu, Feature::TscAdjust) => m.tsc_adjust,
        0x48 if spec_ctrl_bits(cpu) != 0 => m.spec_ctrl,
        0x8b => m.bios_sign_id,
        // Maximum non-turbo ratio in units of 100 MHz, at bits 8-15.
        0xce if intel => ratio(cpu) << 8,
        0xfe if has(cpu, Feature::Mtrr) => 8 | 1 << 8 | 1 << 10,
        0x10a if has(cpu, Feature::ArchCapabilities) => ARCH_CAPABILITIES,
        // MISC_FEATURES_ENABLES: CPUID faulting is not there.
        0x140 if intel => 0,
        0x174 if has(cpu, Feature::Sep) => m.sysenter_cs,
        0x175 if has(cpu, Feature::Sep) => m.sysenter_esp,
        0x176 if has(cpu, Feature::Sep) => m.sysenter_eip,
        0x179 if has(cpu, Feature::Mca) => BANKS as u64 | 1 << 8,
        0x17a if has(cpu, Feature::Mca) => m.mcg_status,
        0x17b if has(cpu, Feature::Mca) => m.mcg_ctl,
        // Performance status, clock modulation, thermal interrupt and status: nominal, cool.
        0x198 if intel => ratio(cpu) << 8,
        0x19a..=0x19c if intel => 0,
        0x1a0 if intel => m.misc_enable,
        0x1a2 if intel => 100 << 16,
        0x1b0 if intel => m.other.get(&number).copied().unwrap_or(6),
        0x1d9 => m.debugctl,
        // Last branch and exception records: not kept.
        0x1db..=0x1de => 0,
        0x200..=0x20f if has(cpu, Feature::Mtrr) => {
            let i = (number - 0x200) as usize;
            m.mtrr_var.get(i / 2).map_or(0, |pair| pair[i % 2])
        }
        0x250..=0x26f if has(cpu, Feature::Mtrr) && FIXED.contains(&number) => {
            FIXED.iter().position(|n| *n == number).and_then(|i| m.mtrr_fixed.get(i)).copied().unwrap_or(0)
        }
        0x277 if has(cpu, Feature::Pat) => m.pat,
        0x2ff if has(cpu, Feature::Mtrr) => m.mtrr_def_type,
        _ if has(cpu, Feature::Mca) && bank(number).is_some() => {
            let (b, r) = bank(number).unwrap_or_default();
            m.mc_banks.get(b).map_or(if r == 0 { u64::MAX } else { 0 }, |x| x[r])
        }
        0x6e0 if has(cpu, Feature::TscDeadline) => {
            let deadline = m.tsc_deadline;
            // It reads zero once it has fired.
            if deadline != 0 && tsc(cpu) >= deadline {
                cpu.state.msr.tsc_deadline = 0;
                0
            } else {
                deadline
            }
        }
        0x800..=0x8ff if m.apic_base & base::EXTD != 0 => {
            return match cpu.env.apic_read(number - 0x800) {
                Some(value) => Ok(value),
                None => refuse(),
            };
        }
        0xda0 if has(cpu, Feature::Xsaves) => m.xss,
        0xc000_0080 => cpu.state.efer,
        0xc000_0081 if has(cpu, Feature::Syscall) => m.star,
        0xc000_0082 if has(cpu, Feature::Lm) => m.lstar,
        0xc000_0083 if has(cpu, Feature::Lm) => m.cstar,
        0xc000_0084 if has(cpu, Feature::Lm) => m.sfmask,
        0xc000_0100 if has(cpu, Feature::Lm) => cpu.state.seg[Seg::Fs as usize].base,
        0xc000_0101 if has(cpu, Feature::Lm) => cpu.state.seg[Seg::Gs as usize].base,
        0xc000_0102 if has(cpu, Feature::Lm) => m.kernel_gs_base,
        0xc000_0103 if has(cpu, Feature::Rdtscp) || has(cpu, Feature::Rdpid) => m.tsc_aux,
        0xc001_0111 if !intel => m.smbase,
        // P-states: one, enabled; VM_CR: SVM disabled and locked.
        0xc001_0061..=0xc001_0063 if !intel => 0,
        0xc001_0064 if !intel => 1 << 63,
        0xc001_0114 if !intel => 0x18,
        _ if !intel && amd_plain(number) => m.other.get(&number).copied().unwrap_or(0),
        _ => return unknown(cpu, number, None),
    };
    Ok(value)
}

/// Bits of IA32_SPEC_CTRL that the model has.
fn spec_ctrl_bits(cpu: &Cpu) -> u64 {
    let has = |f| cpu.model.offers(f);
    let mut bits = 0;
    if has(Feature::SpecCtrl) || has(Feature::Ibrs) {
        bits |= 1;
    }
    if has(Feature::Stibp) || has(Feature::AmdStibp) {
        bits |= 2;
    }
    if has(Feature::Ssbd) || has(Feature::AmdSsbd) {
        bits |= 4;
    }
    if has(Feature::BhiCtrl) {
        bits |= 1 << 10;
    }
    bits
}

/// Memory types of MTRRs (SDM vol. 3A table 11-8).
fn mtrr_type(t: u64) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

/// Writes an MSR.
#[allow(clippy::too_many_lines)]
pub(crate) fn write(cpu: &mut Cpu, number: u32, value: u64) -> Exec {
    let intel = !cpu.model.is_amd();
    let has = |cpu: &Cpu, f| cpu.model.offers(f);
    let reserved = cpu.model.reserved_physical_bits();
    match number {
        0 | 1 if has(cpu, Feature::Mce) => {}
        0x10 => {
            let delta = value.wrapping_sub(tsc(cpu));
            move_tsc(cpu, delta);
        }
        0x1b if has(cpu, Feature::Apic) => return write_apic_base(cpu, value),
        // The lock bit is always set: writing it is #GP.
        0x3a if intel => return refuse(),
        0x3b if has(cpu, Feature::TscAdjust) => {
            let delta = value.wrapping_sub(cpu.state.msr.tsc_adjust);
            move_tsc(cpu, delta);
        }
        0x48 if spec_ctrl_bits(cpu) != 0 => {
            if value & !spec_ctrl_bits(cpu) != 0 {
                return refuse();
            }
            cpu.state.msr.spec_ctrl = value;
        }
        // IBPB: there are no predictors to flush.
        0x49 if has(cpu, Feature::SpecCtrl) || has(cpu, Feature::Ibpb) => {
            if value & !1 != 0 {
                return refuse();
            }
        }
        // Microcode update: nothing to update; the signature stays.
        0x79 if intel => {}
        0x8b if intel => cpu.state.msr.bios_sign_id = value,
        0x140 if intel => {
            if value != 0 {
                return refuse();
            }
        }
        0x174 if has(cpu, Feature::Sep) => cpu.state.msr.sysenter_cs = value & 0xffff_ffff,
        0x175 if has(cpu, Feature::Sep) => cpu.state.msr.sysenter_esp = canonical_only(cpu, value)?,
        0x176 if has(cpu, Feature::Sep) => cpu.state.msr.sysenter_eip = canonical_only(cpu, value)?,
        0x17a if has(cpu, Feature::Mca) => {
            if value & !7 != 0 {
                return refuse();
            }
            cpu.state.msr.mcg_status = value;
        }
        0x17b if has(cpu, Feature::Mca) => {
            if value != 0 && value != u64::MAX {
                return refuse();
            }
            cpu.state.msr.mcg_ctl = value;
        }
        0x199..=0x19b if intel => {}
        0x19c if intel => {}
        0x1a0 if intel => {
            // Bits that say what the processor has (performance monitoring, BTS, PEBS) stay.
            let keep = 1 << 7 | 1 << 11 | 1 << 12;
            cpu.state.msr.misc_enable = cpu.state.msr.misc_enable & keep | value & !keep;
        }
        0x1b0 if intel => {
            cpu.state.msr.other.insert(number, value & 0xf);
        }
        0x1d9 => {
            let known = if intel { 0xffdf } else { 0x3f };
            if value & !known != 0 {
                return refuse();
            }
            if value & 1 != 0 {
                let rip = cpu.state.rip;
                cpu.env.guest_error(rip, &"last-branch records (DEBUGCTL.LBR) are not kept");
            }
            cpu.state.msr.debugctl = value;
        }
        0x200..=0x20f if has(cpu, Feature::Mtrr) => {
            let i = (number - 0x200) as usize;
            let bad =
                if i & 1 == 0 { value & 0xf00 != 0 || !mtrr_type(value & 0xff) } else { value & 0x7ff != 0 };
            if bad || value & reserved != 0 {
                return refuse();
            }
            if let Some(pair) = cpu.state.msr.mtrr_var.get_mut(i / 2) {
                pair[i % 2] = value;
            }
        }
        0x250..=0x26f if has(cpu, Feature::Mtrr) && FIXED.contains(&number) => {
            if !value.to_le_bytes().into_iter().all(|t| mtrr_type(u64::from(t))) {
                return refuse();
            }
            let i = FIXED.iter().position(|n| *n == number);
            if let Some(slot) = i.and_then(|i| cpu.state.msr.mtrr_fixed.get_mut(i)) {
                *slot = value;
            }
        }
        0x277 if has(cpu, Feature::Pat) => {
            if !value.to_le_bytes().into_iter().all(|t| matches!(t, 0 | 1 | 4..=7)) {
                return refuse();
            }
            cpu.state.msr.pat = value;
        }
        0x2ff if has(cpu, Feature::Mtrr) => {
            if value & !0xcff != 0 || !mtrr_type(value & 0xff) {
                return refuse();
            }
            cpu.state.msr.mtrr_def_type = value;
        }
        _ if has(cpu, Feature::Mca) && bank(number).is_some() => {
            let (b, r) = bank(number).unwrap_or_default();
            // Control takes all zeros or all ones (others are stored too, as AMD's do); status, address and
            // miscellaneous can only be cleared.
            if r != 0 && value != 0 && intel {
                return refuse();
            }
            let banks = &mut cpu.state.msr.mc_banks;
            banks.resize(BANKS, [u64::MAX, 0, 0, 0]);
            if let Some(bank) = banks.get_mut(b) {
                bank[r] = value;
            }
        }
        0x6e0 if has(cpu, Feature::TscDeadline) => {
            cpu.state.msr.tsc_deadline = value;
            let offset = cpu.state.tsc_offset;
            bring_clock(cpu);
            cpu.env.set_tsc_deadline(value, offset);
        }
        0x800..=0x8ff if cpu.state.msr.apic_base & base::EXTD != 0 => {
            bring_clock(cpu);
            if !cpu.env.apic_write(number - 0x800, value) {
                return refuse();
            }
        }
        0xda0 if has(cpu, Feature::Xsaves) => {
            // There are no supervisor components.
            if value != 0 {
                return refuse();
            }
        }
        0xc000_0080 => return write_efer(cpu, value),
        0xc000_0081 if has(cpu, Feature::Syscall) => cpu.state.msr.star = value,
        0xc000_0082 if has(cpu, Feature::Lm) => cpu.state.msr.lstar = canonical_only(cpu, value)?,
        0xc000_0083 if has(cpu, Feature::Lm) => cpu.state.msr.cstar = canonical_only(cpu, value)?,
        0xc000_0084 if has(cpu, Feature::Lm) => {
            if intel && value >> 32 != 0 {
                return refuse();
            }
            cpu.state.msr.sfmask = value & 0xffff_ffff;
        }
        0xc000_0100 | 0xc000_0101 if has(cpu, Feature::Lm) => {
            let seg = if number == 0xc000_0100 { Seg::Fs } else { Seg::Gs };
            cpu.state.seg[seg as usize].base = canonical_only(cpu, value)?;
            cpu.mode_changed();
        }
        0xc000_0102 if has(cpu, Feature::Lm) => cpu.state.msr.kernel_gs_base = canonical_only(cpu, value)?,
        0xc000_0103 if has(cpu, Feature::Rdtscp) || has(cpu, Feature::Rdpid) => {
            if value >> 32 != 0 {
                return refuse();
            }
            cpu.state.msr.tsc_aux = value;
        }
        // Microcode update.
        0xc001_0020 if !intel => {}
        0xc001_0111 if !intel => cpu.state.msr.smbase = value & 0xffff_ffff,
        0xc001_0062 if !intel => {}
        _ if !intel && amd_plain(number) => {
            cpu.state.msr.other.insert(number, value);
        }
        _ => return unknown(cpu, number, Some(value)),
    }
    Ok(())
}

/// Before the machine is asked to do something that depends on time.
fn bring_clock(cpu: &mut Cpu) {
    let icount = cpu.icount();
    cpu.env.at(icount);
    // What was asked for may have to be seen right after this instruction.
    cpu.stop_at = 0;
}

/// Moves this processor's TSC by `delta`: both the offset and IA32_TSC_ADJUST follow (SDM vol. 3B §17.17.3). A deadline
/// that is armed keeps its TSC value.
fn move_tsc(cpu: &mut Cpu, delta: u64) {
    let s = &mut cpu.state;
    s.tsc_offset = s.tsc_offset.wrapping_add(delta);
    s.msr.tsc_adjust = s.msr.tsc_adjust.wrapping_add(delta);
    let (deadline, offset) = (s.msr.tsc_deadline, s.tsc_offset);
    if deadline != 0 {
        bring_clock(cpu);
        cpu.env.set_tsc_deadline(deadline, offset);
    }
}

fn canonical_only(cpu: &Cpu, value: u64) -> Exec<u64> {
    if canonical_base(cpu, value) { Ok(value) } else { refuse() }
}

/// IA32_APIC_BASE: reserved bits, and the transitions of SDM vol. 3A §10.12.5.
fn write_apic_base(cpu: &mut Cpu, value: u64) -> Exec {
    let x2apic = cpu.model.offers(Feature::X2apic);
    let mut bits = base::BSP | base::ENABLE | 0xffff_ffff_ffff_f000 & !cpu.model.reserved_physical_bits();
    if x2apic {
        bits |= base::EXTD;
    }
    let old = cpu.state.msr.apic_base;
    let modes = base::ENABLE | base::EXTD;
    let legal = match (old & modes, value & modes) {
        (_, base::EXTD) => false,
        (0, n) => n != modes,
        // From x2APIC mode only to disabled.
        (o, base::ENABLE) if o == modes => false,
        _ => true,
    };
    if value & !bits != 0 || !legal {
        return refuse();
    }
    cpu.state.msr.apic_base = value;
    bring_clock(cpu);
    cpu.env.set_apic_base(value);
    Ok(())
}

/// IA32_EFER (SDM vol. 4 table 2-2; vol. 3A §9.8.5).
fn write_efer(cpu: &mut Cpu, value: u64) -> Exec {
    let has = |f| cpu.model.offers(f);
    let mut bits = efer::LMA;
    if has(Feature::Syscall) {
        bits |= efer::SCE;
    }
    if has(Feature::Lm) {
        bits |= efer::LME;
    }
    if has(Feature::Nx) {
        bits |= efer::NXE;
    }
    if has(Feature::FxsrOpt) {
        bits |= efer::FFXSR;
    }
    let old = cpu.state.efer;
    let changed = old ^ value;
    if value & !bits != 0 || cpu.state.cr0 & cr0::PG != 0 && changed & efer::LME != 0 {
        return refuse();
    }
    // LMA follows from LME and CR0.PG; what is written to it is ignored.
    cpu.state.efer = value & !efer::LMA | old & efer::LMA;
    if changed & efer::NXE != 0 {
        cpu.flush_tlb(true);
    }
    cpu.mode_changed();
    Ok(())
}

/// RDMSR.
pub(crate) fn rdmsr(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    privileged(cpu)?;
    let value = read(cpu, cpu.state.gpr[gpr::RCX] as u32)?;
    set_edx_eax(cpu, value);
    Ok(())
}

/// WRMSR.
pub(crate) fn wrmsr(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    privileged(cpu)?;
    let value = edx_eax(cpu);
    write(cpu, cpu.state.gpr[gpr::RCX] as u32, value)
}

/// CR4.TSD keeps RDTSC and RDTSCP to CPL 0.
fn tsc_allowed(cpu: &Cpu) -> Exec {
    if cpu.state.cr4 & cr4::TSD != 0 && cpu.cpl() != 0 { refuse() } else { Ok(()) }
}

/// RDTSC.
pub(crate) fn rdtsc(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    tsc_allowed(cpu)?;
    let value = tsc(cpu);
    set_edx_eax(cpu, value);
    Ok(())
}

/// RDTSCP.
pub(crate) fn rdtscp(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    tsc_allowed(cpu)?;
    let value = tsc(cpu);
    set_edx_eax(cpu, value);
    cpu.state.gpr[gpr::RCX] = cpu.state.msr.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// RDPID.
pub(crate) fn rdpid(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let value = cpu.state.msr.tsc_aux & 0xffff_ffff;
    write_gpr(cpu, insn.r0, 8, value);
    Ok(())
}

/// RDPMC: there are no counters.
pub(crate) fn rdpmc(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    let rip = cpu.state.rip;
    let counter = cpu.state.gpr[gpr::RCX] as u32;
    cpu.env
        .guest_error(rip, &format_args!("RDPMC of counter {counter:#x}: there are no performance counters"));
    refuse()
}
