//! A processor's state as text, in the shape that QEMU's `info registers` gives it.

use hyaline_x86::state::{Activity, CpuState, Segment, efer, flag};
use std::fmt::Write;

/// Names of the general registers in encoding order.
const NAMES: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13", "R14",
    "R15",
];

/// The privilege level: what the stack segment's descriptor says; 0 in real mode, 3 in virtual-8086 mode.
fn cpl(s: &CpuState) -> u8 {
    if s.cr0 & 1 == 0 {
        0
    } else if s.rflags & flag::VM != 0 {
        3
    } else {
        s.seg[2].dpl()
    }
}

/// The mode in words.
pub fn mode(s: &CpuState) -> &'static str {
    match (s.cr0 & 1 != 0, s.efer & efer::LMA != 0, s.rflags & flag::VM != 0) {
        (false, ..) => "real mode",
        (true, _, true) => "virtual-8086 mode",
        (true, true, _) if s.seg[1].long() => "64-bit mode",
        (true, true, _) => "compatibility mode",
        (true, false, _) if s.seg[1].big() => "32-bit protected mode",
        _ => "16-bit protected mode",
    }
}

/// Registers, segments, tables and control registers.
pub fn text(index: u8, s: &CpuState) -> String {
    let mut t = String::new();
    let _ = writeln!(t, "CPU#{index} in {}, {} instructions executed", mode(s), s.icount);
    // QEMU's order: rax rbx rcx rdx rsi rdi rbp rsp.
    for row in [[0, 3, 1, 2], [6, 7, 5, 4], [8, 9, 10, 11], [12, 13, 14, 15]] {
        let cells: Vec<String> = row.iter().map(|&r| format!("{}={:016x}", NAMES[r], s.gpr[r])).collect();
        let _ = writeln!(t, "{}", cells.join(" "));
    }
    let mut flags = String::new();
    for (bit, c) in [
        (flag::DF, 'D'),
        (flag::OF, 'O'),
        (flag::SF, 'S'),
        (flag::ZF, 'Z'),
        (flag::AF, 'A'),
        (flag::PF, 'P'),
        (flag::CF, 'C'),
    ] {
        flags.push(if s.rflags & bit != 0 { c } else { '-' });
    }
    let halted = u8::from(s.activity == Activity::Halted);
    let _ = writeln!(
        t,
        "RIP={:016x} RFL={:08x} [{flags}] CPL={} SMM={} HLT={halted} IF={}",
        s.rip,
        s.rflags,
        cpl(s),
        u8::from(s.smm),
        u8::from(s.rflags & flag::IF != 0)
    );
    for (name, seg) in ["ES", "CS", "SS", "DS", "FS", "GS"].iter().zip(&s.seg) {
        let _ = writeln!(t, "{}", segment(name, seg));
    }
    let _ = writeln!(t, "{}\n{}", segment("LDT", &s.ldtr), segment("TR", &s.tr));
    let _ = writeln!(
        t,
        "GDT= {:016x} {:08x}\nIDT= {:016x} {:08x}",
        s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit
    );
    let _ = writeln!(t, "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}", s.cr0, s.cr2, s.cr3, s.cr4);
    let _ = write!(t, "EFER={:016x}", s.efer);
    t
}

fn segment(name: &str, s: &Segment) -> String {
    let kind = match (s.unusable, s.is_code_or_data(), s.kind() & 8 != 0) {
        (true, ..) => "unusable".to_string(),
        (_, false, _) => format!("system type {}", s.kind()),
        (_, _, true) => format!(
            "code{} DPL={}",
            if s.long() {
                "64"
            } else if s.big() {
                "32"
            } else {
                "16"
            },
            s.dpl()
        ),
        _ => format!("data DPL={}", s.dpl()),
    };
    format!("{name:<3}={:04x} {:016x} {:08x} {:04x} {kind}", s.selector, s.base, s.limit, s.attr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_state_reads_right() {
        let t = text(0, &CpuState::at_reset(true));
        assert!(
            t.contains("real mode") && t.contains("CS =f000 00000000ffff0000 0000ffff 009b code16 DPL=0"),
            "{t}"
        );
        assert!(t.contains("RIP=000000000000fff0 RFL=00000002"), "{t}");
    }
}
