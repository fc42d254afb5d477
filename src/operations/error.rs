//! Errors of operations.

use crate::coderd::CoderdError;
use crate::ledger::StatementError;
use crate::log::LogError;
use crate::projection::ProjectionError;

/// Why an operation failed. The command line maps it to an exit code, the API to an HTTP status.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The requested object does not exist. HTTP 404, exit code 4.
    #[error("{0}")]
    NotFound(String),
    /// The current state forbids the operation; the text gives the reason. HTTP 409, exit code 4.
    #[error("{0}")]
    Forbidden(String),
    /// The request is invalid. HTTP 400, exit code 2.
    #[error("{field}: {message}")]
    Invalid {
        field: &'static str,
        /// The fault, and the expected value.
        message: String,
    },
    /// The ledger failed. HTTP 503; the exit code depends on the cause.
    #[error("the ledger cannot be used: {}", crate::cause::text(.0))]
    Ledger(#[from] StatementError),
    /// The log failed. HTTP 503; the exit code depends on the cause.
    #[error(transparent)]
    Log(#[from] LogError),
    /// coderd's database failed. HTTP 503, exit code 3.
    #[error("coderd's database cannot be used: {0}")]
    Coderd(#[from] CoderdError),
    /// The operation was stopped. The same call resumes it. Exit code 130.
    #[error("interrupted: run the same command again, it resumes")]
    Interrupted,
    /// A fault of Tallyline. HTTP 500, exit code 70.
    #[error("{}", crate::cause::text(.0.as_ref()))]
    Internal(#[from] anyhow::Error),
}

impl OperationError {
    /// The ledger has no replay plan with this hash.
    pub(crate) fn replay_not_planned(hash: &str) -> Self {
        OperationError::NotFound(format!(
            "no replay was planned under {hash}: run `tallyline replay plan` and use the hash that it prints"
        ))
    }

    /// A plan is executed only once.
    pub(crate) fn plan_finished() -> Self {
        OperationError::Forbidden("this plan was executed to its end: plan again".to_owned())
    }

    /// The effect of a plan has changed since the plan was made.
    pub(super) fn plan_changed() -> Self {
        OperationError::Forbidden("the effect has changed since the plan: plan again".to_owned())
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
