//! A tiny machine for tests: RAM, ROM, a device page, all ports, and an environment that keeps a log.
#![allow(dead_code, unreachable_pub)]

use hyaline_kvm::{Exit, Irqchip, Kvm, KvmVcpu, KvmVm, VmOptions, cpuid};
use hyaline_ram::RamBlock;
use hyaline_space::{AddressSpace, ExitKind, Io, IoError, Limits, Origin, Region};
use hyaline_x86::env::{Env, Signals};
use hyaline_x86::state::{CpuState, Seg, Segment};
use std::sync::{Arc, Mutex};

/// KVM, or None after saying why not. With HYALINE_REQUIRE_KVM=1 its absence is a failure.
pub fn kvm(test: &str) -> Option<Kvm> {
    match Kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            assert!(std::env::var("HYALINE_REQUIRE_KVM").as_deref() != Ok("1"), "{test}: {error}");
            // A line of its own, also where the test harness writes without an end of line.
            println!("\nSKIPPED: {test}: /dev/kvm: {error}");
            None
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub exit: ExitKind,
    pub addr: u64,
    pub size: u8,
    pub value: u64,
    pub rip: u64,
    pub count: u32,
}

pub type Log = Arc<Mutex<Vec<Entry>>>;

/// Answers reads with a running byte pattern, and keeps a log.
struct Recorder {
    base: u64,
    log: Log,
    limits: Limits,
}

pub fn answer(addr: u64, size: u8) -> u64 {
    let all = 0x8877_6655_4433_2211u64.wrapping_add(addr << 8);
    if size == 8 { all } else { all & ((1 << (8 * size)) - 1) }
}

impl Io for Recorder {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn read(&self, offset: u64, size: u8, who: &Origin) -> Result<u64, IoError> {
        let addr = self.base + offset;
        let value = answer(addr, size);
        self.log.lock().unwrap().push(Entry {
            exit: who.exit,
            addr,
            size,
            value,
            rip: who.rip,
            count: who.count,
        });
        Ok(value)
    }
    fn write(&self, offset: u64, size: u8, value: u64, who: &Origin) -> Result<(), IoError> {
        let addr = self.base + offset;
        self.log.lock().unwrap().push(Entry {
            exit: who.exit,
            addr,
            size,
            value,
            rip: who.rip,
            count: who.count,
        });
        Ok(())
    }
}

pub const DEVICE: u64 = 0xd_0000;
pub const ROM: u64 = 0xf_0000;
pub const CODE: u64 = 0x1000;

pub struct Board {
    pub root: Region,
    pub port_root: Region,
    pub memory: AddressSpace,
    pub ports: AddressSpace,
    pub ram: Arc<RamBlock>,
    pub ram_region: Region,
    pub rom: Arc<RamBlock>,
    pub device: Region,
    pub port_device: Region,
    pub log: Log,
}

impl Board {
    pub fn new() -> Board {
        let log = Log::default();
        let ram = RamBlock::new("test.ram", 0x20_0000).unwrap();
        let rom = RamBlock::new("test.rom", 0x1_0000).unwrap();
        let root = Region::container("system", 1 << 64);
        let ram_region = Region::ram("ram", ram.clone(), 0, 0x20_0000);
        root.add(0, &ram_region, 0).unwrap();
        root.add(ROM, &Region::rom("rom", rom.clone(), 0, 0x1_0000), 1).unwrap();
        let device = Region::io(
            "device",
            0x1000,
            Arc::new(Recorder { base: DEVICE, log: log.clone(), limits: Limits::sizes(1, 8) }),
        );
        root.add(DEVICE, &device, 1).unwrap();
        let port_root = Region::container("io", 0x1_0000);
        let port_device = Region::io(
            "ports",
            0x1_0000,
            Arc::new(Recorder { base: 0, log: log.clone(), limits: Limits::sizes(1, 4).with_unaligned() }),
        );
        port_root.add(0, &port_device, 0).unwrap();
        let memory = AddressSpace::new("memory", &root);
        let ports = AddressSpace::new_ports("io", &port_root);
        Board { root, port_root, memory, ports, ram, ram_region, rom, device, port_device, log }
    }

    pub fn take_log(&self) -> Vec<Entry> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    pub fn env(&self, index: u8) -> TestEnv {
        TestEnv {
            memory: self.memory.clone(),
            ports: self.ports.clone(),
            signals: Arc::default(),
            index,
            vectors: Vec::new(),
            cr8: 0,
            apic_base: Vec::new(),
            errors: Vec::new(),
        }
    }
}

pub struct TestEnv {
    pub memory: AddressSpace,
    pub ports: AddressSpace,
    pub signals: Arc<Signals>,
    pub index: u8,
    /// Interrupts that wait, as an interrupt controller would have them.
    pub vectors: Vec<u8>,
    pub cr8: u8,
    pub apic_base: Vec<u64>,
    pub errors: Vec<String>,
}

impl TestEnv {
    pub fn interrupt(&mut self, vector: u8) {
        self.vectors.push(vector);
        self.signals.raise(Signals::INTERRUPT);
    }
}

impl Env for TestEnv {
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
    fn acknowledge(&mut self) -> Option<u8> {
        let vector = if self.vectors.is_empty() { None } else { Some(self.vectors.remove(0)) };
        if self.vectors.is_empty() {
            self.signals.clear(Signals::INTERRUPT);
        }
        vector
    }
    fn tsc(&mut self, _icount: u64) -> u64 {
        0
    }
    fn apic_read(&mut self, _register: u32) -> Option<u64> {
        None
    }
    fn apic_write(&mut self, _register: u32, _value: u64) -> bool {
        false
    }
    fn cr8(&mut self) -> u8 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u8) {
        self.cr8 = value;
    }
    fn set_apic_base(&mut self, value: u64) {
        self.apic_base.push(value);
    }
    fn set_tsc_deadline(&mut self, _value: u64, _tsc_offset: u64) {}
    fn random(&mut self) -> u64 {
        4
    }
    fn guest_error(&mut self, rip: u64, message: &dyn std::fmt::Display) {
        self.errors.push(format!("{rip:#x}: {message}"));
    }
}

/// A machine with one vCPU.
pub struct Machine {
    pub board: Board,
    pub vm: KvmVm,
    pub vcpu: KvmVcpu,
    pub env: TestEnv,
}

pub fn machine(kvm: &Kvm, options: VmOptions) -> Machine {
    let board = Board::new();
    let vm = KvmVm::new(kvm, options).unwrap();
    vm.attach(&board.memory, &board.ports).unwrap();
    let vcpu = KvmVcpu::new(&vm, 0, &model(kvm, &vm)).unwrap();
    let env = board.env(0);
    Machine { board, vm, vcpu, env }
}

pub fn model(kvm: &Kvm, vm: &KvmVm) -> Vec<cpuid::CpuidLeaf> {
    cpuid::host_model(kvm.supported_cpuid(), kvm.capabilities(), vm.options().irqchip != Irqchip::Off)
}

/// State for real-mode code at [`CODE`], with all segments at 0.
pub fn real_mode() -> CpuState {
    let mut state = CpuState::at_reset(true);
    let cs = &mut state.seg[Seg::Cs as usize];
    (cs.base, cs.selector) = (0, 0);
    state.rip = CODE;
    state.gpr[4] = 0x8000;
    state
}

/// State for 32-bit code at [`CODE`]: flat segments, no paging, no IDT.
pub fn protected_mode() -> CpuState {
    let mut state = real_mode();
    for (n, seg) in state.seg.iter_mut().enumerate() {
        let (selector, attr) = if n == Seg::Cs as usize { (8, 0xc09b) } else { (16, 0xc093) };
        *seg = Segment { base: 0, limit: u32::MAX, attr, selector, unusable: false };
    }
    state.cr0 |= 1;
    state.idtr.limit = 0;
    state
}

/// State for 64-bit code at [`CODE`]: the first 1 GiB mapped to itself, no IDT. The tables are put at 0x10000.
pub fn long_mode(board: &Board) -> CpuState {
    board.ram.store(0x1_0000, 8, 0x1_1003).unwrap();
    board.ram.store(0x1_1000, 8, 0x1_2003).unwrap();
    for n in 0..512 {
        board.ram.store(0x1_2000 + 8 * n, 8, n << 21 | 0x83).unwrap();
    }
    let mut state = protected_mode();
    state.seg[Seg::Cs as usize].attr = 0xa09b;
    state.cr0 = 0x8000_0011;
    state.cr3 = 0x1_0000;
    state.cr4 = 0x20;
    state.efer = 0x500;
    state
}

impl Machine {
    /// Puts code at [`CODE`] and a state that runs it.
    pub fn start(&mut self, code: &[u8], state: &CpuState) {
        self.board.ram.write(CODE, code).unwrap();
        self.vcpu.load(state, None, None).unwrap();
    }

    /// Runs until something comes up; after 20 seconds the vCPU is kicked, so that a guest gone astray ends as `Exit::Kicked`.
    pub fn run(&mut self) -> Exit {
        let handle = self.vcpu.kick_handle();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if wait.recv_timeout(std::time::Duration::from_secs(20))
                    == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                {
                    handle.kick();
                }
            });
            let exit = self.vcpu.run(&mut self.env);
            drop(done);
            exit
        })
    }
}

/// Assembles bytes from pieces.
pub fn code(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}
