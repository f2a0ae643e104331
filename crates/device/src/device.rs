//! The device trait and the context through which a device acts on the world.

use crate::registers::{Chip, Register};
use crate::state::{StateError, Value};
use hyaline_space::{IoError, Limits, Origin};
use std::fmt;

/// Virtual time in nanoseconds since the machine was switched on.
pub type Ns = u64;

/// Nanoseconds in a second.
pub const SECOND: Ns = 1_000_000_000;

/// Microseconds as [`Ns`].
pub const fn us(n: u64) -> Ns {
    n * 1_000
}

/// Milliseconds as [`Ns`].
pub const fn ms(n: u64) -> Ns {
    n * 1_000_000
}

/// How the machine is being reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Power was switched on: everything takes its first value.
    Power,
    /// The reset line was pulsed: what survives by the manual (CMOS, latched reset causes) stays.
    System,
}

/// A chip of the machine. All its effects on the world go through [`Cx`].
///
/// Calls never overlap: the device's slot holds a lock. Effects are queued and carried out after the lock was dropped, so
/// a device can't be re-entered by what it causes.
pub trait Device: Send {
    /// The chip's head and registers.
    fn chip(&self) -> &'static Chip;

    /// A read of 1, 2, 4 or 8 bytes at `offset` of bank `bank` (the size was adjusted to the bank's limits).
    ///
    /// # Errors
    /// `NotHere` where nothing answers (the dispatcher gives all ones), `BadSize`, `WriteOnly` …
    fn read(&mut self, bank: usize, offset: u64, size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError>;

    /// A write; see [`Device::read`].
    ///
    /// # Errors
    /// As for reads; `ReadOnly` for what can't be written. The write then had no effect.
    fn write(
        &mut self,
        bank: usize,
        offset: u64,
        size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError>;

    /// Access sizes that bank `bank` accepts and implements.
    fn limits(&self, _bank: usize) -> Limits {
        Limits::default()
    }

    /// Which register an access reaches in the present state. Override where latches or index registers decide.
    fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        self.chip().banks.get(bank)?.at(offset, is_write)
    }

    /// The present value of a register, without side effects: what an inspector shows. None where the model keeps none.
    fn peek(&self, bank: usize, register: &Register) -> Option<u64>;

    /// A timer set with [`Cx::at`] has come due.
    fn timer(&mut self, _timer: u32, _cx: &mut Cx<'_>) {}

    /// An input line changed its level.
    fn input(&mut self, _pin: u32, _level: bool, _cx: &mut Cx<'_>) {}

    /// Bytes (or one frame, for a network device) arrive from the host's side of channel `channel`; gives how many were taken. The rest
    /// is offered again after [`Cx::ready`].
    fn receive(&mut self, _channel: u32, _data: &[u8], _cx: &mut Cx<'_>) -> usize {
        0
    }

    /// Interrupt controllers: the processor acknowledges; gives the vector.
    fn acknowledge(&mut self, _cx: &mut Cx<'_>) -> Option<u8> {
        None
    }

    /// Local APICs and I/O APICs: a message on the APIC bus. True if this device took it.
    fn message(&mut self, _message: &ApicMessage, _cx: &mut Cx<'_>) -> bool {
        false
    }

    /// Back to the state after `kind` of reset. Output lines are driven to their idle levels.
    fn reset(&mut self, kind: Reset, cx: &mut Cx<'_>);

    /// The device's state as plain data.
    ///
    /// # Errors
    /// What can't be encoded.
    fn save(&self) -> Result<Value, StateError>;

    /// Takes a saved state after checking it. On an error the device is unchanged. Lines are restored by the machine, timers by
    /// the device through `cx` (which accepts here [`Cx::at`], [`Cx::map`], [`Cx::shadow`], [`Cx::smram`] and a local APIC's
    /// [`CpuSignal::Interrupt`], and drops everything else).
    ///
    /// # Errors
    /// A state of another chip or version, or with values the chip can't hold.
    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError>;

    /// Downcasts for the machine's own wiring (PCI hosts, fw_cfg); devices that need it return `Some(self)`.
    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        None
    }
}

/// A message on the APIC bus: an inter-processor interrupt, an I/O APIC's delivery, an MSI, an EOI broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMessage {
    /// Deliver an interrupt (SDM vol. 3A §10.6, §10.11).
    Deliver {
        /// Destination: an APIC ID, or a logical mask.
        destination: u32,
        /// Logical destination mode.
        logical: bool,
        /// Delivery mode.
        mode: Delivery,
        /// Vector.
        vector: u8,
        /// Level-triggered: the EOI is to be broadcast.
        level: bool,
        /// APIC ID of the sending processor that is to be left out (shorthand "all excluding self").
        except: Option<u32>,
    },
    /// A level-triggered interrupt was ended: I/O APICs clear Remote IRR.
    Eoi {
        /// Vector.
        vector: u8,
    },
}

/// Delivery modes (SDM vol. 3A §10.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Delivery {
    /// To the destination(s).
    Fixed,
    /// To the processor with the lowest priority among the destinations.
    LowestPriority,
    /// System-management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// Initialize.
    Init,
    /// Start-up.
    StartUp,
    /// From an 8259-compatible controller.
    ExtInt,
}

/// What a local APIC tells its processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuSignal {
    /// An interrupt can (or can no longer) be acknowledged.
    Interrupt(bool),
    /// Non-maskable interrupt.
    Nmi,
    /// System-management interrupt.
    Smi,
    /// INIT.
    Init,
    /// Start-up IPI with its vector.
    StartUp(u8),
}

/// What a device asks of the machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Pulse the system's reset line; the text says who asked.
    Reset(&'static str),
    /// Only the processor is reset (port 92h, keyboard controller pulse).
    PowerOff,
    /// End the program with this exit code (isa-debug-exit).
    Exit(i32),
    /// The guest's kernel says that it panicked (pvpanic).
    GuestPanicked,
    /// The guest's kernel says that it loaded a crash kernel (pvpanic).
    GuestCrashLoaded,
    /// The A20 gate.
    A20(bool),
}

/// A bank's place, moved by the device itself (a BAR was written).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Bank number.
    pub bank: usize,
    /// Base address in the bank's space; None: not decoded.
    pub base: Option<u64>,
}

/// What a host bridge makes of a range below 1 MiB: whether RAM or what lies beneath it (ROM, the PCI bus) answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shadow {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Reads go to RAM.
    pub read: bool,
    /// Writes go to RAM.
    pub write: bool,
}

/// What a host bridge makes of the system-management RAM at 0xa0000-0xbffff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smram {
    /// It can be seen in system-management mode.
    pub enabled: bool,
    /// It can be seen outside system-management mode too.
    pub open: bool,
    /// In system-management mode only code fetches reach it; data goes to the bus.
    pub closed: bool,
}

/// One queued effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Output line `pin` takes a level.
    Line {
        /// Pin, as in the chip's `outputs`.
        pin: u32,
        /// Level.
        level: bool,
    },
    /// Timer `timer` is (re)armed for a time, or cancelled.
    Timer {
        /// The device's own number for it.
        timer: u32,
        /// When; None: cancelled.
        at: Option<Ns>,
    },
    /// Bytes (or one frame) for the host's side of a channel.
    Send {
        /// Channel.
        channel: u32,
        /// Bytes.
        data: Vec<u8>,
    },
    /// Channel can take more from the host.
    Ready {
        /// Channel.
        channel: u32,
    },
    /// A message-signalled interrupt: `data` is written to `address`.
    Msi {
        /// Address.
        address: u64,
        /// Data.
        data: u32,
    },
    /// A message on the APIC bus.
    Apic(ApicMessage),
    /// To the processor this device belongs to.
    Cpu(CpuSignal),
    /// To the machine.
    Request(Request),
    /// A bank moves.
    Map(Mapping),
    /// A range below 1 MiB is switched between RAM and what lies beneath (host bridges).
    Shadow(Shadow),
    /// System-management RAM is switched (host bridges).
    Smram(Smram),
    /// For the trace: something worth knowing that the bus can't see.
    Note(String),
    /// The guest did what the manual forbids or calls undefined.
    GuestError(String),
    /// The guest used something this model lacks.
    Unimplemented(String),
}

/// Guest memory as a bus master sees it: RAM only. An address that is not RAM is refused and reported.
pub trait Dma {
    /// Copies guest memory out.
    ///
    /// # Errors
    /// The range is not all RAM: nothing was copied, `data` is all ones.
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError>;
    /// Copies into guest memory.
    ///
    /// # Errors
    /// The range is not all writable RAM: nothing was written.
    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError>;
}

/// A bus master's access that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA {} of {len} bytes at {address:#x} does not hit RAM only; it was refused", if *.is_write { "write" } else { "read" })]
pub struct DmaError {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: usize,
    /// Direction.
    pub is_write: bool,
}

/// The machine's clocks and entropy, as a device may see them.
pub trait Source {
    /// Virtual time.
    fn now(&self) -> Ns;
    /// Wall-clock time of the guest: nanoseconds since 1970-01-01 00:00:00 UTC.
    fn wall_clock(&self) -> u64;
    /// Random bits.
    fn random(&self) -> u64;
}

/// The context a device is handed for the time of one call: everything that isn't its own state.
pub struct Cx<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) dma: &'a dyn Dma,
    pub(crate) origin: Option<Origin>,
    pub(crate) effects: Vec<Effect>,
}

impl<'a> Cx<'a> {
    /// A context with nothing queued.
    pub fn new(source: &'a dyn Source, dma: &'a dyn Dma, origin: Option<Origin>) -> Cx<'a> {
        Cx { source, dma, origin, effects: Vec::new() }
    }
    /// Virtual time now.
    pub fn now(&self) -> Ns {
        self.source.now()
    }
    /// Guest's wall clock: nanoseconds since the Unix epoch.
    pub fn wall_clock(&self) -> u64 {
        self.source.wall_clock()
    }
    /// Random bits; recorded by deterministic machines.
    pub fn random(&self) -> u64 {
        self.source.random()
    }
    /// Who made the access in hand; None when a timer, a line or the machine is the cause.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }
    /// An output line by its pin.
    pub fn line(&mut self, pin: u32) -> LineOut<'_, 'a> {
        LineOut { cx: self, pin }
    }
    /// Arms `timer` for virtual time `at` (at once if that has passed); replaces an earlier setting.
    pub fn at(&mut self, timer: u32, at: Ns) {
        self.effects.push(Effect::Timer { timer, at: Some(at) });
    }
    /// Disarms `timer`.
    pub fn cancel(&mut self, timer: u32) {
        self.effects.push(Effect::Timer { timer, at: None });
    }
    /// Sends bytes to the host's side of a channel. Consecutive sends of one call on a byte channel are put together by the host side.
    pub fn send(&mut self, channel: u32, data: &[u8]) {
        self.effects.push(Effect::Send { channel, data: data.to_vec() });
    }
    /// Says that [`Device::receive`] would take more on this channel.
    pub fn ready(&mut self, channel: u32) {
        self.effects.push(Effect::Ready { channel });
    }
    /// Sends a message-signalled interrupt.
    pub fn msi(&mut self, address: u64, data: u32) {
        self.effects.push(Effect::Msi { address, data });
    }
    /// Sends a message on the APIC bus.
    pub fn apic(&mut self, message: ApicMessage) {
        self.effects.push(Effect::Apic(message));
    }
    /// Signals the processor this device belongs to (local APICs only).
    pub fn cpu(&mut self, signal: CpuSignal) {
        self.effects.push(Effect::Cpu(signal));
    }
    /// Asks something of the machine.
    pub fn request(&mut self, request: Request) {
        self.effects.push(Effect::Request(request));
    }
    /// Moves a bank (a BAR was written), or switches it off with `None`.
    pub fn map(&mut self, bank: usize, base: Option<u64>) {
        self.effects.push(Effect::Map(Mapping { bank, base }));
    }
    /// Switches a range between RAM and what lies beneath it (host bridges).
    pub fn shadow(&mut self, shadow: Shadow) {
        self.effects.push(Effect::Shadow(shadow));
    }
    /// Switches system-management RAM (host bridges).
    pub fn smram(&mut self, smram: Smram) {
        self.effects.push(Effect::Smram(smram));
    }
    /// For the trace: something the bus can't see.
    pub fn note(&mut self, text: impl fmt::Display) {
        self.effects.push(Effect::Note(text.to_string()));
    }
    /// The guest did what the manual forbids or calls undefined.
    pub fn guest_error(&mut self, text: impl fmt::Display) {
        self.effects.push(Effect::GuestError(text.to_string()));
    }
    /// The guest used something this model lacks.
    pub fn unimplemented(&mut self, text: impl fmt::Display) {
        self.effects.push(Effect::Unimplemented(text.to_string()));
    }
    /// Reads guest RAM as a bus master.
    ///
    /// # Errors
    /// See [`Dma::read`]; the refusal was reported as a guest error.
    pub fn dma_read(&mut self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let result = self.dma.read(address, data);
        self.refused(result)
    }
    /// Writes guest RAM as a bus master.
    ///
    /// # Errors
    /// See [`Dma::write`]; the refusal was reported as a guest error.
    pub fn dma_write(&mut self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let result = self.dma.write(address, data);
        self.refused(result)
    }
    fn refused(&mut self, result: Result<(), DmaError>) -> Result<(), DmaError> {
        if let Err(e) = result {
            self.guest_error(e);
        }
        result
    }
    /// Takes what was queued.
    pub fn into_effects(self) -> Vec<Effect> {
        self.effects
    }
}

/// An output line of the device in hand.
pub struct LineOut<'c, 'a> {
    cx: &'c mut Cx<'a>,
    pin: u32,
}

impl LineOut<'_, '_> {
    /// Drives the line.
    pub fn set(self, level: bool) {
        self.cx.effects.push(Effect::Line { pin: self.pin, level });
    }
    /// High, then low: an edge.
    pub fn pulse(self) {
        for level in [true, false] {
            self.cx.effects.push(Effect::Line { pin: self.pin, level });
        }
    }
}
