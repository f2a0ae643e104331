//! What the comparing process and the processes of its machines say to each other: CBOR through pipes.

use serde::{Deserialize, Serialize};

/// A request to a machine's process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Run until so many instructions were executed since power-on. With `keep` the present state is what [`Ask::Back`] goes back to.
    Run { to: u64, keep: bool },
    /// Go back to the kept state.
    Back,
    /// The state without memory.
    Sections,
    /// Pages written since the kept state.
    Changed,
    /// A page of memory: number of its block, number of the page.
    Page(usize, u64),
    /// Bytes of code at a processor's instruction pointer, and the mode's bits.
    Code(usize),
    /// Whether a processor's stop or the machine's end has a text on the console: the last bytes.
    Console,
    /// Write a state file.
    Save(String),
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// To [`Ask::Run`] and [`Ask::Back`].
    Status(Status),
    /// To [`Ask::Sections`].
    Sections(Vec<(String, Vec<u8>)>),
    /// To [`Ask::Changed`]: block, page, hash.
    Changed(Vec<(usize, u64, u64)>),
    /// To [`Ask::Page`] and [`Ask::Console`].
    Bytes(Vec<u8>),
    /// To [`Ask::Code`].
    Code(u32, Vec<u8>),
    /// To [`Ask::Save`].
    Done,
    /// It can't be done.
    Failed(String),
}

/// Where a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Instructions executed.
    pub count: u64,
    /// Why it can't go on.
    pub ended: Option<String>,
    /// Hash of processors, devices, lines, clock.
    pub state: u64,
    /// Hash of memory.
    pub memory: u64,
}

/// A fast hash of bytes, the same on every host; not for security. Zero for bytes that are all zero.
pub(crate) fn hash(data: &[u8]) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let fold = |a: u64, b: u64| {
        let wide = u128::from(a ^ K) * u128::from(b ^ 0xd6e8_feb8_6659_fd93);
        wide as u64 ^ (wide >> 64) as u64
    };
    if data.iter().all(|b| *b == 0) {
        return 0;
    }
    let (words, rest) = data.as_chunks::<8>();
    // Four sums that do not wait for each other.
    let mut sums = [1_u64, 2, 3, data.len() as u64];
    let (groups, last) = words.as_chunks::<4>();
    for group in groups {
        for (sum, word) in sums.iter_mut().zip(group) {
            *sum = fold(*sum, u64::from_le_bytes(*word)).rotate_left(29);
        }
    }
    let mut all = sums.iter().fold(0, |a, s| fold(a, *s));
    for word in last {
        all = fold(all, u64::from_le_bytes(*word));
    }
    rest.iter().fold(all, |a, b| fold(a, u64::from(*b))) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_counts() {
        let mut page = vec![0_u8; 4096];
        assert_eq!(hash(&page), 0);
        let mut seen = std::collections::HashSet::from([0]);
        for bit in (0..4096 * 8).step_by(37) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(seen.insert(hash(&page)), "bit {bit}");
        }
        assert_ne!(hash(&[1, 2, 3]), hash(&[1, 2, 3, 0]));
    }
}
