//! Converts between Kafka's records and Tallyline's.

use std::panic::{AssertUnwindSafe, catch_unwind};

use chrono::{DateTime, Datelike as _, Utc};
use rdkafka::Message as _;
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, Headers as _, OwnedHeaders};

use crate::event::{KEPT_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, Message, UNREADABLE, YEARS};
use crate::log::Record;

pub(super) fn record(found: &BorrowedMessage<'_>) -> Record {
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

/// A message's headers for the producer. None if a name contains NUL, which Kafka's client cannot
/// send.
pub(super) fn owned_headers(message: &Message) -> Option<OwnedHeaders> {
    let mut owned = OwnedHeaders::new_with_capacity(message.headers.len());
    for (key, value) in &message.headers {
        if key.contains('\0') {
            return None;
        }
        owned = owned.insert(Header { key, value: value.as_ref() });
    }
    Some(owned)
}

/// Approximate memory of a record, in bytes.
pub(super) fn size(record: &Record) -> usize {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
