//! Calls on pooled PostgreSQL connections: one connection and one deadline each.

use std::io;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Connection as _, Error, PgConnection, PgPool, Postgres};
use tokio::time::timeout;

/// Runs `call` on a connection of its own, within `deadline`.
///
/// The connection returns to the pool only after success; a `sqlx::Transaction` that `call` dropped
/// is rolled back before that. After an error, a timeout or a cancellation it is closed, because it
/// may be in the middle of an answer or of a `begin`.
///
/// # Errors
/// The errors of `call` and of the pool; [`Error::Io`] of the kind `TimedOut` if no answer arrives
/// in time. Then it is not known whether a commit succeeded.
pub async fn run<T, E: From<Error>>(
    pool: &PgPool,
    deadline: Duration,
    call: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
) -> Result<T, E> {
    let answer = async {
        let mut guard = ConnectionGuard(Some(pool.acquire().await?));
        let answer = call(guard.connection()?).await?;
        // a dropped transaction only queues its rollback, and keeps its locks until it is sent
        let connection = guard.connection()?;
        if connection.should_flush() {
            connection.flush().await?;
        }
        guard.release();
        Ok(answer)
    };
    within(deadline, answer).await
}

/// Waits for a part of a call for at most `deadline`.
///
/// # Errors
/// Those of `answer`; [`Error::Io`] of the kind `TimedOut` if it does not come in time.
pub async fn within<T, E: From<Error>>(
    deadline: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    timeout(deadline, answer).await.unwrap_or_else(|_| Err(no_answer(deadline).into()))
}

/// A connection that is closed when it is dropped, unless it is released.
struct ConnectionGuard(Option<PoolConnection<Postgres>>);

impl ConnectionGuard {
    fn connection(&mut self) -> Result<&mut PgConnection, Error> {
        self.0.as_deref_mut().ok_or(Error::PoolClosed)
    }

    fn release(mut self) {
        drop(self.0.take());
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        // Detached first: the pool would wait for the answer, and the place would stay taken.
        drop(self.0.take().map(PoolConnection::detach));
    }
}

fn no_answer(within: Duration) -> Error {
    let message = format!("no answer within {} s", within.as_secs_f64());
    Error::Io(io::Error::new(io::ErrorKind::TimedOut, message))
}
