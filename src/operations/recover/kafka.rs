//! Topics that were lost, made anew, or emptied before they were read.
//!
//! Their partitions begin another life at the log's start. What our collectors had appended and nobody had read comes again from coderd; what
//! had gone through the log again from the rejects is open again; what others had appended is lost.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::{Desk, OperationError};
use crate::consumer::{PositionFault, PositionProblem, check_position};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{BegunAnew, Claim, NewAct};
use crate::log::{Log, LogError};

/// What was found of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KafkaEffect {
    /// Topics that are not there and would be created.
    pub topics_to_create: Vec<String>,
    /// Partitions of each of them.
    pub partitions_to_create: i32,
    /// Partitions that would begin anew at the log's start.
    pub partitions: Vec<PartitionToBegin>,
}

/// A partition whose position the log does not bear out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PartitionToBegin {
    /// The topic's name.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// Its life until now.
    pub generation: i32,
    /// The offset that was to be read next.
    pub position: i64,
    /// gone, `before_start`, `beyond_end`, `another_record` or `missing_records`.
    pub problem: String,
    /// The first offset that the log holds; none where it has no such partition.
    pub log_start: Option<i64>,
    /// The offset behind the last that it holds.
    pub log_end: Option<i64>,
    /// Offsets that are known to have been in the log and were never read. What our collectors appended comes again; the rest is lost. What others
    /// appended after the last pass of a collector is not known.
    pub unread: i64,
    /// Records that had gone through the log again from the rejects and were never read. Their rejects are open again: they can be resubmitted
    /// once more, or admitted.
    pub reopened: i64,
}

impl KafkaEffect {
    pub(super) fn nothing(&self) -> Option<String> {
        let nothing = self.topics_to_create.is_empty() && self.partitions.is_empty();
        nothing.then(|| "every topic is there and every position lies in it: nothing is lost, and there is nothing to recover".to_owned())
    }

    pub(super) fn changes(&self) -> Value {
        let partitions: Vec<Value> = self
            .partitions
            .iter()
            .map(|one| json!([one.topic, one.partition, one.generation, one.position, one.problem, one.reopened]))
            .collect();
        json!({ "create": self.topics_to_create, "partitions": self.partitions_to_create, "begin": partitions })
    }
}

pub(super) async fn foresee(desk: &Desk) -> Result<KafkaEffect, OperationError> {
    let mut effect = KafkaEffect { topics_to_create: Vec::new(), partitions_to_create: desk.partitions, partitions: Vec::new() };
    for topic in Topic::ALL {
        match desk.log.partitions(topic).await {
            Ok(_) => {}
            Err(LogError::NoTopic(_)) => effect.topics_to_create.push(topic.name().to_owned()),
            Err(error) => return Err(error.into()),
        }
    }
    for position in desk.ledger.in_time(desk.ledger.standings()).await? {
        let Some(problem) = problem(&desk.log, &position).await? else { continue };
        effect.partitions.push(begin(desk, &position, problem).await?);
    }
    Ok(effect)
}

/// What is wrong with a position, in one word.
async fn problem(log: &Log, position: &Claim) -> Result<Option<&'static str>, OperationError> {
    match check_position(log, position).await {
        Ok(()) => Ok(misses_records(log, position).await?.then_some("missing_records")),
        Err(PositionProblem::Fault(PositionFault::BeforeStart { .. })) => Ok(Some("before_start")),
        Err(PositionProblem::Fault(PositionFault::BeyondEnd { .. })) => Ok(Some("beyond_end")),
        Err(PositionProblem::Fault(PositionFault::AnotherRecord { .. })) => Ok(Some("another_record")),
        Err(PositionProblem::Log(LogError::NoTopic(_))) => Ok(Some("gone")),
        Err(PositionProblem::Log(error)) => Err(error.into()),
    }
}

/// In PostgreSQL offsets have no gaps; in Kafka they may.
async fn misses_records(log: &Log, position: &Claim) -> Result<bool, LogError> {
    let Log::Postgres(_) = log else { return Ok(false) };
    let (_, end) = log.watermarks(position.partition).await?;
    let next = log.read(position.partition, position.next_offset, 1).await?;
    Ok(position.next_offset < end && next.first().is_none_or(|record| record.offset != position.next_offset))
}

async fn begin(desk: &Desk, position: &Claim, problem: &str) -> Result<PartitionToBegin, OperationError> {
    let ends = if problem == "gone" { None } else { Some(desk.log.watermarks(position.partition).await?) };
    let noted = desk.ledger.in_time(desk.ledger.noted_end(position.partition)).await?;
    let lost = lost(position.next_offset, problem, ends.map(|(start, _)| start));
    let reopened = desk.ledger.passed_to(position.partition, position.generation, lost);
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
        reopened: desk.ledger.in_time(reopened).await?,
    })
}

/// The offsets of which nothing is read any more. What lies behind the start that retention left is still there.
fn lost(position: i64, problem: &str, log_start: Option<i64>) -> Range<i64> {
    let until = log_start.filter(|_| problem == "before_start");
    position..until.unwrap_or(i64::MAX)
}

pub(super) async fn execute(desk: &Desk, effect: &KafkaEffect, act: &NewAct<'_>, hash: &str) -> Result<bool, OperationError> {
    if !effect.topics_to_create.is_empty() {
        for drift in desk.log.create_topics(effect.partitions_to_create).await? {
            tracing::warn!("{drift}");
        }
    }
    let mut begun = Vec::with_capacity(effect.partitions.len());
    for one in &effect.partitions {
        let topic = one.topic.parse::<Topic>().ok().ok_or_else(|| anyhow::anyhow!("no topic {}", one.topic))?;
        let partition = TopicPartition { topic, partition: one.partition };
        let start = match desk.log.whole_from(partition).await {
            Ok(start) => Some(start),
            // made anew with fewer partitions
            Err(LogError::NoTopic(_)) => None,
            Err(error) => return Err(error.into()),
        };
        let lost = lost(one.position, &one.problem, one.log_start);
        begun.push(BegunAnew { partition, generation: one.generation, lost, reopened: one.reopened, start });
    }
    Ok(desk.ledger.in_time(desk.ledger.begin_anew(&begun, act, hash)).await?)
}
