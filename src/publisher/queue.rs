//! The publisher's calls of the queue.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Publisher;
use super::source_check::{self, OperatorStatement, sendable_after};
use crate::coderd::{Reader, UsageRow};
use crate::ledger::{Postponed, Publication, Settled, Settlement, known, losses, publications};

/// Old events in one comparison with coderd's rows.
const OLD_PAGE: i64 = 500;

impl Publisher {
    /// The time for ages and for coderd's reservations: the earlier of the process's clock and
    /// coderd's database. An event that is too old is so for ever, so one wrong clock must not
    /// decide it. Waits go by the process's clock, as the search for due events does.
    pub(super) async fn now(&self, reader: &mut Reader) -> anyhow::Result<DateTime<Utc>> {
        Ok(self.ledger.clock.now().min(reader.now().await?))
    }

    /// Settles events that are too old to be sent. If coderd has published one, it is not ours. If
    /// coderd has just reserved one, its answer may be in flight: the next cycle checks it again.
    pub(super) async fn settle_old(
        &self,
        reader: &mut Reader,
        source_id: i16,
        settled: &mut Settled,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut after = None;
        while !stop.is_cancelled() {
            let now = self.now(reader).await?;
            let old = self.ledger.run(async |conn| {
                publications::old(conn, source_id, sendable_after(now), after.as_ref(), OLD_PAGE)
                    .await
            });
            let old = old.await?;
            let Some(last) = old.last().cloned() else { return Ok(()) };
            let ids: Vec<String> = old.into_iter().map(|(_, id)| id).collect();
            let rows = rows_by_id(reader, &ids).await?;
            let row = |id: &String| rows.get(id);
            let (published, rest): (Vec<_>, Vec<_>) = ids
                .into_iter()
                .partition(|id| row(id).is_some_and(|row| row.published_at.is_some()));
            let too_old: Vec<_> = rest
                .into_iter()
                .filter(|id| !row(id).is_some_and(|row| source_check::is_reserved(row, now)))
                .collect();
            self.settle(source_id, &self.holder, &published, Settlement::NotOurs, settled).await?;
            self.settle(source_id, &self.holder, &too_old, Settlement::TooOld, settled).await?;
            after = Some(last);
        }
        Ok(())
    }

    /// Leases at most `limit` due events that are not too old at `now`. Held events come last, if
    /// at all.
    pub(super) async fn lease(
        &self,
        source_id: i16,
        holder: &str,
        now: DateTime<Utc>,
        limit: usize,
        with_held: bool,
    ) -> anyhow::Result<Vec<Publication>> {
        let (after, limit) = (sendable_after(now), i64::try_from(limit)?);
        let (length, at) = (self.settings.lease, self.ledger.clock.now());
        let leased = self.ledger.run(async |conn| match with_held {
            true => publications::lease(conn, source_id, holder, after, limit, length, at).await,
            false => {
                publications::lease_unheld(conn, source_id, holder, after, limit, length, at).await
            }
        });
        Ok(leased.await?)
    }

    /// The facts that operators have recorded about these events. Reads nothing without an event.
    pub(super) async fn statements(
        &self,
        source_id: i16,
        ids: &[String],
    ) -> anyhow::Result<HashMap<String, OperatorStatement>> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let (lost, refused) = self
            .ledger
            .run(async |conn| {
                let lost = losses::lost_ids(conn, source_id, ids).await?;
                let refused = known::refused_states(conn, self.settings.deployment, ids).await?;
                anyhow::Ok((lost, refused))
            })
            .await?;
        let of = |id: &String| OperatorStatement {
            lost: lost.contains(id),
            resubmitted: refused.get(id).is_some_and(|refused| refused.passed),
        };
        Ok(ids.iter().map(|id| (id.clone(), of(id))).collect())
    }

    /// Releases leased rows without an attempt, if there are any.
    pub(super) async fn postpone(
        &self,
        source_id: i16,
        holder: &str,
        postponed: &[Postponed],
    ) -> anyhow::Result<()> {
        if postponed.is_empty() {
            return Ok(());
        }
        let now = self.ledger.clock.now();
        let done = self.ledger.run(async |conn| {
            publications::postpone(conn, source_id, holder, postponed, now).await
        });
        Ok(done.await?)
    }

    /// Releases leases of events that are not in flight. Its failure is only logged: leases end by
    /// themselves.
    pub(super) async fn release(&self, source_id: i16, holder: &str, ids: &[String]) {
        if let Err(error) = self
            .ledger
            .run(async |conn| publications::release(conn, source_id, holder, ids).await)
            .await
        {
            warn!(%error, "publication leases not released; they will expire");
        }
    }

    pub(super) async fn settle(
        &self,
        source_id: i16,
        holder: &str,
        ids: &[String],
        settlement: Settlement,
        settled: &mut Settled,
    ) -> anyhow::Result<()> {
        if !ids.is_empty() {
            let more = self
                .ledger
                .run(async |conn| {
                    publications::settle(
                        conn,
                        source_id,
                        holder,
                        ids,
                        settlement,
                        self.ledger.clock.now(),
                    )
                    .await
                })
                .await?;
            self.telemetry.settled(&more);
            settled.not_ours += more.not_ours;
            settled.expired += more.expired;
            settled.unknown += more.unknown;
        }
        Ok(())
    }
}

/// coderd's rows of these ids; missing ones are left out.
pub(super) async fn rows_by_id(
    reader: &mut Reader,
    ids: &[String],
) -> anyhow::Result<HashMap<String, UsageRow>> {
    Ok(reader.usage(ids).await?.into_iter().map(|row| (row.id.clone(), row)).collect())
}
