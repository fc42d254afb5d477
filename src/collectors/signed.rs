//! Whether consumers accept this collector's signatures.
//!
//! While they do not, each row that is appended becomes a reject. So the first signed records are the proof: before it, passes report
//! no completeness. Signed records in flight when the process opens are part of it. After a rejection this process appends nothing
//! more, since it no longer knows which of its rows are in the ledger; the next process does.

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
    /// The first record in each partition that was in flight when this process opened, and that another key had signed.
    other_keys: HashMap<TopicPartition, i64>,
    /// The last pass that does not rely on these records; none: no recorded pass relies on them.
    after_pass_id: Option<i64>,
    /// Where the first pass without the proof began; None within: a full sweep.
    begun_from: Option<Option<DateTime<Utc>>>,
}

impl Proof {
    /// Notes a record that the log has acknowledged, and the pass recorded last.
    pub(super) fn appended(&mut self, partition: TopicPartition, offset: i64, pass_id: Option<i64>) {
        if self.is_empty() {
            self.after_pass_id = pass_id;
        }
        first(&mut self.places, partition, offset);
    }

    /// Notes a signed record that was in flight when this process opened.
    pub(super) fn in_flight(&mut self, partition: TopicPartition, offset: i64, own_key: bool) {
        first(if own_key { &mut self.places } else { &mut self.other_keys }, partition, offset);
    }

    /// Whether passes may not report completeness yet, where records must be signed.
    pub(super) fn is_missing(&self) -> bool {
        !self.proven && !self.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.places.is_empty() && self.other_keys.is_empty()
    }

    /// The pass recorded before the first record that consumers have neither accepted nor rejected yet. None: there is none.
    pub(super) fn unproven_after(&self) -> Option<i64> {
        self.after_pass_id.filter(|_| !self.is_empty())
    }
}

fn first(places: &mut HashMap<TopicPartition, i64>, partition: TopicPartition, offset: i64) {
    let first = places.entry(partition).or_insert(offset);
    *first = (*first).min(offset);
}

fn listed(places: &HashMap<TopicPartition, i64>) -> Vec<(TopicPartition, i64)> {
    places.iter().map(|(at, offset)| (*at, *offset)).collect()
}

impl Collector {
    /// Looks up which passes rely on the records that were in flight when this process opened.
    pub(super) async fn rely_on_in_flight(&mut self) -> Result<(), CollectError> {
        let places = [listed(&self.proof.places), listed(&self.proof.other_keys)].concat();
        self.proof.after_pass_id = self.ledger.in_time(self.ledger.last_pass_before(self.source.id, &places)).await?;
        Ok(())
    }

    /// Looks for the records that this process appended before, or found in flight. Where one of them is rejected for its signature, the pass
    /// ends, and the passes since that record report no completeness any more: consumers may have lost a key that they had.
    pub(super) async fn check_signatures(&mut self) -> Result<(), CollectError> {
        if self.ledger.in_time(self.ledger.needs_signing_key(self.log.signatures())).await? {
            return Err(CollectError::NoSigningKey);
        }
        if self.proof.is_empty() {
            return Ok(());
        }
        let own = self.ledger.in_time(self.ledger.signature_results(&listed(&self.proof.places))).await?;
        let other = self.ledger.in_time(self.ledger.signature_results(&listed(&self.proof.other_keys))).await?;
        if own.rejected > 0 || other.rejected > 0 {
            self.proof.proven = false;
            if let Some(after) = self.proof.after_pass_id {
                self.ledger.in_time(self.ledger.void_passes(&self.lease.lease, self.source.id, after)).await?;
            }
            return Err(if own.rejected > 0 { CollectError::SignaturesRejected } else { CollectError::OtherKeyRejected });
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

    /// Whether the pass may report completeness. One that may not is read again once the proof is there.
    pub(super) async fn is_proven(&mut self, from: Option<DateTime<Utc>>) -> Result<bool, CollectError> {
        if !self.proof.is_missing() {
            return Ok(true);
        }
        if self.ledger.in_time(self.ledger.signed_since()).await?.is_none() {
            self.proof.places.clear();
            self.proof.other_keys.clear();
            return Ok(true);
        }
        self.proof.begun_from.get_or_insert(from);
        Ok(false)
    }
}
