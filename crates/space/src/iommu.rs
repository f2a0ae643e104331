//! Regions whose accesses are translated into another address space.

use crate::{AddressSpace, Origin};

/// What a translation allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Perm {
    /// Nothing: the access is refused.
    None,
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both.
    ReadWrite,
}

impl Perm {
    /// Does it allow a write, or else a read?
    pub const fn allows(self, is_write: bool) -> bool {
        matches!((self, is_write), (Perm::ReadWrite, _) | (Perm::Read, false) | (Perm::Write, true))
    }
}

/// Where a translated access goes.
#[derive(Clone, Debug)]
pub struct Translation {
    /// The address space that it goes to.
    pub target: AddressSpace,
    /// The address in the target space of the page (of `mask` + 1 bytes) that was hit; low bits under the mask are ignored.
    pub addr: u64,
    /// The size of the page, less one: 0xfff for 4096 bytes. The access is cut at its end. Must be a power of two less one.
    pub mask: u64,
    /// What is allowed.
    pub perm: Perm,
}

/// An IOMMU's side of a region.
pub trait Translate: Send + Sync {
    /// Translates the offset `addr` of the region. To refuse, give a translation with [`Perm::None`].
    /// Translations may lead to further IOMMU regions, but not through more than 8; after that the access is refused.
    fn translate(&self, addr: u64, is_write: bool, who: &Origin) -> Translation;
}

/// How many IOMMU regions one access may pass. After that it is refused: two of them could point at each other.
pub(crate) const MAX_TRANSLATIONS: u8 = 8;
