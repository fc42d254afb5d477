//! What can go wrong with the log, as far as a caller acts on it.

use crate::event::{Topic, TopicPartition};

/// Why the log did not do what it was asked for.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LogError {
    /// No answer from the brokers or the database, or none in time. Worth trying again.
    #[error("the log can't be reached: {0}")]
    Unreachable(String),
    /// The offset is not one that the partition holds, nor its end.
    #[error("{partition}: offset {offset} is not in the log, which holds {start} to {end}")]
    OutOfRange {
        partition: TopicPartition,
        /// The offset that was asked for.
        offset: i64,
        /// The first offset that is still there.
        start: i64,
        /// One past the last.
        end: i64,
    },
    /// The log gave this offset to a record and does not hold it any more, though it holds earlier or later ones.
    #[error("{partition}: the record at offset {offset} is missing from the log: it was deleted by hand")]
    Missing {
        partition: TopicPartition,
        /// The offset that was to be read.
        offset: i64,
    },
    /// A batch is damaged, or cannot be unpacked and its end is not known.
    #[error(
        "{partition}: the batch at offset {offset} cannot be read: it is damaged or cannot be unpacked. Remove it with Kafka's kafka-delete-records.sh, then run \
         `tallyline recover plan --lost kafka`"
    )]
    Unreadable {
        partition: TopicPartition,
        /// The offset that was to be read.
        offset: i64,
    },
    /// The topic, or this partition of it, does not exist.
    #[error("topic {0} (or the partition of it that was asked for) does not exist in the log")]
    NoTopic(Topic),
    /// Brokers refuse records by their size: a smaller limit than Kafka's default, or a record that is larger than ours.
    #[error(
        "the brokers refuse records of {topic} by their size (the largest of this append has {bytes} bytes): set max.message.bytes of the \
         topic to at least 1048588, Kafka's default; for a larger record set message.max.bytes in kafka.properties, too"
    )]
    TooLarge {
        /// The topic's name in Kafka.
        topic: String,
        /// The size of the largest record.
        bytes: usize,
    },
    /// A setting is unknown or wrong.
    #[error("log settings: {0}")]
    Settings(String),
    /// The log answered, and its answer is no (authorization, a message that is too large): trying again does not help by itself.
    #[error("the log refuses: {0}")]
    Refused(String),
    /// The consumer has left its group, as it was told to.
    #[error("the consumer has stopped")]
    Stopped,
}

/// Not every message is known to be in the log.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{} of {} messages appended: {cause}", .placed.iter().flatten().count(), .placed.len())]
pub struct AppendError {
    /// In the order given: where each acknowledged message is. The others may be in the log or not.
    pub placed: Vec<Option<(i32, i64)>>,
    /// The first failure.
    #[source]
    pub cause: LogError,
}
