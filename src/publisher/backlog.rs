//! Shows the queue in the publisher's metrics.

use tracing::debug;

use super::Publisher;
use crate::ledger::{Pending, publications, sources};

/// Rows of the backlog that are read each time. A longer backlog is counted less often.
const READ_ROWS: i64 = 10_000;

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
