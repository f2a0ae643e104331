//! A machine as the `gdbstub` crate wants a target: processors are threads, numbered from 1.

use super::regs::{Number, Raw, X86};
use crate::monitor::Monitor;
use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use hyaline_machine::Machine;
use hyaline_machine::debug::{Points, Resume};
use hyaline_x86::Watch;
use hyaline_x86::state::CpuState;

/// What can't go on. Nothing a debugger asks is that bad.
pub(super) type Fatal = std::convert::Infallible;

pub(super) struct Guest<'m> {
    pub(super) machine: &'m mut Machine,
    pub(super) points: Points,
    pub(super) monitor: Monitor,
    /// What each processor does next.
    pub(super) resume: Vec<Resume>,
    locked: bool,
    named: Vec<(usize, Resume)>,
    /// What the last refusal was, for who reads the standard error.
    pub(super) complaint: Option<String>,
    /// Descriptions of the processors, as of the last stop.
    pub(super) about: Vec<String>,
}

/// The thread of a processor.
pub(super) fn tid(cpu: usize) -> Tid {
    Tid::new(cpu + 1).unwrap_or(Tid::MIN)
}

fn cpu(tid: Tid) -> usize {
    tid.get() - 1
}

impl<'m> Guest<'m> {
    pub(super) fn new(machine: &'m mut Machine) -> Guest<'m> {
        let monitor = Monitor::new(machine);
        Guest {
            machine,
            points: Points::default(),
            monitor,
            resume: Vec::new(),
            locked: false,
            named: Vec::new(),
            complaint: None,
            about: Vec::new(),
        }
    }

    fn state(&mut self, tid: Tid) -> TargetResult<CpuState, Self> {
        if cpu(tid) >= usize::from(self.machine.config.cpus) {
            return Err(TargetError::NonFatal);
        }
        self.machine.cpu_state(cpu(tid)).map_err(|_| TargetError::NonFatal)
    }

    fn set_state(&mut self, tid: Tid, old: CpuState, new: CpuState) -> TargetResult<(), Self> {
        if let Err(e) = self.machine.set_cpu_state(cpu(tid), new) {
            self.complaint = Some(format!("registers can't be set: {e}"));
            let _ = self.machine.set_cpu_state(cpu(tid), old);
            return Err(TargetError::NonFatal);
        }
        Ok(())
    }

    /// Takes new points to the machine, or says why not and leaves the old.
    fn change(&mut self, points: Points) -> TargetResult<bool, Self> {
        match self.machine.set_points(&points) {
            Ok(()) => {
                self.points = points;
                Ok(true)
            }
            Err(e) => {
                self.complaint = Some(e.to_string());
                Ok(false)
            }
        }
    }

    /// Forgets all breakpoints and watchpoints, and lets everybody run.
    pub(super) fn clear(&mut self) {
        let _ = self.machine.set_points(&Points::default());
        self.points = Points::default();
        let _ = self.machine.set_resume(&[]);
        self.monitor.clear();
    }

    /// What `info threads` says beside each number.
    pub(super) fn describe(&mut self) {
        let cpus = usize::from(self.machine.config.cpus);
        self.about = (0..cpus)
            .map(|n| match self.machine.cpu_state(n) {
                Ok(s) => format!(
                    "CPU#{n} {}, {}",
                    match s.activity {
                        hyaline_x86::state::Activity::Running => "running",
                        hyaline_x86::state::Activity::Halted => "halted",
                        hyaline_x86::state::Activity::WaitForSipi => "waits for start-up",
                        hyaline_x86::state::Activity::Shutdown => "shut down",
                    },
                    hyaline_machine::cpu_dump::mode(&s)
                ),
                Err(e) => format!("CPU#{n}: {e}"),
            })
            .collect();
    }
}

impl Target for Guest<'_> {
    type Arch = X86;
    type Error = Fatal;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Fatal> {
        BaseOps::MultiThread(self)
    }
    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Guest<'_> {
    fn read_registers(&mut self, regs: &mut Raw, tid: Tid) -> TargetResult<(), Self> {
        let state = self.state(tid)?;
        *regs = Raw::fetch(&state, self.machine.cr8(cpu(tid)));
        Ok(())
    }
    fn write_registers(&mut self, regs: &Raw, tid: Tid) -> TargetResult<(), Self> {
        let old = self.state(tid)?;
        let mut new = old.clone();
        regs.store(&mut new, self.machine.cr8(cpu(tid)));
        self.set_state(tid, old, new)
    }
    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }
    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let n = if self.monitor.physical {
            self.machine.read_physical(start, data)
        } else {
            self.machine.read_linear(cpu(tid), start, data)
        };
        // EFAULT.
        if n == 0 && !data.is_empty() { Err(TargetError::Errno(14)) } else { Ok(n) }
    }
    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let done = if self.monitor.physical {
            self.machine.write_physical(start, data)
        } else {
            self.machine.write_linear(cpu(tid), start, data)
        };
        done.map_err(|e| {
            self.complaint = Some(e.to_string());
            TargetError::Errno(14)
        })
    }
    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Fatal> {
        (0..usize::from(self.machine.config.cpus)).for_each(|n| thread_is_active(tid(n)));
        Ok(())
    }
    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Guest<'_> {
    fn read_register(&mut self, tid: Tid, reg_id: Number, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let state = self.state(tid)?;
        Ok(reg_id.fetch(&state, self.machine.cr8(cpu(tid)), buf))
    }
    fn write_register(&mut self, tid: Tid, reg_id: Number, val: &[u8]) -> TargetResult<(), Self> {
        if reg_id.is_cr8() {
            let class = val.first().copied().filter(|v| *v < 16).ok_or(TargetError::NonFatal)?;
            return if self.machine.set_cr8(cpu(tid), class) { Ok(()) } else { Err(TargetError::NonFatal) };
        }
        let old = self.state(tid)?;
        let mut new = old.clone();
        if !reg_id.store(&mut new, val) {
            return Err(TargetError::NonFatal);
        }
        self.set_state(tid, old, new)
    }
}

impl ThreadExtraInfo for Guest<'_> {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Fatal> {
        let text = self.about.get(cpu(tid)).map_or("", String::as_str).as_bytes();
        let n = text.len().min(buf.len());
        buf.iter_mut().zip(text).for_each(|(b, t)| *b = *t);
        Ok(n)
    }
}

impl MultiThreadResume for Guest<'_> {
    fn resume(&mut self) -> Result<(), Fatal> {
        let cpus = usize::from(self.machine.config.cpus);
        let rest = if self.locked { Resume::Stay } else { Resume::Run };
        self.resume = vec![rest; cpus];
        for (n, how) in &self.named {
            if let Some(place) = self.resume.get_mut(*n) {
                *place = *how;
            }
        }
        Ok(())
    }
    fn clear_resume_actions(&mut self) -> Result<(), Fatal> {
        self.named.clear();
        self.locked = false;
        Ok(())
    }
    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Fatal> {
        self.named.push((cpu(tid), Resume::Run));
        Ok(())
    }
    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Guest<'_> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Fatal> {
        self.named.push((cpu(tid), Resume::Step));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Guest<'_> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Fatal> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Guest<'_> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest<'_> {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let mut points = self.points.clone();
        points.software.push(addr);
        self.change(points)
    }
    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let mut points = self.points.clone();
        points.software.retain(|a| *a != addr);
        self.change(points)
    }
}

impl HwBreakpoint for Guest<'_> {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let mut points = self.points.clone();
        points.hardware.push(addr);
        self.change(points)
    }
    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let mut points = self.points.clone();
        points.hardware.retain(|a| *a != addr);
        self.change(points)
    }
}

fn watch(address: u64, len: u64, kind: WatchKind) -> Watch {
    Watch { address, len, read: kind != WatchKind::Write, write: kind != WatchKind::Read }
}

impl HwWatchpoint for Guest<'_> {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let mut points = self.points.clone();
        points.watches.push(watch(addr, len, kind));
        self.change(points)
    }
    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let mut points = self.points.clone();
        let gone = watch(addr, len, kind);
        points.watches.retain(|w| *w != gone);
        self.change(points)
    }
}

impl MonitorCmd for Guest<'_> {
    fn handle_monitor_cmd(&mut self, cmd: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Fatal> {
        let mut text = self.monitor.command(self.machine, &String::from_utf8_lossy(cmd));
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        // Pieces that fit gdb's packets.
        for piece in text.as_bytes().chunks(1024) {
            out.write_raw(piece);
            out.flush();
        }
        Ok(())
    }
}
