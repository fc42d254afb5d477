//! Mode `sole`: only Tallyline publishes. It stops if coderd publishes, too.

use tokio_util::sync::CancellationToken;

use super::lanes::Lanes;
use super::{Condition, Cycle, Publisher};
use crate::coderd::Reader;
use crate::ledger::{Hold, holds, publish_marks};

impl Publisher {
    pub(super) async fn sole(
        &self,
        reader: &mut Reader,
        source_id: i16,
        cycle: &mut Cycle,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let lanes = Lanes::new(reader, source_id, self.settings.concurrency, stop);
        let all = (0..lanes.number()).map(|_| self.lane(&lanes));
        let mut fault = None;
        for (work, end) in futures::future::join_all(all).await {
            cycle.add(work);
            fault = fault.or(end.err());
        }
        if let Some(fault) = fault {
            return Err(fault);
        }
        cycle.failure = cycle.failure.take().or_else(|| lanes.refusal());
        if cycle.failure.is_none() && !lanes.is_halted() {
            self.condition.set(Condition::Working);
        }
        Ok(())
    }

    /// coderd's publishing is cut off, so its marks at the first check are the last. A later mark
    /// means that it still publishes, and every further event could be billed twice. The ledger
    /// keeps the first mark: a restart does not accept a later mark.
    pub(super) async fn stops_for_coderd(
        &self,
        reader: &mut Reader,
        source_id: i16,
    ) -> anyhow::Result<bool> {
        let newest = reader.latest_publish_mark().await?;
        let Some(later) = self
            .ledger
            .run(async |conn| publish_marks::record(conn, source_id, newest).await)
            .await?
        else {
            return Ok(false);
        };
        let (at, deployment) = (later.to_rfc3339(), self.settings.deployment);
        let why = format!(
            "coderd itself published usage at {at}: cut off its publishing, then run `tallyline resume publish --coderd-cut-off {deployment}`, or use mode shadow"
        );
        self.condition.set(Condition::Stopped(why));
        Ok(true)
    }

    /// Whether a finding of an audit, by any process, holds this source. Every process reads it, so
    /// that all stop.
    pub(super) async fn is_held(&self) -> anyhow::Result<bool> {
        let Some(hold) = self
            .ledger
            .run(async |conn| holds::of_deployment(conn, self.settings.deployment).await)
            .await?
        else {
            return Ok(false);
        };
        self.condition.set(held(&hold));
        Ok(true)
    }
}

pub(super) fn held(hold: &Hold) -> Condition {
    Condition::Held(format!("{}; ends with {}", hold.why, hold.ends))
}
