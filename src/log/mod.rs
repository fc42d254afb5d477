//! One log with two backends: Kafka and PostgreSQL.
//!
//! A producer appends messages to a topic. Each message gets an offset in one partition, which its
//! key selects. A consumer joins a group, gets partitions assigned, starts each at an offset, and
//! receives batches. The log stores no position that Tallyline relies on: readers keep their own.
//! Record times are the log's own (the broker's or the database's), in milliseconds. So a
//! producer's clock does not affect seeks by time or retention.

mod consumer;
mod error;
mod kafka;
mod postgres;
mod record;

pub use consumer::{Consumer, Delivery};
pub use error::{AppendError, LogError};
pub use kafka::{KafkaLog, KafkaSettings, property_faults};
pub use postgres::{PostgresLog, PostgresLogSettings};
pub use record::{Batch, Mark, RETENTION_DAYS, Record};

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::event::{Message, SignatureError, Signatures, Signer, Topic, TopicPartition};

/// A handle on the log, shared by clones.
#[derive(Clone, Debug)]
pub enum Log {
    /// Kafka, for large sites.
    Kafka(KafkaLog),
    /// Tables of a PostgreSQL database, for small sites and the demo.
    Postgres(PostgresLog),
}

impl Log {
    /// A log on Kafka. It does not connect to a broker yet.
    ///
    /// # Errors
    /// [`LogError::Settings`] if a property is unknown or its value is invalid.
    pub fn kafka(settings: KafkaSettings) -> Result<Log, LogError> {
        KafkaLog::new(settings).map(Log::Kafka)
    }

    /// A log in the tables of `migrations/0002_log.sql`.
    #[must_use]
    pub fn postgres(pool: PgPool, settings: PostgresLogSettings) -> Log {
        Log::Postgres(PostgresLog::new(pool, settings))
    }

    /// The topic of that name, given with or without the prefix of a Kafka log.
    #[must_use]
    pub fn topic(&self, name: &str) -> Option<Topic> {
        let prefix = match self {
            Log::Kafka(log) => log.settings.topic_prefix.as_str(),
            Log::Postgres(_) => "",
        };
        name.parse::<Topic>().ok().or_else(|| name.strip_prefix(prefix)?.parse::<Topic>().ok())
    }

    /// Creates missing topics with this number of partitions and [`RETENTION_DAYS`]. It never
    /// changes an existing topic; each returned line describes a difference from the required
    /// settings.
    pub async fn create_topics(&self, partitions: i32) -> Result<Vec<String>, LogError> {
        match self {
            Log::Kafka(log) => log.create_topics(partitions).await,
            Log::Postgres(log) => log.create_topics(partitions).await,
        }
    }

    /// Appends messages and waits until the log has acknowledged all of them. Returns partition and
    /// offset of each, in the given order. Messages of one key go to one partition and keep their
    /// order. On PostgreSQL the call is one transaction.
    ///
    /// # Errors
    /// The error has the places of the acknowledged messages. The caller may append all again,
    /// because readers recognise events by id.
    pub async fn append(
        &self,
        topic: Topic,
        messages: Vec<Message>,
    ) -> Result<Vec<(i32, i64)>, AppendError> {
        match self {
            Log::Kafka(log) => log.append(topic, messages).await,
            Log::Postgres(log) => log.append(topic, messages).await,
        }
    }

    /// Does the same as [`Log::append`] and signs each message if there is a signing key.
    pub async fn append_signed(
        &self,
        signer: Signer,
        topic: Topic,
        messages: Vec<Message>,
    ) -> Result<Vec<(i32, i64)>, AppendError> {
        let name = self.topic_name(topic);
        let signed =
            messages.into_iter().map(|message| self.signatures().signed(signer, &name, message));
        self.append(topic, signed.collect()).await
    }

    /// The signer of a record of that topic of this log.
    pub fn signer(&self, topic: Topic, message: &Message) -> Result<Signer, SignatureError> {
        self.signatures().signer(&self.topic_name(topic), message)
    }

    /// The topic's name in the log.
    fn topic_name(&self, topic: Topic) -> String {
        match self {
            Log::Kafka(log) => log.topic_name(topic),
            Log::Postgres(_) => topic.name().to_owned(),
        }
    }

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
    /// [`LogError::NoTopic`] if the topic does not exist; otherwise the log is unreachable or
    /// refuses.
    pub async fn partitions(&self, topic: Topic) -> Result<Vec<i32>, LogError> {
        match self {
            Log::Kafka(log) => log.partitions(topic).await,
            Log::Postgres(log) => log.partitions(topic).await,
        }
    }

    /// The partition's first remaining offset, and the offset of its next record. In Kafka some
    /// offsets in between may have no readable record: control records, aborted ones, and those of
    /// open transactions.
    ///
    /// # Errors
    /// [`LogError::NoTopic`] if the partition does not exist; otherwise the log is unreachable or
    /// refuses.
    pub async fn watermarks(&self, partition: TopicPartition) -> Result<(i64, i64), LogError> {
        match self {
            Log::Kafka(log) => log.watermarks(partition).await,
            Log::Postgres(log) => log.watermarks(partition).await,
        }
    }

    /// The offset up to which all transactions are decided, beyond which reading never goes. It is
    /// before the end only in Kafka, while another producer's transaction is open.
    pub async fn readable_end(&self, partition: TopicPartition) -> Result<i64, LogError> {
        match self {
            Log::Kafka(log) => log.readable_end(partition).await,
            Log::Postgres(log) => log.watermarks(partition).await.map(|(_, end)| end),
        }
    }

    /// The first offset from which the partition is readable to its end. It is the log's start or,
    /// in tables that lost records, the offset after the last gap.
    pub async fn whole_from(&self, partition: TopicPartition) -> Result<i64, LogError> {
        match self {
            Log::Kafka(log) => log.watermarks(partition).await.map(|(start, _)| start),
            Log::Postgres(log) => log.whole_from(partition).await,
        }
    }

    /// The first offset whose record's time is `time` or later; the partition's end if no record
    /// has such a time.
    pub async fn offset_at(
        &self,
        partition: TopicPartition,
        time: DateTime<Utc>,
    ) -> Result<i64, LogError> {
        match self {
            Log::Kafka(log) => log.offset_at(partition, time).await,
            Log::Postgres(log) => log.offset_at(partition, time).await,
        }
    }

    /// Reads at most `limit` records from offset `from` on, without a group. It stops at the
    /// readable end at the time of the call. Fewer records than `limit`, or none, mean that the end
    /// is reached. Continuing at the last call's end is fast. A Kafka batch that cannot be
    /// unpacked is one record at its last offset: [`Message::of_unreadable_batch`].
    ///
    /// # Errors
    /// [`LogError::OutOfRange`] outside the watermarks; [`LogError::Unreadable`] at a damaged
    /// batch; those of [`Log::watermarks`].
    pub async fn read(
        &self,
        partition: TopicPartition,
        from: i64,
        limit: usize,
    ) -> Result<Vec<Record>, LogError> {
        match self {
            Log::Kafka(log) => log.read(partition, from, limit).await,
            Log::Postgres(log) => log.read(partition, from, limit).await,
        }
    }

    /// The group's marks with their signatures. Empty without marks, and for a log in PostgreSQL. A
    /// restore includes such a log, so that its marks would prove nothing.
    pub async fn marks(&self, group: &str) -> Result<Vec<Mark>, LogError> {
        match self {
            Log::Kafka(log) => log.marks(group).await,
            Log::Postgres(_) => Ok(Vec::new()),
        }
    }

    /// How long the topic keeps an unread record; none: until it is read. The broker removes whole
    /// segments and may keep it longer. A limit by bytes, which `create_topics` reports as drift,
    /// may remove it earlier.
    pub async fn keeps_unread(&self, topic: Topic) -> Result<Option<Duration>, LogError> {
        match self {
            Log::Kafka(log) => log.keeps_unread(topic).await,
            // Records that the ledger has not recorded are never removed.
            Log::Postgres(log) => log.partitions(topic).await.map(|_| None),
        }
    }

    /// Joins a group that shares the partitions of all topics. When `stop` is cancelled, the
    /// consumer leaves the group and [`Consumer::next`] returns [`LogError::Stopped`].
    ///
    /// # Errors
    /// [`LogError::Settings`]. An unreachable log is not an error: the consumer retries.
    pub fn join(&self, group: &str, stop: CancellationToken) -> Result<Consumer, LogError> {
        match self {
            Log::Kafka(log) => log.join(group, stop),
            Log::Postgres(log) => Ok(log.join(group, stop)),
        }
    }
}
