//! Checks that consumers accept this collector's signatures.
//!
//! If they do not, each appended row becomes a reject. So the first signed records are the proof: until then, passes report no
//! completeness. Signed records in flight at the start belong to it. After a rejection this process appends nothing more: it no longer
//! knows which of its rows the ledger has. The next process does.

use crate::ledger::{cutover, passes};
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
    /// In each partition, the first record that another key had signed and that was in flight when this process opened.
    other_keys: HashMap<TopicPartition, i64>,
    /// The last pass that does not rely on these records; None: no recorded pass relies on them.
    after_pass_id: Option<i64>,
    /// The start of the first pass without the proof; `Some(None)`: a full sweep.
    begun_from: Option<Option<DateTime<Utc>>>,
}

impl Proof {
    /// Notes an acknowledged record, and the last recorded pass.
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

    /// Whether records must be signed and the proof is missing: passes report no completeness.
    pub(super) fn is_missing(&self) -> bool {
        !self.proven && !self.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.places.is_empty() && self.other_keys.is_empty()
    }

    /// The pass before the first record that consumers have neither accepted nor rejected. None: all are decided.
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
    /// Reads from the ledger which passes rely on the records that were in flight when this process opened.
    pub(super) async fn rely_on_in_flight(&mut self) -> Result<(), CollectError> {
        let places = [listed(&self.proof.places), listed(&self.proof.other_keys)].concat();
        self.proof.after_pass_id = self.ledger.run(async |conn| passes::last_before(conn, self.source.id, &places).await).await?;
        Ok(())
    }

    /// Checks the records that this process appended or found in flight. If the signature of one is rejected, the pass fails. The passes
    /// since that record become void: consumers may have lost a key that they had.
    pub(super) async fn check_signatures(&mut self) -> Result<(), CollectError> {
        if self.ledger.run(async |conn| cutover::needs_signing_key(conn, self.log.signatures()).await).await? {
            return Err(CollectError::NoSigningKey);
        }
        if self.proof.is_empty() {
            return Ok(());
        }
        let own = self.ledger.run(async |conn| cutover::signature_results(conn, &listed(&self.proof.places)).await).await?;
        let other = self.ledger.run(async |conn| cutover::signature_results(conn, &listed(&self.proof.other_keys)).await).await?;
        if own.rejected > 0 || other.rejected > 0 {
            self.proof.proven = false;
            if let Some(after) = self.proof.after_pass_id {
                self.ledger.run(async |conn| passes::void(conn, &self.lease.lease, self.source.id, after).await).await?;
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

    /// Whether the pass may report completeness. A pass without proof is read again once the proof exists.
    pub(super) async fn is_proven(&mut self, from: Option<DateTime<Utc>>) -> Result<bool, CollectError> {
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
