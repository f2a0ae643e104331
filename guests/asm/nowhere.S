# Says so, and jumps to an address where the machine has nothing. What it fetches there is all ones, an undefined opcode; without an
# interrupt descriptor table that ends in a triple fault.
        .include "common.inc"

main:
        mov     esi, offset text
        call    puts
        lidt    [idtr]
        mov     eax, 0xd0000000
        jmp     eax

        .section .rodata
text:   .asciz  "jumping to 0xd0000000\n"
idtr:   .word   0
        .long   0
