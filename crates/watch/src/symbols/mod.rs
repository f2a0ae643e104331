//! The guest kernel's symbols: from vmlinux, from System.map, or from the tables that the kernel itself carries in its memory.

mod elf;
mod kallsyms;

pub use kallsyms::{Memory, find};

use object::{Object, ObjectSymbol, SymbolKind, SymbolSection};
use std::collections::HashMap;
use std::path::Path;

/// How much a statement about symbols can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sure {
    /// Addresses may be off as a whole: nothing in the guest was compared.
    Guess,
    /// The tables fit together, and nothing contradicts them.
    Strong,
    /// A value of the running guest was compared and fits.
    Certain,
}

impl Sure {
    /// In a word: `guess`, `strong`, `certain`.
    pub fn word(self) -> &'static str {
        match self {
            Sure::Guess => "guess",
            Sure::Strong => "strong",
            Sure::Certain => "certain",
        }
    }
}

/// Why a symbol file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// It can't be read.
    #[error("symbol file {0}: {1}")]
    Read(String, std::io::Error),
    /// It holds none.
    #[error("symbol file {0}: {1}; it should be a vmlinux with symbols or a System.map")]
    NoSymbols(String, String),
}

/// Symbols with their addresses.
#[derive(Clone, Debug)]
pub struct Symbols {
    /// Functions by address: address, and where the name lies in `names`.
    text: Vec<(u64, u32, u32)>,
    /// Everything else, by name.
    data: HashMap<String, u64>,
    names: String,
    /// Where they are from, in words.
    pub source: String,
    /// How sure the addresses are.
    pub sure: Sure,
    /// What was added to the addresses that the kernel was linked for.
    pub offset: u64,
    /// What `sure` rests on, in words.
    pub because: String,
}

/// No function is longer: what lies further behind a symbol is not its.
const LONGEST: u64 = 1 << 18;
/// Where x86-64 Linux is linked to run (`_text`; Documentation/arch/x86/x86_64/mm.rst of the kernel).
const LINKED: u64 = 0xffff_ffff_8100_0000;

impl Symbols {
    /// From pairs of address and name; a letter as in System.map says whether it is code.
    pub fn new(all: impl IntoIterator<Item = (u64, char, String)>, source: impl Into<String>) -> Symbols {
        let mut s = Symbols {
            text: Vec::new(),
            data: HashMap::new(),
            names: String::new(),
            source: source.into(),
            sure: Sure::Guess,
            offset: 0,
            because: "addresses as the kernel was linked".into(),
        };
        for (addr, kind, name) in all {
            let edge = matches!(name.as_str(), "_text" | "_stext" | "_etext" | "_sinittext" | "_einittext");
            if matches!(kind.to_ascii_lowercase(), 't' | 'w') && !edge {
                s.text.push((addr, s.names.len() as u32, name.len() as u32));
                s.names.push_str(&name);
            } else {
                s.data.entry(name).or_insert(addr);
            }
        }
        s.text.sort_by_key(|t| t.0);
        s.text.shrink_to_fit();
        s
    }

    /// From a file: a vmlinux or a System.map, whichever it is.
    ///
    /// # Errors
    /// It can't be read, or is neither.
    pub fn from_file(path: &Path) -> Result<Symbols, SymbolError> {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|e| SymbolError::Read(name.clone(), e))?;
        let symbols = if bytes.starts_with(b"\x7fELF") {
            Symbols::from_elf(&bytes, &name)
        } else {
            Symbols::from_map(&String::from_utf8_lossy(&bytes), &name)
        };
        symbols.map_err(|e| SymbolError::NoSymbols(name, e))
    }

    /// From an ELF file's symbol table.
    ///
    /// # Errors
    /// It is no ELF file or was stripped.
    pub fn from_elf(bytes: &[u8], name: &str) -> Result<Symbols, String> {
        let file = object::File::parse(bytes).map_err(|e| format!("it is no readable ELF file ({e})"))?;
        // Absolute ones (a kernel's per-processor variables) are no definitions to the reader; names of source files are absolute, too.
        let absolute = |s: &object::Symbol<'_, '_>| {
            s.section() == SymbolSection::Absolute && s.kind() != SymbolKind::File
        };
        let all = file.symbols().filter(|s| s.is_definition() || absolute(s)).filter_map(|s| {
            let kind = if s.kind() == SymbolKind::Text { 't' } else { 'd' };
            Some((s.address(), kind, s.name().ok().filter(|n| !n.is_empty())?.to_string()))
        });
        Symbols::new(all, format!("vmlinux {name}"))
            .some()
            .ok_or_else(|| "it has no symbols (stripped?)".to_string())
    }

    /// From the text of a System.map or of /proc/kallsyms.
    ///
    /// # Errors
    /// No line has the form `address letter name`.
    pub fn from_map(text: &str, name: &str) -> Result<Symbols, String> {
        let all = text.lines().filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let addr = u64::from_str_radix(words.next()?, 16).ok()?;
            let mut kind = words.next()?.chars();
            let letter = kind.next().filter(|_| kind.next().is_none())?;
            Some((addr, letter, words.next()?.to_string()))
        });
        Symbols::new(all, format!("System.map {name}"))
            .some()
            .ok_or_else(|| "no line reads `address letter name`".to_string())
    }

    fn some(self) -> Option<Symbols> {
        (!self.text.is_empty()).then_some(self)
    }

    /// Number of symbols.
    pub fn len(&self) -> usize {
        self.text.len() + self.data.len()
    }
    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    fn name(&self, entry: &(u64, u32, u32)) -> &str {
        self.names.get(entry.1 as usize..(entry.1 + entry.2) as usize).unwrap_or("")
    }
    /// The function that holds an address, and how far into it.
    pub fn lookup(&self, addr: u64) -> Option<(&str, u64)> {
        let at = self.text.partition_point(|t| t.0 <= addr);
        let start = self.text.get(at.checked_sub(1)?)?.0;
        // Of several names for one address, the first in the table's order.
        let first = self.text.partition_point(|t| t.0 < start);
        let entry = self.text.get(first)?;
        (addr - start < LONGEST).then(|| (self.name(entry), addr - start))
    }
    /// `name+0x12`, or None.
    pub fn at(&self, addr: u64) -> Option<String> {
        self.lookup(addr).map(|(n, off)| if off == 0 { n.to_string() } else { format!("{n}+{off:#x}") })
    }
    /// The address of a name.
    pub fn address(&self, name: &str) -> Option<u64> {
        self.data.get(name).copied().or_else(|| self.text.iter().find(|t| self.name(t) == name).map(|t| t.0))
    }
    /// First and last address of the kernel's code.
    pub fn code(&self) -> Option<(u64, u64)> {
        let first =
            self.address("_text").or_else(|| self.address("_stext")).or(self.text.first().map(|t| t.0))?;
        Some((first, self.address("_etext").or(self.text.last().map(|t| t.0))?))
    }
    /// All of them: address, whether it is code, name.
    fn iter(&self) -> impl Iterator<Item = (u64, bool, &str)> {
        let text = self.text.iter().map(|t| (t.0, true, self.name(t)));
        text.chain(self.data.iter().map(|(name, at)| (*at, false, name.as_str())))
    }
    /// As an ELF file that debuggers load with `symbol-file`: symbols, and sections without contents at the kernel's places.
    pub fn to_elf(&self) -> Vec<u8> {
        elf::write(self)
    }
    /// Moves all addresses.
    pub fn rebase(&mut self, by: u64) {
        self.text.iter_mut().for_each(|t| t.0 = t.0.wrapping_add(by));
        self.text.sort_by_key(|t| t.0);
        self.data.values_mut().for_each(|a| *a = a.wrapping_add(by));
        self.offset = self.offset.wrapping_add(by);
    }
    /// Takes the running kernel's place of these symbols from `running`, which was found in its memory.
    pub fn adopt(&mut self, running: &Symbols) {
        let probe = ["_text", "_stext", "schedule", "vprintk", "do_exit", "start_kernel"];
        let offsets: Vec<u64> =
            probe.iter().filter_map(|n| Some(running.address(n)?.wrapping_sub(self.address(n)?))).collect();
        match offsets.first() {
            Some(by) if offsets.len() > 2 && offsets.iter().all(|o| o == by) => {
                self.rebase(*by);
                self.sure = running.sure;
                self.because =
                    format!("{} symbols agree with those found in the guest's memory", offsets.len());
            }
            _ => {
                self.sure = Sure::Guess;
                self.because = "the kernel in the guest's memory is another one than the file's".into();
            }
        }
    }
    /// Compares with what a processor says: `handler` is the address that LSTAR holds.
    pub fn confirm(&mut self, handler: u64) {
        if self.lookup(handler).is_some_and(|(n, off)| off == 0 && n.starts_with("entry_SYSCALL_64")) {
            self.sure = Sure::Certain;
            self.because = format!("{}; LSTAR points to entry_SYSCALL_64", self.because);
        }
    }
    /// What is to be said about them, in one line.
    pub fn describe(&self) -> String {
        format!(
            "{} symbols from {}, KASLR offset {:#x} ({}: {})",
            self.len(),
            self.source,
            self.offset,
            self.sure.word(),
            self.because
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "ffffffff81000000 T _text\nffffffff81000000 T startup_64\nffffffff81000010 t helper\n\
                       ffffffff81000100 T schedule\nffffffff81000200 T vprintk\nffffffff81000300 T do_exit\n\
                       ffffffff81000400 T _etext\nffffffff82000000 D jiffies\nnonsense\n";

    #[test]
    fn a_map_is_read_and_asked() {
        let s = Symbols::from_map(MAP, "m").unwrap();
        assert_eq!(s.at(0xffff_ffff_8100_0014).as_deref(), Some("helper+0x4"));
        assert_eq!(s.at(0xffff_ffff_8100_0000).as_deref(), Some("startup_64"));
        assert_eq!((s.at(0x1000), s.at(0xffff_ffff_9000_0000)), (None, None));
        assert_eq!(s.address("jiffies"), Some(0xffff_ffff_8200_0000));
        assert!(
            Symbols::from_map("a file of another kind\n", "x").unwrap_err().contains("address letter name")
        );
        assert!(Symbols::from_elf(b"\x7fELFgarbage", "x").is_err());
    }

    #[test]
    fn the_offset_is_taken_from_the_running_kernel() {
        let mut file = Symbols::from_map(MAP, "m").unwrap();
        let mut running = file.clone();
        running.rebase(0x1a00_0000);
        running.sure = Sure::Strong;
        file.adopt(&running);
        assert_eq!((file.offset, file.sure), (0x1a00_0000, Sure::Strong));
        assert_eq!(file.at(0xffff_ffff_9b00_0104).as_deref(), Some("schedule+0x4"));
        let other = Symbols::new([(5, 't', "schedule".to_string())], "x");
        let mut file = Symbols::from_map(MAP, "m").unwrap();
        file.adopt(&other);
        assert_eq!((file.offset, file.sure), (0, Sure::Guess));
    }
}
