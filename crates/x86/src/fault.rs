//! How an instruction ends when it doesn't end well, and why a run ended.

/// Why [`crate::Cpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The budget of instructions is used up.
    Budget,
    /// HLT or MWAIT: nothing to do until an interrupt.
    Halted,
    /// [`crate::Signals::KICK`] was raised (and is now cleared).
    Kicked,
    /// The processor waits for a start-up IPI.
    WaitForSipi,
    /// Triple fault; the state is as it was before the instruction that started it.
    Shutdown,
    /// A stop that a debugger asked for.
    Debug(DebugStop),
    /// The guest asked for a reset in a way that only the processor sees.
    Reset,
}

/// What a debugger asked to stop at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugStop {
    /// A breakpoint at the present RIP.
    Breakpoint,
    /// Watched memory was accessed by the instruction just executed.
    Watchpoint {
        /// The first watched linear address that was accessed.
        address: u64,
        /// Was it written?
        is_write: bool,
    },
    /// One instruction was executed.
    Step,
}

/// An instruction that didn't complete. The architectural state is as before the instruction, except where the manual says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An exception is to be delivered.
    Exception {
        /// Its vector, 0-31.
        vector: u8,
        /// Its error code, when the vector pushes one. All of them have 16 bits, and a result of 8 bytes goes in a register.
        error: Option<u16>,
    },
    /// The run ends here.
    Stop(Exit),
    /// The instruction did a part of its work (REP) and continues after looking for interrupts: not retired yet.
    Again,
}

/// The result of executing (a part of) an instruction.
pub type Exec<T = ()> = Result<T, Fault>;

/// Exception vectors (SDM vol. 3A table 6-1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

macro_rules! plain {
    ($($name:ident $vector:ident $doc:literal),*) => { $(
        #[doc = $doc]
        #[cold]
        pub const fn $name() -> Fault {
            Fault::Exception { vector: vector::$vector, error: None }
        }
    )* };
}
macro_rules! coded {
    ($($name:ident $vector:ident $doc:literal),*) => { $(
        #[doc = $doc]
        #[cold]
        pub const fn $name(error: u32) -> Fault {
            Fault::Exception { vector: vector::$vector, error: Some(error as u16) }
        }
    )* };
}

impl Fault {
    plain!(
        de DE "#DE, divide error.", db DB "#DB, debug (set DR6 first).", br BR "#BR, BOUND range exceeded.",
        ud UD "#UD, invalid opcode.", nm NM "#NM, no math coprocessor.", mf MF "#MF, x87 floating point.",
        xm XM "#XM, SIMD floating point."
    );
    coded!(
        ts TS "#TS, invalid TSS.", np NP "#NP, segment not present.", ss SS "#SS, stack segment.",
        gp GP "#GP, general protection.", pf PF "#PF, page fault (set CR2 first).", ac AC "#AC, alignment check."
    );
}

impl From<Exit> for Fault {
    fn from(exit: Exit) -> Fault {
        Fault::Stop(exit)
    }
}
