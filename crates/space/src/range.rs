//! Ranges of addresses that can reach the last address of all.

use serde::Serialize;
use std::fmt;

/// The addresses from `start` to `last`, both included, so that the whole 2^64 fit. Never empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct AddrRange {
    /// The first address.
    pub start: u64,
    /// The last address, at least `start`.
    pub last: u64,
}

impl AddrRange {
    /// The range of `size` bytes at `start`; none when the size is 0 or the end is beyond the last address.
    pub fn new(start: u64, size: u128) -> Option<AddrRange> {
        let last = u128::from(start).checked_add(size.checked_sub(1)?)?;
        Some(AddrRange { start, last: u64::try_from(last).ok()? })
    }

    /// The number of bytes, 1 to 2^64.
    pub fn size(&self) -> u128 {
        u128::from(self.last) - u128::from(self.start) + 1
    }

    /// Is `addr` inside?
    #[inline]
    pub fn contains(&self, addr: u64) -> bool {
        self.start <= addr && addr <= self.last
    }

    /// Do both ranges have an address in common?
    pub fn overlaps(&self, other: &AddrRange) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// What both ranges have in common.
    pub fn intersect(&self, other: &AddrRange) -> Option<AddrRange> {
        self.overlaps(other)
            .then(|| AddrRange { start: self.start.max(other.start), last: self.last.min(other.last) })
    }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last)
    }
}

impl fmt::Debug for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reaches_the_last_address() {
        let all = AddrRange::new(0, 1 << 64).expect("the whole space");
        assert_eq!((all.last, all.size()), (u64::MAX, 1 << 64));
        assert_eq!(AddrRange::new(0, 0), None);
        assert_eq!(AddrRange::new(1, 1 << 64), None);
        assert_eq!(AddrRange::new(u64::MAX, 1).map(|r| r.size()), Some(1));
        let a = AddrRange { start: 2, last: 5 };
        assert_eq!(a.intersect(&AddrRange { start: 5, last: 9 }), Some(AddrRange { start: 5, last: 5 }));
        assert_eq!(a.intersect(&AddrRange { start: 6, last: 9 }), None);
        assert!(a.contains(5) && !a.contains(6));
        assert_eq!(a.to_string(), "0x2..=0x5");
    }
}
