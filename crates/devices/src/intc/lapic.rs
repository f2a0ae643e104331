//! The local APIC of one processor, in xAPIC and x2APIC mode.
//!
//! Manual: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM), volume 3A, chapter "Advanced Programmable Interrupt
//! Controller (APIC)". Sections are cited with that chapter's number 10 of the editions up to 2022 (later editions: 11).
//!
//! Bank 0 is the memory-mapped page. Bank 1 holds the x2APIC registers by MSR number: offset `n` is MSR `0x800 + n`, each 8 bytes wide;
//! the machine reads and writes it for RDMSR and WRMSR, and an error means #GP.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{
    ApicMessage, Bank, Chip, CpuSignal, Cx, Delivery, Device, IoError, Limits, Ns, Place, Register, Reset,
    SECOND, Slot, us,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "lapic",
    title: "Local APIC",
    manual: "Intel SDM volume 3A, chapter 10 (APIC)",
    modelled: "xAPIC and x2APIC mode and the transitions between them; fixed, lowest-priority, SMI, NMI, INIT, start-up and ExtINT delivery; \
        physical, logical flat, logical cluster and x2APIC logical destinations; all shorthands; self IPI; TPR, PPR, CR8; EOI broadcast \
        and its suppression; the timer in one-shot, periodic and TSC-deadline mode; LINT0, LINT1, error and timer LVT entries; error status.",
    not_modelled: "thermal and performance-counter interrupts never come; no CMCI entry (the version register says so). Delivery status is \
        always idle: messages arrive at once. Arbitration priority (APR, RRD) reads as zero.",
    deviations: "The APIC ID can't be written in xAPIC mode, as on today's processors. Periodic timer interrupts come at most every 10 µs. On \
        request LINT0 is an open virtual wire after reset, as a PC's firmware leaves it on the bootstrap processor: then a guest \
        started without firmware gets the 8259A's interrupts.",
    banks: &[&MMIO, &X2APIC],
    outputs: &[],
    inputs: &["lint0", "lint1"],
};

hyaline_device::registers! {
    /// The memory-mapped registers, 16 bytes apart.
    pub bank MMIO "mmio" Memory 4096 {
        ID            0x020 4 ro = 0x0, "SDM 3A §10.4.6", "Local APIC ID" { ID 24..=31 };
        VERSION       0x030 4 ro = 0x0105_0014, "SDM 3A §10.4.8", "Version" { VERSION 0..=7; MAX_LVT 16..=23; EOI_SUPPRESSION 24 };
        TPR           0x080 4 rw = 0x0, "SDM 3A §10.8.3.1", "Task priority" { SUBCLASS 0..=3; CLASS 4..=7; RESERVED 8..=31 ro };
        APR           0x090 4 ro = 0x0, "SDM 3A §10.6.2.4", "Arbitration priority";
        PPR           0x0a0 4 ro = 0x0, "SDM 3A §10.8.3.1", "Processor priority" { SUBCLASS 0..=3; CLASS 4..=7 };
        EOI           0x0b0 4 wo = 0x0, "SDM 3A §10.8.5", "End of interrupt";
        RRD           0x0c0 4 ro = 0x0, "SDM 3A §10.4.1", "Remote read";
        LDR           0x0d0 4 rw = 0x0, "SDM 3A §10.6.2.2", "Logical destination" { RESERVED 0..=23 ro; LOGICAL_ID 24..=31 };
        DFR           0x0e0 4 rw = 0xffff_ffff, "SDM 3A §10.6.2.2", "Destination format"
            { RESERVED 0..=27 ro; MODEL 28..=31 {0 "cluster", 15 "flat"} };
        SVR           0x0f0 4 rw = 0xff, "SDM 3A §10.9", "Spurious interrupt vector, software enable"
            { VECTOR 0..=7; ENABLE 8; FOCUS_OFF 9; RESERVED 10..=11 ro; EOI_SUPPRESS 12; RESERVED2 13..=31 ro };
        ISR0 0x100 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 0-31";
        ISR1 0x110 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 32-63";
        ISR2 0x120 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 64-95";
        ISR3 0x130 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 96-127";
        ISR4 0x140 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 128-159";
        ISR5 0x150 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 160-191";
        ISR6 0x160 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 192-223";
        ISR7 0x170 4 ro = 0, "SDM 3A §10.8.4", "In service, vectors 224-255";
        TMR0 0x180 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 0-31";
        TMR1 0x190 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 32-63";
        TMR2 0x1a0 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 64-95";
        TMR3 0x1b0 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 96-127";
        TMR4 0x1c0 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 128-159";
        TMR5 0x1d0 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 160-191";
        TMR6 0x1e0 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 192-223";
        TMR7 0x1f0 4 ro = 0, "SDM 3A §10.8.4", "Level-triggered, vectors 224-255";
        IRR0 0x200 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 0-31";
        IRR1 0x210 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 32-63";
        IRR2 0x220 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 64-95";
        IRR3 0x230 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 96-127";
        IRR4 0x240 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 128-159";
        IRR5 0x250 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 160-191";
        IRR6 0x260 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 192-223";
        IRR7 0x270 4 ro = 0, "SDM 3A §10.8.4", "Requested, vectors 224-255";
        ESR           0x280 4 ro = 0x0, "SDM 3A §10.5.3", "Errors, as of the latest write to it"
            { REDIRECTABLE_IPI 4; SEND_ILLEGAL_VECTOR 5; RECEIVE_ILLEGAL_VECTOR 6; ILLEGAL_REGISTER 7 };
        ICR_LOW       0x300 4 rw = 0x0, "SDM 3A §10.6.1", "Interrupt command; writing it sends"
            { VECTOR 0..=7; MODE 8..=10 {0 "fixed", 1 "lowest priority", 2 "SMI", 4 "NMI", 5 "INIT", 6 "start-up"};
              LOGICAL 11; PENDING 12 ro; RESERVED 13 ro; ASSERT 14; LEVEL 15; RESERVED2 16..=17 ro;
              SHORTHAND 18..=19 {0 "none", 1 "self", 2 "all", 3 "all but self"}; RESERVED3 20..=31 ro };
        ICR_HIGH      0x310 4 rw = 0x0, "SDM 3A §10.6.1", "Interrupt command: destination" { RESERVED 0..=23 ro; DESTINATION 24..=31 };
        LVT_TIMER     0x320 4 rw = 0x1_0000, "SDM 3A §10.5.1", "Timer interrupt"
            { VECTOR 0..=7; RESERVED 8..=11 ro; PENDING 12 ro; RESERVED2 13..=15 ro; MASK 16;
              TIMER 17..=18 {0 "one-shot", 1 "periodic", 2 "TSC deadline"}; RESERVED3 19..=31 ro };
        LVT_THERMAL   0x330 4 rw = 0x1_0000, "SDM 3A §10.5.1", "Thermal interrupt"
            { VECTOR 0..=7; MODE 8..=10; RESERVED 11 ro; PENDING 12 ro; RESERVED2 13..=15 ro; MASK 16; RESERVED3 17..=31 ro };
        LVT_PMC       0x340 4 rw = 0x1_0000, "SDM 3A §10.5.1", "Performance counter interrupt"
            { VECTOR 0..=7; MODE 8..=10; RESERVED 11 ro; PENDING 12 ro; RESERVED2 13..=15 ro; MASK 16; RESERVED3 17..=31 ro };
        LVT_LINT0     0x350 4 rw = 0x1_0000, "SDM 3A §10.5.1", "Pin LINT0"
            { VECTOR 0..=7; MODE 8..=10 {0 "fixed", 2 "SMI", 4 "NMI", 5 "INIT", 7 "ExtINT"}; RESERVED 11 ro; PENDING 12 ro; ACTIVE_LOW 13;
              REMOTE_IRR 14 ro; LEVEL 15; MASK 16; RESERVED2 17..=31 ro };
        LVT_LINT1     0x360 4 rw = 0x1_0000, "SDM 3A §10.5.1", "Pin LINT1"
            { VECTOR 0..=7; MODE 8..=10 {0 "fixed", 2 "SMI", 4 "NMI", 5 "INIT", 7 "ExtINT"}; RESERVED 11 ro; PENDING 12 ro; ACTIVE_LOW 13;
              REMOTE_IRR 14 ro; LEVEL 15; MASK 16; RESERVED2 17..=31 ro };
        LVT_ERROR     0x370 4 rw = 0x1_0000, "SDM 3A §10.5.1", "Error interrupt"
            { VECTOR 0..=7; RESERVED 8..=11 ro; PENDING 12 ro; RESERVED2 13..=15 ro; MASK 16; RESERVED3 17..=31 ro };
        INITIAL_COUNT 0x380 4 rw = 0x0, "SDM 3A §10.5.4", "Timer: count from which it runs down";
        CURRENT_COUNT 0x390 4 ro = 0x0, "SDM 3A §10.5.4", "Timer: what is left";
        DIVIDE        0x3e0 4 rw = 0x0, "SDM 3A §10.5.4", "Timer: divider of its clock"
            { DIVIDE 0..=1; RESERVED 2 ro; DIVIDE_HIGH 3; RESERVED2 4..=31 ro };
    }
}

/// x2APIC's own register (MSR 0x83f).
pub const SELF_IPI: Register = Register {
    name: "SELF_IPI",
    offset: 0x3f,
    width: 8,
    kind: hyaline_device::Kind::Wo,
    reset: 0,
    section: "SDM 3A §10.12.11",
    doc: "Sends a fixed interrupt to itself",
    effect: false,
    when: "",
    fields: &[],
};

const X2_LEN: usize = MMIO.registers.len() - 4 + 1;

/// The x2APIC register space (§10.12.1.2): the memory-mapped registers 16 bytes apart become MSRs; DFR, APR and RRD are gone, ICR is one.
const fn x2_registers() -> [Register; X2_LEN] {
    let mut out = [SELF_IPI; X2_LEN];
    let (mut i, mut n) = (0, 0);
    while i < MMIO.registers.len() {
        let mut r = MMIO.registers[i];
        i += 1;
        if matches!(r.offset, 0x90 | 0xc0 | 0xe0 | 0x310) {
            continue;
        }
        r.offset >>= 4;
        r.width = 8;
        match r.offset {
            0x02 => r.fields = &[],
            0x0d => {
                r.kind = hyaline_device::Kind::Ro;
                r.fields = &[];
                r.reset = 1;
            }
            0x30 => {
                r.name = "ICR";
                r.fields = &[];
            }
            _ => {}
        }
        out[n] = r;
        n += 1;
    }
    out
}

/// The x2APIC registers; offsets are MSR numbers less 0x800.
pub static X2APIC: Bank =
    Bank { name: "x2apic", place: Place::Indexed, size: 0x40, registers: &x2_registers() };

/// IA32_APIC_BASE: this is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: globally enabled.
pub const BASE_ENABLE: u64 = 1 << 11;
/// Where the page is after reset.
pub const BASE_ADDRESS: u64 = 0xfee0_0000;
/// A physical destination that means every processor.
pub const BROADCAST: u32 = 0xffff_ffff;

/// The page can't be given to a guest more often than this: a shorter period would only load the host.
const LEAST_PERIOD: Ns = us(10);

const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const SVR_ENABLE: u32 = 1 << 8;
const SVR_SUPPRESS: u32 = 1 << 12;

// Positions in State::lvt.
const TIMER: usize = 0;
const LINT: [usize; 2] = [3, 4];
const ERROR: usize = 5;

// Error bits (§10.5.3).
const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ILLEGAL_REGISTER: u32 = 1 << 7;

/// What the board decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Initial APIC ID.
    pub id: u32,
    /// This is the bootstrap processor.
    pub bootstrap: bool,
    /// Ticks of the timer's clock in a second, before the divider.
    pub timer_hz: u64,
    /// Ticks of the TSC in a second, counted from virtual time 0: what TSC deadlines are measured in.
    pub tsc_hz: u64,
    /// LINT0 is an open virtual wire (ExtINT) after reset.
    pub wire_at_reset: bool,
}

impl Config {
    /// The usual one: timer clock of 1 GHz; the bootstrap processor (ID 0) has its virtual wire open.
    pub const fn new(id: u32, tsc_hz: u64) -> Config {
        Config { id, bootstrap: id == 0, timer_hz: SECOND, tsc_hz, wire_at_reset: id == 0 }
    }
}

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// APIC ID.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Task priority.
    pub tpr: u8,
    /// Logical destination (xAPIC).
    pub ldr: u32,
    /// Destination format.
    pub dfr: u32,
    /// Spurious interrupt vector and software enable.
    pub svr: u32,
    /// In-service bits.
    pub isr: [u32; 8],
    /// Trigger-mode bits.
    pub tmr: [u32; 8],
    /// Request bits.
    pub irr: [u32; 8],
    /// Error status as software reads it.
    pub esr: u32,
    /// Errors since the last write to ESR.
    pub errors: u32,
    /// Interrupt command; the destination is in the upper half.
    pub icr: u64,
    /// Local vector table: timer, thermal, performance counter, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    /// Timer: initial count.
    pub initial: u32,
    /// Timer: count at `loaded_at`.
    pub loaded: u32,
    /// Timer: when `loaded` was valid.
    pub loaded_at: Ns,
    /// Timer: divide configuration.
    pub divide: u32,
    /// TSC value at which the timer fires; 0: disarmed. Without the processor's TSC offset.
    pub tsc_deadline: u64,
    /// When the timer was set to come due.
    pub armed: Option<Ns>,
    /// Levels of LINT0 and LINT1.
    pub lint: [bool; 2],
    /// An ExtINT message waits for its acknowledge.
    pub ext_int: bool,
    /// The processor was told that an interrupt waits.
    pub intr: bool,
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    (0..8u8).rev().find_map(|i| {
        let w = bits[usize::from(i)];
        (w != 0).then(|| i * 32 + 31 - w.leading_zeros() as u8)
    })
}

fn bit(v: u8) -> (usize, u32) {
    (usize::from(v >> 5), 1 << (v & 31))
}

impl State {
    fn new(config: &Config) -> State {
        let mut s = State {
            id: config.id,
            base: BASE_ADDRESS | BASE_ENABLE | if config.bootstrap { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [MASKED; 6],
            initial: 0,
            loaded: 0,
            loaded_at: 0,
            divide: 0,
            tsc_deadline: 0,
            armed: None,
            lint: [false; 2],
            ext_int: false,
            intr: false,
        };
        if config.wire_at_reset {
            s.lvt[LINT[0]] = 0x700;
        }
        s
    }

    /// May a restored file hold this?
    ///
    /// # Errors
    /// Reserved bits are set, or an ID is not this processor's.
    pub fn check(&self, config: &Config) -> Result<(), StateError> {
        ensure(self.id == config.id, || {
            format!("local APIC: the saved state is of APIC ID {}, this is {}", self.id, config.id)
        })?;
        ensure(self.base & (BASE_EXTD | BASE_ENABLE) != BASE_EXTD && self.base & 0x2ff == 0, || {
            format!("local APIC: base {:#x} has an impossible mode", self.base)
        })?;
        ensure(
            self.lvt.iter().all(|l| l >> 19 == 0) && self.divide & !0xb == 0 && self.svr >> 13 == 0,
            || "local APIC: reserved bits are set".to_string(),
        )?;
        ensure(self.irr[0] & 0xffff == 0 && self.isr[0] & 0xffff == 0, || {
            "local APIC: a vector below 16 is requested or in service".to_string()
        })
    }

    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }
    fn x2apic(&self) -> bool {
        self.base & BASE_EXTD != 0
    }
    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    /// Processor priority (§10.8.3.1).
    fn ppr(&self) -> u8 {
        let serving = highest(&self.isr).unwrap_or(0);
        if self.tpr >> 4 >= serving >> 4 { self.tpr } else { serving & 0xf0 }
    }

    /// The vector that could be acknowledged now.
    fn deliverable(&self) -> Option<u8> {
        let v = highest(&self.irr).filter(|v| v >> 4 > self.ppr() >> 4)?;
        (self.enabled() && self.software_enabled()).then_some(v)
    }

    /// Does an interrupt of the 8259A wait? With the APIC switched off LINT0 is the processor's INTR pin (§10.4.3).
    fn external(&self) -> bool {
        if !self.enabled() {
            return self.lint[0];
        }
        let wire =
            LINT.iter().zip(self.lint).any(|(l, level)| level && self.lvt[*l] & (MASKED | 0x700) == 0x700);
        wire || self.ext_int
    }

    /// x2APIC's logical ID follows from the APIC ID (§10.12.10.2).
    fn x2_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    /// Is this processor among the destinations (§10.6.2, §10.12.10)?
    fn matches(&self, destination: u32, logical: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        if destination == BROADCAST {
            return true;
        }
        match (logical, self.x2apic()) {
            // Eight-bit senders (I/O APIC, MSI) mean everyone by 0xff. No processor has that ID.
            (false, _) => destination == self.id || destination == 0xff,
            (true, true) => {
                let own = self.x2_ldr();
                destination >> 16 == own >> 16 && destination & own & 0xffff != 0
            }
            (true, false) if destination > 0xff => false,
            (true, false) => {
                let own = self.ldr >> 24;
                if self.dfr >> 28 == 0xf {
                    destination & own != 0
                } else {
                    (destination >> 4 == own >> 4 || destination >> 4 == 0xf) && destination & own & 0xf != 0
                }
            }
        }
    }

    fn error(&mut self, which: u32) {
        self.errors |= which;
        let l = self.lvt[ERROR];
        if l & MASKED == 0 {
            if l & 0xf0 != 0 {
                self.request(l as u8, false);
            } else {
                self.errors |= RECEIVE_ILLEGAL_VECTOR;
            }
        }
    }

    /// Sets a request bit. The vector is at least 16.
    fn request(&mut self, vector: u8, level: bool) {
        let (i, b) = bit(vector);
        self.irr[i] |= b;
        self.tmr[i] = if level { self.tmr[i] | b } else { self.tmr[i] & !b };
    }

    /// A fixed interrupt arrives (§10.8.2).
    fn accept(&mut self, vector: u8, level: bool) {
        if !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.error(RECEIVE_ILLEGAL_VECTOR);
        } else {
            self.request(vector, level);
        }
    }

    /// Nanoseconds until `ticks` of the divided clock have passed since the timer was loaded, rounded up.
    fn time_of(&self, ticks: u128, hz: u64) -> Ns {
        let ns = (ticks * u128::from(self.divider()) * u128::from(SECOND)).div_ceil(u128::from(hz.max(1)));
        u64::try_from(ns).unwrap_or(u64::MAX).saturating_add(self.loaded_at)
    }

    /// The divider (§10.5.4): bits 0, 1 and 3 give 2, 4 … 128, and 1 for all ones.
    fn divider(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        if code == 7 { 1 } else { 2 << code }
    }

    fn mode(&self) -> u32 {
        self.lvt[TIMER] >> 17 & 3
    }

    /// Ticks since the timer was loaded.
    fn elapsed(&self, now: Ns, hz: u64) -> u128 {
        let ns = u128::from(now.saturating_sub(self.loaded_at));
        ns * u128::from(hz) / (u128::from(SECOND) * u128::from(self.divider()))
    }

    fn current(&self, now: Ns, hz: u64) -> u32 {
        if self.loaded == 0 || self.mode() == 2 {
            return 0;
        }
        let (e, n) = (self.elapsed(now, hz), u128::from(self.loaded));
        if e < n {
            (n - e) as u32
        } else if self.mode() == 1 && self.initial != 0 {
            let n0 = u128::from(self.initial);
            (n0 - (e - n) % n0) as u32
        } else {
            0
        }
    }

    /// When the timer next expires, after `now`.
    fn expiry(&self, now: Ns, config: &Config) -> Option<Ns> {
        match self.mode() {
            2 => {
                let ns = (u128::from(self.tsc_deadline) * u128::from(SECOND))
                    .div_ceil(u128::from(config.tsc_hz.max(1)));
                u64::try_from(ns).ok().filter(|_| self.tsc_deadline != 0)
            }
            mode if self.loaded != 0 => {
                let hz = config.timer_hz;
                let (e, n) = (self.elapsed(now, hz), u128::from(self.loaded));
                if e < n {
                    return Some(self.time_of(n, hz));
                }
                let n0 = u128::from(self.initial);
                (mode == 1 && n0 != 0).then(|| self.time_of(n + ((e - n) / n0 + 1) * n0, hz))
            }
            _ => None,
        }
    }

    /// Back to the state after reset, but for ID, base and pins (§10.4.7.1, §10.4.7.3).
    fn clear(&mut self, config: &Config) {
        *self = State { base: self.base, lint: self.lint, intr: self.intr, ..State::new(config) };
    }
}

/// The local APIC of one processor.
#[derive(Debug)]
pub struct Lapic {
    state: State,
    config: Config,
}

impl Lapic {
    /// A local APIC after power-on.
    pub fn new(config: Config) -> Lapic {
        Lapic { state: State::new(&config), config }
    }

    /// Its APIC ID.
    pub fn id(&self) -> u32 {
        self.state.id
    }
    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.state.base
    }
    /// Is it in x2APIC mode?
    pub fn x2apic(&self) -> bool {
        self.state.x2apic()
    }
    /// What the processor was last told by [`CpuSignal::Interrupt`].
    pub fn interrupt_pending(&self) -> bool {
        self.state.intr
    }

    /// IA32_APIC_BASE was written, with a value and a transition that the processor has found legal (§10.4.3, §10.4.4, §10.12.5). Bank 0 moves.
    pub fn set_apic_base(&mut self, value: u64, cx: &mut Cx<'_>) {
        let s = &mut self.state;
        let was = s.base;
        s.base = value & !0x2ff & !if value & BASE_ENABLE == 0 { BASE_EXTD } else { 0 } | was & BASE_BSP;
        if was & BASE_ENABLE != 0 && !s.enabled() {
            s.clear(&self.config);
        }
        if was & BASE_EXTD == 0 && s.x2apic() {
            s.icr &= 0xffff_ffff;
        }
        self.map(cx);
        self.settle(cx);
    }

    /// Task priority class: CR8 (§10.8.6).
    pub fn cr8(&self) -> u8 {
        self.state.tpr >> 4
    }
    /// CR8 was written (0 to 15).
    pub fn set_cr8(&mut self, value: u8, cx: &mut Cx<'_>) {
        self.state.tpr = value << 4;
        self.settle(cx);
    }

    /// IA32_TSC_DEADLINE was written (§10.5.4.1). `tsc` is in ticks since virtual time 0, the processor's TSC offset taken off; 0 disarms.
    /// Ignored unless the timer is in TSC-deadline mode.
    pub fn set_tsc_deadline(&mut self, tsc: u64, cx: &mut Cx<'_>) {
        self.catch_up(cx);
        if self.state.mode() == 2 {
            self.state.tsc_deadline = tsc;
            self.arm(cx, 0);
        }
    }
    /// The deadline that is armed, as given to [`Lapic::set_tsc_deadline`]; 0 once it fired: what RDMSR is to give.
    pub fn tsc_deadline(&self) -> u64 {
        self.state.tsc_deadline
    }

    /// An x2APIC register is read: MSR `0x800 + register`. None: #GP.
    pub fn x2_read(&mut self, register: u32, cx: &mut Cx<'_>) -> Option<u64> {
        Device::read(self, 1, u64::from(register), 8, cx).ok()
    }
    /// An x2APIC register is written. False: #GP.
    pub fn x2_write(&mut self, register: u32, value: u64, cx: &mut Cx<'_>) -> bool {
        Device::write(self, 1, u64::from(register), 8, value, cx).is_ok()
    }

    /// After [`Device::acknowledge`] gave None: true if the 8259A is to be asked for the vector instead. The request counts as taken then.
    pub fn acknowledge_external(&mut self, cx: &mut Cx<'_>) -> bool {
        let external = self.state.external();
        self.state.ext_int = false;
        self.settle(cx);
        external
    }

    /// For lowest-priority delivery: the processor priority, if this processor is among the destinations and would take the interrupt.
    pub fn priority_for(&self, message: &ApicMessage) -> Option<u8> {
        match message {
            ApicMessage::Deliver { destination, logical, except, .. } => {
                let s = &self.state;
                let here = s.matches(*destination, *logical) && *except != Some(s.id) && s.software_enabled();
                here.then(|| s.ppr())
            }
            ApicMessage::Eoi { .. } => None,
        }
    }

    /// What a PC's firmware does before it starts a system: software enable, LINT0 as the 8259A's virtual wire (bootstrap processor), LINT1 as
    /// NMI (Multiprocessor Specification 1.4 §3.6.2.2, "virtual wire mode").
    pub fn virtual_wire(&mut self, cx: &mut Cx<'_>) {
        let s = &mut self.state;
        s.svr = 0x1ff;
        s.lvt[LINT[0]] = if self.config.bootstrap { 0x8700 } else { MASKED };
        s.lvt[LINT[1]] = 0x8400;
        self.settle(cx);
    }

    /// The registers as an accelerator's own local APIC takes them: 32-bit words 16 bytes apart, as in the memory-mapped page (§10.4.1). In
    /// x2APIC mode too the ID is in bits 31-24.
    pub fn page(&self, now: Ns) -> Box<[u8; 1024]> {
        let s = &self.state;
        let mut page = Box::new([0; 1024]);
        let mut set =
            |register: usize, value: u32| page[register * 16..][..4].copy_from_slice(&value.to_le_bytes());
        set(0x02, s.id << 24);
        set(0x03, VERSION.reset as u32);
        set(0x08, u32::from(s.tpr));
        set(0x0d, s.ldr);
        set(0x0e, s.dfr);
        set(0x0f, s.svr);
        for i in 0..8 {
            set(0x10 + i, s.isr[i]);
            set(0x18 + i, s.tmr[i]);
            set(0x20 + i, s.irr[i]);
        }
        set(0x28, s.esr);
        set(0x30, s.icr as u32);
        set(0x31, (s.icr >> 32) as u32);
        for (i, l) in s.lvt.iter().enumerate() {
            set(0x32 + i, *l);
        }
        set(0x38, s.initial);
        set(0x39, s.current(now, self.config.timer_hz));
        set(0x3e, s.divide);
        page
    }

    /// Takes over from an accelerator's own local APIC: its page, IA32_APIC_BASE, and the armed TSC deadline as
    /// [`Lapic::set_tsc_deadline`] takes it.
    pub fn adopt(&mut self, page: &[u8; 1024], base: u64, tsc_deadline: u64, cx: &mut Cx<'_>) {
        let get = |register: usize| {
            let at = register * 16;
            u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
        };
        let mut s = State::new(&self.config);
        s.base = base & !0x2ff;
        s.tpr = get(0x08) as u8;
        s.ldr = get(0x0d) & 0xff00_0000;
        s.dfr = get(0x0e) | 0x0fff_ffff;
        s.svr = get(0x0f) & 0x11ff;
        for i in 0..8 {
            s.isr[i] = get(0x10 + i);
            s.tmr[i] = get(0x18 + i);
            s.irr[i] = get(0x20 + i);
        }
        (s.isr[0], s.irr[0]) = (s.isr[0] & !0xffff, s.irr[0] & !0xffff);
        s.esr = get(0x28) & 0xff;
        s.icr = u64::from(get(0x31)) << 32 | u64::from(get(0x30));
        for i in 0..6 {
            s.lvt[i] = get(0x32 + i) & 0x7_ffff;
        }
        s.initial = get(0x38);
        s.loaded = get(0x39);
        s.loaded_at = cx.now();
        s.divide = get(0x3e) & 0xb;
        if s.mode() == 2 {
            s.tsc_deadline = tsc_deadline;
        }
        self.state = s;
        self.arm(cx, 0);
        self.settle(cx);
    }

    fn map(&self, cx: &mut Cx<'_>) {
        let s = &self.state;
        cx.map(0, (s.enabled() && !s.x2apic()).then_some(s.base & !0xfff));
    }

    /// Tells the processor when "an interrupt waits" changes.
    fn settle(&mut self, cx: &mut Cx<'_>) {
        let waits = self.state.deliverable().is_some() || self.state.external();
        if waits != self.state.intr {
            self.state.intr = waits;
            cx.cpu(CpuSignal::Interrupt(waits));
        }
    }

    /// Sets the timer for its next expiry, not before `earliest`. A masked timer raises nothing, so it needs none.
    fn arm(&mut self, cx: &mut Cx<'_>, earliest: Ns) {
        let s = &mut self.state;
        // A deadline is disarmed by passing even when masked (§10.5.4.1).
        let wanted = s.lvt[TIMER] & MASKED == 0 || s.mode() == 2;
        let at = s.expiry(cx.now(), &self.config).filter(|_| wanted).map(|t| t.max(earliest));
        if s.armed != at {
            s.armed = at;
            match at {
                Some(t) => cx.at(0, t),
                None => cx.cancel(0),
            }
        }
    }

    fn end_of_interrupt(&mut self, cx: &mut Cx<'_>) {
        let s = &mut self.state;
        let Some(v) = highest(&s.isr) else { return };
        let (i, b) = bit(v);
        s.isr[i] &= !b;
        if s.tmr[i] & b == 0 {
            return;
        }
        for (n, entry) in LINT.into_iter().enumerate() {
            let l = &mut self.state.lvt[entry];
            if *l & REMOTE_IRR != 0 && *l as u8 == v {
                *l &= !REMOTE_IRR;
                self.pin(n);
            }
        }
        if self.state.svr & SVR_SUPPRESS == 0 {
            cx.apic(ApicMessage::Eoi { vector: v });
        }
    }

    /// A level-triggered fixed LINT pin that is up and not yet being served requests its interrupt.
    fn pin(&mut self, n: usize) {
        let s = &mut self.state;
        let l = s.lvt[LINT[n]];
        if l & (MASKED | 0x700 | LEVEL | REMOTE_IRR) == LEVEL && s.lint[n] && s.software_enabled() {
            s.lvt[LINT[n]] |= REMOTE_IRR;
            s.accept(l as u8, true);
        }
    }

    /// A pin rose: what is sensitive to an edge (§10.5.1; NMI, SMI and INIT always are).
    fn pin_rose(&mut self, n: usize, cx: &mut Cx<'_>) {
        let l = self.state.lvt[LINT[n]];
        if l & MASKED != 0 || !self.state.enabled() {
            // With the APIC off LINT1 is the processor's NMI pin (§10.4.3).
            if !self.state.enabled() && n == 1 {
                cx.cpu(CpuSignal::Nmi);
            }
            return;
        }
        match l >> 8 & 7 {
            0 if l & LEVEL == 0 => self.state.accept(l as u8, false),
            0 => self.pin(n),
            2 => cx.cpu(CpuSignal::Smi),
            4 => cx.cpu(CpuSignal::Nmi),
            5 => self.init(cx),
            _ => {}
        }
    }

    /// INIT arrived: the APIC takes its reset state but for ID and base (§10.4.7.3), the processor is told.
    fn init(&mut self, cx: &mut Cx<'_>) {
        self.state.clear(&self.config);
        self.arm_none(cx);
        cx.cpu(CpuSignal::Init);
    }

    /// A timer that has come due, of which the machine has not yet told: it comes before what the guest writes now.
    fn catch_up(&mut self, cx: &mut Cx<'_>) {
        if self.state.armed.is_some_and(|t| t <= cx.now()) {
            cx.cancel(0);
            self.timer(0, cx);
        }
    }

    fn arm_none(&mut self, cx: &mut Cx<'_>) {
        self.state.armed = None;
        cx.cancel(0);
    }

    /// The interrupt command register was written (§10.6.1).
    fn send(&mut self, cx: &mut Cx<'_>) {
        let icr = self.state.icr;
        let (low, vector) = (icr as u32, icr as u8);
        let level = low & LEVEL != 0;
        let mode = match low >> 8 & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            // The level de-assert form only synchronized arbitration IDs and does nothing on today's processors.
            5 if level && low & 1 << 14 == 0 => return,
            5 => Delivery::Init,
            6 => Delivery::StartUp,
            n => {
                cx.guest_error(format_args!(
                    "local APIC {}: ICR with the reserved delivery mode {n}",
                    self.state.id
                ));
                return;
            }
        };
        if matches!(mode, Delivery::Fixed | Delivery::LowestPriority) && vector < 16 {
            self.state.error(SEND_ILLEGAL_VECTOR);
            return;
        }
        let shorthand = low >> 18 & 3;
        let (destination, logical, except) = match shorthand {
            0 => {
                let d = (icr >> 32) as u32;
                let d = if self.state.x2apic() { d } else { d >> 24 };
                (
                    if d == 0xff && !self.state.x2apic() && low & 1 << 11 == 0 { BROADCAST } else { d },
                    low & 1 << 11 != 0,
                    None,
                )
            }
            1 => {
                if mode == Delivery::Fixed {
                    self.state.accept(vector, false);
                } else {
                    cx.guest_error(format_args!(
                        "local APIC {}: ICR self shorthand takes fixed mode only",
                        self.state.id
                    ));
                }
                return;
            }
            2 => (BROADCAST, false, None),
            _ => (BROADCAST, false, Some(self.state.id)),
        };
        // An IPI is an edge (§10.6.1, "Trigger mode": level is used for INIT de-assert only).
        cx.apic(ApicMessage::Deliver { destination, logical, mode, vector, level: false, except });
    }

    fn get(&self, n: u32, cx: &Cx<'_>) -> Option<u64> {
        let s = &self.state;
        let x2 = s.x2apic();
        let value = match n {
            0x02 if x2 => s.id,
            0x02 => s.id << 24,
            0x03 => VERSION.reset as u32,
            0x08 => u32::from(s.tpr),
            0x09 | 0x0c if !x2 => 0,
            0x0a => u32::from(s.ppr()),
            0x0d if x2 => s.x2_ldr(),
            0x0d => s.ldr,
            0x0e if !x2 => s.dfr,
            0x0f => s.svr,
            0x10..=0x17 => s.isr[n as usize & 7],
            0x18..=0x1f => s.tmr[n as usize & 7],
            0x20..=0x27 => s.irr[n as usize & 7],
            0x28 => s.esr,
            0x30 if x2 => return Some(s.icr),
            0x30 => s.icr as u32,
            0x31 if !x2 => (s.icr >> 32) as u32,
            0x32..=0x37 => s.lvt[n as usize - 0x32],
            0x38 => s.initial,
            0x39 => s.current(cx.now(), self.config.timer_hz),
            0x3e => s.divide,
            _ => return None,
        };
        Some(u64::from(value))
    }

    /// Writes register `n`. False if there is none, or it can't be written. Reserved bits were dealt with.
    fn set(&mut self, n: u32, value: u64, cx: &mut Cx<'_>) -> bool {
        if matches!(n, 0x0f | 0x32 | 0x38 | 0x3e) {
            self.catch_up(cx);
        }
        let x2 = self.state.x2apic();
        let v = value as u32;
        let stored = |r: &Register, old: u32| r.write(u64::from(old), value) as u32;
        let s = &mut self.state;
        match n {
            0x08 => s.tpr = v as u8,
            0x0b => self.end_of_interrupt(cx),
            0x0d if !x2 => s.ldr = stored(&LDR, s.ldr),
            0x0e if !x2 => s.dfr = stored(&DFR, s.dfr),
            0x0f => {
                s.svr = stored(&SVR, s.svr);
                if !s.software_enabled() {
                    // Disabled by software: all entries are masked and stay so (§10.4.7.2).
                    s.lvt.iter_mut().for_each(|l| *l |= MASKED);
                    self.arm(cx, 0);
                }
            }
            0x28 => s.esr = std::mem::take(&mut s.errors),
            0x30 => {
                s.icr =
                    if x2 { value } else { s.icr & !0xffff_ffff | u64::from(stored(&ICR_LOW, s.icr as u32)) };
                self.send(cx);
            }
            0x31 if !x2 => s.icr = s.icr & 0xffff_ffff | u64::from(v & 0xff00_0000) << 32,
            0x32..=0x37 => {
                let i = n as usize - 0x32;
                let r = [&LVT_TIMER, &LVT_THERMAL, &LVT_PMC, &LVT_LINT0, &LVT_LINT1, &LVT_ERROR][i];
                let old = s.lvt[i];
                let now = cx.now();
                let count = s.current(now, self.config.timer_hz);
                s.lvt[i] = stored(r, old);
                if !s.software_enabled() {
                    s.lvt[i] |= MASKED;
                }
                if i == TIMER {
                    if (old >> 17 & 3 == 2) != (s.mode() == 2) {
                        // Into or out of TSC-deadline mode the timer is disarmed (§10.5.4.1).
                        (s.initial, s.loaded, s.tsc_deadline) = (0, 0, 0);
                    } else if old >> 17 & 3 != s.mode() {
                        (s.loaded, s.loaded_at) = (count, now);
                    }
                    self.arm(cx, 0);
                } else if i == LINT[0] || i == LINT[1] {
                    self.pin(i - LINT[0]);
                }
            }
            0x38 => {
                if s.mode() != 2 {
                    (s.initial, s.loaded, s.loaded_at) = (v, v, cx.now());
                    self.arm(cx, 0);
                }
            }
            0x3e => {
                let now = cx.now();
                let count = s.current(now, self.config.timer_hz);
                s.divide = stored(&DIVIDE, s.divide);
                (s.loaded, s.loaded_at) = (count, now);
                self.arm(cx, 0);
            }
            0x3f if x2 => s.accept(v as u8, false),
            _ => return false,
        }
        true
    }
}

/// Bits that WRMSR may set in an x2APIC register; others are reserved, and #GP (§10.12.1.3). Of the local vector table the delivery status
/// and the remote IRR are not reserved but read-only: writing them does nothing.
fn x2_mask(n: u32) -> u64 {
    let pending = 1 << 12;
    match n {
        0x08 | 0x3f => 0xff,
        0x0b | 0x28 => 0,
        0x0f => SVR.write_mask(),
        0x30 => 0xffff_ffff_000c_cfff,
        0x32 => LVT_TIMER.write_mask() | pending,
        0x33 => LVT_THERMAL.write_mask() | pending,
        0x34 => LVT_PMC.write_mask() | pending,
        0x35 => LVT_LINT0.write_mask() | u64::from(REMOTE_IRR) | pending,
        0x36 => LVT_LINT1.write_mask() | u64::from(REMOTE_IRR) | pending,
        0x37 => LVT_ERROR.write_mask() | pending,
        0x38 => 0xffff_ffff,
        0x3e => 0xb,
        _ => 0,
    }
}

impl Device for Lapic {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, bank: usize) -> Limits {
        if bank == 0 { Limits::DEFAULT.implemented(4, 4) } else { Limits::sizes(8, 8) }
    }

    fn read(&mut self, bank: usize, offset: u64, _size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        if bank == 1 {
            let n = u32::try_from(offset).map_err(|_| IoError::NotHere)?;
            return if !self.state.x2apic() {
                Err(IoError::Refused)
            } else {
                self.get(n, cx).ok_or(IoError::NotHere)
            };
        }
        if !self.state.enabled() || self.state.x2apic() {
            return Err(IoError::NotHere);
        }
        if offset & 0xf != 0 {
            return Err(IoError::NotHere);
        }
        if offset == EOI.offset {
            return Err(IoError::WriteOnly);
        }
        match self.get((offset >> 4) as u32, cx) {
            Some(v) => Ok(v),
            None => {
                self.state.error(ILLEGAL_REGISTER);
                self.settle(cx);
                cx.guest_error(format_args!("local APIC: read of {offset:#x}, where no register is"));
                Ok(0)
            }
        }
    }

    fn write(
        &mut self,
        bank: usize,
        offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        if bank == 1 {
            let n = u32::try_from(offset).map_err(|_| IoError::NotHere)?;
            if !self.state.x2apic() || value & !x2_mask(n) != 0 {
                return Err(IoError::Refused);
            }
            if !self.set(n, value, cx) {
                return Err(if self.get(n, cx).is_some() { IoError::ReadOnly } else { IoError::NotHere });
            }
            self.settle(cx);
            return Ok(());
        }
        if !self.state.enabled() || self.state.x2apic() || offset & 0xf != 0 {
            return Err(IoError::NotHere);
        }
        let n = (offset >> 4) as u32;
        let done = self.set(n, value, cx);
        let read_only = !done && self.get(n, cx).is_some();
        if !done && !read_only {
            self.state.error(ILLEGAL_REGISTER);
            cx.guest_error(format_args!("local APIC: write of {offset:#x}, where no register is"));
        }
        self.settle(cx);
        if read_only { Err(IoError::ReadOnly) } else { Ok(()) }
    }

    fn register(&self, bank: usize, offset: u64, _is_write: bool) -> Option<&'static Register> {
        let table = if bank == 0 { MMIO.registers } else { X2APIC.registers };
        table.iter().find(|r| r.offset == if bank == 0 { offset & !3 } else { offset })
    }

    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        let s = &self.state;
        let n = if bank == 0 { register.offset >> 4 } else { register.offset } as usize;
        Some(u64::from(match n {
            0x02 => s.id << if bank == 0 { 24 } else { 0 },
            0x03 => VERSION.reset as u32,
            0x08 => u32::from(s.tpr),
            0x0a => u32::from(s.ppr()),
            0x0d => {
                if bank == 0 {
                    s.ldr
                } else {
                    s.x2_ldr()
                }
            }
            0x0e => s.dfr,
            0x0f => s.svr,
            0x10..=0x17 => s.isr[n & 7],
            0x18..=0x1f => s.tmr[n & 7],
            0x20..=0x27 => s.irr[n & 7],
            0x28 => s.esr,
            0x30 if bank == 1 => return Some(s.icr),
            0x30 => s.icr as u32,
            0x31 => (s.icr >> 32) as u32,
            0x32..=0x37 => s.lvt[n - 0x32],
            0x38 => s.initial,
            0x3e => s.divide,
            _ => return None,
        }))
    }

    fn timer(&mut self, _timer: u32, cx: &mut Cx<'_>) {
        let s = &mut self.state;
        if s.armed.is_none_or(|t| cx.now() < t) {
            // It was set anew, or passed already, while the machine was about to call.
            return;
        }
        s.armed = None;
        let mode = s.mode();
        s.tsc_deadline = 0;
        let l = s.lvt[TIMER];
        if l & MASKED == 0 {
            s.accept(l as u8, false);
        }
        if mode == 1 {
            let earliest = cx.now().saturating_add(LEAST_PERIOD);
            self.arm(cx, earliest);
        }
        self.settle(cx);
    }

    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        let n = pin as usize;
        if n > 1 {
            return;
        }
        let rose = level && !self.state.lint[n];
        self.state.lint[n] = level;
        if rose {
            self.pin_rose(n, cx);
        }
        self.settle(cx);
    }

    fn acknowledge(&mut self, cx: &mut Cx<'_>) -> Option<u8> {
        let v = self.state.deliverable()?;
        let (i, b) = bit(v);
        self.state.irr[i] &= !b;
        self.state.isr[i] |= b;
        self.settle(cx);
        Some(v)
    }

    fn message(&mut self, message: &ApicMessage, cx: &mut Cx<'_>) -> bool {
        let ApicMessage::Deliver { destination, logical, mode, vector, level, except } = *message else {
            return false;
        };
        if except == Some(self.state.id) || !self.state.matches(destination, logical) {
            return false;
        }
        match mode {
            Delivery::Fixed | Delivery::LowestPriority => {
                if !self.state.software_enabled() {
                    return false;
                }
                self.state.accept(vector, level);
            }
            Delivery::Smi => cx.cpu(CpuSignal::Smi),
            Delivery::Nmi => cx.cpu(CpuSignal::Nmi),
            Delivery::Init => self.init(cx),
            Delivery::StartUp => cx.cpu(CpuSignal::StartUp(vector)),
            Delivery::ExtInt => self.state.ext_int = true,
        }
        self.settle(cx);
        true
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        // What drives the pins is reset too; until it says so the levels stand.
        self.state = State { lint: self.state.lint, ..State::new(&self.config) };
        self.arm_none(cx);
        self.map(cx);
        self.state.intr = self.state.external();
        cx.cpu(CpuSignal::Interrupt(self.state.intr));
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.state)
    }

    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let state: State = from_value(state)?;
        state.check(&self.config)?;
        self.state = state;
        match self.state.armed {
            Some(t) => cx.at(0, t),
            None => cx.cancel(0),
        }
        self.map(cx);
        cx.cpu(CpuSignal::Interrupt(self.state.intr));
        Ok(())
    }

    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

/// Takes a message to the local APICs among `slots`. A lowest-priority interrupt goes to the one whose processor has the lowest priority
/// (§10.6.2.4), the first of them if several have. False if nobody took it.
pub fn route(message: &ApicMessage, slots: &[Arc<Slot>]) -> bool {
    let ApicMessage::Deliver { mode: Delivery::LowestPriority, .. } = message else {
        // All of them hear it, so no `any`.
        return slots.iter().filter(|s| s.message(message)).count() > 0;
    };
    let priority = |s: &Arc<Slot>| {
        s.with(|d, _| {
            d.as_any().and_then(|a| a.downcast_ref::<Lapic>().and_then(|l| l.priority_for(message)))
        })
        .flatten()
    };
    let best = slots.iter().filter_map(|s| priority(s).map(|p| (p, s))).min_by_key(|(p, _)| *p);
    best.is_some_and(|(_, s)| s.message(message))
}

/// The message that a write of `data` to `address` makes (§10.11). None if the address is not in 0xfee00000-0xfeefffff, or the delivery mode is reserved.
pub fn msi(address: u64, data: u32) -> Option<ApicMessage> {
    if address & !0xf_ffff != BASE_ADDRESS {
        return None;
    }
    let mode = match data >> 8 & 7 {
        0 => Delivery::Fixed,
        1 => Delivery::LowestPriority,
        2 => Delivery::Smi,
        4 => Delivery::Nmi,
        5 => Delivery::Init,
        7 => Delivery::ExtInt,
        _ => return None,
    };
    Some(ApicMessage::Deliver {
        destination: (address >> 12) as u32 & 0xff,
        logical: address & 4 != 0,
        mode,
        vector: data as u8,
        level: data & LEVEL != 0,
        except: None,
    })
}

#[cfg(test)]
mod tests;
