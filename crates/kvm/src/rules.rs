//! Where the instruction pointer stands at each kind of exit: measured, not assumed.
//!
//! The kernel's documentation says only that an access is complete when the vCPU is entered again. So a tiny guest makes one access of
//! each kind, at known addresses, in real mode and in flat protected mode, and the pointer is noted.

use kvm_bindings as kb;
use kvm_ioctls::{Kvm, VcpuExit};

/// Kinds of access that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Out,
    Outs,
    RepOuts,
    In,
    Ins,
    RepIns,
    Read,
    Write,
    RepWrite,
}

/// Where the pointer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    At,
    After,
    Unknown,
}

/// The answers: real mode, protected mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rules([[Stand; 9]; 2]);

impl Default for Rules {
    /// What Linux's emulator is written to do, for when it can't be measured.
    fn default() -> Rules {
        use Stand::{After, At};
        Rules([[At, After, At, At, At, At, At, After, At]; 2])
    }
}

/// One access: its class, the instruction's bytes for both modes alike.
const STEPS: [(Class, &[u8]); 9] = [
    (Class::Out, &[0xee]),
    (Class::Outs, &[0x6e]),
    (Class::RepOuts, &[0xf3, 0x6e]),
    (Class::In, &[0xec]),
    (Class::Ins, &[0x6c]),
    (Class::RepIns, &[0xf3, 0x6c]),
    // mov al, [si] / [esi]: 8a 04 in 16-bit code is [si], and in 32-bit code 8a 06 is [esi]; see `code`.
    (Class::Read, &[0x8a, 0x04]),
    (Class::Write, &[0x88, 0x04]),
    (Class::RepWrite, &[0xf3, 0xaa]),
];

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
/// Nothing is mapped there.
const DEVICE: u64 = 0x8000;

impl Rules {
    pub(crate) fn stand(&self, class: Class, protected: bool) -> Stand {
        self.0[usize::from(protected)][class as usize]
    }

    /// None when the scratch machine can't be made or behaves in a way that tells nothing.
    pub(crate) fn measure(kvm: &Kvm) -> Option<Rules> {
        let mut rules = Rules::default();
        for protected in [false, true] {
            if let Some(column) = measure_mode(kvm, protected) {
                rules.0[usize::from(protected)] = column;
            }
        }
        Some(rules)
    }
}

fn measure_mode(kvm: &Kvm, protected: bool) -> Option<[Stand; 9]> {
    let block = hyaline_ram::RamBlock::new("kvm.scratch", 0x4000).ok()?;
    let vm = kvm.create_vm().ok()?;
    vm.set_identity_map_address(0xfeff_c000).ok()?;
    vm.set_tss_address(0xfeff_d000).ok()?;
    let region = kb::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: block.len(),
        userspace_addr: block.host_ptr() as u64,
    };
    // SAFETY: the block is larger than nothing, page aligned, and outlives the machine (dropped after it, at the end of this function).
    unsafe { vm.set_user_memory_region(region) }.ok()?;
    let mut vcpu = vm.create_vcpu(0).ok()?;
    let sregs = {
        let mut sregs = vcpu.get_sregs().ok()?;
        for segment in
            [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss]
        {
            segment.base = 0;
            segment.selector = 0;
            if protected {
                (segment.limit, segment.db, segment.g, segment.selector) = (u32::MAX, 1, 1, 0x10);
                (segment.present, segment.s, segment.type_, segment.dpl) = (1, 1, 3, 0);
            }
        }
        if protected {
            (sregs.cs.type_, sregs.cs.selector) = (11, 8);
            sregs.cr0 |= 1;
        }
        sregs
    };
    vcpu.set_sregs(&sregs).ok()?;
    let mut column = [Stand::Unknown; 9];
    for (class, bytes) in STEPS {
        let mut code = bytes.to_vec();
        if protected && matches!(class, Class::Read | Class::Write) {
            code[1] = 0x06;
        }
        let length = code.len() as u64;
        code.push(0xf4);
        block.write(CODE, &code).ok()?;
        let device_si = matches!(class, Class::Read | Class::Write);
        let regs = kb::kvm_regs {
            rip: CODE,
            rflags: 2,
            rcx: 3,
            rdx: 0x600,
            rsi: if device_si { DEVICE } else { DATA },
            rdi: if class == Class::RepWrite { DEVICE } else { DATA },
            rsp: 0x3000,
            ..Default::default()
        };
        vcpu.set_regs(&regs).ok()?;
        let fits = match vcpu.run() {
            Ok(VcpuExit::IoOut(0x600, _)) => matches!(class, Class::Out | Class::Outs | Class::RepOuts),
            Ok(VcpuExit::IoIn(0x600, data)) => {
                data.fill(0);
                matches!(class, Class::In | Class::Ins | Class::RepIns)
            }
            Ok(VcpuExit::MmioRead(DEVICE, data)) => {
                data.fill(0);
                class == Class::Read
            }
            Ok(VcpuExit::MmioWrite(DEVICE, _)) => matches!(class, Class::Write | Class::RepWrite),
            _ => false,
        };
        let rip = vcpu.get_regs().ok()?.rip;
        column[class as usize] = match rip {
            CODE if fits => Stand::At,
            rip if fits && rip == CODE + length => Stand::After,
            _ => Stand::Unknown,
        };
        // Complete the access, so that the next step starts clean: leave as soon as it is done.
        vcpu.set_kvm_immediate_exit(1);
        let _ = vcpu.run();
        vcpu.set_kvm_immediate_exit(0);
    }
    Some(column)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever a kernel does, it must be one of both; which it is decides only where two instructions fit.
    #[test]
    fn this_kernel_can_be_measured() {
        let kvm = match crate::Kvm::open() {
            Ok(kvm) => kvm,
            Err(error) => {
                assert!(std::env::var("HYALINE_REQUIRE_KVM").as_deref() != Ok("1"), "{error}");
                println!("\nSKIPPED: this_kernel_can_be_measured: /dev/kvm: {error}");
                return;
            }
        };
        let rules = Rules::measure(&kvm.inner.fd).expect("a scratch machine");
        println!("{rules:?}");
        assert!(rules.0.iter().flatten().all(|stand| *stand != Stand::Unknown), "{rules:?}");
    }
}
