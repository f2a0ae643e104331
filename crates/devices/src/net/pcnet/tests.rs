use super::registers::IO_BANK;
use super::*;
use hyaline_device::{Bench, device_laws, ms, us};

const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

device_laws!(Pcnet::new(MAC));

fn rap(b: &mut Bench<Pcnet>, n: u16) {
    b.write(IO_BANK, 0x12, 2, u64::from(n));
}
fn csr(b: &mut Bench<Pcnet>, n: u16) -> u16 {
    rap(b, n);
    b.read(IO_BANK, 0x10, 2) as u16
}
fn set_csr(b: &mut Bench<Pcnet>, n: u16, value: u16) {
    rap(b, n);
    b.write(IO_BANK, 0x10, 2, u64::from(value));
}
fn set_bcr(b: &mut Bench<Pcnet>, n: u16, value: u16) {
    rap(b, n);
    b.write(IO_BANK, 0x16, 2, u64::from(value));
}
fn bcr(b: &mut Bench<Pcnet>, n: u16) -> u16 {
    rap(b, n);
    b.read(IO_BANK, 0x16, 2) as u16
}
fn word(b: &Bench<Pcnet>, at: usize) -> u16 {
    u16::from_le_bytes(b.memory(at, 2).try_into().unwrap())
}
fn dword(b: &Bench<Pcnet>, at: usize) -> u32 {
    u32::from_le_bytes(b.memory(at, 4).try_into().unwrap())
}

const BLOCK: usize = 0x100;
const RX: usize = 0x400;
const TX: usize = 0x800;
const RX_BUFFERS: usize = 0x2000;
const TX_BUFFERS: usize = 0x8000;

/// Four descriptors in each ring, buffers of `size` bytes, in the given style; started with `mode`.
fn started(style: u16, mode: u16, size: u16) -> Bench<Pcnet> {
    let mut b = Bench::new(Pcnet::new(MAC));
    b.write(CONFIG_BANK, 4, 2, 5);
    set_bcr(&mut b, 20, style);
    let mut block = Vec::new();
    if style == 0 {
        block.extend(mode.to_le_bytes());
        block.extend(MAC);
        block.extend([0; 8]);
        for ring in [RX, TX] {
            block.extend((ring as u16).to_le_bytes());
            block.extend((2_u16 << 13).to_le_bytes());
        }
    } else {
        block.extend((2 << 28 | 2 << 20 | u32::from(mode)).to_le_bytes());
        block.extend(MAC);
        block.extend([0; 10]);
        block.extend((RX as u32).to_le_bytes());
        block.extend((TX as u32).to_le_bytes());
    }
    b.poke(BLOCK, &block);
    for i in 0..4 {
        descriptor(&mut b, style, RX, i, RX_BUFFERS + 0x800 * i, 0x8000, size);
        descriptor(&mut b, style, TX, i, TX_BUFFERS + 0x800 * i, 0, size);
    }
    set_csr(&mut b, 1, BLOCK as u16);
    set_csr(&mut b, 2, 0);
    set_csr(&mut b, 0, INIT);
    assert_eq!(csr(&mut b, 0), IDON | INIT | INTR);
    set_csr(&mut b, 0, IDON | STRT | IENA);
    b
}
fn descriptor(b: &mut Bench<Pcnet>, style: u16, ring: usize, i: usize, buffer: usize, flags: u16, size: u16) {
    let count = size.wrapping_neg();
    let at = ring + i * if style == 0 { 8 } else { 16 };
    let mut d = Vec::new();
    if style == 0 {
        for w in [buffer as u16, flags, count, 0] {
            d.extend(w.to_le_bytes());
        }
    } else {
        let one = u32::from(flags) << 16 | u32::from(count);
        let words = if style == 3 { [0, one, buffer as u32, 7] } else { [buffer as u32, one, 0, 7] };
        for w in words {
            d.extend(w.to_le_bytes());
        }
    }
    b.poke(at, &d);
}
/// Flags and status of a descriptor.
fn status(b: &Bench<Pcnet>, style: u16, ring: usize, i: usize) -> (u16, u32) {
    match style {
        0 => (word(b, ring + i * 8 + 2), u32::from(word(b, ring + i * 8 + 6))),
        3 => (word(b, ring + i * 16 + 6), dword(b, ring + i * 16)),
        _ => (word(b, ring + i * 16 + 6), dword(b, ring + i * 16 + 8)),
    }
}
fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut f = to.to_vec();
    f.extend(MAC);
    f.extend([0x08, 0x00]);
    f.extend((14..len).map(|i| i as u8));
    f
}

#[test]
fn the_check_sequence_is_ieee() {
    assert_eq!(!crc(b"123456789"), 0xcbf4_3926);
    let mut wire = b"123456789".to_vec();
    wire.extend(fcs(b"123456789"));
    assert!(checks(&wire));
}

#[test]
fn what_a_driver_probes() {
    let mut b = Bench::new(Pcnet::new(MAC));
    assert_eq!(b.read(CONFIG_BANK, 0, 4), 0x2000_1022);
    assert_eq!(b.read(CONFIG_BANK, 0x3c, 4) >> 8, 0xff0601);
    assert_eq!(b.read(IO_BANK, 0, 4) as u32, u32::from_le_bytes([0x52, 0x54, 0x00, 0x12]));
    assert_eq!((b.read(IO_BANK, 4, 2), b.read(IO_BANK, 14, 2)), (0x5634, 0x5757));
    let sum = (0..12).chain(14..16).map(|i| b.read(IO_BANK, i, 1)).sum::<u64>();
    assert_eq!(b.read(IO_BANK, 12, 2), sum);
    b.read(IO_BANK, 0x14, 2);
    assert_eq!(csr(&mut b, 0), STOP);
    rap(&mut b, 88);
    assert_eq!(b.read(IO_BANK, 0x12, 2), 88);
    let id = u32::from(csr(&mut b, 89)) << 16 | u32::from(csr(&mut b, 88));
    assert_eq!((id >> 12 & 0xffff, id & 0xfff), (0x2621, 0x003), "PCnet-PCI II");
    assert_eq!(bcr(&mut b, 4), 0x80c0, "link is up");
    b.input(0, false);
    assert_eq!(bcr(&mut b, 4), 0x00c0);
    assert_eq!(b.device.register(IO_BANK, 0x12, true).map(|r| r.name), Some("RAP"));
}

#[test]
fn double_word_mode_until_a_hard_reset() {
    let mut b = Bench::new(Pcnet::new(MAC));
    b.write(IO_BANK, 0x10, 4, 0);
    assert_eq!(b.device.register(IO_BANK, 0x14, true).map(|r| (r.name, r.width)), Some(("RAP", 4)));
    b.write(IO_BANK, 0x14, 4, 88);
    assert_eq!(b.read(IO_BANK, 0x10, 4), 0x1003);
    b.write(IO_BANK, 0x14, 4, 18);
    assert_eq!(b.read(IO_BANK, 0x1c, 4), 0x9081);
    b.read(IO_BANK, 0x18, 4);
    assert_eq!(b.read(IO_BANK, 0x14, 4), 0, "S_RESET clears RAP and keeps DWIO");
    assert!(b.try_read(IO_BANK, 0x12, 2).is_err());
    b.call(|d, cx| d.reset(Reset::System, cx));
    assert_eq!(csr(&mut b, 88), 0x1003);
}

#[test]
fn frames_go_out_in_every_style() {
    for style in 0..4 {
        let mut b = started(style, 0, 100);
        let f = frame([1, 2, 3, 4, 5, 6], 100);
        b.poke(TX_BUFFERS, &f);
        descriptor(&mut b, style, TX, 0, TX_BUFFERS, D_OWN | D_STP | D_ENP, 100);
        assert!(!b.level(0));
        set_csr(&mut b, 0, TDMD | IENA);
        assert_eq!(b.frames(0), [f], "style {style}");
        assert_eq!(status(&b, style, TX, 0), (D_STP | D_ENP, 0), "style {style}");
        assert!(b.level(0));
        assert_eq!(csr(&mut b, 0), INIT | STRT | TXON | RXON | IENA | INTR | TINT);
        assert_eq!(csr(&mut b, 4) & TXSTRT, TXSTRT);
        set_csr(&mut b, 0, TINT | IENA);
        assert!(!b.level(0));
    }
}

#[test]
fn polling_finds_frames_without_demand() {
    let mut b = started(2, 0, 60);
    descriptor(&mut b, 2, TX, 0, TX_BUFFERS, D_OWN | D_STP | D_ENP, 60);
    b.run(us(1980));
    assert!(b.frames(0).is_empty());
    b.run(us(10));
    assert_eq!(b.frames(0).len(), 1);
    set_csr(&mut b, 4, TXDPOLL);
    assert_eq!(b.next_timer(), None);
}

#[test]
fn chains_and_underflow() {
    let mut b = started(2, 0, 40);
    let f = frame([1; 6], 100);
    for (i, (piece, flags)) in f.chunks(40).zip([D_STP, 0, D_ENP]).enumerate() {
        b.poke(TX_BUFFERS + 0x800 * i, piece);
        descriptor(&mut b, 2, TX, i, TX_BUFFERS + 0x800 * i, D_OWN | flags, piece.len() as u16);
    }
    set_csr(&mut b, 0, TDMD | IENA);
    assert_eq!(b.frames(0), [f]);
    descriptor(&mut b, 2, TX, 3, TX_BUFFERS, D_OWN | D_STP, 40);
    set_csr(&mut b, 0, TDMD | IENA);
    assert_eq!(status(&b, 2, TX, 3), (D_STP | D_ERR, 0xc000_0000));
    assert_eq!(csr(&mut b, 0) & TXON, 0, "an underflow stops the transmitter");
}

#[test]
fn frames_come_in_in_every_style() {
    for style in 0..4 {
        let mut b = started(style, 0, 0x800);
        let f = frame(MAC, 80);
        b.receive(0, &f);
        let (flags, count) = status(&b, style, RX, 0);
        let pam = if style < 2 { 0 } else { D_PAM };
        assert_eq!((flags, count), (D_STP | D_ENP | pam, 84), "style {style}");
        assert_eq!(b.memory(RX_BUFFERS, 80), f);
        assert_eq!(b.memory(RX_BUFFERS + 80, 4), fcs(&f));
        assert!(b.level(0));
        b.receive(0, &frame([0xff; 6], 20));
        let bam = if style < 2 { 0 } else { D_BAM };
        assert_eq!(status(&b, style, RX, 1), (D_STP | D_ENP | bam, 64), "padded to the least length");
    }
}

#[test]
fn receive_chains_misses_and_runs_out_of_buffers() {
    let mut b = started(2, 0, 64);
    b.receive(0, &frame(MAC, 150));
    assert_eq!(status(&b, 2, RX, 0).0, D_STP);
    assert_eq!(status(&b, 2, RX, 1).0, 0);
    assert_eq!(status(&b, 2, RX, 2), (D_ENP | D_PAM, 154));
    b.receive(0, &frame(MAC, 100));
    assert_eq!(status(&b, 2, RX, 3).0, D_STP | D_ERR | D_BUFF, "the next one is not ours");
    b.receive(0, &frame(MAC, 100));
    assert_eq!(csr(&mut b, 0) & (MISS | ERR), MISS | ERR);
    assert_eq!(csr(&mut b, 112), 1);
}

#[test]
fn address_filters() {
    let got = |b: &mut Bench<Pcnet>, to: [u8; 6]| {
        b.receive(0, &frame(to, 60));
        let hit = csr(b, 0) & RINT != 0;
        set_csr(b, 0, RINT);
        hit
    };
    let multicast = [0x01, 0x00, 0x5e, 0, 0, 1];
    let mut b = started(2, 0, 0x800);
    assert!(!got(&mut b, [0x52, 0x54, 0, 0, 0, 1]));
    assert!(!got(&mut b, multicast));
    set_csr(&mut b, 5, SPND);
    let bit = (crc(&multicast) >> 26) as u16;
    set_csr(&mut b, 8 + bit / 16, 1 << (bit % 16));
    set_csr(&mut b, 15, DRCVBC | DRCVPA);
    set_csr(&mut b, 5, 0);
    assert!(got(&mut b, multicast));
    assert!(!got(&mut b, [0xff; 6]));
    assert!(!got(&mut b, MAC));
    set_csr(&mut b, 5, SPND);
    set_csr(&mut b, 15, PROM);
    assert!(!got(&mut b, MAC), "suspended");
    set_csr(&mut b, 5, 0);
    assert!(got(&mut b, [2, 2, 2, 2, 2, 2]));
}

#[test]
fn loopback_with_and_without_check_sequence() {
    let mut b = started(2, LOOP | INTL, 100);
    let f = frame(MAC, 100);
    b.poke(TX_BUFFERS, &f);
    descriptor(&mut b, 2, TX, 0, TX_BUFFERS, D_OWN | D_STP | D_ENP, 100);
    descriptor(&mut b, 2, RX, 0, RX_BUFFERS, D_OWN, 0x800);
    set_csr(&mut b, 0, TDMD | IENA);
    assert!(b.frames(0).is_empty(), "it stays inside");
    assert_eq!(status(&b, 2, RX, 0), (D_STP | D_ENP | D_PAM, 104));
    assert_eq!(b.memory(RX_BUFFERS, 100), f);
    assert_eq!(csr(&mut b, 0) & (RINT | TINT), RINT | TINT);

    let mut b = started(2, LOOP | INTL | DXMTFCS, 0x800);
    b.poke(TX_BUFFERS, &f);
    descriptor(&mut b, 2, TX, 0, TX_BUFFERS, D_OWN | D_STP | D_ENP, 100);
    set_csr(&mut b, 0, TDMD | IENA);
    assert_eq!(
        status(&b, 2, RX, 0),
        (D_STP | D_ENP | D_PAM | D_ERR | D_CRC, 100),
        "no check sequence was sent"
    );
    descriptor(&mut b, 2, TX, 1, TX_BUFFERS, D_OWN | D_STP | D_ENP | D_ADD_FCS, 100);
    set_csr(&mut b, 0, TDMD | IENA);
    assert_eq!(status(&b, 2, RX, 1), (D_STP | D_ENP | D_PAM, 104), "ADD_FCS asks for one");

    let mut b = started(2, LOOP, 0x800);
    b.poke(TX_BUFFERS, &f);
    descriptor(&mut b, 2, TX, 0, TX_BUFFERS, D_OWN | D_STP | D_ENP, 100);
    set_csr(&mut b, 0, TDMD | IENA);
    assert_eq!(b.frames(0), [f]);
    assert_eq!(status(&b, 2, RX, 0), (D_STP | D_ENP | D_PAM, 104));
}

#[test]
fn padding_and_stripping() {
    let mut b = started(2, LOOP | INTL, 0x800);
    set_csr(&mut b, 4, APAD_XMT | ASTRP_RCV | TXDPOLL);
    let mut f = frame(MAC, 30);
    f[12..14].copy_from_slice(&[0, 16]);
    b.poke(TX_BUFFERS, &f);
    descriptor(&mut b, 2, TX, 0, TX_BUFFERS, D_OWN | D_STP | D_ENP, 30);
    set_csr(&mut b, 0, TDMD | IENA);
    assert_eq!(status(&b, 2, RX, 0), (D_STP | D_ENP | D_PAM, 30));
}

#[test]
fn stop_and_its_registers() {
    let mut b = started(0, 0, 100);
    set_csr(&mut b, 15, PROM);
    assert_eq!(csr(&mut b, 15), 0, "only while stopped");
    assert_eq!(b.complaints.len(), 1);
    set_csr(&mut b, 0, STOP);
    assert_eq!(csr(&mut b, 0), STOP);
    set_csr(&mut b, 15, PROM);
    assert_eq!(csr(&mut b, 15), PROM);
    assert_eq!((csr(&mut b, 76), csr(&mut b, 24)), (0xfffc, RX as u16));
}

#[test]
fn errors_on_the_bus() {
    let mut b = Bench::new(Pcnet::new(MAC));
    set_csr(&mut b, 0, INIT | IENA);
    assert_eq!(csr(&mut b, 0) & (MERR | IDON), MERR, "not a bus master");
    assert!(b.level(0));
    set_csr(&mut b, 0, STOP);
    b.write(CONFIG_BANK, 4, 2, 5);
    set_csr(&mut b, 2, 0x4000);
    set_csr(&mut b, 5, 1 << 10);
    set_csr(&mut b, 0, INIT | IENA);
    assert_eq!(csr(&mut b, 0), STOP | INTR);
    assert_eq!(csr(&mut b, 5) & SINT, SINT);
    assert!(b.level(0), "whatever IENA says");
    assert_eq!(b.read(CONFIG_BANK, 6, 2) & 0x2000, 0x2000, "received master abort");
}

#[test]
fn user_interrupt_and_magic_packet() {
    let mut b = started(2, 0, 0x800);
    set_csr(&mut b, 4, UINTCMD);
    assert!(b.level(0));
    set_csr(&mut b, 4, UINT);
    assert!(!b.level(0));
    set_csr(&mut b, 5, SPND | MPMODE | 1 << 3);
    let mut f = frame(MAC, 20);
    b.receive(0, &f);
    assert!(!b.level(0));
    f.extend([0xff; 6]);
    f.extend(MAC.repeat(16));
    b.receive(0, &f);
    assert!(b.level(0));
}

#[test]
fn no_link_no_carrier() {
    let mut b = started(2, 0, 100);
    b.input(0, false);
    descriptor(&mut b, 2, TX, 0, TX_BUFFERS, D_OWN | D_STP | D_ENP, 100);
    set_csr(&mut b, 0, TDMD | IENA);
    assert_eq!(status(&b, 2, TX, 0), (D_STP | D_ENP | D_ERR, 0x0800_0000));
    assert_eq!(csr(&mut b, 0) & CERR, CERR);
    assert_eq!(b.receive(0, &frame(MAC, 60)), 60);
    assert_eq!(csr(&mut b, 0) & RINT, 0);
}

#[test]
fn a_frame_that_rewrites_the_rings_does_no_harm() {
    // Loopback into the transmit ring: each frame received puts the descriptors back as they were when it was sent.
    let mut b = started(2, LOOP | INTL | PROM, 0x800);
    let mut d = Vec::new();
    for w in [TX as u32, u32::from(D_OWN | D_STP | D_ENP) << 16 | 0xffc0, 0, 0] {
        d.extend(w.to_le_bytes());
    }
    for i in 0..4 {
        b.poke(TX + 16 * i, &d);
        descriptor(&mut b, 2, RX, i, TX, D_OWN, 0x800);
    }
    set_csr(&mut b, 0, TDMD);
    b.run(ms(5));
    assert_eq!(csr(&mut b, 0) & (RINT | TINT | MISS | TXON), RINT | TINT | TXON);
    let owned = (0..4).filter(|i| status(&b, 2, RX, *i).0 & D_OWN != 0).count();
    assert_eq!(owned, 0, "four frames went round");
}
