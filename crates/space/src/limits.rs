//! Which access sizes a region takes and which its handler implements.

/// A range of access sizes, each 1, 2, 4 or 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// The smallest size in bytes.
    pub min: u8,
    /// The largest size in bytes.
    pub max: u8,
    /// Are accesses allowed at offsets that aren't a multiple of their size?
    pub unaligned: bool,
}

impl Sizes {
    /// Aligned accesses of `min` to `max` bytes.
    pub const fn aligned(min: u8, max: u8) -> Sizes {
        Sizes { min, max, unaligned: false }
    }

    /// Accesses of `min` to `max` bytes at any offset.
    pub const fn unaligned(min: u8, max: u8) -> Sizes {
        Sizes { min, max, unaligned: true }
    }

    /// The same with sizes that are powers of two from 1 to 8, min not above max.
    const fn normal(self) -> Sizes {
        let (min, max) = (pow2(self.min), pow2(self.max));
        Sizes { min: if min > max { max } else { min }, max, unaligned: self.unaligned }
    }
}

const fn pow2(size: u8) -> u8 {
    match size {
        0 | 1 => 1,
        2 | 3 => 2,
        4..=7 => 4,
        _ => 8,
    }
}

/// The order of bytes in a region's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Endian {
    /// The least significant byte has the lowest offset.
    #[default]
    Little,
    /// The most significant byte has the lowest offset.
    Big,
    /// As the guest's processor, which is little endian on x86.
    Native,
}

/// What becomes of the other bytes when a write is narrower than anything the handler implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum NarrowWrite {
    /// They are written as zero. No read, so no side effect of reading; for write-one-to-clear and command registers.
    #[default]
    ZeroFill,
    /// They are read and written back. For plain registers.
    Merge,
}

/// The sizes of accesses to an I/O region.
///
/// `valid` is the hardware's side: an access is first cut into pieces of at most `valid.max` bytes, naturally aligned unless
/// `valid.unaligned`; a piece below `valid.min` fails and never reaches the handler. `impl_` is the program's side: a valid piece
/// is put together from calls of the handler, each of `impl_.min` to `impl_.max` bytes and aligned unless `impl_.unaligned`. A
/// region's size should be a multiple of `impl_.min`: else a widened call at its end reaches beyond it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// What the guest may do.
    pub valid: Sizes,
    /// What the handler implements.
    pub impl_: Sizes,
    /// The order of bytes.
    pub endian: Endian,
    /// How writes narrower than `impl_.min` are made.
    pub narrow: NarrowWrite,
}

impl Limits {
    /// 1 to 4 bytes, aligned, little endian.
    pub const DEFAULT: Limits = Limits {
        valid: Sizes::aligned(1, 4),
        impl_: Sizes::aligned(1, 4),
        endian: Endian::Little,
        narrow: NarrowWrite::ZeroFill,
    };

    /// Accesses of `min` to `max` bytes, aligned, valid and implemented alike.
    pub const fn sizes(min: u8, max: u8) -> Limits {
        Limits { valid: Sizes::aligned(min, max), impl_: Sizes::aligned(min, max), ..Limits::DEFAULT }
    }

    /// The same with other sizes implemented.
    pub const fn implemented(self, min: u8, max: u8) -> Limits {
        Limits { impl_: Sizes::aligned(min, max), ..self }
    }

    /// The same with unaligned accesses valid (not: implemented).
    pub const fn with_unaligned(self) -> Limits {
        Limits { valid: Sizes { unaligned: true, ..self.valid }, ..self }
    }

    /// The same with another order of bytes.
    pub const fn with_endian(self, endian: Endian) -> Limits {
        Limits { endian, ..self }
    }

    /// The same with narrow writes merged into what is read.
    pub const fn with_merge(self) -> Limits {
        Limits { narrow: NarrowWrite::Merge, ..self }
    }

    /// The same with all sizes brought to 1, 2, 4 or 8, so that whatever a device declares can be computed with.
    pub(crate) const fn normal(self) -> Limits {
        Limits { valid: self.valid.normal(), impl_: self.impl_.normal(), ..self }
    }

    /// The sizes (1, 2, 4, 8 added up) of which an aligned access goes to the handler as it is.
    pub(crate) const fn straight(&self) -> u8 {
        if matches!(self.endian, Endian::Big) {
            return 0;
        }
        let mut sizes = 0;
        let mut size = 1;
        while size <= 8 {
            if size >= self.valid.min
                && size <= self.valid.max
                && size >= self.impl_.min
                && size <= self.impl_.max
            {
                sizes |= size;
            }
            size *= 2;
        }
        sizes
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_brought_into_order() {
        let odd =
            Limits { valid: Sizes::aligned(0, 255), impl_: Sizes::aligned(7, 3), ..Limits::DEFAULT }.normal();
        assert_eq!((odd.valid, odd.impl_), (Sizes::aligned(1, 8), Sizes::aligned(2, 2)));
        assert_eq!(Limits::DEFAULT.straight(), 1 | 2 | 4);
        assert_eq!(Limits::sizes(1, 8).implemented(2, 4).straight(), 2 | 4);
        assert_eq!(Limits::DEFAULT.with_endian(Endian::Big).straight(), 0);
    }
}
