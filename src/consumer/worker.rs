//! Records the batches of one assigned partition in order, under its lease.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::parts::Part;
use super::{Consumer, arrival};
use crate::cause;
use crate::event::TopicPartition;
use crate::ledger::{
    Arrival, Chain, PartitionLease, RecordError, StatementError, last_record, record,
};
use crate::log::Batch;
use crate::retry::Backoff;

/// Grace period: a batch in flight at SIGTERM is finished within it. Otherwise it is dropped, and
/// another process reads it.
pub const GRACE: Duration = Duration::from_secs(10);

/// If PostgreSQL refuses more records in a row, the fault is probably in Tallyline, and the
/// partition stops.
const REFUSED_IN_A_ROW: u32 = 100;

/// A handle on the task that records a partition's batches.
pub(super) struct Worker {
    batches: mpsc::Sender<Batch>,
    recorded: mpsc::UnboundedReceiver<i64>,
    partition: TopicPartition,
    finishing: CancellationToken,
    task: JoinHandle<()>,
}

impl Worker {
    /// Starts the task. The task cancels `faulty` when the consumer must rejoin.
    pub fn start(consumer: Consumer, lease: PartitionLease, faulty: CancellationToken) -> Self {
        let (batches, incoming) = mpsc::channel(1);
        let (positions, recorded) = mpsc::unbounded_channel();
        let partition = lease.partition;
        let finishing = CancellationToken::new();
        let task = Task {
            consumer,
            lease,
            finishing: finishing.clone(),
            positions,
            refused_in_a_row: 0,
            last_problem: None,
        };
        Worker {
            batches,
            recorded,
            partition,
            finishing,
            task: tokio::spawn(task.run(incoming, faulty)),
        }
    }

    /// The worker's input. It has room for one batch while another is in flight, and is closed once
    /// the worker has ended.
    pub fn batches(&self) -> mpsc::Sender<Batch> {
        self.batches.clone()
    }

    /// The newest position recorded since the last call.
    pub fn recorded(&mut self) -> Option<(TopicPartition, i64)> {
        let mut newest = None;
        while let Ok(next_offset) = self.recorded.try_recv() {
            newest = Some(next_offset);
        }
        newest.map(|next_offset| (self.partition, next_offset))
    }

    /// Finishes the batch in flight, or drops it after the grace period. Returns the newest
    /// position recorded since [`Worker::recorded`].
    pub async fn finish(mut self) -> Option<(TopicPartition, i64)> {
        // A batch that is still in the channel is dropped.
        self.finishing.cancel();
        let (closed, _) = mpsc::channel(1);
        drop(std::mem::replace(&mut self.batches, closed));
        if tokio::time::timeout(GRACE, &mut self.task).await.is_err() {
            self.task.abort();
        }
        self.recorded()
    }
}

struct Task {
    consumer: Consumer,
    lease: PartitionLease,
    finishing: CancellationToken,
    positions: mpsc::UnboundedSender<i64>,
    refused_in_a_row: u32,
    /// The reason why the batch in flight is retried.
    last_problem: Option<String>,
}

/// Reasons why a worker ends.
enum WorkerEnd {
    /// The consumer must rejoin the group.
    Rejoin,
    /// The partition must not be read further.
    Stop(String),
    /// The partition is revoked, and its next consumer reads the batch in flight again.
    Drop,
}

impl Task {
    async fn run(mut self, mut incoming: mpsc::Receiver<Batch>, faulty: CancellationToken) {
        while let Some(Some(batch)) =
            self.finishing.clone().run_until_cancelled(incoming.recv()).await
        {
            let next_offset = batch.next_offset;
            if next_offset <= self.lease.next_offset {
                continue;
            }
            let topic = batch.partition.topic;
            let (log, signed_from) = (&self.consumer.log, self.lease.signed_from);
            let read = |record| arrival::verified(log, signed_from, topic, record);
            let arrivals: Vec<Arrival> = batch.records.into_iter().map(read).collect();
            match self.record(arrivals, next_offset).await {
                Ok(()) => {
                    let _ = self.positions.send(next_offset);
                }
                Err(WorkerEnd::Rejoin) => {
                    faulty.cancel();
                    return;
                }
                Err(WorkerEnd::Drop) => return,
                Err(WorkerEnd::Stop(reason)) => {
                    self.consumer.stop_partition(self.lease.partition, &reason);
                    return;
                }
            }
        }
    }

    /// Records a batch and retries while the ledger is unavailable. Skips records that are already
    /// recorded.
    async fn record(&mut self, arrivals: Vec<Arrival>, next_offset: i64) -> Result<(), WorkerEnd> {
        let mut waits = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut parts = vec![Part { arrivals, next_offset }];
        while let Some(mut part) = parts.pop() {
            part.arrivals.retain(|arrival| arrival.offset >= self.lease.next_offset);
            if self.lease.next_offset >= part.next_offset {
                self.set_problem(None);
                continue;
            }
            let chain = Chain::Live(self.lease.clone());
            let recording = self.consumer.ledger.run(async |conn| {
                record::batch(
                    conn,
                    &chain,
                    &part.arrivals,
                    part.next_offset,
                    self.consumer.ledger.clock.now(),
                )
                .await
            });
            match recording.await {
                Ok(counts) => {
                    debug!(partition = %self.lease.partition, records = counts.records, accepted = counts.accepted, "batch recorded");
                    self.consumer.telemetry.recorded(self.lease.partition, counts);
                    self.advance(&part);
                    if parts.is_empty() {
                        self.set_problem(None);
                    }
                    waits.reset();
                    continue;
                }
                Err(RecordError::Refused(error)) => {
                    parts.extend(self.narrow(part, &error)?);
                    continue;
                }
                Err(error @ RecordError::Unfit(_)) => {
                    return Err(WorkerEnd::Stop(format!(
                        "{error}; fix the cause, then restart this process, or pause and resume `consume`"
                    )));
                }
                Err(RecordError::Fenced(_)) => {
                    self.consumer.telemetry.fenced();
                    parts.push(part);
                }
                Err(error @ RecordError::Slow(_)) => {
                    self.set_problem(Some(error.to_string()));
                    parts.extend(part.halves());
                }
                Err(error @ RecordError::Unavailable(_)) => {
                    self.set_problem(Some(error.to_string()));
                    parts.push(part);
                }
            }
            let (generation, expected) = (self.lease.generation, self.lease.next_offset);
            self.retake_lease(&mut waits).await?;
            if self.lease.generation != generation || self.lease.next_offset < expected {
                // The partition has a new generation, or the ledger is restored: the records in
                // between must be reread.
                return Err(WorkerEnd::Rejoin);
            }
        }
        Ok(())
    }

    fn advance(&mut self, part: &Part) {
        self.lease.next_offset = part.next_offset;
        self.lease.last = last_record(&part.arrivals).or(self.lease.last);
        if part.arrivals.iter().any(|arrival| arrival.event.is_ok()) {
            self.refused_in_a_row = 0;
        }
    }

    /// Retakes the lease. Its position includes a commit whose answer was lost, and another
    /// consumer's work. After the partition is revoked, the worker does not disturb its next
    /// consumer.
    async fn retake_lease(&mut self, waits: &mut Backoff) -> Result<(), WorkerEnd> {
        while waits.wait(&self.finishing).await {
            match self.consumer.take_lease(self.lease.partition).await {
                Ok(lease) => {
                    self.lease = lease;
                    return Ok(());
                }
                Err(error) => self.set_problem(Some(cause::text(error.as_ref()))),
            }
        }
        Err(WorkerEnd::Drop)
    }

    fn set_problem(&mut self, problem: Option<String>) {
        self.consumer.set_problem(self.lease.partition, &mut self.last_problem, problem);
    }

    /// The parts to retry after PostgreSQL refused the data.
    fn narrow(&mut self, part: Part, error: &StatementError) -> Result<Vec<Part>, WorkerEnd> {
        if part.arrivals.len() == 1 {
            self.refused_in_a_row += 1;
        }
        let parts =
            if self.refused_in_a_row > REFUSED_IN_A_ROW { None } else { part.narrow(error) };
        let refused = self.refused_in_a_row;
        parts.ok_or_else(|| {
            WorkerEnd::Stop(format!(
                "the ledger refused {refused} records in a row; last error: {}",
                cause::text(error)
            ))
        })
    }
}
