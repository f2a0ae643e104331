//! Loaders: what puts a guest into memory without firmware, and the processor state it starts in.

mod bzimage;
mod elf;
mod linux;
mod multiboot;
mod pvh;

use hyaline_space::{AddressSpace, Origin};
use hyaline_x86::state::{CpuState, Segment, Table, cr0, cr4, efer, flag, gpr};
use std::fmt;
use std::path::{Path, PathBuf};

/// A kind of memory in the map a guest is told (ACPI 6.4 table 15-374).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum E820Kind {
    /// Usable RAM.
    Ram = 1,
    /// Reserved.
    Reserved = 2,
    /// ACPI tables; usable once read.
    Acpi = 3,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820 {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What is there.
    pub kind: E820Kind,
}

/// What to load and how.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// `-kernel`.
    pub kernel: Option<PathBuf>,
    /// A kernel that is part of the program, in place of a file.
    pub builtin: Option<&'static [u8]>,
    /// `-initrd`: for Linux one file; for multiboot `file args,file args`.
    pub initrd: Option<String>,
    /// `-append`.
    pub append: String,
    /// Boot Linux by its 32-bit protocol although it offers the 64-bit one.
    pub boot32: bool,
}

/// What the loaders need to know of the machine.
pub struct Layout<'a> {
    /// Memory to load into.
    pub memory: &'a AddressSpace,
    /// Bytes of RAM from address 0 up to the PCI hole.
    pub low_ram: u64,
    /// The memory map.
    pub e820: &'a [E820],
    /// Where the ACPI root pointer is.
    pub rsdp: u64,
}

/// What was loaded, and how the bootstrap processor starts in it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Processor state.
    pub state: Box<CpuState>,
    /// For people: `Linux 6.1.0-… (bzImage, 64-bit protocol)`.
    pub what: String,
}

/// Why a guest can't be loaded.
#[derive(Debug)]
pub struct LoadError(String);

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for LoadError {}

macro_rules! bail {
    ($($t:tt)*) => { return Err($crate::load::LoadError::new(format!($($t)*))) };
}
use bail;

impl LoadError {
    pub(crate) fn new(text: impl Into<String>) -> LoadError {
        LoadError(text.into())
    }
}

/// Reads a whole image file.
///
/// # Errors
/// It isn't there, isn't readable, is empty or is a directory: the message names the option and the file.
pub fn read_file(option: &str, path: &Path) -> Result<Vec<u8>, LoadError> {
    match std::fs::read(path) {
        Ok(data) if data.is_empty() => {
            Err(LoadError::new(format!("{option} {}: the file is empty", path.display())))
        }
        Ok(data) => Ok(data),
        Err(e) => Err(LoadError::new(format!("{option} {}: {e}; check the path", path.display()))),
    }
}

/// Loads what `images` names: a Linux bzImage, a PVH ELF kernel or a multiboot 1 kernel.
///
/// # Errors
/// In words, with the option to look at.
pub fn load(images: &Images, layout: &Layout<'_>) -> Result<Loaded, LoadError> {
    let (kernel, name) = match (images.builtin, images.kernel.as_deref()) {
        (Some(data), _) => (data.to_vec(), "(built in)".to_string()),
        (None, Some(path)) => (read_file("-kernel", path)?, path.display().to_string()),
        (None, None) => return Err(LoadError::new("no kernel is named; give -kernel FILE")),
    };
    if bzimage::is_one(&kernel) {
        return bzimage::load(&kernel, &name, images, layout);
    }
    if let Some(header) = multiboot::header(&kernel) {
        return multiboot::load(&kernel, &name, header, images, layout);
    }
    if elf::is_one(&kernel) {
        return pvh::load(&kernel, &name, images, layout);
    }
    bail!(
        "-kernel {name}: this is no kernel that can be started directly. It has neither a Linux boot header (at 0x202), nor a \
         multiboot 1 header in its first 8192 bytes, nor is it an ELF file with a PVH note{}",
        if kernel.len() < 0x264 { "; it is also too short for any of them: a truncated copy?" } else { "" }
    )
}

/// Copies bytes into guest RAM.
fn put(layout: &Layout<'_>, address: u64, data: &[u8], what: &str) -> Result<(), LoadError> {
    let end = address.checked_add(data.len() as u64).filter(|e| *e <= layout.low_ram);
    if end.is_none() {
        bail!(
            "{what}: its {} bytes at {address:#x} do not fit into the machine's memory below the PCI hole ({} MiB); give more with -m",
            data.len(),
            layout.low_ram >> 20
        );
    }
    layout.memory.write(address, data, &Origin::LOADER).map_err(|e| LoadError::new(format!("{what}: {e}")))
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(data.get(at..at.checked_add(2)?)?.try_into().ok()?))
}
fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}
fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Where the loaders put what a started kernel reads: all below 640 KiB, above the BIOS data area.
mod place {
    pub(super) const GDT: u64 = 0x500;
    pub(super) const BOOT_PARAMS: u64 = 0x7000;
    pub(super) const PAGE_TABLES: u64 = 0x9000;
    pub(super) const START_INFO: u64 = 0x6000;
    pub(super) const COMMAND_LINE: u64 = 0x2_0000;
    pub(super) const MODULES: u64 = 0x4_0000;
}

fn flat(attr: u16, selector: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, attr, selector, unusable: false }
}

/// Flat 32-bit protected mode without paging: as PVH, multiboot and the 32-bit Linux protocol want it.
fn protected_state(entry: u32, code: u16, data: u16) -> Box<CpuState> {
    let mut s = Box::new(CpuState::at_reset(true));
    s.cr0 = cr0::PE | cr0::ET;
    let d = flat(0xc093, data);
    s.seg = [d, flat(0xc09b, code), d, d, d, d];
    s.tr = Segment { base: 0, limit: 0x67, attr: 0x8b, selector: 0, unusable: false };
    s.gdtr = Table { base: place::GDT, limit: 0x1f };
    s.idtr = Table { base: 0, limit: 0 };
    s.rip = u64::from(entry);
    s.rflags = flag::ONE;
    s
}

/// The GDT that goes with these states: null, null, 64- or 32-bit code at 0x10, data at 0x18.
fn put_gdt(layout: &Layout<'_>, long: bool) -> Result<(), LoadError> {
    let code: u64 = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    let mut gdt = [0u8; 32];
    gdt[8..16].copy_from_slice(&0x00cf_9b00_0000_ffffu64.to_le_bytes());
    gdt[16..24].copy_from_slice(&code.to_le_bytes());
    gdt[24..32].copy_from_slice(&0x00cf_9300_0000_ffffu64.to_le_bytes());
    put(layout, place::GDT, &gdt, "the boot GDT")
}

/// Long mode with the first 4 GiB mapped one to one: the 64-bit Linux protocol.
fn long_state(layout: &Layout<'_>, entry: u64) -> Result<Box<CpuState>, LoadError> {
    put_gdt(layout, true)?;
    let t = place::PAGE_TABLES;
    let mut tables = vec![0u8; 6 * 4096];
    let mut entry_at = |table: usize, i: usize, v: u64| {
        tables[table * 4096 + i * 8..][..8].copy_from_slice(&v.to_le_bytes());
    };
    entry_at(0, 0, (t + 0x1000) | 3);
    for gib in 0..4u64 {
        entry_at(1, gib as usize, (t + 0x2000 + gib * 0x1000) | 3);
        for i in 0..512u64 {
            // Present, writable, 2 MiB page.
            entry_at(2 + gib as usize, i as usize, gib << 30 | i << 21 | 0x83);
        }
    }
    put(layout, t, &tables, "the boot page tables")?;
    let mut s = protected_state(0, 0x10, 0x18);
    s.seg[1] = flat(0xa09b, 0x10);
    s.cr0 |= cr0::PG;
    s.cr4 = cr4::PAE;
    s.cr3 = t;
    s.efer = efer::LME | efer::LMA;
    s.rip = entry;
    s.gpr[gpr::RSP] = place::BOOT_PARAMS - 0x10;
    Ok(s)
}
