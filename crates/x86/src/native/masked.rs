//! Instructions whose memory accesses depend on a mask: MASKMOVDQU and its kin, VMASKMOV, gathers, scatters, and EVEX
//! masked operands. Elements are accessed one by one, so that exactly the accessed ones can fault.

use super::plan::{Class, Mask, Plan};
use super::{Buffer, available};
use crate::cpu::Cpu;
use crate::decode::{Ea, Insn};
use crate::fault::{Exec, Fault};
use crate::state::{Seg, gpr};
use iced_x86::{Code, EncodingKind, Mnemonic, Register};

/// Reads element `n` of `size` bytes of a vector register.
fn element(cpu: &Cpu, register: usize, size: usize, n: usize) -> u64 {
    let byte = n * size;
    let quad = cpu.state.vec.get(register).and_then(|v| v.0.get(byte / 8)).copied().unwrap_or(0);
    let value = quad >> (byte % 8 * 8);
    if size == 8 { value } else { value & ((1 << (size * 8)) - 1) }
}

fn set_element(cpu: &mut Cpu, register: usize, size: usize, n: usize, value: u64) {
    let byte = n * size;
    if let Some(quad) = cpu.state.vec.get_mut(register).and_then(|v| v.0.get_mut(byte / 8)) {
        let shift = byte % 8 * 8;
        let mask = if size == 8 { !0 } else { ((1 << (size * 8)) - 1) << shift };
        *quad = *quad & !mask | value << shift & mask;
    }
}

/// Sign bit of an element.
fn sign(cpu: &Cpu, register: usize, size: usize, n: usize) -> bool {
    element(cpu, register, size, n) >> (size * 8 - 1) & 1 != 0
}

/// Clears a register above `bytes`, a multiple of 8.
fn clear_above(cpu: &mut Cpu, register: usize, bytes: usize) {
    if let Some(tail) = cpu.state.vec.get_mut(register).and_then(|v| v.0.get_mut(bytes / 8..)) {
        tail.fill(0);
    }
}

fn load(cpu: &mut Cpu, seg: Seg, offset: u64, size: usize) -> Exec<u64> {
    match size {
        1 => cpu.load::<u8>(seg, offset).map(u64::from),
        2 => cpu.load::<u16>(seg, offset).map(u64::from),
        4 => cpu.load::<u32>(seg, offset).map(u64::from),
        _ => cpu.load::<u64>(seg, offset),
    }
}

fn store(cpu: &mut Cpu, seg: Seg, offset: u64, size: usize, value: u64) -> Exec {
    match size {
        1 => cpu.store::<u8>(seg, offset, value as u8),
        2 => cpu.store::<u16>(seg, offset, value as u16),
        4 => cpu.store::<u32>(seg, offset, value as u32),
        _ => cpu.store::<u64>(seg, offset, value),
    }
}

/// Offset arithmetic in the instruction's address size.
fn truncate(insn: &Insn, offset: u64) -> u64 {
    match insn.asize {
        2 => offset & 0xffff,
        4 => offset & 0xffff_ffff,
        _ => offset,
    }
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: bytes whose mask byte has its top bit set go to `[rDI]`.
pub(super) fn mask_move(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let mmx = matches!(insn.code, Code::Maskmovq_rDI_mm_mm);
    let vex = matches!(insn.code, Code::VEX_Vmaskmovdqu_rDI_xmm_xmm);
    available(
        cpu,
        if mmx {
            Class::Mmx
        } else if vex {
            Class::Vex
        } else {
            Class::Sse
        },
    )?;
    if mmx {
        cpu.settle_x87();
        super::x87::check_pending(cpu)?;
    }
    // Operand 0 is the implicit memory operand.
    let (source, mask) = (usize::from(insn.r1), usize::from(insn.r2));
    let quad = |cpu: &Cpu, register: usize, n: usize| {
        if mmx { cpu.state.x87.significand[register & 7] } else { cpu.state.vec[register & 31].0[n & 7] }
    };
    let bytes = if mmx { 8 } else { 16 };
    let base = cpu.state.gpr[gpr::RDI];
    let chosen = (0..bytes).filter(|n| quad(cpu, mask, n / 8) >> (n % 8 * 8 + 7) & 1 != 0);
    let chosen = chosen.fold(0_u32, |bits, n| bits | 1 << n);
    for n in (0..bytes).filter(|n| chosen >> n & 1 != 0) {
        cpu.probe_write(insn.seg, truncate(insn, base.wrapping_add(n as u64)), 1)?;
    }
    for n in (0..bytes).filter(|n| chosen >> n & 1 != 0) {
        let value = quad(cpu, source, n / 8) >> (n % 8 * 8);
        cpu.store::<u8>(insn.seg, truncate(insn, base.wrapping_add(n as u64)), value as u8)?;
    }
    if mmx {
        super::enter_mmx(cpu, 0);
    }
    Ok(())
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q.
pub(super) fn mask_move_vex(cpu: &mut Cpu, insn: &Insn) -> Exec {
    available(cpu, Class::Vex)?;
    let size = match insn.iced(cpu.code_bits(), 0).mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => 4,
        _ => 8,
    };
    let bytes = match insn.code {
        Code::VEX_Vmaskmovps_xmm_xmm_m128
        | Code::VEX_Vmaskmovpd_xmm_xmm_m128
        | Code::VEX_Vpmaskmovd_xmm_xmm_m128
        | Code::VEX_Vpmaskmovq_xmm_xmm_m128
        | Code::VEX_Vmaskmovps_m128_xmm_xmm
        | Code::VEX_Vmaskmovpd_m128_xmm_xmm
        | Code::VEX_Vpmaskmovd_m128_xmm_xmm
        | Code::VEX_Vpmaskmovq_m128_xmm_xmm => 16,
        _ => 32,
    };
    let is_store = matches!(
        insn.code,
        Code::VEX_Vmaskmovps_m128_xmm_xmm
            | Code::VEX_Vmaskmovpd_m128_xmm_xmm
            | Code::VEX_Vpmaskmovd_m128_xmm_xmm
            | Code::VEX_Vpmaskmovq_m128_xmm_xmm
            | Code::VEX_Vmaskmovps_m256_ymm_ymm
            | Code::VEX_Vmaskmovpd_m256_ymm_ymm
            | Code::VEX_Vpmaskmovd_m256_ymm_ymm
            | Code::VEX_Vpmaskmovq_m256_ymm_ymm
    );
    let (seg, offset) = cpu.mem_addr(insn);
    let mask = usize::from(insn.r1);
    let at = |n: usize| truncate(insn, offset.wrapping_add((n * size) as u64));
    let count = bytes / size;
    if is_store {
        let source = usize::from(insn.r2);
        for n in 0..count {
            if sign(cpu, mask, size, n) {
                cpu.probe_write(seg, at(n), size as u64)?;
            }
        }
        for n in 0..count {
            if sign(cpu, mask, size, n) {
                let value = element(cpu, source, size, n);
                store(cpu, seg, at(n), size, value)?;
            }
        }
        return Ok(());
    }
    let mut values = [0; 8];
    for (n, value) in values.iter_mut().enumerate().take(count) {
        if sign(cpu, mask, size, n) {
            *value = load(cpu, seg, at(n), size)?;
        }
    }
    let target = usize::from(insn.r0);
    for (n, &value) in values.iter().enumerate().take(count) {
        set_element(cpu, target, size, n, value);
    }
    clear_above(cpu, target, bytes);
    Ok(())
}

/// Whether `gather_scatter` executes the code.
pub(super) fn is_gather_or_scatter(code: Code) -> bool {
    let name = format!("{:?}", code.mnemonic());
    (name.contains("gather") || name.contains("scatter"))
        && !name.contains("pf0")
        && !name.contains("pf1")
        && matches!(code.encoding(), EncodingKind::VEX | EncodingKind::EVEX)
}

/// Gathers and scatters (SDM vol. 2, VPGATHERDD and the like): elements complete from the lowest up; a fault leaves those
/// before it done and their mask bits clear, so the instruction can be restarted.
pub(super) fn gather_scatter(cpu: &mut Cpu, insn: &Insn) -> Exec {
    let evex = insn.code.encoding() == EncodingKind::EVEX;
    available(cpu, if evex { Class::Evex } else { Class::Vex })?;
    let i = insn.iced(cpu.code_bits(), 0);
    let scatter = format!("{:?}", i.mnemonic()).contains("scatter");
    let (data, index) = (if scatter { i.op_register(1) } else { i.op_register(0) }, i.memory_index());
    let size = match i.mnemonic() {
        Mnemonic::Vgatherdps
        | Mnemonic::Vgatherqps
        | Mnemonic::Vpgatherdd
        | Mnemonic::Vpgatherqd
        | Mnemonic::Vscatterdps
        | Mnemonic::Vscatterqps
        | Mnemonic::Vpscatterdd
        | Mnemonic::Vpscatterqd => 4,
        _ => 8,
    };
    let index_size = match i.mnemonic() {
        Mnemonic::Vgatherdps
        | Mnemonic::Vgatherdpd
        | Mnemonic::Vpgatherdd
        | Mnemonic::Vpgatherdq
        | Mnemonic::Vscatterdps
        | Mnemonic::Vscatterdpd
        | Mnemonic::Vpscatterdd
        | Mnemonic::Vpscatterdq => 4,
        _ => 8,
    };
    let mask = if evex { i.op_mask() } else { i.op_register(2) };
    let (data_n, index_n, mask_n) = (data.number(), index.number(), mask.number());
    let bad = if evex {
        mask == Register::None || mask == Register::K0 || !scatter && data_n == index_n
    } else {
        data_n == index_n || data_n == mask_n || index_n == mask_n
    };
    if bad {
        return Err(Fault::ud());
    }
    let count = (data.size() / size).min(index.size() / index_size);
    let base = match insn.ea {
        Ea::BaseIndex64 | Ea::BaseIndex32 | Ea::BaseIndex16 | Ea::Base64 | Ea::Base32 | Ea::Base16 => {
            cpu.state.gpr[usize::from(insn.base) & 15]
        }
        _ => 0,
    }
    .wrapping_add(insn.disp as u64);
    for n in 0..count {
        let wanted =
            if evex { cpu.state.opmask[mask_n & 7] >> n & 1 != 0 } else { sign(cpu, mask_n, size, n) };
        if wanted {
            let raw = element(cpu, index_n, index_size, n);
            let raw = if index_size == 4 { raw as i32 as u64 } else { raw };
            let offset = truncate(insn, base.wrapping_add(raw << insn.scale));
            if scatter {
                let value = element(cpu, data_n, size, n);
                store(cpu, insn.seg, offset, size, value)?;
            } else {
                let value = load(cpu, insn.seg, offset, size)?;
                set_element(cpu, data_n, size, n, value);
            }
        }
        if evex {
            cpu.state.opmask[mask_n & 7] &= !(1 << n);
        } else {
            set_element(cpu, mask_n, size, n, 0);
        }
    }
    if evex {
        cpu.state.opmask[mask_n & 7] = 0;
    } else {
        clear_above(cpu, mask_n, 0);
    }
    if !scatter {
        clear_above(cpu, data_n, count * size);
    }
    Ok(())
}

/// Bits of the mask that govern the memory operand, element by element.
fn wanted(cpu: &Cpu, plan: &Plan, mask: Mask) -> u64 {
    let bits = cpu.state.opmask[usize::from(mask.register) & 7];
    let count = (usize::from(plan.size) / usize::from(mask.element.max(1))).min(64);
    let all = if count == 64 { !0 } else { (1_u64 << count) - 1 };
    if mask.compressed {
        let n = (bits & all).count_ones();
        if n == 64 { !0 } else { (1 << n) - 1 }
    } else if count == 1 {
        // A broadcast element, or a scalar one: scalars are governed by bit 0, broadcasts are read when any bit is set.
        u64::from(if mask.broadcast { bits & mask.lanes != 0 } else { bits & 1 != 0 })
    } else {
        bits & all
    }
}

/// Loads an EVEX operand under its mask.
pub(super) fn load_masked(
    cpu: &mut Cpu,
    plan: &Plan,
    mask: Mask,
    at: (Seg, u64),
    buffer: &mut Buffer,
) -> Exec {
    let size = usize::from(plan.size);
    // The whole operand first: results may depend on elements that the mask keeps from the destination. Only when that
    // faults the mask decides which elements count, and the others read as zero.
    let cr2 = cpu.state.cr2;
    let Err(fault) = cpu.load_bytes(at.0, at.1, buffer.bytes(size)) else { return Ok(()) };
    if !mask.suppresses {
        return Err(fault);
    }
    cpu.state.cr2 = cr2;
    let bits = wanted(cpu, plan, mask);
    let element = usize::from(mask.element.max(1));
    buffer.bytes(size).fill(0);
    for n in (0..size / element).filter(|n| bits >> n & 1 != 0) {
        let to = buffer.0.get_mut(n * element..(n + 1) * element).unwrap_or_default();
        cpu.load_bytes(at.0, at.1.wrapping_add((n * element) as u64), to)?;
    }
    Ok(())
}

/// Checks that the elements to be stored can be.
pub(super) fn probe_masked(cpu: &mut Cpu, plan: &Plan, mask: Mask, at: (Seg, u64)) -> Exec {
    let bits = wanted(cpu, plan, mask);
    let element = u64::from(mask.element.max(1));
    for n in (0..u64::from(plan.size) / element).filter(|n| bits >> n & 1 != 0) {
        cpu.probe_write(at.0, at.1.wrapping_add(n * element), element)?;
    }
    Ok(())
}

/// Stores the elements under the mask.
pub(super) fn store_masked(cpu: &mut Cpu, plan: &Plan, mask: Mask, at: (Seg, u64), buffer: &Buffer) -> Exec {
    let bits = wanted(cpu, plan, mask);
    let element = usize::from(mask.element.max(1));
    for n in (0..usize::from(plan.size) / element).filter(|n| bits >> n & 1 != 0) {
        let from = buffer.0.get(n * element..(n + 1) * element).unwrap_or_default();
        cpu.store_bytes(at.0, at.1.wrapping_add((n * element) as u64), from)?;
    }
    Ok(())
}
