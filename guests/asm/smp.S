# Starts every other processor; each adds itself to a counter with a locked instruction and halts. The bootstrap processor waits until
# as many have come as the multiboot command line's last digit says, and prints `processors N`.
        .include "common.inc"

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
        dec     ebp
        call    start_others
1:      pause
        cmp     [others], ebp
        jb      1b
        mov     esi, offset text
        call    puts
        mov     eax, [others]
        inc     eax
        mov     ecx, 2
        call    puthex
        mov     al, '\n'
        call    putc
        jmp     power_off

joined: hlt
        jmp     joined

        .include "smp.inc"

        .section .rodata
text:   .asciz  "processors "
