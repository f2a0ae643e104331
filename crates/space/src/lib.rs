//! Regions, flat views, address spaces: the way of one guest access.
//!
//! A machine's memory and its ports are described by an acyclic graph of [`Region`]s: containers, RAM, ROM, devices'
//! registers, aliases. An [`AddressSpace`] is a root region together with its [`FlatView`]: the sorted list of ranges that
//! remains when priorities, holes and clipping have been worked out. The graph is changed inside of a [`transaction`]; at the end
//! of the outermost one each address space that the changes concern gets one new view, and its [`Listener`]s get the difference.
//! Who reads or writes never takes a lock.
//!
//! # The rules of the graph
//!
//! - A region is seen through its parent at its offset, and clipped to the parent's size.
//! - Where children of one parent overlap, the higher (signed) priority wins; among equals the one added last, and
//!   [`AddressSpace::overlaps`] reports the pair. Priorities of different parents are never compared.
//! - Where a container has no child it is a hole, through which its own lower siblings are seen. Any other region fills the
//!   places that its children leave.
//! - An alias shows a part of its target as if it were there, disabled children, priorities and all; the target's own place
//!   and priority don't matter.
//! - A disabled region is not there, nor anything below it.
//! - A reservation claims its range, and nothing answers there.
//!
//! ```
//! use hyaline_space::{AddressSpace, Origin, Outcome, Region};
//! let ram = hyaline_ram::RamBlock::new("pc.ram", 0x10000).unwrap();
//! let system = Region::container("system", 1 << 64);
//! system.add(0, &Region::ram("ram", ram, 0, 0x10000), 0).unwrap();
//! let space = AddressSpace::new("memory", &system);
//! assert_eq!(space.store(0x1234, 2, 0xbeef, &Origin::LOADER), Outcome::Ok);
//! assert_eq!(space.load(0x1234, 4, &Origin::LOADER), (0xbeef, Outcome::Ok));
//! assert_eq!(space.load(0x10000, 4, &Origin::LOADER), (0xffff_ffff, Outcome::Unassigned));
//! ```

mod access;
mod dispatch;
mod flatten;
mod graph;
mod iommu;
mod limits;
mod listener;
mod mtree;
mod overlap;
mod path;
mod range;
mod region;
mod space;
mod tree;
mod view;

pub use access::{Access, AccessError, Actor, DeviceId, ExitKind, Io, IoError, Observer, Origin, Outcome};
pub use graph::{Transaction, transaction};
pub use iommu::{Perm, Translate, Translation};
pub use limits::{Endian, Limits, NarrowWrite, Sizes};
pub use listener::{IoEventFd, Listener, ListenerId, Notify};
pub use mtree::{AliasOf, FlatLine, Mtree, MtreeNode};
pub use overlap::Overlap;
pub use path::{Hidden, Layer, Path, PathRange, Step, StepKind, Why};
pub use range::AddrRange;
pub use region::{Kind, Region, SpaceError};
pub use space::{AddressSpace, Cursor};
pub use view::{FlatView, HostRange, Section};
