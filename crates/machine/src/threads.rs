//! A host thread for each processor, until an event waits: what KVM and the software CPU have in common.

use crate::chassis::{Core, CpuPort, Event, Waker};
use hyaline_kvm::KickHandle;
use hyaline_watch::Runner;
use std::sync::Arc;
use std::thread::{Builder, Thread};

/// What a processor's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Calls the processor again.
    Again,
    /// Sleeps until the processor is woken: it waits for an interrupt.
    Sleep,
    /// Ends.
    End,
}

/// One processor to be run.
pub(crate) struct Vcpu<'a> {
    pub number: u8,
    /// What runs it, for the thread's name.
    pub runner: Runner,
    pub port: &'a CpuPort,
    /// How to get it out of KVM.
    pub kick: Option<KickHandle>,
    /// Lets it execute until there is something to decide on. What the machine has to hear of is queued as an event.
    pub go_on: Box<dyn FnMut() -> Next + Send + 'a>,
}

/// Wakes a processor's thread, in the guest or out of it.
struct Wake {
    kick: Option<KickHandle>,
    thread: Thread,
}

impl Waker for Wake {
    fn wake(&self) {
        if let Some(kick) = &self.kick {
            kick.notify();
        }
        self.thread.unpark();
    }
}

/// A processor's thread that panics is the end of the machine: nobody may wait for it.
struct Fallen<'a>(&'a Core, u8);

impl Drop for Fallen<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.event(Event::Failed(format!("the thread of processor {} panicked", self.1)));
        }
    }
}

/// Runs processors, each on a thread of its own, until an event waits, and gives it.
///
/// No wake-up is lost: a request is raised first and its processor woken then. A thread that has not looked at it yet either looks before it
/// sleeps, or finds its sleep ended (`unpark` before `park`).
pub(crate) fn run(core: &Arc<Core>, vcpus: Vec<Vcpu<'_>>) -> Event {
    std::thread::scope(|scope| {
        for vcpu in vcpus {
            let Vcpu { number, runner, port, kick, mut go_on } = vcpu;
            let body = move || {
                let _fallen = Fallen(core, number);
                port.set_waker(Some(Arc::new(Wake { kick, thread: std::thread::current() })));
                while !core.has_event() {
                    match go_on() {
                        Next::Again => {}
                        Next::Sleep => std::thread::park(),
                        Next::End => return,
                    }
                }
            };
            let thread = Builder::new().name(runner.thread(number)).spawn_scoped(scope, body);
            if let Err(e) = thread {
                let text = format!("the thread of processor {number} can't be started: {e}");
                core.event(Event::Failed(text));
                break;
            }
        }
        core.wait_event();
    });
    core.take_event().unwrap_or(Event::Stop)
}
