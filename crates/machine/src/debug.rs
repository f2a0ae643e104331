//! A debugger's hold on a machine: where to stop, who runs how, registers, and memory without side effects.

use crate::chassis::Event;
use crate::machine::{Engine, Machine, MachineError};
use hyaline_device::Device;
use hyaline_devices::intc::lapic::{self, Lapic};
use hyaline_kvm::{DebugControl, HardwareBreak, Watch as KvmWatch};
use hyaline_space::Origin;
use hyaline_x86::Watch;
use hyaline_x86::state::CpuState;

/// Why a debugger got control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// The processor.
    pub cpu: u8,
    /// Why.
    pub why: Why,
}

/// See [`Stopped`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// A breakpoint is at the present instruction.
    Breakpoint {
        /// Its linear address.
        address: u64,
    },
    /// Watched memory was accessed by the instruction before.
    Watch {
        /// The first watched linear address that was accessed; on KVM the first that is watched.
        address: u64,
        /// Was it written? On KVM, which does not tell, whether the watchpoint is for writes only.
        is_write: bool,
    },
    /// One instruction was executed.
    Step,
    /// An access to a device that was waited for; the text tells it.
    Access(String),
}

/// What one processor does when the machine runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// Runs.
    #[default]
    Run,
    /// Executes one instruction, with interrupts held back.
    Step,
    /// Stays where it is.
    Stay,
}

/// Where to stop. All addresses are linear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Points {
    /// Breakpoints that may be put into memory (KVM: INT3 where the page is mapped, else a debug register).
    pub software: Vec<u64>,
    /// Breakpoints that must not (KVM: debug registers).
    pub hardware: Vec<u64>,
    /// Watched memory (KVM: debug registers).
    pub watches: Vec<Watch>,
}

/// KVM: what is in force.
#[derive(Debug, Default)]
pub(crate) struct Planted {
    /// INT3 in memory: linear address, guest-physical address, the byte that was there.
    patches: Vec<(u64, u64, u8)>,
    /// Debug registers.
    registers: [Option<HardwareBreak>; 4],
}

const INT3: u8 = 0xcc;

fn no(text: impl Into<String>) -> MachineError {
    MachineError::Accel(text.into())
}

/// The debug registers that watch a range: whole aligned pieces.
fn pieces(watch: &Watch) -> Vec<HardwareBreak> {
    // There is no debug register condition for reads alone.
    let kind = if watch.read { KvmWatch::ReadWrite } else { KvmWatch::Write };
    let (mut at, mut left) = (watch.address, watch.len);
    let mut all = Vec::new();
    while left > 0 && all.len() < 5 {
        let length = [8u64, 4, 2, 1].into_iter().find(|n| at % n == 0 && *n <= left).unwrap_or(1);
        all.push(HardwareBreak { address: at, watch: kind, length: length as u8 });
        at = at.wrapping_add(length);
        left -= length;
    }
    all
}

impl Machine {
    /// Sets where to stop, in place of what was set before.
    ///
    /// # Errors
    /// On KVM: more than four debug registers would be needed, or an INT3 can't be put where it is wanted. Nothing is changed then.
    pub fn set_points(&mut self, points: &Points) -> Result<(), MachineError> {
        if let Engine::Interp(interp) = &mut self.engine {
            let all: Vec<u64> = points.software.iter().chain(&points.hardware).copied().collect();
            interp.set_stops(&all, &points.watches);
            return Ok(());
        }
        let mut wanted: Vec<HardwareBreak> = points.watches.iter().flat_map(pieces).collect();
        let execute = |address: u64| HardwareBreak { address, watch: KvmWatch::Execute, length: 1 };
        wanted.extend(points.hardware.iter().map(|a| execute(*a)));
        let mut patches = Vec::new();
        let old = std::mem::take(&mut self.planted);
        for address in &points.software {
            if let Some(kept) = old.patches.iter().find(|(a, ..)| a == address) {
                patches.push((*kept, false));
            } else if let Some((physical, byte)) = self.patchable(*address) {
                patches.push(((*address, physical, byte), true));
            } else {
                wanted.push(execute(*address));
            }
        }
        if wanted.len() > 4 {
            self.planted = old;
            return Err(no(format!(
                "{} debug registers would be needed and there are 4: breakpoints at addresses that are not mapped, hardware breakpoints and \
                 watchpoints share them; delete some, or debug on the software CPU (-accel interp), which has no such limit",
                wanted.len()
            )));
        }
        for (address, physical, byte) in &old.patches {
            if !patches.iter().any(|((a, ..), _)| a == address) {
                self.unpatch(*physical, *byte);
            }
        }
        for ((_, physical, _), fresh) in &patches {
            if *fresh {
                let _ = self.pc.memory.write(*physical, &[INT3], &Origin::DEBUGGER);
            }
        }
        let mut registers = [None; 4];
        registers.iter_mut().zip(wanted).for_each(|(r, w)| *r = Some(w));
        self.planted = Planted { patches: patches.into_iter().map(|(p, _)| p).collect(), registers };
        Ok(())
    }

    /// Says who runs how from now on, by number; who isn't named runs.
    ///
    /// # Errors
    /// KVM: debugging is refused.
    pub fn set_resume(&mut self, resume: &[Resume]) -> Result<(), MachineError> {
        match &mut self.engine {
            Engine::Interp(interp) => interp.set_resume(resume),
            Engine::Kvm(kvm) => {
                kvm.resume = resume.to_vec();
                let software: Vec<u64> = self.planted.patches.iter().map(|(a, ..)| *a).collect();
                let control = DebugControl {
                    step: false,
                    block_interrupts: true,
                    software: !software.is_empty(),
                    hardware: self.planted.registers,
                };
                kvm.set_debug(control, software).map_err(MachineError::Accel)?;
            }
        }
        // Stops that were met and not told yet: breakpoints and steps are met again if they still mean something.
        self.core.retain_events(|e| {
            !matches!(e, Event::Debug(Stopped { why: Why::Breakpoint { .. } | Why::Step, .. }) | Event::Stop)
        });
        Ok(())
    }

    /// Where an INT3 for a linear address would go, and what is there.
    fn patchable(&mut self, linear: u64) -> Option<(u64, u8)> {
        let cpus = usize::from(self.config.cpus);
        let physical = (0..cpus).find_map(|n| self.translate(n, linear))?;
        let section = self.pc.memory.lookup(physical).filter(|s| s.is_ram())?;
        let host = section.host?;
        let mut byte = [0];
        host.block.read(host.offset, &mut byte).ok()?;
        Some((physical, byte[0]))
    }

    fn unpatch(&self, physical: u64, byte: u8) {
        let mut now = [0];
        // The guest may have put something else there meanwhile (a reset, a new kernel).
        if self.read_physical(physical, &mut now) == 1 && now == [INT3] {
            let _ = self.pc.memory.write(physical, &[byte], &Origin::DEBUGGER);
        }
    }

    /// Replaces a processor's state.
    ///
    /// # Errors
    /// KVM refuses it: the machine should not run then.
    pub fn set_cpu_state(&mut self, index: usize, state: CpuState) -> Result<(), MachineError> {
        match &mut self.engine {
            Engine::Interp(interp) => interp.set_state(index, state),
            Engine::Kvm(kvm) => kvm.set_state(index, &state, None, false).map_err(MachineError::Accel)?,
        }
        Ok(())
    }

    /// The guest-physical address of a linear one by a processor's page tables, whatever the permissions and without any effect.
    pub fn translate(&mut self, cpu: usize, linear: u64) -> Option<u64> {
        match &mut self.engine {
            Engine::Interp(interp) => interp.physical(cpu, linear),
            Engine::Kvm(kvm) => kvm.translate(cpu, linear),
        }
    }

    /// Reads guest-physical memory up to the first byte that is neither RAM nor ROM; gives how many bytes were read. Devices are never asked.
    /// Breakpoints that were put into memory are not seen.
    pub fn read_physical(&self, address: u64, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buf.len() {
            let Some(at) = address.checked_add(done as u64) else { break };
            let Some(section) = self.pc.memory.lookup(at) else { break };
            let Some(host) = section.host else { break };
            let len = (buf.len() - done)
                .min(usize::try_from(section.range.last - at).unwrap_or(usize::MAX - 1) + 1);
            let Some(part) = buf.get_mut(done..done + len) else { break };
            if host.block.read(host.offset, part).is_err() {
                break;
            }
            done += len;
        }
        for (_, physical, byte) in &self.planted.patches {
            let at =
                physical.checked_sub(address).and_then(|n| usize::try_from(n).ok()).filter(|n| *n < done);
            if let Some(place) = at.and_then(|n| buf.get_mut(n)).filter(|b| **b == INT3) {
                *place = *byte;
            }
        }
        done
    }

    /// Writes guest-physical memory, ROM too.
    ///
    /// # Errors
    /// Not all of it is RAM or ROM: nothing was written.
    pub fn write_physical(&self, address: u64, data: &[u8]) -> Result<(), MachineError> {
        let mut there = vec![0; data.len()];
        let readable = self.read_physical(address, &mut there);
        if readable < data.len() {
            let at = address.wrapping_add(readable as u64);
            return Err(no(format!(
                "guest-physical address {at:#x} ({at}) is neither RAM nor ROM; devices are not written to by a debugger"
            )));
        }
        self.pc.memory.write(address, data, &Origin::DEBUGGER).map_err(|e| no(e.to_string()))
    }

    /// Reads memory at a linear address by a processor's page tables; gives how many bytes could be read.
    pub fn read_linear(&mut self, cpu: usize, address: u64, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buf.len() {
            let at = address.wrapping_add(done as u64);
            let len = ((0x1000 - (at & 0xfff)) as usize).min(buf.len() - done);
            let Some(physical) = self.translate(cpu, at) else { break };
            let Some(part) = buf.get_mut(done..done + len) else { break };
            let n = self.read_physical(physical, part);
            done += n;
            if n < len {
                break;
            }
        }
        done
    }

    /// Writes memory at a linear address by a processor's page tables, whatever the permissions.
    ///
    /// # Errors
    /// Something is not mapped, or neither RAM nor ROM: nothing of that page, and of those after it, was written.
    pub fn write_linear(&mut self, cpu: usize, address: u64, data: &[u8]) -> Result<(), MachineError> {
        let mut rest = data;
        let mut at = address;
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(((0x1000 - (at & 0xfff)) as usize).min(rest.len()));
            let physical = self.translate(cpu, at).ok_or_else(|| {
                no(format!("linear address {at:#x} is not mapped by the page tables of processor {cpu}"))
            })?;
            self.write_physical(physical, part)?;
            at = at.wrapping_add(part.len() as u64);
            rest = tail;
        }
        Ok(())
    }

    /// Looks at a processor's local APIC, wherever it is; None if the kernel can't give it or there is none.
    pub fn with_lapic<R>(&mut self, cpu: usize, look: impl FnOnce(&dyn Device) -> R) -> Option<R> {
        if let Some(slot) = self.pc.lapics.get(cpu) {
            return Some(slot.inspect(look));
        }
        let Engine::Kvm(kvm) = &mut self.engine else { return None };
        if !kvm.has_lapics() {
            return None;
        }
        let mut chip = crate::cpu_env::lapic(cpu as u8);
        kvm.lapic(cpu, &mut chip).ok()?;
        Some(look(&chip))
    }

    /// CR8 of a processor: the class of its local APIC's task priority, 0 without one.
    pub fn cr8(&mut self, cpu: usize) -> u8 {
        self.with_lapic(cpu, |d| d.peek(0, &lapic::TPR)).flatten().map_or(0, |tpr| (tpr >> 4 & 15) as u8)
    }

    /// Sets CR8 of a processor whose local APIC is ours; false on others.
    pub fn set_cr8(&mut self, cpu: usize, value: u8) -> bool {
        let Some(slot) = self.pc.lapics.get(cpu) else { return false };
        let set = |d: &mut dyn Device, cx: &mut hyaline_device::Cx<'_>| {
            d.as_any().and_then(|a| a.downcast_mut::<Lapic>()).map(|l| l.set_cr8(value & 15, cx)).is_some()
        };
        slot.with(set).unwrap_or(false)
    }

    /// Which chips the kernel has in our place, in words; None: none.
    pub fn chips_in_kernel(&self) -> Option<&'static str> {
        match (&self.engine, self.pc.lapics.is_empty(), self.config.irqchip) {
            (Engine::Interp(_), ..) | (_, false, _) => None,
            (Engine::Kvm(kvm), ..) if !kvm.has_lapics() => None,
            (.., crate::config::KernelIrqchip::On) => Some("local APICs, I/O APIC, 8259 pair and 8254"),
            _ => Some("local APICs"),
        }
    }
}
