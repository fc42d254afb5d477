//! One read-only connection to coderd's database.

use std::future::Future;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};

use super::CoderdError;

/// The longest time to open a connection.
const CONNECT_SECONDS: u64 = 10;

/// Where coderd's database is. Its `Debug` form shows no password.
#[derive(Clone)]
pub struct Database {
    options: PgConnectOptions,
    statement_timeout: Duration,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Database({}@{})", self.options.get_username(), self.address())
    }
}

impl Database {
    /// The database at `url` (`postgres://USER:PASSWORD@HOST:PORT/DATABASE`). Every session is
    /// read-only and named `tallyline` in `pg_stat_activity`. It ends a statement that runs longer
    /// than `statement_timeout`.
    ///
    /// # Errors
    /// [`CoderdError::Address`], without the URL, which contains a password.
    pub fn new(url: &str, statement_timeout: Duration) -> Result<Self, CoderdError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|error| CoderdError::Address(error.to_string()))?;
        let milliseconds = statement_timeout.as_millis().to_string();
        let options = options.application_name("tallyline").disable_statement_logging().options([
            ("default_transaction_read_only", "on"),
            ("statement_timeout", milliseconds.as_str()),
            // The reader never stays in a transaction. If it does, it must not hold back coderd's
            // vacuum.
            ("idle_in_transaction_session_timeout", "60000"),
            // The server notices a dead peer within about a minute.
            ("tcp_keepalives_idle", "30"),
            ("tcp_keepalives_interval", "10"),
            ("tcp_keepalives_count", "3"),
            // Times are read as instants; this only fixes how jsonb text shows one.
            ("timezone", "UTC"),
            // PostgreSQL starts JIT compilation by estimated cost, which is wrong without
            // statistics.
            ("jit", "off"),
        ]);
        Ok(Database { options, statement_timeout })
    }

    /// `HOST:PORT/DATABASE`, without secrets.
    #[must_use]
    pub fn address(&self) -> String {
        format!(
            "{}:{}/{}",
            self.options.get_host(),
            self.options.get_port(),
            self.options.get_database().unwrap_or_default()
        )
    }

    /// # Errors
    /// [`CoderdError::Unreachable`], [`CoderdError::LoginRefused`] or [`CoderdError::NotGranted`].
    pub async fn connect(&self) -> Result<Reader, CoderdError> {
        let unreachable =
            |cause: String| CoderdError::Unreachable { address: self.address(), cause };
        let opened = tokio::time::timeout(
            Duration::from_secs(CONNECT_SECONDS),
            PgConnection::connect_with(&self.options),
        )
        .await;
        let connection = opened
            .map_err(|_| unreachable(format!("no answer within {CONNECT_SECONDS} seconds")))?
            .map_err(|error| {
                self.refused(&error).unwrap_or_else(|| unreachable(crate::cause::text(&error)))
            })?;
        let user = self.options.get_username().to_owned();
        // The server ends a slow statement first; this deadline is for a server that does not
        // answer at all.
        let deadline = self.statement_timeout.saturating_add(Duration::from_secs(15));
        Ok(Reader { connection, user, deadline, identity_query: None })
    }

    /// Why the server refuses the login. None: it does not.
    fn refused(&self, error: &sqlx::Error) -> Option<CoderdError> {
        if let Some(grant) = crate::cause::connect_grant(error, &self.options) {
            return Some(CoderdError::NotGranted { grants: vec![grant] });
        }
        let refused = error.as_database_error()?;
        // class 28: invalid authorization
        refused.code()?.starts_with("28").then(|| CoderdError::LoginRefused {
            address: self.address(),
            user: self.options.get_username().to_owned(),
            cause: refused.message().to_owned(),
        })
    }
}

/// The connection. Each statement has its own transaction and snapshot: between statements nothing
/// stays open in coderd's database.
pub struct Reader {
    pub(super) connection: PgConnection,
    pub(super) user: String,
    pub(super) deadline: Duration,
    /// Reads both facts of the identity. None: one of them was not known.
    pub(super) identity_query: Option<&'static str>,
}

impl Reader {
    /// Closes the connection.
    pub async fn close(self) {
        // If the server does not answer, its keepalives end the connection.
        let _ = tokio::time::timeout(Duration::from_secs(2), self.connection.close()).await;
    }
}

/// The answer of one statement, within the deadline.
pub(super) async fn within<T>(
    deadline: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, CoderdError> {
    match tokio::time::timeout(deadline, statement).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(CoderdError::Lost(format!("no answer within {deadline:?}"))),
    }
}
