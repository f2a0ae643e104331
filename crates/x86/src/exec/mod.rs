//! The integer instructions: one handler per operation, operand form and width, chosen when a block is decoded.
//!
//! Sources: SDM volume 2; flags that the manuals call undefined are left as recent processors leave them, where that is known.

mod alu;
mod bits;
mod branch;
mod data;
pub(crate) mod flags;
mod misc;
mod muldiv;
mod shift;
mod string;

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, insn_flag};
use crate::fault::Exec;
use crate::state::Seg;
use crate::sys::cpuid::CpuModel;
use alu::Form;
use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind, Register};

/// A generic handler's instance for an operand size in bytes.
macro_rules! sized {
    ($size:expr, $f:ident [$($g:tt),*]) => {
        match $size {
            1 => $f::<$($g,)* u8>,
            2 => $f::<$($g,)* u16>,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
}
use sized;

/// The same for instructions that have no 8-bit form.
macro_rules! wide {
    ($size:expr, $f:ident [$($g:tt),*]) => {
        match $size {
            2 => $f::<$($g,)* u16>,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
}

/// An expression for a condition code known as a constant.
macro_rules! by_condition {
    ($c:expr, $name:ident, $e:expr) => {
        by_condition!(@ $c, $name, $e, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    };
    (@ $c:expr, $name:ident, $e:expr, $($n:literal)*) => {
        match $c {
            $($n => { const $name: u8 = $n; $e })*
            _ => { const $name: u8 = 15; $e }
        }
    };
}

/// Whether an instruction ends its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It doesn't.
    No,
    /// It does, and only goes elsewhere.
    Plain,
    /// It does, and may change anything.
    System,
}

fn is_memory(i: &Instruction, n: u32) -> bool {
    i.op_kind(n) == OpKind::Memory
}
fn is_register(i: &Instruction, n: u32) -> bool {
    i.op_kind(n) == OpKind::Register
}
fn is_gpr(i: &Instruction, n: u32) -> bool {
    is_register(i, n) && i.op_register(n).is_gpr()
}
/// Bytes of an operand.
fn operand_size(i: &Instruction, n: u32) -> u8 {
    if is_register(i, n) { i.op_register(n).size() as u8 } else { i.memory_size().size() as u8 }
}
/// Bytes of a near branch's target.
fn branch_size(i: &Instruction) -> u8 {
    match i.op_kind(0) {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    }
}
fn form(i: &Instruction) -> Form {
    match (is_memory(i, 0), is_register(i, 1), is_memory(i, 1)) {
        (true, true, _) => Form::Mr,
        (true, false, _) => Form::Mi,
        (false, true, _) => Form::Rr,
        (false, _, true) => Form::Rm,
        _ => Form::Ri,
    }
}

fn extend(i: &Instruction, signed: bool) -> Handler {
    use data::{movsx_m, movsx_r, movzx_m, movzx_r};
    let (from, to) = (operand_size(i, 1), operand_size(i, 0));
    let memory = is_memory(i, 1);
    match (signed, memory, from) {
        (false, false, 1) => wide!(to, movzx_r[u8]),
        (false, false, _) => wide!(to, movzx_r[u16]),
        (false, true, 1) => wide!(to, movzx_m[u8]),
        (false, true, _) => wide!(to, movzx_m[u16]),
        (true, false, 1) => wide!(to, movsx_r[u8]),
        (true, false, 2) => wide!(to, movsx_r[u16]),
        (true, false, _) => wide!(to, movsx_r[u32]),
        (true, true, 1) => wide!(to, movsx_m[u8]),
        (true, true, 2) => wide!(to, movsx_m[u16]),
        (true, true, _) => wide!(to, movsx_m[u32]),
    }
}

fn mov(i: &Instruction, insn: &Insn) -> Option<(Handler, End)> {
    use data::*;
    let segment = |n| is_register(i, n) && i.op_register(n).is_segment_register();
    if segment(0) {
        let end = if i.op_register(0) == Register::SS { End::System } else { End::No };
        return Some((mov_to_seg, end));
    }
    if segment(1) {
        return Some((mov_from_seg, End::No));
    }
    // Control, debug and test registers are not ours.
    if (is_register(i, 0) && !is_gpr(i, 0)) || (is_register(i, 1) && !is_gpr(i, 1)) {
        return None;
    }
    let size = insn.size;
    let handler: Handler = match form(i) {
        Form::Rr => sized!(size, mov_rr[]),
        Form::Ri => sized!(size, mov_ri[]),
        Form::Rm => sized!(size, mov_rm[]),
        Form::Mr => sized!(size, mov_mr[]),
        Form::Mi => sized!(size, mov_mi[]),
    };
    Some((handler, End::No))
}

fn push_pop(i: &Instruction) -> (Handler, End) {
    use data::*;
    let size = i.stack_pointer_increment().unsigned_abs() as u8;
    let push = i.mnemonic() == Mnemonic::Push;
    let segment = is_register(i, 0) && i.op_register(0).is_segment_register();
    let handler: Handler = match (push, is_memory(i, 0), is_register(i, 0), segment) {
        (true, _, _, true) => wide!(size, push_seg[]),
        (true, true, ..) => wide!(size, push_m[]),
        (true, _, true, _) => wide!(size, push_r[]),
        (true, ..) => wide!(size, push_i[]),
        (false, _, _, true) => wide!(size, pop_seg[]),
        (false, true, ..) => wide!(size, pop_m[]),
        (false, ..) => wide!(size, pop_r[]),
    };
    let stack = segment && !push && i.op_register(0) == Register::SS;
    (handler, if stack { End::System } else { End::No })
}

fn lds(cpu: &mut Cpu, i: &Insn) -> Exec {
    data::load_far_pointer(cpu, i, Seg::Ds)
}
fn les(cpu: &mut Cpu, i: &Insn) -> Exec {
    data::load_far_pointer(cpu, i, Seg::Es)
}
fn lfs(cpu: &mut Cpu, i: &Insn) -> Exec {
    data::load_far_pointer(cpu, i, Seg::Fs)
}
fn lgs(cpu: &mut Cpu, i: &Insn) -> Exec {
    data::load_far_pointer(cpu, i, Seg::Gs)
}
fn lss(cpu: &mut Cpu, i: &Insn) -> Exec {
    data::load_far_pointer(cpu, i, Seg::Ss)
}

/// Instructions whose encodings do nothing, or something else, on processors that don't have them: hints in the NOP space, and TZCNT and LZCNT,
/// which are BSF and BSR there.
pub(crate) fn whatever_the_model(i: &Instruction, insn: &mut Insn, model: &CpuModel) -> Option<Handler> {
    use Mnemonic as M;
    let size = operand_size_or(i);
    if matches!(i.mnemonic(), M::Pause | M::Nop)
        && !insn.is_mem()
        && i.op_count() == 0
        && insn.bytes().last() == Some(&0x90)
        && has_rex_b(insn)
    {
        // 0x90 is XCHG with rAX, whatever its prefixes: with REX.B the other register is R8.
        use data::xchg_rr;
        insn.r1 = 8;
        return Some(wide!(insn.osize, xchg_rr[]));
    }
    match i.mnemonic() {
        // AMD processors have 0F 0D as prefetches of memory only.
        M::Reservednop
            if model.is_amd()
                && matches!(
                    i.code(),
                    Code::Reservednop_rm16_r16_0F0D
                        | Code::Reservednop_rm32_r32_0F0D
                        | Code::Reservednop_rm64_r64_0F0D
                ) =>
        {
            Some(misc::undefined)
        }
        M::Endbr32 | M::Endbr64 | M::Cldemote | M::Reservednop | M::Nop | M::Pause => Some(misc::nop),
        M::Prefetch
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1 => Some(misc::nop),
        M::Rdsspd | M::Rdsspq => Some(misc::nop),
        M::Bndcl | M::Bndcn | M::Bndcu | M::Bndldx | M::Bndmk | M::Bndmov | M::Bndstx => Some(misc::nop),
        M::Tzcnt if !model.has(CpuidFeature::BMI1) => Some({
            use bits::bsf;
            wide!(size, bsf[])
        }),
        M::Lzcnt if !model.has(CpuidFeature::LZCNT) => Some({
            use bits::bsr;
            wide!(size, bsr[])
        }),
        _ => None,
    }
}
/// Whether the byte before the one-byte opcode is a REX prefix with B set.
fn has_rex_b(insn: &Insn) -> bool {
    let before = insn.bytes().iter().rev().nth(1);
    insn.has(insn_flag::LONG) && before.is_some_and(|b| b & 0xf1 == 0x41)
}
fn operand_size_or(i: &Instruction) -> u8 {
    if i.op_count() > 0 { operand_size(i, 0) } else { 0 }
}

fn arithmetic(i: &Instruction, insn: &Insn) -> Option<Handler> {
    use Mnemonic as M;
    use alu::*;
    let size = insn.size;
    let memory = is_memory(i, 0);
    let form = form(i);
    let itself = form == Form::Rr && insn.r0 == insn.r1;
    Some(match i.mnemonic() {
        M::Xor | M::Sub if itself => clear_register(size),
        M::Test | M::And | M::Or if itself && i.mnemonic() == M::Test => test_register(size),
        M::Add => pick::<Add>(form, size),
        M::Adc => pick::<Adc>(form, size),
        M::Sub => pick::<Sub>(form, size),
        M::Sbb => pick::<Sbb>(form, size),
        M::Cmp => pick::<Cmp>(form, size),
        M::And => pick::<And>(form, size),
        M::Or => pick::<Or>(form, size),
        M::Xor => pick::<Xor>(form, size),
        M::Test => pick::<Test>(form, size),
        M::Inc => pick_unary::<Inc>(memory, size),
        M::Dec => pick_unary::<Dec>(memory, size),
        M::Neg => pick_unary::<Neg>(memory, size),
        M::Not => pick_unary::<Not>(memory, size),
        M::Adcx => wide!(size, adcx[]),
        M::Adox => wide!(size, adox[]),
        M::Xadd => sized!(size, xadd[]),
        M::Cmpxchg => sized!(size, cmpxchg[]),
        _ => return None,
    })
}

fn shifts(i: &Instruction, insn: &Insn) -> Option<Handler> {
    use Mnemonic as M;
    use shift::*;
    let size = insn.size;
    let memory = is_memory(i, 0);
    let cl = i.op_count() > 1 && is_register(i, 1);
    Some(match i.mnemonic() {
        M::Shl | M::Sal => pick::<Shl>(memory, cl, size),
        M::Shr => pick::<Shr>(memory, cl, size),
        M::Sar => pick::<Sar>(memory, cl, size),
        M::Rol => pick::<Rol>(memory, cl, size),
        M::Ror => pick::<Ror>(memory, cl, size),
        M::Rcl => pick::<Rcl>(memory, cl, size),
        M::Rcr => pick::<Rcr>(memory, cl, size),
        M::Shld => wide!(size, double[true]),
        M::Shrd => wide!(size, double[false]),
        _ => return None,
    })
}

fn multiply(i: &Instruction, insn: &Insn) -> Option<Handler> {
    use Mnemonic as M;
    use muldiv::*;
    let size = insn.size;
    Some(match i.mnemonic() {
        M::Mul => sized!(size, mul[]),
        M::Imul => match i.op_count() {
            1 => sized!(size, imul1[]),
            2 => wide!(size, imul2[]),
            _ => wide!(size, imul3[]),
        },
        M::Div => sized!(size, div[]),
        M::Idiv => sized!(size, idiv[]),
        _ => return None,
    })
}

fn bit_instructions(i: &Instruction, insn: &Insn) -> Option<Handler> {
    use Mnemonic as M;
    use bits::*;
    let size = insn.size;
    let register = i.op_count() > 1 && is_register(i, 1);
    Some(match i.mnemonic() {
        M::Bt if register => wide!(size, bt[0, false]),
        M::Bt => wide!(size, bt[0, true]),
        M::Bts if register => wide!(size, bt[1, false]),
        M::Bts => wide!(size, bt[1, true]),
        M::Btr if register => wide!(size, bt[2, false]),
        M::Btr => wide!(size, bt[2, true]),
        M::Btc if register => wide!(size, bt[3, false]),
        M::Btc => wide!(size, bt[3, true]),
        M::Bsf => wide!(size, bsf[]),
        M::Bsr => wide!(size, bsr[]),
        M::Tzcnt => wide!(size, tzcnt[]),
        M::Lzcnt => wide!(size, lzcnt[]),
        M::Popcnt => wide!(size, popcnt[]),
        M::Crc32 => sized!(operand_size(i, 1), crc32[]),
        M::Andn => wide!(size, andn[]),
        M::Bextr => wide!(size, bextr[]),
        M::Blsi => wide!(size, blsi[]),
        M::Blsmsk => wide!(size, blsmsk[]),
        M::Blsr => wide!(size, blsr[]),
        M::Bzhi => wide!(size, bzhi[]),
        M::Mulx => wide!(size, mulx[]),
        M::Pdep => wide!(size, pdep[]),
        M::Pext => wide!(size, pext[]),
        M::Rorx => wide!(size, rorx[]),
        M::Sarx => wide!(size, shiftx[0]),
        M::Shlx => wide!(size, shiftx[1]),
        M::Shrx => wide!(size, shiftx[2]),
        _ => return None,
    })
}

fn branches(i: &Instruction, insn: &Insn, amd: bool) -> Option<Handler> {
    use Mnemonic as M;
    use branch::*;
    if i.is_jcc_short_or_near() {
        let condition = (i.condition_code() as u8).wrapping_sub(1);
        return Some(by_condition!(condition, C, wide!(branch_size(i), jcc[C])));
    }
    let near = matches!(i.op_kind(0), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    Some(match i.mnemonic() {
        M::Jmp if near => wide!(branch_size(i), jmp[]),
        M::Call if near => wide!(branch_size(i), call[]),
        M::Jmp if i.is_jmp_near_indirect() => wide!(insn.size, jmp_rm[]),
        M::Call if i.is_call_near_indirect() => wide!(insn.size, call_rm[]),
        M::Ret => match i.code() {
            Code::Retnw | Code::Retnw_imm16 => ret::<u16>,
            Code::Retnd | Code::Retnd_imm16 => ret::<u32>,
            _ => ret::<u64>,
        },
        // On AMD processors a repeat prefix replaces the condition.
        M::Loope if amd && insn.has(insn_flag::REPNE) => wide!(branch_size(i), loops[2]),
        M::Loopne if amd && insn.has(insn_flag::REP) => wide!(branch_size(i), loops[1]),
        M::Loop => wide!(branch_size(i), loops[0]),
        M::Loope => wide!(branch_size(i), loops[1]),
        M::Loopne => wide!(branch_size(i), loops[2]),
        M::Jcxz | M::Jecxz | M::Jrcxz => wide!(branch_size(i), jcxz[]),
        _ => return None,
    })
}

fn strings(i: &Instruction, insn: &Insn) -> Option<(Handler, End)> {
    use Mnemonic as M;
    use string::*;
    if !i.is_string_instruction() {
        return None;
    }
    let size = insn.size;
    let handler: Handler = match i.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => sized!(size, movs[]),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => sized!(size, stos[]),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => sized!(size, lods[]),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => sized!(size, cmps[]),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => sized!(size, scas[]),
        _ => return None,
    };
    let repeated = insn.has(insn_flag::REP | insn_flag::REPNE);
    Some((handler, if repeated { End::Plain } else { End::No }))
}

fn others(i: &Instruction, insn: &Insn) -> Option<Handler> {
    use Mnemonic as M;
    use data::*;
    use misc::*;
    let size = insn.size;
    Some(match i.mnemonic() {
        M::Lea => wide!(size, lea[]),
        M::Movzx => extend(i, false),
        M::Movsx | M::Movsxd => extend(i, true),
        M::Xchg if is_memory(i, 0) => sized!(size, xchg_m[]),
        M::Xchg => sized!(size, xchg_rr[]),
        M::Movnti | M::Movdiri => wide!(size, mov_mr[]),
        M::Pusha => pusha::<u16>,
        M::Pushad => pusha::<u32>,
        M::Popa => popa::<u16>,
        M::Popad => popa::<u32>,
        M::Enter => match i.code() {
            Code::Enterw_imm16_imm8 => enter::<u16>,
            Code::Enterd_imm16_imm8 => enter::<u32>,
            _ => enter::<u64>,
        },
        M::Leave => match i.code() {
            Code::Leavew => leave::<u16>,
            Code::Leaved => leave::<u32>,
            _ => leave::<u64>,
        },
        M::Movbe if is_memory(i, 0) => wide!(size, movbe_store[]),
        M::Movbe => wide!(size, movbe_load[]),
        M::Bswap => wide!(size, bswap[]),
        M::Xlatb => xlat,
        M::Bound => wide!(size, bound[]),
        M::Cmpxchg8b => cmpxchg8b,
        M::Cmpxchg16b => cmpxchg16b,
        M::Lds => lds,
        M::Les => les,
        M::Lfs => lfs,
        M::Lgs => lgs,
        M::Cbw => cbw,
        M::Cwde => cwde,
        M::Cdqe => cdqe,
        M::Cwd => cwd,
        M::Cdq => cdq,
        M::Cqo => cqo,
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Clc => clc,
        M::Stc => stc,
        M::Cmc => cmc,
        M::Cld => cld,
        M::Std => std,
        M::Salc => salc,
        M::Daa => daa,
        M::Das => das,
        M::Aaa => aaa,
        M::Aas => aas,
        M::Aam => aam,
        M::Aad => aad,
        M::Ud0 | M::Ud1 | M::Ud2 => undefined,
        M::Mfence | M::Lfence | M::Sfence | M::Serialize => fence,
        M::Clflush | M::Clflushopt | M::Clwb => flush_line,
        M::Rdtsc => rdtsc,
        M::Rdtscp => rdtscp,
        M::Rdpid => rdpid,
        M::Rdrand | M::Rdseed => random,
        M::Clac => set_ac::<false>,
        M::Stac => set_ac::<true>,
        _ => return None,
    })
}

fn conditional(i: &Instruction, insn: &Insn) -> Option<Handler> {
    use data::{cmov_m, cmov_r, setcc};
    let condition = (i.condition_code() as u8).checked_sub(1)?;
    if is_cmov(i.mnemonic()) {
        return Some(if is_memory(i, 1) {
            by_condition!(condition, C, wide!(insn.size, cmov_m[C]))
        } else {
            by_condition!(condition, C, wide!(insn.size, cmov_r[C]))
        });
    }
    is_setcc(i.mnemonic()).then(|| by_condition!(condition, C, setcc::<C> as Handler))
}

pub(crate) fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}
pub(crate) fn is_setcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}

/// The handler of an instruction by its form, and whether it ends its block; None when it isn't one of these.
pub(crate) fn handler(i: &Instruction, insn: &Insn, amd: bool) -> Option<(Handler, End)> {
    match i.mnemonic() {
        Mnemonic::Mov => return mov(i, insn),
        Mnemonic::Push | Mnemonic::Pop => return Some(push_pop(i)),
        Mnemonic::Lss => return Some((lss, End::System)),
        _ => {}
    }
    if let Some(found) = strings(i, insn) {
        return Some(found);
    }
    if let Some(handler) = branches(i, insn, amd) {
        return Some((handler, End::Plain));
    }
    arithmetic(i, insn)
        .or_else(|| shifts(i, insn))
        .or_else(|| multiply(i, insn))
        .or_else(|| bit_instructions(i, insn))
        .or_else(|| conditional(i, insn))
        .or_else(|| others(i, insn))
        .map(|handler| (handler, End::No))
}
