//! The wire form of an event: a record in the log. It is written from an event, and parsed into an
//! event or into the reason why it is not a valid one.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::MAX_PAYLOAD_BYTES;
use super::build::{self, WorkspaceBuildCompleted};
use super::cause::ParseError;
use super::envelope::{Event, Payload};
use super::fields::{Fields, checked_id, checked_text, parse_time, parse_uuid};
use super::topic::Topic;
use super::usage::{PublishMarks, Usage, UsageQuantity, UsageType};
use crate::words::UnknownWord;

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

/// The extension attribute of a build that contains the stage of its workspace's build 1.
const FIRST_BUILD_STAGE: &str = "firstbuildstage";

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

    /// Reads the output of [`Event::to_structured`], as strictly as a record.
    ///
    /// # Errors
    /// Those of [`parse`].
    pub fn from_structured(event: &Value) -> Result<Event, ParseError> {
        structured(event.to_string().as_bytes())
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

/// Parses one record in binary or structured content mode. It repairs nothing: a record that is not
/// exactly right becomes a reject.
///
/// # Errors
/// [`ParseError`]. A record with [`ParseError::UnknownEventType`] must be held; with any other
/// error it must be rejected.
pub fn parse(message: &Message) -> Result<Event, ParseError> {
    if let Some(offsets) = message.unreadable_batch() {
        return Err(ParseError::UnreadableBatch(offsets.to_owned()));
    }
    let body = message.payload.as_deref().ok_or(ParseError::Tombstone)?;
    let bytes = message.oversized.map_or(body.len(), |oversized| oversized.bytes);
    if bytes > MAX_PAYLOAD_BYTES {
        return Err(ParseError::Oversized(bytes));
    }
    let content_type = content_type(message)?.unwrap_or("application/json");
    match media_type(content_type).as_str() {
        STRUCTURED => structured(body),
        "application/json" => binary(message, body),
        _ => Err(ParseError::attribute(
            "datacontenttype",
            format!("{:?} is not JSON", clip(content_type)),
        )),
    }
}

/// Parses one record of that topic. An event of another topic is an error.
///
/// # Errors
/// Those of [`parse`], and [`ParseError::ForeignTopic`].
pub fn parse_in(topic: Topic, message: &Message) -> Result<Event, ParseError> {
    let event = parse(message)?;
    let own = event.topic();
    if own == topic {
        Ok(event)
    } else {
        Err(ParseError::ForeignTopic { event_type: event.event_type(), own, found: topic })
    }
}

impl Message {
    /// Whether the record's attributes are in its body, if its content type is readable.
    #[must_use]
    pub fn is_structured(&self) -> bool {
        content_type(self)
            .ok()
            .flatten()
            .is_some_and(|content_type| media_type(content_type) == STRUCTURED)
    }
}

/// The media type of a CloudEvent in structured content mode.
pub const STRUCTURED: &str = "application/cloudevents+json";

fn media_type(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// The CloudEvents attributes that Tallyline reads. It ignores other extensions, as CloudEvents
/// requires.
struct Attributes {
    specversion: Option<String>,
    id: Option<String>,
    source: Option<String>,
    event_type: Option<String>,
    time: Option<String>,
    publish_started_at: Option<String>,
    published_at: Option<String>,
    failure_message: Option<String>,
    first_build_stage: Option<String>,
}

impl Attributes {
    fn read(
        mut text: impl FnMut(&'static str) -> Result<Option<String>, ParseError>,
    ) -> Result<Self, ParseError> {
        Ok(Attributes {
            specversion: text("specversion")?,
            id: text("id")?,
            source: text("source")?,
            event_type: text("type")?,
            time: text("time")?,
            publish_started_at: text("publishstartedat")?,
            published_at: text("publishedat")?,
            failure_message: text("failuremessage")?,
            first_build_stage: text(FIRST_BUILD_STAGE)?,
        })
    }
}

fn binary(message: &Message, body: &[u8]) -> Result<Event, ParseError> {
    let attributes = Attributes::read(|name| Ok(attribute(message, name)?.map(str::to_owned)))?;
    event(attributes, || Fields::of(body))
}

fn structured(body: &[u8]) -> Result<Event, ParseError> {
    let mut outer = Fields::of(body)?;
    let attributes = Attributes::read(|name| outer.optional_text(name))?;
    let data = outer.take("data").ok_or_else(|| ParseError::field("data", "is missing"));
    event(attributes, || Fields::from_value(data?, "data"))
}

fn event<'a>(
    attributes: Attributes,
    data: impl FnOnce() -> Result<Fields<'a>, ParseError>,
) -> Result<Event, ParseError> {
    if required("specversion", attributes.specversion)? != "1.0" {
        return Err(ParseError::attribute("specversion", "must be 1.0"));
    }
    let id = checked_id("id", required("id", attributes.id)?)?;
    let deployment = deployment(&required("source", attributes.source)?)?;
    let event_type = required("type", attributes.event_type)?;
    let at = time("time", attributes.time)?;
    let payload = match event_type.as_str() {
        build::TYPE => {
            let first_stage = attributes.first_build_stage.map(|word| word.parse()).transpose();
            let first_stage = first_stage.map_err(|error: UnknownWord| {
                ParseError::field(FIRST_BUILD_STAGE, error.to_string())
            })?;
            Payload::Build(Box::new(WorkspaceBuildCompleted::read(data()?, first_stage)?))
        }
        build::CLAIM_TYPE => Payload::Claim(Box::new(data()?.read()?)),
        _ => match event_type.parse() {
            Ok(usage_type) => Payload::Usage(Usage {
                id: usage_id(id.clone())?,
                quantity: UsageQuantity::read(usage_type, data()?)?,
                created_at: at.ok_or_else(|| ParseError::attribute("time", "is missing"))?,
                marks: PublishMarks {
                    publish_started_at: time("publishstartedat", attributes.publish_started_at)?,
                    published_at: time("publishedat", attributes.published_at)?,
                    failure_message: attributes
                        .failure_message
                        .map(|text| checked_text("failuremessage", text))
                        .transpose()?,
                },
            }),
            Err(_) if UsageType::has_usage_prefix(&event_type) => {
                return Err(ParseError::UnknownEventType(clip(&event_type)));
            }
            Err(_) => return Err(ParseError::ForeignEventType(clip(&event_type))),
        },
    };
    agree(Event { deployment, payload }, &id, at)
}

/// Checks that values in both the attributes and the data are equal.
fn agree(event: Event, id: &str, at: Option<DateTime<Utc>>) -> Result<Event, ParseError> {
    if event.id() != id {
        return Err(ParseError::attribute("id", format!("must be {} for this data", event.id())));
    }
    if at.is_some_and(|at| at != event.time()) {
        return Err(ParseError::attribute("time", "differs from the data's completed_at"));
    }
    Ok(event)
}

/// Checks a usage id: any text of coderd's, except the id of a build event.
fn usage_id(id: String) -> Result<String, ParseError> {
    if id.is_empty() || id.starts_with(build::ID_PREFIX) || id.starts_with(build::CLAIM_ID_PREFIX) {
        return Err(ParseError::attribute("id", "is not a usage id"));
    }
    Ok(id)
}

pub(super) fn deployment(source: &str) -> Result<Uuid, ParseError> {
    let id = source
        .strip_prefix("/coder/")
        .ok_or_else(|| ParseError::attribute("source", "must be /coder/<deployment id>"))?;
    parse_uuid(id).map_err(|problem| ParseError::field("source", problem))
}

fn required(name: &'static str, value: Option<String>) -> Result<String, ParseError> {
    value.ok_or_else(|| ParseError::attribute(name, "is missing"))
}

fn time(name: &'static str, text: Option<String>) -> Result<Option<DateTime<Utc>>, ParseError> {
    let at = text.map(|text| parse_time(&text)).transpose();
    at.map_err(|problem| ParseError::field(name, problem))
}

/// The text of an attribute of a record in binary mode.
pub(super) fn attribute<'a>(
    message: &'a Message,
    name: &str,
) -> Result<Option<&'a str>, ParseError> {
    let is_named = |header: &str| {
        let prefixed = header.split_at_checked(3);
        prefixed.is_some_and(|(prefix, rest)| {
            prefix.eq_ignore_ascii_case("ce_") && rest.eq_ignore_ascii_case(name)
        })
    };
    header_text(message, name, is_named)
}

fn content_type(message: &Message) -> Result<Option<&str>, ParseError> {
    header_text(message, "datacontenttype", |header| header.eq_ignore_ascii_case("content-type"))
}

/// The text of the only header that `is_named` accepts.
fn header_text<'a>(
    message: &'a Message,
    attribute: &str,
    is_named: impl Fn(&str) -> bool,
) -> Result<Option<&'a str>, ParseError> {
    let mut values = message.headers.iter().filter(|(header, _)| is_named(header));
    let Some((_, value)) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(ParseError::attribute(attribute, "occurs twice"));
    }
    let Some(value) = value else { return Ok(None) };
    std::str::from_utf8(value)
        .map(Some)
        .map_err(|_| ParseError::attribute(attribute, "is not UTF-8"))
}

/// Shortens external text for a message.
fn clip(text: &str) -> String {
    text.chars().take(100).collect()
}
