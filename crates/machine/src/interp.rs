//! Runs the processors of a machine on the software CPU: on a host thread each, or in turns on the calling thread where the order counts
//! (deterministic machines, runs of so many instructions, a debugger's steps).

use crate::chassis::{Core, CpuPort, Event, LogKind, Unpark};
use crate::clock::TimeBase;
use crate::config::{Accel, Config};
use crate::cpu_env::{Count, CpuEnv};
use crate::debug::{Resume, Stopped, Why};
use crate::pc::Pc;
use crate::threads::{self, Next, Vcpu};
use hyaline_space::{AddressSpace, Listener, Section};
use hyaline_watch::Runner;
use hyaline_x86::env::Signals;
use hyaline_x86::state::{Activity, CpuState, EventKind, Injected, efer};
use hyaline_x86::{Cpu, CpuLog, CpuModel, DebugStop, Exit, JitError, JitOptions, Tier, Watch};
use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Instructions a processor executes in its turn when there are several.
const TURN: u64 = 20_000;
/// And when it is alone: kicks cut it short.
const ALONE: u64 = 5_000_000;
/// Instructions that the others execute while a debugger steps one.
const BESIDE: u64 = 1000;

/// The software processors of one machine.
pub(crate) struct Interp {
    core: Arc<Core>,
    cpus: Vec<Cpu>,
    count: Arc<Count>,
    /// Whose turn it is, so that a stopped machine goes on as if it had not stopped.
    turn: usize,
    /// Instructions left in that turn.
    left: u64,
    /// Count of executed instructions at which [`Interp::run`] comes back.
    pub(crate) stop_at: u64,
    /// Always in turns.
    turns: bool,
    /// With counted time: an idle machine waits for the host's clock, it does not skip to the next timer.
    sleep: bool,
    /// Print what the translators did at the end.
    stats: bool,
    /// How a debugger wants each processor to run.
    resume: Vec<Resume>,
    /// It goes on from where a debugger had it.
    resumed: bool,
    breakpoints: Vec<u64>,
    watches: Vec<Watch>,
}

impl Drop for Interp {
    fn drop(&mut self) {
        if !self.stats {
            return;
        }
        for (n, cpu) in self.cpus.iter().enumerate() {
            let Some(stats) = cpu.jit_stats() else { continue };
            drop(writeln!(std::io::stderr(), "cpu{n}: {} instructions\n{stats}", cpu.state.icount));
        }
    }
}

/// The linear address of the next instruction.
fn linear_rip(state: &CpuState) -> u64 {
    let code = &state.seg[1];
    if state.efer & efer::LMA != 0 && code.long() {
        state.rip
    } else {
        code.base.wrapping_add(state.rip) & 0xffff_ffff
    }
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

/// Writes what processors do into the machine's log.
struct CpuLogger {
    core: Arc<Core>,
    events: bool,
    code: bool,
    translations: bool,
}

/// Names of the exceptions (SDM vol. 3A table 6-1).
const EXCEPTIONS: [&str; 22] = [
    "#DE divide error",
    "#DB debug",
    "NMI",
    "#BP breakpoint",
    "#OF overflow",
    "#BR bound",
    "#UD invalid opcode",
    "#NM no FPU",
    "#DF double fault",
    "coprocessor overrun",
    "#TS invalid TSS",
    "#NP not present",
    "#SS stack",
    "#GP general protection",
    "#PF page fault",
    "reserved 15",
    "#MF x87",
    "#AC alignment",
    "#MC machine check",
    "#XM SIMD",
    "#VE virtualization",
    "#CP control protection",
];

impl CpuLog for CpuLogger {
    fn event(&self, cpu: u8, state: &CpuState, event: &Injected) {
        if !self.events {
            return;
        }
        let n = event.vector;
        let what = match event.kind {
            EventKind::External => format!("interrupt {n:#04x}"),
            EventKind::Nmi => "NMI".to_string(),
            EventKind::Software => format!("INT {n:#04x}"),
            EventKind::Exception => {
                EXCEPTIONS.get(usize::from(n)).map_or(format!("exception {n}"), |name| (*name).to_string())
            }
        };
        let error = event.error.map_or(String::new(), |e| format!(" error {e:#06x}"));
        let cr2 = if event.kind == EventKind::Exception && n == 14 {
            format!(" CR2 {:#x}", state.cr2)
        } else {
            String::new()
        };
        let text = format!(
            "{what}{error}{cr2} at {:04x}:{:016x} ({}), SP {:04x}:{:016x}, instruction {}",
            state.seg[1].selector,
            state.rip,
            crate::cpu_dump::mode(state),
            state.seg[2].selector,
            state.gpr[4],
            state.icount
        );
        self.core.log(LogKind::Interrupt, &format!("cpu{cpu}"), &text);
    }

    fn code(&self, cpu: u8, linear: u64, bits: u32, bytes: &[u8]) {
        if !self.code {
            return;
        }
        let mut text = format!("block at {linear:#x}, {bits}-bit code");
        let mut formatter = GasFormatter::new();
        let mut decoder = Decoder::with_ip(bits, bytes, linear, DecoderOptions::NONE);
        for insn in &mut decoder {
            let mut line = String::new();
            formatter.format(&insn, &mut line);
            text.push_str(&format!("\n  {:#018x}  {line}", insn.ip()));
        }
        self.core.log(LogKind::Code, &format!("cpu{cpu}"), &text);
    }

    fn wants_translations(&self) -> bool {
        self.translations
    }

    fn translation(&self, cpu: u8, text: &str) {
        self.core.log(LogKind::Translation, &format!("cpu{cpu}"), text);
    }
}

impl Interp {
    /// Makes the processors, at reset.
    pub(crate) fn new(pc: &Pc, config: &Config, model: impl Fn(u8) -> Arc<CpuModel>) -> Interp {
        let cpus = (0..pc.cpus.len() as u8)
            .map(|n| Cpu::new(CpuState::at_reset(n == 0), Box::new(CpuEnv::new(pc, n)), model(n)));
        let cpus: Vec<Cpu> = cpus.collect();
        let signals = pc.cpus.iter().map(|c| c.signals.clone()).collect();
        watch_map(&pc.memory, signals);
        Interp {
            core: pc.core.clone(),
            cpus,
            count: pc.count.clone(),
            turn: 0,
            left: 0,
            stop_at: u64::MAX,
            turns: config.in_turns(),
            sleep: config.sleep_when_idle,
            stats: false,
            resume: Vec::new(),
            resumed: false,
            breakpoints: Vec::new(),
            watches: Vec::new(),
        }
    }

    /// Chooses how the processors execute: as the first of `accels` (KVM's left out) that this host can. Gives which it is.
    pub(crate) fn choose(&mut self, config: &Config, remarks: &mut Vec<String>) -> Result<Accel, String> {
        let mut why = None;
        for accel in &config.accels {
            match accel {
                Accel::Kvm => {}
                Accel::Interp => {
                    remarks.extend(why.take().map(|e| {
                        format!("{e}; going on with the interpreter, which is several times slower")
                    }));
                    return Ok(Accel::Interp);
                }
                Accel::Jit { stats, threshold } => {
                    match self.translate(*stats, *threshold, config.code_cache) {
                        Ok(()) => return Ok(accel.clone()),
                        // That is not the host's fault.
                        Err(e @ JitError::CacheSize(_)) => return Err(format!("-accel jit,cache=: {e}")),
                        Err(e) => why = Some(format!("-accel jit: {e}")),
                    }
                }
            }
        }
        why.map_or(Ok(Accel::Interp), Err)
    }

    /// Lets the processors translate what runs often.
    fn translate(&mut self, stats: bool, threshold: Option<u8>, cache: Option<u64>) -> Result<(), JitError> {
        let mut options = JitOptions { drop_locks: self.cpus.len() == 1, ..JitOptions::default() };
        options.threshold = threshold.unwrap_or(options.threshold);
        if let Some(bytes) = cache {
            options.cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX) / self.cpus.len();
        }
        self.cpus.iter_mut().try_for_each(|cpu| cpu.set_tier(Tier::Jit(options)))?;
        self.stats = stats;
        Ok(())
    }

    /// Logs what the processors do: interrupts and exceptions, code as it is decoded and as it is translated.
    pub(crate) fn log(&mut self, events: bool, code: bool, translations: bool) {
        let log: Option<Arc<dyn CpuLog>> = (events || code || translations).then(|| {
            Arc::new(CpuLogger { core: self.core.clone(), events, code, translations }) as Arc<dyn CpuLog>
        });
        for cpu in &mut self.cpus {
            cpu.log = log.clone();
        }
    }

    /// A processor's state.
    pub(crate) fn state(&self, index: usize) -> &CpuState {
        &self.cpus[index].state
    }
    /// Replaces a processor's state: after a reset, a load, a restore.
    pub(crate) fn set_state(&mut self, index: usize, mut state: CpuState) {
        let cpu = &mut self.cpus[index];
        // Instructions are counted from power-on, whatever is loaded later.
        state.icount = state.icount.max(cpu.state.icount);
        cpu.state = state;
        cpu.invalidate_map();
        self.left = 0;
        self.turn = 0;
    }
    /// Takes a saved processor's state, with its count.
    pub(crate) fn restore_state(&mut self, index: usize, state: CpuState) {
        if let Some(cpu) = self.cpus.get_mut(index) {
            cpu.state = state;
            cpu.invalidate_map();
        }
    }
    /// Whose turn it is, and how many instructions are left in it.
    pub(crate) fn schedule(&self) -> (usize, u64) {
        (self.turn, self.left)
    }
    /// Goes on in somebody's turn.
    pub(crate) fn set_schedule(&mut self, (turn, left): (usize, u64)) {
        (self.turn, self.left) = (turn % self.cpus.len().max(1), left);
    }
    /// Makes the processors walk the page tables anew.
    pub(crate) fn forget_translations(&mut self) {
        self.cpus.iter_mut().for_each(Cpu::invalidate_map);
    }
    /// Instructions executed by all processors.
    pub(crate) fn instructions(&self) -> u64 {
        self.cpus.iter().map(|c| c.state.icount).sum()
    }

    /// Runs until an event waits, and gives it.
    pub(crate) fn run(&mut self, cpus: &[Arc<CpuPort>]) -> Event {
        let stepping = (0..self.cpus.len()).any(|n| self.how(n) == Resume::Step);
        if self.turns || stepping || self.stop_at != u64::MAX {
            self.run_in_turns(cpus)
        } else {
            self.run_threads(cpus)
        }
    }

    /// Runs all processors at the same time, each on a thread of its own.
    fn run_threads(&mut self, ports: &[Arc<CpuPort>]) -> Event {
        if std::mem::take(&mut self.resumed) {
            self.leave_breakpoints(None);
        }
        let core = self.core.clone();
        let (resume, breakpoints) = (&self.resume, &self.breakpoints);
        let mut vcpus = Vec::new();
        for (n, (cpu, port)) in self.cpus.iter_mut().zip(ports).enumerate() {
            if resume.get(n) == Some(&Resume::Stay) {
                continue;
            }
            let (core, number) = (&*core, n as u8);
            let runner = if cpu.jit_stats().is_some() { Runner::Jit } else { Runner::Interp };
            let go_on = Box::new(move || match cpu.run(u64::MAX) {
                Exit::Budget | Exit::Kicked => Next::Again,
                Exit::Halted | Exit::WaitForSipi => Next::Sleep,
                exit => {
                    tell(core, n, cpu, exit, Resume::Run, breakpoints);
                    Next::End
                }
            });
            vcpus.push(Vcpu { number, runner, port, kick: None, go_on });
        }
        threads::run(&core, vcpus)
    }

    fn run_in_turns(&mut self, cpus: &[Arc<CpuPort>]) -> Event {
        let thread = std::thread::current();
        for port in cpus {
            port.set_waker(Some(Arc::new(Unpark(thread.clone()))));
        }
        let per_instruction = match self.core.clock.base() {
            TimeBase::Host => None,
            TimeBase::Instructions(ns) => Some(ns),
        };
        if std::mem::take(&mut self.resumed) {
            self.leave_breakpoints(per_instruction);
        }
        let mut idle = 0;
        // The processor that a debugger steps, and where it comes out of a HLT.
        let stepped = (0..self.cpus.len()).find(|n| self.how(*n) == Resume::Step);
        let mut beyond = None;
        loop {
            if let Some(event) = self.core.take_event() {
                if beyond.is_some() {
                    self.plant();
                }
                return event;
            }
            let to_go = match self.stop_at {
                u64::MAX => u64::MAX,
                at => at.saturating_sub(self.instructions()),
            };
            if to_go == 0 {
                return Event::Stop;
            }
            if let Some(n) = stepped.filter(|_| beyond.is_none()) {
                self.others(n, per_instruction);
                if !self.core.has_event() && self.slice(n, 1, true, per_instruction) == (0, true) {
                    // It waits for an interrupt: the step ends where it goes on after it.
                    beyond = Some(n);
                    let all: Vec<u64> =
                        self.breakpoints.iter().copied().chain([linear_rip(&self.cpus[n].state)]).collect();
                    self.cpus[n].set_stops(&all, &self.watches);
                }
                continue;
            }
            if self.left == 0 {
                self.left = if self.cpus.len() == 1 { ALONE } else { TURN };
            }
            let turn = self.turn;
            let (ran, waits) = match self.how(turn) {
                Resume::Stay => (0, true),
                _ => self.slice(turn, self.left.min(to_go), false, per_instruction),
            };
            self.left = if waits { 0 } else { self.left.saturating_sub(ran) };
            if self.left == 0 {
                self.turn = (self.turn + 1) % self.cpus.len();
            }
            idle = if waits && ran == 0 { idle + 1 } else { 0 };
            if idle >= self.cpus.len() {
                idle = 0;
                // With counted time and no timer nothing will ever come: no instruction is left to wait for.
                if per_instruction.is_some() && to_go != u64::MAX && self.core.timers.next() == u64::MAX {
                    return self.core.take_event().unwrap_or(Event::Stop);
                }
                self.wait(per_instruction.is_some());
            }
        }
    }

    /// Lets one processor execute up to `budget` instructions, or one for a debugger: how many it did, and whether it waits. What it ran into
    /// waits as an event then.
    fn slice(&mut self, index: usize, budget: u64, step: bool, per_instruction: Option<u64>) -> (u64, bool) {
        let how = self.how(index);
        let cpu = &mut self.cpus[index];
        let before = cpu.state.icount;
        let mut budget = budget;
        if let Some(ns) = per_instruction {
            if !self.core.has_event() {
                // An earlier slice ended with it.
                cpu.env.signals().clear(Signals::KICK);
            }
            let now = self.core.clock.now();
            self.count.time.store(now, Ordering::Relaxed);
            self.count.base.store(before, Ordering::Relaxed);
            // Up to the next timer, and at least one instruction.
            budget = budget.min((self.core.timers.next().saturating_sub(now)).div_ceil(ns).max(1));
            self.core.slice(index, now.saturating_add(budget.saturating_mul(ns)));
        }
        let exit = if step { cpu.debug_step() } else { cpu.run(budget) };
        self.core.slice(index, 0);
        let ran = cpu.state.icount - before;
        if ran == 0 && matches!(exit, Exit::Kicked) && self.stop_at != u64::MAX {
            // Perhaps exceptions without end: they count in a bounded run, or it would have none.
            self.stop_at = self.stop_at.saturating_sub(10_000);
        }
        if let Some(ns) = per_instruction {
            self.core.clock.reach(self.count.time.load(Ordering::Relaxed) + ran * ns);
            self.core.timers.fire(self.core.clock.now());
        }
        let waits = match exit {
            Exit::Budget | Exit::Kicked => false,
            Exit::Halted | Exit::WaitForSipi => true,
            exit => {
                tell(&self.core, index, cpu, exit, how, &self.breakpoints);
                true
            }
        };
        (ran, waits)
    }

    /// Outside of flat memory gdb does not see that a breakpoint, whose address is linear, is at the present instruction, and does not step over
    /// it as it does else.
    fn leave_breakpoints(&mut self, per_instruction: Option<u64>) {
        for n in 0..self.cpus.len() {
            let state = &self.cpus[n].state;
            let at = linear_rip(state);
            if self.how(n) == Resume::Run && at != state.rip && self.breakpoints.contains(&at) {
                // A kick may come before the step.
                (0..4).any(|_| self.slice(n, 1, true, per_instruction).0 > 0);
            }
        }
        self.core.retain_events(|e| !matches!(e, Event::Debug(Stopped { why: Why::Step, .. })));
    }

    /// How a debugger wants the processors to run from now on.
    pub(crate) fn set_resume(&mut self, resume: &[Resume]) {
        self.resume = resume.to_vec();
        self.resumed = true;
    }

    /// While one processor is stepped, the others that run do a little.
    fn others(&mut self, stepped: usize, per_instruction: Option<u64>) {
        for n in (0..self.cpus.len()).filter(|n| *n != stepped) {
            if self.how(n) == Resume::Run && !self.core.has_event() {
                self.slice(n, BESIDE, false, per_instruction);
            }
        }
    }

    fn how(&self, index: usize) -> Resume {
        self.resume.get(index).copied().unwrap_or_default()
    }

    /// Sets where all processors stop.
    pub(crate) fn set_stops(&mut self, breakpoints: &[u64], watches: &[Watch]) {
        self.breakpoints = breakpoints.to_vec();
        self.watches = watches.to_vec();
        self.plant();
    }

    fn plant(&mut self) {
        for cpu in &mut self.cpus {
            cpu.set_stops(&self.breakpoints, &self.watches);
        }
    }

    /// The guest-physical address of a linear one, without any effect.
    pub(crate) fn physical(&mut self, index: usize, linear: u64) -> Option<u64> {
        self.cpus.get_mut(index)?.debug_translate(linear)
    }

    /// All processors wait: until a timer is due or somebody calls.
    fn wait(&self, counted: bool) {
        let next = self.core.timers.next();
        if !counted {
            // The timer thread calls; the time-out is only a safety net.
            std::thread::park_timeout(Duration::from_millis(200));
        } else if next != u64::MAX {
            let mut until = next;
            let now = self.core.clock.now();
            if self.sleep && next > now {
                // Who calls early (input from outside) finds as much time gone as has.
                let slept = Instant::now();
                std::thread::park_timeout(Duration::from_nanos(next - now));
                until = next.min(now + slept.elapsed().as_nanos() as u64);
            }
            self.core.clock.reach(until);
            self.core.timers.fire(self.core.clock.now());
        } else {
            std::thread::park_timeout(Duration::from_millis(200));
        }
    }
}

/// Queues the event that a processor ran into.
fn tell(core: &Core, index: usize, cpu: &mut Cpu, exit: Exit, how: Resume, breakpoints: &[u64]) {
    match exit {
        Exit::Budget | Exit::Kicked | Exit::Halted | Exit::WaitForSipi => {}
        Exit::Shutdown => {
            cpu.state.activity = Activity::Shutdown;
            core.event(Event::TripleFault(index as u8));
        }
        Exit::Reset => core.event(Event::Reset("processor".into())),
        Exit::Debug(stop) => {
            let address = linear_rip(&cpu.state);
            let why = match stop {
                DebugStop::Breakpoint if how == Resume::Step && !breakpoints.contains(&address) => Why::Step,
                DebugStop::Breakpoint => Why::Breakpoint { address },
                DebugStop::Step => Why::Step,
                DebugStop::Watchpoint { address, is_write } => Why::Watch { address, is_write },
            };
            core.event(Event::Debug(Stopped { cpu: index as u8, why }));
        }
    }
}

fn watch_map(memory: &AddressSpace, signals: Vec<Arc<Signals>>) {
    memory.add_listener(Arc::new(Remap { signals }));
}
