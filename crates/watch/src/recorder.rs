//! The flight recorder.

use crate::record::{AccessRecord, Site};
use crate::ring::Ring;
use hyaline_device::Register;
use hyaline_space::{Access, Actor, DeviceId, ExitKind, IoError, Observer, Outcome};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The clocks that records carry.
pub trait Clock: Send + Sync {
    /// The host's monotonic clock in nanoseconds, for durations. May always be 0: durations are then 0 too.
    fn host(&self) -> u64;
    /// Virtual time in nanoseconds. `host` is what [`Clock::host`] just said.
    fn now(&self, host: u64) -> u64;
}

/// The host's clock for both, from the time of its making.
#[derive(Debug)]
pub struct HostClock(Instant);

impl Default for HostClock {
    fn default() -> HostClock {
        HostClock(Instant::now())
    }
}

impl Clock for HostClock {
    fn host(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
    fn now(&self, host: u64) -> u64 {
        host
    }
}

/// Gets every record while it is attached. Called in the thread that made the access, after it.
pub trait Sink: Send + Sync {
    /// One access.
    fn record(&self, record: &AccessRecord, site: &Arc<Site>);
}

/// How often a register was accessed.
#[derive(Clone, Debug)]
pub struct Count {
    /// Where.
    pub site: Arc<Site>,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Accesses that were not done.
    pub failed: u64,
    /// Nanoseconds of the host in all of them.
    pub took: u64,
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    failed: AtomicU64,
    took: AtomicU64,
}

struct Place {
    site: Arc<Site>,
    counters: Counters,
}

#[derive(Default)]
struct Places {
    by_key: HashMap<(u64, usize, String), Arc<Place>>,
    all: Vec<Arc<Place>>,
}

/// Places that a thread found lately, so that a record needs no lock.
struct Cache {
    recorder: u64,
    lines: Vec<Option<(u64, usize, Arc<Place>)>>,
}

const LINES: usize = 256;

thread_local! {
    static CACHE: RefCell<Cache> = const { RefCell::new(Cache { recorder: 0, lines: Vec::new() }) };
}

/// Sees all dispatched accesses of the spaces whose observer it is: keeps the last ones of each processor, counts by register, feeds sinks.
pub struct Recorder {
    id: u64,
    clock: Box<dyn Clock>,
    next: AtomicU64,
    rings: Vec<Ring>,
    places: Mutex<Places>,
    sinking: AtomicBool,
    sinks: Mutex<Vec<Arc<dyn Sink>>>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recorder({} accesses)", self.accesses())
    }
}

/// Records kept for each processor unless the board says otherwise.
pub const DEPTH: usize = 4096;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn register_key(register: Option<&'static Register>) -> usize {
    register.map_or(0, |r| std::ptr::from_ref(r).addr())
}

impl Recorder {
    /// A recorder for `vcpus` processors and, in one more ring, everybody else.
    pub fn new(vcpus: usize, clock: Box<dyn Clock>) -> Arc<Recorder> {
        Recorder::with_depth(vcpus, DEPTH, clock)
    }
    /// The same with `depth` records for each.
    pub fn with_depth(vcpus: usize, depth: usize, clock: Box<dyn Clock>) -> Arc<Recorder> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        Arc::new(Recorder {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            clock,
            next: AtomicU64::new(1),
            rings: (0..=vcpus).map(|_| Ring::new(depth.max(1))).collect(),
            places: Mutex::default(),
            sinking: AtomicBool::new(false),
            sinks: Mutex::default(),
        })
    }

    /// Accesses seen so far.
    pub fn accesses(&self) -> u64 {
        self.next.load(Ordering::Relaxed) - 1
    }
    /// Accesses by each processor so far; the last number is everybody else's.
    pub fn by_vcpu(&self) -> Vec<u64> {
        self.rings.iter().map(Ring::written).collect()
    }
    /// The last `n` accesses of all, oldest first.
    pub fn last(&self, n: usize) -> Vec<AccessRecord> {
        let mut all: Vec<_> = self.rings.iter().flat_map(Ring::records).collect();
        all.sort_unstable_by_key(|r| r.seq);
        all.split_off(all.len().saturating_sub(n))
    }
    /// The last `n` accesses of one processor, oldest first.
    pub fn last_of(&self, vcpu: usize, n: usize) -> Vec<AccessRecord> {
        // The last ring is everybody else's.
        let own = self.rings.get(vcpu).filter(|_| vcpu + 1 < self.rings.len());
        let mut records = own.map(Ring::records).unwrap_or_default();
        records.split_off(records.len().saturating_sub(n))
    }
    /// The site of a number.
    pub fn site(&self, id: u32) -> Option<Arc<Site>> {
        lock(&self.places).all.get(id as usize).map(|p| p.site.clone())
    }
    /// Counts of all sites, the busiest first.
    pub fn counts(&self) -> Vec<Count> {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let mut counts: Vec<Count> = lock(&self.places)
            .all
            .iter()
            .map(|p| Count {
                site: p.site.clone(),
                reads: get(&p.counters.reads),
                writes: get(&p.counters.writes),
                failed: get(&p.counters.failed),
                took: get(&p.counters.took),
            })
            .collect();
        counts.sort_by_key(|c| (std::cmp::Reverse(c.reads + c.writes), c.site.id));
        counts
    }
    /// Attaches a sink.
    pub fn attach(&self, sink: Arc<dyn Sink>) {
        lock(&self.sinks).push(sink);
        self.sinking.store(true, Ordering::Release);
    }
    /// Detaches a sink.
    pub fn detach(&self, sink: &Arc<dyn Sink>) {
        let mut sinks = lock(&self.sinks);
        sinks.retain(|s| !Arc::ptr_eq(s, sink));
        self.sinking.store(!sinks.is_empty(), Ordering::Release);
    }

    /// Takes down a bus master's access to memory, which the address spaces do not report: for the sinks, and for everybody else's ring.
    /// `data` is what was moved.
    pub fn dma(&self, device: DeviceId, name: &str, addr: u64, data: &[u8], is_write: bool, ok: bool) {
        let mut first = [0; 8];
        let size = data.len().min(8);
        first.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let host = self.clock.host();
        let place = self.place_of((0, usize::from(device.0), "memory".to_owned()), |id| Site {
            id,
            space: "memory".to_owned(),
            region: 0,
            path: format!("/dma/{name}"),
            name: "ram".to_owned(),
            owner: name.to_owned(),
            register: None,
        });
        let record = AccessRecord {
            seq: self.next.fetch_add(1, Ordering::Relaxed),
            time: self.clock.now(host),
            rip: 0,
            addr,
            value: u64::from_le_bytes(first),
            offset: 0,
            took: 0,
            site: place.site.id,
            count: u32::try_from(data.len()).unwrap_or(u32::MAX),
            actor: Actor::Dma(device),
            exit: ExitKind::Dma,
            size: size as u8,
            is_write,
            parts: 0,
            outcome: if ok { Outcome::Ok } else { Outcome::Failed(IoError::Refused) },
        };
        (if is_write { &place.counters.writes } else { &place.counters.reads })
            .fetch_add(1, Ordering::Relaxed);
        if let Some(ring) = self.rings.last() {
            ring.push(&record);
        }
        if self.sinking.load(Ordering::Acquire) {
            let sinks = lock(&self.sinks).clone();
            sinks.iter().for_each(|s| s.record(&record, &place.site));
        }
    }

    fn place_of(&self, key: (u64, usize, String), site: impl FnOnce(u32) -> Site) -> Arc<Place> {
        let mut places = lock(&self.places);
        if let Some(place) = places.by_key.get(&key) {
            return place.clone();
        }
        let place =
            Arc::new(Place { site: Arc::new(site(places.all.len() as u32)), counters: Counters::default() });
        places.all.push(place.clone());
        places.by_key.insert(key, place.clone());
        place
    }

    fn place(&self, access: &Access<'_>, register: Option<&'static Register>) -> Arc<Place> {
        let key = (access.region.id(), register_key(register), access.space.to_owned());
        self.place_of(key, |id| Site {
            id,
            space: access.space.to_owned(),
            region: access.region.id(),
            path: access.region.path(),
            name: access.region.name().to_owned(),
            owner: access.region.owner().to_owned(),
            register,
        })
    }

    /// The place of an access, by way of this thread's cache.
    fn with_place<R>(
        &self,
        access: &Access<'_>,
        register: Option<&'static Register>,
        f: impl FnOnce(&Arc<Place>) -> R,
    ) -> R {
        let (region, reg) = (access.region.id(), register_key(register));
        CACHE.with_borrow_mut(|cache| {
            if cache.recorder != self.id || cache.lines.len() != LINES {
                cache.recorder = self.id;
                cache.lines.clear();
                cache.lines.resize(LINES, None);
            }
            let at = (region as usize).wrapping_mul(31).wrapping_add(reg / align_of::<Register>()) % LINES;
            let hit = cache.lines.get(at).and_then(Option::as_ref);
            let hit = hit.filter(|(r, g, p)| *r == region && *g == reg && p.site.space == access.space);
            if let Some((.., place)) = hit {
                return f(place);
            }
            let place = self.place(access, register);
            let result = f(&place);
            if let Some(line) = cache.lines.get_mut(at) {
                *line = Some((region, reg, place));
            }
            result
        })
    }
}

impl Observer for Recorder {
    fn access(&self, access: &Access<'_>) {
        let host = self.clock.host();
        // Where nobody was asked, the register is one of an earlier access.
        let register = if access.parts > 0 { hyaline_device::reached() } else { None };
        let mut record = AccessRecord {
            seq: self.next.fetch_add(1, Ordering::Relaxed),
            time: self.clock.now(host),
            rip: access.who.rip,
            addr: access.addr,
            value: access.value,
            offset: access.region_offset,
            took: u32::try_from(host.saturating_sub(access.started)).unwrap_or(u32::MAX),
            site: 0,
            count: access.who.count,
            actor: access.who.actor,
            exit: access.who.exit,
            size: access.size,
            is_write: access.is_write,
            parts: access.parts,
            outcome: access.outcome,
        };
        let others = self.rings.len() - 1;
        let ring = match access.who.actor {
            Actor::Vcpu(n) if usize::from(n) < others => usize::from(n),
            _ => others,
        };
        let sunk = self.with_place(access, register, |place| {
            record.site = place.site.id;
            let c = &place.counters;
            (if access.is_write { &c.writes } else { &c.reads }).fetch_add(1, Ordering::Relaxed);
            if record.took != 0 {
                c.took.fetch_add(u64::from(record.took), Ordering::Relaxed);
            }
            if !access.outcome.is_ok() {
                c.failed.fetch_add(1, Ordering::Relaxed);
            }
            self.sinking.load(Ordering::Acquire).then(|| place.site.clone())
        });
        if let Some(ring) = self.rings.get(ring) {
            ring.push(&record);
        }
        if let Some(site) = sunk {
            // Not under the lock: a sink may make accesses of its own.
            let sinks = lock(&self.sinks).clone();
            sinks.iter().for_each(|s| s.record(&record, &site));
        }
    }

    fn now(&self) -> u64 {
        hyaline_device::forget_reached();
        self.clock.host()
    }
}
