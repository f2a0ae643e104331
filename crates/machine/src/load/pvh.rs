//! ELF kernels with a PVH entry (Xen: docs/misc/pvh.pandoc; public/arch-x86/hvm/start_info.h for the layout).

use super::{
    E820Kind, Images, Layout, LoadError, Loaded, bail, elf, linux, place, protected_state, put, put_gdt,
    read_file,
};
use hyaline_x86::state::gpr;
use std::path::Path;

/// XEN_ELFNOTE_PHYS32_ENTRY.
const PHYS32_ENTRY: u32 = 18;
const START_MAGIC: u32 = 0x336e_c578;

/// Loads an ELF kernel that says where it wants to be entered in 32-bit mode.
pub(super) fn load(
    kernel: &[u8],
    name: &str,
    images: &Images,
    layout: &Layout<'_>,
) -> Result<Loaded, LoadError> {
    let elf = elf::parse(kernel, name)?;
    let Some(note) = elf.note(b"Xen", PHYS32_ENTRY) else {
        bail!(
            "-kernel {name}: this ELF file has no PVH note (owner `Xen`, type 18: PHYS32_ENTRY) and no multiboot header, so its entry \
             is unknown. A Linux vmlinux has it when built with CONFIG_PVH=y; else start the bzImage"
        );
    };
    let entry = match note.len() {
        4.. => u32::from_le_bytes([note[0], note[1], note[2], note[3]]),
        _ => bail!("-kernel {name}: the PVH note is too short ({} bytes)", note.len()),
    };
    let mut end = 0;
    for part in &elf.loads {
        put(layout, part.address, part.data, &format!("-kernel {name}"))?;
        end = end.max(part.address.saturating_add(part.size));
    }
    if end > layout.low_ram {
        bail!(
            "-kernel {name}: needs memory up to {end:#x}; the machine has {} MiB; give more with -m",
            layout.low_ram >> 20
        );
    }
    let mut line = images.append.clone().into_bytes();
    line.push(0);
    put(layout, place::COMMAND_LINE, &line, "-append")?;

    // hvm_start_info version 1, then its module list, then the memory map.
    let (modules_at, map_at) = (place::START_INFO + 0x40, place::START_INFO + 0x80);
    let mut module = [0u8; 32];
    let modules = match &images.initrd {
        None => 0u32,
        Some(initrd) => {
            let data = read_file("-initrd", Path::new(initrd))?;
            let at = linux::initrd_place(data.len() as u64, end, 1 << 32, layout.low_ram, initrd)?;
            put(layout, at, &data, &format!("-initrd {initrd}"))?;
            module[..8].copy_from_slice(&at.to_le_bytes());
            module[8..16].copy_from_slice(&(data.len() as u64).to_le_bytes());
            1
        }
    };
    let mut map = Vec::new();
    for e in layout.e820 {
        map.extend(e.start.to_le_bytes());
        map.extend(e.len.to_le_bytes());
        map.extend((if e.kind == E820Kind::Acpi { 3u32 } else { e.kind as u32 }).to_le_bytes());
        map.extend(0u32.to_le_bytes());
    }
    let mut info = Vec::new();
    for v in [START_MAGIC, 1, 0, modules] {
        info.extend(v.to_le_bytes());
    }
    for v in [if modules > 0 { modules_at } else { 0 }, place::COMMAND_LINE, layout.rsdp, map_at] {
        info.extend(v.to_le_bytes());
    }
    info.extend((layout.e820.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    put(layout, place::START_INFO, &info, "the PVH start information")?;
    put(layout, modules_at, &module, "the PVH module list")?;
    put(layout, map_at, &map, "the PVH memory map")?;
    put_gdt(layout, false)?;

    let mut state = protected_state(entry, 0x10, 0x18);
    state.gpr[gpr::RBX] = place::START_INFO;
    Ok(Loaded {
        state,
        what: format!("ELF{} kernel (PVH entry {entry:#x})", if elf.wide { "64" } else { "32" }),
    })
}
