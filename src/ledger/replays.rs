//! Planned replays and how far each is.

use sqlx::Row;
use uuid::Uuid;

use super::Ledger;
use crate::event::{Topic, TopicPartition};

/// One partition's range of a replay: `next_offset` moves from `first_offset` to `end_offset` (exclusive).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayRange {
    /// The partition.
    pub partition: TopicPartition,
    /// Its life when this was planned.
    pub generation: i32,
    /// The first offset of the range.
    pub first_offset: i64,
    /// The offset to read next.
    pub next_offset: i64,
    /// The offset behind the range.
    pub end_offset: i64,
}

impl Ledger {
    /// Keeps a plan under its hash, so that exactly it can be executed.
    ///
    /// # Errors
    /// The database's.
    pub async fn save_replay(&self, id: Uuid, plan_hash: &str, ranges: &[ReplayRange]) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        for range in ranges {
            sqlx::query(
                "insert into replay (id, plan_hash, topic, partition, generation, first_offset, next_offset, end_offset, planned_at)
                 values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            )
            .bind(id)
            .bind(plan_hash)
            .bind(range.partition.topic.name())
            .bind(range.partition.partition)
            .bind(range.generation)
            .bind(range.first_offset)
            .bind(range.next_offset)
            .bind(range.end_offset)
            .bind(self.clock.now())
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await
    }

    /// The replay planned under that hash, if any: its id, whether it was started, and its ranges.
    ///
    /// # Errors
    /// The database's.
    pub async fn load_replay(&self, plan_hash: &str) -> Result<Option<(Uuid, bool, Vec<ReplayRange>)>, sqlx::Error> {
        let rows = sqlx::query(
            "select id, started_at is not null, topic, partition, generation, first_offset, next_offset, end_offset
             from replay where plan_hash = $1 order by topic, partition",
        )
        .bind(plan_hash)
        .fetch_all(&self.pool)
        .await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let mut ranges = Vec::with_capacity(rows.len());
        for row in &rows {
            let topic = Topic::named(row.try_get(2)?).ok_or_else(|| sqlx::Error::Protocol("unknown topic".into()))?;
            let partition = TopicPartition { topic, partition: row.try_get(3)? };
            ranges.push(ReplayRange {
                partition,
                generation: row.try_get(4)?,
                first_offset: row.try_get(5)?,
                next_offset: row.try_get(6)?,
                end_offset: row.try_get(7)?,
            });
        }
        Ok(Some((first.try_get(0)?, first.try_get(1)?, ranges)))
    }

    /// From now on it is resumed, not compared with its plan again.
    ///
    /// # Errors
    /// The database's.
    pub async fn start_replay(&self, id: Uuid) -> Result<(), sqlx::Error> {
        sqlx::query("update replay set started_at = coalesce(started_at, $2) where id = $1")
            .bind(id)
            .bind(self.clock.now())
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
