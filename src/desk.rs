//! The run loop's desk: what others want of a running machine is done here, between two stretches of guest code.
//!
//! Two things come in: questions of the control socket that need the machine itself (monitor commands, the map), and looks at what the
//! processors are at, for the profile. Both send [`Event::Stop`], which brings the run loop here and changes nothing else.

use hyaline_control::map;
use hyaline_control::monitor::Monitor;
use hyaline_machine::Machine;
use hyaline_machine::chassis::{Core, Event};
use hyaline_watch::Profile;
use hyaline_watch::profile::Moment;
use hyaline_x86::state::{Activity, Seg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two looks: 250 a second, and not in step with the guest's own ticks.
const LOOK: Duration = Duration::from_micros(4003);
/// How long a question waits for the run loop.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Something that needs the machine.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    /// A monitor command.
    Monitor(String),
    /// What the processors are at.
    Processors,
    /// The map as data.
    Map,
    /// Why a place goes where it goes.
    MapWhy(String),
}

struct Question {
    ask: Ask,
    answer: Sender<Value>,
}

/// Shared by the run loop and those who want something of it.
pub(crate) struct Desk {
    core: Arc<Core>,
    questions: Mutex<VecDeque<Question>>,
    due: AtomicBool,
    ended: AtomicBool,
}

/// The run loop's own part.
pub(crate) struct Clerk {
    desk: Arc<Desk>,
    monitor: Option<Monitor>,
    profile: Option<Arc<Profile>>,
    /// Guest time of the last look: a machine that stands still is not looked at.
    looked: Option<u64>,
}

impl Desk {
    /// For a machine. With a profile, its processors are looked at regularly.
    ///
    /// # Errors
    /// The host has no thread for that.
    pub(crate) fn new(
        machine: &Machine,
        profile: Option<Arc<Profile>>,
    ) -> std::io::Result<(Arc<Desk>, Clerk)> {
        let desk = Arc::new(Desk {
            core: machine.core.clone(),
            questions: Mutex::default(),
            due: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        if profile.is_some() {
            let own = desk.clone();
            let body = move || {
                let mut asked = Instant::now();
                while !own.ended.load(Ordering::Relaxed) {
                    std::thread::sleep(LOOK);
                    // One look at a time; a debugger may have dropped the event of the last.
                    if !own.due.swap(true, Ordering::SeqCst) || asked.elapsed() > Duration::from_secs(1) {
                        asked = Instant::now();
                        own.core.event(Event::Stop);
                    }
                }
            };
            std::thread::Builder::new().name("profile".into()).spawn(body)?;
        }
        let clerk = Clerk { desk: desk.clone(), monitor: None, profile, looked: None };
        Ok((desk, clerk))
    }

    /// Has the run loop answer, within `patience`.
    pub(crate) fn ask(&self, ask: Ask, patience: Duration) -> Value {
        let (answer, answered) = channel();
        self.questions.lock().unwrap_or_else(PoisonError::into_inner).push_back(Question { ask, answer });
        let until = Instant::now() + patience;
        while Instant::now() < until {
            self.core.event(Event::Stop);
            match answered.recv_timeout(patience.min(Duration::from_millis(500))) {
                Ok(value) => return value,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        json!({"error": "the machine does not answer: its processors do not come out of a device's register handler, or it has ended"})
    }
}

impl Drop for Clerk {
    fn drop(&mut self) {
        self.desk.ended.store(true, Ordering::Relaxed);
        // Who still waits hears that nobody will answer.
        self.desk.questions.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Clerk {
    /// Does what has come in. To be called whenever the run loop comes back.
    pub(crate) fn serve(&mut self, machine: &mut Machine) {
        if self.desk.due.swap(false, Ordering::SeqCst) {
            let now = machine.core.clock.now();
            if self.looked != Some(now) {
                self.look(machine);
            }
            self.looked = Some(now);
        }
        loop {
            let next = self.desk.questions.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(Question { ask, answer }) = next else { break };
            // Who asked may be gone.
            let _ = answer.send(self.answer(machine, &ask));
        }
    }

    fn answer(&mut self, machine: &mut Machine, ask: &Ask) -> Value {
        match ask {
            Ask::Processors => {
                let count = usize::from(machine.config.cpus);
                let one = |n| {
                    let state = machine.cpu_state(n).ok()?;
                    let what = match state.activity {
                        Activity::Running => "runs",
                        Activity::Halted => "waits",
                        Activity::WaitForSipi => "is not started",
                        Activity::Shutdown => "is shut down",
                    };
                    let at = machine.guest.symbols().and_then(|s| s.at(state.rip));
                    let at = at.unwrap_or_else(|| format!("{:#x}", state.rip));
                    Some(json!({"state": what, "at": at, "mode": hyaline_machine::cpu_dump::mode(&state)}))
                };
                json!({"processors": (0..count).map(one).collect::<Vec<_>>()})
            }
            Ask::Map => json!({"map": map::as_json(&machine.pc)}),
            Ask::MapWhy(place) => match map::why(&machine.pc, place) {
                Ok(text) => json!({"text": text}),
                Err(e) => json!({"error": format!("map why {e}")}),
            },
            Ask::Monitor(line) => {
                let first = line.split_whitespace().take(2).collect::<Vec<_>>();
                if matches!(first.as_slice(), ["rbreak", "reg"]) {
                    return json!({"error": "rbreak stops the machine for a debugger: give it in gdb, as `monitor rbreak …`"});
                }
                let monitor = self.monitor.get_or_insert_with(|| Monitor::new(machine));
                let done = monitor.try_command(machine, line);
                if std::mem::take(&mut monitor.quit) {
                    machine.core.event(Event::Exit(0));
                }
                match done {
                    Ok(text) => json!({"text": text}),
                    Err(e) => json!({"error": e.trim_end()}),
                }
            }
        }
    }

    /// What each processor is at.
    fn look(&mut self, machine: &mut Machine) {
        let Some(profile) = &self.profile else { return };
        for n in 0..usize::from(machine.config.cpus) {
            let Ok(state) = machine.cpu_state(n) else { continue };
            if state.activity != Activity::Running {
                profile.moment(Moment::Waits);
                continue;
            }
            let ring = state.seg[Seg::Cs as usize].selector & 3;
            let protected = state.cr0 & 1 != 0;
            let symbols = machine.guest.symbols().or_else(|| {
                machine.guest.name(state.rip);
                machine.guest.symbols()
            });
            let frames = symbols
                .filter(|_| ring == 0)
                .map(|s| hyaline_machine::guest_stack::stack(&state, &machine.pc.memory, &s))
                .unwrap_or_default();
            let own = |name: &str| name.split('+').next().unwrap_or(name).to_string();
            let moment = if protected && ring == 3 {
                Moment::Runs { stack: vec!["(user mode)".into()], by: Some("user mode, not looked into") }
            } else if let Some(first) = frames.first() {
                let by = frames.get(1).filter(|f| f.sure()).map(|f| f.how.words());
                // Words that only look like return addresses would make callers up.
                let sure = frames.iter().filter(|f| f.sure()).map(|f| own(&f.name));
                match by {
                    Some(_) => Moment::Runs { stack: sure.collect(), by },
                    None => Moment::Runs { stack: vec![own(&first.name)], by: None },
                }
            } else {
                let mode = hyaline_machine::cpu_dump::mode(&state);
                Moment::Runs { stack: vec![format!("(no symbols, {mode})")], by: None }
            };
            profile.moment(moment);
        }
    }
}
