//! A path of the API with its handler, its guard and its part of the OpenAPI document. The handler
//! and the document come from one request type, so they cannot differ.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::handler::Handler;
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, on};
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn, Paths};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{AdditionalProperties, Schema};
use utoipa::openapi::{
    Content, HttpMethod, ObjectBuilder, Ref, RefOr, Required, ResponseBuilder, Type,
};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use super::Serving;
use super::answer::Problem;
use super::document;
use super::guard::{DEADLINE, Guard, guard};
use super::host::Hosts;
use super::received::Received;
use super::tokens::Needs;
use crate::config::Scope;
use crate::operations::{ApiRequest, Operation};

/// Deadline of requests that read or write much.
const LONG: Duration = Duration::from_secs(600);

pub(super) struct Route {
    needs: Needs,
    hosts: Hosts,
    deadline: Duration,
    old_path: Option<&'static str>,
    routes: UtoipaMethodRouter<Arc<Serving>>,
}

impl Route {
    /// A route of a handler that documents itself.
    pub(super) fn new(needs: Needs, mut routes: UtoipaMethodRouter<Arc<Serving>>) -> Self {
        document::complete(&mut routes.1, needs);
        Self { needs, hosts: Hosts::Named, deadline: DEADLINE, old_path: None, routes }
    }

    /// The route of an operation.
    pub(super) fn operation<R: Operation>() -> Self {
        Self::request::<R, _, _>(200, run::<R>)
    }

    /// A route of a request with its own handler and status of success.
    pub(super) fn request<R: ApiRequest, H: Handler<X, Arc<Serving>>, X: 'static>(
        status: u16,
        handler: H,
    ) -> Self {
        let (schemas, paths) = described::<R>(status);
        let filter = MethodFilter::try_from(R::METHOD).expect("a method of HTTP");
        let scope = if R::METHOD.is_safe() { Scope::Read } else { Scope::Admin };
        let deadline = if R::IS_LONG { LONG } else { DEADLINE };
        let old_path = R::OLD_PATH;
        let routes = (schemas, paths, on(filter, handler));
        Self { deadline, old_path, ..Self::new(Needs::Scope(scope), routes) }
    }

    /// Accepts any IP address as host name.
    pub(super) fn by_address(self) -> Self {
        Self { hosts: Hosts::OrAddress, ..self }
    }

    /// Adds the route and its guard to the router.
    pub(super) fn mount(
        self,
        router: OpenApiRouter<Arc<Serving>>,
        serving: &Arc<Serving>,
    ) -> OpenApiRouter<Arc<Serving>> {
        let before = Guard::new(serving, self.needs, self.hosts, self.deadline);
        let (schemas, paths, handler) = self.routes;
        let handler = handler.route_layer(from_fn_with_state(before, guard));
        let router = match self.old_path {
            Some(path) => router.route(path, handler.clone()),
            None => router,
        };
        router.routes((schemas, paths, handler))
    }

    pub(super) fn into_routes(self) -> UtoipaMethodRouter<Arc<Serving>> {
        self.routes
    }
}

async fn run<R: Operation>(
    State(serving): State<Arc<Serving>>,
    asked: Received<R>,
) -> Result<Json<R::Answer>, Problem> {
    Ok(Json(
        serving.api.operations.run(&asked.request, &asked.actor, &|_| {}, &serving.stop).await?,
    ))
}

type Schemas = Vec<(String, RefOr<Schema>)>;

/// The types and the path of a request in the document.
fn described<R: ApiRequest>(status: u16) -> (Schemas, Paths) {
    use utoipa::{PartialSchema as _, ToSchema as _};
    let mut schemas = vec![(R::Answer::name().into_owned(), R::Answer::schema())];
    R::Answer::schemas(&mut schemas);
    let mut fields = ObjectBuilder::new()
        .additional_properties(Some(AdditionalProperties::FreeForm(false)))
        .build();
    let mut parts = Schemas::new();
    R::schemas(&mut parts);
    let documentation = collect(&R::schema(), &parts, &mut fields).unwrap_or_default();
    schemas.extend(parts);
    if !R::METHOD.is_safe() {
        let reason = ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("Reason for the audit log."));
        fields.properties.insert("reason".to_owned(), reason.into());
        fields.required.extend(R::NEEDS_REASON.then(|| "reason".to_owned()));
    }
    let (summary, description) = documentation.split_once("\n\n").unwrap_or((&documentation, ""));
    let mut operation = OperationBuilder::new()
        .summary(Some(summary.trim_end_matches('.').replace('\n', " ")))
        .description(Some(description.replace('\n', " ")).filter(|text| !text.is_empty()));
    for (name, schema) in std::mem::take(&mut fields.properties) {
        let in_path = R::PATH.contains(&format!("{{{name}}}"));
        if !in_path && R::METHOD == Method::POST {
            fields.properties.insert(name, schema);
            continue;
        }
        let required =
            if fields.required.contains(&name) { Required::True } else { Required::False };
        fields.required.retain(|required| *required != name);
        let place = if in_path { ParameterIn::Path } else { ParameterIn::Query };
        let shown = serde_json::json!(schema);
        // an optional enum is one of null and a reference
        let description = [&shown["description"], &shown["oneOf"][1]["description"]]
            .into_iter()
            .find_map(|text| text.as_str());
        let parameter = ParameterBuilder::new()
            .name(name)
            .parameter_in(place)
            .required(required)
            .description(description);
        operation = operation.parameter(parameter.schema(Some(schema)));
    }
    if R::METHOD == Method::POST {
        let required = if fields.required.is_empty() { Required::False } else { Required::True };
        let body = RequestBodyBuilder::new()
            .content("application/json", Content::new(Some(Schema::Object(fields))));
        operation = operation.request_body(Some(body.required(Some(required)).build()));
    }
    let answer = Content::new(Some(Ref::from_schema_name(R::Answer::name())));
    let response =
        ResponseBuilder::new().description(R::ANSWER).content("application/json", answer);
    let mut paths = Paths::new();
    let method = match R::METHOD {
        Method::POST => HttpMethod::Post,
        Method::DELETE => HttpMethod::Delete,
        _ => HttpMethod::Get,
    };
    paths.add_path_operation(
        R::PATH,
        vec![method],
        operation.response(status.to_string(), response),
    );
    (schemas, paths)
}

/// Adds the fields of a type, with those of flattened types. Returns its documentation.
fn collect(
    schema: &RefOr<Schema>,
    parts: &[(String, RefOr<Schema>)],
    fields: &mut utoipa::openapi::Object,
) -> Option<String> {
    match schema {
        RefOr::Ref(reference) => {
            let (_, part) = parts.iter().find(|(name, _)| {
                reference.ref_location.strip_prefix("#/components/schemas/") == Some(name)
            })?;
            collect(part, parts, fields)
        }
        RefOr::T(Schema::Object(part)) => {
            fields.properties.extend(part.properties.clone());
            fields.required.extend(part.required.iter().cloned());
            part.description.clone()
        }
        RefOr::T(Schema::AllOf(all)) => {
            for part in &all.items {
                collect(part, parts, fields);
            }
            all.description.clone()
        }
        RefOr::T(_) => None,
    }
}
