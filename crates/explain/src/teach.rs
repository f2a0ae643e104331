//! What the layers do, what is related, how one gets there: fixed texts.

use crate::names::matches;

const LAYERS: &[(&str, &str)] = &[
    ("start_thread|clone|clone3|qemu_thread_start", "starts a host thread and calls its function"),
    (
        "kvm_vcpu_thread_fn|qemu_kvm_cpu_thread_fn|ap_main_loop",
        "is one virtual CPU's thread: runs the guest through KVM until it must stop",
    ),
    ("mttcg_cpu_thread_fn", "is one virtual CPU's thread on the software CPU, one thread per CPU"),
    (
        "rr_cpu_thread_fn|qemu_tcg_rr_cpu_thread_fn",
        "is the one thread that runs all virtual CPUs in turn on the software CPU",
    ),
    ("qemu_tcg_cpu_thread_fn|tcg_cpu_thread_fn", "is a virtual CPU's thread on the software CPU"),
    ("kvm_cpu_exec|kvm_run", "enters the guest with ioctl(KVM_RUN) and handles the reason why it came back"),
    ("cpu_tb_exec|cpu_exec|cpu_loop_exec_tb|tcg_cpus_exec|tcg_cpu_exec", "runs translated guest code"),
    ("code_gen_buffer", "is translated guest code; the guest's program counter is not visible here"),
    ("kvm_handle_io|handle_io", "carries out a port I/O exit: count accesses of size bytes to one port"),
    ("handle_mmio", "carries out a memory exit of old qemu-kvm"),
    ("helper_out*|helper_in?", "carries out the guest's port instruction"),
    ("cpu_out*|cpu_in?", "accesses the port space, for accelerators and tests"),
    (
        "helper_*_mmu|store_helper|load_helper|do_st*_mmu|do_ld*_mmu",
        "carries out a load or store that the fast path of the software TLB could not",
    ),
    (
        "io_writex|io_readx|do_st_mmio_leN|int_st_mmio_leN|int_ld_mmio_beN|do_ld_mmio_beN",
        "a TLB entry says 'device': finds its region",
    ),
    (
        "cpu_ioreq_pio|cpu_ioreq_move|handle_ioreq|cpu_handle_ioreq",
        "carries out a request of the Xen hypervisor",
    ),
    ("qtest_process_command", "carries out a command of a test: an access without a CPU"),
    ("cpu_memory_rw_debug", "accesses guest memory for the debugger or the monitor"),
    (
        "address_space_rw|address_space_write|address_space_read_full|address_space_read",
        "accesses an address space (memory, I/O ports, a device's bus view)",
    ),
    ("flatview_write|flatview_read", "looks the address up in the flat list of regions that is in force now"),
    (
        "flatview_write_continue*|flatview_read_continue*|address_space_write_continue",
        "cuts the transfer at region borders and takes the global lock for devices",
    ),
    ("prepare_mmio_access", "takes the global lock before a device is entered"),
    (
        "subpage_write|subpage_read",
        "several regions share this page: passes the access on to the right one (one more hop, the same access)",
    ),
    (
        "memory_region_dispatch_write|memory_region_dispatch_read*|io_mem_write|io_mem_read",
        "checks size and alignment that the region accepts, swaps bytes",
    ),
    ("access_with_adjusted_size", "splits or widens the access to the sizes that the device implements"),
    ("memory_region_*_accessor", "calls the device's read or write function with the offset in its region"),
    ("portio_write|portio_read", "finds the handler in a list of ISA ports"),
    (
        "pci_host_config_write_common|pci_host_config_read_common|pci_data_write|pci_data_read",
        "turns a configuration access into function and register",
    ),
    ("pci_default_write_config", "writes the standard header; may map or move BARs"),
    ("pci_update_mappings|pci_bridge_update_mappings", "moves the regions of BARs or of a bridge's windows"),
    (
        "memory_region_transaction_commit",
        "computes the flat views of all address spaces again and tells listeners such as KVM",
    ),
    ("dma_memory_rw*|pci_dma_*|dma_memory_*|dma_buf_*", "the device accesses guest memory by itself (DMA)"),
    (
        "address_space_map|dma_memory_map|address_space_unmap|dma_memory_unmap",
        "maps guest memory for DMA; a bounce buffer is written back when it is unmapped",
    ),
    ("virtio_ioport_write|virtio_pci_config_write", "handles a write to the legacy virtio registers"),
    ("virtio_pci_common_write", "handles a write to the common configuration of a virtio 1.x device"),
    (
        "virtio_pci_start_ioeventfd|virtio_bus_start_ioeventfd",
        "hands queue notifications over to eventfds, so that they no longer exit to this thread",
    ),
    ("virtio_*_dataplane_start", "moves the device's queues to an I/O thread"),
    ("virtio_pci_set_guest_notifiers", "connects interrupt vectors with eventfds for all queues"),
    (
        "kvm_virtio_pci_vector_*use*|kvm_virtio_pci_vq_vector_use",
        "takes an interrupt route of KVM for a queue's vector",
    ),
    ("kvm_irqchip_commit_routes", "hands the whole table of interrupt routes to the kernel; must succeed"),
    ("virtio_queue_notify*", "runs the handler of a queue"),
    ("aio_poll", "waits for I/O and runs what is ready: an event loop"),
    ("aio_bh_poll|aio_bh_call", "runs bottom halves: work put off from elsewhere"),
    ("timerlist_run_timers", "runs timers that are due"),
    ("coroutine_trampoline", "starts a coroutine; who entered it is another stack"),
    (
        "main_loop_wait|os_host_main_loop_wait|glib_pollfds_poll",
        "is the main loop: waits for file descriptors, timers and bottom halves",
    ),
    ("device_set_realized|qdev_device_add*", "creates a device"),
    ("__assert_fail|g_assertion_message*", "an assertion failed: prints it and aborts"),
    ("abort", "ends the program with SIGABRT"),
    ("rom_reset", "copies ROM contents into memory at reset"),
];

/// One line on what a function's layer does.
pub fn layer(function: &str) -> Option<&'static str> {
    if function.is_empty() {
        return None;
    }
    LAYERS.iter().find(|(p, _)| matches(p, function)).map(|x| x.1)
}

/// Known relatives of a class.
pub fn relatives(class: &str) -> Option<&'static str> {
    Some(match class {
        "route-leak" => {
            "class route-leak: kvm_irqchip_commit_routes asserts on MSI-X unmask and on vector change as well; all from vectors released under another number than they were taken with"
        }
        "vector-state" => {
            "class vector-state: crashes in kvm_virtio_pci_vq_vector_use for devices without guest notifiers; config vector interrupts with vhost"
        }
        "reentrancy" => {
            "class re-entrancy: SDHCI (CVE-2021-3409), intel-hda (CVE-2021-3611), EHCI, xHCI, e1000e, AHCI, LSI; general guard per device in QEMU since 8.1"
        }
        "guest-reachable-assert" => {
            "class guest-reachable assertion: the most frequent one by far in QEMU's trackers; usually handled as an ordinary bug, as denial of service by guest root"
        }
        "oob" => {
            "class out-of-bounds in a device model: SDHCI, FDC (VENOM, CVE-2015-3456), e1000e, megasas, ATI, artist; lengths from registers and descriptors"
        }
        "uaf" => {
            "class use-after-free: unplug against notify, requests cancelled at reset, DMA re-entrancy that frees what the outer call uses"
        }
        "null" => {
            "class null backend or request: drive without medium, network peer removed, request already completed"
        }
        "lock-or-hang" => {
            "class lock or wait cycle: user networking, drained block devices, unplug waiting for a stopped backend"
        }
        "tcg-tlb" => {
            "class TLB and dispatch lifetime: section tables freed or renumbered while TLB entries point at them"
        }
        "late-detection" => "class late detection: the allocator complains long after the damage",
        "fd-set-overflow" => {
            "class FD_SET overflow: select() with more than 1024 descriptors, old versions with many connections or leaked descriptors"
        }
        "no-current-cpu" => {
            "class no current CPU: GIC, private timers, vmport under qtest, gdb or the monitor"
        }
        "coroutine" => {
            "class coroutine misuse: \"Co-routine re-entered recursively\", scheduled twice, mirror and commit jobs"
        }
        "div0" => "class division by zero: UART baud rate, PIT and audio rates, floppy and SD geometry",
        "nested-event-loop" => {
            "class nested event loop: snapshot or monitor commands run inside a flash or disk register write"
        }
        "missing-lock" => "class missing lock: ioeventfd set up from an I/O thread at shutdown",
        "nested-access-lock" => "class lock taken twice: interrupt delivery pushes a frame to MMIO",
        "eventfd-conflict" => "class eventfd conflict: EEXIST while a bridge window moves",
        "realize-time" => "class realize time: vfio quirks on BARs that are not there",
        "leak" => "class memory leak: scatter lists of SCSI controllers on error paths",
        "subpage" => {
            "class sub-page: virtio-mmio devices that share a page on ARM; wrong sizes in old versions"
        }
        "guest-side" => {
            "class guest side: firmware with a wrong memory map, a driver that resets a live ring"
        }
        "race" => "class data race: display refresh against VBE register writes",
        _ => return None,
    })
}

/// How one gets into a class of trouble.
pub fn scenarios(class: &str) -> &'static [&'static str] {
    match class {
        "route-leak" => &[
            "A test program with iopl() toggles DRIVER_OK and rewrites the vector registers in between, until the kernel's route table is full.",
            "A driver resets and restarts the device in a loop, with MSI-X enabled, on many queues.",
        ],
        "vector-state" => &[
            "The guest changes a queue's vector while the device is started, or before it is.",
            "The firmware and then the kernel set vectors, with a reset in between that clears only one side.",
        ],
        "reentrancy" => &[
            "A fuzzer or an exploit sets the DMA address to the device's own BAR.",
            "A confused driver leaves a stale address in a descriptor that meets MMIO.",
        ],
        "guest-reachable-assert" => &[
            "A fuzzer or an unusual driver writes a value or an order of values that the model's author did not expect.",
            "A migration or reset leaves the device in a state in which the next access breaks the assumption.",
        ],
        "oob" => &["A length or index register is set beyond the buffer, and a later access uses it."],
        "uaf" => &["The device is unplugged or reset while a request is in flight."],
        "null" => {
            &["The drive or network has no backend, the medium was ejected, or the other end went away."]
        }
        "lock-or-hang" => &[
            "A backend (network peer, NFS, block device) blocks while the global lock is held; all vCPUs stop at their next device access.",
        ],
        "nested-event-loop" => {
            &["A monitor command or job starts while a vCPU waits for disk I/O inside a register write."]
        }
        "eventfd-conflict" => &[
            "The guest moves bridge windows and BARs in an order in which two regions are at one address for a moment.",
        ],
        "div0" => {
            &["The guest writes 0 to a divisor, or leaves it at its reset value, and enables the unit."]
        }
        "late-detection" => {
            &["Something overflowed a heap buffer earlier, possibly long before and in another thread."]
        }
        "coroutine" => {
            &["A job completes while the coroutine it should wake is running or already scheduled."]
        }
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn each_class_of_the_rules_has_relatives() {
        for r in crate::rules::table() {
            if r.kind == crate::rules::Kind::Cause {
                assert!(super::relatives(r.class).is_some(), "{}", r.class);
            }
        }
    }
}
