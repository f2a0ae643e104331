//! What the host can execute.

use iced_x86::CpuidFeature;
use std::sync::OnceLock;

/// Vector and floating-point abilities of the host, as far as they can be offered to a guest: the processor has them and
/// the host's operating system enabled their state. CPUID leaves must not offer more than this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HostFeatures {
    pub sse3: bool,
    pub ssse3: bool,
    pub sse4_1: bool,
    pub sse4_2: bool,
    pub sse4a: bool,
    pub aes: bool,
    pub pclmulqdq: bool,
    pub sha: bool,
    pub gfni: bool,
    pub avx: bool,
    pub avx2: bool,
    pub fma: bool,
    pub f16c: bool,
    pub vaes: bool,
    pub vpclmulqdq: bool,
    pub avx_vnni: bool,
    pub avx_ifma: bool,
    pub avx_ne_convert: bool,
    pub avx_vnni_int8: bool,
    pub avx_vnni_int16: bool,
    /// AVX512F together with BW, DQ, CD and VL: offered as a whole or not at all, because thunks move opmask
    /// registers with the 64-bit forms.
    pub avx512: bool,
    pub avx512_ifma: bool,
    pub avx512_vbmi: bool,
    pub avx512_vbmi2: bool,
    pub avx512_vnni: bool,
    pub avx512_bitalg: bool,
    pub avx512_vpopcntdq: bool,
    pub avx512_bf16: bool,
    pub avx512_vp2intersect: bool,
    pub avx512_fp16: bool,
    /// MXCSR bits that may be set without a fault.
    pub mxcsr_mask: u32,
    /// The processor is AMD's or Hygon's.
    pub amd: bool,
}

/// The host's abilities, probed once.
pub fn host_features() -> &'static HostFeatures {
    static FEATURES: OnceLock<HostFeatures> = OnceLock::new();
    FEATURES.get_or_init(probe)
}

fn probe() -> HostFeatures {
    use std::arch::is_x86_feature_detected as has;
    // Not under is_x86_feature_detected's stable names.
    let leaf_7_1 = match std::arch::x86_64::__cpuid(0).eax {
        0..7 => None,
        _ if std::arch::x86_64::__cpuid_count(7, 0).eax < 1 => None,
        _ => Some(std::arch::x86_64::__cpuid_count(7, 1)),
    };
    let sub = |register: fn(&std::arch::x86_64::CpuidResult) -> u32, bit: u32| {
        has!("avx2") && leaf_7_1.as_ref().is_some_and(|leaf| register(leaf) >> bit & 1 != 0)
    };
    let avx512 =
        has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512cd") && has!("avx512vl");
    HostFeatures {
        sse3: has!("sse3"),
        ssse3: has!("ssse3"),
        sse4_1: has!("sse4.1"),
        sse4_2: has!("sse4.2"),
        sse4a: has!("sse4a"),
        aes: has!("aes"),
        pclmulqdq: has!("pclmulqdq"),
        sha: has!("sha"),
        gfni: has!("gfni"),
        avx: has!("avx"),
        avx2: has!("avx2"),
        fma: has!("fma"),
        f16c: has!("f16c"),
        vaes: has!("vaes"),
        vpclmulqdq: has!("vpclmulqdq"),
        avx_vnni: sub(|l| l.eax, 4),
        avx_ifma: sub(|l| l.eax, 23),
        avx_ne_convert: sub(|l| l.edx, 5),
        avx_vnni_int8: sub(|l| l.edx, 4),
        avx_vnni_int16: sub(|l| l.edx, 10),
        avx512,
        avx512_ifma: avx512 && has!("avx512ifma"),
        avx512_vbmi: avx512 && has!("avx512vbmi"),
        avx512_vbmi2: avx512 && has!("avx512vbmi2"),
        avx512_vnni: avx512 && has!("avx512vnni"),
        avx512_bitalg: avx512 && has!("avx512bitalg"),
        avx512_vpopcntdq: avx512 && has!("avx512vpopcntdq"),
        avx512_bf16: avx512 && has!("avx512bf16"),
        avx512_vp2intersect: avx512 && has!("avx512vp2intersect"),
        avx512_fp16: avx512 && has!("avx512fp16"),
        // Bits 0-15; the misaligned-SSE bit 17 of AMD processors is not offered.
        mxcsr_mask: 0xffff,
        // "Auth" or "Hygo".
        amd: matches!(std::arch::x86_64::__cpuid(0).ebx, 0x6874_7541 | 0x6f67_7948),
    }
}

/// Whether the host executes instructions of this feature. None: the feature isn't this module's.
pub(super) fn host_has(feature: CpuidFeature) -> Option<bool> {
    let f = host_features();
    Some(match feature {
        // Part of every x86-64 processor.
        CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::CMOV
        | CpuidFeature::MMX
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::FXSR => true,
        // Done in Rust, whatever the host has.
        CpuidFeature::XSAVE | CpuidFeature::XSAVEOPT | CpuidFeature::XSAVEC | CpuidFeature::XSAVES => true,
        CpuidFeature::SSE3 => f.sse3,
        CpuidFeature::SSSE3 => f.ssse3,
        CpuidFeature::SSE4_1 => f.sse4_1,
        CpuidFeature::SSE4_2 => f.sse4_2,
        CpuidFeature::SSE4A => f.sse4a,
        CpuidFeature::AES => f.aes,
        CpuidFeature::PCLMULQDQ => f.pclmulqdq,
        CpuidFeature::SHA => f.sha,
        CpuidFeature::GFNI => f.gfni,
        CpuidFeature::AVX => f.avx,
        CpuidFeature::AVX2 => f.avx2,
        CpuidFeature::FMA => f.fma,
        CpuidFeature::F16C => f.f16c,
        CpuidFeature::VAES => f.vaes,
        CpuidFeature::VPCLMULQDQ => f.vpclmulqdq,
        CpuidFeature::AVX_VNNI => f.avx_vnni,
        CpuidFeature::AVX_IFMA => f.avx_ifma,
        CpuidFeature::AVX_NE_CONVERT => f.avx_ne_convert,
        CpuidFeature::AVX_VNNI_INT8 => f.avx_vnni_int8,
        CpuidFeature::AVX_VNNI_INT16 => f.avx_vnni_int16,
        CpuidFeature::AVX512F
        | CpuidFeature::AVX512BW
        | CpuidFeature::AVX512DQ
        | CpuidFeature::AVX512CD
        | CpuidFeature::AVX512VL => f.avx512,
        CpuidFeature::AVX512_IFMA => f.avx512_ifma,
        CpuidFeature::AVX512_VBMI => f.avx512_vbmi,
        CpuidFeature::AVX512_VBMI2 => f.avx512_vbmi2,
        CpuidFeature::AVX512_VNNI => f.avx512_vnni,
        CpuidFeature::AVX512_BITALG => f.avx512_bitalg,
        CpuidFeature::AVX512_VPOPCNTDQ => f.avx512_vpopcntdq,
        CpuidFeature::AVX512_BF16 => f.avx512_bf16,
        CpuidFeature::AVX512_VP2INTERSECT => f.avx512_vp2intersect,
        CpuidFeature::AVX512_FP16 => f.avx512_fp16,
        _ => return None,
    })
}
