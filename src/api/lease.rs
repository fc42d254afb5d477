//! The lease to show the domain series, for one process at a time.
//!
//! Only the ledger decides who holds the lease, when `shown_sequence` is raised before an answer.
//! The copy in this process only avoids useless queries.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::metrics_lease::MetricsLease;
use super::{Serving, Timeliness};
use crate::cause::{self, LastingFault};
use crate::ledger::{Lease, Ledger, StatementError, lease_step, leases};

pub(super) const NAME: &str = "metrics";
/// Maximum pause between attempts to take a free lease.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

impl MetricsLease {
    /// Takes the lease when it is free, renews it until `stop`, and then releases it.
    pub(super) async fn keep(&self, serving: &Serving, stop: &CancellationToken) {
        let length = serving.settings.lease_length;
        let mut fault = LastingFault::default();
        while !stop.is_cancelled() {
            let Some(asked) =
                lease_step(stop, tokio::time::timeout(length, self.ask(serving, length))).await
            else {
                break;
            };
            let cause = match asked {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(cause::text(&error)),
                Err(_) => Some("no answer in time".to_owned()),
            };
            match cause {
                Some(cause) if fault.is_new(&cause) => {
                    warn!(cause, "whether this process may show the domain series is not known")
                }
                Some(_) => {}
                None => drop(fault.end()),
            }
            stop.run_until_cancelled(tokio::time::sleep((length / 3).min(LONGEST_WAIT))).await;
        }
        if let Some(lease) = self.last() {
            let _ = lease_step(stop, self.give_back(&serving.api.own.ledger, lease)).await;
        }
    }

    async fn ask(&self, serving: &Serving, length: Duration) -> Result<(), StatementError> {
        let ledger = &serving.api.own.ledger;
        let until = Instant::now() + length;
        let can_show = can_show(serving).await?;
        match self.last() {
            // let another process take it
            Some(lease) if !can_show => {
                warn!(
                    epoch = lease.epoch,
                    "this process's folds are broken or behind: another may show the domain series"
                );
                self.give_back(ledger, lease).await?;
            }
            Some(lease)
                if ledger.run(async |conn| leases::renew(conn, &lease, length).await).await? =>
            {
                self.hold(lease, until)
            }
            Some(lease) => self.lost(&lease),
            // a process that still reads the ledger must not keep the lease from a process that can
            // show the series
            None if can_show => {
                if let Some(lease) = ledger
                    .run(async |conn| {
                        leases::take(conn, NAME, &serving.settings.holder, length).await
                    })
                    .await?
                {
                    info!(epoch = lease.epoch, "this process shows the domain series");
                    self.hold(lease, until);
                }
            }
            None => {}
        }
        Ok(())
    }

    async fn give_back(&self, ledger: &Ledger, lease: Lease) -> Result<(), StatementError> {
        self.forget();
        ledger.run(async |conn| leases::release(conn, lease).await).await
    }
}

/// Whether this process's state may be shown. A broken fold shows nothing, and a fold that was not
/// at the end of the ledger lately is outdated. During a rebuild every process is behind: a process
/// may then show its old state if it is not below the shown sequence.
async fn can_show(serving: &Serving) -> Result<bool, StatementError> {
    let Some(freshness) = *serving.api.metrics.watch().borrow() else { return Ok(false) };
    Ok(match serving.timeliness() {
        Timeliness::Current => true,
        Timeliness::Rebuilding => {
            serving
                .api
                .own
                .ledger
                .run(async |conn| leases::shown_sequence(conn, NAME).await)
                .await?
                <= freshness.sequence.number
        }
        Timeliness::Behind => false,
    })
}
