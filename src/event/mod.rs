//! The one event type that crosses the log, its wire form and its digest.
//!
//! Events are CloudEvents 1.0. `source` is `/coder/<deployment id>`; source and id identify an
//! event. An event type never changes: a change adds a type with a new suffix, and old versions
//! remain readable.

mod build;
mod cause;
mod envelope;
mod fact;
mod fields;
mod message;
mod signature;
#[cfg(test)]
mod tests;
mod topic;
mod traces;
mod usage;

pub use build::{
    BuildKind, BuildStatus, InputStage, PREBUILDS_USER, PrebuildClaimed, Transition,
    WorkspaceBuildCompleted, build_of, ids_of_build, is_build_type, kind,
};
pub use cause::{ParseError, RejectCause};
pub(crate) use envelope::Form;
pub use envelope::{Digest, Event, Payload};
pub use fact::Fact;
pub use fields::{MAX_ID_BYTES, MAX_TEXT_BYTES, YEARS};
pub use message::{
    KEPT_PAYLOAD_BYTES, Message, Oversized, STRUCTURED, UNREADABLE, parse, parse_in,
};
pub use signature::{
    MIN_KEY_BYTES, SIGNATURE, SignatureError, Signatures, Signer, unsigned_headers,
};
pub use topic::{Topic, TopicPartition};
pub use traces::Traces;
pub use usage::{PublishMarks, Usage, UsageQuantity, UsageType};

/// Larger payloads are refused. Tallyline's are normally under 2 KiB; Kafka's own limit for a
/// record is 1 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 256 * 1024;
