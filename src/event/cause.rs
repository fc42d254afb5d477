//! Why a record is not accepted: in one word, and in full.

use super::MAX_PAYLOAD_BYTES;
use super::topic::Topic;
use crate::words::words;

words! {
    /// The cause for which a record is not accepted, for counts and filters.
    RejectCause {
        /// The record has no body.
        Tombstone = "tombstone",
        /// The body, or the batch of the record, is too large to read.
        Oversized = "oversized",
        /// The body is not JSON, or a key appears twice.
        Json = "json",
        /// An attribute is missing or wrong.
        Attribute = "attribute",
        /// This version does not know the usage type.
        UnknownEventType = "unknown_event_type",
        /// The event type does not belong to Tallyline or Tallyman.
        ForeignEventType = "foreign_event_type",
        /// The event belongs in another topic.
        ForeignTopic = "foreign_topic",
        /// A field of the data is missing or wrong.
        Field = "field",
        /// The type does not have a field of the data.
        UnknownField = "unknown_field",
        /// The record must be signed and has no signature.
        Unsigned = "unsigned",
        /// The signature is not valid.
        BadSignature = "bad_signature",
        /// The id is accepted with other content.
        Conflict = "conflict",
        /// The deployment is not registered by a collector.
        UnregisteredSource = "unregistered_source",
        /// The ledger's database refuses the data.
        Ledger = "ledger",
    }
}

impl RejectCause {
    /// Whether the record has no valid signature, so that anyone may have written it.
    #[must_use]
    pub fn may_be_forged(self) -> bool {
        matches!(self, RejectCause::Unsigned | RejectCause::BadSignature)
    }
}

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
    #[error(
        "the batch of {0} unpacks to more than receive.message.max.bytes or not at all: none of its records can be read"
    )]
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
    #[error("event type {0:?} is not metered")]
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

    pub(super) fn attribute(name: &str, problem: impl Into<String>) -> Self {
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
