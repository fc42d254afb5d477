//! A member of a Kafka group: one thread that polls, gathers batches, and never stops polling for
//! long.
//!
//! Kafka treats a member as alive only while it polls, so that nothing here waits for the consumer.
//! A rebalance is answered at once with an empty assignment; partitions are added when the consumer
//! starts them at their offsets. If deliveries are not taken, polling first waits, which keeps
//! prefetched records. After that the partitions are paused and polling continues.

mod faults;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{Message as _, Offset, TopicPartitionList};
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::client::KafkaLog;
use super::connection::Connection;
use super::rebalances::{AssignmentChange, Rebalances, unassign};
use super::records::{OpenBatches, record_of};
use super::unreadable::unreadable;
use crate::event::{Topic, TopicPartition};
use crate::log::LogError;
use crate::log::consumer::{BackendEvent, Command, Consumer, Link, Start};

/// Maximum delay before a command or the stop token is noticed.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long deliveries may wait before the partitions are paused. A pause discards prefetched
/// records.
const MAX_BLOCKED: Duration = Duration::from_secs(1);
const MARK_INTERVAL: Duration = Duration::from_secs(1);

impl KafkaLog {
    pub(in crate::log) fn join(
        &self,
        group: &str,
        stop: CancellationToken,
    ) -> Result<Consumer, LogError> {
        let context =
            Rebalances { connection: Connection::new("consumer"), changes: Mutex::default() };
        let client: BaseConsumer<Rebalances> = self.client(&self.member_config(group), context)?;
        let names = Topic::ALL.map(|topic| self.topic_name(topic));
        client
            .subscribe(&names.each_ref().map(String::as_str))
            .map_err(|error| LogError::Settings(error.to_string()))?;
        let (consumer, link) = Link::new();
        let batches = OpenBatches::new(self.settings.batch_records, self.settings.batch_linger);
        let member = Member {
            log: self.clone(),
            names,
            client,
            link,
            stop,
            batches,
            owned: BTreeSet::new(),
            running: BTreeMap::new(),
            waiting: VecDeque::new(),
            blocked_since: None,
            paused: false,
            marks: BTreeMap::new(),
            marks_due: Instant::now(),
            signature: String::new(),
        };
        std::thread::Builder::new()
            .name("kafka-consumer".to_owned())
            .spawn(move || member.run())
            .map_err(|error| LogError::Settings(format!("consumer thread not started: {error}")))?;
        Ok(consumer)
    }
}

/// One start of a partition.
#[derive(Clone, Copy)]
struct Run {
    number: u64,
    /// The offset of the next poll.
    next: i64,
    faulted: bool,
}

struct Member {
    log: KafkaLog,
    names: [String; 3],
    client: BaseConsumer<Rebalances>,
    link: Link,
    stop: CancellationToken,
    batches: OpenBatches,
    owned: BTreeSet<TopicPartition>,
    running: BTreeMap<TopicPartition, Run>,
    /// Deliveries that wait for room in the channel.
    waiting: VecDeque<BackendEvent>,
    blocked_since: Option<Instant>,
    paused: bool,
    marks: BTreeMap<TopicPartition, i64>,
    marks_due: Instant,
    signature: String,
}

impl Member {
    fn run(mut self) {
        self.link.wake_this_thread();
        while !self.stop.is_cancelled() && self.handle_commands() {
            self.deliver();
            if let Some(since) = self.blocked_since
                && !self.paused
            {
                match MAX_BLOCKED.checked_sub(since.elapsed()) {
                    Some(left) if !left.is_zero() => {
                        std::thread::park_timeout(left.min(POLL_INTERVAL))
                    }
                    _ => self.pause(),
                }
                continue;
            }
            if !self.poll() {
                break;
            }
            self.apply_rebalances();
            self.waiting.extend(self.batches.due(Instant::now()));
            self.commit_marks();
        }
        self.leave();
    }

    /// Executes the consumer's commands. False: the member leaves.
    fn handle_commands(&mut self) -> bool {
        use tokio::sync::mpsc::error::TryRecvError;
        loop {
            match self.link.commands.try_recv() {
                Ok(Command::Start { from }) => self.start(from),
                Ok(Command::Hold { partitions }) => self.hold(&partitions),
                Ok(Command::Mark { partition, next_offset }) => {
                    self.marks.insert(partition, next_offset);
                }
                Ok(Command::Sign { signature }) => self.signature = signature,
                Ok(Command::Leave) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    /// Passes deliveries to the consumer while the channel has room.
    fn deliver(&mut self) {
        while let Some(event) = self.waiting.pop_front() {
            if let Err(TrySendError::Full(event)) = self.link.deliveries.try_send(event) {
                self.waiting.push_front(event);
                self.blocked_since.get_or_insert_with(Instant::now);
                return;
            }
        }
        self.blocked_since = None;
        if std::mem::take(&mut self.paused)
            && let Err(error) = self.client.assignment().and_then(|all| self.client.resume(&all))
        {
            warn!(%error, "partitions not resumed");
        }
    }

    fn pause(&mut self) {
        self.paused = true;
        info!("consumer is busy, Kafka partitions paused");
        self.pause_assigned();
    }

    fn pause_assigned(&self) {
        if let Err(error) = self.client.assignment().and_then(|all| self.client.pause(&all)) {
            warn!(%error, "partitions not paused");
        }
    }

    /// Polls once. False: the client has failed permanently.
    fn poll(&mut self) -> bool {
        let wait = self.batches.next_due().map_or(POLL_INTERVAL, |due| {
            due.saturating_duration_since(Instant::now()).min(POLL_INTERVAL)
        });
        match self.client.poll(wait) {
            None => {}
            Some(Ok(found)) => {
                let event = add_record(&self.names, &mut self.running, &mut self.batches, &found);
                self.client.context().connection.answered();
                self.waiting.extend(event);
            }
            Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
                let error = LogError::Refused(format!("Kafka consumer failed permanently: {code}"));
                self.waiting.push_back(BackendEvent::Ended(error));
                return false;
            }
            Some(Err(KafkaError::MessageConsumption(
                RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange,
            ))) => {
                self.find_out_of_range();
            }
            Some(Err(error)) if unreadable(&error) => self.find_unreadable(&error),
            Some(Err(error)) => self.client.context().connection.faulted(&error, "while polling"),
        }
        true
    }

    /// Applies the group's decisions of the last poll.
    fn apply_rebalances(&mut self) {
        let changes = std::mem::take(
            &mut *self.client.context().changes.lock().unwrap_or_else(PoisonError::into_inner),
        );
        for change in changes {
            match change {
                AssignmentChange::Assigned(partitions) => {
                    let partitions = self.known_partitions(&partitions);
                    self.owned.extend(&partitions);
                    if !partitions.is_empty() {
                        self.waiting.push_back(BackendEvent::Assigned(partitions));
                    }
                }
                AssignmentChange::Revoked(partitions) => {
                    let partitions = self.known_partitions(&partitions);
                    for partition in &partitions {
                        self.owned.remove(partition);
                        self.running.remove(partition);
                        self.marks.remove(partition);
                        self.drop_unread(*partition);
                    }
                    if !partitions.is_empty() {
                        self.waiting.push_back(BackendEvent::Revoked(partitions));
                    }
                }
            }
        }
    }

    fn known_partitions(&self, partitions: &[(String, i32)]) -> Vec<TopicPartition> {
        partitions
            .iter()
            .filter_map(|(name, partition)| {
                Some(TopicPartition { topic: topic_of(&self.names, name)?, partition: *partition })
            })
            .collect()
    }

    /// Drops records of a partition that were read but not delivered. The next reader rereads them.
    fn drop_unread(&mut self, partition: TopicPartition) {
        self.batches.take(partition);
        self.waiting.retain(|event| !matches!(event, BackendEvent::Batch { batch, .. } if batch.partition == partition));
    }

    /// Starts or restarts reading.
    fn start(&mut self, from: Vec<Start>) {
        let mut begun = Vec::new();
        for start in from {
            if !self.owned.contains(&start.partition) {
                continue;
            }
            self.drop_unread(start.partition);
            self.running.insert(
                start.partition,
                Run { number: start.run, next: start.offset, faulted: false },
            );
            begun.push(start.partition);
        }
        self.assign(&begun);
    }

    /// Stops reading these partitions, which remain assigned to this member.
    fn hold(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            self.running.remove(partition);
            self.drop_unread(*partition);
        }
        self.release(partitions);
    }

    /// Removes partitions from the client. Under the eager protocol this assigns the remaining
    /// running partitions.
    fn release(&mut self, partitions: &[TopicPartition]) {
        if matches!(self.client.rebalance_protocol(), RebalanceProtocol::Eager) {
            return self.assign(&[]);
        }
        let held: Vec<(String, i32)> =
            partitions.iter().map(|at| (self.log.topic_name(at.topic), at.partition)).collect();
        if let Err(error) = unassign(&self.client, &held) {
            // Further records of them belong to an earlier run and are dropped.
            warn!(%error, "partitions not held");
        }
    }

    /// Assigns these running partitions to the client at their next offsets. The eager protocol can
    /// only assign all at once.
    fn assign(&mut self, begun: &[TopicPartition]) {
        let eager = matches!(self.client.rebalance_protocol(), RebalanceProtocol::Eager);
        let starts: Vec<(String, i32, i64)> = self
            .running
            .iter()
            .filter(|(partition, run)| if eager { !run.faulted } else { begun.contains(partition) })
            .map(|(partition, run)| {
                (self.log.topic_name(partition.topic), partition.partition, run.next)
            })
            .collect();
        let assigned = list(&starts).and_then(|list| {
            if !eager {
                let partitions: Vec<(String, i32)> =
                    starts.iter().map(|(name, partition, _)| (name.clone(), *partition)).collect();
                unassign(&self.client, &partitions)?;
            }
            // librdkafka keeps the pause of a partition that is lost. Without this, a partition
            // lost during a pause would never be read after it is assigned again.
            self.client.resume(&list)?;
            if eager { self.client.assign(&list) } else { self.client.incremental_assign(&list) }
        });
        if let Err(error) = assigned {
            // This happens if the group revokes the partitions at this moment. The revocation
            // follows.
            warn!(%error, "partitions not started");
        }
        if self.paused {
            self.pause_assigned();
        }
    }

    fn commit_marks(&mut self) {
        if self.marks.is_empty() || Instant::now() < self.marks_due {
            return;
        }
        self.marks_due = Instant::now() + MARK_INTERVAL;
        let marks: Vec<(String, i32, i64)> = std::mem::take(&mut self.marks)
            .into_iter()
            .filter(|(partition, _)| self.owned.contains(partition))
            .map(|(partition, next)| {
                (self.log.topic_name(partition.topic), partition.partition, next)
            })
            .collect();
        let signed = |list: TopicPartitionList| {
            for (name, partition, _) in &marks {
                if let Some(mut element) = list.find_partition(name, *partition) {
                    element.set_metadata(&self.signature);
                }
            }
            list
        };
        if let Err(error) =
            list(&marks).map(signed).and_then(|list| self.client.commit(&list, CommitMode::Async))
        {
            debug!(%error, "group offsets not committed");
        }
    }

    /// Leaves the group and ends. Deliveries that were not taken are dropped, except the reason for
    /// the end.
    fn leave(mut self) {
        self.marks_due = Instant::now();
        self.commit_marks();
        drop(self.client);
        if let Some(ended) =
            self.waiting.pop_back().filter(|event| matches!(event, BackendEvent::Ended(_)))
        {
            let mut ended = Some(ended);
            while let Some(event) = ended.take() {
                if let Err(TrySendError::Full(event)) = self.link.deliveries.try_send(event) {
                    ended = Some(event);
                    std::thread::park_timeout(POLL_INTERVAL);
                }
            }
        }
        let _ = self.link.ended.send(());
    }
}

/// Adds a polled record to its partition's batch. Returns a batch that became full.
fn add_record(
    names: &[String; 3],
    running: &mut BTreeMap<TopicPartition, Run>,
    batches: &mut OpenBatches,
    found: &BorrowedMessage<'_>,
) -> Option<BackendEvent> {
    let partition =
        TopicPartition { topic: topic_of(names, found.topic())?, partition: found.partition() };
    let run =
        running.get_mut(&partition).filter(|run| !run.faulted && found.offset() >= run.next)?;
    run.next = found.offset() + 1;
    batches.add(partition, run.number, record_of(found))
}

/// The topic of that name in Kafka.
pub(super) fn topic_of(names: &[String; 3], name: &str) -> Option<Topic> {
    names.iter().position(|own| own == name).map(|index| Topic::ALL[index])
}

fn list(partitions: &[(String, i32, i64)]) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for (name, partition, offset) in partitions {
        list.add_partition_offset(name, *partition, Offset::Offset(*offset))?;
    }
    Ok(list)
}
