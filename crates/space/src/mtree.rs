//! The tree and the flat view as texts and as plain data.

use crate::tree::Node;
use crate::view::{FlatRange, Target};
use crate::{AddressSpace, Kind};
use serde::Serialize;
use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Arc;

/// What an alias shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AliasOf {
    /// The target's path.
    pub path: String,
    /// The first offset in the target.
    pub start: u64,
    /// The last offset in the target; none when the alias has no size.
    pub last: Option<u64>,
}

/// One region of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MtreeNode {
    /// The region's own name.
    pub name: String,
    /// Its owner; may be empty.
    pub owner: String,
    /// What it is.
    pub kind: Kind,
    /// The first address in the space (for a tree of its own, in the tree's root). Not clipped to parents.
    pub start: u64,
    /// The last address; none when the region has no size.
    pub last: Option<u64>,
    /// The priority among its siblings.
    pub priority: i32,
    /// Is it switched on?
    pub enabled: bool,
    /// Is it read-only by itself?
    pub readonly: bool,
    /// Is a ROM device in ROM mode?
    pub romd: bool,
    /// What it shows, if it is an alias.
    pub alias: Option<AliasOf>,
    /// What it holds, by address, then by falling priority.
    pub children: Vec<MtreeNode>,
}

/// The tree of a space, and the trees that only aliases lead to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mtree {
    /// The space's name.
    pub space: String,
    /// The tree of its root.
    pub root: MtreeNode,
    /// Regions that aliases show and that are no part of the root's tree.
    pub elsewhere: Vec<MtreeNode>,
}

/// One range of a flat view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlatLine {
    /// The first address.
    pub start: u64,
    /// The last address.
    pub last: u64,
    /// What is there.
    pub kind: Kind,
    /// The path of the region.
    pub region: String,
    /// The region's owner; may be empty.
    pub owner: String,
    /// The offset in the region of the first address.
    pub offset: u64,
    /// The region's priority among its siblings.
    pub priority: i32,
    /// Memory that can't be written.
    pub readonly: bool,
    /// Is a ROM device in ROM mode?
    pub romd: bool,
    /// The memory block, and the offset in it of the first address.
    pub ram: Option<(String, u64)>,
}

impl AddressSpace {
    /// The tree of regions as plain data.
    pub fn mtree_nodes(&self) -> Mtree {
        let view = self.view();
        let (mut seen, mut targets) = (HashSet::new(), Vec::new());
        let root = tree_node(&view.tree, 0, &mut seen, &mut targets);
        let mut elsewhere = Vec::new();
        while let Some(target) = targets.pop() {
            // A target below one that is still to come is shown within that one.
            if !seen.contains(&target.region.id()) && !targets.iter().any(|other| holds(other, &target)) {
                elsewhere.push(tree_node(&target, 0, &mut seen, &mut targets));
            }
        }
        Mtree { space: self.name().to_owned(), root, elsewhere }
    }

    /// The tree of regions as text, in the shape of QEMU's `info mtree`.
    pub fn mtree(&self) -> String {
        let tree = self.mtree_nodes();
        let mut text = format!("address-space: {}\n", tree.space);
        print(&tree.root, 1, &mut text);
        for other in &tree.elsewhere {
            let _ = writeln!(text, "\nmemory-region: {}", other.name);
            print(other, 1, &mut text);
        }
        text
    }

    /// The flat view as plain data.
    pub fn flat_lines(&self) -> Vec<FlatLine> {
        self.view().ranges.iter().map(flat_line).collect()
    }

    /// The flat view as text, in the shape of QEMU's `info mtree -f`.
    pub fn flat(&self) -> String {
        let mut text = format!("FlatView of {}, root {}\n", self.name(), self.root().name());
        let lines = self.flat_lines();
        for line in &lines {
            let kind = kind_text(line.kind, line.readonly, line.romd);
            let _ = write!(
                text,
                "  {:016x}-{:016x} (prio {}, {kind}): {}",
                line.start, line.last, line.priority, line.region
            );
            if line.offset != 0 {
                let _ = write!(text, " @{:016x}", line.offset);
            }
            text += &owner_text(&line.owner);
            text.push('\n');
        }
        if lines.is_empty() {
            text += "  No range is mapped\n";
        }
        text
    }
}

fn holds(node: &Arc<Node>, other: &Arc<Node>) -> bool {
    node.children.iter().any(|child| child.region == other.region || holds(child, other))
}

/// The last of `size` bytes at `start`; where that is beyond the last address, the last address.
fn last_of(start: u64, size: u128) -> Option<u64> {
    let last = u128::from(start) + size.checked_sub(1)?;
    Some(u64::try_from(last).unwrap_or(u64::MAX))
}

fn tree_node(
    node: &Arc<Node>,
    start: u64,
    seen: &mut HashSet<u64>,
    targets: &mut Vec<Arc<Node>>,
) -> MtreeNode {
    seen.insert(node.region.id());
    let mut children: Vec<_> = node
        .children
        .iter()
        .map(|child| tree_node(child, start.saturating_add(child.offset), seen, targets))
        .collect();
    children.sort_by_key(|child| (child.start, -i64::from(child.priority)));
    let alias = node.target.as_ref().map(|(target, offset)| {
        targets.push(target.clone());
        AliasOf { path: target.region.path(), start: *offset, last: last_of(*offset, node.size) }
    });
    MtreeNode {
        name: node.region.name().to_owned(),
        owner: node.region.owner().to_owned(),
        kind: node.kind,
        start,
        last: last_of(start, node.size),
        priority: node.priority,
        enabled: node.enabled,
        readonly: node.readonly,
        romd: node.romd,
        alias,
        children,
    }
}

fn kind_text(kind: Kind, readonly: bool, romd: bool) -> &'static str {
    match kind {
        Kind::Ram | Kind::Rom if readonly => "rom",
        Kind::Ram | Kind::Rom => "ram",
        Kind::RomDevice if !romd => "i/o",
        other => other.as_str(),
    }
}

fn owner_text(owner: &str) -> String {
    if owner.is_empty() { String::new() } else { format!(" owner:{owner}") }
}

/// `start-last`, or `start-` and dashes when there is nothing.
fn range_text(start: u64, last: Option<u64>) -> String {
    match last {
        Some(last) => format!("{start:016x}-{last:016x}"),
        None => format!("{start:016x}-{:-<16}", ""),
    }
}

fn print(node: &MtreeNode, level: usize, text: &mut String) {
    let _ = write!(text, "{:indent$}{}", "", range_text(node.start, node.last), indent = 2 * level);
    let kind = kind_text(node.kind, node.readonly, node.romd);
    let _ = write!(text, " (prio {}, {kind}): {}", node.priority, node.name);
    if let Some(alias) = &node.alias {
        let _ = write!(text, " @{} {}", alias.path, range_text(alias.start, alias.last));
    }
    if !node.enabled {
        text.push_str(" [disabled]");
    }
    text.push_str(&owner_text(&node.owner));
    text.push('\n');
    for child in &node.children {
        print(child, level + 1, text);
    }
}

fn flat_line(range: &FlatRange) -> FlatLine {
    let ram = match &range.target {
        Target::Ram { block, base } | Target::Rom { block, base } | Target::RomDevice { block, base, .. } => {
            Some((block.name().to_owned(), *base))
        }
        _ => None,
    };
    FlatLine {
        start: range.start,
        last: range.last,
        kind: range.kind,
        region: range.region.path(),
        owner: range.region.owner().to_owned(),
        offset: range.offset,
        priority: range.region.priority(),
        readonly: range.readonly,
        romd: range.romd,
        ram,
    }
}

#[cfg(test)]
mod tests {
    use crate::{AddressSpace, Region};
    use hyaline_ram::RamBlock;

    #[test]
    fn prints_trees_and_flat_views() {
        let block = RamBlock::new("pc.ram", 0x10_0000).expect("the host gives memory");
        let system = Region::container("system", 1 << 64);
        let ram = Region::ram("pc.ram", block, 0, 0x10_0000);
        let low = Region::alias("ram-low", &ram, 0, 0xc_0000);
        let vga = Region::reservation("vga", 0x2_0000).with_owner("vga");
        let rom = Region::alias("shadow", &ram, 0xc_0000, 0x1_0000);
        rom.set_readonly(true);
        let off = Region::reservation("smram", 0x1_0000);
        off.set_enabled(false);
        system.add(0, &low, 0).expect("fits");
        system.add(0xa_0000, &vga, 1).expect("fits");
        system.add(0xa_0000, &off, 2).expect("fits");
        system.add(0xc_0000, &rom, 0).expect("fits");
        let space = AddressSpace::new("memory", &system);
        assert_eq!(
            space.mtree(),
            "address-space: memory\n\
             \x20 0000000000000000-ffffffffffffffff (prio 0, container): system\n\
             \x20   0000000000000000-00000000000bffff (prio 0, alias): ram-low @/pc.ram 0000000000000000-00000000000bffff\n\
             \x20   00000000000a0000-00000000000affff (prio 2, reservation): smram [disabled]\n\
             \x20   00000000000a0000-00000000000bffff (prio 1, reservation): vga owner:vga\n\
             \x20   00000000000c0000-00000000000cffff (prio 0, alias): shadow @/pc.ram 00000000000c0000-00000000000cffff\n\
             \n\
             memory-region: pc.ram\n\
             \x20 0000000000000000-00000000000fffff (prio 0, ram): pc.ram\n"
        );
        assert_eq!(
            space.flat(),
            "FlatView of memory, root system\n\
             \x20 0000000000000000-000000000009ffff (prio 0, ram): /pc.ram\n\
             \x20 00000000000a0000-00000000000bffff (prio 1, reservation): /system/vga owner:vga\n\
             \x20 00000000000c0000-00000000000cffff (prio 0, rom): /pc.ram @00000000000c0000\n"
        );
        let json = serde_json::to_value(space.mtree_nodes()).expect("plain data");
        assert_eq!(json["root"]["children"][1]["name"], "smram");
        assert_eq!(json["elsewhere"][0]["last"], 0xf_ffff);
        let json = serde_json::to_value(space.flat_lines()).expect("plain data");
        assert_eq!(json[2]["ram"], serde_json::json!(["pc.ram", 0xc_0000]));
        assert_eq!(json[1]["kind"], "reservation");
        let nothing = AddressSpace::new_ports("io", &Region::container("io", 0x1_0000));
        assert_eq!(nothing.flat(), "FlatView of io, root io\n  No range is mapped\n");
    }
}
