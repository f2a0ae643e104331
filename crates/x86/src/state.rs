//! The architectural state of one logical processor.
//!
//! Sources: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM), volumes 1, 3A and 4; AMD64
//! Architecture Programmer's Manual (APM), volume 2.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Index of a segment register, in the encoding order of the instruction set (SDM vol. 2, table 2-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Seg {
    /// Extra segment.
    Es = 0,
    /// Code segment.
    Cs = 1,
    /// Stack segment.
    Ss = 2,
    /// Data segment.
    Ds = 3,
    /// Additional segment with a base of its own in 64-bit mode.
    Fs = 4,
    /// Additional segment with a base of its own in 64-bit mode.
    Gs = 5,
}

/// Indices of the general registers in [`CpuState::gpr`], in encoding order.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// A segment register with its hidden part (SDM vol. 3A §3.4.3), or LDTR / TR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, already scaled by the granularity bit: the highest valid offset (expand-up).
    pub limit: u32,
    /// Attributes as in the descriptor's upper dword, bits 8..=23 shifted down to 0..=15: type 0-3, S 4, DPL 5-6,
    /// P 7, (limit bits 8-11 zero), AVL 12, L 13, D/B 14, G 15. This is also VMX's access-rights layout.
    pub attr: u16,
    /// The visible selector.
    pub selector: u16,
    /// True when a null selector was loaded: every use through it faults outside 64-bit mode.
    pub unusable: bool,
}

impl Segment {
    /// Descriptor type (4 bits).
    pub fn kind(&self) -> u8 {
        (self.attr & 0xf) as u8
    }
    /// S bit: code or data (true), system (false).
    pub fn is_code_or_data(&self) -> bool {
        self.attr & 0x10 != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    /// Present bit.
    pub fn present(&self) -> bool {
        self.attr & 0x80 != 0
    }
    /// L bit: 64-bit code segment.
    pub fn long(&self) -> bool {
        self.attr & 0x2000 != 0
    }
    /// D/B bit: 32-bit default operand size, or a 32-bit stack.
    pub fn big(&self) -> bool {
        self.attr & 0x4000 != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Highest valid offset.
    pub limit: u16,
}

/// What the processor is doing between instructions (SDM vol. 3C §24.4.2 "activity state").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// In HLT (or MWAIT): waits for an interrupt.
    Halted,
    /// After INIT on an application processor: waits for a start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// One 512-bit vector register; its low 128 bits are XMM, its low 256 bits YMM.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C, align(64))]
#[derive(Default)]
pub struct Vector(pub [u64; 8]);

impl std::fmt::Debug for Vector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0x")?;
        self.0.iter().rev().try_for_each(|q| write!(f, "{q:016x}"))
    }
}

/// The x87 FPU (SDM vol. 1 §8.1). Registers are in physical order (R0..R7), not relative to TOP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct X87 {
    /// Significand of R0..R7.
    pub significand: [u64; 8],
    /// Sign and exponent of R0..R7.
    pub exponent: [u16; 8],
    /// Control word.
    pub fcw: u16,
    /// Status word, with TOP in bits 11-13.
    pub fsw: u16,
    /// Abridged tag: bit i set when Ri is not empty.
    pub ftw: u8,
    /// Last opcode (11 bits).
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// Last instruction's CS selector (FCS).
    pub fcs: u16,
    /// Last data segment selector (FDS).
    pub fds: u16,
}

impl Default for X87 {
    /// State after FNINIT.
    fn default() -> Self {
        X87 {
            significand: [0; 8],
            exponent: [0; 8],
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            fcs: 0,
            fds: 0,
        }
    }
}

/// Model-specific registers that hold plain state (SDM vol. 4).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Msrs {
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub apic_base: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub feature_control: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [[u64; 2]; 8],
    pub mcg_status: u64,
    pub mcg_ctl: u64,
    pub mc_banks: Vec<[u64; 4]>,
    pub tsc_adjust: u64,
    pub tsc_deadline: u64,
    pub xss: u64,
    pub debugctl: u64,
    pub bios_sign_id: u64,
    pub smbase: u64,
    /// Registers that only keep what is written to them (AMD's HWCR, SYSCFG, TSEG and their kin), by number.
    pub other: BTreeMap<u32, u64>,
}

/// The architectural state. `repr(C)` with the general registers first, because generated code addresses them by
/// constant displacements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[repr(C)]
pub struct CpuState {
    /// General registers in encoding order: rax rcx rdx rbx rsp rbp rsi rdi r8..r15.
    pub gpr: [u64; 16],
    /// Instruction pointer (offset in CS).
    pub rip: u64,
    /// RFLAGS; bit 1 always set.
    pub rflags: u64,
    /// Segment registers, indexed by [`Seg`].
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: Table,
    /// Interrupt descriptor table.
    pub idtr: Table,
    /// Control registers. CR8 lives in the local APIC's task priority.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base and PCID.
    pub cr3: u64,
    /// Feature control.
    pub cr4: u64,
    /// Extended control register 0 (XSAVE features).
    pub xcr0: u64,
    /// Protection keys, user.
    pub pkru: u32,
    /// Extended feature enable register.
    pub efer: u64,
    /// Debug registers DR0-DR3, then DR6 and DR7 at 6 and 7 (4 and 5 unused).
    pub dr: [u64; 8],
    /// x87 and MMX registers.
    pub x87: X87,
    /// SSE control and status.
    pub mxcsr: u32,
    /// Vector registers ZMM0-31.
    pub vec: [Vector; 32],
    /// Opmask registers.
    pub opmask: [u64; 8],
    /// PDPTE registers of PAE paging, loaded at MOV CR3 (SDM vol. 3A §4.4.1).
    pub pdpte: [u64; 4],
    /// Plain model-specific registers.
    pub msr: Msrs,
    /// Added to the machine's TSC clock to give this processor's TSC.
    pub tsc_offset: u64,
    /// Activity between instructions.
    pub activity: Activity,
    /// Interrupts inhibited for one instruction (STI, MOV SS, POP SS): SDM vol. 3A §6.8.3.
    pub shadow: Shadow,
    /// NMIs blocked until IRET (SDM vol. 3A §6.7.1).
    pub nmi_blocked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// True in system-management mode.
    pub smm: bool,
    /// An event that was being delivered when the processor stopped (KVM's `kvm_vcpu_events`), to be delivered first.
    pub injected: Option<Injected>,
    /// Instructions retired since power-on.
    pub icount: u64,
}

/// Which instruction cast an interrupt shadow on the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shadow {
    /// No shadow.
    #[default]
    None,
    /// After STI: maskable interrupts wait one instruction.
    Sti,
    /// After MOV SS or POP SS: interrupts, NMI and debug traps wait one instruction.
    MovSs,
}

/// An event taken up for delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injected {
    /// Vector.
    pub vector: u8,
    /// What it is.
    pub kind: EventKind,
    /// Error code, if the vector pushes one.
    pub error: Option<u32>,
}

/// Kinds of event, which decide privilege checks and the return address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// Maskable external interrupt.
    External,
    /// Non-maskable interrupt.
    Nmi,
    /// Processor exception.
    Exception,
    /// INT n, INT3, INTO, INT1.
    Software,
}

/// RFLAGS bits.
#[allow(missing_docs)]
pub mod flag {
    pub const CF: u64 = 1 << 0;
    pub const ONE: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
#[allow(missing_docs)]
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// EFER bits.
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const FFXSR: u64 = 1 << 14;
}

impl Default for CpuState {
    fn default() -> Self {
        CpuState::at_reset(true)
    }
}

impl CpuState {
    /// State after RESET (SDM vol. 3A table 9-1): real mode, CS base 0xffff0000, RIP 0xfff0. The bootstrap processor
    /// runs; an application processor waits for a start-up IPI.
    pub fn at_reset(bootstrap: bool) -> CpuState {
        let data = Segment { base: 0, limit: 0xffff, attr: 0x93, selector: 0, unusable: false };
        let code =
            Segment { base: 0xffff_0000, limit: 0xffff, attr: 0x9b, selector: 0xf000, unusable: false };
        CpuState {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: flag::ONE,
            seg: [data, code, data, data, data, data],
            ldtr: Segment { attr: 0x82, limit: 0xffff, ..Segment::default() },
            tr: Segment { attr: 0x8b, limit: 0xffff, ..Segment::default() },
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            pkru: 0,
            efer: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            x87: X87 { fcw: 0x40, ftw: 0xff, ..X87::default() },
            mxcsr: 0x1f80,
            vec: [Vector::default(); 32],
            opmask: [0; 8],
            pdpte: [0; 4],
            msr: Msrs {
                apic_base: 0xfee0_0800 | if bootstrap { 0x100 } else { 0 },
                pat: 0x0007_0406_0007_0406,
                misc_enable: 1,
                smbase: 0x3_0000,
                ..Msrs::default()
            },
            tsc_offset: 0,
            activity: if bootstrap { Activity::Running } else { Activity::WaitForSipi },
            shadow: Shadow::None,
            nmi_blocked: false,
            nmi_pending: false,
            smm: false,
            injected: None,
            icount: 0,
        }
    }
}
