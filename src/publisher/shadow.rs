//! Mode `shadow`: sends nothing; the queue follows coderd's publishing.

use chrono::TimeDelta;
use tokio_util::sync::CancellationToken;

use super::queue::rows_by_id;
use super::source_check::{SourceCheck, compare};
use super::{Condition, Cycle, Publisher};
use crate::coderd::Reader;
use crate::ledger::{HeldFor, Postponed, Settlement};

/// Events in one comparison with coderd's rows.
const PAGE: usize = 500;

/// The wait of an event that coderd has not published yet; coderd publishes every 17 minutes.
const RECHECK_WAIT: TimeDelta = TimeDelta::minutes(5);

impl Publisher {
    pub(super) async fn shadow(
        &self,
        reader: &mut Reader,
        source_id: i16,
        cycle: &mut Cycle,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        self.settle_old(reader, source_id, &mut cycle.settled, stop).await?;
        while !stop.is_cancelled() {
            if self.is_paused() {
                return Ok(());
            }
            if !self.follow(reader, source_id, cycle).await? {
                break;
            }
        }
        self.condition.set(Condition::Working);
        Ok(())
    }

    /// Compares a page of events with coderd's rows. Returns whether there may be more.
    async fn follow(
        &self,
        reader: &mut Reader,
        source_id: i16,
        cycle: &mut Cycle,
    ) -> anyhow::Result<bool> {
        let now = self.now(reader).await?;
        let leased = self.lease(source_id, &self.holder, now, PAGE, true).await?;
        let ids: Vec<String> = leased.iter().map(|event| event.event_id.clone()).collect();
        let read = async {
            anyhow::Ok((rows_by_id(reader, &ids).await?, self.statements(source_id, &ids).await?))
        };
        let (rows, statements) = match read.await {
            Ok(read) => read,
            Err(fault) => {
                self.release(source_id, &self.holder, &ids).await;
                return Err(fault);
            }
        };
        let (mut published, mut later) = (Vec::new(), Vec::new());
        let mut differences = 0;
        for event in leased {
            let why = match compare(
                &event,
                rows.get(&event.event_id),
                statements[&event.event_id],
                now,
            ) {
                SourceCheck::PublishedByCoderd => {
                    published.push(event.event_id);
                    continue;
                }
                SourceCheck::Sendable | SourceCheck::Reserved => None,
                SourceCheck::Differs(why) => {
                    differences += 1;
                    Some(why)
                }
            };
            let held_for = why.as_ref().map(|_| HeldFor::CoderdDiffers);
            later.push(Postponed {
                event_id: event.event_id,
                message: why,
                held_for,
                next_attempt_at: self.ledger.clock.now() + RECHECK_WAIT,
            });
        }
        let settled = &mut cycle.settled;
        self.settle(source_id, &self.holder, &published, Settlement::NotOurs, settled).await?;
        self.postpone(source_id, &self.holder, &later).await?;
        cycle.held_back += differences;
        cycle.waiting += later.len() - differences;
        Ok(ids.len() == PAGE)
    }
}
