//! One path of the API with one method: scope, request, answer and handler. The router and the document use the same routes, so they cannot
//! differ.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::handler::Handler;
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, MethodRouter, on};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;

use super::Serving;
use super::guard::{DEADLINE, Guard, guard};
use super::host::Hosts;
use super::tokens::Needs;

pub(super) struct Route {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) needs: Needs,
    /// The OpenAPI operation of the route.
    pub(super) operation: Map<String, Value>,
    /// The types that the operation references.
    pub(super) schemas: Vec<(String, RefOr<Schema>)>,
    hosts: Hosts,
    deadline: Duration,
    handler: MethodRouter<Arc<Serving>>,
}

impl Route {
    pub(super) fn get<H, X>(path: &'static str, needs: Needs, summary: &str, handler: H) -> Self
    where
        H: Handler<X, Arc<Serving>>,
        X: 'static,
    {
        Self::new(Method::GET, path, needs, summary, handler)
    }

    pub(super) fn new<H, X>(method: Method, path: &'static str, needs: Needs, summary: &str, handler: H) -> Self
    where
        H: Handler<X, Arc<Serving>>,
        X: 'static,
    {
        let filter = MethodFilter::try_from(method.clone()).expect("a method of HTTP");
        let operation = Map::from_iter([("summary".to_owned(), json!(summary))]);
        Self { method, path, needs, operation, schemas: Vec::new(), hosts: Hosts::Named, deadline: DEADLINE, handler: on(filter, handler) }
    }

    /// Declares a request with this type's fields in the path and the query.
    pub(super) fn query<T: ToSchema>(mut self) -> Self {
        T::schemas(&mut self.schemas);
        let (properties, required) = fields::<T>();
        for (name, schema) in properties {
            let place = if self.has_in_path(&name) { "path" } else { "query" };
            self.parameter(&name, place, required.contains(&name), schema);
        }
        self
    }

    /// Declares a change with this type's fields in the path and the body. Without a body, they are in the query. Adds the reason.
    pub(super) fn change<T: ToSchema>(mut self) -> Self {
        if self.method == Method::DELETE {
            self = self.query::<T>();
            self.parameter("reason", "query", false, reason());
            return self;
        }
        T::schemas(&mut self.schemas);
        let (properties, mut required) = fields::<T>();
        let (in_path, mut in_body): (Map<_, _>, Map<_, _>) = properties.into_iter().partition(|(name, _)| self.has_in_path(name));
        for (name, schema) in in_path {
            self.parameter(&name, "path", true, schema);
        }
        in_body.insert("reason".into(), reason());
        required.retain(|name| in_body.contains_key(name));
        let needed = !required.is_empty();
        let schema = json!({ "type": "object", "properties": in_body, "required": required, "additionalProperties": false });
        let body = json!({ "required": needed, "content": { "application/json": { "schema": schema } } });
        self.operation.insert("requestBody".into(), body);
        self
    }

    /// Declares an answer of this type.
    pub(super) fn answers<T: ToSchema>(mut self, status: u16, description: &str) -> Self {
        self.schemas.push((T::name().into_owned(), T::schema()));
        T::schemas(&mut self.schemas);
        let content = json!({ "application/json": { "schema": { "$ref": reference::<T>() } } });
        self.response(&status.to_string(), json!({ "description": description, "content": content }))
    }

    /// Sets a longer deadline.
    pub(super) fn within(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Accepts any IP address as host name.
    pub(super) fn by_address(self) -> Self {
        Self { hosts: Hosts::OrAddress, ..self }
    }

    /// Declares headers of the answer with this status.
    pub(super) fn headers(mut self, status: u16, headers: &[(&str, &str)]) -> Self {
        let shown = |(name, description): &(&str, &str)| {
            ((*name).to_owned(), json!({ "description": description, "schema": { "type": "string" } }))
        };
        self.operation["responses"][status.to_string()]["headers"] = headers.iter().map(shown).collect::<Map<_, _>>().into();
        self
    }

    /// Declares an answer with this status, or `default`.
    pub(super) fn response(mut self, status: &str, response: Value) -> Self {
        let responses = self.operation.entry("responses").or_insert_with(|| json!({}));
        responses[status] = response;
        self
    }

    fn has_in_path(&self, name: &str) -> bool {
        self.path.split('/').any(|segment| segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) == Some(name))
    }

    fn parameter(&mut self, name: &str, place: &str, required: bool, mut schema: Value) {
        let description = schema.as_object_mut().and_then(|schema| schema.remove("description")).unwrap_or(json!(""));
        let parameter = json!({ "name": name, "in": place, "required": required, "description": description, "schema": schema });
        let parameters = self.operation.entry("parameters").or_insert_with(|| json!([]));
        parameters.as_array_mut().expect("a list").push(parameter);
    }

    /// Adds the route and its guard to the router.
    pub(super) fn mount(self, router: Router<Arc<Serving>>, serving: &Arc<Serving>) -> Router<Arc<Serving>> {
        let before = Guard::new(serving, self.needs, self.hosts, self.deadline);
        router.route(self.path, self.handler.route_layer(from_fn_with_state(before, guard)))
    }
}

/// The schema of the reason, which every change has.
fn reason() -> Value {
    json!({ "type": "string", "description": "Why, for the audit trail." })
}

/// The reference to a type in the document.
pub(super) fn reference<T: ToSchema>() -> String {
    format!("#/components/schemas/{}", T::name())
}

/// A type's fields with their schemas, and the names of required fields. Fields of flattened types are included.
pub(super) fn fields<T: ToSchema>() -> (Map<String, Value>, Vec<String>) {
    let mut parts = Vec::new();
    T::schemas(&mut parts);
    let mut found = (Map::new(), Vec::new());
    collect(&json!(T::schema()), &parts, &mut found);
    found
}

fn collect(schema: &Value, parts: &[(String, RefOr<Schema>)], found: &mut (Map<String, Value>, Vec<String>)) {
    let named = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next());
    if let Some((_, part)) = named.and_then(|named| parts.iter().find(|(name, _)| name == named)) {
        collect(&json!(part), parts, found);
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        collect(part, parts, found);
    }
    found.0.extend(schema["properties"].as_object().cloned().unwrap_or_default());
    found.1.extend(schema["required"].as_array().into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())));
}
