//! Transactions, listeners, and readers that run meanwhile.

use hyaline_ram::{DirtyClient, RamBlock};
use hyaline_space::{
    AddrRange, AddressSpace, Io, IoError, IoEventFd, Listener, Notify, Origin, Outcome, Region, Section,
    transaction,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Answers with its number.
struct Number(u64);

impl Io for Number {
    fn read(&self, _: u64, _: u8, _: &Origin) -> Result<u64, IoError> {
        Ok(self.0)
    }
    fn write(&self, _: u64, _: u8, _: u64, _: &Origin) -> Result<(), IoError> {
        Ok(())
    }
}

fn number(name: &str, size: u128, value: u64) -> Region {
    Region::io(name, size, Arc::new(Number(value)))
}

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Log {
    fn note(&self, line: String) {
        self.0.lock().expect("not poisoned").push(line);
    }
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("not poisoned"))
    }
}

fn text(section: &Section) -> String {
    format!("{} {}@{:#x}", section.range, section.region.name(), section.region_offset)
}

impl Listener for Log {
    fn begin(&self) {
        self.note("begin".into());
    }
    fn region_add(&self, s: &Section) {
        self.note(format!("add {}", text(s)));
    }
    fn region_del(&self, s: &Section) {
        self.note(format!("del {}", text(s)));
    }
    fn log_start(&self, s: &Section, old: u8, new: u8) {
        self.note(format!("log_start {} {old}->{new}", text(s)));
    }
    fn log_stop(&self, s: &Section, old: u8, new: u8) {
        self.note(format!("log_stop {} {old}->{new}", text(s)));
    }
    fn log_sync(&self, s: &Section) {
        if let Some(host) = &s.host {
            host.block.mark_dirty(host.offset + 0x1000, 1);
        }
        self.note(format!("log_sync {}", text(s)));
    }
    fn ioeventfd_add(&self, s: &Section, event: &IoEventFd) {
        self.note(format!("event_add {} {:#x}", text(s), event.addr));
    }
    fn ioeventfd_del(&self, s: &Section, event: &IoEventFd) {
        self.note(format!("event_del {} {:#x}", text(s), event.addr));
    }
    fn coalesced_add(&self, _: &Section, range: AddrRange) {
        self.note(format!("coalesced_add {range}"));
    }
    fn coalesced_del(&self, _: &Section, range: AddrRange) {
        self.note(format!("coalesced_del {range}"));
    }
    fn commit(&self) {
        self.note("commit".into());
    }
}

struct Silent;

impl Notify for Silent {
    fn notify(&self) {}
}

#[test]
fn listeners_get_differences_only() {
    let root = Region::container("root", 0x1_0000);
    let a = number("a", 0x100, 1);
    root.add(0, &a, 0).expect("fits");
    root.add(0x8000, &number("b", 0x100, 2), 0).expect("fits");
    let space = AddressSpace::new("memory", &root);
    let log = Arc::new(Log::default());
    let id = space.add_listener(log.clone());
    assert_eq!(log.take(), ["begin", "add 0x0..=0xff a@0x0", "add 0x8000..=0x80ff b@0x0", "commit"]);
    a.set_offset(0x40);
    assert_eq!(log.take(), ["begin", "del 0x0..=0xff a@0x0", "add 0x40..=0x13f a@0x0", "commit"]);
    root.add(0x80, &number("c", 0x10, 3), 1).expect("fits");
    assert_eq!(
        log.take(),
        [
            "begin",
            "del 0x40..=0x13f a@0x0",
            "add 0x40..=0x7f a@0x0",
            "add 0x80..=0x8f c@0x0",
            "add 0x90..=0x13f a@0x50",
            "commit"
        ]
    );
    let bell: Arc<dyn Notify> = Arc::new(Silent);
    a.add_ioeventfd(0x60, 2, None, bell.clone());
    a.set_coalesced(true);
    assert_eq!(
        log.take(),
        [
            "begin",
            "event_add 0x90..=0x13f a@0x50 0xa0",
            "commit",
            "begin",
            "coalesced_add 0x40..=0x7f",
            "coalesced_add 0x90..=0x13f",
            "commit"
        ]
    );
    {
        let _all = transaction();
        a.remove_ioeventfd(0x60, 2, None, &bell).expect("it is there");
        a.set_coalesced(false);
        a.set_enabled(false);
        a.set_enabled(true);
        assert!(log.take().is_empty(), "nothing is told before the end");
    }
    assert_eq!(
        log.take(),
        [
            "begin",
            "coalesced_del 0x40..=0x7f",
            "coalesced_del 0x90..=0x13f",
            "event_del 0x90..=0x13f a@0x50 0xa0",
            "commit"
        ]
    );
    a.set_enabled(true);
    assert!(log.take().is_empty(), "no change, no call");
    let (generation, hidden) = (space.generation(), number("hidden", 0x10, 5));
    root.add(0x8000, &hidden, -1).expect("fits");
    assert!(log.take().is_empty(), "what is hidden concerns nobody");
    assert_eq!(space.generation(), generation);
    assert_eq!(space.resolve(0x8000, 1, false).hidden.len(), 1, "but it is explained");
    let elsewhere = Region::container("elsewhere", 1);
    elsewhere.add(0, &number("d", 1, 4), 0).expect("fits");
    assert!(log.take().is_empty(), "what the space doesn't show doesn't concern it");
    assert!(space.remove_listener(id) && !space.remove_listener(id));
    assert_eq!(log.take().len(), 6);
    a.set_enabled(false);
    assert!(log.take().is_empty());
}

#[test]
fn dirty_logs_are_told_and_collected() {
    let block = RamBlock::new("vga.vram", 0x1_0000).expect("memory");
    let vram = Region::ram("vram", block.clone(), 0x4000, 0x8000);
    let root = Region::container("root", 1 << 32);
    root.add(0xa000, &Region::alias("window", &vram, 0, 0x8000), 0).expect("fits");
    let space = AddressSpace::new("memory", &root);
    let log = Arc::new(Log::default());
    space.add_listener(log.clone());
    log.take();
    vram.set_log_dirty(DirtyClient::Vga, true);
    vram.set_log_dirty(DirtyClient::Migration, true);
    vram.set_log_dirty(DirtyClient::Migration, false);
    let section = "0xa000..=0x11fff vram@0x0";
    assert_eq!(
        log.take(),
        [
            "begin",
            &format!("log_start {section} 0->4"),
            "commit",
            "begin",
            &format!("log_start {section} 4->5"),
            "commit",
            "begin",
            &format!("log_stop {section} 5->4"),
            "commit"
        ]
    );
    assert_eq!(space.store(0xa000, 4, 1, &Origin::LOADER), Outcome::Ok);
    space.write(0x11fff, &[1], &Origin::LOADER).expect("memory");
    let dirty = vram.dirty_snapshot_and_clear(DirtyClient::Vga).expect("it has memory");
    assert_eq!(dirty.pages().collect::<Vec<_>>(), [4, 5, 11], "page 5 comes from the listener's own log");
    assert_eq!(log.take(), [format!("log_sync {section}")]);
    assert_eq!(space.lookup(0xa000).map(|s| s.log), Some(DirtyClient::VGA));
}

#[test]
fn transactions_nest_and_publish_once() {
    let root = Region::container("root", 0x1000);
    let space = AddressSpace::new("memory", &root);
    let log = Arc::new(Log::default());
    space.add_listener(log.clone());
    log.take();
    let before = space.generation();
    {
        let _outer = transaction();
        let a = number("a", 0x10, 1);
        {
            let _inner = transaction();
            root.add(0, &a, 0).expect("fits");
        }
        root.add(0x10, &number("b", 0x10, 2), 0).expect("fits");
        // A device that moves its own region in answer to a write is in the same thread: it must not wait for itself.
        a.set_offset(0x20);
        assert_eq!(space.generation(), before);
        assert_eq!(space.load(0, 1, &Origin::DEBUGGER).1, Outcome::Unassigned);
    }
    assert_eq!(log.take(), ["begin", "add 0x10..=0x1f b@0x0", "add 0x20..=0x2f a@0x0", "commit"]);
}

/// Adds one region in answer to the first commit.
struct Answering {
    root: Region,
    done: AtomicBool,
}

impl Listener for Answering {
    fn commit(&self) {
        if !self.done.swap(true, Ordering::Relaxed) {
            self.root.add(0x100, &number("answer", 0x10, 2), 0).expect("fits");
        }
    }
}

/// Changes the graph at each commit, for ever.
struct Restless(Region);

impl Listener for Restless {
    fn commit(&self) {
        self.0.set_offset(self.0.offset() ^ 0x10);
    }
}

#[test]
fn listeners_may_change_the_graph() {
    let root = Region::container("root", 0x1000);
    let space = AddressSpace::new("memory", &root);
    let log = Arc::new(Log::default());
    space.add_listener(Arc::new(Answering { root: root.clone(), done: AtomicBool::new(false) }));
    space.add_listener(log.clone());
    assert_eq!(log.take(), ["begin", "add 0x100..=0x10f answer@0x0", "commit"]);
    let a = number("a", 0x10, 1);
    root.add(0, &a, 0).expect("fits");
    space.add_listener(Arc::new(Restless(a.clone())));
    log.take();
    a.set_size(0x8).expect("small");
    // It ends; the view and the last call agree with the graph afterwards.
    let shown = space.view().sections().find(|s| s.region == a).map(|s| s.range.start);
    assert_eq!(shown, Some(a.offset()));
}

#[test]
fn a_panicking_listener_does_not_lock_the_graph() {
    struct Panics;
    impl Listener for Panics {
        fn region_del(&self, _: &Section) {
            panic!("on purpose");
        }
    }
    let root = Region::container("root", 0x1000);
    let a = number("a", 0x10, 1);
    root.add(0, &a, 0).expect("fits");
    let space = AddressSpace::new("memory", &root);
    let id = space.add_listener(Arc::new(Panics));
    let moved = std::thread::spawn({
        let a = a.clone();
        move || a.set_offset(0x20)
    });
    assert!(moved.join().is_err());
    assert_eq!(space.load(0x20, 1, &Origin::DEBUGGER), (1, Outcome::Ok));
    let other = std::thread::spawn(move || a.set_priority(3));
    other.join().expect("another thread can go on");
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| space.remove_listener(id)));
    root.add(0x100, &number("b", 1, 2), 0).expect("this thread can go on");
}

#[test]
fn readers_see_whole_transactions_only() {
    let root = Region::container("root", 0x1000);
    let (a, b) = (number("a", 0x10, 0x11), number("b", 0x10, 0x22));
    b.set_enabled(false);
    root.add(0, &a, 0).expect("fits");
    root.add(0, &b, 1).expect("fits");
    let space = AddressSpace::new("memory", &root);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for with_cursor in [false, true] {
            let (space, stop) = (space.clone(), &stop);
            scope.spawn(move || {
                let mut cursor = hyaline_space::Cursor::new();
                while !stop.load(Ordering::Relaxed) {
                    let (value, outcome) = if with_cursor {
                        space.load_with(&mut cursor, 4, 1, &Origin::DEBUGGER)
                    } else {
                        space.load(4, 1, &Origin::DEBUGGER)
                    };
                    assert_eq!(outcome, Outcome::Ok, "there is always one");
                    assert!(matches!(value, 0x11 | 0x22), "{value:#x}");
                }
            });
        }
        for writer in 0..2 {
            let (a, b) = (&a, &b);
            scope.spawn(move || {
                for round in 0..2000 {
                    let _both = transaction();
                    // Whoever comes has the graph to itself: exactly one of the two is on.
                    assert_ne!(a.is_enabled(), b.is_enabled());
                    let on = (round + writer) % 2 == 0;
                    a.set_enabled(on);
                    b.set_enabled(!on);
                }
            });
        }
        // The scope's writers end by themselves; a last one tells the readers.
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            stop.store(true, Ordering::Relaxed);
        });
    });
}
