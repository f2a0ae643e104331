//! The part of ELF that loaders need: program headers and notes (System V ABI, "Program Loading"), 32 and 64 bits.

use super::{LoadError, bail, u16_at, u32_at, u64_at};

/// One loadable segment.
pub(super) struct Load<'a> {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Bytes from the file.
    pub(super) data: &'a [u8],
    /// Size in memory; what is beyond the data is zero.
    pub(super) size: u64,
}

/// A parsed file.
pub(super) struct Elf<'a> {
    /// Entry point.
    pub(super) entry: u64,
    /// 64-bit file.
    pub(super) wide: bool,
    /// Loadable segments.
    pub(super) loads: Vec<Load<'a>>,
    /// Contents of note segments.
    pub(super) notes: Vec<&'a [u8]>,
}

/// Is it an ELF file?
pub(super) fn is_one(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF")
}

/// Parses a little-endian executable.
pub(super) fn parse<'a>(file: &'a [u8], name: &str) -> Result<Elf<'a>, LoadError> {
    let (wide, machine) = match (file.get(4), file.get(5), u16_at(file, 18)) {
        (Some(1), Some(1), Some(m)) => (false, m),
        (Some(2), Some(1), Some(m)) => (true, m),
        _ => bail!("-kernel {name}: the ELF header is damaged or not little endian"),
    };
    // 3: Intel 80386; 62: AMD x86-64.
    if !matches!(machine, 3 | 62) {
        bail!("-kernel {name}: an ELF file for machine type {machine}; this PC runs x86 (3) and x86-64 (62)");
    }
    let cut = || LoadError::new(format!("-kernel {name}: the ELF file is truncated at {} bytes", file.len()));
    let word =
        |at: usize, at32: usize| if wide { u64_at(file, at) } else { u32_at(file, at32).map(u64::from) };
    let entry = word(24, 24).ok_or_else(cut)?;
    let table = word(32, 28).ok_or_else(cut)?;
    let (size_at, count_at) = if wide { (54, 56) } else { (42, 44) };
    let size = u64::from(u16_at(file, size_at).ok_or_else(cut)?);
    let count = u64::from(u16_at(file, count_at).ok_or_else(cut)?);
    let mut elf = Elf { entry, wide, loads: Vec::new(), notes: Vec::new() };
    for i in 0..count {
        let at = table.checked_add(i * size).and_then(|v| usize::try_from(v).ok()).ok_or_else(cut)?;
        let get = |w: usize, n: usize| {
            if wide {
                u64_at(file, at.checked_add(w)?)
            } else {
                u32_at(file, at.checked_add(n)?).map(u64::from)
            }
        };
        let kind = u32_at(file, at).ok_or_else(cut)?;
        let offset = get(8, 4).ok_or_else(cut)?;
        let address = get(24, 12).ok_or_else(cut)?;
        let in_file = get(32, 16).ok_or_else(cut)?;
        let in_memory = get(40, 20).ok_or_else(cut)?;
        let data = || {
            let start = usize::try_from(offset).ok()?;
            file.get(start..start.checked_add(usize::try_from(in_file).ok()?)?)
        };
        match kind {
            1 if in_memory > 0 => {
                elf.loads.push(Load { address, data: data().ok_or_else(cut)?, size: in_memory.max(in_file) })
            }
            4 => elf.notes.push(data().ok_or_else(cut)?),
            _ => {}
        }
    }
    if elf.loads.is_empty() {
        bail!("-kernel {name}: the ELF file has nothing to load");
    }
    Ok(elf)
}

impl Elf<'_> {
    /// The contents of a note.
    pub(super) fn note(&self, owner: &[u8], kind: u32) -> Option<&[u8]> {
        for mut notes in self.notes.iter().copied() {
            while let (Some(n), Some(d), Some(t)) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8)) {
                let pad = |v: u32| (v as usize).checked_next_multiple_of(4);
                let body = 12usize.checked_add(pad(n)?)?;
                let end = body.checked_add(pad(d)?)?;
                let name = notes.get(12..12usize.checked_add(n as usize)?)?;
                let desc = notes.get(body..body.checked_add(d as usize)?)?;
                if t == kind && name.strip_suffix(b"\0").unwrap_or(name) == owner {
                    return Some(desc);
                }
                notes = notes.get(end..)?;
            }
        }
        None
    }
}
