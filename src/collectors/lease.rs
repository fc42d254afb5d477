//! The collector's lease. A separate task renews it: a slow statement in coderd's database or a
//! long pause does not lose it. Another collector replaces a killed one within seconds.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::settings::CollectError;
use crate::ledger::{Lease, Ledger, StatementError, leases};

/// A lease that a task renews until it is released, lost or dropped.
pub(super) struct CollectorLease {
    pub(super) lease: Lease,
    lost: CancellationToken,
    renewal: JoinHandle<()>,
}

impl CollectorLease {
    pub(super) fn start(ledger: &Ledger, lease: Lease, length: Duration) -> Self {
        let lost = CancellationToken::new();
        let renewal = tokio::spawn(renew(ledger.clone(), lease.clone(), length, lost.clone()));
        CollectorLease { lease, lost, renewal }
    }

    /// # Errors
    /// [`CollectError::LeaseLost`] once the ledger reports that another collector has the lease.
    pub(super) fn check(&self) -> Result<(), CollectError> {
        if self.lost.is_cancelled() { Err(CollectError::LeaseLost) } else { Ok(()) }
    }

    /// Lets another collector begin at once.
    pub(super) async fn release(self, ledger: &Ledger) -> Result<(), StatementError> {
        self.renewal.abort();
        ledger.run(async |conn| leases::release(conn, self.lease.clone()).await).await
    }
}

impl Drop for CollectorLease {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

/// Retries a ledger that does not answer: only the ledger's answer ends a lease.
async fn renew(ledger: Ledger, lease: Lease, length: Duration, lost: CancellationToken) {
    loop {
        tokio::time::sleep(length.div_f64(3.0)).await;
        if let Ok(Ok(false)) = tokio::time::timeout(
            length,
            ledger.run(async |conn| leases::renew(conn, &lease, length).await),
        )
        .await
        {
            return lost.cancel();
        }
    }
}
