//! A bare processor with flat memory and nothing else, for tests and measurements.

use crate::env::Peers;
use crate::{Cpu, CpuModel, CpuState, Env, Signals};
use hyaline_ram::RamBlock;
use hyaline_space::{AddressSpace, Region};
use std::sync::Arc;

/// A machine of RAM at address 0 and no devices. Its time is the instruction count.
pub struct BareEnv {
    memory: AddressSpace,
    ports: AddressSpace,
    signals: Arc<Signals>,
    index: u8,
    peers: Option<Arc<Peers>>,
    random: u64,
    /// The vector that an acknowledge gives, when [`Signals::INTERRUPT`] was raised.
    pub vector: Option<u8>,
}

impl BareEnv {
    /// RAM of `len` bytes at physical address 0.
    pub fn new(len: u64) -> (BareEnv, Arc<RamBlock>) {
        #[allow(clippy::expect_used)]
        let ram = RamBlock::new("test.ram", len).expect("the host has memory for a test");
        let root = Region::container("system", 1 << 64);
        #[allow(clippy::expect_used)]
        root.add(0, &Region::ram("ram", ram.clone(), 0, len), 0).expect("an empty container takes a child");
        let env = BareEnv {
            memory: AddressSpace::new("memory", &root),
            ports: AddressSpace::new_ports("ports", &Region::container("io", 1 << 16)),
            signals: Arc::new(Signals::default()),
            index: 0,
            peers: None,
            random: 0x1234_5678_9abc_def1,
            vector: None,
        };
        (env, ram)
    }
}

impl Env for BareEnv {
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
        self.peers.as_ref()
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.signals.clear(Signals::INTERRUPT);
        self.vector.take()
    }
    fn tsc(&mut self, icount: u64) -> u64 {
        icount
    }
    fn apic_read(&mut self, _register: u32) -> Option<u64> {
        None
    }
    fn apic_write(&mut self, _register: u32, _value: u64) -> bool {
        false
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _value: u8) {}
    fn set_apic_base(&mut self, _value: u64) {}
    fn set_tsc_deadline(&mut self, _value: u64, _tsc_offset: u64) {}
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
    fn guest_error(&mut self, _rip: u64, _message: &dyn std::fmt::Display) {}
}

/// A processor in flat 64-bit mode at CPL 0, paging with the identity map of the first 4 GiB in 2 MiB pages (tables at 0x10_0000), RIP 0x1000,
/// RSP 0x8_0000, over `len` bytes of RAM (at least 2 MiB).
pub fn long_mode_cpu(len: u64) -> (Cpu, Arc<RamBlock>) {
    use crate::state::{Segment, cr0, cr4, efer};
    let (env, ram) = BareEnv::new(len.max(2 << 20));
    let tables = 0x10_0000;
    ram.store_u64(tables, (tables + 0x1000) | 7);
    for i in 0..4 {
        ram.store_u64(tables + 0x1000 + i * 8, (tables + 0x2000 + i * 0x1000) | 7);
        for j in 0..512 {
            ram.store_u64(tables + 0x2000 + i * 0x1000 + j * 8, ((i << 30) + (j << 21)) | 0x87);
        }
    }
    let mut state = CpuState::at_reset(true);
    state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP | cr0::MP;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.cr3 = tables;
    state.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    state.xcr0 = 7;
    let data = Segment { base: 0, limit: 0xffff_ffff, attr: 0xc093, selector: 0x10, unusable: false };
    state.seg = [data; 6];
    state.seg[1] = Segment { attr: 0xa09b, selector: 8, ..data };
    state.rip = 0x1000;
    state.gpr[4] = 0x8_0000;
    (Cpu::new(state, Box::new(env), Arc::new(CpuModel::default())), ram)
}

/// A processor in flat 32-bit protected mode without paging at CPL 0, RIP 0x1000, RSP 0x8_0000.
pub fn protected_cpu(len: u64) -> (Cpu, Arc<RamBlock>) {
    use crate::state::{Segment, cr0};
    let (env, ram) = BareEnv::new(len);
    let mut state = CpuState::at_reset(true);
    state.cr0 = cr0::PE | cr0::ET | cr0::NE;
    let data = Segment { base: 0, limit: 0xffff_ffff, attr: 0xc093, selector: 0x10, unusable: false };
    state.seg = [data; 6];
    state.seg[1] = Segment { attr: 0xc09b, selector: 8, ..data };
    state.rip = 0x1000;
    state.gpr[4] = 0x8_0000;
    (Cpu::new(state, Box::new(env), Arc::new(CpuModel::default())), ram)
}

/// A processor in real mode at 0000:1000.
pub fn real_cpu(len: u64) -> (Cpu, Arc<RamBlock>) {
    let (env, ram) = BareEnv::new(len);
    let mut state = CpuState::at_reset(true);
    state.seg[1].base = 0;
    state.seg[1].selector = 0;
    state.rip = 0x1000;
    state.gpr[4] = 0x8000;
    (Cpu::new(state, Box::new(env), Arc::new(CpuModel::default())), ram)
}

/// A processor where the mode doesn't matter.
pub fn cpu() -> Cpu {
    long_mode_cpu(2 << 20).0
}

/// Another processor on the same memory, in the same state; both know each other.
pub fn second_cpu(first: &mut Cpu) -> Cpu {
    let signals: Arc<Signals> = Arc::default();
    let peers = Peers::new(vec![first.env.signals().clone(), signals.clone()]);
    first.peers = Some(peers.clone());
    let env = BareEnv {
        memory: first.env.memory().clone(),
        ports: first.env.ports().clone(),
        signals,
        index: 1,
        peers: Some(peers),
        random: 1,
        vector: None,
    };
    Cpu::new(first.state.clone(), Box::new(env), first.model.clone())
}
