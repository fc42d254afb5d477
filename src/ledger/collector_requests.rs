//! Requests to a source's collector: fetch certain rows at once, or reread everything.

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};

use super::NewPass;

/// Maximum number of fetch requests kept per source. The next audit requests the rest.
const KEPT: i64 = 10_000;

/// A requested full sweep and its progress.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct SweepRequest {
    /// Rows of coderd that the sweep has read.
    pub rows_read: i64,
    /// The recorded pass of the sweep; none: not recorded yet.
    pub pass_id: Option<i64>,
    /// Events that the sweep appended to the log; none: not recorded yet.
    pub appended: Option<i32>,
    /// Of these, events that an earlier pass had reported complete; none: not recorded yet.
    pub late: Option<i32>,
}

/// Asks the source's collector to fetch the rows of these event ids in its next pass. Returns the
/// number of new requests. That pass ends a request, whether or not coderd has the row.
pub async fn add_fetch(
    conn: &mut PgConnection,
    source_id: i16,
    event_ids: &[String],
) -> Result<u64, sqlx::Error> {
    let inserted = sqlx::query(
        "insert into fetch_request (source_id, event_id, requested_at)
         select $1, event_id, clock_timestamp() from (select distinct unnest($2::text[]) as event_id) as requested order by event_id
         limit greatest(0, $3 - (select count(*) from fetch_request where source_id = $1))
         on conflict on constraint fetch_request_is_unique do nothing",
    )
    .bind(source_id)
    .bind(event_ids)
    .bind(KEPT)
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected())
}

/// A page of the event ids that the source's collector must fetch, oldest request first.
pub async fn fetches(
    conn: &mut PgConnection,
    source_id: i16,
    limit: i64,
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("select event_id from fetch_request where source_id = $1 order by requested_at, event_id limit $2")
        .bind(source_id)
        .bind(limit)
        .fetch_all(conn)
        .await
}

/// Asks the source's collector to read everything now. A sweep already begun does not fulfil the
/// request: another follows.
pub async fn add_sweep(conn: &mut PgConnection, source_id: i16) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into sweep_request (source_id) values ($1) on conflict on constraint sweep_request_is_unique
             do update set begun_at = null, rows_read = 0, pass_id = null, appended = null, late = null",
    )
    .bind(source_id)
    .execute(conn)
    .await?;
    Ok(())
}

/// The latest request for a full sweep of the source.
pub async fn sweep(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<Option<SweepRequest>, sqlx::Error> {
    sqlx::query_as(
        "select rows_read, pass_id, appended, late from sweep_request where source_id = $1",
    )
    .bind(source_id)
    .fetch_optional(conn)
    .await
}

/// Begins the requested sweep and returns the mark that identifies it. None: no sweep is requested.
pub async fn begin_sweep(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    sqlx::query_scalar(
        "update sweep_request set begun_at = clock_timestamp(), rows_read = 0 where source_id = $1 and pass_id is null returning begun_at",
    )
    .bind(source_id)
    .fetch_optional(conn)
    .await
}

/// Records how many rows the sweep of that mark has read.
pub async fn record_sweep_progress(
    conn: &mut PgConnection,
    source_id: i16,
    begun_at: DateTime<Utc>,
    rows_read: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query("update sweep_request set rows_read = $3 where source_id = $1 and begun_at = $2")
        .bind(source_id)
        .bind(begun_at)
        .bind(rows_read)
        .execute(conn)
        .await?;
    Ok(())
}

/// Ends the requests that a pass has fulfilled, in the transaction that records the pass.
pub(super) async fn end_requests(
    tx: &mut PgConnection,
    pass_id: i64,
    pass: &NewPass,
) -> Result<(), sqlx::Error> {
    if !pass.fetched.is_empty() {
        sqlx::query("delete from fetch_request where source_id = $1 and event_id = any($2)")
            .bind(pass.source_id)
            .bind(&pass.fetched)
            .execute(&mut *tx)
            .await?;
    }
    if let Some(begun_at) = pass.requested_sweep {
        sqlx::query("update sweep_request set pass_id = $3, appended = $4, late = $5 where source_id = $1 and begun_at = $2")
            .bind(pass.source_id)
            .bind(begun_at)
            .bind(pass_id)
            .bind(pass.produced)
            .bind(pass.late)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}
