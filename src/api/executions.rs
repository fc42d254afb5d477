//! Executions of plans. Each is a task of this process that continues without a waiting caller.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::ToSchema;

use super::Serving;
use super::answer::Problem;
use super::asked::{Change, Query};
use super::plans::{PlanProblem, PlanStanding, PlanState, shown};
use crate::ledger::replays;
use crate::operations::{Desk, OperationError, ReplayExecution};

/// A request waits this long for a result: an unknown or changed plan, or a short execution.
const AT_ONCE: Duration = Duration::from_secs(2);

/// One plan.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct OnePlan {
    /// Hash of the plan.
    hash: String,
}

pub(super) async fn execute(
    State(serving): State<Arc<Serving>>,
    change: Change<ReplayExecution>,
) -> Result<(StatusCode, Json<PlanStanding>), Problem> {
    if kept(&serving.api.desk, &change.asked.hash).await.is_ok_and(|kept| kept.state == PlanState::Finished) {
        return Err(OperationError::Forbidden("this plan was executed to its end: plan again".to_owned()).into());
    }
    let mut told = serving.executions.begin(&serving.api.desk, &serving.stop, change.asked, change.actor);
    let over = told.wait_for(|standing| standing.state != PlanState::Running);
    // if it is still running, the caller asks again later
    let _ = tokio::time::timeout(AT_ONCE, over).await.map(|ended| ended.is_ok());
    let standing = shown(&told);
    match standing.problem {
        Some(PlanProblem { status, message }) => Err(Problem::with_status(status, message)),
        None => Ok((StatusCode::ACCEPTED, Json(standing))),
    }
}

pub(super) async fn standing(State(serving): State<Arc<Serving>>, asked: Query<OnePlan>) -> Result<Json<PlanStanding>, Problem> {
    let kept = || kept(&serving.api.desk, &asked.hash);
    Ok(Json(match serving.executions.of(&asked.hash) {
        // another process may have executed it since
        Some(failed) if failed.state == PlanState::Failed => {
            Some(kept().await?).filter(|kept| kept.state == PlanState::Finished).unwrap_or(failed)
        }
        Some(standing) => standing,
        None => kept().await?,
    }))
}

/// The state of a plan according to the ledger.
async fn kept(desk: &Desk, hash: &str) -> Result<PlanStanding, OperationError> {
    let planned = desk.ledger.run(async |conn| replays::load(conn, hash).await).await?;
    let planned = planned.ok_or_else(|| OperationError::NotFound(format!("nothing was planned under {hash}")))?;
    let offsets = |number: i64| u64::try_from(number).unwrap_or_default();
    let done = planned.ranges.iter().map(|range| offsets(range.next_offset - range.first_offset)).sum();
    let total = planned.ranges.iter().map(|range| offsets(range.end_offset - range.first_offset)).sum();
    let state = match (planned.started, planned.finished) {
        (_, true) => PlanState::Finished,
        (true, false) => PlanState::Begun,
        (false, false) => PlanState::Planned,
    };
    Ok(PlanStanding::of(hash, state, done, total))
}
