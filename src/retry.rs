//! Growing waits with jitter. Only this file uses the crate `backoff`, which is unmaintained
//! (RUSTSEC-2025-0012), so that it can be replaced here alone.

use std::time::Duration;

use backoff::backoff::Backoff as _;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};
use tokio_util::sync::CancellationToken;

/// Waits between attempts: each about 1.5 times the previous one, randomised by up to half, until
/// a success resets them.
#[derive(Debug)]
pub struct Backoff(ExponentialBackoff);

impl Backoff {
    /// Waits from `first` up to `longest`, without a limit on their number.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Backoff(
            ExponentialBackoffBuilder::new()
                .with_initial_interval(first)
                .with_max_interval(longest)
                .with_max_elapsed_time(None)
                .build(),
        )
    }

    /// The wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval)
    }

    /// Resets the waits after a success.
    pub fn reset(&mut self) {
        self.0.reset();
    }

    /// Waits before the next attempt; false if `stop` is cancelled.
    pub async fn wait(&mut self, stop: &CancellationToken) -> bool {
        stop.run_until_cancelled(tokio::time::sleep(self.next_wait())).await.is_some()
    }
}

/// The wait after `failures` in a row, for things with separate waits. It is `first`, doubled with
/// each further failure up to `longest`, and then randomised by up to half.
#[must_use]
pub fn wait_after(failures: u32, first: Duration, longest: Duration) -> Duration {
    let grown = first.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(longest);
    Backoff::new(grown, grown).next_wait()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_doubles_up_to_the_longest_within_its_jitter() {
        let (first, longest) = (Duration::from_secs(60), Duration::from_secs(3600));
        for (failures, seconds) in
            [(0, 60), (1, 60), (2, 120), (6, 1920), (7, 3600), (u32::MAX, 3600)]
        {
            let wait = wait_after(failures, first, longest);
            let middle = Duration::from_secs(seconds);
            assert!((middle / 2..=middle * 3 / 2).contains(&wait), "{failures}: {wait:?}");
        }
    }
}
