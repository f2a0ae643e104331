//! The way of one access, told layer by layer beside the names that QEMU's frames have for the same steps.

use crate::record::{AccessRecord, Site};
use crate::text::{bytes, duration, verb};
use hyaline_space::{Actor, ExitKind, Outcome, Path, StepKind, Why};

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runner {
    /// The host's kernel.
    Kvm,
    /// The translator, a thread for each processor.
    Jit,
    /// The interpreter, a thread for each processor.
    Interp,
    /// The software CPU, where processors take turns on the thread that runs the machine.
    InTurns,
}

impl Runner {
    /// The name of the host thread that runs a processor.
    pub fn thread(self, vcpu: u8) -> String {
        match self {
            Runner::Kvm => format!("vcpu{vcpu}/kvm"),
            Runner::Jit => format!("vcpu{vcpu}/jit"),
            Runner::Interp => format!("vcpu{vcpu}/interp"),
            Runner::InTurns => "main, where processors take turns".into(),
        }
    }
}

/// Tells the way of an access.
#[derive(Clone, Copy, Debug)]
pub struct Teller {
    /// What ran the guest.
    pub runner: Runner,
}

/// One line of the tree: Hyaline's step, and what QEMU calls it.
struct Step {
    text: String,
    qemu: String,
    /// Goes one deeper than the line before.
    deeper: bool,
}

impl Teller {
    /// The tree. `path` is what `AddressSpace::resolve` says of the access's address now, which is where it went unless the map was changed since
    /// (the last line but the outcome then tells another region than the record). With a trailing newline.
    pub fn tell(&self, path: &Path, record: &AccessRecord, site: &Site) -> String {
        let mut steps = Vec::new();
        let mut add =
            |text: String, qemu: &str| steps.push(Step { text, qemu: qemu.to_string(), deeper: true });
        let rw = if record.is_write { "write" } else { "read" };
        self.entry(record, &mut add);
        add(
            format!(
                "address space \"{}\", {rw} {} at {:#x} ({})",
                path.space,
                bytes(path.size),
                path.addr,
                path.addr
            ),
            &format!("address_space_rw, address_space_{rw}"),
        );
        match &path.range {
            Some(range) => {
                let offset = range.offset + (path.addr - range.range.start);
                add(
                    format!(
                        "flat view: {:#x} to {:#x} is {} ({}); base {:#x}, offset {offset:#x}",
                        range.range.start,
                        range.range.last,
                        range.region,
                        range.kind.as_str(),
                        path.addr.wrapping_sub(offset),
                    ),
                    &format!("flatview_{rw}, flatview_{rw}_continue"),
                );
            }
            None => add(
                "flat view: a hole, nothing is mapped there".to_string(),
                &format!("flatview_{rw}, flatview_{rw}_continue"),
            ),
        }
        if !path.layers.is_empty() {
            steps.push(Step {
                text: format!("by way of {}", layers(path)),
                qemu: String::new(),
                deeper: false,
            });
        }
        for hidden in &path.hidden {
            let why = match hidden.why {
                Why::LowerPriority => "has a lower priority",
                Why::AddedEarlier => "has the same priority and was added earlier",
                Why::BehindOwnChild => "is covered by what it holds",
                Why::Disabled => "is switched off",
            };
            let by = hidden.by.as_ref().map(|b| format!(", {b} is seen")).unwrap_or_default();
            let text = format!(
                "hidden here: {} ({}): {} {why}{by}",
                hidden.path,
                hidden.kind.as_str(),
                hidden.through
            );
            steps.push(Step { text, qemu: String::new(), deeper: false });
        }
        let mut add =
            |text: String, qemu: &str| steps.push(Step { text, qemu: qemu.to_string(), deeper: true });
        add(validity(path), &format!("memory_region_dispatch_{rw}"));
        add(adjustment(path, record), "access_with_adjusted_size");
        let reached = match site.register.filter(|_| record.parts > 0) {
            Some(r) => format!(
                "{} +{:#x}, register {}: {}",
                site.label(),
                record.offset,
                r.name,
                if r.when.is_empty() { r.doc.to_string() } else { format!("{} ({})", r.doc, r.when) }
            ),
            None if record.parts > 0 => format!("{} +{:#x}", site.label(), record.offset),
            None => "no device was asked".to_string(),
        };
        let accessor =
            if record.is_write { "memory_region_write_accessor" } else { "memory_region_read_accessor" };
        add(reached, if record.parts > 0 { accessor } else { "" });
        let direction = if record.is_write { "written" } else { "read" };
        let value = format!("value {direction}: {}", record.value_text(site));
        steps.push(Step { text: value, qemu: String::new(), deeper: true });
        let outcome = match record.outcome {
            Outcome::Ok => "done".to_string(),
            other => other.to_string(),
        };
        steps.push(Step {
            text: format!("outcome: {outcome}, after {}", duration(record.took)),
            qemu: String::new(),
            deeper: false,
        });
        for finding in record.findings(site) {
            steps.push(Step { text: format!("! {finding}"), qemu: String::new(), deeper: false });
        }
        draw(&steps)
    }

    /// Who, and how the access came out of the guest.
    fn entry(&self, record: &AccessRecord, add: &mut impl FnMut(String, &str)) {
        let kvm = self.runner == Runner::Kvm;
        let element = if record.count > 0 {
            format!(", element {} of a string instruction", record.count)
        } else {
            String::new()
        };
        match record.actor {
            Actor::Vcpu(n) => {
                let frames = match self.runner {
                    Runner::Kvm => "qemu_thread_start, kvm_vcpu_thread_fn",
                    Runner::Jit | Runner::Interp => "qemu_thread_start, mttcg_cpu_thread_fn",
                    Runner::InTurns => "qemu_thread_start, rr_cpu_thread_fn",
                };
                add(format!("vCPU {n}, host thread {}", self.runner.thread(n)), frames);
                let run =
                    if kvm { "KVM runs the guest until an exit" } else { "the software CPU runs the guest" };
                add(
                    format!("{run}; instruction at {:#x}", record.rip),
                    if kvm { "kvm_cpu_exec" } else { "tcg_cpu_exec, cpu_exec" },
                );
                let size = bytes(record.size);
                let (text, frame) = match record.exit {
                    ExitKind::PioIn | ExitKind::PioOut => {
                        let helper = match (record.is_write, record.size) {
                            (true, 1) => "helper_outb",
                            (true, 2) => "helper_outw",
                            (true, _) => "helper_outl",
                            (false, 1) => "helper_inb",
                            (false, 2) => "helper_inw",
                            (false, _) => "helper_inl",
                        };
                        let text = format!(
                            "{} of {size}, port {:#x} ({}){element}",
                            verb(record),
                            record.addr,
                            record.addr
                        );
                        (text, if kvm { "kvm_handle_io" } else { helper })
                    }
                    _ => {
                        let helper = if record.is_write { "do_st_mmio_leN" } else { "do_ld_mmio_beN" };
                        let text = format!(
                            "{} of {size} of device memory at {:#x}{element}",
                            verb(record),
                            record.addr
                        );
                        (text, if kvm { "KVM_EXIT_MMIO in kvm_cpu_exec" } else { helper })
                    }
                };
                add(text, frame);
            }
            Actor::Dma(d) => add(format!("device {} masters the bus", d.0), "dma_memory_rw, pci_dma_rw"),
            Actor::Debugger => add("the debugger".to_string(), "gdb_handle_packet, cpu_memory_rw_debug"),
            Actor::Loader => {
                add("the board loads an image".to_string(), "rom_reset, address_space_write_rom")
            }
        }
    }
}

/// The regions from the root to the one that answers.
fn layers(path: &Path) -> String {
    let names: Vec<String> = path
        .layers
        .iter()
        .enumerate()
        .map(|(i, layer)| {
            let mut s = layer.name.clone();
            if i > 0 && layer.aliased {
                s = format!("(alias to) {s}");
            }
            if i > 0 {
                s += &format!(" at {:#x}", layer.at);
            }
            if layer.priority != 0 && !layer.aliased {
                s += &format!(" priority {}", layer.priority);
            }
            s
        })
        .collect();
    names.join(" > ")
}

fn validity(path: &Path) -> String {
    let refused = path.steps.iter().find_map(|s| match s.kind {
        StepKind::Refused { error } => Some(format!("not valid for the region: {error}")),
        StepKind::Nobody => Some("nobody answers".to_string()),
        _ => None,
    });
    refused.unwrap_or_else(|| {
        let shortcut = path.steps.iter().any(|s| s.kind == StepKind::EventFd);
        let tail = if shortcut { "; an ioeventfd may take it" } else { "" };
        format!("valid for the region: size and alignment{tail}")
    })
}

fn adjustment(path: &Path, record: &AccessRecord) -> String {
    let calls: Vec<_> = path
        .steps
        .iter()
        .filter_map(|s| match s.kind {
            StepKind::Call { offset, width, skip } => Some((s.size, offset, width, skip)),
            _ => None,
        })
        .collect();
    let size = record.size;
    match calls.as_slice() {
        [] => format!("{}: not for a device's handler", bytes(size)),
        [(wanted, _, width, 0)] if wanted == width => format!("size: {size} -> {width}, one call, no split"),
        [(_, offset, width, skip)] => {
            format!(
                "size: {size} -> {width}, widened; the bytes wanted are {skip} into the call at {offset:#x}"
            )
        }
        many => {
            let each = many
                .iter()
                .map(|(_, offset, width, _)| format!("{width} at {offset:#x}"))
                .collect::<Vec<_>>();
            format!("size: {size} -> {} calls: {}", many.len(), each.join(", "))
        }
    }
}

/// Widest left column that the right one is lined up behind.
const COLUMN: usize = 92;

fn draw(steps: &[Step]) -> String {
    let mut depth = 0;
    let mut left = Vec::new();
    for (i, step) in steps.iter().enumerate() {
        let line = match (i, step.deeper) {
            (0, _) => format!("  {}", step.text),
            (_, true) => {
                depth += 1;
                format!("  {}└ {}", "  ".repeat(depth - 1), step.text)
            }
            (_, false) => format!("  {}{}", "  ".repeat(depth), step.text),
        };
        left.push(line);
    }
    let widths = left.iter().zip(steps).filter(|(_, s)| !s.qemu.is_empty()).map(|(l, _)| l.chars().count());
    let column = widths.filter(|w| *w <= COLUMN).max().unwrap_or(0).max(30);
    let mut text = format!("{:column$}   {}\n", "PATH OF THE ACCESS", "QEMU's name for the step");
    for (line, step) in left.iter().zip(steps) {
        if step.qemu.is_empty() {
            text += line;
        } else {
            text += &format!("{line:column$}   {}", step.qemu);
        }
        text += "\n";
    }
    text
}
