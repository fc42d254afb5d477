//! Turns a record into the arrival that the ledger records.

use crate::event::{
    self, Event, KEPT_PAYLOAD_BYTES, Message, Oversized, ParseError, Signer, Topic,
};
use crate::ledger::{Arrival, Disposition, Refusal};
use crate::log::{Log, Record};

/// Parses a record from any topic. A record that is not a valid event becomes data too, so that it
/// stops nothing.
#[must_use]
pub fn read(record: Record) -> Arrival {
    let event = event::parse(&record.message);
    arrival(record, event)
}

/// Parses a record of that topic. An event of another topic is refused.
#[must_use]
pub fn read_from(topic: Topic, record: Record) -> Arrival {
    let event = event::parse_in(topic, &record.message);
    arrival(record, event)
}

/// Parses a record as [`read_from`] does and verifies its signature. From offset `signed_from` on,
/// a record without a valid signature is rejected, even if its event is valid. A placeholder for an
/// unreadable batch is rejected as unreadable.
pub(super) fn verified(
    log: &Log,
    signed_from: Option<i64>,
    topic: Topic,
    record: Record,
) -> Arrival {
    let signer = log.signer(topic, &record.message);
    let arrival = read_from(topic, record);
    match signer {
        Ok(signer) => Arrival { confirmed: signer == Signer::Collector, ..arrival },
        Err(error)
            if signed_from.is_some_and(|from| arrival.offset >= from)
                && arrival.message.unreadable_batch().is_none() =>
        {
            let refusal = Refusal {
                disposition: Disposition::Rejected,
                cause: error.cause(),
                detail: error.to_string(),
            };
            Arrival { event: Err(refusal), ..arrival }
        }
        Err(_) => arrival,
    }
}

fn arrival(record: Record, event: Result<Event, ParseError>) -> Arrival {
    let event = event.map_err(|error| refusal(&error, &record.message));
    Arrival {
        offset: record.offset,
        timestamp: record.timestamp,
        message: record.message,
        event,
        confirmed: false,
    }
}

fn refusal(error: &ParseError, message: &Message) -> Refusal {
    let cause = error.cause();
    let detail = match message.oversized {
        Some(Oversized { sha256, .. }) => {
            format!(
                "{error}; only its first {KEPT_PAYLOAD_BYTES} bytes and its SHA-256 are kept, {}",
                hex::encode(sha256)
            )
        }
        None => error.to_string(),
    };
    Refusal { disposition: Disposition::of(cause), cause, detail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::event::RejectCause;
    use crate::ledger::{Ledger, LedgerSettings};
    use crate::log::PostgresLogSettings;

    /// An unreadable batch has no signature either.
    #[tokio::test]
    async fn an_unreadable_batch_after_the_cutover_is_rejected_as_unreadable() {
        let signatures =
            event::Signatures::new([("a".to_owned(), vec![7; 32])].into(), None).unwrap();
        let url = "postgres://user@127.0.0.1:1/absent".to_owned();
        let ledger =
            Ledger::open(&LedgerSettings { url, connections: 1 }, Clock::system()).unwrap();
        let log = Log::postgres(
            ledger.pool,
            PostgresLogSettings { signatures, ..PostgresLogSettings::default() },
        );
        let cause = |message: Message| {
            let record = Record { offset: 9, timestamp: chrono::DateTime::UNIX_EPOCH, message };
            verified(&log, Some(0), Topic::AgentUsage, record).event.unwrap_err().cause
        };
        assert_eq!(cause(Message::of_unreadable_batch(5, 9)), RejectCause::Oversized);
        assert_eq!(cause(Message::default()), RejectCause::Unsigned);
    }
}
