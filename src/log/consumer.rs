//! A member of a consumer group, the same for both backends: deliveries come in by a bounded channel, commands go out by another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::{Batch, LogError};
use crate::event::TopicPartition;

/// How many deliveries may wait for the consumer. Together with the batch in hand this bounds its memory.
const WAITING_DELIVERIES: usize = 2;

/// How long [`Consumer::leave`] waits for the group to be told.
const LEAVE_SECONDS: u64 = 15;

/// What the log tells a consumer.
#[derive(Debug)]
pub enum Delivery {
    /// Partitions are now this consumer's, none of which is read before [`Consumer::start`]. The group does not wait for that.
    Assigned(Vec<TopicPartition>),
    /// Partitions are no longer this consumer's: no batch of them follows.
    Revoked(Vec<TopicPartition>),
    /// Records to work on.
    Batch(Batch),
    /// Reading this partition has stopped and goes on only after [`Consumer::start`]; the others go on.
    Fault {
        partition: TopicPartition,
        /// Why: [`LogError::OutOfRange`] when the log does not hold the offset.
        error: LogError,
    },
}

/// A member of a group. Dropped without [`Consumer::leave`] it still leaves, but nobody waits for it.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<Told>,
    control: Control,
    ended: oneshot::Receiver<()>,
}

impl Consumer {
    /// The next thing to act on. Waits without end while nothing happens; may be dropped while waiting, nothing is lost.
    ///
    /// # Errors
    /// [`LogError::Stopped`] once the stop token was cancelled; any other is final too, and the consumer has left.
    pub async fn next(&mut self) -> Result<Delivery, LogError> {
        loop {
            let told = self.deliveries.recv().await.ok_or(LogError::Stopped)?;
            self.control.wake();
            match told {
                Told::Assigned(partitions) => return Ok(Delivery::Assigned(partitions)),
                Told::Revoked(partitions) => {
                    self.control.forget(&partitions);
                    return Ok(Delivery::Revoked(partitions));
                }
                Told::Batch { run, batch } if self.control.is_current(batch.partition, run) => return Ok(Delivery::Batch(batch)),
                Told::Fault { run, partition, error } if self.control.is_current(partition, run) => {
                    return Ok(Delivery::Fault { partition, error });
                }
                // Read before the partition was started anew: the new start reads it again where needed.
                Told::Batch { .. } | Told::Fault { .. } => {}
                Told::Ended(error) => return Err(error),
            }
        }
    }

    /// Begins reading at these offsets, or begins anew: no batch that was read before comes after this call. Partitions that are not this
    /// consumer's are passed over.
    pub fn start(&self, from: Vec<(TopicPartition, i64)>) {
        let mut runs = self.control.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let from = from
            .into_iter()
            .map(|(partition, offset)| {
                runs.given += 1;
                let run = runs.given;
                runs.current.insert(partition, run);
                Start { partition, offset, run }
            })
            .collect();
        drop(runs);
        self.control.send(Command::Start { from });
    }

    /// Reads these partitions no more until [`Consumer::start`] names them again; they stay this consumer's. No batch of them comes after
    /// this call.
    pub fn hold(&self, partitions: Vec<TopicPartition>) {
        self.control.forget(&partitions);
        self.control.send(Command::Hold { partitions });
    }

    /// Tells a Kafka group how far the partition has been read, for lag tools and as a proof that it was. Best effort, some later.
    pub fn mark(&self, partition: TopicPartition, next_offset: i64) {
        self.control.send(Command::Mark { partition, next_offset });
    }

    /// What goes with the marks from now on, where the log has room for it: [`super::Log::marks`] answers it.
    pub fn sign(&self, signature: String) {
        self.control.send(Command::Sign { signature });
    }

    /// Leaves the group, so that the others get its partitions at once, and waits for that (15 s at most).
    pub async fn leave(mut self) {
        self.control.send(Command::Leave);
        self.deliveries.close();
        // A log that can't be reached just now misses this member a little later: after its session or lease has run out.
        let _ = tokio::time::timeout(Duration::from_secs(LEAVE_SECONDS), &mut self.ended).await;
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.control.send(Command::Leave);
    }
}

/// What a backend tells. A run is one start of one partition; what an earlier run has read is not shown.
#[derive(Debug)]
pub(super) enum Told {
    Assigned(Vec<TopicPartition>),
    Revoked(Vec<TopicPartition>),
    Batch { run: u64, batch: Batch },
    Fault { run: u64, partition: TopicPartition, error: LogError },
    Ended(LogError),
}

/// What a backend is told.
#[derive(Debug)]
pub(super) enum Command {
    Start { from: Vec<Start> },
    Hold { partitions: Vec<TopicPartition> },
    Mark { partition: TopicPartition, next_offset: i64 },
    Sign { signature: String },
    Leave,
}

/// Where and under which run to begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    pub partition: TopicPartition,
    pub offset: i64,
    pub run: u64,
}

/// The backend's ends of the two channels.
pub(super) struct Link {
    pub deliveries: mpsc::Sender<Told>,
    pub commands: mpsc::UnboundedReceiver<Command>,
    /// Sent or dropped when the group has been left.
    pub ended: oneshot::Sender<()>,
    waker: Arc<Mutex<Option<Thread>>>,
}

impl Link {
    /// A consumer and what drives it.
    pub fn new() -> (Consumer, Link) {
        let (deliveries_in, deliveries) = mpsc::channel(WAITING_DELIVERIES);
        let (commands, commands_out) = mpsc::unbounded_channel();
        let (ended_in, ended) = oneshot::channel();
        let waker = Arc::new(Mutex::new(None));
        let control = Control { commands, runs: Mutex::default(), waker: waker.clone() };
        (Consumer { deliveries, control, ended }, Link { deliveries: deliveries_in, commands: commands_out, ended: ended_in, waker })
    }

    /// The current thread parks while the consumer is busy: it is woken when a delivery has been taken or a command was given.
    pub fn wake_this_thread(&self) {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
    }
}

/// The consumer's end of the commands.
#[derive(Debug)]
struct Control {
    commands: mpsc::UnboundedSender<Command>,
    runs: Mutex<Runs>,
    waker: Arc<Mutex<Option<Thread>>>,
}

#[derive(Debug, Default)]
struct Runs {
    given: u64,
    current: BTreeMap<TopicPartition, u64>,
}

impl Control {
    fn is_current(&self, partition: TopicPartition, run: u64) -> bool {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).current.get(&partition) == Some(&run)
    }

    fn forget(&self, partitions: &[TopicPartition]) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        for partition in partitions {
            runs.current.remove(partition);
        }
    }

    /// A backend that has ended hears nothing, and that is right.
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
