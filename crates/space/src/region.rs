//! The graph of regions.

use crate::graph::{self, transaction};
use crate::listener::{IoEventFd, Notify};
use crate::space::SpaceInner;
use crate::{Io, Translate};
use hyaline_ram::{Bitmap, DirtyClient, RamBlock};
use serde::Serialize;
use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// The size of the largest region: 2^64 bytes.
pub(crate) const MAX_SIZE: u128 = 1 << 64;

/// How deep containers and aliases may be nested.
const MAX_DEPTH: usize = 64;

/// What a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Holds other regions and is a hole between them.
    Container,
    /// Memory that can be read and written.
    Ram,
    /// Memory that can only be read.
    Rom,
    /// Memory for reads, a device for writes (flash).
    RomDevice,
    /// A device's registers.
    Io,
    /// A part of another region, shown in a second place.
    Alias,
    /// Accesses are translated into another address space.
    Iommu,
    /// Claims a range in which nothing answers.
    Reservation,
}

impl Kind {
    /// The name in texts: `container`, `ram`, `rom`, `romd`, `i/o`, `alias`, `iommu`, `reservation`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Container => "container",
            Kind::Ram => "ram",
            Kind::Rom => "rom",
            Kind::RomDevice => "romd",
            Kind::Io => "i/o",
            Kind::Alias => "alias",
            Kind::Iommu => "iommu",
            Kind::Reservation => "reservation",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a change to the graph was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpaceError {
    /// The child has a parent already.
    #[error(
        "region {child} can't be added to {parent}: it is part of {other} already; remove it there first, or add an alias of it"
    )]
    HasParent {
        /// The child's path.
        child: String,
        /// The path of the region it should become part of.
        parent: String,
        /// The path of the region it is part of.
        other: String,
    },
    /// The region would become part of itself.
    #[error(
        "region {child} can't be added to {parent}: {parent} is part of it, or an alias in it shows {parent}"
    )]
    Cycle {
        /// The child's path.
        child: String,
        /// The path of the region it should become part of.
        parent: String,
    },
    /// The child would lie outside of its parent.
    #[error(
        "region {child} can't be added to {parent} at offset {offset:#x} ({offset}): {parent} has only {size:#x} ({size}) bytes"
    )]
    OutOfRange {
        /// The child's path.
        child: String,
        /// The path of the region it should become part of.
        parent: String,
        /// The offset that was asked for.
        offset: u64,
        /// The parent's size.
        size: u128,
    },
    /// A region was declared with a size that can't be.
    #[error("region {region} can't have {size:#x} ({size}) bytes: {limit}")]
    BadSize {
        /// The region's path.
        region: String,
        /// The size that was asked for.
        size: u128,
        /// What bounds it.
        limit: String,
    },
    /// The child is no part of that region.
    #[error("region {child} can't be removed from {parent}: it is no part of it")]
    NotAChild {
        /// The child's path.
        child: String,
        /// The path of the region it should be removed from.
        parent: String,
    },
    /// An alias has no children.
    #[error(
        "region {child} can't be added to {parent}, which is an alias: add it to the region that the alias shows"
    )]
    AliasParent {
        /// The child's path.
        child: String,
        /// The alias's path.
        parent: String,
    },
    /// Containers and aliases are nested too deeply.
    #[error("region {child} can't be added to {parent}: more than 64 containers and aliases would be nested")]
    TooDeep {
        /// The child's path.
        child: String,
        /// The path of the region it should become part of.
        parent: String,
    },
    /// No such ioeventfd.
    #[error(
        "region {region} has no ioeventfd of {size} bytes at offset {addr:#x} ({addr}) that could be removed"
    )]
    NoEventFd {
        /// The region's path.
        region: String,
        /// The offset in the region.
        addr: u64,
        /// The access size, 0 for any.
        size: u8,
    },
}

/// What is behind a region.
pub(crate) enum Body {
    Container,
    Ram { block: Arc<RamBlock>, offset: u64 },
    RomDevice { block: Arc<RamBlock>, offset: u64, io: Arc<dyn Io> },
    Io(Arc<dyn Io>),
    Alias { target: Region, offset: u64 },
    Iommu(Arc<dyn Translate>),
    Reservation,
}

pub(crate) struct State {
    pub(crate) size: u128,
    pub(crate) enabled: bool,
    pub(crate) readonly: bool,
    pub(crate) romd: bool,
    pub(crate) coalesced: bool,
    /// Dirty clients that log writes here, as [`DirtyClient::bit`]s.
    pub(crate) log: u8,
    pub(crate) parent: Weak<Inner>,
    pub(crate) offset: u64,
    pub(crate) priority: i32,
    /// In the order of visibility: falling priority, the latest first among equals.
    pub(crate) children: Vec<Region>,
    pub(crate) eventfds: Arc<[IoEventFd]>,
    /// Regions that are aliases of this one.
    aliases: Vec<Weak<Inner>>,
    /// Spaces of which this is the root.
    spaces: Vec<Weak<SpaceInner>>,
    /// A size that was refused at construction; told when the region is added.
    refused: Option<(u128, String)>,
}

pub(crate) struct Inner {
    id: u64,
    name: String,
    owner: OnceLock<Box<str>>,
    kind: Kind,
    pub(crate) body: Body,
    state: Mutex<State>,
}

/// A region of an address space. A cheap handle: clones are the same region, and regions are equal when they are the same.
///
/// Changes take effect at once, or at the end of the [`transaction`] around them. A device that keeps the handle of its own I/O
/// region keeps itself alive through it: give it a [`std::sync::Weak`], or take the region apart when the device goes.
#[derive(Clone)]
pub struct Region(pub(crate) Arc<Inner>);

impl PartialEq for Region {
    fn eq(&self, other: &Region) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Region {}

impl Hash for Region {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id().hash(state);
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} {})", self.0.kind, self.path())
    }
}

impl Region {
    fn new(name: &str, kind: Kind, size: u128, limit: u128, limit_text: &str, body: Body) -> Region {
        let refused = (size > limit).then(|| (size, limit_text.to_owned()));
        let target = match &body {
            Body::Alias { target, .. } => Some(target.clone()),
            _ => None,
        };
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let region = Region(Arc::new(Inner {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            owner: OnceLock::new(),
            kind,
            body,
            state: Mutex::new(State {
                size: size.min(limit),
                enabled: true,
                readonly: kind == Kind::Rom,
                romd: true,
                coalesced: false,
                log: 0,
                parent: Weak::new(),
                offset: 0,
                priority: 0,
                children: Vec::new(),
                eventfds: Arc::new([]),
                aliases: Vec::new(),
                spaces: Vec::new(),
                refused,
            }),
        }));
        if let Some(target) = target {
            let mut state = target.state();
            state.aliases.retain(|weak| weak.strong_count() > 0);
            state.aliases.push(Arc::downgrade(&region.0));
        }
        region
    }

    fn new_ram(name: &str, kind: Kind, block: &Arc<RamBlock>, offset: u64, size: u64, body: Body) -> Region {
        let limit = block.len().saturating_sub(offset);
        let text = format!(
            "from offset {offset:#x} on, the memory `{}` has only {limit:#x} ({limit}) bytes",
            block.name()
        );
        Region::new(name, kind, size.into(), limit.into(), &text, body)
    }

    /// A region that only holds others. `size` in bytes, at most 2^64; a larger one is refused when the region is added.
    pub fn container(name: &str, size: u128) -> Region {
        Region::new(name, Kind::Container, size, MAX_SIZE, "at most 2^64 can be addressed", Body::Container)
    }

    /// Memory: `size` bytes of `block` from `offset` on. A part that isn't inside of the block is refused when the region is added.
    pub fn ram(name: &str, block: Arc<RamBlock>, offset: u64, size: u64) -> Region {
        Region::new_ram(name, Kind::Ram, &block.clone(), offset, size, Body::Ram { block, offset })
    }

    /// Memory that the guest can't write to; else as [`Region::ram`].
    pub fn rom(name: &str, block: Arc<RamBlock>, offset: u64, size: u64) -> Region {
        Region::new_ram(name, Kind::Rom, &block.clone(), offset, size, Body::Ram { block, offset })
    }

    /// A ROM device: reads come from `block` as long as ROM mode is on (see [`Region::set_romd`]; it is at the start), all other
    /// accesses go to `io`.
    pub fn rom_device(name: &str, block: Arc<RamBlock>, offset: u64, size: u64, io: Arc<dyn Io>) -> Region {
        Region::new_ram(
            name,
            Kind::RomDevice,
            &block.clone(),
            offset,
            size,
            Body::RomDevice { block, offset, io },
        )
    }

    /// A device's registers.
    pub fn io(name: &str, size: u128, io: Arc<dyn Io>) -> Region {
        Region::new(name, Kind::Io, size, MAX_SIZE, "at most 2^64 can be addressed", Body::Io(io))
    }

    /// `size` bytes of `target` from `offset` on, shown in a second place. What reaches beyond the target is a hole.
    pub fn alias(name: &str, target: &Region, offset: u64, size: u128) -> Region {
        let body = Body::Alias { target: target.clone(), offset };
        Region::new(name, Kind::Alias, size, MAX_SIZE, "at most 2^64 can be addressed", body)
    }

    /// A region whose accesses are translated into another address space.
    pub fn iommu(name: &str, size: u128, translate: Arc<dyn Translate>) -> Region {
        Region::new(
            name,
            Kind::Iommu,
            size,
            MAX_SIZE,
            "at most 2^64 can be addressed",
            Body::Iommu(translate),
        )
    }

    /// Claims a range, and nothing answers there: for what an accelerator handles by itself.
    pub fn reservation(name: &str, size: u128) -> Region {
        Region::new(
            name,
            Kind::Reservation,
            size,
            MAX_SIZE,
            "at most 2^64 can be addressed",
            Body::Reservation,
        )
    }

    /// Names the device or board that the region belongs to. The first name given counts.
    #[must_use]
    pub fn with_owner(self, owner: &str) -> Region {
        let _ = self.0.owner.set(owner.into());
        self
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // No code that could panic halfway through a change runs under this lock.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The region's own name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The name of the device or board that the region belongs to; empty without one.
    pub fn owner(&self) -> &str {
        self.0.owner.get().map_or("", |owner| owner)
    }

    /// A number that no other region of this process has or will have: for maps.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// What the region is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The size in bytes, at most 2^64.
    pub fn size(&self) -> u128 {
        self.state().size
    }

    /// The offset in the parent.
    pub fn offset(&self) -> u64 {
        self.state().offset
    }

    /// The priority among the parent's children.
    pub fn priority(&self) -> i32 {
        self.state().priority
    }

    /// Is the region switched on?
    pub fn is_enabled(&self) -> bool {
        self.state().enabled
    }

    /// Is the region read-only by itself? (It may be so through what it is part of, too.)
    pub fn is_readonly(&self) -> bool {
        self.state().readonly
    }

    /// Is a ROM device in ROM mode? True for all other regions.
    pub fn is_romd(&self) -> bool {
        self.state().romd
    }

    /// The region that this one is part of.
    pub fn parent(&self) -> Option<Region> {
        self.state().parent.upgrade().map(Region)
    }

    /// The children in the order of visibility.
    pub fn children(&self) -> Vec<Region> {
        self.state().children.clone()
    }

    /// The memory behind RAM, ROM and ROM devices, and the offset in it at which the region starts.
    pub fn ram_block(&self) -> Option<(Arc<RamBlock>, u64)> {
        match &self.0.body {
            Body::Ram { block, offset } | Body::RomDevice { block, offset, .. } => {
                Some((block.clone(), *offset))
            }
            _ => None,
        }
    }

    /// What an alias shows: the region and the offset in it.
    pub fn alias_target(&self) -> Option<(Region, u64)> {
        match &self.0.body {
            Body::Alias { target, offset } => Some((target.clone(), *offset)),
            _ => None,
        }
    }

    /// The names from the outermost container to this region: `/system/pci/00:03.0.bar0`.
    pub fn path(&self) -> String {
        let mut names = vec![self.clone()];
        // The depth is bounded by `add`; the count guards against a graph that changes meanwhile.
        while let Some(parent) =
            names.last().and_then(Region::parent).filter(|_| names.len() <= 2 * MAX_DEPTH)
        {
            names.push(parent);
        }
        names.iter().rev().fold(String::new(), |path, region| path + "/" + region.name())
    }

    /// Adds `child` at `offset`, with a priority that is compared with those of this region's other children only. The higher
    /// priority is seen; among equals the one added last (and the pair is reported by `overlaps`). What reaches beyond this region's
    /// end is cut off.
    ///
    /// Refused when the child has a parent already, when a cycle would come about, when the child would lie wholly outside, when
    /// this region is an alias, or when the child was declared with an impossible size.
    pub fn add(&self, offset: u64, child: &Region, priority: i32) -> Result<(), SpaceError> {
        let _transaction = transaction();
        let names = || (child.path(), self.path());
        if let Some((size, limit)) = child.state().refused.clone() {
            return Err(SpaceError::BadSize { region: child.name().to_owned(), size, limit });
        }
        if self.kind() == Kind::Alias {
            let (child, parent) = names();
            return Err(SpaceError::AliasParent { child, parent });
        }
        if let Some(other) = child.parent() {
            let (child, parent) = names();
            return Err(SpaceError::HasParent { child, parent, other: other.path() });
        }
        let size = self.size();
        if u128::from(offset) >= size {
            let (child, parent) = names();
            return Err(SpaceError::OutOfRange { child, parent, offset, size });
        }
        let mut heights = HashMap::new();
        match child.height(self, &mut heights) {
            None => {
                let (child, parent) = names();
                return Err(SpaceError::Cycle { child, parent });
            }
            Some(height) if height + self.depth(&mut HashMap::new()) > MAX_DEPTH => {
                let (child, parent) = names();
                return Err(SpaceError::TooDeep { child, parent });
            }
            Some(_) => {}
        }
        {
            let mut state = child.state();
            state.parent = Arc::downgrade(&self.0);
            state.offset = offset;
            state.priority = priority;
        }
        self.insert(child, priority);
        self.changed();
        Ok(())
    }

    fn insert(&self, child: &Region, priority: i32) {
        let mut state = self.state();
        let place = state.children.iter().position(|other| other.state().priority <= priority);
        let place = place.unwrap_or(state.children.len());
        state.children.insert(place, child.clone());
    }

    /// Takes `child` out of this region. Refused when it isn't in it.
    pub fn remove(&self, child: &Region) -> Result<(), SpaceError> {
        let _transaction = transaction();
        if child.parent().as_ref() != Some(self) {
            return Err(SpaceError::NotAChild { child: child.path(), parent: self.path() });
        }
        self.changed();
        self.state().children.retain(|other| other != child);
        child.state().parent = Weak::new();
        Ok(())
    }

    /// The number of levels from this region down, through children and aliases; none when `forbidden` is among them.
    fn height(&self, forbidden: &Region, known: &mut HashMap<u64, usize>) -> Option<usize> {
        if self == forbidden {
            return None;
        }
        if let Some(height) = known.get(&self.id()) {
            return Some(*height);
        }
        let mut below = 0;
        for child in self.children().iter().chain(self.alias_target().iter().map(|(target, _)| target)) {
            below = below.max(child.height(forbidden, known)?);
        }
        known.insert(self.id(), below + 1);
        Some(below + 1)
    }

    /// The number of levels from this region up, through parents and aliases.
    fn depth(&self, known: &mut HashMap<u64, usize>) -> usize {
        if let Some(depth) = known.get(&self.id()) {
            return *depth;
        }
        let depth = 1 + self.users().iter().map(|user| user.depth(known)).max().unwrap_or(0);
        known.insert(self.id(), depth);
        depth
    }

    /// The parent and the aliases of this region.
    fn users(&self) -> Vec<Region> {
        let state = self.state();
        let weak = std::iter::once(&state.parent).chain(&state.aliases);
        weak.filter_map(Weak::upgrade).map(Region).collect()
    }

    /// Notes that every space in which this region can be seen needs a new view.
    fn changed(&self) {
        let mut seen = vec![self.clone()];
        let mut next = 0;
        while let Some(region) = seen.get(next).cloned() {
            next += 1;
            let spaces: Vec<_> = region.state().spaces.iter().filter_map(Weak::upgrade).collect();
            spaces.into_iter().for_each(graph::mark);
            for user in region.users() {
                if !seen.contains(&user) {
                    seen.push(user);
                }
            }
        }
    }

    /// Changes the state, if `set` says that it did, within a transaction.
    fn change(&self, set: impl FnOnce(&mut State) -> bool) {
        let _transaction = transaction();
        let changed = set(&mut self.state());
        if changed {
            self.changed();
        }
    }

    /// Switches the region, and with it all that it holds, on or off.
    pub fn set_enabled(&self, enabled: bool) {
        self.change(|state| std::mem::replace(&mut state.enabled, enabled) != enabled);
    }

    /// Moves the region within its parent. What reaches beyond the parent's end is cut off, all of it if need be.
    pub fn set_offset(&self, offset: u64) {
        self.change(|state| std::mem::replace(&mut state.offset, offset) != offset);
    }

    /// Changes the priority. Among equals the region then counts as added last.
    pub fn set_priority(&self, priority: i32) {
        let _transaction = transaction();
        let before = std::mem::replace(&mut self.state().priority, priority);
        if let Some(parent) = self.parent().filter(|_| before != priority) {
            parent.state().children.retain(|other| other != self);
            parent.insert(self, priority);
            self.changed();
        }
    }

    /// Changes the size in bytes. Refused above 2^64, and beyond the end of the memory behind RAM, ROM and ROM devices.
    pub fn set_size(&self, size: u128) -> Result<(), SpaceError> {
        let (limit, what) = match self.ram_block() {
            Some((block, offset)) => {
                let limit = u128::from(block.len().saturating_sub(offset));
                (limit, format!("the memory `{}` has only {limit:#x} ({limit}) bytes there", block.name()))
            }
            None => (MAX_SIZE, "at most 2^64 can be addressed".to_owned()),
        };
        if size > limit {
            return Err(SpaceError::BadSize { region: self.path(), size, limit: what });
        }
        self.change(|state| {
            state.refused = None;
            std::mem::replace(&mut state.size, size) != size
        });
        Ok(())
    }

    /// Makes RAM (here or in what this region holds) read-only, or writable again. Also turns ROM into RAM.
    pub fn set_readonly(&self, readonly: bool) {
        self.change(|state| std::mem::replace(&mut state.readonly, readonly) != readonly);
    }

    /// Switches a ROM device between ROM mode (reads come from memory) and device mode (reads go to the device).
    pub fn set_romd(&self, romd: bool) {
        if self.kind() == Kind::RomDevice {
            self.change(|state| std::mem::replace(&mut state.romd, romd) != romd);
        }
    }

    /// Starts or stops logging of writes to this region's memory for one client. Listeners are told, so that an accelerator logs
    /// too; the bits themselves are in the [`RamBlock`], and one region of a block should be the one that logs for a client.
    pub fn set_log_dirty(&self, client: DirtyClient, on: bool) {
        let Some((block, _)) = self.ram_block() else { return };
        block.set_logging(client, on);
        self.change(|state| {
            let log = if on { state.log | client.bit() } else { state.log & !client.bit() };
            std::mem::replace(&mut state.log, log) != log
        });
    }

    /// Takes and clears the dirty bits of this region's memory for one client, after having asked the listeners of all spaces that
    /// show it (accelerators with a log of their own) for theirs. The bitmap's pages are counted from the start of the block.
    pub fn dirty_snapshot_and_clear(&self, client: DirtyClient) -> Option<Bitmap> {
        let (block, offset) = self.ram_block()?;
        let spaces = {
            let _transaction = transaction();
            let mut seen = vec![self.clone()];
            let mut spaces: Vec<Arc<SpaceInner>> = Vec::new();
            let mut next = 0;
            while let Some(region) = seen.get(next).cloned() {
                next += 1;
                spaces.extend(region.state().spaces.iter().filter_map(Weak::upgrade));
                seen.extend(
                    region.users().into_iter().filter(|user| !seen.contains(user)).collect::<Vec<_>>(),
                );
            }
            spaces
        };
        spaces.iter().for_each(|space| space.sync_dirty(Some(self)));
        let end = offset.saturating_add(u64::try_from(self.size()).unwrap_or(u64::MAX));
        Some(block.dirty_snapshot_and_clear(client, offset..end))
    }

    /// Has a write of `size` bytes (0: any size) at offset `addr`, of `match_value` (none: any value), wake `notify` instead of calling
    /// the device. An accelerator may do so without an exit.
    pub fn add_ioeventfd(&self, addr: u64, size: u8, match_value: Option<u64>, notify: Arc<dyn Notify>) {
        let event = IoEventFd { addr, size, match_value, notify };
        // What goes is dropped after the region's lock: it may run code of others.
        let mut old = None;
        self.change(|state| {
            let events = state.eventfds.iter().cloned().chain([event]).collect();
            old = Some(std::mem::replace(&mut state.eventfds, events));
            true
        });
    }

    /// Undoes [`Region::add_ioeventfd`]; refused when there is no such one.
    pub fn remove_ioeventfd(
        &self,
        addr: u64,
        size: u8,
        match_value: Option<u64>,
        notify: &Arc<dyn Notify>,
    ) -> Result<(), SpaceError> {
        let event = IoEventFd { addr, size, match_value, notify: notify.clone() };
        let (mut found, mut old) = (false, None);
        self.change(|state| {
            found = state.eventfds.contains(&event);
            let events = state.eventfds.iter().filter(|other| **other != event).cloned().collect();
            old = Some(std::mem::replace(&mut state.eventfds, events));
            found
        });
        drop(old);
        if found { Ok(()) } else { Err(SpaceError::NoEventFd { region: self.path(), addr, size }) }
    }

    /// Lets an accelerator collect writes to this region and hand them over later.
    pub fn set_coalesced(&self, coalesced: bool) {
        self.change(|state| std::mem::replace(&mut state.coalesced, coalesced) != coalesced);
    }

    /// Notes a space of which this region is the root.
    pub(crate) fn attach(&self, space: &Arc<SpaceInner>) {
        let mut state = self.state();
        state.spaces.retain(|weak| weak.strong_count() > 0);
        state.spaces.push(Arc::downgrade(space));
    }
}
