//! Pauses and resumes. An operation that an operator paused stays paused in all processes, also
//! over restarts, until it is resumed.

use axum::http::Method;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ApiRequest, Operation, OperationError, Run};
use crate::event::Topic;
use crate::ledger::{
    ActKind, LateAudit, Ledger, Pausable, Pause, PublishStop, Subject, late_audits, pauses,
    publish_marks,
};

/// Pause an operation in all processes until it is resumed.
///
/// Work in flight is finished, and new work does not begin. A pause loses nothing: the pending work
/// is done after the resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// Operation to pause.
    pub operation: Pausable,
    /// Full name of the topic; only for `consume`. Without it, all topics.
    #[arg(long)]
    #[serde(default)]
    pub topic: Option<String>,
}

/// Resume a paused operation in all processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ResumeRequest {
    /// Operation to resume.
    pub operation: Pausable,
    /// Full name of the topic; only for `consume`. Without it, all topics.
    #[arg(long)]
    #[serde(default)]
    pub topic: Option<String>,
}

/// Resume publishing after coderd published by itself.
///
/// From then on only a later publish mark of coderd stops it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CoderdCutOff {
    /// coderd's deployment id. Its own publishing must be cut off.
    pub deployment_id: Uuid,
}

/// Publish although an audit is late, until its joint is audited.
///
/// While no audit runs, a difference in the books holds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UnauditedPublishing {
    /// coderd's deployment id, for the late audit of this source; absent: for the late audits of the
    /// whole ledger.
    #[serde(default)]
    pub deployment_id: Option<Uuid>,
}

/// Audits that no longer hold publishing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OverriddenAudits {
    /// Each late joint, as it was before.
    pub joints: Vec<LateAudit>,
}

/// Show the current pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListPauses {}

/// Current pauses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pauses {
    /// Each pause in force.
    pub pauses: Vec<Pause>,
}

impl ApiRequest for ListPauses {
    type Answer = Pauses;
    const PATH: &'static str = "/api/v1/pauses";
    const ANSWER: &'static str = "Each pause in force.";
}

impl Operation for ListPauses {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<Pauses, OperationError> {
        Ok(Pauses { pauses: operations.ledger.run(pauses::list).await? })
    }
}

impl ApiRequest for PauseRequest {
    type Answer = Pause;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/pauses";
    const ANSWER: &'static str = "The new pause. 409: it is already paused.";
    const NEEDS_REASON: bool = true;
}

impl Operation for PauseRequest {
    async fn run(&self, Run { operations, actor, .. }: Run<'_>) -> Result<Pause, OperationError> {
        let topic = topic(self.operation, self.topic.as_deref())?;
        let now = operations.ledger.clock.now();
        let begin = operations.ledger.run(async |conn| {
            pauses::begin(conn, self.operation, topic, &actor.name, &actor.reason, now).await
        });
        begin.await?.map_err(|held| OperationError::Forbidden(held.to_string()))
    }
}

impl ApiRequest for ResumeRequest {
    type Answer = Pause;
    const METHOD: Method = Method::DELETE;
    const PATH: &'static str = "/api/v1/pauses/{operation}";
    const ANSWER: &'static str = "The ended pause. 409: it is not paused.";
}

impl Operation for ResumeRequest {
    async fn run(&self, Run { operations, actor, .. }: Run<'_>) -> Result<Pause, OperationError> {
        let topic = topic(self.operation, self.topic.as_deref())?;
        let now = operations.ledger.clock.now();
        let end = operations.ledger.run(async |conn| {
            pauses::end(conn, self.operation, topic, &actor.name, &actor.reason, now).await
        });
        end.await?.map_err(|held| {
            let of = topic.map(|topic| format!(" of {topic}")).unwrap_or_default();
            let others: String = held.iter().map(|pause| format!("; {pause}")).collect();
            OperationError::Forbidden(format!(
                "{}{of} is not paused{others}",
                self.operation.as_str()
            ))
        })
    }
}

impl ApiRequest for CoderdCutOff {
    type Answer = PublishStop;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/publish/coderd-cut-off";
    const ANSWER: &'static str =
        "The ended stop. 404: publishing of the deployment has not stopped.";
    const NEEDS_REASON: bool = true;
}

impl Operation for CoderdCutOff {
    async fn run(
        &self,
        Run { operations, actor, .. }: Run<'_>,
    ) -> Result<PublishStop, OperationError> {
        let act =
            actor.act(ActKind::Resume, Subject::Named("publish"), serde_json::Value::default());
        let (id, now) = (self.deployment_id, operations.ledger.clock.now());
        let ended = operations
            .ledger
            .run(async |conn| publish_marks::end_stop(conn, id, &act, now).await)
            .await?;
        ended.ok_or_else(|| {
            OperationError::NotFound(format!(
                "publishing of deployment {id} is not stopped by a publish mark of coderd"
            ))
        })
    }
}

impl ApiRequest for UnauditedPublishing {
    type Answer = OverriddenAudits;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/publish/unaudited";
    const ANSWER: &'static str = "The late joints. 404: no audit of them is late.";
    const NEEDS_REASON: bool = true;
}

impl Operation for UnauditedPublishing {
    async fn run(
        &self,
        Run { operations, actor, .. }: Run<'_>,
    ) -> Result<OverriddenAudits, OperationError> {
        let act =
            actor.act(ActKind::Resume, Subject::Named("publish"), serde_json::Value::default());
        let (id, now) = (self.deployment_id, operations.ledger.clock.now());
        let joints = operations
            .ledger
            .run(async |conn| late_audits::publish_without(conn, id, &act, now).await)
            .await?;
        if joints.is_empty() {
            let of = id.map_or_else(|| "the ledger".to_owned(), |id| format!("deployment {id}"));
            return Err(OperationError::NotFound(format!("no audit of {of} is late")));
        }
        Ok(OverriddenAudits { joints })
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

fn topic(operation: Pausable, name: Option<&str>) -> Result<Option<Topic>, OperationError> {
    let Some(name) = name else { return Ok(None) };
    let invalid = |message| Err(OperationError::Invalid { field: "topic", message });
    if operation != Pausable::Consume {
        return invalid(format!(
            "has no meaning for {}: only consume goes by topics",
            operation.as_str()
        ));
    }
    match name.parse::<Topic>().ok() {
        Some(topic) => Ok(Some(topic)),
        None => invalid(format!(
            "topic {name:?}: unknown; expected one of {}",
            Topic::ALL.map(Topic::name).join(", ")
        )),
    }
}
