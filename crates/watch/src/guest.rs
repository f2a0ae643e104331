//! The guest's symbols as the machine has them: chosen by the user, found when they are first wanted.

use crate::symbols::{Memory, Sure, Symbols, find};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// `-symbols`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SymbolChoice {
    /// From the guest's memory.
    #[default]
    Auto,
    /// From a vmlinux or a System.map; its place in memory is looked for there.
    File(PathBuf),
    /// None.
    None,
}

/// Linux' code on x86-64 lies from here on.
const KERNEL: u64 = 0xffff_ffff_8000_0000;
/// Addresses without a symbol before the search is tried again.
const AGAIN: [u64; 4] = [1, 1_000, 20_000, 400_000];

/// Names addresses of the guest's code.
pub struct Guest {
    file: Option<Symbols>,
    auto: bool,
    memory: Box<dyn Memory + Send + Sync>,
    found: OnceLock<Arc<Symbols>>,
    asked: AtomicU64,
    searching: Mutex<()>,
    said: Box<dyn Fn(&str) + Send + Sync>,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guest({})", self.found.get().map_or("no symbols yet".to_string(), |s| s.describe()))
    }
}

impl Guest {
    /// Reads the file if one is chosen. `said` gets a line when symbols were found.
    ///
    /// # Errors
    /// The file is of no use.
    pub fn new(
        choice: &SymbolChoice,
        memory: Box<dyn Memory + Send + Sync>,
        said: Box<dyn Fn(&str) + Send + Sync>,
    ) -> Result<Guest, crate::symbols::SymbolError> {
        let file = match choice {
            SymbolChoice::File(path) => Some(Symbols::from_file(path)?),
            _ => None,
        };
        Ok(Guest {
            file,
            auto: *choice != SymbolChoice::None,
            memory,
            found: OnceLock::new(),
            asked: AtomicU64::new(0),
            searching: Mutex::new(()),
            said,
        })
    }

    /// The symbols, if they have been found.
    pub fn symbols(&self) -> Option<Arc<Symbols>> {
        self.found.get().cloned()
    }

    /// Searches now. `rip` is an address of the guest's kernel if one is known, `lstar` what the processor's LSTAR holds.
    pub fn search(&self, rip: Option<u64>, lstar: Option<u64>) -> Option<Arc<Symbols>> {
        if let Some(found) = self.found.get() {
            return Some(found.clone());
        }
        if !self.auto {
            return None;
        }
        let hint = lstar.filter(|l| *l >= KERNEL).or(rip.filter(|r| *r >= KERNEL));
        let guard = self.searching.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = self.found.get() {
            return Some(found.clone());
        }
        let running = find(&*self.memory, hint);
        let mut symbols = match (self.file.clone(), running) {
            (Some(mut file), Some(running)) => {
                file.adopt(&running);
                file
            }
            (Some(file), None) => file,
            (None, Some(running)) => running,
            (None, None) => return None,
        };
        if let Some(lstar) = lstar {
            symbols.confirm(lstar);
        }
        // A table that the guest's own addresses contradict may be a left-over of the decompressor: better none, and search again later.
        if symbols.sure == Sure::Guess && self.file.is_none() {
            return None;
        }
        let found = self.found.get_or_init(|| Arc::new(symbols)).clone();
        drop(guard);
        (self.said)(&format!("guest symbols: {}", found.describe()));
        Some(found)
    }

    /// The function at an address of code that the guest executes: `name+0x12`. Searches when the first address of a kernel comes by, and
    /// a few times more if nothing is found then.
    pub fn name(&self, rip: u64) -> Option<String> {
        if rip < KERNEL && self.file.is_none() {
            return None;
        }
        if let Some(found) = self.found.get() {
            return found.at(rip);
        }
        let n = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        if !AGAIN.contains(&n) {
            return None;
        }
        self.search(Some(rip), None)?.at(rip)
    }
}
