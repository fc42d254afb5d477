//! Follows the pauses of operators, with one small query per second.

use std::time::Duration;

use prometheus::{IntGaugeVec, Opts, Registry};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::cause;
use crate::cli::Failure;
use crate::event::Topic;
use crate::ledger::{Ledger, Pausable, Pause, pauses};
use crate::pauses::Paused;
use crate::retry::Backoff;

/// Interval of the queries. A pause takes effect within this interval, after the work in flight.
const ASK: Duration = Duration::from_secs(1);
/// Timeout of one query.
const ANSWER: Duration = Duration::from_secs(5);

/// Queries the ledger, and informs all roles of this process. If the ledger does not answer, the
/// known pauses remain.
pub(super) struct PauseWatcher {
    ledger: Ledger,
    sender: watch::Sender<Vec<Pause>>,
    gauge: IntGaugeVec,
}

/// The metric of the pauses, not registered yet.
pub fn paused_gauge() -> prometheus::Result<IntGaugeVec> {
    let help = "1 if an operator has paused the operation, 0 if not. The topic is empty for a pause of all topics.";
    IntGaugeVec::new(Opts::new("tallyline_paused", help), &["operation", "topic"])
}

impl PauseWatcher {
    pub fn new(ledger: Ledger, registry: &Registry) -> prometheus::Result<(Self, Paused)> {
        let (sender, paused) = Paused::channel();
        let gauge = paused_gauge()?;
        registry.register(Box::new(gauge.clone()))?;
        let pause_watcher = PauseWatcher { ledger, sender, gauge };
        pause_watcher.show(&[]);
        Ok((pause_watcher, paused))
    }

    /// Waits for the first answer of the ledger. Returns false if it was stopped before.
    pub async fn first(&self, stop: &CancellationToken) -> bool {
        let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        while !self.ask().await {
            if !waits.wait(stop).await {
                return false;
            }
        }
        !stop.is_cancelled()
    }

    /// Continues to query until `stop`.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Failure> {
        while stop.run_until_cancelled(tokio::time::sleep(ASK)).await.is_some() {
            stop.run_until_cancelled(self.ask()).await;
        }
        Ok(())
    }

    /// Queries once. Returns whether the ledger answered.
    async fn ask(&self) -> bool {
        match tokio::time::timeout(ANSWER, self.ledger.run(pauses::list)).await {
            Ok(Ok(pauses)) => {
                self.update(pauses);
                true
            }
            Ok(Err(error)) => {
                debug!(error = cause::text(&error), "pauses not readable: the known pauses remain");
                false
            }
            Err(_) => false,
        }
    }

    fn update(&self, pauses: Vec<Pause>) {
        let before = self.sender.borrow().clone();
        if pauses == before {
            return;
        }
        for pause in pauses.iter().filter(|pause| !before.contains(pause)) {
            warn!("{pause}");
        }
        for pause in before.iter().filter(|pause| !pauses.contains(pause)) {
            info!(operation = pause.operation.as_str(), topic = pause.topic, "resumed");
        }
        self.show(&pauses);
        self.sender.send_replace(pauses);
    }

    fn show(&self, pauses: &[Pause]) {
        let is_paused = |operation, topic: Option<Topic>| {
            i64::from(pauses.iter().any(|pause| {
                pause.operation == operation && pause.topic.as_deref() == topic.map(Topic::name)
            }))
        };
        for operation in Pausable::ALL {
            self.gauge.with_label_values(&[operation.as_str(), ""]).set(is_paused(operation, None));
        }
        for topic in Topic::ALL {
            self.gauge
                .with_label_values(&[Pausable::Consume.as_str(), topic.name()])
                .set(is_paused(Pausable::Consume, Some(topic)));
        }
    }
}
