//! Removes due rows of a kind, page by page, under the lease.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;

use crate::ledger::{
    ActKind, Lease, LeaseError, Ledger, NewAct, PruneKind, PrunePlace, Removed, RemovedPage,
    Retention, Subject, lease_step, leases, prune,
};
use crate::operations::{Actor, OperationError};
use crate::stages::{LicensesState, MetricsState, Stage as _};

/// The lease is renewed before each transaction. If it expires during one, another process waits
/// for the end of that transaction.
const LEASE: Duration = Duration::from_secs(60);

/// The stages of this version.
pub(super) fn stages() -> [&'static str; 2] {
    [MetricsState::NAME, LicensesState::NAME]
}

/// Removes due rows of a kind.
pub(super) struct Removal<'a> {
    pub ledger: &'a Ledger,
    pub lease: &'a Lease,
    pub kind: PruneKind,
    /// Rows that ended before are due.
    pub before: DateTime<Utc>,
    pub stop: &'a CancellationToken,
}

/// The result of [`Removal::run`].
#[derive(Default)]
pub(super) struct Removals {
    /// When the first due row ended that it left.
    pub left: Option<DateTime<Utc>>,
    /// Due rows that stay as evidence.
    pub kept: i64,
}

impl Removal<'_> {
    /// Removes rows after `place` and moves it with each transaction; at the end of the kind it is
    /// None. Stops after `most` pages or transactions, or at the stop. Calls `each` after each
    /// transaction.
    pub async fn run(
        &self,
        place: &mut Option<PrunePlace>,
        most: Option<u32>,
        each: &mut (dyn FnMut(Removed) + Send),
    ) -> Result<Removals, OperationError> {
        let (mut steps, mut removals) = (0, Removals::default());
        loop {
            let after = *place;
            let page = self
                .ledger
                .run(async |conn| prune::due(conn, self.kind, self.before, after, &stages()).await)
                .await?;
            for rows in prune::transactions(&page.due) {
                if self.stop.is_cancelled() || most.is_some_and(|most| steps >= most) {
                    removals.left = rows.first().map(|row| row.ended_at);
                    return Ok(removals);
                }
                let page = self.remove(rows).await?;
                each(page.removed);
                removals.kept += page.kept;
                *place = rows.last().and_then(|row| row.place);
                steps += 1;
            }
            removals.kept += page.kept;
            *place = page.next;
            if place.is_none() || self.stop.is_cancelled() {
                return Ok(removals);
            }
            if page.due.is_empty() {
                steps += 1;
                if most.is_some_and(|most| steps >= most) {
                    return Ok(removals);
                }
            }
        }
    }

    async fn remove(&self, rows: &[prune::Due]) -> Result<RemovedPage, OperationError> {
        let Removal { ledger, lease, kind, before, .. } = *self;
        if !ledger.run(async |conn| leases::renew(conn, lease, LEASE).await).await? {
            return Err(failure(LeaseError::Lost(lease.name.clone())));
        }
        let now = ledger.clock.now();
        let page = ledger
            .run(async |conn| prune::remove(conn, lease, kind, before, rows, now).await)
            .await
            .map_err(failure)?;
        if page.kept > 0 {
            tracing::warn!(
                kind = kind.as_str(),
                rows = page.kept,
                "rows kept as evidence: they do not match the digest of their batch; run `tallyline audit --deep`"
            );
        }
        Ok(page)
    }
}

/// Writes the counts since the newest act `prune` in an act of this actor. None: there are none.
pub(super) async fn count(
    ledger: &Ledger,
    lease: &Lease,
    actor: &Actor,
    plan: Option<&str>,
    retention: Retention,
) -> Result<Option<i64>, OperationError> {
    let (act, now) = (act(actor, plan, retention), ledger.clock.now());
    ledger
        .run(async |conn| prune::count_in_act(conn, lease, &act, now).await)
        .await
        .map_err(failure)
}

/// Works under the lease, and releases it. None: another process has it.
pub(super) async fn with_lease<T>(
    ledger: &Ledger,
    holder: &str,
    stop: &CancellationToken,
    work: impl AsyncFnOnce(&Lease) -> Result<T, OperationError>,
) -> Result<Option<T>, OperationError> {
    let take = ledger.run(async |conn| leases::take(conn, prune::LEASE, holder, LEASE).await);
    let Some(taken) = lease_step(stop, take).await else { return Ok(None) };
    let Some(lease) = taken? else { return Ok(None) };
    let done = work(&lease).await;
    let release = ledger.run(async |conn| leases::release(conn, lease).await);
    if let Some(Err(error)) = lease_step(stop, release).await {
        let error: crate::ledger::StatementError = error;
        tracing::debug!(error = crate::cause::text(&error), "the lease {} expires", prune::LEASE);
    }
    done.map(Some)
}

pub(super) fn failure(error: LeaseError) -> OperationError {
    match error {
        LeaseError::Lost(_) => OperationError::Forbidden(format!("{error}: plan again")),
        LeaseError::Database(error) => OperationError::Ledger(error),
    }
}

/// An act `prune`. Its subject is the plan's hash, or `retention` for the program's own acts.
fn act<'a>(actor: &'a Actor, plan: Option<&'a str>, retention: Retention) -> NewAct<'a> {
    let days = PruneKind::ALL.map(|kind| (kind.to_string(), kind.days(retention).into()));
    let detail = serde_json::json!({ "days": serde_json::Map::from_iter(days) });
    actor.act(ActKind::Prune, Subject::Named(plan.unwrap_or("retention")), detail)
}
