//! Runs the processors of a machine on the software CPU: in turns, on the calling thread.

use crate::chassis::{Core, Event, Unpark};
use crate::clock::TimeBase;
use crate::cpu_env::{Count, CpuEnv};
use crate::pc::Pc;
use hyaline_space::{AddressSpace, Listener, Section};
use hyaline_x86::env::Signals;
use hyaline_x86::state::{Activity, CpuState};
use hyaline_x86::{Cpu, CpuModel, Exit};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Instructions a processor executes in its turn when there are several.
const TURN: u64 = 20_000;
/// And when it is alone: kicks cut it short.
const ALONE: u64 = 5_000_000;

/// The software processors of one machine.
pub struct Interp {
    core: Arc<Core>,
    cpus: Vec<Cpu>,
    count: Arc<Count>,
    /// Whose turn it is, so that a stopped machine goes on as if it had not stopped.
    turn: usize,
    /// Instructions left in that turn.
    left: u64,
}

/// Tells the processors when guest-physical memory changes its shape.
struct Remap {
    signals: Vec<Arc<Signals>>,
}

impl Listener for Remap {
    fn region_add(&self, _section: &Section) {}
    fn region_del(&self, _section: &Section) {}
    fn commit(&self) {
        self.signals.iter().for_each(|s| s.raise(Signals::REMAP));
    }
}

impl Interp {
    /// Makes the processors, at reset.
    pub fn new(pc: &Pc, model: impl Fn(u8) -> Arc<CpuModel>) -> Interp {
        let cpus = (0..pc.cpus.len() as u8)
            .map(|n| Cpu::new(CpuState::at_reset(n == 0), Box::new(CpuEnv::new(pc, n)), model(n)));
        let cpus: Vec<Cpu> = cpus.collect();
        let signals = pc.cpus.iter().map(|c| c.signals.clone()).collect();
        watch_map(&pc.memory, signals);
        Interp { core: pc.core.clone(), cpus, count: pc.count.clone(), turn: 0, left: 0 }
    }

    /// Number of processors.
    pub fn len(&self) -> usize {
        self.cpus.len()
    }
    /// A processor's state.
    pub fn state(&self, index: usize) -> &CpuState {
        &self.cpus[index].state
    }
    /// Replaces a processor's state: after a reset, a load, a restore.
    pub fn set_state(&mut self, index: usize, mut state: CpuState) {
        let cpu = &mut self.cpus[index];
        // Instructions are counted from power-on, whatever is loaded later.
        state.icount = state.icount.max(cpu.state.icount);
        cpu.state = state;
        cpu.invalidate_map();
        self.left = 0;
        self.turn = 0;
    }
    /// Instructions executed by all processors.
    pub fn instructions(&self) -> u64 {
        self.cpus.iter().map(|c| c.state.icount).sum()
    }

    /// Runs until an event waits, and gives it.
    pub fn run(&mut self, cpus: &[Arc<crate::chassis::CpuPort>]) -> Event {
        let thread = std::thread::current();
        for port in cpus {
            port.set_waker(Some(Arc::new(Unpark(thread.clone()))));
        }
        let per_instruction = match self.core.clock.base() {
            TimeBase::Host => None,
            TimeBase::Instructions(ns) => Some(ns),
        };
        let mut idle = 0;
        loop {
            if let Some(event) = self.core.take_event() {
                return event;
            }
            if self.left == 0 {
                self.left = if self.cpus.len() == 1 { ALONE } else { TURN };
            }
            let cpu = &mut self.cpus[self.turn];
            let before = cpu.state.icount;
            let mut budget = self.left;
            if let Some(ns) = per_instruction {
                let now = self.core.clock.now();
                self.count.time.store(now, Ordering::Relaxed);
                self.count.base.store(before, Ordering::Relaxed);
                // Up to the next timer, and at least one instruction.
                budget = budget.min((self.core.timers.next().saturating_sub(now)).div_ceil(ns).max(1));
            }
            let exit = cpu.run(budget);
            let ran = cpu.state.icount - before;
            self.left = self.left.saturating_sub(ran);
            if let Some(ns) = per_instruction {
                self.core.clock.reach(self.count.time.load(Ordering::Relaxed) + ran * ns);
                self.core.timers.fire(self.core.clock.now());
            }
            let waits = match exit {
                Exit::Budget | Exit::Kicked => false,
                Exit::Halted | Exit::WaitForSipi => true,
                Exit::Shutdown => {
                    cpu.state.activity = Activity::Shutdown;
                    self.core.event(Event::TripleFault(self.turn as u8));
                    true
                }
                Exit::Reset => {
                    self.core.event(Event::Reset("processor".into()));
                    true
                }
                Exit::Debug(_) => {
                    self.core.event(Event::Stop);
                    true
                }
            };
            if waits {
                self.left = 0;
            }
            if self.left == 0 {
                self.turn = (self.turn + 1) % self.cpus.len();
            }
            idle = if waits && ran == 0 { idle + 1 } else { 0 };
            if idle >= self.cpus.len() {
                idle = 0;
                self.wait(per_instruction.is_some());
            }
        }
    }

    /// All processors wait: until a timer is due or somebody calls.
    fn wait(&self, counted: bool) {
        let next = self.core.timers.next();
        if !counted {
            // The timer thread calls; the time-out is only a safety net.
            std::thread::park_timeout(Duration::from_millis(200));
        } else if next != u64::MAX {
            self.core.clock.reach(next);
            self.core.timers.fire(self.core.clock.now());
        } else {
            std::thread::park_timeout(Duration::from_millis(200));
        }
    }
}

fn watch_map(memory: &AddressSpace, signals: Vec<Arc<Signals>>) {
    memory.add_listener(Arc::new(Remap { signals }));
}
