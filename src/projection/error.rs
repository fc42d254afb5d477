//! Errors of a fold.

use crate::ledger::StatementError;
use crate::stages::LedgerFault;

/// Why a fold cannot go on. Only [`ProjectionError::Unavailable`] may pass. After any other error
/// the state must not be shown.
#[derive(Debug, thiserror::Error)]
pub enum ProjectionError {
    /// The ledger does not answer, or this version cannot read the answer.
    #[error("the ledger is not readable: {}", crate::cause::text(.0))]
    Unavailable(#[from] StatementError),
    /// A sequence is missing.
    #[error("the ledger's order has a hole: sequence {after} is followed by {found:?}")]
    Hole {
        after: i64,
        /// The next sequence in the ledger; None if the ledger has more batches but returns none.
        found: Option<i64>,
    },
    /// A batch breaks a rule of the ledger.
    #[error("batch {sequence} violates an invariant of the ledger: {source}")]
    LedgerFault {
        sequence: i64,
        /// The broken rule.
        source: LedgerFault,
    },
}
