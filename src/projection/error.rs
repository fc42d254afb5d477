//! Why a fold cannot go on.

use crate::stages::Broken;

/// Why a fold cannot go on. Only [`ProjectionError::Unavailable`] may pass; the others are broken promises, after which no state may be shown.
#[derive(Debug, thiserror::Error)]
pub enum ProjectionError {
    /// The ledger gives no answer, or one that this version cannot read.
    #[error("the ledger cannot be read: {}", crate::cause::text(.0))]
    Unavailable(#[from] sqlx::Error),
    /// Sequences have no holes.
    #[error("after sequence {after} the ledger has {found:?}: its order is broken")]
    Hole {
        /// The sequence that the fold has reached.
        after: i64,
        /// What came instead of the next; nothing, where the ledger says that there is more.
        found: Option<i64>,
    },
    /// A batch tells what no ledger tells.
    #[error("batch {sequence} cannot be folded: {source}")]
    Broken {
        /// The batch.
        sequence: i64,
        /// What it breaks.
        source: Broken,
    },
    /// A state has no JSON form.
    #[error("the state cannot be saved: {0}")]
    Unsaveable(#[source] serde_json::Error),
}
