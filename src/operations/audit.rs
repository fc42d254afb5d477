//! Auditing when it is asked for, and what the audit that runs by itself found last.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Desk, OperationError};
use crate::audit::{Audit, AuditReport};
use crate::coderd::Database;
use crate::ledger::Finding;

/// How to audit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunAudit {
    /// How long to wait for a collector pass that began after a difference was seen, in seconds; 60 where it is not given.
    pub patience_seconds: Option<u32>,
    /// Also read again what the log still holds, and name each row that was changed, removed or added by hand.
    pub deep: bool,
}

/// What the audit that runs by itself found last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditFindings {
    /// By joint, and by deployment where a joint is one deployment's; empty before the first.
    pub findings: Vec<Finding>,
}

impl Desk {
    /// What the audit that runs by itself found last.
    pub async fn audit_findings(&self) -> Result<AuditFindings, OperationError> {
        Ok(AuditFindings { findings: self.ledger.in_time(self.ledger.findings()).await? })
    }

    /// Audits now: what is confirmed, missing or to be held is marked, and no event is changed. `progress` gets the offsets that a deep audit has
    /// read, and their total.
    pub async fn audit(&self, request: &RunAudit, progress: impl Fn(u64, u64) + Send + Sync) -> Result<AuditReport, OperationError> {
        let patience = Duration::from_secs(request.patience_seconds.unwrap_or(60).into());
        let source = match &self.coderd {
            Some(database) => Some((database.clone(), self.deployment_told_by(database).await?)),
            None => None,
        };
        let source = match source {
            Some((_, deployment)) if self.ledger.in_time(self.ledger.retirement(deployment)).await?.is_some() => None,
            source => source,
        };
        let audit = Audit { ledger: self.ledger.clone(), log: self.log.clone(), source, patience };
        let report = audit.run().await.map_err(unread)?;
        if !request.deep {
            return Ok(report);
        }
        let ranges = audit.rereadable().await.map_err(unread)?;
        let total = ranges.iter().map(|range| u64::try_from(range.until - range.from).unwrap_or_default()).sum();
        let done = AtomicU64::new(0);
        let progress = |more| progress(done.fetch_add(more, Ordering::Relaxed) + more, total);
        Ok(report.with(audit.deep(&ranges, progress).await.map_err(unread)?))
    }

    /// The configured deployment, or the one that coderd tells.
    async fn deployment_told_by(&self, database: &Database) -> Result<Uuid, OperationError> {
        if let Some(deployment) = self.deployment {
            return Ok(deployment);
        }
        let mut reader = database.connect().await?;
        let deployment = reader.deployment_id().await;
        reader.close().await;
        Ok(deployment?)
    }
}

fn unread(error: impl Into<anyhow::Error>) -> OperationError {
    match error.into().downcast::<sqlx::Error>() {
        Ok(ledger) => OperationError::Ledger(ledger),
        Err(other) => OperationError::Internal(other),
    }
}
