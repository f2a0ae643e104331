//! Control registers and the privileged odds and ends: CLTS, LMSW, INVLPG, HLT, XSETBV, SWAPGS, protection keys.
//!
//! Sources: SDM vol. 3A §2.5 (control registers), §4 (paging), vol. 2 (the instructions' pages); APM vol. 2 §3.1.

use super::cpuid::Feature;
use super::{canonical, canonical_base, long_mode, privileged, read_gpr, set_edx_eax, umip, write_gpr};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::state::{Activity, Seg, cr0, cr4, efer, gpr};
use iced_x86::Code;

/// MOV r, CRn.
pub(crate) fn mov_from_cr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let number = insn.r1;
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(Fault::ud());
    }
    privileged(cpu)?;
    let value = match number {
        0 => cpu.state.cr0,
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.state.cr4,
        _ => u64::from(cpu.env.cr8() & 0xf),
    };
    let size = if insn.code == Code::Mov_r64_cr { 8 } else { 4 };
    write_gpr(cpu, insn.r0, size, value);
    Ok(())
}

/// MOV CRn, r.
pub(crate) fn mov_to_cr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let number = insn.r0;
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(Fault::ud());
    }
    privileged(cpu)?;
    let mut value = read_gpr(cpu, insn.r1);
    if insn.code != Code::Mov_cr_r64 {
        value &= 0xffff_ffff;
    }
    match number {
        0 => write_cr0(cpu, value),
        2 => {
            cpu.state.cr2 = value;
            Ok(())
        }
        3 => mov_cr3(cpu, value),
        4 => write_cr4(cpu, value),
        _ => {
            if value & !0xf != 0 {
                return Err(Fault::gp(0));
            }
            cpu.env.set_cr8(value as u8);
            Ok(())
        }
    }
}

/// CR0 bits that exist; the others of the low half are ignored, of the upper half #GP.
const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// Writes CR0 with all checks (SDM vol. 2, MOV control registers; vol. 3A §9.8.5 for long mode).
pub(crate) fn write_cr0(cpu: &mut Cpu, value: u64) -> Exec {
    if value >> 32 != 0 {
        return Err(Fault::gp(0));
    }
    let value = value & CR0_BITS | cr0::ET;
    let old = cpu.state.cr0;
    let changed = old ^ value;
    if value & cr0::PG != 0 && value & cr0::PE == 0 || value & cr0::NW != 0 && value & cr0::CD == 0 {
        return Err(Fault::gp(0));
    }
    let pae = cpu.state.cr4 & cr4::PAE != 0;
    let mut lma = long_mode(cpu);
    if changed & cr0::PG != 0 {
        if value & cr0::PG != 0 {
            if cpu.state.efer & efer::LME != 0 {
                let tss16 = matches!(cpu.state.tr.kind(), 1 | 3) && !cpu.state.tr.unusable;
                if !pae || cpu.state.seg[Seg::Cs as usize].long() || tss16 {
                    return Err(Fault::gp(0));
                }
                lma = true;
            }
        } else {
            if cpu.in_64bit() || cpu.state.cr4 & cr4::PCIDE != 0 {
                return Err(Fault::gp(0));
            }
            lma = false;
        }
    }
    let reload = cr0::PG | cr0::CD | cr0::NW;
    if value & cr0::PG != 0 && pae && !lma && changed & reload != 0 {
        let cr3 = cpu.state.cr3;
        cpu.state.pdpte = read_pdptes(cpu, cr3)?;
    }
    cpu.state.cr0 = value;
    if lma {
        cpu.state.efer |= efer::LMA;
    } else {
        cpu.state.efer &= !efer::LMA;
    }
    if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        cpu.flush_tlb(true);
    }
    cpu.mode_changed();
    Ok(())
}

/// Reads the four PDPTEs of PAE paging and checks their reserved bits (SDM vol. 3A §4.4.1).
fn read_pdptes(cpu: &mut Cpu, cr3: u64) -> Exec<[u64; 4]> {
    let mut entries = [0; 4];
    let reserved = cpu.model.reserved_physical_bits() | 0x1e6;
    for (i, entry) in entries.iter_mut().enumerate() {
        *entry = cpu.table_load((cr3 & 0xffff_ffe0) + 8 * i as u64, true);
        if *entry & 1 != 0 && *entry & reserved != 0 {
            return Err(Fault::gp(0));
        }
    }
    Ok(entries)
}

/// MOV CR3: bit 63 with PCIDs keeps the new PCID's translations (SDM vol. 3A §4.10.4.1).
fn mov_cr3(cpu: &mut Cpu, value: u64) -> Exec {
    let pcide = cpu.state.cr4 & cr4::PCIDE != 0;
    let keep = pcide && value >> 63 != 0;
    let value = if pcide { value & !(1 << 63) } else { value };
    if value & cpu.model.reserved_physical_bits() != 0 {
        return Err(Fault::gp(0));
    }
    if keep {
        cpu.state.cr3 = value;
        cpu.mode_changed();
        return Ok(());
    }
    load_cr3(cpu, value)
}

/// Loads CR3 and drops what it must; also for task switches.
pub(crate) fn load_cr3(cpu: &mut Cpu, value: u64) -> Exec {
    let paging = cpu.state.cr0 & cr0::PG != 0;
    if paging && cpu.state.cr4 & cr4::PAE != 0 && !long_mode(cpu) {
        cpu.state.pdpte = read_pdptes(cpu, value)?;
    }
    cpu.state.cr3 = value;
    if cpu.state.cr4 & cr4::PCIDE != 0 {
        cpu.flush_pcid((value & 0xfff) as u16);
        cpu.mode_changed();
    } else {
        cpu.flush_tlb(false);
    }
    Ok(())
}

/// CR4 bits that the model has.
pub(crate) fn cr4_bits(cpu: &Cpu) -> u64 {
    let mut bits = 0;
    let table = [
        (Feature::Vme, cr4::VME | cr4::PVI),
        (Feature::Tsc, cr4::TSD),
        (Feature::De, cr4::DE),
        (Feature::Pse, cr4::PSE),
        (Feature::Pae, cr4::PAE),
        (Feature::Mce, cr4::MCE),
        (Feature::Pge, cr4::PGE),
        (Feature::Fxsr, cr4::OSFXSR),
        (Feature::Sse, cr4::OSXMMEXCPT),
        (Feature::Umip, cr4::UMIP),
        (Feature::La57, cr4::LA57),
        (Feature::Fsgsbase, cr4::FSGSBASE),
        (Feature::Pcid, cr4::PCIDE),
        (Feature::Xsave, cr4::OSXSAVE),
        (Feature::Smep, cr4::SMEP),
        (Feature::Smap, cr4::SMAP),
        (Feature::Pku, cr4::PKE),
    ];
    for (feature, bit) in table {
        if cpu.model.offers(feature) {
            bits |= bit;
        }
    }
    // Performance counters are read through CR4.PCE even where there are none to read.
    bits | cr4::PCE
}

/// Writes CR4 with all checks (SDM vol. 2, MOV control registers; vol. 3A §2.5).
pub(crate) fn write_cr4(cpu: &mut Cpu, value: u64) -> Exec {
    if value & !cr4_bits(cpu) != 0 {
        return Err(Fault::gp(0));
    }
    let old = cpu.state.cr4;
    let changed = old ^ value;
    let long = long_mode(cpu);
    if long && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0) {
        return Err(Fault::gp(0));
    }
    if changed & value & cr4::PCIDE != 0 && (!long || cpu.state.cr3 & 0xfff != 0) {
        return Err(Fault::gp(0));
    }
    let reload = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP;
    if cpu.state.cr0 & cr0::PG != 0 && !long && value & cr4::PAE != 0 && changed & reload != 0 {
        let cr3 = cpu.state.cr3;
        cpu.state.pdpte = read_pdptes(cpu, cr3)?;
    }
    cpu.state.cr4 = value;
    let flush = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::LA57 | cr4::PCIDE;
    if changed & flush != 0 {
        cpu.flush_tlb(true);
    }
    cpu.mode_changed();
    Ok(())
}

/// LMSW: the low four bits of CR0; PE can be set but not cleared.
pub(crate) fn lmsw(cpu: &mut Cpu, insn: &Insn) -> Exec {
    privileged(cpu)?;
    let value = u64::from(super::read_rm16(cpu, insn, insn.r0)?);
    let keep = cpu.state.cr0 & cr0::PE;
    write_cr0(cpu, cpu.state.cr0 & !0xf | value & 0xf | keep)
}

/// SMSW.
pub(crate) fn smsw(cpu: &mut Cpu, insn: &Insn) -> Exec {
    umip(cpu)?;
    let value = cpu.state.cr0;
    if insn.is_mem() {
        let (seg, at) = cpu.mem_addr(insn);
        cpu.store::<u16>(seg, at, value as u16)
    } else {
        write_gpr(cpu, insn.r0, insn.osize, value);
        Ok(())
    }
}

/// CLTS.
pub(crate) fn clts(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    privileged(cpu)?;
    cpu.state.cr0 &= !cr0::TS;
    cpu.mode_changed();
    Ok(())
}

/// INVLPG.
pub(crate) fn invlpg(cpu: &mut Cpu, insn: &Insn) -> Exec {
    privileged(cpu)?;
    let (seg, at) = cpu.mem_addr(insn);
    // No segment check is made, and a non-canonical address is a no-op (SDM vol. 2, INVLPG).
    let linear = match seg {
        _ if !cpu.in_64bit() => cpu.state.seg[seg as usize].base.wrapping_add(at) & 0xffff_ffff,
        Seg::Fs | Seg::Gs => cpu.state.seg[seg as usize].base.wrapping_add(at),
        _ => at,
    };
    if canonical(cpu, linear) {
        cpu.invlpg(linear);
    }
    Ok(())
}

/// INVPCID.
pub(crate) fn invpcid(cpu: &mut Cpu, insn: &Insn) -> Exec {
    if !cpu.protected() {
        // Real mode has no PCIDs but the instruction exists there.
    } else if cpu.v86() {
        return Err(Fault::gp(0));
    }
    privileged(cpu)?;
    let kind = read_gpr(cpu, insn.r0);
    let kind = if cpu.in_64bit() { kind } else { kind & 0xffff_ffff };
    let (seg, at) = cpu.mem_addr(insn);
    let mut bytes = [0; 16];
    cpu.load_bytes(seg, at, &mut bytes)?;
    let value = u128::from_le_bytes(bytes);
    let (low, linear) = (value as u64, (value >> 64) as u64);
    let pcid = (low & 0xfff) as u16;
    let pcide = cpu.state.cr4 & cr4::PCIDE != 0;
    if kind > 3 || kind < 2 && (low >> 12 != 0 || pcid != 0 && !pcide) {
        return Err(Fault::gp(0));
    }
    match kind {
        0 => {
            if !canonical(cpu, linear) {
                return Err(Fault::gp(0));
            }
            cpu.invlpg(linear);
        }
        1 => cpu.flush_pcid(pcid),
        2 => cpu.flush_tlb(true),
        // All contexts, except global translations.
        _ => cpu.flush_tlb(false),
    }
    Ok(())
}

/// INVD, WBINVD, WBNOINVD: there are no caches to write back.
pub(crate) fn wbinvd(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    privileged(cpu)
}

/// HLT: the run loop sees the activity after the instruction is done.
pub(crate) fn hlt(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    privileged(cpu)?;
    cpu.state.activity = Activity::Halted;
    Ok(())
}

/// MONITOR: checks its address; the monitor itself is never armed for longer than one instruction.
pub(crate) fn monitor(cpu: &mut Cpu, insn: &Insn) -> Exec {
    if cpu.cpl() != 0 {
        return Err(Fault::ud());
    }
    if cpu.state.gpr[gpr::RCX] & 0xffff_ffff != 0 {
        return Err(Fault::gp(0));
    }
    let mask = if insn.asize == 8 { u64::MAX } else { (1 << (8 * insn.asize)) - 1 };
    let at = cpu.state.gpr[gpr::RAX] & mask;
    cpu.load::<u8>(insn.seg, at)?;
    Ok(())
}

/// MWAIT: wakes at once, which the manual allows at any time (SDM vol. 2, MWAIT: "false wakeups"). Waiting would need
/// to see stores of other processors and devices.
pub(crate) fn mwait(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if cpu.cpl() != 0 {
        return Err(Fault::ud());
    }
    if cpu.state.gpr[gpr::RCX] & 0xffff_ffff & !1 != 0 {
        return Err(Fault::gp(0));
    }
    Ok(())
}

/// CPUID.
pub(crate) fn cpuid(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    let leaf = cpu.state.gpr[gpr::RAX] as u32;
    let subleaf = cpu.state.gpr[gpr::RCX] as u32;
    let [a, b, c, d] = cpu.model.clone().cpuid(leaf, subleaf, &super::cpuid::Dynamic::of(cpu));
    cpu.state.gpr[gpr::RAX] = u64::from(a);
    cpu.state.gpr[gpr::RBX] = u64::from(b);
    cpu.state.gpr[gpr::RCX] = u64::from(c);
    cpu.state.gpr[gpr::RDX] = u64::from(d);
    Ok(())
}

/// XGETBV.
pub(crate) fn xgetbv(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::ud());
    }
    let value = match cpu.state.gpr[gpr::RCX] as u32 {
        0 => cpu.state.xcr0,
        // XINUSE: reporting every enabled component as in use is allowed (SDM vol. 1 §13.6).
        1 if cpu.model.offers(Feature::Xgetbv1) => cpu.state.xcr0,
        _ => return Err(Fault::gp(0)),
    };
    set_edx_eax(cpu, value);
    Ok(())
}

/// XSETBV (SDM vol. 2; vol. 1 §13.3 for the rules between components).
pub(crate) fn xsetbv(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::ud());
    }
    privileged(cpu)?;
    if cpu.state.gpr[gpr::RCX] as u32 != 0 {
        return Err(Fault::gp(0));
    }
    let value = super::edx_eax(cpu);
    if !valid_xcr0(value, cpu.model.xcr0_mask()) {
        return Err(Fault::gp(0));
    }
    cpu.state.xcr0 = value;
    cpu.mode_changed();
    Ok(())
}

/// Whether XCR0 may take `value` on a processor whose components are `supported`.
pub(crate) fn valid_xcr0(value: u64, supported: u64) -> bool {
    let (avx, avx512) = (value & 4 != 0, value & 0xe0);
    value & 1 != 0
        && value & !supported == 0
        && (!avx || value & 2 != 0)
        && (avx512 == 0 || avx512 == 0xe0 && avx)
}

/// RDPKRU.
pub(crate) fn rdpkru(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if cpu.state.cr4 & cr4::PKE == 0 {
        return Err(Fault::ud());
    }
    if cpu.state.gpr[gpr::RCX] as u32 != 0 {
        return Err(Fault::gp(0));
    }
    set_edx_eax(cpu, u64::from(cpu.state.pkru));
    Ok(())
}

/// WRPKRU.
pub(crate) fn wrpkru(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    if cpu.state.cr4 & cr4::PKE == 0 {
        return Err(Fault::ud());
    }
    if cpu.state.gpr[gpr::RCX] as u32 != 0 || cpu.state.gpr[gpr::RDX] as u32 != 0 {
        return Err(Fault::gp(0));
    }
    let value = cpu.state.gpr[gpr::RAX] as u32;
    if value != cpu.state.pkru {
        cpu.state.pkru = value;
        cpu.flush_tlb(true);
    }
    Ok(())
}

/// SWAPGS (64-bit mode only: elsewhere it doesn't decode).
pub(crate) fn swapgs(cpu: &mut Cpu, _insn: &Insn) -> Exec {
    privileged(cpu)?;
    let gs = &mut cpu.state.seg[Seg::Gs as usize];
    std::mem::swap(&mut gs.base, &mut cpu.state.msr.kernel_gs_base);
    cpu.seg_changed(Seg::Gs);
    Ok(())
}

fn base_allowed(cpu: &Cpu) -> Exec {
    if cpu.state.cr4 & cr4::FSGSBASE == 0 || !cpu.in_64bit() { Err(Fault::ud()) } else { Ok(()) }
}

fn read_base(cpu: &mut Cpu, insn: &Insn, seg: Seg) -> Exec {
    base_allowed(cpu)?;
    let value = cpu.state.seg[seg as usize].base;
    write_gpr(cpu, insn.r0, insn.osize, value);
    Ok(())
}

fn write_base(cpu: &mut Cpu, insn: &Insn, seg: Seg) -> Exec {
    base_allowed(cpu)?;
    let value = read_gpr(cpu, insn.r0);
    let value = if insn.osize == 8 { value } else { value & 0xffff_ffff };
    if !canonical_base(cpu, value) {
        return Err(Fault::gp(0));
    }
    cpu.state.seg[seg as usize].base = value;
    cpu.seg_changed(seg);
    Ok(())
}

/// RDFSBASE.
pub(crate) fn rdfsbase(cpu: &mut Cpu, insn: &Insn) -> Exec {
    read_base(cpu, insn, Seg::Fs)
}
/// RDGSBASE.
pub(crate) fn rdgsbase(cpu: &mut Cpu, insn: &Insn) -> Exec {
    read_base(cpu, insn, Seg::Gs)
}
/// WRFSBASE.
pub(crate) fn wrfsbase(cpu: &mut Cpu, insn: &Insn) -> Exec {
    write_base(cpu, insn, Seg::Fs)
}
/// WRGSBASE.
pub(crate) fn wrgsbase(cpu: &mut Cpu, insn: &Insn) -> Exec {
    write_base(cpu, insn, Seg::Gs)
}
