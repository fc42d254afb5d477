//! Every parser on its corpus, and on a bounded number of seeded mutations of it. A longer hunt, or
//! a repetition:
//!
//!     FUZZ_RUNS=5000000 FUZZ_SEED=7 cargo test --test fuzz -- event
//!
//! A target takes any bytes and never panics. It checks the promises of its parser and returns
//! whether the bytes were accepted. Its corpus is `corpus/TARGET/`, one file for each input; add
//! new findings there.

mod arguments;
mod event;
mod license;
mod mutate;
mod operators;
mod requests;
mod rows;
mod settings;
mod vendor;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use rand::SeedableRng as _;
use rand::rngs::StdRng;

/// Takes any bytes; true: accepted.
type Target = fn(&[u8]) -> bool;

/// The default of `FUZZ_RUNS`, the mutations of a target. An expensive target has fewer: each
/// command line builds all commands.
const RUNS: u64 = 10_000;
/// The limit for an input of at most 300 KiB on a busy machine: far more than any input should
/// take.
const LONGEST: Duration = Duration::from_secs(10);

macro_rules! targets {
    ($($name:ident = $target:path, $runs:expr);* $(;)?) => {
        $(#[test] fn $name() { fuzz(stringify!($name), $target, $runs); })*
    };
}

targets! {
    event_in_binary_mode = event::binary, RUNS;
    event_in_structured_mode = event::structured, RUNS;
    usage_payload = event::usage, RUNS;
    license_token = license::token, RUNS;
    license_claims = license::claims, RUNS / 2;
    license_key = license::key, RUNS;
    tallyman_answer = vendor::answer, RUNS;
    accept_header = vendor::accept, RUNS;
    command_line = arguments::command_line, RUNS / 10;
    instant = operators::instant, RUNS;
    duration = operators::duration, RUNS;
    log_range = operators::log_range, RUNS;
    event_id = operators::event_id, RUNS;
    reject_edit = operators::edit, RUNS;
    api_query = requests::query, RUNS;
    api_body = requests::body, RUNS;
    coderd_build = rows::build, RUNS / 2;
    coderd_usage = rows::usage, RUNS;
    pipeline_file = settings::file, RUNS / 5;
    pipeline_settings = settings::flags, RUNS / 5;
    snapshot = settings::snapshot, RUNS;
    words = settings::words, RUNS;
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} must be a whole number"))
    })
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .expect("the corpus")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no input in {}", folder.display());
    files.iter().map(|file| std::fs::read(file).expect("an input")).collect()
}

fn fuzz(name: &str, target: Target, runs: u64) {
    let (seed, runs) = (number("FUZZ_SEED", 1), number("FUZZ_RUNS", runs));
    let corpus = corpus(name);
    let begun = Instant::now();
    let (mut accepted, mut refused) = (0_u64, 0_u64);
    let mut try_one = |input: &[u8], what: &str| {
        // the same bytes give the same answer, or a finding could not be repeated
        let begun = Instant::now();
        let answer = catch_unwind(AssertUnwindSafe(|| (target(input), target(input))));
        assert!(
            begun.elapsed() < 2 * LONGEST,
            "{name}, {what}: {:?} for {}",
            begun.elapsed(),
            display(input)
        );
        match answer {
            Ok((true, true)) => accepted += 1,
            Ok((false, false)) => refused += 1,
            Ok(_) => panic!("{name}, {what}: two answers to {}", display(input)),
            Err(_) => panic!("{name}, {what}: the target panicked on {}", display(input)),
        }
    };
    for (index, input) in corpus.iter().enumerate() {
        try_one(input, &format!("file {index} of the corpus"));
    }
    for run in 0..runs {
        let mut chance = StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ run);
        try_one(&mutate::one(&corpus, &mut chance), &format!("FUZZ_SEED={seed}, run {run}"));
    }
    println!(
        "{name}: {accepted} accepted, {refused} refused, {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    assert!(
        accepted > 0 && refused > 0,
        "a target with one answer for all inputs checks nothing: {accepted} accepted, {refused} refused"
    );
}

/// The input in a form for the corpus; a long one is kept in a file.
fn display(input: &[u8]) -> String {
    if input.len() <= 4096 {
        return format!("b\"{}\"", input.escape_ascii());
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", std::process::id()));
    let result = std::fs::write(&path, input);
    format!(
        "{} bytes, {}",
        input.len(),
        result.map_or_else(|error| error.to_string(), |()| format!("kept in {}", path.display()))
    )
}
