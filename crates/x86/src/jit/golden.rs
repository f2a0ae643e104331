//! How long translations are: a golden file with the host code that tier 1 makes of fixed guest blocks, so that a longer translation
//! shows in a diff. A line is: bits of the mode, the block's bytes, host instructions, bytes of host code, and the block as text. To add
//! a block write a line with bits and bytes; `HYALINE_BLESS=1 cargo test -p hyaline-x86 golden` fills in the rest.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/jit/golden.txt");

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let (pairs, rest) = digits.as_ref()?.as_chunks::<2>();
    (rest.is_empty() && !pairs.is_empty()).then(|| pairs.iter().map(|[a, b]| a << 4 | b).collect())
}

/// The line as it should be; None when this host's processor model lacks an instruction.
fn line(bits: u32, hex: &str) -> Option<String> {
    let code = bytes(hex).unwrap_or_else(|| panic!("`{hex}` is no code"));
    let (guest, host) = super::emitted(bits, &code)?;
    let count = Decoder::with_ip(64, &host, 0x1000_0000, DecoderOptions::NONE).iter().count();
    let mut formatter = GasFormatter::new();
    let mut text = Vec::new();
    for g in guest {
        let mut one = String::new();
        formatter.format(&g.iced, &mut one);
        text.push(one);
    }
    Some(format!("{bits} {hex:<34} {count:>4} {:>5}  {}", host.len(), text.join("; ")))
}

#[test]
fn translations_are_as_long_as_the_golden_file_says() {
    let there = std::fs::read_to_string(FILE).unwrap();
    let renewed: Vec<String> = there
        .lines()
        .map(|old| {
            let mut words = old.split_whitespace();
            let bits = words.next().and_then(|w| w.parse().ok());
            match (bits, words.next()) {
                (Some(bits @ (32 | 64)), Some(hex)) => line(bits, hex).unwrap_or_else(|| old.into()),
                _ => old.into(),
            }
        })
        .collect();
    assert!(renewed.len() >= 60);
    if std::env::var_os("HYALINE_BLESS").is_some_and(|v| v == "1") {
        std::fs::write(FILE, renewed.join("\n") + "\n").unwrap();
        return;
    }
    let changed: Vec<String> =
        there.lines().zip(&renewed).filter(|(a, b)| a != b).map(|(a, b)| format!("- {a}\n+ {b}")).collect();
    assert!(
        changed.is_empty(),
        "translations changed: if that is meant, run `HYALINE_BLESS=1 cargo test -p hyaline-x86 golden` and commit the difference\n{}",
        changed.join("\n")
    );
}
