//! A batch that the ledger does not take as a whole is recorded in parts.

use crate::event::RejectCause;
use crate::ledger::{Arrival, Refusal, Verdict};

/// Records of one partition that are recorded together, and the position behind them.
pub(super) struct Part {
    pub arrivals: Vec<Arrival>,
    pub next_offset: i64,
}

impl Part {
    /// Two halves, the later one first; a part of fewer than two records remains as it is.
    pub fn halves(mut self) -> Vec<Part> {
        if self.arrivals.len() < 2 {
            return vec![self];
        }
        let later = self.arrivals.split_off(self.arrivals.len() / 2);
        let middle = later[0].offset;
        vec![Part { arrivals: later, next_offset: self.next_offset }, Part { arrivals: self.arrivals, next_offset: middle }]
    }

    /// The parts in which to retry what PostgreSQL has refused, the last one first: halves find the event, and that one becomes a reject. None
    /// where no event is left that can be the cause.
    pub fn narrowed(mut self, error: &sqlx::Error) -> Option<Vec<Part>> {
        match self.arrivals.as_mut_slice() {
            [] => None,
            [one] if one.event.is_err() => None,
            [one] => {
                one.event = Err(Refusal { verdict: Verdict::Rejected, cause: RejectCause::Ledger, detail: crate::cause::text(error) });
                Some(vec![self])
            }
            _ => Some(self.halves()),
        }
    }
}
