//! Errors as every path gives them: JSON with a `message`, as coderd's own are.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Serving;
use crate::operations::OperationError;

/// Why a request gets no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The parameter or field that is wrong.
    pub(super) field: Option<String>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// For who asked to act on.
    pub message: String,
    /// The parameter or field that is wrong, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

impl Problem {
    /// As it was told before.
    pub(super) fn with_status(status: u16, message: String) -> Self {
        Self::new(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), message)
    }

    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), field: None }
    }

    /// The request is wrong.
    pub(super) fn wrong(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A parameter or field is wrong.
    pub(super) fn field(field: &str, message: impl Into<String>) -> Self {
        Self { field: Some(field.to_owned()), ..Self::wrong(message) }
    }

    /// Nobody knows who asks.
    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "a valid bearer token is needed")
    }

    /// Who asks may not.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// There is no such thing.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// Not now.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// A mistake of ours. The cause is for the log, not for the caller.
    pub(super) fn internal(cause: &impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
    }
}

impl From<Problem> for ProblemBody {
    fn from(problem: Problem) -> Self {
        ProblemBody { message: problem.message, field: problem.field }
    }
}

impl From<OperationError> for Problem {
    fn from(error: OperationError) -> Self {
        let status = match &error {
            OperationError::NotFound(_) => StatusCode::NOT_FOUND,
            OperationError::Forbidden(_) => StatusCode::CONFLICT,
            OperationError::Invalid { .. } => StatusCode::BAD_REQUEST,
            OperationError::Ledger(_) | OperationError::Log(_) | OperationError::Coderd(_) | OperationError::Interrupted => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            OperationError::Internal(cause) => return Problem::internal(cause),
        };
        match error {
            OperationError::Invalid { field, message } => Self { status, message, field: Some(field.to_owned()) },
            error => Self::new(status, error.to_string()),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.status;
        let mut response = (status, Json(ProblemBody::from(self))).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// For paths that are not there.
pub(super) async fn unknown_path(uri: Uri) -> Problem {
    Problem::not_found(format!("there is nothing at {}", uri.path()))
}

/// For paths that are there, by another method; the header `Allow` says by which.
pub(super) async fn unknown_method(method: Method, uri: Uri) -> Problem {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} is not asked by {method}", uri.path()))
}

/// `GET /openapi.json`
pub(super) async fn document(State(serving): State<Arc<Serving>>) -> Response {
    ([(CONTENT_TYPE, "application/json")], serving.document.clone()).into_response()
}
