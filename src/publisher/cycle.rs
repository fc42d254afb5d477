//! The result of one cycle.

use crate::ledger::{Attempt, AttemptVerdict, Settled};
use crate::tallyman::SendError;

/// The result of one cycle. Events are counted by their recorded verdicts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cycle {
    pub requests: usize,
    /// Events that the vendor accepted.
    pub accepted: usize,
    /// Events that the vendor refused permanently.
    pub refused: usize,
    /// Events that the vendor refused for now.
    pub refused_for_now: usize,
    /// Events that the answer did not name.
    pub left_out: usize,
    pub settled: Settled,
    /// Events not sent, because coderd's row differs or is gone. In shadow mode: differences.
    pub held_back: usize,
    /// Events that wait: coderd has just reserved them, or in shadow mode has not published them
    /// yet.
    pub waiting: usize,
    /// The failed request that ended the cycle; the first one of several. Or the vendor refused
    /// requests for their content, and answered none with verdicts.
    pub failure: Option<SendError>,
}

impl Cycle {
    /// Whether the source waits longer after each such cycle. A refusal for its content holds back
    /// only its events, which have waits of their own.
    pub(super) fn is_failed(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| !failure.is_refused_for_its_content())
    }

    /// Counts the recorded attempts of a request.
    pub(super) fn count(&mut self, attempts: &[Attempt]) {
        self.requests += 1;
        for attempt in attempts {
            match attempt.verdict {
                AttemptVerdict::Accepted => self.accepted += 1,
                AttemptVerdict::Refused => self.refused += 1,
                AttemptVerdict::RefusedForNow => self.refused_for_now += 1,
                AttemptVerdict::LeftOut => self.left_out += 1,
                AttemptVerdict::Failed => {}
            }
        }
    }

    /// Adds the work of a lane.
    pub(super) fn add(&mut self, lane: Cycle) {
        self.requests += lane.requests;
        self.accepted += lane.accepted;
        self.refused += lane.refused;
        self.refused_for_now += lane.refused_for_now;
        self.left_out += lane.left_out;
        self.settled.not_ours += lane.settled.not_ours;
        self.settled.expired += lane.settled.expired;
        self.settled.unknown += lane.settled.unknown;
        self.held_back += lane.held_back;
        self.waiting += lane.waiting;
        self.failure = self.failure.take().or(lane.failure);
    }
}
