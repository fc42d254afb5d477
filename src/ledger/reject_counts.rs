//! Counts of rejects, their ages and their unbilled usage.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use sqlx::PgConnection;

use super::{Disposition, RejectFilter};
use crate::event::{RejectCause, UsageType};
use crate::words::words;

words! {
    /// Properties by which rejects can be grouped.
    RejectProperty {
        Disposition = "disposition" | "verdict",
        Cause = "cause",
        Type = "type",
        Topic = "topic",
        State = "state",
        Deployment = "deployment",
    }
}

/// Rejects with the same value of a property.
#[derive(
    Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct RejectGroup {
    /// The common value; absent where it is not readable.
    pub value: Option<String>,
    /// The number of rejects.
    pub records: i64,
    /// The readable unbilled usage: the sum by unit, as in [`OpenRejects::units`].
    #[sqlx(json)]
    pub units: BTreeMap<String, u64>,
    /// When the oldest of them was recorded.
    pub oldest: DateTime<Utc>,
}

/// Open rejects of one disposition and cause.
#[derive(
    Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct OpenRejects {
    /// The disposition of the records.
    pub disposition: Disposition,
    /// The cause, in one word.
    pub cause: RejectCause,
    /// The number of rejects.
    pub records: i64,
    /// The readable unbilled usage: the sum by unit (`agents`, `seats`, `ms`, or `unknown` for an
    /// unknown type), at most 2^64 - 1.
    #[sqlx(json)]
    pub units: BTreeMap<String, u64>,
    /// When the oldest of them was recorded.
    pub oldest: DateTime<Utc>,
}

/// Groups of rejects, the largest first.
pub async fn groups(
    conn: &mut PgConnection,
    filter: &RejectFilter,
    by: RejectProperty,
) -> Result<Vec<RejectGroup>, sqlx::Error> {
    sqlx::query_as(
        "select value, sum(records)::bigint as records, min(oldest) as oldest,
             coalesce(jsonb_object_agg(unit, units) filter (where unit is not null), '{}') as units
         from (select case $5 when 'disposition' then disposition when 'cause' then cause when 'type' then event_type when 'topic' then topic
                       when 'state' then state when 'deployment' then deployment_id::text end as value,
                   case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                   count(*) as records, least(sum(units), 18446744073709551615) as units, min(recorded_at) as oldest
               from reject left join unnest($6::text[], $7::text[]) as known (event_type, unit) using (event_type)
               where ($1::text is null or state = $1) and ($2::text is null or disposition = $2) and ($3::text is null or cause = $3)
                   and ($4::text is null or event_type = $4)
               group by 1, 2) as by_unit
         group by value order by records desc, value",
    )
    .bind(filter.state)
    .bind(filter.disposition)
    .bind(filter.cause)
    .bind(&filter.event_type)
    .bind(by)
    .bind(UsageType::ALL.map(UsageType::as_str))
    .bind(UsageType::ALL.map(UsageType::unit))
    .fetch_all(conn)
    .await
}

/// Open rejects, by disposition and cause. Reads only the index of open rejects.
pub async fn open(conn: &mut PgConnection) -> Result<Vec<OpenRejects>, sqlx::Error> {
    sqlx::query_as(
        "select disposition, cause, sum(records)::bigint as records, min(oldest) as oldest,
             coalesce(jsonb_object_agg(unit, units) filter (where unit is not null), '{}') as units
         from (select disposition, cause, case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                   count(*) as records, least(sum(units), 18446744073709551615) as units, min(recorded_at) as oldest
               from reject left join unnest($1::text[], $2::text[]) as known (event_type, unit) using (event_type)
               where state = 'open' group by 1, 2, 3) as by_unit
         group by disposition, cause order by disposition, cause",
    )
    .bind(UsageType::ALL.map(UsageType::as_str))
    .bind(UsageType::ALL.map(UsageType::unit))
    .fetch_all(conn)
    .await
}
