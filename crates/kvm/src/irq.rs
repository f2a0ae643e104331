//! Interrupts: messages, routes (GSIs), eventfds, pins of controllers in the kernel.
//!
//! Message format: SDM vol. 3A §11.11 ("Message Signalled Interrupts"). Routes: Linux, `Documentation/virt/kvm/api.rst`,
//! `KVM_SET_GSI_ROUTING`, `KVM_IRQFD`, `KVM_SIGNAL_MSI`, and for the end of interrupts with a split controller
//! `KVM_CAP_SPLIT_IRQCHIP`: the kernel exits with `KVM_EXIT_IOAPIC_EOI` for a vector when a route of the first GSIs, which stand
//! for the I/O APIC's pins, has a level-triggered message with that vector.

use crate::error::KvmError;
use crate::memory::fd_of;
use crate::sys;
use crate::vm::{IOAPIC_PINS, Irqchip, KvmVm, VmInner};
use hyaline_device::{ApicMessage, Delivery};
use kvm_bindings as kb;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{MutexGuard, PoisonError};

/// A message-signalled interrupt: `data` written to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Address, 0xfee00000 to 0xfeefffff.
    pub address: u64,
    /// Data.
    pub data: u32,
}

impl Msi {
    /// The message that does what a message on the APIC bus says. None for an EOI, for a destination that doesn't fit
    /// (above 255), for start-up IPIs, which only a local APIC sends, and for ExtINT, whose vector is the 8259's to tell.
    pub fn from_apic(message: &ApicMessage) -> Option<Msi> {
        let ApicMessage::Deliver { destination, logical, mode, vector, level, except: None } = *message
        else {
            return None;
        };
        let mode = match mode {
            Delivery::Fixed => 0,
            Delivery::LowestPriority => 1,
            Delivery::Smi => 2,
            Delivery::Nmi => 4,
            Delivery::Init => 5,
            Delivery::StartUp | Delivery::ExtInt => return None,
        };
        let destination = u8::try_from(destination).ok()?;
        // Redirection hint (bit 3) with lowest priority; destination mode in bit 2.
        let address =
            0xfee0_0000 | u64::from(destination) << 12 | u64::from(mode == 1) << 3 | u64::from(logical) << 2;
        // Trigger mode in bit 15, level (asserted) in bit 14.
        let data = u32::from(vector) | mode << 8 | u32::from(level) << 14 | u32::from(level) << 15;
        Some(Msi { address, data })
    }

    /// Level-triggered: its end is to be told.
    pub fn is_level(&self) -> bool {
        self.data & 1 << 15 != 0
    }

    /// Vector.
    pub fn vector(&self) -> u8 {
        self.data as u8
    }
}

/// The number of an interrupt route ("global system interrupt").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gsi(pub u32);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Route {
    /// Pins of controllers in the kernel: chip and pin.
    Pins(Vec<(u32, u32)>),
    Message(Msi),
}

/// The table of routes.
#[derive(Debug)]
pub(crate) struct Routing {
    routes: BTreeMap<u32, Route>,
    limit: u32,
    /// Split: which of the I/O APIC's GSIs was used last, oldest first.
    levels: Vec<u32>,
}

impl Routing {
    pub(crate) fn new(irqchip: Irqchip, limit: u32) -> Routing {
        let mut routes = BTreeMap::new();
        if irqchip == Irqchip::On {
            for gsi in 0..IOAPIC_PINS {
                let pins = pc_pins(gsi);
                if !pins.is_empty() {
                    routes.insert(gsi, Route::Pins(pins));
                }
            }
        }
        let levels = if irqchip == Irqchip::Split { (0..IOAPIC_PINS).collect() } else { Vec::new() };
        Routing { routes, limit, levels }
    }

    /// Takes a free GSI above those of the I/O APIC.
    fn take(&mut self, route: Route) -> Result<Gsi, KvmError> {
        let gsi = (IOAPIC_PINS..self.limit)
            .find(|gsi| !self.routes.contains_key(gsi))
            .ok_or(KvmError::Routes { limit: self.limit })?;
        self.routes.insert(gsi, route);
        Ok(Gsi(gsi))
    }

    /// Puts a level-triggered message among the I/O APIC's GSIs, in place of the one that was longest out of use. True when
    /// the table changed.
    fn learn(&mut self, msi: Msi) -> bool {
        let wanted = Route::Message(msi);
        let at = self.levels.iter().position(|gsi| self.routes.get(gsi) == Some(&wanted));
        let gsi = self.levels.remove(at.unwrap_or(0));
        self.levels.push(gsi);
        if at.is_none() {
            self.routes.insert(gsi, wanted);
        }
        at.is_none()
    }

    /// Hands the whole table to the kernel.
    pub(crate) fn apply(&self, vm: &VmInner) -> Result<(), KvmError> {
        let mut entries = Vec::new();
        for (&gsi, route) in &self.routes {
            match route {
                Route::Pins(pins) => entries.extend(pins.iter().map(|&(irqchip, pin)| {
                    let mut entry = kb::kvm_irq_routing_entry {
                        gsi,
                        type_: kb::KVM_IRQ_ROUTING_IRQCHIP,
                        ..Default::default()
                    };
                    entry.u.irqchip = kb::kvm_irq_routing_irqchip { irqchip, pin };
                    entry
                })),
                Route::Message(msi) => {
                    let mut entry = kb::kvm_irq_routing_entry {
                        gsi,
                        type_: kb::KVM_IRQ_ROUTING_MSI,
                        ..Default::default()
                    };
                    entry.u.msi = kb::kvm_irq_routing_msi {
                        address_lo: msi.address as u32,
                        address_hi: (msi.address >> 32) as u32,
                        data: msi.data,
                        ..Default::default()
                    };
                    entries.push(entry);
                }
            }
        }
        let what = format!("{} entries", entries.len());
        let table =
            kb::KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::Routes { limit: self.limit })?;
        vm.fd.set_gsi_routing(&table).map_err(|e| KvmError::ioctl("KVM_SET_GSI_ROUTING", what, e))
    }
}

/// Where the PC's interrupt line `gsi` goes with all controllers in the kernel: 8259 pins, and I/O APIC pins with line 0
/// (the 8254) on pin 2, as the board's ACPI tables tell.
fn pc_pins(gsi: u32) -> Vec<(u32, u32)> {
    let mut pins = Vec::new();
    match gsi {
        2 => return pins,
        0..=7 => pins.push((kb::KVM_IRQCHIP_PIC_MASTER, gsi)),
        8..=15 => pins.push((kb::KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
        _ => {}
    }
    pins.push((kb::KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    pins
}

impl KvmVm {
    fn routing(&self) -> Result<MutexGuard<'_, Routing>, KvmError> {
        if !self.inner.lapic_in_kernel() {
            return Err(no_lapic());
        }
        Ok(self.inner.routing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a message-signalled interrupt. Gives whether a local APIC took it (false: masked, or nobody has this destination).
    ///
    /// # Errors
    /// Without local APICs in the kernel, or when the call fails.
    pub fn signal_msi(&self, msi: Msi) -> Result<bool, KvmError> {
        if !self.inner.lapic_in_kernel() {
            return Err(no_lapic());
        }
        let request = kb::kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        self.inner.fd.signal_msi(request).map(|taken| taken > 0).map_err(|e| {
            KvmError::ioctl(
                "KVM_SIGNAL_MSI",
                format_args!("address {:#x}, data {:#x}", msi.address, msi.data),
                e,
            )
        })
    }

    /// Delivers what an I/O APIC of ours sends to the local APICs in the kernel. For level-triggered interrupts it sees to it that
    /// their end comes as [`Exit::ApicEoi`](crate::Exit::ApicEoi). Gives whether a local APIC took it.
    ///
    /// # Errors
    /// A message that no message-signalled interrupt can express (start-up, ExtINT, EOI, a destination above 255), or a call that fails.
    pub fn deliver(&self, message: &ApicMessage) -> Result<bool, KvmError> {
        let msi = Msi::from_apic(message).ok_or_else(|| {
            KvmError::Unsuitable(format!(
                "the message {message:?} can't be sent to local APICs in the kernel"
            ))
        })?;
        if msi.is_level() && self.inner.options.irqchip == Irqchip::Split {
            let mut routing = self.routing()?;
            if routing.learn(msi) {
                routing.apply(&self.inner)?;
            }
        }
        self.signal_msi(msi)
    }

    /// Makes a route to a message, for an irqfd.
    ///
    /// # Errors
    /// All routes are in use, or the call fails (the route is then free again).
    pub fn add_msi_route(&self, msi: Msi) -> Result<Gsi, KvmError> {
        let mut routing = self.routing()?;
        let gsi = routing.take(Route::Message(msi))?;
        routing.apply(&self.inner).inspect_err(|_| {
            routing.routes.remove(&gsi.0);
        })?;
        Ok(gsi)
    }

    /// Changes the message of a route.
    ///
    /// # Errors
    /// There is no such route, or the call fails.
    pub fn update_msi_route(&self, gsi: Gsi, msi: Msi) -> Result<(), KvmError> {
        let mut routing = self.routing()?;
        match routing.routes.get_mut(&gsi.0) {
            Some(route @ Route::Message(_)) if gsi.0 >= IOAPIC_PINS => *route = Route::Message(msi),
            _ => return Err(no_route(gsi)),
        }
        routing.apply(&self.inner)
    }

    /// Frees a route; its number will be used again. Unbind its irqfd first.
    ///
    /// # Errors
    /// There is no such route, or the call fails.
    pub fn free_route(&self, gsi: Gsi) -> Result<(), KvmError> {
        let mut routing = self.routing()?;
        if gsi.0 < IOAPIC_PINS || routing.routes.remove(&gsi.0).is_none() {
            return Err(no_route(gsi));
        }
        routing.apply(&self.inner)
    }

    /// Has a signal on an eventfd raise the route's interrupt without any thread of ours. With `resample` the interrupt is
    /// level-triggered: it is lowered when the guest ends it, and the second eventfd is signalled so that the device can raise it again.
    ///
    /// # Errors
    /// The capability is lacking, or the call fails.
    pub fn bind_irqfd(&self, gsi: Gsi, fd: impl AsFd, resample: Option<&dyn AsFd>) -> Result<(), KvmError> {
        let caps = &self.inner.kvm.caps;
        if !caps.irqfd || resample.is_some() && !caps.irqfd_resample {
            return Err(KvmError::Capability {
                capability: if caps.irqfd { "KVM_CAP_IRQFD_RESAMPLE" } else { "KVM_CAP_IRQFD" },
                what: "interrupts by eventfd",
                advice: "deliver them from a thread of the machine",
            });
        }
        let mut request =
            kb::kvm_irqfd { fd: fd.as_fd().as_raw_fd() as u32, gsi: gsi.0, ..Default::default() };
        if let Some(resample) = resample {
            request.flags = kb::KVM_IRQFD_FLAG_RESAMPLE;
            request.resamplefd = resample.as_fd().as_raw_fd() as u32;
        }
        if !self.inner.lapic_in_kernel() {
            return Err(no_lapic());
        }
        sys::ioctl_in(fd_of(&self.inner), sys::IRQFD, &request)
            .map(|_| ())
            .map_err(|e| KvmError::call("KVM_IRQFD", format_args!("binding GSI {}", gsi.0), e))
    }

    /// Takes an eventfd off a route.
    ///
    /// # Errors
    /// The call fails.
    pub fn unbind_irqfd(&self, gsi: Gsi, fd: impl AsFd) -> Result<(), KvmError> {
        let request = kb::kvm_irqfd {
            fd: fd.as_fd().as_raw_fd() as u32,
            gsi: gsi.0,
            flags: kb::KVM_IRQFD_FLAG_DEASSIGN,
            ..Default::default()
        };
        sys::ioctl_in(fd_of(&self.inner), sys::IRQFD, &request)
            .map(|_| ())
            .map_err(|e| KvmError::call("KVM_IRQFD", format_args!("unbinding GSI {}", gsi.0), e))
    }

    /// Drives a line of the PC's controllers in the kernel (kernel-irqchip=on), 0 to 23.
    ///
    /// # Errors
    /// The controllers aren't in the kernel, or the call fails.
    pub fn set_line(&self, gsi: Gsi, level: bool) -> Result<(), KvmError> {
        if self.inner.options.irqchip != Irqchip::On {
            return Err(KvmError::Unsuitable(format!(
                "interrupt line {} can't be driven in the kernel: with kernel-irqchip={} the controllers are the machine's own",
                gsi.0,
                self.inner.options.irqchip.as_str()
            )));
        }
        self.inner
            .fd
            .set_irq_line(gsi.0, level)
            .map_err(|e| KvmError::ioctl("KVM_IRQ_LINE", format_args!("line {} to {level}", gsi.0), e))
    }
}

fn no_lapic() -> KvmError {
    KvmError::Unsuitable(
        "with kernel-irqchip=off the kernel has no local APIC that could take the interrupt; give it to the machine's own, or use \
         kernel-irqchip=split"
            .into(),
    )
}

fn no_route(gsi: Gsi) -> KvmError {
    KvmError::Unsuitable(format!("there is no message route with the number {}", gsi.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(mode: Delivery, level: bool) -> ApicMessage {
        ApicMessage::Deliver { destination: 3, logical: true, mode, vector: 0x41, level, except: None }
    }

    #[test]
    fn messages_as_the_manual_lays_them_out() {
        let msi = Msi::from_apic(&message(Delivery::Fixed, false));
        assert_eq!(msi, Some(Msi { address: 0xfee0_3004, data: 0x41 }));
        let msi = Msi::from_apic(&message(Delivery::LowestPriority, true));
        assert_eq!(msi, Some(Msi { address: 0xfee0_300c, data: 0xc141 }));
        assert_eq!(Msi::from_apic(&message(Delivery::ExtInt, false)), None);
        assert_eq!(Msi::from_apic(&ApicMessage::Eoi { vector: 3 }), None);
    }

    #[test]
    fn routes_are_limited_and_reused() {
        let mut routing = Routing::new(Irqchip::Split, IOAPIC_PINS + 2);
        let route = || Route::Message(Msi { address: 0xfee0_0000, data: 0x30 });
        assert_eq!(routing.take(route()).ok(), Some(Gsi(24)));
        assert_eq!(routing.take(route()).ok(), Some(Gsi(25)));
        assert!(matches!(routing.take(route()), Err(KvmError::Routes { limit: 26 })));
        routing.routes.remove(&24);
        assert_eq!(routing.take(route()).ok(), Some(Gsi(24)));
    }

    #[test]
    fn level_messages_are_learnt_and_the_oldest_is_forgotten() {
        let mut routing = Routing::new(Irqchip::Split, 100);
        let msi = |vector: u32| Msi { address: 0xfee0_0000, data: 0xc000 | vector };
        for vector in 0..24 {
            assert!(routing.learn(msi(0x30 + vector)));
        }
        assert!(!routing.learn(msi(0x30)), "known");
        assert!(routing.learn(msi(0x90)), "new: takes the place of 0x31");
        assert!(!routing.learn(msi(0x30)), "still known");
        assert!(routing.learn(msi(0x31)), "was forgotten");
        assert_eq!(routing.routes.len(), 24);
    }

    #[test]
    fn the_timer_is_on_pin_2() {
        assert_eq!(pc_pins(0), [(kb::KVM_IRQCHIP_PIC_MASTER, 0), (kb::KVM_IRQCHIP_IOAPIC, 2)]);
        assert_eq!(pc_pins(2), []);
        assert_eq!(pc_pins(9), [(kb::KVM_IRQCHIP_PIC_SLAVE, 1), (kb::KVM_IRQCHIP_IOAPIC, 9)]);
        assert_eq!(pc_pins(20), [(kb::KVM_IRQCHIP_IOAPIC, 20)]);
    }
}
