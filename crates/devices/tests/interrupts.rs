//! Interrupts on their whole way, between devices in their slots: timer, 8259A, I/O APIC, ISA bridge, local APICs.

use hyaline_device::{
    ApicMessage, Chassis, Delivery, Device, Dma, DmaError, Effect, Line, Mapping, Ns, Reset, Slot, Source,
    state::Value,
};
use hyaline_devices::intc::{i8259::I8259, ioapic::IoApic, lapic, lapic::Lapic};
use hyaline_devices::pci::piix3::Piix3;
use hyaline_devices::timer::i8254::I8254;
use std::collections::BTreeMap;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// A board with a clock that the test moves, and nothing else.
#[derive(Default)]
struct World {
    now: Mutex<Ns>,
    timers: Mutex<BTreeMap<(u16, u32), Ns>>,
    lapics: OnceLock<Vec<Weak<Slot>>>,
    ioapic: OnceLock<Weak<Slot>>,
    maps: Mutex<Vec<Mapping>>,
    notes: Mutex<Vec<String>>,
    /// The next note is held up until this says something.
    hold: Mutex<Option<Receiver<()>>>,
}

struct NoMemory;
impl Dma for NoMemory {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError { address, len: data.len(), is_write: false })
    }
    fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        Err(DmaError { address, len: data.len(), is_write: true })
    }
}

impl Source for World {
    fn now(&self) -> Ns {
        *self.now.lock().unwrap()
    }
    fn wall_clock(&self) -> u64 {
        self.now()
    }
    fn random(&self) -> u64 {
        4
    }
}

impl Chassis for World {
    fn dma(&self) -> &dyn Dma {
        &NoMemory
    }
    fn effect(&self, slot: &Arc<Slot>, effect: Effect) {
        match effect {
            Effect::Timer { timer, at } => {
                let mut timers = self.timers.lock().unwrap();
                timers.remove(&(slot.id(), timer));
                timers.extend(at.map(|at| ((slot.id(), timer), at)));
            }
            Effect::Apic(m @ ApicMessage::Deliver { .. }) => {
                let lapics: Vec<_> = self.lapics.get().unwrap().iter().filter_map(Weak::upgrade).collect();
                assert!(lapic::route(&m, &lapics), "nobody took {m:?}");
            }
            Effect::Apic(m) => assert!(self.ioapic.get().unwrap().upgrade().unwrap().message(&m)),
            Effect::Map(m) => self.maps.lock().unwrap().push(m),
            Effect::Note(text) => {
                let hold = self.hold.lock().unwrap().take();
                if let Some(hold) = hold {
                    hold.recv().unwrap();
                }
                self.notes.lock().unwrap().push(text);
            }
            _ => {}
        }
    }
    fn crashed(&self, slot: &Arc<Slot>, crash: hyaline_device::Crash) {
        panic!("{slot:?}: {}", crash.message);
    }
}

struct Board {
    world: Arc<World>,
    pic: Arc<Slot>,
    pit: Arc<Slot>,
    ioapic: Arc<Slot>,
    piix3: Arc<Slot>,
    lapics: Vec<Arc<Slot>>,
    pirqa: (Arc<Line>, u32),
}

impl Board {
    fn new() -> Board {
        let world = Arc::new(World::default());
        let mut id = 0;
        let mut slot = |name: &str, device: Box<dyn Device>| {
            id += 1;
            Slot::new(id, name, device, world.clone())
        };
        let pic = slot("pic", Box::new(I8259::new()));
        let pit = slot("pit", Box::new(I8254::new()));
        let ioapic = slot("ioapic", Box::new(IoApic::new()));
        let piix3 = slot("00:01.0", Box::new(Piix3::new()));
        let lapics: Vec<_> = (0..2)
            .map(|n| slot(&format!("lapic{n}"), Box::new(Lapic::new(lapic::Config::new(n, 1_000_000_000)))))
            .collect();
        let irq: Vec<_> = (0..16).map(|n| Line::new(format!("irq{n}"))).collect();
        for (n, line) in irq.iter().enumerate() {
            line.connect(pic.sink(n as u32));
            line.connect(ioapic.sink(if n == 0 { 2 } else { n as u32 }));
            piix3.bind(n as u32, line);
        }
        assert!(pit.bind_named("out0", &irq[0]));
        let intr = Line::new("intr");
        assert!(pic.bind_named("intr", &intr));
        intr.connect(lapics[0].sink(0));
        let pirqa = Line::new("pirqa");
        pirqa.connect(piix3.sink(0));
        let source = pirqa.source();
        world.lapics.set(lapics.iter().map(Arc::downgrade).collect()).unwrap();
        world.ioapic.set(Arc::downgrade(&ioapic)).unwrap();
        let board = Board { world, pic, pit, ioapic, piix3, lapics, pirqa: (pirqa, source) };
        for s in board.slots() {
            s.reset(Reset::Power);
        }
        board
    }

    fn slots(&self) -> Vec<&Arc<Slot>> {
        let mut all = vec![&self.pic, &self.pit, &self.ioapic, &self.piix3];
        all.extend(&self.lapics);
        all
    }

    fn write(&self, slot: &Arc<Slot>, bank: usize, offset: u64, size: u8, value: u64) {
        slot.with(|d, cx| d.write(bank, offset, size, value, cx)).unwrap().unwrap();
    }

    fn run(&self, ns: Ns) {
        let end = self.world.now() + ns;
        loop {
            let next = self.world.timers.lock().unwrap().iter().map(|(k, t)| (*t, *k)).min();
            let Some((at, key)) = next.filter(|(t, _)| *t <= end) else { break };
            self.world.timers.lock().unwrap().remove(&key);
            *self.world.now.lock().unwrap() = at.max(self.world.now());
            self.slots().into_iter().find(|s| s.id() == key.0).unwrap().timer(key.1);
        }
        *self.world.now.lock().unwrap() = end;
    }

    fn pending(&self, cpu: usize) -> bool {
        self.with_lapic(cpu, |l| l.interrupt_pending())
    }

    fn with_lapic<R>(&self, cpu: usize, f: impl FnOnce(&mut Lapic) -> R) -> R {
        self.lapics[cpu].with(|d, _| f(d.as_any().unwrap().downcast_mut().unwrap())).unwrap()
    }

    /// What a processor does that takes an interrupt.
    fn acknowledge(&self, cpu: usize) -> Option<u8> {
        let slot = &self.lapics[cpu];
        slot.acknowledge().or_else(|| {
            let external = slot
                .with(|d, cx| d.as_any().unwrap().downcast_mut::<Lapic>().unwrap().acknowledge_external(cx))
                .unwrap();
            external.then(|| self.pic.acknowledge()).flatten()
        })
    }

    fn program_pic(&self) {
        for (bank, icw) in [(0, [0x11, 0x20, 4, 1]), (1, [0x11, 0x28, 2, 1])] {
            self.write(&self.pic, bank, 0, 1, icw[0]);
            icw[1..].iter().for_each(|v| self.write(&self.pic, bank, 1, 1, *v));
        }
    }

    fn program_pit(&self, count: u16) {
        self.write(&self.pit, 0, 3, 1, 0x34);
        count.to_le_bytes().iter().for_each(|v| self.write(&self.pit, 0, 0, 1, u64::from(*v)));
    }

    fn redirect(&self, pin: u64, low: u64, high: u64) {
        for (index, v) in [(0x11 + 2 * pin, high), (0x10 + 2 * pin, low)] {
            self.write(&self.ioapic, 0, 0, 4, index);
            self.write(&self.ioapic, 0, 0x10, 4, v);
        }
    }
}

#[test]
fn timer_through_8259_and_virtual_wire() {
    let b = Board::new();
    b.program_pic();
    b.program_pit(11932);
    for tick in 0..5 {
        b.run(10_100_000);
        assert!(b.pending(0), "tick {tick}");
        assert_eq!(b.acknowledge(0), Some(0x20));
        assert!(!b.pending(0));
        b.write(&b.pic, 0, 0, 1, 0x20);
    }
    assert!(!b.pending(1), "only the bootstrap processor has the wire");
}

#[test]
fn timer_through_io_apic() {
    let b = Board::new();
    b.program_pic();
    b.write(&b.pic, 0, 1, 1, 0xff);
    for cpu in &b.lapics {
        b.write(cpu, 0, 0xf0, 4, 0x1ff);
    }
    b.redirect(2, 0x31, 1 << 24);
    b.program_pit(1193);
    b.run(1_100_000);
    assert!(b.pending(1) && !b.pending(0));
    assert_eq!(b.acknowledge(1), Some(0x31));
    b.write(&b.lapics[1], 0, 0xb0, 4, 0);
}

#[test]
fn pci_interrupt_is_level_triggered_to_the_end() {
    let b = Board::new();
    b.program_pic();
    b.write(&b.pic, 1, 1, 1, 0xff);
    for cpu in &b.lapics {
        b.write(cpu, 0, 0xf0, 4, 0x1ff);
    }
    b.write(&b.lapics[0], 0, 0x80, 4, 0x20);
    b.write(&b.piix3, 0, 0x60, 1, 11);
    // Lowest priority to all: processor 1 has the lower task priority.
    for cpu in &b.lapics {
        b.write(cpu, 0, 0xd0, 4, 1 << 24);
    }
    b.redirect(11, 0x8941, 1 << 24);
    b.pirqa.0.set(b.pirqa.1, true);
    assert!(b.pending(1) && !b.pending(0));
    assert_eq!(b.acknowledge(1), Some(0x41));
    b.write(&b.lapics[1], 0, 0xb0, 4, 0);
    assert_eq!(b.acknowledge(1), Some(0x41), "the line is still up after the EOI");
    b.pirqa.0.set(b.pirqa.1, false);
    b.write(&b.lapics[1], 0, 0xb0, 4, 0);
    assert_eq!(b.acknowledge(1), None);
}

#[test]
fn inter_processor_interrupts() {
    let b = Board::new();
    for cpu in &b.lapics {
        b.write(cpu, 0, 0xf0, 4, 0x1ff);
    }
    b.write(&b.lapics[0], 0, 0x300, 4, 0x000c_00fb);
    assert_eq!((b.acknowledge(0), b.acknowledge(1)), (None, Some(0xfb)));
    b.write(&b.lapics[1], 0, 0xb0, 4, 0);
    b.write(&b.lapics[1], 0, 0x300, 4, 0x0008_00fc);
    assert_eq!((b.acknowledge(0), b.acknowledge(1)), (Some(0xfc), Some(0xfc)));
    let nobody = ApicMessage::Deliver {
        destination: 9,
        logical: false,
        mode: Delivery::Fixed,
        vector: 0x40,
        level: false,
        except: None,
    };
    assert!(!lapic::route(&nobody, &b.lapics));
}

#[test]
fn the_whole_board_goes_on_after_a_restore() {
    let a = Board::new();
    a.program_pic();
    a.program_pit(11932);
    a.run(25_000_000);
    let saved: Vec<Value> = a.slots().iter().map(|s| s.save().unwrap()).collect();
    let b = Board::new();
    *b.world.now.lock().unwrap() = a.world.now();
    for (s, v) in b.slots().iter().zip(&saved) {
        s.load(v).unwrap();
    }
    for board in [&a, &b] {
        assert!(board.pending(0));
        assert_eq!(board.acknowledge(0), Some(0x20));
        board.write(&board.pic, 0, 0, 1, 0x20);
    }
    assert_eq!(*a.world.timers.lock().unwrap(), *b.world.timers.lock().unwrap());
    // Lines are the machine's to restore; without that OUT 0 needs its next edge.
    b.run(12_000_000);
    assert!(b.pending(0));
}

/// What one thread causes while another still carries out the effects of an earlier call comes after them: else a line that rose and fell could
/// end high.
#[test]
fn effects_keep_their_order_between_threads() {
    let b = Board::new();
    let (called, wait) = std::sync::mpsc::channel();
    *b.world.hold.lock().unwrap() = Some(wait);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| b.pic.with(|_, cx| cx.note("first")));
        while b.world.hold.lock().unwrap().is_some() {
            std::thread::yield_now();
        }
        // The first thread is in the middle of its effect now.
        b.pic.with(|_, cx| cx.note("second"));
        called.send(()).unwrap();
        first.join().unwrap();
    });
    assert_eq!(*b.world.notes.lock().unwrap(), ["first", "second"]);
}
