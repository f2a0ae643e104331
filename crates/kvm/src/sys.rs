//! The ioctls that the wrapper crate lacks or wraps too narrowly.
//!
//! Numbers: Linux, `include/uapi/linux/kvm.h`; encoding: `include/uapi/asm-generic/ioctl.h`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const fn encode(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}
const fn none(number: u64) -> u64 {
    encode(0, number, 0)
}
const fn write<T>(number: u64) -> u64 {
    encode(1, number, size_of::<T>())
}
const fn read<T>(number: u64) -> u64 {
    encode(2, number, size_of::<T>())
}

pub(crate) const RUN: u64 = none(0x80);
pub(crate) const GET_DIRTY_LOG: u64 = write::<kvm_bindings::kvm_dirty_log>(0x42);
pub(crate) const IRQFD: u64 = write::<kvm_bindings::kvm_irqfd>(0x76);
pub(crate) const IOEVENTFD: u64 = write::<kvm_bindings::kvm_ioeventfd>(0x79);
pub(crate) const INTERRUPT: u64 = write::<kvm_bindings::kvm_interrupt>(0x86);
pub(crate) const SETUP_MCE: u64 = write::<u64>(0x9c);
pub(crate) const SET_XSAVE: u64 = write::<kvm_bindings::kvm_xsave>(0xa5);
pub(crate) const GET_XSAVE: u64 = read::<kvm_bindings::kvm_xsave>(0xa4);
pub(crate) const GET_SREGS2: u64 = read::<kvm_bindings::kvm_sregs2>(0xcc);
pub(crate) const SET_SREGS2: u64 = write::<kvm_bindings::kvm_sregs2>(0xcd);
pub(crate) const GET_XSAVE2: u64 = read::<kvm_bindings::kvm_xsave>(0xcf);

/// An ioctl without argument structure; gives its result.
pub(crate) fn ioctl_value(fd: BorrowedFd<'_>, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the requests used here take an integer, not a pointer, so the kernel touches no memory of ours except
    // what was registered with it before (guest memory, the vCPU's run page).
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::c_ulong, argument as libc::c_ulong) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl that reads or writes one structure.
///
/// # Safety
/// `argument` points to what `request` reads or writes, large enough for it, and valid for that.
pub(crate) unsafe fn ioctl_pointer<T>(fd: BorrowedFd<'_>, request: u64, argument: *mut T) -> io::Result<i32> {
    // SAFETY: by the contract of this function.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::c_ulong, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl that reads one structure of exactly the size encoded in the request.
pub(crate) fn ioctl_in<T: Copy>(fd: BorrowedFd<'_>, request: u64, argument: &T) -> io::Result<i32> {
    let mut copy = *argument;
    check::<T>(request)?;
    // SAFETY: `copy` lives through the call, and the size the kernel copies is the one encoded in the request, which is T's.
    unsafe { ioctl_pointer(fd, request, &raw mut copy) }
}

/// An ioctl that fills one structure of exactly the size encoded in the request.
pub(crate) fn ioctl_out<T: Copy + Default>(fd: BorrowedFd<'_>, request: u64) -> io::Result<T> {
    let mut value = T::default();
    check::<T>(request)?;
    // SAFETY: as in `ioctl_in`; T is plain data of the kernel's interface, for which any bytes are valid.
    unsafe { ioctl_pointer(fd, request, &raw mut value) }?;
    Ok(value)
}

fn check<T>(request: u64) -> io::Result<()> {
    if (request >> 16 & 0x3fff) as usize == size_of::<T>() {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn request_numbers() {
        // Values as a C program prints them from the kernel's header.
        assert_eq!(super::RUN, 0xae80);
        assert_eq!(super::INTERRUPT, 0x4004_ae86);
        assert_eq!(super::IOEVENTFD, 0x4040_ae79);
        assert_eq!(super::IRQFD, 0x4020_ae76);
        assert_eq!(super::GET_DIRTY_LOG, 0x4010_ae42);
        assert_eq!(super::GET_SREGS2, 0x8140_aecc);
        assert_eq!(super::GET_XSAVE2, 0x9000_aecf);
        assert_eq!(super::SETUP_MCE, 0x4008_ae9c);
    }
}
