//! What can go wrong with KVM, in words.

use std::fmt;

/// A call to KVM that failed, or a wish that this kernel's KVM can't fulfil.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device file isn't there.
    #[error(
        "{path} does not exist: {hint}. Load the kernel module kvm_intel or kvm_amd, switch on virtualization (VT-x, SVM) in the firmware's \
         set-up, or run without KVM (-accel interp)"
    )]
    Missing {
        /// The device file.
        path: String,
        /// What the host's processor says about virtualization.
        hint: &'static str,
    },
    /// The user may not open the device file.
    #[error("no permission to open {path}, which belongs to group `{group}` with mode {mode:04o}: {advice}")]
    Permission {
        /// The device file.
        path: String,
        /// The group that the file belongs to, by name or else by number.
        group: String,
        /// Permission bits of the file.
        mode: u32,
        /// What to do.
        advice: String,
    },
    /// Somebody else uses the processor's virtualization.
    #[error(
        "{path} is busy: another hypervisor uses the processor's virtualization extensions; stop it, or run without KVM (-accel interp)"
    )]
    Busy {
        /// The device file.
        path: String,
    },
    /// Opening failed for another reason.
    #[error("{path} can't be opened: {source}")]
    Open {
        /// The device file.
        path: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// The kernel speaks another version of the interface.
    #[error(
        "{path} speaks KVM's interface version {found}; this program needs version 12, which all Linux kernels since 2.6.22 have"
    )]
    Version {
        /// The device file.
        path: String,
        /// What it said.
        found: i32,
    },
    /// A capability that can't be done without is lacking.
    #[error("this kernel's KVM lacks {capability}, which is needed for {what}; {advice}")]
    Capability {
        /// Name of the capability.
        capability: &'static str,
        /// What needs it.
        what: &'static str,
        /// What to try instead.
        advice: &'static str,
    },
    /// A call failed.
    #[error("KVM call {call} failed ({what}): {source}")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// Object and values.
        what: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// More memory slots are needed than the kernel has.
    #[error("the memory map needs {needed} memory slots, KVM has {limit}; use fewer regions of memory")]
    Slots {
        /// How many are needed.
        needed: usize,
        /// How many there are.
        limit: usize,
    },
    /// All interrupt routes are in use.
    #[error("all {limit} interrupt routes (GSIs) of KVM are in use; free one that no device needs any more")]
    Routes {
        /// How many there are.
        limit: u32,
    },
    /// The operation doesn't go with the way the virtual machine was made.
    #[error("{0}")]
    Unsuitable(String),
}

impl KvmError {
    pub(crate) fn call(call: &'static str, what: impl fmt::Display, source: std::io::Error) -> KvmError {
        KvmError::Call { call, what: what.to_string(), source }
    }

    /// From an error of the wrapper crate.
    pub(crate) fn ioctl(call: &'static str, what: impl fmt::Display, error: kvm_ioctls::Error) -> KvmError {
        KvmError::call(call, what, std::io::Error::from_raw_os_error(error.errno()))
    }

    /// The host's error number, when a call failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            KvmError::Call { source, .. } | KvmError::Open { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Something that the kernel refused and that was done without: one plain sentence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skipped(pub String);

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
