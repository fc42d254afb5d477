//! Facts about one event besides its row: refusals under its id, its publication, and the exported
//! files with it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::FromRow;
use sqlx::PgConnection;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    ActKind, AttemptVerdict, Disposition, Head, HeldFor, PublicationState, RejectState, Sequence,
};
use crate::event::RejectCause;

/// A record under the event's id that is not accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct RefusalHistory {
    /// The id of the reject.
    pub id: i64,
    /// The deployment in the record's headers, if any.
    pub deployment_id: Option<Uuid>,
    /// The name of the topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The generation of the partition.
    pub generation: i32,
    /// The offset of the record.
    pub log_offset: i64,
    /// The disposition of the record.
    pub disposition: Disposition,
    /// The cause, in one word.
    pub cause: RejectCause,
    /// The fault in the record.
    pub detail: String,
    /// The state of the reject.
    pub state: RejectState,
    /// The event type in the record's headers, if any.
    pub event_type: Option<String>,
    /// The unbilled usage in its type's unit: an unsigned 64-bit number, in decimal.
    pub units: Option<String>,
    /// When the record was recorded.
    pub recorded_at: DateTime<Utc>,
    /// When retention removed the record's headers and body; absent: they are kept.
    #[serde(default)]
    pub payload_removed_at: Option<DateTime<Utc>>,
    /// The ledger sequence of its batch.
    pub sequence: Option<Sequence>,
    /// The acts of operators or upgrades on the reject, in order.
    #[sqlx(json)]
    pub acts: Vec<ActOnRefusal>,
}

/// An act of an operator or of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ActOnRefusal {
    /// The kind of act.
    pub act: ActKind,
    /// The actor.
    pub actor: String,
    /// The reason.
    pub reason: String,
    /// When the act was done.
    pub acted_at: DateTime<Utc>,
}

/// The publication of a usage event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct PublicationHistory {
    /// The state of the publication.
    pub state: PublicationState,
    /// The ledger sequence of the batch that settled it.
    pub settled_sequence: Option<Sequence>,
    /// When that batch was recorded.
    pub settled_at: Option<DateTime<Utc>>,
    /// When the next attempt is due; only while it is pending.
    pub next_attempt_at: Option<DateTime<Utc>>,
    /// Whether an attempt was sent whose answer is not recorded.
    pub unanswered: bool,
    /// The reason why it is held although it is due.
    pub held_for: Option<HeldFor>,
    /// The latest message about it.
    pub last_message: Option<String>,
    /// All attempts, in order, except the removed ones.
    #[sqlx(skip)]
    pub attempts: Vec<PublicationAttempt>,
    /// The number of earlier attempts that retention has removed.
    #[serde(default)]
    pub removed_attempts: i32,
    /// When retention removed the attempts of the request that settled it; absent: it did not, or
    /// the vendor did not settle it.
    #[serde(default)]
    pub attempts_removed_at: Option<DateTime<Utc>>,
}

/// One request that contained the event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct PublicationAttempt {
    /// The id of the request.
    pub request_id: Uuid,
    /// When the request was written to the ledger, just before it was sent.
    pub sent_at: DateTime<Utc>,
    /// When the answer arrived.
    pub answered_at: Option<DateTime<Utc>>,
    /// The HTTP status of the answer.
    pub status: Option<i32>,
    /// The reason why the request has no verdicts.
    pub error: Option<String>,
    /// The vendor's verdict on this event; absent: not recorded.
    pub verdict: Option<AttemptVerdict>,
    /// The vendor's message, or the request's failure.
    pub message: Option<String>,
    /// SHA-256 of the license token that signed the request, in hexadecimal.
    pub license_sha256: String,
    /// The ledger sequence of the recorded answer.
    pub sequence: Option<Sequence>,
}

/// An exported file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct ExportHistory {
    /// The id of the export.
    pub id: i64,
    /// When the file was written.
    pub exported_at: DateTime<Utc>,
    /// The operator who exported it.
    pub actor: String,
    /// The reason.
    pub reason: String,
    /// The ledger sequence of the exported state.
    pub sequence: Sequence,
    /// The ledger's head at that sequence; absent: the ledger lacked the batch.
    pub head: Option<Head>,
    /// The file has usage at or after this instant.
    pub first_instant: DateTime<Utc>,
    /// The file has usage before this instant.
    pub end_instant: DateTime<Utc>,
    /// The file format.
    pub format: String,
    /// The number of rows.
    pub events: i64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// An exported file to record.
#[derive(Clone, Copy, Debug)]
pub struct NewExport<'a> {
    pub actor: &'a str,
    pub reason: &'a str,
    pub range: &'a super::UsageRange,
    pub format: &'static str,
    /// The number of rows.
    pub events: u64,
    /// SHA-256 of the file.
    pub sha256: [u8; 32],
}

/// The refused records under an event's id, in order. Without a deployment: those of all
/// deployments and of none.
pub async fn refusals(
    conn: &mut PgConnection,
    event_id: &str,
    deployment: Option<Uuid>,
) -> Result<Vec<RefusalHistory>, sqlx::Error> {
    sqlx::query_as(
        "select r.id, r.deployment_id, r.topic, r.partition, r.generation, r.log_offset, r.disposition, r.cause, r.detail, r.state,
             r.event_type, r.units::text as units, r.recorded_at, r.payload_removed_at, named_sequence(b.sequence) as sequence,
             (select coalesce(jsonb_agg(jsonb_build_object('act', a.act, 'actor', a.actor, 'reason', a.reason, 'acted_at', a.acted_at)
                  order by a.id), '[]')
              from operator_act a
              where a.reject_id = r.id) as acts
         from reject r left join batch b on b.id = r.batch_id
         where r.event_id = $1 and ($2::uuid is null or r.deployment_id = $2) order by r.id",
    )
    .bind(event_id)
    .bind(deployment)
    .fetch_all(conn)
    .await
}

/// The publication of a usage event, with all attempts.
pub async fn publication(
    conn: &mut PgConnection,
    source_id: i16,
    event_id: &str,
) -> Result<Option<PublicationHistory>, sqlx::Error> {
    let life: Option<PublicationHistory> = sqlx::query_as(
        "select p.state, named_sequence(b.sequence) as settled_sequence, b.recorded_at as settled_at, p.unanswered, p.held_for, p.last_message,
             p.removed_attempts, (select attempts_removed_at from publication_request where batch_id = b.id) as attempts_removed_at,
             case when p.state = 'pending' then p.next_attempt_at end as next_attempt_at
         from publication p left join settlement s using (source_id, event_id) left join batch b on b.id = s.batch_id
         where p.source_id = $1 and p.event_id = $2 order by b.sequence desc nulls last limit 1",
    )
    .bind(source_id)
    .bind(event_id)
    .fetch_optional(&mut *conn)
    .await?;
    let Some(mut life) = life else { return Ok(None) };
    life.attempts = sqlx::query_as(
        "select a.request_id, r.sent_at, r.answered_at, r.status, r.error, a.verdict, a.message,
             encode(r.license_sha256, 'hex') as license_sha256, named_sequence(b.sequence) as sequence
         from publication_attempt a join publication_request r on r.id = a.request_id left join batch b on b.id = r.batch_id
         where a.source_id = $1 and a.event_id = $2 order by r.sent_at, a.request_id",
    )
    .bind(source_id)
    .bind(event_id)
    .fetch_all(&mut *conn)
    .await?;
    Ok(Some(life))
}

/// The exported files with this usage event, which was accepted at this sequence: those whose range
/// contains its time at their sequence. Files of
/// an earlier incarnation were written before this ledger's backup, so their sequences are part of
/// its past.
pub async fn exports(
    conn: &mut PgConnection,
    source_id: i16,
    event_id: &str,
    accepted_at: i64,
) -> Result<Vec<ExportHistory>, sqlx::Error> {
    sqlx::query_as(
        "select id, exported_at, actor, reason, incarnation || ':' || sequence as sequence, incarnation || ':' || sequence || ':' || encode(chain, 'hex') as head, first_instant, end_instant, format, events, encode(sha256, 'hex') as sha256
         from export_file file
         where (source_id is null or source_id = $1) and sequence >= $3
             and exists (select from usage_as_of(file.sequence) usage where usage.source_id = $1 and usage.id = $2
                 and first_instant <= usage.created_at and end_instant > usage.created_at)
         order by id",
    )
    .bind(source_id)
    .bind(event_id)
    .bind(accepted_at)
    .fetch_all(conn)
    .await
}

/// Records an exported file and returns its id. It is not a batch, because an export does not
/// change the ledger.
pub async fn record_export(
    conn: &mut PgConnection,
    export: &NewExport<'_>,
    now: DateTime<Utc>,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "insert into export_file (exported_at, actor, reason, incarnation, sequence, chain, first_instant, end_instant, source_id, format,
             events, sha256)
         values ($1, $2, $3, $4, $5, (select batch.chain from batch where batch.sequence = $5), $6, $7, (select id from source where deployment_id = $8), $9, $10, $11) returning id",
    )
    .bind(now)
    .bind(export.actor)
    .bind(export.reason)
    .bind(export.range.as_of.incarnation)
    .bind(export.range.as_of.number)
    .bind(export.range.from)
    .bind(export.range.to)
    .bind(export.range.source)
    .bind(export.format)
    .bind(i64::try_from(export.events).unwrap_or(i64::MAX))
    .bind(export.sha256.as_slice())
    .fetch_one(conn)
    .await
}
