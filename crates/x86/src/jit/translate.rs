//! One pass from guest instructions to host instructions.
//!
//! A *unit* is a run of instructions of one page, entered at its start only; it goes on behind conditional branches that aren't taken. Guest
//! registers are in the host registers of [`stubs::PINNED`]; r9, r10, r11 and r15 are in the context, host r10 and r11 are scratch and host
//! r15 counts instructions: a unit takes all of its instructions off at entry, ways out in the middle give the rest back. The arithmetic
//! flags are in the host's or saved in the context, which is known at every point; they are saved before anything that would
//! destroy them, because a fault may have to show them.

use super::asm::{Asm, Fixup, M, r};
use super::context::Context;
use super::parts::{self, Form, Patch, Place, Rm, What};
use super::stubs::{self, Cold, ColdKind, Stubs, gpr};
use super::{Link, ModeKey, Site, Unit};
use crate::decode::{Ea, Insn, insn_flag};
use crate::native::mem::{PAGE_SLOTS, PAGE_TABLE, WRITE_TABLE};
use crate::native::plan::{self, Class};
use crate::state::Seg;
use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};
use std::mem::offset_of;

/// Most instructions in a unit.
pub(super) const MAX_UNIT: usize = 64;

/// A guest instruction on its way.
pub(super) struct Guest {
    pub rip: u64,
    pub insn: Insn,
    pub iced: Instruction,
    pub immediate: u8,
}

impl Guest {
    /// `insn` was decoded from the same bytes.
    pub(super) fn new(rip: u64, insn: Insn, bits: u32) -> Guest {
        let mut decoder = Decoder::with_ip(bits, insn.bytes(), rip, DecoderOptions::NONE);
        let iced = decoder.decode();
        let c = decoder.get_constant_offsets(&iced);
        let immediate = (c.immediate_size() + c.immediate_size2()) as u8;
        Guest { rip, insn, iced, immediate }
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

/// Whether the host has the integer instruction; the model has, or the decoder gave it another handler.
fn host_has(i: &Instruction, host: Host) -> bool {
    use Mnemonic as M;
    use std::arch::is_x86_feature_detected as has;
    match i.mnemonic() {
        M::Tzcnt => host.tzcnt,
        // Counts above 16 are undefined, and OF of rotations by more than one; the interpreter has its own mind there.
        M::Shld | M::Shrd | M::Rcl | M::Rcr => match i.op_kind(0) {
            OpKind::Memory => i.memory_size().size() > 2,
            _ => i.op_register(0).size() > 2,
        },
        M::Lzcnt => host.lzcnt,
        M::Popcnt => has!("popcnt"),
        M::Crc32 => has!("sse4.2"),
        M::Movbe => has!("movbe"),
        M::Adcx | M::Adox => has!("adx"),
        M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr => has!("bmi1"),
        M::Bzhi | M::Mulx | M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx => host.bmi2,
        _ => true,
    }
}

const ARITH: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

/// Where the arithmetic flags are.
#[derive(Clone, Copy, Debug)]
struct Flags {
    host: bool,
    saved: bool,
    /// Neither, but nothing reads them before they are set again, and what this recipe says gives them, should a fault show them.
    recipe: u32,
}

/// No recipe.
pub(super) const NONE: u32 = u32::MAX;

const SAVED: Flags = Flags { host: false, saved: true, recipe: NONE };
const LIVE: Flags = Flags { host: true, saved: false, recipe: NONE };

/// What an instruction does with the arithmetic flags.
fn flag_use(i: &Instruction) -> (bool, u32) {
    let modified = i.rflags_modified() & ARITH;
    let reads = i.rflags_read() & ARITH != 0;
    let keeps = modified != 0
        && (modified != ARITH || i.rflags_undefined() & ARITH != 0 && !logic(i) || conditional(i));
    (reads || keeps, modified)
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

pub(super) struct Output {
    pub unit: Unit,
    pub code: Vec<u8>,
    pub sites: Vec<Site>,
    pub links: Vec<Link>,
    /// Instructions whose flags may have to be found again.
    pub recipes: Vec<Insn>,
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
    page: u32,
    count: u8,
    /// The instruction in translation: number, and its first site.
    index: u8,
    site_from: usize,
}

/// Numbers that the next unit starts from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    pub unit: u32,
    pub page: u32,
    pub site: u32,
    pub link: u32,
    pub recipe: u32,
    /// The page that the only instruction goes on in, and its identity.
    pub second: Option<(u64, u32)>,
    /// Address at which the unit's code will run.
    pub exec: u64,
    /// Offset of that in the arena.
    pub offset: u32,
    pub ctx: u64,
}

macro_rules! ctx {
    ($field:ident) => {
        M::Ctx(offset_of!(Context, $field))
    };
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
        page: n.page,
        count: guest.len().min(MAX_UNIT) as u8,
        index: 0,
        site_from: 0,
    };
    // Entered with the flags in the host's, then with the flags saved.
    t.a.save_flags();
    let entry_saved = t.a.pos();
    t.a.alu_imm(true, 5, r::LEFT, i32::from(t.count));
    let from = t.a.jcc(8);
    t.cold(from, ColdKind::Count { unit: n.unit, count: t.count });
    if let Some((next, id)) = n.second {
        let from = guard(&mut t.a, next, id);
        t.cold(from, ColdKind::Count { unit: n.unit, count: t.count });
    }
    if guest.iter().any(|g| t.class(g).is_some()) {
        stubs::test_vectors(&mut t.a);
        let from = t.a.jcc(4);
        let back = t.a.pos();
        t.cold(from, ColdKind::Vectors { back });
    }
    let mut open = true;
    for (i, g) in guest.iter().enumerate() {
        t.index = i as u8;
        t.site_from = t.sites.len();
        open = t.instruction(g);
        let (next, live) = (n.offset + t.a.pos() as u32, t.flags.host);
        for site in t.sites.iter_mut().skip(t.site_from) {
            site.next = next;
            site.flags_live = live && !site.interpreted;
            site.last = !open;
            // Offsets of retries were counted from the unit's start.
            site.retry += n.offset;
        }
        if !open {
            break;
        }
    }
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
    };
    let Translator { a, sites, links, recipes, .. } = t;
    Output { unit, code: a.buf, sites, links, recipes }
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
                    self.a.mov_imm(r::T0, unit.into());
                    self.a.jmp_abs(self.stubs.count);
                }
                ColdKind::Vectors { back } => {
                    let at = self.a.base + back as u64;
                    self.a.mov_imm(r::T1, at);
                    self.a.jmp_abs(self.stubs.load_vectors);
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
            page: self.page,
            next: 0,
            retry: retry as u32,
            before: self.count - self.index,
            flags_live: false,
            recipe: self.flags.recipe,
            interpreted,
            size: 0,
            last: false,
            len: g.insn.len,
            bytes: g.insn.bytes,
        });
        n
    }

    /// Saves the flags unless they are.
    fn save(&mut self) {
        if self.flags.host && !self.flags.saved {
            self.a.save_flags();
            self.flags.saved = true;
        }
    }
    /// The host's flags are about to be destroyed.
    fn clobber(&mut self) {
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
    fn recipe(&mut self) -> Option<u32> {
        let producer = self.guest.get(self.producer?)?;
        let (a, b) = (producer.iced.op_register(0), producer.iced.op1_register());
        let touches = |r: Register| {
            let full = r.full_register();
            full == a.full_register() || b != Register::None && full == b.full_register()
        };
        let mut writes = false;
        for g in self.guest.get(self.producer? + 1..)? {
            let past = g.rip >= self.guest.get(usize::from(self.index))?.rip;
            if past {
                if writes {
                    return None;
                }
                let (reads, modified) = flag_use(&g.iced);
                if reads || g.iced.flow_control() != FlowControl::Next || g.ends_unit() {
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
    fn set_live(&mut self) {
        self.flags = LIVE;
        let at = usize::from(self.index);
        self.producer = self.guest.get(at).is_some_and(|g| repeatable(&g.iced)).then_some(at);
    }
    /// The flags are needed in the host's.
    fn restore(&mut self) {
        if !self.flags.host {
            self.a.restore_flags();
            self.flags.host = true;
        }
    }

    /// Leaves the instruction to the interpreter.
    fn interpret(&mut self, g: &Guest) {
        self.clobber();
        let site = self.site(g, true, 0);
        self.a.mov_imm(r::T0, site.into());
        self.a.jmp_abs(self.stubs.interpret);
        self.flags = SAVED;
    }

    /// The class whose availability the mode vouches for; None: not a vector instruction that is translated.
    fn class(&self, g: &Guest) -> Option<Class> {
        let i = &g.iced;
        let class = match i.mnemonic() {
            Mnemonic::Vzeroupper => Class::Vex,
            _ => plan::class_of(i.code())?,
        };
        if undefined_here(g) {
            return None;
        }
        let fine = match class {
            Class::Sse => self.mode.has(ModeKey::SSE),
            Class::Vex => self.mode.has(ModeKey::AVX),
            Class::Evex => self.mode.has(ModeKey::AVX512),
            _ => false,
        };
        let vector = |n: u32| {
            i.op_kind(n) == OpKind::Register
                && (i.op_register(n).is_vector_register() || i.op_register(n).is_k())
        };
        let any = i.mnemonic() == Mnemonic::Vzeroupper || (0..i.op_count()).any(vector);
        let refused = matches!(
            i.mnemonic(),
            Mnemonic::Maskmovdqu
                | Mnemonic::Vmaskmovdqu
                | Mnemonic::Vmaskmovps
                | Mnemonic::Vmaskmovpd
                | Mnemonic::Vpmaskmovd
                | Mnemonic::Vpmaskmovq
                | Mnemonic::Vzeroall
        ) || i.is_vsib()
            || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
            || (i.op_mask() != Register::None && (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory));
        (fine && any && !refused).then_some(class)
    }

    /// Translates an instruction. False: the unit doesn't go on behind it.
    fn instruction(&mut self, g: &Guest) -> bool {
        let ends = g.ends_unit();
        if undefined_here(g) {
            self.interpret(g);
            return !ends;
        }
        match self.special(g) {
            Some(open) => open,
            None => {
                if !self.ordinary(g) {
                    self.interpret(g);
                }
                !ends
            }
        }
    }

    /// Whether the segment of a memory operand needs no limit checks.
    fn flat(&self, seg: Seg) -> bool {
        match seg {
            _ if self.mode.bits() == 64 => true,
            Seg::Fs => self.mode.has(ModeKey::FS_FLAT),
            Seg::Gs => self.mode.has(ModeKey::GS_FLAT),
            // Code may not be writable as data.
            Seg::Cs => false,
            _ => true,
        }
    }

    /// T1 = linear address of the memory operand. Changes T0; flags must not be in the host's when a segment has a base.
    fn linear(&mut self, g: &Guest, size: usize) -> bool {
        let i = &g.insn;
        if !self.flat(i.seg) {
            return false;
        }
        let wide = i.asize == 8;
        let disp = i.disp;
        match i.ea {
            Ea::Rip64 => self.a.mov_imm(r::T1, g.next().wrapping_add(disp as i64 as u64)),
            Ea::Rip32 => self.a.mov_imm(r::T1, g.next().wrapping_add(disp as i64 as u64) & 0xffff_ffff),
            Ea::Absolute if wide => self.a.mov_imm(r::T1, disp as i64 as u64),
            Ea::Absolute if i.asize == 4 => self.a.mov_imm(r::T1, u64::from(disp as u32)),
            Ea::Moffs => self.a.mov_imm(r::T1, i.imm),
            Ea::Base64 | Ea::BaseIndex64 | Ea::Index64 | Ea::Base32 | Ea::BaseIndex32 | Ea::Index32 => {
                let m = self.address(g);
                self.a.lea(wide, r::T1, m);
            }
            _ => return false,
        }
        let based = matches!(i.seg, Seg::Fs | Seg::Gs);
        if based {
            if self.mode.bits() == 32 {
                // Beyond the segment's limit, which is the last of 4 GiB.
                self.a.alu_imm(false, 7, r::T1, -(size as i32));
                let from = self.a.jcc(7);
                let site = self.site(g, false, 0);
                self.cold(from, ColdKind::Interpret { site });
            }
            let at = M::Ctx(offset_of!(Context, base) + 8 * i.seg as usize);
            self.a.rm(self.mode.bits() == 64, &[0x03], r::T1, at);
        }
        true
    }

    /// The memory operand as one of the host's, with registers that live in memory loaded to T1 (base) and T0 (index).
    fn address(&mut self, g: &Guest) -> M {
        let i = &g.insn;
        let base =
            matches!(i.ea, Ea::Base64 | Ea::BaseIndex64 | Ea::Base32 | Ea::BaseIndex32).then_some(i.base);
        let index =
            matches!(i.ea, Ea::BaseIndex64 | Ea::Index64 | Ea::BaseIndex32 | Ea::Index32).then_some(i.index);
        let base = base.map(|n| match pinned(n) {
            Some(host) => host,
            None => {
                self.a.load(true, r::T1, gpr(n.into()));
                r::T1
            }
        });
        let index = index.map(|n| match pinned(n) {
            Some(host) => host,
            None => {
                self.a.load(true, r::T0, gpr(n.into()));
                r::T0
            }
        });
        match (base, index) {
            (Some(base), None) => M::Base(base, i.disp),
            (base, index) => M::Sib(base, index.map(|n| (n, i.scale & 3)), i.disp),
        }
    }

    /// Looks the linear address in T1 up: T1 = host address. The flags were saved. `align`: 16, 32, 64 or 1.
    fn check(&mut self, g: &Guest, retry: usize, size: usize, align: usize, write: bool) {
        if self.host.bmi2 {
            self.a.b(&[0xc4, 0x43, 0xfb, 0xf0, 0xd3, 0x08]); // rorx r10, r11, 8
        } else {
            self.a.mov(r::T0, r::T1);
            self.a.rr(true, &[0xc1], 5, r::T0);
            self.a.b(&[8]);
        }
        self.a.alu_imm(false, 4, r::T0, 0xfff0);
        let table = if write { WRITE_TABLE as i32 } else { 0 };
        self.a.rm(true, &[0x33], r::T1, M::Gs(Some(r::T0), table));
        let from = if align > 1 {
            // test r11, imm32: page offset and alignment in one.
            self.a.rr(true, &[0xf7], 0, r::T1);
            self.a.i32(!(0x1000 - align as i32));
            self.a.jcc(5)
        } else {
            self.a.alu_imm(true, 7, r::T1, 0x1000 - size as i32);
            self.a.jcc(7)
        };
        let site = self.site(g, false, retry);
        if let Some(s) = self.sites.last_mut() {
            s.size = size as u8;
        }
        self.cold(from, ColdKind::Miss { site, write });
        self.a.rm(true, &[0x03], r::T1, M::Gs(Some(r::T0), table + 8));
        self.flags.host = false;
    }

    /// Address and check of the memory operand: T1 = host address.
    fn operand(&mut self, g: &Guest, size: usize, align: usize, write: bool) -> bool {
        if size == 0 || size > 64 {
            return false;
        }
        self.clobber();
        let retry = self.a.pos();
        if !self.linear(g, size) {
            return false;
        }
        self.check(g, retry, size, align, write);
        true
    }

    /// Instructions that are the same for the host, with registers and the memory operand replaced. False: nothing was emitted but
    /// what does no harm, and the instruction isn't one of them.
    fn ordinary(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let class = self.class(g);
        if class.is_none() && !(integer(i) && host_has(i, self.host)) {
            return false;
        }
        let bits = self.mode.bits();
        let Some(mut p) = parts::split(g.insn.bytes(), bits, i, g.immediate.into()) else { return false };
        p.lock &= self.host.locks;
        // Operands.
        let code = i.code().op_code();
        let mut memory = None;
        let mut gprs: [(Place, u8, bool, bool, usize); 4] = [(Place::Fixed, 0, false, false, 0); 4];
        let mut count = 0;
        let info = self.info.info(i);
        let accesses = [info.op0_access(), info.op1_access(), info.op2_access(), info.op3_access()];
        let mut high = false;
        for n in 0..i.op_count().min(4) {
            let kind = parts::what(code.op_kind(n));
            let access = accesses.get(n as usize).copied().unwrap_or(OpAccess::None);
            let writes = matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            let reads =
                !matches!(access, OpAccess::Write) || matches!(i.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr);
            let place = match kind {
                What::Other => return false,
                What::Memory | What::GprOrMemory | What::VectorOrMemory if i.op_kind(n) == OpKind::Memory => {
                    memory = Some(writes);
                    continue;
                }
                What::GprOrMemory => Place::Rm,
                What::Gpr(place) => place,
                _ => continue,
            };
            let register = i.op_register(n);
            high |= matches!(register, Register::AH | Register::BH | Register::CH | Register::DH);
            let Some(slot) = gprs.get_mut(count) else { return false };
            *slot = (place, crate::decode::register_number(register), reads, writes, register.size());
            count += 1;
        }
        let Some(gprs) = gprs.get_mut(..count) else { return false };
        // Registers beyond the first four of the old ones need REX, which AH to BH don't go with.
        if high && (memory.is_some() || gprs.iter().any(|o| o.1 < 16 && pinned(o.1) != Some(o.1))) {
            return false;
        }
        // Flags.
        let (needs, modified) = flag_use(i);
        let clear_w = bits != 64 && count > 0;
        let mut patch = Patch { clear_w, ..Patch::KEEP };
        // AL to BL need none; SPL, BPL, SIL, DIL do, and whatever was REX before.
        patch.rex = gprs.iter().any(|o| o.4 == 1 && (4..8).contains(&o.1));
        if let Some(writes) = memory {
            let homes: Vec<u8> =
                gprs.iter().map(|o| o.1).filter(|n| *n < 16 && pinned(*n).is_none()).collect();
            if homes.iter().any(|n| Some(n) != homes.first()) {
                return false;
            }
            let size = i.memory_size().size();
            let align = match class {
                Some(class) => plan::alignment(i, class, size).into(),
                None => 1,
            };
            if !self.operand(g, size, align, writes) {
                return false;
            }
            patch.rm = Rm::Memory(M::Base(r::T1, 0));
        }
        if needs {
            self.restore();
        }
        // Registers that live in memory.
        let single = memory.is_none() && count > 0 && !matches!(p.form, Form::Evex(_)) && direct(i);
        let mut homes: [Option<(u8, bool)>; 2] = [None; 2];
        let mut temps = if memory.is_some() { vec![r::T0] } else { vec![r::T1, r::T0] };
        for k in 0..gprs.len() {
            let Some(&(place, n, reads, writes, size)) = gprs.get(k) else { break };
            let host = if n >= 16 {
                // AH to BH: ModRM's number is 4 more.
                n - 16 + 4
            } else if let Some(host) = pinned(n) {
                host
            } else {
                let others = gprs.iter().filter(|o| o.1 == n).count();
                if single && place == Place::Rm && others == 1 && (!writes || size == 8) {
                    patch.rm = Rm::Memory(gpr(n.into()));
                    continue;
                }
                match homes.iter().flatten().position(|h| h.0 == n) {
                    Some(0) => {
                        if writes && let Some(h) = homes[0].as_mut() {
                            h.1 = true;
                        }
                        if memory.is_some() { r::T0 } else { r::T1 }
                    }
                    Some(_) => {
                        if writes && let Some(h) = homes[1].as_mut() {
                            h.1 = true;
                        }
                        r::T0
                    }
                    None => {
                        if temps.is_empty() {
                            return false;
                        }
                        let host = temps.remove(0);
                        let others_read = gprs.iter().any(|o| o.1 == n && o.2);
                        if reads || size < 4 || others_read {
                            self.a.load(true, host, gpr(n.into()));
                        }
                        let at = usize::from(homes[0].is_some());
                        homes[at] = Some((n, writes));
                        host
                    }
                }
            };
            match place {
                Place::Reg => patch.reg = Some(host),
                Place::Rm => patch.rm = Rm::Reg(host),
                Place::Vvvv => patch.vvvv = Some(host),
                Place::Opcode => patch.opcode = Some(host),
                _ => return false,
            }
        }
        let from = self.a.pos();
        parts::emit(&mut self.a, &p, patch);
        // Whatever is run natively must be the very instruction that was meant.
        let emitted = self.a.buf.get(from..).unwrap_or(&[]);
        let mut decoder = Decoder::new(64, emitted, DecoderOptions::NONE);
        let again = decoder.decode();
        let wanted = if i.code() as u16 == again.code() as u16 || alias(i.code()) == again.code() {
            emitted.len()
        } else {
            0
        };
        if again.len() != wanted {
            self.a.buf.truncate(from);
            return false;
        }
        for (k, home) in homes.iter().enumerate() {
            if let Some((n, true)) = home {
                let host = if memory.is_some() || k == 1 { r::T0 } else { r::T1 };
                self.a.store(true, gpr(usize::from(*n)), host);
            }
        }
        if modified != 0 {
            self.set_live();
        }
        true
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
                self.indirect(g, self.stubs.indirect);
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
                let f = self.a.jcc(condition);
                self.side_edge(f, i.near_branch_target());
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

    /// A near branch of the mode's size.
    fn near(&self, i: &Instruction) -> bool {
        i.op_kind(0) == if self.mode.bits() == 64 { OpKind::NearBranch64 } else { OpKind::NearBranch32 }
    }

    /// MOV between general registers of which one or both live in memory, or both are pinned and 32 or 64 bits wide.
    fn move_register(&mut self, i: &Instruction) -> bool {
        let (to, from) = (i.op_register(0), i.op_register(1));
        if !to.is_gpr() || !from.is_gpr() || to.size() != from.size() || to.size() < 4 {
            return false;
        }
        let wide = to.size() == 8;
        let (to, from) = (to.number() as u8, from.number() as u8);
        match (pinned(to), pinned(from)) {
            (Some(a), Some(b)) => self.a.rr(wide, &[0x8b], a, b),
            (Some(a), None) => self.a.load(wide, a, gpr(from.into())),
            (None, Some(b)) if wide => self.a.store(true, gpr(to.into()), b),
            (None, b) => {
                match b {
                    Some(b) => self.a.rr(wide, &[0x8b], r::T0, b),
                    None => self.a.load(wide, r::T0, gpr(from.into())),
                }
                self.a.store(true, gpr(to.into()), r::T0);
            }
        }
        true
    }

    fn moffs(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let load = i.op_kind(0) == OpKind::Register;
        let size = usize::from(g.insn.size);
        if !self.operand(g, size, 1, !load) {
            return false;
        }
        let m = M::Base(r::T1, 0);
        if size == 2 {
            self.a.b(&[0x66]);
        }
        let opcode = if load { 0x8a } else { 0x88 } | u8::from(size != 1);
        self.a.rm(size == 8, &[opcode], r::RAX, m);
        true
    }

    fn lea(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let size = i.op_register(0).size();
        let n = i.op_register(0).number() as u8;
        let wide = size == 8;
        if size == 2 || g.insn.asize == 2 {
            return false;
        }
        let host = pinned(n);
        let to = host.unwrap_or(r::T0);
        let disp = g.insn.disp as i64 as u64;
        let constant = match g.insn.ea {
            Ea::Rip64 => Some(g.next().wrapping_add(disp)),
            Ea::Rip32 => Some(g.next().wrapping_add(disp) & 0xffff_ffff),
            Ea::Absolute if g.insn.asize == 8 => Some(disp),
            Ea::Absolute => Some(disp & 0xffff_ffff),
            _ => None,
        };
        match constant {
            Some(v) => self.a.mov_imm(to, if wide { v } else { v & 0xffff_ffff }),
            None => {
                let m = self.address(g);
                // A 32-bit address is cut, whatever the operand's size.
                self.a.lea(wide && g.insn.asize == 8, to, m);
            }
        }
        if host.is_none() {
            self.a.store(true, gpr(n.into()), to);
        }
        true
    }

    /// T1 = the target of an indirect branch.
    fn branch_operand(&mut self, g: &Guest, word: usize) -> bool {
        let wide = word == 8;
        if g.iced.op_kind(0) == OpKind::Memory {
            if !self.operand(g, word, 1, false) {
                return false;
            }
            self.a.load(wide, r::T1, M::Base(r::T1, 0));
            return true;
        }
        self.clobber();
        let n = g.iced.op_register(0).number() as u8;
        match pinned(n) {
            Some(host) => self.a.rr(wide, &[0x8b], r::T1, host),
            None => self.a.load(wide, r::T1, gpr(n.into())),
        }
        true
    }

    /// Goes to the linear address in T1.
    fn indirect(&mut self, g: &Guest, stub: u64) {
        self.refund_all();
        let site = self.site(g, false, 0);
        self.a.mov_imm(r::T0, site.into());
        self.a.jmp_abs(stub);
    }

    /// Gives back what comes after this instruction.
    fn refund_all(&mut self) {
        let refund = self.count - (self.index + 1);
        if refund > 0 {
            self.a.lea(true, r::LEFT, M::Base(r::LEFT, refund.into()));
        }
    }

    /// T1 = host address below the stack pointer, checked for a write.
    fn stack_write(&mut self, g: &Guest, word: usize) {
        self.clobber();
        let retry = self.a.pos();
        self.a.lea(word == 8, r::T1, M::Base(r::SP, -(word as i32)));
        self.check(g, retry, word, 1, true);
    }

    fn call(&mut self, g: &Guest, target: Option<u64>, word: usize) {
        let wide = word == 8;
        self.stack_write(g, word);
        let back = if wide { g.next() } else { g.next() & 0xffff_ffff };
        self.a.mov_imm(r::T0, back);
        self.a.store(wide, M::Base(r::T1, 0), r::T0);
        self.a.lea(wide, r::SP, M::Base(r::SP, -(word as i32)));
        self.refund_all();
        // The pair for the return: guest address, then the host's by the call itself.
        self.a.rm(true, &[0x3b], r::RSP, ctx!(stack_limit));
        let full = self.a.jcc(2);
        let after = self.a.pos();
        self.cold(full, ColdKind::Stack { back: after });
        self.a.b(&[0x41, 0x52]); // push r10
        match target {
            Some(target) => {
                let link = self.link(target);
                let f = self.a.call();
                self.bind_link(f, link, 0);
            }
            None => {
                let site = self.site(g, false, 0);
                self.a.load(true, r::T1, ctx!(tmp));
                self.a.mov_imm(r::T0, site.into());
                let f = self.a.call();
                let to = self.stubs.indirect;
                self.a.bind_abs(f, to);
            }
        }
        // The way back, with the flags saved.
        let failed = guard(&mut self.a, g.rip, self.page);
        let link = self.link(back);
        let f = self.a.jmp();
        self.bind_link(f, link, 0);
        self.cold(failed, ColdKind::Link { link, flags_live: false });
    }

    fn ret(&mut self, g: &Guest, word: usize) {
        let wide = word == 8;
        self.clobber();
        let retry = self.a.pos();
        self.a.rr(wide, &[0x8b], r::T1, r::SP);
        self.check(g, retry, word, 1, false);
        self.a.load(wide, r::T1, M::Base(r::T1, 0));
        let by = word as i32 + (g.insn.imm & 0xffff) as i32;
        self.a.lea(wide, r::SP, M::Base(r::SP, by));
        self.refund_all();
        let site = self.site(g, false, 0);
        self.a.mov_imm(r::T0, site.into());
        self.a.rm(true, &[0x3b], r::T1, M::Base(r::RSP, 8));
        let missed = self.a.jcc(5);
        self.a.b(&[0xc2, 8, 0]); // ret 8
        self.a.here(missed);
        self.a.jmp_abs(self.stubs.return_miss);
    }

    /// JRCXZ and JECXZ, which reach only 127 bytes.
    fn count_branch(&mut self, i: &Instruction, short: bool) {
        if short {
            self.a.b(&[0x67]);
        }
        self.a.b(&[0xe3, 2, 0xeb, 5]); // jrcxz +2; jmp +5
        let f = self.a.jmp();
        self.side_edge(f, i.near_branch_target());
    }

    fn push(&mut self, g: &Guest, word: usize) -> bool {
        let i = &g.iced;
        let wide = word == 8;
        if i.op_kind(0) == OpKind::Memory {
            if !self.operand(g, word, 1, false) {
                return false;
            }
            self.a.load(wide, r::T1, M::Base(r::T1, 0));
            self.a.store(true, ctx!(tmp), r::T1);
            self.stack_write(g, word);
            self.a.load(true, r::T0, ctx!(tmp));
            self.a.store(wide, M::Base(r::T1, 0), r::T0);
        } else {
            self.stack_write(g, word);
            let m = M::Base(r::T1, 0);
            if i.op_kind(0) == OpKind::Register {
                let n = i.op_register(0).number() as u8;
                let from = pinned(n).unwrap_or_else(|| {
                    self.a.load(true, r::T0, gpr(n.into()));
                    r::T0
                });
                self.a.store(wide, m, from);
            } else {
                self.a.store_imm(wide, m, g.insn.imm as i32);
            }
        }
        self.a.lea(wide, r::SP, M::Base(r::SP, -(word as i32)));
        true
    }

    fn pop(&mut self, g: &Guest, word: usize) {
        let wide = word == 8;
        self.clobber();
        let retry = self.a.pos();
        self.a.rr(wide, &[0x8b], r::T1, r::SP);
        self.check(g, retry, word, 1, false);
        let n = g.iced.op_register(0).number() as u8;
        let m = M::Base(r::T1, 0);
        if n == 4 {
            self.a.load(wide, r::SP, m);
            return;
        }
        match pinned(n) {
            Some(host) => self.a.load(wide, host, m),
            None => {
                self.a.load(wide, r::T0, m);
                self.a.store(true, gpr(n.into()), r::T0);
            }
        }
        self.a.lea(wide, r::SP, M::Base(r::SP, word as i32));
    }

    /// DIV and IDIV of 32 and 64 bits, when a look at the operands says that they don't fault; else the interpreter does it.
    fn divide(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let size = usize::from(g.insn.size);
        if size < 4 {
            return false;
        }
        let wide = size == 8;
        if i.op_kind(0) == OpKind::Memory {
            if !self.operand(g, size, 1, false) {
                return false;
            }
            self.a.load(wide, r::T1, M::Base(r::T1, 0));
        } else {
            self.clobber();
            let n = i.op_register(0).number() as u8;
            match pinned(n) {
                Some(host) => self.a.rr(wide, &[0x8b], r::T1, host),
                None => self.a.load(wide, r::T1, gpr(n.into())),
            }
        }
        let site = self.site(g, true, 0);
        let signed = i.mnemonic() == Mnemonic::Idiv;
        if signed {
            // The dividend is an extended lower half, and the divisor neither 0 nor -1.
            self.a.rr(wide, &[0x8b], r::T0, r::RAX);
            self.a.rr(wide, &[0xc1], 7, r::T0);
            self.a.b(&[if wide { 63 } else { 31 }]);
            self.a.rr(wide, &[0x3b], r::T0, r::RDX);
            let f = self.a.jcc(5);
            self.cold(f, ColdKind::Interpret { site });
            self.a.lea(wide, r::T0, M::Base(r::T1, 1));
            self.a.alu_imm(wide, 7, r::T0, 1);
            let f = self.a.jcc(6);
            self.cold(f, ColdKind::Interpret { site });
        } else {
            self.a.rr(wide, &[0x3b], r::RDX, r::T1);
            let f = self.a.jcc(3);
            self.cold(f, ColdKind::Interpret { site });
        }
        self.a.rr(wide, &[0xf7], if signed { 7 } else { 6 }, r::T1);
        // Undefined; the interpreter has AF alone set, as recent AMD processors do.
        self.a.store_imm(false, ctx!(flags), super::context::pack_flags(crate::state::flag::AF) as i32);
        self.flags = SAVED;
        true
    }
}

/// What an encoding that 64-bit mode doesn't have is translated to.
fn alias(code: Code) -> Code {
    use iced_x86::Code as C;
    match code {
        C::Add_rm8_imm8_82 => C::Add_rm8_imm8,
        C::Or_rm8_imm8_82 => C::Or_rm8_imm8,
        C::Adc_rm8_imm8_82 => C::Adc_rm8_imm8,
        C::Sbb_rm8_imm8_82 => C::Sbb_rm8_imm8,
        C::And_rm8_imm8_82 => C::And_rm8_imm8,
        C::Sub_rm8_imm8_82 => C::Sub_rm8_imm8,
        C::Xor_rm8_imm8_82 => C::Xor_rm8_imm8,
        C::Cmp_rm8_imm8_82 => C::Cmp_rm8_imm8,
        code => code,
    }
}

/// Logic operations: AF, called undefined, is zero on all processors.
fn logic(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test)
}

/// Shifts, which leave the flags alone when the count is 0.
fn conditional(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Whether an instruction's register operand in ModRM.rm may just as well be memory.
fn direct(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::Cmp
            | M::And
            | M::Or
            | M::Xor
            | M::Test
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Imul
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Mul
    )
}

/// The decoder gave it a handler that isn't its own: the model lacks it, or it was turned into something else.
fn undefined_here(g: &Guest) -> bool {
    // Instructions that the model doesn't have end their block without being branches.
    g.iced.is_invalid()
        || (g.insn.has(insn_flag::END)
            && !g.insn.has(insn_flag::PLAIN)
            && g.iced.flow_control() == FlowControl::Next)
}

/// Integer instructions that run on the host as they are.
fn integer(i: &Instruction) -> bool {
    use Mnemonic as M;
    if i.code().encoding() == EncodingKind::EVEX {
        return false;
    }
    matches!(
        i.mnemonic(),
        M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::Cmp
            | M::And
            | M::Or
            | M::Xor
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Mul
            | M::Imul
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Crc32
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Lahf
            | M::Sahf
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Adcx
            | M::Adox
            | M::Movbe
            | M::Movnti
            | M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
            | M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    ) || matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && (i.op_kind(0) != OpKind::Memory || i.op_kind(1) != OpKind::Register)
}

trait PushForm {
    fn seg_like_push(&self, i: &Instruction, word: usize) -> bool;
}
impl PushForm for Insn {
    /// PUSH of a register, memory or immediate of the stack's own width.
    fn seg_like_push(&self, i: &Instruction, word: usize) -> bool {
        let register = i.op_kind(0) == OpKind::Register;
        (!register || i.op_register(0).is_gpr())
            && i.stack_pointer_increment().unsigned_abs() as usize == word
            && (i.op_kind(0) != OpKind::Memory || i.memory_size().size() == word)
    }
}
