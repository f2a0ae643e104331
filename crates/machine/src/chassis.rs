//! What surrounds the devices: clock, guest memory, the APIC bus, channels to the host, and the machine's control.

use crate::clock::{Clock, Timers};
use hyaline_device::{
    ApicMessage, Chassis, CpuSignal, Crash, Dma, DmaError, Effect, Line, Mapping, Ns, Request, Shadow, Slot,
    Smram, Source,
};
use hyaline_devices::intc::lapic;
use hyaline_space::{AddressSpace, DeviceId, Origin, Region};
use hyaline_x86::env::Signals;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::Thread;

/// The host's side of a device channel (a serial port's characters, a network card's frames).
pub trait Channel: Send + Sync {
    /// Bytes (or one frame) from the guest. Never blocks.
    fn send(&self, data: &[u8]);
    /// The device can take more: what waits may be offered again.
    fn ready(&self) {}
}

/// Takes log lines: notes, guest errors, features that aren't there.
pub trait Log: Send + Sync {
    /// One line. `kind` says which of `-d`'s items it belongs to.
    fn line(&self, kind: LogKind, slot: &str, text: &str);
}

/// Kinds of log line, as `-d` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogKind {
    /// `guest_errors`.
    GuestError,
    /// `unimp`.
    Unimplemented,
    /// `note`.
    Note,
    /// `int`: an interrupt or exception is delivered.
    Interrupt,
    /// `in_asm`: code is decoded.
    Code,
    /// `out_asm`: code is translated.
    Translation,
}

/// Accelerators that have chips of their own (KVM's local APICs) take messages here instead of the bus.
pub trait ApicSink: Send + Sync {
    /// True if the message was taken; else the machine's own local APICs get it.
    fn deliver(&self, message: &ApicMessage) -> bool;
}

/// Wakes whoever runs a processor.
pub trait Waker: Send + Sync {
    /// The request word has something new.
    fn wake(&self);
}

/// One processor as the chassis sees it.
pub struct CpuPort {
    /// Its request word.
    pub signals: Arc<Signals>,
    /// Its local APIC, when the machine emulates it.
    pub lapic: Option<Arc<Slot>>,
    waker: RwLock<Option<Arc<dyn Waker>>>,
}

impl CpuPort {
    /// A processor nobody runs yet.
    pub fn new(lapic: Option<Arc<Slot>>) -> CpuPort {
        CpuPort { signals: Arc::new(Signals::default()), lapic, waker: RwLock::new(None) }
    }
    /// Says how to wake the thread that runs it.
    pub fn set_waker(&self, waker: Option<Arc<dyn Waker>>) {
        *self.waker.write().unwrap_or_else(PoisonError::into_inner) = waker;
    }
    /// Raises request bits and wakes the processor.
    pub fn raise(&self, bits: u32) {
        self.signals.raise(bits);
        self.wake();
    }
    /// Wakes the processor's thread.
    pub fn wake(&self) {
        if let Some(w) = &*self.waker.read().unwrap_or_else(PoisonError::into_inner) {
            w.wake();
        }
    }
}

/// Unparks a thread.
pub struct Unpark(pub Thread);

impl Waker for Unpark {
    fn wake(&self) {
        self.0.unpark();
    }
}

/// Hears of bus masters' accesses to memory: number of the device's slot, address, what was moved, whether it was a write, whether it
/// was done.
pub type DmaWatch = Arc<dyn Fn(u16, u64, &[u8], bool, bool) + Send + Sync>;

/// Bytes of the guest's serial output that are kept for reports.
const CONSOLE: usize = 64 << 10;

/// Why the machine left its run loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The reset line was pulsed; the text says by whom.
    Reset(String),
    /// Power off.
    PowerOff,
    /// End with this exit code.
    Exit(i32),
    /// A processor shut down after a triple fault.
    TripleFault(u8),
    /// The accelerator can't go on; the text says why.
    Failed(String),
    /// Stop and hand control back (monitor, debugger, saving).
    Stop,
    /// The guest's kernel says that it panicked.
    GuestPanicked,
    /// A device crashed; [`Core::take_crash`] has the rest.
    DeviceCrashed(String),
    /// A report is wanted.
    Report,
    /// Something that a debugger waits for.
    Debug(crate::debug::Stopped),
}

/// Something the board carries out for the chassis, once it has said how.
type Hook<F> = RwLock<Option<Box<F>>>;

/// The chassis. One per machine, shared by all slots.
pub struct Core {
    /// Clock.
    pub clock: Clock,
    /// Timers of all devices.
    pub timers: Timers,
    /// Guest-physical memory; set once when the board is put together.
    memory: std::sync::OnceLock<AddressSpace>,
    cpus: RwLock<Vec<Arc<CpuPort>>>,
    ioapics: RwLock<Vec<Arc<Slot>>>,
    apic_sink: RwLock<Option<Arc<dyn ApicSink>>>,
    channels: RwLock<HashMap<(u16, u32), Arc<dyn Channel>>>,
    banks: RwLock<HashMap<(u16, usize), Region>>,
    lines: Mutex<BTreeMap<String, Arc<Line>>>,
    cpu_of_slot: RwLock<HashMap<u16, usize>>,
    a20: Hook<dyn Fn(u16, bool) + Send + Sync>,
    shadow: Hook<dyn Fn(Shadow) + Send + Sync>,
    smram: Hook<dyn Fn(Smram) + Send + Sync>,
    log: RwLock<Option<Arc<dyn Log>>>,
    events: Mutex<Vec<Event>>,
    happened: Condvar,
    pending: AtomicBool,
    random: Mutex<Option<u64>>,
    /// Counted time: the processor that runs, and the virtual time at which its slice ends; 0 while none runs.
    running: AtomicUsize,
    slice_end: AtomicU64,
    dma_watch: RwLock<Option<DmaWatch>>,
    dma_watched: AtomicBool,
    console: Mutex<std::collections::VecDeque<u8>>,
    crashes: Mutex<Vec<(Arc<Slot>, Crash)>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

macro_rules! read {
    ($l:expr) => {
        $l.read().unwrap_or_else(PoisonError::into_inner)
    };
}
macro_rules! write {
    ($l:expr) => {
        $l.write().unwrap_or_else(PoisonError::into_inner)
    };
}

impl Core {
    /// An empty chassis. With a `seed` random numbers are a fixed sequence, for deterministic machines.
    pub fn new(clock: Clock, seed: Option<u64>) -> Arc<Core> {
        Arc::new(Core {
            clock,
            timers: Timers::new(),
            memory: std::sync::OnceLock::new(),
            cpus: RwLock::default(),
            ioapics: RwLock::default(),
            apic_sink: RwLock::new(None),
            channels: RwLock::default(),
            banks: RwLock::default(),
            lines: Mutex::default(),
            cpu_of_slot: RwLock::default(),
            a20: RwLock::new(None),
            shadow: RwLock::new(None),
            smram: RwLock::new(None),
            log: RwLock::new(None),
            events: Mutex::default(),
            happened: Condvar::new(),
            pending: AtomicBool::new(false),
            random: Mutex::new(seed),
            running: AtomicUsize::new(0),
            slice_end: AtomicU64::new(0),
            dma_watch: RwLock::new(None),
            dma_watched: AtomicBool::new(false),
            console: Mutex::default(),
            crashes: Mutex::default(),
        })
    }

    /// Gives bus masters their memory. The first call holds.
    pub fn set_memory(&self, memory: AddressSpace) {
        self.memory.get_or_init(|| memory);
    }
    /// A line by its name, made at first use.
    pub fn line(&self, name: &str) -> Arc<Line> {
        lock(&self.lines).entry(name.to_string()).or_insert_with(|| Line::new(name)).clone()
    }
    /// All lines, for saving and for the monitor.
    pub fn lines(&self) -> Vec<Arc<Line>> {
        lock(&self.lines).values().cloned().collect()
    }
    /// Adds a processor; its local APIC's signals go to it.
    pub fn add_cpu(&self, port: CpuPort) -> Arc<CpuPort> {
        let mut cpus = write!(self.cpus);
        if let Some(lapic) = &port.lapic {
            write!(self.cpu_of_slot).insert(lapic.id(), cpus.len());
        }
        let port = Arc::new(port);
        cpus.push(port.clone());
        port
    }
    /// All processors.
    pub fn cpus(&self) -> Vec<Arc<CpuPort>> {
        read!(self.cpus).clone()
    }
    /// Adds an I/O APIC, which hears of ended interrupts.
    pub fn add_ioapic(&self, slot: &Arc<Slot>) {
        write!(self.ioapics).push(slot.clone());
    }
    /// Hands APIC messages to an accelerator's own chips first.
    pub fn set_apic_sink(&self, sink: Option<Arc<dyn ApicSink>>) {
        *write!(self.apic_sink) = sink;
    }
    /// Connects a device's channel to the host.
    pub fn connect(&self, slot: &Slot, channel: u32, host: Arc<dyn Channel>) {
        write!(self.channels).insert((slot.id(), channel), host);
    }
    /// Lets a slot move the region that holds its bank, within the container it was added to.
    pub fn set_bank(&self, slot: &Slot, bank: usize, region: Region) {
        write!(self.banks).insert((slot.id(), bank), region);
    }
    /// What the A20 gate does; `f` gets the number of the slot that asks, and what it asks for.
    pub fn set_a20(&self, f: impl Fn(u16, bool) + Send + Sync + 'static) {
        *write!(self.a20) = Some(Box::new(f));
    }
    /// What the memory controller's shadow registers do.
    pub fn set_shadow(&self, f: impl Fn(Shadow) + Send + Sync + 'static) {
        *write!(self.shadow) = Some(Box::new(f));
    }
    /// What the memory controller's SMRAM register does.
    pub fn set_smram(&self, f: impl Fn(Smram) + Send + Sync + 'static) {
        *write!(self.smram) = Some(Box::new(f));
    }
    /// Where log lines go.
    pub fn set_log(&self, log: Option<Arc<dyn Log>>) {
        *write!(self.log) = log;
    }
    /// Writes a log line.
    pub fn log(&self, kind: LogKind, who: &str, text: &str) {
        if let Some(log) = &*read!(self.log) {
            log.line(kind, who, text);
        }
    }

    /// Has somebody told of bus masters' accesses.
    pub fn set_dma_watch(&self, watch: Option<DmaWatch>) {
        self.dma_watched.store(watch.is_some(), Ordering::Release);
        *write!(self.dma_watch) = watch;
    }
    fn moved(&self, address: u64, data: &[u8], is_write: bool, ok: bool) {
        if self.dma_watched.load(Ordering::Acquire)
            && let Some(watch) = read!(self.dma_watch).clone()
        {
            watch(hyaline_device::current(), address, data, is_write, ok);
        }
    }
    /// The last bytes that the guest sent over its serial ports and the debug console.
    pub fn console(&self) -> Vec<u8> {
        lock(&self.console).iter().copied().collect()
    }
    fn keep_console(&self, data: &[u8]) {
        let mut console = lock(&self.console);
        let data = data.get(data.len().saturating_sub(CONSOLE)..).unwrap_or(data);
        let over = (console.len() + data.len()).saturating_sub(CONSOLE);
        let over = over.min(console.len());
        console.drain(..over);
        console.extend(data);
    }
    /// Takes the oldest crash of a device that has not been dealt with.
    pub fn take_crash(&self) -> Option<(Arc<Slot>, Crash)> {
        let mut crashes = lock(&self.crashes);
        (!crashes.is_empty()).then(|| crashes.remove(0))
    }

    /// Queues an event and gets every processor out of the guest.
    pub fn event(&self, event: Event) {
        lock(&self.events).push(event);
        self.pending.store(true, Ordering::SeqCst);
        self.happened.notify_all();
        self.kick();
    }
    /// Sleeps until an event waits.
    pub fn wait_event(&self) {
        let events = lock(&self.events);
        drop(self.happened.wait_while(events, |e| e.is_empty()));
    }
    /// Takes the oldest event.
    pub fn take_event(&self) -> Option<Event> {
        let mut events = lock(&self.events);
        let first = (!events.is_empty()).then(|| events.remove(0));
        self.pending.store(!events.is_empty(), Ordering::SeqCst);
        first
    }
    /// Drops the events that don't pass.
    pub fn retain_events(&self, keep: impl FnMut(&Event) -> bool) {
        let mut events = lock(&self.events);
        events.retain(keep);
        self.pending.store(!events.is_empty(), Ordering::SeqCst);
    }
    /// Does an event wait? Cheap: for run loops.
    #[inline]
    pub fn has_event(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }
    /// Gets every processor out of the guest.
    pub fn kick(&self) {
        for cpu in read!(self.cpus).iter() {
            cpu.raise(Signals::KICK);
        }
    }

    /// Counted time: processor `index` runs until `end`, nanoseconds of virtual time (0: nobody runs). A timer that is armed for an earlier
    /// time ends the slice, so that it fires at its count.
    pub(crate) fn slice(&self, index: usize, end: Ns) {
        self.running.store(index, Ordering::Relaxed);
        self.slice_end.store(end, Ordering::Relaxed);
    }

    /// The state of the fixed sequence of random numbers; None when they are the host's.
    pub(crate) fn random_state(&self) -> Option<u64> {
        *lock(&self.random)
    }
    /// Goes on with a fixed sequence of random numbers, unless they are the host's.
    pub(crate) fn set_random_state(&self, state: u64) {
        if let Some(seed) = &mut *lock(&self.random) {
            *seed = state;
        }
    }

    /// Delivers a message on the APIC bus.
    pub fn deliver(&self, message: &ApicMessage) {
        if let Some(sink) = &*read!(self.apic_sink)
            && sink.deliver(message)
        {
            return;
        }
        match message {
            ApicMessage::Eoi { .. } => {
                for ioapic in read!(self.ioapics).iter() {
                    ioapic.message(message);
                }
            }
            ApicMessage::Deliver { .. } => {
                let lapics: Vec<_> = read!(self.cpus).iter().filter_map(|c| c.lapic.clone()).collect();
                lapic::route(message, &lapics);
            }
        }
    }

    /// Delivers a message-signalled interrupt (SDM vol. 3A §10.11).
    pub fn msi(&self, address: u64, data: u32) {
        match lapic::msi(address, data) {
            Some(message) => self.deliver(&message),
            None => {
                let text = format!(
                    "an MSI of data {data:#x} to {address:#x} is none: the address is not 0xfeexxxxx or the mode is reserved"
                );
                self.log(LogKind::GuestError, "msi", &text);
            }
        }
    }

    fn map(&self, slot: &Slot, mapping: Mapping) {
        let banks = read!(self.banks);
        let Some(bank) = banks.get(&(slot.id(), mapping.bank)) else { return };
        let _t = hyaline_space::transaction();
        match mapping.base {
            Some(base) => {
                bank.set_offset(base);
                bank.set_enabled(true);
            }
            None => bank.set_enabled(false),
        }
    }
}

impl Source for Core {
    fn now(&self) -> Ns {
        self.clock.now()
    }
    fn wall_clock(&self) -> u64 {
        self.clock.wall()
    }
    fn random(&self) -> u64 {
        match &mut *lock(&self.random) {
            // SplitMix64 (Steele, Lea, Flood 2014).
            Some(seed) => {
                *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let z = (*seed ^ *seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                z ^ z >> 31
            }
            None => {
                let mut bytes = [0; 8];
                let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
                u64::from_ne_bytes(bytes)
            }
        }
    }
}

/// Who moves data: the device in hand.
fn device() -> Origin {
    Origin::dma(DeviceId(hyaline_device::current()))
}

impl Dma for Core {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let len = data.len();
        let done = self.memory.get().is_some_and(|m| m.dma_read(address, data, &device()).is_ok());
        self.moved(address, data, false, done);
        if done { Ok(()) } else { Err(DmaError { address, len, is_write: false }) }
    }
    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let done = self.memory.get().is_some_and(|m| m.dma_write(address, data, &device()).is_ok());
        self.moved(address, data, true, done);
        if done { Ok(()) } else { Err(DmaError { address, len: data.len(), is_write: true }) }
    }
}

impl Chassis for Core {
    fn dma(&self) -> &dyn Dma {
        self
    }

    fn effect(&self, slot: &Arc<Slot>, effect: Effect) {
        match effect {
            Effect::Line { .. } => {}
            Effect::Timer { timer, at } => {
                self.timers.set(slot, timer, at);
                if at.is_some_and(|at| at < self.slice_end.load(Ordering::Relaxed))
                    && let Some(port) = read!(self.cpus).get(self.running.load(Ordering::Relaxed))
                {
                    port.signals.raise(Signals::KICK);
                }
            }
            Effect::Send { channel, data } => {
                if matches!(slot.chip().name, "ns16550" | "debugcon") {
                    self.keep_console(&data);
                }
                let host = read!(self.channels).get(&(slot.id(), channel)).cloned();
                if let Some(host) = host {
                    host.send(&data);
                }
            }
            Effect::Ready { channel } => {
                let host = read!(self.channels).get(&(slot.id(), channel)).cloned();
                if let Some(host) = host {
                    host.ready();
                }
            }
            Effect::Msi { address, data } => self.msi(address, data),
            Effect::Apic(message) => self.deliver(&message),
            Effect::Cpu(signal) => {
                let cpu = read!(self.cpu_of_slot).get(&slot.id()).copied();
                if let Some(port) = cpu.and_then(|i| read!(self.cpus).get(i).cloned()) {
                    signal_cpu(&port, signal);
                }
            }
            Effect::Request(request) => match request {
                Request::Reset(who) => self.event(Event::Reset(who.to_string())),
                Request::PowerOff => self.event(Event::PowerOff),
                Request::Exit(code) => self.event(Event::Exit(code)),
                Request::GuestPanicked => self.event(Event::GuestPanicked),
                Request::GuestCrashLoaded => {
                    self.log(LogKind::Note, slot.name(), "the guest loaded its crash kernel")
                }
                Request::A20(on) => {
                    if let Some(f) = &*read!(self.a20) {
                        f(slot.id(), on);
                    }
                }
            },
            Effect::Map(mapping) => self.map(slot, mapping),
            Effect::Note(text) => self.log(LogKind::Note, slot.name(), &text),
            Effect::GuestError(text) => self.log(LogKind::GuestError, slot.name(), &text),
            Effect::Unimplemented(text) => self.log(LogKind::Unimplemented, slot.name(), &text),
            Effect::Shadow(shadow) => {
                if let Some(f) = &*read!(self.shadow) {
                    f(shadow);
                }
            }
            Effect::Smram(smram) => {
                if let Some(f) = &*read!(self.smram) {
                    f(smram);
                }
            }
        }
    }

    fn crashed(&self, slot: &Arc<Slot>, crash: Crash) {
        let text = format!("device `{}` ({}): {}", slot.name(), slot.chip().title, crash.message);
        lock(&self.crashes).push((slot.clone(), crash));
        self.event(Event::DeviceCrashed(text));
    }
}

fn signal_cpu(port: &CpuPort, signal: CpuSignal) {
    match signal {
        CpuSignal::Interrupt(true) => port.raise(Signals::INTERRUPT),
        CpuSignal::Interrupt(false) => port.signals.clear(Signals::INTERRUPT),
        CpuSignal::Nmi => port.raise(Signals::NMI),
        CpuSignal::Smi => port.raise(Signals::SMI),
        CpuSignal::Init => port.raise(Signals::INIT),
        CpuSignal::StartUp(vector) => {
            port.signals.raise_sipi(vector);
            port.wake();
        }
    }
}
