//! Records that are no accepted event, as operators work on them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::Row;

use super::Ledger;

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
    /// What waits for somebody to act on it, by verdict and cause. Reads the index of open rejects alone.
    ///
    /// # Errors
    /// The database's.
    pub async fn open_rejects(&self) -> Result<Vec<OpenRejects>, sqlx::Error> {
        let rows = sqlx::query(
            "select verdict, cause,
                 case when units is null then null when event_type = 'dc_managed_agents_v1' then 'agents'
                     when event_type = 'hb_ai_seats_v1' then 'seats' when event_type = 'hb_agent_runtime_v1' then 'ms' else 'unknown' end as unit,
                 count(*), least(sum(units), 18446744073709551615)::text, min(recorded_at)
             from reject where state = 'open' group by verdict, cause, unit order by verdict, cause, unit",
        )
        .fetch_all(&self.pool)
        .await?;
        let mut open: Vec<OpenRejects> = Vec::new();
        for row in &rows {
            let (verdict, cause, oldest): (String, String, DateTime<Utc>) = (row.try_get(0)?, row.try_get(1)?, row.try_get(5)?);
            if open.last().is_none_or(|last| (&last.verdict, &last.cause) != (&verdict, &cause)) {
                open.push(OpenRejects { verdict, cause, records: 0, units: BTreeMap::new(), oldest });
            }
            let Some(last) = open.last_mut() else { continue };
            last.records += row.try_get::<i64, _>(3)?;
            last.oldest = last.oldest.min(oldest);
            if let Some(unit) = row.try_get(2)? {
                last.units.insert(unit, units(row.try_get(4)?)?.unwrap_or_default());
            }
        }
        Ok(open)
    }
}

/// A number of 64 bits without a sign, as PostgreSQL writes it.
fn units(text: Option<&str>) -> Result<Option<u64>, sqlx::Error> {
    text.map(|text| text.parse().map_err(|_| sqlx::Error::Protocol("units out of range".into()))).transpose()
}
