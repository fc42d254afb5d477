//! Recoveries: plan what can be restored after a loss, with the risks, and execute the plan.
//!
//! A plan is saved under a hash of its changes. It is executed only if it would still make exactly
//! these changes.

mod coderd;
mod ledger;
mod log;
mod restore_monitor;

pub use coderd::{CoderdEffect, LostEvents};
pub use ledger::{LedgerEffect, SourceNotWaitedFor};
pub use log::{LogEffect, PartitionToBegin};
pub use restore_monitor::RestoreMonitor;

use axum::http::Method;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;
use uuid::Uuid;

use super::plan_hash::plan_hash;
use super::{ApiRequest, Operation, OperationError, Operations, Progress, Run};
use crate::ledger::{ActKind, Subject, plans};

/// The part that was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Lost {
    /// Topics, in Kafka or in PostgreSQL: lost, created again or emptied
    #[value(alias = "kafka")]
    #[serde(alias = "kafka")]
    Log,
    /// The ledger, restored from a backup
    Ledger,
    /// coderd's database, restored to an earlier time
    Coderd,
}

impl Lost {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Lost::Log => "log",
            Lost::Ledger => "ledger",
            Lost::Coderd => "coderd",
        }
    }
}

/// Show what can be restored after a loss, the risks, and the hash that identifies the plan when it
/// is executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// The part that was lost.
    #[arg(long)]
    pub lost: Lost,
    /// Deployments to abandon: they no longer exist, and the recovery of a restored ledger does not
    /// wait for them. Also for an open recovery.
    #[arg(long, value_name = "DEPLOYMENT_ID")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<Uuid>,
}

/// Execute a planned recovery, if its changes are still the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct RecoverExecution {
    /// Hash of the plan.
    #[arg(long = "plan")]
    pub hash: String,
}

/// Effect of a recovery in numbers, and the hash that identifies the plan when it is executed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RecoverPlan {
    /// SHA-256 of the changes, in hexadecimal. Null if there is nothing to execute: nothing is
    /// lost, or a recovery is already open.
    pub hash: Option<String>,
    /// Findings, planned changes and risks.
    pub effect: RecoverEffect,
}

/// Findings, planned changes and risks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "loss", rename_all = "lowercase")]
pub enum RecoverEffect {
    /// Loss of topics.
    #[serde(alias = "kafka")]
    Log(LogEffect),
    /// Loss of the newest part of the ledger.
    Ledger(Box<LedgerEffect>),
    /// Loss of the newest part of coderd's database.
    Coderd(CoderdEffect),
}

impl RecoverEffect {
    /// The reason why there is nothing to execute, if so.
    #[must_use]
    pub fn nothing(&self) -> Option<String> {
        match self {
            RecoverEffect::Log(effect) => effect.nothing(),
            RecoverEffect::Ledger(effect) => effect.nothing(),
            RecoverEffect::Coderd(effect) => effect.nothing(),
        }
    }

    fn changes(&self) -> serde_json::Value {
        match self {
            RecoverEffect::Log(effect) => effect.changes(),
            RecoverEffect::Ledger(effect) => effect.changes(),
            RecoverEffect::Coderd(effect) => effect.changes(),
        }
    }
}

impl ApiRequest for RecoverRequest {
    type Answer = RecoverPlan;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/recoveries";
    const ANSWER: &'static str = "The effect and the risks. Only the plan is saved. Without a hash, nothing is lost. 404: the ledger does not know a source to \
                                abandon. 409: that source can be read or is not waited for, or this process lacks coderd's database.";
    const IS_LONG: bool = true;
}

impl Operation for RecoverRequest {
    async fn run(
        &self,
        Run { operations, progress, stop, .. }: Run<'_>,
    ) -> Result<RecoverPlan, OperationError> {
        let (plan, _) = operations.predict_recovery(self, progress, stop).await?;
        let Some(hash) = &plan.hash else { return Ok(plan) };
        let (asked, effect, now) = (
            serde_json::to_value(self)?,
            serde_json::to_value(&plan.effect)?,
            operations.ledger.clock.now(),
        );
        operations
            .ledger
            .run(async |conn| plans::save(conn, hash, "recover", &asked, &effect, now).await)
            .await?;
        Ok(plan)
    }
}

impl ApiRequest for RecoverExecution {
    type Answer = RecoverPlan;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/recoveries/execute";
    const ANSWER: &'static str = "The executed plan. 404: the hash is not known. 409: nothing is lost, the plan was executed, or the effect is not the planned one.";
    const IS_LONG: bool = true;
}

impl Operation for RecoverExecution {
    async fn run(
        &self,
        Run { operations, actor, progress, stop }: Run<'_>,
    ) -> Result<RecoverPlan, OperationError> {
        let hash = &self.hash;
        let unknown = || {
            OperationError::NotFound(format!(
                "no recovery was planned under {hash}: run `tallyline recover plan` and use the hash that it prints"
            ))
        };
        let kept = operations
            .ledger
            .run(async |conn| plans::load(conn, hash, "recover").await)
            .await?
            .ok_or_else(unknown)?;
        if kept.act_id.is_some() {
            return Err(OperationError::Forbidden(
                "this plan was executed before: plan again".to_owned(),
            ));
        }
        let request: RecoverRequest = serde_json::from_value(kept.request)?;
        let (plan, lost_ids) = operations.predict_recovery(&request, progress, stop).await?;
        if let Some(nothing) = plan.effect.nothing() {
            return Err(OperationError::Forbidden(nothing));
        }
        if plan.hash.as_ref() != Some(hash) {
            return Err(OperationError::plan_changed());
        }
        if !request.without.is_empty() && actor.reason.trim().is_empty() {
            let message = "abandoning a source needs a reason: what happened there after the backup may never be counted".to_owned();
            return Err(OperationError::Invalid { field: "reason", message });
        }
        let detail = serde_json::to_value(&plan.effect)?;
        let act = actor.act(ActKind::Recover, Subject::Named(request.lost.as_str()), detail);
        let done = match &plan.effect {
            RecoverEffect::Log(effect) => log::execute(operations, effect, &act, hash).await?,
            RecoverEffect::Ledger(effect) => {
                ledger::execute(operations, effect, &act, hash).await?
            }
            RecoverEffect::Coderd(effect) => {
                coderd::execute(operations, effect, &lost_ids, &act, hash).await?
            }
        };
        if done { Ok(plan) } else { Err(OperationError::plan_changed()) }
    }
}

impl Operations {
    /// Computes the plan, and the ids of the events that coderd has lost.
    async fn predict_recovery(
        &self,
        request: &RecoverRequest,
        progress: Progress<'_>,
        stop: &CancellationToken,
    ) -> Result<(RecoverPlan, Vec<String>), OperationError> {
        if request.lost != Lost::Ledger && !request.without.is_empty() {
            let message = "has a meaning only for a ledger that was restored".to_owned();
            return Err(OperationError::Invalid { field: "without", message });
        }
        let (effect, lost_ids) = match request.lost {
            Lost::Log => (RecoverEffect::Log(log::predict(self).await?), Vec::new()),
            Lost::Ledger => (
                RecoverEffect::Ledger(Box::new(ledger::predict(self, &request.without).await?)),
                Vec::new(),
            ),
            Lost::Coderd => {
                let (effect, lost_ids) = coderd::predict(self, progress, stop).await?;
                (RecoverEffect::Coderd(effect), lost_ids)
            }
        };
        // hash the changes, not the numbers that live traffic moves
        let hash = match effect.nothing() {
            None => Some(plan_hash(&(request.lost.as_str(), effect.changes()))?),
            Some(_) => None,
        };
        Ok((RecoverPlan { hash, effect }, lost_ids))
    }
}
