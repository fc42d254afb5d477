//! Executions of plans: each is a task of this process, which goes on whether or not anybody waits for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use super::Serving;
use super::answer::Problem;
use super::asked::{Change, Query};
use crate::operations::{Actor, Desk, OperationError, ReplayExecution, Replayed, Step};

/// What is over within this time is answered at once: an unknown plan, one that has changed, a short one.
const AT_ONCE: Duration = Duration::from_secs(2);

/// One plan.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct OnePlan {
    /// Its hash.
    hash: String,
}

/// Where a plan stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanStanding {
    /// The plan's hash.
    pub hash: String,
    /// In one word.
    pub state: PlanState,
    /// What is being done, where this process executes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// Records of `total` offsets; Kafka's have gaps, then it ends before the total.
    pub done: u64,
    /// Offsets to be read.
    pub total: u64,
    /// What the execution recorded, once this process has finished it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replayed: Option<Replayed>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<PlanProblem>,
}

/// How far a plan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PlanState {
    /// Not executed yet.
    Planned,
    /// Begun, and not by this process: another executes it, or it was interrupted. To ask for its execution goes on with it.
    Begun,
    /// This process executes it.
    Running,
    /// This process could not go on. To ask for its execution goes on with it, where the problem allows.
    Failed,
    /// Executed to its end.
    Finished,
}

/// Why an execution failed, as an answer would have said it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanProblem {
    /// The HTTP status.
    pub status: u16,
    /// The reason.
    pub message: String,
}

/// What this process executes or has executed, by the plan's hash.
#[derive(Default)]
pub(super) struct Executions(Mutex<HashMap<String, watch::Receiver<PlanStanding>>>);

impl Executions {
    /// Begins, unless it is under way.
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
            let ended = desk.execute_replay(&request, &actor, progress, &stop).await;
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

/// As it was last told; a task that is gone without a word has broken off.
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
    change: Change<ReplayExecution>,
) -> Result<(StatusCode, Json<PlanStanding>), Problem> {
    if kept(&serving.api.desk, &change.asked.hash).await.is_ok_and(|kept| kept.state == PlanState::Finished) {
        return Err(OperationError::Forbidden("this plan was executed to its end: plan again".to_owned()).into());
    }
    let mut told = serving.executions.begin(&serving, change.asked, change.actor);
    let over = told.wait_for(|standing| standing.state != PlanState::Running);
    // not over yet: who asks looks again
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

/// As the ledger has it.
async fn kept(desk: &Desk, hash: &str) -> Result<PlanStanding, OperationError> {
    let planned = desk.ledger.in_time(desk.ledger.load_replay(hash)).await?;
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
