//! Memory operands that one look at the TLB serves.
//!
//! Operands of a unit whose addresses differ by constants are a *group*: the first of them looks up the whole span from the lowest to the highest
//! byte, which must be in one page, and keeps the distance from guest to host addresses; the others only add it, and touch no flags.
//! A span that isn't in one page of the TLB, for whatever reason, leads to a *careful* unit, translated without groups, that goes on with the
//! same instruction. Nothing but generated code runs between a group's look-up and its last member: what is interpreted within a unit either
//! ends the groups, or the unit isn't come back to.

use super::{Guest, Translator, pinned};
use crate::decode::Ea;
use crate::jit::asm::{M, r};
use crate::jit::context::{Context, SPANS};
use crate::jit::stubs::{ColdKind, gpr};
use crate::native::plan;
use crate::state::Seg;
use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind, Register};
use std::mem::offset_of;

/// Most bytes of a span: a longer one is too often in two pages.
const LONGEST: i64 = 256;

/// A value that registers are a constant away from, by number.
type Origin = u32;
/// What an address is made of besides a constant: a base, and an index with its scale.
type Key = (Option<Origin>, Option<(Origin, u8)>);

#[derive(Debug)]
struct Group {
    key: Key,
    write: bool,
    /// First byte and the one behind the last, from the origins.
    min: i64,
    max: i64,
    /// The alignment that some member needs, and where it is; 1: none.
    align: i64,
    aligned: i64,
    members: u32,
    last: usize,
    /// Nothing is written to between its first and its last member, so that they might as well be a copy.
    steady: bool,
    /// The span was looked up, and the distance is in the context.
    known: bool,
    slot: usize,
}

/// A unit's groups.
#[derive(Debug, Default)]
pub(super) struct Groups {
    list: Vec<Group>,
    /// By instruction: its group, and its operand's place from the origins.
    members: Vec<Option<(usize, i64)>>,
    /// The group whose distance is in T1.
    held: Option<usize>,
}

impl Groups {
    /// T1 is about to be used for something else.
    pub(super) fn let_go(&mut self) {
        self.held = None;
    }
    /// What is interpreted now may change the TLB and the memory behind it.
    pub(super) fn forget(&mut self) {
        self.held = None;
        self.list.iter_mut().for_each(|g| g.known = false);
    }
    /// Whether the code from here on relies on a look-up made before.
    pub(super) fn relied_on(&self, index: usize) -> bool {
        self.list.iter().any(|g| g.known && g.last > index)
    }
}

/// How much a register grows by: register and constant.
fn growth(i: &Instruction) -> Option<(Register, i64)> {
    use Mnemonic as Mn;
    let register = i.op0_register();
    if matches!(i.mnemonic(), Mn::Push | Mn::Pop) {
        return Some((Register::RSP, i.stack_pointer_increment().into()));
    }
    if i.op_kind(0) != OpKind::Register || !register.is_gpr64() {
        return None;
    }
    let immediate = matches!(i.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
    Some(match i.mnemonic() {
        Mn::Inc => (register, 1),
        Mn::Dec => (register, -1),
        Mn::Add if immediate => (register, i.immediate(1) as i64),
        Mn::Sub if immediate => (register, (i.immediate(1) as i64).wrapping_neg()),
        Mn::Lea if i.memory_base() == register && i.memory_index() == Register::None => {
            (register, i.memory_displacement64() as i64)
        }
        _ => return None,
    })
}

impl Translator<'_> {
    /// Finds the groups of the unit.
    pub(super) fn find_groups(&mut self) {
        if self.mode.bits() != 64 {
            return;
        }
        let mut origins: [(Origin, i64); 16] = std::array::from_fn(|n| (n as Origin, 0));
        let mut next: Origin = 16;
        let mut groups = Groups::default();
        // The last instruction that wrote to memory, or may have.
        let mut written = 0;
        for (n, g) in self.guest.iter().enumerate() {
            let found = self.span(g).and_then(|(write, size, align)| {
                let (key, at) = address(g, &origins)?;
                let place = groups.list.iter().position(|o| {
                    o.key == key
                        && o.write == write
                        && o.max.max(at + size) - o.min.min(at) <= LONGEST
                        && (align == 1 || o.align == 1 || o.align == align && (at - o.aligned) % align == 0)
                });
                let place = place.unwrap_or_else(|| {
                    groups.list.push(Group {
                        key,
                        write,
                        min: at,
                        max: at,
                        align: 1,
                        aligned: 0,
                        members: 0,
                        last: n,
                        steady: true,
                        known: false,
                        slot: 0,
                    });
                    groups.list.len() - 1
                });
                let group = groups.list.get_mut(place)?;
                group.members += 1;
                group.steady &= group.members == 1 || written <= group.last;
                group.last = n;
                (group.min, group.max) = (group.min.min(at), group.max.max(at + size));
                if align > 1 {
                    (group.align, group.aligned) = (align, at);
                }
                Some((place, at))
            });
            groups.members.push(found);
            if self.writes_memory(g) {
                written = n;
            }
            // What the registers are now.
            let grown = growth(&g.iced);
            for used in self.info.info(&g.iced).used_registers() {
                let register = used.register();
                if !register.is_gpr()
                    || matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None)
                {
                    continue;
                }
                let Some(origin) = origins.get_mut(register.full_register().number()) else { continue };
                match grown {
                    Some((r, by))
                        if r == register.full_register()
                            && origin.1.abs() < 1 << 20
                            && by.abs() < 1 << 20 =>
                    {
                        // POP RSP is written twice.
                        let twice =
                            g.iced.mnemonic() == Mnemonic::Pop && g.iced.op0_register() == Register::RSP;
                        if twice {
                            *origin = (next, 0);
                            next += 1;
                        } else {
                            origin.1 += by;
                        }
                    }
                    _ => {
                        *origin = (next, 0);
                        next += 1;
                    }
                }
            }
        }
        // Only what is shared, and for what there are slots.
        let mut slots = 0;
        for group in &mut groups.list {
            // The start is where alignment can be seen.
            group.min -= (group.min - group.aligned).rem_euclid(group.align);
            if group.members > 1 {
                group.slot = slots;
                slots += 1;
            }
        }
        for member in &mut groups.members {
            if member.is_some_and(|(n, _)| {
                groups.list.get(n).is_none_or(|g| g.members < 2 || g.slot >= SPANS || g.max - g.min > LONGEST)
            }) {
                *member = None;
            }
        }
        self.groups = groups;
    }

    /// Whether an instruction may write to memory, or put accesses in an order.
    fn writes_memory(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let plain = self.class(g).is_some() || super::ordinary::integer(i) || i.is_jcc_short_or_near();
        !plain
            || i.has_lock_prefix()
            || self
                .info
                .info(i)
                .used_memory()
                .iter()
                .any(|m| !matches!(m.access(), OpAccess::Read | OpAccess::NoMemAccess))
            || i.mnemonic() == Mnemonic::Xchg
    }

    /// Whether an instruction's memory operand can be in a group: written to, bytes, alignment.
    fn span(&mut self, g: &Guest) -> Option<(bool, i64, i64)> {
        let i = &g.iced;
        let at = (0..i.op_count()).find(|n| i.op_kind(*n) == OpKind::Memory)?;
        if g.insn.asize != 8
            || matches!(g.insn.seg, Seg::Fs | Seg::Gs)
            || super::undefined_here(g)
            || !matches!(g.insn.ea, Ea::Base64 | Ea::BaseIndex64 | Ea::Index64)
        {
            return None;
        }
        let class = self.class(g);
        let x87 = self.x87_here && super::x87::arithmetic(i);
        if !x87 && class.is_none() && !super::ordinary::integer(i) {
            return None;
        }
        let size = i.memory_size().size();
        if size == 0 || size > 64 {
            return None;
        }
        let align = match class {
            Some(class) if !x87 => plan::alignment(i, class, size).into(),
            _ => 1,
        };
        let write = if x87 {
            super::x87::stores(i)
        } else {
            let info = self.info.info(i);
            let access = [info.op0_access(), info.op1_access(), info.op2_access(), info.op3_access()];
            let access = access.get(at as usize).copied()?;
            matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
        };
        Some((write, size as i64, align))
    }

    /// The memory operand as one of the host's, checked. `align`: 16, 32, 64 or 1.
    pub(super) fn operand_at(&mut self, g: &Guest, size: usize, align: usize, write: bool) -> Option<M> {
        let index = usize::from(self.index);
        if let Some((n, at)) = self.groups.members.get(index).copied().flatten()
            && let Some(group) = self.groups.list.get(n)
            && group.write == write
        {
            return self.member(g, n, at);
        }
        self.operand(g, size, align, write).then_some(M::Base(r::T1, 0))
    }

    fn member(&mut self, g: &Guest, n: usize, at: i64) -> Option<M> {
        let index = usize::from(self.index);
        let group = self.groups.list.get(n)?;
        let (known, last, write) = (group.known, group.last, group.write);
        // A copy is read at one time and upwards: another processor could tell, by the order in which it wrote.
        let steady = !write && group.align == 1 && group.steady && !self.host.locks;
        let (start, span, align) = (group.min - at, group.max - group.min, group.align);
        let slot = M::Ctx(offset_of!(Context, spans) + 8 * group.slot);
        if !known {
            let start = i32::try_from(i64::from(g.insn.disp) + start).ok()?;
            self.clobber();
            let retry = self.a.pos();
            let m = match self.address(g) {
                M::Base(base, _) => M::Base(base, start),
                M::Sib(base, index, _) => M::Sib(base, index, start),
                _ => return None,
            };
            self.a.lea(true, r::T1, m);
            let table = self.look_up(write);
            self.a.alu_imm(true, 7, r::T1, 0x1000 - span as i32);
            let from = self.a.jcc(7);
            let site = self.site(g, false, retry);
            if let Some(s) = self.sites.last_mut() {
                s.size = span as u16;
                s.write = write;
            }
            self.cold(from, ColdKind::Span { site, write });
            if align > 1 {
                self.a.b(&[0x41, 0xf6, 0xc3, align as u8 - 1]); // test r11b, imm8
                let from = self.a.jcc(5);
                self.cold(from, ColdKind::Span { site, write });
            }
            self.a.load(true, r::T1, M::Gs(Some(r::T0), table + 8));
            self.a.rm(true, &[0x2b], r::T1, M::Gs(Some(r::T0), table));
            let after = self.a.pos() as u32;
            if let Some(s) = self.sites.last_mut()
                && steady
            {
                s.bounce = after;
            }
            self.flags.host = false;
            if index < last {
                self.a.store(true, slot, r::T1);
            }
            self.groups.list.get_mut(n)?.known = true;
        } else if self.groups.held != Some(n) {
            self.a.load(true, r::T1, slot);
        }
        self.groups.held = None;
        let i = &g.insn;
        let base = matches!(i.ea, Ea::Base64 | Ea::BaseIndex64).then_some(i.base);
        let index = matches!(i.ea, Ea::BaseIndex64 | Ea::Index64).then_some((i.index, i.scale & 3));
        let (one, other) = match (base, index) {
            (Some(base), None) => ((base, 0), None),
            (None, Some(index)) => (index, None),
            (Some(base), Some(index)) => (index, Some(base)),
            (None, None) => return None,
        };
        if let Some(base) = other {
            let host = self.home(base);
            self.a.lea(true, r::T1, M::Sib(Some(r::T1), Some((host, 0)), 0));
        }
        match pinned(one.0) {
            Some(host) => {
                if other.is_none() {
                    self.groups.held = Some(n);
                }
                Some(M::Sib(Some(r::T1), Some((host, one.1)), i.disp))
            }
            None => {
                let host = self.home(one.0);
                self.a.lea(true, r::T1, M::Sib(Some(r::T1), Some((host, one.1)), i.disp));
                Some(M::Base(r::T1, 0))
            }
        }
    }

    /// The host register with a guest register's value; T0 when it has none of its own.
    fn home(&mut self, n: u8) -> u8 {
        pinned(n).unwrap_or_else(|| {
            self.a.load(true, r::T0, gpr(n.into()));
            r::T0
        })
    }
}

/// What a memory operand's address is made of.
fn address(g: &Guest, origins: &[(Origin, i64); 16]) -> Option<(Key, i64)> {
    let i = &g.insn;
    let mut at = i64::from(i.disp);
    let mut part = |n: u8, scale: u8| {
        let (origin, offset) = origins.get(usize::from(n))?;
        at += offset << scale;
        Some(*origin)
    };
    let base = match i.ea {
        Ea::Base64 | Ea::BaseIndex64 => Some(part(i.base, 0)?),
        _ => None,
    };
    let index = match i.ea {
        Ea::BaseIndex64 | Ea::Index64 => Some((part(i.index, i.scale & 3)?, i.scale & 3)),
        _ => None,
    };
    Some(((base, index), at))
}
