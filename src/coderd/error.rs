//! Errors of coderd's database. Each message contains what to do.

use std::borrow::Cow;

use crate::cause::{Remedy, text};

/// Why coderd's database could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CoderdError {
    /// The configured address is not valid.
    #[error("not the address of a PostgreSQL database: {0}")]
    Address(String),
    /// The server does not answer, or not in time.
    #[error(
        "coderd's database at {address} cannot be reached ({cause}): check that the server runs, the address and the network"
    )]
    Unreachable {
        /// `HOST:PORT/DATABASE`, without user and password.
        address: String,
        /// The words of the system or the server.
        cause: String,
    },
    /// The server refuses the login.
    #[error(
        "coderd's database at {address} refuses the login of {user:?} ({cause}): check user, password and pg_hba.conf"
    )]
    LoginRefused {
        /// `HOST:PORT/DATABASE`.
        address: String,
        /// The database role.
        user: String,
        /// The server's words.
        cause: String,
    },
    /// The role lacks rights. Each line is a statement that grants one.
    #[error("coderd's database: the role lacks rights; let an administrator run:\n{}", .grants.join("\n"))]
    NotGranted {
        /// `grant select (…) on … to …;`
        grants: Vec<String>,
    },
    /// Tables or columns that every supported version of coderd has are missing.
    #[error(
        "this database lacks {}: it is not coderd's, coderd's schema is not in the role's search_path, or this version of coderd is not supported",
        .names.join(", ")
    )]
    Missing {
        /// `table` or `table.column`.
        names: Vec<String>,
    },
    /// A fact that identifies this coderd is unknown: which one, and what to do.
    #[error("{0}")]
    UnknownIdentity(String),
    /// The connection was lost, or a statement exceeded its time limit.
    #[error("the connection to coderd's database was lost or too slow: {0}")]
    Lost(String),
    /// Any other error of PostgreSQL.
    #[error("coderd's database: {}", crate::cause::text(.0))]
    Query(#[source] sqlx::Error),
}

impl CoderdError {
    /// Whether a change of coderd's schema or of the role's rights can be the cause.
    #[must_use]
    pub fn is_of_schema(&self) -> bool {
        matches!(
            self,
            CoderdError::Missing { .. } | CoderdError::NotGranted { .. } | CoderdError::Query(_)
        )
    }
}

impl From<sqlx::Error> for CoderdError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|answer| answer.code()).map(Cow::into_owned);
        match (Remedy::of(&error), code.as_deref()) {
            // Rights are checked against the catalog first; an administrator can revoke them in
            // between.
            (_, Some("42501")) => CoderdError::NotGranted {
                grants: vec![format!("-- {}; see docs/install.md", text(&error))],
            },
            // A column or table disappeared while the reader was connected: coderd was upgraded.
            (_, Some("42703" | "42P01")) => CoderdError::Missing { names: vec![text(&error)] },
            (remedy, _) if remedy.is_retry() => CoderdError::Lost(text(&error)),
            _ => CoderdError::Query(error),
        }
    }
}
