//! Memory for translated code: a context page that generated code reaches relative to its own address, then code; the code is one
//! memfd mapped twice, readable and executable there, readable and writable here. And the stack that generated code runs on.

use super::context::Context;
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes kept for the context before the code.
const CONTEXT_BYTES: usize = 16 << 10;
/// Bytes of the stack of generated code.
const STACK_BYTES: usize = 256 << 10;
/// Bytes at the stack's low end that stay free for signal handlers.
const STACK_ROOM: usize = 64 << 10;

/// The mappings of one processor's translator.
pub(super) struct Arena {
    /// Context, then executable code.
    base: *mut u8,
    /// The code, writable.
    write: *mut u8,
    stack: *mut u8,
    size: usize,
    /// Bytes of code in use.
    pub used: usize,
}

// SAFETY: the mappings are owned and reached through the Arena (or by generated code that its owner runs) only.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps `size` bytes (a multiple of the page size, at most 1 GiB) for code.
    pub(super) fn new(size: usize) -> Result<Arena, rustix::io::Errno> {
        let fd = rustix::fs::memfd_create("hyaline-jit", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, size as u64)?;
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: fresh mappings at addresses that the kernel chooses; the fixed one replaces a part of the first.
        unsafe {
            let private = MapFlags::PRIVATE | MapFlags::NORESERVE;
            let base = rustix::mm::mmap_anonymous(std::ptr::null_mut(), CONTEXT_BYTES + size, rw, private)?
                .cast::<u8>();
            let exec = ProtFlags::READ | ProtFlags::EXEC;
            let fixed = MapFlags::SHARED | MapFlags::FIXED;
            rustix::mm::mmap(base.add(CONTEXT_BYTES).cast(), size, exec, fixed, &fd, 0)?;
            let write =
                rustix::mm::mmap(std::ptr::null_mut(), size, rw, MapFlags::SHARED, &fd, 0)?.cast::<u8>();
            let stack =
                rustix::mm::mmap_anonymous(std::ptr::null_mut(), STACK_BYTES, rw, private)?.cast::<u8>();
            let arena = Arena { base, write, stack, size, used: 0 };
            std::ptr::write(arena.context(), Context::default());
            Ok(arena)
        }
    }

    /// The context of generated code.
    pub(super) fn context(&self) -> *mut Context {
        const { assert!(size_of::<Context>() <= CONTEXT_BYTES) };
        self.base.cast()
    }
    /// The address at which the code at an offset runs.
    pub(super) fn exec(&self, offset: usize) -> u64 {
        self.base as u64 + (CONTEXT_BYTES + offset) as u64
    }
    /// Bytes left.
    pub(super) fn room(&self) -> usize {
        self.size - self.used
    }
    /// Bytes in all.
    pub(super) fn size(&self) -> usize {
        self.size
    }
    /// The stack's empty position and the lowest position that calls may push at.
    pub(super) fn stack(&self) -> (u64, u64) {
        (self.stack as u64 + STACK_BYTES as u64 - 64, self.stack as u64 + STACK_ROOM as u64)
    }
    /// Writes the sentinel that stands below every return pair.
    pub(super) fn set_sentinel(&mut self, host: u64) {
        let (top, _) = self.stack();
        // SAFETY: the 64 bytes above the empty position are inside of the stack.
        unsafe {
            std::ptr::write(top as *mut u64, host);
            // No address: not canonical.
            std::ptr::write((top + 8) as *mut u64, 1 << 63);
        }
    }
    /// Appends code; gives its offset. None when there is no room.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<usize> {
        if code.len() > self.room() {
            return None;
        }
        let at = self.used;
        // SAFETY: inside of the writable mapping by the test above.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(at), code.len()) };
        self.used += code.len();
        Some(at)
    }
    /// Makes the 32-bit displacement at offset `at` lead to offset `to`. The code isn't running (one thread).
    pub(super) fn patch_rel32(&mut self, at: usize, to: usize) {
        if at + 4 > self.size {
            return;
        }
        let rel = (to as i64 - (at as i64 + 4)) as i32;
        // SAFETY: inside of the writable mapping.
        unsafe { std::ptr::write_unaligned(self.write.add(at).cast::<i32>(), rel) };
    }
    /// Replaces code at an offset. It isn't running (one thread).
    pub(super) fn patch(&mut self, at: usize, code: &[u8]) {
        if at.checked_add(code.len()).is_none_or(|end| end > self.used) {
            return;
        }
        // SAFETY: inside of the writable mapping.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(at), code.len()) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mappings made in `new`; nothing runs there any more.
        unsafe {
            let _ = rustix::mm::munmap(self.base.cast(), CONTEXT_BYTES + self.size);
            let _ = rustix::mm::munmap(self.write.cast(), self.size);
            let _ = rustix::mm::munmap(self.stack.cast(), STACK_BYTES);
        }
    }
}
