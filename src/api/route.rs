//! One path of the API by one method: who may ask, what is asked and answered, and what answers. Router and document are made of the same routes,
//! so neither can know one that the other does not.

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
use super::tokens::Needs;

/// A path and a method.
pub(super) struct Route {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) needs: Needs,
    /// What the document says of it, as an OpenAPI operation.
    pub(super) operation: Map<String, Value>,
    /// Types that the operation names.
    pub(super) schemas: Vec<(String, RefOr<Schema>)>,
    deadline: Duration,
    handler: MethodRouter<Arc<Serving>>,
}

impl Route {
    pub(super) fn get<H, X>(path: &'static str, needs: Needs, summary: &str, handler: H) -> Self
    where
        H: Handler<X, Arc<Serving>>,
        X: 'static,
    {
        Self::new((Method::GET, MethodFilter::GET), path, needs, summary, handler)
    }

    fn new<H, X>((method, filter): (Method, MethodFilter), path: &'static str, needs: Needs, summary: &str, handler: H) -> Self
    where
        H: Handler<X, Arc<Serving>>,
        X: 'static,
    {
        let operation = Map::from_iter([("summary".to_owned(), json!(summary))]);
        Self { method, path, needs, operation, schemas: Vec::new(), deadline: DEADLINE, handler: on(filter, handler) }
    }

    /// The query is this type's fields.
    pub(super) fn query<T: ToSchema>(mut self) -> Self {
        T::schemas(&mut self.schemas);
        let (properties, required) = fields::<T>();
        for (name, mut schema) in properties {
            let description = schema.as_object_mut().and_then(|schema| schema.remove("description")).unwrap_or(json!(""));
            let needed = required.contains(&name);
            self.parameter(json!({ "name": name, "in": "query", "required": needed, "description": description, "schema": schema }));
        }
        self
    }

    /// An answer of this type.
    pub(super) fn answers<T: ToSchema>(mut self, status: u16, description: &str) -> Self {
        self.schemas.push((T::name().into_owned(), T::schema()));
        T::schemas(&mut self.schemas);
        let content = json!({ "application/json": { "schema": { "$ref": reference::<T>() } } });
        self.response(&status.to_string(), json!({ "description": description, "content": content }))
    }

    /// Headers of the answer with this status.
    pub(super) fn headers(mut self, status: u16, headers: &[(&str, &str)]) -> Self {
        let shown = |(name, description): &(&str, &str)| {
            ((*name).to_owned(), json!({ "description": description, "schema": { "type": "string" } }))
        };
        self.operation["responses"][status.to_string()]["headers"] = headers.iter().map(shown).collect::<Map<_, _>>().into();
        self
    }

    /// An answer with this status, or `default`.
    pub(super) fn response(mut self, status: &str, response: Value) -> Self {
        let responses = self.operation.entry("responses").or_insert_with(|| json!({}));
        responses[status] = response;
        self
    }

    fn parameter(&mut self, parameter: Value) {
        let parameters = self.operation.entry("parameters").or_insert_with(|| json!([]));
        parameters.as_array_mut().expect("a list").push(parameter);
    }

    /// On the router, behind its guard.
    pub(super) fn mount(self, router: Router<Arc<Serving>>, serving: &Arc<Serving>) -> Router<Arc<Serving>> {
        let before = Guard { serving: Arc::clone(serving), needs: self.needs, deadline: self.deadline };
        router.route(self.path, self.handler.route_layer(from_fn_with_state(before, guard)))
    }
}

/// Where the document has a type.
pub(super) fn reference<T: ToSchema>() -> String {
    format!("#/components/schemas/{}", T::name())
}

/// A type's fields with their schemas, and the names of those that must be there.
pub(super) fn fields<T: ToSchema>() -> (Map<String, Value>, Vec<String>) {
    let schema = serde_json::to_value(T::schema()).unwrap_or_default();
    let required = schema["required"].as_array().into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
    (schema["properties"].as_object().cloned().unwrap_or_default(), required)
}
