//! Guest memory by host pointer: the software TLB's read and write tables and the accesses through them.
//!
//! Everything unsafe about memory is in this file, behind a safe interface. The invariant that all of it rests on: **an entry of a
//! [`Table`] whose tag is a page address holds the host address of 4096 bytes inside of a RAM block which the table keeps alive.**
//! Tags get in by [`Table::fill`] alone, which checks the bounds and keeps the block's Arc; blocks go only when all entries are void.
//!
//! Guest memory is shared with other threads (other processors, devices), so accesses are single machine instructions where the
//! host can do that: atomic when aligned, and whatever x86 does when not.

use hyaline_ram::RamBlock;
use std::ptr::NonNull;
use std::sync::Arc;

/// Entries in a table; direct mapped by the page number's low bits.
pub(crate) const ENTRIES: usize = 4096;
/// Bytes in a page.
pub(crate) const PAGE: u64 = 4096;

/// A TLB entry, laid out for generated code: 16 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(crate) struct Entry {
    /// Linear page address; void entries hold a value whose index bits are not those of their own slot, so no address can match.
    pub tag: u64,
    /// Host address of the page.
    pub host: u64,
}

/// Slots for the identities of code pages, direct mapped by the page number's low bits.
pub(crate) const PAGE_SLOTS: usize = 4096;
/// Slots of the cache of indirect branch targets.
pub(crate) const TARGETS: usize = 4096;

/// What generated code reaches of a window by constant displacements from one base: the read table, the write table, which
/// translated page each linear page is (0: not known), and where indirect branches lead (linear address, host address).
#[repr(C, align(4096))]
struct WindowTables {
    read: [Entry; ENTRIES],
    write: [Entry; ENTRIES],
    pages: [u32; PAGE_SLOTS],
    targets: [[u64; 2]; TARGETS],
}

/// An address that doesn't select slot 0, for the void slot 0 of the targets; in all other slots 0 is such an address.
const VOID_TARGET: [u64; 2] = [1, 0];

/// Displacement of the write table.
pub(crate) const WRITE_TABLE: usize = std::mem::offset_of!(WindowTables, write);
/// Displacement of the page identities.
pub(crate) const PAGE_TABLE: usize = std::mem::offset_of!(WindowTables, pages);
/// Displacement of the branch targets.
pub(crate) const TARGET_TABLE: usize = std::mem::offset_of!(WindowTables, targets);

/// The memory of a window's tables, freed with the last of its parts.
struct WindowMemory(NonNull<WindowTables>);
// SAFETY: the memory is owned; its parts are only ever used by the one processor that has the window.
unsafe impl Send for WindowMemory {}
// SAFETY: as above: nothing is accessed through a shared WindowMemory itself.
unsafe impl Sync for WindowMemory {}

impl WindowMemory {
    fn new() -> Arc<WindowMemory> {
        let layout = std::alloc::Layout::new::<WindowTables>();
        // SAFETY: the layout isn't empty; all-zero bytes are valid tables.
        let p = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<WindowTables>();
        let Some(p) = NonNull::new(p) else { std::alloc::handle_alloc_error(layout) };
        // SAFETY: as just allocated.
        unsafe { (*p.as_ptr()).targets[0] = VOID_TARGET };
        Arc::new(WindowMemory(p))
    }
}
impl Drop for WindowMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and nothing refers to it any more.
        unsafe { std::alloc::dealloc(self.0.as_ptr().cast(), std::alloc::Layout::new::<WindowTables>()) };
    }
}

/// A window's read table, write table and code table, in one piece of memory.
pub(crate) fn window_tables() -> (Table, Table, CodeTable) {
    let memory = WindowMemory::new();
    let p = memory.0.as_ptr();
    // SAFETY: fields of the live allocation; never null.
    let (read, write) =
        unsafe { (NonNull::new_unchecked(&raw mut (*p).read), NonNull::new_unchecked(&raw mut (*p).write)) };
    (
        Table::over(read, memory.clone()),
        Table::over(write, memory.clone()),
        CodeTable { memory, used: false, mode: 0 },
    )
}

/// Which translated pages and branch targets a window knows, for generated code.
pub(crate) struct CodeTable {
    memory: Arc<WindowMemory>,
    used: bool,
    /// The mode number that the page identities are of.
    pub mode: u32,
}

impl CodeTable {
    /// Where the window's tables begin: the base of generated code's accesses.
    pub(crate) fn base(&self) -> u64 {
        self.memory.0.as_ptr() as u64
    }
    #[inline]
    fn slot(linear: u64) -> usize {
        (linear >> 12) as usize & (PAGE_SLOTS - 1)
    }
    #[inline]
    fn pages(&mut self) -> &mut [u32; PAGE_SLOTS] {
        // SAFETY: live memory that only this CodeTable refers to.
        unsafe { &mut (*self.memory.0.as_ptr()).pages }
    }
    #[inline]
    fn targets(&mut self) -> &mut [[u64; 2]; TARGETS] {
        // SAFETY: as above.
        unsafe { &mut (*self.memory.0.as_ptr()).targets }
    }
    /// The identity in the slot of a linear address.
    #[inline]
    pub(crate) fn page(&mut self, linear: u64) -> u32 {
        self.pages()[Self::slot(linear)]
    }
    /// Enters an identity.
    pub(crate) fn set_page(&mut self, linear: u64, id: u32) {
        self.used = true;
        self.pages()[Self::slot(linear)] = id;
    }
    /// Forgets the identity in the slot of a linear address.
    pub(crate) fn drop_page(&mut self, linear: u64) {
        if self.used {
            self.pages()[Self::slot(linear)] = 0;
        }
    }
    /// Forgets all identities.
    pub(crate) fn clear(&mut self) {
        if self.used {
            self.pages().fill(0);
            self.used = false;
        }
    }
    /// Forgets the identity of a linear page, if it is this one.
    pub(crate) fn forget(&mut self, linear: u64, id: u32) {
        let slot = Self::slot(linear);
        if self.used && self.pages()[slot] == id {
            self.pages()[slot] = 0;
        }
    }
    /// Enters a branch target.
    pub(crate) fn set_target(&mut self, slot: usize, linear: u64, host: u64) {
        self.targets()[slot & (TARGETS - 1)] = [linear, host];
    }
    /// The host address that belongs to a branch target.
    pub(crate) fn target(&mut self, slot: usize, linear: u64) -> Option<u64> {
        let [known, host] = self.targets()[slot & (TARGETS - 1)];
        (known == linear && host != 0).then_some(host)
    }
    /// Forgets all branch targets.
    pub(crate) fn clear_targets(&mut self) {
        self.targets().fill([0; 2]);
        self.targets()[0] = VOID_TARGET;
    }
}

/// One direct-mapped table.
pub(crate) struct Table {
    entries: NonNull<[Entry; ENTRIES]>,
    /// Keeps `entries` alive.
    _memory: Arc<WindowMemory>,
    blocks: Vec<Arc<RamBlock>>,
    touched: Vec<u16>,
}

// SAFETY: the host addresses in the entries point into blocks that the table keeps alive and that any thread may access atomically.
unsafe impl Send for Table {}

/// A tag that no address which selects slot `i` can match.
const fn void(i: usize) -> Entry {
    Entry { tag: !((i as u64) << 12), host: 0 }
}

/// Fixed-width unsigned integers that guest memory is accessed by.
pub(crate) trait Scalar: Copy {
    /// Bytes.
    const SIZE: u64;
    /// Loads from host memory that other threads may write.
    /// # Safety
    /// `p` points to SIZE bytes of guest RAM; any alignment.
    unsafe fn load(p: *const u8) -> Self;
    /// Stores to host memory that other threads may access.
    /// # Safety
    /// `p` points to SIZE bytes of guest RAM; any alignment.
    unsafe fn store(p: *mut u8, v: Self);
    /// Locked compare and exchange; gives what was there. On x86 hosts any alignment works.
    /// # Safety
    /// `p` points to SIZE bytes of guest RAM.
    unsafe fn cmpxchg(p: *mut u8, old: Self, new: Self) -> Self;
    /// Stores the same value `count` times, upwards.
    /// # Safety
    /// `p` points to `count` * SIZE bytes of guest RAM; any alignment.
    unsafe fn fill(p: *mut u8, v: Self, count: u64);
}

macro_rules! scalar {
    ($t:ty, $atomic:ty, $size:literal, $reg:ident, $load:literal, $store:literal, $cas:literal, $fill:literal, $a:tt) => {
        impl Scalar for $t {
            const SIZE: u64 = $size;
            #[inline(always)]
            unsafe fn load(p: *const u8) -> $t {
                #[cfg(target_arch = "x86_64")]
                {
                    let v: $t;
                    // SAFETY: the caller's promise; a plain load, which unlike a Rust one may race and may be unaligned.
                    unsafe {
                        std::arch::asm!($load, out($reg) v, in(reg) p, options(nostack, preserves_flags, readonly));
                    }
                    v
                }
                #[cfg(not(target_arch = "x86_64"))]
                {
                    // SAFETY: the caller's promise; single bytes are always aligned.
                    let bytes = std::array::from_fn(|i| unsafe { std::ptr::read_volatile(p.add(i)) });
                    <$t>::from_le_bytes(bytes)
                }
            }
            #[inline(always)]
            unsafe fn store(p: *mut u8, v: $t) {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above, a plain store.
                unsafe {
                    std::arch::asm!($store, in($reg) v, in(reg) p, options(nostack, preserves_flags));
                }
                #[cfg(not(target_arch = "x86_64"))]
                for (i, b) in v.to_le_bytes().into_iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { std::ptr::write_volatile(p.add(i), b) };
                }
            }
            #[inline(always)]
            unsafe fn fill(p: *mut u8, v: $t, count: u64) {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the caller's promise; DF is clear in Rust code.
                unsafe {
                    std::arch::asm!($fill, inout("rcx") count => _, inout("rdi") p => _, in($a) v, options(nostack, preserves_flags));
                }
                #[cfg(not(target_arch = "x86_64"))]
                for i in 0..count {
                    // SAFETY: the caller's promise.
                    unsafe { Self::store(p.add((i * $size) as usize), v) };
                }
            }
            #[inline(always)]
            unsafe fn cmpxchg(p: *mut u8, old: $t, new: $t) -> $t {
                #[cfg(target_arch = "x86_64")]
                {
                    let was: $t;
                    // SAFETY: as above; lock cmpxchg works at any alignment.
                    unsafe {
                        std::arch::asm!($cas, in(reg) p, n = in($reg) new, inlateout($a) old => was, options(nostack));
                    }
                    was
                }
                #[cfg(not(target_arch = "x86_64"))]
                {
                            if (p as usize).is_multiple_of($size) {
                        // SAFETY: the caller's promise, and aligned.
                        let cell = unsafe { <$atomic>::from_ptr(p.cast()) };
                        return match cell.compare_exchange(old.to_le(), new.to_le(), SeqCst, SeqCst) {
                            Ok(v) | Err(v) => <$t>::from_le(v),
                        };
                    }
                    // SAFETY: as above. An unaligned locked access is not atomic on these hosts.
                    let was = unsafe { Self::load(p) };
                    if was == old {
                        // SAFETY: as above.
                        unsafe { Self::store(p, new) };
                    }
                    was
                }
            }
        }
    };
}
scalar!(
    u8,
    std::sync::atomic::AtomicU8,
    1,
    reg_byte,
    "mov {}, byte ptr [{}]",
    "mov byte ptr [{1}], {0}",
    "lock cmpxchg byte ptr [{0}], {n}",
    "rep stosb",
    "al"
);
scalar!(
    u16,
    std::sync::atomic::AtomicU16,
    2,
    reg,
    "mov {:x}, word ptr [{}]",
    "mov word ptr [{1}], {0:x}",
    "lock cmpxchg word ptr [{0}], {n:x}",
    "rep stosw",
    "ax"
);
scalar!(
    u32,
    std::sync::atomic::AtomicU32,
    4,
    reg,
    "mov {:e}, dword ptr [{}]",
    "mov dword ptr [{1}], {0:e}",
    "lock cmpxchg dword ptr [{0}], {n:e}",
    "rep stosd",
    "eax"
);
scalar!(
    u64,
    std::sync::atomic::AtomicU64,
    8,
    reg,
    "mov {}, qword ptr [{}]",
    "mov qword ptr [{1}], {0}",
    "lock cmpxchg qword ptr [{0}], {n}",
    "rep stosq",
    "rax"
);

impl Table {
    fn over(entries: NonNull<[Entry; ENTRIES]>, memory: Arc<WindowMemory>) -> Table {
        let mut table = Table { entries, _memory: memory, blocks: Vec::new(), touched: Vec::new() };
        table.entries_mut().iter_mut().enumerate().for_each(|(i, e)| *e = void(i));
        table
    }

    #[inline(always)]
    fn entries(&self) -> &[Entry; ENTRIES] {
        // SAFETY: `_memory` keeps them alive; besides this table only generated code reads them, on the same thread.
        unsafe { self.entries.as_ref() }
    }
    #[inline(always)]
    fn entries_mut(&mut self) -> &mut [Entry; ENTRIES] {
        Table::all(&mut self.entries)
    }
    #[inline(always)]
    fn all(entries: &mut NonNull<[Entry; ENTRIES]>) -> &mut [Entry; ENTRIES] {
        // SAFETY: as above.
        unsafe { entries.as_mut() }
    }

    /// The host address of `size` bytes at `linear` when the table maps them and they are within one page.
    #[inline(always)]
    fn find(&self, linear: u64, size: u64) -> Option<*mut u8> {
        let e = &self.entries()[(linear >> 12) as usize & (ENTRIES - 1)];
        let off = e.tag ^ linear;
        if off <= PAGE - size {
            // One comparison says both that the tag matches and that the access stays in the page.
            Some((e.host + off) as *mut u8)
        } else {
            None
        }
    }

    /// The host address of `size` bytes (at most a page) at `linear` for one instruction of the host that accesses them in the guest's
    /// stead, when the table maps them and they are within one page.
    #[inline(always)]
    pub(super) fn host(&self, linear: u64, size: u64) -> Option<*mut u8> {
        self.find(linear, size)
    }

    /// Loads, when the table maps the whole access.
    #[inline(always)]
    pub(crate) fn load<T: Scalar>(&self, linear: u64) -> Option<T> {
        let p = self.find(linear, T::SIZE)?;
        // SAFETY: the table's invariant (head of this file): SIZE bytes at `p` are inside of a live block.
        Some(unsafe { T::load(p) })
    }

    /// Stores, when the table maps the whole access.
    #[inline(always)]
    pub(crate) fn store<T: Scalar>(&self, linear: u64, v: T) -> bool {
        let Some(p) = self.find(linear, T::SIZE) else { return false };
        // SAFETY: as for load.
        unsafe { T::store(p, v) };
        true
    }

    /// Whether `size` bytes (at most a page) at `linear` are mapped and within one page.
    #[inline(always)]
    pub(crate) fn maps(&self, linear: u64, size: u64) -> bool {
        self.find(linear, size).is_some()
    }

    /// Copies out of one page; false when it isn't mapped or the bytes leave the page.
    pub(crate) fn read_bytes(&self, linear: u64, buf: &mut [u8]) -> bool {
        if buf.is_empty() || buf.len() as u64 > PAGE {
            return false;
        }
        let Some(p) = self.find(linear, buf.len() as u64) else { return false };
        // SAFETY: the invariant gives buf.len() readable bytes at p; buf is no guest memory. Other processors may write meanwhile,
        // as they may on hardware: the bytes are copied opaquely to the compiler, by a string instruction where there is one.
        unsafe { copy(buf.as_mut_ptr(), p, buf.len()) };
        true
    }

    /// Copies into one page; false when it isn't mapped or the bytes leave the page.
    pub(crate) fn write_bytes(&self, linear: u64, data: &[u8]) -> bool {
        if data.is_empty() || data.len() as u64 > PAGE {
            return false;
        }
        let Some(p) = self.find(linear, data.len() as u64) else { return false };
        // SAFETY: as above.
        unsafe { copy(p, data.as_ptr(), data.len()) };
        true
    }

    /// Copies `len` bytes upwards from a page of table `from` to a page of this table, byte after byte as REP MOVSB does (so that an
    /// overlap repeats). False when one isn't mapped or the bytes leave a page.
    /// Moved are elements of `element` bytes.
    pub(crate) fn copy_from(&self, to: u64, from_table: &Table, from: u64, len: u64, element: u64) -> bool {
        if len == 0 || len > PAGE {
            return false;
        }
        let (Some(d), Some(s)) = (self.find(to, len), from_table.find(from, len)) else { return false };
        let distance = (d as u64).wrapping_sub(s as u64);
        if distance != 0 && distance < element {
            // Elements that overlap their own destination are not the same as bytes.
            return false;
        }
        // SAFETY: as above; the copy goes upwards byte after byte whatever the overlap.
        unsafe { copy_string(d, s, len as usize) };
        true
    }

    /// Compares `count` elements upwards from `linear` with `v` up to the first that is equal (or, without `until_equal`, differs): how many were
    /// looked at, and the last one. None when the page isn't mapped or the elements leave it.
    pub(crate) fn scan_elements<T: Scalar + PartialEq>(
        &self,
        linear: u64,
        count: u64,
        v: T,
        until_equal: bool,
    ) -> Option<(u64, T)> {
        if count == 0 || count > PAGE / T::SIZE {
            return None;
        }
        let p = self.find(linear, count * T::SIZE)?;
        let mut n = 0;
        loop {
            // SAFETY: as above: all count * SIZE bytes are inside of the page.
            let element = unsafe { T::load(p.add((n * T::SIZE) as usize)) };
            n += 1;
            if n == count || (element == v) == until_equal {
                return Some((n, element));
            }
        }
    }

    /// Compares `count` elements upwards from two addresses up to the first pair that is equal (or, without `until_equal`, differs): how many
    /// pairs were looked at, and the last one. None when a page isn't mapped or the elements leave it.
    pub(crate) fn compare_elements<T: Scalar + PartialEq>(
        &self,
        a: u64,
        b: u64,
        count: u64,
        until_equal: bool,
    ) -> Option<(u64, T, T)> {
        if count == 0 || count > PAGE / T::SIZE {
            return None;
        }
        let (p, q) = (self.find(a, count * T::SIZE)?, self.find(b, count * T::SIZE)?);
        let mut n = 0;
        loop {
            let at = (n * T::SIZE) as usize;
            // SAFETY: as above, of both pages.
            let (x, y) = unsafe { (T::load(p.add(at)), T::load(q.add(at))) };
            n += 1;
            if n == count || (x == y) == until_equal {
                return Some((n, x, y));
            }
        }
    }

    /// Fills `count` elements upwards from `linear`. False when the page isn't mapped or the bytes leave it.
    pub(crate) fn fill_elements<T: Scalar>(&self, linear: u64, v: T, count: u64) -> bool {
        if count == 0 || count > PAGE / T::SIZE {
            return false;
        }
        let Some(p) = self.find(linear, count * T::SIZE) else { return false };
        // SAFETY: as above: all count * SIZE bytes are inside of the page.
        unsafe { T::fill(p, v, count) };
        true
    }

    /// Maps the page of `linear` to the page at `offset` (rounded down) of `block`.
    pub(crate) fn fill(&mut self, linear: u64, block: &Arc<RamBlock>, offset: u64) {
        let offset = offset & !(PAGE - 1);
        if offset.checked_add(PAGE).is_none_or(|end| end > block.len()) {
            return;
        }
        if !self.blocks.iter().any(|b| Arc::ptr_eq(b, block)) {
            self.blocks.push(block.clone());
        }
        let slot = (linear >> 12) as usize & (ENTRIES - 1);
        let e = &mut Table::all(&mut self.entries)[slot];
        if e.host == 0 {
            self.touched.push(slot as u16);
        }
        // Wrapping can't happen: the page is inside of the mapping.
        *e = Entry { tag: linear & !(PAGE - 1), host: (block.host_ptr() as u64).wrapping_add(offset) };
    }

    /// Voids the entry of the page of `linear`, if it is there.
    pub(crate) fn drop_page(&mut self, linear: u64) {
        let slot = (linear >> 12) as usize & (ENTRIES - 1);
        let e = &mut self.entries_mut()[slot];
        if e.tag == linear & !(PAGE - 1) {
            // The host address stays, so that the slot remains in the touched list just once.
            e.tag = void(slot).tag;
        }
    }

    /// Voids every entry for which `keep` says no to its linear page address.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(u64) -> bool) {
        let entries = Table::all(&mut self.entries);
        self.touched.retain(|slot| {
            let slot = usize::from(*slot) & (ENTRIES - 1);
            let e = &mut entries[slot];
            let kept = e.tag != void(slot).tag && keep(e.tag);
            if !kept {
                *e = void(slot);
            }
            kept
        });
    }

    /// Voids every entry that maps the page at `offset` of `block`.
    pub(crate) fn drop_host_page(&mut self, block: &RamBlock, offset: u64) {
        let host = (block.host_ptr() as u64).wrapping_add(offset & !(PAGE - 1));
        for slot in &self.touched {
            let slot = usize::from(*slot) & (ENTRIES - 1);
            let e = &mut Table::all(&mut self.entries)[slot];
            if e.host == host {
                e.tag = void(slot).tag;
            }
        }
    }

    /// Compares and exchanges 16 bytes (aligned) when the table maps them: what was there. Locked where the host can.
    pub(crate) fn cmpxchg16(&self, linear: u64, old: u128, new: u128) -> Option<u128> {
        let p = self.find(linear, 16).filter(|p| (*p as u64).is_multiple_of(16))?;
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("cmpxchg16b") {
            // SAFETY: as for load: 16 bytes, aligned; the host has the instruction.
            return Some(unsafe { exchange16(p.cast(), old, new) });
        }
        // SAFETY: as for load. Not atomic on such a host.
        let was = unsafe { u128::from(u64::load(p)) | u128::from(u64::load(p.add(8))) << 64 };
        if was == old {
            // SAFETY: as for store.
            unsafe {
                u64::store(p, new as u64);
                u64::store(p.add(8), (new >> 64) as u64);
            }
        }
        Some(was)
    }

    /// Changes a value by `f`, with one look-up, when the table maps the whole access; gives what `f` gives beside the new value. With
    /// `locked` the change is atomic and `f` may run more than once.
    #[inline(always)]
    pub(crate) fn update<T: Scalar + PartialEq, R>(
        &self,
        linear: u64,
        locked: bool,
        mut f: impl FnMut(T) -> (T, R),
    ) -> Option<R> {
        let p = self.find(linear, T::SIZE)?;
        // SAFETY: as for load.
        let mut old = unsafe { T::load(p) };
        if !locked {
            let (new, r) = f(old);
            // SAFETY: as for store.
            unsafe { T::store(p, new) };
            return Some(r);
        }
        loop {
            let (new, r) = f(old);
            // SAFETY: as for load.
            let was = unsafe { T::cmpxchg(p, old, new) };
            if was == old {
                return Some(r);
            }
            old = was;
        }
    }

    /// Voids all entries and lets the blocks go.
    pub(crate) fn clear(&mut self) {
        for slot in self.touched.drain(..) {
            let slot = usize::from(slot) & (ENTRIES - 1);
            Table::all(&mut self.entries)[slot] = void(slot);
        }
        self.blocks.clear();
    }
}

/// The host address of `size` bytes at `offset` of a block, when they are inside.
fn inside(ram: &RamBlock, offset: u64, size: u64) -> Option<*mut u8> {
    let end = offset.checked_add(size)?;
    (end <= ram.len()).then(|| (ram.host_ptr() as u64).wrapping_add(offset) as *mut u8)
}

/// Loads from a block by one access of the host, whatever the alignment.
pub(crate) fn ram_load<T: Scalar>(ram: &RamBlock, offset: u64) -> Option<T> {
    let p = inside(ram, offset, T::SIZE)?;
    // SAFETY: SIZE bytes at `p` are inside of the block, which lives for this call.
    Some(unsafe { T::load(p) })
}

/// Stores to a block by one access of the host, whatever the alignment, and says so to the block.
pub(crate) fn ram_store<T: Scalar>(ram: &RamBlock, offset: u64, v: T) -> Option<()> {
    let p = inside(ram, offset, T::SIZE)?;
    // SAFETY: as for ram_load.
    unsafe { T::store(p, v) };
    ram.mark_dirty(offset, T::SIZE);
    Some(())
}

/// Changes a value in a block by a locked access of the host, whatever the alignment, and says so to the block. `f` may run more than once.
pub(crate) fn ram_update<T: Scalar + PartialEq, R>(
    ram: &RamBlock,
    offset: u64,
    f: &mut impl FnMut(T) -> (T, R),
) -> Option<R> {
    let p = inside(ram, offset, T::SIZE)?;
    // SAFETY: as for ram_load.
    let mut old = unsafe { T::load(p) };
    loop {
        let (new, r) = f(old);
        // SAFETY: as for ram_load.
        let was = unsafe { T::cmpxchg(p, old, new) };
        if was == old {
            ram.mark_dirty(offset, T::SIZE);
            return Some(r);
        }
        old = was;
    }
}

/// Compares and exchanges 16 aligned bytes of a block, locked, and says so to the block. None: the host can't.
pub(crate) fn ram_exchange16(ram: &RamBlock, offset: u64, old: u128, new: u128) -> Option<u128> {
    #[cfg(target_arch = "x86_64")]
    if offset.is_multiple_of(16) && std::arch::is_x86_feature_detected!("cmpxchg16b") {
        let p = inside(ram, offset, 16)?;
        // SAFETY: 16 bytes inside of the block, aligned as the block's pages are; the host has the instruction.
        let was = unsafe { exchange16(p.cast(), old, new) };
        ram.mark_dirty(offset, 16);
        return Some(was);
    }
    let _ = (ram, offset, old, new);
    None
}

/// Copies upwards, byte after byte as seen from outside; the sizes of vector registers by whole registers' loads.
/// # Safety
/// `n` bytes at both pointers are accessible.
unsafe fn copy(to: *mut u8, from: *const u8, n: usize) {
    #[cfg(target_arch = "x86_64")]
    if n == 16 || n == 32 {
        // SAFETY: the caller's promise. Operands of one instruction never overlap: one side is no guest memory.
        unsafe {
            std::arch::asm!("movups {x}, [{f}]", "movups [{t}], {x}", x = out(xmm_reg) _, f = in(reg) from, t = in(reg) to, options(nostack, preserves_flags));
            if n == 32 {
                std::arch::asm!("movups {x}, [{f} + 16]", "movups [{t} + 16], {x}", x = out(xmm_reg) _, f = in(reg) from, t = in(reg) to, options(nostack, preserves_flags));
            }
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if n == 4 || n == 8 {
        // SAFETY: as above.
        unsafe { if n == 8 { u64::store(to, u64::load(from)) } else { u32::store(to, u32::load(from)) } }
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { copy_string(to, from, n) };
}

/// Copies upwards, byte after byte as seen from outside.
/// # Safety
/// `n` bytes at both pointers are accessible.
unsafe fn copy_string(to: *mut u8, from: *const u8, n: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; DF is clear in Rust code.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..n {
        // SAFETY: as above.
        unsafe { std::ptr::write_volatile(to.add(i), std::ptr::read_volatile(from.add(i))) };
    }
}

/// Locked compare and exchange of 16 bytes.
/// # Safety
/// `p` is aligned and points to 16 bytes of guest RAM; the host has CMPXCHG16B.
#[cfg(target_arch = "x86_64")]
unsafe fn exchange16(p: *mut u128, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: the caller's promise. RBX belongs to the compiler, so the low half goes there and back through RSI.
    unsafe {
        std::arch::asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            inout("rsi") new as u64 => _,
            in("rdi") p,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack)
        );
    }
    u128::from(high) << 64 | u128::from(low)
}
