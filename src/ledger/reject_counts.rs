//! Rejects in numbers: how many, since when, and what is at stake.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::rejects::units;
use super::{Ledger, RejectFilter};
use crate::event::UsageType;

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
    /// rejected, conflict or held.
    pub verdict: String,
    /// The short word.
    pub cause: String,
    /// How many.
    pub records: i64,
    /// What is at stake, as far as it could be read: the sum by unit (`agents`, `seats`, `ms`, or `unknown` for a type that is not known),
    /// at most 2^64 - 1.
    pub units: BTreeMap<String, u64>,
    /// When the first of them was recorded.
    pub oldest: DateTime<Utc>,
}

impl Ledger {
    /// Rejects in groups, the largest first. `by` is verdict, cause, type, topic, state or deployment.
    ///
    /// # Errors
    /// The database's.
    pub async fn reject_groups(&self, filter: &RejectFilter, by: &str) -> Result<Vec<RejectGroup>, sqlx::Error> {
        let rows = sqlx::query(
            "select case $5 when 'verdict' then verdict when 'cause' then cause when 'type' then event_type when 'topic' then topic
                     when 'state' then state when 'deployment' then deployment_id::text end as value, null,
                 case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                 count(*), least(sum(units), 18446744073709551615)::text, min(recorded_at)
             from reject left join unnest($6::text[], $7::text[]) as known (event_type, unit) using (event_type)
             where ($1::text is null or state = $1) and ($2::text is null or verdict = $2) and ($3::text is null or cause = $3)
                 and ($4::text is null or event_type = $4)
             group by 1, 3 order by 1, 3",
        )
        .bind(filter.state)
        .bind(filter.verdict)
        .bind(&filter.cause)
        .bind(&filter.event_type)
        .bind(by)
        .bind(UsageType::ALL.map(UsageType::as_str))
        .bind(UsageType::ALL.map(UsageType::unit))
        .fetch_all(&self.pool)
        .await?;
        let groups = added_up(&rows)?.into_iter();
        let mut groups: Vec<_> =
            groups.map(|sum| RejectGroup { value: sum.of.0, records: sum.records, units: sum.units, oldest: sum.oldest }).collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.records));
        Ok(groups)
    }

    /// What waits for somebody to act on it, by verdict and cause. Reads the index of open rejects alone.
    ///
    /// # Errors
    /// The database's.
    pub async fn open_rejects(&self) -> Result<Vec<OpenRejects>, sqlx::Error> {
        let rows = sqlx::query(
            "select verdict, cause, case when units is not null then coalesce(known.unit, 'unknown') end as unit,
                 count(*), least(sum(units), 18446744073709551615)::text, min(recorded_at)
             from reject left join unnest($1::text[], $2::text[]) as known (event_type, unit) using (event_type)
             where state = 'open' group by 1, 2, 3 order by 1, 2, 3",
        )
        .bind(UsageType::ALL.map(UsageType::as_str))
        .bind(UsageType::ALL.map(UsageType::unit))
        .fetch_all(&self.pool)
        .await?;
        let open = added_up(&rows)?.into_iter().map(|sum| {
            let (verdict, cause) = (sum.of.0.unwrap_or_default(), sum.of.1.unwrap_or_default());
            OpenRejects { verdict, cause, records: sum.records, units: sum.units, oldest: sum.oldest }
        });
        Ok(open.collect())
    }
}

/// Rejects that have the same two words.
struct Sum {
    of: (Option<String>, Option<String>),
    records: i64,
    units: BTreeMap<String, u64>,
    oldest: DateTime<Utc>,
}

/// Adds up rows of two words, a unit, records, units and the oldest, in the order of the words.
fn added_up(rows: &[PgRow]) -> Result<Vec<Sum>, sqlx::Error> {
    let mut sums: Vec<Sum> = Vec::new();
    for row in rows {
        let (of, oldest) = ((row.try_get(0)?, row.try_get(1)?), row.try_get(5)?);
        if sums.last().is_none_or(|last| last.of != of) {
            sums.push(Sum { of, records: 0, units: BTreeMap::new(), oldest });
        }
        let Some(last) = sums.last_mut() else { continue };
        last.records += row.try_get::<i64, _>(3)?;
        last.oldest = last.oldest.min(oldest);
        if let Some(unit) = row.try_get(2)? {
            last.units.insert(unit, units(row.try_get(4)?)?.unwrap_or_default());
        }
    }
    Ok(sums)
}
