//! Interrupts: the controllers' registers in words, and why an interrupt does not arrive.
//!
//! Sources: Intel 8259A data sheet; 82093AA data sheet §3.2.4; SDM vol. 3A §10.5 to §10.8.

use hyaline_device::state::from_value;
use hyaline_devices::intc::{i8259, ioapic, lapic};
use hyaline_machine::Machine;
use hyaline_x86::state::{Activity, CpuState, Shadow, flag};
use std::fmt::Write;

fn in_kernel(machine: &Machine, what: &str) -> Option<String> {
    let all = machine.chips_in_kernel().is_some_and(|c| c.contains("8259"));
    all.then(|| {
        format!(
            "the kernel has the {what} (kernel-irqchip=on) and shows it to nobody; with -machine kernel-irqchip=split or off it is here to be looked at"
        )
    })
}

fn pic_state(machine: &Machine) -> Result<i8259::State, String> {
    if let Some(no) = in_kernel(machine, "8259 pair") {
        return Err(no);
    }
    let value = machine.pc.pic.save().map_err(|e| e.to_string())?;
    from_value(&value).map_err(|e| e.to_string())
}

fn ioapic_state(machine: &Machine) -> Result<ioapic::State, String> {
    if let Some(no) = in_kernel(machine, "I/O APIC") {
        return Err(no);
    }
    let value = machine.pc.ioapic.save().map_err(|e| e.to_string())?;
    from_value(&value).map_err(|e| e.to_string())
}

fn lapic_state(machine: &mut Machine, cpu: usize) -> Option<lapic::State> {
    let value = machine.with_lapic(cpu, |d| d.save())?.ok()?;
    from_value(&value).ok()
}

/// Requests of one controller: latched edges and active levels.
fn irr(c: &i8259::Controller) -> u8 {
    (c.edge & !c.elcr) | (c.level & c.elcr)
}

/// `info pic`.
pub(super) fn pic(machine: &Machine) -> Result<String, String> {
    let s = pic_state(machine)?;
    let mut text = String::new();
    for (name, c) in [("master", &s.master), ("slave ", &s.slave)] {
        let _ = writeln!(
            text,
            "{name} IRR={:02x} IMR={:02x} ISR={:02x} ELCR={:02x} inputs={:02x} vector base={:02x} lowest priority=IR{} {}{}",
            irr(c),
            c.imr,
            c.isr,
            c.elcr,
            c.level,
            c.vector,
            c.lowest,
            if c.icw4 & 2 != 0 { "automatic EOI " } else { "" },
            if c.special_mask { "special mask" } else { "" },
        );
    }
    let _ = writeln!(text, "INTR is {}", if s.intr { "high" } else { "low" });
    Ok(text)
}

fn entry(e: u64) -> String {
    let modes = ["fixed", "lowest priority", "SMI", "reserved", "NMI", "INIT", "reserved", "ExtINT"];
    let mut s = format!("vector {:02x} {}", e & 0xff, modes[(e >> 8 & 7) as usize]);
    s += &format!(" to {} {:02x}", if e >> 11 & 1 != 0 { "logical" } else { "physical" }, e >> 56);
    s += if e >> 15 & 1 != 0 { ", level" } else { ", edge" };
    for (bit, name) in [(13, ", active low"), (14, ", remote IRR"), (12, ", send pending"), (16, ", masked")]
    {
        if e >> bit & 1 != 0 {
            s += name;
        }
    }
    s
}

/// `info ioapic`.
pub(super) fn ioapic(machine: &Machine) -> Result<String, String> {
    let s = ioapic_state(machine)?;
    let mut text = format!("I/O APIC id {:x}, index register {:02x}\n", s.id, s.index);
    for (n, e) in s.entries.iter().enumerate() {
        let level = if s.levels >> n & 1 != 0 { "high" } else { "low " };
        let _ = writeln!(text, "pin {n:2} {level} {e:016x} {}", entry(*e));
    }
    Ok(text)
}

fn vectors(bits: &[u32; 8]) -> String {
    let set: Vec<String> = (0..=255u8).filter(|v| has(bits, *v)).map(|v| format!("{v:02x}")).collect();
    if set.is_empty() { "none".into() } else { set.join(" ") }
}

fn has(bits: &[u32; 8], vector: u8) -> bool {
    bits[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
}

/// The processor priority (SDM vol. 3A §10.8.3.1).
fn ppr(s: &lapic::State) -> u8 {
    let serving = (0..=255u8).rev().find(|v| has(&s.isr, *v)).unwrap_or(0);
    if s.tpr >> 4 >= serving >> 4 { s.tpr } else { serving & 0xf0 }
}

/// `info lapic`, one of them.
pub(super) fn lapic(machine: &mut Machine, cpu: usize) -> String {
    let Some(s) = lapic_state(machine, cpu) else {
        return format!("lapic{cpu}: there is none, or it can't be had\n");
    };
    let mut text = String::new();
    let mode = match s.base >> 10 & 3 {
        0 => "off",
        2 => "xAPIC",
        3 => "x2APIC",
        _ => "impossible mode",
    };
    let enabled = if s.svr & 0x100 != 0 { "enabled" } else { "disabled by SVR" };
    let _ = writeln!(
        text,
        "lapic{cpu}: id {:x}, {mode}, {enabled}, TPR={:02x} PPR={:02x} SVR={:x} LDR={:08x} DFR={:08x} ICR={:016x} ESR={:x}",
        s.id,
        s.tpr,
        ppr(&s),
        s.svr,
        s.ldr,
        s.dfr,
        s.icr,
        s.esr
    );
    let _ = writeln!(text, "  requested (IRR): {}", vectors(&s.irr));
    let _ = writeln!(text, "  in service (ISR): {}", vectors(&s.isr));
    for (name, l) in ["timer", "thermal", "counter", "LINT0", "LINT1", "error"].iter().zip(s.lvt) {
        let masked = if l & 0x1_0000 != 0 { ", masked" } else { "" };
        let mode = if *name == "timer" {
            ["one-shot", "periodic", "TSC deadline", "reserved"][(l >> 17 & 3) as usize]
        } else {
            ["fixed", "", "SMI", "", "NMI", "INIT", "", "ExtINT"][(l >> 8 & 7) as usize]
        };
        let _ = writeln!(text, "  LVT {name:<8} {l:08x} vector {:02x} {mode}{masked}", l & 0xff);
    }
    text
}

fn line_level(machine: &Machine, name: &str) -> Option<bool> {
    machine.core.lines().iter().find(|l| l.name() == name).map(|l| l.level())
}

/// The line of an interrupt number.
fn line_name(n: u64) -> String {
    if n < 16 { format!("isa.irq{n}") } else { format!("gsi{n}") }
}

/// The I/O APIC's pin: interrupt 0 is on pin 2.
fn pin(n: u64) -> usize {
    if n == 0 { 2 } else { n as usize }
}

fn word(level: bool) -> &'static str {
    if level { "high" } else { "low" }
}

/// `info irq`.
pub(super) fn all(machine: &Machine) -> Result<String, String> {
    let (pic, io) = (pic_state(machine)?, ioapic_state(machine)?);
    let mut text = format!("{:<4} {:<5} {:<28} I/O APIC\n", "irq", "line", "8259");
    for n in 0..24u64 {
        let level = line_level(machine, &line_name(n)).map_or("-", word);
        let pic_text = if n < 16 {
            let (c, bit) = if n < 8 { (&pic.master, n) } else { (&pic.slave, n - 8) };
            let at = |v: u8| v >> bit & 1 != 0;
            let mut words = vec![if at(c.imr) { "masked" } else { "open" }];
            if at(irr(c)) {
                words.push("requested");
            }
            if at(c.isr) {
                words.push("in service");
            }
            words.join(", ")
        } else {
            "-".into()
        };
        let e = io.entries.get(pin(n)).copied().unwrap_or(0);
        let io_text = if n == 2 { "pin 2 is interrupt 0's".to_string() } else { entry(e) };
        let _ = writeln!(text, "{n:<4} {level:<5} {pic_text:<28} {io_text}");
    }
    Ok(text)
}

/// Does a local APIC take a message to this destination? (SDM vol. 3A §10.6.2)
fn takes(s: &lapic::State, logical: bool, destination: u8) -> bool {
    if !logical {
        return destination == 0xff || s.id == u32::from(destination);
    }
    let own = (s.ldr >> 24) as u8;
    if s.dfr >> 28 == 0xf {
        own & destination != 0
    } else {
        own >> 4 == destination >> 4 && own & destination & 15 != 0
    }
}

/// What the processor itself says; Err: it stops here.
fn at_processor(cpu: usize, s: &CpuState) -> Result<String, String> {
    match s.activity {
        Activity::WaitForSipi => {
            return Err(format!("processor {cpu} has not been started: it waits for a start-up IPI"));
        }
        Activity::Shutdown => return Err(format!("processor {cpu} is shut down after a triple fault")),
        _ => {}
    }
    if s.rflags & flag::IF == 0 {
        return Err(format!(
            "processor {cpu} has interrupts off: RFLAGS.IF is 0 (RIP {:#x}); it is taken after STI, POPF or IRET",
            s.rip
        ));
    }
    if s.shadow != Shadow::None {
        return Err(format!(
            "processor {cpu} is in the shadow of STI or MOV SS: it is taken after one more instruction"
        ));
    }
    Ok(format!("processor {cpu}: RFLAGS.IF is 1, nothing in the way"))
}

/// What a local APIC and its processor say of a vector that was requested; Err: it stops here.
fn at_lapic(machine: &mut Machine, cpu: usize, vector: u8, text: &mut String) -> Result<(), String> {
    let Some(s) = lapic_state(machine, cpu) else {
        return Err(format!("the state of lapic{cpu} can't be had"));
    };
    if s.base & lapic::BASE_ENABLE == 0 {
        return Err(format!("lapic{cpu} is off: IA32_APIC_BASE bit 11 is 0"));
    }
    if s.svr & 0x100 == 0 {
        return Err(format!("lapic{cpu} is disabled by software: SVR bit 8 is 0"));
    }
    let (requested, serving) = (has(&s.irr, vector), has(&s.isr, vector));
    let _ = writeln!(
        text,
        "  lapic{cpu}: vector {vector:02x} requested: {requested}, in service: {serving}, TPR {:02x}, PPR {:02x}",
        s.tpr,
        ppr(&s)
    );
    if !requested {
        return if serving {
            Err(format!(
                "lapic{cpu} has vector {vector:02x} in service: it arrived, its handler runs, or ended without an EOI"
            ))
        } else {
            Ok(())
        };
    }
    if vector >> 4 <= ppr(&s) >> 4 {
        let why = if s.tpr >> 4 >= vector >> 4 {
            format!(
                "the task priority (TPR {:02x}, CR8 {:x}) is not below the vector's class {:x}",
                s.tpr,
                s.tpr >> 4,
                vector >> 4
            )
        } else {
            format!(
                "an interrupt of the same or a higher class is in service ({}): it waits for that one's EOI",
                vectors(&s.isr)
            )
        };
        return Err(format!("lapic{cpu} holds vector {vector:02x} back: {why}"));
    }
    let state = machine.cpu_state(cpu).map_err(|e| e.to_string())?;
    let said = at_processor(cpu, &state)?;
    let _ = writeln!(text, "  {said}");
    Err(format!("nothing: vector {vector:02x} is taken as soon as processor {cpu} runs"))
}

/// `why-no-irq N`.
pub(super) fn why_not(machine: &mut Machine, n: u64) -> Result<String, String> {
    if n > 23 {
        return Err(format!("why-no-irq {n}: there are interrupts 0 to 23"));
    }
    let mut text = format!("interrupt {n}, from the device to the processor:\n");
    let verdict = follow(machine, n, &mut text)?;
    let _ = writeln!(text, "it stops at: {verdict}");
    Ok(text)
}

fn follow(machine: &mut Machine, n: u64, text: &mut String) -> Result<String, String> {
    if n == 2 {
        return Ok("nothing is on interrupt 2: it is the cascade of the 8259 pair; interrupt 0 is on the I/O APIC's pin 2".into());
    }
    let name = line_name(n);
    let level = line_level(machine, &name);
    let _ = match level {
        Some(l) => writeln!(text, "  line {name}: {}", word(l)),
        None => writeln!(text, "  line {name}: no device is wired to it"),
    };
    let high = level == Some(true);
    let (pic, io) = (pic_state(machine)?, ioapic_state(machine)?);
    let e = io.entries.get(pin(n)).copied().unwrap_or(0x1_0000);
    let _ = writeln!(text, "  I/O APIC pin {}: {}", pin(n), entry(e));
    // The 8259 way, for interrupts that it has.
    let mut pic_open = false;
    let mut pic_stop = None;
    if n < 16 {
        let (c, bit, who) = if n < 8 { (&pic.master, n, "master") } else { (&pic.slave, n - 8, "slave") };
        let at = |v: u8| v >> bit & 1 != 0;
        let _ = writeln!(
            text,
            "  8259 {who} IR{bit}: {}{}{}",
            if at(c.imr) { "masked" } else { "open" },
            if at(irr(c)) { ", requested" } else { "" },
            if at(c.isr) { ", in service" } else { "" }
        );
        let cascade = n >= 8 && pic.master.imr & 4 != 0;
        pic_open = !at(c.imr) && !cascade;
        pic_stop = match () {
            () if at(c.imr) => Some(format!("the 8259 {who}: IMR bit {bit} masks it")),
            () if cascade => {
                Some("the 8259 master: IMR bit 2 masks the whole slave (interrupts 8 to 15)".to_string())
            }
            () if !at(irr(c)) => None,
            () if at(c.isr) => {
                Some(format!("the 8259 {who}: IR{bit} is in service still: it waits for an EOI"))
            }
            () if c.isr & (at_or_above(bit)) != 0 && !c.special_mask => Some(format!(
                "the 8259 {who}: something of higher priority is in service (ISR {:02x})",
                c.isr
            )),
            () => None,
        };
    }
    if e >> 16 & 1 == 0 {
        // The I/O APIC's way.
        let (vector, logical, destination) = (e as u8, e >> 11 & 1 != 0, (e >> 56) as u8);
        let cpus = usize::from(machine.config.cpus);
        let targets: Vec<usize> = (0..cpus)
            .filter(|c| lapic_state(machine, *c).is_some_and(|s| takes(&s, logical, destination)))
            .collect();
        if targets.is_empty() {
            return Ok(format!(
                "the I/O APIC's entry for pin {}: no local APIC answers to {} destination {destination:02x}",
                pin(n),
                if logical { "logical" } else { "physical" }
            ));
        }
        if vector < 16 && e >> 8 & 7 <= 1 {
            return Ok(format!(
                "the I/O APIC's entry for pin {}: vector {vector:02x} is illegal (16 to 255 are legal)",
                pin(n)
            ));
        }
        let mut held = None;
        for cpu in targets {
            if let Err(stop) = at_lapic(machine, cpu, vector, text) {
                held.get_or_insert(stop);
            }
        }
        if let Some(stop) = held {
            return Ok(stop);
        }
        let is_level = e >> 15 & 1 != 0;
        return Ok(match (high, is_level, e >> 14 & 1 != 0) {
            (false, ..) => format!("the device: the line {name} is low, nobody asks for the interrupt"),
            (true, true, true) => {
                "the I/O APIC: Remote IRR is set, it waits for the EOI of the one before".into()
            }
            (true, true, false) => {
                "nothing that can be seen: a high level line with an open entry is delivered at once".into()
            }
            (true, false, _) => format!(
                "the edge: the line {name} is high already and the pin is edge-triggered; the device has to lower it first"
            ),
        });
    }
    if !pic_open {
        let io_text = format!("the I/O APIC masks pin {}", pin(n));
        return Ok(match pic_stop {
            Some(stop) => format!("both ways: {io_text}; and {stop}"),
            None => io_text,
        });
    }
    // The 8259 way: INTR to LINT0 of the bootstrap processor.
    if !high && n < 16 {
        let (c, bit) = if n < 8 { (&pic.master, n) } else { (&pic.slave, n - 8) };
        if irr(c) >> bit & 1 == 0 {
            return Ok(format!(
                "the device: the line {name} is low, nobody asks for the interrupt (the I/O APIC masks pin {})",
                pin(n)
            ));
        }
    }
    if let Some(stop) = pic_stop {
        return Ok(stop);
    }
    if !pic.intr {
        return Ok("the 8259: INTR is low, the request was acknowledged or lost its edge".into());
    }
    let _ = writeln!(text, "  8259 INTR: high");
    if let Some(s) = lapic_state(machine, 0) {
        let lint0 = s.lvt[3];
        let on = s.base & lapic::BASE_ENABLE != 0;
        let _ = writeln!(text, "  lapic0 LINT0: {lint0:08x}");
        if on && s.svr & 0x100 == 0 {
            return Ok("lapic0 is disabled by software (SVR bit 8), which masks LINT0 too".into());
        }
        if on && lint0 & 0x1_0000 != 0 {
            return Ok("lapic0 masks LINT0, where the 8259 is connected".into());
        }
        if on && lint0 >> 8 & 7 != 7 {
            return Ok(
                "lapic0: LINT0 is not programmed as ExtINT, so the 8259 is not asked for a vector".into()
            );
        }
    }
    let state = machine.cpu_state(0).map_err(|e| e.to_string())?;
    Ok(match at_processor(0, &state) {
        Ok(said) => {
            let _ = writeln!(text, "  {said}");
            "nothing: it is taken as soon as processor 0 runs".into()
        }
        Err(stop) => stop,
    })
}

/// Inputs of a controller with the same or a higher priority, without rotation.
fn at_or_above(bit: u64) -> u8 {
    ((2u16 << bit) - 1) as u8
}
