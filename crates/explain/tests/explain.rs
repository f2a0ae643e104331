//! Whole traces, written for these tests, through reader, rules and text.

use explain::explain_text;
use explain::rules::{Kind, Sure};
use explain::text::{Detail, render};

const LEGACY: &str = include_str!("traces/legacy-status.txt");
const SDMA: &str = include_str!("traces/sdma-reentrancy.txt");
const SUBPAGE: &str = include_str!("traces/subpage-doorbell.txt");
const NO_SYMBOLS: &str = include_str!("traces/no-symbols.txt");
const SPLIT: &str = include_str!("traces/string-io-split.txt");

fn causes(e: &explain::Explanation) -> Vec<&'static str> {
    e.findings.iter().filter(|f| f.kind == Kind::Cause).map(|f| f.class).collect()
}

/// The trace without its first frames (with their continuation lines).
fn cut(text: &str, frames: usize) -> String {
    let marker = format!("#{frames} ");
    let at = text.find(&format!("\n{marker}")).expect("the frame is there");
    text[at + 1..].to_owned()
}

#[test]
fn the_status_write_is_solved() {
    let e = explain_text(LEGACY.as_bytes());
    assert_eq!((e.verdict, e.exit_code()), ("explained", 0));
    assert_eq!((e.actor.thread.as_str(), e.actor.accel.as_deref()), ("vcpu", Some("kvm")));
    let a = &e.accesses[0];
    assert_eq!(
        (a.space, a.dir, a.addr, a.size, a.count),
        (Some("pio"), Some("write"), Some(0xc092), Some(2), Some(1))
    );
    assert_eq!(
        (a.region_base, a.offset, a.handler_size, a.split),
        (Some(0xc080), Some(18), Some(2), Some(false))
    );
    assert_eq!(a.confidence, Some(Sure::Certain));
    assert_eq!(a.device.as_deref(), Some("virtio-pci-legacy"));
    assert_eq!(a.device_kind.as_deref(), Some("virtio-scsi"));
    assert_eq!(a.register.as_ref().map(|r| (r.name.as_str(), r.width)), Some(("device_status", 1)));
    assert_eq!(a.decoded, ["FAILED", "NEEDS_RESET", "DRIVER_OK"]);
    assert_eq!(causes(&e)[0], "route-leak");
    assert!(e.not.contains(&"out-of-bounds"));
    let t = render(&e, Detail::Normal);
    for s in [
        "WHAT HAPPENED",
        "PATH OF THE ACCESS",
        "UNUSUAL",
        "WHY (ranked)",
        "NEXT",
        "0xc092 (49298)",
        "Device Status",
        "computed: 49298 - 18",
        "low byte 0xc4",
        "Not the cause",
    ] {
        assert!(t.contains(s), "{s} in\n{t}");
    }
    assert!(render(&e, Detail::Teach).contains("KEY COMPONENTS"));
    assert!(render(&e, Detail::Brief).lines().count() < 25);
}

#[test]
fn the_same_without_the_frames_that_hold_the_answer_claims_no_cause() {
    let e = explain_text(cut(LEGACY, 13).as_bytes());
    let a = &e.accesses[0];
    assert_eq!((a.addr, a.size, a.region_base, a.offset), (Some(0xc092), Some(2), Some(0xc080), Some(18)));
    assert_eq!(a.device, None);
    assert!(a.register.is_none());
    assert_eq!(a.candidates[0].register, "device_status");
    assert!(a.candidates.iter().any(|c| c.register == "RAP"));
    assert!(a.candidates.iter().any(|c| c.register == "PORTSC2"));
    assert_eq!(causes(&e), Vec::<&str>::new());
    assert_eq!(e.exit_code(), 1);
    let t = render(&e, Detail::Normal);
    assert!(t.contains("info mtree -f") && t.contains("candidates for port 0xc092, 2 bytes"), "{t}");
}

#[test]
fn a_map_turns_the_guess_into_a_fact() {
    let report = explain::reader::read(cut(LEGACY, 16).as_bytes()).expect("reads");
    let map =
        "FlatView #0\n AS \"I/O\", root: io\n  000000000000c080-000000000000c0bf (prio 1, i/o): virtio-pci\n";
    let ranges = explain::mtree::parse(map.as_bytes()).expect("reads");
    let e = explain::explanation::explain(&report, &ranges);
    let a = &e.accesses[0];
    assert_eq!(
        (a.region.as_deref(), a.region_base, a.offset),
        (Some("virtio-pci"), Some(0xc080), Some(0x12))
    );
}

#[test]
fn dma_into_the_own_registers_is_re_entrancy() {
    let e = explain_text(SDMA.as_bytes());
    assert_eq!(causes(&e)[0], "reentrancy");
    assert!(causes(&e)[1..].contains(&"oob"));
    let dirs: Vec<_> =
        e.accesses.iter().map(|a| (a.depth, a.dir, a.initiator, a.device.as_deref())).collect();
    assert_eq!(
        dirs,
        [(0, Some("write"), "harness", Some("sdhci")), (1, Some("write"), "device", Some("sdhci"))]
    );
    assert_eq!(e.actor.accel.as_deref(), Some("qtest"));
    assert_eq!(e.end.function, "sdhci_write_dataport");
}

#[test]
fn a_shared_page_is_not_re_entrancy() {
    let e = explain_text(SUBPAGE.as_bytes());
    assert!(!causes(&e).contains(&"reentrancy"), "{:?}", causes(&e));
    assert!(e.not.contains(&"reentrancy-by-subpage"));
    assert_eq!(causes(&e)[0], "guest-reachable-assert");
    assert_eq!(e.accesses.len(), 1);
    let a = &e.accesses[0];
    assert_eq!(
        (a.space, a.addr, a.virtual_addr, a.size),
        (Some("mmio"), Some(0xfebd_200c), Some(0xffff_c900_0060_100c), Some(4))
    );
    assert_eq!((a.region_base, a.offset), (Some(0xfebd_2000), Some(0xc)));
    assert_eq!(a.register.as_ref().map(|r| r.name.as_str()), Some("DOORBELL3"));
    assert_eq!(e.end.assertion.as_deref(), Some("ring->dequeue != 0"));
}

#[test]
fn without_names_it_says_so_and_how_to_get_them() {
    let e = explain_text(NO_SYMBOLS.as_bytes());
    assert_eq!(e.verdict, "partly");
    assert!(e.accesses.is_empty());
    assert!(e.cannot_tell.iter().any(|c| c.contains("6 of 7 frames have no names")), "{:?}", e.cannot_tell);
    assert!(e.cannot_tell.iter().any(|c| c.contains("addr2line")));
    assert_eq!(causes(&e), ["late-detection"]);
}

#[test]
fn a_string_instruction_split_in_bytes_through_mail_quotes() {
    let e = explain_text(SPLIT.as_bytes());
    let a = &e.accesses[0];
    assert_eq!(
        (a.addr, a.size, a.handler_size, a.split, a.count),
        (Some(1012), Some(2), Some(1), Some(true), Some(4))
    );
    assert_eq!((a.region_base, a.offset), (Some(0x3f0), Some(4)));
    assert_eq!(a.register.as_ref().map(|r| r.name.as_str()), Some("FIFO"));
    assert!(e.findings.iter().any(|f| f.rule == "R55") && e.findings.iter().any(|f| f.rule == "R15"));
}

#[test]
fn json_has_the_schema() {
    let v: serde_json::Value =
        serde_json::from_str(&explain_text(LEGACY.as_bytes()).to_json()).expect("JSON");
    assert_eq!(v["schema"], 1);
    for k in ["input", "actor", "accesses", "end", "findings", "not", "next"] {
        assert!(v.get(k).is_some(), "{k}");
    }
    assert_eq!(v["input"]["format"], "gdb-bt");
    assert_eq!(v["input"]["dated"]["min"], "8.2");
    let a = &v["accesses"][0];
    for k in [
        "depth",
        "space",
        "dir",
        "addr",
        "size",
        "count",
        "region_base",
        "offset",
        "handler_size",
        "split",
        "device",
        "register",
        "value",
        "decoded",
        "evidence",
        "confidence",
    ] {
        assert!(a.get(k).is_some(), "{k}");
    }
    assert_eq!(a["register"]["name"], "device_status");
    assert_eq!(v["findings"][0]["class"], "route-leak");
    assert_eq!(v["findings"][0]["confidence"], "strong");
}

#[test]
fn packaging_changes_nothing() {
    let plain = explain_text(SUBPAGE.as_bytes());
    let quoted: String = SUBPAGE.lines().map(|l| format!("> > {l}\n")).collect();
    let stamped: String = SUBPAGE.lines().map(|l| format!("[2024-05-01 10:00:00.123] {l}\n")).collect();
    let syslog: String = SUBPAGE.lines().map(|l| format!("May 01 10:00:00 host qemu[77]: {l}\n")).collect();
    let html: String =
        format!("<pre>\n{}</pre>", SUBPAGE.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;"));
    let colour: String = SUBPAGE.replace("#1", "\u{1b}[33m#1").replace(" in ", "\u{1b}[0m in ");
    let crlf = SUBPAGE.replace('\n', "\r\n");
    let wrapped: String = SUBPAGE
        .lines()
        .flat_map(|l| {
            let mut out: Vec<String> = vec![String::new()];
            for w in l.split_inclusive(' ') {
                if out.last().is_some_and(|x| x.len() + w.len() > 72) {
                    out.push(String::new());
                }
                if let Some(x) = out.last_mut() {
                    x.push_str(w);
                }
            }
            out
        })
        .map(|l| l + "\n")
        .collect();
    for (name, t) in [
        ("quoted", quoted),
        ("stamped", stamped),
        ("syslog", syslog),
        ("html", html),
        ("colour", colour),
        ("crlf", crlf),
        ("wrapped", wrapped),
    ] {
        let e = explain_text(t.as_bytes());
        assert_eq!(e.input.frames, plain.input.frames, "{name}");
        assert_eq!(
            e.accesses.first().map(|a| (a.addr, a.size, a.region_base)),
            plain.accesses.first().map(|a| (a.addr, a.size, a.region_base)),
            "{name}"
        );
        assert_eq!(causes(&e), causes(&plain), "{name}");
    }
}

#[test]
fn a_story_is_explained_as_far_as_it_carries() {
    let t = "The crash is in a vCPU thread: kvm_vcpu_thread_fn runs kvm_cpu_exec, kvm_handle_io handles the port I/O with a size of 2 bytes, \
             address_space_rw and flatview_write do a write to address 0x12FBE (49170) and access_with_adjusted_size calls the device.";
    let e = explain_text(t.as_bytes());
    assert_eq!(e.exit_code(), 1);
    assert_eq!(e.actor.accel.as_deref(), Some("kvm"));
    assert_eq!(e.accesses[0].space, Some("pio"));
    assert_eq!(e.accesses[0].size, Some(2));
    assert!(
        e.disagreements.iter().any(|d| d.contains("0x12fbe") || d.contains("0x12FBE")),
        "{:?}",
        e.disagreements
    );
    assert!(
        e.accesses.iter().all(|a| a.certain.is_empty()),
        "a story is no evidence: {:?}",
        e.accesses[0].certain
    );
}

#[test]
fn other_programs_and_nonsense_are_refused() {
    for t in [
        "",
        "hello world",
        "#0  0x1 in foo () at a.c:1\n#1  0x2 in main () at b.c:2\n",
        "\u{0}\u{1}\u{2}",
        "Traceback (most recent call last):\n  File \"a.py\", line 1, in <module>\n",
    ] {
        let e = explain_text(t.as_bytes());
        assert_eq!(e.exit_code(), 2, "{t}");
        assert!(render(&e, Detail::Normal).contains("not a backtrace"));
    }
}

#[test]
fn recursion_of_ten_thousand_frames() {
    let turn = [
        "nic_load_rmd",
        "nic_receive_frame",
        "nic_transmit",
        "nic_poll_timer",
        "memory_region_write_accessor",
        "memory_region_dispatch_write",
        "flatview_write",
    ];
    let mut t = String::from("==1==ERROR: AddressSanitizer: stack-overflow on address 0x7ffe00000000\n");
    for i in 0..10_000 {
        t.push_str(&format!(
            "#{i} 0x{:x} in {} /b/../hw/net/nic.c:{}:5\n",
            0x5500_0000 + i,
            turn[i % turn.len()],
            i % 90 + 1
        ));
    }
    let e = explain_text(t.as_bytes());
    assert_eq!(e.input.frames, 10_000);
    assert_eq!(causes(&e)[0], "reentrancy");
    assert!(e.accesses.len() <= 64 && e.accesses.iter().any(|a| a.repeats > 1000), "{}", e.accesses.len());
}

#[test]
fn our_own_crash_report() {
    let t = "{\"hyaline_crash_report\":1,\"version\":\"0.1.0\",\"cause\":\"device-panic\",\"device\":\"lsi0\",\"message\":\"no current request\"}\n\
             {\"type\":\"access\",\"space\":\"pio\",\"dir\":\"write\",\"addr\":49199,\"size\":4,\"device\":\"lsi0\",\"offset\":47,\"register\":{\"name\":\"DSP\",\"width\":1},\"value\":178}\n";
    let e = explain_text(t.as_bytes());
    assert_eq!(e.exit_code(), 0);
    let text = render(&e, Detail::Normal);
    assert!(
        text.contains("0xc02f (49199)") && text.contains("DSP") && text.contains("no current request"),
        "{text}"
    );
    assert!(text.contains("register is 1 byte wide"), "{text}");
}

#[test]
fn a_panic_of_a_rust_vmm() {
    let t = "thread 'vcpu0' panicked at crates/devices/src/lsi.rs:624:17:\nno current request\nstack backtrace:\n   0: rust_begin_unwind\n             at /rustc/0/library/std/src/panicking.rs:689:5\n   1: core::panicking::panic_fmt\n   2: hyaline_devices::lsi::Lsi::do_dma\n             at ./crates/devices/src/lsi.rs:624:17\n   3: hyaline_devices::lsi::Lsi::write\n   4: hyaline_machine::vcpu::run\n";
    let e = explain_text(t.as_bytes());
    assert_eq!((e.end.kind, e.end.function.as_str()), ("panic", "hyaline_devices::lsi::Lsi::do_dma"));
    assert_ne!(e.exit_code(), 2);
    assert!(render(&e, Detail::Brief).contains("panicked at crates/devices/src/lsi.rs:624:17"));
}

#[test]
fn names_that_a_list_archive_hid() {
    let t = "#0  0x1 in abort () from /lib/libc.so\n#1  0x2 in virtio_ioport_write (opaque=0x5, addr=18, val=7) at hw/virtio/virtio-pci.c:340\n\
             #2  0x3 in memory_region_write_accessor (mr=0x5, addr=address@hidden=18, value=0x7, address@hidden, shift=0, mask=255) at memory.c:1\n\
             #3  0x4 in access_with_adjusted_size (addr=address@hidden=18, size=address@hidden=1, mr=0x5) at memory.c:2\n\
             #4  0x5 in flatview_write (addr=address@hidden=49170, len=address@hidden=1) at exec.c:3\n\
             #5  0x6 in kvm_handle_io (port=49170, size=1, count=1) at kvm-all.c:4\n#6  0x7 in kvm_cpu_exec (cpu=0x9) at kvm-all.c:5\n";
    let e = explain_text(t.as_bytes());
    let a = &e.accesses[0];
    assert_eq!((a.addr, a.size, a.region_base), (Some(49170), Some(1), Some(49152)));
    assert_eq!(a.confidence, Some(Sure::Certain));
}

/// Bad input: what can be read of it is read, in bounded time, and nothing is made up.
#[test]
fn bad_input_is_read_as_far_as_it_goes() {
    let good = include_str!("traces/legacy-status.txt");
    let access = |text: &[u8]| {
        let e = explain_text(text);
        let a = e.accesses.first().cloned().unwrap_or_default();
        (a.addr, a.size, a.region_base, a.confidence)
    };
    let whole = access(good.as_bytes());
    assert_eq!((whole.0, whole.2, whole.3), (Some(49298), Some(49280), Some(Sure::Certain)));
    // Bytes that are no UTF-8, in file names and between lines.
    let mut broken = Vec::new();
    for line in good.lines() {
        broken.extend(line.replace("/virtio/", "/vir\u{fffd}tio/").into_bytes());
        broken.extend(b"\n\xff\xfe\x80\xc3\n");
    }
    assert_eq!(access(&broken), whole);
    // Cut in the middle, everywhere: never more than the whole says.
    for end in (0..good.len()).step_by(97) {
        if !good.is_char_boundary(end) {
            continue;
        }
        let cut = access(&good.as_bytes()[..end]);
        assert!(
            cut.0.is_none_or(|a| Some(a) == whole.0 || cut.3 != Some(Sure::Certain)),
            "cut at {end}: {cut:?}"
        );
    }
    // 100 MB, of one trace again and again, and of noise.
    let t = std::time::Instant::now();
    let e = explain_text(good.repeat((100 << 20) / good.len()).as_bytes());
    assert_ne!(e.verdict, "not-a-trace");
    assert!(!e.input.limits.is_empty(), "it says that not all was kept");
    let mut x = 88_172_645_463_325_252_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    })
    .take(100 << 20)
    .collect();
    let e = explain_text(&noise);
    assert_eq!((e.verdict, e.exit_code(), e.accesses.len()), ("not-a-trace", 2, 0));
    assert!(t.elapsed() < std::time::Duration::from_secs(180), "{:?}", t.elapsed());
}

/// The same trace with the function names and files of older and newer versions says the same.
#[test]
fn names_of_other_versions_say_the_same() {
    let good = include_str!("traces/legacy-status.txt");
    let facts = |text: &str| {
        let e = explain_text(text.as_bytes());
        let a = &e.accesses[0];
        let register = a.register.as_ref().map(|r| r.name.clone());
        (a.addr, a.size, a.region_base, a.offset, register, e.actor.accel.clone(), causes(&e)[0])
    };
    let old = [
        ("kvm_vcpu_thread_fn", "qemu_kvm_cpu_thread_fn"),
        ("flatview_write_continue", "address_space_write_continue"),
        ("system/memory.c", "memory.c"),
        ("softmmu/memory.c", "memory.c"),
        ("system/physmem.c", "exec.c"),
        ("accel/kvm/kvm-all.c", "kvm-all.c"),
    ];
    let text = old.iter().fold(good.to_string(), |t, (a, b)| t.replace(a, b));
    assert_ne!(text, good);
    assert_eq!(facts(&text), facts(good));
    // A device that no table knows: the access stays, no register is claimed.
    let other = good
        .replace("virtio_pci_config_write", "frobnic_io_write")
        .replace("virtio_ioport_write", "frobnic_set");
    let e = explain_text(other.as_bytes());
    let a = &e.accesses[0];
    assert_eq!((a.addr, a.region_base), (Some(49298), Some(49280)));
    assert!(a.register.as_ref().is_none_or(|r| r.confidence != Sure::Certain), "{:?}", a.register);
    assert!(!a.certain.contains(&"register"));
}
