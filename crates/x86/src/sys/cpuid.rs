//! CPU models and what CPUID says of them.
//!
//! Sources: SDM vol. 2, CPUID; SDM vol. 1 chapter 13 (XSAVE area); APM vol. 3 appendix E. The option's syntax and the
//! names are those of QEMU's `-cpu`.

use super::features::{FEATURES, Requirement, WORDS, distance, requirement};
pub use super::features::{Feature, Support, Word};
use super::models::MODELS;
use crate::cpu::Cpu;
use crate::state::cr4;
use iced_x86::CpuidFeature;
use std::fmt::Write;

/// Maker that a model reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// `GenuineIntel`.
    Intel,
    /// `AuthenticAMD`.
    Amd,
    /// `HygonGenuine`: as AMD.
    Hygon,
}

impl Vendor {
    /// The 12 characters of leaf 0.
    pub fn signature(self) -> &'static str {
        match self {
            Vendor::Intel => "GenuineIntel",
            Vendor::Amd => "AuthenticAMD",
            Vendor::Hygon => "HygonGenuine",
        }
    }
    /// The vendor of a signature.
    pub fn from_signature(s: &str) -> Option<Vendor> {
        [Vendor::Intel, Vendor::Amd, Vendor::Hygon].into_iter().find(|v| v.signature() == s)
    }
}

/// Which accelerator a model is for: decides what can be offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The software CPU.
    Software,
    /// KVM: everything that the host offers its guests.
    Kvm,
}

/// A CPUID leaf as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// EAX of the query.
    pub function: u32,
    /// ECX of the query.
    pub index: u32,
    /// Whether ECX matters for this function.
    pub indexed: bool,
    /// EAX, EBX, ECX, EDX of the answer.
    pub registers: [u32; 4],
}

/// What the host processor is and can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    words: [u32; WORDS],
    vendor: Vendor,
    family: u32,
    model: u32,
    stepping: u32,
    brand: String,
    /// Physical address bits.
    pub physical_bits: u8,
}

impl HostCpu {
    /// Asks the processor that this program runs on, as far as unprivileged programs can use it.
    pub fn detect() -> HostCpu {
        let mut host = HostCpu {
            words: [0; WORDS],
            vendor: Vendor::Intel,
            family: 6,
            model: 106,
            stepping: 6,
            brand: String::from("Unknown host processor"),
            physical_bits: 40,
        };
        host.detect_features();
        host.read_cpuinfo(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
        host
    }

    /// A host without any feature that needs it: what portable models can rely on.
    pub fn none() -> HostCpu {
        HostCpu { words: [0; WORDS], ..HostCpu::detect() }
    }

    /// The host as an accelerator describes it (KVM_GET_SUPPORTED_CPUID); identification is that of the leaves.
    pub fn from_leaves(leaves: &[Leaf]) -> HostCpu {
        let mut host = HostCpu::detect();
        let find = |f: u32, i: u32| leaves.iter().find(|l| l.function == f && (!l.indexed || l.index == i));
        for (slot, word) in host.words.iter_mut().zip(Word::ALL) {
            let (f, i, r) = word.place();
            *slot = find(f, i).map_or(0, |l| l.registers[r]);
        }
        if let Some(l) = find(0, 0) {
            let bytes: Vec<u8> =
                [1, 3, 2].iter().flat_map(|r| l.registers[*r as usize].to_le_bytes()).collect();
            if let Some(v) = std::str::from_utf8(&bytes).ok().and_then(Vendor::from_signature) {
                host.vendor = v;
            }
        }
        if let Some(l) = find(1, 0) {
            (host.family, host.model, host.stepping) = identification(l.registers[0]);
        }
        if let Some(l) = find(0x8000_0008, 0) {
            host.physical_bits = (l.registers[0] & 0xff) as u8;
        }
        host
    }

    fn set(&mut self, feature: Feature, on: bool) {
        let (word, bit) = feature.place();
        let mask = 1 << bit;
        let w = &mut self.words[word as usize];
        *w = if on { *w | mask } else { *w & !mask };
    }

    /// Whether the host has a feature.
    pub fn has(&self, feature: Feature) -> bool {
        let (word, bit) = feature.place();
        self.words[word as usize] >> bit & 1 != 0
    }

    #[cfg(target_arch = "x86_64")]
    fn detect_features(&mut self) {
        let h = crate::native::host_features();
        for (feature, on) in [
            (Feature::Sse3, h.sse3),
            (Feature::Ssse3, h.ssse3),
            (Feature::Sse41, h.sse4_1),
            (Feature::Sse42, h.sse4_2),
            (Feature::Sse4a, h.sse4a),
            (Feature::Aes, h.aes),
            (Feature::Pclmulqdq, h.pclmulqdq),
            (Feature::ShaNi, h.sha),
            (Feature::Gfni, h.gfni),
            (Feature::Avx, h.avx),
            (Feature::Avx2, h.avx2),
            (Feature::Fma, h.fma),
            (Feature::F16c, h.f16c),
            (Feature::Vaes, h.vaes),
            (Feature::Vpclmulqdq, h.vpclmulqdq),
            (Feature::AvxVnni, h.avx_vnni),
            (Feature::Avx512f, h.avx512),
            (Feature::Avx512dq, h.avx512),
            (Feature::Avx512cd, h.avx512),
            (Feature::Avx512bw, h.avx512),
            (Feature::Avx512vl, h.avx512),
            (Feature::Avx512ifma, h.avx512_ifma),
            (Feature::Avx512vbmi, h.avx512_vbmi),
            (Feature::Avx512vbmi2, h.avx512_vbmi2),
            (Feature::Avx512vnni, h.avx512_vnni),
            (Feature::Avx512bitalg, h.avx512_bitalg),
            (Feature::Avx512vpopcntdq, h.avx512_vpopcntdq),
            (Feature::Avx512bf16, h.avx512_bf16),
        ] {
            self.set(feature, on);
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect_features(&mut self) {}

    /// Takes identification from the text of Linux's /proc/cpuinfo.
    fn read_cpuinfo(&mut self, text: &str) {
        for line in text.lines().take_while(|l| !l.trim().is_empty()) {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            match key.trim() {
                "vendor_id" => {
                    if let Some(v) = Vendor::from_signature(value) {
                        self.vendor = v;
                    }
                }
                "cpu family" => self.family = value.parse().unwrap_or(self.family),
                "model" => self.model = value.parse().unwrap_or(self.model),
                "stepping" => self.stepping = value.parse().unwrap_or(self.stepping),
                "model name" => self.brand = value.to_owned(),
                "address sizes" => {
                    let bits = value.split_whitespace().next().and_then(|n| n.parse().ok());
                    self.physical_bits = bits.unwrap_or(self.physical_bits);
                }
                _ => {}
            }
        }
    }
}

/// Family, model and stepping of leaf 1's EAX.
pub(crate) fn identification(eax: u32) -> (u32, u32, u32) {
    let (base, ext) = (eax >> 8 & 0xf, eax >> 20 & 0xff);
    let family = if base == 15 { base + ext } else { base };
    let model = eax >> 4 & 0xf | if base == 6 || base == 15 { eax >> 12 & 0xf0 } else { 0 };
    (family, model, eax & 0xf)
}

/// How the virtual processors of a machine form packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Packages.
    pub sockets: u32,
    /// Cores of a package.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// Bits of the APIC ID that count threads.
    fn thread_bits(&self) -> u32 {
        self.threads.max(1).next_power_of_two().trailing_zeros()
    }
    /// Bits of the APIC ID below the package number.
    fn package_bits(&self) -> u32 {
        self.thread_bits() + self.cores.max(1).next_power_of_two().trailing_zeros()
    }
    fn per_package(&self) -> u32 {
        (self.cores * self.threads).max(1)
    }
}

/// A mistake in a `-cpu` argument.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No such model.
    #[error(
        "There is no processor model called `{name}`. The nearest is `{nearest}`; `-cpu help` lists all."
    )]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// The nearest known name.
        nearest: String,
    },
    /// No such feature or property.
    #[error(
        "The processor has no feature or property called `{name}`. The nearest is `{nearest}`; `-cpu help` lists all."
    )]
    UnknownFeature {
        /// What was asked for.
        name: String,
        /// The nearest known name.
        nearest: String,
    },
    /// A property has a value that it can't have.
    #[error("The processor property `{name}` can't be `{value}`: {expected}.")]
    BadValue {
        /// Property.
        name: String,
        /// Value given.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
    /// `enforce` was given and something is missing.
    #[error(
        "The processor model `{model}` needs what this accelerator can't offer here: {missing}. Leave out `enforce` to go on without."
    )]
    Enforced {
        /// Model.
        model: String,
        /// Names of the features.
        missing: String,
    },
}

/// What a guest's CPUID says, and so which instructions exist.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuModel {
    name: String,
    vendor: Vendor,
    family: u32,
    model: u32,
    stepping: u32,
    brand: String,
    level: u32,
    xlevel: u32,
    words: [u32; WORDS],
    physical_bits: u8,
    topology: Topology,
    /// TSC ticks per second.
    tsc_hz: u64,
    warnings: Vec<String>,
}

impl Default for CpuModel {
    /// The model `max` on the software CPU of this host.
    fn default() -> Self {
        let host = HostCpu::detect();
        let mut model = CpuModel::base("max", &host, Accelerator::Software);
        model.close();
        model
    }
}

/// Frequency of the clock that leaf 0x15 calls the core crystal, and of local APIC timers before their divider, in Hz:
/// Linux takes the latter from the former (SDM vol. 3A §10.5.4).
pub const CRYSTAL_HZ: u64 = 1_000_000_000;

/// First hypervisor leaf's signature.
const HYPERVISOR_SIGNATURE: &[u8; 12] = b"HyalineVMM\0\0";

impl CpuModel {
    /// Parses the argument of `-cpu`: `MODEL[,+feature][,-feature][,feature=on|off][,property=value]`, for what the
    /// accelerator can offer on `host`. What the model has and can't be offered is left out with a warning.
    ///
    /// # Errors
    /// Unknown names, bad values, and with `enforce` whatever would have been a warning.
    pub fn parse(text: &str, host: &HostCpu, accelerator: Accelerator) -> Result<CpuModel, ModelError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or("").trim();
        let mut model = CpuModel::named(name, host, accelerator)?;
        let mut enforce = false;
        for part in parts.map(str::trim).filter(|p| !p.is_empty()) {
            if let Some(feature) = part.strip_prefix('+') {
                model.switch(feature, true, host, accelerator)?;
            } else if let Some(feature) = part.strip_prefix('-') {
                model.switch(feature, false, host, accelerator)?;
            } else {
                let (key, value) = part.split_once('=').unwrap_or((part, "on"));
                if key == "enforce" {
                    enforce = on_off(key, value)?;
                } else {
                    model.property(key, value, host, accelerator)?;
                }
            }
        }
        model.close();
        if enforce && !model.warnings.is_empty() {
            return Err(ModelError::Enforced { model: model.name, missing: model.warnings.join("; ") });
        }
        Ok(model)
    }

    /// `max` and `host` before their features' dependencies are closed.
    fn base(name: &str, host: &HostCpu, accelerator: Accelerator) -> CpuModel {
        let as_host = name == "host" || accelerator == Accelerator::Kvm;
        let mut model = CpuModel {
            name: name.to_owned(),
            vendor: if as_host { host.vendor } else { Vendor::Intel },
            family: if as_host { host.family } else { 6 },
            model: if as_host { host.model } else { 106 },
            stepping: if as_host { host.stepping } else { 6 },
            brand: if as_host { host.brand.clone() } else { String::from("Hyaline virtual processor") },
            // Leaves 0x15 and 0x16 are Intel's.
            level: if as_host && host.vendor != Vendor::Intel { 0xd } else { 0x16 },
            xlevel: 0x8000_0008,
            words: [0; WORDS],
            physical_bits: if accelerator == Accelerator::Kvm { host.physical_bits } else { 40 },
            topology: Topology { sockets: 1, cores: 1, threads: 1 },
            tsc_hz: CRYSTAL_HZ,
            warnings: Vec::new(),
        };
        for feature in Feature::all() {
            let offered = available(feature, host, accelerator)
                && match accelerator {
                    // `host` is the host's set as far as we do it, `max` everything we do.
                    Accelerator::Software => !explicit_only(feature, model.vendor),
                    Accelerator::Kvm => true,
                };
            model.set(feature, offered);
        }
        model.set(Feature::Hypervisor, true);
        model
    }

    fn named(name: &str, host: &HostCpu, accelerator: Accelerator) -> Result<CpuModel, ModelError> {
        if name == "max" || name == "host" {
            return Ok(CpuModel::base(name, host, accelerator));
        }
        let mut model = CpuModel::base("max", host, accelerator);
        model.words = [0; WORDS];
        if name == "base" {
            name.clone_into(&mut model.name);
            return Ok(model);
        }
        let (stem, extra) = variant(name);
        let Some(named) = MODELS.iter().find(|m| m.name.eq_ignore_ascii_case(stem)) else {
            let candidates = MODELS.iter().map(|m| m.name).chain(["max", "host", "base"]);
            let wanted = name.to_ascii_lowercase();
            let nearest = candidates.min_by_key(|c| distance(&wanted, &c.to_ascii_lowercase()));
            return Err(ModelError::UnknownModel {
                name: name.to_owned(),
                nearest: nearest.unwrap_or("max").to_owned(),
            });
        };
        name.clone_into(&mut model.name);
        model.vendor = named.vendor;
        model.family = named.family;
        model.model = named.model;
        model.stepping = named.stepping;
        model.level = named.level;
        named.brand.clone_into(&mut model.brand);
        let names = named.features.iter().flat_map(|l| l.split_whitespace()).chain(extra.iter().copied());
        for feature in names.filter_map(Feature::parse) {
            model.offer(feature, host, accelerator);
        }
        // What costs nothing and what a virtual machine should say, on every model but the old ones.
        if model.offers(Feature::Lm) {
            for feature in [Feature::Hypervisor, Feature::Invtsc, Feature::X2apic, Feature::TscDeadline] {
                if feature != Feature::TscDeadline
                    || model.vendor == Vendor::Intel && model.offers(Feature::Avx)
                {
                    model.offer(feature, host, accelerator);
                }
            }
        }
        Ok(model)
    }

    /// Sets a feature of the model, or notes that it can't be had.
    fn offer(&mut self, feature: Feature, host: &HostCpu, accelerator: Accelerator) {
        if available(feature, host, accelerator) {
            self.set(feature, true);
        } else {
            let why = match (accelerator, feature.support()) {
                (Accelerator::Kvm, _) => "the host's KVM doesn't offer it",
                (_, Support::Host) => "the host processor lacks it",
                _ => "the software processor doesn't have it",
            };
            self.warnings.push(format!("`{}` is left out: {why}", feature.name()));
        }
    }

    fn switch(
        &mut self,
        name: &str,
        on: bool,
        host: &HostCpu,
        accelerator: Accelerator,
    ) -> Result<(), ModelError> {
        let Some(feature) = Feature::parse(name) else {
            return Err(ModelError::UnknownFeature {
                name: name.to_owned(),
                nearest: nearest_property(name).to_owned(),
            });
        };
        if on {
            self.offer(feature, host, accelerator);
        } else {
            self.set(feature, false);
        }
        Ok(())
    }

    fn property(
        &mut self,
        key: &str,
        value: &str,
        host: &HostCpu,
        accelerator: Accelerator,
    ) -> Result<(), ModelError> {
        match key {
            "vendor" => {
                self.vendor = Vendor::from_signature(value).ok_or_else(|| {
                    bad(key, value, "it is `GenuineIntel`, `AuthenticAMD` or `HygonGenuine`")
                })?;
            }
            "family" => self.family = number(key, value, 0xf + 0xff)?,
            "model" => self.model = number(key, value, 0xff)?,
            "stepping" => self.stepping = number(key, value, 0xf)?,
            "level" => self.level = number(key, value, 0x20)?,
            "xlevel" => self.xlevel = number(key, value, 0x8000_0021)?,
            "model-id" => {
                if value.len() > 47 {
                    return Err(bad(key, value, "it has at most 47 characters"));
                }
                value.clone_into(&mut self.brand);
            }
            "phys-bits" => {
                let bits = number(key, value, 52)?;
                if bits < 32 {
                    return Err(bad(key, value, "it is a number from 32 to 52"));
                }
                self.physical_bits = bits as u8;
            }
            "host-phys-bits" => {
                if on_off(key, value)? {
                    self.physical_bits = host.physical_bits;
                }
            }
            "tsc-frequency" => {
                self.tsc_hz =
                    value.parse().ok().filter(|hz| (1_000_000..=10_000_000_000).contains(hz)).ok_or_else(
                        || bad(key, value, "it is ticks per second, from 1000000 to 10000000000"),
                    )?;
            }
            // Missing features are always reported; this asks for it.
            "check" | "migratable" | "l3-cache" | "host-cache-info" => {
                let _ = on_off(key, value)?;
            }
            "pmu" | "kvm" => {
                if on_off(key, value)? {
                    return Err(bad(key, value, "only `off` is possible"));
                }
            }
            _ => {
                if Feature::parse(key).is_none() {
                    return Err(ModelError::UnknownFeature {
                        name: key.to_owned(),
                        nearest: nearest_property(key).to_owned(),
                    });
                }
                let on = on_off(key, value)?;
                self.switch(key, on, host, accelerator)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, feature: Feature, on: bool) {
        let (word, bit) = feature.place();
        let mask = 1 << bit;
        let w = &mut self.words[word as usize];
        *w = if on { *w | mask } else { *w & !mask };
    }

    /// Drops features whose foundation is missing, and settles the leaf ranges.
    fn close(&mut self) {
        use Feature as F;
        // (feature, what it stands on), foundations first.
        const NEEDS: &[(Feature, Feature)] = &[
            (F::Sse, F::Fxsr),
            (F::Sse2, F::Sse),
            (F::Sse3, F::Sse2),
            (F::Ssse3, F::Sse3),
            (F::Sse41, F::Ssse3),
            (F::Sse42, F::Sse41),
            (F::Aes, F::Sse2),
            (F::Pclmulqdq, F::Sse2),
            (F::ShaNi, F::Ssse3),
            (F::Gfni, F::Sse2),
            (F::Lm, F::Pae),
            (F::Nx, F::Pae),
            (F::La57, F::Lm),
            (F::Pcid, F::Lm),
            (F::Invpcid, F::Pcid),
            (F::Fsgsbase, F::Lm),
            (F::Pku, F::Lm),
            (F::Cx16, F::Lm),
            (F::X2apic, F::Apic),
            (F::TscDeadline, F::Apic),
            (F::Xsave, F::Fxsr),
            (F::Xsaveopt, F::Xsave),
            (F::Xsavec, F::Xsave),
            (F::Xgetbv1, F::Xsave),
            (F::Xsaves, F::Xsavec),
            (F::Avx, F::Xsave),
            (F::Avx, F::Sse42),
            (F::Fma, F::Avx),
            (F::F16c, F::Avx),
            (F::Avx2, F::Avx),
            (F::AvxVnni, F::Avx2),
            (F::Vaes, F::Avx),
            (F::Vpclmulqdq, F::Avx),
            (F::Avx512f, F::Avx2),
            (F::Avx512f, F::Fma),
            (F::Avx512dq, F::Avx512f),
            (F::Avx512cd, F::Avx512f),
            (F::Avx512bw, F::Avx512f),
            (F::Avx512vl, F::Avx512f),
            (F::Avx512ifma, F::Avx512f),
            (F::Avx512vnni, F::Avx512f),
            (F::Avx512vpopcntdq, F::Avx512f),
            (F::Avx512vbmi, F::Avx512bw),
            (F::Avx512vbmi2, F::Avx512bw),
            (F::Avx512bitalg, F::Avx512bw),
            (F::Avx512bf16, F::Avx512bw),
            (F::Avx512fp16, F::Avx512bw),
            (F::Avx512vp2intersect, F::Avx512f),
        ];
        for (feature, foundation) in NEEDS {
            if self.offers(*feature) && !self.offers(*foundation) {
                self.set(*feature, false);
                if matches!(self.name.as_str(), "max" | "host") {
                    // What the user took away takes its followers along.
                    continue;
                }
                self.warnings.push(format!(
                    "`{}` is left out: it stands on `{}`, which the processor doesn't have",
                    feature.name(),
                    foundation.name()
                ));
            }
        }
        if self.is_amd() && self.offers(Feature::Lm) {
            self.xlevel = self.xlevel.max(0x8000_0021);
        } else if !self.offers(Feature::Lm) && !self.offers(Feature::Nx) {
            self.xlevel = 0x8000_0004;
        }
        let low =
            [(Word::L7Ebx, 7), (Word::L7Ecx, 7), (Word::L7Edx, 7), (Word::L6Eax, 6), (Word::LdEax, 0xd)];
        for (word, leaf) in low {
            if self.words[word as usize] != 0 {
                self.level = self.level.max(leaf);
            }
        }
        if self.offers(Feature::Xsave) {
            self.level = self.level.max(0xd);
        }
    }

    /// Whether the model has the feature that an instruction needs. Features that are not CPUID bits (8086, 80186 …)
    /// are there.
    pub fn has(&self, feature: CpuidFeature) -> bool {
        match requirement(feature) {
            Requirement::Always => true,
            Requirement::Bit(f) => self.offers(f),
            Requirement::Either(a, b) => self.offers(a) || self.offers(b),
            Requirement::Never => false,
        }
    }

    /// Whether the model announces a feature.
    pub fn offers(&self, feature: Feature) -> bool {
        let (word, bit) = feature.place();
        self.words[word as usize] >> bit & 1 != 0
    }

    /// Whether the model is AMD's (or Hygon's): decides where the two vendors' processors differ.
    pub fn is_amd(&self) -> bool {
        self.vendor != Vendor::Intel
    }

    /// The maker.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The model's name as the user gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was asked for and left out, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Physical address bits.
    pub fn physical_bits(&self) -> u32 {
        u32::from(self.physical_bits)
    }

    /// 1 GiB pages.
    pub fn has_gigabyte_pages(&self) -> bool {
        self.offers(Feature::Pdpe1gb)
    }

    /// Bits of a 52-bit physical address that this processor doesn't have; also bits 52-63.
    pub fn reserved_physical_bits(&self) -> u64 {
        !((1u64 << self.physical_bits) - 1)
    }

    /// TSC ticks per second.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// The same model with another TSC frequency.
    #[must_use]
    pub fn with_tsc_hz(mut self, hz: u64) -> CpuModel {
        self.tsc_hz = hz.max(1_000_000);
        self
    }

    /// The same model in a machine of several processors.
    #[must_use]
    pub fn with_topology(mut self, topology: Topology) -> CpuModel {
        self.topology = topology;
        self
    }

    /// Leaf 1's EAX: family, model, stepping; also EDX after RESET.
    pub fn signature(&self) -> u32 {
        let (family, extended) = if self.family > 15 { (15, self.family - 15) } else { (self.family, 0) };
        self.stepping & 0xf
            | (self.model & 0xf) << 4
            | family << 8
            | (self.model >> 4 & 0xf) << 16
            | (extended & 0xff) << 20
    }

    /// XSAVE components that XCR0 may enable.
    pub fn xcr0_mask(&self) -> u64 {
        if !self.offers(Feature::Xsave) {
            return 0;
        }
        let mut mask = 3;
        for (feature, bits) in [(Feature::Avx, 4), (Feature::Avx512f, 0xe0), (Feature::Pku, 0x200)] {
            if self.offers(feature) {
                mask |= bits;
            }
        }
        mask
    }

    /// The list for `-cpu help`.
    pub fn help() -> String {
        let mut text = String::from("Available processor models:\n");
        for m in MODELS {
            let _ = writeln!(text, "  {:<20} {}", m.name, m.brand);
        }
        text.push_str("  base                 no features\n");
        text.push_str("  host                 the host processor, as far as the accelerator can offer it\n");
        text.push_str("  max                  everything that the accelerator can offer here\n");
        text.push_str("\nFeatures (+NAME, -NAME, NAME=on, NAME=off):\n");
        let mut line = String::from(" ");
        for row in FEATURES.iter().filter(|r| r.4 != Support::Never) {
            if line.len() + row.3.len() > 76 {
                text.push_str(&line);
                text.push('\n');
                line = String::from(" ");
            }
            line.push(' ');
            line.push_str(row.3);
        }
        text.push_str(&line);
        text.push_str("\n\nProperties: ");
        text.push_str(&PROPERTIES.join(" "));
        text.push('\n');
        text
    }

    /// The feature bits of one word as CPUID shows them.
    fn word(&self, word: Word) -> u32 {
        self.words[word as usize]
    }

    /// Answers CPUID.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, now: &Dynamic) -> [u32; 4] {
        let last = match leaf >> 28 {
            4 if self.offers(Feature::Hypervisor) => return self.hypervisor_leaf(leaf),
            8 => self.xlevel,
            _ => self.level,
        };
        if leaf <= last && leaf >> 28 == last >> 28 {
            return self.leaf(leaf, subleaf, now);
        }
        // Intel answers out-of-range leaves with the highest basic leaf's data, AMD with zeros (SDM vol. 2, CPUID).
        if self.is_amd() { [0; 4] } else { self.leaf(self.level, subleaf, now) }
    }

    fn hypervisor_leaf(&self, leaf: u32) -> [u32; 4] {
        let text = |i: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&HYPERVISOR_SIGNATURE[i..i + 4]);
            u32::from_le_bytes(bytes)
        };
        match leaf {
            0x4000_0000 => [0x4000_0010, text(0), text(4), text(8)],
            // The convention for timing information: TSC and local APIC timer frequency in kHz.
            0x4000_0010 => [(self.tsc_hz / 1000) as u32, (CRYSTAL_HZ / 1000) as u32, 0, 0],
            _ => [0; 4],
        }
    }

    #[allow(clippy::too_many_lines)]
    fn leaf(&self, leaf: u32, subleaf: u32, now: &Dynamic) -> [u32; 4] {
        let id = u32::from(now.index);
        let t = &self.topology;
        let intel = self.vendor == Vendor::Intel;
        match leaf {
            0 => {
                let [b, d, c] = words_of(self.vendor.signature());
                [self.level, b, c, d]
            }
            1 => {
                let mut ecx = self.word(Word::L1Ecx);
                let mut edx = self.word(Word::L1Edx);
                if now.osxsave {
                    ecx |= 1 << 27;
                }
                if !now.apic {
                    edx &= !(1 << 9);
                }
                if t.per_package() > 1 {
                    edx |= 1 << 28;
                }
                let logical = t.per_package().next_power_of_two().min(255);
                let ebx = id << 24 | logical << 16 | 8 << 8;
                [self.signature(), ebx, ecx, edx]
            }
            // Descriptors: 0xff says that leaf 4 has the caches; 0x63, 0x76: TLBs.
            2 if intel => [0x7603_6301, 0x00f0_b5ff, 0, 0x00c3_0000],
            4 if intel => self.cache_leaf(subleaf),
            5 if self.offers(Feature::Monitor) => [64, 64, 3, 0],
            6 => [self.word(Word::L6Eax), 0, 0, 0],
            7 => match subleaf {
                0 => {
                    let mut ecx = self.word(Word::L7Ecx);
                    if now.ospke {
                        ecx |= 1 << 4;
                    }
                    let last = self.last_subleaf_7();
                    [last, self.word(Word::L7Ebx), ecx, self.word(Word::L7Edx)]
                }
                1 => [self.word(Word::L7s1Eax), 0, 0, 0],
                2 => [0, 0, 0, self.word(Word::L7s2Edx)],
                _ => [0; 4],
            },
            0xb => {
                let (shift, count, kind) = match subleaf {
                    0 => (t.thread_bits(), t.threads.max(1), 1),
                    1 => (t.package_bits(), t.per_package(), 2),
                    _ => (0, 0, 0),
                };
                [shift, count, kind << 8 | subleaf & 0xff, id]
            }
            0xd => self.xsave_leaf(subleaf, now),
            0x15 => {
                let divisor = gcd(self.tsc_hz, CRYSTAL_HZ);
                [(CRYSTAL_HZ / divisor) as u32, (self.tsc_hz / divisor) as u32, CRYSTAL_HZ as u32, 0]
            }
            0x16 => {
                let mhz = (self.tsc_hz / 1_000_000) as u32;
                [mhz, mhz, 100, 0]
            }
            0x8000_0000 => {
                if intel {
                    [self.xlevel, 0, 0, 0]
                } else {
                    let [b, d, c] = words_of(self.vendor.signature());
                    [self.xlevel, b, c, d]
                }
            }
            0x8000_0001 => {
                let mut edx = self.word(Word::E1Edx);
                let mut ecx = self.word(Word::E1Ecx);
                if !intel {
                    // AMD repeats the bits of leaf 1 that both makers share (APM vol. 3 §E.4.2).
                    let shared = 0x0183_f3ff;
                    edx |= self.word(Word::L1Edx) & shared;
                    if !now.apic {
                        edx &= !(1 << 9);
                    }
                } else if !now.in_64bit {
                    // SYSCALL is announced in 64-bit mode only (SDM vol. 2, CPUID).
                    edx &= !(1 << 11);
                }
                if !intel && t.per_package() > 1 {
                    ecx |= 2;
                }
                let eax = if intel { 0 } else { self.signature() };
                [eax, 0, ecx, edx]
            }
            0x8000_0002..=0x8000_0004 => {
                let mut bytes = [0u8; 48];
                for (to, from) in bytes.iter_mut().zip(self.brand.bytes().take(47)) {
                    *to = from;
                }
                let at = (leaf - 0x8000_0002) as usize * 16;
                let word = |i: usize| {
                    let mut w = [0; 4];
                    w.copy_from_slice(&bytes[at + 4 * i..at + 4 * i + 4]);
                    u32::from_le_bytes(w)
                };
                [word(0), word(1), word(2), word(3)]
            }
            // L1: 32 KiB, 8-way, 64-byte lines; L2: 1 MiB, 16-way; L3: 16 MiB.
            0x8000_0005 if !intel => [0x01ff_01ff, 0x01ff_01ff, 0x2008_0140, 0x2008_0140],
            0x8000_0006 if !intel => [0, 0x4200_4200, 0x0400_8140, 0x0080_9140],
            0x8000_0006 => [0, 0, 0x0400_8040, 0],
            0x8000_0007 => [0, 0, 0, self.word(Word::E7Edx)],
            0x8000_0008 => {
                let linear = match (self.offers(Feature::Lm), self.offers(Feature::La57)) {
                    (false, _) => 32,
                    (_, true) => 57,
                    _ => 48,
                };
                let ecx = if intel || t.per_package() == 1 {
                    0
                } else {
                    t.package_bits() << 12 | (t.per_package() - 1)
                };
                [u32::from(self.physical_bits) | linear << 8, self.word(Word::E8Ebx), ecx, 0]
            }
            0x8000_001d if !intel && self.offers(Feature::Topoext) => self.cache_leaf(subleaf),
            0x8000_001e if !intel && self.offers(Feature::Topoext) => {
                let core = id >> t.thread_bits();
                [id, (t.threads.max(1) - 1) << 8 | core & 0xff, id >> t.package_bits(), 0]
            }
            // LFENCE serializes; loading a null selector clears the base.
            0x8000_0021 if !intel => [1 << 2 | 1 << 6, 0, 0, 0],
            _ => [0; 4],
        }
    }

    /// Highest subleaf of leaf 7.
    fn last_subleaf_7(&self) -> u32 {
        match (self.word(Word::L7s1Eax), self.word(Word::L7s2Edx)) {
            (0, 0) => 0,
            (_, 0) => 1,
            _ => 2,
        }
    }

    /// Deterministic cache parameters: leaf 4 and 8000_001D.
    fn cache_leaf(&self, subleaf: u32) -> [u32; 4] {
        // (kind, level, ways, sets, shared by the package)
        let (kind, level, ways, sets, shared) = match subleaf {
            0 => (1, 1, 8, 64, false),
            1 => (2, 1, 8, 64, false),
            2 => (3, 2, 16, 1024, false),
            3 => (3, 3, 16, 16384, true),
            _ => return [0; 4],
        };
        let t = &self.topology;
        let sharing = if shared { 1 << t.package_bits() } else { 1 << t.thread_bits() };
        let mut eax = kind | level << 5 | 1 << 8 | (sharing - 1) << 14;
        if self.vendor == Vendor::Intel {
            let cores = 1u32 << (t.package_bits() - t.thread_bits());
            eax |= (cores - 1) << 26;
        }
        [eax, 63 | (ways - 1) << 22, sets - 1, 0]
    }

    fn xsave_leaf(&self, subleaf: u32, now: &Dynamic) -> [u32; 4] {
        let mask = self.xcr0_mask();
        if mask == 0 {
            return [0; 4];
        }
        match subleaf {
            0 => [mask as u32, standard_size(now.xcr0 & mask), standard_size(mask), (mask >> 32) as u32],
            1 => {
                let word = self.word(Word::LdEax);
                let compact = word & 0b1010 != 0;
                let size = if compact { compacted_size(now.xcr0 & mask) } else { 0 };
                [word, size, 0, 0]
            }
            n if n < 63 && mask >> n & 1 != 0 => {
                component(n).map_or([0; 4], |(size, offset)| [size, offset, 0, 0])
            }
            _ => [0; 4],
        }
    }

    /// Everything that CPUID answers for the processor of number `index`, for accelerators that want it as data.
    /// Bits that depend on control registers (OSXSAVE, OSPKE) are clear.
    pub fn leaves(&self, index: u8) -> Vec<Leaf> {
        let now = Dynamic { index, apic: true, in_64bit: true, xcr0: self.xcr0_mask(), ..Dynamic::default() };
        let mut leaves = Vec::new();
        let mut add = |function: u32, index: u32, indexed: bool| {
            let registers = self.cpuid(function, index, &now);
            leaves.push(Leaf { function, index, indexed, registers });
        };
        for function in 0..=self.level {
            let last = match function {
                4 => 4,
                7 => self.last_subleaf_7(),
                0xb => 2,
                0xd => 63 - self.xcr0_mask().max(2).leading_zeros(),
                _ => {
                    add(function, 0, false);
                    continue;
                }
            };
            for i in 0..=last.max(u32::from(function == 0xd)) {
                add(function, i, true);
            }
        }
        if self.offers(Feature::Hypervisor) {
            add(0x4000_0000, 0, false);
            add(0x4000_0010, 0, false);
        }
        for function in 0x8000_0000..=self.xlevel {
            if function == 0x8000_001d {
                (0..=4).for_each(|i| add(function, i, true));
            } else {
                add(function, 0, false);
            }
        }
        leaves
    }
}

/// Greatest common divisor.
fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}

/// A 12-character signature as three registers, in text order.
fn words_of(signature: &str) -> [u32; 3] {
    let mut words = [0u32; 3];
    for (i, byte) in signature.bytes().take(12).enumerate() {
        words[i / 4] |= u32::from(byte) << (8 * (i % 4));
    }
    words
}

/// Size and standard-format offset of an XSAVE component, in bytes (Intel's layout, SDM vol. 1 §13.4).
pub fn component(number: u32) -> Option<(u32, u32)> {
    match number {
        2 => Some((256, 576)),
        5 => Some((64, 1088)),
        6 => Some((512, 1152)),
        7 => Some((1024, 1664)),
        9 => Some((8, 2688)),
        _ => None,
    }
}

/// Size of a standard-format XSAVE area with these components.
pub fn standard_size(components: u64) -> u32 {
    let ends = (2..63).filter(|n| components >> n & 1 != 0).filter_map(component).map(|(s, o)| s + o);
    ends.max().unwrap_or(576)
}

/// Size of a compacted XSAVE area with these components: in order, none needs 64-byte alignment.
pub fn compacted_size(components: u64) -> u32 {
    576 + (2..63).filter(|n| components >> n & 1 != 0).filter_map(component).map(|(s, _)| s).sum::<u32>()
}

/// What CPUID says that depends on the processor's state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dynamic {
    /// Number of the processor, its initial APIC ID.
    pub index: u8,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// CR4.PKE.
    pub ospke: bool,
    /// The local APIC is enabled.
    pub apic: bool,
    /// In 64-bit mode.
    pub in_64bit: bool,
    /// XCR0.
    pub xcr0: u64,
}

impl Dynamic {
    pub(crate) fn of(cpu: &Cpu) -> Dynamic {
        Dynamic {
            index: cpu.env.index(),
            osxsave: cpu.state.cr4 & cr4::OSXSAVE != 0,
            ospke: cpu.state.cr4 & cr4::PKE != 0,
            apic: cpu.state.msr.apic_base & 1 << 11 != 0,
            in_64bit: cpu.in_64bit(),
            xcr0: cpu.state.xcr0,
        }
    }
}

/// Whether the accelerator can offer a feature at all.
fn available(feature: Feature, host: &HostCpu, accelerator: Accelerator) -> bool {
    match (accelerator, feature.support()) {
        (Accelerator::Software, Support::Soft) => true,
        (Accelerator::Software, Support::Host) | (Accelerator::Kvm, _) => host.has(feature),
        (Accelerator::Software, Support::Never) => false,
    }
}

/// Features that `max` leaves out: what only one maker has, MONITOR (a guest would idle in a loop instead of HLT), bits
/// that the topology sets.
fn explicit_only(feature: Feature, vendor: Vendor) -> bool {
    let intel = vendor == Vendor::Intel;
    match feature {
        Feature::Monitor | Feature::Ht | Feature::CmpLegacy | Feature::Ss => true,
        Feature::Mmxext
        | Feature::Cr8legacy
        | Feature::Topoext
        | Feature::Ibpb
        | Feature::Ibrs
        | Feature::AmdStibp
        | Feature::AmdSsbd => intel,
        Feature::ArchCapabilities
        | Feature::SpecCtrl
        | Feature::Stibp
        | Feature::Ssbd
        | Feature::MdClear
        | Feature::BhiCtrl => !intel,
        _ => false,
    }
}

/// Splits QEMU's variants of model names: `-v1`, `-noTSX`, `-IBRS`, `-IBPB`. Transactional memory is in none of ours.
fn variant(name: &str) -> (&str, &'static [&'static str]) {
    let mut stem = name;
    if let Some((head, tail)) = stem.rsplit_once("-v")
        && !tail.is_empty()
        && tail.bytes().all(|b| b.is_ascii_digit())
    {
        stem = head;
    }
    let mut extra: &'static [&'static str] = &[];
    if let Some(head) = stem.strip_suffix("-IBRS") {
        (stem, extra) = (head, &["spec-ctrl"]);
    } else if let Some(head) = stem.strip_suffix("-IBPB") {
        (stem, extra) = (head, &["ibpb"]);
    }
    (stem.strip_suffix("-noTSX").unwrap_or(stem), extra)
}

/// Properties that are not features.
const PROPERTIES: &[&str] = &[
    "vendor",
    "family",
    "model",
    "stepping",
    "level",
    "xlevel",
    "model-id",
    "phys-bits",
    "host-phys-bits",
    "tsc-frequency",
    "check",
    "enforce",
    "migratable",
    "l3-cache",
    "host-cache-info",
    "pmu",
    "kvm",
];

fn nearest_property(name: &str) -> &'static str {
    let feature = Feature::nearest(name);
    let property = PROPERTIES.iter().copied().min_by_key(|p| distance(name, p)).unwrap_or("vendor");
    if distance(name, property) < distance(name, feature) { property } else { feature }
}

fn bad(name: &str, value: &str, expected: &'static str) -> ModelError {
    ModelError::BadValue { name: name.to_owned(), value: value.to_owned(), expected }
}

fn on_off(name: &str, value: &str) -> Result<bool, ModelError> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(bad(name, value, "it is `on` or `off`")),
    }
}

fn number(name: &str, value: &str, max: u32) -> Result<u32, ModelError> {
    let parsed = match value.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    };
    parsed.filter(|n| *n <= max).ok_or_else(|| bad(name, value, "it is a number in the field's range"))
}
