//! Shows the queue in the publisher's metrics.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::Publisher;
use crate::ledger::{Pending, publications, sources};

/// Rows of the backlog that are read each time. A longer backlog is counted less often.
const READ_ROWS: i64 = 10_000;

/// The shortest time between two counts of a backlog that is longer than [`READ_ROWS`].
const COUNT_INTERVAL: Duration = Duration::from_secs(60);

/// The latest count of a long backlog.
#[derive(Default)]
pub(super) struct LastCount(Mutex<Option<(Instant, Pending)>>);

impl LastCount {
    fn set(&self, pending: Pending) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), pending));
    }

    /// None: it is older than the interval.
    fn get(&self) -> Option<Pending> {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.filter(|(at, _)| at.elapsed() < COUNT_INTERVAL).map(|(_, pending)| pending)
    }
}

impl Publisher {
    /// Shows the queue of a publisher that does not work on it.
    pub(super) async fn show_backlog(&self) {
        if let Ok(Some(source)) =
            self.ledger.run(async |conn| sources::get(conn, self.settings.deployment).await).await
            && let Err(error) = self.show_queue(source.id).await
        {
            debug!(error = crate::cause::text(error.as_ref()), "queue not readable");
        }
    }

    /// Reads at most 10,000 rows, and all pending rows at most once a minute: the numbers of a
    /// longer backlog are up to a minute old. The age of the oldest event is always exact.
    pub(super) async fn show_queue(&self, source_id: i16) -> anyhow::Result<()> {
        let read = self
            .ledger
            .run(async |conn| publications::oldest_pending(conn, source_id, Some(READ_ROWS)).await);
        let oldest = read.await?;
        let pending = if oldest.events < READ_ROWS {
            oldest
        } else if let Some(counted) = self.counted.get() {
            Pending { oldest: oldest.oldest, ..counted }
        } else {
            let all = self.ledger.run(async |conn| publications::pending(conn, source_id).await);
            let all = all.await?;
            self.counted.set(all);
            all
        };
        self.telemetry.queue(self.settings.deployment, &pending, self.ledger.clock.now());
        Ok(())
    }
}
