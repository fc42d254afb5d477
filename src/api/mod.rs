//! The HTTP side: `/metrics`, the answers to coderd, and whether this process is alive and ready.
//!
//! Answers come from memory, from two states that are folded along the ledger, and say up to where they are true. Two loops of
//! [`Server::run`] ask the ledger: [`known`] which sources there are and how far they are complete, [`lease`] whether this process is the one
//! that shows the domain series.

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
mod object;
mod operators;
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
pub use executions::{PlanProblem, PlanStanding, PlanState};
pub use own::{Own, OwnServer};
pub use serve::{ServeError, Server};
pub use settings::ServeSettings;
pub use tokens::{Token, Tokens};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::operations::Desk;
use crate::projection::View;
use crate::stages::{LicensesState, MetricsState};

/// What the HTTP side shows: handles on the process's other parts. Whoever makes it runs the projections behind the views.
#[derive(Clone)]
pub struct Api {
    /// What a process shows of itself, whatever its roles. Of the ledger the HTTP side changes only the lease `metrics`.
    pub own: Own,
    /// What operators ask for.
    pub desk: Desk,
    /// For which instant entitlements hold.
    pub clock: Clock,
    /// The domain series.
    pub metrics: View<MetricsState>,
    /// Licenses and managed agents.
    pub licenses: View<LicensesState>,
}

/// Where an operator has to look, without passwords.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// Of the ledger.
    pub ledger: String,
    /// Of the log.
    pub log: String,
}

/// How the states stand to the ledger's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freshness {
    /// Both were there lately.
    Current,
    /// An operator has one of them folded anew, and that goes on: the state before is shown until the new one is there, in every process.
    Rebuilding,
    /// Not there lately, or never.
    Behind,
}

/// What every handler gets.
struct Serving {
    api: Api,
    settings: ServeSettings,
    known: known::KnownSources,
    lease: lease::MetricsLease,
    telemetry: telemetry::ApiTelemetry,
    /// `/openapi.json`.
    document: String,
    rejects: rejects::RejectsTelemetry,
    /// `/readyz`
    probe: ready::Probe,
    /// Plans that this process executes.
    executions: executions::Executions,
    /// Long work hears it.
    stop: CancellationToken,
    /// Counting everything is dear: one request at a time.
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
