//! Sends the publication queue to the vendor: money leaves only here.
//!
//! One [`Publisher`] serves one source. Several lanes send at the same time (`lanes`): each leases
//! due events, checks coderd's own rows (`source_check`), and writes the request down. It sends the
//! request under the license that coderd itself would use (`signing`). It records each event's
//! verdict with its request (`send`). Several processes may publish the same source: leases
//! separate their events.

mod backlog;
mod condition;
mod cycle;
mod lane;
mod lanes;
mod last_check;
mod last_count;
mod queue;
mod round;
mod send;
mod settings;
mod shadow;
mod signing;
mod sole;
mod source_check;
mod telemetry;

pub use condition::{Condition, ConditionHandle};
pub use cycle::Cycle;
pub use settings::Settings;
pub use source_check::sendable_after;
pub use telemetry::PublisherTelemetry;

use std::time::Duration;

use condition::recovering;
use last_count::LastCount;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use crate::coderd::Reader;
use crate::ledger::{Ledger, Pausable, identity, recoveries, retirements, sources};
use crate::retry::Backoff;
use crate::tallyman::{SendError, SettingsError, TallymanClient};

/// The publisher of one source.
pub struct Publisher {
    ledger: Ledger,
    settings: Settings,
    client: TallymanClient,
    telemetry: PublisherTelemetry,
    /// Names this publisher's leases in mode `shadow`; unique. In mode `sole` each request has its
    /// own.
    holder: String,
    condition: ConditionHandle,
    /// Kept between cycles; None after an error: the next cycle connects.
    reader: Option<Reader>,
    counted: LastCount,
}

impl Publisher {
    /// Creates an idle publisher.
    pub fn new(
        ledger: Ledger,
        settings: Settings,
        telemetry: PublisherTelemetry,
    ) -> Result<Self, SettingsError> {
        let client = TallymanClient::new(&settings.tallyman)?;
        let condition =
            ConditionHandle::new(settings.deployment, settings.sole, ledger.clock.clone());
        let holder = Uuid::new_v4().to_string();
        Ok(Publisher {
            ledger,
            settings,
            client,
            telemetry,
            holder,
            condition,
            reader: None,
            counted: LastCount::default(),
        })
    }

    /// The condition of this publisher.
    #[must_use]
    pub fn condition(&self) -> ConditionHandle {
        self.condition.clone()
    }

    /// Publishes until `stop`. It finishes the requests in flight, within their timeout.
    /// Before `compare_marks` succeeds it leases, sends and settles nothing. If the ledger went
    /// back before this process began, a pending publication may have been sent.
    pub async fn run<F>(&mut self, compare_marks: impl Fn() -> F, stop: &CancellationToken)
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        self.wait_for_marks(compare_marks, stop).await;
        if self.settings.sole {
            self.wait_for_tallyman(stop).await;
        }
        let mut waits = Backoff::new(self.settings.first_wait, self.settings.longest_wait);
        while !stop.is_cancelled() {
            let is_running = match self.cycle(stop).await {
                Ok(cycle) if !cycle.is_failed() => {
                    waits.reset();
                    stop.run_until_cancelled(self.rest()).await.is_some()
                }
                Ok(_) | Err(_) => waits.wait(stop).await,
            };
            if !is_running {
                return;
            }
        }
    }

    /// Waits for the next cycle. The start or end of a pause begins it at once.
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

    /// Whether an operator has paused publishing. If so, sets the condition, and nothing new is
    /// leased.
    fn is_paused(&self) -> bool {
        let pause = self.settings.paused.of(Pausable::Publish);
        if let Some(pause) = &pause {
            self.condition.set(Condition::Paused(pause.to_string()));
        }
        pause.is_some()
    }

    /// Whether an operator has retired the source. If so, sets the condition, and nothing new is
    /// leased.
    async fn is_retired(&self) -> anyhow::Result<bool> {
        let Some(retirement) = self
            .ledger
            .run(async |conn| retirements::of_deployment(conn, self.settings.deployment).await)
            .await?
        else {
            return Ok(false);
        };
        self.condition.set(Condition::Retired(retirement.to_string()));
        Ok(true)
    }

    /// Waits until the marks of the consumer group are compared. If a mark is ahead of the ledger,
    /// the comparison opens a recovery, and nothing is sent.
    async fn wait_for_marks<F>(&self, compare_marks: impl Fn() -> F, stop: &CancellationToken)
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        let mut waits = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        while let Some(Err(fault)) = stop.run_until_cancelled(compare_marks()).await {
            let why = format!(
                "the marks of the consumer group are not readable, so a restored ledger would go unnoticed: {}; waiting",
                crate::cause::text(fault.as_ref())
            );
            self.condition.set(Condition::Failing(why));
            self.show_backlog().await;
            if !waits.wait(stop).await {
                return;
            }
        }
        self.condition.set(Condition::Starting);
    }

    /// Waits for the vendor before it leases or writes anything down. Otherwise every event would
    /// have recorded failed attempts.
    async fn wait_for_tallyman(&self, stop: &CancellationToken) {
        let mut waits = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        while let Some(reached) = stop.run_until_cancelled(self.client.reach()).await {
            match reached {
                Ok(()) => return self.condition.set(Condition::Starting),
                Err(failure) => self
                    .condition
                    .set(Condition::Failing(format!("{}; waiting", self.failing(&failure)))),
            }
            self.show_backlog().await;
            if !waits.wait(stop).await {
                return;
            }
        }
    }

    /// Why a request failed, and what to check.
    fn failing(&self, failure: &SendError) -> String {
        let address = self.client.address();
        match failure {
            SendError::Unreachable(cause) => {
                format!(
                    "Tallyman at {address} cannot be reached ({cause}): check publish.url, the network and the proxy"
                )
            }
            other => format!("Tallyman at {address}: {other}"),
        }
    }

    /// Does all due work, until nothing is due and no request is in flight. It checks `stop` before
    /// each request. An error also sets the condition. A failed request is not an error but the
    /// cycle's [`failure`](Cycle::failure).
    pub async fn cycle(&mut self, stop: &CancellationToken) -> anyhow::Result<Cycle> {
        let outcome = self.whole_cycle(stop).await;
        match &outcome {
            Ok(Cycle { failure: Some(failure), .. }) => {
                self.condition.set(Condition::Failing(self.failing(failure)))
            }
            Ok(cycle) => debug!(?cycle, "publisher cycle"),
            Err(fault) => {
                self.condition.set(Condition::Failing(crate::cause::text(fault.as_ref())))
            }
        }
        self.telemetry.publishes(self.settings.deployment, self.condition.publishes());
        outcome
    }

    async fn whole_cycle(&mut self, stop: &CancellationToken) -> anyhow::Result<Cycle> {
        let Some(database) = &self.settings.coderd else {
            self.condition.set(Condition::NoDatabase);
            return Ok(Cycle::default());
        };
        let Some(source) = self
            .ledger
            .run(async |conn| sources::get(conn, self.settings.deployment).await)
            .await?
        else {
            let mut reader = database.connect().await?;
            // a wrong deployment id never has an event
            if self.identify(&mut reader).await?.is_some() {
                self.condition.set(Condition::NotIntroduced);
            }
            reader.close().await;
            return Ok(Cycle::default());
        };
        let source_id = source.id;
        // before the cycle: the backlog is shown even if the cycle fails
        self.show_queue(source_id).await?;
        if self.is_retired().await? {
            return Ok(Cycle::default());
        }
        if let Some(recovery) = self.ledger.run(recoveries::open).await? {
            self.condition.set(recovering(&recovery));
            return Ok(Cycle::default());
        }
        let mut cycle = Cycle::default();
        if !self.is_paused() {
            let mut reader = match self.reader.take() {
                Some(reader) => reader,
                None => database.connect().await?,
            };
            if self.identify(&mut reader).await?.is_none() {
                return Ok(cycle);
            }
            match self.settings.sole {
                true => self.sole(&mut reader, source_id, &mut cycle, stop).await?,
                false => self.shadow(&mut reader, source_id, &mut cycle, stop).await?,
            }
            self.reader = Some(reader);
        }
        self.show_queue(source_id).await?;
        Ok(cycle)
    }

    /// coderd's own deployment id, if coderd belongs to this source; if not, sets the condition. If
    /// the role cannot read a fact, only mode `shadow` continues.
    async fn identify(&self, reader: &mut Reader) -> anyhow::Result<Option<Uuid>> {
        let facts = reader.identity_facts().await?;
        let refusal = self
            .ledger
            .run(async |conn| {
                identity::refusal_of(conn, self.settings.deployment, (&facts).into()).await
            })
            .await?;
        let unknown = facts.problem.filter(|_| self.settings.sole);
        let Some(why) = refusal.map(|refusal| refusal.to_string()).or(unknown) else {
            return Ok(Some(facts.deployment_id.unwrap_or(self.settings.deployment)));
        };
        self.condition.set(Condition::Refused(why));
        Ok(None)
    }
}
