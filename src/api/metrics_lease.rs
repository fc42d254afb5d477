//! This process's copy of the lease to show the domain series.

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;
use tracing::warn;

use crate::ledger::Lease;

/// This process's copy of the lease.
#[derive(Default)]
pub(super) struct MetricsLease(Mutex<Option<Held>>);

struct Held {
    lease: Lease,
    /// Measured from before the query, so never later than the ledger's own expiry.
    until: Instant,
}

impl MetricsLease {
    /// The lease, if this process holds it.
    pub(super) fn held(&self) -> Option<Lease> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().filter(|held| held.until > Instant::now()).map(|held| held.lease.clone())
    }

    /// The ledger reported that another process has the lease.
    pub(super) fn lost(&self, lease: &Lease) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.as_ref().is_some_and(|held| held.lease.epoch == lease.epoch) {
            *held = None;
            warn!(epoch = lease.epoch, "another process shows the domain series now");
        }
    }

    pub(super) fn hold(&self, lease: Lease, until: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Held { lease, until });
    }

    pub(super) fn last(&self) -> Option<Lease> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|held| held.lease.clone())
    }

    /// Drops the copy before the lease is released.
    pub(super) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
