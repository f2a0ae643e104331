//! The registers of the Am79C970A.

use crate::pci::config::{Bar, HEADER_LEN, Identity, header};
use hyaline_device::{Bank, Chip, Place, registers};

/// What the function says of itself (data sheet, "PCI Configuration Registers").
pub const ID: Identity = Identity {
    vendor: 0x1022,
    device: 0x2000,
    class: 0x02_0000,
    revision: 0x16,
    subsystem: (0, 0),
    pin: 1,
    multifunction: false,
};
/// Both windows show the same 32 bytes.
pub const BARS: &[Bar] = &[Bar::io(0, IO_BANK, 32), Bar::mem32(1, MEM_BANK, 32)];

/// Number of the configuration bank.
pub const CONFIG_BANK: usize = 0;
/// Number of the bank of ports.
pub const IO_BANK: usize = 1;
/// Number of the same registers in memory.
pub const MEM_BANK: usize = 2;
/// Number of the bank of control and status registers.
pub const CSR_BANK: usize = 3;
/// Number of the bank of bus configuration registers.
pub const BCR_BANK: usize = 4;

/// The address PROM, at the start of the window in both modes.
pub mod aprom {
    use super::registers;
    registers! {
        /// The first half of the window.
        pub bank BANK "aprom" Port 16 {
            APROM0  0x00 4 rw = 0x0, "I/O Resources", "Address PROM: bytes 0 to 3 of the IEEE address" { BYTES 0..=31 wo };
            APROM4  0x04 4 rw = 0x0, "I/O Resources", "Address PROM: bytes 4 and 5 of the IEEE address, two reserved" { BYTES 0..=31 wo };
            APROM8  0x08 4 rw = 0x0, "I/O Resources", "Address PROM: reserved, hardware ID 11h, user's" { BYTES 0..=31 wo };
            APROM12 0x0c 4 rw = 0x0, "I/O Resources", "Address PROM: checksum and the letters WW" { BYTES 0..=31 wo };
        }
    }
}
/// Word I/O mode: what the window shows after reset.
pub mod wio {
    use super::registers;
    registers! {
        /// The second half of the window.
        pub bank BANK "wio" Port 32 {
            RDP   0x10 2 rw = 0x0, "I/O Resources, table Word I/O", "Register data port: the CSR that RAP selects" when "DWIO = 0" { DATA 0..=15 wo };
            RAP   0x12 2 rw = 0x0, "I/O Resources, table Word I/O", "Register address port" when "DWIO = 0" { INDEX 0..=6; RESERVED 7..=15 ro };
            RESET 0x14 2 rw = 0x0, "I/O Resources, table Word I/O", "Reading it resets the controller (S_RESET)" !effect when "DWIO = 0" { DATA 0..=15 wo };
            BDP   0x16 2 rw = 0x0, "I/O Resources, table Word I/O", "Bus data port: the BCR that RAP selects" when "DWIO = 0" { DATA 0..=15 wo };
        }
    }
}
/// Double-word I/O mode: after a 32-bit write to RDP.
pub mod dwio {
    use super::registers;
    registers! {
        /// The second half of the window.
        pub bank BANK "dwio" Port 32 {
            RDP   0x10 4 rw = 0x0, "I/O Resources, table Double Word I/O", "Register data port: the CSR that RAP selects" when "DWIO = 1" { DATA 0..=15 wo; RESERVED 16..=31 ro };
            RAP   0x14 4 rw = 0x0, "I/O Resources, table Double Word I/O", "Register address port" when "DWIO = 1" { INDEX 0..=6; RESERVED 7..=31 ro };
            RESET 0x18 4 rw = 0x0, "I/O Resources, table Double Word I/O", "Reading it resets the controller (S_RESET)" !effect when "DWIO = 1" { DATA 0..=31 wo };
            BDP   0x1c 4 rw = 0x0, "I/O Resources, table Double Word I/O", "Bus data port: the BCR that RAP selects" when "DWIO = 1" { DATA 0..=15 wo; RESERVED 16..=31 ro };
        }
    }
}
/// Control and status registers, by their numbers.
pub mod csr {
    use super::registers;
    registers! {
        /// Behind RAP and RDP.
        pub bank BANK "csr" Indexed 128 {
            CSR0   0 2 rw = 0x0004, "CSR0", "Controller status" {
                INIT 0 ro; STRT 1 ro; STOP 2 ro; TDMD 3 ro; TXON 4 ro; RXON 5 ro; IENA 6; INTR 7 ro; IDON 8 w1c; TINT 9 w1c; RINT 10 w1c;
                MERR 11 w1c; MISS 12 w1c; CERR 13 w1c; BABL 14 w1c; ERR 15 ro };
            IADR_LO 1 2 rw = 0x0000, "CSR1", "Initialization block address, low";
            IADR_HI 2 2 rw = 0x0000, "CSR2", "Initialization block address, high; bits 15 to 8 are those of all addresses in 16-bit mode";
            CSR3   3 2 rw = 0x0000, "CSR3", "Interrupt masks and deferral control" {
                BSWP 2; EMBA 3; DXMT2PD 4; LAPPEN 5; DXSUFLO 6; IDONM 8; TINTM 9; RINTM 10; MERRM 11; MISSM 12; BABLM 14 };
            CSR4   4 2 rw = 0x0115, "CSR4", "Test and features control" {
                JABM 0; JAB 1 w1c; TXSTRTM 2; TXSTRT 3 w1c; RCVCCOM 4; RCVCCO 5 w1c; UINT 6 w1c; UINTCMD 7 ro; MFCOM 8; MFCO 9 w1c;
                ASTRP_RCV 10; APAD_XMT 11; TXDPOLL 12; TIMER 13; DMAPLUS 14; ENTST 15 };
            CSR5   5 2 rw = 0x0000, "CSR5", "Extended control and interrupt" {
                SPND 0; MPMODE 1; MPEN 2; MPINTE 3; MPINT 4 w1c; MPPLBA 5; EXDINTE 6; EXDINT 7 w1c; SLPINTE 8; SLPINT 9 w1c; SINTE 10; SINT 11 w1c;
                LTINTEN 14; TOKINTD 15 };
            CSR6   6 2 ro = 0x0000, "CSR6", "Ring lengths as encoded in the initialization block" { RLEN 8..=11; TLEN 12..=15 };
            LADRF0 8 2 rw = 0x0000, "CSR8", "Logical address filter, bits 15 to 0";
            LADRF1 9 2 rw = 0x0000, "CSR9", "Logical address filter, bits 31 to 16";
            LADRF2 10 2 rw = 0x0000, "CSR10", "Logical address filter, bits 47 to 32";
            LADRF3 11 2 rw = 0x0000, "CSR11", "Logical address filter, bits 63 to 48";
            PADR0  12 2 rw = 0x0000, "CSR12", "Physical address, bytes 0 and 1: from the address PROM after reset" { BYTES 0..=15 wo };
            PADR1  13 2 rw = 0x0000, "CSR13", "Physical address, bytes 2 and 3" { BYTES 0..=15 wo };
            PADR2  14 2 rw = 0x0000, "CSR14", "Physical address, bytes 4 and 5" { BYTES 0..=15 wo };
            MODE   15 2 rw = 0x0000, "CSR15", "Mode" {
                DRX 0; DTX 1; LOOP 2; DXMTFCS 3; FCOLL 4; DRTY 5; INTL 6; PORTSEL 7..=8 {0 "AUI", 1 "10BASE-T", 2 "GPSI"}; LRT_TSEL 9;
                MENDECL 10; DAPC 11; DLNKTST 12; DRCVPA 13; DRCVBC 14; PROM 15 };
            IADRL2 16 2 rw = 0x0000, "CSR16", "Alias of CSR1";
            IADRH2 17 2 rw = 0x0000, "CSR17", "Alias of CSR2";
            CRBAL  18 2 rw = 0x0000, "CSR18", "Current receive buffer address, low";
            CRBAU  19 2 rw = 0x0000, "CSR19", "Current receive buffer address, high";
            CXBAL  20 2 rw = 0x0000, "CSR20", "Current transmit buffer address, low";
            CXBAU  21 2 rw = 0x0000, "CSR21", "Current transmit buffer address, high";
            NRBAL  22 2 rw = 0x0000, "CSR22", "Next receive buffer address, low";
            NRBAU  23 2 rw = 0x0000, "CSR23", "Next receive buffer address, high";
            BADRL  24 2 rw = 0x0000, "CSR24", "Base address of the receive ring, low";
            BADRU  25 2 rw = 0x0000, "CSR25", "Base address of the receive ring, high";
            NRDAL  26 2 rw = 0x0000, "CSR26", "Next receive descriptor address, low";
            NRDAU  27 2 rw = 0x0000, "CSR27", "Next receive descriptor address, high";
            CRDAL  28 2 rw = 0x0000, "CSR28", "Current receive descriptor address, low";
            CRDAU  29 2 rw = 0x0000, "CSR29", "Current receive descriptor address, high";
            BADXL  30 2 rw = 0x0000, "CSR30", "Base address of the transmit ring, low";
            BADXU  31 2 rw = 0x0000, "CSR31", "Base address of the transmit ring, high";
            NXDAL  32 2 rw = 0x0000, "CSR32", "Next transmit descriptor address, low";
            NXDAU  33 2 rw = 0x0000, "CSR33", "Next transmit descriptor address, high";
            CXDAL  34 2 rw = 0x0000, "CSR34", "Current transmit descriptor address, low";
            CXDAU  35 2 rw = 0x0000, "CSR35", "Current transmit descriptor address, high";
            NNRDL  36 2 rw = 0x0000, "CSR36", "Next but one receive descriptor address, low";
            NNRDU  37 2 rw = 0x0000, "CSR37", "Next but one receive descriptor address, high";
            NNXDL  38 2 rw = 0x0000, "CSR38", "Next but one transmit descriptor address, low";
            NNXDU  39 2 rw = 0x0000, "CSR39", "Next but one transmit descriptor address, high";
            CRBC   40 2 rw = 0x0000, "CSR40", "Current receive byte count";
            CRST   41 2 rw = 0x0000, "CSR41", "Current receive status";
            CXBC   42 2 rw = 0x0000, "CSR42", "Current transmit byte count";
            CXST   43 2 rw = 0x0000, "CSR43", "Current transmit status";
            NRBC   44 2 rw = 0x0000, "CSR44", "Next receive byte count";
            NRST   45 2 rw = 0x0000, "CSR45", "Next receive status";
            POLL   46 2 rw = 0x0000, "CSR46", "Poll time counter: clocks to the next poll, as a negative number" { COUNT 0..=15 ro };
            POLLINT 47 2 rw = 0x0000, "CSR47", "Polling interval in clocks, as a negative number; 0 means 65,536";
            SWS    58 2 rw = 0x0200, "CSR58", "Alias of BCR20" { SWSTYLE 0..=7; SSIZE32 8 ro; CSRPCNET 9 ro; APERREN 10 };
            PXDAL  60 2 rw = 0x0000, "CSR60", "Previous transmit descriptor address, low";
            PXDAU  61 2 rw = 0x0000, "CSR61", "Previous transmit descriptor address, high";
            PXBC   62 2 rw = 0x0000, "CSR62", "Previous transmit byte count";
            PXST   63 2 rw = 0x0000, "CSR63", "Previous transmit status";
            NXBAL  64 2 rw = 0x0000, "CSR64", "Next transmit buffer address, low";
            NXBAU  65 2 rw = 0x0000, "CSR65", "Next transmit buffer address, high";
            NXBC   66 2 rw = 0x0000, "CSR66", "Next transmit byte count";
            NXST   67 2 rw = 0x0000, "CSR67", "Next transmit status";
            RCVRC  72 2 rw = 0x0000, "CSR72", "Receive ring counter: the current descriptor, counted up from the negative length";
            XMTRC  74 2 rw = 0x0000, "CSR74", "Transmit ring counter";
            RCVRL  76 2 rw = 0x0000, "CSR76", "Receive ring length, as a negative number";
            XMTRL  78 2 rw = 0x0000, "CSR78", "Transmit ring length, as a negative number";
            FIFOTH 80 2 rw = 0x1410, "CSR80", "DMA transfer counter and FIFO thresholds" { DMATC 0..=7; XMTFW 8..=9; XMTSP 10..=11; RCVFW 12..=13; RESERVED 14..=15 ro };
            DMABAT 82 2 rw = 0x0000, "CSR82", "Bus activity timer";
            DMABAL 84 2 rw = 0x0000, "CSR84", "DMA address, low";
            DMABAU 85 2 rw = 0x0000, "CSR85", "DMA address, high";
            DMABC  86 2 rw = 0x0000, "CSR86", "DMA byte count" { COUNT 0..=11; RESERVED 12..=15 ro };
            CHIPIDL 88 2 ro = 0x1003, "CSR88", "Chip ID, low" { ONE 0; MANFID 1..=11; PARTIDL 12..=15 };
            CHIPIDU 89 2 ro = 0x0262, "CSR89", "Chip ID, high" { PARTIDU 0..=11; VER 12..=15 };
            RCON   92 2 ro = 0x0000, "CSR92", "Ring length conversion: what was last written to CSR76 or CSR78, as a positive number";
            XMTTDR 94 2 ro = 0x0000, "CSR94", "Transmit time domain reflectometry count: no cable fault is ever seen";
            MERRTO 100 2 rw = 0x0200, "CSR100", "Bus time-out, in tenths of a microsecond";
            MFC    112 2 ro = 0x0000, "CSR112", "Missed frame count";
            RCVCC  114 2 ro = 0x0000, "CSR114", "Receive collision count: there are none";
            RCVALGN 122 2 rw = 0x0000, "CSR122", "Receive frame alignment" { ALIGN 0; RESERVED 1..=15 ro };
            BMUTEST 124 2 rw = 0x0000, "CSR124", "Test register 1" { RESERVED_0 0..=2 ro; RPA 3; GPSIEN 4; RESERVED_5 5..=15 ro };
        }
    }
}
/// Bus configuration registers, by their numbers.
pub mod bcr {
    use super::registers;
    registers! {
        /// Behind RAP and BDP.
        pub bank BANK "bcr" Indexed 32 {
            MSRDA  0 2 rw = 0x0005, "BCR0", "Master mode read active: kept, without effect";
            MSWRA  1 2 rw = 0x0005, "BCR1", "Master mode write active: kept, without effect";
            MC     2 2 rw = 0x0002, "BCR2", "Miscellaneous configuration" {
                XMAUSEL 0; ASEL 1; AWAKE 2; EADISEL 3; RESERVED_4 4..=6 ro; INTLEVEL 7; APROMWE 8; RESERVED_9 9..=11 ro; LEDPE 12; RESERVED_13 13 ro;
                TMAULOOP 14; RESERVED_15 15 ro };
            LNKST  4 2 rw = 0x00c0, "BCR4", "LED 0: link status" { COLE 0; JABE 1; RCVE 2; RXPOLE 3; XMTE 4; RCVME 5; LNKSE 6; PSE 7; FDLSE 8; MPSE 9; RESERVED 10..=12 ro; LEDDIS 13; LEDPOL 14; LEDOUT 15 ro };
            LED1   5 2 rw = 0x0084, "BCR5", "LED 1: receive" { COLE 0; JABE 1; RCVE 2; RXPOLE 3; XMTE 4; RCVME 5; LNKSE 6; PSE 7; FDLSE 8; MPSE 9; RESERVED 10..=12 ro; LEDDIS 13; LEDPOL 14; LEDOUT 15 ro };
            LED2   6 2 rw = 0x0088, "BCR6", "LED 2: polarity" { COLE 0; JABE 1; RCVE 2; RXPOLE 3; XMTE 4; RCVME 5; LNKSE 6; PSE 7; FDLSE 8; MPSE 9; RESERVED 10..=12 ro; LEDDIS 13; LEDPOL 14; LEDOUT 15 ro };
            LED3   7 2 rw = 0x0090, "BCR7", "LED 3: transmit" { COLE 0; JABE 1; RCVE 2; RXPOLE 3; XMTE 4; RCVME 5; LNKSE 6; PSE 7; FDLSE 8; MPSE 9; RESERVED 10..=12 ro; LEDDIS 13; LEDPOL 14; LEDOUT 15 ro };
            FDC    9 2 rw = 0x0000, "BCR9", "Full-duplex control" { FDEN 0; AUIFD 1; FDRPAD 2; RESERVED 3..=15 ro };
            IOBASEL 16 2 rw = 0x0000, "BCR16", "I/O base address, low: kept, without effect" { RESERVED 0..=4 ro; BASE 5..=15 };
            IOBASEU 17 2 rw = 0x0000, "BCR17", "I/O base address, high: kept, without effect";
            BSBC   18 2 rw = 0x9001, "BCR18", "Burst and bus control" { LINBC 0..=2; RESERVED_3 3..=4 ro; BWRITE 5; BREADE 6; DWIO 7 ro; EXTREQ 8; MEMCMD 9; RESERVED_10 10..=11 ro; ROMTMG 12..=15 };
            EECAS  19 2 rw = 0x0002, "BCR19", "EEPROM control and status: there is no EEPROM" { EDI_EDO 0; ESK 1; ECS 2; RESERVED_3 3 ro; EEN 4; RESERVED_5 5..=12 ro; EEDET 13 ro; PREAD 14 ro; PVALID 15 ro };
            SWS    20 2 rw = 0x0200, "BCR20", "Software style" {
                SWSTYLE 0..=7 {0 "LANCE", 1 "ILACC", 2 "PCnet-PCI", 3 "PCnet-PCI, descriptors reordered"}; SSIZE32 8 ro; CSRPCNET 9 ro; APERREN 10; RESERVED 11..=15 ro };
            PCILAT 22 2 rw = 0xff06, "BCR22", "PCI latency: what MIN_GNT and MAX_LAT tell" { MIN_GNT 0..=7; MAX_LAT 8..=15 };
        }
    }
}

static CONFIG: Bank = Bank {
    name: "config",
    place: Place::Config,
    size: 256,
    registers: &header::<HEADER_LEN>(&ID, BARS, &[]),
};

static IO: Bank = Bank {
    name: "io",
    place: Place::Port,
    size: 32,
    registers: &[
        aprom::APROM0,
        aprom::APROM4,
        aprom::APROM8,
        aprom::APROM12,
        wio::RDP,
        wio::RAP,
        wio::RESET,
        wio::BDP,
        dwio::RDP,
        dwio::RAP,
        dwio::RESET,
        dwio::BDP,
    ],
};
static MEM: Bank = Bank { name: "mem", place: Place::Memory, size: 32, registers: IO.registers };

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "pcnet",
    title: "AMD Am79C970A PCnet-PCI II Ethernet controller",
    manual: "Am79C970A data sheet, AMD publication 19436",
    modelled: "All registers with their reset values and write rules, word and double-word I/O, initialization from 16- and 32-bit blocks, software \
               styles 0 to 3, transmit and receive rings with chaining, polling, address filters, FCS, padding and stripping, loopback, magic packets, \
               missed frames, all interrupt causes that can happen, suspend, bus errors.",
    not_modelled: "Serial EEPROM, expansion ROM, LED lamps (their registers follow the link), collisions, GPSI and external address detection, \
                   the receive look-ahead of LAPPEN.",
    deviations: "A frame is sent and done when its descriptor is seen. External loopback echoes each frame as if a loopback plug were on the wire and \
                 sends it out too. Runt frames are accepted in loopback. Frames from the host's side are padded to 60 bytes.",
    banks: &[&CONFIG, &IO, &MEM, &csr::BANK, &bcr::BANK],
    outputs: &["inta"],
    inputs: &["link"],
};
