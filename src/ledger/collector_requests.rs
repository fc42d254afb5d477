//! Requests to the collector of a source: fetch certain rows at once, or read everything again.

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};

use super::{Ledger, NewPass};

/// Fetch requests that are kept of one source at a time, at most: the next audit asks for the rest.
const KEPT: i64 = 10_000;

/// A full sweep that was asked for, and its progress.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct SweepRequest {
    /// Rows of coderd that it has read.
    pub rows_read: i64,
    /// The recorded pass. None: not yet.
    pub pass_id: Option<i64>,
    /// Events that it appended to the log. None: not yet recorded.
    pub appended: Option<i32>,
    /// Of these, found later than an earlier pass had reported to be complete. None: not yet recorded.
    pub late: Option<i32>,
}

impl Ledger {
    /// Asks the source's collector for the rows of these event ids in its next pass, and returns the number of new requests. A request ends with
    /// the pass that looked for its row, whether or not coderd has it.
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
    pub async fn fetch_requests(&self, source_id: i16, limit: i64) -> Result<Vec<String>, sqlx::Error> {
        sqlx::query_scalar("select event_id from fetch_request where source_id = $1 order by requested_at, event_id limit $2")
            .bind(source_id)
            .bind(limit)
            .fetch_all(&self.pool)
            .await
    }

    /// Asks the source's collector to read everything now. A sweep that has begun already does not answer this request: another follows it.
    pub async fn request_sweep(&self, source_id: i16) -> Result<(), sqlx::Error> {
        sqlx::query(
            "insert into sweep_request (source_id) values ($1) on conflict on constraint sweep_request_is_unique
                 do update set begun_at = null, rows_read = 0, pass_id = null, appended = null, late = null",
        )
        .bind(source_id)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The latest request for a full sweep of the source.
    pub async fn sweep_request(&self, source_id: i16) -> Result<Option<SweepRequest>, sqlx::Error> {
        sqlx::query_as("select rows_read, pass_id, appended, late from sweep_request where source_id = $1")
            .bind(source_id)
            .fetch_optional(&self.pool)
            .await
    }

    /// Begins the sweep that is asked for, and returns the mark by which it is known. None: no sweep is asked for.
    pub async fn begin_requested_sweep(&self, source_id: i16) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
        sqlx::query_scalar(
            "update sweep_request set begun_at = clock_timestamp(), rows_read = 0 where source_id = $1 and pass_id is null returning begun_at",
        )
        .bind(source_id)
        .fetch_optional(&self.pool)
        .await
    }

    /// Records the rows that the sweep of that mark has read.
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
pub(super) async fn end_requests(tx: &mut PgConnection, pass_id: i64, pass: &NewPass) -> Result<(), sqlx::Error> {
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
