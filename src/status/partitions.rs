//! State of each partition: lag of the ledger in records and in time, and time until the log may
//! remove unread records.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::event::{Topic, TopicPartition};
use crate::ledger::PositionRow;
use crate::log::{Log, LogError};

/// Maximum concurrent partition queries.
const AT_ONCE: usize = 8;

/// A partition in the log or in the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Partition {
    /// Name of the topic.
    pub topic: String,
    /// Number of the partition.
    pub partition: i32,
    /// Next offset to consume; absent if the partition was never assigned.
    pub position: Option<i64>,
    /// The first offset that the log holds.
    pub log_start: Option<i64>,
    /// Offset of the next record that is appended.
    pub log_end: Option<i64>,
    /// Offsets from the position to the end of the log: records, unless the log has gaps. Absent if
    /// the log does not answer or lacks the partition.
    pub lag: Option<i64>,
    /// Part of the lag that is not readable yet, because another producer's transaction is open.
    pub in_open_transaction: Option<i64>,
    /// Log time of the oldest unread record; absent if it is not known or nothing is unread.
    pub oldest_unread_at: Option<DateTime<Utc>>,
    /// Age of the oldest unread record in seconds; 0 if nothing is unread.
    pub lag_seconds: Option<i64>,
    /// Seconds until the log may remove the oldest unread record; 0 if at any time. Absent if
    /// nothing is unread, or if the log keeps unread records.
    pub loss_in_seconds: Option<i64>,
    /// Records read from this partition in total.
    pub records: Option<i64>,
    /// When the position last changed.
    pub moved_at: Option<DateTime<Utc>>,
}

/// State of one partition in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogPartition {
    start: i64,
    end: i64,
    readable_end: i64,
    /// Whether nothing is readable between the position and the readable end.
    nothing_to_read: bool,
    oldest_unread: Option<DateTime<Utc>>,
    keeps: Option<Duration>,
}

/// Reads the ends of each partition before the ledger, so the ledger never seems to be ahead of the
/// log. A failed partition does not affect the others; the first error is returned after all
/// queries.
pub(super) async fn ends(
    log: &Log,
    seen: &Mutex<HashMap<TopicPartition, LogPartition>>,
) -> Result<(), LogError> {
    futures::future::join_all(Topic::ALL.map(|topic| ends_of(log, topic, seen)))
        .await
        .into_iter()
        .collect()
}

async fn ends_of(
    log: &Log,
    topic: Topic,
    seen: &Mutex<HashMap<TopicPartition, LogPartition>>,
) -> Result<(), LogError> {
    let keeps = log.keeps_unread(topic).await?;
    let partitions = log
        .partitions(topic)
        .await?
        .into_iter()
        .map(|partition| TopicPartition { topic, partition });
    let mut queries =
        futures::stream::iter(partitions.map(|at| async move { (at, both_ends(log, at).await) }))
            .buffer_unordered(AT_ONCE);
    let mut answered = Ok(());
    while let Some((at, ends)) = queries.next().await {
        match ends {
            Ok(((start, end), readable_end)) => {
                let seen_at = LogPartition {
                    start,
                    end,
                    readable_end,
                    nothing_to_read: false,
                    oldest_unread: None,
                    keeps,
                };
                seen.lock().unwrap_or_else(PoisonError::into_inner).insert(at, seen_at);
            }
            Err(error) => answered = answered.and(Err(error)),
        }
    }
    answered
}

/// Read the readable end last, so that records appended meanwhile do not seem to be in an open
/// transaction.
async fn both_ends(log: &Log, at: TopicPartition) -> Result<((i64, i64), i64), LogError> {
    let (start, end) = log.watermarks(at).await?;
    Ok(((start, end), log.readable_end(at).await?.min(end)))
}

/// Reads the first record after each position, for its log time.
pub(super) async fn ages(
    log: &Log,
    seen: &mut HashMap<TopicPartition, LogPartition>,
    positions: &[PositionRow],
) -> Result<(), LogError> {
    let next = |at: &TopicPartition, seen: &LogPartition| {
        position(positions, *at).map_or(seen.start, |row| row.next_offset)
    };
    let waiting: Vec<(TopicPartition, i64)> = seen
        .iter()
        .map(|(at, seen)| (*at, next(at, seen), seen))
        .filter(|(_, next, seen)| (seen.start..seen.end).contains(next))
        .map(|(at, next, _)| (at, next))
        .collect();
    let read =
        waiting.into_iter().map(|(at, next)| async move { (at, log.read(at, next, 1).await) });
    let mut read = futures::stream::iter(read).buffer_unordered(AT_ONCE);
    while let Some((at, records)) = read.next().await {
        let Some(seen) = seen.get_mut(&at) else { continue };
        match records {
            Ok(records) => {
                seen.oldest_unread = records.first().map(|record| record.timestamp);
                seen.nothing_to_read = records.is_empty();
            }
            // retention removed it, the topic is new, or the consumer already reports an unreadable
            // record
            Err(
                LogError::OutOfRange { .. }
                | LogError::Missing { .. }
                | LogError::Unreadable { .. },
            ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn position(positions: &[PositionRow], at: TopicPartition) -> Option<&PositionRow> {
    positions.iter().find(|row| row.topic == at.topic.name() && row.partition == at.partition)
}

/// Partitions of the log first, then those that only the ledger has.
pub(super) fn partitions(
    positions: &[PositionRow],
    seen: &HashMap<TopicPartition, LogPartition>,
    now: DateTime<Utc>,
) -> Vec<Partition> {
    let mut known: Vec<TopicPartition> = seen.keys().copied().collect();
    known.sort_unstable();
    let mut partitions: Vec<Partition> =
        known.iter().map(|at| of_log(*at, &seen[at], position(positions, *at), now)).collect();
    let only_ledger = |row: &&PositionRow| {
        !known.iter().any(|at| row.topic == at.topic.name() && row.partition == at.partition)
    };
    partitions.extend(positions.iter().filter(only_ledger).map(|row| Partition {
        topic: row.topic.clone(),
        partition: row.partition,
        position: Some(row.next_offset),
        records: Some(row.records),
        moved_at: Some(row.moved_at),
        ..Partition::default()
    }));
    partitions
}

fn of_log(
    at: TopicPartition,
    seen: &LogPartition,
    row: Option<&PositionRow>,
    now: DateTime<Utc>,
) -> Partition {
    let position = row.map(|row| row.next_offset);
    let lag = Some(lag(position, seen));
    let age = match (lag, seen.oldest_unread) {
        (Some(0), _) => Some(TimeDelta::zero()),
        (_, Some(taken)) => Some((now - taken).max(TimeDelta::zero())),
        _ => None,
    };
    let unread = seen.oldest_unread.filter(|_| lag != Some(0));
    let keeps = seen.keeps.and_then(|keeps| TimeDelta::from_std(keeps).ok());
    Partition {
        topic: at.topic.name().to_owned(),
        partition: at.partition,
        position,
        log_start: Some(seen.start),
        log_end: Some(seen.end),
        lag,
        in_open_transaction: lag.map(|lag| lag.min(seen.end - seen.readable_end).max(0)),
        oldest_unread_at: unread,
        lag_seconds: age.map(|age| age.num_seconds()),
        loss_in_seconds: unread
            .and(age)
            .zip(keeps)
            .map(|(age, keeps)| (keeps - age).num_seconds().max(0)),
        records: row.map(|row| row.records),
        moved_at: row.map(|row| row.moved_at),
    }
}

/// Offsets from the position to the end of the log.
fn lag(position: Option<i64>, seen: &LogPartition) -> i64 {
    match position {
        // control records and aborted records are not data
        _ if seen.nothing_to_read => {
            seen.end - seen.readable_end.max(position.unwrap_or(seen.start))
        }
        // also if the log has removed some of them
        Some(next) if next <= seen.end => seen.end - next,
        // never assigned, or of a recreated topic: everything in the log is unread
        Some(_) | None => seen.end - seen.start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 24 * 3600;

    fn now() -> DateTime<Utc> {
        "2026-11-24T12:00:00Z".parse().expect("a time")
    }

    fn row(partition: i32, next_offset: i64) -> PositionRow {
        PositionRow {
            topic: Topic::AgentUsage.name().into(),
            partition,
            next_offset,
            epoch: 1,
            records: 7,
            moved_at: now(),
        }
    }

    fn at(partition: i32) -> TopicPartition {
        TopicPartition { topic: Topic::AgentUsage, partition }
    }

    /// Offsets 5 to 20; the first unread record is this many seconds old.
    fn seen(unread_for: Option<i64>) -> LogPartition {
        let oldest_unread = unread_for.map(|seconds| now() - TimeDelta::seconds(seconds));
        LogPartition {
            start: 5,
            end: 20,
            readable_end: 20,
            nothing_to_read: false,
            oldest_unread,
            keeps: Some(Duration::from_secs(35 * DAY)),
        }
    }

    #[test]
    fn lag_is_a_number_wherever_the_log_answers() {
        let ends: HashMap<_, _> = (0..4).map(|partition| (at(partition), seen(None))).collect();
        // within the log, never assigned, removed from the log, beyond its end, and in a partition
        // missing in the log
        let listed = partitions(&[row(0, 18), row(2, 4), row(3, 21), row(9, 1)], &ends, now());
        let lags: Vec<_> = listed
            .iter()
            .map(|partition| (partition.partition, partition.position, partition.lag))
            .collect();
        assert_eq!(
            lags,
            [
                (0, Some(18), Some(2)),
                (1, None, Some(15)),
                (2, Some(4), Some(16)),
                (3, Some(21), Some(15)),
                (9, Some(1), None)
            ]
        );
    }

    #[test]
    fn control_records_are_not_lag_but_an_open_transaction_is() {
        let lag = |next, readable_end, nothing_to_read| {
            let listed = partitions(
                &[row(0, next)],
                &HashMap::from([(
                    at(0),
                    LogPartition { readable_end, nothing_to_read, ..seen(None) },
                )]),
                now(),
            );
            (listed[0].lag, listed[0].in_open_transaction)
        };
        assert_eq!(lag(17, 20, true), (Some(0), Some(0)), "only control records");
        assert_eq!(
            lag(17, 18, true),
            (Some(2), Some(2)),
            "a control record, then an open transaction"
        );
        assert_eq!(lag(17, 18, false), (Some(3), Some(2)), "a record, then an open transaction");
        assert_eq!(lag(20, 20, false), (Some(0), Some(0)));
    }

    #[test]
    fn the_oldest_unread_record_gives_lag_and_time_until_loss() {
        let lag_and_loss = |next, seen: LogPartition| {
            let listed = partitions(&[row(0, next)], &HashMap::from([(at(0), seen)]), now());
            (listed[0].lag_seconds, listed[0].loss_in_seconds)
        };
        let day = i64::try_from(DAY).expect("small");
        assert_eq!(lag_and_loss(18, seen(Some(90))), (Some(90), Some(35 * day - 90)));
        assert_eq!(
            lag_and_loss(18, seen(Some(40 * day))),
            (Some(40 * day), Some(0)),
            "it may be removed at any time"
        );
        assert_eq!(
            lag_and_loss(18, seen(Some(-3))),
            (Some(0), Some(35 * day)),
            "the log's clock is ahead"
        );
        assert_eq!(lag_and_loss(20, seen(None)), (Some(0), None), "no unread record");
        assert_eq!(lag_and_loss(18, seen(None)), (None, None), "unknown age");
        assert_eq!(
            lag_and_loss(18, LogPartition { keeps: None, ..seen(Some(90)) }),
            (Some(90), None),
            "the log keeps unread records"
        );
    }
}
