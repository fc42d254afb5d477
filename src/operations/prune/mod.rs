//! Retention: plan what would be removed, and remove exactly that. The program removes due rows by
//! itself too: see [`Pruner`].

mod program;
mod removal;

pub use program::Pruner;

use axum::http::Method;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use self::removal::{Removal, count, stages, with_lease};
use super::plan_hash::plan_hash;
use super::{
    ApiRequest, Operation, OperationError, Operations, Run, Step, instant, optional_instant,
};
use crate::ledger::{PruneKind, Removed, prune, recoveries};

/// Show what retention would remove; writes nothing.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args,
)]
#[serde(deny_unknown_fields)]
pub struct PruneRequest {
    /// Instant from which the days of the settings are counted back; not in the future. Default:
    /// now.
    #[arg(long, value_name = "INSTANT", value_parser = instant)]
    #[serde(default, deserialize_with = "optional_instant")]
    pub at: Option<DateTime<Utc>>,
}

/// Remove what was planned, if it is still the same.
///
/// After an interruption, plan again: what was removed is counted in the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct PruneExecution {
    /// The request of the plan, with its instant.
    #[command(flatten)]
    pub prune: PruneRequest,
    /// Hash of the plan.
    #[arg(long = "plan")]
    pub hash: String,
}

/// What retention would remove.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PrunePlan {
    /// SHA-256 of the numbers, in hexadecimal. Absent: nothing is due.
    pub hash: Option<String>,
    /// Instant from which the days are counted back.
    pub at: DateTime<Utc>,
    /// Due rows, by kind.
    pub kinds: Vec<PlannedPrune>,
}

/// Due rows of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedPrune {
    /// What would be removed.
    pub kind: PruneKind,
    /// Days for which the kind is kept; 0: for ever.
    pub days: u32,
    /// Rows that would be removed.
    pub rows: i64,
    /// Estimated bytes: of the values before compression, without indexes.
    pub bytes: i64,
    /// When the first of these rows ended; absent without rows.
    pub oldest: Option<DateTime<Utc>>,
    /// When the last of these rows ended; absent without rows.
    pub newest: Option<DateTime<Utc>>,
    /// Rows past their days that stay as evidence: their batch did not match its digest at the last
    /// removal. A removal compares each batch, and again after 30 days.
    pub kept: i64,
}

/// Rows that were removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pruned {
    /// Hash of the plan.
    pub hash: String,
    /// Id of the act that counts the rows; absent: nothing was removed.
    pub act_id: Option<i64>,
    /// Removed rows, by kind.
    pub kinds: Vec<PrunedKind>,
}

/// Removed rows of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PrunedKind {
    /// What was removed.
    pub kind: PruneKind,
    #[serde(flatten)]
    pub removed: Removed,
    /// Rows past their days that stay as evidence: their batch does not match its digest.
    /// `tallyline audit --deep` names the changed ones.
    pub kept: i64,
}

impl ApiRequest for PruneRequest {
    type Answer = PrunePlan;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/prunes";
    const ANSWER: &'static str = "The due rows. Nothing is written.";
    const IS_LONG: bool = true;
}

impl Operation for PruneRequest {
    async fn run(&self, run: Run<'_>) -> Result<PrunePlan, OperationError> {
        let operations = run.operations;
        let now = operations.ledger.clock.now();
        let at = self.at.unwrap_or(now);
        if at > now {
            return Err(OperationError::Invalid {
                field: "at",
                message: format!("{at:?} is in the future; expected at most {now:?}"),
            });
        }
        let mut kinds = Vec::new();
        for kind in PruneKind::ALL {
            kinds.push(operations.planned(kind, at, run).await?);
        }
        let hash = kinds.iter().any(|one| one.rows > 0).then(|| {
            let essence: Vec<_> = kinds
                .iter()
                .map(|one| (one.kind, one.days, one.rows, one.oldest, one.newest))
                .collect();
            plan_hash(&(at, essence))
        });
        Ok(PrunePlan { hash: hash.transpose()?, at, kinds })
    }
}

impl ApiRequest for PruneExecution {
    type Answer = Pruned;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/prunes/execute";
    const ANSWER: &'static str = "The removed rows. 409: they are not the planned ones.";
    const NEEDS_REASON: bool = true;
    const IS_LONG: bool = true;
}

impl Operation for PruneExecution {
    async fn run(&self, run: Run<'_>) -> Result<Pruned, OperationError> {
        if self.prune.at.is_none() {
            return Err(OperationError::Invalid {
                field: "at",
                message: "is missing: give the instant of the plan".to_owned(),
            });
        }
        if run.operations.ledger.run(recoveries::open).await?.is_some() {
            let message = "a recovery is open: prune once it is closed";
            return Err(OperationError::Forbidden(message.to_owned()));
        }
        let holder = Uuid::new_v4().to_string();
        let done = with_lease(&run.operations.ledger, &holder, run.stop, async |lease| {
            let plan = self.prune.run(run).await?;
            if plan.hash.as_deref() != Some(self.hash.as_str()) {
                return Err(OperationError::plan_changed());
            }
            run.operations.execute_prune(&plan, lease, run).await
        })
        .await?;
        done.ok_or_else(|| {
            OperationError::Forbidden("another process prunes now: try again in a minute".into())
        })
    }
}

impl Operations {
    async fn planned(
        &self,
        kind: PruneKind,
        at: DateTime<Utc>,
        run: Run<'_>,
    ) -> Result<PlannedPrune, OperationError> {
        let days = kind.days(self.retention);
        let mut planned =
            PlannedPrune { kind, days, rows: 0, bytes: 0, oldest: None, newest: None, kept: 0 };
        let Some(before) = kind.due_before(self.retention, at) else { return Ok(planned) };
        let mut after = None;
        loop {
            if run.stop.is_cancelled() {
                return Err(OperationError::Interrupted);
            }
            let page = self
                .ledger
                .run(async |conn| prune::due(conn, kind, before, after, &stages()).await)
                .await?;
            planned.kept += page.kept;
            for one in &page.due {
                planned.rows += one.rows;
                planned.bytes += one.bytes;
                let ended_at = Some(one.ended_at);
                planned.oldest =
                    planned.oldest.map_or(ended_at, |oldest| ended_at.min(Some(oldest)));
                planned.newest = planned.newest.max(ended_at);
            }
            match page.next {
                None => return Ok(planned),
                next => after = next,
            }
        }
    }

    /// Removes the planned rows and counts them in an act of this actor. Rows that the program
    /// removed before are counted first, in an act of the program.
    async fn execute_prune(
        &self,
        plan: &PrunePlan,
        lease: &crate::ledger::Lease,
        Run { actor, progress, stop, .. }: Run<'_>,
    ) -> Result<Pruned, OperationError> {
        count(&self.ledger, lease, &program::actor(), None, self.retention).await?;
        let hash = plan.hash.clone().unwrap_or_default();
        let (mut done, total) = (0, plan.kinds.iter().map(|one| one.rows).sum::<i64>());
        let mut kinds = Vec::new();
        for kind in PruneKind::ALL {
            let Some(before) = kind.due_before(self.retention, plan.at) else { continue };
            let mut removed = Removed::default();
            let removal = Removal { ledger: &self.ledger, lease, kind, before, stop };
            let mut each = |more: Removed| {
                removed += more;
                done += more.rows;
                let (done, total) = (done.unsigned_abs(), total.unsigned_abs());
                progress(Step { doing: "removing", items: "rows", done, total });
            };
            let kept = removal.run(&mut None, None, &mut each).await?.kept;
            kinds.push(PrunedKind { kind, removed, kept });
        }
        if stop.is_cancelled() {
            return Err(OperationError::Interrupted);
        }
        let act_id = count(&self.ledger, lease, actor, Some(&hash), self.retention).await?;
        Ok(Pruned { hash, act_id, kinds })
    }
}
