//! Which model-specific registers hold a processor's state, and where [`Msrs`] has them.
//!
//! Numbers: SDM vol. 4, table 2-2; APM vol. 2, appendix A.

use hyaline_x86::state::Msrs;

pub(crate) const TSC: u32 = 0x10;
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// Numbers of the fixed-range MTRRs, in the order of `Msrs::mtrr_fixed`.
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// The registers with names, besides MTRRs and machine-check banks.
const PLAIN: &[(u32, &str)] = &[
    (0x8b, "IA32_BIOS_SIGN_ID"),
    (0x3a, "IA32_FEATURE_CONTROL"),
    (0x3b, "IA32_TSC_ADJUST"),
    (0x48, "IA32_SPEC_CTRL"),
    (0x9e, "IA32_SMBASE"),
    (0x174, "IA32_SYSENTER_CS"),
    (0x175, "IA32_SYSENTER_ESP"),
    (0x176, "IA32_SYSENTER_EIP"),
    (0x17a, "IA32_MCG_STATUS"),
    (0x17b, "IA32_MCG_CTL"),
    (0x1a0, "IA32_MISC_ENABLE"),
    (0x1d9, "IA32_DEBUGCTL"),
    (0x277, "IA32_PAT"),
    (0x2ff, "IA32_MTRR_DEF_TYPE"),
    (0xda0, "IA32_XSS"),
    (0xc000_0081, "IA32_STAR"),
    (0xc000_0082, "IA32_LSTAR"),
    (0xc000_0083, "IA32_CSTAR"),
    (0xc000_0084, "IA32_FMASK"),
    (0xc000_0102, "IA32_KERNEL_GS_BASE"),
    (0xc000_0103, "IA32_TSC_AUX"),
    // Last: it needs the local APIC's timer mode and the TSC in place.
    (TSC_DEADLINE, "IA32_TSC_DEADLINE"),
];

/// All numbers, for a state with `banks` machine-check banks, in the order in which to set them.
pub(crate) fn indices(banks: usize) -> Vec<u32> {
    let mut all: Vec<u32> = MTRR_FIXED.to_vec();
    all.extend(0x200..0x210);
    all.extend(0x400..0x400 + 4 * banks.min(32) as u32);
    all.extend(PLAIN.iter().map(|(index, _)| *index));
    all
}

/// Where the state keeps an MSR.
pub(crate) fn field(msrs: &mut Msrs, index: u32) -> Option<&mut u64> {
    Some(match index {
        0x8b => &mut msrs.bios_sign_id,
        0x3a => &mut msrs.feature_control,
        0x3b => &mut msrs.tsc_adjust,
        0x48 => &mut msrs.spec_ctrl,
        0x9e => &mut msrs.smbase,
        0x174 => &mut msrs.sysenter_cs,
        0x175 => &mut msrs.sysenter_esp,
        0x176 => &mut msrs.sysenter_eip,
        0x17a => &mut msrs.mcg_status,
        0x17b => &mut msrs.mcg_ctl,
        0x1a0 => &mut msrs.misc_enable,
        0x1d9 => &mut msrs.debugctl,
        0x200..=0x20f => msrs.mtrr_var.get_mut((index as usize - 0x200) / 2)?.get_mut(index as usize & 1)?,
        0x277 => &mut msrs.pat,
        0x2ff => &mut msrs.mtrr_def_type,
        0x400..=0x47f => {
            let at = index as usize - 0x400;
            msrs.mc_banks.get_mut(at / 4)?.get_mut(at % 4)?
        }
        TSC_DEADLINE => &mut msrs.tsc_deadline,
        0xda0 => &mut msrs.xss,
        0xc000_0081 => &mut msrs.star,
        0xc000_0082 => &mut msrs.lstar,
        0xc000_0083 => &mut msrs.cstar,
        0xc000_0084 => &mut msrs.sfmask,
        0xc000_0102 => &mut msrs.kernel_gs_base,
        0xc000_0103 => &mut msrs.tsc_aux,
        _ => {
            let at = MTRR_FIXED.iter().position(|fixed| *fixed == index)?;
            msrs.mtrr_fixed.get_mut(at)?
        }
    })
}

/// The manual's name.
pub(crate) fn name(index: u32) -> String {
    if let Some((_, name)) = PLAIN.iter().find(|(i, _)| *i == index) {
        return (*name).into();
    }
    match index {
        TSC => "IA32_TIME_STAMP_COUNTER".into(),
        0x200..=0x20f if index & 1 == 0 => format!("IA32_MTRR_PHYSBASE{}", (index - 0x200) / 2),
        0x200..=0x20f => format!("IA32_MTRR_PHYSMASK{}", (index - 0x200) / 2),
        0x400..=0x47f => {
            format!(
                "IA32_MC{}_{}",
                (index - 0x400) / 4,
                ["CTL", "STATUS", "ADDR", "MISC"][(index & 3) as usize]
            )
        }
        _ if MTRR_FIXED.contains(&index) => "fixed-range MTRR".into(),
        _ => "without a name here".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_msr_has_its_own_place() {
        let mut msrs = Msrs { mc_banks: vec![[0; 4]; 3], ..Msrs::default() };
        let all = indices(3);
        for (n, index) in all.iter().enumerate() {
            let place = field(&mut msrs, *index).expect("a place");
            assert_eq!(*place, 0, "{index:#x} shares its place");
            *place = n as u64 + 1;
            assert!(!name(*index).contains("without"), "{index:#x}");
        }
        assert_eq!(msrs.mtrr_var[7][1] as usize, all.iter().position(|i| *i == 0x20f).expect("there") + 1);
        assert_eq!(field(&mut msrs, 0x40c), None);
        assert_eq!(name(0x409), "IA32_MC2_STATUS");
    }
}
