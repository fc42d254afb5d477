//! Replay: reads a range of a topic again on the same path as live consumption. A known event is a
//! duplicate and changes nothing; a missing event is added. The live positions never move.

use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::cutover::NO_KEYS;
use super::parts::Part;
use super::{PositionFault, arrival, verify};
use crate::event::{Event, TopicPartition};
use crate::ledger::{
    Arrival, Chain, Counts, Ledger, PlannedEvents, RecordError, ReplayRange, StatementError,
    cutover, generations, preview, record,
};
use crate::log::{Log, LogError};

/// Maximum number of records that are read and recorded together.
const BATCH_RECORDS: usize = 2_000;

/// Number of partitions checked in parallel: a check is mostly waiting for Kafka.
const PARALLEL_CHECKS: usize = 8;

/// The effect that a replay would have on one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangePreview {
    pub range: ReplayRange,
    /// The counts that recording the range would have.
    pub counts: Counts,
    /// Conflicts, rejects and held records that the ledger does not have yet.
    pub new_refused: i32,
}

/// Reasons why a replay did not finish.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// Another execution moves the replay, or the partition has a new generation.
    #[error(
        "{0}: another execution of this plan is running, or `tallyline recover` gave the partition a new generation"
    )]
    Moved(TopicPartition),
    /// The ledger has read another log than this one.
    #[error("{0}; run `tallyline recover` first")]
    AnotherLog(PositionFault),
    /// The records must be signed, and this process cannot verify them.
    #[error("{NO_KEYS}")]
    NoKeys,
    /// The replay was stopped. The same call resumes it.
    #[error("interrupted; run the same command again to resume")]
    Interrupted,
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("the ledger cannot be used: {}", crate::cause::text(.0))]
    Ledger(#[from] StatementError),
}

impl From<RecordError> for ReplayError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Fenced(partition) => ReplayError::Moved(partition),
            RecordError::Refused(cause)
            | RecordError::Slow(cause)
            | RecordError::Unavailable(cause)
            | RecordError::Unfit(cause) => ReplayError::Ledger(cause),
        }
    }
}

/// Replays of one log into one ledger.
#[derive(Clone)]
pub struct Replay {
    pub log: Log,
    pub ledger: Ledger,
}

impl Replay {
    /// Checks that the ledger's positions refer to this log: in a recreated topic an offset is
    /// another record. Records that retention has removed do not matter here.
    ///
    /// # Errors
    /// [`ReplayError::AnotherLog`], or an error of the check itself.
    pub async fn check_log(&self, ranges: &[ReplayRange]) -> Result<(), ReplayError> {
        let mut leases = self.ledger.run(generations::current).await?;
        leases.retain(|lease| ranges.iter().any(|range| range.partition == lease.partition));
        let checks = leases.into_iter().map(|lease| async move {
            match verify::position(&self.log, &lease).await {
                Ok(()) | Err(verify::Problem::Fault(PositionFault::BeforeStart { .. })) => Ok(()),
                Err(verify::Problem::Fault(fault)) => Err(ReplayError::AnotherLog(fault)),
                Err(verify::Problem::Log(error)) => Err(error.into()),
            }
        });
        stream::iter(checks).buffer_unordered(PARALLEL_CHECKS).try_collect().await
    }

    /// Reads the ranges without writing. `new` gets each event that would be added, once;
    /// `progress` gets the number of records read.
    pub async fn preview(
        &self,
        ranges: &[ReplayRange],
        mut new: impl FnMut(&Event) + Send,
        progress: impl Fn(u64) + Send,
        stop: &CancellationToken,
    ) -> Result<Vec<RangePreview>, ReplayError> {
        let mut planned = PlannedEvents::default();
        let mut previews = Vec::with_capacity(ranges.len());
        for range in ranges {
            let (mut reading, mut counts, mut new_refused) = (*range, Counts::default(), 0);
            while let Some((mut arrivals, next_offset)) =
                self.batch(&reading, BATCH_RECORDS).await?
            {
                if stop.is_cancelled() {
                    return Err(ReplayError::Interrupted);
                }
                reading.next_offset = next_offset;
                let preview = self
                    .ledger
                    .run(async |conn| {
                        preview::batch(
                            conn,
                            range,
                            &mut arrivals,
                            &mut planned,
                            self.ledger.clock.now(),
                        )
                        .await
                    })
                    .await?;
                preview
                    .new
                    .iter()
                    .filter_map(|index| arrivals[*index].event.as_ref().ok())
                    .for_each(&mut new);
                counts = counts + preview.counts;
                new_refused += preview.new_refused;
                progress(u64::try_from(preview.counts.records).unwrap_or_default());
            }
            previews.push(RangePreview { range: *range, counts, new_refused });
        }
        Ok(previews)
    }

    /// Reads the rest of the ranges and records it, at most `records_per_second`.
    ///
    /// # Errors
    /// [`ReplayError`]; recorded batches remain, and the same call on the ranges' current state
    /// resumes.
    pub async fn record(
        &self,
        id: Uuid,
        ranges: &[ReplayRange],
        records_per_second: u32,
        progress: impl Fn(u64) + Send,
        stop: &CancellationToken,
    ) -> Result<(), ReplayError> {
        let limit =
            BATCH_RECORDS.min(usize::try_from(records_per_second).unwrap_or(BATCH_RECORDS)).max(1);
        let mut due = Instant::now();
        for range in ranges {
            let mut range = *range;
            while let Some((arrivals, next_offset)) = self.batch(&range, limit).await? {
                // Unused time of the rate is not carried over, so that no burst follows a pause.
                due = due.max(Instant::now());
                if stop.is_cancelled() {
                    return Err(ReplayError::Interrupted);
                }
                let counts = self.record_batch(id, range, arrivals, next_offset).await?;
                range.next_offset = next_offset;
                progress(u64::try_from(counts.records).unwrap_or_default());
                due += Duration::from_secs_f64(
                    f64::from(counts.records) / f64::from(records_per_second.max(1)),
                );
                stop.run_until_cancelled(tokio::time::sleep_until(due)).await;
            }
        }
        Ok(())
    }

    /// Records the batch, in parts if the ledger does not accept it as a whole, as in live
    /// consumption.
    async fn record_batch(
        &self,
        id: Uuid,
        range: ReplayRange,
        arrivals: Vec<Arrival>,
        next_offset: i64,
    ) -> Result<Counts, ReplayError> {
        let (mut parts, mut from, mut total) =
            (vec![Part { arrivals, next_offset }], range.next_offset, Counts::default());
        while let Some(part) = parts.pop() {
            let chain = Chain::Replay {
                id,
                partition: range.partition,
                generation: range.generation,
                next_offset: from,
            };
            match self
                .ledger
                .run(async |conn| {
                    record::batch(
                        conn,
                        &chain,
                        &part.arrivals,
                        part.next_offset,
                        self.ledger.clock.now(),
                    )
                    .await
                })
                .await
            {
                Ok(counts) => (from, total) = (part.next_offset, total + counts),
                Err(RecordError::Refused(error)) => parts.extend(part.narrow(&error).ok_or(error)?),
                // Only if the server itself ended it: without an answer it may have been committed.
                Err(RecordError::Slow(why))
                    if why.as_database_error().is_some() && part.arrivals.len() > 1 =>
                {
                    parts.extend(part.halves())
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(total)
    }

    /// The next records of the range; none once the range is done.
    async fn batch(
        &self,
        range: &ReplayRange,
        limit: usize,
    ) -> Result<Option<(Vec<Arrival>, i64)>, ReplayError> {
        if range.next_offset >= range.end_offset {
            return Ok(None);
        }
        let reading = self.log.read(range.partition, range.next_offset, limit);
        let no_answer = |_| {
            LogError::Unreachable(format!(
                "{}: no answer within {} s",
                range.partition,
                self.ledger.deadline.as_secs_f64()
            ))
        };
        let mut records =
            tokio::time::timeout(self.ledger.deadline, reading).await.map_err(no_answer)??;
        let full = records.len() == limit;
        records.retain(|record| record.offset < range.end_offset);
        // Fewer records than requested: the range's end is reached, even if a gap precedes it.
        let next_offset = match records.last() {
            Some(last) if full => last.offset + 1,
            _ => range.end_offset,
        };
        let topic = range.partition.topic;
        let signed_from = self
            .ledger
            .run(async |conn| cutover::signed_from(conn, range.partition, range.generation).await)
            .await?;
        if signed_from.is_some() && !self.log.signatures().verify() {
            return Err(ReplayError::NoKeys);
        }
        let read = |record| arrival::verified(&self.log, signed_from, topic, record);
        Ok(Some((records.into_iter().map(read).collect(), next_offset)))
    }
}
