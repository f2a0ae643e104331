//! The map of addresses in words and as JSON: what is where, and why an address goes where it goes.

use crate::monitor::parse_number;
use hyaline_device::{Register, Slot};
use hyaline_machine::pc::Pc;
use hyaline_space::AddressSpace;
use serde_json::{Value, json};
use std::sync::Arc;

fn spaces(pc: &Pc) -> [(&'static str, &AddressSpace); 3] {
    [("mem", &pc.memory), ("io", &pc.ports), ("config", &pc.config_space)]
}

/// The trees of regions.
pub fn tree(pc: &Pc) -> String {
    spaces(pc).iter().map(|(_, s)| s.mtree() + "\n").collect()
}

/// The flat views.
pub fn flat(pc: &Pc) -> String {
    spaces(pc).iter().map(|(_, s)| s.flat() + "\n").collect()
}

/// Trees, flat views and overlaps, as plain data.
pub fn as_json(pc: &Pc) -> Value {
    let all =
        spaces(pc).map(|(short, s)| json!({"space": short, "tree": s.mtree_nodes(), "flat": s.flat_lines()}));
    json!({"schema": 1, "board": "pc", "spaces": all})
}

/// Where a device's region of that name is seen: `io:0x3f8-0x3ff`.
pub fn where_is(pc: &Pc, device: &str, region: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (short, space) in spaces(pc) {
        for line in space.flat_lines().iter().filter(|l| l.owner == device) {
            let name = line.region.rsplit('/').next().unwrap_or("");
            if name == region || name.strip_prefix(region).is_some_and(|r| r.starts_with('+')) {
                found.push(format!("{short}:{:#x}-{:#x}", line.start, line.last));
            }
        }
    }
    found
}

/// What is at an address of a space, in a few words.
pub fn short(space: &AddressSpace, address: u64) -> String {
    match space.resolve(address, 1, false).range {
        Some(range) => format!("{} ({})", range.region, range.kind),
        None => "nothing is mapped there".into(),
    }
}

/// The device and register that an access at this place of a region reaches.
fn register(
    pc: &Pc,
    owner: &str,
    region: &str,
    offset: u64,
    is_write: bool,
) -> Option<(Arc<Slot>, &'static Register)> {
    let name = region.rsplit('/').next()?;
    let owner = if owner == "lapic" { "lapic0" } else { owner };
    let slot = pc.devices.iter().map(|p| &p.slot).find(|s| s.name() == owner)?;
    let bank_name =
        |b: &str| name == b || owner == "lapic0" || name.strip_prefix(b).is_some_and(|r| r.starts_with('+'));
    let bank = slot.chip().banks.iter().position(|b| bank_name(b.name))?;
    Some((slot.clone(), slot.register(bank, offset, is_write)?))
}

/// Why an address goes where it goes: `io:0xc012`, `mem:0xfee00020`, `config:0x800`, with `/SIZE` in bytes (1) and `,w` for a write.
///
/// # Errors
/// No such place, in words.
pub fn why(pc: &Pc, place: &str) -> Result<String, String> {
    let wrong =
        || format!("`{place}`: write io:0xc012 or mem:0xfee00020, with /2 for 2 bytes and ,w for a write");
    let (space, rest) = place.split_once(':').ok_or_else(wrong)?;
    let (rest, is_write) = match rest.split_once(',') {
        Some((r, "w" | "write")) => (r, true),
        Some((r, "r" | "read")) => (r, false),
        Some(_) => return Err(wrong()),
        None => (rest, false),
    };
    let (address, size) = match rest.split_once('/') {
        Some((a, s)) => (a, parse_number(s)?),
        None => (rest, 1),
    };
    let address = parse_number(address)?;
    if !matches!(size, 1 | 2 | 4 | 8) {
        return Err(format!("`{place}`: an access has 1, 2, 4 or 8 bytes, not {size}"));
    }
    let space = match space {
        "io" | "port" | "pio" => &pc.ports,
        "mem" | "memory" | "mmio" => &pc.memory,
        "config" | "pci-config" => &pc.config_space,
        _ => return Err(wrong()),
    };
    if space.is_ports() && address > 0xffff {
        return Err(format!(
            "`{place}`: ports end at 0xffff (65535); {address:#x} is {address}. For memory write mem:{address:#x}"
        ));
    }
    let path = space.resolve(address, size as u8, is_write);
    let mut text = path.to_string();
    let last = path.layers.last();
    if let Some(layer) = last
        && let Some((slot, r)) = register(pc, &layer.owner, &layer.path, layer.offset, is_write)
    {
        let value = slot.chip().banks.iter().enumerate().find_map(|(n, b)| {
            b.registers.iter().any(|x| std::ptr::eq(x, r)).then(|| slot.inspect(|d| d.peek(n, r))).flatten()
        });
        let value = value.map_or(String::new(), |v| format!(", now {}", r.decode(v & r.full_mask())));
        text += &format!(
            "  register {} of {} ({}): {} ({}){value}\n",
            r.name,
            slot.name(),
            slot.chip().title,
            r.doc,
            r.section
        );
    }
    if path.range.is_none() {
        text += "  reads give all ones, writes are dropped\n";
        let near = |f: &dyn Fn(&hyaline_space::FlatLine) -> bool, last: bool| {
            let lines = space.flat_lines();
            let found =
                if last { lines.into_iter().rev().find(|l| f(l)) } else { lines.into_iter().find(|l| f(l)) };
            found.map(|l| format!("{} at {:#x}-{:#x}", l.region, l.start, l.last))
        };
        if let Some(before) = near(&|l| l.last < address, true) {
            text += &format!("  before it is {before}\n");
        }
        if let Some(after) = near(&|l| l.start > address, false) {
            text += &format!("  after it is {after}\n");
        }
    }
    Ok(text)
}
