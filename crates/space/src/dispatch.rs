//! One access, from the view to the device and back.

use crate::iommu::MAX_TRANSLATIONS;
use crate::limits::{Endian, Limits, NarrowWrite};
use crate::view::{FlatRange, FlatView, Target};
use crate::{Access, Io, IoError, Origin, Outcome, Region, Translation};

/// All ones in the low `size` bytes: what a read of nothing gives.
#[inline]
pub(crate) const fn ones(size: u8) -> u64 {
    match size {
        0 => 0,
        1..=7 => (1 << (size * 8)) - 1,
        _ => u64::MAX,
    }
}

/// The little-endian value of at most 8 bytes.
fn value_of(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    let n = bytes.len().min(8);
    all[..n].copy_from_slice(&bytes[..n]);
    u64::from_le_bytes(all)
}

/// The first failure of an access of any length.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) addr: u64,
    pub(crate) outcome: Outcome,
    pub(crate) region: Option<Region>,
}

/// One access on its way.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a> {
    pub(crate) view: &'a FlatView,
    /// The name of the space.
    pub(crate) space: &'a str,
    pub(crate) who: &'a Origin,
    /// IOMMU regions passed so far.
    pub(crate) translations: u8,
    /// Devices are out of reach: a device's own access.
    pub(crate) ram_only: bool,
}

/// The bytes of an access and its direction.
enum Bytes<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Bytes::Read(buf) => buf.len(),
            Bytes::Write(data) => data.len(),
        }
    }

    fn is_write(&self) -> bool {
        matches!(self, Bytes::Write(_))
    }

    /// The part from `at`, `len` bytes long.
    fn part(&mut self, at: usize, len: usize) -> Bytes<'_> {
        match self {
            Bytes::Read(buf) => Bytes::Read(&mut buf[at..at + len]),
            Bytes::Write(data) => Bytes::Write(&data[at..at + len]),
        }
    }

    /// What a read that fails gives.
    fn fail(&mut self) {
        if let Bytes::Read(buf) = self {
            buf.fill(0xff);
        }
    }

    /// The value of a short part.
    fn value(&self) -> u64 {
        match self {
            Bytes::Read(buf) => value_of(buf),
            Bytes::Write(data) => value_of(data),
        }
    }
}

impl<'a> Way<'a> {
    /// Loads 1, 2, 4 or 8 bytes; `hint` is the index of the range at `addr`, if there is one.
    #[inline]
    pub(crate) fn load(&self, hint: Option<usize>, addr: u64, size: u8) -> (u64, Outcome) {
        if let Some(range) = hint.and_then(|index| self.view.ranges.get(index))
            && matches!(size, 1 | 2 | 4 | 8)
            && range.last - addr >= u64::from(size - 1)
        {
            match &range.target {
                Target::Ram { block, base }
                | Target::Rom { block, base }
                | Target::RomDevice { block, base, .. } => {
                    if let Some(value) = block.load(base + (addr - range.start), size) {
                        return (value, Outcome::Ok);
                    }
                }
                Target::Io(io) => {
                    let offset = range.offset + (addr - range.start);
                    if range.straight & size != 0 && offset & u64::from(size - 1) == 0 && !self.ram_only {
                        return self.load_straight(range, io, addr, offset, size);
                    }
                }
                Target::Iommu(_) | Target::Nobody => {}
            }
        }
        if self.is_hole(hint, addr, size) {
            self.observe(None, addr, size, false, ones(size), 0, Outcome::Unassigned, self.now());
            return (ones(size), Outcome::Unassigned);
        }
        self.load_slow(addr, size)
    }

    /// Is the whole access in a hole? (Probing for devices makes many such.)
    #[inline]
    fn is_hole(&self, hint: Option<usize>, addr: u64, size: u8) -> bool {
        hint.is_none()
            && matches!(size, 1 | 2 | 4 | 8)
            && addr.checked_add(u64::from(size - 1)).is_some()
            && (size == 1 || self.view.hole_end(addr).is_none_or(|start| start - addr >= u64::from(size)))
    }

    fn load_straight(
        &self,
        range: &FlatRange,
        io: &std::sync::Arc<dyn Io>,
        addr: u64,
        offset: u64,
        size: u8,
    ) -> (u64, Outcome) {
        let started = self.now();
        let (value, outcome) = match io.read(offset, size, self.who) {
            Ok(value) => (value & ones(size), Outcome::Ok),
            Err(error) => (ones(size), Outcome::Failed(error)),
        };
        self.observe(Some(range), addr, size, false, value, 1, outcome, started);
        (value, outcome)
    }

    #[cold]
    fn load_slow(&self, addr: u64, size: u8) -> (u64, Outcome) {
        if !matches!(size, 1 | 2 | 4 | 8) {
            return (u64::MAX, Outcome::Failed(IoError::BadSize));
        }
        let mut bytes = [0; 8];
        let failure = self.read(addr, &mut bytes[..usize::from(size)]);
        (u64::from_le_bytes(bytes), failure.map_or(Outcome::Ok, |failure| failure.outcome))
    }

    /// Stores the low 1, 2, 4 or 8 bytes of `value`; `hint` as for `load`.
    #[inline]
    pub(crate) fn store(&self, hint: Option<usize>, addr: u64, size: u8, value: u64) -> Outcome {
        if let Some(range) = hint.and_then(|index| self.view.ranges.get(index))
            && matches!(size, 1 | 2 | 4 | 8)
            && range.last - addr >= u64::from(size - 1)
        {
            match &range.target {
                Target::Ram { block, base } => {
                    if block.store(base + (addr - range.start), size, value).is_some() {
                        return Outcome::Ok;
                    }
                }
                Target::Io(io) => {
                    let offset = range.offset + (addr - range.start);
                    if range.straight & size != 0
                        && offset & u64::from(size - 1) == 0
                        && range.eventfds.is_empty()
                        && !self.ram_only
                    {
                        return self.store_straight(range, io, addr, offset, size, value & ones(size));
                    }
                }
                Target::Rom { .. } | Target::RomDevice { .. } | Target::Iommu(_) | Target::Nobody => {}
            }
        }
        if self.is_hole(hint, addr, size) {
            self.observe(None, addr, size, true, value & ones(size), 0, Outcome::Unassigned, self.now());
            return Outcome::Unassigned;
        }
        self.store_slow(addr, size, value)
    }

    fn store_straight(
        &self,
        range: &FlatRange,
        io: &std::sync::Arc<dyn Io>,
        addr: u64,
        offset: u64,
        size: u8,
        value: u64,
    ) -> Outcome {
        let started = self.now();
        let outcome = match io.write(offset, size, value, self.who) {
            Ok(()) => Outcome::Ok,
            Err(error) => Outcome::Failed(error),
        };
        self.observe(Some(range), addr, size, true, value, 1, outcome, started);
        outcome
    }

    #[cold]
    fn store_slow(&self, addr: u64, size: u8, value: u64) -> Outcome {
        if !matches!(size, 1 | 2 | 4 | 8) {
            return Outcome::Failed(IoError::BadSize);
        }
        let failure = self.write(addr, &value.to_le_bytes()[..usize::from(size)]);
        failure.map_or(Outcome::Ok, |failure| failure.outcome)
    }

    /// Reads any number of bytes.
    pub(crate) fn read(&self, addr: u64, buf: &mut [u8]) -> Option<Failure> {
        self.run(addr, Bytes::Read(buf))
    }

    /// Writes any number of bytes.
    pub(crate) fn write(&self, addr: u64, data: &[u8]) -> Option<Failure> {
        self.run(addr, Bytes::Write(data))
    }

    /// Cuts the access at the ends of ranges and of holes, and makes the parts.
    fn run(&self, addr: u64, mut bytes: Bytes<'_>) -> Option<Failure> {
        let mut first = None;
        let mut done = 0;
        while done < bytes.len() {
            let left = bytes.len() - done;
            let Some(at) = addr.checked_add(done as u64) else {
                // Beyond the last address of all: nothing is there, and it doesn't wrap.
                bytes.part(done, left).fail();
                keep(&mut first, Failure { addr: u64::MAX, outcome: Outcome::Unassigned, region: None });
                break;
            };
            let range = self.view.range_at(at);
            let end = match range {
                Some(range) => Some(range.last - at),
                None => self.view.hole_end(at).map(|start| start - at - 1),
            };
            let len = end.map_or(left, |more| {
                usize::try_from(more).map_or(left, |more| left.min(more.saturating_add(1)))
            });
            let part = bytes.part(done, len);
            let failure = match range {
                Some(range) => self.in_range(range, at, part),
                None => self.nobody(None, at, part, Outcome::Unassigned),
            };
            if let Some(failure) = failure {
                keep(&mut first, failure);
            }
            done += len;
        }
        first
    }

    /// A part that is wholly inside of one range.
    fn in_range(&self, range: &FlatRange, addr: u64, mut bytes: Bytes<'_>) -> Option<Failure> {
        let skip = addr - range.start;
        match (&range.target, &mut bytes) {
            (
                Target::Ram { block, base }
                | Target::Rom { block, base }
                | Target::RomDevice { block, base, .. },
                Bytes::Read(buf),
            ) => match block.read(base + skip, buf) {
                Ok(()) => None,
                Err(_) => self.nobody(Some(range), addr, bytes, Outcome::Failed(IoError::Failed)),
            },
            (Target::Ram { block, base }, Bytes::Write(data)) => match block.write(base + skip, data) {
                Ok(()) => None,
                Err(_) => self.nobody(Some(range), addr, bytes, Outcome::Failed(IoError::Failed)),
            },
            (Target::Rom { block, base } | Target::RomDevice { block, base, .. }, Bytes::Write(data))
                if self.who.actor.writes_rom() =>
            {
                match block.write(base + skip, data) {
                    Ok(()) => None,
                    Err(_) => self.nobody(Some(range), addr, bytes, Outcome::Failed(IoError::Failed)),
                }
            }
            (Target::Rom { .. }, Bytes::Write(_)) => {
                self.nobody(Some(range), addr, bytes, Outcome::Failed(IoError::ReadOnly))
            }
            (Target::Io(_) | Target::RomDevice { .. }, _) if self.ram_only => {
                self.nobody(Some(range), addr, bytes, Outcome::Failed(IoError::Refused))
            }
            (Target::Io(io) | Target::RomDevice { io, .. }, _) => self.device(range, &**io, addr, bytes),
            (Target::Iommu(_), _) => self.translated(range, addr, bytes),
            (Target::Nobody, _) => self.nobody(Some(range), addr, bytes, Outcome::Unassigned),
        }
    }

    /// A part that reaches nobody. The observer gets one record of its first 8 bytes at most.
    fn nobody(
        &self,
        range: Option<&FlatRange>,
        addr: u64,
        mut bytes: Bytes<'_>,
        outcome: Outcome,
    ) -> Option<Failure> {
        bytes.fail();
        let size = bytes.len().min(8);
        let (is_write, value) = (bytes.is_write(), bytes.part(0, size).value());
        self.observe(range, addr, size as u8, is_write, value, 0, outcome, self.now());
        Some(Failure { addr, outcome, region: range.map(|range| range.region.clone()) })
    }

    /// A part in an IOMMU region: translated page by page.
    fn translated(&self, range: &FlatRange, addr: u64, mut bytes: Bytes<'_>) -> Option<Failure> {
        let Target::Iommu(translate) = &range.target else { return None };
        let is_write = bytes.is_write();
        let mut first = None;
        let mut done = 0;
        while done < bytes.len() {
            let at = addr + done as u64;
            let offset = range.offset + (at - range.start);
            let left = bytes.len() - done;
            let goes = (self.translations < MAX_TRANSLATIONS)
                .then(|| translate.translate(offset, is_write, self.who))
                .filter(|to| to.perm.allows(is_write));
            let Some(Translation { target, addr: page, mask, .. }) = goes else {
                let refused = Outcome::Failed(IoError::Refused);
                // One refusal speaks for the rest of the part: asking page by page would be unbounded work.
                return first.or(self.nobody(Some(range), at, bytes.part(done, left), refused));
            };
            // Whatever mask the IOMMU gives, the page is a power of two.
            let mask = if mask & mask.wrapping_add(1) == 0 { mask } else { (1 << mask.trailing_ones()) - 1 };
            let to = (page & !mask) | (offset & mask);
            let more = mask - (offset & mask);
            let len = usize::try_from(more).map_or(left, |more| left.min(more.saturating_add(1)));
            let view = target.inner.view.load();
            let way = Way {
                view: &view,
                space: target.name(),
                who: self.who,
                translations: self.translations + 1,
                ram_only: self.ram_only,
            };
            if let Some(failure) = way.run(to, bytes.part(done, len)) {
                keep(&mut first, failure);
            }
            done += len;
        }
        first
    }

    /// A part in a device's range: cut into pieces that are valid there.
    fn device(&self, range: &FlatRange, io: &dyn Io, addr: u64, mut bytes: Bytes<'_>) -> Option<Failure> {
        let mut first = None;
        let mut done = 0;
        while done < bytes.len() {
            let at = addr + done as u64;
            let offset = range.offset + (at - range.start);
            let (len, valid) = next_piece(&range.limits, offset, bytes.len() - done);
            let mut part = bytes.part(done, usize::from(len));
            let outcome = match valid {
                Ok(()) => self.piece(range, io, at, offset, &mut part),
                Err(error) => {
                    part.fail();
                    let outcome = Outcome::Failed(error);
                    let (is_write, value) = (part.is_write(), part.value());
                    self.observe(Some(range), at, len, is_write, value, 0, outcome, self.now());
                    outcome
                }
            };
            if !outcome.is_ok() {
                keep(&mut first, Failure { addr: at, outcome, region: Some(range.region.clone()) });
            }
            done += usize::from(len);
        }
        first
    }

    /// A piece of 1, 2, 4 or 8 bytes that is valid for the device.
    fn piece(
        &self,
        range: &FlatRange,
        io: &dyn Io,
        addr: u64,
        offset: u64,
        bytes: &mut Bytes<'_>,
    ) -> Outcome {
        let started = self.now();
        let size = bytes.len() as u8;
        let (is_write, outcome, parts) = match bytes {
            Bytes::Read(buf) => {
                let (outcome, parts) = adjusted_read(io, &range.limits, offset, buf, self.who);
                (false, outcome, parts)
            }
            Bytes::Write(data) => {
                let value = value_of(data);
                match range.eventfds.iter().find(|event| event.matches(offset, size, value)) {
                    Some(event) => {
                        event.notify.notify();
                        (true, Outcome::Ok, 0)
                    }
                    None => {
                        let (outcome, parts) = adjusted_write(io, &range.limits, offset, data, self.who);
                        (true, outcome, parts)
                    }
                }
            }
        };
        self.observe(Some(range), addr, size, is_write, bytes.value(), parts, outcome, started);
        outcome
    }

    #[inline]
    fn now(&self) -> u64 {
        self.view.observer.as_ref().map_or(0, |observer| observer.now())
    }

    #[inline]
    #[allow(clippy::too_many_arguments)] // the fields of one record, at its only place of construction
    fn observe(
        &self,
        range: Option<&FlatRange>,
        addr: u64,
        size: u8,
        is_write: bool,
        value: u64,
        parts: u8,
        outcome: Outcome,
        started: u64,
    ) {
        let Some(observer) = &self.view.observer else { return };
        let (region, region_offset) = match range {
            Some(range) => (&range.region, range.offset + (addr - range.start)),
            None => (&self.view.tree.region, addr),
        };
        observer.access(&Access {
            space: self.space,
            addr,
            size,
            is_write,
            value,
            region,
            region_offset,
            parts,
            outcome,
            who: self.who,
            started,
        });
    }
}

fn keep(first: &mut Option<Failure>, failure: Failure) {
    if first.is_none() {
        *first = Some(failure);
    }
}

/// The largest power of two that is at most `n`; 1 for 0.
fn floor_pow2(n: usize) -> u8 {
    match n {
        0 | 1 => 1,
        2 | 3 => 2,
        4..=7 => 4,
        _ => 8,
    }
}

/// The largest size that is at most `max` and that `offset` is aligned to.
fn align_down(offset: u64, max: u8) -> u8 {
    let mut size = max;
    while offset & u64::from(size - 1) != 0 {
        size /= 2;
    }
    size
}

/// The size of the next piece of `left` bytes at `offset`, and whether the region takes it.
pub(crate) fn next_piece(limits: &Limits, offset: u64, left: usize) -> (u8, Result<(), IoError>) {
    let wanted = floor_pow2(left).min(limits.valid.max);
    let size = if limits.valid.unaligned { wanted } else { align_down(offset, wanted) };
    let valid = match size >= limits.valid.min {
        true => Ok(()),
        false if wanted >= limits.valid.min => Err(IoError::Unaligned),
        false => Err(IoError::BadSize),
    };
    (size, valid)
}

/// One call of the handler that is part of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// The offset in the region.
    pub(crate) offset: u64,
    /// The size of the call in bytes.
    pub(crate) size: u8,
    /// How many bytes of the call come before those that are wanted.
    pub(crate) skip: u8,
    /// How many bytes of the call are wanted.
    pub(crate) wanted: u8,
}

/// The next call for `left` bytes at `offset`: as large as the handler implements and alignment allows; where that is too small for it,
/// the smallest aligned access that it implements.
pub(crate) fn next_call(limits: &Limits, offset: u64, left: usize) -> Call {
    let largest = floor_pow2(left).min(limits.impl_.max);
    let size = if limits.impl_.unaligned { largest } else { align_down(offset, largest) };
    if size >= limits.impl_.min {
        return Call { offset, size, skip: 0, wanted: size };
    }
    let size = limits.impl_.min;
    let skip = (offset & u64::from(size - 1)) as u8;
    let wanted = (size - skip).min(left.min(8) as u8);
    Call { offset: offset - u64::from(skip), size, skip, wanted }
}

/// The value of a call's bytes in the region's order.
fn from_bytes(endian: Endian, bytes: &[u8]) -> u64 {
    let value = value_of(bytes);
    match endian {
        Endian::Big => value.swap_bytes() >> (64 - 8 * bytes.len().clamp(1, 8)),
        Endian::Little | Endian::Native => value,
    }
}

/// The bytes (the first `size` count) of a call's value in the region's order.
fn to_bytes(endian: Endian, size: u8, value: u64) -> [u8; 8] {
    match endian {
        Endian::Big => (value << (64 - 8 * u32::from(size.clamp(1, 8)))).to_be_bytes(),
        Endian::Little | Endian::Native => value.to_le_bytes(),
    }
}

/// Reads a piece by as many calls as it takes.
fn adjusted_read(io: &dyn Io, limits: &Limits, offset: u64, buf: &mut [u8], who: &Origin) -> (Outcome, u8) {
    let (mut outcome, mut parts, mut done) = (Outcome::Ok, 0, 0);
    while done < buf.len() {
        let call = next_call(limits, offset + done as u64, buf.len() - done);
        let (skip, wanted) = (usize::from(call.skip), usize::from(call.wanted));
        let to = &mut buf[done..done + wanted];
        parts += 1;
        match io.read(call.offset, call.size, who) {
            Ok(value) => {
                to.copy_from_slice(&to_bytes(limits.endian, call.size, value)[skip..skip + wanted]);
            }
            Err(error) => {
                to.fill(0xff);
                outcome = outcome.and(Outcome::Failed(error));
            }
        }
        done += wanted;
    }
    (outcome, parts)
}

/// Writes a piece by as many calls as it takes.
fn adjusted_write(io: &dyn Io, limits: &Limits, offset: u64, data: &[u8], who: &Origin) -> (Outcome, u8) {
    let (mut outcome, mut parts, mut done) = (Outcome::Ok, 0, 0);
    while done < data.len() {
        let call = next_call(limits, offset + done as u64, data.len() - done);
        let (skip, wanted, size) = (usize::from(call.skip), usize::from(call.wanted), usize::from(call.size));
        let mut bytes = [0; 8];
        let mut result = Ok(());
        if wanted < size && limits.narrow == NarrowWrite::Merge {
            parts += 1;
            result = io.read(call.offset, call.size, who).map(|value| {
                bytes = to_bytes(limits.endian, call.size, value);
            });
        }
        bytes[skip..skip + wanted].copy_from_slice(&data[done..done + wanted]);
        if result.is_ok() {
            parts += 1;
            result = io.write(call.offset, call.size, from_bytes(limits.endian, &bytes[..size]), who);
        }
        if let Err(error) = result {
            outcome = outcome.and(Outcome::Failed(error));
        }
        done += wanted;
    }
    (outcome, parts)
}
