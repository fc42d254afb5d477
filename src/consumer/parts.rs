//! Splits a batch that the ledger does not accept as a whole.

use crate::event::RejectCause;
use crate::ledger::{Arrival, Disposition, Refusal, StatementError};

/// Records of one partition that are recorded together, and the position after them.
pub(super) struct Part {
    pub arrivals: Vec<Arrival>,
    pub next_offset: i64,
}

impl Part {
    /// Two halves, the later one first. A part of fewer than two records remains unchanged.
    pub fn halves(mut self) -> Vec<Part> {
        if self.arrivals.len() < 2 {
            return vec![self];
        }
        let later = self.arrivals.split_off(self.arrivals.len() / 2);
        let middle = later[0].offset;
        vec![
            Part { arrivals: later, next_offset: self.next_offset },
            Part { arrivals: self.arrivals, next_offset: middle },
        ]
    }

    /// The parts to retry after PostgreSQL refused the data, the last one first. Halves narrow it
    /// down to one event, which becomes a reject. None: the part has no event that can be the
    /// cause.
    pub fn narrow(mut self, error: &StatementError) -> Option<Vec<Part>> {
        match self.arrivals.as_mut_slice() {
            [] => None,
            [one] if one.event.is_err() => None,
            [one] => {
                one.event = Err(Refusal {
                    disposition: Disposition::Rejected,
                    cause: RejectCause::Ledger,
                    detail: crate::cause::text(error),
                });
                Some(vec![self])
            }
            _ => Some(self.halves()),
        }
    }
}
