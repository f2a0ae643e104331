use super::lockstep::Lockstep;

fn lockstep(bits: u32, seeds: std::ops::Range<u64>) {
    let mut l = Lockstep::new(bits).unwrap();
    let mut done = 0;
    for seed in seeds {
        match l.case(seed) {
            Ok(n) => done += n,
            Err(text) => panic!("{text}"),
        }
    }
    let stats = l.stats();
    assert!(stats.units > 100 && done > 1000, "{done} instructions, {stats:?}");
}

#[test]
fn random_code_64() {
    lockstep(64, 1..4000);
}

#[test]
fn random_code_32() {
    lockstep(32, 1..4000);
}

/// Host instructions and bytes emitted for fixed guest blocks: a change that makes translations longer shows here.
#[test]
fn emitted_instructions() {
    let blocks: &[(&str, &[u8], usize)] = &[
        ("add rax, rbx", &[0x48, 0x01, 0xd8], GOLDEN[0]),
        ("mov rax, [rbx+8]", &[0x48, 0x8b, 0x43, 0x08], GOLDEN[1]),
        ("mov [rbx+8], rax", &[0x48, 0x89, 0x43, 0x08], GOLDEN[2]),
        ("push rbp", &[0x55], GOLDEN[3]),
        ("pop rbp", &[0x5d], GOLDEN[4]),
        ("add r10, r11", &[0x4d, 0x01, 0xda], GOLDEN[5]),
        ("cmp rax, rbx; mov rax, [rbx]", &[0x48, 0x39, 0xd8, 0x48, 0x8b, 0x03], GOLDEN[6]),
        ("mulsd xmm0, xmm1", &[0xf2, 0x0f, 0x59, 0xc1], GOLDEN[7]),
        ("movaps xmm0, [rax]", &[0x0f, 0x28, 0x00], GOLDEN[8]),
        ("lock inc dword [rax]", &[0xf0, 0xff, 0x00], GOLDEN[9]),
        ("lea rax, [r10+r11*4+16]", &[0x4b, 0x8d, 0x44, 0x9a, 0x10], GOLDEN[10]),
        ("faddp", &[0xde, 0xc1], GOLDEN[11]),
        ("fld qword [rbx]", &[0xdd, 0x03], GOLDEN[12]),
        ("paddb mm0, mm1", &[0x0f, 0xfc, 0xc1], GOLDEN[13]),
    ];
    // An empty unit: a NOP.
    let empty = super::emitted(&[0x90]);
    let counts: Vec<(&str, usize)> =
        blocks.iter().map(|(name, code, _)| (*name, super::emitted(code) - empty)).collect();
    let wanted: Vec<(&str, usize)> = blocks.iter().map(|(name, _, n)| (*name, *n)).collect();
    assert_eq!(counts, wanted);
}

/// See `emitted_instructions`; the out-of-line part of accesses counts too.
const GOLDEN: [usize; 14] = [8, 11, 11, 12, 12, 9, 17, 5, 15, 23, 3, 8, 21, 11];
