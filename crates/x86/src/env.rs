//! What a processor needs from the machine around it.
//!
//! Memory and ports go through [`AddressSpace`], the one path of every access. The rest (interrupt
//! acknowledge, local APIC registers, time) is behind [`Env`], so that the processor knows no board and no chip.

use crate::state::{CpuState, Injected};
use hyaline_ram::RamBlock;
use hyaline_space::AddressSpace;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Requests to one processor, raised by any thread, seen by the processor at its next exit test.
#[derive(Debug, Default)]
pub struct Signals {
    word: AtomicU32,
    /// It executes instructions, or may do so before it looks at the word.
    inside: AtomicBool,
    /// Pages that it is asked not to write to directly any more: block and offset.
    pages: Mutex<Vec<(Arc<RamBlock>, u64)>>,
}

impl Signals {
    /// A maskable interrupt is deliverable as far as the interrupt controllers are concerned.
    pub const INTERRUPT: u32 = 1 << 0;
    /// A non-maskable interrupt was raised (latched into the state when taken up).
    pub const NMI: u32 = 1 << 1;
    /// An INIT was received.
    pub const INIT: u32 = 1 << 2;
    /// A start-up IPI was received; its vector is in bits 24-31.
    pub const SIPI: u32 = 1 << 3;
    /// A system-management interrupt was raised.
    pub const SMI: u32 = 1 << 4;
    /// Leave [`run`](crate) as soon as possible: the machine wants the processor's thread.
    pub const KICK: u32 = 1 << 5;
    /// The memory map changed: cached translations of physical addresses are void.
    pub const REMAP: u32 = 1 << 6;
    /// Pages have become code: [`Signals::take_pages`] has them.
    pub const CODE: u32 = 1 << 7;
    /// Another processor wants all memory to itself for a moment.
    pub const EXCLUSIVE: u32 = 1 << 8;

    /// What guest and devices have asked for, as opposed to what the program wants of the processor's thread: the part that a saved state has.
    pub const GUEST: u32 = 0xff00_0000 | Self::INTERRUPT | Self::NMI | Self::INIT | Self::SIPI | Self::SMI;

    /// Raises the given bits.
    pub fn raise(&self, bits: u32) {
        self.word.fetch_or(bits, Ordering::SeqCst);
    }
    /// Raises SIPI with its vector; an earlier one that was not yet taken up wins (SDM vol. 3A §8.4.3).
    pub fn raise_sipi(&self, vector: u8) {
        let _ = self.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |v| {
            (v & Self::SIPI == 0).then_some(v & 0x00ff_ffff | Self::SIPI | u32::from(vector) << 24)
        });
    }
    /// Clears the given bits.
    pub fn clear(&self, bits: u32) {
        self.word.fetch_and(!bits, Ordering::SeqCst);
    }
    /// All bits raised now.
    pub fn pending(&self) -> u32 {
        self.word.load(Ordering::Relaxed)
    }
    /// Takes the pending SIPI's vector, if one waits.
    pub fn take_sipi(&self) -> Option<u8> {
        let old = self.word.fetch_and(0x00ff_ffff & !Self::SIPI, Ordering::SeqCst);
        (old & Self::SIPI != 0).then_some((old >> 24) as u8)
    }
    /// It is going to execute instructions: from here on nobody may rely on its looking at the word first. What was raised before is
    /// seen by a look after this.
    pub fn enter(&self) {
        self.inside.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
    /// It does not execute instructions any more before it calls [`Signals::enter`] and looks at the word.
    pub fn leave(&self) {
        self.inside.store(false, Ordering::SeqCst);
    }
    /// Between [`Signals::enter`] and [`Signals::leave`]? Asked after raising a bit, no means that the bit will be seen before the next instruction.
    pub fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }
    fn pages(&self) -> MutexGuard<'_, Vec<(Arc<RamBlock>, u64)>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Asks the processor not to write directly any more to the page at `offset` of `ram`.
    pub fn ask_for_page(&self, ram: &Arc<RamBlock>, offset: u64) {
        let mut pages = self.pages();
        if !pages.iter().any(|(r, o)| *o == offset && Arc::ptr_eq(r, ram)) {
            pages.push((ram.clone(), offset));
        }
        drop(pages);
        self.raise(Signals::CODE);
    }
    /// The pages asked for since the last time.
    pub fn take_pages(&self) -> Vec<(Arc<RamBlock>, u64)> {
        std::mem::take(&mut *self.pages())
    }
    /// The word itself, for generated code to test.
    pub fn word(&self) -> &AtomicU32 {
        &self.word
    }
}

/// The processors of a machine, as they see each other.
#[derive(Debug)]
pub struct Peers {
    /// Request words, by number.
    signals: Vec<Arc<Signals>>,
    /// Held by who has all memory to itself.
    pub(crate) exclusive: Mutex<()>,
}

impl Peers {
    /// Processors with these request words, by number.
    pub fn new(signals: Vec<Arc<Signals>>) -> Arc<Peers> {
        Arc::new(Peers { signals, exclusive: Mutex::new(()) })
    }
    /// Are there several?
    pub fn several(&self) -> bool {
        self.signals.len() > 1
    }
    /// The request word of a processor.
    pub fn get(&self, index: u8) -> Option<&Arc<Signals>> {
        self.signals.get(usize::from(index))
    }
    /// The request words of all but one.
    pub fn others(&self, index: u8) -> impl Iterator<Item = &Arc<Signals>> {
        self.signals.iter().enumerate().filter(move |(n, _)| *n != usize::from(index)).map(|(_, s)| s)
    }
}

/// Told what a processor does, for logs.
pub trait CpuLog: Send + Sync {
    /// An interrupt or exception is about to be delivered; `state` is as before.
    fn event(&self, cpu: u8, state: &CpuState, event: &Injected);
    /// Code is decoded for the first time: its linear address, its mode in bits, its bytes.
    fn code(&self, cpu: u8, linear: u64, bits: u32, bytes: &[u8]);
    /// Whether [`CpuLog::translation`] is to be called.
    fn wants_translations(&self) -> bool {
        false
    }
    /// Code was translated: guest and host code in lines.
    fn translation(&self, _cpu: u8, _text: &str) {}
}

/// The machine as one processor sees it.
pub trait Env: Send {
    /// Guest-physical memory.
    fn memory(&self) -> &AddressSpace;
    /// The 64 Ki I/O ports.
    fn ports(&self) -> &AddressSpace;
    /// This processor's request word.
    fn signals(&self) -> &Arc<Signals>;
    /// Number of this processor, 0 for the bootstrap processor; also its initial APIC ID.
    fn index(&self) -> u8;
    /// All processors of the machine; None where there is but one.
    fn peers(&self) -> Option<&Arc<Peers>> {
        None
    }
    /// Acknowledges the highest-priority interrupt (local APIC first, then the 8259 pair through LINT0 or directly) and
    /// gives its vector; None when it went away.
    fn acknowledge(&mut self) -> Option<u8>;
    /// Time-stamp clock of the machine in TSC ticks. `icount` is the caller's instruction count, from which
    /// deterministic machines derive time.
    fn tsc(&mut self, icount: u64) -> u64;
    /// Reads a local APIC register in x2APIC numbering (MSR 0x800 + `register`). None: #GP.
    fn apic_read(&mut self, register: u32) -> Option<u64>;
    /// Writes a local APIC register in x2APIC numbering. False: #GP.
    fn apic_write(&mut self, register: u32, value: u64) -> bool;
    /// Task priority class, CR8.
    fn cr8(&mut self) -> u8;
    /// Sets CR8 (0-15).
    fn set_cr8(&mut self, value: u8);
    /// IA32_APIC_BASE was written: `value` was checked for reserved bits and legal transitions.
    fn set_apic_base(&mut self, value: u64);
    /// IA32_TSC_DEADLINE was written: 0 disarms, else the TSC value (this processor's) to fire at.
    fn set_tsc_deadline(&mut self, value: u64, tsc_offset: u64);
    /// The processor enters (true) or leaves system-management mode: [`Env::memory`] is from now on what it sees there.
    fn set_smm(&mut self, _on: bool) {}
    /// A fresh random number for RDRAND and RDSEED.
    fn random(&mut self) -> u64;
    /// Something the manual calls undefined or the model doesn't do: reported once per kind by the machine.
    fn guest_error(&mut self, rip: u64, message: &dyn std::fmt::Display);
    /// Called before every access that can reach a device, with the instruction count at that access: machines whose
    /// time comes from the count bring their clock there.
    fn at(&mut self, _icount: u64) {}
    /// FERR#: a waiting x87 instruction met a pending exception with CR0.NE clear (SDM vol. 1 §8.7.2). A PC raises interrupt
    /// line 13.
    fn fpu_error(&mut self) {}
}
