//! The log in tables of PostgreSQL.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{Connection as _, PgConnection, PgPool, Row as _};

use crate::cause::{self, Remedy};
use crate::event::{Message, Signatures, Topic, TopicPartition};
use crate::log::{LogError, RETENTION_DAYS, Record};
use crate::pool;

/// Settings of the log in PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresLogSettings {
    /// How long a member without a renewal keeps its partitions.
    pub lease: Duration,
    /// How often a consumer that has read everything checks for new records.
    pub poll: Duration,
    /// Deadline of a statement, and of a whole append.
    pub deadline: Duration,
    /// Maximum number of records in a batch.
    pub batch_records: usize,
    pub signatures: Signatures,
}

impl Default for PostgresLogSettings {
    /// A lease of 6 s, a check every 200 ms, 30 s for a statement, batches of 5,000 records.
    fn default() -> PostgresLogSettings {
        PostgresLogSettings {
            lease: Duration::from_secs(6),
            poll: Duration::from_millis(200),
            deadline: Duration::from_secs(30),
            batch_records: 5000,
            signatures: Signatures::default(),
        }
    }
}

/// A handle on the log, shared by clones.
#[derive(Clone, Debug)]
pub struct PostgresLog {
    pub(super) pool: PgPool,
    pub(in crate::log) settings: PostgresLogSettings,
}

#[derive(Clone, Copy, Debug, sqlx::FromRow)]
pub(super) struct Partition {
    pub id: i32,
    pub start_offset: i64,
    pub next_offset: i64,
}

impl PostgresLog {
    pub(in crate::log) fn new(pool: PgPool, settings: PostgresLogSettings) -> PostgresLog {
        PostgresLog { pool, settings }
    }

    /// Runs `call` on a connection of its own, within the deadline: see [`pool::run`].
    pub(super) async fn run<T>(
        &self,
        call: impl AsyncFnOnce(&mut PgConnection) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        pool::run(&self.pool, self.settings.deadline, call).await
    }

    pub(in crate::log) async fn create_topics(
        &self,
        partitions: i32,
    ) -> Result<Vec<String>, LogError> {
        self.run(async |conn| {
            let mut drift = Vec::new();
            for topic in Topic::ALL {
                drift.extend(create_topic(conn, topic, partitions).await?);
            }
            Ok(drift)
        })
        .await
    }

    pub(in crate::log) async fn partitions(&self, topic: Topic) -> Result<Vec<i32>, LogError> {
        self.run(async |conn| {
            let partitions: Vec<i32> = sqlx::query_scalar(
                "select partition from log_partition where topic = $1 order by partition",
            )
            .bind(topic.name())
            .fetch_all(&mut *conn)
            .await?;
            if partitions.is_empty() { Err(LogError::NoTopic(topic)) } else { Ok(partitions) }
        })
        .await
    }

    pub(in crate::log) async fn watermarks(
        &self,
        partition: TopicPartition,
    ) -> Result<(i64, i64), LogError> {
        self.run(async |conn| {
            self::partition(conn, partition)
                .await
                .map(|found| (found.start_offset, found.next_offset))
        })
        .await
    }

    pub(in crate::log) async fn whole_from(
        &self,
        partition: TopicPartition,
    ) -> Result<i64, LogError> {
        self.run(async |conn| {
            let Partition { id, next_offset: end, .. } = self::partition(conn, partition).await?;
            let last_run: Option<(i64, i64)> = sqlx::query_as(
                "select max(record_offset) filter (where before is null or before < record_offset - 1), max(record_offset)
                 from (select record_offset, lag(record_offset) over (order by record_offset) as before
                       from log_record where partition_id = $1 and record_offset < $2) as records having count(*) > 0",
            )
            .bind(id)
            .bind(end)
            .fetch_optional(&mut *conn)
            .await?;
            Ok(last_run.filter(|(_, last)| last + 1 == end).map_or(end, |(first, _)| first))
        })
        .await
    }

    /// Searches by halving the range, because times never decrease within a partition.
    pub(in crate::log) async fn offset_at(
        &self,
        partition: TopicPartition,
        time: DateTime<Utc>,
    ) -> Result<i64, LogError> {
        self.run(async |conn| {
            let Partition { id, start_offset: mut low, next_offset: mut high } = self::partition(conn, partition).await?;
            while low < high {
                let middle = low + (high - low) / 2;
                let at: Option<DateTime<Utc>> =
                    sqlx::query_scalar("select appended_at from log_record where partition_id = $1 and record_offset = $2")
                        .bind(id)
                        .bind(middle)
                        .fetch_optional(&mut *conn)
                        .await?;
                // A record that retention has just removed is before the offset.
                if at.is_some_and(|at| at >= time) { high = middle } else { low = middle + 1 }
            }
            Ok(low)
        })
        .await
    }

    pub(in crate::log) async fn read(
        &self,
        partition: TopicPartition,
        from: i64,
        limit: usize,
    ) -> Result<Vec<Record>, LogError> {
        self.run(async |conn| {
            let Partition { id, start_offset: start, next_offset: end } =
                self::partition(conn, partition).await?;
            if !(start..=end).contains(&from) {
                return Err(LogError::OutOfRange { partition, offset: from, start, end });
            }
            records(conn, id, from, end, limit).await
        })
        .await
    }
}

async fn create_topic(
    conn: &mut PgConnection,
    topic: Topic,
    partitions: i32,
) -> Result<Vec<String>, LogError> {
    let name = topic.name();
    let wanted_days = i32::try_from(RETENTION_DAYS).unwrap_or(i32::MAX);
    let mut tx = conn.begin().await?;
    let created = sqlx::query(
        "insert into log_topic (name, retention_days) values ($1, $2) on conflict do nothing",
    )
    .bind(name)
    .bind(wanted_days)
    .execute(&mut *tx)
    .await?
    .rows_affected();
    if created == 1 {
        sqlx::query("insert into log_partition (topic, partition) select $1, number from generate_series(0, $2 - 1) as number")
            .bind(name)
            .bind(partitions)
            .execute(&mut *tx)
            .await?;
    }
    let (days, count): (i32, i64) =
        sqlx::query_as("select retention_days, (select count(*) from log_partition where topic = name) from log_topic where name = $1")
            .bind(name)
            .fetch_one(&mut *tx)
            .await?;
    tx.commit().await?;
    let mut drift = Vec::new();
    if count != i64::from(partitions) {
        drift.push(format!("{name}: {count} partitions, expected {partitions}"));
    }
    if days < wanted_days {
        drift.push(format!("{name}: retention is {days} days, expected at least {wanted_days}"));
    }
    Ok(drift)
}

pub(super) async fn partition(
    conn: &mut PgConnection,
    partition: TopicPartition,
) -> Result<Partition, LogError> {
    sqlx::query_as("select id, start_offset, next_offset from log_partition where topic = $1 and partition = $2")
        .bind(partition.topic.name())
        .bind(partition.partition)
        .fetch_optional(conn)
        .await?
        .ok_or(LogError::NoTopic(partition.topic))
}

/// Records from `from` on and before `end`.
pub(super) async fn records(
    conn: &mut PgConnection,
    id: i32,
    from: i64,
    end: i64,
    limit: usize,
) -> Result<Vec<Record>, LogError> {
    let records = sqlx::query_as(
        "select record_offset, appended_at, key, headers, payload from log_record
         where partition_id = $1 and record_offset >= $2 and record_offset < $3 order by record_offset limit $4",
    )
    .bind(id)
    .bind(from)
    .bind(end)
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(conn)
    .await?;
    Ok(records)
}

impl sqlx::FromRow<'_, PgRow> for Record {
    fn from_row(row: &PgRow) -> Result<Record, sqlx::Error> {
        let headers = Message::headers_from_json(row.try_get("headers")?)
            .map_err(|error| sqlx::Error::Decode(error.into()))?;
        Ok(Record {
            offset: row.try_get("record_offset")?,
            timestamp: row.try_get("appended_at")?,
            message: Message::from_log(row.try_get("key")?, headers, row.try_get("payload")?),
        })
    }
}

/// Maps the database's error to one that a caller can act on.
impl From<sqlx::Error> for LogError {
    fn from(error: sqlx::Error) -> LogError {
        let text = cause::text(&error);
        if Remedy::of(&error).is_retry() {
            LogError::Unreachable(text)
        } else {
            LogError::Refused(text)
        }
    }
}
