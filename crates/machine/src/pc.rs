//! The `pc` board: the shape of an Intel 440FX with a PIIX3, as QEMU's machine of that name.
//!
//! Everything is put together here and nowhere else: which chip sits where, which line leads where, what the memory map looks like.

use crate::acpi;
use crate::chassis::{Core, CpuPort};
use crate::config::Config;
use crate::cpu_env::{self, Count};
use crate::load::{E820, E820Kind};
use hyaline_device::{Device, Place, Shadow, Slot};
use hyaline_devices::firmware::fw_cfg::{self, FwCfg};
use hyaline_devices::input::i8042::I8042;
use hyaline_devices::input::port92::{self, Port92};
use hyaline_devices::intc::cerr::{self, Cerr};
use hyaline_devices::intc::i8259::I8259;
use hyaline_devices::intc::ioapic::IoApic;
use hyaline_devices::intc::lapic::Lapic;
use hyaline_devices::pci::config as pci_config;
use hyaline_devices::pci::i440fx::{self, I440fx};
use hyaline_devices::pci::piix3::Piix3;
use hyaline_devices::power::piix4_pm::Piix4Pm;
use hyaline_devices::serial::debugcon::{self, DebugCon};
use hyaline_devices::serial::ns16550::Ns16550;
use hyaline_devices::timer::hpet::Hpet;
use hyaline_devices::timer::i8254::I8254;
use hyaline_devices::timer::mc146818::{Contents, Mc146818};
use hyaline_ram::RamBlock;
use hyaline_space::{Actor, AddressSpace, Io, IoError, Limits, Origin, Region};
use hyaline_x86::env::Peers;
use hyaline_x86::env::Signals;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Why a machine can't be put together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BoardError(pub String);

impl From<hyaline_space::SpaceError> for BoardError {
    fn from(e: hyaline_space::SpaceError) -> Self {
        BoardError(e.to_string())
    }
}

/// Which chips the board has itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chips {
    /// All.
    Ours,
    /// Local APICs are the accelerator's.
    LapicInKernel,
    /// Local APICs, I/O APIC, 8259 pair and 8254 are the accelerator's.
    AllInKernel,
}

/// A device and where it came from.
pub struct Placed {
    /// The slot.
    pub slot: Arc<Slot>,
    /// PCI device number, for functions.
    pub pci: Option<u8>,
}

/// The board, put together.
pub struct Pc {
    /// The chassis.
    pub core: Arc<Core>,
    /// Guest-physical memory.
    pub memory: AddressSpace,
    /// I/O ports.
    pub ports: AddressSpace,
    /// PCI configuration registers: bus << 16, device << 11, function << 8, register.
    pub config_space: AddressSpace,
    /// All RAM, in one block.
    pub ram: Arc<RamBlock>,
    /// Firmware ROM.
    pub rom: Option<Arc<RamBlock>>,
    /// Bytes of RAM below the PCI hole.
    pub low_ram: u64,
    /// All devices, in the order they are reset.
    pub devices: Vec<Placed>,
    /// The 8259 pair.
    pub pic: Arc<Slot>,
    /// The I/O APIC.
    pub ioapic: Arc<Slot>,
    /// The latch between FERR# and interrupt 13.
    pub cerr: Arc<Slot>,
    /// Local APICs, one per processor; empty when the kernel has them.
    pub lapics: Vec<Arc<Slot>>,
    /// Processors.
    pub cpus: Vec<Arc<CpuPort>>,
    /// Where a deterministic machine's instruction count becomes time.
    pub count: Arc<Count>,
    /// The processors as they see each other.
    pub peers: Arc<Peers>,
    /// Serial ports COM1 to COM4.
    pub serials: Vec<Option<Arc<Slot>>>,
    /// Debug console.
    pub debugcon: Option<Arc<Slot>>,
    fw_cfg: Arc<Slot>,
    tables: acpi::Tables,
    next_id: u16,
    io: Region,
    system: Region,
    pci: Region,
    config_root: Region,
    next_pci: u8,
}

/// End of RAM below 4 GiB when all of it fits, and where the hole starts when it does not.
const LOW_MAX: u64 = 0xe000_0000;
const LOW_SPLIT: u64 = 0xc000_0000;
/// Where the extended BIOS data area begins; it takes the last KiB of conventional memory.
const EBDA: u64 = 0x9_fc00;
const FOUR_GIB: u64 = 1 << 32;

/// Bank of the host bridge that does not move.
const HOST_PORTS: usize = 0;
/// Bank of the power-management function that does not move.
const PM_APM: usize = 1;
/// I/O APIC inputs that HPET timers can be routed to: those that nothing else has.
const HPET_ROUTES: u32 = 0x00f0_0000;

/// COM1 to COM4: base and interrupt.
pub const COM: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

/// What each processor sees at the local APICs' address: its own.
struct ApicWindow {
    banks: Vec<Arc<dyn Io>>,
    limits: Limits,
}

impl ApicWindow {
    fn own(&self, who: &Origin) -> Option<&Arc<dyn Io>> {
        match who.actor {
            Actor::Vcpu(n) => self.banks.get(usize::from(n)),
            _ => self.banks.first(),
        }
    }
}

impl Io for ApicWindow {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn read(&self, offset: u64, size: u8, who: &Origin) -> Result<u64, IoError> {
        self.own(who).ok_or(IoError::NotHere)?.read(offset, size, who)
    }
    fn write(&self, offset: u64, size: u8, value: u64, who: &Origin) -> Result<(), IoError> {
        self.own(who).ok_or(IoError::NotHere)?.write(offset, size, value, who)
    }
}

/// Configuration mechanism 1's data window: goes on to the register that the host bridge's address latch names.
struct ConfigWindow {
    host: Arc<Slot>,
    space: AddressSpace,
    limits: Limits,
}

impl ConfigWindow {
    fn address(&self, offset: u64) -> Option<u64> {
        let latch = self.host.inspect(|d| d.peek(HOST_PORTS, &i440fx::CONFADD))?;
        (latch & 0x8000_0000 != 0).then_some((latch & 0x00ff_fffc) + offset)
    }
}

impl Io for ConfigWindow {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn read(&self, offset: u64, size: u8, who: &Origin) -> Result<u64, IoError> {
        // A function that isn't there reads as all ones (PCI 3.0 §6.1); that is no error.
        Ok(self.address(offset).map_or(u64::MAX, |a| self.space.load(a, size, who).0))
    }
    fn write(&self, offset: u64, size: u8, value: u64, who: &Origin) -> Result<(), IoError> {
        if let Some(a) = self.address(offset) {
            let _ = self.space.store(a, size, value, who);
        }
        Ok(())
    }
}

impl Pc {
    /// Puts the board together. What `chips` says is the accelerator's own is left out.
    ///
    /// # Errors
    /// Memory the host can't give, two devices in one place, an unknown device or property: in words.
    pub fn new(
        config: &Config,
        core: Arc<Core>,
        firmware: Option<&[u8]>,
        chips: Chips,
    ) -> Result<Pc, BoardError> {
        let size = config.memory;
        if size < 1 << 20 {
            return Err(BoardError(format!(
                "-m: {size} bytes are too little for a PC; it needs at least 1M"
            )));
        }
        if !size.is_multiple_of(4096) {
            return Err(BoardError(format!("-m: {size} bytes are no whole number of 4096-byte pages")));
        }
        // More than there is would be given as long as it isn't used, and the host would have to kill somebody then.
        let host = rustix::system::sysinfo();
        let there = (host.totalram as u128 + host.totalswap as u128) * u128::from(host.mem_unit.max(1));
        if u128::from(size) > there {
            return Err(BoardError(format!(
                "-m: {} MiB of guest memory are more than this host has ({} MiB with swap space); give less with -m",
                size >> 20,
                there >> 20
            )));
        }
        let ram = RamBlock::new("pc.ram", size)
            .map_err(|e| BoardError(format!("-m {} MiB: {e}; give less with -m", size >> 20)))?;
        let low_ram = if size <= LOW_MAX { size } else { LOW_SPLIT };

        let system = Region::container("system", 1 << 64);
        let pci = Region::container("pci", 1 << 64).with_owner("i440fx");
        let io = Region::container("io", 1 << 16);
        let config_root = Region::container("pci-config", 1 << 24);
        let whole = Region::ram("pc.ram", ram.clone(), 0, size);
        system.add(0, &pci, -1)?;
        system.add(0, &Region::alias("ram-below-4g", &whole, 0, u128::from(low_ram)), 0)?;
        if size > low_ram {
            system.add(
                FOUR_GIB,
                &Region::alias("ram-above-4g", &whole, low_ram, u128::from(size - low_ram)),
                0,
            )?;
        }
        let memory = AddressSpace::new("memory", &system);
        let ports = AddressSpace::new_ports("io", &io);
        let config_space = AddressSpace::new("pci-config", &config_root);
        core.set_memory(memory.clone());

        let rom = firmware.map(|image| add_firmware(&pci, image)).transpose()?;
        shadow_below_1m(&core, &system, &pci, &whole)?;

        let id = &mut 0u16;
        let slot = |name: &str, device: Box<dyn Device>, id: &mut u16| {
            *id += 1;
            Slot::new(*id, name, device, core.clone())
        };
        let pic = slot("pic", Box::new(I8259::new()), id);
        let ioapic = slot("ioapic", Box::new(IoApic::new()), id);
        let cerr = slot("cerr", Box::new(Cerr::new()), id);
        let mut lapics = Vec::new();
        let mut cpus = Vec::new();
        for n in 0..config.cpus {
            let lapic =
                (chips == Chips::Ours).then(|| slot(&format!("lapic{n}"), Box::new(cpu_env::lapic(n)), id));
            cpus.push(core.add_cpu(CpuPort::new(lapic.clone())));
            lapics.extend(lapic);
        }
        let peers = Peers::new(cpus.iter().map(|c| c.signals.clone()).collect());
        let fw_cfg = slot("fw_cfg", Box::new(FwCfg::new()), id);
        let next_id = *id;
        let tables = acpi::Tables::new(&acpi::Config {
            cpus: config.cpus,
            pci_hole: low_ram.max(LOW_SPLIT) as u32,
            pci_window64: Some((1 << 39, 1 << 39)),
            serial: COM.iter().zip(&config.serials).filter(|(_, s)| s.is_some()).map(|(c, _)| *c).collect(),
            hpet: config.hpet,
            fw_cfg: true,
            pvpanic: config.devices.iter().any(|d| d.name == "pvpanic").then_some(0x505),
        });
        let mut pc = Pc {
            core,
            memory,
            ports,
            config_space,
            ram,
            rom,
            low_ram,
            devices: Vec::new(),
            pic: pic.clone(),
            ioapic: ioapic.clone(),
            cerr,
            lapics,
            cpus,
            count: Arc::default(),
            peers,
            serials: Vec::new(),
            debugcon: None,
            fw_cfg,
            tables,
            next_id,
            io,
            system,
            pci,
            config_root,
            next_pci: 2,
        };
        pc.interrupt_controllers(chips)?;
        pc.chipset()?;
        pc.timers(config, chips)?;
        pc.legacy(config)?;
        pc.fill_fw_cfg(config)?;
        for spec in &config.devices {
            crate::devices::add(&mut pc, spec, config)?;
        }
        pc.check_overlaps()?;
        Ok(pc)
    }

    /// A new slot with the next number.
    pub(crate) fn slot(&mut self, name: &str, device: Box<dyn Device>) -> Arc<Slot> {
        self.next_id += 1;
        Slot::new(self.next_id, name, device, self.core.clone())
    }

    /// Adds a slot to the list of devices.
    pub(crate) fn place(&mut self, slot: &Arc<Slot>) {
        self.devices.push(Placed { slot: slot.clone(), pci: None });
    }

    fn region(slot: &Arc<Slot>, bank: usize) -> Region {
        let b = slot.chip().banks[bank];
        Region::io(b.name, u128::from(b.size), slot.bank(bank)).with_owner(slot.name())
    }

    /// Maps a bank of ports.
    pub(crate) fn map_ports(&self, slot: &Arc<Slot>, bank: usize, base: u16) -> Result<Region, BoardError> {
        let region = Pc::region(slot, bank);
        self.io.add(u64::from(base), &region, 0)?;
        Ok(region)
    }

    /// Maps the first `len` ports of a bank.
    pub(crate) fn map_ports_sized(
        &self,
        slot: &Arc<Slot>,
        bank: usize,
        base: u16,
        len: u128,
    ) -> Result<(), BoardError> {
        let region = Region::io(slot.chip().banks[bank].name, len, slot.bank(bank)).with_owner(slot.name());
        Ok(self.io.add(u64::from(base), &region, 0)?)
    }

    /// Maps a part of a bank of ports: for chips whose ports have others between them.
    fn map_part(
        &self,
        slot: &Arc<Slot>,
        whole: &Region,
        offset: u64,
        len: u128,
        base: u16,
    ) -> Result<(), BoardError> {
        let name = format!("{}+{offset}", whole.name());
        self.io.add(u64::from(base), &Region::alias(&name, whole, offset, len).with_owner(slot.name()), 0)?;
        Ok(())
    }

    /// Maps a bank of memory registers over everything of ordinary priority.
    pub(crate) fn map_memory(&self, slot: &Arc<Slot>, bank: usize, base: u64) -> Result<Region, BoardError> {
        let region = Pc::region(slot, bank);
        self.system.add(base, &region, 0)?;
        Ok(region)
    }

    /// A sink that carries a line's level into an input of the I/O APIC and the 8259 pair.
    fn wire_isa(&self) {
        for n in 0..16u32 {
            let line = self.core.line(&format!("isa.irq{n}"));
            // Interrupt 2 is the cascade; interrupt 0 reaches the I/O APIC's pin 2 (the MADT says so).
            if n != 2 {
                line.connect(self.pic.sink(n));
            }
            line.connect(self.ioapic.sink(if n == 0 { 2 } else { n }));
        }
    }

    fn interrupt_controllers(&mut self, chips: Chips) -> Result<(), BoardError> {
        if chips == Chips::AllInKernel {
            return Ok(());
        }
        let (pic, ioapic) = (self.pic.clone(), self.ioapic.clone());
        self.map_ports(&pic, 0, 0x20)?;
        self.map_ports(&pic, 1, 0xa0)?;
        self.map_ports(&pic, 2, 0x4d0)?;
        self.map_memory(&ioapic, 0, u64::from(acpi::place::IOAPIC))?;
        self.core.add_ioapic(&ioapic);
        self.place(&pic);
        self.place(&ioapic);
        self.wire_isa();
        let intr = self.core.line("intr");
        pic.bind(0, &intr);
        if self.lapics.is_empty() {
            // The 8259's output is the bootstrap processor's own interrupt pin.
            let port = self.cpus[0].clone();
            intr.connect(Arc::new(move |level: bool| {
                if level {
                    port.raise(Signals::INTERRUPT);
                } else {
                    port.signals.clear(Signals::INTERRUPT);
                }
            }));
        } else {
            let banks: Vec<_> = self.lapics.iter().map(|l| l.bank(0)).collect();
            let limits = *banks[0].limits();
            let window =
                Region::io("lapic", 4096, Arc::new(ApicWindow { banks, limits })).with_owner("lapic");
            self.system.add(u64::from(acpi::place::LAPIC), &window, 0)?;
            for (n, lapic) in self.lapics.clone().iter().enumerate() {
                intr.connect(lapic.sink(0));
                // The bootstrap processor's move of its page moves the window; the others follow it.
                if n == 0 {
                    self.core.set_bank(lapic, 0, window.clone());
                }
                self.place(lapic);
            }
        }
        Ok(())
    }

    /// Adds a PCI function: its configuration registers, and its banks of ports and memory, which it moves itself by its BARs (all
    /// but those in `fixed`). `number` is its device number; None: the next free one.
    pub(crate) fn add_pci(
        &mut self,
        slot: &Arc<Slot>,
        number: Option<u8>,
        function: u8,
        fixed: &[usize],
    ) -> Result<u8, BoardError> {
        let device = match number {
            Some(n) => n,
            None if self.next_pci > 31 => {
                return Err(BoardError(format!(
                    "{}: no PCI device number is free (0 to 31 are taken)",
                    slot.name()
                )));
            }
            None => self.next_pci,
        };
        let at = pci_config::address(0, device, function);
        if self.config_space.lookup(at).is_some() {
            return Err(BoardError(format!(
                "{}: PCI address {device:02x}.{function} is taken; choose another with addr=",
                slot.name()
            )));
        }
        for (n, bank) in slot.chip().banks.iter().enumerate().filter(|(n, _)| !fixed.contains(n)) {
            let region = Pc::region(slot, n);
            match bank.place {
                Place::Config => {
                    self.config_root.add(at, &region, 0)?;
                    continue;
                }
                Place::Port => self.io.add(0, &region, 1)?,
                Place::Memory => self.pci.add(0, &region, 1)?,
                Place::Indexed => continue,
            }
            region.set_enabled(false);
            self.core.set_bank(slot, n, region);
        }
        while self.next_pci < 32
            && self.config_space.lookup(pci_config::address(0, self.next_pci, 0)).is_some()
        {
            self.next_pci += 1;
        }
        self.devices.push(Placed { slot: slot.clone(), pci: Some(device) });
        Ok(device)
    }

    /// The interrupt line that pin `pin` (0 = INTA) of a PCI device arrives on.
    pub(crate) fn pci_line(&self, device: u8, pin: u8) -> Arc<hyaline_device::Line> {
        // The same turn as in the ACPI tables' routing.
        let pirq = (usize::from(device) + usize::from(pin) + 3) % 4;
        self.core.line(&format!("pci.pirq{}", ["a", "b", "c", "d"][pirq]))
    }

    fn chipset(&mut self) -> Result<(), BoardError> {
        let host = self.slot("i440fx", Box::new(I440fx::new()));
        self.map_ports(&host, HOST_PORTS, 0xcf8)?;
        let window = ConfigWindow {
            host: host.clone(),
            space: self.config_space.clone(),
            limits: Limits::sizes(1, 4),
        };
        let window = Region::io("confdata", 4, Arc::new(window)).with_owner("i440fx");
        self.io.add(0xcfc, &window, 0)?;
        self.add_pci(&host, Some(0), 0, &[HOST_PORTS])?;

        let isa = self.slot("piix3", Box::new(Piix3::new()));
        self.add_pci(&isa, Some(1), 0, &[])?;
        for (n, name) in ["a", "b", "c", "d"].iter().enumerate() {
            self.core.line(&format!("pci.pirq{name}")).connect(isa.sink(n as u32));
        }
        for n in 0..16 {
            let line = self.core.line(&format!("isa.irq{n}"));
            isa.bind_named(&format!("irq{n}"), &line);
        }

        // No system-management mode: the chip answers the SMI command port itself.
        let pm = self.slot("piix4_pm", Box::new(Piix4Pm::new(false)));
        self.add_pci(&pm, Some(1), 3, &[PM_APM])?;
        self.map_ports(&pm, PM_APM, acpi::place::SMI_CMD)?;
        pm.bind_named("sci", &self.core.line("isa.irq9"));
        Ok(())
    }

    fn timers(&mut self, config: &Config, chips: Chips) -> Result<(), BoardError> {
        let pit = self.slot("pit", Box::new(I8254::new()));
        if chips != Chips::AllInKernel {
            self.map_ports(&pit, 0, 0x40)?;
            self.map_ports(&pit, 1, 0x61)?;
            self.place(&pit);
        }
        let contents = Contents {
            below_4g: self.low_ram,
            above_4g: config.memory - self.low_ram,
            cpus: config.cpus,
            ..Contents::default()
        };
        let rtc = self.slot("rtc", Box::new(Mc146818::new(&contents)));
        self.map_ports(&rtc, 0, 0x70)?;
        self.place(&rtc);
        let (irq0, irq8) = (self.core.line("isa.irq0"), self.core.line("isa.irq8"));
        if config.hpet {
            // The HPET stands between the 8254, the clock and their interrupts: in legacy replacement mode it takes both.
            let hpet = self.slot("hpet", Box::new(Hpet::new(HPET_ROUTES)));
            self.map_memory(&hpet, 0, u64::from(acpi::place::HPET))?;
            for (n, (chip, name)) in [(&pit, "hpet.pit"), (&rtc, "hpet.rtc")].into_iter().enumerate() {
                let line = self.core.line(name);
                chip.bind(0, &line);
                line.connect(hpet.sink(n as u32));
            }
            hpet.bind_named("irq0", &irq0);
            hpet.bind_named("irq8", &irq8);
            for n in (0..24).filter(|n| HPET_ROUTES >> n & 1 != 0) {
                let line = self.core.line(&format!("gsi{n}"));
                if chips != Chips::AllInKernel {
                    line.connect(self.ioapic.sink(n));
                }
                hpet.bind_named(&format!("gsi{n}"), &line);
            }
            self.place(&hpet);
        } else {
            pit.bind(0, &irq0);
            rtc.bind(0, &irq8);
        }
        Ok(())
    }

    fn legacy(&mut self, config: &Config) -> Result<(), BoardError> {
        let i8042 = self.slot("i8042", Box::new(I8042::new()));
        let whole = Pc::region(&i8042, 0);
        self.map_part(&i8042, &whole, 0, 1, 0x60)?;
        self.map_part(&i8042, &whole, 4, 1, 0x64)?;
        i8042.bind_named("irq1", &self.core.line("isa.irq1"));
        i8042.bind_named("irq12", &self.core.line("isa.irq12"));
        self.place(&i8042);
        let port92 = self.slot("port92", Box::new(Port92::new()));
        self.map_ports(&port92, 0, port92::IOBASE)?;
        self.place(&port92);
        let latch = self.cerr.clone();
        self.map_ports(&latch, 0, cerr::IOBASE)?;
        latch.bind_named("irq13", &self.core.line("isa.irq13"));
        self.place(&latch);
        for (n, spec) in config.serials.iter().take(4).enumerate() {
            let serial = spec.as_ref().map(|_| {
                let serial = self.slot(&format!("serial{n}"), Box::new(Ns16550::new()));
                let (base, irq) = COM[n];
                self.map_ports(&serial, 0, base)?;
                serial.bind_named("irq", &self.core.line(&format!("isa.irq{irq}")));
                self.place(&serial);
                Ok::<_, BoardError>(serial)
            });
            self.serials.push(serial.transpose()?);
        }
        if config.debugcon.is_some() {
            let number = |prop, default: u64| match config.global("isa-debugcon", prop) {
                Some(v) => crate::devices::parse_number(v).ok_or_else(|| {
                    BoardError(format!("-global isa-debugcon.{prop}={v}: no number; write for example 0x402"))
                }),
                None => Ok(default),
            };
            let base = number("iobase", u64::from(debugcon::IOBASE))?;
            let readback = number("readback", u64::from(debugcon::READBACK))?;
            let base = u16::try_from(base).map_err(|_| {
                BoardError(format!("-global isa-debugcon.iobase={base:#x}: ports end at 0xffff"))
            })?;
            let slot = self.slot("debugcon", Box::new(DebugCon::new(readback as u8)));
            self.map_ports(&slot, 0, base)?;
            self.place(&slot);
            self.debugcon = Some(slot);
        }
        Ok(())
    }

    fn fill_fw_cfg(&mut self, config: &Config) -> Result<(), BoardError> {
        use fw_cfg::key;
        let slot = self.fw_cfg.clone();
        self.map_ports(&slot, 0, fw_cfg::IOBASE)?;
        self.place(&slot);
        let files = self.tables.fw_cfg_files();
        let e820: Vec<_> = self.e820_for_firmware().iter().map(|e| (e.start, e.len, e.kind as u32)).collect();
        let cpus = u16::from(config.cpus);
        let result = slot.with(|d, _| {
            let fw = d
                .as_any()
                .and_then(|a| a.downcast_mut::<FwCfg>())
                .ok_or_else(|| "fw_cfg is another chip".to_string())?;
            let add = || -> Result<(), fw_cfg::FwCfgError> {
                fw.add_key(key::UUID, [0u8; 16].as_slice())?;
                fw.add_u64(key::RAM_SIZE, config.memory)?;
                fw.add_u16(key::NOGRAPHIC, 1)?;
                fw.add_u16(key::NB_CPUS, cpus)?;
                fw.add_u16(key::MAX_CPUS, cpus)?;
                fw.add_u16(key::BOOT_MENU, 0)?;
                fw.add_numa(&vec![0; usize::from(cpus)], &[])?;
                fw.add_e820(&e820)?;
                // Which sleep states there are: S3 and S4 are not, S5 is type 0 (bit 7: present).
                fw.add_file("etc/system-states", [0u8, 0, 0, 0, 0, 0x80].as_slice())?;
                for (name, data) in files {
                    fw.add_file(name, data)?;
                }
                Ok(())
            };
            add().map_err(|e| e.to_string())
        });
        match result {
            Some(Ok(())) => Ok(()),
            Some(Err(e)) => Err(BoardError(format!("fw_cfg: {e}"))),
            None => Err(BoardError("fw_cfg: the device failed".into())),
        }
    }

    /// RAM as firmware learns of it: the ranges above 1 MiB are told apart by itself.
    fn e820_for_firmware(&self) -> Vec<E820> {
        let mut map = vec![E820 { start: 0, len: self.low_ram, kind: E820Kind::Ram }];
        if self.ram.len() > self.low_ram {
            map.push(E820 { start: FOUR_GIB, len: self.ram.len() - self.low_ram, kind: E820Kind::Ram });
        }
        map
    }

    /// The memory map for a guest that is started directly: what firmware would have made of it. ACPI tables take the last 64 KiB below
    /// the hole.
    pub fn e820_direct(&self) -> Vec<E820> {
        let tables = self.tables_at();
        let mut map = vec![
            E820 { start: 0, len: EBDA, kind: E820Kind::Ram },
            E820 { start: EBDA, len: 0xa_0000 - EBDA, kind: E820Kind::Reserved },
            E820 { start: 0xe_0000, len: 0x2_0000, kind: E820Kind::Reserved },
            E820 { start: 0x10_0000, len: tables - 0x10_0000, kind: E820Kind::Ram },
            E820 { start: tables, len: self.low_ram - tables, kind: E820Kind::Acpi },
        ];
        if self.ram.len() > self.low_ram {
            map.push(E820 { start: FOUR_GIB, len: self.ram.len() - self.low_ram, kind: E820Kind::Ram });
        }
        map.retain(|e| e.len > 0);
        map
    }

    /// Where a direct boot's ACPI tables are, 64 KiB aligned below the end of low RAM.
    pub fn tables_at(&self) -> u64 {
        (self.low_ram.saturating_sub(self.tables.len() as u64 + 1) & !0xffff).max(0x10_0000)
    }

    /// Address of the ACPI root pointer in a direct boot.
    pub const RSDP: u64 = 0xe_0000;

    /// Does what firmware would do, for a guest that is started without it: opens the shadow RAM, routes the PCI interrupts, places the
    /// power-management registers, sets up keyboard controller and local APICs, and puts BIOS data area and ACPI tables into memory.
    pub fn firmware_work(&self) -> Result<(), BoardError> {
        let set = |device: u8, function: u8, register: u64, size: u8, value: u64| {
            let at = pci_config::address(0, device, function) + register;
            let _ = self.config_space.store(at, size, value, &Origin::LOADER);
        };
        // 82441FX §3.2.18: PAM0 is the F segment, in its high half; all read and write RAM.
        set(0, 0, 0x59, 1, 0x30);
        for register in 0x5a..=0x5f {
            set(0, 0, register, 1, 0x33);
        }
        for (n, gsi) in acpi::place::PIRQ.iter().enumerate() {
            set(1, 0, 0x60 + n as u64, 1, u64::from(*gsi));
        }
        // The PCI interrupts and the SCI are level-triggered.
        let elcr = acpi::place::PIRQ.iter().fold(1u64 << acpi::place::SCI, |m, n| m | 1 << n);
        let _ = self.ports.store(0x4d0, 1, elcr & 0xff, &Origin::LOADER);
        let _ = self.ports.store(0x4d1, 1, elcr >> 8, &Origin::LOADER);
        // 82371AB §7.1: PMBA, then PMREGMISC.PMIOSE.
        set(1, 3, 0x40, 4, u64::from(acpi::place::PM_BASE) | 1);
        set(1, 3, 0x80, 1, 1);
        for placed in &self.devices {
            placed.slot.with(|d, cx| {
                let Some(device) = d.as_any() else { return };
                if let Some(keyboard) = device.downcast_mut::<I8042>() {
                    keyboard.firmware_done();
                } else if let Some(lapic) = device.downcast_mut::<Lapic>() {
                    lapic.virtual_wire(cx);
                }
            });
        }
        let at = self.tables_at();
        let (block, rsdp) = self.tables.at(at as u32);
        let bda = self.bios_data();
        for (address, data) in [(at, &block[..]), (Pc::RSDP, &rsdp[..]), (0x400, &bda[..]), (EBDA, &[1])] {
            self.memory.write(address, data, &Origin::LOADER).map_err(|e| {
                BoardError(format!("the ACPI tables can't be placed: {e}; give more memory with -m"))
            })?;
        }
        Ok(())
    }

    /// The BIOS data area, as far as it tells of this machine (IBM PC/AT Technical Reference, "ROM BIOS data area"): serial ports, the extended
    /// area's segment, equipment, conventional memory. Loaders and hypervisors look there for free memory below 640 KiB.
    fn bios_data(&self) -> [u8; 0x15] {
        let mut area = [0; 0x15];
        let mut set = |at: usize, value: u16| area[at..at + 2].copy_from_slice(&value.to_le_bytes());
        let ports = self.serials.iter().zip(COM).filter(|(s, _)| s.is_some()).map(|(_, (base, _))| base);
        let mut count = 0;
        for base in ports {
            set(2 * usize::from(count), base);
            count += 1;
        }
        set(0x0e, (EBDA >> 4) as u16);
        // Bit 1: x87; bits 4 and 5 zero: no display; bits 9 to 11: serial ports.
        set(0x10, count << 9 | 2);
        set(0x13, (EBDA >> 10) as u16);
        area
    }

    /// Two devices on one port or address: an error that names both.
    fn check_overlaps(&self) -> Result<(), BoardError> {
        for space in [&self.ports, &self.memory] {
            if let Some(o) = space.overlaps().first() {
                return Err(BoardError(format!("two devices in one place: {o}")));
            }
        }
        Ok(())
    }
}

/// Maps a firmware image at the end of the 4 GiB, and its last 128 KiB below 1 MiB too (82441FX §4.1).
fn add_firmware(pci: &Region, image: &[u8]) -> Result<Arc<RamBlock>, BoardError> {
    let len = image.len() as u64;
    if !len.is_multiple_of(0x1_0000) || len == 0 || len > 16 << 20 {
        return Err(BoardError(format!(
            "-bios: the image has {len} bytes; a firmware image is a whole number of 64 KiB (65536), up to 16 MiB"
        )));
    }
    let block = RamBlock::new("pc.bios", len).map_err(|e| BoardError(e.to_string()))?;
    block.write(0, image).map_err(|e| BoardError(e.to_string()))?;
    let rom = Region::rom("pc.bios", block.clone(), 0, len).with_owner("firmware");
    pci.add(FOUR_GIB - len, &rom, 0)?;
    let low = len.min(0x2_0000);
    let alias = Region::alias("isa-bios", &rom, len - low, u128::from(low)).with_owner("firmware");
    pci.add(0x10_0000 - low, &alias, 1)?;
    Ok(block)
}

/// The ranges below 1 MiB that the host bridge switches: each is RAM, read-only RAM, or what lies beneath on the PCI bus.
fn shadow_below_1m(core: &Core, system: &Region, pci: &Region, ram: &Region) -> Result<(), BoardError> {
    // Video memory: never RAM outside system-management mode.
    let vga = Region::alias("vga-window", pci, 0xa_0000, 0x2_0000);
    system.add(0xa_0000, &vga, 1)?;
    struct Segment {
        start: u64,
        bus: Region,
        rom: Region,
    }
    let mut segments = Vec::new();
    // 82441FX table 9: eight 16 KiB segments, four more below E0000h-EFFFFh, and the 64 KiB F segment.
    let ranges = (0..12).map(|n| (0xc_0000 + n * 0x4000, 0x4000)).chain([(0xf_0000, 0x1_0000)]);
    for (start, len) in ranges {
        let bus = Region::alias(&format!("pam-bus-{start:05x}"), pci, start, len);
        let rom = Region::alias(&format!("pam-rom-{start:05x}"), ram, start, len);
        rom.set_readonly(true);
        rom.set_enabled(false);
        system.add(start, &bus, 1)?;
        system.add(start, &rom, 1)?;
        segments.push(Segment { start, bus, rom });
    }
    // With the A20 gate closed the second MiB is the first one again. Any chip that has a gate can open it (82371SB, port 92h).
    let wrap = Region::alias("a20-wrap", ram, 0, 0x10_0000);
    wrap.set_enabled(false);
    system.add(0x10_0000, &wrap, 2)?;
    let open: Mutex<BTreeSet<u16>> = Mutex::default();
    core.set_a20(move |slot, on| {
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        if on {
            open.insert(slot)
        } else {
            open.remove(&slot)
        };
        if wrap.is_enabled() != open.is_empty() {
            wrap.set_enabled(open.is_empty());
        }
    });
    core.set_shadow(move |shadow: Shadow| {
        let _t = hyaline_space::transaction();
        for s in segments.iter().filter(|s| (shadow.start..shadow.start + shadow.len).contains(&s.start)) {
            // Writing to RAM under a ROM that is still read can't be had with one region: writes go to the bus then.
            s.bus.set_enabled(!shadow.read);
            s.rom.set_enabled(shadow.read && !shadow.write);
        }
    });
    let window = vga.clone();
    core.set_smram(move |smram| window.set_enabled(!(smram.enabled && smram.open)));
    Ok(())
}
