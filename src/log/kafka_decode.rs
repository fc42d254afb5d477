//! Between Kafka's records and ours.

use std::panic::{AssertUnwindSafe, catch_unwind};

use chrono::DateTime;
use rdkafka::Message as _;
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, Headers as _, OwnedHeaders};

use super::Record;
use crate::event::{KEPT_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, Message};

/// Stands for headers that can't be read: a name that is not UTF-8, or too many bytes. The record is then refused by its reader like any other
/// without our headers; key and payload are as found.
const UNREADABLE: &str = "\u{fffd}";

/// Our copy of a record.
pub(super) fn record(found: &BorrowedMessage<'_>) -> Record {
    Record {
        offset: found.offset(),
        timestamp: found.timestamp().to_millis().and_then(DateTime::from_timestamp_millis).unwrap_or_default(),
        message: Message::found(
            found.key().map(|key| beginning(key).to_vec()),
            found.headers().map(headers).unwrap_or_default(),
            found.payload(),
        ),
    }
}

/// The client library panics on a header name that is not UTF-8, and anyone who may write to the topic can send one. Headers that are larger than
/// any event's are unreadable too.
fn headers(found: &BorrowedHeaders) -> Vec<(String, Option<Vec<u8>>)> {
    let read = || {
        let bytes: usize = found.iter().map(|header| header.key.len() + header.value.map_or(0, <[u8]>::len)).sum();
        let owned = || found.iter().map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect();
        (bytes <= MAX_PAYLOAD_BYTES).then(owned)
    };
    let read = catch_unwind(AssertUnwindSafe(read)).ok().flatten();
    read.unwrap_or_else(|| vec![(UNREADABLE.to_owned(), None)])
}

/// A key only chooses the partition: of one that is larger than any of ours the beginning is kept.
fn beginning(key: &[u8]) -> &[u8] {
    &key[..key.len().min(KEPT_PAYLOAD_BYTES)]
}

/// A message's headers for the producer; none when a name holds NUL, which Kafka's client can't carry.
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

/// Bytes that a record holds in memory, roughly.
pub(super) fn size(record: &Record) -> usize {
    message_size(&record.message) + 128
}

/// Bytes of a message with its headers, roughly.
pub(super) fn message_size(message: &Message) -> usize {
    let headers: usize = message.headers.iter().map(|(name, value)| name.len() + value.as_ref().map_or(0, Vec::len) + 64).sum();
    message.key.as_ref().map_or(0, Vec::len) + message.payload.as_ref().map_or(0, Vec::len) + headers
}
