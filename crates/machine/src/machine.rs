//! A whole machine: made from a configuration, run until something ends it.

use crate::chassis::{Channel, Core, Event};
use crate::clock::{Clock, TimeBase};
use crate::config::{Accel, Config, KernelIrqchip, RtcBase};
use crate::cpu_env::TSC_HZ;
use crate::interp::Interp;
use crate::kvm::KvmEngine;
use crate::load::{self, Layout, Loaded};
use crate::pc::{BoardError, Chips, Pc};
use crate::report::{Cause, Reporter};
use crate::watching::Watchdog;
use hyaline_device::state::Value;
use hyaline_device::{Cx, Device, Reset};
use hyaline_kvm::{Kvm, LapicPage};
use hyaline_watch::{Guest, Line, Recorder};
use hyaline_x86::CpuModel;
use hyaline_x86::cpuid::{Accelerator, HostCpu, Topology};
use hyaline_x86::env::Signals;
use hyaline_x86::state::CpuState;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Why a machine can't be made or go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The board.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// What is to be booted.
    #[error(transparent)]
    Load(#[from] load::LoadError),
    /// The CPU model.
    #[error("-cpu: {0}")]
    Cpu(String),
    /// The accelerator.
    #[error("{0}")]
    Accel(String),
    /// An access trace.
    #[error("{0}")]
    Trace(String),
    /// The guest's symbols.
    #[error("-symbols: {0}")]
    Symbols(#[from] hyaline_watch::symbols::SymbolError),
    /// The saved state.
    #[error(transparent)]
    State(#[from] crate::state_file::StateFileError),
    /// No firmware image.
    #[error("{0}")]
    Firmware(String),
    /// A device's state can't be saved or taken.
    #[error("device `{0}`: {1}")]
    Device(String, hyaline_device::state::StateError),
    /// Threads.
    #[error("a thread can't be started: {0}")]
    Thread(std::io::Error),
}

/// Where distributions put SeaBIOS, and the package that Debian has it in.
const SEABIOS: [&str; 5] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/seabios/bios.bin",
    "/usr/share/qemu/bios.bin",
    "/usr/share/edk2/seabios/bios-256k.bin",
];

/// Clocks for access records: virtual time, and the host's for durations when somebody wants them.
struct RecorderClock {
    core: Arc<Core>,
    durations: Arc<AtomicBool>,
}

impl hyaline_watch::Clock for RecorderClock {
    fn host(&self) -> u64 {
        if self.durations.load(Ordering::Relaxed) { self.core.clock.host() } else { 0 }
    }
    fn now(&self, _host: u64) -> u64 {
        self.core.clock.now()
    }
}

/// Who runs the processors.
pub(crate) enum Engine {
    Interp(Box<Interp>),
    Kvm(Box<KvmEngine>),
}

/// A machine.
pub struct Machine {
    /// What it was made from.
    pub config: Config,
    /// Its chassis.
    pub core: Arc<Core>,
    /// Its board.
    pub pc: Pc,
    /// Sees every access to a device; keeps the last ones of each processor.
    pub recorder: Arc<Recorder>,
    /// The guest's symbols.
    pub guest: Arc<Guest>,
    /// Writes crash reports.
    pub reporter: Arc<Reporter>,
    durations: Arc<AtomicBool>,
    watchdog: Option<Watchdog>,
    pub(crate) traces: Vec<Arc<hyaline_watch::Trace>>,
    /// Remarks for the user: what was chosen, what the host lacks.
    pub remarks: Vec<String>,
    /// What was booted, in words.
    pub booted: String,
    firmware: Option<Vec<u8>>,
    pub(crate) engine: Engine,
    accel: Accel,
    pub(crate) planted: crate::debug::Planted,
    timers: Option<JoinHandle<()>>,
}

impl Machine {
    /// Puts a machine together and loads what it boots.
    ///
    /// # Errors
    /// In words, with the option to look at.
    pub fn new(config: Config) -> Result<Machine, MachineError> {
        let mut remarks = Vec::new();
        let firmware = firmware(&config, &mut remarks)?;
        let wall = match config.rtc {
            RtcBase::Utc => None,
            RtcBase::Offset(seconds) => {
                let now = std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .map_or(0, |d| d.as_nanos() as i128);
                Some((now + i128::from(seconds) * 1_000_000_000).max(0) as u64)
            }
            RtcBase::Fixed(seconds) => Some(seconds * 1_000_000_000),
        };
        // A deterministic machine starts at a fixed time unless told otherwise, counts nanoseconds by the instruction, and draws
        // its random numbers from a fixed sequence.
        let (base, wall, seed) = if config.deterministic {
            (
                TimeBase::Instructions(config.instruction_ns.max(1)),
                wall.or(Some(1_767_225_600_000_000_000)),
                Some(1),
            )
        } else {
            (TimeBase::Host, wall, None)
        };
        let core = Core::new(Clock::new(base, wall), seed);
        let kvm = open_kvm(&config, &mut remarks)?;
        let chips = match (&kvm, config.irqchip) {
            (None, _) | (_, KernelIrqchip::Off) => Chips::Ours,
            (_, KernelIrqchip::Split) => Chips::LapicInKernel,
            (_, KernelIrqchip::On) => Chips::AllInKernel,
        };
        let pc = Pc::new(&config, core.clone(), firmware.as_deref(), chips)?;
        let mut chosen = Accel::Kvm;
        let engine = match kvm {
            Some(kvm) => {
                let engine = KvmEngine::new(&kvm, &pc, config.irqchip, config.cpu.as_deref())
                    .map_err(MachineError::Accel)?;
                Engine::Kvm(Box::new(engine))
            }
            None => {
                let spec = config.cpu.as_deref().unwrap_or("max");
                let model = CpuModel::parse(spec, &HostCpu::detect(), Accelerator::Software)
                    .map_err(|e| MachineError::Cpu(e.to_string()))?;
                remarks.extend(model.warnings().iter().map(|w| format!("-cpu {spec}: {w}")));
                let topology = Topology { sockets: 1, cores: u32::from(config.cpus), threads: 1 };
                let model = Arc::new(model.with_tsc_hz(TSC_HZ).with_topology(topology));
                let mut interp = Interp::new(&pc, &config, |_| model.clone());
                chosen = interp.choose(&config, &mut remarks).map_err(MachineError::Accel)?;
                Engine::Interp(Box::new(interp))
            }
        };
        let durations: Arc<AtomicBool> = Arc::default();
        let clock = RecorderClock { core: core.clone(), durations: durations.clone() };
        let recorder = Recorder::new(usize::from(config.cpus), Box::new(clock));
        let guest = crate::watching::guest(&config.symbols, &pc)?;
        let reporter = Arc::new(Reporter::new(&config, &pc, &recorder, &guest, &chosen));
        crate::watching::inject(&config, &pc).map_err(MachineError::Trace)?;
        let mut machine = Machine {
            guest,
            reporter,
            watchdog: None,
            traces: Vec::new(),
            config,
            core,
            pc,
            recorder,
            durations,
            remarks,
            booted: String::new(),
            firmware,
            engine,
            accel: chosen,
            planted: Default::default(),
            timers: None,
        };
        let log = machine.config.log;
        match &mut machine.engine {
            Engine::Interp(interp) => interp.log(log.int, log.in_asm, log.out_asm),
            Engine::Kvm(_) if log.int || log.in_asm || log.out_asm => {
                machine.remarks.push("-d int, in_asm and out_asm: KVM does not show its guest's instructions and exceptions; use -accel interp or jit".into());
            }
            Engine::Kvm(_) => {}
        }
        match machine.config.restore.clone() {
            Some(path) => machine.restore(&path)?,
            None => machine.reset(Reset::Power)?,
        }
        // From here on: what the machine did to set itself up is not the guest's.
        for space in [&machine.pc.memory, &machine.pc.ports, &machine.pc.config_space] {
            space.set_observer(Some(machine.recorder.clone()));
        }
        Ok(machine)
    }

    /// The board alone, as firmware finds it, or with a kernel that is started without firmware as that finds it: for who asks what sits where.
    /// The accelerator is not opened, and a firmware image that isn't there is left out.
    ///
    /// # Errors
    /// In words, with the option to look at.
    pub fn board(config: &Config) -> Result<Pc, MachineError> {
        let firmware = match firmware(config, &mut Vec::new()) {
            Err(MachineError::Firmware(_)) => None,
            other => other?,
        };
        let chips = match (config.accels.first(), config.irqchip) {
            (Some(Accel::Kvm), KernelIrqchip::Split) => Chips::LapicInKernel,
            (Some(Accel::Kvm), KernelIrqchip::On) => Chips::AllInKernel,
            _ => Chips::Ours,
        };
        let core = Core::new(Clock::new(TimeBase::Host, None), Some(1));
        let pc = Pc::new(config, core, firmware.as_deref(), chips)?;
        for placed in &pc.devices {
            placed.slot.reset(Reset::Power);
        }
        if firmware.is_none() {
            pc.firmware_work()?;
        }
        Ok(pc)
    }

    /// Resets everything and loads anew what is booted without firmware.
    ///
    /// # Errors
    /// An image that can't be read any more.
    pub fn reset(&mut self, kind: Reset) -> Result<(), MachineError> {
        for port in &self.pc.cpus {
            port.signals.clear(u32::MAX);
        }
        for placed in &self.pc.devices {
            placed.slot.reset(kind);
        }
        if let Engine::Kvm(kvm) = &mut self.engine {
            kvm.reset_lapics(self.firmware.is_none()).map_err(MachineError::Accel)?;
        }
        for n in 0..usize::from(self.config.cpus) {
            self.set_cpu(n, CpuState::at_reset(n == 0))?;
        }
        if self.firmware.is_some() {
            self.booted = format!(
                "firmware{}",
                self.config.bios.as_ref().map_or(String::new(), |b| format!(" {}", b.display()))
            );
        } else {
            let Loaded { state, what } = self.load_images()?;
            self.set_cpu(0, *state)?;
            self.booted = what;
        }
        Ok(())
    }

    fn set_cpu(&mut self, index: usize, state: CpuState) -> Result<(), MachineError> {
        match &mut self.engine {
            Engine::Interp(interp) => interp.set_state(index, state),
            Engine::Kvm(kvm) => kvm.set_state(index, &state, None, false).map_err(MachineError::Accel)?,
        }
        Ok(())
    }

    fn load_images(&mut self) -> Result<Loaded, MachineError> {
        self.pc.firmware_work()?;
        let e820 = self.pc.e820_direct();
        let layout =
            Layout { memory: &self.pc.memory, low_ram: self.pc.tables_at(), e820: &e820, rsdp: Pc::RSDP };
        Ok(load::load(&self.config.images, &layout)?)
    }

    /// Connects a serial port to the host.
    pub fn connect_serial(&self, number: usize, host: Arc<dyn Channel>) {
        if let Some(Some(slot)) = self.pc.serials.get(number) {
            self.core.connect(slot, 0, host);
        }
    }

    /// Connects the debug console to the host.
    pub fn connect_debugcon(&self, host: Arc<dyn Channel>) {
        if let Some(slot) = &self.pc.debugcon {
            self.core.connect(slot, 0, host);
        }
    }

    /// Who executes the guest.
    pub fn accel(&self) -> Accel {
        self.accel.clone()
    }

    /// Instructions executed so far, where they are counted.
    pub fn instructions(&self) -> Option<u64> {
        match &self.engine {
            Engine::Interp(interp) => Some(interp.instructions()),
            Engine::Kvm(_) => None,
        }
    }

    /// A processor's state.
    ///
    /// # Errors
    /// KVM can't give it.
    pub fn cpu_state(&mut self, index: usize) -> Result<CpuState, MachineError> {
        match &mut self.engine {
            Engine::Interp(interp) => Ok(interp.state(index).clone()),
            Engine::Kvm(kvm) => kvm.state(index).map_err(MachineError::Accel),
        }
    }

    /// Runs until something happens that the caller decides on. Time passes only in here.
    ///
    /// # Errors
    /// Threads can't be started.
    pub fn run(&mut self) -> Result<Event, MachineError> {
        self.core.clock.start();
        if self.core.clock.base() == TimeBase::Host && self.timers.is_none() {
            let core = self.core.clone();
            let body = move || core.timers.serve(&core.clock);
            let thread = std::thread::Builder::new()
                .name("timers".into())
                .spawn(body)
                .map_err(MachineError::Thread)?;
            self.timers = Some(thread);
        }
        if self.watchdog.is_none() {
            self.watchdog = Watchdog::start(self.reporter.clone()).map_err(MachineError::Thread)?.into();
        }
        let event = match &mut self.engine {
            Engine::Interp(interp) => interp.run(&self.pc.cpus),
            Engine::Kvm(kvm) => {
                let event = kvm.run(&self.pc.cpus, &self.pc.ioapic);
                self.remarks.append(&mut kvm.remarks);
                event
            }
        };
        self.core.clock.stop();
        Ok(event)
    }

    /// Runs at most so many instructions more, counted over all processors; then gives [`Event::Stop`], as it does with counted time
    /// when nothing can ever wake the processors. On the software CPU only: KVM does not count, and runs until something happens.
    ///
    /// # Errors
    /// See [`Machine::run`].
    pub fn run_for(&mut self, instructions: u64) -> Result<Event, MachineError> {
        if let Engine::Interp(interp) = &mut self.engine {
            interp.stop_at = interp.instructions().saturating_add(instructions);
        }
        let event = self.run();
        if let Engine::Interp(interp) = &mut self.engine {
            interp.stop_at = u64::MAX;
        }
        event
    }

    /// The local APICs' states, also when the kernel has them: as the chip saves itself.
    pub(crate) fn lapic_states(&mut self) -> Result<Vec<(String, Value)>, MachineError> {
        let Engine::Kvm(kvm) = &mut self.engine else { return Ok(Vec::new()) };
        if !kvm.has_lapics() {
            return Ok(Vec::new());
        }
        let mut states = Vec::new();
        for n in 0..usize::from(self.config.cpus) {
            let mut chip = crate::cpu_env::lapic(n as u8);
            kvm.lapic(n, &mut chip).map_err(MachineError::Accel)?;
            let name = format!("lapic{n}");
            let state = chip.save().map_err(|e| MachineError::Device(name.clone(), e))?;
            states.push((name, state));
        }
        Ok(states)
    }

    /// Gives processors their restored states, with the local APICs' where the kernel has those. `tsc_hz`: ticks a second of their time-stamp
    /// counters where they were saved.
    pub(crate) fn load_processors(
        &mut self,
        tsc_hz: u64,
        cpus: Vec<(usize, CpuState)>,
        lapics: &[(String, Value)],
    ) -> Result<(), MachineError> {
        let ahead = match &mut self.engine {
            Engine::Kvm(kvm) => kvm.set_tsc_hz(tsc_hz),
            Engine::Interp(_) => {
                self.core.clock.set_tsc_hz(tsc_hz);
                0
            }
        };
        for (n, mut state) in cpus {
            state.tsc_offset = state.tsc_offset.wrapping_add(ahead);
            match &mut self.engine {
                Engine::Interp(interp) => interp.restore_state(n, state),
                Engine::Kvm(kvm) => {
                    let name = format!("lapic{n}");
                    let page = match lapics.iter().find(|(l, _)| *l == name) {
                        Some((_, value)) => {
                            let mut chip = crate::cpu_env::lapic(n as u8);
                            let mut cx = Cx::new(&*self.core, &*self.core, None);
                            chip.load(value, &mut cx).map_err(|e| MachineError::Device(name, e))?;
                            Some(LapicPage(chip.page(self.core.clock.now())))
                        }
                        None => None,
                    };
                    kvm.set_state(n, &state, page, true).map_err(MachineError::Accel)?;
                }
            }
        }
        Ok(())
    }

    /// All processors' states in words.
    pub fn cpu_states(&mut self) -> String {
        let cpus = usize::from(self.config.cpus);
        let text = |n| match self.cpu_state(n) {
            Ok(state) => crate::cpu_dump::text(n as u8, &state),
            Err(e) => format!("CPU#{n}: its state can't be had: {e}"),
        };
        (0..cpus).map(text).collect::<Vec<_>>().join("\n")
    }

    /// What is to be said when a processor shuts down and no report is written: why, where, and what led there.
    pub fn triple_fault_report(&mut self, cpu: u8) -> String {
        let text = match self.cpu_state(usize::from(cpu)) {
            Ok(state) => crate::cpu_dump::text(cpu, &state),
            Err(e) => format!("its state can't be had: {e}"),
        };
        format!(
            "hyaline: the guest's processor {cpu} shut down after a triple fault: an exception could not be delivered, nor the double fault that \
             followed\n{text}\n{}",
            self.last_accesses(cpu, 16)
        )
    }

    /// Writes a crash report and gives the lines for people.
    pub fn report(&mut self, cause: &Cause) -> String {
        let count = self.config.cpus;
        let cpus: Vec<_> =
            (0..count).filter_map(|n| Some((n, self.cpu_state(usize::from(n)).ok()?))).collect();
        self.reporter.report(cause, &cpus)
    }

    /// Has access records carry how long each access took; costs two readings of the host's clock an access.
    pub fn record_durations(&self, on: bool) {
        self.durations.store(on, Ordering::Relaxed);
    }

    /// The last accesses of a processor to devices, in lines; says so when there were none.
    pub fn last_accesses(&self, cpu: u8, n: usize) -> String {
        let records = self.recorder.last_of(usize::from(cpu), n);
        if records.is_empty() {
            return format!("Processor {cpu} accessed no device.");
        }
        let mut text = format!(
            "The last {} accesses of processor {cpu} to devices:\n{}",
            records.len(),
            hyaline_watch::HEADER
        );
        for record in &records {
            if let Some(site) = self.recorder.site(record.site) {
                let guest = self.guest.symbols().and_then(|s| s.at(record.rip));
                text.push_str(&format!("\n{}", Line { record, site: &site, guest: guest.as_deref() }));
            }
        }
        text
    }

    /// Gets [`Machine::run`] to come back with [`Event::Stop`].
    pub fn stop(&self) {
        self.core.event(Event::Stop);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.core.timers.close();
        self.watchdog = None;
        if let Some(thread) = self.timers.take() {
            let _ = thread.join();
        }
        for port in &self.pc.cpus {
            port.signals.raise(Signals::KICK);
            port.set_waker(None);
        }
    }
}

/// Opens KVM if it is the first accelerator that can be had; None: the software CPU.
fn open_kvm(config: &Config, remarks: &mut Vec<String>) -> Result<Option<Kvm>, MachineError> {
    let mut last = None;
    for accel in &config.accels {
        match accel {
            Accel::Interp | Accel::Jit { .. } => {
                if let Some(e) = last.take() {
                    remarks.push(format!("{e}; going on with the software CPU"));
                }
                return Ok(None);
            }
            Accel::Kvm => match Kvm::open() {
                Ok(kvm) => return Ok(Some(kvm)),
                Err(e) => last = Some(e),
            },
        }
    }
    match last {
        Some(e) => Err(MachineError::Accel(format!("-accel kvm: {e}"))),
        None => Ok(None),
    }
}

/// The firmware image, if the machine starts with one: the one named, or SeaBIOS when there is no kernel.
fn firmware(config: &Config, remarks: &mut Vec<String>) -> Result<Option<Vec<u8>>, MachineError> {
    if config.images.builtin.is_some() {
        return Ok(None);
    }
    match (&config.bios, &config.images.kernel) {
        (Some(bios), kernel) => {
            if kernel.is_some() {
                remarks.push(format!(
                    "-bios {} with -kernel: the kernel is started directly, without firmware; leave -kernel out to start the firmware",
                    bios.display()
                ));
                return Ok(None);
            }
            let path = find(bios);
            Ok(Some(load::read_file("-bios", &path)?))
        }
        (None, Some(_)) => Ok(None),
        (None, None) => match SEABIOS.iter().map(Path::new).find(|p| p.exists()) {
            Some(path) => Ok(Some(load::read_file("-bios", path)?)),
            None => Err(MachineError::Firmware(
                "there is nothing to boot: name a kernel with -kernel FILE, or firmware with -bios FILE. SeaBIOS, which is used without either, is \
                 not installed (on Debian: apt-get install seabios)"
                    .into(),
            )),
        },
    }
}

/// A firmware name without a folder is looked for where distributions put it, as QEMU does.
fn find(bios: &Path) -> PathBuf {
    if bios.exists() || bios.components().count() > 1 {
        return bios.to_path_buf();
    }
    let folders = SEABIOS.iter().filter_map(|p| Path::new(p).parent());
    folders.map(|f| f.join(bios)).find(|p| p.exists()).unwrap_or_else(|| bios.to_path_buf())
}
