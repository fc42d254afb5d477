//! Records of the log, and their batches and marks.

use chrono::{DateTime, Utc};

use crate::event::{Message, TopicPartition};

/// Minimum retention of a topic's records, in days. Tallyman refuses usage after 30 days and
/// forgets ids after 34.
pub const RETENTION_DAYS: i64 = 35;

/// A message in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The position in the partition. Offsets only grow; in Kafka they may have gaps.
    pub offset: i64,
    /// When the log accepted it, by the log's clock, in whole milliseconds.
    pub timestamp: DateTime<Utc>,
    pub message: Message,
}

/// Records of one partition, in offset order. A delivered batch is never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub partition: TopicPartition,
    /// At most `batch_records` of the settings.
    pub records: Vec<Record>,
    /// The next offset to read.
    pub next_offset: i64,
}

/// A consumer group's mark of how far a partition was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub partition: TopicPartition,
    /// The next offset to read.
    pub next_offset: i64,
    /// The signature that [`super::Consumer::sign`] set.
    pub signature: String,
}
