//! Errors of the log, as far as a caller distinguishes them.

use crate::event::{Topic, TopicPartition};

/// Reasons why a request to the log failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LogError {
    /// The brokers or the database did not answer in time. A retry may succeed.
    #[error("log unreachable: {0}")]
    Unreachable(String),
    /// The partition does not have the offset, and it is not the partition's end.
    #[error("{partition}: offset {offset} is not in the log; its offsets are {start} to {end}")]
    OutOfRange {
        partition: TopicPartition,
        /// The requested offset.
        offset: i64,
        /// The first offset that remains.
        start: i64,
        /// The offset after the last record.
        end: i64,
    },
    /// The log assigned this offset to a record and no longer has it, although it has earlier or
    /// later records.
    #[error(
        "{partition}: the record at offset {offset} is missing from the log: it was deleted by hand"
    )]
    Missing {
        partition: TopicPartition,
        /// The requested offset.
        offset: i64,
    },
    /// A batch is damaged, or it cannot be unpacked and its end is unknown.
    #[error(
        "{partition}: the batch at offset {offset} cannot be read: it is damaged or cannot be unpacked. Remove it with Kafka's kafka-delete-records.sh, then run \
         `tallyline recover plan --lost log`"
    )]
    Unreadable {
        partition: TopicPartition,
        /// The requested offset.
        offset: i64,
    },
    /// The topic, or this partition of it, does not exist.
    #[error("topic {0}, or its requested partition, does not exist in the log")]
    NoTopic(Topic),
    /// Brokers refuse records for their size: their limit is below Kafka's default, or the record
    /// is larger than Tallyline's.
    #[error(
        "records of {topic} are too large for the brokers (the largest of this append has {bytes} bytes): set max.message.bytes of the \
         topic to at least 1048588, Kafka's default; for a larger record also set message.max.bytes in kafka.properties"
    )]
    TooLarge {
        /// The topic's name in Kafka.
        topic: String,
        /// The size of the largest record.
        bytes: usize,
    },
    /// A setting is unknown or invalid.
    #[error("log settings: {0}")]
    Settings(String),
    /// The log answered with a refusal (such as missing authorization). A retry alone
    /// does not help.
    #[error("log request refused: {0}")]
    Refused(String),
    /// The consumer has left its group, as requested.
    #[error("the consumer has stopped")]
    Stopped,
}

/// An append after which some messages are not known to be in the log.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{} of {} messages appended: {cause}", .placed.iter().flatten().count(), .placed.len())]
pub struct AppendError {
    /// The place of each acknowledged message, in the given order. The log may or may not have the
    /// others.
    pub placed: Vec<Option<(i32, i64)>>,
    /// The first failure.
    #[source]
    pub cause: LogError,
}
