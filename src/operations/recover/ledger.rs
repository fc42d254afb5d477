//! Recovers a ledger that was restored from a backup. It becomes another incarnation, and catches
//! up before it shows or sends anything.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use uuid::Uuid;

use super::super::{OperationError, Operations};
use crate::cause;
use crate::coderd::Database;
use crate::consumer::mark_ahead;
use crate::ledger::{
    ActFilter, NewAct, Recovering, RestoreEvidence, Sequence, acts, collector_lease, generations,
    identity, landmarks, leases, losses, publications, recoveries, restored, snapshots, sources,
};
use crate::log::Log;
use crate::publisher::sendable_after;

/// Pending publications compared in one query.
const PAGE: i64 = 500;

/// Effect of a recovery for the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LedgerEffect {
    /// Last sequence of the ledger. Its incarnation would be replaced.
    pub sequence: Sequence,
    /// When the newest batch was recorded.
    pub newest_batch_at: Option<DateTime<Utc>>,
    /// Time of the last recorded act. Later acts of operators are missing.
    pub last_act_at: Option<DateTime<Utc>>,
    /// Log time of the newest record that was read before the loss, from the committed offsets of
    /// the Kafka group. The lost time extends at least to this instant. Absent if the offsets do
    /// not show it.
    pub had_read_until: Option<DateTime<Utc>>,
    /// The open recovery, if there is one. In that case a plan can only abandon sources.
    pub open: Option<Recovering>,
    /// Offsets of the log that the restored ledger has not read. They will be read.
    pub records_to_read: i64,
    /// Whether the log is in the same database and was restored too. If so, records that other
    /// producers appended after the backup are lost, and their number is unknown. Records of
    /// Tallyline's collectors are collected again, with coderd's current names. After a rename of a
    /// template, organization or preset, one series may be lower than before and another one
    /// higher.
    pub log_restored_too: bool,
    /// Deployments whose databases must be read again completely before the recovery ends.
    pub sources_to_read: Vec<Uuid>,
    /// Collected deployments that the recovery does not wait for.
    pub not_waited_for: Vec<SourceNotWaitedFor>,
    /// Pending publications. Each one may have been sent after the backup.
    pub pending: i64,
    /// Pending publications that are recent enough to send. Mode `sole` may send them a second
    /// time: the vendor remembers their ids and bills them once.
    pub pending_to_send: i64,
    /// Pending publications that are too old to send. They become `unknown`, because they may have
    /// been sent.
    pub pending_too_old: i64,
    /// Pending publications that coderd has marked as published: not ours to send. Absent if
    /// coderd's database is not configured or does not answer.
    pub pending_published_by_coderd: Option<i64>,
}

/// A collected source that a recovery does not wait for. Its events after the backup may never
/// return. Its series and counts may stay lower, and the vendor may have amounts that this ledger
/// does not have. If the source is read again, its remaining events are added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SourceNotWaitedFor {
    /// Id of the deployment.
    pub deployment_id: Uuid,
    /// Whether this plan abandons it. If not, it was not read for 35 days while others were, or it
    /// was abandoned earlier.
    pub by_this_plan: bool,
    /// When it was last read, according to this ledger.
    pub last_read_at: Option<DateTime<Utc>>,
    /// Its events in this ledger.
    pub events: i64,
    /// Its pending publications. Each one may have been sent after the backup.
    pub pending: i64,
}

impl LedgerEffect {
    /// The deployments that this plan abandons.
    fn given_up(&self) -> Vec<Uuid> {
        self.not_waited_for
            .iter()
            .filter(|source| source.by_this_plan)
            .map(|source| source.deployment_id)
            .collect()
    }

    pub(super) fn nothing(&self) -> Option<String> {
        let open = self.open.as_ref().filter(|_| self.given_up().is_empty())?;
        Some(format!("{open}: it closes by itself, and there is nothing to execute"))
    }

    pub(super) fn changes(&self) -> Value {
        match &self.open {
            Some(open) => {
                json!({ "recovery": open.id, "incarnation": self.sequence.incarnation, "without": self.given_up() })
            }
            None => {
                json!({ "incarnation": self.sequence.incarnation, "sources": self.sources_to_read, "without": self.given_up() })
            }
        }
    }
}

pub(super) async fn predict(
    operations: &Operations,
    without: &[Uuid],
) -> Result<LedgerEffect, OperationError> {
    let ledger = &operations.ledger;
    let (head, open) = (ledger.run(snapshots::head).await?, ledger.run(recoveries::open).await?);
    let (sources_to_read, not_waited_for) = sources(operations, open.as_ref(), without).await?;
    let (pending, pending_to_send) = ledger
        .run(async |conn| {
            recoveries::pending_later_than(conn, sendable_after(ledger.clock.now())).await
        })
        .await?;
    Ok(LedgerEffect {
        sequence: head,
        newest_batch_at: ledger
            .run(async |conn| landmarks::of_batch(conn, head.number).await)
            .await?
            .map(|landmark| landmark.recorded_at),
        last_act_at: ledger
            .run(async |conn| acts::list(conn, &ActFilter::default(), 1).await)
            .await?
            .first()
            .map(|act| act.acted_at),
        had_read_until: had_read_until(operations).await,
        open,
        records_to_read: records_to_read(operations).await?,
        log_restored_too: matches!(operations.log, Log::Postgres(_)),
        sources_to_read,
        not_waited_for,
        pending,
        pending_to_send,
        pending_too_old: pending - pending_to_send,
        pending_published_by_coderd: published_by_coderd(operations).await?,
    })
}

/// The deployments that the recovery waits for, and the other collected deployments.
async fn sources(
    operations: &Operations,
    open: Option<&Recovering>,
    without: &[Uuid],
) -> Result<(Vec<Uuid>, Vec<SourceNotWaitedFor>), OperationError> {
    let (waited_for, not_read) = operations.ledger.run(restored::sources_to_recover).await?;
    let waits_for = |id: &Uuid| match open {
        Some(open) => open.sources_to_read.contains(id) || open.sources_to_compare.contains(id),
        None => waited_for.iter().any(|source| source.deployment_id == *id),
    };
    for id in without {
        refuse_readable_source(operations, *id).await?;
        if !waits_for(id) {
            return Err(OperationError::Forbidden(format!(
                "the recovery does not wait for {id}: there is nothing to abandon"
            )));
        }
    }
    let (mut to_read, mut others) = (Vec::new(), Vec::new());
    for source in waited_for.iter().chain(&not_read) {
        let id = source.deployment_id;
        let (by_this_plan, given_up) =
            (without.contains(&id), open.is_some_and(|open| open.without.contains(&id)));
        if waits_for(&id) && !by_this_plan {
            to_read.push(id);
        } else if by_this_plan || given_up || open.is_none() {
            let events = operations
                .ledger
                .run(async |conn| losses::source_events(conn, source.id).await)
                .await?;
            let pending = operations
                .ledger
                .run(async |conn| publications::pending(conn, source.id).await)
                .await?
                .events;
            others.push(SourceNotWaitedFor {
                deployment_id: id,
                by_this_plan,
                last_read_at: source.last_read_at,
                events,
                pending,
            });
        }
    }
    Ok((to_read, others))
}

/// Refuses to abandon a source that can be read.
async fn refuse_readable_source(operations: &Operations, id: Uuid) -> Result<(), OperationError> {
    if operations.ledger.run(async |conn| sources::get(conn, id).await).await?.is_none() {
        return Err(OperationError::NotFound(format!("the ledger knows no deployment {id}")));
    }
    if let Some(holder) =
        operations.ledger.run(async |conn| leases::holder(conn, &collector_lease(id)).await).await?
    {
        return Err(OperationError::Forbidden(format!(
            "{id} is there: the collector {holder} reads it; stop that first if it cannot"
        )));
    }
    match &operations.coderd {
        Some(database) if is_of(operations, database, id).await.unwrap_or(false) => {
            Err(OperationError::Forbidden(format!(
                "{id} is there: its database answers at {}, and a collector can read it",
                database.address()
            )))
        }
        _ => Ok(()),
    }
}

async fn had_read_until(operations: &Operations) -> Option<DateTime<Utc>> {
    match mark_ahead(&operations.log, &operations.ledger, &operations.group).await {
        Ok(Some(RestoreEvidence::Position { read_until, .. })) => read_until,
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(
                error = cause::text(error.as_ref()),
                "how far the log had been read is not known"
            );
            None
        }
    }
}

async fn records_to_read(operations: &Operations) -> Result<i64, OperationError> {
    let mut waiting = 0;
    for position in operations.ledger.run(generations::current).await? {
        let (start, end) = operations.log.watermarks(position.partition).await?;
        waiting += (end - position.next_offset.max(start)).max(0);
    }
    Ok(waiting)
}

/// Pending events of the configured deployment that coderd has marked as published.
async fn published_by_coderd(operations: &Operations) -> Result<Option<i64>, OperationError> {
    let Some(database) = &operations.coderd else { return Ok(None) };
    let mut published = 0;
    for source in
        operations.ledger.run(sources::list).await?.into_iter().filter(|source| !source.retired)
    {
        if !is_of(operations, database, source.deployment_id).await.unwrap_or(false) {
            continue;
        }
        match marked_as_published(operations, database, source.id).await {
            Ok(ids) => published += i64::try_from(ids.len()).unwrap_or(i64::MAX),
            Err(OperationError::Coderd(problem)) => {
                tracing::warn!("coderd's publish marks are not known: {problem}");
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(published))
}

/// Whether the database belongs to the source's coderd. If a fact is unknown and no other
/// contradicts, the configured id decides.
pub(super) async fn is_of(
    operations: &Operations,
    database: &Database,
    source_id: Uuid,
) -> Result<bool, OperationError> {
    let mut reader = database.connect().await?;
    let facts = reader.identity_facts().await;
    reader.close().await;
    let facts = facts?;
    let refusal = operations
        .ledger
        .run(async |conn| identity::refusal_of(conn, source_id, (&facts).into()).await)
        .await?;
    Ok(refusal.is_none() && (facts.problem.is_none() || operations.deployment == Some(source_id)))
}

/// The source's pending events that coderd has marked as published, read in pages.
pub(super) async fn marked_as_published(
    operations: &Operations,
    database: &Database,
    source_id: i16,
) -> Result<Vec<String>, OperationError> {
    let mut reader = database.connect().await?;
    let (mut after, mut published) = (None, Vec::new());
    loop {
        let page = operations
            .ledger
            .run(async |conn| {
                publications::old(conn, source_id, DateTime::<Utc>::MAX_UTC, after.as_ref(), PAGE)
                    .await
            })
            .await?;
        let Some(last) = page.last().cloned() else { break };
        let ids: Vec<String> = page.into_iter().map(|(_, id)| id).collect();
        let rows = reader.usage(&ids).await?;
        published
            .extend(rows.into_iter().filter(|row| row.published_at.is_some()).map(|row| row.id));
        after = Some(last);
    }
    reader.close().await;
    Ok(published)
}

pub(super) async fn execute(
    operations: &Operations,
    effect: &LedgerEffect,
    act: &NewAct<'_>,
    hash: &str,
) -> Result<bool, OperationError> {
    let without = effect.given_up();
    Ok(match &effect.open {
        Some(open) => {
            operations
                .ledger
                .run(async |conn| {
                    recoveries::abandon_sources(
                        conn,
                        open.id,
                        &without,
                        act,
                        hash,
                        operations.ledger.clock.now(),
                    )
                    .await
                })
                .await?
        }
        None => {
            let marked =
                match mark_ahead(&operations.log, &operations.ledger, &operations.group).await {
                    Ok(Some(RestoreEvidence::Position { marked, .. })) => marked,
                    Ok(_) | Err(_) => Vec::new(),
                };
            let restored = RestoreEvidence::Reported {
                incarnation: effect.sequence.incarnation,
                without,
                marked,
            };
            operations
                .ledger
                .run(async |conn| {
                    restored::record(
                        conn,
                        &restored,
                        act,
                        Some(hash),
                        operations.ledger.clock.now(),
                    )
                    .await
                })
                .await?
        }
    })
}
