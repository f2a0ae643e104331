//! Measures what vector and x87 instructions cost on the interpreter: `cargo run --release -p hyaline-x86 --example vector`.
//! Each line is a loop of sixteen copies of one instruction; the loop's own instructions are taken off.

use hyaline_x86::Exit;
use hyaline_x86::testing::long_mode_cpu;

/// Processor time of this thread, ns: other load counts less than by the wall clock.
fn now() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as f64 * 1e9 + t.tv_nsec as f64
}

/// Name and encoding; memory operands are at `[rbx]`.
const CODE: &[(&str, &[u8])] = &[
    ("nop", &[0x90]),
    ("mov rax, [rbx]", &[0x48, 0x8b, 0x03]),
    ("mov [rbx], rax", &[0x48, 0x89, 0x03]),
    ("movaps xmm1, xmm2", &[0x0f, 0x28, 0xca]),
    ("movups xmm1, [rbx]", &[0x0f, 0x10, 0x0b]),
    ("movups [rbx], xmm1", &[0x0f, 0x11, 0x0b]),
    ("movd xmm1, eax", &[0x66, 0x0f, 0x6e, 0xc8]),
    ("pxor xmm1, xmm1", &[0x66, 0x0f, 0xef, 0xc9]),
    ("paddd xmm1, xmm2", &[0x66, 0x0f, 0xfe, 0xca]),
    ("paddd xmm1, [rbx]", &[0x66, 0x0f, 0xfe, 0x0b]),
    ("pmovmskb eax, xmm1", &[0x66, 0x0f, 0xd7, 0xc1]),
    ("aesenc xmm1, xmm2", &[0x66, 0x0f, 0x38, 0xdc, 0xca]),
    ("ptest xmm1, xmm2", &[0x66, 0x0f, 0x38, 0x17, 0xca]),
    ("addsd xmm1, xmm2", &[0xf2, 0x0f, 0x58, 0xca]),
    ("mulsd xmm1, [rbx]", &[0xf2, 0x0f, 0x59, 0x0b]),
    ("comisd xmm1, xmm2", &[0x66, 0x0f, 0x2f, 0xca]),
    ("vpaddd ymm1, ymm2, ymm3", &[0xc5, 0xed, 0xfe, 0xcb]),
    ("vmovdqu ymm1, [rbx]", &[0xc5, 0xfe, 0x6f, 0x0b]),
    ("vmovdqu [rbx], ymm1", &[0xc5, 0xfe, 0x7f, 0x0b]),
    ("vfmadd231pd ymm1, ymm2, ymm3", &[0xc4, 0xe2, 0xed, 0xb8, 0xcb]),
    ("vpaddd zmm1, zmm2, zmm3", &[0x62, 0xf1, 0x6d, 0x48, 0xfe, 0xcb]),
    ("paddd mm1, mm2", &[0x0f, 0xfe, 0xca]),
    ("fadd st, st(1)", &[0xd8, 0xc1]),
    ("fmul qword [rbx]", &[0xdc, 0x0b]),
    ("fxch st(1)", &[0xd9, 0xc9]),
    ("fld qword [rbx]; fstp qword [rbx]", &[0xdd, 0x03, 0xdd, 0x1b]),
];

fn main() {
    let mut base = 0.0;
    for (name, code) in CODE {
        let (mut cpu, ram) = long_mode_cpu(4 << 20);
        let mut program = Vec::new();
        (0..16).for_each(|_| program.extend_from_slice(code));
        // dec ecx; jmp to the start: the count of instructions ends the run.
        program.extend([0xff, 0xc9, 0xe9]);
        program.extend((-(program.len() as i32 + 4)).to_le_bytes());
        assert!(ram.write(0x1000, &program).is_ok(), "the program fits");
        cpu.state.gpr[3] = 0x2000;
        cpu.state.x87 = Default::default();
        cpu.state.x87.ftw = 0x0f;
        cpu.state.xcr0 = if hyaline_x86::native::host_features().avx512 { 0xe7 } else { 7 };
        let each = if name.contains(';') { 34 } else { 18 };
        let loops = 200_000_u64;
        assert_eq!(cpu.run(each * 1000), Exit::Budget);
        let mut best = f64::MAX;
        for _ in 0..9 {
            let begin = now();
            assert_eq!(cpu.run(each * loops / 4), Exit::Budget);
            best = best.min((now() - begin) / (loops / 4) as f64);
        }
        if *name == "nop" {
            base = best / 18.0;
        }
        println!("{name:36} {:7.2} ns", (best - 2.0 * base) / (each - 2) as f64);
    }
}
