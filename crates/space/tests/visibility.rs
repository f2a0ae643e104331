//! The flattener against a naive look-up: one address at a time, straight from the rules of visibility.

use hyaline_ram::RamBlock;
use hyaline_space::{
    AddrRange, AddressSpace, Io, IoError, Kind, Listener, Origin, Region, Section, transaction,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Addresses that are compared. Regions and offsets are of about this size.
const SPAN: u64 = 80;

struct Silent;

impl Io for Silent {
    fn read(&self, _: u64, _: u8, _: &Origin) -> Result<u64, IoError> {
        Ok(0)
    }
    fn write(&self, _: u64, _: u8, _: u64, _: &Origin) -> Result<(), IoError> {
        Ok(())
    }
}

/// What the model knows of a region. Children and targets have higher numbers than who holds or shows them.
#[derive(Clone, Debug)]
struct Model {
    kind: Kind,
    size: u64,
    enabled: bool,
    readonly: bool,
    target: usize,
    target_offset: u64,
    /// Number, offset, priority, in the order in which they were added.
    children: Vec<(usize, u64, i32)>,
}

/// Who answers at an offset of region `number`: its number, its offset, and whether it is read-only there.
fn answer(models: &[Model], number: usize, offset: u64) -> Option<(usize, u64, bool)> {
    let model = &models[number];
    if !model.enabled || offset >= model.size {
        return None;
    }
    let below = if model.kind == Kind::Alias {
        answer(models, model.target, model.target_offset + offset)
    } else {
        // Of all children that have something here, the one with the highest priority; of those, the latest.
        let mut best: Option<(i32, (usize, u64, bool))> = None;
        for &(child, at, priority) in &model.children {
            let found = offset.checked_sub(at).and_then(|inner| answer(models, child, inner));
            if let Some(found) = found
                && best.is_none_or(|(other, _)| priority >= other)
            {
                best = Some((priority, found));
            }
        }
        best.map(|(_, found)| found)
    };
    match below {
        Some((who, at, readonly)) => Some((who, at, readonly || model.readonly)),
        None if matches!(model.kind, Kind::Container | Kind::Alias) => None,
        None => Some((number, offset, model.readonly)),
    }
}

/// What a random region is made of.
#[derive(Clone, Debug)]
struct Plan {
    kind: Kind,
    size: u64,
    enabled: bool,
    readonly: bool,
    /// Selects the parent among the lower numbers, or none.
    parent: Option<prop::sample::Index>,
    offset: u64,
    priority: i32,
    target: prop::sample::Index,
    target_offset: u64,
}

fn plan() -> impl Strategy<Value = Plan> {
    let kind = prop_oneof![
        4 => Just(Kind::Container),
        4 => Just(Kind::Alias),
        2 => Just(Kind::Io),
        2 => Just(Kind::Ram),
        1 => Just(Kind::Rom),
        1 => Just(Kind::Reservation),
    ];
    (
        kind,
        0..SPAN,
        prop::bool::weighted(0.85),
        prop::bool::weighted(0.1),
        prop::option::weighted(0.8, any::<prop::sample::Index>()),
        0..SPAN / 2,
        -2..3_i32,
        any::<prop::sample::Index>(),
        0..SPAN / 2,
    )
        .prop_map(|(kind, size, enabled, readonly, parent, offset, priority, target, target_offset)| {
            Plan { kind, size, enabled, readonly, parent, offset, priority, target, target_offset }
        })
}

#[derive(Clone, Debug)]
enum Change {
    Enabled(bool),
    Readonly(bool),
    Offset(u64),
    Size(u64),
    Priority(i32),
    Remove,
    Add { parent: prop::sample::Index, offset: u64, priority: i32 },
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<bool>().prop_map(Change::Enabled),
        any::<bool>().prop_map(Change::Readonly),
        (0..SPAN).prop_map(Change::Offset),
        (0..SPAN).prop_map(Change::Size),
        (-2..3_i32).prop_map(Change::Priority),
        Just(Change::Remove),
        (any::<prop::sample::Index>(), 0..SPAN, -2..3_i32)
            .prop_map(|(parent, offset, priority)| Change::Add { parent, offset, priority }),
    ]
}

/// Keeps its own picture of the space by what it is told.
#[derive(Default)]
struct Shadow(Mutex<BTreeMap<u64, Section>>);

impl Listener for Shadow {
    fn region_add(&self, section: &Section) {
        let mut known = self.0.lock().expect("not poisoned");
        assert!(
            known.values().all(|other| !other.range.overlaps(&section.range)),
            "{section:?} comes where something is"
        );
        known.insert(section.range.start, section.clone());
    }
    fn region_del(&self, section: &Section) {
        let gone = self.0.lock().expect("not poisoned").remove(&section.range.start);
        assert_eq!(gone.as_ref(), Some(section), "what goes was there");
    }
}

struct World {
    models: Vec<Model>,
    regions: Vec<Region>,
    parents: Vec<Option<usize>>,
}

impl World {
    fn new(plans: &[Plan]) -> World {
        let block = RamBlock::new("ram", 4096).expect("the host gives a page");
        let (mut models, mut regions) = (Vec::new(), Vec::new());
        // From the last one on, so that targets exist before who shows them.
        for (i, plan) in plans.iter().enumerate().rev() {
            let later = plans.len() - 1 - i;
            let kind = match plan.kind {
                _ if i == 0 => Kind::Container,
                Kind::Alias if later == 0 => Kind::Io,
                kind => kind,
            };
            let size = if i == 0 { SPAN - 8 } else { plan.size };
            let target = if kind == Kind::Alias { i + 1 + plan.target.index(later) } else { 0 };
            let name = format!("r{i}");
            let region = match kind {
                Kind::Container => Region::container(&name, size.into()),
                Kind::Alias => {
                    let target: &Region = &regions[plans.len() - 1 - target];
                    Region::alias(&name, target, plan.target_offset, size.into())
                }
                Kind::Io => Region::io(&name, size.into(), Arc::new(Silent)),
                Kind::Ram => Region::ram(&name, block.clone(), 0, size),
                Kind::Rom => Region::rom(&name, block.clone(), 0, size),
                _ => Region::reservation(&name, size.into()),
            };
            let readonly = plan.readonly || kind == Kind::Rom;
            region.set_enabled(plan.enabled || i == 0);
            region.set_readonly(readonly);
            models.push(Model {
                kind,
                size,
                enabled: plan.enabled || i == 0,
                readonly,
                target,
                target_offset: plan.target_offset,
                children: Vec::new(),
            });
            regions.push(region);
        }
        models.reverse();
        regions.reverse();
        let mut world = World { parents: vec![None; plans.len()], models, regions };
        for (i, plan) in plans.iter().enumerate().skip(1) {
            if let Some(parent) = &plan.parent {
                world.add(parent.index(i), i, plan.offset, plan.priority);
            }
        }
        world
    }

    fn add(&mut self, parent: usize, child: usize, offset: u64, priority: i32) {
        let fits = self.models[parent].kind != Kind::Alias
            && offset < self.models[parent].size
            && self.parents[child].is_none();
        let added = self.regions[parent].add(offset, &self.regions[child], priority);
        assert_eq!(added.is_ok(), fits, "{added:?}");
        if fits {
            self.parents[child] = Some(parent);
            self.models[parent].children.push((child, offset, priority));
        }
    }

    fn change(&mut self, number: usize, change: &Change) {
        let region = self.regions[number].clone();
        let parent = self.parents[number];
        match change {
            Change::Enabled(on) => {
                region.set_enabled(*on);
                self.models[number].enabled = *on;
            }
            Change::Readonly(on) => {
                region.set_readonly(*on);
                self.models[number].readonly = *on;
            }
            Change::Offset(offset) => {
                region.set_offset(*offset);
                if let Some(parent) = parent {
                    for child in &mut self.models[parent].children {
                        child.1 = if child.0 == number { *offset } else { child.1 };
                    }
                }
            }
            Change::Size(size) => {
                region.set_size((*size).into()).expect("small");
                self.models[number].size = *size;
            }
            Change::Priority(priority) => {
                region.set_priority(*priority);
                if let Some(parent) = parent {
                    let children = &mut self.models[parent].children;
                    let place = children.iter().position(|child| child.0 == number).expect("it is a child");
                    if children[place].2 != *priority {
                        let (_, offset, _) = children.remove(place);
                        children.push((number, offset, *priority));
                    }
                }
            }
            Change::Remove => {
                if let Some(parent) = parent {
                    self.regions[parent].remove(&region).expect("it is a child");
                    self.models[parent].children.retain(|child| child.0 != number);
                    self.parents[number] = None;
                } else {
                    assert!(self.regions[0].remove(&region).is_err());
                }
            }
            Change::Add { parent, offset, priority } => {
                self.add(parent.index(number), number, *offset, *priority);
            }
        }
    }

    fn compare(&self, space: &AddressSpace, ports: &AddressSpace, shadow: &Shadow) {
        let view = space.view();
        let sections: Vec<Section> = view.sections().collect();
        for pair in sections.windows(2) {
            assert!(pair[0].range.last < pair[1].range.start, "{sections:?}");
        }
        let shadow: Vec<Section> = shadow.0.lock().expect("not poisoned").values().cloned().collect();
        assert_eq!(shadow, sections, "listeners know what is there");
        for addr in 0..SPAN + 8 {
            let want = answer(&self.models, 0, addr);
            let got = view.lookup(addr);
            let told = got
                .as_ref()
                .map(|s| (self.regions.iter().position(|r| *r == s.region), s.region_offset, s.readonly));
            let want_told = want.map(|(who, offset, readonly)| (Some(who), offset, readonly));
            assert_eq!(told, want_told, "at {addr}:\n{}{:?}", space.mtree(), self.models);
            assert_eq!(ports.lookup(addr), got, "the port table agrees at {addr}");
            let path = space.resolve(addr, 1, false);
            let end = path.layers.last().map(|layer| (layer.path.clone(), layer.offset));
            assert_eq!(end, got.as_ref().map(|s| (s.region.path(), s.region_offset)), "at {addr}");
            assert_eq!(
                path.layers.iter().any(|layer| layer.readonly),
                got.as_ref().is_some_and(|s| s.readonly),
                "the layers tell who makes it read-only"
            );
            for hidden in &path.hidden {
                // Whoever is said to be hidden would answer at its place, alone.
                let by = self.regions.iter().position(|r| r.path() == hidden.path && r.kind() == hidden.kind);
                assert!(by.is_some(), "{hidden:?}");
            }
        }
    }
}

/// 1500 cases, or what the environment's PROPTEST_CASES says.
fn config() -> ProptestConfig {
    let default = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let told = std::env::var_os("PROPTEST_CASES").is_some();
    ProptestConfig { cases: if told { default.cases } else { 1500 }, ..default }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_flat_view_is_what_the_rules_say(
        plans in prop::collection::vec(plan(), 2..14),
        changes in prop::collection::vec((any::<prop::sample::Index>(), change(), any::<bool>()), 0..12),
    ) {
        let mut world = World::new(&plans);
        let space = AddressSpace::new("memory", &world.regions[0]);
        let ports = AddressSpace::new_ports("io", &world.regions[0]);
        let shadow = Arc::new(Shadow::default());
        let id = space.add_listener(shadow.clone());
        world.compare(&space, &ports, &shadow);
        let mut open = None;
        for (who, change, more) in &changes {
            // Some changes are published together.
            if *more && open.is_none() {
                open = Some(transaction());
            }
            let number = 1 + who.index(plans.len() - 1);
            world.change(number, change);
            if !more {
                open = None;
            }
            if open.is_none() {
                world.compare(&space, &ports, &shadow);
            }
        }
        drop(open);
        world.compare(&space, &ports, &shadow);
        prop_assert!(space.remove_listener(id));
        prop_assert!(shadow.0.lock().expect("not poisoned").is_empty());
    }
}

fn io(name: &str, size: u128) -> Region {
    Region::io(name, size, Arc::new(Silent))
}

fn at(space: &AddressSpace, addr: u64) -> Option<(String, u64)> {
    space.lookup(addr).map(|s| (s.region.name().to_owned(), s.region_offset))
}

fn seen(name: &str, offset: u64) -> Option<(String, u64)> {
    Some((name.to_owned(), offset))
}

#[test]
fn a_high_priority_child_does_not_beat_its_containers_sibling() {
    let root = Region::container("root", 0x1000);
    let low = Region::container("low", 0x1000);
    low.add(0, &io("child", 0x1000), 10).expect("fits");
    root.add(0, &low, 0).expect("fits");
    root.add(0x100, &io("sibling", 0x100), 1).expect("fits");
    let space = AddressSpace::new("memory", &root);
    assert_eq!(at(&space, 0x100), seen("sibling", 0));
    assert_eq!(at(&space, 0x1ff), seen("sibling", 0xff));
    assert_eq!(at(&space, 0x200), seen("child", 0x200));
}

#[test]
fn a_background_does_not_swallow_a_device() {
    let root = Region::container("root", 0x1000);
    root.add(0x100, &io("device", 0x10), 0).expect("fits");
    root.add(0, &io("background", 0x1000), -1).expect("fits");
    let space = AddressSpace::new("memory", &root);
    assert_eq!(at(&space, 0x10f), seen("device", 0xf));
    assert_eq!(at(&space, 0x110), seen("background", 0x110));
    assert_eq!(at(&space, 0xff), seen("background", 0xff));
}

#[test]
fn holes_of_holes_show_the_lower_sibling() {
    let root = Region::container("root", 0x1000);
    let outer = Region::container("outer", 0x1000);
    let inner = Region::container("inner", 0x800);
    inner.add(0x100, &io("leaf", 0x10), 0).expect("fits");
    outer.add(0, &inner, 7).expect("fits");
    root.add(0, &outer, 5).expect("fits");
    root.add(0, &io("below", 0x1000), 0).expect("fits");
    let space = AddressSpace::new("memory", &root);
    assert_eq!(at(&space, 0x10f), seen("leaf", 0xf));
    assert_eq!(at(&space, 0x110), seen("below", 0x110));
}

#[test]
fn children_are_clipped_by_every_parent() {
    let root = Region::container("root", 0x1000);
    let small = Region::container("small", 0x18);
    let wide = Region::container("wide", 0x1000);
    wide.add(0x10, &io("leaf", 0x100), 0).expect("fits");
    small.add(0, &wide, 0).expect("fits");
    root.add(0x100, &small, 0).expect("fits");
    let space = AddressSpace::new("memory", &root);
    assert_eq!(space.lookup(0x110).map(|s| s.range), AddrRange::new(0x110, 8));
    assert_eq!(at(&space, 0x118), None);
    small.set_offset(0xff0);
    assert_eq!(space.view().sections().len(), 0, "what shows of it is the hole");
    small.set_offset(u64::MAX);
    assert_eq!(space.view().sections().len(), 0);
}

#[test]
fn aliases_of_aliases_with_offsets() {
    let pci = Region::container("pci", 1 << 64);
    pci.add(0xe000_0000, &io("bar", 0x1000), 0).expect("fits");
    pci.add(u64::MAX - 0xff, &io("top", 0x100), 0).expect("fits");
    let first = Region::alias("first", &pci, 0xc000_0000, 0x4000_0000);
    let second = Region::alias("second", &first, 0x1fff_ff00, 0x800);
    let end = Region::alias("end", &pci, u64::MAX - 0x1ff, 0x1000);
    let root = Region::container("root", 1 << 64);
    root.add(0x1_0000, &second, 0).expect("fits");
    root.add(0x2_0000, &end, 0).expect("fits");
    let space = AddressSpace::new("memory", &root);
    assert_eq!(at(&space, 0x1_00ff), None);
    assert_eq!(at(&space, 0x1_0100), seen("bar", 0));
    assert_eq!(at(&space, 0x1_07ff), seen("bar", 0x6ff));
    assert_eq!(at(&space, 0x1_0800), None);
    assert_eq!(at(&space, 0x2_0100), seen("top", 0));
    assert_eq!(at(&space, 0x2_01ff), seen("top", 0xff));
    assert_eq!(at(&space, 0x2_0200), None, "an alias ends with its target");
    root.add(u64::MAX - 1, &io("last", 0x100), 0).expect("fits");
    assert_eq!(at(&space, u64::MAX), seen("last", 1));
    let all = Region::reservation("all", 1 << 64);
    root.add(0, &all, -5).expect("fits");
    assert_eq!(at(&space, 0), seen("all", 0));
    assert_eq!(at(&space, u64::MAX - 2), seen("all", u64::MAX - 2));
}

/// As the chip set's PAM registers do it: neighbouring windows on one RAM, each by itself read-only or not.
#[test]
fn neighbours_join_only_when_they_are_alike() {
    let ram = Region::ram("ram", RamBlock::new("ram", 0x4000).expect("memory"), 0, 0x4000);
    let root = Region::container("root", 0x4000);
    let windows: Vec<Region> =
        (0..4).map(|i| Region::alias(&format!("pam{i}"), &ram, i * 0x1000, 0x1000)).collect();
    for (i, window) in windows.iter().enumerate() {
        root.add(i as u64 * 0x1000, window, 0).expect("fits");
    }
    let space = AddressSpace::new("memory", &root);
    let ranges =
        || space.view().sections().map(|s| (s.range.start, s.range.last, s.readonly)).collect::<Vec<_>>();
    assert_eq!(ranges(), [(0, 0x3fff, false)]);
    windows[1].set_readonly(true);
    assert_eq!(ranges(), [(0, 0xfff, false), (0x1000, 0x1fff, true), (0x2000, 0x3fff, false)]);
    windows[2].set_enabled(false);
    assert_eq!(ranges(), [(0, 0xfff, false), (0x1000, 0x1fff, true), (0x3000, 0x3fff, false)]);
}

#[test]
fn the_graph_stays_a_graph() {
    let a = Region::container("a", 0x1000);
    let b = Region::container("b", 0x1000);
    let c = Region::container("c", 0x1000);
    a.add(0, &b, 0).expect("fits");
    assert_eq!(
        c.add(0, &b, 0).unwrap_err().to_string(),
        "region /a/b can't be added to /c: it is part of /a already; remove it there first, or add an alias of it"
    );
    assert!(matches!(a.add(0, &a, 0), Err(hyaline_space::SpaceError::Cycle { .. })));
    b.add(0, &c, 0).expect("fits");
    let loop_ = Region::alias("loop", &a, 0, 0x10);
    assert!(matches!(c.add(0, &loop_, 0), Err(hyaline_space::SpaceError::Cycle { .. })));
    assert!(matches!(loop_.add(0, &io("x", 1), 0), Err(hyaline_space::SpaceError::AliasParent { .. })));
    assert_eq!(
        a.add(0x1000, &io("out", 1), 0).unwrap_err().to_string(),
        "region /out can't be added to /a at offset 0x1000 (4096): /a has only 0x1000 (4096) bytes"
    );
    let huge = Region::container("huge", (1 << 64) + 1);
    assert!(matches!(a.add(0, &huge, 0), Err(hyaline_space::SpaceError::BadSize { .. })));
    let block = RamBlock::new("block", 4096).expect("memory");
    assert_eq!(
        a.add(0, &Region::ram("ram", block.clone(), 4000, 97), 0).unwrap_err().to_string(),
        "region ram can't have 0x61 (97) bytes: from offset 0xfa0 on, the memory `block` has only 0x60 (96) bytes"
    );
    assert!(Region::ram("ram", block, 4000, 96).set_size(97).is_err());
    let mut deep = Region::container("deep", 1);
    let mut result = Ok(());
    for _ in 0..100 {
        let outer = Region::container("deep", 1);
        result = outer.add(0, &deep, 0);
        deep = outer;
        if result.is_err() {
            break;
        }
    }
    assert!(matches!(result, Err(hyaline_space::SpaceError::TooDeep { .. })));
}
