//! Archives in the "newc" format that Linux unpacks as its first root file system (Linux:
//! Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive being made. All entries belong to root and carry no time, so that equal contents make equal archives.
#[derive(Debug, Default)]
pub struct Cpio {
    data: Vec<u8>,
    inode: u32,
}

const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHAR: u32 = 0o020_000;

impl Cpio {
    /// An empty archive.
    pub fn new() -> Cpio {
        Cpio::default()
    }
    /// Adds a folder.
    pub fn dir(&mut self, name: &str) {
        self.entry(name, DIR | 0o755, (0, 0), &[]);
    }
    /// Adds a file.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, FILE | mode, (0, 0), content);
    }
    /// Adds a character device.
    pub fn node(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.entry(name, CHAR | mode, (major, minor), &[]);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.data.extend(b"070701");
        for f in fields {
            self.data.extend(format!("{f:08x}").as_bytes());
        }
        self.data.extend(name.as_bytes());
        self.data.push(0);
        self.pad();
        self.data.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.data.resize(self.data.len().next_multiple_of(4), 0);
    }

    /// The archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.data.resize(self.data.len().next_multiple_of(512), 0);
        self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_110_bytes_and_everything_is_padded() {
        let mut c = Cpio::new();
        c.dir("d");
        c.file("d/f", 0o644, b"hello");
        let a = c.finish();
        assert_eq!(a.len() % 512, 0);
        assert_eq!(&a[..6], b"070701");
        // A folder: 110 + 2 bytes of name = 112, no content.
        assert_eq!(&a[112..118], b"070701");
        assert_eq!(&a[112 + 110..112 + 114], b"d/f\0");
        // 110 + 4 = 114, padded to 116.
        assert_eq!(&a[112 + 116..112 + 121], b"hello");
        assert_eq!(&a[112 + 124..112 + 130], b"070701");
    }
}
