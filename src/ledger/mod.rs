//! The PostgreSQL ledger: totally ordered batches of accepted events.
//!
//! Each file has one subject and its SQL. Each row that a fold or an export reads belongs
//! to a row of `batch`. The batch takes the next ledger sequence inside its transaction's commit.

pub mod acts;
pub mod audit_items;
mod batch;
pub mod books;
pub mod chain;
pub mod checks;
pub mod choices;
pub mod collector_requests;
pub mod confirmed;
mod connect;
pub mod contents;
pub mod corrected;
pub mod corrections;
pub mod cutover;
mod difference;
pub mod entries;
pub mod event_history;
pub mod exports;
pub mod findings;
pub mod first_starts;
pub mod generations;
pub mod head;
pub mod holds;
pub mod identity;
pub mod kept;
pub mod known;
pub mod landmarks;
pub mod late_audits;
pub mod leases;
pub mod licenses;
pub mod losses;
mod migrations;
mod new_pass;
mod open_requests;
pub mod parts;
pub mod passes;
pub mod pauses;
pub mod plans;
pub mod positions;
pub mod preview;
pub mod processes;
pub mod prune;
pub mod publication_requests;
pub mod publications;
pub mod publish_marks;
pub mod record;
pub mod recoveries;
mod refused;
pub mod reject_counts;
mod reject_state;
pub mod rejects;
pub mod replays;
pub mod restored;
pub mod retirements;
pub mod rights;
pub mod row_checks;
mod rows;
mod run;
mod sequence;
pub mod slices;
pub mod snapshots;
pub mod sources;
mod statement_error;

pub use acts::{Act, ActFilter, ActKind, NewAct, PROGRAM, Subject};
pub use audit_items::{AuditItem, AuditStep, AuditedJoint, LastStep};
pub use batch::{Arrival, BatchKind, Counts, Disposition, RecordError, Refusal};
pub use books::{LedgerBooks, PartitionBooks};
pub use chain::{BatchPlace, ChainedBatch, NamedRow, OutsideBatch};
pub use choices::LICENSE_RULES;
pub use collector_requests::SweepRequest;
pub use connect::{LedgerError, LedgerSettings};
pub use contents::{
    BatchCount, Contents, EventCount, LeaseRow, PositionRow, PublicationCount, Rates,
};
pub use corrected::CorrectionHistory;
pub use corrections::{Correction, NewCorrection, PublicationNow};
pub use cutover::{NO_SIGNING_KEY, SignatureResults};
pub use difference::Difference;
pub use entries::Entry;
pub use event_history::{
    ActOnRefusal, ExportHistory, NewExport, PublicationAttempt, PublicationHistory, RefusalHistory,
};
pub use exports::{LaterUsage, UsageCompleteness, UsageRange, UsageRow};
pub use findings::{Finding, OverdueTurn, TurnRows};
pub use first_starts::CorrectedEvent;
pub use generations::{NewGeneration, PartitionGenerations};
pub use head::{Head, InvalidHead};
pub use holds::{Hold, HoldScope, holds};
pub use identity::{IdentityRefusal, ReportedIdentity, SourceIdentity};
pub use kept::{KeptBatch, KeptEvent, KeptRange, KeptReject};
pub use known::RefusedState;
pub use landmarks::{Landmark, LedgerIdentity};
pub use late_audits::{AuditOverride, LOG_JOINT, LateAudit, SOURCE_JOINT, VENDOR_JOINT};
pub use leases::{Lease, LeaseError, collector_lease, lease_step};
pub use licenses::{LicenseChange, LicenseHistory, LicenseState};
pub use losses::UsageOutcome;
pub use new_pass::NewPass;
pub use parts::{BatchPart, PartRow};
pub use passes::{Completeness, LastPass, TopicCompleteness};
pub use pauses::{Pausable, Pause};
pub use plans::KeptPlan;
pub use positions::{Chain, LastRecord, PartitionLease, fingerprint};
pub use preview::{BatchPreview, PlannedEvents};
pub use processes::{GONE_SECONDS, Process, ProcessRow, PublishRefusal};
pub use prune::{Due, DuePage, PruneKind, PrunePlace, PruneState, Removed, RemovedPage, Retention};
pub use publication_requests::{
    Attempt, AttemptVerdict, LastRequest, NewRequest, Recorded, RequestOutcome,
};
pub use publications::{
    HeldBack, HeldFor, Pending, Postponed, Publication, PublicationState, Settled, Settlement,
};
pub use publish_marks::PublishStop;
pub use record::last_record;
pub use recoveries::Recovering;
pub use reject_counts::{OpenRejects, RejectGroup, RejectProperty};
pub use reject_state::RejectState;
pub use rejects::{PassedReject, RejectAct, RejectFilter, RejectRow, SameEvent};
pub use replays::{PlannedReplay, ReplayRange};
pub use restored::{CollectedSource, Restore, RestoreEvidence};
pub use retirements::Retirement;
pub use row_checks::RowReading;
pub use sequence::{InvalidSequence, Sequence};
pub use snapshots::{PieceVersion, ReadSnapshot, SavedSnapshot, StageRules};
pub use sources::{Baseline, BaselineRow, Source};
pub use statement_error::{StatementError, other_incarnation};

use std::time::Duration;

use sqlx::PgPool;

use crate::clock::Clock;

/// A handle on the ledger. Clones share the connections.
#[derive(Clone)]
pub struct Ledger {
    /// Connections with the ledger's session settings.
    pub pool: PgPool,
    /// The clock of `recorded_at`. Leases use the database's clock instead.
    pub clock: Clock,
    /// Deadline of a call under [`Ledger::run`].
    pub deadline: Duration,
}
