//! The three joints at which the books must balance: source and ledger, log and ledger, ledger and vendor. Compares rows on both sides and
//! lists differences by id.

mod continuous;
mod deep;
mod log;
mod source;
mod suspects;
mod vendor;

pub use continuous::{AuditTelemetry, Continuous};

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::coderd::Database;
use crate::ledger::{Difference, Ledger, Sequence, books};
use crate::log::Log;

const SOURCE: &str = "source and ledger";
const LOG: &str = "log and ledger";
const VENDOR: &str = "ledger and vendor";

/// Numbers of a joint that a finding keeps: rows that coderd removed, recent usage (30 days), and its differing part.
const SOURCE_GONE: &str = "source_gone";
const RECENT_USAGE: &str = "usage_of_30_days";
const RECENT_USAGE_DIFFERS: &str = "usage_of_30_days_that_differs";

/// The parts that an audit compares.
#[derive(Clone)]
pub struct Audit {
    pub ledger: Ledger,
    /// The log from which the ledger was written.
    pub log: Log,
    /// coderd's database and its deployment id, if this process can read it.
    pub source: Option<(Database, uuid::Uuid)>,
    /// How long to wait for a collector pass that begins after a difference was seen.
    pub patience: Duration,
}

/// The result of an audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditReport {
    /// Whether no joint has a difference.
    pub balanced: bool,
    /// The ledger sequence up to which the ledger's own books were read.
    pub sequence: Sequence,
    /// The joints: source ↔ ledger, log ↔ ledger, ledger ↔ vendor.
    pub joints: Vec<Joint>,
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
    /// Entries that wait for an operator or an upgrade. They are in the books, but not as events. They are not differences.
    pub open: Vec<Difference>,
    /// Rows that coderd changed or removed later, and rows that could not be compared. They are not differences.
    pub remarks: Vec<Difference>,
}

/// The joints of the ledger with log and vendor.
struct LedgerJoints {
    /// The ledger sequence of the comparison.
    sequence: Sequence,
    /// An error: the log cannot be read. The vendor joint is still valid.
    log: anyhow::Result<Joint>,
    vendor: Joint,
}

impl AuditReport {
    /// Adds a joint.
    #[must_use]
    pub fn with(mut self, joint: Joint) -> Self {
        self.balanced &= joint.differences.is_empty();
        self.joints.push(joint);
        self
    }
}

impl Joint {
    fn new(name: &'static str) -> Self {
        Joint { name: Cow::Borrowed(name), numbers: BTreeMap::new(), differences: Vec::new(), open: Vec::new(), remarks: Vec::new() }
    }

    /// One of its numbers; 0 if it is absent.
    fn count(&self, name: &str) -> i64 {
        self.numbers.get(name).copied().unwrap_or(0)
    }

    fn number(&mut self, name: impl Into<String>, number: impl TryInto<i64>) {
        self.numbers.insert(name.into(), number.try_into().unwrap_or(i64::MAX));
    }
}

impl Audit {
    pub async fn run(&self) -> anyhow::Result<AuditReport> {
        let source = self.source_joint().await?;
        let LedgerJoints { sequence, log, vendor } = self.ledger_joints().await?;
        let joints = vec![source, log?, vendor];
        Ok(AuditReport { balanced: joints.iter().all(|joint| joint.differences.is_empty()), sequence, joints })
    }

    async fn source_joint(&self) -> anyhow::Result<Joint> {
        source::compare(self).await
    }

    /// Compares log and ledger, and ledger and vendor. It fails only if the ledger cannot be read.
    async fn ledger_joints(&self) -> anyhow::Result<LedgerJoints> {
        let books = self.ledger.with_statements(books::STATEMENTS).run(books::add_up).await?;
        let log = log::compare(self, &books).await;
        Ok(LedgerJoints { sequence: books.sequence, log, vendor: vendor::compare(&books) })
    }
}
