//! One block of guest memory.

use crate::code::CodeMap;
use crate::dirty::DirtyLog;
use crate::{Bitmap, DirtyClient, PAGE_SIZE};
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::CString;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// A block needs at least one byte.
    #[error("guest memory `{name}` can't be {len} bytes long: give it at least 1 byte")]
    Empty {
        /// The block's name.
        name: String,
        /// The length that was asked for, in bytes.
        len: u64,
    },
    /// The length doesn't fit this host's address space or file sizes.
    #[error(
        "guest memory `{name}` of {len:#x} ({len}) bytes is more than this host can map: ask for less memory"
    )]
    TooLarge {
        /// The block's name.
        name: String,
        /// The length that was asked for, in bytes.
        len: u64,
    },
    /// The host's kernel refused to create or map the memory.
    #[error(
        "the host can't give {len:#x} ({len}) bytes for guest memory `{name}`: {step} failed: {errno}; ask for less memory, or raise the host's limits on memory and address space"
    )]
    Host {
        /// The block's name.
        name: String,
        /// The length that was asked for, in bytes.
        len: u64,
        /// The system call that failed.
        step: &'static str,
        /// The host's error.
        errno: Errno,
    },
    /// An access that isn't wholly inside of the block.
    #[error(
        "{len:#x} ({len}) bytes at offset {off:#x} ({off}) reach outside of guest memory `{name}`, which has {size:#x} ({size}) bytes"
    )]
    OutOfBounds {
        /// The block's name.
        name: String,
        /// The first byte of the access.
        off: u64,
        /// The length of the access, in bytes.
        len: u64,
        /// The block's length, in bytes.
        size: u64,
    },
}

/// Ranges of bytes that hold memory of the host; see [`RamBlock::populated`].
pub type Populated = Vec<Range<u64>>;

/// One block of guest memory: a memory file, mapped shared and without reservation. It is zero at the start and takes memory of
/// the host only where it has been touched.
pub struct RamBlock {
    name: String,
    base: NonNull<u8>,
    len: u64,
    fd: OwnedFd,
    dirty: DirtyLog,
    code: CodeMap,
}

// SAFETY: the mapping lives as long as the block and is only accessed through atomics (or by whoever takes `host_ptr`
// and answers for it); all other fields are Send and Sync by themselves.
unsafe impl Send for RamBlock {}
// SAFETY: as above: shared access to the contents is by atomic operations only.
unsafe impl Sync for RamBlock {}

impl Drop for RamBlock {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are what mmap gave, and nobody can hold the block any more. Whoever copied `host_ptr`
        // had to keep the Arc, as its documentation says.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock").field("name", &self.name).field("len", &self.len).finish_non_exhaustive()
    }
}

macro_rules! scalar {
    ($load:ident, $store:ident, $cas:ident, $ty:ty, $atomic:ty, $n:literal) => {
        #[doc = concat!("Loads ", $n, " byte(s), little endian, at offset `off`; `None` outside of the block. One atomic access when aligned.")]
        #[inline]
        pub fn $load(&self, off: u64) -> Option<$ty> {
            let ptr = self.at(off, $n)?;
            if off.is_multiple_of($n) {
                // SAFETY: `at` proved that the bytes are inside of the mapping, which lives as long as `self`; `base` is page
                // aligned, so an aligned offset gives an aligned pointer; the memory is only accessed atomically.
                Some(<$ty>::from_le(unsafe { <$atomic>::from_ptr(ptr.cast()) }.load(Ordering::Relaxed)))
            } else {
                let mut bytes = [0; $n];
                self.copy_out(off, &mut bytes);
                Some(<$ty>::from_le_bytes(bytes))
            }
        }

        #[doc = concat!("Stores ", $n, " byte(s), little endian, at offset `off` and marks the page dirty; `None` outside of the block. One atomic access when aligned.")]
        #[inline]
        pub fn $store(&self, off: u64, value: $ty) -> Option<()> {
            let ptr = self.at(off, $n)?;
            if off.is_multiple_of($n) {
                // SAFETY: as for the load above.
                unsafe { <$atomic>::from_ptr(ptr.cast()) }.store(value.to_le(), Ordering::Relaxed);
            } else {
                self.copy_in(off, &value.to_le_bytes());
            }
            self.wrote(off, $n);
            Some(())
        }

        #[doc = concat!("Compares and exchanges ", $n, " byte(s) at offset `off` with sequential consistency. `None` outside of the block or \
            unaligned; else what was there: `Ok` when it was `old` and `new` has been stored (and the page marked dirty), `Err` when not.")]
        pub fn $cas(&self, off: u64, old: $ty, new: $ty) -> Option<Result<$ty, $ty>> {
            let ptr = self.at(off, $n).filter(|_| off.is_multiple_of($n))?;
            // SAFETY: as for the load above.
            let cell = unsafe { <$atomic>::from_ptr(ptr.cast()) };
            let was = cell.compare_exchange(old.to_le(), new.to_le(), Ordering::SeqCst, Ordering::SeqCst);
            if was.is_ok() {
                self.wrote(off, $n);
            }
            Some(was.map(<$ty>::from_le).map_err(<$ty>::from_le))
        }
    };
}

impl RamBlock {
    /// Creates a block of `len` bytes, rounded up to whole pages of 4096 bytes, all zero. The name shows in errors and in the
    /// host's list of mappings. The host's memory is taken on first touch; transparent huge pages are asked for.
    pub fn new(name: &str, len: u64) -> Result<Arc<RamBlock>, RamError> {
        if len == 0 {
            return Err(RamError::Empty { name: name.into(), len });
        }
        let too_large = || RamError::TooLarge { name: name.into(), len };
        let rounded = len.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_large)?;
        if rounded > isize::MAX as u64 {
            return Err(too_large());
        }
        let host = |step| move |errno| RamError::Host { name: name.into(), len, step, errno };
        // The kernel takes at most 249 bytes, without a zero.
        let label: Vec<u8> = name.bytes().filter(|b| *b != 0).take(200).collect();
        let label = CString::new(label).unwrap_or_default();
        let fd = rustix::fs::memfd_create(&label, MemfdFlags::CLOEXEC).map_err(host("memfd_create"))?;
        rustix::fs::ftruncate(&fd, rounded).map_err(host("ftruncate"))?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice; it overlays nothing.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), rounded as usize, prot, flags, &fd, 0) }
            .map_err(host("mmap"))?;
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(RamError::Host { name: name.into(), len, step: "mmap", errno: Errno::NOMEM });
        };
        if rounded >= 2 << 20 {
            // SAFETY: advice on the mapping made above, which changes no contents. The kernel may not have huge pages: no harm.
            let _ =
                unsafe { rustix::mm::madvise(base.as_ptr().cast(), rounded as usize, Advice::LinuxHugepage) };
        }
        Ok(Arc::new(RamBlock {
            name: name.into(),
            base,
            len: rounded,
            fd,
            dirty: DirtyLog::new(rounded),
            code: CodeMap::new(rounded),
        }))
    }

    /// The block's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The block's length in bytes, a multiple of 4096.
    // A block is never empty, so `is_empty` would say nothing.
    #[allow(clippy::len_without_is_empty)]
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where the block is mapped in this process, page aligned. Valid as long as the block lives: whoever uses it keeps the Arc,
    /// stays inside of `len`, accesses it as memory shared with other threads and with guests, and calls [`RamBlock::mark_dirty`]
    /// after writing.
    #[inline]
    pub fn host_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The memory file behind the block, for vhost-like sharing.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Which of the block's memory holds code that a software CPU has decoded.
    #[inline]
    pub fn code(&self) -> &CodeMap {
        &self.code
    }

    /// After every write: dirty pages, and code that was overwritten.
    #[inline]
    fn wrote(&self, off: u64, len: u64) {
        self.dirty.mark(off, len);
        self.code.written(off, len);
    }

    /// The pointer to `n` bytes at `off`, when they are inside.
    #[inline]
    fn at(&self, off: u64, n: u64) -> Option<*mut u8> {
        if n > self.len || off > self.len - n {
            return None;
        }
        // SAFETY: off + n <= len, and len fits isize (checked at creation), so the pointer stays in the mapping.
        Some(unsafe { self.base.as_ptr().add(off as usize) })
    }

    fn check(&self, off: u64, len: u64) -> Result<(), RamError> {
        match self.at(off, len) {
            Some(_) => Ok(()),
            None => Err(RamError::OutOfBounds { name: self.name.clone(), off, len, size: self.len }),
        }
    }

    /// Copies bytes out of the block at `off`. Naturally aligned 8 bytes are one access, the ends are as large as alignment
    /// allows. Fails, with nothing copied, when the range isn't wholly inside.
    pub fn read(&self, off: u64, buf: &mut [u8]) -> Result<(), RamError> {
        self.check(off, buf.len() as u64)?;
        self.copy_out(off, buf);
        Ok(())
    }

    /// Copies bytes into the block at `off` and marks the pages dirty. Fails, with nothing written, when the range isn't wholly inside.
    pub fn write(&self, off: u64, data: &[u8]) -> Result<(), RamError> {
        self.check(off, data.len() as u64)?;
        self.copy_in(off, data);
        self.wrote(off, data.len() as u64);
        Ok(())
    }

    /// Copies out; the caller has checked the bounds (they are checked again, cheaply: out of bounds copies nothing more).
    fn copy_out(&self, mut off: u64, mut buf: &mut [u8]) {
        while !off.is_multiple_of(8) || buf.len() < 8 {
            let Some(n) = edge_piece(off, buf.len()) else { break };
            let Some(ptr) = self.at(off, n as u64) else { return };
            let (head, tail) = buf.split_at_mut(n);
            // SAFETY (each arm): `at` proved the bytes inside of the mapping; `edge_piece` gives a size that `off` is aligned to.
            match n {
                // SAFETY: see above.
                1 => head[0] = unsafe { AtomicU8::from_ptr(ptr) }.load(Ordering::Relaxed),
                // SAFETY: see above.
                2 => head.copy_from_slice(
                    &unsafe { AtomicU16::from_ptr(ptr.cast()) }.load(Ordering::Relaxed).to_ne_bytes(),
                ),
                // SAFETY: see above.
                _ => head.copy_from_slice(
                    &unsafe { AtomicU32::from_ptr(ptr.cast()) }.load(Ordering::Relaxed).to_ne_bytes(),
                ),
            }
            off += n as u64;
            buf = tail;
        }
        let whole = buf.len() & !7;
        if whole == 0 {
            return;
        }
        let Some(ptr) = self.at(off, whole as u64) else { return };
        let (words, tail) = buf.split_at_mut(whole);
        for (i, word) in words.chunks_exact_mut(8).enumerate() {
            // SAFETY: `at` proved all `whole` bytes inside; `off` is a multiple of 8 here, so is each word.
            let cell = unsafe { AtomicU64::from_ptr(ptr.add(i * 8).cast()) };
            word.copy_from_slice(&cell.load(Ordering::Relaxed).to_ne_bytes());
        }
        if !tail.is_empty() {
            self.copy_out(off + whole as u64, tail);
        }
    }

    /// Copies in; bounds as for `copy_out`. Does not mark dirty.
    fn copy_in(&self, mut off: u64, mut data: &[u8]) {
        while !off.is_multiple_of(8) || data.len() < 8 {
            let Some(n) = edge_piece(off, data.len()) else { break };
            let Some(ptr) = self.at(off, n as u64) else { return };
            let (head, tail) = data.split_at(n);
            match *head {
                // SAFETY: `at` proved the bytes inside of the mapping; `edge_piece` gives a size that `off` is aligned to.
                [a] => unsafe { AtomicU8::from_ptr(ptr) }.store(a, Ordering::Relaxed),
                // SAFETY: as above.
                [a, b] => unsafe { AtomicU16::from_ptr(ptr.cast()) }
                    .store(u16::from_ne_bytes([a, b]), Ordering::Relaxed),
                // SAFETY: as above.
                [a, b, c, d] => unsafe { AtomicU32::from_ptr(ptr.cast()) }
                    .store(u32::from_ne_bytes([a, b, c, d]), Ordering::Relaxed),
                _ => return,
            }
            off += n as u64;
            data = tail;
        }
        let whole = data.len() & !7;
        if whole == 0 {
            return;
        }
        let Some(ptr) = self.at(off, whole as u64) else { return };
        let (words, tail) = data.split_at(whole);
        for (i, word) in words.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: `at` proved all `whole` bytes inside; `off` is a multiple of 8 here, so is each word.
            let cell = unsafe { AtomicU64::from_ptr(ptr.add(i * 8).cast()) };
            cell.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        if !tail.is_empty() {
            self.copy_in(off + whole as u64, tail);
        }
    }

    scalar!(load_u8, store_u8, compare_exchange_u8, u8, AtomicU8, 1);
    scalar!(load_u16, store_u16, compare_exchange_u16, u16, AtomicU16, 2);
    scalar!(load_u32, store_u32, compare_exchange_u32, u32, AtomicU32, 4);
    scalar!(load_u64, store_u64, compare_exchange_u64, u64, AtomicU64, 8);

    /// Loads 1, 2, 4 or 8 bytes, little endian; `None` outside of the block or for another size.
    #[inline]
    pub fn load(&self, off: u64, size: u8) -> Option<u64> {
        match size {
            1 => self.load_u8(off).map(u64::from),
            2 => self.load_u16(off).map(u64::from),
            4 => self.load_u32(off).map(u64::from),
            8 => self.load_u64(off),
            _ => None,
        }
    }

    /// Stores the low 1, 2, 4 or 8 bytes of `value`, little endian; `None` outside of the block or for another size.
    #[inline]
    pub fn store(&self, off: u64, size: u8, value: u64) -> Option<()> {
        match size {
            1 => self.store_u8(off, value as u8),
            2 => self.store_u16(off, value as u16),
            4 => self.store_u32(off, value as u32),
            8 => self.store_u64(off, value),
            _ => None,
        }
    }

    /// Sets `len` bytes at `off` to `byte` and marks the pages dirty.
    pub fn fill(&self, mut off: u64, len: u64, byte: u8) -> Result<(), RamError> {
        self.check(off, len)?;
        let start = off;
        let chunk = [byte; 512];
        let mut left = len;
        while left > 0 {
            let n = left.min(chunk.len() as u64);
            self.copy_in(off, &chunk[..n as usize]);
            off += n;
            left -= n;
        }
        self.wrote(start, len);
        Ok(())
    }

    /// Makes `len` bytes at `off` zero and gives whole pages of them back to the host. Marks the pages dirty.
    pub fn discard(&self, off: u64, len: u64) -> Result<(), RamError> {
        self.check(off, len)?;
        if len == 0 {
            return Ok(());
        }
        // The kernel zeroes partial pages at the ends itself.
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, how, off, len).map_err(|errno| RamError::Host {
            name: self.name.clone(),
            len,
            step: "fallocate",
            errno,
        })?;
        self.wrote(off, len);
        Ok(())
    }

    /// The ranges of bytes, page aligned and ascending, for which the host holds memory. Everything else is zero and has never
    /// been touched: who saves the block need not look there (looking would make the host provide pages).
    pub fn populated(&self) -> Populated {
        let mut ranges = Vec::new();
        let mut pos = 0;
        while pos < self.len {
            let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(pos)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                // A host that can't tell holes: everything counts as populated.
                Err(_) => pos,
            };
            let end = rustix::fs::seek(&self.fd, SeekFrom::Hole(start)).unwrap_or(self.len).min(self.len);
            if end <= start {
                break;
            }
            ranges.push(start..end);
            pos = end;
        }
        ranges
    }

    /// Is page number `page` (offset / 4096) all zero? Pages outside of the block count as zero.
    pub fn is_zero_page(&self, page: u64) -> bool {
        let Some(ptr) = page.checked_mul(PAGE_SIZE).and_then(|off| self.at(off, PAGE_SIZE)) else {
            return true;
        };
        (0..(PAGE_SIZE / 8) as usize).all(|i| {
            // SAFETY: `at` proved the whole page inside of the mapping; each word of it is aligned.
            unsafe { AtomicU64::from_ptr(ptr.add(i * 8).cast()) }.load(Ordering::Relaxed) == 0
        })
    }

    /// A fast 64-bit hash of `len` bytes at `off`, stable across runs, hosts and versions; not for security. Pages of the block that
    /// are all zero count for nothing, so untouched memory costs nothing. Fails outside of the block.
    pub fn hash(&self, off: u64, len: u64) -> Result<u64, RamError> {
        self.check(off, len)?;
        let mut sum = mix(len ^ 0x9e37_79b9_7f4a_7c15);
        let end = off + len;
        let mut buf = [0; PAGE_SIZE as usize];
        for range in self.populated() {
            let mut at = range.start.max(off);
            while at < range.end.min(end) {
                let stop = ((at / PAGE_SIZE + 1) * PAGE_SIZE).min(end);
                let part = &mut buf[..(stop - at) as usize];
                self.copy_out(at, part);
                if part.iter().any(|b| *b != 0) {
                    // Bound to its place by the distance from `off`; the sum is free of order and of zero parts.
                    sum = sum.wrapping_add(mix(hash_bytes(part) ^ mix(at - off + 1)));
                }
                at = stop;
            }
        }
        Ok(mix(sum))
    }

    /// Marks `len` bytes at `off` as written, for every client that is logging. Only needed by who writes through
    /// [`RamBlock::host_ptr`]. What is outside of the block is ignored.
    #[inline]
    pub fn mark_dirty(&self, off: u64, len: u64) {
        self.wrote(off, len);
    }

    /// Marks `len` bytes at `off` as written for one client, whether it is logging or not. For dirty logs that come from elsewhere (KVM).
    pub fn mark_dirty_for(&self, client: DirtyClient, off: u64, len: u64) {
        self.dirty.mark_for(client.bit(), off, len);
    }

    /// Takes the dirty bits of the pages that `range` (bytes) touches, and clears them. Writes that come meanwhile are in this
    /// snapshot or in the next, never in none.
    pub fn dirty_snapshot_and_clear(&self, client: DirtyClient, range: Range<u64>) -> Bitmap {
        self.dirty.snapshot_and_clear(client, range)
    }

    /// Has any page been marked for `client` since its last snapshot of the whole block? Cheap: for polling.
    #[inline]
    pub fn has_dirty(&self, client: DirtyClient) -> bool {
        self.dirty.pending(client)
    }

    /// Starts or stops logging for one client. Bits that are set stay until they are taken. A write that is under way in another
    /// thread may or may not be logged yet: start before the first look at the contents, with the processors stopped.
    pub fn set_logging(&self, client: DirtyClient, on: bool) {
        self.dirty.set_logging(client, on);
    }

    /// Which clients are logging: a mask of [`DirtyClient::bit`]s.
    #[inline]
    pub fn logging(&self) -> u8 {
        self.dirty.logging()
    }
}

/// The largest of 4, 2, 1 bytes that `off` is aligned to and that fits into `left`; none when nothing is left.
fn edge_piece(off: u64, left: usize) -> Option<usize> {
    [4usize, 2, 1].into_iter().find(|n| off.is_multiple_of(*n as u64) && *n <= left)
}

/// Mixes 64 bits: multiply to 128 bits and fold, twice.
fn mix(value: u64) -> u64 {
    let wide = u128::from(value ^ 0x2545_f491_4f6c_dd1d) * 0xd6e8_feb8_6659_fd93_u128;
    let folded = (wide as u64) ^ (wide >> 64) as u64;
    let wide = u128::from(folded) * 0xa076_1d64_78bd_642f_u128;
    (wide as u64) ^ (wide >> 64) as u64
}

/// Hashes up to a page: four lanes of 64-bit words, the rest byte by byte.
fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut lanes = [1_u64, 2, 3, 4];
    let (chunks, rest) = bytes.as_chunks::<32>();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
            let product = u128::from(*lane ^ u64::from_le_bytes(*word)) * 0x9fb2_1c65_1e98_df25_u128;
            *lane = (product as u64).rotate_left(23) ^ (product >> 64) as u64 ^ u64::from_le_bytes(*word);
        }
    }
    let mut all = bytes.len() as u64;
    for lane in lanes {
        all = mix(all ^ lane);
    }
    rest.iter().fold(all, |sum, byte| mix(sum ^ u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(len: u64) -> Arc<RamBlock> {
        RamBlock::new("test.ram", len).expect("the host gives a little memory")
    }

    #[test]
    fn starts_zero_and_rounds_up() {
        let ram = block(5000);
        assert_eq!((ram.name(), ram.len()), ("test.ram", 8192));
        assert!(ram.is_zero_page(0) && ram.is_zero_page(1) && ram.is_zero_page(u64::MAX));
        assert_eq!(ram.load_u64(8184), Some(0));
    }

    #[test]
    fn refuses_what_is_outside_and_says_so() {
        let ram = block(4096);
        assert_eq!(ram.load_u8(4096), None);
        assert_eq!(ram.load_u64(4089), None);
        assert_eq!(ram.load_u64(u64::MAX), None);
        assert_eq!(ram.store_u32(4093, 1), None);
        assert_eq!(ram.compare_exchange_u32(2, 0, 1), None, "unaligned");
        let error = ram.write(4090, &[0; 7]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "0x7 (7) bytes at offset 0xffa (4090) reach outside of guest memory `test.ram`, which has 0x1000 (4096) bytes"
        );
        assert!(ram.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(ram.read(4096, &mut []).is_ok() && ram.fill(4097, 0, 1).is_err());
        assert!(matches!(RamBlock::new("none", 0), Err(RamError::Empty { .. })));
        assert!(matches!(RamBlock::new("huge", u64::MAX), Err(RamError::TooLarge { .. })));
        assert!(matches!(RamBlock::new("huge", 1 << 62), Err(RamError::Host { .. })));
    }

    #[test]
    fn copies_at_every_alignment_and_length() {
        let ram = block(4096);
        for off in 0..20_u64 {
            for len in 0..40_usize {
                ram.fill(0, 64, 0xee).expect("inside");
                let data: Vec<u8> = (0..len as u8).map(|i| i ^ 0x5a).collect();
                ram.write(off, &data).expect("inside");
                let mut all = [0; 64];
                ram.read(0, &mut all).expect("inside");
                let mut want = [0xee; 64];
                want[off as usize..off as usize + len].copy_from_slice(&data);
                assert_eq!(all, want, "off {off} len {len}");
                let mut back = vec![0; len];
                ram.read(off, &mut back).expect("inside");
                assert_eq!(back, data);
            }
        }
    }

    #[test]
    fn scalars_are_little_endian_at_every_alignment() {
        let ram = block(4096);
        for off in 0..16 {
            ram.store_u64(off, 0x0807_0605_0403_0201).expect("inside");
            let mut bytes = [0; 8];
            ram.read(off, &mut bytes).expect("inside");
            assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
            assert_eq!(ram.load_u32(off + 1), Some(0x0504_0302));
            assert_eq!(ram.load_u16(off + 6), Some(0x0807));
            assert_eq!((ram.load(off, 8), ram.load(off, 3)), (Some(0x0807_0605_0403_0201), None));
        }
        assert_eq!(ram.compare_exchange_u64(8, 5, 6), Some(Err(ram.load_u64(8).unwrap_or_default())));
        ram.store_u64(8, 5);
        assert_eq!(ram.compare_exchange_u64(8, 5, 6), Some(Ok(5)));
        assert_eq!(ram.load_u64(8), Some(6));
    }

    #[test]
    fn writers_mark_dirty() {
        let ram = block(16 * PAGE_SIZE);
        ram.store_u8(0, 1);
        ram.set_logging(DirtyClient::Code, true);
        assert_eq!(ram.logging(), DirtyClient::CODE);
        ram.store_u8(PAGE_SIZE, 1);
        ram.write(3 * PAGE_SIZE - 1, &[1, 2]).expect("inside");
        ram.fill(6 * PAGE_SIZE, 1, 0).expect("inside");
        ram.discard(8 * PAGE_SIZE, PAGE_SIZE).expect("inside");
        assert_eq!(
            ram.compare_exchange_u8(9 * PAGE_SIZE, 1, 2),
            Some(Err(0)),
            "a failed exchange writes nothing"
        );
        ram.mark_dirty_for(DirtyClient::Vga, 0, 1);
        assert!(ram.has_dirty(DirtyClient::Code));
        assert_eq!(
            ram.dirty_snapshot_and_clear(DirtyClient::Code, 0..ram.len()).pages().collect::<Vec<_>>(),
            [1, 2, 3, 6, 8]
        );
        assert_eq!(
            ram.dirty_snapshot_and_clear(DirtyClient::Vga, 0..ram.len()).pages().collect::<Vec<_>>(),
            [0]
        );
    }

    #[test]
    fn hash_tells_contents_and_place_but_not_touching() {
        let (a, b) = (block(64 * PAGE_SIZE), block(64 * PAGE_SIZE));
        let hash = |ram: &RamBlock| ram.hash(0, ram.len()).expect("inside");
        assert_eq!(hash(&a), hash(&b));
        a.store_u8(10 * PAGE_SIZE + 7, 1);
        assert_ne!(hash(&a), hash(&b));
        b.store_u8(11 * PAGE_SIZE + 7, 1);
        assert_ne!(hash(&a), hash(&b), "the same page elsewhere");
        b.store_u8(11 * PAGE_SIZE + 7, 0);
        b.store_u8(10 * PAGE_SIZE + 7, 1);
        assert_eq!(hash(&a), hash(&b), "a touched page of zeros counts for nothing");
        b.store_u8(10 * PAGE_SIZE + 4095, 1);
        assert_ne!(hash(&a), hash(&b));
        assert_ne!(a.hash(0, 4096).ok(), a.hash(0, 4095).ok());
        // Values may be compared between versions: they must not change.
        assert_eq!(block(4096).hash(0, 4096).ok(), Some(3_997_612_358_339_933_209));
        assert_eq!(hash(&a), 18174198897156129242);
        assert!(a.hash(1, a.len()).is_err());
    }

    #[test]
    fn populated_and_discard() {
        let ram = block(64 << 20);
        assert!(ram.populated().is_empty());
        ram.store_u8(0x12_3456, 1);
        let ranges = ram.populated();
        assert!(ranges.iter().any(|r| r.contains(&0x12_3456)), "{ranges:?}");
        assert!(ranges.iter().all(|r| r.start % PAGE_SIZE == 0 && r.end <= ram.len()));
        ram.discard(0, ram.len()).expect("the kernel punches holes");
        assert_eq!((ram.load_u8(0x12_3456), ram.is_zero_page(0x123)), (Some(0), true));
    }

    #[test]
    fn threads_never_tear_aligned_words() {
        let ram = block(4096);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for i in 0..200_000_u64 {
                    let byte = (i % 251) + 1;
                    ram.store_u64(64, byte * 0x0101_0101_0101_0101);
                }
            });
            while !writer.is_finished() {
                let mut bytes = [0; 8];
                ram.read(64, &mut bytes).expect("inside");
                assert!(bytes.iter().all(|b| *b == bytes[0]), "{bytes:?}");
            }
        });
    }
}
