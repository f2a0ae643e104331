# Arms the local APIC's timer 64 times for 5000 ns and counts in a loop, without HLT, until each interrupt comes; prints the longest time
# from arming to the handler, in ticks of the time-stamp counter. A processor that only looks at its timers now and then is late.
        .include "common.inc"


main:
        mov     eax, offset on_timer
        mov     edi, offset idt + 0x40 * 8
        call    gate
        lidt    [idtr]
        # Local APIC on, timer: one shot, vector 0x40, divided by 1.
        mov     ebx, LAPIC
        mov     dword ptr [ebx + 0xf0], 0x1ff
        mov     dword ptr [ebx + 0x320], 0x40
        mov     dword ptr [ebx + 0x3e0], 0xb
        mov     ebp, 64
        sti
next:
        rdtsc
        mov     [armed], eax
        mov     dword ptr [came], 0
        mov     dword ptr [ebx + 0x380], 5000
        xor     ecx, ecx
1:      inc     ecx
        cmp     dword ptr [came], 0
        je      1b
        dec     ebp
        jnz     next
        mov     esi, offset text_longest
        call    puts
        mov     eax, [longest]
        mov     ecx, 8
        call    puthex
        mov     al, '\n'
        call    putc
        jmp     power_off

        .include "pic.inc"

on_timer:
        push    eax
        push    edx
        rdtsc
        sub     eax, [armed]
        cmp     eax, [longest]
        jbe     1f
        mov     [longest], eax
1:      mov     dword ptr [came], 1
        mov     dword ptr [LAPIC + 0xb0], 0
        pop     edx
        pop     eax
        iret

        .section .rodata
text_longest: .asciz "longest "
        .data
        .align  8
idtr:   .word   0x41 * 8 - 1
        .long   idt
armed:  .long   0
longest: .long  0
came:   .long   0
        .bss
        .align  8
idt:    .skip   0x41 * 8
