//! A record's content as the log carries it, and how an event is written into it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{Event, Payload};

/// Payloads above this are refused. Ours are under 2 KiB; Kafka's own limit for a record is 1 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 256 * 1024;

/// The extension attribute of a build with the stage of its workspace's build 1.
pub(super) const FIRST_BUILD_STAGE: &str = "firstbuildstage";

/// The first bytes of a larger payload that are kept.
pub const KEPT_PAYLOAD_BYTES: usize = 64 * 1024;

/// The name of the only header of a record whose headers cannot be read, and of the placeholder of a batch that cannot be read.
pub const UNREADABLE: &str = "\u{fffd}";

/// Identifies a payload above [`MAX_PAYLOAD_BYTES`], of which only the beginning is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oversized {
    /// The length of the whole payload.
    pub bytes: usize,
    /// SHA-256 of the whole payload.
    pub sha256: [u8; 32],
}

/// The name and value of a record's header.
type Header = (String, Option<Vec<u8>>);

/// Key, headers and body of a record: any bytes, as found. Shape: CloudEvents over Kafka, binary mode (structured mode is understood too).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The record key.
    pub key: Option<Vec<u8>>,
    /// Headers in order; a name may repeat.
    pub headers: Vec<Header>,
    /// The body; absent in a tombstone.
    pub payload: Option<Vec<u8>>,
    /// Where the body was oversized: `payload` is only its beginning.
    pub oversized: Option<Oversized>,
}

impl Message {
    /// A record as a log holds it. However large its body is, this takes up little memory.
    #[must_use]
    pub fn found(key: Option<Vec<u8>>, headers: Vec<Header>, payload: Option<&[u8]>) -> Self {
        let large = payload.filter(|payload| payload.len() > MAX_PAYLOAD_BYTES);
        let oversized = large.map(|payload| Oversized { bytes: payload.len(), sha256: Sha256::digest(payload).into() });
        let kept = if oversized.is_some() { KEPT_PAYLOAD_BYTES } else { MAX_PAYLOAD_BYTES };
        Message { key, headers, payload: payload.map(|payload| payload[..payload.len().min(kept)].to_vec()), oversized }
    }

    /// The placeholder of a batch that cannot be unpacked, from its first offset to its last. Each read gives the same one.
    #[must_use]
    pub fn of_unreadable_batch(first: i64, last: i64) -> Self {
        let offsets = format!("offsets {first} to {last}").into_bytes();
        Message { headers: vec![(UNREADABLE.to_owned(), Some(offsets))], ..Message::default() }
    }

    /// The offsets of the batch whose placeholder the message is; none: it is a record.
    #[must_use]
    pub fn unreadable_batch(&self) -> Option<&str> {
        match (&self.key, self.headers.as_slice(), &self.payload) {
            (None, [(name, Some(offsets))], None) if name == UNREADABLE && offsets.len() <= 64 => std::str::from_utf8(offsets).ok(),
            _ => None,
        }
    }

    /// The headers as tables keep them: JSON, `[[name, value in base64 or null], …]`.
    #[must_use]
    pub fn headers_json(&self) -> Vec<u8> {
        let headers: Vec<(&str, Option<String>)> =
            self.headers.iter().map(|(name, value)| (name.as_str(), value.as_ref().map(|value| BASE64.encode(value)))).collect();
        serde_json::to_vec(&headers).unwrap_or_default()
    }

    /// The headers that [`Message::headers_json`] wrote.
    pub fn headers_from_json(json: &[u8]) -> Result<Vec<Header>, String> {
        let headers: Vec<(String, Option<String>)> = serde_json::from_slice(json).map_err(|error| format!("headers: {error}"))?;
        let value = |text: Option<String>| text.map(|text| BASE64.decode(text).map_err(|error| format!("headers: {error}"))).transpose();
        headers.into_iter().map(|(name, text)| Ok((name, value(text)?))).collect()
    }
}

impl Event {
    /// The event in binary content mode: attributes as `ce_` headers, the payload as JSON. Pinned by tests: it never changes for a type.
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

    /// The event in structured form, one JSON object: the form of NDJSON files and of HTTP.
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

    /// Extension attributes. coderd's publish marks are among them, so that the data stays exactly Tallyman's own.
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

/// UTC with the fewest fractional digits of 0, 3 or 6 that keep the instant.
pub(super) fn rfc3339(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}
