//! Reads the accesses off a stack: who asked, which way, where, how many bytes, which region, and what ran.
//!
//! Each value remembers the frames it was read from. A value is *sure* when a frame gives it as the value at
//! function entry or two frames of an unbroken run agree; values behind a gap in the frame numbers are never
//! sure, so that leaving frames out can't turn a guess into a certainty.

use std::collections::HashMap;

use crate::frame::number;
use crate::model::{Format, Frame, Stack};
use crate::names::{self, Role};

/// A number and the frames that give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Source {
    value: u64,
    frame: usize,
    entry: bool,
    linked: bool,
}

/// A value read from frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read<T> {
    /// The value.
    pub value: T,
    /// Positions of the frames in the stack.
    pub frames: Vec<usize>,
    /// True when it follows from the frames without assumption.
    pub sure: bool,
}

impl<T> Read<T> {
    fn new(value: T, frames: Vec<usize>, sure: bool) -> Self {
        Self { value, frames, sure }
    }
}

/// The space an address belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// I/O ports.
    Pio,
    /// Memory.
    Mmio,
}

impl Space {
    /// The word used in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Space::Pio => "pio",
            Space::Mmio => "mmio",
        }
    }
}

/// Who made the access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initiator {
    /// A virtual CPU.
    Guest,
    /// A device (DMA), or the handling of another access.
    Device,
    /// A test harness or fuzzer.
    Harness,
    /// A debugger or the monitor.
    Debugger,
    /// Loading of ROMs at reset.
    Rom,
    /// Not on the stack.
    Unknown,
}

impl Initiator {
    /// The word used in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Initiator::Guest => "guest",
            Initiator::Device => "device",
            Initiator::Harness => "harness",
            Initiator::Debugger => "debugger",
            Initiator::Rom => "rom",
            Initiator::Unknown => "unknown",
        }
    }
}

/// One access that is being handled on the stack.
#[derive(Debug, Clone)]
pub struct Access {
    /// Nesting: 0 is the outermost.
    pub depth: usize,
    /// Port or memory space.
    pub space: Option<Read<Space>>,
    /// True for a write.
    pub write: Option<Read<bool>>,
    /// Port or guest-physical address.
    pub addr: Option<Read<u64>>,
    /// Guest-virtual address (software CPU only).
    pub virtual_addr: Option<Read<u64>>,
    /// Bytes the guest moved.
    pub size: Option<Read<u64>>,
    /// Length of the whole transfer when it is more than one access (loading, DMA).
    pub length: Option<Read<u64>>,
    /// Repetitions of a string instruction.
    pub count: Option<Read<u64>>,
    /// Start of the region: address minus offset.
    pub base: Option<Read<u64>>,
    /// Offset in the innermost region.
    pub offset: Option<Read<u64>>,
    /// Offset of the part that the handler was called for (differs from `offset` in a split access).
    pub part_offset: Option<Read<u64>>,
    /// Bytes per call of the device's handler.
    pub handler_size: Option<Read<u64>>,
    /// Smallest and largest size the region implements.
    pub limits: (Option<u64>, Option<u64>),
    /// `mask` and `shift` of the accessor.
    pub mask: Option<u64>,
    /// See `mask`.
    pub shift: Option<u64>,
    /// Value at the guest's side.
    pub value: Option<Read<u64>>,
    /// Name of the address space object, if printed.
    pub as_name: Option<String>,
    /// Positions of `subpage_*` frames.
    pub subpages: Vec<usize>,
    /// Frames on the memory path, outermost first.
    pub path: Vec<usize>,
    /// Frames of the device and what it called, handler first.
    pub device: Vec<usize>,
    /// A region's dispatch is on the stack.
    pub dispatched: bool,
    /// Frames are missing inside this access.
    pub gap: bool,
    /// Who made it.
    pub initiator: Initiator,
    /// How often this access repeats inwards (recursion); 1 when it does not.
    pub repeats: usize,
    /// Values given by frames that contradict each other, in words.
    pub conflicts: Vec<String>,
}

impl Access {
    fn new(depth: usize) -> Self {
        Self {
            depth,
            space: None,
            write: None,
            addr: None,
            virtual_addr: None,
            size: None,
            length: None,
            count: None,
            base: None,
            offset: None,
            part_offset: None,
            handler_size: None,
            limits: (None, None),
            mask: None,
            shift: None,
            value: None,
            as_name: None,
            subpages: Vec::new(),
            path: Vec::new(),
            device: Vec::new(),
            dispatched: false,
            gap: false,
            initiator: Initiator::Unknown,
            repeats: 1,
            conflicts: Vec::new(),
        }
    }

    /// True when the guest's size and the size the handler is called with are both known and the handler is
    /// called more than once.
    pub fn split(&self) -> Option<bool> {
        let (size, handler) = (self.size.as_ref()?, self.handler_size.as_ref()?);
        Some(handler.value < size.value)
    }
}

/// What the walk found.
#[derive(Debug, Clone, Default)]
pub struct Accesses {
    /// From the vCPU inwards.
    pub list: Vec<Access>,
    /// DMA of a device to plain memory (no region's handler was called): frames.
    pub dma: Vec<Vec<usize>>,
    /// Number of nested accesses found before recursion was folded.
    pub levels: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Path,
    Dispatched,
    Device,
}

#[derive(Default)]
struct Fields {
    addr: Vec<Source>,
    vaddr: Vec<Source>,
    size: Vec<Source>,
    len: Vec<Source>,
    count: Vec<Source>,
    offset: Vec<Source>,
    part: Vec<Source>,
    dispatch_size: Vec<Source>,
    handler_size: Vec<Source>,
    value: Vec<Source>,
    port_marks: Vec<(usize, bool)>,
    memory_marks: Vec<(usize, bool)>,
    write: Vec<(bool, usize, bool)>,
}

struct Building {
    access: Access,
    fields: Fields,
    phase: Phase,
    last: usize,
    /// Address space frames were seen (not only the entry).
    space_seen: bool,
    broken: bool,
    dma: bool,
}

fn linked(frames: &[Frame], outer: usize, inner: usize, prose: bool) -> bool {
    if prose || outer != inner + 1 {
        return false;
    }
    match (frames[outer].number, frames[inner].number) {
        (Some(o), Some(i)) => i.checked_add(1) == Some(o),
        // glibc backtraces and the like have no numbers and no arguments either.
        _ => false,
    }
}

fn pointer_like(v: u64) -> bool {
    // Host heap, stack and code of 64-bit hosts; guest-physical addresses stay below 2^44 on machines of today.
    v >= 1 << 44
}

/// Walks a stack from its outer end.
pub fn extract(stack: &Stack) -> Accesses {
    let frames = &stack.frames;
    let prose = stack.format == Format::Prose;
    let mut roles: HashMap<&str, Role> = HashMap::new();
    let mut out = Accesses::default();
    let mut cur: Option<Building> = None;
    let harness_space = |name: &str| {
        if name.starts_with("dispatch_mmio_") {
            Some(Space::Mmio)
        } else if name.starts_with("dispatch_pio_") {
            Some(Space::Pio)
        } else {
            None
        }
    };
    let mut told_space: Option<(Space, usize)> = None;
    for i in (0..frames.len()).rev() {
        let name = frames[i].function.as_str();
        let role = *roles.entry(name).or_insert_with(|| names::role(name));
        if let Some(s) = harness_space(name) {
            told_space = Some((s, i));
        }
        match role {
            Role::Other => {
                if let Some(b) = &mut cur {
                    match b.phase {
                        Phase::Path if b.space_seen && !names::is_runtime(name) && !name.is_empty() => {
                            b.broken = true
                        }
                        Phase::Path => {}
                        Phase::Dispatched | Phase::Device => {
                            if name.is_empty() && b.phase == Phase::Dispatched {
                                // An unnamed frame above the accessor is the handler without its name.
                            }
                            b.phase = Phase::Device;
                            b.access.device.push(i);
                        }
                    }
                }
                continue;
            }
            Role::Subpage => {
                let b = cur.get_or_insert_with(|| building(out.list.len(), i));
                link(b, frames, i, prose);
                b.access.subpages.push(i);
                b.phase = Phase::Path;
                b.access.path.push(i);
                read_fields(b, frames, i);
                // The outer offset is that of the page, not of the device's region.
                b.fields.offset.clear();
                b.fields.part.clear();
                b.fields.dispatch_size.clear();
                b.fields.handler_size.clear();
                continue;
            }
            Role::Entry | Role::Space | Role::Dma => {
                let fresh = match &cur {
                    None => true,
                    Some(b) => match b.phase {
                        Phase::Device | Phase::Dispatched => true,
                        Phase::Path => {
                            b.broken
                                || (role == Role::Dma
                                    && b.space_seen
                                    && !b.dma
                                    && !matches!(name, "address_space_unmap"))
                        }
                    },
                };
                if fresh {
                    let nested = cur.is_some();
                    if let Some(b) = cur.take() {
                        close(&mut out, b, frames, told_space.take());
                    }
                    let mut b = building(out.list.len(), i);
                    if role == Role::Dma || nested {
                        b.access.initiator = Initiator::Device;
                        b.dma = true;
                    }
                    b.dma |= role == Role::Dma;
                    cur = Some(b);
                }
                if let Some(b) = &mut cur {
                    if !fresh {
                        link(b, frames, i, prose);
                    } else {
                        b.access.gap = prose;
                        b.last = i;
                    }
                    b.space_seen |= role == Role::Space;
                    b.access.path.push(i);
                    if b.access.initiator == Initiator::Unknown {
                        b.access.initiator = initiator(frames, i);
                    }
                    read_fields(b, frames, i);
                }
            }
            Role::Dispatch => {
                let fresh = cur.as_ref().is_none_or(|b| b.phase == Phase::Device || b.broken);
                if fresh {
                    let nested = cur.is_some();
                    if let Some(b) = cur.take() {
                        close(&mut out, b, frames, told_space.take());
                    }
                    let mut b = building(out.list.len(), i);
                    b.access.gap = prose;
                    if nested {
                        b.access.initiator = Initiator::Device;
                    }
                    cur = Some(b);
                }
                if let Some(b) = &mut cur {
                    if !fresh {
                        link(b, frames, i, prose);
                    }
                    b.phase = Phase::Dispatched;
                    b.access.dispatched = true;
                    b.access.path.push(i);
                    read_fields(b, frames, i);
                }
            }
        }
    }
    if let Some(b) = cur.take() {
        close(&mut out, b, frames, told_space);
    }
    out.levels = out.list.len();
    fold(&mut out.list, frames);
    out
}

fn building(depth: usize, at: usize) -> Building {
    Building {
        access: Access::new(depth),
        fields: Fields::default(),
        phase: Phase::Path,
        last: at,
        space_seen: false,
        broken: false,
        dma: false,
    }
}

fn link(b: &mut Building, frames: &[Frame], i: usize, prose: bool) {
    if !linked(frames, b.last, i, prose) {
        // Frames of the software CPU between entry and memory path are expected.
        let between = frames.get(i + 1..b.last).unwrap_or(&[]);
        let numbered = matches!((frames[b.last].number, frames[i].number), (Some(o), Some(n)) if o as usize == n as usize + (b.last - i));
        if prose || !numbered || between.iter().any(|f| f.named() && names::role(&f.function) != Role::Other)
        {
            b.access.gap = true;
        }
    }
    b.last = i;
}

fn initiator(frames: &[Frame], i: usize) -> Initiator {
    // Look outwards; the nearest actor tells.
    for f in frames[i..].iter().take(64) {
        let n = f.function.as_str();
        if names::matches(
            "cpu_memory_rw_debug|target_memory_rw_debug|gdb_handle_packet|gdb_read_byte|memory_dump|hmp_memory_dump",
            n,
        ) {
            return Initiator::Debugger;
        }
        if names::matches("rom_reset|load_elf*|load_image*|rom_add*|address_space_set", n) {
            return Initiator::Rom;
        }
        if names::matches(
            "qtest_*|videzzo*|__videzzo*|dispatch_mmio_*|dispatch_pio_*|LLVMFuzzerTestOneInput|generic_fuzz|op_write|op_read|op_in|op_out|qemu_read?|qemu_write?|qemu_in?|qemu_out?",
            n,
        ) {
            return Initiator::Harness;
        }
        if names::matches(
            "kvm_cpu_exec|kvm_run|kvm_handle_io|handle_mmio|cpu_tb_exec|code_gen_buffer|tcg_*|*_tcg_cpu_thread_fn|cpu_exec*|helper_*|io_writex|io_readx|store_helper|load_helper|do_st*_mmu|do_ld*_mmu|cpu_ioreq_*|handle_ioreq|hvf_vcpu_exec|whpx_vcpu_run|do_st_mmio*|do_ld_mmio*|int_st*|int_ld*",
            n,
        ) {
            return Initiator::Guest;
        }
        if names::matches(
            "aio_bh_poll|aio_bh_call|timerlist_run_timers|coroutine_trampoline|qemu_timer_notify*",
            n,
        ) {
            return Initiator::Device;
        }
    }
    Initiator::Unknown
}

fn read_fields(b: &mut Building, frames: &[Frame], i: usize) {
    let f = &frames[i];
    let n = f.function.as_str();
    let ok = !b.access.gap;
    let src = |name: &str| {
        f.arg(name).and_then(|a| a.value.map(|v| Source { value: v, frame: i, entry: a.entry, linked: ok }))
    };
    let fl = &mut b.fields;
    if let Some(w) = names::direction(n) {
        fl.write.push((w, i, ok));
    }
    if let Some(s) = names::size_in_name(n) {
        // The name of the function is part of the frame: as good as a value at entry.
        let s = Source { value: s, frame: i, entry: true, linked: ok };
        if n.starts_with("address_space_") {
            // address_space_stb and the like are also how a nested access of that size begins.
            fl.len.push(s);
        } else if n.starts_with("ioport_") {
            // The thunk may serve one byte of a wider port access.
            fl.dispatch_size.push(s);
        } else {
            fl.size.push(s);
        }
    }
    let put = |to: &mut Vec<Source>, s: Option<Source>| {
        if let Some(s) = s {
            to.push(s);
        }
    };
    if names::matches(
        "kvm_handle_io|handle_io|cpu_out*|cpu_in|cpu_in?|helper_out*|helper_in?|do_outp|do_inp|cpu_ioreq_pio|ioport_*|memory_region_iorange_*|hvf_handle_io|whpx_emu_ioport_callback|nvmm_io_callback|qemu_out?|qemu_in?|portio_*",
        n,
    ) {
        fl.port_marks.push((i, ok));
    }
    if names::matches(
        "io_writex|io_readx|io_write?|io_read?|store_helper|load_helper|helper_*_mmu|do_st*|do_ld*|int_st*|int_ld*|handle_mmio|kvm_handle_mmio|cpu_ioreq_move|qemu_write?|qemu_read?|whpx_emu_mmio_callback|nvmm_mem_callback|__st?_mmu|__ld?_mmu|slow_st*|full_ld*",
        n,
    ) {
        fl.memory_marks.push((i, ok));
    }
    if let Some(t) = f.text("as") {
        if t.contains("address_space_io") {
            fl.port_marks.push((i, ok));
            b.access.as_name = Some("address_space_io".into());
        } else if t.contains("address_space_memory") {
            fl.memory_marks.push((i, ok));
            b.access.as_name = Some("address_space_memory".into());
        }
    }
    if let Some(w) = f.arg("is_write").and_then(|a| a.value) {
        // Booleans in optimized code are often garbage; only 0 and 1 count, and only beside the name.
        if w <= 1
            && names::matches("address_space_rw|cpu_physical_memory_rw|cpu_memory_rw_debug|flatview_rw", n)
        {
            fl.write.push((w == 1, i, ok && f.arg("is_write").is_some_and(|a| a.entry)));
        }
    }
    match n {
        "kvm_handle_io" | "handle_io" | "hvf_handle_io" => {
            put(&mut fl.addr, src("port"));
            put(&mut fl.size, src("size"));
            put(&mut fl.count, src("count"));
            if let Some(d) = f.num("direction")
                && d <= 1
            {
                // KVM_EXIT_IO_OUT is 1.
                fl.write.push((d == 1, i, ok && f.arg("direction").is_some_and(|a| a.entry)));
            }
        }
        "do_outp" | "do_inp" => {
            put(&mut fl.addr, src("addr"));
            put(&mut fl.size, src("size"));
            put(&mut fl.value, src("val"));
        }
        _ if names::matches("cpu_out*|cpu_in|cpu_in?|qemu_out?|qemu_in?", n) => {
            put(&mut fl.addr, src("addr"));
            put(&mut fl.value, src("val").or_else(|| src("value")));
        }
        _ if names::matches("helper_out*|helper_in?", n) => {
            put(&mut fl.addr, src("port"));
            put(&mut fl.value, src("data"));
        }
        _ if names::matches(
            "io_writex|io_readx|store_helper|load_helper|helper_*_mmu|do_st*|do_ld*|int_st*|int_ld*|io_write?|io_read?|__st?_mmu|__ld?_mmu|cpu_st*|cpu_ld*",
            n,
        ) =>
        {
            put(&mut fl.vaddr, src("addr").or_else(|| src("vaddr")).or_else(|| src("ptr")));
            put(&mut fl.value, src("val").filter(|_| names::direction(n) == Some(true)));
            put(&mut fl.size, src("size"));
            if let Some(s) = memop(f) {
                fl.size.push(Source { value: s, frame: i, entry: false, linked: ok });
            }
        }
        "memory_region_dispatch_write"
        | "memory_region_dispatch_read"
        | "memory_region_dispatch_read1"
        | "memory_region_dispatch_write1" => {
            put(&mut fl.offset, src("addr"));
            put(&mut fl.dispatch_size, src("size"));
            if let Some(s) = memop(f) {
                fl.dispatch_size.push(Source {
                    value: s,
                    frame: i,
                    entry: f.arg("op").is_some_and(|a| a.entry),
                    linked: ok,
                });
            }
            put(&mut fl.value, src("data").filter(|_| n.contains("write")));
        }
        "access_with_adjusted_size" | "access_with_adjusted_size_aligned" => {
            put(&mut fl.offset, src("addr"));
            put(&mut fl.dispatch_size, src("size"));
            b.access.limits = (
                f.num("access_size_min").filter(|&v| v <= 64).or(b.access.limits.0),
                f.num("access_size_max").filter(|&v| v <= 64).or(b.access.limits.1),
            );
        }
        _ if n.ends_with("_accessor") => {
            put(&mut fl.part, src("addr"));
            put(&mut fl.handler_size, src("size"));
            b.access.mask = f.num("mask").or(b.access.mask);
            b.access.shift = f.num("shift").or(b.access.shift);
        }
        "memory_region_iorange_write" | "memory_region_iorange_read" => {
            put(&mut fl.offset, src("offset"));
            put(&mut fl.dispatch_size, src("width"));
            put(&mut fl.value, src("data").filter(|_| n.ends_with("write")));
        }
        _ if n.starts_with("ioport_") => {
            put(&mut fl.addr, src("addr").or_else(|| src("address")));
            put(&mut fl.value, src("data").filter(|_| n.contains("write")));
        }
        "io_mem_write" | "io_mem_read" => {
            put(&mut fl.offset, src("addr"));
            put(&mut fl.dispatch_size, src("size"));
            put(&mut fl.value, src("val").filter(|_| n.ends_with("write")));
        }
        "portio_write" | "portio_read" => {
            put(&mut fl.part, src("addr"));
            put(&mut fl.handler_size, src("size"));
            put(&mut fl.value, src("data").filter(|_| n.ends_with("write")));
        }
        "subpage_write" | "subpage_read" => {
            put(&mut fl.len, src("len"));
        }
        _ => {
            if matches!(names::role(n), Role::Space)
                || names::matches(
                    "cpu_memory_rw_debug|target_memory_rw_debug|address_space_set|address_space_unmap|dma_memory_*|pci_dma_*",
                    n,
                )
            {
                let addr = src("addr").filter(|s| !pointer_like(s.value));
                // Inside the loop over regions, length and address move on: only values at entry are exact.
                let looping = n.contains("_continue");
                let soften =
                    |s: Option<Source>| s.map(|s| Source { linked: s.linked && (s.entry || !looping), ..s });
                let addr = soften(addr);
                let len = soften(src("len").filter(|s| s.value > 0 && s.value < 1 << 32))
                    .map(|s| Source { linked: s.linked && !looping, ..s });
                if names::matches("cpu_memory_rw_debug|target_memory_rw_debug", n) {
                    put(&mut fl.vaddr, addr);
                } else if !n.ends_with("unmap") && n != "prepare_mmio_access" {
                    put(&mut fl.addr, addr);
                }
                put(&mut fl.len, len);
                if n.contains("_continue") {
                    put(
                        &mut fl.offset,
                        src("addr1").or_else(|| src("mr_addr")).filter(|s| !pointer_like(s.value)),
                    );
                    if f.num("l").is_some_and(|v| matches!(v, 1 | 2 | 4 | 8)) {
                        put(&mut fl.dispatch_size, src("l"));
                    }
                }
                if names::matches("address_space_st*", n) {
                    put(&mut fl.value, src("val"));
                }
            }
        }
    }
    // The path tells in prose without the arguments of the frames.
    if f.args.iter().any(|a| a.name == "said_port") {
        put(&mut fl.addr, src("said_port"));
        fl.port_marks.push((i, false));
    }
    put(&mut fl.addr, src("said_addr"));
    put(&mut fl.size, src("said_size"));
    put(&mut fl.count, src("said_count"));
    put(&mut fl.offset, src("said_offset"));
    put(&mut fl.value, src("said_value"));
}

fn memop(f: &Frame) -> Option<u64> {
    let t = f.text("op")?;
    let bits = t.split("MO_").nth(1)?;
    let digits: String =
        bits.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    match digits.as_str() {
        "8" => Some(1),
        "16" => Some(2),
        "32" => Some(4),
        "64" => Some(8),
        _ if t.starts_with("MO_UB") => Some(1),
        _ if t.contains("UW") => Some(2),
        _ if t.contains("UL") => Some(4),
        _ if t.contains("UQ") || t.contains("MO_Q") || t.contains("EQ") => Some(8),
        _ => None,
    }
}

/// Chooses the value that most frames give; on a tie the outermost.
fn choose(sources: &[Source], keep: impl Fn(u64) -> bool) -> Option<Read<u64>> {
    let good: Vec<&Source> = sources.iter().filter(|s| keep(s.value)).collect();
    let mut best: Option<(u64, u64)> = None;
    for (order, s) in good.iter().enumerate() {
        let weight: u64 = good
            .iter()
            .filter(|o| o.value == s.value)
            .map(|o| {
                if o.entry && o.linked {
                    3
                } else if o.linked {
                    2
                } else {
                    1
                }
            })
            .sum();
        // `order` grows inwards; an outer source wins a tie.
        let score = weight * 1000 + (999 - order.min(999) as u64);
        if best.is_none_or(|(b, _)| score > b) {
            best = Some((score, s.value));
        }
    }
    let (_, value) = best?;
    let mut frames: Vec<usize> = good.iter().filter(|s| s.value == value).map(|s| s.frame).collect();
    frames.dedup();
    let agree = good.iter().filter(|s| s.value == value && s.linked).count();
    let entry = good.iter().any(|s| s.value == value && s.linked && s.entry);
    Some(Read::new(value, frames, entry || agree >= 2))
}

fn close(out: &mut Accesses, b: Building, frames: &[Frame], told: Option<(Space, usize)>) {
    let Building { mut access, fields, dma, .. } = b;
    if !access.dispatched
        && (dma || access.path.iter().all(|&i| names::role(&frames[i].function) == Role::Dma))
    {
        out.dma.push(access.path);
        return;
    }
    // An entry without anything of the path is an actor only, e.g. rom_reset, unless it is an access by itself.
    if !access.dispatched
        && access.path.iter().all(|&i| {
            names::matches(
                "qtest_process_command|rom_reset|address_space_set|cpu_memory_rw_debug|probe_access",
                &frames[i].function,
            )
        })
    {
        return;
    }
    // Space.
    let sure = |m: &[(usize, bool)]| m.iter().any(|x| x.1);
    let idx = |m: &[(usize, bool)]| m.iter().map(|x| x.0).collect::<Vec<_>>();
    let pio_frames = &fields.port_marks;
    let mem_frames = &fields.memory_marks;
    access.space =
        if !pio_frames.is_empty() && (mem_frames.is_empty() || sure(pio_frames) && !sure(mem_frames)) {
            Some(Read::new(Space::Pio, idx(pio_frames), sure(pio_frames)))
        } else if !mem_frames.is_empty() {
            Some(Read::new(Space::Mmio, idx(mem_frames), sure(mem_frames)))
        } else {
            told.map(|(s, i)| Read::new(s, vec![i], true))
        };
    let pio = access.space.as_ref().is_some_and(|s| s.value == Space::Pio && s.sure);
    access.addr = choose(&fields.addr, |v| !(pio && v > 0xffff));
    for s in &fields.addr {
        if let Some(a) = &access.addr {
            // Bulk transfers advance the address; that is not a contradiction.
            let near = s.value >= a.value && s.value - a.value < 1 << 20 && s.value > 0xffff;
            if s.value != a.value && !near {
                access.conflicts.push(format!(
                    "{} gives address {:#x} ({}), other frames {:#x} ({})",
                    frames[s.frame].function, s.value, s.value, a.value, a.value
                ));
            }
        }
    }
    access.conflicts.dedup();
    access.virtual_addr = choose(&fields.vaddr, |_| true);
    if access.space.is_none()
        && let Some(a) = access.addr.as_ref().filter(|a| a.value > 0xffff)
    {
        access.space = Some(Read::new(Space::Mmio, a.frames.clone(), a.sure));
    }
    if access.space.is_none() {
        access.space = guess_space(&access, frames);
    }
    // Offsets.
    access.part_offset = choose(&fields.part, |v| !pointer_like(v));
    access.offset = choose(&fields.offset, |v| !pointer_like(v));
    if access.offset.is_none() {
        // Without the dispatch frame the part that the handler got is all there is; it is the offset unless the
        // access was split.
        access.offset = access.part_offset.clone().map(|mut o| {
            let shift = access.shift.unwrap_or(0);
            let back = if shift < 64 { shift / 8 } else { 0 };
            if back > 0 {
                o.value = o.value.saturating_sub(back);
            }
            o.sure &= back == 0;
            o
        });
    }
    if let (Some(a), Some(o)) = (&access.addr, &access.offset)
        && a.value >= o.value
    {
        let mut fr = a.frames.clone();
        fr.extend(&o.frames);
        let base = a.value - o.value;
        // A port region of several ports does not start at an odd port: one of the two numbers is stale.
        if !(pio && o.value > 0 && base % 2 == 1) {
            access.base = Some(Read::new(base, fr, a.sure && o.sure));
        }
    }
    // Sizes.
    access.handler_size = choose(&fields.handler_size, |v| (1..=64).contains(&v));
    let dispatch = choose(&fields.dispatch_size, |v| (1..=64).contains(&v));
    access.size = choose(&fields.size, |v| (1..=64).contains(&v));
    if let Some(s) = &mut access.size {
        // The length on the way agrees with what the exit says.
        s.sure |= !s.frames.is_empty()
            && fields.size.iter().any(|x| x.value == s.value && x.linked)
            && fields.len.iter().any(|x| x.value == s.value && x.linked);
    }
    let len = choose(&fields.len, |v| v > 0);
    if access.size.is_none() {
        access.size = choose(&fields.len, |v| matches!(v, 1 | 2 | 4 | 8));
    }
    if let Some(l) = len.filter(|l| l.value > 8) {
        // Garbage in optimized code shows as a length that no other frame knows.
        if access.size.is_none() && l.frames.len() >= 2 {
            access.length = Some(l);
        }
    }
    if access.size.is_none() {
        access.size = dispatch.clone().or_else(|| access.handler_size.clone()).map(|mut s| {
            // The region may have seen only a part of what the guest asked for.
            s.sure = false;
            s
        });
    }
    if access.handler_size.is_none() {
        access.handler_size = None;
    }
    access.count = choose(&fields.count, |v| v > 0 && v < 1 << 20);
    access.value = choose(&fields.value, |_| true);
    // Direction: outer frames agree unless the stack is damaged.
    let votes = |w: bool| fields.write.iter().filter(|x| x.0 == w).count();
    if !fields.write.is_empty() {
        let w = votes(true) >= votes(false);
        let fr = fields.write.iter().filter(|x| x.0 == w).map(|x| x.1).collect();
        let sure = fields.write.iter().any(|x| x.0 == w && x.2) && (votes(!w) == 0);
        access.write = Some(Read::new(w, fr, sure));
    }
    if !access.dispatched && access.initiator == Initiator::Unknown {
        // Neither an actor nor a region: it may as well be a device's DMA whose other frames are missing.
        let Access {
            space,
            write,
            addr,
            virtual_addr,
            size,
            count,
            base,
            offset,
            handler_size,
            part_offset,
            ..
        } = &mut access;
        for r in
            [addr, virtual_addr, size, count, base, offset, handler_size, part_offset].into_iter().flatten()
        {
            r.sure = false;
        }
        if let Some(s) = space {
            s.sure = false;
        }
        if let Some(w) = write {
            w.sure = false;
        }
    }
    out.list.push(access);
}

/// Where no frame names the space: the software CPU's port instructions end in `address_space_st*` directly,
/// and handlers are mostly named after the kind of region they serve.
fn guess_space(a: &Access, frames: &[Frame]) -> Option<Read<Space>> {
    let outer = *a.path.first()?;
    let n = frames[outer].function.as_str();
    let caller = frames.get(outer + 1);
    if names::matches("address_space_st*|address_space_ld*", n) && a.initiator != Initiator::Device {
        // The software CPU's memory accesses never take this way.
        let from_code = caller.is_none_or(|c| {
            c.function == "code_gen_buffer" || !c.named() || c.function.starts_with("helper_")
        });
        let sure = caller.is_some_and(|c| {
            c.function == "code_gen_buffer"
                && matches!((c.number, frames[outer].number), (Some(o), Some(i)) if i.checked_add(1) == Some(o))
        });
        if from_code {
            return Some(Read::new(Space::Pio, vec![outer], sure));
        }
    }
    if a.initiator == Initiator::Guest
        && caller.is_some_and(|c| names::matches("kvm_cpu_exec|kvm_run", &c.function))
    {
        return Some(Read::new(Space::Mmio, vec![outer, outer + 1], false));
    }
    if a.initiator == Initiator::Harness
        || a.initiator == Initiator::Rom
        || a.initiator == Initiator::Debugger
    {
        return Some(Read::new(Space::Mmio, vec![outer], false));
    }
    // The handler's table entry, else its name.
    let evidence = a.device.first().copied();
    for &d in a.device.iter().take(3) {
        match crate::devices::handler_space(&frames[d]) {
            Some("pio") => return Some(Read::new(Space::Pio, vec![d], false)),
            Some("mmio") => return Some(Read::new(Space::Mmio, vec![d], false)),
            _ => {}
        }
        let n = frames[d].function.as_str();
        if names::matches("*_mem_*|*_mmio_*", n) {
            return Some(Read::new(Space::Mmio, vec![d], false));
        }
        if names::matches(
            "*ioport*|*_io_write*|*_io_read*|*portio*|*_pio_*|bmdma_*|*_port_write|*_port_read|vbe_*",
            n,
        ) {
            return Some(Read::new(Space::Pio, vec![d], false));
        }
    }
    if a.dispatched || a.addr.is_some() {
        return Some(Read::new(Space::Mmio, vec![evidence.unwrap_or(outer)], false));
    }
    None
}

/// Folds a recursion: equal accesses in a row become one with a count, keeping two so that the nesting shows.
fn fold(list: &mut Vec<Access>, frames: &[Frame]) {
    if list.len() <= 3 {
        return;
    }
    let key = |a: &Access| {
        (a.device.first().map(|&i| frames[i].function.clone()), a.write.as_ref().map(|w| w.value))
    };
    let mut out: Vec<Access> = Vec::new();
    for a in list.drain(..) {
        let n = out.len();
        if n >= 2 && key(&out[n - 1]) == key(&a) && key(&out[n - 2]) == key(&a) {
            out[n - 1].repeats += 1;
        } else {
            out.push(a);
        }
        if out.len() > 64 {
            break;
        }
    }
    for (d, a) in out.iter_mut().enumerate() {
        a.depth = d;
    }
    *list = out;
}

/// Parses a number for other modules.
pub(crate) fn parse_number(s: &str) -> Option<u64> {
    number(s)
}
