//! A ledger that was restored from a backup, until it has caught up with what it lost.
//!
//! Opening a recovery makes it another incarnation, in one transaction with all that must not go on as before: leases, claims on partitions, and
//! what may have been sent in the lost time.

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection, Row};
use uuid::Uuid;

use super::{Landmark, Ledger, NewAct, OURSELVES, plans};
use crate::event::TopicPartition;

/// Why the ledger is taken to be a restored one. Looked at again before anything is changed, so that only the first who comes opens a recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restored {
    /// It had this batch and does not have it any more.
    Batch(Landmark),
    /// It had read this partition up to here, and stands before it.
    Position {
        /// The ledger's identity at that time.
        incarnation: Uuid,
        /// The partition.
        partition: TopicPartition,
        /// What was read next.
        next_offset: i64,
    },
    /// It was last seen in another place than where it is: it was restored, copied or failed over, and may have lost its newest batches.
    Place {
        /// The ledger's identity at that time.
        incarnation: Uuid,
        /// Server, timeline and database.
        place: String,
    },
    /// An operator says so of this incarnation.
    Said(Uuid),
}

impl Restored {
    fn incarnation(&self) -> Uuid {
        match self {
            Restored::Batch(landmark) => landmark.incarnation,
            Restored::Position { incarnation, .. } | Restored::Place { incarnation, .. } | Restored::Said(incarnation) => *incarnation,
        }
    }
}

impl std::fmt::Display for Restored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Restored::Batch(Landmark { sequence, batch_id, recorded_at, .. }) => {
                write!(f, "it had batch {batch_id} of {recorded_at} at sequence {sequence}, and has it no more")
            }
            Restored::Position { partition, next_offset, .. } => {
                write!(f, "it had read {partition} up to {next_offset}, and stands before it")
            }
            Restored::Place { place, .. } => {
                write!(f, "it was last seen in server, timeline and database {place}, and is in another: what it has lost is not known")
            }
            Restored::Said(_) => f.write_str("an operator says so"),
        }
    }
}

/// An open recovery and what it waits for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Recovering {
    /// The ledger's id of it.
    pub id: i64,
    /// Who began it.
    pub actor: String,
    /// Why.
    pub reason: String,
    /// Since when.
    pub opened_at: DateTime<Utc>,
    /// Whether the log's ends at that time are known: until then nothing is caught up with.
    pub log_ends_known: bool,
    /// Records of the log still to be read (offsets, where it has gaps).
    pub records_to_read: i64,
    /// Sources that were not read again as a whole yet.
    pub sources_to_read: i64,
    /// Sources whose publish marks in coderd were not compared yet.
    pub sources_to_compare: i64,
}

impl std::fmt::Display for Recovering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let since = self.opened_at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        write!(f, "the ledger was restored from a backup and catches up since {since}: ")?;
        if !self.log_ends_known {
            return f.write_str("the log's ends are still to be asked for");
        }
        let Recovering { records_to_read, sources_to_read, sources_to_compare, .. } = self;
        write!(
            f,
            "{records_to_read} records of the log to read, {sources_to_read} sources to read again as a whole, {sources_to_compare} to compare with coderd's publish marks"
        )
    }
}

/// A collected source of an open recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct SourceToCompare {
    /// The ledger's own small id.
    pub id: i16,
    /// coderd's deployment id.
    pub deployment_id: Uuid,
}

impl Ledger {
    /// Opens a recovery, once: the ledger becomes another incarnation, nobody holds a lease or a partition any more, and every pending publication
    /// may have been sent. `plan` is the plan that this executes. False: it is no longer so, or somebody else was first.
    ///
    /// # Errors
    /// The database's; then nothing is changed.
    pub async fn note_restored(&self, restored: &Restored, act: &NewAct<'_>, plan: Option<&str>) -> Result<bool, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        if !is_so(&mut tx, restored).await? {
            return Ok(false);
        }
        // In the order in which every writer takes them, the one row of `ledger` last. Passes and batches on their way are in, or fail.
        sqlx::query("select from lease order by name for update").execute(&mut *tx).await?;
        let revoked = "update lease set holder = '', epoch = epoch + 1, expires_at = clock_timestamp(), shown_sequence = 0";
        sqlx::query(revoked).execute(&mut *tx).await?;
        doubt_pending(&mut tx).await?;
        sqlx::query("select from position order by topic, partition for update").execute(&mut *tx).await?;
        sqlx::query("update position set epoch = epoch + 1").execute(&mut *tx).await?;
        sqlx::query("select from ledger for update").execute(&mut *tx).await?;
        if !is_so(&mut tx, restored).await? {
            return Ok(false);
        }
        let another = "update ledger set incarnation = gen_random_uuid(), place = actual_place()";
        sqlx::query(another).execute(&mut *tx).await?;
        let now = self.clock.now();
        // A backup may have been taken while an earlier recovery was open: this one waits for more.
        sqlx::query("update recovery set closed_at = $1 where closed_at is null").bind(now).execute(&mut *tx).await?;
        let act_id = self.act(&mut tx, act).await?;
        // A source that was not read for as long as the log keeps its records is not read any more: waiting for it would never end.
        sqlx::query(
            "with opened as (insert into recovery (act_id, opened_at) values ($1, $2) returning id)
             insert into recovery_source (recovery_id, source_id, after_pass_id)
             select opened.id, source.id, coalesce(max(pass.id), 0)
             from opened, source left join collector_pass pass on pass.source_id = source.id
             where collected group by opened.id, source.id
             having max(pass.started_at) is null or max(pass.started_at) > $2 - interval '35 days'",
        )
        .bind(act_id)
        .bind(now)
        .execute(&mut *tx)
        .await?;
        if let Some(hash) = plan
            && !plans::executed(&mut tx, hash, act_id, now).await?
        {
            return Ok(false);
        }
        tx.commit().await?;
        Ok(true)
    }

    /// Opens a recovery of a ledger that went back, seen by this program itself. Whoever sees it says so; the first opens it.
    ///
    /// # Errors
    /// The database's; then it is for the next look.
    pub async fn note_went_back(&self, restored: &Restored) -> Result<bool, sqlx::Error> {
        let reason = restored.to_string();
        let act = NewAct { actor: OURSELVES, act: "recover", subject: "ledger", reason: &reason, detail: serde_json::json!({}) };
        let opened = self.note_restored(restored, &act, None).await?;
        if opened {
            tracing::warn!(reason, "the ledger was restored from a backup: it is another incarnation now, and catches up");
        }
        Ok(opened)
    }

    /// The open recovery, if there is one.
    ///
    /// # Errors
    /// The database's.
    pub async fn recovering(&self) -> Result<Option<Recovering>, sqlx::Error> {
        let row = sqlx::query(
            "select recovery.id, actor, reason, opened_at, targeted_at is not null,
                 (select coalesce(sum(target.next_offset - position.next_offset), 0)::bigint
                  from recovery_offset target join position using (topic, partition, generation)
                  where recovery_id = recovery.id and position.next_offset < target.next_offset),
                 (select count(*) from recovery_source source where recovery_id = recovery.id and not exists (
                      select from collector_pass pass
                      where pass.source_id = source.source_id and pass.id > source.after_pass_id and full_sweep and not void
                          and not exists (select from collector_pass_offset ahead left join position using (topic, partition)
                              where ahead.pass_id = pass.id and (position.next_offset is null or position.next_offset < ahead.next_offset)))),
                 (select count(*) from recovery_source where recovery_id = recovery.id and compared_at is null)
             from recovery join operator_act on operator_act.id = act_id where closed_at is null",
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            Ok(Recovering {
                id: row.try_get(0)?,
                actor: row.try_get(1)?,
                reason: row.try_get(2)?,
                opened_at: row.try_get(3)?,
                log_ends_known: row.try_get(4)?,
                records_to_read: row.try_get(5)?,
                sources_to_read: row.try_get(6)?,
                sources_to_compare: row.try_get(7)?,
            })
        })
        .transpose()
    }

    /// How many publications are pending, and how many of them are of events later than `after`.
    ///
    /// # Errors
    /// The database's.
    pub async fn pending_later_than(&self, after: DateTime<Utc>) -> Result<(i64, i64), sqlx::Error> {
        let query = "select count(*), count(*) filter (where event_created_at > $1) from publication where state = 'pending'";
        sqlx::query_as(query).bind(after).fetch_one(&self.pool).await
    }

    /// Whether a recovery is open.
    ///
    /// # Errors
    /// The database's.
    pub async fn is_recovering(&self) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar("select exists (select from recovery where closed_at is null)").fetch_one(&self.pool).await
    }

    /// Says where the log ended when it was asked, after the recovery was opened. The first word counts.
    ///
    /// # Errors
    /// The database's.
    pub async fn target_recovery(&self, id: i64, ends: &[(TopicPartition, i64)]) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let targeted = sqlx::query("update recovery set targeted_at = $2 where id = $1 and targeted_at is null and closed_at is null")
            .bind(id)
            .bind(self.clock.now())
            .execute(&mut *tx)
            .await?;
        if targeted.rows_affected() == 1 {
            sqlx::query(
                "insert into recovery_offset (recovery_id, topic, partition, generation, next_offset)
                 select $1, topic, partition, coalesce(generation, 1), at.next_offset
                 from unnest($2::text[], $3::integer[], $4::bigint[]) as at (topic, partition, next_offset)
                 left join position using (topic, partition)",
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

    /// Sources of the recovery that are read again as a whole and still to be compared with coderd's publish marks.
    ///
    /// # Errors
    /// The database's.
    pub async fn sources_to_compare(&self, id: i64) -> Result<Vec<SourceToCompare>, sqlx::Error> {
        sqlx::query_as(
            "select source.id, source.deployment_id from recovery_source waiting join source on source.id = waiting.source_id
             where recovery_id = $1 and compared_at is null order by source.id",
        )
        .bind(id)
        .fetch_all(&self.pool)
        .await
    }

    /// The pending publications of the source were compared with coderd's publish marks.
    ///
    /// # Errors
    /// The database's.
    pub async fn recovery_compared(&self, id: i64, source_id: i16) -> Result<(), sqlx::Error> {
        sqlx::query("update recovery_source set compared_at = $3 where recovery_id = $1 and source_id = $2 and compared_at is null")
            .bind(id)
            .bind(source_id)
            .bind(self.clock.now())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Closes the recovery if it has caught up with everything. What was accepted meanwhile may have been sent in the lost time, too. False: it
    /// waits for more, or is closed already.
    ///
    /// # Errors
    /// The database's.
    pub async fn close_recovery(&self, id: i64) -> Result<bool, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        doubt_pending(&mut tx).await?;
        let closed = sqlx::query(
            "update recovery set closed_at = $2
             where id = $1 and closed_at is null and targeted_at is not null
                 and not exists (select from recovery_offset target left join position using (topic, partition)
                     where target.recovery_id = recovery.id and target.next_offset > 0 and (position.generation is null and not exists (
                             select from past_position past where past.topic = target.topic and past.partition = target.partition
                                 and past.generation = target.generation)
                         or position.generation = target.generation and position.next_offset < target.next_offset))
                 and not exists (select from recovery_source source where recovery_id = recovery.id and (compared_at is null or not exists (
                     select from collector_pass pass
                     where pass.source_id = source.source_id and pass.id > source.after_pass_id and full_sweep and not void
                         and not exists (select from collector_pass_offset ahead left join position using (topic, partition)
                             where ahead.pass_id = pass.id and (position.next_offset is null or position.next_offset < ahead.next_offset)))))",
        )
        .bind(id)
        .bind(self.clock.now())
        .execute(&mut *tx)
        .await?;
        if closed.rows_affected() == 0 {
            return Ok(false);
        }
        tx.commit().await?;
        Ok(true)
    }
}

async fn is_so(tx: &mut PgConnection, restored: &Restored) -> Result<bool, sqlx::Error> {
    let incarnation: Uuid = sqlx::query_scalar("select incarnation from ledger").fetch_one(&mut *tx).await?;
    if incarnation != restored.incarnation() {
        return Ok(false);
    }
    match restored {
        Restored::Said(_) => Ok(true),
        Restored::Batch(landmark) => {
            let query = "select not exists (select from batch where sequence = $1 and id = $2 and recorded_at = $3)";
            let query = sqlx::query_scalar(query).bind(landmark.sequence).bind(landmark.batch_id).bind(landmark.recorded_at);
            query.fetch_one(tx).await
        }
        Restored::Place { place, .. } => {
            let query = "select place = $1 and place <> actual_place() from ledger";
            sqlx::query_scalar(query).bind(place).fetch_one(tx).await
        }
        Restored::Position { partition, next_offset, .. } => {
            let query = "select exists (select from position where topic = $1 and partition = $2 and next_offset < $3)";
            let query = sqlx::query_scalar(query).bind(partition.topic.name()).bind(partition.partition).bind(next_offset);
            query.fetch_one(tx).await
        }
    }
}

/// Whatever is pending may have been sent when nobody remembers: should it become too old, its fate is unknown.
async fn doubt_pending(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("select from publication where state = 'pending' order by source_id, event_id for update").execute(&mut *tx).await?;
    sqlx::query("update publication set unanswered = true where state = 'pending' and not unanswered").execute(tx).await?;
    Ok(())
}
