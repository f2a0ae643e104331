//! Multiboot 1 kernels (Multiboot Specification version 0.6.96), with modules.

use super::{
    E820Kind, Images, Layout, LoadError, Loaded, bail, elf, place, protected_state, put, put_gdt, read_file,
    u32_at,
};
use hyaline_x86::state::gpr;
use std::path::Path;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;

/// Offset of the header in the file: in the first 8192 bytes, 4-byte aligned (§3.1), with a right checksum.
pub(super) fn header(kernel: &[u8]) -> Option<usize> {
    (0..8192usize.min(kernel.len())).step_by(4).find(|&at| {
        match (u32_at(kernel, at), u32_at(kernel, at + 4), u32_at(kernel, at + 8)) {
            (Some(HEADER_MAGIC), Some(flags), Some(sum)) => {
                HEADER_MAGIC.wrapping_add(flags).wrapping_add(sum) == 0
            }
            _ => false,
        }
    })
}

/// Loads the kernel by its header's addresses or as ELF, its modules, and the multiboot information.
pub(super) fn load(
    kernel: &[u8],
    name: &str,
    at: usize,
    images: &Images,
    layout: &Layout<'_>,
) -> Result<Loaded, LoadError> {
    let flags = u32_at(kernel, at + 4).unwrap_or(0);
    // §3.1.2: bits 0-15 are requirements that must be understood. 0: modules page-aligned (they are), 1: memory information
    // (always given), 2: a video mode.
    if flags & 0xfff8 != 0 {
        bail!(
            "-kernel {name}: multiboot flags {flags:#x} demand features that this loader does not know (bits {:#x})",
            flags & 0xfff8
        );
    }
    if flags & 4 != 0 {
        bail!(
            "-kernel {name}: the multiboot header demands a video mode (flag 2); this machine has no display. Build the kernel without it"
        );
    }
    let (entry, mut end);
    if flags & 1 << 16 != 0 {
        let field = |n: usize| u32_at(kernel, at + n).map(u64::from);
        let (Some(header), Some(load), Some(load_end), Some(bss_end), Some(start)) =
            (field(12), field(16), field(20), field(24), field(28))
        else {
            bail!("-kernel {name}: the multiboot header is truncated");
        };
        let Some(first) = header.checked_sub(load).and_then(|before| (at as u64).checked_sub(before)) else {
            bail!("-kernel {name}: multiboot load address {load:#x} lies before the file's start");
        };
        let len = if load_end == 0 { kernel.len() as u64 - first } else { load_end.saturating_sub(load) };
        let Some(data) = kernel.get(first as usize..).and_then(|d| d.get(..len as usize)) else {
            bail!(
                "-kernel {name}: truncated: the multiboot header promises {len} bytes from {first:#x}, the file has {}",
                kernel.len()
            );
        };
        put(layout, load, data, &format!("-kernel {name}"))?;
        (entry, end) = (start, (load + len).max(bss_end));
    } else {
        let elf = elf::parse(kernel, name)?;
        if elf.wide {
            bail!(
                "-kernel {name}: a 64-bit ELF file; multiboot 1 starts 32-bit code. Link it as ELF32 or set the address fields (flag 16)"
            );
        }
        end = 0;
        for part in &elf.loads {
            put(layout, part.address, part.data, &format!("-kernel {name}"))?;
            end = end.max(part.address.saturating_add(part.size));
        }
        entry = elf.entry;
    }
    if end > layout.low_ram {
        bail!(
            "-kernel {name}: needs memory up to {end:#x}; the machine has {} MiB; give more with -m",
            layout.low_ram >> 20
        );
    }

    // Strings and tables grow upwards from the modules' place; the modules themselves lie page-aligned after the kernel.
    let mut strings = Vec::new();
    let string = |text: &str, strings: &mut Vec<u8>| {
        let at = place::COMMAND_LINE + strings.len() as u64;
        strings.extend(text.as_bytes());
        strings.push(0);
        at as u32
    };
    let line = string(format!("{name} {}", images.append).trim_end(), &mut strings);
    let mut modules = Vec::new();
    for item in images.initrd.iter().flat_map(|list| list.split(',')).filter(|i| !i.trim().is_empty()) {
        let item = item.trim();
        let file = item.split(' ').next().unwrap_or(item);
        let data = read_file("-initrd", Path::new(file))?;
        let start = end.next_multiple_of(4096);
        put(layout, start, &data, &format!("-initrd {file}"))?;
        end = start + data.len() as u64;
        modules.extend((start as u32).to_le_bytes());
        modules.extend((end as u32).to_le_bytes());
        modules.extend(string(item, &mut strings).to_le_bytes());
        modules.extend(0u32.to_le_bytes());
    }
    let loader = string("Hyaline", &mut strings);
    if strings.len() as u64 > place::MODULES - place::COMMAND_LINE {
        bail!(
            "-append: command line and module names have {} bytes together; at most {} fit",
            strings.len(),
            place::MODULES - place::COMMAND_LINE
        );
    }
    put(layout, place::COMMAND_LINE, &strings, "-append")?;
    put(layout, place::MODULES, &modules, "the module list")?;
    let mut map = Vec::new();
    for e in layout.e820 {
        map.extend(20u32.to_le_bytes());
        map.extend(e.start.to_le_bytes());
        map.extend(e.len.to_le_bytes());
        map.extend((if e.kind == E820Kind::Acpi { 3u32 } else { e.kind as u32 }).to_le_bytes());
    }
    let map_at = place::START_INFO + 0x80;
    put(layout, map_at, &map, "the memory map")?;

    // §3.3: boot information. Flags: memory, command line, modules, memory map, loader name.
    let mut info = [0u8; 0x58];
    let mut set = |at: usize, v: u32| info[at..at + 4].copy_from_slice(&v.to_le_bytes());
    set(0, 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    set(4, 639);
    set(8, (layout.low_ram.saturating_sub(1 << 20) >> 10) as u32);
    set(16, line);
    set(20, (modules.len() / 16) as u32);
    set(24, place::MODULES as u32);
    set(44, map.len() as u32);
    set(48, map_at as u32);
    set(64, loader);
    put(layout, place::START_INFO, &info, "the multiboot information")?;
    put_gdt(layout, false)?;
    let mut state = protected_state(entry as u32, 0x10, 0x18);
    state.gpr[gpr::RAX] = LOADER_MAGIC;
    state.gpr[gpr::RBX] = place::START_INFO;
    Ok(Loaded { state, what: format!("multiboot kernel (entry {entry:#x}, {} modules)", modules.len() / 16) })
}
