# Starts every other processor with INIT and two start-up IPIs (SDM vol. 3A section 8.4.4); each adds itself to a counter with a locked
# instruction and halts. The bootstrap processor waits until as many have come as the multiboot command line's last digit says, and
# prints `processors N`.
        .include "common.inc"

        .set    LAPIC, 0xfee00000
        .set    TRAMPOLINE, 0x8000

main:
        # How many: the last character of the command line.
        mov     esi, [ebx + 16]
1:      lodsb
        test    al, al
        jz      1f
        mov     cl, al
        jmp     1b
1:      sub     cl, '0'
        movzx   ebp, cl
        mov     esi, offset trampoline
        mov     edi, TRAMPOLINE
        mov     ecx, offset trampoline_end - trampoline
        rep movsb
        mov     ebx, LAPIC
        mov     dword ptr [ebx + 0xf0], 0x1ff
        # All excluding self: INIT, then start-up at page TRAMPOLINE >> 12, twice.
        mov     dword ptr [ebx + 0x300], 0xc4500
        mov     ecx, 10000
1:      pause
        loop    1b
        mov     dword ptr [ebx + 0x300], 0xc4600 + (TRAMPOLINE >> 12)
        mov     ecx, 10000
1:      pause
        loop    1b
        mov     dword ptr [ebx + 0x300], 0xc4600 + (TRAMPOLINE >> 12)
1:      pause
        cmp     [count], ebp
        jb      1b
        mov     esi, offset text
        call    puts
        mov     eax, [count]
        mov     ecx, 2
        call    puthex
        mov     al, '\n'
        call    putc
        jmp     power_off

        .code16
trampoline:
        cli
        xor     ax, ax
        mov     ds, ax
        # lgdt [TRAMPOLINE + offset of gdtr]
        lgdtd   cs:[gdtr - trampoline]
        mov     eax, 1
        mov     cr0, eax
        .byte   0x66, 0xea
        .long   TRAMPOLINE + (enter32 - trampoline)
        .word   8
        .code32
enter32:
        mov     ax, 16
        mov     ds, ax
        lock inc dword ptr [count]
1:      hlt
        jmp     1b
        .align  8
gdt:    .quad   0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:   .word   23
        .long   TRAMPOLINE + (gdt - trampoline)
trampoline_end:

        .section .rodata
text:   .asciz  "processors "
        .data
        .align  4
count:  .long   1
