//! The recovery of a ledger that was restored from a backup, until it has caught up.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::publications::doubt_pending;
use super::{NewAct, Sequence, acts, plans};
use crate::event::TopicPartition;

/// An open recovery and its remaining work.
#[derive(
    Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct Recovering {
    /// The id of the recovery.
    pub id: i64,
    /// The actor who began it.
    pub actor: String,
    /// The reason.
    pub reason: String,
    /// When the recovery began.
    pub opened_at: DateTime<Utc>,
    /// Whether the log's ends are recorded; the recovery cannot close earlier.
    pub log_ends_known: bool,
    /// Records of the log to read (offsets, if the log has gaps).
    pub records_to_read: i64,
    /// Deployments whose full reread is not in the ledger yet.
    pub sources_to_read: Vec<Uuid>,
    /// Deployments whose publish marks in coderd are not compared yet.
    pub sources_to_compare: Vec<Uuid>,
    /// Deployments that no longer exist, according to an operator; the recovery does not wait for
    /// them.
    pub without: Vec<Uuid>,
    /// The last sequence of the ledger when its restore was detected. It includes batches recorded
    /// between the restore and that time.
    pub ended_at_sequence: Sequence,
    /// When the batch of that sequence was recorded; absent: the ledger was empty.
    pub ended_at: Option<DateTime<Utc>>,
    /// When the last act before this recovery was done; absent: the ledger has none. The ledger
    /// lacks later acts up to the restore.
    pub last_act_at: Option<DateTime<Utc>>,
}

impl Recovering {
    /// Whether all work of the recovery is done.
    #[must_use]
    pub fn has_caught_up(&self) -> bool {
        let Recovering {
            log_ends_known, records_to_read, sources_to_read, sources_to_compare, ..
        } = self;
        *log_ends_known
            && *records_to_read == 0
            && sources_to_read.is_empty()
            && sources_to_compare.is_empty()
    }
}

pub async fn open(conn: &mut PgConnection) -> Result<Option<Recovering>, sqlx::Error> {
    sqlx::query_as(
        "select recovery.id, actor, reason, opened_at, targeted_at is not null as log_ends_known,
             (select coalesce(sum(target.next_offset - coalesce(position.next_offset, 0)), 0)::bigint
              from recovery_offset target left join position using (topic, partition)
              where target.recovery_id = recovery.id and target.next_offset > 0 and (position.generation is null and not exists (
                      select from past_position past where past.topic = target.topic and past.partition = target.partition
                          and past.generation = target.generation)
                  or position.generation = target.generation and position.next_offset < target.next_offset)) as records_to_read,
             sources.to_read as sources_to_read, sources.to_compare as sources_to_compare, sources.without,
             named_sequence(batch.sequence - 1) as ended_at_sequence,
             (select recorded_at from batch before where before.sequence = batch.sequence - 1) as ended_at,
             (select acted_at from operator_act earlier where earlier.id < recovery.act_id order by id desc limit 1) as last_act_at
         from recovery join operator_act on operator_act.id = act_id join batch on batch.id = batch_id
         cross join lateral (
             select coalesce(array_agg(deployment_id order by source.id) filter (where waits and not
                     (select swept_pass_id from completeness(source.id, null)) > after_pass_id), '{}') as to_read,
                 coalesce(array_agg(deployment_id order by source.id) filter (where waits and compared_at is null), '{}') as to_compare,
                 coalesce(array_agg(deployment_id order by source.id) filter (where not waits), '{}') as without
             from recovery_source join source on source.id = source_id, lateral (select given_up_act_id is null as waits) as given
             where recovery_id = recovery.id
         ) as sources
         where closed_at is null",
    )
    .fetch_optional(conn)
    .await
}

/// The number of pending publications, and the number of those whose events are later than `after`.
pub async fn pending_later_than(
    conn: &mut PgConnection,
    after: DateTime<Utc>,
) -> Result<(i64, i64), sqlx::Error> {
    let query = "select count(*), count(*) filter (where event_created_at > $1) from publication where state = 'pending'";
    sqlx::query_as(query).bind(after).fetch_one(conn).await
}

/// Records the log's ends, which were read after the recovery was opened. Only the first call has
/// an effect.
pub async fn set_targets(
    conn: &mut PgConnection,
    id: i64,
    ends: &[(TopicPartition, i64)],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    let targeted = sqlx::query("update recovery set targeted_at = $2 where id = $1 and targeted_at is null and closed_at is null")
        .bind(id)
        .bind(now)
        .execute(&mut *tx)
        .await?;
    if targeted.rows_affected() == 1 {
        sqlx::query(
            "insert into recovery_offset (recovery_id, topic, partition, generation, next_offset)
             select $1, topic, partition, current_generation(topic, partition), next_offset
             from unnest($2::text[], $3::integer[], $4::bigint[]) as log_end (topic, partition, next_offset)",
        )
        .bind(id)
        .bind(ends.iter().map(|(at, _)| at.topic.name()).collect::<Vec<_>>())
        .bind(ends.iter().map(|(at, _)| at.partition).collect::<Vec<_>>())
        .bind(ends.iter().map(|(_, end)| *end).collect::<Vec<_>>())
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await
}

/// Records that the source's pending publications are compared with coderd's publish marks.
pub async fn record_compared(
    conn: &mut PgConnection,
    id: i64,
    source_id: i16,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    sqlx::query("update recovery_source set compared_at = $3 where recovery_id = $1 and source_id = $2 and compared_at is null")
        .bind(id)
        .bind(source_id)
        .bind(now)
        .execute(conn)
        .await?;
    Ok(())
}

/// Releases the open recovery from sources that no longer exist, executing the plan of that hash.
/// False: it does not wait for one of them, it is closed, or the plan was executed before; nothing
/// is changed.
pub async fn abandon_sources(
    conn: &mut PgConnection,
    id: i64,
    without: &[Uuid],
    act: &NewAct<'_>,
    plan: &str,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let open =
        sqlx::query("select from recovery where id = $1 and closed_at is null for update").bind(id);
    if open.fetch_optional(&mut *tx).await?.is_none() {
        return Ok(false);
    }
    let act_id = acts::insert(&mut tx, act, now).await?;
    let abandoned = sqlx::query(
        "update recovery_source set given_up_act_id = $3 from source
         where recovery_id = $1 and source.id = source_id and deployment_id = any($2) and given_up_act_id is null",
    )
    .bind(id)
    .bind(without)
    .bind(act_id)
    .execute(&mut *tx)
    .await?;
    if abandoned.rows_affected() != without.len() as u64
        || !plans::mark_executed(&mut tx, plan, act_id, now).await?
    {
        return Ok(false);
    }
    tx.commit().await?;
    Ok(true)
}

/// Closes the recovery if all its work is done. Publications of events accepted meanwhile may have
/// been sent in the lost time, too. False: work remains, or it is already closed.
pub async fn close(
    conn: &mut PgConnection,
    id: i64,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    // Checked before the whole queue is locked: every process calls this each second until the
    // recovery closes.
    if !open(conn).await?.is_some_and(|open| open.id == id && open.has_caught_up()) {
        return Ok(false);
    }
    let mut tx = conn.begin().await?;
    doubt_pending(&mut tx).await?;
    // Checked again, because locking the queue may have taken time.
    if !open(&mut tx).await?.is_some_and(|open| open.id == id && open.has_caught_up()) {
        return Ok(false);
    }
    let close =
        sqlx::query("update recovery set closed_at = $2 where id = $1 and closed_at is null")
            .bind(id)
            .bind(now);
    if close.execute(&mut *tx).await?.rows_affected() == 0 {
        return Ok(false);
    }
    tx.commit().await?;
    Ok(true)
}
