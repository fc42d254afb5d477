//! From the publication queue to the vendor: money leaves only here.
//!
//! One [`Publisher`] serves one source. A cycle leases what is due, looks at coderd's own rows once more (`look`), writes the request down, sends
//! it under the license that coderd itself would use (`signing`), and records each event's verdict with the request that carried it (`send`).
//! Several processes may publish the same source: leases keep their events apart.

mod condition;
mod look;
mod send;
mod settings;
mod shadow;
mod signing;
mod sole;
mod telemetry;

pub use condition::{Condition, Shown};
pub use look::sendable_after;
pub use settings::Settings;
pub use telemetry::PublisherTelemetry;

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use crate::coderd::{Reader, UsageRow};
use crate::ledger::{Ledger, Pausable, Settled, Settlement};
use crate::tallyman::{SendError, SettingsError, TallymanClient};
use crate::waiting::Waits;

use look::OperatorStatement;

/// So many old events are compared with coderd's rows in one read.
const OLD_PAGE: i64 = 500;

/// The publisher of one source.
pub struct Publisher {
    ledger: Ledger,
    settings: Settings,
    client: TallymanClient,
    telemetry: PublisherTelemetry,
    /// Names this publisher's leases; no two have the same.
    holder: String,
    condition: Shown,
    /// Kept from cycle to cycle; after a fault a new one is opened.
    reader: Option<Reader>,
    /// coderd's own deployment id; the source's, as long as it is not known.
    coderd_id: Uuid,
}

/// What one cycle did. Events are counted by their requests' verdicts as recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cycle {
    /// Requests written down and sent.
    pub requests: usize,
    /// Events taken by the vendor.
    pub accepted: usize,
    /// Events that the vendor refused for ever.
    pub refused: usize,
    /// Events that it refused this time.
    pub refused_for_now: usize,
    /// Events that its answer did not name.
    pub left_out: usize,
    /// Events settled without an answer.
    pub settled: Settled,
    /// Events not sent, because coderd's row says something else or is gone. In shadow mode: differences.
    pub held_back: usize,
    /// Events left alone for now: coderd has a fresh claim on them, or in shadow mode has yet to publish them.
    pub waiting: usize,
    /// The request that brought no verdicts; it ended the cycle.
    pub failure: Option<SendError>,
}

impl Publisher {
    /// A publisher that does nothing yet.
    ///
    /// # Errors
    /// [`SettingsError`]: the vendor's URL, or TLS.
    pub fn new(ledger: Ledger, settings: Settings, telemetry: PublisherTelemetry) -> Result<Self, SettingsError> {
        let client = TallymanClient::new(&settings.tallyman)?;
        let condition = Shown::new(settings.deployment, settings.sole, ledger.clock.clone());
        let holder = Uuid::new_v4().to_string();
        let coderd_id = settings.deployment;
        Ok(Publisher { ledger, settings, client, telemetry, holder, condition, reader: None, coderd_id })
    }

    /// How it stands, for as long as anyone cares to look.
    #[must_use]
    pub fn condition(&self) -> Shown {
        self.condition.clone()
    }

    /// Publishes until `stop`; then the request in flight is finished first, within the request's
    /// timeout. Nothing is leased, sent or settled before `compare_marks` has succeeded: in a ledger that
    /// went back before this process began, a pending publication may have been sent.
    pub async fn run<F>(&mut self, compare_marks: impl Fn() -> F, stop: &CancellationToken)
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        self.wait_for_marks(compare_marks, stop).await;
        if self.settings.sole {
            self.wait_for_tallyman(stop).await;
        }
        let mut waits = Waits::new(self.settings.first_wait, self.settings.longest_wait);
        while !stop.is_cancelled() {
            let goes_on = match self.cycle(stop).await {
                Ok(Cycle { failure: None, .. }) => {
                    waits.reset();
                    stop.run_until_cancelled(self.rest()).await.is_some()
                }
                Ok(_) | Err(_) => waits.wait(stop).await,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Until the next cycle: it comes at once where a pause begins or ends.
    async fn rest(&self) {
        let mut paused = self.settings.paused.clone();
        let was_paused = paused.of(Pausable::Publish).is_some();
        let changed = async {
            while paused.of(Pausable::Publish).is_some() == was_paused {
                paused.changed().await;
            }
        };
        tokio::select! {
            () = tokio::time::sleep(self.settings.rest()) => {}
            () = changed => {}
        }
    }

    /// Whether an operator has paused publishing: then that is the condition, and nothing new is leased.
    fn is_paused(&self) -> bool {
        let pause = self.settings.paused.of(Pausable::Publish);
        if let Some(pause) = &pause {
            self.condition.set(Condition::Paused(pause.to_string()));
        }
        pause.is_some()
    }

    /// Whether an operator has retired the source: then that is the condition, and nothing new is leased.
    async fn is_retired(&self) -> anyhow::Result<bool> {
        let Some(retirement) = self.ledger.in_time(self.ledger.retirement(self.settings.deployment)).await? else { return Ok(false) };
        self.condition.set(Condition::Retired(retirement.to_string()));
        Ok(true)
    }

    /// Waits until the marks of the consumers' group are compared. Where one is ahead of the ledger, a
    /// recovery is open then, and nothing is sent.
    async fn wait_for_marks<F>(&self, compare_marks: impl Fn() -> F, stop: &CancellationToken)
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        let mut waits = Waits::new(Duration::from_millis(500), Duration::from_secs(10));
        while let Some(Err(fault)) = stop.run_until_cancelled(compare_marks()).await {
            let why =
                format!("whether the ledger was restored from a backup is not known: {}; waiting", crate::cause::text(fault.as_ref()));
            self.condition.set(Condition::Failing(why));
            self.show_what_waits().await;
            if !waits.wait(stop).await {
                return;
            }
        }
        self.condition.set(Condition::Starting);
    }

    /// Before anything is leased or written down, the vendor is there: otherwise every event would have failed attempts on record.
    async fn wait_for_tallyman(&self, stop: &CancellationToken) {
        let mut waits = Waits::new(Duration::from_millis(500), Duration::from_secs(10));
        while let Some(reached) = stop.run_until_cancelled(self.client.reach()).await {
            match reached {
                Ok(()) => return self.condition.set(Condition::Starting),
                Err(failure) => self.condition.set(Condition::Failing(format!("{}; waiting", self.failing(&failure)))),
            }
            self.show_what_waits().await;
            if !waits.wait(stop).await {
                return;
            }
        }
    }

    /// Why there are no verdicts, and where to look.
    fn failing(&self, failure: &SendError) -> String {
        let address = self.client.address();
        match failure {
            SendError::Unreachable(cause) => {
                format!("Tallyman at {address} cannot be reached ({cause}): check publish.url, the network and the proxy")
            }
            other => format!("Tallyman at {address}: {other}"),
        }
    }

    /// Does all that is due now, once. Between two requests it hears `stop`.
    ///
    /// # Errors
    /// When the ledger or coderd's database cannot be used; it is the condition then, too. A failed request is no error but the cycle's
    /// [`failure`](Cycle::failure).
    pub async fn cycle(&mut self, stop: &CancellationToken) -> anyhow::Result<Cycle> {
        let outcome = self.whole_cycle(stop).await;
        match &outcome {
            Ok(Cycle { failure: Some(failure), .. }) => self.condition.set(Condition::Failing(self.failing(failure))),
            Ok(cycle) => debug!(?cycle, "publisher's cycle"),
            Err(fault) => self.condition.set(Condition::Failing(crate::cause::text(fault.as_ref()))),
        }
        self.telemetry.publishes(self.settings.deployment, self.condition.publishes());
        outcome
    }

    async fn whole_cycle(&mut self, stop: &CancellationToken) -> anyhow::Result<Cycle> {
        let Some(database) = &self.settings.coderd else {
            self.condition.set(Condition::NoDatabase);
            return Ok(Cycle::default());
        };
        let Some(source) = self.ledger.in_time(self.ledger.source(self.settings.deployment)).await? else {
            let mut reader = database.connect().await?;
            // a wrong deployment id never has an event
            if self.identify(&mut reader).await? {
                self.condition.set(Condition::NotIntroduced);
            }
            reader.close().await;
            return Ok(Cycle::default());
        };
        let source_id = source.id;
        // whatever comes of this cycle: usage that waits must be seen to wait
        self.show_queue(source_id).await?;
        if self.is_retired().await? {
            return Ok(Cycle::default());
        }
        if let Some(recovering) = self.ledger.in_time(self.ledger.recovering()).await? {
            let since = recovering.opened_at.to_rfc3339_opts(SecondsFormat::Secs, true);
            let why =
                format!("the ledger was restored from a backup (seen at {since}) and has not caught up: `tallyline status` says with what");
            self.condition.set(Condition::Recovering(why));
            return Ok(Cycle::default());
        }
        let mut cycle = Cycle::default();
        if !self.is_paused() {
            let mut reader = match self.reader.take() {
                Some(reader) => reader,
                None => database.connect().await?,
            };
            if !self.identify(&mut reader).await? {
                return Ok(cycle);
            }
            let done = match self.settings.sole {
                true => self.sole(&mut reader, source_id, &mut cycle, stop).await,
                false => self.shadow(&mut reader, source_id, &mut cycle, stop).await,
            };
            // what was done before a fault is done
            self.telemetry.cycle(&cycle);
            done?;
            self.reader = Some(reader);
        }
        self.show_queue(source_id).await?;
        Ok(cycle)
    }

    /// Whether coderd is the one of this source; if not, that is the condition. Where a fact may not be read, only mode `shadow` goes on.
    async fn identify(&mut self, reader: &mut Reader) -> anyhow::Result<bool> {
        let facts = reader.identity_facts().await?;
        let refusal = self.ledger.in_time(self.ledger.identity_refusal(self.settings.deployment, (&facts).into())).await?;
        if let Some(id) = facts.deployment_id {
            self.coderd_id = id;
        }
        let unknown = facts.problem.filter(|_| self.settings.sole);
        let refusal = refusal.map(|refusal| refusal.to_string()).or(unknown);
        let Some(why) = refusal else { return Ok(true) };
        self.condition.set(Condition::Refused(why));
        Ok(false)
    }

    /// The queue while nothing is done with it.
    async fn show_what_waits(&self) {
        if let Ok(Some(source)) = self.ledger.in_time(self.ledger.source(self.settings.deployment)).await
            && let Err(error) = self.show_queue(source.id).await
        {
            debug!(error = crate::cause::text(error.as_ref()), "the queue cannot be looked at");
        }
    }

    async fn show_queue(&self, source_id: i16) -> anyhow::Result<()> {
        let pending = self.ledger.in_time(self.ledger.pending_publications(source_id)).await?;
        self.telemetry.queue(self.settings.deployment, &pending, self.ledger.clock.now());
        Ok(())
    }

    /// Now, by which an event is too old and a claim of coderd over: the earlier of our own clock and coderd's database's. What is too old is so for
    /// good, and that is not for one clock to say. How long something waits goes by our own, as it is looked for by that.
    async fn now(&self, reader: &mut Reader) -> anyhow::Result<DateTime<Utc>> {
        Ok(self.ledger.clock.now().min(reader.now().await?))
    }

    /// Settles what is too old to be sent, unless coderd has published it: then it is not ours. While coderd holds a fresh claim its answer
    /// may be on the way, and the event is left for the next cycle.
    async fn settle_old(&self, reader: &mut Reader, source_id: i16, settled: &mut Settled, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut after = None;
        while !stop.is_cancelled() {
            let now = self.now(reader).await?;
            let old = self.ledger.old_publications(source_id, look::sendable_after(now), after.as_ref(), OLD_PAGE);
            let old = self.ledger.in_time(old).await?;
            let Some(last) = old.last().cloned() else { return Ok(()) };
            let ids: Vec<String> = old.into_iter().map(|(_, id)| id).collect();
            let rows = rows_by_id(reader, &ids).await?;
            let row = |id: &String| rows.get(id);
            let (published, rest): (Vec<_>, Vec<_>) = ids.into_iter().partition(|id| row(id).is_some_and(|row| row.published_at.is_some()));
            let too_old: Vec<_> = rest.into_iter().filter(|id| !row(id).is_some_and(|row| look::claimed(row, now))).collect();
            self.settle(source_id, &published, Settlement::NotOurs, settled).await?;
            self.settle(source_id, &too_old, Settlement::TooOld, settled).await?;
            after = Some(last);
        }
        Ok(())
    }

    /// What operators have said of these events.
    async fn statements(&self, source_id: i16, ids: &[String]) -> anyhow::Result<HashMap<String, OperatorStatement>> {
        let lost = self.ledger.in_time(self.ledger.lost_ids(source_id, ids)).await?;
        let refused = self.ledger.in_time(self.ledger.refused_states(self.settings.deployment, ids)).await?;
        let of = |id: &String| OperatorStatement { lost: lost.contains(id), mended: refused.get(id).is_some_and(|refused| refused.passed) };
        Ok(ids.iter().map(|id| (id.clone(), of(id))).collect())
    }

    async fn settle(&self, source_id: i16, ids: &[String], settlement: Settlement, settled: &mut Settled) -> anyhow::Result<()> {
        if !ids.is_empty() {
            let more = self.ledger.in_time(self.ledger.settle_publications(source_id, &self.holder, ids, settlement)).await?;
            settled.not_ours += more.not_ours;
            settled.expired += more.expired;
            settled.unknown += more.unknown;
        }
        Ok(())
    }
}

async fn rows_by_id(reader: &mut Reader, ids: &[String]) -> anyhow::Result<HashMap<String, UsageRow>> {
    Ok(reader.usage(ids).await?.into_iter().map(|row| (row.id.clone(), row)).collect())
}
