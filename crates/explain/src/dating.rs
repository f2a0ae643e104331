//! From which versions of QEMU a trace can be: names of functions and source files came and went.

use crate::model::Report;
use crate::names::matches;

/// Range of versions.
#[derive(Debug, Clone, Default, serde::Serialize, PartialEq, Eq)]
pub struct Dated {
    /// Not older than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<String>,
    /// Not newer than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<String>,
    /// The names that tell.
    pub because: Vec<String>,
    /// A version that the text itself states (path or message).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stated: Option<String>,
}

/// (function or file pattern, true for file, first version, last version). Versions are major*100+minor.
const MARKS: &[(&str, bool, u32, u32)] = &[
    ("handle_mmio|ap_main_loop|kvm_main_loop_cpu", false, 0, 15),
    ("cpu_register_io_memory", false, 0, 15),
    (
        "memory_region_iorange_write|memory_region_iorange_read|ioport_write|ioport_read|ioport_*_thunk",
        false,
        100,
        105,
    ),
    ("qemu_kvm_cpu_thread_fn", false, 100, 501),
    ("qemu_tcg_cpu_thread_fn", false, 100, 501),
    ("qemu_tcg_rr_cpu_thread_fn", false, 209, 501),
    ("io_mem_write|io_mem_read", false, 100, 208),
    ("address_space_write_continue|address_space_read_continue", false, 206, 210),
    ("flatview_write|flatview_write_continue|flatview_read_continue|flatview_read", false, 211, 9999),
    ("memory_region_oldmmio_write_accessor|memory_region_oldmmio_read_accessor", false, 100, 301),
    ("memory_region_dispatch_write", false, 104, 9999),
    ("store_helper|load_helper", false, 401, 800),
    ("kvm_vcpu_thread_fn|mttcg_cpu_thread_fn|rr_cpu_thread_fn", false, 502, 9999),
    ("tcg_cpus_exec", false, 502, 802),
    ("qemu_mutex_lock_iothread|qemu_mutex_lock_iothread_impl", false, 100, 802),
    ("bql_lock_impl|bql_lock", false, 900, 9999),
    ("flatview_write_continue_step|flatview_read_continue_step", false, 900, 9999),
    ("do_st_mmio_leN", false, 801, 801),
    ("int_st_mmio_leN|int_ld_mmio_beN", false, 802, 9999),
    ("qemu_default_main", false, 700, 9999),
    ("bdrv_poll_co", false, 602, 9999),
    ("softmmu/memory.c", true, 501, 801),
    ("softmmu/physmem.c", true, 502, 801),
    ("system/memory.c", true, 802, 9999),
    ("system/physmem.c", true, 802, 9999),
    ("accel/kvm/kvm-all.c", true, 210, 9999),
    ("accel/tcg/cputlb.c", true, 209, 9999),
    ("../hw/", true, 502, 9999),
];

fn words(v: u32) -> String {
    if v < 100 { format!("0.{v}") } else { format!("{}.{}", v / 100, v % 100) }
}

/// Dates the frames of all stacks.
pub fn date(report: &Report) -> Dated {
    let (mut min, mut max) = (0, 9999);
    let mut because: Vec<String> = Vec::new();
    let mut stated = None;
    for f in report.stacks.iter().flat_map(|s| s.frames.iter().take(300)) {
        for (p, file, from, to) in MARKS {
            let hit = if *file {
                (f.file.contains(p) && p.starts_with("..") && f.file.starts_with(p))
                    || (!p.starts_with("..") && f.file.ends_with(p))
            } else {
                f.named() && matches(p, &f.function)
            };
            if !hit {
                continue;
            }
            let name = if *file { (*p).to_owned() } else { f.function.clone() };
            if *from > min {
                min = *from;
                because.push(name);
            } else if *to < max {
                because.push(name);
            }
            max = max.min(*to);
        }
        if stated.is_none() {
            stated = version_in(&f.file);
        }
    }
    if stated.is_none() {
        stated = report.prose.iter().find_map(|p| {
            p.find("QEMU emulator version ")
                .and_then(|at| p[at + 22..].split_whitespace().next())
                .map(str::to_owned)
        });
    }
    if min > max {
        // A fork or a patched build: say nothing rather than something wrong.
        return Dated { because: Vec::new(), stated, ..Dated::default() };
    }
    because.dedup();
    because.truncate(4);
    Dated { min: (min > 0).then(|| words(min)), max: (max < 9999).then(|| words(max)), because, stated }
}

/// `qemu-2.1.2/` or `qemu-kvm-0.12.5` in a path.
fn version_in(path: &str) -> Option<String> {
    let mut rest = path;
    while let Some(at) = rest.find("qemu-") {
        rest = &rest[at + 5..];
        let r = rest.strip_prefix("kvm-").unwrap_or(rest);
        let v: String = r.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        let v = v.trim_end_matches('.');
        if v.contains('.') {
            return Some(v.to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Dated {
        date(&crate::reader::read(text.as_bytes()).expect("reads"))
    }

    #[test]
    fn names_date_a_trace() {
        let d = of(
            "#0 0x1 in flatview_write_continue_step (a=1) at ../system/physmem.c:2\n#1 0x1 in bql_lock_impl () at a.c:1\n",
        );
        assert_eq!((d.min.as_deref(), d.max.as_deref()), (Some("9.0"), None));
        let d = of(
            "#0 0x1 in memory_region_iorange_write (a=1) at /b/qemu-1.3.0/memory.c:2\n#1 0x1 in x () at a.c:1\n",
        );
        assert_eq!((d.max.as_deref(), d.stated.as_deref()), (Some("1.5"), Some("1.3.0")));
        assert_eq!(of("#0 0x1 in foo ()\n#1 0x2 in bar ()\n"), Dated::default());
    }
}
