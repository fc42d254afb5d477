//! Replay: a range of a topic read again through the same apply path. What was counted already is a duplicate and changes nothing; what is missing
//! is added. The live positions never move.

use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::arrival;
use crate::event::TopicPartition;
use crate::ledger::{Arrival, Chain, Counts, Foreseen, Ledger, RecordError, ReplayRange};
use crate::log::{Log, LogError};

/// Records read and recorded at a time.
const BATCH_RECORDS: usize = 2_000;

/// What a replay would do, in numbers, and the hash by which exactly this is executed.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// SHA-256 of the ranges and their effect, in hexadecimal.
    pub hash: String,
    /// Each partition's range and effect.
    pub partitions: Vec<PlannedPartition>,
}

/// One partition of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedPartition {
    /// The topic's name.
    pub topic: &'static str,
    /// The partition.
    pub partition: i32,
    /// The first offset.
    pub first_offset: i64,
    /// The offset behind the last.
    pub end_offset: i64,
    /// Records in the range.
    pub records: i32,
    /// Events that the ledger does not have: they would be added.
    pub new_events: i32,
    /// Events that the ledger has: nothing would change.
    pub duplicates: i32,
    /// Events that the ledger has with other content.
    pub conflicts: i32,
    /// Records that are no events.
    pub rejects: i32,
    /// Usage of types that are not known yet.
    pub held: i32,
}

/// Why a replay cannot be planned or executed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// No plan of that hash is kept.
    #[error("no replay was planned under {0}: run `tallyline replay plan` and use the hash that it prints")]
    UnknownPlan(String),
    /// The effect is another than when it was planned.
    #[error("the effect is no longer the planned one: plan again")]
    Changed,
    /// It ran to its end before.
    #[error("this plan was executed to its end: plan again")]
    Finished,
    /// It was told to stop; the same call goes on where it stopped.
    #[error("interrupted; the same command goes on from here")]
    Interrupted,
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The ledger.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The ledger.
    #[error("the ledger cannot be used: {0}")]
    Ledger(#[from] sqlx::Error),
}

/// Replays against one log and one ledger.
#[derive(Clone)]
pub struct Replay {
    /// What is read.
    pub log: Log,
    /// What is written.
    pub ledger: Ledger,
}

impl Replay {
    /// Reads the ranges without writing an event, and keeps the plan. `progress` is told how many records were read.
    ///
    /// # Errors
    /// [`ReplayError`].
    pub async fn plan(&self, ranges: &[ReplayRange], progress: impl Fn(u64)) -> Result<Plan, ReplayError> {
        let id = Uuid::new_v4();
        let plan = self.foresee(id, ranges, progress).await?;
        self.ledger.save_replay(id, &plan.hash, ranges).await?;
        Ok(plan)
    }

    /// Executes the plan of that hash, or goes on with it. Returns what was recorded by this call.
    ///
    /// # Errors
    /// [`ReplayError`]; [`ReplayError::Changed`] before anything is written.
    pub async fn execute(&self, hash: &str, progress: impl Fn(u64), stop: &CancellationToken) -> Result<Counts, ReplayError> {
        let (id, started, ranges) = self.ledger.load_replay(hash).await?.ok_or_else(|| ReplayError::UnknownPlan(hash.to_owned()))?;
        if ranges.iter().all(|range| range.next_offset >= range.end_offset) && started {
            return Err(ReplayError::Finished);
        }
        if !started {
            if self.foresee(id, &ranges, |_| {}).await?.hash != hash {
                return Err(ReplayError::Changed);
            }
            self.ledger.start_replay(id).await?;
        }
        let mut total = Counts::default();
        for mut range in ranges {
            while let Some((arrivals, next_offset)) = self.batch(&range).await? {
                if stop.is_cancelled() {
                    return Err(ReplayError::Interrupted);
                }
                let chain = Chain::Replay { id, partition: range.partition, generation: range.generation, next_offset: range.next_offset };
                let counts = self.ledger.record(&chain, &arrivals, next_offset).await?;
                range.next_offset = next_offset;
                total = total + counts;
                progress(u64::try_from(counts.records).unwrap_or_default());
            }
        }
        Ok(total)
    }

    /// Records from here to at most the range's end; none is left when the range is done.
    async fn batch(&self, range: &ReplayRange) -> Result<Option<(Vec<Arrival>, i64)>, LogError> {
        if range.next_offset >= range.end_offset {
            return Ok(None);
        }
        let mut records = self.log.read(range.partition, range.next_offset, BATCH_RECORDS).await?;
        let full = records.len() == BATCH_RECORDS;
        records.retain(|record| record.offset < range.end_offset);
        // fewer than asked for: the range's end is reached, whatever gap lies before it
        let next_offset = match records.last() {
            Some(last) if full => last.offset + 1,
            _ => range.end_offset,
        };
        Ok(Some((records.into_iter().map(arrival::read).collect(), next_offset)))
    }

    async fn foresee(&self, id: Uuid, ranges: &[ReplayRange], progress: impl Fn(u64)) -> Result<Plan, ReplayError> {
        // one order, in whichever the ranges came: the hash must be the same for the plan as asked for and as kept
        let mut ranges: Vec<&ReplayRange> = ranges.iter().collect();
        ranges.sort_by_key(|range| (range.partition.topic.name(), range.partition.partition, range.first_offset));
        let mut foreseen = Foreseen::default();
        let mut partitions = Vec::with_capacity(ranges.len());
        for range in ranges {
            let mut reading = *range;
            let mut counts = Counts::default();
            while let Some((arrivals, next_offset)) = self.batch(&reading).await? {
                reading.next_offset = next_offset;
                let batch = self.ledger.foresee(&arrivals, &mut foreseen).await?;
                progress(u64::try_from(batch.records).unwrap_or_default());
                counts = counts + batch;
            }
            partitions.push(planned(range.partition, range, counts));
        }
        Ok(Plan { hash: hash(id, &partitions), partitions })
    }
}

fn planned(partition: TopicPartition, range: &ReplayRange, counts: Counts) -> PlannedPartition {
    PlannedPartition {
        topic: partition.topic.name(),
        partition: partition.partition,
        first_offset: range.first_offset,
        end_offset: range.end_offset,
        records: counts.records,
        new_events: counts.accepted,
        duplicates: counts.duplicates,
        conflicts: counts.conflicts,
        rejects: counts.rejects,
        held: counts.held,
    }
}

/// The id keeps two plans of the same range apart: each is executed once.
fn hash(id: Uuid, partitions: &[PlannedPartition]) -> String {
    let mut hash = Sha256::new();
    hash.update(id.as_bytes());
    hash.update(serde_json::to_vec(partitions).unwrap_or_default());
    hex::encode(hash.finalize())
}
