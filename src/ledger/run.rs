//! Calls of the ledger.

use std::time::Duration;

use sqlx::{Error, PgConnection};

use super::Ledger;
use crate::pool;

/// Deadline of one call. The server ends a statement earlier, after 60 s (`statement_timeout`);
/// this is for a server that does not answer. sqlx cannot set a keepalive on the client's socket.
pub(super) const DEADLINE: Duration = Duration::from_secs(75);

impl Ledger {
    /// Runs `call` on a connection of its own, within [`Ledger::deadline`]: see [`pool::run`].
    pub async fn run<T, E: From<Error>>(
        &self,
        call: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
    ) -> Result<T, E> {
        pool::run(&self.pool, self.deadline, call).await
    }

    /// The same ledger, with a longer deadline for calls of up to `statements` long statements.
    #[must_use]
    pub fn with_statements(&self, statements: u32) -> Ledger {
        Ledger { deadline: self.deadline * statements, ..self.clone() }
    }
}
