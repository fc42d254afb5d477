//! What the ledger holds, in numbers of one moment.
//!
//! What grows without end is counted exactly while a table has at most 64 MiB; of a larger one a part of that size is counted, blocks
//! chosen by chance, and the numbers are scaled up and say that they are estimates. So an answer costs the same at any size. What an operator acts
//! on is exact always: positions, what is pending, open rejects.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;
use uuid::Uuid;

use super::sources::source_columns;
use super::{BatchKind, Ledger, PublicationState, Sequence, Source};

/// Some hundred thousand rows, read in well under a second.
const COUNTED_BYTES: i64 = 64 * 1024 * 1024;

/// Numbers of one database snapshot.
#[derive(Clone, Debug)]
pub struct Contents {
    /// The last ledger sequence: all else is as of it.
    pub sequence: Sequence,
    /// Batches by kind.
    pub batches: Vec<BatchCount>,
    /// Where each partition stands.
    pub positions: Vec<PositionRow>,
    /// Accepted events by type and source.
    pub events: Vec<EventCount>,
    /// The deployments.
    pub sources: Vec<Source>,
    /// Publications by state.
    pub publications: Vec<PublicationCount>,
    /// What only one process does at a time.
    pub leases: Vec<LeaseRow>,
    /// What was read from the log of late.
    pub rates: Rates,
}

/// Batches of one kind.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct BatchCount {
    /// What wrote them.
    pub kind: BatchKind,
    /// How many.
    pub batches: i64,
    /// Records that they read from the log.
    pub records: i64,
    /// New events.
    pub accepted: i64,
    /// Events that were there already.
    pub duplicates: i64,
    /// These are estimates.
    pub estimated: bool,
}

/// What live consumption took from the log, by the times at which batches were recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct Rates {
    /// Records a second in the last minute, whatever became of them.
    pub records_per_second_1m: f64,
    /// New events a second in the last minute.
    pub events_per_second_1m: f64,
    /// Records a second in the last ten minutes.
    pub records_per_second_10m: f64,
    /// New events a second in the last ten minutes.
    pub events_per_second_10m: f64,
}

/// One partition's position.
#[derive(Clone, Debug, FromRow)]
pub struct PositionRow {
    pub topic: String,
    pub partition: i32,
    /// The offset to read next.
    pub next_offset: i64,
    /// How often it was claimed.
    pub epoch: i64,
    /// Records read since its beginning.
    pub records: i64,
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
    /// This is an estimate.
    pub estimated: bool,
}

/// Publications in one state.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct PublicationCount {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// Their state.
    pub state: PublicationState,
    /// How many.
    pub events: i64,
    /// Of these, sent at least once without an answer on record.
    pub unanswered: i64,
    /// This is an estimate; what is pending never is.
    pub estimated: bool,
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
    /// Reads all of it.
    pub async fn contents(&self) -> Result<Contents, sqlx::Error> {
        self.contents_counting(COUNTED_BYTES).await
    }

    /// The same, where at most so many bytes of each table are counted.
    pub async fn contents_counting(&self, bytes: i64) -> Result<Contents, sqlx::Error> {
        let mut tx = self.pool.begin_with("begin isolation level repeatable read read only").await?;
        let sequence = sqlx::query_scalar("select named_sequence(next_sequence - 1) from ledger").fetch_one(&mut *tx).await?;
        let positions =
            sqlx::query_as("select topic, partition, next_offset, epoch, records, moved_at from position order by topic, partition")
                .fetch_all(&mut *tx)
                .await?;
        let sources = sqlx::query_as(concat!("select ", source_columns!(), " from source order by id")).fetch_all(&mut *tx).await?;
        // without those of a log in PostgreSQL: one a partition
        let leases = sqlx::query_as(
            "select name, expires_at > clock_timestamp() as held, holder, epoch, expires_at from lease where name not like 'log:%' order by name",
        )
        .fetch_all(&mut *tx)
        .await?;
        let contents = Contents {
            sequence,
            batches: batches(&mut tx, bytes).await?,
            positions,
            events: events(&mut tx, bytes).await?,
            sources,
            publications: publications(&mut tx, bytes).await?,
            leases,
            rates: rates(&mut tx, self.clock.now()).await?,
        };
        tx.commit().await?;
        Ok(contents)
    }
}

/// How much of a table is counted, in percent: all of it, unless it is large.
async fn share(tx: &mut PgConnection, table: &'static str, bytes: i64) -> Result<f32, sqlx::Error> {
    sqlx::query_scalar("select least(100, 100.0 * $2 / greatest(pg_relation_size($1::regclass), 1))::real")
        .bind(table)
        .bind(bytes)
        .fetch_one(tx)
        .await
}

async fn batches(tx: &mut PgConnection, bytes: i64) -> Result<Vec<BatchCount>, sqlx::Error> {
    let share = share(tx, "batch", bytes).await?;
    sqlx::query_as(
        "select kind, round(count(*) * 100 / $1::real)::bigint as batches, round(sum(records) * 100 / $1::real)::bigint as records,
             round(sum(accepted) * 100 / $1::real)::bigint as accepted, round(sum(duplicates) * 100 / $1::real)::bigint as duplicates, $1::real < 100 as estimated
         from batch tablesample system ($1::real) group by kind order by kind",
    )
    .bind(share)
    .fetch_all(tx)
    .await
}

async fn events(tx: &mut PgConnection, bytes: i64) -> Result<Vec<EventCount>, sqlx::Error> {
    let [builds, claims, usage] =
        [share(tx, "workspace_build", bytes).await?, share(tx, "prebuild_claim", bytes).await?, share(tx, "usage_event", bytes).await?];
    sqlx::query_as(
        "select source.deployment_id, event_type, events, share < 100 as estimated from (
             select source_id, 'workspace_build_completed_v1' as event_type, round(count(*) * 100 / $1::real)::bigint as events, $1::real as share
             from workspace_build tablesample system ($1::real) group by source_id
             union all
             select source_id, 'prebuild_claimed_v1', round(count(*) * 100 / $2::real)::bigint, $2::real
             from prebuild_claim tablesample system ($2::real) group by source_id
             union all
             select source_id, event_type, round(count(*) * 100 / $3::real)::bigint, $3::real
             from usage_event tablesample system ($3::real) group by source_id, event_type
         ) counted join source on source.id = source_id order by deployment_id, event_type",
    )
    .bind(builds)
    .bind(claims)
    .bind(usage)
    .fetch_all(tx)
    .await
}

/// What is pending has an index of its own and is always counted.
async fn publications(tx: &mut PgConnection, bytes: i64) -> Result<Vec<PublicationCount>, sqlx::Error> {
    let share = share(tx, "publication", bytes).await?;
    sqlx::query_as(
        "select deployment_id, state, events, unanswered, estimated from (
             select source_id, state, count(*) as events, count(*) filter (where unanswered) as unanswered, false as estimated
             from publication where state = 'pending' group by source_id, state
             union all
             select source_id, state, round(count(*) * 100 / $1::real)::bigint, round(count(*) filter (where unanswered) * 100 / $1::real)::bigint, $1::real < 100
             from publication tablesample system ($1::real) where state <> 'pending' group by source_id, state
         ) counted join source on source.id = source_id order by deployment_id, state",
    )
    .bind(share)
    .fetch_all(tx)
    .await
}

/// By the index of times: reads the batches of ten minutes, however many there are.
async fn rates(tx: &mut PgConnection, now: DateTime<Utc>) -> Result<Rates, sqlx::Error> {
    sqlx::query_as(
        "select coalesce(sum(records) filter (where recorded_at > $1::timestamptz - interval '1 minute'), 0)::double precision / 60 as records_per_second_1m,
             coalesce(sum(accepted) filter (where recorded_at > $1::timestamptz - interval '1 minute'), 0)::double precision / 60 as events_per_second_1m,
             coalesce(sum(records), 0)::double precision / 600 as records_per_second_10m,
             coalesce(sum(accepted), 0)::double precision / 600 as events_per_second_10m
         from batch where kind = 'log' and recorded_at > $1::timestamptz - interval '10 minutes' and recorded_at <= $1::timestamptz",
    )
    .bind(now)
    .fetch_one(tx)
    .await
}
