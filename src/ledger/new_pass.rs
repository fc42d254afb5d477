//! A pass before it is recorded.

use chrono::{DateTime, Utc};

use crate::event::{Message, TopicPartition};

/// A pass whose records the log has acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewPass {
    pub source_id: i16,
    /// When the pass began.
    pub started_at: DateTime<Utc>,
    /// The log has everything that coderd committed before this instant. None: not known.
    pub complete_until: Option<DateTime<Utc>>,
    /// Every hour before this one has its runtime row or is over 7 days old.
    pub runtime_complete_until: Option<DateTime<Utc>>,
    /// Whether the pass read everything, not only recent rows.
    pub full_sweep: bool,
    /// Events that the pass appended to the log.
    pub produced: i32,
    /// Of these, events that an earlier pass had reported complete.
    pub late: i32,
    /// The end of each partition after the pass. All records of this and earlier passes are below
    /// it.
    pub offsets: Vec<(TopicPartition, i64)>,
    /// The last record of each partition appended since the previous pass, for a log in the
    /// ledger's database. A failover may have lost it.
    pub last_records: Vec<(TopicPartition, i64, Message)>,
    /// The pass that this one relies on, by id and start. If it is not the newest, the ledger is
    /// restored.
    pub previous: Option<(i64, DateTime<Utc>)>,
    /// Passes after this id are not settled: their records may still be rejected. None: passes
    /// settle once the log is read up to them.
    pub unproven_after: Option<i64>,
    /// Requested event ids that the pass has looked up.
    pub fetched: Vec<String>,
    /// The mark of the requested sweep that the pass fulfils.
    pub requested_sweep: Option<DateTime<Utc>>,
}
