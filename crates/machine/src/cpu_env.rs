//! What a software processor sees of this machine.

use crate::chassis::Core;
use crate::clock::{Clock, TimeBase};
use crate::pc::Pc;
use hyaline_device::{Cx, Slot, Source};
use hyaline_devices::intc::cerr::Cerr;
use hyaline_devices::intc::lapic::{self, Lapic};
use hyaline_space::AddressSpace;
use hyaline_x86::env::{Env, Peers, Signals};
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Ticks of the time-stamp counter per second on the software CPU, unless a restored machine had another rate.
pub const TSC_HZ: u64 = 1_000_000_000;

/// A local APIC of this board. Its deadlines are given in nanoseconds of virtual time, whatever the rate of the counter.
pub fn lapic(id: u8) -> Lapic {
    Lapic::new(lapic::Config::new(u32::from(id), 1_000_000_000))
}

/// When a counter that is `offset` ahead of the machine's reaches `deadline`, as a local APIC of ours takes it; 0 is "disarmed" whatever
/// the offset.
pub fn deadline(clock: &Clock, deadline: u64, offset: u64) -> u64 {
    if deadline == 0 { 0 } else { clock.time_of_tsc(deadline.wrapping_sub(offset)).max(1) }
}

/// Instructions that all processors of a deterministic machine have executed before the one in hand runs: what its own count adds to.
#[derive(Debug, Default)]
pub struct Count {
    /// Virtual time at the start of the present slice.
    pub time: AtomicU64,
    /// The running processor's own count at that time.
    pub base: AtomicU64,
}

/// One processor's surroundings.
pub struct CpuEnv {
    /// The machine.
    pub core: Arc<Core>,
    /// Guest-physical memory.
    pub memory: AddressSpace,
    /// Ports.
    pub ports: AddressSpace,
    /// This processor's number.
    pub index: u8,
    /// Its request word.
    pub signals: Arc<Signals>,
    /// All processors' request words.
    pub peers: Arc<Peers>,
    /// Its local APIC; None when the accelerator has it.
    pub lapic: Option<Arc<Slot>>,
    /// The 8259 pair, which answers for the local APIC's ExtINT.
    pub pic: Arc<Slot>,
    /// The latch between FERR# and interrupt 13.
    pub cerr: Arc<Slot>,
    /// Deterministic machines: where the count becomes time.
    pub count: Arc<Count>,
}

impl CpuEnv {
    /// The surroundings of processor `index` of a board.
    pub fn new(pc: &Pc, index: u8) -> CpuEnv {
        let n = usize::from(index);
        CpuEnv {
            core: pc.core.clone(),
            memory: pc.memory.clone(),
            ports: pc.ports.clone(),
            index,
            signals: pc.cpus[n].signals.clone(),
            peers: pc.peers.clone(),
            lapic: pc.lapics.get(n).cloned(),
            pic: pc.pic.clone(),
            cerr: pc.cerr.clone(),
            count: pc.count.clone(),
        }
    }

    fn with_lapic<R>(&self, f: impl FnOnce(&mut Lapic, &mut Cx<'_>) -> R) -> Option<R> {
        self.lapic
            .as_ref()?
            .with(|d, cx| d.as_any().and_then(|a| a.downcast_mut::<Lapic>()).map(|l| f(l, cx)))
            .flatten()
    }

    fn catch_up(&self, icount: u64) {
        if let TimeBase::Instructions(ns) = self.core.clock.base() {
            let since = icount.wrapping_sub(self.count.base.load(Ordering::Relaxed));
            let time = self.count.time.load(Ordering::Relaxed).wrapping_add(since.wrapping_mul(ns));
            self.core.clock.reach(time);
        }
    }
}

impl Env for CpuEnv {
    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
    fn ports(&self) -> &AddressSpace {
        &self.ports
    }
    fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }
    fn index(&self) -> u8 {
        self.index
    }
    fn peers(&self) -> Option<&Arc<Peers>> {
        Some(&self.peers)
    }
    fn at(&mut self, icount: u64) {
        self.catch_up(icount);
    }
    fn acknowledge(&mut self) -> Option<u8> {
        let Some(lapic) = &self.lapic else { return self.pic.acknowledge() };
        if let Some(vector) = lapic.acknowledge() {
            return Some(vector);
        }
        let external = self.with_lapic(|l, cx| l.acknowledge_external(cx)).unwrap_or(false);
        if external { self.pic.acknowledge() } else { None }
    }
    fn tsc(&mut self, icount: u64) -> u64 {
        self.catch_up(icount);
        self.core.clock.tsc()
    }
    fn apic_read(&mut self, register: u32) -> Option<u64> {
        self.with_lapic(|l, cx| l.x2_read(register, cx)).flatten()
    }
    fn apic_write(&mut self, register: u32, value: u64) -> bool {
        self.with_lapic(|l, cx| l.x2_write(register, value, cx)).unwrap_or(false)
    }
    fn cr8(&mut self) -> u8 {
        self.with_lapic(|l, _| l.cr8()).unwrap_or(0)
    }
    fn set_cr8(&mut self, value: u8) {
        self.with_lapic(|l, cx| l.set_cr8(value, cx));
    }
    fn set_apic_base(&mut self, value: u64) {
        self.with_lapic(|l, cx| l.set_apic_base(value, cx));
    }
    fn set_tsc_deadline(&mut self, value: u64, tsc_offset: u64) {
        let at = deadline(&self.core.clock, value, tsc_offset);
        self.with_lapic(|l, cx| l.set_tsc_deadline(at, cx));
    }
    fn fpu_error(&mut self) {
        self.cerr.with(|d, cx| {
            if let Some(latch) = d.as_any().and_then(|a| a.downcast_mut::<Cerr>()) {
                latch.fpu_error(cx);
            }
        });
    }
    fn random(&mut self) -> u64 {
        self.core.random()
    }
    fn guest_error(&mut self, rip: u64, message: &dyn Display) {
        self.core.log(
            crate::chassis::LogKind::GuestError,
            &format!("cpu{}", self.index),
            &format!("{message} (rip {rip:#x})"),
        );
    }
}
