//! Guests that others wrote: fetched from Debian by package name into a cache, and packed into initramfs images.
//!
//! Nothing of them is part of this project. What is in the cache is used without asking anybody; only what is missing is downloaded,
//! with the system's own `apt-get`.

mod cpio;

pub use cpio::Cpio;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why a guest can't be had.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FetchError(String);

fn fail<T>(text: impl Into<String>) -> Result<T, FetchError> {
    Err(FetchError(text.into()))
}

/// A folder with unpacked packages.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// `linux-image-cloud-amd64`: drivers for virtual machines only; small.
    Cloud,
    /// `linux-image-amd64`: the kernel of ordinary machines.
    Full,
}

impl Kernel {
    /// The package whose dependency is the newest kernel of this kind.
    pub fn meta_package(self) -> &'static str {
        match self {
            Kernel::Cloud => "linux-image-cloud-amd64",
            Kernel::Full => "linux-image-amd64",
        }
    }
}

impl Cache {
    /// The user's cache: `HYALINE_CACHE`, else `hyaline` in `XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn open() -> Result<Cache, FetchError> {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let dir = var("HYALINE_CACHE")
            .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("hyaline")))
            .or_else(|| var("HOME").map(|d| d.join(".cache/hyaline")))
            .ok_or_else(|| {
                FetchError("there is no place for a cache: set HYALINE_CACHE to a folder".into())
            })?;
        Cache::at(dir)
    }

    /// A cache in a folder.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn at(dir: PathBuf) -> Result<Cache, FetchError> {
        match std::fs::create_dir_all(&dir) {
            Ok(()) => Ok(Cache { dir }),
            Err(e) => fail(format!(
                "the cache {} can't be made: {e}; set HYALINE_CACHE to a folder that can be written",
                dir.display()
            )),
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A package's unpacked files, downloaded if they aren't there. `say` is told what is being done when that takes time.
    ///
    /// # Errors
    /// The package can't be downloaded or unpacked: what to do about it.
    pub fn package(&self, name: &str, say: &dyn Fn(&str)) -> Result<PathBuf, FetchError> {
        let dir = self.dir.join(name);
        if dir.is_dir() {
            return Ok(dir);
        }
        if !has("apt-get") || !has("dpkg-deb") {
            return fail(format!(
                "the package `{name}` is not in the cache {} and there is no apt-get on this system to get it with; name the files by options instead",
                self.dir.display()
            ));
        }
        say(&format!("getting the Debian package {name}"));
        let work = self.dir.join(format!(".{name}.{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&work);
        let unpacked = work.join("files");
        let result = std::fs::create_dir_all(&unpacked)
            .map_err(|e| FetchError(format!("{}: {e}", unpacked.display())))
            .and_then(|()| download(&work, name))
            .and_then(|deb| {
                run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&unpacked), &format!("unpacking {name}"))
            });
        let done = result.and_then(|()| match std::fs::rename(&unpacked, &dir) {
            // Another process may have been faster.
            Err(e) if !dir.is_dir() => fail(format!("{}: {e}", dir.display())),
            _ => Ok(dir.clone()),
        });
        let _ = std::fs::remove_dir_all(&work);
        done
    }

    /// A file of a package.
    ///
    /// # Errors
    /// See [`Cache::package`]; or the package has no such file.
    pub fn file(&self, package: &str, path: &str, say: &dyn Fn(&str)) -> Result<PathBuf, FetchError> {
        let file = self.package(package, say)?.join(path);
        if file.is_file() { Ok(file) } else { fail(format!("the package `{package}` has no file {path}")) }
    }

    /// A kernel image: the one in the cache, else the newest that the package lists know.
    ///
    /// # Errors
    /// See [`Cache::package`].
    pub fn kernel(&self, kind: Kernel, say: &dyn Fn(&str)) -> Result<PathBuf, FetchError> {
        self.boot_file(kind.meta_package(), "vmlinuz", say)
    }

    /// The Xen hypervisor, as the ELF file that a multiboot loader starts.
    ///
    /// # Errors
    /// See [`Cache::package`].
    pub fn xen(&self, say: &dyn Fn(&str)) -> Result<PathBuf, FetchError> {
        let packed = self.boot_file("xen-system-amd64", "xen-", say)?;
        let file = packed.with_extension("elf");
        if !file.is_file() {
            let out = Command::new("gzip")
                .arg("-dc")
                .arg(&packed)
                .stdin(Stdio::null())
                .output()
                .ok()
                .filter(|out| out.status.success())
                .ok_or_else(|| FetchError(format!("{} can't be unpacked with gzip", packed.display())))?;
            // Another process must never see half of it.
            let part = packed.with_extension(format!("{}", std::process::id()));
            std::fs::write(&part, out.stdout)
                .and_then(|()| std::fs::rename(&part, &file))
                .map_err(|e| FetchError(format!("{}: {e}", file.display())))?;
        }
        Ok(file)
    }

    /// A file in the boot folder of the package that a meta package depends on: the one in the cache, else the newest that the package
    /// lists know.
    fn boot_file(&self, meta: &str, start: &str, say: &dyn Fn(&str)) -> Result<PathBuf, FetchError> {
        let marker = self.dir.join(format!("{meta}.name"));
        let known = std::fs::read_to_string(&marker).ok().map(|name| name.trim().to_string());
        let package = match known.filter(|name| self.dir.join(name).is_dir()) {
            Some(name) => name,
            None => newest(meta)?,
        };
        let boot = self.package(&package, say)?.join("boot");
        let mut images: Vec<PathBuf> = std::fs::read_dir(&boot)
            .map_err(|e| FetchError(format!("{}: {e}", boot.display())))?
            .flatten()
            .map(|e| e.path())
            .filter(|p| {
                let name = p.file_name().unwrap_or_default().to_string_lossy().into_owned();
                name.starts_with(start) && !name.ends_with(".elf") && !name.ends_with(".config")
            })
            .collect();
        images.sort();
        let image = images.pop().ok_or_else(|| {
            FetchError(format!("the package `{package}` has no {start}… in its boot folder"))
        })?;
        let _ = std::fs::write(marker, &package);
        Ok(image)
    }

    /// A statically linked busybox.
    ///
    /// # Errors
    /// See [`Cache::package`].
    pub fn busybox(&self, say: &dyn Fn(&str)) -> Result<PathBuf, FetchError> {
        self.file("busybox-static", "bin/busybox", say)
    }
}

/// The shell script that our initramfs images start: it mounts what a shell expects and runs `last`.
pub fn init_script(last: &str) -> String {
    format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin HOME=/ PS1='~ # '\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         mount -t devtmpfs dev /dev 2>/dev/null\n\
         {last}\n"
    )
}

/// An initramfs with busybox and an init script that ends in `last`.
///
/// # Errors
/// The busybox can't be read.
pub fn initramfs(busybox: &Path, last: &str) -> Result<Vec<u8>, FetchError> {
    let program = std::fs::read(busybox).map_err(|e| FetchError(format!("{}: {e}", busybox.display())))?;
    let mut c = Cpio::new();
    for dir in ["bin", "proc", "sys", "dev", "tmp", "root"] {
        c.dir(dir);
    }
    c.node("dev/console", 0o600, 5, 1);
    c.file("bin/busybox", 0o755, &program);
    c.file("init", 0o755, init_script(last).as_bytes());
    Ok(c.finish())
}

fn has(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|d| d.join(program).is_file()))
}

fn run(command: &mut Command, what: &str) -> Result<(), FetchError> {
    let out = command.stdin(Stdio::null()).output().map_err(|e| FetchError(format!("{what}: {e}")))?;
    if out.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&out.stderr);
    let last: Vec<&str> = errors.lines().filter(|l| !l.trim().is_empty()).collect();
    fail(format!("{what} failed: {}", last.last().map_or("no message", |l| l.trim())))
}

/// Downloads a package file into a folder. Where the package lists are missing or old they are updated once, which needs root.
fn download(dir: &Path, name: &str) -> Result<PathBuf, FetchError> {
    let get = || {
        let mut c = Command::new("apt-get");
        // Run as root, apt would drop to a user who can't write here, and say so.
        c.args(["-q", "-o", "APT::Sandbox::User=root", "download", name]).current_dir(dir);
        run(&mut c, &format!("apt-get download {name}"))
    };
    if let Err(first) = get() {
        update().map_err(|e| {
            FetchError(format!(
                "{first}; and the package lists can't be updated: {e}. As root: apt-get update"
            ))
        })?;
        get()?;
    }
    let mut files = std::fs::read_dir(dir)
        .map_err(|e| FetchError(format!("{}: {e}", dir.display())))?
        .flatten()
        .map(|e| e.path());
    files
        .find(|p| p.extension().is_some_and(|x| x == "deb"))
        .ok_or_else(|| FetchError(format!("apt-get download {name} left no file")))
}

fn update() -> Result<(), FetchError> {
    run(Command::new("apt-get").args(["-q", "update"]), "apt-get update")
}

/// The package that a meta package depends on first.
fn newest(meta: &str) -> Result<String, FetchError> {
    let ask = || -> Option<String> {
        let out = Command::new("apt-cache").args(["depends", meta]).stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let name = text.lines().find_map(|l| l.trim().strip_prefix("Depends: "))?;
        Some(name.trim().to_string())
    };
    if !has("apt-cache") {
        return fail(format!(
            "what `{meta}` stands for is not in the cache and there is no apt on this system; name files of your own with -kernel"
        ));
    }
    if let Some(name) = ask() {
        return Ok(name);
    }
    update().map_err(|e| {
        FetchError(format!("no package list knows `{meta}`, and {e}. As root: apt-get update"))
    })?;
    ask().ok_or_else(|| {
        FetchError(format!("no package list knows `{meta}`: is this a Debian system for amd64?"))
    })
}
