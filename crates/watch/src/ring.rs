//! The last records of one processor, written without a lock and read at any time.

use crate::record::{AccessRecord, WORDS};
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A ring of records. One thread writes as a rule; where several do (bus masters), a record that two of them write at the same time, one whole
/// turn apart, may be dropped by readers or be mixed of both.
pub(crate) struct Ring {
    head: AtomicU64,
    slots: Vec<[AtomicU64; WORDS]>,
}

impl Ring {
    /// `len` is brought up to a power of two.
    pub(crate) fn new(len: usize) -> Ring {
        let slots = (0..len.next_power_of_two()).map(|_| Default::default()).collect();
        Ring { head: AtomicU64::new(0), slots }
    }

    #[inline]
    pub(crate) fn push(&self, record: &AccessRecord) {
        let at = self.head.fetch_add(1, Ordering::Relaxed) as usize & (self.slots.len() - 1);
        let Some(slot) = self.slots.get(at) else { return };
        let words = record.pack();
        // A reader that sees the same running number before and after has seen one record whole.
        slot[0].store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        for (cell, word) in slot.iter().zip(words).skip(1) {
            cell.store(word, Ordering::Relaxed);
        }
        slot[0].store(words[0], Ordering::Release);
    }

    /// What is there now, oldest first.
    pub(crate) fn records(&self) -> Vec<AccessRecord> {
        let head = self.head.load(Ordering::Acquire) as usize;
        let order = (0..self.slots.len()).map(|i| head.wrapping_add(i) & (self.slots.len() - 1));
        order.filter_map(|i| self.slots.get(i)).filter_map(read).collect()
    }

    /// Records written so far.
    pub(crate) fn written(&self) -> u64 {
        self.head.load(Ordering::Relaxed)
    }
}

fn read(slot: &[AtomicU64; WORDS]) -> Option<AccessRecord> {
    let before = slot[0].load(Ordering::Acquire);
    let mut words = [before; WORDS];
    for (word, cell) in words.iter_mut().zip(slot).skip(1) {
        *word = cell.load(Ordering::Relaxed);
    }
    fence(Ordering::Acquire);
    (before != 0 && slot[0].load(Ordering::Relaxed) == before).then(|| AccessRecord::unpack(words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_space::{Actor, ExitKind, Outcome};

    fn record(seq: u64) -> AccessRecord {
        AccessRecord {
            seq,
            time: seq,
            rip: seq,
            addr: seq,
            value: seq,
            offset: seq,
            took: 0,
            site: 0,
            count: 0,
            actor: Actor::Vcpu(0),
            exit: ExitKind::PioIn,
            size: 1,
            is_write: false,
            parts: 1,
            outcome: Outcome::Ok,
        }
    }

    #[test]
    fn keeps_the_last() {
        let ring = Ring::new(4);
        assert!(ring.records().is_empty());
        (1..=6).for_each(|i| ring.push(&record(i)));
        assert_eq!(ring.records().iter().map(|r| r.seq).collect::<Vec<_>>(), [3, 4, 5, 6]);
        assert_eq!(ring.written(), 6);
    }

    #[test]
    fn a_reader_never_sees_half_a_record() {
        let ring = Ring::new(8);
        std::thread::scope(|s| {
            s.spawn(|| (1..=200_000).for_each(|i| ring.push(&record(i))));
            s.spawn(|| {
                for _ in 0..2_000 {
                    for r in ring.records() {
                        assert_eq!([r.time, r.rip, r.addr, r.value, r.offset], [r.seq; 5]);
                    }
                }
            });
        });
    }
}
