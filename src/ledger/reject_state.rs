//! The state of a reject.

use crate::words::words;

words! {
    /// The state of a reject.
    RejectState {
        /// The reject waits for an act.
        Open = "open",
        /// An operator appended it to the log again.
        Resubmitted = "resubmitted",
        /// It was appended to the log again once its type or deployment was known.
        Admitted = "admitted",
        /// An operator abandoned it.
        Discarded = "discarded",
    }
}
