//! Tiny guests written in assembly, for tests and for the built-in demonstration.
//!
//! Each is a 32-bit ELF file with a multiboot 1 header; the sources under `asm/` say what it does and prints.

macro_rules! guests {
    ($($(#[$doc:meta])* $name:ident $file:literal),* $(,)?) => {
        $($(#[$doc])* pub const $name: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/", $file, ".elf"));)*
    };
}

guests! {
    /// Prints over its serial port, finds the network card on the PCI bus, selects one of its registers with a 2-byte write to port
    /// 0xc012, reads it, and powers off.
    DEMO "demo",
    /// Takes timer interrupts through the 8259 pair and then through the I/O APIC, prints how many came, powers off.
    INTERRUPTS "interrupts",
    /// Takes an x87 error as interrupt 13, powers off.
    FPU_ERROR "fpuerror",
    /// Starts all other processors by INIT and start-up IPI; each reports; powers off.
    SMP "smp",
    /// Enters long mode, uses SSE and a page fault handler, prints, powers off.
    LONGMODE "longmode",
    /// Loads an empty IDT and divides by zero.
    TRIPLE_FAULT "triplefault",
    /// Jumps to an address where nothing is.
    NOWHERE "nowhere",
    /// Prints the command line and the modules that a multiboot loader gave it, powers off.
    MODULES "modules",
    /// Counts the characters typed, in three places; `q` powers off.
    COUNT "count",
    /// What several processors may see of each other's accesses to memory: order, locked operations, changed page tables, changed code.
    LITMUS "litmus",
    /// Arms the local APIC's timer while it counts, prints the longest time until the handler in ticks of the time-stamp counter, powers off.
    DEADLINE "deadline",
}
