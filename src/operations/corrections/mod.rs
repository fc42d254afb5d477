//! Corrections: set accepted events to coderd's rows, with a plan first.
//!
//! The plan reads coderd's rows. The execution computes it again and writes it only if its hash is
//! the same, so that exactly the planned content becomes the events' content.

mod candidates;
mod effect;
mod metrics;
mod request;

pub use effect::{FamilyChange, VendorNote};
pub use request::CorrectionRequest;

use std::time::Duration;

use axum::http::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use uuid::Uuid;

use self::candidates::Candidate;
use super::effect::WindowEffect;
use super::plan_hash::plan_hash;
use super::{Actor, ApiRequest, EventId, Operation, OperationError, Operations, Run};
use crate::ledger::{
    ActKind, Correction, NewCorrection, PublicationState, Sequence, Subject, corrections,
};

/// How long an execution waits for requests in flight.
const IN_FLIGHT_WAIT: Duration = Duration::from_secs(20);

/// Compute the correction again and execute it if its hash is equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CorrectionExecution {
    /// The request of the plan.
    pub correction: CorrectionRequest,
    /// Hash that the plan of the same request has.
    pub hash: String,
}

/// Effect of a correction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CorrectionPlan {
    /// SHA-256 of the corrections and their effect, in hexadecimal.
    pub hash: String,
    /// Id of the deployment.
    pub deployment: Uuid,
    /// The corrected events.
    pub events: Vec<PlannedCorrection>,
    /// Managed agents in the usage period of each license that changes. They change with the
    /// execution.
    pub licenses: Vec<WindowEffect>,
    /// What the next rebuild of metrics changes. Series do not fall before it: `rebuild plan
    /// metrics` shows each one, and its execution needs `allow_decrease`.
    pub metrics: Vec<FamilyChange>,
    /// Events that the vendor has or may have billed, to be settled with the vendor.
    pub vendor: Vec<VendorNote>,
}

/// The correction of one event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlannedCorrection {
    /// Id of the event.
    pub event_id: String,
    /// The event in the ledger, a CloudEvent in structured form; absent: it was corrected to
    /// nothing before.
    #[schema(value_type = Option<Object>)]
    pub before: Option<Value>,
    /// The event by coderd's row; absent: coderd does not have it.
    #[schema(value_type = Option<Object>)]
    pub after: Option<Value>,
    /// The fields that differ, if the event has a content before and after.
    pub differs: Vec<String>,
    /// Whether coderd is known to have had the event as it is in the ledger. Only the fields of the
    /// digest are compared for it.
    pub confirmed: bool,
    /// State of the publication; only of usage.
    pub publication: Option<PublicationState>,
    /// State of the publication after the correction.
    pub publication_after: Option<PublicationState>,
}

/// An executed correction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Corrected {
    /// Ledger sequence of the correction: from it on the events have the corrected content.
    pub sequence: Sequence,
    /// The effect, as planned; absent: an earlier request has executed this plan.
    pub plan: Option<CorrectionPlan>,
}

impl ApiRequest for CorrectionRequest {
    type Answer = CorrectionPlan;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/corrections";
    const ANSWER: &'static str = "The effect. Nothing is written. 404: an event is not accepted. 409: an event equals coderd's row, or coderd belongs to another source.";
    const IS_LONG: bool = true;
}

impl Operation for CorrectionRequest {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<CorrectionPlan, OperationError> {
        Ok(operations.plan_correction(self).await?.plan)
    }
}

impl ApiRequest for CorrectionExecution {
    type Answer = Corrected;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/corrections/execute";
    const ANSWER: &'static str = "The sequence and the effect. 409: the effect is not the planned one, or a request to the vendor is in flight.";
    const NEEDS_REASON: bool = true;
    const IS_LONG: bool = true;
}

impl Operation for CorrectionExecution {
    async fn run(
        &self,
        Run { operations, actor, .. }: Run<'_>,
    ) -> Result<Corrected, OperationError> {
        let ids: Vec<String> = self.correction.ids()?.iter().map(EventId::whole).collect();
        let ledger = &operations.ledger;
        let executed =
            ledger.run(async |conn| corrections::executed(conn, &self.hash, &ids).await).await?;
        if let Some(act) = executed {
            return Ok(Corrected { sequence: act.sequence, plan: None });
        }
        let deadline = tokio::time::Instant::now() + IN_FLIGHT_WAIT;
        let deployment = self.correction.source.or(operations.deployment);
        // a request in flight changes the plan until its answer is recorded
        let in_flight = async || {
            ledger.run(async |conn| corrections::in_flight(conn, deployment, &ids).await).await
        };
        loop {
            let mut leased = in_flight().await?;
            if leased.is_none() {
                let planned = operations.plan_correction(&self.correction).await?;
                leased = match operations.record_correction(&planned, &self.hash, actor).await? {
                    Correction::Done(sequence) => {
                        return Ok(Corrected { sequence, plan: Some(planned.plan) });
                    }
                    Correction::InFlight(event_id) => Some(event_id),
                    Correction::Changed => in_flight().await?,
                };
            }
            let event_id = leased.ok_or_else(OperationError::plan_changed)?;
            if tokio::time::Instant::now() >= deadline {
                return Err(OperationError::Forbidden(format!(
                    "{event_id}: a publisher has leased it, and a request may be in flight: run `tallyline pause publish`, wait a minute, and execute the plan again"
                )));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

/// A plan, with its rows.
struct Planned {
    plan: CorrectionPlan,
    source_id: i16,
    corrections: Vec<NewCorrection>,
}

impl Operations {
    async fn plan_correction(
        &self,
        request: &CorrectionRequest,
    ) -> Result<Planned, OperationError> {
        let ids = request.ids()?;
        let (source, candidates) = self.correction_candidates(&ids, request.source).await?;
        for candidate in &candidates {
            candidate.check(request.allow_confirmed)?;
        }
        let effect = self.correction_effect(&source, &candidates).await?;
        let events: Vec<PlannedCorrection> = candidates.iter().map(Candidate::planned).collect();
        let hash = plan_hash(&(
            source.deployment_id,
            &events,
            candidates
                .iter()
                .map(|one| one.new.publication.is_some_and(|now| now.unanswered))
                .collect::<Vec<_>>(),
            effect.licenses.iter().map(gain).collect::<Vec<_>>(),
        ))?;
        Ok(Planned {
            plan: CorrectionPlan {
                hash,
                deployment: source.deployment_id,
                events,
                licenses: effect.licenses,
                metrics: effect.metrics,
                vendor: effect.vendor,
            },
            source_id: source.id,
            corrections: candidates.into_iter().map(|candidate| candidate.new).collect(),
        })
    }
}

impl Operations {
    /// Writes the corrections if the plan has this hash.
    async fn record_correction(
        &self,
        planned: &Planned,
        hash: &str,
        actor: &Actor,
    ) -> Result<Correction, OperationError> {
        if planned.plan.hash != hash {
            return Ok(Correction::Changed);
        }
        let detail = json!({ "events": planned.plan.events.len(), "vendor": planned.plan.vendor });
        let act = actor.act(ActKind::Correct, Subject::Named(hash), detail);
        let now = self.ledger.clock.now();
        let recorded = self.ledger.run(async |conn| {
            corrections::record(conn, planned.source_id, &planned.corrections, &act, now).await
        });
        Ok(recorded.await?)
    }
}

/// The change of a license window. Live events may move both counts together.
fn gain(window: &WindowEffect) -> impl Serialize + use<> {
    let change = i128::from(window.after) - i128::from(window.before);
    (window.license_id, window.start, window.end, change.to_string())
}

impl Candidate {
    fn planned(&self) -> PlannedCorrection {
        let NewCorrection { event_id, before, after, publication, .. } = &self.new;
        PlannedCorrection {
            event_id: event_id.clone(),
            before: before.as_ref().map(|event| event.to_structured()),
            after: after.as_ref().map(|event| event.to_structured()),
            differs: self.differs(),
            confirmed: self.confirmed,
            publication: publication.map(|now| now.state),
            publication_after: publication.map(|now| now.state_after(after.is_none())),
        }
    }
}
