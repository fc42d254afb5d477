//! The progress lines of a fold that is behind.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::info;

use crate::stages::Stage;

/// Logs how far a fold is, at most once in its interval.
pub(super) struct ProgressLines {
    interval: Duration,
    last: Mutex<Instant>,
}

impl ProgressLines {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, last: Mutex::new(Instant::now()) }
    }

    /// The fold has this number of its batches.
    pub(super) fn reached<S: Stage>(&self, batches: i64, of: i64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= self.interval {
            *last = Instant::now();
            info!(stage = S::NAME, batches, of, "folding");
        }
    }
}
