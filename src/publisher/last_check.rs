//! The last look at coderd's rows of a request.

use chrono::TimeDelta;
use tracing::warn;

use super::lanes::Lanes;
use super::queue::rows_by_id;
use super::source_check::{SourceCheck, compare};
use super::{Cycle, Publisher};
use crate::ledger::{HeldFor, Postponed, Publication, Settlement};

/// The wait of an event that coderd has just reserved.
const RESERVATION_WAIT: TimeDelta = TimeDelta::minutes(1);

/// The wait of an event that is held back.
const HELD_BACK_WAIT: TimeDelta = TimeDelta::minutes(10);

/// The act that releases a confirmed event that is held back.
const RELEASE: &str = "if coderd was restored, `tallyline recover plan --lost coderd` and the plan's execution release the accepted event";
/// Advice for an event that was never confirmed.
const NEVER_CONFIRMED: &str = "coderd is not known to have ever had it: `tallyline explain` shows its origin, `tallyline events correct` sets it to coderd's row";

impl Publisher {
    /// Checks coderd's rows, just before the request is written down. Returns the events that may
    /// be sent.
    pub(super) async fn last_check(
        &self,
        lanes: &Lanes<'_>,
        holder: &str,
        leased: Vec<Publication>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<Vec<Publication>> {
        let ids: Vec<String> = leased.iter().map(|event| event.event_id.clone()).collect();
        let statements = self.statements(lanes.source_id, &ids).await?;
        let (now, rows) = {
            let mut reader = lanes.reader.lock().await;
            (self.now(&mut reader).await?, rows_by_id(&mut reader, &ids).await?)
        };
        let (mut sendable, mut published, mut later, mut newly) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for event in leased {
            match compare(&event, rows.get(&event.event_id), statements[&event.event_id], now) {
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
                    let (held_for, next_attempt_at) =
                        (Some(HeldFor::CoderdDiffers), self.ledger.clock.now() + HELD_BACK_WAIT);
                    later.push(Postponed {
                        event_id: event.event_id,
                        message: Some(why),
                        held_for,
                        next_attempt_at,
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
