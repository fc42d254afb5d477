//! `GET /api/v1/status`: where everything stands, counted in the ledger when asked.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use crate::event::{Topic, TopicPartition};
use crate::ledger::{BatchCount, Contents, EventCount, LeaseRow, Ledger, PositionRow, PublicationCount, RefusedCount, SourceRow};
use crate::log::{Log, LogError};

/// How long the log may take to tell its ends.
const LOG_ANSWER: Duration = Duration::from_secs(5);

/// The fields of `tallyline status --output json`, and of each source whether its first backfill is complete.
#[derive(Serialize)]
pub(super) struct Status {
    at: DateTime<Utc>,
    ledger_incarnation: Uuid,
    ledger_sequence: i64,
    /// Up to where this process has folded each stage.
    folded_sequences: Folded,
    /// Why the log's ends are not known, if so.
    log_problem: Option<String>,
    partitions: Vec<Partition>,
    batches: Vec<BatchCount>,
    events: Vec<EventCount>,
    refused: Vec<RefusedCount>,
    sources: Vec<Source>,
    publications: Vec<PublicationCount>,
    leases: Vec<LeaseRow>,
}

/// Absent where the fold has not begun.
#[derive(Serialize)]
struct Folded {
    metrics: Option<i64>,
    licenses: Option<i64>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Partition {
    topic: String,
    partition: i32,
    /// The offset to read next; none before it was ever assigned.
    position: Option<i64>,
    log_start: Option<i64>,
    log_end: Option<i64>,
    /// Offsets behind the log's end. None where that is not known, or where the position is not in the log.
    lag: Option<i64>,
    moved_at: Option<DateTime<Utc>>,
}

#[derive(Serialize)]
struct Source {
    deployment_id: Uuid,
    collected: bool,
    introduced_at: DateTime<Utc>,
    baseline_until: Option<DateTime<Utc>>,
    backfilled: bool,
    complete_until: Option<DateTime<Utc>>,
    runtime_complete_until: Option<DateTime<Utc>>,
}

/// Reads each event table's index once, so one request at a time is counted.
pub(super) async fn status(State(serving): State<Arc<Serving>>) -> Result<Json<Status>, Problem> {
    let _turn = serving.counting.lock().await;
    let api = &serving.api;
    // The log's ends first, so that the ledger is never shown ahead of the log only because it was read later.
    let (ends, log_problem) = match tokio::time::timeout(LOG_ANSWER, ends(&api.log)).await {
        Ok(Ok(ends)) => (ends, None),
        Ok(Err(error)) => (Vec::new(), Some(error.to_string())),
        Err(_) => (Vec::new(), Some(format!("no answer within {} seconds", LOG_ANSWER.as_secs()))),
    };
    let counted = async {
        let contents = api.ledger.contents().await?;
        let sources = sources(&api.ledger, &contents.sources).await?;
        Ok((contents, sources))
    };
    let (contents, sources) =
        counted.await.map_err(|error: sqlx::Error| Problem::unavailable(format!("the ledger cannot be read: {error}")))?;
    let Contents { incarnation, sequence, batches, positions, events, refused, publications, leases, .. } = contents;
    Ok(Json(Status {
        at: api.clock.now(),
        ledger_incarnation: incarnation,
        ledger_sequence: sequence,
        folded_sequences: Folded {
            metrics: api.metrics.watch().borrow().map(|standing| standing.sequence),
            licenses: api.licenses.watch().borrow().map(|standing| standing.sequence),
        },
        log_problem,
        partitions: partitions(positions, &ends),
        batches,
        events,
        refused,
        sources,
        publications,
        leases,
    }))
}

/// Each partition's first and next offset.
async fn ends(log: &Log) -> Result<Vec<(TopicPartition, (i64, i64))>, LogError> {
    let mut ends = Vec::new();
    for topic in Topic::ALL {
        for partition in log.partitions(topic).await? {
            let partition = TopicPartition { topic, partition };
            ends.push((partition, log.watermarks(partition).await?));
        }
    }
    Ok(ends)
}

async fn sources(ledger: &Ledger, rows: &[SourceRow]) -> Result<Vec<Source>, sqlx::Error> {
    let mut sources = Vec::with_capacity(rows.len());
    for row in rows {
        let completeness = ledger.completeness(row.id).await?;
        sources.push(Source {
            deployment_id: row.deployment_id,
            collected: row.collected,
            introduced_at: row.introduced_at,
            baseline_until: row.baseline_until,
            backfilled: ledger.backfilled(row.id).await?,
            complete_until: completeness.complete_until,
            runtime_complete_until: completeness.runtime_complete_until,
        });
    }
    Ok(sources)
}

/// What the log has, then what only the ledger has.
fn partitions(mut positions: Vec<PositionRow>, ends: &[(TopicPartition, (i64, i64))]) -> Vec<Partition> {
    let mut partitions = Vec::with_capacity(ends.len());
    for (at, (start, end)) in ends {
        let found = positions.iter().position(|row| row.topic == at.topic.name() && row.partition == at.partition);
        let row = found.map(|found| positions.remove(found));
        let position = row.as_ref().map(|row| row.next_offset);
        partitions.push(Partition {
            topic: at.topic.name().to_owned(),
            partition: at.partition,
            position,
            log_start: Some(*start),
            log_end: Some(*end),
            // What was never assigned will be read from the log's start.
            lag: Some(position.unwrap_or(*start)).filter(|next| (start..=end).contains(&next)).map(|next| end - next),
            moved_at: row.map(|row| row.moved_at),
        });
    }
    partitions.extend(positions.into_iter().map(|row| Partition {
        topic: row.topic,
        partition: row.partition,
        position: Some(row.next_offset),
        log_start: None,
        log_end: None,
        lag: None,
        moved_at: Some(row.moved_at),
    }));
    partitions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_told_where_both_ends_of_it_are_known() {
        let moved_at = DateTime::UNIX_EPOCH;
        let row =
            |partition, next_offset| PositionRow { topic: Topic::AgentUsage.name().into(), partition, next_offset, epoch: 1, moved_at };
        let ends: Vec<_> = (0..4).map(|partition| (TopicPartition { topic: Topic::AgentUsage, partition }, (5, 20))).collect();
        // Within the log, never assigned, fallen out of the log, beyond its end, and in a partition that the log does not have.
        let told = partitions(vec![row(0, 18), row(2, 4), row(3, 21), row(9, 1)], &ends);
        let lags: Vec<_> = told.iter().map(|partition| (partition.partition, partition.position, partition.lag)).collect();
        assert_eq!(lags, [(0, Some(18), Some(2)), (1, None, Some(15)), (2, Some(4), None), (3, Some(21), None), (9, Some(1), None)]);
    }
}
