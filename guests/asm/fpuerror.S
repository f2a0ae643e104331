# Divides by zero on the x87 with CR0.NE = 0 and the exception unmasked: the error arrives as interrupt 13 through the 8259 pair, as on a
# PC of the 1980s. The handler takes it back by port F0h. Prints `interrupts 1 status 84`: the exception flag of division and the summary.
        .include "common.inc"

main:
        mov     eax, offset on_error
        mov     edi, offset idt + 0x2d * 8
        call    gate
        lidt    [idtr]
        # The cascade and interrupt 13 open.
        mov     ax, 0xdffb
        call    start_pic
        mov     eax, cr0
        and     eax, ~0x2c              # EM, TS, NE
        mov     cr0, eax
        fninit
        mov     word ptr [control], 0x37b # all masked but division by zero
        fldcw   [control]
        fldz
        fld1
        fdiv    st, st(1)
        sti
        fwait                           # asserts FERR#
        mov     ecx, 100000
1:      cmp     dword ptr [count], 0
        jne     2f
        dec     ecx
        jnz     1b
2:      cli
        mov     esi, offset text_count
        call    puts
        mov     eax, [count]
        mov     ecx, 1
        call    puthex
        mov     esi, offset text_status
        call    puts
        movzx   eax, byte ptr [status]
        mov     ecx, 2
        call    puthex
        mov     al, '\n'
        call    putc
        jmp     power_off

        .include "pic.inc"

on_error:
        push    eax
        out     0xf0, al
        fnstsw  ax
        mov     [status], al
        fnclex
        inc     dword ptr [count]
        mov     al, 0x20
        out     0xa0, al
        out     0x20, al
        pop     eax
        iret

        .section .rodata
text_count: .asciz "interrupts "
text_status: .asciz " status "
        .data
        .align  8
idtr:   .word   0x2e * 8 - 1
        .long   idt
count:  .long   0
status: .long   0
control: .word  0
        .bss
        .align  8
idt:    .skip   0x2e * 8
