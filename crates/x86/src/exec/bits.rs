//! Bit tests, scans, counts, BMI1/2, CRC32.

use super::flags::{ADJUST, aux_of};
use crate::cpu::Cpu;
use crate::decode::{Insn, insn_flag};
use crate::fault::Exec;
use crate::mmu::Width;
use crate::state::flag;

/// BT (0), BTS (1), BTR (2), BTC (3): CF is the bit; the other flags stay.
pub(super) fn bt<const KIND: u8, const IMM: bool, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let index = if IMM { i.imm } else { cpu.reg::<T>(i.r1).sext() };
    let bit = index & u64::from(T::BITS - 1);
    let change = |a: T| {
        let a = a.u64();
        T::from_u64(match KIND {
            0 => a,
            1 => a | 1 << bit,
            2 => a & !(1 << bit),
            _ => a ^ 1 << bit,
        })
    };
    let a = if i.is_mem() {
        let (seg, mut off) = cpu.mem_addr(i);
        if !IMM {
            // The bit string reaches beyond the operand: by whole operands, in both directions.
            let words = (index as i64) >> T::BITS.trailing_zeros();
            off = off.wrapping_add((words as u64).wrapping_mul(T::SIZE));
            off &= match i.asize {
                8 => u64::MAX,
                4 => 0xffff_ffff,
                _ => 0xffff,
            };
        }
        if KIND == 0 {
            cpu.load::<T>(seg, off)?
        } else {
            cpu.update::<T, _>(seg, off, i.has(insn_flag::LOCK), |a| (change(a), a))?
        }
    } else {
        let a = cpu.reg::<T>(i.r0);
        if KIND != 0 {
            cpu.set_reg(i.r0, change(a));
        }
        a
    };
    cpu.set_cf(a.u64() >> bit & 1 != 0);
    Ok(())
}

/// The flags of BSF and BSR: ZF says that the source was 0. The others are undefined; recent AMD processors clear them, but for PF, which
/// is the result's, set when there is none.
fn scan_flags(cpu: &mut Cpu, index: Option<u32>) {
    cpu.lazy_result = u64::from(index.is_some());
    // A result of 1 has odd parity, one of 0 even.
    let even = index.is_none_or(|n| n.count_ones() & 1 == 0);
    cpu.lazy_aux = u64::from(index.is_some() && even) << 8;
}

/// BSF and BSR: a source of 0 leaves the destination alone.
pub(super) fn bsf<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.rm1::<T>(i)?.u64();
    if v != 0 {
        cpu.set_reg(i.r0, T::from_u64(v.trailing_zeros().into()));
    }
    scan_flags(cpu, (v != 0).then(|| v.trailing_zeros()));
    Ok(())
}
pub(super) fn bsr<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.rm1::<T>(i)?.u64();
    if v != 0 {
        cpu.set_reg(i.r0, T::from_u64(u64::from(63 - v.leading_zeros())));
    }
    scan_flags(cpu, (v != 0).then(|| 63 - v.leading_zeros()));
    Ok(())
}
/// CF and ZF of TZCNT and LZCNT; the others are undefined: recent AMD processors leave OF alone and clear the rest.
fn count_flags(cpu: &mut Cpu, cf: bool, zf: bool) {
    let of = cpu.of();
    cpu.lazy_result = u64::from(!zf);
    // A result of 1 has odd parity, one of 0 even: PF is inverted for the latter.
    cpu.lazy_aux = aux_of(cf, of, false) | u64::from(zf) << 8;
}
pub(super) fn tzcnt<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.rm1::<T>(i)?.u64();
    let n = v.trailing_zeros().min(T::BITS);
    cpu.set_reg(i.r0, T::from_u64(n.into()));
    count_flags(cpu, v == 0, n == 0);
    Ok(())
}
pub(super) fn lzcnt<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.rm1::<T>(i)?.u64();
    let n = v.leading_zeros() - (64 - T::BITS);
    cpu.set_reg(i.r0, T::from_u64(n.into()));
    count_flags(cpu, v == 0, n == 0);
    Ok(())
}
pub(super) fn popcnt<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let v = cpu.rm1::<T>(i)?.u64();
    cpu.set_reg(i.r0, T::from_u64(v.count_ones().into()));
    cpu.set_flags(if v == 0 { crate::state::flag::ZF } else { 0 });
    Ok(())
}

/// CRC32 (polynomial 0x11edc6f41, bit-reflected).
pub(super) fn crc32<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let data = cpu.rm1::<T>(i)?.u64();
    let mut crc = cpu.reg::<u32>(i.r0);
    for byte in data.to_le_bytes().iter().take(T::SIZE as usize) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    // A 64-bit destination has its upper half cleared too.
    cpu.set_reg(i.r0, u64::from(crc));
    Ok(())
}

/// Result, CF, OF = 0; SF and ZF by the result; AF and PF undefined: AF 0, PF by the result.
#[inline(always)]
fn logic<T: Width>(cpu: &mut Cpu, to: u8, r: u64, cf: bool) {
    let r = T::from_u64(r);
    cpu.set_reg(to, r);
    cpu.set_lazy(r, aux_of(cf, false, false));
}
pub(super) fn andn<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.rm2::<T>(i)?.u64();
    let a = cpu.reg::<T>(i.r1).u64();
    logic::<T>(cpu, i.r0, !a & b, false);
    Ok(())
}
pub(super) fn bextr<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?.u64();
    let control = cpu.reg::<T>(i.r2).u64();
    let (start, len) = ((control & 0xff) as u32, (control >> 8 & 0xff) as u32);
    let v = if start < T::BITS { a >> start } else { 0 };
    let v = if len < 64 { v & ((1 << len) - 1) } else { v };
    logic::<T>(cpu, i.r0, v, false);
    // AF and SF are undefined; recent AMD processors set the one and clear the other.
    let flags = cpu.arithmetic_flags();
    cpu.set_flags(flags & !flag::SF | flag::AF);
    Ok(())
}
pub(super) fn blsi<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?.u64();
    logic::<T>(cpu, i.r0, a & a.wrapping_neg(), a != 0);
    Ok(())
}
pub(super) fn blsmsk<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?.u64();
    logic::<T>(cpu, i.r0, a ^ a.wrapping_sub(1), a == 0);
    Ok(())
}
pub(super) fn blsr<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?.u64();
    logic::<T>(cpu, i.r0, a & a.wrapping_sub(1), a == 0);
    Ok(())
}
pub(super) fn bzhi<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?.u64();
    let n = cpu.reg::<T>(i.r2).u64() as u32 & 0xff;
    let r = if n < T::BITS { a & ((1 << n) - 1) } else { a };
    logic::<T>(cpu, i.r0, r, n > T::BITS - 1);
    Ok(())
}
pub(super) fn mulx<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let b = cpu.rm2::<T>(i)?.u64();
    let product = u128::from(cpu.reg::<T>(2).u64()) * u128::from(b);
    cpu.set_reg(i.r1, T::from_u64(product as u64));
    // When both destinations are one register it gets the high half.
    cpu.set_reg(i.r0, T::from_u64((product >> T::BITS) as u64));
    Ok(())
}
pub(super) fn pdep<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let mut mask = cpu.rm2::<T>(i)?.u64();
    let mut source = cpu.reg::<T>(i.r1).u64();
    let mut r = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & 1 != 0 {
            r |= lowest;
        }
        source >>= 1;
        mask &= mask - 1;
    }
    cpu.set_reg(i.r0, T::from_u64(r));
    Ok(())
}
pub(super) fn pext<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let mut mask = cpu.rm2::<T>(i)?.u64();
    let source = cpu.reg::<T>(i.r1).u64();
    let (mut r, mut n) = (0, 0);
    while mask != 0 {
        r |= (source >> mask.trailing_zeros() & 1) << n;
        n += 1;
        mask &= mask - 1;
    }
    cpu.set_reg(i.r0, T::from_u64(r));
    Ok(())
}
pub(super) fn rorx<T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?.u64();
    let n = i.imm as u32 & (T::BITS - 1);
    let r = if n == 0 { a } else { a >> n | a << (T::BITS - n) };
    cpu.set_reg(i.r0, T::from_u64(r));
    Ok(())
}
/// SARX (0), SHLX (1), SHRX (2).
pub(super) fn shiftx<const KIND: u8, T: Width>(cpu: &mut Cpu, i: &Insn) -> Exec {
    let a = cpu.rm1::<T>(i)?;
    let n = cpu.reg::<T>(i.r2).u64() as u32 & (T::BITS - 1);
    let r = match KIND {
        0 => (a.sext() as i64 >> n) as u64,
        1 => a.u64() << n,
        _ => a.u64() >> n,
    };
    cpu.set_reg(i.r0, T::from_u64(r));
    Ok(())
}

impl Cpu {
    /// Replaces CF and OF, nothing else.
    #[inline(always)]
    pub(super) fn set_cf_of(&mut self, cf: bool, of: bool) {
        let mask = 3 << 62;
        self.lazy_aux = self.lazy_aux & !mask | aux_of(cf, of, false);
    }
    /// Replaces ZF, nothing else.
    pub(super) fn set_zf(&mut self, zf: bool) {
        if zf != self.zf() {
            let flags = self.arithmetic_flags() ^ crate::state::flag::ZF;
            self.set_flags(flags);
        }
    }
    /// Replaces AF, nothing else.
    #[allow(dead_code)]
    pub(super) fn set_af(&mut self, af: bool) {
        self.lazy_aux = self.lazy_aux & !ADJUST | if af { ADJUST } else { 0 };
    }
}
