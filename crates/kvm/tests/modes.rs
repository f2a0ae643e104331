//! Long mode, kicks, interrupts, state.

mod common;
use common::*;
use hyaline_device::{ApicMessage, Delivery};
use hyaline_kvm::{Exit, Gsi, Irqchip, KvmVcpu, KvmVm, Msi, VmOptions};
use hyaline_space::ExitKind::{MmioRead, MmioWrite, PioOut};
use hyaline_x86::env::Signals;
use hyaline_x86::state::{Activity, CpuState, EventKind, Injected, Shadow};
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

fn with(irqchip: Irqchip) -> VmOptions {
    VmOptions { irqchip, ..VmOptions::default() }
}

#[test]
fn long_mode_accesses() {
    let Some(kvm) = kvm("long_mode_accesses") else { return };
    let mut m = machine(&kvm, with(Irqchip::Off));
    let mut state = long_mode(&m.board);
    state.gpr[0] = 0x1122_3344_5566_7788;
    state.gpr[7] = DEVICE;
    state.gpr[8] = DEVICE + 0x100;
    state.gpr[2] = 0xc010;
    let code = code(&[
        &[0x48, 0x89, 0x07],                         // 1000 mov [rdi], rax
        &[0x41, 0x89, 0x40, 0x08],                   // 1003 mov [r8+8], eax
        &[0x48, 0x8b, 0x0f],                         // 1007 mov rcx, [rdi]
        &[0x48, 0x87, 0x47, 0x10],                   // 100a xchg [rdi+16], rax
        &[0xef],                                     // 100e out dx, eax
        &[0xc7, 0x47, 0x20, 0x78, 0x56, 0x34, 0x12], // 100f mov dword [rdi+32], 0x12345678
        &[0xf4],                                     // 1016 hlt
    ]);
    m.start(&code, &state);
    match m.run() {
        Exit::Halted => {}
        other => panic!("{other:?}"),
    }
    let entry = |exit, addr, size, value, rip| Entry { exit, addr, size, value, rip, count: 0 };
    let want = [
        entry(MmioWrite, DEVICE, 8, 0x1122_3344_5566_7788, 0x1000),
        entry(MmioWrite, DEVICE + 0x108, 4, 0x5566_7788, 0x1003),
        entry(MmioRead, DEVICE, 8, answer(DEVICE, 8), 0x1007),
        entry(MmioRead, DEVICE + 16, 8, answer(DEVICE + 16, 8), 0x100a),
        entry(MmioWrite, DEVICE + 16, 8, 0x1122_3344_5566_7788, 0x100a),
        entry(PioOut, 0xc010, 4, answer(DEVICE + 16, 4), 0x100e),
        entry(MmioWrite, DEVICE + 32, 4, 0x1234_5678, 0x100f),
    ];
    let log = m.board.take_log();
    for (got, want) in log.iter().zip(&want) {
        assert_eq!(got, want);
    }
    assert_eq!(log.len(), want.len(), "{log:?}");
    let state = m.vcpu.fetch(0).unwrap();
    assert_eq!((state.gpr[1], state.gpr[0]), (answer(DEVICE, 8), answer(DEVICE + 16, 8)));
}

#[test]
fn a_kick_from_another_thread_stops_a_busy_guest() {
    let Some(kvm) = kvm("a_kick_from_another_thread_stops_a_busy_guest") else { return };
    for irqchip in [Irqchip::Off, Irqchip::Split] {
        let mut m = machine(&kvm, with(irqchip));
        // inc eax; jmp
        let state = long_mode(&m.board);
        m.start(&[0xff, 0xc0, 0xeb, 0xfc], &state);
        let handle = m.vcpu.kick_handle();
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                handle.kick();
            });
            assert!(matches!(m.vcpu.run(&mut m.env), Exit::Kicked));
        });
        assert!(start.elapsed() >= Duration::from_millis(90));
        // A kick before the run isn't lost; nor is one by the signals word.
        handle.kick();
        assert!(matches!(m.run(), Exit::Kicked));
        m.env.signals.raise(Signals::KICK);
        handle.notify();
        assert!(matches!(m.run(), Exit::Kicked));
        assert_eq!(m.env.signals.pending(), 0);
        let state = m.vcpu.fetch(0).unwrap();
        assert!(state.gpr[0] > 0 && (0x1000..0x1004).contains(&state.rip), "{:#x}", state.rip);
    }
}

#[test]
fn kicks_are_never_lost() {
    let Some(kvm) = kvm("kicks_are_never_lost") else { return };
    let mut m = machine(&kvm, with(Irqchip::Off));
    let state = real_mode();
    // out 0x80, al; jmp
    m.start(&[0xe6, 0x80, 0xeb, 0xfc], &state);
    let handle = m.vcpu.kick_handle();
    let (ask, wait) = std::sync::mpsc::channel::<u64>();
    std::thread::scope(|scope| {
        let kicker = scope.spawn(move || {
            for pause in wait {
                // At all distances from the vCPU's entry.
                std::thread::sleep(Duration::from_micros(pause));
                handle.kick();
            }
        });
        for n in 0..2000 {
            ask.send(n % 50).unwrap();
            assert!(matches!(m.vcpu.run(&mut m.env), Exit::Kicked), "kick {n}");
            if n % 100 == 0 {
                m.board.take_log();
            }
        }
        drop(ask);
        kicker.join().unwrap();
    });
    // The port's access is complete whenever the vCPU stands still: the pointer is at one of the two instructions.
    let state = m.vcpu.fetch(0).unwrap();
    assert!([0x1000, 0x1002].contains(&state.rip), "{:#x}", state.rip);
}

#[test]
fn interrupts_of_our_own_controllers() {
    let Some(kvm) = kvm("interrupts_of_our_own_controllers") else { return };
    for irqchip in [Irqchip::Off, Irqchip::Split] {
        let mut m = machine(&kvm, with(irqchip));
        // Vector 0x20 of the real-mode table: out 0x42, al; iret
        m.board.ram.write(0x80, &[0x00, 0x20, 0x00, 0x00]).unwrap();
        m.board.ram.write(0x2000, &[0xe6, 0x42, 0xcf]).unwrap();
        let code = code(&[
            &[0xfa],       // 1000 cli
            &[0xe6, 0x10], // 1001 out 0x10, al
            &[0xfb],       // 1003 sti
            &[0x90],       // 1004 nop
            &[0xe6, 0x11], // 1005 out 0x11, al
            &[0xf4],       // 1007 hlt
            &[0xe6, 0x12], // 1008 out 0x12, al
            &[0xeb, 0xfe], // 100a jmp $
        ]);
        m.env.interrupt(0x20);
        m.start(&code, &real_mode());
        if irqchip == Irqchip::Split {
            // LINT0 as ExtINT, the APIC enabled: who takes interrupts of the 8259.
            let mut page = m.vcpu.lapic().unwrap();
            page.set_register(0xf, 0x1ff);
            page.set_register(0x35, 0x700);
            m.vcpu.set_lapic(&page).unwrap();
        }
        let board_log = m.board.log.clone();
        let handle = m.vcpu.kick_handle();
        let signals = m.env.signals.clone();
        // Until the guest waits in HLT: then a second interrupt.
        match irqchip {
            Irqchip::Off => {
                assert!(matches!(m.run(), Exit::Halted));
                m.env.interrupt(0x20);
            }
            _ => {
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let start = Instant::now();
                        while board_log.lock().unwrap().len() < 3 && start.elapsed() < Duration::from_secs(10)
                        {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        std::thread::sleep(Duration::from_millis(20));
                        handle.kick();
                    });
                    assert!(matches!(m.vcpu.run(&mut m.env), Exit::Kicked));
                });
                assert_eq!(m.vcpu.fetch(0).unwrap().activity, Activity::Halted);
                m.env.vectors.push(0x20);
                signals.raise(Signals::INTERRUPT);
            }
        }
        let handle = m.vcpu.kick_handle();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let start = Instant::now();
                while board_log.lock().unwrap().len() < 5 && start.elapsed() < Duration::from_secs(10) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                handle.kick();
            });
            assert!(matches!(m.vcpu.run(&mut m.env), Exit::Kicked));
        });
        let log: Vec<_> = m.board.take_log().iter().map(|e| (e.addr, e.rip)).collect();
        // The first interrupt comes behind STI's shadow; a kernel that emulates the guest takes it up to an exit later.
        let early = [(0x10, 0x1001), (0x42, 0x2000), (0x11, 0x1005), (0x42, 0x2000), (0x12, 0x1008)];
        let late = [(0x10, 0x1001), (0x11, 0x1005), (0x42, 0x2000), (0x42, 0x2000), (0x12, 0x1008)];
        assert!(log == early || log == late, "{irqchip:?}: {log:x?}");
    }
}

/// A guest in long mode whose IDT has a handler for vector 0x41: out 0x99, al; write EOI; iretq. Main: sti; hlt; out 0x10; jmp.
fn apic_guest(m: &mut Machine) -> CpuState {
    let mut state = long_mode(&m.board);
    let ram = &m.board.ram;
    // GDT at 0x6000: null, 64-bit code, data.
    for (n, descriptor) in [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
        ram.store(0x6000 + 8 * n as u64, 8, descriptor).unwrap();
    }
    (state.gdtr.base, state.gdtr.limit) = (0x6000, 23);
    // Gate for vector 0x41 at 0x7000: interrupt gate to 0008:0x2000.
    ram.store(0x7000 + 16 * 0x41, 8, 0x0000_8e00_0008_2000).unwrap();
    ram.store(0x7008 + 16 * 0x41, 8, 0).unwrap();
    (state.idtr.base, state.idtr.limit) = (0x7000, 0xfff);
    ram.write(
        0x2000,
        &code(&[
            &[0xe6, 0x99],                                           // out 0x99, al
            &[0xc7, 0x04, 0x25, 0xb0, 0x00, 0xe0, 0x3e, 0, 0, 0, 0], // mov dword [0x3ee000b0], 0
            &[0x48, 0xcf],                                           // iretq
        ]),
    )
    .unwrap();
    // The page table maps 0x3ee00000 to the local APIC at 0xfee00000, uncached.
    ram.store(0x1_2000 + 8 * 0x1f7, 8, 0xfee0_0000 | 0x9b).unwrap();
    ram.write(CODE, &[0xfb, 0xf4, 0xe6, 0x10, 0xeb, 0xfc]).unwrap();
    state.gpr[4] = 0x9000;
    state
}

fn enabled_lapic(vcpu: &KvmVcpu) -> hyaline_kvm::LapicPage {
    let mut page = vcpu.lapic().unwrap();
    page.set_register(0xf, 0x1ff);
    // LINT0 masked: the 8259 has no say.
    page.set_register(0x35, 0x1_0700);
    page
}

fn run_until(m: &mut Machine, done: impl Fn(&[Entry]) -> bool + Send + Sync) -> Exit {
    let log = m.board.log.clone();
    let handle = m.vcpu.kick_handle();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                if done(&log.lock().unwrap()) || start.elapsed() > Duration::from_secs(10) {
                    handle.kick();
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let exit = m.vcpu.run(&mut m.env);
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        exit
    })
}

fn deliver(level: bool) -> ApicMessage {
    ApicMessage::Deliver {
        destination: 0,
        logical: false,
        mode: Delivery::Fixed,
        vector: 0x41,
        level,
        except: None,
    }
}

#[test]
fn messages_and_the_end_of_level_interrupts() {
    let Some(kvm) = kvm("messages_and_the_end_of_level_interrupts") else { return };
    let mut m = machine(&kvm, with(Irqchip::Split));
    let state = apic_guest(&mut m);
    let lapic = enabled_lapic(&m.vcpu);
    m.vcpu.load(&state, Some(&lapic), None).unwrap();
    // Edge: no exit at its end.
    assert!(m.vm.deliver(&deliver(false)).unwrap());
    let exit = run_until(&mut m, |log| log.iter().any(|e| e.addr == 0x10));
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    let log = m.board.take_log();
    assert_eq!((log[0].addr, log[0].rip), (0x99, 0x2000));
    // Level: its end comes out.
    m.vcpu.load(&state, None, None).unwrap();
    assert!(m.vm.deliver(&deliver(true)).unwrap());
    let exit = run_until(&mut m, |_| false);
    assert!(matches!(exit, Exit::ApicEoi { vector: 0x41 }), "{exit:?}");
    let exit = run_until(&mut m, |log| log.iter().any(|e| e.addr == 0x10));
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    // A destination that nobody has.
    let nobody = ApicMessage::Deliver {
        destination: 77,
        logical: false,
        mode: Delivery::Fixed,
        vector: 0x41,
        level: false,
        except: None,
    };
    assert!(!m.vm.deliver(&nobody).unwrap());
    assert!(m.vm.deliver(&ApicMessage::Eoi { vector: 1 }).is_err());
}

fn eventfd() -> OwnedFd {
    // SAFETY: a new descriptor, owned by what is returned.
    #[allow(unsafe_code)]
    unsafe {
        OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
    }
}

#[test]
fn an_eventfd_raises_an_interrupt() {
    let Some(kvm) = kvm("an_eventfd_raises_an_interrupt") else { return };
    let mut m = machine(&kvm, with(Irqchip::Split));
    let state = apic_guest(&mut m);
    let lapic = enabled_lapic(&m.vcpu);
    m.vcpu.load(&state, Some(&lapic), None).unwrap();
    let gsi = m.vm.add_msi_route(Msi { address: 0xfee0_0000, data: 0x77 }).unwrap();
    assert_eq!(gsi, Gsi(24));
    m.vm.update_msi_route(gsi, Msi { address: 0xfee0_0000, data: 0x41 }).unwrap();
    let fd = eventfd();
    m.vm.bind_irqfd(gsi, &fd, None).unwrap();
    std::io::Write::write_all(&mut std::fs::File::from(fd.try_clone().unwrap()), &1u64.to_ne_bytes())
        .unwrap();
    let exit = run_until(&mut m, |log| log.iter().any(|e| e.addr == 0x10));
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    assert_eq!(m.board.take_log()[0].addr, 0x99);
    m.vm.unbind_irqfd(gsi, &fd).unwrap();
    m.vm.free_route(gsi).unwrap();
    assert!(m.vm.free_route(gsi).is_err());
    assert_eq!(m.vm.add_msi_route(Msi { address: 0xfee0_0000, data: 0x41 }).unwrap(), gsi, "reused");
}

#[test]
fn all_controllers_in_the_kernel() {
    let Some(kvm) = kvm("all_controllers_in_the_kernel") else { return };
    let mut m = machine(&kvm, with(Irqchip::On));
    let state = apic_guest(&mut m);
    // The page table maps 0x3ec00000 to the I/O APIC at 0xfec00000.
    m.board.ram.store(0x1_2000 + 8 * 0x1f6, 8, 0xfec0_0000 | 0x9b).unwrap();
    let write = |register: u8, value: u8| {
        [
            [0xc7, 0x04, 0x25, 0x00, 0x00, 0xc0, 0x3e, register, 0, 0, 0],
            [0xc7, 0x04, 0x25, 0x10, 0x00, 0xc0, 0x3e, value, 0, 0, 0],
        ]
        .concat()
    };
    // Pin 2 (the 8254's line 0): vector 0x41, edge, to APIC 0. Then sti; out 0x11; hlt; out 0x10; jmp $.
    let code =
        code(&[&write(0x15, 0), &write(0x14, 0x41), &[0xfb, 0xe6, 0x11, 0xf4, 0xe6, 0x10, 0xeb, 0xfe]]);
    m.board.ram.write(CODE, &code).unwrap();
    let lapic = enabled_lapic(&m.vcpu);
    m.vcpu.load(&state, Some(&lapic), None).unwrap();
    let exit = run_until(&mut m, |log| !log.is_empty());
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    m.vm.set_line(Gsi(0), true).unwrap();
    m.vm.set_line(Gsi(0), false).unwrap();
    let exit = run_until(&mut m, |log| log.len() >= 3);
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    // The I/O APIC's own registers stay in the kernel.
    let ports: Vec<_> = m.board.take_log().iter().map(|e| e.addr).collect();
    assert_eq!(ports, [0x11, 0x99, 0x10]);
}

#[test]
fn the_8259_in_the_kernel() {
    let Some(kvm) = kvm("the_8259_in_the_kernel") else { return };
    let mut m = machine(&kvm, with(Irqchip::On));
    // Vector 0x24 (master line 4): out 0x99, al; iret. (Ports 0x40 to 0x43 are the 8254 in the kernel.)
    m.board.ram.write(0x24 * 4, &[0x00, 0x20, 0x00, 0x00]).unwrap();
    m.board.ram.write(0x2000, &[0xe6, 0x99, 0xcf]).unwrap();
    let code = code(&[
        &[0xb0, 0x11, 0xe6, 0x20], // ICW1
        &[0xb0, 0x20, 0xe6, 0x21], // ICW2: vectors from 0x20
        &[0xb0, 0x04, 0xe6, 0x21], // ICW3
        &[0xb0, 0x01, 0xe6, 0x21], // ICW4
        &[0xb0, 0xef, 0xe6, 0x21], // only line 4
        &[0xe6, 0x10],
        &[0xfb, 0xf4], // sti; hlt
        &[0xe6, 0x12],
        &[0xeb, 0xfe],
    ]);
    m.start(&code, &real_mode());
    let exit = run_until(&mut m, |log| !log.is_empty());
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    m.vm.set_line(Gsi(4), true).unwrap();
    m.vm.set_line(Gsi(4), false).unwrap();
    let exit = run_until(&mut m, |log| log.len() >= 3);
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    let log: Vec<_> = m.board.take_log().iter().map(|e| e.addr).collect();
    assert_eq!(log, [0x10, 0x99, 0x12]);
}

#[test]
fn without_a_local_apic_in_the_kernel_interrupts_are_refused_in_words() {
    let Some(kvm) = kvm("without_a_local_apic_in_the_kernel_interrupts_are_refused_in_words") else { return };
    let vm = KvmVm::new(&kvm, with(Irqchip::Off)).unwrap();
    let error = vm.deliver(&deliver(false)).unwrap_err().to_string();
    assert!(error.contains("kernel-irqchip=off") && error.contains("kernel-irqchip=split"), "{error}");
    let error = vm.set_line(Gsi(1), true).unwrap_err().to_string();
    assert!(error.starts_with("interrupt line 1 can't be driven in the kernel"), "{error}");
}

#[test]
fn the_whole_state_there_and_back() {
    let Some(kvm) = kvm("the_whole_state_there_and_back") else { return };
    for irqchip in [Irqchip::Off, Irqchip::Split] {
        let mut m = machine(&kvm, with(irqchip));
        let mut state = long_mode(&m.board);
        for (n, gpr) in state.gpr.iter_mut().enumerate() {
            *gpr = 0x1111_1111_1111_1111 * n as u64;
        }
        state.rip = 0xffff_8000_0000_1234;
        state.rflags = 0x246;
        state.cr2 = 0x7fff_1234;
        state.cr4 |= 0x600;
        (state.seg[4].base, state.seg[5].base) = (0xffff_8800_0000_0000, 0x1234_5678_9abc);
        (state.gdtr.base, state.gdtr.limit) = (0x6000, 0x7f);
        (state.tr.base, state.tr.limit, state.tr.selector) = (0x6800, 0x67, 0x28);
        state.dr = [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xffff_0ff0, 0x400];
        state.mxcsr = 0x1fa0;
        for (n, vector) in state.vec.iter_mut().take(16).enumerate() {
            vector.0[0] = n as u64 | 0xaaaa_0000;
            vector.0[1] = n as u64 | 0xbbbb_0000_0000;
        }
        state.x87.fsw = 3 << 11;
        state.x87.ftw = 0b0000_1000;
        state.x87.significand[3] = 0xc000_0000_0000_0000;
        state.x87.exponent[3] = 0x4000;
        state.msr.star = 0x0023_0010_0000_0000;
        state.msr.lstar = 0xffff_8000_0000_5678;
        state.msr.sfmask = 0x4_7700;
        state.msr.kernel_gs_base = 0xffff_9000_0000_0000;
        state.msr.sysenter_cs = 0x10;
        state.msr.sysenter_esp = 0x7777;
        state.msr.sysenter_eip = 0x8888;
        state.msr.pat = 0x0007_0406_0007_0401;
        state.msr.mtrr_def_type = 0xc06;
        state.msr.mtrr_fixed[0] = 0x0606_0606_0606_0606;
        state.msr.mtrr_var[2] = [0xe000_0000, 0xf_f000_0800];
        state.nmi_pending = true;
        state.nmi_blocked = true;
        state.injected = Some(Injected { vector: 14, kind: EventKind::Exception, error: Some(2) });
        state.icount = 12345;
        if irqchip == Irqchip::Split {
            state.activity = Activity::Halted;
        }
        m.vcpu.load(&state, None, Some(1_000_000)).unwrap();
        let mut skipped = m.vcpu.take_skipped();
        let mut back = m.vcpu.fetch(1_000_000).unwrap();
        skipped.extend(m.vcpu.take_skipped());
        println!("skipped: {skipped:#?}");
        // The counter runs on from where it was: less than ten seconds. A kernel that can't do that is told of.
        let told = skipped.iter().any(|s| s.0.contains("time-stamp counter"));
        assert_eq!(back.tsc_offset > 100_000_000_000, told, "{:#x}", back.tsc_offset);
        back.tsc_offset = 0;
        // What this model's machine-check banks and read-only registers hold is the kernel's.
        let mut want = state.clone();
        want.msr.mc_banks = back.msr.mc_banks.clone();
        for (name, got, want) in [
            ("misc_enable", &mut back.msr.misc_enable, want.msr.misc_enable),
            ("mcg_ctl", &mut back.msr.mcg_ctl, want.msr.mcg_ctl),
            ("tsc_adjust", &mut back.msr.tsc_adjust, want.msr.tsc_adjust),
            ("bios_sign_id", &mut back.msr.bios_sign_id, want.msr.bios_sign_id),
        ] {
            println!("{name}: {got:#x}, asked for {want:#x}");
            *got = want;
        }
        assert_eq!(format!("{:#x?}", back), format!("{want:#x?}"), "{irqchip:?}");
        // And once more through the vCPU: nothing drifts.
        m.vcpu.load(&back, None, None).unwrap();
        let again = m.vcpu.fetch(0).unwrap();
        assert_eq!(again.gpr, state.gpr);
        assert_eq!(again.injected, state.injected);
    }
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    let Some(kvm) = kvm("a_saved_guest_goes_on_in_another_machine") else { return };
    let mut m = machine(&kvm, with(Irqchip::Off));
    let state = long_mode(&m.board);
    // inc ebx; mov eax, ebx; out 0x10, eax; jmp
    m.start(&[0xff, 0xc3, 0x89, 0xd8, 0xe7, 0x10, 0xeb, 0xf8], &state);
    let exit = run_until(&mut m, |log| log.len() >= 10);
    assert!(matches!(exit, Exit::Kicked));
    let saved = m.vcpu.fetch(0).unwrap();
    let last = m.board.take_log().last().unwrap().value;
    let mut memory = vec![0; 0x20_0000];
    m.board.ram.read(0, &mut memory).unwrap();
    drop(m);
    let mut m = machine(&kvm, with(Irqchip::Split));
    m.board.ram.write(0, &memory).unwrap();
    m.vcpu.load(&saved, None, None).unwrap();
    let exit = run_until(&mut m, |log| log.len() >= 10);
    assert!(matches!(exit, Exit::Kicked));
    let log = m.board.take_log();
    assert_eq!(log[0].value, last + 1);
    assert!(log.windows(2).all(|w| w[1].value == w[0].value + 1));
}

#[test]
fn init_and_start_up_without_a_local_apic_in_the_kernel() {
    let Some(kvm) = kvm("init_and_start_up_without_a_local_apic_in_the_kernel") else { return };
    let board = Board::new();
    let vm = KvmVm::new(&kvm, VmOptions { vcpus: 2, ..with(Irqchip::Off) }).unwrap();
    vm.attach(&board.memory, &board.ports).unwrap();
    let mut vcpu = KvmVcpu::new(&vm, 1, &model(&kvm, &vm)).unwrap();
    let mut env = board.env(1);
    assert!(matches!(vcpu.run(&mut env), Exit::WaitForSipi));
    env.signals.raise_sipi(0x08);
    board.ram.write(0x8000, &[0x0e, 0x58, 0xe7, 0x20, 0xf4]).unwrap(); // push cs; pop ax; out 0x20, ax; hlt
    assert!(matches!(vcpu.run(&mut env), Exit::Halted));
    let log = board.take_log();
    assert_eq!((log[0].value, log[0].rip), (0x0800, 2));
    env.signals.raise(Signals::INIT);
    assert!(matches!(vcpu.run(&mut env), Exit::WaitForSipi));
    assert_eq!(vcpu.fetch(0).unwrap().rip, 0xfff0);
    assert_eq!(vcpu.fetch(0).unwrap().shadow, Shadow::None);
}

#[test]
fn start_up_by_the_local_apic_in_the_kernel() {
    let Some(kvm) = kvm("start_up_by_the_local_apic_in_the_kernel") else { return };
    let board = Board::new();
    let vm = KvmVm::new(&kvm, VmOptions { vcpus: 2, ..with(Irqchip::Split) }).unwrap();
    vm.attach(&board.memory, &board.ports).unwrap();
    let leaves = model(&kvm, &vm);
    let mut first = KvmVcpu::new(&vm, 0, &leaves).unwrap();
    let mut second = KvmVcpu::new(&vm, 1, &leaves).unwrap();
    assert_eq!(second.fetch(0).unwrap().activity, Activity::WaitForSipi);
    // CPUID tells each its own number.
    for (n, vcpu) in [(0, &first), (1, &second)] {
        let leaf = vcpu.cpuid().iter().find(|l| l.leaf == 1).unwrap();
        assert_eq!(leaf.ebx >> 24, n);
    }
    // The second one's start: out 0x21, al; cli; hlt.
    board.ram.write(0x8000, &[0xe6, 0x21, 0xfa, 0xf4]).unwrap();
    // mov dword [APIC+0x310], 1 << 24; mov dword [APIC+0x300], INIT; then SIPI with vector 8; jmp $
    let icr = |low: u32| [&[0xc7, 0x04, 0x25, 0x00, 0x03, 0xe0, 0x3e][..], &low.to_le_bytes()].concat();
    let code = code(&[
        &[0xc7, 0x04, 0x25, 0x10, 0x03, 0xe0, 0x3e, 0, 0, 0, 1],
        &icr(0x4500),
        &icr(0x4608),
        &[0xeb, 0xfe],
    ]);
    let state = long_mode(&board);
    board.ram.store(0x1_2000 + 8 * 0x1f7, 8, 0xfee0_0000 | 0x9b).unwrap();
    board.ram.write(CODE, &code).unwrap();
    let lapic = enabled_lapic(&first);
    first.load(&state, Some(&lapic), None).unwrap();
    let (a, b) = (first.kick_handle(), second.kick_handle());
    let (mut env0, mut env1) = (board.env(0), board.env(1));
    let log = board.log.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(matches!(first.run(&mut env0), Exit::Kicked)));
        scope.spawn(|| assert!(matches!(second.run(&mut env1), Exit::Kicked)));
        let start = Instant::now();
        while log.lock().unwrap().is_empty() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        a.kick();
        b.kick();
    });
    let log = board.take_log();
    assert_eq!(log.len(), 1);
    assert_eq!((log[0].addr, log[0].rip), (0x21, 0));
}
