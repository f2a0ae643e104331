//! Instructions that are the same on the host, with registers and the memory operand replaced.

use super::flags::flag_use;
use super::{Guest, Host, Translator, pinned, undefined_here};
use crate::exec::{is_cmov, is_setcc};
use crate::jit::ModeKey;
use crate::jit::asm::{M, r};
use crate::jit::parts::{self, Form, Patch, Place, Rm, What};
use crate::jit::stubs::gpr;
use crate::native::plan::{self, Class};
use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpAccess, OpKind, Register,
};

/// Whether the host has the integer instruction; the model has, or the decoder gave it another handler.
pub(super) fn host_has(i: &Instruction, host: Host) -> bool {
    use Mnemonic as M;
    use std::arch::is_x86_feature_detected as has;
    match i.mnemonic() {
        M::Tzcnt => host.tzcnt,
        // Counts above 16 are undefined, and OF of rotations by more than one; the interpreter has its own mind there.
        M::Shld | M::Shrd | M::Rcl | M::Rcr => match i.op_kind(0) {
            OpKind::Memory => i.memory_size().size() > 2,
            _ => i.op_register(0).size() > 2,
        },
        M::Lzcnt => host.lzcnt,
        M::Popcnt => has!("popcnt"),
        M::Crc32 => has!("sse4.2"),
        M::Movbe => has!("movbe"),
        M::Adcx | M::Adox => has!("adx"),
        M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr => has!("bmi1"),
        M::Bzhi | M::Mulx | M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx => host.bmi2,
        _ => true,
    }
}

impl Translator<'_> {
    /// The class whose availability the mode vouches for; None: not a vector instruction that is translated.
    pub(super) fn class(&self, g: &Guest) -> Option<Class> {
        let i = &g.iced;
        let class = match i.mnemonic() {
            Mnemonic::Vzeroupper => Class::Vex,
            _ => plan::class_of(i.code())?,
        };
        if undefined_here(g) {
            return None;
        }
        let fine = match class {
            Class::Sse => self.mode.has(ModeKey::SSE),
            Class::Vex => self.mode.has(ModeKey::AVX),
            Class::Evex => self.mode.has(ModeKey::AVX512),
            _ => false,
        };
        let vector = |n: u32| {
            i.op_kind(n) == OpKind::Register
                && (i.op_register(n).is_vector_register()
                    || i.op_register(n).is_k()
                    || i.op_register(n).is_mm())
        };
        let any = i.mnemonic() == Mnemonic::Vzeroupper || (0..i.op_count()).any(vector);
        let refused = matches!(
            i.mnemonic(),
            Mnemonic::Maskmovdqu
                | Mnemonic::Vmaskmovdqu
                | Mnemonic::Vmaskmovps
                | Mnemonic::Vmaskmovpd
                | Mnemonic::Vpmaskmovd
                | Mnemonic::Vpmaskmovq
                | Mnemonic::Vzeroall
        ) || i.is_vsib()
            // They change the x87 state, or not, by what their operand is.
            || matches!(i.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Cvtpi2ps | Mnemonic::Cvtpi2pd)
            || (super::x87::mmx(i) && !self.mode.has(ModeKey::X87))
            || (i.op_mask() != Register::None && (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory));
        (fine && any && !refused).then_some(class)
    }

    /// Instructions that are the same for the host, with registers and the memory operand replaced. False: nothing was emitted but
    /// what does no harm, and the instruction isn't one of them.
    pub(super) fn ordinary(&mut self, g: &Guest) -> bool {
        let i = &g.iced;
        let class = self.class(g);
        if class.is_none() && !(integer(i) && host_has(i, self.host)) {
            return false;
        }
        let bits = self.mode.bits();
        let Some(mut p) = parts::split(g.insn.bytes(), bits, i, g.immediate.into()) else { return false };
        p.lock &= self.host.locks;
        // Operands.
        let code = i.code().op_code();
        let mut memory = None;
        let mut gprs: [(Place, u8, bool, bool, usize); 4] = [(Place::Fixed, 0, false, false, 0); 4];
        let mut count = 0;
        let info = self.info.info(i);
        let accesses = [info.op0_access(), info.op1_access(), info.op2_access(), info.op3_access()];
        let mut high = false;
        for n in 0..i.op_count().min(4) {
            let kind = parts::what(code.op_kind(n));
            let access = accesses.get(n as usize).copied().unwrap_or(OpAccess::None);
            let writes = matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            let reads =
                !matches!(access, OpAccess::Write) || matches!(i.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr);
            let place = match kind {
                What::Other => return false,
                What::Memory | What::GprOrMemory | What::VectorOrMemory if i.op_kind(n) == OpKind::Memory => {
                    memory = Some(writes);
                    continue;
                }
                What::GprOrMemory => Place::Rm,
                What::Gpr(place) => place,
                _ => continue,
            };
            let register = i.op_register(n);
            high |= matches!(register, Register::AH | Register::BH | Register::CH | Register::DH);
            let Some(slot) = gprs.get_mut(count) else { return false };
            *slot = (place, crate::decode::register_number(register), reads, writes, register.size());
            count += 1;
        }
        let Some(gprs) = gprs.get_mut(..count) else { return false };
        // Registers beyond the first four of the old ones need REX, which AH to BH don't go with.
        if high && (memory.is_some() || gprs.iter().any(|o| o.1 < 16 && pinned(o.1) != Some(o.1))) {
            return false;
        }
        // Flags.
        let (needs, modified) = flag_use(i);
        let clear_w = bits != 64 && count > 0;
        let mut patch = Patch { clear_w, ..Patch::KEEP };
        // AL to BL need none; SPL, BPL, SIL, DIL do, and whatever was REX before.
        patch.rex = gprs.iter().any(|o| o.4 == 1 && (4..8).contains(&o.1));
        if let Some(writes) = memory {
            let homes: Vec<u8> =
                gprs.iter().map(|o| o.1).filter(|n| *n < 16 && pinned(*n).is_none()).collect();
            if homes.iter().any(|n| Some(n) != homes.first()) {
                return false;
            }
            let size = i.memory_size().size();
            let align = match class {
                Some(class) => plan::alignment(i, class, size).into(),
                None => 1,
            };
            let Some(mut m) = self.operand_at(g, size, align, writes) else { return false };
            if matches!(p.form, Form::Evex(_)) && !matches!(m, M::Base(_, 0)) {
                // Short displacements are scaled there.
                self.a.lea(true, r::T1, m);
                self.groups.let_go();
                m = M::Base(r::T1, 0);
            }
            patch.rm = Rm::Memory(m);
        }
        if needs {
            self.restore();
        }
        // Registers that live in memory.
        let single = memory.is_none() && count > 0 && !matches!(p.form, Form::Evex(_)) && direct(i);
        let mut homes: [Option<(u8, bool)>; 2] = [None; 2];
        let mut temps = if memory.is_some() { vec![r::T0] } else { vec![r::T1, r::T0] };
        for k in 0..gprs.len() {
            let Some(&(place, n, reads, writes, size)) = gprs.get(k) else { break };
            let host = if n >= 16 {
                // AH to BH: ModRM's number is 4 more.
                n - 16 + 4
            } else if let Some(host) = pinned(n) {
                host
            } else {
                let others = gprs.iter().filter(|o| o.1 == n).count();
                if single && place == Place::Rm && others == 1 && (!writes || size == 8) {
                    patch.rm = Rm::Memory(gpr(n.into()));
                    continue;
                }
                match homes.iter().flatten().position(|h| h.0 == n) {
                    Some(0) => {
                        if writes && let Some(h) = homes[0].as_mut() {
                            h.1 = true;
                        }
                        if memory.is_some() { r::T0 } else { r::T1 }
                    }
                    Some(_) => {
                        if writes && let Some(h) = homes[1].as_mut() {
                            h.1 = true;
                        }
                        r::T0
                    }
                    None => {
                        if temps.is_empty() {
                            return false;
                        }
                        let host = temps.remove(0);
                        if host == r::T1 {
                            self.groups.let_go();
                        }
                        let others_read = gprs.iter().any(|o| o.1 == n && o.2);
                        if reads || size < 4 || others_read {
                            self.a.load(true, host, gpr(n.into()));
                        }
                        let at = usize::from(homes[0].is_some());
                        homes[at] = Some((n, writes));
                        host
                    }
                }
            };
            match place {
                Place::Reg => patch.reg = Some(host),
                Place::Rm => patch.rm = Rm::Reg(host),
                Place::Vvvv => patch.vvvv = Some(host),
                Place::Opcode => patch.opcode = Some(host),
                _ => return false,
            }
        }
        let from = self.a.pos();
        parts::emit(&mut self.a, &p, patch);
        // Whatever is run natively must be the very instruction that was meant.
        let emitted = self.a.buf.get(from..).unwrap_or(&[]);
        let mut decoder = Decoder::new(64, emitted, DecoderOptions::NONE);
        let again = decoder.decode();
        let wanted = if i.code() as u16 == again.code() as u16 || alias(i.code()) == again.code() {
            emitted.len()
        } else {
            0
        };
        if again.len() != wanted {
            self.a.buf.truncate(from);
            return false;
        }
        for (k, home) in homes.iter().enumerate() {
            if let Some((n, true)) = home {
                let host = if memory.is_some() || k == 1 { r::T0 } else { r::T1 };
                self.a.store(true, gpr(usize::from(*n)), host);
            }
        }
        if modified != 0 {
            self.set_live();
        }
        true
    }
}

/// What an encoding that 64-bit mode doesn't have is translated to.
pub(super) fn alias(code: Code) -> Code {
    use iced_x86::Code as C;
    match code {
        C::Add_rm8_imm8_82 => C::Add_rm8_imm8,
        C::Or_rm8_imm8_82 => C::Or_rm8_imm8,
        C::Adc_rm8_imm8_82 => C::Adc_rm8_imm8,
        C::Sbb_rm8_imm8_82 => C::Sbb_rm8_imm8,
        C::And_rm8_imm8_82 => C::And_rm8_imm8,
        C::Sub_rm8_imm8_82 => C::Sub_rm8_imm8,
        C::Xor_rm8_imm8_82 => C::Xor_rm8_imm8,
        C::Cmp_rm8_imm8_82 => C::Cmp_rm8_imm8,
        code => code,
    }
}

/// Whether an instruction's register operand in ModRM.rm may just as well be memory.
pub(super) fn direct(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::Cmp
            | M::And
            | M::Or
            | M::Xor
            | M::Test
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Imul
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Mul
    )
}

/// Integer instructions that run on the host as they are.
pub(super) fn integer(i: &Instruction) -> bool {
    use Mnemonic as M;
    if i.code().encoding() == EncodingKind::EVEX {
        return false;
    }
    let register_bit = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && (i.op_kind(0) != OpKind::Memory || i.op_kind(1) != OpKind::Register);
    direct(i)
        || is_cmov(i.mnemonic())
        || is_setcc(i.mnemonic())
        || register_bit
        || matches!(
            i.mnemonic(),
            M::Xchg
                | M::Xadd
                | M::Cmpxchg
                | M::Sal
                | M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
                | M::Shld
                | M::Shrd
                | M::Bsf
                | M::Bsr
                | M::Tzcnt
                | M::Lzcnt
                | M::Popcnt
                | M::Crc32
                | M::Andn
                | M::Bextr
                | M::Blsi
                | M::Blsmsk
                | M::Blsr
                | M::Bzhi
                | M::Mulx
                | M::Pdep
                | M::Pext
                | M::Rorx
                | M::Sarx
                | M::Shlx
                | M::Shrx
                | M::Bswap
                | M::Cbw
                | M::Cwde
                | M::Cdqe
                | M::Cwd
                | M::Cdq
                | M::Cqo
                | M::Lahf
                | M::Sahf
                | M::Clc
                | M::Stc
                | M::Cmc
                | M::Adcx
                | M::Adox
                | M::Movbe
                | M::Movnti
        )
}
