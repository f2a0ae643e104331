//! Known answers; the comparison with the host, case by case, is crates/x86-difftest's.

use crate::state::CpuState;
use crate::testing::long_mode_cpu;
use crate::{Cpu, Exit};
use hyaline_ram::RamBlock;
use std::sync::Arc;

/// Runs `count` instructions of `code` at 0x1000 after `set`.
fn run(code: &[u8], count: u64, set: impl FnOnce(&mut CpuState, &RamBlock)) -> (Cpu, Arc<RamBlock>) {
    let (mut cpu, ram) = long_mode_cpu(4 << 20);
    ram.write(0x1000, code).unwrap();
    set(&mut cpu.state, &ram);
    assert_eq!(cpu.run(count), Exit::Budget);
    assert_eq!(cpu.state.rip, 0x1000 + code.len() as u64, "every instruction was executed");
    (cpu, ram)
}

#[test]
fn packed_floats_add() {
    // addps xmm9, [rbx]
    let (cpu, _) = run(&[0x44, 0x0f, 0x58, 0x0b], 1, |s, ram| {
        s.gpr[3] = 0x2000;
        s.vec[9].0[0] = u64::from(1.5_f32.to_bits()) | u64::from(f32::MAX.to_bits()) << 32;
        s.vec[9].0[3] = 0x1234;
        ram.store_u64(0x2000, u64::from(0.25_f32.to_bits()) | u64::from(f32::MAX.to_bits()) << 32);
    });
    assert_eq!(
        cpu.state.vec[9].0[0],
        u64::from(1.75_f32.to_bits()) | u64::from(f32::INFINITY.to_bits()) << 32
    );
    assert_eq!(cpu.state.vec[9].0[3], 0x1234, "legacy instructions keep the upper half");
    assert_eq!(cpu.state.mxcsr, 0x1f80 | 0x28, "overflow and precision");
}

#[test]
fn avx_clears_what_is_above() {
    // vpaddd xmm1, xmm2, xmm10
    let (cpu, _) = run(&[0xc4, 0xc1, 0x69, 0xfe, 0xca], 1, |s, _| {
        s.vec[1].0 = [!0; 8];
        s.vec[2].0[0] = 0x1_0000_0002;
        s.vec[10].0[0] = 0xffff_ffff_0000_0003;
    });
    assert_eq!(cpu.state.vec[1].0, [5, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn comparison_sets_flags_and_general_registers_are_reached() {
    // comisd xmm0, xmm1; movmskpd r13d, xmm1; cvttsd2si r9, xmm1
    let code = [0x66, 0x0f, 0x2f, 0xc1, 0x66, 0x44, 0x0f, 0x50, 0xe9, 0xf2, 0x4c, 0x0f, 0x2c, 0xc9];
    let (cpu, _) = run(&code, 3, |s, _| {
        s.rflags |= 0x8d4;
        s.vec[0].0[0] = (-3.0_f64).to_bits();
        s.vec[1].0[0] = (-2.0_f64).to_bits();
        s.gpr[13] = !0;
    });
    assert_eq!(cpu.state.rflags & 0x8d5, 1, "less: carry");
    assert_eq!(cpu.state.gpr[13], 1);
    assert_eq!(cpu.state.gpr[9] as i64, -2);
}

#[test]
fn x87_computes_and_keeps_its_stack() {
    // fld qword [rbx]; fldpi; fmulp; fstp tbyte [rbx + 16]
    let (cpu, ram) = run(&[0xdd, 0x03, 0xd9, 0xeb, 0xde, 0xc9, 0xdb, 0x7b, 0x10], 4, |s, ram| {
        s.x87 = Default::default();
        s.gpr[3] = 0x2000;
        ram.store_u64(0x2000, 2.0_f64.to_bits());
    });
    assert_eq!((cpu.state.x87.ftw, cpu.state.x87.fsw & 0x3800), (0, 0));
    assert_eq!(ram.load_u64(0x2010), Some(0xc90f_daa2_2168_c235));
    assert_eq!(ram.load_u16(0x2018), Some(0x4001));
    assert_eq!(cpu.state.x87.fip, 0x1006);
}

#[test]
fn mmx_lives_in_the_x87_registers() {
    // movq mm3, [rbx]; paddb mm3, mm3
    let (cpu, _) = run(&[0x0f, 0x6f, 0x1b, 0x0f, 0xfc, 0xdb], 2, |s, ram| {
        s.x87.fsw = 0x3000;
        s.x87.ftw = 0;
        s.gpr[3] = 0x2000;
        ram.store_u64(0x2000, 0x0102_8003_0405_0607);
    });
    assert_eq!(cpu.state.x87.significand[3], 0x0204_0006_080a_0c0e);
    assert_eq!(cpu.state.x87.exponent[3], 0xffff);
    assert_eq!((cpu.state.x87.ftw, cpu.state.x87.fsw), (0xff, 0));
}

#[test]
fn fxsave_and_fxrstor_round_trip() {
    // fxsave64 [rbx]; fxrstor64 [rbx]
    let mut expected = None;
    let (cpu, _) = run(&[0x48, 0x0f, 0xae, 0x03, 0x48, 0x0f, 0xae, 0x0b], 2, |s, _| {
        s.gpr[3] = 0x2000;
        s.mxcsr = 0x9fa3;
        for (n, v) in s.vec.iter_mut().enumerate().take(16) {
            v.0[0] = n as u64 * 0x0101;
            v.0[1] = !(n as u64);
        }
        s.x87 = crate::state::X87 {
            significand: [1, 2, 3, 4, 5, 6, 7, 8],
            exponent: [9, 10, 11, 12, 13, 14, 15, 16],
            fcw: 0x27f,
            fsw: 0x2800,
            ftw: 0x5a,
            fop: 0x123,
            fip: 0x1234_5678_9abc,
            fdp: 0xfedc_ba98,
            fcs: 0,
            fds: 0,
        };
        expected = Some((s.x87, s.vec, s.mxcsr));
    });
    assert_eq!(expected, Some((cpu.state.x87, cpu.state.vec, cpu.state.mxcsr)));
}

/// Instructions that leave MXCSR and the x87 state in the host's registers, and those that look at them or change them: one run of all
/// of them must give what single runs of each give, which put the state back every time.
#[test]
fn state_in_the_hosts_registers_is_the_guests() {
    // All memory operands are at rbx (0x2000-) and small displacements.
    let codes: &[&[u8]] = &[
        &[0xd9, 0x03],                            // fld dword [rbx]
        &[0xdd, 0x43, 0x08],                      // fld qword [rbx+8]
        &[0xdb, 0x6b, 0x10],                      // fld tbyte [rbx+16]
        &[0xdb, 0x7b, 0x30],                      // fstp tbyte [rbx+48]
        &[0xdd, 0x53, 0x40],                      // fst qword [rbx+64]
        &[0xdf, 0x7b, 0x48],                      // fistp qword [rbx+72]
        &[0xde, 0xc1],                            // faddp
        &[0xd8, 0xf1],                            // fdiv st0, st1
        &[0xd9, 0xfa],                            // fsqrt
        &[0xd9, 0xeb],                            // fldpi
        &[0xd9, 0xee],                            // fldz
        &[0xd9, 0xc9],                            // fxch
        &[0xd9, 0xf7],                            // fincstp
        &[0xdd, 0xc2],                            // ffree st2
        &[0xdb, 0xf1],                            // fcomi st0, st1
        &[0xda, 0xc9],                            // fcmove st0, st1
        &[0xdf, 0xe0],                            // fnstsw ax
        &[0xdd, 0x7b, 0x50],                      // fnstsw [rbx+80]
        &[0xd9, 0x7b, 0x52],                      // fnstcw [rbx+82]
        &[0xd9, 0x6b, 0x54],                      // fldcw [rbx+84]: all masked, truncates
        &[0xd9, 0x6b, 0x56],                      // fldcw [rbx+86]: #Z unmasked
        &[0xd9, 0x6b, 0x58],                      // fldcw [rbx+88]: the default
        &[0xdb, 0xe2],                            // fnclex
        &[0xdb, 0xe3],                            // fninit
        &[0xd9, 0x73, 0x60],                      // fnstenv [rbx+96]
        &[0xdd, 0xb3, 0, 1, 0, 0],                // fnsave [rbx+256]
        &[0xdd, 0xa3, 0, 1, 0, 0],                // frstor [rbx+256]
        &[0x0f, 0xae, 0x83, 0, 2, 0, 0],          // fxsave [rbx+512]
        &[0x0f, 0xae, 0x8b, 0, 2, 0, 0],          // fxrstor [rbx+512]
        &[0x0f, 0xfc, 0xca],                      // paddb mm1, mm2
        &[0x0f, 0x6f, 0x1b],                      // movq mm3, [rbx]
        &[0x0f, 0x77],                            // emms
        &[0x0f, 0xae, 0x5b, 0x5c],                // stmxcsr [rbx+92]
        &[0x0f, 0xae, 0x93, 0xc0, 0, 0, 0],       // ldmxcsr [rbx+192]: the default
        &[0x0f, 0xae, 0x93, 0xc4, 0, 0, 0],       // ldmxcsr [rbx+196]: rounds up, flushes
        &[0xf2, 0x0f, 0x58, 0xc1],                // addsd xmm0, xmm1
        &[0xf2, 0x0f, 0x5e, 0x43, 0x08],          // divsd xmm0, [rbx+8]
        &[0x0f, 0x59, 0x8b, 0x80, 0, 0, 0],       // mulps xmm1, [rbx+128]
        &[0x66, 0x0f, 0x2e, 0xc1],                // ucomisd xmm0, xmm1
        &[0xf2, 0x0f, 0x2c, 0xd0],                // cvttsd2si edx, xmm0
        &[0xf2, 0x0f, 0x2a, 0xc8],                // cvtsi2sd xmm1, eax
        &[0x0f, 0x11, 0x83, 0x90, 0, 0, 0],       // movups [rbx+144], xmm0
        &[0x66, 0x0f, 0x6f, 0x8b, 0x80, 0, 0, 0], // movdqa xmm1, [rbx+128]
        &[0x0f, 0x31],                            // rdtsc
    ];
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..300 {
        let picks: Vec<&[u8]> = (0..40).map(|_| codes[(next() >> 8) as usize % codes.len()]).collect();
        let mut machines = [long_mode_cpu(4 << 20), long_mode_cpu(4 << 20)];
        let data: Vec<u64> = (0..32).map(|_| next()).collect();
        for (cpu, ram) in &mut machines {
            ram.write(0x1000, &picks.concat()).unwrap();
            for (n, v) in data.iter().enumerate() {
                ram.store_u64(0x2000 + n as u64 * 8, *v);
            }
            ram.store_u64(0x2008, 2.5_f64.to_bits());
            for (at, v) in [(0x2054, 0xf7f_u16), (0x2056, 0x37b), (0x2058, 0x37f)] {
                ram.store_u16(at, v);
            }
            ram.store_u32(0x20c0, 0x1f80);
            ram.store_u32(0x20c4, 0xdf80);
            cpu.state.gpr[3] = 0x2000;
            cpu.state.vec[1].0[0] = 1e-300_f64.to_bits();
        }
        let [(whole, whole_ram), (single, single_ram)] = &mut machines;
        // Without an interrupt table an exception ends the run; the state is what it was before the instruction then.
        let end = whole.run(40);
        let mut last = Exit::Budget;
        for _ in 0..40 {
            last = single.step();
            if last != Exit::Budget {
                break;
            }
        }
        assert_eq!(end, last, "{picks:02x?}");
        assert_eq!(whole.state, single.state, "{picks:02x?}");
        let (mut a, mut b) = ([0; 0x400], [0; 0x400]);
        whole_ram.read(0x2000, &mut a).unwrap();
        single_ram.read(0x2000, &mut b).unwrap();
        assert_eq!(a, b, "{picks:02x?}");
        assert!(!whole.mxcsr_live && !whole.x87_live);
    }
}
