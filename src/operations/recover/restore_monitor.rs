//! Monitors, in every process, whether the ledger was restored from a backup. Opens the recovery,
//! and closes it when the ledger has caught up.
//!
//! Each step happens once, in whichever process comes first.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::super::{OperationError, Operations};
use super::ledger::{is_of, marked_as_published};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{
    Landmark, LedgerIdentity, Recovering, RestoreEvidence, Settlement, landmarks, publications,
    recoveries, restored, sources,
};
use crate::log::LogError;

/// Interval of the checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Publications settled in one transaction.
const SETTLED_AT_ONCE: usize = 500;
/// Consecutive failed checks before a warning.
const FAILURES_BEFORE_WARNING: u32 = 10;

/// The restore monitor of one process. It remembers the newest batch that it saw: a ledger without
/// this batch was restored. After a start it remembers none; consumers and publishers compare the
/// committed offsets of the consumer group.
pub struct RestoreMonitor {
    operations: Operations,
    /// Identifies this process when it settles publications.
    holder: String,
}

/// State between checks.
#[derive(Default)]
struct Remembered {
    /// A batch that the ledger must contain.
    landmark: Option<Landmark>,
    /// The recovery that the last warning named.
    warned_recovery: Option<i64>,
}

impl RestoreMonitor {
    #[must_use]
    pub fn new(operations: Operations) -> Self {
        RestoreMonitor { operations, holder: Uuid::new_v4().to_string() }
    }

    /// Checks until `stop`.
    pub async fn keep(self, stop: &CancellationToken) {
        let (mut remembered, mut failures) = (Remembered::default(), 0);
        loop {
            match stop.run_until_cancelled(self.check(&mut remembered)).await {
                None => return,
                Some(Ok(())) => failures = 0,
                Some(Err(error)) => {
                    failures += 1;
                    // users of a dependency report its failure themselves
                    if failures == FAILURES_BEFORE_WARNING {
                        warn!(%error, "whether the ledger was restored is not known, or it does not catch up");
                    }
                }
            }
            if stop.run_until_cancelled(tokio::time::sleep(CHECK_INTERVAL)).await.is_none() {
                return;
            }
        }
    }

    async fn check(&self, remembered: &mut Remembered) -> Result<(), OperationError> {
        self.check_landmark(&mut remembered.landmark).await?;
        let ledger = &self.operations.ledger;
        if let Some(recovering) = ledger.run(recoveries::open).await? {
            if remembered.warned_recovery.replace(recovering.id) != Some(recovering.id) {
                warn!(
                    by = recovering.actor,
                    reason = recovering.reason,
                    "{recovering}; {}",
                    recovering.lost_acts()
                );
            }
            self.advance(&recovering).await?;
        }
        Ok(())
    }

    /// Checks that the ledger contains the remembered batch, then remembers a newer one.
    async fn check_landmark(&self, known: &mut Option<Landmark>) -> Result<(), OperationError> {
        let ledger = &self.operations.ledger;
        let (head, identity) = ledger
            .run(async |conn| landmarks::head_and_identity(conn, known.as_ref()).await)
            .await?;
        if let (LedgerIdentity::Restored, Some(landmark)) = (identity, *known) {
            ledger
                .run(async |conn| {
                    restored::record_detected(
                        conn,
                        &RestoreEvidence::Batch(landmark),
                        ledger.clock.now(),
                    )
                    .await
                })
                .await?;
            return Ok(());
        }
        let further = ledger.run(async |conn| landmarks::of_batch(conn, head.number).await).await?;
        // check again: a restore in between would have removed the remembered batch
        let (_, identity) = ledger
            .run(async |conn| landmarks::head_and_identity(conn, known.as_ref()).await)
            .await?;
        if identity != LedgerIdentity::Restored {
            *known = further.or(*known);
        }
        Ok(())
    }

    /// Does the part of the open recovery that this process can do. Closes the recovery when
    /// nothing is left.
    async fn advance(&self, recovering: &Recovering) -> Result<(), OperationError> {
        let ledger = &self.operations.ledger;
        if !recovering.log_ends_known {
            let ends = self.ends().await?;
            ledger
                .run(async |conn| {
                    recoveries::set_targets(conn, recovering.id, &ends, ledger.clock.now()).await
                })
                .await?;
            return Ok(());
        }
        if recovering.records_to_read > 0 || !recovering.sources_to_read.is_empty() {
            return Ok(());
        }
        if !recovering.sources_to_compare.is_empty() {
            self.compare(recovering).await?;
        }
        if ledger
            .run(async |conn| recoveries::close(conn, recovering.id, ledger.clock.now()).await)
            .await?
        {
            info!(
                "the restored ledger has caught up: series are shown and usage is published again; {}",
                recovering.lost_acts()
            );
        }
        Ok(())
    }

    async fn ends(&self) -> Result<Vec<(TopicPartition, i64)>, LogError> {
        let mut ends = Vec::new();
        for topic in Topic::ALL {
            for partition in self.operations.log.partitions(topic).await? {
                let partition = TopicPartition { topic, partition };
                let (_, end) = self.operations.log.watermarks(partition).await?;
                ends.push((partition, end));
            }
        }
        Ok(ends)
    }

    /// Settles publications that coderd has marked as published: they are not ours to send, even if
    /// we sent them in the lost time.
    async fn compare(&self, recovering: &Recovering) -> Result<(), OperationError> {
        let Some(database) = &self.operations.coderd else { return Ok(()) };
        let ledger = &self.operations.ledger;
        let mut sources = ledger.run(sources::list).await?;
        sources.retain(|source| recovering.sources_to_compare.contains(&source.deployment_id));
        for source in sources {
            let is_of = match self.operations.deployment {
                Some(configured) => {
                    configured == source.deployment_id
                        && is_of(&self.operations, database, configured).await?
                }
                None => {
                    is_of(&self.operations, database, source.deployment_id).await.unwrap_or(false)
                }
            };
            if !is_of {
                continue;
            }
            let mut not_ours = 0;
            for ids in marked_as_published(&self.operations, database, source.id)
                .await?
                .chunks(SETTLED_AT_ONCE)
            {
                let settled = ledger.run(async |conn| {
                    publications::settle(
                        conn,
                        source.id,
                        &self.holder,
                        ids,
                        Settlement::NotOurs,
                        ledger.clock.now(),
                    )
                    .await
                });
                not_ours += settled.await?.not_ours;
            }
            ledger
                .run(async |conn| {
                    recoveries::record_compared(conn, recovering.id, source.id, ledger.clock.now())
                        .await
                })
                .await?;
            info!(source = %source.deployment_id, not_ours, "pending publications compared with coderd's publish marks");
        }
        Ok(())
    }
}
