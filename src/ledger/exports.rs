//! Usage for finance: accepted events, as corrected, and their publication states at one ledger
//! sequence.

use chrono::{DateTime, Utc};
use futures::TryStreamExt as _;
use sqlx::{Connection as _, FromRow, PgConnection};
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

/// One accepted usage event with its content at the range's sequence. An event that was corrected to
/// nothing has no row.
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
    /// The number of the batch's sequence that accepted the event.
    pub sequence: i64,
    /// The number of the sequence of the correction that gave the event this content. None: as
    /// accepted.
    pub corrected_sequence: Option<i64>,
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

/// The rows of usage as accepted, or as corrected. PostgreSQL estimates each alone: it takes a union
/// for a few rows, and would look each of them up.
///
/// An event has several rows here if it was settled or accepted by the vendor repeatedly. The last
/// settlement and the first acceptance count.
macro_rules! rows_of {
    ($usage:literal, $corrected_sequence:literal, $condition:literal) => {
        concat!(
            r#"select distinct on (usage.created_at, usage.id collate "C", source.deployment_id)
                   source.deployment_id, usage.id as event_id, usage.event_type, usage.quantity::text as quantity, usage.created_at,
                   coalesce(settlement.state, 'pending') as publication_state, request.id as request_id, accepted.sequence, "#,
            $corrected_sequence,
            " as corrected_sequence from source join ",
            $usage,
            r#" usage on usage.source_id = source.id
               join batch accepted on accepted.id = usage.batch_id and accepted.sequence <= $4
               left join (settlement join batch settled on settled.id = settlement.batch_id and settled.sequence <= $4)
                   on settlement.source_id = usage.source_id and settlement.event_id = usage.id
               left join (settlement published
                       join batch answered on answered.id = published.batch_id and answered.sequence <= $4
                       join publication_request request on request.batch_id = answered.id)
                   on published.source_id = usage.source_id and published.event_id = usage.id and published.state = 'published'
               where usage.created_at >= $1 and usage.created_at < $2 and ($3::uuid is null or source.deployment_id = $3)
                   and "#,
            $condition,
            r#" order by usage.created_at, usage.id collate "C", source.deployment_id,
                   settled.sequence desc nulls last, answered.sequence, request.id"#
        )
    };
}

/// Long statements of [`each_usage`] at most: an hour in all.
pub const STATEMENTS: u32 = 48;

/// Passes each row of the range to `take`, ordered by time, then id by its bytes, then deployment.
///
/// It is one statement, which sees one snapshot. PostgreSQL joins and sorts the range, on disk if it
/// is large; this process has a few rows at a time. While it runs, vacuum keeps row versions that
/// were removed after its start.
///
/// # Errors
/// Those of `take`, which end it, and the database's.
pub async fn each_usage<E: From<sqlx::Error>>(
    conn: &mut PgConnection,
    range: &UsageRange,
    mut take: impl FnMut(UsageRow) -> Result<(), E>,
) -> Result<(), E> {
    let mut tx = conn.begin_with("begin read only").await?;
    sqlx::raw_sql("set local statement_timeout = '1h'; set local work_mem = '64MB'")
        .execute(&mut *tx)
        .await?;
    let mut rows = sqlx::query_as(concat!(
        "select * from (select * from (",
        rows_of!(
            "usage_event",
            "null::bigint",
            "not exists (select from correction c join batch b on b.id = c.batch_id
                 where c.source_id = usage.source_id and c.event_id = usage.id and b.sequence <= $4)"
        ),
        ") as accepted union all select * from (",
        rows_of!("corrected_usage($4)", "usage.corrected_sequence", "true"),
        r#") as corrected) as usage order by created_at, event_id collate "C", deployment_id"#
    ))
    .bind(range.from)
    .bind(range.to)
    .bind(range.source)
    .bind(range.as_of.number)
    .fetch(&mut *tx);
    while let Some(row) = rows.try_next().await? {
        take(row)?;
    }
    drop(rows);
    Ok(tx.commit().await?)
}
