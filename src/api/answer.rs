//! Errors of all paths: JSON with a `message`, like coderd's errors.

use axum::Json;
use axum::http::header::WWW_AUTHENTICATE;
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::operations::OperationError;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// Name of the wrong parameter or field.
    pub(super) field: Option<String>,
}

/// Error of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// Description of the problem, for the caller.
    pub message: String,
    /// Name of the wrong parameter or field; absent for other errors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

impl Problem {
    /// An error with an earlier answer's status.
    pub(super) fn with_status(status: u16, message: String) -> Self {
        Self::new(
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            message,
        )
    }

    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), field: None }
    }

    pub(super) fn wrong(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn field(field: &str, message: impl Into<String>) -> Self {
        Self { field: Some(field.to_owned()), ..Self::wrong(message) }
    }

    /// The caller is not known.
    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "a valid bearer token is needed")
    }

    /// The caller lacks the right.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// A retry may succeed.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// A fault of Tallyline. The cause is logged but not shown to the caller.
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
            OperationError::Ledger(_)
            | OperationError::Log(_)
            | OperationError::Coderd(_)
            | OperationError::Interrupted => StatusCode::SERVICE_UNAVAILABLE,
            OperationError::Internal(cause) => return Problem::internal(cause),
        };
        match error {
            OperationError::Invalid { field, message } => {
                Self { status, message, field: Some(field.to_owned()) }
            }
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

/// Answers requests for unknown paths.
pub(super) async fn unknown_path(uri: Uri) -> Problem {
    Problem::not_found(format!("path {} does not exist", uri.path()))
}

/// Answers requests with a wrong method. The header `Allow` lists the right ones.
pub(super) async fn unknown_method(method: Method, uri: Uri) -> Problem {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not accept {method}", uri.path()))
}
