//! The ring of collected ("coalesced") writes: what the guest wrote to zones that ask for it, without an exit each.
//!
//! One ring per machine, a page that can be mapped from any vCPU (Linux, `Documentation/virt/kvm/api.rst`,
//! `KVM_REGISTER_COALESCED_MMIO`; layout: `struct kvm_coalesced_mmio_ring`). The kernel adds at `last`, we take at `first`.

use crate::error::KvmError;
use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

const PAGE: usize = 4096;
const ENTRIES: usize = (PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

#[derive(Debug)]
pub(crate) struct Ring {
    page: NonNull<u8>,
    /// Who takes: one at a time, so that the writes stay in order.
    taking: Mutex<()>,
}

// SAFETY: the mapping lives as long as the value; its indices are accessed as atomics, its entries only under `taking`.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

/// A collected write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) addr: u64,
    pub(crate) port: bool,
    pub(crate) data: [u8; 8],
    /// 1 to 8.
    pub(crate) len: usize,
}

impl Ring {
    /// Maps the ring from a vCPU; `page` is what the capability said.
    pub(crate) fn map(vcpu: BorrowedFd<'_>, page: u32) -> Result<Ring, KvmError> {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                i64::from(page) * PAGE as i64,
            )
        };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => {
                Ok(Ring { page: start.cast(), taking: Mutex::new(()) })
            }
            _ => Err(KvmError::call("mmap", "the ring of collected writes", std::io::Error::last_os_error())),
        }
    }

    fn index(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: `offset` is 0 or 4, inside of the page and aligned; both sides access it as an atomic word.
        unsafe { AtomicU32::from_ptr(self.page.as_ptr().add(offset).cast()) }
    }

    /// Is anything there? Cheap.
    pub(crate) fn is_empty(&self) -> bool {
        self.index(0).load(Ordering::Relaxed) == self.index(4).load(Ordering::Acquire)
    }

    /// Hands out what is there, in order. Other threads that come meanwhile wait.
    pub(crate) fn drain(&self, mut each: impl FnMut(Write)) {
        if self.is_empty() {
            return;
        }
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        // As many as there can be: writes that come while we take are left to the next time.
        for _ in 0..ENTRIES {
            let first = self.index(0).load(Ordering::Relaxed) as usize;
            if first == self.index(4).load(Ordering::Acquire) as usize || first >= ENTRIES {
                return;
            }
            let offset = size_of::<kvm_coalesced_mmio_ring>() + first * size_of::<kvm_coalesced_mmio>();
            // SAFETY: `first` is below the number of entries; the kernel doesn't write an entry between `first` and `last`.
            let entry =
                unsafe { self.page.as_ptr().add(offset).cast::<kvm_coalesced_mmio>().read_unaligned() };
            self.index(0).store(((first + 1) % ENTRIES) as u32, Ordering::Release);
            // SAFETY: both members of the union are 32-bit integers.
            let port = unsafe { entry.__bindgen_anon_1.pio } != 0;
            let len = (entry.len as usize).clamp(1, 8);
            each(Write { addr: entry.phys_addr, port, data: entry.data, len });
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}
