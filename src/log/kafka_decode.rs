//! Between Kafka's records and ours.

use std::panic::{AssertUnwindSafe, catch_unwind};

use chrono::DateTime;
use rdkafka::Message as _;
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, Headers as _, OwnedHeaders};

use super::Record;
use crate::event::Message;

/// Stands for headers that can't be read: a name that is not UTF-8. The record is then refused by its reader like any other without our
/// headers; key and payload are as found.
const UNREADABLE: &str = "\u{fffd}";

/// Our copy of a record.
pub(super) fn record(found: &BorrowedMessage<'_>) -> Record {
    Record {
        offset: found.offset(),
        timestamp: found.timestamp().to_millis().and_then(DateTime::from_timestamp_millis).unwrap_or_default(),
        message: Message {
            key: found.key().map(<[u8]>::to_vec),
            headers: found.headers().map(headers).unwrap_or_default(),
            payload: found.payload().map(<[u8]>::to_vec),
        },
    }
}

/// The client library panics on a header name that is not UTF-8, and anyone who may write to the topic can send one.
fn headers(found: &BorrowedHeaders) -> Vec<(String, Option<Vec<u8>>)> {
    let read = || found.iter().map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect();
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| vec![(UNREADABLE.to_owned(), None)])
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
    let message = &record.message;
    let headers: usize = message.headers.iter().map(|(name, value)| name.len() + value.as_ref().map_or(0, Vec::len) + 64).sum();
    message.key.as_ref().map_or(0, Vec::len) + message.payload.as_ref().map_or(0, Vec::len) + headers + 128
}
