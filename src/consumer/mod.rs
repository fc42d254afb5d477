//! From the log into the ledger: one record, one transaction, rows first and the position with them.
//!
//! [`run`] joins the group and hands each assigned partition to a worker of its own. A worker holds the ledger's claim on its partition; whoever
//! claims it next fences this one.

mod arrival;
mod replay;
mod telemetry;
mod verify;
mod worker;

pub use arrival::read;
pub use replay::{Plan, PlannedPartition, Replay, ReplayError};
pub use telemetry::ConsumerTelemetry;
pub use verify::PositionFault;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::event::TopicPartition;
use crate::ledger::{Claim, Ledger};
use crate::log::{Assignment, Batch, Delivery, Log, LogError};
use crate::waiting::Waits;
use worker::Worker;

/// The Kafka group of all consumers, unless a pipeline names another.
pub const GROUP: &str = "tallyline";

/// A batch in hand at SIGTERM is finished within this, or dropped: then it is read again by whoever comes next.
pub const GRACE: Duration = Duration::from_secs(10);

/// One consumer: what it needs and what it tells.
#[derive(Clone)]
pub struct Consumer {
    /// What is read.
    pub log: Log,
    /// What is written.
    pub ledger: Ledger,
    /// The group that shares the partitions.
    pub group: String,
    /// Counters of this process.
    pub telemetry: ConsumerTelemetry,
    /// Partitions that this process holds but does not read, and why.
    pub stopped: Arc<Mutex<BTreeMap<TopicPartition, String>>>,
}

impl Consumer {
    /// A consumer of `group`.
    #[must_use]
    pub fn new(log: Log, ledger: Ledger, group: &str, telemetry: ConsumerTelemetry) -> Self {
        Consumer { log, ledger, group: group.to_owned(), telemetry, stopped: Arc::default() }
    }

    /// Consumes until `stop`; joins again after a fault.
    pub async fn run(&self, stop: &CancellationToken) {
        let mut waits = Waits::new(Duration::from_millis(200), Duration::from_secs(10));
        while !stop.is_cancelled() {
            match self.consume(stop, &mut waits).await {
                Ok(()) => return,
                Err(fault) => warn!(error = format!("{fault:#}"), "consumer joins again"),
            }
            if !waits.wait(stop).await {
                return;
            }
        }
    }

    /// One membership of the group, from joining to leaving.
    async fn consume(&self, stop: &CancellationToken, waits: &mut Waits) -> anyhow::Result<()> {
        let mut membership = self.log.join(&self.group, stop.clone()).await?;
        let faulty = CancellationToken::new();
        let mut workers: HashMap<TopicPartition, Worker> = HashMap::new();
        let outcome = loop {
            let delivery = tokio::select! {
                () = stop.cancelled() => break Ok(()),
                () = faulty.cancelled() => break Err(anyhow::anyhow!("a partition's position has moved back, or its claim could not be renewed")),
                delivery = membership.next() => delivery,
            };
            match delivery {
                Ok(Delivery::Assigned(assignment)) => match self.assigned(assignment, &mut workers, &faulty).await {
                    Ok(()) => waits.reset(),
                    Err(fault) => break Err(fault),
                },
                Ok(Delivery::Revoked(partitions)) => {
                    info!(partitions = partitions.len(), "partitions revoked");
                    finish(partitions.iter().filter_map(|partition| workers.remove(partition)).collect()).await;
                    self.forget(&partitions);
                }
                Ok(Delivery::Batch(batch)) => self.hand_over(&workers, batch, stop).await,
                Ok(Delivery::Fault { partition, error }) => self.stop_partition(partition, &verify::explain(error)),
                Err(LogError::Stopped) => break Ok(()),
                Err(fault) => break Err(fault.into()),
            }
            for (partition, next_offset) in workers.values_mut().filter_map(Worker::recorded) {
                membership.mark(partition, next_offset);
            }
        };
        finish(workers.into_values().collect()).await;
        if let Ok(mut stopped) = self.stopped.lock() {
            stopped.clear();
        }
        membership.leave().await;
        outcome
    }

    /// Claims each partition in the ledger, checks that the log still is the one that the position speaks of, and starts its worker.
    async fn assigned(
        &self,
        assignment: Assignment,
        workers: &mut HashMap<TopicPartition, Worker>,
        faulty: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut start = Vec::with_capacity(assignment.partitions.len());
        for partition in assignment.partitions.clone() {
            let claim = self.claim(partition).await?;
            match verify::position(&self.log, &claim).await {
                Ok(()) => {
                    start.push((partition, claim.next_offset));
                    workers.insert(partition, Worker::start(self.clone(), claim, faulty.clone()));
                }
                Err(verify::Problem::Fault(fault)) => self.stop_partition(partition, &fault.to_string()),
                Err(verify::Problem::Log(error)) => return Err(error.into()),
            }
        }
        info!(partitions = start.len(), "partitions assigned");
        assignment.start(start);
        Ok(())
    }

    async fn claim(&self, partition: TopicPartition) -> anyhow::Result<Claim> {
        let (log_start, _) = self.log.watermarks(partition).await?;
        Ok(self.ledger.claim(partition, log_start).await?)
    }

    async fn hand_over(&self, workers: &HashMap<TopicPartition, Worker>, batch: Batch, stop: &CancellationToken) {
        // a batch of a partition that was revoked meanwhile is somebody else's
        if let Some(worker) = workers.get(&batch.partition) {
            stop.run_until_cancelled(worker.hand_over(batch)).await;
        }
    }

    fn stop_partition(&self, partition: TopicPartition, reason: &str) {
        error!(%partition, reason, "partition stopped");
        self.telemetry.partition_stopped();
        if let Ok(mut stopped) = self.stopped.lock() {
            stopped.insert(partition, reason.to_owned());
        }
    }

    fn forget(&self, partitions: &[TopicPartition]) {
        if let Ok(mut stopped) = self.stopped.lock() {
            stopped.retain(|partition, _| !partitions.contains(partition));
        }
    }
}

/// Lets workers finish the batches in hand, all at once, within the grace.
async fn finish(workers: Vec<Worker>) {
    futures::future::join_all(workers.into_iter().map(Worker::finish)).await;
}
