//! Images made of random bytes, some with instructions among them that reach devices and system registers.

use crate::Random;
use anyhow::Result;
use std::fmt;

/// What an image pretends to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 64 to 256 KiB with a reset vector.
    Firmware,
    /// A flat multiboot kernel: starts in 32-bit protected mode.
    Kernel,
    /// A real kernel with bytes changed.
    Damaged,
    /// A saved state with bytes changed and its checksums right.
    State,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Shape::Firmware => "firmware",
            Shape::Kernel => "kernel",
            Shape::Damaged => "damaged kernel",
            Shape::State => "state",
        })
    }
}

pub(crate) struct Image {
    pub(crate) shape: Shape,
    pub(crate) data: Vec<u8>,
}

impl Image {
    pub(crate) fn random(
        rng: &mut Random,
        shape: Option<Shape>,
        state: &mut dyn FnMut() -> Result<Vec<u8>>,
    ) -> Result<Image> {
        let shape = shape.unwrap_or(match rng.below(100) {
            0..40 => Shape::Firmware,
            40..85 => Shape::Kernel,
            85..93 => Shape::Damaged,
            _ => Shape::State,
        });
        let data = match shape {
            Shape::Firmware => firmware(rng),
            Shape::Kernel => kernel(rng),
            Shape::Damaged => {
                let all = [
                    hyaline_guests::DEMO,
                    hyaline_guests::LONGMODE,
                    hyaline_guests::SMP,
                    hyaline_guests::INTERRUPTS,
                ];
                let mut data = rng.pick(&all).to_vec();
                // Half of the changes hit the headers.
                let reach = if rng.percent(50) { 256 } else { data.len() };
                damage(rng, &mut data, reach);
                if rng.percent(10) {
                    data.truncate(rng.below(data.len() as u64) as usize);
                }
                data
            }
            Shape::State => damaged_state(rng, &state()?),
        };
        Ok(Image { shape, data })
    }
}

fn damage(rng: &mut Random, data: &mut [u8], reach: usize) {
    for _ in 0..=rng.below(8) {
        let at = rng.below(reach.min(data.len()) as u64) as usize;
        data[at] = match rng.below(4) {
            0 => 0,
            1 => 0xff,
            2 => data[at] ^ 1 << rng.below(8),
            _ => rng.bits() as u8,
        };
    }
}

/// Changes bytes of sections other than RAM and writes their checksums anew, so that what is inside gets looked at.
fn damaged_state(rng: &mut Random, good: &[u8]) -> Vec<u8> {
    let mut data = good.to_vec();
    let mut sections = Vec::new();
    let mut at = 16;
    while let Some(&n) = data.get(at) {
        let name_end = at + 1 + usize::from(n);
        let Some(len) = data.get(name_end..name_end + 8) else { break };
        let len = u64::from_le_bytes(len.try_into().unwrap_or_default()) as usize;
        let name = data[at + 1..name_end].to_vec();
        if !name.starts_with(b"ram") && len > 0 {
            sections.push((name, name_end + 8, len));
        }
        at = name_end + 8 + len + 8;
    }
    if sections.is_empty() {
        return data;
    }
    for _ in 0..=rng.below(3) {
        let (name, start, len) = &sections[rng.below(sections.len() as u64) as usize];
        let (start, end) = (*start, *start + *len);
        damage(rng, &mut data[start..end], *len);
        let sum = hyaline_machine::state_file::checksum(&String::from_utf8_lossy(name), &data[start..end]);
        data[end..end + 8].copy_from_slice(&sum.to_le_bytes());
    }
    data
}

fn firmware(rng: &mut Random) -> Vec<u8> {
    let size = 65536 * rng.pick(&[1, 1, 1, 2, 4]);
    let mut data = code(rng, size, 16);
    // The reset vector at the top jumps into the last 64 KiB; sometimes it is random as well.
    if rng.percent(90) {
        let target = rng.below(0xff00) as u16;
        let at = size - 16;
        data[at] = 0xe9;
        data[at + 1..at + 3].copy_from_slice(&target.wrapping_sub(0xfff3).to_le_bytes());
    }
    data
}

fn kernel(rng: &mut Random) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    let size = 16384;
    let mut data = Vec::new();
    // Multiboot Specification 0.6.96, section 3.1: with the address fields (flag 16).
    let flags = 1u32 << 16;
    for v in [
        0x1bad_b002,
        flags,
        0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags),
        BASE,
        BASE,
        BASE + size as u32,
        BASE + size as u32,
        BASE + 32,
    ] {
        data.extend(v.to_le_bytes());
    }
    // A stack, so that not every interrupt is a triple fault; and sometimes an interrupt table that leads back into the code.
    data.extend([0xbc, 0x00, 0xf0, 0x1f, 0x00]);
    if rng.percent(60) {
        // lidt [BASE + size - 2048 - 8]
        data.extend([0x0f, 0x01, 0x1d]);
        data.extend((BASE + size as u32 - 2056).to_le_bytes());
    }
    if rng.percent(30) {
        data.push(0xfb);
    }
    let left = size - data.len() - 2056;
    data.extend(code(rng, left, 32));
    data.extend(2047u16.to_le_bytes());
    data.extend((BASE + size as u32 - 2048).to_le_bytes());
    data.extend([0, 0]);
    for _ in 0..256 {
        let target = BASE + 64 + rng.below(left as u64) as u32;
        let kind = rng.pick(&[0x8e00u32, 0x8e00, 0x8f00, 0x8500, 0x8e00 | 0x6000]);
        data.extend((0x10 << 16 | target & 0xffff).to_le_bytes());
        data.extend((target & 0xffff_0000 | kind).to_le_bytes());
    }
    data
}

/// Ports with something behind them.
const PORTS: &[u16] = &[
    0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xb2, 0xe9,
    0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3ff, 0x2f8, 0x4d0, 0x4d1, 0x501, 0x505, 0x510, 0x511, 0x514,
    0x518, 0x600, 0x604, 0x608, 0xcf8, 0xcf8, 0xcf8, 0xcfc, 0xcfc, 0xcfc, 0xcfe, 0xcf9, 0xc000, 0xc010,
    0xc012, 0xe0, 0xf4, 0xae00, 0xafe0,
];

/// Addresses with something behind them.
const PLACES: &[u32] = &[
    0xfee0_0000,
    0xfee0_0020,
    0xfee0_0080,
    0xfee0_00b0,
    0xfee0_00f0,
    0xfee0_0300,
    0xfee0_0310,
    0xfee0_0320,
    0xfee0_0380,
    0xfee0_03e0,
    0xfec0_0000,
    0xfec0_0010,
    0xfed0_0000,
    0xfed0_0010,
    0xfed0_0100,
    0xfed0_0108,
    0xfed0_00f0,
    0xa_0000,
    0xf_0000,
    0xffff_0000,
    0x8000_0000,
    0xe000_0000,
    0xfeb0_0000,
    0xff00_0000,
    0x500,
    0x1000,
    0xff_f000,
    0x100_0000,
];

/// Model-specific registers worth a try.
const MSRS: &[u32] = &[
    0x10,
    0x1b,
    0x3a,
    0x3b,
    0x8b,
    0xc1,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x179,
    0x186,
    0x1a0,
    0x1d9,
    0x200,
    0x20f,
    0x250,
    0x277,
    0x2ff,
    0x38f,
    0x6e0,
    0x802,
    0x808,
    0x80b,
    0x80f,
    0x830,
    0x832,
    0x838,
    0x83e,
    0x83f,
    0xda0,
    0x4000_0000,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0xc001_0015,
    0xc001_0111,
    0xc001_0117,
];

fn any32(rng: &mut Random) -> u32 {
    match rng.below(6) {
        0 => rng.bits() as u32,
        1 => 1 << rng.below(32),
        2 => rng.below(256) as u32,
        3 => 0x8000_0000 | (rng.below(0x2000) as u32) << 3,
        4 => rng.pick(PLACES).wrapping_add(rng.below(64) as u32),
        _ => 0x10_0000 + rng.below(0x4000) as u32,
    }
}

/// `size` bytes of code for 16- or 32-bit mode.
fn code(rng: &mut Random, size: usize, bits: u32) -> Vec<u8> {
    // From pure noise to mostly whole instructions.
    let sense = rng.pick(&[0, 30, 70, 95]);
    let mut data = Vec::with_capacity(size + 16);
    // Operand size: 32 bits.
    let wide = |data: &mut Vec<u8>| {
        if bits == 16 {
            data.push(0x66);
        }
    };
    while data.len() < size {
        if !rng.percent(sense) {
            let n = 1 + rng.below(6);
            (0..n).for_each(|_| data.push(rng.bits() as u8));
            continue;
        }
        match rng.below(12) {
            0..4 => {
                // mov dx, port; mov eax, value; in or out.
                if bits == 32 {
                    data.push(0x66);
                }
                data.push(0xba);
                data.extend(rng.pick(PORTS).wrapping_add(rng.pick(&[0, 0, 0, 1, 2])).to_le_bytes());
                wide(&mut data);
                data.push(0xb8);
                data.extend(any32(rng).to_le_bytes());
                if rng.percent(30) {
                    data.push(0x66);
                }
                data.push(rng.pick(&[0xec, 0xed, 0xee, 0xef, 0xef, 0xee, 0x6c, 0x6f]));
            }
            4..6 => {
                // mov ebx, place; a load, a store or an exchange.
                wide(&mut data);
                data.push(0xbb);
                data.extend(any32(rng).to_le_bytes());
                if bits == 16 {
                    data.extend([0x66, 0x67]);
                }
                let forms: [&[u8]; 8] = [
                    &[0x8b, 0x03],
                    &[0x89, 0x03],
                    &[0x88, 0x03],
                    &[0x87, 0x03],
                    &[0x0f, 0xb1, 0x0b],
                    &[0x0f, 0xc7, 0x0b],
                    &[0x0f, 0x11, 0x03],
                    &[0xdd, 0x33],
                ];
                data.extend(rng.pick(&forms));
            }
            6 => {
                // mov ecx, msr; rdmsr or wrmsr.
                wide(&mut data);
                data.push(0xb9);
                data.extend(rng.pick(MSRS).to_le_bytes());
                if rng.percent(40) {
                    data.extend([0x31, 0xd2]);
                }
                data.extend([0x0f, rng.pick(&[0x30, 0x30, 0x32])]);
            }
            7 => {
                // mov eax, value; mov crN or drN, eax; or back.
                wide(&mut data);
                data.push(0xb8);
                let value = match rng.below(3) {
                    0 => any32(rng),
                    1 => 0x11 | 1 << rng.below(32),
                    _ => 1 << rng.below(23),
                };
                data.extend(value.to_le_bytes());
                data.extend([
                    0x0f,
                    rng.pick(&[0x22, 0x22, 0x23, 0x20, 0x21]),
                    0xc0 | (rng.below(8) as u8) << 3,
                ]);
            }
            8 => {
                // System instructions with random operands.
                data.extend([0x0f, rng.pick(&[0x00, 0x01, 0x01, 0xc7, 0xae, 0x18, 0x1f]), rng.bits() as u8]);
                data.extend((rng.bits() as u32).to_le_bytes());
            }
            9 => data.extend([0x0f, rng.bits() as u8, rng.bits() as u8]),
            10 => {
                // A jump or call that stays near; returns; interrupts.
                match rng.below(5) {
                    0 => data.extend([0xeb, rng.bits() as u8]),
                    1 => data.extend([0x70 | rng.below(16) as u8, rng.bits() as u8]),
                    2 => data.extend([0xcd, rng.bits() as u8]),
                    3 => data.push(rng.pick(&[0xcf, 0xc3, 0xcb, 0xf4, 0xfb, 0xfa, 0xcc, 0xf1])),
                    _ => data.extend([
                        0xf3,
                        rng.pick(&[0xa4, 0xa5, 0xaa, 0xab, 0xa6, 0xae, 0x6c, 0x6d, 0x6e, 0x6f]),
                    ]),
                }
            }
            _ => {
                // VEX-coded and long-mode-like bytes.
                data.push(rng.pick(&[0xc4, 0xc5, 0x48, 0x4c, 0x62, 0xd9, 0xdf]));
                data.extend((rng.bits() as u32).to_le_bytes());
            }
        }
    }
    data.truncate(size);
    data
}
