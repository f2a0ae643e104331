# Programs the 8254 for 1000 ticks a second and counts 20 interrupts through the 8259 pair, then masks it and counts 20 more through
# the I/O APIC and the local APIC. Prints `pic 20 apic 20`.
        .include "common.inc"

        .set    IOAPIC, 0xfec00000

main:
        # IDT entries 0x20 and 0x27 (8259) and 0x40 (I/O APIC): 32-bit interrupt gates in the loader's flat code segment.
        mov     eax, offset on_pic
        mov     edi, offset idt + 0x20 * 8
        call    gate
        mov     eax, offset on_apic
        mov     edi, offset idt + 0x40 * 8
        call    gate
        # A request that goes away before the processor acknowledges it arrives as the master's IR7 (8259A data sheet, "interrupt
        # sequence"): a processor that is late by a whole timer period sees that.
        mov     eax, offset on_spurious
        mov     edi, offset idt + 0x27 * 8
        call    gate
        lidt    [idtr]
        # Only interrupt 0 open.
        mov     ax, 0xfffe
        call    start_pic
        # 8254 counter 0: mode 2, 1193 Hz / 1.193 = 1000 Hz.
        mov     al, 0x34
        out     0x43, al
        mov     al, 1193 & 255
        out     0x40, al
        mov     al, 1193 >> 8
        out     0x40, al
1:      sti
        hlt
        cmp     dword ptr [pic_ticks], 20
        jb      1b
        cli
        mov     al, 0xff
        out     0x21, al
        # I/O APIC pin 2 carries the 8254: vector 0x40, edge, to APIC ID 0.
        mov     ebx, IOAPIC
        mov     dword ptr [ebx], 0x15
        mov     dword ptr [ebx + 0x10], 0
        mov     dword ptr [ebx], 0x14
        mov     dword ptr [ebx + 0x10], 0x40
1:      sti
        hlt
        cmp     dword ptr [apic_ticks], 20
        jb      1b
        cli
        mov     dword ptr [ebx + 0x10], 0x10040
        mov     esi, offset text_pic
        call    puts
        mov     eax, [pic_ticks]
        mov     ecx, 2
        call    puthex
        mov     esi, offset text_apic
        call    puts
        mov     eax, [apic_ticks]
        call    puthex
        mov     al, '\n'
        call    putc
        jmp     power_off

        .include "pic.inc"

on_pic:
        push    eax
        inc     dword ptr [pic_ticks]
        mov     al, 0x20
        out     0x20, al
        pop     eax
        iret

# No end of interrupt: the controller has nothing in service.
on_spurious:
        iret

on_apic:
        inc     dword ptr [apic_ticks]
        mov     dword ptr [LAPIC + 0xb0], 0
        iret

        .section .rodata
text_pic: .asciz "pic "
text_apic: .asciz " apic "
        .data
        .align  8
idtr:   .word   0x41 * 8 - 1
        .long   idt
pic_ticks: .long 0
apic_ticks: .long 0
        .bss
        .align  8
idt:    .skip   0x41 * 8
