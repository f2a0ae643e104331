//! From an access to calls of the device's handler.

use hyaline_ram::{DirtyClient, RamBlock};
use hyaline_space::{
    Access, AccessError, Actor, AddressSpace, Cursor, DeviceId, Endian, ExitKind, Io, IoError, Limits,
    NarrowWrite, Notify, Observer, Origin, Outcome, Perm, Region, Sizes, Translate, Translation,
};
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const CPU: Origin = Origin::vcpu(0, ExitKind::MmioRead, 0xfff0);

/// Behaves as memory in its order of bytes, notes its calls, and fails where it is told to.
struct Memory {
    limits: Limits,
    bytes: Mutex<Vec<u8>>,
    /// Offset, size, value when written.
    calls: Mutex<Vec<(u64, u8, Option<u64>)>>,
    fail_at: AtomicU64,
}

impl Memory {
    fn new(limits: Limits, len: u8) -> Arc<Memory> {
        Arc::new(Memory {
            limits,
            bytes: Mutex::new((0..len).collect()),
            calls: Mutex::default(),
            fail_at: AtomicU64::new(u64::MAX),
        })
    }

    fn calls(&self) -> Vec<(u64, u8, Option<u64>)> {
        std::mem::take(&mut self.calls.lock().expect("not poisoned"))
    }

    fn big(&self) -> bool {
        self.limits.endian == Endian::Big
    }

    fn check(&self, offset: u64) -> Result<usize, IoError> {
        if offset == self.fail_at.load(Ordering::Relaxed) {
            Err(IoError::Failed)
        } else {
            Ok(offset as usize)
        }
    }
}

impl Io for Memory {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, offset: u64, size: u8, _: &Origin) -> Result<u64, IoError> {
        self.calls.lock().expect("not poisoned").push((offset, size, None));
        let at = self.check(offset)?;
        let bytes = self.bytes.lock().expect("not poisoned");
        let mut wide = [0; 8];
        wide[..usize::from(size)].copy_from_slice(&bytes[at..at + usize::from(size)]);
        // Garbage above the size must not matter.
        let garbage = if size < 8 { u64::MAX << (size * 8) } else { 0 };
        Ok(garbage
            | if self.big() {
                u64::from_be_bytes(wide) >> (64 - 8 * u32::from(size))
            } else {
                u64::from_le_bytes(wide)
            })
    }

    fn write(&self, offset: u64, size: u8, value: u64, _: &Origin) -> Result<(), IoError> {
        self.calls.lock().expect("not poisoned").push((offset, size, Some(value)));
        assert!(size == 8 || value >> (size * 8) == 0, "no bits above the size");
        let at = self.check(offset)?;
        let wide = if self.big() {
            (value << (64 - 8 * u32::from(size))).to_be_bytes()
        } else {
            value.to_le_bytes()
        };
        self.bytes.lock().expect("not poisoned")[at..at + usize::from(size)]
            .copy_from_slice(&wide[..usize::from(size)]);
        Ok(())
    }
}

fn space_of(device: Arc<Memory>) -> AddressSpace {
    let len = device.bytes.lock().expect("not poisoned").len();
    let root = Region::container("root", 0x1_0000);
    root.add(0x1000, &Region::io("device", len as u128, device), 0).expect("fits");
    AddressSpace::new("memory", &root)
}

#[test]
fn wide_accesses_are_split_and_narrow_ones_widened() {
    let device = Memory::new(Limits::sizes(1, 8).implemented(1, 1), 32);
    let space = space_of(device.clone());
    assert_eq!(space.load(0x1004, 4, &CPU), (0x0706_0504, Outcome::Ok));
    assert_eq!(device.calls(), [(4, 1, None), (5, 1, None), (6, 1, None), (7, 1, None)]);
    assert_eq!(space.store(0x1008, 2, 0xffff_beef, &CPU), Outcome::Ok);
    assert_eq!(device.calls(), [(8, 1, Some(0xef)), (9, 1, Some(0xbe))]);

    let device = Memory::new(Limits::sizes(1, 4).implemented(4, 4), 32);
    let space = space_of(device.clone());
    assert_eq!(space.load(0x1005, 1, &CPU), (5, Outcome::Ok));
    assert_eq!(space.load(0x1006, 2, &CPU), (0x0706, Outcome::Ok));
    assert_eq!(device.calls(), [(4, 4, None), (4, 4, None)]);
    assert_eq!(space.store(0x1006, 1, 0xaa, &CPU), Outcome::Ok);
    assert_eq!(device.calls(), [(4, 4, Some(0x00aa_0000))], "the other bytes are zero, and nothing is read");

    let device = Memory::new(Limits::sizes(1, 4).implemented(4, 4).with_merge(), 32);
    let space = space_of(device.clone());
    assert_eq!(space.store(0x1006, 1, 0xaa, &CPU), Outcome::Ok);
    assert_eq!(device.calls(), [(4, 4, None), (4, 4, Some(0x07aa_0504))]);
    assert_eq!(space.store(0x1004, 8, 5, &CPU), Outcome::Ok);
    assert_eq!(
        device.calls(),
        [(4, 4, Some(5)), (8, 4, Some(0))],
        "whole registers are written without a read"
    );
    let space = space_of(Memory::new(
        Limits::sizes(1, 4).implemented(4, 4).with_merge().with_endian(Endian::Big),
        32,
    ));
    assert_eq!(space.store(0x1006, 1, 0xaa, &CPU), Outcome::Ok);
    assert_eq!(space.load(0x1004, 4, &CPU), (0x07aa_0504, Outcome::Ok));
}

#[test]
fn alignment_is_kept_or_refused() {
    let device = Memory::new(Limits::DEFAULT, 32);
    let space = space_of(device.clone());
    assert_eq!(space.load(0x1001, 4, &CPU), (0x0403_0201, Outcome::Ok));
    assert_eq!(device.calls(), [(1, 1, None), (2, 2, None), (4, 1, None)]);

    let device = Memory::new(Limits::sizes(4, 4), 32);
    let space = space_of(device.clone());
    assert_eq!(space.load(0x1000, 2, &CPU), (0xffff, Outcome::Failed(IoError::BadSize)));
    assert_eq!(space.load(0x1002, 4, &CPU), (0xffff_ffff, Outcome::Failed(IoError::Unaligned)));
    assert_eq!(space.store(0x1001, 1, 0, &CPU), Outcome::Failed(IoError::BadSize));
    assert_eq!(device.calls(), [], "the handler never hears of it");
    assert_eq!(space.load(0x1008, 8, &CPU), (0x0f0e_0d0c_0b0a_0908, Outcome::Ok));
    assert_eq!(device.calls(), [(8, 4, None), (12, 4, None)]);

    let device = Memory::new(Limits::sizes(4, 4).with_unaligned(), 32);
    let space = space_of(device.clone());
    assert_eq!(space.load(0x1002, 4, &CPU), (0x0504_0302, Outcome::Ok));
    assert_eq!(device.calls(), [(0, 4, None), (4, 4, None)], "two aligned reads make an unaligned one");

    let any = Limits { valid: Sizes::unaligned(1, 8), impl_: Sizes::unaligned(1, 8), ..Limits::DEFAULT };
    let device = Memory::new(any, 32);
    let space = space_of(device.clone());
    assert_eq!(space.load(0x1003, 8, &CPU).0, 0x0a09_0807_0605_0403);
    assert_eq!(device.calls(), [(3, 8, None)]);
    assert_eq!(space.load(0x1003, 3, &CPU), (u64::MAX, Outcome::Failed(IoError::BadSize)));
}

#[test]
fn big_endian_registers_keep_the_order_of_bytes_in_memory() {
    for (imp, calls) in [(4, vec![(4, 4, None)]), (2, vec![(4, 2, None), (6, 2, None)])] {
        let device = Memory::new(Limits::DEFAULT.implemented(1, imp).with_endian(Endian::Big), 32);
        let space = space_of(device.clone());
        assert_eq!(space.load(0x1004, 4, &CPU), (0x0706_0504, Outcome::Ok));
        assert_eq!(device.calls(), calls);
    }
    let device = Memory::new(Limits::DEFAULT.with_endian(Endian::Big), 32);
    let space = space_of(device.clone());
    assert_eq!(space.store(0x1004, 4, 0x1122_3344, &CPU), Outcome::Ok);
    assert_eq!(space.store(0x1008, 2, 0xbeef, &CPU), Outcome::Ok);
    assert_eq!(
        device.calls(),
        [(4, 4, Some(0x4433_2211)), (8, 2, Some(0xefbe))],
        "the handler sees its own order"
    );
}

fn sizes() -> impl Strategy<Value = Sizes> {
    (0..4_u8, 0..4_u8, any::<bool>()).prop_map(|(a, b, unaligned)| Sizes {
        min: 1 << a.min(b),
        max: 1 << a.max(b),
        unaligned,
    })
}

/// 3000 cases, or what the environment's PROPTEST_CASES says.
fn config() -> ProptestConfig {
    let default = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let told = std::env::var_os("PROPTEST_CASES").is_some();
    ProptestConfig { cases: if told { default.cases } else { 3000 }, ..default }
}

proptest! {
    #![proptest_config(config())]

    /// Whatever a device implements, it looks like memory; and no call breaks what it declared.
    #[test]
    fn any_limits_behave_as_memory(
        valid in sizes(),
        impl_ in sizes(),
        big in any::<bool>(),
        accesses in prop::collection::vec((0..56_u64, 1..9_usize, prop::option::of(any::<u64>())), 1..8),
    ) {
        let endian = if big { Endian::Big } else { Endian::Little };
        let device = Memory::new(Limits { valid, impl_, endian, narrow: NarrowWrite::Merge }, 64);
        let space = space_of(device.clone());
        let mut want: Vec<u8> = (0..64).collect();
        for (offset, len, write) in accesses {
            let range = offset as usize..offset as usize + len;
            // By the rules: cut at the largest valid size, aligned unless that doesn't matter; each piece at least the smallest.
            let mut at = offset;
            let mut pieces = Vec::new();
            while at < offset + len as u64 {
                let left = offset + len as u64 - at;
                let fits = |size: u64| size <= left && size <= u64::from(valid.max)
                    && (valid.unaligned || at % size == 0);
                let size = [8, 4, 2, 1].into_iter().find(|size| fits(*size)).unwrap_or(1);
                pieces.push((at, size, size >= u64::from(valid.min)));
                at += size;
            }
            let all_valid = pieces.iter().all(|piece| piece.2);
            let result: Result<(), AccessError> = if let Some(value) = write {
                let data = &value.to_le_bytes()[..len];
                for (at, size, ok) in &pieces {
                    if *ok {
                        let from = (at - offset) as usize;
                        want[*at as usize..(at + size) as usize].copy_from_slice(&data[from..from + *size as usize]);
                    }
                }
                space.write(0x1000 + offset, data, &CPU)
            } else {
                let mut buf = vec![0x5a; len];
                let result = space.read(0x1000 + offset, &mut buf, &CPU);
                let mut wanted = want[range].to_vec();
                for (at, size, ok) in &pieces {
                    if !ok {
                        let from = (at - offset) as usize;
                        wanted[from..from + *size as usize].fill(0xff);
                    }
                }
                prop_assert_eq!(buf, wanted);
                result
            };
            prop_assert_eq!(result.is_ok(), all_valid);
            if let Err(error) = result {
                let first = pieces.iter().find(|piece| !piece.2).map(|piece| piece.0 + 0x1000);
                prop_assert_eq!(Some(error.addr), first);
            }
            prop_assert_eq!(&*device.bytes.lock().expect("not poisoned"), &want);
            for (offset, size, _) in device.calls() {
                prop_assert!((impl_.min..=impl_.max).contains(&size), "{} bytes", size);
                prop_assert!(impl_.unaligned || offset % u64::from(size) == 0, "{} bytes at {}", size, offset);
                prop_assert!(offset + u64::from(size) <= 64);
            }
        }
    }
}

/// Notes what it sees.
#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Log {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("not poisoned"))
    }
}

impl Observer for Log {
    fn access(&self, a: &Access<'_>) {
        let verb = if a.is_write { "write" } else { "read" };
        self.0.lock().expect("not poisoned").push(format!(
            "{} {verb} {:#x}+{}={:#x} {}@{:#x} parts={} {} {} t={}",
            a.space,
            a.addr,
            a.size,
            a.value,
            a.region.path(),
            a.region_offset,
            a.parts,
            a.outcome,
            a.who.actor,
            a.started
        ));
    }
    fn now(&self) -> u64 {
        77
    }
}

#[test]
fn observers_see_devices_and_failures_but_not_memory() {
    let device = Memory::new(Limits::DEFAULT.implemented(1, 1), 32);
    device.fail_at.store(3, Ordering::Relaxed);
    let space = space_of(device);
    let block = RamBlock::new("ram", 4096).expect("memory");
    space.root().add(0, &Region::ram("ram", block.clone(), 0, 0x800), 0).expect("fits");
    space.root().add(0x2000, &Region::rom("rom", block, 0, 0x800), 0).expect("fits");
    let log = Arc::new(Log::default());
    space.set_observer(Some(log.clone()));
    assert_eq!(space.store(0x10, 4, 1, &CPU), Outcome::Ok);
    assert_eq!(space.load(0x2010, 4, &CPU), (1, Outcome::Ok));
    assert_eq!(space.load(0x1000, 4, &CPU), (0xff02_0100, Outcome::Failed(IoError::Failed)));
    assert_eq!(space.store(0x2010, 2, 0x1234, &CPU), Outcome::Failed(IoError::ReadOnly));
    assert_eq!(space.load(0x3000, 2, &CPU), (0xffff, Outcome::Unassigned));
    assert_eq!(space.load(0x101f, 2, &CPU), (0xff1f, Outcome::Unassigned), "over the end of a region");
    assert_eq!(space.load(0x7ff, 2, &CPU), (0xff00, Outcome::Unassigned), "over the end of memory");
    assert_eq!(
        log.take(),
        [
            "memory read 0x1000+4=0xff020100 /root/device@0x0 parts=4 failed vcpu0 t=77",
            "memory write 0x2010+2=0x1234 /root/rom@0x10 parts=0 read-only vcpu0 t=77",
            "memory read 0x3000+2=0xffff /root@0x3000 parts=0 unassigned vcpu0 t=77",
            "memory read 0x101f+1=0x1f /root/device@0x1f parts=1 ok vcpu0 t=77",
            "memory read 0x1020+1=0xff /root@0x1020 parts=0 unassigned vcpu0 t=77",
            "memory read 0x800+1=0xff /root@0x800 parts=0 unassigned vcpu0 t=77",
        ]
    );
    assert_eq!(space.store(0x2010, 2, 0x1234, &Origin::LOADER), Outcome::Ok, "a loader writes ROM");
    assert_eq!(space.load(0x10, 2, &CPU), (0x1234, Outcome::Ok));
    space.set_observer(None);
    assert_eq!(space.load(0x3000, 1, &CPU).1, Outcome::Unassigned);
    assert!(log.take().is_empty());
}

#[test]
fn long_accesses_cross_everything_and_keep_the_first_error() {
    let device = Memory::new(Limits::sizes(1, 8), 32);
    let space = space_of(device);
    let block = RamBlock::new("ram", 4096).expect("memory");
    space.root().add(0, &Region::ram("ram", block, 0, 0xff0), 0).expect("fits");
    let data: Vec<u8> = (0..64_u8).map(|i| 0x80 + i).collect();
    let error = space.write(0xfe0, &data, &CPU).unwrap_err();
    assert_eq!((error.addr, error.outcome), (0xff0, Outcome::Unassigned));
    let mut back = [0; 64];
    assert_eq!(space.read(0xfe0, &mut back, &CPU).unwrap_err().addr, 0xff0);
    assert_eq!(back[..16], data[..16]);
    assert_eq!(back[16..32], [0xff; 16]);
    assert_eq!(back[32..], data[32..]);
    assert!(space.read(0, &mut [], &CPU).is_ok());
    let mut end = [0; 4];
    let error = space.read(u64::MAX - 1, &mut end, &CPU).unwrap_err();
    assert_eq!((error.outcome, end), (Outcome::Unassigned, [0xff; 4]));
}

#[test]
fn rom_devices_switch() {
    let device = Memory::new(Limits::DEFAULT, 32);
    let block = RamBlock::new("flash", 4096).expect("memory");
    block.store_u32(0x10, 0xcafe_f00d);
    let root = Region::container("root", 0x1000);
    let flash = Region::rom_device("flash", block.clone(), 0, 32, device.clone());
    root.add(0, &flash, 0).expect("fits");
    let space = AddressSpace::new("memory", &root);
    assert_eq!(space.load(0x10, 4, &CPU), (0xcafe_f00d, Outcome::Ok));
    assert_eq!(space.store(0x10, 1, 0x90, &CPU), Outcome::Ok);
    assert_eq!(device.calls(), [(0x10, 1, Some(0x90))]);
    let section = space.lookup(0x10).expect("mapped");
    assert!(section.readonly && section.romd && !section.is_ram());
    assert_eq!(section.host.map(|host| host.offset), Some(0x10));
    flash.set_romd(false);
    assert_eq!(space.load(0x10, 1, &CPU), (0x90, Outcome::Ok));
    assert!(space.lookup(0x10).expect("mapped").host.is_none());
    flash.set_romd(true);
    assert_eq!(space.store(0x10, 4, 1, &Origin::DEBUGGER), Outcome::Ok);
    assert_eq!(block.load_u32(0x10), Some(1));
}

#[test]
fn a_devices_own_access_reaches_memory_only() {
    let device = Memory::new(Limits::DEFAULT, 32);
    let space = space_of(device.clone());
    let block = RamBlock::new("ram", 4096).expect("memory");
    block.set_logging(DirtyClient::Migration, true);
    space.root().add(0, &Region::ram("ram", block.clone(), 0, 4096), 0).expect("fits");
    let dma = Origin::dma(DeviceId(5));
    assert_eq!(dma.actor, Actor::Dma(DeviceId(5)));
    let mut buf = [0; 8];
    let error = space.dma_write(0xffc, &[1; 8], &dma).unwrap_err();
    assert_eq!(
        error.to_string(),
        "write to address 0x1000 (4096) of `memory`: region /root/device: the access was refused"
    );
    assert_eq!(block.load_u32(0xffc), Some(0x0101_0101));
    assert!(block.has_dirty(DirtyClient::Migration));
    assert!(space.dma_read(0x1000, &mut buf, &dma).is_err());
    assert!(space.dma_read(0xff8, &mut buf, &dma).is_ok());
    assert_eq!((buf, device.calls()), ([0, 0, 0, 0, 1, 1, 1, 1], vec![]));
}

#[derive(Default)]
struct Bell(AtomicU64);

impl Notify for Bell {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn ioeventfds_take_matching_writes() {
    let device = Memory::new(Limits::DEFAULT, 32);
    let space = space_of(device.clone());
    let region = space.root().children()[0].clone();
    let (one, any) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
    let one_dyn: Arc<dyn Notify> = one.clone();
    region.add_ioeventfd(0x10, 2, Some(7), one_dyn.clone());
    region.add_ioeventfd(0x14, 0, None, any.clone());
    assert_eq!(space.store(0x1010, 2, 7, &CPU), Outcome::Ok);
    assert_eq!(space.store(0x1010, 2, 8, &CPU), Outcome::Ok);
    assert_eq!(space.store(0x1010, 4, 7, &CPU), Outcome::Ok);
    assert_eq!(space.store(0x1014, 4, 9, &CPU), Outcome::Ok);
    assert_eq!(space.load(0x1014, 1, &CPU).1, Outcome::Ok);
    assert_eq!(one.0.load(Ordering::Relaxed), 1);
    assert_eq!(any.0.load(Ordering::Relaxed), 1);
    assert_eq!(device.calls(), [(0x10, 2, Some(8)), (0x10, 4, Some(7)), (0x14, 1, None)]);
    region.remove_ioeventfd(0x10, 2, Some(7), &one_dyn).expect("it is there");
    assert!(region.remove_ioeventfd(0x10, 2, Some(7), &one_dyn).is_err());
    assert_eq!(space.store(0x1010, 2, 7, &CPU), Outcome::Ok);
    assert_eq!(device.calls(), [(0x10, 2, Some(7))]);
}

/// Maps pages of 0x100 bytes backwards; odd pages can't be written; page 7 leads back into itself.
struct Mirror {
    target: AddressSpace,
    own: Mutex<Option<AddressSpace>>,
    asked: AtomicU64,
}

impl Translate for Mirror {
    fn translate(&self, addr: u64, _: bool, _: &Origin) -> Translation {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let page = addr / 0x100;
        let own = self.own.lock().expect("not poisoned").clone();
        match (page, own) {
            (7, Some(own)) => Translation { target: own, addr: 0x700, mask: 0xff, perm: Perm::ReadWrite },
            (page, _) => Translation {
                target: self.target.clone(),
                addr: (7 - page) * 0x100,
                mask: 0xff,
                perm: if page % 2 == 1 { Perm::Read } else { Perm::ReadWrite },
            },
        }
    }
}

#[test]
fn iommus_translate_page_by_page_and_loops_end() {
    let block = RamBlock::new("ram", 4096).expect("memory");
    let memory_root = Region::container("memory", 0x1000);
    memory_root.add(0, &Region::ram("ram", block.clone(), 0, 0x1000), 0).expect("fits");
    let memory = AddressSpace::new("memory", &memory_root);
    let mirror = Arc::new(Mirror { target: memory, own: Mutex::new(None), asked: AtomicU64::new(0) });
    let device_view = AddressSpace::new("device", &Region::iommu("iommu", 0x800, mirror.clone()));
    *mirror.own.lock().expect("not poisoned") = Some(device_view.clone());
    block.write(0x7fe, &[1, 2]).expect("inside");
    block.write(0x600, &[3, 4]).expect("inside");
    assert_eq!(device_view.load(0xfe, 4, &CPU), (0x0403_0201, Outcome::Ok));
    assert_eq!(mirror.asked.swap(0, Ordering::Relaxed), 2);
    let error = device_view.dma_write(0xfe, &[9; 4], &CPU).unwrap_err();
    assert_eq!((error.addr, error.outcome), (0x100, Outcome::Failed(IoError::Refused)));
    assert_eq!(block.load_u16(0x7fe), Some(0x0909));
    assert_eq!(block.load_u16(0x600), Some(0x0403));
    mirror.asked.store(0, Ordering::Relaxed);
    assert_eq!(device_view.load(0x700, 4, &CPU), (0xffff_ffff, Outcome::Failed(IoError::Refused)));
    assert_eq!(mirror.asked.load(Ordering::Relaxed), 8, "a loop of translations ends");
    *mirror.own.lock().expect("not poisoned") = None;
}

#[test]
fn ports_end_at_the_last_one() {
    let root = Region::container("io", 0x2_0000);
    let device = Memory::new(Limits::DEFAULT, 32);
    root.add(0xfff0, &Region::io("top", 32, device.clone()), 0).expect("fits");
    let space = AddressSpace::new_ports("io", &root);
    assert_eq!(space.load(0xffff, 1, &CPU), (15, Outcome::Ok));
    assert_eq!(space.load(0xffff, 2, &CPU), (0xff0f, Outcome::Unassigned));
    assert_eq!(space.load(0x1_0000, 1, &CPU), (0xff, Outcome::Unassigned));
    assert_eq!(device.calls(), [(15, 1, None), (15, 1, None)]);
    // A range for each single port: the table has no room for "none", and needs none.
    let full = Region::container("io", 0x1_0000);
    {
        let _transaction = hyaline_space::transaction();
        let (even, odd) = (Region::reservation("even", 1), Region::reservation("odd", 1));
        let pair = Region::container("pair", 2);
        pair.add(0, &even, 0).expect("fits");
        pair.add(1, &odd, 0).expect("fits");
        let mut unit = pair;
        // Doubled 15 times by aliases of aliases.
        for level in 1..16_u32 {
            let size = 1_u128 << (level + 1);
            let next = Region::container("next", size);
            next.add(0, &unit, 0).expect("fits");
            next.add((size / 2) as u64, &Region::alias("copy", &unit, 0, size / 2), 0).expect("fits");
            unit = next;
        }
        full.add(0, &unit, 0).expect("fits");
    }
    let space = AddressSpace::new_ports("io", &full);
    assert_eq!(space.view().sections().len(), 0x1_0000);
    for port in [0, 1, 0x7fff, 0xfffe, 0xffff] {
        let name = if port % 2 == 0 { "even" } else { "odd" };
        assert_eq!(space.lookup(port).map(|s| s.region.name().to_owned()).as_deref(), Some(name));
    }
}

#[test]
fn cursors_see_changes_and_other_spaces() {
    let device = Memory::new(Limits::DEFAULT, 32);
    let space = space_of(device);
    let other = AddressSpace::new("other", &Region::container("other", 0x1000));
    let mut cursor = Cursor::new();
    for _ in 0..3 {
        assert_eq!(space.load_with(&mut cursor, 0x1001, 1, &CPU), (1, Outcome::Ok));
        assert_eq!(space.load_with(&mut cursor, 0x10, 1, &CPU), (0xff, Outcome::Unassigned));
        assert_eq!(other.load_with(&mut cursor, 0x10, 1, &CPU), (0xff, Outcome::Unassigned));
    }
    assert_eq!(space.store_with(&mut cursor, 0x1002, 1, 0x42, &CPU), Outcome::Ok);
    let generation = space.generation();
    space.root().children()[0].set_offset(0x2000);
    assert_ne!(space.generation(), generation);
    assert_eq!(space.load_with(&mut cursor, 0x1002, 1, &CPU), (0xff, Outcome::Unassigned));
    assert_eq!(space.load_with(&mut cursor, 0x2002, 1, &CPU), (0x42, Outcome::Ok));
}
