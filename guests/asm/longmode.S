# Enters long mode with 2 MiB pages, adds two vectors with SSE2, takes a page fault at a known address and returns from it, and prints
# `long mode, sum 0x0000002a, fault at 0xdead0000`.
        .include "common.inc"

main:
        # PML4 -> PDPT -> one page directory: the first GiB, one to one.
        mov     eax, offset pdpt + 3
        mov     [pml4], eax
        mov     eax, offset pd + 3
        mov     [pdpt], eax
        mov     edi, offset pd
        mov     eax, 0x83
        mov     ecx, 512
1:      mov     [edi], eax
        add     eax, 0x200000
        add     edi, 8
        loop    1b
        # CR4: PAE, OSFXSR, OSXMMEXCPT.
        mov     eax, cr4
        or      eax, 0x620
        mov     cr4, eax
        mov     eax, offset pml4
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        # Page fault gate, 16 bytes.
        mov     eax, offset on_fault
        mov     edi, offset idt + 14 * 16
        mov     [edi], ax
        mov     word ptr [edi + 2], 8
        mov     word ptr [edi + 4], 0x8e00
        shr     eax, 16
        mov     [edi + 6], ax
        lgdt    [gdtr]
        mov     eax, cr0
        and     eax, ~4
        or      eax, 0x80000002
        mov     cr0, eax
        .byte   0xea
        .long   long_start
        .word   8

        .code64
long_start:
        mov     eax, 16
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        lidt    [idtr]
        mov     esp, offset stack_top
        movdqa  xmm0, [vector_a]
        paddd   xmm0, [vector_b]
        pshufd  xmm1, xmm0, 0x4e
        paddd   xmm0, xmm1
        pshufd  xmm1, xmm0, 0xb1
        paddd   xmm0, xmm1
        movd    r12d, xmm0
        mov     ebx, 0xdead0000
        mov     eax, [rbx]              # faults; the handler skips its two bytes
        mov     r13d, [seen]
        # Back to 32-bit compatibility mode for the shared output routines.
        mov     [sum], r12d
        push    24
        mov     eax, offset compat
        push    rax
        lretq
        .code32
compat:
        mov     esi, offset text_sum
        call    puts
        mov     eax, [sum]
        mov     ecx, 8
        call    puthex
        mov     esi, offset text_fault
        call    puts
        mov     eax, [seen]
        call    puthex
        mov     al, '\n'
        call    putc
        jmp     power_off

        .code64
on_fault:
        push    rax
        mov     rax, cr2
        mov     [seen], eax
        add     qword ptr [rsp + 16], 2
        pop     rax
        add     rsp, 8
        iretq

        .code32
        .section .rodata
text_sum: .asciz "long mode, sum 0x"
text_fault: .asciz ", fault at 0x"
        .data
        .align  16
vector_a: .long 1, 2, 3, 4
vector_b: .long 5, 6, 7, 14
gdt:    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdtr:   .word   31
        .long   gdt
idtr:   .word   15 * 16 - 1
        .quad   idt
sum:    .long   0
seen:   .long   0
        .bss
        .align  4096
pml4:   .skip   4096
pdpt:   .skip   4096
pd:     .skip   4096
idt:    .skip   256 * 16
