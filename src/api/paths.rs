//! Every path of both listeners.

use super::agents::{self, Count, Window};
use super::entitlements::{self, Shown};
use super::metrics;
use super::pauses;
use super::ready::{self, Alive, Readiness};
use super::route::Route;
use super::status;
use super::tokens::Needs;
use super::{acts, answer};
use crate::config::Scope;
use crate::ledger::Pause;
use crate::license::Entitlements;
use crate::operations::{Acts, ListActs, PauseRequest, Pauses};
use crate::status::Status;

const ENFORCE: Needs = Needs::Scope(Scope::Enforce);
const ADMIN: Needs = Needs::Scope(Scope::Admin);
const READ: Needs = Needs::Scope(Scope::Read);

/// The API's, in the order of the document.
pub(super) fn api() -> Vec<Route> {
    let mut routes = probes();
    routes.extend([
        Route::get("/openapi.json", Needs::Nothing, "This document", answer::document)
            .response("200", serde_json::json!({ "description": "An OpenAPI 3.1 document.", "content": { "application/json": {} } })),
        Route::get(
            "/api/v2/entitlements",
            ENFORCE,
            "What a deployment is entitled to now, in coderd's own shape",
            entitlements::entitlements,
        )
        .query::<Shown>()
        .answers::<Entitlements>(200, "From memory; the headers say how fresh.")
        .headers(200, entitlements::HEADERS),
        Route::get("/api/v1/managed-agents/count", ENFORCE, "How many managed agents were started in a window", agents::count)
            .query::<Window>()
            .answers::<Count>(200, "From memory, and up to where it is true."),
        Route::get("/api/v1/status", READ, "Where everything stands", status::status)
            .answers::<Status>(200, "Counted in the ledger when asked."),
        Route::get("/api/v1/acts", READ, "The audit trail: what operators did, the latest first", acts::list)
            .query::<ListActs>()
            .answers::<Acts>(200, "One page."),
        Route::get("/api/v1/pauses", READ, "What is paused", pauses::list).answers::<Pauses>(200, "Each pause that holds."),
        Route::post("/api/v1/pauses", ADMIN, "Stop an operation in all processes until it is resumed", pauses::pause)
            .change::<PauseRequest>()
            .answers::<Pause>(200, "The pause that holds now. 409: it is paused already."),
        Route::delete("/api/v1/pauses/{operation}", ADMIN, "Go on with what was paused", pauses::resume)
            .change::<PauseRequest>()
            .answers::<Pause>(200, "The pause that has ended. 409: it is not paused."),
    ]);
    routes
}

/// Those of the metrics' listener.
pub(super) fn metrics() -> Vec<Route> {
    let mut routes = probes();
    routes.push(Route::get("/metrics", READ, "The domain series of one source, and this process's telemetry", metrics::metrics));
    routes
}

fn probes() -> Vec<Route> {
    vec![
        Route::get("/healthz", Needs::Nothing, "Whether the process is alive", ready::healthz).answers::<Alive>(200, "It is."),
        Route::get("/readyz", Needs::Nothing, "Which of the things that the process depends on is missing, and why", ready::readyz)
            .answers::<Readiness>(200, "None.")
            .answers::<Readiness>(503, "Some."),
    ]
}
