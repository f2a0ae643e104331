//! What a debugger outside of the guest wants to stop at: breakpoints without a change of memory, watched memory, single steps.
//!
//! The guest's own debug registers are not touched by any of it. Without breakpoints nothing is tested that would not be tested anyway:
//! a block that holds one is kept out of the table of jumps, so that only such blocks take the long way, where [`Stops`] is asked. Pages with
//! watched memory stay out of the software TLB, as for the guest's own data breakpoints.

use crate::cpu::Cpu;
use crate::fault::{DebugStop, Exit};
use crate::native::mem::PAGE;

/// Memory that a debugger watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// First linear address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Stop at reads.
    pub read: bool,
    /// Stop at writes.
    pub write: bool,
}

/// The debugger's wishes for one processor.
#[derive(Debug, Default)]
pub(crate) struct Stops {
    /// Linear addresses, sorted.
    breakpoints: Vec<u64>,
    watches: Vec<Watch>,
    /// One instruction is being stepped: interrupts wait, and an exception's delivery ends the step.
    pub(crate) stepping: bool,
    /// What the instruction in execution has hit.
    pub(crate) hit: Option<DebugStop>,
}

impl Stops {
    /// Is there a breakpoint?
    #[inline]
    pub(crate) fn breaks(&self) -> bool {
        !self.breakpoints.is_empty()
    }
    /// Is there anything to stop at? Then the interpreter runs.
    pub(crate) fn armed(&self) -> bool {
        self.breaks() || self.watching() || self.stepping || self.hit.is_some()
    }
    /// Is memory watched?
    #[inline]
    pub(crate) fn watching(&self) -> bool {
        !self.watches.is_empty()
    }
    /// The first breakpoint in `len` bytes of code at `linear`.
    pub(crate) fn first_in(&self, linear: u64, len: u64) -> Option<u64> {
        let i = self.breakpoints.partition_point(|b| *b < linear);
        self.breakpoints.get(i).copied().filter(|b| b - linear < len)
    }
    /// Does a page (by its first linear address) hold watched memory?
    pub(crate) fn page_watched(&self, page: u64) -> bool {
        self.watches.iter().any(|w| overlap(w.address, w.len, page, PAGE).is_some())
    }
    /// The stop that an access means, if any.
    pub(crate) fn watched(&self, linear: u64, len: u64, is_write: bool) -> Option<DebugStop> {
        let kind = |w: &&Watch| if is_write { w.write } else { w.read };
        let hit = self.watches.iter().filter(kind).find_map(|w| overlap(w.address, w.len, linear, len));
        hit.map(|address| DebugStop::Watchpoint { address, is_write })
    }
}

/// The first address that two ranges share.
fn overlap(a: u64, a_len: u64, b: u64, b_len: u64) -> Option<u64> {
    let first = a.max(b);
    (first.wrapping_sub(a) < a_len && first.wrapping_sub(b) < b_len).then_some(first)
}

impl Cpu {
    /// Sets what to stop at. [`Cpu::run`] comes back with [`Exit::Debug`] before an instruction at one of the linear addresses in
    /// `breakpoints`, and after an instruction that accessed watched memory.
    pub fn set_stops(&mut self, breakpoints: &[u64], watches: &[Watch]) {
        let stops = &mut self.stops;
        stops.breakpoints = breakpoints.to_vec();
        stops.breakpoints.sort_unstable();
        stops.breakpoints.dedup();
        stops.watches = watches.iter().filter(|w| w.len > 0).copied().collect();
        stops.hit = None;
        // Jumps and links were made without regard to them. Watched pages leave the TLB when the processor runs next.
        self.mmu.renew();
        self.flush_tlb(true);
    }

    /// Executes one instruction for a debugger: maskable interrupts, NMI and SMI wait, breakpoints don't count, and the delivery of an
    /// exception ends the step before the handler's first instruction. A string instruction with a repeat prefix is one step. Another exit than
    /// [`Exit::Debug`] says that the step did not come to its end.
    pub fn debug_step(&mut self) -> Exit {
        let breakpoints = std::mem::take(&mut self.stops.breakpoints);
        self.stops.stepping = true;
        self.mmu.renew();
        let exit = self.run(1);
        self.mmu.renew();
        self.stops.stepping = false;
        self.stops.breakpoints = breakpoints;
        match (exit, self.stops.hit.take()) {
            (Exit::Budget, Some(hit)) => Exit::Debug(hit),
            (Exit::Budget, None) => Exit::Debug(DebugStop::Step),
            (other, _) => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::long_mode_cpu;
    use crate::{CpuState, Signals};

    /// A processor at 0x1000 with this code.
    fn with(code: &[u8]) -> Cpu {
        let (cpu, ram) = long_mode_cpu(4 << 20);
        ram.write(0x1000, code).expect("inside");
        cpu
    }
    const RAX: usize = 0;

    #[test]
    fn a_breakpoint_stops_before_its_instruction_wherever_it_is_in_a_block() {
        // inc rax; inc rax; inc rax; jmp -11
        let code = [0x48, 0xff, 0xc0, 0x48, 0xff, 0xc0, 0x48, 0xff, 0xc0, 0xeb, 0xf5];
        let mut cpu = with(&code);
        assert_eq!(cpu.run(4000), Exit::Budget);
        assert_eq!((cpu.state.rip, cpu.state.gpr[RAX]), (0x1000, 3000));
        for (at, count) in [(0x1006, 3002), (0x1009, 3003), (0x1000, 3003)] {
            cpu.set_stops(&[at], &[]);
            assert_eq!(cpu.run(100), Exit::Debug(DebugStop::Breakpoint));
            assert_eq!((cpu.state.rip, cpu.state.gpr[RAX]), (at, count));
            assert_eq!(cpu.run(100), Exit::Debug(DebugStop::Breakpoint), "it stays where it is");
        }
        assert_eq!(cpu.debug_step(), Exit::Debug(DebugStop::Step), "a step goes over it");
        assert_eq!((cpu.state.rip, cpu.state.gpr[RAX]), (0x1003, 3004));
        assert_eq!(cpu.run(1000), Exit::Debug(DebugStop::Breakpoint));
        assert_eq!((cpu.state.rip, cpu.state.gpr[RAX]), (0x1000, 3006));
        cpu.set_stops(&[0x1004], &[]);
        assert_eq!(cpu.run(400), Exit::Budget, "not the start of an instruction");
        cpu.set_stops(&[], &[]);
        assert_eq!(cpu.run(400), Exit::Budget);
        assert_eq!((cpu.state.rip, cpu.state.gpr[RAX]), (0x1000, 3606));
    }

    #[test]
    fn a_watchpoint_stops_after_the_access() {
        // mov [0x2000], eax; mov ebx, [0x2004]; add qword [0x2008], 1; nop
        let code = [
            0x89, 0x04, 0x25, 0, 0x20, 0, 0, 0x8b, 0x1c, 0x25, 4, 0x20, 0, 0, 0x48, 0x83, 0x04, 0x25, 8,
            0x20, 0, 0, 1, 0x90, 0xeb, 0xe6,
        ];
        let run = |read, write, address, len| {
            let mut cpu = with(&code);
            assert_eq!(cpu.run(5), Exit::Budget);
            cpu.state.rip = 0x1000;
            cpu.set_stops(&[], &[Watch { address, len, read, write }]);
            (cpu.run(5), cpu.state.rip)
        };
        let stop = |address, is_write| Exit::Debug(DebugStop::Watchpoint { address, is_write });
        assert_eq!(run(false, true, 0x2002, 1), (stop(0x2002, true), 0x1007));
        assert_eq!(run(true, false, 0x2002, 4), (stop(0x2004, false), 0x100e));
        assert_eq!(run(false, true, 0x2004, 8), (stop(0x2008, true), 0x1017));
        assert_eq!(run(true, true, 0x200c, 4), (stop(0x200c, false), 0x1017), "it reads first");
        assert_eq!(run(true, true, 0x2010, 4).0, Exit::Budget);
        let mut cpu = with(&code);
        cpu.set_stops(&[], &[Watch { address: 0x2000, len: 4, read: false, write: true }]);
        assert_eq!(cpu.debug_step(), stop(0x2000, true), "a step says so too");
        assert_eq!(cpu.debug_step(), Exit::Debug(DebugStop::Step));
    }

    #[test]
    fn a_step_holds_interrupts_back_and_ends_at_an_exception() {
        // sti; nop; nop; ud2
        let mut cpu = with(&[0xfb, 0x90, 0x90, 0x0f, 0x0b]);
        cpu.state.rflags |= 0x200;
        cpu.env.signals().raise(Signals::INTERRUPT | Signals::NMI);
        for rip in [0x1001, 0x1002, 0x1003] {
            assert_eq!(cpu.debug_step(), Exit::Debug(DebugStop::Step));
            assert_eq!(cpu.state.rip, rip);
        }
        assert_eq!(cpu.debug_step(), Exit::Shutdown, "there is no handler here");
        let CpuState { rip, nmi_pending, .. } = cpu.state;
        assert_eq!((rip, nmi_pending), (0x1003, true));
        // rep stosb is one step.
        let mut cpu = with(&[0xf3, 0xaa, 0x90]);
        (cpu.state.gpr[1], cpu.state.gpr[7]) = (0x18_0000, 0x20_0000);
        assert_eq!(cpu.debug_step(), Exit::Debug(DebugStop::Step));
        assert_eq!((cpu.state.rip, cpu.state.gpr[1]), (0x1002, 0));
    }

    #[test]
    fn ranges_share_their_first_address() {
        assert_eq!(overlap(10, 4, 12, 8), Some(12));
        assert_eq!(overlap(12, 8, 10, 4), Some(12));
        assert_eq!(overlap(10, 2, 12, 8), None);
        assert_eq!(overlap(u64::MAX - 1, 2, u64::MAX, 1), Some(u64::MAX));
    }
}
