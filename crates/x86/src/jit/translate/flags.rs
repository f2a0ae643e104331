//! The arithmetic flags of a unit in translation: where they are, and how they come to be elsewhere.

use super::Translator;
use iced_x86::{FlowControl, Instruction, Mnemonic, OpAccess, OpKind, Register, RflagsBits};

pub(super) const ARITH: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

/// Where the arithmetic flags are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags {
    pub(super) host: bool,
    pub(super) saved: bool,
    /// Neither, but nothing reads them before they are set again, and what this recipe says gives them, should a fault show them.
    pub(super) recipe: u32,
}

/// No recipe.
pub(super) const NONE: u32 = u32::MAX;

pub(super) const SAVED: Flags = Flags { host: false, saved: true, recipe: NONE };
pub(super) const LIVE: Flags = Flags { host: true, saved: false, recipe: NONE };

/// What an instruction does with the arithmetic flags.
pub(super) fn flag_use(i: &Instruction) -> (bool, u32) {
    let modified = i.rflags_modified() & ARITH;
    let reads = i.rflags_read() & ARITH != 0;
    let keeps = modified != 0
        && (modified != ARITH || i.rflags_undefined() & ARITH != 0 && !logic(i) || conditional(i));
    // What FCOMI and its like leave alone is the host's business.
    let x87 =
        matches!(i.mnemonic(), Mnemonic::Fcomi | Mnemonic::Fcomip | Mnemonic::Fucomi | Mnemonic::Fucomip);
    (reads || keeps || x87, modified)
}

/// Whether the flags that an instruction sets can be found again from its registers, see `helpers::cook`.
pub(super) fn repeatable(i: &Instruction) -> bool {
    use Mnemonic as M;
    let register = |n: u32| i.op_kind(n) == OpKind::Register;
    if i.op_count() != 2 || !register(0) || i.op_kind(1) == OpKind::Memory || i.op_register(0).size() < 4 {
        return false;
    }
    let same = register(1) && i.op_register(0) == i.op_register(1);
    match i.mnemonic() {
        M::Cmp | M::Test | M::And | M::Or => true,
        M::Xor | M::Add | M::Sub => !same || i.mnemonic() != M::Add,
        _ => false,
    }
}

/// Logic operations: AF, called undefined, is zero on all processors.
pub(super) fn logic(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test)
}

/// Shifts, which leave the flags alone when the count is 0.
pub(super) fn conditional(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

impl Translator<'_> {
    /// Saves the flags unless they are.
    pub(super) fn save(&mut self) {
        if self.flags.host && !self.flags.saved {
            self.a.save_flags();
            self.flags.saved = true;
        }
    }
    /// The host's flags are about to be destroyed.
    pub(super) fn clobber(&mut self) {
        if self.flags.recipe != NONE {
            return;
        }
        if self.flags.host
            && !self.flags.saved
            && let Some(recipe) = self.recipe()
        {
            self.flags = Flags { host: false, saved: false, recipe };
            return;
        }
        self.save();
        self.flags.host = false;
    }

    /// A recipe for the flags in the host's, if nothing reads them before they are set again, and the registers that they were made from stay
    /// as they are until then.
    pub(super) fn recipe(&mut self) -> Option<u32> {
        let producer = self.guest.get(self.producer?)?;
        let (a, b) = (producer.iced.op_register(0), producer.iced.op1_register());
        let touches = |r: Register| {
            let full = r.full_register();
            full == a.full_register() || b != Register::None && full == b.full_register()
        };
        let mut writes = false;
        let from = self.producer? + 1;
        for (at, g) in self.guest.get(from..)?.iter().enumerate() {
            let past = from + at >= usize::from(self.index);
            if past {
                if writes {
                    return None;
                }
                let (reads, modified) = flag_use(&g.iced);
                let goes_on = g.iced.flow_control() == FlowControl::Next && !g.ends_unit();
                if reads || !(goes_on || g.taken) {
                    return None;
                }
                if modified == ARITH {
                    let n = self.first_recipe + self.recipes.len() as u32;
                    self.recipes.push(producer.insn);
                    return Some(n);
                }
            }
            let info = self.info.info(&g.iced);
            writes |= info.used_registers().iter().any(|u| {
                !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None)
                    && touches(u.register())
            });
        }
        None
    }
    /// The instruction in translation has set the host's flags.
    pub(super) fn set_live(&mut self) {
        self.flags = LIVE;
        let at = usize::from(self.index);
        self.producer = self.guest.get(at).is_some_and(|g| repeatable(&g.iced)).then_some(at);
    }
    /// The flags are needed in the host's.
    pub(super) fn restore(&mut self) {
        if !self.flags.host {
            self.a.restore_flags();
            self.flags.host = true;
        }
    }
}
