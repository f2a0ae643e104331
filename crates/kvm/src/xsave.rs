//! XSAVE's standard format and the state's vector and x87 registers.
//!
//! Format: SDM vol. 1 §10.5.1 (legacy region), §13.4 (XSAVE area), §13.5 (components). Offsets of the extended components: CPUID
//! leaf 0xd. FCS and FDS have no place in the 64-bit form that Linux uses.

use crate::cpuid::{CpuidLeaf, find};
use hyaline_x86::state::{CpuState, X87};

const X87_BIT: u64 = 1 << 0;
const SSE_BIT: u64 = 1 << 1;
const AVX: usize = 2;
const OPMASK: usize = 5;
const ZMM_HI256: usize = 6;
const HI16_ZMM: usize = 7;
const PKRU: usize = 9;

/// The extended components that the state knows, with their sizes.
const KNOWN: [(usize, usize); 5] = [(AVX, 256), (OPMASK, 64), (ZMM_HI256, 512), (HI16_ZMM, 1024), (PKRU, 4)];

/// Where components are, and which there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Components that the vCPU may have.
    mask: u64,
    offsets: [Option<usize>; 10],
}

impl Layout {
    /// `host`: the leaves that the kernel supports, whose offsets hold; `mask`: components that the vCPU may have.
    pub(crate) fn new(host: &[CpuidLeaf], mask: u64) -> Layout {
        let mut offsets = [None; 10];
        for (component, size) in KNOWN {
            if let Some(leaf) = find(host, 0xd, component as u32)
                && leaf.eax as usize >= size
                && leaf.ebx >= 576
            {
                offsets[component] = Some(leaf.ebx as usize);
            }
        }
        Layout { mask, offsets }
    }

    fn offset(&self, component: usize) -> Option<usize> {
        (self.mask >> component & 1 != 0).then_some(self.offsets[component]).flatten()
    }

    /// Bytes that the area needs.
    pub(crate) fn size(&self) -> usize {
        let ends = KNOWN.iter().filter_map(|(component, size)| Some(self.offset(*component)? + size));
        ends.max().unwrap_or(0).max(4096)
    }

    /// Puts the registers into an area of at least [`Layout::size`] bytes. Gives the names of what has no place there and holds something.
    pub(crate) fn encode(&self, state: &CpuState, area: &mut [u8]) -> Vec<&'static str> {
        let x87 = &state.x87;
        put(area, 0, &x87.fcw.to_le_bytes());
        put(area, 2, &x87.fsw.to_le_bytes());
        put(area, 4, &[x87.ftw, 0]);
        put(area, 6, &x87.fop.to_le_bytes());
        put(area, 8, &x87.fip.to_le_bytes());
        put(area, 16, &x87.fdp.to_le_bytes());
        put(area, 24, &state.mxcsr.to_le_bytes());
        for st in 0..8 {
            let physical = physical(x87.fsw, st);
            put(area, 32 + 16 * st, &x87.significand[physical].to_le_bytes());
            put(area, 40 + 16 * st, &x87.exponent[physical].to_le_bytes());
        }
        let mut present = X87_BIT | SSE_BIT;
        let quads = |area: &mut [u8], at: usize, quads: &[u64]| {
            for (n, quad) in quads.iter().enumerate() {
                put(area, at + 8 * n, &quad.to_le_bytes());
            }
        };
        for n in 0..16 {
            quads(area, 160 + 16 * n, &state.vec[n].0[..2]);
        }
        let mut lost = Vec::new();
        let mut component =
            |number: usize, used: bool, name, write: &mut dyn FnMut(usize)| match self.offset(number) {
                Some(at) => {
                    present |= 1 << number;
                    write(at);
                }
                None if used => lost.push(name),
                None => {}
            };
        let any = |registers: std::ops::Range<usize>, part: std::ops::Range<usize>| {
            state.vec[registers].iter().any(|v| v.0[part.clone()].iter().any(|q| *q != 0))
        };
        component(AVX, any(0..16, 2..4), "the upper halves of YMM0 to YMM15", &mut |at| {
            (0..16).for_each(|n| quads(area, at + 16 * n, &state.vec[n].0[2..4]));
        });
        component(OPMASK, state.opmask.iter().any(|k| *k != 0), "the mask registers K0 to K7", &mut |at| {
            quads(area, at, &state.opmask);
        });
        component(ZMM_HI256, any(0..16, 4..8), "the upper halves of ZMM0 to ZMM15", &mut |at| {
            (0..16).for_each(|n| quads(area, at + 32 * n, &state.vec[n].0[4..8]));
        });
        component(HI16_ZMM, any(16..32, 0..8), "ZMM16 to ZMM31", &mut |at| {
            (0..16).for_each(|n| quads(area, at + 64 * n, &state.vec[16 + n].0));
        });
        component(PKRU, state.pkru != 0, "PKRU", &mut |at| put(area, at, &state.pkru.to_le_bytes()));
        put(area, 512, &present.to_le_bytes());
        // Standard format: XCOMP_BV is zero.
        put(area, 520, &[0; 56]);
        lost
    }

    /// Takes the registers out of an area. Gives the components that hold something and that the state doesn't know, as bits.
    pub(crate) fn decode(&self, area: &[u8], state: &mut CpuState) -> u64 {
        let present = u64_at(area, 512);
        state.mxcsr = u64_at(area, 24) as u32;
        if present & X87_BIT == 0 {
            state.x87 = X87::default();
        } else {
            let x87 = &mut state.x87;
            x87.fcw = u64_at(area, 0) as u16;
            x87.fsw = u64_at(area, 2) as u16;
            x87.ftw = u64_at(area, 4) as u8;
            x87.fop = u64_at(area, 6) as u16;
            x87.fip = u64_at(area, 8);
            x87.fdp = u64_at(area, 16);
            (x87.fcs, x87.fds) = (0, 0);
            for st in 0..8 {
                let physical = physical(x87.fsw, st);
                x87.significand[physical] = u64_at(area, 32 + 16 * st);
                x87.exponent[physical] = u64_at(area, 40 + 16 * st) as u16;
            }
        }
        // A component that is not present is in its initial state: all zero.
        let at = |component: usize| {
            if present >> component & 1 != 0 { self.offsets.get(component).copied().flatten() } else { None }
        };
        let quad = |at: Option<usize>, offset: usize| at.map_or(0, |at| u64_at(area, at + offset));
        let sse = (present & SSE_BIT != 0).then_some(160);
        for n in 0..16 {
            for q in 0..2 {
                state.vec[n].0[q] = quad(sse, 16 * n + 8 * q);
                state.vec[n].0[2 + q] = quad(at(AVX), 16 * n + 8 * q);
            }
            for q in 0..4 {
                state.vec[n].0[4 + q] = quad(at(ZMM_HI256), 32 * n + 8 * q);
            }
            for q in 0..8 {
                state.vec[16 + n].0[q] = quad(at(HI16_ZMM), 64 * n + 8 * q);
            }
        }
        for n in 0..8 {
            state.opmask[n] = quad(at(OPMASK), 8 * n);
        }
        state.pkru = quad(at(PKRU), 0) as u32;
        let known = KNOWN.iter().fold(X87_BIT | SSE_BIT, |bits, (component, _)| bits | 1 << component);
        present & !known
    }
}

/// Physical number of ST(`st`): TOP is in bits 11 to 13 of the status word.
fn physical(fsw: u16, st: usize) -> usize {
    (usize::from(fsw >> 11) + st) & 7
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = area.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// Eight bytes, little endian; what is beyond the end counts as zero.
fn u64_at(area: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = area.get(at + n).copied().unwrap_or(0);
    }
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves() -> Vec<CpuidLeaf> {
        [(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408), (9, 8, 2432)]
            .map(|(subleaf, eax, ebx)| CpuidLeaf {
                leaf: 0xd,
                subleaf: Some(subleaf),
                eax,
                ebx,
                ecx: 0,
                edx: 0,
            })
            .to_vec()
    }

    fn full() -> CpuState {
        let mut state = CpuState::at_reset(true);
        for (n, vector) in state.vec.iter_mut().enumerate() {
            for (q, quad) in vector.0.iter_mut().enumerate() {
                *quad = (n as u64) << 32 | q as u64 | 1 << 60;
            }
        }
        state.opmask = [1, 2, 3, 4, 5, 6, 7, 8];
        state.pkru = 0x55;
        state.mxcsr = 0x1fa0;
        state.x87.fsw = 5 << 11;
        state.x87.ftw = 0x24;
        state.x87.fcw = 0x27f;
        state.x87.fop = 0x123;
        state.x87.fip = 0x1234_5678_9abc;
        state.x87.fdp = 0x77;
        for n in 0..8 {
            state.x87.significand[n] = 0x8000_0000_0000_0000 | n as u64;
            state.x87.exponent[n] = 0x4000 + n as u16;
        }
        state
    }

    #[test]
    fn round_trip() {
        let layout = Layout::new(&leaves(), 0x2e7);
        let state = full();
        let mut area = vec![0; layout.size()];
        assert!(layout.encode(&state, &mut area).is_empty());
        // ST(0) is physical register 5 with TOP 5.
        assert_eq!(u64_at(&area, 32), 0x8000_0000_0000_0005);
        assert_eq!(u64_at(&area, 512), 0x2e7);
        let mut back = CpuState::at_reset(true);
        assert_eq!(layout.decode(&area, &mut back), 0);
        assert_eq!(
            (back.x87, back.mxcsr, back.vec, back.opmask, back.pkru),
            (state.x87, state.mxcsr, state.vec, state.opmask, state.pkru)
        );
    }

    #[test]
    fn what_the_model_lacks_is_named() {
        let layout = Layout::new(&leaves(), 7);
        let mut area = vec![0; layout.size()];
        let lost = layout.encode(&full(), &mut area);
        assert_eq!(lost.len(), 4, "{lost:?}");
        assert_eq!(u64_at(&area, 512), 7);
        assert!(layout.encode(&CpuState::at_reset(true), &mut area).is_empty());
    }

    #[test]
    fn initial_components_are_zero_and_unknown_ones_are_told() {
        let layout = Layout::new(&leaves(), 0x2e7);
        let mut area = vec![0xff; layout.size()];
        put(&mut area, 512, &(1u64 << 17).to_le_bytes());
        let mut state = full();
        assert_eq!(layout.decode(&area, &mut state), 1 << 17);
        assert_eq!(state.x87, X87::default());
        assert!(state.vec.iter().all(|v| v.0 == [0; 8]));
        // A short area never panics.
        layout.decode(&[], &mut state);
        layout.encode(&full(), &mut []);
    }
}
