//! Intel 8042 as the PS/2 keyboard and mouse controller of a PC, ports 60h and 64h.

use super::ps2::{Keyboard, Mouse, translate};
use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Ns, Register, Request, Reset, registers, us};
use serde::{Deserialize, Serialize};

registers! {
    /// Ports 60h and 64h; the ones between belong to others.
    pub bank PORTS "ports" Port 5 {
        DATA 0x0 1 rw = 0x00, "Keyboard and auxiliary device controller: input and output buffer",
            "Read: the output buffer, a byte from the keyboard, the mouse or the controller. Write: to the keyboard, or a command's parameter" !effect { BYTE 0..=7 wo };
        STATUS 0x4 1 ro = 0x10, "Status register", "Status" when "read" {
            OBF 0; IBF 1; SYS 2; COMMAND 3; UNLOCKED 4; AUX 5; TIMEOUT 6; PARITY 7 };
        COMMAND 0x4 1 wo = 0x00, "Commands", "A command for the controller" when "write" {
            CODE 0..=7 { 0x20 "read command byte", 0x60 "write command byte", 0xa7 "disable mouse", 0xa8 "enable mouse", 0xa9 "test mouse port",
                0xaa "self-test", 0xab "test keyboard port", 0xad "disable keyboard", 0xae "enable keyboard", 0xc0 "read input port",
                0xd0 "read output port", 0xd1 "write output port", 0xd2 "write keyboard buffer", 0xd3 "write mouse buffer",
                0xd4 "write to mouse", 0xdd "A20 off", 0xdf "A20 on", 0xe0 "read test inputs", 0xfe "pulse reset" } };
    }
}
registers! {
    /// The controller's memory, reached by commands 20h to 3Fh and 60h to 7Fh.
    pub bank RAM "ram" Indexed 32 {
        COMMAND_BYTE 0x0 1 rw = 0x00, "Commands 20h, 60h", "Controller command byte" {
            KIE 0; MIE 1; SYSF 2; NOLOCK 3; KDIS 4; MDIS 5; XLATE 6; ZERO 7 };
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "i8042",
    title: "Intel 8042 keyboard and mouse controller with a PS/2 keyboard and mouse",
    manual: "IBM Personal System/2 Hardware Interface Technical Reference, \"Keyboard and Auxiliary Device Controller\" (1990)",
    modelled: "All commands of the PS/2 controller, the translation of scan codes, output port with A20 and reset, interrupts 1 and 12; \
               a 101-key keyboard with scan code sets 1 to 3, lamps, typematic repetition; a mouse with wheel and five buttons.",
    not_modelled: "The diagnostic dump (ACh) and vendors' commands: reported, no answer. The password is never installed.",
    deviations: "A byte follows the last one read after 300 microseconds (a real line takes about 800). The keyboard never overruns: the \
                 host's side is told to wait. The mouse keeps its sample rate and tells it, but sends as fast as it is read.",
    banks: &[&PORTS, &RAM],
    outputs: &["irq1", "irq12"],
    inputs: &[],
};

/// From reading a byte to the next one of a device.
pub const BYTE_TIME: Ns = us(300);
/// Channel of key codes from the host's side: scan code set 1, with E0 and E1 prefixes, each press followed by its release.
pub const KEYS: u32 = 0;
/// Channel of mouse reports from the host's side: four bytes each, buttons and signed counts to the right, up, and of the
/// wheel towards the user.
pub const MOUSE: u32 = 1;

const NEXT: u32 = 0;
const REPEAT: u32 = 1;

const KIE: u8 = 0x01;
const MIE: u8 = 0x02;
const SYS: u8 = 0x04;
const KDIS: u8 = 0x10;
const MDIS: u8 = 0x20;
const XLATE: u8 = 0x40;

/// Who put a byte into the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Port {
    Keyboard,
    Mouse,
}

/// The controller's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Memory; the command byte is at 0.
    ram: Vec<u8>,
    /// Output buffer: what a read of port 60h gives, and whether it is full and by whom.
    output: u8,
    full: Option<Port>,
    /// The controller's own answer waits for the output buffer.
    answer: Option<(u8, Port)>,
    /// Command that waits for its parameter.
    pending: Option<u8>,
    /// The last write went to port 64h.
    last_command: bool,
    /// Bits 4 to 7 of the status, as commands C1h and C2h left them.
    polled: Option<u8>,
    a20: bool,
    /// The translation saw F0h: the next code is a release.
    release: bool,
    /// Nothing is taken from a device before this time.
    next_at: Option<Ns>,
    repeat_at: Option<Ns>,
    irq: [bool; 2],
    /// Host channels that were told to wait.
    waiting: [bool; 2],
    keyboard: Keyboard,
    mouse: Mouse,
}

impl Default for State {
    fn default() -> State {
        State {
            ram: vec![0; 32],
            output: 0,
            full: None,
            answer: None,
            pending: None,
            last_command: false,
            polled: None,
            a20: true,
            release: false,
            next_at: None,
            repeat_at: None,
            irq: [false; 2],
            waiting: [false; 2],
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
        }
    }
}

impl State {
    fn check(&self) -> Result<(), StateError> {
        ensure(self.ram.len() == 32, || {
            format!("the controller's memory has {} bytes instead of 32", self.ram.len())
        })?;
        ensure(self.keyboard.sane(), || "the keyboard's state is not one it can have".into())?;
        ensure(self.mouse.sane(), || "the mouse's state is not one it can have".into())
    }
    fn command_byte(&self) -> u8 {
        self.ram.first().copied().unwrap_or(0)
    }
    fn set_command_byte(&mut self, value: u8) {
        if let Some(b) = self.ram.first_mut() {
            *b = value & 0x7f;
        }
    }
    fn status(&self) -> u8 {
        let full = u8::from(self.full.is_some()) | u8::from(self.full == Some(Port::Mouse)) << 5;
        let low = full & 1 | self.command_byte() & SYS | u8::from(self.last_command) << 3;
        low | self.polled.unwrap_or(0x10 | full & 0x20)
    }
    fn output_port(&self) -> u8 {
        let mouse = u8::from(self.full == Some(Port::Mouse));
        let keyboard = u8::from(self.full == Some(Port::Keyboard));
        0xcd | u8::from(self.a20) << 1 | keyboard << 4 | mouse << 5
    }
}

/// The controller with its two devices.
#[derive(Debug, Default)]
pub struct I8042 {
    s: State,
}

impl I8042 {
    /// A controller as after power-on: no interrupts, no translation, both ports on.
    pub fn new() -> I8042 {
        I8042::default()
    }
    /// Sets it up as firmware leaves it, for guests that are started without firmware: keyboard interrupt and translation
    /// on, mouse off.
    pub fn firmware_done(&mut self) {
        self.s.set_command_byte(KIE | SYS | MDIS | XLATE);
    }
    /// The keyboard's lamps: bit 0 Scroll Lock, 1 Num Lock, 2 Caps Lock.
    pub fn leds(&self) -> u8 {
        self.s.keyboard.leds
    }

    fn update(&mut self, cx: &mut Cx<'_>) {
        let c = self.s.command_byte();
        let levels = [
            self.s.full == Some(Port::Keyboard) && c & KIE != 0,
            self.s.full == Some(Port::Mouse) && c & MIE != 0,
        ];
        for (pin, level) in levels.into_iter().enumerate() {
            if self.s.irq[pin] != level {
                self.s.irq[pin] = level;
                cx.line(pin as u32).set(level);
            }
        }
    }
    fn arm(&mut self, timer: u32, at: Option<Ns>, cx: &mut Cx<'_>) {
        let slot = if timer == NEXT { &mut self.s.next_at } else { &mut self.s.repeat_at };
        if *slot != at {
            *slot = at;
            match at {
                Some(at) => cx.at(timer, at),
                None => cx.cancel(timer),
            }
        }
    }
    fn fill(&mut self, byte: u8, port: Port) {
        self.s.output = byte;
        self.s.full = Some(port);
    }
    /// The controller's own answer: as soon as the output buffer is free.
    fn answer(&mut self, byte: u8, port: Port) {
        self.s.answer = Some((byte, port));
    }

    /// Moves the next byte into the output buffer if it is free, and drives the lines.
    fn pump(&mut self, cx: &mut Cx<'_>) {
        if self.s.full.is_none() {
            if let Some((byte, port)) = self.s.answer.take() {
                self.fill(byte, port);
            } else if self.s.next_at.is_none() {
                self.poll_devices();
            }
        }
        let repeat = self.s.keyboard.repeat.map(|(_, at)| at);
        self.arm(REPEAT, repeat, cx);
        if self.s.waiting[0] && self.s.keyboard.has_room() {
            self.s.waiting[0] = false;
            cx.ready(KEYS);
        }
        self.update(cx);
    }
    fn poll_devices(&mut self) {
        let c = self.s.command_byte();
        if c & KDIS == 0 {
            while let Some(byte) = self.s.keyboard.queue.pop() {
                if c & XLATE == 0 {
                    return self.fill(byte, Port::Keyboard);
                }
                if byte == 0xf0 {
                    self.s.release = true;
                    continue;
                }
                let release = std::mem::take(&mut self.s.release);
                return self.fill(translate(byte) | u8::from(release) << 7, Port::Keyboard);
            }
        }
        if c & MDIS == 0 {
            self.s.mouse.stream();
            if let Some(byte) = self.s.mouse.queue.pop() {
                self.fill(byte, Port::Mouse);
            }
        }
    }

    fn command(&mut self, command: u8, cx: &mut Cx<'_>) {
        self.s.pending = None;
        self.s.polled = None;
        let c = self.s.command_byte();
        match command {
            0x20..=0x3f => {
                let byte = self.s.ram.get(usize::from(command & 0x1f)).copied().unwrap_or(0);
                self.answer(byte, Port::Keyboard);
            }
            0x60..=0x7f | 0xa5 | 0xd1..=0xd4 => self.s.pending = Some(command),
            0xa4 => self.answer(0xf1, Port::Keyboard), // No password is installed.
            0xa6 => {}
            0xa7 => self.s.set_command_byte(c | MDIS),
            0xa8 => self.s.set_command_byte(c & !MDIS),
            0xa9 | 0xab => self.answer(0x00, Port::Keyboard),
            0xaa => {
                self.s.set_command_byte(c | SYS);
                self.answer(0x55, Port::Keyboard);
            }
            0xad => self.s.set_command_byte(c | KDIS),
            0xae => self.s.set_command_byte(c & !KDIS),
            // Input port: keyboard not locked, both data lines at rest.
            0xc0 => self.answer(0x83, Port::Keyboard),
            0xc1 => self.s.polled = Some(0x30),
            0xc2 => self.s.polled = Some(0x80),
            0xd0 => {
                let value = self.s.output_port();
                self.answer(value, Port::Keyboard);
            }
            0xdd | 0xdf => self.set_a20(command == 0xdf, cx),
            0xe0 => self.answer(u8::from(c & KDIS == 0) | u8::from(c & MDIS == 0) << 1, Port::Keyboard),
            0xf0..=0xff => {
                // Bits 0 to 3 that are zero are pulsed low; bit 0 is the processor's reset.
                if command & 1 == 0 {
                    cx.request(Request::Reset("keyboard controller, command FEh"));
                }
            }
            _ => cx.unimplemented(format_args!(
                "keyboard controller command {command:#04x} is not known; it is ignored"
            )),
        }
    }
    fn set_a20(&mut self, on: bool, cx: &mut Cx<'_>) {
        self.s.a20 = on;
        cx.request(Request::A20(on));
    }
    fn data(&mut self, value: u8, cx: &mut Cx<'_>) {
        let c = self.s.command_byte();
        match self.s.pending.take() {
            Some(0x60) => self.s.set_command_byte(value),
            Some(n @ 0x61..=0x7f) => {
                if let Some(cell) = self.s.ram.get_mut(usize::from(n & 0x1f)) {
                    *cell = value;
                }
            }
            // A password ends with a zero.
            Some(0xa5) if value != 0 => self.s.pending = Some(0xa5),
            Some(0xa5) => {}
            Some(0xd1) => {
                self.set_a20(value & 2 != 0, cx);
                if value & 1 == 0 {
                    cx.request(Request::Reset("keyboard controller, output port bit 0"));
                }
            }
            Some(0xd2) => self.answer(value, Port::Keyboard),
            Some(0xd3) => self.answer(value, Port::Mouse),
            Some(0xd4) => {
                // Talking to a device lets its clock run.
                self.s.set_command_byte(c & !MDIS);
                self.s.mouse.command(value);
            }
            _ => {
                self.s.set_command_byte(c & !KDIS);
                self.s.keyboard.command(value);
            }
        }
    }
}

impl Device for I8042 {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        Limits::sizes(1, 1)
    }
    fn peek(&self, _bank: usize, register: &Register) -> Option<u64> {
        Some(u64::from(match register.name {
            "DATA" => self.s.output,
            "STATUS" => self.s.status(),
            "COMMAND_BYTE" => self.s.command_byte(),
            _ => return None,
        }))
    }
    fn read(&mut self, bank: usize, offset: u64, _size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        match (bank, offset) {
            (0, 0) => {
                let byte = self.s.output;
                if self.s.full.take().is_some() {
                    self.update(cx);
                    let at = cx.now() + BYTE_TIME;
                    self.arm(NEXT, Some(at), cx);
                    self.pump(cx);
                }
                Ok(u64::from(byte))
            }
            (0, 4) => Ok(u64::from(self.s.status())),
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
            (0, 0) => {
                self.s.last_command = false;
                self.data(value as u8, cx);
            }
            (0, 4) => {
                self.s.last_command = true;
                self.command(value as u8, cx);
            }
            _ => return Err(IoError::NotHere),
        }
        self.pump(cx);
        Ok(())
    }
    fn timer(&mut self, timer: u32, cx: &mut Cx<'_>) {
        if timer == NEXT {
            self.s.next_at = None;
        } else {
            self.s.repeat_at = None;
            let now = cx.now();
            self.s.keyboard.again(now);
        }
        self.pump(cx);
    }
    fn receive(&mut self, channel: u32, data: &[u8], cx: &mut Cx<'_>) -> usize {
        let now = cx.now();
        let mut taken = 0;
        match channel {
            KEYS => {
                while let Some(byte) = data.get(taken).filter(|_| self.s.keyboard.has_room()) {
                    self.s.keyboard.host(*byte, now);
                    taken += 1;
                }
                self.s.waiting[0] = taken < data.len();
            }
            MOUSE => {
                for report in data.chunks_exact(4) {
                    if let [buttons, dx, dy, dz] = *report {
                        self.s.mouse.host(buttons, dx as i8, dy as i8, dz as i8);
                        taken += 4;
                    }
                }
            }
            _ => {}
        }
        self.pump(cx);
        taken
    }
    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        let waiting = self.s.waiting;
        self.s = State { waiting, ..State::default() };
        cx.cancel(NEXT);
        cx.cancel(REPEAT);
        cx.line(0).set(false);
        cx.line(1).set(false);
        cx.request(Request::A20(true));
        self.pump(cx);
    }
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        s.check()?;
        self.s = s;
        for (timer, at) in [(NEXT, self.s.next_at), (REPEAT, self.s.repeat_at)] {
            if let Some(at) = at {
                cx.at(timer, at);
            }
        }
        Ok(())
    }
    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws, ms};

    device_laws!(I8042::new());

    fn bench() -> Bench<I8042> {
        let mut b = Bench::new(I8042::new());
        // As an operating system does: self-test, then both interrupts, translation.
        b.out8(4, 0xaa);
        assert_eq!((b.in8(4) & 5, b.in8(0)), (5, 0x55));
        b.out8(4, 0x60);
        b.out8(0, 0x47);
        b.run(BYTE_TIME);
        b
    }
    fn all(b: &mut Bench<I8042>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..64 {
            b.run(BYTE_TIME);
            if b.in8(4) & 1 == 0 {
                break;
            }
            bytes.push(b.in8(0));
        }
        bytes
    }

    #[test]
    fn controller_answers() {
        let mut b = bench();
        for (command, answer) in
            [(0x20, 0x47), (0xa9, 0), (0xab, 0), (0xa4, 0xf1), (0xd0, 0xcf), (0xc0, 0x83), (0xe0, 3)]
        {
            b.out8(4, command);
            assert_eq!(all(&mut b), [answer], "command {command:#x}");
        }
        b.out8(4, 0x7f);
        b.out8(0, 0x5a);
        b.out8(4, 0x3f);
        assert_eq!(all(&mut b), [0x5a]);
        b.out8(4, 0xd3);
        b.out8(0, 0x99);
        assert_eq!(b.in8(4) & 0x21, 0x21, "marked as from the mouse");
        assert!(b.level(1));
        assert_eq!(b.in8(0), 0x99);
        b.out8(4, 0xca);
        assert_eq!(b.complaints.len(), 1);
    }

    #[test]
    fn keys_are_translated_and_interrupt_once_a_byte() {
        let mut b = bench();
        b.rises(0);
        b.receive(KEYS, &[0x1e, 0x9e]);
        assert!(b.level(0));
        assert_eq!(b.in8(0), 0x1e);
        assert_eq!((b.level(0), b.in8(4) & 1, b.in8(0)), (false, 0, 0x1e), "the old byte stays readable");
        b.run(BYTE_TIME);
        assert_eq!(b.in8(0), 0x9e);
        assert_eq!(b.rises(0), 2);
        b.out8(4, 0x60);
        b.out8(0, 0x01);
        b.receive(KEYS, &[0xe0, 0x4b, 0xe0, 0xcb]);
        assert_eq!(all(&mut b), [0xe0, 0x6b, 0xe0, 0xf0, 0x6b], "set 2 without translation");
    }

    #[test]
    fn keyboard_and_mouse_answer_through_the_controller() {
        let mut b = bench();
        b.out8(0, 0xf2);
        assert_eq!(all(&mut b), [0xfa, 0xab, 0x41], "the identification is translated too");
        b.out8(0, 0xed);
        b.out8(0, 0x02);
        assert_eq!(all(&mut b), [0xfa, 0xfa]);
        assert_eq!(b.device.leds(), 2);
        b.out8(4, 0xd4);
        b.out8(0, 0xff);
        assert_eq!(all(&mut b), [0xfa, 0xaa, 0x00]);
        b.out8(4, 0xd4);
        b.out8(0, 0xf4);
        assert_eq!(all(&mut b), [0xfa]);
        b.rises(1);
        assert_eq!(b.receive(MOUSE, &[1, 2, 3, 0, 9]), 4);
        assert_eq!(all(&mut b), [0x09, 2, 3]);
        assert_eq!(b.rises(1), 3);
        b.out8(4, 0xa7);
        b.receive(MOUSE, &[0, 0, 0, 0]);
        assert_eq!(all(&mut b), [], "the port is off");
        b.out8(4, 0xa8);
        assert_eq!(all(&mut b), [0x08, 0, 0]);
    }

    #[test]
    fn a_held_key_repeats() {
        let mut b = bench();
        b.receive(KEYS, &[0x1e]);
        assert_eq!(all(&mut b), [0x1e]);
        b.run(ms(500));
        assert_eq!(all(&mut b), [0x1e]);
        b.run(ms(92));
        assert_eq!(all(&mut b), [0x1e]);
        b.receive(KEYS, &[0x9e]);
        assert_eq!(all(&mut b), [0x9e]);
        b.run(ms(1000));
        assert_eq!(all(&mut b), []);
    }

    #[test]
    fn a20_and_reset() {
        let mut b = bench();
        b.requests.clear();
        b.out8(4, 0xd1);
        b.out8(0, 0xdd);
        b.out8(4, 0xdf);
        assert_eq!(b.requests, [Request::A20(false), Request::A20(true)]);
        b.out8(4, 0xfe);
        assert!(matches!(b.requests.last(), Some(Request::Reset(_))));
    }

    #[test]
    fn a_full_keyboard_makes_the_host_wait() {
        let mut b = bench();
        let keys: Vec<u8> = (0x10..0x1a).flat_map(|k| [k, k | 0x80]).collect();
        let mut offered = keys.as_slice();
        let mut read = Vec::new();
        while !offered.is_empty() {
            let n = b.receive(KEYS, offered);
            offered = &offered[n..];
            read.extend(all(&mut b));
        }
        assert_eq!(read, keys, "nothing got lost");
    }
}
