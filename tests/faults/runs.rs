//! Which seeds to run, which to skip, and their report.

use std::fs::OpenOptions;
use std::future::Future;
use std::io::Write;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::PathBuf;

use futures::FutureExt;

use crate::schedule::Schedule;

/// The usual number of seeds with all other tests, and the first one.
const USUAL: u64 = 5;
const FIRST: u64 = 1000;

/// The arguments from `scripts/test`.
pub struct Runs {
    first: u64,
    count: u64,
    /// The seeds that passed on this commit, one a line; None if the clone has uncommitted changes.
    passed: Option<PathBuf>,
}

impl Runs {
    pub fn asked_for() -> Runs {
        let number = |name: &str, usual: u64| match std::env::var(name) {
            Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name} is {text:?}: {error}")),
            Err(_) => usual,
        };
        let count = number("TALLYLINE_TEST_FAULTS", USUAL);
        assert!(count > 0, "no schedule proves nothing");
        let passed = std::env::var_os("TALLYLINE_TEST_FAULTS_PASSED").map(PathBuf::from);
        Runs { first: number("TALLYLINE_TEST_FAULTS_SEED", FIRST), count, passed }
    }

    pub fn seeds(&self) -> impl Iterator<Item = u64> {
        (0..self.count).map(|more| self.first.checked_add(more).expect("a seed"))
    }

    pub fn has_passed(&self, seed: u64) -> bool {
        let passed = self.passed.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        passed.is_some_and(|passed| passed.lines().any(|line| line == seed.to_string()))
    }

    /// Writes at once, so that an interrupted run can resume.
    pub fn passed(&self, seed: u64) {
        if let Some(file) = &self.passed {
            let mut file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(file)
                .expect("the file of passed seeds");
            writeln!(file, "{seed}").expect("write the seed");
        }
    }

    /// Writes past the test runner, which hides the output of passing tests.
    pub fn report(&self, text: &str) {
        writeln!(std::io::stderr(), "{text}").expect("stderr");
    }

    /// Reports a schedule that fails, and how to repeat it.
    pub async fn watch_over<T>(&self, schedule: &Schedule, run: impl Future<Output = T>) -> T {
        match AssertUnwindSafe(run).catch_unwind().await {
            Ok(summary) => summary,
            Err(panic) => {
                let seed = schedule.seed;
                self.report(&format!(
                    "FAILED: {schedule}\nrun it again: scripts/test --faults 1 --seed {seed}"
                ));
                resume_unwind(panic)
            }
        }
    }
}
