//! Every path of both listeners.

use std::time::Duration;

use super::agents::{self, Count, Window};
use super::entitlements::{self, Shown};
use super::metrics;
use super::operators::{Nothing, OneReject};
use super::ready::{self, Alive, Readiness};
use super::route::Route;
use super::status;
use super::tokens::Needs;
use super::{answer, operators};
use crate::config::Scope;
use crate::ledger::Pause;
use crate::license::Entitlements;
use crate::operations::{
    Acts, Admitted, CountRejects, DiscardRejects, DiscardedRejects, ListActs, ListRejects, PauseRequest, Pauses, RejectCounts, RejectPage,
    Resubmit, Resubmitted, ShownReject,
};
use crate::status::Status;

/// For what reads or writes much.
const LONG: Duration = Duration::from_secs(600);

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
        Route::get("/api/v1/acts", READ, "The audit trail: what operators did, the latest first", operators::acts)
            .query::<ListActs>()
            .answers::<Acts>(200, "One page."),
        Route::get("/api/v1/pauses", READ, "What is paused", operators::pauses).answers::<Pauses>(200, "Each pause that holds."),
        Route::post("/api/v1/pauses", ADMIN, "Stop an operation in all processes until it is resumed", operators::pause)
            .change::<PauseRequest>()
            .answers::<Pause>(200, "The pause that holds now. 409: it is paused already."),
        Route::delete("/api/v1/pauses/{operation}", ADMIN, "Go on with what was paused", operators::resume)
            .change::<PauseRequest>()
            .answers::<Pause>(200, "The pause that has ended. 409: it is not paused."),
        Route::get("/api/v1/rejects", READ, "Records that are no accepted event, by number", operators::list_rejects)
            .query::<ListRejects>()
            .answers::<RejectPage>(200, "One page."),
        Route::get("/api/v1/rejects/counts", READ, "Records that are no accepted event, in groups", operators::count_rejects)
            .query::<CountRejects>()
            .answers::<RejectCounts>(200, "The groups, the largest first."),
        Route::get("/api/v1/rejects/{id}", READ, "One reject whole, and what would become of it now", operators::show_reject)
            .query::<OneReject>()
            .answers::<ShownReject>(200, "The reject. 404: there is none."),
        Route::post(
            "/api/v1/rejects/resubmit",
            ADMIN,
            "Pass rejects through the log again, under their own ids",
            operators::resubmit_rejects,
        )
        .change::<Resubmit>()
        .answers::<Resubmitted>(200, "What went, or would go. 409: one of them is no longer open, or would be refused again."),
        Route::post("/api/v1/rejects/discard", ADMIN, "Give rejects up", operators::discard_rejects)
            .change::<DiscardRejects>()
            .answers::<DiscardedRejects>(200, "What was given up. 409: one of them is no longer open."),
        Route::post(
            "/api/v1/rejects/admit",
            ADMIN,
            "Pass held records through the log whose type this version knows",
            operators::admit_rejects,
        )
        .change::<Nothing>()
        .within(LONG)
        .answers::<Admitted>(200, "What was admitted."),
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
