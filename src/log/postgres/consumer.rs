//! A group member on the log in PostgreSQL: one task that renews its leases and checks for new
//! records.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::leases::Leases;
use super::tables::{self, Partition, PostgresLog};
use crate::cause::LastingFault;
use crate::event::TopicPartition;
use crate::log::consumer::{BackendEvent, Command, Consumer, Link, Start};
use crate::log::{Batch, LogError};

/// The partitions of `held` that `other` does not have, or has under another id.
fn missing(
    held: &BTreeMap<TopicPartition, i32>,
    other: &BTreeMap<TopicPartition, i32>,
) -> Vec<TopicPartition> {
    held.iter()
        .filter(|(partition, id)| other.get(partition) != Some(id))
        .map(|(partition, _)| *partition)
        .collect()
}

/// How often each partition is checked for expired records.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(600);

impl PostgresLog {
    pub(in crate::log) fn join(&self, group: &str, stop: CancellationToken) -> Consumer {
        let leases = Leases::new(self, group);
        let (consumer, link) = Link::new();
        let member = Member {
            log: self.clone(),
            renewal_due: Instant::now(),
            leases,
            link,
            owned: BTreeMap::new(),
            running: BTreeMap::new(),
            waiting: VecDeque::new(),
            last_read: None,
            poll_due: Instant::now(),
            expiry_due: BTreeMap::new(),
            fault: LastingFault::default(),
        };
        tokio::spawn(member.run(stop));
        consumer
    }
}

/// One start of a partition.
#[derive(Clone, Copy)]
struct Run {
    number: u64,
    partition_id: i32,
    next: i64,
}

enum Step {
    Command(Command),
    Delivered,
    Renewal,
    Poll,
    ConsumerGone,
}

struct Member {
    log: PostgresLog,
    leases: Leases,
    link: Link,
    /// The partitions that this member has, with their ids in the database.
    owned: BTreeMap<TopicPartition, i32>,
    running: BTreeMap<TopicPartition, Run>,
    /// Deliveries that wait for room in the channel. Meanwhile nothing more is read.
    waiting: VecDeque<BackendEvent>,
    /// The partition of the last batch: partitions take turns.
    last_read: Option<TopicPartition>,
    renewal_due: Instant,
    poll_due: Instant,
    expiry_due: BTreeMap<TopicPartition, Instant>,
    fault: LastingFault,
}

impl Member {
    async fn run(mut self, stop: CancellationToken) {
        let leave_requested = stop.run_until_cancelled(self.work()).await.is_some();
        if let Err(error) = self.leases.release().await {
            info!(%error, leave_requested, "group not left; its partitions are free when the lease expires");
        }
        let _ = self.link.ended.send(());
    }

    /// Runs until the consumer leaves.
    async fn work(&mut self) {
        loop {
            match self.next_step().await {
                Step::Command(Command::Start { from }) => self.start(from),
                Step::Command(Command::Hold { partitions }) => self.hold(&partitions),
                // The positions are in the same database, so that marks would prove nothing.
                Step::Command(Command::Mark { .. } | Command::Sign { .. }) => {}
                Step::Command(Command::Leave) | Step::ConsumerGone => return,
                Step::Delivered => {}
                Step::Renewal => self.renew().await,
                Step::Poll => self.poll().await,
            }
        }
    }

    async fn next_step(&mut self) -> Step {
        let (link, waiting) = (&mut self.link, &mut self.waiting);
        let (to_deliver, to_poll) =
            (!waiting.is_empty(), waiting.is_empty() && !self.running.is_empty());
        let deliver = async {
            let Ok(room) = link.deliveries.reserve().await else { return Step::ConsumerGone };
            if let Some(event) = waiting.pop_front() {
                room.send(event);
            }
            Step::Delivered
        };
        tokio::select! {
            biased;
            command = link.commands.recv() => command.map_or(Step::ConsumerGone, Step::Command),
            () = sleep_until(self.renewal_due) => Step::Renewal,
            next = deliver, if to_deliver => next,
            () = sleep_until(self.poll_due), if to_poll => Step::Poll,
        }
    }

    fn start(&mut self, from: Vec<Start>) {
        for start in from {
            if let Some(partition_id) = self.owned.get(&start.partition).copied() {
                self.drop_unread(start.partition);
                self.running.insert(
                    start.partition,
                    Run { number: start.run, partition_id, next: start.offset },
                );
            }
        }
        self.poll_due = Instant::now();
    }

    fn hold(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            self.running.remove(partition);
            self.drop_unread(*partition);
        }
    }

    fn drop_unread(&mut self, partition: TopicPartition) {
        self.waiting.retain(|event| !matches!(event, BackendEvent::Batch { batch, .. } if batch.partition == partition));
    }

    /// Renews the leases and delivers gained and lost partitions to the consumer.
    async fn renew(&mut self) {
        let renewed = self.leases.renew().await;
        self.renewal_due = Instant::now() + self.leases.renewal_interval();
        let Some(owned) = self.log_fault(renewed) else { return };
        // A recreated partition has another id. It is delivered as lost and gained, so that its
        // position is checked again.
        let lost: Vec<TopicPartition> = missing(&self.owned, &owned);
        let gained: Vec<TopicPartition> = missing(&owned, &self.owned);
        self.owned = owned;
        for partition in &lost {
            self.running.remove(partition);
            self.drop_unread(*partition);
        }
        if !lost.is_empty() {
            self.waiting.push_back(BackendEvent::Revoked(lost));
        }
        if !gained.is_empty() {
            self.waiting.push_back(BackendEvent::Assigned(gained));
        }
        self.remove_expired().await;
    }

    /// At each renewal, removes expired records of one partition that is due. It stays due while
    /// records were removed.
    async fn remove_expired(&mut self) {
        let now = Instant::now();
        let due = |partition: &&TopicPartition| {
            self.expiry_due.get(partition).is_none_or(|due| *due <= now)
        };
        let Some(partition) = self.owned.keys().find(due).copied() else { return };
        let removed = self.log.remove_expired(partition).await;
        match self.log_fault(removed) {
            Some(removed) if removed > 0 => {
                info!(%partition, removed, "expired records removed from the log")
            }
            _ => {
                self.expiry_due.insert(partition, now + EXPIRY_INTERVAL);
            }
        }
    }

    /// Reads one batch of the next partition in turn that has records. While there are records, it
    /// reads the next batch at once.
    async fn poll(&mut self) {
        let polled = self.log.run(async |conn| self.next_batch(conn).await).await;
        self.poll_due = Instant::now();
        match self.log_fault(polled) {
            Some(Some(event)) => {
                if let BackendEvent::Batch { batch, .. } = &event
                    && let Some(run) = self.running.get_mut(&batch.partition)
                {
                    run.next = batch.next_offset;
                    self.last_read = Some(batch.partition);
                }
                if let BackendEvent::Fault { partition, .. } = &event {
                    self.running.remove(partition);
                }
                self.waiting.push_back(event);
            }
            Some(None) | None => self.poll_due += self.log.settings.poll,
        }
    }

    async fn next_batch(&self, conn: &mut PgConnection) -> Result<Option<BackendEvent>, LogError> {
        let ids: Vec<i32> = self.running.values().map(|run| run.partition_id).collect();
        let ends: Vec<Partition> = sqlx::query_as(
            "select id, start_offset, next_offset from log_partition where id = any($1)",
        )
        .bind(ids)
        .fetch_all(&mut *conn)
        .await?;
        for (partition, run) in self.round_robin() {
            let Some(found) = ends.iter().find(|found| found.id == run.partition_id) else {
                continue;
            };
            let (start, end) = (found.start_offset, found.next_offset);
            if !(start..=end).contains(&run.next) {
                let error = LogError::OutOfRange { partition, offset: run.next, start, end };
                return Ok(Some(BackendEvent::Fault { run: run.number, partition, error }));
            }
            let records = match run.next < end {
                true => {
                    tables::records(
                        conn,
                        run.partition_id,
                        run.next,
                        end,
                        self.log.settings.batch_records.max(1),
                    )
                    .await?
                }
                false => Vec::new(),
            };
            if run.next < end && records.first().is_none_or(|first| first.offset != run.next) {
                // Offsets have no gaps. A record that retention has just removed is out of range at
                // the next check.
                let Partition { start_offset: start, .. } =
                    tables::partition(conn, partition).await?;
                if start <= run.next {
                    let error = LogError::Missing { partition, offset: run.next };
                    return Ok(Some(BackendEvent::Fault { run: run.number, partition, error }));
                }
                continue;
            }
            if let Some(last) = records.last() {
                let next_offset = last.offset + 1;
                return Ok(Some(BackendEvent::Batch {
                    run: run.number,
                    batch: Batch { partition, records, next_offset },
                }));
            }
        }
        Ok(None)
    }

    /// The running partitions, starting after the one that was read last.
    fn round_robin(&self) -> impl Iterator<Item = (TopicPartition, Run)> {
        let after = self.last_read.map_or(Bound::Unbounded, Bound::Excluded);
        let until = self.last_read.map_or(Bound::Unbounded, Bound::Included);
        let first = self.running.range((after, Bound::Unbounded));
        let rest = self.last_read.map(|_| self.running.range((Bound::Unbounded, until)));
        first.chain(rest.into_iter().flatten()).map(|(partition, run)| (*partition, *run))
    }

    /// Logs a fault once, and its end. Returns the value, if there is one.
    fn log_fault<T>(&mut self, answer: Result<T, LogError>) -> Option<T> {
        match answer {
            Ok(value) => {
                if self.fault.end() {
                    info!("PostgreSQL log answers again");
                }
                Some(value)
            }
            Err(error) => {
                if self.fault.is_new(&error.to_string()) {
                    warn!(%error, "PostgreSQL log does not answer, retrying");
                }
                None
            }
        }
    }
}
