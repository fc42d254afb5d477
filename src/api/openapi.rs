//! The OpenAPI document's path.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use utoipa::openapi::OpenApi;

/// Show this document
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "An OpenAPI 3.1 document.", body = Object)))]
pub(super) async fn document(Extension(document): Extension<Arc<OpenApi>>) -> Response {
    Json(&*document).into_response()
}
