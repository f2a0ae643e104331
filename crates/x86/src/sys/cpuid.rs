//! CPU models.

use iced_x86::CpuidFeature;

/// What a guest's CPUID says, and so which instructions exist.
#[derive(Clone, Debug, Default)]
pub struct CpuModel {}

impl CpuModel {
    /// Whether the model has the feature that an instruction needs. Features that are not CPUID bits (8086, 80186 …) are there.
    pub fn has(&self, _feature: CpuidFeature) -> bool {
        true
    }
    /// MAXPHYADDR.
    pub fn physical_bits(&self) -> u32 {
        40
    }
    /// 1 GiB pages.
    pub fn has_gigabyte_pages(&self) -> bool {
        true
    }
    /// Whether the model is AMD's: decides where the two vendors' decoding differs.
    pub fn is_amd(&self) -> bool {
        true
    }
}
