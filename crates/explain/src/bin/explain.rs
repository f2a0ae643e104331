//! `explain` by itself: the same as `hyaline explain`.

fn main() {
    std::process::exit(explain::run(std::env::args_os().skip(1)));
}
