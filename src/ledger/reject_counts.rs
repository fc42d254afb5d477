//! Rejects in numbers: how many, since when, and what is at stake.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::FromRow;

use super::{Ledger, RejectFilter, Verdict};
use crate::event::{RejectCause, UsageType};
use crate::words::words;

words! {
    /// What rejects can have in common.
    RejectProperty {
        /// What they are.
        Verdict = "verdict",
        /// Why, in one word.
        Cause = "cause",
        /// The event's type.
        Type = "type",
        /// The topic.
        Topic = "topic",
        /// Their state.
        State = "state",
        /// The deployment.
        Deployment = "deployment",
    }
}

/// Rejects that have something in common.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct RejectGroup {
    /// What they have in common; absent where it could not be read.
    pub value: Option<String>,
    /// How many.
    pub records: i64,
    /// What is at stake, as far as it could be read: the sum by unit, as in [`OpenRejects::units`].
    #[sqlx(json)]
    pub units: BTreeMap<String, u64>,
    /// When the first of them was recorded.
    pub oldest: DateTime<Utc>,
}

/// Open rejects of one verdict and cause.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct OpenRejects {
    /// What they are.
    pub verdict: Verdict,
    /// Why, in one word.
    pub cause: RejectCause,
    /// How many.
    pub records: i64,
    /// What is at stake, as far as it could be read: the sum by unit (`agents`, `seats`, `ms`, or `unknown` for a type that is not known),
    /// at most 2^64 - 1.
    #[sqlx(json)]
    pub units: BTreeMap<String, u64>,
    /// When the first of them was recorded.
    pub oldest: DateTime<Utc>,
}

impl Ledger {
    /// Rejects in groups, the largest first.
    pub async fn reject_groups(&self, filter: &RejectFilter, by: RejectProperty) -> Result<Vec<RejectGroup>, sqlx::Error> {
        sqlx::query_as(
            "select value, sum(records)::bigint as records, min(oldest) as oldest,
                 coalesce(jsonb_object_agg(unit, units) filter (where unit is not null), '{}') as units
             from (select case $5 when 'verdict' then verdict when 'cause' then cause when 'type' then event_type when 'topic' then topic
                           when 'state' then state when 'deployment' then deployment_id::text end as value,
                       case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                       count(*) as records, least(sum(units), 18446744073709551615) as units, min(recorded_at) as oldest
                   from reject left join unnest($6::text[], $7::text[]) as known (event_type, unit) using (event_type)
                   where ($1::text is null or state = $1) and ($2::text is null or verdict = $2) and ($3::text is null or cause = $3)
                       and ($4::text is null or event_type = $4)
                   group by 1, 2) as by_unit
             group by value order by records desc, value",
        )
        .bind(filter.state)
        .bind(filter.verdict)
        .bind(filter.cause)
        .bind(&filter.event_type)
        .bind(by)
        .bind(UsageType::ALL.map(UsageType::as_str))
        .bind(UsageType::ALL.map(UsageType::unit))
        .fetch_all(&self.pool)
        .await
    }

    /// What waits for somebody to act on it, by verdict and cause. Reads the index of open rejects alone.
    pub async fn open_rejects(&self) -> Result<Vec<OpenRejects>, sqlx::Error> {
        sqlx::query_as(
            "select verdict, cause, sum(records)::bigint as records, min(oldest) as oldest,
                 coalesce(jsonb_object_agg(unit, units) filter (where unit is not null), '{}') as units
             from (select verdict, cause, case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                       count(*) as records, least(sum(units), 18446744073709551615) as units, min(recorded_at) as oldest
                   from reject left join unnest($1::text[], $2::text[]) as known (event_type, unit) using (event_type)
                   where state = 'open' group by 1, 2, 3) as by_unit
             group by verdict, cause order by verdict, cause",
        )
        .bind(UsageType::ALL.map(UsageType::as_str))
        .bind(UsageType::ALL.map(UsageType::unit))
        .fetch_all(&self.pool)
        .await
    }
}
