//! Usage for finance: accepted events and their publication states at one ledger sequence.

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{PublicationState, Sequence};
use crate::event::UsageType;

/// A range of usage, at one ledger sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageRange {
    /// Only usage created at or after this instant.
    pub from: DateTime<Utc>,
    /// Only usage created before this instant.
    pub to: DateTime<Utc>,
    /// Only usage of this deployment.
    pub source: Option<Uuid>,
    /// Only facts of batches up to this ledger sequence.
    pub as_of: Sequence,
}

/// One accepted usage event.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct UsageRow {
    pub deployment_id: Uuid,
    /// coderd's own id.
    pub event_id: String,
    /// The usage type, in Tallyman's words.
    pub event_type: UsageType,
    /// An unsigned 64-bit number, in decimal.
    pub quantity: String,
    /// When the usage happened.
    pub created_at: DateTime<Utc>,
    /// The state at the range's sequence.
    pub publication_state: PublicationState,
    /// The first request in which the vendor accepted the event.
    pub request_id: Option<Uuid>,
    /// The sequence of the batch that accepted the event.
    pub sequence: Sequence,
}

/// How far a source's usage is complete in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct UsageCompleteness {
    /// The ledger has all usage that coderd committed before this instant. None: not known.
    pub complete_until: Option<DateTime<Utc>>,
    /// Every hour before this one has its runtime row in the ledger or is over 7 days old. None:
    /// coderd has no agent runtime.
    pub runtime_complete_until: Option<DateTime<Utc>>,
    /// Whether the collector's last pass reports completeness. None before the first pass.
    pub last_pass_reports: Option<bool>,
}

/// Usage of a range that was recorded after the range's sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct LaterUsage {
    pub deployment_id: Uuid,
    /// The last sequence that recorded such usage.
    pub sequence: Sequence,
}

/// How far the source's usage is complete now. [`later_usage`] returns the later additions
/// to a range.
pub async fn completeness(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<UsageCompleteness, sqlx::Error> {
    sqlx::query_as(
        "select usage.complete_until, usage.runtime_complete_until, case when pass_id > 0 then reports end as last_pass_reports
         from collector_progress, completeness($1, $2) usage where source_id = $1",
    )
    .bind(source_id)
    .bind(crate::event::Topic::AgentUsage.name())
    .fetch_one(conn)
    .await
}

/// A deployment with usage of the range that was recorded after the range's sequence. None: no
/// deployment has any.
///
/// It reads each usage event of the range and its batch by index, about as much as the export
/// itself.
pub async fn later_usage(
    conn: &mut PgConnection,
    range: &UsageRange,
) -> Result<Option<LaterUsage>, sqlx::Error> {
    sqlx::query_as(
        "select source.deployment_id, named_sequence(max(batch.sequence)) as sequence
         from source join usage_event event on event.source_id = source.id join batch on batch.id = event.batch_id
         where event.created_at >= $1 and event.created_at < $2 and ($3::uuid is null or source.deployment_id = $3)
             and batch.sequence > $4
         group by source.deployment_id order by source.deployment_id limit 1",
    )
    .bind(range.from)
    .bind(range.to)
    .bind(range.source)
    .bind(range.as_of.number)
    .fetch_optional(conn)
    .await
}

/// The rows of the range that follow `after`, ordered by time, then id by its bytes, then
/// deployment; empty at the end. The facts of a batch never change, so that the pages of one
/// `as_of` are consistent without a common snapshot.
pub async fn usage_page(
    conn: &mut PgConnection,
    range: &UsageRange,
    after: Option<&UsageRow>,
    limit: i64,
) -> Result<Vec<UsageRow>, sqlx::Error> {
    sqlx::query_as(
        r#"
        select source.deployment_id, usage.id as event_id, usage.event_type, usage.quantity::text as quantity, usage.created_at,
            coalesce(settled.state, 'pending') as publication_state,
            accepted.request_id, $9::uuid || ':' || usage.sequence as sequence
        from source
        cross join lateral (
            select event.*, batch.sequence from usage_event event join batch on batch.id = event.batch_id
            where event.source_id = source.id and batch.sequence <= $4
                and event.created_at >= coalesce($5, $1) and event.created_at < $2
                and ($5 is null or (event.created_at, event.id collate "C", source.deployment_id) > ($5, $6, $7))
            order by event.created_at, event.id collate "C" limit $8
        ) usage
        left join lateral (
            select settlement.state from settlement join batch on batch.id = settlement.batch_id
            where settlement.source_id = source.id and settlement.event_id = usage.id and batch.sequence <= $4
            order by batch.sequence desc limit 1
        ) settled on true
        left join lateral (
            select request.id as request_id from settlement
            join batch answered on answered.id = settlement.batch_id join publication_request request on request.batch_id = answered.id
            where settlement.source_id = source.id and settlement.event_id = usage.id and settlement.state = 'published'
                and answered.sequence <= $4
            order by answered.sequence, request.id limit 1
        ) accepted on true
        where $3::uuid is null or source.deployment_id = $3
        order by usage.created_at, usage.id collate "C", source.deployment_id limit $8
        "#,
    )
    .bind(range.from)
    .bind(range.to)
    .bind(range.source)
    .bind(range.as_of.number)
    .bind(after.map(|row| row.created_at))
    .bind(after.map(|row| row.event_id.as_str()))
    .bind(after.map(|row| row.deployment_id))
    .bind(limit)
    .bind(range.as_of.incarnation)
    .fetch_all(conn)
    .await
}
