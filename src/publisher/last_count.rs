//! The latest count of a long backlog.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::ledger::Pending;

/// The shortest time between two counts of a long backlog. A count of the oldest rows does not
/// cover it.
const COUNT_INTERVAL: Duration = Duration::from_secs(60);

/// The latest count of a long backlog.
#[derive(Default)]
pub(super) struct LastCount(Mutex<Option<(Instant, Pending)>>);

impl LastCount {
    pub fn set(&self, pending: Pending) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), pending));
    }

    /// None: it is older than the interval.
    pub fn get(&self) -> Option<Pending> {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.filter(|(at, _)| at.elapsed() < COUNT_INTERVAL).map(|(_, pending)| pending)
    }
}
