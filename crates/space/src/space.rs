//! Address spaces.

use crate::dispatch::{Failure, Way};
use crate::graph;
use crate::listener::{Listener, ListenerId};
use crate::view::{FlatRange, FlatView};
use crate::{AccessError, AddrRange, Observer, Origin, Outcome, Region, Section, transaction};
use arc_swap::ArcSwap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What listeners know.
struct Told {
    listeners: Vec<(ListenerId, Arc<dyn Listener>)>,
    /// The view that they were last told.
    view: Arc<FlatView>,
    next_id: u64,
}

pub(crate) struct SpaceInner {
    name: String,
    root: Region,
    ports: bool,
    pub(crate) view: ArcSwap<FlatView>,
    /// The view's generation, for cursors.
    generation: AtomicU64,
    told: Mutex<Told>,
    observer: Mutex<Option<Arc<dyn Observer>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a processor, or a device, sees at its addresses: a root region and its flat view. A cheap handle: clones are the same space.
#[derive(Clone)]
pub struct AddressSpace {
    pub(crate) inner: Arc<SpaceInner>,
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressSpace({} {:?})", self.inner.name, self.inner.root)
    }
}

impl PartialEq for AddressSpace {
    fn eq(&self, other: &AddressSpace) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Eq for AddressSpace {}

impl AddressSpace {
    /// A space of 64-bit addresses. The root may also be part of other spaces. One that was declared with an impossible size is cut
    /// to the possible.
    pub fn new(name: &str, root: &Region) -> AddressSpace {
        AddressSpace::make(name, root, false)
    }

    /// A space of 65,536 ports: the same, with a table for the look-up. What the root has beyond the last port isn't seen.
    pub fn new_ports(name: &str, root: &Region) -> AddressSpace {
        AddressSpace::make(name, root, true)
    }

    fn make(name: &str, root: &Region, ports: bool) -> AddressSpace {
        let _transaction = transaction();
        let view = Arc::new(FlatView::build(root, ports, None));
        let inner = Arc::new(SpaceInner {
            name: name.to_owned(),
            root: root.clone(),
            ports,
            generation: AtomicU64::new(view.generation),
            told: Mutex::new(Told { listeners: Vec::new(), view: view.clone(), next_id: 1 }),
            view: ArcSwap::new(view),
            observer: Mutex::new(None),
        });
        root.attach(&inner);
        AddressSpace { inner }
    }

    /// The space's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The root region.
    pub fn root(&self) -> &Region {
        &self.inner.root
    }

    /// Is this a space of ports?
    pub fn is_ports(&self) -> bool {
        self.inner.ports
    }

    /// The present view.
    pub fn view(&self) -> Arc<FlatView> {
        self.inner.view.load_full()
    }

    /// The present view's [`FlatView::generation`]: it changes when a cached look-up may be stale.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.inner.generation.load(Ordering::Acquire)
    }

    fn way<'a>(&'a self, view: &'a FlatView, who: &'a Origin) -> Way<'a> {
        Way { view, space: &self.inner.name, who, translations: 0, ram_only: false }
    }

    /// Makes one access of 1, 2, 4 or 8 bytes: the value read, little endian, and what came of it. Bytes that could not be read are
    /// all ones. What reaches beyond the end of a range goes on in the next. Another size gives `BadSize`.
    #[inline]
    pub fn load(&self, addr: u64, size: u8, who: &Origin) -> (u64, Outcome) {
        let view = self.inner.view.load();
        self.way(&view, who).load(view.find(addr), addr, size)
    }

    /// Makes one access of 1, 2, 4 or 8 bytes that writes the low bytes of `value`. Else as [`AddressSpace::load`].
    #[inline]
    pub fn store(&self, addr: u64, size: u8, value: u64, who: &Origin) -> Outcome {
        let view = self.inner.view.load();
        self.way(&view, who).store(view.find(addr), addr, size, value)
    }

    /// As [`AddressSpace::load`], by way of the last hit.
    #[inline]
    pub fn load_with(&self, cursor: &mut Cursor, addr: u64, size: u8, who: &Origin) -> (u64, Outcome) {
        let (view, hint) = cursor.find(&self.inner, addr);
        self.way(view, who).load(hint, addr, size)
    }

    /// As [`AddressSpace::store`], by way of the last hit.
    #[inline]
    pub fn store_with(&self, cursor: &mut Cursor, addr: u64, size: u8, value: u64, who: &Origin) -> Outcome {
        let (view, hint) = cursor.find(&self.inner, addr);
        self.way(view, who).store(hint, addr, size, value)
    }

    /// Reads any number of bytes. RAM is copied; devices are read in pieces of at most 8 bytes, as large as the device and natural
    /// alignment allow. Bytes that can't be read are all ones, the rest is read, and the first failure is returned.
    pub fn read(&self, addr: u64, buf: &mut [u8], who: &Origin) -> Result<(), AccessError> {
        let view = self.inner.view.load();
        self.result(false, self.way(&view, who).read(addr, buf))
    }

    /// Writes any number of bytes; cut as for [`AddressSpace::read`]. Bytes that can't be written are dropped, the rest is written, and
    /// the first failure is returned. Writes to ROM are such a failure, except by debuggers and loaders.
    pub fn write(&self, addr: u64, data: &[u8], who: &Origin) -> Result<(), AccessError> {
        let view = self.inner.view.load();
        self.result(true, self.way(&view, who).write(addr, data))
    }

    /// Reads for a device that masters the bus: only memory can be reached, a device's registers refuse.
    pub fn dma_read(&self, addr: u64, buf: &mut [u8], who: &Origin) -> Result<(), AccessError> {
        let view = self.inner.view.load();
        self.result(false, Way { ram_only: true, ..self.way(&view, who) }.read(addr, buf))
    }

    /// Writes for a device that masters the bus: only memory can be reached, a device's registers refuse.
    pub fn dma_write(&self, addr: u64, data: &[u8], who: &Origin) -> Result<(), AccessError> {
        let view = self.inner.view.load();
        self.result(true, Way { ram_only: true, ..self.way(&view, who) }.write(addr, data))
    }

    fn result(&self, is_write: bool, failure: Option<Failure>) -> Result<(), AccessError> {
        match failure {
            None => Ok(()),
            Some(Failure { addr, outcome, region }) => {
                Err(AccessError { space: self.inner.name.clone(), addr, is_write, outcome, region })
            }
        }
    }

    /// What is at `addr`: the section from there to the end of its range; none in a hole.
    pub fn lookup(&self, addr: u64) -> Option<Section> {
        self.inner.view.load().lookup(addr)
    }

    /// Has `listener` told of every change of the view, and now of the present view as if all of it were new.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> ListenerId {
        let _transaction = transaction();
        let (id, view) = {
            let mut told = lock(&self.inner.told);
            let id = ListenerId(told.next_id);
            told.next_id += 1;
            told.listeners.push((id, listener.clone()));
            (id, told.view.clone())
        };
        tell(&[(id, listener)], &[], &view.ranges);
        id
    }

    /// Has a listener told that all it knows of is gone, and then nothing more. False when there is no such listener.
    pub fn remove_listener(&self, id: ListenerId) -> bool {
        let _transaction = transaction();
        let (listener, view) = {
            let mut told = lock(&self.inner.told);
            let Some(place) = told.listeners.iter().position(|(other, _)| *other == id) else { return false };
            (told.listeners.remove(place), told.view.clone())
        };
        tell(&[listener], &view.ranges, &[]);
        true
    }

    /// Sets or removes who sees dispatched accesses.
    pub fn set_observer(&self, observer: Option<Arc<dyn Observer>>) {
        let _transaction = transaction();
        *lock(&self.inner.observer) = observer;
        graph::mark(self.inner.clone());
    }

    /// Has accelerators bring their dirty logs into the memory blocks.
    pub fn sync_dirty(&self) {
        self.inner.sync_dirty(None);
    }
}

impl SpaceInner {
    /// Makes and publishes a new view, and has the listeners told of the difference. At the end of a transaction.
    pub(crate) fn publish(&self, tell_listeners: bool) {
        let observer = lock(&self.observer).clone();
        let mut view = FlatView::build(&self.root, self.ports, observer);
        let old = self.view.load_full();
        if view.dispatches_as(&old) {
            // Only what is hidden has changed: explanations need the new tree, caches can stay.
            view.generation = old.generation;
        }
        let view = Arc::new(view);
        let generation = view.generation;
        self.view.store(view.clone());
        self.generation.store(generation, Ordering::Release);
        if tell_listeners {
            let (listeners, old) = {
                let mut told = lock(&self.told);
                (told.listeners.clone(), std::mem::replace(&mut told.view, view.clone()))
            };
            if old.generation != generation {
                tell(&listeners, &old.ranges, &view.ranges);
            }
        }
    }

    /// Calls `log_sync` for the ranges that log, of one region or of all.
    pub(crate) fn sync_dirty(&self, region: Option<&Region>) {
        let (listeners, view) = {
            let told = lock(&self.told);
            (told.listeners.clone(), told.view.clone())
        };
        for range in view.ranges.iter().filter(|range| range.log != 0) {
            if region.is_none_or(|region| *region == range.region) {
                let section = range.section(range.start);
                listeners.iter().for_each(|(_, listener)| listener.log_sync(&section));
            }
        }
    }
}

/// Tells listeners what is in `old` and not in `new`, then what is in `new` and not in `old`.
fn tell(listeners: &[(ListenerId, Arc<dyn Listener>)], old: &[FlatRange], new: &[FlatRange]) {
    if listeners.is_empty() {
        return;
    }
    let counterpart = |range: &FlatRange, others: &[FlatRange]| -> Option<usize> {
        let index = others.partition_point(|other| other.last < range.start);
        others.get(index).filter(|other| range.same_place(other)).map(|_| index)
    };
    let all = |call: &dyn Fn(&dyn Listener)| listeners.iter().for_each(|(_, listener)| call(&**listener));
    all(&|l| l.begin());
    for range in old {
        let section = range.section(range.start);
        let kept = counterpart(range, new).and_then(|index| new.get(index));
        let range_of = section.range;
        if range.coalesced && !kept.is_some_and(|kept| kept.coalesced) {
            all(&|l| l.coalesced_del(&section, range_of));
        }
        for event in events(range) {
            if !kept.is_some_and(|kept| events(kept).any(|other| other == event)) {
                all(&|l| l.ioeventfd_del(&section, &event));
            }
        }
        match kept {
            None => all(&|l| l.region_del(&section)),
            Some(kept) if range.log & !kept.log != 0 => all(&|l| l.log_stop(&section, range.log, kept.log)),
            Some(_) => {}
        }
    }
    for range in new {
        let section = range.section(range.start);
        let was = counterpart(range, old).and_then(|index| old.get(index));
        if was.is_none() {
            all(&|l| l.region_add(&section));
        }
        let logged = was.map_or(0, |was| was.log);
        if range.log & !logged != 0 {
            all(&|l| l.log_start(&section, logged, range.log));
        }
        for event in events(range) {
            if !was.is_some_and(|was| events(was).any(|other| other == event)) {
                all(&|l| l.ioeventfd_add(&section, &event));
            }
        }
        let range_of: AddrRange = section.range;
        if range.coalesced && !was.is_some_and(|was| was.coalesced) {
            all(&|l| l.coalesced_add(&section, range_of));
        }
    }
    all(&|l| l.commit());
}

/// The ioeventfds that can be seen in a range, with addresses in the space.
fn events(range: &FlatRange) -> impl Iterator<Item = crate::IoEventFd> + '_ {
    range.eventfds.iter().filter_map(|event| {
        let addr = range.start.checked_add(event.addr.checked_sub(range.offset)?)?;
        range.contains(addr).then(|| crate::IoEventFd { addr, ..event.clone() })
    })
}

/// A processor's last hit. It belongs to one thread; used with several spaces it works, and looks up again at each change.
#[derive(Clone, Default)]
pub struct Cursor {
    /// The view's generation, 0 before the first use.
    generation: u64,
    view: Option<Arc<FlatView>>,
    last: usize,
}

impl fmt::Debug for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cursor").field("generation", &self.generation).field("last", &self.last).finish()
    }
}

impl Cursor {
    /// A cursor that has hit nothing yet.
    pub fn new() -> Cursor {
        Cursor::default()
    }

    /// The present view and the index of the range at `addr`.
    #[inline]
    fn find(&mut self, space: &SpaceInner, addr: u64) -> (&FlatView, Option<usize>) {
        if self.generation != space.generation.load(Ordering::Acquire) {
            self.view = None;
        }
        let view = self.view.get_or_insert_with(|| {
            let view = space.view.load_full();
            self.generation = view.generation;
            view
        });
        let hit = view.ranges.get(self.last).is_some_and(|range| range.contains(addr));
        if hit {
            return (view, Some(self.last));
        }
        let found = view.find(addr);
        if let Some(index) = found {
            self.last = index;
        }
        (view, found)
    }
}
