//! The text of QEMU's `info mtree -f`: the machine's flat views, which turn guesses about an address into facts.

use std::io::BufRead;

/// A range of a flat view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Address space names that use the view (`I/O`, `memory`, ...).
    pub spaces: Vec<String>,
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
    /// `i/o`, `ram`, `rom`, `ramd`.
    pub kind: String,
    /// Name of the region.
    pub name: String,
    /// Offset of the range in its region (`@...`).
    pub offset: u64,
}

/// Reads the text; unknown lines are skipped.
///
/// # Errors
/// Those of the underlying reader.
pub fn parse(input: impl BufRead) -> std::io::Result<Vec<Range>> {
    let mut out = Vec::new();
    let mut spaces: Vec<String> = Vec::new();
    let mut open = false;
    for line in input.lines().take(200_000) {
        let line = line?;
        let t = line.trim().trim_start_matches("(qemu) ");
        if t.starts_with("FlatView #") {
            spaces.clear();
            open = true;
            continue;
        }
        if let Some(r) = t.strip_prefix("AS \"").or_else(|| t.strip_prefix("address-space: ")) {
            if !open {
                spaces.clear();
            }
            if let Some(n) = r.split('"').next() {
                spaces.push(n.trim_end_matches(',').to_owned());
            }
            continue;
        }
        if let Some(r) = range(t) {
            open = false;
            if out.len() < 100_000 {
                out.push(Range { spaces: spaces.clone(), ..r });
            }
        }
    }
    Ok(out)
}

fn range(t: &str) -> Option<Range> {
    let (span, rest) = t.split_once(" (prio ")?;
    let (a, b) = span.trim().split_once('-')?;
    let start = u64::from_str_radix(a.trim(), 16).ok()?;
    let end = u64::from_str_radix(b.trim(), 16).ok()?;
    let (attr, name) = rest.split_once("): ")?;
    let kind = attr.split(", ").nth(1).unwrap_or("").to_owned();
    let name = name.trim();
    let (name, offset) = match name.rsplit_once(" @") {
        Some((n, o)) => {
            let o = o.split_whitespace().next().unwrap_or("");
            (n, u64::from_str_radix(o, 16).ok().unwrap_or(0))
        }
        None => (name, 0),
    };
    (start <= end).then(|| Range { spaces: Vec::new(), start, end, kind, name: name.to_owned(), offset })
}

/// The range that answers at an address.
pub fn find(ranges: &[Range], pio: bool, addr: u64) -> Option<&Range> {
    ranges.iter().find(|r| {
        let io = r.spaces.iter().any(|s| s == "I/O");
        let unknown = r.spaces.is_empty();
        (unknown || io == pio) && (r.start..=r.end).contains(&addr)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_view() {
        let t = "FlatView #0\n AS \"I/O\", root: io\n Root memory region: io\n  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\n  000000000000c000-000000000000c03f (prio 1, i/o): virtio-pci\n\nFlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n  00000000febd5000-00000000febd50ff (prio 1, i/o): msix @0000000000000010\n";
        let r = parse(t.as_bytes()).expect("reads");
        assert_eq!(r.len(), 3);
        assert_eq!(find(&r, true, 0xc012).map(|r| r.name.as_str()), Some("virtio-pci"));
        assert_eq!(find(&r, false, 0xfebd_5004).map(|r| r.offset), Some(0x10));
        assert_eq!(find(&r, false, 0xc012), None);
    }
}
