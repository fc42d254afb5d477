//! Requests to the vendor: written before they are sent, and updated with the answer.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;
use uuid::Uuid;

use super::open_requests::{ANSWERED_WITHIN, cover};
use super::publications::{insert_verdicts, lock};
use super::{HeldFor, PublicationState};
use crate::words::words;

#[derive(Clone, Debug)]
pub struct NewRequest<'a> {
    pub id: Uuid,
    /// The one source of all its events.
    pub source_id: i16,
    /// SHA-256 of the license token that signs the request.
    pub license_sha256: [u8; 32],
    /// The events, all leased by `holder`.
    pub event_ids: Vec<&'a str>,
    pub holder: &'a str,
    /// How long the leases last from now.
    pub lease: Duration,
}

words! {
    /// The result of one event in one request.
    AttemptVerdict {
        /// The vendor accepted the event, and it is published.
        Accepted = "accepted",
        /// The vendor refused the event permanently.
        Refused = "refused",
        /// The vendor refused the event temporarily.
        RefusedForNow = "refused_for_now",
        /// The answer does not contain the event.
        LeftOut = "left_out",
        /// The whole request failed.
        Failed = "failed",
    }
}

/// The verdict on one event, and the next step if the event stays pending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    pub event_id: String,
    pub verdict: AttemptVerdict,
    /// The vendor's message, or the request's failure.
    pub message: Option<String>,
    /// When the next attempt is due.
    pub next_attempt_at: DateTime<Utc>,
    /// Whether the vendor may have accepted this attempt or an earlier one.
    pub unanswered: bool,
    /// The reason why the event is held until then, if it is.
    pub held_for: Option<HeldFor>,
}

impl Attempt {
    /// Whether the vendor has decided on the event.
    fn is_final(&self) -> bool {
        matches!(self.verdict, AttemptVerdict::Accepted | AttemptVerdict::Refused)
    }
}

/// The outcome of a request.
#[derive(Clone, Debug)]
pub struct RequestOutcome<'a> {
    pub id: Uuid,
    pub source_id: i16,
    pub holder: &'a str,
    /// When the answer arrived; none: no answer arrived.
    pub answered_at: Option<DateTime<Utc>>,
    pub status: Option<u16>,
    /// The reason why the request has no verdicts.
    pub error: Option<String>,
    /// One attempt for each event of the request.
    pub attempts: Vec<Attempt>,
    /// How long the events that stay pending remain leased from now. None: their leases end.
    pub lease: Option<Duration>,
}

/// The result of recording an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// The outcome is recorded now.
    Now,
    /// The outcome was recorded before; nothing is changed.
    Before,
    /// The ledger lacks the request that was written before it was sent, because it was restored
    /// since then. Nothing is changed: the recovery marks pending publications as possibly sent,
    /// and the vendor bills an id only once.
    RequestLost,
}

/// The latest request to the vendor for one source.
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
pub struct LastRequest {
    /// The id of the request, under which its verdicts are recorded.
    pub id: Uuid,
    /// When the request was written to the ledger, just before it was sent.
    pub sent_at: DateTime<Utc>,
    /// When the answer arrived; absent: none is recorded.
    pub answered_at: Option<DateTime<Utc>>,
    /// The HTTP status of the answer.
    pub status: Option<i32>,
    /// The reason why the request has no verdicts.
    pub error: Option<String>,
    /// The number of its events by verdict: accepted, refused, refused for now, left out, or
    /// failed.
    #[sqlx(json)]
    pub verdicts: std::collections::BTreeMap<AttemptVerdict, i64>,
}

/// The source's latest request; none before the first.
pub async fn last(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<Option<LastRequest>, sqlx::Error> {
    sqlx::query_as(
        "select id, sent_at, answered_at, status, error, covered_verdicts as verdicts
         from covered_request where source_id = $1 order by sent_at desc limit 1",
    )
    .bind(source_id)
    .fetch_optional(conn)
    .await
}

/// Writes the request and its attempts, commits, and extends the leases. From then on its events
/// are treated as sent. False: a lease was lost, or the ledger is restored; nothing is written and
/// nothing may be sent. After an error nothing may be sent.
///
/// One statement. It locks the rows in the order of [`lock`] before it writes any.
pub async fn begin(
    conn: &mut PgConnection,
    request: &NewRequest<'_>,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let written = sqlx::query(
        "with locked as materialized (
             select event_id from publication
             where source_id = $1 and event_id = any($2) and state = 'pending' and leased_by = $3 and leased_until > clock_timestamp()
                 and not exists (select from recovery where closed_at is null)
             order by event_id for update
         ), extended as (
             update publication set attempts = attempts + 1, unanswered = true, leased_until = clock_timestamp() + make_interval(secs => $4)
             where source_id = $1 and event_id = any(array(select event_id from locked)) and (select count(*) from locked) = $7
             returning event_id
         ), request as (
             insert into publication_request (id, source_id, license_sha256, events, sent_at)
             select $5, $1, $6, $7, $8 where exists (select from extended)
         )
         insert into publication_attempt (request_id, source_id, event_id, content_batch_id)
         select $5, $1, event_id, (select batch_id from newest_correction($1, event_id)) from extended",
    )
    .bind(request.source_id)
    .bind(&request.event_ids)
    .bind(request.holder)
    .bind(request.lease.as_secs_f64())
    .bind(request.id)
    .bind(request.license_sha256.as_slice())
    .bind(i32::try_from(request.event_ids.len()).unwrap_or(i32::MAX))
    .bind(now)
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == request.event_ids.len() as u64)
}

/// Records an outcome in one batch: the verdicts, and each event's final state or next attempt. A
/// second call changes nothing. A final verdict is recorded even after the lease has expired; the
/// next attempt is set only while the lease is held.
pub async fn record_outcome(
    conn: &mut PgConnection,
    outcome: &RequestOutcome<'_>,
    now: DateTime<Utc>,
) -> Result<Recorded, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let ids: Vec<&str> = outcome.attempts.iter().map(|attempt| attempt.event_id.as_str()).collect();
    lock(&mut tx, outcome.source_id, &ids).await?;
    let batch_id = insert_verdicts(&mut tx, now, 0).await?;
    let open = sqlx::query(
        "update publication_request set answered_at = $2, status = $3, error = $4, batch_id = $5 where id = $1 and batch_id is null",
    )
    .bind(outcome.id)
    .bind(outcome.answered_at)
    .bind(outcome.status.map(i32::from))
    .bind(&outcome.error)
    .bind(batch_id)
    .execute(&mut *tx)
    .await?;
    if open.rows_affected() == 0 {
        let query = "select exists (select from publication_request where id = $1)";
        let exists: bool = sqlx::query_scalar(query).bind(outcome.id).fetch_one(&mut *tx).await?;
        return Ok(if exists { Recorded::Before } else { Recorded::RequestLost });
    }
    record_attempts(&mut tx, outcome).await?;
    settle(&mut tx, outcome, batch_id).await?;
    reschedule(&mut tx, outcome, now).await?;
    cover(&mut tx, outcome.source_id, batch_id, now - ANSWERED_WITHIN).await?;
    tx.commit().await?;
    Ok(Recorded::Now)
}

async fn record_attempts(
    tx: &mut PgConnection,
    outcome: &RequestOutcome<'_>,
) -> Result<(), sqlx::Error> {
    let attempts = &outcome.attempts;
    sqlx::query(
        "update publication_attempt set verdict = new.verdict, message = new.message
         from unnest($3::text[], $4::text[], $5::text[]) as new (event_id, verdict, message)
         where request_id = $1 and source_id = $2 and publication_attempt.event_id = new.event_id",
    )
    .bind(outcome.id)
    .bind(outcome.source_id)
    .bind(attempts.iter().map(|attempt| attempt.event_id.as_str()).collect::<Vec<_>>())
    .bind(attempts.iter().map(|attempt| attempt.verdict).collect::<Vec<_>>())
    .bind(attempts.iter().map(|attempt| attempt.message.as_deref()).collect::<Vec<_>>())
    .execute(tx)
    .await?;
    Ok(())
}

/// The vendor's verdict is final. A late verdict replaces `unknown`, `not_ours` and `withdrawn`,
/// which the vendor did not decide. An acceptance also replaces a refusal of the same event.
///
/// The vendor bills the first content that it accepts. Of a corrected event, this is the content
/// that it may have accepted before a correction, or else that of this request.
async fn settle(
    tx: &mut PgConnection,
    outcome: &RequestOutcome<'_>,
    batch_id: i64,
) -> Result<(), sqlx::Error> {
    let settled: Vec<&Attempt> = outcome.attempts.iter().filter(|one| one.is_final()).collect();
    if settled.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "with settled as (
             update publication set state = new.state, unanswered = false, last_message = new.message, held_for = null, held_since = null,
                 leased_by = null, leased_until = null
             from unnest($3::text[], $4::text[], $5::text[]) as new (event_id, state, message)
             where publication.source_id = $1 and publication.event_id = new.event_id
                 and (publication.state in ('pending', 'unknown', 'not_ours', 'withdrawn') or publication.state = 'refused' and new.state = 'published')
             returning publication.event_id, publication.state
         )
         insert into settlement (source_id, event_id, batch_id, state, content_batch_id)
         select $1, event_id, $2, state, case when state = 'published' and exists (select from newest_correction($1, event_id)) then (
             select content from (
                 select c.batch_id as until, (select max(earlier.batch_id) from correction earlier
                     where earlier.source_id = $1 and earlier.event_id = c.event_id and earlier.batch_id < c.batch_id) as content
                 from correction c where c.source_id = $1 and c.event_id = settled.event_id and c.unanswered
                 union all
                 select null, content_batch_id from publication_attempt where request_id = $6 and source_id = $1 and event_id = settled.event_id
             ) as sent order by until nulls last limit 1) end
         from settled",
    )
    .bind(outcome.source_id)
    .bind(batch_id)
    .bind(settled.iter().map(|one| one.event_id.as_str()).collect::<Vec<_>>())
    .bind(
        settled
            .iter()
            .map(|one| if one.verdict == AttemptVerdict::Accepted { PublicationState::Published } else { PublicationState::Refused })
            .collect::<Vec<_>>(),
    )
    .bind(settled.iter().map(|one| one.message.as_deref()).collect::<Vec<_>>())
    .bind(outcome.id)
    .execute(tx)
    .await?;
    Ok(())
}

async fn reschedule(
    tx: &mut PgConnection,
    outcome: &RequestOutcome<'_>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let retried: Vec<&Attempt> = outcome.attempts.iter().filter(|one| !one.is_final()).collect();
    if retried.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "update publication set next_attempt_at = new.next_attempt_at, unanswered = new.unanswered, last_message = new.message,
             refusals = refusals + new.refused, held_for = new.held_for,
             held_since = case when new.held_for is not null then coalesce(held_since, $9) end,
             leased_by = case when $10::double precision is not null then leased_by end,
             leased_until = clock_timestamp() + make_interval(secs => $10)
         from unnest($3::text[], $4::timestamptz[], $5::boolean[], $6::text[], $7::integer[], $8::text[])
             as new (event_id, next_attempt_at, unanswered, message, refused, held_for)
         where publication.source_id = $1 and publication.event_id = new.event_id and state = 'pending' and leased_by = $2",
    )
    .bind(outcome.source_id)
    .bind(outcome.holder)
    .bind(retried.iter().map(|one| one.event_id.as_str()).collect::<Vec<_>>())
    .bind(retried.iter().map(|one| one.next_attempt_at).collect::<Vec<_>>())
    .bind(retried.iter().map(|one| one.unanswered).collect::<Vec<_>>())
    .bind(retried.iter().map(|one| one.message.as_deref()).collect::<Vec<_>>())
    .bind(retried.iter().map(|one| i32::from(one.verdict != AttemptVerdict::Failed)).collect::<Vec<_>>())
    .bind(retried.iter().map(|one| one.held_for).collect::<Vec<_>>())
    .bind(now)
    .bind(outcome.lease.map(|lease| lease.as_secs_f64()))
    .execute(tx)
    .await?;
    Ok(())
}
