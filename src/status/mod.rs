//! The state of all parts: content of the ledger and ends of the log, for `tallyline status` and
//! `GET /api/v1/status`.

mod holds;
mod license_edges;
mod partitions;
mod queue;

pub use license_edges::LicenseEdge;
pub use partitions::Partition;
pub use queue::Queue;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::event::Topic;
use crate::ledger::{
    BatchCount, Contents, EventCount, Finding, Head, Hold, LateAudit, LeaseRow, Ledger,
    OpenRejects, OverdueTurn, Pause, ProcessRow, PruneState, PublicationCount, Rates, Recovering,
    Sequence, Source as LedgerSource, StatementError, contents, cutover, findings, late_audits,
    licenses, passes, pauses, processes, prune, publication_requests, publications, publish_marks,
    recoveries, reject_counts, retirements,
};
use crate::log::{Log, LogError};

/// The state at one moment. Its cost does not depend on the size of the ledger: beyond some ten
/// thousand rows, unlimited counts are estimated and marked as estimates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Time of the status, by the caller's clock.
    pub at: DateTime<Utc>,
    /// Progress of the serving process's projections; absent if the status does not come from a
    /// serving process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folded_sequences: Option<Folded>,
    /// Last sequence of the ledger.
    pub ledger_sequence: Sequence,
    /// The ledger's head at that sequence. Keep it outside the ledger's database: a later deep audit
    /// compares the ledger with it.
    pub ledger_head: Head,
    /// The open recovery of a restored ledger that has not caught up: actor, reason, time and
    /// remaining work. Domain series and publishing are held.
    pub recovering: Option<Recovering>,
    /// Why the ends of the log are not known; absent if they are known.
    pub log_problem: Option<String>,
    /// From this instant, records need a valid signature. If absent, records are not verified:
    /// everyone who may write to the topics can add numbers.
    pub signed_since: Option<DateTime<Utc>>,
    /// Current pauses, with actor and reason.
    pub pauses: Vec<Pause>,
    /// Findings of the latest audits.
    pub audit: Vec<Finding>,
    /// Joints whose audit is late. Each holds publishing, unless an operator publishes without it.
    pub late_audits: Vec<LateAudit>,
    /// Turns of the continuous audit that have not ended in their time. They hold nothing.
    #[serde(default)]
    pub overdue_turns: Vec<OverdueTurn>,
    /// Holds of usage, the widest first. Of individually held events, the first 10 per source.
    pub holds: Vec<Hold>,
    /// Position of each partition, with the ends of the log.
    pub partitions: Vec<Partition>,
    /// Recent consumption rates.
    pub rates: Rates,
    /// Registered sources.
    pub sources: Vec<Source>,
    /// Usage queued for publication, by source.
    pub queues: Vec<Queue>,
    /// Open rejects, conflicts and held records, by cause.
    pub open_rejects: Vec<OpenRejects>,
    /// The next instant at which a license becomes or ceases to be effective.
    pub next_license_edge: Option<LicenseEdge>,
    /// Processes, with their last heartbeat.
    pub processes: Vec<ProcessRow>,
    /// Leases and their holders.
    pub leases: Vec<LeaseRow>,
    /// What retention has removed, and what is due, by kind.
    #[serde(default)]
    pub retention: Vec<PruneState>,
    /// Number of publications by state.
    pub publications: Vec<PublicationCount>,
    /// Number of accepted events by type.
    pub events: Vec<EventCount>,
    /// Number of batches by kind.
    pub batches: Vec<BatchCount>,
}

/// Ledger sequence of each stage's state; absent if its projection has not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Folded {
    /// State of the domain series.
    pub metrics: Option<Sequence>,
    /// State of licenses and managed agents.
    pub licenses: Option<Sequence>,
}

/// A source and its completeness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Source {
    /// Id of the deployment.
    pub deployment_id: Uuid,
    /// Whether an operator has retired the source. Nothing waits for a retired source.
    pub retired: bool,
    /// Histograms begin at this instant.
    pub introduced_at: DateTime<Utc>,
    /// Collection begins at this instant; absent for everything.
    pub baseline_until: Option<DateTime<Utc>>,
    /// Whether the first backfill is complete. Its series are shown from then on.
    pub backfilled: bool,
    /// Everything that coderd committed before this instant is counted.
    pub complete_until: Option<DateTime<Utc>>,
    /// All builds that coderd committed before this instant are counted.
    pub builds_complete_until: Option<DateTime<Utc>>,
    /// All prebuild claims that coderd committed before this instant are counted.
    pub claims_complete_until: Option<DateTime<Utc>>,
    /// All usage that coderd committed before this instant is counted.
    pub usage_complete_until: Option<DateTime<Utc>>,
    /// Every hour before this instant has its agent runtime, or is over 7 days old.
    pub runtime_complete_until: Option<DateTime<Utc>>,
}

/// Number of held publications listed individually.
const HELD_BACK_SHOWN: i64 = 10;

/// Reads the whole status. The ends of the log are read first, so that the ledger never seems to be
/// ahead of the log. If the log does not answer within `log_deadline`, the status reports this
/// problem.
pub async fn read(
    ledger: &Ledger,
    log: &Log,
    log_deadline: Duration,
) -> Result<Status, StatementError> {
    let seen = Mutex::default();
    let mut log_problem = problem_of(log_deadline, partitions::ends(log, &seen)).await;
    let mut seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let Contents { head, batches, positions, events, sources: rows, publications, leases, rates } =
        ledger.run(async |conn| contents::read(conn, ledger.clock.now()).await).await?;
    let no_ages = problem_of(log_deadline, partitions::ages(log, &mut seen, &positions)).await;
    log_problem = log_problem.or(no_ages);
    let at = ledger.clock.now();
    // in the order of [`holds::of_deployment`](crate::ledger::holds::of_deployment)
    let (recovering, pauses, late_audits, audit) = (
        ledger.run(recoveries::open).await?,
        ledger.run(pauses::list).await?,
        ledger.run(late_audits::list).await?,
        ledger.run(findings::list).await?,
    );
    let (queues, processes) = (queues(ledger, &rows).await?, ledger.run(processes::list).await?);
    let (stops, retirements) =
        (ledger.run(publish_marks::stops).await?, ledger.run(retirements::list).await?);
    let held = crate::ledger::holds(&audit, &late_audits);
    let holds =
        holds::all(held, recovering.as_ref(), &pauses, &stops, &retirements, &processes, &queues);
    Ok(Status {
        at,
        folded_sequences: None,
        ledger_sequence: head.sequence,
        ledger_head: head,
        recovering,
        log_problem,
        signed_since: ledger.run(cutover::signed_since).await?,
        pauses,
        overdue_turns: audit.iter().flat_map(|finding| finding.overdue_turns(at)).collect(),
        audit,
        late_audits,
        holds,
        partitions: partitions::partitions(&positions, &seen, at),
        rates,
        sources: sources(ledger, &rows).await?,
        queues,
        open_rejects: ledger.run(reject_counts::open).await?,
        next_license_edge: next_license_edge(ledger, &rows, at).await?,
        processes,
        leases,
        retention: ledger.run(prune::states).await?,
        publications,
        events,
        batches,
    })
}

/// Why the log does not answer within the deadline; `None` if it answers.
async fn problem_of(
    deadline: Duration,
    query: impl Future<Output = Result<(), LogError>>,
) -> Option<String> {
    match tokio::time::timeout(deadline, query).await {
        Ok(result) => result.err().map(|error| error.to_string()),
        Err(_) => Some(format!("the log did not answer within {} seconds", deadline.as_secs())),
    }
}

async fn sources(ledger: &Ledger, rows: &[LedgerSource]) -> Result<Vec<Source>, StatementError> {
    let mut sources = Vec::with_capacity(rows.len());
    for row in rows {
        let completeness =
            ledger.run(async |conn| passes::completeness(conn, row.id).await).await?;
        let by_topic =
            ledger.run(async |conn| passes::completeness_by_topic(conn, row.id).await).await?;
        let of = |topic: Topic| {
            by_topic.iter().find(|of| of.topic == topic.name()).and_then(|of| of.complete_until)
        };
        sources.push(Source {
            deployment_id: row.deployment_id,
            retired: row.retired,
            introduced_at: row.introduced_at,
            baseline_until: row.baseline_until,
            backfilled: ledger.run(async |conn| passes::is_backfilled(conn, row.id).await).await?,
            complete_until: completeness.complete_until,
            builds_complete_until: of(Topic::WorkspaceBuilds),
            claims_complete_until: of(Topic::PrebuildClaims),
            usage_complete_until: of(Topic::AgentUsage),
            runtime_complete_until: completeness.runtime_complete_until,
        });
    }
    Ok(sources)
}

async fn queues(ledger: &Ledger, rows: &[LedgerSource]) -> Result<Vec<Queue>, StatementError> {
    let mut queues = Vec::with_capacity(rows.len());
    for row in rows {
        let pending = ledger.run(async |conn| publications::pending(conn, row.id).await).await?;
        queues.push(Queue {
            deployment_id: row.deployment_id,
            pending: pending.events,
            held_back: pending.held_back,
            held_back_first: ledger
                .run(async |conn| publications::held(conn, row.id, HELD_BACK_SHOWN).await)
                .await?,
            unanswered: pending.unanswered,
            oldest_created_at: pending.oldest,
            last_request: ledger
                .run(async |conn| publication_requests::last(conn, row.id).await)
                .await?,
        });
    }
    Ok(queues)
}

async fn next_license_edge(
    ledger: &Ledger,
    rows: &[LedgerSource],
    now: DateTime<Utc>,
) -> Result<Option<LicenseEdge>, StatementError> {
    let mut next: Option<LicenseEdge> = None;
    for row in rows {
        let edge = license_edges::next_edge(
            row.deployment_id,
            &ledger.run(async |conn| licenses::present(conn, row.id).await).await?,
            now,
        );
        next = [next, edge].into_iter().flatten().min_by_key(|edge| edge.at);
    }
    Ok(next)
}
