//! How far each source is complete: passes of its collector, and where in the log they end.

use chrono::{DateTime, Utc};
use sqlx::FromRow;

use super::collector_requests::end_requests;
use super::leases::hold;
use super::{Lease, LeaseError, Ledger};
use crate::event::TopicPartition;

/// A pass whose findings the log has acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPass {
    /// The source that was read.
    pub source_id: i16,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// What coderd committed before this instant is in the log. None: this pass claims nothing.
    pub complete_until: Option<DateTime<Utc>>,
    /// The hour before which every hour has its runtime row or is over 7 days old.
    pub runtime_complete_until: Option<DateTime<Utc>>,
    /// It read everything, not only what is recent.
    pub full_sweep: bool,
    /// Events appended to the log.
    pub produced: i32,
    /// Of these, found later than an earlier pass had claimed to be complete.
    pub late: i32,
    /// Where each partition of the log ended afterwards: all that this and earlier passes appended lies before.
    pub offsets: Vec<(TopicPartition, i64)>,
    /// The pass whose findings this one relies on, by id and beginning: where it is not there, the ledger is a restored one.
    pub previous: Option<(i64, DateTime<Utc>)>,
    /// Event ids that it was asked for and has looked for.
    pub fetched: Vec<String>,
    /// The mark of the requested sweep that it was.
    pub requested_sweep: Option<DateTime<Utc>>,
}

/// How far a source is complete in the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromRow)]
pub struct Completeness {
    /// All that coderd committed before this instant is in the ledger. None: nothing can be said.
    pub complete_until: Option<DateTime<Utc>>,
    /// The hour before which every hour has its runtime row in the ledger or is over 7 days old.
    pub runtime_complete_until: Option<DateTime<Utc>>,
}

/// How far a source is complete in the ledger, as far as one topic's events go.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct TopicCompleteness {
    /// The topic's name.
    pub topic: String,
    /// All of the topic's events that coderd committed before this instant are in the ledger. None: nothing can be said.
    pub complete_until: Option<DateTime<Utc>>,
}

/// Where a collector left off.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromRow)]
pub struct LastPass {
    /// The claim of the last pass, whether or not the ledger is there yet.
    pub complete_until: Option<DateTime<Utc>>,
    /// The latest claim of any pass.
    pub claimed_until: Option<DateTime<Utc>>,
    /// When the last full sweep began; None where something was recovered since, so that all is to be read again.
    pub swept_at: Option<DateTime<Utc>>,
}

/// Asked each second by whoever shows a source: it must not depend on how many passes there were.
macro_rules! completeness {
    ($explain:literal) => {
        concat!(
            $explain,
            "with reached as (
                 select coalesce(
                     (select min(pass.id) - 1 from collector_pass pass
                      join collector_pass_offset ahead on ahead.pass_id = pass.id
                      left join position on position.topic = ahead.topic and position.partition = ahead.partition
                      where pass.source_id = $1 and (position.next_offset is null or position.next_offset < ahead.next_offset)),
                     9223372036854775807) as pass_id
             )
             select
                 (select complete_until from collector_pass
                  where source_id = $1 and complete_until is not null and id <= reached.pass_id order by id desc limit 1) as complete_until,
                 (select runtime_complete_until from collector_pass
                  where source_id = $1 and runtime_complete_until is not null and id <= reached.pass_id order by id desc limit 1)
                     as runtime_complete_until
             from reached"
        )
    };
}

impl Ledger {
    /// Records a pass as a batch and answers its id. Claims never move back, for what was complete stays so.
    ///
    /// Rows of `collector_pass_offset` that the ledger has passed tell nothing more and go: a pass without any is in the ledger. Only who
    /// holds the lease of the source's collector may record, and who remembers an earlier pass only where that pass is.
    ///
    /// # Errors
    /// [`LeaseError`]; then nothing is recorded.
    pub async fn record_pass(&self, lease: &Lease, pass: &NewPass) -> Result<i64, LeaseError> {
        let mut tx = self.pool.begin().await?;
        hold(&mut tx, lease).await?;
        if let Some((id, started_at)) = pass.previous {
            let there = sqlx::query("select from collector_pass where id = $1 and started_at = $2").bind(id).bind(started_at);
            there.fetch_optional(&mut *tx).await?.ok_or_else(|| LeaseError::Lost(lease.name.clone()))?;
        }
        let pass_id: i64 = sqlx::query_scalar(
            "with taken as (insert into batch (kind, recorded_at) values ('pass', $1) returning id)
             insert into collector_pass
                 (batch_id, source_id, started_at, complete_until, runtime_complete_until, full_sweep, produced, late)
             select taken.id, $2, $3,
                 case when $4::timestamptz is not null then greatest($4, (select complete_until from collector_pass
                     where source_id = $2 and complete_until is not null order by id desc limit 1)) end,
                 case when $5::timestamptz is not null then greatest($5, (select runtime_complete_until from collector_pass
                     where source_id = $2 and runtime_complete_until is not null order by id desc limit 1)) end,
                 $6, $7, $8
             from taken returning id",
        )
        .bind(self.clock.now())
        .bind(pass.source_id)
        .bind(pass.started_at)
        .bind(pass.complete_until)
        .bind(pass.runtime_complete_until)
        .bind(pass.full_sweep)
        .bind(pass.produced)
        .bind(pass.late)
        .fetch_one(&mut *tx)
        .await?;
        sqlx::query(
            "delete from collector_pass_offset passed using position
             where position.topic = passed.topic and position.partition = passed.partition and position.next_offset >= passed.next_offset
                 and passed.pass_id in (select id from collector_pass where source_id = $1)",
        )
        .bind(pass.source_id)
        .execute(&mut *tx)
        .await?;
        let topics: Vec<&str> = pass.offsets.iter().map(|(partition, _)| partition.topic.name()).collect();
        let partitions: Vec<i32> = pass.offsets.iter().map(|(partition, _)| partition.partition).collect();
        let offsets: Vec<i64> = pass.offsets.iter().map(|(_, offset)| *offset).collect();
        sqlx::query(
            "insert into collector_pass_offset (pass_id, topic, partition, next_offset)
             select $1, topic, partition, next_offset from unnest($2::text[], $3::integer[], $4::bigint[]) as at (topic, partition, next_offset)",
        )
        .bind(pass_id)
        .bind(&topics)
        .bind(&partitions)
        .bind(&offsets)
        .execute(&mut *tx)
        .await?;
        end_requests(&mut tx, pass.source_id, pass_id, &pass.fetched, pass.requested_sweep).await?;
        tx.commit().await?;
        Ok(pass_id)
    }

    /// Withdraws what the source's passes after this one report. Only the holder of the collector's lease may.
    ///
    /// # Errors
    /// [`LeaseError`]; then nothing is changed.
    pub async fn void_passes(&self, lease: &Lease, source_id: i16, after: i64) -> Result<(), LeaseError> {
        let mut tx = self.pool.begin().await?;
        hold(&mut tx, lease).await?;
        sqlx::query(
            "update collector_pass set void = true, complete_until = null, runtime_complete_until = null, full_sweep = false
             where source_id = $1 and id > $2 and not void",
        )
        .bind(source_id)
        .bind(after)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }

    /// The source's last pass before all that rely on one of these records, which the ledger has not read; none: no pass relies on one.
    ///
    /// # Errors
    /// The database's.
    pub async fn last_pass_before(&self, source_id: i16, places: &[(TopicPartition, i64)]) -> Result<Option<i64>, sqlx::Error> {
        sqlx::query_scalar(
            "select min(pass.id) - 1 from collector_pass pass join collector_pass_offset noted on noted.pass_id = pass.id
             join unnest($2::text[], $3::integer[], $4::bigint[]) as at (topic, partition, log_offset) using (topic, partition)
             where pass.source_id = $1 and noted.next_offset > log_offset",
        )
        .bind(source_id)
        .bind(places.iter().map(|(at, _)| at.topic.name()).collect::<Vec<_>>())
        .bind(places.iter().map(|(at, _)| at.partition).collect::<Vec<_>>())
        .bind(places.iter().map(|(_, offset)| *offset).collect::<Vec<_>>())
        .fetch_one(&self.pool)
        .await
    }

    /// Whether all that the pass and those before it appended is in the ledger.
    ///
    /// # Errors
    /// The database's.
    pub async fn pass_is_in(&self, pass_id: i64) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar(
            "select not exists (
                 select from collector_pass_offset ahead left join position using (topic, partition)
                 where ahead.pass_id = $1 and (position.next_offset is null or position.next_offset < ahead.next_offset)
             )",
        )
        .bind(pass_id)
        .fetch_one(&self.pool)
        .await
    }

    /// How far the source is complete: the newest claims of passes that are in the ledger. As claims never move back, these are the largest.
    ///
    /// # Errors
    /// The database's.
    pub async fn completeness(&self, source_id: i16) -> Result<Completeness, sqlx::Error> {
        sqlx::query_as(completeness!("")).bind(source_id).fetch_one(&self.pool).await
    }

    /// The same for each topic by itself: one that is behind does not hold back what can be said of the others.
    ///
    /// # Errors
    /// The database's.
    pub async fn completeness_by_topic(&self, source_id: i16) -> Result<Vec<TopicCompleteness>, sqlx::Error> {
        sqlx::query_as(
            "with reached as (
                 select topic, coalesce(
                     (select min(pass.id) - 1 from collector_pass pass
                      join collector_pass_offset ahead on ahead.pass_id = pass.id and ahead.topic = asked.topic
                      left join position on position.topic = ahead.topic and position.partition = ahead.partition
                      where pass.source_id = $1 and (position.next_offset is null or position.next_offset < ahead.next_offset)),
                     9223372036854775807) as pass_id
                 from unnest($2::text[]) as asked (topic)
             )
             select topic,
                 (select complete_until from collector_pass
                  where source_id = $1 and complete_until is not null and id <= reached.pass_id order by id desc limit 1) as complete_until
             from reached",
        )
        .bind(source_id)
        .bind(crate::event::Topic::ALL.map(crate::event::Topic::name).as_slice())
        .fetch_all(&self.pool)
        .await
    }

    /// How PostgreSQL finds that: the plan, run.
    ///
    /// # Errors
    /// The database's.
    pub async fn explain_completeness(&self, source_id: i16) -> Result<Vec<String>, sqlx::Error> {
        sqlx::query_scalar(completeness!("explain (analyze) ")).bind(source_id).fetch_all(&self.pool).await
    }

    /// Whether the source's first full pass is in the ledger: from then on its series may be shown.
    ///
    /// # Errors
    /// The database's.
    pub async fn backfilled(&self, source_id: i16) -> Result<bool, sqlx::Error> {
        let first: Option<i64> =
            sqlx::query_scalar("select id from collector_pass where source_id = $1 and full_sweep order by id limit 1")
                .bind(source_id)
                .fetch_optional(&self.pool)
                .await?;
        match first {
            Some(pass_id) => self.pass_is_in(pass_id).await,
            None => Ok(false),
        }
    }

    /// Where the source's collector left off; all None before its first pass.
    ///
    /// # Errors
    /// The database's.
    pub async fn last_pass(&self, source_id: i16) -> Result<LastPass, sqlx::Error> {
        sqlx::query_as(
            "select
                 (select complete_until from collector_pass where source_id = $1 order by id desc limit 1) as complete_until,
                 (select complete_until from collector_pass
                  where source_id = $1 and complete_until is not null order by id desc limit 1) as claimed_until,
                 (select started_at from collector_pass where source_id = $1 and full_sweep
                      and batch_id > coalesce((select max(batch_id) from operator_act where act = 'recover'), 0)
                  order by id desc limit 1) as swept_at",
        )
        .bind(source_id)
        .fetch_one(&self.pool)
        .await
    }
}
