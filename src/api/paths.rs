//! All paths of both listeners.

use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::executions::{self, ShowPlan};
use super::route::Route;
use super::status::{self, ShowStatus};
use super::tokens::Needs;
use super::{agents, document, entitlements, metrics, openapi, ready};
use crate::config::Scope;
use crate::operations::recover::{RecoverExecution, RecoverRequest};
use crate::operations::{
    AdmitRejects, CoderdCutOff, CorrectionExecution, CorrectionRequest, CountRejects,
    DiscardRejects, ExplainRequest, ListActs, ListPauses, ListRejects, ListSources, LogRange,
    PauseRequest, PruneExecution, PruneRequest, RebuildExecution, RebuildRequest, ReinstateSource,
    ReplayExecution, Resubmit, ResumeRequest, RetireSource, RunAudit, ShowFindings, ShowReject,
    UnauditedPublishing,
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
        Route::operation::<UnauditedPublishing>(),
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
        Route::operation::<ExplainRequest>(),
        Route::operation::<CorrectionRequest>(),
        Route::operation::<CorrectionExecution>(),
        Route::operation::<LogRange>(),
        Route::request::<ShowPlan, _, _>(200, executions::plan_state),
        Route::request::<ReplayExecution, _, _>(202, executions::execute),
        Route::operation::<RebuildRequest>(),
        Route::operation::<RebuildExecution>(),
        Route::operation::<RecoverRequest>(),
        Route::operation::<RecoverExecution>(),
        Route::operation::<PruneRequest>(),
        Route::operation::<PruneExecution>(),
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

/// The OpenAPI document of the API, without a server.
#[must_use]
pub fn api_document() -> OpenApi {
    document_of(api())
}

/// The OpenAPI document of the metrics listener, without a server.
#[must_use]
pub fn metrics_document() -> OpenApi {
    document_of(metrics())
}

fn document_of(routes: Vec<Route>) -> OpenApi {
    let routes = routes.into_iter().map(Route::into_routes);
    routes
        .fold(OpenApiRouter::with_openapi(document::empty()), OpenApiRouter::routes)
        .into_openapi()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn no_two_types_have_one_name_and_every_type_that_is_named_is_there() {
        let mut named: BTreeMap<String, Value> = BTreeMap::new();
        for (name, schema) in api().into_iter().flat_map(|route| route.into_routes().0) {
            let schema = json!(schema);
            let before = named.entry(name.clone()).or_insert_with(|| schema.clone());
            assert_eq!(*before, schema, "two types are called {name}");
        }
        let document = json!(api_document());
        let text = document.to_string();
        let used: BTreeSet<&str> = text
            .split("\"#/components/schemas/")
            .skip(1)
            .filter_map(|rest| rest.split('"').next())
            .collect();
        let there: BTreeSet<&str> = document["components"]["schemas"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        // a schema that is flattened into a query exists without a reference
        assert!(used.is_subset(&there), "{:?} are named and not there", used.difference(&there));
    }

    #[test]
    fn every_operation_has_an_id_of_its_own_a_summary_and_an_answer() {
        let document = json!(api_document());
        let operations = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|path| path.as_object().unwrap().values());
        let mut ids = BTreeSet::new();
        for operation in operations {
            assert!(ids.insert(operation["operationId"].as_str().unwrap()), "{operation}");
            assert!(!operation["summary"].as_str().unwrap().is_empty());
            assert!(operation["responses"].as_object().unwrap().len() >= 2, "{operation}");
        }
        assert_eq!(ids.len(), api().len());
    }
}
