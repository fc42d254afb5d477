//! A partition's next generation: its topic was lost or recreated, or no longer has the records to
//! read.

use std::ops::Range;

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;

use super::leases::{ALL_COLLECTORS, revoke_leases};
use super::passes::void_passes;
use super::positions::partition_lease;
use super::{NewAct, PartitionLease, acts, plans};
use crate::event::TopicPartition;

/// A partition that begins its next generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewGeneration {
    pub partition: TopicPartition,
    /// The generation that ends. It ends only while its position is `lost.start`.
    pub generation: i32,
    /// The offsets from the position up to the end of the loss.
    pub lost: Range<i64>,
    /// The number of rejects whose appended records are lost unread. They become open again.
    pub reopened: i64,
    /// The next generation's first offset; none: the log no longer has the partition, and the
    /// position ends.
    pub start: Option<i64>,
}

/// The ledger's incarnation and the number of ended generations. Each recovery of the log changes
/// this value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct PartitionGenerations {
    pub incarnation: uuid::Uuid,
    /// Generations that have ended, of all partitions.
    pub ended: i64,
}

impl PartitionGenerations {
    /// The signature of the consumer group's marks in the log.
    #[must_use]
    pub fn signature(&self) -> String {
        format!("{} {}", self.incarnation, self.ended)
    }

    /// The value of a signature; none: not a signature of Tallyline.
    #[must_use]
    pub fn of_signature(text: &str) -> Option<PartitionGenerations> {
        let (incarnation, ended) = text.split_once(' ')?;
        Some(PartitionGenerations {
            incarnation: incarnation.parse().ok()?,
            ended: ended.parse().ok()?,
        })
    }
}

/// Each partition's position as its last lease holder has it. No lease is taken.
pub async fn current(conn: &mut PgConnection) -> Result<Vec<PartitionLease>, sqlx::Error> {
    let query = "select topic, partition, generation, epoch, next_offset, last_offset, last_record,
             signed_from(topic, partition, generation) as signed_from from position order by topic, partition";
    let rows = sqlx::query(query).fetch_all(conn).await?;
    rows.iter().map(partition_lease).collect()
}

/// The value that a consumer compares to detect that it must restart.
pub async fn all(conn: &mut PgConnection) -> Result<PartitionGenerations, sqlx::Error> {
    sqlx::query_as("select incarnation, (select count(*) from past_position) as ended from ledger")
        .fetch_one(conn)
        .await
}

/// The highest log end that a collector's pass recorded for the partition and that is not reached.
pub async fn recorded_end(
    conn: &mut PgConnection,
    partition: TopicPartition,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "select max(next_offset) from collector_pass_offset where topic = $1 and partition = $2",
    )
    .bind(partition.topic.name())
    .bind(partition.partition)
    .fetch_one(conn)
    .await
}

/// Ends these partitions' generations and begins their next ones, executing the plan of that hash.
/// Rejects become open again if their appended records are lost unread. Passes with unreached
/// offsets in these partitions become void. Each collector must open again and rereads everything.
/// False: a position is not the planned one, or the plan was executed before; nothing is changed.
pub async fn begin(
    conn: &mut PgConnection,
    begun: &[NewGeneration],
    act: &NewAct<'_>,
    plan: &str,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let mut tx = conn.begin().await?;
    revoke_leases(&mut tx, ALL_COLLECTORS).await?;
    let topics: Vec<&str> = begun.iter().map(|one| one.partition.topic.name()).collect();
    let partitions: Vec<i32> = begun.iter().map(|one| one.partition.partition).collect();
    let lock = "select from position where (topic, partition) in (select * from unnest($1::text[], $2::integer[])) order by topic, partition for update";
    sqlx::query(lock).bind(&topics).bind(&partitions).execute(&mut *tx).await?;
    sqlx::query(void_passes!(
        "select source_id, pass_id from unreached_offset where (topic, partition) in (select * from unnest($1::text[], $2::integer[]))"
    ))
    .bind(&topics)
    .bind(&partitions)
    .execute(&mut *tx)
    .await?;
    // The remaining offsets belong to other passes, and the ending generation reached them.
    sqlx::query("delete from collector_pass_offset where (topic, partition) in (select * from unnest($1::text[], $2::integer[]))")
        .bind(&topics)
        .bind(&partitions)
        .execute(&mut *tx)
        .await?;
    let act_id = acts::insert(&mut tx, act, now).await?;
    for one in begun {
        if !begin_one(&mut tx, one, act_id, now).await? {
            return Ok(false);
        }
    }
    if !plans::mark_executed(&mut tx, plan, act_id, now).await? {
        return Ok(false);
    }
    tx.commit().await?;
    Ok(true)
}

async fn begin_one(
    tx: &mut PgConnection,
    begun: &NewGeneration,
    act_id: i64,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let ended = sqlx::query(
        "insert into past_position (topic, partition, generation, start_offset, next_offset, records, act_id)
         select topic, partition, generation, start_offset, next_offset, records, $5 from position
         where topic = $1 and partition = $2 and generation = $3 and next_offset = $4",
    )
    .bind(begun.partition.topic.name())
    .bind(begun.partition.partition)
    .bind(begun.generation)
    .bind(begun.lost.start)
    .bind(act_id)
    .execute(&mut *tx)
    .await?;
    if ended.rows_affected() == 0 || reopen_unread(tx, begun).await? != begun.reopened {
        return Ok(false);
    }
    match begun.start {
        // The epoch rises, so that a consumer that still reads the old generation is fenced.
        Some(start) => {
            sqlx::query(
                "update position set generation = generation + 1, epoch = epoch + 1, start_offset = $3, next_offset = $3,
                     last_offset = null, last_record = null, records = 0, moved_at = $4
                 where topic = $1 and partition = $2",
            )
            .bind(begun.partition.topic.name())
            .bind(begun.partition.partition)
            .bind(start)
            .bind(now)
            .execute(tx)
            .await?
        }
        None => {
            sqlx::query("delete from position where topic = $1 and partition = $2")
                .bind(begun.partition.topic.name())
                .bind(begun.partition.partition)
                .execute(tx)
                .await?
        }
    };
    Ok(true)
}

/// Opens the rejects again whose appended records are lost with the generation, and returns their
/// number.
async fn reopen_unread(tx: &mut PgConnection, begun: &NewGeneration) -> Result<i64, sqlx::Error> {
    let reopened = sqlx::query(
        "update reject set state = 'open', act_id = null, passed_topic = null, passed_partition = null, passed_generation = null,
             passed_offset = null
         where passed_topic = $1 and passed_partition = $2 and passed_generation = $3 and passed_offset >= $4
             and passed_offset < $5",
    )
    .bind(begun.partition.topic.name())
    .bind(begun.partition.partition)
    .bind(begun.generation)
    .bind(begun.lost.start)
    .bind(begun.lost.end)
    .execute(tx)
    .await?;
    Ok(i64::try_from(reopened.rows_affected()).unwrap_or(i64::MAX))
}
