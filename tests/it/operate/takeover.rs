//! A killed process is replaced within the promised time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tallyline::event::{Event, Topic};
use tallyline::log::Log;

use super::{Kind, Running, SOON, Site, eventually_some, messages};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, build, claim, usage};

/// The promise: another process does the work of a killed one within this.
const TAKEOVER: Duration = Duration::from_secs(10);

/// Next offset and epoch in the ledger, by topic and partition.
type Positions = BTreeMap<(String, i32), (i64, i64)>;

async fn positions(site: &Site) -> Positions {
    let rows: Vec<(String, i32, i64, i64)> =
        sqlx::query_as("select topic, partition, next_offset, epoch from position")
            .fetch_all(&site.ledger.pool)
            .await
            .unwrap();
    rows.into_iter()
        .map(|(topic, partition, next_offset, epoch)| ((topic, partition), (next_offset, epoch)))
        .collect()
}

/// Appends events of every type, enough for each partition. Returns the ends of the partitions.
async fn append(log: &Log, round: u32) -> BTreeMap<(String, i32), i64> {
    let numbers = || round * 100..(round + 1) * 100;
    let of = |make: fn(uuid::Uuid, u32) -> Event| messages(numbers().map(|n| make(DEPLOYMENT, n)));
    let mut ends = BTreeMap::new();
    for (topic, sent) in [
        (Topic::WorkspaceBuilds, of(build)),
        (Topic::PrebuildClaims, of(claim)),
        (Topic::AgentUsage, of(usage)),
    ] {
        for (partition, offset) in log.append(topic, sent).await.unwrap() {
            let end = ends.entry((topic.name().to_owned(), partition)).or_default();
            *end = offset.max(*end - 1) + 1;
        }
    }
    assert_eq!(ends.len(), 9, "each partition has some: {ends:?}");
    ends
}

/// The partitions that a process reads, by its own report.
async fn read_by(site: &Site, running: &Running) -> BTreeSet<(String, i32)> {
    let state = running.state(site).await;
    let partition = |name: &String| {
        name.rsplit_once('/')
            .map(|(topic, partition)| (topic.to_owned(), partition.parse().unwrap()))
            .unwrap()
    };
    state["consume"]["partitions"].as_object().unwrap().keys().map(partition).collect()
}

async fn all_read(
    site: &Site,
    ends: &BTreeMap<(String, i32), i64>,
    but: &BTreeSet<(String, i32)>,
    deadline: Duration,
) {
    eventually(deadline, "the partitions are read to their ends", || async {
        let positions = positions(site).await;
        ends.iter()
            .filter(|(at, _)| !but.contains(*at))
            .all(|(at, end)| positions.get(at).is_some_and(|(next, _)| next >= end))
    })
    .await;
}

#[tokio::test]
async fn a_killed_consumers_partitions_are_read_again_in_time_and_no_survivor_stops() {
    let site = Site::registered(Kind::Kafka).await;
    let log = site.log();
    let survivor = site.start("--role consume");
    let mut others = vec![site.start("--role consume"), site.start("--role consume")];
    all_read(&site, &append(&log, 0).await, &BTreeSet::new(), SOON).await;
    for running in [&survivor, &others[0], &others[1]] {
        eventually_some(SOON, "each of the three reads some", async || {
            (read_by(&site, running).await.len() == 3).then_some(())
        })
        .await;
    }

    let lost = read_by(&site, &others[0]).await;
    let before = positions(&site).await;
    others.remove(0).process.kill();
    let killed = Instant::now();
    let ends = append(&log, 1).await;
    all_read(&site, &ends, &lost, TAKEOVER).await;
    let meanwhile = positions(&site).await;
    assert!(
        lost.iter().all(|at| meanwhile[at].1 == before[at].1),
        "the survivors read on before anything was taken over"
    );
    all_read(&site, &ends, &BTreeSet::new(), TAKEOVER.saturating_sub(killed.elapsed())).await;
    eprintln!("taken over after {:?}", killed.elapsed());

    // Each round starts one and kills the one before: each time another process takes over in time.
    for round in 2..6 {
        let next = site.start("--role consume");
        next.says(&["partitions assigned"]).await;
        others.remove(0).process.kill();
        others.push(next);
        let killed = Instant::now();
        all_read(&site, &append(&log, round).await, &BTreeSet::new(), TAKEOVER).await;
        eprintln!("round {round}: taken over after {:?}", killed.elapsed());
    }
    let said = survivor.process.stderr();
    assert!(!said.contains("consumer rejoins the group"), "{said}");
    site.balanced().await;
}

/// Waits within the promised time for these words in the log.
async fn says_in_time(running: &Running, words: &str) {
    eventually(TAKEOVER, words, || async { running.process.stderr().contains(words) }).await;
}

#[tokio::test]
async fn a_killed_collector_is_replaced_in_time_with_any_poll_interval() {
    let mut site = Site::new(Kind::Postgres).await;
    let _coderd = site.with_coderd().await;
    site.set("collect.poll_seconds", "30");
    let mut first = site.start("--role collect");
    first.says(&["\"message\":\"collecting\""]).await;
    let second = site.start("--role collect");
    second.says(&["another process collects this source"]).await;
    first.process.kill();
    says_in_time(&second, "\"message\":\"collecting\"").await;
}

#[tokio::test]
async fn the_series_of_a_killed_process_are_shown_by_another_in_time() {
    let site = Site::new(Kind::Postgres).await;
    let mut first = site.start("");
    first.says(&["this process shows the domain series"]).await;
    let second = site.start("--role serve");
    second.ready().await;
    first.process.kill();
    says_in_time(&second, "this process shows the domain series").await;
}
