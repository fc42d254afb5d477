//! The range of time that one pass reads.

use chrono::{DateTime, TimeDelta, Utc};

/// How often a pass reaches back over the whole overlap, counted from the last such pass: coderd's
/// database reads all of its rows.
pub(super) const WIDE_INTERVAL: TimeDelta = TimeDelta::minutes(30);

/// What one pass reads, and the completeness that it may report.
pub(super) struct Bounds {
    /// Where an incremental pass begins; None: everything is read.
    pub(super) from: Option<DateTime<Utc>>,
    pub(super) complete_until: Option<DateTime<Utc>>,
    /// Where the next pass begins.
    pub(super) next_from: DateTime<Utc>,
    pub(super) now: DateTime<Utc>,
    /// When the pass began, by the process's clock.
    pub(super) started_at: DateTime<Utc>,
    /// Whether it reaches back over minutes.
    pub(super) overlaps: bool,
    /// Whether it reaches back over the whole overlap.
    pub(super) is_wide: bool,
    /// The mark of the sweep that an operator has requested.
    pub(super) requested_sweep: Option<DateTime<Utc>>,
}

/// `at` minus `span`, or the earliest time.
pub(super) fn before(at: DateTime<Utc>, span: TimeDelta) -> DateTime<Utc> {
    at.checked_sub_signed(span).unwrap_or(DateTime::<Utc>::MIN_UTC)
}

/// Whether `interval` has passed since `last`. A `last` far ahead of `now` comes from a wrong
/// clock, and also makes it due.
pub(super) fn is_due(last: Option<DateTime<Utc>>, now: DateTime<Utc>, interval: TimeDelta) -> bool {
    last.is_none_or(|last| now.signed_duration_since(last).abs() >= interval)
}
