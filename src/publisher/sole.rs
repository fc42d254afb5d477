//! Mode `sole`: only Tallyline publishes. It stops if coderd publishes, too.

use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::signing::{NoLicense, SigningLicense, signing_license};
use super::source_check::{SourceCheck, compare};
use super::{Condition, Cycle, Publisher, rows_by_id};
use crate::coderd::Reader;
use crate::ledger::{
    HeldFor, Postponed, Publication, Settlement, holds, publications, publish_marks,
};
use crate::tallyman::MAX_EVENTS_PER_REQUEST;

/// The wait of an event that coderd has just reserved.
const RESERVATION_WAIT: TimeDelta = TimeDelta::minutes(1);

/// The wait of an event that is held back.
const HELD_BACK_WAIT: TimeDelta = TimeDelta::minutes(10);

/// The act that releases a confirmed event that is held back.
const RELEASE: &str = "if coderd was restored, `tallyline recover plan --lost coderd` and the plan's execution release the accepted event";
/// Advice for an event that was never confirmed.
const NEVER_CONFIRMED: &str = "coderd is not known to have ever had it: `tallyline explain` shows its origin, `tallyline events correct` sets it to coderd's row";

impl Publisher {
    pub(super) async fn sole(
        &mut self,
        reader: &mut Reader,
        source_id: i16,
        cycle: &mut Cycle,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        if self.stops_for_coderd(reader, source_id).await? || self.is_held().await? {
            return Ok(());
        }
        self.settle_old(reader, source_id, &mut cycle.settled, stop).await?;
        while !stop.is_cancelled() {
            // an operator's act applies before the next request, not after the backlog
            if self.is_paused() || self.is_retired().await? || !self.identify(reader).await? {
                return Ok(());
            }
            if self.stops_for_coderd(reader, source_id).await? || self.is_held().await? {
                return Ok(());
            }
            // read for each request: the license may have been replaced, especially after a 401
            let (rows, now) = (reader.licenses().await?, self.ledger.clock.now());
            let license =
                match signing_license(rows, &self.settings.license_keys, self.coderd_id, now) {
                    Ok(license) => license,
                    Err(none) => {
                        self.condition.set(match none {
                            NoLicense::None => Condition::NoLicense,
                            NoLicense::OtherDeployment(why) => Condition::Refused(why),
                        });
                        return Ok(());
                    }
                };
            let more = self.publish(reader, source_id, &license, cycle).await?;
            if cycle.failure.is_some() {
                return Ok(());
            }
            if !more {
                break;
            }
        }
        self.condition.set(Condition::Working);
        Ok(())
    }

    /// coderd's publishing is cut off, so its marks at the first check are the last. A later mark
    /// means that it still publishes, and every further event could be billed twice. The ledger
    /// keeps the first mark: a restart does not accept a later mark.
    async fn stops_for_coderd(
        &mut self,
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

    /// Whether a finding of an audit, by any process, holds this source. It is read before each
    /// lease, so that every process stops.
    async fn is_held(&self) -> anyhow::Result<bool> {
        let Some(hold) = self
            .ledger
            .run(async |conn| holds::of_deployment(conn, self.settings.deployment).await)
            .await?
        else {
            return Ok(false);
        };
        self.condition.set(Condition::Held(format!("{}; ends with {}", hold.why, hold.ends)));
        Ok(true)
    }

    /// Publishes the events of one request. Returns whether more may be due at once.
    async fn publish(
        &self,
        reader: &mut Reader,
        source_id: i16,
        license: &SigningLicense,
        cycle: &mut Cycle,
    ) -> anyhow::Result<bool> {
        let now = self.now(reader).await?;
        let leased = self.lease(source_id, now, MAX_EVENTS_PER_REQUEST).await?;
        let ids: Vec<String> = leased.iter().map(|event| event.event_id.clone()).collect();
        let sent = match self.sift(reader, source_id, leased, now, cycle).await {
            Ok(sendable) if sendable.is_empty() => Ok(()),
            Ok(sendable) => self.send(source_id, license, &sendable, cycle).await,
            Err(fault) => Err(fault),
        };
        if let Err(fault) = sent {
            self.release(source_id, &ids).await;
            return Err(fault);
        }
        Ok(ids.len() == MAX_EVENTS_PER_REQUEST)
    }

    /// Releases leases of events that are not in flight. Its failure is only logged: leases end by
    /// themselves.
    pub(super) async fn release(&self, source_id: i16, ids: &[String]) {
        if let Err(error) = self
            .ledger
            .run(async |conn| publications::release(conn, source_id, &self.holder, ids).await)
            .await
        {
            warn!(%error, "publication leases not released; they will expire");
        }
    }

    /// Checks coderd's rows. Returns the events that may be sent.
    async fn sift(
        &self,
        reader: &mut Reader,
        source_id: i16,
        leased: Vec<Publication>,
        now: DateTime<Utc>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<Vec<Publication>> {
        let ids: Vec<String> = leased.iter().map(|event| event.event_id.clone()).collect();
        let rows = rows_by_id(reader, &ids).await?;
        let statements = self.statements(source_id, &ids).await?;
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
        self.settle(source_id, &published, Settlement::NotOurs, &mut cycle.settled).await?;
        self.ledger
            .run(async |conn| {
                publications::postpone(
                    conn,
                    source_id,
                    &self.holder,
                    &later,
                    self.ledger.clock.now(),
                )
                .await
            })
            .await?;
        if let Some((first, why)) = newly.first() {
            let (source, events) = (self.settings.deployment, newly.len());
            warn!(%source, events, first, why, "usage held: coderd's rows differ from the accepted events");
        }
        Ok(sendable)
    }
}
