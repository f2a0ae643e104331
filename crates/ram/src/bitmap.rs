//! A bitmap of pages, as a dirty snapshot returns it.

use std::ops::Range;

/// One bit for each 4096-byte page of a range of pages.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Bitmap {
    first: u64,
    len: u64,
    words: Vec<u64>,
}

impl Bitmap {
    /// An empty bitmap for `len` pages; its first bit stands for page number `first` of the block.
    pub fn new(first: u64, len: u64) -> Bitmap {
        Bitmap { first, len, words: vec![0; len.div_ceil(64) as usize] }
    }

    /// The page number of the first bit.
    pub fn first_page(&self) -> u64 {
        self.first
    }

    /// How many pages the bitmap covers.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when the bitmap covers no page at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Is the bit of page number `page` (counted from the start of the block) set? Pages outside are not.
    pub fn contains(&self, page: u64) -> bool {
        let Some(i) = page.checked_sub(self.first).filter(|i| *i < self.len) else { return false };
        self.words.get((i / 64) as usize).is_some_and(|w| w >> (i % 64) & 1 != 0)
    }

    /// Sets the bit of page number `page`; pages outside of the bitmap are ignored.
    pub fn insert(&mut self, page: u64) {
        let Some(i) = page.checked_sub(self.first).filter(|i| *i < self.len) else { return };
        if let Some(w) = self.words.get_mut((i / 64) as usize) {
            *w |= 1 << (i % 64);
        }
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Is any bit set?
    pub fn any(&self) -> bool {
        self.words.iter().any(|w| *w != 0)
    }

    /// The page numbers (from the start of the block) whose bits are set, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(move |(i, w)| {
            let base = self.first + i as u64 * 64;
            std::iter::successors((*w != 0).then_some(*w), |w| Some(w & (w - 1)).filter(|w| *w != 0))
                .map(move |w| base + u64::from(w.trailing_zeros()))
        })
    }

    /// The set bits as ranges of page numbers, ascending, neighbours joined.
    pub fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in self.pages() {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_and_lists_pages_across_words() {
        let mut map = Bitmap::new(10, 130);
        for page in [9, 10, 11, 73, 74, 139, 140] {
            map.insert(page);
        }
        assert_eq!(map.pages().collect::<Vec<_>>(), [10, 11, 73, 74, 139]);
        assert_eq!(map.runs(), [10..12, 73..75, 139..140]);
        assert_eq!(map.count(), 5);
        assert!(map.contains(139) && !map.contains(140) && !map.contains(9) && !map.contains(12));
        assert!(map.any() && !Bitmap::new(0, 64).any() && Bitmap::new(7, 0).is_empty());
    }
}
