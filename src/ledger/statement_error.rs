//! The error of a statement.

/// Why a statement of the ledger failed.
pub type StatementError = sqlx::Error;

/// The ledger became another incarnation between statements that belong together.
#[must_use]
pub fn other_incarnation() -> StatementError {
    sqlx::Error::Protocol("the ledger's incarnation changed during the fold".into())
}
