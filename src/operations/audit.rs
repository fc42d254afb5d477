//! Audits on demand, and the latest findings of the continuous audit.

use std::time::Duration;

use axum::http::Method;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::duration::seconds_flag;
use super::operation::counting;
use super::{ApiRequest, Operation, OperationError, Operations, Run, Step};
use crate::audit::{Audit, AuditPhase, AuditReport};
use crate::coderd::{CoderdError, Database};
use crate::event::Topic;
use crate::ledger::{Finding, Head, StatementError, findings, retirements};
use crate::log::LogError;

/// Prove that the books balance, or list the differences. Marks events, but changes none.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args,
)]
#[serde(deny_unknown_fields, default)]
pub struct RunAudit {
    /// How long to wait for a collector pass that began after a difference was seen. Default: 60
    /// seconds.
    #[arg(long = "patience", value_name = "DURATION", value_parser = seconds_flag)]
    pub patience_seconds: Option<u32>,
    /// Also reread all records in the log and recompute the ledger's chain. Report each ledger row
    /// that was changed, removed or added by hand.
    #[arg(long)]
    pub deep: bool,
    /// With --deep: a head of the ledger that an earlier audit, export or status printed. Shows
    /// whether batches up to it were removed, or changed with the whole chain.
    #[arg(long, value_name = "INCARNATION:SEQUENCE:CHAIN", requires = "deep")]
    pub head: Option<Head>,
    /// Do not go on with an audit of the last 24 hours that was interrupted.
    #[arg(long)]
    pub from_start: bool,
}

/// Show the latest findings of the continuous audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShowFindings {}

/// Latest findings of the continuous audit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditFindings {
    /// One finding per joint, and per deployment where a joint concerns one deployment. Empty
    /// before the first audit.
    pub findings: Vec<Finding>,
}

impl ApiRequest for ShowFindings {
    type Answer = AuditFindings;
    const PATH: &'static str = "/api/v1/audit";
    const ANSWER: &'static str = "By joint.";
}

impl Operation for ShowFindings {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<AuditFindings, OperationError> {
        Ok(AuditFindings { findings: operations.ledger.run(findings::list).await? })
    }
}

impl ApiRequest for RunAudit {
    type Answer = AuditReport;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/audit";
    const ANSWER: &'static str = "The comparison of each joint.";
    const IS_LONG: bool = true;
}

impl Operation for RunAudit {
    async fn run(
        &self,
        Run { operations, progress, .. }: Run<'_>,
    ) -> Result<AuditReport, OperationError> {
        if self.head.is_some() && !self.deep {
            return Err(OperationError::Invalid {
                field: "head",
                message: "only a deep audit compares it; expected deep to be true".to_owned(),
            });
        }
        // before anything is compared: a log that cannot be reached is not a fault of ours
        for topic in Topic::ALL {
            operations.log.partitions(topic).await?;
        }
        let patience = Duration::from_secs(self.patience_seconds.unwrap_or(60).into());
        let source = match &operations.coderd {
            Some(database) => Some((database.clone(), operations.deployment_of(database).await?)),
            None => None,
        };
        let source = match source {
            Some((_, deployment))
                if operations
                    .ledger
                    .run(async |conn| retirements::of_deployment(conn, deployment).await)
                    .await?
                    .is_some() =>
            {
                None
            }
            source => source,
        };
        let audit = Audit {
            ledger: operations.ledger.clone(),
            log: operations.log.clone(),
            source,
            patience,
        };
        let at = |phase: AuditPhase, done: i64, total: i64| {
            let [done, total] = [done, total].map(|count| u64::try_from(count).unwrap_or_default());
            let (doing, items) = match phase {
                AuditPhase::Source => ("comparing with coderd", "rows"),
                AuditPhase::Ledger => ("auditing", "batches"),
            };
            progress(Step { doing, items, done: done.min(total), total });
        };
        let report = audit.run_from(self.from_start, &at).await.map_err(unread)?;
        if !self.deep {
            return Ok(report);
        }
        let ranges = audit.rereadable().await.map_err(unread)?;
        let total = ranges
            .iter()
            .map(|range| u64::try_from(range.until - range.from).unwrap_or_default())
            .sum();
        let deep = audit.deep(&ranges, counting(("rereading", "records"), total, progress));
        let report = report.with(deep.await.map_err(unread)?);
        let until = audit.head().await.map_err(unread)?;
        let total = u64::try_from(until.sequence.number).unwrap_or_default();
        let progress = counting(("recomputing the chain of", "batches"), total, progress);
        Ok(report.with(audit.chained(until, self.head, progress).await.map_err(unread)?))
    }
}

impl Operations {
    /// The configured deployment; without one, the deployment that coderd reports.
    async fn deployment_of(&self, database: &Database) -> Result<Uuid, OperationError> {
        if let Some(deployment) = self.deployment {
            return Ok(deployment);
        }
        let mut reader = database.connect().await?;
        let deployment = reader.deployment_id().await;
        reader.close().await;
        Ok(deployment?)
    }
}

/// A side that cannot be read is not a fault of Tallyline.
fn unread(error: anyhow::Error) -> OperationError {
    error
        .downcast::<StatementError>()
        .map(OperationError::Ledger)
        .or_else(|error| error.downcast::<LogError>().map(OperationError::Log))
        .or_else(|error| error.downcast::<CoderdError>().map(OperationError::Coderd))
        .unwrap_or_else(OperationError::Internal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_that_cannot_read_a_side_names_the_side() {
        let inside = |error: anyhow::Error| unread(error.context("reading one side"));
        let ledger = inside(StatementError::PoolTimedOut.into());
        assert!(matches!(ledger, OperationError::Ledger(_)), "{ledger:?}");
        let log = inside(LogError::Unreachable("no answer".to_owned()).into());
        assert!(matches!(log, OperationError::Log(_)), "{log:?}");
        let coderd = inside(CoderdError::Address("not a URL".to_owned()).into());
        assert!(matches!(coderd, OperationError::Coderd(_)), "{coderd:?}");
        let fault = inside(anyhow::anyhow!("a broken invariant"));
        assert!(matches!(fault, OperationError::Internal(_)), "{fault:?}");
    }
}
