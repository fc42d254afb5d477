//! The books that an audit compares, and the joints between them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use chrono::TimeDelta;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::coderd::Database;
use crate::ledger::{Difference, Ledger};
use crate::log::Log;

pub(super) use crate::ledger::{LOG_JOINT as LOG, SOURCE_JOINT as SOURCE, VENDOR_JOINT as VENDOR};

/// How far back usage can still be published: older differences are not at risk.
pub(super) const RECENT: TimeDelta = TimeDelta::days(30);

/// Numbers of a joint that a finding keeps: rows that coderd removed, recent usage (30 days), and
/// its differing part.
pub(super) const SOURCE_GONE: &str = "source_gone";
pub(super) const RECENT_USAGE: &str = "usage_of_30_days";
pub(super) const RECENT_USAGE_DIFFERS: &str = "usage_of_30_days_that_differs";

/// The parts that an audit compares.
#[derive(Clone)]
pub struct Audit {
    pub ledger: Ledger,
    /// The log from which the ledger was written.
    pub log: Log,
    /// coderd's database and its deployment id, if this process can read it.
    pub source: Option<(Database, uuid::Uuid)>,
    /// How long a whole audit waits for a collector pass that begins after a difference was seen.
    /// The continuous audit does not wait: a later step judges the difference.
    pub patience: Duration,
}

/// One joint: a pair of sides that must balance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Joint {
    /// The joint's name.
    pub name: Cow<'static, str>,
    /// Counts of the compared rows and records.
    pub numbers: BTreeMap<String, i64>,
    /// Differences: with any of them, the books do not balance.
    pub differences: Vec<Difference>,
    /// Entries that wait for an operator or an upgrade. They are in the books, but not as events.
    /// They are not differences.
    pub open: Vec<Difference>,
    /// Rows that coderd changed or removed later, and rows that could not be compared. They are not
    /// differences.
    pub remarks: Vec<Difference>,
}

impl Joint {
    pub(super) fn new(name: &'static str) -> Self {
        Joint {
            name: Cow::Borrowed(name),
            numbers: BTreeMap::new(),
            differences: Vec::new(),
            open: Vec::new(),
            remarks: Vec::new(),
        }
    }

    pub(super) fn number(&mut self, name: impl Into<String>, number: impl TryInto<i64>) {
        self.numbers.insert(name.into(), number.try_into().unwrap_or(i64::MAX));
    }
}
