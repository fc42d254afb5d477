//! The one place that names the `backoff` crate: waits that grow, with jitter. The crate is no longer maintained (RUSTSEC-2025-0012), so that it
//! can be replaced here alone.

use std::time::Duration;

use backoff::backoff::Backoff as _;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};
use tokio_util::sync::CancellationToken;

/// Waits between attempts: each about 1.5 times the one before, half of it jitter, until a success resets them.
#[derive(Debug)]
pub struct Waits(ExponentialBackoff);

impl Waits {
    /// From `first` up to `longest`, without an end.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Waits(ExponentialBackoffBuilder::new().with_initial_interval(first).with_max_interval(longest).with_max_elapsed_time(None).build())
    }

    /// How long to wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval)
    }

    /// An attempt succeeded.
    pub fn reset(&mut self) {
        self.0.reset();
    }

    /// Waits; false when it is time to stop instead.
    pub async fn wait(&mut self, stop: &CancellationToken) -> bool {
        stop.run_until_cancelled(tokio::time::sleep(self.next_wait())).await.is_some()
    }
}
