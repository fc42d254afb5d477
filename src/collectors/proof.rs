//! The proof that consumers accept a collector's signatures.

use std::collections::HashMap;

use chrono::{DateTime, Utc};

use crate::event::TopicPartition;

/// The records whose signatures consumers have not decided.
#[derive(Debug, Default)]
pub(super) struct Proof {
    pub(super) proven: bool,
    /// The first unproven record in each partition.
    pub(super) places: HashMap<TopicPartition, i64>,
    /// In each partition, the first record that another key had signed and that was in flight when
    /// this process opened.
    pub(super) other_keys: HashMap<TopicPartition, i64>,
    /// The last pass that does not rely on these records; None: no recorded pass relies on them.
    pub(super) after_pass_id: Option<i64>,
    /// The start of the first pass without the proof; `Some(None)`: a full sweep.
    pub(super) begun_from: Option<Option<DateTime<Utc>>>,
}

impl Proof {
    /// Notes an acknowledged record, and the last recorded pass.
    pub(super) fn appended(
        &mut self,
        partition: TopicPartition,
        offset: i64,
        pass_id: Option<i64>,
    ) {
        if self.is_empty() {
            self.after_pass_id = pass_id;
        }
        keep_first(&mut self.places, partition, offset);
    }

    /// Notes a signed record that was in flight when this process opened.
    pub(super) fn in_flight(&mut self, partition: TopicPartition, offset: i64, own_key: bool) {
        keep_first(
            if own_key { &mut self.places } else { &mut self.other_keys },
            partition,
            offset,
        );
    }

    /// Whether records must be signed and the proof is missing: passes report no completeness.
    pub(super) fn is_missing(&self) -> bool {
        !self.proven && !self.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty() && self.other_keys.is_empty()
    }

    /// The pass before the first record that consumers have neither accepted nor rejected. None:
    /// all are decided.
    pub(super) fn unproven_after(&self) -> Option<i64> {
        self.after_pass_id.filter(|_| !self.is_empty())
    }
}

fn keep_first(places: &mut HashMap<TopicPartition, i64>, partition: TopicPartition, offset: i64) {
    let first = places.entry(partition).or_insert(offset);
    *first = (*first).min(offset);
}

/// The places, with their offsets.
pub(super) fn as_list(places: &HashMap<TopicPartition, i64>) -> Vec<(TopicPartition, i64)> {
    places.iter().map(|(at, offset)| (*at, *offset)).collect()
}
