//! Parses a record into an event, or into the reason why it is not a valid one.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::build::{self, WorkspaceBuildCompleted};
use super::cause::ParseError;
use super::encode::FIRST_BUILD_STAGE;
use super::envelope::{Event, Payload};
use super::fields::{Fields, checked_id, checked_text, parse_time, parse_uuid};
use super::message::{MAX_PAYLOAD_BYTES, Message};
use super::topic::Topic;
use super::usage::{PublishMarks, Usage, UsageQuantity, UsageType};
use crate::words::UnknownWord;

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
