//! Usage by the day of its date: counts and keys.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};

use super::connect::within;
use super::{CoderdError, Reader, UsageKey};

/// A row's marks are later than its date, except for clock differences of up to this.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::days(1);

/// Rows dated from `$1` until before `$2`, unmarked or marked since `$3`: three ranges of the index
/// (`published_at`, `publish_started_at`, `created_at`). No index is led by `created_at`. One
/// statement: a row moves between the ranges while coderd publishes.
macro_rules! dated {
    ($columns:literal) => {
        concat!(
            "(select ",
            $columns,
            " from usage_events
              where published_at is null and publish_started_at is null and created_at >= $1 and created_at < $2
              union all
              select ",
            $columns,
            " from usage_events
              where published_at is null and publish_started_at >= $3 and created_at >= $1 and created_at < $2
              union all
              select ",
            $columns,
            " from usage_events where published_at >= $3 and created_at >= $1 and created_at < $2) dated"
        )
    };
}

impl Reader {
    /// The number of rows dated in `[from, until)` by UTC day (days since 1970) and type. Days
    /// without rows of a type are left out.
    pub async fn usage_days(
        &mut self,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<BTreeMap<(i64, String), i64>, CoderdError> {
        // By type, too: a missing row of one type and a forged one of another would cancel out. No
        // index of all rows has the type, so the rows of these days are read.
        let query = concat!(
            "select floor(extract(epoch from created_at) / 86400)::bigint as day, event_type, count(*) from ",
            dated!("created_at, event_type"),
            " group by 1, 2"
        );
        let query = sqlx::query_as(query).bind(from).bind(until).bind(marked_since(from));
        let rows: Vec<(i64, String, i64)> =
            within(self.deadline, query.fetch_all(&mut self.connection)).await?;
        Ok(rows.into_iter().map(|(day, event_type, rows)| ((day, event_type), rows)).collect())
    }

    /// A page of the rows dated in `[from, until)` after the key `after`, by (`created_at`, `id`).
    pub async fn usage_keys_dated(
        &mut self,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        after: Option<&UsageKey>,
        limit: i64,
    ) -> Result<Vec<UsageKey>, CoderdError> {
        let query = concat!(
            "select id, created_at from ",
            dated!("id, created_at"),
            " where (created_at, id) > (coalesce($4, '-infinity'::timestamptz), coalesce($5, '')) order by created_at, id limit $6"
        );
        let query = sqlx::query_as(query)
            .bind(from)
            .bind(until)
            .bind(marked_since(from))
            .bind(after.map(|key| key.created_at))
            .bind(after.map(|key| &key.id))
            .bind(limit);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }
}

fn marked_since(from: DateTime<Utc>) -> DateTime<Utc> {
    from.checked_sub_signed(CLOCK_TOLERANCE).unwrap_or(from)
}
