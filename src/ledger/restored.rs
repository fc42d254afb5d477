//! A ledger that was restored from a backup: how it is detected, and how its recovery is opened.
//!
//! Opening a recovery begins another incarnation. The same transaction ends leases and partition
//! leases, and marks pending publications as possibly sent in the lost time.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use sqlx::Connection as _;
use sqlx::types::Json;
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::generations;
use super::leases::revoke_leases;
use super::publications::doubt_pending;
use super::{
    ActKind, Landmark, NewAct, PROGRAM, PartitionGenerations, Recovering, Subject, acts, plans,
};
use crate::event::TopicPartition;

/// The evidence that the ledger was restored. It is checked again before a change, so that only the
/// first process opens a recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RestoreEvidence {
    /// The ledger had this batch and lacks it now.
    Batch(Landmark),
    /// The ledger had read this partition up to this offset, and lacks that.
    Position {
        /// The incarnation and the ended generations at that time.
        generations: PartitionGenerations,
        partition: TopicPartition,
        /// The position at that time.
        next_offset: i64,
        /// When the last record before that position was appended, if the log has it. The lost time
        /// reaches at least to there.
        read_until: Option<DateTime<Utc>>,
        /// The incarnations of all marks.
        marked: Vec<Uuid>,
    },
    /// An operator reports the restore.
    Reported {
        /// The incarnation that was restored.
        incarnation: Uuid,
        /// Sources that no longer exist; the recovery does not wait for them.
        without: Vec<Uuid>,
        /// The incarnations of the group's marks, as far as they could be read.
        marked: Vec<Uuid>,
    },
}

impl RestoreEvidence {
    /// The incarnations that end with this one: their marks and landmarks prove nothing afterwards.
    fn lost(&self) -> Vec<Uuid> {
        let marked = match self {
            RestoreEvidence::Batch(_) => &[],
            RestoreEvidence::Position { marked, .. } | RestoreEvidence::Reported { marked, .. } => {
                marked.as_slice()
            }
        };
        [&[self.incarnation()], marked].concat()
    }

    /// The incarnation of the evidence.
    fn incarnation(&self) -> Uuid {
        match self {
            RestoreEvidence::Batch(landmark) => landmark.incarnation,
            RestoreEvidence::Position { generations, .. } => generations.incarnation,
            RestoreEvidence::Reported { incarnation, .. } => *incarnation,
        }
    }
}

/// A restore of the ledger, in the detail of its act `recover`. The chain covers the act.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The incarnations that ended with it, as far as they are known.
    pub ended: Vec<Uuid>,
    /// The incarnation that began.
    pub began: Uuid,
    /// The last sequence that the ledger shares with the ended incarnations, at most: its last one
    /// when the restore was detected, or the one before a batch that it is known to lack.
    pub up_to: i64,
}

/// The restore's name in the detail.
const RESTORE: &str = "restore";

impl Restore {
    async fn of(
        conn: &mut PgConnection,
        evidence: &RestoreEvidence,
    ) -> Result<Restore, sqlx::Error> {
        let query = "select gen_random_uuid(), incarnation, next_sequence - 1 from ledger";
        let (began, current, last): (Uuid, Uuid, i64) =
            sqlx::query_as(query).fetch_one(conn).await?;
        let mut ended = evidence.lost();
        ended.push(current);
        ended.sort_unstable();
        ended.dedup();
        let up_to = match evidence {
            RestoreEvidence::Batch(lacking) => last.min(lacking.sequence - 1),
            RestoreEvidence::Position { .. } | RestoreEvidence::Reported { .. } => last,
        };
        Ok(Restore { ended, began, up_to })
    }

    fn noted_in<'a>(&self, act: &NewAct<'a>) -> NewAct<'a> {
        let mut act = act.clone();
        act.detail[RESTORE] = serde_json::json!(self);
        act
    }
}

/// The restores of the ledger, in the order of their sequences. Reads the acts `recover`, which are
/// few, by index.
pub async fn restores(conn: &mut PgConnection) -> Result<Vec<Restore>, sqlx::Error> {
    let rows: Vec<Json<Restore>> = sqlx::query_scalar(
        "select detail -> $1 from operator_act join batch on batch.id = batch_id
         where act = 'recover' and reject_id is null and jsonb_exists(detail, $1) order by sequence",
    )
    .bind(RESTORE)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|Json(restore)| restore).collect())
}

/// A source in use, and its last pass.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct CollectedSource {
    /// The ledger's own id of the source.
    pub id: i16,
    pub deployment_id: Uuid,
    /// Its newest pass; 0: none.
    pub last_pass_id: i64,
    /// When its newest pass began. A time in the future is replaced by the database's time.
    pub last_read_at: Option<DateTime<Utc>>,
}

/// A source is treated as unused if another one was read this much later. Waiting for it would
/// never end. The time is the log's retention. The current date has no effect, because all passes
/// of an old backup are old.
const READ_WITHIN: TimeDelta = TimeDelta::days(35);

/// Splits sources into those that a recovery waits for and the others.
fn split(sources: Vec<CollectedSource>) -> (Vec<CollectedSource>, Vec<CollectedSource>) {
    let newest = sources.iter().filter_map(|source| source.last_read_at).max();
    sources.into_iter().partition(|source| match (source.last_read_at, newest) {
        (Some(read_at), Some(newest)) => newest - read_at < READ_WITHIN,
        _ => true,
    })
}

async fn collected(connection: &mut PgConnection) -> Result<Vec<CollectedSource>, sqlx::Error> {
    sqlx::query_as(
        "select id, deployment_id, pass_id as last_pass_id,
             case when started_at is not null then least(started_at, clock_timestamp()) end as last_read_at
         from source join collector_progress on source_id = id where retired_act_id is null order by id",
    )
    .fetch_all(connection)
    .await
}

/// Collected sources: those that a recovery opened now would wait for, and the others.
pub async fn sources_to_recover(
    conn: &mut PgConnection,
) -> Result<(Vec<CollectedSource>, Vec<CollectedSource>), sqlx::Error> {
    Ok(split(collected(conn).await?))
}

/// Opens a recovery once. The ledger begins another incarnation, all leases and partition leases
/// end, and each pending publication is marked as possibly sent. `plan` is the plan that this
/// executes. False: the evidence no longer applies, or another process was first. After an error
/// nothing is changed.
pub async fn record(
    conn: &mut PgConnection,
    restored: &RestoreEvidence,
    act: &NewAct<'_>,
    plan: Option<&str>,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let mut tx = conn.begin().await?;
    if !is_restored(&mut tx, restored).await? {
        return Ok(false);
    }
    // The order in which every writer locks them, with the row of `ledger` last. Passes and batches
    // in flight have committed or fail.
    revoke_leases(&mut tx, "%").await?;
    sqlx::query("update lease set shown_sequence = 0").execute(&mut *tx).await?;
    doubt_pending(&mut tx).await?;
    sqlx::query("select from position order by topic, partition for update")
        .execute(&mut *tx)
        .await?;
    sqlx::query("update position set epoch = epoch + 1").execute(&mut *tx).await?;
    lower_cutover(&mut tx).await?;
    // The backup may contain an open recovery. The new one includes its work.
    sqlx::query("update recovery set closed_at = $1 where closed_at is null")
        .bind(now)
        .execute(&mut *tx)
        .await?;
    let restore = Restore::of(&mut tx, restored).await?;
    let act_id = acts::insert(&mut tx, &restore.noted_in(act), now).await?;
    sqlx::query("select from ledger for update").execute(&mut *tx).await?;
    if !is_restored(&mut tx, restored).await? {
        return Ok(false);
    }
    sqlx::query(
        "with over as (
             insert into past_incarnation select incarnation from ledger union select unnest($1::uuid[]) on conflict do nothing
         )
         update ledger set incarnation = $2",
    )
    .bind(restored.lost())
    .bind(restore.began)
    .execute(&mut *tx)
    .await?;
    if !insert_recovery(&mut tx, restored, act_id, now).await? {
        return Ok(false);
    }
    if let Some(hash) = plan
        && !plans::mark_executed(&mut tx, hash, act_id, now).await?
    {
        return Ok(false);
    }
    tx.commit().await?;
    Ok(true)
}

/// Inserts the recovery and the sources that it waits for. False:
/// `without` names a source that it would not wait for anyway.
async fn insert_recovery(
    conn: &mut PgConnection,
    restored: &RestoreEvidence,
    act_id: i64,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let without = if let RestoreEvidence::Reported { without, .. } = restored {
        without.as_slice()
    } else {
        &[]
    };
    let (waited_for, _) = split(collected(&mut *conn).await?);
    if without.iter().any(|named| !waited_for.iter().any(|source| source.deployment_id == *named)) {
        return Ok(false);
    }
    let abandoned: Vec<bool> =
        waited_for.iter().map(|source| without.contains(&source.deployment_id)).collect();
    sqlx::query(
        "with opened as (insert into recovery (act_id, opened_at) values ($1, $2) returning id)
         insert into recovery_source (recovery_id, source_id, after_pass_id, given_up_act_id)
         select opened.id, source_id, after_pass_id, case when abandoned then $1 end
         from opened, unnest($3::smallint[], $4::bigint[], $5::boolean[]) as waited_for (source_id, after_pass_id, abandoned)",
    )
    .bind(act_id)
    .bind(now)
    .bind(waited_for.iter().map(|source| source.id).collect::<Vec<_>>())
    .bind(waited_for.iter().map(|source| source.last_pass_id).collect::<Vec<_>>())
    .bind(&abandoned)
    .execute(conn)
    .await?;
    Ok(true)
}

/// Opens a recovery of a restored ledger that this program has detected itself. Each process that
/// detects it calls this; the first call opens the recovery. After an error the next check retries.
pub async fn record_detected(
    conn: &mut PgConnection,
    restored: &RestoreEvidence,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let reason = restored.to_string();
    let act = NewAct {
        actor: PROGRAM,
        act: ActKind::Recover,
        subject: Subject::Named("ledger"),
        reason: &reason,
        detail: serde_json::json!({}),
    };
    let opened = record(conn, restored, &act, None, now).await?;
    if opened {
        tracing::warn!(
            reason,
            "the ledger was restored from a backup: new incarnation, catching up; {}",
            Recovering::LOST_ACTS
        );
    }
    Ok(opened)
}

/// Lowers the cutovers to the positions. The ledger may have lost an earlier cutover with the
/// rejects of forged records beyond the positions. A later cutover, recorded from the log's end at
/// that time, would accept those records.
async fn lower_cutover(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update signature_cutover cutover set first_offset = next_offset from position
         where position.topic = cutover.topic and position.partition = cutover.partition and position.generation = cutover.generation
             and first_offset > next_offset",
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Whether this evidence shows that the ledger was restored and a recovery was not opened for it.
/// An incarnation or generation that the ledger does not know came after its backup.
pub async fn is_restored(
    conn: &mut PgConnection,
    restored: &RestoreEvidence,
) -> Result<bool, sqlx::Error> {
    let (is_current, is_past): (bool, bool) =
        sqlx::query_as("select incarnation = $1, exists (select from past_incarnation past where past.incarnation = $1) from ledger")
            .bind(restored.incarnation())
            .fetch_one(&mut *conn)
            .await?;
    match restored {
        _ if is_past => Ok(false),
        RestoreEvidence::Reported { .. } => Ok(is_current),
        _ if !is_current => Ok(true),
        RestoreEvidence::Batch(landmark) => {
            let query = "select not exists (select from batch where sequence = $1 and id = $2 and recorded_at = $3)";
            let query = sqlx::query_scalar(query)
                .bind(landmark.sequence)
                .bind(landmark.batch_id)
                .bind(landmark.recorded_at);
            query.fetch_one(conn).await
        }
        RestoreEvidence::Position { generations, partition, next_offset, .. } => {
            let ended = generations::all(conn).await?.ended;
            let query = "select not exists (select from position where topic = $1 and partition = $2 and next_offset >= $3)";
            let query = sqlx::query_scalar(query)
                .bind(partition.topic.name())
                .bind(partition.partition)
                .bind(next_offset);
            Ok(ended < generations.ended
                || ended == generations.ended && query.fetch_one(conn).await?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_does_not_wait_for_a_source_unread_for_35_days() {
        let newest: DateTime<Utc> = "2025-08-01T12:00:00Z".parse().expect("a time");
        let source = |id: i16, days: Option<i64>| CollectedSource {
            id,
            deployment_id: Uuid::from_u128(id.unsigned_abs().into()),
            last_pass_id: i64::from(id),
            last_read_at: days.map(|days| newest - TimeDelta::days(days)),
        };
        let ids = |sources: &[CollectedSource]| {
            sources.iter().map(|source| source.id).collect::<Vec<_>>()
        };
        let (waited_for, others) = split(vec![
            source(1, Some(34)),
            source(2, Some(35)),
            source(3, None),
            source(4, Some(0)),
            source(5, Some(400)),
        ]);
        assert_eq!((ids(&waited_for), ids(&others)), (vec![1, 3, 4], vec![2, 5]));
        // A single source is never treated as unused, at any age.
        let (waited_for, others) = split(vec![source(5, Some(400))]);
        assert_eq!((ids(&waited_for), ids(&others)), (vec![5], vec![]));
    }
}
