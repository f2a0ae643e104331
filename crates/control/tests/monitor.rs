//! Answers of the monitor about machines in states that the tests put them into.

use hyaline_control::monitor::Monitor;
use hyaline_machine::Machine;
use hyaline_machine::config::{Accel, Config};
use hyaline_space::{ExitKind, Origin};

const CPU0: Origin = Origin::vcpu(0, ExitKind::MmioWrite, 0);

/// A machine that stands at its reset vector.
fn machine(name: &str) -> Machine {
    let bios = std::env::temp_dir().join(format!("hyaline-monitor-{}-{name}.bin", std::process::id()));
    std::fs::write(&bios, vec![0xf4; 0x1_0000]).expect("a file can be written");
    let config = Config {
        accels: vec![Accel::Interp],
        memory: 16 << 20,
        cpus: 2,
        bios: Some(bios.clone()),
        serials: vec![Some("null".parse().expect("a back end"))],
        ..Config::default()
    };
    let machine = Machine::new(config).expect("a machine");
    let _ = std::fs::remove_file(bios);
    machine
}

fn port(m: &Machine, port: u64, value: u64) {
    assert!(m.pc.ports.store(port, 1, value, &CPU0).is_ok());
}
fn memory(m: &Machine, address: u64, value: u64) {
    assert!(m.pc.memory.store(address, 4, value, &CPU0).is_ok());
}
fn ioapic(m: &Machine, register: u64, value: u64) {
    memory(m, 0xfec0_0000, register);
    memory(m, 0xfec0_0010, value);
}

/// The last line of `why-no-irq`.
fn stops(m: &mut Machine, n: u32) -> String {
    let text = Monitor::new(m).command(m, &format!("why-no-irq {n}"));
    text.lines().last().unwrap_or_default().to_string()
}

#[track_caller]
fn stops_at(m: &mut Machine, n: u32, what: &str) {
    let said = stops(m, n);
    assert!(said.starts_with("it stops at: ") && said.contains(what), "{said}");
}

#[test]
fn an_interrupt_is_followed_through_the_io_apic() {
    let mut m = machine("ioapic");
    stops_at(&mut m, 4, "masks pin 4");
    ioapic(&m, 0x18, 0x34);
    stops_at(&mut m, 4, "lapic0 is disabled by software");
    memory(&m, 0xfee0_00f0, 0x1ff);
    stops_at(&mut m, 4, "isa.irq4 is low");
    ioapic(&m, 0x19, 0x0700_0000);
    stops_at(&mut m, 4, "no local APIC answers to physical destination 07");
    ioapic(&m, 0x19, 0);
    let line = m.core.line("isa.irq4");
    let source = line.source();
    line.set(source, true);
    stops_at(&mut m, 4, "RFLAGS.IF is 0");
    memory(&m, 0xfee0_0080, 0x30);
    stops_at(&mut m, 4, "task priority (TPR 30, CR8 3)");
    memory(&m, 0xfee0_0080, 0x20);
    stops_at(&mut m, 4, "RFLAGS.IF is 0");
    let mut state = m.cpu_state(0).expect("a state");
    state.rflags |= 0x200;
    m.set_cpu_state(0, state).expect("it is taken");
    stops_at(&mut m, 4, "as soon as processor 0 runs");
    // Taken, and not ended.
    assert_eq!(m.pc.lapics[0].acknowledge(), Some(0x34));
    stops_at(&mut m, 4, "in service");
    memory(&m, 0xfee0_00b0, 0);
    stops_at(&mut m, 4, "edge-triggered");
    // Level-triggered: a second one waits for the EOI of the first.
    ioapic(&m, 0x18, 0x8034);
    assert_eq!(m.pc.lapics[0].acknowledge(), Some(0x34));
    stops_at(&mut m, 4, "in service");
    // To the second processor, which has not been started.
    line.set(source, false);
    ioapic(&m, 0x18, 0x35);
    ioapic(&m, 0x19, 0x0100_0000);
    stops_at(&mut m, 4, "lapic1 is disabled by software");
    stops_at(&mut m, 2, "cascade");
    stops_at(&mut m, 20, "masks pin 20");
}

#[test]
fn an_interrupt_is_followed_through_the_8259() {
    let mut m = machine("pic");
    // Both controllers as a PC's firmware sets them up, all inputs masked but 4, 12 and not the cascade.
    for (base, vector, icw3) in [(0x20, 8, 4), (0xa0, 0x70, 2)] {
        port(&m, base, 0x11);
        port(&m, base + 1, vector);
        port(&m, base + 1, icw3);
        port(&m, base + 1, 1);
    }
    port(&m, 0x21, 0xef);
    port(&m, 0xa1, 0xef);
    stops_at(&mut m, 4, "isa.irq4 is low");
    stops_at(&mut m, 5, "IMR bit 5 masks it");
    stops_at(&mut m, 12, "IMR bit 2 masks the whole slave");
    let line = m.core.line("isa.irq4");
    let source = line.source();
    line.set(source, true);
    memory(&m, 0xfee0_00f0, 0xff);
    stops_at(&mut m, 4, "disabled by software");
    memory(&m, 0xfee0_00f0, 0x1ff);
    stops_at(&mut m, 4, "masks LINT0");
    memory(&m, 0xfee0_0350, 0x30);
    stops_at(&mut m, 4, "not programmed as ExtINT");
    memory(&m, 0xfee0_0350, 0x700);
    stops_at(&mut m, 4, "RFLAGS.IF is 0");
    assert_eq!(m.pc.pic.acknowledge(), Some(12));
    line.set(source, false);
    line.set(source, true);
    stops_at(&mut m, 4, "waits for an EOI");
}

#[test]
fn the_map_says_why() {
    let mut m = machine("map");
    let why = |place: &str| hyaline_control::map::why(&m.pc, place);
    let text = why("io:0x3fb/2,w").expect("a place");
    assert!(text.starts_with("2-byte write at 0x3fb (1019) of io\n"), "{text}");
    assert!(text.contains("register LCR of serial0"), "{text}");
    let text = why("mem:0xfffffff0").expect("a place");
    assert!(text.contains("/system/pci/pc.bios") && text.contains("memory"), "{text}");
    let text = why("io:0xc012").expect("a place");
    assert!(text.contains("nobody answers") && text.contains("before it is"), "{text}");
    let text = why("mem:0xf0000").expect("a place");
    assert!(text.contains("not seen") && text.contains("ram-below-4g"), "{text}");
    for wrong in ["", "0x3f8", "io:", "io:0x12345", "disk:0", "io:0x3f8/3", "io:0x3f8,x", "io:zz"] {
        assert!(why(wrong).is_err(), "{wrong}");
    }
    let json = hyaline_control::map::as_json(&m.pc);
    assert_eq!(json["spaces"][1]["space"], "io");
    assert!(json["spaces"][0]["flat"].as_array().is_some_and(|f| f.len() > 3));
    let mut monitor = Monitor::new(&m);
    assert!(monitor.command(&mut m, "map why io:0x3fb").contains("LCR of serial0"));
}
