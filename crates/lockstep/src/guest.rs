//! One machine in a process of its own: runs, keeps a state to go back to, hashes what changed.
//!
//! A process of its own because a program has one machine: what the machines of one process share (counts of writes to code) must not
//! couple the two that are compared.

use crate::protocol::{Answer, Ask, Status, hash};
use anyhow::{Context, Result, anyhow, bail};
use ciborium::Value;
use hyaline_machine::chassis::Event;
use hyaline_machine::config::Config;
use hyaline_machine::{Machine, Sections};
use hyaline_ram::{DirtyClient, PAGE_SIZE, RamBlock};
use hyaline_x86::CpuState;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

const PAGE: usize = PAGE_SIZE as usize;
type Page = Box<[u8; PAGE]>;

/// A defect planted on purpose: after this many instructions, general register number (0 to 15) of processor 0 has a bit flipped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plant {
    pub count: u64,
    pub register: usize,
}

/// A block of memory with what is known of it.
struct Memory {
    block: Arc<RamBlock>,
    /// Hash of each page; 0: all zero.
    hashes: Vec<u64>,
    /// The kept contents; None: all zero.
    kept: Vec<Option<Page>>,
}

struct Guest {
    machine: Machine,
    memory: Vec<Memory>,
    /// Block and page numbers written since the kept state.
    changed: BTreeSet<(usize, u64)>,
    sum: u64,
    ended: Option<String>,
    kept: Option<(Sections, Option<String>)>,
    plant: Option<Plant>,
}

/// Serves requests from standard input until it ends.
pub(crate) fn serve(config: Config, plant: Option<Plant>) -> Result<()> {
    let mut guest = Guest::new(config, plant)?;
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    while let Some(ask) = receive::<Ask>(&mut input)? {
        let answer = guest.answer(&ask).unwrap_or_else(|e| Answer::Failed(format!("{e:#}")));
        send(&mut output, &answer)?;
    }
    Ok(())
}

/// Writes one message: its length, then CBOR.
pub(crate) fn send<T: serde::Serialize>(to: &mut impl Write, message: &T) -> Result<()> {
    let mut data = Vec::new();
    ciborium::into_writer(message, &mut data)?;
    to.write_all(&(data.len() as u64).to_le_bytes())?;
    to.write_all(&data)?;
    Ok(to.flush()?)
}

/// Reads one message; None at the end.
pub(crate) fn receive<T: serde::de::DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>> {
    let mut len = [0; 8];
    match from.read_exact(&mut len) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let mut data = vec![0; u64::from_le_bytes(len) as usize];
    from.read_exact(&mut data)?;
    Ok(Some(ciborium::from_reader(&data[..])?))
}

impl Guest {
    fn new(config: Config, plant: Option<Plant>) -> Result<Guest> {
        let mut machine = Machine::new(config)?;
        for remark in std::mem::take(&mut machine.remarks) {
            eprintln!("hyaline-lockstep: {remark}");
        }
        let memory = machine.blocks().into_iter().map(|(_, block)| {
            block.set_logging(DirtyClient::Compare, true);
            for range in block.populated() {
                block.mark_dirty_for(DirtyClient::Compare, range.start, range.end - range.start);
            }
            let pages = (block.len() / PAGE_SIZE) as usize;
            Memory { block, hashes: vec![0; pages], kept: (0..pages).map(|_| None).collect() }
        });
        let memory = memory.collect();
        Ok(Guest { machine, memory, changed: BTreeSet::new(), sum: 0, ended: None, kept: None, plant })
    }

    fn answer(&mut self, ask: &Ask) -> Result<Answer> {
        Ok(match ask {
            Ask::Run { to, keep } => {
                if *keep {
                    self.keep()?;
                }
                self.run(*to)?;
                Answer::Status(self.status()?)
            }
            Ask::Back => {
                self.back()?;
                Answer::Status(self.status()?)
            }
            Ask::Sections => Answer::Sections(self.sections()?),
            Ask::Changed => {
                self.look();
                let hash = |(b, p): &(usize, u64)| (*b, *p, self.memory[*b].hashes[*p as usize]);
                Answer::Changed(self.changed.iter().map(hash).collect())
            }
            Ask::Page(block, page) => {
                let mut data = vec![0; PAGE];
                let memory = self.memory.get(*block).context("no such block")?;
                memory.block.read(page * PAGE_SIZE, &mut data)?;
                Answer::Bytes(data)
            }
            Ask::Code(cpu) => self.code(*cpu)?,
            Ask::Console => Answer::Bytes(self.machine.core.console()),
            Ask::Save(path) => {
                self.machine.save(Path::new(path))?;
                Answer::Done
            }
        })
    }

    fn count(&self) -> u64 {
        self.machine.instructions().unwrap_or(0)
    }

    /// The state but memory, without what tells the tiers apart.
    fn sections(&mut self) -> Result<Sections> {
        let mut sections = self.machine.sections()?;
        let (_, head) = sections.first_mut().context("no state")?;
        let mut value: Value = ciborium::from_reader(&head[..])?;
        if let Value::Map(entries) = &mut value {
            entries.retain(|(k, _)| k.as_text() != Some("accel"));
        }
        head.clear();
        ciborium::into_writer(&value, head)?;
        Ok(sections)
    }

    fn status(&mut self) -> Result<Status> {
        self.look();
        let sections = self.sections()?;
        let state = sections.iter().fold(0_u64, |sum, (name, data)| {
            sum.rotate_left(7).wrapping_mul(5) ^ hash(name.as_bytes()) ^ hash(data)
        });
        Ok(Status { count: self.count(), ended: self.ended.clone(), state, memory: self.sum })
    }

    /// Hashes the pages written since the last look.
    fn look(&mut self) {
        let mut data = vec![0; PAGE];
        for (b, memory) in self.memory.iter_mut().enumerate() {
            let dirty = memory.block.dirty_snapshot_and_clear(DirtyClient::Compare, 0..memory.block.len());
            for page in dirty.pages() {
                let Some(old) = memory.hashes.get_mut(page as usize) else { continue };
                if memory.block.read(page * PAGE_SIZE, &mut data).is_err() {
                    continue;
                }
                let place = |h: u64| match h {
                    0 => 0,
                    h => (h ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (b as u64) << 56)
                        .wrapping_mul(0xd6e8_feb8_6659_fd93)
                        .rotate_left(31),
                };
                let new = hash(&data);
                self.sum = self.sum.wrapping_sub(place(*old)).wrapping_add(place(new));
                *old = new;
                self.changed.insert((b, page));
            }
        }
    }

    /// Makes the present state the one to go back to. Translations of addresses are forgotten, as they are on going back: they would tell a
    /// first run from a second one (accessed bits), and a page that stays writable would not be seen written.
    fn keep(&mut self) -> Result<()> {
        self.look();
        for (b, page) in std::mem::take(&mut self.changed) {
            let memory = &mut self.memory[b];
            let kept = &mut memory.kept[page as usize];
            if memory.hashes[page as usize] == 0 {
                *kept = None;
                continue;
            }
            let place = kept.get_or_insert_with(|| Box::new([0; PAGE]));
            memory.block.read(page * PAGE_SIZE, &mut place[..])?;
        }
        self.kept = Some((self.machine.sections()?, self.ended.clone()));
        self.machine.forget_translations();
        Ok(())
    }

    fn back(&mut self) -> Result<()> {
        self.look();
        let (sections, ended) = self.kept.clone().context("no state was kept")?;
        for (b, page) in std::mem::take(&mut self.changed) {
            let memory = &self.memory[b];
            match memory.kept.get(page as usize).and_then(|p| p.as_ref()) {
                Some(data) => memory.block.write(page * PAGE_SIZE, &data[..])?,
                None => memory.block.fill(page * PAGE_SIZE, PAGE_SIZE, 0)?,
            }
        }
        self.look();
        self.changed.clear();
        self.machine.core.retain_events(|_| false);
        self.machine.restore_sections(&sections)?;
        self.ended = ended;
        Ok(())
    }

    fn run(&mut self, to: u64) -> Result<()> {
        while self.ended.is_none() && self.count() < to {
            let at = self.count();
            let until = match self.plant {
                Some(plant) if at < plant.count && plant.count <= to => plant.count,
                _ => to,
            };
            let event = self.machine.run_for(until - at)?;
            match event {
                Event::Stop if self.count() >= until => {}
                Event::Stop => self.ended = Some("nothing will ever wake the processors".into()),
                Event::PowerOff => self.ended = Some("power off".into()),
                Event::Exit(code) => self.ended = Some(format!("exit with code {code}")),
                Event::GuestPanicked => self.ended = Some("the guest panicked".into()),
                Event::Failed(why) => self.ended = Some(why),
                Event::DeviceCrashed(text) => bail!("{text}"),
                Event::TripleFault(cpu) if self.machine.config.no_reboot => {
                    self.ended = Some(format!("triple fault of processor {cpu}"));
                }
                Event::Reset(who) if self.machine.config.no_reboot => {
                    self.ended = Some(format!("reset by {who}"))
                }
                Event::TripleFault(_) | Event::Reset(_) => {
                    self.machine.reset(hyaline_device::Reset::System)?
                }
                Event::Report | Event::Debug(_) => {}
            }
            if self.plant.is_some_and(|p| at < p.count && self.count() == p.count) {
                self.corrupt()?;
            }
        }
        Ok(())
    }

    /// Plants the defect.
    fn corrupt(&mut self) -> Result<()> {
        let plant = self.plant.context("no defect")?;
        let mut sections = self.machine.sections()?;
        let (_, data) = sections.iter_mut().find(|(n, _)| n == "cpu0").context("no processor")?;
        let mut state: CpuState = ciborium::from_reader(&data[..])?;
        *state.gpr.get_mut(plant.register).context("--plant: registers are 0 to 15")? ^= 1;
        data.clear();
        ciborium::into_writer(&state, data)?;
        Ok(self.machine.restore_sections(&sections)?)
    }

    fn code(&mut self, cpu: usize) -> Result<Answer> {
        let state = self.machine.cpu_state(cpu)?;
        let code = state.seg[1];
        let long = state.efer & 1 << 10 != 0 && code.long();
        let protected = state.cr0 & 1 != 0 && state.rflags & 1 << 17 == 0;
        let (bits, at) = match (long, code.big() && protected) {
            (true, _) => (64, state.rip),
            (_, big) => (if big { 32 } else { 16 }, code.base.wrapping_add(state.rip) & 0xffff_ffff),
        };
        let mut data = [0; 15];
        let n = self.machine.read_linear(cpu, at, &mut data);
        let data = data.get(..n).ok_or_else(|| anyhow!("the code can't be read"))?;
        Ok(Answer::Code(bits, data.to_vec()))
    }
}
