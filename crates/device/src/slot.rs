//! Where a device sits: its lock, its lines, and the carrying out of what it asks for.

use crate::device::{Cx, Device, Dma, Effect, Source};
use crate::hand::{self, Crash, Doing, Fault, Hand, Handled};
use crate::registers::{Chip, Register};
use crate::state::{StateError, Value};
use crate::{ApicMessage, Ns, Reset};
use hyaline_space::{Io, IoError, Limits, Origin};
use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The machine around the slots: clocks, memory, and whatever a device's effects reach besides its lines.
pub trait Chassis: Source + Send + Sync {
    /// Guest RAM for bus masters.
    fn dma(&self) -> &dyn Dma;
    /// Carries out one effect other than [`Effect::Line`]. No device lock is held.
    fn effect(&self, slot: &Arc<Slot>, effect: Effect);
    /// A device panicked while handling an access; it is fenced off from now on.
    fn crashed(&self, slot: &Arc<Slot>, crash: Crash);
}

/// A named line with any number of sources, high while any of them is (a wired OR).
pub struct Line {
    name: String,
    state: Mutex<LineState>,
}

#[derive(Default)]
struct LineState {
    sources: u32,
    levels: u64,
    sinks: Vec<Arc<dyn Sink>>,
}

/// What a line ends in.
pub trait Sink: Send + Sync {
    /// The line changed its level.
    fn set(&self, level: bool);
}

impl<F: Fn(bool) + Send + Sync> Sink for F {
    fn set(&self, level: bool) {
        self(level);
    }
}

impl Line {
    /// A low line that nothing drives.
    pub fn new(name: impl Into<String>) -> Arc<Line> {
        Arc::new(Line { name: name.into(), state: Mutex::default() })
    }
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
    fn lock(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Adds a source (at most 64) and gives its number.
    ///
    /// # Panics
    /// With a 65th source: a wiring mistake of the board, not reachable from a guest.
    pub fn source(&self) -> u32 {
        let mut s = self.lock();
        assert!(s.sources < 64, "line {} has more than 64 sources", self.name);
        s.sources += 1;
        s.sources - 1
    }
    /// Adds a sink.
    pub fn connect(&self, sink: Arc<dyn Sink>) {
        self.lock().sinks.push(sink);
    }
    /// One source takes a level. Sinks hear of it when the whole line changes. Wiring has no cycles, so holding the line's
    /// lock keeps changes in order.
    pub fn set(&self, source: u32, level: bool) {
        let mut s = self.lock();
        let was = s.levels != 0;
        s.levels = s.levels & !(1 << source) | u64::from(level) << source;
        let is = s.levels != 0;
        if was != is {
            s.sinks.iter().for_each(|sink| sink.set(is));
        }
    }
    /// The line's level.
    pub fn level(&self) -> bool {
        self.lock().levels != 0
    }
    /// Levels of all sources, for saving.
    pub fn levels(&self) -> u64 {
        self.lock().levels
    }
    /// Takes saved levels without an edge: sinks hold their own restored state.
    pub fn restore(&self, levels: u64) {
        self.lock().levels = levels;
    }
}

thread_local! {
    static REACHED: Cell<Option<&'static Register>> = const { Cell::new(None) };
}

/// The register that this thread's latest dispatched access reached, decoded in the state the device had at that time; of an access
/// that was split, the first. None if no device's bank was reached since [`forget_reached`]. An observer of an address space calls that
/// one before each access (from its `now`), and this one after it.
pub fn reached() -> Option<&'static Register> {
    REACHED.get()
}

/// See [`reached`].
pub fn forget_reached() {
    REACHED.set(None);
}

/// A device in its place in the machine.
pub struct Slot {
    name: String,
    id: u16,
    chip: &'static Chip,
    device: Mutex<Box<dyn Device>>,
    outputs: Vec<OnceLock<(Arc<Line>, u32)>>,
    chassis: Arc<dyn Chassis>,
    fenced: AtomicBool,
    queue: Mutex<Queue>,
    hand: Hand,
    fault: OnceLock<Fault>,
    struck: AtomicBool,
}

/// Effects that wait to be carried out.
#[derive(Default)]
struct Queue {
    effects: VecDeque<Effect>,
    /// A thread is carrying them out.
    busy: bool,
}

/// Sets the queue free again if carrying out an effect panics.
struct Idle<'a>(&'a Slot);

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.queue().busy = false;
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slot({} {})", self.id, self.name)
    }
}

impl Slot {
    /// Puts a device into a machine. `name` is its path (`serial0`, `00:03.0`), `id` its number in access records.
    pub fn new(
        id: u16,
        name: impl Into<String>,
        device: Box<dyn Device>,
        chassis: Arc<dyn Chassis>,
    ) -> Arc<Slot> {
        let chip = device.chip();
        let outputs = chip.outputs.iter().map(|_| OnceLock::new()).collect();
        Arc::new(Slot {
            name: name.into(),
            id,
            chip,
            device: Mutex::new(device),
            outputs,
            chassis,
            fenced: AtomicBool::new(false),
            queue: Mutex::default(),
            hand: Hand::default(),
            fault: OnceLock::new(),
            struck: AtomicBool::new(false),
        })
    }
    /// Its path.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Its number in access records.
    pub fn id(&self) -> u16 {
        self.id
    }
    /// Its chip.
    pub fn chip(&self) -> &'static Chip {
        self.chip
    }
    /// True once the device panicked.
    pub fn fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }
    /// Binds an output pin to a line. The first binding holds.
    pub fn bind(&self, pin: u32, line: &Arc<Line>) {
        if let Some(out) = self.outputs.get(pin as usize) {
            out.get_or_init(|| (line.clone(), line.source()));
        }
    }
    /// Binds the output pin of this name. False if the chip has no such pin.
    pub fn bind_named(&self, pin: &str, line: &Arc<Line>) -> bool {
        let pin = self.chip.outputs.iter().position(|n| *n == pin);
        pin.map(|p| self.bind(p as u32, line)).is_some()
    }
    /// An input pin as the end of a line.
    pub fn sink(self: &Arc<Self>, pin: u32) -> Arc<dyn Sink> {
        let slot = self.clone();
        Arc::new(move |level| {
            slot.with(|d, cx| d.input(pin, level, cx));
        })
    }
    /// A bank as the handler of an I/O region.
    pub fn bank(self: &Arc<Self>, bank: usize) -> Arc<dyn Io> {
        let limits = self.lock().limits(bank);
        Arc::new(BankIo { slot: self.clone(), bank, limits })
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Device>> {
        // A panic under the lock fences the device; its state is still good enough to look at.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the device on behalf of the machine, then carries out what it asked for. None if it is fenced or panicked.
    pub fn with<R>(self: &Arc<Self>, call: impl FnOnce(&mut dyn Device, &mut Cx<'_>) -> R) -> Option<R> {
        self.call(None, call)
    }

    /// As [`Slot::with`], with the access that causes it, if it is one.
    pub fn call<R>(
        self: &Arc<Self>,
        origin: Option<Origin>,
        call: impl FnOnce(&mut dyn Device, &mut Cx<'_>) -> R,
    ) -> Option<R> {
        self.enter(origin, None, call)
    }

    fn enter<R>(
        self: &Arc<Self>,
        origin: Option<Origin>,
        doing: Option<Doing>,
        call: impl FnOnce(&mut dyn Device, &mut Cx<'_>) -> R,
    ) -> Option<R> {
        if self.fenced() {
            return None;
        }
        let mut cx = Cx::new(&*self.chassis, self.chassis.dma(), origin);
        let result = {
            let mut device = self.lock();
            let before = hand::set_current(self.id);
            self.hand.enter(origin.as_ref(), doing.as_ref());
            let result = catch_unwind(AssertUnwindSafe(|| call(&mut **device, &mut cx)));
            self.hand.leave();
            hand::set_current(before);
            if result.is_ok() && !cx.effects.is_empty() {
                // Still under the device's lock: the queue has the order in which the device acted.
                self.queue().effects.extend(cx.into_effects());
            }
            result
        };
        match result {
            Ok(r) => {
                self.carry_out();
                Some(r)
            }
            Err(panic) => {
                self.fenced.store(true, Ordering::Relaxed);
                let text = panic
                    .downcast_ref::<&str>()
                    .map(|s| (*s).to_string())
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "no message".to_string());
                let (location, backtrace) = hand::take_panic().unwrap_or_default();
                let access = origin.zip(doing).map(|(origin, d)| Handled {
                    origin,
                    bank: d.bank,
                    offset: d.offset,
                    size: d.size,
                    is_write: d.is_write,
                    value: d.value,
                    register: hand::touched(),
                });
                let time = self.chassis.now();
                self.chassis.crashed(self, Crash { message: text, location, backtrace, access, time });
                None
            }
        }
    }

    /// Lets the next access to a register fail on purpose. The first call holds.
    pub fn inject(&self, fault: Fault) {
        self.fault.get_or_init(|| fault);
    }

    /// Panics or hangs if that was asked for: inside of the device's call, as if the device did.
    fn fault(&self, register: Option<&'static Register>) {
        if let Some(f) = self.fault.get()
            && register.is_some_and(|r| r.name.eq_ignore_ascii_case(&f.register))
            && !self.struck.swap(true, Ordering::Relaxed)
        {
            match f.hang {
                Some(time) => std::thread::sleep(time),
                None => panic!("a fault was injected at register {}", f.register),
            }
        }
    }

    /// What the device is doing now, if it is at work: a number that is another at each call, and the access. Takes no lock.
    pub fn busy(&self) -> Option<(u64, Option<Handled>)> {
        let (turn, access) = self.hand.busy()?;
        // Which register it is can depend on the device's state, which can't be asked now: the declaration's word.
        let register = access.and_then(|a| self.chip.banks.get(a.bank)?.at(a.offset, a.is_write));
        Some((turn, access.map(|a| Handled { register, ..a })))
    }

    /// As [`Slot::inspect`], unless the device is at work.
    pub fn try_inspect<R>(&self, look: impl FnOnce(&dyn Device) -> R) -> Option<R> {
        match self.device.try_lock() {
            Ok(device) => Some(look(&**device)),
            Err(std::sync::TryLockError::Poisoned(device)) => Some(look(&**device.into_inner())),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out what is queued, in order. Only one thread does so at a time, or a line that fell and rose could end low; what another
    /// thread (or the device itself, called by its own effect) adds meanwhile is carried out by the one at work.
    fn carry_out(self: &Arc<Self>) {
        {
            let mut queue = self.queue();
            if queue.busy || queue.effects.is_empty() {
                return;
            }
            queue.busy = true;
        }
        let idle = Idle(self);
        loop {
            let effect = {
                let mut queue = self.queue();
                let Some(effect) = queue.effects.pop_front() else {
                    queue.busy = false;
                    std::mem::forget(idle);
                    return;
                };
                effect
            };
            match effect {
                Effect::Line { pin, level } => {
                    if let Some((line, source)) = self.outputs.get(pin as usize).and_then(OnceLock::get) {
                        line.set(*source, level);
                    }
                }
                other => self.chassis.effect(self, other),
            }
        }
    }

    /// Looks at the device without a context: for inspectors. Works on a fenced device too.
    pub fn inspect<R>(&self, look: impl FnOnce(&dyn Device) -> R) -> R {
        look(&**self.lock())
    }
    /// A timer has come due.
    pub fn timer(self: &Arc<Self>, timer: u32) {
        self.with(|d, cx| d.timer(timer, cx));
    }
    /// Reset.
    pub fn reset(self: &Arc<Self>, kind: Reset) {
        self.with(|d, cx| d.reset(kind, cx));
    }
    /// Acknowledge, for interrupt controllers.
    pub fn acknowledge(self: &Arc<Self>) -> Option<u8> {
        self.with(|d, cx| d.acknowledge(cx)).flatten()
    }
    /// A message on the APIC bus.
    pub fn message(self: &Arc<Self>, message: &ApicMessage) -> bool {
        self.with(|d, cx| d.message(message, cx)).unwrap_or(false)
    }
    /// Bytes from the host; gives how many were taken.
    pub fn receive(self: &Arc<Self>, channel: u32, data: &[u8]) -> usize {
        self.with(|d, cx| d.receive(channel, data, cx)).unwrap_or(0).min(data.len())
    }
    /// Saves the device's state.
    ///
    /// # Errors
    /// See [`Device::save`].
    pub fn save(&self) -> Result<Value, StateError> {
        self.lock().save()
    }
    /// Restores the device's state: timers are re-armed, lines are not touched.
    ///
    /// # Errors
    /// See [`Device::load`].
    pub fn load(self: &Arc<Self>, state: &Value) -> Result<(), StateError> {
        let mut cx = Cx::new(&*self.chassis, self.chassis.dma(), None);
        self.lock().load(state, &mut cx)?;
        for effect in cx.into_effects() {
            let kept = matches!(
                effect,
                Effect::Timer { .. }
                    | Effect::Map(_)
                    | Effect::Shadow(_)
                    | Effect::Smram(_)
                    | Effect::Cpu(crate::CpuSignal::Interrupt(_))
            );
            if kept {
                self.chassis.effect(self, effect);
            }
        }
        Ok(())
    }
    /// Where an access to a bank would arrive now.
    pub fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        self.lock().register(bank, offset, is_write)
    }
    /// Virtual time, for callers that schedule on the device's behalf.
    pub fn now(&self) -> Ns {
        self.chassis.now()
    }
}

struct BankIo {
    slot: Arc<Slot>,
    bank: usize,
    limits: Limits,
}

impl Io for BankIo {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn read(&self, offset: u64, size: u8, who: &Origin) -> Result<u64, IoError> {
        let (first, mut register) = (REACHED.get(), None);
        let doing = Doing { bank: self.bank, offset, size, is_write: false, value: 0 };
        let result = self.slot.enter(Some(*who), Some(doing), |d, cx| {
            register = d.register(self.bank, offset, false);
            hand::touch(register);
            self.slot.fault(register);
            d.read(self.bank, offset, size, cx)
        });
        // Set last: handling may have made accesses of its own.
        REACHED.set(first.or(register));
        result.unwrap_or(Err(IoError::NotHere))
    }
    fn write(&self, offset: u64, size: u8, value: u64, who: &Origin) -> Result<(), IoError> {
        let (first, mut register) = (REACHED.get(), None);
        let doing = Doing { bank: self.bank, offset, size, is_write: true, value };
        let result = self.slot.enter(Some(*who), Some(doing), |d, cx| {
            register = d.register(self.bank, offset, true);
            hand::touch(register);
            self.slot.fault(register);
            d.write(self.bank, offset, size, value, cx)
        });
        REACHED.set(first.or(register));
        result.unwrap_or(Err(IoError::NotHere))
    }
}
