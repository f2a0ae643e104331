//! Laws that hold for every device, whatever it is.
//!
//! `device_laws!(Chip::new(..))` in a device's test module makes a test of each:
//! no access sequence makes it panic; a saved and restored device goes on as the first would have; reset is idempotent; a read
//! that is not declared to have a side effect changes nothing; one access does bounded work.

use crate::bench::Bench;
use crate::device::{Device, Reset};
use crate::registers::Place;

/// Effects that one access may queue at most.
pub const MAX_EFFECTS: usize = 4096;

/// A small deterministic generator: the laws give the same sequence every time.
pub struct Dice(u64);

impl Dice {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    /// 64 bits (Marsaglia's xorshift64*).
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `n`; 0 for `n` = 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.bits() % n }
    }
}

/// One random step: mostly accesses at declared registers, with values that their fields suggest.
pub fn step<D: Device>(bench: &mut Bench<D>, dice: &mut Dice) {
    let banks = bench.device.chip().banks;
    let inputs = bench.device.chip().inputs.len() as u64;
    match dice.below(20) {
        0 => {
            let ns = 1 << dice.below(24);
            bench.run(ns);
        }
        1 if inputs > 0 => {
            let (pin, level) = (dice.below(inputs) as u32, dice.below(2) == 1);
            bench.input(pin, level);
        }
        2 => {
            let data: Vec<u8> = (0..dice.below(80)).map(|_| dice.bits() as u8).collect();
            let channel = dice.below(2) as u32;
            let taken = bench.receive(channel, &data);
            assert!(taken <= data.len(), "took more bytes than were offered");
        }
        3 => {
            bench.call(|d, cx| d.acknowledge(cx));
        }
        _ => {
            let bank = dice.below(banks.len() as u64) as usize;
            let Some(b) = banks.get(bank).filter(|b| b.place != Place::Indexed) else { return };
            let register = b.registers.get(dice.below(b.registers.len() as u64 + 2) as usize);
            let size = 1u8 << dice.below(4);
            let past = dice.below(8) / 7 * dice.below(4);
            let anywhere = dice.below(b.size);
            let offset = register.map_or(anywhere, |r| r.offset + past);
            let offset = if offset + u64::from(size) > b.size {
                b.size.saturating_sub(u64::from(size))
            } else {
                offset
            };
            let limits = bench.device.limits(bank);
            let size = size.clamp(limits.impl_.min, limits.impl_.max);
            let offset =
                if limits.impl_.unaligned { offset } else { offset / u64::from(size) * u64::from(size) };
            if dice.below(2) == 0 {
                let _ = bench.try_read(bank, offset, size);
            } else {
                let value = match (dice.below(4), register) {
                    (0, Some(r)) if !r.fields.is_empty() => {
                        r.fields[dice.below(r.fields.len() as u64) as usize].mask()
                    }
                    (1, _) => dice.bits() & dice.bits() & dice.bits(),
                    (2, _) => [0, 1, 0x7f, 0x80, 0xff, 0xffff, u64::MAX][dice.below(7) as usize],
                    _ => dice.bits(),
                };
                let value = if size < 8 { value & ((1 << (size * 8)) - 1) } else { value };
                let _ = bench.try_write(bank, offset, size, value);
            }
        }
    }
    assert!(bench.last.len() <= MAX_EFFECTS, "one access queued {} effects", bench.last.len());
}

/// No panic and bounded effects on any access sequence.
pub fn survives_anything<D: Device>(make: impl Fn() -> D) {
    for seed in 1..=40 {
        let (mut bench, mut dice) = (Bench::new(make()), Dice::new(seed));
        for _ in 0..1_500 {
            step(&mut bench, &mut dice);
        }
    }
}

/// A restored device goes on exactly as the saved one.
pub fn save_restore_goes_on<D: Device>(make: impl Fn() -> D) {
    for seed in 1..=20 {
        let (mut a, mut dice) = (Bench::new(make()), Dice::new(seed));
        for _ in 0..dice.below(300) {
            step(&mut a, &mut dice);
        }
        let saved = a.device.save().unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut b = Bench::new(make());
        a.copy_world_to(&mut b);
        let loaded = b.call(|d, cx| d.load(&saved, cx));
        loaded.unwrap_or_else(|e| panic!("seed {seed}: the chip refuses its own state: {e}"));
        assert_eq!(a.seen(), b.seen(), "seed {seed}: right after the restore");
        // A step may call nothing at all: what the restore itself queued is not its effect.
        a.last.clear();
        b.last.clear();
        let (mut dice_a, mut dice_b) = (Dice::new(seed + 1000), Dice::new(seed + 1000));
        for i in 0..300 {
            step(&mut a, &mut dice_a);
            step(&mut b, &mut dice_b);
            assert_eq!(a.last, b.last, "seed {seed}, step {i}: other effects");
        }
        assert_eq!(a.seen(), b.seen(), "seed {seed}: after 300 more steps");
    }
}

/// A second reset changes nothing.
pub fn reset_is_idempotent<D: Device>(make: impl Fn() -> D) {
    for seed in 1..=20 {
        let (mut bench, mut dice) = (Bench::new(make()), Dice::new(seed));
        for _ in 0..200 {
            step(&mut bench, &mut dice);
        }
        bench.call(|d, cx| d.reset(Reset::System, cx));
        let once = bench.seen();
        bench.call(|d, cx| d.reset(Reset::System, cx));
        assert_eq!(once, bench.seen(), "seed {seed}");
    }
}

/// Reading a register that is not marked as having a side effect changes no state and causes nothing.
pub fn quiet_reads_are_quiet<D: Device>(make: impl Fn() -> D) {
    for seed in 1..=20 {
        let (mut bench, mut dice) = (Bench::new(make()), Dice::new(seed));
        for _ in 0..150 {
            step(&mut bench, &mut dice);
            for bank in 0..bench.device.chip().banks.len() {
                let b = bench.device.chip().banks[bank];
                if b.place == Place::Indexed || b.registers.is_empty() {
                    continue;
                }
                let offset = b.registers[dice.below(b.registers.len() as u64) as usize].offset;
                let Some(r) =
                    bench.device.register(bank, offset, false).filter(|r| !r.effect && r.kind.readable())
                else {
                    continue;
                };
                let limits = bench.device.limits(bank);
                let size = r.width.clamp(limits.impl_.min, limits.impl_.max);
                if r.offset != offset || offset % u64::from(size) != 0 {
                    continue;
                }
                let before = bench.seen();
                let _ = bench.try_read(bank, offset, size);
                let quiet = bench.last.iter().all(|e| {
                    matches!(
                        e,
                        crate::Effect::Note(_)
                            | crate::Effect::GuestError(_)
                            | crate::Effect::Unimplemented(_)
                    )
                });
                assert!(quiet, "seed {seed}: reading {} did {:?}", r.name, bench.last);
                assert_eq!(before, bench.seen(), "seed {seed}: reading {} changed the state", r.name);
            }
        }
    }
}

/// Reset gives every register the value that its declaration promises (where the chip can tell it).
pub fn reset_values_hold<D: Device>(make: impl Fn() -> D) {
    let bench = Bench::new(make());
    for (i, bank) in bench.device.chip().banks.iter().enumerate() {
        for r in bank.registers {
            // Bits without a stored value (status that follows inputs) are not promised.
            if let Some(v) = bench.peek(i, r) {
                let stored = r.write_mask() & r.mask_of(crate::Kind::Rw);
                assert_eq!(v & stored, r.reset & stored, "{} of bank {} after reset", r.name, bank.name);
            }
        }
    }
}

/// Makes one test of each law for a device. The argument is an expression that makes a new device.
#[macro_export]
macro_rules! device_laws {
    ($make:expr) => {
        mod laws {
            #[allow(unused_imports)]
            use super::*;
            #[test]
            fn survives_anything() {
                $crate::laws::survives_anything(|| $make);
            }
            #[test]
            fn save_restore_goes_on() {
                $crate::laws::save_restore_goes_on(|| $make);
            }
            #[test]
            fn reset_is_idempotent() {
                $crate::laws::reset_is_idempotent(|| $make);
            }
            #[test]
            fn quiet_reads_are_quiet() {
                $crate::laws::quiet_reads_are_quiet(|| $make);
            }
            #[test]
            fn reset_values_hold() {
                $crate::laws::reset_values_hold(|| $make);
            }
        }
    };
}
