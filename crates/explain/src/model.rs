//! What was read from the text: frames, stacks, messages. Nothing here is a conclusion.

/// One argument of a frame, as the debugger printed it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Arg {
    /// Name without the `@entry` suffix.
    pub name: String,
    /// The number, when one was printed (pointers are numbers too; negative numbers wrap to 64 bits).
    pub value: Option<u64>,
    /// True when the debugger marked the value as the one at function entry (`x@entry=`), which is exact
    /// even in optimized code.
    pub entry: bool,
    /// The printed text, shortened.
    pub text: String,
}

/// One line of a backtrace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frame {
    /// `#N`, when the text numbers its frames.
    pub number: Option<u32>,
    /// Program counter.
    pub pc: Option<u64>,
    /// Function name without compiler suffixes; empty when there is none.
    pub function: String,
    /// Arguments in the order printed.
    pub args: Vec<Arg>,
    /// Source file as printed.
    pub file: String,
    /// Source line.
    pub line: Option<u32>,
    /// Module (program or library) when the text names one.
    pub module: String,
    /// Offset in the module, as the text prints it.
    pub module_offset: Option<u64>,
    /// Line of the input (from 1) on which the frame starts.
    pub input_line: u64,
}

impl Frame {
    /// True when the frame has a function name.
    pub fn named(&self) -> bool {
        !self.function.is_empty()
    }

    /// The argument with this name; a value at entry is preferred.
    pub fn arg(&self, name: &str) -> Option<&Arg> {
        self.args
            .iter()
            .find(|a| a.entry && a.value.is_some() && a.name == name)
            .or_else(|| self.args.iter().find(|a| a.value.is_some() && a.name == name))
            .or_else(|| self.args.iter().find(|a| a.name == name))
    }

    /// The number given for the argument.
    pub fn num(&self, name: &str) -> Option<u64> {
        self.arg(name).and_then(|a| a.value)
    }

    /// The text given for the argument.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.arg(name).map(|a| a.text.as_str())
    }

    /// Last part of the source path.
    pub fn file_name(&self) -> &str {
        self.file.rsplit(['/', '\\']).next().unwrap_or("")
    }
}

/// How the frames of a stack are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// gdb `bt`, `bt full`, `thread apply all bt`.
    GdbBt,
    /// Address, undefined behaviour, thread and leak sanitizers, libFuzzer.
    Sanitizer,
    /// `coredumpctl` and the journal.
    SystemdCoredump,
    /// `backtrace_symbols` of the C library.
    GlibcBacktrace,
    /// lldb.
    Lldb,
    /// macOS crash report.
    MacosCrash,
    /// Valgrind.
    Valgrind,
    /// `RUST_BACKTRACE`.
    Rust,
    /// Names and places only, without numbers or addresses.
    Names,
    /// Function names in sentences.
    Prose,
    /// Our own crash report.
    HyalineReport,
}

/// What a stack is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StackKind {
    /// A thread, or the place of the failure.
    Thread,
    /// Where the memory was released before.
    FreedBy,
    /// Where the memory was obtained.
    AllocatedBy,
}

/// Frames of one thread, innermost first.
#[derive(Debug, Clone)]
pub struct Stack {
    /// What it is about.
    pub kind: StackKind,
    /// Thread number of the debugger.
    pub thread: Option<u32>,
    /// Thread name, or the sanitizer's `T0`.
    pub name: String,
    /// How it is written.
    pub format: Format,
    /// Frames, innermost first.
    pub frames: Vec<Frame>,
    /// Frames beyond the limit, not stored.
    pub dropped: u64,
    /// Indexes of messages that stand right before this stack.
    pub messages: Vec<usize>,
    /// The text says that this thread received the signal.
    pub signalled: bool,
}

/// A line around the frames that says something about the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A signal, e.g. `SIGSEGV`.
    Signal(String),
    /// Assertion text, file, line, function as far as given.
    Assert {
        /// The expression.
        text: String,
        /// File, or empty.
        file: String,
    },
    /// `g_assert_not_reached`.
    NotReached(String),
    /// A sanitizer's kind (`heap-buffer-overflow`), and the address.
    Sanitizer {
        /// Which kind.
        kind: String,
        /// Address, if printed.
        addr: Option<u64>,
    },
    /// READ/WRITE of size N.
    BadAccess {
        /// True for WRITE.
        write: bool,
        /// Bytes; none when not told.
        size: Option<u64>,
    },
    /// UBSAN text.
    Undefined(String),
    /// The faulting address that a debugger or the kernel's log gives.
    Fault(u64),
    /// LeakSanitizer.
    Leak(String),
    /// The C library's check.
    LibC(String),
    /// libFuzzer's end: deadly signal, timeout, out-of-memory.
    Fuzzer(String),
    /// QEMU's own last words, e.g. `kvm_mem_ioeventfd_add: error adding ioeventfd`.
    Program(String),
}

/// Everything read from one input.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Stacks in the order of the text.
    pub stacks: Vec<Stack>,
    /// Messages in the order of the text.
    pub messages: Vec<Message>,
    /// Text around the stacks, shortened, cleaned.
    pub prose: Vec<String>,
    /// Number of lines read.
    pub lines: u64,
    /// Number of bytes read.
    pub bytes: u64,
    /// Frames found (stored or not).
    pub frames: u64,
    /// Stacks found (stored or not).
    pub stacks_found: u64,
    /// Something was left out because it is over a limit; says what.
    pub limits: Vec<String>,
    /// Places where the text gives two different numbers for the same thing.
    pub disagreements: Vec<String>,
    /// Our own crash report, when the input is one.
    pub hyaline: Option<crate::report::CrashReport>,
}
