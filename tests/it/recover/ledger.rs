//! A ledger that is restored from a backup under running processes, as nobody should do it: they see it, withhold and hold what has to be, catch
//! up, and end at the truth. No series falls in a Prometheus that scraped throughout, and nothing is billed twice.

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::sim::coderd::SchemaVersion;
use tempfile::TempDir;

use super::scraped::{self, values};
use crate::journey::expected::Numbers;
use crate::journey::site::Backend;
use crate::journey::story::{FIRST_PART, Journey, SECOND_PART, SOON};
use crate::support::eventually;

const PENDING: &str = "select count(*) from publication where state = 'pending'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_restored_from_a_backup_ends_equal_to_the_truth_on_kafka() {
    restored(Backend::Kafka, SchemaVersion::TasksEra).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_restored_from_a_backup_ends_equal_to_the_truth_on_the_postgres_log() {
    restored(Backend::Postgres, SchemaVersion::Sep2026).await;
}

/// Where in the history the backup is taken; the restore is hours of coderd's time later.
const BACKUP: f64 = 0.6;

async fn restored(backend: Backend, schema: SchemaVersion) {
    let folder = TempDir::new().unwrap();
    let mut journey = Journey::begin(backend, schema, 20_262).await;
    journey.backfill().await;
    journey.simulation.commit_held().await.unwrap();
    all_is_published(&journey).await;
    let first = values(&Numbers::of_truth(&journey.simulation.truth(), journey.introduced_at));
    let server = scraped::server(journey.serve.each_ref().map(|serve| serve.metrics.as_str())).await;
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
    let page = shown(&journey).await;
    let (incarnation, billed) = (journey.site.ledger.incarnation().await.unwrap(), journey.tallyman.books().billed.len());
    let sequence = journey.site.ledger.last_sequence().await.unwrap();

    journey.site.database.restore(&backup).await;
    journey.done(&format!("restored: {lost} builds lost"));
    let recoveries = "select count(*) from recovery";
    eventually(SOON, "it is seen", || async { count(&journey, recoveries).await == Some(1) }).await;
    let restored = journey.site.ledger.recovering().await.unwrap();
    eprintln!("sequence was {sequence}, is {}; {restored:?}", journey.site.ledger.last_sequence().await.unwrap());
    assert_ne!(journey.site.ledger.incarnation().await.unwrap(), incarnation);
    // as long as it is open, nobody shows anything and nothing is sent
    let looks = std::cell::Cell::new(0);
    let requests = journey.tallyman.books().requests;
    eventually(SOON, "it has caught up", || async {
        let before = open(&journey).await;
        let shown = format!("{}{}", journey.serve[0].domain_lines().await, journey.serve[1].domain_lines().await);
        let sent = journey.tallyman.books().requests;
        if before && open(&journey).await {
            assert_eq!((shown.as_str(), sent), ("", requests), "shown or sent before it has caught up");
            looks.set(looks.get() + 1);
        }
        !open(&journey).await
    })
    .await;
    eprintln!("looked {} times while it caught up", looks.get());
    let closed: (DateTime<Utc>, DateTime<Utc>) =
        sqlx::query_as("select opened_at, closed_at from recovery").fetch_one(&journey.site.database.pool).await.unwrap();
    eprintln!("caught up in {} ms", (closed.1 - closed.0).num_milliseconds());
    let trail: Vec<(String, String)> =
        sqlx::query_as("select actor, subject from operator_act").fetch_all(&journey.site.database.pool).await.unwrap();
    assert_eq!(trail, [(format!("tallyline {}", env!("CARGO_PKG_VERSION")), "ledger".to_owned())]);
    all_is_published(&journey).await;
    eventually(SOON, "the same is shown as before", || async { shown(&journey).await == page }).await;
    let books = journey.tallyman.books();
    assert_eq!(books.billed.len(), billed);
    assert!(books.billed.iter().all(|billed| billed.times == 1));
    // what was published in the lost time is sent again, and so often may `bill_is_true` meet it
    journey.kills_of_publishers += books.deliveries.len().div_ceil(100);
    journey.done("caught up");

    journey.history(SECOND_PART, 1.0, 4).await;
    journey.simulation.commit_held().await.unwrap();
    journey.settled().await;
    if shown(&journey).await.is_empty() || journey.serve[0].domain_lines().await.is_empty() {
        journey.serve.swap(0, 1);
    }
    journey.every_number_is_true().await;
    let audit = journey.succeeds(&["audit", "--output", "json"]).await;
    assert_eq!(audit["balanced"], true, "{audit}");
    let last = values(&Numbers::of_truth(&journey.simulation.truth(), journey.introduced_at));
    eventually(SOON, "the last truth is scraped", || scraped::has(&server, &last)).await;
    scraped::nothing_fell(&server, &first, &last).await;
    let seen = journey.watch.take().expect("it watches").end().await;
    assert_eq!(seen.faults, [String::new(); 0]);
    let [one, other] = &mut journey.consume;
    let [first, second] = &mut journey.serve;
    for process in [&mut journey.collect, one, other, &mut journey.publish, &mut first.process, &mut second.process] {
        assert!(process.runs(), "{}", process.stderr());
        assert!(process.terminate(SOON).await.success(), "{}", process.stderr());
    }
}

/// The page of whichever process shows the series.
async fn shown(journey: &Journey) -> String {
    format!("{}{}", journey.serve[0].domain_lines().await, journey.serve[1].domain_lines().await)
}

async fn all_is_published(journey: &Journey) {
    journey.all_of_coderd_is_in().await;
    eventually(SOON, "the log is read to its ends", || journey.site.has_read_all()).await;
    eventually(SOON * 2, "all is published", || async { count(journey, PENDING).await == Some(0) }).await;
}

/// None while the ledger cannot be asked.
async fn count(journey: &Journey, query: &'static str) -> Option<i64> {
    sqlx::query_scalar(query).fetch_one(&journey.site.database.pool).await.ok()
}

async fn open(journey: &Journey) -> bool {
    count(journey, "select count(*) from recovery where closed_at is null").await == Some(1)
}
