//! Why a record is not accepted as an event, in one word.

use crate::words::words;

words! {
    /// Why a record is not accepted as an event: to count and to filter by.
    RejectCause {
        /// It has no body.
        Tombstone = "tombstone",
        /// Its body, or the batch that it came in, is too large to be read.
        Oversized = "oversized",
        /// Its body is not JSON, or has a key twice.
        Json = "json",
        /// An attribute is missing or wrong.
        Attribute = "attribute",
        /// Usage of a type that this version does not know.
        UnknownEventType = "unknown_event_type",
        /// A type that is none of Tallyline's.
        ForeignEventType = "foreign_event_type",
        /// An event whose topic is another.
        ForeignTopic = "foreign_topic",
        /// A field of the data is missing or wrong.
        Field = "field",
        /// A field that the type does not have.
        UnknownField = "unknown_field",
        /// It must be signed, and is not.
        Unsigned = "unsigned",
        /// Its signature is not valid.
        BadSignature = "bad_signature",
        /// Its id is accepted with another content.
        Conflict = "conflict",
        /// No collector has registered its deployment.
        UnregisteredSource = "unregistered_source",
        /// The ledger's database refuses its data.
        Ledger = "ledger",
    }
}

impl RejectCause {
    /// Whether the record's signature is not valid: then anyone may have written the record.
    #[must_use]
    pub fn may_be_forged(self) -> bool {
        matches!(self, RejectCause::Unsigned | RejectCause::BadSignature)
    }
}
