//! The memory map's listener: slots, dirty logs, eventfds on writes, collected writes.

use crate::error::{KvmError, Skipped};
use crate::slots::{Piece, Plan, Slot, merge, plan};
use crate::sys;
use crate::vm::VmInner;
use hyaline_ram::DirtyClient;
use hyaline_space::{AddrRange, IoEventFd, Listener, Section};
use kvm_bindings as kb;
use kvm_ioctls::IoEventAddress;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, MutexGuard, PoisonError};

/// What the kernel knows of guest memory.
#[derive(Debug, Default)]
pub(crate) struct Map {
    /// Memory as the listener was told of it, by address.
    pieces: BTreeMap<u64, Piece>,
    /// The kernel's slots by address.
    slots: BTreeMap<u64, Slot>,
    /// Numbers of slots that were used and are free.
    free: Vec<u32>,
    /// The first number that was never used.
    next: u32,
    changed: bool,
}

impl Map {
    fn take_id(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }
}

/// Listens to the space of memory or to that of ports.
pub(crate) struct SpaceListener {
    pub(crate) vm: Arc<VmInner>,
    pub(crate) ports: bool,
}

/// Does logging for these clients need KVM's log? Not for the software CPU's own.
fn logs(clients: u8) -> bool {
    clients & !DirtyClient::CODE != 0
}

impl SpaceListener {
    fn map(&self) -> MutexGuard<'_, Map> {
        self.vm.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_log(&self, section: &Section, clients: u8) {
        if self.ports {
            return;
        }
        let mut map = self.map();
        if let Some(piece) = Piece::of(section, logs(clients))
            && let Some(have) = map.pieces.get_mut(&piece.gpa)
            && have.log != piece.log
        {
            have.log = piece.log;
            map.changed = true;
        }
    }
}

impl Listener for SpaceListener {
    fn region_add(&self, section: &Section) {
        if self.ports {
            return;
        }
        if let Some(piece) = Piece::of(section, logs(section.log)) {
            let mut map = self.map();
            map.pieces.insert(piece.gpa, piece);
            map.changed = true;
        }
    }

    fn region_del(&self, section: &Section) {
        if self.ports {
            return;
        }
        if let Some(piece) = Piece::of(section, false) {
            let mut map = self.map();
            map.pieces.remove(&piece.gpa);
            map.changed = true;
        }
    }

    fn log_start(&self, section: &Section, _old: u8, new: u8) {
        self.set_log(section, new);
    }

    fn log_stop(&self, section: &Section, _old: u8, new: u8) {
        self.set_log(section, new);
    }

    fn log_sync(&self, section: &Section) {
        if self.ports {
            return;
        }
        let map = self.map();
        let slots = map.slots.values().filter(|slot| {
            let last = slot.piece.gpa + (slot.piece.size - 1);
            slot.piece.log && slot.piece.gpa <= section.range.last && section.range.start <= last
        });
        for slot in slots {
            if let Err(error) = fetch_log(&self.vm, slot) {
                self.vm.report(error);
            }
        }
    }

    fn ioeventfd_add(&self, _section: &Section, event: &IoEventFd) {
        if self.vm.options.ioeventfd && self.vm.kvm.caps.ioeventfd {
            set_ioeventfd(&self.vm, self.ports, event, false);
        }
    }

    fn ioeventfd_del(&self, _section: &Section, event: &IoEventFd) {
        if self.vm.options.ioeventfd && self.vm.kvm.caps.ioeventfd {
            set_ioeventfd(&self.vm, self.ports, event, true);
        }
    }

    fn coalesced_add(&self, _section: &Section, range: AddrRange) {
        self.zone(range, true);
    }

    fn coalesced_del(&self, _section: &Section, range: AddrRange) {
        self.zone(range, false);
    }

    fn commit(&self) {
        if self.ports {
            return;
        }
        let mut map = self.map();
        if !std::mem::take(&mut map.changed) {
            return;
        }
        let want = merge(map.pieces.values());
        let limit = self.vm.kvm.caps.memory_slots as usize;
        if want.len() > limit {
            self.vm.fail(KvmError::Slots { needed: want.len(), limit });
            return;
        }
        let plan = plan(&map.slots, &want);
        let vm = &self.vm;
        let result = if plan.disruptive {
            vm.gate.with_closed(|| carry_out(vm, &mut map, plan))
        } else {
            carry_out(vm, &mut map, plan)
        };
        if let Err(error) = result {
            vm.fail(error);
        }
    }
}

impl SpaceListener {
    fn zone(&self, range: AddrRange, add: bool) {
        let caps = &self.vm.kvm.caps;
        if !self.vm.options.coalesced || caps.coalesced_mmio == 0 || self.ports && !caps.coalesced_pio {
            return;
        }
        let Ok(size) = u32::try_from(range.size()) else {
            self.vm.skip(format!("writes to {range} can't be collected: the range has 4 GiB or more"));
            return;
        };
        let address =
            if self.ports { IoEventAddress::Pio(range.start) } else { IoEventAddress::Mmio(range.start) };
        let result = if add {
            self.vm.fd.register_coalesced_mmio(address, size)
        } else {
            self.vm.fd.unregister_coalesced_mmio(address, size)
        };
        if let Err(error) = result {
            let verb = if add { "collected" } else { "delivered one by one again" };
            self.vm.skip(format!("writes to {range} can't be {verb}: the kernel refused ({error})"));
        }
    }
}

fn carry_out(vm: &VmInner, map: &mut Map, plan: Plan) -> Result<(), KvmError> {
    for slot in plan.delete {
        // What was written through the slot would be lost with it.
        if slot.piece.log {
            fetch_log(vm, &slot)?;
        }
        set_slot(vm, &Slot { id: slot.id, piece: Piece { size: 0, ..slot.piece.clone() } })?;
        map.slots.remove(&slot.piece.gpa);
        map.free.push(slot.id);
    }
    for slot in plan.flag {
        if !slot.piece.log {
            fetch_log(vm, &slot)?;
        }
        set_slot(vm, &slot)?;
        map.slots.insert(slot.piece.gpa, slot);
    }
    for piece in plan.create {
        if piece.readonly && !vm.kvm.caps.readonly_memory {
            return Err(KvmError::Capability {
                capability: "KVM_CAP_READONLY_MEM",
                what: "ROM",
                advice: "use Linux 3.7 or later",
            });
        }
        let slot = Slot { id: map.take_id(), piece };
        if let Err(error) = set_slot(vm, &slot) {
            map.free.push(slot.id);
            return Err(error);
        }
        map.slots.insert(slot.piece.gpa, slot);
    }
    Ok(())
}

fn set_slot(vm: &VmInner, slot: &Slot) -> Result<(), KvmError> {
    let piece = &slot.piece;
    let mut flags = 0;
    if piece.readonly {
        flags |= kb::KVM_MEM_READONLY;
    }
    if piece.log {
        flags |= kb::KVM_MEM_LOG_DIRTY_PAGES;
    }
    let region = kb::kvm_userspace_memory_region {
        slot: slot.id,
        flags,
        guest_phys_addr: piece.gpa,
        memory_size: piece.size,
        userspace_addr: piece.block.host_ptr() as u64 + piece.offset,
    };
    // SAFETY: the range is inside of the block (checked when the piece was made), and the block is kept alive by the map of slots,
    // which lives as long as the VM's file descriptor. Guest memory is shared memory by nature: all of this program accesses it as
    // such, through `RamBlock`.
    unsafe { vm.fd.set_user_memory_region(region) }.map_err(|error| {
        KvmError::ioctl(
            "KVM_SET_USER_MEMORY_REGION",
            format_args!(
                "slot {}, guest address {:#x}, {:#x} bytes of `{}` from offset {:#x}{}{}",
                slot.id,
                piece.gpa,
                piece.size,
                piece.block.name(),
                piece.offset,
                if piece.readonly { ", read-only" } else { "" },
                if piece.log { ", logged" } else { "" },
            ),
            error,
        )
    })
}

/// Takes a slot's dirty log from the kernel into the block's dirty bits.
fn fetch_log(vm: &VmInner, slot: &Slot) -> Result<(), KvmError> {
    let pages = slot.piece.size / 4096;
    let mut bitmap = vec![0u64; pages.div_ceil(64) as usize];
    let mut request = kb::kvm_dirty_log { slot: slot.id, ..Default::default() };
    request.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: the kernel writes one bit per page of the slot, rounded up to 64, which is what the vector holds.
    unsafe { sys::ioctl_pointer(fd_of(vm), sys::GET_DIRTY_LOG, &raw mut request) }
        .map_err(|error| KvmError::call("KVM_GET_DIRTY_LOG", format_args!("slot {}", slot.id), error))?;
    for (word, mut bits) in bitmap.into_iter().enumerate() {
        while bits != 0 {
            let first = bits.trailing_zeros();
            let run = (bits >> first).trailing_ones();
            let page = word as u64 * 64 + u64::from(first);
            slot.piece.block.mark_dirty(slot.piece.offset + page * 4096, u64::from(run) * 4096);
            bits = if first + run >= 64 { 0 } else { bits >> (first + run) << (first + run) };
        }
    }
    Ok(())
}

fn set_ioeventfd(vm: &VmInner, ports: bool, event: &IoEventFd, remove: bool) {
    // Without an eventfd the dispatcher wakes it, after an exit.
    let Some(fd) = event.notify.event_fd() else { return };
    if event.size == 0 && (event.match_value.is_some() || !vm.kvm.caps.ioeventfd_any_length) {
        vm.skip(format!(
            "the eventfd at {:#x} is signalled after an exit: KVM can't match a value without a size",
            event.addr
        ));
        return;
    }
    let mut flags = 0;
    if event.match_value.is_some() {
        flags |= 1 << kb::kvm_ioeventfd_flag_nr_datamatch;
    }
    if ports {
        flags |= 1 << kb::kvm_ioeventfd_flag_nr_pio;
    }
    if remove {
        flags |= 1 << kb::kvm_ioeventfd_flag_nr_deassign;
    }
    let request = kb::kvm_ioeventfd {
        datamatch: event.match_value.unwrap_or(0),
        addr: event.addr,
        len: event.size.into(),
        fd: fd.as_raw_fd(),
        flags,
        ..Default::default()
    };
    match sys::ioctl_in(fd_of(vm), sys::IOEVENTFD, &request) {
        Ok(_) => {}
        // It was refused when it was added, and that was told.
        Err(error) if remove && error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => vm.skip(format!(
            "the eventfd at {:#x} ({} bytes) is signalled after an exit: the kernel refused it ({error})",
            event.addr, event.size
        )),
    }
}

pub(crate) fn fd_of(vm: &VmInner) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the VM's and stays open as long as `vm` is borrowed.
    unsafe { BorrowedFd::borrow_raw(vm.fd.as_raw_fd()) }
}

impl VmInner {
    /// How many slots the kernel has now.
    pub(crate) fn slot_count(&self) -> usize {
        self.map.lock().unwrap_or_else(PoisonError::into_inner).slots.len()
    }

    /// Something the kernel refused and that was done without.
    pub(crate) fn skip(&self, text: String) {
        let mut skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = Skipped(text);
        if !skipped.contains(&entry) && skipped.len() < 1000 {
            skipped.push(entry);
        }
    }
}
