//! Executable memory for thunks: one memfd mapped twice, readable and writable here, readable and executable there.
//!
//! The arena has a fixed size and only grows. Its first slot is scratch space: when the arena is full, a thunk is
//! written there and run under the arena's lock, so that a guest which makes up encodings without end becomes slow,
//! but never wrong and never hungry.

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Address space for thunks. Pages are only touched when thunks are written there.
const SIZE: usize = 32 << 20;
/// Bytes of the scratch slot; also the longest thunk.
pub(super) const MAX_THUNK: usize = 2048;

/// The arena: see the module's text.
pub(super) struct Arena {
    write: NonNull<u8>,
    exec: NonNull<u8>,
    used: usize,
}

// SAFETY: the two pointers name mappings of the whole process that live until it ends; all access goes through the
// Mutex around the Arena.
unsafe impl Send for Arena {}

/// Why there is no executable memory.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The kernel refused.
    #[error(
        "the kernel gave no executable memory for vector instructions ({0}); allow memfd_create and executable shared \
         mappings for this process (a seccomp filter, SELinux's execmem or a noexec policy may forbid them)"
    )]
    Refused(#[from] rustix::io::Errno),
}

static ARENA: OnceLock<Result<Mutex<Arena>, ArenaError>> = OnceLock::new();

/// Locks the arena, made at the first call.
pub(super) fn lock() -> Result<MutexGuard<'static, Arena>, &'static ArenaError> {
    match ARENA.get_or_init(|| Arena::new().map(Mutex::new)) {
        Ok(arena) => Ok(arena.lock().unwrap_or_else(|poisoned| poisoned.into_inner())),
        Err(error) => Err(error),
    }
}

impl Arena {
    fn new() -> Result<Arena, ArenaError> {
        let file = rustix::fs::memfd_create(c"hyaline-thunks", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, SIZE as u64)?;
        // SAFETY: fresh mappings at addresses of the kernel's choice; nothing else is there.
        let (write, exec) = unsafe {
            let map = |protection| {
                rustix::mm::mmap(std::ptr::null_mut(), SIZE, protection, MapFlags::SHARED, &file, 0)
            };
            (map(ProtFlags::READ | ProtFlags::WRITE)?, map(ProtFlags::READ | ProtFlags::EXEC)?)
        };
        let some = |p: *mut core::ffi::c_void| NonNull::new(p.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM);
        Ok(Arena { write: some(write)?, exec: some(exec)?, used: MAX_THUNK })
    }

    /// Writes `code` to fresh memory that stays as it is for ever. None when the arena is full.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<*const u8> {
        // 16-byte slots: thunks are entered at the start of a fetch block.
        let start = self.used.next_multiple_of(16);
        if code.len() > MAX_THUNK || start + code.len() > SIZE {
            return None;
        }
        self.used = start + code.len();
        Some(self.put(start, code))
    }

    /// Writes `code` to the scratch slot. It may be run only while the arena's lock is held.
    pub(super) fn scratch(&mut self, code: &[u8]) -> *const u8 {
        let code = &code[..code.len().min(MAX_THUNK)];
        let at = self.put(0, code);
        // The slot held other code: a serializing instruction makes the processor forget what it fetched (SDM vol. 3A
        // §8.1.3, cross-modifying code through another linear address).
        let _ = std::arch::x86_64::__cpuid(0);
        at
    }

    fn put(&mut self, start: usize, code: &[u8]) -> *const u8 {
        // SAFETY: `start + code.len()` is at most SIZE (checked by `add`, by MAX_THUNK for `scratch`), the length of both
        // mappings; `&mut self` makes this the only writer, and no reader runs memory that is still to be handed out.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(start), code.len());
            self.exec.as_ptr().add(start)
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn code_runs_where_it_was_put() {
        // mov eax, 42; ret
        let code = [0xb8, 42, 0, 0, 0, 0xc3];
        let at = super::lock().unwrap().add(&code).unwrap();
        // SAFETY: the bytes above are a whole function of this type.
        let f: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
        assert_eq!(f(), 42);
        let mut arena = super::lock().unwrap();
        for n in [7u8, 9] {
            let at = arena.scratch(&[0xb8, n, 0, 0, 0, 0xc3]);
            // SAFETY: as above; the lock is held.
            let f: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
            assert_eq!(f(), u32::from(n));
        }
    }
}
