//! From a guest instruction's bytes to the same instruction for 64-bit mode with its memory operand at `[rsi]` and its
//! general registers replaced by scratch ones (SDM vol. 2, chapter 2).

/// The parts of an encoded instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts<'a> {
    /// 66 prefix.
    pub operand_size: bool,
    /// F2 or F3, the last one.
    pub repeat: Option<u8>,
    /// How registers are extended and which map the opcode is in.
    pub form: Form,
    /// Opcode.
    pub opcode: u8,
    /// ModRM, if there is one.
    pub modrm: Option<u8>,
    /// Immediate bytes after ModRM, SIB and displacement.
    pub immediate: &'a [u8],
}

/// Encoding forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Legacy prefixes; REX (0x40 when absent) and the escape bytes 0f, 0f 38 or 0f 3a (none for x87).
    Legacy { rex: u8, escape: &'static [u8] },
    /// VEX, always as its three-byte payload `RXBmmmmm WvvvvLpp`.
    Vex([u8; 2]),
    /// EVEX payload.
    Evex([u8; 3]),
}

/// Splits an instruction that was already decoded successfully. None: not a form that this module executes.
pub(super) fn split(bytes: &[u8], bits: u32) -> Option<Parts<'_>> {
    let mut rest = bytes;
    let mut take = || {
        let (&first, tail) = rest.split_first()?;
        rest = tail;
        Some(first)
    };
    let (mut operand_size, mut repeat) = (false, None);
    let mut byte = take()?;
    loop {
        match byte {
            0x66 => operand_size = true,
            0xf2 | 0xf3 => repeat = Some(byte),
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 | 0xf0 => {}
            _ => break,
        }
        byte = take()?;
    }
    let mut rex = 0x40;
    // A REX prefix counts only directly before the opcode; the decoder accepted the bytes, so what follows one is
    // either the opcode or a prefix that voids it.
    while bits == 64 && byte & 0xf0 == 0x40 {
        rex = byte;
        byte = take()?;
        while matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3) {
            match byte {
                0x66 => operand_size = true,
                0xf2 | 0xf3 => repeat = Some(byte),
                _ => {}
            }
            rex = 0x40;
            byte = take()?;
        }
    }
    let (form, opcode) = match byte {
        0xc4 => (Form::Vex([take()?, take()?]), take()?),
        0xc5 => {
            let p = take()?;
            // R vvvv L pp -> R 1 1 00001, 0 vvvv L pp.
            (Form::Vex([p & 0x80 | 0x61, p & 0x7f]), take()?)
        }
        0x62 => (Form::Evex([take()?, take()?, take()?]), take()?),
        0x0f => match take()? {
            0x38 => (Form::Legacy { rex, escape: &[0x0f, 0x38] }, take()?),
            0x3a => (Form::Legacy { rex, escape: &[0x0f, 0x3a] }, take()?),
            opcode => (Form::Legacy { rex, escape: &[0x0f] }, opcode),
        },
        0xd8..=0xdf => (Form::Legacy { rex: 0x40, escape: &[] }, byte),
        _ => return None,
    };
    // EMMS, VZEROUPPER, VZEROALL: no ModRM.
    let first_map = match form {
        Form::Legacy { escape, .. } => escape.len() == 1,
        Form::Vex(p) => p[0] & 0x1f == 1,
        Form::Evex(_) => false,
    };
    if opcode == 0x77 && first_map {
        return Some(Parts { operand_size, repeat, form, opcode, modrm: None, immediate: rest });
    }
    let (&modrm, mut rest) = rest.split_first()?;
    let address_16 = match (bits, bytes.contains_address_size_prefix()) {
        (64, _) => false,
        (32, prefix) => prefix,
        (_, prefix) => !prefix,
    };
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let skip = if mode == 3 {
        0
    } else if address_16 {
        match (mode, rm) {
            (0, 6) | (2, _) => 2,
            (0, _) => 0,
            _ => 1,
        }
    } else {
        let sib = rm == 4;
        let base = if sib { *rest.first()? & 7 } else { rm };
        usize::from(sib)
            + match (mode, base) {
                (0, 5) | (2, _) => 4,
                (0, _) => 0,
                _ => 1,
            }
    };
    rest = rest.get(skip..)?;
    Some(Parts { operand_size, repeat, form, opcode, modrm: Some(modrm), immediate: rest })
}

trait Prefixes {
    fn contains_address_size_prefix(&self) -> bool;
}

impl Prefixes for [u8] {
    fn contains_address_size_prefix(&self) -> bool {
        self.iter()
            .take_while(|b| {
                matches!(
                    b,
                    0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x40..=0x4f
                )
            })
            .any(|&b| b == 0x67)
    }
}

/// How to rewrite an instruction.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rewrite {
    /// The guest ran in 64-bit mode: register extension bits count.
    pub long: bool,
    /// ModRM.rm is memory: put `[rsi]` there.
    pub memory: bool,
    /// ModRM.reg is a general register: put this one there.
    pub reg: Option<u8>,
    /// ModRM.rm is a general register: put this one there.
    pub rm: Option<u8>,
    /// Outside 64-bit mode W is ignored when a general register is involved.
    pub clear_w: bool,
}

/// Encodes the rewritten instruction.
pub(super) fn encode(parts: &Parts<'_>, how: Rewrite) -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    let modrm = parts.modrm.map(|m| {
        let reg = how.reg.unwrap_or(m >> 3 & 7);
        let low = if how.memory { 6 } else { m & 0xc0 | how.rm.unwrap_or(m & 7) };
        reg << 3 | low
    });
    // Extension bits to clear, as REX.R and REX.X|B; the other forms hold them inverted.
    let drop_r = how.reg.is_some() || !how.long;
    let drop_xb = how.memory || how.rm.is_some() || !how.long;
    match parts.form {
        Form::Legacy { rex, escape } => {
            if parts.operand_size && !escape.is_empty() {
                out.push(0x66);
            }
            out.extend(parts.repeat.filter(|_| !escape.is_empty()));
            let mut rex = rex & if drop_r { !4 } else { !0 } & if drop_xb { !3 } else { !0 };
            if how.clear_w {
                rex &= !8;
            }
            if rex != 0x40 {
                out.push(rex);
            }
            out.extend_from_slice(escape);
        }
        Form::Vex([mut p0, mut p1]) => {
            p0 |= if drop_r { 0x80 } else { 0 } | if drop_xb { 0x60 } else { 0 };
            if !how.long {
                p1 |= 0x40;
            }
            if how.clear_w {
                p1 &= 0x7f;
            }
            out.extend([0xc4, p0, p1]);
        }
        Form::Evex([mut p0, mut p1, mut p2]) => {
            p0 |= if drop_r { 0x90 } else { 0 } | if drop_xb { 0x60 } else { 0 };
            if !how.long {
                p1 |= 0x40;
                p2 |= 0x08;
            }
            if how.clear_w {
                p1 &= 0x7f;
            }
            out.extend([0x62, p0, p1, p2]);
        }
    }
    out.push(parts.opcode);
    out.extend(modrm);
    // Outside 64-bit mode bit 7 of a register in an immediate is ignored; such an immediate is recognised by the caller
    // through `long`, other immediates keep all their bits.
    out.extend_from_slice(parts.immediate);
    out
}
