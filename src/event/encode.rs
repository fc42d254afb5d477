//! Writes an event as a record and as one JSON object.

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::Value;

use super::envelope::{Event, Payload};
use super::message::Message;

/// The extension attribute of a build that contains the stage of its workspace's build 1.
pub(super) const FIRST_BUILD_STAGE: &str = "firstbuildstage";

impl Event {
    /// The event in binary content mode: attributes as `ce_` headers, the payload as JSON. Tests
    /// pin it; a type's form never changes.
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
        headers.extend(
            self.extensions()
                .into_iter()
                .map(|(name, value)| header(&format!("ce_{name}"), &value)),
        );
        Message {
            key: Some(self.key().into_bytes()),
            headers,
            payload: Some(self.data().to_string().into_bytes()),
            oversized: None,
        }
    }

    /// The event in structured mode, one JSON object.
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

    /// Extension attributes. They include coderd's publish marks, so that the data equals
    /// Tallyman's.
    fn extensions(&self) -> Vec<(&'static str, String)> {
        let marks = match &self.payload {
            Payload::Build(build) => {
                return build
                    .first_build_stage
                    .map(|stage| (FIRST_BUILD_STAGE, stage.as_str().to_owned()))
                    .into_iter()
                    .collect();
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
fn rfc3339(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}
