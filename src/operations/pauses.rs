//! Pauses and resumes. An operation that an operator paused stays paused in all processes, also over restarts, until it is resumed.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Actor, Desk, OperationError};
use crate::event::Topic;
use crate::ledger::{ActKind, Ledger, Pausable, Pause, PublishStop, Subject, pauses, publish_marks};

/// What to pause or to resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// Operation to pause or resume.
    pub operation: Pausable,
    /// Full name of the topic; only for `consume`. Without it, all topics.
    #[serde(default)]
    pub topic: Option<String>,
}

/// A deployment whose coderd no longer publishes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CoderdCutOff {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
}

/// Current pauses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pauses {
    /// Each pause in force.
    pub pauses: Vec<Pause>,
}

impl Desk {
    /// Current pauses, with actor and reason.
    pub async fn pauses(&self) -> Result<Pauses, OperationError> {
        Ok(Pauses { pauses: self.ledger.run(pauses::list).await? })
    }

    /// Pauses an operation in all processes, within seconds. Work in flight is finished; no new work begins. A pause loses nothing: the
    /// pending work is done after the resume.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] without a reason or for a wrong topic; [`OperationError::Forbidden`] if already paused, with the actor.
    pub async fn pause(&self, request: &PauseRequest, actor: &Actor) -> Result<Pause, OperationError> {
        let topic = topic(request)?;
        actor.require_reason()?;
        let paused = self
            .ledger
            .run(async |conn| pauses::begin(conn, request.operation, topic, &actor.name, &actor.reason, self.ledger.clock.now()).await)
            .await?;
        paused.map_err(|held| OperationError::Forbidden(held.to_string()))
    }

    /// Ends a pause, and returns it.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] for a wrong topic; [`OperationError::Forbidden`] if not paused, with the current pauses.
    pub async fn resume(&self, request: &PauseRequest, actor: &Actor) -> Result<Pause, OperationError> {
        let topic = topic(request)?;
        let resumed = self
            .ledger
            .run(async |conn| pauses::end(conn, request.operation, topic, &actor.name, &actor.reason, self.ledger.clock.now()).await)
            .await?;
        resumed.map_err(|held| {
            let of = topic.map(|topic| format!(" of {topic}")).unwrap_or_default();
            let others: String = held.iter().map(|pause| format!("; {pause}")).collect();
            OperationError::Forbidden(format!("{}{of} is not paused{others}", request.operation.as_str()))
        })
    }
}

impl Desk {
    /// Allows publishing again after coderd published by itself. From now on only a later publish mark of coderd stops it.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] without a reason; [`OperationError::NotFound`] if publishing for the deployment is not stopped.
    pub async fn coderd_cut_off(&self, request: &CoderdCutOff, actor: &Actor) -> Result<PublishStop, OperationError> {
        actor.require_reason()?;
        let detail = serde_json::Value::default();
        let act = actor.act(ActKind::Resume, Subject::Named("publish"), detail);
        let ended =
            self.ledger.run(async |conn| publish_marks::end_stop(conn, request.deployment_id, &act, self.ledger.clock.now()).await).await?;
        let not_stopped = || format!("publishing of deployment {} has not stopped for coderd's own", request.deployment_id);
        ended.ok_or_else(|| OperationError::NotFound(not_stopped()))
    }
}

/// Refuses a paused operation.
///
/// # Errors
/// [`OperationError::Forbidden`] with the actor and the reason of the pause.
pub async fn refuse_paused(ledger: &Ledger, operation: Pausable) -> Result<(), OperationError> {
    let pauses = ledger.run(pauses::list).await?;
    match pauses.iter().find(|pause| pause.operation == operation && pause.topic.is_none()) {
        Some(pause) => Err(OperationError::Forbidden(pause.to_string())),
        None => Ok(()),
    }
}

fn topic(request: &PauseRequest) -> Result<Option<Topic>, OperationError> {
    let Some(name) = &request.topic else { return Ok(None) };
    let invalid = |message| Err(OperationError::Invalid { field: "topic", message });
    if request.operation != Pausable::Consume {
        return invalid(format!("has no meaning for {}: only consume goes by topics", request.operation.as_str()));
    }
    match name.parse::<Topic>().ok() {
        Some(topic) => Ok(Some(topic)),
        None => invalid(format!("{name:?} is no topic: one of {}", Topic::ALL.map(Topic::name).join(", "))),
    }
}
