//! Why an operation was not done.

use crate::coderd::CoderdError;
use crate::log::LogError;
use crate::projection::ProjectionError;

/// Why an operation was not done. The command line makes an exit code of it, the HTTP side a status.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// There is no such thing. HTTP 404, exit code 4.
    #[error("{0}")]
    NotFound(String),
    /// The state forbids it, and why. HTTP 409, exit code 4.
    #[error("{0}")]
    Forbidden(String),
    /// What was asked for is wrong. HTTP 400, exit code 2.
    #[error("{field}: {message}")]
    Invalid {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        message: String,
    },
    /// The ledger. HTTP 503, exit code by its cause.
    #[error("the ledger cannot be used: {}", crate::cause::text(.0))]
    Ledger(#[from] sqlx::Error),
    /// The log. HTTP 503, exit code by its cause.
    #[error(transparent)]
    Log(#[from] LogError),
    /// coderd's database. HTTP 503, exit code 3.
    #[error("coderd's database cannot be used: {0}")]
    Coderd(#[from] CoderdError),
    /// It was told to stop; the same call goes on where it stopped. Exit code 130.
    #[error("interrupted; the same command goes on from here")]
    Interrupted,
    /// A fault of ours. HTTP 500, exit code 70.
    #[error("{}", crate::cause::text(.0.as_ref()))]
    Internal(#[from] anyhow::Error),
}

impl OperationError {
    /// What a plan would change has changed since it was made.
    pub(super) fn plan_changed() -> Self {
        OperationError::Forbidden("the effect is no longer the planned one: plan again".to_owned())
    }
}

impl From<serde_json::Error> for OperationError {
    fn from(error: serde_json::Error) -> Self {
        OperationError::Internal(error.into())
    }
}

impl From<ProjectionError> for OperationError {
    fn from(error: ProjectionError) -> Self {
        match error {
            ProjectionError::Unavailable(cause) => OperationError::Ledger(cause),
            broken => OperationError::Internal(broken.into()),
        }
    }
}
