//! Where everything stands: the ledger's contents beside the log's ends. What `tallyline status` and `GET /api/v1/status` show.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use crate::event::{Topic, TopicPartition};
use crate::ledger::{
    BatchCount, Contents, EventCount, LeaseRow, Ledger, PositionRow, PublicationCount, Recovering, RefusedCount, SourceRow,
};
use crate::log::{Log, LogError};

/// Counted when asked: each event table's index is read once.
#[derive(Debug, Serialize)]
pub struct Status {
    /// This ledger's identity.
    pub ledger_incarnation: Uuid,
    /// Its last sequence.
    pub ledger_sequence: i64,
    /// The ledger was restored from a backup and has not caught up yet: domain series are withheld, publishing is held.
    pub recovering: Option<Recovering>,
    /// Why the log's ends are not known, if so.
    pub log_problem: Option<String>,
    /// Each partition's position beside the log's ends.
    pub partitions: Vec<Partition>,
    /// Batches by kind.
    pub batches: Vec<BatchCount>,
    /// Accepted events by type.
    pub events: Vec<EventCount>,
    /// Rejects, conflicts and held records by cause.
    pub refused: Vec<RefusedCount>,
    /// Each source.
    pub sources: Vec<Source>,
    /// Publications by state.
    pub publications: Vec<PublicationCount>,
    /// Who holds what.
    pub leases: Vec<LeaseRow>,
}

/// A partition that the log or the ledger knows.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// The topic's name.
    pub topic: String,
    /// Its number.
    pub partition: i32,
    /// The offset to read next; none before it was ever assigned.
    pub position: Option<i64>,
    /// The first offset that the log holds.
    pub log_start: Option<i64>,
    /// The offset that its next record gets.
    pub log_end: Option<i64>,
    /// Offsets behind the log's end. None where that is not known, or where the position is not in the log.
    pub lag: Option<i64>,
    /// When the position last moved.
    pub moved_at: Option<DateTime<Utc>>,
}

/// A source, and how far it is complete.
#[derive(Debug, Serialize)]
pub struct Source {
    /// The deployment.
    pub deployment_id: Uuid,
    /// Whether a collector of ours reads it.
    pub collected: bool,
    /// Histograms begin here.
    pub introduced_at: DateTime<Utc>,
    /// Collection begins here; none: at the beginning.
    pub baseline_until: Option<DateTime<Utc>>,
    /// Whether the first backfill is complete: from then on its series are shown.
    pub backfilled: bool,
    /// All that coderd committed before this is counted.
    pub complete_until: Option<DateTime<Utc>>,
    /// Every hour before has its agent runtime, or is over 7 days old.
    pub runtime_complete_until: Option<DateTime<Utc>>,
}

/// Reads both. The log's ends come first, so that the ledger is never shown ahead of the log only because it was read later; a log that does
/// not tell them within `log_deadline` is a problem of the answer.
///
/// # Errors
/// The ledger's.
pub async fn read(ledger: &Ledger, log: &Log, log_deadline: Duration) -> Result<Status, sqlx::Error> {
    let (ends, log_problem) = match tokio::time::timeout(log_deadline, ends(log)).await {
        Ok(Ok(ends)) => (ends, None),
        Ok(Err(error)) => (Vec::new(), Some(error.to_string())),
        Err(_) => (Vec::new(), Some(format!("no answer within {} seconds", log_deadline.as_secs()))),
    };
    let Contents { incarnation, sequence, batches, positions, events, refused, sources: rows, publications, leases } =
        ledger.contents().await?;
    Ok(Status {
        ledger_incarnation: incarnation,
        ledger_sequence: sequence,
        recovering: ledger.recovering().await?,
        log_problem,
        partitions: partitions(positions, &ends),
        batches,
        events,
        refused,
        sources: sources(ledger, &rows).await?,
        publications,
        leases,
    })
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
