//! Compares the two outcomes of a case.

use crate::case::{Case, DATA, Outcome, PAGE};
use crate::generate::undefined_flags;
use iced_x86::{Code, Instruction, Mnemonic};
use std::fmt::Write;

/// RFLAGS bits that are compared: arithmetic flags, DF, NT, AC and ID. TF and RF belong to the method of stepping, IF and IOPL
/// can't change in user mode.
const FLAGS: u64 = 0x8d5 | 0x400 | 0x4000 | 1 << 18 | 1 << 21;

/// Bytes of an image in memory that processors fill differently: instruction and data pointers, and reserved fields.
#[allow(clippy::single_range_in_vec_init, reason = "the ranges are the data; one image has a single one")]
fn ignored_bytes(code: Code) -> &'static [std::ops::Range<usize>] {
    match code {
        // AMD's processors save FIP, FDP and FOP only with a pending exception.
        Code::Fnstenv_m28byte | Code::Fnsave_m108byte => &[2..4, 6..8, 10..28],
        Code::Fnstenv_m14byte | Code::Fnsave_m94byte => &[6..14],
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => &[6..24, 28..32, 416..512],
        _ => &[],
    }
}

/// RFLAGS bits that the manuals leave undefined where iced's table doesn't say so, each with its reason.
fn more_undefined(i: &Instruction) -> u64 {
    match i.mnemonic() {
        // SDM vol. 2: OF is undefined for counts other than 1, AF always for shifts of a count other than 0; counts in CL
        // aren't known to the decoder.
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr => 0x800,
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar => 0x810,
        // Counts above the operand size leave everything undefined; OF for counts other than 1.
        Mnemonic::Shld | Mnemonic::Shrd => 0x810,
        _ => 0,
    }
}

/// The differences, one a line; empty when there are none.
pub fn differences(case: &Case, i: &Instruction, host: &Outcome, ours: &mut Outcome) -> String {
    let mut out = String::new();
    let mut differ = |what: &str, host: &dyn std::fmt::Display, ours: &dyn std::fmt::Display| {
        let _ = writeln!(out, "    {what}: host {host}, interpreter {ours}");
    };
    let hex = |v: u64| format!("{v:#x}");
    // Bytes that are no instruction and run into the unmapped page: where the decoder gives up is the processor's choice.
    if (i.is_invalid() || matches!(i.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1)) && case.placed < 15 {
        return out;
    }
    if vendors_choice(case, i, host, ours) {
        return out;
    }
    let vector = |v: Option<u8>| v.map_or("none".to_string(), |v| format!("{v}"));
    if host.vector != ours.vector {
        differ("exception", &vector(host.vector), &vector(ours.vector));
        return out;
    }
    // Linux reports every fault of a user on the upper half as one of a present page.
    let hidden = u32::from(host.cr2 >= 0x7fff_ffff_f000);
    // Which byte of a large or masked operand is found to fault is the processor's choice.
    #[rustfmt::skip]
    let anywhere = matches!(
        i.mnemonic(),
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64
            | Mnemonic::Fnstenv | Mnemonic::Fldenv | Mnemonic::Fnsave | Mnemonic::Frstor
            | Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu
    );
    if (host.error ^ ours.error) & !hidden != 0 && !anywhere {
        differ("error code", &hex(host.error.into()), &hex(ours.error.into()));
    }
    if host.cr2 != ours.cr2 && !anywhere {
        differ("CR2", &hex(host.cr2), &hex(ours.cr2));
    }
    let (h, o) = (&host.after, &mut ours.after);
    // AMD's processors switch to MMX (TOP, tags) before some faults of these, the manuals' order says after.
    let early_mmx = matches!(
        i.mnemonic(),
        Mnemonic::Maskmovq
            | Mnemonic::Cvtps2pi
            | Mnemonic::Cvttps2pi
            | Mnemonic::Cvtpd2pi
            | Mnemonic::Cvttpd2pi
            | Mnemonic::Cvtpi2ps
    );
    if host.vector.is_some() && early_mmx {
        (o.fsw, o.ftw) = (h.fsw, h.ftw);
    }
    let o = &*o;
    let names = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    // BSF and BSR of zero leave the destination as AMD says and Intel's processors do, so it is compared.
    for (n, name) in names.iter().enumerate() {
        if h.gpr[n] != o.gpr[n] {
            differ(name, &hex(h.gpr[n]), &hex(o.gpr[n]));
        }
    }
    if h.rip != o.rip {
        differ("rip", &hex(h.rip), &hex(o.rip));
    }
    let undefined = if host.vector.is_none() { undefined_flags(i) | more_undefined(i) } else { 0 };
    let flags = FLAGS & !undefined;
    if (h.rflags ^ o.rflags) & flags != 0 {
        differ(
            "rflags",
            &hex(h.rflags & FLAGS),
            &format!("{:#x} (compared {flags:#x}, before {:#x})", o.rflags & FLAGS, case.before.rflags),
        );
    }
    for n in 0..32 {
        if h.vec[n] != o.vec[n] {
            let show =
                |v: &[u64; 8]| v.iter().rev().map(|q| format!("{q:016x}")).collect::<Vec<_>>().join("_");
            differ(&format!("zmm{n}"), &show(&h.vec[n]), &show(&o.vec[n]));
        }
    }
    for n in 0..8 {
        if h.opmask[n] != o.opmask[n] {
            differ(&format!("k{n}"), &hex(h.opmask[n]), &hex(o.opmask[n]));
        }
        if (h.significand[n], h.exponent[n]) != (o.significand[n], o.exponent[n]) {
            let show =
                |r: &crate::case::Registers| format!("{:04x}:{:016x}", r.exponent[n], r.significand[n]);
            differ(&format!("x87 R{n}"), &show(h), &show(o));
        }
    }
    // With an unmasked overflow or underflow the host rounds as if the exponent had no bounds, and PE says whether that was
    // inexact. The interpreter's thunks run with all masked, so theirs may be set although it isn't.
    let fired = h.mxcsr & !(h.mxcsr >> 7) & 0x18 != 0;
    let precision = match i.mnemonic() {
        _ if host.vector != Some(19) => 0,
        // Several operations after each other: the flags are those of the operation that faulted and of earlier ones.
        Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd => 0x3f,
        _ if fired => 0x20,
        _ => 0,
    };
    for (name, a, b) in [
        ("mxcsr", h.mxcsr & !precision, o.mxcsr & !precision),
        ("fcw", h.fcw.into(), o.fcw.into()),
        ("fsw", h.fsw.into(), o.fsw.into()),
        ("ftw", h.ftw.into(), o.ftw.into()),
    ] {
        if a != b {
            differ(name, &hex(a.into()), &hex(b.into()));
        }
    }
    if host.changed || ours.changed {
        memory(case, i, host, ours, &mut differ);
    }
    out
}

fn memory(
    case: &Case,
    i: &Instruction,
    host: &Outcome,
    ours: &Outcome,
    differ: &mut dyn FnMut(&str, &dyn std::fmt::Display, &dyn std::fmt::Display),
) {
    if host.changed != ours.changed {
        differ("memory changed", &host.changed, &ours.changed);
        return;
    }
    let operand = operand(case, i).unwrap_or(0);
    let mut shown = 0;
    for n in 0..2 * PAGE {
        if host.data[n] == ours.data[n] {
            continue;
        }
        let within = (DATA + n as u64).wrapping_sub(operand) as usize;
        if ignored_bytes(i.code()).iter().any(|r| r.contains(&within)) {
            continue;
        }
        // PUSHF pushes the TF that steps the host.
        if matches!(i.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq)
            && host.data[n] ^ ours.data[n] == 1
        {
            continue;
        }
        differ(&format!("memory at {:#x}", DATA + n as u64), &host.data[n], &ours.data[n]);
        shown += 1;
        if shown == 8 {
            break;
        }
    }
}

/// The effective address of the memory operand.
pub fn operand(case: &Case, i: &Instruction) -> Option<u64> {
    let n = (0..i.op_count()).find(|&n| i.op_kind(n) == iced_x86::OpKind::Memory)?;
    i.virtual_address(n, 0, |register, _, _| {
        let full = register.full_register();
        Some(if full.is_gpr() {
            case.before.gpr[full.number()] & (!0 >> (64 - 8 * register.size().min(8)))
        } else {
            0
        })
    })
}

/// Outcomes that differ between processors, or that no manual defines.
fn vendors_choice(case: &Case, i: &Instruction, host: &Outcome, ours: &Outcome) -> bool {
    match i.mnemonic() {
        // With a mask of zeros, whether the page is looked at is left open (SDM vol. 2, MASKMOVDQU).
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => {
            matches!(host.vector, Some(13 | 14)) && ours.vector.is_none()
        }
        // AMD's processors let REPNE turn LOOPE into LOOPNE, and REP the other way round.
        Mnemonic::Loope => i.has_repne_prefix(),
        Mnemonic::Loopne => i.has_rep_prefix(),
        // Whether the target or the stack is checked first (Intel's manual: the target).
        Mnemonic::Call => host.vector == Some(14) && ours.vector == Some(13),
        // Counts above the operand's size leave 16-bit results undefined.
        Mnemonic::Shld | Mnemonic::Shrd => {
            let count = if i.op_kind(2) == iced_x86::OpKind::Register {
                case.before.gpr[1] as u8
            } else {
                i.immediate8()
            };
            matches!(
                i.code(),
                Code::Shld_rm16_r16_imm8
                    | Code::Shld_rm16_r16_CL
                    | Code::Shrd_rm16_r16_imm8
                    | Code::Shrd_rm16_r16_CL
            ) && count & 31 > 16
        }
        // AMD's processors read four bytes for a destination of two.
        Mnemonic::Movsxd => i.code() == Code::Movsxd_r16_rm16 && host.vector == Some(14),
        // AMD's processors have bit 17, misaligned SSE; the models don't.
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => host.vector.is_none() && host.after.mxcsr >> 17 & 1 != 0,
        // Register forms of the prefetch group raise #UD on AMD's processors.
        Mnemonic::Reservednop => host.vector == Some(6) && ours.vector.is_none(),
        // REX.B makes F3 90 an XCHG.
        Mnemonic::Pause => true,
        _ => false,
    }
}
