//! One request: writes it down, sends it and records its verdicts.

use std::time::Duration;

use anyhow::bail;
use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::Instant;
use tracing::{info, warn};
use uuid::Uuid;

use super::signing::SigningLicense;
use super::{Cycle, Publisher};
use crate::cause::{self, LastingFault, Remedy};
use crate::ledger::{
    Attempt, AttemptVerdict, HeldFor, NewRequest, Postponed, Publication, Recorded, RequestOutcome,
    publication_requests, publications,
};
use crate::retry::{Backoff, wait_after};
use crate::tallyman::{Answer, LEFT_OUT_MESSAGE, OutgoingEvent, SendError, Verdict, request_body};

/// The wait of an event that breaks Tallyman's rules; an upgrade may have other rules.
const INVALID_WAIT: TimeDelta = TimeDelta::hours(1);

impl Publisher {
    /// Sends leased events under one license and for one deployment.
    pub(super) async fn send(
        &self,
        source_id: i16,
        license: &SigningLicense,
        events: &[Publication],
        cycle: &mut Cycle,
    ) -> anyhow::Result<()> {
        let (ready, outgoing) = self.outgoing(source_id, events, cycle).await?;
        if ready.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let request = NewRequest {
            id: Uuid::new_v4(),
            source_id,
            license_sha256: license.jwt_sha256,
            event_ids: ready.iter().map(|event| event.event_id.as_str()).collect(),
            holder: &self.holder,
            lease: self.settings.lease,
        };
        if !self
            .ledger
            .run(async |conn| {
                publication_requests::begin(conn, &request, self.ledger.clock.now()).await
            })
            .await?
        {
            bail!(
                "request not sent: its leases expired before it was recorded; coderd's database or the ledger is too slow"
            );
        }
        let answer =
            if begun.elapsed() + self.settings.tallyman.request_timeout < self.settings.lease {
                // The vendor knows coderd's own id. It differs from the source's id if an operator
                // accepted another coderd.
                self.client.ingest(&license.jwt, self.coderd_id, request_body(&outgoing)).await
            } else {
                Err(SendError::Unreachable(
                "not sent: this process was delayed, and its lease could expire before the answer"
                    .to_owned(),
            ))
            };
        let now = self.ledger.clock.now();
        let attempts = self.attempts(&ready, &answer, now);
        let outcome = RequestOutcome {
            id: request.id,
            source_id,
            holder: &self.holder,
            answered_at: was_answered(&answer).then_some(now),
            status: status(&answer),
            error: answer.as_ref().err().map(ToString::to_string),
            attempts,
        };
        self.record(&outcome, begun).await?;
        count(&outcome.attempts, cycle);
        info!(request = %request.id, events = ready.len(), status = outcome.status, license_id = license.id, "request recorded");
        cycle.failure = answer.err();
        Ok(())
    }

    /// The events in the vendor's form, always the same bytes. Holds an event that breaks the
    /// vendor's rules.
    async fn outgoing<'a>(
        &self,
        source_id: i16,
        events: &'a [Publication],
        cycle: &mut Cycle,
    ) -> anyhow::Result<(Vec<&'a Publication>, Vec<OutgoingEvent>)> {
        let (mut ready, mut outgoing, mut invalid) = (Vec::new(), Vec::new(), Vec::new());
        for event in events {
            match OutgoingEvent::new(event.event_id.clone(), event.quantity, event.created_at) {
                Ok(form) => {
                    ready.push(event);
                    outgoing.push(form);
                }
                Err(error) => invalid.push(Postponed {
                    event_id: event.event_id.clone(),
                    message: Some(format!("Tallyman's rules do not allow it: {error}")),
                    held_for: Some(HeldFor::VendorRules),
                    next_attempt_at: self.ledger.clock.now() + INVALID_WAIT,
                }),
            }
        }
        if !invalid.is_empty() {
            cycle.held_back += invalid.len();
            self.ledger
                .run(async |conn| {
                    publications::postpone(
                        conn,
                        source_id,
                        &self.holder,
                        &invalid,
                        self.ledger.clock.now(),
                    )
                    .await
                })
                .await?;
        }
        Ok((ready, outgoing))
    }

    /// Each event's verdict, and when it is due again if it stays pending. After a failed request,
    /// events stay due: the source waits.
    fn attempts(
        &self,
        events: &[&Publication],
        answer: &Result<Answer, SendError>,
        now: DateTime<Utc>,
    ) -> Vec<Attempt> {
        match answer {
            Ok(answer) => {
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
            Err(error) => events
                .iter()
                .map(|event| Attempt {
                    event_id: event.event_id.clone(),
                    verdict: AttemptVerdict::Failed,
                    message: Some(error.to_string()),
                    next_attempt_at: now,
                    unanswered: event.unanswered || error.may_have_been_accepted(),
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

fn count(attempts: &[Attempt], cycle: &mut Cycle) {
    cycle.requests += 1;
    for attempt in attempts {
        match attempt.verdict {
            AttemptVerdict::Accepted => cycle.accepted += 1,
            AttemptVerdict::Refused => cycle.refused += 1,
            AttemptVerdict::RefusedForNow => cycle.refused_for_now += 1,
            AttemptVerdict::LeftOut => cycle.left_out += 1,
            AttemptVerdict::Failed => {}
        }
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
