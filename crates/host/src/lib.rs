//! The host's side: terminal, sockets, files, signals.

#![allow(unsafe_code)]

pub mod chardev;
pub mod signals;
pub mod terminal;

/// Seconds that the host's local time is ahead of UTC now.
pub fn local_time_offset() -> i64 {
    // SAFETY: `tm` is plain data that localtime_r fills in; both pointers are valid for the call.
    unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut tm: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut tm).is_null() { 0 } else { tm.tm_gmtoff }
    }
}
