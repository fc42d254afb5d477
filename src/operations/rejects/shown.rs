//! Rejects as they are shown.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::as_found;
use super::prediction::PredictedDisposition;
use crate::event::{RejectCause, UsageType};
use crate::ledger::{Disposition, RejectAct, RejectRow, RejectState, SameEvent, Sequence, rejects};
use crate::operations::{OperationError, Operations};

/// A record that is not an accepted event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Reject {
    /// Number of the reject.
    pub id: i64,
    /// State of the reject.
    pub state: RejectState,
    /// Disposition of the record.
    pub disposition: Disposition,
    /// Cause in one word.
    pub cause: RejectCause,
    /// Explanation of the cause.
    pub detail: String,
    /// Name of the topic.
    pub topic: String,
    /// Number of the partition.
    pub partition: i32,
    /// Generation of the partition, from 1.
    pub generation: i32,
    /// Offset in the partition.
    pub offset: i64,
    /// Timestamp of the record in the log.
    pub record_time: Option<DateTime<Utc>>,
    /// When the ledger first recorded it.
    pub first_seen: DateTime<Utc>,
    /// Deployment in the record, if readable.
    pub deployment_id: Option<Uuid>,
    /// Event id in the record, if readable.
    pub event_id: Option<String>,
    /// Event type in the record, if readable.
    pub event_type: Option<String>,
    /// Unbilled quantity, if the record is usage with a readable quantity.
    pub units: Option<u64>,
    /// `agents`, `seats` or `ms`; `unknown` for an unknown type; absent without units.
    pub unit: Option<String>,
    /// Key of the record.
    pub key: Option<Bytes>,
    /// Headers of the record, in order. A list omits all of them if they need more than 16 KiB.
    pub headers: Vec<Header>,
    /// Body of the record; absent for a tombstone, and after its removal.
    pub payload: Option<Bytes>,
    /// When retention removed headers and body, and why; absent: they are kept.
    #[serde(default)]
    pub removed: Option<RemovedPayload>,
    /// Acts and attempted acts on the reject, in order.
    pub acts: Vec<RejectAct>,
}

/// Headers and body that retention has removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedPayload {
    /// When they were removed.
    pub at: DateTime<Utc>,
    /// Whole days from the end of the reject until then; absent: the act that ended it is unknown.
    pub after_days: Option<i64>,
}

impl std::fmt::Display for RemovedPayload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "headers and body were removed on {}", self.at.date_naive())?;
        match self.after_days {
            Some(days) => write!(f, " after {days} days"),
            None => Ok(()),
        }
    }
}

/// A header of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Header {
    /// Name of the header.
    pub name: String,
    /// Value of the header.
    pub value: Option<Bytes>,
}

/// Bytes of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bytes {
    /// Number of bytes.
    pub length: usize,
    /// The bytes, or the first of them, in base64.
    pub base64: String,
    /// The same bytes as text, if they are UTF-8 without control characters other than line feeds
    /// and tabs.
    pub text: Option<String>,
    /// Whether there are more bytes than shown here.
    pub cut: bool,
}

/// One reject with its whole body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ShownReject {
    #[serde(flatten)]
    pub reject: Reject,
    /// Ledger sequence at which an event with its id was accepted, earlier or later; absent if none
    /// was accepted.
    pub accepted_sequence: Option<Sequence>,
    /// Predicted outcome of a resubmission without changes.
    pub if_resubmitted: PredictedDisposition,
    /// Reason, if that is not `accepted`. For a record without a valid signature, what to check
    /// first.
    pub if_resubmitted_reason: Option<String>,
    /// Other rejects with the same event id, including those of refused resubmissions.
    pub same_event: Vec<SameEvent>,
}

const MAY_BE_FORGED: &str =
    "it may be forged, and a resubmission signs it: check first that coderd has this event";

impl Operations {
    pub(super) async fn shown(&self, row: RejectRow) -> Result<ShownReject, OperationError> {
        let (mut accepted_sequence, mut same_event) = (None, Vec::new());
        if let (Some(deployment), Some(event_id)) = (row.deployment_id, &row.event_id) {
            let accepted = self
                .ledger
                .run(async |conn| rejects::accepted(conn, deployment, event_id).await)
                .await?;
            accepted_sequence = accepted.map(|(sequence, _)| sequence);
            same_event = self
                .ledger
                .run(async |conn| rejects::of_event(conn, deployment, event_id, row.id).await)
                .await?;
        }
        let replay = row.payload_removed_at.map(|_| super::replay_instead(&row));
        let mut prediction =
            self.predict_disposition(&as_found(&row), &mut Default::default()).await?;
        if replay.is_some() {
            (prediction.disposition, prediction.reason) = (PredictedDisposition::Rejected, replay);
        }
        let may_be_forged = row.cause.may_be_forged().then(|| MAY_BE_FORGED.to_owned());
        let reject = self.with_acts(vec![row]).await?.remove(0);
        Ok(ShownReject {
            reject,
            accepted_sequence,
            if_resubmitted: prediction.disposition,
            if_resubmitted_reason: prediction.reason.or(may_be_forged),
            same_event,
        })
    }

    pub(super) async fn with_acts(
        &self,
        rows: Vec<RejectRow>,
    ) -> Result<Vec<Reject>, OperationError> {
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let acts = self.ledger.run(async |conn| rejects::acts(conn, &ids).await).await?;
        Ok(rows.into_iter().map(|row| reject(row, &acts)).collect())
    }
}

fn reject(row: RejectRow, acts: &[RejectAct]) -> Reject {
    let acts: Vec<RejectAct> = acts.iter().filter(|act| act.reject_id == row.id).cloned().collect();
    let ended_at = acts.iter().find(|act| act.ended_it).map(|act| act.acted_at);
    let removed = row.payload_removed_at.map(|at| RemovedPayload {
        at,
        after_days: ended_at.map(|ended_at| (at - ended_at).num_days()),
    });
    let unit = row.event_type.as_deref().and_then(UsageType::unit_of).unwrap_or("unknown");
    let whole = |bytes: Vec<u8>| Bytes::of(&bytes, bytes.len());
    Reject {
        id: row.id,
        acts,
        removed,
        state: row.state,
        disposition: row.disposition,
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
        headers: row
            .headers
            .into_iter()
            .map(|(name, value)| Header { name, value: value.map(whole) })
            .collect(),
        payload: row.payload.map(|payload| {
            let length = row.payload_bytes.and_then(|length| usize::try_from(length).ok());
            Bytes::of(&payload, length.unwrap_or(payload.len()))
        }),
    }
}

impl Bytes {
    /// The first bytes of a value with this total length.
    fn of(first: &[u8], length: usize) -> Self {
        let cut = first.len() < length;
        let text = match std::str::from_utf8(first) {
            Ok(text) => Some(text),
            // the cut can split only the last character
            Err(error) if cut && error.error_len().is_none() => {
                std::str::from_utf8(&first[..error.valid_up_to()]).ok()
            }
            Err(_) => None,
        };
        let plain = |text: &&str| {
            !text
                .chars()
                .any(|character| character.is_control() && !matches!(character, '\n' | '\t'))
        };
        Bytes {
            length,
            base64: BASE64.encode(first),
            text: text.filter(plain).map(str::to_owned),
            cut,
        }
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
        // cut in the middle of a character, or at the end of invalid bytes
        assert_eq!(text(&"aé".as_bytes()[..2], 3).as_deref(), Some("a"));
        assert_eq!(text(&"aé".as_bytes()[..2], 2), None);
        let cut = Bytes::of(b"ab", 5);
        assert_eq!((cut.length, cut.base64.as_str(), cut.cut), (5, "YWI=", true));
    }
}
