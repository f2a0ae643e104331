//! Who accesses, how, and what came of it.

use crate::{Limits, Region};
use std::fmt;

/// The number that the machine gave to a device, for attribution of its own accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct DeviceId(pub u16);

/// Who makes an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Actor {
    /// A virtual processor, by its index.
    Vcpu(u8),
    /// A device that masters the bus.
    Dma(DeviceId),
    /// A person or a tool that looks at the machine. May write to ROM.
    Debugger,
    /// The board, when it puts images into memory. May write to ROM.
    Loader,
}

impl Actor {
    /// The kind of actor, without its number.
    pub const fn as_str(self) -> &'static str {
        match self {
            Actor::Vcpu(_) => "vcpu",
            Actor::Dma(_) => "dma",
            Actor::Debugger => "debugger",
            Actor::Loader => "loader",
        }
    }

    /// May this actor write to read-only memory? Debuggers (breakpoints) and loaders (firmware images) may.
    #[inline]
    pub const fn writes_rom(self) -> bool {
        matches!(self, Actor::Debugger | Actor::Loader)
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::Vcpu(n) => write!(f, "vcpu{n}"),
            Actor::Dma(DeviceId(n)) => write!(f, "dma{n}"),
            Actor::Debugger | Actor::Loader => f.write_str(self.as_str()),
        }
    }
}

/// How an access came out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitKind {
    /// A port was read (IN, INS).
    PioIn,
    /// A port was written (OUT, OUTS).
    PioOut,
    /// Memory was read.
    MmioRead,
    /// Memory was written.
    MmioWrite,
    /// A device's own access.
    Dma,
    /// A debugger's access.
    Debug,
    /// A loader's access.
    Load,
}

impl ExitKind {
    /// The name in records: `pio.in`, `pio.out`, `mmio.read`, `mmio.write`, `dma`, `debug`, `load`.
    pub const fn as_str(self) -> &'static str {
        match self {
            ExitKind::PioIn => "pio.in",
            ExitKind::PioOut => "pio.out",
            ExitKind::MmioRead => "mmio.read",
            ExitKind::MmioWrite => "mmio.write",
            ExitKind::Dma => "dma",
            ExitKind::Debug => "debug",
            ExitKind::Load => "load",
        }
    }
}

impl fmt::Display for ExitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where an access comes from. Every access carries one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Who.
    pub actor: Actor,
    /// By what kind of exit.
    pub exit: ExitKind,
    /// The guest's instruction pointer; 0 when no instruction is behind the access.
    pub rip: u64,
    /// The element number within a string instruction, from 0.
    pub count: u32,
    /// The actor's running number of accesses.
    pub seq: u64,
}

impl Origin {
    /// The origin of a debugger's access.
    pub const DEBUGGER: Origin =
        Origin { actor: Actor::Debugger, exit: ExitKind::Debug, rip: 0, count: 0, seq: 0 };
    /// The origin of a loader's access.
    pub const LOADER: Origin =
        Origin { actor: Actor::Loader, exit: ExitKind::Load, rip: 0, count: 0, seq: 0 };

    /// The origin of a processor's access.
    pub const fn vcpu(index: u8, exit: ExitKind, rip: u64) -> Origin {
        Origin { actor: Actor::Vcpu(index), exit, rip, count: 0, seq: 0 }
    }

    /// The origin of a device's own access.
    pub const fn dma(device: DeviceId) -> Origin {
        Origin { actor: Actor::Dma(device), exit: ExitKind::Dma, rip: 0, count: 0, seq: 0 }
    }
}

/// Why a device, or the way to it, did not do what an access asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum IoError {
    /// The region answers here in general, but nothing is at this offset.
    #[error("nothing is at this offset")]
    NotHere,
    /// The region does not take accesses of this size.
    #[error("the access has a size that the region does not take")]
    BadSize,
    /// The region does not take unaligned accesses.
    #[error("the access is not aligned as the region wants it")]
    Unaligned,
    /// A write to what can only be read.
    #[error("it can only be read")]
    ReadOnly,
    /// A read of what can only be written.
    #[error("it can only be written")]
    WriteOnly,
    /// Understood, and refused: by an IOMMU, or because a device's own access may not go there.
    #[error("the access was refused")]
    Refused,
    /// The device tried and failed.
    #[error("the device failed")]
    Failed,
}

impl IoError {
    /// A short name for records: `not-here`, `bad-size`, `unaligned`, `read-only`, `write-only`, `refused`, `failed`.
    pub const fn as_str(self) -> &'static str {
        match self {
            IoError::NotHere => "not-here",
            IoError::BadSize => "bad-size",
            IoError::Unaligned => "unaligned",
            IoError::ReadOnly => "read-only",
            IoError::WriteOnly => "write-only",
            IoError::Refused => "refused",
            IoError::Failed => "failed",
        }
    }
}

/// What came of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Done.
    Ok,
    /// No region is there. Reads gave all ones, writes were dropped.
    Unassigned,
    /// A region is there and did not do it. The bytes of a read that failed are all ones, writes that failed were dropped.
    Failed(IoError),
}

impl Outcome {
    /// Was it done?
    #[inline]
    pub const fn is_ok(self) -> bool {
        matches!(self, Outcome::Ok)
    }

    /// A short name for records: `ok`, `unassigned`, or the error's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Unassigned => "unassigned",
            Outcome::Failed(error) => error.as_str(),
        }
    }

    /// The first of two outcomes that isn't `Ok`.
    #[inline]
    pub const fn and(self, later: Outcome) -> Outcome {
        match self {
            Outcome::Ok => later,
            first => first,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An access of any length that wasn't wholly done: its first failure. The rest of the access was still made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessError {
    /// The name of the address space.
    pub space: String,
    /// The address of the first byte that failed.
    pub addr: u64,
    /// Was it a write?
    pub is_write: bool,
    /// What came of it: never `Ok`.
    pub outcome: Outcome,
    /// The region that refused; none when the address is unassigned.
    pub region: Option<Region>,
}

impl fmt::Display for AccessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.is_write { "write to" } else { "read from" };
        write!(f, "{verb} address {:#x} ({}) of `{}`: ", self.addr, self.addr, self.space)?;
        match (&self.outcome, &self.region) {
            (Outcome::Failed(error), Some(region)) => write!(f, "region {}: {error}", region.path()),
            (Outcome::Failed(error), None) => error.fmt(f),
            _ => f.write_str("nothing is mapped there"),
        }
    }
}

impl std::error::Error for AccessError {}

/// A device's side of a region: what happens when it is read or written.
///
/// The dispatcher calls with an offset from the region's start, a size of 1, 2, 4 or 8 that [`Limits`] allow, and for writes
/// a value that has only the bits of that size. It may call from several threads at once, and holds no lock.
pub trait Io: Send + Sync {
    /// Which accesses the region takes and which the methods below implement. Asked when a view is made, so it must not change.
    fn limits(&self) -> &Limits {
        &Limits::DEFAULT
    }

    /// Reads `size` bytes at `offset`. Bits above the size are ignored. On an error the guest reads all ones.
    fn read(&self, offset: u64, size: u8, who: &Origin) -> Result<u64, IoError>;

    /// Writes the low `size` bytes of `value` at `offset`.
    fn write(&self, offset: u64, size: u8, value: u64, who: &Origin) -> Result<(), IoError>;
}

/// One dispatched access, as an [`Observer`] sees it.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// The name of the address space.
    pub space: &'a str,
    /// The address in that space.
    pub addr: u64,
    /// The size in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Was it a write?
    pub is_write: bool,
    /// What was read or written.
    pub value: u64,
    /// The region that was reached; for an unassigned address the root of the space.
    pub region: &'a Region,
    /// The offset in that region.
    pub region_offset: u64,
    /// How many calls of the device's handler were made. 0: none: nobody is there, the access was not valid, or an ioeventfd took it.
    pub parts: u8,
    /// What came of it.
    pub outcome: Outcome,
    /// Who made it.
    pub who: &'a Origin,
    /// What [`Observer::now`] said before the access was dispatched.
    pub started: u64,
}

/// Sees each access that was dispatched to a device, that reached nothing, or that was refused; not those that reached RAM.
pub trait Observer: Send + Sync {
    /// Called after the access, in the thread that made it.
    fn access(&self, access: &Access<'_>);

    /// A clock in nanoseconds, read before each access and handed back as [`Access::started`]; 0 without one.
    fn now(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_messages() {
        assert_eq!(ExitKind::PioOut.to_string(), "pio.out");
        assert_eq!(Actor::Vcpu(3).to_string(), "vcpu3");
        assert_eq!(Actor::Dma(DeviceId(7)).to_string(), "dma7");
        assert_eq!(Outcome::Failed(IoError::ReadOnly).to_string(), "read-only");
        assert_eq!(Outcome::Ok.and(Outcome::Unassigned), Outcome::Unassigned);
        assert_eq!(Outcome::Unassigned.and(Outcome::Failed(IoError::Failed)), Outcome::Unassigned);
        let mut error = AccessError {
            space: "memory".into(),
            addr: 0xc012,
            is_write: true,
            outcome: Outcome::Unassigned,
            region: None,
        };
        assert_eq!(error.to_string(), "write to address 0xc012 (49170) of `memory`: nothing is mapped there");
        error.region = Some(Region::container("bios", 1));
        error.outcome = Outcome::Failed(IoError::ReadOnly);
        error.is_write = false;
        assert_eq!(
            error.to_string(),
            "read from address 0xc012 (49170) of `memory`: region /bios: it can only be read"
        );
    }
}
