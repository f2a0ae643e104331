//! The KVM device: opening it, and what this kernel can do.

use crate::cpuid::{self, CpuidLeaf};
use crate::error::KvmError;
use crate::rules::Rules;
use kvm_bindings as kb;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// What this kernel's KVM can do (`KVM_CHECK_EXTENSION`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Highest number of vCPUs of one machine.
    pub max_vcpus: u32,
    /// Number of memory slots.
    pub memory_slots: u32,
    /// Slots can be read-only (`KVM_CAP_READONLY_MEM`).
    pub readonly_memory: bool,
    /// Interrupt controllers in the kernel.
    pub irqchip: bool,
    /// Local APICs in the kernel, the rest outside (`KVM_CAP_SPLIT_IRQCHIP`).
    pub split_irqchip: bool,
    /// The 8254 in the kernel (`KVM_CAP_PIT2`).
    pub pit2: bool,
    /// Number of interrupt routes (GSIs); 0: no routing.
    pub irq_routes: u32,
    /// Interrupts by eventfd.
    pub irqfd: bool,
    /// Level-triggered interrupts by eventfd, with a second eventfd for the end of interrupt.
    pub irqfd_resample: bool,
    /// Message-signalled interrupts by a call.
    pub signal_msi: bool,
    /// Writes that signal an eventfd without an exit.
    pub ioeventfd: bool,
    /// Such writes of any size (length 0).
    pub ioeventfd_any_length: bool,
    /// Page offset of the ring of collected writes; 0: none.
    pub coalesced_mmio: u32,
    /// Port writes can be collected too.
    pub coalesced_pio: bool,
    /// Register sets that the run page can hold at each exit: `KVM_SYNC_X86_*` bits.
    pub sync_regs: u32,
    /// The flag `immediate_exit` of the run page.
    pub immediate_exit: bool,
    /// XSAVE state can be read and written.
    pub xsave: bool,
    /// Size in bytes of the XSAVE state of a vCPU with all that this kernel permits; at least 4096.
    pub xsave_size: u32,
    /// `KVM_GET_XSAVE2` is there.
    pub xsave2: bool,
    /// Extended control registers can be read and written.
    pub xcrs: bool,
    /// `KVM_GET_SREGS2` is there (page directory pointers of PAE paging).
    pub sregs2: bool,
    /// Events under delivery can be read and written.
    pub vcpu_events: bool,
    /// The interrupt shadow is among the events.
    pub interrupt_shadow: bool,
    /// Debug registers can be read and written.
    pub debug_registers: bool,
    /// A debugger can single-step and set breakpoints.
    pub guest_debug: bool,
    /// System-management mode.
    pub smm: bool,
    /// The local APIC timer's TSC-deadline mode.
    pub tsc_deadline: bool,
    /// The guest's TSC frequency can be chosen.
    pub tsc_control: bool,
    /// Number of machine-check banks; 0: none.
    pub mce_banks: u32,
    /// MSRs that the kernel doesn't know can be handed out.
    pub user_msrs: bool,
    /// NMIs by a call.
    pub nmi: bool,
}

/// The open KVM device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Kvm {
    pub(crate) inner: Arc<KvmInner>,
}

#[derive(Debug)]
pub(crate) struct KvmInner {
    pub(crate) fd: kvm_ioctls::Kvm,
    pub(crate) caps: Capabilities,
    pub(crate) msrs: BTreeSet<u32>,
    pub(crate) supported: Vec<CpuidLeaf>,
    rules: OnceLock<Rules>,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// No such file, no permission (with the group to join), busy, another interface version, a capability that can't be done
    /// without: each says what to do.
    pub fn open() -> Result<Kvm, KvmError> {
        Kvm::open_at("/dev/kvm")
    }

    /// Opens another device file that speaks KVM's interface.
    ///
    /// # Errors
    /// As [`Kvm::open`].
    pub fn open_at(path: &str) -> Result<Kvm, KvmError> {
        let name = std::ffi::CString::new(path).map_err(|_| KvmError::Open {
            path: path.into(),
            source: std::io::Error::from_raw_os_error(libc::EINVAL),
        })?;
        let fd = kvm_ioctls::Kvm::new_with_path(&name).map_err(|error| open_error(path, error.errno()))?;
        let found = fd.get_api_version();
        if found != kb::KVM_API_VERSION as i32 {
            return Err(KvmError::Version { path: path.into(), found });
        }
        let caps = probe(&fd);
        let need = |ok: bool, capability, what, advice| {
            if ok { Ok(()) } else { Err(KvmError::Capability { capability, what, advice }) }
        };
        need(
            caps.memory_slots > 0,
            "KVM_CAP_USER_MEMORY",
            "giving the guest memory",
            "use a kernel of this century",
        )?;
        need(
            caps.immediate_exit,
            "KVM_CAP_IMMEDIATE_EXIT",
            "stopping a running vCPU without losing the request",
            "use Linux 4.12 or later",
        )?;
        let msrs = fd
            .get_msr_index_list()
            .map_err(|error| KvmError::ioctl("KVM_GET_MSR_INDEX_LIST", path, error))?
            .as_slice()
            .iter()
            .copied()
            .collect();
        let supported = fd
            .get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| KvmError::ioctl("KVM_GET_SUPPORTED_CPUID", path, error))?
            .as_slice()
            .iter()
            .map(cpuid::from_kvm)
            .collect();
        Ok(Kvm { inner: Arc::new(KvmInner { fd, caps, msrs, supported, rules: OnceLock::new() }) })
    }

    /// What this kernel can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.inner.caps
    }

    /// The CPUID leaves that this kernel can give to a guest (`KVM_GET_SUPPORTED_CPUID`), without topology. TSC-deadline is added
    /// by [`cpuid::host_model`](crate::cpuid::host_model).
    pub fn supported_cpuid(&self) -> &[CpuidLeaf] {
        &self.inner.supported
    }

    /// The MSRs that this kernel counts as a guest's state.
    pub fn msr_list(&self) -> &BTreeSet<u32> {
        &self.inner.msrs
    }

    /// Where the instruction pointer stands at each kind of exit: tried out once per process with a tiny guest.
    pub(crate) fn rules(&self) -> &Rules {
        self.inner.rules.get_or_init(|| Rules::measure(&self.inner.fd).unwrap_or_default())
    }
}

fn probe(fd: &kvm_ioctls::Kvm) -> Capabilities {
    let ask = |capability: u32| fd.check_extension_raw(capability.into()).max(0) as u32;
    let has = |capability: u32| ask(capability) > 0;
    // A vCPU count of 0 means 4, by the kernel's documentation of KVM_CAP_NR_VCPUS.
    let recommended = if ask(kb::KVM_CAP_NR_VCPUS) == 0 { 4 } else { ask(kb::KVM_CAP_NR_VCPUS) };
    Capabilities {
        max_vcpus: if has(kb::KVM_CAP_MAX_VCPUS) { ask(kb::KVM_CAP_MAX_VCPUS) } else { recommended },
        memory_slots: match (has(kb::KVM_CAP_USER_MEMORY), ask(kb::KVM_CAP_NR_MEMSLOTS)) {
            (false, _) => 0,
            (true, 0) => 32,
            (true, n) => n,
        },
        readonly_memory: has(kb::KVM_CAP_READONLY_MEM),
        irqchip: has(kb::KVM_CAP_IRQCHIP),
        split_irqchip: has(kb::KVM_CAP_SPLIT_IRQCHIP),
        pit2: has(kb::KVM_CAP_PIT2),
        irq_routes: ask(kb::KVM_CAP_IRQ_ROUTING),
        irqfd: has(kb::KVM_CAP_IRQFD),
        irqfd_resample: has(kb::KVM_CAP_IRQFD_RESAMPLE),
        signal_msi: has(kb::KVM_CAP_SIGNAL_MSI),
        ioeventfd: has(kb::KVM_CAP_IOEVENTFD),
        ioeventfd_any_length: has(kb::KVM_CAP_IOEVENTFD_ANY_LENGTH),
        coalesced_mmio: ask(kb::KVM_CAP_COALESCED_MMIO),
        coalesced_pio: has(kb::KVM_CAP_COALESCED_PIO),
        sync_regs: ask(kb::KVM_CAP_SYNC_REGS),
        immediate_exit: has(kb::KVM_CAP_IMMEDIATE_EXIT),
        xsave: has(kb::KVM_CAP_XSAVE),
        xsave_size: ask(kb::KVM_CAP_XSAVE2).max(4096),
        xsave2: has(kb::KVM_CAP_XSAVE2),
        xcrs: has(kb::KVM_CAP_XCRS),
        sregs2: has(kb::KVM_CAP_SREGS2),
        vcpu_events: has(kb::KVM_CAP_VCPU_EVENTS),
        interrupt_shadow: has(kb::KVM_CAP_INTR_SHADOW),
        debug_registers: has(kb::KVM_CAP_DEBUGREGS),
        guest_debug: has(kb::KVM_CAP_SET_GUEST_DEBUG),
        smm: has(kb::KVM_CAP_X86_SMM),
        tsc_deadline: has(kb::KVM_CAP_TSC_DEADLINE_TIMER),
        tsc_control: has(kb::KVM_CAP_TSC_CONTROL),
        mce_banks: ask(kb::KVM_CAP_MCE),
        user_msrs: has(kb::KVM_CAP_X86_USER_SPACE_MSR),
        nmi: has(kb::KVM_CAP_USER_NMI),
    }
}

/// Puts words to a failed `open`.
fn open_error(path: &str, errno: i32) -> KvmError {
    let source = std::io::Error::from_raw_os_error(errno);
    match errno {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => {
            KvmError::Missing { path: path.into(), hint: virtualization_hint() }
        }
        libc::EACCES | libc::EPERM => match std::fs::metadata(path) {
            Ok(meta) => permission_error(path, meta.gid(), meta.mode() & 0o7777),
            Err(_) => KvmError::Open { path: path.into(), source },
        },
        libc::EBUSY => KvmError::Busy { path: path.into() },
        _ => KvmError::Open { path: path.into(), source },
    }
}

fn permission_error(path: &str, gid: u32, mode: u32) -> KvmError {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let group = group_name(&groups, gid).unwrap_or_else(|| gid.to_string());
    let advice = if mode & 0o060 == 0o060 && gid != 0 {
        format!(
            "join the group with `sudo usermod -aG {group} \"$USER\"` and log in again, or run without KVM (-accel interp)"
        )
    } else {
        format!(
            "the group may not read and write it either; give it to a group with `sudo chgrp kvm {path} && sudo chmod 660 {path}`, join that \
             group, or run without KVM (-accel interp)"
        )
    };
    KvmError::Permission { path: path.into(), group, mode, advice }
}

/// Finds a group's name in the text of `/etc/group` (group(5): name:password:GID:members).
fn group_name(groups: &str, gid: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut parts = line.split(':');
        let name = parts.next()?;
        (parts.nth(1)?.parse() == Ok(gid)).then(|| name.to_string())
    })
}

fn virtualization_hint() -> &'static str {
    if !Path::new("/proc/cpuinfo").exists() {
        return "this system doesn't say what its processor can do";
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        "the processor has virtualization, so the kernel's module is not loaded"
    } else {
        "the processor shows no virtualization (vmx or svm) to this system"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_device_says_what_to_do() {
        let error = Kvm::open_at("/nonexistent/kvm").unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, KvmError::Missing { .. }), "{text}");
        assert!(text.starts_with("/nonexistent/kvm does not exist: "), "{text}");
        assert!(text.contains("kvm_intel or kvm_amd") && text.contains("-accel interp"), "{text}");
    }

    #[test]
    fn no_permission_names_the_group() {
        assert_eq!(group_name("root:x:0:\nkvm:x:104:me\n", 104).as_deref(), Some("kvm"));
        assert_eq!(group_name("root:x:0:\nkvm", 104), None);
        let text = permission_error("/dev/kvm", 0, 0o600).to_string();
        assert!(text.contains("belongs to group `root` with mode 0600"), "{text}");
        assert!(text.contains("chgrp kvm"), "{text}");
        let text = permission_error("/dev/kvm", 4_000_000_000, 0o660).to_string();
        assert!(text.contains("usermod -aG 4000000000"), "{text}");
        assert!(matches!(open_error("/dev/kvm", libc::EBUSY), KvmError::Busy { .. }));
    }

    #[test]
    fn another_file_is_refused() {
        // /dev/null opens, and knows no ioctl: its "version" is -1.
        assert!(matches!(Kvm::open_at("/dev/null"), Err(KvmError::Version { found: -1, .. })));
    }
}
