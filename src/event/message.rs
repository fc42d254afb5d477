//! The content of a record in the log, and the encoding of an event.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{Event, Payload};

/// Larger payloads are refused. Tallyline's are under 2 KiB; Kafka's own limit for a record is 1 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 256 * 1024;

/// The extension attribute of a build that contains the stage of its workspace's build 1.
pub(super) const FIRST_BUILD_STAGE: &str = "firstbuildstage";

/// Number of bytes kept of a larger payload.
pub const KEPT_PAYLOAD_BYTES: usize = 64 * 1024;

/// The name of the only header of a record with unreadable headers, and of the placeholder for an unreadable batch.
pub const UNREADABLE: &str = "\u{fffd}";

/// Identifies a payload above [`MAX_PAYLOAD_BYTES`], of which only the first bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oversized {
    pub bytes: usize,
    pub sha256: [u8; 32],
}

/// The name and value of a record's header.
type Header = (String, Option<Vec<u8>>);

/// Key, headers and body of a record, unchanged bytes. Form: CloudEvents over Kafka in binary mode; structured mode is accepted too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub key: Option<Vec<u8>>,
    /// Headers in order. A name may repeat.
    pub headers: Vec<Header>,
    /// The body; absent in a tombstone.
    pub payload: Option<Vec<u8>>,
    /// Present for an oversized body, of which `payload` is only the beginning.
    pub oversized: Option<Oversized>,
}

impl Message {
    /// A record of a log. It takes little memory for a body of any size.
    #[must_use]
    pub fn found(key: Option<Vec<u8>>, headers: Vec<Header>, payload: Option<&[u8]>) -> Self {
        let large = payload.filter(|payload| payload.len() > MAX_PAYLOAD_BYTES);
        let oversized = large.map(|payload| Oversized { bytes: payload.len(), sha256: Sha256::digest(payload).into() });
        let kept = if oversized.is_some() { KEPT_PAYLOAD_BYTES } else { MAX_PAYLOAD_BYTES };
        Message { key, headers, payload: payload.map(|payload| payload[..payload.len().min(kept)].to_vec()), oversized }
    }

    /// The placeholder for a batch that cannot be unpacked, with its first and last offset. Each read returns the same placeholder.
    #[must_use]
    pub fn of_unreadable_batch(first: i64, last: i64) -> Self {
        let offsets = format!("offsets {first} to {last}").into_bytes();
        Message { headers: vec![(UNREADABLE.to_owned(), Some(offsets))], ..Message::default() }
    }

    /// The offsets of the unreadable batch if the message is a placeholder; none for a record.
    #[must_use]
    pub fn unreadable_batch(&self) -> Option<&str> {
        match (&self.key, self.headers.as_slice(), &self.payload) {
            (None, [(name, Some(offsets))], None) if name == UNREADABLE && offsets.len() <= 64 => std::str::from_utf8(offsets).ok(),
            _ => None,
        }
    }

    /// The headers in the form of the tables: JSON, `[[name, value in base64 or null], …]`.
    #[must_use]
    pub fn headers_json(&self) -> Vec<u8> {
        let headers: Vec<(&str, Option<String>)> =
            self.headers.iter().map(|(name, value)| (name.as_str(), value.as_ref().map(|value| BASE64.encode(value)))).collect();
        serde_json::to_vec(&headers).unwrap_or_default()
    }

    /// Parses the output of [`Message::headers_json`].
    pub fn headers_from_json(json: &[u8]) -> Result<Vec<Header>, String> {
        let headers: Vec<(String, Option<String>)> = serde_json::from_slice(json).map_err(|error| format!("headers: {error}"))?;
        let value = |text: Option<String>| text.map(|text| BASE64.decode(text).map_err(|error| format!("headers: {error}"))).transpose();
        headers.into_iter().map(|(name, text)| Ok((name, value(text)?))).collect()
    }
}

impl Event {
    /// The event in binary content mode: attributes as `ce_` headers, the payload as JSON. Tests pin it; a type's form never changes.
    #[must_use]
    pub fn to_message(&self) -> Message {
        let mut headers = vec![
            header("ce_specversion", "1.0"),
            header("ce_id", &self.id()),
            header("ce_source", &source(self)),
            header("ce_type", self.event_type()),
            header("ce_time", &rfc3339(self.time())),
            header("content-type", "application/json"),
        ];
        headers.extend(self.extensions().into_iter().map(|(name, value)| header(&format!("ce_{name}"), &value)));
        Message { key: Some(self.key().into_bytes()), headers, payload: Some(self.data().to_string().into_bytes()), oversized: None }
    }

    /// The event in structured mode, one JSON object, for NDJSON files and HTTP.
    #[must_use]
    pub fn to_structured(&self) -> Value {
        let mut event = serde_json::json!({
            "specversion": "1.0",
            "id": self.id(),
            "source": source(self),
            "type": self.event_type(),
            "time": rfc3339(self.time()),
            "datacontenttype": "application/json",
            "data": self.data(),
        });
        for (name, value) in self.extensions() {
            event[name] = Value::String(value);
        }
        event
    }

    fn data(&self) -> Value {
        match &self.payload {
            Payload::Build(build) => serde_json::json!(build),
            Payload::Claim(claim) => serde_json::json!(claim),
            Payload::Usage(usage) => usage.quantity.to_data(),
        }
    }

    /// Extension attributes. They include coderd's publish marks, so that the data equals Tallyman's.
    fn extensions(&self) -> Vec<(&'static str, String)> {
        let marks = match &self.payload {
            Payload::Build(build) => {
                return build.first_build_stage.map(|stage| (FIRST_BUILD_STAGE, stage.as_str().to_owned())).into_iter().collect();
            }
            Payload::Claim(_) => return Vec::new(),
            Payload::Usage(usage) => &usage.marks,
        };
        [
            marks.publish_started_at.map(|at| ("publishstartedat", rfc3339(at))),
            marks.published_at.map(|at| ("publishedat", rfc3339(at))),
            marks.failure_message.clone().map(|message| ("failuremessage", message)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

fn header(name: &str, value: &str) -> (String, Option<Vec<u8>>) {
    (name.to_owned(), Some(value.as_bytes().to_vec()))
}

fn source(event: &Event) -> String {
    format!("/coder/{}", event.deployment)
}

/// UTC with the fewest fractional digits of 0, 3 or 6 that preserve the instant.
pub(super) fn rfc3339(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}
