//! A member of a consumer group, for both backends. One bounded channel carries deliveries, another
//! one carries commands.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::{Batch, LogError};
use crate::event::TopicPartition;

/// Maximum number of deliveries that wait for the consumer. Together with the batch in flight this
/// bounds its memory.
const WAITING_DELIVERIES: usize = 2;

/// How long [`Consumer::leave`] waits until the member has left the group.
const LEAVE_SECONDS: u64 = 15;

/// A delivery of the log to a consumer.
#[derive(Debug)]
pub enum Delivery {
    /// Partitions are assigned to this consumer. It reads none of them before [`Consumer::start`],
    /// and the group does not wait for that.
    Assigned(Vec<TopicPartition>),
    /// Partitions are revoked from this consumer. No batch of them follows.
    Revoked(Vec<TopicPartition>),
    /// Records to process.
    Batch(Batch),
    /// Reading of this partition has stopped until [`Consumer::start`]. The others continue.
    Fault {
        partition: TopicPartition,
        /// The reason; [`LogError::OutOfRange`] if the log does not have the offset.
        error: LogError,
    },
}

/// A member of a group. If it is dropped without [`Consumer::leave`], it still leaves, but without
/// waiting.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<BackendEvent>,
    control: Control,
    ended: oneshot::Receiver<()>,
}

impl Consumer {
    /// Waits for the next delivery, without a deadline. The future may be dropped while it waits,
    /// without a loss.
    ///
    /// # Errors
    /// [`LogError::Stopped`] once the stop token was cancelled. Any other error is final too, and
    /// the consumer has left the group.
    pub async fn next(&mut self) -> Result<Delivery, LogError> {
        loop {
            let event = self.deliveries.recv().await.ok_or(LogError::Stopped)?;
            self.control.wake();
            match event {
                BackendEvent::Assigned(partitions) => return Ok(Delivery::Assigned(partitions)),
                BackendEvent::Revoked(partitions) => {
                    self.control.forget(&partitions);
                    return Ok(Delivery::Revoked(partitions));
                }
                BackendEvent::Batch { run, batch }
                    if self.control.is_current(batch.partition, run) =>
                {
                    return Ok(Delivery::Batch(batch));
                }
                BackendEvent::Fault { run, partition, error }
                    if self.control.is_current(partition, run) =>
                {
                    return Ok(Delivery::Fault { partition, error });
                }
                // Read before the partition was restarted: the new run rereads it if necessary.
                BackendEvent::Batch { .. } | BackendEvent::Fault { .. } => {}
                BackendEvent::Ended(error) => return Err(error),
            }
        }
    }

    /// Starts or restarts reading at these offsets. No batch read earlier comes after this call.
    /// Partitions that are not assigned to this consumer are skipped.
    pub fn start(&self, from: Vec<(TopicPartition, i64)>) {
        let mut runs = self.control.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let from = from
            .into_iter()
            .map(|(partition, offset)| {
                runs.last += 1;
                let run = runs.last;
                runs.current.insert(partition, run);
                Start { partition, offset, run }
            })
            .collect();
        drop(runs);
        self.control.send(Command::Start { from });
    }

    /// Stops reading these partitions until [`Consumer::start`]; they remain assigned to this
    /// consumer. No batch of them comes after this call.
    pub fn hold(&self, partitions: Vec<TopicPartition>) {
        self.control.forget(&partitions);
        self.control.send(Command::Hold { partitions });
    }

    /// Updates the Kafka group's mark of the partition, for lag tools and as evidence after a
    /// restore. It is best effort and delayed.
    pub fn mark(&self, partition: TopicPartition, next_offset: i64) {
        self.control.send(Command::Mark { partition, next_offset });
    }

    /// Sets the signature of the marks from now on, where the log can store it.
    /// [`super::Log::marks`] returns it.
    pub fn sign(&self, signature: String) {
        self.control.send(Command::Sign { signature });
    }

    /// Leaves the group, so that the other members get its partitions at once. Waits for that, at
    /// most 15 s.
    pub async fn leave(mut self) {
        self.control.send(Command::Leave);
        self.deliveries.close();
        // If the log is unreachable, the group notices later, when this member's session or lease
        // expires.
        let _ = tokio::time::timeout(Duration::from_secs(LEAVE_SECONDS), &mut self.ended).await;
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.control.send(Command::Leave);
    }
}

/// A message from the backend. A run is one start of one partition; records of an earlier run are
/// not delivered.
#[derive(Debug)]
pub(super) enum BackendEvent {
    Assigned(Vec<TopicPartition>),
    Revoked(Vec<TopicPartition>),
    Batch { run: u64, batch: Batch },
    Fault { run: u64, partition: TopicPartition, error: LogError },
    Ended(LogError),
}

/// A command to the backend.
#[derive(Debug)]
pub(super) enum Command {
    Start { from: Vec<Start> },
    Hold { partitions: Vec<TopicPartition> },
    Mark { partition: TopicPartition, next_offset: i64 },
    Sign { signature: String },
    Leave,
}

/// The offset at which a partition's run begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    pub partition: TopicPartition,
    pub offset: i64,
    pub run: u64,
}

pub(super) struct Link {
    pub deliveries: mpsc::Sender<BackendEvent>,
    pub commands: mpsc::UnboundedReceiver<Command>,
    /// Sent or dropped once the member has left the group.
    pub ended: oneshot::Sender<()>,
    waker: Arc<Mutex<Option<Thread>>>,
}

impl Link {
    /// A consumer and the link to its backend.
    pub fn new() -> (Consumer, Link) {
        let (deliveries_in, deliveries) = mpsc::channel(WAITING_DELIVERIES);
        let (commands, commands_out) = mpsc::unbounded_channel();
        let (ended_in, ended) = oneshot::channel();
        let waker = Arc::new(Mutex::new(None));
        let control = Control { commands, runs: Mutex::default(), waker: waker.clone() };
        (
            Consumer { deliveries, control, ended },
            Link { deliveries: deliveries_in, commands: commands_out, ended: ended_in, waker },
        )
    }

    /// Registers the current thread, which parks while the consumer is busy, to be woken by a taken
    /// delivery or a command.
    pub fn wake_this_thread(&self) {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
    }
}

#[derive(Debug)]
struct Control {
    commands: mpsc::UnboundedSender<Command>,
    runs: Mutex<Runs>,
    waker: Arc<Mutex<Option<Thread>>>,
}

#[derive(Debug, Default)]
struct Runs {
    last: u64,
    current: BTreeMap<TopicPartition, u64>,
}

impl Control {
    fn is_current(&self, partition: TopicPartition, run: u64) -> bool {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).current.get(&partition)
            == Some(&run)
    }

    fn forget(&self, partitions: &[TopicPartition]) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        for partition in partitions {
            runs.current.remove(partition);
        }
    }

    /// Sends a command. A backend that has ended ignores it, as intended.
    fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = &*self.waker.lock().unwrap_or_else(PoisonError::into_inner) {
            thread.unpark();
        }
    }
}
