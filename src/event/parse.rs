//! Parses a record into an event, or into the reason why it is not a valid one.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::fields::{Fields, checked_id, checked_text, time, uuid, word};
use super::message::{FIRST_BUILD_STAGE, MAX_PAYLOAD_BYTES, Message};
use super::usage::{self, PublishMarks, Usage, UsageType};
use super::{Event, Payload, RejectCause, Topic, build, claim};

/// Reasons why a record is not a valid event. Each names the fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The record has no body.
    #[error("the record has no body (a tombstone)")]
    Tombstone,
    /// The body is larger than [`MAX_PAYLOAD_BYTES`].
    #[error("the body has {0} bytes, more than {MAX_PAYLOAD_BYTES}")]
    Oversized(usize),
    /// The batch of the record cannot be unpacked.
    #[error("the batch of {0} unpacks to more than receive.message.max.bytes or not at all: none of its records can be read")]
    UnreadableBatch(String),
    /// The body is not JSON, has trailing data, is too deep, or has a key twice.
    #[error("the body is not one JSON value: {0}")]
    Json(String),
    /// A CloudEvents attribute is missing, doubled or wrong.
    #[error("attribute {name} {problem}")]
    Attribute {
        /// The attribute's CloudEvents name.
        name: String,
        /// The fault.
        problem: String,
    },
    /// The type is a usage type that this version does not know. The record is held, not rejected.
    #[error("unknown event type {0:?}")]
    UnknownEventType(String),
    /// The type does not belong to Tallyline or Tallyman.
    #[error("event type {0:?} is none that is counted here")]
    ForeignEventType(String),
    /// The event is in a topic that is not its own.
    #[error("event type {event_type:?} belongs in {own}, not in {found}")]
    ForeignTopic {
        event_type: &'static str,
        /// The topic of the event type.
        own: Topic,
        /// The topic of the record.
        found: Topic,
    },
    /// A payload field is missing, of the wrong type or out of range.
    #[error("field {name} {problem}")]
    Field {
        /// The name of the field.
        name: &'static str,
        /// The fault.
        problem: String,
    },
    /// The type does not have a field of the payload.
    #[error("unknown field {0:?}")]
    UnknownField(String),
}

impl ParseError {
    pub(super) fn field(name: &'static str, problem: impl Into<String>) -> Self {
        ParseError::Field { name, problem: problem.into() }
    }

    fn attribute(name: &str, problem: impl Into<String>) -> Self {
        ParseError::Attribute { name: name.to_owned(), problem: problem.into() }
    }

    /// The cause in one word.
    #[must_use]
    pub fn cause(&self) -> RejectCause {
        match self {
            ParseError::Tombstone => RejectCause::Tombstone,
            ParseError::Oversized(_) | ParseError::UnreadableBatch(_) => RejectCause::Oversized,
            ParseError::Json(_) => RejectCause::Json,
            ParseError::Attribute { .. } => RejectCause::Attribute,
            ParseError::UnknownEventType(_) => RejectCause::UnknownEventType,
            ParseError::ForeignEventType(_) => RejectCause::ForeignEventType,
            ParseError::ForeignTopic { .. } => RejectCause::ForeignTopic,
            ParseError::Field { .. } => RejectCause::Field,
            ParseError::UnknownField(_) => RejectCause::UnknownField,
        }
    }
}

/// Parses one record in binary or structured content mode. It repairs nothing: a record that is not exactly right becomes a reject.
///
/// # Errors
/// [`ParseError`]. A record with [`ParseError::UnknownEventType`] must be held; with any other error it must be rejected.
pub fn parse(message: &Message) -> Result<Event, ParseError> {
    if let Some(offsets) = message.unreadable_batch() {
        return Err(ParseError::UnreadableBatch(offsets.to_owned()));
    }
    let body = message.payload.as_deref().ok_or(ParseError::Tombstone)?;
    let bytes = message.oversized.map_or(body.len(), |oversized| oversized.bytes);
    if bytes > MAX_PAYLOAD_BYTES {
        return Err(ParseError::Oversized(bytes));
    }
    let content_type = header_text(message, "content-type")?.unwrap_or("application/json");
    match media_type(content_type).as_str() {
        STRUCTURED => structured(body),
        "application/json" => binary(message, body),
        _ => Err(ParseError::attribute("datacontenttype", format!("{:?} is not JSON", clip(content_type)))),
    }
}

/// Parses one record of that topic. An event of another topic is an error.
///
/// # Errors
/// Those of [`parse`], and [`ParseError::ForeignTopic`].
pub fn parse_in(topic: Topic, message: &Message) -> Result<Event, ParseError> {
    let event = parse(message)?;
    let own = event.topic();
    if own == topic { Ok(event) } else { Err(ParseError::ForeignTopic { event_type: event.event_type(), own, found: topic }) }
}

impl Message {
    /// Whether the record's attributes are in its body, if its content type is readable.
    #[must_use]
    pub fn is_structured(&self) -> bool {
        header_text(self, "content-type").ok().flatten().is_some_and(|content_type| media_type(content_type) == STRUCTURED)
    }
}

/// The media type of a CloudEvent in structured content mode.
pub const STRUCTURED: &str = "application/cloudevents+json";

fn media_type(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// The CloudEvents attributes that Tallyline reads. It ignores other extensions, as CloudEvents requires.
#[derive(Default)]
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

fn binary(message: &Message, body: &[u8]) -> Result<Event, ParseError> {
    let attribute = |name: &str| Ok(header_text(message, name)?.map(str::to_owned));
    let attributes = Attributes {
        specversion: attribute("ce_specversion")?,
        id: attribute("ce_id")?,
        source: attribute("ce_source")?,
        event_type: attribute("ce_type")?,
        time: attribute("ce_time")?,
        publish_started_at: attribute("ce_publishstartedat")?,
        published_at: attribute("ce_publishedat")?,
        failure_message: attribute("ce_failuremessage")?,
        first_build_stage: attribute("ce_firstbuildstage")?,
    };
    event(attributes, || Fields::of(body))
}

fn structured(body: &[u8]) -> Result<Event, ParseError> {
    let mut outer = Fields::of(body)?;
    let data = outer.take("data");
    let attributes = Attributes {
        specversion: outer.optional_text("specversion")?,
        id: outer.optional_text("id")?,
        source: outer.optional_text("source")?,
        event_type: outer.optional_text("type")?,
        time: outer.optional_text("time")?,
        publish_started_at: outer.optional_text("publishstartedat")?,
        published_at: outer.optional_text("publishedat")?,
        failure_message: outer.optional_text("failuremessage")?,
        first_build_stage: outer.optional_text(FIRST_BUILD_STAGE)?,
    };
    event(attributes, || Fields::from_value(data.ok_or_else(|| ParseError::field("data", "is missing"))?, "data"))
}

fn event<'a>(attributes: Attributes, data: impl FnOnce() -> Result<Fields<'a>, ParseError>) -> Result<Event, ParseError> {
    if needed("specversion", attributes.specversion)? != "1.0" {
        return Err(ParseError::attribute("specversion", "must be 1.0"));
    }
    let id = checked_id("id", needed("id", attributes.id)?)?;
    let deployment = deployment(&needed("source", attributes.source)?)?;
    let event_type = needed("type", attributes.event_type)?;
    let at = attributes.time.as_deref().map(|text| time("time", text)).transpose()?;
    let payload = match event_type.as_str() {
        build::TYPE => {
            let first_stage = attributes.first_build_stage.as_deref().map(|text| word(FIRST_BUILD_STAGE, text)).transpose()?;
            Payload::Build(Box::new(build::from_data(data()?, first_stage)?))
        }
        claim::TYPE => Payload::Claim(Box::new(claim::from_data(data()?)?)),
        _ => match event_type.parse() {
            Ok(usage_type) => Payload::Usage(Usage {
                id: usage_id(id.clone())?,
                quantity: usage::from_data(usage_type, data()?)?,
                created_at: at.ok_or_else(|| ParseError::attribute("time", "is missing"))?,
                marks: PublishMarks {
                    publish_started_at: attributes.publish_started_at.as_deref().map(|text| time("publishstartedat", text)).transpose()?,
                    published_at: attributes.published_at.as_deref().map(|text| time("publishedat", text)).transpose()?,
                    failure_message: attributes.failure_message.map(|text| checked_text("failuremessage", text)).transpose()?,
                },
            }),
            Err(_) if UsageType::looks_like_usage(&event_type) => return Err(ParseError::UnknownEventType(clip(&event_type))),
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
    if id.is_empty() || id.starts_with(build::ID_PREFIX) || id.starts_with(claim::ID_PREFIX) {
        return Err(ParseError::attribute("id", "is no usage id"));
    }
    Ok(id)
}

pub(super) fn deployment(source: &str) -> Result<Uuid, ParseError> {
    let id = source.strip_prefix("/coder/").ok_or_else(|| ParseError::attribute("source", "must be /coder/<deployment id>"))?;
    uuid("source", id)
}

fn needed(name: &'static str, value: Option<String>) -> Result<String, ParseError> {
    value.ok_or_else(|| ParseError::attribute(name, "is missing"))
}

pub(super) fn header_text<'a>(message: &'a Message, name: &str) -> Result<Option<&'a str>, ParseError> {
    let mut values = message.headers.iter().filter(|(header, _)| header.eq_ignore_ascii_case(name));
    let Some((_, value)) = values.next() else { return Ok(None) };
    let attribute = name.strip_prefix("ce_").unwrap_or("datacontenttype");
    if values.next().is_some() {
        return Err(ParseError::attribute(attribute, "stands there twice"));
    }
    let Some(value) = value else { return Ok(None) };
    std::str::from_utf8(value).map(Some).map_err(|_| ParseError::attribute(attribute, "is not UTF-8"))
}

/// Shortens external text for a message.
fn clip(text: &str) -> String {
    text.chars().take(100).collect()
}
