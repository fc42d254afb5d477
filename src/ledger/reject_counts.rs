//! Rejects in numbers: how many, since when, and what is at stake.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::rejects::units;
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
        /// How they stand.
        State = "state",
        /// The deployment.
        Deployment = "deployment",
    }
}

/// Rejects that have something in common.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct RejectGroup {
    /// What they have in common; absent where it could not be read.
    pub value: Option<String>,
    /// How many.
    pub records: i64,
    /// What is at stake, as far as it could be read: the sum by unit, as in [`OpenRejects::units`].
    pub units: BTreeMap<String, u64>,
    /// When the first of them was recorded.
    pub oldest: DateTime<Utc>,
}

/// Open rejects of one verdict and cause.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct OpenRejects {
    /// What they are.
    pub verdict: Verdict,
    /// Why, in one word.
    pub cause: RejectCause,
    /// How many.
    pub records: i64,
    /// What is at stake, as far as it could be read: the sum by unit (`agents`, `seats`, `ms`, or `unknown` for a type that is not known),
    /// at most 2^64 - 1.
    pub units: BTreeMap<String, u64>,
    /// When the first of them was recorded.
    pub oldest: DateTime<Utc>,
}

impl Ledger {
    /// Rejects in groups, the largest first.
    pub async fn reject_groups(&self, filter: &RejectFilter, by: RejectProperty) -> Result<Vec<RejectGroup>, sqlx::Error> {
        let rows = sqlx::query(
            "select case $5 when 'verdict' then verdict when 'cause' then cause when 'type' then event_type when 'topic' then topic
                     when 'state' then state when 'deployment' then deployment_id::text end as value,
                 case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                 count(*) as records, least(sum(units), 18446744073709551615)::text as units, min(recorded_at) as oldest
             from reject left join unnest($6::text[], $7::text[]) as known (event_type, unit) using (event_type)
             where ($1::text is null or state = $1) and ($2::text is null or verdict = $2) and ($3::text is null or cause = $3)
                 and ($4::text is null or event_type = $4)
             group by 1, 2 order by 1, 2",
        )
        .bind(filter.state)
        .bind(filter.verdict)
        .bind(filter.cause)
        .bind(&filter.event_type)
        .bind(by)
        .bind(UsageType::ALL.map(UsageType::as_str))
        .bind(UsageType::ALL.map(UsageType::unit))
        .fetch_all(&self.pool)
        .await?;
        let groups = added_up(&rows, |row| row.try_get("value"))?.into_iter();
        let mut groups: Vec<_> =
            groups.map(|sum| RejectGroup { value: sum.of, records: sum.records, units: sum.units, oldest: sum.oldest }).collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.records));
        Ok(groups)
    }

    /// What waits for somebody to act on it, by verdict and cause. Reads the index of open rejects alone.
    pub async fn open_rejects(&self) -> Result<Vec<OpenRejects>, sqlx::Error> {
        let rows = sqlx::query(
            "select verdict, cause, case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                 count(*) as records, least(sum(units), 18446744073709551615)::text as units, min(recorded_at) as oldest
             from reject left join unnest($1::text[], $2::text[]) as known (event_type, unit) using (event_type)
             where state = 'open' group by 1, 2, 3 order by 1, 2, 3",
        )
        .bind(UsageType::ALL.map(UsageType::as_str))
        .bind(UsageType::ALL.map(UsageType::unit))
        .fetch_all(&self.pool)
        .await?;
        let open = added_up(&rows, |row| Ok((row.try_get("verdict")?, row.try_get("cause")?)))?.into_iter().map(|sum| {
            let (verdict, cause) = sum.of;
            OpenRejects { verdict, cause, records: sum.records, units: sum.units, oldest: sum.oldest }
        });
        Ok(open.collect())
    }
}

/// Rejects that have the same in common.
struct Sum<K> {
    of: K,
    records: i64,
    units: BTreeMap<String, u64>,
    oldest: DateTime<Utc>,
}

/// Adds up rows, a row a unit, that stand together where they have the same in common.
fn added_up<K: PartialEq>(rows: &[PgRow], of: impl Fn(&PgRow) -> Result<K, sqlx::Error>) -> Result<Vec<Sum<K>>, sqlx::Error> {
    let mut sums: Vec<Sum<K>> = Vec::new();
    for row in rows {
        let (of, oldest) = (of(row)?, row.try_get("oldest")?);
        if sums.last().is_none_or(|last| last.of != of) {
            sums.push(Sum { of, records: 0, units: BTreeMap::new(), oldest });
        }
        let Some(last) = sums.last_mut() else { continue };
        last.records += row.try_get::<i64, _>("records")?;
        last.oldest = last.oldest.min(oldest);
        if let Some(unit) = row.try_get("unit")? {
            last.units.insert(unit, units(row.try_get("units")?)?.unwrap_or_default());
        }
    }
    Ok(sums)
}
