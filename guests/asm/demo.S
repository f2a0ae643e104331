# The built-in demonstration's guest. It prints where it is, looks for a network card on the PCI bus, gives its I/O BAR the address
# 0xc000, selects register CSR88 by a 2-byte write to port 0xc012 (RAP, the register address port of an Am79C970A), reads the
# chip's identity from the data port, and powers the machine off.
        .include "common.inc"

        .set    CARD, 0x20001022        # device and vendor of the Am79C970A
        .set    BASE, 0xc000

# Reads configuration register BL of the function whose address is in EDI (bus, device, function as in 0xcf8) into EAX.
config_read:
        mov     eax, edi
        mov     al, bl
        mov     dx, 0xcf8
        out     dx, eax
        mov     dx, 0xcfc
        in      eax, dx
        ret

# Writes ECX to it.
config_write:
        mov     eax, edi
        mov     al, bl
        mov     dx, 0xcf8
        out     dx, eax
        mov     dx, 0xcfc
        mov     eax, ecx
        out     dx, eax
        ret

main:
        mov     esi, offset hello
        call    puts
        mov     edi, 0x80000000
next:
        xor     ebx, ebx
        call    config_read
        cmp     ax, 0xffff
        je      skip
        mov     ebp, eax
        mov     esi, offset found
        call    puts
        mov     eax, edi
        shr     eax, 11
        and     eax, 31
        mov     ecx, 2
        call    puthex
        mov     esi, offset is
        call    puts
        mov     eax, ebp
        mov     ecx, 4
        call    puthex
        mov     al, ':'
        call    putc
        mov     eax, ebp
        shr     eax, 16
        call    puthex
        mov     al, '\n'
        call    putc
        cmp     ebp, CARD
        jne     skip
        mov     [card], edi
skip:
        add     edi, 0x800
        cmp     edi, 0x80000000 + 32 * 0x800
        jb      next

        mov     edi, [card]
        test    edi, edi
        jz      nocard
        mov     bl, 0x10                # BAR 0
        mov     ecx, BASE
        call    config_write
        mov     bl, 4                   # command: I/O space
        mov     ecx, 1
        call    config_write

        mov     esi, offset writing
        call    puts
        mov     dx, BASE + 0x12         # RAP
        mov     ax, 88                  # CSR88: chip identity, low half
        out     dx, ax
        mov     dx, BASE + 0x10         # RDP
        in      ax, dx
        movzx   ebp, ax
        mov     esi, offset identity
        call    puts
        mov     eax, ebp
        mov     ecx, 4
        call    puthex
        mov     esi, offset bye
        call    puts
        jmp     power_off
nocard:
        mov     esi, offset none
        call    puts
        jmp     power_off

        .section .rodata
hello:  .asciz  "Hello from the guest. Looking at PCI bus 0:\n"
found:  .asciz  "  device "
is:     .asciz  " is "
writing: .asciz "Writing 2 bytes to port 0xc012.\n"
identity: .asciz "The card says that it is 0x"
bye:    .asciz  ". Powering off.\n"
none:   .asciz  "No network card. Powering off.\n"
        .data
card:   .long   0
