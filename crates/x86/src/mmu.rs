//! Linear and physical addresses: segment checks, page walks, loads and stores.
//!
//! Sources: SDM vol. 3A chapter 4 (paging), §5.3 (limits), §6.15 (#PF error codes); APM vol. 2 chapter 5.

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::fault::{Exec, Fault};
use crate::native::mem::{self, PAGE, Scalar};
use crate::state::{Seg, cr0, cr4, efer};
use crate::sys::debug;
use crate::tlb::{Backing, View};
use hyaline_ram::{DirtyClient, RamBlock};
use hyaline_space::{Actor, ExitKind, Origin};
use std::sync::Arc;

/// An unsigned integer of an operand's width.
pub(crate) trait Width: Scalar + PartialEq + Eq + std::fmt::Debug + 'static {
    /// Bits.
    const BITS: u32;
    /// Truncates.
    fn from_u64(v: u64) -> Self;
    /// Extends with zeros.
    fn u64(self) -> u64;
    /// Extends with the sign.
    fn sext(self) -> u64;
}
macro_rules! width {
    ($($u:ty, $i:ty);*) => { $(
        impl Width for $u {
            const BITS: u32 = <$u>::BITS;
            #[inline(always)]
            fn from_u64(v: u64) -> $u { v as $u }
            #[inline(always)]
            fn u64(self) -> u64 { self as u64 }
            #[inline(always)]
            fn sext(self) -> u64 { self as $i as i64 as u64 }
        }
    )* };
}
width!(u8, i8; u16, i16; u32, i32; u64, i64);

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Data read.
    Read,
    /// Data write (also of read-modify-write).
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Page-fault error code bits.
mod code {
    pub(super) const PRESENT: u32 = 1;
    pub(super) const WRITE: u32 = 2;
    pub(super) const USER: u32 = 4;
    pub(super) const RESERVED: u32 = 8;
    pub(super) const FETCH: u32 = 16;
    pub(super) const KEY: u32 = 32;
}

/// Paging-structure entry bits.
mod pte {
    pub(super) const P: u64 = 1;
    pub(super) const W: u64 = 2;
    pub(super) const U: u64 = 4;
    pub(super) const A: u64 = 1 << 5;
    pub(super) const D: u64 = 1 << 6;
    pub(super) const PS: u64 = 1 << 7;
    pub(super) const G: u64 = 1 << 8;
    pub(super) const NX: u64 = 1 << 63;
}

/// The result of a page walk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// Physical address of the byte asked for.
    pub physical: u64,
    /// Data may be written by the same view without any change to the page tables.
    writable: bool,
    /// Data may be read by the same view.
    readable: bool,
    global: bool,
    /// Bytes of the page.
    size: u64,
}

/// One entry on the way of a walk.
#[derive(Clone, Copy, Default)]
struct Step {
    address: u64,
    entry: u64,
    wide: bool,
}

impl Cpu {
    /// Reads a paging-structure entry; what isn't memory reads as not present.
    pub(crate) fn table_load(&mut self, address: u64, wide: bool) -> u64 {
        let Backing::Memory { block, offset, .. } = self.mmu.physical.find(address, self.env.memory()) else {
            return 0;
        };
        let Some(ram) = self.mmu.physical.block(block) else { return 0 };
        let at = offset | address & (PAGE - 1);
        if wide { ram.load_u64(at) } else { ram.load_u32(at).map(u64::from) }.unwrap_or(0)
    }

    /// Sets bits in a paging-structure entry that still is what it was. False: it changed, walk again.
    fn table_set(&mut self, step: &Step, bits: u64) -> bool {
        let Backing::Memory { block, offset, readonly } =
            self.mmu.physical.find(step.address, self.env.memory())
        else {
            return true;
        };
        let Some(ram) = self.mmu.physical.block(block).filter(|_| !readonly) else { return true };
        let at = offset | step.address & (PAGE - 1);
        if step.wide {
            !matches!(ram.compare_exchange_u64(at, step.entry, step.entry | bits), Some(Err(_)))
        } else {
            let (old, new) = (step.entry as u32, (step.entry | bits) as u32);
            !matches!(ram.compare_exchange_u32(at, old, new), Some(Err(_)))
        }
    }

    /// Translates a linear address by walking the page tables. Err: the page-fault error code. With `quiet` nothing is changed and
    /// permissions aren't looked at (debuggers).
    fn walk(&mut self, linear: u64, access: Access, view: View, quiet: bool) -> Result<Page, u32> {
        let s = &self.state;
        if s.cr0 & cr0::PG == 0 {
            return Ok(Page { physical: linear, writable: true, readable: true, global: false, size: PAGE });
        }
        let (long, pae) = (s.efer & efer::LMA != 0, s.cr4 & cr4::PAE != 0);
        let nxe = s.efer & efer::NXE != 0 && pae;
        let user = view == View::User;
        let mut error = match access {
            Access::Read => 0,
            Access::Write => code::WRITE,
            Access::Fetch if nxe || s.cr4 & cr4::SMEP != 0 => code::FETCH,
            Access::Fetch => 0,
        };
        if user {
            error |= code::USER;
        }
        let physical_mask = (1_u64 << self.physical_bits) - 1;
        let table_mask = physical_mask & !(PAGE - 1);
        // Bits that must be zero in 64-bit entries.
        let reserved = (!physical_mask & 0x000f_ffff_ffff_ffff) | if nxe { 0 } else { pte::NX };
        loop {
            let mut steps = [Step::default(); 5];
            let mut used = 0;
            let (mut rights, mut nx) = (pte::U | pte::W, false);
            let (mut level, mut table) = if long {
                (if self.state.cr4 & cr4::LA57 != 0 { 5 } else { 4 }, self.state.cr3 & table_mask)
            } else if pae {
                let entry = self.state.pdpte[(linear >> 30) as usize & 3];
                if entry & pte::P == 0 {
                    return Err(error);
                }
                (2, entry & table_mask)
            } else {
                (2, self.state.cr3 & 0xffff_f000)
            };
            let (entry, size, physical) = loop {
                let wide = pae;
                let (shift, address) = if wide {
                    let shift = 12 + 9 * (level - 1);
                    (shift, table | (linear >> shift & 0x1ff) << 3)
                } else {
                    let shift = 12 + 10 * (level - 1);
                    (shift, table | (linear >> shift & 0x3ff) << 2)
                };
                let entry = self.table_load(address, wide);
                if entry & pte::P == 0 {
                    return Err(error);
                }
                if let Some(step) = steps.get_mut(used) {
                    *step = Step { address, entry, wide };
                    used += 1;
                }
                rights &= entry;
                nx |= nxe && entry & pte::NX != 0;
                let large = entry & pte::PS != 0;
                if !wide {
                    if level == 2 && large && self.state.cr4 & cr4::PSE != 0 {
                        // PSE-36: bits 13-20 are physical bits 32-39, as far as the processor has them; bit 21 is reserved.
                        let high = (entry >> 13 & 0xff) << 32;
                        if entry & 1 << 21 != 0 || high & !physical_mask != 0 {
                            return Err(error | code::PRESENT | code::RESERVED);
                        }
                        break (entry, 1 << 22, high | entry & 0xffc0_0000 | linear & 0x3f_ffff);
                    }
                    if level == 1 {
                        break (entry, PAGE, entry & 0xffff_f000 | linear & 0xfff);
                    }
                    table = entry & 0xffff_f000;
                    level = 1;
                    continue;
                }
                let bad = Err(error | code::PRESENT | code::RESERVED);
                if entry & reserved != 0 {
                    return bad;
                }
                if level == 1 {
                    break (entry, PAGE, entry & table_mask | linear & 0xfff);
                }
                if large {
                    if level > 3 || (level == 3 && !self.gigabyte_pages) {
                        return bad;
                    }
                    let size = 1_u64 << shift;
                    // Bit 12 is PAT, the bits from 13 below the page's size must be zero.
                    if entry & (size - 1) & !0x1fff != 0 {
                        return bad;
                    }
                    break (entry, size, entry & table_mask & !(size - 1) | linear & (size - 1));
                }
                table = entry & table_mask;
                level -= 1;
            };
            let physical = physical & physical_mask;
            if quiet {
                return Ok(Page { physical, writable: false, readable: true, global: false, size });
            }
            let s = &self.state;
            let user_page = rights & pte::U != 0;
            let wp = s.cr0 & cr0::WP != 0;
            let (mut readable, mut writable) = match view {
                View::User => (user_page, user_page && rights & pte::W != 0),
                View::Kernel => (true, rights & pte::W != 0 || !wp),
                View::KernelSmap => (!user_page, !user_page && (rights & pte::W != 0 || !wp)),
            };
            let allowed = match access {
                Access::Read => readable,
                Access::Write => writable,
                Access::Fetch if user => user_page && !nx,
                Access::Fetch => !(nx || user_page && s.cr4 & cr4::SMEP != 0),
            };
            error |= code::PRESENT;
            if !allowed {
                return Err(error);
            }
            if long && user_page && s.cr4 & cr4::PKE != 0 {
                let key = (entry >> 59 & 15) as u32;
                let keys = s.pkru >> (2 * key);
                let no_write = keys & 3 != 0 && (keys & 1 != 0 || user || wp);
                readable &= keys & 1 == 0;
                writable &= !no_write;
                if access == Access::Read && !readable || access == Access::Write && !writable {
                    return Err(error | code::KEY);
                }
            }
            error &= !code::PRESENT;
            // Accessed and dirty bits, by locked updates as the hardware makes them.
            let last = used.saturating_sub(1);
            let mut current = entry;
            let mut again = false;
            for (i, step) in steps.iter().take(used).enumerate() {
                let mut bits = pte::A;
                if i == last && access == Access::Write {
                    bits |= pte::D;
                }
                if step.entry & bits != bits {
                    if !self.table_set(step, bits) {
                        again = true;
                        break;
                    }
                    if i == last {
                        current |= bits;
                    }
                }
            }
            if again {
                continue;
            }
            let global = current & pte::G != 0 && self.state.cr4 & cr4::PGE != 0;
            writable &= current & pte::D != 0;
            return Ok(Page { physical, writable, readable, global, size });
        }
    }

    /// Translates for an access and enters the translation into the TLB. Sets CR2 when it raises #PF.
    fn translate(&mut self, linear: u64, access: Access, view: View) -> Exec<Page> {
        let page = match self.walk(linear, access, view, false) {
            Ok(page) => page,
            Err(error) => {
                self.state.cr2 = linear;
                return Err(Fault::pf(error));
            }
        };
        if view == self.view {
            self.enter(linear, &page, access);
        }
        Ok(page)
    }

    /// Enters the translation of an access within one page into the TLB. False: it was there, or can't be, or the access faults; nothing
    /// else has changed.
    pub(crate) fn refill(&mut self, linear: u64, size: u64, write: bool) -> bool {
        if linear & (PAGE - 1) > PAGE - size || (self.in_64bit() && !self.canonical(linear)) {
            return false;
        }
        let maps = |cpu: &Cpu| {
            let w = &cpu.mmu.window;
            if write { w.write.maps(linear, size) } else { w.read.maps(linear, size) }
        };
        if maps(self) {
            return false;
        }
        let cr2 = self.state.cr2;
        let access = if write { Access::Write } else { Access::Read };
        let found = self.translate(linear, access, self.view).is_ok();
        self.state.cr2 = cr2;
        found && maps(self)
    }

    fn enter(&mut self, linear: u64, page: &Page, access: Access) {
        if page.size > PAGE {
            self.mmu.note_large(linear, page.size);
        }
        if access == Access::Fetch {
            self.mmu.window.fill_exec(linear, page.physical, page.global);
            return;
        }
        if self.debug_armed && debug::page_watched(self, linear & !(PAGE - 1)) {
            return;
        }
        let Backing::Memory { block, offset, readonly } =
            self.mmu.physical.find(page.physical, self.env.memory())
        else {
            return;
        };
        let Some(ram) = self.mmu.physical.blocks.get(usize::from(block)) else { return };
        if page.readable {
            self.mmu.window.fill_read(linear, ram, offset, page.global);
        }
        if page.writable
            && access == Access::Write
            && !readonly
            && ram.logging() & !DirtyClient::COMPARE == 0
            && !ram.code().guarded(offset)
            && ram.code().own(offset, self.writer)
        {
            if ram.logging() != 0 {
                ram.mark_dirty_for(DirtyClient::Compare, offset, PAGE);
            }
            self.mmu.window.fill_write(linear, ram, offset, page.global);
        }
    }

    /// Translates an instruction fetch.
    pub(crate) fn translate_fetch(&mut self, linear: u64) -> Exec<u64> {
        if let Some(page) = self.mmu.window.exec(linear) {
            return Ok(page | linear & (PAGE - 1));
        }
        Ok(self.translate(linear, Access::Fetch, self.view)?.physical)
    }

    /// The physical address of a linear one, without any effect, whatever the permissions: for debuggers.
    pub fn debug_translate(&mut self, linear: u64) -> Option<u64> {
        self.walk(linear, Access::Read, View::Kernel, true).ok().map(|p| p.physical)
    }

    /// Whether a linear address is canonical (SDM vol. 1 §3.3.7.1), by the paging mode in force.
    #[inline]
    pub(crate) fn canonical(&self, linear: u64) -> bool {
        let shift = if self.state.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        ((linear << shift) as i64 >> shift) as u64 == linear
    }

    /// The fault of a segment that was violated.
    #[cold]
    pub(crate) fn segment_fault(seg: Seg) -> Fault {
        if seg == Seg::Ss { Fault::ss(0) } else { Fault::gp(0) }
    }

    /// Segment checks alone: the linear address of `len` bytes at `seg:off`.
    pub(crate) fn linear(&self, seg: Seg, off: u64, len: u64, access: Access) -> Exec<u64> {
        let s = &self.state.seg[seg as usize];
        if self.in_64bit() {
            let base = if matches!(seg, Seg::Fs | Seg::Gs) { s.base } else { 0 };
            let linear = base.wrapping_add(off);
            if !self.canonical(linear) || !self.canonical(linear.wrapping_add(len - 1)) {
                return Err(Self::segment_fault(seg));
            }
            return Ok(linear);
        }
        if s.unusable {
            return Err(Self::segment_fault(seg));
        }
        if self.protected() && !self.v86() {
            let kind = s.kind();
            let ok = match access {
                Access::Write => kind & 0b1010 == 0b0010,
                Access::Read => kind & 0b1010 != 0b1000,
                Access::Fetch => kind & 8 != 0,
            };
            if !ok {
                return Err(Self::segment_fault(seg));
            }
        }
        let off = off & 0xffff_ffff;
        let last = off + (len - 1);
        let limit = u64::from(s.limit);
        let expand_down = s.is_code_or_data() && s.kind() & 0b1100 == 0b0100;
        let ok = if expand_down {
            off > limit && last <= if s.big() { 0xffff_ffff } else { 0xffff }
        } else {
            last <= limit
        };
        if !ok {
            return Err(Self::segment_fault(seg));
        }
        Ok(s.base.wrapping_add(off) & 0xffff_ffff)
    }

    /// The linear address after `n` bytes, wrapped as the mode does.
    #[inline]
    fn advance(&self, linear: u64, n: u64) -> u64 {
        let next = linear.wrapping_add(n);
        if self.in_64bit() { next } else { next & 0xffff_ffff }
    }

    fn check_alignment(&self, linear: u64, len: u64) -> Exec {
        if self.alignment_checked && linear & (len - 1) != 0 {
            return Err(Fault::ac(0));
        }
        Ok(())
    }

    /// Who makes an access by which exit: also brings the machine's clock up to this instruction.
    pub(crate) fn origin(&mut self, exit: ExitKind) -> Origin {
        self.settle_mxcsr();
        let icount = self.icount();
        self.env.at(icount);
        // Devices may write to memory, and ask for things, because of this access: look after this instruction.
        self.stop_at = 0;
        Origin { actor: Actor::Vcpu(self.env.index()), exit, rip: self.state.rip, count: 1, seq: 0 }
    }

    /// Loads up to 8 bytes within a page from physical memory.
    pub(crate) fn physical_load(&mut self, physical: u64, size: u64) -> u64 {
        if let Backing::Memory { block, offset, .. } = self.mmu.physical.find(physical, self.env.memory()) {
            let at = offset | physical & (PAGE - 1);
            let ram = self.mmu.physical.block(block);
            let v = ram.and_then(|ram| match size {
                1 => mem::ram_load::<u8>(ram, at).map(u64::from),
                2 => mem::ram_load::<u16>(ram, at).map(u64::from),
                4 => mem::ram_load::<u32>(ram, at).map(u64::from),
                8 => mem::ram_load::<u64>(ram, at),
                n => {
                    let mut bytes = [0; 8];
                    let read = bytes.get_mut(..n as usize).and_then(|b| ram.read(at, b).ok());
                    read.map(|()| u64::from_le_bytes(bytes))
                }
            });
            if let Some(v) = v {
                return v;
            }
        }
        let origin = self.origin(ExitKind::MmioRead);
        if size.is_power_of_two() {
            return self.env.memory().load(physical, size as u8, &origin).0;
        }
        (0..size).fold(0, |v, i| v | (self.env.memory().load(physical + i, 1, &origin).0 & 0xff) << (8 * i))
    }

    /// After a write to memory that may hold code: what was made from it is void.
    #[inline]
    fn after_write(&mut self, hit: bool) {
        if hit || self.epoch != hyaline_ram::code::epoch() {
            self.code_changed();
        }
    }

    /// Stores up to 8 bytes within a page to physical memory.
    pub(crate) fn physical_store(&mut self, physical: u64, size: u64, value: u64) {
        if let Backing::Memory { block, offset, readonly: false } =
            self.mmu.physical.find(physical, self.env.memory())
        {
            let at = offset | physical & (PAGE - 1);
            if let Some(ram) = self.mmu.physical.block(block) {
                let hit = ram_hit(ram, at, size);
                let done = match size {
                    1 => mem::ram_store(ram, at, value as u8),
                    2 => mem::ram_store(ram, at, value as u16),
                    4 => mem::ram_store(ram, at, value as u32),
                    8 => mem::ram_store(ram, at, value),
                    n => {
                        let bytes = value.to_le_bytes();
                        bytes.get(..n as usize).and_then(|b| ram.write(at, b).ok())
                    }
                };
                if done.is_some() {
                    self.after_write(hit);
                    return;
                }
            }
        }
        let origin = self.origin(ExitKind::MmioWrite);
        if size.is_power_of_two() {
            let _ = self.env.memory().store(physical, size as u8, value, &origin);
        } else {
            for i in 0..size {
                let _ = self.env.memory().store(physical + i, 1, value >> (8 * i) & 0xff, &origin);
            }
        }
    }

    /// Loads `T` at `seg:off` as the present program.
    #[inline(always)]
    pub(crate) fn load<T: Width>(&mut self, seg: Seg, off: u64) -> Exec<T> {
        let s = &self.segc[seg as usize & 7];
        if off.wrapping_add(T::SIZE) <= s.readable
            && let Some(v) = self.mmu.window.read.load::<T>(s.base.wrapping_add(off))
        {
            return Ok(v);
        }
        self.load_slow(seg, off)
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Width>(&mut self, seg: Seg, off: u64) -> Exec<T> {
        let linear = self.linear(seg, off, T::SIZE, Access::Read)?;
        self.check_alignment(linear, T::SIZE)?;
        self.load_linear(linear, self.view)
    }

    /// Loads at a linear address.
    pub(crate) fn load_linear<T: Width>(&mut self, linear: u64, view: View) -> Exec<T> {
        if view == self.view
            && let Some(v) = self.mmu.window.read.load::<T>(linear)
        {
            return Ok(v);
        }
        if self.debug_armed {
            debug::data_access(self, linear, T::SIZE, false);
        }
        let here = PAGE - (linear & (PAGE - 1));
        if here >= T::SIZE {
            let page = self.translate(linear, Access::Read, view)?;
            return Ok(T::from_u64(self.physical_load(page.physical, T::SIZE)));
        }
        let next = self.advance(linear, here);
        if view == self.view {
            let mut bytes = [0; 8];
            let (low, high) = bytes.split_at_mut(here as usize & 7);
            let high = high.get_mut(..(T::SIZE - here) as usize).unwrap_or_default();
            if self.mmu.window.read.read_bytes(linear, low) && self.mmu.window.read.read_bytes(next, high) {
                return Ok(T::from_u64(u64::from_le_bytes(bytes)));
            }
        }
        let first = self.translate(linear, Access::Read, view)?.physical;
        let second = self.translate(next, Access::Read, view)?.physical;
        let low = self.physical_load(first, here);
        let high = self.physical_load(second, T::SIZE - here);
        Ok(T::from_u64(low | high << (8 * here)))
    }

    /// Stores `T` at `seg:off` as the present program.
    #[inline(always)]
    pub(crate) fn store<T: Width>(&mut self, seg: Seg, off: u64, v: T) -> Exec {
        let s = &self.segc[seg as usize & 7];
        if off.wrapping_add(T::SIZE) <= s.writable
            && self.mmu.window.write.store::<T>(s.base.wrapping_add(off), v)
        {
            return Ok(());
        }
        self.store_slow(seg, off, v)
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Width>(&mut self, seg: Seg, off: u64, v: T) -> Exec {
        let linear = self.linear(seg, off, T::SIZE, Access::Write)?;
        self.check_alignment(linear, T::SIZE)?;
        self.store_linear(linear, v, self.view)
    }

    /// Stores at a linear address.
    pub(crate) fn store_linear<T: Width>(&mut self, linear: u64, v: T, view: View) -> Exec {
        if view == self.view && self.mmu.window.write.store::<T>(linear, v) {
            return Ok(());
        }
        if self.debug_armed {
            debug::data_access(self, linear, T::SIZE, true);
        }
        let here = PAGE - (linear & (PAGE - 1));
        if here < T::SIZE && view == self.view {
            let next = self.advance(linear, here);
            let bytes = v.u64().to_le_bytes();
            let (low, high) = bytes.split_at(here as usize & 7);
            let high = high.get(..(T::SIZE - here) as usize).unwrap_or_default();
            let window = &self.mmu.window;
            if window.write.maps(linear, here) && window.write.write_bytes(next, high) {
                window.write.write_bytes(linear, low);
                return Ok(());
            }
        }
        let first = self.translate(linear, Access::Write, view)?.physical;
        if here >= T::SIZE {
            self.physical_store(first, T::SIZE, v.u64());
            return Ok(());
        }
        let second = self.translate(self.advance(linear, here), Access::Write, view)?.physical;
        self.physical_store(first, here, v.u64());
        self.physical_store(second, T::SIZE - here, v.u64() >> (8 * here));
        Ok(())
    }

    /// Replaces a value in memory by what `f` makes of it; gives what `f` gives beside. `f` may run more than once when `locked`.
    #[inline(always)]
    pub(crate) fn update<T: Width, R>(
        &mut self,
        seg: Seg,
        off: u64,
        locked: bool,
        mut f: impl FnMut(T) -> (T, R),
    ) -> Exec<R> {
        let s = &self.segc[seg as usize & 7];
        if off.wrapping_add(T::SIZE) <= s.writable
            && let Some(r) = self.mmu.window.write.update(s.base.wrapping_add(off), locked, &mut f)
        {
            return Ok(r);
        }
        if locked {
            return self.update_locked(seg, off, &mut f);
        }
        let (linear, old) = self.update_begin::<T>(seg, off)?;
        // The page may have got into the TLB just now.
        if let Some(r) = self.mmu.window.write.update(linear, locked, &mut f) {
            return Ok(r);
        }
        let (new, r) = f(old);
        self.store_linear(linear, new, self.view)?;
        Ok(r)
    }

    /// A locked [`Cpu::update`] that the write table doesn't answer: of a page with code, of a watched one, across a page's end, or of a device (which
    /// is read and written like any other).
    #[cold]
    #[inline(never)]
    fn update_locked<T: Width, R>(&mut self, seg: Seg, off: u64, f: &mut impl FnMut(T) -> (T, R)) -> Exec<R> {
        let linear = self.linear(seg, off, T::SIZE, Access::Write)?;
        self.check_alignment(linear, T::SIZE)?;
        self.probe_linear(linear, T::SIZE, Access::Write)?;
        // The page may have got into the TLB just now.
        if let Some(r) = self.mmu.window.write.update(linear, true, &mut *f) {
            return Ok(r);
        }
        if self.debug_armed {
            debug::data_access(self, linear, T::SIZE, false);
            debug::data_access(self, linear, T::SIZE, true);
        }
        let here = PAGE - (linear & (PAGE - 1));
        let first = self.translate(linear, Access::Write, self.view)?.physical;
        if here >= T::SIZE {
            if let Some((ram, at)) = self.writable_ram(first) {
                let hit = ram_hit(&ram, at, T::SIZE);
                if let Some(r) = mem::ram_update(&ram, at, f) {
                    self.after_write(hit);
                    return Ok(r);
                }
            }
            let (new, r) = f(T::from_u64(self.physical_load(first, T::SIZE)));
            self.physical_store(first, T::SIZE, new.u64());
            return Ok(r);
        }
        let second = self.translate(self.advance(linear, here), Access::Write, self.view)?.physical;
        let mut change = |cpu: &mut Cpu| {
            let low = cpu.physical_load(first, here);
            let high = cpu.physical_load(second, T::SIZE - here);
            let (new, r) = f(T::from_u64(low | high << (8 * here)));
            cpu.physical_store(first, here, new.u64());
            cpu.physical_store(second, T::SIZE - here, new.u64() >> (8 * here));
            r
        };
        // Two pages need not be neighbours on the host, which has no locked access to both then.
        let memory = self.writable_ram(first).is_some() && self.writable_ram(second).is_some();
        Ok(if memory { self.exclusively(change) } else { change(self) })
    }

    /// The block and the offset behind a physical address that is RAM.
    fn writable_ram(&mut self, physical: u64) -> Option<(Arc<RamBlock>, u64)> {
        let Backing::Memory { block, offset, readonly: false } =
            self.mmu.physical.find(physical, self.env.memory())
        else {
            return None;
        };
        Some((self.mmu.physical.block(block)?.clone(), offset | physical & (PAGE - 1)))
    }

    /// Compares and exchanges 16 aligned bytes; gives what was there. The destination is written in any case, for faults' sake.
    pub(crate) fn exchange16(&mut self, seg: Seg, off: u64, old: u128, new: u128) -> Exec<u128> {
        let linear = self.linear(seg, off, 16, Access::Write)?;
        self.probe_linear(linear, 16, Access::Write)?;
        if let Some(was) = self.mmu.window.write.cmpxchg16(linear, old, new) {
            return Ok(was);
        }
        // A page with code, or a watched one.
        let physical = self.translate(linear, Access::Write, self.view)?.physical;
        if !self.debug_armed
            && let Some((ram, at)) = self.writable_ram(physical)
        {
            let hit = ram_hit(&ram, at, 16);
            if let Some(was) = mem::ram_exchange16(&ram, at, old, new) {
                self.after_write(hit);
                return Ok(was);
            }
        }
        // A device.
        let low = self.load_linear::<u64>(linear, self.view)?;
        let high = self.load_linear::<u64>(self.advance(linear, 8), self.view)?;
        let was = u128::from(high) << 64 | u128::from(low);
        let put = if was == old { new } else { was };
        self.store_linear(linear, put as u64, self.view)?;
        self.store_linear(self.advance(linear, 8), (put >> 64) as u64, self.view)?;
        Ok(was)
    }

    /// Reads an operand: the memory operand when there is one, else the register.
    #[inline(always)]
    fn register_or_memory<T: Width>(&mut self, insn: &Insn, register: u8) -> Exec<T> {
        if insn.is_mem() {
            let (seg, off) = self.mem_addr(insn);
            return self.load(seg, off);
        }
        Ok(self.reg(register))
    }
    /// Operand 0, register or memory.
    #[inline(always)]
    pub(crate) fn rm0<T: Width>(&mut self, insn: &Insn) -> Exec<T> {
        self.register_or_memory(insn, insn.r0)
    }
    /// Operand 1, register or memory.
    #[inline(always)]
    pub(crate) fn rm1<T: Width>(&mut self, insn: &Insn) -> Exec<T> {
        self.register_or_memory(insn, insn.r1)
    }
    /// Operand 2, register or memory.
    #[inline(always)]
    pub(crate) fn rm2<T: Width>(&mut self, insn: &Insn) -> Exec<T> {
        self.register_or_memory(insn, insn.r2)
    }

    /// A general register of `T`'s width; 16-19 are AH, CH, DH, BH.
    #[inline(always)]
    pub(crate) fn reg<T: Width>(&self, r: u8) -> T {
        if T::SIZE == 1 && r >= 16 {
            return T::from_u64(self.state.gpr[usize::from(r & 3)] >> 8);
        }
        T::from_u64(self.state.gpr[usize::from(r & 15)])
    }
    /// Sets a general register: 32 bits clear the upper half, 8 and 16 leave the rest.
    #[inline(always)]
    pub(crate) fn set_reg<T: Width>(&mut self, r: u8, v: T) {
        if T::SIZE == 1 && r >= 16 {
            let g = &mut self.state.gpr[usize::from(r & 3)];
            *g = *g & !0xff00 | v.u64() << 8;
            return;
        }
        let g = &mut self.state.gpr[usize::from(r & 15)];
        *g = match T::SIZE {
            8 | 4 => v.u64(),
            2 => *g & !0xffff | v.u64(),
            _ => *g & !0xff | v.u64(),
        };
    }

    /// Checks that a read-modify-write can take place and gives the linear address and the old value (not read from devices twice:
    /// zero when the write table maps it).
    #[cold]
    #[inline(never)]
    fn update_begin<T: Width>(&mut self, seg: Seg, off: u64) -> Exec<(u64, T)> {
        let linear = self.linear(seg, off, T::SIZE, Access::Write)?;
        self.check_alignment(linear, T::SIZE)?;
        self.probe_linear(linear, T::SIZE, Access::Write)?;
        if self.mmu.window.write.maps(linear, T::SIZE) {
            return Ok((linear, T::from_u64(0)));
        }
        Ok((linear, self.load_linear(linear, self.view)?))
    }

    /// Checks that `len` bytes (up to two pages) at a linear address can be accessed, and enters them into the TLB.
    fn probe_linear(&mut self, linear: u64, len: u64, access: Access) -> Exec {
        let here = PAGE - (linear & (PAGE - 1));
        for (at, n) in [(linear, here.min(len)), (self.advance(linear, here), len.saturating_sub(here))] {
            let table = if access == Access::Write { &self.mmu.window.write } else { &self.mmu.window.read };
            if n > 0 && !table.maps(at, n) {
                self.translate(at, access, self.view)?;
            }
        }
        Ok(())
    }

    /// Checks that a store of `len` bytes (at most a page) at `seg:off` can't fault.
    pub(crate) fn probe_write(&mut self, seg: Seg, off: u64, len: u64) -> Exec {
        if len == 0 {
            return Ok(());
        }
        let linear = self.linear(seg, off, len, Access::Write)?;
        self.probe_linear(linear, len.min(PAGE), Access::Write)
    }

    /// Checks that a load of `len` bytes (at most a page) at `seg:off` can't fault.
    #[allow(dead_code)]
    pub(crate) fn probe_read(&mut self, seg: Seg, off: u64, len: u64) -> Exec {
        if len == 0 {
            return Ok(());
        }
        let linear = self.linear(seg, off, len, Access::Read)?;
        self.probe_linear(linear, len.min(PAGE), Access::Read)
    }

    /// Loads bytes at `seg:off`.
    pub(crate) fn load_bytes(&mut self, seg: Seg, off: u64, buf: &mut [u8]) -> Exec {
        let len = buf.len() as u64;
        if len == 0 {
            return Ok(());
        }
        let s = &self.segc[seg as usize & 7];
        if off.wrapping_add(len) <= s.readable
            && self.mmu.window.read.read_bytes(s.base.wrapping_add(off), buf)
        {
            return Ok(());
        }
        self.load_bytes_slow(seg, off, buf)
    }

    #[cold]
    fn load_bytes_slow(&mut self, seg: Seg, off: u64, buf: &mut [u8]) -> Exec {
        let len = buf.len() as u64;
        let linear = self.linear(seg, off, len, Access::Read)?;
        if self.debug_armed {
            debug::data_access(self, linear, len, false);
        }
        // All pages first, so that a device's registers aren't read for nothing.
        let mut at = 0;
        while at < len {
            let linear = self.advance(linear, at);
            self.probe_linear(linear, (PAGE - (linear & (PAGE - 1))).min(len - at), Access::Read)?;
            at += PAGE - (linear & (PAGE - 1));
        }
        let mut rest = buf;
        let mut linear = linear;
        while !rest.is_empty() {
            let here = ((PAGE - (linear & (PAGE - 1))) as usize).min(rest.len());
            let (part, tail) = rest.split_at_mut(here);
            if !self.mmu.window.read.read_bytes(linear, part) {
                let mut physical = self.translate(linear, Access::Read, self.view)?.physical;
                for piece in part.chunks_mut(8) {
                    let v = self.physical_load(physical, piece.len() as u64).to_le_bytes();
                    piece.iter_mut().zip(v).for_each(|(to, from)| *to = from);
                    physical += 8;
                }
            }
            linear = self.advance(linear, here as u64);
            rest = tail;
        }
        Ok(())
    }

    /// Stores bytes at `seg:off`; nothing is stored when any of them can't be.
    pub(crate) fn store_bytes(&mut self, seg: Seg, off: u64, data: &[u8]) -> Exec {
        let len = data.len() as u64;
        if len == 0 {
            return Ok(());
        }
        let s = &self.segc[seg as usize & 7];
        if off.wrapping_add(len) <= s.writable
            && self.mmu.window.write.write_bytes(s.base.wrapping_add(off), data)
        {
            return Ok(());
        }
        self.store_bytes_slow(seg, off, data)
    }

    #[cold]
    fn store_bytes_slow(&mut self, seg: Seg, off: u64, data: &[u8]) -> Exec {
        let len = data.len() as u64;
        let linear = self.linear(seg, off, len, Access::Write)?;
        if self.debug_armed {
            debug::data_access(self, linear, len, true);
        }
        let mut at = 0;
        while at < len {
            let linear = self.advance(linear, at);
            self.probe_linear(linear, (PAGE - (linear & (PAGE - 1))).min(len - at), Access::Write)?;
            at += PAGE - (linear & (PAGE - 1));
        }
        let mut rest = data;
        let mut linear = linear;
        while !rest.is_empty() {
            let here = ((PAGE - (linear & (PAGE - 1))) as usize).min(rest.len());
            let (part, tail) = rest.split_at(here);
            if !self.mmu.window.write.write_bytes(linear, part) {
                let mut physical = self.translate(linear, Access::Write, self.view)?.physical;
                for piece in part.chunks(8) {
                    let mut v = [0; 8];
                    v.iter_mut().zip(piece).for_each(|(to, from)| *to = *from);
                    self.physical_store(physical, piece.len() as u64, u64::from_le_bytes(v));
                    physical += 8;
                }
            }
            linear = self.advance(linear, here as u64);
            rest = tail;
        }
        Ok(())
    }

    /// The view of implicit supervisor accesses: never hindered by SMAP's exception for AC (SDM vol. 3A §4.6.1: implicit
    /// accesses to user pages fault whenever SMAP is on).
    fn system_view(&self) -> View {
        if self.state.cr4 & cr4::SMAP != 0 { View::KernelSmap } else { View::Kernel }
    }

    /// Does something with the supervisor's window in force, and its TLB.
    fn as_system<R>(&mut self, f: impl FnOnce(&mut Cpu) -> R) -> R {
        let (own, system) = (self.view, self.system_view());
        if own == system {
            return f(self);
        }
        let pcid = self.pcid();
        self.mmu.select(pcid, system);
        self.view = system;
        let r = f(self);
        self.view = own;
        self.mmu.select(pcid, own);
        r
    }

    /// Loads at a linear address as the processor itself (descriptor tables, TSS): paging with CPL 0, no segment checks.
    pub(crate) fn sys_load<T: Width>(&mut self, linear: u64) -> Exec<T> {
        if self.long_mode() && !self.canonical(linear) {
            return Err(Fault::gp(0));
        }
        self.as_system(|cpu| cpu.load_linear(linear, cpu.view))
    }

    /// Stores at a linear address as the processor itself.
    pub(crate) fn sys_store<T: Width>(&mut self, linear: u64, v: T) -> Exec {
        if self.long_mode() && !self.canonical(linear) {
            return Err(Fault::gp(0));
        }
        self.as_system(|cpu| cpu.store_linear(linear, v, cpu.view))
    }
}

fn ram_hit(ram: &RamBlock, at: u64, size: u64) -> bool {
    ram.code().lines(at) & hyaline_ram::code::line_mask(at, size) != 0
}
