//! Saves a machine's whole state into a file, and takes it back in another process, under whichever accelerator.

use crate::machine::{Engine, Machine, MachineError};
use crate::state_file::{Reader, StateFileError, Writer, error};
use ciborium::Value;
use hyaline_ram::RamBlock;
use hyaline_x86::env::Signals;
use hyaline_x86::state::{CpuState, cr0, efer, flag};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::path::Path;

/// What the machine is, so that a state is not put into another one.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    program: String,
    board: String,
    memory: u64,
    cpus: u8,
    accel: String,
    /// Virtual time and wall-clock time at its zero, nanoseconds.
    now: u64,
    wall_at_zero: u64,
    /// Ticks of the time-stamp counter per second.
    tsc_hz: u64,
    /// Names of devices with their chips, in order.
    devices: Vec<(String, String)>,
    /// Length of the firmware image, 0 without.
    firmware: u64,
    /// What was booted, in words.
    booted: String,
    /// Deterministic machines: where the sequence of random numbers is, whose turn it is, and how much of it is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    random: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    turn: Option<(usize, u64)>,
}

/// A machine's state without its memory: sections with their names, as a state file has them.
pub type Sections = Vec<(String, Vec<u8>)>;

/// Most bytes of RAM in one section.
const PIECE: usize = 1 << 20;

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut data = Vec::new();
    // Writing into memory can't fail, and the types have no parts that CBOR lacks.
    let _ = ciborium::into_writer(value, &mut data);
    data
}

fn decode<T: DeserializeOwned>(path: &Path, name: &str, data: &[u8]) -> Result<T, StateFileError> {
    ciborium::from_reader(data)
        .map_err(|e| error(path, format!("section `{name}` does not fit this program: {e}")))
}

impl Machine {
    /// All devices but the local APICs, which each accelerator has in its own way and whose states are always saved.
    fn devices(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let all = self.pc.devices.iter().map(|d| (d.slot.name().to_string(), d.slot.chip().name.to_string()));
        all.filter(|(_, chip)| chip != "lapic")
    }

    fn head(&self) -> Head {
        Head {
            program: format!("hyaline {}", env!("CARGO_PKG_VERSION")),
            board: "pc".into(),
            memory: self.pc.ram.len(),
            cpus: self.config.cpus,
            accel: self.accel().as_str().into(),
            now: self.core.clock.now(),
            wall_at_zero: self.core.clock.wall_at_zero(),
            tsc_hz: self.core.clock.tsc_hz(),
            devices: self.devices().collect(),
            firmware: self.pc.rom.as_ref().map_or(0, |r| r.len()),
            booted: self.booted.clone(),
            random: self.core.random_state(),
            turn: match &self.engine {
                Engine::Interp(interp) if self.config.deterministic => Some(interp.schedule()),
                _ => None,
            },
        }
    }

    /// Saves the state of a machine that is not running.
    ///
    /// # Errors
    /// The file can't be written, or a device can't be saved.
    pub fn save(&mut self, path: &Path) -> Result<(), MachineError> {
        let sections = self.sections()?;
        let mut w = Writer::create(path)?;
        for (name, data) in &sections {
            w.section(name, data)?;
        }
        for (name, block) in self.blocks() {
            save_ram(&mut w, &name, &block)?;
        }
        Ok(w.finish()?)
    }

    /// The state of a machine that is not running, all but its memory ([`Machine::blocks`]): equal states are equal bytes.
    ///
    /// # Errors
    /// A device can't be saved.
    pub fn sections(&mut self) -> Result<Sections, MachineError> {
        let lapics = self.lapic_states()?;
        let mut all = vec![("machine".to_string(), encode(&self.head()))];
        for n in 0..usize::from(self.config.cpus) {
            all.push((format!("cpu{n}"), encode(&self.cpu_state(n)?)));
        }
        let waiting: Vec<u32> = self.pc.cpus.iter().map(|c| c.signals.pending() & Signals::GUEST).collect();
        all.push(("signals".into(), encode(&waiting)));
        for d in &self.pc.devices {
            let state = d.slot.save().map_err(|e| MachineError::Device(d.slot.name().into(), e))?;
            all.push((format!("device:{}", d.slot.name()), encode(&state)));
        }
        for (name, state) in &lapics {
            all.push((format!("device:{name}"), encode(state)));
        }
        let lines: BTreeMap<String, u64> =
            self.core.lines().iter().map(|l| (l.name().to_string(), l.levels())).collect();
        all.push(("lines".into(), encode(&lines)));
        Ok(all)
    }

    /// The blocks of memory that belong to the state, by the names they have in a state file.
    pub fn blocks(&self) -> Vec<(String, std::sync::Arc<RamBlock>)> {
        let mut all = vec![("ram".to_string(), self.pc.ram.clone())];
        all.extend(self.pc.rom.clone().map(|r| ("rom".to_string(), r)));
        all
    }

    /// Takes a saved state. The machine must have been made with the same memory, processors and devices.
    ///
    /// # Errors
    /// A damaged or foreign file, another machine, values that a device or processor can't hold: in words. The machine is of no use then.
    pub fn restore(&mut self, path: &Path) -> Result<(), MachineError> {
        let mut r = Reader::open(path)?;
        let Some((name, data)) = r.next_section()? else {
            return Err(r.wrong("the file holds nothing").into());
        };
        if name != "machine" {
            return Err(r.wrong(format!("the first section is `{name}`, not `machine`")).into());
        }
        let saved: Head = decode(path, &name, &data)?;
        self.check_head(path, &saved)?;
        for (_, block) in self.blocks() {
            let _ = block.fill(0, block.len(), 0);
        }
        let mut missing = self.section_names();
        let mut sections = Vec::new();
        while let Some((name, data)) = r.next_section()? {
            if let Some(rest) = name.strip_prefix("ram:").or_else(|| name.strip_prefix("rom:")) {
                let block = if name.starts_with("ram") { Some(&self.pc.ram) } else { self.pc.rom.as_ref() };
                let at = u64::from_str_radix(rest, 16).ok();
                let fits = at.zip(block).is_some_and(|(at, b)| b.write(at, &data).is_ok());
                if !fits {
                    return Err(r
                        .wrong(format!("section `{name}` lies outside the machine's memory"))
                        .into());
                }
                continue;
            }
            let Some(i) = missing.iter().position(|m| *m == name) else {
                return Err(r.wrong(format!("section `{name}` is unknown or there twice")).into());
            };
            missing.swap_remove(i);
            sections.push((name, data));
        }
        if let Some(name) = missing.first() {
            return Err(r.wrong(format!("section `{name}` is missing")).into());
        }
        self.take(path, saved, &sections)
    }

    /// Takes a state that [`Machine::sections`] gave; memory is the caller's business.
    ///
    /// # Errors
    /// Another machine's state. The machine is of no use then.
    pub fn restore_sections(&mut self, sections: &Sections) -> Result<(), MachineError> {
        let path = Path::new("the kept state");
        let (name, data) = sections.first().ok_or_else(|| error(path, "it holds nothing"))?;
        let saved: Head = decode(path, name, data)?;
        self.check_head(path, &saved)?;
        self.take(path, saved, sections.get(1..).unwrap_or_default())
    }

    /// Names of all sections but `machine` and memory.
    fn section_names(&self) -> Vec<String> {
        let mut names: Vec<String> = (0..self.config.cpus).map(|n| format!("cpu{n}")).collect();
        names.extend(["signals".to_string(), "lines".to_string()]);
        names.extend(self.devices().map(|(name, _)| format!("device:{name}")));
        names.extend((0..self.config.cpus).map(|n| format!("device:lapic{n}")));
        names
    }

    /// Takes what sections hold.
    fn take(&mut self, path: &Path, saved: Head, sections: &[(String, Vec<u8>)]) -> Result<(), MachineError> {
        let mut lapics: Vec<(String, Value)> = Vec::new();
        self.core.timers.clear();
        self.core.clock.restore(saved.now, saved.wall_at_zero);
        if let Some(state) = saved.random {
            self.core.set_random_state(state);
        }
        let mut cpus: Vec<(usize, CpuState)> = Vec::new();
        let mut signals: Vec<u32> = Vec::new();
        for (name, data) in sections {
            if name == "signals" {
                signals = decode(path, name, data)?;
            } else if name == "lines" {
                let levels: BTreeMap<String, u64> = decode(path, name, data)?;
                for line in self.core.lines() {
                    line.restore(levels.get(line.name()).copied().unwrap_or(0));
                }
            } else if let Some(device) = name.strip_prefix("device:") {
                let state: Value = decode(path, name, data)?;
                let slot = self.pc.devices.iter().find(|d| d.slot.name() == device).map(|d| d.slot.clone());
                match slot {
                    Some(slot) => {
                        slot.load(&state).map_err(|e| MachineError::Device(slot.name().into(), e))?
                    }
                    None => lapics.push((device.to_string(), state)),
                }
            } else if let Some(n) = name.strip_prefix("cpu").and_then(|n| n.parse().ok()) {
                let state: CpuState = decode(path, name, data)?;
                check_cpu(&state).map_err(|e| error(path, format!("processor {n}: {e}")))?;
                cpus.push((n, state));
            }
        }
        for (port, bits) in self.pc.cpus.iter().zip(&signals) {
            port.signals.clear(u32::MAX);
            port.signals.raise(bits & Signals::GUEST);
        }
        self.booted = saved.booted;
        self.load_processors(saved.tsc_hz, cpus, &lapics)?;
        if let (Engine::Interp(interp), Some(turn)) = (&mut self.engine, saved.turn) {
            interp.set_schedule(turn);
        }
        Ok(())
    }

    /// Has the software CPU walk the page tables anew, as after a restore. Nothing for KVM.
    pub fn forget_translations(&mut self) {
        if let Engine::Interp(interp) = &mut self.engine {
            interp.forget_translations();
        }
    }

    fn check_head(&self, path: &Path, saved: &Head) -> Result<(), StateFileError> {
        let here = self.head();
        if saved.board != here.board {
            return Err(error(
                path,
                format!("saved from a board `{}`; this one is `{}`", saved.board, here.board),
            ));
        }
        if !(1_000_000..=100_000_000_000).contains(&saved.tsc_hz) {
            return Err(error(path, format!("a time-stamp counter of {} ticks a second", saved.tsc_hz)));
        }
        if saved.memory != here.memory {
            return Err(error(
                path,
                format!(
                    "saved from a machine with {} MiB; start this one with -m {}",
                    saved.memory >> 20,
                    saved.memory >> 20
                ),
            ));
        }
        if saved.cpus != here.cpus {
            return Err(error(
                path,
                format!(
                    "saved from a machine with {} processors; start this one with -smp {}",
                    saved.cpus, saved.cpus
                ),
            ));
        }
        if saved.firmware != here.firmware {
            return Err(error(
                path,
                "saved from a machine that was started another way (with or without firmware); use the same -kernel or -bios options",
            ));
        }
        if saved.devices != here.devices {
            let other = |a: &[(String, String)], b: &[(String, String)]| {
                a.iter().find(|d| !b.contains(d)).map(|d| d.0.clone())
            };
            let text = match (other(&saved.devices, &here.devices), other(&here.devices, &saved.devices)) {
                (Some(d), _) => format!("the saved machine has a device `{d}` that this one lacks"),
                (None, Some(d)) => format!("this machine has a device `{d}` that the saved one lacks"),
                (None, None) => "the devices are in another order".into(),
            };
            return Err(error(path, format!("{text}; start with the same options as then")));
        }
        Ok(())
    }
}

fn save_ram(w: &mut Writer, name: &str, block: &RamBlock) -> Result<(), StateFileError> {
    let pages = block.len() / 4096;
    let mut piece = Vec::new();
    let mut start = 0;
    for page in 0..=pages {
        let at = page * 4096;
        let used = page < pages && !block.is_zero_page(page);
        if !piece.is_empty() && (!used || piece.len() == PIECE) {
            w.section(&format!("{name}:{start:x}"), &piece)?;
            piece.clear();
        }
        if used {
            if piece.is_empty() {
                start = at;
            }
            let len = piece.len();
            piece.resize(len + 4096, 0);
            let _ = block.read(at, &mut piece[len..]);
        }
    }
    Ok(())
}

/// What no processor can hold: a state with it would confuse whoever runs it.
fn check_cpu(s: &CpuState) -> Result<(), String> {
    let bad = |text: &str| Err(format!("impossible state: {text}"));
    if s.cr0 >> 32 != 0
        || s.cr0 & cr0::PG != 0 && s.cr0 & cr0::PE == 0
        || s.cr0 & cr0::NW != 0 && s.cr0 & cr0::CD == 0
    {
        return bad("CR0");
    }
    if (s.efer & efer::LMA != 0) != (s.efer & efer::LME != 0 && s.cr0 & cr0::PG != 0) {
        return bad("EFER.LMA does not go with EFER.LME and CR0.PG");
    }
    if s.rflags & flag::ONE == 0 || s.rflags >> 22 != 0 || s.rflags & (1 << 3 | 1 << 5 | 1 << 15) != 0 {
        return bad("RFLAGS");
    }
    if s.xcr0 & 1 == 0 || s.mxcsr >> 16 != 0 {
        return bad("XCR0 or MXCSR");
    }
    Ok(())
}
