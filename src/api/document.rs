//! `GET /openapi.json`: the OpenAPI 3.1 document.

use serde_json::{Map, Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema as _, ToSchema as _};

use super::answer::ProblemBody;
use super::route::{Route, reference};
use super::tokens::Needs;
use crate::config::Scope;

/// Description of the answers that no operation declares.
const PROBLEMS: &str = "No answer, and why. 400, 413, 415: the request is wrong; 401: there is no valid token; 403: the token has not the scope; \
                        404: there is no such thing; 405: not by this method; 409: the state forbids it; 500: a fault of ours; 503: a \
                        dependency is missing, or no answer in time.";

pub(super) fn of(routes: &[Route]) -> Value {
    let mut paths = Map::new();
    let mut schemas: Vec<(String, RefOr<Schema>)> = vec![(ProblemBody::name().into_owned(), ProblemBody::schema())];
    for route in routes {
        schemas.extend(route.schemas.iter().cloned());
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.as_str().to_lowercase()] = operation(route).into();
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tallyline",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Instants are RFC 3339 in UTC. A path that changes anything needs a token of scope admin; the token's name is who \
                            acts, in the audit trail.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" }
        },
        "paths": paths,
        "components": {
            "schemas": schemas.into_iter().map(|(name, schema)| (name, json!(schema))).collect::<Map<_, _>>(),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of serve.tokens. Its scope is enforce, read or admin, each of which holds the ones before it. Where \
                                    no token is configured, what needs enforce or read is open to this machine."
                }
            }
        }
    })
}

fn operation(route: &Route) -> Map<String, Value> {
    let mut operation = route.operation.clone();
    let words = route.path.split(|character: char| !character.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let id = std::iter::once(route.method.as_str().to_lowercase().as_str()).chain(words).collect::<Vec<_>>().join("_");
    operation.insert("operationId".into(), id.into());
    if let Needs::Scope(scope) = route.needs {
        operation.insert("security".into(), security(scope));
    }
    let problem = json!({ "application/json": { "schema": { "$ref": reference::<ProblemBody>() } } });
    operation.entry("responses").or_insert_with(|| json!({}))["default"] = json!({ "description": PROBLEMS, "content": problem });
    operation
}

/// A scope below admin needs no token if no tokens are configured.
fn security(scope: Scope) -> Value {
    let token = json!({ "token": [scope.name()] });
    if scope == Scope::Admin { json!([token]) } else { json!([token, {}]) }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::paths;
    use super::*;

    #[test]
    fn no_two_types_have_one_name_and_every_type_that_is_named_is_there() {
        let mut named: BTreeMap<String, Value> = BTreeMap::new();
        for (name, schema) in paths::api().iter().flat_map(|route| &route.schemas) {
            let schema = json!(schema);
            let before = named.entry(name.clone()).or_insert_with(|| schema.clone());
            assert_eq!(*before, schema, "two types are called {name}");
        }
        let document = of(&paths::api());
        let text = document.to_string();
        let used: BTreeSet<&str> = text.split("\"#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        let there: BTreeSet<&str> = document["components"]["schemas"].as_object().unwrap().keys().map(String::as_str).collect();
        // a schema that is flattened into a query exists without a reference
        assert!(used.is_subset(&there), "{:?} are named and not there", used.difference(&there));
    }

    #[test]
    fn every_operation_has_an_id_of_its_own_a_summary_and_an_answer() {
        let document = of(&paths::api());
        let operations = document["paths"].as_object().unwrap().values().flat_map(|path| path.as_object().unwrap().values());
        let mut ids = BTreeSet::new();
        for operation in operations {
            assert!(ids.insert(operation["operationId"].as_str().unwrap()), "{operation}");
            assert!(!operation["summary"].as_str().unwrap().is_empty());
            assert!(operation["responses"].as_object().unwrap().len() >= 2, "{operation}");
        }
        assert_eq!(ids.len(), paths::api().len());
    }
}
