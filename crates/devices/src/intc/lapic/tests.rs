use super::*;
use hyaline_device::{Bench, laws::Dice, ms};

const HZ: u64 = 2_000_000_000;

fn config(id: u32) -> Config {
    Config { wire_at_reset: false, ..Config::new(id, HZ) }
}

hyaline_device::device_laws!(Lapic::new(config(0)));

fn bench(id: u32) -> Bench<Lapic> {
    let mut b = Bench::new(Lapic::new(config(id)));
    b.write(0, 0xf0, 4, 0x1ff);
    b
}

fn fixed(b: &mut Bench<Lapic>, destination: u32, logical: bool, vector: u8, level: bool) -> bool {
    let m = ApicMessage::Deliver { destination, logical, mode: Delivery::Fixed, vector, level, except: None };
    b.call(|d, cx| d.message(&m, cx))
}

fn ack(b: &mut Bench<Lapic>) -> Option<u8> {
    b.call(|d, cx| d.acknowledge(cx))
}

fn x2(b: &mut Bench<Lapic>) {
    b.call(|d, cx| {
        let base = d.apic_base() | BASE_EXTD;
        d.set_apic_base(base, cx);
    });
}

#[test]
fn priorities_10_8_3() {
    let mut b = bench(0);
    assert!(fixed(&mut b, 0, false, 0x31, false));
    assert!(fixed(&mut b, 0, false, 0x52, false));
    assert_eq!(b.signals.last(), Some(&CpuSignal::Interrupt(true)));
    assert_eq!(ack(&mut b), Some(0x52));
    assert_eq!(ack(&mut b), None, "0x31 waits behind 0x52");
    assert_eq!(b.read(0, 0xa0, 4), 0x50, "PPR");
    b.write(0, 0xb0, 4, 0);
    b.write(0, 0x80, 4, 0x3f);
    assert_eq!(ack(&mut b), None, "TPR of the same class");
    b.call(|d, cx| d.set_cr8(2, cx));
    assert_eq!(b.read(0, 0x80, 4), 0x20);
    assert_eq!(ack(&mut b), Some(0x31));
    assert!(b.messages.is_empty(), "no EOI is broadcast for edges");
}

#[test]
fn eoi_is_broadcast_for_level_triggered_and_can_be_suppressed() {
    let mut b = bench(0);
    fixed(&mut b, 0, false, 0x41, true);
    assert_eq!(ack(&mut b), Some(0x41));
    b.write(0, 0xb0, 4, 0);
    assert_eq!(b.messages, [ApicMessage::Eoi { vector: 0x41 }]);
    b.write(0, 0xf0, 4, 0x11ff);
    fixed(&mut b, 0, false, 0x41, true);
    ack(&mut b);
    b.write(0, 0xb0, 4, 0);
    assert_eq!(b.messages.len(), 1);
}

#[test]
fn destinations_10_6_2() {
    let mut b = bench(3);
    assert!(fixed(&mut b, 3, false, 0x40, false));
    assert!(!fixed(&mut b, 2, false, 0x40, false));
    assert!(fixed(&mut b, 0xff, false, 0x40, false));
    b.write(0, 0xd0, 4, 0x0800_0000);
    assert!(fixed(&mut b, 0x0c, true, 0x40, false), "flat");
    assert!(!fixed(&mut b, 0x04, true, 0x40, false));
    b.write(0, 0xe0, 4, 0x0fff_ffff);
    b.write(0, 0xd0, 4, 0x2100_0000);
    assert!(fixed(&mut b, 0x21, true, 0x40, false), "cluster 2, member 1");
    assert!(!fixed(&mut b, 0x31, true, 0x40, false));
    assert!(fixed(&mut b, 0xf1, true, 0x40, false));
    x2(&mut b);
    assert!(fixed(&mut b, 8, true, 0x40, false), "x2APIC: cluster 0, bit 3");
    assert!(!fixed(&mut b, 0x1_0008, true, 0x40, false));
    b.write(0, 0xf0, 4, 0xff);
    assert!(b.device.state.software_enabled(), "the page is gone in x2APIC mode");
}

#[test]
fn icr_shorthands_10_6_1() {
    let mut b = bench(1);
    b.write(0, 0x300, 4, 0x000c_4500);
    b.write(0, 0x300, 4, 0x000c_4608);
    b.write(0, 0x300, 4, 0x0008_00f1);
    b.write(0, 0x310, 4, 0x0200_0000);
    b.write(0, 0x300, 4, 0x0000_4033);
    let all = |mode, vector, except| ApicMessage::Deliver {
        destination: BROADCAST,
        logical: false,
        mode,
        vector,
        level: false,
        except,
    };
    assert_eq!(b.messages[0], all(Delivery::Init, 0, Some(1)));
    assert_eq!(b.messages[1], all(Delivery::StartUp, 8, Some(1)));
    assert_eq!(b.messages[2], all(Delivery::Fixed, 0xf1, None));
    assert!(matches!(b.messages[3], ApicMessage::Deliver { destination: 2, vector: 0x33, .. }));
    b.write(0, 0x300, 4, 0x0004_0055);
    assert_eq!(ack(&mut b), Some(0x55), "self");
    b.write(0, 0x300, 4, 0x0000_8500);
    assert_eq!(b.messages.len(), 4, "INIT level de-assert sends nothing");
}

#[test]
fn init_and_startup_reach_the_processor() {
    let mut b = bench(1);
    b.write(0, 0x320, 4, 0x2_0050);
    b.write(0, 0x380, 4, 1000);
    for (mode, vector) in
        [(Delivery::Init, 0), (Delivery::StartUp, 0x9a), (Delivery::Nmi, 0), (Delivery::Smi, 0)]
    {
        let m =
            ApicMessage::Deliver { destination: 1, logical: false, mode, vector, level: false, except: None };
        assert!(b.call(|d, cx| d.message(&m, cx)));
    }
    let tail = &b.signals[b.signals.len() - 4..];
    assert_eq!(tail, [CpuSignal::Init, CpuSignal::StartUp(0x9a), CpuSignal::Nmi, CpuSignal::Smi]);
    assert_eq!(b.next_timer(), None, "INIT stops the timer");
    assert_eq!(b.read(0, 0xf0, 4), 0xff);
}

#[test]
fn errors_10_5_3() {
    let mut b = bench(0);
    b.write(0, 0x370, 4, 0xe1);
    b.write(0, 0x300, 4, 0x0008_0003);
    assert_eq!(b.read(0, 0x280, 4), 0, "shown only after a write");
    b.write(0, 0x280, 4, 0);
    assert_eq!(b.read(0, 0x280, 4), 0x20);
    assert_eq!(ack(&mut b), Some(0xe1));
    fixed(&mut b, 0, false, 5, false);
    b.read(0, 0x40, 4);
    b.write(0, 0x280, 4, 0);
    assert_eq!(b.read(0, 0x280, 4), 0xc0);
}

#[test]
fn timer_10_5_4() {
    let mut b = bench(0);
    b.write(0, 0x3e0, 4, 0x3);
    b.write(0, 0x320, 4, 0x40);
    b.write(0, 0x380, 4, 1000);
    b.run(us(8));
    assert_eq!(b.read(0, 0x390, 4), 500, "divide by 16 of 1 GHz");
    b.run(us(8) - 1);
    assert_eq!(ack(&mut b), None);
    b.run(1);
    assert_eq!(ack(&mut b), Some(0x40));
    b.write(0, 0xb0, 4, 0);
    b.run(ms(1));
    assert_eq!((ack(&mut b), b.read(0, 0x390, 4)), (None, 0), "one shot");
    b.write(0, 0x320, 4, 0x2_0040);
    b.write(0, 0x380, 4, 1000);
    for _ in 0..3 {
        b.run(us(16));
        assert_eq!(ack(&mut b), Some(0x40));
        b.write(0, 0xb0, 4, 0);
    }
    b.write(0, 0x320, 4, 0x3_0040);
    assert_eq!(b.next_timer(), None, "a masked timer costs nothing");
    b.run(us(4));
    assert_eq!(b.read(0, 0x390, 4), 750, "and counts on");
}

#[test]
fn tsc_deadline_10_5_4_1() {
    let mut b = bench(0);
    b.call(|d, cx| d.set_tsc_deadline(77, cx));
    assert_eq!(b.device.tsc_deadline(), 0, "ignored in another mode");
    b.write(0, 0x320, 4, 0x4_0040);
    b.write(0, 0x380, 4, 1000);
    assert_eq!(b.read(0, 0x380, 4), 0, "no initial count in this mode");
    b.call(|d, cx| d.set_tsc_deadline(HZ / 1000 + 1, cx));
    assert_eq!(b.next_timer(), Some(ms(1) + 1), "rounded up to the next nanosecond");
    b.run(ms(2));
    assert_eq!(ack(&mut b), Some(0x40));
    assert_eq!(b.device.tsc_deadline(), 0);
    b.call(|d, cx| d.set_tsc_deadline(1, cx));
    b.run(0);
    b.write(0, 0xb0, 4, 0);
    assert_eq!(ack(&mut b), Some(0x40), "a deadline in the past fires at once");
}

#[test]
fn lint0_as_virtual_wire() {
    let mut b = Bench::new(Lapic::new(Config::new(0, HZ)));
    b.input(0, true);
    assert!(b.device.interrupt_pending(), "open after reset");
    assert_eq!(ack(&mut b), None);
    assert!(b.call(|d, cx| d.acknowledge_external(cx)));
    b.input(0, false);
    assert!(!b.device.interrupt_pending());
    b.write(0, 0x350, 4, 0x1_0700);
    b.input(0, true);
    assert!(!b.device.interrupt_pending());
    b.call(|d, cx| d.virtual_wire(cx));
    assert!(b.device.interrupt_pending());
    b.input(1, true);
    assert_eq!(b.signals.last(), Some(&CpuSignal::Nmi));
    // Globally disabled, the pin is INTR itself.
    b.write(0, 0x350, 4, 0x1_0700);
    b.call(|d, cx| d.set_apic_base(BASE_ADDRESS | BASE_BSP, cx));
    assert!(b.device.interrupt_pending());
    assert_eq!(b.maps[&0], None);
}

#[test]
fn a_page_carries_the_registers_over() {
    let mut a = bench(0);
    for (offset, value) in [
        (0x80, 0x20),
        (0xd0, 0x0100_0000),
        (0x350, 0x8060),
        (0x320, 0x2_0031),
        (0x3e0, 0xb),
        (0x380, 100_000),
    ] {
        a.write(0, offset, 4, value);
    }
    a.call(|d, cx| {
        d.message(
            &ApicMessage::Deliver {
                destination: 0,
                logical: false,
                mode: Delivery::Fixed,
                vector: 0x55,
                level: false,
                except: None,
            },
            cx,
        )
    });
    a.run(ms(3));
    let (page, base) = (a.device.page(a.now()), a.device.apic_base());
    let mut b = bench(0);
    b.skip(a.now());
    b.call(|d, cx| d.adopt(&page, base, 0, cx));
    assert_eq!(b.device.page(b.now()), page);
    assert_eq!(b.next_timer(), a.next_timer());
    assert_eq!(ack(&mut b), ack(&mut a));
}

#[test]
fn lint0_fixed_level_has_remote_irr() {
    let mut b = bench(0);
    b.write(0, 0x350, 4, 0x8060);
    b.input(0, true);
    assert_eq!(b.read(0, 0x350, 4), 0xc060);
    assert_eq!(ack(&mut b), Some(0x60));
    b.write(0, 0xb0, 4, 0);
    assert_eq!(ack(&mut b), Some(0x60), "still up");
    b.input(0, false);
    b.write(0, 0xb0, 4, 0);
    assert_eq!(b.read(0, 0x350, 4), 0x8060);
}

#[test]
fn x2apic_10_12() {
    let mut b = bench(0x12);
    assert!(!b.call(|d, cx| d.x2_write(0x08, 0, cx)), "#GP outside x2APIC mode");
    x2(&mut b);
    assert_eq!(b.maps[&0], None);
    let mut rd = |n| b.call(|d, cx| d.x2_read(n, cx));
    assert_eq!(rd(0x02), Some(0x12));
    assert_eq!(rd(0x0d), Some(0x1_0004));
    assert_eq!((rd(0x0e), rd(0x0b), rd(0x31), rd(0x3f)), (None, None, None, None));
    let mut wr = |n, v| b.call(|d, cx| d.x2_write(n, v, cx));
    assert!(
        wr(0x08, 0x20) && !wr(0x08, 0x100) && !wr(0x0b, 1) && wr(0x0b, 0) && !wr(0x02, 1) && !wr(0x28, 5)
    );
    // Read-only bits are no reserved ones.
    assert!(wr(0x36, 0x1_5400) && !wr(0x36, 0x2_0400) && wr(0x37, 0x1_1000));
    assert!(wr(0x3f, 0x45) && wr(0x30, 0x7_0000_0000 | 0x4033));
    assert_eq!(ack(&mut b), Some(0x45));
    assert!(matches!(b.messages[0], ApicMessage::Deliver { destination: 7, .. }));
}

#[test]
fn x2apic_survives_anything() {
    let mut dice = Dice::new(5);
    let mut b = Bench::new(Lapic::new(Config::new(2, HZ)));
    for _ in 0..20_000 {
        let n = dice.below(0x42) as u32;
        let v = if dice.below(2) == 0 { dice.bits() } else { dice.below(0x100) };
        match dice.below(6) {
            0 => b.call(|d, cx| d.set_apic_base(v, cx)),
            1 => b.run(dice.below(10_000)),
            2 => b.call(|d, cx| d.set_tsc_deadline(v, cx)),
            3 => drop(b.call(|d, cx| d.x2_read(n, cx))),
            _ => drop(b.call(|d, cx| d.x2_write(n, v, cx))),
        }
    }
}

#[test]
fn messages_from_msi_10_11() {
    let m = msi(0xfee0_300c, 0xc041);
    assert_eq!(
        m,
        Some(ApicMessage::Deliver {
            destination: 3,
            logical: true,
            mode: Delivery::Fixed,
            vector: 0x41,
            level: true,
            except: None
        })
    );
    assert_eq!(msi(0xfed0_0000, 0x41), None);
    assert_eq!(msi(0xfee0_0000, 0x341), None);
}
