//! Appending to the log in PostgreSQL: one transaction for a call, offsets under the partition's row lock.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::postgres::{PostgresLog, refused};
use super::{AppendError, LogError};
use crate::event::{Message, Topic};

/// How many bytes are sent to the database at a time.
const CHUNK_BYTES: usize = 256 * 1024;
/// PostgreSQL's type number of `bytea`.
const BYTEA: i32 = 17;
/// Microseconds from 1970 to 2000, where PostgreSQL's timestamps begin.
const EPOCH_2000_MICROS: i64 = 946_684_800_000_000;

impl PostgresLog {
    pub(super) async fn append(&self, topic: Topic, messages: Vec<Message>) -> Result<Vec<(i32, i64)>, AppendError> {
        let appended = self.in_time(async {
            let mut tx = self.pool.begin().await.map_err(refused)?;
            let placed = self.append_in(&mut tx, topic, &messages).await?;
            tx.commit().await.map_err(refused)?;
            Ok(placed)
        });
        appended.await.map_err(|cause| AppendError { placed: vec![None; messages.len()], cause })
    }

    /// Appends within the caller's transaction. Its partitions' rows stay locked until that ends, so that others append after it or, where
    /// it is rolled back, in its place.
    ///
    /// # Errors
    /// As [`super::Log::append`]; the transaction can only be rolled back then.
    pub async fn append_in(&self, connection: &mut PgConnection, topic: Topic, messages: &[Message]) -> Result<Vec<(i32, i64)>, LogError> {
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let partitions: Vec<(i32, i32)> = sqlx::query_as("select id, partition from log_partition where topic = $1 order by partition")
            .bind(topic.name())
            .fetch_all(&mut *connection)
            .await
            .map_err(refused)?;
        if partitions.is_empty() {
            return Err(LogError::NoTopic(topic));
        }
        let chosen: Vec<(i32, i32)> = messages.iter().map(|message| partitions[choice(message, partitions.len())]).collect();
        let mut counts = BTreeMap::new();
        for (id, _) in &chosen {
            *counts.entry(*id).or_insert(0_i64) += 1;
        }
        let mut ranges = take_offsets(connection, &counts).await?;
        let mut rows = Rows::new();
        let mut copy = connection
            .copy_in_raw(
                "copy log_record (partition_id, record_offset, appended_at, key, header_names, header_values, payload)
                 from stdin with (format binary)",
            )
            .await
            .map_err(refused)?;
        let mut placed = Vec::with_capacity(messages.len());
        for (message, (id, partition)) in messages.iter().zip(chosen) {
            let Some((next, at)) = ranges.get_mut(&id) else { return Err(LogError::NoTopic(topic)) };
            rows.add(id, *next, *at, message);
            placed.push((partition, *next));
            *next += 1;
            if rows.bytes.len() >= CHUNK_BYTES {
                copy.send(&rows.bytes[..]).await.map_err(refused)?;
                rows.bytes.clear();
            }
        }
        rows.end();
        copy.send(&rows.bytes[..]).await.map_err(refused)?;
        copy.finish().await.map_err(refused)?;
        Ok(placed)
    }
}

/// Locks the partitions, the lowest first, so that two appends never wait for each other, and takes their next offsets. Answers each one's
/// first offset and the time of its records.
async fn take_offsets(connection: &mut PgConnection, counts: &BTreeMap<i32, i64>) -> Result<BTreeMap<i32, (i64, DateTime<Utc>)>, LogError> {
    let (ids, records): (Vec<i32>, Vec<i64>) = counts.iter().unzip();
    sqlx::query("select from log_partition where id = any($1) order by id for no key update")
        .bind(&ids)
        .execute(&mut *connection)
        .await
        .map_err(refused)?;
    let taken: Vec<(i32, i64, DateTime<Utc>)> = sqlx::query_as(
        "update log_partition set next_offset = next_offset + taken.records,
             last_appended_at = greatest(last_appended_at, date_trunc('milliseconds', clock_timestamp()))
         from unnest($1::int[], $2::bigint[]) as taken (id, records) where log_partition.id = taken.id
         returning log_partition.id, next_offset - taken.records, last_appended_at",
    )
    .bind(&ids)
    .bind(&records)
    .fetch_all(&mut *connection)
    .await
    .map_err(refused)?;
    Ok(taken.into_iter().map(|(id, first, at)| (id, (first, at))).collect())
}

/// Which of the topic's partitions, by FNV-1a of the key: the same for ever, while the number of partitions stays.
fn choice(message: &Message, partitions: usize) -> usize {
    let hash =
        message.key.iter().flatten().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    // Folded: the lowest bits of this hash alone are weak.
    usize::try_from((hash ^ (hash >> 32)) % u64::try_from(partitions).unwrap_or(u64::MAX)).unwrap_or(0)
}

/// Rows in PostgreSQL's binary copy format (its manual, "COPY", file formats).
struct Rows {
    bytes: Vec<u8>,
}

impl Rows {
    fn new() -> Rows {
        let mut bytes = b"PGCOPY\n\xff\r\n\0".to_vec();
        bytes.extend([0; 8]);
        Rows { bytes }
    }

    fn add(&mut self, partition_id: i32, offset: i64, at: DateTime<Utc>, message: &Message) {
        self.bytes.extend(7_i16.to_be_bytes());
        self.field(Some(&partition_id.to_be_bytes()));
        self.field(Some(&offset.to_be_bytes()));
        self.field(Some(&(at.timestamp_micros() - EPOCH_2000_MICROS).to_be_bytes()));
        self.field(message.key.as_deref());
        self.array(message.headers.iter().map(|(name, _)| Some(name.as_bytes())));
        self.array(message.headers.iter().map(|(_, value)| value.as_deref()));
        self.field(message.payload.as_deref());
    }

    fn end(&mut self) {
        self.bytes.extend((-1_i16).to_be_bytes());
    }

    /// Messages are far smaller than what a length can say.
    fn length(&mut self, length: usize) {
        self.bytes.extend(i32::try_from(length).unwrap_or(i32::MAX).to_be_bytes());
    }

    fn field(&mut self, value: Option<&[u8]>) {
        match value {
            Some(value) => {
                self.length(value.len());
                self.bytes.extend(value);
            }
            None => self.bytes.extend((-1_i32).to_be_bytes()),
        }
    }

    fn array<'a>(&mut self, values: impl ExactSizeIterator<Item = Option<&'a [u8]>>) {
        let (count, begin) = (values.len(), self.bytes.len());
        self.length(0);
        // Dimensions, whether it holds nulls (only a hint), the type; then the dimension's length and lowest index.
        self.length(usize::from(count > 0));
        self.length(1);
        self.bytes.extend(BYTEA.to_be_bytes());
        if count > 0 {
            self.length(count);
            self.length(1);
        }
        for value in values {
            self.field(value);
        }
        let length = self.bytes.len() - begin - 4;
        self.bytes[begin..begin + 4].copy_from_slice(&i32::try_from(length).unwrap_or(i32::MAX).to_be_bytes());
    }
}
