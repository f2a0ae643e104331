# What several processors may and may not see of each other's memory accesses (SDM vol. 3A section 9.2; 9.1 for locked operations and for
# code that is modified while it is executed). All processors go through the same list of tests and meet at barriers; the first one
# checks and prints `NAME ok` or `NAME BAD count`. The last two characters of the multiboot command line are r and n: the tests are done
# 2^r times on n processors (1 to 8).
        .include "common.inc"

        # Places of one run, and what is done at each: a cache line of X and of Y, a doubleword of each result.
        .set    N, 1000
        .set    X, 0x400000
        .set    Y, 0x410000
        .set    R0, 0x420000
        .set    R1, 0x421000
        .set    R2, 0x422000
        .set    R3, 0x423000
        .set    COUNTERS, 0x428000
        .set    CLEARED, 0x42c000 - X
        # Pages that are no neighbours, behind neighbouring linear pages.
        .set    FAR1, 0x500000
        .set    FAR2, 0x506000
        .set    FAR3, 0x502000
        .set    PAGE_A, 0x508000
        .set    PAGE_B, 0x50a000
        .set    WINDOW, 0x40000000
        .set    FLIP, WINDOW + 0x3000
        # Functions that return what is written into them.
        .set    CODE, 0x600000
        .set    PAGES, 64
        .set    LAST, 20
        .set    OWN_CODE, 0x800000
        .set    SHARED_CODE, 0x810000
        # N pairs of doublewords, each across the end of a page.
        .set    PAIRS, 0x900ffc

main:
        # How often and how many: the last two characters of the command line.
        mov     esi, [ebx + 16]
1:      lodsb
        test    al, al
        jz      1f
        mov     ch, cl
        mov     cl, al
        jmp     1b
1:      sub     cl, '0'
        movzx   eax, cl
        mov     [cpus], eax
        mov     cl, ch
        sub     cl, '0'
        mov     eax, 1
        shl     eax, cl
        mov     [rounds], eax
        # PML4 -> PDPT -> the first GiB one to one in pages of 2 MiB; the second GiB by 4 KiB; the local APIC.
        mov     dword ptr [pml4], offset pdpt + 3
        mov     dword ptr [pdpt], offset pd + 3
        mov     dword ptr [pdpt + 8], offset pd_window + 3
        mov     dword ptr [pdpt + 24], offset pd_apic + 3
        mov     dword ptr [pd_window], offset pt + 3
        mov     dword ptr [pd_apic + 8 * ((LAPIC >> 21) & 511)], LAPIC + 0x9b
        mov     dword ptr [pt], FAR1 + 3
        mov     dword ptr [pt + 8], FAR2 + 3
        mov     dword ptr [pt + 16], FAR3 + 3
        mov     dword ptr [pt + 24], PAGE_A + 3
        mov     edi, offset pd
        mov     eax, 0x83
        mov     ecx, 512
1:      mov     [edi], eax
        add     eax, 0x200000
        add     edi, 8
        loop    1b
        # The one interrupt, and spurious ones.
        mov     eax, offset on_ipi
        mov     edi, offset idt + 0x40 * 16
        call    gate
        mov     eax, offset on_spurious
        mov     edi, offset idt + 0xff * 16
        call    gate
        call    start_others
        xor     eax, eax
        jmp     long_mode

gate:
        mov     [edi], ax
        mov     word ptr [edi + 2], 8
        mov     word ptr [edi + 4], 0x8e00
        shr     eax, 16
        mov     [edi + 6], ax
        ret

        # EAX is this processor's number; the first is 0.
long_mode:
joined:
        mov     esi, eax
        mov     eax, cr4
        or      eax, 0x620
        mov     cr4, eax
        mov     eax, offset pml4
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        lgdt    [gdtr]
        mov     eax, cr0
        and     eax, ~4
        or      eax, 0x80000002
        mov     cr0, eax
        .byte   0xea
        .long   long_start
        .word   8

        .include "smp.inc"

        .code64
long_start:
        mov     eax, 16
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        lidt    [idtr]
        mov     r12d, esi
        mov     r13d, [cpus]
        xor     r15d, r15d
        cmp     r12d, r13d
        jae     idle
        mov     eax, r12d
        shl     eax, 12
        lea     rsp, [rax + stacks + 4096]
        mov     eax, LAPIC
        mov     dword ptr [rax + 0xf0], 0x1ff
        mov     r14d, offset tests
next_test:
        cmp     dword ptr [r14], 0
        je      all_done
        cmp     r13d, [r14 + 4]
        jb      skip
        mov     ebp, [rounds]
1:      test    r12d, r12d
        jnz     2f
        call    clear
2:      call    barrier
        mov     eax, r12d
        cmp     eax, 3
        jbe     3f
        mov     eax, 3
3:      mov     eax, [r14 + 8 + rax * 4]
        test    eax, eax
        jz      4f
        push    rbp
        call    rax
        pop     rbp
4:      call    barrier
        test    r12d, r12d
        jnz     5f
        mov     eax, [r14 + 24]
        call    rax
5:      call    barrier
        dec     ebp
        jnz     1b
        test    r12d, r12d
        jnz     skip
        mov     esi, [r14]
        call    puts
        xor     eax, eax
        xchg    eax, [bad]
        test    eax, eax
        jnz     6f
        mov     esi, offset text_ok
        call    puts
        jmp     skip
6:      push    rax
        mov     esi, offset text_bad
        call    puts
        pop     rax
        call    put_number
skip:   add     r14d, 44
        jmp     next_test
all_done:
        call    barrier
        test    r12d, r12d
        jz      power_off
idle:   cli
        hlt
        jmp     idle

# Prints EAX in hexadecimal and a new line.
put_number:
        mov     ebx, eax
        mov     ecx, 8
1:      rol     ebx, 4
        mov     eax, ebx
        and     eax, 15
        mov     al, [rax + digits]
        push    rcx
        call    putc
        pop     rcx
        loop    1b
        mov     al, 10
        jmp     putc

# Waits for all processors. Changes EAX.
barrier:
        add     r15d, r13d
        lock inc dword ptr [met]
1:      mov     eax, [met]
        sub     eax, r15d
        jns     2f
        pause
        jmp     1b
2:      ret

clear:
        xor     eax, eax
        mov     edi, X
        mov     ecx, CLEARED / 8
        rep stosq
        mov     edi, FAR1
        mov     ecx, 512
        rep stosq
        mov     edi, FAR2
        mov     ecx, 512
        rep stosq
        mov     edi, FAR3
        mov     ecx, 512
        rep stosq
        mov     edi, PAIRS
        mov     ecx, N
1:      mov     [rdi], rax
        add     edi, 4096
        loop    1b
        mov     [acks], eax
        mov     [begun], eax
        mov     [shot], eax
        mov     [current], eax
        mov     [finished], eax
        mov     [code_counter], eax
        mov     dword ptr [pt + 24], PAGE_A + 3
        mov     rax, 0x1111111111111111
        mov     [PAGE_A], rax
        mov     [PAGE_A + 0xff8], rax
        add     rax, rax
        mov     [PAGE_B], rax
        mov     [PAGE_B + 0xff8], rax
        ret

failed:
        lock inc dword ptr [bad]
        ret

# How often the results of one place are those of the test that are forbidden.
check_results:
        xor     ecx, ecx
1:      mov     eax, [R0 + rcx]
        xor     eax, [r14 + 28]
        mov     edx, [R1 + rcx]
        xor     edx, [r14 + 32]
        or      eax, edx
        mov     edx, [R2 + rcx]
        xor     edx, [r14 + 36]
        or      eax, edx
        mov     edx, [R3 + rcx]
        xor     edx, [r14 + 40]
        or      eax, edx
        jnz     2f
        call    failed
2:      add     ecx, 4
        cmp     ecx, 4 * N
        jb      1b
        ret

check_nothing:
        ret

# Runs the lines between for each place: RSI is its offset in X and Y, RDI in the results.
        .macro  each
        xor     esi, esi
        xor     edi, edi
77:
        .endm
        .macro  done
        add     esi, 64
        add     edi, 4
        cmp     edi, 4 * N
        jb      77b
        ret
        .endm

# Store buffering.
sb0:    each
        mov     dword ptr [X + rsi], 1
        mov     eax, [Y + rsi]
        mov     [R0 + rdi], eax
        done
sb1:    each
        mov     dword ptr [Y + rsi], 1
        mov     eax, [X + rsi]
        mov     [R1 + rdi], eax
        done
sb_fence0: each
        mov     dword ptr [X + rsi], 1
        mfence
        mov     eax, [Y + rsi]
        mov     [R0 + rdi], eax
        done
sb_fence1: each
        mov     dword ptr [Y + rsi], 1
        mfence
        mov     eax, [X + rsi]
        mov     [R1 + rdi], eax
        done
sb_lock0: each
        mov     ecx, 1
        xchg    [X + rsi], ecx
        mov     eax, [Y + rsi]
        mov     [R0 + rdi], eax
        done
sb_lock1: each
        mov     dword ptr [Y + rsi], 1
        lock or dword ptr [rsp - 8], 0
        mov     eax, [X + rsi]
        mov     [R1 + rdi], eax
        done
sb_serial0: each
        mov     dword ptr [X + rsi], 1
        xor     eax, eax
        cpuid
        mov     eax, [Y + rsi]
        mov     [R0 + rdi], eax
        done
sb_serial1: each
        mov     dword ptr [Y + rsi], 1
        xor     eax, eax
        cpuid
        mov     eax, [X + rsi]
        mov     [R1 + rdi], eax
        done

# Load buffering.
lb0:    each
        mov     eax, [X + rsi]
        mov     dword ptr [Y + rsi], 1
        mov     [R0 + rdi], eax
        done
lb1:    each
        mov     eax, [Y + rsi]
        mov     dword ptr [X + rsi], 1
        mov     [R1 + rdi], eax
        done

# Message passing.
mp0:    each
        mov     dword ptr [X + rsi], 1
        mov     dword ptr [Y + rsi], 1
        done
mp1:    each
        mov     eax, [Y + rsi]
        mov     ecx, [X + rsi]
        mov     [R0 + rdi], eax
        mov     [R1 + rdi], ecx
        done

# Message passing in one operand's reach, the message before the end of a page and the flag behind it.
mp_page0:
        mov     esi, PAIRS
        mov     edi, N
1:      mov     dword ptr [rsi], 1
        mov     dword ptr [rsi + 4], 1
        add     esi, 4096
        dec     edi
        jnz     1b
        ret
mp_page1:
        mov     esi, PAIRS
        xor     edi, edi
1:      mov     eax, [rsi + 4]
        mov     ecx, [rsi]
        mov     [R0 + rdi], eax
        mov     [R1 + rdi], ecx
        add     esi, 4096
        add     edi, 4
        cmp     edi, 4 * N
        jb      1b
        ret

# Two write, two look: all see the writes in one order.
iriw2:  each
        mov     eax, [X + rsi]
        mov     ecx, [Y + rsi]
        mov     [R0 + rdi], eax
        mov     [R1 + rdi], ecx
        done
iriw3:  each
        mov     eax, [Y + rsi]
        mov     ecx, [X + rsi]
        mov     [R2 + rdi], eax
        mov     [R3 + rdi], ecx
        done
write_x: each
        mov     dword ptr [X + rsi], 1
        done
write_y: each
        mov     dword ptr [Y + rsi], 1
        done

# Counters.
        .set    C_ADD, COUNTERS
        .set    C_INC, COUNTERS + 0x40
        .set    C_LINE, COUNTERS + 0xbd
        .set    C_CAS, COUNTERS + 0x100
        .set    C_CAS8, COUNTERS + 0x140
        .set    C_CAS16, COUNTERS + 0x180
        .set    C_LOCK, COUNTERS + 0x1c0
        .set    C_PLAIN, COUNTERS + 0x200
        .set    C_BYTE, COUNTERS + 0x241
        .set    C_LINE8, COUNTERS + 0x2bc
        .set    TIMES, 1024
count:
        mov     esi, TIMES
1:      mov     eax, 1
        lock xadd [C_ADD], eax
        lock inc qword ptr [C_INC]
        lock add dword ptr [C_LINE], 1
        lock sub qword ptr [C_LINE8], -1
        mov     al, 1
        lock xadd [C_BYTE], al
        mov     eax, [C_CAS]
2:      lea     edx, [rax + 1]
        lock cmpxchg [C_CAS], edx
        jnz     2b
        mov     eax, [C_CAS8]
        mov     edx, [C_CAS8 + 4]
3:      mov     ebx, eax
        mov     ecx, edx
        add     ebx, 0x40000001
        adc     ecx, 0
        lock cmpxchg8b [C_CAS8]
        jnz     3b
        mov     rax, [C_CAS16]
        mov     rdx, [C_CAS16 + 8]
4:      lea     rbx, [rax + 1]
        lea     rcx, [rdx + 2]
        lock cmpxchg16b [C_CAS16]
        jnz     4b
5:      mov     eax, 1
        xchg    [C_LOCK], eax
        test    eax, eax
        jz      6f
        pause
        jmp     5b
6:      inc     dword ptr [C_PLAIN]
        mov     dword ptr [C_LOCK], 0
        # In a page with code.
        lock inc dword ptr [code_counter]
        dec     esi
        jnz     1b
        ret
check_count:
        mov     edx, r13d
        imul    rdx, rdx, TIMES
        .macro  must counter, size=dword, register=edx
        cmp     \size ptr [\counter], \register
        je      78f
        call    failed
78:
        .endm
        must    C_ADD
        must    C_INC, qword, rdx
        must    C_LINE
        must    C_LINE8, qword, rdx
        must    C_BYTE, byte, dl
        must    C_CAS
        must    C_CAS16, qword, rdx
        must    C_PLAIN
        must    code_counter
        mov     rax, rdx
        imul    rax, rax, 0x40000001
        must    C_CAS8, qword, rax
        lea     rax, [rdx + rdx]
        must    C_CAS16 + 8, qword, rax
        ret
        .align  4
code_counter: .long 0

# Across the ends of pages: neighbours and strangers.
        .set    ACROSS, 64
across:
        mov     r8d, WINDOW
        mov     esi, ACROSS
1:      mov     eax, 1
        lock xadd [r8 + 0xffe], eax
        lock inc qword ptr [r8 + 0x1ffb]
        lock add dword ptr [COUNTERS + 0xfff], 1
        mov     eax, [r8 + 0xff6]
2:      lea     edx, [rax + 1]
        lock cmpxchg [r8 + 0xff6], edx
        jnz     2b
        dec     esi
        jnz     1b
        ret
check_across:
        mov     edx, r13d
        imul    rdx, rdx, ACROSS
        mov     r8d, WINDOW
        must    r8 + 0xffe
        must    r8 + 0x1ffb, qword, rdx
        must    COUNTERS + 0xfff
        must    r8 + 0xff6
        ret

# A page table entry is changed to and fro and nobody is told: what is read is of one page or of the other.
        .set    FLIPS, 2000
flip:
        mov     esi, FLIPS
1:      mov     qword ptr [pt + 24], PAGE_B + 3
        pause
        mov     qword ptr [pt + 24], PAGE_A + 3
        pause
        dec     esi
        jnz     1b
        ret
look:
        mov     ebx, FLIP
        mov     esi, FLIPS
1:      mov     rax, [rbx]
        call    page_a_or_b
        mov     rax, [rbx + 0xff8]
        call    page_a_or_b
        # Sets the dirty bit.
        mov     [rbx + 64 + r12 * 8], rsi
        test    esi, 7
        jnz     2f
        invlpg  [rbx]
2:      dec     esi
        jnz     1b
        ret
page_a_or_b:
        mov     rdx, 0x1111111111111111
        cmp     rax, rdx
        je      1f
        add     rdx, rdx
        cmp     rax, rdx
        je      1f
        call    failed
1:      ret

# The same with INVLPG everywhere: who was told sees the new page.
        .set    SHOTS, 50
shoot:
        mov     ebx, FLIP
        mov     r8d, LAPIC
        mov     esi, 1
1:      mov     [begun], esi
        mov     eax, PAGE_A + 3
        test    esi, 1
        jz      2f
        mov     eax, PAGE_B + 3
2:      mov     [pt + 24], rax
        invlpg  [rbx]
        mov     dword ptr [r8 + 0x300], 0xc4040
        lea     eax, [r13 - 1]
        imul    eax, esi
3:      pause
        cmp     [acks], eax
        jne     3b
        mov     [shot], esi
        inc     esi
        cmp     esi, SHOTS
        jbe     1b
        ret
shot_at:
        mov     rax, cr3
        mov     cr3, rax
        mov     ebx, FLIP
        sti
1:      mov     esi, [shot]
        mov     rax, [rbx]
        mov     ecx, [begun]
        cmp     ecx, esi
        jne     3f
        mov     rdx, 0x1111111111111111
        test    esi, 1
        jz      2f
        add     rdx, rdx
2:      cmp     rax, rdx
        je      3f
        call    failed
3:      cmp     esi, SHOTS
        jb      1b
        cli
        ret
on_ipi:
        push    rax
        mov     eax, FLIP
        invlpg  [rax]
        lock inc dword ptr [acks]
        mov     eax, LAPIC
        mov     dword ptr [rax + 0xb0], 0
        pop     rax
on_spurious:
        iretq

# One writes functions, page after page, and goes on changing what they return; the others call them. After a serializing instruction they
# get what was written before, or something newer (every second page); without one, soon.
write_code:
        xor     ebx, ebx
1:      mov     edi, ebx
        shl     edi, 12
        add     edi, CODE + 0x103
        mov     dword ptr [rdi + 1], 1
        mov     byte ptr [rdi + 5], 0xc3
        mov     byte ptr [rdi], 0xb8
        mov     dword ptr [published], 1
        inc     ebx
        mov     [current], ebx
        mov     esi, 2
2:      mov     [rdi + 1], esi
        mov     [published], esi
        mov     ecx, esi
        imul    ecx, ebx
        and     ecx, 63
3:      pause
        dec     ecx
        jns     3b
        inc     esi
        cmp     esi, LAST
        jbe     2b
        lea     eax, [r13 - 1]
        imul    eax, ebx
4:      pause
        cmp     [finished], eax
        jne     4b
        cmp     ebx, PAGES
        jb      1b
        ret
call_code:
        xor     r8d, r8d
1:      cmp     [current], r8d
        ja      2f
        pause
        jmp     1b
2:      mov     edi, r8d
        shl     edi, 12
        add     edi, CODE + 0x103
3:      mov     esi, [published]
        test    r8d, 1
        jnz     4f
        xor     eax, eax
        cpuid
        call    rdi
        cmp     eax, esi
        jae     5f
        call    failed
        jmp     5f
4:      call    rdi
5:      cmp     eax, LAST
        ja      6f
        jb      3b
        jmp     7f
6:      call    failed
7:      lock inc dword ptr [finished]
        inc     r8d
        cmp     r8d, PAGES
        jb      1b
        ret

# Everybody changes code of its own, in a page of its own and in one that all share.
change_own:
        mov     r8d, r12d
        shl     r8d, 12
        add     r8d, OWN_CODE + 0x103
        mov     r9d, r12d
        shl     r9d, 6
        add     r9d, SHARED_CODE + 3
        mov     byte ptr [r8], 0xb8
        mov     byte ptr [r8 + 5], 0xc3
        mov     byte ptr [r9], 0xb8
        mov     byte ptr [r9 + 5], 0xc3
        mov     esi, 300
1:      mov     [r8 + 1], esi
        call    r8
        cmp     eax, esi
        je      2f
        call    failed
2:      mov     [r9 + 1], esi
        call    r9
        cmp     eax, esi
        je      3f
        call    failed
3:      call    r8
        cmp     eax, esi
        je      4f
        call    failed
4:      dec     esi
        jnz     1b
        ret

        .section .rodata
        .macro  test name, least, a, b, c, d, check, f0=9, f1=0, f2=0, f3=0
        .pushsection .rodata.text, "a"
90:     .asciz  "\name"
        .popsection
        .long   90b, \least, \a, \b, \c, \d, \check, \f0, \f1, \f2, \f3
        .endm
tests:
        test    "sb", 2, sb0, sb1, 0, 0, check_results, 9
        test    "sb mfence", 2, sb_fence0, sb_fence1, 0, 0, check_results, 0
        test    "sb lock", 2, sb_lock0, sb_lock1, 0, 0, check_results, 0
        test    "sb cpuid", 2, sb_serial0, sb_serial1, 0, 0, check_results, 0
        test    "lb", 2, lb0, lb1, 0, 0, check_results, 1, 1
        test    "mp", 2, mp0, mp1, 0, 0, check_results, 1, 0
        test    "mp page", 2, mp_page0, mp_page1, 0, 0, check_results, 1, 0
        test    "iriw", 4, write_x, write_y, iriw2, iriw3, check_results, 1, 0, 1, 0
        test    "count", 1, count, count, count, count, check_count
        test    "across", 1, across, across, across, across, check_across
        test    "remap", 2, flip, look, look, look, check_nothing
        test    "shoot", 2, shoot, shot_at, shot_at, shot_at, check_nothing
        test    "code", 2, write_code, call_code, call_code, call_code, check_nothing
        test    "own code", 1, change_own, change_own, change_own, change_own, check_nothing
        .long   0
text_ok: .asciz " ok\n"
text_bad: .asciz " BAD "
digits: .ascii  "0123456789abcdef"

        .data
        .align  8
gdt:    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdtr:   .word   23
        .long   gdt
idtr:   .word   256 * 16 - 1
        .quad   idt
cpus:   .long   1
rounds: .long   1
bad:    .long   0
        .align  64
met:    .long   0
        .align  64
acks:   .long   0
        .align  64
begun:  .long   0
        .align  64
shot:   .long   0
        .align  64
published: .long 0
        .align  64
current: .long  0
        .align  64
finished: .long 0
        .align  64
        .bss
        .align  4096
pml4:   .skip   4096
pdpt:   .skip   4096
pd:     .skip   4096
pd_window: .skip 4096
pd_apic: .skip  4096
pt:     .skip   4096
idt:    .skip   256 * 16
stacks: .skip   8 * 4096
