//! `hyaline-fetch [NAME…]`: gets the guests that tests and demonstrations use into the cache.

use hyaline_fetch::{Cache, FetchError, Kernel};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
usage: hyaline-fetch [NAME…]

Gets guests from Debian's packages into the cache and prints where they are; without names, all of them:

  cloud-kernel  linux-image-cloud-amd64, the kernel for virtual machines
  full-kernel   linux-image-amd64
  busybox       busybox-static
  seabios       seabios
  memtest       memtest86+
  ovmf          ovmf, UEFI firmware
  xen           xen-system-amd64, a hypervisor that multiboot loaders start

What is there already is not fetched again. The cache is HYALINE_CACHE, else hyaline in XDG_CACHE_HOME or ~/.cache.
";

const ALL: [&str; 7] = ["cloud-kernel", "full-kernel", "busybox", "seabios", "memtest", "ovmf", "xen"];

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let mut out = std::io::stdout().lock();
    let mut err = std::io::stderr();
    if names.iter().any(|n| matches!(n.as_str(), "-h" | "-help" | "--help")) {
        let _ = out.write_all(HELP.as_bytes());
        return ExitCode::SUCCESS;
    }
    if let Some(name) = names.iter().find(|n| !ALL.contains(&n.as_str())) {
        let _ = writeln!(err, "hyaline-fetch: there is no guest `{name}`; there are {}", ALL.join(", "));
        return ExitCode::from(2);
    }
    let cache = match Cache::open() {
        Ok(cache) => cache,
        Err(e) => {
            let _ = writeln!(err, "hyaline-fetch: {e}");
            return ExitCode::FAILURE;
        }
    };
    let mut code = ExitCode::SUCCESS;
    for name in ALL.into_iter().filter(|a| names.is_empty() || names.iter().any(|n| n == a)) {
        match get(&cache, name) {
            Ok(path) => drop(writeln!(out, "{name}: {}", path.display())),
            Err(e) => {
                let _ = writeln!(err, "hyaline-fetch: {name}: {e}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

fn get(cache: &Cache, name: &str) -> Result<PathBuf, FetchError> {
    let say = |text: &str| drop(writeln!(std::io::stderr(), "hyaline-fetch: {text}"));
    match name {
        "cloud-kernel" => cache.kernel(Kernel::Cloud, &say),
        "full-kernel" => cache.kernel(Kernel::Full, &say),
        "busybox" => cache.busybox(&say),
        "seabios" => cache.file("seabios", "usr/share/seabios/bios-256k.bin", &say),
        "ovmf" => cache.file("ovmf", "usr/share/ovmf/OVMF.fd", &say),
        "xen" => cache.xen(&say),
        _ => cache.file("memtest86+", "boot/memtest86+x64.bin", &say),
    }
}
