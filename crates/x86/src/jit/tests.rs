use super::lockstep::Lockstep;

fn lockstep(bits: u32, seeds: std::ops::Range<u64>) {
    let mut l = Lockstep::new(bits).unwrap();
    let mut done = 0;
    for seed in seeds {
        match l.case(seed) {
            Ok(n) => done += n,
            Err(text) => panic!("{text}"),
        }
    }
    let stats = l.stats();
    assert!(stats.units > 100 && done > 1000, "{done} instructions, {stats:?}");
}

#[test]
fn random_code_64() {
    lockstep(64, 1..4000);
}

#[test]
fn random_code_32() {
    lockstep(32, 1..4000);
}
