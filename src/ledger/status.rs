//! What the ledger holds, in numbers of one moment.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, Row};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Ledger;

/// Numbers of one database snapshot.
#[derive(Clone, Debug)]
pub struct Contents {
    /// A restored ledger has another one.
    pub incarnation: Uuid,
    /// The last ledger sequence: all else is as of it.
    pub sequence: i64,
    /// Batches by kind.
    pub batches: Vec<BatchCount>,
    /// Where each partition stands.
    pub positions: Vec<PositionRow>,
    /// Accepted events by type and source.
    pub events: Vec<EventCount>,
    /// Records that are no accepted event, by verdict and cause.
    pub refused: Vec<RefusedCount>,
    /// The deployments.
    pub sources: Vec<SourceRow>,
    /// Publications by state.
    pub publications: Vec<PublicationCount>,
    /// What only one process does at a time.
    pub leases: Vec<LeaseRow>,
}

/// Batches of one kind.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct BatchCount {
    /// log, replay, source, licenses, pass, verdicts or operator.
    pub kind: String,
    /// How many.
    pub batches: i64,
    /// Records that they read from the log.
    pub records: i64,
    /// New events.
    pub accepted: i64,
    /// Events that were there already.
    pub duplicates: i64,
    /// When the last was recorded.
    pub last_recorded_at: DateTime<Utc>,
}

/// One partition's position.
#[derive(Clone, Debug, FromRow)]
pub struct PositionRow {
    /// The topic's name.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset to read next.
    pub next_offset: i64,
    /// How often it was claimed.
    pub epoch: i64,
    /// When it last moved.
    pub moved_at: DateTime<Utc>,
}

/// Accepted events of one type and source.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct EventCount {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// The event's type.
    pub event_type: String,
    /// How many.
    pub events: i64,
}

/// Records kept raw.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct RefusedCount {
    /// rejected, conflict or held.
    pub verdict: String,
    /// The short word.
    pub cause: String,
    /// How many.
    pub records: i64,
}

/// A deployment.
#[derive(Clone, Debug, FromRow)]
pub struct SourceRow {
    /// The ledger's own small id.
    pub id: i16,
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// Whether a collector of ours reads it.
    pub collected: bool,
    /// Histograms begin here.
    pub introduced_at: DateTime<Utc>,
    /// Collection begins here; none: at the beginning.
    pub baseline_until: Option<DateTime<Utc>>,
}

/// Publications in one state.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct PublicationCount {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// pending, published, refused, expired, unknown or `not_ours`.
    pub state: String,
    /// How many.
    pub events: i64,
    /// Of these, sent at least once without an answer on record.
    pub unanswered: i64,
    /// The oldest usage among them.
    pub oldest_created_at: DateTime<Utc>,
}

/// A lease, by the database's clock.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct LeaseRow {
    /// `metrics`: who shows the domain series. `collector:DEPLOYMENT`: who collects that source.
    pub name: String,
    /// Whether somebody holds it now.
    pub held: bool,
    /// Who holds it or held it last; empty once it was given back.
    pub holder: String,
    /// How often it went to another holder.
    pub epoch: i64,
    /// When it ends unless renewed, or ended.
    pub expires_at: DateTime<Utc>,
}

impl Ledger {
    /// Counts everything: reads each event table's index once.
    ///
    /// # Errors
    /// The database's.
    pub async fn contents(&self) -> Result<Contents, sqlx::Error> {
        let mut tx = self.pool.begin_with("begin isolation level repeatable read read only").await?;
        let ledger = sqlx::query("select incarnation, next_sequence - 1 from ledger").fetch_one(&mut *tx).await?;
        let batches = sqlx::query_as(
            "select kind, count(*) as batches, sum(records)::bigint as records, sum(accepted)::bigint as accepted,
                 sum(duplicates)::bigint as duplicates, max(recorded_at) as last_recorded_at
             from batch group by kind order by kind",
        )
        .fetch_all(&mut *tx)
        .await?;
        let positions = sqlx::query_as("select topic, partition, next_offset, epoch, moved_at from position order by topic, partition")
            .fetch_all(&mut *tx)
            .await?;
        let events = sqlx::query_as(
            "select source.deployment_id, event_type, events from (
                 select source_id, 'workspace_build_completed_v1' as event_type, count(*) as events from workspace_build group by source_id
                 union all select source_id, 'prebuild_claimed_v1', count(*) from prebuild_claim group by source_id
                 union all select source_id, event_type, count(*) from usage_event group by source_id, event_type
             ) counted join source on source.id = source_id order by deployment_id, event_type",
        )
        .fetch_all(&mut *tx)
        .await?;
        let refused =
            sqlx::query_as("select verdict, cause, count(*) as records from reject group by verdict, cause order by verdict, cause")
                .fetch_all(&mut *tx)
                .await?;
        let sources = sqlx::query_as("select id, deployment_id, collected, introduced_at, baseline_until from source order by id")
            .fetch_all(&mut *tx)
            .await?;
        let publications = sqlx::query_as(
            "select deployment_id, state, count(*) as events, count(*) filter (where unanswered) as unanswered,
                 min(event_created_at) as oldest_created_at
             from publication join source on source.id = source_id group by deployment_id, state order by deployment_id, state",
        )
        .fetch_all(&mut *tx)
        .await?;
        let leases =
            sqlx::query_as("select name, expires_at > clock_timestamp() as held, holder, epoch, expires_at from lease order by name")
                .fetch_all(&mut *tx)
                .await?;
        tx.commit().await?;
        Ok(Contents {
            incarnation: ledger.try_get(0)?,
            sequence: ledger.try_get(1)?,
            batches,
            positions,
            events,
            refused,
            sources,
            publications,
            leases,
        })
    }
}
