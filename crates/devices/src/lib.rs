//! Every chip of the machine, one file each.
//!
//! A file reads from top to bottom: the head (a [`Chip`]: manual, what is and isn't modelled, deviations), the
//! registers, the state that is saved, the logic, the glue to the [context](hyaline_device::Cx), the tests.

pub mod firmware;
pub mod input;
pub mod intc;
pub mod net;
pub mod pci;
pub mod power;
pub mod serial;
pub mod test;
pub mod timer;

use hyaline_device::Chip;

/// The heads of all chips, by name.
pub fn chips() -> Vec<&'static Chip> {
    let mut chips = vec![
        &firmware::fw_cfg::CHIP,
        &input::i8042::CHIP,
        &input::port92::CHIP,
        &intc::cerr::CHIP,
        &intc::i8259::CHIP,
        &intc::ioapic::CHIP,
        &intc::lapic::CHIP,
        &net::pcnet::CHIP,
        &pci::i440fx::CHIP,
        &pci::piix3::CHIP,
        &power::piix4_pm::CHIP,
        &serial::debugcon::CHIP,
        &serial::ns16550::CHIP,
        &test::isa_debug_exit::CHIP,
        &test::pc_testdev::CHIP,
        &test::pci_testdev::CHIP,
        &test::pvpanic::CHIP,
        &timer::hpet::CHIP,
        &timer::i8254::CHIP,
        &timer::mc146818::CHIP,
    ];
    chips.sort_by_key(|c| c.name);
    chips
}

/// The index page of `docs/devices/`.
pub fn index_page() -> String {
    let mut s = String::from(
        "# Devices\n\nOne page for each chip, made from its declaration in `crates/devices/`: what is modelled, what is not, every register.\n\
         `HYALINE_BLESS=1 cargo test -p hyaline-devices pages` writes the pages anew; the tests compare them.\n\n\
         | page | chip | manual |\n|---|---|---|\n",
    );
    for c in chips() {
        s.push_str(&format!("| [{0}]({0}.md) | {1} | {2} |\n", c.name, c.title, c.manual));
    }
    s
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("the sources can be read").flatten() {
            let path = entry.path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn every_chip_is_listed() {
        let mut files = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        let heads = files.iter().filter(|f| {
            let text = fs::read_to_string(f).unwrap_or_default();
            text.lines().any(|l| l.starts_with("pub static CHIP: Chip"))
        });
        assert_eq!(heads.count(), chips().len(), "a file with a CHIP is missing in chips()");
        let names: BTreeSet<_> = chips().iter().map(|c| c.name).collect();
        assert_eq!(names.len(), chips().len(), "two chips of one name");
    }

    /// Tables are hand-written: what a compiler can't see is checked here.
    #[test]
    fn declarations_make_sense() {
        for chip in chips() {
            for bank in chip.banks {
                let indexed = bank.place == hyaline_device::Place::Indexed;
                for r in bank.registers {
                    let at = format!("{}.{}.{}", chip.name, bank.name, r.name);
                    let end = r.offset + if indexed { 1 } else { u64::from(r.width) };
                    assert!(end <= bank.size, "{at} lies past the end of its bank");
                    assert!(!r.section.is_empty() && !r.doc.is_empty(), "{at} has no section or no text");
                    assert_eq!(
                        r.reset & !r.full_mask(),
                        0,
                        "{at}: the reset value is wider than the register"
                    );
                    let mut seen = 0;
                    for f in r.fields {
                        let fits = u32::from(f.lsb) + u32::from(f.width) <= u32::from(r.width) * 8;
                        assert!(fits && f.width > 0, "{at}.{} lies outside", f.name);
                        assert_eq!(seen & f.mask(), 0, "{at}.{} overlaps another field", f.name);
                        seen |= f.mask();
                        let top = f.mask() >> f.lsb;
                        assert!(
                            f.values.iter().all(|(v, _)| *v <= top),
                            "{at}.{}: a named value doesn't fit",
                            f.name
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn pages_are_up_to_date() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/devices");
        let mut pages: Vec<_> = chips().iter().map(|c| (format!("{}.md", c.name), c.markdown())).collect();
        pages.push(("README.md".to_string(), index_page()));
        if std::env::var_os("HYALINE_BLESS").is_some_and(|v| v == "1") {
            fs::create_dir_all(&folder).expect("docs/devices can be made");
            for (name, text) in &pages {
                fs::write(folder.join(name), text).expect("a page can be written");
            }
        }
        let hint = "run `HYALINE_BLESS=1 cargo test -p hyaline-devices pages` and look at the difference";
        for (name, text) in &pages {
            let there = fs::read_to_string(folder.join(name)).unwrap_or_default();
            assert!(there == *text, "docs/devices/{name} is not what the declarations say: {hint}");
        }
        let wanted: BTreeSet<_> = pages.iter().map(|(n, _)| n.clone()).collect();
        let there = fs::read_dir(&folder).expect("docs/devices can be read").flatten();
        for name in there.map(|e| e.file_name().to_string_lossy().into_owned()) {
            assert!(wanted.contains(&name), "docs/devices/{name} is of no chip: delete it");
        }
    }
}
