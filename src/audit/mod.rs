//! The three joints at which the books must balance: source and ledger, log and ledger, ledger and
//! vendor. Compares rows on both sides and lists differences by id.

mod chain;
mod continuous;
mod deep;
mod deep_findings;
mod deep_records;
mod incarnations;
mod joint;
mod log;
mod reading;
mod sides;
mod slices;
mod source;
mod source_turns;
mod step;
mod suspects;
mod telemetry;
mod turn;
mod turns;
mod vendor;
mod whole;

pub use continuous::Continuous;
pub use joint::{Audit, Joint};
pub use reading::{AuditPhase, Report};
pub use telemetry::AuditTelemetry;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use self::reading::{RESUMABLE, SAVED_EVERY};
use crate::ledger::{Head, LedgerBooks, Sequence, books, snapshots};

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
        self.run_from(true, &|_, _, _| {}).await
    }

    /// Audits everything. Without `from_start` it goes on with an audit of the last 24 hours that was
    /// interrupted.
    pub async fn run_from(
        &self,
        from_start: bool,
        report: Report<'_>,
    ) -> anyhow::Result<AuditReport> {
        let source = source::compare(self, from_start, report).await?;
        let books = self.read_books(from_start, report).await?;
        let log = log::compare(self, &books).await?;
        let joints = vec![source, log, vendor::compare(&books)];
        Ok(AuditReport {
            balanced: joints.iter().all(|joint| joint.differences.is_empty()),
            sequence: books.sequence,
            head: self.head().await?,
            joints,
        })
    }

    /// Reads the whole ledger, page by page. It saves its place, so that a later audit can go on.
    async fn read_books(
        &self,
        from_start: bool,
        report: Report<'_>,
    ) -> anyhow::Result<LedgerBooks> {
        let ledger = &self.ledger;
        let since = ledger.clock.now() - RESUMABLE;
        let saved = if from_start {
            None
        } else {
            ledger.run(async |conn| books::saved(conn, since).await).await?
        };
        let mut reading = saved.unwrap_or_default();
        let mut saved_at = Instant::now();
        loop {
            let books = ledger.run(async |conn| reading.read(conn).await).await?;
            if let Some(books) = books {
                ledger.run(books::forget).await?;
                return Ok(books);
            }
            let head = ledger.run(snapshots::head).await?.number;
            report(AuditPhase::Ledger, reading.batches(), 2 * head);
            if saved_at.elapsed() >= SAVED_EVERY {
                let now = ledger.clock.now();
                ledger.run(async |conn| books::save(conn, &reading, now).await).await?;
                saved_at = Instant::now();
            }
        }
    }
}
