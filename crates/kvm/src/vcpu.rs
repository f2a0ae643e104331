//! A vCPU: making it, running it, handling its exits.

use crate::cpuid::{self, CpuidLeaf};
use crate::error::{KvmError, Skipped};
use crate::exit::{DebugStop, Exit, Failure, InternalError, SystemEvent};
use crate::kick::{KickHandle, Kicker, RunPage};
use crate::ring::{Ring, Write};
use crate::rip::{Access, Cache, Found, Mode, Window, find};
use crate::sys;
use crate::system::Kvm;
use crate::vm::{Irqchip, KvmVm, VmInner};
use hyaline_ram::RamBlock;
use hyaline_space::{Actor, AddressSpace, Cursor, ExitKind, Origin};
use hyaline_x86::env::{Env, Signals};
use hyaline_x86::state::Activity;
use kvm_bindings as kb;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// One virtual processor on KVM. Belongs to one thread at a time.
pub struct KvmVcpu {
    pub(crate) fd: kvm_ioctls::VcpuFd,
    pub(crate) kicker: Arc<Kicker>,
    pub(crate) vm: Arc<VmInner>,
    kvm: Kvm,
    index: u8,
    pub(crate) leaves: Vec<CpuidLeaf>,
    /// Running number of accesses.
    seq: u64,
    strings: [Option<StringRun>; 4],
    cache: Cache,
    memory_cursor: Cursor,
    port_cursor: Cursor,
    /// The kernel waits for the outcome of an access: the state is not complete before it is entered again.
    pending: bool,
    /// The kernel would take an external interrupt now, as of the last exit.
    pub(crate) ready: bool,
    /// What the kernel doesn't keep: HLT and start-up without its local APIC, and shutdown.
    pub(crate) activity: Activity,
    /// IA32_APIC_BASE as of the last exit, with the local APIC outside.
    pub(crate) apic_base: u64,
    /// Instructions as of the last state that was loaded: KVM counts none.
    pub(crate) icount: u64,
    /// What a debugger asked for.
    pub(crate) debug_control: u32,
    skipped: Vec<Skipped>,
    told: BTreeSet<Skipped>,
}

/// Where a REP string instruction is.
#[derive(Clone, Copy, Debug)]
struct StringRun {
    rip: u64,
    addr: u64,
    count: u32,
    /// Low half of RCX that the next exit of the same run has.
    next: u16,
}

/// What `run` does after an exit.
enum Next {
    Enter,
    Return(Exit),
}

impl KvmVcpu {
    /// Makes vCPU `index` of a machine. `leaves` are what CPUID shall answer, without topology, which is filled in for this
    /// vCPU; what the kernel can't give is taken out, and told by [`KvmVcpu::take_skipped`].
    ///
    /// # Errors
    /// The index is not below the machine's number of vCPUs, is there already, or a call fails.
    pub fn new(vm: &KvmVm, index: u8, leaves: &[CpuidLeaf]) -> Result<KvmVcpu, KvmError> {
        let options = &vm.inner.options;
        if index >= options.vcpus {
            return Err(KvmError::Unsuitable(format!(
                "vCPU {index} is not one of the machine's {}, which are counted from 0",
                options.vcpus
            )));
        }
        let what = format!("vCPU {index}");
        let fd = vm
            .inner
            .fd
            .create_vcpu(index.into())
            .map_err(|e| KvmError::ioctl("KVM_CREATE_VCPU", &what, e))?;
        let page = {
            let size = vm.kvm.inner.fd.get_vcpu_mmap_size();
            let size = size.map_err(|e| KvmError::ioctl("KVM_GET_VCPU_MMAP_SIZE", &what, e))?;
            RunPage::map(borrow(&fd), size)?
        };
        let caps = vm.kvm.capabilities();
        if caps.coalesced_mmio > 0 && options.coalesced && vm.inner.ring.get().is_none() {
            let ring = Ring::map(borrow(&fd), caps.coalesced_mmio)?;
            let _ = vm.inner.ring.set(ring);
        }
        if caps.sync_regs & kb::KVM_SYNC_X86_REGS != 0 {
            // SAFETY: a field of the run page, which only the owner of the vCPU touches.
            unsafe { (*page.get()).kvm_valid_regs = kb::KVM_SYNC_X86_REGS.into() };
        }
        let kicker = Arc::new(Kicker::new(page));
        vm.inner.gate.add(&kicker);
        let waits = !vm.inner.lapic_in_kernel() && index > 0;
        let mut vcpu = KvmVcpu {
            fd,
            kicker,
            vm: vm.inner.clone(),
            kvm: vm.kvm.clone(),
            index,
            leaves: Vec::new(),
            seq: 0,
            strings: [None; 4],
            cache: Cache::new(),
            memory_cursor: Cursor::new(),
            port_cursor: Cursor::new(),
            pending: false,
            ready: false,
            activity: if waits { Activity::WaitForSipi } else { Activity::Running },
            apic_base: 0xfee0_0800 | if index == 0 { 0x100 } else { 0 },
            icount: 0,
            debug_control: 0,
            skipped: Vec::new(),
            told: BTreeSet::new(),
        };
        vcpu.set_cpuid(leaves)?;
        vcpu.set_up_mce();
        Ok(vcpu)
    }

    fn set_cpuid(&mut self, wanted: &[CpuidLeaf]) -> Result<(), KvmError> {
        let kvm = self.kvm.clone();
        let supported = kvm.supported_cpuid();
        let (leaves, skipped) = cpuid::intersect(wanted, supported, kvm.capabilities());
        let leaves = cpuid::with_topology(&leaves, self.index.into(), self.vm.options.vcpus.into());
        skipped.into_iter().for_each(|s| self.skip(s.0));
        let set = |leaves: &[CpuidLeaf]| {
            let entries: Vec<_> = leaves.iter().map(cpuid::to_kvm).collect();
            let table = kb::CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
            self.fd.set_cpuid2(&table)
        };
        if let Err(error) = set(&leaves) {
            // The kernel takes all or nothing. Only leaves that it lists itself are certain to be taken.
            let known: Vec<_> = leaves
                .iter()
                .filter(|l| cpuid::find(supported, l.leaf, l.subleaf.unwrap_or(0)).is_some())
                .copied()
                .collect();
            set(&known).map_err(|e| {
                KvmError::ioctl(
                    "KVM_SET_CPUID2",
                    format_args!("vCPU {}, {} leaves", self.index, known.len()),
                    e,
                )
            })?;
            self.skip(format!(
                "CPUID: the kernel refused {} leaves ({error}); the guest gets the {} that the kernel lists",
                leaves.len(),
                known.len()
            ));
            self.leaves = known;
        } else {
            self.leaves = leaves;
        }
        Ok(())
    }

    /// Machine-check banks, where the model has machine checks (SDM vol. 3B §17.3.1.1: MCG_CAP bits 7-0 count the banks, bit 8 MCG_CTL).
    fn set_up_mce(&mut self) {
        let banks = self.kvm.capabilities().mce_banks.min(10);
        let has =
            cpuid::find(&self.leaves, 1, 0).is_some_and(|l| l.edx & (1 << 7 | 1 << 14) == 1 << 7 | 1 << 14);
        if banks == 0 || !has {
            return;
        }
        let cap = u64::from(banks) | 1 << 8;
        if let Err(error) = sys::ioctl_in(borrow(&self.fd), sys::SETUP_MCE, &cap) {
            self.skip(format!(
                "machine-check banks: the kernel refused {banks} of them ({error}); the guest has none"
            ));
        }
    }

    /// Number of this vCPU.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Ticks of the guest's time-stamp counter per second; None when the kernel doesn't tell.
    pub fn tsc_hz(&self) -> Option<u64> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz != 0).map(|khz| u64::from(khz) * 1000)
    }

    /// Changes them; false when the kernel or the processor can't.
    pub fn set_tsc_hz(&self, hz: u64) -> bool {
        u32::try_from(hz / 1000).is_ok_and(|khz| self.fd.set_tsc_khz(khz).is_ok())
    }

    /// What CPUID answers this vCPU.
    pub fn cpuid(&self) -> &[CpuidLeaf] {
        &self.leaves
    }

    /// The handle by which other threads interrupt this vCPU.
    pub fn kick_handle(&self) -> KickHandle {
        KickHandle(self.kicker.clone())
    }

    /// What the kernel refused since the last call and was done without; each sentence is told once.
    pub fn take_skipped(&mut self) -> Vec<Skipped> {
        std::mem::take(&mut self.skipped)
    }

    pub(crate) fn skip(&mut self, text: String) {
        let entry = Skipped(text);
        if self.told.len() < 1000 && self.told.insert(entry.clone()) {
            self.skipped.push(entry);
        }
    }

    /// Number of accesses that this vCPU has made.
    pub fn accesses(&self) -> u64 {
        self.seq
    }

    pub(crate) fn call(&self, call: &'static str, error: kvm_ioctls::Error) -> KvmError {
        KvmError::ioctl(call, format_args!("vCPU {}", self.index), error)
    }

    pub(crate) fn io_call(&self, call: &'static str, error: io::Error) -> KvmError {
        KvmError::call(call, format_args!("vCPU {}", self.index), error)
    }

    /// Runs the guest until something needs the machine. Accesses to ports and memory are made through `env`, from this
    /// thread, one after the other in the guest's order.
    pub fn run(&mut self, env: &mut dyn Env) -> Exit {
        let _bound = self.kicker.bind();
        loop {
            // First clear the doorbell, then look: see the protocol in `kick`.
            self.kicker.clear();
            if self.pending {
                // The access must be completed before anything else, without running on if somebody waits.
                if self.kicker.stop_wanted()
                    || env.signals().pending() & Signals::KICK != 0
                    || self.vm.has_failed()
                {
                    self.kicker.ring_own();
                }
                if let Err(error) = self.offer_interrupt(env) {
                    return Exit::Failed(Box::new(Failure::Call(error)));
                }
            } else {
                match self.before_entry(env) {
                    Ok(None) => {}
                    Ok(Some(exit)) => return exit,
                    Err(error) => return Exit::Failed(Box::new(Failure::Call(error))),
                }
            }
            let result = self.enter();
            self.pending = false;
            self.after_exit(env);
            let next = match result {
                Ok(()) => self.handle(env),
                // Interrupted, or woken out of waiting for a start-up IPI.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => Next::Enter,
                Err(error) => Next::Return(Exit::Failed(Box::new(self.run_failure(error)))),
            };
            match next {
                Next::Enter => {}
                Next::Return(exit) => return exit,
            }
        }
    }

    fn enter(&mut self) -> io::Result<()> {
        self.vm.gate.enter(&self.kicker);
        let result = sys::ioctl_value(borrow(&self.fd), sys::RUN, 0);
        self.vm.gate.leave(&self.kicker);
        result.map(|_| ())
    }

    /// Has the kernel complete what the last exit was about, without running the guest further: for who wants the state. Between runs
    /// that can only be an MSR exit.
    pub(crate) fn complete(&mut self) -> Result<(), KvmError> {
        if std::mem::take(&mut self.pending) {
            self.kicker.ring_own();
            match self.enter() {
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => {
                    return Err(self.io_call("KVM_RUN", error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn run_failure(&mut self, error: io::Error) -> Failure {
        // SAFETY: fields of the run page; the kernel isn't in this vCPU now.
        let (reason, fault) = unsafe {
            let run = self.kicker.page.get();
            ((*run).exit_reason, (*run).__bindgen_anon_1.memory_fault)
        };
        match error.raw_os_error() {
            Some(libc::EFAULT | libc::EHWPOISON) if reason == kb::KVM_EXIT_MEMORY_FAULT => {
                Failure::Memory { address: fault.gpa, size: fault.size, error }
            }
            _ => Failure::Call(self.io_call("KVM_RUN", error)),
        }
    }

    /// What is to be done before the guest goes on; a reason not to.
    fn before_entry(&mut self, env: &mut dyn Env) -> Result<Option<Exit>, KvmError> {
        if self.vm.has_failed() {
            return Ok(Some(Exit::Failed(Box::new(Failure::Map))));
        }
        let mut signals = env.signals().pending();
        if self.kicker.take_stop() || signals & Signals::KICK != 0 {
            env.signals().clear(Signals::KICK);
            return Ok(Some(Exit::Kicked));
        }
        if signals & (Signals::INIT | Signals::SIPI) != 0 {
            self.init_and_startup(env)?;
            signals = env.signals().pending();
        }
        match self.activity {
            Activity::Shutdown => return Ok(Some(Exit::Shutdown)),
            Activity::WaitForSipi if !self.vm.lapic_in_kernel() => return Ok(Some(Exit::WaitForSipi)),
            _ => {}
        }
        if signals & Signals::NMI != 0 {
            env.signals().clear(Signals::NMI);
            self.fd.nmi().map_err(|e| self.call("KVM_NMI", e))?;
            self.wake();
        }
        if signals & Signals::SMI != 0 {
            env.signals().clear(Signals::SMI);
            if self.kvm.capabilities().smm {
                self.fd.smi().map_err(|e| self.call("KVM_SMI", e))?;
                self.wake();
            } else {
                self.skip("a system-management interrupt was dropped: this kernel's KVM has no system-management mode".into());
            }
        }
        self.offer_interrupt(env)?;
        if self.activity == Activity::Halted && !self.vm.lapic_in_kernel() {
            return Ok(Some(Exit::Halted));
        }
        Ok(None)
    }

    fn wake(&mut self) {
        if self.activity == Activity::Halted {
            self.activity = Activity::Running;
        }
    }

    /// Hands an interrupt of controllers outside of the kernel to the guest, or asks to be told when the guest can take it. Also
    /// while the kernel waits for the outcome of an access: it completes that first.
    fn offer_interrupt(&mut self, env: &mut dyn Env) -> Result<(), KvmError> {
        if self.vm.options.irqchip == Irqchip::On {
            return Ok(());
        }
        if !self.vm.lapic_in_kernel() {
            // SAFETY: a field of the run page that only the owner of the vCPU touches.
            unsafe { (*self.kicker.page.get()).cr8 = env.cr8().into() };
        }
        let mut window = false;
        if env.signals().pending() & Signals::INTERRUPT != 0 {
            if self.ready {
                if let Some(vector) = env.acknowledge() {
                    let request = kb::kvm_interrupt { irq: vector.into() };
                    match sys::ioctl_in(borrow(&self.fd), sys::INTERRUPT, &request) {
                        Ok(_) => {}
                        Err(error) => {
                            let what = format_args!("vector {vector:#x}");
                            return Err(KvmError::call("KVM_INTERRUPT", what, error));
                        }
                    }
                    self.ready = false;
                    self.wake();
                    window = env.signals().pending() & Signals::INTERRUPT != 0;
                }
            } else {
                window = true;
            }
        }
        // SAFETY: a field of the run page that only the owner of the vCPU touches.
        unsafe { (*self.kicker.page.get()).request_interrupt_window = window.into() };
        Ok(())
    }

    /// What every exit brings along.
    fn after_exit(&mut self, env: &mut dyn Env) {
        // SAFETY: fields of the run page that only the owner of the vCPU touches; the kernel isn't in this vCPU now.
        let (ready, flag, cr8, apic_base) = unsafe {
            let run = self.kicker.page.get();
            ((*run).ready_for_interrupt_injection, (*run).if_flag, (*run).cr8, (*run).apic_base)
        };
        self.ready = ready != 0 && flag != 0;
        if !self.vm.lapic_in_kernel() {
            if cr8 as u8 != env.cr8() {
                env.set_cr8(cr8 as u8);
            }
            if apic_base != self.apic_base {
                self.apic_base = apic_base;
                env.set_apic_base(apic_base);
            }
        }
        self.drain(env);
    }

    /// Makes the writes that the kernel collected, which came before what the exit tells.
    fn drain(&mut self, env: &mut dyn Env) {
        let vm = self.vm.clone();
        let Some(ring) = vm.ring.get() else { return };
        ring.drain(|Write { addr, port, data, len }| {
            let exit = if port { ExitKind::PioOut } else { ExitKind::MmioWrite };
            // Which instruction it was, and of which vCPU, the kernel doesn't keep.
            let who = self.origin(exit, 0, 0);
            let space = if port { env.ports() } else { env.memory() };
            store(space, &mut Cursor::new(), addr, &data[..len], &who);
        });
    }

    fn handle(&mut self, env: &mut dyn Env) -> Next {
        let run = self.kicker.page.get();
        // SAFETY: fields of the run page; the kernel isn't in this vCPU now. The exit reason tells which member of the union
        // the kernel filled; all are plain integers.
        unsafe {
            match (*run).exit_reason {
                kb::KVM_EXIT_IO => {
                    let io = (*run).__bindgen_anon_1.io;
                    self.port_exit(env, &io)
                }
                kb::KVM_EXIT_MMIO => {
                    let mmio = (*run).__bindgen_anon_1.mmio;
                    self.memory_exit(env, mmio.phys_addr, mmio.data, mmio.len, mmio.is_write != 0)
                }
                kb::KVM_EXIT_HLT => {
                    self.activity = Activity::Halted;
                    Next::Enter
                }
                kb::KVM_EXIT_IRQ_WINDOW_OPEN
                | kb::KVM_EXIT_INTR
                | kb::KVM_EXIT_SET_TPR
                | kb::KVM_EXIT_TPR_ACCESS => Next::Enter,
                kb::KVM_EXIT_SHUTDOWN => {
                    self.activity = Activity::Shutdown;
                    Next::Return(Exit::Shutdown)
                }
                kb::KVM_EXIT_IOAPIC_EOI => {
                    Next::Return(Exit::ApicEoi { vector: (*run).__bindgen_anon_1.eoi.vector })
                }
                kb::KVM_EXIT_DEBUG => {
                    let arch = (*run).__bindgen_anon_1.debug.arch;
                    Next::Return(Exit::Debug(DebugStop::new(&arch)))
                }
                kb::KVM_EXIT_X86_RDMSR => {
                    self.pending = true;
                    Next::Return(Exit::ReadMsr { index: (*run).__bindgen_anon_1.msr.index })
                }
                kb::KVM_EXIT_X86_WRMSR => {
                    self.pending = true;
                    let msr = (*run).__bindgen_anon_1.msr;
                    Next::Return(Exit::WriteMsr { index: msr.index, value: msr.data })
                }
                kb::KVM_EXIT_SYSTEM_EVENT => {
                    let event = (*run).__bindgen_anon_1.system_event;
                    let data = event.__bindgen_anon_1.data;
                    let data = data.get(..event.ndata as usize).unwrap_or(&data);
                    Next::Return(Exit::System(SystemEvent::new(event.type_, data)))
                }
                kb::KVM_EXIT_INTERNAL_ERROR => {
                    let internal = (*run).__bindgen_anon_1.internal;
                    let failure = (*run).__bindgen_anon_1.emulation_failure;
                    let insn = failure.__bindgen_anon_1.__bindgen_anon_1;
                    let has_bytes = internal.suberror == kb::KVM_INTERNAL_ERROR_EMULATION
                        && internal.ndata >= 3
                        && failure.flags & u64::from(kb::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
                            != 0;
                    let bytes = insn.insn_bytes.get(..insn.insn_size.into()).unwrap_or(&insn.insn_bytes);
                    let bytes = if has_bytes { bytes.to_vec() } else { Vec::new() };
                    let data =
                        internal.data.get(..internal.ndata as usize).unwrap_or(&internal.data).to_vec();
                    let error = self.internal_error(env, internal.suberror, data, bytes);
                    Next::Return(Exit::Failed(Box::new(Failure::Internal(error))))
                }
                kb::KVM_EXIT_FAIL_ENTRY => {
                    let entry = (*run).__bindgen_anon_1.fail_entry;
                    let registers = self.registers_text();
                    Next::Return(Exit::Failed(Box::new(Failure::Entry {
                        reason: entry.hardware_entry_failure_reason,
                        cpu: entry.cpu,
                        registers,
                    })))
                }
                reason => {
                    let hardware = (*run).__bindgen_anon_1.hw.hardware_exit_reason;
                    Next::Return(Exit::Failed(Box::new(Failure::Unknown { reason, hardware })))
                }
            }
        }
    }

    fn internal_error(
        &mut self,
        env: &mut dyn Env,
        suberror: u32,
        data: Vec<u64>,
        mut bytes: Vec<u8>,
    ) -> InternalError {
        let registers = self.registers_text();
        let (address, bits) = match (self.fd.get_sregs(), self.fd.get_regs()) {
            (Ok(sregs), Ok(regs)) => {
                let mode = Mode::of(&sregs);
                let address = mode.linear(regs.rip);
                if bytes.is_empty() {
                    bytes = self.code(env.memory(), address, 15).0;
                }
                (address, mode.bits)
            }
            _ => (0, 64),
        };
        InternalError { suberror, data, address, bytes, bits, registers }
    }

    fn origin(&mut self, exit: ExitKind, rip: u64, count: u32) -> Origin {
        let seq = self.seq;
        self.seq += 1;
        Origin { actor: Actor::Vcpu(self.index), exit, rip, count, seq }
    }

    fn port_exit(&mut self, env: &mut dyn Env, io: &kb::kvm_run__bindgen_ty_1__bindgen_ty_4) -> Next {
        let size = usize::from(io.size);
        let is_write = u32::from(io.direction) == kb::KVM_EXIT_IO_OUT;
        let exit = if is_write { ExitKind::PioOut } else { ExitKind::PioIn };
        let access = Access { port: true, is_write, addr: io.port.into(), size: io.size };
        let (found, base) = self.instruction(env.memory(), &access, io.count);
        self.pending = true;
        for element in 0..io.count {
            let offset = io.data_offset as usize + element as usize * size;
            let mut data = [0u8; 8];
            let Some(data) = data.get_mut(..size) else { break };
            let who = self.origin(exit, found.rip, base.wrapping_add(element));
            if is_write {
                if !self.kicker.page.read(offset, data) {
                    break;
                }
                store(env.ports(), &mut self.port_cursor, access.addr, data, &who);
            } else {
                load(env.ports(), &mut self.port_cursor, access.addr, data, &who);
                if !self.kicker.page.write(offset, data) {
                    break;
                }
            }
        }
        Next::Enter
    }

    fn memory_exit(
        &mut self,
        env: &mut dyn Env,
        addr: u64,
        mut data: [u8; 8],
        len: u32,
        is_write: bool,
    ) -> Next {
        let len = (len as usize).min(8);
        let access = Access { port: false, is_write, addr, size: len as u8 };
        let (found, count) = self.instruction(env.memory(), &access, 1);
        let exit = if is_write { ExitKind::MmioWrite } else { ExitKind::MmioRead };
        let who = self.origin(exit, found.rip, count);
        self.pending = true;
        if is_write {
            store(env.memory(), &mut self.memory_cursor, addr, &data[..len], &who);
        } else {
            load(env.memory(), &mut self.memory_cursor, addr, &mut data[..len], &who);
            // SAFETY: the union's member that the kernel filled, and reads when it is entered again.
            unsafe { (*self.kicker.page.get()).__bindgen_anon_1.mmio.data = data };
        }
        Next::Enter
    }

    /// The general registers as of the last exit.
    fn regs(&self) -> Option<kb::kvm_regs> {
        if self.kvm.capabilities().sync_regs & kb::KVM_SYNC_X86_REGS != 0 {
            // SAFETY: the kernel filled the member at the exit, since `kvm_valid_regs` asks for it; plain integers.
            return Some(unsafe { (*self.kicker.page.get()).s.regs.regs });
        }
        self.fd.get_regs().ok()
    }

    /// The instruction behind an exit, and for string instructions the number of its first element.
    fn instruction(&mut self, memory: &AddressSpace, access: &Access, elements: u32) -> (Found, u32) {
        let Some(regs) = self.regs() else { return (Found { rip: 0, rep: false }, 0) };
        let found = match self.cache.get(regs.rip, access) {
            Some(found) => found,
            None => self.find_instruction(memory, access, &regs),
        };
        let kind = usize::from(access.port) << 1 | usize::from(access.is_write);
        if !found.rep {
            self.strings = [None; 4];
            return (found, 0);
        }
        let rcx = regs.rcx as u16;
        let at_port = if access.port { access.addr } else { 0 };
        let run = self.strings[kind].filter(|run| (run.rip, run.addr, run.next) == (found.rip, at_port, rcx));
        let count = run.map_or(0, |run| run.count);
        self.strings[kind] = Some(StringRun {
            rip: found.rip,
            addr: at_port,
            count: count.wrapping_add(elements),
            next: rcx.wrapping_sub(elements as u16),
        });
        (found, count)
    }

    fn find_instruction(&mut self, memory: &AddressSpace, access: &Access, regs: &kb::kvm_regs) -> Found {
        let Ok(sregs) = self.fd.get_sregs() else { return Found { rip: regs.rip, rep: false } };
        let mode = Mode::of(&sregs);
        let linear = mode.linear(regs.rip);
        let behind = if mode.bits == 64 { 15 } else { regs.rip.min(15) };
        let (before, start) = self.code(memory, linear.wrapping_sub(behind), behind as usize);
        let (at, here) = self.code(memory, linear, 15);
        // Only all of what is before the pointer is worth anything.
        let before = if before.len() as u64 == behind { before } else { self.tail(memory, linear, behind) };
        let window = Window { before, at };
        let (found, sure) = find(access, regs, &mode, &window, self.kvm.rules());
        if sure && window.before.len() as u64 == behind {
            // In one piece of one block?
            let code = start.zip(here).and_then(|((first, offset), (second, next))| {
                (Arc::ptr_eq(&first, &second) && next == offset + behind).then_some((first, offset))
            });
            self.cache.put(regs.rip, access, &window, code, found);
        }
        found
    }

    /// The bytes before `linear` on its own page, when the page before isn't there.
    fn tail(&mut self, memory: &AddressSpace, linear: u64, behind: u64) -> Vec<u8> {
        let on_page = (linear & 0xfff).min(behind);
        self.code(memory, linear.wrapping_sub(on_page), on_page as usize).0
    }

    /// Up to `len` bytes of guest memory at a linear address, and where the first of them is in memory of ours. Stops where nothing is mapped
    /// or no memory is.
    fn code(
        &self,
        memory: &AddressSpace,
        linear: u64,
        len: usize,
    ) -> (Vec<u8>, Option<(Arc<RamBlock>, u64)>) {
        let mut bytes = Vec::with_capacity(len);
        let mut first = None;
        while bytes.len() < len {
            let at = linear.wrapping_add(bytes.len() as u64);
            let Ok(translation) = self.fd.translate_gva(at) else { break };
            if translation.valid == 0 {
                break;
            }
            let Some(section) = memory.lookup(translation.physical_address) else { break };
            let Some(host) = &section.host else { break };
            let in_page = 4096 - (at & 0xfff);
            let in_section = section.range.last - section.range.start + 1;
            let n = (len - bytes.len()).min(in_page.min(in_section.max(1)) as usize);
            let from = bytes.len();
            bytes.resize(from + n, 0);
            if host.block.read(host.offset, &mut bytes[from..]).is_err() {
                bytes.truncate(from);
                break;
            }
            first.get_or_insert_with(|| (host.block.clone(), host.offset));
        }
        (bytes, first)
    }

    /// The guest-physical address of a linear one by the vCPU's page tables, whatever the permissions.
    pub fn translate(&self, linear: u64) -> Option<u64> {
        self.fd.translate_gva(linear).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
    }

    /// Answers the last [`Exit::ReadMsr`] (with the value) or [`Exit::WriteMsr`] (the value is ignored): None gives the guest a
    /// general-protection fault.
    pub fn complete_msr(&mut self, answer: Option<u64>) {
        // SAFETY: fields of the run page; the kernel looks at them when it is entered next, if the last exit was about an MSR.
        unsafe {
            let run = self.kicker.page.get();
            if matches!((*run).exit_reason, kb::KVM_EXIT_X86_RDMSR | kb::KVM_EXIT_X86_WRMSR) {
                (*run).__bindgen_anon_1.msr.error = answer.is_none().into();
                if (*run).exit_reason == kb::KVM_EXIT_X86_RDMSR {
                    (*run).__bindgen_anon_1.msr.data = answer.unwrap_or(0);
                }
            }
        }
    }
}

pub(crate) fn borrow(fd: &kvm_ioctls::VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open as long as `fd` is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn store(space: &AddressSpace, cursor: &mut Cursor, addr: u64, data: &[u8], who: &Origin) {
    let mut bytes = [0u8; 8];
    if let (1 | 2 | 4 | 8, Some(low)) = (data.len(), bytes.get_mut(..data.len())) {
        low.copy_from_slice(data);
        // What came of it is in the access's record.
        let _ = space.store_with(cursor, addr, data.len() as u8, u64::from_le_bytes(bytes), who);
    } else {
        // A part of an access that crosses a page.
        let _ = space.write(addr, data, who);
    }
}

fn load(space: &AddressSpace, cursor: &mut Cursor, addr: u64, data: &mut [u8], who: &Origin) {
    if let 1 | 2 | 4 | 8 = data.len() {
        let (value, _) = space.load_with(cursor, addr, data.len() as u8, who);
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    } else {
        let _ = space.read(addr, data, who);
    }
}
