//! Runs cases on the host processor, in a child process.
//!
//! The child needs no code of its own for loading registers: a signal handler writes the case's registers (general, flags with
//! TF, and the whole XSAVE image) into the frame of the signal it handles, and the kernel loads them on return. One
//! instruction later the processor traps (or faults), and the next signal's frame holds the registers after it.
//!
//! The child's handler touches neither the heap nor thread-local storage. If an instruction kills or stops the child after all,
//! the parent starts another one and goes on with the next case.
#![allow(unsafe_code)]

use crate::case::{CODE, Case, DATA, Outcome, PAGE, READ_ONLY, Registers, TEMPLATE};
use anyhow::{Context, Result, bail};
use std::arch::x86_64::__cpuid_count;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Cases in one batch.
pub const BATCH: usize = 128;
/// Single steps that an instruction with a repeat prefix may take.
const STEPS: u32 = 64;

/// In place of a vector: the instruction was not done after STEPS steps.
pub const UNFINISHED: u8 = 255;

/// Memory shared with the child.
#[repr(C)]
struct Shared {
    /// Batches asked for.
    asked: AtomicU32,
    /// Batches done.
    done: AtomicU32,
    /// The case in execution.
    current: AtomicU32,
    count: u32,
    steps: u32,
    first: u32,
    template: [u8; TEMPLATE],
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
    /// The frame that the child's main flow is continued from.
    home: [u8; 1024],
    home_set: bool,
    layout: Layout,
    code_alias: u64,
}

/// Where XSAVE components are in the host's standard format.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Layout {
    enabled: u64,
    ymm: u32,
    opmask: u32,
    zmm_high: u32,
    zmm_upper: u32,
}

/// The host side of the comparison.
pub struct Native {
    shared: *mut Shared,
    pid: libc::pid_t,
    restarts: u64,
}

impl Native {
    /// Starts the child.
    pub fn new() -> Result<Native> {
        let size = std::mem::size_of::<Shared>();
        // SAFETY: a fresh mapping, zeroed; `Shared` is plain data for which zeros are valid (Option<u8> as zero is None).
        let shared = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if shared == libc::MAP_FAILED {
            bail!("no shared memory of {size} bytes: {}", std::io::Error::last_os_error());
        }
        let shared = shared.cast::<Shared>();
        let offset = |n: u32| __cpuid_count(0xd, n).ebx;
        // SAFETY: mapped above, and no child yet.
        unsafe {
            (*shared).layout = Layout {
                // XCR0 is what XGETBV says; CPUID gives the features enabled in this process's XSAVE area size, but the
                // enabled bits themselves come from the signal frame.
                enabled: u64::MAX,
                ymm: offset(2),
                opmask: offset(5),
                zmm_high: offset(6),
                zmm_upper: offset(7),
            };
        }
        let mut native = Native { shared, pid: 0, restarts: 0 };
        native.start()?;
        Ok(native)
    }

    /// How often a child had to be started anew.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    fn start(&mut self) -> Result<()> {
        let shared = self.shared;
        // SAFETY: the child runs `child` only, which uses neither heap nor locks.
        match unsafe { libc::fork() } {
            -1 => Err(std::io::Error::last_os_error()).context("fork failed"),
            0 => {
                // SAFETY: in the child; `shared` is mapped.
                unsafe { child(shared) };
            }
            pid => {
                self.pid = pid;
                Ok(())
            }
        }
    }

    /// Sets the contents that data and read-only pages have before each case.
    pub fn set_template(&mut self, template: &[u8; TEMPLATE]) {
        // SAFETY: the child only reads it inside of a batch.
        unsafe { (*self.shared).template = *template };
    }

    /// Runs at most BATCH cases. None for a case that killed or stopped the child.
    pub fn run(&mut self, cases: &[Case], mut take: impl FnMut(usize, Option<&Outcome>)) -> Result<()> {
        let shared = self.shared;
        let count = cases.len().min(BATCH);
        let mut first = 0;
        // SAFETY: the child waits for `asked` to change; until then this process alone uses the arrays.
        unsafe {
            (&mut (*shared).cases)[..count].copy_from_slice(&cases[..count]);
            (*shared).count = count as u32;
        }
        let mut dead = Vec::new();
        while first < count {
            // SAFETY: as above.
            unsafe {
                (*shared).first = first as u32;
                (*shared).current.store(first as u32, Ordering::SeqCst);
                let asked = (*shared).done.load(Ordering::SeqCst).wrapping_add(1);
                (*shared).asked.store(asked, Ordering::SeqCst);
                futex_wake(&(*shared).asked);
                if self.wait(asked)? {
                    break;
                }
                let current = (*shared).current.load(Ordering::SeqCst) as usize;
                dead.push(current);
                first = current + 1;
                (*shared).done.store(asked, Ordering::SeqCst);
            }
            self.restarts += 1;
            self.start()?;
        }
        for n in 0..count {
            // SAFETY: the child has finished the batch.
            let outcome = unsafe { &(&(*shared).outcomes)[n] };
            take(n, (!dead.contains(&n)).then_some(outcome));
        }
        Ok(())
    }

    /// Waits until the child has done batch `asked`; false when it died or hangs (then it is gone).
    fn wait(&mut self, asked: u32) -> Result<bool> {
        let begin = Instant::now();
        loop {
            // SAFETY: an atomic in shared memory.
            let done = unsafe { &(*self.shared).done };
            let now = done.load(Ordering::SeqCst);
            if now == asked {
                return Ok(true);
            }
            futex_wait(done, now, Duration::from_millis(50));
            if done.load(Ordering::SeqCst) == asked {
                return Ok(true);
            }
            let mut status = 0;
            // SAFETY: our own child.
            if unsafe { libc::waitpid(self.pid, &mut status, libc::WNOHANG) } == self.pid {
                return Ok(false);
            }
            if begin.elapsed() > Duration::from_secs(5) {
                self.stop();
                return Ok(false);
            }
        }
    }

    fn stop(&mut self) {
        if self.pid > 0 {
            // SAFETY: our own child, which was not waited for yet.
            unsafe {
                libc::kill(self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            }
            self.pid = 0;
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: mapped by `new`, used by nobody any more.
        unsafe { libc::munmap(self.shared.cast(), std::mem::size_of::<Shared>()) };
    }
}

fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let time =
        libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    // SAFETY: FUTEX_WAIT on a word in shared memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const time) };
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE on a word in shared memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

/// The shared memory, for the handler.
static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());

fn die(code: i32) -> ! {
    // SAFETY: leaves at once.
    unsafe { libc::_exit(code) }
}

/// The child: never returns.
///
/// # Safety
/// `shared` is mapped and shared with the parent.
unsafe fn child(shared: *mut Shared) -> ! {
    // SAFETY: plain system calls with valid arguments; this process has one thread.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        SHARED.store(shared, Ordering::SeqCst);
        let map = |at: u64, len: usize, protection: i32, fd: i32, fixed: i32| {
            let flags =
                fixed | if fd >= 0 { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
            let p = libc::mmap(at as *mut libc::c_void, len, protection, flags, fd, 0);
            if p == libc::MAP_FAILED {
                die(3);
            }
            p as u64
        };
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let fixed = libc::MAP_FIXED_NOREPLACE;
        let fd = libc::memfd_create(c"difftest-code".as_ptr(), 0);
        if fd < 0 || libc::ftruncate(fd, PAGE as i64) != 0 {
            die(3);
        }
        map(CODE, PAGE, libc::PROT_READ | libc::PROT_EXEC, fd, fixed);
        (*shared).code_alias = map(0, PAGE, rw, fd, 0);
        map(DATA, 2 * PAGE, rw, -1, fixed);
        map(READ_ONLY, PAGE, rw, -1, fixed);
        let stack_size = 256 * 1024;
        let stack = map(0, stack_size, rw, -1, 0);
        let alternate = libc::stack_t { ss_sp: stack as *mut libc::c_void, ss_flags: 0, ss_size: stack_size };
        if libc::sigaltstack(&alternate, std::ptr::null_mut()) != 0 {
            die(4);
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                die(4);
            }
        }
        // A new child begins with what the parent asks next.
        let mut seen = (*shared).done.load(Ordering::SeqCst);
        loop {
            let asked = (*shared).asked.load(Ordering::SeqCst);
            if asked == seen {
                futex_wait(&(*shared).asked, asked, Duration::from_secs(3600));
                continue;
            }
            seen = asked;
            std::ptr::copy_nonoverlapping(
                (&raw const (*shared).template).cast::<u8>().add(2 * PAGE),
                READ_ONLY as *mut u8,
                PAGE,
            );
            libc::mprotect(READ_ONLY as *mut libc::c_void, PAGE, libc::PROT_READ);
            std::ptr::copy_nonoverlapping(
                (&raw const (*shared).template).cast::<u8>(),
                DATA as *mut u8,
                2 * PAGE,
            );
            (*shared).home_set = false;
            // The handler takes over here and comes back when the batch is done.
            std::arch::asm!("int3");
            libc::mprotect(READ_ONLY as *mut libc::c_void, PAGE, rw);
            (*shared).done.store(asked, Ordering::SeqCst);
            futex_wake(&(*shared).done);
        }
    }
}

/// General registers of the signal frame, in encoding order.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: clears AC (and TF), which the instruction may have set and which the kernel leaves on for handlers. Nothing else is
    // touched; the red zone isn't used by this function yet, and pushes go below it at most by 8 bytes of dead stack.
    unsafe { std::arch::asm!("push 2", "popfq") };
    // SAFETY: the kernel's frame; `child` set SHARED before it installed this handler.
    unsafe { step(&mut *SHARED.load(Ordering::Relaxed), &mut *context.cast::<libc::ucontext_t>()) };
}

/// # Safety
/// `context` is the frame of a signal, with the XSAVE image where the kernel puts it.
unsafe fn step(shared: &mut Shared, context: &mut libc::ucontext_t) {
    let fp = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: the frame's image is as large as its software-reserved bytes say (Linux, uapi/asm/sigcontext.h).
    let image = unsafe {
        let extended = fp.add(464).cast::<u32>().read_unaligned() == 0x4650_5853;
        let size = fp.add(468).cast::<u32>().read_unaligned() as usize;
        std::slice::from_raw_parts_mut(fp, if extended { size } else { 512 })
    };
    let number = shared.current.load(Ordering::Relaxed);
    let size = std::mem::size_of_val(&context.uc_mcontext.gregs);
    if !shared.home_set {
        // The int3 of `child`.
        let gregs = (&raw const context.uc_mcontext.gregs).cast::<u8>();
        // SAFETY: `home` is larger than the registers.
        unsafe { std::ptr::copy_nonoverlapping(gregs, shared.home.as_mut_ptr(), size) };
        shared.home_set = true;
        load(shared, shared.first, context, image);
        return;
    }
    let Some(case) = shared.cases.get(number as usize) else { die(5) };
    let gregs = &context.uc_mcontext.gregs;
    let trap = gregs[libc::REG_TRAPNO as usize];
    if trap == 1
        && case.repeats
        && gregs[libc::REG_RIP as usize] as u64 == case.before.rip
        && shared.steps < STEPS
    {
        shared.steps += 1;
        return;
    }
    save(shared, number, context, image);
    if trap == 1
        && shared.steps >= STEPS
        && let Some(outcome) = shared.outcomes.get_mut(number as usize)
    {
        outcome.vector = Some(UNFINISHED);
    }
    let next = number + 1;
    if next < shared.count {
        load(shared, next, context, image);
        return;
    }
    let gregs = (&raw mut context.uc_mcontext.gregs).cast::<u8>();
    // SAFETY: `home` holds the registers saved above.
    unsafe { std::ptr::copy_nonoverlapping(shared.home.as_ptr(), gregs, size) };
    // The main flow wants the FPU and vectors in their initial state.
    put(image, 512, 0_u64.to_le_bytes());
}

fn put<const N: usize>(image: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(bytes) = image.get_mut(at..at + N) {
        bytes.copy_from_slice(&value);
    }
}

fn get<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    image.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
}

fn get64(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(image, at))
}

/// Prepares the frame for case `number`.
fn load(shared: &mut Shared, number: u32, context: &mut libc::ucontext_t, image: &mut [u8]) {
    shared.current.store(number, Ordering::SeqCst);
    shared.steps = 0;
    let Some(case) = shared.cases.get(number as usize) else { die(5) };
    let r = &case.before;
    for (n, &at) in GREGS.iter().enumerate() {
        context.uc_mcontext.gregs[at as usize] = r.gpr[n] as i64;
    }
    context.uc_mcontext.gregs[libc::REG_RIP as usize] = r.rip as i64;
    // TF: one instruction.
    context.uc_mcontext.gregs[libc::REG_EFL as usize] = (r.rflags | 0x100 | 0x200) as i64;
    let offset = (r.rip - CODE) as usize;
    // SAFETY: the alias of the code page; `rip` is in it with `placed` bytes after it.
    unsafe {
        let code = std::slice::from_raw_parts_mut(shared.code_alias as *mut u8, PAGE);
        if let Some(place) = code.get_mut(offset..offset + usize::from(case.placed)) {
            place.copy_from_slice(&case.bytes[..usize::from(case.placed)]);
        }
    }
    put(image, 0, r.fcw.to_le_bytes());
    put(image, 2, r.fsw.to_le_bytes());
    put(image, 4, [r.ftw, 0]);
    put(image, 6, [0; 18]);
    put(image, 24, r.mxcsr.to_le_bytes());
    let top = usize::from(r.fsw >> 11 & 7);
    for i in 0..8 {
        let register = (top + i) & 7;
        put(image, 32 + i * 16, r.significand[register].to_le_bytes());
        put(image, 40 + i * 16, r.exponent[register].to_le_bytes());
    }
    let layout = shared.layout;
    for (n, register) in r.vec.iter().enumerate() {
        for (q, quad) in register.iter().enumerate() {
            put(image, vector_at(&layout, n, q), quad.to_le_bytes());
        }
    }
    for (n, k) in r.opmask.iter().enumerate() {
        put(image, layout.opmask as usize + n * 8, k.to_le_bytes());
    }
    // Everything that the frame has, but for protection keys, which stay as they are.
    let features = get64(image, 472);
    let old = get64(image, 512);
    put(image, 512, (features & 0xe7 | old & 0x200).to_le_bytes());
}

/// Where a quadword of a vector register is in the standard format.
fn vector_at(layout: &Layout, register: usize, quad: usize) -> usize {
    match (register, quad) {
        (16.., _) => layout.zmm_upper as usize + (register - 16) * 64 + quad * 8,
        (_, 0..2) => 160 + register * 16 + quad * 8,
        (_, 2..4) => layout.ymm as usize + register * 16 + (quad - 2) * 8,
        _ => layout.zmm_high as usize + register * 32 + (quad - 4) * 8,
    }
}

/// Takes the result of case `number` from the frame.
fn save(shared: &mut Shared, number: u32, context: &libc::ucontext_t, image: &[u8]) {
    let layout = shared.layout;
    let Some(outcome) = shared.outcomes.get_mut(number as usize) else { die(5) };
    let gregs = &context.uc_mcontext.gregs;
    let r = &mut outcome.after;
    for (n, &at) in GREGS.iter().enumerate() {
        r.gpr[n] = gregs[at as usize] as u64;
    }
    r.rip = gregs[libc::REG_RIP as usize] as u64;
    r.rflags = gregs[libc::REG_EFL as usize] as u64;
    // Components in their initial state are not in the image.
    let present = get64(image, 512);
    r.fcw = if present & 1 != 0 { u16::from_le_bytes(get(image, 0)) } else { 0x37f };
    r.fsw = if present & 1 != 0 { u16::from_le_bytes(get(image, 2)) } else { 0 };
    r.ftw = if present & 1 != 0 { image.get(4).copied().unwrap_or(0) } else { 0 };
    r.mxcsr = u32::from_le_bytes(get(image, 24));
    let top = usize::from(r.fsw >> 11 & 7);
    for i in 0..8 {
        let register = (top + i) & 7;
        let low = if present & 1 != 0 { get64(image, 32 + i * 16) } else { 0 };
        let high = if present & 1 != 0 { u16::from_le_bytes(get(image, 40 + i * 16)) } else { 0 };
        r.significand[register] = low;
        r.exponent[register] = high;
    }
    for (n, register) in r.vec.iter_mut().enumerate() {
        for (q, quad) in register.iter_mut().enumerate() {
            let component = match (n, q) {
                (16.., _) => 7,
                (_, 0..2) => 1,
                (_, 2..4) => 2,
                _ => 6,
            };
            *quad = if present >> component & 1 != 0 { get64(image, vector_at(&layout, n, q)) } else { 0 };
        }
    }
    for (n, k) in r.opmask.iter_mut().enumerate() {
        *k = if present >> 5 & 1 != 0 { get64(image, layout.opmask as usize + n * 8) } else { 0 };
    }
    let trap = gregs[libc::REG_TRAPNO as usize] as u8;
    outcome.vector = if trap == 1 { None } else { Some(trap) };
    outcome.error = if trap == 1 { 0 } else { gregs[libc::REG_ERR as usize] as u32 };
    outcome.cr2 = if trap == 14 { gregs[libc::REG_CR2 as usize] as u64 } else { 0 };
    // SAFETY: the data pages are mapped, and nobody else uses them.
    unsafe {
        let data = DATA as *mut u8;
        let template = (&raw const shared.template).cast::<u8>();
        outcome.changed = libc::memcmp(data.cast(), template.cast(), 2 * PAGE) != 0;
        if outcome.changed {
            std::ptr::copy_nonoverlapping(data, outcome.data.as_mut_ptr(), 2 * PAGE);
            std::ptr::copy_nonoverlapping(template, data, 2 * PAGE);
        }
    }
}

/// Whether two register sets can be compared in full on this host.
pub fn host_has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bw")
}

const _: () = assert!(std::mem::size_of::<Registers>().is_multiple_of(64));
