//! How far each source is complete: its collector's passes and their ends in the log. Passes are
//! progress and add no batches. A pass leaves no row once the log is read up to it.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::{FromRow, PgConnection};

use super::collector_requests::end_requests;
use super::leases::hold;
use super::{Lease, LeaseError, NewPass};
use crate::event::{Message, Topic, TopicPartition};

#[derive(Clone, Debug, Default, PartialEq, Eq, FromRow)]
pub struct Completeness {
    /// The ledger has everything that coderd committed before this instant. None: not known.
    pub complete_until: Option<DateTime<Utc>>,
    /// Every hour before this one has its runtime row in the ledger or is over 7 days old.
    pub runtime_complete_until: Option<DateTime<Utc>>,
}

/// How far a source is complete in the ledger for one topic's events.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct TopicCompleteness {
    pub topic: String,
    /// The ledger has all of the topic's events that coderd committed before this instant. None:
    /// not known.
    pub complete_until: Option<DateTime<Utc>>,
}

/// The state from which a collector continues.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromRow)]
pub struct LastPass {
    /// When the last pass began.
    pub started_at: Option<DateTime<Utc>>,
    /// How far the last pass reports completeness, whether or not the ledger has reached it.
    pub complete_until: Option<DateTime<Utc>>,
    /// How far any pass reports completeness.
    pub claimed_until: Option<DateTime<Utc>>,
    /// When the last full sweep began. None after a recovery, so that the collector rereads
    /// everything.
    pub swept_at: Option<DateTime<Utc>>,
}

/// Makes void the passes that a query names by source and id, and the later ones, which rely on
/// them. None of these passes is settled.
macro_rules! void_passes {
    ($passes:literal) => {
        concat!(
            "with void as (
                 delete from collector_pass pass using (",
            $passes,
            ") named where pass.source_id = named.source_id and pass.pass_id >= named.pass_id returning pass.source_id, pass.pass_id
             ),
             sweep as (
                 update sweep_request set begun_at = null, rows_read = 0, pass_id = null, appended = null, late = null
                 where (source_id, pass_id) in (select source_id, pass_id from void)
             )
             update collector_progress set void_pass_id = pass_id, reports = false where source_id in (select source_id from void)"
        )
    };
}
pub(super) use void_passes;

/// Records a pass as the source's newest, settles passes that the log is read up to, and returns
/// its id. Completeness never decreases.
///
/// Only the holder of the collector's lease may record a pass. Its own last pass must be the newest
/// one, and the log must have the records that it has appended since.
///
/// # Errors
/// [`LeaseError`]; nothing is recorded.
pub async fn record(
    conn: &mut PgConnection,
    lease: &Lease,
    pass: &NewPass,
) -> Result<i64, LeaseError> {
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    let lost = || LeaseError::Lost(lease.name.clone());
    let next = "update collector_progress set pass_id = pass_id + 1, started_at = $2, reports = $3, late = late + $4,
             swept_at = case when $5 then $2 else swept_at end
         where source_id = $1 and ($6::bigint is null or (pass_id, started_at) = ($6, $7)) returning pass_id";
    let pass_id: i64 = sqlx::query_scalar(next)
        .bind(pass.source_id)
        .bind(pass.started_at)
        .bind(pass.complete_until.is_some())
        .bind(pass.late)
        .bind(pass.full_sweep)
        .bind(pass.previous.map(|(id, _)| id))
        .bind(pass.previous.map(|(_, started_at)| started_at))
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(lost)?;
    if !log_holds(&mut tx, &pass.last_records).await? {
        return Err(lost());
    }
    insert_pass(&mut tx, pass_id, pass).await?;
    settle_passes(&mut tx, pass.source_id, pass.unproven_after).await?;
    end_requests(&mut tx, pass_id, pass).await?;
    tx.commit().await?;
    Ok(pass_id)
}

/// Makes the source's passes after this one void. Only the holder of the collector's lease may.
///
/// # Errors
/// [`LeaseError`]; nothing is changed.
pub async fn void(
    conn: &mut PgConnection,
    lease: &Lease,
    source_id: i16,
    after: i64,
) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    sqlx::query(void_passes!(
        "select source_id, pass_id from collector_pass where source_id = $1 and pass_id > $2"
    ))
    .bind(source_id)
    .bind(after)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// The source's last pass before all passes that rely on one of these unread records; none: no pass
/// relies on one.
pub async fn last_before(
    conn: &mut PgConnection,
    source_id: i16,
    places: &[(TopicPartition, i64)],
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "select min(pass_id) - 1 from collector_pass_offset noted
         join unnest($2::text[], $3::integer[], $4::bigint[]) as at (topic, partition, log_offset) using (topic, partition)
         where source_id = $1 and noted.next_offset > log_offset",
    )
    .bind(source_id)
    .bind(places.iter().map(|(at, _)| at.topic.name()).collect::<Vec<_>>())
    .bind(places.iter().map(|(at, _)| at.partition).collect::<Vec<_>>())
    .bind(places.iter().map(|(_, offset)| *offset).collect::<Vec<_>>())
    .fetch_one(conn)
    .await
}

/// Whether the ledger has all records of this pass and earlier ones.
pub async fn is_confirmed(
    conn: &mut PgConnection,
    source_id: i16,
    pass_id: i64,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select not exists (select from unreached_offset where source_id = $1 and pass_id <= $2)",
    )
    .bind(source_id)
    .bind(pass_id)
    .fetch_one(conn)
    .await
}

/// How far the source is complete, by the passes that the ledger has reached.
pub async fn completeness(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<Completeness, sqlx::Error> {
    let query = "select complete_until, runtime_complete_until from completeness($1, null)";
    Ok(sqlx::query_as(query).bind(source_id).fetch_optional(conn).await?.unwrap_or_default())
}

/// The completeness of each topic: a topic that is behind does not hold back the others.
pub async fn completeness_by_topic(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<Vec<TopicCompleteness>, sqlx::Error> {
    sqlx::query_as("select topic, complete_until from unnest($2::text[]) as requested (topic), completeness($1, topic)")
        .bind(source_id)
        .bind(Topic::ALL.map(Topic::name).as_slice())
        .fetch_all(conn)
        .await
}

/// Whether the ledger has a full pass of the source. From then on its series may be shown.
pub async fn is_backfilled(conn: &mut PgConnection, source_id: i16) -> Result<bool, sqlx::Error> {
    let query = "select exists (select from completeness($1, null) where swept_pass_id > 0)";
    sqlx::query_scalar(query).bind(source_id).fetch_one(conn).await
}

/// The state from which the source's collector continues; all None before its first pass.
pub async fn last(conn: &mut PgConnection, source_id: i16) -> Result<LastPass, sqlx::Error> {
    sqlx::query_as(
        "select case when reports then claimed_until end as complete_until, claimed_until, swept_at, started_at
         from (select reports, swept_at, started_at, greatest(complete_until,
                   (select max(complete_until) from collector_pass pass where pass.source_id = progress.source_id)) as claimed_until
               from collector_progress progress where source_id = $1) last",
    )
    .bind(source_id)
    .fetch_one(conn)
    .await
}

/// Whether the log in this database has these records. After a failover that lost some, other
/// records may have their offsets.
async fn log_holds(
    tx: &mut PgConnection,
    records: &[(TopicPartition, i64, Message)],
) -> Result<bool, sqlx::Error> {
    if records.is_empty() {
        return Ok(true);
    }
    let held: i64 = sqlx::query_scalar(
        "select count(*) from unnest($1::text[], $2::integer[], $3::bigint[], $4::bytea[], $5::bytea[])
                 as expected (topic, partition, record_offset, key, payload)
             join log_partition using (topic, partition)
             join log_record found on partition_id = id and found.record_offset = expected.record_offset
         where found.key is not distinct from expected.key and found.payload is not distinct from expected.payload",
    )
    .bind(records.iter().map(|(at, ..)| at.topic.name()).collect::<Vec<_>>())
    .bind(records.iter().map(|(at, ..)| at.partition).collect::<Vec<_>>())
    .bind(records.iter().map(|(_, offset, _)| *offset).collect::<Vec<_>>())
    .bind(records.iter().map(|(.., message)| message.key.as_deref()).collect::<Vec<_>>())
    .bind(records.iter().map(|(.., message)| message.payload.as_deref()).collect::<Vec<_>>())
    .fetch_one(tx)
    .await?;
    Ok(usize::try_from(held) == Ok(records.len()))
}

/// Adds a row for the pass, with the offsets that neither the ledger nor an earlier pass has
/// reached. A pass without such offsets and without appended events relies on nothing new. Unless
/// it is a sweep, it joins the newest row, but never one that may be settled earlier.
async fn insert_pass(
    tx: &mut PgConnection,
    pass_id: i64,
    pass: &NewPass,
) -> Result<(), sqlx::Error> {
    let further: Vec<(String, i32, i64)> = sqlx::query_as(
        "select topic, partition, log_end from unnest($2::text[], $3::integer[], $4::bigint[]) as at (topic, partition, log_end)
             left join position using (topic, partition)
             left join (select topic, partition, max(next_offset) as noted from collector_pass_offset where source_id = $1
                        group by topic, partition) earlier using (topic, partition)
         where log_end > coalesce(greatest(next_offset, noted), 0)",
    )
    .bind(pass.source_id)
    .bind(pass.offsets.iter().map(|(at, _)| at.topic.name()).collect::<Vec<_>>())
    .bind(pass.offsets.iter().map(|(at, _)| at.partition).collect::<Vec<_>>())
    .bind(pass.offsets.iter().map(|(_, offset)| *offset).collect::<Vec<_>>())
    .fetch_all(&mut *tx)
    .await?;
    let joins = further.is_empty() && pass.produced == 0 && !pass.full_sweep;
    let row: i64 = sqlx::query_scalar(
        "insert into collector_pass as pass (source_id, pass_id, full_sweep, complete_until, runtime_complete_until)
         values ($1, coalesce((select max(pass_id) from collector_pass where $6 and source_id = $1 and pass_id > $7), $2), $3, $4, $5)
         on conflict (source_id, pass_id) do update set complete_until = greatest(pass.complete_until, excluded.complete_until),
             runtime_complete_until = greatest(pass.runtime_complete_until, excluded.runtime_complete_until)
         returning pass_id",
    )
    .bind(pass.source_id)
    .bind(pass_id)
    .bind(pass.full_sweep)
    .bind(pass.complete_until)
    .bind(pass.runtime_complete_until)
    .bind(joins)
    .bind(pass.unproven_after.unwrap_or(0))
    .fetch_one(&mut *tx)
    .await?;
    for (topic, partition, log_end) in further {
        sqlx::query("insert into collector_pass_offset (source_id, pass_id, topic, partition, next_offset) values ($1, $2, $3, $4, $5)")
            .bind(pass.source_id)
            .bind(row)
            .bind(topic)
            .bind(partition)
            .bind(log_end)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// Merges passes that the log is read up to into the source's progress. Deletes reached offsets.
async fn settle_passes(
    tx: &mut PgConnection,
    source_id: i16,
    unproven_after: Option<i64>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "delete from collector_pass_offset noted using position
         where source_id = $1 and position.topic = noted.topic and position.partition = noted.partition
             and position.next_offset >= noted.next_offset",
    )
    .bind(source_id)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "with settled as (
             delete from collector_pass where source_id = $1 and ($2::bigint is null or pass_id <= $2)
                 and pass_id < coalesce((select min(pass_id) from unreached_offset where source_id = $1), 9223372036854775807)
             returning *
         )
         update collector_progress progress set
             swept_pass_id = greatest(swept_pass_id, (select max(pass_id) from settled where full_sweep)),
             complete_until = greatest(complete_until, (select max(complete_until) from settled)),
             runtime_complete_until = greatest(runtime_complete_until, (select max(runtime_complete_until) from settled))
         where source_id = $1",
    )
    .bind(source_id)
    .bind(unproven_after)
    .execute(tx)
    .await?;
    Ok(())
}
