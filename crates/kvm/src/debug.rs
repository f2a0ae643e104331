//! A debugger's hold on a vCPU: single step, software and hardware breakpoints.
//!
//! Linux, `Documentation/virt/kvm/api.rst`, `KVM_SET_GUEST_DEBUG`; debug registers: SDM vol. 3B §18.2. While hardware breakpoints are
//! set, the guest's own debug registers are not in effect.

use crate::error::KvmError;
use crate::vcpu::KvmVcpu;
use kvm_bindings as kb;

/// What a hardware breakpoint stops at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Execution of the instruction at the address.
    Execute,
    /// Writes.
    Write,
    /// Reads and writes.
    ReadWrite,
}

/// A hardware breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareBreak {
    /// Linear address, aligned to the length.
    pub address: u64,
    /// Kind.
    pub watch: Watch,
    /// Length in bytes: 1, 2, 4 or 8; 1 for execution.
    pub length: u8,
}

/// What a debugger wants to stop at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// After each instruction.
    pub step: bool,
    /// While stepping, interrupts wait.
    pub block_interrupts: bool,
    /// At INT3, which the debugger has put into memory itself.
    pub software: bool,
    /// At up to four addresses.
    pub hardware: [Option<HardwareBreak>; 4],
}

impl DebugControl {
    /// The debug registers that do it: addresses in 0 to 3, control in 7.
    fn registers(&self) -> Result<[u64; 8], KvmError> {
        let mut registers = [0u64; 8];
        // Bit 10 is always set; LE and GE (8, 9) ask older processors for exact data breakpoints.
        let mut control = 1 << 10 | 1 << 8 | 1 << 9;
        for (n, point) in self.hardware.iter().enumerate() {
            let Some(point) = point else { continue };
            let length = match (point.watch, point.length) {
                (Watch::Execute, 1) | (_, 1) => 0,
                (Watch::Write | Watch::ReadWrite, 2) => 1,
                (Watch::Write | Watch::ReadWrite, 8) => 2,
                (Watch::Write | Watch::ReadWrite, 4) => 3,
                _ => {
                    return Err(KvmError::Unsuitable(format!(
                        "a hardware breakpoint for {:?} at {:#x} can't be {} bytes long: use 1 for execution, else 1, 2, 4 or 8",
                        point.watch, point.address, point.length
                    )));
                }
            };
            if point.address % u64::from(point.length) != 0 {
                return Err(KvmError::Unsuitable(format!(
                    "a hardware breakpoint of {} bytes must be aligned to them; {:#x} is not",
                    point.length, point.address
                )));
            }
            let kind: u64 = match point.watch {
                Watch::Execute => 0,
                Watch::Write => 1,
                Watch::ReadWrite => 3,
            };
            registers[n] = point.address;
            control |= 2 << (2 * n) | (kind | length << 2) << (16 + 4 * n);
        }
        registers[7] = control;
        Ok(registers)
    }
}

impl KvmVcpu {
    /// Sets what to stop at; the default stops at nothing.
    ///
    /// # Errors
    /// This kernel's KVM has no debugging, a breakpoint is impossible, or the call fails.
    pub fn set_debug(&mut self, wanted: &DebugControl) -> Result<(), KvmError> {
        if !self.vm.kvm.caps.guest_debug {
            return Err(KvmError::Capability {
                capability: "KVM_CAP_SET_GUEST_DEBUG",
                what: "stepping and breakpoints",
                advice: "debug on the software CPU (-accel interp)",
            });
        }
        let hardware = wanted.hardware.iter().any(Option::is_some);
        let flags = [
            (wanted.step, kb::KVM_GUESTDBG_SINGLESTEP),
            (wanted.step && wanted.block_interrupts, kb::KVM_GUESTDBG_BLOCKIRQ),
            (wanted.software, kb::KVM_GUESTDBG_USE_SW_BP),
            (hardware, kb::KVM_GUESTDBG_USE_HW_BP),
        ];
        let mut control = flags.iter().filter(|(on, _)| *on).fold(0, |bits, (_, flag)| bits | flag);
        if control != 0 {
            control |= kb::KVM_GUESTDBG_ENABLE;
        }
        let mut request = kb::kvm_guest_debug { control, ..Default::default() };
        if hardware {
            request.arch.debugreg = wanted.registers()?;
        }
        match self.fd.set_guest_debug(&request) {
            // Blocking interrupts while stepping came with Linux 5.15.
            Err(error) if error.errno() == libc::EINVAL && control & kb::KVM_GUESTDBG_BLOCKIRQ != 0 => {
                request.control &= !kb::KVM_GUESTDBG_BLOCKIRQ;
                self.skip(
                    "interrupts can't be held back while stepping: this kernel's KVM doesn't know how".into(),
                );
                self.fd.set_guest_debug(&request).map_err(|e| self.call("KVM_SET_GUEST_DEBUG", e))
            }
            other => other.map_err(|e| self.call("KVM_SET_GUEST_DEBUG", e)),
        }?;
        self.debug_control = request.control;
        Ok(())
    }

    /// Gives the guest the breakpoint exception of an INT3 of its own, at which the vCPU stopped.
    ///
    /// # Errors
    /// The call fails, for one because another exception waits.
    pub fn inject_breakpoint(&mut self) -> Result<(), KvmError> {
        let control = self.debug_control | kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_INJECT_BP;
        let request = kb::kvm_guest_debug { control, ..Default::default() };
        self.fd.set_guest_debug(&request).map_err(|e| self.call("KVM_SET_GUEST_DEBUG", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_registers_as_the_manual_lays_them_out() {
        let mut control = DebugControl::default();
        control.hardware[0] = Some(HardwareBreak { address: 0x1000, watch: Watch::Execute, length: 1 });
        control.hardware[2] = Some(HardwareBreak { address: 0x2008, watch: Watch::Write, length: 8 });
        let registers = control.registers().expect("possible");
        assert_eq!(registers[..4], [0x1000, 0, 0x2008, 0]);
        assert_eq!(registers[7], 0x700 | 0x2 | 0x20 | 0x9 << 24);
        control.hardware[1] = Some(HardwareBreak { address: 0x3001, watch: Watch::ReadWrite, length: 4 });
        assert!(control.registers().unwrap_err().to_string().contains("0x3001"));
        control.hardware[1] = Some(HardwareBreak { address: 0x3000, watch: Watch::Execute, length: 4 });
        assert!(control.registers().is_err());
    }
}
