//! The plans that this process executes, and their states.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::answer::Problem;
use crate::operations::{Actor, OperationError, Operations, ReplayExecution, Replayed, Step};

/// State of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanProgress {
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
    /// Started, but not by this process: another process executes it, or it was interrupted.
    /// Another request to execute it resumes it.
    Begun,
    /// This process executes it.
    Running,
    /// This process failed to execute it. Another request to execute it resumes it, if the problem
    /// allows.
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
pub(super) struct Executions(Mutex<HashMap<String, watch::Receiver<PlanProgress>>>);

impl Executions {
    /// Starts the execution unless it is already running.
    pub(super) fn begin(
        &self,
        operations: &Operations,
        stop: &CancellationToken,
        request: ReplayExecution,
        actor: Actor,
    ) -> watch::Receiver<PlanProgress> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(receiver) =
            all.get(&request.hash).filter(|receiver| shown(receiver).state == PlanState::Running)
        {
            return receiver.clone();
        }
        let (sender, receiver) =
            watch::channel(PlanProgress::of(&request.hash, PlanState::Running, 0, 0));
        all.insert(request.hash.clone(), receiver.clone());
        let (operations, stop) = (operations.clone(), stop.clone());
        tokio::spawn(async move {
            let progress = |step: Step| sender.send_modify(|standing| standing.step(step));
            let ended = operations.execute_replay(&request, &actor, &progress, &stop).await;
            sender.send_modify(|standing| standing.end(ended));
        });
        receiver
    }

    pub(super) fn of(&self, hash: &str) -> Option<PlanProgress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(hash).map(shown)
    }
}

impl PlanProgress {
    pub(super) fn of(hash: &str, state: PlanState, done: u64, total: u64) -> Self {
        Self {
            hash: hash.to_owned(),
            state,
            doing: None,
            done,
            total,
            replayed: None,
            problem: None,
        }
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
        self.problem =
            Some(PlanProblem { status: problem.status.as_u16(), message: problem.message.clone() });
    }
}

/// The last reported state. If the task ended without a report, the execution has failed.
pub(super) fn shown(receiver: &watch::Receiver<PlanProgress>) -> PlanProgress {
    let gone = receiver.has_changed().is_err();
    let mut standing = receiver.borrow().clone();
    if gone && standing.state == PlanState::Running {
        standing.fail(&Problem::internal(&"the execution of a plan broke off"));
    }
    standing
}
