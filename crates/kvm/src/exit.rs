//! Why a vCPU came back, in words.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use kvm_bindings as kb;
use std::fmt;

/// Why [`KvmVcpu::run`](crate::KvmVcpu::run) came back. The vCPU's state is complete and can be fetched.
#[derive(Debug)]
pub enum Exit {
    /// HLT with interrupt controllers outside of the kernel: nothing to do until an interrupt. Calling `run` again without one gives
    /// this again.
    Halted,
    /// [`KickHandle::kick`](crate::KickHandle::kick), or `Signals::KICK`, which is now cleared.
    Kicked,
    /// With the local APIC outside of the kernel: the processor waits for a start-up IPI.
    WaitForSipi,
    /// Triple fault. `run` gives this again until a state is loaded.
    Shutdown,
    /// A stop that a debugger asked for.
    Debug(DebugStop),
    /// A level-triggered interrupt was ended in the kernel's local APIC: tell the I/O APIC, and run again.
    ApicEoi {
        /// Vector.
        vector: u8,
    },
    /// The guest reads an MSR that the kernel doesn't know: answer with [`KvmVcpu::complete_msr`](crate::KvmVcpu::complete_msr), and run again.
    ReadMsr {
        /// Number of the MSR.
        index: u32,
    },
    /// The guest writes an MSR that the kernel doesn't know: answer as for reads.
    WriteMsr {
        /// Number of the MSR.
        index: u32,
        /// Value.
        value: u64,
    },
    /// Something about the machine as a whole (from paravirtual interfaces).
    System(SystemEvent),
    /// The vCPU can't go on.
    Failed(Box<Failure>),
}

/// What a debugger asked to stop at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugStop {
    /// What it was.
    pub cause: DebugCause,
    /// Linear address of the next instruction; for a software breakpoint that of INT3.
    pub pc: u64,
}

/// See [`DebugStop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugCause {
    /// INT3. If the debugger didn't put it there, it is the guest's: see [`KvmVcpu::inject_breakpoint`](crate::KvmVcpu::inject_breakpoint).
    Software,
    /// One instruction was executed.
    Step,
    /// A hardware breakpoint or watchpoint, 0 to 3.
    Hardware(u8),
    /// Another debug exception (task switch, general detect): DR6.
    Other(u64),
}

impl DebugStop {
    /// From the kernel's record (SDM vol. 3B §18.2.3, DR6).
    pub(crate) fn new(arch: &kb::kvm_debug_exit_arch) -> DebugStop {
        let cause = match arch.dr6 {
            _ if arch.exception == 3 => DebugCause::Software,
            dr6 if dr6 & 0xf != 0 => DebugCause::Hardware((dr6 & 0xf).trailing_zeros() as u8),
            dr6 if dr6 & 1 << 14 != 0 => DebugCause::Step,
            dr6 => DebugCause::Other(dr6),
        };
        DebugStop { cause, pc: arch.pc }
    }
}

/// See [`Exit::System`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// The guest asks for power-off.
    PowerOff,
    /// The guest asks for a reset.
    Reset,
    /// The guest says that it crashed.
    Crash,
    /// The guest asks for suspension.
    Suspend,
    /// Another, by its number, with its data.
    Other(u32, Vec<u64>),
}

impl SystemEvent {
    pub(crate) fn new(kind: u32, data: &[u64]) -> SystemEvent {
        match kind {
            kb::KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::PowerOff,
            kb::KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset,
            kb::KVM_SYSTEM_EVENT_CRASH => SystemEvent::Crash,
            kb::KVM_SYSTEM_EVENT_SUSPEND => SystemEvent::Suspend,
            other => SystemEvent::Other(other, data.to_vec()),
        }
    }
}

/// Why a vCPU can't go on.
#[derive(Debug)]
pub enum Failure {
    /// The kernel gave up on an instruction or event.
    Internal(InternalError),
    /// The processor refused to enter the guest.
    Entry {
        /// The processor's reason.
        reason: u64,
        /// The host processor's number.
        cpu: u32,
        /// Registers, one group a line.
        registers: String,
    },
    /// Guest memory can't be provided (the host lacks memory, or a page is damaged).
    Memory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        size: u64,
        /// The host's error.
        error: std::io::Error,
    },
    /// The kernel gave an exit that this program doesn't know.
    Unknown {
        /// KVM_EXIT_ number.
        reason: u32,
        /// The hardware's reason, where there is one.
        hardware: u64,
    },
    /// KVM_RUN or another call failed.
    Call(crate::KvmError),
    /// The memory map could not be carried out; the reason is among [`KvmVm::take_errors`](crate::KvmVm::take_errors).
    Map,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Internal(error) => error.fmt(f),
            Failure::Entry { reason, cpu, registers } => {
                write!(
                    f,
                    "the processor refused to enter the guest: {} (reason {reason:#x}",
                    entry_reason(*reason)
                )?;
                match *cpu {
                    u32::MAX => write!(f, ")")?,
                    cpu => write!(f, ", host processor {cpu})")?,
                }
                write!(f, "\n{registers}")
            }
            Failure::Memory { address, size, error } => write!(
                f,
                "guest memory at {address:#x} ({size} bytes) can't be provided by the host: {error}; give the guest less memory (-m) or free some"
            ),
            Failure::Unknown { reason, hardware } => write!(
                f,
                "KVM gave exit reason {reason} (hardware reason {hardware:#x}), which this program doesn't know; run without KVM \
                 (-accel interp) to see what the guest does there"
            ),
            Failure::Call(error) => error.fmt(f),
            Failure::Map => f.write_str("the memory map could not be given to KVM, so the guest can't go on"),
        }
    }
}

/// What the processor says when it refuses to enter a guest. Intel: exit reasons with bit 31 set (SDM vol. 3C §27.8 and appendix C)
/// and VM-instruction errors (§31.4); AMD: exit code -1 (APM vol. 2 §15.5.1).
fn entry_reason(reason: u64) -> &'static str {
    match reason {
        0x8000_0021 => "the guest's state is not valid for it",
        0x8000_0022 => "an MSR of the guest can't be loaded",
        0x8000_0029 => "a machine check happened",
        u64::MAX => "the guest's state or controls are not valid for it",
        7 => "control fields are not valid",
        8 => "host-state fields are not valid",
        26 => "events are blocked by MOV SS",
        _ => "it gave a reason that is not in the table",
    }
}

/// `KVM_EXIT_INTERNAL_ERROR`, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// KVM_INTERNAL_ERROR_ number.
    pub suberror: u32,
    /// The kernel's data words.
    pub data: Vec<u64>,
    /// Linear address of the instruction.
    pub address: u64,
    /// Bytes there, as far as known, up to 15.
    pub bytes: Vec<u8>,
    /// 16, 32 or 64.
    pub bits: u32,
    /// Registers, one group a line.
    pub registers: String,
}

impl InternalError {
    /// The suberror's name.
    pub fn name(&self) -> &'static str {
        match self.suberror {
            kb::KVM_INTERNAL_ERROR_EMULATION => "emulation failure",
            kb::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
            kb::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was being delivered",
            kb::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit with an unexpected reason",
            _ => "an error without a name",
        }
    }

    /// The first instruction of the bytes as text, and its length; None when they are none.
    pub fn disassembly(&self) -> Option<(String, usize)> {
        disassemble(&self.bytes, self.bits, self.address)
    }
}

pub(crate) fn disassemble(bytes: &[u8], bits: u32, address: u64) -> Option<(String, usize)> {
    if bytes.is_empty() {
        return None;
    }
    let mut decoder = Decoder::with_ip(bits, bytes, address, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut text = String::new();
    GasFormatter::new().format(&instruction, &mut text);
    Some((text, instruction.len()))
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KVM internal error {}: {}", self.suberror, self.name())?;
        match self.suberror {
            kb::KVM_INTERNAL_ERROR_EMULATION => {
                write!(f, ": the kernel had to emulate an instruction and could not")?;
            }
            kb::KVM_INTERNAL_ERROR_DELIVERY_EV | kb::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                let labels: &[&str] = if self.suberror == kb::KVM_INTERNAL_ERROR_DELIVERY_EV {
                    &["event", "exit reason", "exit qualification"]
                } else {
                    &["exit reason"]
                };
                for (label, value) in labels.iter().zip(&self.data) {
                    write!(f, ", {label} {value:#x}")?;
                }
            }
            _ => {}
        }
        write!(f, "\n  at {:#x}:", self.address)?;
        self.bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))?;
        match (self.bytes.is_empty(), self.disassembly()) {
            (true, _) => write!(f, " (the bytes can't be read)")?,
            (_, Some((text, length))) => {
                write!(f, "\n  which begins with `{text}` ({length} bytes, {}-bit code)", self.bits)?;
            }
            (_, None) => write!(f, "\n  which is no instruction in {}-bit code", self.bits)?,
        }
        write!(f, "\n{}", self.registers)?;
        write!(f, "\nTry without KVM: -accel interp")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulation_failure_reads_well() {
        let error = InternalError {
            suberror: 1,
            data: vec![],
            address: 0xfff0,
            bytes: vec![0x0f, 0x58, 0x07, 0x90],
            bits: 32,
            registers: "eax=0".into(),
        };
        let text = error.to_string();
        assert!(text.starts_with("KVM internal error 1: emulation failure: "), "{text}");
        assert!(
            text.contains(
                "at 0xfff0: 0f 58 07 90\n  which begins with `addps (%edi),%xmm0` (3 bytes, 32-bit code)"
            ),
            "{text}"
        );
        let none = InternalError { bytes: vec![0xff, 0xff], ..error };
        assert!(none.to_string().contains("which is no instruction in 32-bit code"), "{none}");
    }

    #[test]
    fn debug_causes() {
        let arch = |exception, dr6| kb::kvm_debug_exit_arch { exception, dr6, pc: 5, ..Default::default() };
        assert_eq!(DebugStop::new(&arch(3, 0)).cause, DebugCause::Software);
        assert_eq!(DebugStop::new(&arch(1, 1 << 14)).cause, DebugCause::Step);
        assert_eq!(DebugStop::new(&arch(1, 4)).cause, DebugCause::Hardware(2));
        assert_eq!(DebugStop::new(&arch(1, 1 << 13)).cause, DebugCause::Other(1 << 13));
    }

    #[test]
    fn refused_entry() {
        let failure = Failure::Entry { reason: 0x8000_0021, cpu: u32::MAX, registers: "r".into() };
        assert_eq!(
            failure.to_string(),
            "the processor refused to enter the guest: the guest's state is not valid for it (reason 0x80000021)\nr"
        );
    }
}
