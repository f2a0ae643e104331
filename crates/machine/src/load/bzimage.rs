//! Linux's bzImage, by the 64-bit or the 32-bit boot protocol (Linux: Documentation/arch/x86/boot.rst).

use super::linux::{initrd_place, put_e820, zero_page};
use super::{
    Images, Layout, LoadError, Loaded, bail, long_state, place, protected_state, put, put_gdt, read_file,
};
use super::{u16_at, u32_at, u64_at};
use hyaline_x86::state::gpr;
use std::path::Path;

const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");

/// Does it have Linux's boot header?
pub(super) fn is_one(kernel: &[u8]) -> bool {
    u32_at(kernel, 0x202) == Some(MAGIC)
}

/// Loads kernel, initrd and command line, and makes the state the protocol asks for.
pub(super) fn load(
    kernel: &[u8],
    name: &str,
    images: &Images,
    layout: &Layout<'_>,
) -> Result<Loaded, LoadError> {
    let version = u16_at(kernel, 0x206).unwrap_or(0);
    if version < 0x200 || kernel.get(0x211).is_none_or(|f| f & 1 == 0) {
        bail!(
            "-kernel {name}: boot protocol {}.{:02} of a zImage (loaded low); only bzImages, protocol 2.00 or later, are started directly",
            version >> 8,
            version & 0xff
        );
    }
    // The setup code is skipped: the protected-mode part starts after its sectors (0 means 4) and the boot sector.
    let setup = (usize::from(kernel[0x1f1]).max(usize::from(kernel[0x1f1] == 0) * 4) + 1) * 512;
    let Some(protected) = kernel.get(setup..).filter(|p| !p.is_empty()) else {
        bail!(
            "-kernel {name}: the file ends in its setup code, at {} of at least {setup} bytes; a truncated copy?",
            kernel.len()
        );
    };
    // syssize counts paragraphs of 16 bytes; the file may be a little longer (signature) but not shorter.
    let promised = u32_at(kernel, 0x1f4).unwrap_or(0) as usize * 16;
    if protected.len() + 16 < promised {
        bail!(
            "-kernel {name}: the file is truncated: its header promises {promised} bytes of kernel after the setup code, {} are there",
            protected.len()
        );
    }
    let start = 0x10_0000u64;
    put(layout, start, protected, &format!("-kernel {name}"))?;

    let header_end = 0x202 + usize::from(kernel[0x201]);
    let mut page = [0u8; 4096];
    let header = kernel.get(zero_page::HEADER..header_end.min(0x290)).unwrap_or(&[]);
    page[zero_page::HEADER..zero_page::HEADER + header.len()].copy_from_slice(header);
    page[zero_page::TYPE_OF_LOADER] = 0xff;
    // CAN_USE_HEAP; quiet flag off; loaded high is the kernel's own.
    page[zero_page::LOADFLAGS] |= 0x80;
    page[zero_page::HEAP_END..][..2].copy_from_slice(&0xfe00u16.to_le_bytes());
    page[zero_page::ACPI_RSDP..][..8].copy_from_slice(&layout.rsdp.to_le_bytes());

    let room = if version >= 0x206 { u32_at(kernel, 0x238).unwrap_or(255) as usize } else { 255 };
    let room = if room == 0 { 255 } else { room };
    if images.append.len() > room {
        bail!(
            "-append: the command line has {} bytes; this kernel takes at most {room}",
            images.append.len()
        );
    }
    let mut line = images.append.clone().into_bytes();
    line.push(0);
    put(layout, place::COMMAND_LINE, &line, "-append")?;
    page[zero_page::CMD_LINE..][..4].copy_from_slice(&(place::COMMAND_LINE as u32).to_le_bytes());

    // What the kernel needs before it reads the memory map: its own unpacked size (2.10), else its file's size.
    let init_size = if version >= 0x20a { u64::from(u32_at(kernel, 0x260).unwrap_or(0)) } else { 0 };
    let preferred = if version >= 0x20a { u64_at(kernel, 0x258).unwrap_or(start) } else { start };
    let used =
        (start + protected.len() as u64).max(preferred.saturating_add(init_size)).max(start + init_size);
    if used > layout.low_ram {
        bail!(
            "-kernel {name}: the kernel needs memory up to {used:#x} ({} MiB) to unpack itself, the machine has {} MiB; give more with -m",
            used.div_ceil(1 << 20),
            layout.low_ram >> 20
        );
    }
    if let Some(initrd) = &images.initrd {
        let data = read_file("-initrd", Path::new(initrd))?;
        let limit = if version >= 0x203 {
            u64::from(u32_at(kernel, 0x22c).unwrap_or(0x37ff_ffff)) + 1
        } else {
            0x3800_0000
        };
        let at = initrd_place(data.len() as u64, used, limit, layout.low_ram, initrd)?;
        put(layout, at, &data, &format!("-initrd {initrd}"))?;
        page[zero_page::RAMDISK_IMAGE..][..4].copy_from_slice(&(at as u32).to_le_bytes());
        page[zero_page::RAMDISK_SIZE..][..4].copy_from_slice(&(data.len() as u32).to_le_bytes());
    }
    put_e820(&mut page, layout.e820);
    put(layout, place::BOOT_PARAMS, &page, "the boot parameters")?;

    // XLF_KERNEL_64: there is a 64-bit entry 0x200 bytes in.
    let long = version >= 0x20c && u16_at(kernel, 0x236).unwrap_or(0) & 1 != 0 && !images.boot32;
    let mut state = if long {
        long_state(layout, start + 0x200)?
    } else {
        put_gdt(layout, false)?;
        protected_state(start as u32, 0x10, 0x18)
    };
    state.gpr[gpr::RSI] = place::BOOT_PARAMS;
    let release = kernel_version(kernel).map_or(String::new(), |v| format!(" {v}"));
    let bits = if long { 64 } else { 32 };
    Ok(Loaded {
        state,
        what: format!("Linux{release} (bzImage, {bits}-bit protocol {}.{:02})", version >> 8, version & 0xff),
    })
}

/// The version text that the header points to.
fn kernel_version(kernel: &[u8]) -> Option<String> {
    let at = usize::from(u16_at(kernel, 0x20e)?).checked_add(0x200)?;
    let text = kernel.get(at..)?.split(|b| *b == 0).next()?;
    let word = text.split(|b| *b == b' ').next()?;
    (!word.is_empty() && word.len() < 80 && word.iter().all(|b| b.is_ascii_graphic()))
        .then(|| String::from_utf8_lossy(word).into_owned())
}
