//! Recover: what can be restored from where after a loss, what is at risk in numbers, and then doing it.
//!
//! A plan is kept under a hash of what it would change; it is executed only while it would change exactly that.

mod coderd;
mod kafka;
mod ledger;
mod lookout;

pub use coderd::{CoderdEffect, LostEvents};
pub use kafka::{KafkaEffect, PartitionToBegin};
pub use ledger::{LedgerEffect, SourceNotWaitedFor};
pub use lookout::Lookout;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;
use uuid::Uuid;

use super::plan_hash::plan_hash;
use super::{Actor, Desk, OperationError};
use crate::ledger::{ActKind, Subject};

/// What was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Lost {
    /// Topics that were lost, made anew or emptied, in Kafka or in PostgreSQL
    Kafka,
    /// The ledger, restored from a backup
    Ledger,
    /// coderd's database, restored to an earlier time
    Coderd,
}

impl Lost {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Lost::Kafka => "kafka",
            Lost::Ledger => "ledger",
            Lost::Coderd => "coderd",
        }
    }
}

/// What is to be planned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecoverRequest {
    /// What was lost.
    pub lost: Lost,
    /// Deployments that are not there any more, and that the recovery of a restored ledger is not to wait for; also of one that is open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<Uuid>,
}

/// Which plan is to be executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecoverExecution {
    /// The hash that the plan has.
    pub hash: String,
}

/// What would be done, in numbers, and the hash by which exactly this is executed; or that there is nothing to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RecoverPlan {
    /// SHA-256 of what would be changed, in hexadecimal. Null where nothing is lost, or what is lost is being recovered: there is nothing to
    /// execute.
    pub hash: Option<String>,
    /// What was found, what would be done, and what is at risk.
    pub effect: RecoverEffect,
}

/// What was found, what would be done, and what is at risk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "loss", rename_all = "lowercase")]
pub enum RecoverEffect {
    /// Of topics.
    Kafka(KafkaEffect),
    /// Of the ledger's newest part.
    Ledger(Box<LedgerEffect>),
    /// Of coderd's newest part.
    Coderd(CoderdEffect),
}

impl RecoverEffect {
    /// Why there is nothing to execute, if so.
    #[must_use]
    pub fn nothing(&self) -> Option<String> {
        match self {
            RecoverEffect::Kafka(effect) => effect.nothing(),
            RecoverEffect::Ledger(effect) => effect.nothing(),
            RecoverEffect::Coderd(effect) => effect.nothing(),
        }
    }

    fn changes(&self) -> serde_json::Value {
        match self {
            RecoverEffect::Kafka(effect) => effect.changes(),
            RecoverEffect::Ledger(effect) => effect.changes(),
            RecoverEffect::Coderd(effect) => effect.changes(),
        }
    }
}

/// How a comparison goes on: so many more of so many are done.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

impl Desk {
    /// Looks at what was lost, and keeps the plan where there is anything to execute. Changes nothing else.
    ///
    /// # Errors
    /// [`OperationError::NotFound`] for a source that the ledger does not know, [`OperationError::Forbidden`] for one that is there or not
    /// waited for; the databases' and the log's.
    pub async fn plan_recovery(
        &self,
        request: &RecoverRequest,
        progress: Progress<'_>,
        stop: &CancellationToken,
    ) -> Result<RecoverPlan, OperationError> {
        let (plan, _) = self.foresee_recovery(request, progress, stop).await?;
        let Some(hash) = &plan.hash else { return Ok(plan) };
        let (asked, effect) = (serde_json::to_value(request)?, serde_json::to_value(&plan.effect)?);
        self.ledger.in_time(self.ledger.keep_plan(hash, "recover", &asked, &effect)).await?;
        Ok(plan)
    }

    /// Executes the plan of that hash, if it would still change exactly what was planned. Answers what was done.
    ///
    /// # Errors
    /// [`OperationError::NotFound`] for an unknown hash, [`OperationError::Forbidden`] where the effect is another by now or there is nothing
    /// to do, [`OperationError::Invalid`] where a source is given up without a reason; then nothing was changed.
    pub async fn execute_recovery(
        &self,
        RecoverExecution { hash }: &RecoverExecution,
        actor: &Actor,
        progress: Progress<'_>,
        stop: &CancellationToken,
    ) -> Result<RecoverPlan, OperationError> {
        let unknown = || {
            OperationError::NotFound(format!(
                "no recovery was planned under {hash}: run `tallyline recover plan` and use the hash that it prints"
            ))
        };
        let kept = self.ledger.in_time(self.ledger.kept_plan(hash, "recover")).await?.ok_or_else(unknown)?;
        if kept.act_id.is_some() {
            return Err(OperationError::Forbidden("this plan was executed before: plan again".to_owned()));
        }
        let request: RecoverRequest = serde_json::from_value(kept.request)?;
        let (plan, lost_ids) = self.foresee_recovery(&request, progress, stop).await?;
        if let Some(nothing) = plan.effect.nothing() {
            return Err(OperationError::Forbidden(nothing));
        }
        if plan.hash.as_ref() != Some(hash) {
            return Err(OperationError::plan_changed());
        }
        if !request.without.is_empty() && actor.reason.trim().is_empty() {
            let message = "giving up a source needs a reason: what happened there after the backup may never be counted".to_owned();
            return Err(OperationError::Invalid { field: "reason", message });
        }
        let detail = serde_json::to_value(&plan.effect)?;
        let act = actor.act(ActKind::Recover, Subject::Named(request.lost.as_str()), detail);
        let done = match &plan.effect {
            RecoverEffect::Kafka(effect) => kafka::execute(self, effect, &act, hash).await?,
            RecoverEffect::Ledger(effect) => ledger::execute(self, effect, &act, hash).await?,
            RecoverEffect::Coderd(effect) => coderd::execute(self, effect, &lost_ids, &act, hash).await?,
        };
        if done { Ok(plan) } else { Err(OperationError::plan_changed()) }
    }

    /// The plan, and the ids of events that coderd has lost.
    async fn foresee_recovery(
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
            Lost::Kafka => (RecoverEffect::Kafka(kafka::foresee(self).await?), Vec::new()),
            Lost::Ledger => (RecoverEffect::Ledger(Box::new(ledger::foresee(self, &request.without).await?)), Vec::new()),
            Lost::Coderd => {
                let (effect, lost_ids) = coderd::foresee(self, progress, stop).await?;
                (RecoverEffect::Coderd(effect), lost_ids)
            }
        };
        // over what would be changed, not over numbers that move beside live traffic
        let hash = match effect.nothing() {
            None => Some(plan_hash(&(request.lost.as_str(), effect.changes()))?),
            Some(_) => None,
        };
        Ok((RecoverPlan { hash, effect }, lost_ids))
    }
}
