//! A member of a Kafka group: one thread that polls, gathers batches, and never stops polling for long.
//!
//! Kafka treats a member as alive only while it polls, so that nothing here waits for the consumer. A rebalance is answered at once
//! with an empty assignment; partitions are added when the consumer starts them at their offsets. If deliveries are not taken, polling
//! first waits, which keeps prefetched records. After that the partitions are paused and polling continues.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Message as _, Offset, TopicPartitionList};
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::consumer::{Command, Consumer, Link, Start, Told};
use super::kafka::{Connection, KafkaLog, blocking, refused};
use super::kafka_gather::Gathered;
use super::kafka_unreadable::unreadable;
use super::{LogError, Mark, Record, kafka_decode};
use crate::event::{Topic, TopicPartition};

/// Maximum delay before a command or the stop token is noticed.
const POLL: Duration = Duration::from_millis(50);
/// How long deliveries may wait before the partitions are paused. A pause discards prefetched records.
const PATIENCE: Duration = Duration::from_secs(1);
const MARK_EVERY: Duration = Duration::from_secs(1);

impl KafkaLog {
    pub(super) fn join(&self, group: &str, stop: CancellationToken) -> Result<Consumer, LogError> {
        let context = Rebalances { connection: Connection::new("consumes"), news: Mutex::default() };
        let client: BaseConsumer<Rebalances> = self.client(&self.member_config(group), context)?;
        let names = Topic::ALL.map(|topic| self.topic_name(topic));
        client.subscribe(&names.each_ref().map(String::as_str)).map_err(|error| LogError::Settings(error.to_string()))?;
        let (consumer, link) = Link::new();
        let gathered = Gathered::new(self.settings.batch_records, self.settings.batch_linger);
        let member = Member {
            log: self.clone(),
            names,
            client,
            link,
            stop,
            gathered,
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
            .map_err(|error| LogError::Settings(format!("no thread for the consumer: {error}")))?;
        Ok(consumer)
    }

    /// Requests the marks from the group's coordinator without joining the group.
    pub(super) async fn marks(&self, group: &str) -> Result<Vec<Mark>, LogError> {
        let mut list = TopicPartitionList::new();
        for topic in Topic::ALL {
            match self.partitions(topic).await {
                Ok(partitions) => {
                    for partition in partitions {
                        list.add_partition(&self.topic_name(topic), partition);
                    }
                }
                // The marks were deleted with the topic.
                Err(LogError::NoTopic(_)) => {}
                Err(error) => return Err(error),
            }
        }
        if list.count() == 0 {
            return Ok(Vec::new());
        }
        let (log, config) = (self.clone(), self.member_config(group));
        blocking(move || {
            let refused = |error: KafkaError| refused(Topic::WorkspaceBuilds, &error);
            let client: BaseConsumer<Connection> = log.client(&config, Connection::new("asks for marks"))?;
            let committed = client.committed_offsets(list, log.settings.request_deadline).map_err(refused)?;
            let names = Topic::ALL.map(|topic| log.topic_name(topic));
            let mark = |element: &TopicPartitionListElem<'_>| {
                let partition = TopicPartition { topic: topic_of(&names, element.topic())?, partition: element.partition() };
                let Offset::Offset(next_offset) = element.offset() else { return None };
                Some(Mark { partition, next_offset, signature: element.metadata().to_owned() })
            };
            let elements = committed.elements();
            elements.iter().try_for_each(TopicPartitionListElem::error).map_err(refused)?;
            Ok(elements.iter().filter_map(mark).collect())
        })
        .await
    }
}

/// Collects the group's decisions during a poll.
struct Rebalances {
    connection: Connection,
    news: Mutex<Vec<News>>,
}

enum News {
    Assigned(Vec<(String, i32)>),
    Revoked(Vec<(String, i32)>),
}

impl ClientContext for Rebalances {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.connection.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.connection.error(error, reason);
    }
}

impl ConsumerContext for Rebalances {
    /// Answers the group at once: assigned partitions are not read yet, and revoked ones are not read any more.
    fn rebalance(&self, client: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let partitions = list.elements().iter().map(|element| (element.topic().to_owned(), element.partition())).collect();
        let cooperative = matches!(client.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let (news, answered) = match what {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                let nothing = TopicPartitionList::new();
                let answered = if cooperative { client.incremental_assign(&nothing) } else { client.assign(&nothing) };
                (News::Assigned(partitions), answered)
            }
            _ => {
                let answered = if cooperative { unassign(client, &partitions) } else { client.unassign() };
                (News::Revoked(partitions), answered)
            }
        };
        if let Err(error) = answered {
            warn!(%error, "Kafka did not take the answer to a rebalance");
        }
        self.news.lock().unwrap_or_else(PoisonError::into_inner).push(news);
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            debug!(%error, "group offsets not committed; only lag tools miss them");
        }
    }
}

/// Removes those of the partitions that the client has. It does not know the others.
fn unassign(client: &BaseConsumer<Rebalances>, partitions: &[(String, i32)]) -> KafkaResult<()> {
    let assigned = client.assignment()?;
    let mut list = TopicPartitionList::new();
    for (name, partition) in partitions {
        if assigned.find_partition(name, *partition).is_some() {
            list.add_partition(name, *partition);
        }
    }
    client.incremental_unassign(&list)
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
    gathered: Gathered,
    owned: BTreeSet<TopicPartition>,
    running: BTreeMap<TopicPartition, Run>,
    /// Deliveries that wait for room in the channel.
    waiting: VecDeque<Told>,
    blocked_since: Option<Instant>,
    paused: bool,
    marks: BTreeMap<TopicPartition, i64>,
    marks_due: Instant,
    signature: String,
}

impl Member {
    fn run(mut self) {
        self.link.wake_this_thread();
        while !self.stop.is_cancelled() && self.obey() {
            self.hand_over();
            if let Some(since) = self.blocked_since
                && !self.paused
            {
                match PATIENCE.checked_sub(since.elapsed()) {
                    Some(left) if !left.is_zero() => std::thread::park_timeout(left.min(POLL)),
                    _ => self.pause(),
                }
                continue;
            }
            if !self.poll() {
                break;
            }
            self.hear_news();
            self.waiting.extend(self.gathered.due(Instant::now()));
            self.commit_marks();
        }
        self.leave();
    }

    /// Executes the consumer's commands. False: the member leaves.
    fn obey(&mut self) -> bool {
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
    fn hand_over(&mut self) {
        while let Some(told) = self.waiting.pop_front() {
            if let Err(TrySendError::Full(told)) = self.link.deliveries.try_send(told) {
                self.waiting.push_front(told);
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
        info!("batches are not taken: Kafka partitions paused until they are");
        self.pause_assigned();
    }

    fn pause_assigned(&self) {
        if let Err(error) = self.client.assignment().and_then(|all| self.client.pause(&all)) {
            warn!(%error, "partitions not paused");
        }
    }

    /// Polls once. False: the client has failed permanently.
    fn poll(&mut self) -> bool {
        let wait = self.gathered.next_due().map_or(POLL, |due| due.saturating_duration_since(Instant::now()).min(POLL));
        match self.client.poll(wait) {
            None => {}
            Some(Ok(found)) => {
                let told = note(&self.names, &mut self.running, &mut self.gathered, &found);
                self.client.context().connection.answered();
                self.waiting.extend(told);
            }
            Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
                let error = LogError::Refused(format!("the consumer has failed for good: {code}"));
                self.waiting.push_back(Told::Ended(error));
                return false;
            }
            Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange))) => {
                self.find_out_of_range();
            }
            Some(Err(error)) if unreadable(&error) => self.find_unreadable(&error),
            Some(Err(error)) => self.client.context().connection.faulted(&error, "while polling"),
        }
        true
    }

    /// Applies the group's decisions of the last poll.
    fn hear_news(&mut self) {
        let news = std::mem::take(&mut *self.client.context().news.lock().unwrap_or_else(PoisonError::into_inner));
        for news in news {
            match news {
                News::Assigned(partitions) => {
                    let partitions = self.ours(&partitions);
                    self.owned.extend(&partitions);
                    if !partitions.is_empty() {
                        self.waiting.push_back(Told::Assigned(partitions));
                    }
                }
                News::Revoked(partitions) => {
                    let partitions = self.ours(&partitions);
                    for partition in &partitions {
                        self.owned.remove(partition);
                        self.running.remove(partition);
                        self.marks.remove(partition);
                        self.drop_unread(*partition);
                    }
                    if !partitions.is_empty() {
                        self.waiting.push_back(Told::Revoked(partitions));
                    }
                }
            }
        }
    }

    fn ours(&self, partitions: &[(String, i32)]) -> Vec<TopicPartition> {
        partitions
            .iter()
            .filter_map(|(name, partition)| Some(TopicPartition { topic: topic_of(&self.names, name)?, partition: *partition }))
            .collect()
    }

    /// Drops records of a partition that were read but not delivered. The next reader rereads them.
    fn drop_unread(&mut self, partition: TopicPartition) {
        self.gathered.take(partition);
        self.waiting.retain(|told| !matches!(told, Told::Batch { batch, .. } if batch.partition == partition));
    }

    /// Starts or restarts reading.
    fn start(&mut self, from: Vec<Start>) {
        let mut begun = Vec::new();
        for start in from {
            if !self.owned.contains(&start.partition) {
                continue;
            }
            self.drop_unread(start.partition);
            self.running.insert(start.partition, Run { number: start.run, next: start.offset, faulted: false });
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
        self.let_go(partitions);
    }

    /// Removes partitions from the client. Under the eager protocol this assigns the remaining running partitions.
    fn let_go(&mut self, partitions: &[TopicPartition]) {
        if matches!(self.client.rebalance_protocol(), RebalanceProtocol::Eager) {
            return self.assign(&[]);
        }
        let held: Vec<(String, i32)> = partitions.iter().map(|at| (self.log.topic_name(at.topic), at.partition)).collect();
        if let Err(error) = unassign(&self.client, &held) {
            // Further records of them belong to an earlier run and are dropped.
            warn!(%error, "partitions not held");
        }
    }

    /// Assigns these running partitions to the client at their next offsets. The eager protocol can only assign all at once.
    fn assign(&mut self, begun: &[TopicPartition]) {
        let eager = matches!(self.client.rebalance_protocol(), RebalanceProtocol::Eager);
        let given: Vec<(String, i32, i64)> = self
            .running
            .iter()
            .filter(|(partition, run)| if eager { !run.faulted } else { begun.contains(partition) })
            .map(|(partition, run)| (self.log.topic_name(partition.topic), partition.partition, run.next))
            .collect();
        let assigned = list(&given).and_then(|list| {
            if !eager {
                let again: Vec<(String, i32)> = given.iter().map(|(name, partition, _)| (name.clone(), *partition)).collect();
                unassign(&self.client, &again)?;
            }
            // librdkafka keeps the pause of a partition that is lost. Without this, a partition lost during a pause would never be read
            // after it is assigned again.
            self.client.resume(&list)?;
            if eager { self.client.assign(&list) } else { self.client.incremental_assign(&list) }
        });
        if let Err(error) = assigned {
            // This happens if the group revokes the partitions at this moment. The revocation follows.
            warn!(%error, "partitions not started");
        }
        if self.paused {
            self.pause_assigned();
        }
    }

    /// Finds the partition whose offset is not in the log, because librdkafka does not report which one it is.
    fn find_out_of_range(&mut self) {
        let running = self.without_fault();
        let mut found = false;
        for (partition, run) in &running {
            let Ok((start, end)) = self.log.watermarks_now(*partition) else { continue };
            if !(start..=end).contains(&run.next) {
                found = true;
                let error = LogError::OutOfRange { partition: *partition, offset: run.next, start, end };
                self.fault(*partition, *run, error);
            }
        }
        if !found {
            // librdkafka has stopped that partition nevertheless.
            warn!("Kafka reported an offset out of range, but all are in it: partitions started again");
            self.assign(&running.iter().map(|(partition, _)| *partition).collect::<Vec<_>>());
        }
    }

    /// Finds the partition whose batch cannot be read, because librdkafka does not report it. A reader also finds the end of the batch.
    fn find_unreadable(&mut self, error: &KafkaError) {
        let first = self.client.context().connection.not_unpacked();
        let mut running = self.without_fault();
        running.sort_by_key(|(_, run)| first.map(|first| first.abs_diff(run.next)));
        for (partition, run) in running {
            match self.log.read_now(partition, run.next, 1) {
                Ok(records) => {
                    if let Some(record) = records.into_iter().find(|record| record.message.unreadable_batch().is_some()) {
                        return self.step_over(partition, run, record);
                    }
                }
                Err(error @ LogError::Unreadable { .. }) => {
                    self.fault(partition, run, error);
                    return self.let_go(&[partition]);
                }
                Err(_) => {}
            }
        }
        // librdkafka encounters the batch again.
        self.client.context().connection.faulted(error, "while polling");
    }

    fn without_fault(&self) -> Vec<(TopicPartition, Run)> {
        self.running.iter().filter(|(_, run)| !run.faulted).map(|(partition, run)| (*partition, *run)).collect()
    }

    fn fault(&mut self, partition: TopicPartition, run: Run, error: LogError) {
        self.running.insert(partition, Run { faulted: true, ..run });
        self.waiting.extend(self.gathered.take(partition));
        self.waiting.push_back(Told::Fault { run: run.number, partition, error });
    }

    /// Continues after a batch that cannot be read.
    fn step_over(&mut self, partition: TopicPartition, run: Run, record: Record) {
        let (name, next) = (self.log.topic_name(partition.topic), record.offset + 1);
        if let Err(error) = self.client.seek(&name, partition.partition, Offset::Offset(next), self.log.settings.request_deadline) {
            // librdkafka encounters the batch again.
            return warn!(%partition, %error, "batch not stepped over");
        }
        let batch = record.message.unreadable_batch().unwrap_or_default();
        warn!(%partition, batch, "batch cannot be unpacked: it becomes one reject");
        self.running.insert(partition, Run { next, ..run });
        self.waiting.extend(self.gathered.add(partition, run.number, record));
    }

    fn commit_marks(&mut self) {
        if self.marks.is_empty() || Instant::now() < self.marks_due {
            return;
        }
        self.marks_due = Instant::now() + MARK_EVERY;
        let marks: Vec<(String, i32, i64)> = std::mem::take(&mut self.marks)
            .into_iter()
            .filter(|(partition, _)| self.owned.contains(partition))
            .map(|(partition, next)| (self.log.topic_name(partition.topic), partition.partition, next))
            .collect();
        let signed = |list: TopicPartitionList| {
            for (name, partition, _) in &marks {
                if let Some(mut element) = list.find_partition(name, *partition) {
                    element.set_metadata(&self.signature);
                }
            }
            list
        };
        if let Err(error) = list(&marks).map(signed).and_then(|list| self.client.commit(&list, CommitMode::Async)) {
            debug!(%error, "group offsets not committed; only lag tools miss them");
        }
    }

    /// Leaves the group and ends. Deliveries that were not taken are dropped, except the reason for the end.
    fn leave(mut self) {
        self.marks_due = Instant::now();
        self.commit_marks();
        drop(self.client);
        if let Some(ended) = self.waiting.pop_back().filter(|told| matches!(told, Told::Ended(_))) {
            let mut ended = Some(ended);
            while let Some(told) = ended.take() {
                if let Err(TrySendError::Full(told)) = self.link.deliveries.try_send(told) {
                    ended = Some(told);
                    std::thread::park_timeout(POLL);
                }
            }
        }
        let _ = self.link.ended.send(());
    }
}

/// Adds a polled record to its partition's batch. Returns a batch that became full.
fn note(
    names: &[String; 3],
    running: &mut BTreeMap<TopicPartition, Run>,
    gathered: &mut Gathered,
    found: &BorrowedMessage<'_>,
) -> Option<Told> {
    let partition = TopicPartition { topic: topic_of(names, found.topic())?, partition: found.partition() };
    let run = running.get_mut(&partition).filter(|run| !run.faulted && found.offset() >= run.next)?;
    run.next = found.offset() + 1;
    gathered.add(partition, run.number, kafka_decode::record(found))
}

fn topic_of(names: &[String; 3], name: &str) -> Option<Topic> {
    names.iter().position(|own| own == name).map(|index| Topic::ALL[index])
}

fn list(partitions: &[(String, i32, i64)]) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for (name, partition, offset) in partitions {
        list.add_partition_offset(name, *partition, Offset::Offset(*offset))?;
    }
    Ok(list)
}
