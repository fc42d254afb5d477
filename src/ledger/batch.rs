//! A batch's records, their dispositions, and the reasons why it is not recorded.

use chrono::{DateTime, Utc};

use crate::cause::Remedy;
use crate::event::{Event, Message, RejectCause, TopicPartition};
use crate::words::words;

/// A record from the log, parsed or refused.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub offset: i64,
    /// The timestamp that the log gave it.
    pub timestamp: DateTime<Utc>,
    /// The raw record, which is kept if it is not accepted.
    pub message: Message,
    /// The event, or the reason why the record has none.
    pub event: Result<Event, Refusal>,
    /// Whether the record has a collector's valid signature.
    pub confirmed: bool,
}

/// The reason why a record is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub disposition: Disposition,
    /// The cause, in one word, for counts.
    pub cause: RejectCause,
    /// The fault, with the name of the field.
    pub detail: String,
}

words! {
    /// The disposition of a record that is not accepted. Its raw record is kept.
    Disposition {
        /// The record is not a valid event.
        Rejected = "rejected",
        /// An accepted event has the same id and another digest. It is not changed.
        Conflict = "conflict",
        /// This version does not know the usage type, or the deployment is not registered. The
        /// record is kept until that changes.
        Held = "held",
    }
}

impl Disposition {
    /// The disposition of a record that is not accepted for this cause.
    #[must_use]
    pub fn of(cause: RejectCause) -> Self {
        match cause {
            RejectCause::Conflict => Disposition::Conflict,
            RejectCause::UnknownEventType | RejectCause::UnregisteredSource => Disposition::Held,
            RejectCause::Tombstone
            | RejectCause::Oversized
            | RejectCause::Json
            | RejectCause::Attribute
            | RejectCause::ForeignEventType
            | RejectCause::ForeignTopic
            | RejectCause::Field
            | RejectCause::UnknownField
            | RejectCause::Unsigned
            | RejectCause::BadSignature
            | RejectCause::Ledger => Disposition::Rejected,
        }
    }
}

words! {
    /// The kind of a batch, by its writer.
    BatchKind {
        /// The consumer, from the log.
        Log = "log",
        Replay = "replay",
        /// The registration of a source.
        Source = "source",
        /// A collector, for licenses that appeared or disappeared.
        Licenses = "licenses",
        /// The publisher, for verdicts and settled publications.
        Verdicts = "verdicts",
        Operator = "operator",
    }
}

/// The dispositions of a batch's records. The other counts add up to `records`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub records: i32,
    /// New events.
    pub accepted: i32,
    /// Accepted ids with the same digest.
    pub duplicates: i32,
    /// Accepted ids with another digest.
    pub conflicts: i32,
    /// Records that are not valid events.
    pub rejects: i32,
    /// Records of an unknown usage type or an unregistered deployment.
    pub held: i32,
}

impl std::ops::Add for Counts {
    type Output = Counts;

    fn add(self, other: Counts) -> Counts {
        Counts {
            records: self.records + other.records,
            accepted: self.accepted + other.accepted,
            duplicates: self.duplicates + other.duplicates,
            conflicts: self.conflicts + other.conflicts,
            rejects: self.rejects + other.rejects,
            held: self.held + other.held,
        }
    }
}

/// Reasons why a batch was not recorded. A connection lost during the commit may have recorded it:
/// take the lease again and compare.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Another consumer has the partition lease, or the position is not the expected one.
    #[error("partition {0}: another consumer has taken its lease")]
    Fenced(TopicPartition),
    /// PostgreSQL refuses the data itself.
    #[error("the ledger refuses the data: {}", crate::cause::text(.0))]
    Refused(#[source] sqlx::Error),
    /// The ledger took too long; a smaller batch may succeed.
    #[error("the ledger did not record the batch in time: {}", crate::cause::text(.0))]
    Slow(#[source] sqlx::Error),
    /// A retry may succeed.
    #[error("the ledger is not writable: {}", crate::cause::text(.0))]
    Unavailable(#[source] sqlx::Error),
    /// A retry cannot succeed.
    #[error("the ledger does not match this version: {}", crate::cause::text(.0))]
    Unfit(#[source] sqlx::Error),
}

impl From<sqlx::Error> for RecordError {
    fn from(error: sqlx::Error) -> Self {
        match Remedy::of(&error) {
            Remedy::Retry => RecordError::Unavailable(error),
            Remedy::RetryWithLess => RecordError::Slow(error),
            Remedy::LeaveOut => RecordError::Refused(error),
            Remedy::None => RecordError::Unfit(error),
        }
    }
}
