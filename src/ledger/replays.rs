//! Planned replays and their progress.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::{Counts, NewAct, acts};
use crate::event::TopicPartition;

/// One partition's range of a replay. `next_offset` moves from `first_offset` to `end_offset`
/// (exclusive).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct ReplayRange {
    #[sqlx(flatten)]
    pub partition: TopicPartition,
    /// The partition's generation when the replay was planned.
    pub generation: i32,
    pub first_offset: i64,
    pub next_offset: i64,
    /// The offset after the range.
    pub end_offset: i64,
}

/// A planned replay.
#[derive(Clone, Debug)]
pub struct PlannedReplay {
    /// The id that its batches have.
    pub id: Uuid,
    /// Whether it has begun. From then on it resumes and is not compared with its plan again.
    pub started: bool,
    /// Whether it has ended.
    pub finished: bool,
    /// The progress of each partition, by topic and partition.
    pub ranges: Vec<ReplayRange>,
}

/// Keeps a plan under its hash, so that the execution has exactly its effect. `request` is the
/// operator's request.
pub async fn save(
    conn: &mut PgConnection,
    id: Uuid,
    hash: &str,
    request: &serde_json::Value,
    effect: &serde_json::Value,
    ranges: &[ReplayRange],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    sqlx::query("insert into plan (hash, kind, request, effect, planned_at) values ($1, 'replay', $2, $3, $4)")
        .bind(hash)
        .bind(request)
        .bind(effect)
        .bind(now)
        .execute(&mut *tx)
        .await?;
    for range in ranges {
        sqlx::query(
            "insert into replay (id, plan_hash, topic, partition, generation, first_offset, next_offset, end_offset)
             values ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(id)
        .bind(hash)
        .bind(range.partition.topic.name())
        .bind(range.partition.partition)
        .bind(range.generation)
        .bind(range.first_offset)
        .bind(range.next_offset)
        .bind(range.end_offset)
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await
}

/// The replay planned under that hash, if any.
pub async fn load(
    conn: &mut PgConnection,
    hash: &str,
) -> Result<Option<PlannedReplay>, sqlx::Error> {
    let rows = sqlx::query(
        "select id, act_id is not null, finished_at is not null, topic, partition, generation, first_offset, next_offset, end_offset
         from plan join replay on replay.plan_hash = plan.hash where plan.hash = $1 order by topic, partition",
    )
    .bind(hash)
    .fetch_all(conn)
    .await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let ranges = rows.iter().map(ReplayRange::from_row).collect::<Result<_, sqlx::Error>>()?;
    Ok(Some(PlannedReplay {
        id: first.try_get(0)?,
        started: first.try_get(1)?,
        finished: first.try_get(2)?,
        ranges,
    }))
}

/// Writes the act that begins a planned replay, unless it has already begun.
pub async fn start(
    conn: &mut PgConnection,
    hash: &str,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    let open =
        sqlx::query("select from plan where hash = $1 and act_id is null for update").bind(hash);
    if open.fetch_optional(&mut *tx).await?.is_none() {
        return Ok(());
    }
    let act_id = acts::insert(&mut tx, act, now).await?;
    sqlx::query("update plan set act_id = $2 where hash = $1")
        .bind(hash)
        .bind(act_id)
        .execute(&mut *tx)
        .await?;
    tx.commit().await
}

/// The counts that all executions of the replay have recorded.
pub async fn counts(conn: &mut PgConnection, id: Uuid) -> Result<Counts, sqlx::Error> {
    let (records, accepted, duplicates, conflicts, rejects, held) = sqlx::query_as(
        "select coalesce(sum(records), 0)::integer, coalesce(sum(accepted), 0)::integer, coalesce(sum(duplicates), 0)::integer,
             coalesce(sum(conflicts), 0)::integer, coalesce(sum(rejects), 0)::integer, coalesce(sum(held), 0)::integer
         from batch where kind = 'replay' and replay_id = $1",
    )
    .bind(id)
    .fetch_one(conn)
    .await?;
    Ok(Counts { records, accepted, duplicates, conflicts, rejects, held })
}

/// Marks the plan as finished, so that it is not executed again.
pub async fn finish(
    conn: &mut PgConnection,
    hash: &str,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    sqlx::query("update plan set finished_at = coalesce(finished_at, $2) where hash = $1")
        .bind(hash)
        .bind(now)
        .execute(conn)
        .await?;
    Ok(())
}
