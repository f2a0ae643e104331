//! The CPUID feature bits that the processor knows, with the names that users give on the command line.
//!
//! Sources: SDM vol. 2, CPUID; APM vol. 3 appendix E. Names are those of QEMU's `-cpu` option.

use iced_x86::CpuidFeature;

/// Number of 32-bit feature words.
pub(crate) const WORDS: usize = 13;

/// A CPUID register that holds feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Word {
    /// Leaf 1, EDX; and so on: leaf, subleaf, register.
    L1Edx,
    L1Ecx,
    L7Ebx,
    L7Ecx,
    L7Edx,
    L7s1Eax,
    L7s2Edx,
    LdEax,
    E1Edx,
    E1Ecx,
    E7Edx,
    E8Ebx,
    L6Eax,
}

impl Word {
    /// (leaf, subleaf, register index in EAX EBX ECX EDX order).
    pub fn place(self) -> (u32, u32, usize) {
        match self {
            Word::L1Edx => (1, 0, 3),
            Word::L1Ecx => (1, 0, 2),
            Word::L7Ebx => (7, 0, 1),
            Word::L7Ecx => (7, 0, 2),
            Word::L7Edx => (7, 0, 3),
            Word::L7s1Eax => (7, 1, 0),
            Word::L7s2Edx => (7, 2, 3),
            Word::LdEax => (0xd, 1, 0),
            Word::E1Edx => (0x8000_0001, 0, 3),
            Word::E1Ecx => (0x8000_0001, 0, 2),
            Word::E7Edx => (0x8000_0007, 0, 3),
            Word::E8Ebx => (0x8000_0008, 0, 1),
            Word::L6Eax => (6, 0, 0),
        }
    }
    pub(crate) const ALL: [Word; WORDS] = [
        Word::L1Edx,
        Word::L1Ecx,
        Word::L7Ebx,
        Word::L7Ecx,
        Word::L7Edx,
        Word::L7s1Eax,
        Word::L7s2Edx,
        Word::LdEax,
        Word::E1Edx,
        Word::E1Ecx,
        Word::E7Edx,
        Word::E8Ebx,
        Word::L6Eax,
    ];
}

/// How the software CPU can offer a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// Done by the interpreter itself.
    Soft,
    /// Executed on the host processor: offered when the host has the feature.
    Host,
    /// Known by name, never offered by the software CPU.
    Never,
}

macro_rules! features {
    ($($variant:ident $word:ident $bit:literal $name:literal $support:ident;)*) => {
        /// A CPUID feature bit.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum Feature { $($variant),* }

        /// Every known feature, in CPUID order.
        pub(crate) const FEATURES: &[(Feature, Word, u8, &str, Support)] = &[
            $((Feature::$variant, Word::$word, $bit, $name, Support::$support)),*
        ];
    };
}

features! {
    Fpu L1Edx 0 "fpu" Soft;
    Vme L1Edx 1 "vme" Soft;
    De L1Edx 2 "de" Soft;
    Pse L1Edx 3 "pse" Soft;
    Tsc L1Edx 4 "tsc" Soft;
    Msr L1Edx 5 "msr" Soft;
    Pae L1Edx 6 "pae" Soft;
    Mce L1Edx 7 "mce" Soft;
    Cx8 L1Edx 8 "cx8" Soft;
    Apic L1Edx 9 "apic" Soft;
    Sep L1Edx 11 "sep" Soft;
    Mtrr L1Edx 12 "mtrr" Soft;
    Pge L1Edx 13 "pge" Soft;
    Mca L1Edx 14 "mca" Soft;
    Cmov L1Edx 15 "cmov" Soft;
    Pat L1Edx 16 "pat" Soft;
    Pse36 L1Edx 17 "pse36" Soft;
    Pn L1Edx 18 "pn" Never;
    Clflush L1Edx 19 "clflush" Soft;
    Ds L1Edx 21 "ds" Never;
    Acpi L1Edx 22 "acpi" Never;
    Mmx L1Edx 23 "mmx" Soft;
    Fxsr L1Edx 24 "fxsr" Soft;
    Sse L1Edx 25 "sse" Soft;
    Sse2 L1Edx 26 "sse2" Soft;
    Ss L1Edx 27 "ss" Soft;
    Ht L1Edx 28 "ht" Soft;
    Tm L1Edx 29 "tm" Never;
    Pbe L1Edx 31 "pbe" Never;

    Sse3 L1Ecx 0 "pni" Host;
    Pclmulqdq L1Ecx 1 "pclmulqdq" Host;
    Dtes64 L1Ecx 2 "dtes64" Never;
    Monitor L1Ecx 3 "monitor" Soft;
    DsCpl L1Ecx 4 "ds-cpl" Never;
    Vmx L1Ecx 5 "vmx" Never;
    Smx L1Ecx 6 "smx" Never;
    Est L1Ecx 7 "est" Never;
    Tm2 L1Ecx 8 "tm2" Never;
    Ssse3 L1Ecx 9 "ssse3" Host;
    Fma L1Ecx 12 "fma" Host;
    Cx16 L1Ecx 13 "cx16" Soft;
    Xtpr L1Ecx 14 "xtpr" Never;
    Pdcm L1Ecx 15 "pdcm" Never;
    Pcid L1Ecx 17 "pcid" Soft;
    Dca L1Ecx 18 "dca" Never;
    Sse41 L1Ecx 19 "sse4.1" Host;
    Sse42 L1Ecx 20 "sse4.2" Host;
    X2apic L1Ecx 21 "x2apic" Soft;
    Movbe L1Ecx 22 "movbe" Soft;
    Popcnt L1Ecx 23 "popcnt" Soft;
    TscDeadline L1Ecx 24 "tsc-deadline" Soft;
    Aes L1Ecx 25 "aes" Host;
    Xsave L1Ecx 26 "xsave" Soft;
    Osxsave L1Ecx 27 "osxsave" Never;
    Avx L1Ecx 28 "avx" Host;
    F16c L1Ecx 29 "f16c" Host;
    Rdrand L1Ecx 30 "rdrand" Soft;
    Hypervisor L1Ecx 31 "hypervisor" Soft;

    Fsgsbase L7Ebx 0 "fsgsbase" Soft;
    TscAdjust L7Ebx 1 "tsc-adjust" Soft;
    Sgx L7Ebx 2 "sgx" Never;
    Bmi1 L7Ebx 3 "bmi1" Soft;
    Hle L7Ebx 4 "hle" Never;
    Avx2 L7Ebx 5 "avx2" Host;
    Smep L7Ebx 7 "smep" Soft;
    Bmi2 L7Ebx 8 "bmi2" Soft;
    Erms L7Ebx 9 "erms" Soft;
    Invpcid L7Ebx 10 "invpcid" Soft;
    Rtm L7Ebx 11 "rtm" Never;
    ZeroFcsFds L7Ebx 13 "zero-fcs-fds" Never;
    Mpx L7Ebx 14 "mpx" Never;
    Avx512f L7Ebx 16 "avx512f" Host;
    Avx512dq L7Ebx 17 "avx512dq" Host;
    Rdseed L7Ebx 18 "rdseed" Soft;
    Adx L7Ebx 19 "adx" Soft;
    Smap L7Ebx 20 "smap" Soft;
    Avx512ifma L7Ebx 21 "avx512ifma" Host;
    Pcommit L7Ebx 22 "pcommit" Never;
    Clflushopt L7Ebx 23 "clflushopt" Soft;
    Clwb L7Ebx 24 "clwb" Soft;
    IntelPt L7Ebx 25 "intel-pt" Never;
    Avx512pf L7Ebx 26 "avx512pf" Never;
    Avx512er L7Ebx 27 "avx512er" Never;
    Avx512cd L7Ebx 28 "avx512cd" Host;
    ShaNi L7Ebx 29 "sha-ni" Host;
    Avx512bw L7Ebx 30 "avx512bw" Host;
    Avx512vl L7Ebx 31 "avx512vl" Host;

    Avx512vbmi L7Ecx 1 "avx512vbmi" Host;
    Umip L7Ecx 2 "umip" Soft;
    Pku L7Ecx 3 "pku" Soft;
    Ospke L7Ecx 4 "ospke" Never;
    Waitpkg L7Ecx 5 "waitpkg" Never;
    Avx512vbmi2 L7Ecx 6 "avx512vbmi2" Host;
    Gfni L7Ecx 8 "gfni" Host;
    Vaes L7Ecx 9 "vaes" Host;
    Vpclmulqdq L7Ecx 10 "vpclmulqdq" Host;
    Avx512vnni L7Ecx 11 "avx512vnni" Host;
    Avx512bitalg L7Ecx 12 "avx512bitalg" Host;
    Avx512vpopcntdq L7Ecx 14 "avx512-vpopcntdq" Host;
    La57 L7Ecx 16 "la57" Soft;
    Rdpid L7Ecx 22 "rdpid" Soft;
    BusLockDetect L7Ecx 24 "bus-lock-detect" Never;
    Cldemote L7Ecx 25 "cldemote" Never;
    Movdiri L7Ecx 27 "movdiri" Never;
    Movdir64b L7Ecx 28 "movdir64b" Never;
    Pks L7Ecx 31 "pks" Never;

    Fsrm L7Edx 4 "fsrm" Soft;
    Avx512vp2intersect L7Edx 8 "avx512-vp2intersect" Never;
    MdClear L7Edx 10 "md-clear" Soft;
    Serialize L7Edx 14 "serialize" Never;
    AmxBf16 L7Edx 22 "amx-bf16" Never;
    Avx512fp16 L7Edx 23 "avx512-fp16" Never;
    AmxTile L7Edx 24 "amx-tile" Never;
    AmxInt8 L7Edx 25 "amx-int8" Never;
    SpecCtrl L7Edx 26 "spec-ctrl" Soft;
    Stibp L7Edx 27 "stibp" Soft;
    FlushL1d L7Edx 28 "flush-l1d" Never;
    ArchCapabilities L7Edx 29 "arch-capabilities" Soft;
    CoreCapability L7Edx 30 "core-capability" Never;
    Ssbd L7Edx 31 "ssbd" Soft;

    AvxVnni L7s1Eax 4 "avx-vnni" Host;
    Avx512bf16 L7s1Eax 5 "avx512-bf16" Host;

    IpredCtrl L7s2Edx 1 "ipred-ctrl" Never;
    RrsbaCtrl L7s2Edx 2 "rrsba-ctrl" Never;
    BhiCtrl L7s2Edx 4 "bhi-ctrl" Soft;

    Xsaveopt LdEax 0 "xsaveopt" Soft;
    Xsavec LdEax 1 "xsavec" Soft;
    Xgetbv1 LdEax 2 "xgetbv1" Soft;
    Xsaves LdEax 3 "xsaves" Soft;

    Syscall E1Edx 11 "syscall" Soft;
    Nx E1Edx 20 "nx" Soft;
    Mmxext E1Edx 22 "mmxext" Soft;
    FxsrOpt E1Edx 25 "fxsr-opt" Never;
    Pdpe1gb E1Edx 26 "pdpe1gb" Soft;
    Rdtscp E1Edx 27 "rdtscp" Soft;
    Lm E1Edx 29 "lm" Soft;
    ThreeDNowExt E1Edx 30 "3dnowext" Never;
    ThreeDNow E1Edx 31 "3dnow" Never;

    LahfLm E1Ecx 0 "lahf-lm" Soft;
    CmpLegacy E1Ecx 1 "cmp-legacy" Soft;
    Svm E1Ecx 2 "svm" Never;
    Extapic E1Ecx 3 "extapic" Never;
    Cr8legacy E1Ecx 4 "cr8legacy" Soft;
    Abm E1Ecx 5 "abm" Soft;
    Sse4a E1Ecx 6 "sse4a" Host;
    Misalignsse E1Ecx 7 "misalignsse" Never;
    ThreeDNowPrefetch E1Ecx 8 "3dnowprefetch" Soft;
    Osvw E1Ecx 9 "osvw" Never;
    Ibs E1Ecx 10 "ibs" Never;
    Xop E1Ecx 11 "xop" Never;
    Skinit E1Ecx 12 "skinit" Never;
    Wdt E1Ecx 13 "wdt" Never;
    Lwp E1Ecx 15 "lwp" Never;
    Fma4 E1Ecx 16 "fma4" Never;
    Tce E1Ecx 17 "tce" Never;
    NodeidMsr E1Ecx 19 "nodeid-msr" Never;
    Tbm E1Ecx 21 "tbm" Never;
    Topoext E1Ecx 22 "topoext" Soft;
    PerfctrCore E1Ecx 23 "perfctr-core" Never;
    PerfctrNb E1Ecx 24 "perfctr-nb" Never;

    Invtsc E7Edx 8 "invtsc" Soft;

    Clzero E8Ebx 0 "clzero" Never;
    Xsaveerptr E8Ebx 2 "xsaveerptr" Never;
    Wbnoinvd E8Ebx 9 "wbnoinvd" Soft;
    Ibpb E8Ebx 12 "ibpb" Soft;
    Ibrs E8Ebx 14 "ibrs" Soft;
    AmdStibp E8Ebx 15 "amd-stibp" Soft;
    AmdSsbd E8Ebx 24 "amd-ssbd" Soft;
    VirtSsbd E8Ebx 25 "virt-ssbd" Never;
    AmdNoSsb E8Ebx 26 "amd-no-ssb" Never;

    Arat L6Eax 2 "arat" Soft;
}

/// Other spellings that users give; compared after `_` and `.` became `-`.
const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("sse4", "sse4.2"),
    ("i64", "lm"),
    ("xd", "nx"),
    ("ffxsr", "fxsr-opt"),
    ("lzcnt", "abm"),
    ("sha", "sha-ni"),
    ("avx512vpopcntdq", "avx512-vpopcntdq"),
    ("tsc-deadline-timer", "tsc-deadline"),
    ("clfsh", "clflush"),
    ("ibrs-amd", "ibrs"),
];

fn normal(name: &str) -> String {
    name.chars().map(|c| if c == '_' || c == '.' { '-' } else { c.to_ascii_lowercase() }).collect()
}

impl Feature {
    /// The row of this feature in [`FEATURES`].
    fn row(self) -> &'static (Feature, Word, u8, &'static str, Support) {
        // The table is written in the order of the variants.
        &FEATURES[self as usize]
    }
    /// The word and bit of CPUID that announce it.
    pub fn place(self) -> (Word, u8) {
        let row = self.row();
        (row.1, row.2)
    }
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        self.row().3
    }
    /// How the software CPU can offer it.
    pub fn support(self) -> Support {
        self.row().4
    }
    /// The feature that a user means; `_` and `.` count as `-`.
    pub fn parse(name: &str) -> Option<Feature> {
        let wanted = normal(name);
        let wanted = ALIASES.iter().find(|(alias, _)| *alias == wanted).map_or(wanted, |(_, n)| normal(n));
        FEATURES.iter().find(|row| normal(row.3) == wanted).map(|row| row.0)
    }
    /// All features, in CPUID order.
    pub fn all() -> impl Iterator<Item = Feature> {
        FEATURES.iter().map(|row| row.0)
    }
    /// The name nearest to a misspelt one.
    pub fn nearest(name: &str) -> &'static str {
        let wanted = normal(name);
        FEATURES.iter().map(|row| row.3).min_by_key(|n| distance(&wanted, &normal(n))).unwrap_or("fpu")
    }
}

/// Levenshtein distance.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let up = row[j + 1];
            let here = (diagonal + usize::from(ca != *cb)).min(up + 1).min(left + 1);
            row[j] = left;
            (diagonal, left) = (up, here);
        }
        row[b.len()] = left;
    }
    row[b.len()]
}

/// What an instruction's requirement means to a model.
pub(crate) enum Requirement {
    /// Every processor of ours has it.
    Always,
    /// Needs this bit.
    Bit(Feature),
    /// Needs one of these bits.
    Either(Feature, Feature),
    /// Not offered at all.
    Never,
}

/// What iced-x86's name of an instruction set asks of CPUID.
pub(crate) fn requirement(f: CpuidFeature) -> Requirement {
    use CpuidFeature as C;
    use Requirement::{Always, Bit, Either, Never};
    match f {
        C::INTEL8086
        | C::INTEL186
        | C::INTEL286
        | C::INTEL386
        | C::INTEL486
        | C::FPU287
        | C::FPU387
        | C::CPUID
        | C::RDPMC
        | C::MULTIBYTENOP
        | C::PAUSE
        // Without the feature the prefix is ignored: WBINVD.
        | C::WBNOINVD
        | C::SMM => Always,
        C::X64 => Bit(Feature::Lm),
        C::FPU => Bit(Feature::Fpu),
        C::ADX => Bit(Feature::Adx),
        C::AES => Bit(Feature::Aes),
        C::AVX => Bit(Feature::Avx),
        C::AVX2 => Bit(Feature::Avx2),
        C::AVX512_BF16 => Bit(Feature::Avx512bf16),
        C::AVX512_BITALG => Bit(Feature::Avx512bitalg),
        C::AVX512_IFMA => Bit(Feature::Avx512ifma),
        C::AVX512_VBMI => Bit(Feature::Avx512vbmi),
        C::AVX512_VBMI2 => Bit(Feature::Avx512vbmi2),
        C::AVX512_VNNI => Bit(Feature::Avx512vnni),
        C::AVX512_VP2INTERSECT => Bit(Feature::Avx512vp2intersect),
        C::AVX512_VPOPCNTDQ => Bit(Feature::Avx512vpopcntdq),
        C::AVX512BW => Bit(Feature::Avx512bw),
        C::AVX512CD => Bit(Feature::Avx512cd),
        C::AVX512DQ => Bit(Feature::Avx512dq),
        C::AVX512F => Bit(Feature::Avx512f),
        C::AVX512VL => Bit(Feature::Avx512vl),
        C::AVX_VNNI => Bit(Feature::AvxVnni),
        C::BMI1 => Bit(Feature::Bmi1),
        C::BMI2 => Bit(Feature::Bmi2),
        C::CLFLUSHOPT => Bit(Feature::Clflushopt),
        C::CLFSH => Bit(Feature::Clflush),
        C::CLWB => Bit(Feature::Clwb),
        C::CMOV => Bit(Feature::Cmov),
        C::CMPXCHG16B => Bit(Feature::Cx16),
        C::CX8 => Bit(Feature::Cx8),
        C::F16C => Bit(Feature::F16c),
        C::FMA => Bit(Feature::Fma),
        C::FSGSBASE => Bit(Feature::Fsgsbase),
        C::FXSR => Bit(Feature::Fxsr),
        C::GFNI => Bit(Feature::Gfni),
        C::INVPCID => Bit(Feature::Invpcid),
        C::LZCNT => Bit(Feature::Abm),
        C::MMX => Bit(Feature::Mmx),
        C::MONITOR => Bit(Feature::Monitor),
        C::MOVBE => Bit(Feature::Movbe),
        C::MSR => Bit(Feature::Msr),
        C::PCLMULQDQ => Bit(Feature::Pclmulqdq),
        C::PKU => Bit(Feature::Pku),
        C::POPCNT => Bit(Feature::Popcnt),
        // PREFETCHW is a no-op hint wherever long mode is (APM vol. 3, PREFETCH).
        C::PREFETCHW => Either(Feature::ThreeDNowPrefetch, Feature::Lm),
        C::RDPID => Bit(Feature::Rdpid),
        C::RDRAND => Bit(Feature::Rdrand),
        C::RDSEED => Bit(Feature::Rdseed),
        C::RDTSCP => Bit(Feature::Rdtscp),
        C::SEP => Bit(Feature::Sep),
        C::SHA => Bit(Feature::ShaNi),
        C::SMAP => Bit(Feature::Smap),
        C::SSE => Bit(Feature::Sse),
        C::SSE2 => Bit(Feature::Sse2),
        C::SSE3 => Bit(Feature::Sse3),
        C::SSE4_1 => Bit(Feature::Sse41),
        C::SSE4_2 => Bit(Feature::Sse42),
        C::SSE4A => Bit(Feature::Sse4a),
        C::SSSE3 => Bit(Feature::Ssse3),
        C::SYSCALL => Bit(Feature::Syscall),
        C::TSC => Bit(Feature::Tsc),
        C::VAES => Bit(Feature::Vaes),
        C::VPCLMULQDQ => Bit(Feature::Vpclmulqdq),
        C::XSAVE => Bit(Feature::Xsave),
        C::XSAVEC => Bit(Feature::Xsavec),
        C::XSAVEOPT => Bit(Feature::Xsaveopt),
        C::XSAVES => Bit(Feature::Xsaves),
        // ENDBR, RDSSP, BNDxx, CLDEMOTE and PREFETCHIT are NOPs on processors without the feature; the instructions of the
        // same sets that would do something have no handler, and so are #UD.
        C::CET_IBT | C::CET_SS | C::MPX | C::CLDEMOTE | C::PREFETCHITI | C::PREFETCHWT1 => Always,
        _ => Never,
    }
}
