//! The registers that gdb sees, and the target description that names them.
//!
//! The description is always that of 64-bit mode, because gdb does not take another one in the middle of a session: a change of mode
//! changes no packet. Features `org.gnu.gdb.i386.*` are laid down in Debugging with GDB §G.5.x; control registers are a feature of our own.

use gdbstub::arch::{Arch, RegId, Registers};
use hyaline_x86::state::{CpuState, Segment, cr0, flag, gpr};
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::OnceLock;

/// What a register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Gpr(usize),
    Rip,
    Flags,
    Selector(usize),
    St(usize),
    Fpu(usize),
    Xmm(usize),
    YmmHigh(usize),
    Mxcsr,
    Base(usize),
    KernelGsBase,
    Cr(u8),
    Efer,
    Dr(usize),
    Gdtr,
    Idtr,
    Ldtr,
    Tr,
}

#[derive(Clone, Debug)]
struct Def {
    name: String,
    bytes: usize,
    /// gdb's type.
    kind_name: &'static str,
    feature: &'static str,
    kind: Kind,
}

const CORE: &str = "org.gnu.gdb.i386.core";
const SSE: &str = "org.gnu.gdb.i386.sse";
const SEGMENTS: &str = "org.gnu.gdb.i386.segments";
const AVX: &str = "org.gnu.gdb.i386.avx";
const SYSTEM: &str = "org.hyaline.i386.system";

fn defs() -> &'static [Def] {
    static DEFS: OnceLock<Vec<Def>> = OnceLock::new();
    DEFS.get_or_init(|| {
        let mut all = Vec::new();
        let mut add = |feature, name: &str, bytes, kind_name, kind| {
            all.push(Def { name: name.to_string(), bytes, kind_name, feature, kind });
        };
        let general = [
            ("rax", gpr::RAX),
            ("rbx", gpr::RBX),
            ("rcx", gpr::RCX),
            ("rdx", gpr::RDX),
            ("rsi", gpr::RSI),
            ("rdi", gpr::RDI),
        ];
        for (name, n) in general {
            add(CORE, name, 8, "int64", Kind::Gpr(n));
        }
        add(CORE, "rbp", 8, "data_ptr", Kind::Gpr(gpr::RBP));
        add(CORE, "rsp", 8, "data_ptr", Kind::Gpr(gpr::RSP));
        for n in 8..16 {
            add(CORE, &format!("r{n}"), 8, "int64", Kind::Gpr(n));
        }
        add(CORE, "rip", 8, "code_ptr", Kind::Rip);
        add(CORE, "eflags", 4, "i386_eflags", Kind::Flags);
        for (name, n) in [("cs", 1), ("ss", 2), ("ds", 3), ("es", 0), ("fs", 4), ("gs", 5)] {
            add(CORE, name, 4, "int32", Kind::Selector(n));
        }
        for n in 0..8 {
            add(CORE, &format!("st{n}"), 10, "i387_ext", Kind::St(n));
        }
        for (n, name) in
            ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"].iter().enumerate()
        {
            add(CORE, name, 4, "int", Kind::Fpu(n));
        }
        for n in 0..16 {
            add(SSE, &format!("xmm{n}"), 16, "vec128", Kind::Xmm(n));
        }
        add(SSE, "mxcsr", 4, "i386_mxcsr", Kind::Mxcsr);
        add(SEGMENTS, "fs_base", 8, "int", Kind::Base(4));
        add(SEGMENTS, "gs_base", 8, "int", Kind::Base(5));
        for n in 0..16 {
            add(AVX, &format!("ymm{n}h"), 16, "uint128", Kind::YmmHigh(n));
        }
        add(SYSTEM, "k_gs_base", 8, "int64", Kind::KernelGsBase);
        add(SYSTEM, "cr0", 8, "cr0_flags", Kind::Cr(0));
        add(SYSTEM, "cr2", 8, "data_ptr", Kind::Cr(2));
        add(SYSTEM, "cr3", 8, "int64", Kind::Cr(3));
        add(SYSTEM, "cr4", 8, "cr4_flags", Kind::Cr(4));
        add(SYSTEM, "cr8", 8, "int64", Kind::Cr(8));
        add(SYSTEM, "efer", 8, "efer_flags", Kind::Efer);
        for (name, n) in [("cs_base", 1), ("ss_base", 2), ("ds_base", 3), ("es_base", 0)] {
            add(SYSTEM, name, 8, "int64", Kind::Base(n));
        }
        for n in [0, 1, 2, 3, 6, 7] {
            add(SYSTEM, &format!("dr{n}"), 8, "int64", Kind::Dr(n));
        }
        for (name, kind) in [
            ("gdtr_base", Kind::Gdtr),
            ("idtr_base", Kind::Idtr),
            ("ldtr_base", Kind::Ldtr),
            ("tr_base", Kind::Tr),
        ] {
            add(SYSTEM, name, 8, "data_ptr", kind);
        }
        all
    })
}

/// Bits of a flags type: name, number.
type Bits = &'static [(&'static str, u8)];
const EFLAGS: Bits = &[
    ("CF", 0),
    ("", 1),
    ("PF", 2),
    ("AF", 4),
    ("ZF", 6),
    ("SF", 7),
    ("TF", 8),
    ("IF", 9),
    ("DF", 10),
    ("OF", 11),
    ("NT", 14),
    ("RF", 16),
    ("VM", 17),
    ("AC", 18),
    ("VIF", 19),
    ("VIP", 20),
    ("ID", 21),
];
const MXCSR: Bits = &[
    ("IE", 0),
    ("DE", 1),
    ("ZE", 2),
    ("OE", 3),
    ("UE", 4),
    ("PE", 5),
    ("DAZ", 6),
    ("IM", 7),
    ("DM", 8),
    ("ZM", 9),
    ("OM", 10),
    ("UM", 11),
    ("PM", 12),
    ("FZ", 15),
];
const CR0: Bits = &[
    ("PE", 0),
    ("MP", 1),
    ("EM", 2),
    ("TS", 3),
    ("ET", 4),
    ("NE", 5),
    ("WP", 16),
    ("AM", 18),
    ("NW", 29),
    ("CD", 30),
    ("PG", 31),
];
const CR4: Bits = &[
    ("VME", 0),
    ("PVI", 1),
    ("TSD", 2),
    ("DE", 3),
    ("PSE", 4),
    ("PAE", 5),
    ("MCE", 6),
    ("PGE", 7),
    ("PCE", 8),
    ("OSFXSR", 9),
    ("OSXMMEXCPT", 10),
    ("UMIP", 11),
    ("LA57", 12),
    ("FSGSBASE", 16),
    ("PCIDE", 17),
    ("OSXSAVE", 18),
    ("SMEP", 20),
    ("SMAP", 21),
    ("PKE", 22),
];
const EFER: Bits = &[("SCE", 0), ("LME", 8), ("LMA", 10), ("NXE", 11), ("FFXSR", 14)];

fn flags_type(id: &str, bytes: usize, bits: Bits) -> String {
    let mut s = format!("<flags id=\"{id}\" size=\"{bytes}\">");
    for (name, bit) in bits {
        let _ = write!(s, "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>");
    }
    s + "</flags>"
}

/// The target description.
pub(super) fn xml() -> &'static str {
    static XML: OnceLock<String> = OnceLock::new();
    XML.get_or_init(|| {
        let mut s = String::from(
            "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\"><architecture>i386:x86-64</architecture>",
        );
        let mut number = 0;
        for feature in [CORE, SSE, SEGMENTS, AVX, SYSTEM] {
            let _ = write!(s, "<feature name=\"{feature}\">");
            match feature {
                CORE => s += &flags_type("i386_eflags", 4, EFLAGS),
                SSE => {
                    for (id, element, count) in [
                        ("v4f", "ieee_single", 4),
                        ("v2d", "ieee_double", 2),
                        ("v16i8", "int8", 16),
                        ("v8i16", "int16", 8),
                        ("v4i32", "int32", 4),
                        ("v2i64", "int64", 2),
                    ] {
                        let _ = write!(s, "<vector id=\"{id}\" type=\"{element}\" count=\"{count}\"/>");
                    }
                    s += "<union id=\"vec128\">";
                    for (name, kind) in [
                        ("v4_float", "v4f"),
                        ("v2_double", "v2d"),
                        ("v16_int8", "v16i8"),
                        ("v8_int16", "v8i16"),
                        ("v4_int32", "v4i32"),
                        ("v2_int64", "v2i64"),
                        ("uint128", "uint128"),
                    ] {
                        let _ = write!(s, "<field name=\"{name}\" type=\"{kind}\"/>");
                    }
                    s += "</union>";
                    s += &flags_type("i386_mxcsr", 4, MXCSR);
                }
                SYSTEM => {
                    s += &flags_type("cr0_flags", 8, CR0);
                    s += &flags_type("cr4_flags", 8, CR4);
                    s += &flags_type("efer_flags", 8, EFER);
                }
                _ => {}
            }
            for d in defs().iter().filter(|d| d.feature == feature) {
                let group = match (feature, d.kind) {
                    (SYSTEM, _) => " group=\"system\"",
                    (CORE, Kind::Fpu(_)) => " group=\"float\"",
                    _ => "",
                };
                let _ = write!(
                    s,
                    "<reg name=\"{}\" bitsize=\"{}\" type=\"{}\" regnum=\"{number}\"{group}/>",
                    d.name,
                    d.bytes * 8,
                    d.kind_name
                );
                number += 1;
            }
            s += "</feature>";
        }
        s + "</target>"
    })
}

/// The registers of one processor as gdb's packets have them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Raw(Vec<u8>);

/// A register by gdb's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number(usize);

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Number, Option<NonZeroUsize>)> {
        Some((Number(id), NonZeroUsize::new(defs().get(id)?.bytes)))
    }
}

impl Registers for Raw {
    type ProgramCounter = u64;
    fn pc(&self) -> u64 {
        let bytes = self.0.get(16 * 8..17 * 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    }
    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|b| write_byte(Some(*b)));
    }
    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = bytes.to_vec();
        Ok(())
    }
}

/// A PC's processor, in whatever mode.
pub(super) enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Raw;
    type BreakpointKind = usize;
    type RegId = Number;
    fn target_description_xml() -> Option<&'static str> {
        Some(xml())
    }
}

/// The full tag word, two bits a register (SDM vol. 1 §8.1.7).
fn tag_word(s: &CpuState) -> u16 {
    (0..8).fold(0, |word, i| {
        let (exponent, significand) = (s.x87.exponent[i] & 0x7fff, s.x87.significand[i]);
        let tag = match () {
            () if s.x87.ftw >> i & 1 == 0 => 3,
            () if exponent == 0 && significand == 0 => 1,
            () if exponent == 0 || exponent == 0x7fff || significand >> 63 == 0 => 2,
            () => 0,
        };
        word | tag << (2 * i)
    })
}

fn top(s: &CpuState) -> usize {
    usize::from(s.x87.fsw >> 11 & 7)
}

fn pair(low: u64, high: u64) -> u128 {
    u128::from(low) | u128::from(high) << 64
}

fn read(kind: Kind, s: &CpuState, cr8: u8) -> u128 {
    u128::from(match kind {
        Kind::Gpr(n) => s.gpr[n],
        Kind::Rip => s.rip,
        Kind::Flags => s.rflags,
        Kind::Selector(n) => u64::from(s.seg[n].selector),
        Kind::Base(n) => s.seg[n].base,
        Kind::St(n) => {
            let r = (top(s) + n) & 7;
            return pair(s.x87.significand[r], u64::from(s.x87.exponent[r]));
        }
        Kind::Fpu(n) => match n {
            0 => u64::from(s.x87.fcw),
            1 => u64::from(s.x87.fsw),
            2 => u64::from(tag_word(s)),
            3 => u64::from(s.x87.fcs),
            4 => s.x87.fip,
            5 => u64::from(s.x87.fds),
            6 => s.x87.fdp,
            _ => u64::from(s.x87.fop),
        },
        Kind::Xmm(n) => return pair(s.vec[n].0[0], s.vec[n].0[1]),
        Kind::YmmHigh(n) => return pair(s.vec[n].0[2], s.vec[n].0[3]),
        Kind::Mxcsr => u64::from(s.mxcsr),
        Kind::KernelGsBase => s.msr.kernel_gs_base,
        Kind::Cr(0) => s.cr0,
        Kind::Cr(2) => s.cr2,
        Kind::Cr(3) => s.cr3,
        Kind::Cr(4) => s.cr4,
        Kind::Cr(_) => u64::from(cr8),
        Kind::Efer => s.efer,
        Kind::Dr(n) => s.dr[n],
        Kind::Gdtr => s.gdtr.base,
        Kind::Idtr => s.idtr.base,
        Kind::Ldtr => s.ldtr.base,
        Kind::Tr => s.tr.base,
    })
}

/// Changes a register. False: it can't be changed to that from here.
fn write(kind: Kind, s: &mut CpuState, value: u128) -> bool {
    let v = value as u64;
    match kind {
        Kind::Gpr(n) => s.gpr[n] = v,
        Kind::Rip => s.rip = v,
        Kind::Flags => {
            const ALL: u64 = 0x3f_7fd5;
            s.rflags = v & ALL & !flag::VM | flag::ONE | s.rflags & flag::VM;
        }
        Kind::Selector(n) => {
            let real = s.cr0 & cr0::PE == 0 || s.rflags & flag::VM != 0;
            let segment: &mut Segment = &mut s.seg[n];
            if u64::from(segment.selector) == v {
                return true;
            }
            if !real {
                // What it means is in a descriptor table: only an instruction loads it with all its checks.
                return false;
            }
            (segment.selector, segment.base) = (v as u16, (v & 0xffff) << 4);
        }
        Kind::Base(n) => s.seg[n].base = v,
        Kind::St(n) => {
            let r = (top(s) + n) & 7;
            (s.x87.significand[r], s.x87.exponent[r]) = (v, (value >> 64) as u16);
        }
        Kind::Fpu(n) => match n {
            0 => s.x87.fcw = v as u16,
            1 => s.x87.fsw = v as u16,
            2 => s.x87.ftw = (0..8).fold(0, |t, i| t | u8::from(v >> (2 * i) & 3 != 3) << i),
            3 => s.x87.fcs = v as u16,
            // gdb has 32 bits of the pointers: the upper halves stay, unless something else is below them.
            4 if s.x87.fip as u32 != v as u32 => s.x87.fip = v & 0xffff_ffff,
            5 => s.x87.fds = v as u16,
            6 if s.x87.fdp as u32 != v as u32 => s.x87.fdp = v & 0xffff_ffff,
            7 => s.x87.fop = v as u16 & 0x7ff,
            _ => {}
        },
        Kind::Xmm(n) => (s.vec[n].0[0], s.vec[n].0[1]) = (v, (value >> 64) as u64),
        Kind::YmmHigh(n) => (s.vec[n].0[2], s.vec[n].0[3]) = (v, (value >> 64) as u64),
        Kind::Mxcsr if v & !0xffff != 0 => return false,
        Kind::Mxcsr => s.mxcsr = v as u32,
        Kind::KernelGsBase => s.msr.kernel_gs_base = v,
        // Paging and long mode go on and off by a sequence of instructions, not by a register's value.
        Kind::Cr(0) if (s.cr0 ^ v) & (cr0::PE | cr0::PG) != 0 => return false,
        Kind::Cr(0) => s.cr0 = v & 0xe005_003f | cr0::ET,
        Kind::Cr(2) => s.cr2 = v,
        Kind::Cr(3) => s.cr3 = v,
        Kind::Cr(4) if (s.cr4 ^ v) & (1 << 5 | 1 << 12) != 0 || v >> 23 != 0 => return false,
        Kind::Cr(4) => s.cr4 = v,
        Kind::Cr(_) => return false,
        Kind::Efer if (s.efer ^ v) & 0x500 != 0 || v & !0x4d01 != 0 => return false,
        Kind::Efer => s.efer = v,
        Kind::Dr(n) => return s.dr[n] == v,
        Kind::Gdtr => s.gdtr.base = v,
        Kind::Idtr => s.idtr.base = v,
        Kind::Ldtr => s.ldtr.base = v,
        Kind::Tr => s.tr.base = v,
    }
    true
}

impl Raw {
    pub(super) fn fetch(s: &CpuState, cr8: u8) -> Raw {
        let mut bytes = Vec::new();
        for d in defs() {
            bytes.extend_from_slice(read(d.kind, s, cr8).to_le_bytes().get(..d.bytes).unwrap_or(&[]));
        }
        Raw(bytes)
    }

    /// Puts what differs into a state; what can't be changed stays.
    pub(super) fn store(&self, s: &mut CpuState, cr8: u8) {
        let mut rest = self.0.as_slice();
        for (n, d) in defs().iter().enumerate() {
            let Some((value, tail)) = rest.split_at_checked(d.bytes) else { return };
            rest = tail;
            let mut now = read(d.kind, s, cr8).to_le_bytes();
            now[d.bytes..].fill(0);
            if now.get(..d.bytes) != Some(value) {
                Number(n).store(s, value);
            }
        }
    }
}

impl Number {
    /// The register's bytes, as many as fit; gives how many.
    pub(super) fn fetch(self, s: &CpuState, cr8: u8, buf: &mut [u8]) -> usize {
        let Some(d) = defs().get(self.0) else { return 0 };
        let n = d.bytes.min(buf.len());
        let value = read(d.kind, s, cr8).to_le_bytes();
        buf.iter_mut().zip(value).take(n).for_each(|(b, v)| *b = v);
        n
    }

    /// False: there is no such register, or it can't be changed to that.
    pub(super) fn store(self, s: &mut CpuState, value: &[u8]) -> bool {
        let Some(d) = defs().get(self.0).filter(|d| d.bytes == value.len()) else { return false };
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(value).for_each(|(b, v)| *b = *v);
        write(d.kind, s, u128::from_le_bytes(bytes))
    }

    /// The new value of CR8, if it is that.
    pub(super) fn is_cr8(self) -> bool {
        defs().get(self.0).is_some_and(|d| d.kind == Kind::Cr(8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(name: &str) -> Number {
        Number(defs().iter().position(|d| d.name == name).expect("there is one"))
    }

    #[test]
    fn every_register_comes_back_as_it_was_written() {
        let mut s = CpuState::at_reset(true);
        let fixed = [
            "cs", "ss", "ds", "es", "fs", "gs", "cr0", "cr4", "cr8", "efer", "eflags", "mxcsr", "ftag",
            "fop", "fstat",
        ];
        for (n, d) in defs().iter().enumerate() {
            if fixed.contains(&d.name.as_str())
                || d.name.starts_with("dr")
                || d.kind == Kind::Fpu(3)
                || d.kind == Kind::Fpu(5)
            {
                continue;
            }
            let value: Vec<u8> = (0..d.bytes).map(|i| (n + i * 3) as u8).collect();
            if matches!(d.kind, Kind::Fpu(_)) {
                assert!(Number(n).store(&mut s, &[1, 2, 0, 0]));
                continue;
            }
            assert!(Number(n).store(&mut s, &value), "{}", d.name);
            let mut back = vec![0; d.bytes];
            assert_eq!(Number(n).fetch(&s, 0, &mut back), d.bytes);
            assert_eq!(back, value, "{}", d.name);
        }
        let mut other = CpuState::at_reset(true);
        let raw = Raw::fetch(&s, 0);
        raw.store(&mut other, 0);
        assert_eq!(Raw::fetch(&other, 0), raw);
        assert_eq!(raw.pc(), s.rip);
    }

    #[test]
    fn what_needs_more_than_a_value_is_refused() {
        let mut s = CpuState::at_reset(true);
        assert!(number("ds").store(&mut s, &0x1234u32.to_le_bytes()));
        assert_eq!((s.seg[3].selector, s.seg[3].base), (0x1234, 0x12340), "real mode");
        assert!(!number("cr0").store(&mut s, &1u64.to_le_bytes()), "protected mode needs more");
        s.cr0 |= cr0::PE;
        assert!(!number("ds").store(&mut s, &0x10u32.to_le_bytes()));
        assert!(!number("efer").store(&mut s, &0x500u64.to_le_bytes()));
        assert!(!Number(9999).store(&mut s, &[0]));
    }

    #[test]
    fn the_stack_of_the_fpu_is_relative_to_top() {
        let mut s = CpuState::at_reset(true);
        s.x87.fsw = 7 << 11;
        (s.x87.significand[7], s.x87.exponent[7], s.x87.ftw) = (1 << 63, 0x3fff, 0x80);
        let mut st0 = [0; 10];
        assert_eq!(number("st0").fetch(&s, 0, &mut st0), 10);
        assert_eq!(st0, [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        assert_eq!(tag_word(&s), 0x3fff);
        assert!(number("ftag").store(&mut s, &0xffffu32.to_le_bytes()));
        assert_eq!(s.x87.ftw, 0);
    }
}
