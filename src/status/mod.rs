//! Where everything stands: the ledger's contents beside the log's ends. What `tallyline status` and `GET /api/v1/status` show.

mod holds;
mod licenses;
mod partitions;

pub use licenses::LicenseEdge;
pub use partitions::Partition;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::event::Topic;
use crate::ledger::{
    BatchCount, Contents, EventCount, Finding, HeldBack, Hold, LastRequest, LeaseRow, Ledger, OpenRejects, Pause, ProcessRow,
    PublicationCount, Rates, Recovering, Sequence, Source as LedgerSource,
};
use crate::log::{Log, LogError};

/// Everything at one moment. It costs the same at any size of the ledger: what grows without end is counted exactly while it is small, and
/// estimated, and said to be, beyond some hundred thousand rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// When, by the clock of who asked.
    pub at: DateTime<Utc>,
    /// How far the process that answers has folded; absent where no serving process answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folded_sequences: Option<Folded>,
    /// The ledger's last sequence.
    pub ledger_sequence: Sequence,
    /// The ledger was restored from a backup and has not caught up yet: domain series are withheld, publishing is held. Who says so
    /// and why, since when, and what it waits for.
    pub recovering: Option<Recovering>,
    /// Why the log's ends are not known, if so.
    pub log_problem: Option<String>,
    /// Since when records must bear a valid signature; absent: they are not verified, and anyone who may write to the topics can add numbers.
    pub signed_since: Option<DateTime<Utc>>,
    /// What is paused, by whom and why.
    pub pauses: Vec<Pause>,
    /// What the last audits found.
    pub audit: Vec<Finding>,
    /// What holds usage back from the vendor, the widest first; of events that are held back by themselves the first 10 of each source.
    pub holds: Vec<Hold>,
    /// Each partition's position beside the log's ends.
    pub partitions: Vec<Partition>,
    /// What was read from the log of late.
    pub rates: Rates,
    /// Each source.
    pub sources: Vec<Source>,
    /// What waits to be published, by source.
    pub queues: Vec<Queue>,
    /// Rejects, conflicts and held records that wait for an operator, by cause.
    pub open_rejects: Vec<OpenRejects>,
    /// The next instant at which a license begins or ceases to count.
    pub next_license_edge: Option<LicenseEdge>,
    /// The processes, as they were last heard of.
    pub processes: Vec<ProcessRow>,
    /// Who holds what.
    pub leases: Vec<LeaseRow>,
    /// Publications by state.
    pub publications: Vec<PublicationCount>,
    /// Accepted events by type.
    pub events: Vec<EventCount>,
    /// Batches by kind.
    pub batches: Vec<BatchCount>,
}

/// Up to which ledger sequence each stage is folded; absent where the fold has not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Folded {
    /// The domain series.
    pub metrics: Option<Sequence>,
    /// Licenses and managed agents.
    pub licenses: Option<Sequence>,
}

/// A source, and how far it is complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Source {
    /// The deployment.
    pub deployment_id: Uuid,
    /// Whether an operator has retired it: nothing waits for it.
    pub retired: bool,
    /// Histograms begin here.
    pub introduced_at: DateTime<Utc>,
    /// Collection begins here; none: at the beginning.
    pub baseline_until: Option<DateTime<Utc>>,
    /// Whether the first backfill is complete: from then on its series are shown.
    pub backfilled: bool,
    /// All that coderd committed before this is counted.
    pub complete_until: Option<DateTime<Utc>>,
    /// All builds that coderd committed before this are counted.
    pub builds_complete_until: Option<DateTime<Utc>>,
    /// All claims that coderd committed before this are counted.
    pub claims_complete_until: Option<DateTime<Utc>>,
    /// All usage that coderd committed before this is counted.
    pub usage_complete_until: Option<DateTime<Utc>>,
    /// Every hour before has its agent runtime, or is over 7 days old.
    pub runtime_complete_until: Option<DateTime<Utc>>,
}

/// What waits to be published of one source. How its publishers stand is in the standing of their processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Queue {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// Events that wait.
    pub pending: i64,
    /// Of these, not sent because coderd's row no longer says the same.
    pub held_back: i64,
    /// The first of those by time, at most 10.
    pub held_back_first: Vec<HeldBack>,
    /// Of these, with an attempt that may have been taken.
    pub unanswered: i64,
    /// When the oldest of them happened. It expires 30 days later.
    pub oldest_created_at: Option<DateTime<Utc>>,
    /// The latest request to the vendor and its verdicts.
    pub last_request: Option<LastRequest>,
}

/// So many publications that are held back are told one by one.
const HELD_BACK_SHOWN: i64 = 10;

/// Reads all of it. The log's ends come first, so that the ledger is never shown ahead of the log only because it was read later; a log that
/// does not tell them within `log_deadline` is a problem of the answer.
pub async fn read(ledger: &Ledger, log: &Log, log_deadline: Duration) -> Result<Status, sqlx::Error> {
    let seen = Mutex::default();
    let mut log_problem = problem_of(log_deadline, partitions::ends(log, &seen)).await;
    let mut seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let Contents { sequence, batches, positions, events, sources: rows, publications, leases, rates } = ledger.contents().await?;
    let no_ages = problem_of(log_deadline, partitions::ages(log, &mut seen, &positions)).await;
    log_problem = log_problem.or(no_ages);
    let at = ledger.clock.now();
    let (recovering, pauses, audit) = (ledger.recovering().await?, ledger.pauses().await?, ledger.findings().await?);
    let (queues, processes) = (queues(ledger, &rows).await?, ledger.processes().await?);
    let (stops, retirements) = (ledger.publish_stops().await?, ledger.retirements().await?);
    let holds = holds::all(&audit, recovering.as_ref(), &pauses, &stops, &retirements, &processes, &queues);
    Ok(Status {
        at,
        folded_sequences: None,
        ledger_sequence: sequence,
        recovering,
        log_problem,
        signed_since: ledger.signed_since().await?,
        pauses,
        audit,
        holds,
        partitions: partitions::partitions(&positions, &seen, at),
        rates,
        sources: sources(ledger, &rows).await?,
        queues,
        open_rejects: ledger.open_rejects().await?,
        next_license_edge: next_license_edge(ledger, &rows, at).await?,
        processes,
        leases,
        publications,
        events,
        batches,
    })
}

/// Why the log does not answer within the deadline, if so.
async fn problem_of(deadline: Duration, asked: impl Future<Output = Result<(), LogError>>) -> Option<String> {
    match tokio::time::timeout(deadline, asked).await {
        Ok(answered) => answered.err().map(|error| error.to_string()),
        Err(_) => Some(format!("no answer within {} seconds", deadline.as_secs())),
    }
}

async fn sources(ledger: &Ledger, rows: &[LedgerSource]) -> Result<Vec<Source>, sqlx::Error> {
    let mut sources = Vec::with_capacity(rows.len());
    for row in rows {
        let completeness = ledger.completeness(row.id).await?;
        let by_topic = ledger.completeness_by_topic(row.id).await?;
        let of = |topic: Topic| by_topic.iter().find(|of| of.topic == topic.name()).and_then(|of| of.complete_until);
        sources.push(Source {
            deployment_id: row.deployment_id,
            retired: row.retired,
            introduced_at: row.introduced_at,
            baseline_until: row.baseline_until,
            backfilled: ledger.backfilled(row.id).await?,
            complete_until: completeness.complete_until,
            builds_complete_until: of(Topic::WorkspaceBuilds),
            claims_complete_until: of(Topic::PrebuildClaims),
            usage_complete_until: of(Topic::AgentUsage),
            runtime_complete_until: completeness.runtime_complete_until,
        });
    }
    Ok(sources)
}

async fn queues(ledger: &Ledger, rows: &[LedgerSource]) -> Result<Vec<Queue>, sqlx::Error> {
    let mut queues = Vec::with_capacity(rows.len());
    for row in rows {
        let pending = ledger.pending_publications(row.id).await?;
        queues.push(Queue {
            deployment_id: row.deployment_id,
            pending: pending.events,
            held_back: pending.held_back,
            held_back_first: ledger.held_back(row.id, HELD_BACK_SHOWN).await?,
            unanswered: pending.unanswered,
            oldest_created_at: pending.oldest,
            last_request: ledger.last_request(row.id).await?,
        });
    }
    Ok(queues)
}

async fn next_license_edge(ledger: &Ledger, rows: &[LedgerSource], now: DateTime<Utc>) -> Result<Option<LicenseEdge>, sqlx::Error> {
    let mut next: Option<LicenseEdge> = None;
    for row in rows {
        let edge = licenses::next_edge(row.deployment_id, &ledger.present_licenses(row.id).await?, now);
        next = [next, edge].into_iter().flatten().min_by_key(|edge| edge.at);
    }
    Ok(next)
}
