//! From a record to what the ledger records of it.

use crate::event::{self, ParseError};
use crate::ledger::{Arrival, Refusal, Verdict};
use crate::log::Record;

/// Parses a record. One that is no event becomes data, too: nothing is dropped, nothing stops.
#[must_use]
pub fn read(record: Record) -> Arrival {
    let event = event::parse(&record.message).map_err(refusal);
    Arrival { offset: record.offset, timestamp: record.timestamp, message: record.message, event }
}

fn refusal(error: ParseError) -> Refusal {
    let verdict = match error {
        ParseError::UnknownEventType(_) => Verdict::Held,
        _ => Verdict::Rejected,
    };
    Refusal { verdict, cause: error.cause().to_owned(), detail: error.to_string() }
}
