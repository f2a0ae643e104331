//! A bench to put one device on: tests speak its ports and memory, let time pass, and look at its lines.

use crate::device::{ApicMessage, CpuSignal, Cx, Device, Dma, DmaError, Effect, Ns, Request, Reset, Source};
use crate::registers::Register;
use hyaline_space::{ExitKind, IoError, Origin};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// One device with a virtual clock, a piece of memory, and a record of all that it did.
pub struct Bench<D: Device> {
    /// The device.
    pub device: D,
    world: World,
    levels: BTreeMap<u32, bool>,
    rises: BTreeMap<u32, u32>,
    timers: BTreeMap<u32, Ns>,
    sent: BTreeMap<u32, Vec<u8>>,
    frames: BTreeMap<u32, Vec<Vec<u8>>>,
    /// Effects of the last call, in order.
    pub last: Vec<Effect>,
    /// Everything asked of the machine so far.
    pub requests: Vec<Request>,
    /// APIC bus messages so far.
    pub messages: Vec<ApicMessage>,
    /// Processor signals so far.
    pub signals: Vec<CpuSignal>,
    /// Message-signalled interrupts so far: address and data.
    pub msis: Vec<(u64, u32)>,
    /// Bank bases as last mapped.
    pub maps: BTreeMap<usize, Option<u64>>,
    /// Guest errors and unimplemented features reported so far.
    pub complaints: Vec<String>,
}

struct World {
    now: Cell<Ns>,
    wall: Cell<u64>,
    seed: Cell<u64>,
    memory: RefCell<Vec<u8>>,
}

impl Source for World {
    fn now(&self) -> Ns {
        self.now.get()
    }
    fn wall_clock(&self) -> u64 {
        self.wall.get() + self.now.get()
    }
    fn random(&self) -> u64 {
        // Steele & Vigna's SplitMix64 step: any fixed sequence does.
        self.seed.set(self.seed.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        let z = self.seed.get();
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ z >> 31
    }
}

impl Dma for World {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let memory = self.memory.borrow();
        let range = usize::try_from(address).ok().and_then(|a| memory.get(a..a.checked_add(data.len())?));
        match range {
            Some(bytes) => data.copy_from_slice(bytes),
            None => {
                data.fill(0xff);
                return Err(DmaError { address, len: data.len(), is_write: false });
            }
        }
        Ok(())
    }
    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let mut memory = self.memory.borrow_mut();
        let range = usize::try_from(address).ok().and_then(|a| memory.get_mut(a..a.checked_add(data.len())?));
        range.map(|bytes| bytes.copy_from_slice(data)).ok_or(DmaError {
            address,
            len: data.len(),
            is_write: true,
        })
    }
}

impl<D: Device> Bench<D> {
    /// Puts a device on the bench and resets it. The clock stands at zero, the wall clock at 2026-01-01 00:00:00 UTC, memory has
    /// 64 KiB of zeros at address 0.
    pub fn new(device: D) -> Bench<D> {
        let world = World {
            now: Cell::new(0),
            wall: Cell::new(1_767_225_600 * crate::SECOND),
            seed: Cell::new(1),
            memory: RefCell::new(vec![0; 0x1_0000]),
        };
        let mut bench = Bench {
            device,
            world,
            levels: BTreeMap::new(),
            rises: BTreeMap::new(),
            timers: BTreeMap::new(),
            sent: BTreeMap::new(),
            frames: BTreeMap::new(),
            last: Vec::new(),
            requests: Vec::new(),
            messages: Vec::new(),
            signals: Vec::new(),
            msis: Vec::new(),
            maps: BTreeMap::new(),
            complaints: Vec::new(),
        };
        bench.call(|d, cx| d.reset(Reset::Power, cx));
        bench
    }

    /// Calls the device and takes note of its effects.
    pub fn call<R>(&mut self, f: impl FnOnce(&mut D, &mut Cx<'_>) -> R) -> R {
        let origin = Origin::vcpu(0, ExitKind::PioOut, 0);
        let mut cx = Cx::new(&self.world, &self.world, Some(origin));
        let r = f(&mut self.device, &mut cx);
        let effects = cx.into_effects();
        self.note(effects);
        r
    }

    fn note(&mut self, effects: Vec<Effect>) {
        for effect in &effects {
            match effect {
                Effect::Line { pin, level } => {
                    if self.levels.insert(*pin, *level) != Some(true) && *level {
                        *self.rises.entry(*pin).or_default() += 1;
                    }
                }
                Effect::Timer { timer, at: Some(at) } => {
                    self.timers.insert(*timer, *at);
                }
                Effect::Timer { timer, at: None } => {
                    self.timers.remove(timer);
                }
                Effect::Send { channel, data } => {
                    self.sent.entry(*channel).or_default().extend(data);
                    self.frames.entry(*channel).or_default().push(data.clone());
                }
                Effect::Request(r) => self.requests.push(r.clone()),
                Effect::Apic(m) => self.messages.push(*m),
                Effect::Cpu(s) => self.signals.push(*s),
                Effect::Msi { address, data } => self.msis.push((*address, *data)),
                Effect::Map(m) => {
                    self.maps.insert(m.bank, m.base);
                }
                Effect::GuestError(t) | Effect::Unimplemented(t) => self.complaints.push(t.clone()),
                Effect::Note(_) | Effect::Ready { .. } | Effect::Shadow(_) | Effect::Smram(_) => {}
            }
        }
        self.last = effects;
    }

    /// Reads `size` bytes; an error reads as all ones, as on the bus.
    pub fn read(&mut self, bank: usize, offset: u64, size: u8) -> u64 {
        let ones = if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 };
        self.try_read(bank, offset, size).map_or(ones, |v| v & ones)
    }
    /// Reads and gives the typed result.
    ///
    /// # Errors
    /// The device's.
    pub fn try_read(&mut self, bank: usize, offset: u64, size: u8) -> Result<u64, IoError> {
        self.call(|d, cx| d.read(bank, offset, size, cx))
    }
    /// Writes; errors are dropped, as on the bus.
    pub fn write(&mut self, bank: usize, offset: u64, size: u8, value: u64) {
        let _ = self.try_write(bank, offset, size, value);
    }
    /// Writes and gives the typed result.
    ///
    /// # Errors
    /// The device's.
    pub fn try_write(&mut self, bank: usize, offset: u64, size: u8, value: u64) -> Result<(), IoError> {
        self.call(|d, cx| d.write(bank, offset, size, value, cx))
    }
    /// Reads a byte of bank 0.
    pub fn in8(&mut self, offset: u64) -> u8 {
        self.read(0, offset, 1) as u8
    }
    /// Writes a byte of bank 0.
    pub fn out8(&mut self, offset: u64, value: u8) {
        self.write(0, offset, 1, u64::from(value));
    }
    /// What an inspector sees of a register.
    pub fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        self.device.peek(bank, register)
    }
    /// Lets `ns` nanoseconds pass; timers that come due run at their times.
    ///
    /// # Panics
    /// When a timer re-arms itself without time passing 100,000 times: unbounded work.
    pub fn run(&mut self, ns: Ns) {
        let end = self.world.now.get() + ns;
        let mut fired = 0;
        while let Some((&timer, &at)) =
            self.timers.iter().filter(|(_, at)| **at <= end).min_by_key(|(_, at)| **at)
        {
            self.timers.remove(&timer);
            if at > self.world.now.get() {
                self.world.now.set(at);
                fired = 0;
            }
            fired += 1;
            assert!(fired < 100_000, "timer {timer} re-arms itself without time passing");
            self.call(|d, cx| d.timer(timer, cx));
        }
        self.world.now.set(end);
    }
    /// Lets `ns` nanoseconds pass without calling timers that come due, as on a host that is late.
    pub fn skip(&mut self, ns: Ns) {
        self.world.now.set(self.world.now.get() + ns);
    }
    /// Virtual time.
    pub fn now(&self) -> Ns {
        self.world.now.get()
    }
    /// Sets the wall clock: seconds since the Unix epoch at virtual time zero.
    pub fn set_wall_clock(&mut self, seconds: u64) {
        self.world.wall.set(seconds * crate::SECOND);
    }
    /// When the next timer comes due.
    pub fn next_timer(&self) -> Option<Ns> {
        self.timers.values().min().copied()
    }
    /// Level of an output line (low if never driven).
    pub fn level(&self, pin: u32) -> bool {
        self.levels.get(&pin).copied().unwrap_or(false)
    }
    /// How often a line rose since the last call of this.
    pub fn rises(&mut self, pin: u32) -> u32 {
        self.rises.remove(&pin).unwrap_or(0)
    }
    /// Drives an input line.
    pub fn input(&mut self, pin: u32, level: bool) {
        self.call(|d, cx| d.input(pin, level, cx));
    }
    /// Offers bytes from the host; gives how many were taken.
    pub fn receive(&mut self, channel: u32, data: &[u8]) -> usize {
        self.call(|d, cx| d.receive(channel, data, cx))
    }
    /// Takes all bytes sent on a channel.
    pub fn sent(&mut self, channel: u32) -> Vec<u8> {
        self.frames.remove(&channel);
        self.sent.remove(&channel).unwrap_or_default()
    }
    /// Takes all frames sent on a channel.
    pub fn frames(&mut self, channel: u32) -> Vec<Vec<u8>> {
        self.sent.remove(&channel);
        self.frames.remove(&channel).unwrap_or_default()
    }
    /// Writes the bench's memory.
    ///
    /// # Panics
    /// Outside its 64 KiB.
    pub fn poke(&mut self, address: usize, data: &[u8]) {
        self.world.memory.borrow_mut()[address..address + data.len()].copy_from_slice(data);
    }
    /// Reads the bench's memory.
    ///
    /// # Panics
    /// Outside its 64 KiB.
    pub fn memory(&self, address: usize, len: usize) -> Vec<u8> {
        self.world.memory.borrow()[address..address + len].to_vec()
    }
    /// All that can be seen of the device from outside: state, lines, timers. For comparing two benches.
    pub fn seen(&self) -> (crate::state::Value, BTreeMap<u32, bool>, BTreeMap<u32, Ns>) {
        (self.device.save().unwrap_or(crate::state::Value::Null), self.levels.clone(), self.timers.clone())
    }
    pub(crate) fn copy_world_to(&self, other: &mut Bench<D>) {
        other.world.now.set(self.world.now.get());
        other.world.wall.set(self.world.wall.get());
        other.world.seed.set(self.world.seed.get());
        other.world.memory.replace(self.world.memory.borrow().clone());
        other.levels = self.levels.clone();
        other.timers.clear();
    }
}
