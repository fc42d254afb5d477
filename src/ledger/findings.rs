//! The latest findings of the continuous audit. From them every process decides whether usage may
//! be published.

use sqlx::Connection as _;
use sqlx::PgConnection;

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::leases::hold;
use super::{Difference, Lease, LeaseError, Sequence};

/// Number of differences per joint that are kept with their ids.
const EXAMPLES: usize = 10;
/// After this time without an audit, possibly no process audits the deployment any more.
const STALE_SECONDS: f64 = 3600.0;

/// An audit's finding at one joint.
#[derive(Clone, Copy, Debug)]
pub struct NewFinding<'a> {
    pub joint: &'a str,
    /// The deployment of a joint that covers only one.
    pub deployment: Option<Uuid>,
    pub differences: &'a [Difference],
    /// The number of open items for an operator.
    pub open: usize,
    /// Confirmed builds and claims that coderd no longer has.
    pub gone: i64,
    /// Usage of the last 30 days that differs, except usage that coderd was never seen to have.
    pub recent_usage_differs: i64,
    /// All accepted usage of the last 30 days.
    pub recent_usage: i64,
}

/// The latest finding at one joint.
#[derive(
    Clone, Debug, PartialEq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct Finding {
    /// The name of the joint.
    pub joint: String,
    /// The deployment of a joint that covers only one; absent for the whole ledger.
    pub deployment_id: Option<Uuid>,
    /// The number of differences.
    pub differences: i64,
    /// The number of open items for an operator. They are accounted for and stop nothing.
    pub open: i64,
    /// Confirmed builds and claims that coderd no longer has. They are not differences.
    pub gone: i64,
    /// Usage of the last 30 days that differs from coderd's rows, except usage that coderd was
    /// never seen to have.
    pub recent_usage_differs: i64,
    /// All accepted usage of the last 30 days of the deployment.
    pub recent_usage: i64,
    /// The first few differences: objects of `kind`, `id` and `detail`.
    #[sqlx(json)]
    pub examples: Vec<Difference>,
    /// The ledger sequence up to which the audit read the ledger.
    pub sequence: Sequence,
    /// When the audit ended, by the database's clock.
    pub audited_at: DateTime<Utc>,
    /// The age of the finding in seconds, by the database's clock.
    pub age_seconds: f64,
    /// The duration of the audit in seconds.
    pub seconds: f64,
    /// Since when the joint differs; absent: it balances.
    pub differs_since: Option<DateTime<Utc>>,
}

impl Finding {
    /// The deployment, if possibly no process audits it any more.
    #[must_use]
    pub fn unaudited_deployment(&self) -> Option<Uuid> {
        self.deployment_id.filter(|_| self.age_seconds > STALE_SECONDS)
    }
}

macro_rules! finding_columns {
    () => {
        "joint, deployment_id, differences, open, gone, recent_usage_differs, recent_usage, examples,
             incarnation || ':' || sequence as sequence, audited_at, seconds, differs_since,
             extract(epoch from clock_timestamp() - audited_at)::double precision as age_seconds"
    };
}
pub(super) use finding_columns;

/// Replaces the findings of the previous audit. Only the holder of the lease may.
///
/// # Errors
/// [`LeaseError`]; nothing is written.
pub async fn record(
    conn: &mut PgConnection,
    lease: &Lease,
    found: &[NewFinding<'_>],
    sequence: Sequence,
    seconds: f64,
) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    for one in found {
        let examples: Vec<&Difference> = one.differences.iter().take(EXAMPLES).collect();
        sqlx::query(
            "insert into audit_finding as last (joint, deployment_id, differences, open, examples, incarnation, sequence, audited_at, seconds,
                 differs_since, gone, recent_usage_differs, recent_usage)
             values ($1, $7, $2, $3, $4, $11, $5, clock_timestamp(), $6, case when $2 > 0 then clock_timestamp() end, $8, $9, $10)
             on conflict (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000')) do update set
                 differences = excluded.differences, open = excluded.open, examples = excluded.examples,
                 incarnation = excluded.incarnation, sequence = excluded.sequence, audited_at = excluded.audited_at, seconds = excluded.seconds, gone = excluded.gone,
                 recent_usage_differs = excluded.recent_usage_differs, recent_usage = excluded.recent_usage,
                 differs_since = case when excluded.differences > 0 then coalesce(last.differs_since, excluded.differs_since) end",
        )
        .bind(one.joint)
        .bind(i64::try_from(one.differences.len()).unwrap_or(i64::MAX))
        .bind(i64::try_from(one.open).unwrap_or(i64::MAX))
        .bind(Json(examples))
        .bind(sequence.number)
        .bind(seconds)
        .bind(one.deployment)
        .bind(one.gone)
        .bind(one.recent_usage_differs)
        .bind(one.recent_usage)
        .bind(sequence.incarnation)
        .execute(&mut *tx)
        .await?;
    }
    Ok(tx.commit().await?)
}

/// The latest findings, by joint and deployment, without retired sources. Empty before the first
/// audit.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    sqlx::query_as(concat!(
        "select ",
        finding_columns!(),
        " from audit_finding
         where deployment_id is null or deployment_id not in (select deployment_id from source where retired_act_id is not null)
         order by joint, deployment_id"
    ))
    .fetch_all(conn)
    .await
}
