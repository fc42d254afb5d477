//! What retention removes, and for how long it is kept.

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use crate::words::words;

/// The lease of the one process that prunes.
pub const LEASE: &str = "prune";

/// Rows per transaction. A request is removed as a whole, so a transaction can have the attempts of
/// one request more.
pub(super) const ROWS_AT_ONCE: i64 = 500;

/// Days for which executed and unused plans are kept.
const PLAN_DAYS: u32 = 90;
/// Days for which snapshots of former stages and rules versions are kept, for a return to an
/// earlier version of the program.
const SNAPSHOT_DAYS: u32 = 30;

words! {
    /// What retention removes.
    PruneKind {
        /// Headers and bodies of ended rejects.
        RejectPayloads = "reject_payloads",
        /// Attempts of settled publications, and the errors of their requests.
        Attempts = "attempts",
        /// Plans that were executed or are old, with their ranges.
        Plans = "plans",
        /// Snapshots of former stages and rules versions.
        Snapshots = "snapshots",
    }
}

/// Settings of retention, in days. 0: for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    pub reject_payload_days: u32,
    pub attempt_days: u32,
}

impl PruneKind {
    /// Days for which the kind is kept; 0: for ever.
    #[must_use]
    pub fn days(self, retention: Retention) -> u32 {
        match self {
            PruneKind::RejectPayloads => retention.reject_payload_days,
            PruneKind::Attempts => retention.attempt_days,
            PruneKind::Plans => PLAN_DAYS,
            PruneKind::Snapshots => SNAPSHOT_DAYS,
        }
    }

    /// What ended before this instant is due. None: it is kept for ever.
    #[must_use]
    pub fn due_before(self, retention: Retention, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let days = self.days(retention);
        (days > 0).then(|| now.checked_sub_signed(TimeDelta::days(days.into()))).flatten()
    }
}

/// The place of the last row that a page has examined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrunePlace {
    /// A reject, by the act that ended it.
    Reject { act_id: i64, id: i64 },
    /// A request, by the time when it was sent.
    Request(DateTime<Utc>, Uuid),
}

/// A row that is due, or a request with its attempts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    pub(super) key: DueKey,
    /// Where a page begins that follows this row; none: at the start of the kind.
    pub place: Option<PrunePlace>,
    /// Rows that its removal counts.
    pub rows: i64,
    /// Bytes of its values, before compression, without indexes.
    pub bytes: i64,
    /// When it ended.
    pub ended_at: DateTime<Utc>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DueKey {
    Reject { id: i64, act_id: i64 },
    Request(Uuid),
    Plan(String),
    Snapshot { stage: String, rules_version: i32, incarnation: Uuid, sequence: i64 },
}

/// A page of due rows, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DuePage {
    pub due: Vec<Due>,
    /// Examined rows that stay as evidence: their batch did not match its digest when it was last
    /// compared.
    pub kept: i64,
    /// Where the next page begins; none: there is none.
    pub next: Option<PrunePlace>,
}

/// Splits due rows of a page into those of one transaction each.
#[must_use]
pub fn transactions(due: &[Due]) -> Vec<&[Due]> {
    let (mut parts, mut begin, mut rows) = (Vec::new(), 0, 0);
    for (index, one) in due.iter().enumerate() {
        rows += one.rows.max(1);
        if rows >= ROWS_AT_ONCE {
            parts.push(&due[begin..=index]);
            (begin, rows) = (index + 1, 0);
        }
    }
    if begin < due.len() {
        parts.push(&due[begin..]);
    }
    parts
}
