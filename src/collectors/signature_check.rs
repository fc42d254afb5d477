//! Checks that consumers accept this collector's signatures.
//!
//! If they do not, each appended row becomes a reject. So the first signed records are the proof:
//! until consumers have accepted them, passes report no completeness. Signed records in flight at
//! the start belong to them.
//! After a rejection this process appends nothing more: it no longer knows which of its rows the
//! ledger has. The next process does.

use chrono::{DateTime, Utc};

use super::open::Collector;
use super::proof::as_list;
use super::settings::CollectError;
use crate::ledger::{cutover, passes};

impl Collector {
    /// Reads from the ledger which passes rely on the records that were in flight when this process
    /// opened.
    pub(super) async fn find_dependent_passes(&mut self) -> Result<(), CollectError> {
        let places = [as_list(&self.proof.places), as_list(&self.proof.other_keys)].concat();
        self.proof.after_pass_id = self
            .ledger
            .run(async |conn| passes::last_before(conn, self.source.id, &places).await)
            .await?;
        Ok(())
    }

    /// Checks the records that this process appended or found in flight. If the signature of one is
    /// rejected, the pass fails. The passes since that record become void: consumers may have lost
    /// a key that they had.
    pub(super) async fn check_signatures(&mut self) -> Result<(), CollectError> {
        if self
            .ledger
            .run(async |conn| cutover::needs_signing_key(conn, self.log.signatures()).await)
            .await?
        {
            return Err(CollectError::NoSigningKey);
        }
        if self.proof.is_empty() {
            return Ok(());
        }
        let own = self
            .ledger
            .run(async |conn| cutover::signature_results(conn, &as_list(&self.proof.places)).await)
            .await?;
        let other = self
            .ledger
            .run(async |conn| {
                cutover::signature_results(conn, &as_list(&self.proof.other_keys)).await
            })
            .await?;
        if own.rejected > 0 || other.rejected > 0 {
            self.proof.proven = false;
            if let Some(after) = self.proof.after_pass_id {
                self.ledger
                    .run(async |conn| {
                        passes::void(conn, &self.lease.lease, self.source.id, after).await
                    })
                    .await?;
            }
            return Err(if own.rejected > 0 {
                CollectError::SignaturesRejected
            } else {
                CollectError::OtherKeyRejected
            });
        }
        if own.unread > 0 || other.unread > 0 {
            return Ok(());
        }
        self.proof.places.clear();
        self.proof.other_keys.clear();
        self.proof.proven |= own.verified > 0;
        if let Some(from) = self.proof.begun_from.take() {
            self.reread_from = from;
        }
        Ok(())
    }

    /// Whether the pass may report completeness. A pass without proof is read again once the proof
    /// exists.
    pub(super) async fn is_proven(
        &mut self,
        from: Option<DateTime<Utc>>,
    ) -> Result<bool, CollectError> {
        if !self.proof.is_missing() {
            return Ok(true);
        }
        if self.ledger.run(cutover::signed_since).await?.is_none() {
            self.proof.places.clear();
            self.proof.other_keys.clear();
            return Ok(true);
        }
        self.proof.begun_from.get_or_insert(from);
        Ok(false)
    }
}
