//! Executions of plans. Each is a task of this process that continues without a waiting caller.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Serving;
use super::answer::Problem;
use super::plans::{PlanProblem, PlanProgress, PlanState, shown};
use super::received::Received;
use crate::ledger::replays;
use crate::operations::{ApiRequest, OperationError, Operations, ReplayExecution};

/// A request waits this long for a result: an unknown or changed plan, or a short execution.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Show the state of a planned replay.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShowPlan {
    /// Hash of the plan.
    pub hash: String,
}

impl ApiRequest for ShowPlan {
    type Answer = PlanProgress;
    const PATH: &'static str = "/api/v1/plans/{hash}";
    const ANSWER: &'static str = "The state and the progress. 404: the hash is not known.";
}

impl ApiRequest for ReplayExecution {
    type Answer = PlanProgress;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/plans/{hash}/execute";
    const ANSWER: &'static str = "It is running or finished. 409: the effect is not the planned one, or the plan was executed.";
}

pub(super) async fn execute(
    State(serving): State<Arc<Serving>>,
    Received { request, actor }: Received<ReplayExecution>,
) -> Result<(StatusCode, Json<PlanProgress>), Problem> {
    if kept(&serving.api.operations, &request.hash)
        .await
        .is_ok_and(|kept| kept.state == PlanState::Finished)
    {
        return Err(OperationError::plan_finished().into());
    }
    let mut receiver =
        serving.executions.begin(&serving.api.operations, &serving.stop, request, actor);
    let ended = receiver.wait_for(|standing| standing.state != PlanState::Running);
    // if it is still running, the caller asks again later
    let _ = tokio::time::timeout(AT_ONCE, ended).await.map(|ended| ended.is_ok());
    let standing = shown(&receiver);
    match standing.problem {
        Some(PlanProblem { status, message }) => Err(Problem::with_status(status, message)),
        None => Ok((StatusCode::ACCEPTED, Json(standing))),
    }
}

pub(super) async fn plan_state(
    State(serving): State<Arc<Serving>>,
    asked: Received<ShowPlan>,
) -> Result<Json<PlanProgress>, Problem> {
    let kept = || kept(&serving.api.operations, &asked.request.hash);
    Ok(Json(match serving.executions.of(&asked.request.hash) {
        // another process may have executed it since
        Some(failed) if failed.state == PlanState::Failed => {
            Some(kept().await?).filter(|kept| kept.state == PlanState::Finished).unwrap_or(failed)
        }
        Some(standing) => standing,
        None => kept().await?,
    }))
}

/// The state of a plan according to the ledger.
async fn kept(operations: &Operations, hash: &str) -> Result<PlanProgress, OperationError> {
    let planned = operations.ledger.run(async |conn| replays::load(conn, hash).await).await?;
    let planned = planned.ok_or_else(|| OperationError::replay_not_planned(hash))?;
    let offsets = |number: i64| u64::try_from(number).unwrap_or_default();
    let done =
        planned.ranges.iter().map(|range| offsets(range.next_offset - range.first_offset)).sum();
    let total =
        planned.ranges.iter().map(|range| offsets(range.end_offset - range.first_offset)).sum();
    let state = match (planned.started, planned.finished) {
        (_, true) => PlanState::Finished,
        (true, false) => PlanState::Begun,
        (false, false) => PlanState::Planned,
    };
    Ok(PlanProgress::of(hash, state, done, total))
}
