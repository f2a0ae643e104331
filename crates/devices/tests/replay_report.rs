//! The last accesses of serial0 before: a fault was injected at register SCR
//! Made by `hyaline explain --replay-test` from a crash report. Put it into crates/devices/tests/.

use hyaline_device::Bench;

#[test]
fn replay_serial0_device_panic() {
    let mut bench = Bench::new(hyaline_devices::serial::Ns16550::new());
    bench.write(0, 0x1, 1, 0x0); // IER
    bench.run(30);
    bench.write(0, 0x3, 1, 0x80); // LCR
    bench.run(30);
    bench.write(0, 0x0, 1, 0x1); // DLL
    bench.run(30);
    bench.write(0, 0x1, 1, 0x0); // DLM
    bench.run(30);
    bench.write(0, 0x3, 1, 0x3); // LCR
    bench.run(30);
    bench.write(0, 0x2, 1, 0x7); // FCR
    // The access in hand:
    bench.write(0, 0x7, 1, 0x0); // SCR
}
