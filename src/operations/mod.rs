//! Operations of operators, shared by the command line and the API. Each file is one subject, with its request and its answer as plain
//! data.
//!
//! An operation that changes something names its [`Actor`]. Its act is recorded in the audit trail in the same transaction as the change.
//! Operations do not print, parse arguments or handle HTTP.

mod acts;
mod audit;
mod desk;
mod effect;
mod error;
mod identity;
mod instant;
mod pauses;
mod plan_hash;
mod prove;
mod ranges;
mod rebuild;
pub mod recover;
mod rejects;
mod replay;
mod series;
mod sources;

pub use acts::Acts;
pub use audit::{AuditFindings, RunAudit};
pub use desk::{Actor, Desk, reason};
pub use effect::{Effect, FamilyEffect, Queued, WindowEffect};
pub use error::OperationError;
pub use identity::AcceptedIdentity;
pub use instant::{CANNOT_BE, can_be, instant, iso_duration};
pub use pauses::{CoderdCutOff, PauseRequest, Pauses, refuse_paused};
pub use prove::{
    AcceptedProof, BatchProof, EventId, Label, LicenseWindow, LogProof, LogState, NoSeries, Proof, ProveRequest, SeriesProof, SourceProof,
    SourceState,
};
pub use ranges::{Chosen, Edge, LogRange, MovedEnd, chosen};
pub use rebuild::{
    Granted, LicenseToken, RebuildExecution, RebuildPlan, RebuildRequest, RebuildStage, Rebuilt, Rehearsal, RehearsedDeployment,
    RehearsedWindow, SeriesValue, StateDifference,
};
pub use rejects::{
    Admitted, Bytes, CountRejects, DiscardRejects, DiscardedRejects, Foreseen, Header, ListRejects, Place, Reject, RejectCounts,
    RejectPage, Resubmit, Resubmitted, ResubmittedRecord, ShownReject, WhichRejects, edited,
};
pub use replay::{PlannedPartition, RECORDS_PER_SECOND, ReplayExecution, ReplayPlan, Replayed, Step};
pub use sources::{OneSource, RegisteredSource, Sources};
