//! All paths of both listeners.

use utoipa_axum::routes;

use super::executions::{self, ShowPlan};
use super::route::Route;
use super::status::{self, ShowStatus};
use super::tokens::Needs;
use super::{agents, entitlements, metrics, openapi, ready};
use crate::config::Scope;
use crate::operations::recover::{RecoverExecution, RecoverRequest};
use crate::operations::{
    AdmitRejects, CoderdCutOff, CountRejects, DiscardRejects, ListActs, ListPauses, ListRejects,
    ListSources, LogRange, PauseRequest, ProveRequest, RebuildExecution, RebuildRequest,
    ReinstateSource, ReplayExecution, Resubmit, ResumeRequest, RetireSource, RunAudit,
    ShowFindings, ShowReject,
};

const ENFORCE: Needs = Needs::Scope(Scope::Enforce);

/// Paths of the API.
pub(super) fn api() -> Vec<Route> {
    let mut routes = probes();
    routes.extend([
        Route::new(Needs::Nothing, routes!(openapi::document)),
        Route::new(ENFORCE, routes!(entitlements::entitlements)),
        Route::new(ENFORCE, routes!(agents::count)),
        Route::request::<ShowStatus, _, _>(200, status::status),
        Route::operation::<ListActs>(),
        Route::operation::<ListPauses>(),
        Route::operation::<PauseRequest>(),
        Route::operation::<ResumeRequest>(),
        Route::operation::<CoderdCutOff>(),
        Route::operation::<ListRejects>(),
        Route::operation::<CountRejects>(),
        Route::operation::<ShowReject>(),
        Route::operation::<Resubmit>(),
        Route::operation::<DiscardRejects>(),
        Route::operation::<AdmitRejects>(),
        Route::operation::<ShowFindings>(),
        Route::operation::<RunAudit>(),
        Route::operation::<ListSources>(),
        Route::operation::<RetireSource>(),
        Route::operation::<ReinstateSource>(),
        Route::operation::<ProveRequest>(),
        Route::operation::<LogRange>(),
        Route::request::<ShowPlan, _, _>(200, executions::standing),
        Route::request::<ReplayExecution, _, _>(202, executions::execute),
        Route::operation::<RebuildRequest>(),
        Route::operation::<RebuildExecution>(),
        Route::operation::<RecoverRequest>(),
        Route::operation::<RecoverExecution>(),
    ]);
    routes
}

/// Paths of the metrics listener.
pub(super) fn metrics() -> Vec<Route> {
    let mut routes = probes();
    routes.push(Route::new(Needs::Scope(Scope::Read), routes!(metrics::metrics)).by_address());
    routes
}

fn probes() -> Vec<Route> {
    [routes!(ready::healthz), routes!(ready::readyz)]
        .map(|routes| Route::new(Needs::Nothing, routes).by_address())
        .into()
}
