//! Usage rows by id: what a collector sends, and the publisher's last look before it sends.

use chrono::{DateTime, Utc};
use sqlx::FromRow;

use super::connect::within;
use super::{CoderdError, Reader, Time};

/// A row of `usage_events`.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct UsageRow {
    pub id: String,
    pub event_type: String,
    /// `event_data`, as PostgreSQL writes the jsonb
    pub event_data: String,
    /// `created_at`: when the usage happened, not when the row came
    pub created_at: Time,
    /// `publish_started_at`: a replica's claim, good for an hour
    pub publish_started_at: Option<Time>,
    /// `published_at`: set on acceptance and on permanent refusal
    pub published_at: Option<Time>,
    pub failure_message: Option<String>,
}

impl Reader {
    /// The rows of these ids, by time and id. An id that is not there is left out.
    pub async fn usage(&mut self, ids: &[String]) -> Result<Vec<UsageRow>, CoderdError> {
        let query = sqlx::query_as(
            "select id, event_type, event_data::text as event_data, created_at, publish_started_at, published_at, failure_message
                 from usage_events where id = any($1) order by created_at, id",
        )
        .bind(ids);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// The latest of coderd's own publish marks (`published_at`). While coderd does not publish, it does not rise. A mark beyond tomorrow is not one
    /// of coderd's: it would hide all that follow.
    pub async fn latest_publish_mark(&mut self) -> Result<Option<DateTime<Utc>>, CoderdError> {
        let query = "select max(published_at) from usage_events where published_at between '1970-01-01' and now() + interval '1 day'";
        within(self.deadline, sqlx::query_scalar(query).fetch_one(&mut self.connection)).await
    }
}
