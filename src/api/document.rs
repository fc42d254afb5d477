//! `GET /openapi.json`: the OpenAPI 3.1 document.

use serde_json::json;
use utoipa::openapi::path::Paths;
use utoipa::openapi::schema::Components;
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::{Content, OpenApi, Ref, RefOr, ResponseBuilder};
use utoipa::{PartialSchema as _, ToSchema as _};

use super::answer::ProblemBody;
use super::tokens::Needs;
use crate::config::Scope;

/// Description of the answers that no operation declares.
const PROBLEMS: &str = "The reason of a failure. 400, 413, 415: the request is wrong; 401: the token is missing or not valid; 403: the token lacks \
                        the scope; 404: the object or the path does not exist; 405: the path has another method; 409: the state forbids it; 500: \
                        a fault of Tallyline; 503: a dependency is missing, or the deadline has passed.";

/// The document without paths.
pub(super) fn empty() -> OpenApi {
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tallyline",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Instants are RFC 3339 in UTC. A change needs a token of scope admin; the token's name is the actor in the audit \
                            log.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" }
        },
        "paths": {},
        "components": {
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Each caller has a token of `serve.tokens`, whose scope is enforce, read or admin. Each scope includes those before it. Without \
                                    configured tokens, this machine may use the paths that need enforce or read."
                }
            }
        }
    });
    let mut document: OpenApi = serde_json::from_value(document).expect("a document");
    let schemas = &mut document.components.get_or_insert_with(Components::new).schemas;
    schemas.insert(ProblemBody::name().into_owned(), ProblemBody::schema());
    document
}

/// Adds the facts that follow from the path, the method and the needed scope.
pub(super) fn complete(paths: &mut Paths, needs: Needs) {
    let problem = Content::new(Some(Ref::from_schema_name(ProblemBody::name())));
    let problem =
        ResponseBuilder::new().description(PROBLEMS).content("application/json", problem).build();
    for (path, item) in &mut paths.paths {
        for (method, operation) in
            [("get", &mut item.get), ("post", &mut item.post), ("delete", &mut item.delete)]
        {
            let Some(operation) = operation else { continue };
            let words = path
                .split(|character: char| !character.is_ascii_alphanumeric())
                .filter(|word| !word.is_empty());
            operation.operation_id =
                Some(std::iter::once(method).chain(words).collect::<Vec<_>>().join("_"));
            operation.tags = None;
            operation.responses.responses.insert("default".to_owned(), RefOr::T(problem.clone()));
            if let Needs::Scope(scope) = needs {
                operation.security = Some(security(scope));
            }
        }
    }
}

/// A scope below admin needs no token if no tokens are configured.
fn security(scope: Scope) -> Vec<SecurityRequirement> {
    let token = SecurityRequirement::new("token", [scope.name()]);
    if scope == Scope::Admin { vec![token] } else { vec![token, SecurityRequirement::default()] }
}
