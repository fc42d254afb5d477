//! A ledger that was restored from a backup: it becomes another incarnation and catches up before anything is shown or sent.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use uuid::Uuid;

use super::super::{Desk, OperationError};
use crate::coderd::Database;
use crate::ledger::{NewAct, Recovering, Restored};
use crate::log::Log;
use crate::publisher::sendable_after;

/// Pending publications compared at a time.
const PAGE: i64 = 500;

/// What was found of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LedgerEffect {
    /// Its identity, which would become another.
    pub incarnation: Uuid,
    /// Its highest sequence.
    pub sequence: i64,
    /// When its newest batch was recorded.
    pub newest_batch_at: Option<DateTime<Utc>>,
    /// The recovery that is open already; then there is nothing to execute.
    pub open: Option<Recovering>,
    /// Offsets of the log that it has not read: they come again from there.
    pub records_to_read: i64,
    /// Whether the log is in the same database and was restored with it: then what others than our collectors appended after the backup is lost, and how
    /// much that is, is not known.
    pub log_restored_too: bool,
    /// Deployments whose databases are read again as a whole.
    pub sources_to_read: Vec<Uuid>,
    /// Publications that are pending: each may have been sent after the backup.
    pub pending: i64,
    /// Of these, young enough to be sent, in mode `sole` again where they were sent already: the vendor remembers their ids and bills them once.
    pub pending_to_send: i64,
    /// Of these, too old to be sent: as they may have been sent, they become `unknown`.
    pub pending_too_old: i64,
    /// Of these, marked as published in coderd: not ours to send. None where coderd's database is not configured or does not answer.
    pub pending_published_by_coderd: Option<i64>,
}

impl LedgerEffect {
    pub(super) fn changes(&self) -> Value {
        json!({ "incarnation": self.incarnation, "sources": self.sources_to_read })
    }
}

pub(super) async fn foresee(desk: &Desk) -> Result<LedgerEffect, OperationError> {
    let ledger = &desk.ledger;
    let head = ledger.head().await?;
    let (pending, pending_to_send) = ledger.pending_later_than(sendable_after(ledger.clock.now())).await?;
    Ok(LedgerEffect {
        incarnation: head.incarnation,
        sequence: head.sequence,
        newest_batch_at: ledger.landmark(head.sequence).await?.map(|landmark| landmark.recorded_at),
        open: ledger.recovering().await?,
        records_to_read: records_to_read(desk).await?,
        log_restored_too: matches!(desk.log, Log::Postgres(_)),
        sources_to_read: ledger.sources().await?.into_iter().filter(|source| source.collected).map(|source| source.deployment_id).collect(),
        pending,
        pending_to_send,
        pending_too_old: pending - pending_to_send,
        pending_published_by_coderd: published_by_coderd(desk).await?,
    })
}

async fn records_to_read(desk: &Desk) -> Result<i64, OperationError> {
    let mut waiting = 0;
    for position in desk.ledger.standings().await? {
        let (start, end) = desk.log.watermarks(position.partition).await?;
        waiting += (end - position.next_offset.max(start)).max(0);
    }
    Ok(waiting)
}

/// How many pending events of the configured deployment coderd has marked as published.
async fn published_by_coderd(desk: &Desk) -> Result<Option<i64>, OperationError> {
    let Some(database) = &desk.coderd else { return Ok(None) };
    let mut published = 0;
    for source in desk.ledger.sources().await?.into_iter().filter(|source| source.collected) {
        if !is_of(database, source.deployment_id).await {
            continue;
        }
        match marked_as_published(desk, database, source.id).await {
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

/// Whether coderd's database answers and is that deployment's.
pub(super) async fn is_of(database: &Database, deployment: Uuid) -> bool {
    let Ok(mut reader) = database.connect().await else { return false };
    let found = reader.deployment_id().await;
    reader.close().await;
    found.is_ok_and(|found| found == deployment)
}

/// The source's pending events that coderd has marked as published, read in pages.
pub(super) async fn marked_as_published(desk: &Desk, database: &Database, source_id: i16) -> Result<Vec<String>, OperationError> {
    let coderd = |error: crate::coderd::CoderdError| OperationError::Coderd(error.to_string());
    let mut reader = database.connect().await.map_err(coderd)?;
    let (mut after, mut published) = (None, Vec::new());
    loop {
        let page = desk.ledger.old_publications(source_id, DateTime::<Utc>::MAX_UTC, after.as_ref(), PAGE).await?;
        let Some(last) = page.last().cloned() else { break };
        let ids: Vec<String> = page.into_iter().map(|(_, id)| id).collect();
        let rows = reader.usage(&ids).await.map_err(coderd)?;
        published.extend(rows.into_iter().filter(|row| row.published_at.is_some()).map(|row| row.id));
        after = Some(last);
    }
    reader.close().await;
    Ok(published)
}

pub(super) async fn execute(desk: &Desk, effect: &LedgerEffect, act: &NewAct<'_>, hash: &str) -> Result<bool, OperationError> {
    if let Some(open) = &effect.open {
        return Err(OperationError::Forbidden(format!("{open}: it closes by itself, and there is nothing to execute")));
    }
    Ok(desk.ledger.note_restored(&Restored::Said(effect.incarnation), act, Some(hash)).await?)
}
