//! The result of a pass.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::event::TopicPartition;

/// The result of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassReport {
    /// The ledger's id of the pass.
    pub pass_id: i64,
    /// Whether it read everything.
    pub full_sweep: bool,
    pub builds: i32,
    /// Prebuild claims appended to the log.
    pub claims: i32,
    pub usage: i32,
    /// Builds and usage that came after an earlier pass had reported completeness beyond their
    /// time.
    pub late: i32,
    /// The log has everything that coderd committed before this instant. None: completeness is not
    /// reported.
    pub complete_until: Option<DateTime<Utc>>,
    /// The hour before which every hour has its runtime row or is over 7 days old. None: not
    /// reported, or this coderd has no agent runtime.
    pub runtime_complete_until: Option<DateTime<Utc>>,
}

/// Ends of the appended records, and counts.
#[derive(Default)]
pub(super) struct PassTotals {
    pub(super) report: PassReport,
    pub(super) ends: HashMap<TopicPartition, i64>,
    /// Builds with an unknown value.
    pub(super) unreadable: HashSet<Uuid>,
    /// Rows read from coderd.
    pub(super) rows: i64,
}
