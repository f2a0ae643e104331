//! Differential test of the software processor: random unprivileged instructions are executed by the host's processor in a
//! child process and by the interpreter, and all state is compared. The host is the oracle.

pub mod case;
pub mod compare;
pub mod generate;
pub mod native;
pub mod random;
pub mod subject;

use anyhow::Result;
use case::{Case, Outcome, TEMPLATE};
use generate::Generator;
use hyaline_x86::CpuModel;
use iced_x86::{Instruction, Mnemonic};
use random::Random;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long, at most.
    pub time: Duration,
    /// How many cases, at most.
    pub cases: u64,
    /// The first case's seed; the following ones count up.
    pub seed: u64,
    /// Only this mnemonic.
    pub only: Option<Mnemonic>,
    /// Mismatches reported in full, of each mnemonic.
    pub shown: usize,
}

/// What a run found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Cases compared.
    pub cases: u64,
    /// Cases in which the host raised an exception.
    pub faults: u64,
    /// Cases that killed the child and were not compared.
    pub lost: u64,
    /// Cases that weren't compared because the instruction repeats longer than the host was stepped.
    pub unfinished: u64,
    /// Mismatches by mnemonic.
    pub mismatches: BTreeMap<String, u64>,
    /// Reports of mismatches with reproducers.
    pub texts: Vec<String>,
    /// Time it took.
    pub time: Duration,
    /// Mnemonics that were chosen from.
    pub mnemonics: usize,
}

impl Report {
    /// All mismatches.
    pub fn mismatched(&self) -> u64 {
        self.mismatches.values().sum()
    }
}

/// Runs the comparison.
pub fn run(options: &Options, model: Arc<CpuModel>) -> Result<Report> {
    let generator = Generator::new(options.only, |f| model.has(f));
    let mut native = native::Native::new()?;
    let mut subject = subject::Subject::new(model)?;
    let begin = Instant::now();
    let mut report = Report { mnemonics: generator.mnemonics(), ..Report::default() };
    let mut seed = options.seed;
    let mut batch: Vec<(Case, Instruction)> = Vec::new();
    // Zeros are a valid outcome.
    let mut ours: Box<Outcome> = empty_outcome();
    while begin.elapsed() < options.time && report.cases + report.lost + report.unfinished < options.cases {
        // The memory's contents belong to the batch, a batch to its first seed rounded down: so a seed alone tells all.
        let template = template(seed / native::BATCH as u64);
        native.set_template(&template);
        subject.set_template(&template)?;
        batch.clear();
        let end = (seed / native::BATCH as u64 + 1) * native::BATCH as u64;
        while seed < end && (batch.len() as u64) < options.cases - report.cases - report.lost {
            batch.push(generator.case(seed));
            seed += 1;
        }
        let cases: Vec<Case> = batch.iter().map(|(case, _)| *case).collect();
        let mut result = Ok(());
        native.run(&cases, |n, host| {
            let Some(host) = host else {
                report.lost += 1;
                return;
            };
            let (case, i) = &batch[n];
            if result.is_ok() {
                result = subject.run(case, &mut ours);
            }
            if host.vector == Some(native::UNFINISHED) {
                report.unfinished += 1;
                return;
            }
            report.cases += 1;
            report.faults += u64::from(host.vector.is_some());
            let text = compare::differences(case, i, host, &mut ours);
            if !text.is_empty() {
                let name =
                    if i.is_invalid() { "(unknown bytes)".into() } else { format!("{:?}", i.mnemonic()) };
                let count = report.mismatches.entry(name).or_default();
                *count += 1;
                if *count as usize <= options.shown {
                    report.texts.push(describe(case, i, host, &text));
                }
            }
        })?;
        result?;
    }
    report.time = begin.elapsed();
    Ok(report)
}

fn empty_outcome() -> Box<Outcome> {
    Box::new(Outcome {
        after: case::Registers {
            vec: [[0; 8]; 32],
            gpr: [0; 16],
            opmask: [0; 8],
            rip: 0,
            rflags: 0,
            significand: [0; 8],
            exponent: [0; 8],
            mxcsr: 0,
            fcw: 0,
            fsw: 0,
            ftw: 0,
        },
        vector: None,
        error: 0,
        cr2: 0,
        changed: false,
        data: [0; 2 * case::PAGE],
    })
}

fn template(number: u64) -> Box<[u8; TEMPLATE]> {
    let mut r = Random::new(number ^ 0x5eed_0000_0000);
    let mut bytes = Box::new([0; TEMPLATE]);
    for chunk in bytes.chunks_exact_mut(8) {
        let value = match r.below(4) {
            0 => r.bits(),
            1 => (r.below(2000) as f64 / 16.0 - 60.0).to_bits(),
            2 => u64::from((r.below(2000) as f32 / 16.0).to_bits()) * 0x1_0000_0001,
            _ => r.below(256),
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn describe(case: &Case, i: &Instruction, host: &Outcome, differences: &str) -> String {
    use std::fmt::Write;
    let length = if i.is_invalid() { 15 } else { i.len() };
    let bytes: Vec<String> = case.bytes[..length.min(16)].iter().map(|b| format!("{b:02x}")).collect();
    let mut text = format!("seed {}: {} | ", case.seed, bytes.join(" "));
    let mut formatted = String::new();
    use iced_x86::Formatter;
    iced_x86::GasFormatter::new().format(i, &mut formatted);
    let _ = writeln!(
        text,
        "{formatted} ({:?}) at {:#x}, {} bytes placed{}{}",
        i.code(),
        case.before.rip,
        case.placed,
        compare::operand(case, i).map_or(String::new(), |at| format!(", operand at {at:#x}")),
        host.vector.map_or(String::new(), |v| format!(", host exception {v}"))
    );
    text + differences
}

/// The model that this host's processor is: what it has and the software processor can do.
pub fn host_model() -> Result<CpuModel> {
    use hyaline_x86::cpuid::{Accelerator, HostCpu};
    Ok(CpuModel::parse("host", &HostCpu::detect(), Accelerator::Software)?)
}
