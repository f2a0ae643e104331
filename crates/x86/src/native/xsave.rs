//! FXSAVE, FXRSTOR and the XSAVE family (SDM vol. 1 §10.5 and chapter 13), on the guest's state.

use super::x87::{get_fxsave, put_fxsave};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::fault::{Exec, Fault};
use crate::state::{CpuState, Seg, X87, cr0, cr4, efer, gpr};
use iced_x86::Code;

/// One state component of XSAVE beyond the legacy region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Bit in XCR0.
    pub bit: u32,
    /// Offset in the standard format, bytes.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
    /// Starts at a multiple of 64 in the compacted format.
    pub align: bool,
}

/// The components that this processor saves, with the offsets of Intel's processors. CPUID leaf 0xd must say the same.
pub const COMPONENTS: [Component; 5] = [
    Component { bit: 2, offset: 576, size: 256, align: false },
    Component { bit: 5, offset: 1088, size: 64, align: false },
    Component { bit: 6, offset: 1152, size: 512, align: false },
    Component { bit: 7, offset: 1664, size: 1024, align: false },
    Component { bit: 9, offset: 2688, size: 8, align: false },
];

/// Bytes of the standard-format area for the components in `xcr0`.
pub fn area_size(xcr0: u64) -> u32 {
    let end = |c: &&Component| xcr0 >> c.bit & 1 != 0;
    COMPONENTS.iter().filter(end).map(|c| c.offset + c.size).max().unwrap_or(576)
}

/// Bytes of the compacted-format area for the components in `mask`.
pub fn compacted_size(mask: u64) -> u32 {
    let last = COMPONENTS.iter().rfind(|c| mask >> c.bit & 1 != 0);
    last.map_or(576, |last| compacted_offset(mask, last) + last.size)
}

fn compacted_offset(mask: u64, component: &Component) -> u32 {
    let mut at = 576_u32;
    for c in COMPONENTS.iter().filter(|c| mask >> c.bit & 1 != 0) {
        if c.align {
            at = at.next_multiple_of(64);
        }
        if c.bit == component.bit {
            break;
        }
        at += c.size;
    }
    at
}

/// MXCSR bits that may be set.
const MXCSR_MASK: u32 = 0xffff;
/// Bit 63 of XCOMP_BV: compacted format.
const COMPACTED: u64 = 1 << 63;
/// Largest area: legacy, header and all components in the standard format.
const MAX: usize = 2696;

/// The handlers of this file.
pub(super) fn handler(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => fxsave,
        Code::Fxrstor_m512byte | Code::Fxrstor64_m512byte => fxrstor,
        Code::Xsave_mem | Code::Xsave64_mem => xsave,
        Code::Xsaveopt_mem | Code::Xsaveopt64_mem => xsaveopt,
        Code::Xsavec_mem | Code::Xsavec64_mem => xsavec,
        Code::Xsaves_mem | Code::Xsaves64_mem => xsaves,
        Code::Xrstor_mem | Code::Xrstor64_mem => xrstor,
        Code::Xrstors_mem | Code::Xrstors64_mem => xrstors,
        Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32 => ldmxcsr,
        Code::Stmxcsr_m32 | Code::VEX_Vstmxcsr_m32 => stmxcsr,
        _ => return None,
    })
}

fn put64(image: &mut [u8], at: usize, value: u64) {
    if let Some(bytes) = image.get_mut(at..at + 8) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}
fn put32(image: &mut [u8], at: usize, value: u32) {
    if let Some(bytes) = image.get_mut(at..at + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}
fn get64(image: &[u8], at: usize) -> u64 {
    image.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}
fn get32(image: &[u8], at: usize) -> u32 {
    image.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// How many XMM, YMM or low ZMM registers the mode can reach.
fn reachable(cpu: &Cpu) -> usize {
    if cpu.in_64bit() { 16 } else { 8 }
}

/// Quadwords `quads` of the first `count` registers from `first`, packed.
fn put_vectors(
    state: &CpuState,
    image: &mut [u8],
    at: usize,
    first: usize,
    count: usize,
    quads: std::ops::Range<usize>,
) {
    let mut at = at;
    for register in state.vec.iter().skip(first).take(count) {
        for &quad in &register.0[quads.clone()] {
            put64(image, at, quad);
            at += 8;
        }
    }
}

/// The reverse of `put_vectors`; an empty image clears.
fn get_vectors(
    state: &mut CpuState,
    image: &[u8],
    at: usize,
    first: usize,
    count: usize,
    quads: std::ops::Range<usize>,
) {
    let mut at = at;
    for register in state.vec.iter_mut().skip(first).take(count) {
        for quad in &mut register.0[quads.clone()] {
            *quad = get64(image, at);
            at += 8;
        }
    }
}

fn is_64(insn: &Insn) -> bool {
    matches!(
        insn.code,
        Code::Fxsave64_m512byte
            | Code::Fxrstor64_m512byte
            | Code::Xsave64_mem
            | Code::Xsaveopt64_mem
            | Code::Xsavec64_mem
            | Code::Xsaves64_mem
            | Code::Xrstor64_mem
            | Code::Xrstors64_mem
    )
}

/// The operand's address, checked for alignment.
fn aligned(cpu: &mut Cpu, insn: &Insn, align: u64) -> Exec<(Seg, u64)> {
    let (seg, offset) = cpu.mem_addr(insn);
    if super::linear_of(cpu, seg, offset) & (align - 1) != 0 {
        // A segment violation comes first.
        cpu.linear(seg, offset, align, crate::mmu::Access::Read)?;
        return Err(Fault::gp(0));
    }
    Ok((seg, offset))
}

/// FXSAVE and FXRSTOR leave the XMM registers alone under EFER.FFXSR in 64-bit mode at CPL 0 (APM vol. 2 §3.1.7).
fn fast(cpu: &Cpu) -> bool {
    cpu.state.efer & efer::FFXSR != 0 && cpu.in_64bit() && cpu.cpl() == 0
}

fn fxsave(cpu: &mut Cpu, insn: &Insn) -> Exec {
    cpu.settle();
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Fault::nm());
    }
    let (seg, offset) = aligned(cpu, insn, 16)?;
    let mut image = [0; 416];
    put_fxsave(&cpu.state.x87, &mut image, is_64(insn));
    put32(&mut image, 24, cpu.state.mxcsr);
    put32(&mut image, 28, MXCSR_MASK);
    let count = reachable(cpu);
    put_vectors(&cpu.state, &mut image, 160, 0, count, 0..2);
    let end = if fast(cpu) { 160 } else { 160 + count * 16 };
    cpu.probe_write(seg, offset, end as u64)?;
    cpu.store_bytes(seg, offset, &image[..end])
}

fn fxrstor(cpu: &mut Cpu, insn: &Insn) -> Exec {
    cpu.settle();
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Fault::nm());
    }
    let (seg, offset) = aligned(cpu, insn, 16)?;
    let mut image = [0; 512];
    cpu.load_bytes(seg, offset, &mut image)?;
    let mxcsr = get32(&image, 24);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Fault::gp(0));
    }
    get_fxsave(&mut cpu.state.x87, &image, is_64(insn));
    cpu.state.mxcsr = mxcsr;
    if !fast(cpu) {
        let count = reachable(cpu);
        get_vectors(&mut cpu.state, &image, 160, 0, count, 0..2);
    }
    Ok(())
}

fn ldmxcsr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    cpu.settle_mxcsr();
    mxcsr_available(cpu, insn)?;
    let (seg, offset) = cpu.mem_addr(insn);
    let value = cpu.load::<u32>(seg, offset)?;
    if value & !MXCSR_MASK != 0 {
        return Err(Fault::gp(0));
    }
    cpu.state.mxcsr = value;
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, insn: &Insn) -> Exec {
    cpu.settle_mxcsr();
    mxcsr_available(cpu, insn)?;
    let (seg, offset) = cpu.mem_addr(insn);
    cpu.store::<u32>(seg, offset, cpu.state.mxcsr)
}

fn mxcsr_available(cpu: &Cpu, insn: &Insn) -> Exec {
    let vex = matches!(insn.code, Code::VEX_Vldmxcsr_m32 | Code::VEX_Vstmxcsr_m32);
    super::available(cpu, if vex { super::plan::Class::Vex } else { super::plan::Class::Sse })
}

/// Components that are not in their initial configuration (SDM vol. 1 §13.6).
fn in_use(cpu: &Cpu) -> u64 {
    let state = &cpu.state;
    let any = |first: usize, count: usize, quads: std::ops::Range<usize>| {
        state.vec.iter().skip(first).take(count).any(|v| v.0[quads.clone()].iter().any(|&q| q != 0))
    };
    let low = reachable(cpu);
    u64::from(state.x87 != X87::default())
        | u64::from(any(0, low, 0..2)) << 1
        | u64::from(any(0, low, 2..4)) << 2
        | u64::from(state.opmask.iter().any(|&k| k != 0)) << 5
        | u64::from(any(0, low, 4..8)) << 6
        | u64::from(cpu.in_64bit() && any(16, 16, 0..8)) << 7
        | u64::from(state.pkru != 0) << 9
}

/// Checks common to the family; gives the address and the requested-feature bitmap.
fn start(cpu: &mut Cpu, insn: &Insn, supervisor: bool) -> Exec<(Seg, u64, u64)> {
    cpu.settle();
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::ud());
    }
    if supervisor && cpu.cpl() != 0 {
        return Err(Fault::gp(0));
    }
    if cpu.state.cr0 & cr0::TS != 0 {
        return Err(Fault::nm());
    }
    let (seg, offset) = aligned(cpu, insn, 64)?;
    let asked = cpu.state.gpr[gpr::RAX] & 0xffff_ffff | cpu.state.gpr[gpr::RDX] << 32;
    let enabled = cpu.state.xcr0 | if supervisor { cpu.state.msr.xss } else { 0 };
    Ok((seg, offset, asked & enabled))
}

/// Bytes of one component at the start of `image`.
fn put_component(cpu: &Cpu, bit: u32, image: &mut [u8]) {
    let low = reachable(cpu);
    match bit {
        2 => put_vectors(&cpu.state, image, 0, 0, low, 2..4),
        5 => (0..8).for_each(|k| put64(image, k * 8, cpu.state.opmask[k])),
        6 => put_vectors(&cpu.state, image, 0, 0, low, 4..8),
        7 => put_vectors(&cpu.state, image, 0, 16, 16, 0..8),
        _ => put32(image, 0, cpu.state.pkru),
    }
}

/// How many bytes of a component the mode reaches: outside 64-bit mode the upper eight registers stay as they are.
fn reached(cpu: &Cpu, c: &Component) -> usize {
    let size = c.size as usize;
    match (cpu.in_64bit(), c.bit) {
        (false, 2 | 6) => size / 2,
        (false, 7) => 0,
        _ => size,
    }
}

/// Writes the components in `write`; `layout` is the compaction mask, or None for the standard format.
fn save(cpu: &mut Cpu, insn: &Insn, at: (Seg, u64), write: u64, mxcsr: bool, layout: Option<u64>) -> Exec {
    let (seg, offset) = at;
    let mut legacy = [0; 416];
    put_fxsave(&cpu.state.x87, &mut legacy, is_64(insn));
    put32(&mut legacy, 24, cpu.state.mxcsr);
    put32(&mut legacy, 28, MXCSR_MASK);
    let low = reachable(cpu);
    put_vectors(&cpu.state, &mut legacy, 160, 0, low, 0..2);
    let put = |cpu: &mut Cpu, from: usize, to: usize| {
        cpu.store_bytes(seg, offset.wrapping_add(from as u64), &legacy[from..to])
    };
    if write & 1 != 0 {
        put(cpu, 0, 24)?;
        put(cpu, 32, 160)?;
    }
    if mxcsr {
        put(cpu, 24, 32)?;
    }
    if write & 2 != 0 {
        put(cpu, 160, 160 + low * 16)?;
    }
    let mut image = [0; 1024];
    for c in COMPONENTS.iter().filter(|c| write >> c.bit & 1 != 0) {
        put_component(cpu, c.bit, &mut image);
        let place = layout.map_or(c.offset, |mask| compacted_offset(mask, c));
        let size = reached(cpu, c);
        cpu.store_bytes(seg, offset.wrapping_add(u64::from(place)), &image[..size])?;
    }
    Ok(())
}

fn xsave(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let (seg, offset, asked) = start(cpu, insn, false)?;
    let header = offset.wrapping_add(512);
    let old = cpu.load::<u64>(seg, header)?;
    cpu.probe_write(seg, header, 8)?;
    save(cpu, insn, (seg, offset), asked, asked & 6 != 0, None)?;
    cpu.store::<u64>(seg, header, old & !asked | in_use(cpu) & asked)
}

fn xsaveopt(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let (seg, offset, asked) = start(cpu, insn, false)?;
    let header = offset.wrapping_add(512);
    let old = cpu.load::<u64>(seg, header)?;
    cpu.probe_write(seg, header, 8)?;
    let used = in_use(cpu);
    save(cpu, insn, (seg, offset), asked & used, asked & 6 != 0, None)?;
    cpu.store::<u64>(seg, header, old & !asked | used & asked)
}

fn save_compacted(cpu: &mut Cpu, insn: &Insn, supervisor: bool) -> Exec {
    let (seg, offset, asked) = start(cpu, insn, supervisor)?;
    let header = offset.wrapping_add(512);
    cpu.probe_write(seg, header, 16)?;
    let mut used = in_use(cpu) & asked;
    if asked & 2 != 0 && cpu.state.mxcsr != 0x1f80 {
        used |= 2;
    }
    save(cpu, insn, (seg, offset), used, used & 2 != 0, Some(asked))?;
    cpu.store::<u64>(seg, header, used)?;
    cpu.store::<u64>(seg, header.wrapping_add(8), asked | COMPACTED)
}

fn xsavec(cpu: &mut Cpu, insn: &Insn) -> Exec {
    save_compacted(cpu, insn, false)
}

fn xsaves(cpu: &mut Cpu, insn: &Insn) -> Exec {
    save_compacted(cpu, insn, true)
}

fn restore(cpu: &mut Cpu, insn: &Insn, supervisor: bool) -> Exec {
    let (seg, offset, asked) = start(cpu, insn, supervisor)?;
    let mut image = [0; MAX];
    cpu.load_bytes(seg, offset.wrapping_add(512), &mut image[512..576])?;
    let (saved, format) = (get64(&image, 512), get64(&image, 520));
    let compacted = format & COMPACTED != 0;
    let enabled = cpu.state.xcr0 | if supervisor { cpu.state.msr.xss } else { 0 };
    let header_ok = if compacted {
        let mask = format & !COMPACTED;
        mask & !enabled == 0 && saved & !mask == 0 && image[528..576].iter().all(|&b| b == 0)
    } else {
        !supervisor && saved & !enabled == 0 && image[520..536].iter().all(|&b| b == 0)
    };
    if !header_ok {
        return Err(Fault::gp(0));
    }
    let load = asked & saved;
    let clear = asked & !saved;
    let get = |cpu: &mut Cpu, image: &mut [u8], from: usize, to: usize| {
        cpu.load_bytes(seg, offset.wrapping_add(from as u64), &mut image[from..to])
    };
    if load & 1 != 0 {
        get(cpu, &mut image, 0, 24)?;
        get(cpu, &mut image, 32, 160)?;
    }
    // The standard format restores MXCSR whenever SSE or AVX was asked for, saved or not (SDM vol. 1 §13.8.1).
    let from_memory = if compacted { load & 2 != 0 } else { asked & 6 != 0 };
    let mut mxcsr = if compacted && clear & 2 != 0 { 0x1f80 } else { cpu.state.mxcsr };
    if from_memory {
        get(cpu, &mut image, 24, 32)?;
        mxcsr = get32(&image, 24);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(Fault::gp(0));
        }
    }
    let low = reachable(cpu);
    if load & 2 != 0 {
        get(cpu, &mut image, 160, 160 + low * 16)?;
    }
    for c in COMPONENTS.iter().filter(|c| load >> c.bit & 1 != 0) {
        let place = if compacted { compacted_offset(format, c) } else { c.offset };
        // Gathered at its standard place, whatever the format.
        let (from, size) = (c.offset as usize, reached(cpu, c));
        cpu.load_bytes(seg, offset.wrapping_add(u64::from(place)), &mut image[from..from + size])?;
    }
    // Nothing faults from here on.
    if load & 1 != 0 {
        get_fxsave(&mut cpu.state.x87, &image, is_64(insn));
    } else if clear & 1 != 0 {
        cpu.state.x87 = X87::default();
    }
    cpu.state.mxcsr = mxcsr;
    if asked & 2 != 0 {
        let from = if load & 2 != 0 { &image[..] } else { &[] };
        get_vectors(&mut cpu.state, from, 160, 0, low, 0..2);
    }
    for c in COMPONENTS.iter().filter(|c| asked >> c.bit & 1 != 0) {
        let from = if load >> c.bit & 1 != 0 { &image[c.offset as usize..] } else { &[] };
        match c.bit {
            2 => get_vectors(&mut cpu.state, from, 0, 0, low, 2..4),
            5 => (0..8).for_each(|k| cpu.state.opmask[k] = get64(from, k * 8)),
            6 => get_vectors(&mut cpu.state, from, 0, 0, low, 4..8),
            7 if cpu.in_64bit() => get_vectors(&mut cpu.state, from, 0, 16, 16, 0..8),
            7 => {}
            _ => {
                cpu.state.pkru = get32(from, 0);
                cpu.mode_changed();
            }
        }
    }
    Ok(())
}

fn xrstor(cpu: &mut Cpu, insn: &Insn) -> Exec {
    restore(cpu, insn, false)
}

fn xrstors(cpu: &mut Cpu, insn: &Insn) -> Exec {
    restore(cpu, insn, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_manual() {
        assert_eq!(area_size(3), 576);
        assert_eq!(area_size(7), 832);
        assert_eq!(area_size(0x2e7), 2696);
        assert_eq!(compacted_size(7), 832);
        // AVX absent: opmask follows the header at once.
        assert_eq!(compacted_offset(0xe3, &COMPONENTS[1]), 576);
        assert_eq!(compacted_size(0xe7), 576 + 256 + 64 + 512 + 1024);
    }
}
