//! Which seeds are run, which need not be run again, and what is told of them.

use std::fs::OpenOptions;
use std::future::Future;
use std::io::Write;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::PathBuf;

use futures::FutureExt;

use crate::schedule::Schedule;

/// So many beside all other tests, of these seeds.
const USUAL: u64 = 5;
const FIRST: u64 = 1000;

/// What `scripts/test` asks for.
pub struct Runs {
    first: u64,
    count: u64,
    /// The seeds that have passed on this commit, one a line; none where the clone is not as it was committed.
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

    /// Written at once: a run that is broken off goes on from here.
    pub fn passed(&self, seed: u64) {
        if let Some(file) = &self.passed {
            let mut file = OpenOptions::new().create(true).append(true).open(file).expect("the file of passed seeds");
            writeln!(file, "{seed}").expect("write the seed");
        }
    }

    /// Past the test runner, which keeps to itself what a test that passes prints.
    pub fn tell(&self, text: &str) {
        writeln!(std::io::stderr(), "{text}").expect("stderr");
    }

    /// A schedule that fails is told, and how to run it again.
    pub async fn watch_over<T>(&self, schedule: &Schedule, run: impl Future<Output = T>) -> T {
        match AssertUnwindSafe(run).catch_unwind().await {
            Ok(told) => told,
            Err(panic) => {
                let seed = schedule.seed;
                self.tell(&format!("FAILED: {schedule}\nrun it again: scripts/test --faults 1 --seed {seed}"));
                resume_unwind(panic)
            }
        }
    }
}
