//! A client's own deadline: what the server's timeouts cannot end when its host is gone and nobody says so.

use std::future::Future;
use std::io;
use std::time::Duration;

use sqlx::PgConnection;
use sqlx::{Error, Row as _};

use super::Ledger;

/// For one call. The server ends a statement first, after 60 s (`statement_timeout`): this is for a server that no longer answers at all. The
/// client's socket has no keepalive, and sqlx gives no way to set one.
pub(super) const DEADLINE: Duration = Duration::from_secs(75);

/// For a connection that comes back to the pool. One whose call was given up still waits for the answer; until it is closed it takes up a place.
const SETTLE: Duration = Duration::from_secs(5);

impl Ledger {
    /// What `call`, made on this ledger, answers within [`Ledger::deadline`]. The connection of one that is given up is not used again unless it
    /// answers soon after; whether a commit was done is not known then, as after a lost connection.
    ///
    /// # Errors
    /// The call's own; [`sqlx::Error::Io`] of the kind `TimedOut` where there is no answer.
    pub async fn in_time<T, E: From<Error>>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(answer) => answer,
            Err(_) => Err(E::from(no_answer(self.deadline))),
        }
    }
}

/// Whether a connection is fit for the pool: it has answered all that it was asked, and no transaction is open on it. A `begin` that is given up
/// before its answer leaves one open, and whatever the next user writes would be part of it. In the simple protocol a statement by itself begins
/// its transaction at its own time. One that cannot write is closed, as on a standby:
/// a new one may reach another server.
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
