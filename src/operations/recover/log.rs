//! Recovers from topics that were lost, created again, or emptied before Tallyline read them.
//!
//! Their partitions begin another generation at the start of the log. Unread records of Tallyline's
//! collectors are collected from coderd again. The rejects of unread resubmissions are reopened.
//! Unread records of other producers are lost.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::{OperationError, Operations};
use crate::consumer::{PositionFault, PositionProblem, check_position};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{NewAct, NewGeneration, PartitionLease, generations, rejects};
use crate::log::{Log, LogError};

/// Effect of a recovery for the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogEffect {
    /// Missing topics that would be created.
    pub topics_to_create: Vec<String>,
    /// Partitions of each created topic.
    pub partitions_to_create: i32,
    /// Partitions that would begin another generation at the start of the log.
    pub partitions: Vec<PartitionToBegin>,
}

/// A partition whose position does not match the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PartitionToBegin {
    /// Name of the topic, without prefix.
    pub topic: String,
    /// Number of the partition.
    pub partition: i32,
    /// Current generation of the partition.
    pub generation: i32,
    /// Next offset to consume.
    pub position: i64,
    /// Problem: `gone`, `before_start`, `beyond_end`, `another_record` or `missing_records`.
    pub problem: String,
    /// First offset that the log holds; absent if the log does not have the partition.
    pub log_start: Option<i64>,
    /// Offset after the last record; absent if the log does not have the partition.
    pub log_end: Option<i64>,
    /// Offsets that are known to have existed and were never read. Records of Tallyline's
    /// collectors are collected again; the rest is lost. Records that others appended after the
    /// last collector pass are not known.
    pub unread: i64,
    /// Resubmitted records that were never read. Their rejects are reopened: they can be
    /// resubmitted or admitted again.
    pub reopened: i64,
}

impl LogEffect {
    pub(super) fn nothing(&self) -> Option<String> {
        let nothing = self.topics_to_create.is_empty() && self.partitions.is_empty();
        nothing.then(|| {
            "all topics exist and contain the ledger's positions: nothing to recover".to_owned()
        })
    }

    pub(super) fn changes(&self) -> Value {
        let partitions: Vec<Value> = self
            .partitions
            .iter()
            .map(|one| {
                json!([
                    one.topic,
                    one.partition,
                    one.generation,
                    one.position,
                    one.problem,
                    one.reopened
                ])
            })
            .collect();
        json!({ "create": self.topics_to_create, "partitions": self.partitions_to_create, "begin": partitions })
    }
}

pub(super) async fn predict(operations: &Operations) -> Result<LogEffect, OperationError> {
    let mut effect = LogEffect {
        topics_to_create: Vec::new(),
        partitions_to_create: operations.partitions,
        partitions: Vec::new(),
    };
    for topic in Topic::ALL {
        match operations.log.partitions(topic).await {
            Ok(_) => {}
            Err(LogError::NoTopic(_)) => effect.topics_to_create.push(topic.name().to_owned()),
            Err(error) => return Err(error.into()),
        }
    }
    for position in operations.ledger.run(generations::current).await? {
        let Some(problem) = problem(&operations.log, &position).await? else { continue };
        effect.partitions.push(begin(operations, &position, problem).await?);
    }
    Ok(effect)
}

/// The problem of a position, in one word.
async fn problem(
    log: &Log,
    position: &PartitionLease,
) -> Result<Option<&'static str>, OperationError> {
    match check_position(log, position).await {
        Ok(()) => Ok(misses_records(log, position).await?.then_some("missing_records")),
        Err(PositionProblem::Fault(PositionFault::BeforeStart { .. })) => Ok(Some("before_start")),
        Err(PositionProblem::Fault(PositionFault::BeyondEnd { .. })) => Ok(Some("beyond_end")),
        Err(PositionProblem::Fault(PositionFault::AnotherRecord { .. })) => {
            Ok(Some("another_record"))
        }
        Err(PositionProblem::Log(LogError::NoTopic(_))) => Ok(Some("gone")),
        Err(PositionProblem::Log(error)) => Err(error.into()),
    }
}

/// Offsets have no gaps in PostgreSQL; they may have gaps in Kafka.
async fn misses_records(log: &Log, position: &PartitionLease) -> Result<bool, LogError> {
    let Log::Postgres(_) = log else { return Ok(false) };
    let (_, end) = log.watermarks(position.partition).await?;
    let next = log.read(position.partition, position.next_offset, 1).await?;
    Ok(position.next_offset < end
        && next.first().is_none_or(|record| record.offset != position.next_offset))
}

async fn begin(
    operations: &Operations,
    position: &PartitionLease,
    problem: &str,
) -> Result<PartitionToBegin, OperationError> {
    let ends = if problem == "gone" {
        None
    } else {
        Some(operations.log.watermarks(position.partition).await?)
    };
    let noted = operations
        .ledger
        .run(async |conn| generations::recorded_end(conn, position.partition).await)
        .await?;
    let lost = lost(position.next_offset, problem, ends.map(|(start, _)| start));
    let reopened = operations.ledger.run(async |conn| {
        rejects::passed_to(conn, position.partition, position.generation, lost).await
    });
    let known_end = match (problem, ends) {
        ("before_start", Some((start, _))) => Some(start),
        _ => noted,
    };
    Ok(PartitionToBegin {
        topic: position.partition.topic.name().to_owned(),
        partition: position.partition.partition,
        generation: position.generation,
        position: position.next_offset,
        problem: problem.to_owned(),
        log_start: ends.map(|(start, _)| start),
        log_end: ends.map(|(_, end)| end),
        unread: known_end.map_or(0, |end| (end - position.next_offset).max(0)),
        reopened: reopened.await?,
    })
}

/// The offsets that cannot be read any more. Records after the start that retention left still
/// exist.
fn lost(position: i64, problem: &str, log_start: Option<i64>) -> Range<i64> {
    let until = log_start.filter(|_| problem == "before_start");
    position..until.unwrap_or(i64::MAX)
}

pub(super) async fn execute(
    operations: &Operations,
    effect: &LogEffect,
    act: &NewAct<'_>,
    hash: &str,
) -> Result<bool, OperationError> {
    if !effect.topics_to_create.is_empty() {
        for drift in operations.log.create_topics(effect.partitions_to_create).await? {
            tracing::warn!("{drift}");
        }
    }
    let mut begun = Vec::with_capacity(effect.partitions.len());
    for one in &effect.partitions {
        let topic = one
            .topic
            .parse::<Topic>()
            .ok()
            .ok_or_else(|| anyhow::anyhow!("no topic {}", one.topic))?;
        let partition = TopicPartition { topic, partition: one.partition };
        let start = match operations.log.whole_from(partition).await {
            Ok(start) => Some(start),
            // the topic was created again with fewer partitions
            Err(LogError::NoTopic(_)) => None,
            Err(error) => return Err(error.into()),
        };
        let lost = lost(one.position, &one.problem, one.log_start);
        begun.push(NewGeneration {
            partition,
            generation: one.generation,
            lost,
            reopened: one.reopened,
            start,
        });
    }
    Ok(operations
        .ledger
        .run(async |conn| {
            generations::begin(conn, &begun, act, hash, operations.ledger.clock.now()).await
        })
        .await?)
}
