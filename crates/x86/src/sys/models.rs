//! Named processor models. Features are those the makers' documents list for the parts; what the software CPU can't do
//! is left out with a warning.

use super::cpuid::Vendor;

/// A named model: brand, identification and feature names.
pub(crate) struct Named {
    pub name: &'static str,
    pub vendor: Vendor,
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    pub level: u32,
    pub brand: &'static str,
    /// Feature lists, each a string of names.
    pub features: &'static [&'static str],
}

const BASE: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm";
const LEGACY32: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr";
const CORE2: &str = "pni ssse3 cx16 lahf-lm";
const PENRYN: &str = "sse4.1";
const NEHALEM: &str = "sse4.2 popcnt";
const WESTMERE: &str = "aes pclmulqdq arat";
const SANDY: &str = "avx xsave xsaveopt tsc-deadline x2apic rdtscp";
const IVY: &str = "f16c rdrand fsgsbase smep erms";
const HASWELL: &str = "avx2 bmi1 bmi2 fma movbe abm invpcid pcid";
const BROADWELL: &str = "adx smap rdseed 3dnowprefetch";
const SKYLAKE: &str = "xsavec xgetbv1 clflushopt";
const SKYLAKE_SERVER: &str = "avx512f avx512dq avx512bw avx512cd avx512vl clwb pku pdpe1gb";
const CASCADE: &str = "avx512vnni";
const ICELAKE: &str = "avx512vbmi avx512vbmi2 avx512bitalg avx512-vpopcntdq avx512ifma gfni vaes vpclmulqdq la57 umip rdpid sha-ni fsrm wbnoinvd xsaves";
const AMD: &str = "mmxext cmp-legacy cr8legacy 3dnowprefetch lahf-lm misalignsse osvw";
const ZEN: &str = "pni pclmulqdq ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fsgsbase bmi1 avx2 smep bmi2 rdseed adx smap clflushopt sha-ni fxsr-opt pdpe1gb rdtscp abm sse4a topoext xsaveopt xsavec xgetbv1 arat";
const ZEN2: &str = "clwb umip rdpid wbnoinvd xsaves ibpb clzero xsaveerptr";
const ZEN3: &str = "erms fsrm invpcid pcid pku vaes vpclmulqdq";
const ZEN4: &str = "avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512vbmi2 avx512vnni avx512bitalg avx512-vpopcntdq avx512-bf16 gfni la57";

macro_rules! model {
    ($name:literal $vendor:ident $family:literal $model:literal $stepping:literal level $level:literal $brand:literal: $($list:ident)*) => {
        Named {
            name: $name,
            vendor: Vendor::$vendor,
            family: $family,
            model: $model,
            stepping: $stepping,
            level: $level,
            brand: $brand,
            features: &[$($list),*],
        }
    };
}

const QEMU64: &str = "cx16 pni lahf-lm hypervisor mmxext abm popcnt sse4.1 sse4.2 ssse3 x2apic";
const KVM64: &str = "pni cx16 hypervisor";

/// All named models, without `max` and `host`.
pub(crate) const MODELS: &[Named] = &[
    // Family 15 model 107 is what QEMU's model of this name reports since version 2.5; SSSE3 to SSE4.2 and POPCNT are an
    // addition, because distributions have begun to need x86-64-v2.
    model!("qemu64" Amd 15 107 1 level 0xd "Hyaline virtual processor": BASE QEMU64),
    model!("qemu32" Intel 6 6 3 level 4 "Hyaline virtual processor (32-bit)": LEGACY32 SSE12),
    model!("kvm64" Intel 15 6 1 level 0xd "Common virtual processor": BASE KVM64),
    model!("486" Intel 4 8 0 level 1 "Intel 80486": FPU486),
    model!("pentium" Intel 5 4 3 level 1 "Intel Pentium": PENTIUM),
    model!("pentium2" Intel 6 5 2 level 2 "Intel Pentium II": LEGACY32),
    model!("pentium3" Intel 6 7 3 level 3 "Intel Pentium III": LEGACY32 SSE1),
    model!("core2duo" Intel 6 15 11 level 10 "Intel(R) Core(TM)2 Duo CPU": BASE CORE2),
    model!("Conroe" Intel 6 15 3 level 10 "Intel Celeron (Conroe)": BASE CORE2),
    model!("Penryn" Intel 6 23 3 level 10 "Intel Core 2 Duo (Penryn)": BASE CORE2 PENRYN),
    model!("Nehalem" Intel 6 26 3 level 11 "Intel Core i7 9xx (Nehalem)": BASE CORE2 PENRYN NEHALEM),
    model!("Westmere" Intel 6 44 1 level 11 "Intel Xeon (Westmere)": BASE CORE2 PENRYN NEHALEM WESTMERE),
    model!("SandyBridge" Intel 6 42 1 level 0xd "Intel Xeon E312xx (Sandy Bridge)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY),
    model!("IvyBridge" Intel 6 58 9 level 0xd "Intel Xeon E3-12xx v2 (Ivy Bridge)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY IVY),
    model!("Haswell" Intel 6 60 4 level 0xd "Intel Core Processor (Haswell)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY IVY HASWELL),
    model!("Broadwell" Intel 6 61 2 level 0xd "Intel Core Processor (Broadwell)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY IVY HASWELL BROADWELL),
    model!("Skylake-Client" Intel 6 94 3 level 0xd "Intel Core Processor (Skylake)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY IVY HASWELL BROADWELL SKYLAKE),
    model!("Skylake-Server" Intel 6 85 4 level 0xd "Intel Xeon Processor (Skylake)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY IVY HASWELL BROADWELL SKYLAKE SKYLAKE_SERVER),
    model!("Cascadelake-Server" Intel 6 85 6 level 0xd "Intel Xeon Processor (Cascade Lake)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY IVY HASWELL BROADWELL SKYLAKE SKYLAKE_SERVER CASCADE),
    model!("Icelake-Server" Intel 6 106 6 level 0xd "Intel Xeon Processor (Ice Lake)": BASE CORE2 PENRYN NEHALEM WESTMERE SANDY IVY HASWELL BROADWELL SKYLAKE SKYLAKE_SERVER CASCADE ICELAKE),
    model!("Opteron_G1" Amd 15 6 1 level 5 "AMD Opteron 240": BASE G1),
    model!("phenom" Amd 16 2 3 level 5 "AMD Phenom(tm) 9550": BASE AMD G3),
    model!("EPYC" Amd 23 1 2 level 0xd "AMD EPYC Processor": BASE AMD ZEN),
    model!("EPYC-Rome" Amd 23 49 0 level 0xd "AMD EPYC-Rome Processor": BASE AMD ZEN ZEN2),
    model!("EPYC-Milan" Amd 25 1 1 level 0xd "AMD EPYC-Milan Processor": BASE AMD ZEN ZEN2 ZEN3),
    model!("EPYC-Genoa" Amd 25 17 0 level 0xd "AMD EPYC-Genoa Processor": BASE AMD ZEN ZEN2 ZEN3 ZEN4),
];

const SSE1: &str = "sse";
const SSE12: &str = "sse sse2 pni hypervisor";
const FPU486: &str = "fpu vme pse";
const PENTIUM: &str = "fpu vme de pse tsc msr mce cx8 mmx";
const G1: &str = "pni mmxext";
const G3: &str = "pni cx16 popcnt abm sse4a rdtscp pdpe1gb";
