//! Whether a position still speaks of the log that is there.

use crate::event::TopicPartition;
use crate::ledger::{Claim, LastRecord, fingerprint};
use crate::log::{Log, LogError};

/// A position that the log does not bear out. The partition is not read: reading on would lose or mix up events.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PositionFault {
    /// Retention has passed the position.
    #[error("{partition}: the ledger stands at offset {position}, but the log begins at {start}: records between are lost")]
    BeforeStart {
        partition: TopicPartition,
        /// The ledger's next offset.
        position: i64,
        /// The log's first offset.
        start: i64,
    },
    /// The log ends before the position.
    #[error("{partition}: the ledger stands at offset {position}, but the log ends at {end}: the topic was recreated or truncated")]
    BeyondEnd {
        partition: TopicPartition,
        /// The ledger's next offset.
        position: i64,
        /// The log's end.
        end: i64,
    },
    /// Another record stands where one was read before.
    #[error("{partition}: the record at offset {offset} is not the one that was recorded: the topic was recreated")]
    AnotherRecord {
        partition: TopicPartition,
        /// The offset of the last record read.
        offset: i64,
    },
}

/// A fault of the log while a partition is read, in the words of a position.
pub(super) fn explain(error: LogError) -> String {
    let fault = match error {
        LogError::OutOfRange { partition, offset, start, .. } if offset < start => {
            PositionFault::BeforeStart { partition, position: offset, start }
        }
        LogError::OutOfRange { partition, offset, end, .. } => PositionFault::BeyondEnd { partition, position: offset, end },
        error => return error.to_string(),
    };
    fault.to_string()
}

/// What keeps a partition from being read.
#[derive(Debug)]
pub enum Problem {
    /// For good, until an operator recovers it.
    Fault(PositionFault),
    /// The log could not be asked.
    Log(LogError),
}

/// Compares a claim's position with the log's ends and its last record with the one that stands there now.
pub async fn position(log: &Log, claim: &Claim) -> Result<(), Problem> {
    let (partition, position) = (claim.partition, claim.next_offset);
    let (start, end) = log.watermarks(partition).await.map_err(Problem::Log)?;
    if position < start {
        return Err(Problem::Fault(PositionFault::BeforeStart { partition, position, start }));
    }
    if position > end {
        return Err(Problem::Fault(PositionFault::BeyondEnd { partition, position, end }));
    }
    match claim.last {
        Some(last) if last.offset >= start && !is_there(log, partition, last).await.map_err(Problem::Log)? => {
            Err(Problem::Fault(PositionFault::AnotherRecord { partition, offset: last.offset }))
        }
        _ => Ok(()),
    }
}

async fn is_there(log: &Log, partition: TopicPartition, last: LastRecord) -> Result<bool, LogError> {
    let found = log.read(partition, last.offset, 1).await?;
    Ok(found.first().is_some_and(|record| record.offset == last.offset && fingerprint(&record.message) == last.fingerprint))
}
