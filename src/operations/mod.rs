//! Operations of operators, shared by the command line and the API. Each file is one subject, with
//! its requests and its answers as plain data. An [`Operation`] is a request with its place in the
//! API and its code.
//!
//! A change names its [`Actor`]. Its act is recorded in the audit log in the same transaction as
//! the change. Operations do not print.

mod audit;
mod audit_log;
mod corrections;
mod duration;
mod effect;
mod error;
mod explain;
mod given_file;
mod handles;
mod identity;
mod instant;
mod operation;
mod pauses;
mod plan_hash;
mod prune;
mod ranges;
mod rebuild;
pub mod recover;
mod rejects;
mod replay;
mod series;
mod sources;

pub use audit::{AuditFindings, RunAudit, ShowFindings};
pub use audit_log::{Acts, ListActs};
pub use corrections::{
    Corrected, CorrectionExecution, CorrectionPlan, CorrectionRequest, FamilyChange,
    PlannedCorrection, VendorNote,
};
pub use duration::{duration, duration_flag};
pub use effect::{Effect, FamilyEffect, Queued, WindowEffect};
pub use error::OperationError;
pub use explain::{
    EventId, ExplainRequest, ExplainedBatch, ExplainedEvent, ExplainedPlace, ExplainedSeries,
    ExplainedSource, Explanation, Label, LicenseWindow, LogState, NoSeries, SourceState,
};
pub use handles::{Actor, Operations, reason};
pub use identity::AcceptedIdentity;
pub use instant::{OUTSIDE_YEARS, exact_instant, instant, is_in_years, optional_instant};
pub use operation::{ApiRequest, Operation, Progress, Run, Step};
pub use pauses::{
    CoderdCutOff, ListPauses, OverriddenAudits, PauseRequest, Pauses, ResumeRequest,
    UnauditedPublishing, refuse_paused,
};
pub use prune::{
    PlannedPrune, PruneExecution, PrunePlan, PruneRequest, Pruned, PrunedKind, Pruner,
};
pub use ranges::{Chosen, Edge, LogRange, MovedEnd, chosen};
pub use rebuild::{
    Granted, LicenseToken, RebuildExecution, RebuildPlan, RebuildRequest, RebuildStage, Rebuilt,
    Rehearsal, RehearsedDeployment, RehearsedWindow, SeriesValue, StateDifference,
};
pub use rejects::{
    AdmitRejects, Admitted, Bytes, CountRejects, DiscardRejects, DiscardedRejects, Header,
    ListRejects, Place, PredictedDisposition, Reject, RejectCounts, RejectPage, RemovedPayload,
    Resubmit, Resubmitted, ResubmittedRecord, ShowReject, ShownReject, WhichRejects, edited,
};
pub use replay::{PlannedPartition, RECORDS_PER_SECOND, ReplayExecution, ReplayPlan, Replayed};
pub use sources::{ListSources, RegisteredSource, ReinstateSource, RetireSource, Sources};
