//! Processes with the role `consume` remove what the settings of retention do not keep. Every
//! deployment has this role. One process at a time prunes.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{IntCounterVec, Opts, Registry};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Handles;
use crate::cli::Failure;
use crate::ledger::{PruneKind, Removed};
use crate::operations::Pruner;

/// Interval of the rounds.
const EVERY: Duration = Duration::from_secs(60);

/// The metric of this process's pruning.
#[derive(Clone)]
pub struct PruneTelemetry {
    removed: IntCounterVec,
}

impl PruneTelemetry {
    /// Registers the metric in `registry`.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let removed = IntCounterVec::new(
            Opts::new("tallyline_prune_removed_total", "Rows that retention has removed."),
            &["kind"],
        )?;
        registry.register(Box::new(removed.clone()))?;
        Ok(PruneTelemetry { removed })
    }

    /// Each metric, for the reference.
    #[must_use]
    pub fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![Box::new(self.removed.clone())]
    }

    fn removed(&self, kind: PruneKind, removed: Removed) {
        let rows = u64::try_from(removed.rows).unwrap_or_default();
        self.removed.with_label_values(&[kind.as_str()]).inc_by(rows);
    }
}

/// Prunes until `stop`. An error is logged, and the next round retries.
pub(super) async fn run(
    handles: Handles,
    telemetry: PruneTelemetry,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let mut pruner = Pruner::new(handles.ledger.ledger.clone(), handles.retention());
    loop {
        let mut rows = 0;
        let mut each = |kind, removed: Removed| {
            telemetry.removed(kind, removed);
            rows += removed.rows;
        };
        match pruner.round(&stop, &mut each).await {
            Ok(_) if rows > 0 => info!(rows, "rows past their retention are removed"),
            Ok(_) => {}
            Err(error) => warn!(%error, "rows past their retention not removed, retrying"),
        }
        if stop.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_none() {
            return Ok(());
        }
    }
}
