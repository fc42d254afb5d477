//! The OpenAPI document's path.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::Serving;

/// `GET /openapi.json`
pub(super) async fn document(State(serving): State<Arc<Serving>>) -> Response {
    ([(CONTENT_TYPE, "application/json")], serving.document.clone()).into_response()
}
