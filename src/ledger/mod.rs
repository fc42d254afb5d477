//! The PostgreSQL ledger: totally ordered batches of accepted events.
//!
//! Each file has one subject and its SQL. Each row that a fold, an export or a close reads belongs to a row of `batch`.
//! The batch takes the next ledger sequence inside its transaction's commit.

mod acts;
mod audit;
mod batch;
mod begin_anew;
mod choices;
mod collector_requests;
mod confirmed;
mod connect;
mod cutover;
mod exports;
mod findings;
mod follow;
mod foresee;
mod holds;
mod identity;
mod in_time;
mod kept;
mod known;
mod landmarks;
mod leases;
mod licenses;
mod new_pass;
mod passes;
mod pauses;
mod plans;
mod positions;
mod processes;
mod proof;
mod publication_requests;
mod publications;
mod publish_marks;
mod record;
mod recoveries;
mod refused;
mod reject_counts;
mod reject_state;
mod rejects;
mod replays;
mod restored;
mod retirement;
mod rights;
mod rows;
mod sequence;
mod snapshots;
mod source_lost;
mod sources;
mod statement_error;
mod status;

pub use acts::{Act, ActKind, ListActs, NewAct, OURSELVES, Subject};
pub use audit::{Difference, LedgerBooks, PartitionBooks};
pub use batch::{Arrival, BatchKind, Counts, RecordError, Refusal, Verdict};
pub use begin_anew::{BegunAnew, Lives};
pub use choices::LICENSE_RULES;
pub use collector_requests::SweepRequest;
pub use connect::{LedgerError, LedgerSettings};
pub use cutover::{NO_SIGNING_KEY, SignatureResults};
pub use exports::{LaterUsage, UsageCompleteness, UsageRange, UsageRow};
pub use findings::{Finding, NewFinding};
pub use follow::Entry;
pub use foresee::{Foreseen, Foresight};
pub use holds::{Hold, HoldScope, holds};
pub use identity::{IdentityRefusal, ReportedIdentity, SourceIdentity};
pub use kept::{KeptBatch, KeptEvent, KeptRange, KeptReject};
pub use known::RefusedState;
pub use landmarks::{Acquaintance, Landmark};
pub use leases::{Lease, LeaseError, collector_lease, lease_step};
pub use licenses::{LicenseChange, LicenseLife, LicenseState};
pub use new_pass::NewPass;
pub use passes::{Completeness, LastPass, TopicCompleteness};
pub use pauses::{Pausable, Pause, Paused};
pub use plans::KeptPlan;
pub use positions::{Chain, Claim, LastRecord, fingerprint};
pub use processes::{GONE_SECONDS, Process, ProcessRow, PublishRefusal};
pub use proof::{ActOnRefusal, ExportLife, NewExport, PublicationAttempt, PublicationLife, RefusalLife};
pub use publication_requests::{Attempt, AttemptVerdict, LastRequest, NewRequest, Recorded, RequestOutcome};
pub use publications::{HeldBack, HeldFor, Pending, Postponed, Publication, PublicationState, Settled, Settlement};
pub use publish_marks::PublishStop;
pub use record::last_record;
pub use recoveries::{FORGOTTEN, Recovering, last_act};
pub use reject_counts::{OpenRejects, RejectGroup, RejectProperty};
pub use reject_state::RejectState;
pub use rejects::{PassedReject, RejectAct, RejectFilter, RejectRow, SameEvent};
pub use replays::{PlannedReplay, ReplayRange};
pub use restored::{CollectedSource, Restored};
pub use retirement::Retirement;
pub use sequence::{InvalidSequence, Sequence};
pub use snapshots::Snapshot;
pub use source_lost::UsageFate;
pub use sources::{Baseline, BaselineRow, Source};
pub use statement_error::{StatementError, other_incarnation};
pub use status::{BatchCount, Contents, EventCount, LeaseRow, PositionRow, PublicationCount, Rates};

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
    /// Deadline of a call under [`Ledger::in_time`].
    pub deadline: Duration,
}
