//! Shares one answer between concurrent callers.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

/// Maximum age of a shared answer.
const FRESH: Duration = Duration::from_secs(1);

/// The last answer and its time.
pub(super) struct Recent<T>(Mutex<Option<(Instant, T)>>);

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Clone> Recent<T> {
    /// The last answer if it is fresh or arrived while this caller waited; else a new one.
    pub(super) async fn get(&self, now: impl Fn() -> Instant, ask: impl Future<Output = T>) -> T {
        let asked_at = now();
        let mut last = self.0.lock().await;
        if let Some((answered_at, answer)) = &*last
            && asked_at.saturating_duration_since(*answered_at) < FRESH
        {
            return answer.clone();
        }
        let answer = ask.await;
        *last = Some((now(), answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn an_answer_is_shared_for_a_second() {
        let (recent, begin, asked) = (Recent::default(), Instant::now(), Cell::new(0));
        let ask = || async {
            asked.set(asked.get() + 1);
            asked.get()
        };
        for (milliseconds, answer) in
            [(0, 1), (999, 1), (1_000, 2), (1_999, 2), (2_000, 3), (60_000, 4)]
        {
            let now = begin + Duration::from_millis(milliseconds);
            assert_eq!(recent.get(|| now, ask()).await, answer, "after {milliseconds} ms");
        }
    }

    #[tokio::test]
    async fn a_caller_that_waits_shares_the_answer_however_long_it_took() {
        let (recent, begin) = (Recent::default(), Instant::now());
        let elapsed = Cell::new(Duration::ZERO);
        let now = || begin + elapsed.get();
        let slow = async {
            tokio::task::yield_now().await;
            elapsed.set(Duration::from_secs(30));
            "slow"
        };
        let (first, second) =
            tokio::join!(recent.get(now, slow), recent.get(now, async { "another" }));
        assert_eq!((first, second), ("slow", "slow"));
    }
}
