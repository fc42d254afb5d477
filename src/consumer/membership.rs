//! One membership of the group: its partitions and their workers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::gaps::Gap;
use super::worker::Worker;
use super::{Consumer, Progress, verify};
use crate::event::TopicPartition;
use crate::ledger::{PartitionLease, generations};
use crate::log::{Batch, Consumer as Membership, Delivery, LogError};
use crate::retry::Backoff;

/// How often the group's marks are updated.
const MARK_INTERVAL: Duration = Duration::from_secs(1);

impl Consumer {
    /// Runs one membership of the group, from joining to leaving.
    pub(super) async fn consume(
        &self,
        stop: &CancellationToken,
        waits: &mut Backoff,
    ) -> anyhow::Result<()> {
        let generations = self.ledger.run(generations::all).await?;
        let membership = self.log.join(&self.group, stop.clone())?;
        membership.sign(generations.signature());
        let mut state = MembershipState::new(membership);
        let (faulty, mut paused) = (CancellationToken::new(), self.paused.clone());
        let mut tick = tokio::time::interval(MARK_INTERVAL);
        let mut recovered = std::pin::pin!(self.recovered(generations));
        let (gaps_in, mut gaps) = mpsc::unbounded_channel();
        let mut stalled = std::pin::pin!(self.stalled(gaps_in));
        let outcome = loop {
            tokio::select! {
                () = stop.cancelled() => break Ok(()),
                () = &mut recovered => break Err(anyhow::anyhow!("the ledger or the log was recovered")),
                () = faulty.cancelled() => break Err(anyhow::anyhow!("a partition's position has moved back")),
                stall = &mut stalled => break Err(self.leave_for(&stall)),
                Some(started) = state.started.join_next() => match started {
                    Ok(lease) => {
                        state.begin(self, lease, &faulty);
                        waits.reset();
                    }
                    Err(error) if error.is_cancelled() => {}
                    Err(panic) => break Err(panic.into()),
                },
                Some(gap) = gaps.recv() => state.step_over(self, gap),
                _ = tick.tick() => state.mark(self),
                () = paused.changed() => state.handle_pauses(self).await,
                room = room(state.undelivered.as_ref()), if state.undelivered.is_some() => state.deliver(room),
                delivery = state.membership.next(), if state.undelivered.is_none() => match delivery {
                    Ok(Delivery::Assigned(partitions)) => {
                        info!(partitions = partitions.len(), "partitions assigned");
                        state.start(self, &partitions);
                    }
                    Ok(Delivery::Revoked(partitions)) => state.revoked(self, &partitions).await,
                    Ok(Delivery::Batch(batch)) => state.take(batch),
                    Ok(Delivery::Fault { partition, error }) => self.stop_partition(partition, &verify::explain(error)),
                    Err(fault) => break ended(stop, fault),
                },
            }
        };
        state.leave().await;
        self.not_read(BTreeMap::clear);
        self.progress(Progress::end_all);
        outcome
    }
}

/// Waits for room at the batch's worker; none if the worker has ended.
async fn room(
    undelivered: Option<&(mpsc::Sender<Batch>, Batch)>,
) -> Option<mpsc::OwnedPermit<Batch>> {
    undelivered?.0.clone().reserve_owned().await.ok()
}

/// The state of one membership of the group.
struct MembershipState {
    membership: Membership,
    workers: HashMap<TopicPartition, Worker>,
    /// Partitions that are being started.
    starts: HashMap<TopicPartition, AbortHandle>,
    started: JoinSet<PartitionLease>,
    /// Assigned partitions that are paused and not read.
    held: BTreeSet<TopicPartition>,
    /// A batch that waits for room at its worker. Meanwhile no further delivery is taken.
    undelivered: Option<(mpsc::Sender<Batch>, Batch)>,
}

impl MembershipState {
    fn new(membership: Membership) -> Self {
        let (workers, starts, started) = (HashMap::new(), HashMap::new(), JoinSet::new());
        MembershipState {
            membership,
            workers,
            starts,
            started,
            held: BTreeSet::new(),
            undelivered: None,
        }
    }

    /// Starts each partition that is not paused.
    fn start(&mut self, consumer: &Consumer, partitions: &[TopicPartition]) {
        let marks = Arc::default();
        for partition in partitions {
            if consumer.paused.of_topic(partition.topic).is_some() {
                self.held.insert(*partition);
            } else {
                self.starts.insert(
                    *partition,
                    self.started.spawn(consumer.clone().start(*partition, Arc::clone(&marks))),
                );
            }
        }
    }

    /// Reads a leased partition from its position on.
    fn begin(&mut self, consumer: &Consumer, lease: PartitionLease, faulty: &CancellationToken) {
        let (partition, position) = (lease.partition, lease.next_offset);
        if self.starts.remove(&partition).is_some() {
            consumer.forget(&[partition]);
            self.membership.start(vec![(partition, position)]);
            self.workers.insert(partition, Worker::start(consumer.clone(), lease, faulty.clone()));
            consumer.progress(|progress| {
                progress.start(partition, position, consumer.ledger.clock.now())
            });
        }
    }

    /// Moves a partition at this position beyond the gap. A busy worker skips this, and a later
    /// check repeats it.
    fn step_over(&mut self, consumer: &Consumer, Gap { partition, from, until }: Gap) {
        if from < until
            && consumer.progress(|progress| progress.position(partition)) == Some(from)
            && let Some(worker) = self.workers.get(&partition)
        {
            let _ = worker.batches().try_send(Batch {
                partition,
                records: Vec::new(),
                next_offset: until,
            });
        }
    }

    /// Drops a batch of a partition that was revoked or paused meanwhile; its next consumer reads
    /// it again.
    fn take(&mut self, batch: Batch) {
        self.undelivered =
            self.workers.get(&batch.partition).map(|worker| (worker.batches(), batch));
    }

    /// Drops the batch if the worker has ended. The worker has cancelled the membership or stopped
    /// its partition. The batch is reread.
    fn deliver(&mut self, room: Option<mpsc::OwnedPermit<Batch>>) {
        if let (Some((_, batch)), Some(room)) = (self.undelivered.take(), room) {
            room.send(batch);
        }
    }

    async fn revoked(&mut self, consumer: &Consumer, partitions: &[TopicPartition]) {
        info!(partitions = partitions.len(), "partitions revoked");
        for partition in partitions {
            self.held.remove(partition);
        }
        self.end(consumer, partitions).await;
    }

    /// Applies pauses and resumptions. A paused partition stays assigned: its batch in flight is
    /// finished, and then it is not read. A resumed partition is started like a new assignment.
    async fn handle_pauses(&mut self, consumer: &Consumer) {
        let is_paused =
            |partition: &TopicPartition| consumer.paused.of_topic(partition.topic).is_some();
        let paused: Vec<TopicPartition> =
            self.workers.keys().chain(self.starts.keys()).copied().filter(is_paused).collect();
        if !paused.is_empty() {
            self.undelivered =
                self.undelivered.take().filter(|(_, batch)| !paused.contains(&batch.partition));
            self.membership.hold(paused.clone());
            self.end(consumer, &paused).await;
            self.held.extend(&paused);
            info!(partitions = paused.len(), "partitions held: they are paused");
        }
        let resumed: Vec<TopicPartition> =
            self.held.iter().copied().filter(|partition| !is_paused(partition)).collect();
        if !resumed.is_empty() {
            self.held.retain(is_paused);
            info!(partitions = resumed.len(), "partitions resumed");
            self.start(consumer, &resumed);
        }
    }

    /// Ends partitions. Their batches in flight are finished first, in parallel, within the grace
    /// period.
    async fn end(&mut self, consumer: &Consumer, partitions: &[TopicPartition]) {
        for start in partitions.iter().filter_map(|partition| self.starts.remove(partition)) {
            start.abort();
        }
        let ending: Vec<Worker> =
            partitions.iter().filter_map(|partition| self.workers.remove(partition)).collect();
        self.finish(ending).await;
        consumer.forget(partitions);
        consumer
            .progress(|progress| partitions.iter().for_each(|partition| progress.end(*partition)));
    }

    async fn finish(&self, ending: Vec<Worker>) {
        let marks = futures::future::join_all(ending.into_iter().map(Worker::finish)).await;
        for (partition, next_offset) in marks.into_iter().flatten() {
            self.membership.mark(partition, next_offset);
        }
    }

    /// Updates the group's marks for lag tools, and the progress.
    fn mark(&mut self, consumer: &Consumer) {
        let now = consumer.ledger.clock.now();
        for (partition, next_offset) in self.workers.values_mut().filter_map(Worker::recorded) {
            self.membership.mark(partition, next_offset);
            consumer.progress(|progress| progress.advance(partition, next_offset, now));
        }
        consumer.telemetry.progress(consumer.progress(|progress| progress.oldest()));
    }

    async fn leave(mut self) {
        self.started.abort_all();
        let ending = std::mem::take(&mut self.workers).into_values().collect();
        self.finish(ending).await;
        self.membership.leave().await;
    }
}

/// The result of a membership that has ended: success only after a requested stop. A dead thread or
/// task causes the same error.
fn ended(stop: &CancellationToken, fault: LogError) -> anyhow::Result<()> {
    match fault {
        LogError::Stopped if stop.is_cancelled() => Ok(()),
        LogError::Stopped => Err(anyhow::anyhow!("consumer task exited unexpectedly")),
        fault => Err(fault.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_ends_is_a_fault_unless_a_stop_was_requested() {
        let stop = CancellationToken::new();
        assert!(ended(&stop, LogError::Stopped).unwrap_err().to_string().contains("exited"));
        assert!(ended(&stop, LogError::Refused("no".into())).is_err());
        stop.cancel();
        assert!(ended(&stop, LogError::Stopped).is_ok());
    }
}
