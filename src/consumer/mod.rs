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
pub use verify::{PositionFault, Problem as PositionProblem, position as check_position};

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::event::TopicPartition;
use crate::ledger::{Claim, Ledger, Lives};
use crate::log::{Batch, Consumer as Membership, Delivery, Log, LogError};
use crate::waiting::Waits;
use worker::Worker;

/// The Kafka group of all consumers, unless a pipeline names another.
pub const GROUP: &str = "tallyline";

/// A batch in hand at SIGTERM is finished within this, or dropped: then it is read again by whoever comes next.
pub const GRACE: Duration = Duration::from_secs(10);

/// How often a consumer looks whether something was recovered: then it joins again, and also what it had stopped is read.
const LOOK_FOR_RECOVERY: Duration = Duration::from_secs(2);

/// How often the group is told how far the partitions are recorded.
const MARK: Duration = Duration::from_secs(1);

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
        let lives = self.ledger.in_time(self.ledger.lives()).await?;
        let membership = self.log.join(&self.group, stop.clone()).await?;
        membership.sign(lives.mark());
        let mut ours = Ours { membership, workers: HashMap::new(), starts: HashMap::new(), started: JoinSet::new() };
        let faulty = CancellationToken::new();
        let mut tick = tokio::time::interval(MARK);
        let mut recovered = std::pin::pin!(self.recovered(lives));
        let outcome = loop {
            tokio::select! {
                () = stop.cancelled() => break Ok(()),
                () = &mut recovered => break Err(anyhow::anyhow!("the ledger or the log was recovered")),
                () = faulty.cancelled() => break Err(anyhow::anyhow!("a partition's position has moved back")),
                Some(started) = ours.started.join_next() => {
                    if let Ok(claim) = started {
                        ours.begin(self, claim, &faulty);
                        waits.reset();
                    }
                }
                _ = tick.tick() => ours.mark(),
                delivery = ours.membership.next() => match delivery {
                    Ok(Delivery::Assigned(assignment)) => ours.assigned(self, &assignment.partitions),
                    Ok(Delivery::Revoked(partitions)) => {
                        ours.revoked(&partitions).await;
                        self.forget(&partitions);
                    }
                    Ok(Delivery::Batch(batch)) => self.hand_over(&ours.workers, batch, stop).await,
                    Ok(Delivery::Fault { partition, error }) => self.stop_partition(partition, &verify::explain(error)),
                    Err(LogError::Stopped) => break Ok(()),
                    Err(fault) => break Err(fault.into()),
                },
            }
        };
        ours.leave().await;
        self.not_read(BTreeMap::clear);
        outcome
    }

    /// Answers once the ledger is another incarnation, or a partition's life was ended.
    async fn recovered(&self, lives: Lives) {
        loop {
            tokio::time::sleep(LOOK_FOR_RECOVERY).await;
            // one that does not answer is met by the workers
            if self.ledger.in_time(self.ledger.lives()).await.is_ok_and(|now| now != lives) {
                return;
            }
        }
    }

    /// Claims the partition in the ledger and checks that the log still is the one that its position speaks of. What may pass is waited for: one
    /// partition that has no leader holds up no other.
    async fn start(self, partition: TopicPartition) -> Claim {
        let mut waits = Waits::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let problem = match self.claim(partition).await {
                Ok(claim) => match verify::position(&self.log, &claim).await {
                    Ok(()) => return claim,
                    Err(verify::Problem::Fault(fault)) => {
                        self.stop_partition(partition, &fault.to_string());
                        // only a new assignment looks again, as comes with a recovery
                        std::future::pending().await
                    }
                    Err(verify::Problem::Log(error)) => error.to_string(),
                },
                Err(error) => format!("{error:#}"),
            };
            self.not_started(partition, &problem);
            tokio::time::sleep(waits.next_wait()).await;
        }
    }

    async fn claim(&self, partition: TopicPartition) -> anyhow::Result<Claim> {
        let (log_start, _) = self.log.watermarks(partition).await?;
        Ok(self.ledger.in_time(self.ledger.claim(partition, log_start)).await?)
    }

    async fn hand_over(&self, workers: &HashMap<TopicPartition, Worker>, batch: Batch, stop: &CancellationToken) {
        // a batch of a partition that was revoked meanwhile is somebody else's
        if let Some(worker) = workers.get(&batch.partition) {
            stop.run_until_cancelled(worker.hand_over(batch)).await;
        }
    }

    fn not_started(&self, partition: TopicPartition, problem: &str) {
        let reason = format!("not read yet: {problem}");
        if self.not_read(|not_read| not_read.insert(partition, reason.clone())).as_ref() != Some(&reason) {
            warn!(%partition, reason, "partition not started, trying again");
        }
    }

    fn stop_partition(&self, partition: TopicPartition, reason: &str) {
        error!(%partition, reason, "partition stopped");
        self.not_read(|not_read| not_read.insert(partition, reason.to_owned()));
    }

    fn forget(&self, partitions: &[TopicPartition]) {
        self.not_read(|not_read| not_read.retain(|partition, _| !partitions.contains(partition)));
    }

    /// Changes what is told about partitions that are not read.
    fn not_read<R>(&self, change: impl FnOnce(&mut BTreeMap<TopicPartition, String>) -> R) -> R {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut stopped);
        self.telemetry.not_read(stopped.len());
        changed
    }
}

/// What one membership of the group has.
struct Ours {
    membership: Membership,
    workers: HashMap<TopicPartition, Worker>,
    /// Partitions on their way to a worker.
    starts: HashMap<TopicPartition, AbortHandle>,
    started: JoinSet<Claim>,
}

impl Ours {
    fn assigned(&mut self, consumer: &Consumer, partitions: &[TopicPartition]) {
        info!(partitions = partitions.len(), "partitions assigned");
        for partition in partitions {
            self.starts.insert(*partition, self.started.spawn(consumer.clone().start(*partition)));
        }
    }

    /// A claimed partition is read from its position on.
    fn begin(&mut self, consumer: &Consumer, claim: Claim, faulty: &CancellationToken) {
        let partition = claim.partition;
        if self.starts.remove(&partition).is_some() {
            consumer.forget(&[partition]);
            self.membership.start(vec![(partition, claim.next_offset)]);
            self.workers.insert(partition, Worker::start(consumer.clone(), claim, faulty.clone()));
        }
    }

    /// Batches in hand are finished first, all at once, within the grace.
    async fn revoked(&mut self, partitions: &[TopicPartition]) {
        info!(partitions = partitions.len(), "partitions revoked");
        for start in partitions.iter().filter_map(|partition| self.starts.remove(partition)) {
            start.abort();
        }
        let ending: Vec<Worker> = partitions.iter().filter_map(|partition| self.workers.remove(partition)).collect();
        self.finish(ending).await;
    }

    async fn finish(&self, ending: Vec<Worker>) {
        let marks = futures::future::join_all(ending.into_iter().map(Worker::finish)).await;
        for (partition, next_offset) in marks.into_iter().flatten() {
            self.membership.mark(partition, next_offset);
        }
    }

    /// Tells the group how far each partition is recorded, for lag tools.
    fn mark(&mut self) {
        for (partition, next_offset) in self.workers.values_mut().filter_map(Worker::recorded) {
            self.membership.mark(partition, next_offset);
        }
    }

    async fn leave(mut self) {
        self.started.abort_all();
        let ending = std::mem::take(&mut self.workers).into_values().collect();
        self.finish(ending).await;
        self.membership.leave().await;
    }
}
