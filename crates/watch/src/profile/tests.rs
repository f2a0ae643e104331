use super::*;
use hyaline_devices::serial::ns16550::CHIP;

fn site(id: u32, owner: &str, register: Option<&str>) -> Arc<Site> {
    Arc::new(Site {
        id,
        space: "io".into(),
        region: 1,
        path: "/io/ports".into(),
        name: "ports".into(),
        owner: owner.into(),
        register: register.and_then(|r| CHIP.banks[0].named(r)),
    })
}

fn record(seq: u64, time: u64, rip: u64, took: u32, is_write: bool, outcome: Outcome) -> AccessRecord {
    AccessRecord {
        seq,
        time,
        rip,
        addr: 0x3fd,
        value: 0x60,
        offset: 5,
        took,
        site: 0,
        count: 0,
        actor: Actor::Vcpu(0),
        exit: if is_write { ExitKind::PioOut } else { ExitKind::PioIn },
        size: 1,
        is_write,
        parts: 1,
        outcome,
    }
}

fn sample() -> Summary {
    let p = Profile::new(1);
    let (lsr, thr, none) =
        (site(0, "serial0", Some("LSR")), site(1, "serial0", Some("THR")), site(2, "", None));
    for i in 0..2000u64 {
        p.record(&record(3 * i + 1, i * 100_000, 0x10_0000, 200, false, Outcome::Ok), &lsr);
        if i % 4 == 0 {
            p.record(&record(3 * i + 2, i * 100_000 + 10, 0x10_0010, 900, true, Outcome::Ok), &thr);
        }
        if i % 50 == 0 {
            p.record(&record(3 * i + 3, i * 100_000 + 20, 0x10_0020, 50, false, Outcome::Unassigned), &none);
        }
    }
    p.record(&record(9000, 200_000_000, 0x10_0010, 20_000_000, true, Outcome::Ok), &thr);
    let runs = |stack: &[&str], by| Moment::Runs { stack: stack.iter().map(|s| s.to_string()).collect(), by };
    for _ in 0..30 {
        p.moment(Moment::Waits);
        p.moment(runs(
            &["io_serial_in", "serial8250_console_putchar", "start_kernel"],
            Some("frame pointers"),
        ));
    }
    for _ in 0..60 {
        p.moment(runs(&["memcpy"], None));
    }
    p.summary(None)
}

#[test]
fn figures_and_findings() {
    let s = sample();
    assert_eq!(s.count(), 2000 + 501 + 40);
    assert_eq!(s.took(), 2000 * 200 + 500 * 900 + 40 * 50 + 20_000_000);
    let text = s.text();
    for want in [
        "serial0.LSR",
        "pio.in/1",
        "0x100000 100 %",
        "polls its serial port",
        "probing for devices",
        "io:0x3fd (40 times)",
        "took 20ms",
    ] {
        assert!(text.contains(want), "{want}\n{text}");
    }
    let lsr = s.rows.iter().find(|r| r.name() == "serial0.LSR").unwrap();
    assert_eq!((lsr.stat.histogram.quantile(0.5), lsr.stat.max), (192, 200));
}

#[test]
fn the_guests_own_time() {
    let mut s = sample();
    s.seconds = 1.0;
    let (guest, handlers, waits) = s.shares().unwrap();
    assert!((handlers - 2.09).abs() < 0.1 && (guest + handlers + waits - 100.0).abs() < 0.01, "{handlers}");
    assert!((waits * 3.0 - guest).abs() < 0.01, "a quarter of 120 looks found it waiting: {waits} {guest}");
    let text = s.text();
    for want in [
        "from 120 looks, give or take 7.9",
        "callers found by: frame pointers 33 %, not found 67 %",
        "   66.7    66.7  memcpy\n",
        "   33.3    33.3  io_serial_in\n",
    ] {
        assert!(text.contains(want), "{want}\n{text}");
    }
    assert!(!text.contains("  start_kernel\n"), "it was never seen at work itself");
    assert_eq!(s.hottest().iter().find(|h| h.0 == "start_kernel").map(|h| (h.1, h.2)), Some((0, 30)));
    let folded = s.folded();
    assert!(folded.contains("[guest];start_kernel;serial8250_console_putchar;io_serial_in "), "{folded}");
    assert!(
        folded.contains("[guest];(callers_not_known);memcpy ") && folded.contains("[waiting] "),
        "{folded}"
    );
    let none = Profile::new(1).summary(None);
    assert_eq!((none.shares(), none.text().contains("looks")), (None, false));
}

#[test]
fn classes_of_durations() {
    for ns in [0, 1, 2, 3, 4, 7, 8, 100, 1000, 123_456, u32::MAX] {
        let c = Histogram::class(ns);
        assert!(Histogram::floor(c) <= u64::from(ns.max(1)), "{ns}");
        assert!(c < 132 && (ns < 8 || Histogram::floor(c + 1) > u64::from(ns)), "{ns}");
    }
}

#[test]
fn time_lines_get_wider() {
    let mut b = Bins::default();
    (0..100_000u64).for_each(|i| b.add(i * 1_000_000, 1));
    assert!(b.columns.len() <= BINS);
    assert_eq!(b.columns.iter().map(|c| u64::from(c.0)).sum::<u64>(), 100_000);
    let mut a = Bins::default();
    a.add(5, 1);
    a.merge(b.clone());
    assert_eq!((a.width, a.columns[0].0), (b.width, b.columns[0].0 + 1));
}

#[test]
fn every_form_is_well_formed() {
    let s = sample();
    let chrome: Value = serde_json::from_str(&s.chrome()).unwrap();
    assert!(chrome["traceEvents"].as_array().unwrap().len() > 2000);
    assert!(s.folded().contains("0x100000;pio.in;serial0;LSR 400000\n"), "{}", s.folded());
    let svg = s.svg();
    assert!(svg.starts_with("<svg") && svg.matches("<g>").count() == svg.matches("</g>").count());
    assert!(svg.contains("serial0") && svg.contains("LSR"));
    let html = s.html();
    assert!(!html.contains("http://") && !html.contains("https://"), "no network");
    let data = html.split("application/json\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["count"], s.count());
    assert_eq!(data["flame"]["k"].as_array().unwrap().len(), 3);
}

/// Debian's browser, if it is there: the page loads without an error, the filter works, and something is drawn.
#[test]
fn the_page_works_in_a_browser() {
    let Some(browser) = ["/usr/bin/chromium", "/usr/bin/chromium-browser"]
        .into_iter()
        .find(|p| std::path::Path::new(p).exists())
    else {
        eprintln!("SKIPPED: the profile page in a browser: chromium is not installed");
        return;
    };
    let folder = std::env::temp_dir().join(format!("hyaline-page-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let page = folder.join("profile.html");
    std::fs::write(&page, sample().html()).unwrap();
    let run = |what: &[&str], url: String| {
        std::process::Command::new(browser)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--enable-logging=stderr",
                "--v=0",
            ])
            .arg(format!("--user-data-dir={}", folder.join("user").display()))
            .args(["--window-size=1280,2000", "--virtual-time-budget=3000"])
            .args(what)
            .arg(url)
            .output()
            .unwrap()
    };
    let url = format!("file://{}", page.display());
    let all = run(&["--dump-dom"], url.clone());
    let errors = String::from_utf8_lossy(&all.stderr);
    assert!(!errors.contains(":CONSOLE"), "{errors}");
    let dom = String::from_utf8_lossy(&all.stdout);
    let rows = |dom: &str| dom.split("id=\"acc\"").nth(1).map_or(0, |t| t.matches("<tr>").count());
    assert!(rows(&dom) > 400, "{} rows", rows(&dom));
    for want in ["in guest code", "The guest's own time", "serial8250_console_putchar", "give or take"] {
        assert!(dom.contains(want), "{want}");
    }
    // A frame of each flame graph, and the two that are called by nobody.
    let frames = dom.split("id=\"gflame\"").nth(1).and_then(|t| t.split("<table").next()).unwrap_or("");
    assert!(frames.matches("background").count() >= 7, "{frames}");
    let some = run(&["--dump-dom"], format!("{url}#THR%20slow%3E1000"));
    let dom = String::from_utf8_lossy(&some.stdout);
    assert_eq!(rows(&dom), 2, "the head and the one slow write");
    let shot = folder.join("shot.png");
    run(&[&format!("--screenshot={}", shot.display())], url);
    let png = std::fs::read(&shot).expect("a screenshot");
    let _ = std::fs::remove_dir_all(&folder);
    // A blank page of this size compresses to a few kilobytes.
    assert!(png.len() > 40_000, "{} bytes", png.len());
}
