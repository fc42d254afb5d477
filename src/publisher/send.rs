//! One request: writes it down, sends it and records its verdicts.

use std::time::Duration;

use anyhow::bail;
use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;
use tracing::{info, warn};
use uuid::Uuid;

use super::condition::recovering;
use super::lanes::{Lanes, Lease};
use super::round::Signing;
use super::sole::held;
use super::{Condition, Cycle, Publisher};
use crate::cause::{self, LastingFault, Remedy};
use crate::ledger::{
    Attempt, AttemptVerdict, HeldFor, NewRequest, Postponed, Publication, Recorded, RequestOutcome,
    holds, publication_requests, recoveries, retirements,
};
use crate::retry::{Backoff, wait_after};
use crate::tallyman::{Answer, LEFT_OUT_MESSAGE, OutgoingEvent, SendError, Verdict, request_body};

/// The wait of an event that breaks Tallyman's rules; an upgrade may have other rules.
const INVALID_WAIT: TimeDelta = TimeDelta::hours(1);

/// The end of one request.
pub(super) enum Sent {
    /// No event was sent, or the vendor refuses a request for its content whose events are held:
    /// a single event, or several that another lane halves later.
    Nothing,
    /// The vendor's verdicts are recorded.
    Answered,
    /// The vendor refuses the whole request for its content. Its events are still leased, to be
    /// sent in halves.
    Refused(Vec<Publication>, SendError),
    /// The request failed; its events are due.
    Failed(SendError),
    /// The source is held or retired, or the ledger is restored, so nothing was sent.
    Withheld(Condition),
    /// A lease was lost before the request was written down, so nothing was sent.
    LeaseLost,
}

/// The result of writing a request down.
enum Begun {
    Written,
    LeaseLost,
    Withheld(Condition),
}

impl Publisher {
    /// Sends leased events under one license and for one deployment. With the answer it releases
    /// `in_flight`, so that another request can begin before the verdicts are recorded. After a
    /// failure none begins.
    pub(super) async fn send<'a>(
        &self,
        lanes: &'a Lanes<'_>,
        lease: &mut Lease<'a>,
        signing: &Signing,
        events: Vec<Publication>,
        in_flight: SemaphorePermit<'_>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<Sent> {
        let (source_id, holder) = (lanes.source_id, lease.holder.as_str());
        let (events, outgoing) = self.outgoing(source_id, holder, events, cycle).await?;
        if events.is_empty() {
            return Ok(Sent::Nothing);
        }
        let begun = Instant::now();
        let request = NewRequest {
            id: Uuid::new_v4(),
            source_id,
            license_sha256: signing.license.jwt_sha256,
            event_ids: events.iter().map(|event| event.event_id.as_str()).collect(),
            holder,
            lease: self.settings.lease,
        };
        match self.begin(&request).await? {
            Begun::Written => {}
            Begun::LeaseLost => return Ok(Sent::LeaseLost),
            Begun::Withheld(condition) => return Ok(Sent::Withheld(condition)),
        }
        let answer = self.ingest(signing, &outgoing, begun).await;
        let is_content = answer.as_ref().is_err_and(SendError::is_refused_for_its_content);
        if answer.is_err() && !is_content {
            lanes.end();
        }
        drop(in_flight);
        let (now, is_refused) = (self.ledger.clock.now(), is_content && events.len() > 1);
        if is_refused && lease.halving.is_none() {
            lease.halving = lanes.halving();
        }
        let is_split = is_refused && lease.halving.is_some();
        let mut attempts = self.attempts(&events, &answer, now);
        if is_refused && !is_split {
            attempts.iter_mut().for_each(|one| one.held_for = Some(HeldFor::VendorRefuses));
        }
        let outcome = RequestOutcome {
            id: request.id,
            source_id,
            holder,
            answered_at: was_answered(&answer).then_some(now),
            status: status(&answer),
            error: answer.as_ref().err().map(ToString::to_string),
            attempts,
            lease: is_split.then_some(self.settings.lease),
        };
        self.record(&outcome, begun).await?;
        let mut request = Cycle::default();
        request.count(&outcome.attempts);
        self.telemetry.request(&request);
        cycle.add(request);
        info!(request = %outcome.id, events = events.len(), status = outcome.status, license_id = signing.license.id, "request recorded");
        let Err(error) = answer else { return Ok(Sent::Answered) };
        self.telemetry.send_error(&error);
        Ok(match error {
            error if is_split => Sent::Refused(events, error),
            _ if is_content => Sent::Nothing,
            error => Sent::Failed(error),
        })
    }

    /// Writes the request down, unless the source is held or retired or the ledger is restored.
    async fn begin(&self, request: &NewRequest<'_>) -> anyhow::Result<Begun> {
        let (deployment, now) = (self.settings.deployment, self.ledger.clock.now());
        self.ledger
            .run(async |conn| {
                if let Some(retirement) = retirements::of_deployment(conn, deployment).await? {
                    return Ok(Begun::Withheld(Condition::Retired(retirement.to_string())));
                }
                if let Some(hold) = holds::of_deployment(conn, deployment).await? {
                    return Ok(Begun::Withheld(held(&hold)));
                }
                if publication_requests::begin(conn, request, now).await? {
                    return Ok(Begun::Written);
                }
                anyhow::Ok(match recoveries::open(conn).await? {
                    Some(recovery) => Begun::Withheld(recovering(&recovery)),
                    None => Begun::LeaseLost,
                })
            })
            .await
    }

    /// Sends a request that was written down at `begun`, unless its lease could end first.
    async fn ingest(
        &self,
        signing: &Signing,
        outgoing: &[OutgoingEvent],
        begun: Instant,
    ) -> Result<Answer, SendError> {
        if begun.elapsed() + self.settings.tallyman.request_timeout >= self.settings.lease {
            return Err(SendError::Unreachable(
                "not sent: this process was delayed, and its lease could expire before the answer"
                    .to_owned(),
            ));
        }
        self.client.ingest(&signing.license.jwt, signing.coderd_id, request_body(outgoing)).await
    }

    /// The events in the vendor's form, always the same bytes. Holds an event that breaks the
    /// vendor's rules.
    async fn outgoing(
        &self,
        source_id: i16,
        holder: &str,
        events: Vec<Publication>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<(Vec<Publication>, Vec<OutgoingEvent>)> {
        let (mut ready, mut outgoing, mut invalid) = (Vec::new(), Vec::new(), Vec::new());
        for event in events {
            match OutgoingEvent::new(event.event_id.clone(), event.quantity, event.created_at) {
                Ok(form) => {
                    ready.push(event);
                    outgoing.push(form);
                }
                Err(error) => invalid.push(Postponed {
                    event_id: event.event_id,
                    message: Some(format!("Tallyman's rules do not allow it: {error}")),
                    held_for: Some(HeldFor::VendorRules),
                    next_attempt_at: self.ledger.clock.now() + INVALID_WAIT,
                }),
            }
        }
        cycle.held_back += invalid.len();
        self.postpone(source_id, holder, &invalid).await?;
        Ok((ready, outgoing))
    }

    /// Each event's verdict, and when it is due again if it stays pending. After a failed request,
    /// events stay due: the source waits, or sends them in halves. An event that the vendor refuses
    /// alone is refused for now, and held.
    fn attempts(
        &self,
        events: &[Publication],
        answer: &Result<Answer, SendError>,
        now: DateTime<Utc>,
    ) -> Vec<Attempt> {
        match (answer, events) {
            (Ok(answer), _) => {
                let verdicts = answer.verdicts(events.iter().map(|event| event.event_id.as_str()));
                if verdicts.not_sent > 0 {
                    warn!(ids = verdicts.not_sent, "the answer names events that were not sent");
                }
                events
                    .iter()
                    .zip(verdicts.of_sent)
                    .map(|(event, (_, verdict))| self.attempt(event, verdict, now))
                    .collect()
            }
            (Err(error), [event]) if error.is_refused_for_its_content() => {
                let verdict = Verdict::RefusedForNow(error.to_string());
                let attempt = self.attempt(event, verdict, now);
                vec![Attempt { held_for: Some(HeldFor::VendorRefuses), ..attempt }]
            }
            (Err(error), _) => events
                .iter()
                .map(|event| Attempt {
                    event_id: event.event_id.clone(),
                    verdict: AttemptVerdict::Failed,
                    message: Some(error.to_string()),
                    next_attempt_at: now,
                    unanswered: event.unanswered || error.may_have_been_accepted(),
                    held_for: None,
                })
                .collect(),
        }
    }

    fn attempt(&self, event: &Publication, verdict: Verdict, now: DateTime<Utc>) -> Attempt {
        let (verdict, message, may_have_been_accepted) = match verdict {
            Verdict::Accepted => (AttemptVerdict::Accepted, None, false),
            Verdict::RefusedPermanently(message) => (AttemptVerdict::Refused, Some(message), false),
            Verdict::RefusedForNow(message) => {
                (AttemptVerdict::RefusedForNow, Some(message), false)
            }
            // the answer does not name it: the vendor may have accepted it
            Verdict::LeftOut => (AttemptVerdict::LeftOut, Some(LEFT_OUT_MESSAGE.to_owned()), true),
        };
        let failures = event.refusals.saturating_add(1);
        let wait = wait_after(
            failures,
            self.settings.first_refusal_wait,
            self.settings.longest_refusal_wait,
        );
        Attempt {
            event_id: event.event_id.clone(),
            verdict,
            message,
            next_attempt_at: now + TimeDelta::from_std(wait).unwrap_or(TimeDelta::hours(1)),
            unanswered: event.unanswered || may_have_been_accepted,
            held_for: None,
        }
    }

    /// Retries while the lease lasts. An answer that is not recorded is requested again, and only
    /// the vendor's memory then prevents a second bill. The answer to a request that a restored
    /// ledger lacks is also requested again; none of it is recorded.
    async fn record(&self, outcome: &RequestOutcome<'_>, begun: Instant) -> anyhow::Result<()> {
        let (mut waits, mut away) = (
            Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
            LastingFault::default(),
        );
        loop {
            let fault = match self
                .ledger
                .run(async |conn| {
                    publication_requests::record_outcome(conn, outcome, self.ledger.clock.now())
                        .await
                })
                .await
            {
                Ok(Recorded::Now | Recorded::Before) => return Ok(()),
                Ok(Recorded::RequestLost) => {
                    let (request, events) = (outcome.id, outcome.attempts.len());
                    warn!(%request, events, status = outcome.status, "request missing in the ledger: its outcome is not recorded");
                    bail!(
                        "request {request} is missing in the ledger, which was restored from a backup; its {events} events remain pending"
                    );
                }
                Err(fault) => fault,
            };
            let wait = waits.next_wait();
            if !Remedy::of(&fault).is_retry() || begun.elapsed() + wait >= self.settings.lease {
                return Err(anyhow::Error::from(fault)
                    .context(format!("the answer to request {} is not recorded", outcome.id)));
            }
            let error = cause::text(&fault);
            if away.is_new(&error) {
                warn!(request = %outcome.id, error, "answer not recorded, retrying");
            }
            tokio::time::sleep(wait).await;
        }
    }
}

/// Whether the vendor, or a proxy before it, answered at all.
fn was_answered(answer: &Result<Answer, SendError>) -> bool {
    matches!(answer, Ok(_) | Err(SendError::Status { .. } | SendError::Undecodable(_)))
}

fn status(answer: &Result<Answer, SendError>) -> Option<u16> {
    match answer {
        Ok(_) | Err(SendError::Undecodable(_)) => Some(200),
        Err(SendError::Status { status, .. }) => Some(*status),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_answer_is_not_treated_as_a_verdict() {
        let status_500 = || Err(SendError::Status { status: 500, message: String::new() });
        assert!(was_answered(&status_500()) && status(&status_500()) == Some(500));
        let unanswered = || Err(SendError::Unanswered("cut".into()));
        assert!(!was_answered(&unanswered()) && status(&unanswered()).is_none());
    }
}
