//! Audits on demand, and the latest findings of the continuous audit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Desk, OperationError};
use crate::audit::{Audit, AuditReport};
use crate::coderd::Database;
use crate::ledger::{Finding, StatementError, findings, retirements};

/// Options of an audit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunAudit {
    /// Seconds to wait for a collector pass that began after a difference was seen. Default: 60.
    pub patience_seconds: Option<u32>,
    /// Also reread the records that the log still holds. Report each ledger row that was changed, removed or added by hand.
    pub deep: bool,
}

/// Latest findings of the continuous audit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditFindings {
    /// One finding per joint, and per deployment where a joint concerns one deployment. Empty before the first audit.
    pub findings: Vec<Finding>,
}

impl Desk {
    /// Latest findings of the continuous audit.
    pub async fn audit_findings(&self) -> Result<AuditFindings, OperationError> {
        Ok(AuditFindings { findings: self.ledger.run(findings::list).await? })
    }

    /// Audits now. Marks events as confirmed, missing or held; changes no event. `progress` gets the offsets that a deep audit has read,
    /// and their total.
    pub async fn audit(&self, request: &RunAudit, progress: impl Fn(u64, u64) + Send + Sync) -> Result<AuditReport, OperationError> {
        let patience = Duration::from_secs(request.patience_seconds.unwrap_or(60).into());
        let source = match &self.coderd {
            Some(database) => Some((database.clone(), self.deployment_told_by(database).await?)),
            None => None,
        };
        let source = match source {
            Some((_, deployment)) if self.ledger.run(async |conn| retirements::of_deployment(conn, deployment).await).await?.is_some() => {
                None
            }
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

    /// The configured deployment; without one, the deployment that coderd reports.
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
    match error.into().downcast::<StatementError>() {
        Ok(ledger) => OperationError::Ledger(ledger),
        Err(other) => OperationError::Internal(other),
    }
}
