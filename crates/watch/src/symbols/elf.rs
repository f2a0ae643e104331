//! Symbols as an ELF file (System V ABI, "Object Files"; AMD64 supplement), for debuggers: a symbol table, and sections without contents where
//! the kernel has its code and data, because debuggers only believe symbols that lie in one.

use super::Symbols;

/// Sizes of the ELF-64 structures.
const HEADER: usize = 64;
const SECTION: usize = 64;
const SYMBOL: usize = 24;

const SHT_SYMTAB: u32 = 2;
const SHT_STRTAB: u32 = 3;
const SHT_NOBITS: u32 = 8;
const SHF_WRITE: u64 = 1;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const SHN_ABS: u16 = 0xfff1;
const STT_OBJECT: u8 = 1;
const STT_FUNC: u8 = 2;

struct Section {
    name: &'static str,
    kind: u32,
    flags: u64,
    at: u64,
    size: u64,
    offset: u64,
    link: u32,
    info: u32,
    entry: u64,
}

/// A string table under construction.
#[derive(Default)]
struct Strings(Vec<u8>);

impl Strings {
    fn add(&mut self, text: &str) -> u32 {
        if self.0.is_empty() {
            self.0.push(0);
        }
        let at = self.0.len() as u32;
        self.0.extend(text.bytes().filter(|b| *b != 0));
        self.0.push(0);
        at
    }
}

/// Where the kernel has what: between the marks that its linker script sets.
fn places(s: &Symbols) -> Vec<Section> {
    let at = |name: &str| s.address(name);
    let mut list = Vec::new();
    let mut add = |name, flags, from: Option<u64>, to: Option<u64>| {
        if let (Some(from), Some(to)) = (from, to)
            && from < to
            && to - from < 1 << 31
        {
            let size = to - from;
            list.push(Section {
                name,
                kind: SHT_NOBITS,
                flags: flags | SHF_ALLOC,
                at: from,
                size,
                offset: HEADER as u64,
                link: 0,
                info: 0,
                entry: 0,
            });
        }
    };
    let code = s.code();
    let (first, last) = (at("_text").or(code.map(|c| c.0)), at("_etext").or(code.map(|c| c.1 + 1)));
    add(".text", SHF_EXECINSTR, first, last);
    let (init, end) = (at("_sinittext"), at("_einittext"));
    add(".init.text", SHF_EXECINSTR, init, end);
    match (init, end) {
        (Some(i), Some(e)) => {
            add(".data", SHF_WRITE, last, Some(i));
            add(".bss", SHF_WRITE, Some(e), at("_end").or(at("__brk_limit")));
        }
        _ => add(".data", SHF_WRITE, last, at("_end")),
    }
    list
}

pub(super) fn write(s: &Symbols) -> Vec<u8> {
    let mut sections =
        vec![Section { name: "", kind: 0, flags: 0, at: 0, size: 0, offset: 0, link: 0, info: 0, entry: 0 }];
    sections.extend(places(s));
    let within = |addr: u64| {
        let hit = sections.iter().position(|x| x.kind == SHT_NOBITS && addr.wrapping_sub(x.at) < x.size);
        hit.map_or(SHN_ABS, |n| n as u16)
    };
    let mut names = Strings::default();
    let mut all: Vec<(u64, bool, &str)> = s.iter().collect();
    all.sort_by(|a, b| (a.0, a.2).cmp(&(b.0, b.2)));
    let mut table = vec![0; SYMBOL];
    for (i, (addr, code, name)) in all.iter().enumerate() {
        // A function ends where the next symbol begins; of what follows data nothing is known.
        let next = all.get(i + 1..).unwrap_or(&[]).iter().find(|n| n.0 > *addr);
        let size = next.map_or(0, |n| n.0 - addr).min(super::LONGEST);
        table.extend(names.add(name).to_le_bytes());
        // Bound globally, so that none hides another.
        table.push(1 << 4 | if *code { STT_FUNC } else { STT_OBJECT });
        table.push(0);
        table.extend(within(*addr).to_le_bytes());
        table.extend(addr.to_le_bytes());
        table.extend((if *code { size } else { 0 }).to_le_bytes());
    }
    let symtab = HEADER as u64;
    let strtab = symtab + table.len() as u64;
    let count = sections.len() as u32;
    let plain = |name, kind, offset, size, link, info, entry| Section {
        name,
        kind,
        flags: 0,
        at: 0,
        size,
        offset,
        link,
        info,
        entry,
    };
    // The first symbol that is not local: all but the empty one.
    sections.push(plain(".symtab", SHT_SYMTAB, symtab, table.len() as u64, count + 1, 1, SYMBOL as u64));
    sections.push(plain(".strtab", SHT_STRTAB, strtab, names.0.len() as u64, 0, 0, 0));
    let mut titles = Strings::default();
    let mut name_at: Vec<u32> = sections.iter().map(|x| titles.add(x.name)).collect();
    name_at.push(titles.add(".shstrtab"));
    let shstrtab = strtab + names.0.len() as u64;
    sections.push(plain(".shstrtab", SHT_STRTAB, shstrtab, titles.0.len() as u64, 0, 0, 0));
    let headers = (shstrtab + titles.0.len() as u64).next_multiple_of(8);

    let mut out = Vec::new();
    out.extend(b"\x7fELF\x02\x01\x01");
    out.resize(16, 0);
    // An executable for x86-64.
    out.extend(2u16.to_le_bytes());
    out.extend(62u16.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    out.extend(s.address("startup_64").unwrap_or(0).to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend(headers.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    for n in [HEADER as u16, 0, 0, SECTION as u16, sections.len() as u16, sections.len() as u16 - 1] {
        out.extend(n.to_le_bytes());
    }
    out.extend(table);
    out.extend(names.0);
    out.extend(titles.0);
    out.resize(headers as usize, 0);
    for (x, name) in sections.iter().zip(name_at) {
        out.extend(name.to_le_bytes());
        out.extend(x.kind.to_le_bytes());
        for n in [x.flags, x.at, x.offset, x.size] {
            out.extend(n.to_le_bytes());
        }
        out.extend(x.link.to_le_bytes());
        out.extend(x.info.to_le_bytes());
        out.extend((if x.kind == 0 { 0u64 } else { 8 }).to_le_bytes());
        out.extend(x.entry.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::{Object, ObjectSection, ObjectSymbol};

    #[test]
    fn what_is_written_is_read_again() {
        const K: u64 = 0xffff_ffff_8100_0000;
        let map = "ffffffff81000000 T _text\nffffffff81000000 T startup_64\nffffffff81000010 t helper\nffffffff81000400 T _etext\n\
                   ffffffff82000000 D jiffies\nffffffff83000000 T _sinittext\nffffffff83000040 T start_kernel\nffffffff83001000 T _einittext\n\
                   ffffffff83002000 B brk\nffffffff83004000 B _end\n0000000000012340 D this_cpu_off\n";
        let before = Symbols::from_map(map, "m").unwrap();
        let bytes = before.to_elf();
        let after = Symbols::from_elf(&bytes, "again").unwrap();
        for name in ["startup_64", "helper", "start_kernel", "jiffies", "this_cpu_off", "_sinittext"] {
            assert_eq!(after.address(name), before.address(name), "{name}");
        }
        assert_eq!(after.at(K + 0x14).as_deref(), Some("helper+0x4"));
        let file = object::File::parse(&*bytes).unwrap();
        let section = |name: &str| {
            let s = file.section_by_name(name).unwrap_or_else(|| panic!("no {name}"));
            (s.address(), s.size())
        };
        assert_eq!(section(".text"), (K, 0x400));
        assert_eq!(section(".init.text"), (0xffff_ffff_8300_0000, 0x1000));
        assert_eq!(section(".data"), (K + 0x400, 0x1ff_fc00));
        let helper = file.symbols().find(|s| s.name() == Ok("helper")).unwrap();
        assert_eq!(helper.size(), 0x3f0);
    }
}
