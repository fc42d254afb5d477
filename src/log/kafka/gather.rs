//! Gathers polled records into batches, which close when they are full, when they are due, or to
//! free memory.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::decode;
use crate::event::TopicPartition;
use crate::log::consumer::BackendEvent;
use crate::log::{Batch, Record};

/// A batch closes at this size in memory. At twice this size over all partitions, the largest batch
/// closes.
const BATCH_BYTES: usize = 8 * 1024 * 1024;

/// The open batches of all partitions.
pub(super) struct OpenBatches {
    batch_records: usize,
    linger: Duration,
    open: BTreeMap<TopicPartition, OpenBatch>,
    records: usize,
    bytes: usize,
    next_due: Option<Instant>,
}

struct OpenBatch {
    run: u64,
    records: Vec<Record>,
    bytes: usize,
    due: Instant,
}

impl OpenBatches {
    pub fn new(batch_records: usize, linger: Duration) -> OpenBatches {
        OpenBatches {
            batch_records: batch_records.max(1),
            linger,
            open: BTreeMap::new(),
            records: 0,
            bytes: 0,
            next_due: None,
        }
    }

    /// When the oldest open batch is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.next_due
    }

    /// Adds a record. Returns a batch that became full, or the largest one if all together became
    /// too large.
    pub fn add(
        &mut self,
        partition: TopicPartition,
        run: u64,
        record: Record,
    ) -> Option<BackendEvent> {
        let size = decode::size(&record);
        let linger = self.linger;
        let open = self.open.entry(partition).or_insert_with(|| OpenBatch {
            run,
            records: Vec::new(),
            bytes: 0,
            due: Instant::now() + linger,
        });
        open.records.push(record);
        open.bytes += size;
        self.records += 1;
        self.bytes += size;
        let (full, due) =
            (open.records.len() >= self.batch_records || open.bytes >= BATCH_BYTES, open.due);
        self.next_due = Some(self.next_due.map_or(due, |next| next.min(due)));
        if full {
            return self.take(partition);
        }
        if self.records >= 2 * self.batch_records || self.bytes >= 2 * BATCH_BYTES {
            let largest = self
                .open
                .iter()
                .max_by_key(|(_, open)| open.bytes)
                .map(|(partition, _)| *partition)?;
            return self.take(largest);
        }
        None
    }

    /// The batches that have waited long enough, oldest first.
    pub fn due(&mut self, now: Instant) -> Vec<BackendEvent> {
        if self.next_due.is_none_or(|due| due > now) {
            return Vec::new();
        }
        let mut due: Vec<(Instant, TopicPartition)> = self
            .open
            .iter()
            .filter(|(_, open)| open.due <= now)
            .map(|(partition, open)| (open.due, *partition))
            .collect();
        due.sort_unstable();
        due.into_iter().filter_map(|(_, partition)| self.take(partition)).collect()
    }

    /// The partition's open batch, if it has one.
    pub fn take(&mut self, partition: TopicPartition) -> Option<BackendEvent> {
        let open = self.open.remove(&partition)?;
        self.records -= open.records.len();
        self.bytes -= open.bytes;
        self.next_due = self.open.values().map(|open| open.due).min();
        let next_offset = open.records.last()?.offset + 1;
        Some(BackendEvent::Batch {
            run: open.run,
            batch: Batch { partition, records: open.records, next_offset },
        })
    }
}
