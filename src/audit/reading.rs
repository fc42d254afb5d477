//! The progress of an audit of everything, and how long it can be resumed.

use std::time::Duration;

use chrono::TimeDelta;

/// An interrupted audit can go on for this time.
pub(super) const RESUMABLE: TimeDelta = TimeDelta::hours(24);
/// The time between two saves of an audit's place.
pub(super) const SAVED_EVERY: Duration = Duration::from_secs(5);

/// What an audit reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditPhase {
    /// Rows of source and ledger.
    Source,
    /// Batches of the ledger.
    Ledger,
}

/// Gets the rows or batches that an audit has read, and their total, which may be an estimate.
pub type Report<'a> = &'a (dyn Fn(AuditPhase, i64, i64) + Send + Sync);
