//! Memory slots, dirty logs, eventfds on writes, collected writes.

mod common;
use common::*;
use hyaline_kvm::{Exit, Irqchip, VmOptions};
use hyaline_ram::{DirtyClient, RamBlock};
use hyaline_space::{
    ExitKind::MmioWrite, ExitKind::PioOut, Io, IoError, Notify, Origin, Region, transaction,
};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

fn off() -> VmOptions {
    VmOptions { irqchip: Irqchip::Off, ..VmOptions::default() }
}

#[test]
fn slots_follow_the_map() {
    let Some(kvm) = kvm("slots_follow_the_map") else { return };
    let mut m = machine(&kvm, off());
    // RAM below the device, between device and ROM, the ROM, RAM above.
    assert_eq!(m.vm.memory_slots(), 4);
    // mov al, [0x5000]; out 0x10, al; jmp
    let code = [0xa0, 0x00, 0x50, 0xe6, 0x10, 0xf4];
    m.board.ram.write(0x5000, &[0x11]).unwrap();
    m.start(&code, &real_mode());
    assert!(matches!(m.run(), Exit::Halted));
    // A cover of other memory.
    let other = RamBlock::new("other", 0x1000).unwrap();
    other.write(0, &[0x22]).unwrap();
    let cover = Region::ram("cover", other.clone(), 0, 0x1000);
    m.board.root.add(0x5000, &cover, 2).unwrap();
    assert_eq!(m.vm.memory_slots(), 6);
    m.start(&code, &real_mode());
    assert!(matches!(m.run(), Exit::Halted));
    // Gone again, together with another change: one commit.
    {
        let _together = transaction();
        cover.set_enabled(false);
        m.board.device.set_enabled(false);
    }
    assert_eq!(m.vm.memory_slots(), 3);
    m.start(&code, &real_mode());
    assert!(matches!(m.run(), Exit::Halted));
    let values: Vec<_> = m.board.take_log().iter().map(|e| e.value).collect();
    assert_eq!(values, [0x11, 0x22, 0x11]);
    assert!(m.vm.take_errors().is_empty());
}

#[test]
fn the_map_changes_under_a_running_guest() {
    let Some(kvm) = kvm("the_map_changes_under_a_running_guest") else { return };
    let mut m = machine(&kvm, off());
    // inc byte [0x3000]; jmp: it lives in the slot that is taken apart and put together.
    m.start(&[0xfe, 0x06, 0x00, 0x30, 0xeb, 0xfa], &real_mode());
    let handle = m.vcpu.kick_handle();
    let board = &m.board;
    let (vcpu, env) = (&mut m.vcpu, &mut m.env);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let cover = Region::ram("cover", RamBlock::new("other", 0x1000).unwrap(), 0, 0x1000);
            board.root.add(0x5000, &cover, 2).unwrap();
            for n in 0..100 {
                cover.set_enabled(n % 2 == 1);
            }
            handle.kick();
        });
        match vcpu.run(env) {
            Exit::Kicked => {}
            other => panic!("{other:?}"),
        }
    });
    assert!(m.vm.take_errors().is_empty());
}

#[test]
fn dirty_pages_are_logged() {
    let Some(kvm) = kvm("dirty_pages_are_logged") else { return };
    let mut m = machine(&kvm, off());
    let slots = m.vm.memory_slots();
    m.board.ram_region.set_log_dirty(DirtyClient::Migration, true);
    assert_eq!(m.vm.memory_slots(), slots);
    let clean = m.board.ram.dirty_snapshot_and_clear(DirtyClient::Migration, 0..0x20_0000);
    drop(clean);
    // mov [0x3000], al; mov [0x7fff], ax (two pages); hlt
    m.start(&[0xa2, 0x00, 0x30, 0xa3, 0xff, 0x6f, 0xf4], &real_mode());
    m.board.ram.dirty_snapshot_and_clear(DirtyClient::Migration, 0..0x20_0000);
    assert!(matches!(m.run(), Exit::Halted));
    m.board.memory.sync_dirty();
    let dirty = m.board.ram.dirty_snapshot_and_clear(DirtyClient::Migration, 0..0x20_0000);
    let pages: Vec<_> = dirty.pages().collect();
    assert_eq!(pages, [3, 6, 7]);
    // Nothing new: nothing logged. Then what a slot logged is kept when it goes away.
    m.board.memory.sync_dirty();
    assert_eq!(m.board.ram.dirty_snapshot_and_clear(DirtyClient::Migration, 0..0x20_0000).count(), 0);
    m.start(&[0xa2, 0x00, 0x30, 0xf4], &real_mode());
    m.board.ram.dirty_snapshot_and_clear(DirtyClient::Migration, 0..0x20_0000);
    assert!(matches!(m.run(), Exit::Halted));
    m.board.ram_region.set_enabled(false);
    let dirty = m.board.ram.dirty_snapshot_and_clear(DirtyClient::Migration, 0..0x20_0000);
    assert_eq!(dirty.pages().collect::<Vec<_>>(), [3]);
    assert!(m.vm.take_errors().is_empty());
}

/// A device over memory: reads come from the memory, writes to `Io`, while ROM mode is on.
struct Flash(AtomicU32);

impl Io for Flash {
    fn read(&self, _offset: u64, _size: u8, _who: &Origin) -> Result<u64, IoError> {
        Ok(0x77)
    }
    fn write(&self, _offset: u64, _size: u8, value: u64, _who: &Origin) -> Result<(), IoError> {
        self.0.store(value as u32, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn a_rom_device_changes_its_mode() {
    let Some(kvm) = kvm("a_rom_device_changes_its_mode") else { return };
    let mut m = machine(&kvm, off());
    let block = RamBlock::new("flash", 0x1000).unwrap();
    block.write(0, &[0x33]).unwrap();
    let flash = Arc::new(Flash(AtomicU32::new(0)));
    let region = Region::rom_device("flash", block, 0, 0x1000, flash.clone());
    m.board.root.add(0x6000, &region, 2).unwrap();
    // mov al, [0x6000]; out 0x10, al; mov byte [0x6000], 0x44; hlt
    let code = [0xa0, 0x00, 0x60, 0xe6, 0x10, 0xc6, 0x06, 0x00, 0x60, 0x44, 0xf4];
    m.start(&code, &real_mode());
    assert!(matches!(m.run(), Exit::Halted));
    assert_eq!(flash.0.load(Ordering::SeqCst), 0x44);
    region.set_romd(false);
    m.start(&code, &real_mode());
    assert!(matches!(m.run(), Exit::Halted));
    let values: Vec<_> = m.board.take_log().iter().map(|e| e.value).collect();
    assert_eq!(values, [0x33, 0x77]);
}

struct Event(OwnedFd, AtomicU32);

impl Event {
    fn new() -> Arc<Event> {
        // SAFETY: a new descriptor, owned by what is returned.
        #[allow(unsafe_code)]
        let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)) };
        Arc::new(Event(fd, AtomicU32::new(0)))
    }
    fn take(&self) -> u64 {
        let mut bytes = [0; 8];
        let mut file = std::fs::File::from(self.0.try_clone().unwrap());
        match std::io::Read::read(&mut file, &mut bytes) {
            Ok(8) => u64::from_ne_bytes(bytes),
            _ => 0,
        }
    }
}

impl Notify for Event {
    fn notify(&self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

#[test]
fn writes_that_signal_an_eventfd() {
    let Some(kvm) = kvm("writes_that_signal_an_eventfd") else { return };
    let mut m = machine(&kvm, off());
    let (port, any, matched) = (Event::new(), Event::new(), Event::new());
    m.board.port_device.add_ioeventfd(0x40, 2, None, port.clone());
    m.board.device.add_ioeventfd(0x10, 0, None, any.clone());
    m.board.device.add_ioeventfd(0x20, 4, Some(0x55), matched.clone());
    let mut state = real_mode();
    state.gpr[0] = 0x55;
    (state.seg[3].base, state.seg[3].selector) = (DEVICE, 0xd000);
    let code = code(&[
        &[0xe7, 0x40],             // 1000 out 0x40, ax: the event
        &[0xe6, 0x40],             // 1002 out 0x40, al: another size
        &[0xa2, 0x10, 0x00],       // 1004 mov [0x10], al: the event, any size
        &[0xa3, 0x10, 0x00],       // 1007 mov [0x10], ax: the event
        &[0x66, 0xa3, 0x20, 0x00], // 100a mov [0x20], eax: the value matches
        &[0x40],                   // 100e inc ax
        &[0x66, 0xa3, 0x20, 0x00], // 100f mov [0x20], eax: it doesn't
        &[0xf4],
    ]);
    m.start(&code, &state);
    assert!(matches!(m.run(), Exit::Halted));
    assert_eq!((port.take(), any.take(), matched.take()), (1, 2, 1));
    assert_eq!(port.1.load(Ordering::SeqCst) + any.1.load(Ordering::SeqCst), 0, "not by way of an exit");
    let entry = |exit, addr, size, value, rip| Entry { exit, addr, size, value, rip, count: 0 };
    assert_eq!(
        m.board.take_log(),
        [entry(PioOut, 0x40, 1, 0x55, 0x1002), entry(MmioWrite, DEVICE + 0x20, 4, 0x56, 0x100f)]
    );
    // Taken off again: an access like any other.
    let taken: Arc<dyn Notify> = port.clone();
    m.board.port_device.remove_ioeventfd(0x40, 2, None, &taken).unwrap();
    m.start(&code, &state);
    assert!(matches!(m.run(), Exit::Halted));
    assert_eq!(port.take(), 0);
    assert_eq!(m.board.take_log()[0], entry(PioOut, 0x40, 2, 0x55, 0x1000));
    println!("skipped: {:?}", m.vm.take_skipped());
}

#[test]
fn without_the_option_eventfds_are_signalled_after_an_exit() {
    let Some(kvm) = kvm("without_the_option_eventfds_are_signalled_after_an_exit") else { return };
    let mut m = machine(&kvm, VmOptions { ioeventfd: false, ..off() });
    let port = Event::new();
    m.board.port_device.add_ioeventfd(0x40, 2, None, port.clone());
    m.start(&[0xe7, 0x40, 0xf4], &real_mode());
    assert!(matches!(m.run(), Exit::Halted));
    assert_eq!((port.take(), port.1.load(Ordering::SeqCst)), (0, 1));
}

#[test]
fn collected_writes_come_in_order() {
    let Some(kvm) = kvm("collected_writes_come_in_order") else { return };
    let mut m = machine(&kvm, off());
    m.board.device.set_coalesced(true);
    let mut state = real_mode();
    (state.seg[3].base, state.seg[3].selector) = (DEVICE, 0xd000);
    let code = code(&[
        &[0xa2, 0x10, 0x00], // mov [0x10], al
        &[0xa3, 0x20, 0x00], // mov [0x20], ax
        &[0xe6, 0x10],       // out 0x10, al
        &[0xa2, 0x30, 0x00], // mov [0x30], al
        &[0xa0, 0x40, 0x00], // mov al, [0x40]
        &[0xf4],
    ]);
    m.start(&code, &state);
    assert!(matches!(m.run(), Exit::Halted));
    let order: Vec<_> = m.board.take_log().iter().map(|e| e.addr).collect();
    assert_eq!(order, [DEVICE + 0x10, DEVICE + 0x20, 0x10, DEVICE + 0x30, DEVICE + 0x40]);
    // More writes than the ring has room for: none is lost. mov cx, 1000; mov [0x10], al; loop; hlt
    m.start(&[0xb9, 0xe8, 0x03, 0xa2, 0x10, 0x00, 0xe2, 0xfb, 0xf4], &state);
    assert!(matches!(m.run(), Exit::Halted));
    assert_eq!(m.board.take_log().len(), 1000);
    assert!(m.vm.take_skipped().is_empty());
}
