//! Dirty tracking: who asked for which pages were written.

use crate::{Bitmap, PAGE_SIZE};
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Somebody who wants to know which pages were written. Each client has its own bits, so that one client's
/// clearing does not lose another one's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum DirtyClient {
    /// Saving or moving the machine.
    Migration = 1,
    /// The software CPU: pages that hold predecoded or translated code.
    Code = 2,
    /// A display that repaints what changed.
    Vga = 4,
    /// Who compares the memory of two machines at intervals. The software CPU writes without asking while this client logs: a page counts as
    /// written when a translation for writes is made, so that translations are to be dropped after each look.
    Compare = 8,
}

impl DirtyClient {
    /// The saving client's bit, as [`DirtyClient::bit`] gives it.
    pub const MIGRATION: u8 = 1;
    /// The software CPU's bit.
    pub const CODE: u8 = 2;
    /// The display's bit.
    pub const VGA: u8 = 4;
    /// The comparing client's bit.
    pub const COMPARE: u8 = 8;
    /// All clients, in the order of their bits.
    pub const ALL: [DirtyClient; 4] =
        [DirtyClient::Migration, DirtyClient::Code, DirtyClient::Vga, DirtyClient::Compare];

    /// The client's bit in a mask: 1, 2, 4 or 8.
    pub const fn bit(self) -> u8 {
        self as u8
    }

    /// The client's name: `migration`, `code`, `vga` or `compare`.
    pub const fn as_str(self) -> &'static str {
        match self {
            DirtyClient::Migration => "migration",
            DirtyClient::Code => "code",
            DirtyClient::Vga => "vga",
            DirtyClient::Compare => "compare",
        }
    }

    fn index(self) -> usize {
        (self as u8).trailing_zeros() as usize
    }
}

/// The dirty bits of one block: a bit per page and client.
pub(crate) struct DirtyLog {
    /// Which clients are logging now.
    logging: AtomicU8,
    /// Which clients have at least one dirty page since their last look.
    pending: AtomicU8,
    pages: u64,
    words: [Box<[AtomicU64]>; 4],
}

impl DirtyLog {
    pub(crate) fn new(bytes: u64) -> DirtyLog {
        let pages = bytes.div_ceil(PAGE_SIZE);
        let words = || (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        DirtyLog {
            logging: AtomicU8::new(0),
            pending: AtomicU8::new(0),
            pages,
            words: [words(), words(), words(), words()],
        }
    }

    pub(crate) fn set_logging(&self, client: DirtyClient, on: bool) {
        if on {
            self.logging.fetch_or(client.bit(), Ordering::SeqCst);
        } else {
            self.logging.fetch_and(!client.bit(), Ordering::SeqCst);
        }
    }

    pub(crate) fn logging(&self) -> u8 {
        self.logging.load(Ordering::Relaxed)
    }

    pub(crate) fn pending(&self, client: DirtyClient) -> bool {
        self.pending.load(Ordering::Acquire) & client.bit() != 0
    }

    /// Marks the pages of `off..off + len` for every client that is logging. One load when nobody is.
    #[inline]
    pub(crate) fn mark(&self, off: u64, len: u64) {
        let clients = self.logging();
        if clients != 0 {
            self.mark_for(clients, off, len);
        }
    }

    #[cold]
    pub(crate) fn mark_for(&self, clients: u8, off: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = off / PAGE_SIZE;
        let last = (off.saturating_add(len - 1) / PAGE_SIZE).min(self.pages.saturating_sub(1));
        if first > last || self.pages == 0 {
            return;
        }
        for client in DirtyClient::ALL.into_iter().filter(|c| clients & c.bit() != 0) {
            for word in first / 64..=last / 64 {
                let mask = word_mask(word, first, last);
                if let Some(bits) = self.words[client.index()].get(word as usize) {
                    // Always a locked instruction, though the page may be marked already: it keeps the order of the bytes that were
                    // stored and this bit. Without it the bit could be seen set, be cleared by a snapshot, and the store come
                    // after the snapshot's look at the page.
                    bits.fetch_or(mask, Ordering::SeqCst);
                }
            }
        }
        if self.pending.load(Ordering::SeqCst) & clients != clients {
            self.pending.fetch_or(clients, Ordering::SeqCst);
        }
    }

    pub(crate) fn snapshot_and_clear(&self, client: DirtyClient, range: Range<u64>) -> Bitmap {
        let end = range.end.min(self.pages.saturating_mul(PAGE_SIZE));
        if range.start >= end {
            return Bitmap::new(range.start / PAGE_SIZE, 0);
        }
        let (first, last) = (range.start / PAGE_SIZE, (end - 1) / PAGE_SIZE);
        let mut map = Bitmap::new(first, last - first + 1);
        if first == 0 && last + 1 == self.pages {
            // Cleared before the words are read: a page marked in between sets it again.
            self.pending.fetch_and(!client.bit(), Ordering::SeqCst);
        }
        for word in first / 64..=last / 64 {
            let mask = word_mask(word, first, last);
            let Some(bits) = self.words[client.index()].get(word as usize) else { break };
            if bits.load(Ordering::SeqCst) & mask == 0 {
                continue;
            }
            let mut dirty = bits.fetch_and(!mask, Ordering::SeqCst) & mask;
            while dirty != 0 {
                map.insert(word * 64 + u64::from(dirty.trailing_zeros()));
                dirty &= dirty - 1;
            }
        }
        map
    }
}

/// The bits of word number `word` which stand for pages `first..=last`.
fn word_mask(word: u64, first: u64, last: u64) -> u64 {
    let low = first.max(word * 64) - word * 64;
    let high = last.min(word * 64 + 63) - word * 64;
    (u64::MAX << low) & (u64::MAX >> (63 - high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_only_for_clients_that_log() {
        let log = DirtyLog::new(200 * PAGE_SIZE);
        log.mark(0, 100);
        log.set_logging(DirtyClient::Vga, true);
        log.mark(5 * PAGE_SIZE + 4095, 2);
        log.mark(63 * PAGE_SIZE, 66 * PAGE_SIZE);
        log.mark(199 * PAGE_SIZE, u64::MAX);
        log.mark(200 * PAGE_SIZE, 1);
        assert!(log.pending(DirtyClient::Vga) && !log.pending(DirtyClient::Code));
        let map = log.snapshot_and_clear(DirtyClient::Vga, 0..200 * PAGE_SIZE);
        assert_eq!(map.runs(), [5..7, 63..129, 199..200]);
        assert!(!log.pending(DirtyClient::Vga));
        assert!(!log.snapshot_and_clear(DirtyClient::Vga, 0..u64::MAX).any());
        assert!(!log.snapshot_and_clear(DirtyClient::Code, 0..u64::MAX).any());
    }

    #[test]
    fn a_partial_snapshot_leaves_the_rest() {
        let log = DirtyLog::new(100 * PAGE_SIZE);
        log.set_logging(DirtyClient::Migration, true);
        log.mark(0, 100 * PAGE_SIZE);
        let part = log.snapshot_and_clear(DirtyClient::Migration, 10 * PAGE_SIZE..20 * PAGE_SIZE);
        assert_eq!((part.first_page(), part.len(), part.count()), (10, 10, 10));
        let rest = log.snapshot_and_clear(DirtyClient::Migration, 0..u64::MAX);
        assert_eq!(rest.runs(), [0..10, 20..100]);
    }
}
