//! What can be wrong with coderd's database, each with what to do about it.

use std::borrow::Cow;

use crate::cause::{Remedy, text};

/// Why coderd's database could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CoderdError {
    /// The address in the configuration is none.
    #[error("not the address of a PostgreSQL database: {0}")]
    Address(String),
    /// Nobody answers there, or not in time.
    #[error("coderd's database at {address} cannot be reached ({cause}): check that the server runs, the address and the network")]
    Unreachable {
        /// `HOST:PORT/DATABASE`, without user and password.
        address: String,
        /// The system's or the server's own words.
        cause: String,
    },
    /// The server answers but does not let this user in.
    #[error("coderd's database at {address} refuses the login of {user:?} ({cause}): check user, password and pg_hba.conf")]
    LoginRefused {
        /// `HOST:PORT/DATABASE`.
        address: String,
        /// The database role.
        user: String,
        /// The server's own words.
        cause: String,
    },
    /// The role lacks rights. Each line is a statement that grants one.
    #[error("the role may not read all that is needed from coderd's database; let an administrator run:\n{}", .grants.join("\n"))]
    NotGranted {
        /// `grant select (…) on … to …;`
        grants: Vec<String>,
    },
    /// Tables or columns that every supported version of coderd has are not there.
    #[error(
        "this database lacks {}: it is not coderd's, coderd's schema is not in the role's search_path, or this version of coderd is not supported",
        .names.join(", ")
    )]
    Missing {
        /// `table` or `table.column`.
        names: Vec<String>,
    },
    /// Not both facts that tell one coderd from another are known: what is missing, and what to do.
    #[error("{0}")]
    UnknownIdentity(String),
    /// The connection was lost, or a statement ran into its time limit.
    #[error("the connection to coderd's database was lost or too slow: {0}")]
    Lost(String),
    /// Anything else that PostgreSQL says.
    #[error("coderd's database: {}", crate::cause::text(.0))]
    Query(#[source] sqlx::Error),
}

impl From<sqlx::Error> for CoderdError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|answer| answer.code()).map(Cow::into_owned);
        match (Remedy::of(&error), code.as_deref()) {
            // Rights are checked against the catalog first; they can be taken away in between.
            (_, Some("42501")) => CoderdError::NotGranted { grants: vec![format!("-- {}; see docs/install.md", text(&error))] },
            // A column or table that went while we were connected: coderd was upgraded.
            (_, Some("42703" | "42P01")) => CoderdError::Missing { names: vec![text(&error)] },
            (remedy, _) if remedy.is_retry() => CoderdError::Lost(text(&error)),
            _ => CoderdError::Query(error),
        }
    }
}
