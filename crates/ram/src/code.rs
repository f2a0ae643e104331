//! Which guest memory holds code that a software CPU has decoded or translated, and when it was written to.
//!
//! Shared by all processors of a machine. A page's 64 lines of 64 bytes are a bit mask: a bit is set when a processor keeps something
//! made from that line. Whoever writes to a marked line advances the page's version and clears the marks, which makes all that was
//! made from the page void; one process-wide [`epoch`] tells processors that there is something to check again.
//!
//! Processors write to pages without code directly, without a word to this map. So a page also has a bit for each processor that may
//! do that ([`CodeMap::own`], [`CodeMap::may_write`]): who finds another's bit at a page that it has marked may not keep anything made
//! from the page until that processor has given the page up ([`CodeMap::disown`]). Of a processor that wants to write directly and one that marks
//! at the same time at least one sees the other: each first sets its own bits and then looks at the other's, all sequentially consistent.

use crate::PAGE_SIZE;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock};

static EPOCH: AtomicU64 = AtomicU64::new(1);

/// A number that changes whenever marked code was written to, in any block of the process.
#[inline(always)]
pub fn epoch() -> u64 {
    EPOCH.load(Ordering::Relaxed)
}

static HITS: AtomicU64 = AtomicU64::new(0);
/// The last pages whose marked code was written to: map and page number. Hit number `n` is at `n % RECENT`.
static LAST: Mutex<[(usize, u64); RECENT]> = Mutex::new([(0, 0); RECENT]);
const RECENT: usize = 64;

/// A number that advances by one for each page whose marked code was written to, in any block of the process.
#[inline(always)]
pub fn hits() -> u64 {
    HITS.load(Ordering::Acquire)
}

/// Calls `f` with [`CodeMap::identity`] and page number of each page that was hit since the count was `since`, and gives the count now. None:
/// there were too many to remember, every page may be one of them.
pub fn hits_since(since: u64, mut f: impl FnMut(usize, u64)) -> (u64, Option<()>) {
    let last = LAST.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let now = HITS.load(Ordering::Acquire);
    if now.wrapping_sub(since) > RECENT as u64 {
        return (now, None);
    }
    for n in since..now {
        if let Some((map, page)) = last.get(n as usize % RECENT) {
            f(*map, *page);
        }
    }
    (now, Some(()))
}

/// Writes for which a page stays guarded after its marks were cleared.
const GUARD: u8 = 32;

/// Pages in one lazily made piece of the map (2 MiB of memory).
const CHUNK: usize = 512;

struct Chunk {
    lines: [AtomicU64; CHUNK],
    /// After a page's marks were cleared: so many more writes are still looked at, because code that is written to is often written to
    /// again.
    guard: [AtomicU8; CHUNK],
    version: [AtomicU32; CHUNK],
    /// Somebody is taking the page's marks away and has not told everybody yet.
    busy: [AtomicBool; CHUNK],
    /// Processors (by number modulo 32) that may write to the page directly.
    writers: [AtomicU32; CHUNK],
}

impl Chunk {
    fn new() -> Box<Chunk> {
        Box::new(Chunk {
            lines: std::array::from_fn(|_| AtomicU64::new(0)),
            guard: std::array::from_fn(|_| AtomicU8::new(0)),
            version: std::array::from_fn(|_| AtomicU32::new(0)),
            busy: std::array::from_fn(|_| AtomicBool::new(false)),
            writers: std::array::from_fn(|_| AtomicU32::new(0)),
        })
    }

    /// Waits until nobody is taking away a page's marks.
    #[inline]
    fn wait(&self, i: usize) {
        let mut looks = 0;
        while self.busy[i].load(Ordering::SeqCst) {
            looks += 1;
            if looks < 100 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

/// A processor's bit in [`CodeMap::may_write`].
pub fn writer(processor: u8) -> u32 {
    1 << (processor & 31)
}

/// The code marks of one block. Offsets are bytes from the block's start; those outside of it have no code.
pub struct CodeMap {
    any: AtomicBool,
    chunks: Box<[OnceLock<Box<Chunk>>]>,
}

/// The lines that `len` bytes from `offset` in a page touch (cut at the page's end).
pub fn line_mask(offset: u64, len: u64) -> u64 {
    let first = (offset & (PAGE_SIZE - 1)) / 64;
    let last = ((offset & (PAGE_SIZE - 1)) + len.max(1) - 1).min(PAGE_SIZE - 1) / 64;
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

impl CodeMap {
    pub(crate) fn new(bytes: u64) -> CodeMap {
        let chunks = bytes.div_ceil(PAGE_SIZE * CHUNK as u64);
        CodeMap { any: AtomicBool::new(false), chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    /// A number that tells this map from others that live at the same time.
    pub fn identity(&self) -> usize {
        self.chunks.as_ptr() as usize
    }

    #[inline]
    fn chunk(&self, offset: u64) -> Option<(&Chunk, usize)> {
        let page = (offset / PAGE_SIZE) as usize;
        Some((self.chunks.get(page / CHUNK)?.get()?, page % CHUNK))
    }

    /// The marked lines of the page at `offset`.
    #[inline]
    pub fn lines(&self, offset: u64) -> u64 {
        self.chunk(offset).map_or(0, |(c, i)| c.lines[i].load(Ordering::Acquire))
    }

    /// Whether writes to the page at `offset` have to be said to [`CodeMap::written`]: it has marks, or had some lately.
    #[inline]
    pub fn guarded(&self, offset: u64) -> bool {
        // The guard first: whoever marks a guarded page relies on it that a guard which ends later shows the marks.
        self.chunk(offset).is_some_and(|(c, i)| {
            c.guard[i].load(Ordering::SeqCst) != 0 || c.lines[i].load(Ordering::SeqCst) != 0
        })
    }

    /// The version of the page at `offset`: advances when marked code in it is written.
    #[inline]
    pub fn version(&self, offset: u64) -> u32 {
        self.chunk(offset).map_or(0, |(c, i)| c.version[i].load(Ordering::Acquire))
    }

    #[inline]
    fn cell(&self, offset: u64) -> Option<(&Chunk, usize)> {
        let page = (offset / PAGE_SIZE) as usize;
        Some((self.chunks.get(page / CHUNK)?.get_or_init(Chunk::new), page % CHUNK))
    }

    /// Marks lines of the page at `offset`. To be called before the bytes are read, and before [`CodeMap::may_write`] is asked. Gives the page's
    /// version, to be kept with what is made from the bytes.
    pub fn mark(&self, offset: u64, lines: u64) -> u32 {
        let Some((chunk, i)) = self.cell(offset) else { return 0 };
        self.any.store(true, Ordering::Relaxed);
        let version = chunk.version[i].load(Ordering::Acquire);
        if chunk.lines[i].load(Ordering::SeqCst) & lines != lines {
            chunk.lines[i].fetch_or(lines, Ordering::SeqCst);
        }
        version
    }

    /// The processors (bits, see [`writer`]) that may write to the page at `offset` without saying so.
    #[inline]
    pub fn may_write(&self, offset: u64) -> u32 {
        self.chunk(offset).map_or(0, |(c, i)| c.writers[i].load(Ordering::SeqCst))
    }

    /// A processor is going to write to the page at `offset` directly. False: it must not, because the page is guarded.
    pub fn own(&self, offset: u64, writer: u32) -> bool {
        let Some((chunk, i)) = self.cell(offset) else { return true };
        if chunk.writers[i].load(Ordering::SeqCst) & writer == 0 {
            chunk.writers[i].fetch_or(writer, Ordering::SeqCst);
        }
        !self.guarded(offset)
    }

    /// A processor does not write to the page at `offset` directly any more.
    pub fn disown(&self, offset: u64, writer: u32) {
        if let Some((chunk, i)) = self.chunk(offset) {
            chunk.writers[i].fetch_and(!writer, Ordering::SeqCst);
        }
    }

    /// Says that `len` bytes from `offset` have been written. True when that hit marked code. Whoever has made something from these bytes finds the
    /// [`epoch`] changed from here on, whether it was this write that took the marks away or another one at the same time.
    #[inline]
    pub fn written(&self, offset: u64, len: u64) -> bool {
        self.any.load(Ordering::Relaxed) && self.hit(offset, len)
    }

    fn hit(&self, offset: u64, len: u64) -> bool {
        // The bytes were stored before: they must be visible before the marks are looked at, or another processor could mark the
        // line, read the old bytes, and nobody would notice.
        fence(Ordering::SeqCst);
        let mut hit = false;
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let next = (at | (PAGE_SIZE - 1)).saturating_add(1).min(end);
            let Some((chunk, i)) = self.chunk(at) else {
                at = next;
                continue;
            };
            let mask = line_mask(at, next - at);
            if chunk.lines[i].load(Ordering::SeqCst) & mask == 0 {
                // Perhaps marks of this very line are just being taken away by a write to another: whoever wrote here finds the epoch changed
                // when this is over, also if it executes this code itself.
                chunk.wait(i);
                if chunk.guard[i].load(Ordering::Relaxed) != 0 {
                    let _ =
                        chunk.guard[i].fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
                }
            } else {
                while chunk.busy[i].swap(true, Ordering::SeqCst) {
                    chunk.wait(i);
                }
                // If the marks are gone now, then so is all that was made from the page.
                if chunk.lines[i].load(Ordering::SeqCst) & mask != 0 {
                    self.void(chunk, i, at);
                }
                chunk.busy[i].store(false, Ordering::SeqCst);
                hit = true;
            }
            at = next;
        }
        hit
    }

    fn void(&self, chunk: &Chunk, i: usize, offset: u64) {
        // Before the marks go, so that the page is guarded all the time.
        chunk.guard[i].store(GUARD, Ordering::SeqCst);
        // The marks go first. Who marks in between keeps the old version, which is void a moment later; the other way
        // round it would keep the new version, and lose the marks.
        chunk.lines[i].store(0, Ordering::SeqCst);
        chunk.version[i].fetch_add(1, Ordering::SeqCst);
        {
            let mut last = LAST.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let n = HITS.load(Ordering::Relaxed);
            if let Some(entry) = last.get_mut(n as usize % RECENT) {
                *entry = (self.identity(), offset / PAGE_SIZE);
            }
            HITS.store(n + 1, Ordering::SeqCst);
        }
        EPOCH.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_lines_count() {
        let map = CodeMap::new(4 << 20);
        assert!(!map.written(0, 100));
        let version = map.mark(0x3040, line_mask(0x3040, 0x41));
        assert_eq!(map.lines(0x3fff), 0b110);
        assert!(!map.written(0x3000, 64), "the line before");
        assert!(!map.written(0x30c0, 64), "the line after");
        assert_eq!(map.version(0x3000), version);
        let before = epoch();
        assert!(map.written(0x2fff, 0x42), "across pages into the first marked line");
        assert_eq!((map.version(0x3000), map.lines(0x3000)), (version + 1, 0));
        assert!(epoch() > before);
        assert!(map.guarded(0x3000));
        map.mark(0x3040, line_mask(0x3040, 1));
        assert!(map.written(0x3040, 1));
        for _ in 0..GUARD {
            assert!(map.guarded(0x3000) && !map.written(0x3000, 1));
        }
        assert!(!map.guarded(0x3000));
        map.mark(0x3040, line_mask(0x3040, 1));
        assert!(map.written(0x3040, 1));
        assert!(!map.written(8 << 20, 4) && !map.written(u64::MAX - 2, 4));
    }

    #[test]
    fn who_marks_and_who_writes_directly_see_each_other() {
        let map = CodeMap::new(4 << 20);
        assert_eq!(map.may_write(0x5000), 0);
        assert!(map.own(0x5000, writer(1)) && map.own(0x5fff, writer(3)));
        assert_eq!(map.may_write(0x5800), 0b1010);
        map.mark(0x5000, 1);
        assert!(!map.own(0x5000, writer(0)), "it holds code");
        assert_eq!(map.may_write(0x5000), 0b1011, "and the bit tells that it was wanted");
        map.disown(0x5000, writer(1));
        assert_eq!((map.may_write(0x5000), map.may_write(0x6000)), (0b1001, 0));
        assert!(map.own(8 << 20, writer(0)), "outside there is no code");
    }

    #[test]
    fn masks() {
        assert_eq!(line_mask(0, 1), 1);
        assert_eq!(line_mask(0x103f, 2), 3);
        assert_eq!(line_mask(0xfff, 8), 1 << 63);
        assert_eq!(line_mask(0, 4096), u64::MAX);
    }
}
