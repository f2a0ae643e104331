//! Who is told of changes of a view.

use crate::{AddrRange, Section};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A listener's number within its address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerId(pub(crate) u64);

/// Something that a guest's write can wake.
pub trait Notify: Send + Sync {
    /// Wakes it. Called by the dispatcher, when no accelerator did it without an exit.
    fn notify(&self);

    /// The eventfd behind it, which an accelerator can signal by itself; none: it only works through the dispatcher.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A write that wakes somebody instead of calling the device.
#[derive(Clone)]
pub struct IoEventFd {
    /// The offset in the region; in [`Listener`] calls the address in the space.
    pub addr: u64,
    /// The size of the write in bytes; 0: any.
    pub size: u8,
    /// The value that must be written; none: any.
    pub match_value: Option<u64>,
    /// Who is woken.
    pub notify: Arc<dyn Notify>,
}

impl IoEventFd {
    /// Does a write of `size` bytes of `value` at `addr` wake it?
    #[inline]
    pub fn matches(&self, addr: u64, size: u8, value: u64) -> bool {
        self.addr == addr
            && (self.size == 0 || self.size == size)
            && self.match_value.is_none_or(|want| want == value)
    }
}

impl PartialEq for IoEventFd {
    fn eq(&self, other: &IoEventFd) -> bool {
        (self.addr, self.size, self.match_value) == (other.addr, other.size, other.match_value)
            && Arc::ptr_eq(&self.notify, &other.notify)
    }
}

impl Eq for IoEventFd {}

impl fmt::Debug for IoEventFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoEventFd({:#x}, {} bytes, {:x?})", self.addr, self.size, self.match_value)
    }
}

/// Is told what changes in an address space: accelerators keep their memory slots by it.
///
/// At the end of a transaction that changed what can be reached in the space, and at registration with everything as new: `begin`, what went, what came, what
/// changed its log, `commit`. When the calls come, the space's view is the new one already. They come in the thread that ended
/// the transaction, with the graph locked: don't wait in them for a thread that may be changing the graph.
pub trait Listener: Send + Sync {
    /// The changes begin.
    fn begin(&self) {}

    /// A range is new.
    fn region_add(&self, section: &Section) {
        let _ = section;
    }

    /// A range is gone. All that went is told before anything that came.
    fn region_del(&self, section: &Section) {
        let _ = section;
    }

    /// Writes to the range shall be logged: the clients' bits were `old` and are `new`, which has a bit that `old` hasn't. Also told
    /// for a new range that logs.
    fn log_start(&self, section: &Section, old: u8, new: u8) {
        let _ = (section, old, new);
    }

    /// Some client needs no log of writes to the range any more: `new` lacks a bit that `old` has.
    fn log_stop(&self, section: &Section, old: u8, new: u8) {
        let _ = (section, old, new);
    }

    /// Somebody wants to look at the range's dirty bits: an accelerator brings its own into the block now
    /// (`RamBlock::mark_dirty`).
    fn log_sync(&self, section: &Section) {
        let _ = section;
    }

    /// An ioeventfd is new; its `addr` is the address in the space.
    fn ioeventfd_add(&self, section: &Section, event: &IoEventFd) {
        let _ = (section, event);
    }

    /// An ioeventfd is gone.
    fn ioeventfd_del(&self, section: &Section, event: &IoEventFd) {
        let _ = (section, event);
    }

    /// Writes to the range may be collected.
    fn coalesced_add(&self, section: &Section, range: AddrRange) {
        let _ = (section, range);
    }

    /// Writes to the range may no longer be collected.
    fn coalesced_del(&self, section: &Section, range: AddrRange) {
        let _ = (section, range);
    }

    /// The changes are complete.
    fn commit(&self) {}
}
