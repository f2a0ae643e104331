//! More tests of the system half: rarer forms and the fault codes of returns.

use super::*;

/// Runs IRET (or far RET) in 32-bit mode with this frame on the stack and gives the fault.
fn return_fault(code: &[u8], frame: &[u32], prepare: fn(&mut Cpu, &RamBlock)) -> (u8, Option<u32>) {
    let (mut cpu, ram) = machine32();
    prepare(&mut cpu, &ram);
    let top = sp(&cpu);
    for (i, v) in frame.iter().enumerate() {
        ram.store_u32(top + 4 * i as u64, *v);
    }
    fault32(&mut cpu, &ram, code)
}

#[test]
fn iret_and_retf_fault_codes() {
    let user = |sel: u16| u32::from(sel);
    for code in [&[0xcf][..], &[0xcb]] {
        let frame = |cs: u32, sp: u32, ss: u32| match code[0] {
            0xcf => vec![0x5000, cs, 2, sp, ss],
            _ => vec![0x5000, cs, sp, ss],
        };
        let nothing: fn(&mut Cpu, &RamBlock) = |_, _| {};
        assert_eq!(return_fault(code, &frame(0, 0, 0), nothing), (13, Some(0)), "null CS");
        assert_eq!(return_fault(code, &frame(0x1000, 0, 0), nothing), (13, Some(0x1000)), "outside");
        assert_eq!(return_fault(code, &frame(DATA0.into(), 0, 0), nothing), (13, Some(DATA0.into())));
        assert_eq!(
            return_fault(code, &frame(user(CODE0) | 3, 0, 0), nothing),
            (13, Some(CODE0.into())),
            "DPL"
        );
        assert_eq!(return_fault(code, &frame(user(CODE3), 0, 0), nothing), (13, Some(0)), "null SS");
        let bad_ss = frame(user(CODE3), 0x8000, DATA0.into());
        assert_eq!(return_fault(code, &bad_ss, nothing), (13, Some(DATA0.into())), "SS's RPL");
        let absent: fn(&mut Cpu, &RamBlock) = |_, ram| gdt(ram, DATA3, descriptor(0, 0xf_ffff, 0xc072));
        let frame_ss = frame(user(CODE3), 0x8000, DATA3.into());
        assert_eq!(return_fault(code, &frame_ss, absent), (12, Some(u32::from(DATA3 & !3))));
        let absent: fn(&mut Cpu, &RamBlock) = |_, ram| gdt(ram, CODE3, descriptor(0, 0xf_ffff, 0xc07a));
        assert_eq!(return_fault(code, &frame_ss, absent), (11, Some(u32::from(CODE3 & !3))));
    }
}

#[test]
fn iret_outside_the_code_limit_faults() {
    let (mut cpu, ram) = machine32();
    for (i, v) in [0x1_0000, u32::from(CODE16), 2].into_iter().enumerate() {
        ram.store_u32(sp(&cpu) + 4 * i as u64, v);
    }
    assert_eq!(fault32(&mut cpu, &ram, &[0xcf]), (13, Some(0)));
}

#[test]
fn inner_stack_faults_are_ts_and_ss() {
    use super::super::event::{Event, deliver};
    use crate::Fault;
    for (selector, expected) in [
        (0, Fault::ts(1)),
        (DATA3, Fault::ts(u32::from(DATA3 & !3) | 1)),
        (0x1000, Fault::ts(0x1001)),
        (CODE0, Fault::ts(u32::from(CODE0) | 1)),
        (ABSENT, Fault::ss(u32::from(ABSENT) | 1)),
    ] {
        let (mut cpu, ram) = machine32();
        to_user(&mut cpu);
        ram.store_u32(TSS + 8, selector.into());
        let before = cpu.state.clone();
        let event = Event {
            vector: 0x80,
            kind: EventKind::External,
            error: None,
            int1: false,
            rip: 0x1000,
            set_rf: false,
        };
        assert_eq!(deliver(&mut cpu, &event), Err(expected), "{selector:#x}");
        assert_eq!(cpu.state, before);
        // A software interrupt's faults don't have EXT.
        ram.store_u64(IDT + 8 * 0x80, gate(CODE0, handler(0x80), 0xee, 0));
        let Fault::Exception { vector, error: Some(code) } = expected else { panic!() };
        let event = Event { kind: EventKind::Software, ..event };
        assert_eq!(deliver(&mut cpu, &event), Err(Fault::Exception { vector, error: Some(code & !1) }));
    }
}

#[test]
fn page_fault_during_page_fault_is_double() {
    let (mut cpu, ram) = machine64();
    // The #PF gate's page is not there: the IDT crosses into an absent page.
    cpu.state.idtr.base = 0x20_0000 - 16 * 14;
    let df = 0x20_0000 - 16 * 14 + 16 * 8;
    ram.store_u64(df, gate(CODE0, handler(8), 0x8e, 0));
    ram.store_u64(df + 8, 0);
    ram.store_u64(0x10_2008, 0);
    cpu.flush_tlb(true);
    cpu.state.cr2 = 0x1234;
    super::super::event::exception(&mut cpu, 14, Some(2)).unwrap();
    assert_eq!((cpu.state.rip, ram.load_u64(sp(&cpu))), (handler(8), Some(0)));
    assert_eq!(cpu.state.cr2, 0x20_0000);
    // A page fault while a contributory exception is delivered comes instead of it.
    let (mut cpu, ram) = machine64();
    cpu.state.idtr.base = 0x20_0000 - 16 * 15;
    ram.store_u64(0x20_0000 - 16, gate(CODE0, handler(14), 0x8e, 0));
    ram.store_u64(0x20_0000 - 8, 0);
    ram.store_u64(0x10_2008, 0);
    cpu.flush_tlb(true);
    super::super::event::interrupt(&mut cpu, 0x20, EventKind::External).unwrap();
    assert_eq!(cpu.state.rip, handler(14));
    assert_eq!(cpu.state.cr2, 0x20_0000 - 16 * 15 + 16 * 0x20);
}

#[test]
fn compatibility_mode_interrupt_and_return() {
    let (mut cpu, ram) = machine64();
    to_user(&mut cpu);
    cpu.state.seg[Seg::Cs as usize].selector = COMPAT3;
    cpu.state.seg[Seg::Cs as usize].attr = 0xc0fb;
    cpu.mode_changed();
    assert_eq!(cpu.code_bits(), 32);
    super::super::event::interrupt(&mut cpu, 0x30, EventKind::External).unwrap();
    assert_eq!((cpu.cpl(), cpu.in_64bit()), (0, true));
    put(&ram, handler(0x30), &[0x48, 0xcf]);
    cpu.step();
    assert_eq!((cpu.cpl(), cpu.code_bits(), cpu.state.rip, sp(&cpu)), (3, 32, 0x1000, 0x8_0000));
}

#[test]
fn long_mode_call_gate_switches_to_rsp0() {
    let (mut cpu, ram) = machine64();
    gdt(&ram, GATE, gate(CODE0, 0x6000, 0xec, 0));
    gdt(&ram, GATE + 8, 0);
    to_user(&mut cpu);
    // call far [0x8100] with a 32-bit offset that is ignored.
    ram.store_u32(0x8100, 0);
    ram.store_u16(0x8104, GATE | 3);
    run(&mut cpu, &ram, &[0xff, 0x1c, 0x25, 0, 0x81, 0, 0]);
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (0, 0x6000, RING0_STACK - 32));
    let frame: Vec<u64> = (0..4).map(|i| ram.load_u64(sp(&cpu) + 8 * i).unwrap()).collect();
    assert_eq!(frame, [0x1007, CODE3.into(), 0x8_0000, DATA3.into()]);
    put(&ram, 0x6000, &[0x48, 0xcb]);
    cpu.step();
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (3, 0x1007, 0x8_0000));
    // A type in the upper half is refused.
    let (mut cpu, ram) = machine64();
    gdt(&ram, GATE, gate(CODE0, 0x6000, 0xec, 0));
    gdt(&ram, GATE + 8, 0x1f00 << 32);
    ram.store_u16(0x8104, GATE);
    let code = [0xff, 0x1c, 0x25, 0, 0x81, 0, 0];
    assert_eq!(fault32(&mut cpu, &ram, &code), (13, Some(GATE.into())));
}

#[test]
fn long_mode_refuses_task_switches() {
    let (mut cpu, ram) = machine64();
    gdt(&ram, TSS2_SEL, descriptor(TSS2, 0x67, 0x89));
    ram.store_u16(0x8104, TSS2_SEL);
    let code = [0xff, 0x2c, 0x25, 0, 0x81, 0, 0];
    assert_eq!(fault32(&mut cpu, &ram, &code), (13, Some(TSS2_SEL.into())));
    let (mut cpu, ram) = machine64();
    cpu.state.rflags |= flag::NT;
    assert_eq!(fault32(&mut cpu, &ram, &[0x48, 0xcf]), (13, Some(0)), "IRET with NT");
}

#[test]
fn real_mode_far_call_and_return() {
    let (mut cpu, ram) = real_cpu(1 << 20);
    run(&mut cpu, &ram, &[0x9a, 0x34, 0x12, 0x00, 0x20]);
    assert_eq!((cpu.state.seg[1].base, cpu.state.rip, sp(&cpu)), (0x2_0000, 0x1234, 0x7ffc));
    put(&ram, 0x2_1234, &[0xca, 2, 0]);
    cpu.step();
    assert_eq!((cpu.state.seg[1].base, cpu.state.rip, sp(&cpu)), (0, 0x1005, 0x8002));
}

#[test]
fn entering_protected_mode_by_far_jump() {
    let (mut cpu, ram) = real_cpu(1 << 20);
    gdt(&ram, CODE0, descriptor(0, 0xf_ffff, 0xc09a));
    cpu.state.gdtr.base = GDT;
    cpu.state.gdtr.limit = 0x17;
    cpu.state.gpr[0] = 1;
    run(&mut cpu, &ram, &[0x0f, 0x01, 0xf0]);
    assert!(cpu.protected());
    assert_eq!(cpu.code_bits(), 16);
    run(&mut cpu, &ram, &[0x66, 0xea, 0x00, 0x20, 0, 0, 8, 0]);
    assert_eq!((cpu.code_bits(), cpu.state.rip), (32, 0x2000));
    // LMSW can't leave it again.
    cpu.state.gpr[0] = 0;
    run(&mut cpu, &ram, &[0x0f, 0x01, 0xf0]);
    assert!(cpu.protected());
}

#[test]
fn nmis_wait_for_iret() {
    let (mut cpu, ram) = machine32();
    put(&ram, 0x1000, &[0xfa, 0xfa]);
    put(&ram, handler(2), &[0xfa, 0xcf]);
    cpu.env.signals().raise(Signals::NMI);
    cpu.step();
    assert_eq!((cpu.state.rip, cpu.state.nmi_blocked), (handler(2) + 1, true));
    cpu.env.signals().raise(Signals::NMI);
    cpu.step();
    assert_eq!((cpu.state.rip, cpu.state.nmi_pending, cpu.state.nmi_blocked), (0x1000, true, false));
    cpu.step();
    assert_eq!((cpu.state.rip, cpu.state.nmi_pending), (handler(2) + 1, false));
}

#[test]
fn task_switch_to_a_16_bit_tss() {
    let (mut cpu, ram) = machine32();
    gdt(&ram, TSS2_SEL, descriptor(TSS2, 0x2b, 0x81));
    ram.store_u16(TSS2 + 0x0e, 0x9000);
    ram.store_u16(TSS2 + 0x10, 2);
    ram.store_u16(TSS2 + 0x1a, 0x6000);
    for (i, s) in [DATA0, CODE0, DATA0, DATA0].into_iter().enumerate() {
        ram.store_u16(TSS2 + 0x22 + 2 * i as u64, s);
    }
    run(&mut cpu, &ram, &[0xea, 0, 0, 0, 0, TSS2_SEL as u8, 0]);
    assert_eq!((cpu.state.rip, sp(&cpu), cpu.state.tr.kind()), (0x9000, 0xffff_6000, 3));
    assert!(cpu.state.seg[Seg::Fs as usize].unusable);
}

#[test]
fn task_switch_into_virtual_8086_mode() {
    let (mut cpu, ram) = machine32();
    fill_tss2(&ram);
    ram.store_u32(TSS2 + 0x24, flag::VM as u32 | 2);
    ram.store_u32(TSS2 + 0x4c, 0x100);
    ram.store_u32(TSS2 + 0x20, 0x40);
    run(&mut cpu, &ram, &[0xea, 0, 0, 0, 0, TSS2_SEL as u8, 0]);
    assert!(cpu.v86());
    assert_eq!((cpu.state.seg[1].base, cpu.state.rip, cpu.cpl()), (0x1000, 0x40, 3));
}

#[test]
fn io_breakpoints_need_debug_extensions() {
    for (de, vector) in [(false, None), (true, Some(1))] {
        let (mut cpu, ram) = machine32();
        put(&ram, handler(1), &[0xf4]);
        if de {
            cpu.state.cr4 |= cr4::DE;
        }
        cpu.state.dr[2] = 0x70;
        cpu.state.dr[7] |= 0x10 | 2 << 24;
        cpu.state.gpr[gpr::RDX] = 0x70;
        run(&mut cpu, &ram, &[0xec]);
        assert_eq!(cpu.state.rip, vector.map_or(0x1001, handler));
        assert_eq!(cpu.state.dr[6] & 0xf, if de { 4 } else { 0 });
    }
}

#[test]
fn branch_stepping_waits_for_a_branch() {
    let (mut cpu, ram) = machine32();
    cpu.state.rflags |= flag::TF;
    cpu.state.msr.debugctl = 2;
    put(&ram, 0x1000, &[0xfa, 0xeb, 0x10]);
    cpu.step();
    assert_eq!(cpu.state.rip, 0x1001);
    cpu.step();
    assert_eq!((cpu.state.rip, ram.load_u32(sp(&cpu))), (handler(1), Some(0x1013)));
    assert_eq!(cpu.state.msr.debugctl, 0);
}

#[test]
fn invpcid_and_protection_keys() {
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[gpr::RCX] = 0x8000;
    cpu.state.gpr[0] = 4;
    let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x01];
    assert_eq!(fault32(&mut cpu, &ram, &invpcid), (13, Some(0)), "type 4");
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[gpr::RCX] = 0x8000;
    ram.store_u64(0x8000, 5);
    assert_eq!(fault32(&mut cpu, &ram, &invpcid), (13, Some(0)), "a PCID without CR4.PCIDE");
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[gpr::RCX] = 0x8000;
    cpu.state.gpr[0] = 2;
    assert_eq!(run(&mut cpu, &ram, &invpcid), Exit::Budget);
    assert_eq!(cpu.state.rip, 0x1005);
    let (mut cpu, ram) = machine64();
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x01, 0xef]), (6, None), "WRPKRU without CR4.PKE");
    let (mut cpu, ram) = machine64();
    cpu.state.cr4 |= cr4::PKE;
    cpu.state.gpr[0] = 0x5555_5554;
    run(&mut cpu, &ram, &[0x0f, 0x01, 0xef]);
    assert_eq!(cpu.state.pkru, 0x5555_5554);
    cpu.state.gpr[gpr::RDX] = 1;
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x01, 0xef]), (13, Some(0)));
}

#[test]
fn mov_cr3_reserved_bits_and_cr8() {
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[0] = 1 << 45;
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x22, 0xd8]), (13, Some(0)));
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[0] = 0x10;
    assert_eq!(fault32(&mut cpu, &ram, &[0x44, 0x0f, 0x22, 0xc0]), (13, Some(0)), "CR8 has four bits");
    let (mut cpu, ram) = machine64();
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x20, 0xc8]), (6, None), "CR1");
}

#[test]
fn expand_down_limits() {
    use super::super::seg::in_limit;
    let mut s = crate::state::Segment { limit: 0xfff, attr: 0x4096, ..Default::default() };
    assert!(!in_limit(&s, 0xfff, 1) && in_limit(&s, 0x1000, 4) && in_limit(&s, 0xffff_fffc, 4));
    s.attr = 0x96;
    assert!(in_limit(&s, 0xfffe, 2) && !in_limit(&s, 0xffff, 2));
}
