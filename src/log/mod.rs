//! One log with two backends: Kafka and PostgreSQL.
//!
//! A producer appends messages to a topic; each lands in one partition, chosen by its key, under an offset that only grows. A consumer
//! joins a group, is given partitions, says where each begins and gets batches. The log remembers no position that anything relies on:
//! positions are the reader's business. Record times are the log's own (the broker's or the database's), in milliseconds, so that no
//! producer's clock decides what a seek by time finds or what retention removes.

mod consumer;
mod error;
mod kafka;
mod kafka_append;
mod kafka_consumer;
mod kafka_decode;
mod kafka_gather;
mod kafka_properties;
mod kafka_read;
mod kafka_topics;
mod kafka_unreadable;
mod postgres;
mod postgres_append;
mod postgres_consumer;
mod postgres_leases;
mod postgres_retention;

pub use consumer::{Consumer, Delivery};
pub use error::{AppendError, LogError};
pub use kafka::{KafkaLog, KafkaSettings};
pub use kafka_properties::property_faults;
pub use postgres::{PostgresLog, PostgresLogSettings};

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::event::{Message, SignatureError, Signatures, Signer, Topic, TopicPartition};

/// A topic's records are kept at least this long, in days: Tallyman refuses usage after 30 and forgets ids after 34.
pub const RETENTION_DAYS: i64 = 35;

/// A message as the log holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its place in the partition. Offsets only grow; Kafka's may have gaps.
    pub offset: i64,
    /// When the log took it, by the log's clock, in whole milliseconds.
    pub timestamp: DateTime<Utc>,
    /// What was appended.
    pub message: Message,
}

/// Records of one partition, in offset order. Never empty as the log delivers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Whose records.
    pub partition: TopicPartition,
    /// At most as many as the settings' `batch_records`.
    pub records: Vec<Record>,
    /// Where reading goes on after these.
    pub next_offset: i64,
}

/// How far a group was told that a partition was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub partition: TopicPartition,
    /// Where reading goes on.
    pub next_offset: i64,
    /// What [`Consumer::sign`] said.
    pub signature: String,
}

/// A handle to the log; a clone is the same log.
#[derive(Clone, Debug)]
pub enum Log {
    /// Kafka, for large sites.
    Kafka(KafkaLog),
    /// Tables of a PostgreSQL database, for small sites and the demo.
    Postgres(PostgresLog),
}

impl Log {
    /// A log on Kafka. Reaches for no broker yet.
    ///
    /// # Errors
    /// [`LogError::Settings`] when a property is unknown or its value is wrong.
    pub fn kafka(settings: KafkaSettings) -> Result<Log, LogError> {
        KafkaLog::new(settings).map(Log::Kafka)
    }

    /// A log in the tables of `migrations/0002_log.sql`.
    #[must_use]
    pub fn postgres(pool: PgPool, settings: PostgresLogSettings) -> Log {
        Log::Postgres(PostgresLog::new(pool, settings))
    }

    /// The topic of that name, which may be given with the prefix under which a Kafka log keeps it, or without.
    #[must_use]
    pub fn topic(&self, name: &str) -> Option<Topic> {
        let prefix = match self {
            Log::Kafka(log) => log.settings.topic_prefix.as_str(),
            Log::Postgres(_) => "",
        };
        name.parse::<Topic>().ok().or_else(|| name.strip_prefix(prefix)?.parse::<Topic>().ok())
    }

    /// Creates the topics that are missing, with so many partitions and [`RETENTION_DAYS`]. A topic that is there is never changed: where
    /// it differs from what is wanted, one line of the answer says how.
    pub async fn create_topics(&self, partitions: i32) -> Result<Vec<String>, LogError> {
        match self {
            Log::Kafka(log) => log.create_topics(partitions).await,
            Log::Postgres(log) => log.create_topics(partitions).await,
        }
    }

    /// Appends messages and waits until the log has acknowledged all of them. Answers partition and offset of each, in the order given.
    /// Messages of one key go to one partition and keep their order. On PostgreSQL the call is one transaction.
    ///
    /// # Errors
    /// Not all are known to be in: the error says which are. Appending all again is right, since readers know what they have by its id.
    pub async fn append(&self, topic: Topic, messages: Vec<Message>) -> Result<Vec<(i32, i64)>, AppendError> {
        match self {
            Log::Kafka(log) => log.append(topic, messages).await,
            Log::Postgres(log) => log.append(topic, messages).await,
        }
    }

    /// As [`Log::append`], each message signed where there is a signing key.
    pub async fn append_signed(&self, signer: Signer, topic: Topic, messages: Vec<Message>) -> Result<Vec<(i32, i64)>, AppendError> {
        let name = self.topic_name(topic);
        let signed = messages.into_iter().map(|message| self.signatures().signed(signer, &name, message));
        self.append(topic, signed.collect()).await
    }

    /// Who signed a record of that topic of this log.
    pub fn signer(&self, topic: Topic, message: &Message) -> Result<Signer, SignatureError> {
        self.signatures().signer(&self.topic_name(topic), message)
    }

    /// The name under which the log keeps the topic.
    fn topic_name(&self, topic: Topic) -> String {
        match self {
            Log::Kafka(log) => log.topic_name(topic),
            Log::Postgres(_) => topic.name().to_owned(),
        }
    }

    /// The keys with which this process signs and verifies records.
    #[must_use]
    pub fn signatures(&self) -> &Signatures {
        match self {
            Log::Kafka(log) => &log.settings.signatures,
            Log::Postgres(log) => &log.settings.signatures,
        }
    }

    /// The topic's partitions, ascending.
    ///
    /// # Errors
    /// [`LogError::NoTopic`] when it does not exist; else where the log can't be reached or refuses.
    pub async fn partitions(&self, topic: Topic) -> Result<Vec<i32>, LogError> {
        match self {
            Log::Kafka(log) => log.partitions(topic).await,
            Log::Postgres(log) => log.partitions(topic).await,
        }
    }

    /// The first offset that the partition still holds, and the one that its next record gets. In Kafka the offsets between may hold no record
    /// that can be read: control records, aborted ones, and those of transactions that are open.
    ///
    /// # Errors
    /// [`LogError::NoTopic`] when the partition does not exist; else where the log can't be reached or refuses.
    pub async fn watermarks(&self, partition: TopicPartition) -> Result<(i64, i64), LogError> {
        match self {
            Log::Kafka(log) => log.watermarks(partition).await,
            Log::Postgres(log) => log.watermarks(partition).await,
        }
    }

    /// The offset before which everything is decided: reading never goes beyond it. Before the end it lies only in Kafka, where the transaction of
    /// another producer is open.
    pub async fn readable_end(&self, partition: TopicPartition) -> Result<i64, LogError> {
        match self {
            Log::Kafka(log) => log.readable_end(partition).await,
            Log::Postgres(log) => log.watermarks(partition).await.map(|(_, end)| end),
        }
    }

    /// The first offset from which on the partition can be read to its end: where the log begins, or in tables that lost records, behind the last
    /// gap.
    pub async fn whole_from(&self, partition: TopicPartition) -> Result<i64, LogError> {
        match self {
            Log::Kafka(log) => log.watermarks(partition).await.map(|(start, _)| start),
            Log::Postgres(log) => log.whole_from(partition).await,
        }
    }

    /// The first offset whose record's time is at or after `time`; the partition's end when there is none.
    pub async fn offset_at(&self, partition: TopicPartition, time: DateTime<Utc>) -> Result<i64, LogError> {
        match self {
            Log::Kafka(log) => log.offset_at(partition, time).await,
            Log::Postgres(log) => log.offset_at(partition, time).await,
        }
    }

    /// At most `limit` records from offset `from` on, without a group. Reads no further than the readable end as it is when called, so
    /// fewer than `limit` (none at all, too) says that the end was reached. Reading on where the last call stopped is fast. A batch of Kafka that
    /// cannot be unpacked is one record at its last offset: [`Message::of_unreadable_batch`].
    ///
    /// # Errors
    /// [`LogError::OutOfRange`] when `from` lies outside the watermarks; [`LogError::Unreadable`] at a damaged batch; else as [`Log::watermarks`].
    pub async fn read(&self, partition: TopicPartition, from: i64, limit: usize) -> Result<Vec<Record>, LogError> {
        match self {
            Log::Kafka(log) => log.read(partition, from, limit).await,
            Log::Postgres(log) => log.read(partition, from, limit).await,
        }
    }

    /// How far the group was told that its partitions were read, with the signature that goes with each mark. None where nothing was told, and none
    /// of a log in PostgreSQL: it is restored together with what is to be proved.
    pub async fn marks(&self, group: &str) -> Result<Vec<Mark>, LogError> {
        match self {
            Log::Kafka(log) => log.marks(group).await,
            Log::Postgres(_) => Ok(Vec::new()),
        }
    }

    /// How long the topic keeps a record that nobody has read; none: until it is read. The broker removes whole segments, so that it may keep one
    /// longer; a limit of bytes (drift that `create_topics` reports) may remove one sooner.
    pub async fn keeps_unread(&self, topic: Topic) -> Result<Option<Duration>, LogError> {
        match self {
            Log::Kafka(log) => log.keeps_unread(topic).await,
            // what the ledger has not recorded is never removed
            Log::Postgres(log) => log.partitions(topic).await.map(|_| None),
        }
    }

    /// Joins a group that shares the partitions of all topics. When `stop` is cancelled, the consumer leaves the group and
    /// [`Consumer::next`] answers [`LogError::Stopped`].
    ///
    /// # Errors
    /// [`LogError::Settings`]. A log that can't be reached is waited for.
    pub fn join(&self, group: &str, stop: CancellationToken) -> Result<Consumer, LogError> {
        match self {
            Log::Kafka(log) => log.join(group, stop),
            Log::Postgres(log) => Ok(log.join(group, stop)),
        }
    }
}
