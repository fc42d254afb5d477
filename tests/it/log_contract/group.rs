//! Groups: several consumers, partitions that move, a killed consumer, a stuck one.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tallyline::event::{Topic, TopicPartition};
use tallyline::log::{Batch, Consumer, Delivery, Log, LogError};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::site::{PARTITIONS, Site};
use super::{BUILDS, body, builds, message, on_every_group};
use crate::support::eventually;
use crate::support::process::Process;

on_every_group!(
    a_consumer_gets_everything_in_batches_of_one_partition,
    consumers_share_the_partitions_and_each_record_is_recorded_once,
    the_partitions_of_a_killed_consumer_move,
    partitions_left_out_are_not_read_until_they_are_started,
    held_partitions_are_not_read_until_they_are_started_and_stay_with_their_consumer,
    a_restarted_partition_delivers_no_batch_of_its_earlier_start,
    an_offset_that_the_log_does_not_hold_stops_only_its_partition,
    a_consumer_that_takes_no_batch_for_long_keeps_its_partitions,
    partitions_that_moved_while_no_batch_was_taken_are_read_when_they_return,
    a_stopped_consumer_leaves_the_group,
);

/// More than the 45 s that a broker may need to notice a killed member in the new group protocol.
const LONG: Duration = Duration::from_secs(120);
const GROUP: &str = "group";

/// Replaces the ledger: holder and position of each partition. It accepts a batch only if both
/// match.
#[derive(Default)]
struct Books(Mutex<BTreeMap<TopicPartition, Place>>);

#[derive(Clone, Default)]
struct Place {
    holder: Option<usize>,
    next: i64,
    bodies: Vec<String>,
}

impl Books {
    fn claim(&self, holder: usize, partitions: &[TopicPartition]) -> Vec<(TopicPartition, i64)> {
        let mut places = self.0.lock().unwrap();
        partitions
            .iter()
            .map(|partition| {
                let place = places.entry(*partition).or_default();
                place.holder = Some(holder);
                (*partition, place.next)
            })
            .collect()
    }

    fn record(&self, holder: usize, batch: &Batch) {
        let mut places = self.0.lock().unwrap();
        let place = places.entry(batch.partition).or_default();
        if place.holder == Some(holder) && place.next <= batch.records[0].offset {
            assert_eq!(place.next, batch.records[0].offset, "{} has no hole", batch.partition);
            place.next = batch.next_offset;
            place.bodies.extend(batch.records.iter().map(|record| body(&record.message)));
        }
    }

    fn release(&self, holder: usize, partitions: &[TopicPartition]) {
        let mut places = self.0.lock().unwrap();
        for partition in partitions {
            let place = places.entry(*partition).or_default();
            place.holder = place.holder.filter(|other| *other != holder);
        }
    }

    /// The number of partitions of each consumer.
    fn held(&self) -> BTreeMap<usize, usize> {
        let mut held = BTreeMap::new();
        for holder in self.0.lock().unwrap().values().filter_map(|place| place.holder) {
            *held.entry(holder).or_insert(0) += 1;
        }
        held
    }

    fn bodies(&self) -> Vec<String> {
        let mut all: Vec<String> =
            self.0.lock().unwrap().values().flat_map(|place| place.bodies.clone()).collect();
        all.sort_unstable();
        all
    }

    async fn eventually_held(&self, what: &str, holds: impl Fn(&BTreeMap<usize, usize>) -> bool) {
        eventually(LONG, what, || async { holds(&self.held()) }).await;
    }

    async fn eventually_recorded(&self, bodies: &[String]) {
        eventually(LONG, "every record is recorded", || async {
            self.bodies().len() >= bodies.len()
        })
        .await;
        assert_eq!(self.bodies(), bodies, "each once");
    }
}

/// A running consumer, until it is asked to leave.
struct Worker {
    leave: CancellationToken,
    task: JoinHandle<()>,
}

impl Worker {
    async fn begin(log: &Log, books: &Arc<Books>, holder: usize) -> Worker {
        Worker::go_on(log.join(GROUP, CancellationToken::new()).unwrap(), books, holder)
    }

    fn go_on(consumer: Consumer, books: &Arc<Books>, holder: usize) -> Worker {
        let leave = CancellationToken::new();
        let task = tokio::spawn(Self::work(consumer, books.clone(), holder, leave.clone()));
        Worker { leave, task }
    }

    async fn work(
        mut consumer: Consumer,
        books: Arc<Books>,
        holder: usize,
        leave: CancellationToken,
    ) {
        while let Some(delivery) = leave.run_until_cancelled(consumer.next()).await {
            match delivery.unwrap() {
                Delivery::Assigned(partitions) => {
                    let from = books.claim(holder, &partitions);
                    consumer.start(from);
                }
                Delivery::Revoked(partitions) => books.release(holder, &partitions),
                Delivery::Batch(batch) => {
                    books.record(holder, &batch);
                    consumer.mark(batch.partition, batch.next_offset);
                }
                Delivery::Fault { partition, error } => panic!("{partition}: {error}"),
            }
        }
        consumer.leave().await;
        let all: Vec<TopicPartition> = books.0.lock().unwrap().keys().copied().collect();
        books.release(holder, &all);
    }

    async fn leave(self) {
        self.leave.cancel();
        self.task.await.unwrap();
    }
}

const ALL_PARTITIONS: usize = 3 * PARTITIONS as usize;

/// Appends `count` records with distinct bodies to every topic. Returns the bodies, sorted.
async fn append(log: &Log, name: &str, count: usize) -> Vec<String> {
    let mut bodies = Vec::new();
    for topic in Topic::ALL {
        let own: Vec<String> =
            (0..count).map(|number| format!("{topic} {name} {number:05}")).collect();
        log.append(topic, own.iter().map(|body| message(body, body)).collect()).await.unwrap();
        bodies.extend(own);
    }
    bodies.sort_unstable();
    bodies
}

fn together(parts: &[&[String]]) -> Vec<String> {
    let mut all = parts.concat();
    all.sort_unstable();
    all
}

async fn a_consumer_gets_everything_in_batches_of_one_partition(site: Site) {
    let before = append(&site.log, "before", 300).await;
    let books = Arc::new(Books::default());
    let worker = Worker::begin(&site.log, &books, 1).await;
    books.eventually_recorded(&before).await;
    assert_eq!(books.held(), BTreeMap::from([(1, ALL_PARTITIONS)]));
    // Single records come through one by one.
    let mut all = before;
    for number in 0..3 {
        all = together(&[&all, &append(&site.log, &format!("trickle-{number}"), 1).await]);
        books.eventually_recorded(&all).await;
    }
    worker.leave().await;
}

async fn consumers_share_the_partitions_and_each_record_is_recorded_once(site: Site) {
    let books = Arc::new(Books::default());
    let first = Worker::begin(&site.log, &books, 1).await;
    books.eventually_held("one holds all", |held| held.get(&1) == Some(&ALL_PARTITIONS)).await;
    // An appender keeps writing while partitions move.
    let stop = CancellationToken::new();
    let appender = tokio::spawn({
        let (log, stop) = (site.log.clone(), stop.clone());
        async move {
            let (mut all, mut turn) = (Vec::new(), 0);
            while !stop.is_cancelled() {
                all.extend(append(&log, &format!("turn-{turn}"), 50).await);
                turn += 1;
            }
            all.sort_unstable();
            all
        }
    });
    let share = ALL_PARTITIONS / 2;
    let second = Worker::begin(&site.log, &books, 2).await;
    books
        .eventually_held("two share", |held| *held == BTreeMap::from([(1, share), (2, share)]))
        .await;
    let third = Worker::begin(&site.log, &books, 3).await;
    books
        .eventually_held("three share", |held| {
            held.len() == 3 && held.values().sum::<usize>() == ALL_PARTITIONS
        })
        .await;
    first.leave().await;
    books
        .eventually_held("two share again", |held| {
            *held == BTreeMap::from([(2, share), (3, share)])
        })
        .await;
    second.leave().await;
    books
        .eventually_held("one holds all again", |held| {
            *held == BTreeMap::from([(3, ALL_PARTITIONS)])
        })
        .await;
    stop.cancel();
    books.eventually_recorded(&appender.await.unwrap()).await;
    third.leave().await;
}

const ADDRESS: &str = "LOG_CONTRACT_ADDRESS";

async fn the_partitions_of_a_killed_consumer_move(site: Site) {
    let before = append(&site.log, "before", 100).await;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--ignored",
            "--exact",
            "log_contract::group::the_process_that_is_killed",
            "--nocapture",
        ])
        .env(ADDRESS, site.address());
    let mut process = Process::spawn(command);
    eventually(LONG, "the process has read all", || async {
        process.stdout().contains("read 300\n")
    })
    .await;

    let books = Arc::new(Books::default());
    let worker = Worker::begin(&site.log, &books, 1).await;
    books.eventually_held("two share", |held| held.get(&1) == Some(&(ALL_PARTITIONS / 2))).await;
    process.kill();
    books.eventually_held("one holds all", |held| held.get(&1) == Some(&ALL_PARTITIONS)).await;
    let after = append(&site.log, "after", 100).await;
    books.eventually_recorded(&together(&[&before, &after])).await;
    worker.leave().await;
}

/// Consumes everything until it is killed.
#[tokio::test]
#[ignore = "not a test: what the_partitions_of_a_killed_consumer_move starts and kills"]
async fn the_process_that_is_killed() {
    let address =
        std::env::var(ADDRESS).expect("the log's address, from the test that starts this");
    let books = Arc::new(Books::default());
    let _worker = Worker::begin(&Site::log_of(&address), &books, 0).await;
    eventually(LONG, "something was read", || async { books.bodies().len() == 300 }).await;
    println!("read {}", books.bodies().len());
    tokio::time::sleep(Duration::from_secs(600)).await;
}

/// Receives deliveries until all partitions are assigned. Starts those of the builds topic at
/// `from`.
async fn assigned(consumer: &mut Consumer, from: impl Fn(TopicPartition) -> Option<i64>) {
    let mut got = BTreeSet::new();
    while got.len() < ALL_PARTITIONS {
        if let Delivery::Assigned(partitions) = next(consumer).await {
            got.extend(partitions.iter().copied());
            let start = partitions
                .iter()
                .filter_map(|partition| Some((*partition, from(*partition)?)))
                .collect();
            consumer.start(start);
        }
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    tokio::time::timeout(LONG, consumer.next()).await.expect("a delivery in time").unwrap()
}

async fn next_batch(consumer: &mut Consumer) -> Batch {
    match next(consumer).await {
        Delivery::Batch(batch) => batch,
        other => panic!("no batch but {other:?}"),
    }
}

/// Writes ten records to each partition of the builds topic.
async fn ten_in_each(site: &Site) {
    for number in 0.. {
        let ends: Vec<i64> = ends(site).await;
        if ends.iter().all(|end| *end >= 10) {
            return;
        }
        site.log
            .append(BUILDS, vec![message(&format!("{number}"), &format!("{number}"))])
            .await
            .unwrap();
    }
}

async fn ends(site: &Site) -> Vec<i64> {
    let mut ends = Vec::new();
    for partition in 0..PARTITIONS {
        ends.push(site.log.watermarks(builds(partition)).await.unwrap().1);
    }
    ends
}

async fn partitions_left_out_are_not_read_until_they_are_started(site: Site) {
    ten_in_each(&site).await;
    let ends = ends(&site).await;
    let mut consumer = site.log.join(GROUP, CancellationToken::new()).unwrap();
    assigned(&mut consumer, |partition| (partition == builds(0)).then_some(ends[0] - 2)).await;
    let mut offsets = Vec::new();
    while offsets.len() < 2 {
        let batch = next_batch(&mut consumer).await;
        assert_eq!(batch.partition, builds(0));
        offsets.extend(batch.records.iter().map(|record| record.offset));
    }
    assert_eq!(offsets, [ends[0] - 2, ends[0] - 1]);
    consumer.start(vec![(builds(1), ends[1] - 1)]);
    let batch = next_batch(&mut consumer).await;
    assert_eq!(
        (batch.partition, batch.records[0].offset, batch.next_offset),
        (builds(1), ends[1] - 1, ends[1])
    );
    consumer.leave().await;
}

async fn held_partitions_are_not_read_until_they_are_started_and_stay_with_their_consumer(
    site: Site,
) {
    ten_in_each(&site).await;
    let before = ends(&site).await;
    let mut consumer = site.log.join(GROUP, CancellationToken::new()).unwrap();
    assigned(&mut consumer, |partition| {
        Some(if partition.topic == BUILDS { before[partition.partition as usize] } else { 0 })
    })
    .await;
    consumer.hold(vec![builds(0)]);
    // ten more in each: those of the unstarted partition do not come
    for number in 0.. {
        if ends(&site).await.iter().zip(&before).all(|(end, before)| end - before >= 10) {
            break;
        }
        site.log
            .append(BUILDS, vec![message(&format!("{number}"), &format!("more {number}"))])
            .await
            .unwrap();
    }
    let after = ends(&site).await;
    let mut reached = before.clone();
    while (1..reached.len()).any(|partition| reached[partition] < after[partition]) {
        let batch = next_batch(&mut consumer).await;
        assert_ne!(batch.partition, builds(0));
        reached[batch.partition.partition as usize] = batch.next_offset;
    }
    consumer.start(vec![(builds(0), before[0])]);
    while reached[0] < after[0] {
        let batch = next_batch(&mut consumer).await;
        assert_eq!((batch.partition, batch.records[0].offset), (builds(0), reached[0]));
        reached[0] = batch.next_offset;
    }
    consumer.leave().await;
}

async fn a_restarted_partition_delivers_no_batch_of_its_earlier_start(site: Site) {
    ten_in_each(&site).await;
    let end = ends(&site).await[0];
    let mut consumer = site.log.join(GROUP, CancellationToken::new()).unwrap();
    assigned(&mut consumer, |partition| (partition == builds(0)).then_some(0)).await;
    for _ in 0..20 {
        let mut next_offset = 0;
        while next_offset < end {
            let batch = next_batch(&mut consumer).await;
            assert_eq!((batch.partition, batch.records[0].offset), (builds(0), next_offset));
            next_offset = batch.next_offset;
            if next_offset == end {
                // Half of these starts come while records are in flight.
                consumer.start(vec![(builds(0), 3)]);
                consumer.start(vec![(builds(0), 0)]);
            }
        }
    }
    consumer.leave().await;
}

async fn an_offset_that_the_log_does_not_hold_stops_only_its_partition(site: Site) {
    ten_in_each(&site).await;
    let ends = ends(&site).await;
    let mut consumer = site.log.join(GROUP, CancellationToken::new()).unwrap();
    let beyond = ends[1] + 1000;
    assigned(&mut consumer, |partition| {
        [(builds(0), 0), (builds(1), beyond)]
            .into_iter()
            .find(|(one, _)| *one == partition)
            .map(|(_, offset)| offset)
    })
    .await;
    let (mut fault, mut read) = (None, 0);
    while fault.is_none() || read < ends[0] {
        match next(&mut consumer).await {
            Delivery::Fault { partition, error } => fault = Some((partition, error)),
            Delivery::Batch(batch) => {
                assert_eq!(batch.partition, builds(0));
                read = batch.next_offset;
            }
            other => panic!("neither a batch nor a fault but {other:?}"),
        }
    }
    let error =
        LogError::OutOfRange { partition: builds(1), offset: beyond, start: 0, end: ends[1] };
    assert_eq!(fault, Some((builds(1), error)));
    // It can start at an offset that the log has, and the other still goes on.
    consumer.start(vec![(builds(1), ends[1] - 1)]);
    let batch = next_batch(&mut consumer).await;
    assert_eq!((batch.partition, batch.next_offset), (builds(1), ends[1]));
    let mut reached = false;
    for number in 0..100 {
        let placed = site
            .log
            .append(BUILDS, vec![message(&format!("more-{number}"), "more")])
            .await
            .unwrap();
        if placed[0].0 == 0 {
            reached = true;
            break;
        }
    }
    assert!(reached, "one of a hundred keys belongs to partition 0");
    while next_batch(&mut consumer).await.partition != builds(0) {}
    consumer.leave().await;
}

async fn a_consumer_that_takes_no_batch_for_long_keeps_its_partitions(site: Site) {
    let mut consumer = site.log.join(GROUP, CancellationToken::new()).unwrap();
    assigned(&mut consumer, |_| Some(0)).await;
    // Far more batches than the buffer takes, for longer than a member's silence (6 s) or lease (2
    // s) may last.
    let begun = Instant::now();
    let mut all = Vec::new();
    while begun.elapsed() < Duration::from_secs(8) {
        all.extend(append(&site.log, &format!("turn-{}", all.len()), 20).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    all.sort_unstable();
    let (mut bodies, mut next_offsets) = (Vec::new(), BTreeMap::new());
    while bodies.len() < all.len() {
        // Neither Revoked nor Assigned.
        let batch = next_batch(&mut consumer).await;
        assert_eq!(batch.records[0].offset, *next_offsets.get(&batch.partition).unwrap_or(&0));
        next_offsets.insert(batch.partition, batch.next_offset);
        bodies.extend(batch.records.iter().map(|record| body(&record.message)));
    }
    bodies.sort_unstable();
    assert_eq!(bodies, all);
    consumer.leave().await;
}

async fn partitions_that_moved_while_no_batch_was_taken_are_read_when_they_return(site: Site) {
    let books = Arc::new(Books::default());
    let mut consumer = site.log.join(GROUP, CancellationToken::new()).unwrap();
    assigned(&mut consumer, |_| Some(0)).await;
    for topic in Topic::ALL {
        books.claim(
            1,
            &(0..PARTITIONS)
                .map(|partition| TopicPartition { topic, partition })
                .collect::<Vec<_>>(),
        );
    }
    // More batches than the buffer takes, for longer than the wait before partitions are paused.
    let (begun, mut all) = (Instant::now(), Vec::new());
    while begun.elapsed() < Duration::from_secs(2) {
        all.extend(append(&site.log, &format!("turn-{}", all.len()), 20).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let other = Worker::begin(&site.log, &books, 2).await;
    books.eventually_held("two share", |held| held.get(&2) == Some(&(ALL_PARTITIONS / 2))).await;
    other.leave().await;
    let worker = Worker::go_on(consumer, &books, 1);
    books
        .eventually_held("one holds all again", |held| held.get(&1) == Some(&ALL_PARTITIONS))
        .await;
    all.extend(append(&site.log, "after", 100).await);
    all.sort_unstable();
    books.eventually_recorded(&all).await;
    worker.leave().await;
}

async fn a_stopped_consumer_leaves_the_group(site: Site) {
    let stop = CancellationToken::new();
    let mut consumer = site.log.join(GROUP, stop.clone()).unwrap();
    assigned(&mut consumer, |_| None).await;
    stop.cancel();
    let ended = tokio::time::timeout(LONG, async {
        loop {
            if let Err(error) = consumer.next().await {
                break error;
            }
        }
    });
    assert_eq!(ended.await.expect("an end in time"), LogError::Stopped);
    let mut other = site.log.join(GROUP, CancellationToken::new()).unwrap();
    assigned(&mut other, |_| None).await;
    other.leave().await;
}
