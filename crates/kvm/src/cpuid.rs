//! CPUID under KVM: leaves as plain values, what the kernel supports of them, and the topology of one vCPU.
//!
//! Bits: SDM vol. 2A, CPUID; APM vol. 3, appendix E. The kernel's side: Linux, `Documentation/virt/kvm/api.rst`,
//! `KVM_GET_SUPPORTED_CPUID`.

use crate::error::Skipped;
use crate::system::Capabilities;
use kvm_bindings as kb;
use serde::{Deserialize, Serialize};

/// What CPUID answers for one leaf (and subleaf).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question, where it matters.
    pub subleaf: Option<u32>,
    /// EAX of the answer.
    pub eax: u32,
    /// EBX of the answer.
    pub ebx: u32,
    /// ECX of the answer.
    pub ecx: u32,
    /// EDX of the answer.
    pub edx: u32,
}

pub(crate) fn from_kvm(entry: &kb::kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        leaf: entry.function,
        subleaf: (entry.flags & kb::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

pub(crate) fn to_kvm(leaf: &CpuidLeaf) -> kb::kvm_cpuid_entry2 {
    kb::kvm_cpuid_entry2 {
        function: leaf.leaf,
        index: leaf.subleaf.unwrap_or(0),
        flags: if leaf.subleaf.is_some() { kb::KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }
}

/// The answer for a leaf, if there is one.
pub fn find(leaves: &[CpuidLeaf], leaf: u32, subleaf: u32) -> Option<&CpuidLeaf> {
    leaves.iter().find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf))
}

fn find_mut(leaves: &mut [CpuidLeaf], leaf: u32, subleaf: u32) -> Option<&mut CpuidLeaf> {
    leaves.iter_mut().find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf))
}

/// A register of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Reg {
    fn of(self, leaf: &mut CpuidLeaf) -> &mut u32 {
        match self {
            Reg::Eax => &mut leaf.eax,
            Reg::Ebx => &mut leaf.ebx,
            Reg::Ecx => &mut leaf.ecx,
            Reg::Edx => &mut leaf.edx,
        }
    }
}

/// The words of CPUID that hold feature bits, which must not exceed what the kernel supports; and in each the bits that the
/// kernel's list leaves out although a guest may have them (they follow from control registers, or are the monitor's to give).
const FEATURE_WORDS: &[(u32, u32, Reg, u32)] = &[
    // OSXSAVE (27) follows CR4; hypervisor present (31) is the monitor's; TSC-deadline (24) goes by a capability.
    (1, 0, Reg::Ecx, 1 << 27 | 1 << 31 | 1 << 24),
    // HTT (28) is topology.
    (1, 0, Reg::Edx, 1 << 28),
    (6, 0, Reg::Eax, 1 << 2),
    (7, 0, Reg::Ebx, 0),
    // OSPKE (4) follows CR4.
    (7, 0, Reg::Ecx, 1 << 4),
    (7, 0, Reg::Edx, 0),
    (7, 1, Reg::Eax, 0),
    (7, 1, Reg::Edx, 0),
    (7, 2, Reg::Edx, 0),
    (0xd, 0, Reg::Eax, 0),
    (0xd, 0, Reg::Edx, 0),
    (0xd, 1, Reg::Eax, 0),
    (0xd, 1, Reg::Ecx, 0),
    (0xd, 1, Reg::Edx, 0),
    // CmpLegacy (1) and the topology extension (22) are topology.
    (0x8000_0001, 0, Reg::Ecx, 1 << 1 | 1 << 22),
    (0x8000_0001, 0, Reg::Edx, 0),
    (0x8000_0007, 0, Reg::Edx, 1 << 8),
    (0x8000_0008, 0, Reg::Ebx, 0),
    (0x8000_000a, 0, Reg::Edx, 0),
    (0x8000_0021, 0, Reg::Eax, 0),
    (0x4000_0001, 0, Reg::Eax, 0),
];

/// Takes from a wanted model what the kernel can't give. Leaves that hold no feature bits are left as they are; XSAVE's sizes are
/// taken from the kernel. Gives the leaves, and a sentence for each word that lost bits.
pub fn intersect(
    wanted: &[CpuidLeaf],
    supported: &[CpuidLeaf],
    caps: &Capabilities,
) -> (Vec<CpuidLeaf>, Vec<Skipped>) {
    let mut leaves = wanted.to_vec();
    let mut skipped = Vec::new();
    for &(leaf, subleaf, reg, free) in FEATURE_WORDS {
        let free = if leaf == 1 && reg == Reg::Ecx && !caps.tsc_deadline { free & !(1 << 24) } else { free };
        let allowed = find(supported, leaf, subleaf).map_or(0, |l| *reg.of(&mut l.clone())) | free;
        if let Some(have) = find_mut(&mut leaves, leaf, subleaf) {
            let word = reg.of(have);
            let lost = *word & !allowed;
            if lost != 0 {
                *word &= allowed;
                skipped.push(Skipped(format!(
                    "CPUID leaf {leaf:#x}.{subleaf:#x} {reg:?}: this kernel's KVM can't give the bits {lost:#010x}; the guest won't see them"
                )));
            }
        }
    }
    // The sizes and offsets of XSAVE components are the host's: the guest's XSAVE runs on the host's processor.
    for leaf in leaves.iter_mut().filter(|l| l.leaf == 0xd && l.subleaf.is_some_and(|s| s >= 2)) {
        match find(supported, 0xd, leaf.subleaf.unwrap_or(0)) {
            Some(host) => *leaf = *host,
            None => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        }
    }
    (leaves, skipped)
}

/// Does the leaf belong to KVM's paravirtual interface?
fn is_paravirtual(leaf: &CpuidLeaf) -> bool {
    (0x4000_0000..0x4000_0100).contains(&leaf.leaf)
}

/// The leaves that offer KVM's paravirtual interface (kvm-clock, steal time …), to be added to a model that shall have it. A guest
/// that uses it can't be saved: its state is in MSRs that only KVM has, and that [`CpuState`](hyaline_x86::state::CpuState) doesn't hold.
pub fn paravirtual(supported: &[CpuidLeaf]) -> Vec<CpuidLeaf> {
    supported.iter().filter(|leaf| is_paravirtual(leaf)).copied().collect()
}

/// The model `-cpu host`: all that the kernel supports, with the bits its list leaves out, and without KVM's paravirtual interface (see
/// [`paravirtual`]). `lapic` tells that the local APIC is in the kernel, without which there is neither x2APIC nor TSC-deadline.
pub fn host_model(supported: &[CpuidLeaf], caps: &Capabilities, lapic: bool) -> Vec<CpuidLeaf> {
    let mut leaves: Vec<_> = supported.iter().filter(|leaf| !is_paravirtual(leaf)).copied().collect();
    if let Some(one) = find_mut(&mut leaves, 1, 0) {
        one.ecx |= 1 << 31;
        if lapic {
            one.ecx |= 1 << 21;
            if caps.tsc_deadline {
                one.ecx |= 1 << 24;
            }
        } else {
            one.ecx &= !(1 << 21 | 1 << 24);
        }
    }
    // The kernel's list leaves the processor's name empty: it is the host's own (APM vol. 3, E.4.2).
    for leaf in 0x8000_0002..=0x8000_0004 {
        let host = host_cpuid(leaf, 0);
        if let Some(entry) = find_mut(&mut leaves, leaf, 0)
            && (entry.eax, entry.ebx, entry.ecx, entry.edx) == (0, 0, 0, 0)
        {
            *entry = CpuidLeaf { leaf, subleaf: entry.subleaf, ..host };
        }
    }
    leaves
}

/// The host processor's own answer.
fn host_cpuid(leaf: u32, subleaf: u32) -> CpuidLeaf {
    #[cfg(target_arch = "x86_64")]
    {
        // The function is safe on this architecture where the standard library says so.
        #[allow(unused_unsafe)]
        // SAFETY: every 64-bit x86 processor has CPUID, and it changes nothing.
        let r = unsafe { std::arch::x86_64::__cpuid_count(leaf, subleaf) };
        CpuidLeaf { leaf, subleaf: Some(subleaf), eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
    }
    #[cfg(not(target_arch = "x86_64"))]
    CpuidLeaf { leaf, subleaf: Some(subleaf), eax: 0, ebx: 0, ecx: 0, edx: 0 }
}

/// The number of APIC ID bits that `vcpus` processors in one package need.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.max(1).next_power_of_two().trailing_zeros()
}

/// Fills in what differs per vCPU: APIC IDs and the topology (one package with `vcpus` cores of one thread).
pub fn with_topology(leaves: &[CpuidLeaf], apic_id: u32, vcpus: u32) -> Vec<CpuidLeaf> {
    let mut leaves = leaves.to_vec();
    let bits = id_bits(vcpus);
    let max_leaf = find(&leaves, 0, 0).map_or(0, |l| l.eax);
    let amd = find(&leaves, 0, 0).is_some_and(|l| l.ebx == u32::from_le_bytes(*b"Auth"));
    if let Some(one) = find_mut(&mut leaves, 1, 0) {
        // SDM vol. 2A table 3-8: initial APIC ID in EBX 31-24, addressable IDs in EBX 23-16 when HTT (EDX 28) is set.
        one.ebx = one.ebx & 0xffff | (apic_id & 0xff) << 24 | vcpus.max(1).next_power_of_two().min(255) << 16;
        if vcpus > 1 { one.edx |= 1 << 28 } else { one.edx &= !(1 << 28) }
    }
    // Deterministic cache parameters: EAX 31-26 is the number of core IDs in the package less one, EAX 25-14 the number of
    // threads that share the cache less one. A level 3 cache is shared by all.
    for cache in leaves.iter_mut().filter(|l| l.leaf == 4 && l.eax & 0x1f != 0) {
        let level = cache.eax >> 5 & 7;
        let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
        cache.eax = cache.eax & 0x3fff | ((1u32 << bits) - 1).min(63) << 26 | (sharing & 0xfff) << 14;
    }
    for cache in leaves.iter_mut().filter(|l| l.leaf == 0x8000_001d && l.eax & 0x1f != 0) {
        let level = cache.eax >> 5 & 7;
        let sharing = if level >= 3 { (1u32 << bits) - 1 } else { 0 };
        cache.eax = cache.eax & 0x3fff | (sharing & 0xfff) << 14;
    }
    for leaf in [0xb, 0x1f] {
        if find(&leaves, leaf, 0).is_none() || max_leaf < leaf {
            continue;
        }
        leaves.retain(|l| l.leaf != leaf);
        let level = |subleaf, shift: u32, count: u32, kind: u32| CpuidLeaf {
            leaf,
            subleaf: Some(subleaf),
            eax: shift,
            ebx: count,
            ecx: kind << 8 | subleaf,
            edx: apic_id,
        };
        leaves.extend([level(0, 0, 1, 1), level(1, bits, vcpus.max(1), 2), level(2, 0, 0, 0)]);
    }
    if let Some(leaf) = find_mut(&mut leaves, 0x8000_0008, 0)
        && amd
    {
        // APM vol. 3, E.4.7: ECX 7-0 number of threads less one, ECX 15-12 APIC ID size.
        leaf.ecx = leaf.ecx & !0xf0ff | (vcpus.max(1) - 1) & 0xff | bits << 12;
    }
    if let Some(leaf) = find_mut(&mut leaves, 0x8000_001e, 0) {
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (apic_id, apic_id & 0xff, 0, 0);
    }
    leaves
}

/// Feature bits that state depends on: does the model have XSAVE, and which components may XCR0 hold?
pub(crate) fn xsave_mask(leaves: &[CpuidLeaf]) -> u64 {
    let has = find(leaves, 1, 0).is_some_and(|l| l.ecx & 1 << 26 != 0);
    match find(leaves, 0xd, 0) {
        Some(l) if has => u64::from(l.edx) << 32 | u64::from(l.eax),
        // Without XSAVE there are x87 and SSE.
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, subleaf: Option<u32>, regs: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { leaf, subleaf, eax: regs[0], ebx: regs[1], ecx: regs[2], edx: regs[3] }
    }

    fn caps(tsc_deadline: bool) -> Capabilities {
        Capabilities {
            max_vcpus: 8,
            memory_slots: 32,
            readonly_memory: true,
            irqchip: true,
            split_irqchip: true,
            pit2: true,
            irq_routes: 4096,
            irqfd: true,
            irqfd_resample: true,
            signal_msi: true,
            ioeventfd: true,
            ioeventfd_any_length: true,
            coalesced_mmio: 2,
            coalesced_pio: true,
            sync_regs: 7,
            immediate_exit: true,
            xsave: true,
            xsave_size: 4096,
            xsave2: true,
            xcrs: true,
            sregs2: true,
            vcpu_events: true,
            interrupt_shadow: true,
            debug_registers: true,
            guest_debug: true,
            smm: true,
            tsc_deadline,
            tsc_control: false,
            mce_banks: 32,
            user_msrs: true,
            nmi: true,
        }
    }

    #[test]
    fn features_beyond_the_kernel_are_dropped_and_told() {
        let supported = [leaf(1, None, [0, 0, 0x1, 0x10]), leaf(7, Some(0), [0, 0x20, 0, 0])];
        let wanted = [leaf(1, None, [0x600, 0, 0x8100_0003, 0x30]), leaf(7, Some(0), [0, 0x120, 0x10, 0])];
        let (got, skipped) = intersect(&wanted, &supported, &caps(true));
        assert_eq!(got[0], leaf(1, None, [0x600, 0, 0x8100_0001, 0x10]));
        assert_eq!(got[1], leaf(7, Some(0), [0, 0x20, 0x10, 0]));
        assert_eq!(skipped.len(), 3, "{skipped:?}");
        assert_eq!(
            skipped[0].0,
            "CPUID leaf 0x1.0x0 Ecx: this kernel's KVM can't give the bits 0x00000002; the guest won't see them"
        );
        let (got, _) = intersect(&wanted, &supported, &caps(false));
        assert_eq!(got[0].ecx, 0x8000_0001);
    }

    #[test]
    fn the_host_model_is_neutral_to_the_accelerator() {
        let supported = [leaf(1, None, [0, 0, 0, 0]), leaf(0x4000_0001, None, [0x0100_7efb, 0, 0, 0])];
        let model = host_model(&supported, &caps(true), true);
        assert_eq!(model.len(), 1);
        assert_eq!(model[0].ecx, 1 << 31 | 1 << 24 | 1 << 21);
        assert_eq!(host_model(&supported, &caps(true), false)[0].ecx, 1 << 31);
        assert_eq!(paravirtual(&supported), supported[1..]);
    }

    #[test]
    fn topology_of_one_vcpu() {
        let base =
            [leaf(0, None, [0x1f, 0, 0, 0]), leaf(1, None, [0, 0x800, 0, 0]), leaf(0xb, Some(0), [0; 4])];
        let got = with_topology(&base, 2, 3);
        assert_eq!(find(&got, 1, 0).map(|l| (l.ebx, l.edx)), Some((0x0204_0800, 1 << 28)));
        assert_eq!(find(&got, 0xb, 0).map(|l| (l.eax, l.ebx, l.ecx, l.edx)), Some((0, 1, 0x100, 2)));
        assert_eq!(find(&got, 0xb, 1).map(|l| (l.eax, l.ebx, l.ecx, l.edx)), Some((2, 3, 0x201, 2)));
        assert_eq!(find(&with_topology(&base, 0, 1), 1, 0).map(|l| l.edx), Some(0));
    }
}
