//! Appends to the log in PostgreSQL: one transaction per call, with offsets assigned under the
//! partition's row lock.

use std::collections::BTreeMap;

use sqlx::{Connection as _, PgConnection};

use super::tables::PostgresLog;
use crate::event::{Message, Topic};
use crate::log::{AppendError, LogError};

/// Maximum number of records in one statement. PostgreSQL accepts 1 GiB, and the largest records
/// have 1 MiB.
const AT_ONCE: usize = 500;

impl PostgresLog {
    pub(in crate::log) async fn append(
        &self,
        topic: Topic,
        messages: Vec<Message>,
    ) -> Result<Vec<(i32, i64)>, AppendError> {
        let appended = self.run(async |conn| {
            let mut tx = conn.begin().await?;
            let placed = self.append_in(&mut tx, topic, &messages).await?;
            tx.commit().await?;
            Ok(placed)
        });
        appended.await.map_err(|cause| AppendError { placed: vec![None; messages.len()], cause })
    }

    /// Appends within the caller's transaction. The rows of its partitions stay locked until the
    /// transaction ends. Other appends follow it, or get its offsets after a rollback.
    ///
    /// # Errors
    /// Those of [`crate::log::Log::append`]; then the transaction can only be rolled back.
    pub async fn append_in(
        &self,
        connection: &mut PgConnection,
        topic: Topic,
        messages: &[Message],
    ) -> Result<Vec<(i32, i64)>, LogError> {
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let partitions: Vec<(i32, i32)> = sqlx::query_as(
            "select id, partition from log_partition where topic = $1 order by partition",
        )
        .bind(topic.name())
        .fetch_all(&mut *connection)
        .await?;
        if partitions.is_empty() {
            return Err(LogError::NoTopic(topic));
        }
        let chosen: Vec<(i32, i32)> =
            messages.iter().map(|message| partitions[choice(message, partitions.len())]).collect();
        let mut counts = BTreeMap::new();
        for (id, _) in &chosen {
            *counts.entry(*id).or_insert(0_i64) += 1;
        }
        let mut next = take_offsets(connection, &counts).await?;
        let mut rows = Vec::with_capacity(messages.len());
        let mut placed = Vec::with_capacity(messages.len());
        for (message, (id, partition)) in messages.iter().zip(chosen) {
            let Some(next) = next.get_mut(&id) else { return Err(LogError::NoTopic(topic)) };
            rows.push((id, *next, message));
            placed.push((partition, *next));
            *next += 1;
        }
        for rows in rows.chunks(AT_ONCE) {
            insert(connection, rows).await?;
        }
        Ok(placed)
    }
}

/// Locks the partitions in ascending order, so that two appends never deadlock, and takes their
/// next offsets. Returns the first offset of each.
async fn take_offsets(
    connection: &mut PgConnection,
    counts: &BTreeMap<i32, i64>,
) -> Result<BTreeMap<i32, i64>, LogError> {
    let (ids, records): (Vec<i32>, Vec<i64>) = counts.iter().unzip();
    sqlx::query("select from log_partition where id = any($1) order by id for no key update")
        .bind(&ids)
        .execute(&mut *connection)
        .await?;
    let taken: Vec<(i32, i64)> = sqlx::query_as(
        "update log_partition set next_offset = next_offset + taken.records,
             last_appended_at = greatest(last_appended_at, date_trunc('milliseconds', clock_timestamp()))
         from unnest($1::int[], $2::bigint[]) as taken (id, records) where log_partition.id = taken.id
         returning log_partition.id, next_offset - taken.records",
    )
    .bind(&ids)
    .bind(&records)
    .fetch_all(&mut *connection)
    .await?;
    Ok(taken.into_iter().collect())
}

async fn insert(
    connection: &mut PgConnection,
    rows: &[(i32, i64, &Message)],
) -> Result<(), LogError> {
    sqlx::query(
        "insert into log_record (partition_id, record_offset, appended_at, key, headers, payload)
         select partition_id, record_offset, last_appended_at, key, headers, payload
         from unnest($1::integer[], $2::bigint[], $3::bytea[], $4::bytea[], $5::bytea[])
                 as record (partition_id, record_offset, key, headers, payload)
             join log_partition on id = partition_id",
    )
    .bind(rows.iter().map(|(id, ..)| *id).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, offset, _)| *offset).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., message)| message.key.as_deref()).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., message)| message.headers_json()).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., message)| message.payload.as_deref()).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Selects one of the topic's partitions by FNV-1a of the key. The result is stable while the
/// number of partitions is.
fn choice(message: &Message, partitions: usize) -> usize {
    let hash = message.key.iter().flatten().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // The hash is folded, because its lowest bits alone are weak.
    usize::try_from((hash ^ (hash >> 32)) % u64::try_from(partitions).unwrap_or(u64::MAX))
        .unwrap_or(0)
}
