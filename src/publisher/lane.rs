//! A lane: leases events, sends one request at a time, and records its answer.

use std::sync::Arc;

use anyhow::bail;
use chrono::TimeDelta;
use tokio::time::Instant;
use tracing::{debug, warn};
use uuid::Uuid;

use super::lanes::Lanes;
use super::round::{Round, Signing};
use super::send::Sent;
use super::signing::{NoLicense, signing_license};
use super::{Condition, Cycle, Publisher};
use crate::ledger::Publication;
use crate::tallyman::{MAX_EVENTS_PER_REQUEST, SendError};

/// Events that one lane has leased for a request.
struct Leased {
    /// The lease's own holder, so that no other lane writes under it.
    holder: String,
    events: Vec<Publication>,
    signing: Arc<Signing>,
}

impl Publisher {
    /// Sends due events until there are none, or until no further request may begin. Counts its
    /// work up to an error, too.
    pub(super) async fn lane(&self, lanes: &Lanes<'_>) -> (Cycle, anyhow::Result<()>) {
        let mut cycle = Cycle::default();
        let end = self.send_due(lanes, &mut cycle).await;
        if end.is_err() || cycle.failure.is_some() {
            lanes.end();
        }
        (cycle, end)
    }

    async fn send_due(&self, lanes: &Lanes<'_>, cycle: &mut Cycle) -> anyhow::Result<()> {
        while let Some(leased) = self.lease_next(lanes).await? {
            let (holder, signing) = (leased.holder, leased.signing);
            let ids: Vec<String> =
                leased.events.iter().map(|event| event.event_id.clone()).collect();
            let end = self.publish(lanes, &holder, &signing, leased.events, cycle).await;
            if !matches!(end, Ok(true)) {
                self.release(lanes.source_id, &holder, &ids).await;
            }
            end?;
            if cycle.failure.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Leases the events of one request. None: no more are due, or nothing may be sent.
    async fn lease_next(&self, lanes: &Lanes<'_>) -> anyhow::Result<Option<Leased>> {
        let mut turn = lanes.turn.lock().await;
        if turn.drained || lanes.over.is_cancelled() {
            return Ok(None);
        }
        if self.is_paused() {
            lanes.halt();
            return Ok(None);
        }
        if turn.round.as_ref().is_none_or(|round| round.is_over(Instant::now())) {
            turn.round = self.begin_round(lanes).await?;
        }
        let Some(round) = &mut turn.round else {
            lanes.halt();
            return Ok(None);
        };
        let holder = Uuid::new_v4().to_string();
        let now = round.earlier(self.ledger.clock.now());
        let events = self.lease(lanes.source_id, &holder, now, MAX_EVENTS_PER_REQUEST).await?;
        round.add(events.len());
        let signing = Arc::clone(&round.signing);
        turn.drained = events.len() < MAX_EVENTS_PER_REQUEST;
        Ok((!events.is_empty()).then_some(Leased { holder, events, signing }))
    }

    /// Publishes leased events: in one request, or in several if the vendor refuses a whole request
    /// for its content. Then each half is sent by itself, down to the single event, which is held.
    /// If the vendor takes none of the halves, the source waits: the cause may not be the events.
    ///
    /// The next lease is of a full request again. Events that were held so are retried apart from
    /// others, which need not be halved again.
    ///
    /// Returns whether it has ended all leases.
    async fn publish(
        &self,
        lanes: &Lanes<'_>,
        holder: &str,
        signing: &Signing,
        events: Vec<Publication>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<bool> {
        let (refused_alone, others) = events.into_iter().partition(|event| event.refused_alone);
        let mut parts: Vec<Vec<Publication>> = vec![refused_alone, others];
        let (mut refusal, mut is_answered, mut has_leases) = (None::<SendError>, false, true);
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            let Some(permit) = lanes.permit().await else { return Ok(false) };
            if self.is_paused() {
                lanes.halt();
                return Ok(false);
            }
            let part = self.last_check(lanes, holder, part, cycle).await?;
            match self.send(lanes, holder, signing, part, permit, cycle).await? {
                Sent::Nothing => {}
                Sent::Answered => is_answered = true,
                Sent::Refused(mut first, error) => {
                    warn!(source = %self.settings.deployment, events = first.len(), %error, "the vendor refuses a whole request: each half is sent by itself");
                    refusal = Some(error);
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
                Sent::LeaseLost if refusal.is_some() => {
                    debug!("a lease of a half expired: its events are due again");
                    has_leases = false;
                }
                Sent::LeaseLost => bail!(
                    "request not sent: its leases expired before it was recorded; coderd's database or the ledger is too slow"
                ),
            }
        }
        if !is_answered {
            cycle.failure = refusal;
        }
        Ok(has_leases)
    }

    /// Reads coderd's identity, publish marks, licenses and clock, and whether the source is held
    /// or retired. None: nothing may be sent, and the condition says why.
    pub(super) async fn begin_round(&self, lanes: &Lanes<'_>) -> anyhow::Result<Option<Round>> {
        if self.is_retired().await? {
            return Ok(None);
        }
        let mut reader = lanes.reader.lock().await;
        let Some(coderd_id) = self.identify(&mut reader).await? else { return Ok(None) };
        if self.stops_for_coderd(&mut reader, lanes.source_id).await? || self.is_held().await? {
            return Ok(None);
        }
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
