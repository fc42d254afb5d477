//! What is known of one event beside its row: refusals under its id, its publication, the files that hold it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::FromRow;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ActKind, AttemptVerdict, HeldFor, Ledger, PublicationState, RejectState, Sequence, Verdict};
use crate::event::RejectCause;

/// A record under the event's id that is no accepted event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct RefusalLife {
    /// The reject's own id.
    pub id: i64,
    /// The deployment that its headers name, if they name one.
    pub deployment_id: Option<Uuid>,
    /// The topic's name.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// Which life of the partition.
    pub generation: i32,
    /// The record's offset.
    pub log_offset: i64,
    /// What it is.
    pub verdict: Verdict,
    /// Why, in one word.
    pub cause: RejectCause,
    /// What is wrong.
    pub detail: String,
    /// Its state.
    pub state: RejectState,
    /// The type that its headers name, if they name one.
    pub event_type: Option<String>,
    /// What is at stake, in its type's unit: an unsigned number of 64 bits, in decimal.
    pub units: Option<String>,
    /// When it was recorded.
    pub recorded_at: DateTime<Utc>,
    /// Its batch's place in the ledger's order.
    pub sequence: Option<Sequence>,
    /// What an operator, or an upgrade, did to it, the first thing first.
    #[sqlx(json)]
    pub acts: Vec<ActOnRefusal>,
}

/// An act of an operator, or of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ActOnRefusal {
    /// What.
    pub act: ActKind,
    /// Who.
    pub actor: String,
    /// Why.
    pub reason: String,
    /// When.
    pub acted_at: DateTime<Utc>,
}

/// What became of an event on its way to the vendor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct PublicationLife {
    /// Its state.
    pub state: PublicationState,
    /// The ledger sequence of the batch that settled it.
    pub settled_sequence: Option<Sequence>,
    /// When that was recorded.
    pub settled_at: Option<DateTime<Utc>>,
    /// When it is due again; only while it is pending.
    pub next_attempt_at: Option<DateTime<Utc>>,
    /// Whether an attempt was sent and no answer to it is recorded.
    pub unanswered: bool,
    /// What holds it back although it is due.
    pub held_for: Option<HeldFor>,
    /// What there is to say of it now.
    pub last_message: Option<String>,
    /// Every attempt, the first one first.
    #[sqlx(skip)]
    pub attempts: Vec<PublicationAttempt>,
}

/// One request that carried the event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct PublicationAttempt {
    /// The request.
    pub request_id: Uuid,
    /// When it was written down, just before it was sent.
    pub sent_at: DateTime<Utc>,
    /// When an answer came.
    pub answered_at: Option<DateTime<Utc>>,
    /// The answer's HTTP status.
    pub status: Option<i32>,
    /// Why there are no verdicts.
    pub error: Option<String>,
    /// What was said of this event; none: nothing is recorded.
    pub verdict: Option<AttemptVerdict>,
    /// The vendor's message, or the request's failure.
    pub message: Option<String>,
    /// SHA-256 of the license token that signed it, in hexadecimal.
    pub license_sha256: String,
    /// The ledger sequence of the recorded answer.
    pub sequence: Option<Sequence>,
}

/// A file for finance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct ExportLife {
    /// Its row's id.
    pub id: i64,
    /// When it was written.
    pub exported_at: DateTime<Utc>,
    /// Who asked for it.
    pub actor: String,
    /// Why.
    pub reason: String,
    /// As known at this ledger sequence.
    pub sequence: Sequence,
    /// Usage at or after this instant.
    pub first_instant: DateTime<Utc>,
    /// And before this one.
    pub end_instant: DateTime<Utc>,
    /// The file's form.
    pub format: String,
    /// Its rows.
    pub events: i64,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

/// A file that was written.
#[derive(Clone, Copy, Debug)]
pub struct NewExport<'a> {
    pub actor: &'a str,
    pub reason: &'a str,
    /// Which usage it holds.
    pub range: &'a super::UsageRange,
    pub format: &'static str,
    /// Its rows.
    pub events: u64,
    /// SHA-256 of its bytes.
    pub sha256: [u8; 32],
}

impl Ledger {
    /// The records that were refused under an event's id, the first one first; of one deployment, or of all and of none.
    pub async fn refusals_of(&self, event_id: &str, deployment: Option<Uuid>) -> Result<Vec<RefusalLife>, sqlx::Error> {
        sqlx::query_as(
            "select r.id, r.deployment_id, r.topic, r.partition, r.generation, r.log_offset, r.verdict, r.cause, r.detail, r.state,
                 r.event_type, r.units::text as units, r.recorded_at, named_sequence(b.sequence) as sequence,
                 (select coalesce(jsonb_agg(jsonb_build_object('act', a.act, 'actor', a.actor, 'reason', a.reason, 'acted_at', a.acted_at)
                      order by a.id), '[]')
                  from operator_act a
                  where a.reject_id = r.id) as acts
             from reject r left join batch b on b.id = r.batch_id
             where r.event_id = $1 and ($2::uuid is null or r.deployment_id = $2) order by r.id",
        )
        .bind(event_id)
        .bind(deployment)
        .fetch_all(&self.pool)
        .await
    }

    /// The publication of a usage event, with every attempt.
    pub async fn publication_of(&self, source_id: i16, event_id: &str) -> Result<Option<PublicationLife>, sqlx::Error> {
        let life: Option<PublicationLife> = sqlx::query_as(
            "select p.state, named_sequence(b.sequence) as settled_sequence, b.recorded_at as settled_at, p.unanswered, p.held_for, p.last_message,
                 case when p.state = 'pending' then p.next_attempt_at end as next_attempt_at
             from publication p left join settlement s using (source_id, event_id) left join batch b on b.id = s.batch_id
             where p.source_id = $1 and p.event_id = $2 order by b.sequence desc nulls last limit 1",
        )
        .bind(source_id)
        .bind(event_id)
        .fetch_optional(&self.pool)
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
        .fetch_all(&self.pool)
        .await?;
        Ok(Some(life))
    }

    /// The files that hold a usage event of this time that was accepted at this sequence. Rows of an earlier incarnation were written before
    /// the backup from which this one was restored, so their sequences are in its past, too.
    pub async fn exports_of(&self, source_id: i16, created_at: DateTime<Utc>, accepted_at: i64) -> Result<Vec<ExportLife>, sqlx::Error> {
        sqlx::query_as(
            "select id, exported_at, actor, reason, incarnation || ':' || sequence as sequence, first_instant, end_instant, format, events, encode(sha256, 'hex') as sha256
             from export_file
             where first_instant <= $2 and end_instant > $2 and (source_id is null or source_id = $1) and sequence >= $3
             order by id",
        )
        .bind(source_id)
        .bind(created_at)
        .bind(accepted_at)
        .fetch_all(&self.pool)
        .await
    }

    /// Writes down that a file was written, and answers the row's id. It is no batch: what is exported does not change the ledger.
    pub async fn record_export(&self, export: &NewExport<'_>) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar(
            "insert into export_file (exported_at, actor, reason, incarnation, sequence, first_instant, end_instant, source_id, format, events,
                 sha256)
             values ($1, $2, $3, $4, $5, $6, $7, (select id from source where deployment_id = $8), $9, $10, $11) returning id",
        )
        .bind(self.clock.now())
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
        .fetch_one(&self.pool)
        .await
    }
}
