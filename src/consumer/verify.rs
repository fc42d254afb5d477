//! Checks whether a position refers to the current log.

use crate::event::TopicPartition;
use crate::ledger::{LastRecord, PartitionLease, fingerprint};
use crate::log::{Log, LogError};

/// A position that contradicts the log. The partition is not read, because events would be lost or
/// mixed up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PositionFault {
    /// Retention has removed records from the position on.
    #[error(
        "{partition}: the ledger is at offset {position}, but the log begins at {start}: records between are lost"
    )]
    BeforeStart {
        partition: TopicPartition,
        /// The ledger's next offset.
        position: i64,
        /// The log's first offset.
        start: i64,
    },
    /// The log ends before the position.
    #[error(
        "{partition}: the ledger is at offset {position}, but the log ends at {end}: the topic was recreated or truncated"
    )]
    BeyondEnd {
        partition: TopicPartition,
        /// The ledger's next offset.
        position: i64,
        /// The log's end.
        end: i64,
    },
    /// Another record is at the offset of the last record read.
    #[error(
        "{partition}: the record at offset {offset} is not the one that was recorded: the topic was recreated"
    )]
    AnotherRecord {
        partition: TopicPartition,
        /// The offset of the last record read.
        offset: i64,
    },
}

/// Describes a fault of the log during reading, as a fault of the position where it is one.
pub(super) fn explain(error: LogError) -> String {
    let fault = match error {
        LogError::OutOfRange { partition, offset, start, .. } if offset < start => {
            PositionFault::BeforeStart { partition, position: offset, start }
        }
        LogError::OutOfRange { partition, offset, end, .. } => {
            PositionFault::BeyondEnd { partition, position: offset, end }
        }
        error => return error.to_string(),
    };
    fault.to_string()
}

/// Reasons why a partition cannot be read.
#[derive(Debug)]
pub enum Problem {
    /// The fault remains until an operator recovers the partition.
    Fault(PositionFault),
    /// The log did not answer.
    Log(LogError),
}

/// Compares a lease's position with the log's ends, and its last record with the one at that offset
/// now.
pub async fn position(log: &Log, lease: &PartitionLease) -> Result<(), Problem> {
    let (partition, position) = (lease.partition, lease.next_offset);
    let (start, end) = log.watermarks(partition).await.map_err(Problem::Log)?;
    if position < start {
        return Err(Problem::Fault(PositionFault::BeforeStart { partition, position, start }));
    }
    if position > end {
        return Err(Problem::Fault(PositionFault::BeyondEnd { partition, position, end }));
    }
    match lease.last {
        Some(last)
            if last.offset >= start
                && !is_there(log, partition, last).await.map_err(Problem::Log)? =>
        {
            Err(Problem::Fault(PositionFault::AnotherRecord { partition, offset: last.offset }))
        }
        _ => Ok(()),
    }
}

async fn is_there(
    log: &Log,
    partition: TopicPartition,
    last: LastRecord,
) -> Result<bool, LogError> {
    let found = log.read(partition, last.offset, 1).await?;
    Ok(found.first().is_some_and(|record| {
        record.offset == last.offset && fingerprint(&record.message) == last.fingerprint
    }))
}
