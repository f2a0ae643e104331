//! Plans: how one instruction encoding is executed on the host, with the thunk that does it.
//!
//! A thunk is a leaf function `fn(state, buffer)`: it loads the registers that the instruction names from the guest's
//! state, runs the instruction with its memory operand at `buffer`, stores the registers back and returns. Guest vector,
//! opmask and MMX registers have the same number on the host; all of them belong to the callee in the System V ABI.
//!
//! Why no thunk can raise SIGILL: it is made only when the host has every CPUID feature of the instruction and its system
//! enabled the state (`features`), and the rewritten bytes decode, in 64-bit mode, to the same iced code. Why none can raise
//! SIGFPE: MXCSR has all exceptions masked while it runs (`simd`), and x87 instructions run only without a pending exception
//! and are followed by none that waits. Why none can raise SIGSEGV: its only memory operands are the state and the buffer,
//! which is at least as large as any operand and aligned to 64 bytes.

use super::arena;
use super::encode::{Form, Parts, Rewrite, encode, split};
use super::features::{host_features, host_has};
use crate::state::{CpuState, X87};
use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, Instruction, InstructionInfoFactory, MemorySize, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits, RoundingControl,
};
use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::{Mutex, OnceLock};

/// A thunk. For x87 instructions the state argument is the address of an x87 image instead.
pub(super) type Entry = unsafe extern "sysv64" fn(*mut CpuState, *mut u8);

/// Which architectural rules decide whether the instruction may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// x87.
    X87,
    /// MMX registers and no vector registers: CR0.EM and CR0.TS.
    Mmx,
    /// Legacy SSE: also CR4.OSFXSR.
    Sse,
    /// Legacy SSE that also uses MMX registers.
    SseMmx,
    /// VEX: CR4.OSXSAVE and XCR0[2:1].
    Vex,
    /// EVEX, and VEX instructions on opmask registers: also XCR0[7:5].
    Evex,
}

/// What happens to the memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    None,
    Load,
    Store,
}

/// EVEX masking of the memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mask {
    /// Opmask register, 1-7.
    pub register: u8,
    /// Bytes of one element in memory.
    pub element: u8,
    /// Mask bit `i` governs element `i` (otherwise: contiguous elements, as many as mask bits are set).
    pub compressed: bool,
    /// Masked-out elements never fault.
    pub suppresses: bool,
    /// One element in memory serves all lanes.
    pub broadcast: bool,
    /// The mask bits that the instruction looks at.
    pub lanes: u64,
}

/// How one encoding is executed.
#[derive(Debug)]
pub struct Plan {
    /// The thunk in the arena, or None: then `code` runs in the scratch slot.
    pub(super) entry: Option<Entry>,
    /// x87 only: the thunk for when the guest's x87 state is in the host's registers. Its first argument is the address of the flags.
    pub(super) live: Option<Entry>,
    /// The bytes of that one, kept only without an entry.
    pub(super) live_code: Box<[u8]>,
    /// The thunk's bytes, kept only without an entry.
    pub(super) code: Box<[u8]>,
    pub(super) class: Class,
    pub(super) memory: Memory,
    /// Bytes of the memory operand.
    pub(super) size: u16,
    /// Alignment that the operand's linear address must have (1: any).
    pub(super) align: u16,
    /// Reads or writes MXCSR.
    pub(super) simd: bool,
    /// Suppresses all SIMD exceptions: raises no flags, and MXCSR's masks count as set.
    pub(super) suppresses: bool,
    /// Reads or writes arithmetic flags in RFLAGS.
    pub(super) flags: bool,
    /// Bit i: MM register i is written.
    pub(super) mmx_written: u8,
    pub(super) mask: Option<Mask>,
}

/// The largest memory operand of a thunk.
pub(super) const BUFFER: usize = 64;

/// What a plan depends on: the instruction with its memory operand replaced, its explicit general register, the mode.
type Key = ([u8; 16], Option<Register>, bool, Code);

/// What `find` gives.
pub(super) enum Found {
    /// The plan, for ever.
    Plan(&'static Plan),
    /// There are too many: [`temporary`] makes one for each execution.
    Full,
    /// This host can't run it.
    Unsupported,
}

/// Plans live for ever, because decoded instructions point at them; so there is a bound.
const MOST: usize = 1 << 18;

/// The plan for an instruction, made at the first request.
pub(super) fn find(i: &Instruction, bytes: &[u8], bits: u32) -> Found {
    static PLANS: OnceLock<Mutex<HashMap<Key, Option<&'static Plan>>>> = OnceLock::new();
    let Some(key) = key(i, bytes, bits) else { return Found::Unsupported };
    let mut plans =
        PLANS.get_or_init(Default::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let known = plans.get(&key).copied();
    let plan = match known {
        Some(plan) => plan,
        None if plans.len() >= MOST => return Found::Full,
        None => {
            let Some(mut plan) = make(i, bytes, bits) else {
                plans.insert(key, None);
                return Found::Unsupported;
            };
            let put = |code: &[u8]| arena::lock().ok().and_then(|mut arena| arena.add(code));
            let Some(at) = put(&plan.code) else { return Found::Full };
            if !plan.live_code.is_empty()
                && let Some(at) = put(&plan.live_code)
            {
                // SAFETY: `at` is the start of a whole function of this type, in memory that never changes again.
                plan.live = Some(unsafe { std::mem::transmute::<*const u8, Entry>(at) });
                plan.live_code = Box::default();
            }
            // SAFETY: `at` is the start of a whole function of this type, in memory that never changes again.
            plan.entry = Some(unsafe { std::mem::transmute::<*const u8, Entry>(at) });
            plan.code = Box::default();
            let plan: Option<&'static Plan> = Some(Box::leak(Box::new(plan)));
            plans.insert(key, plan);
            plan
        }
    };
    plan.map_or(Found::Unsupported, Found::Plan)
}

/// A plan that nobody keeps; its thunk runs in the scratch slot.
pub(super) fn temporary(i: &Instruction, bytes: &[u8], bits: u32) -> Option<Plan> {
    make(i, bytes, bits)
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

fn explicit_general(i: &Instruction) -> Option<Register> {
    (0..i.op_count())
        .filter(|&n| i.op_kind(n) == OpKind::Register)
        .map(|n| i.op_register(n))
        .find(|register| register.is_gpr())
}

fn key(i: &Instruction, bytes: &[u8], bits: u32) -> Option<Key> {
    let parts = split(bytes, bits)?;
    let how = Rewrite { long: bits == 64, memory: has_memory(i), ..Rewrite::default() };
    let mut key = [0; 16];
    let code = encode(&parts, how);
    key.get_mut(..code.len())?.copy_from_slice(&code);
    Some((key, explicit_general(i), bits == 64, i.code()))
}

/// The class of an instruction, None when it isn't executed by a thunk.
pub(crate) fn class_of(code: Code) -> Option<Class> {
    let features = code.cpuid_features();
    if features.is_empty() || !features.iter().all(|&f| host_has(f) == Some(true)) {
        return None;
    }
    use iced_x86::CpuidFeature as F;
    let any = |wanted: &[F]| features.iter().any(|f| wanted.contains(f));
    Some(match code.encoding() {
        EncodingKind::Legacy if any(&[F::FPU, F::FPU287, F::FPU387]) => Class::X87,
        EncodingKind::Legacy if any(&[F::CMOV, F::FXSR, F::XSAVE, F::XSAVEOPT, F::XSAVEC, F::XSAVES]) => {
            return None;
        }
        EncodingKind::Legacy => Class::Sse,
        EncodingKind::VEX if format!("{:?}", code.mnemonic()).starts_with('K') => Class::Evex,
        EncodingKind::VEX => Class::Vex,
        EncodingKind::EVEX => Class::Evex,
        _ => return None,
    })
}

/// Whether the instruction may raise SIMD floating-point exceptions or depends on MXCSR's controls. May say yes too often.
fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    let name = format!("{mnemonic:?}").to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    [
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "cvt", "round", "hadd",
        "hsub", "dp", "f", "getexp", "getmant", "range", "reduce", "rndscale", "scalef", "rcp", "rsqrt",
    ]
    .iter()
    .any(|p| name.starts_with(p))
}

/// Legacy SSE instructions with a 16-byte operand that needn't be aligned (SDM vol. 2, exception type 4 notes).
fn legacy_unaligned(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    match mnemonic {
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => true,
        M::Pcmpestri | M::Pcmpestrm | M::Pcmpistri | M::Pcmpistrm | M::Pcmpestri64 | M::Pcmpestrm64 => true,
        // Intel's manual says exception type 4, with alignment; AMD's processors take any address.
        M::Sha1msg1
        | M::Sha1msg2
        | M::Sha1nexte
        | M::Sha1rnds4
        | M::Sha256msg1
        | M::Sha256msg2
        | M::Sha256rnds2 => host_features().amd,
        _ => false,
    }
}

/// VEX and EVEX instructions that need an aligned operand (exception types 1 and E1).
fn vex_aligned(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovdqa32
            | M::Vmovdqa64
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    )
}

pub(crate) fn alignment(i: &Instruction, class: Class, size: usize) -> u16 {
    let aligned = match class {
        Class::Sse | Class::SseMmx => size == 16 && !legacy_unaligned(i.mnemonic()),
        Class::Vex | Class::Evex => vex_aligned(i.mnemonic()),
        Class::X87 | Class::Mmx => false,
    };
    if aligned { size as u16 } else { 1 }
}

/// Fault suppression of a masked EVEX memory operand (SDM vol. 2 §2.7.6: exception types E*NF have none).
fn mask_of(i: &Instruction, memory: MemorySize) -> Option<Mask> {
    use Mnemonic as M;
    if i.op_mask() == Register::None || i.code().encoding() != EncodingKind::EVEX {
        return None;
    }
    let name = format!("{:?}", i.mnemonic());
    let compressed = name.contains("expand") || name.contains("compress");
    // Instructions whose elements don't correspond one to one with mask bits (E4NF, E6NF, E9NF): the whole operand is read.
    let whole = [
        "Vpack",
        "Vpunpck",
        "Vunpck",
        "Vpshuf",
        "Vshuf",
        "Vpalignr",
        "Valign",
        "Vdbpsadbw",
        "Vpmaddwd",
        "Vpmaddubsw",
        "Vbroadcastf32x",
        "Vbroadcastf64x",
        "Vbroadcasti32x",
        "Vbroadcasti64x",
        "Vpslldq",
        "Vpsrldq",
        "Vmovddup",
        "Vmovshdup",
        "Vmovsldup",
        "Vperm",
        "Vpconflict",
        "Vgf2p8affine",
        "Vpmultishift",
        "Vpshufbitqmb",
        "Vcvtne2ps2bf16",
    ]
    .iter()
    .any(|p| name.starts_with(p));
    let shift = matches!(
        i.mnemonic(),
        M::Vpsllw
            | M::Vpslld
            | M::Vpsllq
            | M::Vpsrlw
            | M::Vpsrld
            | M::Vpsrlq
            | M::Vpsraw
            | M::Vpsrad
            | M::Vpsraq
    ) && i.op_kind(i.op_count() - 1) == OpKind::Memory
        && memory.size() == 16
        && i.op_register(0) != Register::None;
    let element = match i.mnemonic() {
        _ if i.is_broadcast() || memory.element_size() == 0 => memory.size(),
        // Several elements of memory make one of the destination.
        M::Vpmuldq | M::Vpmuludq => 8,
        _ if name.starts_with("Vpdp") || name.starts_with("Vdp") => 4,
        _ => memory.element_size(),
    };
    let broadcast = i.is_broadcast() || name.starts_with("Vbroadcast") || name.starts_with("Vpbroadcast");
    let lanes = if i.is_broadcast() {
        let mut whole = *i;
        whole.set_is_broadcast(false);
        whole.memory_size().size() / element.max(1)
    } else {
        i.op_register(0).size() / element.max(1)
    };
    Some(Mask {
        register: i.op_mask().number() as u8,
        broadcast,
        lanes: if lanes >= 64 { !0 } else { (1 << lanes) - 1 },
        element: element as u8,
        compressed,
        suppresses: !whole && !shift,
    })
}

fn make(i: &Instruction, bytes: &[u8], bits: u32) -> Option<Plan> {
    let mut class = class_of(i.code())?;
    let parts = split(bytes, bits)?;
    let has_memory = has_memory(i);
    if has_memory && (i.is_vsib() || i.memory_size().size() > BUFFER || i.memory_size().size() == 0) {
        return None;
    }
    let general = |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr();
    // The one explicit general register of these instructions is either in ModRM.reg or in ModRM.rm: try both.
    let explicit = explicit_general(i);
    let tries: &[(Option<u8>, Option<u8>)] = if explicit.is_some() && class != Class::X87 {
        &[(None, Some(1)), (Some(1), None)]
    } else {
        &[(None, None)]
    };
    for &(reg, rm) in tries {
        if rm.is_some() && (has_memory || parts.modrm? >> 6 != 3) {
            continue;
        }
        // Which field holds it: the encoding's own number must agree.
        if let (Some(register), Some(modrm)) = (explicit, parts.modrm) {
            let field = if rm.is_some() { modrm & 7 } else { modrm >> 3 & 7 };
            if register.number() as u8 & 7 != field {
                continue;
            }
        }
        let how = Rewrite {
            long: bits == 64,
            memory: has_memory,
            reg,
            rm,
            clear_w: bits != 64 && explicit.is_some(),
        };
        let code = encode(&parts, how);
        let mut decoder = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE);
        let canonical = decoder.decode();
        if canonical.code() != i.code() || canonical.len() != code.len() {
            continue;
        }
        let still_general = (0..canonical.op_count())
            .filter(|&n| canonical.op_kind(n) == OpKind::Register && canonical.op_register(n).is_gpr())
            .all(|n| canonical.op_register(n).number() == 1);
        if explicit.is_some() && class != Class::X87 && !still_general {
            continue;
        }
        // Every other register must have come through unchanged.
        let same = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register && !general(n)).all(|n| {
            canonical.op_kind(n) == OpKind::Register && canonical.op_register(n) == i.op_register(n)
        });
        if !same || canonical.op_mask() != i.op_mask() {
            continue;
        }
        return finish(i, &canonical, &code, &parts, &mut class, explicit);
    }
    None
}

fn finish(
    i: &Instruction,
    canonical: &Instruction,
    code: &[u8],
    parts: &Parts<'_>,
    class: &mut Class,
    explicit: Option<Register>,
) -> Option<Plan> {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(canonical);
    let mut e = Emitter::default();
    let (mut stores, mut mmx_written, mut mmx_used, mut vector_used) = (Vec::new(), 0_u8, false, false);
    let evex = matches!(parts.form, Form::Evex(_));
    let mut seen = Vec::new();
    for used in info.used_registers() {
        let register = used.register();
        let writes = matches!(
            used.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        let number = register.number() as u8;
        if register.is_vector_register() {
            vector_used = true;
            let wide = match parts.form {
                Form::Legacy { .. } => Width::Xmm,
                _ if evex => Width::Zmm,
                _ if register.is_xmm() => Width::VexXmm,
                _ => Width::Ymm,
            };
            // Loaded even when only written: partial writes keep the rest.
            if !seen.contains(&(0, number)) {
                seen.push((0, number));
                e.vector(wide, true, number);
            }
            if writes && !stores.contains(&(0, number)) {
                stores.push((0, number));
            }
        } else if register.is_mm() {
            mmx_used = true;
            if !seen.contains(&(1, number)) {
                seen.push((1, number));
                e.mm(true, number);
            }
            if writes {
                mmx_written |= 1 << number;
                stores.push((1, number));
            }
        } else if register.is_k() {
            if !seen.contains(&(2, number)) {
                seen.push((2, number));
                e.opmask(true, number);
            }
            if writes {
                stores.push((2, number));
            }
        } else if register.is_gpr() && *class != Class::X87 {
            let host = number;
            if host == 6 {
                // The address of the buffer.
                continue;
            }
            let guest = match explicit {
                Some(register) if host == 1 => register.number() as u8,
                None if host <= 2 => host,
                _ => return None,
            };
            if !seen.contains(&(3, host)) {
                seen.push((3, host));
                e.general(true, host, guest);
            }
            if writes {
                stores.push((3, host | guest << 3));
            }
        }
    }
    match (*class, mmx_used, vector_used) {
        // Conversions follow SSE's rules even with a memory operand instead of an XMM register.
        (Class::Sse, true, false) if !format!("{:?}", i.mnemonic()).starts_with("Cvt") => *class = Class::Mmx,
        (Class::Sse, true, false) => *class = Class::SseMmx,
        (Class::Sse, true, true) => *class = Class::SseMmx,
        // PSHUFW and others of SSE on MMX registers only follow MMX's rules, EMMS as well.
        (Class::Sse, false, _) if i.mnemonic() == Mnemonic::Emms => *class = Class::Mmx,
        _ => {}
    }
    let reads_flags = canonical.rflags_read() != 0;
    let writes_flags = canonical.rflags_modified() & (RflagsBits::CF | RflagsBits::ZF | RflagsBits::OF) != 0;
    if *class == Class::X87 {
        return Some(x87_plan(i, code, reads_flags, writes_flags));
    }
    e.bytes.extend_from_slice(code);
    for (kind, number) in stores {
        match kind {
            0 if matches!(parts.form, Form::Legacy { .. }) => e.vector(Width::Xmm, false, number),
            // Everything above the result is zero: the whole register is stored.
            0 if host_features().avx512 => e.vector(Width::Zmm, false, number),
            0 => e.vector(Width::Ymm, false, number),
            1 => e.mm(false, number),
            2 => e.opmask(false, number),
            _ => e.general(false, number & 7, number >> 3),
        }
    }
    if writes_flags {
        e.store_flags();
    }
    if mmx_used {
        e.bytes.extend([0x0f, 0x77]);
    }
    if !matches!(parts.form, Form::Legacy { .. }) {
        // vzeroupper: legacy SSE code of the caller runs without merging penalties.
        e.bytes.extend([0xc5, 0xf8, 0x77]);
    }
    e.bytes.push(0xc3);
    let memory = memory_use(i);
    let size = if memory == Memory::None { 0 } else { i.memory_size().size() };
    let mut plan = place(e.bytes);
    plan.class = *class;
    plan.memory = memory;
    plan.size = size as u16;
    plan.align = alignment(i, *class, size);
    plan.simd = *class != Class::Mmx && uses_mxcsr(i.mnemonic());
    // The approximations raise nothing at all, but obey DAZ and FTZ.
    let name = format!("{:?}", i.mnemonic());
    let approximate = ["Rcp", "Rsqrt", "Vrcp", "Vrsqrt"].iter().any(|p| name.starts_with(p));
    plan.suppresses =
        approximate || i.suppress_all_exceptions() || i.rounding_control() != RoundingControl::None;
    plan.flags = reads_flags || writes_flags;
    plan.mmx_written = mmx_written;
    plan.mask = if memory == Memory::None { None } else { mask_of(i, i.memory_size()) };
    Some(plan)
}

fn memory_use(i: &Instruction) -> Memory {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Memory {
            return match info.op_access(n) {
                OpAccess::Write | OpAccess::CondWrite => Memory::Store,
                _ => Memory::Load,
            };
        }
    }
    Memory::None
}

fn x87_plan(i: &Instruction, code: &[u8], reads_flags: bool, writes_flags: bool) -> Plan {
    let mut e = Emitter::default();
    // The first argument is an `X87Run`: image, then the guest's RFLAGS at X87_FLAGS.
    e.bytes.extend([0xdd, 0x27]); // frstor [rdi]
    if reads_flags {
        // mov eax, [rdi + X87_FLAGS]; shl eax, 8; sahf
        e.bytes.extend([0x8b, 0x47, super::x87::FLAGS_OFFSET as u8, 0xc1, 0xe0, 0x08, 0x9e]);
    }
    e.bytes.extend_from_slice(code);
    if writes_flags {
        // pushfq; pop rax; mov [rdi + X87_FLAGS], eax
        e.bytes.extend([0x9c, 0x58, 0x89, 0x47, super::x87::FLAGS_OFFSET as u8]);
    }
    e.bytes.extend([0xdd, 0x37, 0xc3]); // fnsave [rdi]; ret
    // The same without the image: the flags are at [rdi].
    let mut live = Vec::new();
    if reads_flags {
        live.extend([0x8b, 0x07, 0xc1, 0xe0, 0x08, 0x9e]); // mov eax, [rdi]; shl eax, 8; sahf
    }
    live.extend_from_slice(code);
    if writes_flags {
        live.extend([0x9c, 0x58, 0x89, 0x07]); // pushfq; pop rax; mov [rdi], eax
    }
    live.push(0xc3);
    let memory = memory_use(i);
    let mut plan = place(e.bytes);
    plan.live_code = live.into();
    plan.class = Class::X87;
    plan.memory = memory;
    plan.size = if memory == Memory::None { 0 } else { i.memory_size().size() as u16 };
    plan.flags = reads_flags || writes_flags;
    plan
}

fn place(code: Vec<u8>) -> Plan {
    Plan {
        entry: None,
        live: None,
        live_code: Box::default(),
        code: code.into(),
        class: Class::Sse,
        memory: Memory::None,
        size: 0,
        align: 1,
        simd: false,
        suppresses: false,
        flags: false,
        mmx_written: 0,
        mask: None,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Xmm,
    VexXmm,
    Ymm,
    Zmm,
}

#[derive(Default)]
struct Emitter {
    bytes: Vec<u8>,
}

impl Emitter {
    /// ModRM for `[rdi + disp32]`.
    fn operand(&mut self, register: u8, displacement: usize) {
        self.bytes.push(0x80 | (register & 7) << 3 | 7);
        self.bytes.extend((displacement as u32).to_le_bytes());
    }

    /// MOVUPS / VMOVUPS between a vector register and the state.
    fn vector(&mut self, width: Width, load: bool, n: u8) {
        let opcode = if load { 0x10 } else { 0x11 };
        let low = n & 8 == 0;
        match width {
            Width::Xmm => {
                if !low {
                    self.bytes.push(0x44);
                }
                self.bytes.extend([0x0f, opcode]);
            }
            Width::VexXmm => self.bytes.extend([0xc5, if low { 0xf8 } else { 0x78 }, opcode]),
            Width::Ymm => self.bytes.extend([0xc5, if low { 0xfc } else { 0x7c }, opcode]),
            Width::Zmm => {
                let p0 = if low { 0x80 } else { 0 } | 0x60 | if n & 16 == 0 { 0x10 } else { 0 } | 1;
                self.bytes.extend([0x62, p0, 0x7c, 0x48, opcode]);
            }
        }
        self.operand(n, offset_of!(CpuState, vec) + usize::from(n) * 64);
    }

    /// MOVQ between an MMX register and the significand of the x87 register with its number.
    fn mm(&mut self, load: bool, n: u8) {
        self.bytes.extend([0x0f, if load { 0x6f } else { 0x7f }]);
        self.operand(n, offset_of!(CpuState, x87) + offset_of!(X87, significand) + usize::from(n) * 8);
    }

    /// KMOVQ between an opmask register and the state.
    fn opmask(&mut self, load: bool, n: u8) {
        self.bytes.extend([0xc4, 0xe1, 0xf8, if load { 0x90 } else { 0x91 }]);
        self.operand(n, offset_of!(CpuState, opmask) + usize::from(n) * 8);
    }

    /// 64-bit MOV between a host register (0-2) and a guest general register.
    fn general(&mut self, load: bool, host: u8, guest: u8) {
        self.bytes.extend([0x48, if load { 0x8b } else { 0x89 }]);
        self.operand(host, offset_of!(CpuState, gpr) + usize::from(guest) * 8);
    }

    /// The six arithmetic flags to the guest's RFLAGS, through rax and rcx.
    fn store_flags(&mut self) {
        let at = offset_of!(CpuState, rflags);
        self.bytes.extend([0x9c, 0x58]); // pushfq; pop rax
        self.bytes.extend([0x25, 0xd5, 0x08, 0, 0]); // and eax, 0x8d5
        self.bytes.extend([0x48, 0x8b]); // mov rcx, [rdi + rflags]
        self.operand(1, at);
        self.bytes.extend([0x48, 0x81, 0xe1, 0x2a, 0xf7, 0xff, 0xff]); // and rcx, ~0x8d5
        self.bytes.extend([0x48, 0x09, 0xc1]); // or rcx, rax
        self.bytes.extend([0x48, 0x89]); // mov [rdi + rflags], rcx
        self.operand(1, at);
    }
}
