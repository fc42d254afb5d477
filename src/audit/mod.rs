//! The three joints at which the books must balance: source and ledger, log and ledger, ledger and vendor. Rows are compared on both sides; what
//! differs is listed by id.

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
use crate::ledger::{Difference, Ledger, Sequence};
use crate::log::Log;

/// The joints' names.
const SOURCE: &str = "source and ledger";
const LOG: &str = "log and ledger";
const VENDOR: &str = "ledger and vendor";

/// Of a joint's numbers, those that a finding keeps: events that coderd no longer has, usage of the last 30 days and how much of it differs.
const SOURCE_GONE: &str = "source_gone";
const RECENT_USAGE: &str = "usage_of_30_days";
const RECENT_USAGE_DIFFERS: &str = "usage_of_30_days_that_differs";

/// What an audit compares.
#[derive(Clone)]
pub struct Audit {
    /// The ledger.
    pub ledger: Ledger,
    /// The log that it was written from.
    pub log: Log,
    /// coderd's database and its deployment id, where this process can read it.
    pub source: Option<(Database, uuid::Uuid)>,
    /// How long to wait for a collector pass that began after a difference was seen.
    pub patience: Duration,
}

/// What an audit found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditReport {
    /// No joint has a difference.
    pub balanced: bool,
    /// The ledger sequence up to which the ledger's own books were read.
    pub sequence: Sequence,
    /// source ↔ ledger, log ↔ ledger, ledger ↔ vendor.
    pub joints: Vec<Joint>,
}

/// One joint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Joint {
    /// Its name.
    pub name: Cow<'static, str>,
    /// What was compared, in numbers.
    pub numbers: BTreeMap<String, i64>,
    /// What does not balance.
    pub differences: Vec<Difference>,
    /// What waits for an operator or an upgrade: it is in the books, as no event, and no imbalance.
    pub open: Vec<Difference>,
    /// What coderd itself changed or removed later, and what could not be compared: no imbalance.
    pub remarks: Vec<Difference>,
}

/// The joints of the ledger with log and vendor.
struct LedgerJoints {
    /// Up to which the ledger was read.
    sequence: Sequence,
    /// An error: the log cannot be read, which says nothing about the vendor.
    log: anyhow::Result<Joint>,
    vendor: Joint,
}

impl AuditReport {
    /// With one more joint.
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

    /// One of its numbers; 0 where it was not counted.
    fn count(&self, name: &str) -> i64 {
        self.numbers.get(name).copied().unwrap_or(0)
    }

    fn number(&mut self, name: impl Into<String>, number: impl TryInto<i64>) {
        self.numbers.insert(name.into(), number.try_into().unwrap_or(i64::MAX));
    }
}

impl Audit {
    /// Compares all three joints.
    pub async fn run(&self) -> anyhow::Result<AuditReport> {
        let source = self.source_joint().await?;
        let LedgerJoints { sequence, log, vendor } = self.ledger_joints().await?;
        let joints = vec![source, log?, vendor];
        Ok(AuditReport { balanced: joints.iter().all(|joint| joint.differences.is_empty()), sequence, joints })
    }

    /// Compares source and ledger.
    async fn source_joint(&self) -> anyhow::Result<Joint> {
        source::compare(self).await
    }

    /// Compares log and ledger, and ledger and vendor. An error: the ledger cannot be read.
    async fn ledger_joints(&self) -> anyhow::Result<LedgerJoints> {
        let books = self.ledger.books().await?;
        let log = log::compare(self, &books).await;
        Ok(LedgerJoints { sequence: books.sequence, log, vendor: vendor::compare(&books) })
    }
}
