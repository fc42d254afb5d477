//! The content of a record in the log.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest as _, Sha256};

/// Larger payloads are refused. Tallyline's are normally under 2 KiB; Kafka's own limit for a
/// record is 1 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 256 * 1024;

/// Number of bytes kept of a larger payload.
pub const KEPT_PAYLOAD_BYTES: usize = 64 * 1024;

/// The name of the only header of a record with unreadable headers, and of the placeholder for an
/// unreadable batch.
pub const UNREADABLE: &str = "\u{fffd}";

/// Identifies a payload above [`MAX_PAYLOAD_BYTES`], of which only the first bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oversized {
    pub bytes: usize,
    pub sha256: [u8; 32],
}

/// The name and value of a record's header.
type Header = (String, Option<Vec<u8>>);

/// Key, headers and body of a record, unchanged bytes. Form: CloudEvents over Kafka in binary mode;
/// structured mode is accepted too.
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
    pub fn from_log(key: Option<Vec<u8>>, headers: Vec<Header>, payload: Option<&[u8]>) -> Self {
        let large = payload.filter(|payload| payload.len() > MAX_PAYLOAD_BYTES);
        let oversized = large.map(|payload| Oversized {
            bytes: payload.len(),
            sha256: Sha256::digest(payload).into(),
        });
        let kept = if oversized.is_some() { KEPT_PAYLOAD_BYTES } else { MAX_PAYLOAD_BYTES };
        Message {
            key,
            headers,
            payload: payload.map(|payload| payload[..payload.len().min(kept)].to_vec()),
            oversized,
        }
    }

    /// The placeholder for a batch that cannot be unpacked, with its first and last offset. Each
    /// read returns the same placeholder.
    #[must_use]
    pub fn of_unreadable_batch(first: i64, last: i64) -> Self {
        let offsets = format!("offsets {first} to {last}").into_bytes();
        Message { headers: vec![(UNREADABLE.to_owned(), Some(offsets))], ..Message::default() }
    }

    /// The offsets of the unreadable batch if the message is a placeholder; none for a record.
    #[must_use]
    pub fn unreadable_batch(&self) -> Option<&str> {
        match (&self.key, self.headers.as_slice(), &self.payload) {
            (None, [(name, Some(offsets))], None) if name == UNREADABLE && offsets.len() <= 64 => {
                std::str::from_utf8(offsets).ok()
            }
            _ => None,
        }
    }

    /// The headers in the form of the tables: JSON, `[[name, value in base64 or null], …]`.
    #[must_use]
    pub fn headers_json(&self) -> Vec<u8> {
        let headers: Vec<(&str, Option<String>)> = self
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_ref().map(|value| BASE64.encode(value))))
            .collect();
        serde_json::to_vec(&headers).unwrap_or_default()
    }

    /// Parses the output of [`Message::headers_json`].
    pub fn headers_from_json(json: &[u8]) -> Result<Vec<Header>, String> {
        let headers: Vec<(String, Option<String>)> =
            serde_json::from_slice(json).map_err(|error| format!("headers: {error}"))?;
        let value = |text: Option<String>| {
            text.map(|text| BASE64.decode(text).map_err(|error| format!("headers: {error}")))
                .transpose()
        };
        headers.into_iter().map(|(name, text)| Ok((name, value(text)?))).collect()
    }
}
