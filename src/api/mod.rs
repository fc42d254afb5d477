//! The HTTP server: `/metrics`, answers to coderd, and health checks.
//!
//! Answers come from memory, from two states that are folded along the ledger, and contain the sequence of their state. Two loops of
//! [`Server::run`] query the ledger: [`known`] for the sources and their completeness, [`lease`] for the right to show the domain series.

mod agents;
mod answer;
mod asked;
mod connections;
mod document;
mod domain;
mod entitlements;
mod executions;
mod guard;
mod host;
mod known;
mod lease;
mod metrics;
mod own;
mod paths;
mod ready;
mod recent;
mod rejects;
mod route;
mod serve;
mod settings;
mod standing;
mod status;
mod telemetry;
mod tokens;

pub use answer::ProblemBody;
pub use asked::{body_of, query_of};
pub use connections::Limits;
pub use executions::{PlanProblem, PlanStanding, PlanState, ShowPlan};
pub use own::{Own, OwnServer};
pub use serve::{ServeError, Server};
pub use settings::ServeSettings;
pub use status::ShowStatus;
pub use tokens::{Token, Tokens};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::operations::Desk;
use crate::projection::View;
use crate::stages::{LicensesState, MetricsState};

/// Inputs of the HTTP server: handles of the process's other parts. The creator must run the projections behind the views.
#[derive(Clone)]
pub struct Api {
    /// Handles of every process. The HTTP server changes only the lease `metrics` in the ledger.
    pub own: Own,
    /// Operations of operators.
    pub desk: Desk,
    /// The clock for entitlements.
    pub clock: Clock,
    pub metrics: View<MetricsState>,
    /// Licenses and managed agents.
    pub licenses: View<LicensesState>,
}

/// Addresses for operators, without passwords.
#[derive(Clone, Debug)]
pub struct Addresses {
    pub ledger: String,
    pub log: String,
}

/// How close the states are to the end of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freshness {
    /// Both reached it lately.
    Current,
    /// A rebuild of one state is making progress. Every process shows the old state until the new one is ready.
    Rebuilding,
    /// At least one did not reach it lately, or never did.
    Behind,
}

/// State shared by all handlers.
struct Serving {
    api: Api,
    settings: ServeSettings,
    known: known::KnownSources,
    lease: lease::MetricsLease,
    telemetry: telemetry::ApiTelemetry,
    rejects: rejects::RejectsTelemetry,
    /// Checks for `/readyz`.
    probe: ready::Probe,
    executions: executions::Executions,
    /// Stops long work.
    stop: CancellationToken,
    /// Serializes status requests, because counting everything is expensive.
    counting: tokio::sync::Mutex<()>,
}

impl Serving {
    fn freshness(&self) -> Freshness {
        let lately = |at: Instant| at.elapsed() <= self.settings.fresh;
        let rebuilds = || [self.api.metrics.rebuild_went_on(), self.api.licenses.rebuild_went_on()].into_iter().flatten().any(lately);
        match self.known.now() {
            Some(known) if lately(known.reached_at) => Freshness::Current,
            Some(_) if rebuilds() => Freshness::Rebuilding,
            Some(_) | None => Freshness::Behind,
        }
    }
}
