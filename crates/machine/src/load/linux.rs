//! What Linux is told at its start, whichever protocol started it (Linux: Documentation/arch/x86/zero-page.rst).

use super::{E820, LoadError, bail};

/// Offsets in the boot parameters ("zero page").
pub(super) mod zero_page {
    pub(crate) const ACPI_RSDP: usize = 0x70;
    pub(crate) const E820_ENTRIES: usize = 0x1e8;
    pub(crate) const HEADER: usize = 0x1f1;
    pub(crate) const TYPE_OF_LOADER: usize = 0x210;
    pub(crate) const LOADFLAGS: usize = 0x211;
    pub(crate) const RAMDISK_IMAGE: usize = 0x218;
    pub(crate) const RAMDISK_SIZE: usize = 0x21c;
    pub(crate) const HEAP_END: usize = 0x224;
    pub(crate) const CMD_LINE: usize = 0x228;
    pub(crate) const E820_TABLE: usize = 0x2d0;
    /// Entries that fit into the page.
    pub(crate) const E820_MAX: usize = 128;
}

/// Writes the memory map into the boot parameters.
pub(super) fn put_e820(page: &mut [u8; 4096], map: &[E820]) {
    let n = map.len().min(zero_page::E820_MAX);
    page[zero_page::E820_ENTRIES] = n as u8;
    for (i, e) in map.iter().take(n).enumerate() {
        let at = zero_page::E820_TABLE + i * 20;
        page[at..at + 8].copy_from_slice(&e.start.to_le_bytes());
        page[at + 8..at + 16].copy_from_slice(&e.len.to_le_bytes());
        page[at + 16..at + 20].copy_from_slice(&(e.kind as u32).to_le_bytes());
    }
}

/// The highest page-aligned place for an initrd of `len` bytes that ends at or below `limit`, above `floor`.
pub(super) fn initrd_place(len: u64, floor: u64, limit: u64, ram: u64, name: &str) -> Result<u64, LoadError> {
    let top = limit.min(ram);
    match top.checked_sub(len).map(|at| at & !0xfff) {
        Some(at) if at >= floor => Ok(at),
        _ => bail!(
            "-initrd {name}: its {len} bytes do not fit between the kernel's end at {floor:#x} and {top:#x}; give the machine more memory with -m \
             (it has {} MiB below the PCI hole) or use a smaller initrd",
            ram >> 20
        ),
    }
}
