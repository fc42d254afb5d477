//! Consumes the log into the ledger: rows and position in one transaction.
//!
//! [`run`] joins the group and passes each assigned partition to its own worker. A worker has the
//! partition lease in the ledger. The next consumer that takes the lease fences it.

mod arrival;
mod cutover;
mod gaps;
mod marks;
mod membership;
mod parts;
mod progress;
mod replay;
mod state;
mod telemetry;
mod verify;
mod worker;

pub use arrival::{read, read_from};
pub use marks::mark_ahead;
pub use progress::{Progress, Stall};
pub use replay::{RangePreview, Replay, ReplayError};
pub use state::Consumer;
pub use telemetry::ConsumerTelemetry;
pub use verify::{PositionFault, Problem as PositionProblem, position as check_position};
pub use worker::GRACE;

use std::sync::Arc;
use std::time::Duration;

use gaps::{Gap, GapWatch};
use tokio::sync::{OnceCell, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::event::TopicPartition;
use crate::ledger::{PartitionGenerations, PartitionLease, generations, positions, restored};
use crate::log::{Log, LogError};
use crate::retry::Backoff;

/// How often a consumer checks for a recovery. After one it rejoins the group, which also restarts
/// stopped partitions.
const RECOVERY_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Deadline of a request to the log for its end or its next record.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

impl Consumer {
    /// Consumes until `stop`; rejoins after a fault.
    pub async fn run(&self, stop: &CancellationToken) {
        let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        while !stop.is_cancelled() {
            match self.consume(stop, &mut waits).await {
                Ok(()) => return,
                Err(fault) => {
                    warn!(error = crate::cause::text(fault.as_ref()), "consumer rejoins the group")
                }
            }
            if !waits.wait(stop).await {
                return;
            }
        }
    }

    /// Returns once the ledger has another incarnation, or a partition's generation has ended.
    async fn recovered(&self, generations: PartitionGenerations) {
        loop {
            tokio::time::sleep(RECOVERY_CHECK_INTERVAL).await;
            // A ledger that does not answer is handled by the workers.
            if self.ledger.run(generations::all).await.is_ok_and(|now| now != generations) {
                return;
            }
        }
    }

    /// Returns once a partition's position has not moved for too long while records waited for it.
    ///
    /// Without an answer from the log it decides nothing, because rejoining would not help. `gaps`
    /// gets the ranges without a record that begin at a partition's position.
    async fn stalled(&self, gaps: mpsc::UnboundedSender<Gap>) -> Stall {
        let check_interval = self.progress(|progress| progress.check_interval());
        let mut watch = GapWatch::default();
        loop {
            tokio::time::sleep(check_interval).await;
            for partition in self.progress(Progress::suspects) {
                let Ok(Ok((_, end))) =
                    tokio::time::timeout(REQUEST_DEADLINE, self.log.watermarks(partition)).await
                else {
                    continue;
                };
                let stall = self.progress(|progress| {
                    progress.check(partition, end, Instant::now(), self.ledger.clock.now())
                });
                let Some(from) = self
                    .progress(|progress| progress.position(partition))
                    .filter(|position| *position < end)
                else {
                    continue;
                };
                match tokio::time::timeout(REQUEST_DEADLINE, self.without_record(partition, from))
                    .await
                {
                    Ok(Ok(Some(until))) => {
                        self.progress(|progress| progress.clear_backlog(partition));
                        if let Some(gap) = watch.note_empty(Gap { partition, from, until }) {
                            let _ = gaps.send(gap);
                        }
                    }
                    Ok(Ok(None)) => {
                        watch.clear(partition);
                        if let Some(stall) = stall {
                            return stall;
                        }
                    }
                    Ok(Err(_)) | Err(_) => watch.clear(partition),
                }
            }
        }
    }

    /// The end of the offsets without a record from `from` on; none if the next record is readable.
    /// It is at most the start of another producer's open transaction. Offsets in PostgreSQL have
    /// no gaps: a missing record is lost.
    async fn without_record(
        &self,
        partition: TopicPartition,
        from: i64,
    ) -> Result<Option<i64>, LogError> {
        let Log::Kafka(_) = self.log else { return Ok(None) };
        let until = self.log.readable_end(partition).await?;
        Ok(self.log.read(partition, from, 1).await?.is_empty().then_some(until))
    }

    fn leave_for(&self, stall: &Stall) -> anyhow::Error {
        let Stall { partition, position, end: log_end, waited } = *stall;
        self.telemetry.stalled(partition.topic);
        self.progress(|progress| progress.note_stall(partition));
        let stalled_seconds = waited.as_secs();
        warn!(%partition, position, log_end, stalled_seconds, "consumer stalled, leaving the group");
        anyhow::anyhow!(
            "{partition}: position {position} has not moved for {stalled_seconds} seconds, but the log ends at {log_end}"
        )
    }

    /// Compares the group's marks with the ledger's positions. If a mark is ahead, the ledger was
    /// restored from a backup, and this opens a recovery.
    pub async fn compare_marks(&self) -> anyhow::Result<()> {
        if let Some(restored) = mark_ahead(&self.log, &self.ledger, &self.group).await? {
            self.ledger
                .run(async |conn| {
                    restored::record_detected(conn, &restored, self.ledger.clock.now()).await
                })
                .await?;
        }
        Ok(())
    }

    /// Takes the partition lease and checks that its position refers to this log. It retries after
    /// a temporary fault: a partition without a leader does not delay the others.
    async fn start(self, partition: TopicPartition, marks: Arc<OnceCell<()>>) -> PartitionLease {
        let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut last_problem = None;
        loop {
            let problem = match self.take(partition, &marks).await {
                Ok(lease) => match verify::position(&self.log, &lease).await {
                    Ok(()) => return lease,
                    Err(verify::Problem::Fault(fault)) => {
                        self.stop_partition(partition, &fault.to_string());
                        // Only a new assignment checks again; a recovery causes one.
                        std::future::pending().await
                    }
                    Err(verify::Problem::Log(error)) => error.to_string(),
                },
                Err(error) => crate::cause::text(error.as_ref()),
            };
            self.set_problem(partition, &mut last_problem, Some(problem));
            tokio::time::sleep(waits.next_wait()).await;
        }
    }

    /// Takes the partition lease after the group's marks are compared, once for all partitions of
    /// an assignment. Later this member's own marks would hide that the ledger was restored.
    async fn take(
        &self,
        partition: TopicPartition,
        marks: &OnceCell<()>,
    ) -> anyhow::Result<PartitionLease> {
        marks.get_or_try_init(|| self.compare_marks()).await?;
        self.take_lease(partition).await
    }

    async fn take_lease(&self, partition: TopicPartition) -> anyhow::Result<PartitionLease> {
        let (log_start, _) = self.log.watermarks(partition).await?;
        let verifies = self.log.signatures().verify();
        if verifies {
            cutover::begin(self).await?;
        }
        let lease = self
            .ledger
            .run(async |conn| {
                positions::lease(conn, partition, log_start, self.ledger.clock.now()).await
            })
            .await?;
        anyhow::ensure!(verifies || lease.signed_from.is_none(), cutover::NO_KEYS);
        Ok(lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::event::Topic;
    use crate::ledger::{Ledger, LedgerSettings};
    use crate::log::PostgresLogSettings;

    /// Both databases are absent, so that any request fails.
    #[tokio::test]
    async fn a_postgres_log_has_no_gaps_to_skip() {
        let url = "postgres://user@127.0.0.1:1/absent";
        let ledger =
            Ledger::open(&LedgerSettings { url: url.to_owned(), connections: 1 }, Clock::system())
                .unwrap();
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        let telemetry = ConsumerTelemetry::register(&prometheus::Registry::new()).unwrap();
        let consumer = Consumer::new(log, ledger, "group", telemetry);
        let partition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };
        assert_eq!(consumer.without_record(partition, 5).await, Ok(None));
    }
}
