//! Lazy arithmetic flags.
//!
//! Two words stand for the six flags. `result` is the last result, sign-extended to 64 bits: ZF is result == 0, SF its bit 63, PF the parity
//! of its low byte. `aux` has the carries and what deviates from that rule: bit 63 CF; bit 62 CF ^ OF (the carry into the top
//! bit); bit 61 inverts SF; bits 8-15 invert PF (as a byte that is xored to the result's); bit 3 AF.

use crate::cpu::Cpu;
use crate::mmu::Width;
use crate::state::flag;

pub(crate) const CARRY: u64 = 1 << 63;
const CARRY_IN: u64 = 1 << 62;
const SIGN: u64 = 1 << 61;
pub(crate) const ADJUST: u64 = 8;

/// `aux` of explicit CF, OF, AF.
#[inline(always)]
pub(crate) fn aux_of(cf: bool, of: bool, af: bool) -> u64 {
    u64::from(cf) << 63 | u64::from(cf ^ of) << 62 | u64::from(af) << 3
}

/// `aux` of a carry vector of width `T`: bit i is the carry (borrow) out of bit i.
#[inline(always)]
pub(crate) fn aux_of_carries<T: Width>(carries: u64) -> u64 {
    (carries << (64 - T::BITS)) & (CARRY | CARRY_IN) | carries & ADJUST
}

impl Cpu {
    #[inline(always)]
    pub(crate) fn set_lazy<T: Width>(&mut self, result: T, aux: u64) {
        self.lazy_result = result.sext();
        self.lazy_aux = aux;
    }
    #[inline(always)]
    pub(crate) fn cf(&self) -> bool {
        (self.lazy_aux as i64) < 0
    }
    #[inline(always)]
    pub(crate) fn zf(&self) -> bool {
        self.lazy_result == 0
    }
    #[inline(always)]
    pub(crate) fn of(&self) -> bool {
        ((self.lazy_aux ^ self.lazy_aux << 1) as i64) < 0
    }
    #[inline(always)]
    pub(crate) fn sf(&self) -> bool {
        ((self.lazy_result ^ self.lazy_aux << 2) as i64) < 0
    }
    #[inline(always)]
    pub(crate) fn pf(&self) -> bool {
        ((self.lazy_result ^ self.lazy_aux >> 8) as u8).count_ones() & 1 == 0
    }
    #[inline(always)]
    pub(crate) fn af(&self) -> bool {
        self.lazy_aux & ADJUST != 0
    }
    /// SF != OF.
    #[inline(always)]
    pub(crate) fn less(&self) -> bool {
        ((self.lazy_result ^ self.lazy_aux << 2 ^ self.lazy_aux ^ self.lazy_aux << 1) as i64) < 0
    }

    /// The six arithmetic flags as RFLAGS bits.
    pub(crate) fn arithmetic_flags(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.cf(), flag::CF)
            | bit(self.pf(), flag::PF)
            | bit(self.af(), flag::AF)
            | bit(self.zf(), flag::ZF)
            | bit(self.sf(), flag::SF)
            | bit(self.of(), flag::OF)
    }

    /// Brings the arithmetic flags in `state.rflags` up to date.
    pub(crate) fn materialize_flags(&mut self) {
        self.state.rflags = self.state.rflags & !flag::ARITH | self.arithmetic_flags();
    }

    /// Takes the arithmetic flags over from `state.rflags`.
    pub(crate) fn adopt_flags(&mut self) {
        self.set_flags(self.state.rflags);
    }

    /// Sets the six flags from RFLAGS bits.
    pub(crate) fn set_flags(&mut self, flags: u64) {
        let has = |bit: u64| flags & bit != 0;
        self.lazy_result = u64::from(!has(flag::ZF));
        // A result of 0 has even parity, 1 has odd.
        let invert = has(flag::PF) != has(flag::ZF);
        self.lazy_aux = aux_of(has(flag::CF), has(flag::OF), has(flag::AF))
            | if has(flag::SF) { SIGN } else { 0 }
            | u64::from(invert) << 8;
    }

    /// Replaces CF alone.
    #[inline(always)]
    pub(crate) fn set_cf(&mut self, cf: bool) {
        if cf != self.cf() {
            // OF is the difference of the two bits: both are flipped.
            self.lazy_aux ^= CARRY | CARRY_IN;
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_combination_survives() {
        use crate::state::flag;
        let bits = [flag::CF, flag::PF, flag::AF, flag::ZF, flag::SF, flag::OF];
        let mut cpu = crate::testing::cpu();
        for n in 0..64_u64 {
            let flags = bits.iter().enumerate().fold(0, |f, (i, b)| if n >> i & 1 != 0 { f | b } else { f });
            cpu.set_flags(flags);
            assert_eq!(cpu.arithmetic_flags(), flags);
            cpu.set_cf(n & 1 == 0);
            assert_eq!(cpu.arithmetic_flags(), flags ^ flag::CF);
        }
    }
}
