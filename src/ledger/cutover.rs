//! From which offset on the records of each partition must bear a valid signature.
//!
//! It is recorded for all partitions at once, when a consumer first has keys. A partition, or a life of one, that comes later has no row: all of its
//! records must be signed.

use chrono::{DateTime, Utc};

use super::Ledger;
use crate::event::TopicPartition;

/// The first offset of the partition `p` whose record must be signed; null: no consumer has had keys.
macro_rules! signed_from {
    () => {
        "case when exists (select from signature_cutover) then coalesce((select first_offset from signature_cutover at
             where at.topic = p.topic and at.partition = p.partition and at.generation = p.generation), 0) end as signed_from"
    };
}
pub(super) use signed_from;

impl Ledger {
    /// Since when records must be signed; none: no consumer has had keys.
    ///
    /// # Errors
    /// The database's.
    pub async fn signed_since(&self) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
        sqlx::query_scalar("select min(recorded_at) from signature_cutover").fetch_one(&self.pool).await
    }

    /// The first offset of this life of the partition whose record must be signed; none: no consumer has had keys.
    ///
    /// # Errors
    /// The database's.
    pub async fn signed_from(&self, partition: TopicPartition, generation: i32) -> Result<Option<i64>, sqlx::Error> {
        sqlx::query_scalar(concat!(
            "select ",
            signed_from!(),
            " from (values ($1::text, $2::integer, $3::integer)) as p (topic, partition, generation)"
        ))
        .bind(partition.topic.name())
        .bind(partition.partition)
        .bind(generation)
        .fetch_one(&self.pool)
        .await
    }

    /// Records that from now on records must be signed: from where each partition of the log ends. A partition that this ledger has not read must be
    /// signed as a whole, and while a restored ledger catches up, each from its position: it may have lost an earlier cutover, and what is true comes
    /// again signed. Once it is recorded, it stays.
    ///
    /// # Errors
    /// The database's.
    pub async fn begin_signatures(&self, ends: &[(TopicPartition, i64)]) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        sqlx::query("select from ledger for update").execute(&mut *tx).await?;
        sqlx::query(
            "insert into signature_cutover (topic, partition, generation, first_offset, recorded_at)
             select log.topic, log.partition, coalesce(generation, 1),
                 case when exists (select from recovery where closed_at is null) then coalesce(next_offset, 0)
                     when next_offset is null then 0 else log_end end, $4
             from unnest($1::text[], $2::integer[], $3::bigint[]) as log (topic, partition, log_end)
             left join position using (topic, partition)
             where not exists (select from signature_cutover)",
        )
        .bind(ends.iter().map(|(at, _)| at.topic.name()).collect::<Vec<_>>())
        .bind(ends.iter().map(|(at, _)| at.partition).collect::<Vec<_>>())
        .bind(ends.iter().map(|(_, end)| *end).collect::<Vec<_>>())
        .bind(self.clock.now())
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }
}
