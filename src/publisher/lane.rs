//! A lane: leases events, sends one request at a time, and records its answer.

use std::sync::Arc;

use anyhow::bail;
use chrono::TimeDelta;
use tokio::time::Instant;
use tracing::{debug, warn};
use uuid::Uuid;

use super::lanes::{Lanes, Lease};
use super::round::{Round, Signing};
use super::send::Sent;
use super::signing::{NoLicense, signing_license};
use super::{Condition, Cycle, Publisher};
use crate::ledger::Publication;
use crate::tallyman::{MAX_EVENTS_PER_REQUEST, SendError};

impl Publisher {
    /// Sends due events until there are none and no lane has any, or until no further request may
    /// begin. Counts its work up to an error, too.
    pub(super) async fn lane(&self, lanes: &Lanes<'_>) -> (Cycle, anyhow::Result<()>) {
        let mut cycle = Cycle::default();
        let end = self.send_due(lanes, &mut cycle).await;
        if end.is_err() || cycle.failure.is_some() {
            lanes.end();
        }
        (cycle, end)
    }

    async fn send_due(&self, lanes: &Lanes<'_>, cycle: &mut Cycle) -> anyhow::Result<()> {
        while let Some((mut lease, events)) = self.lease_next(lanes, cycle).await? {
            let ids: Vec<String> = events.iter().map(|event| event.event_id.clone()).collect();
            let end = self.publish(lanes, &mut lease, events, cycle).await;
            if !matches!(end, Ok(true)) {
                self.release(lanes.source_id, &lease.holder, &ids).await;
            }
            lanes.end_work(lease.halving);
            end?;
            if cycle.failure.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Leases the events of one request. While other lanes have leased events, it waits for more.
    /// A lease of fewer events than a request takes is followed by a rest, so that later requests
    /// are not small. None: no more are due, or nothing may be sent.
    async fn lease_next<'a>(
        &self,
        lanes: &'a Lanes<'_>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<Option<(Lease<'a>, Vec<Publication>)>> {
        let mut drained = lanes.turn.lock().await;
        while !lanes.over.is_cancelled() {
            if *drained && !lanes.wait_for_more(self.settings.rest()).await {
                break;
            }
            let Some(round) = self.round(lanes, 0, cycle).await? else { break };
            let (holder, halving) = (Uuid::new_v4().to_string(), lanes.halving());
            let now = round.earlier(self.ledger.clock.now());
            let with_held = halving.is_some();
            let events = self
                .lease(lanes.source_id, &holder, now, MAX_EVENTS_PER_REQUEST, with_held)
                .await?;
            *drained = events.len() < MAX_EVENTS_PER_REQUEST;
            if !events.is_empty() {
                lanes.begin_work();
                let is_held = events.iter().any(|event| event.held_since.is_some());
                return Ok(Some((Lease { holder, halving: halving.filter(|_| is_held) }, events)));
            }
        }
        Ok(None)
    }

    /// Publishes leased events: in one request, or in several if the vendor refuses a whole request
    /// for its content. Then each half is sent by itself, down to the single event, which is held.
    /// If the vendor takes none of the halves and nothing of another lane, the cycle has failed.
    ///
    /// The next lease is of a full request again. Events that were refused alone are sent apart, so
    /// that the others need not be halved again.
    ///
    /// Returns whether it has ended all leases.
    async fn publish<'a>(
        &self,
        lanes: &'a Lanes<'_>,
        lease: &mut Lease<'a>,
        events: Vec<Publication>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<bool> {
        let (refused_alone, others) = events.into_iter().partition(|event| event.refused_alone);
        let mut parts: Vec<Vec<Publication>> = vec![refused_alone, others];
        let (mut refusal, mut is_halved, mut has_leases) = (None::<SendError>, false, true);
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            let Some(permit) = lanes.permit().await else { return Ok(false) };
            let Some(round) = self.round(lanes, part.len(), cycle).await? else { return Ok(false) };
            let part = self.last_check(lanes, &lease.holder, part, cycle).await?;
            match self.send(lanes, lease, &round.signing, part, permit, cycle).await? {
                Sent::Nothing => {}
                Sent::Answered => self.show_working(lanes),
                Sent::Refused(mut first, error) => {
                    warn!(source = %self.settings.deployment, events = first.len(), %error, "the vendor refuses a whole request: each half is sent by itself");
                    is_halved = true;
                    if first.iter().any(|event| !event.refused_alone) {
                        refusal = Some(error);
                    }
                    let second = first.split_off(first.len() / 2);
                    parts.extend([second, first]);
                }
                Sent::Failed(error) => {
                    cycle.failure = Some(error);
                    return Ok(parts.is_empty());
                }
                Sent::Withheld(condition) => {
                    self.condition.set(condition);
                    lanes.halt();
                    return Ok(false);
                }
                Sent::LeaseLost if is_halved => {
                    debug!("a lease of a half expired: its events are due again");
                    has_leases = false;
                }
                Sent::LeaseLost => bail!(
                    "request not sent: its leases expired before it was recorded; coderd's database or the ledger is too slow"
                ),
            }
        }
        if let Some(error) = refusal {
            lanes.set_refused(error);
        }
        Ok(has_leases)
    }

    /// A cycle may last: its condition does not wait for its end.
    fn show_working(&self, lanes: &Lanes<'_>) {
        lanes.set_answered();
        if !lanes.over.is_cancelled() {
            self.condition.set(Condition::Working);
        }
    }

    /// The current round, with this number of further events. Begins one if it is over. Each later
    /// round of a cycle shows the queue. None: nothing may be sent, and all lanes end.
    async fn round(
        &self,
        lanes: &Lanes<'_>,
        events: usize,
        cycle: &mut Cycle,
    ) -> anyhow::Result<Option<Round>> {
        let mut current = lanes.round.lock().await;
        if lanes.over.is_cancelled() {
            return Ok(None);
        }
        if self.is_paused() {
            lanes.halt();
            return Ok(None);
        }
        if current.as_ref().is_none_or(|round| round.is_over(events, Instant::now())) {
            let is_later = current.is_some();
            *current = self.begin_round(lanes, cycle).await?;
            if is_later {
                self.show_queue(lanes.source_id).await?;
                self.telemetry.publishes(self.settings.deployment, self.condition.publishes());
            }
        }
        let Some(round) = &mut *current else {
            lanes.halt();
            return Ok(None);
        };
        round.add(events);
        Ok(Some(round.clone()))
    }

    /// Reads coderd's identity, publish marks, licenses and clock, and whether the source is held
    /// or retired. Settles events that are too old. None: nothing may be sent, and the condition
    /// shows why.
    async fn begin_round(
        &self,
        lanes: &Lanes<'_>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<Option<Round>> {
        if self.is_retired().await? {
            return Ok(None);
        }
        let mut reader = lanes.reader.lock().await;
        let Some(coderd_id) = self.identify(&mut reader).await? else { return Ok(None) };
        if self.stops_for_coderd(&mut reader, lanes.source_id).await? || self.is_held().await? {
            return Ok(None);
        }
        let (source_id, settled) = (lanes.source_id, &mut cycle.settled);
        self.settle_old(&mut reader, source_id, settled, &lanes.over).await?;
        // the license may have been replaced, especially after a 401
        let rows = reader.licenses().await?;
        let now = self.ledger.clock.now();
        let ahead = (now - reader.now().await?).max(TimeDelta::zero());
        match signing_license(rows, &self.settings.license_keys, coderd_id, now) {
            Ok(license) => {
                let signing = Arc::new(Signing { license, coderd_id });
                Ok(Some(Round::new(signing, Instant::now(), ahead)))
            }
            Err(none) => {
                self.condition.set(match none {
                    NoLicense::None => Condition::NoLicense,
                    NoLicense::OtherDeployment(why) => Condition::Refused(why),
                });
                Ok(None)
            }
        }
    }
}
