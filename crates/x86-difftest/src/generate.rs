//! Makes cases: an encoding that the decoder knows (each mnemonic equally often, with random operands and prefixes) or random bytes,
//! and registers such that its memory operand lies in the sandbox, often at a page's end.

use crate::case::{CODE, Case, DATA, PAGE, READ_ONLY, Registers};
use crate::random::Random;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register,
};
use std::collections::BTreeMap;

/// A way to encode: prefix kind, map, opcode and the bits that select an instruction.
#[derive(Clone, Copy, Debug)]
struct Template {
    kind: Kind,
    map: u8,
    prefix: u8,
    opcode: u8,
    reg: u8,
    w: u8,
    l: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Legacy,
    Vex,
    Evex,
}

/// Makes cases from seeds.
pub struct Generator {
    by_mnemonic: Vec<Vec<Template>>,
    only: Option<Mnemonic>,
}

/// Instructions whose outcome isn't a function of the registers and memory that a case sets, or which would leave the sandbox:
/// system calls, segment registers and what depends on descriptors, time, randomness, identification, other threads.
fn excluded(i: &Instruction) -> bool {
    use Mnemonic as M;
    let m = i.mnemonic();
    if matches!(
        m,
        M::Syscall
            | M::Sysenter
            | M::Sysexit
            | M::Sysret
            | M::Sysexitq
            | M::Sysretq
            | M::Int
            | M::Int1
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Retf
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdpru
            | M::Rdrand
            | M::Rdseed
            | M::Rdpid
            | M::Cpuid
            | M::Xgetbv
            | M::Rdpkru
            | M::Wrpkru
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Vmcall
            | M::Vmmcall
            | M::Vmgexit
            | M::Monitor
            | M::Mwait
            | M::Monitorx
            | M::Mwaitx
            | M::Umonitor
            | M::Umwait
            | M::Tpause
            | M::Xbegin
            | M::Xend
            | M::Xabort
            | M::Xtest
            | M::Clzero
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
            | M::Rdsspd
            | M::Rdsspq
            | M::Incsspd
            | M::Incsspq
            | M::Movdir64b
            | M::Movdiri
            | M::Enqcmd
            | M::Enqcmds
            | M::Cldemote
            | M::Clui
            | M::Stui
            | M::Testui
            | M::Senduipi
            | M::Uiret
    ) {
        return true;
    }
    // Far branches and anything that names a segment register.
    if matches!(m, M::Jmp | M::Call)
        && matches!(
            i.code(),
            Code::Jmp_m1616
                | Code::Jmp_m1632
                | Code::Jmp_m1664
                | Code::Call_m1616
                | Code::Call_m1632
                | Code::Call_m1664
        )
    {
        return true;
    }
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register()) {
        return true;
    }
    // FS is the child's thread-local storage.
    matches!(i.segment_prefix(), Register::FS | Register::GS) || i.is_privileged()
}

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::with_ip(64, bytes, 0, DecoderOptions::AMD).decode()
}

impl Generator {
    /// Knows every encoding of instructions whose features `has` says yes to, or only those of one mnemonic.
    pub fn new(only: Option<Mnemonic>, has: impl Fn(CpuidFeature) -> bool) -> Generator {
        let mut by_mnemonic: BTreeMap<u32, Vec<Template>> = BTreeMap::new();
        let mut add = |t: Template| {
            for mode in [0xc0, 0x00] {
                let mut bytes = t.prefixes(4, 4, 4, 0);
                bytes.extend([t.opcode, mode | t.reg << 3, 0x24, 0, 0, 0, 0, 0, 0, 0]);
                let i = decode(&bytes);
                let wanted = only.is_none_or(|m| m == i.mnemonic());
                let features = i.code().cpuid_features();
                let xop = matches!(
                    i.code().encoding(),
                    EncodingKind::XOP | EncodingKind::D3NOW | EncodingKind::MVEX
                );
                if !i.is_invalid() && wanted && !xop && !excluded(&i) && features.iter().all(|&f| has(f)) {
                    by_mnemonic.entry(i.mnemonic() as u32).or_default().push(t);
                    return;
                }
            }
        };
        for opcode in 0..=255 {
            for reg in 0..8 {
                for prefix in 0..4 {
                    for w in 0..2 {
                        for map in 0..4 {
                            add(Template { kind: Kind::Legacy, map, prefix, opcode, reg, w, l: 0 });
                        }
                        for l in 0..2 {
                            for map in 1..4 {
                                add(Template { kind: Kind::Vex, map, prefix, opcode, reg, w, l });
                            }
                        }
                        for l in 0..3 {
                            for map in [1, 2, 3, 5, 6] {
                                add(Template { kind: Kind::Evex, map, prefix, opcode, reg, w, l });
                            }
                        }
                    }
                }
            }
        }
        Generator { by_mnemonic: by_mnemonic.into_values().collect(), only }
    }

    /// How many mnemonics there are to choose from.
    pub fn mnemonics(&self) -> usize {
        self.by_mnemonic.len()
    }

    /// The case of a seed.
    pub fn case(&self, seed: u64) -> (Case, Instruction) {
        let mut r = Random::new(seed);
        loop {
            let (mut bytes, offset) = self.bytes(&mut r);
            let i = decode(&bytes);
            if i.is_invalid() && self.only.is_some() || !i.is_invalid() && excluded(&i) {
                continue;
            }
            if self.only.is_some_and(|m| m != i.mnemonic()) {
                continue;
            }
            if i.is_invalid() && risky(&bytes) {
                continue;
            }
            let mut before = registers(&mut r);
            before.rip = CODE + offset;
            if !i.is_invalid() {
                aim(&mut r, &i, &mut bytes, &mut before);
            }
            let i = Decoder::with_ip(64, &bytes[..15], before.rip, DecoderOptions::AMD).decode();
            if !i.is_invalid() && excluded(&i) {
                continue;
            }
            let placed = (PAGE as u64 - offset).min(16) as u8;
            let repeats = i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix());
            return (Case { before, bytes, placed, repeats, seed }, i);
        }
    }

    /// Instruction bytes and their offset in the code page.
    fn bytes(&self, r: &mut Random) -> ([u8; 16], u64) {
        let mut bytes = [0_u8; 16];
        for b in &mut bytes {
            *b = r.bits() as u8;
        }
        let offset = if r.percent(4) { PAGE as u64 - 1 - r.below(15) } else { r.below(PAGE as u64 - 32) };
        if r.percent(6) && self.only.is_none() || self.by_mnemonic.is_empty() {
            return (bytes, offset);
        }
        let templates = &self.by_mnemonic[r.below(self.by_mnemonic.len() as u64) as usize];
        let t = r.pick(templates);
        let mut made = Vec::new();
        if r.percent(3) {
            made.push(r.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x66, 0x67, 0xf0, 0xf2, 0xf3]));
        }
        if r.percent(4) {
            made.push(0x67);
        }
        if t.kind == Kind::Legacy && r.percent(3) {
            made.push(0xf0);
        }
        made.extend(t.prefixes(r.bits() as u8, r.bits() as u8, r.bits() as u8, r.bits() as u8));
        made.push(t.opcode);
        let mode = r.pick(&[0xc0, 0xc0, 0xc0, 0xc0, 0x00, 0x40, 0x80, 0x80]);
        made.push(mode | t.reg << 3 & if r.percent(2) { r.bits() as u8 } else { 0x38 } | r.bits() as u8 & 7);
        // Opcodes without ModRM take this byte as an immediate; those where ModRM.reg is an operand get any register.
        let keep = made.len();
        if t.kind != Kind::Legacy || t.map > 0 || (0xd8..=0xdf).contains(&t.opcode) {
            let last = made[keep - 1];
            let mut probe = made.clone();
            probe[keep - 1] = last & 0xc7 | (r.bits() as u8) << 3 & 0x38;
            let mut padded = probe.clone();
            padded.resize(16, 0);
            let mut original = made.clone();
            original.resize(16, 0);
            if decode(&padded).code() == decode(&original).code() {
                made = probe;
            }
        }
        for (to, from) in bytes.iter_mut().zip(&made) {
            *to = *from;
        }
        (bytes, offset)
    }
}

impl Template {
    /// Prefix and escape bytes; `a`, `b`, `c` and `d` are random bits for register extensions and the like.
    fn prefixes(&self, a: u8, b: u8, c: u8, d: u8) -> Vec<u8> {
        let mut out = Vec::new();
        match self.kind {
            Kind::Legacy => {
                match self.prefix {
                    1 => out.push(0x66),
                    2 => out.push(0xf3),
                    3 => out.push(0xf2),
                    _ => {}
                }
                let rex = 0x40 | self.w << 3 | a & 7;
                if self.w != 0 || a & 0x10 != 0 {
                    out.push(rex);
                }
                match self.map {
                    1 => out.push(0x0f),
                    2 => out.extend([0x0f, 0x38]),
                    3 => out.extend([0x0f, 0x3a]),
                    _ => {}
                }
            }
            Kind::Vex => {
                let vvvv = if d & 1 == 0 && b & 0x18 != 0 { 0x78 } else { b & 0x78 };
                let pp = [0, 1, 2, 3][usize::from(self.prefix)];
                // Half of the encodings of instructions without a third register want 1111 there: both are tried.
                let vvvv = if c & 1 == 0 { vvvv } else { b & 0x78 };
                out.extend([0xc4, a & 0xe0 | self.map, self.w << 7 | vvvv | self.l << 2 | pp]);
            }
            Kind::Evex => {
                let vvvv = if d & 1 == 0 { 0x78 } else { b & 0x78 };
                let v2 = if d & 1 == 0 { 8 } else { b << 3 & 8 };
                let pp = [0, 1, 2, 3][usize::from(self.prefix)];
                let mask = if d & 2 == 0 { c & 7 } else { 0 };
                let z = if d & 0x0c == 0 { 0x80 } else { 0 };
                let broadcast = if d & 0x30 == 0 { 0x10 } else { 0 };
                let ll = if broadcast != 0 && d & 0x40 != 0 { c >> 3 & 3 } else { self.l };
                out.extend([
                    0x62,
                    a & 0xf0 | self.map,
                    self.w << 7 | vvvv | 4 | pp,
                    z | ll << 5 | broadcast | v2 | mask,
                ]);
            }
        }
        out
    }
}

/// Bytes that the decoder doesn't know and that mustn't be tried: segment overrides to the child's thread-local storage, and escape
/// sequences where processors keep system instructions.
fn risky(bytes: &[u8]) -> bool {
    let prefix = |b: &u8| {
        matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x40..=0x4f)
    };
    let n = bytes.iter().take_while(|b| prefix(b)).count();
    bytes[..n].iter().any(|b| matches!(b, 0x64 | 0x65))
        || matches!(
            bytes.get(n..n + 2),
            Some([0x0f, 0x00 | 0x01 | 0x05 | 0x07 | 0x34 | 0x35 | 0x37 | 0xa6 | 0xa7 | 0xae | 0xc7])
        )
}

fn interesting(r: &mut Random) -> u64 {
    match r.below(8) {
        0 => r.below(64),
        1 => 0_u64.wrapping_sub(r.below(64)),
        2 => 1 << r.below(64),
        3 => (1_u64 << r.below(64)).wrapping_sub(1),
        4 => r.pick(&[
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 63,
            !0,
            0,
        ]),
        5 => r.bits() >> r.below(64),
        _ => r.bits(),
    }
}

/// A quadword of floats, or of anything.
fn floats(r: &mut Random) -> u64 {
    match r.below(10) {
        0..3 => (r.below(2000) as f64 / 16.0 - 60.0).to_bits(),
        3..5 => {
            let one = |r: &mut Random| u64::from((r.below(2000) as f32 / 16.0 - 60.0).to_bits());
            one(r) | one(r) << 32
        }
        5 => r.pick(&[
            0,
            1 << 63,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff4_0000_0000_0001,
            1,
            0x000f_ffff_ffff_ffff,
            0x7fef_ffff_ffff_ffff,
            0x43e0_0000_0000_0000,
            0x0010_0000_0000_0000,
        ]),
        6 => {
            let one = |r: &mut Random| {
                r.pick(&[
                    0_u64,
                    0x8000_0000,
                    0x7f80_0000,
                    0xff80_0000,
                    0x7fc0_0000,
                    0x7fa0_0000,
                    1,
                    0x7f_ffff,
                    0x7f7f_ffff,
                    0x80_0000,
                    0x4f00_0000,
                ])
            };
            one(r) | one(r) << 32
        }
        7 => interesting(r),
        _ => r.bits(),
    }
}

fn registers(r: &mut Random) -> Registers {
    let mut gpr = [0; 16];
    for g in &mut gpr {
        *g = interesting(r);
    }
    for n in [4, 5, 6, 7] {
        gpr[n] = target(r, 8);
    }
    if r.percent(60) {
        gpr[1] = r.below(20);
    }
    let mut vec = [[0; 8]; 32];
    for v in &mut vec {
        for q in v.iter_mut() {
            *q = floats(r);
        }
    }
    let mut opmask = [0; 8];
    for k in &mut opmask {
        *k = if r.percent(30) { !0 } else { interesting(r) };
    }
    let (mut significand, mut exponent) = ([0; 8], [0; 8]);
    for n in 0..8 {
        (significand[n], exponent[n]) = match r.below(10) {
            0 => (0, 0),
            1 => (1 << 63, 0x7fff),
            2 => (r.bits() | 1 << 63, 0x7fff),
            3 => (r.bits(), r.bits() as u16),
            4 => (r.bits() >> 1, 0),
            _ => (r.bits() | 1 << 63, 0x3fff + r.below(64) as u16 - 16),
        };
        if r.percent(50) {
            exponent[n] ^= 0x8000;
        }
    }
    let mxcsr = match r.below(10) {
        0..6 => 0x1f80,
        6 | 7 => 0x1f80 | r.bits() as u32 & 0xe07f,
        8 => 0x1f80 | r.bits() as u32 & 0x3f,
        _ => r.bits() as u32 & 0xffff,
    };
    let fcw = match r.below(10) {
        0..6 => 0x37f,
        6..9 => 0x7f | (r.bits() as u16 & 0x0f00),
        _ => 0x40 | (r.bits() as u16 & 0x0f3f),
    };
    let mut fsw = (r.bits() as u16) & 0x4700 | (r.below(8) as u16) << 11;
    if r.percent(50) {
        fsw |= r.bits() as u16 & 0x7f & fcw | fsw & 0x40;
    }
    if r.percent(3) {
        fsw |= r.bits() as u16 & 0x3f;
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    let ftw = match r.below(4) {
        0 => 0xff,
        1 => 0,
        _ => r.bits() as u8,
    };
    let rflags = 0x202 | r.bits() & 0x8d5 | if r.percent(15) { 0x400 } else { 0 };
    Registers { vec, gpr, opmask, rip: 0, rflags, significand, exponent, mxcsr, fcw, fsw, ftw }
}

/// An address for a memory operand of `size` bytes.
fn target(r: &mut Random, size: u64) -> u64 {
    let size = size.max(1);
    let end = DATA + 2 * PAGE as u64;
    match r.below(20) {
        // Across or at the end of the mapped pages.
        0 => end - r.below(2 * size + 1),
        // At the start, and before it.
        1 => DATA.wrapping_sub(r.below(size + 1)),
        // Between the two pages.
        2 | 3 => DATA + PAGE as u64 - r.below(2 * size + 1),
        4 => READ_ONLY + r.below(PAGE as u64),
        5 => {
            r.pick(&[0, 0x1000_2000, 0x8000_0000_0000, 0xffff_8000_0000_0000, 0x7fff_ffff_f000, CODE])
                + r.below(64)
        }
        6..10 => DATA + r.below(2 * PAGE as u64 - 64),
        _ => DATA + r.below(2 * PAGE as u64 / 64 - 8) * 64,
    }
}

/// Changes registers (or the displacement) so that the memory operand is where `target` says.
fn aim(r: &mut Random, i: &Instruction, bytes: &mut [u8; 16], regs: &mut Registers) {
    let uses = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if !uses || r.percent(1) {
        return;
    }
    let size = i.memory_size().size() as u64;
    let size = if size == 0 { 8 } else { size };
    let mut at = target(r, size);
    // Most aligned-only instructions should work most of the time; XLAT and bit tests add a register to the address.
    if r.percent(50) && size.is_power_of_two() {
        at &= !(size - 1);
    }
    let bit_test = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if bit_test && i.op_kind(1) == OpKind::Register && r.percent(90) {
        let n = i.op_register(1).full_register().number();
        regs.gpr[n] = (r.below(4096) as i64 - 2048) as u64;
    }
    let (base, index) = (i.memory_base(), i.memory_index());
    let scale = u64::from(i.memory_index_scale());
    let displacement = i.memory_displacement64();
    let number = |r: Register| r.full_register().number();
    if base == Register::RIP || base == Register::EIP || base == Register::None {
        if index.is_gpr() {
            regs.gpr[number(index)] = at.wrapping_sub(displacement) / scale;
            return;
        }
        let mut decoder = Decoder::with_ip(64, &bytes[..15], 0, DecoderOptions::AMD);
        let again = decoder.decode();
        let offsets = decoder.get_constant_offsets(&again);
        if offsets.has_displacement() && offsets.displacement_size() == 4 {
            let value =
                if base == Register::None { at } else { at.wrapping_sub(regs.rip + again.len() as u64) };
            let place = offsets.displacement_offset();
            bytes[place..place + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
        if index.is_vector_register() {
            small_indices(r, index, regs);
        }
        return;
    }
    if index.is_vector_register() {
        small_indices(r, index, regs);
        regs.gpr[number(base)] = at.wrapping_sub(displacement);
        return;
    }
    if index == Register::None {
        regs.gpr[number(base)] = at.wrapping_sub(displacement);
    } else if number(index) == number(base) {
        regs.gpr[number(base)] = at.wrapping_sub(displacement) / (scale + 1);
    } else {
        if r.percent(70) {
            regs.gpr[number(index)] = r.below(4096);
        }
        let wide = regs.gpr[number(index)].wrapping_mul(scale);
        regs.gpr[number(base)] = at.wrapping_sub(displacement).wrapping_sub(wide);
    }
    if base.size() == 4 && r.percent(50) {
        regs.gpr[number(base)] |= r.bits() << 32;
    }
}

/// Indices of a gather stay near the base.
fn small_indices(r: &mut Random, index: Register, regs: &mut Registers) {
    let n = index.number();
    let dwords = r.percent(50);
    for q in &mut regs.vec[n] {
        let one = |r: &mut Random| (r.below(512) as i64 - 256) as u64;
        *q = if dwords { one(r) & 0xffff_ffff | one(r) << 32 } else { one(r) };
    }
}

/// What the instruction leaves undefined in RFLAGS.
pub fn undefined_flags(i: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let u = i.rflags_undefined();
    [
        (B::OF, 0x800),
        (B::SF, 0x80),
        (B::ZF, 0x40),
        (B::AF, 0x10),
        (B::CF, 1),
        (B::PF, 4),
        (B::DF, 0x400),
        (B::AC, 1 << 18),
    ]
    .iter()
    .filter(|(bit, _)| u & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag)
}
