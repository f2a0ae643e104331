//! What the function names of QEMU's memory path, of its threads and of the C library mean.

/// Matches `name` against a pattern with `*` (any run of characters), `?` (one character) and `|` alternatives.
pub fn matches(pattern: &str, name: &str) -> bool {
    pattern.split('|').any(|p| glob(p.trim().as_bytes(), name.as_bytes()))
}

fn glob(p: &[u8], s: &[u8]) -> bool {
    // Iterative, with one point to return to: linear for the patterns used, quadratic at the very worst.
    let (mut i, mut j, mut star, mut mark) = (0, 0, None, 0);
    while j < s.len() {
        if i < p.len() && p[i] == b'*' {
            star = Some(i);
            mark = j;
            i += 1;
        } else if i < p.len() && (p[i] == s[j] || p[i] == b'?') {
            i += 1;
            j += 1;
        } else if let Some(st) = star {
            i = st + 1;
            mark += 1;
            j = mark;
        } else {
            return false;
        }
    }
    p[i..].iter().all(|&b| b == b'*')
}

/// The part a function plays on the way from the guest to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Handles an exit of the virtual CPU or an instruction of the guest: the outer end of the path.
    Entry,
    /// Address space and flat view.
    Space,
    /// Several regions share one page; one more hop of the same access.
    Subpage,
    /// Dispatch to a region: adjusts sizes and calls the device.
    Dispatch,
    /// A device starts an access of its own.
    Dma,
    /// Anything else.
    Other,
}

/// Guest-side entry points.
pub const ENTRY: &str = "kvm_handle_io|handle_io|kvm_outb|kvm_outw|kvm_outl|kvm_inb|kvm_inw|kvm_inl|handle_mmio|kvm_handle_mmio|cpu_out|cpu_outb|cpu_outw|cpu_outl|cpu_in|cpu_inb|cpu_inw|cpu_inl|helper_outb|helper_outw|helper_outl|helper_inb|helper_inw|helper_inl|io_writex|io_readx|io_writeb|io_writew|io_writel|io_writeq|io_readb|io_readw|io_readl|io_readq|store_helper|load_helper|store_helper_unaligned|full_le_ldul_mmu|full_ldub_mmu|full_le_lduw_mmu|full_le_ldq_mmu|helper_ret_*_mmu|helper_le_*_mmu|helper_be_*_mmu|helper_*_mmu|helper_ret_*_mmu*|do_st_mmio_leN|do_st_mmio_beN|do_ld_mmio_leN|do_ld_mmio_beN|int_st_mmio_leN|int_ld_mmio_beN|int_ld_mmio_leN|do_st1_mmu|do_st2_mmu|do_st4_mmu|do_st8_mmu|do_st16_mmu|do_ld1_mmu|do_ld2_mmu|do_ld4_mmu|do_ld8_mmu|do_ld16_mmu|do_st_1|do_st_2|do_st_4|do_st_8|do_ld_1|do_ld_2|do_ld_4|do_ld_8|do_ld_bytes_beN|__stb_mmu|__stw_mmu|__stl_mmu|__stq_mmu|__ldb_mmu|__ldw_mmu|__ldl_mmu|__ldq_mmu|slow_stb_mmu|slow_stw_mmu|slow_stl_mmu|slow_ldl_mmu|do_outp|do_inp|write_phys_req_item|read_phys_req_item|rw_phys_req_item|cpu_ioreq_pio|cpu_ioreq_move|cpu_ioreq_config|hvf_handle_io|whpx_emu_ioport_callback|whpx_emu_mmio_callback|nvmm_io_callback|nvmm_mem_callback|qtest_process_command|qemu_readb|qemu_readw|qemu_readl|qemu_readq|qemu_writeb|qemu_writew|qemu_writel|qemu_writeq|qemu_inb|qemu_inw|qemu_inl|qemu_outb|qemu_outw|qemu_outl|cpu_memory_rw_debug|target_memory_rw_debug|rom_reset|address_space_set|address_space_write_rom|cpu_stb_*|cpu_stw_*|cpu_stl_*|cpu_stq_*|cpu_ldub_*|cpu_lduw_*|cpu_ldl_*|cpu_ldq_*|probe_access";

const SPACE: &str = "address_space_rw|address_space_write|address_space_read|address_space_read_full|address_space_read__*|address_space_write_continue|address_space_read_continue|address_space_write_internal|address_space_st*|address_space_ld*|address_space_rw_*|flatview_write|flatview_read|flatview_write_continue|flatview_read_continue|flatview_write_continue_step|flatview_read_continue_step|cpu_physical_memory_rw|cpu_physical_memory_write|cpu_physical_memory_read|prepare_mmio_access|address_space_access_valid|flatview_access_valid|stb_phys*|stw_*phys*|stl_*phys*|stq_*phys*|ldub_phys*|lduw_*phys*|ldl_*phys*|ldq_*phys*";

const DISPATCH: &str = "memory_region_dispatch_write|memory_region_dispatch_read|memory_region_dispatch_read1|memory_region_dispatch_write1|memory_region_access_valid|access_with_adjusted_size*|memory_region_write_accessor|memory_region_read_accessor|memory_region_write_with_attrs_accessor|memory_region_read_with_attrs_accessor|memory_region_oldmmio_write_accessor|memory_region_oldmmio_read_accessor|memory_region_iorange_write|memory_region_iorange_read|io_mem_write|io_mem_read|ioport_write|ioport_read|ioport_writeb_thunk|ioport_writew_thunk|ioport_writel_thunk|ioport_readb_thunk|ioport_readw_thunk|ioport_readl_thunk|portio_write|portio_read|memory_region_*_thunk_*";

const DMA: &str = "dma_memory_rw|dma_memory_rw_relaxed|dma_memory_read|dma_memory_write|dma_memory_read_relaxed|dma_memory_write_relaxed|dma_memory_set|dma_memory_map|dma_memory_unmap|dma_buf_rw|dma_buf_read|dma_buf_write|pci_dma_rw|pci_dma_read|pci_dma_write|pci_dma_map|pci_dma_unmap|address_space_unmap|address_space_map|cpu_physical_memory_map|cpu_physical_memory_unmap|ldub_*dma|lduw_*dma|ldl_*dma|ldq_*dma|stb_*dma|stw_*dma|stl_*dma|stq_*dma|usb_packet_unmap|usb_packet_map|virtqueue_map_desc|virtqueue_map_iovec|virtqueue_unmap_sg|msi_send_message|pci_msi_trigger|virtio_st*_phys*|virtio_ld*_phys*|virtio_*phys_cached|iov_*|i8257_dma_*_memory|k->read_memory|k->write_memory";

/// The role of a function on the memory path.
pub fn role(name: &str) -> Role {
    if matches!(name, "subpage_write" | "subpage_read" | "subpage_writelen" | "subpage_readlen") {
        Role::Subpage
    } else if matches(DISPATCH, name) {
        Role::Dispatch
    } else if matches(SPACE, name) {
        Role::Space
    } else if matches(DMA, name) {
        Role::Dma
    } else if matches(ENTRY, name) {
        Role::Entry
    } else {
        Role::Other
    }
}

const WRITES: &[&str] = &[
    "_write", "write_", "_out", "cpu_out", "_st", "store", "__st", "writeb", "writew", "writel", "writeq",
    "slow_st",
];
const READS: &[&str] = &[
    "_read", "read_", "_in", "cpu_in", "_ld", "load", "__ld", "readb", "readw", "readl", "readq", "slow_ld",
    "full_",
];

/// True for write, false for read, as far as the name of a memory path function tells.
pub fn direction(name: &str) -> Option<bool> {
    // ioport_read calls and memory_region_read_accessor; "io_readx" contains no "write".
    if name.contains("write")
        || matches(
            "address_space_st*|cpu_out*|kvm_out?|helper_out*|helper_*st*_mmu|do_st*|int_st*|store_helper*|__st*_mmu|slow_st*|do_outp|qemu_out*|st?_*|stb_*|stw_*|stl_*|stq_*|write_phys_req_item|address_space_set|address_space_unmap|cpu_st*|rom_reset",
            name,
        )
    {
        Some(true)
    } else if name.contains("read")
        || matches(
            "address_space_ld*|kvm_inb|kvm_inw|kvm_inl|cpu_in|cpu_inb|cpu_inw|cpu_inl|helper_in*|helper_*ld*_mmu|do_ld*|int_ld*|load_helper*|__ld*_mmu|slow_ld*|full_*_mmu|do_inp|qemu_in*|ldub_*|lduw_*|ldl_*|ldq_*|read_phys_req_item|cpu_ld*",
            name,
        )
    {
        Some(false)
    } else {
        let w = WRITES.iter().any(|p| name.contains(p));
        let r = READS.iter().any(|p| name.contains(p));
        (w != r).then_some(w)
    }
}

/// Bytes moved, when the name of an entry point fixes them.
pub fn size_in_name(name: &str) -> Option<u64> {
    let table: &[(&str, u64)] = &[
        (
            "kvm_outb|kvm_inb|cpu_outb|cpu_inb|helper_outb|helper_inb|io_writeb|io_readb|qemu_writeb|qemu_readb|qemu_outb|qemu_inb|ioport_*b_thunk|helper_*stb_mmu*|helper_*ldub_mmu*|helper_*ldsb_mmu*|helper_ldb*_mmu|helper_stb_mmu|do_st1_mmu|do_ld1_mmu|do_st_1|do_ld_1|__stb_mmu|__ldb_mmu|address_space_stb|address_space_ldub|stb_phys|ldub_phys|cpu_stb_*|cpu_ldub_*",
            1,
        ),
        (
            "kvm_outw|kvm_inw|cpu_outw|cpu_inw|helper_outw|helper_inw|io_writew|io_readw|qemu_writew|qemu_readw|qemu_outw|qemu_inw|ioport_*w_thunk|helper_*stw_mmu*|helper_*lduw_mmu*|helper_*ldsw_mmu*|do_st2_mmu|do_ld2_mmu|do_st_2|do_ld_2|__stw_mmu|__ldw_mmu|address_space_stw*|address_space_lduw*|stw_*phys|lduw_*phys|cpu_stw_*|cpu_lduw_*",
            2,
        ),
        (
            "kvm_outl|kvm_inl|cpu_outl|cpu_inl|helper_outl|helper_inl|io_writel|io_readl|qemu_writel|qemu_readl|qemu_outl|qemu_inl|ioport_*l_thunk|helper_*stl_mmu*|helper_*ldul_mmu*|helper_*ldsl_mmu*|helper_*ldl_mmu*|do_st4_mmu|do_ld4_mmu|do_st_4|do_ld_4|__stl_mmu|__ldl_mmu|address_space_stl*|address_space_ldl*|stl_*phys|ldl_*phys|cpu_stl_*|cpu_ldl_*",
            4,
        ),
        (
            "io_writeq|io_readq|qemu_writeq|qemu_readq|helper_*stq_mmu*|helper_*ldq_mmu*|do_st8_mmu|do_ld8_mmu|do_st_8|do_ld_8|__stq_mmu|__ldq_mmu|address_space_stq*|address_space_ldq*|stq_*phys|ldq_*phys|cpu_stq_*|cpu_ldq_*",
            8,
        ),
    ];
    table.iter().find(|(p, _)| matches(p, name)).map(|&(_, n)| n)
}

/// C library, sanitizer runtime, glib and process start: never the place of a cause.
pub fn is_runtime(name: &str) -> bool {
    matches(
        "raise|abort|rust_begin_unwind|__rustc::*|core::panicking::*|std::panicking::*|std::panic::*|std::sys::*|std::rt::*|core::ops::function::*|std::thread::*|core::result::unwrap_failed|core::option::*|core::slice::*|<alloc::boxed::Box*|__assert*|__assert_fail*|__pthread_kill*|pthread_kill|__libc_*|__kernel_vsyscall|_start|start|start_thread|clone|clone3|__clone|__clone3|thread_start|_pthread_start|_pthread_body|g_assertion_message*|g_log*|g_logv|g_error*|g_malloc*|g_free|g_realloc|g_slice_*|g_try_malloc*|g_main_*|g_thread_proxy|malloc|calloc|realloc|free|cfree|_int_free|_int_malloc|_int_realloc|malloc_*|munmap_chunk|__fortify_fail*|__chk_fail|__stack_chk_fail*|__fdelt_chk|__fdelt_warn|__GI_*|__sanitizer*|__asan*|__interceptor_*|__ubsan*|__tsan*|__msan*|___interceptor*|asan_*|__lsan*|fuzzer::*|__asan::*|__sanitizer::*|LLVMFuzzer*|memcpy|memmove|memset|memcmp|__mem*|__memcpy*|__memset*|__memmove*|str*|__str*|vfprintf|fprintf|printf|vsnprintf|snprintf|_IO_*|__vfprintf*|<signal handler called>|__restore_rt|__GI___assert_fail|__assert2|__libc_message|killpg|kill|gsignal|poll|ppoll|__poll|__ppoll|operator new|operator delete|BaseThreadStart|BaseThreadInitThunk|RtlUserThreadStart|__wrap_*|op_read|op_write|op_in|op_out|__vm*|generic_fuzz|videzzo*|__videzzo*",
        name,
    )
}

/// Helpers that are called from everywhere: the place of interest is whoever called them.
pub fn is_helper(name: &str) -> bool {
    matches(
        "fifo8_*|fifo32_*|test_bit|set_bit|clear_bit|find_next_bit|find_first_bit|test_and_set_bit|ld?_he_p|lduw_he_p|ldl_he_p|ldq_he_p|ldn_he_p|ldub_p|ldl_le_p|lduw_le_p|ldq_le_p|stl_he_p|stw_he_p|stq_he_p|stn_he_p|stb_p|stl_le_p|stw_le_p|stq_le_p|bswap*|__bswap*|le??_to_cpu*|cpu_to_*|iov_*|qemu_iovec_*|memory_region_*|flatview_*|address_space_*|as_*|dma_memory_*|pci_dma_rw|pci_dma_read|pci_dma_write|pci_dma_map|pci_dma_unmap|usb_packet_map|usb_packet_unmap|qemu_mutex_*|qemu_cond_*|bql_*|error_handle*|error_set*|error_abort*|hw_error|l???_le_phys_cached|lduw_*phys_cached|ldl_*phys_cached|stw_*phys_cached|stl_*phys_cached|address_space_*_cached|ldl_phys*|lduw_phys*|stl_phys*|subpage_*|qemu_get_ram_ptr*|qemu_ram_*|qemu_map_ram_ptr|object_dynamic_cast*|object_class_dynamic_cast*|object_get_class|extract32|deposit32|extract64|deposit64|muldiv64|qatomic_*|ldl_*_dma|lduw_*_dma|ldq_*_dma|stl_*_dma|stw_*_dma|stq_*_dma|ld*_pci_dma|st*_pci_dma|int128_*|MEMTX*|get_ptr*|prepare_mmio_access|io_mem_*|access_with_adjusted_size*",
        name,
    )
}

/// Blocking calls: a thread with one of these on top waits.
pub fn is_waiting(name: &str) -> bool {
    matches(
        "poll|ppoll|__poll|__ppoll|__GI___poll|__GI_ppoll|___poll|__libc_poll|select|__select|pselect|epoll_wait|epoll_pwait|ioctl|__ioctl|__GI___ioctl|syscall|__syscall*|futex_wait*|__futex_*|futex_*|do_futex_wait*|sem_wait|sem_timedwait|__new_sem_wait*|sigwait*|__sigtimedwait|do_sigwait|__GI___sigwait|sigtimedwait|pthread_cond_wait|pthread_cond_timedwait|__pthread_cond_*|___pthread_cond_*|__lll_lock_wait*|__GI___lll_lock_wait|lll_mutex_lock*|pthread_mutex_lock|__pthread_mutex_*|___pthread_mutex_*|pthread_join|__pthread_*join*|__GI___pthread_timedjoin*|__pthread_clockjoin*|nanosleep|clock_nanosleep|__*nanosleep*|accept|accept4|recvmsg|__recvmsg|__libc_recvmsg|recvfrom|__libc_recvfrom|recv|read|__read|__libc_read|__GI___libc_read|pread|pread64|__libc_pread*|preadv|pwritev|io_getevents|io_uring_*|__io_uring*|fdatasync|fsync|wait4|waitpid|connect|sched_yield|NtWait*|ZwWait*|mach_msg_trap|__psynch_*|kevent|semaphore_wait_trap|kvm_vcpu_ioctl|__vdso_*|__kernel_*",
        name,
    )
}

/// The thread waits for the global lock.
pub fn waits_for_lock(name: &str) -> bool {
    matches(
        "qemu_mutex_lock_iothread*|bql_lock*|qemu_mutex_lock_impl|qemu_mutex_lock|prepare_mmio_access",
        name,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        assert!(matches("cpu_in?", "cpu_inb") && !matches("cpu_in?", "cpu_in"));
        assert!(matches("a*c|x", "abbc"));
        assert!(matches("a*c|x", "x"));
        assert!(matches("*", ""));
        assert!(!matches("a*c", "abcd"));
        assert!(matches("*_write", "foo_write_write"));
    }

    #[test]
    fn roles() {
        for (n, r) in [
            ("kvm_handle_io", Role::Entry),
            ("helper_le_stl_mmu", Role::Entry),
            ("flatview_write_continue_step", Role::Space),
            ("address_space_stb", Role::Space),
            ("memory_region_oldmmio_write_accessor", Role::Dispatch),
            ("subpage_read", Role::Subpage),
            ("pci_dma_read", Role::Dma),
            ("virtio_ioport_write", Role::Other),
            ("address_space_unmap", Role::Dma),
        ] {
            assert_eq!(role(n), r, "{n}");
        }
    }

    #[test]
    fn directions_and_sizes() {
        for (n, w, s) in [
            ("cpu_outw", Some(true), Some(2)),
            ("helper_inb", Some(false), Some(1)),
            ("helper_le_stl_mmu", Some(true), Some(4)),
            ("memory_region_dispatch_read1", Some(false), None),
            ("address_space_stb", Some(true), Some(1)),
            ("io_readx", Some(false), None),
            ("do_st4_mmu", Some(true), Some(4)),
            ("kvm_handle_io", None, None),
        ] {
            assert_eq!(direction(n), w, "{n}");
            assert_eq!(size_in_name(n), s, "{n}");
        }
    }
}
