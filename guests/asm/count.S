# Counts what is typed: prints `ready`, then for each character how many came so far and the character; `q` powers off. It keeps the
# count in a register, in memory, and in a register of the serial port (the scratch register), and says so if they ever differ: for
# tests that save a machine and go on elsewhere.
        .include "common.inc"

main:
        xor     ebp, ebp
        mov     dx, COM1 + 7
        xor     eax, eax
        out     dx, al
        mov     esi, offset text_ready
        call    puts
next:
        mov     dx, COM1 + 5
1:      in      al, dx
        test    al, 1
        jz      1b
        mov     dx, COM1
        in      al, dx
        cmp     al, 'q'
        je      power_off
        mov     cl, al
        # The three counts are the same before each character.
        mov     dx, COM1 + 7
        in      al, dx
        movzx   eax, al
        cmp     eax, ebp
        jne     bad
        cmp     eax, [count]
        jne     bad
        inc     ebp
        inc     dword ptr [count]
        inc     eax
        out     dx, al
        mov     bl, cl
        mov     ecx, 2
        call    puthex
        mov     al, ' '
        call    putc
        mov     al, bl
        call    putc
        mov     al, '\n'
        call    putc
        jmp     next
bad:
        mov     esi, offset text_bad
        call    puts
        jmp     power_off

        .section .rodata
text_ready: .asciz "ready\n"
text_bad: .asciz "the counts differ\n"
        .data
        .align  4
count:  .long   0
