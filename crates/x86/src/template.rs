//! A cache of decoded instructions without their displacements and immediates.
//!
//! What an instruction is stands in its *head*: prefixes, opcode, ModRM, SIB. Displacement and immediate only fill in numbers. So an
//! instruction whose head was decoded before is copied from a table and its numbers put in, which takes a fraction of decoding's
//! time. Where the head ends is found with tables of the opcode map; they are hints that are checked against the decoder each time that a
//! head enters the table: a wrong one costs time, not correctness.

use crate::decode::{self, Ea, Insn, Mode};
use crate::sys::cpuid::CpuModel;
use iced_x86::{Decoder, DecoderOptions, OpKind};

const ENTRIES: usize = 2048;

/// How the immediate in the bytes becomes [`Insn::imm`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// There is none; the head says all.
    None,
    Zero,
    Sign,
}

#[derive(Clone, Copy)]
struct Template {
    /// The head's bytes, the first one lowest.
    head: u64,
    /// Bits of the mode in bits 8-15, bytes of the head in bits 0-7; 0 is none.
    key: u32,
    rule: Rule,
    insn: Insn,
}

/// Where an instruction's parts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    head: usize,
    displacement: usize,
    immediate: usize,
}

/// ModRM follows.
const M: u8 = 0x10;
/// An immediate byte.
const B: u8 = 1;
/// Two immediate bytes.
const W: u8 = 2;
/// An immediate of the operand's size, at most 4 bytes.
const Z: u8 = 3;
/// An immediate of the operand's size.
const V: u8 = 4;
/// Not looked at here.
const X: u8 = 0x80;

/// The one-byte map (SDM vol. 2D table A-2).
#[rustfmt::skip]
const ONE: [u8; 256] = [
    M, M, M, M, B, Z, X, X, M, M, M, M, B, Z, X, X,
    M, M, M, M, B, Z, X, X, M, M, M, M, B, Z, X, X,
    M, M, M, M, B, Z, X, X, M, M, M, M, B, Z, X, X,
    M, M, M, M, B, Z, X, X, M, M, M, M, B, Z, X, X,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    X, X, X, M, X, X, X, X, Z, M|Z, B, M|B, X, X, X, X,
    B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B,
    M|B, M|Z, X, M|B, M, M, M, M, M, M, M, M, X, M, X, X,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, X, X, 0, 0, 0, 0,
    X, X, X, X, 0, 0, 0, 0, B, Z, 0, 0, 0, 0, 0, 0,
    B, B, B, B, B, B, B, B, V, V, V, V, V, V, V, V,
    M|B, M|B, W, 0, X, X, M|B, M|Z, X, 0, X, X, 0, X, X, 0,
    M, M, M, M, X, X, X, X, X, X, X, X, X, X, X, X,
    B, B, B, B, X, X, X, X, Z, Z, X, B, X, X, X, X,
    X, X, X, X, X, 0, M, M, 0, 0, 0, 0, 0, 0, M, M,
];

/// The map behind 0F, as far as integer instructions go.
fn two(opcode: u8) -> u8 {
    match opcode {
        0x1e | 0x1f | 0x40..=0x4f | 0x90..=0x9f | 0xa3 | 0xab | 0xaf | 0xb0 | 0xb1 | 0xb3 | 0xb6 | 0xb7 => M,
        0xbb..=0xbf | 0xc0 | 0xc1 | 0xa5 | 0xad => M,
        0xba | 0xa4 | 0xac => M | B,
        0x80..=0x8f => Z,
        0xc8..=0xcf | 0x05 | 0xa2 | 0x31 => 0,
        _ => X,
    }
}

/// Where the parts of the instruction in `w` are. None: not a form that is kept here.
#[inline]
fn shape(w: u64, bits: u32) -> Option<Shape> {
    let byte = |n: usize| (w >> (8 * n)) as u8;
    let long = bits == 64;
    let mut at = 0;
    let (mut wide, mut narrow) = (false, false);
    loop {
        match byte(at) {
            0x66 => narrow = true,
            0x64 | 0x65 | 0x2e | 0x36 | 0x3e | 0x26 | 0xf0 | 0xf2 | 0xf3 => {}
            _ => break,
        }
        at += 1;
        if at > 3 {
            return None;
        }
    }
    if long && byte(at) & 0xf0 == 0x40 {
        wide = byte(at) & 8 != 0;
        at += 1;
        if byte(at) & 0xf0 == 0x40 {
            return None;
        }
    }
    let mut opcode = byte(at);
    at += 1;
    let escaped = opcode == 0x0f;
    let mut form = if escaped {
        opcode = byte(at);
        at += 1;
        two(opcode)
    } else {
        ONE[usize::from(opcode)]
    };
    if form & X != 0 {
        return None;
    }
    let mut displacement = 0;
    if form & M != 0 {
        // At most 3 prefixes, REX, two opcode bytes: the seventh byte.
        let modrm = byte(at);
        at += 1;
        let (mode, rm) = (modrm >> 6, modrm & 7);
        if mode != 3 {
            let mut base = rm;
            if rm == 4 {
                if at > 7 {
                    return None;
                }
                base = byte(at) & 7;
                at += 1;
            }
            displacement = match (mode, base) {
                (0, 5) | (2, _) => 4,
                (0, _) => 0,
                _ => 1,
            };
        }
        // TEST in groups 3.
        if !escaped && opcode & 0xfe == 0xf6 && modrm >> 3 & 7 < 2 {
            form |= if opcode == 0xf6 { B } else { Z };
        }
    }
    let immediate = match form & 7 {
        B => 1,
        W => 2,
        Z if narrow && !wide => 2,
        Z => 4,
        V if wide => 8,
        V if narrow => 2,
        V => 4,
        _ => 0,
    };
    (at <= 8).then_some(Shape { head: at, displacement, immediate })
}

fn little(bytes: &[u8]) -> u64 {
    let mut b = [0; 8];
    b.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(b)
}

fn extend(v: u64, bytes: usize) -> u64 {
    match bytes {
        1 => v as i8 as u64,
        2 => v as i16 as u64,
        4 => v as i32 as u64,
        _ => v,
    }
}

/// Heads that were decoded, direct mapped.
pub(crate) struct Templates {
    entries: Box<[Template]>,
}

impl Templates {
    pub(crate) fn new() -> Templates {
        let none = Template { head: 0, key: 0, rule: Rule::None, insn: Insn::undefined() };
        Templates { entries: vec![none; ENTRIES].into() }
    }

    /// As [`decode::decode`], of which the outcome is kept for other instructions with the same head. One model for all calls.
    #[inline]
    pub(crate) fn decode(&mut self, bytes: &[u8], mode: Mode, model: &CpuModel) -> Option<Insn> {
        let first = match bytes.first_chunk::<8>() {
            Some(first) if mode.bits != 16 => u64::from_le_bytes(*first),
            _ => return decode::decode(bytes, mode, model),
        };
        let Some(s) = shape(first, mode.bits) else { return decode::decode(bytes, mode, model) };
        let len = s.head + s.displacement + s.immediate;
        if len > bytes.len() || len > 15 {
            return decode::decode(bytes, mode, model);
        }
        let head = first & (u64::MAX >> (64 - 8 * s.head));
        let key = mode.bits << 8 | s.head as u32;
        let slot = (head.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 53) as usize & (ENTRIES - 1);
        match self.entries.get(slot) {
            Some(t) if t.head == head && t.key == key => {
                let mut insn = t.insn;
                insn.len = len as u8;
                let n = bytes.len().min(15);
                if n == 15 {
                    insn.bytes.copy_from_slice(bytes.get(..15)?);
                } else {
                    insn.bytes.get_mut(..n)?.copy_from_slice(bytes.get(..n)?);
                }
                // What lies behind the instruction is no part of it.
                insn.bytes.get_mut(len..)?.fill(0);
                if s.displacement != 0 {
                    let at = bytes.get(s.head..)?;
                    insn.disp = match at {
                        [b, ..] if s.displacement == 1 => i32::from(*b as i8),
                        _ => i32::from_le_bytes(*at.first_chunk::<4>()?),
                    };
                }
                if s.immediate != 0 {
                    let raw = little(bytes.get(s.head + s.displacement..len)?);
                    insn.imm = if t.rule == Rule::Sign { extend(raw, s.immediate) } else { raw };
                }
                Some(insn)
            }
            _ => self.learn(bytes, mode, model, s, head, key, slot),
        }
    }

    #[cold]
    #[allow(clippy::too_many_arguments)]
    fn learn(
        &mut self,
        bytes: &[u8],
        mode: Mode,
        model: &CpuModel,
        s: Shape,
        head: u64,
        key: u32,
        slot: usize,
    ) -> Option<Insn> {
        let insn = decode::decode(bytes, mode, model)?;
        if let Some(rule) = rule(&insn, bytes, mode, s)
            && let Some(entry) = self.entries.get_mut(slot)
        {
            *entry = Template { head, key, rule, insn };
        }
        Some(insn)
    }
}

/// How the immediate is made; None: the instruction doesn't fit the shape, or is one whose numbers are more than numbers.
fn rule(insn: &Insn, bytes: &[u8], mode: Mode, s: Shape) -> Option<Rule> {
    let options = if mode.amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
    let mut decoder = Decoder::with_ip(mode.bits, bytes, 0, options);
    let i = decoder.decode();
    let c = decoder.get_constant_offsets(&i);
    let fits = !i.is_invalid()
        && i.len() == s.head + s.displacement + s.immediate
        && usize::from(insn.len) == i.len()
        && c.displacement_size() == s.displacement
        && (s.displacement == 0 || c.displacement_offset() == s.head)
        && c.immediate_size() == s.immediate
        && (s.immediate == 0 || c.immediate_offset() == s.head + s.displacement)
        && !c.has_immediate2()
        && insn.plan.is_none()
        && insn.ea != Ea::Moffs
        && insn.asize != 2;
    if !fits {
        return None;
    }
    let mut rule = Rule::None;
    for n in 0..i.op_count() {
        let this = match i.op_kind(n) {
            OpKind::Immediate8 | OpKind::Immediate16 | OpKind::Immediate32 | OpKind::Immediate64 => {
                Rule::Zero
            }
            OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
            | OpKind::NearBranch64
            | OpKind::NearBranch32 => Rule::Sign,
            OpKind::NearBranch16
            | OpKind::FarBranch16
            | OpKind::FarBranch32
            | OpKind::Immediate8_2nd
            | OpKind::MemorySegSI
            | OpKind::MemorySegDI
            | OpKind::MemoryESDI => return None,
            _ => continue,
        };
        if s.immediate != 0 {
            if rule != Rule::None {
                return None;
            }
            rule = this;
        }
    }
    if s.immediate == 0 {
        return Some(Rule::None);
    }
    // The proof of it.
    let raw = little(bytes.get(s.head + s.displacement..i.len())?);
    let made = match rule {
        Rule::None => return None,
        Rule::Zero => raw,
        Rule::Sign => extend(raw, s.immediate),
    };
    (made == insn.imm).then_some(rule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jit::lockstep::Random;

    /// Everything of an instruction but its handler's address, which may have several.
    fn text(i: &Insn) -> String {
        format!(
            "{:?} {:?} imm {:#x} disp {:#x} len {} size {} flags {} asize {} osize {} r {} {} {} seg {:?} base {} index {} scale {} ea {:?} \
             bytes {:02x?} plan {:?} handler {:x}",
            i.code,
            i.bytes,
            i.imm,
            i.disp,
            i.len,
            i.size,
            i.flags,
            i.asize,
            i.osize,
            i.r0,
            i.r1,
            i.r2,
            i.seg,
            i.base,
            i.index,
            i.scale,
            i.ea,
            i.bytes(),
            i.plan.map(|p| p as *const _ as usize),
            i.handler as usize,
        )
    }

    #[test]
    fn the_same_as_decoding() {
        let model = crate::testing::cpu().model;
        for bits in [64, 32] {
            for amd in [true, false] {
                let mode = Mode { bits, amd };
                let mut t = Templates::new();
                let mut r = Random::new(u64::from(bits) + u64::from(amd));
                let mut hits = 0_u32;
                for n in 0..400_000_u32 {
                    let mut bytes = [0_u8; 15];
                    bytes.iter_mut().for_each(|b| *b = r.word() as u8);
                    // Few heads, many numbers.
                    let mut at = 0;
                    if n % 3 == 0 {
                        bytes[at] = [0x66, 0xf3, 0x64, 0xf0, 0x2e, 0x67][n as usize / 3 % 6];
                        at += 1;
                    }
                    if bits == 64 && n % 5 < 3 {
                        bytes[at] = 0x40 | (r.word() & 15) as u8 & [0, 8, 15][n as usize / 5 % 3];
                        at += 1;
                    }
                    if n % 7 < 2 {
                        bytes[at] = 0x0f;
                        at += 1;
                    }
                    bytes[at + 1] &= [0x07, 0x47, 0x87, 0xc7, 0xff][n as usize / 11 % 5];
                    let len = 15 - (r.word() as usize >> 8) % 12 * usize::from(n % 13 == 0);
                    let bytes = &bytes[..len];
                    let want = decode::decode(bytes, mode, &model).map(|i| text(&i));
                    for _ in 0..2 {
                        let got = t.decode(bytes, mode, &model).map(|i| text(&i));
                        assert_eq!(got, want, "{bits} bits, {bytes:02x?}");
                    }
                    hits += u32::from(bytes.first_chunk::<8>().is_some_and(|f| {
                        shape(u64::from_le_bytes(*f), bits).is_some_and(|s| {
                            t.entries.iter().any(|e| e.key != 0 && e.key & 0xff == s.head as u32)
                        })
                    }));
                }
                assert!(hits > 100_000, "{hits} instructions had a form that is kept");
            }
        }
    }

    #[test]
    fn common_forms_are_kept() {
        let model = crate::testing::cpu().model;
        let mode = Mode { bits: 64, amd: true };
        let forms: [&[u8]; 14] = [
            &[0x48, 0x8b, 0x44, 0x24, 8],
            &[0x48, 0x8d, 0x05, 1, 2, 3, 4],
            &[0xb8, 1, 2, 3, 4],
            &[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0x83, 0xc0, 0xff],
            &[0x0f, 0x84, 1, 2, 3, 4],
            &[0x74, 5],
            &[0xe8, 1, 2, 3, 4],
            &[0xf7, 0xc1, 1, 2, 3, 4],
            &[0xf7, 0xd9],
            &[0x66, 0xc7, 0x47, 3, 1, 2],
            &[0x65, 0x48, 0x8b, 0x04, 0x25, 1, 2, 3, 4],
            &[0x0f, 0xb6, 0x04, 0x17],
            &[0xc3],
        ];
        for form in forms {
            let mut t = Templates::new();
            let mut bytes = [0x90; 15];
            bytes[..form.len()].copy_from_slice(form);
            let _ = t.decode(&bytes, mode, &model);
            assert_eq!(t.entries.iter().filter(|e| e.key != 0).count(), 1, "{form:02x?}");
        }
    }
}
