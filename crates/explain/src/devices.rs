//! Devices and registers: the table, and finding a device and its register from frames.

use std::sync::OnceLock;

use crate::access::{Access, Space};
use crate::model::{Frame, Stack};
use crate::names;

/// A register as the table has it.
#[derive(Debug, Clone)]
pub struct Register {
    /// Offset (or port) of the first one.
    pub offset: u64,
    /// Distance of repetitions and their number; (0, 1) for a single register.
    pub stride: u64,
    /// See `stride`.
    pub count: u64,
    /// Width in bytes.
    pub width: u64,
    /// `ro`, `wo`, `rw`.
    pub access: &'static str,
    /// Short name, with `{n}` for the index.
    pub name: &'static str,
    /// Long name.
    pub title: &'static str,
    /// Bit numbers and names.
    pub bits: Vec<(u32, &'static str)>,
    /// When it is used and what that sets going.
    pub note: &'static str,
}

/// How a block finds the register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OffsetFrom {
    /// The region's offset.
    Region,
    /// The absolute port.
    Port,
    /// An argument of the handler.
    Arg(Vec<&'static str>),
}

/// One region of a device.
#[derive(Debug, Clone)]
pub struct Block {
    /// Short name.
    pub id: &'static str,
    /// What it is.
    pub title: &'static str,
    /// `pio`, `mmio`, `both`, `config`.
    pub space: &'static str,
    /// Bytes; 0 when not fixed.
    pub size: u64,
    /// Functions that serve it.
    pub handlers: Vec<&'static str>,
    /// How the register is found.
    pub from: OffsetFrom,
    /// Fixed addresses.
    pub bases: Vec<u64>,
    /// Registers.
    pub registers: Vec<Register>,
}

/// One device.
#[derive(Debug, Clone)]
pub struct Device {
    /// Short name.
    pub id: &'static str,
    /// What it is.
    pub title: &'static str,
    /// How often it is met in traces, 0 to 9.
    pub prior: u32,
    /// Source of the table.
    pub cite: &'static str,
    /// Patterns of function names.
    pub functions: Vec<&'static str>,
    /// Parts of source paths.
    pub files: Vec<&'static str>,
    /// Regions.
    pub blocks: Vec<Block>,
}

/// The table.
pub fn table() -> &'static [Device] {
    static TABLE: OnceLock<Vec<Device>> = OnceLock::new();
    TABLE.get_or_init(|| parse(include_str!("../data/devices.txt")).0)
}

fn num(s: &str) -> Option<u64> {
    match s.strip_prefix("0x") {
        Some(h) => u64::from_str_radix(h, 16).ok(),
        None => s.parse().ok(),
    }
}

/// Reads the table; the second part lists lines that were not understood (none, as the tests check).
fn parse(text: &'static str) -> (Vec<Device>, Vec<String>) {
    let mut out: Vec<Device> = Vec::new();
    let mut bad = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if parse_line(line, &mut out).is_none() {
            bad.push(line.to_owned());
        }
    }
    (out, bad)
}

fn parse_line(line: &'static str, out: &mut Vec<Device>) -> Option<()> {
    let (word, rest) = line.split_once(' ')?;
    if word == "device" {
        let mut p = rest.split(" | ");
        let (id, title, prior, cite) =
            (p.next()?.trim(), p.next()?.trim(), p.next()?.trim().parse().ok()?, p.next()?.trim());
        out.push(Device {
            id,
            title,
            prior,
            cite,
            functions: Vec::new(),
            files: Vec::new(),
            blocks: Vec::new(),
        });
        return Some(());
    }
    let d = out.last_mut()?;
    match word {
        "fn" => d.functions.extend(rest.split('|').map(str::trim)),
        "file" => d.files.extend(rest.split('|').map(str::trim)),
        "block" => {
            let p: Vec<&'static str> = rest.split('|').map(str::trim).collect();
            let from = match p.get(5)?.split_once(':') {
                Some(("arg", names)) => OffsetFrom::Arg(names.split(',').collect()),
                _ if *p.get(5)? == "port" => OffsetFrom::Port,
                _ => OffsetFrom::Region,
            };
            d.blocks.push(Block {
                id: p.first()?,
                title: p.get(1)?,
                space: p.get(2)?,
                size: num(p.get(3)?)?,
                handlers: p.get(4)?.split(',').map(str::trim).filter(|h| !h.is_empty()).collect(),
                from,
                bases: p.get(6).unwrap_or(&"").split(',').filter_map(|b| num(b.trim())).collect(),
                registers: Vec::new(),
            });
        }
        "r" => {
            let (body, bits) = rest.split_once(" ; ").unwrap_or((rest, ""));
            let mut p = body.splitn(5, ' ');
            let (off, width, access, name, title) = (p.next()?, p.next()?, p.next()?, p.next()?, p.next()?);
            let (offset, stride, count) = match off.split_once('+') {
                Some((o, s)) => {
                    let (s, c) = s.split_once('x')?;
                    (num(o)?, num(s)?, num(c)?)
                }
                None => (num(off)?, 0, 1),
            };
            let bits = bits
                .split_whitespace()
                .map(|b| b.split_once('=').and_then(|(n, v)| Some((n.parse().ok()?, v))))
                .collect::<Option<Vec<_>>>()?;
            d.blocks.last_mut()?.registers.push(Register {
                offset,
                stride,
                count,
                width: num(width)?,
                access,
                name,
                title: title.trim(),
                bits,
                note: "",
            });
        }
        "n" => match d.blocks.last_mut()?.registers.last_mut() {
            Some(r) => r.note = rest,
            None => return Some(()),
        },
        _ => return None,
    }
    Some(())
}

/// A register that an access meets.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The register.
    pub register: &'static Register,
    /// Index of a repeated register.
    pub index: u64,
    /// Bytes into the register.
    pub within: u64,
}

impl Hit {
    /// The name with its index.
    pub fn name(&self) -> String {
        expand(self.register.name, self.index)
    }

    /// Offset of the register itself.
    pub fn offset(&self) -> u64 {
        self.register.offset + self.register.stride * self.index
    }

    /// Names of the bits that are set, and what remains without a name.
    pub fn decode(&self, value: u64) -> Vec<String> {
        let width = self.register.width.min(8);
        let mask = if width >= 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
        let v = value.checked_shl(8 * self.within.min(7) as u32).unwrap_or(0) & mask;
        if self.register.bits.is_empty() {
            return Vec::new();
        }
        let mut out: Vec<(u32, String)> = self
            .register
            .bits
            .iter()
            .filter(|(b, _)| *b < 64 && v >> b & 1 == 1)
            .map(|&(b, n)| (b, n.to_owned()))
            .collect();
        let known = self.register.bits.iter().fold(0u64, |m, (b, _)| m | 1u64.checked_shl(*b).unwrap_or(0));
        let rest = v & !known;
        out.sort_by_key(|x| std::cmp::Reverse(x.0));
        let mut out: Vec<String> = out.into_iter().map(|x| x.1).collect();
        if rest != 0 {
            out.push(format!("other bits {rest:#x}"));
        }
        if v == 0 {
            out.push("0".into());
        }
        out
    }
}

fn expand(name: &str, n: u64) -> String {
    match (name.find('{'), name.find('}')) {
        (Some(a), Some(b)) if a < b => {
            let inner = &name[a + 1..b];
            let add = inner.split_once('+').and_then(|(_, k)| k.parse::<u64>().ok()).unwrap_or(0);
            format!("{}{}{}", &name[..a], n + add, &name[b + 1..])
        }
        _ => name.to_owned(),
    }
}

impl Block {
    /// The register at an offset.
    pub fn at(&'static self, offset: u64) -> Option<Hit> {
        // Single registers win over arrays that cover the same place.
        let mut best: Option<Hit> = None;
        for r in &self.registers {
            let Some(d) = offset.checked_sub(r.offset) else { continue };
            let (index, within) =
                (d.checked_div(r.stride).unwrap_or(0), d.checked_rem(r.stride).unwrap_or(d));
            if index < r.count && within < r.width {
                let single = r.stride == 0;
                if best.as_ref().is_none_or(|b| single && b.register.stride != 0) {
                    best = Some(Hit { register: r, index, within });
                }
            }
        }
        best
    }
}

/// What was found for an access.
#[derive(Debug, Clone, Default)]
pub struct Identified {
    /// Short name of the device; of the table, or made of the source file's name.
    pub id: String,
    /// What it is.
    pub title: String,
    /// The device of the table.
    pub device: Option<&'static Device>,
    /// The region.
    pub block: Option<&'static Block>,
    /// The register.
    pub hit: Option<Hit>,
    /// The offset it was looked up with.
    pub offset: Option<u64>,
    /// Position of the frame that names the device.
    pub frame: Option<usize>,
    /// The frame follows the dispatch without a gap, so it is the handler.
    pub sure: bool,
    /// The register follows from the handler and a sure offset.
    pub register_sure: bool,
    /// What kind of virtio device, as far as frames tell.
    pub flavour: Option<String>,
    /// The value handed to the handler, and the frame that gives it.
    pub value: Option<(u64, usize, bool)>,
}

/// Function names that several devices share; the source file must agree.
const SHARED: &str = "uart_*|spi_*|pci_write|pci_read|complete|transfer_audio|write_audio|read_audio|command|dsp_*|mixer_*|dma_cmd*|do_cmd|handle_ti|block_move|draw_line*|fill_window|gpe_*|rtc_*|gic_*|sd_*|nic_receive";

fn file_fits(d: &Device, f: &Frame) -> bool {
    f.file.is_empty()
        || d.files.is_empty()
        || !f.file.contains("hw/")
        || d.files.iter().any(|p| f.file.contains(p))
}

fn by_frame(f: &Frame) -> Option<(&'static Device, Option<&'static Block>)> {
    let n = f.function.as_str();
    if n.is_empty() {
        return None;
    }
    let shared = names::matches(SHARED, n);
    let mut loose = None;
    for d in table() {
        if shared
            && (f.file.is_empty() && !d.id.starts_with(n.split('_').next().unwrap_or("")) || !file_fits(d, f))
        {
            continue;
        }
        for b in &d.blocks {
            if b.handlers.iter().any(|h| names::matches(h, n))
                && (!matches!(b.from, OffsetFrom::Arg(_)) || d.functions.iter().any(|p| names::matches(p, n)))
            {
                // The handler of the device whose own prefix it carries is better than one shared with it.
                let own = d.functions.iter().any(|p| names::matches(p, n));
                if own {
                    return Some((d, Some(b)));
                }
                loose.get_or_insert((d, Some(b)));
            }
        }
    }
    if loose.is_some() {
        return loose;
    }
    for d in table() {
        if shared && !file_fits(d, f) {
            continue;
        }
        if d.functions.iter().any(|p| names::matches(p, n)) {
            return Some((d, None));
        }
    }
    None
}

/// The space that the table gives for the region a handler serves.
pub(crate) fn handler_space(f: &Frame) -> Option<&'static str> {
    by_frame(f).and_then(|(_, b)| b).map(|b| b.space)
}

/// The handlers of virtio's PCI transport are often inlined: the file and the region tell which registers.
fn virtio_transport(out: &mut Identified, a: &Access, frames: &[Frame]) -> Option<()> {
    // virtio-mmio: 512 bytes each, no PCI function on the stack.
    if let (Some(&i), Some(base), Some(off)) = (a.device.first(), &a.base, &a.offset) {
        let virtio =
            frames[i].function.starts_with("virtio_") || frames[i].function.starts_with("virtqueue_");
        let pci =
            a.device.iter().any(|&i| frames[i].function.contains("_pci_") || frames[i].file.contains("pci"));
        if virtio
            && !pci
            && a.space.as_ref().is_some_and(|s| s.value == Space::Mmio)
            && base.value % 0x200 == 0
            && matches!(off.value, 0x50 | 0x70 | 0x40 | 0x44)
        {
            let d = table().iter().find(|d| d.id == "virtio-mmio")?;
            out.device = Some(d);
            out.id = d.id.to_owned();
            out.title = d.title.to_owned();
            out.frame = Some(i);
            out.block = d.blocks.first();
            set_register(out, d.blocks.first()?, a, frames, i);
            out.register_sure = false;
            return Some(());
        }
    }
    let &i = a.device.iter().take(4).find(|&&i| {
        frames[i].file.contains("virtio-pci.c") || names::matches("*virtio_pci_*", &frames[i].function)
    })?;
    let space = a.space.as_ref()?.value;
    let find = |id: &str, block: &str| {
        let d = table().iter().find(|d| d.id == id)?;
        Some((d, d.blocks.iter().find(|b| b.id == block)?))
    };
    let (d, b) = match space {
        Space::Pio => find("virtio-pci-legacy", "legacy")?,
        // QEMU places the structures of the modern BAR one page (4 KiB) apart.
        Space::Mmio => match a.base.as_ref().map(|b| b.value & 0x3fff) {
            Some(0) => find("virtio-pci-modern", "common")?,
            Some(0x1000) => find("virtio-pci-modern", "isr")?,
            Some(0x2000) => find("virtio-pci-modern", "device")?,
            Some(_) => find("virtio-pci-modern", "notify")?,
            None if names::matches("*vector*", &frames[i].function) => find("virtio-pci-modern", "common")?,
            None => return None,
        },
    };
    out.device = Some(d);
    out.id = d.id.to_owned();
    out.title = d.title.to_owned();
    out.frame = Some(i);
    out.block = Some(b);
    set_register(out, b, a, frames, i);
    out.register_sure = false;
    Some(())
}

/// Device of an access, from the frames of its handler.
pub fn identify(stack: &Stack, a: &Access) -> Option<Identified> {
    let frames = &stack.frames;
    // A split or merged frame list: the dispatch frame next to the handler.
    let inner_path =
        a.path.iter().copied().filter(|&i| names::role(&frames[i].function) == names::Role::Dispatch).min();
    let mut out = Identified::default();
    for (k, &i) in a.device.iter().take(12).enumerate() {
        let f = &frames[i];
        if f.function.is_empty() || names::is_runtime(&f.function) {
            continue;
        }
        let Some((d, b)) = by_frame(f) else { continue };
        if out.device.is_some() {
            // A block found deeper refines the same device (esp_pci_io_write -> esp_reg_write), and
            // configuration accesses know their register only in the common function.
            if out.device.is_some_and(|o| o.id == d.id) {
                match b {
                    Some(b) if out.block.is_none() || matches!(b.from, OffsetFrom::Arg(_)) => {
                        out.block = Some(b);
                        set_register(&mut out, b, a, frames, i);
                    }
                    _ => {}
                }
            }
            continue;
        }
        out.device = Some(d);
        out.id = d.id.to_owned();
        out.title = d.title.to_owned();
        out.frame = Some(i);
        let next_to_path = inner_path.is_some_and(
            |p| matches!((frames[p].number, f.number), (Some(o), Some(n)) if p == i + 1 && n.checked_add(1) == Some(o)),
        );
        // A register function, by its name: what it calls may belong to another device.
        let handler = names::matches("*write*|*read*|*_io_*|*_mmio*|*ioport*", &f.function);
        out.sure = k == 0 && next_to_path && handler && !names::matches(SHARED, &f.function);
        if let Some(b) = b {
            out.block = Some(b);
            set_register(&mut out, b, a, frames, i);
        }
    }
    if out.device.is_none() {
        let _ = virtio_transport(&mut out, a, frames);
    }
    if out.device.is_none() {
        // A device without a table: the source file, else the function, names it.
        let i = *a.device.iter().find(|&&i| {
            let f = &frames[i];
            !f.function.is_empty() && !names::is_runtime(&f.function) && !names::is_helper(&f.function)
        })?;
        let f = &frames[i];
        let stem = f.file_name().trim_end_matches(".c").trim_end_matches(".h");
        out.id = if !stem.is_empty() && f.file.contains("hw/") {
            stem.replace('_', "-")
        } else {
            prefix(&f.function).replace('_', "-")
        };
        out.title = format!("device model {}", out.id);
        out.frame = Some(i);
        out.offset = a.part_offset.as_ref().or(a.offset.as_ref()).map(|o| o.value);
    }
    if out.block.is_none() {
        // One block only, or one whose size and space fit.
        if let Some(d) = out.device {
            let fits: Vec<&'static Block> = d
                .blocks
                .iter()
                .filter(|b| b.space == "both" || a.space.as_ref().is_none_or(|s| b.space == s.value.word()))
                .filter(|b| !matches!(b.from, OffsetFrom::Arg(_)))
                .collect();
            let part = a.part_offset.as_ref().or(a.offset.as_ref()).map(|o| o.value);
            let hits: Vec<&'static Block> = fits
                .iter()
                .copied()
                .filter(|b| {
                    part.is_some_and(|p| {
                        let base = if b.from == OffsetFrom::Port {
                            b.bases.first().copied().unwrap_or(0)
                        } else {
                            0
                        };
                        (b.size == 0 || p < b.size) && b.at(base + p).is_some()
                    })
                })
                .collect();
            let one = match (&fits[..], &hits[..]) {
                ([b], _) | (_, [b]) => Some(*b),
                _ => None,
            };
            if let Some(b) = one
                && let Some(i) = out.frame
            {
                out.block = Some(b);
                set_register(&mut out, b, a, frames, i);
                out.register_sure = false;
            }
        }
    }
    out.flavour = flavour(stack, a);
    out.value = value(a, frames, out.sure);
    Some(out)
}

fn prefix(name: &str) -> String {
    let cut = ["_write", "_read", "_io", "_reg", "_mem", "_mmio", "_port"]
        .iter()
        .filter_map(|m| name.find(m))
        .min()
        .unwrap_or(name.len());
    let p = &name[..cut];
    if p.is_empty() { name.to_owned() } else { p.to_owned() }
}

fn set_register(out: &mut Identified, b: &'static Block, a: &Access, frames: &[Frame], i: usize) {
    let mut region = a.part_offset.clone().or_else(|| a.offset.clone());
    if let Some(r) = &mut region {
        // The part that the handler got is sure when the accessor says so, or when it equals a sure offset.
        r.sure = match (&a.part_offset, &a.offset) {
            (Some(p), Some(o)) => p.sure || (o.sure && o.value == p.value),
            (Some(p), None) => p.sure,
            _ => false,
        };
    }
    let region = region;
    let handler_arg = |names: &[&str]| {
        let f = &frames[i];
        names.iter().find_map(|n| f.arg(n).and_then(|x| x.value.map(|v| (v, x.entry))))
    };
    let (offset, sure) = match &b.from {
        OffsetFrom::Region => match (&region, handler_arg(&["addr", "offset", "addr1"])) {
            (Some(o), _) => (Some(o.value), o.sure),
            // Some handlers get an index instead of an offset; only "addr" and "offset" are trusted.
            (None, Some((v, entry))) if v < 1 << 24 => (Some(v), entry),
            _ => (None, false),
        },
        OffsetFrom::Port => {
            let absolute = match (&a.addr, &a.offset, &a.part_offset) {
                (Some(ad), Some(o), Some(p)) => ad
                    .value
                    .checked_add(p.value.wrapping_sub(o.value))
                    .filter(|v| *v <= 0xffff)
                    .map(|v| (v, ad.sure && region.as_ref().is_some_and(|r| r.sure))),
                (Some(ad), _, _) => Some((ad.value, false)),
                _ => None,
            };
            let arg = handler_arg(&["addr", "nport", "port"])
                .filter(|(v, _)| b.registers.first().is_some_and(|r| *v <= 0xffff && *v + 64 >= r.offset));
            match (arg, absolute) {
                (Some((v, e)), abs) => (Some(v), e || abs.is_some_and(|x| x.0 == v && x.1)),
                (None, Some((v, s))) => (Some(v), s),
                (None, None) => {
                    // Handlers that number their ports from 0 (FDC): base plus offset.
                    let base = b.bases.first().copied().unwrap_or(0);
                    (handler_arg(&["reg", "addr"]).and_then(|(v, _)| base.checked_add(v)), false)
                }
            }
        }
        OffsetFrom::Arg(names) => match handler_arg(names) {
            Some((v, e)) if v < 4096 => (Some(v), e),
            Some((v, _)) => (Some(v & 0xfff), false),
            None => (None, false),
        },
    };
    if matches!(b.from, OffsetFrom::Arg(_)) && offset.is_none() && out.hit.is_some() {
        return;
    }
    let Some(mut off) = offset else { return };
    // Secondary instances of a port block keep the layout of the first.
    if b.from == OffsetFrom::Port
        && let (Some(first), Some(base)) =
            (b.bases.first(), b.bases.iter().rev().find(|x| **x <= off && off - **x < b.size.max(1)))
    {
        off = off - base + first;
    }
    // Damaged or missing ports: a small offset counts from the block's first port.
    if b.from == OffsetFrom::Port
        && b.at(off).is_none()
        && let (Some(base), Some(o)) = (b.bases.first(), region.as_ref().filter(|o| o.value < b.size))
    {
        off = base + o.value;
    }
    let off = off;
    out.offset = Some(off);
    let hit = b.at(off);
    if hit.is_some() || out.hit.is_none() {
        out.register_sure = sure && out.sure && hit.is_some();
        out.hit = hit;
    }
    // A legacy virtio region has MSI-X vectors or configuration at 0x14, by a flag the frames don't show.
    if b.id == "data-port" || b.id == "legacy" && off >= 0x14 {
        out.register_sure = false;
    }
    if b.space == "config" && (0x18..0x40).contains(&off) {
        // Type 0 and type 1 headers differ from 0x18 on.
        out.register_sure = false;
    }
}

/// The kind of virtio device, from names such as `virtio_scsi_dataplane_start`.
fn flavour(stack: &Stack, a: &Access) -> Option<String> {
    const KINDS: &[&str] = &[
        "scsi", "blk", "net", "balloon", "rng", "serial", "gpu", "input", "crypto", "iommu", "mem", "pmem",
        "vga", "snd", "fs", "9p",
    ];
    let look = |f: &Frame| {
        let n = f
            .function
            .strip_prefix("virtio_")
            .or_else(|| f.function.strip_prefix("vhost_user_"))
            .or_else(|| f.function.strip_prefix("vhost_"))?;
        let k = n.split('_').next()?;
        KINDS.contains(&k).then(|| format!("virtio-{k}"))
    };
    a.device.iter().take(40).find_map(|&i| look(&stack.frames[i]))
}

fn value(a: &Access, frames: &[Frame], adjacent: bool) -> Option<(u64, usize, bool)> {
    let write = a.write.as_ref().is_some_and(|w| w.value);
    if !write {
        return None;
    }
    for &i in a.device.iter().take(3) {
        let f = &frames[i];
        for n in ["val", "value", "data", "val64"] {
            if let Some(v) = f.arg(n).and_then(|x| x.value) {
                // A pointer is not a value.
                if v < 1 << 40 || a.size.as_ref().is_some_and(|s| s.value == 8) {
                    let agreed = a.value.as_ref().is_some_and(|x| x.sure && x.value == v);
                    let sure = adjacent
                        && a.device.first() == Some(&i)
                        && (f.arg(n).is_some_and(|x| x.entry) || agreed);
                    return Some((v, i, sure));
                }
            }
        }
    }
    a.value
        .as_ref()
        .filter(|v| v.value < 1 << 40)
        .map(|v| (v.value, v.frames.first().copied().unwrap_or(0), false))
}

/// A guess of what answers at a place of a PC, for questions without a trace.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Device.
    pub device: &'static Device,
    /// Region.
    pub block: &'static Block,
    /// Register, when one is there.
    pub hit: Option<Hit>,
    /// Start of the region.
    pub base: u64,
    /// True when the address is fixed on a PC.
    pub fixed: bool,
    /// Higher is likelier.
    pub score: i64,
    /// Why it ranks there, in words.
    pub because: Vec<String>,
}

/// Devices of other machines.
const NOT_ON_A_PC: &[&str] = &[
    "virtio-mmio",
    "smc91c111",
    "pl011",
    "cadence-uart",
    "gic",
    "gicv3",
    "bcm2835-thermal",
    "artist",
    "imx-usbphy",
    "xilinx-spips",
    "mss-spi",
    "pflash",
    "msix",
];

/// Ranks what could be at an address. `base` is the start of the region when it is known.
pub fn candidates(
    space: Space,
    addr: u64,
    size: Option<u64>,
    write: Option<bool>,
    base: Option<u64>,
) -> Vec<Candidate> {
    let mut out = Vec::new();
    for d in table() {
        if NOT_ON_A_PC.contains(&d.id) {
            continue;
        }
        for b in &d.blocks {
            let fits_space = b.space == "both" || b.space == space.word();
            if !fits_space {
                continue;
            }
            if !b.bases.is_empty() {
                let Some(&at) = b.bases.iter().find(|&&x| addr >= x && addr - x < b.size.max(1)) else {
                    continue;
                };
                let key = if b.from == OffsetFrom::Port { b.bases[0] + (addr - at) } else { addr - at };
                if b.from == OffsetFrom::Port && !b.registers.is_empty() && b.at(key).is_none() {
                    continue;
                }
                let hit = b.at(key);
                let mut c = Candidate {
                    device: d,
                    block: b,
                    hit,
                    base: at,
                    fixed: true,
                    score: 100,
                    because: vec!["fixed address on a PC".into()],
                };
                weigh(&mut c, size, write);
                out.push(c);
                continue;
            }
            if b.from != OffsetFrom::Region || b.size == 0 || b.registers.is_empty() {
                continue;
            }
            // What PCI BARs place: ports from 0xc000 (SeaBIOS), memory below 4 GiB or high.
            let plausible = match space {
                Space::Pio => (0xc000..=0xffff).contains(&addr) || (0x6000..0x8000).contains(&addr),
                Space::Mmio => (0x8000_0000..0xfec0_0000).contains(&addr) || addr >= 1 << 32,
            };
            if !plausible && base.is_none() {
                continue;
            }
            // Memory BARs that small devices share a page with are rounded to 4 KiB by nobody: the base is open.
            let start = base.unwrap_or(addr & !(b.size.next_power_of_two().max(1) - 1));
            // A BAR starts at a multiple of its size.
            if base.is_some() && !start.is_multiple_of(b.size.next_power_of_two().min(1 << 20)) {
                continue;
            }
            let Some(off) = addr.checked_sub(start).filter(|o| *o < b.size) else { continue };
            let Some(hit) = b.at(off) else { continue };
            let mut c = Candidate {
                device: d,
                block: b,
                hit: Some(hit),
                base: start,
                fixed: false,
                score: 0,
                because: Vec::new(),
            };
            c.score += i64::from(d.prior) * 2;
            if base.is_some() {
                c.score += 4;
                c.because.push("region base known".into());
            } else if space == Space::Pio && start & 0xfff == 0 {
                c.score += 8;
                c.because.push("region starts at the first address the firmware hands out".into());
            }
            weigh(&mut c, size, write);
            out.push(c);
        }
    }
    out.sort_by(|a, b| b.score.cmp(&a.score).then(a.device.id.cmp(b.device.id)));
    out
}

fn weigh(c: &mut Candidate, size: Option<u64>, write: Option<bool>) {
    let Some(h) = &c.hit else { return };
    if let Some(s) = size {
        if h.register.width == s && h.within == 0 {
            c.score += 4;
            c.because.push(format!("{} is the register's width", crate::explanation::bytes(s)));
        } else if h.within != 0 {
            c.score -= 5;
            c.because.push(format!("starts {} bytes into the register", h.within));
        } else {
            c.score -= 1;
            let wide = crate::explanation::bytes(h.register.width);
            c.because.push(format!("the register is {wide} wide: a {s}-byte access is unusual"));
        }
    }
    match (write, h.register.access) {
        (Some(true), "ro") => {
            c.score -= 6;
            c.because.push("the register is read-only".into());
        }
        (Some(false), "wo") => {
            c.score -= 6;
            c.because.push("the register is write-only".into());
        }
        _ => {}
    }
    if c.device.id == "virtio-pci-legacy" && h.register.name == "device_status" {
        c.score += 2;
        c.because.push("starting and stopping hangs on it, so it is on the stack when things break".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_well_formed() {
        let (devices, bad) = parse(include_str!("../data/devices.txt"));
        assert_eq!(bad, Vec::<String>::new());
        assert!(devices.len() > 60);
        let mut ids: Vec<_> = devices.iter().map(|d| d.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), devices.len(), "device names are unique");
        let mut outside = Vec::new();
        for d in &devices {
            assert!(!d.cite.is_empty(), "{} has a source", d.id);
            for b in &d.blocks {
                for r in &b.registers {
                    assert!(matches!(r.access, "ro" | "wo" | "rw"), "{} {}", d.id, r.name);
                    assert!(matches!(r.width, 1..=4 | 8), "{} {}", d.id, r.name);
                    assert!(r.stride == 0 || r.stride >= r.width, "{} {} overlaps itself", d.id, r.name);
                    let end = r.offset + r.stride * (r.count - 1) + r.width;
                    let start = if b.from == OffsetFrom::Port { b.bases[0] } else { 0 };
                    if b.size != 0 && (r.offset < start || end > start + b.size) {
                        outside.push(format!("{} {} {end:#x}", d.id, r.name));
                    }
                    assert!(
                        r.bits.iter().all(|(n, _)| u64::from(*n) < r.width * 8),
                        "{} {} bits",
                        d.id,
                        r.name
                    );
                }
            }
        }
        // Register pairs such as index and data may end one byte behind the decoded range when read as a word.
        outside.retain(|o| !o.starts_with("vga "));
        assert_eq!(outside, Vec::<String>::new());
    }

    #[test]
    fn registers_by_offset() {
        let d = table().iter().find(|d| d.id == "virtio-pci-legacy").expect("device");
        let h = d.blocks[0].at(0x12).expect("register");
        assert_eq!(h.name(), "device_status");
        assert_eq!(h.decode(0x85c4), ["FAILED", "NEEDS_RESET", "DRIVER_OK"]);
        let x = table().iter().find(|d| d.id == "xhci").expect("device");
        let b = x.blocks.iter().find(|b| b.id == "doorbell").expect("block");
        assert_eq!(b.at(0x44).map(|h| h.name()), Some("DOORBELL17".into()));
        let l = table().iter().find(|d| d.id == "lsi53c8xx").expect("device");
        let h = l.blocks[0].at(0x2f).expect("register");
        assert_eq!((h.name(), h.within), ("DSP".into(), 3));
    }

    #[test]
    fn the_port_of_the_source_case_without_a_trace() {
        let c = candidates(Space::Pio, 0xc012, Some(2), Some(true), None);
        let names: Vec<String> = c.iter().take(3).filter_map(|c| c.hit.as_ref().map(Hit::name)).collect();
        assert_eq!(names[0], "device_status");
        assert!(names.contains(&"RAP".to_owned()), "{names:?}");
        assert!(names.contains(&"PORTSC2".to_owned()), "{names:?}");
    }

    #[test]
    fn fixed_ports() {
        let c = candidates(Space::Pio, 0x3fd, Some(1), Some(false), None);
        assert_eq!(c[0].device.id, "serial");
        assert_eq!(c[0].hit.as_ref().map(Hit::name), Some("LSR".into()));
        let c = candidates(Space::Pio, 0x177, Some(1), Some(true), None);
        assert_eq!(c[0].hit.as_ref().map(Hit::name), Some("STATUS_COMMAND".into()));
        let c = candidates(Space::Mmio, 0xfee0_00b0, Some(4), Some(true), None);
        assert_eq!(c[0].hit.as_ref().map(Hit::name), Some("EOI".into()));
    }
}
