//! The last look at coderd's rows of a request.

use chrono::{DateTime, TimeDelta, Utc};
use tracing::warn;

use super::lanes::Lanes;
use super::queue::rows_by_id;
use super::source_check::{OperatorStatement, SourceCheck, compare};
use super::{Cycle, Publisher};
use crate::ledger::{HeldFor, Postponed, Publication, Settlement};

/// The wait of an event that coderd has just reserved.
const RESERVATION_WAIT: TimeDelta = TimeDelta::minutes(1);

/// The first wait of an event that is held back. Each wait is as long as the hold until then.
const HELD_BACK_WAIT: TimeDelta = TimeDelta::minutes(10);

/// The longest wait of an event that is held back.
const LONGEST_HELD_BACK_WAIT: TimeDelta = TimeDelta::hours(1);

/// The act that releases a confirmed event that is held back.
const RELEASE: &str = "if coderd was restored, `tallyline recover plan --lost coderd` and the plan's execution release the accepted event";
/// Advice for an event that was never confirmed.
const NEVER_CONFIRMED: &str = "coderd is not known to have ever had it: `tallyline explain` shows its origin, `tallyline events correct` sets it to coderd's row";

impl Publisher {
    /// Checks coderd's rows, just before the request is written down. Reads the acts of operators
    /// only for events whose rows differ. Returns the events that may be sent.
    pub(super) async fn last_check(
        &self,
        lanes: &Lanes<'_>,
        holder: &str,
        leased: Vec<Publication>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<Vec<Publication>> {
        let ids: Vec<String> = leased.iter().map(|event| event.event_id.clone()).collect();
        let (now, rows) = {
            let mut reader = lanes.reader.lock().await;
            (self.now(&mut reader).await?, rows_by_id(&mut reader, &ids).await?)
        };
        let check = |event: &Publication, statement| {
            compare(event, rows.get(&event.event_id), statement, now)
        };
        let without = OperatorStatement::default();
        let different: Vec<String> = leased
            .iter()
            .filter(|event| matches!(check(event, without), SourceCheck::Differs(_)))
            .map(|event| event.event_id.clone())
            .collect();
        let statements = self.statements(lanes.source_id, &different).await?;
        let (mut sendable, mut published, mut later, mut newly) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for event in leased {
            let statement = statements.get(&event.event_id).copied().unwrap_or(without);
            match check(&event, statement) {
                SourceCheck::Sendable => sendable.push(event),
                SourceCheck::PublishedByCoderd => published.push(event.event_id),
                SourceCheck::Reserved => {
                    cycle.waiting += 1;
                    let message =
                        Some("coderd has reserved it and may be publishing it".to_owned());
                    let next_attempt_at = self.ledger.clock.now() + RESERVATION_WAIT;
                    later.push(Postponed {
                        event_id: event.event_id,
                        message,
                        held_for: None,
                        next_attempt_at,
                    });
                }
                SourceCheck::Differs(why) => {
                    cycle.held_back += 1;
                    let release = if event.confirmed { RELEASE } else { NEVER_CONFIRMED };
                    let why = format!("{why}; {release}");
                    if event.last_message.as_ref() != Some(&why) {
                        newly.push((event.event_id.clone(), why.clone()));
                    }
                    later.push(Postponed {
                        next_attempt_at: next_check(event.held_since, self.ledger.clock.now()),
                        event_id: event.event_id,
                        message: Some(why),
                        held_for: Some(HeldFor::CoderdDiffers),
                    });
                }
            }
        }
        let (source_id, settled) = (lanes.source_id, &mut cycle.settled);
        self.settle(source_id, holder, &published, Settlement::NotOurs, settled).await?;
        self.postpone(source_id, holder, &later).await?;
        if let Some((first, why)) = newly.first() {
            let (source, events) = (self.settings.deployment, newly.len());
            warn!(%source, events, first, why, "usage held: coderd's rows differ from the accepted events");
        }
        Ok(sendable)
    }
}

/// When an event that is held since that instant is checked again.
fn next_check(held_since: Option<DateTime<Utc>>, now: DateTime<Utc>) -> DateTime<Utc> {
    let held = held_since.map_or(HELD_BACK_WAIT, |since| now - since);
    now + held.clamp(HELD_BACK_WAIT, LONGEST_HELD_BACK_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_of_a_held_event_doubles_up_to_an_hour() {
        let begin: DateTime<Utc> = "2025-08-01T12:00:00Z".parse().expect("a time");
        let (mut now, mut since, mut waits) = (begin, None, Vec::new());
        for _ in 0..6 {
            let next = next_check(since, now);
            waits.push((next - now).num_minutes());
            since = since.or(Some(now));
            now = next;
        }
        assert_eq!(waits, [10, 10, 20, 40, 60, 60]);
    }
}
