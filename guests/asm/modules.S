# Prints what a multiboot loader gave it: the command line, and of each module its text and its first line. Says `bad magic` unless the
# loader's magic is right (Multiboot Specification 0.6.96, section 3.2; common.inc leaves it in ESI).
        .include "common.inc"

main:
        cmp     esi, 0x2badb002
        jne     bad
        # Flags: command line (bit 2) and modules (bit 3).
        mov     eax, [ebx]
        and     eax, 12
        cmp     eax, 12
        jne     bad
        mov     esi, offset text_line
        call    puts
        mov     esi, [ebx + 16]
        call    puts
        call    newline
        mov     ebp, [ebx + 20]
        mov     edi, [ebx + 24]
1:      test    ebp, ebp
        jz      power_off
        mov     esi, offset text_module
        call    puts
        mov     esi, [edi + 8]
        call    puts
        mov     esi, offset text_colon
        call    puts
        mov     esi, [edi]
2:      cmp     esi, [edi + 4]
        jae     3f
        lodsb
        cmp     al, '\n'
        je      3f
        call    putc
        jmp     2b
3:      call    newline
        add     edi, 16
        dec     ebp
        jmp     1b

newline:
        mov     al, '\n'
        call    putc
        ret

bad:
        mov     esi, offset text_bad
        call    puts
        jmp     power_off

        .section .rodata
text_line: .asciz "command line: "
text_module: .asciz "module "
text_colon: .asciz ": "
text_bad: .asciz "bad magic or flags\n"
