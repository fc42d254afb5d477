//! Errors as every path gives them: JSON with a `message`, as coderd's own are.

use axum::Json;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::operations::OperationError;

/// Why a request gets no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The query parameter that is wrong.
    pub(super) field: Option<String>,
}

#[derive(Serialize)]
struct Body {
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
}

impl Problem {
    /// A query parameter is wrong.
    pub(super) fn parameter(field: &str, message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), field: Some(field.to_owned()) }
    }

    /// There is no such thing.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, message: message.into(), field: None }
    }

    /// Not now.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, message: message.into(), field: None }
    }

    /// A mistake of ours. The cause is for the log, not for the caller.
    pub(super) fn internal(cause: &impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed");
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, message: "internal error".into(), field: None }
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
            error => Self { status, message: error.to_string(), field: None },
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.status, Json(Body { message: self.message, field: self.field })).into_response()
    }
}

/// For paths that are not there.
pub(super) async fn unknown_path(uri: Uri) -> Problem {
    Problem::not_found(format!("there is nothing at {}", uri.path()))
}

/// For paths that are there, by another method.
pub(super) async fn unknown_method(uri: Uri) -> Problem {
    Problem { status: StatusCode::METHOD_NOT_ALLOWED, message: format!("{} is only read, by GET", uri.path()), field: None }
}
