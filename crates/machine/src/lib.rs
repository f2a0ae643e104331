//! Boards, loaders, ACPI tables, vCPU threads, run loop, snapshots.
