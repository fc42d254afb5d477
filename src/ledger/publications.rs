//! The publication queue: one row for each accepted usage event, until its final state is known.
//!
//! A publisher leases rows by the database's clock. A batch of kind `verdicts` settles them.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::Connection as _;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::open_requests::cover;
use super::rows;
use crate::event::UsageQuantity;
use crate::words::words;

words! {
    /// The state of a publication.
    PublicationState {
        /// It waits for its first or next attempt.
        Pending = "pending",
        /// The vendor accepted it.
        Published = "published",
        /// The vendor refused it permanently.
        Refused = "refused",
        /// It is too old, and the vendor accepted no attempt.
        Expired = "expired",
        /// It is too old or corrected to nothing, and the vendor may have accepted an attempt.
        Unknown = "unknown",
        /// coderd published it.
        NotOurs = "not_ours",
        /// An operator has corrected the event: coderd does not have it. The vendor never got it.
        Withdrawn = "withdrawn",
    }
}

words! {
    /// The reason why a publication is held although it is due.
    HeldFor {
        /// coderd's row is gone or differs from the accepted event.
        CoderdDiffers = "coderd_differs",
        /// The vendor's rules do not allow the event.
        VendorRules = "vendor_rules",
        /// The vendor has refused a whole request with this event.
        VendorRefuses = "vendor_refuses",
    }
}

/// The longest delay that a publisher sets. A row with a longer delay was written by a clock that
/// was ahead.
const LONGEST_WAIT: TimeDelta = TimeDelta::hours(2);

/// A leased row, with its accepted or corrected event.
#[derive(Clone, Debug, PartialEq)]
pub struct Publication {
    pub event_id: String,
    pub quantity: UsageQuantity,
    /// When the usage happened.
    pub created_at: DateTime<Utc>,
    /// Whether the vendor may have accepted an earlier attempt.
    pub unanswered: bool,
    /// The number of attempts that were refused for now or left out of an answer.
    pub refusals: u32,
    /// Whether the vendor has refused a whole request with this event alone.
    pub refused_alone: bool,
    /// When its hold began, if it is held.
    pub held_since: Option<DateTime<Utc>>,
    /// Whether coderd is known to have had the event as it was accepted.
    pub confirmed: bool,
    /// The latest message about it.
    pub last_message: Option<String>,
}

/// A row that is released without an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postponed {
    pub event_id: String,
    /// The reason why it is not sent.
    pub message: Option<String>,
    /// The reason why it is held, if it is.
    pub held_for: Option<HeldFor>,
    /// When the next attempt is due.
    pub next_attempt_at: DateTime<Utc>,
}

/// A final state without a verdict of the vendor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// coderd published the event.
    NotOurs,
    /// The event is too old to be sent: `unknown` after an unanswered attempt, otherwise `expired`.
    TooOld,
}

/// The number of rows that got each final state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    pub not_ours: usize,
    /// Events that were never sent, or were refused for now until they were too old.
    pub expired: usize,
    /// Events that are too old, and that the vendor may have accepted.
    pub unknown: usize,
}

/// A pending publication that is held although it is due.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    sqlx::FromRow,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
pub struct HeldBack {
    /// coderd's id of the usage event.
    pub event_id: String,
    /// When the usage happened. It expires 30 days later.
    pub created_at: DateTime<Utc>,
    /// When the hold began.
    pub since: DateTime<Utc>,
    /// The cause of the hold.
    pub held_for: HeldFor,
    /// The reason, and the condition that releases it.
    pub why: String,
    /// Whether a collector's signature or an audit has shown that coderd had the event.
    #[serde(default)]
    pub confirmed: bool,
}

/// The backlog of one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// All pending events.
    pub events: i64,
    /// Of these, events that are held although they are due.
    pub held_back: i64,
    /// Of these, events that the vendor may have accepted.
    pub unanswered: i64,
    /// When the oldest of them happened.
    pub oldest: Option<DateTime<Utc>>,
}

/// Leases at most `limit` due rows of events later than `after`: rows that are not held, oldest
/// event first, then held rows, the earliest due first. A row that is not due, or that another
/// request has leased, does not hold back the others.
///
/// Reads the leased rows by key, because the planner does not know `limit` and would read whole
/// tables. The search passes rows that are not held and are leased or not due. Of the held rows it
/// passes only leased ones.
pub async fn lease(
    conn: &mut PgConnection,
    source_id: i16,
    holder: &str,
    after: DateTime<Utc>,
    limit: i64,
    length: Duration,
    now: DateTime<Utc>,
) -> Result<Vec<Publication>, sqlx::Error> {
    lease_up_to(conn, source_id, holder, after, [limit, limit], length, now).await
}

/// The same without held rows.
pub async fn lease_unheld(
    conn: &mut PgConnection,
    source_id: i16,
    holder: &str,
    after: DateTime<Utc>,
    limit: i64,
    length: Duration,
    now: DateTime<Utc>,
) -> Result<Vec<Publication>, sqlx::Error> {
    lease_up_to(conn, source_id, holder, after, [limit, 0], length, now).await
}

/// The limits are of all rows and of held rows.
async fn lease_up_to(
    conn: &mut PgConnection,
    source_id: i16,
    holder: &str,
    after: DateTime<Utc>,
    [limit, held]: [i64; 2],
    length: Duration,
    now: DateTime<Utc>,
) -> Result<Vec<Publication>, sqlx::Error> {
    let rows = sqlx::query(
        "with unheld as (
             select event_id from publication
             where source_id = $1 and state = 'pending' and held_for is null and (next_attempt_at <= $2 or next_attempt_at > $7)
                 and event_created_at > $3 and (leased_until is null or leased_until <= clock_timestamp())
             order by event_created_at, event_id limit $4 for update skip locked
         ), held as (
             select event_id from publication
             where source_id = $1 and state = 'pending' and held_for is not null and next_attempt_at <= $2
                 and event_created_at > $3 and (leased_until is null or leased_until <= clock_timestamp())
             order by next_attempt_at limit least($8, $4 - (select count(*) from unheld)) for update skip locked
         ), mistimed as (
             select event_id from publication
             where source_id = $1 and state = 'pending' and held_for is not null and next_attempt_at > $7
                 and event_created_at > $3 and (leased_until is null or leased_until <= clock_timestamp())
             order by next_attempt_at
             limit least($8, $4 - (select count(*) from unheld) - (select count(*) from held)) for update skip locked
         ), due as (
             select event_id from unheld union all select event_id from held union all select event_id from mistimed
         ), leased as (
             update publication set leased_by = $5, leased_until = clock_timestamp() + make_interval(secs => $6)
             where source_id = $1 and event_id = any(array(select event_id from due))
             returning event_id, unanswered, last_message, refusals, held_since,
                 held_for is not distinct from 'vendor_refuses' and refusals > 0 as refused_alone
         )
         select usage.id, coalesce(corrected.event_type, usage.event_type) as event_type,
             coalesce(corrected.quantity, usage.quantity)::text as quantity, coalesce(corrected.event_time, usage.created_at) as created_at,
             usage.publish_started_at, usage.published_at, usage.failure_message,
             usage.confirmed_at is not null or corrected.event_id is not null as confirmed, leased.unanswered, leased.last_message,
             leased.refusals, leased.refused_alone, leased.held_since
         from usage_event usage join leased on leased.event_id = usage.id
             left join lateral newest_correction(usage.source_id, usage.id) corrected on true
         where usage.source_id = $1 and usage.id = any(array(select event_id from leased))
         order by 4, usage.id",
    )
    .bind(source_id)
    .bind(now)
    .bind(after)
    .bind(limit)
    .bind(holder)
    .bind(length.as_secs_f64())
    .bind(now + LONGEST_WAIT)
    .bind(held)
    .fetch_all(&mut *conn)
    .await?;
    rows.iter().map(publication_of).collect()
}

/// Releases leased rows without an attempt. After an error the leases expire.
pub async fn postpone(
    conn: &mut PgConnection,
    source_id: i16,
    holder: &str,
    postponed: &[Postponed],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    let ids: Vec<&str> = postponed.iter().map(|one| one.event_id.as_str()).collect();
    lock(&mut tx, source_id, &ids).await?;
    sqlx::query(
        "update publication set next_attempt_at = new.next_attempt_at, last_message = new.message,
             held_for = new.held_for,
             held_since = case when new.held_for is not null then coalesce(held_since, $7) end,
             leased_by = null, leased_until = null
         from unnest($3::text[], $4::text[], $5::timestamptz[], $6::text[])
             as new (event_id, message, next_attempt_at, held_for)
         where publication.source_id = $1 and publication.event_id = new.event_id and state = 'pending' and leased_by = $2",
    )
    .bind(source_id)
    .bind(holder)
    .bind(&ids)
    .bind(postponed.iter().map(|one| one.message.as_deref()).collect::<Vec<_>>())
    .bind(postponed.iter().map(|one| one.next_attempt_at).collect::<Vec<_>>())
    .bind(postponed.iter().map(|one| one.held_for).collect::<Vec<_>>())
    .bind(now)
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

/// Holds these pending rows, each with its reason, unless a publisher has leased them or they are
/// already held. When the publisher next compares coderd's row, it ends the hold or sets its own
/// reason.
pub async fn hold(
    conn: &mut PgConnection,
    source_id: i16,
    held: &[(String, String)],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let (ids, reasons): (Vec<&str>, Vec<&str>) =
        held.iter().map(|(id, why)| (id.as_str(), why.as_str())).unzip();
    let mut tx = conn.begin().await?;
    lock(&mut tx, source_id, &ids).await?;
    sqlx::query(
        "update publication set last_message = new.message, held_for = 'coderd_differs', held_since = $4
         from unnest($2::text[], $3::text[]) as new (event_id, message)
         where publication.source_id = $1 and publication.event_id = new.event_id and state = 'pending' and held_since is null
             and (leased_until is null or leased_until <= clock_timestamp())",
    )
    .bind(source_id)
    .bind(&ids)
    .bind(reasons)
    .bind(now)
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

/// Ends the leases of these rows and changes nothing else. After an error the leases expire.
pub async fn release(
    conn: &mut PgConnection,
    source_id: i16,
    holder: &str,
    ids: &[String],
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    lock(&mut tx, source_id, ids).await?;
    sqlx::query(
        "update publication set leased_by = null, leased_until = null
         where source_id = $1 and event_id = any($2) and state = 'pending' and leased_by = $3",
    )
    .bind(source_id)
    .bind(ids)
    .bind(holder)
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

/// A page of pending events of time `until` or older that follow the key `after`, by time and id.
/// Rows that another publisher has leased are left out: an attempt may be in flight.
pub async fn old(
    conn: &mut PgConnection,
    source_id: i16,
    until: DateTime<Utc>,
    after: Option<&(DateTime<Utc>, String)>,
    limit: i64,
) -> Result<Vec<(DateTime<Utc>, String)>, sqlx::Error> {
    sqlx::query_as(
        "select event_created_at, event_id from publication
         where source_id = $1 and state = 'pending' and event_created_at <= $2
             and (leased_until is null or leased_until <= clock_timestamp())
             and ($3::timestamptz is null or (event_created_at, event_id) > ($3, $4))
         order by event_created_at, event_id limit $5",
    )
    .bind(source_id)
    .bind(until)
    .bind(after.map(|(created_at, _)| created_at))
    .bind(after.map(|(_, id)| id))
    .bind(limit)
    .fetch_all(conn)
    .await
}

/// Settles pending rows that `holder` has leased or that are not leased, in one batch, if there are
/// any. The batch also covers the source's requests without an answer. While a restored ledger
/// catches up, no event is treated as too old.
pub async fn settle(
    conn: &mut PgConnection,
    source_id: i16,
    holder: &str,
    ids: &[String],
    settlement: Settlement,
    now: DateTime<Utc>,
) -> Result<Settled, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let free: Vec<String> = sqlx::query_scalar(
        "select event_id from publication
         where source_id = $1 and event_id = any($2) and state = 'pending'
             and (leased_until is null or leased_until <= clock_timestamp() or leased_by = $3)
             and ($4 or not exists (select from recovery where closed_at is null))
         order by event_id for update",
    )
    .bind(source_id)
    .bind(ids)
    .bind(holder)
    .bind(settlement == Settlement::NotOurs)
    .fetch_all(&mut *tx)
    .await?;
    if free.is_empty() {
        return Ok(Settled::default());
    }
    let batch_id = insert_verdicts(&mut tx, now, free.len()).await?;
    let states: Vec<PublicationState> = sqlx::query_scalar(
        "with settled as (
             update publication set held_for = null, held_since = null, leased_by = null, leased_until = null,
                 state = case when $4 then 'not_ours' when unanswered then 'unknown' else 'expired' end
             where source_id = $1 and event_id = any($2) returning event_id, state
         )
         insert into settlement (source_id, event_id, batch_id, state) select $1, event_id, $3, state from settled returning state",
    )
    .bind(source_id)
    .bind(&free)
    .bind(batch_id)
    .bind(settlement == Settlement::NotOurs)
    .fetch_all(&mut *tx)
    .await?;
    cover(&mut tx, source_id, batch_id, now).await?;
    tx.commit().await?;
    let count = |state| states.iter().filter(|found| **found == state).count();
    Ok(Settled {
        not_ours: count(PublicationState::NotOurs),
        expired: count(PublicationState::Expired),
        unknown: count(PublicationState::Unknown),
    })
}

/// The backlog of a source. Reads the pending rows only.
pub async fn pending(conn: &mut PgConnection, source_id: i16) -> Result<Pending, sqlx::Error> {
    oldest_pending(conn, source_id, None).await
}

/// The same of the `limit` oldest pending rows. Reads no others.
pub async fn oldest_pending(
    conn: &mut PgConnection,
    source_id: i16,
    limit: Option<i64>,
) -> Result<Pending, sqlx::Error> {
    let row = sqlx::query(
        "select count(*), count(held_since), count(*) filter (where unanswered), min(event_created_at) from (
             select held_since, unanswered, event_created_at from publication
             where source_id = $1 and state = 'pending' order by event_created_at, event_id limit $2
         ) oldest",
    )
    .bind(source_id)
    .bind(limit)
    .fetch_one(conn)
    .await?;
    Ok(Pending {
        events: row.try_get(0)?,
        held_back: row.try_get(1)?,
        unanswered: row.try_get(2)?,
        oldest: row.try_get(3)?,
    })
}

/// The first pending rows that are held, by time and id.
pub async fn held(
    conn: &mut PgConnection,
    source_id: i16,
    limit: i64,
) -> Result<Vec<HeldBack>, sqlx::Error> {
    sqlx::query_as(
        "select event_id, event_created_at as created_at, held_since as since, held_for, last_message as why,
             confirmed_at is not null or exists (select from correction c where c.source_id = usage.source_id and c.event_id = usage.id) as confirmed
         from publication join usage_event usage on usage.source_id = publication.source_id and usage.id = event_id
         where publication.source_id = $1 and state = 'pending' and held_since is not null order by event_created_at, event_id limit $2",
    )
    .bind(source_id)
    .bind(limit)
    .fetch_all(conn)
    .await
}

/// Locks rows in a fixed order, so that two writers never deadlock. Each writer of several rows
/// calls it first.
pub(super) async fn lock(
    tx: &mut PgConnection,
    source_id: i16,
    ids: &[impl AsRef<str>],
) -> Result<(), sqlx::Error> {
    sqlx::query("select from publication where source_id = $1 and event_id = any($2) order by event_id for update")
        .bind(source_id)
        .bind(ids.iter().map(AsRef::as_ref).collect::<Vec<&str>>())
        .execute(tx)
        .await?;
    Ok(())
}

/// Marks all pending publications as possibly sent, because the lost time may contain requests. If
/// they expire, their state is `unknown`.
pub(super) async fn doubt_pending(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query(
        "select from publication where state = 'pending' order by source_id, event_id for update",
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "update publication set unanswered = true where state = 'pending' and not unanswered",
    )
    .execute(tx)
    .await?;
    Ok(())
}

pub(super) async fn insert_verdicts(
    tx: &mut PgConnection,
    now: DateTime<Utc>,
    settled: usize,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "insert into batch (kind, recorded_at, settled) values ('verdicts', $1, $2) returning id",
    )
    .bind(now)
    .bind(i32::try_from(settled).unwrap_or(i32::MAX))
    .fetch_one(tx)
    .await
}

fn publication_of(row: &PgRow) -> Result<Publication, sqlx::Error> {
    let usage = rows::usage_of(row)?;
    Ok(Publication {
        event_id: usage.id,
        quantity: usage.quantity,
        created_at: usage.created_at,
        unanswered: row.try_get("unanswered")?,
        refusals: u32::try_from(row.try_get::<i32, _>("refusals")?).unwrap_or(u32::MAX),
        refused_alone: row.try_get("refused_alone")?,
        held_since: row.try_get("held_since")?,
        confirmed: row.try_get("confirmed")?,
        last_message: row.try_get("last_message")?,
    })
}
