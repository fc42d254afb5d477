//! From a record to what the ledger records of it.

use crate::event::{self, Event, KEPT_PAYLOAD_BYTES, Message, Oversized, ParseError, Topic};
use crate::ledger::{Arrival, Refusal, Verdict};
use crate::log::Record;

/// Parses a record, wherever it is from. One that is no event becomes data, too: nothing is dropped, nothing stops.
#[must_use]
pub fn read(record: Record) -> Arrival {
    let event = event::parse(&record.message);
    arrival(record, event)
}

/// Parses a record of that topic: an event whose topic is another is refused.
#[must_use]
pub fn read_from(topic: Topic, record: Record) -> Arrival {
    let event = event::parse_in(topic, &record.message);
    arrival(record, event)
}

fn arrival(record: Record, event: Result<Event, ParseError>) -> Arrival {
    let event = event.map_err(|error| refusal(&error, &record.message));
    Arrival { offset: record.offset, timestamp: record.timestamp, message: record.message, event }
}

fn refusal(error: &ParseError, message: &Message) -> Refusal {
    let verdict = match error {
        ParseError::UnknownEventType(_) => Verdict::Held,
        _ => Verdict::Rejected,
    };
    let detail = match message.oversized {
        Some(Oversized { sha256, .. }) => {
            format!("{error}; only its first {KEPT_PAYLOAD_BYTES} bytes and its SHA-256 are kept, {}", hex::encode(sha256))
        }
        None => error.to_string(),
    };
    Refusal { verdict, cause: error.cause().to_owned(), detail }
}
