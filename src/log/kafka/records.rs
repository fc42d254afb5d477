//! Copies polled records and gathers them into batches, both within limits of memory. A batch
//! closes when it is full, when it is due, or to free memory.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use chrono::{DateTime, Datelike as _, Utc};
use rdkafka::Message as _;
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Headers as _};

use crate::event::{
    KEPT_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, Message, TopicPartition, UNREADABLE, YEARS,
};
use crate::log::consumer::BackendEvent;
use crate::log::{Batch, Record};

pub(super) fn record_of(found: &BorrowedMessage<'_>) -> Record {
    Record {
        offset: found.offset(),
        timestamp: timestamp(found.timestamp().to_millis()),
        message: Message::from_log(
            found.key().map(|key| beginning(key).to_vec()),
            found.headers().map(headers).unwrap_or_default(),
            found.payload(),
        ),
    }
}

/// A record's timestamp. With `message.timestamp.type=CreateTime` it is the producer's. A time
/// outside the years of events is treated as missing, because PostgreSQL refuses some such times.
fn timestamp(millis: Option<i64>) -> DateTime<Utc> {
    millis
        .and_then(DateTime::from_timestamp_millis)
        .filter(|time| YEARS.contains(&time.year()))
        .unwrap_or_default()
}

/// Copies the headers. The client library panics on names that are not UTF-8, which any writer can
/// send. Such headers, and ones larger than any event's, are unreadable. The record's key and
/// payload stay unchanged, and it is rejected for its missing headers.
fn headers(found: &BorrowedHeaders) -> Vec<(String, Option<Vec<u8>>)> {
    let read = || {
        let bytes: usize = found.iter().map(|header| header_size(header.key, header.value)).sum();
        let owned = || {
            found
                .iter()
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect()
        };
        (bytes <= MAX_PAYLOAD_BYTES).then(owned)
    };
    let read = catch_unwind(AssertUnwindSafe(read)).ok().flatten();
    read.unwrap_or_else(|| vec![(UNREADABLE.to_owned(), None)])
}

/// The first bytes of a key. A key only selects the partition, so that one larger than any of
/// Tallyline's is cut.
fn beginning(key: &[u8]) -> &[u8] {
    &key[..key.len().min(KEPT_PAYLOAD_BYTES)]
}

/// Approximate memory of a record, in bytes.
fn size(record: &Record) -> usize {
    message_size(&record.message) + 128
}

/// Approximate size of a message with its headers, in bytes.
pub(super) fn message_size(message: &Message) -> usize {
    let headers: usize =
        message.headers.iter().map(|(name, value)| header_size(name, value.as_deref())).sum();
    message.key.as_ref().map_or(0, Vec::len)
        + message.payload.as_ref().map_or(0, Vec::len)
        + headers
}

fn header_size(name: &str, value: Option<&[u8]>) -> usize {
    name.len() + value.map_or(0, <[u8]>::len) + 64
}

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
        let size = size(&record);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rdkafka::message::{Header, OwnedHeaders};

    use super::*;

    #[test]
    fn a_time_outside_the_years_of_events_is_treated_as_absent() {
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap().timestamp_millis();
        let (first, last) = (at("1970-01-01T00:00:00Z"), at("9999-12-31T23:59:59.999Z"));
        assert_eq!(timestamp(Some(last)).timestamp_millis(), last);
        for absent in [
            None,
            Some(first - 1),
            Some(last + 1),
            Some(i64::MIN),
            Some(i64::MAX),
            Some(-8_334_601_228_800_000),
        ] {
            assert_eq!(timestamp(absent), DateTime::UNIX_EPOCH, "{absent:?}");
        }
    }

    /// 100,000 empty headers need some hundred bytes in a packed batch, and megabytes in memory.
    #[test]
    fn headers_larger_than_any_event_are_unreadable() {
        let empty = |count| {
            (0..count).fold(OwnedHeaders::new(), |all, _| {
                all.insert(Header { key: "a", value: None::<&[u8]> })
            })
        };
        assert_eq!(headers(empty(4_000).as_borrowed()).len(), 4_000);
        assert_eq!(headers(empty(100_000).as_borrowed()), [(UNREADABLE.to_owned(), None)]);
    }

    proptest! {
        /// PostgreSQL accepts every time that a record can get.
        #[test]
        fn any_time_fits_the_ledger(millis in any::<i64>()) {
            prop_assert!(YEARS.contains(&timestamp(Some(millis)).year()));
        }
    }
}
