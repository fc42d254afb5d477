//! Executions of plans. Each is a task of this process that continues without a waiting caller.

use crate::ledger::replays;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use super::Serving;
use super::answer::Problem;
use super::asked::Asked;
use crate::operations::{Actor, ApiRequest, Desk, OperationError, ReplayExecution, Replayed, Step};

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
    type Answer = PlanStanding;
    const PATH: &'static str = "/api/v1/plans/{hash}";
    const ANSWER: &'static str = "The state and the progress. 404: the hash is not known.";
}

impl ApiRequest for ReplayExecution {
    type Answer = PlanStanding;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/plans/{hash}/execute";
    const ANSWER: &'static str = "It is running or finished. 409: the effect is not the planned one, or the plan was executed.";
}

/// State of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanStanding {
    /// Hash of the plan.
    pub hash: String,
    /// State in one word.
    pub state: PlanState,
    /// Current activity, if this process executes the plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// Offsets read, of `total`. Kafka's offsets have gaps, so `done` may end below `total`.
    pub done: u64,
    /// Offsets to read.
    pub total: u64,
    /// Result of the execution, when this process has finished it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replayed: Option<Replayed>,
    /// Reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<PlanProblem>,
}

/// State of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PlanState {
    /// Not executed yet.
    Planned,
    /// Started, but not by this process: another process executes it, or it was interrupted. Another request to execute it resumes it.
    Begun,
    /// This process executes it.
    Running,
    /// This process failed to execute it. Another request to execute it resumes it, if the problem allows.
    Failed,
    /// Completely executed.
    Finished,
}

/// Why an execution failed, as an HTTP answer would report it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanProblem {
    /// HTTP status.
    pub status: u16,
    /// Reason of the failure.
    pub message: String,
}

/// The executions of this process, current and past, by the hash of their plan.
#[derive(Default)]
pub(super) struct Executions(Mutex<HashMap<String, watch::Receiver<PlanStanding>>>);

impl Executions {
    /// Starts the execution unless it is already running.
    fn begin(&self, serving: &Serving, request: ReplayExecution, actor: Actor) -> watch::Receiver<PlanStanding> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = all.get(&request.hash).filter(|told| shown(told).state == PlanState::Running) {
            return told.clone();
        }
        let (tell, told) = watch::channel(PlanStanding::of(&request.hash, PlanState::Running, 0, 0));
        all.insert(request.hash.clone(), told.clone());
        let (desk, stop) = (serving.api.desk.clone(), serving.stop.clone());
        tokio::spawn(async move {
            let progress = |step: Step| tell.send_modify(|standing| standing.step(step));
            let ended = desk.execute_replay(&request, &actor, &progress, &stop).await;
            tell.send_modify(|standing| standing.end(ended));
        });
        told
    }

    fn of(&self, hash: &str) -> Option<PlanStanding> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(hash).map(shown)
    }
}

impl PlanStanding {
    fn of(hash: &str, state: PlanState, done: u64, total: u64) -> Self {
        Self { hash: hash.to_owned(), state, doing: None, done, total, replayed: None, problem: None }
    }

    fn step(&mut self, step: Step) {
        (self.doing, self.done, self.total) = (Some(step.doing.to_owned()), step.done, step.total);
    }

    fn end(&mut self, ended: Result<Replayed, OperationError>) {
        self.doing = None;
        match ended {
            Ok(replayed) => (self.state, self.replayed) = (PlanState::Finished, Some(replayed)),
            Err(error) => self.fail(&error.into()),
        }
    }

    fn fail(&mut self, problem: &Problem) {
        self.state = PlanState::Failed;
        self.problem = Some(PlanProblem { status: problem.status.as_u16(), message: problem.message.clone() });
    }
}

/// The last reported state. If the task ended without a report, the execution has failed.
fn shown(told: &watch::Receiver<PlanStanding>) -> PlanStanding {
    let gone = told.has_changed().is_err();
    let mut standing = told.borrow().clone();
    if gone && standing.state == PlanState::Running {
        standing.fail(&Problem::internal(&"the execution of a plan broke off"));
    }
    standing
}

pub(super) async fn execute(
    State(serving): State<Arc<Serving>>,
    Asked { request, actor }: Asked<ReplayExecution>,
) -> Result<(StatusCode, Json<PlanStanding>), Problem> {
    if kept(&serving.api.desk, &request.hash).await.is_ok_and(|kept| kept.state == PlanState::Finished) {
        return Err(OperationError::Forbidden("this plan was executed to its end: plan again".to_owned()).into());
    }
    let mut told = serving.executions.begin(&serving, request, actor);
    let over = told.wait_for(|standing| standing.state != PlanState::Running);
    // if it is still running, the caller asks again later
    let _ = tokio::time::timeout(AT_ONCE, over).await.map(|ended| ended.is_ok());
    let standing = shown(&told);
    match standing.problem {
        Some(PlanProblem { status, message }) => Err(Problem::with_status(status, message)),
        None => Ok((StatusCode::ACCEPTED, Json(standing))),
    }
}

pub(super) async fn standing(State(serving): State<Arc<Serving>>, asked: Asked<ShowPlan>) -> Result<Json<PlanStanding>, Problem> {
    let kept = || kept(&serving.api.desk, &asked.request.hash);
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
