//! The three joints at which the books must balance: source and ledger, log and ledger, ledger and
//! vendor. Compares rows on both sides and lists differences by id.

mod chain;
mod continuous;
mod deep;
mod joint;
mod log;
mod sides;
mod slices;
mod source;
mod source_turns;
mod step;
mod suspects;
mod telemetry;
mod turns;
mod vendor;

pub use continuous::Continuous;
pub use joint::{Audit, Joint};
pub use telemetry::AuditTelemetry;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ledger::books::Reading;
use crate::ledger::{Head, Sequence};

/// The result of an audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditReport {
    /// Whether no joint has a difference.
    pub balanced: bool,
    /// The ledger sequence up to which the ledger's own books were read.
    pub sequence: Sequence,
    /// The ledger's head after the comparison. Keep it outside the ledger's database: a later deep
    /// audit compares the ledger with it.
    pub head: Head,
    /// The joints: source ↔ ledger, log ↔ ledger, ledger ↔ vendor.
    pub joints: Vec<Joint>,
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

impl Audit {
    pub async fn run(&self) -> anyhow::Result<AuditReport> {
        let source = self.source_joint().await?;
        let LedgerJoints { sequence, log, vendor } = self.ledger_joints().await?;
        let joints = vec![source, log?, vendor];
        Ok(AuditReport {
            balanced: joints.iter().all(|joint| joint.differences.is_empty()),
            sequence,
            head: self.head().await?,
            joints,
        })
    }

    async fn source_joint(&self) -> anyhow::Result<Joint> {
        source::compare(self, &|_| {}).await
    }

    /// Compares log and ledger, and ledger and vendor. It fails only if the ledger cannot be read.
    async fn ledger_joints(&self) -> anyhow::Result<LedgerJoints> {
        let mut reading = Reading::default();
        let books = loop {
            if let Some(books) = self.ledger.run(async |conn| reading.read(conn).await).await? {
                break books;
            }
        };
        let log = log::compare(self, &books).await;
        Ok(LedgerJoints { sequence: books.sequence, log, vendor: vendor::compare(&books) })
    }
}
