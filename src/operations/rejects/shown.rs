//! A reject as it is shown.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::resubmit::{Foreseen, as_found};
use crate::event::{RejectCause, UsageType};
use crate::ledger::{RejectAct, RejectRow, RejectState, SameEvent, Sequence, Verdict};
use crate::operations::{Desk, OperationError};

/// A record that is no accepted event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Reject {
    /// Its number.
    pub id: i64,
    /// Its state.
    pub state: RejectState,
    /// What it is.
    pub verdict: Verdict,
    /// Why, in one word.
    pub cause: RejectCause,
    /// What is wrong.
    pub detail: String,
    /// The topic's name.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// Which life of the partition, from 1.
    pub generation: i32,
    /// Its offset there.
    pub offset: i64,
    /// The log's own time of the record.
    pub record_time: Option<DateTime<Utc>>,
    /// When the ledger saw it first.
    pub first_seen: DateTime<Utc>,
    /// The deployment that it names, where that could be read.
    pub deployment_id: Option<Uuid>,
    /// The event id that it names, where that could be read.
    pub event_id: Option<String>,
    /// The event type that it names, where that could be read.
    pub event_type: Option<String>,
    /// What is at stake, where it is usage whose number could be read.
    pub units: Option<u64>,
    /// agents, seats, ms, or unknown for a type that is not known; absent without units.
    pub unit: Option<String>,
    /// The record's key.
    pub key: Option<Bytes>,
    /// The record's headers, in order; none in a list where they take up more than 16 KiB.
    pub headers: Vec<Header>,
    /// The record's body; absent in a tombstone.
    pub payload: Option<Bytes>,
    /// What was done to it, or tried, in order.
    pub acts: Vec<RejectAct>,
}

/// A header of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Header {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: Option<Bytes>,
}

/// Bytes as found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bytes {
    /// How many there are.
    pub length: usize,
    /// They, or the first of them, in base64.
    pub base64: String,
    /// The same as text, where it is UTF-8 without control characters other than line feeds and tabs.
    pub text: Option<String>,
    /// Whether there are more than are told here.
    pub cut: bool,
}

/// One reject, whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ShownReject {
    /// The reject.
    #[serde(flatten)]
    pub reject: Reject,
    /// The ledger sequence at which an event of its id was accepted, before it or after; absent: none is.
    pub accepted_sequence: Option<Sequence>,
    /// What would become of it, as it is, if it were resubmitted now.
    pub if_resubmitted: Foreseen,
    /// Why, where that is not accepted; of a record without a valid signature, what to check first.
    pub if_resubmitted_reason: Option<String>,
    /// Other rejects under the same event id: what was resubmitted and refused again is among them.
    pub same_event: Vec<SameEvent>,
}

const MAY_BE_FORGED: &str = "it may be forged, and a resubmission signs it: check first that coderd has this event";

impl Desk {
    pub(super) async fn shown(&self, row: RejectRow) -> Result<ShownReject, OperationError> {
        let (mut accepted_sequence, mut same_event) = (None, Vec::new());
        if let (Some(deployment), Some(event_id)) = (row.deployment_id, &row.event_id) {
            let accepted = self.ledger.in_time(self.ledger.accepted(deployment, event_id)).await?;
            accepted_sequence = accepted.map(|(sequence, _)| sequence);
            same_event = self.ledger.in_time(self.ledger.rejects_of_event(deployment, event_id, row.id)).await?;
        }
        let foreseen = self.foreseen(&as_found(&row), &mut Default::default()).await?;
        let may_be_forged = row.cause.may_be_forged().then(|| MAY_BE_FORGED.to_owned());
        let reject = self.with_acts(vec![row]).await?.remove(0);
        Ok(ShownReject {
            reject,
            accepted_sequence,
            if_resubmitted: foreseen.what,
            if_resubmitted_reason: foreseen.reason.or(may_be_forged),
            same_event,
        })
    }

    pub(super) async fn with_acts(&self, rows: Vec<RejectRow>) -> Result<Vec<Reject>, OperationError> {
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let acts = self.ledger.in_time(self.ledger.reject_acts(&ids)).await?;
        Ok(rows.into_iter().map(|row| reject(row, &acts)).collect())
    }
}

fn reject(row: RejectRow, acts: &[RejectAct]) -> Reject {
    let acts = acts.iter().filter(|act| act.reject_id == row.id).cloned();
    let unit = row.event_type.as_deref().and_then(|text| text.parse().ok()).map_or("unknown", UsageType::unit);
    let whole = |bytes: Vec<u8>| Bytes::of(&bytes, bytes.len());
    Reject {
        id: row.id,
        acts: acts.collect(),
        state: row.state,
        verdict: row.verdict,
        cause: row.cause,
        detail: row.detail,
        topic: row.topic,
        partition: row.partition,
        generation: row.generation,
        offset: row.offset,
        record_time: row.record_timestamp,
        first_seen: row.recorded_at,
        deployment_id: row.deployment_id,
        event_id: row.event_id,
        event_type: row.event_type,
        units: row.units,
        unit: row.units.map(|_| unit.to_owned()),
        key: row.key.map(whole),
        headers: row.headers.into_iter().map(|(name, value)| Header { name, value: value.map(whole) }).collect(),
        payload: row.payload.map(|payload| {
            let length = row.payload_bytes.and_then(|length| usize::try_from(length).ok());
            Bytes::of(&payload, length.unwrap_or(payload.len()))
        }),
    }
}

impl Bytes {
    /// The first bytes of so many.
    fn of(first: &[u8], length: usize) -> Self {
        let cut = first.len() < length;
        let text = match std::str::from_utf8(first) {
            Ok(text) => Some(text),
            // a character that only the cut has halved
            Err(error) if cut && error.error_len().is_none() => std::str::from_utf8(&first[..error.valid_up_to()]).ok(),
            Err(_) => None,
        };
        let plain = |text: &&str| !text.chars().any(|character| character.is_control() && !matches!(character, '\n' | '\t'));
        Bytes { length, base64: BASE64.encode(first), text: text.filter(plain).map(str::to_owned), cut }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_text_only_where_a_terminal_may_show_them() {
        let text = |bytes: &[u8], length| Bytes::of(bytes, length).text;
        assert_eq!(text("{\"é\":\n\t1}".as_bytes(), 10).as_deref(), Some("{\"é\":\n\t1}"));
        assert_eq!(text(b"\x1b[2J", 4), None);
        assert_eq!(text(b"a\0", 2), None);
        assert_eq!(text(b"a\rb", 3), None);
        assert_eq!(text(b"\xff", 1), None);
        // cut in the middle of a character, or at the very end of broken bytes
        assert_eq!(text(&"aé".as_bytes()[..2], 3).as_deref(), Some("a"));
        assert_eq!(text(&"aé".as_bytes()[..2], 2), None);
        let cut = Bytes::of(b"ab", 5);
        assert_eq!((cut.length, cut.base64.as_str(), cut.cut), (5, "YWI=", true));
    }
}
