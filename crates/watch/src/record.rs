//! One access, as it is kept.

use hyaline_device::Register;
use hyaline_space::{Actor, ExitKind, Outcome};
use std::borrow::Cow;

/// Where an access arrived: a region and a register of it. Made once for each pair, and shared by all its records.
#[derive(Clone, Debug)]
pub struct Site {
    /// Its number, from 0 in the order of first use.
    pub id: u32,
    /// The name of the address space.
    pub space: String,
    /// The region's number in this process; see `hyaline_space::Region::id`.
    pub region: u64,
    /// The region's path when it was first reached.
    pub path: String,
    /// The region's name.
    pub name: String,
    /// The device or board it belongs to; empty without one.
    pub owner: String,
    /// The register, if a device's bank was reached.
    pub register: Option<&'static Register>,
}

impl Site {
    /// The short name of the region: `serial0.ports`, or the region's name when nobody owns it.
    pub fn label(&self) -> String {
        if self.owner.is_empty() || self.name.starts_with(&self.owner) {
            self.name.clone()
        } else {
            format!("{}.{}", self.owner, self.name)
        }
    }
    /// The name of the address space in lines: `io` for ports, `mem` for memory, else as it is.
    pub fn space_label(&self) -> &str {
        match self.space.as_str() {
            "I/O" | "io" | "ports" => "io",
            "memory" | "system" | "mem" => "mem",
            other => other,
        }
    }
    /// The register's name, or `-`.
    pub fn register_name(&self) -> &str {
        self.register.map_or("-", |r| r.name)
    }
}

/// One access. Plain and of fixed size; its words are in the [`Site`] of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessRecord {
    /// Running number over all processors, from 1.
    pub seq: u64,
    /// Virtual time in nanoseconds.
    pub time: u64,
    /// The guest's instruction pointer; 0 when no instruction is behind the access.
    pub rip: u64,
    /// The address.
    pub addr: u64,
    /// What was read or written.
    pub value: u64,
    /// The offset in the region.
    pub offset: u64,
    /// Nanoseconds of the host from dispatch to return; `u32::MAX` for anything longer.
    pub took: u32,
    /// Number of the [`Site`].
    pub site: u32,
    /// The element number within a string instruction, from 0. Of a bus master's access to memory: its bytes, at most 4 MiB less one.
    pub count: u32,
    /// Who.
    pub actor: Actor,
    /// By what kind of exit.
    pub exit: ExitKind,
    /// Bytes: 1, 2, 4 or 8. Of a bus master's access to memory: those that `value` holds.
    pub size: u8,
    /// Was it a write?
    pub is_write: bool,
    /// Calls of the device's handler: 0 when nobody was asked, more than 1 when the access was split.
    pub parts: u8,
    /// What came of it.
    pub outcome: Outcome,
}

/// Words that a record takes in a ring.
pub(crate) const WORDS: usize = 8;

const COUNT_MAX: u32 = (1 << 22) - 1;

fn actor_bits(actor: Actor) -> u64 {
    match actor {
        Actor::Vcpu(n) => u64::from(n),
        Actor::Dma(d) => 1 << 16 | u64::from(d.0),
        Actor::Debugger => 2 << 16,
        Actor::Loader => 3 << 16,
    }
}
fn actor_of(bits: u64) -> Actor {
    match bits >> 16 & 3 {
        0 => Actor::Vcpu(bits as u8),
        1 => Actor::Dma(hyaline_space::DeviceId(bits as u16)),
        2 => Actor::Debugger,
        _ => Actor::Loader,
    }
}

use hyaline_space::IoError;

const EXITS: [ExitKind; 7] = [
    ExitKind::PioIn,
    ExitKind::PioOut,
    ExitKind::MmioRead,
    ExitKind::MmioWrite,
    ExitKind::Dma,
    ExitKind::Debug,
    ExitKind::Load,
];
const OUTCOMES: [Outcome; 9] = [
    Outcome::Ok,
    Outcome::Unassigned,
    Outcome::Failed(IoError::NotHere),
    Outcome::Failed(IoError::BadSize),
    Outcome::Failed(IoError::Unaligned),
    Outcome::Failed(IoError::ReadOnly),
    Outcome::Failed(IoError::WriteOnly),
    Outcome::Failed(IoError::Refused),
    Outcome::Failed(IoError::Failed),
];

fn exit_bits(exit: ExitKind) -> u64 {
    match exit {
        ExitKind::PioIn => 0,
        ExitKind::PioOut => 1,
        ExitKind::MmioRead => 2,
        ExitKind::MmioWrite => 3,
        ExitKind::Dma => 4,
        ExitKind::Debug => 5,
        ExitKind::Load => 6,
    }
}
fn outcome_bits(outcome: Outcome) -> u64 {
    match outcome {
        Outcome::Ok => 0,
        Outcome::Unassigned => 1,
        Outcome::Failed(error) => match error {
            IoError::NotHere => 2,
            IoError::BadSize => 3,
            IoError::Unaligned => 4,
            IoError::ReadOnly => 5,
            IoError::WriteOnly => 6,
            IoError::Refused => 7,
            IoError::Failed => 8,
        },
    }
}

impl AccessRecord {
    /// The device that answered: its region's owner. The local APICs share a window, behind which each processor finds its own.
    pub fn device<'a>(&self, site: &'a Site) -> Cow<'a, str> {
        match self.actor {
            Actor::Vcpu(n) if site.owner == "lapic" => format!("lapic{n}").into(),
            _ => site.owner.as_str().into(),
        }
    }
    /// The record as words. The first is the running number.
    pub(crate) fn pack(&self) -> [u64; WORDS] {
        let small = actor_bits(self.actor)
            | exit_bits(self.exit) << 18
            | u64::from(self.size & 15) << 21
            | u64::from(self.is_write) << 25
            | u64::from(self.parts) << 26
            | outcome_bits(self.outcome) << 34
            | u64::from(self.count.min(COUNT_MAX)) << 38;
        let site = u64::from(self.took) | u64::from(self.site) << 32;
        [self.seq, self.time, self.rip, self.addr, self.value, self.offset, site, small]
    }
    pub(crate) fn unpack(w: [u64; WORDS]) -> AccessRecord {
        let small = w[7];
        AccessRecord {
            seq: w[0],
            time: w[1],
            rip: w[2],
            addr: w[3],
            value: w[4],
            offset: w[5],
            took: w[6] as u32,
            site: (w[6] >> 32) as u32,
            count: (small >> 38) as u32 & COUNT_MAX,
            actor: actor_of(small & 0x3_ffff),
            exit: EXITS.get((small >> 18 & 7) as usize).copied().unwrap_or(ExitKind::Debug),
            size: (small >> 21 & 15) as u8,
            is_write: small >> 25 & 1 != 0,
            parts: (small >> 26) as u8,
            outcome: OUTCOMES.get((small >> 34 & 15) as usize).copied().unwrap_or(Outcome::Unassigned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_space::DeviceId;

    #[test]
    fn every_field_survives_packing() {
        for actor in
            [Actor::Vcpu(0), Actor::Vcpu(255), Actor::Dma(DeviceId(0xffff)), Actor::Debugger, Actor::Loader]
        {
            for exit in EXITS {
                for outcome in OUTCOMES {
                    let r = AccessRecord {
                        seq: 7,
                        time: u64::MAX,
                        rip: 0xffff_ffff_8000_1234,
                        addr: 0xc012,
                        value: u64::MAX,
                        offset: 0x12,
                        took: u32::MAX,
                        site: 0xfff_ffff,
                        count: COUNT_MAX,
                        actor,
                        exit,
                        size: 8,
                        is_write: exit == ExitKind::PioOut,
                        parts: 255,
                        outcome,
                    };
                    assert_eq!(AccessRecord::unpack(r.pack()), r);
                }
            }
        }
    }

    #[test]
    fn a_record_is_small() {
        assert!(size_of::<AccessRecord>() <= 72, "{}", size_of::<AccessRecord>());
        assert_eq!(WORDS * 8, 64);
    }
}
