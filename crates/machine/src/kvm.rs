//! Runs the processors of a machine on KVM: a host thread each.

use crate::chassis::{ApicSink, Core, CpuPort, Event};
use crate::config::KernelIrqchip;
use crate::cpu_env::CpuEnv;
use crate::debug::{Resume, Stopped, Why};
use crate::pc::Pc;
use crate::threads::{self, Next, Vcpu};
use hyaline_device::{ApicMessage, Slot};
use hyaline_devices::intc::lapic::Lapic;
use hyaline_kvm::cpuid::{CpuidLeaf, host_model};
use hyaline_kvm::{
    DebugCause, DebugControl, DebugStop, Exit, Gsi, Irqchip, Kvm, KvmError, KvmVcpu, KvmVm, LapicPage,
    SystemEvent, VmOptions, Watch,
};
use hyaline_watch::Runner;
use hyaline_x86::CpuModel;
use hyaline_x86::cpuid::{Accelerator, HostCpu, Leaf};
use hyaline_x86::state::CpuState;
use std::sync::Arc;

/// The processors of one machine on KVM.
pub(crate) struct KvmEngine {
    core: Arc<Core>,
    vm: Arc<KvmVm>,
    vcpus: Vec<(KvmVcpu, CpuEnv)>,
    irqchip: Irqchip,
    /// Accesses that left the guest.
    pub remarks: Vec<String>,
    /// How a debugger wants each processor to run.
    pub(crate) resume: Vec<Resume>,
    debug: Debug,
}

/// What a debugger wants to stop at.
#[derive(Clone, Debug, Default)]
struct Debug {
    control: DebugControl,
    /// Where it has put INT3.
    software: Vec<u64>,
}

/// Messages for local APICs in the kernel.
struct ToKernel {
    vm: Arc<KvmVm>,
    core: std::sync::Weak<Core>,
}

impl ApicSink for ToKernel {
    fn deliver(&self, message: &ApicMessage) -> bool {
        if matches!(message, ApicMessage::Eoi { .. }) {
            return false;
        }
        if let Err(e) = self.vm.deliver(message)
            && let Some(core) = self.core.upgrade()
        {
            core.log(crate::chassis::LogKind::GuestError, "kvm", &e.to_string());
        }
        true
    }
}

/// The kernel's name for our option.
pub(crate) fn irqchip(option: KernelIrqchip) -> Irqchip {
    match option {
        KernelIrqchip::Split => Irqchip::Split,
        KernelIrqchip::On => Irqchip::On,
        KernelIrqchip::Off => Irqchip::Off,
    }
}

/// The leaves for `-cpu`: all that the kernel offers for `host` and `max` (and without the option), else the model's.
fn leaves(
    kvm: &Kvm,
    cpu: Option<&str>,
    lapic: bool,
    remarks: &mut Vec<String>,
) -> Result<Vec<CpuidLeaf>, String> {
    let supported = kvm.supported_cpuid();
    let spec = cpu.unwrap_or("host");
    if matches!(spec, "host" | "max") {
        return Ok(host_model(supported, kvm.capabilities(), lapic));
    }
    let plain: Vec<Leaf> = host_model(supported, kvm.capabilities(), lapic)
        .iter()
        .map(|l| Leaf {
            function: l.leaf,
            index: l.subleaf.unwrap_or(0),
            indexed: l.subleaf.is_some(),
            registers: [l.eax, l.ebx, l.ecx, l.edx],
        })
        .collect();
    let model =
        CpuModel::parse(spec, &HostCpu::from_leaves(&plain), Accelerator::Kvm).map_err(|e| e.to_string())?;
    remarks.extend(model.warnings().iter().map(|w| format!("-cpu {spec}: {w}")));
    let leaf = |l: &Leaf| CpuidLeaf {
        leaf: l.function,
        subleaf: l.indexed.then_some(l.index),
        eax: l.registers[0],
        ebx: l.registers[1],
        ecx: l.registers[2],
        edx: l.registers[3],
    };
    Ok(model.leaves(0).iter().map(leaf).collect())
}

impl Debug {
    /// What a stop means to the debugger, if it is one of its own.
    fn why(&self, stop: &DebugStop) -> Option<Why> {
        match stop.cause {
            DebugCause::Software => {
                self.software.contains(&stop.pc).then_some(Why::Breakpoint { address: stop.pc })
            }
            DebugCause::Step => Some(Why::Step),
            DebugCause::Hardware(n) => {
                let point = self.control.hardware.get(usize::from(n)).copied().flatten()?;
                Some(match point.watch {
                    Watch::Execute => Why::Breakpoint { address: point.address },
                    watch => Why::Watch { address: point.address, is_write: watch == Watch::Write },
                })
            }
            DebugCause::Other(_) => None,
        }
    }
}

impl KvmEngine {
    /// Makes the virtual machine and its vCPUs on a board whose chips fit `option`.
    ///
    /// # Errors
    /// What KVM refuses, in words.
    pub(crate) fn new(
        kvm: &Kvm,
        pc: &Pc,
        option: KernelIrqchip,
        cpu: Option<&str>,
    ) -> Result<KvmEngine, String> {
        let irqchip = irqchip(option);
        let text = |e: KvmError| e.to_string();
        let options = VmOptions { irqchip, vcpus: pc.cpus.len() as u8, ..VmOptions::default() };
        let vm = Arc::new(KvmVm::new(kvm, options).map_err(text)?);
        vm.attach(&pc.memory, &pc.ports).map_err(text)?;
        let mut remarks = Vec::new();
        let leaves = leaves(kvm, cpu, irqchip != Irqchip::Off, &mut remarks)?;
        let mut vcpus = Vec::new();
        for n in 0..pc.cpus.len() as u8 {
            let vcpu = KvmVcpu::new(&vm, n, &leaves).map_err(text)?;
            vcpus.push((vcpu, CpuEnv::new(pc, n)));
        }
        if irqchip != Irqchip::Off {
            pc.core
                .set_apic_sink(Some(Arc::new(ToKernel { vm: vm.clone(), core: Arc::downgrade(&pc.core) })));
        }
        if irqchip == Irqchip::On {
            for n in 0..24u32 {
                let vm = vm.clone();
                let name = if n < 16 { format!("isa.irq{n}") } else { format!("gsi{n}") };
                pc.core.line(&name).connect(Arc::new(move |level: bool| {
                    // A line that can't be set would be a lost interrupt: the VM reports it when it next runs.
                    let _ = vm.set_line(Gsi(n), level);
                }));
            }
        }
        let mut engine = KvmEngine {
            core: pc.core.clone(),
            vm,
            vcpus,
            irqchip,
            remarks,
            resume: Vec::new(),
            debug: Debug::default(),
        };
        engine.collect_remarks();
        if let Some((vcpu, _)) = engine.vcpus.first()
            && let Some(hz) = vcpu.tsc_hz()
        {
            engine.core.clock.set_tsc_hz(hz);
        }
        Ok(engine)
    }

    fn collect_remarks(&mut self) {
        let mut said: Vec<String> = self.vm.take_skipped().into_iter().map(|s| s.0).collect();
        for (vcpu, _) in &mut self.vcpus {
            said.extend(vcpu.take_skipped().into_iter().map(|s| s.0));
        }
        for text in said {
            if !self.remarks.contains(&text) {
                self.remarks.push(text);
            }
        }
    }

    /// Has the processors count `hz` ticks of the time-stamp counter a second, as the machine did that a state was saved from. Gives the ticks
    /// that are to be added to each processor's offset where the kernel can't: the counter goes on from where it was, at another pace.
    pub(crate) fn set_tsc_hz(&mut self, hz: u64) -> u64 {
        let clock = &self.core.clock;
        let own = clock.tsc_hz();
        // What KVM too takes for the same (its tsc_tolerance_ppm).
        if hz.abs_diff(own) <= own / 1_000_000 * 250 {
            return 0;
        }
        if self.vcpus.iter().all(|(vcpu, _)| vcpu.set_tsc_hz(hz)) {
            clock.set_tsc_hz(hz);
            return 0;
        }
        let here = clock.tsc();
        clock.set_tsc_hz(hz);
        let there = clock.tsc();
        clock.set_tsc_hz(own);
        self.remarks.push(format!(
            "the saved guest measured a time-stamp counter of {} MHz, and this kernel or processor can't give it another than {} MHz: where the \
             guest takes time from that counter, it passes {:.2} times as fast; other clocks (HPET, ACPI PM timer) are right",
            hz / 1_000_000,
            own / 1_000_000,
            own as f64 / hz as f64
        ));
        there.wrapping_sub(here)
    }

    /// A processor's state.
    ///
    /// # Errors
    /// KVM can't give it.
    pub(crate) fn state(&mut self, index: usize) -> Result<CpuState, String> {
        let tsc = self.core.clock.tsc();
        self.vcpus[index].0.fetch(tsc).map_err(|e| e.to_string())
    }

    /// Loads a processor's state; with `keep_time` its TSC goes on from the machine's clock.
    ///
    /// # Errors
    /// KVM refuses it.
    pub(crate) fn set_state(
        &mut self,
        index: usize,
        state: &CpuState,
        page: Option<LapicPage>,
        keep_time: bool,
    ) -> Result<(), String> {
        let tsc = keep_time.then(|| self.core.clock.tsc());
        let page = page.filter(|_| self.irqchip != Irqchip::Off);
        let result = self.vcpus[index].0.load(state, page.as_ref(), tsc).map_err(|e| e.to_string());
        self.collect_remarks();
        result
    }

    /// After a reset: the local APICs in the kernel take their reset state too, as a PC's firmware leaves them when `firmware_done`.
    ///
    /// # Errors
    /// KVM refuses it.
    pub(crate) fn reset_lapics(&mut self, firmware_done: bool) -> Result<(), String> {
        if self.irqchip == Irqchip::Off {
            return Ok(());
        }
        for (n, (vcpu, _)) in self.vcpus.iter_mut().enumerate() {
            let mut chip = crate::cpu_env::lapic(n as u8);
            let mut cx = hyaline_device::Cx::new(&*self.core, &*self.core, None);
            if firmware_done {
                chip.virtual_wire(&mut cx);
            }
            let page = LapicPage(chip.page(self.core.clock.now()));
            vcpu.set_lapic(&page).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Brings a local APIC that the kernel has into one of our chips, for saving.
    ///
    /// # Errors
    /// KVM can't give it.
    pub(crate) fn lapic(&mut self, index: usize, chip: &mut Lapic) -> Result<(), String> {
        let state = self.state(index)?;
        let (vcpu, _) = &self.vcpus[index];
        let page = vcpu.lapic().map_err(|e| e.to_string())?;
        let mut cx = hyaline_device::Cx::new(&*self.core, &*self.core, None);
        let deadline = crate::cpu_env::deadline(&self.core.clock, state.msr.tsc_deadline, state.tsc_offset);
        chip.adopt(&page.0, state.msr.apic_base, deadline, &mut cx);
        Ok(())
    }

    /// Says what to stop at, with [`KvmEngine::resume`] set.
    ///
    /// # Errors
    /// KVM refuses it.
    pub(crate) fn set_debug(&mut self, control: DebugControl, software: Vec<u64>) -> Result<(), String> {
        for (n, (vcpu, _)) in self.vcpus.iter_mut().enumerate() {
            let step = self.resume.get(n) == Some(&Resume::Step);
            vcpu.set_debug(&DebugControl { step, ..control }).map_err(|e| e.to_string())?;
        }
        self.debug = Debug { control, software };
        self.collect_remarks();
        Ok(())
    }

    /// The guest-physical address of a linear one.
    pub(crate) fn translate(&self, index: usize, linear: u64) -> Option<u64> {
        self.vcpus.get(index)?.0.translate(linear)
    }

    /// Are the local APICs the kernel's?
    pub(crate) fn has_lapics(&self) -> bool {
        self.irqchip != Irqchip::Off
    }

    /// Runs all vCPUs, each on a thread of its own, until an event waits, and gives it.
    pub(crate) fn run(&mut self, ports: &[Arc<CpuPort>], ioapic: &Arc<Slot>) -> Event {
        let core = self.core.clone();
        let (vm, debug) = (&*self.vm, &self.debug);
        let mut vcpus = Vec::new();
        for (n, ((vcpu, env), port)) in self.vcpus.iter_mut().zip(ports).enumerate() {
            if self.resume.get(n) == Some(&Resume::Stay) {
                continue;
            }
            let (number, kick, core) = (n as u8, Some(vcpu.kick_handle()), &*core);
            let go_on = Box::new(move || go_on(number, vcpu, env, core, vm, ioapic, debug));
            vcpus.push(Vcpu { number, runner: Runner::Kvm, port, kick, go_on });
        }
        let event = threads::run(&core, vcpus);
        self.collect_remarks();
        event
    }
}

/// Lets one vCPU run up to its next exit that is not an access.
fn go_on(
    n: u8,
    vcpu: &mut KvmVcpu,
    env: &mut CpuEnv,
    core: &Core,
    vm: &KvmVm,
    ioapic: &Arc<Slot>,
    debug: &Debug,
) -> Next {
    match vcpu.run(env) {
        Exit::Kicked => {}
        Exit::Halted | Exit::WaitForSipi => return Next::Sleep,
        Exit::Shutdown => {
            core.event(Event::TripleFault(n));
            return Next::End;
        }
        Exit::ApicEoi { vector } => {
            ioapic.message(&ApicMessage::Eoi { vector });
        }
        Exit::Debug(stop) => match debug.why(&stop) {
            Some(why) => core.event(Event::Debug(Stopped { cpu: n, why })),
            // An INT3 of the guest's own.
            None if stop.cause == DebugCause::Software => {
                if let Err(e) = vcpu.inject_breakpoint() {
                    core.log(crate::chassis::LogKind::GuestError, "kvm", &e.to_string());
                }
            }
            None => {}
        },
        // What the kernel doesn't know gets a general-protection fault, as on a processor without it.
        Exit::ReadMsr { .. } | Exit::WriteMsr { .. } => vcpu.complete_msr(None),
        Exit::System(SystemEvent::Reset) => core.event(Event::Reset("the kernel's system event".into())),
        Exit::System(SystemEvent::Crash) => core.event(Event::GuestPanicked),
        Exit::System(SystemEvent::PowerOff) => core.event(Event::PowerOff),
        Exit::System(other) => {
            core.event(Event::Failed(format!("processor {n}: the guest asked for {other:?}")))
        }
        Exit::Failed(failure) => {
            let mut text = format!("processor {n}: {failure}");
            for e in vm.take_errors() {
                text.push_str(&format!("\n{e}"));
            }
            core.event(Event::Failed(text));
            return Next::End;
        }
    }
    Next::Again
}
