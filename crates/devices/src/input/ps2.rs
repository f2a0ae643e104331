//! A PS/2 keyboard and a PS/2 mouse: pure state machines that the controller talks to byte by byte.
//!
//! Source: IBM Personal System/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-key)" and "Mouse";
//! Microsoft, "Keyboard Scan Code Specification" 1.3a and the IntelliMouse protocol.

use hyaline_device::{Ns, ms};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};

/// Acknowledge.
pub const ACK: u8 = 0xfa;
/// Resend: the byte was not understood.
pub const RESEND: u8 = 0xfe;
/// Basic assurance test passed.
pub const PASSED: u8 = 0xaa;
/// Bytes that a keyboard buffers.
pub const BUFFER: usize = 16;

/// What the controller makes of set 2 bytes below 80h when it translates (scan code set 1).
pub const TRANSLATE: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, //
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, //
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, //
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, //
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, //
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, //
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, //
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// A set 2 byte in set 1; the two codes above 7Fh are F7 and Alt+SysRq.
pub const fn translate(byte: u8) -> u8 {
    match byte {
        0x83 => 0x41,
        0x84 => 0x54,
        b if b < 0x80 => TRANSLATE[b as usize],
        b => b,
    }
}

/// Set 2 codes by set 1 code; 0: no key.
const SET2: [u8; 128] = {
    let mut inverse = [0; 128];
    let mut i = 1;
    while i < 128 {
        inverse[TRANSLATE[i] as usize] = i as u8;
        i += 1;
    }
    inverse[0x41] = 0x83;
    inverse[0x54] = 0x84;
    inverse
};

/// Set 3 codes by set 1 code, in pairs; the second list is for keys with the E0 prefix.
#[rustfmt::skip]
const SET3: &[(u8, u8)] = &[
    (0x01, 0x08), (0x02, 0x16), (0x03, 0x1e), (0x04, 0x26), (0x05, 0x25), (0x06, 0x2e), (0x07, 0x36), (0x08, 0x3d),
    (0x09, 0x3e), (0x0a, 0x46), (0x0b, 0x45), (0x0c, 0x4e), (0x0d, 0x55), (0x0e, 0x66), (0x0f, 0x0d), (0x10, 0x15),
    (0x11, 0x1d), (0x12, 0x24), (0x13, 0x2d), (0x14, 0x2c), (0x15, 0x35), (0x16, 0x3c), (0x17, 0x43), (0x18, 0x44),
    (0x19, 0x4d), (0x1a, 0x54), (0x1b, 0x5b), (0x1c, 0x5a), (0x1d, 0x11), (0x1e, 0x1c), (0x1f, 0x1b), (0x20, 0x23),
    (0x21, 0x2b), (0x22, 0x34), (0x23, 0x33), (0x24, 0x3b), (0x25, 0x42), (0x26, 0x4b), (0x27, 0x4c), (0x28, 0x52),
    (0x29, 0x0e), (0x2a, 0x12), (0x2b, 0x5c), (0x2c, 0x1a), (0x2d, 0x22), (0x2e, 0x21), (0x2f, 0x2a), (0x30, 0x32),
    (0x31, 0x31), (0x32, 0x3a), (0x33, 0x41), (0x34, 0x49), (0x35, 0x4a), (0x36, 0x59), (0x37, 0x7e), (0x38, 0x19),
    (0x39, 0x29), (0x3a, 0x14), (0x3b, 0x07), (0x3c, 0x0f), (0x3d, 0x17), (0x3e, 0x1f), (0x3f, 0x27), (0x40, 0x2f),
    (0x41, 0x37), (0x42, 0x3f), (0x43, 0x47), (0x44, 0x4f), (0x45, 0x76), (0x46, 0x5f), (0x47, 0x6c), (0x48, 0x75),
    (0x49, 0x7d), (0x4a, 0x84), (0x4b, 0x6b), (0x4c, 0x73), (0x4d, 0x74), (0x4e, 0x7c), (0x4f, 0x69), (0x50, 0x72),
    (0x51, 0x7a), (0x52, 0x70), (0x53, 0x71), (0x54, 0x57), (0x56, 0x13), (0x57, 0x56), (0x58, 0x5e),
];
#[rustfmt::skip]
const SET3_E0: &[(u8, u8)] = &[
    (0x1c, 0x79), (0x1d, 0x58), (0x35, 0x77), (0x37, 0x57), (0x38, 0x39), (0x46, 0x62), (0x47, 0x6e), (0x48, 0x63),
    (0x49, 0x6f), (0x4b, 0x61), (0x4d, 0x6a), (0x4f, 0x65), (0x50, 0x60), (0x51, 0x6d), (0x52, 0x67), (0x53, 0x64),
    (0x5b, 0x8b), (0x5c, 0x8c), (0x5d, 0x8d),
];

/// The Pause key: it has a code of its own in every set.
const PAUSE: u8 = 0xff;
const PRINT: u8 = 0xb7;

fn set3(key: u8) -> Option<u8> {
    if key == PAUSE {
        return Some(0x62);
    }
    let table = if key & 0x80 != 0 { SET3_E0 } else { SET3 };
    table.iter().find(|(k, _)| *k == key & 0x7f).map(|(_, c)| *c)
}

/// Set 3 keys that send no break code by default, and those that don't repeat (IBM, "Scan code set 3" defaults: function
/// and control keys of the right side are make-only, shift keys make and break).
fn set3_make_only() -> BTreeSet<u8> {
    let function = [0x07, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x47, 0x4f, 0x56, 0x5e];
    let others = [0x08, 0x57, 0x5f, 0x62, 0x67, 0x6e, 0x65, 0x6f, 0x6d, 0x76, 0x77, 0x7e, 0x79, 0x39, 0x58];
    let pad = [0x69, 0x6b, 0x6c, 0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x7a, 0x7d, 0x84];
    function.into_iter().chain(others).chain(pad).collect()
}
fn set3_make_break() -> BTreeSet<u8> {
    [0x11, 0x12, 0x14, 0x19, 0x59].into()
}

/// What waits to be sent: answers go before events.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    answers: VecDeque<u8>,
    events: VecDeque<u8>,
    last: u8,
}

impl Queue {
    fn answer(&mut self, bytes: &[u8]) {
        // A host that never listens gets no more than it could have read.
        if self.answers.len() + bytes.len() <= 2 * BUFFER {
            self.answers.extend(bytes);
        }
    }
    /// Takes the next byte.
    pub fn pop(&mut self) -> Option<u8> {
        let byte = self.answers.pop_front().or_else(|| self.events.pop_front())?;
        self.last = byte;
        Some(byte)
    }
    /// Is nothing waiting?
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty() && self.events.is_empty()
    }
    pub(super) fn sane(&self) -> bool {
        self.answers.len() <= 2 * BUFFER && self.events.len() <= 2 * BUFFER
    }
}

/// The keyboard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keyboard {
    /// Bytes for the controller.
    pub queue: Queue,
    pub(super) scanning: bool,
    pub(super) set: u8,
    /// Lamps: bit 0 Scroll Lock, 1 Num Lock, 2 Caps Lock.
    pub leds: u8,
    pub(super) typematic: u8,
    /// Command that waits for a parameter.
    pending: u8,
    /// Set 3 keys without a break code, and without repetition.
    no_break: BTreeSet<u8>,
    no_repeat: BTreeSet<u8>,
    /// Keys held down: set 1 code, plus 80h with the E0 prefix.
    down: BTreeSet<u8>,
    /// Prefix bytes from the host's side: E0, or E1 and what follows it.
    prefix: Vec<u8>,
    /// The key that repeats, and when it does next.
    pub(super) repeat: Option<(u8, Ns)>,
}

impl Default for Keyboard {
    fn default() -> Keyboard {
        let mut k = Keyboard {
            queue: Queue::default(),
            scanning: true,
            set: 2,
            leds: 0,
            typematic: 0x2b,
            pending: 0,
            no_break: BTreeSet::new(),
            no_repeat: BTreeSet::new(),
            down: BTreeSet::new(),
            prefix: Vec::new(),
            repeat: None,
        };
        k.defaults();
        k
    }
}

impl Keyboard {
    pub(super) fn sane(&self) -> bool {
        self.queue.sane()
            && (1..=3).contains(&self.set)
            && self.prefix.len() <= 2
            && self.typematic < 0x80
            && self.leds < 8
    }
    fn defaults(&mut self) {
        self.set = 2;
        self.typematic = 0x2b;
        self.no_break = set3_make_only();
        // Typematic keys of set 3 send no break code either; only shift keys do.
        self.no_break
            .extend(SET3.iter().chain(SET3_E0).map(|(_, c)| *c).filter(|c| !set3_make_break().contains(c)));
        self.no_repeat = set3_make_only();
        self.no_repeat.extend(set3_make_break());
        self.pending = 0;
        self.repeat = None;
        self.queue.events.clear();
    }
    /// All codes of set 3, for the commands that set every key's type.
    fn all_keys() -> BTreeSet<u8> {
        SET3.iter().chain(SET3_E0).map(|(_, c)| *c).chain([0x62]).collect()
    }
    /// Time before the first repetition, and between repetitions.
    pub(super) fn pace(&self) -> (Ns, Ns) {
        let t = u64::from(self.typematic);
        let period = (8 + (t & 7)) * (1 << (t >> 3 & 3)) * 4_170_000;
        (ms(250) * ((t >> 5 & 3) + 1), period)
    }

    /// A byte from the controller.
    pub fn command(&mut self, byte: u8) {
        let pending = std::mem::take(&mut self.pending);
        match (pending, byte) {
            (0xed, 0..=0x7f) => {
                self.leds = byte & 7;
                self.queue.answer(&[ACK]);
                return;
            }
            (0xf0, 0) => {
                self.queue.answer(&[ACK, self.set]);
                return;
            }
            (0xf0, 1..=3) => {
                self.set = byte;
                self.queue.events.clear();
                self.queue.answer(&[ACK]);
                return;
            }
            (0xf3, 0..=0x7f) => {
                self.typematic = byte;
                self.queue.answer(&[ACK]);
                return;
            }
            // Keys are named until another command comes.
            (0xfb..=0xfd, 1..=0xdf) => {
                self.set_type(pending, byte);
                self.pending = pending;
                self.queue.answer(&[ACK]);
                return;
            }
            (0xed | 0xf0 | 0xf3, 0..=0xec) => {
                self.queue.answer(&[RESEND]);
                self.pending = pending;
                return;
            }
            _ => {}
        }
        match byte {
            0xed | 0xf0 | 0xf3 => {
                self.pending = byte;
                self.queue.answer(&[ACK]);
            }
            0xee => self.queue.answer(&[0xee]),
            0xf2 => self.queue.answer(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.queue.events.clear();
                self.scanning = true;
                self.queue.answer(&[ACK]);
            }
            0xf5 | 0xf6 => {
                self.defaults();
                self.scanning = byte == 0xf6;
                self.queue.answer(&[ACK]);
            }
            0xf7..=0xfa => {
                let all = Self::all_keys();
                // F7 typematic, F8 make and break, F9 make only, FA typematic with break.
                self.no_break = if matches!(byte, 0xf7 | 0xf9) { all.clone() } else { BTreeSet::new() };
                self.no_repeat = if matches!(byte, 0xf8 | 0xf9) { all } else { BTreeSet::new() };
                self.queue.events.clear();
                self.queue.answer(&[ACK]);
            }
            0xfb..=0xfd => {
                self.scanning = false;
                self.pending = byte;
                self.queue.events.clear();
                self.queue.answer(&[ACK]);
            }
            0xfe => {
                let last = self.queue.last;
                self.queue.answer(&[last]);
            }
            0xff => {
                let held = std::mem::take(&mut self.down);
                let prefix = std::mem::take(&mut self.prefix);
                *self = Keyboard { down: held, prefix, ..Keyboard::default() };
                self.queue.answer(&[ACK, PASSED]);
            }
            _ => self.queue.answer(&[RESEND]),
        }
    }

    fn set_type(&mut self, command: u8, code: u8) {
        let mut mark = |set: fn(&mut Keyboard) -> &mut BTreeSet<u8>, on: bool| {
            if on {
                set(self).insert(code)
            } else {
                set(self).remove(&code)
            };
        };
        mark(|k| &mut k.no_break, command != 0xfc);
        mark(|k| &mut k.no_repeat, command != 0xfb);
    }

    /// Is there room for one more key?
    pub fn has_room(&self) -> bool {
        self.queue.events.len() + 8 <= BUFFER
    }

    /// A byte of scan code set 1 from the host's side. `now` starts repetition.
    pub fn host(&mut self, byte: u8, now: Ns) {
        let key = match (self.prefix.as_slice(), byte) {
            ([], 0xe0 | 0xe1) | ([0xe1], _) => {
                self.prefix.push(byte);
                return;
            }
            ([0xe1, ..], _) => PAUSE & 0x7f | byte & 0x80,
            // Shift codes that old keyboards put around grey keys are no keys.
            ([0xe0], 0x2a | 0xaa | 0x36 | 0xb6) => {
                self.prefix.clear();
                return;
            }
            _ => byte,
        };
        let extended = if self.prefix.is_empty() { 0 } else { 0x80 };
        self.prefix.clear();
        let (id, make) = (key & 0x7f | extended, key & 0x80 == 0);
        let changed = if make { self.down.insert(id) } else { self.down.remove(&id) };
        if !changed || !self.scanning {
            return;
        }
        self.emit(id, make);
        let repeats = match self.set {
            3 => set3(id).is_some_and(|c| !self.no_repeat.contains(&c)),
            _ => id != PAUSE,
        };
        if make && repeats {
            self.repeat = Some((id, now + self.pace().0));
        } else if make || self.repeat.is_some_and(|(k, _)| k == id) {
            self.repeat = None;
        }
    }

    /// The repetition that was due at `now`.
    pub(super) fn again(&mut self, now: Ns) {
        if let Some((key, _)) = self.repeat.take().filter(|(k, _)| self.down.contains(k) && self.scanning) {
            if self.has_room() {
                self.emit(key, true);
            }
            self.repeat = Some((key, now + self.pace().1));
        }
    }

    fn emit(&mut self, key: u8, make: bool) {
        let code = key & 0x7f;
        let mut bytes: Vec<u8> = Vec::with_capacity(8);
        match (self.set, key, make) {
            (1, PAUSE, true) => bytes.extend([0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]),
            (2, PAUSE, true) => bytes.extend([0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]),
            (1 | 2, PAUSE, false) => {}
            (1, PRINT, true) => bytes.extend([0xe0, 0x2a, 0xe0, 0x37]),
            (1, PRINT, false) => bytes.extend([0xe0, 0xb7, 0xe0, 0xaa]),
            (2, PRINT, true) => bytes.extend([0xe0, 0x12, 0xe0, 0x7c]),
            (2, PRINT, false) => bytes.extend([0xe0, 0xf0, 0x7c, 0xe0, 0xf0, 0x12]),
            (1 | 2, ..) => {
                let two = SET2[usize::from(code)];
                if two == 0 {
                    return;
                }
                if key & 0x80 != 0 {
                    bytes.push(0xe0);
                }
                if self.set == 1 {
                    bytes.push(code | u8::from(!make) << 7);
                } else if make {
                    bytes.push(two);
                } else {
                    bytes.extend([0xf0, two]);
                }
            }
            _ => match set3(key) {
                Some(c) if make => bytes.push(c),
                Some(c) if !self.no_break.contains(&c) => bytes.extend([0xf0, c]),
                _ => {}
            },
        }
        if self.queue.events.len() + bytes.len() <= BUFFER {
            self.queue.events.extend(bytes);
        }
    }
}

/// The mouse.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mouse {
    /// Bytes for the controller.
    pub queue: Queue,
    /// Reports movement by itself (command F4h).
    enabled: bool,
    remote: bool,
    wrap: bool,
    /// 2:1 scaling.
    scaled: bool,
    resolution: u8,
    rate: u8,
    /// The three latest rates: certain sequences switch protocols.
    rates: [u8; 3],
    /// 0 standard, 3 IntelliMouse with a wheel, 4 with five buttons.
    pub(super) id: u8,
    pending: u8,
    buttons: u8,
    reported: u8,
    moved: [i32; 3],
}

impl Default for Mouse {
    fn default() -> Mouse {
        Mouse {
            queue: Queue::default(),
            enabled: false,
            remote: false,
            wrap: false,
            scaled: false,
            resolution: 2,
            rate: 100,
            rates: [0; 3],
            id: 0,
            pending: 0,
            buttons: 0,
            reported: 0,
            moved: [0; 3],
        }
    }
}

/// Movement that is remembered at most, in counts.
const FAR: i32 = 4096;

impl Mouse {
    pub(super) fn sane(&self) -> bool {
        self.queue.sane()
            && matches!(self.id, 0 | 3 | 4)
            && self.resolution < 4
            && self.buttons < 32
            && self.moved.iter().all(|m| m.abs() <= FAR)
    }
    fn defaults(&mut self) {
        let d = Mouse::default();
        (self.enabled, self.remote, self.scaled) = (false, false, false);
        (self.resolution, self.rate, self.moved) = (d.resolution, d.rate, d.moved);
        self.queue.events.clear();
    }

    /// A byte from the controller.
    pub fn command(&mut self, byte: u8) {
        if self.wrap && !matches!(byte, 0xec | 0xff) {
            self.queue.answer(&[byte]);
            return;
        }
        match std::mem::take(&mut self.pending) {
            0xe8 if byte < 4 => {
                self.resolution = byte;
                return self.queue.answer(&[ACK]);
            }
            0xf3 if matches!(byte, 10 | 20 | 40 | 60 | 80 | 100 | 200) => {
                self.rate = byte;
                self.rates = [self.rates[1], self.rates[2], byte];
                match self.rates {
                    [200, 100, 80] => self.id = 3,
                    [200, 200, 80] => self.id = 4,
                    _ => {}
                }
                return self.queue.answer(&[ACK]);
            }
            0xe8 | 0xf3 if byte < 0xe6 => return self.queue.answer(&[RESEND]),
            _ => {}
        }
        match byte {
            0xe6 | 0xe7 => self.scaled = byte == 0xe7,
            0xe8 | 0xf3 => self.pending = byte,
            0xe9 => {
                let flags =
                    u8::from(self.remote) << 6 | u8::from(self.enabled) << 5 | u8::from(self.scaled) << 4;
                let b = self.buttons;
                // Here left is bit 2 and right bit 0.
                let buttons = (b & 1) << 2 | b >> 1 & 1 | b >> 2 << 1 & 2;
                return self.queue.answer(&[ACK, flags | buttons, self.resolution, self.rate]);
            }
            0xea => self.remote = false,
            0xeb => {
                self.queue.answer(&[ACK]);
                let packet = self.packet();
                return self.queue.answer(&packet);
            }
            0xec | 0xee => self.wrap = byte == 0xee,
            0xf0 => self.remote = true,
            0xf2 => return self.queue.answer(&[ACK, self.id]),
            0xf4 => self.enabled = true,
            0xf5 => self.enabled = false,
            0xf6 => self.defaults(),
            0xfe => {
                let last = self.queue.last;
                return self.queue.answer(&[last]);
            }
            0xff => {
                *self = Mouse { buttons: self.buttons, ..Mouse::default() };
                return self.queue.answer(&[ACK, PASSED, 0x00]);
            }
            _ => return self.queue.answer(&[RESEND]),
        }
        if matches!(byte, 0xea | 0xf0 | 0xf4 | 0xf5 | 0xec) {
            self.queue.events.clear();
            self.moved = [0; 3];
        }
        self.queue.answer(&[ACK]);
    }

    /// A report from the host's side: buttons (bit 0 left, 1 right, 2 middle, 3 and 4 the side buttons), counts to the
    /// right, up, and of the wheel towards the user.
    pub fn host(&mut self, buttons: u8, dx: i8, dy: i8, dz: i8) {
        self.buttons = buttons & 0x1f;
        for (m, d) in self.moved.iter_mut().zip([dx, dy, dz]) {
            *m = (*m + i32::from(d)).clamp(-FAR, FAR);
        }
    }

    /// In stream mode: makes a packet if there is something to tell and the last one is gone.
    pub fn stream(&mut self) {
        let news = self.moved != [0; 3] || self.buttons != self.reported;
        if self.enabled && !self.remote && !self.wrap && news && self.queue.is_empty() {
            let packet = self.packet();
            self.queue.events.extend(packet);
        }
    }

    fn packet(&mut self) -> Vec<u8> {
        let mut take = |axis: usize, limit: i32| {
            let n = self.moved[axis].clamp(-limit, limit - 1);
            self.moved[axis] -= n;
            n
        };
        let (mut dx, mut dy) = (take(0, 256), take(1, 256));
        let dz = match self.id {
            3 => take(2, 128),
            4 => take(2, 8),
            _ => {
                self.moved[2] = 0;
                0
            }
        };
        if self.scaled && !self.remote {
            (dx, dy) = (double(dx), double(dy));
        }
        self.reported = self.buttons;
        let signs = u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        let overflow = u8::from(!(-256..256).contains(&dx)) << 6 | u8::from(!(-256..256).contains(&dy)) << 7;
        let mut packet = vec![self.buttons & 7 | 8 | signs | overflow, dx as u8, dy as u8];
        match self.id {
            3 => packet.push(dz as u8),
            4 => packet.push(dz as u8 & 0x0f | self.buttons >> 3 << 4),
            _ => {}
        }
        packet
    }
}

/// 2:1 scaling: small movements by a table, larger ones doubled.
fn double(n: i32) -> i32 {
    let m = match n.abs() {
        0 => 0,
        1 | 2 => 1,
        3 => 3,
        4 => 6,
        5 => 9,
        more => more * 2,
    };
    m * n.signum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(q: &mut Queue) -> Vec<u8> {
        std::iter::from_fn(|| q.pop()).collect()
    }
    fn tell(k: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|b| k.command(*b));
        drain(&mut k.queue)
    }
    fn press(k: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|b| k.host(*b, 0));
        drain(&mut k.queue)
    }

    #[test]
    fn the_translation_is_one_to_one() {
        let mut seen = BTreeSet::new();
        assert!(TRANSLATE.iter().all(|t| seen.insert(*t)));
        for (code, two) in SET2.iter().enumerate().take(0x59).skip(1) {
            assert_eq!(translate(*two), code as u8, "set 1 code {code:#x}");
        }
    }

    #[test]
    fn one_key_in_three_sets() {
        let mut k = Keyboard::default();
        assert_eq!(press(&mut k, &[0x1e, 0x9e]), [0x1c, 0xf0, 0x1c]);
        assert_eq!(press(&mut k, &[0xe0, 0x48, 0xe0, 0xc8]), [0xe0, 0x75, 0xe0, 0xf0, 0x75]);
        assert_eq!(
            press(&mut k, &[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]),
            [0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]
        );
        assert_eq!(
            press(&mut k, &[0xe0, 0x37, 0xe0, 0xb7]),
            [0xe0, 0x12, 0xe0, 0x7c, 0xe0, 0xf0, 0x7c, 0xe0, 0xf0, 0x12]
        );
        assert_eq!(press(&mut k, &[0x41]), [0x83], "F7");
        assert_eq!(tell(&mut k, &[0xf0, 1]), [ACK, ACK]);
        assert_eq!(press(&mut k, &[0x1e, 0x9e, 0xe0, 0x48]), [0x1e, 0x9e, 0xe0, 0x48]);
        assert_eq!(tell(&mut k, &[0xf0, 3, 0xf0, 0]), [ACK, ACK, ACK, ACK, 3]);
        assert_eq!(
            press(&mut k, &[0x1e, 0x9e, 0x2a, 0xaa]),
            [0x1c, 0x12, 0xf0, 0x12],
            "letters have no break code by default"
        );
        tell(&mut k, &[0xf8]);
        assert_eq!(press(&mut k, &[0x1e, 0x9e]), [0x1c, 0xf0, 0x1c]);
        tell(&mut k, &[0xfd, 0x1c, 0xf4]);
        assert_eq!(press(&mut k, &[0x1e, 0x9e]), [0x1c]);
    }

    #[test]
    fn keyboard_commands() {
        let mut k = Keyboard::default();
        assert_eq!(tell(&mut k, &[0xff]), [ACK, PASSED]);
        assert_eq!(tell(&mut k, &[0xf2]), [ACK, 0xab, 0x83]);
        assert_eq!(tell(&mut k, &[0xee]), [0xee]);
        assert_eq!(tell(&mut k, &[0xfe]), [0xee], "resend gives what was sent last");
        assert_eq!(tell(&mut k, &[0xed, 0x05]), [ACK, ACK]);
        assert_eq!(k.leds, 5);
        assert_eq!(tell(&mut k, &[0xf0, 9]), [ACK, RESEND]);
        assert_eq!(tell(&mut k, &[0xf4, 0x12]), [ACK, RESEND]);
        tell(&mut k, &[0xf5]);
        assert_eq!(press(&mut k, &[0x1e, 0x9e]), [], "scanning is off");
    }

    #[test]
    fn typematic_times() {
        let mut k = Keyboard::default();
        let (delay, period) = k.pace();
        assert_eq!(
            (delay / ms(1), period / ms(1)),
            (500, 91),
            "10.9 characters a second after half a second"
        );
        k.host(0x1e, 0);
        assert_eq!(k.repeat, Some((0x1e, ms(500))));
        k.again(ms(500));
        assert_eq!(drain(&mut k.queue), [0x1c, 0x1c]);
        k.host(0x9e, 0);
        assert_eq!(k.repeat, None);
    }

    #[test]
    fn mouse_becomes_an_intellimouse() {
        let mut m = Mouse::default();
        let tell = |m: &mut Mouse, bytes: &[u8]| {
            bytes.iter().for_each(|b| m.command(*b));
            drain(&mut m.queue)
        };
        assert_eq!(tell(&mut m, &[0xff]), [ACK, PASSED, 0]);
        assert_eq!(tell(&mut m, &[0xf2]), [ACK, 0]);
        tell(&mut m, &[0xf3, 200, 0xf3, 100, 0xf3, 80]);
        assert_eq!(tell(&mut m, &[0xf2]), [ACK, 3]);
        m.host(1, 5, -3, 1);
        m.stream();
        assert_eq!(drain(&mut m.queue), [], "not enabled");
        tell(&mut m, &[0xf4]);
        m.host(1, 5, -3, 1);
        m.stream();
        assert_eq!(drain(&mut m.queue), [0x29, 5, 0xfd, 1]);
        assert_eq!(tell(&mut m, &[0xe9]), [ACK, 0x24, 2, 80]);
        tell(&mut m, &[0xf3, 200, 0xf3, 200, 0xf3, 80]);
        m.host(0x10, 0, 0, -1);
        m.stream();
        assert_eq!(drain(&mut m.queue), [0x08, 0, 0, 0x2f]);
        assert_eq!(tell(&mut m, &[0xee, 0x55, 0xec]), [ACK, 0x55, ACK], "wrap mode");
    }

    #[test]
    fn mouse_scaling_and_long_ways() {
        let mut m = Mouse::default();
        m.command(0xf4);
        m.command(0xe7);
        drain(&mut m.queue);
        m.host(0, 4, 1, 0);
        m.stream();
        assert_eq!(drain(&mut m.queue), [0x08, 6, 1]);
        m.command(0xe6);
        drain(&mut m.queue);
        (0..3).for_each(|_| m.host(0, 127, 0, 0));
        m.stream();
        assert_eq!(drain(&mut m.queue), [0x08, 255, 0]);
        m.stream();
        assert_eq!(drain(&mut m.queue), [0x08, 126, 0]);
        m.stream();
        assert_eq!(drain(&mut m.queue), []);
    }
}
