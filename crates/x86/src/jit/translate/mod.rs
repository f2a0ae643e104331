//! One pass from guest instructions to host instructions.
//!
//! A *unit* is a run of instructions of one page, entered at its start only; it goes on behind conditional branches that aren't taken. Guest
//! registers are in the host registers of [`stubs::PINNED`]; r9, r10, r11 and r15 are in the context, host r10 and r11 are scratch and host
//! r15 counts instructions: a unit takes all of its instructions off at entry, ways out in the middle give the rest back. The arithmetic
//! flags are in the host's or saved in the context, which is known at every point; they are saved before anything that would
//! destroy them, because a fault may have to show them.

/// A word of the context as a memory operand.
macro_rules! ctx {
    ($field:ident) => {
        $crate::jit::asm::M::Ctx(std::mem::offset_of!($crate::jit::context::Context, $field))
    };
}

mod branch;
mod flags;
mod groups;
mod integer;
mod memory;
mod ordinary;
mod string;
mod system;
mod x87;

use super::asm::{Asm, Fixup, M, r};
use super::stubs::{self, Cold, ColdKind, Stubs};
use super::{Link, ModeKey, Site, Unit};
use crate::decode::{Ea, Insn, insn_flag};
use crate::native::mem::{PAGE_SLOTS, PAGE_TABLE, WRITE_TABLE};
use flags::{Flags, NONE, SAVED};
use groups::Groups;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind,
};
use integer::PushForm;
use x87::Notes;

/// Most instructions in a repeated loop.
const UNROLLED: usize = 48;
/// Most instructions in a unit.
pub(super) const MAX_UNIT: usize = 64;

/// A guest instruction on its way.
#[derive(Clone)]
pub(super) struct Guest {
    pub rip: u64,
    pub insn: Insn,
    pub iced: Instruction,
    pub immediate: u8,
    /// A direct branch whose target comes next in the unit: the end of a loop that is repeated there.
    pub taken: bool,
}

impl Guest {
    /// `insn` was decoded from the same bytes.
    pub(super) fn new(rip: u64, insn: Insn, bits: u32) -> Guest {
        let mut decoder = Decoder::with_ip(bits, insn.bytes(), rip, DecoderOptions::NONE);
        let iced = decoder.decode();
        let c = decoder.get_constant_offsets(&iced);
        let immediate = (c.immediate_size() + c.immediate_size2()) as u8;
        Guest { rip, insn, iced, immediate, taken: false }
    }
    fn next(&self) -> u64 {
        self.rip.wrapping_add(u64::from(self.insn.len))
    }
    /// A conditional branch backwards: what comes behind it is the end of a loop, rarely executed.
    pub(super) fn is_backward(&self) -> bool {
        self.iced.flow_control() == FlowControl::ConditionalBranch
            && self.iced.near_branch_target() <= self.rip
    }
    /// Nothing of the unit comes after it.
    pub(super) fn ends_unit(&self) -> bool {
        if !self.insn.has(insn_flag::END) {
            return false;
        }
        if !self.insn.has(insn_flag::PLAIN) && self.iced.flow_control() == FlowControl::Next {
            // System instructions: whether the unit goes on is seen when they have been interpreted.
            return self.iced.is_invalid() || self.iced.mnemonic() == Mnemonic::Hlt;
        }
        !matches!(self.iced.flow_control(), FlowControl::ConditionalBranch | FlowControl::Next)
    }
}

/// Repeats the loop that a whole unit is, so that what is done once per unit is done less often.
pub(super) fn unroll(guest: &mut Vec<Guest>) {
    let (Some(first), Some(last)) = (guest.first(), guest.last()) else { return };
    let i = &last.iced;
    if !(i.is_jcc_short_or_near() || i.is_jmp_short_or_near())
        || !matches!(i.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32)
        || i.near_branch_target() != first.rip
        // What leaves the unit, or may, gains nothing from there being more of it.
        || guest.iter().any(|g| g.insn.has(insn_flag::END) && !g.insn.has(insn_flag::PLAIN))
    {
        return;
    }
    let times = (UNROLLED / guest.len().max(1)).min(4);
    if times < 2 {
        return;
    }
    let mut body = guest.clone();
    if let Some(branch) = body.last_mut() {
        branch.taken = true;
    }
    for _ in 1..times {
        guest.splice(0..0, body.iter().cloned());
    }
}

/// What the host can do for the emitter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    pub bmi2: bool,
    /// LOCK is kept.
    pub locks: bool,
    /// Host and model have TZCNT.
    pub tzcnt: bool,
    /// Host and model have LZCNT.
    pub lzcnt: bool,
}

pub(super) use x87::Note;

pub(super) struct Output {
    pub unit: Unit,
    pub code: Vec<u8>,
    pub sites: Vec<Site>,
    pub links: Vec<Link>,
    /// Instructions whose flags may have to be found again.
    pub recipes: Vec<Insn>,
    /// Notes of x87 instructions.
    pub notes: Vec<Note>,
}

pub(super) struct Translator<'a> {
    a: Asm,
    stubs: &'a Stubs,
    host: Host,
    mode: ModeKey,
    info: &'a mut InstructionInfoFactory,
    flags: Flags,
    guest: &'a [Guest],
    /// The instruction that the flags in the host's are of, when it is repeatable.
    producer: Option<usize>,
    recipes: Vec<Insn>,
    first_recipe: u32,
    colds: Vec<Cold>,
    sites: Vec<Site>,
    first_site: u32,
    links: Vec<Link>,
    first_link: u32,
    unit: u32,
    page: u32,
    count: u8,
    /// The instruction in translation: number, and its first site.
    index: u8,
    site_from: usize,
    notes: Notes,
    groups: Groups,
    /// The guest's x87 state is in the host's registers throughout the unit.
    x87_here: bool,
    /// Where the way out for lack of budget gives the unit's number.
    redirect: usize,
}

/// Numbers that the next unit starts from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    pub unit: u32,
    pub page: u32,
    pub site: u32,
    pub link: u32,
    pub recipe: u32,
    pub note: u32,
    /// Without groups of memory operands.
    pub careful: bool,
    /// The page that the only instruction goes on in, and its identity.
    pub second: Option<(u64, u32)>,
    /// Address at which the unit's code will run.
    pub exec: u64,
    /// Offset of that in the arena.
    pub offset: u32,
    pub ctx: u64,
}

/// Host register of a guest register that has one.
fn pinned(n: u8) -> Option<u8> {
    match n {
        4 => Some(r::SP),
        9 | 10 | 11 | 15 => None,
        n => Some(n),
    }
}

fn page_slot(linear: u64) -> i32 {
    (PAGE_TABLE + ((linear >> 12) as usize & (PAGE_SLOTS - 1)) * 4) as i32
}

/// `cmp dword gs:[slot], id`: whether a linear page still is what a unit was made from.
pub(super) fn guard(a: &mut Asm, linear: u64, id: u32) -> Fixup {
    a.cmp_mem_imm(M::Gs(None, page_slot(linear)), id as i32);
    a.jcc(5)
}

/// Translates a unit.
pub(super) fn translate<'a>(
    guest: &'a [Guest],
    n: Numbers,
    mode: ModeKey,
    host: Host,
    stubs: &'a Stubs,
    info: &'a mut InstructionInfoFactory,
) -> Output {
    let rip = guest.first().map_or(0, |g| g.rip);
    let mut t = Translator {
        a: Asm::new(n.exec, n.ctx),
        stubs,
        host,
        mode,
        info,
        flags: SAVED,
        guest,
        producer: None,
        recipes: Vec::new(),
        first_recipe: n.recipe,
        colds: Vec::new(),
        sites: Vec::new(),
        first_site: n.site,
        links: Vec::new(),
        first_link: n.link,
        unit: n.unit,
        page: n.page,
        count: guest.len().min(MAX_UNIT) as u8,
        index: 0,
        site_from: 0,
        notes: Notes::new(n.note),
        groups: Groups::default(),
        x87_here: false,
        redirect: 0,
    };
    t.x87_here = guest.iter().any(|g| t.wants_x87(g));
    if !n.careful {
        t.find_groups();
    }
    // Entered with the flags in the host's, then with the flags saved.
    t.a.save_flags();
    let entry_saved = t.a.pos();
    t.a.alu_imm(true, 5, r::LEFT, i32::from(t.count));
    let from = t.a.jcc(8);
    let switch = n.offset + Asm::place(from) as u32 - 2;
    t.cold(from, ColdKind::Count { unit: n.unit, count: t.count });
    if let Some((next, id)) = n.second {
        let from = guard(&mut t.a, next, id);
        t.cold(from, ColdKind::Count { unit: n.unit, count: t.count });
    }
    let vectors = guest.iter().any(|g| t.class(g).is_some());
    if vectors {
        stubs::test_vectors(&mut t.a);
        let from = t.a.jcc(4);
        let back = t.a.pos();
        t.cold(from, ColdKind::Vectors { back });
    }
    if t.x87_here
        && let Some(first) = guest.first()
    {
        t.test_x87(first);
    }
    let mut open = true;
    for (i, g) in guest.iter().enumerate() {
        t.index = i as u8;
        t.site_from = t.sites.len();
        t.settle_note(Some(g));
        open = t.instruction(g);
        let (next, live) = (n.offset + t.a.pos() as u32, t.flags.host);
        for site in t.sites.iter_mut().skip(t.site_from) {
            site.next = next;
            site.flags_live = live && !site.interpreted;
            site.last = !open;
            site.vectors = vectors;
            // Offsets of retries were counted from the unit's start.
            site.retry += n.offset;
            if site.bounce != 0 {
                site.bounce += n.offset;
            }
        }
        if !open {
            break;
        }
    }
    t.settle_note(None);
    if open && let Some(last) = guest.last() {
        t.edge(last.next());
    }
    // Entered from anywhere, flags saved: is the page still the same?
    let entry_guarded = t.a.pos();
    let failed = guard(&mut t.a, rip, n.page);
    let f = t.a.jmp();
    t.a.bind(f, entry_saved);
    t.a.here(failed);
    t.a.mov_imm(r::T1, rip);
    t.a.mov_imm(r::T0, u64::from(u32::MAX));
    t.a.jmp_abs(t.stubs.lookup);
    t.emit_colds(n.offset);
    let unit = Unit {
        page: n.page,
        rip,
        live: n.offset,
        saved: n.offset + entry_saved as u32,
        guarded: n.offset + entry_guarded as u32,
        second: n.second,
        switch,
        redirect: n.offset + t.redirect as u32,
        dead: false,
        bytes: 0,
        len: 0,
    };
    let Translator { a, sites, links, recipes, notes, .. } = t;
    Output { unit, code: a.buf, sites, links, recipes, notes: notes.list }
}

impl Translator<'_> {
    fn cold(&mut self, from: Fixup, kind: ColdKind) {
        self.colds.push(Cold { from, kind });
    }

    fn emit_colds(&mut self, offset: u32) {
        let mut i = 0;
        // Edges add links' exits while they are emitted.
        while i < self.colds.len() {
            let Some(Cold { from, kind }) = self.colds.get_mut(i).map(|c| Cold {
                from: c.from,
                kind: std::mem::replace(&mut c.kind, ColdKind::Interpret { site: 0 }),
            }) else {
                break;
            };
            i += 1;
            self.a.here(from);
            match kind {
                ColdKind::Miss { site, write } => {
                    let table = if write { WRITE_TABLE as i32 } else { 0 };
                    self.a.rm(true, &[0x33], r::T1, M::Gs(Some(r::T0), table));
                    self.a.mov_imm(r::T0, site.into());
                    self.a.jmp_abs(if write { self.stubs.miss_write } else { self.stubs.miss_read });
                }
                ColdKind::Interpret { site } => {
                    self.a.mov_imm(r::T0, site.into());
                    self.a.jmp_abs(self.stubs.interpret);
                }
                ColdKind::Count { unit, count } => {
                    self.a.alu_imm(true, 0, r::LEFT, count.into());
                    if self.redirect == 0 {
                        self.redirect = self.a.pos();
                    }
                    self.a.mov_imm(r::T0, unit.into());
                    self.a.jmp_abs(self.stubs.count);
                }
                ColdKind::Vectors { back } => {
                    let at = self.a.base + back as u64;
                    self.a.mov_imm(r::T1, at);
                    self.a.jmp_abs(self.stubs.load_vectors);
                }
                ColdKind::Span { site, write } => {
                    let table = if write { WRITE_TABLE as i32 } else { 0 };
                    self.a.rm(true, &[0x33], r::T1, M::Gs(Some(r::T0), table));
                    self.a.mov_imm(r::T0, site.into());
                    self.a.jmp_abs(self.stubs.miss_span);
                }
                ColdKind::Target { site, back } => {
                    self.a.mov_imm(r::T0, site.into());
                    match back {
                        Some(back) => {
                            let f = self.a.call();
                            let to = self.stubs.indirect;
                            self.a.bind_abs(f, to);
                            let f = self.a.jmp();
                            self.a.bind(f, back);
                        }
                        None => self.a.jmp_abs(self.stubs.indirect),
                    }
                }
                ColdKind::X87 { site, back } => {
                    let at = self.a.base + back as u64;
                    self.a.mov_imm(r::T1, at);
                    self.a.mov_imm(r::T0, site.into());
                    self.a.jmp_abs(self.stubs.load_x87);
                }
                ColdKind::Edge { refund, link } => {
                    if refund > 0 {
                        self.a.lea(true, r::LEFT, M::Base(r::LEFT, refund.into()));
                    }
                    let f = self.a.jmp();
                    self.bind_link(f, link, offset);
                }
                ColdKind::Link { link, flags_live } => {
                    self.a.mov_imm(r::T0, link.into());
                    if flags_live {
                        // T0 is needed to save them.
                        self.a.store(true, ctx!(argument), r::T0);
                        self.a.save_flags();
                        self.a.load(true, r::T0, ctx!(argument));
                    }
                    self.a.jmp_abs(self.stubs.link);
                }
                ColdKind::Stack { back } => {
                    self.a.load(true, r::RSP, ctx!(stack_base));
                    let f = self.a.jmp();
                    self.a.bind(f, back);
                }
            }
        }
        for link in &mut self.links {
            link.at += offset;
        }
    }

    /// A jump that will be linked: for now it leads to its own exit.
    fn bind_link(&mut self, f: Fixup, link: u32, _offset: u32) {
        let index = (link - self.first_link) as usize;
        if let Some(l) = self.links.get_mut(index) {
            l.at = Asm::place(f) as u32;
            let flags_live = l.flags_live;
            self.cold(f, ColdKind::Link { link, flags_live });
        }
    }

    /// A new link to a guest address, with the flags as they are now.
    fn link(&mut self, target: u64) -> u32 {
        let n = self.first_link + self.links.len() as u32;
        let target = if self.mode.bits() == 64 { target } else { target & 0xffff_ffff };
        self.links.push(Link { at: 0, target, flags_live: !self.flags.saved, page: self.page, to: None });
        n
    }

    /// The unit goes on at another guest address.
    fn edge(&mut self, target: u64) {
        let link = self.link(target);
        let refund = self.count - (self.index + 1);
        if refund > 0 {
            self.a.lea(true, r::LEFT, M::Base(r::LEFT, refund.into()));
        }
        let f = self.a.jmp();
        self.bind_link(f, link, 0);
    }

    /// A conditional way to another guest address.
    fn side_edge(&mut self, from: Fixup, target: u64) {
        let link = self.link(target);
        let refund = self.count - (self.index + 1);
        self.cold(from, ColdKind::Edge { refund, link });
    }

    fn site(&mut self, g: &Guest, interpreted: bool, retry: usize) -> u32 {
        let n = self.first_site + self.sites.len() as u32;
        self.sites.push(Site {
            rip: g.rip,
            unit: self.unit,
            page: self.page,
            count: self.count,
            next: 0,
            retry: retry as u32,
            before: self.count - self.index,
            flags_live: false,
            recipe: self.flags.recipe,
            interpreted,
            x87: self.x87_here,
            vectors: false,
            fragile: self.groups.relied_on(usize::from(self.index)),
            write: false,
            bounce: 0,
            size: 0,
            last: false,
            len: g.insn.len,
            bytes: g.insn.bytes,
        });
        n
    }

    /// Leaves the instruction to the interpreter.
    fn interpret(&mut self, g: &Guest) {
        if self.flags.recipe == NONE {
            self.save();
            self.flags.host = false;
        }
        self.groups.forget();
        let site = self.site(g, true, 0);
        self.a.mov_imm(r::T0, site.into());
        self.a.jmp_abs(self.stubs.interpret);
        self.flags = SAVED;
    }

    /// Translates an instruction. False: the unit doesn't go on behind it.
    fn instruction(&mut self, g: &Guest) -> bool {
        let ends = g.ends_unit();
        if g.insn.has(insn_flag::LOCK) {
            // None of them.
        } else if let Some(open) = self.system(g) {
            self.groups.let_go();
            return open;
        }
        if undefined_here(g) {
            self.interpret(g);
            return !ends;
        }
        if let Some(open) = self.x87(g) {
            return open;
        }
        match self.special(g) {
            Some(open) => {
                self.groups.let_go();
                open
            }
            None => {
                if !self.ordinary(g) {
                    self.interpret(g);
                }
                !ends
            }
        }
    }

    /// Instructions with sequences of their own. None: not one of them.
    fn special(&mut self, g: &Guest) -> Option<bool> {
        use Mnemonic as Mn;
        let i = &g.iced;
        let long = self.mode.bits() == 64;
        let word = if long { 8 } else { 4 };
        match i.mnemonic() {
            Mn::Nop
            | Mn::Endbr64
            | Mn::Endbr32
            | Mn::Pause
            | Mn::Prefetch
            | Mn::Prefetchnta
            | Mn::Prefetcht0
            | Mn::Prefetcht1
            | Mn::Prefetcht2
            | Mn::Prefetchw
            | Mn::Reservednop => return Some(true),
            Mn::Mfence | Mn::Lfence | Mn::Sfence => {
                self.a.b(g.insn.bytes());
                return Some(true);
            }
            Mn::Lea => return self.lea(g).then_some(true),
            Mn::Jmp if i.is_jmp_short_or_near() && self.near(i) => {
                if g.taken {
                    return Some(true);
                }
                self.edge(i.near_branch_target());
                return Some(false);
            }
            Mn::Call if i.is_call_near() && self.near(i) => {
                self.call(g, Some(i.near_branch_target()), word);
                return Some(false);
            }
            Mn::Call if i.is_call_near_indirect() && usize::from(g.insn.size) == word => {
                if !self.branch_operand(g, word) {
                    return None;
                }
                self.a.store(true, ctx!(tmp), r::T1);
                self.call(g, None, word);
                return Some(false);
            }
            Mn::Jmp if i.is_jmp_near_indirect() && usize::from(g.insn.size) == word => {
                if !self.branch_operand(g, word) {
                    return None;
                }
                self.indirect(g);
                return Some(false);
            }
            Mn::Ret if self.mode.near_ret(i) => {
                self.ret(g, word);
                return Some(false);
            }
            Mn::Jrcxz | Mn::Jecxz if self.near(i) => {
                let short = usize::from(g.insn.asize) != 8;
                self.count_branch(i, short);
                return Some(true);
            }
            Mn::Loop if self.near(i) && g.insn.asize != 2 => {
                let short = g.insn.asize != 8;
                // The counter, then as JRCXZ with the sense reversed.
                self.a.lea(!short, r::RCX, M::Base(r::RCX, -1));
                if short {
                    self.a.b(&[0x67]);
                }
                self.a.b(&[0xe3, 5]);
                let f = self.a.jmp();
                self.side_edge(f, i.near_branch_target());
                return Some(true);
            }
            _ if i.is_jcc_short_or_near() && self.near(i) => {
                self.restore();
                let condition = (i.condition_code() as u8).wrapping_sub(1) & 15;
                if g.taken {
                    let f = self.a.jcc(condition ^ 1);
                    self.side_edge(f, g.next());
                } else {
                    let f = self.a.jcc(condition);
                    self.side_edge(f, i.near_branch_target());
                }
                return Some(true);
            }
            Mn::Push if g.insn.seg_like_push(i, word) => return self.push(g, word).then_some(true),
            Mn::Pop
                if i.op_kind(0) == OpKind::Register
                    && i.op_register(0).is_gpr()
                    && i.op_register(0).size() == word =>
            {
                self.pop(g, word);
                return Some(true);
            }
            Mn::Leave
                if matches!(i.code(), Code::Leaveq) && long || matches!(i.code(), Code::Leaved) && !long =>
            {
                self.clobber();
                let retry = self.a.pos();
                if long {
                    self.a.mov(r::T1, r::RBP);
                } else {
                    self.a.rr(false, &[0x8b], r::T1, r::RBP);
                }
                self.check(g, retry, word, 1, false);
                self.a.lea(long, r::SP, M::Base(r::RBP, word as i32));
                self.a.load(long, r::RBP, M::Base(r::T1, 0));
                return Some(true);
            }
            _ if self.string(g) => return Some(true),
            Mn::Div | Mn::Idiv => return self.divide(g).then_some(true),
            Mn::Mov if g.insn.ea == Ea::Moffs => return self.moffs(g).then_some(true),
            Mn::Mov if i.op_kind(0) == OpKind::Register && i.op_kind(1) == OpKind::Register => {
                return self.move_register(i).then_some(true);
            }
            Mn::Inc | Mn::Dec
                if matches!(i.code(), Code::Inc_r16 | Code::Inc_r32 | Code::Dec_r16 | Code::Dec_r32) =>
            {
                // The short forms are REX prefixes in 64-bit mode.
                self.restore();
                let host = pinned(g.insn.r0 & 7)?;
                if g.insn.size == 2 {
                    self.a.b(&[0x66]);
                }
                self.a.rr(false, &[0xff], u8::from(i.mnemonic() == Mn::Dec), host);
                self.set_live();
                return Some(true);
            }
            _ => {}
        }
        None
    }
}

/// The decoder gave it a handler that isn't its own: the model lacks it, or it was turned into something else.
fn undefined_here(g: &Guest) -> bool {
    // Instructions that the model doesn't have end their block without being branches.
    g.iced.is_invalid()
        || (g.insn.has(insn_flag::END)
            && !g.insn.has(insn_flag::PLAIN)
            && g.iced.flow_control() == FlowControl::Next)
}
