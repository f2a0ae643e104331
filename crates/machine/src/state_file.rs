//! The file a machine's state is saved in.
//!
//! A line that says what it is, then sections, each with a name, a length, its bytes and a checksum; the last one is `end`. What is
//! structured is CBOR with field names, so the file describes itself; RAM is raw, without its zero pages.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// First line of every state file.
pub const MAGIC: &[u8; 16] = b"HYALINE STATE 1\n";
/// Longest section that is not RAM: 64 MiB.
const MAX_SECTION: u64 = 64 << 20;

/// Why a state can't be saved or restored.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {text}")]
pub struct StateFileError {
    path: String,
    text: String,
}

/// FNV-1a with 64 bits over 8-byte words: fast enough for RAM, and every damaged bit changes it.
#[derive(Clone, Copy)]
struct Sum(u64);

impl Sum {
    fn of(name: &str, data: &[u8]) -> u64 {
        let mut sum = Sum(0xcbf2_9ce4_8422_2325);
        sum.add(name.as_bytes());
        sum.add(&(data.len() as u64).to_le_bytes());
        sum.add(data);
        sum.0
    }
    fn add(&mut self, data: &[u8]) {
        let (words, rest) = data.as_chunks::<8>();
        for w in words {
            self.0 = (self.0 ^ u64::from_le_bytes(*w)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        for b in rest {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// A section's checksum.
pub fn checksum(name: &str, data: &[u8]) -> u64 {
    Sum::of(name, data)
}

/// Writes sections into a new file; only [`Writer::finish`] puts it in its place, so that a full disk leaves the old file alone.
/// What is there and is no plain file (a device, a pipe) is written to as it is.
pub struct Writer {
    path: PathBuf,
    /// The new file, until it is whole.
    part: Option<PathBuf>,
    file: BufWriter<File>,
}

impl Writer {
    /// Starts a file.
    ///
    /// # Errors
    /// It can't be created.
    pub fn create(path: &Path) -> Result<Writer, StateFileError> {
        let cannot = |e: io::Error| error(path, format!("the state can't be saved there: {e}"));
        let part = Writer::place(path).map_err(cannot)?;
        let file = match &part {
            Some(part) => File::create(part),
            None => File::options().write(true).open(path),
        };
        let file = file.map_err(cannot)?;
        let mut w = Writer { path: path.to_owned(), part, file: BufWriter::with_capacity(1 << 20, file) };
        w.put(MAGIC)?;
        Ok(w)
    }

    /// Where the state goes: the path of the new file, and None when what is there is written to as it is.
    fn place(path: &Path) -> io::Result<Option<PathBuf>> {
        match std::fs::metadata(path) {
            Ok(there) if there.is_dir() => Err(io::Error::from(io::ErrorKind::IsADirectory)),
            Ok(there) if !there.is_file() => Ok(None),
            _ => {
                let mut part = path.as_os_str().to_owned();
                part.push(".part");
                Ok(Some(PathBuf::from(part)))
            }
        }
    }

    fn put(&mut self, data: &[u8]) -> Result<(), StateFileError> {
        self.file.write_all(data).map_err(|e| {
            if let Some(part) = &self.part {
                let _ = std::fs::remove_file(part);
            }
            error(&self.path, format!("the state can't be saved: {e}; is there room on the disk?"))
        })
    }

    /// Writes a section.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn section(&mut self, name: &str, data: &[u8]) -> Result<(), StateFileError> {
        self.begin(name, data.len() as u64)?;
        self.put(data)?;
        self.put(&Sum::of(name, data).to_le_bytes())
    }

    fn begin(&mut self, name: &str, len: u64) -> Result<(), StateFileError> {
        self.put(&[name.len().min(255) as u8])?;
        self.put(&name.as_bytes()[..name.len().min(255)])?;
        self.put(&len.to_le_bytes())
    }

    /// Ends the file and puts it in its place.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn finish(mut self) -> Result<(), StateFileError> {
        self.section("end", &[])?;
        let fail = |e: io::Error| {
            error(&self.path, format!("the state can't be saved: {e}; is there room on the disk?"))
        };
        self.file.flush().map_err(fail)?;
        if let Some(part) = &self.part {
            self.file.get_ref().sync_all().map_err(fail)?;
            std::fs::rename(part, &self.path).map_err(fail)?;
        }
        Ok(())
    }
}

/// Can a state be saved there? Asked before a guest runs for hours.
///
/// # Errors
/// The file can't be created.
pub fn check_place(path: &Path) -> Result<(), StateFileError> {
    let tried = Writer::place(path).and_then(|part| match part {
        Some(part) => File::create(&part).and_then(|_| std::fs::remove_file(&part)),
        None => File::options().write(true).open(path).map(drop),
    });
    tried.map_err(|e| error(path, format!("the state can't be saved there: {e}")))
}

pub(crate) fn error(path: &Path, text: impl Into<String>) -> StateFileError {
    StateFileError { path: path.display().to_string(), text: text.into() }
}

/// Reads sections.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
}

impl Reader {
    /// Opens a file and checks its first line.
    ///
    /// # Errors
    /// It isn't there or is no state file.
    pub fn open(path: &Path) -> Result<Reader, StateFileError> {
        let file =
            File::open(path).map_err(|e| error(path, format!("the saved state can't be read: {e}")))?;
        let mut r = Reader { path: path.to_owned(), file: BufReader::with_capacity(1 << 20, file) };
        let mut magic = [0; 16];
        match r.file.read_exact(&mut magic) {
            Ok(()) if magic == *MAGIC => Ok(r),
            Ok(()) if magic.starts_with(b"HYALINE STATE ") => {
                Err(r.wrong("a saved state of another version; this program reads version 1"))
            }
            _ => Err(r.wrong("no saved state of Hyaline (its first line is wrong)")),
        }
    }

    /// An error about this file.
    pub fn wrong(&self, text: impl Into<String>) -> StateFileError {
        error(&self.path, text)
    }

    fn get(&mut self, buf: &mut [u8], what: &str) -> Result<(), StateFileError> {
        self.file.read_exact(buf).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                error(&self.path, format!("the file ends in the middle of {what}: a truncated copy?"))
            }
            _ => error(&self.path, format!("{what} can't be read: {e}")),
        })
    }

    /// The next section, or None after the last one.
    ///
    /// # Errors
    /// The file is truncated or damaged.
    pub fn next_section(&mut self) -> Result<Option<(String, Vec<u8>)>, StateFileError> {
        let mut n = [0];
        self.get(&mut n, "a section's name")?;
        let mut name = vec![0; usize::from(n[0])];
        self.get(&mut name, "a section's name")?;
        let name = String::from_utf8(name).map_err(|_| self.wrong("a section's name is damaged"))?;
        let mut len = [0; 8];
        self.get(&mut len, "a section's length")?;
        let len = u64::from_le_bytes(len);
        if len > MAX_SECTION {
            return Err(self.wrong(format!(
                "section `{name}` claims {len} bytes, more than any section has: the file is damaged"
            )));
        }
        let mut data = vec![0; len as usize];
        self.get(&mut data, &format!("section `{name}`"))?;
        let mut want = [0; 8];
        self.get(&mut want, &format!("the checksum of section `{name}`"))?;
        if Sum::of(&name, &data) != u64::from_le_bytes(want) {
            return Err(self.wrong(format!("section `{name}` is damaged: its checksum does not match")));
        }
        Ok(if name == "end" { None } else { Some((name, data)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("hyaline-state-{}-{name}", std::process::id()))
    }

    fn write(path: &Path) {
        let mut w = Writer::create(path).unwrap();
        w.section("a", b"hello there, state").unwrap();
        w.section("b", &[]).unwrap();
        w.finish().unwrap();
    }

    fn read_all(path: &Path) -> Result<Vec<(String, Vec<u8>)>, StateFileError> {
        let mut r = Reader::open(path)?;
        let mut all = Vec::new();
        while let Some(s) = r.next_section()? {
            all.push(s);
        }
        Ok(all)
    }

    #[test]
    fn what_is_written_is_read() {
        let path = temp("rw");
        write(&path);
        let all = read_all(&path).unwrap();
        assert_eq!(all, [("a".to_string(), b"hello there, state".to_vec()), ("b".to_string(), vec![])]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let path = temp("bad");
        write(&path);
        let good = std::fs::read(&path).unwrap();
        for i in 0..good.len() {
            std::fs::write(&path, &good[..i]).unwrap();
            assert!(read_all(&path).is_err(), "cut at {i}");
        }
        for i in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[i / 8] ^= 1 << (i % 8);
            std::fs::write(&path, &bad).unwrap();
            assert!(read_all(&path).is_err(), "bit {i}");
        }
        std::fs::remove_file(path).unwrap();
    }
}
