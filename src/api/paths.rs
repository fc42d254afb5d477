//! All paths of both listeners.

use std::time::Duration;

use axum::http::Method;

use super::agents::{self, Count, Window};
use super::entitlements::{self, Shown};
use super::executions::{self, OnePlan};
use super::metrics;
use super::operators::{Nothing, OneReject};
use super::plans::PlanStanding;
use super::probe::Readiness;
use super::ready::{self, Alive};
use super::route::Route;
use super::status;
use super::tokens::Needs;
use super::{openapi, operators};
use crate::audit::AuditReport;
use crate::config::Scope;
use crate::ledger::{ListActs, Pause, PublishStop};
use crate::license::Entitlements;
use crate::operations::recover::{RecoverExecution, RecoverPlan, RecoverRequest};
use crate::operations::{
    Acts, Admitted, AuditFindings, CoderdCutOff, CountRejects, DiscardRejects, DiscardedRejects, ListRejects, LogRange, OneSource,
    PauseRequest, Pauses, Proof, ProveRequest, RebuildExecution, RebuildPlan, RebuildRequest, Rebuilt, RegisteredSource, RejectCounts,
    RejectPage, ReplayExecution, ReplayPlan, Resubmit, Resubmitted, RunAudit, ShownReject, Sources,
};
use crate::status::Status;

/// Deadline of requests that read or write much.
const LONG: Duration = Duration::from_secs(600);

const POST: Method = Method::POST;
const DELETE: Method = Method::DELETE;

const ENFORCE: Needs = Needs::Scope(Scope::Enforce);
const ADMIN: Needs = Needs::Scope(Scope::Admin);
const READ: Needs = Needs::Scope(Scope::Read);

/// Paths of the API, in the order of the document.
pub(super) fn api() -> Vec<Route> {
    let mut routes = probes();
    routes.extend([
        Route::get("/openapi.json", Needs::Nothing, "This document", openapi::document)
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
        Route::new(POST, "/api/v1/pauses", ADMIN, "Stop an operation in all processes until it is resumed", operators::pause)
            .change::<PauseRequest>()
            .answers::<Pause>(200, "The pause that holds now. 409: it is paused already."),
        Route::new(DELETE, "/api/v1/pauses/{operation}", ADMIN, "Go on with what was paused", operators::resume)
            .change::<PauseRequest>()
            .answers::<Pause>(200, "The pause that has ended. 409: it is not paused."),
        Route::new(POST, "/api/v1/publish/coderd-cut-off", ADMIN, "Go on publishing after coderd has published by itself", operators::coderd_cut_off)
            .change::<CoderdCutOff>()
            .answers::<PublishStop>(200, "The stop that has ended. 404: publishing of the deployment has not stopped."),
        Route::get("/api/v1/rejects", READ, "Records that are no accepted event, by number", operators::list_rejects)
            .query::<ListRejects>()
            .answers::<RejectPage>(200, "One page."),
        Route::get("/api/v1/rejects/counts", READ, "Records that are no accepted event, in groups", operators::count_rejects)
            .query::<CountRejects>()
            .answers::<RejectCounts>(200, "The groups, the largest first."),
        Route::get("/api/v1/rejects/{id}", READ, "One reject whole, and what would become of it now", operators::show_reject)
            .query::<OneReject>()
            .answers::<ShownReject>(200, "The reject. 404: there is none."),
        Route::new(
            POST,
            "/api/v1/rejects/resubmit",
            ADMIN,
            "Pass rejects through the log again, under their own ids",
            operators::resubmit_rejects,
        )
        .change::<Resubmit>()
        .answers::<Resubmitted>(200, "What went, or would go. 409: one of them is no longer open, or would be refused again."),
        Route::new(POST, "/api/v1/rejects/discard", ADMIN, "Give rejects up", operators::discard_rejects)
            .change::<DiscardRejects>()
            .answers::<DiscardedRejects>(200, "What was given up. 409: one of them is no longer open."),
        Route::new(
            POST,
            "/api/v1/rejects/admit",
            ADMIN,
            "Pass held records through the log whose type this version knows",
            operators::admit_rejects,
        )
        .change::<Nothing>()
        .within(LONG)
        .answers::<Admitted>(200, "What was admitted."),
        Route::get("/api/v1/audit", READ, "What the audit that runs by itself found last", operators::audit_findings)
            .answers::<AuditFindings>(200, "By joint."),
        Route::new(POST, "/api/v1/audit", ADMIN, "Audit now: what differs is marked, and no event is changed", operators::audit)
            .change::<RunAudit>()
            .within(LONG)
            .answers::<AuditReport>(200, "What was found."),
        Route::get("/api/v1/sources", READ, "The registered sources", operators::list_sources)
            .answers::<Sources>(200, "Every one, in the order of their introduction."),
        Route::new(POST, "/api/v1/sources/retire", ADMIN, "Retire a source: nothing waits for it", operators::retire_source)
            .change::<OneSource>()
            .answers::<RegisteredSource>(200, "The source, retired. 404: it is not registered. 409: it is retired already."),
        Route::new(POST, "/api/v1/sources/reinstate", ADMIN, "End a source's retirement", operators::reinstate_source)
            .change::<OneSource>()
            .answers::<RegisteredSource>(200, "The source, in use. 404: it is not registered. 409: it is not retired."),
        Route::get("/api/v1/events/{event_id}/proof", READ, "The whole life of one event", operators::prove)
            .query::<ProveRequest>()
            .answers::<Proof>(200, "Its life. 404: it is known nowhere."),
        Route::new(POST, "/api/v1/replays", ADMIN, "Plan to read a range of the log again", operators::plan_replay)
            .change::<LogRange>()
            .within(LONG)
            .answers::<ReplayPlan>(200, "What would change, and the hash under which exactly this is executed."),
        Route::get("/api/v1/plans/{hash}", READ, "Where a planned replay stands", executions::standing)
            .query::<OnePlan>()
            .answers::<PlanStanding>(200, "How far it is. 404: nothing was planned under this hash."),
        Route::new(POST, "/api/v1/plans/{hash}/execute", ADMIN, "Execute a planned replay, or go on with it", executions::execute)
            .change::<ReplayExecution>()
            .answers::<PlanStanding>(
                202,
                "It is under way, or over already. 409: the effect is no longer the planned one, or it was executed.",
            ),
        Route::new(
            POST,
            "/api/v1/rebuilds",
            ADMIN,
            "Plan to fold a stage again from zero, or rehearse rules and licenses",
            operators::plan_rebuild,
        )
        .change::<RebuildRequest>()
        .within(LONG)
        .answers::<RebuildPlan>(200, "What would change. Nothing is written."),
        Route::new(POST, "/api/v1/rebuilds/execute", ADMIN, "Execute a planned rebuild", operators::execute_rebuild)
            .change::<RebuildExecution>()
            .within(LONG)
            .answers::<Rebuilt>(200, "What was done. 409: the effect is no longer the planned one."),
        Route::new(POST, "/api/v1/recoveries", ADMIN, "Plan to bring everything back after a loss", operators::plan_recovery)
            .change::<RecoverRequest>()
            .within(LONG)
            .answers::<RecoverPlan>(
                200,
                "What was found, what would be done and what is at risk. Nothing else is changed. Without a hash: nothing is lost. 404: the ledger \
                 does not know a source that is to be given up. 409: that source is there, or not waited for; or coderd's part, and this process \
                 has not coderd's database.",
            ),
        Route::new(POST, "/api/v1/recoveries/execute", ADMIN, "Execute a planned recovery", operators::execute_recovery)
            .change::<RecoverExecution>()
            .within(LONG)
            .answers::<RecoverPlan>(
                200,
                "What was done. 404: nothing was planned under this hash. 409: nothing is lost, the plan was executed, or the effect is no \
                 longer the planned one.",
            ),
    ]);
    routes
}

/// Paths of the metrics listener.
pub(super) fn metrics() -> Vec<Route> {
    let mut routes = probes();
    routes
        .push(Route::get("/metrics", READ, "The domain series of one source, and this process's telemetry", metrics::metrics).by_address());
    routes
}

fn probes() -> Vec<Route> {
    vec![
        Route::get("/healthz", Needs::Nothing, "Whether the process is alive", ready::healthz).by_address().answers::<Alive>(200, "It is."),
        Route::get("/readyz", Needs::Nothing, "Which of the things that the process depends on is missing, and why", ready::readyz)
            .by_address()
            .answers::<Readiness>(200, "None.")
            .answers::<Readiness>(503, "Some."),
    ]
}
