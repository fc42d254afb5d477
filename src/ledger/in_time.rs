//! The client's own deadline, for servers whose host is gone: their own timeouts cannot end a call.

use std::future::Future;
use std::io;
use std::time::Duration;

use sqlx::PgConnection;
use sqlx::{Error, Row as _};

use super::Ledger;

/// Deadline of one call. The server ends a statement earlier, after 60 s (`statement_timeout`); this is for a server that does not answer.
/// The client's socket has no keepalive, and sqlx cannot set one.
pub(super) const DEADLINE: Duration = Duration::from_secs(75);

/// Deadline of a connection that returns to the pool. After a timeout it still waits for the answer, and its place stays taken.
const SETTLE: Duration = Duration::from_secs(5);

impl Ledger {
    /// Returns the answer of `call` within [`Ledger::deadline`]. After a timeout its connection is reused only if it answers soon after.
    /// As after a lost connection, it is not known whether a commit succeeded.
    ///
    /// # Errors
    /// The call's own errors; [`sqlx::Error::Io`] of the kind `TimedOut` without an answer.
    pub async fn in_time<T, E: From<Error>>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(answer) => answer,
            Err(_) => Err(E::from(no_answer(self.deadline))),
        }
    }
}

/// Whether a connection may return to the pool: it has answered all calls and has no open transaction. A `begin` that times out leaves
/// a transaction open, and the next user's writes would become part of it. In the simple protocol a single statement starts its own
/// transaction at its own time. A session that cannot write, as on a
/// standby, is closed: a new one may reach another server.
pub(super) async fn settles(connection: &mut PgConnection) -> Result<bool, Error> {
    let fit = "select now() = statement_timestamp() and current_setting('transaction_read_only') = 'off'";
    let asked = sqlx::raw_sql(fit).fetch_one(connection);
    match tokio::time::timeout(SETTLE, asked).await {
        Ok(answered) => answered?.try_get(0),
        Err(_) => Err(no_answer(SETTLE)),
    }
}

fn no_answer(within: Duration) -> Error {
    Error::Io(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", within.as_secs_f64())))
}
