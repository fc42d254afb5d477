//! Whether consumers accept this collector's signatures.
//!
//! While they do not, each row that is appended becomes a reject. So the first signed records are the proof: before it, passes report
//! no completeness. After a rejection this process appends nothing more, since it no longer knows which of its rows are in the ledger;
//! the next process does.

use std::collections::HashMap;

use chrono::{DateTime, Utc};

use super::open::Collector;
use super::settings::CollectError;
use crate::event::TopicPartition;

/// The proof that consumers accept this process's signatures.
#[derive(Debug, Default)]
pub(super) struct Proof {
    proven: bool,
    /// The first unproven record in each partition.
    places: HashMap<TopicPartition, i64>,
    /// The pass recorded before the first of these records; none where this process had recorded none.
    after_pass_id: Option<i64>,
    /// Where the first pass without the proof began; None within: a full sweep.
    begun_from: Option<Option<DateTime<Utc>>>,
}

impl Proof {
    /// Notes a record that the log has acknowledged, and the pass recorded last.
    pub(super) fn appended(&mut self, partition: TopicPartition, offset: i64, pass_id: Option<i64>) {
        if self.places.is_empty() {
            self.after_pass_id = pass_id;
        }
        let first = self.places.entry(partition).or_insert(offset);
        *first = (*first).min(offset);
    }
}

impl Collector {
    /// Asks before rows are read and again before the pass is recorded: a consumer may record the cutover in between.
    pub(super) async fn check_signing_key(&self) -> Result<(), CollectError> {
        match self.ledger.in_time(self.ledger.needs_signing_key(self.log.signatures())).await? {
            true => Err(CollectError::NoSigningKey),
            false => Ok(()),
        }
    }

    /// Looks for the records that this process appended before. Where one of them is rejected for its signature, the pass ends, and the
    /// passes since that record report no completeness any more: consumers may have lost a key that they had.
    pub(super) async fn check_signatures(&mut self) -> Result<(), CollectError> {
        self.check_signing_key().await?;
        let places: Vec<(TopicPartition, i64)> = self.proof.places.iter().map(|(at, offset)| (*at, *offset)).collect();
        if places.is_empty() {
            return Ok(());
        }
        let results = self.ledger.in_time(self.ledger.signature_results(&places)).await?;
        if results.rejected > 0 {
            self.proof.proven = false;
            if let Some(after) = self.proof.after_pass_id {
                self.ledger.in_time(self.ledger.void_passes(&self.lease.lease, self.source.id, after)).await?;
            }
            return Err(CollectError::SignaturesRejected);
        }
        if results.unread > 0 {
            return Ok(());
        }
        self.proof.places.clear();
        self.proof.proven |= results.verified > 0;
        if let Some(from) = self.proof.begun_from.take() {
            self.reread_from = from;
        }
        Ok(())
    }

    /// Whether the pass may report completeness. One that may not is read again once the proof is there.
    pub(super) async fn is_proven(&mut self, from: Option<DateTime<Utc>>) -> Result<bool, CollectError> {
        self.check_signing_key().await?;
        if self.proof.proven || self.proof.places.is_empty() {
            return Ok(true);
        }
        if self.ledger.in_time(self.ledger.signed_since()).await?.is_none() {
            self.proof.places.clear();
            return Ok(true);
        }
        self.proof.begun_from.get_or_insert(from);
        Ok(false)
    }
}
