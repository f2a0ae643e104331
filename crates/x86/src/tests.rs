//! Tests of the processor as a whole: memory, paging, blocks, budgets.

use crate::fault::{Exit, Fault};
use crate::state::{Seg, cr0, cr4, flag};
use crate::testing::{long_mode_cpu, protected_cpu, real_cpu};
use crate::{Cpu, Signals};
use hyaline_ram::RamBlock;
use std::sync::Arc;

const CODE: u64 = 0x1000;

fn long(code: &[u8]) -> (Cpu, Arc<RamBlock>) {
    let (cpu, ram) = long_mode_cpu(16 << 20);
    ram.write(CODE, code).expect("inside");
    (cpu, ram)
}

/// Replaces the 2 MiB page at `linear` by a page table at 0x20_0000 whose entries map as before, with the given flags, and gives the
/// table's address.
fn split(cpu: &mut Cpu, ram: &RamBlock, linear: u64, flags: u64) -> u64 {
    let table = 0x20_0000;
    let base = linear & !0x1f_ffff;
    for i in 0..512 {
        ram.store_u64(table + i * 8, (base + i * 0x1000) | flags);
    }
    ram.store_u64(0x10_2000 + (base >> 21) * 8, table | 7);
    cpu.flush_tlb(true);
    table
}

#[test]
fn budgets_are_exact_whatever_the_steps() {
    // mov ecx, 1000; l: add rax, rcx; push rax; pop rdx; dec ecx; jnz l; jmp $
    let code = [0xb9, 0xe8, 3, 0, 0, 0x48, 0x01, 0xc8, 0x50, 0x5a, 0xff, 0xc9, 0x75, 0xf7, 0xeb, 0xfe];
    let (mut whole, _ram) = long(&code);
    assert_eq!(whole.run(3333), Exit::Budget);
    assert_eq!(whole.state.icount, 3333);
    let (mut steps, _ram) = long(&code);
    for _ in 0..3333 {
        assert_eq!(steps.step(), Exit::Budget);
    }
    assert_eq!(steps.state, whole.state);
    let (mut odd, _ram) = long(&code);
    for n in [1, 7, 100, 13, 0, 3000, 212] {
        assert_eq!(odd.run(n), Exit::Budget);
    }
    assert_eq!(odd.state, whole.state);
    assert_eq!(whole.run(10_000), Exit::Budget);
    assert_eq!((whole.state.gpr[0], whole.state.rip), (500_500, CODE + 14));
}

#[test]
fn a_kick_ends_a_run() {
    let (mut cpu, _ram) = long(&[0xeb, 0xfe]);
    let signals = cpu.env.signals().clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        signals.raise(Signals::KICK);
    });
    assert_eq!(cpu.run(u64::MAX), Exit::Kicked);
    assert!(cpu.state.icount > 0);
    thread.join().expect("the thread ends");
}

#[test]
fn an_instruction_may_change_the_next_one() {
    // mov byte [rip+1], 5 (the immediate of the next instruction); mov eax, 1; jmp $
    let (mut cpu, _ram) = long(&[0xc6, 0x05, 1, 0, 0, 0, 5, 0xb8, 1, 0, 0, 0, 0xeb, 0xfe]);
    assert_eq!(cpu.run(2), Exit::Budget);
    assert_eq!(cpu.state.gpr[0], 5);
    // Again, now that the block was made before.
    cpu.state.rip = CODE;
    cpu.env.memory().store(CODE + 6, 1, 9, &hyaline_space::Origin::DEBUGGER);
    assert_eq!(cpu.run(2), Exit::Budget);
    assert_eq!(cpu.state.gpr[0], 9);
}

#[test]
fn data_beside_code_stays_writable_and_code_written_by_dma_is_seen() {
    // l: inc dword [rip+0x100]; mov eax, 7; jmp l
    let (mut cpu, ram) = long(&[0xff, 0x05, 0, 1, 0, 0, 0xb8, 7, 0, 0, 0, 0xeb, 0xf3]);
    assert_eq!(cpu.run(300), Exit::Budget);
    assert_eq!(ram.load_u32(CODE + 0x106), Some(100));
    ram.write(CODE + 7, &[8]).expect("inside");
    assert_eq!(cpu.run(3), Exit::Budget);
    assert_eq!(cpu.state.gpr[0], 8);
}

#[test]
fn two_processors_see_each_other_write_code() {
    let (mut one, ram) = long(&[0xb8, 1, 0, 0, 0, 0xeb, 0xf9]);
    let mut two = crate::testing::second_cpu(&mut one);
    // The other one writes where it has written before there was code.
    ram.write(0x3000, &[0xc6, 0x04, 0x25, 1, 0x10, 0, 0, 1, 0xc6, 0x04, 0x25, 1, 0x10, 0, 0, 2, 0xeb, 0xfe])
        .expect("inside");
    two.state.rip = 0x3000;
    assert_eq!(two.run(1), Exit::Budget);
    assert_eq!(one.run(10), Exit::Budget);
    assert_eq!(one.state.gpr[0], 1);
    assert_eq!(two.run(1), Exit::Budget);
    assert_eq!(one.run(10), Exit::Budget);
    assert_eq!(one.state.gpr[0], 2);
}

#[test]
fn nothing_is_kept_of_code_that_a_running_processor_may_write_to_unseen() {
    // mov eax, 1; jmp -7
    let (mut one, ram) = long(&[0xb8, 1, 0, 0, 0, 0xeb, 0xf9]);
    let mut two = crate::testing::second_cpu(&mut one);
    // mov byte [0x1001], 2; jmp $
    ram.write(0x3000, &[0xc6, 0x04, 0x25, 1, 0x10, 0, 0, 2, 0xeb, 0xfe]).expect("inside");
    two.state.rip = 0x3000;
    assert_eq!(two.run(1), Exit::Budget);
    // As if it were in the midst of its instructions, on another thread.
    two.env.signals().enter();
    assert_eq!((one.run(10), one.state.gpr[0]), (Exit::Budget, 2));
    assert!(two.mmu.window.write.store(0x1001, 3_u8), "its translation is still there");
    assert_eq!((one.run(10), one.state.gpr[0]), (Exit::Budget, 3));
    assert!(two.mmu.window.write.store(0x1001, 4_u8));
    assert_eq!((one.run(10), one.state.gpr[0]), (Exit::Budget, 4));
    // It looks at its requests: the page is given up.
    assert_eq!(two.run(1), Exit::Budget);
    assert!(!two.mmu.window.write.maps(0x1001, 1));
    assert_eq!(ram.code().may_write(0x1000), 0);
    assert_eq!((one.run(10), one.state.gpr[0]), (Exit::Budget, 4));
    two.state.rip = 0x3000;
    assert_eq!(two.run(1), Exit::Budget);
    assert_eq!((one.run(10), one.state.gpr[0]), (Exit::Budget, 2), "a write that is seen");
}

#[test]
fn a_locked_access_across_pages_waits_for_the_others() {
    // lock inc dword [0x5ffe]; jmp -10
    let (mut one, ram) = long(&[0xf0, 0xff, 0x04, 0x25, 0xfe, 0x5f, 0, 0, 0xeb, 0xf6]);
    let mut two = crate::testing::second_cpu(&mut one);
    let thread = std::thread::spawn(move || {
        assert_eq!(two.run(20_000), Exit::Budget);
    });
    assert_eq!(one.run(20_000), Exit::Budget);
    thread.join().expect("the other one comes to its end");
    assert_eq!(ram.load_u32(0x5ffe), Some(20_000));
}

#[test]
fn instructions_and_data_cross_pages() {
    let (mut cpu, ram) = long_mode_cpu(16 << 20);
    // mov rax, imm64 across 0x2000, then mov [0x2ffd], rax; jmp $
    ram.write(
        0x1ffa,
        &[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0x48, 0x89, 0x04, 0x25, 0xfd, 0x2f, 0, 0, 0xeb, 0xfe],
    )
    .expect("inside");
    cpu.state.rip = 0x1ffa;
    assert_eq!(cpu.run(2), Exit::Budget);
    assert_eq!(ram.load_u64(0x2ffd), Some(0x0807_0605_0403_0201));
    // The second page of the instruction changes.
    ram.store_u8(0x2000, 0x44);
    cpu.state.rip = 0x1ffa;
    assert_eq!(cpu.run(1), Exit::Budget);
    assert_eq!(cpu.state.gpr[0], 0x0807_0644_0403_0201);
}

#[test]
fn page_faults_say_why() {
    let (mut cpu, ram) = long(&[]);
    let table = split(&mut cpu, &ram, 0x40_0000, 7);
    let page = 0x40_3000;
    let entry = table + 3 * 8;
    let read = |cpu: &mut Cpu| cpu.load::<u32>(Seg::Ds, page + 8);
    let write = |cpu: &mut Cpu| cpu.store(Seg::Ds, page + 8, 1_u32);
    assert!(read(&mut cpu).is_ok());
    assert_eq!(ram.load_u64(entry), Some(page | 0x27), "accessed");
    assert!(write(&mut cpu).is_ok());
    assert_eq!(ram.load_u64(entry), Some(page | 0x67), "dirty");
    // Not present: still in the TLB until INVLPG.
    ram.store_u64(entry, page | 6);
    assert!(read(&mut cpu).is_ok());
    cpu.invlpg(page);
    assert_eq!(read(&mut cpu), Err(Fault::pf(0)));
    assert_eq!(cpu.state.cr2, page + 8);
    assert_eq!(write(&mut cpu), Err(Fault::pf(2)));
    // Read-only, with and without WP.
    ram.store_u64(entry, page | 5);
    assert_eq!(write(&mut cpu), Err(Fault::pf(3)));
    cpu.state.cr0 &= !cr0::WP;
    cpu.flush_tlb(true);
    assert!(write(&mut cpu).is_ok());
    cpu.state.cr0 |= cr0::WP;
    cpu.flush_tlb(true);
    assert_eq!(write(&mut cpu), Err(Fault::pf(3)));
    // A reserved physical bit.
    ram.store_u64(entry, page | 7 | 1 << 51);
    assert_eq!(read(&mut cpu), Err(Fault::pf(9)));
    // No execution.
    ram.store_u64(entry, page | 7 | 1 << 63);
    assert!(read(&mut cpu).is_ok());
    assert_eq!(cpu.translate_fetch(page), Err(Fault::pf(0x11)));
    // SMAP and SMEP: the page is a user's.
    cpu.state.cr4 |= cr4::SMAP | cr4::SMEP;
    cpu.mode_changed();
    assert_eq!(read(&mut cpu), Err(Fault::pf(1)));
    assert_eq!(write(&mut cpu), Err(Fault::pf(3)));
    cpu.state.rflags |= flag::AC;
    cpu.mode_changed();
    assert!(read(&mut cpu).is_ok());
    ram.store_u64(entry, page | 7);
    cpu.invlpg(page);
    assert_eq!(cpu.translate_fetch(page), Err(Fault::pf(0x11)));
    // As a user.
    cpu.state.rflags &= !flag::AC;
    cpu.state.seg[Seg::Ss as usize].attr |= 0x60;
    cpu.mode_changed();
    assert_eq!(cpu.cpl(), 3);
    assert!(read(&mut cpu).is_ok() && write(&mut cpu).is_ok());
    ram.store_u64(entry, page | 3);
    cpu.invlpg(page);
    assert_eq!(read(&mut cpu), Err(Fault::pf(5)));
    assert_eq!(write(&mut cpu), Err(Fault::pf(7)));
    // Protection keys: key 1 may not be written.
    cpu.state.cr4 |= cr4::PKE;
    cpu.state.pkru = 2 << 2;
    ram.store_u64(entry, page | 7 | 1 << 59);
    assert!(read(&mut cpu).is_ok());
    assert_eq!(write(&mut cpu), Err(Fault::pf(0x27)));
    cpu.state.pkru = 1 << 2;
    cpu.flush_tlb(true);
    assert_eq!(read(&mut cpu), Err(Fault::pf(0x25)));
}

#[test]
fn not_canonical_and_beyond_limits() {
    let (mut cpu, _ram) = long(&[]);
    assert_eq!(cpu.load::<u8>(Seg::Ds, 1 << 47), Err(Fault::gp(0)));
    assert_eq!(cpu.load::<u8>(Seg::Ss, 1 << 63), Err(Fault::ss(0)));
    assert_eq!(cpu.load::<u16>(Seg::Ds, (1 << 47) - 1), Err(Fault::gp(0)), "its second byte");
    let (mut cpu, ram) = protected_cpu(4 << 20);
    cpu.state.seg[3].limit = 0xffff;
    cpu.state.seg[3].base = 0x1000;
    cpu.mode_changed();
    ram.store_u32(0x1_0ffc, 0x1234_5678);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0xfffc), Ok(0x1234_5678));
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0xfffd), Err(Fault::gp(0)));
    // Expand-down, 64 KiB: valid above the limit.
    cpu.state.seg[3].attr = 0x97;
    cpu.state.seg[3].limit = 0xfff;
    cpu.mode_changed();
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0xfff), Err(Fault::gp(0)));
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0xfffc), Ok(0x1234_5678));
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0xfffd), Err(Fault::gp(0)));
    assert_eq!(cpu.store(Seg::Cs, 0, 1_u8), Err(Fault::gp(0)), "code is not writable");
    let (mut cpu, _ram) = real_cpu(2 << 20);
    assert_eq!(cpu.load::<u16>(Seg::Ds, 0xffff), Err(Fault::gp(0)));
    assert_eq!(cpu.load::<u16>(Seg::Ss, 0xffff), Err(Fault::ss(0)));
    // Unreal mode.
    cpu.state.seg[3].limit = 0xffff_ffff;
    cpu.mode_changed();
    assert!(cpu.load::<u16>(Seg::Ds, 0x1f_0000).is_ok());
}

#[test]
fn alignment_is_checked_when_asked_for() {
    let (mut cpu, _ram) = long(&[]);
    cpu.state.cr0 |= cr0::AM;
    cpu.state.rflags |= flag::AC;
    cpu.state.seg[Seg::Ss as usize].attr |= 0x60;
    cpu.mode_changed();
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x3001), Err(Fault::ac(0)));
    assert!(cpu.load::<u32>(Seg::Ds, 0x3004).is_ok());
    assert_eq!(cpu.store(Seg::Ds, 0x3004, 0_u64), Err(Fault::ac(0)));
}

#[test]
fn repeated_moves_stop_exactly_at_a_fault() {
    // rep movsb; jmp $
    let (mut cpu, ram) = long(&[0xf3, 0xa4, 0xeb, 0xfe]);
    let table = split(&mut cpu, &ram, 0x40_0000, 7);
    ram.store_u64(table + 5 * 8, 0);
    ram.fill(0x30_0000, 0x1_0000, 0x5a).expect("inside");
    (cpu.state.gpr[6], cpu.state.gpr[7], cpu.state.gpr[1]) = (0x30_0003, 0x40_1007, 0x1_0000);
    assert_eq!(cpu.run(1), Exit::Shutdown, "there is no interrupt table");
    assert_eq!(cpu.state.cr2, 0x40_5000);
    let done = 0x40_5000 - 0x40_1007;
    assert_eq!(cpu.state.gpr[7], 0x40_5000);
    assert_eq!((cpu.state.gpr[6], cpu.state.gpr[1]), (0x30_0003 + done, 0x1_0000 - done));
    assert_eq!((cpu.state.rip, cpu.state.icount), (CODE, 0));
    assert_eq!(
        (ram.load_u8(0x40_4fff), ram.load_u8(0x40_1007), ram.load_u8(0x40_1006)),
        (Some(0x5a), Some(0x5a), Some(0))
    );
}

#[test]
fn repeated_moves_overlap_as_bytes_do() {
    for (distance, size, opcode) in [
        (1_u64, 1_u64, &[0xf3, 0xa4][..]),
        (3, 1, &[0xf3, 0xa4]),
        (1, 8, &[0xf3, 0x48, 0xa5]),
        (8, 8, &[0xf3, 0x48, 0xa5]),
        (5, 4, &[0xf3, 0xa5]),
    ] {
        let (mut cpu, ram) = long(opcode);
        ram.write(CODE + opcode.len() as u64, &[0xeb, 0xfe]).expect("inside");
        let mut want: Vec<u8> = (0..0x3000_u32).map(|i| ((i * 7) >> 3) as u8).collect();
        ram.write(0x30_0000, &want).expect("inside");
        let count = 0x2000 / size;
        for i in 0..count {
            let from = (0x100 + i * size) as usize;
            let element = want[from..from + size as usize].to_vec();
            let to = from + distance as usize;
            want[to..to + size as usize].copy_from_slice(&element);
        }
        (cpu.state.gpr[6], cpu.state.gpr[7], cpu.state.gpr[1]) = (0x30_0100, 0x30_0100 + distance, count);
        assert_eq!(cpu.run(1), Exit::Budget);
        assert_eq!(cpu.state.gpr[1], 0);
        let mut got = vec![0; want.len()];
        ram.read(0x30_0000, &mut got).expect("inside");
        assert!(got == want, "distance {distance} size {size}");
    }
}

#[test]
fn strings_run_down_too_and_wrap_at_16_bits() {
    let (mut cpu, ram) = real_cpu(2 << 20);
    // std; rep stosw; cld; rep stosb; jmp $
    ram.write(CODE, &[0xfd, 0xf3, 0xab, 0xfc, 0xf3, 0xaa, 0xeb, 0xfe]).expect("inside");
    cpu.state.gpr[0] = 0xbeef;
    cpu.state.gpr[1] = 3;
    cpu.state.gpr[7] = 0x5004;
    assert_eq!(cpu.run(2), Exit::Budget);
    assert_eq!((ram.load_u64(0x5000), cpu.state.gpr[7]), (Some(0xbeef_beef_beef), 0x4ffe));
    cpu.state.gpr[1] = 8;
    cpu.state.gpr[7] = 0xfffc;
    assert_eq!(cpu.run(2), Exit::Budget);
    assert_eq!(
        (cpu.state.gpr[7], ram.load_u32(0xfffc), ram.load_u32(0)),
        (4, Some(0xefef_efef), Some(0xefef_efef))
    );
}

#[test]
fn large_pages_and_invlpg() {
    let (mut cpu, ram) = long(&[]);
    ram.store_u32(0x60_0000, 6);
    ram.store_u32(0x80_0000, 8);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x60_0000), Ok(6));
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x60_5000), Ok(0));
    // 0x60_0000 now maps 0x80_0000; INVLPG anywhere in the page tells.
    ram.store_u64(0x10_2000 + 3 * 8, 0x80_0087);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x60_0000), Ok(6));
    cpu.invlpg(0x7f_f123);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x60_0000), Ok(8));
}

#[test]
fn globals_survive_and_pcids_keep_apart() {
    let (mut cpu, ram) = long(&[]);
    let table = split(&mut cpu, &ram, 0x40_0000, 7);
    cpu.state.cr4 |= cr4::PGE;
    ram.store_u64(table + 8, 0x40_1107);
    ram.store_u32(0x40_1000, 11);
    ram.store_u32(0x40_2000, 22);
    let see = |cpu: &mut Cpu| (cpu.load::<u32>(Seg::Ds, 0x40_1000), cpu.load::<u32>(Seg::Ds, 0x40_2000));
    assert_eq!(see(&mut cpu), (Ok(11), Ok(22)));
    ram.store_u64(table + 8, 0x40_5007);
    ram.store_u64(table + 16, 0x40_6007);
    assert_eq!(see(&mut cpu), (Ok(11), Ok(22)), "cached");
    cpu.flush_tlb(false);
    assert_eq!(see(&mut cpu), (Ok(11), Ok(0)), "the global page stays");
    cpu.flush_tlb(true);
    assert_eq!(see(&mut cpu), (Ok(0), Ok(0)));
    // PCIDs.
    cpu.state.cr4 |= cr4::PCIDE;
    for pcid in 1..20 {
        cpu.state.cr3 = 0x10_0000 | pcid;
        cpu.mode_changed();
        ram.store_u64(table + 16, (0x40_2000 + pcid * 0x1000) | 7);
        ram.store_u32(0x40_2000 + pcid * 0x1000, pcid as u32);
        assert_eq!(cpu.load::<u32>(Seg::Ds, 0x40_2000), Ok(pcid as u32));
    }
    cpu.state.cr3 = 0x10_0000 | 15;
    cpu.mode_changed();
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x40_2000), Ok(15), "its own TLB");
    cpu.flush_pcid(15);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x40_2000), Ok(19));
}

#[test]
fn paging_of_32_bits_and_pae() {
    let (mut cpu, ram) = protected_cpu(16 << 20);
    // 32-bit: directory at 0x10_0000, table at 0x10_1000; a 4 MiB page at 0x80_0000 to 0x40_0000.
    ram.store_u32(0x10_0000, 0x10_1007);
    for i in 0..1024_u32 {
        ram.store_u32(0x10_1000 + u64::from(i) * 4, (i << 12) | 7);
    }
    ram.store_u32(0x10_0008, 0x40_0087);
    cpu.state.cr3 = 0x10_0000;
    cpu.state.cr4 = cr4::PSE;
    cpu.state.cr0 |= cr0::PG;
    cpu.mode_changed();
    cpu.flush_tlb(true);
    ram.store_u32(0x45_6788, 77);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x85_6788), Ok(77));
    assert_eq!(ram.load_u32(0x10_0008), Some(0x40_00a7));
    assert!(cpu.store(Seg::Ds, 0x3000, 5_u32).is_ok());
    assert_eq!((ram.load_u32(0x10_0000), ram.load_u32(0x10_100c)), (Some(0x10_1027), Some(0x3067)));
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0xc0_0000), Err(Fault::pf(0)));
    // PAE: the pointers are in registers.
    cpu.state.cr4 = cr4::PAE;
    cpu.state.pdpte = [0x10_2001, 0, 0, 0];
    ram.store_u64(0x10_2000, 0x10_3007);
    ram.store_u64(0x10_2008, 0x60_0087);
    ram.store_u64(0x10_3008, 0x5007);
    cpu.flush_tlb(true);
    ram.store_u32(0x5004, 55);
    ram.store_u32(0x60_0010, 66);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x1004), Ok(55));
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x20_0010), Ok(66));
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x4000_0000), Err(Fault::pf(0)));
    ram.store_u64(0x10_3010, 0x5007 | 1 << 63);
    assert_eq!(cpu.load::<u32>(Seg::Ds, 0x2000), Err(Fault::pf(9)), "NX is reserved without NXE");
}

#[test]
fn locked_and_wide_exchanges() {
    // lock xadd [0x3000], rax; lock cmpxchg16b [0x3010]; jmp $
    let (mut cpu, ram) = long(&[
        0xf0, 0x48, 0x0f, 0xc1, 0x04, 0x25, 0, 0x30, 0, 0, 0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x10, 0x30, 0,
        0, 0xeb, 0xfe,
    ]);
    ram.store_u64(0x3000, 40);
    ram.store_u64(0x3010, 40);
    ram.store_u64(0x3018, 9);
    (cpu.state.gpr[0], cpu.state.gpr[2], cpu.state.gpr[3], cpu.state.gpr[1]) = (2, 9, 100, 200);
    assert_eq!(cpu.run(2), Exit::Budget);
    assert_eq!((ram.load_u64(0x3000), cpu.state.gpr[0]), (Some(42), 40));
    assert_eq!((ram.load_u64(0x3010), ram.load_u64(0x3018)), (Some(100), Some(200)));
    assert_ne!(cpu.state.rflags & flag::ZF, 0);
}

#[test]
fn loops_count_and_look_at_zf() {
    for (opcode, zf, taken) in [
        (0xe1, true, true),
        (0xe1, false, false),
        (0xe0, true, false),
        (0xe0, false, true),
        (0xe2, true, true),
    ] {
        let (mut cpu, _ram) = long(&[opcode, 0x20]);
        cpu.state.gpr[1] = 5;
        cpu.state.rflags |= if zf { flag::ZF } else { 0 };
        assert_eq!(cpu.run(1), Exit::Budget);
        assert_eq!(
            (cpu.state.gpr[1], cpu.state.rip),
            (4, CODE + 2 + if taken { 0x20 } else { 0 }),
            "{opcode:#x} {zf}"
        );
    }
}
