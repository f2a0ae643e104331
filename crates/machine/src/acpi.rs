//! ACPI tables of the PC board (ACPI Specification 6.4, chapter 5).
//!
//! The tables are made once, as one block with a list of pointers and checksums. A direct boot places the block itself; firmware gets
//! it through fw_cfg with a script of the same pointers (`etc/table-loader`).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package, Path,
    ResourceTemplate, Scope, Zero,
};
use acpi_tables::{Aml, AmlSink};

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct Config {
    /// Processors; their APIC IDs are 0, 1, 2 …
    pub cpus: u8,
    /// First address of the PCI memory hole below 4 GiB.
    pub pci_hole: u32,
    /// A window for 64-bit PCI memory: first address and bytes.
    pub pci_window64: Option<(u64, u64)>,
    /// Serial ports: base and interrupt.
    pub serial: Vec<(u16, u8)>,
    /// Is there an HPET?
    pub hpet: bool,
    /// fw_cfg's ports.
    pub fw_cfg: bool,
    /// pvpanic's port.
    pub pvpanic: Option<u16>,
}

/// Addresses of the board that the tables name.
pub mod place {
    /// PM1a event block; the control block and the timer follow as the PIIX4 has them.
    pub const PM_BASE: u16 = 0x600;
    /// General-purpose event block 0, inside the PIIX4's block.
    pub const GPE0: u16 = PM_BASE + 0xc;
    /// SMI command port.
    pub const SMI_CMD: u16 = 0xb2;
    /// System control interrupt.
    pub const SCI: u8 = 9;
    /// I/O APIC.
    pub const IOAPIC: u32 = 0xfec0_0000;
    /// Local APICs.
    pub const LAPIC: u32 = 0xfee0_0000;
    /// HPET.
    pub const HPET: u32 = 0xfed0_0000;
    /// Interrupts that the PCI lines A to D are routed to.
    pub const PIRQ: [u8; 4] = [10, 10, 11, 11];
}

/// A pointer inside the block, to a place in the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pointer {
    at: usize,
    size: u8,
}

/// The tables as one block.
#[derive(Clone, Debug)]
pub struct Tables {
    block: Vec<u8>,
    pointers: Vec<Pointer>,
    /// Tables: start and length; the checksum is at start + 9.
    sums: Vec<(usize, usize)>,
    rsdt: usize,
}

/// Bytes as they are.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

/// IRQ descriptor without flags: edge-triggered, active high (§6.4.2.1).
struct Irq([u8; 3]);

impl Irq {
    fn new(n: u8) -> Irq {
        let mask = 1u16 << n;
        Irq([0x22, mask as u8, (mask >> 8) as u8])
    }
}

impl Aml for Irq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Tables {
    /// Makes the tables.
    pub fn new(config: &Config) -> Tables {
        let mut t = Tables { block: Vec::new(), pointers: Vec::new(), sums: Vec::new(), rsdt: 0 };
        // The FACS wants 64-byte alignment, so it is first.
        let facs = t.raw(&facs());
        let dsdt = t.table(b"DSDT", 2, &dsdt(config));
        let fadt = t.table(b"FACP", 3, &fadt());
        t.point(fadt + 36, 4, facs);
        t.point(fadt + 40, 4, dsdt);
        t.point(fadt + 140, 8, dsdt);
        let mut all = vec![fadt, t.table(b"APIC", 1, &madt(config))];
        if config.hpet {
            all.push(t.table(b"HPET", 1, &hpet()));
        }
        t.rsdt = t.table(b"RSDT", 1, &vec![0; all.len() * 4]);
        for (i, table) in all.into_iter().enumerate() {
            t.point(t.rsdt + 36 + i * 4, 4, table);
        }
        t
    }

    fn raw(&mut self, bytes: &[u8]) -> usize {
        let at = self.block.len();
        self.block.extend(bytes);
        self.block.resize(self.block.len().next_multiple_of(16), 0);
        at
    }

    /// Adds a table with its header (§5.2.6).
    fn table(&mut self, signature: &[u8; 4], revision: u8, body: &[u8]) -> usize {
        let len = 36 + body.len();
        let mut table = Vec::with_capacity(len);
        table.extend(signature);
        table.extend((len as u32).to_le_bytes());
        table.extend([revision, 0]);
        table.extend(b"HYALIN");
        table.extend(b"HYALINPC");
        table.extend(1u32.to_le_bytes());
        table.extend(b"HYAL");
        table.extend(1u32.to_le_bytes());
        table.extend(body);
        let at = self.raw(&table);
        self.sums.push((at, len));
        at
    }

    fn point(&mut self, at: usize, size: u8, target: usize) {
        self.block[at..at + usize::from(size)]
            .copy_from_slice(&(target as u64).to_le_bytes()[..usize::from(size)]);
        self.pointers.push(Pointer { at, size });
    }

    /// The block as it looks at guest-physical address `base` (64-byte aligned), and the root pointer that goes with it.
    pub fn at(&self, base: u32) -> (Vec<u8>, [u8; 20]) {
        let mut block = self.block.clone();
        for p in &self.pointers {
            let field = &mut block[p.at..p.at + usize::from(p.size)];
            let mut v = [0; 8];
            v[..field.len()].copy_from_slice(field);
            let v = (u64::from_le_bytes(v) + u64::from(base)).to_le_bytes();
            field.copy_from_slice(&v[..field.len()]);
        }
        for &(start, len) in &self.sums {
            block[start + 9] = 0;
            block[start + 9] = checksum(&block[start..start + len]);
        }
        let mut rsdp = rsdp(base + self.rsdt as u32);
        rsdp[8] = checksum(&rsdp);
        (block, rsdp)
    }

    /// Files for fw_cfg: `etc/acpi/tables`, `etc/acpi/rsdp` and the script that links them, `etc/table-loader`.
    pub fn fw_cfg_files(&self) -> [(&'static str, Vec<u8>); 3] {
        const TABLES: &str = "etc/acpi/tables";
        const RSDP: &str = "etc/acpi/rsdp";
        let mut script = Vec::new();
        let mut command = |number: u32, parts: &[&[u8]]| {
            let start = script.len();
            script.extend(number.to_le_bytes());
            parts.iter().for_each(|p| script.extend(*p));
            script.resize(start + 128, 0);
        };
        let file = |name: &str| {
            let mut field = [0u8; 56];
            field[..name.len()].copy_from_slice(name.as_bytes());
            field
        };
        let num = |v: usize| (v as u32).to_le_bytes();
        // 1: allocate, with alignment and zone (1 high memory, 2 the F segment).
        command(1, &[&file(TABLES), &num(64), &[1]]);
        command(1, &[&file(RSDP), &num(16), &[2]]);
        // 2: add the address of a file to a pointer.
        for p in &self.pointers {
            command(2, &[&file(TABLES), &file(TABLES), &num(p.at), &[p.size]]);
        }
        command(2, &[&file(RSDP), &file(TABLES), &num(16), &[4]]);
        // 3: checksum of a range.
        for &(start, len) in &self.sums {
            command(3, &[&file(TABLES), &num(start + 9), &num(start), &num(len)]);
        }
        command(3, &[&file(RSDP), &num(8), &num(0), &num(20)]);
        [(TABLES, self.block.clone()), (RSDP, rsdp(self.rsdt as u32).to_vec()), ("etc/table-loader", script)]
    }

    /// Bytes that the block takes.
    pub fn len(&self) -> usize {
        self.block.len()
    }

    /// Never: there is always a DSDT.
    pub fn is_empty(&self) -> bool {
        self.block.is_empty()
    }
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |s, b| s.wrapping_sub(*b))
}

/// Root pointer, revision 0 (§5.2.5.3), without its checksum.
fn rsdp(rsdt: u32) -> [u8; 20] {
    let mut r = [0; 20];
    r[..8].copy_from_slice(b"RSD PTR ");
    r[9..15].copy_from_slice(b"HYALIN");
    r[16..20].copy_from_slice(&rsdt.to_le_bytes());
    r
}

/// Firmware control structure (§5.2.10): 64 bytes, no checksum.
fn facs() -> [u8; 64] {
    let mut f = [0; 64];
    f[..4].copy_from_slice(b"FACS");
    f[4..8].copy_from_slice(&64u32.to_le_bytes());
    f
}

/// Fixed description table (§5.2.9), revision 3: 244 bytes with the header. Offsets below are the specification's.
fn fadt() -> Vec<u8> {
    let mut f = vec![0u8; 244];
    let mut set = |at: usize, bytes: &[u8]| f[at..at + bytes.len()].copy_from_slice(bytes);
    let port = |p: u16| u32::from(p).to_le_bytes();
    set(45, &[1]); // Preferred_PM_Profile: desktop
    set(46, &u16::from(place::SCI).to_le_bytes());
    set(48, &port(place::SMI_CMD));
    set(52, &[0xf1, 0xf0]); // ACPI_ENABLE, ACPI_DISABLE
    set(56, &port(place::PM_BASE));
    set(64, &port(place::PM_BASE + 4));
    set(76, &port(place::PM_BASE + 8));
    set(80, &port(place::GPE0));
    set(88, &[4, 2, 0, 4, 4, 0]); // PM1_EVT_LEN, PM1_CNT_LEN, PM2_CNT_LEN, PM_TMR_LEN, GPE0_BLK_LEN, GPE1_BLK_LEN
    set(96, &0xfffu16.to_le_bytes()); // P_LVL2_LAT: not supported
    set(98, &0xfffu16.to_le_bytes()); // P_LVL3_LAT: not supported
    set(108, &[0x32]); // CENTURY
    set(109, &0b0111u16.to_le_bytes()); // IAPC_BOOT_ARCH: legacy devices, 8042, no VGA
    // WBINVD, PROC_C1, SLP_BUTTON (no sleep button), RTC_S4, RESET_REG_SUP
    set(112, &(1u32 | 1 << 2 | 1 << 5 | 1 << 7 | 1 << 10).to_le_bytes());
    let gas = |port: u16, bits: u8| {
        let mut g = [1, bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        g[4..6].copy_from_slice(&port.to_le_bytes());
        g
    };
    set(116, &gas(0xcf9, 8)); // RESET_REG
    set(128, &[0x0f]); // RESET_VALUE
    set(148, &gas(place::PM_BASE, 32));
    set(172, &gas(place::PM_BASE + 4, 16));
    set(208, &gas(place::PM_BASE + 8, 32));
    set(220, &gas(place::GPE0, 32));
    f.drain(..36);
    f
}

/// Interrupt controllers (§5.2.12).
fn madt(config: &Config) -> Vec<u8> {
    let mut m = Vec::new();
    m.extend(place::LAPIC.to_le_bytes());
    m.extend(1u32.to_le_bytes()); // PCAT_COMPAT: there is an 8259 pair too
    for n in 0..config.cpus {
        m.extend([0, 8, n, n, 1, 0, 0, 0]);
    }
    m.extend([1, 12, 0, 0]);
    m.extend(place::IOAPIC.to_le_bytes());
    m.extend(0u32.to_le_bytes());
    let mut source_override = |irq: u8, gsi: u32, flags: u16| {
        m.extend([2, 10, 0, irq]);
        m.extend(gsi.to_le_bytes());
        m.extend(flags.to_le_bytes());
    };
    // ISA interrupt 0 reaches pin 2; the PCI lines and the SCI are level-triggered, active high.
    source_override(0, 2, 0);
    for irq in [5, 9, 10, 11] {
        source_override(irq, u32::from(irq), 0b1101);
    }
    // Local APIC NMI: LINT1 of all processors.
    m.extend([4, 6, 0xff, 0, 0, 1]);
    m
}

/// IA-PC HPET specification 1.0a §3.2.4.
fn hpet() -> Vec<u8> {
    let mut h = Vec::new();
    h.extend(0x8086_a201u32.to_le_bytes());
    h.extend([0, 0, 0, 0]); // system memory
    h.extend(u64::from(place::HPET).to_le_bytes());
    h.extend([0, 0, 0, 0]);
    h
}

fn dsdt(config: &Config) -> Vec<u8> {
    let mut aml = Vec::new();
    pci_scope(config).to_aml_bytes_into(&mut aml);
    // S5 (§7.4.2.6): the PIIX4's sleep type for soft off is 0.
    let zero = Zero {};
    Name::new("_S5_".into(), &Package::new(vec![&zero, &zero, &zero, &zero])).to_aml_bytes(&mut aml);
    for n in 0..config.cpus {
        let hid = "ACPI0007";
        let uid = u32::from(n);
        let hid = Name::new("_HID".into(), &hid);
        let uid = Name::new("_UID".into(), &uid);
        let path: Path = format!("CP{n:02X}").as_str().into();
        let device = Device::new(path, vec![&hid, &uid]);
        Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(&mut aml);
    }
    aml
}

/// An AML fragment made in a function of its own: the builder's types borrow their parts.
struct Fragment(Vec<u8>);

impl Fragment {
    fn to_aml_bytes_into(&self, out: &mut Vec<u8>) {
        out.extend(&self.0);
    }
}

fn fragment(a: &dyn Aml) -> Vec<u8> {
    let mut v = Vec::new();
    a.to_aml_bytes(&mut v);
    v
}

/// A device below the ISA bridge.
fn isa_device(name: &str, hid: &str, uid: u32, resources: Vec<&dyn Aml>) -> Vec<u8> {
    // Seven characters are an EISA ID, which has a packed form.
    let id: Box<dyn Aml> =
        if hid.len() == 7 { Box::new(EISAName::new(hid)) } else { Box::new(hid.to_string()) };
    let (hid, uid) = (Name::new("_HID".into(), &*id), Name::new("_UID".into(), &uid));
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    fragment(&Device::new(name.into(), vec![&hid, &uid, &crs]))
}

fn pci_scope(config: &Config) -> Fragment {
    let mut isa = Vec::new();
    let io = |base: u16, len: u8| IO::new(base, base, 1, len);
    for (i, &(base, irq)) in config.serial.iter().enumerate() {
        let name = format!("COM{}", i + 1);
        isa.extend(isa_device(&name, "PNP0501", i as u32 + 1, vec![&io(base, 8), &Irq::new(irq)]));
    }
    isa.extend(isa_device("KBD_", "PNP0303", 0, vec![&io(0x60, 1), &io(0x64, 1), &Irq::new(1)]));
    isa.extend(isa_device("MOU_", "PNP0F13", 0, vec![&Irq::new(12)]));
    isa.extend(isa_device("RTC_", "PNP0B00", 0, vec![&io(0x70, 8), &Irq::new(8)]));
    if config.fw_cfg {
        isa.extend(isa_device("FWCF", "QEMU0002", 0, vec![&io(0x510, 12)]));
    }
    if let Some(port) = config.pvpanic {
        isa.extend(isa_device("PEVT", "QEMU0001", 0, vec![&io(port, 1)]));
    }
    let isa_bridge = {
        let adr = Name::new("_ADR".into(), &0x0001_0000u32);
        fragment(&Device::new("ISA_".into(), vec![&adr, &Raw(&isa)]))
    };

    // Line A of device d goes to PIRQ (d - 1) mod 4, the other lines follow (82371SB §4.1 as boards wire it). The board programs the
    // routes, so the table can name global interrupts, which are the ISA ones.
    let zero = Zero {};
    let mut entries = Vec::new();
    for device in 1u32..32 {
        for pin in 0u8..4 {
            let gsi = u32::from(place::PIRQ[(device as usize + usize::from(pin) + 3) % 4]);
            let address = device << 16 | 0xffff;
            // The power-management function's interrupt is the SCI, wired by itself.
            let gsi = if device == 1 && pin == 0 { u32::from(place::SCI) } else { gsi };
            entries.push(fragment(&Package::new(vec![&address, &pin, &zero, &gsi])));
        }
    }
    let entries: Vec<Raw<'_>> = entries.iter().map(|e| Raw(e)).collect();
    let prt = Name::new("_PRT".into(), &Package::new(entries.iter().map(|e| e as &dyn Aml).collect()));

    let bus = AddressSpace::<u16>::new_bus_number(0, 0xff);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let low = AddressSpace::<u16>::new_io(0, 0xcf7, None);
    let high = AddressSpace::<u16>::new_io(0xd00, 0xffff, None);
    let vga =
        AddressSpace::<u32>::new_memory(AddressSpaceCacheable::NotCacheable, true, 0xa_0000, 0xb_ffff, None);
    let hole = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        config.pci_hole,
        0xfebf_ffff,
        None,
    );
    let wide = config.pci_window64.map(|(start, len)| {
        AddressSpace::<u64>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            start,
            start + len - 1,
            None,
        )
    });
    let mut windows: Vec<&dyn Aml> = vec![&bus, &config_ports, &low, &high, &vga, &hole];
    windows.extend(wide.as_ref().map(|w| w as &dyn Aml));
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(windows));
    let (hid, uid) = (Name::new("_HID".into(), &EISAName::new("PNP0A03")), Name::new("_UID".into(), &zero));
    let adr = Name::new("_ADR".into(), &zero);
    let isa = Raw(&isa_bridge);
    let pci = Device::new("PCI0".into(), vec![&hid, &adr, &uid, &crs, &prt, &isa]);
    let mut all: Vec<&dyn Aml> = vec![&pci];
    let hpet = hpet_device();
    let hpet = Raw(&hpet);
    if config.hpet {
        all.push(&hpet);
    }
    Fragment(fragment(&Scope::new("_SB_".into(), all)))
}

fn hpet_device() -> Vec<u8> {
    let (hid, uid) =
        (Name::new("_HID".into(), &EISAName::new("PNP0103")), Name::new("_UID".into(), &Zero {}));
    let memory = Memory32Fixed::new(false, place::HPET, 0x400);
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory]));
    fragment(&Device::new("HPET".into(), vec![&hid, &uid, &crs]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            cpus: 2,
            pci_hole: 0xc000_0000,
            pci_window64: Some((0x80_0000_0000, 1 << 39)),
            serial: vec![(0x3f8, 4), (0x2f8, 3)],
            hpet: true,
            fw_cfg: true,
            pvpanic: Some(0x505),
        }
    }

    fn u32_at(b: &[u8], at: usize) -> usize {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap()) as usize
    }

    #[test]
    fn every_pointer_leads_to_a_table_with_a_right_checksum() {
        let base = 0x7fff_0000u32;
        let (block, rsdp) = Tables::new(&config()).at(base);
        assert_eq!(rsdp.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        let rsdt = u32_at(&rsdp, 16) - base as usize;
        let table = |at: usize, signature: &[u8]| {
            assert_eq!(&block[at..at + 4], signature);
            let len = u32_at(&block, at + 4);
            assert_eq!(block[at..at + len].iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0, "{signature:?}");
            len
        };
        let len = table(rsdt, b"RSDT");
        assert_eq!((len - 36) / 4, 3);
        for (i, signature) in [b"FACP", b"APIC", b"HPET"].iter().enumerate() {
            table(u32_at(&block, rsdt + 36 + 4 * i) - base as usize, *signature);
        }
        let fadt = u32_at(&block, rsdt + 36) - base as usize;
        table(u32_at(&block, fadt + 40) - base as usize, b"DSDT");
        assert_eq!(&block[u32_at(&block, fadt + 36) - base as usize..][..4], b"FACS");
        assert_eq!(u32_at(&block, fadt + 140), u32_at(&block, fadt + 40));
    }

    #[test]
    fn the_loader_script_makes_the_same_tables() {
        let tables = Tables::new(&config());
        let [(_, mut block), (_, mut rsdp), (_, script)] = tables.fw_cfg_files();
        let base = 0x1234_0000u32;
        for c in script.chunks(128) {
            let name = |at: usize| {
                String::from_utf8(c[at..at + 56].iter().copied().take_while(|b| *b != 0).collect()).unwrap()
            };
            let target = if name(4).ends_with("rsdp") { &mut rsdp } else { &mut block };
            match c[0] {
                1 => {}
                2 => {
                    assert_eq!(name(60), "etc/acpi/tables");
                    let (at, size) = (u32_at(c, 116), usize::from(c[120]));
                    let mut v = [0; 8];
                    v[..size].copy_from_slice(&target[at..at + size]);
                    let v = u64::from_le_bytes(v) + u64::from(base);
                    target[at..at + size].copy_from_slice(&v.to_le_bytes()[..size]);
                }
                3 => {
                    let (at, start, len) = (u32_at(c, 60), u32_at(c, 64), u32_at(c, 68));
                    let sum = target[start..start + len].iter().fold(0u8, |s, b| s.wrapping_sub(*b));
                    target[at] = target[at].wrapping_add(sum);
                }
                n => panic!("command {n}"),
            }
        }
        let (want, root) = tables.at(base);
        assert_eq!(block, want);
        assert_eq!(rsdp, root);
    }
}
