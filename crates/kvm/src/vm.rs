//! A virtual machine of KVM: memory, interrupt controllers, what vCPUs share.

use crate::error::{KvmError, Skipped};
use crate::irq::Routing;
use crate::kick::Gate;
use crate::memory::{Map, SpaceListener};
use crate::ring::Ring;
use crate::system::{Kvm, KvmInner};
use hyaline_space::{AddressSpace, ListenerId};
use kvm_bindings as kb;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Where the interrupt controllers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Irqchip {
    /// Local APICs in the kernel; the 8259 pair, the 8254 and the I/O APIC are ours, and can be watched.
    #[default]
    Split,
    /// All in the kernel, the 8254 too.
    On,
    /// None in the kernel, local APICs neither.
    Off,
}

impl Irqchip {
    /// As `kernel-irqchip=` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Irqchip::Split => "split",
            Irqchip::On => "on",
            Irqchip::Off => "off",
        }
    }
}

/// How a virtual machine is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmOptions {
    /// Where the interrupt controllers are.
    pub irqchip: Irqchip,
    /// Number of vCPUs: 1 to 254, for the topology that CPUID tells.
    pub vcpus: u8,
    /// Writes to regions that ask for it may be collected in the kernel. They lose the exact instruction and vCPU.
    pub coalesced: bool,
    /// Writes that only signal an eventfd are taken by the kernel, without an exit, and so without an access record.
    pub ioeventfd: bool,
    /// Give out accesses to MSRs that the kernel doesn't know, as [`Exit::ReadMsr`](crate::Exit::ReadMsr) and
    /// [`Exit::WriteMsr`](crate::Exit::WriteMsr), instead of a general-protection fault.
    pub user_msrs: bool,
    /// Guest-physical address of four pages for the kernel's own use on older Intel processors; below 4 GiB, and no memory or device
    /// may be there.
    pub reserved_pages: u64,
}

impl Default for VmOptions {
    fn default() -> Self {
        VmOptions {
            irqchip: Irqchip::Split,
            vcpus: 1,
            coalesced: true,
            ioeventfd: true,
            user_msrs: false,
            reserved_pages: 0xfeff_c000,
        }
    }
}

/// Pins of the I/O APIC: GSIs 0 to 23 belong to it.
pub(crate) const IOAPIC_PINS: u32 = 24;

#[derive(Debug)]
pub(crate) struct VmInner {
    // Dropped first: the kernel must let go of guest memory before `map` lets go of the blocks.
    pub(crate) fd: kvm_ioctls::VmFd,
    pub(crate) kvm: Arc<KvmInner>,
    pub(crate) options: VmOptions,
    pub(crate) map: Mutex<Map>,
    pub(crate) gate: Gate,
    pub(crate) routing: Mutex<Routing>,
    pub(crate) ring: OnceLock<Ring>,
    pub(crate) skipped: Mutex<Vec<Skipped>>,
    /// A memory map that couldn't be carried out: no vCPU may run on it.
    failed: AtomicBool,
    errors: Mutex<Vec<KvmError>>,
}

impl VmInner {
    /// An error that makes going on wrong.
    pub(crate) fn fail(&self, error: KvmError) {
        self.failed.store(true, Ordering::SeqCst);
        self.report(error);
    }

    pub(crate) fn report(&self, error: KvmError) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if errors.len() < 1000 {
            errors.push(error);
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    pub(crate) fn lapic_in_kernel(&self) -> bool {
        self.options.irqchip != Irqchip::Off
    }
}

/// A virtual machine. Make the vCPUs with [`KvmVcpu::new`](crate::KvmVcpu::new).
pub struct KvmVm {
    pub(crate) inner: Arc<VmInner>,
    pub(crate) kvm: Kvm,
    attached: Mutex<Vec<(AddressSpace, ListenerId)>>,
}

impl KvmVm {
    /// Creates a virtual machine without memory.
    ///
    /// # Errors
    /// A capability that the options need is lacking, or a call fails.
    pub fn new(kvm: &Kvm, options: VmOptions) -> Result<KvmVm, KvmError> {
        let caps = kvm.capabilities();
        if options.vcpus == 0 || u32::from(options.vcpus) > caps.max_vcpus {
            return Err(KvmError::Unsuitable(format!(
                "{} vCPUs can't be had: this kernel's KVM allows 1 to {}",
                options.vcpus, caps.max_vcpus
            )));
        }
        if !options.reserved_pages.is_multiple_of(4096) || options.reserved_pages > 0xffff_c000 {
            return Err(KvmError::Unsuitable(format!(
                "the address {:#x} for the kernel's own four pages must be page aligned and below 4 GiB",
                options.reserved_pages
            )));
        }
        let fd = loop {
            match kvm.inner.fd.create_vm() {
                Ok(fd) => break fd,
                // The kernel gives up when a signal comes in between.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(KvmError::ioctl("KVM_CREATE_VM", "a new machine", error)),
            }
        };
        // Real mode on Intel processors without "unrestricted guest" (Linux, api.rst, KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR).
        // Both must come before the first vCPU.
        fd.set_identity_map_address(options.reserved_pages)
            .map_err(|e| KvmError::ioctl("KVM_SET_IDENTITY_MAP_ADDR", hex(options.reserved_pages), e))?;
        let tss = options.reserved_pages + 0x1000;
        fd.set_tss_address(tss as usize).map_err(|e| KvmError::ioctl("KVM_SET_TSS_ADDR", hex(tss), e))?;
        make_irqchip(&fd, &options, kvm)?;
        if options.user_msrs {
            need(
                caps.user_msrs,
                "KVM_CAP_X86_USER_SPACE_MSR",
                "MSRs that the kernel doesn't know",
                "use Linux 5.10 or later, or leave the option off",
            )?;
            let reasons = kb::KVM_MSR_EXIT_REASON_UNKNOWN | kb::KVM_MSR_EXIT_REASON_INVAL;
            enable(&fd, kb::KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR", reasons.into())?;
        }
        let inner = Arc::new(VmInner {
            fd,
            kvm: kvm.inner.clone(),
            routing: Mutex::new(Routing::new(options.irqchip, caps.irq_routes)),
            options,
            map: Mutex::default(),
            gate: Gate::default(),
            ring: OnceLock::new(),
            skipped: Mutex::default(),
            failed: AtomicBool::new(false),
            errors: Mutex::default(),
        });
        if inner.lapic_in_kernel() && caps.irq_routes > 0 {
            inner.routing.lock().unwrap_or_else(PoisonError::into_inner).apply(&inner)?;
        }
        Ok(KvmVm { inner, kvm: kvm.clone(), attached: Mutex::default() })
    }

    /// Makes the memory map and the ports' eventfds follow these address spaces from now on.
    ///
    /// # Errors
    /// The first thing that failed with the present map. Later failures are told by [`KvmVm::take_errors`], and stop the vCPUs.
    pub fn attach(&self, memory: &AddressSpace, ports: &AddressSpace) -> Result<(), KvmError> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        for (space, is_ports) in [(memory, false), (ports, true)] {
            let id = space.add_listener(Arc::new(SpaceListener { vm: self.inner.clone(), ports: is_ports }));
            attached.push((space.clone(), id));
        }
        match self.take_errors().into_iter().next() {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// How the machine was made.
    pub fn options(&self) -> &VmOptions {
        &self.inner.options
    }

    /// The KVM it is on.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// What failed since the last call, in changes of the memory map or while fetching dirty logs.
    pub fn take_errors(&self) -> Vec<KvmError> {
        std::mem::take(&mut *self.inner.errors.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the kernel refused since the last call and was done without.
    pub fn take_skipped(&self) -> Vec<Skipped> {
        std::mem::take(&mut *self.inner.skipped.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Number of memory slots in use.
    pub fn memory_slots(&self) -> usize {
        self.inner.slot_count()
    }

    /// The guest's clock of the paravirtual kind (kvm-clock) in nanoseconds.
    ///
    /// # Errors
    /// The call fails.
    pub fn clock(&self) -> Result<u64, KvmError> {
        let clock =
            self.inner.fd.get_clock().map_err(|e| KvmError::ioctl("KVM_GET_CLOCK", "the machine", e))?;
        Ok(clock.clock)
    }

    /// Sets the guest's kvm-clock, in nanoseconds.
    ///
    /// # Errors
    /// The call fails.
    pub fn set_clock(&self, nanoseconds: u64) -> Result<(), KvmError> {
        let clock = kb::kvm_clock_data { clock: nanoseconds, ..Default::default() };
        self.inner.fd.set_clock(&clock).map_err(|e| KvmError::ioctl("KVM_SET_CLOCK", nanoseconds, e))
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        let attached = std::mem::take(&mut *self.attached.lock().unwrap_or_else(PoisonError::into_inner));
        for (space, id) in attached {
            space.remove_listener(id);
        }
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

fn need(
    ok: bool,
    capability: &'static str,
    what: &'static str,
    advice: &'static str,
) -> Result<(), KvmError> {
    if ok { Ok(()) } else { Err(KvmError::Capability { capability, what, advice }) }
}

fn enable(fd: &kvm_ioctls::VmFd, capability: u32, name: &'static str, argument: u64) -> Result<(), KvmError> {
    let mut request = kb::kvm_enable_cap { cap: capability, ..Default::default() };
    request.args[0] = argument;
    fd.enable_cap(&request)
        .map_err(|e| KvmError::ioctl("KVM_ENABLE_CAP", format_args!("{name} = {argument:#x}"), e))
}

fn make_irqchip(fd: &kvm_ioctls::VmFd, options: &VmOptions, kvm: &Kvm) -> Result<(), KvmError> {
    let caps = kvm.capabilities();
    match options.irqchip {
        Irqchip::Off => Ok(()),
        Irqchip::Split => {
            let advice = "use Linux 4.4 or later, or kernel-irqchip=off";
            let what = "local APICs in the kernel with our own I/O APIC (kernel-irqchip=split)";
            need(caps.split_irqchip, "KVM_CAP_SPLIT_IRQCHIP", what, advice)?;
            need(caps.signal_msi, "KVM_CAP_SIGNAL_MSI", what, advice)?;
            need(caps.irq_routes > IOAPIC_PINS, "KVM_CAP_IRQ_ROUTING", what, advice)?;
            enable(fd, kb::KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP", IOAPIC_PINS.into())
        }
        Irqchip::On => {
            let advice = "use kernel-irqchip=split or kernel-irqchip=off";
            let what = "interrupt controllers in the kernel (kernel-irqchip=on)";
            need(caps.irqchip, "KVM_CAP_IRQCHIP", what, advice)?;
            need(caps.pit2, "KVM_CAP_PIT2", what, advice)?;
            fd.create_irq_chip()
                .map_err(|e| KvmError::ioctl("KVM_CREATE_IRQCHIP", "PIC, I/O APIC, local APICs", e))?;
            // The speaker port 61h is answered by the kernel too: it shows the 8254's output.
            let pit = kb::kvm_pit_config { flags: kb::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(pit).map_err(|e| KvmError::ioctl("KVM_CREATE_PIT2", "the 8254", e))
        }
    }
}
