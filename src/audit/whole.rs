//! The whole comparison of source and ledger, slice by slice. Its place is saved, so that a later
//! audit can go on. Ids that differed at first are saved with it: they are judged at the end, after
//! an interruption too.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::joint::Joint;
use super::reading::{AuditPhase, RESUMABLE, Report, SAVED_EVERY};
use super::sides::Sides;
use super::slices::{FIRST, Found};
use crate::ledger::{Difference, books, contents};

/// With more differing ids the place is not saved again. About 1 MB.
const SAVED_SUSPECTS: usize = 20_000;

/// How far the rows of both sides are compared.
#[derive(Serialize, Deserialize)]
pub(super) struct WholeReading {
    begun_at: DateTime<Utc>,
    pub next: WholePlace,
    pub found: Found,
}

/// Where the next slice begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum WholePlace {
    /// Builds of both sides.
    Builds(DateTime<Utc>),
    /// coderd's usage after this id.
    SourceUsage(String),
    /// The ledger's usage after this event.
    LedgerUsage(DateTime<Utc>, String),
    End,
}

impl WholeReading {
    fn begin(now: DateTime<Utc>) -> Self {
        let next = WholePlace::Builds(FIRST);
        WholeReading { begun_at: now, next, found: Found::default() }
    }

    /// An audit that goes on does not compare rows that came meanwhile into compared slices.
    fn resumed(&self) -> Difference {
        Difference {
            kind: "resumed".into(),
            id: format!("{:?}", self.begun_at),
            detail: "this audit began then and was interrupted: the continuous audit compares rows that came since; with --from-start this one does"
                .to_owned(),
        }
    }

    fn rows(&self) -> i64 {
        self.found.ledger_builds + self.found.ledger_usage + self.found.source_usage
    }
}

impl Sides<'_> {
    /// Compares all slices of both sides. Without `from_start` it goes on with an audit that was
    /// interrupted. Reports the compared rows after each slice that another one of its kind
    /// follows.
    pub(super) async fn read_whole(
        &mut self,
        from_start: bool,
        report: Report<'_>,
        joint: &mut Joint,
    ) -> anyhow::Result<Found> {
        let saved = if from_start { None } else { self.saved().await? };
        joint.remarks.extend(saved.as_ref().map(WholeReading::resumed));
        let mut reading = saved.unwrap_or_else(|| WholeReading::begin(self.ledger.clock.now()));
        let rows = self.estimated_rows().await?;
        let mut saved_at = Instant::now();
        while reading.next != WholePlace::End {
            let before = std::mem::discriminant(&reading.next);
            self.next_slice(&mut reading).await?;
            let is_next_kind = std::mem::discriminant(&reading.next) != before;
            if is_next_kind || saved_at.elapsed() >= SAVED_EVERY {
                self.save(&reading).await?;
                saved_at = Instant::now();
            }
            if !is_next_kind {
                report(AuditPhase::Source, reading.rows(), rows.max(reading.rows()));
            }
        }
        Ok(reading.found)
    }

    async fn saved(&self) -> anyhow::Result<Option<WholeReading>> {
        let (deployment, since) = (self.source.deployment_id, self.ledger.clock.now() - RESUMABLE);
        let saved = self
            .ledger
            .run(async |conn| books::saved_source(conn, deployment, since).await)
            .await?;
        // the place of another version: from the start
        Ok(saved.and_then(|saved| serde_json::from_value(saved).ok()))
    }

    async fn save(&self, reading: &WholeReading) -> anyhow::Result<()> {
        let suspects = &reading.found.suspects;
        if suspects.builds.len() + suspects.usage.len() > SAVED_SUSPECTS {
            return Ok(());
        }
        let (deployment, now) = (self.source.deployment_id, self.ledger.clock.now());
        let place = serde_json::to_value(reading)?;
        Ok(self
            .ledger
            .run(async |conn| books::save_source(conn, deployment, &place, now).await)
            .await?)
    }

    /// The rows that are compared: the ledger's builds, and the usage of both sides, which should
    /// be the same. Estimated for a large ledger, at a bounded cost.
    async fn estimated_rows(&self) -> anyhow::Result<i64> {
        let now = self.ledger.clock.now();
        let contents = self.ledger.run(async |conn| contents::read(conn, now).await).await?;
        let own =
            contents.events.iter().filter(|row| row.deployment_id == self.source.deployment_id);
        Ok(own
            .map(|row| match row.event_type.as_str() {
                "workspace_build_completed_v1" => row.events,
                "prebuild_claimed_v1" => 0,
                _ => 2 * row.events,
            })
            .sum())
    }
}
