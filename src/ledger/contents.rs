//! The contents of the ledger in numbers, in one snapshot.
//!
//! A growing table of at most 8 MiB is counted exactly. Of a larger table a random sample of
//! blocks of that size is counted, scaled up, and marked as an estimate. So a request costs the
//! same at any table size. Numbers that operators act on are always exact: positions, pending
//! publications, open rejects.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::Connection as _;
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;
use uuid::Uuid;

use super::sources::source_columns;
use super::{BatchKind, Head, PublicationState, Source, head};

/// Some ten thousand rows, which take some milliseconds.
const COUNTED_BYTES: i64 = 8 * 1024 * 1024;

/// Numbers of one database snapshot.
#[derive(Clone, Debug)]
pub struct Contents {
    /// The ledger's head in the snapshot.
    pub head: Head,
    pub batches: Vec<BatchCount>,
    pub positions: Vec<PositionRow>,
    pub events: Vec<EventCount>,
    pub sources: Vec<Source>,
    pub publications: Vec<PublicationCount>,
    /// Leases of work that only one process does at a time.
    pub leases: Vec<LeaseRow>,
    /// Recent rates of live consumption.
    pub rates: Rates,
}

/// Batches of one kind.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct BatchCount {
    /// The kind of the batches.
    pub kind: BatchKind,
    /// The number of batches.
    pub batches: i64,
    /// Records that the batches read from the log.
    pub records: i64,
    /// New events.
    pub accepted: i64,
    /// Events that were already accepted.
    pub duplicates: i64,
    /// Whether these numbers are estimates.
    pub estimated: bool,
}

/// Rates of live consumption, by the times at which batches were recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct Rates {
    /// Records per second in the last minute, of any disposition.
    pub records_per_second_1m: f64,
    /// New events per second in the last minute.
    pub events_per_second_1m: f64,
    /// Records per second in the last ten minutes.
    pub records_per_second_10m: f64,
    /// New events per second in the last ten minutes.
    pub events_per_second_10m: f64,
}

#[derive(Clone, Debug, FromRow)]
pub struct PositionRow {
    pub topic: String,
    pub partition: i32,
    pub next_offset: i64,
    /// Number of times that a consumer took the partition lease.
    pub epoch: i64,
    /// Records read since the partition's start.
    pub records: i64,
    pub moved_at: DateTime<Utc>,
}

/// Accepted events of one type and source.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct EventCount {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// The event's type.
    pub event_type: String,
    /// The number of events.
    pub events: i64,
    /// Whether the number is an estimate.
    pub estimated: bool,
}

/// Publications in one state.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct PublicationCount {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// The state of the publications.
    pub state: PublicationState,
    /// The number of events.
    pub events: i64,
    /// Events in this state that were sent at least once and whose answer is not recorded.
    pub unanswered: i64,
    /// Whether the number is an estimate. The number of pending events is exact.
    pub estimated: bool,
}

/// A lease, by the database's clock.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct LeaseRow {
    /// `metrics` is the lease to show the domain series. `collector:DEPLOYMENT` is the lease to
    /// collect that source.
    pub name: String,
    /// Whether a process holds the lease now.
    pub held: bool,
    /// The current or last holder; empty once the lease was released.
    pub holder: String,
    /// Number of times that the holder changed.
    pub epoch: i64,
    /// When the lease expires unless it is renewed, or when it expired.
    pub expires_at: DateTime<Utc>,
}

/// The contents, counting at most 8 MiB of each table.
pub async fn read(conn: &mut PgConnection, now: DateTime<Utc>) -> Result<Contents, sqlx::Error> {
    read_counting(conn, COUNTED_BYTES, now).await
}

/// The contents, counting at most `bytes` of each table.
pub async fn read_counting(
    conn: &mut PgConnection,
    bytes: i64,
    now: DateTime<Utc>,
) -> Result<Contents, sqlx::Error> {
    let mut tx = conn.begin_with("begin isolation level repeatable read read only").await?;
    let head = head::read(&mut tx).await?;
    let positions =
        sqlx::query_as("select topic, partition, next_offset, epoch, records, moved_at from position order by topic, partition")
            .fetch_all(&mut *tx)
            .await?;
    let sources = sqlx::query_as(concat!("select ", source_columns!(), " from source order by id"))
        .fetch_all(&mut *tx)
        .await?;
    // Leases of a log in PostgreSQL are left out: it has one per partition.
    let leases = sqlx::query_as(
        "select name, expires_at > clock_timestamp() as held, holder, epoch, expires_at from lease where name not like 'log:%' order by name",
    )
    .fetch_all(&mut *tx)
    .await?;
    let contents = Contents {
        head,
        batches: batches(&mut tx, bytes).await?,
        positions,
        events: events(&mut tx, bytes).await?,
        sources,
        publications: publications(&mut tx, bytes).await?,
        leases,
        rates: rates(&mut tx, now).await?,
    };
    tx.commit().await?;
    Ok(contents)
}

/// The share of a table that is counted, in percent: 100 unless the table is large.
async fn share(tx: &mut PgConnection, table: &'static str, bytes: i64) -> Result<f32, sqlx::Error> {
    sqlx::query_scalar(
        "select least(100, 100.0 * $2 / greatest(pg_relation_size($1::regclass), 1))::real",
    )
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
    let [builds, claims, usage] = [
        share(tx, "workspace_build", bytes).await?,
        share(tx, "prebuild_claim", bytes).await?,
        share(tx, "usage_event", bytes).await?,
    ];
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

/// Pending rows have an index of their own and are always counted exactly.
async fn publications(
    tx: &mut PgConnection,
    bytes: i64,
) -> Result<Vec<PublicationCount>, sqlx::Error> {
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

/// Uses the index of times, and reads only the batches of ten minutes.
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
