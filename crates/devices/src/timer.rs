//! Timers and clocks.

pub mod hpet;
pub mod i8254;
pub mod mc146818;

use hyaline_device::Ns;

/// The PC's 14.31818 MHz crystal is 315/22 MHz exactly (four times the NTSC colour carrier). Its clocks count in these units: `num` ticks in
/// `den` nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    num: u64,
    den: u64,
}

/// The 8254's clock: the crystal divided by 12, 1.193182 MHz.
pub(crate) const PIT: Rate = Rate { num: 105, den: 88_000 };
/// The ACPI power-management timer's clock: the crystal divided by 4, 3.579545 MHz.
pub(crate) const PM: Rate = Rate { num: 315, den: 88_000 };

impl Rate {
    /// Whole ticks by `now`.
    pub(crate) fn ticks(self, now: Ns) -> u64 {
        (u128::from(now) * u128::from(self.num) / u128::from(self.den)) as u64
    }
    /// When tick number `tick` begins: the first nanosecond at which [`Rate::ticks`] gives it.
    pub(crate) fn time(self, tick: u64) -> Ns {
        let ns = (u128::from(tick) * u128::from(self.den)).div_ceil(u128::from(self.num));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_times_agree() {
        for rate in [PIT, PM] {
            for t in [0, 1, 2, 3, 12_345, 1_193_182, u64::from(u32::MAX) * 1000] {
                let ns = rate.time(t);
                assert_eq!(rate.ticks(ns), t);
                assert!(ns == 0 || rate.ticks(ns - 1) < t);
            }
        }
        assert_eq!(PIT.ticks(1_000_000_000), 1_193_181);
        assert_eq!(PM.ticks(1_000_000_000), 3_579_545);
    }
}
