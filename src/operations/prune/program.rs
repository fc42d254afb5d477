//! The program removes due rows by itself, in rounds of bounded cost.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::removal::{Removal, count, failure, with_lease};
use crate::ledger::{
    Lease, Ledger, PROGRAM, PruneKind, PrunePlace, Removed, Retention, prune, recoveries,
};
use crate::operations::{Actor, OperationError};

/// Transactions of a round for each kind, with up to 500 rows each. With one round a minute, this
/// is 7.2 million rows a day.
const STEPS: u32 = 10;

/// No round begins earlier than this after the end of the last one, in any process.
const PAUSE: TimeDelta = TimeDelta::seconds(50);

/// The counts are written to an act this long after the first removal that they contain.
const COUNTED_TOGETHER: TimeDelta = TimeDelta::hours(24);

/// The pruning of one process.
pub struct Pruner {
    ledger: Ledger,
    retention: Retention,
    holder: String,
    /// Where the next round begins, by kind; from the start without one. A restart begins from the
    /// start, which costs only reading.
    places: BTreeMap<PruneKind, PrunePlace>,
}

impl Pruner {
    #[must_use]
    pub fn new(ledger: Ledger, retention: Retention) -> Self {
        let holder = Uuid::new_v4().to_string();
        Pruner { ledger, retention, holder, places: BTreeMap::new() }
    }

    /// Removes due rows, up to 10 transactions of each kind, and calls `each` after each. False:
    /// another process prunes or has just pruned, or a recovery is open.
    pub async fn round(
        &mut self,
        stop: &CancellationToken,
        each: &mut (dyn FnMut(PruneKind, Removed) + Send),
    ) -> Result<bool, OperationError> {
        if self.ledger.run(recoveries::open).await?.is_some() {
            return Ok(false);
        }
        let (ledger, holder) = (self.ledger.clone(), self.holder.clone());
        let done =
            with_lease(&ledger, &holder, stop, async |lease| self.work(lease, stop, each).await)
                .await?;
        Ok(done.unwrap_or(false))
    }

    async fn work(
        &mut self,
        lease: &Lease,
        stop: &CancellationToken,
        each: &mut (dyn FnMut(PruneKind, Removed) + Send),
    ) -> Result<bool, OperationError> {
        let now = self.ledger.clock.now();
        let states = self.ledger.run(prune::states).await?;
        let is_recent = |at: DateTime<Utc>| at <= now && now - at < PAUSE;
        if states.iter().filter_map(|state| state.ran_at).any(is_recent) {
            return Ok(false);
        }
        let mut outcome = Ok(());
        for kind in PruneKind::ALL {
            // a kind that fails does not keep the others
            outcome = outcome.and(self.round_of(kind, lease, stop, each).await);
            if stop.is_cancelled() {
                return Ok(true);
            }
        }
        outcome?;
        let states = self.ledger.run(prune::states).await?;
        let first = states.iter().filter_map(|state| state.counted_since).min();
        if first.is_some_and(|first| now - first >= COUNTED_TOGETHER) {
            count(&self.ledger, lease, &actor(), None, self.retention).await?;
        }
        Ok(true)
    }

    async fn round_of(
        &mut self,
        kind: PruneKind,
        lease: &Lease,
        stop: &CancellationToken,
        each: &mut (dyn FnMut(PruneKind, Removed) + Send),
    ) -> Result<(), OperationError> {
        let now = self.ledger.clock.now();
        let mut due_since = None;
        if let Some(before) = kind.due_before(self.retention, now) {
            let mut place = self.places.remove(&kind);
            let removal = Removal { ledger: &self.ledger, lease, kind, before, stop };
            let done =
                removal.run(&mut place, Some(STEPS), &mut |removed| each(kind, removed)).await?;
            due_since = done.left.map(|ended_at| ended_at + (now - before));
            self.places.extend(place.map(|place| (kind, place)));
        }
        if stop.is_cancelled() {
            return Ok(());
        }
        self.ledger
            .run(async |conn| prune::finish_round(conn, lease, kind, due_since, now).await)
            .await
            .map_err(failure)
    }
}

/// The program as the actor of its own acts.
pub(super) fn actor() -> Actor {
    Actor { name: PROGRAM.to_owned(), reason: "rows past their retention".to_owned() }
}
