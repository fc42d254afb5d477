//! The latest findings of the continuous audit. From them every process decides whether usage may
//! be published.

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::{Difference, Sequence};
use crate::words::words;

/// After this time without an audit, possibly no process audits the deployment any more.
const STALE_SECONDS: f64 = 3600.0;

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
    /// When the turn over rows of the last 35 days last ended; absent: not yet. It takes 24 hours.
    pub recent_turn_ended_at: Option<DateTime<Utc>>,
    /// Until when the running turn over recent rows should end; absent: none runs.
    pub recent_turn_due_at: Option<DateTime<Utc>>,
    /// When the turn over older rows last ended; absent: not yet. It takes 30 days.
    pub whole_turn_ended_at: Option<DateTime<Utc>>,
    /// Until when the running turn over older rows should end; absent: none runs.
    pub whole_turn_due_at: Option<DateTime<Utc>>,
}

words! {
    /// The rows that a turn of the continuous audit compares again.
    TurnRows {
        /// Rows of the last 35 days, in 24 hours.
        Recent = "recent",
        /// Older rows, in 30 days; of log and vendor all rows.
        Whole = "whole",
    }
}

/// A turn of the continuous audit that has not ended in its time.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct OverdueTurn {
    /// The name of the joint.
    pub joint: String,
    /// The deployment of a joint that covers only one; absent for the whole ledger.
    pub deployment_id: Option<Uuid>,
    /// The rows of the turn.
    pub rows: TurnRows,
    /// Until when it should have ended.
    pub due_at: DateTime<Utc>,
}

impl Finding {
    /// The deployment, if possibly no process audits it any more.
    #[must_use]
    pub fn unaudited_deployment(&self) -> Option<Uuid> {
        self.deployment_id.filter(|_| self.age_seconds > STALE_SECONDS)
    }

    /// The joint's turns that have not ended in their time.
    pub fn overdue_turns(&self, now: DateTime<Utc>) -> impl Iterator<Item = OverdueTurn> {
        [(TurnRows::Recent, self.recent_turn_due_at), (TurnRows::Whole, self.whole_turn_due_at)]
            .into_iter()
            .filter_map(move |(rows, due_at)| {
                let due_at = due_at.filter(|due_at| *due_at < now)?;
                let (joint, deployment_id) = (self.joint.clone(), self.deployment_id);
                Some(OverdueTurn { joint, deployment_id, rows, due_at })
            })
    }
}

macro_rules! finding_columns {
    () => {
        "joint, deployment_id, differences, open, gone, recent_usage_differs, recent_usage, examples,
             incarnation || ':' || sequence as sequence, audited_at, seconds, differs_since,
             (select (progress->>'recent_turn_ended_at')::timestamptz from audit_progress of where of.joint = audit_finding.joint
                 and of.deployment_id is not distinct from audit_finding.deployment_id) as recent_turn_ended_at,
             (select (progress->>'recent_turn_due_at')::timestamptz from audit_progress of where of.joint = audit_finding.joint
                 and of.deployment_id is not distinct from audit_finding.deployment_id) as recent_turn_due_at,
             (select (progress->>'whole_turn_ended_at')::timestamptz from audit_progress of where of.joint = audit_finding.joint
                 and of.deployment_id is not distinct from audit_finding.deployment_id) as whole_turn_ended_at,
             (select (progress->>'whole_turn_due_at')::timestamptz from audit_progress of where of.joint = audit_finding.joint
                 and of.deployment_id is not distinct from audit_finding.deployment_id) as whole_turn_due_at,
             extract(epoch from clock_timestamp() - audited_at)::double precision as age_seconds"
    };
}
pub(super) use finding_columns;

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
