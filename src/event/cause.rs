//! The cause of a reject, in one word.

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
