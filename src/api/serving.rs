//! The state that all handlers share.

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::handles::ProcessHandles;
use super::metrics_lease::MetricsLease;
use super::plans::Executions;
use super::probe::Probe;
use super::rejects::RejectsTelemetry;
use super::settings::ServeSettings;
use super::sources::KnownSources;
use super::telemetry::ApiTelemetry;
use crate::clock::Clock;
use crate::operations::Operations;
use crate::projection::View;
use crate::stages::{LicensesState, MetricsState};

/// Inputs of the HTTP server: handles of the process's other parts. The creator must run the
/// projections behind the views.
#[derive(Clone)]
pub struct Api {
    /// Handles of every process. With these, the HTTP server changes only the lease `metrics` in
    /// the ledger.
    pub own: ProcessHandles,
    /// Operations of operators.
    pub operations: Operations,
    /// The clock for entitlements.
    pub clock: Clock,
    pub metrics: View<MetricsState>,
    /// Licenses and managed agents.
    pub licenses: View<LicensesState>,
}

/// How close the states are to the end of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timeliness {
    /// Both reached it lately.
    Current,
    /// A rebuild of one state is making progress. Every process shows the old state until the new
    /// one is ready.
    Rebuilding,
    /// At least one did not reach it lately, or never did.
    Behind,
}

/// State shared by all handlers.
pub(super) struct Serving {
    pub(super) api: Api,
    pub(super) settings: ServeSettings,
    pub(super) known: KnownSources,
    pub(super) lease: MetricsLease,
    pub(super) telemetry: ApiTelemetry,
    pub(super) rejects: RejectsTelemetry,
    /// Checks for `/readyz`.
    pub(super) probe: Probe,
    pub(super) executions: Executions,
    /// Stops long work.
    pub(super) stop: CancellationToken,
    /// Serializes status requests, because counting everything is expensive.
    pub(super) counting: tokio::sync::Mutex<()>,
}

impl Serving {
    pub(super) fn timeliness(&self) -> Timeliness {
        let lately = |at: Instant| at.elapsed() <= self.settings.fresh;
        let rebuilds = || {
            [self.api.metrics.rebuild_progress_at(), self.api.licenses.rebuild_progress_at()]
                .into_iter()
                .flatten()
                .any(lately)
        };
        match self.known.now() {
            Some(known) if lately(known.reached_at) => Timeliness::Current,
            Some(_) if rebuilds() => Timeliness::Rebuilding,
            Some(_) | None => Timeliness::Behind,
        }
    }
}
