//! The position of each partition, and the partition lease that may move it.

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection, Row};
use uuid::Uuid;

use super::RecordError;
use crate::event::{Message, TopicPartition};

/// A record that was read, to identify it later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRecord {
    pub offset: i64,
    pub fingerprint: [u8; 32],
}

/// SHA-256 of key and body, to identify a record later.
#[must_use]
pub fn fingerprint(message: &Message) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [&message.key, &message.payload] {
        let bytes = part.as_deref();
        hash.update([u8::from(bytes.is_some())]);
        hash.update((bytes.map_or(0, <[u8]>::len) as u64).to_be_bytes());
        hash.update(bytes.unwrap_or_default());
    }
    if let Some(whole) = message.oversized {
        hash.update((whole.bytes as u64).to_be_bytes());
        hash.update(whole.sha256);
    }
    hash.finalize().into()
}

/// A partition lease: the right to write one partition's batches until another consumer takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionLease {
    pub partition: TopicPartition,
    /// The partition's generation; `recover` raises it after a loss or recreation of the topic.
    pub generation: i32,
    /// Raised by each new lease.
    pub epoch: i64,
    pub next_offset: i64,
    /// The last record that was read before `next_offset`, if any.
    pub last: Option<LastRecord>,
    /// The first offset whose record needs a valid signature; none: no consumer of this ledger has
    /// had keys.
    pub signed_from: Option<i64>,
}

/// The chain that a batch belongs to.
#[derive(Clone, Debug)]
pub enum Chain {
    /// Live batches move the partition's position.
    Live(PartitionLease),
    /// Batches of a replay move only the replay's own position.
    Replay {
        id: Uuid,
        partition: TopicPartition,
        /// The partition's generation when the replay was planned.
        generation: i32,
        /// The replay's position before this batch.
        next_offset: i64,
    },
}

impl Chain {
    pub(super) fn partition(&self) -> TopicPartition {
        match self {
            Chain::Live(lease) => lease.partition,
            Chain::Replay { partition, .. } => *partition,
        }
    }

    pub(super) fn generation(&self) -> i32 {
        match self {
            Chain::Live(lease) => lease.generation,
            Chain::Replay { generation, .. } => *generation,
        }
    }

    pub(super) fn next_offset(&self) -> i64 {
        match self {
            Chain::Live(lease) => lease.next_offset,
            Chain::Replay { next_offset, .. } => *next_offset,
        }
    }
}

/// Takes the partition lease from its holder. Without a position, reading starts at `log_start`,
/// which is recorded.
pub async fn lease(
    conn: &mut PgConnection,
    partition: TopicPartition,
    log_start: i64,
    now: DateTime<Utc>,
) -> Result<PartitionLease, sqlx::Error> {
    let row = sqlx::query(
        "insert into position as p (topic, partition, generation, epoch, start_offset, next_offset, moved_at)
         values ($1, $2, current_generation($1, $2), 1, $3, $3, $4)
         on conflict (topic, partition) do update set epoch = p.epoch + 1
         returning topic, partition, generation, epoch, next_offset, last_offset, last_record,
             signed_from(topic, partition, generation) as signed_from",
    )
    .bind(partition.topic.name())
    .bind(partition.partition)
    .bind(log_start)
    .bind(now)
    .fetch_one(conn)
    .await?;
    partition_lease(&row)
}

/// The partition's current generation; the first one before it has a position.
pub async fn generation(
    conn: &mut PgConnection,
    partition: TopicPartition,
) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("select current_generation($1, $2)")
        .bind(partition.topic.name())
        .bind(partition.partition)
        .fetch_one(conn)
        .await
}

pub async fn list(conn: &mut PgConnection) -> Result<Vec<(TopicPartition, i64)>, sqlx::Error> {
    let rows =
        sqlx::query("select topic, partition, next_offset from position order by topic, partition")
            .fetch_all(conn)
            .await?;
    rows.iter()
        .map(|row| Ok((TopicPartition::from_row(row)?, row.try_get("next_offset")?)))
        .collect()
}

pub(super) fn partition_lease(row: &PgRow) -> Result<PartitionLease, sqlx::Error> {
    Ok(PartitionLease {
        partition: TopicPartition::from_row(row)?,
        generation: row.try_get("generation")?,
        epoch: row.try_get("epoch")?,
        next_offset: row.try_get("next_offset")?,
        last: last_record(row)?,
        signed_from: row.try_get("signed_from")?,
    })
}

/// Moves a leased partition's position by compare-and-set. It stops a consumer that has lost its
/// lease, or took it before the signature cutover was recorded.
pub(super) async fn advance(
    connection: &mut PgConnection,
    now: DateTime<Utc>,
    lease: &PartitionLease,
    next_offset: i64,
    last: Option<LastRecord>,
    records: i64,
) -> Result<(), RecordError> {
    let moved = sqlx::query(
        "update position set next_offset = $5, records = records + $6, moved_at = $7,
             last_offset = coalesce($8, last_offset), last_record = coalesce($9, last_record)
         where topic = $1 and partition = $2 and epoch = $3 and next_offset = $4 and generation = $10
             and exists (select from signature_cutover) = $11",
    )
    .bind(lease.partition.topic.name())
    .bind(lease.partition.partition)
    .bind(lease.epoch)
    .bind(lease.next_offset)
    .bind(next_offset)
    .bind(records)
    .bind(now)
    .bind(last.map(|last| last.offset))
    .bind(last.map(|last| last.fingerprint.to_vec()))
    .bind(lease.generation)
    .bind(lease.signed_from.is_some())
    .execute(connection)
    .await?;
    if moved.rows_affected() == 1 { Ok(()) } else { Err(RecordError::Fenced(lease.partition)) }
}

pub(super) fn last_record(row: &PgRow) -> Result<Option<LastRecord>, sqlx::Error> {
    let offset: Option<i64> = row.try_get("last_offset")?;
    let fingerprint: Option<Vec<u8>> = row.try_get("last_record")?;
    let fingerprint = fingerprint.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    Ok(offset.zip(fingerprint).map(|(offset, fingerprint)| LastRecord { offset, fingerprint }))
}
