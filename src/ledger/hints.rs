//! Hearing of new batches at once. Only a hint: who follows the ledger polls as well, and a lost hint costs nothing but the wait.

use sqlx::postgres::{PgListener, PgPoolOptions};

use super::Ledger;

/// A connection of its own that hears of each committed batch.
pub struct Hints(PgListener);

impl Ledger {
    /// Begins to listen.
    ///
    /// # Errors
    /// The database's.
    pub async fn listen(&self) -> Result<Hints, sqlx::Error> {
        let options = self.pool.connect_options().as_ref().clone();
        let own =
            PgPoolOptions::new().max_connections(1).acquire_timeout(self.pool.options().get_acquire_timeout()).connect_lazy_with(options);
        let mut listener = PgListener::connect_with(&own).await?;
        listener.listen("tallyline_batch").await?;
        Ok(Hints(listener))
    }
}

impl Hints {
    /// Waits for the next hint.
    ///
    /// # Errors
    /// The connection was lost: listen again.
    pub async fn heard(&mut self) -> Result<(), sqlx::Error> {
        match self.0.try_recv().await? {
            Some(_) => Ok(()),
            None => Err(sqlx::Error::Protocol("the connection for hints was lost".into())),
        }
    }
}
