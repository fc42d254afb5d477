//! Requests to the collector of a source: fetch certain rows at once, or read everything again.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{FromRow, PgConnection};

use super::Ledger;

/// Fetch requests that are kept of one source at a time, at most: the next audit asks for the rest.
const KEPT: i64 = 10_000;

/// A full sweep that was asked for, and its progress.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct SweepRequest {
    /// When it was last asked for, by the database's clock.
    pub requested_at: DateTime<Utc>,
    /// When the sweep that answers it began. None: not yet.
    pub begun_at: Option<DateTime<Utc>>,
    /// Rows of coderd that it has read.
    pub rows_read: i64,
    /// The recorded pass. None: not yet.
    pub pass_id: Option<i64>,
}

/// What a sweep brought.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize)]
pub struct SweepResult {
    /// The recorded pass.
    pub pass_id: i64,
    /// Events appended to the log.
    pub appended: i32,
    /// Of these, found later than an earlier pass had claimed to be complete.
    pub late: i32,
    /// What coderd committed before this instant is in the ledger. None: nothing can be claimed.
    pub complete_until: Option<DateTime<Utc>>,
}

impl Ledger {
    /// Asks the source's collector for the rows of these event ids in its next pass, and returns the number of new requests. A request ends with
    /// the pass that looked for its row, whether or not coderd has it.
    ///
    /// # Errors
    /// The database's.
    pub async fn request_fetch(&self, source_id: i16, event_ids: &[String]) -> Result<u64, sqlx::Error> {
        let asked = sqlx::query(
            "insert into fetch_request (source_id, event_id, requested_at)
             select $1, event_id, clock_timestamp() from (select distinct unnest($2::text[]) as event_id) as asked order by event_id
             limit greatest(0, $3 - (select count(*) from fetch_request where source_id = $1))
             on conflict on constraint fetch_request_is_unique do nothing",
        )
        .bind(source_id)
        .bind(event_ids)
        .bind(KEPT)
        .execute(&self.pool)
        .await?;
        Ok(asked.rows_affected())
    }

    /// A page of the event ids that the source's collector is asked for, oldest request first.
    ///
    /// # Errors
    /// The database's.
    pub async fn fetch_requests(&self, source_id: i16, limit: i64) -> Result<Vec<String>, sqlx::Error> {
        sqlx::query_scalar("select event_id from fetch_request where source_id = $1 order by requested_at, event_id limit $2")
            .bind(source_id)
            .bind(limit)
            .fetch_all(&self.pool)
            .await
    }

    /// Asks the source's collector to read everything now. A sweep that has begun already does not answer this request: another follows it.
    ///
    /// # Errors
    /// The database's.
    pub async fn request_sweep(&self, source_id: i16) -> Result<SweepRequest, sqlx::Error> {
        sqlx::query_as(
            "insert into sweep_request (source_id, requested_at) values ($1, clock_timestamp())
             on conflict on constraint sweep_request_is_unique
                 do update set requested_at = excluded.requested_at, begun_at = null, rows_read = 0, pass_id = null
             returning requested_at, begun_at, rows_read, pass_id",
        )
        .bind(source_id)
        .fetch_one(&self.pool)
        .await
    }

    /// The latest request for a full sweep of the source.
    ///
    /// # Errors
    /// The database's.
    pub async fn sweep_request(&self, source_id: i16) -> Result<Option<SweepRequest>, sqlx::Error> {
        sqlx::query_as("select requested_at, begun_at, rows_read, pass_id from sweep_request where source_id = $1")
            .bind(source_id)
            .fetch_optional(&self.pool)
            .await
    }

    /// Begins the sweep that is asked for, and returns the mark by which it is known. None: no sweep is asked for.
    ///
    /// # Errors
    /// The database's.
    pub async fn begin_requested_sweep(&self, source_id: i16) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
        sqlx::query_scalar(
            "update sweep_request set begun_at = clock_timestamp(), rows_read = 0 where source_id = $1 and pass_id is null returning begun_at",
        )
        .bind(source_id)
        .fetch_optional(&self.pool)
        .await
    }

    /// What the sweep brought that was recorded as this pass.
    ///
    /// # Errors
    /// The database's.
    pub async fn sweep_result(&self, pass_id: i64) -> Result<SweepResult, sqlx::Error> {
        sqlx::query_as("select id as pass_id, produced as appended, late, complete_until from collector_pass where id = $1")
            .bind(pass_id)
            .fetch_one(&self.pool)
            .await
    }

    /// Records the rows that the sweep of that mark has read.
    ///
    /// # Errors
    /// The database's.
    pub async fn record_sweep_progress(&self, source_id: i16, begun_at: DateTime<Utc>, rows_read: i64) -> Result<(), sqlx::Error> {
        sqlx::query("update sweep_request set rows_read = $3 where source_id = $1 and begun_at = $2")
            .bind(source_id)
            .bind(begun_at)
            .bind(rows_read)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

/// Ends the requests that a pass has answered, in the transaction that records it.
pub(super) async fn end_requests(
    tx: &mut PgConnection,
    source_id: i16,
    pass_id: i64,
    fetched: &[String],
    sweep: Option<DateTime<Utc>>,
) -> Result<(), sqlx::Error> {
    if !fetched.is_empty() {
        sqlx::query("delete from fetch_request where source_id = $1 and event_id = any($2)")
            .bind(source_id)
            .bind(fetched)
            .execute(&mut *tx)
            .await?;
    }
    if let Some(begun_at) = sweep {
        sqlx::query("update sweep_request set pass_id = $3 where source_id = $1 and begun_at = $2")
            .bind(source_id)
            .bind(begun_at)
            .bind(pass_id)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}
