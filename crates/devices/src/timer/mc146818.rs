//! The real-time clock with its CMOS memory.
//!
//! Manual: Motorola MC146818A Real-Time Clock plus RAM, data sheet ADI-1027. The ports: Intel 82371SB (PIIX3), order number 290550, "Real time clock
//! registers". What a PC's firmware expects in the memory: the CMOS map of the IBM AT, and that of virtual PCs for what lies beyond.
//!
//! The clock is not stepped: the time is the guest's wall clock plus an offset that the guest sets; flags of the past are computed when somebody
//! looks. Only enabled interrupts cost a timer.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Ns, Register, Reset, SECOND};
use serde::{Deserialize, Serialize};

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "mc146818",
    title: "Motorola MC146818A real-time clock and CMOS memory",
    manual: "Motorola MC146818A data sheet (ADI-1027); ports: Intel 82371SB PIIX3 (290550)",
    modelled: "time, calendar and alarm in BCD and binary, 12 and 24 hours; SET and the divider's reset; UIP; periodic, alarm and update-ended \
        interrupts; 128 bytes of battery-backed memory with a century byte at 0x32.",
    not_modelled: "daylight saving (DSE is stored); the square wave; time bases other than 32768 Hz stop the clock; the NMI mask of port 70h is stored only.",
    deviations: "A time that does not exist (day 31 of a month with 30) is carried over when the clock starts, at once. Changing DM or 24/12 converts what is shown.",
    banks: &[&PORTS, &CMOS],
    outputs: &["irq8"],
    inputs: &[],
};

hyaline_device::registers! {
    /// Ports 70h and 71h.
    pub bank PORTS "ports" Port 2 {
        INDEX 0x0 1 wo = 0x00, "PIIX3, RTCI", "Index of the byte seen at port 71h; NMI mask" { INDEX 0..=6; NMI_OFF 7 };
        DATA  0x1 1 rw = 0x00, "PIIX3, RTCD", "The indexed byte";
    }
}

hyaline_device::registers! {
    /// The 128 bytes behind the index.
    pub bank CMOS "cmos" Indexed 128 {
        SECONDS       0x00 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Seconds";
        SECONDS_ALARM 0x01 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Seconds of the alarm; 0xc0 and above: any";
        MINUTES       0x02 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Minutes";
        MINUTES_ALARM 0x03 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Minutes of the alarm; 0xc0 and above: any";
        HOURS         0x04 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Hours; with 12 hours bit 7 is PM";
        HOURS_ALARM   0x05 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Hours of the alarm; 0xc0 and above: any";
        DAY_OF_WEEK   0x06 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Day of the week, Sunday is 1";
        DAY           0x07 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Day of the month";
        MONTH         0x08 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Month";
        YEAR          0x09 1 rw = 0x00, "MC146818A, time, calendar and alarm locations", "Year, two digits";
        REG_A         0x0a 1 rw = 0x26, "MC146818A, register A", "Rate, divider, update in progress" { RS 0..=3; DV 4..=6 {2 "32768 Hz", 6 "reset", 7 "reset"}; UIP 7 ro };
        REG_B         0x0b 1 rw = 0x02, "MC146818A, register B", "Modes and interrupt enables"
            { DSE 0; H24 1; DM 2; SQWE 3; UIE 4; AIE 5; PIE 6; SET 7 };
        REG_C         0x0c 1 rc = 0x00, "MC146818A, register C", "Interrupt flags" !effect { UF 4; AF 5; PF 6; IRQF 7 };
        REG_D         0x0d 1 ro = 0x80, "MC146818A, register D", "Valid RAM and time" { VRT 7 };
        DIAGNOSTIC    0x0e 1 rw = 0x00, "AT CMOS map", "Diagnostic status of the firmware";
        SHUTDOWN      0x0f 1 rw = 0x00, "AT CMOS map", "Why the processor was reset: what the firmware does next";
        FLOPPY        0x10 1 rw = 0x00, "AT CMOS map", "Types of the floppy drives" { SECOND 0..=3; FIRST 4..=7 };
        HARD_DISK     0x12 1 rw = 0x00, "AT CMOS map", "Types of the hard disks";
        EQUIPMENT     0x14 1 rw = 0x00, "AT CMOS map", "Equipment" { FLOPPY 0; FPU 1; MOUSE 2; DISPLAY 4..=5; FLOPPIES 6..=7 };
        BASE_LOW      0x15 1 rw = 0x00, "AT CMOS map", "Base memory in KiB, low byte";
        BASE_HIGH     0x16 1 rw = 0x00, "AT CMOS map", "Base memory in KiB, high byte";
        EXTENDED_LOW  0x17 1 rw = 0x00, "AT CMOS map", "Memory above 1 MiB in KiB, low byte";
        EXTENDED_HIGH 0x18 1 rw = 0x00, "AT CMOS map", "Memory above 1 MiB in KiB, high byte";
        MEASURED_LOW  0x30 1 rw = 0x00, "AT CMOS map", "Memory above 1 MiB in KiB as found, low byte";
        MEASURED_HIGH 0x31 1 rw = 0x00, "AT CMOS map", "Memory above 1 MiB in KiB as found, high byte";
        CENTURY       0x32 1 rw = 0x00, "AT CMOS map", "Century, two digits";
        ABOVE_16M_LOW 0x34 1 rw = 0x00, "CMOS map of virtual PCs", "Memory from 16 MiB to 4 GiB in 64 KiB, low byte";
        ABOVE_16M_HIGH 0x35 1 rw = 0x00, "CMOS map of virtual PCs", "Memory from 16 MiB to 4 GiB in 64 KiB, high byte";
        BOOT_THIRD    0x38 1 rw = 0x00, "CMOS map of virtual PCs", "Third boot device; floppy signature check off" { NO_CHECK 0; THIRD 4..=7 };
        BOOT_ORDER    0x3d 1 rw = 0x00, "CMOS map of virtual PCs", "First and second boot device" { FIRST 0..=3; SECOND 4..=7 };
        ABOVE_4G_LOW  0x5b 1 rw = 0x00, "CMOS map of virtual PCs", "Memory above 4 GiB in 64 KiB, low byte";
        ABOVE_4G_MID  0x5c 1 rw = 0x00, "CMOS map of virtual PCs", "Memory above 4 GiB in 64 KiB, middle byte";
        ABOVE_4G_HIGH 0x5d 1 rw = 0x00, "CMOS map of virtual PCs", "Memory above 4 GiB in 64 KiB, high byte";
        CPUS          0x5f 1 rw = 0x00, "CMOS map of virtual PCs", "Number of processors less one";
    }
}

/// Where firmware looks for a system to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootDevice {
    /// None.
    None = 0,
    /// Floppy disk.
    Floppy = 1,
    /// Hard disk.
    Disk = 2,
    /// CD-ROM.
    CdRom = 3,
    /// Network.
    Network = 4,
}

/// What the machine puts into the memory before power-on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Bytes of RAM below 4 GiB, from address 0.
    pub below_4g: u64,
    /// Bytes of RAM above 4 GiB.
    pub above_4g: u64,
    /// Number of processors.
    pub cpus: u8,
    /// Where to look for a system.
    pub boot: [BootDevice; 3],
    /// Types of the floppy drives: 0 none, 4 1.44 MB.
    pub floppies: [u8; 2],
    /// A PS/2 mouse is there.
    pub mouse: bool,
    /// Seconds that the clock is ahead of UTC.
    pub utc_offset: i64,
}

impl Default for Contents {
    /// One processor, 128 MiB, a mouse, UTC; disk, then CD-ROM.
    fn default() -> Self {
        Contents {
            below_4g: 128 << 20,
            above_4g: 0,
            cpus: 1,
            boot: [BootDevice::Disk, BootDevice::CdRom, BootDevice::None],
            floppies: [0; 2],
            mouse: true,
            utc_offset: 0,
        }
    }
}

impl Contents {
    /// Indices and bytes.
    fn bytes(&self) -> Vec<(u8, u8)> {
        let kib = (self.below_4g >> 10).saturating_sub(1024).min(0xffff);
        let above_16m = (self.below_4g >> 16).saturating_sub(256).min(0xffff);
        let above_4g = (self.above_4g >> 16).min(0xff_ffff);
        let base = (self.below_4g >> 10).min(640);
        let drives = self.floppies.iter().filter(|t| **t != 0).count() as u8;
        let equipment = 2 | u8::from(self.mouse) << 2 | if drives > 0 { 1 | (drives - 1) << 6 } else { 0 };
        vec![
            (0x10, self.floppies[0] << 4 | self.floppies[1] & 0xf),
            (0x14, equipment),
            (0x15, base as u8),
            (0x16, (base >> 8) as u8),
            (0x17, kib as u8),
            (0x18, (kib >> 8) as u8),
            (0x30, kib as u8),
            (0x31, (kib >> 8) as u8),
            (0x34, above_16m as u8),
            (0x35, (above_16m >> 8) as u8),
            (0x38, (self.boot[2] as u8) << 4),
            (0x3d, (self.boot[1] as u8) << 4 | self.boot[0] as u8),
            (0x5b, above_4g as u8),
            (0x5c, (above_4g >> 8) as u8),
            (0x5d, (above_4g >> 16) as u8),
            (0x5f, self.cpus.saturating_sub(1)),
        ]
    }
}

// Register B.
const SET: u8 = 1 << 7;
const UIE: u8 = 1 << 4;
const SQWE: u8 = 1 << 3;
const DM: u8 = 1 << 2;
const H24: u8 = 1 << 1;
// Register C; the enables of register B have the same places.
const PF: u8 = 1 << 6;
const AF: u8 = 1 << 5;
const UF: u8 = 1 << 4;
const FLAGS: u8 = PF | AF | UF;

/// The update cycle of 1984 µs and the 244 µs before it in which UIP already warns (data sheet, "Update cycle").
const UPDATE: Ns = (1984 + 244) * 1000;
const DAY_SECONDS: i64 = 86_400;

/// Days from 1970-01-01 to the first day of `month` (1-12) of `year` in the Gregorian calendar.
fn days_before(year: i64, month: i64) -> i64 {
    // Count years from March, so that the leap day comes last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 - 719_468
}

/// Year, month and day of a day number.
fn date(days: i64) -> (i64, i64, i64) {
    // Never later than the year itself.
    let guess = 1970 + days.div_euclid(if days < 0 { 365 } else { 366 });
    let mut year = guess.max(0);
    while days_before(year + 1, 1) <= days {
        // 366 days a year fall behind by at most a day in 1461: a few steps even for the year 9999.
        year += ((days - days_before(year + 1, 1)) / 366).max(1);
    }
    let mut month = 12;
    while month > 1 && days_before(year, month) > days {
        month -= 1;
    }
    (year, month, days - days_before(year, month) + 1)
}

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Index, and the NMI mask in bit 7.
    pub index: u8,
    /// All 128 bytes; those of the time hold only while it stands still.
    pub ram: Vec<u8>,
    /// Register A without UIP.
    pub a: u8,
    /// Register B.
    pub b: u8,
    /// Flags of register C that are known.
    pub flags: u8,
    /// Seconds that the clock is ahead of the wall clock.
    pub offset: i64,
    /// Nanoseconds that its second begins earlier than the wall clock's, less than a second.
    pub phase: u64,
    /// Days that the day of the week is ahead of the calendar's, 0 to 6.
    pub weekday: u8,
    /// Wall-clock time up to which the flags are known.
    pub seen: u64,
    /// Level of the interrupt line.
    pub irq: bool,
}

impl State {
    /// May a restored file hold this?
    ///
    /// # Errors
    /// A length or a number out of range.
    pub fn check(&self) -> Result<(), StateError> {
        ensure(self.ram.len() == 128, || {
            format!("MC146818: the memory has {} bytes instead of 128", self.ram.len())
        })?;
        ensure(self.a < 0x80 && self.flags & !FLAGS == 0 && self.phase < SECOND && self.weekday < 7, || {
            "MC146818: a register is out of range".to_string()
        })?;
        ensure(self.offset.unsigned_abs() < 1 << 40, || {
            format!("MC146818: the clock is {} s off", self.offset)
        })
    }

    fn byte(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0xff)
    }
    fn set_byte(&mut self, index: u8, v: u8) {
        if let Some(b) = self.ram.get_mut(usize::from(index)) {
            *b = v;
        }
    }

    /// Does the divider run?
    fn ticking(&self) -> bool {
        self.a & 0x70 == 0x20
    }
    /// Does the time stand still in its registers?
    fn frozen(&self) -> bool {
        self.b & SET != 0 || !self.ticking()
    }

    /// The clock's own time: whole seconds of the wall clock in its phase, and nanoseconds of the second.
    fn split(&self, wall: u64) -> (i64, u64) {
        let t = u128::from(wall) + u128::from(self.phase);
        ((t / u128::from(SECOND)) as i64, (t % u128::from(SECOND)) as u64)
    }
    /// Seconds since 1970-01-01 in the clock's calendar.
    fn seconds(&self, wall: u64) -> i64 {
        self.split(wall).0 + self.offset
    }

    fn encode(&self, v: i64) -> u8 {
        let v = v.rem_euclid(100) as u8;
        if self.b & DM != 0 { v } else { ((v / 10) << 4) | (v % 10) }
    }
    fn decode(&self, v: u8) -> i64 {
        i64::from(if self.b & DM != 0 { v } else { (v >> 4) * 10 + (v & 15) })
    }
    fn encode_hour(&self, h: i64) -> u8 {
        if self.b & H24 != 0 {
            return self.encode(h);
        }
        self.encode((h + 11) % 12 + 1) | if h >= 12 { 0x80 } else { 0 }
    }
    fn decode_hour(&self, v: u8) -> i64 {
        if self.b & H24 != 0 {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    /// One byte of the time. None: `index` is not one.
    fn time_byte(&self, index: u8, wall: u64) -> Option<u8> {
        let s = self
            .seconds(wall)
            .clamp(days_before(0, 1) * DAY_SECONDS, days_before(10_000, 1) * DAY_SECONDS - 1);
        let (days, in_day) = (s.div_euclid(DAY_SECONDS), s.rem_euclid(DAY_SECONDS));
        Some(match index {
            0x00 => self.encode(in_day % 60),
            0x02 => self.encode(in_day / 60 % 60),
            0x04 => self.encode_hour(in_day / 3600),
            // 1970-01-01 was a Thursday, day 5.
            0x06 => self.encode((days + 4 + i64::from(self.weekday)).rem_euclid(7) + 1),
            0x07 => self.encode(date(days).2),
            0x08 => self.encode(date(days).1),
            0x09 => self.encode(date(days).0 % 100),
            0x32 => self.encode(date(days).0 / 100),
            _ => return None,
        })
    }

    /// The time's bytes take what the clock shows now.
    fn stop(&mut self, wall: u64) {
        for i in TIME {
            if let Some(v) = self.time_byte(i, wall) {
                self.set_byte(i, v);
            }
        }
    }

    /// The clock goes on from its bytes.
    fn start(&mut self, wall: u64) {
        let year = self.decode(self.byte(0x32)).min(99) * 100 + self.decode(self.byte(9)).min(99);
        let month = self.decode(self.byte(8)).clamp(1, 12);
        let days = days_before(year, month) + self.decode(self.byte(7)) - 1;
        let (h, m) = (self.decode_hour(self.byte(4)), self.decode(self.byte(2)));
        let seconds = days * DAY_SECONDS + h * 3600 + m * 60 + self.decode(self.byte(0) & 0x7f);
        self.offset = seconds - self.split(wall).0;
        self.weekday = (self.decode(self.byte(6)) - 1 - (days + 4)).rem_euclid(7) as u8;
        self.seen = wall;
    }

    /// Periodic ticks up to `wall`; None if there are none (data sheet, table "Periodic interrupt rate").
    fn periods(&self, wall: u64) -> Option<u128> {
        let shift = self.period_shift()?;
        let t = u128::from(wall) + u128::from(self.phase);
        Some((t * 32_768 / u128::from(SECOND)) >> shift)
    }
    /// The period is `1 << shift` ticks of 32768 Hz. Rates 1 and 2 are those of 8 and 9.
    fn period_shift(&self) -> Option<u32> {
        let rs = u32::from(self.a & 15);
        (rs != 0 && self.ticking()).then(|| if rs <= 2 { rs + 6 } else { rs - 1 })
    }

    /// The next second of the clock's calendar after `after` at which the alarm matches.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let [s, m, h] = [1, 3, 5].map(|i| self.byte(i));
        let any = |v: u8| v >= 0xc0;
        let fits = |v: u8, want: i64, now: i64| any(v) || want == now;
        let (sw, mw, hw) = (self.decode(s), self.decode(m), self.decode_hour(h));
        let start = after + 1;
        let (day, second) = (start.div_euclid(DAY_SECONDS), start.rem_euclid(DAY_SECONDS));
        for d in 0..2 {
            let from = if d == 0 { second } else { 0 };
            for hour in (from / 3600..24).filter(|x| fits(h, hw, *x)) {
                let from = if hour == from / 3600 { from % 3600 } else { 0 };
                for minute in (from / 60..60).filter(|x| fits(m, mw, *x)) {
                    let from = if minute == from / 60 { from % 60 } else { 0 };
                    if let Some(sec) = (from..60).find(|x| fits(s, sw, *x)) {
                        return Some((day + d) * DAY_SECONDS + hour * 3600 + minute * 60 + sec);
                    }
                    if !any(s) && sw > 59 {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// Sets the flags of everything that happened up to `wall`.
    fn look(&mut self, wall: u64) {
        let then = std::mem::replace(&mut self.seen, wall);
        if wall <= then {
            return;
        }
        if self.periods(then) != self.periods(wall) {
            self.flags |= PF;
        }
        let (from, to) = (self.seconds(then), self.seconds(wall));
        if !self.frozen() && to > from {
            self.flags |= UF;
            if self.next_alarm(from).is_some_and(|at| at <= to) {
                self.flags |= AF;
            }
        }
    }

    /// When something happens next that would interrupt, as wall-clock time.
    fn next_event(&self, wall: u64) -> Option<u64> {
        let back = |t: u128| u64::try_from(t.saturating_sub(u128::from(self.phase))).unwrap_or(u64::MAX);
        let second = |s: i64| back(u128::from((s - self.offset).max(0) as u64) * u128::from(SECOND));
        let now = self.seconds(wall);
        let periodic = (self.b & PF != 0)
            .then(|| {
                let tick = (self.periods(wall)? + 1) << self.period_shift()?;
                Some(back((tick * u128::from(SECOND)).div_ceil(32_768)))
            })
            .flatten();
        let running = !self.frozen();
        let update = (running && self.b & UF != 0).then(|| second(now + 1));
        let alarm = (running && self.b & AF != 0).then(|| self.next_alarm(now).map(second)).flatten();
        [periodic, update, alarm].into_iter().flatten().min()
    }
}

/// Indices of the time's bytes.
const TIME: [u8; 8] = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32];

/// The real-time clock.
#[derive(Debug)]
pub struct Mc146818 {
    state: State,
}

impl Mc146818 {
    /// A clock whose battery never failed.
    pub fn new(contents: &Contents) -> Mc146818 {
        let mut rtc = Mc146818 {
            state: State {
                index: 0,
                ram: vec![0; 128],
                a: 0x26,
                b: H24,
                flags: 0,
                offset: contents.utc_offset,
                phase: 0,
                weekday: 0,
                seen: 0,
                irq: false,
            },
        };
        for (i, v) in contents.bytes() {
            rtc.set_cmos(i, v);
        }
        rtc
    }

    /// Puts a byte into the memory (0x0e to 0x7f, but not the century), as the machine's maker would.
    pub fn set_cmos(&mut self, index: u8, value: u8) {
        if (0x0e..0x80).contains(&index) && index != 0x32 {
            self.state.set_byte(index, value);
        }
    }

    /// A byte of the memory. None for registers and the time.
    pub fn cmos(&self, index: u8) -> Option<u8> {
        (0x0e..0x80).contains(&index).then(|| self.state.byte(index)).filter(|_| index != 0x32)
    }

    /// Brings the interrupt line to its level and sets the timer for what comes next. While the line is up nothing can raise it again.
    fn update(&mut self, cx: &mut Cx<'_>) {
        let s = &mut self.state;
        let level = s.flags & s.b & FLAGS != 0;
        if level != s.irq {
            s.irq = level;
            cx.line(0).set(level);
        }
        self.arm(cx);
    }

    fn arm(&self, cx: &mut Cx<'_>) {
        let wall = cx.wall_clock();
        match self.state.next_event(wall).filter(|_| !self.state.irq) {
            Some(t) => cx.at(0, cx.now().saturating_add(t.saturating_sub(wall))),
            None => cx.cancel(0),
        }
    }

    fn read_byte(&mut self, cx: &mut Cx<'_>) -> u8 {
        let wall = cx.wall_clock();
        let s = &mut self.state;
        match s.index & 0x7f {
            0x0a => {
                let uip = !s.frozen() && s.split(wall).1 >= SECOND - UPDATE;
                s.a | u8::from(uip) << 7
            }
            0x0b => s.b,
            0x0c => {
                s.look(wall);
                let c = s.flags | u8::from(s.flags & s.b & FLAGS != 0) << 7;
                s.flags = 0;
                self.update(cx);
                c
            }
            0x0d => 0x80,
            i if s.frozen() => s.byte(i),
            i => s.time_byte(i, wall).unwrap_or_else(|| s.byte(i)),
        }
    }

    fn write_byte(&mut self, v: u8, cx: &mut Cx<'_>) -> Result<(), IoError> {
        let wall = cx.wall_clock();
        let s = &mut self.state;
        s.look(wall);
        let was_frozen = s.frozen();
        match s.index & 0x7f {
            i @ (0x0a | 0x0b) => {
                if !was_frozen {
                    s.stop(wall);
                }
                if i == 0x0a {
                    let ticked = s.ticking();
                    s.a = v & 0x7f;
                    if !ticked && s.ticking() {
                        // "The first update cycle begins one-half second later" than the divider's release.
                        let sub = wall % SECOND;
                        s.phase = (SECOND / 2 + SECOND - sub) % SECOND;
                    }
                    if s.a & 0x60 == 0 {
                        cx.unimplemented(format_args!(
                            "MC146818: the time base of register A = {v:#04x}; the clock stands still"
                        ));
                    }
                } else {
                    // SET going high clears UIE (register B).
                    s.b = if v & SET != 0 && s.b & SET == 0 { v & !UIE } else { v };
                }
                if !s.frozen() {
                    // What the bytes mean may have changed with DM and 24/12; what they show now is what holds.
                    if was_frozen {
                        s.start(wall);
                    }
                }
            }
            0x0c | 0x0d => return Err(IoError::ReadOnly),
            i if TIME.contains(&i) && !was_frozen => {
                s.stop(wall);
                s.set_byte(i, v);
                s.start(wall);
            }
            i => s.set_byte(i, v),
        }
        self.update(cx);
        Ok(())
    }
}

impl Device for Mc146818 {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, _bank: usize) -> Limits {
        Limits::DEFAULT.implemented(1, 1)
    }

    fn read(&mut self, bank: usize, offset: u64, _size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        match (bank, offset) {
            (0, 0) => Err(IoError::WriteOnly),
            (0, 1) => Ok(u64::from(self.read_byte(cx))),
            _ => Err(IoError::NotHere),
        }
    }

    fn write(
        &mut self,
        bank: usize,
        offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        match (bank, offset) {
            (0, 0) => self.state.index = value as u8,
            (0, 1) => return self.write_byte(value as u8, cx),
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }

    fn register(&self, _bank: usize, offset: u64, _is_write: bool) -> Option<&'static Register> {
        match offset {
            0 => Some(&INDEX),
            1 => {
                let index = u64::from(self.state.index & 0x7f);
                CMOS.registers.iter().find(|r| r.offset == index).or(Some(&DATA))
            }
            _ => None,
        }
    }

    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        let s = &self.state;
        let value = match (bank, register.offset as u8) {
            (0, 0) => s.index,
            (0, _) => return None,
            (_, 0x0a) => s.a,
            (_, 0x0b) => s.b,
            (_, 0x0c) => s.flags | u8::from(s.irq) << 7,
            (_, 0x0d) => 0x80,
            // The time that goes on is not kept.
            (_, i) if TIME.contains(&i) && !s.frozen() => return None,
            (_, i) if matches!(i, 1 | 3 | 5) => s.byte(i),
            // The machine's maker put these in; the declaration promises nothing.
            (_, i) if i >= 0x0e => return None,
            (_, i) => s.byte(i),
        };
        Some(u64::from(value))
    }

    fn timer(&mut self, _timer: u32, cx: &mut Cx<'_>) {
        self.state.look(cx.wall_clock());
        self.update(cx);
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        // The battery holds time and memory; RESET# clears enables and flags (data sheet, "RESET").
        let wall = cx.wall_clock();
        let s = &mut self.state;
        s.b &= !(FLAGS | SQWE);
        s.flags = 0;
        s.seen = wall;
        s.irq = false;
        cx.line(0).set(false);
        self.arm(cx);
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.state)
    }

    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let state: State = from_value(state)?;
        state.check()?;
        self.state = state;
        self.arm(cx);
        Ok(())
    }

    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, ms};

    fn rtc() -> Mc146818 {
        Mc146818::new(&Contents::default())
    }

    hyaline_device::device_laws!(rtc());

    fn get(b: &mut Bench<Mc146818>, index: u8) -> u8 {
        b.out8(0, index);
        b.in8(1)
    }
    fn set(b: &mut Bench<Mc146818>, index: u8, v: u8) {
        b.out8(0, index);
        b.out8(1, v);
    }
    fn time(b: &mut Bench<Mc146818>) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|i| get(b, i))
    }

    #[test]
    fn calendar() {
        for (days, ymd) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (20_453, (2025, 12, 31)),
            (2_932_896, (9999, 12, 31)),
            (-719_528, (0, 1, 1)),
        ] {
            assert_eq!(date(days), ymd);
            assert_eq!(days_before(ymd.0, ymd.1) + ymd.2 - 1, days);
        }
    }

    #[test]
    fn time_in_all_formats() {
        let mut b = Bench::new(rtc());
        b.run(13 * 3600 * SECOND + 59 * SECOND);
        assert_eq!(
            time(&mut b),
            [0x20, 0x26, 0x01, 0x01, 0x05, 0x13, 0x00, 0x59],
            "2026-01-01 is a Thursday"
        );
        set(&mut b, 0x0b, DM);
        assert_eq!(time(&mut b), [20, 26, 1, 1, 5, 0x81, 0, 59], "binary, 12 hours, PM");
    }

    #[test]
    fn set_stops_and_starts() {
        let mut b = Bench::new(rtc());
        set(&mut b, 0x0b, SET | H24);
        for (i, v) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (6, 6), (4, 0x23), (2, 0x59), (0, 0x58)]
        {
            set(&mut b, i, v);
        }
        b.run(5 * SECOND);
        assert_eq!(get(&mut b, 0), 0x58);
        set(&mut b, 0x0b, H24);
        b.run(2 * SECOND);
        assert_eq!(time(&mut b), [0x20, 0x00, 0x01, 0x01, 0x07, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn divider_release_gives_half_a_second() {
        let mut b = Bench::new(rtc());
        b.run(ms(123));
        set(&mut b, 0x0a, 0x70);
        set(&mut b, 0x00, 0x30);
        b.run(ms(2345));
        assert_eq!(get(&mut b, 0), 0x30);
        set(&mut b, 0x0a, 0x26);
        b.run(ms(499));
        assert_eq!(get(&mut b, 0), 0x30);
        b.run(ms(1));
        assert_eq!(get(&mut b, 0), 0x31);
    }

    #[test]
    fn update_in_progress() {
        let mut b = Bench::new(rtc());
        b.run(SECOND - UPDATE - 1);
        assert_eq!(get(&mut b, 0x0a), 0x26);
        b.run(1);
        assert_eq!(get(&mut b, 0x0a), 0xa6);
        set(&mut b, 0x0b, SET | H24);
        assert_eq!(get(&mut b, 0x0a), 0x26);
    }

    #[test]
    fn flags_are_computed_without_timers() {
        let mut b = Bench::new(rtc());
        assert_eq!(b.next_timer(), None);
        b.run(ms(1));
        assert_eq!(get(&mut b, 0x0c), PF, "1024 Hz");
        assert_eq!(get(&mut b, 0x0c), 0);
        b.run(SECOND);
        assert_eq!(get(&mut b, 0x0c), PF | UF);
    }

    #[test]
    fn periodic_interrupt() {
        let mut b = Bench::new(rtc());
        set(&mut b, 0x0b, PF | H24);
        let mut n = 0;
        for _ in 0..1000 {
            b.run(ms(1));
            if b.level(0) {
                n += 1;
                assert_eq!(get(&mut b, 0x0c) & !UF, 0x80 | PF);
            }
        }
        assert!((990..=1000).contains(&n), "{n} interrupts: at most one per look");
        b.run(ms(10));
        b.rises(0);
        b.run(SECOND);
        assert_eq!(b.rises(0), 0, "the line stays up until register C is read");
        assert_eq!(b.next_timer(), None);
    }

    #[test]
    fn alarm_and_update_interrupts() {
        let mut b = Bench::new(rtc());
        for (i, v) in [(1, 0x05), (3, 0xff), (5, 0xc0)] {
            set(&mut b, i, v);
        }
        set(&mut b, 0x0b, AF | H24);
        b.run(5 * SECOND - 1);
        assert!(!b.level(0));
        b.run(1);
        assert!(b.level(0));
        assert_eq!(get(&mut b, 0x0c), 0x80 | AF | UF | PF);
        b.run(60 * SECOND);
        assert!(b.level(0), "every minute");
        set(&mut b, 0x0b, UF | H24);
        get(&mut b, 0x0c);
        b.run(SECOND);
        assert!(b.level(0));
        set(&mut b, 5, 0x99);
        set(&mut b, 0x0b, AF | H24);
        get(&mut b, 0x0c);
        assert_eq!(b.next_timer(), None, "an hour that never comes");
    }

    #[test]
    fn memory_survives_a_reset() {
        let mut b = Bench::new(Mc146818::new(&Contents {
            below_4g: 3 << 30,
            above_4g: 1 << 30,
            cpus: 4,
            ..Contents::default()
        }));
        assert_eq!(
            [0x15, 0x16, 0x17, 0x18, 0x34, 0x35].map(|i| get(&mut b, i)),
            [0x80, 0x02, 0xff, 0xff, 0x00, 0xbf]
        );
        assert_eq!([0x5b, 0x5c, 0x5d, 0x5f, 0x3d].map(|i| get(&mut b, i)), [0x00, 0x40, 0x00, 3, 0x32]);
        set(&mut b, 0x0f, 0x0a);
        set(&mut b, 0x0b, PF | H24);
        b.call(|d, cx| d.reset(Reset::System, cx));
        assert_eq!((get(&mut b, 0x0f), get(&mut b, 0x0b)), (0x0a, H24));
        assert_eq!(b.device.register(0, 1, false).map(|r| r.name), Some("REG_B"));
    }
}
