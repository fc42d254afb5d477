//! Replays: plan the effect of rereading a range of the log, and execute exactly that plan.

use axum::http::Method;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::effect::{Effect, Effects};
use super::operation::counting;
use super::plan_hash::plan_hash;
use super::ranges::{LogRange, MovedEnd};
use super::{Actor, ApiRequest, Operation, OperationError, Operations, Progress, Run};
use crate::consumer::{RangePreview, Replay, ReplayError};
use crate::ledger::{ActKind, Counts, PlannedReplay, ReplayRange, Subject, positions, replays};

/// Default rate in records per second. One consumer on two cores, beside its broker, records ten
/// times as many. So live consumption keeps most of the ledger. A million records take at least 200
/// seconds.
pub const RECORDS_PER_SECOND: u32 = 5_000;

/// The effect of a replay in numbers, and the hash that identifies the plan when it is executed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReplayPlan {
    /// SHA-256 of the ranges and their effect, in hexadecimal.
    pub hash: String,
    /// Range of each partition, and the disposition of its records.
    pub partitions: Vec<PlannedPartition>,
    /// Effect of the new events.
    pub effect: Effect,
    /// Ends of ranges that the log does not hold, with their replacements.
    pub moved_ends: Vec<MovedEnd>,
}

/// One partition of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PlannedPartition {
    /// Name of the topic, without prefix.
    pub topic: String,
    /// Number of the partition.
    pub partition: i32,
    /// Generation of the partition. `recover` begins another one when the topic was lost or created
    /// again.
    pub generation: i32,
    /// First offset.
    pub first_offset: i64,
    /// Offset after the last record.
    pub end_offset: i64,
    /// Records in the range.
    pub records: i32,
    /// Events that the ledger does not have: they would be added.
    pub new_events: i32,
    /// Events that the ledger has: nothing would change.
    pub duplicates: i32,
    /// Events that the ledger has with other content.
    pub conflicts: i32,
    /// Records that are not valid events.
    pub rejects: i32,
    /// Usage of types that are not known yet.
    pub held: i32,
    /// Conflicts, rejects and held records that the ledger does not have yet: they would be added
    /// to the rejects.
    pub new_refused: i32,
}

/// Execute a planned replay, or resume it after an interruption.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ReplayExecution {
    /// Hash of the plan.
    #[arg(long = "plan")]
    pub hash: String,
    /// Maximum records per second, at least 1. Default: 5,000, which leaves most of the ledger to
    /// live consumption.
    #[arg(long = "rate", value_name = "RECORDS_PER_SECOND", value_parser = clap::value_parser!(u32).range(1..))]
    #[serde(default)]
    pub records_per_second: Option<u32>,
}

/// Result of a plan's execution, from its beginning to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Replayed {
    /// Hash of the plan.
    pub hash: String,
    /// Records read before an interruption, after which the execution resumed; absent if it was not
    /// interrupted.
    #[serde(default)]
    pub resumed_after: Option<i32>,
    /// Records that were read.
    pub records: i32,
    /// Events that the ledger did not have: they were added.
    pub accepted: i32,
    /// Events that the ledger already had.
    pub duplicates: i32,
    /// Events that the ledger had with other content.
    pub conflicts: i32,
    /// Records that are not valid events.
    pub rejects: i32,
    /// Usage of types that are not known yet.
    pub held: i32,
}

impl ApiRequest for LogRange {
    type Answer = ReplayPlan;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/replays";
    const ANSWER: &'static str = "The effect, and the hash that identifies the plan.";
    const IS_LONG: bool = true;
}

impl Operation for LogRange {
    /// Reads the range without recording an event, and saves the plan.
    async fn run(
        &self,
        Run { operations, progress, stop, .. }: Run<'_>,
    ) -> Result<ReplayPlan, OperationError> {
        let (ranges, moved_ends) = operations.resolve(self).await?;
        operations.replay().check_log(&ranges).await?;
        let id = Uuid::new_v4();
        let plan = ReplayPlan {
            moved_ends,
            ..operations.predict_replay(id, &ranges, "planning", progress, stop).await?
        };
        let (request, effect, now) = (
            serde_json::to_value(self)?,
            serde_json::to_value(&plan)?,
            operations.ledger.clock.now(),
        );
        operations
            .ledger
            .run(async |conn| {
                replays::save(conn, id, &plan.hash, &request, &effect, &ranges, now).await
            })
            .await?;
        Ok(plan)
    }
}

impl Operations {
    /// The plan with this hash, if it is not finished.
    async fn replay_plan(&self, hash: &str) -> Result<PlannedReplay, OperationError> {
        let planned = self
            .ledger
            .run(async |conn| replays::load(conn, hash).await)
            .await?
            .ok_or_else(|| OperationError::replay_not_planned(hash))?;
        if planned.finished {
            return Err(OperationError::plan_finished());
        }
        Ok(planned)
    }

    /// Executes the plan with this hash, or resumes it after an interruption. Returns the result of
    /// the whole plan.
    ///
    /// # Errors
    /// [`OperationError::Forbidden`] if the effect has changed since the plan. In that case nothing
    /// is written.
    pub async fn execute_replay(
        &self,
        request: &ReplayExecution,
        actor: &Actor,
        progress: Progress<'_>,
        stop: &CancellationToken,
    ) -> Result<Replayed, OperationError> {
        let hash = &request.hash;
        let rate = request.records_per_second.unwrap_or(RECORDS_PER_SECOND);
        if rate == 0 {
            return Err(OperationError::Invalid {
                field: "records_per_second",
                message: "must be at least 1".to_owned(),
            });
        }
        let planned = self.replay_plan(hash).await?;
        self.check_generations(&planned.ranges).await?;
        self.replay().check_log(&planned.ranges).await?;
        let resumed_after = if planned.started {
            Some(
                self.ledger
                    .run(async |conn| replays::counts(conn, planned.id).await)
                    .await?
                    .records,
            )
        } else {
            let now = self
                .predict_replay(
                    planned.id,
                    &planned.ranges,
                    "comparing with the plan",
                    progress,
                    stop,
                )
                .await?;
            if now.hash != *hash {
                return Err(OperationError::plan_changed());
            }
            let detail = serde_json::json!({ "records_per_second": rate });
            let act = actor.act(ActKind::Replay, Subject::Named(hash), detail);
            self.ledger
                .run(async |conn| replays::start(conn, hash, &act, self.ledger.clock.now()).await)
                .await?;
            None
        };
        let progress = counting(("replaying", "records"), offsets(&planned.ranges), progress);
        self.replay().record(planned.id, &planned.ranges, rate, progress, stop).await?;
        self.ledger
            .run(async |conn| replays::finish(conn, hash, self.ledger.clock.now()).await)
            .await?;
        let counts = self.ledger.run(async |conn| replays::counts(conn, planned.id).await).await?;
        let Counts { records, accepted, duplicates, conflicts, rejects, held } = counts;
        Ok(Replayed {
            hash: hash.clone(),
            resumed_after,
            records,
            accepted,
            duplicates,
            conflicts,
            rejects,
            held,
        })
    }

    /// An offset identifies a record only within one generation of its partition.
    async fn check_generations(&self, ranges: &[ReplayRange]) -> Result<(), OperationError> {
        for range in ranges {
            let generation = self
                .ledger
                .run(async |conn| positions::generation(conn, range.partition).await)
                .await?;
            if generation != range.generation {
                let message = format!(
                    "{}: the partition has another generation since the plan: plan again",
                    range.partition
                );
                return Err(OperationError::Forbidden(message));
            }
        }
        Ok(())
    }

    async fn predict_replay(
        &self,
        id: Uuid,
        ranges: &[ReplayRange],
        doing: &'static str,
        progress: Progress<'_>,
        stop: &CancellationToken,
    ) -> Result<ReplayPlan, OperationError> {
        let mut effects = Effects::begin(&self.ledger).await?;
        let progress = counting((doing, "records"), offsets(ranges), progress);
        let partitions =
            self.replay().preview(ranges, |event| effects.add(event), progress, stop).await?;
        let partitions: Vec<PlannedPartition> = partitions.into_iter().map(planned).collect();
        let effect = effects.end()?;
        // the id distinguishes two plans of the same range, because each plan is executed once
        let hash = plan_hash(&(id, &partitions, effect.essence()))?;
        Ok(ReplayPlan { hash, partitions, effect, moved_ends: Vec::new() })
    }

    fn replay(&self) -> Replay {
        Replay { log: self.log.clone(), ledger: self.ledger.clone() }
    }
}

impl From<ReplayError> for OperationError {
    fn from(error: ReplayError) -> Self {
        match error {
            ReplayError::Moved(_) | ReplayError::AnotherLog(_) | ReplayError::NoKeys => {
                OperationError::Forbidden(error.to_string())
            }
            ReplayError::Interrupted => OperationError::Interrupted,
            ReplayError::Log(error) => OperationError::Log(error),
            ReplayError::Ledger(error) => OperationError::Ledger(error),
        }
    }
}

/// Offsets to read.
fn offsets(ranges: &[ReplayRange]) -> u64 {
    ranges
        .iter()
        .map(|range| u64::try_from(range.end_offset - range.next_offset).unwrap_or_default())
        .sum()
}

fn planned(preview: RangePreview) -> PlannedPartition {
    let RangePreview { range, counts, new_refused } = preview;
    PlannedPartition {
        topic: range.partition.topic.name().to_owned(),
        partition: range.partition.partition,
        generation: range.generation,
        first_offset: range.first_offset,
        end_offset: range.end_offset,
        records: counts.records,
        new_events: counts.accepted,
        duplicates: counts.duplicates,
        conflicts: counts.conflicts,
        rejects: counts.rejects,
        held: counts.held,
        new_refused,
    }
}
