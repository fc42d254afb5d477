//! What the continuous audit found last: how every process knows whether money may leave.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use sqlx::types::Json;

use super::leases::hold;
use super::{Difference, Lease, LeaseError, Ledger};

/// So many differences of a joint are kept with their ids.
const EXAMPLES: usize = 10;

/// What an audit found at one joint.
#[derive(Clone, Copy, Debug)]
pub struct NewFinding<'a> {
    /// The joint's name.
    pub joint: &'a str,
    /// What does not balance.
    pub differences: &'a [Difference],
    /// How much waits for an operator.
    pub open: usize,
}

/// What the last audit found at one joint.
#[derive(Clone, Debug, PartialEq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Finding {
    /// The joint's name.
    pub joint: String,
    /// How much does not balance. While there is any, nothing is published.
    pub differences: i64,
    /// How much waits for an operator: it is in the books, and stops nothing.
    pub open: i64,
    /// The first few differences: objects of `kind`, `id` and `detail`.
    #[sqlx(json)]
    pub examples: Vec<Example>,
    /// The ledger sequence up to which the ledger's own books were read.
    pub sequence: i64,
    /// When, by the database's clock.
    pub audited_at: DateTime<Utc>,
    /// How long ago that is, by the database's clock.
    pub age_seconds: f64,
    /// How long the audit took.
    pub seconds: f64,
    /// Since when it has not balanced; none: it balances.
    pub differs_since: Option<DateTime<Utc>>,
}

/// A difference as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Example {
    /// What kind of difference.
    pub kind: String,
    /// The event, batch or partition.
    pub id: String,
    /// What is on both sides.
    pub detail: String,
}

impl Ledger {
    /// Writes what an audit found, in place of what the one before found. Only who holds the lease may.
    ///
    /// # Errors
    /// [`LeaseError`]; then nothing is written.
    pub async fn record_findings(&self, lease: &Lease, found: &[NewFinding<'_>], sequence: i64, seconds: f64) -> Result<(), LeaseError> {
        let mut tx = self.pool.begin().await?;
        hold(&mut tx, lease).await?;
        for one in found {
            let examples: Vec<&Difference> = one.differences.iter().take(EXAMPLES).collect();
            sqlx::query(
                "insert into audit_finding as last (joint, differences, open, examples, sequence, audited_at, seconds, differs_since)
                 values ($1, $2, $3, $4, $5, clock_timestamp(), $6, case when $2 > 0 then clock_timestamp() end)
                 on conflict (joint) do update set differences = excluded.differences, open = excluded.open, examples = excluded.examples,
                     sequence = excluded.sequence, audited_at = excluded.audited_at, seconds = excluded.seconds,
                     differs_since = case when excluded.differences > 0 then coalesce(last.differs_since, excluded.differs_since) end",
            )
            .bind(one.joint)
            .bind(i64::try_from(one.differences.len()).unwrap_or(i64::MAX))
            .bind(i64::try_from(one.open).unwrap_or(i64::MAX))
            .bind(Json(examples))
            .bind(sequence)
            .bind(seconds)
            .execute(&mut *tx)
            .await?;
        }
        Ok(tx.commit().await?)
    }

    /// What the last audits found, by joint. Empty before the first.
    ///
    /// # Errors
    /// The database's.
    pub async fn findings(&self) -> Result<Vec<Finding>, sqlx::Error> {
        sqlx::query_as(
            "select joint, differences, open, examples, sequence, audited_at, seconds, differs_since,
                 extract(epoch from clock_timestamp() - audited_at)::double precision as age_seconds
             from audit_finding order by joint",
        )
        .fetch_all(&self.pool)
        .await
    }

    /// What does not balance, in words; none: nothing that an audit knows of.
    ///
    /// # Errors
    /// The database's: then whether the books balance is not known.
    pub async fn imbalance(&self) -> Result<Option<String>, sqlx::Error> {
        let mut words = String::new();
        for finding in self.findings().await?.iter().filter(|finding| finding.differences > 0) {
            let separator = if words.is_empty() { "" } else { "; " };
            let Finding { joint, differences, .. } = finding;
            let noun = if *differences == 1 { "difference" } else { "differences" };
            // writing into a text cannot fail
            let _ = write!(words, "{separator}{differences} {noun} between {joint}");
            if let Some(first) = finding.examples.first() {
                let _ = write!(words, " ({} {}: {})", first.kind, first.id, first.detail);
            }
        }
        Ok(Some(words).filter(|words| !words.is_empty()))
    }
}
