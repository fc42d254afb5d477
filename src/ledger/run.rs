//! Calls of the ledger: one connection and one deadline each.

use std::io;

use sqlx::pool::PoolConnection;
use sqlx::{Error, PgConnection, Postgres};
use tokio::time::{Duration, timeout};

use super::Ledger;

/// Deadline of one call. The server ends a statement earlier, after 60 s (`statement_timeout`);
/// this is for a server that does not answer. sqlx cannot set a keepalive on the client's socket.
pub(super) const DEADLINE: Duration = Duration::from_secs(75);

impl Ledger {
    /// Runs `call` on a connection of its own, within [`Ledger::deadline`]. An open transaction that
    /// it leaves is rolled back.
    ///
    /// The connection returns to the pool only after success. After an error, a timeout or a
    /// cancellation it is closed: it may be in the middle of an answer or of a transaction.
    ///
    /// # Errors
    /// The errors of `call`; [`sqlx::Error::Io`] of the kind `TimedOut` without an answer, where it is
    /// not known whether a commit succeeded.
    pub async fn run<T, E: From<Error>>(&self, call: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>) -> Result<T, E> {
        let answer = async {
            let mut borrowed = Borrowed(Some(self.pool.acquire().await?));
            let answer = call(borrowed.connection()?).await?;
            borrowed.give_back();
            Ok(answer)
        };
        timeout(self.deadline, answer).await.unwrap_or_else(|_| Err(no_answer(self.deadline).into()))
    }

    /// The same ledger, with a longer deadline for calls of up to `statements` long statements.
    #[must_use]
    pub fn with_statements(&self, statements: u32) -> Ledger {
        Ledger { deadline: self.deadline * statements, ..self.clone() }
    }
}

/// A connection that is closed when it is dropped, unless it is given back.
struct Borrowed(Option<PoolConnection<Postgres>>);

impl Borrowed {
    fn connection(&mut self) -> Result<&mut PgConnection, Error> {
        self.0.as_deref_mut().ok_or(Error::PoolClosed)
    }

    fn give_back(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // Detached first: the pool would wait for the answer, and the place would stay taken.
        drop(self.0.take().map(PoolConnection::detach));
    }
}

fn no_answer(within: Duration) -> Error {
    Error::Io(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", within.as_secs_f64())))
}
