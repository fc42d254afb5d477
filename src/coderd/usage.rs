//! Reads keys of usage rows: all, and those that can be new.

use chrono::{DateTime, Utc};
use sqlx::FromRow;

use super::connect::within;
use super::{CoderdError, Reader, Time};

/// The parts of a usage row that never change.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct UsageKey {
    pub id: String,
    pub created_at: Time,
}

/// Each range gives one page at most, so that a page costs the same at any start. (The unmarked
/// range is also ordered by its empty marks. The planner does not see that `is null` leaves one
/// value, and would sort the range for each page.)
const RECENT_KEYS: &str = "select id, created_at from (
         (select id, created_at from usage_events
          where published_at is null and publish_started_at is null and created_at >= $1
              and (created_at, id) > (coalesce($3, '-infinity'::timestamptz), coalesce($4, ''))
          order by published_at, publish_started_at, created_at, id limit $5)
         union
         (select id, created_at from usage_events
          where published_at is null and publish_started_at >= $2
              and (created_at, id) > (coalesce($3, '-infinity'::timestamptz), coalesce($4, ''))
          order by created_at, id limit $5)
         union
         (select id, created_at from usage_events
          where published_at >= $2 and (created_at, id) > (coalesce($3, '-infinity'::timestamptz), coalesce($4, ''))
          order by created_at, id limit $5)
     ) recent
     order by created_at, id limit $5";

impl Reader {
    /// A page of the rows that can have come since `since`, after the key `after`, by
    /// (`created_at`, `id`).
    ///
    /// The table does not record when a row came, and its date can be days earlier. But every row
    /// comes with both marks empty, and coderd later sets them to the current time. So a row that
    /// came since `since` is unmarked, or was reserved or published since. These are three ranges
    /// of one index (`published_at`, `publish_started_at`, `created_at`). The unmarked range grows
    /// without end where coderd does not publish. So it is read only back to `dated_since`;
    /// [`Reader::usage_keys`] finds older rows. One statement reads all three: a row moves between
    /// them while coderd publishes, but keeps its key.
    pub async fn recent_usage_keys(
        &mut self,
        dated_since: DateTime<Utc>,
        since: DateTime<Utc>,
        after: Option<&UsageKey>,
        limit: i64,
    ) -> Result<Vec<UsageKey>, CoderdError> {
        let query = sqlx::query_as(RECENT_KEYS)
            .bind(dated_since)
            .bind(since)
            .bind(after.map(|key| key.created_at))
            .bind(after.map(|key| &key.id))
            .bind(limit);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// A page of all rows after the id `after`, by id.
    pub async fn usage_keys(
        &mut self,
        after: &str,
        limit: i64,
    ) -> Result<Vec<UsageKey>, CoderdError> {
        let query = sqlx::query_as(
            "select id, created_at from usage_events where id > $1 order by id limit $2",
        )
        .bind(after)
        .bind(limit);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// A page of all ids after the id `after`, in coderd's own order. It reads only the primary key.
    pub async fn usage_ids(&mut self, after: &str, limit: i64) -> Result<Vec<String>, CoderdError> {
        let query = "select id from usage_events where id > $1 order by id limit $2";
        let query = sqlx::query_scalar(query).bind(after).bind(limit);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// The keys of these ids, without missing ones.
    pub async fn usage_keys_of(&mut self, ids: &[String]) -> Result<Vec<UsageKey>, CoderdError> {
        let query = "select id, created_at from usage_events where id = any($1) order by id";
        within(self.deadline, sqlx::query_as(query).bind(ids).fetch_all(&mut self.connection)).await
    }

    /// The hours since `since` that have their runtime row, in order.
    pub async fn runtime_hours(
        &mut self,
        since: DateTime<Utc>,
    ) -> Result<Vec<DateTime<Utc>>, CoderdError> {
        let query = "select created_at from usage_events where event_type = 'hb_agent_runtime_v1' and created_at >= $1 order by created_at";
        let hours: Vec<Time> = within(
            self.deadline,
            sqlx::query_scalar(query).bind(since).fetch_all(&mut self.connection),
        )
        .await?;
        Ok(hours.into_iter().filter_map(Time::instant).collect())
    }
}
