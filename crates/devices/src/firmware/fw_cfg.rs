//! QEMU's firmware configuration device: keys and files that the machine offers to firmware and kernels.
//!
//! The machine fills it with [`FwCfg::add_key`] and [`FwCfg::add_file`] before the guest starts. Files are listed sorted
//! by name, and take their keys in that order from 20h on. All numbers that the machine adds are little endian; the
//! directory and the DMA descriptor are big endian, as the interface says.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Reset, registers};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

registers! {
    /// Selector, data and DMA ports.
    pub bank PORTS "ports" Port 12 {
        SELECTOR 0x0 2 wo = 0x0000, "Register locations", "Selects a key and goes to its start" { KEY 0..=13; WRITE 14; ARCH_LOCAL 15 };
        DATA 0x1 1 ro = 0x00, "Data register", "The next byte of the selected item; zero after its end" !effect;
        DMA_HIGH 0x4 4 rw = 0x0, "DMA interface", "Upper half of the descriptor's address, big endian; reads as the text QEMU";
        DMA_LOW 0x8 4 rw = 0x0, "DMA interface", "Lower half, big endian; writing it starts the transfer; reads as the text of a space and CFG";
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "fw_cfg",
    title: "QEMU firmware configuration device",
    manual: "QEMU specifications, \"QEMU Firmware Configuration (fw_cfg) Device\"",
    modelled: "Selector, data port, DMA with read, write, skip and select, the file directory, writable items, items made when selected.",
    not_modelled: "Writing through the data port, which QEMU took out in version 2.4: such writes are ignored and reported.",
    deviations: "A DMA read may run past its item's end by 16 MiB at most; QEMU fills any length with zeros.",
    banks: &[&PORTS],
    outputs: &[],
    inputs: &[],
};

/// Where the ports begin on a PC.
pub const IOBASE: u16 = 0x510;

/// Numbers of the fixed items.
pub mod key {
    /// The text `QEMU`.
    pub const SIGNATURE: u16 = 0x00;
    /// What the device can do: bit 0 ports, bit 1 DMA.
    pub const ID: u16 = 0x01;
    /// The machine's UUID, 16 bytes.
    pub const UUID: u16 = 0x02;
    /// RAM in bytes, 8 bytes.
    pub const RAM_SIZE: u16 = 0x03;
    /// 1 without graphics, 2 bytes.
    pub const NOGRAPHIC: u16 = 0x04;
    /// Processors that are there at start, 2 bytes.
    pub const NB_CPUS: u16 = 0x05;
    /// Machine number, unused on a PC.
    pub const MACHINE_ID: u16 = 0x06;
    /// Load address of the kernel, 4 bytes.
    pub const KERNEL_ADDR: u16 = 0x07;
    /// Size of the kernel, 4 bytes.
    pub const KERNEL_SIZE: u16 = 0x08;
    /// Kernel command line (old place).
    pub const KERNEL_CMDLINE: u16 = 0x09;
    /// Load address of the initial RAM disk, 4 bytes.
    pub const INITRD_ADDR: u16 = 0x0a;
    /// Its size, 4 bytes.
    pub const INITRD_SIZE: u16 = 0x0b;
    /// Boot device letter, 2 bytes.
    pub const BOOT_DEVICE: u16 = 0x0c;
    /// NUMA nodes, see `FwCfg::add_numa`.
    pub const NUMA: u16 = 0x0d;
    /// 1: show a boot menu, 2 bytes.
    pub const BOOT_MENU: u16 = 0x0e;
    /// Limit of APIC IDs, 2 bytes.
    pub const MAX_CPUS: u16 = 0x0f;
    /// Entry point of the kernel, 4 bytes.
    pub const KERNEL_ENTRY: u16 = 0x10;
    /// The kernel.
    pub const KERNEL_DATA: u16 = 0x11;
    /// The initial RAM disk.
    pub const INITRD_DATA: u16 = 0x12;
    /// Load address of the command line, 4 bytes.
    pub const CMDLINE_ADDR: u16 = 0x13;
    /// Its size with the final zero, 4 bytes.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// The command line with a final zero.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// Load address of the kernel's real-mode part, 4 bytes.
    pub const SETUP_ADDR: u16 = 0x16;
    /// Its size, 4 bytes.
    pub const SETUP_SIZE: u16 = 0x17;
    /// The kernel's real-mode part.
    pub const SETUP_DATA: u16 = 0x18;
    /// The directory of files.
    pub const FILE_DIR: u16 = 0x19;
    /// The first file.
    pub const FILE_FIRST: u16 = 0x20;
    /// ACPI tables given on the command line (x86).
    pub const ACPI_TABLES: u16 = 0x8000;
    /// SMBIOS entries (x86, old form).
    pub const SMBIOS_ENTRIES: u16 = 0x8001;
    /// 1: the timer's interrupt 0 comes in at pin 2 of the I/O APIC, 4 bytes (x86).
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
    /// Reserved memory ranges (x86, old form: the file `etc/e820` has all).
    pub const E820_TABLE: u16 = 0x8003;
    /// HPET description (x86).
    pub const HPET: u16 = 0x8004;
}

/// Longest name of a file, without its final zero.
pub const NAME_MAX: usize = 55;
/// How many files there may be.
pub const FILES_MAX: usize = 0x400;
/// How many bytes after an item's end a DMA read may ask for.
pub const ZEROS_MAX: u64 = 16 << 20;

const WRITE_BIT: u16 = 0x4000;
const ERROR: u32 = 1;
const READ: u32 = 2;
const SKIP: u32 = 4;
const SELECT: u32 = 8;
const WRITE: u32 = 16;

/// Why an item can't be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// The name is too long, empty or has a zero in it.
    #[error("`{0}` can't be the name of a fw_cfg file: it must have 1 to 55 bytes and no zero byte")]
    Name(String),
    /// There is one already.
    #[error("there is already a fw_cfg file `{0}`; two parts of the machine, or a -fw_cfg option, offer it")]
    Taken(String),
    /// The key belongs to the files or to the device itself, or was added before.
    #[error("fw_cfg key {0:#06x} ({0}) can't be added: it is taken or belongs to the files")]
    Key(u16),
    /// Too many files.
    #[error("a fw_cfg device holds at most 1024 (0x400) files")]
    Full,
    /// No such file.
    #[error("there is no fw_cfg file `{0}`")]
    Missing(String),
    /// The content does not fit a 32-bit size.
    #[error("fw_cfg item `{0}` is larger than 4 GiB")]
    Large(String),
}

/// Called after the guest wrote a writable item through DMA: offset and the bytes written.
pub type WriteHook = Box<dyn FnMut(usize, &[u8], &mut Cx<'_>) + Send>;
/// Called when the guest selects an item; may give it new content.
pub type SelectHook = Box<dyn FnMut(&mut Cx<'_>) -> Option<Vec<u8>> + Send>;

#[derive(Clone, Debug, PartialEq)]
struct Bytes(Arc<[u8]>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Bytes, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, v: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(v.into()))
            }
            fn visit_byte_buf<E>(self, v: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(v.into()))
            }
        }
        d.deserialize_byte_buf(V)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    data: Bytes,
    writable: bool,
}

/// The device's state, its items included: a restored guest may start over and ask again.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    keys: BTreeMap<u16, Bytes>,
    files: BTreeMap<String, File>,
    selected: u16,
    offset: u32,
    dma: u64,
}

impl State {
    fn check(&self) -> Result<(), StateError> {
        ensure(self.files.len() <= FILES_MAX, || {
            format!("{} fw_cfg files are more than 1024", self.files.len())
        })?;
        let names = self.files.keys().all(|n| good_name(n));
        ensure(names, || {
            "a fw_cfg file has a name that is empty, longer than 55 bytes, or has a zero in it".into()
        })?;
        let sizes = self.keys.values().chain(self.files.values().map(|f| &f.data));
        ensure(sizes.into_iter().all(|d| u32::try_from(d.0.len()).is_ok()), || {
            "a fw_cfg item is larger than 4 GiB".into()
        })?;
        ensure(self.keys.keys().all(|k| good_key(*k)), || "a fw_cfg key belongs to the files".into())?;
        ensure(self.selected & WRITE_BIT == 0, || "the selected fw_cfg key has its write bit set".into())
    }
    /// Names and contents of files in the order of their keys.
    fn nth(&self, key: u16) -> Option<(&String, &File)> {
        let n = key.checked_sub(key::FILE_FIRST).filter(|_| key < 0x4000)?;
        self.files.iter().nth(usize::from(n))
    }
    fn directory(&self) -> Vec<u8> {
        let mut d = Vec::with_capacity(4 + 64 * self.files.len());
        d.extend((self.files.len() as u32).to_be_bytes());
        for (i, (name, file)) in self.files.iter().enumerate() {
            d.extend((file.data.0.len() as u32).to_be_bytes());
            d.extend((key::FILE_FIRST + i as u16).to_be_bytes());
            d.extend([0, 0]);
            let mut padded = [0; 56];
            padded.iter_mut().zip(name.bytes()).for_each(|(p, b)| *p = b);
            d.extend(padded);
        }
        d
    }
    fn content(&self, key: u16) -> Option<Arc<[u8]>> {
        if key == key::FILE_DIR {
            return Some(self.directory().into());
        }
        match self.keys.get(&key) {
            Some(data) => Some(data.0.clone()),
            None => self.nth(key).map(|(_, f)| f.data.0.clone()),
        }
    }
}

fn good_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && !name.bytes().any(|b| b == 0)
}

fn good_key(k: u16) -> bool {
    k & WRITE_BIT == 0 && k != key::FILE_DIR && !(key::FILE_FIRST..0x4000).contains(&k)
}

/// The device.
pub struct FwCfg {
    s: State,
    /// The selected item's content, so that a byte read costs no look-up.
    current: Option<Arc<[u8]>>,
    write_hooks: BTreeMap<String, WriteHook>,
    select_hooks: BTreeMap<String, SelectHook>,
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<_> = self.s.files.keys().collect();
        write!(f, "FwCfg(key {:#x}+{:#x}, files {files:?})", self.s.selected, self.s.offset)
    }
}

impl Default for FwCfg {
    fn default() -> FwCfg {
        FwCfg::new()
    }
}

impl FwCfg {
    /// A device that offers its signature, its abilities and an empty directory.
    pub fn new() -> FwCfg {
        let mut s = State::default();
        s.keys.insert(key::SIGNATURE, Bytes(b"QEMU".as_slice().into()));
        s.keys.insert(key::ID, Bytes(3_u32.to_le_bytes().as_slice().into()));
        let current = s.content(key::SIGNATURE);
        FwCfg { s, current, write_hooks: BTreeMap::new(), select_hooks: BTreeMap::new() }
    }

    /// Adds an item with a fixed key.
    ///
    /// # Errors
    /// The key is taken or belongs to the files; the content is larger than 4 GiB.
    pub fn add_key(&mut self, k: u16, data: impl Into<Arc<[u8]>>) -> Result<(), FwCfgError> {
        let data = data.into();
        if !good_key(k) || self.s.keys.contains_key(&k) {
            return Err(FwCfgError::Key(k));
        }
        u32::try_from(data.len()).map_err(|_| FwCfgError::Large(format!("{k:#06x}")))?;
        self.s.keys.insert(k, Bytes(data));
        Ok(())
    }
    /// Adds a 2-byte item.
    ///
    /// # Errors
    /// As [`FwCfg::add_key`].
    pub fn add_u16(&mut self, k: u16, value: u16) -> Result<(), FwCfgError> {
        self.add_key(k, value.to_le_bytes().as_slice())
    }
    /// Adds a 4-byte item.
    ///
    /// # Errors
    /// As [`FwCfg::add_key`].
    pub fn add_u32(&mut self, k: u16, value: u32) -> Result<(), FwCfgError> {
        self.add_key(k, value.to_le_bytes().as_slice())
    }
    /// Adds an 8-byte item.
    ///
    /// # Errors
    /// As [`FwCfg::add_key`].
    pub fn add_u64(&mut self, k: u16, value: u64) -> Result<(), FwCfgError> {
        self.add_key(k, value.to_le_bytes().as_slice())
    }
    /// Adds the NUMA item: the number of nodes, the node of each APIC ID, the bytes of each node. Both empty on a machine without nodes.
    ///
    /// # Errors
    /// As [`FwCfg::add_key`].
    pub fn add_numa(&mut self, node_of_apic: &[u64], node_bytes: &[u64]) -> Result<(), FwCfgError> {
        let numbers = std::iter::once(node_bytes.len() as u64)
            .chain(node_of_apic.iter().copied())
            .chain(node_bytes.iter().copied());
        let data: Vec<u8> = numbers.flat_map(u64::to_le_bytes).collect();
        self.add_key(key::NUMA, data)
    }
    /// Adds the file `etc/e820`: address, length and type of each range (1 RAM, 2 reserved, 3 ACPI, 4 NVS).
    ///
    /// # Errors
    /// As [`FwCfg::add_file`].
    pub fn add_e820(&mut self, ranges: &[(u64, u64, u32)]) -> Result<(), FwCfgError> {
        let mut data = Vec::new();
        for (address, length, kind) in ranges {
            data.extend(address.to_le_bytes());
            data.extend(length.to_le_bytes());
            data.extend(kind.to_le_bytes());
        }
        self.add_file("etc/e820", data)
    }
    /// Adds a file.
    ///
    /// # Errors
    /// The name is taken or can't be one; too many files; larger than 4 GiB.
    pub fn add_file(&mut self, name: &str, data: impl Into<Arc<[u8]>>) -> Result<(), FwCfgError> {
        self.insert(name, data.into(), false)
    }
    /// Adds a file that the guest may write through DMA; `hook` hears of it.
    ///
    /// # Errors
    /// As [`FwCfg::add_file`].
    pub fn add_writable(
        &mut self,
        name: &str,
        data: impl Into<Arc<[u8]>>,
        hook: Option<WriteHook>,
    ) -> Result<(), FwCfgError> {
        self.insert(name, data.into(), true)?;
        if let Some(hook) = hook {
            self.write_hooks.insert(name.to_string(), hook);
        }
        Ok(())
    }
    /// Has `hook` called each time the file is selected, before it is read: for tables that follow what firmware set up.
    ///
    /// # Errors
    /// No such file.
    pub fn on_select(&mut self, name: &str, hook: SelectHook) -> Result<(), FwCfgError> {
        if !self.s.files.contains_key(name) {
            return Err(FwCfgError::Missing(name.to_string()));
        }
        self.select_hooks.insert(name.to_string(), hook);
        Ok(())
    }
    /// Gives a file new content.
    ///
    /// # Errors
    /// No such file; larger than 4 GiB.
    pub fn set_file(&mut self, name: &str, data: impl Into<Arc<[u8]>>) -> Result<(), FwCfgError> {
        let data = data.into();
        u32::try_from(data.len()).map_err(|_| FwCfgError::Large(name.to_string()))?;
        let file = self.s.files.get_mut(name).ok_or_else(|| FwCfgError::Missing(name.to_string()))?;
        file.data = Bytes(data);
        self.current = self.s.content(self.s.selected);
        Ok(())
    }
    /// A file's content.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.s.files.get(name).map(|f| &*f.data.0)
    }
    /// An item's content by key.
    pub fn item(&self, k: u16) -> Option<Arc<[u8]>> {
        self.s.content(k)
    }
    /// Files with their keys and sizes in bytes, in the order of the directory.
    pub fn files(&self) -> impl Iterator<Item = (u16, &str, usize)> {
        self.s
            .files
            .iter()
            .enumerate()
            .map(|(i, (n, f))| (key::FILE_FIRST + i as u16, n.as_str(), f.data.0.len()))
    }

    fn insert(&mut self, name: &str, data: Arc<[u8]>, writable: bool) -> Result<(), FwCfgError> {
        if !good_name(name) {
            return Err(FwCfgError::Name(name.to_string()));
        }
        u32::try_from(data.len()).map_err(|_| FwCfgError::Large(name.to_string()))?;
        if self.s.files.contains_key(name) {
            return Err(FwCfgError::Taken(name.to_string()));
        }
        if self.s.files.len() >= FILES_MAX {
            return Err(FwCfgError::Full);
        }
        self.s.files.insert(name.to_string(), File { data: Bytes(data), writable });
        self.current = self.s.content(self.s.selected);
        Ok(())
    }

    fn select(&mut self, k: u16, cx: &mut Cx<'_>) {
        let k = k & !WRITE_BIT;
        if let Some(name) = self.s.nth(k).map(|(n, _)| n.clone())
            && let Some(new) = self.select_hooks.get_mut(&name).and_then(|hook| hook(cx))
            && let Err(e) = self.set_file(&name, new)
        {
            cx.unimplemented(e);
        }
        self.s.selected = k;
        self.s.offset = 0;
        self.current = self.s.content(k);
        if self.current.is_none() {
            cx.note(format_args!("fw_cfg key {k:#06x} ({k}) is not there"));
        }
    }

    fn next_byte(&mut self) -> u8 {
        let byte = self.current.as_ref().and_then(|c| c.get(self.s.offset as usize)).copied();
        if byte.is_some() {
            self.s.offset += 1;
        }
        byte.unwrap_or(0)
    }

    fn rest(&self) -> usize {
        self.current.as_ref().map_or(0, |c| c.len().saturating_sub(self.s.offset as usize))
    }

    /// Carries out the descriptor at `address`.
    fn transfer(&mut self, address: u64, cx: &mut Cx<'_>) {
        let mut raw = [0; 16];
        if cx.dma_read(address, &mut raw).is_err() {
            return;
        }
        let control = u32::from_be_bytes([raw[0], raw[1], raw[2], raw[3]]);
        let length = u32::from_be_bytes([raw[4], raw[5], raw[6], raw[7]]);
        let [.., a, b, c, d, e, f, g, h] = raw;
        let target = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        if control & SELECT != 0 {
            self.select((control >> 16) as u16, cx);
        }
        let done = if control & READ != 0 {
            self.dma_out(target, length, cx)
        } else if control & WRITE != 0 {
            self.dma_in(target, length, cx)
        } else {
            if control & SKIP != 0 {
                self.s.offset += self.rest().min(length as usize) as u32;
            }
            true
        };
        let status = if done { 0 } else { ERROR };
        let _ = cx.dma_write(address, &status.to_be_bytes());
    }

    /// The item's bytes into guest memory, zeros after its end.
    fn dma_out(&mut self, target: u64, length: u32, cx: &mut Cx<'_>) -> bool {
        let n = self.rest().min(length as usize);
        let zeros = u64::from(length) - n as u64;
        if zeros > ZEROS_MAX {
            cx.guest_error(format_args!(
                "fw_cfg read of {length:#x} bytes, {zeros:#x} more than key {:#x} has",
                self.s.selected
            ));
            return false;
        }
        if n > 0 {
            let from = self.s.offset as usize;
            let Some(bytes) = self.current.as_ref().and_then(|c| c.get(from..from + n)) else { return false };
            if cx.dma_write(target, bytes).is_err() {
                return false;
            }
            self.s.offset += n as u32;
        }
        let mut at = target.wrapping_add(n as u64);
        let mut left = zeros as usize;
        while left > 0 {
            let chunk = left.min(4096);
            if cx.dma_write(at, &[0; 4096][..chunk]).is_err() {
                return false;
            }
            at = at.wrapping_add(chunk as u64);
            left -= chunk;
        }
        true
    }

    /// Guest memory into a writable item.
    fn dma_in(&mut self, source: u64, length: u32, cx: &mut Cx<'_>) -> bool {
        let n = length as usize;
        let from = self.s.offset as usize;
        let Some(name) =
            self.s.nth(self.s.selected).filter(|(_, f)| f.writable).map(|(name, _)| name.clone())
        else {
            cx.guest_error(format_args!("fw_cfg key {:#06x} can't be written", self.s.selected));
            return false;
        };
        if n > self.rest() {
            cx.guest_error(format_args!(
                "fw_cfg write of {n:#x} bytes at {from:#x} is longer than file {name}"
            ));
            return false;
        }
        let mut bytes = vec![0; n];
        if cx.dma_read(source, &mut bytes).is_err() {
            return false;
        }
        self.current = None;
        if let Some(file) = self.s.files.get_mut(&name)
            && let Some(place) = Arc::make_mut(&mut file.data.0).get_mut(from..from + n)
        {
            place.copy_from_slice(&bytes);
        }
        self.s.offset += length;
        self.current = self.s.content(self.s.selected);
        if let Some(hook) = self.write_hooks.get_mut(&name) {
            hook(from, &bytes, cx);
        }
        true
    }
}

impl Device for FwCfg {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        Limits::DEFAULT
    }
    fn peek(&self, _bank: usize, register: &Register) -> Option<u64> {
        match register.name {
            "SELECTOR" => Some(u64::from(self.s.selected)),
            "DATA" => Some(
                self.current
                    .as_ref()
                    .and_then(|c| c.get(self.s.offset as usize))
                    .map_or(0, |b| u64::from(*b)),
            ),
            "DMA_HIGH" => Some(self.s.dma >> 32),
            "DMA_LOW" => Some(self.s.dma & 0xffff_ffff),
            _ => None,
        }
    }
    fn register(&self, _bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        match offset {
            0 => Some(&SELECTOR),
            1 if !is_write => Some(&DATA),
            _ => PORTS.at(offset, is_write),
        }
    }
    fn read(&mut self, _bank: usize, offset: u64, size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        match (offset, size) {
            (0, _) => Err(IoError::WriteOnly),
            (1, 1) => Ok(u64::from(self.next_byte())),
            // The signature, "QEMU CFG" in the order of its bytes, however wide the pieces.
            (4..=11, _) => {
                let text = u64::from_le_bytes(*b"QEMU CFG") >> ((offset - 4) * 8);
                Ok(if size >= 8 { text } else { text & ((1 << (size * 8)) - 1) })
            }
            _ => Err(IoError::NotHere),
        }
    }
    fn write(
        &mut self,
        _bank: usize,
        offset: u64,
        size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        match (offset, size) {
            (0, 2) => self.select(value as u16, cx),
            (0 | 1, 1) => {
                cx.guest_error("writing fw_cfg items through the data port is no longer possible; use DMA");
                return Err(IoError::ReadOnly);
            }
            (4, 4) => self.s.dma = u64::from((value as u32).swap_bytes()) << 32,
            (8, 4) => {
                let address = self.s.dma & !0xffff_ffff | u64::from((value as u32).swap_bytes());
                // The register is empty again once a transfer has started.
                self.s.dma = 0;
                self.transfer(address, cx);
            }
            (4..=11, _) => return Err(IoError::BadSize),
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, _cx: &mut Cx<'_>) {
        (self.s.selected, self.s.offset, self.s.dma) = (key::SIGNATURE, 0, 0);
        self.current = self.s.content(key::SIGNATURE);
    }
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        s.check()?;
        self.current = s.content(s.selected);
        self.s = s;
        Ok(())
    }
    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, Request, device_laws};

    fn device() -> FwCfg {
        let mut d = FwCfg::new();
        d.add_u16(key::NB_CPUS, 2).unwrap();
        d.add_u64(key::RAM_SIZE, 128 << 20).unwrap();
        d.add_u32(key::IRQ0_OVERRIDE, 1).unwrap();
        d.add_numa(&[], &[]).unwrap();
        d.add_file("etc/system-states", [128, 0, 0, 129, 128, 128].as_slice()).unwrap();
        d.add_e820(&[(0, 0x9fc00, 1), (0x10_0000, 0x7f0_0000, 1)]).unwrap();
        d.add_file("bootorder", b"/pci@i0cf8/ethernet@3\0".as_slice()).unwrap();
        d.add_writable("etc/vmcoreinfo", vec![0; 16], None).unwrap();
        d
    }

    device_laws!(device());

    fn key_bytes(b: &mut Bench<FwCfg>, k: u16, n: usize) -> Vec<u8> {
        b.write(0, 0, 2, u64::from(k));
        (0..n).map(|_| b.in8(1)).collect()
    }

    fn dma(b: &mut Bench<FwCfg>, control: u32, length: u32, target: u64) -> u32 {
        let mut descriptor = control.to_be_bytes().to_vec();
        descriptor.extend(length.to_be_bytes());
        descriptor.extend(target.to_be_bytes());
        b.poke(0x100, &descriptor);
        b.write(0, 4, 4, 0);
        b.write(0, 8, 4, u64::from(0x100_u32.swap_bytes()));
        u32::from_be_bytes(b.memory(0x100, 4).try_into().unwrap())
    }

    #[test]
    fn keys_by_port() {
        let mut b = Bench::new(device());
        assert_eq!(key_bytes(&mut b, 0, 6), b"QEMU\0\0");
        assert_eq!(key_bytes(&mut b, 1, 4), [3, 0, 0, 0]);
        assert_eq!(key_bytes(&mut b, 5, 2), [2, 0]);
        assert_eq!(key_bytes(&mut b, 0x8002, 4), [1, 0, 0, 0]);
        assert_eq!(key_bytes(&mut b, 0x4000 | 5, 2), [2, 0], "the write bit is no part of the key");
        assert_eq!(key_bytes(&mut b, 0x3ff, 2), [0, 0]);
        assert_eq!((b.read(0, 4, 4), b.read(0, 8, 4)), (0x554d_4551, 0x4746_4320));
    }

    #[test]
    fn directory_is_sorted_and_big_endian() {
        let mut b = Bench::new(device());
        let d = key_bytes(&mut b, key::FILE_DIR, 4 + 64 * 4);
        assert_eq!(&d[..4], [0, 0, 0, 4]);
        let names: Vec<String> = d[4..]
            .chunks(64)
            .map(|e| String::from_utf8_lossy(&e[8..]).trim_end_matches('\0').to_string())
            .collect();
        assert_eq!(names, ["bootorder", "etc/e820", "etc/system-states", "etc/vmcoreinfo"]);
        assert_eq!(&d[4 + 64..4 + 64 + 8], [0, 0, 0, 40, 0, 0x21, 0, 0]);
        assert_eq!(key_bytes(&mut b, 0x22, 6), [128, 0, 0, 129, 128, 128]);
    }

    #[test]
    fn dma_reads_skips_and_fills() {
        let mut b = Bench::new(device());
        b.poke(0x200, &[0xaa; 12]);
        assert_eq!(dma(&mut b, 0x22 << 16 | SELECT | READ, 8, 0x200), 0);
        assert_eq!(b.memory(0x200, 10), [128, 0, 0, 129, 128, 128, 0, 0, 0xaa, 0xaa]);
        assert_eq!(dma(&mut b, 0x22 << 16 | SELECT | SKIP, 3, 0), 0);
        assert_eq!(dma(&mut b, READ, 2, 0x200), 0);
        assert_eq!(b.memory(0x200, 2), [129, 128]);
        assert_eq!(dma(&mut b, READ, 4, 0xffff_0000), ERROR, "not RAM");
        assert_eq!(dma(&mut b, READ, 0xffff_ffff, 0), ERROR, "unbounded");
    }

    #[test]
    fn dma_writes_only_what_is_writable() {
        let mut d = device();
        d.add_writable(
            "opt/exit",
            vec![0; 4],
            Some(Box::new(|at, bytes, cx| cx.request(Request::Exit(at as i32 + i32::from(bytes[0]))))),
        )
        .unwrap();
        let mut b = Bench::new(d);
        b.poke(0x300, &[9, 8, 7, 6]);
        assert_eq!(dma(&mut b, 0x24 << 16 | SELECT | WRITE, 4, 0x300), 0);
        assert_eq!(b.device.file("opt/exit"), Some([9, 8, 7, 6].as_slice()));
        assert_eq!(b.requests, [Request::Exit(9)]);
        assert_eq!(dma(&mut b, 0x24 << 16 | SELECT | WRITE, 5, 0x300), ERROR);
        assert_eq!(dma(&mut b, 0x20 << 16 | SELECT | WRITE, 1, 0x300), ERROR);
        b.out8(1, 5);
        assert_eq!(b.device.file("opt/exit"), Some([9, 8, 7, 6].as_slice()));
    }

    #[test]
    fn an_item_can_be_made_when_selected() {
        let mut d = device();
        let mut turn = 0;
        d.on_select(
            "bootorder",
            Box::new(move |_| {
                turn += 1;
                Some(vec![turn; 3])
            }),
        )
        .unwrap();
        let mut b = Bench::new(d);
        assert_eq!(key_bytes(&mut b, 0x20, 4), [1, 1, 1, 0]);
        assert_eq!(key_bytes(&mut b, 0x20, 4), [2, 2, 2, 0]);
    }

    #[test]
    fn what_can_not_be_added() {
        let mut d = device();
        assert_eq!(d.add_file("bootorder", vec![]), Err(FwCfgError::Taken("bootorder".into())));
        assert_eq!(d.add_u16(key::NB_CPUS, 1), Err(FwCfgError::Key(5)));
        assert_eq!(d.add_u16(key::FILE_FIRST, 1), Err(FwCfgError::Key(0x20)));
        assert!(d.add_file(&"x".repeat(56), vec![]).is_err());
    }
}
