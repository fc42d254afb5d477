//! A ledger is restored from a backup under running processes, which operators should not do. They
//! notice it, withhold and hold, catch up, and end with true numbers. No series falls in a
//! Prometheus that scrapes all the time, and nothing is billed twice.

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::ledger::{positions, recoveries, snapshots};
use tallyline_sim::coderd::SchemaVersion;
use tempfile::TempDir;

use super::scraped::{self, values};
use super::world::{World, ends};
use crate::journey::expected::Numbers;
use crate::journey::site::{Backend, Serve};
use crate::journey::story::{FIRST_PART, Journey, SECOND_PART, SOON};
use crate::support::eventually;
use crate::support::ledger::GROUP;

const PENDING: &str = "select count(*) from publication where state = 'pending'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_restored_from_a_backup_ends_equal_to_the_truth_on_kafka() {
    restored(Backend::Kafka, SchemaVersion::TasksEra).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_restored_from_a_backup_ends_equal_to_the_truth_on_the_postgres_log() {
    restored(Backend::Postgres, SchemaVersion::Sep2026).await;
}

/// The part of the history at which the backup is taken; the restore is hours of coderd's time
/// later.
const BACKUP: f64 = 0.6;

async fn restored(backend: Backend, schema: SchemaVersion) {
    let folder = TempDir::new().unwrap();
    let mut journey = Journey::begin(backend, schema, 20_262).await;
    journey.backfill().await;
    journey.simulation.commit_held().await.unwrap();
    all_is_published(&journey).await;
    let first = values(&Numbers::of_truth(&journey.simulation.truth(), journey.introduced_at));
    let server =
        scraped::server(journey.serve.each_ref().map(|serve| serve.metrics.as_str())).await;
    eventually(SOON, "the first truth is scraped", || scraped::has(&server, &first)).await;

    journey.history(FIRST_PART, BACKUP, 2).await;
    let backup = journey.site.database.back_up(folder.path());
    let backed_up_at = journey.at(BACKUP);
    journey.history(BACKUP, SECOND_PART, 4).await;
    journey.simulation.commit_held().await.unwrap();
    all_is_published(&journey).await;
    let truth = journey.simulation.truth();
    assert!(journey.at(SECOND_PART) - backed_up_at > TimeDelta::hours(1));
    let lost = truth.builds.iter().filter(|build| build.completed_at > backed_up_at).count();
    let second = values(&Numbers::of_truth(&truth, journey.introduced_at));
    eventually(SOON, "all before the loss is scraped", || scraped::has(&server, &second)).await;
    let page = domain_series(&journey).await;
    let (incarnation, billed) = (
        journey.site.ledger.run(snapshots::head).await.unwrap().incarnation,
        journey.tallyman.books().billed.len(),
    );
    let sequence = journey.site.ledger.run(snapshots::head).await.unwrap().number;

    journey.site.database.restore(&backup).await;
    journey.done(&format!("restored: {lost} builds lost"));
    let recoveries = "select count(*) from recovery";
    eventually(SOON, "the restore is detected", || async {
        count(&journey, recoveries).await == Some(1)
    })
    .await;
    let restored = journey.site.ledger.run(recoveries::open).await.unwrap();
    eprintln!(
        "sequence was {sequence}, is {}; {restored:?}",
        journey.site.ledger.run(snapshots::head).await.unwrap().number
    );
    assert_ne!(journey.site.ledger.run(snapshots::head).await.unwrap().incarnation, incarnation);
    // until it closes, no process shows the series and nothing is sent
    let checks = std::cell::Cell::new(0);
    let requests = journey.tallyman.books().requests;
    eventually(SOON, "the ledger has caught up", || async {
        let before = open(&journey).await;
        let domain_series = format!(
            "{}{}",
            journey.serve[0].domain_lines().await,
            journey.serve[1].domain_lines().await
        );
        let sent = journey.tallyman.books().requests;
        if before && open(&journey).await {
            assert_eq!(
                (domain_series.as_str(), sent),
                ("", requests),
                "shown or sent before the ledger has caught up"
            );
            checks.set(checks.get() + 1);
        }
        !open(&journey).await
    })
    .await;
    eprintln!("looked {} times while it caught up", checks.get());
    let closed: (DateTime<Utc>, DateTime<Utc>) =
        sqlx::query_as("select opened_at, closed_at from recovery")
            .fetch_one(&journey.site.database.pool)
            .await
            .unwrap();
    eprintln!("caught up in {} ms", (closed.1 - closed.0).num_milliseconds());
    let trail: Vec<(String, String)> = sqlx::query_as("select actor, subject from operator_act")
        .fetch_all(&journey.site.database.pool)
        .await
        .unwrap();
    assert_eq!(trail, [(format!("tallyline {}", env!("CARGO_PKG_VERSION")), "ledger".to_owned())]);
    all_is_published(&journey).await;
    eventually(SOON, "the same is shown as before", || async {
        domain_series(&journey).await == page
    })
    .await;
    let books = journey.tallyman.books();
    assert_eq!(books.billed.len(), billed);
    assert!(books.billed.iter().all(|billed| billed.times == 1));
    // usage that was published in the lost time is sent again: `bill_is_true` may meet this number
    // of repeats
    journey.kills_of_publishers += books.deliveries.len().div_ceil(100);
    journey.done("caught up");

    journey.history(SECOND_PART, 1.0, 4).await;
    journey.simulation.commit_held().await.unwrap();
    journey.all_of_coderd_is_in().await;
    journey.settled().await;
    if domain_series(&journey).await.is_empty() || journey.serve[0].domain_lines().await.is_empty()
    {
        journey.serve.swap(0, 1);
    }
    journey.every_number_is_true().await;
    let audit = journey.succeeds(&["audit", "--output", "json"]).await;
    assert_eq!(audit["balanced"], true, "{audit}");
    let last = values(&Numbers::of_truth(&journey.simulation.truth(), journey.introduced_at));
    eventually(SOON, "the last truth is scraped", || scraped::has(&server, &last)).await;
    scraped::nothing_fell(&server, &first, &last).await;
    let observations = journey.watch.take().expect("it watches").end().await;
    assert!(observations.faults.is_empty(), "{:?}", observations.faults);
    let [one, other] = &mut journey.consume;
    let [first, second] = &mut journey.serve;
    for process in [
        &mut journey.collect,
        one,
        other,
        &mut journey.publish,
        &mut first.process,
        &mut second.process,
    ] {
        assert!(process.runs(), "{}", process.stderr());
        assert!(process.terminate(SOON).await.success(), "{}", process.stderr());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_start_after_the_restore_detect_it_in_the_groups_marks() {
    let folder = TempDir::new().unwrap();
    let mut world = World::begin(Backend::Kafka).await;
    let backup = lost_part(&mut world, &folder).await;
    world.site.database.restore(&backup).await;
    // the lost time reaches at least to the records that were read after the backup
    let effect = world.plan("ledger").await["effect"].clone();
    let [newest, read_until] = [&effect["newest_batch_at"], &effect["had_read_until"]]
        .map(|at| at.as_str().map(instant_of));
    assert!(newest.is_some() && read_until > newest, "{effect}");
    let mut publish = world.site.start("publish", &[]);
    comes_back(&world, "which this ledger lacks").await;
    ends(&mut publish).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_restored_twice_is_detected_twice_in_the_groups_marks() {
    let folder = TempDir::new().unwrap();
    let mut world = World::begin(Backend::Kafka).await;
    let backup = lost_part(&mut world, &folder).await;
    for _ in 1..=2 {
        world.site.database.restore(&backup).await;
        let mut publish = world.site.start("publish", &[]);
        comes_back(&world, "which this ledger lacks").await;
        ends(&mut publish).await;
        group_has_committed(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_older_than_every_position_is_detected_in_the_groups_marks() {
    let folder = TempDir::new().unwrap();
    let world = World::begin(Backend::Kafka).await;
    let mut collect = world.collect();
    world.is_introduced().await;
    world.another_pass().await;
    let backup = world.site.database.back_up(folder.path());
    assert_eq!(world.count("select count(*) from position").await, 0);
    let mut consume = world.site.start("consume", &[]);
    world.all_is_in().await;
    group_has_committed(&world).await;
    for process in [&mut collect, &mut consume] {
        ends(process).await;
    }
    world.site.database.restore(&backup).await;
    let mut publish = world.site.start("publish", &[]);
    comes_back(&world, "which this ledger lacks").await;
    ends(&mut publish).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_declares_the_ledger_restored() {
    let folder = TempDir::new().unwrap();
    let mut world = World::begin(Backend::Postgres).await;
    let backup = lost_part(&mut world, &folder).await;
    world.site.database.restore(&backup).await;
    sqlx::query(
        "update publication set event_created_at = now() - interval '31 days' where event_id in (select event_id from publication limit 3)",
    )
    .execute(&world.site.database.pool)
    .await
    .unwrap();
    let plan = world.plan("ledger").await;
    let effect = &plan["effect"];
    let pending = world.count(PENDING).await;
    assert!(pending > 100, "{pending}");
    assert_eq!(
        (effect["pending"].as_i64(), effect["pending_too_old"].as_i64()),
        (Some(pending), Some(3)),
        "{plan}"
    );
    assert_eq!(
        effect["pending_published_by_coderd"].as_i64(),
        Some(marked(&world, true).await),
        "{plan}"
    );
    assert_eq!(
        (&effect["log_restored_too"], effect["sources_to_read"].as_array().unwrap().len()),
        (&true.into(), 1),
        "{plan}"
    );
    assert_eq!(effect["had_read_until"], serde_json::Value::Null, "{plan}");
    let planned = world.site.command(&["recover", "plan", "--lost", "ledger"]).await.stdout;
    for said in [
        "as they are there today",
        "whose template, organization or preset was renamed",
        "acts of operators after the backup",
    ] {
        assert!(planned.contains(said), "{planned}");
    }
    let executed = world.execute(&plan).await;
    assert!(executed.status.success(), "{executed:?}");
    assert_eq!(
        world
            .count("select count(*) from publication where state = 'pending' and not unanswered")
            .await,
        0
    );
    world.nothing_is_lost("ledger", "closes by itself").await;
    let refused = world.execute(&plan).await;
    assert!(
        refused.status.code() == Some(4) && refused.stderr.contains("executed before"),
        "{refused:?}"
    );
    // where the backup ended, and that an operator's last act may be missing
    let (sequence, newest) =
        (effect["sequence"].as_str().unwrap(), effect["newest_batch_at"].as_str().unwrap());
    // the same place has another name in the new incarnation
    let (_, number) = sequence.split_once(':').unwrap();
    let incarnation = world.site.ledger.run(snapshots::head).await.unwrap().incarnation;
    let status = world.site.command(&["status"]).await.stdout;
    let forgotten = format!(
        "It has no acts. When the restore was detected, it ended at sequence {incarnation}:{number} of {}Z",
        &newest[..19]
    );
    assert!(
        status.contains("was restored from a backup") && status.contains(&forgotten),
        "{status}\n{forgotten}"
    );
    comes_back(&world, "the disk is gone").await;
    assert_eq!(world.acts().await.len(), 1, "no second recovery is opened");
    assert_eq!(
        world.count("select count(*) from publication where state = 'not_ours'").await,
        marked(&world, true).await
    );
    // usage that was too old could have been sent in the lost time
    let mut publish = world.site.start("publish", &[]);
    eventually(SOON * 2, "every publication is settled", || async {
        world.count(PENDING).await == 0
    })
    .await;
    assert_eq!(
        world.count("select count(*) from publication where state = 'unknown'").await,
        3 - world.count(THREE_MARKED).await
    );
    ends(&mut publish).await;
}

fn instant_of(text: &str) -> DateTime<Utc> {
    text.parse().expect("a time")
}

/// Of the three that were made too old, those that coderd had published.
const THREE_MARKED: &str = "select count(*) from publication where state = 'not_ours' and event_created_at < now() - interval '30 days'";

/// The number of usage rows that coderd has marked as published, or not.
async fn marked(world: &World, published: bool) -> i64 {
    sqlx::query_scalar("select count(*) from usage_events where (published_at is not null) = $1")
        .bind(published)
        .fetch_one(&world.coderd.pool)
        .await
        .unwrap()
}

/// Waits until everything is in, takes a backup, reads more records, and ends all processes.
pub async fn lost_part(world: &mut World, folder: &TempDir) -> std::path::PathBuf {
    let (mut collect, mut consume) = (world.collect(), world.site.start("consume", &[]));
    world.all_is_in().await;
    let backup = world.site.database.back_up(folder.path());
    world.goes_on_to(0.6).await;
    world.all_is_in().await;
    if world.site.prefix.is_some() {
        group_has_committed(world).await;
    }
    for process in [&mut collect, &mut consume] {
        ends(process).await;
    }
    backup
}

/// Waits until the marks of the consumer group are at the ledger's positions.
pub async fn group_has_committed(world: &World) {
    eventually(SOON, "the group committed every position", || async {
        let Ok(marks) = world.site.log.marks(GROUP).await else { return false };
        let positions = world.site.ledger.run(positions::list).await.unwrap();
        positions.iter().all(|(at, next)| {
            *next == 0
                || marks.iter().any(|mark| mark.partition == *at && mark.next_offset == *next)
        })
    })
    .await;
}

/// Starts the processes. They notice the loss for this reason unless it is known, and show
/// everything once they have caught up. Before, nothing is sent. After a known loss, nothing is
/// shown either.
async fn comes_back(world: &World, reason: &str) {
    let is_known = world.count("select count(*) from recovery").await == 1;
    let sent_before = world.tallyman.books().requests;
    let mut serve = Serve::start(&world.site);
    let (mut collect, mut consume) = (world.collect(), world.site.start("consume", &[]));
    let closed = "select count(*) from recovery where closed_at is not null";
    eventually(SOON * 2, "the ledger has caught up", || async {
        let (domain_series, sent) = (serve.domain_lines().await, world.tallyman.books().requests);
        let done = world.count(closed).await == 1;
        assert!(done || sent == sent_before, "sent before the ledger has caught up");
        assert!(
            done || !is_known || domain_series.is_empty(),
            "shown before the ledger has caught up"
        );
        done
    })
    .await;
    let acts = world.acts().await;
    assert!(acts.len() == 1 && acts[0].2.contains(reason), "{acts:?}");
    world.all_is_in().await;
    world.everything_is_there().await;
    eventually(SOON, "the series are shown again", || async {
        !serve.domain_lines().await.is_empty()
    })
    .await;
    world.balanced().await;
    for process in [&mut collect, &mut consume, &mut serve.process] {
        ends(process).await;
    }
}

/// The page of the process that shows the series.
async fn domain_series(journey: &Journey) -> String {
    format!("{}{}", journey.serve[0].domain_lines().await, journey.serve[1].domain_lines().await)
}

async fn all_is_published(journey: &Journey) {
    journey.all_of_coderd_is_in().await;
    eventually(SOON, "the log is read to its ends", || journey.site.has_read_all()).await;
    eventually(SOON * 2, "every event is published", || async {
        count(journey, PENDING).await == Some(0)
    })
    .await;
}

/// None while the ledger does not answer.
async fn count(journey: &Journey, query: &'static str) -> Option<i64> {
    sqlx::query_scalar(query).fetch_one(&journey.site.database.pool).await.ok()
}

async fn open(journey: &Journey) -> bool {
    count(journey, "select count(*) from recovery where closed_at is null").await == Some(1)
}
