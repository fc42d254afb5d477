//! Reads usage rows by id for the collector, and for the publisher's check before it sends.

use chrono::{DateTime, Utc};
use sqlx::FromRow;

use super::connect::within;
use super::{CoderdError, Reader, Time};

/// A row of `usage_events`.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct UsageRow {
    pub id: String,
    pub event_type: String,
    /// `event_data`, in PostgreSQL's form of jsonb
    pub event_data: String,
    /// `created_at`: when the usage happened, not when the row was written
    pub created_at: Time,
    /// `publish_started_at`: a replica has reserved the row for an hour
    pub publish_started_at: Option<Time>,
    /// `published_at`: set on acceptance and on permanent refusal
    pub published_at: Option<Time>,
    pub failure_message: Option<String>,
}

impl Reader {
    /// The rows of these ids, by time and id. Missing ids are left out.
    pub async fn usage(&mut self, ids: &[String]) -> Result<Vec<UsageRow>, CoderdError> {
        let query = sqlx::query_as(
            "select id, event_type, event_data::text as event_data, created_at, publish_started_at, published_at, failure_message
                 from usage_events where id = any($1) order by created_at, id",
        )
        .bind(ids);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// The latest of coderd's own publish marks (`published_at`). It does not rise while coderd
    /// does not publish. coderd does not write a mark beyond tomorrow: such a mark would hide all
    /// later ones.
    pub async fn latest_publish_mark(&mut self) -> Result<Option<DateTime<Utc>>, CoderdError> {
        let query = "select max(published_at) from usage_events where published_at between '1970-01-01' and now() + interval '1 day'";
        within(self.deadline, sqlx::query_scalar(query).fetch_one(&mut self.connection)).await
    }
}
