//! Tests of the system half on small machines: descriptor tables and a few bytes of code in RAM.

use super::cpuid::{Accelerator, Dynamic, Feature, HostCpu, ModelError, Topology, Vendor};
use crate::state::{Activity, EventKind, Injected, Seg, Shadow, cr0, cr4, efer, flag, gpr};
use crate::testing::{long_mode_cpu, protected_cpu, real_cpu};
use crate::{Cpu, CpuModel, Exit, Signals};
use hyaline_ram::RamBlock;
use std::sync::Arc;

mod more;

const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const TSS: u64 = 0x4000;
const TSS2: u64 = 0x4800;
const LDT: u64 = 0x4c00;
const RING0_STACK: u64 = 0x7_0000;

// Selectors of the tests' GDT.
const CODE0: u16 = 0x08;
const DATA0: u16 = 0x10;
const CODE3: u16 = 0x18 | 3;
const DATA3: u16 = 0x20 | 3;
const TSS_SEL: u16 = 0x28;
const TSS2_SEL: u16 = 0x38;
const LDT_SEL: u16 = 0x48;
const CONFORMING: u16 = 0x58;
const ABSENT: u16 = 0x60;
const CODE16: u16 = 0x68;
const GATE: u16 = 0x70;
const COMPAT3: u16 = 0x80 | 3;
const TASK_GATE: u16 = 0x88;

fn descriptor(base: u64, limit: u32, attr: u16) -> u64 {
    let low = u64::from(limit & 0xffff) | (base & 0xffff) << 16;
    let high =
        base >> 16 & 0xff | u64::from(attr & 0xf0ff) << 8 | u64::from(limit & 0xf_0000) | base & 0xff00_0000;
    low | high << 32
}

fn gate(selector: u16, offset: u64, attr: u8, parameters: u8) -> u64 {
    let low = offset & 0xffff | u64::from(selector) << 16;
    let high = offset & 0xffff_0000 | u64::from(attr) << 8 | u64::from(parameters);
    low | high << 32
}

fn put(ram: &RamBlock, at: u64, code: &[u8]) {
    ram.write(at, code).unwrap();
}

fn gdt(ram: &RamBlock, selector: u16, value: u64) {
    ram.store_u64(GDT + u64::from(selector & !7), value);
}

/// Entry of an interrupt handler in the tests' IDT.
fn handler(vector: u8) -> u64 {
    0x1_0000 + u64::from(vector) * 0x10
}

/// 32-bit protected mode with tables: every vector has an interrupt gate to [`handler`].
fn machine32() -> (Cpu, Arc<RamBlock>) {
    let (mut cpu, ram) = protected_cpu(2 << 20);
    gdt(&ram, CODE0, descriptor(0, 0xf_ffff, 0xc09a));
    gdt(&ram, DATA0, descriptor(0, 0xf_ffff, 0xc092));
    gdt(&ram, CODE3, descriptor(0, 0xf_ffff, 0xc0fa));
    gdt(&ram, DATA3, descriptor(0, 0xf_ffff, 0xc0f2));
    gdt(&ram, TSS_SEL, descriptor(TSS, 0x3ff, 0x8b));
    gdt(&ram, TSS2_SEL, descriptor(TSS2, 0x67, 0x89));
    gdt(&ram, LDT_SEL, descriptor(LDT, 0xff, 0x82));
    gdt(&ram, CONFORMING, descriptor(0, 0xf_ffff, 0xc09e));
    gdt(&ram, ABSENT, descriptor(0, 0xf_ffff, 0xc012));
    gdt(&ram, CODE16, descriptor(0, 0xffff, 0x009a));
    for v in 0..=255u8 {
        ram.store_u64(IDT + 8 * u64::from(v), gate(CODE0, handler(v), 0x8e, 0));
    }
    ram.store_u32(TSS + 4, RING0_STACK as u32);
    ram.store_u32(TSS + 8, u32::from(DATA0));
    ram.store_u16(TSS + 0x66, 0x68);
    cpu.state.gdtr.base = GDT;
    cpu.state.gdtr.limit = 0x9f;
    cpu.state.idtr.base = IDT;
    cpu.state.idtr.limit = 0x7ff;
    cpu.state.tr.selector = TSS_SEL;
    cpu.state.tr.base = TSS;
    cpu.state.tr.limit = 0x3ff;
    cpu.state.tr.attr = 0x8b;
    cpu.state.ldtr.unusable = true;
    (cpu, ram)
}

/// The same in long mode, with 16-byte gates.
fn machine64() -> (Cpu, Arc<RamBlock>) {
    let (mut cpu, ram) = long_mode_cpu(2 << 20);
    gdt(&ram, CODE0, descriptor(0, 0xf_ffff, 0xa09a));
    gdt(&ram, DATA0, descriptor(0, 0xf_ffff, 0xc092));
    gdt(&ram, CODE3, descriptor(0, 0xf_ffff, 0xa0fa));
    gdt(&ram, DATA3, descriptor(0, 0xf_ffff, 0xc0f2));
    gdt(&ram, TSS_SEL, descriptor(TSS, 0x3ff, 0x8b));
    gdt(&ram, COMPAT3, descriptor(0, 0xf_ffff, 0xc0fa));
    gdt(&ram, CODE16, descriptor(0, 0xf_ffff, 0xe09a));
    for v in 0..=255u8 {
        ram.store_u64(IDT + 16 * u64::from(v), gate(CODE0, handler(v), 0x8e, 0));
        ram.store_u64(IDT + 16 * u64::from(v) + 8, 0);
    }
    ram.store_u64(TSS + 4, RING0_STACK);
    ram.store_u16(TSS + 0x66, 0x68);
    cpu.state.gdtr.base = GDT;
    cpu.state.gdtr.limit = 0x9f;
    cpu.state.idtr.base = IDT;
    cpu.state.idtr.limit = 0xfff;
    cpu.state.tr.selector = TSS_SEL;
    cpu.state.tr.base = TSS;
    cpu.state.tr.limit = 0x3ff;
    cpu.state.tr.attr = 0x8b;
    (cpu, ram)
}

/// Moves a processor of [`machine32`] or [`machine64`] to privilege level 3.
fn to_user(cpu: &mut Cpu) {
    cpu.state.seg[Seg::Cs as usize].selector = CODE3;
    cpu.state.seg[Seg::Cs as usize].attr |= 0x60;
    for s in [Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        cpu.state.seg[s as usize].selector = DATA3;
        cpu.state.seg[s as usize].attr |= 0x60;
    }
    cpu.mode_changed();
}

fn sp(cpu: &Cpu) -> u64 {
    cpu.state.gpr[gpr::RSP]
}

/// Runs the code at 0x1000 for one instruction.
fn run(cpu: &mut Cpu, ram: &RamBlock, code: &[u8]) -> Exit {
    let at = cpu.state.rip;
    put(ram, at, code);
    cpu.step()
}

/// Runs one instruction that must fault and gives (vector, error code); the handler's entry is where RIP then is.
fn fault32(cpu: &mut Cpu, ram: &RamBlock, code: &[u8]) -> (u8, Option<u32>) {
    let at = cpu.state.rip;
    put(ram, at, code);
    // A faulting instruction isn't retired: the step goes on with the first of the handler, a HLT.
    for v in 0..32 {
        put(ram, handler(v), &[0xf4]);
    }
    let size = if cpu.long_mode() { 8 } else { 4 };
    let exit = cpu.step();
    assert!(matches!(exit, Exit::Budget | Exit::Halted), "{exit:?}");
    assert_eq!(cpu.state.activity, Activity::Halted, "rip {:#x}", cpu.state.rip);
    let vector = ((cpu.state.rip - 1 - 0x1_0000) / 0x10) as u8;
    let error = matches!(vector, 8 | 10..=14 | 17).then(|| ram.load_u32(sp(cpu)).unwrap());
    let pushed = sp(cpu) + if error.is_some() { size } else { 0 };
    assert_eq!(ram.load_u32(pushed).map(u64::from), Some(at), "the pushed address is the instruction's");
    (vector, error)
}

#[test]
fn real_mode_interrupt_and_iret() {
    let (mut cpu, ram) = real_cpu(1 << 20);
    cpu.state.idtr.limit = 0x3ff;
    ram.store_u32(0x21 * 4, 0x0200_3000);
    cpu.state.rflags |= flag::IF | flag::CF;
    assert_eq!(run(&mut cpu, &ram, &[0xcd, 0x21]), Exit::Budget);
    assert_eq!((cpu.state.seg[1].selector, cpu.state.seg[1].base, cpu.state.rip), (0x200, 0x2000, 0x3000));
    assert_eq!(sp(&cpu), 0x7ffa);
    assert_eq!(ram.load_u16(0x7ffa), Some(0x1002));
    assert_eq!(ram.load_u16(0x7ffc), Some(0));
    assert_eq!(ram.load_u16(0x7ffe), Some(0x203));
    assert_eq!(cpu.state.rflags & flag::IF, 0);
    put(&ram, 0x5000, &[0xcf]);
    cpu.step();
    assert_eq!((cpu.state.seg[1].selector, cpu.state.rip, sp(&cpu)), (0, 0x1002, 0x8000));
    assert_eq!(cpu.state.rflags & (flag::IF | flag::CF), flag::IF | flag::CF);
}

#[test]
fn real_mode_keeps_unreal_limits() {
    let (mut cpu, _ram) = real_cpu(1 << 20);
    cpu.state.seg[Seg::Ds as usize].limit = 0xffff_ffff;
    super::seg::load(&mut cpu, Seg::Ds, 0x1234).unwrap();
    let ds = cpu.state.seg[Seg::Ds as usize];
    assert_eq!((ds.base, ds.limit, ds.selector), (0x1_2340, 0xffff_ffff, 0x1234));
}

#[test]
fn real_mode_vector_outside_the_table_shuts_down() {
    let (mut cpu, ram) = real_cpu(1 << 20);
    cpu.state.idtr.limit = 0x10;
    assert_eq!(run(&mut cpu, &ram, &[0xcd, 0x21]), Exit::Shutdown);
    assert_eq!(cpu.state.rip, 0x1000);
}

#[test]
fn data_segment_loads_check_and_set_accessed() {
    let (mut cpu, ram) = machine32();
    super::seg::load(&mut cpu, Seg::Es, DATA0).unwrap();
    assert_eq!(ram.load_u8(GDT + 0x10 + 5), Some(0x93));
    assert_eq!(cpu.state.seg[0].limit, 0xffff_ffff);
    let gp = |code| Err(crate::Fault::gp(code));
    assert_eq!(super::seg::load(&mut cpu, Seg::Es, ABSENT), Err(crate::Fault::np(ABSENT.into())));
    assert_eq!(super::seg::load(&mut cpu, Seg::Ss, ABSENT), Err(crate::Fault::ss(ABSENT.into())));
    assert_eq!(super::seg::load(&mut cpu, Seg::Ss, 0), gp(0));
    assert_eq!(super::seg::load(&mut cpu, Seg::Ss, CODE0), gp(CODE0.into()));
    assert_eq!(super::seg::load(&mut cpu, Seg::Ds, TSS_SEL), gp(TSS_SEL.into()));
    assert_eq!(super::seg::load(&mut cpu, Seg::Ds, 0x4 | 8), gp(0xc), "no LDT");
    assert_eq!(super::seg::load(&mut cpu, Seg::Ds, 0x1000), gp(0x1000), "outside the GDT");
    super::seg::load(&mut cpu, Seg::Ds, 3).unwrap();
    assert!(cpu.state.seg[3].unusable);
    to_user(&mut cpu);
    assert_eq!(super::seg::load(&mut cpu, Seg::Ds, DATA0), gp(DATA0.into()));
    super::seg::load(&mut cpu, Seg::Ds, CONFORMING).unwrap();
    super::seg::load(&mut cpu, Seg::Ds, DATA3).unwrap();
}

#[test]
fn interrupt_from_user_switches_stacks_and_iret_returns() {
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    cpu.state.rflags |= flag::IF;
    ram.store_u64(IDT + 8 * 0x80, gate(CODE0, handler(0x80), 0xef, 0));
    assert_eq!(run(&mut cpu, &ram, &[0xcd, 0x80]), Exit::Budget);
    assert_eq!((cpu.cpl(), cpu.state.rip), (0, handler(0x80)));
    assert_eq!(sp(&cpu), RING0_STACK - 20);
    let frame: Vec<u32> = (0..5).map(|i| ram.load_u32(sp(&cpu) + 4 * i).unwrap()).collect();
    assert_eq!(frame, [0x1002, CODE3.into(), 0x202, 0x8_0000, DATA3.into()]);
    assert_ne!(cpu.state.rflags & flag::IF, 0, "a trap gate leaves IF");
    put(&ram, handler(0x80), &[0xcf]);
    cpu.step();
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (3, 0x1002, 0x8_0000));
    assert_eq!(cpu.state.seg[1].selector, CODE3);
}

#[test]
fn int_n_checks_the_gates_privilege() {
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    assert_eq!(fault32(&mut cpu, &ram, &[0xcd, 0x80]), (13, Some(0x80 * 8 + 2)));
    // Pushed flags of a fault have RF set.
    assert_ne!(ram.load_u32(sp(&cpu) + 12).unwrap() & flag::RF as u32, 0);
}

#[test]
fn absent_gate_of_an_external_interrupt_has_ext() {
    let (mut cpu, ram) = machine32();
    ram.store_u64(IDT + 8 * 0x40, gate(CODE0, handler(0x40), 0x0e, 0));
    super::event::interrupt(&mut cpu, 0x40, EventKind::External).unwrap();
    assert_eq!(cpu.state.rip, handler(11));
    assert_eq!(ram.load_u32(sp(&cpu)), Some(0x40 * 8 + 3));
}

#[test]
fn double_and_triple_fault() {
    let (mut cpu, ram) = machine32();
    // #NP while #GP is delivered: contributory after contributory.
    ram.store_u64(IDT + 8 * 13, gate(CODE0, handler(13), 0x0e, 0));
    super::event::exception(&mut cpu, 13, Some(0)).unwrap();
    assert_eq!(cpu.state.rip, handler(8));
    assert_eq!(ram.load_u32(sp(&cpu)), Some(0));
    let (mut cpu, ram) = machine32();
    ram.store_u64(IDT + 8 * 13, 0);
    ram.store_u64(IDT + 8 * 8, 0);
    let before = cpu.state.clone();
    assert_eq!(super::event::exception(&mut cpu, 13, Some(0)), Err(Exit::Shutdown));
    assert_eq!(cpu.state.activity, Activity::Shutdown);
    cpu.state.activity = Activity::Running;
    assert_eq!(cpu.state, before);
    // A benign exception whose gate is bad is followed by plain #GP.
    let (mut cpu, ram) = machine32();
    ram.store_u64(IDT + 8 * 6, 0);
    super::event::exception(&mut cpu, 6, None).unwrap();
    assert_eq!(cpu.state.rip, handler(13));
    assert_eq!(ram.load_u32(sp(&cpu)), Some(6 * 8 + 3));
}

#[test]
fn far_jump_and_call_checks() {
    let (mut cpu, ram) = machine32();
    let jmp = |sel: u16| [0xea, 0, 0x20, 0, 0, sel as u8, (sel >> 8) as u8];
    assert_eq!(fault32(&mut cpu, &ram, &jmp(0)), (13, Some(0)));
    for (selector, expected) in [
        (DATA0, (13, Some(DATA0.into()))),
        (CODE3 & !3, (13, Some(u32::from(CODE3 & !3)))),
        (CODE0 | 3, (13, Some(CODE0.into()))),
        (TSS_SEL, (13, Some(TSS_SEL.into()))),
    ] {
        let (mut cpu, ram) = machine32();
        assert_eq!(fault32(&mut cpu, &ram, &jmp(selector)), expected, "{selector:#x}");
    }
    let (mut cpu, ram) = machine32();
    run(&mut cpu, &ram, &jmp(CODE16));
    assert_eq!((cpu.state.rip, cpu.code_bits()), (0x2000, 16));
}

#[test]
fn call_gate_to_inner_level_copies_parameters_and_ret_goes_back() {
    let (mut cpu, ram) = machine32();
    gdt(&ram, GATE, gate(CODE0, 0x6000, 0xec, 2));
    to_user(&mut cpu);
    ram.store_u32(0x8_0000, 0x1111);
    ram.store_u32(0x8_0004, 0x2222);
    run(&mut cpu, &ram, &[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]);
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (0, 0x6000, RING0_STACK - 24));
    let frame: Vec<u32> = (0..6).map(|i| ram.load_u32(sp(&cpu) + 4 * i).unwrap()).collect();
    assert_eq!(frame, [0x1007, CODE3.into(), 0x1111, 0x2222, 0x8_0000, DATA3.into()]);
    cpu.state.seg[Seg::Ds as usize].attr &= !0x60;
    put(&ram, 0x6000, &[0xca, 8, 0]);
    cpu.step();
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (3, 0x1007, 0x8_0008));
    assert!(cpu.state.seg[Seg::Ds as usize].unusable, "a privileged DS is dropped");
    assert!(!cpu.state.seg[Seg::Es as usize].unusable);
}

#[test]
fn call_gate_dpl_is_checked() {
    let (mut cpu, ram) = machine32();
    gdt(&ram, GATE, gate(CODE0, 0x6000, 0x8c, 0));
    to_user(&mut cpu);
    let code = [0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0];
    assert_eq!(fault32(&mut cpu, &ram, &code), (13, Some(GATE.into())));
}

fn fill_tss2(ram: &RamBlock) {
    ram.store_u32(TSS2 + 0x20, 0x9000);
    ram.store_u32(TSS2 + 0x24, 2);
    for (i, s) in [DATA0, CODE0, DATA0, DATA0, 0, 0].into_iter().enumerate() {
        ram.store_u32(TSS2 + 0x48 + 4 * i as u64, s.into());
    }
    ram.store_u32(TSS2 + 0x38, 0x6_0000);
    ram.store_u32(TSS2 + 0x28, 0xaaaa);
}

#[test]
fn task_switch_by_call_and_back_by_iret() {
    let (mut cpu, ram) = machine32();
    fill_tss2(&ram);
    cpu.state.gpr[gpr::RBX] = 0x77;
    run(&mut cpu, &ram, &[0x9a, 0, 0, 0, 0, TSS2_SEL as u8, 0]);
    assert_eq!((cpu.state.rip, sp(&cpu), cpu.state.gpr[0]), (0x9000, 0x6_0000, 0xaaaa));
    assert_ne!(cpu.state.rflags & flag::NT, 0);
    assert_ne!(cpu.state.cr0 & cr0::TS, 0);
    assert_eq!(ram.load_u16(TSS2), Some(TSS_SEL));
    assert_eq!(ram.load_u32(TSS + 0x20), Some(0x1007));
    assert_eq!(ram.load_u32(TSS + 0x34), Some(0x77));
    assert_eq!(ram.load_u8(GDT + u64::from(TSS2_SEL) + 5), Some(0x8b));
    assert_eq!(ram.load_u8(GDT + u64::from(TSS_SEL) + 5), Some(0x8b));
    put(&ram, 0x9000, &[0xcf]);
    cpu.step();
    assert_eq!((cpu.state.rip, cpu.state.gpr[gpr::RBX], sp(&cpu)), (0x1007, 0x77, 0x8_0000));
    assert_eq!(cpu.state.tr.selector, TSS_SEL);
    assert_eq!(ram.load_u8(GDT + u64::from(TSS2_SEL) + 5), Some(0x89));
    assert_eq!(ram.load_u32(TSS2 + 0x24).unwrap() & flag::NT as u32, 0);
}

#[test]
fn task_switch_by_jump_moves_the_busy_bit_and_bad_tasks_fault() {
    let (mut cpu, ram) = machine32();
    fill_tss2(&ram);
    let jmp = [0xea, 0, 0, 0, 0, TSS2_SEL as u8, 0];
    run(&mut cpu, &ram, &jmp);
    assert_eq!(ram.load_u8(GDT + u64::from(TSS_SEL) + 5), Some(0x89));
    assert_eq!(cpu.state.rflags & flag::NT, 0);
    // Busy target.
    let (mut cpu, ram) = machine32();
    gdt(&ram, TSS2_SEL, descriptor(TSS2, 0x67, 0x8b));
    assert_eq!(fault32(&mut cpu, &ram, &jmp), (13, Some(TSS2_SEL.into())));
    // Too short.
    let (mut cpu, ram) = machine32();
    gdt(&ram, TSS2_SEL, descriptor(TSS2, 0x66, 0x89));
    assert_eq!(fault32(&mut cpu, &ram, &jmp), (10, Some(TSS2_SEL.into())));
    // A bad SS is the new task's fault: #TS with its EIP pushed.
    let (mut cpu, ram) = machine32();
    fill_tss2(&ram);
    ram.store_u32(TSS2 + 0x50, CODE0.into());
    put(&ram, handler(10), &[0xf4]);
    put(&ram, 0x1000, &jmp);
    cpu.state.rip = 0x1000;
    cpu.step();
    assert_eq!(cpu.state.rip, handler(10) + 1);
    assert_eq!(ram.load_u32(sp(&cpu)), Some(CODE0.into()));
    assert_eq!(ram.load_u32(sp(&cpu) + 4), Some(0x9000));
    assert_eq!(cpu.state.tr.selector, TSS2_SEL);
}

#[test]
fn task_gate_handles_an_exception() {
    let (mut cpu, ram) = machine32();
    fill_tss2(&ram);
    ram.store_u64(IDT + 8 * 13, gate(TSS2_SEL, 0, 0x85, 0));
    super::event::exception(&mut cpu, 13, Some(0x1234)).unwrap();
    assert_eq!((cpu.state.rip, sp(&cpu)), (0x9000, 0x6_0000 - 4));
    assert_eq!(ram.load_u32(sp(&cpu)), Some(0x1234));
    assert_eq!(ram.load_u32(TSS + 0x20), Some(0x1000));
    gdt(&ram, TASK_GATE, gate(TSS_SEL, 0, 0x85, 0));
    put(&ram, 0x9000, &[0xea, 0, 0, 0, 0, TASK_GATE as u8, 0]);
    put(&ram, handler(10), &[0xf4]);
    assert_eq!(cpu.step(), Exit::Budget);
}

#[test]
fn task_switch_with_the_t_bit_traps() {
    let (mut cpu, ram) = machine32();
    fill_tss2(&ram);
    ram.store_u16(TSS2 + 0x64, 1);
    put(&ram, handler(1), &[0xf4]);
    run(&mut cpu, &ram, &[0xea, 0, 0, 0, 0, TSS2_SEL as u8, 0]);
    assert_ne!(cpu.state.dr[6] & super::debug::DR6_BT, 0);
    assert_eq!(ram.load_u32(sp(&cpu)), Some(0x9000));
}

/// A processor in virtual-8086 mode at 0000:1000.
fn machine_v86() -> (Cpu, Arc<RamBlock>) {
    let (mut cpu, ram) = machine32();
    for s in &mut cpu.state.seg {
        *s = super::seg::v86_segment(0);
    }
    cpu.state.gpr[gpr::RSP] = 0x7000;
    cpu.state.rflags |= flag::VM | flag::IF;
    cpu.mode_changed();
    (cpu, ram)
}

#[test]
fn v86_interrupt_pushes_all_segments_and_iret_returns() {
    let (mut cpu, ram) = machine_v86();
    cpu.state.seg[Seg::Gs as usize] = super::seg::v86_segment(0x55);
    super::event::interrupt(&mut cpu, 0x20, EventKind::External).unwrap();
    assert_eq!((cpu.cpl(), cpu.v86(), sp(&cpu)), (0, false, RING0_STACK - 36));
    let frame: Vec<u32> = (0..9).map(|i| ram.load_u32(sp(&cpu) + 4 * i).unwrap()).collect();
    assert_eq!(frame, [0x1000, 0, 0x2_0202, 0x7000, 0, 0, 0, 0, 0x55]);
    assert!(cpu.state.seg[Seg::Gs as usize].unusable);
    put(&ram, handler(0x20), &[0xcf]);
    cpu.step();
    assert!(cpu.v86());
    assert_eq!((cpu.state.rip, sp(&cpu)), (0x1000, 0x7000));
    assert_eq!(cpu.state.seg[Seg::Gs as usize].base, 0x550);
}

#[test]
fn v86_sensitive_instructions_fault_below_iopl_3() {
    for code in [&[0xfa][..], &[0xfb], &[0x9c], &[0x9d], &[0xcf], &[0xcd, 0x21]] {
        let (mut cpu, ram) = machine_v86();
        assert_eq!(fault32(&mut cpu, &ram, code), (13, Some(0)), "{code:x?}");
        let (mut cpu, ram) = machine_v86();
        cpu.state.rflags |= flag::IOPL;
        if code[0] != 0xcd {
            assert_eq!(run(&mut cpu, &ram, code), Exit::Budget);
            assert!(cpu.v86(), "{code:x?}");
        }
    }
}

#[test]
fn vme_redirects_interrupts_and_virtualizes_if() {
    let (mut cpu, ram) = machine_v86();
    cpu.state.cr4 |= cr4::VME;
    // Redirection map below the I/O map: vector 0x21 stays in the program.
    ram.store_u16(TSS + 0x66, 0x88);
    ram.store_u32(0x21 * 4, 0x0100_0040);
    cpu.state.rflags |= flag::VIF;
    run(&mut cpu, &ram, &[0xcd, 0x21]);
    assert_eq!((cpu.state.seg[1].selector, cpu.state.rip, sp(&cpu)), (0x100, 0x40, 0x6ffa));
    assert_eq!(ram.load_u16(0x6ffe), Some(0x3202));
    assert_eq!(cpu.state.rflags & flag::VIF, 0);
    // With its bit set the vector goes the protected way, which IOPL forbids.
    let (mut cpu, ram) = machine_v86();
    cpu.state.cr4 |= cr4::VME;
    ram.store_u16(TSS + 0x66, 0x88);
    ram.store_u8(TSS + 0x68 + 4, 2);
    assert_eq!(fault32(&mut cpu, &ram, &[0xcd, 0x21]), (13, Some(0)));
    // CLI and STI work on VIF; STI with VIP faults.
    let (mut cpu, ram) = machine_v86();
    cpu.state.cr4 |= cr4::VME;
    run(&mut cpu, &ram, &[0xfb]);
    assert_ne!(cpu.state.rflags & flag::VIF, 0);
    cpu.state.rflags |= flag::VIP;
    assert_eq!(fault32(&mut cpu, &ram, &[0xfb]), (13, Some(0)));
}

#[test]
fn long_mode_interrupt_aligns_and_iretq_returns() {
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[gpr::RSP] = 0x7_fff5;
    cpu.state.rflags |= flag::IF;
    super::event::interrupt(&mut cpu, 0x30, EventKind::External).unwrap();
    assert_eq!(cpu.state.rip, handler(0x30));
    assert_eq!(sp(&cpu), 0x7_fff0 - 40);
    let frame: Vec<u64> = (0..5).map(|i| ram.load_u64(sp(&cpu) + 8 * i).unwrap()).collect();
    assert_eq!(frame, [0x1000, CODE0.into(), 0x202, 0x7_fff5, DATA0.into()]);
    assert_eq!(cpu.state.rflags & flag::IF, 0);
    put(&ram, handler(0x30), &[0x48, 0xcf]);
    cpu.step();
    assert_eq!((cpu.state.rip, sp(&cpu), cpu.state.rflags & flag::IF), (0x1000, 0x7_fff5, flag::IF));
}

#[test]
fn long_mode_inner_stack_ist_and_null_ss() {
    let (mut cpu, ram) = machine64();
    to_user(&mut cpu);
    super::event::exception(&mut cpu, 13, Some(0x55)).unwrap();
    assert_eq!((cpu.cpl(), sp(&cpu)), (0, RING0_STACK - 48));
    assert_eq!(cpu.state.seg[Seg::Ss as usize].selector, 0);
    assert_eq!(ram.load_u64(sp(&cpu)), Some(0x55));
    assert_eq!(ram.load_u64(sp(&cpu) + 40), Some(DATA3.into()));
    put(&ram, handler(13), &[0x48, 0xcf]);
    cpu.state.gpr[gpr::RSP] += 8;
    cpu.step();
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (3, 0x1000, 0x8_0000));
    // IST 2.
    let (mut cpu, ram) = machine64();
    ram.store_u64(IDT + 16 * 2, gate(CODE0, handler(2), 0x8e, 2));
    ram.store_u64(TSS + 0x24 + 8, 0x6_8008);
    super::event::interrupt(&mut cpu, 2, EventKind::Nmi).unwrap();
    assert_eq!(sp(&cpu), 0x6_8000 - 40);
    assert!(cpu.state.nmi_blocked);
    put(&ram, handler(2), &[0x48, 0xcf]);
    cpu.step();
    assert!(!cpu.state.nmi_blocked);
    assert_eq!(sp(&cpu), 0x8_0000);
}

#[test]
fn long_mode_gate_faults() {
    let (mut cpu, ram) = machine64();
    ram.store_u64(IDT + 16 * 0x50, gate(CODE16, handler(0x50), 0x8e, 0));
    super::event::interrupt(&mut cpu, 0x50, EventKind::External).unwrap();
    assert_eq!((cpu.state.rip, ram.load_u64(sp(&cpu))), (handler(13), Some(u64::from(CODE16) + 1)));
    let (mut cpu, ram) = machine64();
    ram.store_u64(IDT + 16 * 0x50 + 8, 0x8000);
    super::event::interrupt(&mut cpu, 0x50, EventKind::External).unwrap();
    assert_eq!((cpu.state.rip, ram.load_u64(sp(&cpu))), (handler(13), Some(1)), "non-canonical handler");
    let (mut cpu, ram) = machine64();
    to_user(&mut cpu);
    cpu.state.tr.limit = 0x8;
    // The stack for #GP can't be read either, nor that for #DF.
    assert_eq!(super::event::interrupt(&mut cpu, 0x50, EventKind::External), Err(Exit::Shutdown));
    let _ = ram;
}

#[test]
fn syscall_and_sysret() {
    let (mut cpu, ram) = machine64();
    to_user(&mut cpu);
    cpu.state.msr.star = 0x0013_0008_0000_0000;
    cpu.state.msr.lstar = 0x5000;
    cpu.state.msr.sfmask = flag::IF | flag::DF;
    cpu.state.rflags |= flag::IF;
    run(&mut cpu, &ram, &[0x0f, 0x05]);
    assert_eq!((cpu.cpl(), cpu.state.rip, cpu.state.gpr[gpr::RCX]), (0, 0x5000, 0x1002));
    assert_eq!(cpu.state.gpr[11], 0x202);
    assert_eq!(cpu.state.rflags & flag::IF, 0);
    put(&ram, 0x5000, &[0x48, 0x0f, 0x07]);
    cpu.step();
    assert_eq!((cpu.cpl(), cpu.state.rip, cpu.state.rflags & flag::IF), (3, 0x1002, flag::IF));
    assert_eq!((cpu.state.seg[1].selector, cpu.state.seg[2].selector), (0x23, 0x1b));
    // Without SCE.
    let (mut cpu, ram) = machine64();
    cpu.state.efer &= !efer::SCE;
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x05]), (6, None));
    // SYSRET to a non-canonical address faults at CPL 0 on Intel.
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[gpr::RCX] = 1 << 62;
    assert_eq!(fault32(&mut cpu, &ram, &[0x48, 0x0f, 0x07]), (13, Some(0)));
}

#[test]
fn sysenter_and_sysexit() {
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x34]), (13, Some(0)));
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    cpu.state.msr.sysenter_cs = CODE0.into();
    cpu.state.msr.sysenter_esp = 0x6_0000;
    cpu.state.msr.sysenter_eip = 0x5000;
    run(&mut cpu, &ram, &[0x0f, 0x34]);
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (0, 0x5000, 0x6_0000));
    cpu.state.gpr[gpr::RDX] = 0x1002;
    cpu.state.gpr[gpr::RCX] = 0x8_0000;
    put(&ram, 0x5000, &[0x0f, 0x35]);
    cpu.step();
    assert_eq!((cpu.cpl(), cpu.state.rip, sp(&cpu)), (3, 0x1002, 0x8_0000));
}

#[test]
fn cr0_and_cr4_rules() {
    let (mut cpu, _ram) = machine32();
    let gp = Err(crate::Fault::gp(0));
    let base = cr0::PE | cr0::ET;
    assert_eq!(super::control::write_cr0(&mut cpu, cr0::PG), gp);
    assert_eq!(super::control::write_cr0(&mut cpu, base | cr0::NW), gp);
    assert_eq!(super::control::write_cr0(&mut cpu, 1 << 32), gp);
    assert_eq!(super::control::write_cr4(&mut cpu, 1 << 31), gp);
    assert_eq!(super::control::write_cr4(&mut cpu, cr4::PCIDE), gp, "PCIDs need long mode");
    // LME without PAE.
    cpu.state.efer = efer::LME;
    assert_eq!(super::control::write_cr0(&mut cpu, base | cr0::PG), gp);
    super::control::write_cr4(&mut cpu, cr4::PAE).unwrap();
    super::control::write_cr0(&mut cpu, base | cr0::PG).unwrap();
    assert_ne!(cpu.state.efer & efer::LMA, 0);
    assert_eq!(super::control::write_cr4(&mut cpu, 0), gp, "PAE stays in long mode");
    assert_eq!(super::control::write_cr4(&mut cpu, cr4::PAE | cr4::LA57), gp);
    super::control::write_cr4(&mut cpu, cr4::PAE | cr4::PCIDE).unwrap();
    assert_eq!(super::control::write_cr0(&mut cpu, base), gp, "PG stays with PCIDs");
    super::control::write_cr4(&mut cpu, cr4::PAE).unwrap();
    super::control::write_cr0(&mut cpu, base).unwrap();
    assert_eq!(cpu.state.efer & efer::LMA, 0);
    let (mut cpu, _ram) = machine64();
    assert_eq!(super::control::write_cr0(&mut cpu, base), gp, "not from 64-bit mode");
    assert_eq!(super::msr::write(&mut cpu, 0xc000_0080, 0), gp, "LME stays while paging");
}

#[test]
fn pae_page_directory_pointers_are_loaded_and_checked() {
    let (mut cpu, ram) = machine32();
    cpu.state.cr4 |= cr4::PAE;
    cpu.state.cr3 = 0x8000;
    ram.store_u64(0x8000, 0x9001);
    let on = cpu.state.cr0 | cr0::PG;
    super::control::write_cr0(&mut cpu, on).unwrap();
    assert_eq!(cpu.state.pdpte[0], 0x9001);
    ram.store_u64(0x8100, 0x9003);
    assert_eq!(super::control::load_cr3(&mut cpu, 0x8100), Err(crate::Fault::gp(0)));
    assert_eq!(cpu.state.cr3, 0x8000);
}

#[test]
fn privileged_instructions_fault_in_user_mode() {
    for code in [
        &[0x0f, 0x20, 0xc0][..], // mov eax, cr0
        &[0x0f, 0x22, 0xc0],
        &[0x0f, 0x21, 0xc0],
        &[0x0f, 0x06],       // clts
        &[0x0f, 0x08],       // invd
        &[0x0f, 0x09],       // wbinvd
        &[0xf4],             // hlt
        &[0x0f, 0x30],       // wrmsr
        &[0x0f, 0x32],       // rdmsr
        &[0x0f, 0x01, 0x10], // lgdt [eax]
        &[0x0f, 0x01, 0x18], // lidt [eax]
        &[0x0f, 0x01, 0x38], // invlpg [eax]
        &[0x0f, 0x01, 0xf0], // lmsw ax
        &[0x0f, 0x00, 0xd0], // lldt ax
        &[0x0f, 0x00, 0xd8], // ltr ax
        &[0xfa],
        &[0xfb],
    ] {
        let (mut cpu, ram) = machine32();
        to_user(&mut cpu);
        assert_eq!(fault32(&mut cpu, &ram, code), (13, Some(0)), "{code:x?}");
    }
}

#[test]
fn umip_hides_the_tables() {
    for code in [
        &[0x0f, 0x01, 0x00][..],
        &[0x0f, 0x01, 0x08],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x01, 0xe0],
    ] {
        let (mut cpu, ram) = machine32();
        to_user(&mut cpu);
        cpu.state.gpr[0] = 0x8000;
        assert_eq!(run(&mut cpu, &ram, code), Exit::Budget);
        assert_eq!(cpu.cpl(), 3);
        let (mut cpu, ram) = machine32();
        to_user(&mut cpu);
        cpu.state.cr4 |= cr4::UMIP;
        assert_eq!(fault32(&mut cpu, &ram, code), (13, Some(0)), "{code:x?}");
    }
}

#[test]
fn tables_are_stored_and_loaded() {
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[0] = 0x8000;
    run(&mut cpu, &ram, &[0x0f, 0x01, 0x00]);
    assert_eq!((ram.load_u16(0x8000), ram.load_u64(0x8002)), (Some(0x9f), Some(GDT)));
    ram.store_u64(0x8002, 1 << 63);
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x01, 0x10]), (13, Some(0)));
    let (mut cpu, ram) = real_cpu(1 << 20);
    cpu.state.gpr[gpr::RBX] = 0x3000;
    put(&ram, 0x3000, &[0x27, 0, 0x78, 0x56, 0x34, 0x12]);
    run(&mut cpu, &ram, &[0x0f, 0x01, 0x17]);
    assert_eq!((cpu.state.gdtr.base, cpu.state.gdtr.limit), (0x34_5678, 0x27), "24 bits of base");
}

#[test]
fn ltr_and_lldt_in_both_modes() {
    let (mut cpu, ram) = machine32();
    cpu.state.gpr[0] = TSS2_SEL.into();
    run(&mut cpu, &ram, &[0x0f, 0x00, 0xd8]);
    assert_eq!((cpu.state.tr.base, cpu.state.tr.kind()), (TSS2, 11));
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x00, 0xd8]), (13, Some(TSS2_SEL.into())), "busy");
    let (mut cpu, ram) = machine32();
    cpu.state.gpr[0] = LDT_SEL.into();
    run(&mut cpu, &ram, &[0x0f, 0x00, 0xd0]);
    assert_eq!((cpu.state.ldtr.base, cpu.state.ldtr.unusable), (LDT, false));
    let (mut cpu, ram) = machine64();
    gdt(&ram, TSS2_SEL, descriptor(TSS2, 0x67, 0x89));
    gdt(&ram, TSS2_SEL + 8, 0xffff_8000);
    cpu.state.gpr[0] = TSS2_SEL.into();
    run(&mut cpu, &ram, &[0x0f, 0x00, 0xd8]);
    assert_eq!(cpu.state.tr.base, 0xffff_8000_0000_0000 | TSS2);
    // Real mode.
    let (mut cpu, ram) = real_cpu(1 << 20);
    cpu.state.idtr.limit = 0x3ff;
    ram.store_u32(6 * 4, 0x3000);
    put(&ram, 0x3000, &[0xf4]);
    run(&mut cpu, &ram, &[0x0f, 0x00, 0xd0]);
    assert_eq!(cpu.state.rip, 0x3001);
}

#[test]
fn lar_lsl_verr_verw_arpl() {
    let (mut cpu, ram) = machine32();
    cpu.state.gpr[gpr::RCX] = DATA0.into();
    run(&mut cpu, &ram, &[0x0f, 0x02, 0xc1]);
    assert_ne!(cpu.state.rflags & flag::ZF, 0);
    assert_eq!(cpu.state.gpr[0], 0x00c0_9200);
    run(&mut cpu, &ram, &[0x0f, 0x03, 0xc1]);
    assert_eq!(cpu.state.gpr[0], 0xffff_ffff);
    to_user(&mut cpu);
    run(&mut cpu, &ram, &[0x0f, 0x02, 0xc1]);
    assert_eq!(cpu.state.rflags & flag::ZF, 0, "not visible from level 3");
    cpu.state.gpr[gpr::RCX] = CODE3.into();
    run(&mut cpu, &ram, &[0x0f, 0x00, 0xe1]);
    assert_ne!(cpu.state.rflags & flag::ZF, 0, "readable");
    run(&mut cpu, &ram, &[0x0f, 0x00, 0xe9]);
    assert_eq!(cpu.state.rflags & flag::ZF, 0, "code is not writable");
    cpu.state.gpr[0] = 0x10;
    run(&mut cpu, &ram, &[0x63, 0xc8]);
    assert_eq!(cpu.state.gpr[0], 0x13);
    assert_ne!(cpu.state.rflags & flag::ZF, 0);
}

#[test]
fn io_permission_bitmap() {
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    cpu.state.gpr[gpr::RDX] = 0x70;
    // The map is all zeros: allowed; nothing answers.
    run(&mut cpu, &ram, &[0xec]);
    assert_eq!(cpu.state.gpr[0] & 0xff, 0xff);
    ram.store_u8(TSS + 0x68 + 0x70 / 8, 2);
    run(&mut cpu, &ram, &[0xec]);
    assert_eq!(fault32(&mut cpu, &ram, &[0x66, 0xed]), (13, Some(0)), "port 0x71 is not allowed");
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    cpu.state.gpr[gpr::RDX] = 0x3fff;
    assert_eq!(fault32(&mut cpu, &ram, &[0xec]), (13, Some(0)), "outside the map");
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    cpu.state.gpr[gpr::RDX] = 0x3fff;
    cpu.state.rflags |= flag::IOPL;
    run(&mut cpu, &ram, &[0xec]);
    assert_eq!(cpu.cpl(), 3);
}

#[test]
fn string_input_stores_and_counts() {
    let (mut cpu, ram) = machine32();
    cpu.state.gpr[gpr::RDX] = 0x70;
    cpu.state.gpr[gpr::RCX] = 3;
    cpu.state.gpr[gpr::RDI] = 0x8000;
    run(&mut cpu, &ram, &[0xf3, 0x66, 0x6d]);
    assert_eq!((cpu.state.gpr[gpr::RCX], cpu.state.gpr[gpr::RDI], cpu.state.rip), (0, 0x8006, 0x1003));
    assert_eq!(ram.load_u64(0x8000), Some(0xffff_ffff_ffff));
}

#[test]
fn sti_casts_a_shadow_for_one_instruction() {
    let (mut cpu, ram) = machine32();
    put(&ram, 0x1000, &[0xfb, 0xfb, 0xfb]);
    cpu.env.signals().raise(Signals::INTERRUPT);
    cpu.step();
    assert_eq!((cpu.state.rip, cpu.state.shadow), (0x1001, Shadow::Sti));
}

#[test]
fn pushf_popf_by_privilege() {
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    cpu.state.rflags |= flag::IF;
    run(&mut cpu, &ram, &[0x9c]);
    assert_eq!(ram.load_u32(sp(&cpu)), Some(0x202));
    ram.store_u32(sp(&cpu), 0x3000 | flag::CF as u32 | flag::AC as u32);
    run(&mut cpu, &ram, &[0x9d]);
    assert_eq!(
        cpu.state.rflags & (flag::IOPL | flag::IF | flag::CF | flag::AC),
        flag::IF | flag::CF | flag::AC
    );
    let (mut cpu, ram) = machine64();
    ram.store_u64(sp(&cpu), 0x3246);
    run(&mut cpu, &ram, &[0x9d]);
    assert_eq!((cpu.state.rflags, sp(&cpu)), (0x3246, 0x8_0008));
}

#[test]
fn single_step_traps_after_the_instruction() {
    let (mut cpu, ram) = machine32();
    put(&ram, handler(1), &[0xf4]);
    put(&ram, 0x1000, &[0xfa, 0xfa]);
    cpu.state.rflags |= flag::TF;
    cpu.step();
    assert_eq!(cpu.state.rip, handler(1));
    assert_eq!(ram.load_u32(sp(&cpu)), Some(0x1001));
    assert_ne!(cpu.state.dr[6] & super::debug::DR6_BS, 0);
    assert_eq!(cpu.state.rflags & flag::TF, 0);
    assert_ne!(ram.load_u32(sp(&cpu) + 8).unwrap() & flag::TF as u32, 0);
    // INT n under TF takes no trap of its own.
    let (mut cpu, ram) = machine32();
    cpu.state.rflags |= flag::TF;
    run(&mut cpu, &ram, &[0xcd, 0x40]);
    assert_eq!(cpu.state.rip, handler(0x40));
}

#[test]
fn instruction_and_data_breakpoints() {
    let (mut cpu, ram) = machine32();
    put(&ram, 0x1000, &[0xfa, 0xfa]);
    cpu.state.dr[0] = 0x1001;
    cpu.state.dr[7] |= 1;
    cpu.step();
    assert_eq!(cpu.state.rip, 0x1001);
    put(&ram, handler(1), &[0xcf]);
    cpu.step();
    assert_eq!(cpu.state.dr[6] & 0xf, 1);
    // The pushed RF is clear for instruction breakpoints: without the handler's help it hits again.
    assert_eq!(cpu.state.rip, 0x1001);
    cpu.state.rflags |= flag::RF;
    cpu.step();
    assert_eq!((cpu.state.rip, cpu.state.rflags & flag::RF), (0x1002, 0));
    // A write of 4 bytes to 0x8004 (SGDT's 6 bytes touch it).
    let (mut cpu, ram) = machine32();
    cpu.state.dr[1] = 0x8004;
    cpu.state.dr[7] |= 4 | 0xd << 20;
    cpu.state.gpr[0] = 0x8000;
    run(&mut cpu, &ram, &[0x0f, 0x01, 0x00]);
    assert_eq!((cpu.state.rip, cpu.state.dr[6] & 0xf), (handler(1), 2));
    assert_eq!(ram.load_u32(sp(&cpu)), Some(0x1003));
}

#[test]
fn debug_register_access() {
    let (mut cpu, ram) = machine32();
    cpu.state.gpr[0] = 0xffff_ffff;
    run(&mut cpu, &ram, &[0x0f, 0x23, 0xf0]);
    assert_eq!(cpu.state.dr[6], 0xffff_efff);
    cpu.state.cr4 |= cr4::DE;
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x21, 0xe0]), (6, None), "DR4 with CR4.DE");
    let (mut cpu, ram) = machine32();
    cpu.state.dr[7] |= 1 << 13;
    put(&ram, handler(1), &[0xf4]);
    run(&mut cpu, &ram, &[0x0f, 0x21, 0xc0]);
    assert_ne!(cpu.state.dr[6] & super::debug::DR6_BD, 0);
    assert_eq!(cpu.state.dr[7] & 1 << 13, 0);
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[0] = 1 << 32;
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x23, 0xf8]), (13, Some(0)));
}

#[test]
fn msr_checks() {
    let (mut cpu, _ram) = machine64();
    let gp = Err(crate::Fault::gp(0));
    assert_eq!(super::msr::read(&mut cpu, 0x1234_5678), Err(crate::Fault::gp(0)));
    assert_eq!(super::msr::write(&mut cpu, 0x277, 2), gp, "a PAT type that doesn't exist");
    super::msr::write(&mut cpu, 0x277, 0x0106_0504_0706_0100).unwrap();
    assert_eq!(super::msr::write(&mut cpu, 0xc000_0082, 1 << 63), gp);
    assert_eq!(super::msr::write(&mut cpu, 0xc000_0080, 1 << 40), gp);
    assert_eq!(super::msr::write(&mut cpu, 0x200, 2), gp);
    assert_eq!(super::msr::write(&mut cpu, 0x1b, 0xfee0_0400), gp, "EXTD without EN");
    super::msr::write(&mut cpu, 0x1b, 0xfee0_0d00).unwrap();
    assert_eq!(super::msr::write(&mut cpu, 0x1b, 0xfee0_0900), gp, "x2APIC to xAPIC");
    super::msr::write(&mut cpu, 0x1b, 0xfee0_0100).unwrap();
    super::msr::write(&mut cpu, 0x10, 1_000_000).unwrap();
    let now = super::msr::read(&mut cpu, 0x10).unwrap();
    assert!((1_000_000..1_000_010).contains(&now));
    assert_eq!(super::msr::read(&mut cpu, 0x3b).unwrap(), cpu.state.tsc_offset);
    super::msr::write(&mut cpu, 0x3b, 0).unwrap();
    assert_eq!(cpu.state.tsc_offset, 0);
}

#[test]
fn rdtsc_obeys_tsd() {
    let (mut cpu, ram) = machine32();
    to_user(&mut cpu);
    run(&mut cpu, &ram, &[0x0f, 0x31]);
    cpu.state.cr4 |= cr4::TSD;
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0x31]), (13, Some(0)));
}

#[test]
fn swapgs_and_bases() {
    let (mut cpu, ram) = machine64();
    cpu.state.msr.kernel_gs_base = 0x1234;
    run(&mut cpu, &ram, &[0x0f, 0x01, 0xf8]);
    assert_eq!((cpu.state.seg[Seg::Gs as usize].base, cpu.state.msr.kernel_gs_base), (0x1234, 0));
    assert_eq!(fault32(&mut cpu, &ram, &[0xf3, 0x48, 0x0f, 0xae, 0xc0]), (6, None), "CR4.FSGSBASE is off");
    let (mut cpu, ram) = machine64();
    cpu.state.cr4 |= cr4::FSGSBASE;
    cpu.state.gpr[0] = 0x5555;
    run(&mut cpu, &ram, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]);
    assert_eq!(cpu.state.seg[Seg::Fs as usize].base, 0x5555);
    cpu.state.gpr[0] = 1 << 63;
    assert_eq!(fault32(&mut cpu, &ram, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]), (13, Some(0)));
}

#[test]
fn xsetbv_rules() {
    use super::control::valid_xcr0;
    assert!(valid_xcr0(7, 0xe7) && valid_xcr0(0xe7, 0xe7) && valid_xcr0(1, 7));
    assert!(!valid_xcr0(6, 7) && !valid_xcr0(5, 7) && !valid_xcr0(0x27, 0xe7) && !valid_xcr0(0xe3, 0xe7));
    assert!(!valid_xcr0(7, 3));
}

#[test]
fn init_and_sipi() {
    let (mut cpu, ram) = machine64();
    cpu.state.msr.apic_base &= !0x100;
    cpu.state.msr.star = 5;
    cpu.env.signals().raise(Signals::INIT);
    assert_eq!(cpu.step(), Exit::WaitForSipi);
    assert_eq!((cpu.state.efer, cpu.state.cr0 & cr0::PG, cpu.state.msr.star), (0, 0, 5));
    put(&ram, 0x9_f000, &[0xfa]);
    cpu.env.signals().raise_sipi(0x9f);
    assert_eq!(cpu.step(), Exit::Budget);
    assert_eq!((cpu.state.seg[1].selector, cpu.state.rip), (0x9f00, 1));
}

#[test]
fn smi_and_rsm_restore_everything() {
    let (mut cpu, ram) = machine64();
    cpu.state.gpr[9] = 0x1122_3344_5566_7788;
    cpu.state.rflags |= flag::IF;
    put(&ram, 0x3_8000, &[0x0f, 0xaa]);
    let before = cpu.state.clone();
    super::smm::enter(&mut cpu).unwrap();
    assert!(cpu.state.smm && !cpu.protected());
    assert_eq!((cpu.state.seg[1].base, cpu.state.rip), (0x3_0000, 0x8000));
    assert_eq!(ram.load_u64(0x3_ff78), Some(0x1000));
    assert_eq!(cpu.step(), Exit::Budget);
    cpu.state.icount = before.icount;
    assert_eq!(cpu.state, before);
    assert_eq!(fault32(&mut cpu, &ram, &[0x0f, 0xaa]), (6, None), "RSM outside of SMM");
}

#[test]
fn a_saved_event_is_delivered_first() {
    let (mut cpu, ram) = machine32();
    put(&ram, handler(0x21), &[0xfa]);
    cpu.state.injected = Some(Injected { vector: 0x21, kind: EventKind::External, error: None });
    cpu.step();
    assert_eq!(cpu.state.rip, handler(0x21) + 1);
    assert_eq!(cpu.state.injected, None);
}

// CPUID.

fn parse(text: &str) -> Result<CpuModel, ModelError> {
    CpuModel::parse(text, &HostCpu::none(), Accelerator::Software)
}

#[test]
fn feature_table_is_in_variant_order() {
    for (i, row) in super::features::FEATURES.iter().enumerate() {
        assert_eq!(row.0 as usize, i);
        assert_eq!(Feature::parse(row.3), Some(row.0), "{}", row.3);
    }
}

#[test]
fn every_named_model_parses_and_names_known_features() {
    for m in super::models::MODELS {
        for name in m.features.iter().flat_map(|l| l.split_whitespace()) {
            assert!(Feature::parse(name).is_some(), "{name} of {}", m.name);
        }
        let model = CpuModel::parse(m.name, &HostCpu::detect(), Accelerator::Software).unwrap();
        let eax = model.signature();
        assert_eq!(super::cpuid::identification(eax), (m.family, m.model, m.stepping), "{}", m.name);
    }
}

#[test]
fn features_are_switched_and_misspelt_ones_named() {
    let model = parse("qemu64,+smep,-nx,umip=on,pcid=off,vendor=GenuineIntel,level=11").unwrap();
    assert!(model.offers(Feature::Smep) && model.offers(Feature::Umip) && !model.offers(Feature::Nx));
    assert_eq!(model.vendor(), Vendor::Intel);
    let ModelError::UnknownFeature { nearest, .. } = parse("max,+smepp").unwrap_err() else { panic!() };
    assert_eq!(nearest, "smep");
    let ModelError::UnknownModel { nearest, .. } = parse("Haswel").unwrap_err() else { panic!() };
    assert_eq!(nearest, "Haswell");
    assert!(matches!(parse("max,smep=perhaps"), Err(ModelError::BadValue { .. })));
    assert!(parse("Haswell-noTSX-v2").is_ok());
}

#[test]
fn vector_features_need_the_host() {
    let model = parse("Skylake-Server").unwrap();
    assert!(!model.offers(Feature::Avx512f) && !model.offers(Feature::Avx));
    assert!(model.warnings().iter().any(|w| w.contains("avx512f")));
    assert!(matches!(parse("Skylake-Server,enforce"), Err(ModelError::Enforced { .. })));
    let model = CpuModel::parse("max,-avx", &HostCpu::detect(), Accelerator::Software).unwrap();
    assert!(!model.offers(Feature::Avx2) && !model.offers(Feature::Avx512f));
    assert_eq!(model.xcr0_mask() & 0xe4, 0);
}

#[test]
fn leaves_agree_with_each_other() {
    let model = CpuModel::default().with_topology(Topology { sockets: 1, cores: 4, threads: 1 });
    let now = Dynamic { index: 2, osxsave: true, apic: true, in_64bit: true, xcr0: 7, ..Dynamic::default() };
    let [_, b, c, d] = model.cpuid(0, 0, &now);
    let text: Vec<u8> = [b, d, c].iter().flat_map(|w| w.to_le_bytes()).collect();
    assert_eq!(text, b"GenuineIntel");
    let [_, b, c, d] = model.cpuid(1, 0, &now);
    assert_eq!(b, 2 << 24 | 4 << 16 | 8 << 8);
    assert_ne!(c & (1 << 27 | 1 << 31), 0);
    assert_ne!(d & 1 << 28, 0);
    let [shift, count, kind, id] = model.cpuid(0xb, 1, &now);
    assert_eq!((shift, count, kind, id), (2, 4, 0x201, 2));
    let [num, den, hz, _] = [0, 1, 2, 3].map(|i| model.cpuid(0x15, 0, &now)[[1, 0, 2, 3][i]]);
    assert_eq!(u64::from(hz) * u64::from(num) / u64::from(den), model.tsc_hz());
    let [low, _, max, _] = model.cpuid(0xd, 0, &now);
    assert_eq!(u64::from(low), model.xcr0_mask());
    assert_eq!(max, super::cpuid::standard_size(model.xcr0_mask()));
    assert_eq!(super::cpuid::standard_size(7), 832);
    assert_eq!(super::cpuid::standard_size(0x2e7), 2696);
    assert_eq!(super::cpuid::compacted_size(7), 832);
    let leaves = model.leaves(2);
    let seven = leaves.iter().find(|l| l.function == 7 && l.index == 0).unwrap();
    assert_eq!(seven.registers[1], model.cpuid(7, 0, &now)[1]);
    assert!(leaves.iter().any(|l| l.function == 0x4000_0000));
}

#[test]
fn kvm_models_follow_the_supported_leaves() {
    let source = CpuModel::default();
    let host = HostCpu::from_leaves(&source.leaves(0));
    let model = CpuModel::parse("host", &host, Accelerator::Kvm).unwrap();
    assert!(model.offers(Feature::Sse2) && model.offers(Feature::Smep));
    assert_eq!(model.offers(Feature::Avx512f), source.offers(Feature::Avx512f));
}

#[test]
fn help_lists_models_and_features() {
    let help = CpuModel::help();
    for word in ["qemu64", "Haswell", "EPYC", "host", "max", "fsgsbase", "tsc-deadline", "vendor"] {
        assert!(help.contains(word), "{word}");
    }
}
