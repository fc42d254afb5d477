//! Auditing when it is asked for, and what the audit that runs by itself found last.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Actor, Desk, OperationError};
use crate::audit::{Audit, AuditReport};
use crate::coderd::Database;
use crate::ledger::{Finding, NewAct};

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

/// A deployment that nobody audits any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForgetFindings {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
}

impl Desk {
    /// What the audit that runs by itself found last.
    ///
    /// # Errors
    /// The ledger's.
    pub async fn audit_findings(&self) -> Result<AuditFindings, OperationError> {
        Ok(AuditFindings { findings: self.ledger.in_time(self.ledger.findings()).await? })
    }

    /// Forgets what the audit found last between the ledger and a deployment that is retired, so that it stops nothing any more. Where a process
    /// still audits the deployment, the same is soon found again. Answers what is forgotten.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] without a reason; [`OperationError::NotFound`] where nothing is known of the deployment; the ledger's.
    pub async fn forget_findings(&self, request: &ForgetFindings, actor: &Actor) -> Result<AuditFindings, OperationError> {
        if actor.reason.trim().is_empty() {
            let message = "say why nobody audits it any more: it goes into the audit trail".to_owned();
            return Err(OperationError::Invalid { field: "reason", message });
        }
        let subject = request.deployment_id.to_string();
        let act =
            NewAct { actor: &actor.name, act: "forget", subject: &subject, reason: &actor.reason, detail: serde_json::Value::default() };
        let findings = self.ledger.in_time(self.ledger.forget_findings(request.deployment_id, &act)).await?;
        if findings.is_empty() {
            return Err(OperationError::NotFound(format!("no audit of deployment {subject} is known")));
        }
        Ok(AuditFindings { findings })
    }

    /// Audits now. Nothing is written.
    ///
    /// # Errors
    /// A side that cannot be read: then nothing is said about the books.
    pub async fn audit(&self, request: &RunAudit) -> Result<AuditReport, OperationError> {
        let patience = Duration::from_secs(request.patience_seconds.unwrap_or(60).into());
        let source = match &self.coderd {
            Some(database) => Some((database.clone(), self.deployment_told_by(database).await?)),
            None => None,
        };
        let audit = Audit { ledger: self.ledger.clone(), log: self.log.clone(), source, patience };
        let report = audit.run().await.map_err(unread)?;
        if !request.deep {
            return Ok(report);
        }
        let ranges = audit.rereadable().await.map_err(unread)?;
        Ok(report.with(audit.deep(&ranges, |_| {}).await.map_err(unread)?))
    }

    /// The configured deployment, or the one that coderd tells.
    async fn deployment_told_by(&self, database: &Database) -> Result<Uuid, OperationError> {
        if let Some(deployment) = self.deployment {
            return Ok(deployment);
        }
        let asked = async {
            let mut reader = database.connect().await?;
            let deployment = reader.deployment_id().await;
            reader.close().await;
            deployment
        };
        asked.await.map_err(|error| OperationError::Coderd(error.to_string()))
    }
}

fn unread(error: impl Into<anyhow::Error>) -> OperationError {
    match error.into().downcast::<sqlx::Error>() {
        Ok(ledger) => OperationError::Ledger(ledger),
        Err(other) => OperationError::Internal(other),
    }
}
